"""Topics of the reader's choosing: a name and some examples of each, told apart by a sentence encoder untrained."""

from collections.abc import Mapping, Sequence

import numpy as np

from llmprod.finetune import fewshot
from llmprod.models import Predictor
from llmprod.news_monitoring.documents import NewsError

OTHER = "other"
LEAD = 64  # tokens of a text that count: a headline, or the beginning of an article
LEAST = 0.325  # chosen on Reuters R8's training texts, one class left out at a time (study `topics`)


def parse(words: Sequence[str]) -> dict[str, list[str]]:
    """Topics as they are typed, each `name` or `name: example; example`: the examples by name.

    Raises NewsError for a topic without a name, one that is given twice, or one that is called `OTHER`.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, _, rest = (part.strip() for part in word.partition(":"))
        if not name or name in (OTHER, *found):
            raise NewsError(
                f"topic '{word}': give each a name of its own, not '{OTHER}', as in 'oil: petrol is dearer'."
            )
        found[name] = [example for part in rest.split(";") if (example := part.strip())]
    return found


class Topics:
    """Tells the topic of a text by its nearest prototype: see `fewshot.set_prototypes`.

    It has `labels` and `predict`, as a `Predictor`; the last label is `OTHER`.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[str]],
        least: float = LEAST,
        model: str = "minilm",
        precision: str = "auto",
    ):
        """Embeds names and examples.

        Args:
            examples: by the topic's name; none: the name alone (zero-shot)
            least: a text whose cosine with every topic is below it is of `OTHER`
            model: a sentence encoder, see `models.Predictor.pretrained`
        """
        self.encoder = Predictor.pretrained(model, list(examples), head="cosine", max_length=LEAD, precision=precision)
        texts = [text for some in examples.values() for text in some]
        fewshot.set_prototypes(self.encoder, texts, np.repeat(range(len(examples)), list(map(len, examples.values()))))
        self.labels, self.least = [*examples, OTHER], least

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Cosines with the topics, and `least` as that with `OTHER` (texts, topics + 1)."""
        return self.nearest(self.encoder.embed(texts))

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """The same for texts that are embedded (texts, dimensions)."""
        cosines = vectors @ self.encoder.model.classifier.weight.detach().cpu().numpy().T
        return np.column_stack([cosines, np.full(len(cosines), self.least)])
