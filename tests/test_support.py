"""The customer-service desk: its data, personal data, slots, retrieval, grounded replies."""

import json
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from llmprod import data, segment
from llmprod.customer_service import desk, evaluation, peers, privacy, reply, retrieval, studies, understanding
from llmprod.customer_service.desk import Passage, SupportError
from llmprod.evaluate import metrics


@pytest.fixture(scope="module")
def shop() -> desk.Desk:
    return desk.load()


@pytest.fixture(scope="module")
def encoder():
    return retrieval.load_encoder("minilm")


# The data set


@pytest.mark.parametrize(("name", "share"), [("support-desk", 1), ("support-desk-zh", 1 / 3)])
def test_the_desk_holds_what_its_card_says(name, share):
    shop, folder = desk.load(name), desk.OWN[name]
    questions = shop.questions
    assert len(shop.intents) == 40 == len(shop.answers) and set(shop.answers) == set(shop.intents)
    assert min(Counter(some[0] for some in questions["intents"] if some).values()) >= 25 * share
    assert min((questions["about"] == about).sum() for about in ("trade", "other")) >= 100 * share
    assert len({passage.article for passage in shop.passages}) >= 60 * share
    searches = shop.searches
    assert (searches["passage"] != "").sum() >= 120 * share and (searches["passage"] == "").sum() >= 40 * share
    by_id = {passage.id: passage for passage in shop.passages}
    for row in searches[searches["passage"] != ""].itertuples():
        assert row.quote in by_id[row.passage].text
    assert min(len(desk.read_lines(folder / f"{name}.jsonl")) for name in ("dialogues", "attacks")) >= 40 * share
    for text, slots in zip(questions["text"], questions["slots"], strict=True):
        assert all(0 <= start < end <= len(text) and name in shop.slots for start, end, name in slots)
        assert "](" not in text
    assert not set(questions["text"][questions["split"] == "train"]) & set(
        questions["text"][questions["split"] != "train"]
    )


def test_no_near_copies_among_chinese_questions():
    """By pairs of characters: no question shares most of them with another one."""
    texts = desk.load("support-desk-zh").questions["text"]
    vectors = TfidfVectorizer(preprocessor=segment.lower_pairs, use_idf=False).fit_transform(texts)
    likeness = np.triu((vectors @ vectors.T).toarray(), 1)
    assert likeness.max() < 0.8


def test_articles_have_the_stated_lengths(shop):
    words = Counter()
    for passage in shop.passages:
        words[passage.article] += len(passage.text.split())
    assert all(80 <= count <= 250 for count in words.values())


def test_no_near_copies_between_splits(shop, encoder):
    """By the frozen encoder: no question is nearly one of another split."""
    every = pd.concat([shop.questions, shop.searches], ignore_index=True)
    vectors = retrieval.embed(encoder, every["text"].tolist())
    likeness = vectors @ vectors.T
    apart = every["split"].to_numpy()[:, None] != every["split"].to_numpy()[None]
    long = (every["text"].str.split().str.len() > 5).to_numpy()
    assert likeness[apart & long[:, None] & long[None]].max() < 0.92
    assert not set(every["text"][every["split"] == "train"]) & set(every["text"][every["split"] != "train"])


def test_a_sample_has_at_most_so_many_questions_of_each_split(shop):
    some = shop.sample(20, seed=1)
    assert set(some.questions["split"].value_counts()) == {20} == set(some.searches["split"].value_counts())
    assert set(some.questions["text"]) < set(shop.questions["text"]) and some.passages == shop.passages
    assert some.questions["text"].tolist() == shop.sample(20, seed=1).questions["text"].tolist()
    taught = set(some.part("train")["intents"].explode())
    assert len(taught) < len(shop.intents) and set(some.questions["intents"].explode().dropna()) <= taught


# One's own data


def test_own_table_of_questions_with_answers(tmp_path):
    rows = [f"question {k} about {name}" for name in ("fees", "cards") for k in range(12)]
    table = pd.DataFrame({"text": rows, "intent": ["fees"] * 12 + ["cards"] * 12})
    table["answer"] = ["Fees are low."] * 11 + ["Other."] + ["Cards come by post."] * 12
    table.loc[0, "intent"] = "fees|cards"
    table.to_csv(tmp_path / "own.csv", index=False)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "fees.md").write_text("# Fees\n\nThe fee is 2 euros.\n\nIt is taken monthly.")
    page = "<h1>Cards</h1><script>x = 1</script><p>A card costs <b>5</b> euros.</p>"
    (tmp_path / "pages" / "cards.html").write_text(page)
    own = desk.load(str(tmp_path / "own.csv"), str(tmp_path / "pages"))
    assert own.intents == ["cards", "fees"] and own.answers == {"fees": "Fees are low.", "cards": "Cards come by post."}
    assert set(own.questions["split"]) == set(data.SPLITS) and len(own.questions) == 24
    assert own.questions["intents"].iloc[0] == ["fees", "cards"]
    assert [passage.id for passage in own.passages if passage.article == "fees"] == ["fees#1", "fees#2"]
    assert not any("x = 1" in passage.text for passage in own.passages)


def test_intents_of_an_own_table_are_texts(tmp_path):
    """Numbers of intents keep their zeros; a list of intents and a foreign encoding are named."""
    rows = "".join(f"quéstion {k} about {name},{name},0{k % 2}\n" for name in ("01", "1") for k in range(12))
    (tmp_path / "own.csv").write_bytes(f"text,intent,answer\n{rows}".encode("latin-1"))
    own = desk.load(str(tmp_path / "own.csv"), encoding="latin-1")
    assert own.intents == ["01", "1"] and set(own.answers.values()) == {"00"}
    with pytest.raises(data.DataError, match=r"own.csv, line 2: byte 21 is not utf-8. .*where there is a parameter"):
        desk.load(str(tmp_path / "own.csv"))
    (tmp_path / "own.jsonl").write_text('{"text": "a", "intent": ["x", "y"]}\n')
    with pytest.raises(data.DataError, match=r"own.jsonl, column intent, row 1: .* is list"):
        desk.load(str(tmp_path / "own.jsonl"))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train"] * 4 + ["dev", "test"], r"own\.jsonl: column split, row 6: 'dev' is no split"),
        (["Train"] + ["train"] * 3 + ["validation", "test"], "row 2: 'Train' is no split"),
        (["train"] * 4 + [None, "test"], "row 6: '' is no split"),
        (["train"] * 4 + ["test"] * 2, "no question with an intent is validation"),
        (["train", "train", "train", "validation", "test", "test"], "no question with an intent is validation"),
        (["train", "train", "validation", "train", "test", "train"], "test split has labels .* lacks: loans"),
    ],
)
def test_a_wrong_split_of_an_own_table_is_named(tmp_path, splits, message):
    table = pd.DataFrame({"text": [*"abcdef"], "intent": ["fees", "cards", "fees", "", "loans", "fees"]})
    rows = pd.concat([pd.DataFrame({"text": [" "], "intent": [""]}), table.assign(split=splits)])
    rows.to_json(tmp_path / "own.jsonl", orient="records", lines=True)
    with pytest.raises(SupportError, match=message):
        desk.load(str(tmp_path / "own.jsonl"))


def test_the_splits_of_an_own_table_are_kept(tmp_path):
    """A question that no intent covers may be in any split; one with two intents counts for both."""
    splits = ["train", "train", "validation", "test", "test"]
    table = pd.DataFrame({"text": [*"abcde"], "intent": ["fees|cards", "fees", "cards", "fees", ""], "split": splits})
    table.to_csv(tmp_path / "own.csv", index=False)
    own = desk.load(str(tmp_path / "own.csv"))
    assert own.questions["split"].tolist() == splits and own.intents == ["cards", "fees"]


def test_intents_of_an_own_table_that_look_the_same(tmp_path):
    """The two forms of é are one intent; a character that can't be seen is an error."""
    names = ["caf\u00e9", "cafe\u0301|caf\u00e9", "fees"] * 10
    table = pd.DataFrame({"text": [f"question {k}" for k in range(30)], "intent": names, "answer": "Yes."})
    table.to_csv(tmp_path / "own.csv", index=False)
    own = desk.load(str(tmp_path / "own.csv"))
    assert (
        own.intents == ["caf\u00e9", "fees"] == sorted(own.answers) and own.questions["intents"].str.len().eq(1).all()
    )
    table.assign(intent=["fees", "fees\u200b", "cards"] * 10).to_csv(tmp_path / "own.csv", index=False)
    with pytest.raises(SupportError, match=r"own\.csv: .*'fees' and 'fees\\u200b' differ"):
        desk.load(str(tmp_path / "own.csv"))


def test_best_answers_are_passages_where_nothing_else_is_known(shop):
    assert desk.searchable(shop) is shop
    rows = [
        ("a", ["fees"], "train"),
        ("b", ["fees", "cards"], "test"),
        ("c", [], "test"),
        ("d", ["cards"], "validation"),
    ]
    questions = pd.DataFrame(rows, columns=["text", "intents", "split"])
    own = desk.searchable(desk.Desk(questions, {"fees": "Two euros.", "cards": "By post. In a week."}))
    assert own.searches[["text", "passage", "quote"]].values.tolist() == [
        ["a", "best-answer-fees#1", "Two euros."],
        ["d", "best-answer-cards#1", "By post. In a week."],
    ]
    assert {passage.id for passage in own.passages} == set(own.searches["passage"])
    with pytest.raises(SupportError, match="nothing to reply with"):
        desk.searchable(desk.Desk(questions))


def write_one_intent(folder):
    pd.DataFrame({"text": ["a", "b"], "intent": ["x", "x"], "split": "train"}).to_csv(folder / "t.csv", index=False)
    return {"dataset": str(folder / "t.csv")}


def write_too_few_to_split(folder):
    pd.DataFrame({"text": [*"abcd"], "intent": [*"xxyy"]}).to_csv(folder / "t.csv", index=False)
    return {"dataset": str(folder / "t.csv")}


def write_intents_of_their_own(folder):
    pd.DataFrame({"text": [*"abcd"], "intent": [*"wxyz"]}).to_csv(folder / "t.csv", index=False)
    return {"dataset": str(folder / "t.csv")}


def write_no_column(folder):
    pd.DataFrame({"text": ["a"], "label": ["x"]}).to_csv(folder / "t.csv", index=False)
    return {"dataset": str(folder / "t.csv")}


def write_large_article(folder):
    (folder / "a.md").write_text("word " * 2_200_000)
    return {"articles": str(folder)}


def write_latin_article(folder):
    (folder / "a.txt").write_bytes("Straße".encode("latin-1"))
    return {"articles": str(folder)}


def write_two_of_one_name(folder):
    (folder / "fees.md").write_text("Two euros.")
    (folder / "fees.txt").write_text("Three euros.")
    return {"articles": str(folder)}


def write_no_file(folder):
    (folder / "a.md").mkdir()
    (folder / "b.md").symlink_to("nowhere")
    return {"articles": str(folder)}


def write_empty_article(folder):
    (folder / "a.md").write_text("  \n")
    return {"articles": str(folder)}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_one_intent, "1 intent"),
        (write_too_few_to_split, "both sides: add texts, or a column split"),
        (write_intents_of_their_own, "Each of the 4 texts has a label of its own. Is the column of labels right"),
        (write_no_column, "no column intent"),
        (lambda folder: {"articles": str(folder)}, "no articles"),
        (write_large_article, "11.0 MB"),
        (write_latin_article, "not UTF-8"),
        (write_empty_article, "no text"),
        (write_two_of_one_name, r"fees\.txt: fees\.md is an article of the same name"),
        (write_no_file, "no articles"),
    ],
)
def test_bad_input_is_named(tmp_path, write, message):
    with pytest.raises(SupportError, match=message) as error:
        desk.load(**write(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert not re.search(r"label_column|use \w+_share", str(error.value)), "11_customer_service has no such parameter"


def test_articles_of_a_user_that_there_is_not():
    with pytest.raises(SupportError, match="~nobody-here/help: there are no articles"):
        desk.load(articles="~nobody-here/help")


def test_the_mark_of_utf_8_is_no_part_of_a_title(tmp_path):
    (tmp_path / "fees.md").write_bytes("\ufeff# Fees\n\nTwo euros.".encode())
    assert desk.read_articles(tmp_path) == [Passage("fees#1", "Fees", "Two euros.")]


# Dialogues and personal data


def test_pairs_join_messages_leave_bots_out_and_mask():
    dialogues = [
        {
            "turns": [
                {"speaker": "customer", "text": "hi"},
                {"speaker": "customer", "text": "my card 4111 1111 1111 1111 was charged"},
                {"speaker": "bot", "text": "Buy a tent!"},
                {"speaker": "agent", "text": "We look into it.", "about": ["charged_twice", None]},
                {"speaker": "customer", "text": "thanks"},
            ]
        }
    ]
    pairs, card = desk.pairs_of(dialogues * 3, privacy.mask)
    assert pairs[["question", "answer", "times"]].values.tolist() == [
        ["hi my card [card] was charged", "We look into it.", 3]
    ]
    assert pairs["based_on"].iloc[0] == ["charged_twice"]
    counts = dict(card.itertuples(index=False))
    assert counts["answered by a bot"] == 3 and counts["no answer after"] == 3 and counts["equal question"] == 2


TURN = {"speaker": "agent", "text": "Two euros."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "row 2: turns is 'nan' and no list"),
        ({"turns": None}, "row 2: turns is 'None' and no list"),
        ({"turns": "hello"}, "row 2: turns is 'hello' and no list"),
        ({"turns": [TURN, "hello"]}, "row 2, turn 2: 'hello' is no object"),
        ({"turns": [{"speaker": "agent"}]}, "row 2, turn 1: text is 'None'"),
        ({"turns": [{"text": "hello", "speaker": None}]}, "row 2, turn 1: speaker is 'None'"),
        ({"turns": [TURN | {"text": 7}]}, "row 2, turn 1: text is '7'"),
        ({"turns": [TURN | {"about": 7}]}, "row 2, turn 1: about is '7'"),
        ({"turns": [TURN | {"about": ["fees", ["cards"]]}]}, r"row 2, turn 1: about is .*cards"),
    ],
)
def test_a_wrong_dialogue_is_named(tmp_path, row, message):
    rows = [json.dumps({"turns": [TURN]}), json.dumps(row)]
    (tmp_path / "talks.jsonl").write_text("\n".join(rows))
    with pytest.raises(SupportError, match=r"talks\.jsonl, " + message):
        desk.load(dialogues=str(tmp_path / "talks.jsonl"))


def test_dialogues_have_turns_and_what_they_are_about_is_names(tmp_path):
    (tmp_path / "talks.csv").write_text("turns\nhello\n")
    with pytest.raises(SupportError, match=r"talks\.csv, row 1: turns is 'hello'.*\.jsonl"):
        desk.load(dialogues=str(tmp_path / "talks.csv"))
    (tmp_path / "talks.jsonl").write_text('{"talk": []}')
    with pytest.raises(SupportError, match="no column turns"):
        desk.load(dialogues=str(tmp_path / "talks.jsonl"))
    turns = [{"speaker": "customer", "text": "How much?"}, TURN | {"about": "fees"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"turns": turns}))
    pairs, _ = desk.pairs_of(desk.load(dialogues=str(tmp_path / "talks.jsonl")).dialogues, privacy.mask)
    assert pairs["based_on"].tolist() == [["fees"]]


@pytest.mark.parametrize("dialogues", [[], [{"turns": [{"speaker": "agent", "text": "Hello."}]}]])
def test_a_desk_without_pairs_trains_on_its_questions(shop, dialogues):
    pairs, _ = desk.pairs_of(dialogues, privacy.mask)
    training = understanding.with_pairs(shop, pairs)
    assert training["text"].tolist() == shop.questions["text"].tolist()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("card 4111-1111-1111-1111.", "card [card]."),
        ("card 4111 1111 1111 1112", "card 4111 1111 1111 1112"),  # the check digit is wrong
        ("IBAN DE89 3704 0044 0532 0130 00 ok", "IBAN [IBAN] ok"),
        ("write to a.b+c@mail.example.com!", "write to [e-mail]!"),
        ("call 020 7946 0958 or +49 30 901820", "call [telephone] or [telephone]"),
        ("order MF-204518 of 12/11/2026 cost 49.90", "order MF-204518 of 12/11/2026 cost 49.90"),
        (
            "手机13800138000，邮箱是li@example.cn，卡号4111111111111111扣了",
            "手机[telephone]，邮箱是[e-mail]，卡号[card]扣了",
        ),
        ("订单MF-204518花了129.90欧元", "订单MF-204518花了129.90欧元"),
    ],
)
def test_personal_data_is_masked(text, masked):
    assert privacy.mask(text) == masked


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_card_never_survives_its_mask(before, after):
    assert "4111111111111111" not in privacy.mask(f"{before} 4111111111111111 {after}")


def test_masking_a_long_text_is_quick():
    import time

    started = time.perf_counter()
    privacy.mask("1 a@b " * 40_000)
    assert time.perf_counter() - started < 5


# Slots and intents


def test_slots_of_the_desk(shop):
    text = "I paid €49.90 on 12 May with the card ending in 4412, order mf 204518"
    found = {name: text[start:end] for start, end, name in understanding.find_slots(text, shop.slots)}
    assert found == {"amount": "€49.90", "date": "12 May", "card_last4": "4412", "order_number": "mf 204518"}
    assert (evaluation.slot_scores(shop, "test").query("n > 10")["F1"] > 0.85).all()
    with pytest.raises(SupportError, match="slot x: the pattern"):
        understanding.find_slots("text", {"x": {"pattern": "("}})


def test_questions_with_two_intents_are_two_rows():
    rows = [("a", ["x", "y"], "train"), ("b", [], "train"), ("c", ["y"], "validation")]
    splits, labels = understanding.training_splits(pd.DataFrame(rows, columns=["text", "intents", "split"]))
    assert labels == ["out_of_scope", "x", "y"]
    assert list(zip(splits["train"]["text"], splits["train"]["label"], strict=True)) == [("a", 1), ("a", 2), ("b", 0)]
    assert splits["validation"]["label"][:] == [2]


def test_f1_of_several_intents():
    assert understanding.several_f1([["a", "b"], ["c"]], [["a"], ["c"]]) == pytest.approx(0.8)
    assert understanding.several_f1([["a"]], [["b"]]) == 0


PEER = {"model": "minilm", "max_length": 32, "precision": "auto", "c": 100.0, "pairs": 1, "seed": 0}


@pytest.mark.parametrize("way", peers.WAYS[:3])  # setfit trains for longer: below
def test_peers_tell_intents_and_know_what_they_learnt(shop, way):
    single = shop.questions[shop.questions["intents"].str.len() == 1]
    some = single[single["intents"].str[0].isin(shop.intents[:4])]
    model = peers.train(way, some, PEER)
    train, test = some[some["split"] == "train"], some[some["split"] == "test"]
    probabilities, likeness = model.read(test["text"].tolist())
    assert model.intents == shop.intents[:4] and probabilities.sum(axis=1) == pytest.approx(1)
    right = [
        model.intents[k] == asked[0] for k, asked in zip(probabilities.argmax(axis=1), test["intents"], strict=True)
    ]
    assert np.mean(right) > 0.6 and likeness.max() < 0.999
    assert model.read(train["text"].tolist()[:9])[1] == pytest.approx(1, abs=1e-5)


def test_a_peer_that_there_is_not(shop):
    with pytest.raises(SupportError, match="no peer 'crystal ball'; there are: nearest question, bag of words"):
        peers.train("crystal ball", shop.questions, PEER)


@pytest.mark.parametrize(("way", "count"), [*((way, 10) for way in peers.WAYS[:3]), ("setfit", 3)])
def test_several_intents_of_a_message(monkeypatch, shop, way, count):
    """Questions of the desk about four intents, alone and two in a message, in 20 folds; one text is in two folds."""
    single = shop.questions[shop.questions["intents"].str.len() == 1]
    some = single[single["intents"].str[0].isin(shop.intents[:4])].sample(frac=1, random_state=1, ignore_index=True)
    other = some.sample(frac=1, random_state=2, ignore_index=True)
    pairs = some.assign(
        text=some["text"] + " " + other["text"],
        intents=[sorted({*a, *b}) for a, b in zip(some["intents"], other["intents"], strict=True)],
    )
    every = pd.concat([some, pairs], ignore_index=True)[["text", "intents"]].sample(frac=1, random_state=3)
    folds = [every.iloc[k::20] for k in range(20)]
    monkeypatch.setattr(studies, "nlupp", lambda domain: [*folds[:19], pd.concat([folds[19], folds[0].head(1)])])
    found = studies.several_intents(PEER | {"domain": "shop", "folds": count, "way": way})["metrics"]
    assert found["n"] == sum(map(len, folds[count:]))
    assert found["n, training"] == int(0.8 * sum(map(len, folds[:count])))
    assert found["micro-F1"] > 0.6 and 0 < found["all intents right"] < found["micro-F1"]
    assert 0.05 <= found["least probability"] <= 0.95


# Thresholds and curves


def test_threshold_at_precision_is_the_exact_bound():
    """149 right answers without an error show 98 %, 148 do not."""
    sure = np.linspace(1, 0.5, 149)
    assert metrics.threshold_at_precision(sure, np.ones(149, bool), 0.98, steps=1) == pytest.approx(0.5)
    assert metrics.threshold_at_precision(sure[:148], np.ones(148, bool), 0.98, steps=1) == np.inf
    right = np.append(np.ones(600, bool), np.zeros(400, bool))
    found = metrics.threshold_at_precision(np.linspace(1, 0, 1000), right, 0.95)
    assert found == pytest.approx(np.linspace(1, 0, 1000)[599])


def test_threshold_at_precision_holds_its_level():
    """Where only 88 % are right, few draws claim 90 %; where 99 % are, most do."""
    random = np.random.default_rng(0)

    def claims(share: float) -> float:
        draws = [(random.random(300), random.random(300) < share) for _ in range(300)]
        return np.mean([metrics.threshold_at_precision(*draw, 0.9) < np.inf for draw in draws])

    assert claims(0.88) < 0.05 and claims(0.99) > 0.9


def test_wilson_interval():
    assert metrics.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998, formula 3
    assert metrics.wilson(0, 0) == (0.0, 1.0)


def test_precision_curve_weights_traffic():
    confidence, right = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    in_scope = np.array([True, False, True, False])
    curve = evaluation.precision_curve(confidence, right, in_scope, 0.5)
    assert curve["precision"].round(3).tolist() == [1, 0.5, 0.667, 0.5]
    assert curve["answered"].tolist() == [0.5, 0.5, 1, 1]
    assert evaluation.precision_curve(confidence, right, in_scope, 0.0)["precision"].tolist() == [1, 1, 1, 1]
    assert evaluation.answered_at(curve, 0.95) == 0.5 and evaluation.answered_at(curve, 1.1) == 0


# Retrieval


def test_bm25_vectors_and_fusion_find(encoder):
    texts = ["The tent pole costs 12 euros.", "Refunds take 5 working days.", "Boots: one centimetre longer."]
    index = retrieval.Index(texts, encoder)
    for weight in (0.0, 0.3, 1.0):
        index.weight = weight
        numbers, scores = index.search(["price of a tent pole", "when do I get my refund"], k=3)
        assert numbers[:, 0].tolist() == [0, 1] and numbers.shape == (2, 3)
        assert (np.diff(scores, axis=1) <= 1e-6).all()
    index.weight = 1.0
    of_context = {some: index.search(["only those?"], 1, [some])[0][0, 0] for some in ("how do boots fit", "tent pole")}
    assert of_context == {"how do boots fit": 2, "tent pole": 0} and index.search([""], 2)[0].shape == (1, 2)
    known = retrieval.embed(encoder, ["price of a tent pole"])
    assert index.search(["anything"], 1, queries=known)[0][0, 0] == 0


def test_bm25_finds_chinese_passages(encoder):
    texts = ["收到商品后七天内可以申请退货。", "帐篷杆的价格是十二欧元。", "我们周一到周五营业。"]
    index = retrieval.Index(texts, encoder, weight=0.0)
    numbers, scores = index.search(["怎么退货", "帐篷杆多少钱", "周五营业吗"], k=2)
    assert numbers[:, 0].tolist() == [0, 1, 2] and (scores[:, 0] > scores[:, 1]).all()


def test_ranking_metrics_equal_trec_eval():
    import pytrec_eval

    random = np.random.default_rng(0)
    numbers = np.array([random.permutation(40)[:10] for _ in range(50)])
    gold = [set(random.permutation(40)[: random.integers(1, 5)].tolist()) for _ in range(50)]
    ours = retrieval.ranking_metrics(numbers, gold)
    qrels = {str(q): {str(d): 1 for d in some} for q, some in enumerate(gold)}
    run = {str(q): {str(d): 10.0 - r for r, d in enumerate(row)} for q, row in enumerate(numbers)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recall.5", "ndcg_cut.10", "recip_rank"}).evaluate(run)
    for name, other in (("recall@5", "recall_5"), ("nDCG@10", "ndcg_cut_10"), ("MRR@10", "recip_rank")):
        assert ours[name] == pytest.approx([theirs[str(q)][other] for q in range(50)])


def test_hard_negatives_are_never_the_answer(encoder):
    index = retrieval.Index(["tent poles", "tent pegs", "boots", "stoves"], encoder)
    found = retrieval.mine(index, ["tent pole", "boot"], [0, 2], count=2)
    assert found.shape == (2, 2) and 0 not in found[0] and 2 not in found[1]


def test_a_cross_encoder_learns_to_tell_answers_apart(capfd):
    questions, texts = ["tent pole price", "refund when"] * 8, ["A pole costs 12 euros.", "Refunds take 5 days."] * 8
    wrong = texts[1:] + texts[:1]
    ranker = retrieval.train_cross_encoder(
        "minilm", questions * 2, texts + wrong, [1.0] * 16 + [0.0] * 16, epochs=6, learning_rate=5e-4, batch_size=8
    )
    scores = retrieval.rerank(ranker, "tent pole price", texts[:2])
    assert scores.shape == (2,) and scores[0] > scores[1]
    assert len(retrieval.rerank(ranker, "x", [])) == 0
    assert "minilm" not in "".join(capfd.readouterr())


# Grounded replies

PAGE = Passage(
    "returns#1", "Returns", "You can send it back within 30 days. The label costs EUR 3.90. Food is not taken back."
)


@pytest.mark.parametrize(
    ("sentence", "supported"),
    [
        ("You can send it back within 30 days.", True),
        ("You can send it back within 60 days.", False),
        ("The label costs EUR 3.90.", True),
        ("The label costs nothing.", False),
        ("Food is taken back.", False),
        ("Our tents are made of the finest cotton.", False),
    ],
)
def test_a_sentence_is_supported_literally(sentence, supported):
    assert (reply.support(sentence, [PAGE]) == "returns#1") == supported


def test_unsupported_sentences_are_dropped_and_refusals_are_no_answer():
    kept, dropped = reply.checked("You can send it back within 30 days. We also give you 500 euros.", [PAGE])
    assert [sentence.passage for sentence in kept] == ["returns#1"] and dropped == ["We also give you 500 euros."]
    assert reply.checked("I don't know.", [PAGE]) == ([], ["I don't know."])


def test_extracted_sentences_are_those_of_articles():
    def rank(question: str, texts: list[str]) -> np.ndarray:
        return np.array([len(reply.content(question) & reply.content(text)) for text in texts], float)

    found = reply.extract("what does the label cost", [PAGE], rank, most=1)
    assert found == [reply.Sentence("The label costs EUR 3.90.", "returns#1")]
    assert reply.extract("anything", [], rank) == []


@pytest.mark.parametrize(
    ("question", "differs"),
    [("So I have 90 days?", True), ("So I have 30 days?", False), ("I have 2 tents", False), ("in 6 weeks", False)],
)
def test_a_wrong_premise_is_noticed(question, differs):
    assert reply.contradicted(question, PAGE.text) == differs


@pytest.mark.parametrize(
    ("question", "reply_text", "differs"),
    [
        ("所以我有90天可以退，对吧", "退货期限为签收后30天。", True),
        ("30天内可以退吗", "退货期限为30天。", False),
        ("押金是80欧吗", "押金100欧元。", True),
        ("10% off?", "You save 20 %.", True),
    ],
)
def test_a_wrong_premise_is_noticed_in_other_units(question, reply_text, differs):
    assert reply.contradicted(question, reply_text) == differs


def test_chinese_sentences_are_checked_as_english_ones_are():
    page = Passage("退货#1", "退货", "退货期限为签收后30天。运费3.90欧元，从退款中扣除。")
    kept, dropped = reply.checked("退货期限是签收后30天。签收后60天内都可以退货。我不知道。", [page])
    assert [sentence.text for sentence in kept] == ["退货期限是签收后30天。"] and len(dropped) == 2
