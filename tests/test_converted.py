"""Models whose weights are a pickle alone: their tensors are read without opening it; corpora with a text a line."""

import json
import shutil
import zipfile

import pytest
import torch
from transformers import BertConfig, BertModel

from llmprod import artifacts, converted, corpora, models
from llmprod.formats import DataError


@pytest.fixture
def published(tmp_path):
    """A small checkpoint as PyTorch saves it, with a tensor that the model has no longer; and the model."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config)
    (tmp_path / "published").mkdir()
    config.save_pretrained(tmp_path / "published")
    weights = {"embeddings.position_ids": torch.arange(512)[None]} | model.state_dict()
    torch.save(weights, tmp_path / "published" / "pytorch_model.bin")
    return tmp_path / "published", model


def test_the_weights_are_those_of_the_checkpoint(published, tmp_path):
    source, model = published
    converted.convert(source, tmp_path / "new", "pytorch_model.bin", ["embeddings.position_ids"])
    read = models.read(BertModel, tmp_path / "new")
    assert all(torch.equal(weights, model.state_dict()[name]) for name, weights in read.state_dict().items())
    assert not list((tmp_path / "new").glob("*.bin"))


def test_the_pickle_stays_closed(published, tmp_path):
    """With a pickle that would run code in place of the archive's own, the weights are the same and nothing runs."""
    source, _ = published
    evil = tmp_path / "evil.bin"
    with zipfile.ZipFile(source / "pytorch_model.bin") as old, zipfile.ZipFile(evil, "w") as new:
        for name in old.namelist():
            code = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode()
            new.writestr(name, code if name.endswith("data.pkl") else old.read(name))
    shutil.move(evil, source / "pytorch_model.bin")
    converted.convert(source, tmp_path / "new", "pytorch_model.bin", ["embeddings.position_ids"])
    assert models.read(BertModel, tmp_path / "new") and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("first", [[], ["embeddings.position_ids", "another"]])
def test_other_tensors_than_the_models_are_refused(published, tmp_path, first):
    with pytest.raises(models.ModelError, match=r"pytorch_model\.bin"):
        converted.convert(published[0], tmp_path / "new", "pytorch_model.bin", first)
    assert not (tmp_path / "new").exists()


def test_another_config_is_refused(published, tmp_path):
    source, _ = published
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 17}))
    with pytest.raises(models.ModelError, match="its tensors are not those of a bert in float32"):
        converted.convert(source, tmp_path / "new", "pytorch_model.bin", ["embeddings.position_ids"])


def test_the_chinese_encoder_tells_what_a_sentence_is_about():
    assert converted.model("minilm") == "minilm" and converted.model("/some/folder") == "/some/folder"
    encoder = models.Predictor.pretrained(converted.model("m3e-small"))
    a, b, c = encoder.embed(["我的包裹到哪了", "快递怎么还没送到", "这本书写得很无聊"])
    assert a @ b > a @ c + 0.1 and a @ b > b @ c + 0.1
    with pytest.raises(models.ModelError, match="pickled weights are not loaded"):
        models.model_folder("m3e-small")


def test_reviews_and_newspaper_are_lines_without_tags():
    reviews, newspaper = corpora.load("chinese-reviews"), corpora.load("chinese-newspaper")
    assert reviews["label"].value_counts().to_dict() == {"negative": 18575, "positive": 16548}
    assert len(newspaper) == 19484 and not newspaper["text"].str.contains("/[a-z]+", regex=True).sum() > 20
    assert newspaper["text"][0].startswith("迈向充满希望的新世纪——一九九八年新年讲话")
    assert set(corpora.names()) == {"chinese-reviews", "chinese-newspaper"}
    with pytest.raises(DataError, match="'reuters-r8' is no corpus; there are: chinese-reviews"):
        corpora.load("reuters-r8")
    assert all("lines" in artifacts.entry(name) for name in corpora.names())
