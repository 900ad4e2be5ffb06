"""The review queue: which answers people look at, what two of them say, how much they agree, who decides."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from llmprod.evaluate import metrics
from llmprod.feedback import sequential
from llmprod.feedback.store import FeedbackError, Store

DISAGREEMENT, UNSURE, DOWN, AUDIT = "disagreement", "low confidence", "thumbs down", "random audit"


def fill(store: Store, quotas: Mapping[str, int], seed: int = 0, source: str = "classify") -> pd.DataFrame:
    """Puts answers into the review queue that are not yet there: at most `quotas[reason]` for each reason.

    The random audit is drawn first and from all answers, whatever was said of them: only so is the share of errors
    in it that of the service. The other reasons look for errors, so that the model looks worse there than it is.

    * random audit: every answer is as likely as any other
    * thumbs down: a user says that the answer is wrong, or corrects it
    * disagreement: the shadow bundle gave another label, or two users contradict each other
    * low confidence: the least confident ones

    Returns the answers that were added, with their `reason`.
    """
    answers = store.table("answers", source).set_index("request").sort_index()
    said, random = store.table("feedback", source), np.random.default_rng(seed)
    waiting = set(answers.index) - set(store.table("queue")["request"])
    wrong = said.loc[said["verdict"] != "up", "request"]
    different = said.drop_duplicates(["request", "verdict", "label"])["request"]
    other = answers.index[(answers["shadow"] != "") & (answers["shadow"] != answers["label"])]
    candidates = {
        AUDIT: random.permutation(answers.index),
        DOWN: random.permutation(wrong.unique()),
        DISAGREEMENT: random.permutation(np.union1d(other, different[different.duplicated()])),
        UNSURE: answers["confidence"].sort_values(kind="stable").index,
    }
    if unknown := set(quotas) - set(candidates):
        raise FeedbackError(f"There is no reason {', '.join(sorted(unknown))}; there are: {', '.join(candidates)}.")
    chosen: dict[str, str] = {}
    for reason, requests in candidates.items():
        free = [request for request in requests if request in waiting and request not in chosen]
        chosen |= dict.fromkeys(free[: quotas.get(reason, 0)], reason)
    store.queue(chosen)
    return answers.loc[list(chosen)].assign(reason=list(chosen.values()))


def waiting_for(store: Store, reviewer: str, source: str = "classify") -> pd.DataFrame:
    """What a reviewer has to look at, of a source: requests and texts with fewer than two reviews, or two that differ.

    A reviewer sees an answer once, and neither its label nor what others said of it.
    """
    reviews, queue = store.table("reviews", source), store.table("queue", source)
    grouped = reviews.groupby("request")["label"].agg(["count", "nunique"]).reindex(queue["request"]).fillna(0)
    needed = (grouped["count"] < 2) | ((grouped["count"] == 2) & (grouped["nunique"] == 2))
    mine = set(reviews.loc[reviews["reviewer"] == reviewer, "request"])
    left = [request for request in grouped.index[needed] if request not in mine]
    return store.table("answers", source).set_index("request").loc[left, ["text"]].reset_index()


def settled(store: Store, source: str = "classify") -> pd.DataFrame:
    """The reviewed answers of a source: two reviewers gave the same label, or a third decided where they differed.

    Only those of "classify" have labels to learn from: of a reply or an alert, people say something else.
    Returns `request`, `text`, `label` (the reviewers'), `served` (the model's), `shadow` (the shadow bundle's, or ""),
    `reason`, `time` (of the answer), and `how`: "unanimous" or "adjudicated".
    """
    reviews, queue = store.table("reviews", source), store.table("queue", source).set_index("request")["reason"]
    answers, rows = store.table("answers", source).set_index("request"), []
    for request, labels in reviews.groupby("request", sort=True)["label"].agg(list).items():
        unanimous = len(labels) >= 2 and len(set(labels[:2])) == 1
        if request in queue.index and (unanimous or len(labels) >= 3):
            how, label = ("unanimous", labels[0]) if unanimous else ("adjudicated", labels[2])
            of = answers.loc[request]
            rows.append((request, of["text"], label, of["label"], of["shadow"], queue[request], of["time"], how))
    return pd.DataFrame(rows, columns=["request", "text", "label", "served", "shadow", "reason", "time", "how"])


def shadow_test(store: Store, alpha: float = 0.05) -> pd.DataFrame:
    """The A/B test from the service's log: the shadow bundle's answers against the served ones, on audited texts.

    One row for each audited and settled answer that the shadow gave, too, the oldest first, with the confidence
    sequence of the difference in accuracy so far (see `sequential.confidence_sequence`). Raises FeedbackError where
    there is none.
    """
    found = settled(store).query(f"reason == '{AUDIT}' and shadow != ''").sort_values("time", kind="stable")
    if found.empty:
        raise FeedbackError("No answer that the shadow bundle gave, too, is audited and settled yet.")
    differences = sequential.paired(*(found[name].to_numpy() for name in ("label", "shadow", "served")))
    return pd.concat([found.reset_index(drop=True), sequential.confidence_sequence(differences, alpha)], axis=1)


def agreement(
    store: Store, one: str, other: str, resamples: int = 1000, seed: int = 0, source: str = "classify"
) -> dict[str, float]:
    """Cohen's kappa of two reviewers on what both have seen of a source, with its 95 % bootstrap interval.

    κ = (p - e) / (1 - e): p is the share of equal labels, e the share that chance alone would give (Cohen 1960).
    Raises FeedbackError where they share no answer.
    """
    table = store.table("reviews", source).pivot(index="request", columns="reviewer", values="label")
    both = table.reindex(columns=[one, other]).dropna()
    if both.empty:
        raise FeedbackError(f"{one} and {other} have reviewed no answer in common.")
    codes = pd.factorize(both.to_numpy().ravel())[0].reshape(-1, 2)

    def kappa(first: np.ndarray, second: np.ndarray) -> float:
        alike = np.array_equal(first, second)  # where both gave one label throughout, kappa has no value
        return 1.0 if alike else float(cohen_kappa_score(first, second))

    low, high = metrics.bootstrap_interval(kappa, *codes.T, resamples, seed)
    equal = float((codes[:, 0] == codes[:, 1]).mean())
    return {
        "kappa": kappa(*codes.T),
        "95 % from": low,
        "to": high,
        "equal labels": equal,
        "reviewed by both": len(codes),
    }


def judged(store: Store) -> pd.DataFrame:
    """How often users say that an answer was right: alerts that were real, replies that should be so, labels.

    A row for each source, with the label "", and one for each of its labels: how many `answers` there are, how many
    were `judged`, the share of these that was `right`, with its 95 % Wilson interval. An answer counts once, as right
    where more users say "up" than "down" or a correction; of each user the store keeps the last word. Users choose what
    they judge: the interval knows of chance, not of that choice.
    """
    answers, said = store.table("answers"), store.table("feedback")
    answers["right"] = answers["request"].map((said["verdict"] == "up").groupby(said["request"]).mean() > 0.5)
    rows = []
    for (source, label), of in pd.concat([answers.assign(label=""), answers]).groupby(["source", "label"])["right"]:
        n, right = int(of.count()), int(of.sum())
        rows.append((source, label, len(of), n, right / n if n else np.nan, *metrics.wilson(right, n)))
    return pd.DataFrame(rows, columns=["source", "label", "answers", "judged", "right", "95 % from", "to"])


def widget(store: Store, reviewer: str, labels: Sequence[str], source: str = "classify") -> object:
    """The queue of a reviewer for a source as a notebook widget: one text at a time, a list of labels, a button."""
    import ipywidgets as w

    left = iter(waiting_for(store, reviewer, source).to_dict("records"))
    shown: dict = {}
    text = w.Textarea(disabled=True, layout=w.Layout(width="95%", height="110px"))
    choice = w.Dropdown(options=["", *labels], description="label:")
    button = w.Button(description="save, next", button_style="primary")

    def advance(_: object = None) -> None:
        if shown and choice.value:
            store.add_review(shown["request"], reviewer, choice.value)
        elif shown:
            return  # nothing chosen yet
        shown.clear()
        shown.update(next(left, {}))
        text.value = shown.get("text", "Nothing is left to review.")
        choice.value, button.disabled = "", not shown

    button.on_click(advance)
    advance()
    return w.VBox([text, w.HBox([choice, button])])
