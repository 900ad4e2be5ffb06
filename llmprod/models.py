"""The classifier: a pretrained encoder with a head; loading, checkpoints, prediction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import linear, normalize
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from llmprod import LLMProdError, artifacts, files
from llmprod.machine import autocast, device_and_precision

PREFIX = "prefix"  # the folder of a prefix within a checkpoint


class ModelError(LLMProdError):
    """A model can't be used as it is."""


def model_folder(model: str) -> Path:
    """The folder of a registered model (fetched if need be) or a local one; raises ModelError if it is neither."""
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
    """A pretrained encoder, the mean of its token vectors, dropout, and a head with one vector for each class.

    Sentence encoders were trained with mean pooling (Reimers & Gurevych 2019); the library's classification model reads
    the first token through a layer that they never used, and learns more slowly. The head (`config.head`) is "linear",
    or "cosine": the cosine of text and class vector times `COSINE_SCALE`, whose vectors can be set to prototypes.
    """

    base_model_prefix = "encoder"
    _supports_sdpa = _supports_flash_attn = True  # whatever attention the encoder has; else the slowest is taken
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
        vectors = mean_over_tokens(hidden, attention_mask)
        if getattr(self.config, "head", "linear") == "linear":
            logits = self.classifier(self.dropout(vectors))
        else:
            text, classes = normalize(self.dropout(vectors), dim=-1), normalize(self.classifier.weight, dim=-1)
            logits = self.COSINE_SCALE * linear(text, classes)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return Outputs(loss=loss, logits=logits, vectors=vectors)


def label_as_words(label: str) -> str:
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
        """Adds the output of the bottleneck to the hidden states."""
        return hidden + self.up(torch.nn.functional.gelu(self.down(hidden)))


def add_adapters(encoder: PreTrainedModel, size: int) -> None:
    """Adds an adapter after the attention and the feed-forward block of every layer of a BERT-like encoder."""
    for layer in encoder.encoder.layer:
        for block in (layer.attention.output, layer.output):
            block.dense = torch.nn.Sequential(block.dense, Adapter(block.dense.out_features, size))


def mean_over_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean pooling: averages token vectors (texts, tokens, dimensions) over the tokens that are not padding."""
    mask = attention_mask.unsqueeze(-1)
    return (hidden.float() * mask).sum(1) / mask.sum(1)


def length_sorted_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[tuple[np.ndarray, dict]]:
    """Batches of texts of similar length, longest first: (their positions in `texts`, padded tensors)."""
    tokens = tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    order = np.argsort([-len(t) for t in tokens], kind="stable")
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="predicting", leave=False, disable=len(starts) == 1):
        rows = order[start : start + batch_size]
        yield rows, tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")


@dataclass
class Predictor:
    """A classifier and its tokenizer: texts in, logits and text vectors out.

    Texts are cut at `tokenizer.model_max_length`, which a checkpoint keeps from its training.
    """

    model: torch.nn.Module  # a Classifier, or a module with its `config` and outputs (see `export.int8`)
    tokenizer: PreTrainedTokenizerBase
    precision: str = "auto"  # see `machine.device_and_precision`
    batch_size: int = 64  # texts in a batch

    @classmethod
    def load(
        cls, folder: Path, precision: str = "auto", batch_size: int = 64, *, config: PreTrainedConfig | None = None
    ) -> "Predictor":
        """Reads a folder that `save` wrote; `config` replaces the folder's own."""
        config = config or AutoConfig.from_pretrained(folder)
        model = Classifier.from_pretrained(folder, config=config, use_safetensors=True, dtype=torch.float32)
        if (folder / PREFIX).is_dir():
            model.encoder = PeftModel.from_pretrained(model.encoder, folder / PREFIX)
        return cls(model, AutoTokenizer.from_pretrained(folder), precision, batch_size)

    @classmethod
    def pretrained(
        cls,
        model: str,
        labels: Sequence[str] = ("none",),
        *,
        dropout: float | None = None,
        head: str = "linear",
        max_length: int | None = None,
        precision: str = "auto",
    ) -> "Predictor":
        """The pretrained encoder with a new, untrained head of one output for each label.

        Args:
            model: a registered model or a folder
            labels: the names of the classes; none where only vectors are wanted
            dropout: the share of hidden and attention values set to zero in training; None: the model's own
            head: "linear" or "cosine", see `Classifier`
            max_length: how many tokens of a text are read; None: as many as the model can

        Raises ModelError for an unknown model or head.
        """
        if head not in ("linear", "cosine"):
            raise ModelError(f"head is '{head}'; use 'linear' or 'cosine'.")
        folder = model_folder(model)
        classes = dict(enumerate(labels))
        changes = {"id2label": classes, "label2id": {label: k for k, label in classes.items()}}
        if dropout is not None:
            changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = AutoConfig.from_pretrained(folder, **changes)
        config.head = head
        predictor = cls.load(folder, precision, config=config)
        if max_length is not None:
            predictor.tokenizer.model_max_length = max_length
        return predictor

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of the logits."""
        return [self.model.config.id2label[k] for k in range(self.model.config.num_labels)]

    @property
    def device(self) -> torch.device:
        """Where predictions are computed."""
        return device_and_precision(self.precision)[0]

    @torch.inference_mode()
    def infer(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Logits (texts, classes) and text vectors (texts, dimensions), float32, in the order of the texts."""
        device, precision, _ = device_and_precision(self.precision)
        self.model.to(device).eval()
        logits = np.zeros((len(texts), self.model.config.num_labels), dtype=np.float32)
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for rows, batch in length_sorted_batches(texts, self.tokenizer, self.batch_size):
            with autocast(device, precision):
                outputs = self.model(**batch.to(device))
            logits[rows] = outputs.logits.float().cpu().numpy()
            vectors[rows] = outputs.vectors.float().cpu().numpy()
        return logits, vectors

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Logits (texts, classes)."""
        return self.infer(texts)[0]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Sentence vectors of length 1 (texts, dimensions), by mean pooling (Reimers & Gurevych 2019)."""
        vectors = self.infer(texts)[1]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def save(self, folder: Path, card: str) -> None:
        """Writes model (safetensors), tokenizer and model card into a folder, atomically.

        A prefix can't be merged into the weights (see `methods.merge`) and is written to a folder of its own.
        """
        wrapped = self.model.encoder
        with files.atomic(folder) as temporary:
            if isinstance(wrapped, PeftModel):
                wrapped.save_pretrained(temporary / PREFIX)
                self.model.encoder = wrapped.base_model
            try:
                self.model.save_pretrained(temporary)
            finally:
                self.model.encoder = wrapped
            self.tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")
