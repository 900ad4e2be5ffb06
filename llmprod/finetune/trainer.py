"""Batches by token budget, regularisation losses, the Trainer."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from llmprod import artifacts
from llmprod.finetune import methods
from llmprod.machine import device_and_precision
from llmprod.models import Classifier, ModelError


def tokenize(part: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, model: str) -> Dataset:
    """Token numbers of every text, cut at `max_length`, not padded: a batch is padded when it is put together.

    The work is done once: it is kept beside the splits, by the checksum of the model whose tokenizer this is.
    """

    def cut(batch: dict) -> dict:
        return tokenizer(batch["text"], truncation=True, max_length=max_length)

    key = hashlib.sha256(f"{artifacts.checksum(model)} {max_length} {part._fingerprint}".encode()).hexdigest()[:32]
    settings = {"remove_columns": "text", "new_fingerprint": key, "desc": "tokenising"}
    return part.map(cut, batched=True, **settings).rename_column("label", "labels")


class TokenBudget(Sampler):
    """Batches of texts of similar length with about `budget` tokens each: as many of them in every epoch.

    Texts are sorted by length after a little noise, so that an epoch's batches are not those of the one before; the
    sorted row is cut where another share of all tokens is full; the batches come in random order. Little is computed
    on padding, and short texts come in batches large enough to keep the processor busy.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int | None):
        self.lengths, self.seed, self.epoch = np.asarray(lengths), seed, 0
        self.batches = max(1, min(len(self.lengths), round(self.lengths.sum() / budget)))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:  # the order of evaluation: by length, the same each time
            noise, order = np.zeros(len(self.lengths)), range(self.batches)
        else:
            random = np.random.default_rng((self.seed, self.epoch))
            noise, order = random.uniform(0, 2, len(self.lengths)), random.permutation(self.batches)
            self.epoch += 1
        rows = np.argsort(self.lengths * (1 + 0.05 * noise) + noise, kind="stable")
        share = np.cumsum(self.lengths[rows]) - self.lengths[rows] / 2
        number = np.minimum((share / self.lengths.sum() * self.batches).astype(int), self.batches - 1)
        batches = np.split(rows, np.flatnonzero(np.diff(number)) + 1)
        yield from (batches[i].tolist() for i in order if i < len(batches))


@dataclass
class Collator(DataCollatorWithPadding):
    """Pads a batch; in training each text is changed with probability `augment` (see `edit`)."""

    augment: float = 0.0

    def __call__(self, examples: list[dict]) -> dict:
        """A padded batch."""
        if self.augment:
            examples = [edit(example) if torch.rand(()) < self.augment else example for example in examples]
        return super().__call__(examples)


def edit(example: dict, share: float = 0.1) -> dict:
    """A text with a tenth of its tokens left out and two neighbours swapped, its first and last token kept.

    Random deletion and swap of Easy Data Augmentation (Wei & Zou 2019), on tokens.
    """
    first, *inner, last = example["input_ids"]
    inner = [token for token in inner if torch.rand(()) >= share] or inner
    if len(inner) > 1:
        i = int(torch.randint(len(inner) - 1, ()))
        inner[i], inner[i + 1] = inner[i + 1], inner[i]
    ids = [first, *inner, last]
    return {
        name: value[: len(ids)] if isinstance(value, list) and name != "labels" else value
        for name, value in example.items()
    } | {"input_ids": ids}


class Trainer(transformers.Trainer):
    """The library's Trainer with our batches and learning rates, and the losses against over-fitting.

    Args (beside the library's own):
        batch_tokens: tokens in a batch
        label_smoothing: share of belief that is spread evenly over the classes (Szegedy et al. 2016)
        r_drop: weight of the symmetric divergence between two dropout passes (R-Drop, Liang et al. 2021)
        adversarial: length of a step against the gradient on a text's embeddings; the loss after it is added
            (FGM, Miyato et al. 2017)
        contrastive: weight of the supervised contrastive loss on the text vectors (Khosla et al. 2020)
        layer_decay: factor on the learning rate from each layer to the one below it (Howard & Ruder 2018)
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        label_smoothing: float = 0.0,
        r_drop: float = 0.0,
        adversarial: float = 0.0,
        contrastive: float = 0.0,
        layer_decay: float = 1.0,
        **settings: object,
    ):
        super().__init__(**settings)
        self.batch_tokens, self.label_smoothing, self.r_drop = batch_tokens, label_smoothing, r_drop
        self.adversarial, self.contrastive, self.layer_decay = adversarial, contrastive, layer_decay
        self.model_accepts_loss_kwargs = False
        if adversarial:
            self.embedded, self.shift = None, None
            embeddings = self.model.encoder.get_submodule(embeddings_of(self.model))
            embeddings.register_forward_hook(self.perturb)

    def loader(self, dataset: Dataset, budget: int, seed: int | None, collator: object) -> DataLoader:
        """Batches of a tokenised data set by token budget."""
        columns = [c for c in ("input_ids", "token_type_ids", "attention_mask", "labels") if c in dataset.column_names]
        lengths = [len(ids) for ids in dataset["input_ids"]]
        batches = TokenBudget(lengths, budget, seed)
        return self.accelerator.prepare(
            DataLoader(dataset.select_columns(columns), batch_sampler=batches, collate_fn=collator)
        )

    def get_train_dataloader(self) -> DataLoader:
        """Training batches: another mix in every epoch."""
        return self.loader(self.train_dataset, self.batch_tokens, self.args.seed, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Validation batches, in length order; labels come with them, so that the order does not matter."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.loader(dataset, 2 * self.batch_tokens, None, DataCollatorWithPadding(self.processing_class))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the trained weights: no decay on biases and norms, lower layers slower where asked for."""
        decayed, groups = set(self.get_decay_parameter_names(self.model)), {}
        layers = self.model.config.num_hidden_layers
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                found = re.search(r"layer\.(\d+)\.", name)
                depth = 0 if name.startswith("classifier") else layers - int(found[1]) if found else layers + 1
                groups.setdefault((depth, name in decayed), []).append(parameter)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = kind(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate * self.layer_decay**depth,
                    "weight_decay": self.args.weight_decay if with_decay else 0.0,
                }
                for (depth, with_decay), parameters in groups.items()
            ],
            **settings,
        )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy, and what was asked for beside it; in evaluation cross-entropy alone."""
        labels = inputs["labels"]
        texts = {name: value for name, value in inputs.items() if name != "labels"}
        if not model.training:
            outputs = model(**texts)
            loss = cross_entropy(outputs.logits.float(), labels)
            return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss
        if self.r_drop:
            texts = {name: torch.cat([value, value]) for name, value in texts.items()}
            labels = torch.cat([labels, labels])
        outputs = model(**texts)
        logits = outputs.logits.float()
        loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing) + methods.orthogonality(self.model)
        if self.r_drop:
            p, q = log_softmax(logits, dim=-1).chunk(2)
            both = kl_div(p, q, log_target=True, reduction="batchmean") + kl_div(
                q, p, log_target=True, reduction="batchmean"
            )
            loss = loss + self.r_drop * both / 2
        if self.contrastive:
            loss = loss + self.contrastive * supervised_contrastive(outputs.vectors, labels)
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One forward and backward pass; with FGM a second one, at the embeddings shifted against the loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.adversarial:
            gradient = self.embedded.grad
            length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
            self.shift = self.adversarial * gradient / length
            try:
                super().training_step(model, inputs, num_items_in_batch)
            finally:
                self.shift = None
        return loss

    def perturb(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        """Hook behind the embeddings: keeps their gradient in the first pass, shifts them in the second."""
        if not (module.training and torch.is_grad_enabled()):
            return None
        if self.shift is not None:
            return output + self.shift
        self.embedded = output if output.requires_grad else output.requires_grad_()
        self.embedded.retain_grad()
        return self.embedded


def embeddings_of(model: Classifier) -> str:
    """Where the embedding layer stands in the encoder, wrapped by peft or not."""
    return next(name for name, _ in model.encoder.named_modules() if name.split(".")[-1] == "embeddings")


def supervised_contrastive(vectors: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Texts of one class should be nearer to each other than to all others of the batch.

    The loss L_out of Khosla et al. (2020), equation 2, over the texts that have another one of their class in the
    batch; 0 where none has.
    """
    vectors = normalize(vectors.float(), dim=-1)
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    log_share = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=-1)
    positive = (labels[:, None] == labels[None]) & ~itself
    has = positive.any(dim=1)
    if not has.any():
        return vectors.sum() * 0
    return -(log_share.masked_fill(~positive, 0).sum(1)[has] / positive.sum(1)[has]).mean()


class AllocateRanks(TrainerCallback):
    """Calls AdaLoRA's re-allocation of ranks after every step, before the gradients are cleared."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """The library's hook."""
        methods.allocate_ranks(model, state.global_step)


class KeepBest(TrainerCallback):
    """Keeps the trained weights of the epoch with the best validation accuracy, and puts them back at the end."""

    best, weights = -1.0, None

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        """The library's hook."""
        if metrics["eval_accuracy"] > self.best:
            self.best, self.weights = metrics["eval_accuracy"], methods.trained_state(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """The library's hook."""
        if self.weights is not None:
            model.load_state_dict(self.weights, strict=False)


def scores(outputs: transformers.EvalPrediction) -> dict[str, float]:
    """What is measured on validation after every epoch."""
    predictions = outputs.predictions.argmax(axis=-1)
    return {
        "accuracy": accuracy_score(outputs.label_ids, predictions),
        "macro_f1": f1_score(outputs.label_ids, predictions, average="macro", zero_division=0),
    }


def trainer(
    classifier: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    folder: Path,
    *,
    seed: int,
    method: str = "full",
    epochs: float = 4,
    patience: int = 2,
    batch_tokens: int = 2048,
    learning_rate: float = 2e-4,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    embeddings: bool = False,
    label_smoothing: float = 0.0,
    r_drop: float = 0.0,
    adversarial: float = 0.0,
    contrastive: float = 0.0,
    layer_decay: float = 1.0,
    augment: float = 0.0,
    precision: str = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> Trainer:
    """A Trainer that is ready to train a classifier with a method, in place.

    After every epoch it looks at `validation`, stops when accuracy has not risen for `patience` epochs, and keeps the
    best epoch; where there is no validation set it trains all `epochs`. The other arguments are those of
    `02_finetune` and of `Trainer`. Raises ModelError for a setting that can have no effect.
    """
    if r_drop and not classifier.config.hidden_dropout_prob:
        raise ModelError("r_drop compares two dropout passes; set dropout above 0, for example 0.1.")
    device, precision, _ = device_and_precision(precision)
    judged = validation is not None
    batches = len(TokenBudget([len(ids) for ids in train["input_ids"]], batch_tokens, None))
    steps = max(1, round(batches * epochs))
    methods.prepare(classifier, method, steps, embeddings)
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        warmup_steps=warmup,  # a share, where it is below 1
        weight_decay=weight_decay,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        optim="adamw_torch_fused",
        eval_strategy="epoch" if judged else "no",
        save_strategy="no",
        metric_for_best_model="accuracy",
        report_to="none",
        disable_tqdm=not progress,
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=10,
        logging_first_step=True,
    )
    made = Trainer(
        model=classifier,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=Collator(tokenizer, augment=augment),
        processing_class=tokenizer,
        compute_metrics=scores,
        callbacks=[AllocateRanks(), *([KeepBest(), EarlyStoppingCallback(patience)] if judged else []), *callbacks],
        batch_tokens=batch_tokens,
        label_smoothing=label_smoothing,
        r_drop=r_drop,
        adversarial=adversarial,
        contrastive=contrastive,
        layer_decay=layer_decay,
    )
    if not progress:
        made.remove_callback(PrinterCallback)
    return made
