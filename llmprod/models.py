"""The classifier: a pretrained encoder with a head; loading, checkpoints, prediction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import linear, normalize
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from llmprod import LLMProdError, artifacts, files
from llmprod.machine import autocast, device_and_precision

PREFIX = "prefix"


class ModelError(LLMProdError):
    """A model can't be used as it is."""


def model_folder(model: str) -> Path:
    """The folder of a model: a registered artifact (fetched if need be) or a local folder with safetensors.

    Raises ModelError where it is neither.
    """
    if model in artifacts.registry():
        if artifacts.entry(model)["kind"] != "model":
            raise ModelError(f"The artifact '{model}' is data, not a model; models are: {', '.join(names())}.")
        return artifacts.fetch(model)
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"'{model}' is neither a known model ({', '.join(names())}) nor a folder with config.json and "
            "*.safetensors (pickled weights are not loaded)."
        )
    return folder


def names() -> list[str]:
    """The names of the registered models."""
    return [name for name, item in artifacts.registry().items() if item["kind"] == "model"]


@dataclass
class Outputs(ModelOutput):
    """Loss (where there are labels), logits of shape (texts, classes), text vectors of shape (texts, dimensions)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    vectors: torch.Tensor | None = None


class Classifier(PreTrainedModel):
    """An encoder, and a head with one vector for each class; the two below differ in a text's vector and its logits."""

    base_model_prefix = "encoder"

    def vectors_and_logits(
        self, hidden: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text vectors and logits (texts, classes) from token vectors (texts, tokens, dimensions)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Outputs:
        """Logits and text vectors and, where there are labels, the mean cross-entropy loss."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        vectors, logits = self.vectors_and_logits(hidden, input_ids, attention_mask)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return Outputs(loss=loss, logits=logits, vectors=vectors)


class MeanPoolClassifier(Classifier):
    """A pretrained encoder, the mean over its token vectors, dropout, and a head with one vector for each class.

    Mean pooling is what sentence encoders were trained with (Reimers & Gurevych 2019); the usual classification
    model of the library reads the first token through a layer that they never used, and learns slower. The head
    (`config.head`) is "linear", or "cosine": the cosine of text and class vector times `COSINE_SCALE`, in which a
    class vector can be set before any training, to the mean of its examples or to its name's own vector.
    """

    _keys_to_ignore_on_load_unexpected = (r"pooler\.",)
    COSINE_SCALE = 20.0

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        self.encoder.pooler = None
        if getattr(config, "adapter_size", 0):
            add_adapters(self.encoder, config.adapter_size)
        self.dropout = torch.nn.Dropout(config.hidden_dropout_prob)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def vectors_and_logits(
        self, hidden: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean over a text's tokens, and the head's answer to it."""
        vectors = mean_over_tokens(hidden, attention_mask)
        if getattr(self.config, "head", "linear") == "linear":
            return vectors, self.classifier(self.dropout(vectors))
        text, classes = normalize(self.dropout(vectors), dim=-1), normalize(self.classifier.weight, dim=-1)
        return vectors, self.COSINE_SCALE * linear(text, classes)


class PromptClassifier(Classifier):
    """A masked language model that fills the mask of a prompt; a class is the mean of its name's word vectors.

    The head of the language model turns the token vector at the mask into one to compare with word vectors; the
    verbalizer takes for each class the words of its name (Schick & Schütze 2021). All of it can be trained.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        language_model = AutoModelForMaskedLM.from_config(config)
        self.encoder = language_model.base_model
        self.transform = language_model.cls.predictions.transform
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def vectors_and_logits(
        self, hidden: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the language model would compare with word vectors at the mask, and the classes' words compared."""
        vectors = self.transform(hidden[input_ids == self.config.mask_token_id])
        return vectors, self.classifier(vectors)


PROMPT = "this is about [MASK] ."


def load_prompt(folder: Path, config: PreTrainedConfig) -> tuple[PromptClassifier, PreTrainedTokenizerBase]:
    """A masked language model as a classifier, and its tokenizer, which puts the prompt after every text.

    Raises ModelError for a model without a head that fills masks.
    """
    language_model, found = AutoModelForMaskedLM.from_pretrained(
        folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    if any("predictions.transform" in name for name in found["missing_keys"]):
        raise ModelError(f"The model in {folder} can't fill masks; strategy='prompt' needs one, as bert-base-uncased.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config.mask_token_id = tokenizer.mask_token_id
    add_prompt(tokenizer)
    classifier = PromptClassifier(config)
    classifier.encoder, classifier.transform = language_model.base_model, language_model.cls.predictions.transform
    decoder = language_model.cls.predictions.decoder
    with torch.no_grad():
        for k in range(config.num_labels):
            name = tokenizer(readable(config.id2label[k]), add_special_tokens=False)["input_ids"]
            classifier.classifier.weight[k] = decoder.weight[name].mean(dim=0)
            classifier.classifier.bias[k] = decoder.bias[name].mean()
    return classifier, tokenizer


def add_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets a tokenizer put the prompt after every text; a text that is too long loses its own end, not the prompt."""
    tokens = [tokenizer.cls_token, *tokenizer.tokenize(PROMPT), tokenizer.sep_token]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[tokens[0], "$A", *tokens[1:]], special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in tokens]
    )


def readable(label: str) -> str:
    """A class name as words: `card_not_working` becomes `card not working`."""
    return label.replace("_", " ").replace("-", " ").strip(" ?")


class Adapter(torch.nn.Module):
    """A bottleneck with a residual connection that starts as the identity (Houlsby et al. 2019, section 2.1)."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.down, self.up = torch.nn.Linear(width, size), torch.nn.Linear(size, width)
        torch.nn.init.normal_(self.down.weight, std=0.01)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            torch.nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states plus what the bottleneck makes of them."""
        return hidden + self.up(torch.nn.functional.gelu(self.down(hidden)))


def add_adapters(encoder: PreTrainedModel, size: int) -> None:
    """Puts an adapter after the attention and after the feed-forward block of every layer of a BERT-like encoder."""
    for layer in encoder.encoder.layer:
        for block in (layer.attention.output, layer.output):
            block.dense = torch.nn.Sequential(block.dense, Adapter(block.dense.out_features, size))


def mean_over_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean of token vectors (texts, tokens, dimensions) over the tokens that are no padding, in float32."""
    mask = attention_mask.unsqueeze(-1)
    return (hidden.float() * mask).sum(1) / mask.sum(1)


def load_classifier(
    model: str, labels: Sequence[str], dropout: float | None = None, head: str = "linear"
) -> tuple[Classifier, PreTrainedTokenizerBase]:
    """The pretrained encoder with a new classification head of one output a label, and its tokenizer.

    Args:
        model: a registered model or a folder
        labels: the names of the classes
        dropout: the share of hidden and attention values set to zero in training; None: what the model came with
        head: "linear", "cosine" or "prompt" (see `PromptClassifier`)
    """
    if head not in ("linear", "cosine", "prompt"):
        raise ModelError(f"head is '{head}'; use 'linear', 'cosine' or 'prompt'.")
    folder = model_folder(model)
    classes = dict(enumerate(labels))
    changed = {"id2label": classes, "label2id": {label: k for k, label in classes.items()}}
    if dropout is not None:
        changed |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = AutoConfig.from_pretrained(folder, **changed)
    config.head = head
    return load_prompt(folder, config) if head == "prompt" else load_checkpoint(folder, config)


def load_checkpoint(folder: Path, config: PreTrainedConfig | None = None) -> tuple[Classifier, PreTrainedTokenizerBase]:
    """A classifier and its tokenizer, as `save_checkpoint` wrote them."""
    config = config or AutoConfig.from_pretrained(folder)
    kind = PromptClassifier if getattr(config, "head", "") == "prompt" else MeanPoolClassifier
    classifier = kind.from_pretrained(folder, config=config, use_safetensors=True, dtype=torch.float32)
    if (folder / PREFIX).is_dir():
        classifier.encoder = PeftModel.from_pretrained(classifier.encoder, folder / PREFIX)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind is PromptClassifier:  # the library rebuilds what surrounds a text from the tokenizer's class
        add_prompt(tokenizer)
    return classifier, tokenizer


def save_checkpoint(classifier: Classifier, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Writes model (safetensors), tokenizer and model card into a folder, atomically.

    What can't be merged into the weights (a prefix, see `methods.merge`) lies in a folder of its own beside them.
    """
    wrapped = classifier.encoder
    with files.atomic(folder) as temporary:
        if isinstance(wrapped, PeftModel):
            wrapped.save_pretrained(temporary / PREFIX)
            classifier.encoder = wrapped.base_model
        try:
            classifier.save_pretrained(temporary)
        finally:
            classifier.encoder = wrapped
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def in_length_order(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int, desc: str
) -> Iterator[tuple[np.ndarray, dict]]:
    """Batches of texts of similar length, longest first: (their positions in `texts`, padded tensors)."""
    tokens = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    order = np.argsort([-len(t) for t in tokens], kind="stable")
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=desc, leave=False, disable=len(starts) == 1):
        rows = order[start : start + batch_size]
        yield rows, tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")


@torch.inference_mode()
def infer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 64,
    precision: str = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """The classifier's logits (texts, classes) and text vectors (texts, dimensions), float32, in the texts' order.

    Texts are cut at the tokenizer's `model_max_length`, which a checkpoint of ours keeps from its training.
    """
    device, precision, _ = device_and_precision(precision)
    model.to(device).eval()
    logits = np.zeros((len(texts), model.config.num_labels), dtype=np.float32)
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for rows, batch in in_length_order(texts, tokenizer, tokenizer.model_max_length, batch_size, "predicting"):
        with autocast(device, precision):
            outputs = model(**batch.to(device))
        logits[rows] = outputs.logits.float().cpu().numpy()
        vectors[rows] = outputs.vectors.float().cpu().numpy()
    return logits, vectors


def predict(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 64,
    precision: str = "auto",
) -> np.ndarray:
    """The logits of `infer` alone."""
    return infer(model, tokenizer, texts, batch_size, precision)[0]


def embed(
    model: str, texts: Sequence[str], max_length: int = 128, batch_size: int = 64, precision: str = "auto"
) -> np.ndarray:
    """Sentence vectors of the pretrained encoder as it is: the mean over tokens, of length 1.

    Shape (texts, hidden size), float32. Mean pooling as in Sentence-BERT (Reimers & Gurevych 2019).
    """
    classifier, tokenizer = load_classifier(model, ["none"])
    tokenizer.model_max_length = max_length
    vectors = infer(classifier, tokenizer, texts, batch_size, precision)[1]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
