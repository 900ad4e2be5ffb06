"""Topics of the reader's choosing, or found in the stream: a name and examples of each, told apart by an encoder."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import CountVectorizer

from llmprod.finetune import fewshot
from llmprod.models import Predictor
from llmprod.news_monitoring.documents import NewsError
from llmprod.tables import shown

OTHER = "other"
LEAD = 64  # tokens of a text that count: a headline, or the beginning of an article
WORD = re.compile(r"\b[^\W\d_]{3,}\b")  # of at least three letters, in any alphabet with spaces
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


def typed(topics: Mapping[str, Sequence[str]]) -> list[str]:
    """Topics as `parse` reads them, a line each; in the examples a comma stands for a semicolon."""
    return [f"{name}: " + "; ".join(shown(e.replace(";", ","), 200) for e in some) for name, some in topics.items()]


def find(
    texts: Sequence[str], number: int, model: str = "minilm", precision: str = "auto", seed: int = 0
) -> dict[str, list[str]]:
    """Topics of a stream, largest first: clusters of texts by k-means (Lloyd 1982) over a sentence encoder's vectors.

    A name is a cluster's three words of the highest class-based TF-IDF (Grootendorst 2022, "BERTopic"): a word's share
    of the cluster's words × log(1 + words of a cluster on average / occurrences in all). Examples are the three texts
    nearest to the centre. Raises NewsError for fewer different texts with words than topics.
    """
    some = [text for text in dict.fromkeys(texts) if WORD.search(text)]
    if not 1 < number <= len(some):
        raise NewsError(f"{number} topics in {len(some):,} different texts: ask for 2 or more, and give more texts.")
    vectors = Predictor.pretrained(model, max_length=LEAD, precision=precision).embed(some)
    clusters = KMeans(number, n_init=10, random_state=seed).fit(vectors)
    counter = CountVectorizer(token_pattern=WORD.pattern, stop_words="english")
    counts = counter.fit_transform(some)
    occurrences = np.array([np.asarray(counts[clusters.labels_ == k].sum(axis=0))[0] for k in range(number)])
    shares = occurrences / np.maximum(occurrences.sum(axis=1, keepdims=True), 1)
    telling = shares * np.log1p(occurrences.sum() / number / occurrences.sum(axis=0))
    words, found = counter.get_feature_names_out(), {}
    for k in np.argsort(-np.bincount(clusters.labels_), kind="stable"):
        name = " ".join(words[np.argsort(-telling[k], kind="stable")[:3]])
        nearest = np.argsort(-vectors @ clusters.cluster_centers_[k], kind="stable")[:3]
        found[f"{name} {k}" if name in found else name] = [some[i] for i in nearest]
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
