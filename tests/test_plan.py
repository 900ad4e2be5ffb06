"""A run's plan: what it names, what is lacking, and that nothing is run or fetched for it."""

import re
import shutil
from types import SimpleNamespace

import pytest

from llmprod import LLMProdError, artifacts, paths
from llmprod.__main__ import main
from llmprod.harness import pipeline, plan, runner


def names(notebook: str, profile: str = "cpu", **parameters: object) -> set[str]:
    return plan.named(notebook, pipeline.settings(profile, parameters)[notebook])


def test_it_names_what_parameters_and_code_name():
    assert names("13_recommendation") == {"minilm", "movielens-100k", "movielens-titles"}
    here, elsewhere = names("01_data"), names("01_data", dataset="banking77")
    assert "reuters-r8" in here - elsewhere and "banking77" in elsewhere - here
    assert {"business-headlines", "news-articles", "sp500"} <= names("14_news_monitoring"), "its code reaches them"
    assert "financial-phrasebank" not in names("12_financial_sentiment"), "it is only compared with"


def test_a_model_that_may_have_a_stand_in_is_tried_first(capsys, monkeypatch, empty_cache):
    assert names("02_finetune", "gpu") - names("02_finetune") == {"mpnet-base"}
    main(["plan", "--profile", "gpu", "--notebook", "02_finetune"])
    said = capsys.readouterr().out
    assert re.search(r"\| bert-base-uncased \| 441\S* +\| hub +\| no +\| tried before mpnet-base", said)
    monkeypatch.setattr(artifacts, "is_present", lambda name: True)
    assert names("02_finetune", "gpu") - names("02_finetune") == {"bert-base-uncased"}
    main(["plan", "--profile", "gpu", "--notebook", "02_finetune"])
    assert "tried before" not in capsys.readouterr().out


def test_the_plan_of_everything_names_all_that_the_run_fetches(capsys, empty_cache):
    """In an empty cache: what each notebook needs, and how much that is; and the cache stays empty."""
    assert main(["plan"]) == 0
    said = capsys.readouterr().out
    for name, item in pipeline.pipeline().items():
        assert f"| {name}" in said
        assert item["needs"] or names(name), name
    for value in {v for n in pipeline.pipeline() for v in pipeline.declared(n).values() if v in artifacts.registry()}:
        assert f"| {value} " in said
    assert "| yes" in said and not empty_cache.exists()


def test_a_profile_may_skip_notebooks(capsys, monkeypatch, tmp_path):
    assert main(["plan", "--profile", "zh"]) == 0
    said = capsys.readouterr().out
    assert [line[2:4] for line in said.splitlines() if re.match(r"\| \d\d_", line)] == ["01", "02", "03", "11"]
    assert "| m3e-small " in said and "| chinese-reviews " in said and "nan" not in said
    (tmp_path / "few.yaml").write_text("02_finetune: {skip: true}\n03_evaluate: {skip: false, seed: 1}\n")
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
    assert pipeline.notebooks_of("few") == [name for name in pipeline.pipeline() if name != "02_finetune"]
    assert pipeline.settings("few", {})["03_evaluate"] == {"seed": 1}
    (tmp_path / "few.yaml").write_text("02_finetune: {skip: sometimes}\n")
    with pytest.raises(LLMProdError, match=r"few.yaml: 02_finetune: skip is 'sometimes'; it takes true or false"):
        pipeline.notebooks_of("few")


def test_what_is_up_to_date_is_not_run(capsys, monkeypatch):
    monkeypatch.setattr(runner, "is_up_to_date", lambda notebook, *_: notebook == "01_data")
    assert main(["plan", "--notebook", "02_finetune"]) == 0
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0")}
    assert "nothing has changed" in rows["01_data"] and "nothing has changed" not in rows["02_finetune"]


@pytest.mark.parametrize(
    ("profile", "change", "lacking"),
    [
        ("cpu", {"disk_usage": lambda _: SimpleNamespace(free=10**8)}, r"LACKS 2\.0 GB of disk for .*; 0\.1 are free"),
        ("cpu", {"sysconf": lambda _: 1000}, r"LACKS [34]\.\d GB of memory; there are 0"),
        ("gpu", {"is_available": lambda: False}, r"LACKS a GPU: PyTorch .* finds none"),
    ],
)
def test_what_is_lacking_is_said_and_fails(capsys, monkeypatch, profile, change, lacking):
    places = {"disk_usage": shutil, "sysconf": plan.os, "is_available": plan.torch.cuda}
    for name, value in change.items():
        monkeypatch.setattr(places[name], name, value)
    assert main(["plan", "--profile", profile, "--notebook", "02_finetune"]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if re.match(lacking, line)]
