"""Training in two processes: the steps of one process, also where one of the two is killed on the way."""

import contextlib
import multiprocessing
import os
from dataclasses import replace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from llmprod.finetune import learn, parallel, trainer
from llmprod.finetune.recipe import Recipe
from llmprod.models import ModelError

from . import test_finetune

small = test_finetune.small  # a fixture
RECIPE = Recipe(**test_finetune.FAST | {"epochs": 3, "patience": 3})


@settings(max_examples=30)
@given(st.lists(st.integers(3, 128), min_size=1, max_size=200), st.integers(128, 4096), st.integers(2, 9))
def test_the_shares_of_all_processes_are_the_batch(lengths, budget, processes):
    whole = list(trainer.TokenBudget(lengths, budget, 0))
    shares = [trainer.Share(trainer.TokenBudget(lengths, budget, 0), i, processes) for i in range(processes)]
    for batch, *parts in zip(whole, *shares, strict=True):
        if len(batch) < processes:
            assert parts == [batch] * processes, "none waits without a text"
        else:
            assert sorted(row for part in parts for row in part) == sorted(batch) and min(map(len, parts)) > 0
    assert {len(share) for share in shares} == {len(trainer.TokenBudget(lengths, budget, 0))}


class KillOne(TrainerCallback):
    """Kills one of the processes in the last epoch, once, and notes the steps that it hears of."""

    def __init__(self):
        self.steps, self.killed = [], 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.steps += [] if "eval_accuracy" in logs else [state.global_step]
        if logs.get("epoch") == 2.0 and not self.killed:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.net_connections("tcp") and not self.killed:  # to the other one, over loopback
                        process.kill()
                        self.killed = process.pid


def test_two_processes_of_which_one_is_killed_learn_what_one_learns(small, tmp_path):
    splits, labels = small
    alone = learn.learn(splits, labels, RECIPE, tmp_path / "alone", progress=False)
    kill = KillOne()
    both = parallel.learn(splits, labels, RECIPE, tmp_path / "both", 2, callbacks=[kill])
    assert kill.killed and kill.steps.count(1) == 1, "it goes on from the last epoch's end"
    keys = ("eval_loss", "eval_accuracy", "learning_rate", "grad_norm")
    pairs = list(zip(alone.history, both.history, strict=True))
    for mine, theirs in pairs[:-1]:  # the last is of times
        assert {k: mine[k] for k in keys if k in mine} == pytest.approx(
            {k: theirs[k] for k in keys if k in theirs}, rel=1e-2, abs=1e-4
        )
    weights = both.predictor.model.state_dict()
    assert all(torch.allclose(w, weights[name], atol=1e-4) for name, w in alone.predictor.model.state_dict().items())
    assert not (tmp_path / "both").exists(), "checkpoints take room"


def test_a_folder_is_gone_on_with_only_for_the_same_task(small, tmp_path, monkeypatch):
    splits, labels = small
    for recipe, stays in ((RECIPE, True), (replace(RECIPE, seed=1), False)):
        parallel.begin(splits, labels, RECIPE, tmp_path / "both")
        (tmp_path / "both/checkpoint-1").mkdir(exist_ok=True)
        parallel.begin(splits, labels, recipe, tmp_path / "both")
        assert (tmp_path / "both/checkpoint-1").exists() == stays
    parallel.begin(splits, labels, RECIPE, tmp_path / "both")
    (tmp_path / "both/checkpoint-1").mkdir()
    monkeypatch.setattr(parallel.artifacts, "sha256", lambda path: "other")
    parallel.begin(splits, labels, RECIPE, tmp_path / "both")
    assert not (tmp_path / "both/checkpoint-1").exists(), "nor with a checkpoint of other code"


def test_who_stops_it_leaves_no_process(tmp_path):
    os.mkfifo(tmp_path / parallel.TASK)  # they wait for the task

    def stop() -> None:
        if len(multiprocessing.active_children()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parallel.together(tmp_path, 2, stop)
    assert not multiprocessing.active_children()


def test_what_can_not_be_shared_is_one_error(small, tmp_path):
    with pytest.raises(ModelError, match="set processes to 1"):
        parallel.learn(*small, Recipe(strategy="contrastive"), tmp_path, 2)
    with pytest.raises(ModelError, match="0 processes can't train"):
        parallel.learn(*small, Recipe(), tmp_path, 0)
    with pytest.raises(ModelError, match="use one of full, head"):
        parallel.learn(*small, Recipe(method="no-such"), tmp_path, 2)
