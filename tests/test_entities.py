"""Entities: alignment, rules, the token classifier and its score, on sentences by hand and on financial agreements."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprod import artifacts
from llmprod.financial_sentiment import entities
from llmprod.financial_sentiment.entities import Entity


@pytest.fixture(scope="module")
def agreements():
    return entities.load(artifacts.fetch("ner-finance"))


@pytest.fixture(scope="module")
def with_companies(agreements):
    """Short sentences that name an organization: some to learn from, some to judge by."""
    named = agreements["tags"].map(lambda tags: "B-ORGANIZATION" in tags and len(tags) < 45)
    return agreements[named][:50], agreements[named][50:80]


def names(text: str, kind: str = "company", **settings: bool) -> list[str]:
    return [entity.name for entity in entities.by_rules(text, **settings) if entity.kind == kind]


# Annotated sentences


def test_agreements_are_whole(agreements):
    assert len(agreements) == 1164 and agreements.attrs["left_out"] == 0
    first = agreements.iloc[0]
    assert [" ".join(first["tokens"][a:b]) for kind, a, b in entities.spans(first["tags"]) if kind[0] == "O"] == [
        "SILICON VALLEY BANK",
        "Bank",
        "bank",
    ]
    counts = pd.Series([kind for tags in agreements["tags"] for kind, _, _ in entities.spans(tags)]).value_counts()
    assert counts.to_dict() == {"PERSON": 753, "ORGANIZATION": 242, "LOCATION": 169}


def test_alignment_by_hand():
    tokens = ["Bank", ",", "or", "Smith", "-", "Jones", ",", "LLP", ",", "pays", "Bank"]
    named = entities.answers("[Smith - Jones , LLP - ORGANIZATION, Bank - ORGANIZATION]")
    assert named == [("Smith - Jones , LLP", "ORGANIZATION"), ("Bank", "ORGANIZATION")]
    tags = entities.align(tokens, named)
    assert list(entities.spans(tags)) == [("ORGANIZATION", 3, 8), ("ORGANIZATION", 10, 11)], (
        "in order: not the first Bank"
    )
    assert entities.align(tokens, named[::-1]) == ["B-ORGANIZATION", "O", "O", *tags[3:8], "O", "O", "O"]
    assert entities.align(tokens, [named[1]] * 3) is None
    assert entities.answers("No entities found") == []


@given(st.data())
def test_alignment_puts_entities_back_in_order(data):
    tokens = data.draw(st.lists(st.sampled_from(["Bank", "of", "A", ",", "-", "pays"]), max_size=12))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)), max_size=8)))
    named = [
        (" ".join(tokens[a:b]), data.draw(st.sampled_from(entities.KINDS)))
        for a, b in zip(cuts[::2], cuts[1::2], strict=False)
    ]
    ideal = f"[{', '.join(f'{name} - {kind}' for name, kind in named)}]" if named else "No entities found"
    tags = entities.align(tokens, named)
    assert tags is not None and len(tags) == len(tokens)
    assert [(" ".join(tokens[a:b]), kind) for kind, a, b in entities.spans(tags)] == named
    assert entities.answers(ideal) == named


def test_what_cannot_be_aligned_is_left_out_and_counted(tmp_path):
    asked = [("Bank pays .", "[Bank - ORGANIZATION]"), ("Bank pays .", "[Lender - PERSON]")]
    lines = [json.dumps({"input": [{"content": "?"}, {"content": text}], "ideal": ideal}) for text, ideal in asked]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    frame = entities.load(tmp_path)
    assert frame["tags"].tolist() == [["B-ORGANIZATION", "O", "O"]] and frame.attrs["left_out"] == 1
    (tmp_path / "samples.jsonl").write_text('{"text": 1}')
    with pytest.raises(entities.EntityError, match="is not the file of the artifact"):
        entities.load(tmp_path)


def test_copies_of_a_sentence_come_into_one_split(agreements):
    parts = entities.split(agreements, seed=1)
    texts = {name: set(part["tokens"].map(" ".join).str.lower()) for name, part in parts.groupby("split")}
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) < len(parts)
    assert [
        round(len(texts[name]) / len(set.union(*texts.values())), 2) for name in ("train", "validation", "test")
    ] == [
        0.4,
        0.1,
        0.5,
    ]
    assert parts["split"].tolist() == entities.split(agreements, seed=1)["split"].tolist()
    assert parts["split"].tolist() != entities.split(agreements, seed=2)["split"].tolist()


# Rules


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Nokia Corp said its profit rose .", ["nokia"]),
        ("Shares of Nokia fell after Nokia Oyj's report.", ["nokia", "nokia"]),
        ("Shares of Nokia Corp fell , said Royal Bank of Scotland Group", ["nokia", "royal bank of scotland"]),
        ("In 2009 the Finnish Elcoteq SE and Outotec Oyj agreed on it.", ["outotec"]),
        ("Britain's Tesco PLC met McDonald's Corp. and", ["tesco", "mcdonald s"]),
        ("He left Johnson & Johnson Inc", ["johnson & johnson"]),
        ("AKAMAI TECHNOLOGIES , INC . pays", ["akamai technologies"]),
        ("Bank of America Corp, eBay Inc. and 3M Co rose", ["bank of america", "ebay", "3m"]),
        ("It was sold to Sedio N.V. of Lugano by Vestas Wind Systems A/S.", ["sedio", "vestas wind systems"]),
        ("Deutsche Bank AG and Silicon Valley Bank lent", ["deutsche bank", "silicon valley bank"]),
        ("It lent to Carlyle Group.", ["carlyle"]),
        ("The maker (NYSE: IBM) and <MSFT.O> rose", ["ibm", "msft"]),
        ("NOKIA CORP SAYS PROFIT FELL", ["nokia"]),
        ("champion products ch approves stock split champion products inc said its board", ["champion products"] * 2),
        ("cinram ltd th qtr net shr cts vs cts", ["cinram"]),
        ("owens and minor inc obod raises qtly dividend", ["owens and minor"]),
        ("gulf resources gre to gain on sale gulf resources and chemical corp", ["gulf resources and chemical"]),
        ("princeville sells princeville corp and aloha inc parent", ["princeville", "princeville", "aloha"]),
        ("usair group inc agreed to buy pacific southwest airlines inc", ["usair", "pacific southwest airlines"]),
        ("hutchison whampoa ltd bought a stake in husky oil ltd", ["hutchison whampoa", "husky oil"]),
        ("koba electronics co ltd buys sumitomo bank", ["koba electronics", "sumitomo bank"]),
    ],
)  # fmt: skip
def test_rules_find_companies(text, found):
    assert names(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "the central bank said the group will meet in paris",
        "a new company was formed in co operation with the government , nova co founder said",
        "The company's bank lent it the money. In Company meetings a group is formed.",
        "As the parties agreed , the Bank may demand payment .",
        "the company s entertainment group and a rival bank",
        "an investor group sold shares to the bank as expected",
        "The Borrower Company and Obligations of Company . Special Definitions As used herein",
        "< PAGE > and <TABLE> are tags",
        "as inc. is short for incorporated",
        "",
    ],
)
def test_rules_find_no_company(text):
    assert names(text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("net 5 mln dlrs vs 3 mln dlrs", ["dollar", "dollar"]),
        ("It paid $50m and USD 3mn, EUR13.1mn and HK$2", ["dollar", "dollar", "euro", "hong kong dollar"]),
        ("the dollar fell to 145 yen and 1.80 marks in tokyo", ["dollar", "yen", "mark"]),
        ("the mark rose against the Canadian dollar and the French franc", ["mark", "canadian dollar", "french franc"]),
        ("sterling was firm; the pound rose to 2.95 marks", ["pound", "pound", "mark"]),
        ("The U.S. dollar lost 1% against the yuan, the euro and the Swiss franc",
         ["dollar", "yuan", "euro", "swiss franc"]),
        ("the west german mark", ["mark"]),
        ("3 mln dlrs of debt at 20 dollars per barrel", ["dollar", "dollar"]),
        ("the pound rose against the mark", ["pound", "mark"]),
    ],
)  # fmt: skip
def test_rules_find_currencies(text, found):
    assert names(text, "currency") == found


@pytest.mark.parametrize(
    "text",
    [
        "the sale marks the end; it missed the mark and left a mark on mark smith",
        "copper rose to 60 cents a pound , it sold 20 mln pounds of copper",
        "a sterling performance, sterling silver and a crown",
        "euro zone growth, Euro 2024 and eurodollar deposits",
    ],
)
def test_rules_find_no_currency(text):
    assert names(text, "currency") == []


def test_amounts_can_be_left_out():
    text = "the dollar fell to 145 yen; it paid $50 and 3 mln dlrs"
    assert names(text, "currency") == ["dollar", "yen", "dollar", "dollar"]
    assert names(text, "currency", amounts=False) == ["dollar"]


def test_places_are_the_texts_own():
    text = "Yesterday, Nokia Corp paid 3 dollars."
    assert entities.by_rules(text) == [Entity("company", "nokia", 11, 21), Entity("currency", "dollar", 29, 36)]
    assert text[11:21] == "Nokia Corp"
    assert entities.by_rules("koba co ltd said") == [Entity("company", "koba", 0, 11)]
    assert entities.by_rules("To Akamai Technologies , Inc .") == [Entity("company", "akamai technologies", 3, 22)]


def test_sterling_drug_inc_is_no_currency():
    assert entities.by_rules("sterling drug inc said") == [Entity("company", "sterling drug", 0, 17)]


def test_of_two_that_overlap_the_longer_stays():
    short, long, apart = Entity("company", "a", 0, 5), Entity("company", "b", 3, 9), Entity("currency", "c", 9, 11)
    assert entities.resolve([apart, short, long]) == [long, apart]
    other = Entity("company", "d", 4, 10)
    assert entities.resolve([long, other]) == [long] and entities.resolve([other, long]) == [other]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9))))
def test_nothing_overlaps_after_resolving(places):
    given_ = [Entity("company", "x", start, start + length) for start, length in places]
    kept = entities.resolve(given_)
    assert all(a.end <= b.start for a, b in itertools.pairwise(kept))
    assert all(any(e.start < k.end and k.start < e.end for k in kept) for e in given_), "one was left out for nothing"


# Evaluation


def test_score_by_hand():
    truth = [[Entity("company", "a", 0, 4), Entity("company", "b", 9, 12)], [], [Entity("company", "c", 1, 3)]]
    found = [[Entity("company", "a", 0, 4), Entity("company", "b", 9, 13)], [Entity("company", "c", 1, 3)], []]
    found[0] += [Entity("currency", "b", 9, 12), Entity("company", "d", 20, 22)]
    assert entities.score(truth, found) == pytest.approx({"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7})
    assert entities.score(truth, truth) == {"precision": 1, "recall": 1, "f1": 1}
    assert entities.score(truth, [[], [], []]) == {"precision": 0, "recall": 0, "f1": 0}


def test_an_annotated_sentence_as_text():
    tokens, tags = ["Pay", "Nokia", "Corp", ",", "Bank"], ["O", "B-ORGANIZATION", "I-ORGANIZATION", "O", "B-PERSON"]
    assert entities.annotated(tokens, tags) == ("Pay Nokia Corp , Bank", [Entity("company", "nokia", 4, 14)])
    assert list(entities.spans(["I-PERSON", "I-LOCATION", "B-LOCATION", "O"])) == [
        ("PERSON", 0, 1),
        ("LOCATION", 1, 2),
        ("LOCATION", 2, 3),
    ]


# The token classifier


@pytest.fixture(scope="module")
def learnt(with_companies):
    settings = {"epochs": 4, "max_length": 64, "batch_tokens": 256}
    return entities.learn(with_companies[0], **settings, precision="fp32", progress=False)


def mean_loss(model, tokenizer, frame) -> float:
    """The cross-entropy of the words' tags, computed from words and not from the training loop's rows."""
    total, words = 0.0, 0
    for tokens, tags in zip(frame["tokens"], frame["tags"], strict=True):
        encoded = tokenizer(tokens, is_split_into_words=True, return_tensors="pt")
        first = [encoded.word_ids().index(i) for i in range(len(tokens))]
        with torch.inference_mode():
            logits = model(**encoded).logits[0, first]
        target = torch.tensor([model.config.label2id[tag] for tag in tags])
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        words += len(tokens)
    return total / words


def test_the_classifier_learns(with_companies, learnt):
    train, held_out = with_companies
    untrained = entities.learn(train, epochs=0, precision="fp32", progress=False)
    assert mean_loss(*learnt, held_out) < 0.5 * mean_loss(*untrained, held_out)
    texts, truth = zip(*map(entities.annotated, held_out["tokens"], held_out["tags"]), strict=True)
    f1 = {
        "untrained": entities.score(truth, entities.find(*untrained, texts, "fp32"))["f1"],
        "rules": entities.score(truth, [entities.by_rules(text) for text in texts])["f1"],
        "learnt": entities.score(truth, entities.find(*learnt, texts, "fp32"))["f1"],
    }
    assert f1["learnt"] > max(0.4, 2 * f1["untrained"], 2 * f1["rules"]), f1


def test_embeddings_stay_and_a_seed_repeats(with_companies):
    few = with_companies[0][:6]
    before = entities.learn(few, epochs=0, precision="fp32", progress=False)[0].state_dict()
    first, again, other = (
        entities.learn(few, epochs=1, seed=seed, precision="fp32", progress=False)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    moved = {name for name in first if not torch.equal(first[name], before[name])}
    assert "classifier.weight" in moved and any("attention" in name for name in moved)
    assert not [name for name in moved if "embeddings" in name]


def test_every_word_is_labelled_once_however_long_the_sentence(learnt):
    sentences = [["antidisestablishmentarianism", "!"] * 20, [], ["Bank"]]
    rows, source, opened = entities.encode(learnt[1], sentences, 16)
    assert max(map(len, rows)) <= 16 and len(rows) > 3
    for number, words in enumerate(sentences):
        begun = [w for row, opens in zip(source, opened, strict=True) if row == number for w in opens if w >= 0]
        assert begun == list(range(len(words)))


def test_finding_in_any_text(learnt):
    sentence = "Borrower shall repay Bank on the Maturity Date . "
    found = entities.find(*learnt, [sentence * 40, "", "no company", sentence.replace(" .", ".")], "fp32")
    assert [e.name for e in found[0]] == ["bank"] * 40 and found[1] == []
    assert found[0][-1].start == 39 * len(sentence) + sentence.index("Bank"), "the end of a long text was cut off"
    assert found[3] == [Entity("company", "bank", 21, 25)]
    together = entities.both(*learnt, ["Nokia Corp shall repay Bank ."], "fp32")[0]
    assert [e.name for e in together] == ["nokia", "bank"] and entities.find(*learnt, [], "fp32") == []


def test_unknown_tags_and_no_sentences(with_companies):
    wrong = pd.DataFrame({"tokens": [["a"]], "tags": [["B-MISC"]]})
    with pytest.raises(entities.EntityError, match="B-MISC"):
        entities.learn(wrong)
    with pytest.raises(entities.EntityError, match="no sentences"):
        entities.learn(with_companies[0][:0])


# What a text says about one entity


def test_sentences_of_cased_text():
    text = 'Nokia Corp. said so. Mr. A. Aho of the U.S. Treasury "agreed." It rose 1.5 pct. Was it Ford Motor Co.? Yes'
    assert [text[a:b] for a, b in entities.sentences(text)] == [
        "Nokia Corp. said so.",
        'Mr. A. Aho of the U.S. Treasury "agreed."',
        "It rose 1.5 pct.",
        "Was it Ford Motor Co.?",
        "Yes",
    ]
    text = "It bought Nokia Corp. The price rose.\n\na headline without a stop\n\nNokia Inc. Chairman"
    assert [text[a:b] for a, b in entities.sentences(text)] == [
        "It bought Nokia Corp.",
        "The price rose.",
        "a headline without a stop",
        "Nokia Inc. Chairman",
    ]


def test_about_gives_the_sentences_that_name_an_entity():
    text = "Nokia Corp rose. Nothing happened. Nokia sold Elcoteq Oyj. The dollar fell."
    assert entities.about(text, entities.by_rules(text)) == {
        ("company", "nokia"): ["Nokia Corp rose.", "Nokia sold Elcoteq Oyj."],
        ("company", "elcoteq"): ["Nokia sold Elcoteq Oyj."],
        ("currency", "dollar"): ["The dollar fell."],
    }
    assert entities.about(text, []) == {}


def test_about_takes_windows_of_lower_cased_text():
    filler = [f"w{i}" for i in range(100)]
    words = [*filler[:30], "acme", *filler[30:50], "acme", *filler[50:100], "acme"]
    text = " ".join(words)
    mentions = [
        Entity("company", "acme", m, m + 4) for m in np.cumsum([0, *map(len, words)])[[30, 51, 102]] + [30, 51, 102]
    ]
    assert all(text[m.start : m.end] == "acme" for m in mentions)
    assert entities.about(text, mentions[::-1]) == {("company", "acme"): [" ".join(words[10:72]), " ".join(words[82:])]}
    assert entities.about("acme", [Entity("company", "acme", 0, 4)]) == {("company", "acme"): ["acme"]}
