"""The experiments of the customer-service studies: real customers' questions, past dialogues, passages of documents."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from llmprod import artifacts, data, files
from llmprod.customer_service import desk, evaluation, peers, reply, retrieval, understanding
from llmprod.evaluate import metrics
from llmprod.finetune.recipe import Recipe

ASSISTANT = "assistant"  # a way to read questions, as those of `peers`


def reader(questions: pd.DataFrame, parameters: Mapping[str, object]) -> understanding.Understanding | peers.Peer:
    """What reads questions, trained on them: the assistant's own model, or a peer."""
    if parameters["way"] != ASSISTANT:
        return peers.train(parameters["way"], questions, parameters)
    with tempfile.TemporaryDirectory() as folder:
        return understanding.train(questions, Recipe.of(parameters), Path(folder), progress=False)


def intents(parameters: Mapping[str, object]) -> dict:
    """Trains a reader of questions; scores accuracy, and what is answered at the precision asked for.

    The intents of `held_out` are taken out of training, and their test questions are out of scope; the shares of a mix
    are the most that any threshold reaches (`evaluation.answered_at`), those at a threshold from validation say so.
    """
    questions = desk.load(parameters["dataset"], seed=parameters["seed"]).questions
    first = questions["intents"].str[0]
    known = ~first.isin(parameters["held_out"])
    started = time.perf_counter()
    model = reader(questions[known], parameters)
    seconds = time.perf_counter() - started
    shown = questions[questions["split"] == parameters["split"]]
    inside = known[shown.index].to_numpy()
    probabilities, likeness = model.read(shown["text"].tolist())
    right = np.array([model.intents[k] for k in probabilities.argmax(axis=1)]) == first[shown.index].to_numpy()
    scores = {"accuracy": float(right[inside].mean()), "n": int(inside.sum())}
    valid = questions[known & (questions["split"] == "validation")]
    of_valid = model.read(valid["text"].tolist())
    right_valid = np.array([model.intents[k] for k in of_valid[0].argmax(axis=1)]) == valid["intents"].str[0].to_numpy()
    sure, sure_valid = understanding.confidence(probabilities, likeness), understanding.confidence(*of_valid)
    for precision in (0.95, 0.98):
        threshold = metrics.threshold_at_precision(sure_valid, right_valid, precision)
        answered = inside & (sure >= threshold)
        scores[f"answered at {precision:.0%}"] = float(answered.sum() / inside.sum())
        if answered.any():
            scores[f"precision achieved at {precision:.0%}"] = float(right[answered].mean())
    foreign = data.load_artifact("reuters-r8").query("split == 'test'")["text"].head(1000).tolist()
    of_foreign = evaluation.scope_scores(*model.read(foreign))
    for name, score in evaluation.scope_scores(probabilities, likeness).items():
        truth = np.repeat([1, 0], [inside.sum(), len(foreign)])
        scores[f"AUROC, foreign, {name}"] = float(
            roc_auc_score(truth, np.concatenate([score[inside], of_foreign[name]]))
        )
        if parameters["held_out"]:
            scores[f"AUROC, held out, {name}"] = float(roc_auc_score(inside, score))
            curve = evaluation.precision_curve(score, right, inside, 0.35)
            scores[f"answered of a mix at 95%, {name}"] = evaluation.answered_at(curve, 0.95)
    return {"metrics": scores, "speeds": {"training, s": seconds}}


# Several intents in one message


def nlupp(domain: str) -> list[pd.DataFrame]:
    """The 20 folds of a domain of NLU++, with the columns text and intents."""
    folder = artifacts.fetch("nlupp") / domain
    folds = [pd.DataFrame(files.read_json(folder / f"fold{number}.json")) for number in range(20)]
    return [
        fold.assign(intents=[some if isinstance(some, list) else [] for some in fold["intents"]])[["text", "intents"]]
        for fold in folds
    ]


def several_intents(parameters: Mapping[str, object]) -> dict:
    """Several intents in one message: trained on one of 20 folds, tested on the others (Casanueva et al. 2022).

    The fold's number is the seed; `folds` joins so many, the authors' 10 folds with 2. A fifth of it validates and
    chooses the least probability of an intent, by micro-F1. Test texts that are also in the fold are left out.
    """
    folds, count = nlupp(parameters["domain"]), parameters["folds"]
    first = parameters["seed"] * count % len(folds)
    fold = pd.concat(folds[first : first + count]).sample(frac=1, random_state=0, ignore_index=True)
    fold["split"] = np.where(fold.index % 5 == 0, "validation", "train")
    test = pd.concat(folds[:first] + folds[first + count :], ignore_index=True)
    test = test[~test["text"].isin(fold["text"])]
    started = time.perf_counter()
    model = reader(fold, parameters)
    seconds = time.perf_counter() - started

    def chosen(probabilities: np.ndarray, least: float) -> list[list[str]]:
        return [[model.intents[k] for k in np.flatnonzero(row >= least)] for row in probabilities]

    valid = fold[fold["split"] == "validation"]
    of_valid, _ = model.read(valid["text"].tolist())
    grid = np.arange(0.05, 1, 0.05)
    least = max(grid, key=lambda value: understanding.several_f1(valid["intents"], chosen(of_valid, value)))
    started = time.perf_counter()
    found = chosen(model.read(test["text"].tolist())[0], least)
    rate = len(test) / (time.perf_counter() - started)
    exact = np.mean([set(a) == set(b) for a, b in zip(test["intents"], found, strict=True)])
    scores = {"micro-F1": understanding.several_f1(test["intents"], found), "all intents right": float(exact)}
    scores |= {"least probability": float(least), "n": len(test), "n, training": int((fold["split"] == "train").sum())}
    return {"metrics": scores, "speeds": {"training, s": seconds, "texts/s": rate}}


# Past dialogues: which snippets did the agent use?


def track5() -> pd.DataFrame:
    """The knowledge-seeking turns of DSTC11 track 5: text, context, dialogue (its first turn), gold, snippets.

    `snippets` are the ids and texts of the FAQ and the review sentences of the turn's entities, which are given.
    """
    folder = artifacts.fetch("dstc11-track5")
    logs, labels = (files.read_json(folder / "val" / f"{name}.json") for name in ("logs", "labels"))
    knowledge, rows = files.read_json(folder / "knowledge.json"), []
    for turns, label in zip(logs, labels, strict=True):
        if not label["target"]:
            continue
        entities = {(one["domain"], one["entity_id"]) for one in label["knowledge"]}
        snippets = {}
        for domain, entity in sorted(entities):
            item = knowledge[domain][str(entity)]
            for number, faq in item.get("faqs", {}).items():
                snippets[domain, entity, "faq", int(number), None] = (
                    f"{item['name']}: {faq['question']} {faq['answer']}"
                )
            for number, review in item.get("reviews", {}).items():
                for sentence, text in review["sentences"].items():
                    snippets[domain, entity, "review", int(number), int(sentence)] = f"{item['name']}: {text}"
        gold = {
            (one["domain"], one["entity_id"], one["doc_type"], one["doc_id"], one.get("sent_id"))
            for one in label["knowledge"]
        }
        rows.append(
            {
                "text": turns[-1]["text"],
                "context": " ".join(turn["text"] for turn in turns[-3:-1]),
                "dialogue": turns[0]["text"],
                "snippets": snippets,
                "gold": gold,
            }
        )
    return pd.DataFrame(rows)


def best_snippets(parameters: Mapping[str, object]) -> dict:
    """Which snippets an agent used: a cross-encoder, trained on four folds of dialogues and tested on the fifth.

    The fold's number is the seed; dialogues with the same first turn are in one fold. A tenth of the training
    dialogues chooses the threshold of F1 over snippets.
    """
    turns = track5()
    if parameters["turns"]:
        turns = turns.head(parameters["turns"])
    folds = list(GroupKFold(5).split(turns, groups=turns["dialogue"]))
    rest, test = folds[parameters["seed"] % 5]
    groups = turns["dialogue"].iloc[rest]
    chosen = groups.isin(np.random.default_rng(0).permutation(sorted(set(groups)))[: groups.nunique() // 10]).to_numpy()
    train, valid, test = turns.iloc[rest[~chosen]], turns.iloc[rest[chosen]], turns.iloc[test]
    random, rows = np.random.default_rng(parameters["seed"]), []
    for turn in train.itertuples():
        others = [key for key in turn.snippets if key not in turn.gold]
        picked = random.permutation(len(others))[: parameters["negatives"]]
        rows += [(asked(turn), turn.snippets[key], 1.0) for key in sorted(turn.gold, key=str) if key in turn.snippets]
        rows += [(asked(turn), turn.snippets[others[n]], 0.0) for n in picked]
    settings = {name: parameters[name] for name in ("epochs", "learning_rate", "max_length", "batch_size", "seed")}
    started = time.perf_counter()
    ranker = retrieval.train_cross_encoder(parameters["model"], *zip(*rows, strict=True), **settings)
    seconds = time.perf_counter() - started

    def scored(part: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray, int]]:
        return [
            (
                retrieval.rerank(ranker, asked(turn), list(turn.snippets.values())),
                np.array([key in turn.gold for key in turn.snippets]),
                len(turn.gold),
            )
            for turn in part.itertuples()
        ]

    def f1(found: list, threshold: float) -> float:
        hit = sum(((score >= threshold) & good).sum() for score, good, _ in found)
        chosen = sum((score >= threshold).sum() for score, _, _ in found)
        return 2 * hit / max(1, chosen + sum(count for *_, count in found))

    of_valid = scored(valid)
    threshold = max(np.linspace(-3, 3, 61), key=lambda t: f1(of_valid, t))
    started = time.perf_counter()
    found = scored(test)
    rate = sum(len(score) for score, *_ in found) / (time.perf_counter() - started)
    ranked = [good[np.argsort(-score, kind="stable")] for score, good, _ in found]
    scores = {"selection F1": f1(found, threshold)} | {
        f"hit@{k}": float(np.mean([g[:k].any() for g in ranked])) for k in (1, 5)
    }
    return {"metrics": scores | {"n": len(test)}, "speeds": {"training, s": seconds, "pairs/s": rate}}


def asked(turn: object) -> str:
    """A turn after what was said before it, the newest text first."""
    return f"{turn.text} {turn.context}"


# Passages of documents, several turns, and questions that none of them answers


def mtrag() -> tuple[dict[str, list], dict[str, pd.DataFrame]]:
    """The pooled passages of each collection of MTRAG-UN, and its tasks: last turn, earlier ones, gold, kind."""
    path = artifacts.fetch("mtrag-un") / "generation_tasks" / "reference.jsonl"
    tasks = desk.read_lines(path)
    pools, parts = {}, {}
    for collection, some in tasks.groupby("Collection"):
        texts = {one["document_id"]: one["text"] for contexts in some["contexts"] for one in contexts}
        pools[collection] = [data.normalise(text) for text in texts.values()]
        number = {name: n for n, name in enumerate(texts)}
        said = [[turn["text"] for turn in turns if turn["speaker"] == "user"] for turns in some["input"]]
        parts[collection] = pd.DataFrame(
            {
                "text": [turns[-1] for turns in said],
                "context": [" ".join(turns[:-1]) for turns in said],
                "gold": [{number[one["document_id"]] for one in contexts} for contexts in some["contexts"]],
                "kind": [kinds[0] for kinds in some["answerability"]],
            }
        )
    return pools, parts


def passages(parameters: Mapping[str, object]) -> dict:
    """Retrieval on MTRAG-UN without training; the fusion weight is chosen on two collections, tested on two."""
    pools, parts = mtrag()
    encoder = retrieval.load_encoder(parameters["model"], parameters["max_length"])
    vectors = {name: retrieval.embed(encoder, pool) for name, pool in pools.items()}

    def found(collections: Sequence[str], weight: float) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
        every, sims, answerable = [], [], []
        for name in collections:
            index = retrieval.Index(pools[name], encoder, weight, vectors[name])
            tasks = parts[name]
            numbers, values = index.search(tasks["text"].tolist(), 10, tasks["context"].tolist())
            has = np.array([bool(gold) for gold in tasks["gold"]])
            every.append(
                pd.DataFrame(retrieval.ranking_metrics(numbers[has], tasks["gold"][has].tolist())).assign(
                    hit=[bool(set(row[:5]) & gold) for row, gold in zip(numbers[has], tasks["gold"][has], strict=True)]
                )
            )
            kinds = tasks["kind"].isin(["ANSWERABLE", "UNANSWERABLE"]).to_numpy()
            sims.append(values[kinds, 0])
            answerable.append((tasks["kind"] == "ANSWERABLE").to_numpy()[kinds])
        return pd.concat(every), np.concatenate(sims), np.concatenate(answerable)

    weights = np.round(np.arange(0, 1.01, 0.1), 1)
    tuned = max(weights, key=lambda weight: (found(["clapnq", "fiqa"], weight)[0]["hit"].mean(), weight))
    scores = {"weight": float(tuned)}
    for name, weight in (("BM25", 0.0), ("dense", 1.0), ("equal weights", 0.5), ("tuned fusion", tuned)):
        table, sims, answerable = found(["govt", "ibmcloud"], weight)
        scores |= {f"{name}, hit@5": float(table["hit"].mean()), f"{name}, nDCG@10": float(table["nDCG@10"].mean())}
        scores[f"{name}, n"] = len(table)
        if name == "dense":
            scores["unanswerable AUROC"] = float(roc_auc_score(answerable, sims))
    return {"metrics": scores, "speeds": {}}


# The generator


def generated(parameters: Mapping[str, object]) -> dict:
    """Replies to article questions of the desk, their passage given: what is supported, and correct, before and after.

    `steps` of LoRA fine-tuning on answers that people gave; 0: the generator as it is. A reply is correct if it holds
    the numbers of the marked quote and half of its content words.
    """
    support_desk = desk.load()
    by_id = {passage.id: passage for passage in support_desk.passages}
    rows = support_desk.answerable(parameters["split"])
    generator = reply.Generator.load(parameters["generator"])
    if parameters["steps"]:
        train = support_desk.answerable("train")
        reply.tune(
            generator,
            train["text"].tolist(),
            [[by_id[name]] for name in train["passage"]],
            train["quote"].tolist(),
            parameters["steps"],
            seed=parameters["seed"],
            progress=False,
        )
    given, started = [[by_id[name]] for name in rows["passage"]], time.perf_counter()
    written = generator.write(rows["text"].tolist(), given)
    seconds = (time.perf_counter() - started) / len(rows)
    return {
        "metrics": evaluation.reply_scores(written, given, rows["quote"].tolist()),
        "speeds": {"s a reply": seconds},
    }
