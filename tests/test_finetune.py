"""Training with the real pretrained model on real texts: batches, losses, methods, few labels."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprod import data, machine, models
from llmprod.finetune import fewshot, learn, loop, methods, trainer
from llmprod.finetune.recipe import Recipe
from llmprod.models import Predictor

FAST = {"epochs": 1, "learning_rate": 3e-4, "max_length": 32, "batch_tokens": 512, "precision": "fp32"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """160 training and 60 validation texts of R8 as a prepared data set: (splits, labels)."""
    table = data.drop_duplicates(data.clean(data.load("reuters-r8"))[0])[0]
    folder = tmp_path_factory.mktemp("small") / "splits"
    data.save(data.split(table, validation_share=0.2, train_rows=160, test_rows=60), folder, {})
    return data.prepared(folder)[:2]


def short_run(small, folder, **changes) -> learn.Learnt:
    """A short training run."""
    splits, labels = small
    return learn.learn(splits, labels, Recipe(**FAST | changes), folder, progress=False)


def accuracy(learnt: learn.Learnt, part: Dataset) -> float:
    """On a split."""
    logits = learnt.predictor.predict(list(part["text"]))
    return float((logits.argmax(axis=1) == np.array(part["label"])).mean())


def majority(part: Dataset) -> float:
    """What the largest class alone would score."""
    return float(np.bincount(part["label"]).max() / len(part))


def test_two_runs_give_equal_weights_and_another_seed_does_not(small, tmp_path):
    one, two, other = (
        short_run(small, tmp_path, seed=seed, shots=5).predictor.model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


RATES = {"full": 3e-4, "head": 3e-2, "lora": 3e-3, "adalora": 5e-3, "prefix": 5e-2, "adapter": 3e-3, "ia3": 2e-2}
RATES["bitfit"] = 5e-3


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_what_it_says_and_learns(method, small, tmp_path):
    splits, labels = small
    before = dict(Predictor.pretrained("minilm", labels).model.named_parameters())
    learnt = short_run(small, tmp_path, method=method, learning_rate=RATES[method], shots=16, epochs=4)
    assert accuracy(learnt, splits["test"]) > majority(splits["test"]) + 0.08
    trained = methods.trained_state(learnt.predictor.model)
    assert sum(w.numel() for w in trained.values()) == learnt.trained_parameters
    whole = sum(p.numel() for p in before.values())
    assert learnt.trained_parameters < (0.5 if method == "full" else 0.03) * whole
    after = {
        re.sub(r"base_model\.(model\.)?|base_layer\.|(?<=dense\.)0\.", "", n): p
        for n, p in learnt.predictor.model.named_parameters()
        if not p.requires_grad
    }
    frozen = [name for name in before if name in after]
    assert len(frozen) > 3 and all(torch.equal(before[name], after[name]) for name in frozen), "frozen weights stay"


def test_adalora_moves_its_ranks_to_the_budget(small, tmp_path):
    ranks = methods.ranks(short_run(small, tmp_path, method="adalora", learning_rate=5e-3, epochs=3).predictor.model)
    assert ranks.shape == (6, 6) and ranks.to_numpy().max() <= 12
    assert ranks.to_numpy().mean() == pytest.approx(8, abs=0.2) and ranks.to_numpy().std() > 0


def test_adaloras_penalty_is_zero_for_orthogonal_factors():
    model = Predictor.pretrained("minilm", ["a", "b"]).model
    assert methods.orthogonality(model) == 0
    methods.prepare(model, "adalora", steps=100)
    assert methods.orthogonality(model) > 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.eye(*parameter.shape))
    assert methods.orthogonality(model).item() == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def untreated(small, tmp_path_factory):
    """Training without a measure against over-fitting, once for each way of it."""
    folder, made = tmp_path_factory.mktemp("untreated"), {}

    def of(**way: object) -> learn.Learnt:
        name = str(way)
        made[name] = made.get(name) or short_run(small, folder, shots=8, epochs=3, **way)
        return made[name]

    return of


@pytest.mark.parametrize(
    "change",
    [
        {"label_smoothing": 0.1},
        {"r_drop": 1.0, "dropout": 0.1},
        {"adversarial": 1.0},
        {"adversarial": 1.0, "method": "lora", "learning_rate": 3e-3},
        {"contrastive": 0.5},
        {"augment": 0.5},
        {"layer_decay": 0.5},
        {"embeddings": True},
    ],
    ids=str,
)
def test_every_measure_against_over_fitting_changes_training_and_still_learns(change, small, untreated, tmp_path):
    splits, _ = small
    plain = untreated(**{k: v for k, v in change.items() if k in FAST or k == "method"})
    other = short_run(small, tmp_path, shots=8, epochs=3, **change)
    assert not torch.equal(plain.predictor.model.classifier.weight, other.predictor.model.classifier.weight)
    assert accuracy(other, splits["test"]) > 0.5


def test_an_adversarial_step_raises_the_loss(small, tmp_path):
    """The shift has the length asked for, and the loss at the shifted text is higher than at the text."""
    splits, labels = small
    machine.seed_everything(0)
    predictor = Predictor.pretrained("minilm", labels, dropout=0.0)
    model = predictor.model
    train = trainer.tokenize(splits["train"], predictor.tokenizer, 32, "minilm")
    recipe = Recipe(adversarial=3.0, batch_tokens=512, precision="fp32")
    made = trainer.trainer(predictor, train, None, tmp_path, recipe)
    batch = next(iter(made.get_train_dataloader()))
    model.train()
    losses, shifts, compute = [], [], made.compute_loss

    def record(model, inputs, **more):
        losses.append(compute(model, inputs, **more))
        shifts.append(made.shift)
        return losses[-1]

    made.compute_loss = record
    made.create_optimizer()
    made.current_gradient_accumulation_steps = 1  # what train() sets
    made.training_step(model, batch)
    assert shifts[0] is None and losses[1] > losses[0]
    torch.testing.assert_close(shifts[1].flatten(1).norm(dim=1), torch.full((len(shifts[1]),), 3.0))


def test_supervised_contrastive_loss_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    # of the first two, the other one has cosine 1 against 0: -log(e^10 / (e^10 + 1)); the third has no partner
    expected = -np.log(np.exp(10) / (np.exp(10) + 1))
    assert trainer.supervised_contrastive(vectors, labels).item() == pytest.approx(expected, rel=1e-3)
    assert trainer.supervised_contrastive(vectors, torch.tensor([0, 1, 2])).item() == 0


def test_lower_layers_learn_slower(small, tmp_path):
    splits, labels = small
    predictor = Predictor.pretrained("minilm", labels)
    model = predictor.model
    train = trainer.tokenize(splits["train"], predictor.tokenizer, 32, "minilm")
    recipe = Recipe(layer_decay=0.5, learning_rate=1e-3, precision="fp32")
    made = trainer.trainer(predictor, train, None, tmp_path, recipe)
    rates = {id(p): group["lr"] for group in made.create_optimizer().param_groups for p in group["params"]}
    rate = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert rate["classifier.weight"] == 1e-3
    assert rate["encoder.encoder.layer.5.output.dense.weight"] == pytest.approx(5e-4)
    assert rate["encoder.encoder.layer.0.output.dense.weight"] == pytest.approx(1e-3 / 2**6)


@settings(max_examples=30)
@given(st.lists(st.integers(3, 128), min_size=1, max_size=300), st.integers(128, 4096), st.integers(0, 5))
def test_token_budget_batches_hold_every_text_once(lengths, budget, seed):
    sampler = trainer.TokenBudget(lengths, budget, seed)
    epochs = [list(sampler), list(sampler)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert len(batches) <= len(sampler)
        assert all(sum(lengths[row] for row in batch) <= 1.5 * sum(lengths) / len(sampler) + 128 for batch in batches)


def test_token_budget_pads_little_and_mixes_every_epoch(small):
    splits, _ = small
    tokenizer = Predictor.pretrained("minilm", ["a", "b"]).tokenizer
    tokens = trainer.tokenize(splits["train"], tokenizer, 128, "minilm")
    lengths = np.array([len(ids) for ids in tokens["input_ids"]])
    sampler = trainer.TokenBudget(lengths, 1024, 0)
    first, second = list(sampler), list(sampler)
    padded = sum(len(batch) * lengths[batch].max() for batch in first)
    assert lengths.sum() <= padded < 1.15 * lengths.sum()
    assert sorted(map(sorted, first)) != sorted(map(sorted, second)), "another mix"
    assert list(trainer.TokenBudget(lengths, 1024, 0)) == first, "the same for the same seed"


def test_tokens_are_kept_for_the_next_run(small):
    splits, _ = small
    tokenizer = Predictor.pretrained("minilm", ["a", "b"]).tokenizer
    one, two, shorter = (trainer.tokenize(splits["train"], tokenizer, length, "minilm") for length in (32, 32, 16))
    assert one._fingerprint == two._fingerprint != shorter._fingerprint
    assert one.cache_files == two.cache_files and max(map(len, shorter["input_ids"])) <= 16


@settings(max_examples=50)
@given(st.lists(st.integers(1000, 30000), min_size=0, max_size=60))
def test_augmentation_keeps_the_ends_and_adds_nothing(inner):
    example = {"input_ids": [101, *inner, 102], "attention_mask": [1] * (len(inner) + 2), "labels": 3}
    edited = trainer.edit(example)
    ids = edited["input_ids"]
    assert ids[0] == 101 and ids[-1] == 102 and len(edited["attention_mask"]) == len(ids) <= len(example["input_ids"])
    assert set(ids) <= set(example["input_ids"]) and edited["labels"] == 3
    assert len(inner) == 0 or len(ids) > 2


def test_few_labels_are_chosen_by_class_and_seed(small):
    splits, _ = small
    chosen, rest = fewshot.sample_shots(splits["train"], 3, 0)
    counts, all_counts = np.bincount(chosen["label"]), np.bincount(splits["train"]["label"])
    np.testing.assert_array_equal(counts, np.minimum(all_counts, 3))
    assert len(chosen) + len(rest) == len(splits["train"])
    assert set(chosen["text"]) != set(fewshot.sample_shots(splits["train"], 3, 1)[0]["text"])
    assert len(fewshot.sample_shots(splits["train"], 0, 0)[0]) == len(splits["train"])


def test_class_names_alone_beat_the_largest_class():
    """Zero-shot: no text has been seen."""
    requests = {
        "card arrival": ["when will my new card come", "is my card on its way"],
        "exchange rate": ["what rate do you use to change money", "the currency rate was bad"],
        "lost or stolen phone": ["somebody took my phone", "i can not find my mobile"],
    }
    predictor = Predictor.pretrained("minilm", list(requests), head="cosine", precision="fp32")
    fewshot.set_prototypes(predictor, [], [])
    for label, texts in requests.items():
        assert [predictor.labels[k] for k in predictor.predict(texts).argmax(axis=1)] == [label] * 2


@pytest.mark.parametrize("strategy", ["prototypes", "contrastive", "self-training"])
def test_strategies_learn_from_four_texts_a_class(strategy, small, tmp_path):
    splits, _ = small
    learnt = short_run(small, tmp_path, shots=4, strategy=strategy, epochs=4)
    assert accuracy(learnt, splits["test"]) > majority(splits["test"]) + 0.15


def test_a_student_sees_soft_labels():
    labelled = Dataset.from_dict({"input_ids": [[1]], "labels": [1]})
    unlabelled = Dataset.from_dict({"input_ids": [[2], [3]], "labels": [0, 0]})
    both = fewshot.with_pseudo_labels(np.array([[0.0, 1.0], [2.0, 0.0]], dtype=np.float32), labelled, unlabelled)
    assert both["input_ids"] == [[1]] * fewshot.LABELLED_TIMES + [[2], [3]]
    np.testing.assert_allclose(both[0]["labels"], [0, 1])
    np.testing.assert_allclose(both[-2]["labels"], np.exp([0, 2]) / np.exp([0, 2]).sum(), rtol=1e-5)  # T = 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "qlora"}, "full, head, lora"),
        ({"strategy": "magic"}, "plain, prototypes"),
        ({"strategy": "self-training"}, "set shots"),
        ({"r_drop": 1.0}, "set dropout above 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong, message, small, tmp_path):
    with pytest.raises(models.ModelError, match=message):
        short_run(small, tmp_path, **wrong)


def test_prototypes_need_a_cosine_head():
    with pytest.raises(models.ModelError, match="cosine"):
        fewshot.set_prototypes(Predictor.pretrained("minilm", ["a", "b"]), [], [])


def test_a_recipe_picks_its_fields_from_any_parameters():
    assert Recipe.of({"method": "lora", "dataset": "banking77", "seed": 3}) == Recipe(method="lora", seed=3)


def test_the_loop_warms_up_clips_and_finds_the_minimum():
    """A straight line through points: the loss falls to 0; each step's loss is told to `log` and returned."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 20)[:, None]
    told = []
    losses = loop.train(
        model,
        iter([x] * 400),
        lambda batch: torch.nn.functional.mse_loss(model(batch), 3 * batch + 1),
        400,
        0.05,
        weight_decay=0.0,
        log=lambda batch, loss, step: told.append((step, loss)),
    )
    assert told == list(enumerate(losses)) and len(losses) == 400
    assert losses[-1] < 1e-4 < losses[0]
