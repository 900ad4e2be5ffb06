"""The customer-service assistant: what it decides, a dialogue's state, the bundle, the command."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from llmprod import __main__ as main
from llmprod import segment
from llmprod.customer_service import assistant, desk, evaluation, phrases, reply, retrieval, understanding
from llmprod.customer_service.assistant import ANSWER, ASK, HAND_OVER, SILENT, Assistant, Dialogue
from llmprod.customer_service.desk import SupportError
from llmprod.finetune.recipe import Recipe
from llmprod.models import ModelError

INTENTS = ("order_status", "return_deadline", "gift_wrapping", "pickup_counter", "product_care", "speak_to_person")
OPEN = {"answer": 0.0, "passage": 2.0}


@pytest.fixture(scope="module")
def helper(tmp_path_factory) -> Assistant:
    """An assistant of six intents, trained for a few steps; its articles are searched with the frozen encoder."""
    shop = desk.load()
    few = shop.questions[[not some or (some[0] in INTENTS and len(some) == 1) for some in shop.questions["intents"]]]
    recipe = Recipe(max_length=48, epochs=3, learning_rate=3e-4, strategy="prototypes", batch_tokens=512)
    reader = understanding.train(few, recipe, tmp_path_factory.mktemp("trainer"), progress=False)
    passages = [passage for passage in shop.passages if passage.article.startswith(("gas", "rental", "pickup"))]
    index = retrieval.Index([passage.indexed for passage in passages], retrieval.load_encoder("minilm"))
    thresholds = assistant.Thresholds(answer=0.5, passage=0.5)
    return Assistant(
        reader, index, None, passages, shop.answers, shop.slots, assistant.Answerable([12.0, 0.0, -6.0]), thresholds
    )


def respond(helper: Assistant, text: str, answer: float = 0.5, passage: float = 0.5, **more: object) -> assistant.Reply:
    """A reply at other thresholds."""
    helper.thresholds = assistant.Thresholds(answer, passage, suggest=2.0)
    return helper.respond(text, **more)


# Deciding


def test_a_known_intent_gets_its_best_answer(helper):
    said = respond(helper, "Do you wrap presents as a gift?", **OPEN)
    assert said.action == ANSWER and said.text == helper.answers["gift_wrapping"]
    assert next(iter(said.intents)) == "gift_wrapping" and 0 < said.confidence <= 1


def test_a_missing_slot_is_asked_for_and_its_name_is_never_said(helper):
    said = respond(helper, "where is my order at the moment?", **OPEN)
    assert said.action == ASK and "order number" in said.text and "{" not in said.text
    given = respond(helper, "where is my order MF-204518 at the moment?", **OPEN)
    assert given.action == ANSWER and "MF-204518" in given.text and "{" not in given.text


def test_a_new_question_is_answered_out_of_articles(helper):
    said = respond(helper, "Can I rent a tent for a weekend?", answer=2.0, passage=0.0)
    assert said.action == ANSWER and said.sentences
    sentences = {passage.id: passage.sentences() for passage in helper.passages}
    for sentence in said.sentences:
        assert not sentence.passage or sentence.text in sentences[sentence.passage]
        assert not sentence.passage or f"[{sentence.passage}]" in said.text


def test_an_article_is_suggested_and_a_no_brings_a_person(helper):
    helper.thresholds = assistant.Thresholds(answer=2.0, passage=2.0, suggest=0.0)
    talk = Dialogue(helper)
    said = talk.turn(["Can I rent a tent for a weekend?"])
    assert said.action == ASK and said.text.endswith(helper.fixed.words["helps?"])
    assert any(sentence.passage.startswith("rental") for sentence in said.sentences)
    assert talk.turn(["no, not at all"]).action == HAND_OVER and talk.with_person


def test_unsure_is_handed_over_with_a_summary(helper):
    said = respond(helper, "qwxz brrr", answer=2.0, passage=2.0)
    assert said.action == HAND_OVER and said.reason == "unsure" and len(said.tried) == helper.found
    assert json.dumps(said.summary()) and "qwxz" not in json.dumps(said.summary())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I want to speak to a human being please", "speak_to_person"),
        ("you useless bot, you idiots", "abuse"),
        ("tent " * 2000, "longer than"),
    ],
)
def test_some_questions_go_to_a_person_at_once(helper, text, reason):
    said = respond(helper, text, **OPEN)
    assert said.action == HAND_OVER and reason in said.reason


@pytest.mark.parametrize(
    "text", ["", "   ", "你好，我的订单在哪里？", "🏕️🏕️", "où est ma commande", "\x00\x07", "a" * 4999]
)
def test_every_question_gets_a_reply(helper, text):
    said = Dialogue(helper).turn([text])
    assert said.action in (ANSWER, ASK, HAND_OVER) and said.text


def test_two_likely_intents_are_asked_about(helper):
    class Torn:
        intents = helper.understanding.intents

        def read(self, texts):
            row = np.full((1, len(self.intents)), 0.01)
            row[0, [self.intents.index("gift_wrapping"), self.intents.index("pickup_counter")]] = 0.45, 0.44
            return row, np.ones(1)

    torn = Assistant(**{**vars(helper), "understanding": Torn(), "thresholds": assistant.Thresholds(0.9, 2.0, 2.0)})
    said = torn.respond("could you wrap it and keep it at the counter")
    assert said.action == ASK and "gift wrapping" in said.text and "pickup counter" in said.text


def test_a_wrong_premise_is_not_confirmed(helper):
    said = respond(helper, "So I can return goods for 90 days, the deadline?", **OPEN)
    assert next(iter(said.intents)) == "return_deadline" and said.text.startswith(helper.fixed.words["differs"])


def test_attacks_change_nothing(helper):
    """Instructions in questions or articles: every sentence is still an article's or a fixed one."""
    attacks = desk.read_lines(desk.OWN["support-desk"] / "attacks.jsonl")
    planted = attacks.loc[attacks["where"] == "article", "text"].tolist()
    poisoned = [*helper.passages, *(desk.Passage(f"planted#{n}", "Rental", text) for n, text in enumerate(planted))]
    index = retrieval.Index([passage.indexed for passage in poisoned], helper.index.encoder)
    victim = Assistant(
        **{**vars(helper), "passages": poisoned, "index": index, "thresholds": assistant.Thresholds(2.0, 0.0)}
    )
    known = {sentence for passage in poisoned for sentence in passage.sentences()}
    for text in [*attacks.loc[attacks["where"] == "question", "text"], "Can I rent a tent?", "What does a pole cost?"]:
        said = victim.respond(text)
        assert all(sentence.text in known for sentence in said.sentences if sentence.passage)
        assert not said.sentences or all(sentence.passage in said.text for sentence in said.sentences)


def test_a_generated_reply_is_checked(helper):
    passage = helper.passages[0]
    lying = Assistant(**{**vars(helper), "thresholds": assistant.Thresholds(2.0, 0.0)})
    lying.write = lambda question, passages: f"{passages[0].sentences()[0]} You also get 999 euros."
    said = lying.respond(passage.title)
    assert said.action == ANSWER and "999" not in said.text and "1 sentence(s) dropped" in said.reason
    lying.write = lambda question, passages: "I don't know."
    assert lying.respond(passage.title).action == HAND_OVER


# A dialogue


def test_short_messages_are_one_question_and_a_slot_is_kept(helper):
    helper.thresholds = assistant.Thresholds(**OPEN)
    talk = Dialogue(helper)
    assert talk.turn(["hi", "where is", "my order"]).action == ASK
    said = talk.turn(["MF-204518"])
    assert said.action == ANSWER and "MF-204518" in said.text and talk.slots == {"order_number": "MF-204518"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "greeting"), ("Hi!", "greeting"), ("hello there, good morning", "greeting"), ("ok, thanks a lot!", "thanks")],
)
def test_small_talk_is_no_question(helper, text, words):
    said = Dialogue(helper).turn([text])
    assert said.action == ASK and said.text == helper.fixed.words[words] and not said.intents


def test_small_talk_is_matched_quickly():
    for pattern in [*phrases.of("en").small_talk.values(), *phrases.of("zh").small_talk.values()]:
        assert not pattern.fullmatch("hi ok thanks 你好谢谢" * 300 + "x")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("您好，在吗？", "greeting"),
        ("好的，谢谢！", "thanks"),
        ("不是，我要的是蓝色", "denial"),
        ("没用", "denial"),
        ("没有收到货", ""),
        ("不能退货吗", ""),
        ("你们这帮骗子", "abuse"),
        ("我妈的号登不上了", ""),
        ("usb充电的头灯有吗", ""),
    ],
)
def test_chinese_phrases_are_told_from_questions(text, found):
    zh = phrases.of("zh")
    kinds = {name: pattern.fullmatch(text) for name, pattern in zh.small_talk.items()}
    kinds |= {"denial": zh.denial.fullmatch(text), "abuse": zh.abuse.search(text)}
    assert [name for name, is_so in kinds.items() if is_so] == [found] * bool(found)


def test_the_languages_have_the_same_phrases():
    english, chinese = phrases.of("en"), phrases.of("zh")
    for name in ("words", "prompt", "small_talk"):
        assert getattr(english, name).keys() == getattr(chinese, name).keys()
    assert {english.person, english.complaint} <= set(desk.load("support-desk").intents)
    assert {chinese.person, chinese.complaint} <= set(desk.load("support-desk-zh").intents)
    questions = {name: desk.load(name).questions["text"] for name in desk.OWN}
    assert [segment.language_of(texts) for texts in questions.values()] == ["en", "zh"]
    assert segment.language_of([]) == segment.language_of(["42", "!"]) == "en"


def test_an_assistant_speaks_its_language(helper):
    """The same assistant with Chinese phrases: fixed words, a hand-over for abuse, a question for a missing slot."""
    chinese = replace(helper, language="zh", thresholds=assistant.Thresholds(**OPEN))
    assert Dialogue(chinese).turn(["在吗"]).text == "请问有什么可以帮您？"
    said = chinese.respond("白痴客服")
    assert said.action == HAND_OVER and said.text == phrases.of("zh").words["abuse"]


def test_silence_after_a_hand_over_and_a_fresh_start(helper):
    helper.thresholds = assistant.Thresholds(**OPEN)
    talk = Dialogue(helper)
    talk.turn(["where is my order MF-204518"])
    assert talk.turn(["let me talk to a real person"]).action == HAND_OVER
    assert talk.turn(["hello?"]).action == SILENT and talk.turn(["hello?"]).text == ""
    talk.reopen()
    assert not talk.slots and not talk.earlier
    assert talk.turn(["do you wrap gifts"]).action == ANSWER


def test_what_is_logged_has_no_personal_data(helper):
    text = "my card 4111 1111 1111 1111, write to me@example.com about order MF-204518"
    row = json.dumps(assistant.logged(text, respond(helper, text, **OPEN)))
    assert "4111 1111" not in row and "me@example.com" not in row and "MF-204518" in row


# Judging


def test_judged_by_intent_and_by_quote(helper):
    helper.thresholds = assistant.Thresholds(answer=0.0, passage=2.0)
    quote = helper.passages[0].sentences()[0]
    rows = [("do you wrap gifts", ["gift_wrapping"], "intents", ""), ("do you wrap gifts", [], "trade", "")]
    rows += [("do you wrap gifts", ["product_care"], "intents", "")]
    questions = pd.DataFrame(rows, columns=["text", "intents", "kind", "quote"])
    judged = evaluation.judge(helper, questions, progress=False)
    assert judged["right"].tolist() == [True, False, False] and set(judged["action"]) == {ANSWER}
    table, shares = evaluation.decisions(judged)
    assert shares["precision of what is answered"]["share"] == pytest.approx(1 / 3)
    assert shares["answered right, intents"]["n"] == 2 and shares["out of scope, not answered"]["share"] == 0
    assert table.loc["intents", "answered right"] == 1
    assert evaluation.quoted([quote], quote) and not evaluation.quoted(["Something else."], quote)
    assert not evaluation.quoted([quote], "")


# The bundle and the command


@pytest.fixture(scope="module")
def bundle(helper, tmp_path_factory):
    """The assistant as a folder."""
    helper.thresholds = assistant.Thresholds(answer=0.2, passage=float("inf"))
    folder = tmp_path_factory.mktemp("saved") / "assistant"
    helper.save(folder, "An assistant of six intents.")
    return folder


def test_a_saved_assistant_says_the_same(helper, bundle):
    assert not list(bundle.rglob("*.bin")) and not list(bundle.rglob("*.pkl"))
    again = Assistant.load(bundle)
    helper.thresholds = assistant.Thresholds(answer=0.2, passage=2.0)
    for text in ("do you wrap gifts", "where is my order", "can I rent a tent", "hm"):
        one, other = helper.respond(text), again.respond(text)
        assert (one.action, one.text) == (other.action, other.text)
        assert one.confidence == pytest.approx(other.confidence, abs=2e-3)
    with pytest.raises(SupportError, match="no assistant is saved here"):
        Assistant.load(bundle / "intents")


@pytest.mark.parametrize(
    "changes",
    [
        {"passages": None},
        {"passages": []},
        {"passages": [{"name": "a"}]},
        {"passages": [{"id": 1, "title": "a", "text": "b"}]},
        {"answers": ["a"]},
        {"answers": {"a": 7}},
        {"slots": 7},
        {"slots": {"date": {}}},
        {"thresholds": {"answer": 0.5}},
        {"thresholds": {"answer": 0.5, "passage": 0.5, "more": 1}},
        {"thresholds": {"answer": None, "passage": 0.5}},
        {"answerable": [1, 2]},
        {"answerable": "123"},
        {"weight": "1"},
        {"found": 2.5},
        {"found": -1},
        {"language": "fr"},
        "nothing",
        [],
    ],
    ids=str,
)
def test_wrong_settings_without_manifest_are_one_error(bundle, tmp_path, changes):
    settings = json.loads((bundle / "assistant.json").read_text())
    changed = settings | changes if isinstance(changes, dict) else changes
    (tmp_path / "assistant.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=r"assistant\.json can't be read"):
        Assistant.load(tmp_path)


@pytest.mark.parametrize("name", ["passages", "answers", "slots", "answerable", "thresholds", "weight", "found"])
def test_missing_settings_are_one_error(bundle, tmp_path, name):
    settings = json.loads((bundle / "assistant.json").read_text())
    del settings[name]
    (tmp_path / "assistant.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=rf"assistant\.json can't be read \(KeyError: '{name}'\)"):
        Assistant.load(tmp_path)


def test_the_command_answers_and_holds_a_dialogue(bundle, monkeypatch, capsys):
    assert main.main(["answer", "do you wrap gifts?", "--bundle", str(bundle)]) == 0
    assert capsys.readouterr().out.startswith("[answer] ")
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("where is my order\nMF-204518\na human please\nhello\n\ndo you wrap gifts\n")
    )
    assert main.main(["answer", "--dialogue", "--bundle", str(bundle)]) == 0
    found = capsys.readouterr()
    assert [line.partition("]")[0] + "]" for line in found.out.splitlines()] == [
        "[ask back]",
        "[answer]",
        "[hand over]",
        "[silent]",
        "[answer]",
    ]
    assert "for the agent" in found.err
    assert main.main(["answer", "--bundle", str(bundle)]) == 2
    assert main.main(["answer", "x", "--bundle", str(bundle / "none")]) == 2


# The generator


def test_the_generator_is_deterministic_and_learns():
    shop = desk.load()
    writer = reply.Generator.load("smollm2-135m-instruct")
    rows = shop.searches[shop.searches["passage"] != ""].head(1)
    by_id = {passage.id: passage for passage in shop.passages}
    given = [[by_id[name]] for name in rows["passage"]]
    one = writer.write(rows["text"].tolist(), given, tokens=6)
    assert one == writer.write(rows["text"].tolist(), given, tokens=6) and all(one)
    losses = reply.tune(
        writer, rows["text"].tolist(), given, rows["quote"].tolist(), steps=3, batch_size=1, progress=False
    )
    assert losses[-1] < losses[0]
