"""The classifier: a pretrained encoder with a head; loading, checkpoints, prediction."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import linear, normalize
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from llmprod import LLMProdError, artifacts, files, shapes
from llmprod.adapters import add_adapters
from llmprod.machine import autocast, device_and_precision

PREFIX = "prefix"  # the folder of a prefix within a checkpoint
MANIFEST = "manifest.json"  # the sha256 of every file in a folder that `sealed` wrote
INT8 = ("int8.onnx", "int8.json")  # written next to a checkpoint later, see `export.int8`
UNSEALED = (MANIFEST, "README.md", *INT8)
HEADS = ("linear", "cosine")  # see `Classifier`
SETTINGS = {"head?": lambda found: found in HEADS, "id2label?": shapes.classes}  # what a checkpoint's config must say
COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_labels")  # in a config, of what is made first
UNSAFE = (".py", ".pyc", ".so", ".pkl", ".pickle", ".joblib", ".bin", ".pt", ".pth", ".ckpt")  # code and pickles


class ModelError(LLMProdError):
    """A model can't be used as it is."""


def model_folder(model: str) -> Path:
    """The folder of a registered model (fetched if need be) or a local one; raises ModelError if it is neither."""
    kinds = {name: item["kind"] for name, item in artifacts.registry().items()}
    known = ", ".join(name for name, kind in kinds.items() if kind == "model")
    if kinds.get(model, "model") != "model":
        raise ModelError(f"The artifact '{model}' is data, not a model; models are: {known}.")
    folder = artifacts.fetch(model) if model in kinds else Path(os.path.expanduser(model))
    if not os.path.isfile(folder / "config.json") or not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"'{model}' is neither a known model ({known}) nor a folder with config.json and *.safetensors (pickled "
            "weights are not loaded)."
        )
    return checked(folder)


# Reading and writing folders: every model and tokenizer of the project comes through here


@contextmanager
def sealed(folder: Path) -> Iterator[Path]:
    """A new folder to write models to; it replaces `folder`, with a manifest, when the block ends without an error."""
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        yield temporary
        files.write_json(temporary / MANIFEST, artifacts.checksums(temporary, UNSEALED))


@contextmanager
def reading(what: Path) -> Iterator[None]:
    """Turns whatever a library raises over damaged files into one ModelError that names them."""
    try:
        yield
    except BaseException as error:  # a dozen causes, and each library has its own for each; one is a panic of Rust
        if isinstance(error, (LLMProdError, KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        reason = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0][:300]
        raise ModelError(f"{what} can't be read ({reason}). Write or download it again.") from error


def checked(folder: Path) -> Path:
    """The folder of a model, if nothing in it can run and it is as its manifest says (where it has one).

    Raises ModelError for code, pickles, a config that asks for code, and what was changed, removed or added.
    """
    with reading(folder):
        inside, seal, changed = sorted(folder.rglob("*")), folder / MANIFEST, ""
        unsafe = [p for p in inside if p.suffix.lower() in UNSAFE or (p.is_symlink() and p.is_dir())]
        configs = {path: json.loads(path.read_bytes()) for path in folder.rglob("*config*.json")}
        unsafe += [path for path, config in configs.items() if "auto_map" in config]
        if wrong := [name for one in configs.values() for name in {*COUNTS} & {*one} if one[name] not in range(10_001)]:
            raise ValueError(f"{wrong[0]} is no number up to 10,000")
        unsafe += {folder / "adapter_config.json"} & {*inside}  # it names another model, which may be on the web
        if seal in inside and not unsafe:
            changed = artifacts.differing(json.loads(seal.read_bytes()), artifacts.checksums(folder, UNSEALED))
    if unsafe:
        named = ", ".join(path.relative_to(folder).as_posix() for path in unsafe)
        raise ModelError(f"{folder} holds {named}: code, pickled weights or what asks for them is not loaded.")
    if changed:
        raise ModelError(f"{folder} was changed since it was written: {changed}. Write or copy it again.")
    return folder


def read(kind: type, folder: Path, new: str = "", **settings: object) -> PreTrainedModel:
    """A model from a folder, in float32: safetensors or GGUF, without any code of its own. Every weight must fit.

    Args:
        kind: a class of transformers, or `Classifier`
        new: how the names of a new head's weights begin, which the folder may lack; it may then hold other heads
        settings: further arguments of `from_pretrained`

    Raises ModelError for what `checked` finds, damaged files, and weights that are missing, unexpected or no numbers.
    """
    rules = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": "gguf_file" not in settings}
    rules |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": bool(new)}
    with reading(checked(folder)):
        if kind is Classifier:  # in a model that was saved with another head, the names begin with its kind
            config = settings["config"] or AutoConfig.from_pretrained(folder, trust_remote_code=False)
            start = rf"^{MODEL_MAPPING[type(config)].base_model_prefix}\."
            rules |= {"config": config, "key_mapping": {start: "encoder."}}
        model, info = kind.from_pretrained(folder, **settings | rules)
        base = model.base_model
        own = tuple(f"{start}{n}." for n, _ in base.named_children() for start in ("", f"{base.base_model_prefix}."))
        wrong = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        wrong = {name for name in wrong if not (new and name.startswith(new))}
        wrong |= {name for name in info["unexpected_keys"] if not new or name.startswith(own)}
        if wrong:
            raise ValueError(f"config.json and {len(wrong)} weights do not fit: {', '.join(sorted(wrong)[:3])} …")
        if not all(weights.sum().isfinite() for weights in model.parameters()):
            raise ValueError("there are weights that are no numbers")
    return model


def read_tokenizer(folder: Path, rows: int, **settings: object) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of a model with so many `rows` of embeddings. Raises ModelError if it has more."""
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **settings)
        last = max(tokenizer.get_vocab().values(), default=0)
        if not 0 < last < rows or tokenizer.model_max_length < 3:
            raise ValueError(f"a tokenizer of {last + 1} tokens up to {tokenizer.model_max_length}, a model of {rows}")
    return tokenizer


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
    _keys_to_ignore_on_load_unexpected = (r"pooler\.",)
    COSINE_SCALE = 20.0

    def __init__(self, config: PreTrainedConfig):
        kind = MODEL_MAPPING[type(config)]  # whatever attention it has; else the slowest is taken
        self._supports_sdpa, self._supports_flash_attn = kind._supports_sdpa, kind._supports_flash_attn
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


def mean_over_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean pooling: averages token vectors (texts, tokens, dimensions) over the tokens that are not padding."""
    mask = attention_mask.unsqueeze(-1)
    return (hidden.float() * mask).sum(1) / mask.sum(1)


def length_sorted_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[tuple[np.ndarray, dict]]:
    """Batches of texts of similar length, longest first: (their positions in `texts`, padded tensors)."""
    if not len(texts):  # which tokenizers can't take
        return
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
        """Reads a folder that `save` wrote; `config` replaces the folder's own, for a new head.

        Raises ModelError for what `read` finds, an unknown head, labels that are no texts or not different, and
        settings by which the outputs are no numbers.
        """
        model = read(Classifier, folder, "classifier." if config else "", config=config)
        if config is None:
            way_out = "write or copy it again, with a head of 'linear' or 'cosine' and labels that differ"
            shapes.read(folder / "config.json", SETTINGS, way_out, ModelError)
        tokenizer = read_tokenizer(folder, model.config.vocab_size)
        most = getattr(model.config, "max_position_embeddings", 512)  # where a tokenizer sets none, it has no end
        positions = getattr(getattr(model.encoder, "embeddings", None), "position_embeddings", None)
        before = getattr(positions, "padding_idx", None)  # MPNet and RoBERTa number tokens from the one after this
        tokenizer.model_max_length = min(tokenizer.model_max_length, most if before is None else most - before - 1)
        predictor = cls(model, tokenizer, precision, batch_size)
        with reading(folder):
            if (folder / PREFIX).is_dir():
                model.encoder = PeftModel.from_pretrained(model.encoder, folder / PREFIX)
            # What fits may still not work: another kind of model, a setting out of range.
            if not all(np.isfinite(found).all() for found in predictor.infer(["a ☃"])):
                raise ValueError("by the settings in config.json the outputs are no numbers")
        return predictor

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
        if head not in HEADS:
            raise ModelError(f"head is '{head}'; use 'linear' or 'cosine'.")
        folder = model_folder(model)
        classes = dict(enumerate(labels))
        changes = {"id2label": classes, "label2id": {label: k for k, label in classes.items()}}
        if dropout is not None:
            changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        with reading(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
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

    @torch.no_grad()  # not inference_mode: on a GPU the weights move here, and they may be trained later
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
        """Writes model, tokenizer, model card and manifest into a folder, atomically."""
        with sealed(folder) as temporary:
            self.write(temporary, card)

    def write(self, folder: Path, card: str) -> None:
        """Writes model (safetensors, or ONNX), tokenizer and model card into a folder that is there.

        A prefix can't be merged into the weights (see `methods.merge`) and is written to a folder of its own.
        """
        wrapped = getattr(self.model, "encoder", None)
        if isinstance(wrapped, PeftModel):
            wrapped.save_pretrained(folder / PREFIX)
            self.model.encoder = wrapped.base_model
        try:
            self.model.save_pretrained(folder)
        finally:
            if wrapped is not None:
                self.model.encoder = wrapped
        self.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
