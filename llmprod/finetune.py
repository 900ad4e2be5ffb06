"""Fine-tuning one encoder on one classification task: model, tokens, training arguments, checkpoint, prediction."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from llmprod import LLMProdError, artifacts


class ModelError(LLMProdError):
    """A model can't be used as it is."""


def model_folder(model: str) -> Path:
    """The folder of a model: a registered artifact (fetched if need be) or a local folder with safetensors.

    Raises ModelError where it is neither.
    """
    if model in artifacts.registry():
        if artifacts.entry(model)["kind"] != "model":
            raise ModelError(f"The artifact '{model}' is data, not a model; models are: {', '.join(models())}.")
        return artifacts.fetch(model)
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"'{model}' is neither a known model ({', '.join(models())}) nor a folder with config.json and "
            "*.safetensors (pickled weights are not loaded)."
        )
    return folder


def models() -> list[str]:
    """The names of the registered models."""
    return [name for name, item in artifacts.registry().items() if item["kind"] == "model"]


class MeanPoolClassifier(PreTrainedModel):
    """A pretrained encoder, the mean over its token vectors, dropout, and one linear layer to the classes.

    Mean pooling is what sentence encoders were trained with (Reimers & Gurevych 2019); the usual classification
    model of the library reads the first token through a layer that they never used, and learns slower.
    """

    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = (r"pooler\.",)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config)
        self.encoder.pooler = None
        self.dropout = torch.nn.Dropout(config.hidden_dropout_prob)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of shape (texts, classes) and, where there are labels, the mean cross-entropy loss."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        logits = self.classifier(self.dropout(mean_over_tokens(hidden, attention_mask)))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mean_over_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mean of token vectors (texts, tokens, dimensions) over the tokens that are no padding, in float32."""
    mask = attention_mask.unsqueeze(-1)
    return (hidden.float() * mask).sum(1) / mask.sum(1)


def load_classifier(model: str, labels: Sequence[str]) -> tuple[MeanPoolClassifier, PreTrainedTokenizerBase]:
    """The pretrained encoder with a new classification head of one output a label, and its tokenizer."""
    folder = model_folder(model)
    names = dict(enumerate(labels))
    config = AutoConfig.from_pretrained(folder, id2label=names, label2id={label: k for k, label in names.items()})
    return load_checkpoint(folder, config)


def load_checkpoint(
    folder: Path, config: PreTrainedConfig | None = None
) -> tuple[MeanPoolClassifier, PreTrainedTokenizerBase]:
    """A classifier and its tokenizer, as `save_checkpoint` wrote them."""
    config = config or AutoConfig.from_pretrained(folder)
    classifier = MeanPoolClassifier.from_pretrained(folder, config=config, use_safetensors=True, dtype=torch.float32)
    return classifier, AutoTokenizer.from_pretrained(folder)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Writes model (safetensors), tokenizer and model card into a folder; whole or not at all."""
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def device_and_precision(precision: str = "auto") -> tuple[torch.device, str, str]:
    """Where to compute and in what number format, and why.

    Args:
        precision: "fp32", "bf16" (matrix products in bfloat16, weights and everything else in float32), or "auto":
            bf16 where the processor has instructions for it

    Returns device, precision and the reason for the two, for people to read.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ModelError(f"precision is '{precision}'; use 'auto', 'fp32' or 'bf16'.")
    if torch.cuda.is_available():
        device, name, has_bf16 = torch.device("cuda"), torch.cuda.get_device_name(), torch.cuda.is_bf16_supported()
    elif torch.backends.mps.is_available():
        device, name, has_bf16 = torch.device("mps"), "Apple GPU", False
    else:
        can = torch.cpu.get_capabilities()
        has_bf16 = bool(can.get("avx512_bf16") or can.get("amx_bf16"))
        device, name = (
            torch.device("cpu"),
            f"{can.get('cpu_name') or can.get('architecture')}, {torch.get_num_threads()} threads",
        )
    if precision == "auto":
        reason = "has" if has_bf16 else "lacks"
        return device, "bf16" if has_bf16 else "fp32", f"{name}; it {reason} instructions for bfloat16"
    return device, precision, f"{name}; {precision} was asked for"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which a forward pass uses the precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def tokenize(splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Token numbers of every text, cut at `max_length`, not padded: a batch is padded when it is put together."""
    return splits.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns="text",
        desc="tokenising",
    ).rename_column("label", "labels")


def training_arguments(folder: Path, seed: int, precision: str = "auto", **settings: object) -> TrainingArguments:
    """The Trainer's arguments that do not depend on the experiment; `settings` are those that do.

    Batches hold texts of similar length, so that little is computed on padding; AdamW is fused; the best epoch on
    validation is kept; progress goes to our own tracking (`track.callback`).
    """
    device, precision, _ = device_and_precision(precision)
    defaults = {
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": device.type == "cpu",
        "bf16": precision == "bf16",
        "train_sampling_strategy": "group_by_length",
        "optim": "adamw_torch_fused",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "save_only_model": True,
        "load_best_model_at_end": True,
        "report_to": "none",
        "disable_tqdm": False,
        "dataloader_pin_memory": device.type == "cuda",
    }
    return TrainingArguments(**defaults | settings)


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
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 64,
    precision: str = "auto",
) -> np.ndarray:
    """The classifier's logits, shape (texts, classes), float32, in the order of the texts.

    Texts are cut at the tokenizer's `model_max_length`, which a checkpoint of ours keeps from its training.
    """
    device, precision, _ = device_and_precision(precision)
    model.to(device).eval()
    logits = np.zeros((len(texts), model.config.num_labels), dtype=np.float32)
    for rows, batch in in_length_order(texts, tokenizer, tokenizer.model_max_length, batch_size, "predicting"):
        with autocast(device, precision):
            logits[rows] = model(**batch.to(device)).logits.float().cpu().numpy()
    return logits


@torch.inference_mode()
def embed(
    model: str, texts: Sequence[str], max_length: int = 128, batch_size: int = 64, precision: str = "auto"
) -> np.ndarray:
    """Sentence vectors of the pretrained encoder as it is: the mean over tokens, of length 1.

    Shape (texts, hidden size), float32. Mean pooling as in Sentence-BERT (Reimers & Gurevych 2019).
    """
    folder = model_folder(model)
    device, precision, _ = device_and_precision(precision)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).to(device).eval()
    vectors = np.zeros((len(texts), encoder.config.hidden_size), dtype=np.float32)
    for rows, batch in in_length_order(texts, tokenizer, max_length, batch_size, "embedding"):
        batch = batch.to(device)
        with autocast(device, precision):
            hidden = encoder(**batch).last_hidden_state
        mean = mean_over_tokens(hidden, batch["attention_mask"])
        vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return vectors
