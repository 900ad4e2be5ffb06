"""The classifier with the real pretrained model: loading, checkpoints, prediction."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmprod import LLMProdError, artifacts, machine, models
from llmprod.finetune import methods
from llmprod.models import Predictor

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

    from transformers import AutoModel, AutoTokenizer

    folder = artifacts.fetch("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(vectors[0], hidden / hidden.norm(), atol=1e-5)


def test_a_model_must_be_known_and_in_safetensors(tmp_path):
    with pytest.raises(models.ModelError, match="minilm"):
        models.model_folder("no-such-model")
    with pytest.raises(models.ModelError, match="is data, not a model"):
        models.model_folder("reuters-r8")
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(models.ModelError, match="pickled weights are not loaded"):
        models.model_folder(str(tmp_path))


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
