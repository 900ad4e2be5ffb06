"""The classifier with the real pretrained model: loading, checkpoints, prediction."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib.tables._g_l_y_f import Glyph
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    MPNetModel,
    PreTrainedTokenizerFast,
)

from llmprod import LLMProdError, artifacts, machine, models, paths
from llmprod.customer_service import reply, retrieval
from llmprod.financial_sentiment import recognizer, sentiment
from llmprod.finetune import methods
from llmprod.models import Predictor
from llmprod.news_monitoring import scorer
from llmprod.optimize import compress

TEXTS = [
    "oil prices rose after the opec meeting",
    "the company said its net profit rose to mln dlrs in the fourth quarter from mln dlrs a year ago",
    "crude oil futures climbed",
    "a",
    "wheat " * 300,
]


def test_a_checkpoint_predicts_the_same(tmp_path):
    predictor = Predictor.pretrained("minilm", ["a", "b", "c"], max_length=32, precision="fp32")
    logits = predictor.predict(TEXTS)
    predictor.save(tmp_path / "checkpoint", "# card")
    again = Predictor.load(tmp_path / "checkpoint", "fp32")
    assert again.tokenizer.model_max_length == 32
    assert again.labels == ["a", "b", "c"] and again.device == predictor.model.device
    np.testing.assert_array_equal(again.predict(TEXTS), logits)
    assert load_file(tmp_path / "checkpoint/model.safetensors"), "the weights are safetensors"
    assert not [p for p in (tmp_path / "checkpoint").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("method", ["prefix", "adapter", "lora"])
def test_a_checkpoint_keeps_what_can_and_can_not_be_merged(method, tmp_path):
    settings = {"head": "cosine", "max_length": 32, "precision": "fp32"}
    predictor = Predictor.pretrained("minilm", ["a", "b", "c"], **settings)
    methods.prepare(predictor.model, method, steps=10)
    with torch.no_grad():  # as if it had been trained
        for parameter in predictor.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained = predictor.predict(TEXTS)
    methods.merge(predictor.model)
    predictor.save(tmp_path / "checkpoint", "# card")
    np.testing.assert_allclose(predictor.predict(TEXTS), trained, atol=1e-3)
    np.testing.assert_allclose(Predictor.load(tmp_path / "checkpoint", "fp32").predict(TEXTS), trained, atol=1e-3)
    plain = Predictor.pretrained("minilm", ["a", "b", "c"], **settings)
    assert np.abs(plain.predict(TEXTS) - trained).max() > 0.1


def test_predictions_do_not_depend_on_batch_or_order():
    predictor = Predictor.pretrained("minilm", ["a", "b", "c"], max_length=64, precision="fp32")
    together = predictor.predict(TEXTS)
    alone = np.concatenate([predictor.predict([text]) for text in TEXTS])
    predictor.batch_size = 2
    backwards = predictor.predict(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(together, backwards, atol=1e-4)


def test_bf16_changes_logits_little():
    predictor = Predictor.pretrained("minilm", ["a", "b", "c"], max_length=64)
    exact, rough = (replace(predictor, precision=p).predict(TEXTS) for p in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rough).max() < 0.05


def test_embeddings_are_those_of_sentence_bert():
    """Mean over tokens, of length 1, and near for texts that mean the same."""
    vectors = Predictor.pretrained("minilm", max_length=64, precision="fp32").embed(TEXTS)
    assert vectors.shape == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similar = vectors @ vectors.T
    assert similar[0, 2] > 0.4 > 0.3 > similar[0, 1]
    np.testing.assert_allclose(vectors, plain_embeddings(artifacts.fetch("minilm"), TEXTS, 64), atol=1e-5)


@pytest.mark.skipif(not artifacts.is_present("mpnet-base"), reason="404 MB: python -m llmprod artifacts mpnet-base")
def test_a_larger_sentence_encoder_embeds_as_sentence_bert_does():
    """MPNet counts tokens from the id of padding on, and has no fused attention."""
    predictor = Predictor.pretrained("mpnet-base", precision="fp32")
    vectors = predictor.embed(TEXTS)
    np.testing.assert_allclose(vectors, plain_embeddings(artifacts.fetch("mpnet-base"), TEXTS, 512), atol=1e-5)
    similar = vectors @ vectors.T
    assert vectors.shape == (5, 768) and similar[0, 2] > 0.5 > 0.4 > similar[0, 1]
    pruned = compress.prune_vocabulary(predictor, TEXTS)
    assert pruned.model.config.vocab_size < 3000
    np.testing.assert_allclose(pruned.embed(TEXTS), vectors, atol=1e-5)


def plain_embeddings(folder: Path, texts: list[str], longest: int) -> np.ndarray:
    """Mean over tokens, of length 1, by transformers alone and text by text."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    cut = [tokenizer(text, truncation=True, max_length=longest, return_tensors="pt") for text in texts]
    with torch.inference_mode():
        means = [model(**tokens).last_hidden_state[0].mean(0) for tokens in cut]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1).numpy()


def test_a_model_must_be_known_and_in_safetensors(tmp_path):
    with pytest.raises(models.ModelError, match="minilm"):
        models.model_folder("no-such-model")
    with pytest.raises(models.ModelError, match="is data, not a model"):
        models.model_folder("reuters-r8")
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(models.ModelError, match="pickled weights are not loaded"):
        models.model_folder(str(tmp_path))
    for name in ("~nobody-of-that-name/model", "long" * 100):
        with pytest.raises(models.ModelError, match=f"'{name}' is neither a known model"):
            models.model_folder(name)


def test_precision_is_chosen_with_a_reason():
    device, precision, reason = machine.device_and_precision("auto")
    assert precision == "fp32" or device.type == "cuda", "a processor's instructions must not change the numbers"
    assert "float" in reason
    assert machine.device_and_precision("fp32")[1] == "fp32"
    with pytest.raises(LLMProdError, match="'auto', 'fp32' or 'bf16'"):
        machine.device_and_precision("int8")


def test_the_cosine_head_is_a_scaled_cosine():
    predictor = Predictor.pretrained("minilm", ["a", "b"], head="cosine", precision="fp32")
    logits, vectors = predictor.infer(TEXTS[:3])
    weight = predictor.model.classifier.weight.detach().numpy()
    cosine = vectors @ weight.T / np.linalg.norm(vectors, axis=1)[:, None] / np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(logits, 20 * cosine, atol=1e-3)
    with pytest.raises(models.ModelError, match="'linear' or 'cosine'"):
        Predictor.pretrained("minilm", ["a", "b"], head="square")


def test_no_text_has_no_prediction():
    predictor = Predictor.pretrained("minilm", ["a", "b", "c"], precision="fp32")
    assert predictor.predict([]).shape == (0, 3) and predictor.embed([]).shape == (0, 384)


# One loader: folders that are not what they should be


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_encoder(folder: Path, kind: type = BertModel) -> Path:
    """A small real encoder with a tokenizer that knows letters, as somebody else may have saved it."""
    words = {token: number for number, token in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = kind.config_class(vocab_size=len(words), max_position_embeddings=16, **sizes)
    kind(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint that `save` wrote."""
    folder = tmp_path_factory.mktemp("small")
    Predictor.pretrained(str(write_encoder(folder / "encoder")), ["a", "b"]).save(folder / "checkpoint", "# card")
    return folder / "checkpoint"


def test_an_encoder_of_another_architecture_embeds_and_learns_by_what_it_has(tmp_path):
    """MPNet has no fused attention, other names for the matrices of a layer, and loses two positions to padding."""
    folder = write_encoder(tmp_path / "encoder", MPNetModel)
    found = Predictor.pretrained(str(folder), ["a", "b"], precision="fp32")
    assert found.model.encoder.config._attn_implementation == "eager" and found.tokenizer.model_max_length == 14
    np.testing.assert_allclose(found.embed(SAYINGS), plain_embeddings(folder, SAYINGS, 14), atol=1e-5)
    bert = Predictor.pretrained(str(write_encoder(tmp_path / "bert")), ["a", "b"])
    assert bert.model.encoder.config._attn_implementation == "sdpa" and bert.tokenizer.model_max_length == 16
    found.save(tmp_path / "checkpoint", "")
    for method in methods.METHODS:
        one, before = Predictor.load(tmp_path / "checkpoint", "fp32"), found.predict(SAYINGS)
        if method == "prefix":
            with pytest.raises(models.ModelError, match="method is 'prefix', for which a MPNetModel takes no keys"):
                methods.prepare(one.model, method, steps=10)
            continue
        methods.prepare(one.model, method, steps=10)
        trained = methods.trained_state(one.model)
        inside = {name.removeprefix("encoder.base_model.model.").removeprefix("encoder.") for name in trained}
        parts = {"lora": "qkvo", "adalora": "qkvo", "ia3": "kv", "adapter": "o"}.get(method, "")
        assert all(any(f"attn.{part}." in name for name in inside) for part in parts), f"{method}: {inside}"
        with torch.no_grad():  # as if it had been trained
            for parameter in one.model.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter) * parameter.requires_grad)
        after = one.predict(SAYINGS)
        assert np.abs(after - before).max() > 1e-3
        methods.merge(one.model)
        one.save(tmp_path / method, "")
        np.testing.assert_allclose(Predictor.load(tmp_path / method, "fp32").predict(SAYINGS), after, atol=1e-3)


SAYINGS = ["a b c", "z " * 40, "\u2603", ""]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths to every value in a JSON document."""
    yield path
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inside, (*path, key))


def damage(folder: Path, choose: Callable) -> str:
    """Changes a file: a bit flipped, cut, removed, exchanged for another, or a value of a JSON document set."""
    inside = sorted(path for path in folder.rglob("*") if path.is_file())
    file, kind = choose(inside), choose(["flip", "cut", "remove", "swap", "set", "set"])
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[choose(range(len(content)))] ^= 1 << choose(range(8))
        file.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(content[: choose(range(len(content)))])
    elif kind == "remove":
        file.unlink()
    elif kind == "swap":
        other = choose([path for path in inside if path != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        file = choose([path for path in inside if path.suffix == ".json"])
        document = json.loads(file.read_text())
        *before, last = choose([path for path in places(document) if path])
        inner = document
        for key in before:
            inner = inner[key]
        was = inner[last]
        inner[last] = choose([v for v in (None, -1, 0, True, "x", [], {}, 1e9, 10**18, float("nan")) if v != was])
        file.write_text(json.dumps(document))
    return file.name


@pytest.mark.parametrize("seal", [True, False])
@given(st.data())
def test_a_damaged_folder_is_one_message(saved, seal, data):
    """With a manifest, each damage is found; without, what can still be computed is, and nothing else is raised."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(saved, Path(temporary) / "copy", ignore=None if seal else lambda *_: ["manifest.json"])
        (folder / "README.md").unlink()
        name = damage(folder, lambda options: data.draw(st.sampled_from(options)))
        try:
            logits = Predictor.load(folder, "fp32").predict(SAYINGS)
        except models.ModelError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
        else:
            assert not seal or name == "manifest.json", f"{name} was changed"
            assert logits.shape == (4, 2)


def test_a_checkpoint_of_an_earlier_version_has_no_manifest_and_is_the_same(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy", ignore=lambda *_: ["manifest.json"])
    np.testing.assert_array_equal(*(Predictor.load(f, "fp32").predict(SAYINGS) for f in (saved, folder)))
    for name in ("README.md", ".DS_Store", "int8.onnx.writing"):  # a card is prose; a kill left the last
        (shutil.copytree(saved, tmp_path / name) / name).write_text("edited")
        Predictor.load(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "model-00001-of-00002.safetensors", "prefix/adapter_config.json"]
)
def test_what_is_added_to_a_sealed_folder_is_named(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(models.ModelError, match=f"was changed since it was written: {name}"):
        Predictor.load(folder)


@pytest.mark.parametrize("name", ["modeling.py", "model_head.pkl", "pytorch_model.bin", "deep/weights.PT", "x.ckpt"])
@pytest.mark.parametrize("load", [Predictor.load, lambda folder: models.model_folder(str(folder))])
def test_code_and_pickles_are_refused_at_every_door(saved, tmp_path, name, load):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    with pytest.raises(models.ModelError, match=f"{name}: code, pickled weights"):
        load(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_a_folder_that_asks_for_code_is_refused(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "copy", ignore=lambda *_: ["manifest.json"])
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    text = json.dumps(content | {"auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}})
    (folder / name).write_text(text.replace("auto_map", "\\u0061uto_map"))  # however it is written
    with pytest.raises(models.ModelError, match=f"{name}: code, pickled weights or what asks for them"):
        Predictor.load(folder)


def test_another_folder_or_model_behind_a_folder_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "prefix").symlink_to(saved, target_is_directory=True)
    with pytest.raises(models.ModelError, match="holds prefix"):
        Predictor.load(folder)
    (folder / "prefix").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(models.ModelError, match=r"holds adapter_config\.json"):
        Predictor.load(folder)


@pytest.mark.parametrize("legacy", [False, True])
def test_an_encoder_saved_with_another_head_keeps_its_weights(tmp_path, legacy):
    """As BERT is published: all names begin with `bert.`, and the oldest end otherwise; nothing of it may be random."""
    folder = write_encoder(tmp_path / "encoder", BertForMaskedLM)
    weights = load_file(folder / "model.safetensors")
    assert all(name.startswith(("bert.", "cls.")) for name in weights)
    if legacy:
        old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w
               for n, w in weights.items()}  # fmt: skip
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    found = Predictor.pretrained(str(folder), ["a", "b"], precision="fp32")
    for name, weight in found.model.encoder.state_dict().items():
        assert torch.equal(weight, weights[f"bert.{name}"]), name
    found.save(tmp_path / "checkpoint", "")
    np.testing.assert_array_equal(
        Predictor.load(tmp_path / "checkpoint", "fp32").predict(SAYINGS), found.predict(SAYINGS)
    )


def rewrite(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A change to the weights in a folder."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def set_config(folder: Path, **changes: object) -> None:
    """Changes a config."""
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


def replace_in(file: Path, old: str, new: str) -> None:
    """Replaces the first occurrence in a file."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


FIRST = "encoder.encoder.layer.0.attention.self.query.weight"
UNFIT = {
    "a layer is missing": rewrite(lambda weights: weights.pop(FIRST)),
    "a layer too many": lambda folder: set_config(folder, num_hidden_layers=1),
    "a layer too few": lambda folder: set_config(folder, num_hidden_layers=3),
    "another width": lambda folder: set_config(folder, hidden_size=32),
    "no numbers": rewrite(lambda weights: weights[FIRST].fill_(float("nan"))),
    "the head is missing": rewrite(lambda weights: weights.pop("classifier.weight")),
    "other labels": lambda folder: set_config(folder, id2label={"0": "a", "1": "b", "2": "c"}),
    "another tokenizer": lambda folder: shutil.copy(artifacts.fetch("minilm") / "tokenizer.json", folder),
    "another kind": lambda folder: set_config(folder, model_type="t5"),
    "a template of unknown tokens": lambda folder: replace_in(folder / "tokenizer.json", '"id": "[CLS]"', '"id": ""'),
    "no number of layers": lambda folder: set_config(folder, num_hidden_layers="many"),
    "layers without end": lambda folder: set_config(folder, num_hidden_layers=10**9),
    "classes without end": lambda folder: set_config(folder, id2label=None, num_labels=10**9),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_labels_and_tokenizer_that_do_not_fit_are_an_error(saved, tmp_path, kind):
    folder = shutil.copytree(saved, tmp_path / "copy", ignore=lambda *_: ["manifest.json"])
    UNFIT[kind](folder)
    with pytest.raises(models.ModelError, match=f"{re.escape(str(folder))} can't be read"):
        Predictor.load(folder)


UNUSABLE = {
    "an unknown head": ({"head": "square"}, "a head of 'linear' or 'cosine'"),
    "no head": ({"head": None}, "a head of 'linear' or 'cosine'"),
    "the same label twice": ({"id2label": {"0": "a", "1": "a"}}, "labels that differ"),
    "a label that is no text": ({"id2label": {"0": "a", "1": 3}}, "labels that differ"),
    "labels that are numbered otherwise": ({"id2label": {"0": "a", "7": "b"}}, "labels that differ"),
    "a setting that is no number": ({"layer_norm_eps": float("nan")}, "outputs are no numbers.*Write or download it"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_settings_of_a_checkpoint_that_can_not_be_meant_are_an_error(saved, tmp_path, kind):
    """Its weights fit, so it would predict, by another head, for one class twice, or NaN."""
    folder = shutil.copytree(saved, tmp_path / "copy", ignore=lambda *_: ["manifest.json"])
    changes, way_out = UNUSABLE[kind]
    set_config(folder, **changes)
    with pytest.raises(models.ModelError, match=f"{re.escape(str(folder))}.*{way_out}"):
        Predictor.load(folder)


@pytest.mark.parametrize("kind", ["a layer is missing", "a layer too many", "no numbers"])
def test_an_encoder_that_does_not_fit_is_an_error_though_its_head_is_new(tmp_path, kind):
    folder = write_encoder(tmp_path / "encoder")
    change = {"a layer is missing": rewrite(lambda weights: weights.pop(FIRST.removeprefix("encoder.")))}
    change["no numbers"] = rewrite(lambda weights: weights[FIRST.removeprefix("encoder.")].fill_(float("inf")))
    change.get(kind, UNFIT[kind])(folder)
    with pytest.raises(models.ModelError, match="can't be read"):
        Predictor.pretrained(str(folder), ["a", "b"])


DOORS = {
    "recognizer": (BertForTokenClassification, recognizer.Recognizer.load),
    "encoder": (BertModel, lambda folder: retrieval.load_encoder(str(folder), 8)),
    "ranker": (BertForSequenceClassification, retrieval.load_ranker),
    "base of a ranker": (BertModel, lambda folder: retrieval.train_cross_encoder(str(folder), ["a"], ["b"], [1.0])),
    "base of a recognizer": (BertModel, lambda folder: recognizer.train([("a b", [])], str(folder), progress=False)),
    "writer": (BertLMHeadModel, lambda folder: reply.Generator.load(str(folder))),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_as_strict(tmp_path, door):
    kind, load = DOORS[door]
    folder = write_encoder(tmp_path / "whole", kind)
    load(folder)
    shutil.copytree(folder, tmp_path / "pickle").joinpath("pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(models.ModelError, match=r"holds pytorch_model\.bin"):
        load(tmp_path / "pickle")
    end = "layer.0.attention.self.query.weight"
    rewrite(lambda weights: [weights.pop(name) for name in list(weights) if name.endswith(end)])(folder)
    with pytest.raises(models.ModelError, match=f"1 weights do not fit: .*{end}"):
        load(folder)


def test_the_models_and_settings_of_a_monitor_are_sealed_together(saved, tmp_path):
    made = scorer.MonitorConfig(sentiment.PlattScaling(1.0, 0.0, 0.2), (-1.0, 1.0), 1000.0)
    ratings, other = Predictor.load(saved), Predictor.load(saved)
    torch.nn.init.constant_(other.model.classifier.bias, 9)
    made.save(tmp_path / "models", "# card", ratings, topics=ratings)
    assert scorer.MonitorConfig.load(tmp_path / "models").threshold == 1000
    Predictor.load(tmp_path / "models/topics")

    def raise_threshold(folder: Path) -> None:
        settings = (folder / "monitor.json").read_text()
        (folder / "monitor.json").write_text(settings.replace("1000.0", "1e12"))

    changes = [raise_threshold, lambda f: other.save(f / "topics", "# card"), lambda f: shutil.rmtree(f / "topics")]
    for number, change in enumerate(changes):
        change(shutil.copytree(tmp_path / "models", tmp_path / str(number)))
        with pytest.raises(models.ModelError, match=r"written: (monitor|topics/manifest)\.json"):
            scorer.MonitorConfig.load(tmp_path / str(number))


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"threshold": 1}', '{"negative": 3}', "null"])
def test_damaged_settings_of_a_monitor_are_one_message(tmp_path, content):
    (tmp_path / "monitor.json").write_text(content)
    with pytest.raises(LLMProdError, match=r"monitor\.json can't be read"):
        scorer.MonitorConfig.load(tmp_path)


def test_models_are_read_in_one_place():
    """Whoever needs a model or a tokenizer asks `models`; the rest is torch's tables, and settings."""
    harmless = ("torch.nn.Embedding", "AutoConfig", "SetFitModel")
    for path in sorted(paths.PACKAGE.rglob("*.py")):
        for kind in re.findall(r"([\w.]+)\.from_pretrained\(", path.read_text(encoding="utf-8")):
            assert kind in harmless or path.name == "models.py", f"{path.name}: {kind}"
    for path in [*paths.NOTEBOOKS.glob("*.ipynb"), paths.PACKAGE / "evaluate" / "studies.py"]:
        for call in re.findall(r"\.from_pretrained\(.*", path.read_text(encoding="utf-8")):
            assert re.match(r"\.from_pretrained\((str\()?models\.model_folder\(", call), f"{path.name}: {call}"


# Figures


@pytest.fixture
def install(monkeypatch, tmp_path):
    """No installed font has Chinese signs, until this is called: then one has the two of the word for topic."""
    signs = {ord(sign): f"uni{ord(sign):04X}" for sign in "主题"}
    names = [".notdef", *signs.values()]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(signs)
    builder.setupGlyf({name: Glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Own Signs", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "own.ttf")
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [f for f in manager.ttflist if f.name.startswith(("DejaVu", "Last"))])
    machine.say_once.cache_clear()
    return lambda: manager.addfont(tmp_path / "own.ttf")


def chinese() -> plt.Figure:
    """A figure with a Chinese class at an axis."""
    figure, axes = plt.subplots()
    axes.set_xticks([0, 1], ["主题", "topic"])
    return figure


def test_a_figure_takes_an_installed_font_for_what_the_usual_one_lacks(install, recwarn, tmp_path, capsys):
    install()
    figure = chinese()
    machine.drawable(figure)
    figure.savefig(tmp_path / "figure.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert capsys.readouterr().out == ""
    plt.close("all")


def test_a_script_that_no_font_has_is_named_once(install, recwarn, tmp_path, capsys):
    for _ in range(2):
        figure = chinese()
        machine.drawable(figure)
        figure.savefig(tmp_path / "figure.png")
    assert capsys.readouterr().out.count("CJK") == 1
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    plt.close("all")


def test_weights_that_move_for_a_prediction_can_be_trained_later(monkeypatch):
    """As they do on a GPU; the meta device stands in for one, up to the numbers that it does not have."""
    predictor = models.Predictor.pretrained("minilm", ["a", "b"])
    monkeypatch.setattr(models, "device_and_precision", lambda wanted: (torch.device("meta"), "fp32", ""))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        predictor.infer(["a text"])
    assert {p.device.type for p in predictor.model.parameters()} == {"meta"}
    assert not any(p.is_inference() for p in predictor.model.parameters())
    predictor.model.requires_grad_(True)
