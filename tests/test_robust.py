"""Changes to texts do what they say, at the strength asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprod.evaluate import robust

TEXT = "The company said its net profit will rise in the fourth quarter, because oil prices rose"


@pytest.mark.parametrize("change", robust.CHANGES)
def test_strength_grades_a_change(change):
    assert robust.perturb([TEXT], change, 0.0, 0) == [TEXT]
    words = TEXT.split()

    def touched(strength: float) -> float:
        many = robust.perturb([TEXT] * 60, change, strength, 0)
        return float(
            np.mean(
                [
                    sum(a != b for a, b in zip(t.split(), words, strict=False)) + abs(len(t.split()) - len(words))
                    for t in many
                ]
            )
        )

    assert 0 < touched(0.2) < touched(0.8)
    assert robust.perturb([TEXT] * 3, change, 0.5, 1) == robust.perturb([TEXT] * 3, change, 0.5, 1)


@given(st.text(max_size=200), st.sampled_from(sorted(robust.CHANGES)), st.floats(0, 1))
def test_any_text_survives_any_change(text, change, strength):
    assert isinstance(robust.perturb([text], change, strength, 0)[0], str)


def test_changes_at_full_strength():
    full = {change: robust.perturb([TEXT], change, 1.0, 0)[0] for change in robust.CHANGES}
    assert full["case"] == TEXT.upper()
    assert full["truncation"] == "The"
    assert sorted(full["word order"].split()) == sorted(TEXT.split()) and full["word order"] != TEXT
    assert "will not rise" in full["negation"]
    assert "firm stated its net earnings" in full["synonyms"] and "increased" in full["synonyms"]
    assert full["foreign characters"].isascii() is False and len(full["foreign characters"]) == len(TEXT)
    assert len(full["typos"].split()) == len(TEXT.split()) and full["typos"] != TEXT


def test_characters_without_spaces_are_words():
    text = "这家酒店的早餐很好，iPhone 充电很快"
    full = {change: robust.perturb([text], change, 1.0, 0)[0] for change in robust.CHANGES}
    assert sorted(full["word order"].replace(" ", "")) == sorted(text.replace(" ", "")) and full["word order"] != text
    assert full["truncation"] == "这" and 5 < len(robust.perturb([text], "truncation", 0.5, 0)[0]) < len(text)
    assert len(full["punctuation"]) > 1.5 * len(text) and " 这" not in full["punctuation"]
    assert full["synonyms"].replace(" ", "") == text.replace(" ", ""), "no word that it knows"


@pytest.mark.parametrize(("language", "she"), [("en", " she "), ("zh", "她")])
def test_templates_differ_in_nothing_but_group(language, she):
    rows = robust.name_swap_texts(language)
    assert len(rows) == len(robust.TEMPLATES[language]) * 12 * 10
    assert all("{" not in row["text"] for row in rows)
    assert all((she in f" {row['text']} ") == row["names"].startswith(("female", "女")) for row in rows)
