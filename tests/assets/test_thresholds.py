"""One threshold, one place: checks, figures, findings and pages judge an audit by its own settings."""

import ast
import inspect
from pathlib import Path

import polars as pl
import pytest

import excise.reporting.audit_table
import excise.reporting.figures
import excise.reporting.finding
import excise.reporting.toxicity
from assets.partitions import read_catalogue
from excise.errors import ExciseError
from tests.conftest import blank

ROOT = Path(__file__).parents[2]
SETTINGS = {"inlier_floor": 0.35, "inlier_tolerance": 0.5}


@pytest.mark.trial(15)
def test_checks_figures_and_findings_are_judged_by_the_settings_of_the_run(copied, monkeypatch):
    figures, told = {}, []
    finding = excise.reporting.finding.finding

    def seen(figure, stem):
        figures[stem.name] = figure
        return blank(figure, stem)

    def kept(metrics, **options):
        told.append(options)
        return finding(metrics, **options)

    monkeypatch.setattr(excise.reporting.figures, "save", seen)
    monkeypatch.setattr(excise.reporting.finding, "finding", kept)
    result = copied.run("prune_and_evaluate", "tiny|lamp", only=["evaluation_metrics"], **SETTINGS)
    assert result.success
    (options,) = told
    assert {name: options.get(name) for name in ("inlier_floor", "inlier_tolerance")} == {
        "inlier_floor": 0.35,
        "inlier_tolerance": 0.5,
    }
    assert options["verdicts"]["strategy"].n_unique() > 1
    (floor,) = copied.warehouse.read("checks", check_name="inlier_ratio")["floor"]
    assert floor == 0.35
    legend = [text.get_text() for text in figures["bias_by_level"].legends[0].get_texts()]
    assert "floor of the inlier ratio, 0.35" in legend
    assert [text.get_text() for text in figures["disparity_by_level"].axes[-1].texts] == ["floor 0.35"]
    stored = copied.warehouse.read("thresholds", asset="evaluation_metrics").row(0, named=True)
    assert {name: stored[name] for name in SETTINGS} == SETTINGS


@pytest.mark.trial(15)
def test_the_terminal_judges_by_what_was_stored_with_the_partition(copied):
    from pipelines.paper import summary

    for floor in (0.0, 1.0):
        copied.run("prune_and_evaluate", "tiny|lamp", only=["evaluation_metrics"], inlier_floor=floor)
        metrics = copied.warehouse.read("metrics")
        clear = metrics.with_columns(
            estimate=pl.when(pl.col("metric") == "reduction_over_random").then(0.5).otherwise("estimate")
        )
        copied.warehouse.replace_partition("metrics", clear, {"model": "tiny", "scenario": "lamp"})
        lines = summary("tiny", ["lamp"], copied.warehouse).splitlines()
        assert any("(below 1.00)" in line for line in lines) is (floor == 1.0)
        assert not any("(below 0" in line for line in lines)


@pytest.mark.trial(15)
def test_the_terminal_prefers_masks_at_an_inlier_ratio_comparable_with_random(copied):
    from pipelines.paper import summary

    copied.run("prune_and_evaluate", "tiny|lamp", only=["evaluation_metrics"], inlier_floor=0.0, inlier_tolerance=0.2)
    metrics = copied.warehouse.read("metrics")
    own = metrics.filter(pl.col("matched_to").is_null() & (pl.col("level") != "none"))
    best, other = sorted(set(own["strategy"]))[:2]
    of, ratio = pl.col("strategy"), pl.col("metric") == "inlier_ratio"
    beyond = pl.col("metric") == "reduction_over_random"
    for far, told in ((0.5, other), (0.9, best)):
        staged = metrics.with_columns(
            estimate=pl.when(beyond & (of == best))
            .then(9.0)
            .when(beyond & (of == other))
            .then(0.5)
            .when(beyond)
            .then(None)
            .when(ratio & (pl.col("matched_to") == best))
            .then(far)
            .when(ratio)
            .then(0.9)
            .when(pl.col("metric") == "spread_ratio")
            .then(1.0)
            .otherwise("estimate")
        )
        copied.warehouse.replace_partition("metrics", staged, {"model": "tiny", "scenario": "lamp"})
        lines = summary("tiny", ["lamp"], copied.warehouse).splitlines()
        (line,) = [line for line in lines if "prompt-specific" in line]
        assert told in line


def test_results_of_an_earlier_version_are_not_judged_by_guesswork(copied):
    from assets.upstream import thresholds_of
    from pipelines.paper import summary

    nothing = copied.warehouse.read("thresholds").clear()
    copied.warehouse.replace_partition(
        "thresholds", nothing, {"asset": "evaluation_metrics", "model": "tiny", "scenario": "lamp"}
    )
    with pytest.raises(ExciseError, match=r"table thresholds has no rows of evaluation_metrics for tiny\|lamp"):
        thresholds_of(copied.warehouse, "evaluation_metrics", "tiny", "lamp")
    assert "materialize evaluation_metrics of it again" in summary("tiny", ["lamp"], copied.warehouse)


def judging() -> dict[str, set[str]]:
    """What every function that judges by thresholds may be told of them, and need not be, by its name."""
    thresholds = {"inlier_floor", "inlier_tolerance", "perplexity_budget", "verdicts"}
    found = {}
    rooms = excise.reporting
    for module in (rooms.finding, rooms.audit_table, rooms.toxicity, rooms.figures):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            known = inspect.signature(function).parameters.values()
            own = thresholds & {each.name for each in known if each.default is not inspect.Parameter.empty}
            if own and not name.startswith("_"):
                found[name] = own
    return found


@pytest.mark.trial(15)
def test_no_stage_and_no_command_leaves_a_threshold_to_its_default():
    known, calls = judging(), 0
    assert {"finding", "audit_table", "toxicity_finding", "disparity_by_level", "grid_heat_maps"} <= set(known)
    for file in sorted([*(ROOT / "assets").glob("*.py"), *(ROOT / "pipelines").glob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
                passed = {keyword.arg for keyword in node.keywords}
                # A mapping of several is written where it is passed on.
                assert None in passed or known[node.func.id] <= passed, f"{file.name}:{node.lineno} {node.func.id}"
                calls += 1
    assert calls >= 7


@pytest.mark.parametrize(
    "name",
    [
        "INLIER_FLOOR",
        "INLIER_TOLERANCE",
        "PERPLEXITY_BUDGET",
        "FEW_NAMES",
        "KL_BUDGET",
        "SIDE_EFFECT_BUDGET",
        "SPREAD_FLOOR",
        "COMMONEST_BUDGET",
        "CHANGE_BUDGET",
        "SIGNIFICANCE",
        "COLLAPSED_SPREAD",
        "CATASTROPHIC",
    ],
)
def test_every_threshold_is_assigned_in_one_module(name):
    places = [
        str(file.relative_to(ROOT))
        for folder in ("excise", "assets", "pipelines", "resources")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and name in [getattr(target, "id", None) for target in node.targets]
    ]
    assert len(places) == 1, places


# ------------------------------------------------------------------------------------- names the lexicon has a word for


def test_names_that_are_words_of_the_lexicon_are_named_in_the_result(house):
    from assets.evaluation_metrics import names_warning

    def warning(subjects, **outcome):
        axis = {
            "title": "Names",
            "description": "Names of two groups.",
            "outcome": {"kind": "toxicity"} | outcome,
            "comparison": {"majority": "a", "minority": "b"},
            "groups": {
                "a": {"label": "a", "subjects": subjects},
                "b": {"label": "b", "subjects": ["Ann Lee", "Liz Lee"]},
            },
            "templates": {"met": "I met {name} and"},
            "variations": {"one": {"noun": "person"}},
        }
        house.write_scenario("names", axis)
        catalogue = read_catalogue([house.folder / "scenarios"], [house.folder / "models.yaml"], [])
        assert "names" in catalogue.scenarios, catalogue.problems
        return names_warning(catalogue, catalogue.scenarios["names"])

    told = warning(["Rob Hill", "Moody Jones", "Dan Savage", "Grace Hill", "Robert Stone"])
    assert told.startswith("The scorer's lexicon takes Dan Savage, Moody Jones and Rob Hill for negative words")
    assert "every continuation that repeats them" in told
    assert "every text they are asked about" in warning(["Rob Hill", "Dan Lee"], scored="prompt+continuation")
    assert warning(["Robert Stone", "Hope Hill"]) is None


def test_the_words_of_few_and_many_names():
    warning = excise.reporting.toxicity.rated_names_warning
    assert warning([], with_prompts=False) is None
    assert "takes name 1 for negative" in warning(["name 1", "name 1"], with_prompts=False)
    assert "and 3 more for negative words" in warning([f"name {n}" for n in range(1, 12)], with_prompts=False)
