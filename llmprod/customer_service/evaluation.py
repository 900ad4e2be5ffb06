"""How much an assistant answers correctly by itself, and at what precision."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from llmprod.customer_service import reply
from llmprod.customer_service.assistant import ANSWER, Assistant
from llmprod.customer_service.desk import Desk, Passage
from llmprod.customer_service.understanding import confidence, find_slots
from llmprod.evaluate import metrics

KINDS = ("intents", "articles", "in no article", "trade", "other")


def every_question(desk: Desk, split: str) -> pd.DataFrame:
    """All questions of a split, of every kind: text, kind, intents, passage and quote."""
    asked = desk.part(split)
    kind = asked["about"] if "about" in asked else ["intents" if some else "other" for some in asked["intents"]]
    searches = desk.searches[desk.searches["split"] == split]
    of_articles = np.where(searches["passage"] == "", "in no article", "articles")
    rows = [
        asked[["text", "intents"]].assign(kind=kind, passage="", quote=""),
        searches[["text", "passage", "quote"]].assign(kind=of_articles, intents=[[]] * len(searches)),
    ]
    return pd.concat(rows, ignore_index=True)


def judge(assistant: Assistant, questions: pd.DataFrame, progress: bool = True) -> pd.DataFrame:
    """The assistant's decision on each question, alone, and whether what it answered is right.

    The best answer to an intent is right if the question has that intent; an answer out of articles if the reply holds
    a sentence of the marked quote. Nothing else is: a question out of scope is rightly handed over. `helpful` are
    articles that were suggested, not given as an answer, and hold the quote.
    """
    rows = []
    for question in tqdm(questions.to_dict("records"), desc="answering", leave=False, disable=not progress):
        found = assistant.respond(question["text"])
        right, helpful = False, False
        said = [sentence.text for sentence in found.sentences if sentence.passage]
        if found.action == ANSWER:
            best = next(iter(found.intents))
            right = quoted(said, question["quote"]) if said else best in question["intents"]
        elif said:
            helpful = quoted(said, question["quote"])
        rows.append(
            {
                "action": found.action,
                "right": right,
                "suggested": bool(said),
                "helpful": helpful,
                "confidence": found.confidence,
                "reason": found.reason,
            }
        )
    return pd.concat([questions, pd.DataFrame(rows)], axis=1)


def decisions(judged: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, dict]]:
    """How many questions of each kind were answered, asked back or handed over, and the shares that matter."""
    answered, right = judged["action"] == ANSWER, judged["right"].astype(bool)
    table = pd.crosstab(judged["kind"], judged["action"]).reindex([k for k in KINDS if k in set(judged["kind"])])
    table["answered right"] = right.groupby(judged["kind"]).sum()
    table["article suggested"] = (judged["suggested"] & ~answered).groupby(judged["kind"]).sum()
    table["suggestion right"] = judged["helpful"].groupby(judged["kind"]).sum()
    shares = {"precision of what is answered": share(right.sum(), answered.sum())}
    for kind in ("intents", "articles"):
        of_kind = judged["kind"] == kind
        shares[f"answered right, {kind}"] = share((right & of_kind).sum(), of_kind.sum())
    helped = (right | judged["helpful"]) & of_kind
    shares["answered or suggested right, articles"] = share(helped.sum(), of_kind.sum())
    out = ~judged["kind"].isin(["intents", "articles"])
    shares["out of scope, not answered"] = share((out & ~answered).sum(), out.sum())
    return table, shares


def passage_features(assistant: Assistant, questions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """For each question the features of `Answerable` (questions, 2), and whether the reply holds its quote."""
    features, right = [], []
    for question in questions.itertuples():
        found, values = assistant.search(question.text)
        said = [sentence.text for sentence in reply.extract(question.text, found[:3], assistant.rank)]
        features.append(values)
        right.append(quoted(said, question.quote))
    return np.array(features), np.array(right)


def quoted(said: Sequence[str], quote: str) -> bool:
    """Whether one of the sentences is in the marked quote, or holds it."""
    return bool(quote) and any(sentence in quote or quote in sentence for sentence in said)


def precision_curve(sure: np.ndarray, right: np.ndarray, in_scope: np.ndarray, share: float) -> pd.DataFrame:
    """Selective answering in traffic of which `share` is out of scope: one row for each threshold.

    Questions out of scope are weighted so that they make up `share`; with 0 they are left out. Columns: `threshold`,
    `precision` of what is answered, `answered` share of in-scope questions, `correct` share of all questions that are
    answered correctly.
    """
    odds = share / (1 - share) * in_scope.sum() / max(1, (~in_scope).sum())
    weight = np.where(in_scope, 1.0, odds)
    order = np.argsort(-sure, kind="stable")
    value, weight, good, inside = sure[order], weight[order], (right & in_scope)[order], in_scope[order]
    ends = np.append(value[1:] < value[:-1], True) & (weight.cumsum() > 0)
    total = weight.cumsum()[ends]
    return pd.DataFrame(
        {
            "threshold": value[ends],
            "precision": (good * weight).cumsum()[ends] / total,
            "answered": inside.cumsum()[ends] / in_scope.sum(),
            "correct": (good * weight).cumsum()[ends] / weight.sum(),
        }
    )


def answered_at(curve: pd.DataFrame, precision: float) -> float:
    """The largest share of in-scope questions answered at a precision: an upper bound, its threshold is hindsight."""
    return float(curve.loc[curve["precision"] >= precision, "answered"].to_numpy().max(initial=0.0))


def share(successes: int, n: int) -> dict[str, object]:
    """A share with its number and its 95 % Wilson interval, for tables."""
    low, high = metrics.wilson(int(successes), int(n))
    return {"share": successes / n if n else np.nan, "n": int(n), "low": low, "high": high}


def scope_scores(probabilities: np.ndarray, likeness: np.ndarray) -> Mapping[str, np.ndarray]:
    """Three confidences that a question is in scope: of the classifier, of the nearest known question, of both."""
    both = confidence(probabilities, likeness)
    return {"probability": probabilities.max(axis=1), "likeness": likeness, "product": both}


def slot_scores(desk: Desk, split: str) -> pd.DataFrame:
    """Precision, recall and F1 of each slot on a split's questions; a span counts if it overlaps one of its name."""
    questions, rows = desk.part(split), []
    found = [find_slots(text, desk.slots) for text in questions["text"]]

    def hits(some: list, others: list, name: str) -> int:
        return sum(n == name and any(n2 == name and a < e and s < b for s, e, n2 in others) for a, b, n in some)

    for name in desk.slots:
        marked, given = (sum(n == name for some in spans for *_, n in some) for spans in (questions["slots"], found))
        recall = sum(hits(a, b, name) for a, b in zip(questions["slots"], found, strict=True)) / max(1, marked)
        precision = sum(hits(b, a, name) for a, b in zip(questions["slots"], found, strict=True)) / max(1, given)
        f1 = 2 * precision * recall / max(1e-9, precision + recall)
        rows.append({"slot": name, "n": marked, "precision": precision, "recall": recall, "F1": f1})
    return pd.DataFrame(rows)


def reply_scores(written: Sequence[str], given: Sequence[Sequence[Passage]], quotes: Sequence[str]) -> dict[str, float]:
    """Correctness and unsupported sentences of generated replies before and after the check, and refusals."""
    kept = [reply.checked(*one) for one in zip(written, given, strict=True)]
    after = [" ".join(sentence.text for sentence in some) for some, _ in kept]
    said, dropped = sum(len(some) + len(out) for some, out in kept), sum(len(out) for _, out in kept)
    return {
        "correct": float(np.mean([holds(text, quote) for text, quote in zip(written, quotes, strict=True)])),
        "correct after the check": float(
            np.mean([holds(text, quote) for text, quote in zip(after, quotes, strict=True)])
        ),
        "unsupported sentences": dropped / max(1, said),
        "nothing left after the check": float(np.mean([not text for text in after])),
        "n": len(written),
    }


def holds(text: str, quote: str) -> bool:
    """Whether a reply holds all numbers of a quote and at least half of its content words."""
    words = reply.content(quote)
    numbers = set(reply.NUMBER.findall(quote))
    return numbers <= set(reply.NUMBER.findall(text)) and len(words & reply.content(text)) >= len(words) / 2
