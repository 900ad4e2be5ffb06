"""Which parameters are trained: all, the head alone, or few added ones (parameter-efficient fine-tuning, PEFT)."""

import inspect
import re
from collections.abc import Callable

import pandas as pd
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from llmprod.adapters import add_adapters
from llmprod.models import Classifier, ModelError

KEYS = ["key", "value", "k", "v"]  # as BERT and MPNet call them
LINEAR = ["query", "q", *KEYS, "o", "dense"]  # the matrices of a layer: attention, its output, feed-forward


def full(classifier: Classifier, steps: int, embeddings: bool) -> None:
    """Every weight is trained; the token embeddings (half of MiniLM's weights) only where `embeddings` is true."""
    classifier.encoder.embeddings.requires_grad_(embeddings)


def head(classifier: Classifier, steps: int, embeddings: bool) -> None:
    """The encoder is frozen; only the head is trained."""
    classifier.encoder.requires_grad_(False)


def bitfit(classifier: Classifier, steps: int, embeddings: bool) -> None:
    """Biases and head are trained (Ben Zaken et al. 2022)."""
    for name, parameter in classifier.encoder.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def adapter(classifier: Classifier, steps: int, embeddings: bool) -> None:
    """Bottlenecks of 24 dimensions after attention and feed-forward, layer norms and head (Houlsby et al. 2019)."""
    classifier.config.adapter_size = 24
    add_adapters(classifier.encoder, classifier.config.adapter_size)
    for name, parameter in classifier.encoder.named_parameters():
        parameter.requires_grad_(bool(re.search(r"\.(dense|o)\.1\.(down|up)\.|LayerNorm", name)))


def lora(classifier: Classifier, steps: int, embeddings: bool) -> None:
    """W + (alpha / r) BA with rank r = 8 on every matrix of every layer (Hu et al. 2022)."""
    wrap(classifier, LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR))


def adalora(classifier: Classifier, steps: int, embeddings: bool) -> None:
    """W + P diag(λ) Q: starts with rank 12 and prunes the least important ranks to 8 on average (Zhang et al. 2023)."""
    ranks = {"init_r": 12, "target_r": 8, "lora_alpha": 32, "target_modules": LINEAR}
    schedule = {"tinit": steps // 10, "tfinal": steps // 3, "deltaT": max(1, steps // 100), "total_step": steps}
    wrap(classifier, AdaLoraConfig(**ranks, **schedule))


def ia3(classifier: Classifier, steps: int, embeddings: bool) -> None:
    """Keys, values and feed-forward activations are rescaled by trained vectors (Liu et al. 2022)."""
    feedforward = ["intermediate.dense", "output.dense"]
    wrap(classifier, IA3Config(target_modules=[*KEYS, *feedforward], feedforward_modules=feedforward))


def prefix(classifier: Classifier, steps: int, embeddings: bool) -> None:
    """Sixteen trained keys and values before the text's own in every layer (Li & Liang 2021)."""
    if "past_key_values" not in inspect.signature(classifier.encoder.forward).parameters:
        kind = type(classifier.encoder).__name__
        raise ModelError(f"method is 'prefix', for which a {kind} takes no keys and values; use another method.")
    wrap(classifier, PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=16))


METHODS: dict[str, Callable[[Classifier, int, bool], None]] = {
    function.__name__: function for function in (full, head, lora, adalora, prefix, adapter, ia3, bitfit)
}


def wrap(classifier: Classifier, config: object) -> None:
    """Puts peft's modules into the encoder, and freezes everything else there."""
    classifier.encoder = get_peft_model(classifier.encoder, config)


def prepare(classifier: Classifier, method: str, steps: int, embeddings: bool = False) -> None:
    """Prepares the classifier for a method of `METHODS`, in place; the head is always trained.

    `steps` is the number of training steps, according to which AdaLoRA plans its ranks; `embeddings` says whether
    `full` trains the token embeddings too. Raises ModelError for an unknown method, and for one that the encoder
    has no place for.
    """
    if method not in METHODS:
        raise ModelError(f"method is '{method}'; use one of {', '.join(METHODS)}.")
    METHODS[method](classifier, steps, embeddings)
    classifier.classifier.requires_grad_(True)


def count(classifier: Classifier) -> int:
    """The number of parameters that are trained."""
    return sum(p.numel() for p in classifier.parameters() if p.requires_grad)


def merge(classifier: Classifier) -> None:
    """Merges LoRA, AdaLoRA and IA³ into the weights, in place, so that they cost nothing at inference.

    A prefix or an adapter can't be merged and stays as it is.
    """
    encoder = classifier.encoder
    if isinstance(encoder, PeftModel) and not encoder.active_peft_config.is_prompt_learning:
        classifier.encoder = encoder.merge_and_unload()


def trained_state(classifier: Classifier) -> dict[str, torch.Tensor]:
    """The trained weights alone: what a checkpoint of this task must hold in addition to the base model."""
    return {name: p.detach().clone() for name, p in classifier.named_parameters() if p.requires_grad}


def allocate_ranks(classifier: Classifier, step: int) -> None:
    """AdaLoRA's rank re-allocation, between the backward pass and `zero_grad`; does nothing for other methods."""
    encoder = classifier.encoder
    if isinstance(encoder, PeftModel) and isinstance(encoder.active_peft_config, AdaLoraConfig):
        encoder.base_model.update_and_allocate(step)


def orthogonality(classifier: Classifier) -> torch.Tensor | float:
    """AdaLoRA's penalty, 0.5 times the mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖, so that λ are singular values; else 0.

    peft adds it where the wrapped model returns a loss; here the encoder is wrapped, which has none.
    """
    encoder = classifier.encoder
    if not (isinstance(encoder, PeftModel) and isinstance(encoder.active_peft_config, AdaLoraConfig)):
        return 0.0
    factors = [p if "lora_A" in n else p.T for n, p in encoder.named_parameters() if re.search(r"lora_[AB]\.", n)]
    terms = [torch.linalg.matrix_norm(f @ f.T - torch.eye(len(f), device=f.device)) for f in factors]
    return encoder.active_peft_config.orth_reg_weight * torch.stack(terms).mean()


def ranks(classifier: Classifier) -> pd.DataFrame:
    """AdaLoRA's current rank of each matrix (columns) in each layer (rows); empty for other methods."""
    rows = {}
    for name, parameter in classifier.encoder.named_parameters():
        if found := re.search(r"layer\.(\d+)\.(.+)\.lora_E\.", name):
            matrix = found[2].replace("attention.self.", "").replace("attention.output.dense", "attention output")
            matrix = matrix.replace("intermediate.dense", "feed-forward in").replace("output.dense", "feed-forward out")
            rows.setdefault(int(found[1]), {})[matrix] = int((parameter != 0).sum())
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
