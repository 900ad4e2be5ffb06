"""Attributions of a real model, and their faithfulness."""

import numpy as np
import pytest
import torch

from llmprod import models
from llmprod.evaluate import explain
from llmprod.finetune import fewshot


@pytest.fixture(scope="module")
def predictor():
    """Zero-shot: its classes are names, so that we know which words must matter."""
    labels = ["crude oil", "wheat harvest", "interest rates"]
    predictor = models.Predictor.pretrained("minilm", labels, head="cosine", max_length=32, precision="fp32")
    fewshot.set_prototypes(predictor, [], [])
    return predictor


TEXT = "reporters heard on monday that the wheat harvest of the country was good"


def test_attributions_are_complete_and_name_the_right_words(predictor):
    model, tokenizer = predictor.model, predictor.tokenizer
    tokens, scores, error = explain.attribute(predictor, TEXT, target=1, steps=64)
    assert tokens == TEXT.split() and scores.shape == (len(tokens),)
    assert set(np.array(tokens)[np.argsort(-scores)[:2]]) == {"wheat", "harvest"}
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    empty = ids.clone()
    empty[:, 1:-1] = tokenizer.pad_token_id
    with torch.inference_mode():
        logit = [model(input_ids=x, attention_mask=torch.ones_like(x)).logits[0, 1].item() for x in (ids, empty)]
    assert scores.sum() == pytest.approx(logit[0] - logit[1], rel=0.1)
    assert abs(error) < 0.1 * abs(logit[0] - logit[1])


def test_an_explanation_is_more_faithful_than_its_opposite(predictor):
    tokens, scores, _ = explain.attribute(predictor, TEXT, target=1)
    good, bad = (explain.faithfulness(predictor, [tokens], [ranking], [1]) for ranking in (scores, -scores))
    assert good[0][0] > bad[0][0], "leaving the explanation out costs more"
    assert good[1][0] < bad[1][0], "keeping only the explanation costs less"


def test_coloured_text_is_safe_html():
    page = explain.coloured(["<script>", "oil", "##y"], np.array([1.0, -0.5, 0.0]))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert " <span" in page and ">y</span>" in page and "11,110,153" in page and "224,122,31" in page
