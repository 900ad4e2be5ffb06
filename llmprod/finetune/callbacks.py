"""What the Trainer does between its steps: ranks re-allocated, the best epoch kept, validation scored."""

from pathlib import Path

import transformers
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import TrainerCallback

from llmprod.files import atomic
from llmprod.finetune import methods

WEIGHTS = "trained.safetensors"  # the trained weights, in a checkpoint and, of the best epoch, next to them


class AllocateRanks(TrainerCallback):
    """Calls AdaLoRA's re-allocation of ranks after every step, before the gradients are cleared."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """The library's hook."""
        methods.allocate_ranks(model, state.global_step)


class KeepBest(TrainerCallback):
    """Restores, at the end, the trained weights of the epoch with the best validation accuracy."""

    best, weights = -1.0, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """The library's hook: a resumed run has the best epoch of those before."""
        if before := [row["eval_accuracy"] for row in state.log_history if "eval_accuracy" in row]:
            self.best, self.weights = max(before), load_file(Path(args.output_dir) / WEIGHTS)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        """The library's hook."""
        if metrics["eval_accuracy"] > self.best:
            self.best, self.weights = metrics["eval_accuracy"], methods.trained_state(model)
            if args.save_strategy == "epoch" and state.is_world_process_zero:
                with atomic(Path(args.output_dir) / WEIGHTS) as temporary:
                    save_file(self.weights, temporary)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """The library's hook."""
        if self.weights is not None:
            model.load_state_dict(self.weights, strict=False)


def scores(outputs: transformers.EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-F1 on validation, after every epoch."""
    predictions = outputs.predictions.argmax(axis=-1)
    return {
        "accuracy": accuracy_score(outputs.label_ids, predictions),
        "macro_f1": f1_score(outputs.label_ids, predictions, average="macro", zero_division=0),
    }
