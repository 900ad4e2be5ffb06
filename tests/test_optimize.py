"""The search resumes, prunes, finds a known top; smaller models say what the large one says, or a gate says why not."""

import json
import shutil
import subprocess
import sys
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from llmprod import data, models
from llmprod.financial_sentiment import sentiment
from llmprod.optimize import compress, export, front, hyperparameters


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


def shallow(folder, bias):
    """A checkpoint of the encoder's first layer, which is exported in a second, with a head that has this bias."""
    whole = models.Predictor.pretrained("minilm", ["a", "b", "c"], dropout=0.0, max_length=64)
    predictor = compress.with_layers(whole, [0])
    torch.nn.init.constant_(predictor.model.classifier.bias, bias)
    predictor.save(folder, "a test")
    return folder


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
    for together, single in zip(export.int8(checkpoint, side_by_side=True).infer(texts), small, strict=True):
        np.testing.assert_array_equal(together, single)
    assert capsys.readouterr().out.count("once") == 1


def test_int8_weights_of_other_weights_or_damaged_ones_are_written_again(tmp_path, capsys):
    """What lies beside a checkpoint may be another one's, also one that was written before they were told apart."""
    texts, checkpoint, other = (
        ["oil prices rose", "a bank"],
        shallow(tmp_path / "one", 0),
        shallow(tmp_path / "other", 9),
    )
    right = export.int8(checkpoint).predict(texts)
    assert np.abs(export.int8(other).predict(texts) - right).max() > 5
    (checkpoint / "int8.onnx").write_bytes((checkpoint / "int8.onnx").read_bytes()[:-9])
    np.testing.assert_array_equal(export.int8(checkpoint).predict(texts), right)
    for name in models.INT8:  # with the note of the other one, too
        shutil.copy(other / name, checkpoint / name)
    np.testing.assert_array_equal(export.int8(checkpoint).predict(texts), right)
    assert capsys.readouterr().out.count("once") == 4


def test_int8_weights_that_could_not_be_written_leave_nothing(checkpoint, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(checkpoint.iterdir())
    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", full)
    with pytest.raises(OSError, match="space"):
        export.int8(checkpoint)
    assert sorted(checkpoint.iterdir()) == before


CLASSES = ["acq", "crude", "earn", "trade"]


@pytest.fixture(scope="module")
def task():
    """A small real task, four topics of Reuters R8: training texts and classes, test texts and classes."""
    table = data.load("reuters-r8").query("label in @CLASSES and split == 'train'").groupby("label").head(120)
    table = table.sample(frac=1, random_state=0)
    texts, y = table["text"].tolist(), np.array([CLASSES.index(label) for label in table["label"]])
    return texts[:320], y[:320], texts[320:], y[320:]


@pytest.fixture(scope="module")
def original(task):
    """The real encoder, two layers of it, with a head trained on the task."""
    predictor = models.Predictor.pretrained("minilm", CLASSES, dropout=0.0, max_length=24, precision="fp32")
    predictor = compress.with_layers(predictor, [0, 1])
    compress.distill(predictor, *task[:2], epochs=4, learning_rate=5e-4, batch_tokens=1024)
    predictor.model.encoder.set_attn_implementation("sdpa")
    return predictor


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """The share of texts with the same class."""
    return float((one.argmax(axis=1) == other.argmax(axis=1)).mean())


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory):
    """The folder of the original as ONNX."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export.save(original, folder)
    return folder


def test_onnx_says_what_pytorch_says(original, exported, task):
    loaded = export.load(exported)
    for exact, other in zip(original.infer(task[2]), loaded.infer(task[2]), strict=True):
        assert np.abs(exact - other).max() < 1e-4
    assert loaded.labels == CLASSES and loaded.tokenizer.model_max_length == 24
    assert original.model.encoder.config._attn_implementation == "sdpa", "the export leaves the model as it was"


def test_static_quantisation_needs_texts_like_those_it_will_see(original, exported, task, tmp_path):
    exact = original.predict(task[2])

    def static(texts: list[str]) -> np.ndarray:
        batches = export.calibration_batches(original, texts)
        file = exported / export.ONNX
        return export.save(original, tmp_path / "static", lambda f: export.quantise_static(file, f, batches)).predict(
            task[2]
        )

    calibrated = static(task[0][:24])
    assert agreement(exact, calibrated) > 0.93
    assert not np.array_equal(exact, calibrated)
    size = front.megabytes(tmp_path / "static") / front.megabytes(exported)
    assert size < 0.3
    assert np.abs(static(["a"]) - exact).mean() > 2 * np.abs(calibrated - exact).mean(), (
        "the ranges come from the texts"
    )


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_a_damaged_onnx_file_is_named(exported, content, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "sealed")
    (folder / export.ONNX).write_bytes(content)
    with pytest.raises(models.ModelError, match=r"was changed since it was written: model\.onnx"):
        export.load(folder)
    folder = shutil.copytree(exported, tmp_path / "copy", ignore=lambda *_: [models.MANIFEST])
    (folder / export.ONNX).write_bytes(content or (exported / export.ONNX).read_bytes()[:5000])
    with pytest.raises(models.ModelError, match=r"model\.onnx can't be read \(\w+: .*\)\. Write or download it again"):
        export.load(folder)
    (folder / export.ONNX).unlink()
    with pytest.raises(models.ModelError, match=r"has no model\.onnx"):
        export.load(folder)


def test_an_onnx_file_of_another_model_is_refused(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy", ignore=lambda *_: [models.MANIFEST])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(models.ModelError, match=r"outputs of \[\[4\], \[384\]\], of which config\.json knows nothing"):
        export.load(folder)


def test_a_pruned_vocabulary_changes_no_text_that_it_can_write(original, task, tmp_path):
    pruned = compress.prune_vocabulary(original, task[0])
    small, large = (p.model.encoder.get_input_embeddings().weight for p in (pruned, original))
    assert len(small) == len(pruned.tokenizer) == pruned.model.config.vocab_size < 0.4 * len(large)
    pruned.save(tmp_path / "pruned", "a test")
    pruned = models.Predictor.load(tmp_path / "pruned", "fp32")
    pieces = [
        [p.tokenizer.convert_ids_to_tokens(ids) for ids in p.tokenizer(task[2], truncation=True)["input_ids"]]
        for p in (original, pruned)
    ]
    same = np.array([a == b for a, b in zip(*pieces, strict=True)])
    assert 0.05 < same.mean() < 1
    difference = np.abs(original.predict(task[2]) - pruned.predict(task[2])).max(axis=1)
    assert difference[same].max() < 1e-5 < difference[~same].max()
    assert np.abs(original.predict(task[0]) - pruned.predict(task[0])).max() < 1e-5, "all tokens of these were kept"
    rare = "zyxwvut qqjx Ünïcödé 漢 %&! xylophonists"
    assert all(p.tokenizer.unk_token not in p.tokenizer.tokenize(rare) for p in (original, pruned))


def test_fewer_layers_are_those_asked_for(original):
    last = compress.with_layers(original, [1])
    kept, whole = last.model.encoder.encoder.layer, original.model.encoder.encoder.layer
    assert len(kept) == last.model.config.num_hidden_layers == 1 and len(whole) == 2
    assert kept[0].output.dense.weight.equal(whole[1].output.dense.weight)
    assert kept[0].output.dense.weight is not whole[1].output.dense.weight, "training it leaves the original as it is"
    for layers in ([], [2], [-1]):
        with pytest.raises(models.ModelError, match="0 to 1"):
            compress.with_layers(original, layers)


def test_a_student_learns_from_its_teacher(original, task):
    taught, exact = original.predict(task[0]), original.predict(task[2])
    student = compress.with_layers(original, [0])
    torch.nn.init.zeros_(student.model.classifier.weight)
    losses = compress.distill(student, task[0], taught, epochs=5, learning_rate=1e-3, batch_tokens=1024)
    answers = student.predict(task[2])
    baseline = np.bincount(task[3]).max() / len(task[3])
    assert (answers.argmax(axis=1) == task[3]).mean() > baseline + 0.3
    assert agreement(answers, exact) > 0.85
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert np.array_equal(original.predict(task[2]), exact), "the teacher is as it was"
    with pytest.raises(models.ModelError, match="320 texts have 319 targets"):
        compress.distill(student, task[0], taught[1:])


def test_static_embeddings_beat_the_largest_class(original, task, tmp_path):
    pruned = compress.prune_vocabulary(original, task[0])
    bag = compress.static_embeddings(pruned, task[0], 32)
    assert bag.model.embeddings.weight.shape == (pruned.model.config.vocab_size, 32)
    compress.distill(bag, task[0], task[1], epochs=10, learning_rate=1e-2, batch_tokens=1024)
    loaded = export.save(bag, tmp_path / "static")
    answers = loaded.predict(task[2])
    assert np.abs(answers - bag.predict(task[2])).max() < 1e-4
    assert (answers.argmax(axis=1) == task[3]).mean() > np.bincount(task[3]).max() / len(task[3]) + 0.3
    assert np.abs(np.subtract(*loaded.predict(["good news, no losses", "no news, good losses"]))).max() < 1e-5, (
        "no order"
    )


def test_the_gate_fails_when_it_must():
    labels = np.repeat([0, 1], 500)
    assert front.gate(labels, labels, labels) == []
    at_edge = labels.copy()
    at_edge[:5] = 1  # five of a thousand lost: exactly what is allowed
    assert front.gate(labels, at_edge, labels) == []
    beyond = labels.copy()
    beyond[:6] = 1
    assert front.gate(labels, beyond, labels) == ["loses 0.60 points of accuracy, at most 0.50 are allowed"]
    other, third = labels.copy(), labels.copy()  # as good as each other, wrong on different texts
    other[:20], third[-20:] = 1, 0
    assert front.gate(other, third, labels) == ["agrees on 96.0% of the texts, at least 98.0% is asked for"]
    assert front.gate(other, labels, labels) == [], "what changed for the better may have changed"
    assert len(front.gate(labels, 1 - labels, labels)) == 2
    assert len(front.gate(labels, 1 - labels, labels, agreement=0.0, loss=1.0)) == 0


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points)
def test_the_front_has_no_dominated_point_and_lacks_none(found):
    def dominates(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    on_it = front.pareto(*zip(*found, strict=True))
    assert [not any(dominates(other, point) for other in found) for point in found] == on_it.tolist()
    assert on_it.any()


def test_names_of_points_cover_nothing():
    figure, axes = plt.subplots(figsize=(8, 5))
    x, y = [10, 10, 10.1, 5, 5.2, 1], [0.97, 0.97, 0.97, 0.96, 0.96, 0.9]
    axes.scatter(x, y)
    axes.margins(0.2)
    front.label_points(axes, x, y, [f"a long name, number {k}" for k in range(6)])
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.count_contains(axes.transData.transform(np.column_stack([x, y]))) for box in boxes)
    plt.close(figure)


def test_speeds_are_of_all_texts_and_of_one(original, task):
    logits, speeds = front.timed(original, task[2][:20], task[2][:5])
    assert np.array_equal(logits, original.predict(task[2][:20]))
    assert 0 < speeds["p50, ms"] <= speeds["p99, ms"] and speeds["texts/s"] > 0


def test_the_processor_is_described_by_what_it_has(monkeypatch):
    has = {"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx_vnni": True}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has)
    assert front.processor() == "x86_64: AVX2, VNNI"
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    assert front.processor().endswith("none of AVX2, AVX-512, VNNI, bf16, AMX")
