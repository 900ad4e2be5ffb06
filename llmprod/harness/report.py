"""The pages that are generated: a run's report, the tables of the READMEs."""

import re
import shutil
from pathlib import Path

import pandas as pd
import yaml

from llmprod import paths
from llmprod.harness import study
from llmprod.harness.notebooks import colab, repository
from llmprod.harness.pipeline import pipeline
from llmprod.harness.results import markdown, published, reference, results, spread, verify

# Pages


def build(folder: Path) -> None:
    """Writes a run's report, `README.md` and `index.html`: verdict, results with provenance, figures."""
    import mistune

    text = page(folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
    body = mistune.create_markdown(plugins=["table"])(text.replace(".ipynb)", ".html)"))
    (folder / "index.html").write_text(HTML.format(title=f"llmprod: {folder.name}", body=body), encoding="utf-8")


def keep(profile: str) -> None:
    """Copies a profile's executed notebooks, figures and report to its reference, where they are committed."""
    run, shelf = paths.REPORTS / profile, paths.REFERENCE / profile
    shutil.rmtree(shelf, ignore_errors=True)
    shutil.copytree(run / "figures", shelf / "figures")
    for name in (*(f"{name}.ipynb" for name in pipeline()), "README.md"):
        shutil.copyfile(run / name, shelf / name)


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
