"""Fine-tuning with the real pretrained model on real texts."""

import numpy as np
import pytest
import torch
from datasets import DatasetDict, disable_progress_bars
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, Trainer

from llmprod import artifacts, data, finetune, track

TEXTS = [
    "oil prices rose after the opec meeting",
    "the company said its net profit rose to mln dlrs in the fourth quarter from mln dlrs a year ago",
    "crude oil futures climbed",
    "a",
    "wheat " * 300,
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """240 training and 60 validation texts of R8 as a prepared data set: (splits, labels)."""
    table = data.drop_duplicates(data.clean(data.load("reuters-r8"))[0])[0]
    folder = tmp_path_factory.mktemp("small") / "splits"
    data.save(data.split(table, validation_share=0.2, train_rows=240, test_rows=60), folder, {})
    return data.prepared(folder)[:2]


def fit(small, folder, seed: int, rows: int = 160, **settings):
    """A short training run; returns the trained model and its tokenizer."""
    disable_progress_bars()
    splits, labels = small
    track.seed_everything(seed)
    model, tokenizer = finetune.load_classifier("minilm", labels)
    part = DatasetDict(train=splits["train"].select(range(rows)), validation=splits["validation"].select(range(32)))
    tokens = finetune.tokenize(part, tokenizer, 32)
    arguments = finetune.training_arguments(
        folder,
        seed,
        **{"precision": "fp32", "num_train_epochs": 1, "learning_rate": 3e-4, "disable_tqdm": True} | settings,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    tokenizer.model_max_length = 32
    return trainer.model, tokenizer


def test_two_runs_give_equal_weights_and_another_seed_does_not(small, tmp_path):
    one, two, other = (fit(small, tmp_path / str(i), seed)[0].state_dict() for i, seed in enumerate((0, 0, 1)))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_training_learns_and_the_checkpoint_predicts_the_same(small, tmp_path):
    splits, labels = small
    model, tokenizer = fit(small, tmp_path / "trainer", seed=0, rows=len(splits["train"]), num_train_epochs=4)
    texts, y = list(splits["test"]["text"]), np.array(splits["test"]["label"])
    logits = finetune.predict(model, tokenizer, texts, precision="fp32")
    majority = np.bincount(y).max() / len(y)
    assert (logits.argmax(axis=1) == y).mean() > majority + 0.15

    finetune.save_checkpoint(model, tokenizer, tmp_path / "checkpoint", "# card")
    again, its_tokenizer = finetune.load_checkpoint(tmp_path / "checkpoint")
    assert its_tokenizer.model_max_length == 32
    assert list(again.config.id2label.values()) == labels
    np.testing.assert_array_equal(finetune.predict(again, its_tokenizer, texts, precision="fp32"), logits)
    assert load_file(tmp_path / "checkpoint/model.safetensors"), "the weights are safetensors"
    assert not [p for p in (tmp_path / "checkpoint").iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_predictions_do_not_depend_on_batch_or_order():
    model, tokenizer = finetune.load_classifier("minilm", ["a", "b", "c"])
    tokenizer.model_max_length = 64
    together = finetune.predict(model, tokenizer, TEXTS, precision="fp32")
    alone = np.concatenate([finetune.predict(model, tokenizer, [text], precision="fp32") for text in TEXTS])
    backwards = finetune.predict(model, tokenizer, TEXTS[::-1], batch_size=2, precision="fp32")[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(together, backwards, atol=1e-4)


def test_bf16_changes_logits_little():
    model, tokenizer = finetune.load_classifier("minilm", ["a", "b", "c"])
    tokenizer.model_max_length = 64
    exact, rough = (finetune.predict(model, tokenizer, TEXTS, precision=p) for p in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rough).max() < 0.05


def test_embeddings_are_those_of_sentence_bert():
    """Mean over tokens, of length 1, and near for texts that mean the same."""
    vectors = finetune.embed("minilm", TEXTS, max_length=64, precision="fp32")
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


def test_batches_of_similar_length_pad_less(small):
    splits, labels = small
    _, tokenizer = finetune.load_classifier("minilm", labels)
    tokens = finetune.tokenize(splits, tokenizer, 128)["train"]
    lengths = [len(ids) for ids in tokens["input_ids"]]
    assert max(lengths) <= 128
    batches = list(finetune.in_length_order(list(splits["train"]["text"]), tokenizer, 128, 16, "test"))
    padded = sum(batch["input_ids"].numel() for _, batch in batches)
    in_given_order = sum(16 * max(lengths[i : i + 16]) for i in range(0, len(lengths), 16))
    assert sum(lengths) <= padded < 1.1 * sum(lengths) < in_given_order
    assert sorted(row for rows, _ in batches for row in rows) == list(range(len(lengths)))


def test_a_model_must_be_known_and_in_safetensors(tmp_path):
    with pytest.raises(finetune.ModelError, match="minilm"):
        finetune.model_folder("no-such-model")
    with pytest.raises(finetune.ModelError, match="is data, not a model"):
        finetune.model_folder("reuters-r8")
    (tmp_path / "config.json").write_text("{}")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(finetune.ModelError, match="pickled weights are not loaded"):
        finetune.model_folder(str(tmp_path))


def test_precision_is_chosen_with_a_reason():
    _, precision, reason = finetune.device_and_precision("auto")
    assert precision in ("fp32", "bf16") and "bfloat16" in reason
    assert finetune.device_and_precision("fp32")[1] == "fp32"
    with pytest.raises(finetune.ModelError, match="'auto', 'fp32' or 'bf16'"):
        finetune.device_and_precision("int8")
