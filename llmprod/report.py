"""Results, the reference, the verdict, and the pages that are generated from them.

A result is never apart from its protocol: all parameters but the seed, the checksums of data and model, and the
protocols of the notebooks it builds on. A verdict compares only what has the same protocol.
"""

import json
import math
import os
import re
import statistics
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import yaml

from llmprod import LLMProdError, paths, track

REPRODUCED, DRIFTED, NOT_COMPARABLE, MISSING = "REPRODUCED", "DRIFTED", "NOT COMPARABLE", "MISSING"
NOT_PROTOCOL = ("seed",)


class ReportError(LLMProdError):
    """A result or reference file can't be used."""


# Results


def pipeline() -> dict[str, dict]:
    """The notebooks in their order, with what each needs, as `notebooks/pipeline.yaml` lists them."""
    return yaml.safe_load((paths.NOTEBOOKS / "pipeline.yaml").read_text(encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """Reads a JSON file. Raises ReportError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ReportError(f"{path} can't be read ({error}). Delete it and run again.") from error


def record(
    run: track.Run,
    scores: Mapping[str, float],
    n: int | Mapping[str, int],
    counts: Mapping[str, int] | None = None,
    speeds: Mapping[str, float] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Writes what a notebook found to `results/<notebook>.json`, closes its tracking, and compares with the reference.

    Args:
        run: what `track.start` gave
        scores: shares and means over test texts, judged with a tolerance measured over seeds
        n: the number of texts behind the scores; or by the name of a score, "" for all others
        counts: whole numbers, judged likewise
        speeds: what depends on the machine; shown, never judged
        checksums: name -> fingerprint of data and model

    Returns the verdict table of this notebook.
    """
    counts, speeds = counts or {}, speeds or {}
    checksums = {f"sha256 of {name}": value for name, value in (checksums or {}).items()}
    protocol = {name: value for name, value in run.parameters.items() if name not in NOT_PROTOCOL} | checksums
    for upstream in pipeline()[run.notebook]["needs"]:
        protocol[upstream] = read_json(run.folder / "results" / f"{upstream}.json")["protocol"]
    numbers = n if isinstance(n, Mapping) else {"": n}
    metrics = {name: {"value": float(value), "n": numbers.get(name, numbers[""])} for name, value in scores.items()}
    metrics |= {name: {"value": int(value)} for name, value in counts.items()}
    speeds = {**speeds, "peak memory, MB": track.peak_memory_mb()}
    result = {
        "notebook": run.notebook,
        "seed": run.seed,
        "metrics": metrics,
        "speeds": {name: float(f"{value:.4g}") for name, value in speeds.items()},
        "protocol": protocol,
    }
    write_json(run.folder / "results" / f"{run.notebook}.json", result)
    run.finish({name: metric["value"] for name, metric in metrics.items()} | result["speeds"], checksums)
    return verdict({run.notebook: result}, reference(run.folder.name), [run.notebook])


def results(folder: Path) -> dict[str, dict]:
    """All results of a run's folder, by notebook."""
    return {path.stem: read_json(path) for path in sorted((folder / "results").glob("*.json"))}


# Reference and verdict


def reference(profile: str) -> dict:
    """Our own results over seeds for a profile; those of `cpu` for a run outside the profiles; {} where none."""
    path = paths.REFERENCE / f"{profile}.json"
    if not path.exists() and not (paths.PROFILES / f"{profile}.yaml").exists():
        path = paths.REFERENCE / "cpu.json"
    return read_json(path)["notebooks"] if path.exists() else {}


def summarise(runs: list[dict]) -> dict:
    """One notebook's results over seeds: protocol, and of every metric the values, mean, sd and number of runs."""
    protocols = [run["protocol"] for run in runs]
    for other in protocols[1:]:
        if other != protocols[0]:
            raise ReportError(f"Runs of {runs[0]['notebook']} differ in {'; '.join(differences(other, protocols[0]))}.")
    metrics = {}
    for name, metric in runs[0]["metrics"].items():
        values = [run["metrics"][name]["value"] for run in runs]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        by_seed = {str(run["seed"]): run["metrics"][name]["value"] for run in runs}
        metrics[name] = metric | {"value": by_seed, "mean": statistics.mean(values), "sd": sd, "runs": len(values)}
    speeds = {k: statistics.median(run["speeds"][k] for run in runs) for k in runs[0]["speeds"]}
    minutes = statistics.median(run["provenance"]["minutes"] for run in runs)
    machine = runs[0]["provenance"]["machine"]
    return {"machine": machine, "minutes": minutes, "metrics": metrics, "speeds": speeds, "protocol": protocols[0]}


def tolerance(metric: Mapping[str, object]) -> float:
    """How far a new run may lie from the reference mean: max(3 sd sqrt(1 + 1/runs), one test example).

    The first term is the spread of one more draw around a mean of `runs` draws; the second is the least that a
    score over n examples can change. A count has no second term.
    """
    spread = 3 * metric["sd"] * math.sqrt(1 + 1 / metric["runs"])
    return max(spread, 1 / metric["n"] if "n" in metric else 0.0)


def differences(mine: Mapping[str, object], theirs: Mapping[str, object], prefix: str = "") -> list[str]:
    """What two protocols do not share, as "name: mine, reference theirs"."""
    found = []
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a}, reference {b}")
    return found


def published(notebook: str, protocol: Mapping[str, object]) -> list[dict]:
    """The figures of others for a notebook on the data set of its protocol, or of one that it builds on."""
    while not (named := [protocol[name] for name in ("ratings", "interactions", "dataset") if name in protocol]):
        protocol = next((value for value in protocol.values() if isinstance(value, Mapping)), {"dataset": ""})
    figures = yaml.safe_load(paths.PUBLISHED.read_text(encoding="utf-8"))
    return figures.get(notebook, {}).get(named[0], [])


def verdict(found: Mapping[str, dict], expected: Mapping[str, dict], notebooks: list[str]) -> pd.DataFrame:
    """One row for each metric of the notebooks: published, reference, yours, tolerance, verdict and its reason."""
    rows = []
    for notebook in notebooks:
        mine, theirs = found.get(notebook), expected.get(notebook)
        others = published(notebook, (theirs or mine or {}).get("protocol", {}))
        for name in (theirs or mine or {"metrics": ["(everything)"]})["metrics"]:
            beside = next((o for o in others if o["metric"] == name), None)
            metric = theirs["metrics"].get(name) if theirs else None
            value = mine["metrics"].get(name, {}).get("value") if mine else None
            rows.append(
                {
                    "notebook": notebook,
                    "metric": name,
                    "published": f"{beside['value']:.4g} ({beside['method']})" if beside else "",
                    "reference": spread(metric) if metric else "",
                    "yours": "" if value is None else number(value),
                    "tolerance": number(tolerance(metric)) if metric else "",
                    **judge(mine, theirs, metric, value),
                }
            )
    return pd.DataFrame(
        rows, columns=["notebook", "metric", "published", "reference", "yours", "tolerance", "verdict", "reason"]
    )


def judge(mine: Mapping | None, theirs: Mapping | None, metric: Mapping | None, value: float | None) -> dict[str, str]:
    """The verdict on one metric and, where it is not REPRODUCED, why."""
    if mine is None:
        return {"verdict": MISSING, "reason": "no result; run the notebook"}
    if metric is None:
        return {"verdict": NOT_COMPARABLE, "reason": "no reference was measured"}
    unlike = differences(mine["protocol"], theirs["protocol"])
    if unlike:
        return {"verdict": NOT_COMPARABLE, "reason": "; ".join(unlike)}
    if value is None:  # only now: other data may not have what a metric needs
        return {"verdict": MISSING, "reason": "no result; run the notebook"}
    distance = abs(value - metric["mean"])
    if not distance <= tolerance(metric) + 1e-9:  # so that a NaN drifts
        return {"verdict": DRIFTED, "reason": f"{distance:.4f} from the reference mean"}
    return {"verdict": REPRODUCED, "reason": ""}


def verify(folder: Path) -> pd.DataFrame:
    """The verdict on all results of a run's folder, against every notebook of the pipeline."""
    return verdict(results(folder), reference(folder.name), list(pipeline()))


# Pages


def build(folder: Path) -> None:
    """Writes a run's report, `README.md` and `index.html`: verdict, results with provenance, figures."""
    import mistune

    text = page(folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
    body = mistune.create_markdown(plugins=["table"])(text.replace(".ipynb)", ".html)"))
    (folder / "index.html").write_text(HTML.format(title=f"llmprod: {folder.name}", body=body), encoding="utf-8")


HTML = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;display:block;overflow-x:auto}}td,th{{padding:.3rem .7rem;border-bottom:1px solid #ddd;
text-align:left;white-space:nowrap}}td:last-child{{white-space:normal}}img{{max-width:100%}}a{{color:#0b6e99}}</style>
<body>{body}</body></html>
"""


def page(folder: Path) -> str:
    """The report of a run as Markdown."""
    table, found = verify(folder), results(folder)
    tally = ", ".join(f"{count} {name}" for name, count in table["verdict"].value_counts().items())
    parts = [
        f"# Report of the run `{folder.name}`",
        f"**Verdict: {tally or 'nothing was recorded'}.**",
        markdown(table),
    ]
    parts.append(
        "`reference` is our own mean ± standard deviation (number of seeds); `tolerance` is the larger of "
        "3 sd √(1 + 1/seeds) and one test example. Published figures have protocols of their own: `published.yaml`."
    )
    for notebook, result in found.items():
        stamp = result.get("provenance", {})
        parts.append(f"## [{notebook}]({notebook}.ipynb): {pipeline()[notebook]['title']}")
        if stamp:
            parts.append(
                f"{stamp['minutes']:.1f} minutes on {stamp['machine']}; commit `{stamp['commit']}`, "
                f"source `{stamp['source']}`, {', '.join(f'{k} {v}' for k, v in stamp['versions'].items())}."
            )
        parts += [f"![{p.stem}](figures/{p.name})" for p in sorted((folder / "figures").glob(f"{notebook}-*.png"))]
        speeds = pd.DataFrame(result["speeds"].items(), columns=["measured on this machine", "value"])
        parts.append(markdown(speeds.assign(value=[f"{value:,.6g}" for value in speeds["value"]])))
    return "\n\n".join(parts) + "\n"


def tally(table: pd.DataFrame) -> str:
    """How many rows have which verdict."""
    return ", ".join(f"{count} of {len(table)} {name}" for name, count in table["verdict"].value_counts().items())


def markdown(table: pd.DataFrame) -> str:
    """A frame as a Markdown table, its cells as they are."""
    return table.to_markdown(index=False, disable_numparse=True)


def repository() -> str:
    """The repository's address, from the one place that holds it."""
    import tomllib

    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def update_readme(path: Path, language: str) -> str:
    """A README's text with its generated parts, `<!-- generated: name -->` to `<!-- end -->`, written anew."""
    blocks = {
        "badges": badges,
        "notebooks": notebook_table,
        "results": result_table,
        "studies": study_table,
        "recommendation": recommendation_table,
        "sentiment": sentiment_table,
    }

    def renew(match: re.Match) -> str:
        return f"<!-- generated: {match[1]} -->\n{blocks[match[1]](language)}\n<!-- end -->"

    pattern = r"<!-- generated: (\w+) -->\n(?:.*?\n)??<!-- end -->"
    return re.sub(pattern, renew, path.read_text(encoding="utf-8"), flags=re.DOTALL)


def badges(language: str) -> str:
    """The badges at the head of the README."""
    url = repository()
    licence = f"[![Apache-2.0](https://img.shields.io/badge/licence-Apache--2.0-blue)]({url}/blob/main/LICENSE)"
    return f"[![tests]({url}/actions/workflows/tests.yml/badge.svg)]({url}/actions/workflows/tests.yml) {licence}"


def colab(notebook: str) -> str:
    """The badge that opens a notebook in Colab."""
    place = repository().removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{notebook}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


OURS = {
    "**MiniLM, fine-tuned (22.7 M parameters)**": "",
    "MiniLM, frozen + logistic regression": "frozen encoder ",
    "TF-IDF + logistic regression": "TF-IDF ",
}


def notebook_table(language: str) -> str:
    """The notebooks: what each does, its minutes and its main result, from the `cpu` reference."""
    title, executed, heads = {
        "en": ("title", "executed", ["notebook", "what it does", "minutes", "main result", ""]),
        "zh": ("title_zh", "已执行", ["笔记本", "内容", "分钟", "主要结果", ""]),
    }[language]
    rows, expected = [], reference("cpu")
    for name, item in pipeline().items():
        measured = expected.get(name)
        link = f"[`{name}`](notebooks/{name}.ipynb)"
        link += f" ([{executed}](reports/reference/cpu/{name}.ipynb))" if measured else ""
        minutes = f"{measured['minutes']:.1f}" if measured else ""
        headline = f"{item['headline']} {spread(measured['metrics'][item['headline']])}" if measured else ""
        rows.append([link, item[title], minutes, headline, colab(name)])
    return markdown(pd.DataFrame(rows, columns=heads))


def result_table(language: str) -> str:
    """The main figures of the `cpu` reference beside the published ones."""
    here, missing, heads = {
        "en": ("this repository", "Not measured yet.", ["method", "accuracy", "macro-F1", "source"]),
        "zh": ("本仓库", "尚未测量。", ["方法", "准确率", "宏平均 F1", "来源"]),
    }[language]
    measured = reference("cpu").get("03_evaluate")
    if not measured:
        return missing
    metrics, rows = measured["metrics"], []
    for method, prefix in OURS.items():
        rows.append([method, spread(metrics[f"{prefix}accuracy"]), spread(metrics[f"{prefix}macro-F1"]), here])
    for other in published("03_evaluate", measured["protocol"]):
        rows.append([other["method"], f"{other['value']:.4g}", "", f"{other['source']}; {other['protocol']}"])
    return markdown(pd.DataFrame(rows, columns=heads))


def study_table(language: str) -> str:
    """Banking77 by the number of labelled texts of each class, from the studies, beside published figures."""
    from llmprod import study  # which needs this module

    here, missing, heads, everything = {
        "en": ("this repository", "Not measured yet.", ["texts a class", "method", "accuracy", "source"], "all"),
        "zh": ("本仓库", "尚未测量。", ["每类样本数", "方法", "准确率", "来源"], "全部"),
    }[language]
    rows = []
    for name, of in (("few-labels", "strategy"), ("all-labels", "method")):
        found = study.means(name, ["dataset", of, "shots"], ["accuracy"])
        texts = study.styled(found)
        for (dataset, method, shots), row in texts.iterrows() if len(found) else ():
            if dataset == "banking77" and shots in (0, 5, 10):
                size = 0 if method == "class names alone" else shots or everything
                rows.append([size, f"MiniLM, {method}", row["accuracy"], here])
    if not rows:
        return missing
    figures = yaml.safe_load(paths.PUBLISHED.read_text(encoding="utf-8"))
    for item in figures["few-labels"]["banking77"] + figures["03_evaluate"]["banking77"]:
        rows.append(
            [
                item.get("shots", everything),
                item["method"],
                f"{item['value']:.4g}",
                f"{item['source']}; {item['protocol']}",
            ]
        )
    order = [0, 5, 10, everything]
    rows.sort(key=lambda row: order.index(row[0]))
    return markdown(pd.DataFrame(rows, columns=heads))


RECOMMENDERS = ("hybrid", "hybrid without text", "hybrid without graph", "EASE", "iALS")
RECOMMENDERS += ("recent popularity", "popularity")


def recommendation_table(language: str) -> str:
    """MovieLens-100K by two protocols, from the study of recommendation, beside published figures."""
    from llmprod import study  # which needs this module

    here, missing, heads = {
        "en": (
            "this repository",
            "Not measured yet.",
            ["method", "nDCG, time", "nDCG, within items", "precision", "source"],
        ),
        "zh": ("本仓库", "尚未测量。", ["方法", "nDCG，按时间", "nDCG，物品内随机", "精确率", "来源"]),
    }[language]
    metrics = [f"{method}, {metric}" for method in RECOMMENDERS for metric in ("nDCG", "precision")]
    shown = study.styled(study.means("recommendation", ["protocol"], metrics))
    if not {"time", "within items"} <= set(shown.index):
        return missing
    rows = [
        [
            f"**{method}**" if method == "hybrid" else method,
            shown.loc["time", f"{method}, nDCG"],
            shown.loc["within items", f"{method}, nDCG"],
            shown.loc["within items", f"{method}, precision"],
            here,
        ]
        for method in RECOMMENDERS
    ]
    for item in published("13_recommendation", {"interactions": "movielens-100k"}):
        source = f"{item['source']}; {item['protocol']}"
        rows.append([item["method"], "", f"{item['value']:.4g}", f"{item['precision']:.4g}", source])
    return markdown(pd.DataFrame(rows, columns=heads))


def sentiment_table(language: str) -> str:
    """Sentiment of editorials and of financial news, from the studies, beside published figures."""
    from llmprod import study  # which needs this module

    here, missing, heads = {
        "en": (
            "this repository",
            "Not measured yet.",
            ["method", "editorials, r", "F1", "news, accuracy", "macro-F1", "all agree", "macro-F1", "source"],
        ),
        "zh": (
            "本仓库",
            "尚未测量。",
            ["方法", "社论，r", "F1", "财经新闻，准确率", "宏平均 F1", "标注一致，准确率", "宏平均 F1", "来源"],
        ),
    }[language]
    measured = reference("cpu").get("12_financial_sentiment")
    if not measured:
        return missing
    metrics = measured["metrics"]
    news = study.means("phrasebank", ["part"], ["accuracy", "macro-F1"])
    news = study.styled(news) if len(news) else pd.DataFrame(columns=["accuracy", "macro-F1"])
    folds = [cell for part in ("50Agree", "AllAgree") for cell in (news.loc[part] if part in news.index else ["", ""])]
    ours = {
        "**MiniLM, fine-tuned (22.7 M parameters)**": ("sentiment r", "sentiment weighted F1", folds),
        "MiniLM, frozen + ridge": ("sentiment r, frozen", None, [""] * 4),
        "VADER, measured here": ("sentiment r, VADER", "sentiment weighted F1, VADER", [""] * 4),
    }
    rows = [
        [method, *(spread(metrics[name]) if name else "" for name in names), *rest, here]
        for method, (*names, rest) in ours.items()
    ]
    figures = yaml.safe_load(paths.PUBLISHED.read_text(encoding="utf-8"))["12_financial_sentiment"]
    for item in figures["sentiment-human"]:
        r = item["value"] if item["metric"].startswith("sentiment r") else ""
        rows.append([item["method"], r, item.get("f1", item["value"]), "", "", "", ""])
        rows[-1].append(f"{item['source']}; {item['protocol']}")
    for item in figures["financial-phrasebank"]:
        rows.append([item["method"], "", "", *(item[name] for name in ("value", "f1", "value_all", "f1_all"))])
        rows[-1].append(f"{item['source']}; {item['protocol']}")
    return markdown(pd.DataFrame(rows, columns=heads).astype(str))


def spread(metric: Mapping[str, object]) -> str:
    """A reference metric as mean ± sd (runs)."""
    return f"{number(metric['mean'])} ± {number(metric['sd'])} ({metric['runs']})"


def number(value: float) -> str:
    """A number for people: whole numbers with separators, shares to four places."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4f}"
