"""The search resumes after a kill, prunes, finds the top of a known function; int8 weights say what the others say."""

import subprocess
import sys
import textwrap

import numpy as np
import optuna
import pytest

from llmprod import models
from llmprod.financial_sentiment import sentiment
from llmprod.optimize import export, hyperparameters


def bowl(trial: optuna.Trial) -> float:
    """Its highest point is 0, at x = 3."""
    return -((trial.suggest_float("x", -10, 10) - 3) ** 2)


def test_finds_the_top_and_is_equal_for_equal_seeds(tmp_path):
    one, two = (hyperparameters.search(bowl, tmp_path / f"{i}.db", 40, seed=0, first={"x": 9.0}) for i in range(2))
    assert one.trials[0].params == {"x": 9.0}
    assert one.best_value > -0.5
    assert [t.params for t in one.trials] == [t.params for t in two.trials]


def test_a_killed_search_goes_on(tmp_path):
    code = f"""
    import os
    from pathlib import Path
    from llmprod.optimize import hyperparameters

    def objective(trial):
        if trial.number == 5:
            os._exit(9)
        return trial.suggest_float("x", 0, 1)

    hyperparameters.search(objective, Path({str(tmp_path / "s.db")!r}), 12, seed=0)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == 9
    study = hyperparameters.search(lambda trial: trial.suggest_float("x", 0, 1), tmp_path / "s.db", 12, seed=0)
    finished = study.get_trials(states=hyperparameters.FINISHED)
    assert len(finished) == 12 and len(study.trials) == 13, "five before the kill, seven after it, one lost"
    values = [t.params["x"] for t in finished]
    assert len(set(values)) == 12, "no trial is repeated"
    assert len(hyperparameters.search(bowl, tmp_path / "s.db", 12, seed=0).trials) == 13, "nothing is left to do"


def test_another_search_has_another_storage(tmp_path):
    """Trials of other settings or of another space must not be carried on."""

    def narrow(trial):
        return trial.suggest_float("x", 0, 1)

    names = [hyperparameters.storage(tmp_path, *of) for of in ([{"a": 1}, bowl], [{"a": 2}, bowl], [{"a": 1}, narrow])]
    assert len(set(names)) == 3
    assert names[0] == hyperparameters.storage(tmp_path, {"a": 1}, bowl)


def test_what_falls_behind_is_stopped():
    class Trial:
        reported: list = []  # noqa: RUF012

        def report(self, value, step):
            self.reported.append((step, value))

        def should_prune(self):
            return len(self.reported) == 2

    from transformers import TrainerControl, TrainerState

    callback, control = hyperparameters.Prune(Trial()), TrainerControl()
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

    study = hyperparameters.search(objective, tmp_path / "s.db", 6, seed=0)
    assert len(study.trials) == 6 and study.best_value == pytest.approx(1.0)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of the real encoder with a new head, in a folder."""
    predictor = models.Predictor.pretrained("minilm", ["a", "b", "c"], dropout=0.0, max_length=64)
    predictor.save(tmp_path / "checkpoint", "a test")
    return tmp_path / "checkpoint"


def test_int8_weights_say_what_the_others_say(checkpoint, capsys):
    texts = sentiment.load()["text"].tolist()[:200]  # of unequal length, so that batches are padded
    whole = models.Predictor.load(checkpoint, "fp32").infer(texts)
    small = export.int8(checkpoint).infer(texts)
    for exact, rounded in zip(whole, small, strict=True):
        assert exact.shape == rounded.shape
        assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] > 0.97
        assert not np.array_equal(exact, rounded)
    file = checkpoint / "int8.onnx"
    assert file.stat().st_size < 0.3 * (checkpoint / "model.safetensors").stat().st_size
    written = file.stat().st_mtime_ns
    again = export.int8(checkpoint).infer(texts)
    assert file.stat().st_mtime_ns == written and np.array_equal(again[0], small[0])
    assert capsys.readouterr().out.count("once") == 1


def test_int8_weights_that_could_not_be_written_leave_nothing(checkpoint, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(checkpoint.iterdir())
    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", full)
    with pytest.raises(OSError, match="space"):
        export.int8(checkpoint)
    assert sorted(checkpoint.iterdir()) == before
