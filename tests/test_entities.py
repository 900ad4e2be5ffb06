"""Entities: annotated sentences, the token classifier and its score, currencies, passages about an entity."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprod import artifacts
from llmprod.financial_sentiment import entities, passages, recognizer
from llmprod.financial_sentiment.entities import Entity


def spans(*tags: str) -> list[tuple[str, int, int]]:
    """(kind, start, end) of the entities in one-letter words with these BIO tags."""
    places = [(2 * k, 2 * k + 1) for k in range(len(tags))]
    return [(e.kind, e.start, e.end) for e in entities.entities_of("x " * len(tags), places, tags)]


# Annotated sentences


@pytest.mark.parametrize(
    ("split", "sentences", "counts"),
    [
        ("train", 14041, {"location": 7140, "person": 6600, "company": 6321, "other": 3438}),
        ("valid", 3250, {"location": 1837, "person": 1842, "company": 1341, "other": 922}),
        ("test", 3453, {"location": 1668, "company": 1661, "person": 1617, "other": 702}),
    ],
)
def test_conll_has_the_published_counts(split, sentences, counts):
    """Tjong Kim Sang & De Meulder 2003, tables 1 and 2 (without the lines that begin an article)."""
    found = entities.conll(split)
    assert len(found) == sentences
    assert Counter(entity.kind for _, named in found for entity in named) == counts


def test_conll_sentences_and_joined_texts_name_the_same():
    sentences, joined = entities.conll("valid"), entities.conll("valid", longest=100)
    names = [[e.name for _, named in texts for e in named] for texts in (sentences, joined)]
    assert names[0] == names[1]
    words = [len(text.split()) for text, _ in joined]
    assert " ".join(text for text, _ in sentences) == " ".join(text for text, _ in joined)
    assert np.quantile(words, 0.1) < 25 < 70 < np.quantile(words, 0.9), "texts of all lengths"
    text, named = sentences[0]
    assert [text[e.start : e.end] for e in named] == ["LEICESTERSHIRE"]


def test_agreements_are_whole():
    found = entities.agreements(artifacts.fetch("ner-finance"))
    assert len(found) == 1164
    assert [e.name for e in found[0][1] if e.kind == "company"] == ["silicon valley bank", "bank", "bank"]
    counts = Counter(entity.kind for _, named in found for entity in named)
    assert counts == {"person": 753, "company": 242, "location": 169}


def test_answers_are_aligned_in_order(tmp_path):
    def read(text: str, ideal: str) -> list[Entity]:
        line = json.dumps({"input": [{"content": "?"}, {"content": text}], "ideal": ideal})
        (tmp_path / "samples.jsonl").write_text(line)
        return entities.agreements(tmp_path)[0][1]

    text = "Bank , or Smith - Jones , LLP , pays Bank"
    assert read(text, "[Smith - Jones , LLP - ORGANIZATION, Bank - ORGANIZATION]") == [
        Entity("company", "smith - jones llp", 10, 29),
        Entity("company", "bank", 37, 41),
    ]
    assert read(text, "No entities found") == []
    with pytest.raises(entities.EntityError, match="is not the file of the artifact"):
        read(text, "[Lender - PERSON]")
    (tmp_path / "samples.jsonl").write_text('{"text": 1}')
    with pytest.raises(entities.EntityError, match="is not the file of the artifact"):
        entities.agreements(tmp_path)


def test_bio_tags_by_hand():
    assert spans("O", "B-company", "I-company", "B-company", "O") == [("company", 2, 5), ("company", 6, 7)]
    assert spans("I-person", "I-location", "B-location") == [("person", 0, 1), ("location", 2, 3), ("location", 4, 5)]
    assert spans("O", "I-company", "O", "I-company") == [("company", 2, 3), ("company", 6, 7)]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from(list(entities.KINDS.values())))))
def test_tags_and_entities_are_inverse(drawn):
    named, word = [], 0
    for words, gap, kind in drawn:
        named.append(Entity(kind, "x " * (words - 1) + "x", 2 * (word + gap), 2 * (word + gap + words) - 1))
        word += gap + words
    places = [(2 * k, 2 * k + 1) for k in range(word + 1)]
    tags = [entities.TAGS[number] for number in entities.tags_of(places, named)]
    assert entities.entities_of("x " * len(places), places, tags) == named


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("AKAMAI TECHNOLOGIES , INC .", "akamai technologies"),
        ("McDonald's Corp.", "mcdonald"),
        ("Johnson & Johnson Inc", "johnson & johnson"),
        ("Koba Electronics Co. Ltd.", "koba electronics"),
        ("U.S.", "us"),
        ("Company", "company"),
        ("…'", "…"),
        ("'", "'"),
    ],
)
def test_names_are_the_same_for_all_spellings(name, plain):
    assert entities.normal(name) == plain


def test_score_by_hand():
    truth = [[Entity("company", "a", 0, 4), Entity("company", "b", 9, 12)], [], [Entity("company", "c", 1, 3)]]
    found = [[Entity("company", "a", 0, 4), Entity("company", "b", 9, 13)], [Entity("company", "c", 1, 3)], []]
    found[0] += [Entity("person", "b", 9, 12), Entity("company", "d", 20, 22)]
    assert entities.score(truth, found, ["company"]) == pytest.approx(
        {"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7}
    )
    assert entities.score(truth, found)["precision"] == 1 / 5, "a right place of the wrong kind is wrong"
    assert entities.score(truth, truth) == {"precision": 1, "recall": 1, "f1": 1}
    assert entities.score(truth, [[], [], []]) == {"precision": 0, "recall": 0, "f1": 0}


# The token classifier


@pytest.fixture(scope="module")
def sentences():
    """Short sentences of agreements that name a company: some to learn from, some to judge by."""
    found = entities.agreements(artifacts.fetch("ner-finance"))
    named = [(text, some) for text, some in found if len(text.split()) < 45 and any(e.kind == "company" for e in some)]
    return named[:50], named[50:80]


@pytest.fixture(scope="module")
def learnt(sentences):
    settings = {"epochs": 4, "max_length": 64, "batch_tokens": 256, "learning_rate": 5e-4, "bare": 0.0}
    return recognizer.train(sentences[0], **settings, precision="fp32", progress=False)


def mean_loss(found: recognizer.Recognizer, texts: list[entities.Annotated]) -> float:
    """The cross-entropy of the words' tags, word by word and not from the training loop's rows."""
    total, words = 0.0, 0
    for text, named in texts:
        places = [word.span() for word in entities.WORD.finditer(text)]
        target = torch.tensor(entities.tags_of(places, named))
        encoded = found.tokenizer([text[a:b] for a, b in places], is_split_into_words=True, return_tensors="pt")
        first = [encoded.word_ids().index(i) for i in range(len(places))]
        with torch.inference_mode():
            logits = found.model(**encoded).logits[0, first]
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        words += len(places)
    return total / words


def test_the_classifier_learns(sentences, learnt):
    train, held_out = sentences
    untrained = recognizer.train(train, epochs=0, precision="fp32", progress=False)
    assert mean_loss(learnt, held_out) < 0.5 * mean_loss(untrained, held_out)
    texts, truth = zip(*held_out, strict=True)
    f1 = [entities.score(truth, model.find(texts), ["company"])["f1"] for model in (untrained, learnt)]
    assert f1[1] > max(0.4, 2 * f1[0]), f1


def test_embeddings_stay_and_a_seed_repeats(sentences):
    few = sentences[0][:6]
    before = recognizer.train(few, epochs=0, precision="fp32", progress=False).model.state_dict()
    first, again, other = (
        recognizer.train(few, epochs=2, seed=seed, precision="fp32", progress=False).model.state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    moved = {name for name in first if not torch.equal(first[name], before[name])}
    assert "classifier.weight" in moved and any("attention" in name for name in moved)
    assert not [name for name in moved if "embeddings" in name]


def test_every_word_is_labelled_once_however_long_the_sentence(learnt):
    sentences = [["antidisestablishmentarianism", "!"] * 20, [], ["Bank"]]
    numbers = [range(40), [], [40]]
    rows = recognizer.encode(learnt.tokenizer, sentences, numbers, 16)
    assert max(len(row["input_ids"]) for row in rows) <= 16 and len(rows) > 3
    assert [number for row in rows for number in row["labels"] if number >= 0] == list(range(41))


def test_finding_in_texts_of_any_length(learnt, tmp_path):
    sentence = "Borrower shall repay Bank on the Maturity Date . "
    texts = [sentence * 40, "", "no company", sentence.replace(" .", "."), "   "]
    found = [[e for e in some if e.kind == "company"] for some in learnt.find(texts)]
    assert [e.name for e in found[0]] == ["bank"] * 40 and found[1] == found[4] == []
    assert found[0][-1].start == 39 * len(sentence) + sentence.index("Bank"), "the end of a long text was cut off"
    assert found[3] == [Entity("company", "bank", 21, 25)]
    assert learnt.find([]) == [] and learnt.find([""]) == [[]]
    learnt.save(tmp_path / "model", "card")
    assert recognizer.Recognizer.load(tmp_path / "model", "fp32").find(texts) == learnt.find(texts)


def test_no_sentences():
    with pytest.raises(entities.EntityError, match="no sentences"):
        recognizer.train([])


# Currencies


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("net 5 mln dlrs vs 3 mln dollars", []),
        ("the dollar fell to 145 yen and 1.80 marks in tokyo", ["dollar"]),
        ("against the mark, the Canadian dollar and the French franc", ["mark", "canadian dollar", "french franc"]),
        ("The yuan, the euro and the Swiss francs", ["yuan", "euro", "swiss franc"]),
        ("he missed the mark; copper rose to 60 cents a pound", []),
        ("the euro zone and sterling silver", []),
    ],
)  # fmt: skip
def test_currencies_apart_from_amounts(text, found):
    assert [entity.name for entity in passages.currencies(text)] == found


def test_a_currency_in_the_name_of_a_company_is_none():
    text = "sterling drug said the dollar fell"
    assert passages.currencies(text, [Entity("company", "sterling drug", 0, 13)]) == [
        Entity("currency", "dollar", 23, 29)
    ]


# Passages about an entity


def test_sentences_of_cased_text():
    text = 'Nokia Corp. said so. Mr. A. Aho of the U.S. Treasury "agreed." It rose 1.5 pct. Was it Ford Motor Co.? Yes'
    assert [text[a:b] for a, b in passages.sentences(text)] == [
        "Nokia Corp. said so.",
        'Mr. A. Aho of the U.S. Treasury "agreed."',
        "It rose 1.5 pct.",
        "Was it Ford Motor Co.?",
        "Yes",
    ]
    text = "It bought Nokia. The price rose.\n\na headline without a stop\n\nNokia Inc. Chairman "
    assert [text[a:b] for a, b in passages.sentences(text)] == [
        "It bought Nokia.",
        "The price rose.",
        "a headline without a stop",
        "Nokia Inc. Chairman",
    ]


def test_about_gives_the_sentences_that_name_an_entity():
    text = "Nokia Corp rose. Nothing happened. Nokia sold Elcoteq Oyj. The dollar fell."
    found = [
        Entity("company", "nokia", 0, 10),
        Entity("company", "nokia", 35, 40),
        Entity("company", "elcoteq", 46, 57),
    ]
    assert passages.about(text, [*found, *passages.currencies(text)]) == {
        ("company", "nokia"): ["Nokia Corp rose.", "Nokia sold Elcoteq Oyj."],
        ("company", "elcoteq"): ["Nokia sold Elcoteq Oyj."],
        ("currency", "dollar"): ["The dollar fell."],
    }
    assert passages.about(text, []) == {}


def test_about_takes_windows_of_lower_cased_text():
    filler = [f"w{i}" for i in range(100)]
    words = [*filler[:30], "acme", *filler[30:50], "acme", *filler[50:100], "acme"]
    text, starts = " ".join(words), list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    mentions = [Entity("company", "acme", starts[k], starts[k] + 4) for k in (30, 51, 102)]
    assert all(text[m.start : m.end] == "acme" for m in mentions)
    assert passages.about(text, mentions[::-1]) == {("company", "acme"): [" ".join(words[10:72]), " ".join(words[82:])]}
    assert passages.about("acme", [Entity("company", "acme", 0, 4)]) == {("company", "acme"): ["acme"]}
