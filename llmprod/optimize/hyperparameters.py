"""Hyper-parameter search that resumes and prunes."""

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.trial import TrialState
from transformers import TrainerCallback

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def storage(folder: Path, *of: object) -> Path:
    """The file that holds the trials of one search: its name depends on all of `of`.

    These are parameters and checksums, and functions, which count with their source.
    """
    parts = [inspect.getsource(part) if callable(part) else json.dumps(part, sort_keys=True) for part in of]
    return folder / f"search-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}.db"


class Prune(TrainerCallback):
    """Reports the validation accuracy to a trial after every epoch, and stops training where it should be pruned."""

    def __init__(self, trial: optuna.Trial):
        self.trial, self.behind = trial, False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """The library's hook."""
        self.trial.report(metrics["eval_accuracy"], step=round(state.epoch))
        if self.trial.should_prune():
            self.behind = control.should_training_stop = True


def search(
    objective: Callable[[optuna.Trial], float],
    storage: Path,
    trials: int,
    seed: int,
    first: dict[str, object] | None = None,
) -> optuna.Study:
    """Maximises an objective over `trials` finished trials, which include those of an earlier, interrupted run.

    Tree-structured Parzen estimator with median pruning (Bergstra et al. 2011; Akiba et al. 2019).

    Args:
        objective: takes a trial, asks it for values, returns a score; raises `optuna.TrialPruned` to give up
        storage: the SQLite file that holds the trials
        seed: of the sampler; two uninterrupted searches are equal
        first: values of the first trial, for example those in use
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{storage}",
        study_name="search",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1),
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # what a kill left behind
        study.tell(trial.number, state=TrialState.FAIL)
    done = len(study.get_trials(states=FINISHED))
    study.sampler = optuna.samplers.TPESampler(seed=seed + done, n_startup_trials=4)
    if first and not done:
        study.enqueue_trial(first, skip_if_exists=True)
    if done < trials:
        study.optimize(objective, n_trials=trials - done, show_progress_bar=True)
    return study
