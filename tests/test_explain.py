"""Attributions of a real model, and their faithfulness."""

import numpy as np
import pandas as pd
import pytest
import torch

from llmprod import models
from llmprod.evaluate import explain
from llmprod.finetune import fewshot
from llmprod.harness import pipeline


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


def test_a_text_without_a_word_has_nothing_to_colour(predictor):
    tokens, scores, _ = explain.attribute(predictor, "", target=0)
    assert tokens == [] and explain.coloured(tokens, scores).startswith("<div")


def test_the_strongest_words_of_each_class():
    tokens, values = [["oil", "is", "up", "crude"], ["wheat", "!"], ["fed", "oil"]], [[3, 9, 8, 1], [1, 5], [2, -1]]
    found = explain.strongest_words(tokens, [np.array(v) for v in values], [0, 1, 0], count=2)
    assert found == {0: ["oil", "fed"], 1: ["wheat"]}, "of more than two letters, each once, the strongest first"


def test_words_of_one_letter_count_where_there_are_no_longer_ones():
    """As in Chinese; and a class whose texts have no word at all takes no part."""
    found = explain.strongest_words([["股", "市", "。"], ["!", "?"]], [np.array([1, 2, 9]), np.array([1, 2])], [0, 1])
    assert found == {0: ["市", "股"]}
    found = explain.strongest_words(
        [["差", "a", "vista"], ["of", "it"]], [np.array([3, 2, 1]), np.array([1, 2])], [0, 1]
    )
    assert found == {0: ["差", "vista"], 1: ["it", "of"]}, "a character is a word even where there are long ones"


def test_counterfactuals_by_hand():
    tokens, ranking = [list("abcdefghij"), ["x"]], [np.arange(10), np.array([1])]
    edited, wanted = explain.counterfactuals(tokens, ranking, [0, 1], {0: ["oil"], 1: ["wheat", "corn", "rye"]})
    assert wanted == [1, 0] and edited[1] == ["oil"]
    assert edited[0] == [*"abcdefg", "rye", "corn", "wheat"], "the last three rank highest"


@pytest.mark.parametrize("words", [["wheat", "harvest"], ["股", "市"], ["!", "?"]])
def test_03_goes_on_where_all_explained_texts_get_one_class(predictor, capsys, words):
    (cell,) = [code for code in pipeline.code_of(pipeline.read("03_evaluate")) if "explain.counterfactuals" in code]
    given = {"predictions": np.ones(2, int), "chosen": np.array([1, 0]), "labels": predictor.labels, "seed": 0}
    given |= {"tokens": [words] * 2, "attributions": [np.ones(2)] * 2, "predictor": predictor}
    names = given | {"np": np, "pd": pd, "explain": explain, "display": lambda table: None}
    exec(cell, names)
    assert "Counterfactual edits can't be measured" in capsys.readouterr().out and names["followed"] == {}


@pytest.mark.parametrize("strongest", [{0: ["oil"]}, {}])
def test_where_one_class_is_predicted_there_is_no_counterfactual(strongest):
    assert explain.counterfactuals([["a"], ["b"]], [np.ones(1)] * 2, [0, 0], strongest) == ([], [])
