"""The classifier with the real pretrained model: loading, checkpoints, prediction."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmprod import LLMProdError, artifacts, machine, models
from llmprod.finetune import methods

TEXTS = [
    "oil prices rose after the opec meeting",
    "the company said its net profit rose to mln dlrs in the fourth quarter from mln dlrs a year ago",
    "crude oil futures climbed",
    "a",
    "wheat " * 300,
]


def test_a_checkpoint_predicts_the_same(tmp_path):
    model, tokenizer = models.load_classifier("minilm", ["a", "b", "c"])
    tokenizer.model_max_length = 32
    logits = models.predict(model, tokenizer, TEXTS, precision="fp32")
    models.save_checkpoint(model, tokenizer, tmp_path / "checkpoint", "# card")
    again, its_tokenizer = models.load_checkpoint(tmp_path / "checkpoint")
    assert its_tokenizer.model_max_length == 32
    assert list(again.config.id2label.values()) == ["a", "b", "c"]
    np.testing.assert_array_equal(models.predict(again, its_tokenizer, TEXTS, precision="fp32"), logits)
    assert load_file(tmp_path / "checkpoint/model.safetensors"), "the weights are safetensors"
    assert not [p for p in (tmp_path / "checkpoint").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("method", ["prefix", "adapter", "lora"])
def test_a_checkpoint_keeps_what_can_and_can_not_be_merged(method, tmp_path):
    model, tokenizer = models.load_classifier("minilm", ["a", "b", "c"], head="cosine")
    methods.prepare(model, method, steps=10)
    with torch.no_grad():  # as if it had been trained
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tokenizer.model_max_length = 32
    trained = models.predict(model, tokenizer, TEXTS, precision="fp32")
    methods.merge(model)
    models.save_checkpoint(model, tokenizer, tmp_path / "checkpoint", "# card")
    np.testing.assert_allclose(models.predict(model, tokenizer, TEXTS, precision="fp32"), trained, atol=1e-3)
    again, its_tokenizer = models.load_checkpoint(tmp_path / "checkpoint")
    np.testing.assert_allclose(models.predict(again, its_tokenizer, TEXTS, precision="fp32"), trained, atol=1e-3)
    plain = models.load_classifier("minilm", ["a", "b", "c"], head="cosine")[0]
    assert np.abs(models.predict(plain, tokenizer, TEXTS, precision="fp32") - trained).max() > 0.1


def test_predictions_do_not_depend_on_batch_or_order():
    model, tokenizer = models.load_classifier("minilm", ["a", "b", "c"])
    tokenizer.model_max_length = 64
    together = models.predict(model, tokenizer, TEXTS, precision="fp32")
    alone = np.concatenate([models.predict(model, tokenizer, [text], precision="fp32") for text in TEXTS])
    backwards = models.predict(model, tokenizer, TEXTS[::-1], batch_size=2, precision="fp32")[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(together, backwards, atol=1e-4)


def test_bf16_changes_logits_little():
    model, tokenizer = models.load_classifier("minilm", ["a", "b", "c"])
    tokenizer.model_max_length = 64
    exact, rough = (models.predict(model, tokenizer, TEXTS, precision=p) for p in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rough).max() < 0.05


def test_embeddings_are_those_of_sentence_bert():
    """Mean over tokens, of length 1, and near for texts that mean the same."""
    vectors = models.embed("minilm", TEXTS, max_length=64, precision="fp32")
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
    _, precision, reason = machine.device_and_precision("auto")
    assert precision in ("fp32", "bf16") and "bfloat16" in reason
    assert machine.device_and_precision("fp32")[1] == "fp32"
    with pytest.raises(LLMProdError, match="'auto', 'fp32' or 'bf16'"):
        machine.device_and_precision("int8")


def test_the_cosine_head_is_a_scaled_cosine():
    model, tokenizer = models.load_classifier("minilm", ["a", "b"], head="cosine")
    logits, vectors = models.infer(model, tokenizer, TEXTS[:3], precision="fp32")
    weight = model.classifier.weight.detach().numpy()
    cosine = vectors @ weight.T / np.linalg.norm(vectors, axis=1)[:, None] / np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(logits, 20 * cosine, atol=1e-3)
    with pytest.raises(models.ModelError, match="'linear', 'cosine' or 'prompt'"):
        models.load_classifier("minilm", ["a", "b"], head="square")


@pytest.fixture(scope="module")
def masked_language_model(tmp_path_factory):
    """A small BERT that can fill masks, with random weights, and MiniLM's tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("mlm")
    tokenizer = models.load_classifier("minilm", ["a", "b"])[1]
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_prompt_asks_for_the_words_of_the_class_names(masked_language_model, tmp_path):
    """Class scores are those of the language model for the words at the mask; long texts keep the prompt."""
    from transformers import AutoModelForMaskedLM

    labels = ["oil", "interest_rates"]
    model, tokenizer = models.load_classifier(str(masked_language_model), labels, dropout=0.0, head="prompt")
    tokenizer.model_max_length = 24
    logits = models.predict(model, tokenizer, TEXTS, precision="fp32")

    whole = AutoModelForMaskedLM.from_pretrained(masked_language_model).eval()
    plain = models.load_classifier("minilm", ["a", "b"])[1]
    ids = plain(f"{TEXTS[0]} {models.PROMPT}", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        scores = whole(ids).logits[0, ids[0] == plain.mask_token_id][0]
    words = [plain(name, add_special_tokens=False)["input_ids"] for name in ("oil", "interest rates")]
    np.testing.assert_allclose(logits[0], [scores[w].mean() for w in words], atol=1e-4)
    assert tokenizer.decode(tokenizer(TEXTS[-1], truncation=True)["input_ids"]).endswith(
        "wheat this is about [MASK]. [SEP]"
    )

    models.save_checkpoint(model, tokenizer, tmp_path / "checkpoint", "# card")
    again, its_tokenizer = models.load_checkpoint(tmp_path / "checkpoint")
    np.testing.assert_allclose(models.predict(again, its_tokenizer, TEXTS, precision="fp32"), logits, atol=1e-5)
    with pytest.raises(models.ModelError, match="can't fill masks"):
        models.load_classifier("minilm", labels, head="prompt")


def test_a_prompt_can_be_trained(masked_language_model, tmp_path):
    from datasets import Dataset, DatasetDict

    from llmprod.finetune import learn

    texts = [f"{word} {i}" for i in range(16) for word in ("oil", "money")]
    part = Dataset.from_dict({"text": texts, "label": [0, 1] * 16})
    learnt = learn.learn(
        DatasetDict(train=part, validation=part),
        ["crude", "cash"],
        tmp_path,
        model=str(masked_language_model),
        strategy="prompt",
        max_length=24,
        epochs=15,
        patience=15,
        learning_rate=5e-3,
        batch_tokens=128,
        embeddings=True,
        seed=0,
        precision="fp32",
        progress=False,
    )
    logits = models.predict(learnt.classifier, learnt.tokenizer, ["oil 3", "money 7"], precision="fp32")
    assert logits.argmax(axis=1).tolist() == [0, 1]
