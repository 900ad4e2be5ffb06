"""Continual learning: what the methods compute, and that rehearsal forgets less, with the real model on real texts."""

import numpy as np
import pytest
import torch

from llmprod import LLMProdError, data
from llmprod.feedback import continual, studies
from llmprod.feedback import phases as phases_module
from llmprod.finetune import methods

SETTINGS = continual.Settings(max_length=16, epochs=4, batch=8, learning_rate=1e-3, buffer=8, precision="fp32")


@pytest.fixture(scope="module")
def phases():
    """Four classes of R8 in two phases."""
    table = data.drop_duplicates(data.clean(data.load("reuters-r8"))[0])[0]
    names = ["acq", "crude", "earn", "trade"]
    table = table[table["label"].isin(names)]

    def part(split: str) -> phases_module.Texts:
        rows = table[table["split"] == split]
        return rows["text"].tolist(), rows["label"].map(names.index).to_numpy()

    return phases_module.new_classes(part("train"), part("test"), names, 2, 16, 20, seed=0)


def test_phases_bring_disjoint_classes_and_no_test_text_twice(phases):
    first, second = phases
    assert not set(first.train[1]) & set(second.train[1]) and set(first.train[1]) == set(first.test[1])
    assert np.bincount(first.train[1]).max() == 16 and len(second.test[0]) == 40
    assert not set(first.test[0]) & set(second.test[0])


def test_topics_shift_while_the_classes_stay():
    phases, names = phases_module.shifted_topics(texts=2, tests=1, seed=0)
    assert len(phases) == 4 and names == ["comp", "rec", "sci", "talk"]
    assert all(set(phase.train[1]) == {0, 1, 2, 3} and len(phase.train[0]) == 8 for phase in phases)
    assert len({text for phase in phases for text in phase.train[0]}) == 32


def test_the_summary_of_an_accuracy_matrix_by_hand():
    matrix = np.array([[0.8, 0.1, 0.0], [0.9, 0.7, 0.1], [0.5, 0.6, 1.0]])
    found = continual.summary(matrix)
    assert found["average accuracy"] == pytest.approx((0.5 + 0.6 + 1.0) / 3)
    assert found["backward transfer"] == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    assert found["new accuracy"] == pytest.approx((0.8 + 0.7 + 1.0) / 3)


def test_herding_by_hand():
    vectors = np.array([[0.0], [1.0], [2.0], [9.0]])  # mean 3: first 2, then the one that brings the mean nearest to 3
    assert continual.herd(vectors, 1) == [2]
    assert continual.herd(vectors, 2) == [2, 1] and sorted(continual.herd(vectors, 9)) == [0, 1, 2, 3]


def test_ewcs_penalty_is_zero_at_the_start_and_pulls_back(phases):
    learner = continual.EWC(4, SETTINGS)
    assert learner.penalty() == 0  # nothing to hold yet
    learner.consolidate(phases[0].train[0], size=4)
    assert learner.penalty().item() == pytest.approx(0, abs=1e-12)  # at the anchor
    assert all((value >= 0).all() for value in learner.fisher.values())
    assert sum(float(value.sum()) for value in learner.fisher.values()) > 0
    weight, moved = learner.predictor.model.classifier.weight, 0.5
    with torch.no_grad():
        weight += moved
    expected = learner.settings.strength / 2 * moved**2 * learner.fisher["classifier.weight"].sum()
    assert learner.penalty().item() == pytest.approx(expected.item(), rel=1e-4)
    learner.penalty().backward()
    assert (weight.grad * learner.fisher["classifier.weight"] >= 0).all() and weight.grad.sum() > 0  # back, not on
    once = {name: value.clone() for name, value in learner.fisher.items()}
    learner.consolidate(phases[0].train[0], size=4)
    assert learner.penalty().item() == pytest.approx(0, abs=1e-12)
    assert learner.fisher["classifier.weight"].sum() > once["classifier.weight"].sum()  # of both phases


def test_distillation_by_hand():
    """Zero where nothing moved, else T² times the divergence, in the direction of the old model."""
    old, new = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert continual.distillation(old, old, 2.0).item() == pytest.approx(0, abs=1e-7)
    p = np.exp(1) / (np.exp(1) + 1)  # softmax of 2 / T and 0
    expected = 4 * (p * np.log(p / 0.5) + (1 - p) * np.log((1 - p) / 0.5))
    assert continual.distillation(old, new, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_learning_without_forgetting_compares_the_outputs_of_old_classes(phases, monkeypatch):
    """The first phase adds nothing to the loss; in the second each step compares the outputs of the two old classes."""
    seen, original = [], continual.distillation

    def watched(old: torch.Tensor, new: torch.Tensor, temperature: float) -> torch.Tensor:
        seen.append(tuple(old.shape))
        return original(old, new, temperature)

    monkeypatch.setattr(continual, "distillation", watched)
    learner = continual.WithoutForgetting(4, SETTINGS)
    learner.learn(phases[0])
    assert not seen
    learner.learn(phases[1])
    assert len(seen) == SETTINGS.epochs * 32 // SETTINGS.batch and set(seen) == {(SETTINGS.batch, 2)}


def test_rehearsal_forgets_less_than_naive_fine_tuning(phases):
    found = {name: continual.summary(continual.run(name, phases, 4, SETTINGS)[0]) for name in ("naive", "rehearsal")}
    assert found["naive"]["forgetting"] > 0.3
    assert found["rehearsal"]["forgetting"] < found["naive"]["forgetting"] / 2
    assert found["rehearsal"]["average accuracy"] > found["naive"]["average accuracy"] + 0.1


def test_an_adapter_of_a_phase_stays_as_it_was_learnt(phases):
    learner = continual.Adapters(4, SETTINGS)
    learner.learn(phases[0])
    kept = {name: weight.clone() for name, weight in learner.learnt[0][0].items()}
    learner.learn(phases[1])
    assert all(torch.equal(kept[name], learner.learnt[0][0][name]) for name in kept)
    answers = learner.predict(phases[0].test[0])
    assert (answers == phases[0].test[1]).mean() > 0.6
    learner.use(learner.start)
    trained = methods.trained_state(learner.predictor.model)
    assert all(torch.equal(learner.start[name], trained[name]) for name in trained)


def test_the_study_runs_what_it_names():
    parameters = {"scenario": "shifted topics", "learner": "naive", "phase_texts": 2, "phase_tests": 1, "seed": 0}
    parameters |= {"model": "minilm", "max_length": 16, "epochs": 1, "batch": 8, "learning_rate": 1e-3}
    found = studies.continual_learning(parameters)
    assert np.shape(found["matrix"]) == (4, 4) and set(found["metrics"]) >= {"forgetting", "backward transfer"}
    with pytest.raises(LLMProdError, match="rehearsal"):
        continual.run("hope", [], 4, SETTINGS)
