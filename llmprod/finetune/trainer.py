"""The Trainer: batches by token budget, regularisation losses, learning rates by layer."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
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
from llmprod.finetune.callbacks import WEIGHTS, AllocateRanks, KeepBest, scores
from llmprod.finetune.recipe import Recipe
from llmprod.machine import device_and_precision
from llmprod.models import Classifier, ModelError, Predictor


def tokenize(part: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, model: str) -> Dataset:
    """Tokenizes every text, cut at `max_length` and not padded, which is left to the batch.

    `datasets` caches the result next to the splits, once for each model (by its checksum).
    """

    def cut(batch: dict) -> dict:
        return tokenizer(batch["text"], truncation=True, max_length=max_length)

    key = hashlib.sha256(f"{artifacts.checksum(model)} {max_length} {part._fingerprint}".encode()).hexdigest()[:32]
    settings = {"remove_columns": "text", "new_fingerprint": key, "desc": "tokenising"}
    return part.map(cut, batched=True, **settings).rename_column("label", "labels")


class TokenBudget(Sampler):
    """Batches of texts of similar length with about `budget` tokens each; every epoch has equally many.

    So little is computed on padding, and batches of short texts are large enough to keep the processor busy.

    Args:
        lengths: tokens of each text
        budget: tokens in a batch
        seed: of the order of the batches; None for the fixed order of evaluation
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int | None):
        self.lengths, self.seed, self.epoch = np.asarray(lengths), seed, 0
        self.batches = max(1, min(len(self.lengths), round(self.lengths.sum() / budget)))

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's batches come next; the Trainer says so, so that a resumed run has those of its own epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            noise, order = np.zeros(len(self.lengths)), range(self.batches)
        else:
            random = np.random.default_rng((self.seed, self.epoch))
            noise, order = random.uniform(0, 2, len(self.lengths)), random.permutation(self.batches)
            self.epoch += 1
        # noise of up to two tokens and a tenth of the length: otherwise every epoch would have the same batches
        rows = np.argsort(self.lengths * (1 + 0.05 * noise) + noise, kind="stable")
        # cut the sorted texts into runs of equally many tokens: a text belongs to the run that holds its middle token
        middle = np.cumsum(self.lengths[rows]) - self.lengths[rows] / 2
        number = np.minimum((middle / self.lengths.sum() * self.batches).astype(int), self.batches - 1)
        batches = np.split(rows, np.flatnonzero(np.diff(number)) + 1)
        # a text longer than a run can leave the next run empty: then there are fewer batches than planned
        yield from (batches[i].tolist() for i in order if i < len(batches))


class Share(Sampler):
    """One process's share of every batch: of n processes the i-th takes rows i, i + n, … of it.

    A batch of fewer rows than there are processes goes to all of them. So together they take the steps of one process.
    """

    def __init__(self, batches: TokenBudget, number: int, of: int):
        self.batch_sampler, self.number, self.of = batches, number, of  # the Trainer looks for the first to set epochs

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batch_sampler:
            yield batch if len(batch) < self.of else batch[self.number :: self.of]


@dataclass
class Collator(DataCollatorWithPadding):
    """Pads a batch; in training each text is edited with probability `augment` (see `edit`)."""

    augment: float = 0.0

    def __call__(self, examples: list[dict]) -> dict:
        """A padded batch."""
        if self.augment:
            examples = [edit(example) if torch.rand(()) < self.augment else example for example in examples]
        return super().__call__(examples)


def edit(example: dict, share: float = 0.1) -> dict:
    """Drops a tenth of the tokens at random and swaps two neighbours; the first and last token stay.

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
    """The library's Trainer with our batches, learning rates by layer and regularisation losses (see `Recipe`)."""

    def __init__(self, recipe: Recipe, **settings: object):
        super().__init__(**settings)
        self.recipe, self.model_accepts_loss_kwargs = recipe, False
        if recipe.adversarial:
            self.embedded, self.shift = None, None
            embeddings = self.model.encoder.get_submodule(embeddings_of(self.model))
            embeddings.register_forward_hook(self.perturb)

    def loader(self, dataset: Dataset, budget: int, seed: int | None, collator: object) -> DataLoader:
        """Batches of a tokenised data set by token budget."""
        columns = [c for c in ("input_ids", "token_type_ids", "attention_mask", "labels") if c in dataset.column_names]
        lengths = [len(ids) for ids in dataset["input_ids"]]
        batches, processes = TokenBudget(lengths, budget, seed), self.accelerator.num_processes
        if processes > 1 and seed is not None:  # each evaluates on all texts
            batches = Share(batches, self.accelerator.process_index, processes)
        loader = DataLoader(dataset.select_columns(columns), batch_sampler=batches, collate_fn=collator)
        return loader if processes > 1 else self.accelerator.prepare(loader)

    def get_train_dataloader(self) -> DataLoader:
        """Training batches, another mix in every epoch."""
        return self.loader(self.train_dataset, self.recipe.batch_tokens, self.args.seed, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Validation batches, in length order; labels come with them, so that the order does not matter."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.loader(dataset, 2 * self.recipe.batch_tokens, None, DataCollatorWithPadding(self.processing_class))

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
                    "lr": self.args.learning_rate * self.recipe.layer_decay**depth,
                    "weight_decay": self.args.weight_decay if with_decay else 0.0,
                }
                for (depth, with_decay), parameters in groups.items()
            ],
            **settings,
        )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy plus the recipe's regularisation losses; in evaluation cross-entropy alone.

        Of several processes each returns its share of the batch's loss: the Trainer takes the mean of the gradients.
        """
        recipe, labels = self.recipe, inputs["labels"]
        texts = {name: value for name, value in inputs.items() if name != "labels"}
        if not model.training:
            outputs = model(**texts)
            loss = cross_entropy(outputs.logits.float(), labels)
            return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss
        if recipe.r_drop:
            texts = {name: torch.cat([value, value]) for name, value in texts.items()}
            labels = torch.cat([labels, labels])
        outputs = model(**texts)
        logits = outputs.logits.float()
        loss = cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing) + methods.orthogonality(self.model)
        if recipe.r_drop:
            p, q = log_softmax(logits, dim=-1).chunk(2)
            both = kl_div(p, q, log_target=True, reduction="batchmean") + kl_div(
                q, p, log_target=True, reduction="batchmean"
            )
            loss = loss + recipe.r_drop * both / 2
        if recipe.contrastive:
            loss = loss + recipe.contrastive * supervised_contrastive(outputs.vectors, labels)
        if (processes := self.accelerator.num_processes) > 1:
            mine = torch.tensor(float(len(labels)), device=labels.device)
            loss = loss * mine * processes / self.accelerator.reduce(mine.clone())
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One forward and backward pass; with FGM a second one, with the embeddings shifted to raise the loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.recipe.adversarial:
            gradient = self.embedded.grad
            length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
            self.shift = self.recipe.adversarial * gradient / length
            try:
                super().training_step(model, inputs, num_items_in_batch)
            finally:
                self.shift = None
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes the trained weights alone into a checkpoint; the others are those of the pretrained model."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(methods.trained_state(self.model), Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Reads what `_save` wrote."""
        self.model.load_state_dict(load_file(Path(resume_from_checkpoint) / WEIGHTS), strict=False)

    def perturb(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        """Hook on the embeddings' output: keeps its gradient in the first pass, shifts it in the second."""
        if not (module.training and torch.is_grad_enabled()):
            return None
        if self.shift is not None:
            return output + self.shift
        self.embedded = output if output.requires_grad else output.requires_grad_()
        self.embedded.retain_grad()
        return self.embedded


def embeddings_of(model: Classifier) -> str:
    """The name of the embedding layer in the encoder, wrapped by peft or not."""
    return next(name for name, _ in model.encoder.named_modules() if name.split(".")[-1] == "embeddings")


def supervised_contrastive(vectors: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """The supervised contrastive loss L_out (Khosla et al. 2020, equation 2): pulls the vectors of a class together.

    Averaged over the texts that have another one of their class in the batch; 0 where none has.
    """
    vectors = normalize(vectors.float(), dim=-1)
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    # log-softmax of the similarities of each text to the others of the batch
    log_share = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=-1)
    positive = (labels[:, None] == labels[None]) & ~itself
    has = positive.any(dim=1)
    if not has.any():
        return vectors.sum() * 0
    return -(log_share.masked_fill(~positive, 0).sum(1)[has] / positive.sum(1)[has]).mean()


def trainer(
    predictor: Predictor,
    train: Dataset,
    validation: Dataset | None,
    folder: Path,
    recipe: Recipe,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    resumable: bool = False,
) -> Trainer:
    """Prepares a classifier for the recipe's method, in place, and returns the Trainer that will train it.

    `train` and `validation` are tokenised (`tokenize`). After every epoch the Trainer evaluates on `validation`, stops
    early, and at the end keeps the epoch with the best accuracy; without a validation set it trains all epochs. If
    `resumable`, it writes a checkpoint into `folder` after every epoch, from which `train` can go on.

    Raises ModelError for a setting that can have no effect.
    """
    classifier, tokenizer = predictor.model, predictor.tokenizer
    if recipe.r_drop and not classifier.config.hidden_dropout_prob:
        raise ModelError("r_drop compares two dropout passes; set dropout above 0, for example 0.1.")
    device, precision, _ = device_and_precision(recipe.precision)
    batches = len(TokenBudget([len(ids) for ids in train["input_ids"]], recipe.batch_tokens, None))
    steps = max(1, round(batches * recipe.epochs))
    methods.prepare(classifier, recipe.method, steps, recipe.embeddings)
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=recipe.seed,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,  # a share, where it is below 1
        weight_decay=recipe.weight_decay,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        optim="adamw_torch_fused",
        eval_strategy="no" if validation is None else "epoch",
        save_strategy="epoch" if resumable else "no",
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="accuracy",
        report_to="none",
        disable_tqdm=not progress,
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=10,
        logging_first_step=True,
    )
    stopping = [] if validation is None else [KeepBest(), EarlyStoppingCallback(recipe.patience)]
    runner = Trainer(
        recipe,
        model=classifier,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=Collator(tokenizer, augment=recipe.augment),
        processing_class=tokenizer,
        compute_metrics=scores,
        callbacks=[AllocateRanks(), *stopping, *callbacks],
    )
    if not progress:
        runner.remove_callback(PrinterCallback)
    return runner
