"""Generated pages: a run's report, and the generated blocks of the READMEs and docs."""

import ast
import re
import shutil
from html import escape
from pathlib import Path
from string import Template

import pandas as pd
import yaml

from llmprod import files, paths
from llmprod.harness import reference, runner, study
from llmprod.harness.notebooks import colab, repository
from llmprod.harness.pipeline import notebooks_of, pipeline
from llmprod.harness.results import markdown, notes, results, spread, tally, verify

# Pages


def build(folder: Path) -> None:
    """Writes a run's report, `README.md` and `index.html`: verdict, results with provenance, figures."""
    import mistune

    text = page(folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
    body = mistune.create_markdown(plugins=["table"])(text.replace(".ipynb)", ".html)"))
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    html = template.substitute(title=f"llmprod: {escape(folder.name)}", body=body, policy=runner.POLICY)
    (folder / "index.html").write_text(html, encoding="utf-8")


def keep(profile: str) -> None:
    """Copies a profile's executed notebooks, figures and report to `reports/reference`, to be committed."""
    run, shelf = paths.REPORTS / profile, paths.REFERENCE / profile
    shutil.rmtree(shelf, ignore_errors=True)
    shutil.copytree(run / "figures", shelf / "figures")
    for name in (*(f"{name}.ipynb" for name in notebooks_of(profile)), "README.md"):
        shutil.copyfile(run / name, shelf / name)


def page(folder: Path) -> str:
    """A run's report as Markdown."""
    table, found = verify(folder), results(folder)
    parts = [
        f"# Report of the run `{folder.name}`",
        f"**Verdict: {tally(table) or 'nothing was recorded'}.**",
        *notes(folder),
        markdown(table.map(plain)),
    ]
    parts.append(
        "`reference` is our own mean ± standard deviation (number of seeds); `tolerance` is how far a run may lie from "
        "it. For a seed of the reference that is the larger of 3 sd √(1 + 1/seeds) and one test example, with the "
        "deviation between machines in the sd (of one seed, three standard errors of the share); for another seed "
        "Student's t takes the place of the 3, with Holm's correction over the rows. `notices` is the smallest change "
        "that the row would show in nine of ten cases: where it might miss a fifth of its value, a row within its "
        "tolerance is called BLUNT. "
        "Published figures have protocols of their own: `published.yaml`."
    )
    for notebook, result in found.items():
        stamp = result.get("provenance", {})
        parts.append(f"## [{notebook}]({notebook}.ipynb): {pipeline()[notebook]['title']}")
        if stamp:
            parts.append(
                f"{stamp['minutes']:.1f} minutes on {stamp['machine']}; commit `{stamp['commit']}`, "
                f"source `{stamp['source'][:12]}`, {', '.join(f'{k} {v}' for k, v in stamp['versions'].items())}."
            )
        parts += [f"![{p.stem}](figures/{p.name})" for p in sorted((folder / "figures").glob(f"{notebook}-*.png"))]
        speeds = pd.DataFrame(result["speeds"].items(), columns=["measured on this machine", "value"])
        parts.append(markdown(speeds.assign(value=[f"{value:,.6g}" for value in speeds["value"]]).map(plain)))
    return "\n\n".join(parts) + "\n"


def plain(text: object) -> str:
    """A text for a cell of a Markdown table, in which nothing of it is markup: it may come from the data."""
    return re.sub(r"([\\`*_\[\]<>|!&~$])", r"\\\1", " ".join(str(text).split()))


def spreadsheet(table: pd.DataFrame) -> pd.DataFrame:
    """A frame whose texts no spreadsheet takes for formulas: where one begins like it, an apostrophe stands before."""
    return table.map(lambda v: f"'{v}" if isinstance(v, str) and v.startswith(("=", "+", "-", "@", "\t", "\r")) else v)


# Generated blocks of the READMEs and docs


def update(path: Path, language: str) -> str:
    """A file's text with its generated blocks, `<!-- generated: name -->` to `<!-- end -->`, written anew."""
    functions = {"badges": badges, "notebooks": notebook_table, "house": house}

    def renew(match: re.Match) -> str:
        block = functions[match[1]](language) if match[1] in functions else result_table(match[1], language)
        return f"<!-- generated: {match[1]} -->\n{block}\n<!-- end -->"

    pattern = r"<!-- generated: (\w+) -->\n(?:.*?\n)??<!-- end -->"
    return re.sub(pattern, renew, path.read_text(encoding="utf-8"), flags=re.DOTALL)


GENERATED = {"README.md": "en", "README.zh.md": "zh"} | dict.fromkeys(
    ("docs/ARCHITECTURE.md", "docs/DEPLOY.md", "docs/SCALING.md"), "en"
)


def generate() -> None:
    """Writes the generated blocks of the READMEs and docs anew."""
    for name, language in GENERATED.items():
        (paths.ROOT / name).write_text(update(paths.ROOT / name, language), encoding="utf-8")


def badges(language: str) -> str:
    """The badges at the head of the README."""
    url = repository()
    licence = f"[![Apache-2.0](https://img.shields.io/badge/licence-Apache--2.0-blue)]({url}/blob/main/LICENSE)"
    tests = f"[![tests]({url}/actions/workflows/tests.yml/badge.svg)]({url}/actions/workflows/tests.yml) "
    return (tests if colab("") else "") + licence


def notebook_table(language: str) -> str:
    """The notebooks: content, minutes and main result of each, from the `cpu` reference."""
    title, executed, heads = {
        "en": ("title", "executed", ["notebook", "what it does", "minutes", "main result", ""]),
        "zh": ("title_zh", "已执行", ["笔记本", "内容", "分钟", "主要结果", ""]),
    }[language]
    rows, expected = [], reference.load("cpu")
    for name, item in pipeline().items():
        measured = expected.get(name)
        link = f"[`{name}`](notebooks/{name}.ipynb)"
        copy = f"reports/reference/cpu/{name}.ipynb"
        link += f" ([{executed}]({copy}))" if (paths.ROOT / copy).exists() else ""
        minutes = f"{measured['minutes']:.1f}" if measured and measured["minutes"] else ""
        headline = f"{item['headline']} {spread(measured['metrics'][item['headline']])}" if measured else ""
        rows.append([link, item[title], minutes, headline, colab(name)])
    return markdown(pd.DataFrame(rows, columns=heads))


def house(language: str) -> str:
    """The modules, one line each with the first sentence of its docstring."""
    lines = []
    for file in sorted(paths.PACKAGE.rglob("*.py"), key=lambda f: (f.parent != paths.PACKAGE, f)):
        place = file.relative_to(paths.PACKAGE)
        if place.parts[0] == "repository":  # what a wheel carries next to the modules
            continue
        name = f"{place.parent}/" if place.name == "__init__.py" and place.parent.name else place.name
        indent = "  " if place.parent.name and place.name != "__init__.py" else ""
        sentence = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).partition("\n")[0]
        lines.append(f"{indent + name:<24} {sentence}")
    return "\n".join(["```text", *lines, "```"])


def result_table(name: str, language: str) -> str:
    """A table of `notebooks/tables.yaml`: our numbers with their spread over seeds, and published figures."""
    content = yaml.safe_load((paths.NOTEBOOKS / "tables.yaml").read_text(encoding="utf-8"))
    words = {word: texts[language] for word, texts in content["words"].items()}
    table, rows, ours = content["tables"][name], [], 0
    titles = [title[language == "zh"] for title in table["columns"].values()]
    for block in table["blocks"]:
        for values, fields in row_sources(block):
            fill = {column: block[column] for column in table["columns"] if column in block}
            cells = {column: table_cell(template, values, words | fields) for column, template in fill.items()}
            numbers = [cells[column] for column, template in fill.items() if isinstance(template, dict)]
            if any(numbers) or not numbers:
                rows.append([cells.get(column, "") for column in table["columns"]])
                ours += bool(numbers)
    if not ours:
        return words["missing"]
    if order := [value.format(**words) for value in table.get("order", [])]:
        rows.sort(key=lambda row: order.index(row[0]))
    text = markdown(pd.DataFrame(rows, columns=titles))
    for bench in [block["bench"] for block in table["blocks"] if "bench" in block]:
        measured = benchmark(bench)
        text += f"\n\n`make bench BENCH={bench}`: {measured['machine']}; `{measured['commit']}`"
    return f"{text}\n\n{words['stale']}" if "†" in text else text


def row_sources(block: dict) -> list[tuple[list, dict]]:
    """The rows of a block of a table: the values and named fields that its templates may use."""
    if "rows" in block:
        return [(values, {}) for values in block["rows"]]
    if "published" in block:
        ((notebook, dataset),) = block["published"].items()
        figures = yaml.safe_load(paths.PUBLISHED.read_text(encoding="utf-8"))[notebook][dataset]
        return [([], item) for item in figures if allowed(item, block.get("where", {}))]
    if "bench" in block:
        return [([], row) for row in benchmark(block["bench"])["rows"] if allowed(row, block.get("where", {}))]
    columns = dict.fromkeys([*block.get("where", {}), *block["by"]])
    metrics = [template["metric"] for template in block.values() if isinstance(template, dict) and "metric" in template]
    means = study.means(block["study"], list(columns), metrics)
    settings = zip(means.index.to_frame().to_dict("records"), means.iterrows(), strict=True)
    return [([], fields | {"means": row}) for fields, (_, row) in settings if allowed(fields, block.get("where", {}))]


def benchmark(name: str) -> dict:
    """What `make bench` found last: machine, commit and `rows`, none where it was not measured."""
    path = paths.REPORTS / "bench" / f"{name}.json"
    return files.read_json(path) if path.exists() else {"rows": []}


def table_cell(template: str | dict, values: list, fields: dict) -> str:
    """One cell: a text with its values filled in, or a number of ours from the reference or a study; "" if missing."""
    if isinstance(template, str):
        return template.format(*values, **fields)
    if "bench" in template:
        return template["bench"].format(**fields)
    metric = template["metric"].format(*values)
    if "reference" in template:
        measured = reference.load(template.get("profile", "cpu")).get(template["reference"])
        return spread(measured["metrics"][metric]) if measured else ""
    if "study" in template:
        block = {"study": template["study"], "where": template["where"], "by": [], "cell": {"metric": metric}}
        found = row_sources(block)
        return study.cell(*found[0][1]["means"][metric]) if found else ""
    return study.cell(*fields["means"][metric])


def allowed(fields: dict, where: dict[str, list]) -> bool:
    """Whether every field that `where` names has one of the values that it lists."""
    return all(fields[name] in values for name, values in where.items())
