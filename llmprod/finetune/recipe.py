"""The settings of a fine-tuning run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned; each field is a parameter of `02_finetune` and of the fine-tuning studies."""

    model: str = "minilm"  # a registered model, or a folder with config.json and *.safetensors
    method: str = "full"  # which weights are trained: a name in `methods.METHODS`
    shots: int = 0  # labelled texts of each class; 0: all
    strategy: str = "plain"  # how to learn from few labels: a name in `fewshot.STRATEGIES`
    max_length: int = 128  # tokens of a text that the model reads
    epochs: float = 4  # at most
    patience: int = 2  # epochs without a better validation accuracy before training stops early
    batch_tokens: int = 2048  # tokens in a batch
    learning_rate: float = 2e-4  # the highest, reached after the warm-up
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.01  # shrinks the weights by this share of the learning rate at each step
    embeddings: bool = False  # whether "full" trains the token embeddings too
    dropout: float = 0.0  # share of hidden and attention values set to zero in training
    label_smoothing: float = 0.0  # probability that is spread evenly over the classes (Szegedy et al. 2016)
    r_drop: float = 0.0  # weight of the divergence between two dropout passes (R-Drop, Liang et al. 2021)
    adversarial: float = 0.0  # length of FGM's step on a text's embeddings; its loss is added (Miyato et al. 2017)
    contrastive: float = 0.0  # weight of the supervised contrastive loss on text vectors (Khosla et al. 2020)
    layer_decay: float = 1.0  # factor on the learning rate from each layer to the one below (Howard & Ruder 2018)
    augment: float = 0.0  # probability that a training text is edited (Wei & Zou 2019)
    precision: str = "auto"  # see `machine.device_and_precision`
    seed: int = 0

    @classmethod
    def of(cls, parameters: Mapping[str, object]) -> "Recipe":
        """Picks the fields of a recipe from a notebook's or a study's parameters; other names are left aside."""
        return cls(**{field.name: parameters[field.name] for field in fields(cls) if field.name in parameters})
