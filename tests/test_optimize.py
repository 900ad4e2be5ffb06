"""The search: resumes after a kill, prunes, and finds the top of a known function."""

import subprocess
import sys
import textwrap

import optuna
import pytest

from llmprod import optimize


def bowl(trial: optuna.Trial) -> float:
    """Its highest point is 0, at x = 3."""
    return -((trial.suggest_float("x", -10, 10) - 3) ** 2)


def test_finds_the_top_and_is_equal_for_equal_seeds(tmp_path):
    one, two = (optimize.search(bowl, tmp_path / f"{i}.db", 40, seed=0, first={"x": 9.0}) for i in range(2))
    assert one.trials[0].params == {"x": 9.0}
    assert one.best_value > -0.5
    assert [t.params for t in one.trials] == [t.params for t in two.trials]


def test_a_killed_search_goes_on(tmp_path):
    code = f"""
    import os
    from pathlib import Path
    from llmprod import optimize

    def objective(trial):
        if trial.number == 5:
            os._exit(9)
        return trial.suggest_float("x", 0, 1)

    optimize.search(objective, Path({str(tmp_path / "s.db")!r}), 12, seed=0)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == 9
    study = optimize.search(lambda trial: trial.suggest_float("x", 0, 1), tmp_path / "s.db", 12, seed=0)
    finished = study.get_trials(states=optimize.FINISHED)
    assert len(finished) == 12 and len(study.trials) == 13, "five before the kill, seven after it, one lost"
    values = [t.params["x"] for t in finished]
    assert len(set(values)) == 12, "no trial is repeated"
    assert len(optimize.search(bowl, tmp_path / "s.db", 12, seed=0).trials) == 13, "nothing is left to do"


def test_another_search_has_another_storage(tmp_path):
    """Trials of other settings or of another space must not be carried on."""

    def narrow(trial):
        return trial.suggest_float("x", 0, 1)

    names = [optimize.storage(tmp_path, *of) for of in ([{"a": 1}, bowl], [{"a": 2}, bowl], [{"a": 1}, narrow])]
    assert len(set(names)) == 3
    assert names[0] == optimize.storage(tmp_path, {"a": 1}, bowl)


def test_what_falls_behind_is_stopped():
    class Trial:
        reported: list = []  # noqa: RUF012

        def report(self, value, step):
            self.reported.append((step, value))

        def should_prune(self):
            return len(self.reported) == 2

    from transformers import TrainerControl, TrainerState

    callback, control = optimize.Prune(Trial()), TrainerControl()
    callback.on_evaluate(None, TrainerState(epoch=1.0), control, metrics={"eval_accuracy": 0.5})
    assert not control.should_training_stop
    callback.on_evaluate(None, TrainerState(epoch=2.0), control, metrics={"eval_accuracy": 0.6})
    assert control.should_training_stop and callback.behind
    assert Trial.reported == [(1, 0.5), (2, 0.6)]


def test_a_pruned_trial_counts_as_done(tmp_path):
    def objective(trial):
        trial.suggest_float("x", 0, 1)
        if trial.number % 2:
            raise optuna.TrialPruned
        return 1.0

    study = optimize.search(objective, tmp_path / "s.db", 6, seed=0)
    assert len(study.trials) == 6 and study.best_value == pytest.approx(1.0)
