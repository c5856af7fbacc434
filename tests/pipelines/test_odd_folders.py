"""Folders may be called as people call them: results are found again, whatever brackets and stars are in the name."""

import numpy as np
import polars as pl
import pytest

from excise.errors import ExciseError
from excise.files.tensors import save_tensors
from excise.generation.completions import CompletionCache
from excise.outcomes.scoring import ScoreCache
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.tables import TABLES
from resources.warehouse import Warehouse
from tests.conftest import blank, open_house, save_tiny_model

NAMES = (
    "data [copy]",
    "a*b",
    "{a,b}",
    "50 %20 off",
    "#1",
    "it's",
    'so "called"',
    "Ergebnisse für 数据",
    "dots...",
    "~",
    "~nobody",
    "a=b",
    "c:\\d",
    "$HOME",
    "a;b&c",
    " edge ",
    "two\nlines",
    "!(x)",
    "**",
)
PLACE = {"asset": "completions", "model": "m", "scenario": "s"}
ANSWERS = pl.DataFrame({"prompt": ["p"], "sample": [0], "token_ids": [[1, 2]], "finished": [True]})


@pytest.fixture
def neighbour(tmp_path):
    """A folder beside that a pattern would find instead."""
    for name in ("data c", "aXb", "a", "x"):
        CompletionCache(tmp_path / name / "cache").add("address", ANSWERS.with_columns(sample=pl.lit(7, pl.Int64)))


@pytest.mark.trial(20)
@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("name", NAMES)
def test_what_was_kept_in_an_odd_folder_is_found_again(tmp_path, name):
    artifacts = Artifacts(folder=str(tmp_path / name))
    answers = CompletionCache(artifacts.completion_cache)
    answers.add("address", ANSWERS)
    assert answers.read("address").equals(ANSWERS)
    scores = ScoreCache(artifacts.score_cache)
    scores.add("scorer", {"text": 0.5})
    assert scores.read("scorer") == {"text": 0.5}
    path = artifacts.tensors("attribution", "m", "s") / "x.safetensors"
    save_tensors(path, {"numbers": np.ones(2)})
    assert artifacts.locate(artifacts.relative(path), made_by="attribution_scores") == path
    warehouse = Warehouse(folder=str(tmp_path / name))
    rows = pl.DataFrame([PLACE | {"check_name": "one", "passed": True}], schema=TABLES["checks"].schema)
    for _ in range(2):
        warehouse.replace_partition("checks", rows, PLACE)
    assert warehouse.read("checks")["check_name"].to_list() == ["one"]
    assert warehouse.path.is_file()


@pytest.mark.trial(20)
@pytest.mark.parametrize(("name", "mend"), [("who?", "without a question mark"), ("bytes\udcff", "is no UTF-8")])
def test_a_name_that_cannot_serve_is_refused_before_any_work(tmp_path, name, mend):
    for resource in (Artifacts(folder=str(tmp_path / name)), Warehouse(folder=str(tmp_path / name))):
        with pytest.raises(ExciseError, match=f"EXCISE_DATA: .*{mend}"):
            resource.root if isinstance(resource, Artifacts) else resource.path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.trial(20)
@pytest.mark.slow
def test_a_whole_audit_in_an_odd_folder_reuses_what_it_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("excise.reporting.figures.save", blank)
    odd = tmp_path / 'it\'s "data" [copy] {a} * %20 #1 ~ für 数据 a=b;c\n!(x)...'
    (odd / "model [1]").mkdir(parents=True)
    house = open_house(odd / "house", save_tiny_model(odd / "model [1]", "llama", numeric=True))
    for drawn in (True, False):
        result = house.run("audit_scenario", "tiny|lamp", strategies=["gap_gradient"], relabellings=0)
        assert result.success, [event.step_failure_data.error for event in result.get_step_failure_events()]
        seen = {
            event.asset_key.to_user_string(): event.materialization.metadata
            for event in result.get_asset_materialization_events()
        }
        for asset in ("completions", "pruned_completions"):
            assert (seen[asset]["completions_drawn"].value > 0) == drawn
    assert sorted(path.name for path in house.data.iterdir()) == [
        "artifacts",
        "cache",
        "excise.duckdb",
        "excise.lock",
        "figures",
        "models",
    ]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for resource in (Artifacts(folder="~/kept"), GPUResource(folder="~/kept")):
        assert resource.folder == "~/kept"
    assert Artifacts(folder="~/kept").root == Warehouse(folder="~/kept").path.parent == tmp_path / "kept"
