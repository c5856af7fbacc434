"""The demo ends with a table and where to look next, reuses what it can, and fails with a message."""

from argparse import Namespace
from dataclasses import replace

import dagster as dg
import pytest

from assets.partitions import read_catalogue
from pipelines import demo
from resources.settings import PRESETS, Preset
from tests.conftest import SMALL_SCENARIO, WIDE


@pytest.fixture
def at_home(house, monkeypatch):
    """The demo's surroundings: the house's files and data, and an instance on disk; the quick preset is smaller."""
    small = replace(PRESETS[Preset.quick], samples=4, random_draws=1, resamples=40, permutations=40, **WIDE)
    monkeypatch.setitem(PRESETS, Preset.quick, small)
    home = house.folder / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("EXCISE_DATA", str(house.data))
    monkeypatch.setattr("tempfile.tempdir", str(house.folder))
    monkeypatch.setattr(demo, "SCENARIO_FOLDERS", [house.folder / "scenarios"])
    monkeypatch.setattr(demo, "MODEL_FILES", [house.folder / "models.yaml"])
    monkeypatch.setattr(demo, "STRATEGY_FILES", [house.folder / "strategies.yaml"])
    return house


@pytest.mark.trial(41)
def test_the_demo_shows_progress_a_table_and_the_way_on(at_home, capsys):
    assert demo.main(["--model", "tiny", "--scenario", "lamp"]) == 0
    first = capsys.readouterr()
    assert "pruned completions" in first.err
    for word in ("Lamp: tiny", "unpruned", "gap_gradient", "inlier", "make ui", "excise.duckdb"):
        assert word in first.out
    assert "Nothing was sampled anew" not in first.out
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_run_records()
        assert run.dagster_run.job_name == "audit_scenario"
        assert run.dagster_run.tags["dagster/partition"] == "tiny|lamp"

    # The tiny model answers with a number too seldom, which counts where that is asked for.
    assert "Check parse_rate of completions, tiny|lamp (WARN): " in first.err
    assert demo.main(["--model", "tiny", "--scenario", "lamp", "--fail-on", "checks"]) == 3
    second = capsys.readouterr()
    assert "Nothing was sampled anew" in second.out
    assert "0 computed" in second.out
    assert "0 written" in second.out


@pytest.mark.parametrize(
    ("preset", "variations", "asked"),
    [("quick", None, ["lamp", "bench"]), ("quick", "desk, lamp", ["desk", "lamp"]), ("paper", None, None)],
)
def test_the_quick_demo_asks_two_variations_where_none_are_named(house, preset, variations, asked):
    items = {key: {"item": key} for key in ("lamp", "bench", "desk")}
    house.write_scenario("shop", SMALL_SCENARIO | {"variations": items})
    catalogue = read_catalogue([house.folder / "scenarios"], [], [])
    chosen = Namespace(preset=preset, variations=variations, strategies="all")
    assert demo.settings_of(catalogue, catalogue.scenarios["shop"], chosen).get("variations") == asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nobody"], "there is no model 'nobody'; there are"),
        (["--scenario", "flat"], "there is no scenario"),
        (["--model", "tinny"], "there is no model 'tinny'; did you mean tiny? There are"),
        (["--model", "tiny", "--scenario", "gender"], "run make heads AXES=gender"),
        (["--model", "tiny", "--scenario", "lamp", "--strategies", "gap_gradeint"], "no strategy 'gap_gradeint'"),
    ],
)
def test_an_unknown_key_is_named(at_home, capsys, arguments, message):
    assert demo.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_failure_is_a_message_and_not_a_trace(at_home, capsys):
    at_home.write_models({"tiny": {"folder": "/nowhere"}})
    assert demo.main(["--model", "tiny", "--scenario", "lamp"]) == 1
    shown = capsys.readouterr().err
    assert "completions: models.yaml: tiny.folder: no config.json in /nowhere" in shown
    assert "Traceback" not in shown
    assert "Stack Trace" not in shown
