"""Results, tolerance and verdict; and that the verdict notices what is broken."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from llmprod import LLMProdError, data, files, paths
from llmprod.evaluate import metrics
from llmprod.harness import examples, pipeline, reference, report, results, runner

PROTOCOL = {"dataset": "d", "epochs": 2, "01_data": {"rows": 10}}


def result(value: float, n: int | None = 1000, seed: int = 0, **protocol) -> dict:
    """A results file with one metric."""
    metric = {"value": value, **({"n": n} if n else {})}
    provenance = {"minutes": 1.0, "machine": "m"}
    return {
        "notebook": "03_evaluate",
        "seed": seed,
        "metrics": {"accuracy": metric},
        "speeds": {},
        "protocol": PROTOCOL | protocol,
        "provenance": provenance,
    }


def expected(*values: float, n: int | None = 1000) -> dict:
    """A reference over seeds with one metric."""
    return {"03_evaluate": reference.summarise([result(v, n, seed) for seed, v in enumerate(values)])}


def verdict(mine: dict | None, theirs: dict) -> tuple[str, str]:
    table = results.verdict({"03_evaluate": mine} if mine else {}, theirs, ["03_evaluate"])
    return table["verdict"][0], table["reason"][0]


def test_tolerance_by_hand():
    metric = reference.summarise([result(v, seed=s) for s, v in enumerate((0.96, 0.97, 0.98))])["metrics"]["accuracy"]
    assert metric["mean"] == pytest.approx(0.97) and metric["sd"] == pytest.approx(0.01) and metric["runs"] == 3
    assert reference.tolerance(metric) == pytest.approx(3 * 0.01 * math.sqrt(4 / 3))
    assert reference.tolerance({"sd": 0.0, "runs": 5, "n": 2189}) == pytest.approx(1 / 2189)
    assert reference.tolerance({"sd": 0.0, "runs": 5}) == 0, "a count that never varied must be met exactly"
    one = {"sd": 0.0, "runs": 1, "mean": 0.9, "n": 900}
    assert reference.tolerance(one) == pytest.approx(3 * 0.01), "one run: three standard errors of its share"
    assert reference.tolerance(one | {"machines": 0.1}) == pytest.approx(0.3 * math.sqrt(2)), "machines differ by more"
    assert reference.tolerance(metric | {"machines": 0.02}) == pytest.approx(
        3 * math.hypot(0.01, 0.02) * math.sqrt(4 / 3)
    )


@pytest.mark.parametrize(
    ("value", "name"),
    [(0.97, "REPRODUCED"), (1.0, "REPRODUCED"), (1.01, "DRIFTED"), (0.9, "DRIFTED"), (math.nan, "DRIFTED")],
)
def test_verdict_by_distance(value, name):
    assert verdict(result(value), expected(0.96, 0.97, 0.98))[0] == name


def test_the_table_holds_numbers_for_people():
    table = results.verdict({"03_evaluate": result(0.97)}, expected(0.96, 0.97, 0.98), ["03_evaluate"])
    shown = table.loc[0, ["reference", "yours", "tolerance", "notices"]].tolist()
    assert shown == ["0.9700 ± 0.0100 (3)", "0.9700", "0.0346", "0.0494"]


@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("factor", [3.0, 6.0])
def test_what_a_row_notices_it_notices_in_nine_of_ten_cases(runs, factor):
    """A reference of this spread, and 20,000 runs of which the true value has changed by as much as it says."""
    metric = {"mean": 0.9, "sd": 0.01, "runs": runs, "n": 10**6}
    changed = 0.9 + reference.notices(metric, factor)
    drawn = np.random.default_rng(0).normal(changed, reference.noise(metric), 20_000)
    assert np.mean(np.abs(drawn - 0.9) > reference.tolerance(metric, factor)) == pytest.approx(0.9, abs=0.01)


def test_a_row_too_blunt_to_say_so_is_not_called_reproduced():
    assert verdict(result(0.1), expected(0.08, 0.1, 0.12))[0] == "BLUNT", "a fifth of .1 is .02"
    assert verdict(result(0.9), expected(0.88, 0.9, 0.92))[0] == "REPRODUCED"
    assert verdict(result(0.9), expected(0.08, 0.1, 0.12))[0] == "DRIFTED", "what is far off needs no sharpness"
    assert verdict(result(0.0), expected(0.0, 0.0))[0] == "REPRODUCED", "what never varies is exact"


def test_another_seed_is_judged_by_student_and_holm():
    """By hand: of m rows the farthest by t at .01 / m, the next, once it has drifted, at .01 / (m - 1)."""
    metric = {"mean": 0.0, "sd": 1 / math.sqrt(4 / 3), "runs": 3, "n": 100}  # noise 1
    limits = [stats.t.isf(0.01 / m, df=2) for m in (3, 2, 1)]
    rows = dict(enumerate([1.0, limits[0] + 0.1, limits[1] + 0.1]))
    found = reference.factors({row: (metric, value) for row, value in rows.items()})
    assert [found[row] for row in (1, 2, 0)] == pytest.approx(limits)
    found = reference.factors({row: (metric, value) for row, value in enumerate([1.0, limits[1] + 0.1, 2.0])})
    assert list(found.values()) == pytest.approx([limits[0]] * 3), "none drifts, all are held to the first"
    assert reference.factors({}) == {} and reference.factors({0: (metric, math.nan)})[0] == pytest.approx(limits[2])
    assert reference.factors({0: (metric | {"runs": 1}, 9.0)}) == {0: math.inf}, "from one seed nothing can be told"


def test_an_honest_report_of_another_seed_rarely_drifts():
    """2,000 reports of 20 scores, each with a reference of five seeds and one new run of the same distribution."""
    drawn = np.random.default_rng(0).normal(0.9, 0.01, (2000, 20, 6))
    drifted = 0
    for values in drawn:
        means, sds = values[:, :5].mean(axis=1), values[:, :5].std(axis=1, ddof=1)
        rows = [{"mean": m, "sd": sd, "runs": 5} for m, sd in zip(means, sds, strict=True)]
        found = reference.factors(dict(enumerate(zip(rows, values[:, 5], strict=True))))
        limits = [reference.tolerance(row, found[k]) for k, row in enumerate(rows)]
        drifted += bool((np.abs(values[:, 5] - means) > limits).any())
    assert 0.01 < drifted / len(drawn) < 0.03, "two in a hundred, of which this is 2,000 draws"


def test_a_new_seed_and_a_known_one_are_judged_by_rules_of_their_own():
    theirs = expected(0.96, 0.97, 0.98)
    assert verdict(result(1.01, seed=2), theirs)[0] == "DRIFTED"
    assert verdict(result(1.01, seed=3), theirs)[0] == "REPRODUCED", "one in ten fresh seeds is as far off as that"
    assert verdict(result(0.60, seed=3), theirs)[0] == "DRIFTED"
    assert verdict(result(0.60, seed=3), expected(0.97))[0] == "BLUNT", "from one seed nothing can be told"


def test_one_test_example_may_differ_where_seeds_do_not():
    theirs = expected(0.5, 0.5, 0.5, n=100)
    assert verdict(result(0.51, 100), theirs)[0] == "REPRODUCED"
    assert verdict(result(0.52, 100), theirs)[0] == "DRIFTED"
    assert verdict(result(11, None), expected(10, 10, n=None))[0] == "DRIFTED"


def test_another_protocol_is_not_comparable_and_says_why():
    name, reason = verdict(result(0.97, epochs=3), expected(0.97, 0.97))
    assert name == "NOT COMPARABLE" and reason == "epochs: 3, reference 2"
    name, reason = verdict(result(0.97, **{"01_data": {"rows": 11}}), expected(0.97, 0.97))
    assert name == "NOT COMPARABLE" and "01_data.rows: 11, reference 10" in reason
    assert verdict(result(0.97), {})[0] == "NOT COMPARABLE"


def test_missing():
    assert verdict(None, expected(0.9, 0.9))[0] == "MISSING"
    lacking = result(0.9) | {"metrics": {}}
    assert verdict(lacking, expected(0.9, 0.9))[0] == "MISSING"
    elsewhere = result(0.9, epochs=3) | {"metrics": {}}
    assert verdict(elsewhere, expected(0.9, 0.9))[0] == "NOT COMPARABLE", "other data may lack what a metric needs"


def test_reference_over_different_protocols_is_refused():
    with pytest.raises(LLMProdError, match="epochs: 9, reference 2"):
        reference.summarise([result(0.9), result(0.9, epochs=9)])


def written(monkeypatch, tmp_path, content: str) -> None:
    """Takes a text for the reference of the profile cpu."""
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    (tmp_path / "cpu.json").write_text(content)


@pytest.mark.parametrize(
    "change",
    [{"sd": 1e9}, {"mean": 0.5}, {"runs": 30}, {"value": {}}, {"value": 0.9}, {"sd": None},
     {"value": {"0": 1.7e308, "1": -1.7e308}}, {"machines": 0.5}, {"elsewhere": {"0, m": 0.95}},
     {"elsewhere": {"0, m": 0.95}, "machines": 0.5}, {"elsewhere": {"9, m": 0.95}, "machines": 0.05}],
)  # fmt: skip
def test_a_reference_whose_spread_does_not_follow_from_its_values_is_refused(monkeypatch, tmp_path, change):
    theirs = expected(0.9, 0.91, 0.93)
    written(monkeypatch, tmp_path, json.dumps({"notebooks": theirs}))
    assert reference.load("cpu") == theirs
    theirs["03_evaluate"]["metrics"]["accuracy"] |= change
    written(monkeypatch, tmp_path, json.dumps({"notebooks": theirs}))
    with pytest.raises(LLMProdError, match=r"cpu\.json was damaged or edited.*make reference"):
        reference.load("cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"notebooks": []}', '{"notebooks": {"03_evaluate": 1}}'])
def test_a_damaged_reference_is_one_message(monkeypatch, tmp_path, content):
    written(monkeypatch, tmp_path, content)
    with pytest.raises(LLMProdError, match=r"cpu\.json was damaged or edited.*make reference"):
        reference.load("cpu")


PARTS = {"notebook": "02_finetune", "seed": 0, "metrics": {"accuracy": {"value": 1}}, "speeds": {}, "protocol": {}}
MADE = {"source": "s", "commit": "c", "machine": "m", "minutes": 1, "versions": {}, "parameters": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": 0}, {"metrics": []}, {"metrics": {"a": 1}}, {"metrics": {"a": {"value": "1"}}},
        {"metrics": {"a": {"value": 10**400}}}, {"speeds": []}, {"protocol": "d"}, {"provenance": 0},
        {"provenance": {}}, {"notebook": 1}, {"seed": "0"},
        {"provenance": MADE | {"commit": None}}, {"provenance": MADE | {"minutes": "1"}},
        {"provenance": MADE | {"versions": []}},
    ],
)  # fmt: skip
def test_a_damaged_result_with_a_fitting_seal_is_one_message(tmp_path, change):
    def made(content: object) -> None:
        files.write_json(tmp_path / "results/02_finetune.json", content)
        files.write_json(tmp_path / "work/02_finetune/done.json", {"seal": results.seal(tmp_path, "02_finetune")})

    (tmp_path / "02_finetune.ipynb").write_text("{}")
    made(PARTS | {"provenance": MADE})
    assert report.page(tmp_path) and results.notes(tmp_path)
    made(PARTS | {"provenance": MADE} | change)
    for use in (results.verify, results.notes, report.page):
        with pytest.raises(LLMProdError, match=r"02_finetune\.json was damaged or edited: delete it and run again"):
            use(tmp_path)


SOUND = {"protocol": {}, "minutes": 1, "metrics": {"a": {"value": {"0": 1}, "mean": 1, "sd": 0, "runs": 1, "n": 5}}}


@pytest.mark.parametrize(
    "change",
    [{"protocol": 0}, {"protocol": []}, {"minutes": "1"}]
    + [{"metrics": {"a": SOUND["metrics"]["a"] | {"n": n}}} for n in (0, -1, "5", None, 10**400)]
    + [{"metrics": {"a": SOUND["metrics"]["a"] | {"value": v, "mean": 10**400}}} for v in ({}, {"0": 10**400}, 1)],
)
def test_a_reference_that_lacks_what_is_used_is_one_message(monkeypatch, tmp_path, change):
    written(monkeypatch, tmp_path, json.dumps({"notebooks": {"a": SOUND}}))
    assert reference.load("cpu")
    written(monkeypatch, tmp_path, json.dumps({"notebooks": {"a": SOUND | change}}))
    with pytest.raises(LLMProdError, match=r"cpu\.json .*take the committed one"):
        reference.load("cpu")


@pytest.mark.parametrize("name", ["score", "machine", "id", "seed", "truth", "prediction"])
def test_predictions_of_other_columns_are_one_message(tmp_path, name):
    found = pd.DataFrame({"score": "a", "machine": "m", "id": ["x"], "seed": 0, "truth": 1, "prediction": 1})
    examples.write(tmp_path / "a.parquet", found)
    assert len(examples.read(tmp_path / "a.parquet")) == 1
    for wrong in (found.drop(columns=name), found.assign(**{name: [0.5]})):
        wrong.to_parquet(tmp_path / "a.parquet")
        with pytest.raises(LLMProdError, match=r"a\.parquet is damaged .*: take the committed one"):
            examples.read(tmp_path / "a.parquet")


def test_what_fails():
    """Anything but REPRODUCED and BLUNT, unless the run set a parameter by which it can't be compared."""

    def fails(verdict: str, notebook: str = "03_evaluate", **parameters) -> bool:
        return results.fails(pd.DataFrame({"notebook": [notebook], "verdict": [verdict]}), parameters)

    assert not fails("REPRODUCED") and not fails("REPRODUCED", epochs=9) and not fails("BLUNT")
    assert all(fails(verdict, epochs=9) for verdict in ("DRIFTED", "MISSING", "EDITED"))
    assert fails("NOT COMPARABLE"), "nothing was changed, or there is no reference"
    assert fails("NOT COMPARABLE", seed=1), "the seed is not part of the protocol"
    assert not fails("NOT COMPARABLE", dataset="mine.csv"), "01_data has it, on which 03_evaluate builds"
    assert fails("NOT COMPARABLE", notebook="13_recommendation", dataset="mine.csv"), "it does not build on 01_data"


def test_a_missing_reference_fails_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    assert reference.load("cpu") == {}
    table = results.verdict({"03_evaluate": result(0.9)}, {}, ["03_evaluate"])
    assert list(table["reason"]) == ["no reference was measured"] and results.fails(table, {})


def test_an_exported_table_holds_no_formula():
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]
    table = pd.DataFrame({"text": [*formulas, "fine", "a=b", ""], "n": [-1.5] * 9})
    safe = report.spreadsheet(table)
    assert list(safe["text"]) == [*(f"'{text}" for text in formulas), "fine", "a=b", ""]
    assert safe["n"].equals(table["n"]), "numbers stay numbers"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"fine": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"not": object()})
    assert files.read_json(tmp_path / "a.json") == {"fine": 1}


BROKEN_JSON = ["[" * 100_000, '{"a":' * 100_000, "", '{"a": 1', b"\xff", '{"a": "\\ud800"}', '{"\\udfff": 1}']


@pytest.mark.parametrize("content", BROKEN_JSON, ids=range(7))
def test_a_damaged_file_of_json_is_one_message(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LLMProdError, match=r"a\.json can't be read .*\. Delete it and run again"):
        files.read_json(tmp_path / "a.json")


# The verdict notices what is broken: real texts, a real classifier, three ways to go wrong


@pytest.fixture(scope="module")
def texts():
    table = data.drop_duplicates(data.clean(data.load("reuters-r8"))[0])[0]
    return table


def classify(table, seed: int, shuffled=False, wrong_split=False, off_by_one=False) -> dict:
    """Accuracy and macro-F1 of TF-IDF + logistic regression on a seed's subset, in one of four ways."""
    part = data.split(table, train_rows=700, test_rows=500, seed=seed)
    train, test = (part[part["split"] == name] for name in ("train", "test"))
    if wrong_split:
        test = train
    labels = train["label"].to_numpy()
    if shuffled:
        labels = np.random.default_rng(seed).permutation(labels)
    words = TfidfVectorizer(sublinear_tf=True).fit(train["text"])
    model = LogisticRegression(C=10, max_iter=1000).fit(words.transform(train["text"]), labels)
    predictions, y = model.predict(words.transform(test["text"])), test["label"].to_numpy()
    if off_by_one:
        predictions = np.roll(predictions, 1)
    scores = {"accuracy": metrics.accuracy(y, predictions), "macro_f1": metrics.macro_f1(y, predictions)}
    made = result(0, seed=seed)
    made["metrics"] = {name: {"value": value, "n": 500} for name, value in scores.items()}
    return made


def test_what_is_broken_on_purpose_drifts(texts):
    theirs = {"03_evaluate": reference.summarise([classify(texts, seed) for seed in range(1, 6)])}

    def verdicts(**how):
        return set(results.verdict({"03_evaluate": classify(texts, 0, **how)}, theirs, ["03_evaluate"])["verdict"])

    assert verdicts() == {"REPRODUCED", "BLUNT"}, "macro-F1 of few texts varies too much to say so"
    assert verdicts(shuffled=True) == {"DRIFTED"}
    assert verdicts(wrong_split=True) == {"DRIFTED"}
    assert verdicts(off_by_one=True) == {"DRIFTED"}


# Example by example: another model with as many mistakes


def predicted(table, seed: int) -> pd.DataFrame:
    """The predictions of TF-IDF + logistic regression, trained on texts that the seed draws, on one test split."""
    train, test = (table[table["split"] == name] for name in ("train", "test"))
    train, test = train.sample(1500, random_state=seed), test.head(600)
    words = TfidfVectorizer(sublinear_tf=True).fit(train["text"])
    model = LogisticRegression(C=10, max_iter=300).fit(words.transform(train["text"]), train["label"])
    probabilities = model.predict_proba(words.transform(test["text"]))
    return examples.table(test["text"], np.searchsorted(model.classes_, test["label"]), {"a": probabilities}, seed)


@pytest.fixture(scope="module")
def seeds(texts):
    return pd.concat([predicted(texts, seed) for seed in range(1, 5)], ignore_index=True)


def accuracy_of(part) -> float:
    return float((part["prediction"] == part["truth"]).mean())


def test_as_many_mistakes_on_other_texts_drift(seeds):
    """The accuracy is that of a seed to the last digit."""
    one = seeds[seeds["seed"] == 1].reset_index(drop=True)
    wrong = (one["prediction"] != one["truth"]).to_numpy()
    elsewhere = np.random.default_rng(0).permutation(np.flatnonzero(~wrong))[: wrong.sum()]
    other = one.assign(prediction=one["truth"], seed=0)
    other.loc[elsewhere, "prediction"] = (one["truth"] + 1) % 8
    assert accuracy_of(other) == accuracy_of(one)
    agrees, words = examples.judge(other, seeds)
    assert not agrees
    assert re.fullmatch(r"\d+ of 600 predictions differ from another seed's \(accuracy .*\); at most \d+ may", words)


def test_new_seeds_agree_example_by_example(texts, seeds):
    assert all(examples.judge(predicted(texts, seed), seeds)[0] for seed in range(10, 14))


def test_with_the_same_seed_on_the_same_kind_of_machine_all_predictions_are_equal(texts, seeds):
    again = predicted(texts, 3)
    assert examples.judge(again, seeds) == (True, "0 of 600 predictions differ from the same seed's")
    changed = again.assign(prediction=again["prediction"].where(again.index != 7, 1 - again["prediction"].clip(0, 1)))
    agrees, words = examples.judge(changed, seeds)
    assert not agrees and words.startswith("1 of 600 predictions differ from the same seed's (accuracy")
    assert words.endswith("; at most 0 may")
    assert examples.judge(changed.assign(machine="another"), seeds)[0], "another machine is at worst another seed"
    alone = seeds[seeds["seed"] == 3]
    assert examples.judge(changed.assign(machine="another"), alone)[0], "one seed says nothing of others"
    assert examples.judge(changed.assign(id="unknown"), seeds) == (True, ""), "other texts: nothing to compare"
    other_texts = seeds["id"] + seeds["seed"].astype(str)  # as in validation splits that the seed draws
    few_in_common = seeds.assign(id=other_texts.where(seeds.groupby("seed").cumcount() > 50, seeds["id"]))
    own = few_in_common[few_in_common["seed"] == 3]
    wrong = own.assign(prediction=(own["prediction"] + 1) % 8, machine="another")
    assert examples.judge(wrong, few_in_common)[0], "too few texts in common for a limit"
    assert not examples.judge(wrong.assign(machine=own["machine"]), few_in_common)[0]


def test_a_text_that_occurs_twice_is_two_examples():
    table = examples.table(["a", "b", "a"], np.array([0, 1, 1]), {"s": np.eye(2)[[0, 1, 0]]}, 0)
    assert table["id"].is_unique and examples.differences(table, table) == (3, 0, 0, 0)
    other = table.assign(prediction=[1, 1, 1])
    assert examples.differences(table, other) == (3, 2, 1, 1)


def test_a_run_of_another_machine_is_added_to_the_reference(monkeypatch, tmp_path, seeds, texts):
    """What drifted there is then within the reference's spread, and equal to the same run again."""
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(paths, "REPORTS", tmp_path)
    (tmp_path / "reference").mkdir()
    other = predicted(texts, 3).assign(score="accuracy", machine="another")
    other.loc[:5, "prediction"] = (other.loc[:5, "truth"] + 1) % 8
    own, one = seeds.assign(score="accuracy"), result(accuracy_of(other), n=600, seed=3)
    shelf = {"03_evaluate": reference.summarise([result(accuracy_of(p), 600, s) for s, p in own.groupby("seed")])}
    files.write_json(tmp_path / "reference/cpu.json", {"notebooks": shelf})
    examples.write(tmp_path / "own.parquet", own)
    examples.gather([tmp_path / "own.parquet"], examples.of_reference("cpu", "03_evaluate"))
    examples.write(examples.of_run(tmp_path / "cpu", "03_evaluate"), other)
    monkeypatch.setattr(results, "results", lambda folder: {"03_evaluate": one})
    for _ in range(2):  # the second time changes nothing
        runner.add_to_reference("cpu")
        measured = reference.load("cpu")["03_evaluate"]["metrics"]["accuracy"]
        assert list(measured["value"]) == ["1", "2", "3", "4"] and measured["elsewhere"] == {"3, m": accuracy_of(other)}
        assert measured["machines"] == pytest.approx(abs(accuracy_of(other) - measured["value"]["3"])) != 0
        found = examples.read(examples.of_reference("cpu", "03_evaluate"))
        assert len(found) == 5 * 600 and examples.judge(other, found)[1].startswith("0 of 600")
        assert examples.judge(predicted(texts, 3).assign(score="accuracy"), found)[1].startswith("0 of 600")
    one["seed"] = 9
    with pytest.raises(LLMProdError, match="lacks the run's seed, 9"):
        runner.add_to_reference("cpu")
    one["protocol"] |= {"epochs": 99}
    with pytest.raises(LLMProdError, match="03_evaluate is of another protocol than the reference: epochs: 99"):
        runner.add_to_reference("cpu")


def test_examples_decide_the_verdict_of_a_run(monkeypatch, tmp_path, seeds, texts):
    """A score within its tolerance drifts where its predictions do; a damaged file is one message."""
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    (tmp_path / "reference").mkdir()
    mine = seeds[seeds["seed"] == 3].assign(score="accuracy")
    folder = tmp_path / "cpu"
    (folder / "results").mkdir(parents=True)
    one = result(accuracy_of(mine), seed=3)
    expect = {"03_evaluate": reference.summarise([one])}

    def judged() -> tuple[str, str]:
        table = results.verdict({"03_evaluate": one}, expect, ["03_evaluate"], folder)
        return table["verdict"][0], table["reason"][0]

    examples.write(examples.of_run(folder, "03_evaluate"), mine)
    assert judged() == ("REPRODUCED", ""), "the reference has no predictions"
    examples.gather([examples.of_run(folder, "03_evaluate")], examples.of_reference("cpu", "03_evaluate"))
    assert judged() == ("REPRODUCED", "0 of 600 predictions differ from the same seed's")
    examples.write(examples.of_run(folder, "03_evaluate"), mine.assign(prediction=1 - mine["prediction"].clip(0, 1)))
    assert judged()[0] == "DRIFTED" and "at most 0 may" in judged()[1]
    examples.of_run(folder, "03_evaluate").write_bytes(b"PAR1")
    with pytest.raises(LLMProdError, match=r"03_evaluate\.parquet is damaged .*run again"):
        judged()


EXAMPLES = ["02_finetune", "03_evaluate", "04_optimize", "11_customer_service"]  # accuracies compared text by text


def test_the_references_predictions_give_its_scores():
    found = sorted((paths.REFERENCE / "examples/cpu").glob("*.parquet"))
    assert [path.stem for path in found] == EXAMPLES
    for path in found:
        metrics_of = reference.load("cpu")[path.stem]["metrics"]
        for (score, seed, machine), part in examples.read(path).groupby(["score", "seed", "machine"], observed=True):
            runs = metrics_of[score]["value"] | metrics_of[score].get("elsewhere", {})
            own = [value for who, value in runs.items() if who.partition(",")[0] == str(seed)]
            assert any(accuracy_of(part) == pytest.approx(value) for value in own), (score, seed, machine)
            assert len(part) == metrics_of[score]["n"]


def test_another_model_does_not_pass_for_the_fine_tuned_one():
    """TF-IDF, and the frozen encoder, are as accurate on R8 as a seed of the fine-tuned model; the examples tell."""
    found = examples.read(examples.of_reference("cpu", "03_evaluate"))
    metrics_of = reference.load("cpu")["03_evaluate"]["metrics"]
    tuned = found[found["score"] == "accuracy"]
    own = metrics_of["accuracy"]
    for score in ("TF-IDF accuracy", "frozen encoder accuracy"):
        distance = abs(metrics_of[score]["mean"] - own["mean"])
        assert distance < reference.tolerance(own), "by its accuracy alone it would pass"
        for seed, part in found[found["score"] == score].groupby("seed"):
            new = part.assign(seed=99)  # the run of a fresh seed, for which another model stands in
            assert not examples.judge(new, tuned)[0], (score, seed)
    for seed in tuned["seed"].unique():
        others = tuned[tuned["seed"] != seed]
        assert examples.judge(tuned[tuned["seed"] == seed], others)[0], "an honest new seed passes"


# The committed reference


def reference_metrics():
    theirs = reference.load("cpu")
    return [(notebook, name) for notebook, item in theirs.items() for name in item["metrics"]]


ONE_SEED = {"04_optimize", "05_deploy", "06_feedback"}  # a seed takes a quarter of an hour with what they need


def test_reference_covers_the_pipeline_over_seeds():
    theirs = reference.load("cpu")
    assert list(theirs) == list(pipeline.pipeline())
    for notebook, item in theirs.items():
        assert item["machine"] and (item["minutes"] is None or item["minutes"] > 0), notebook  # None: not timed
        assert all(m["runs"] >= (1 if notebook in ONE_SEED else 3) for m in item["metrics"].values()), notebook


@pytest.mark.parametrize(("notebook", "name"), reference_metrics())
def test_nonsense_drifts_from_every_reference(notebook, name):
    """Zero, where a score is right when it is high; twice the mean and one for the rest, which may be near zero."""
    item = reference.load("cpu")[notebook]
    high = re.search("accuracy|F1|AUROC|nDCG|precision@k", name)
    value = 0.0 if high else 2 * item["metrics"][name]["mean"] + 1
    nonsense = {"metrics": {name: {"value": value}}, "protocol": item["protocol"]}
    judged = results.judge(nonsense, item, item["metrics"][name], value)["verdict"]
    assert judged == "DRIFTED"


def test_majority_class_drifts_from_every_reference(texts):
    """Always the largest class, scored by the metrics of 03_evaluate on the real test split."""
    item = reference.load("cpu")["03_evaluate"]
    test = texts[texts["split"] == "test"]
    names, y = np.unique(test["label"], return_inverse=True)
    largest = np.bincount(y).argmax()
    predictions = np.full_like(y, largest)
    certain = np.full((len(y), len(names)), 1e-9)
    certain[:, largest] = 1
    values = {
        "accuracy": metrics.accuracy(y, predictions),
        "macro-F1": metrics.macro_f1(y, predictions),
        "log loss, nats": float(-np.log(certain[np.arange(len(y)), y]).mean()),
        "calibration error": metrics.expected_calibration_error(y, certain),
    }
    scored = {name: values[score] for name in item["metrics"] for score in values if name.endswith(score)}
    assert set(values) < set(scored), "all of them, and those of the baselines"
    for name, value in scored.items():
        judged = results.judge({"metrics": {}, "protocol": item["protocol"]}, item, item["metrics"][name], value)
        assert judged["verdict"] == "DRIFTED", name


# Pages


def test_a_table_is_data(monkeypatch, tmp_path):
    """Rows of ours, with a † if stale; published rows; the order; another language; nothing measured yet."""
    (tmp_path / "tables.yaml").write_text(
        """
words: {here: {en: here, zh: 此处}, missing: {en: nothing, zh: 无}, stale: {en: † old, zh: † 旧}}
tables:
  one:
    columns: {method: [method, 方法], score: [score, 分数]}
    order: [WideMLP, "{here} plain", "{here} prototypes"]
    blocks:
      - {study: few, by: [strategy], where: {shots: [5]}, method: "{here} {strategy}", score: {metric: accuracy}}
      - {published: {03_evaluate: reuters-r8}, where: {method: [WideMLP]}, method: "{method}", score: "{value:.2f}"}
  two:
    columns: {method: [method, 方法], score: [score, 分数]}
    blocks: [{rows: [[a]], method: "{0}", score: {study: few, where: {shots: [7]}, metric: accuracy}}]
"""
    )

    def means(name: str, by: list[str], metrics: list[str]) -> pd.DataFrame:
        rows = [("plain", 5, 0.5, True), ("prototypes", 5, 0.75, False), ("plain", 10, 0.9, False)]
        frame = pd.DataFrame(rows, columns=["strategy", "shots", "mean", "stale"]).assign(sd=0.0, seeds=1)
        frame = frame.set_index(by)[["mean", "sd", "seeds", "stale"]]
        return pd.concat({"accuracy": frame}, axis=1)

    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(report.study, "means", means)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in report.result_table("one", "en").splitlines()]
    assert cells[0] == ["method", "score"] and cells[2:5] == [
        ["WideMLP", "0.97"], ["here plain", "0.5000†"], ["here prototypes", "0.7500"],
    ]  # fmt: skip
    assert report.result_table("one", "en").endswith("\n\n† old")
    assert report.result_table("two", "zh") == "无"


def test_report_pages_of_a_run(smoke_run):
    report.build(smoke_run)
    page = (smoke_run / "README.md").read_text()
    assert "**Verdict: " in page and page.count("NOT COMPARABLE") > 5, "smoke has another protocol than the reference"
    for notebook in pipeline.pipeline():
        assert f"[{notebook}]({notebook}.ipynb)" in page
    html = (smoke_run / "index.html").read_text()
    assert html.count("<table>") == 1 + len(pipeline.pipeline()), "the verdict's, and each notebook's speeds"
    for line in html.splitlines():
        if 'src="' in line:
            assert (smoke_run / line.split('src="')[1].split('"')[0]).exists()
    assert "01_data.html" in html and (smoke_run / "01_data.html").exists()


@pytest.mark.parametrize(("name", "language"), [("README.md", "en"), ("README.zh.md", "zh")])
def test_generated_parts_of_the_readme_were_not_edited(name, language):
    path = paths.ROOT / name
    assert report.update(path, language) == path.read_text(), "run make report"
    assert {"badges", "notebooks", "results", "studies", "recommendation", "sentiment"} <= set(
        re.findall(r"<!-- generated: (\w+) -->", path.read_text())
    )


def test_published_figures_stand_beside_ours():
    table = results.verdict({}, reference.load("cpu"), ["03_evaluate"]).set_index("metric")["published"]
    assert table["accuracy"] == "0.978 (BERT-base)" and table["TF-IDF accuracy"] == "0.937 (TF-IDF + LR)"
    assert "BERT-base" in (paths.ROOT / "README.md").read_text()


def test_published_figures_have_source_and_protocol():
    import yaml

    for datasets in yaml.safe_load(paths.PUBLISHED.read_text()).values():
        for items in datasets.values():
            for item in items:
                assert 0 < item["value"] <= 1 and item["source"] and item["protocol"] and item["method"]


def test_results_hold_their_protocol(smoke_run):
    found = json.loads((smoke_run / "results/03_evaluate.json").read_text())
    assert found["protocol"]["02_finetune"]["01_data"]["sha256 of data"]
    assert found["protocol"]["02_finetune"]["01_data"]["train_rows"] == 240
    assert "seed" not in found["protocol"] and found["metrics"]["accuracy"]["n"] == 100
    assert found["provenance"]["versions"]["torch"] and found["provenance"]["source"]
