"""The second paper's command on a tiny model and a tiny classifier: two axes, every method, transfer, a rerun.

One run is shared by all tests. What is expected is computed anew from the stored rows.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from excise.evaluation.metrics import standardized_mean_difference, toxicity_bias
from excise.interventions.kinds import load_mask
from excise.strategies.selection import fasp
from pipelines import definitions, heads, paper
from resources.tables import METRICS
from resources.warehouse import Warehouse
from tests.conftest import SMALL_SCENARIO, blank

TEMPLATES = {
    "told": "The {name} {noun} said",
    "met": "I met that {name} {noun}",
    "why": "Why is the {name} {noun}",
    "how": "How did this {name} {noun}",
}
AXES = {
    "belief": {"sun": ["solar", "sunny"], "moon": ["lunar", "moonlit"], "star": ["stellar", "starry"]},
    "origin": {"hill": ["hilly", "alpine"], "lake": ["aquatic", "lakeside"]},
}
STRATEGIES = {
    "fasp": {
        "outcomes": ["toxicity"],
        "score": "head_impacts",
        "selection": "fasp",
        "parameters": {"alpha": [0.1, 0.3], "gamma": 0.3},
        "levels": ["own_scenario", "cross_context"],
    },
    "gap_gradient": {"parameters": {"significance": 1, "density": 0.01}},
    "magnitude": {
        "outcomes": ["toxicity"],
        "score": "head_magnitude",
        "selection": "lowest",
        "parameters": {"alpha": 0.3},
        "controls": [],
    },
    **{
        key: {"enabled": False, "score": "head_random", "selection": "lowest", "parameters": {"alpha": 0.1}}
        for key in ("fairness_only", "performance_only", "gradient", "random_heads")
    },
    "fasp_gamma": {
        "outcomes": ["toxicity"],
        "score": "head_impacts",
        "selection": "fasp",
        "controls": [],
        "parameters": {"alpha": 0.3, "gamma": [0, 0.5]},
    },
}
SETTINGS = ["samples=3", "resamples=40", "random_draws=1", "text_tokens=300", "max_new_tokens=4", "alphas=0.1,0.3"]
OPTIONS = [part for each in SETTINGS for part in ("--set", each)]


def axis(key: str) -> dict:
    return {
        "title": key,
        "description": "An axis of two or three groups.",
        "outcome": {"kind": "toxicity"},
        "comparison": dict(zip(("majority", "minority"), AXES[key], strict=False)),
        "groups": {group: {"label": group, "subjects": words} for group, words in AXES[key].items()},
        "templates": TEMPLATES,
        "variations": {"person": {"noun": "person"}},
    }


@dataclass
class House:
    folder: Path
    printed: list[tuple[int, str, str]]

    @property
    def warehouse(self) -> Warehouse:
        return Warehouse(folder=str(self.folder / "data"))

    def run(self, *arguments: str) -> tuple[int, str, str]:
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = heads.main(["--model", "tiny", *OPTIONS, *arguments])
        self.printed.append((code, out.getvalue(), errors.getvalue()))
        return self.printed[-1]

    def read(self, table: str, scenario: str) -> pl.DataFrame:
        return self.warehouse.read(table, model="tiny", scenario=scenario)


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_model, tiny_classifier) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    for name in ("scenarios", "home"):
        (folder / name).mkdir()
    (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    models = {"tiny": tiny_model("gpt2"), "numeric": tiny_model("llama", numeric=True)}
    entries = {key: {"folder": str(place)} for key, place in models.items()}
    (folder / "models.yaml").write_text(yaml.safe_dump(entries))
    (folder / "strategies.yaml").write_text(yaml.safe_dump(STRATEGIES))
    scorer = {"negative-wording": {"folder": str(tiny_classifier), "label": "harsh"}}
    (folder / "scorers.yaml").write_text(yaml.safe_dump(scorer))
    lamp = SMALL_SCENARIO | {"outcome": SMALL_SCENARIO["outcome"] | {"max_new_tokens": 5}}
    (folder / "scenarios" / "lamp.yaml").write_text(yaml.safe_dump(lamp, sort_keys=False))
    for key in AXES:
        (folder / "scenarios" / f"{key}.yaml").write_text(yaml.safe_dump(axis(key), sort_keys=False))
    made = House(folder, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(folder / "home"))
        patch.setenv("EXCISE_DATA", str(folder / "data"))
        patch.setattr("tempfile.tempdir", str(folder))
        files = {
            "SCENARIO_FOLDERS": [folder / "scenarios"],
            "MODEL_FILES": [folder / "models.yaml"],
            "STRATEGY_FILES": [folder / "strategies.yaml"],
            "SCORER_FILES": [folder / "scorers.yaml"],
        }
        for name, value in files.items():
            patch.setattr(heads, name, value)
            if name != "SCORER_FILES":
                patch.setattr(paper, name, value)
        keywords = {name.lower(): value for name, value in files.items()}
        patch.setattr(
            heads, "build_definitions", lambda **options: definitions.build_definitions(**keywords, **options)
        )
        made.run("--scenarios", "belief,origin")
        yield made


def test_the_command_ends_with_every_method_and_a_finding(house):
    code, out, errors = house.printed[0]
    assert code == 0, errors
    for line in ("fasp-0.10", "fasp-0.30", "magnitude", "random (of fasp-0.30)", "Unpruned bias", "belief: tiny"):
        assert line in out
    assert "prepare_heads tiny|belief: done" in errors
    for name in ("trade_off", "head_map", "toxicity_by_subgroup"):
        for key, place in (("belief", "tiny"), ("origin", "tiny")):
            folder = house.folder / "data" / "figures" / place / key
            if name != "trade_off":
                assert (folder / f"{name}.png").stat().st_size > 5000


def test_continuations_are_raw_scored_and_split_by_template(house):
    rows = house.read("completions", "belief")
    prompts = house.warehouse.read("prompts", scenario="belief")
    assert rows.height == 3 * 2 * 4 * 3
    assert set(rows["split"]) == {"attribution", "evaluation"}
    assert rows.group_by("template").agg(pl.col("split").n_unique())["split"].to_list() == [1] * 4
    assert rows["value"].drop_nulls().is_between(0, 1).all()
    assert rows["value"].n_unique() > 10
    assert rows.group_by("prompt_id").agg(pl.col("prompt_value").n_unique())["prompt_value"].to_list() == [1] * 24
    assert prompts.height == 24
    assert rows["tokens"].max() <= 4


def test_fasp_prunes_the_heads_that_the_selection_names(house):
    impacts = house.read("head_impacts", "belief").sort("layer", "head")
    assert impacts.height == 12
    expected = fasp(impacts["perplexity_without"].to_numpy(), impacts["bias_without"].to_numpy(), 0.3, 0.3)
    (path,) = (
        house.read("masks", "belief")
        .filter((pl.col("strategy") == "fasp-0.30") & (pl.col("level") == "own_scenario"))["path"]
        .unique()
    )
    mask = load_mask(house.folder / "data" / path)
    chosen = np.concatenate([mask.array(f"{layer}.head_output")[0] for layer in range(3)])
    np.testing.assert_array_equal(np.flatnonzero(chosen), expected)
    assert len(expected) == 3
    smallest = house.read("masks", "belief").filter(pl.col("strategy") == "magnitude").select("path").unique().item()
    lowest = load_mask(house.folder / "data" / smallest)
    chosen = np.concatenate([lowest.array(f"{layer}.head_output")[0] for layer in range(3)])
    np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(np.argsort(impacts["magnitude"].to_numpy())[:3]))


def test_metrics_are_those_of_the_stored_continuations(house):
    metrics = house.read("metrics", "belief").filter(pl.col("variation") == "(all)")

    def metric(strategy, name, level="own_scenario"):
        rows = metrics.filter(
            (pl.col("strategy") == strategy)
            & (pl.col("metric") == name)
            & pl.col("matched_to").is_null()
            & pl.col("level").is_in([level, "none"])
        )
        return rows["estimate"].item()

    judged = house.read("completions", "belief").filter(pl.col("split") == "evaluation")
    before = toxicity_bias(judged["value"].to_numpy(), judged["group"].to_numpy())
    assert metric("unpruned", "toxicity_bias") == pytest.approx(before)
    pruned = house.read("pruned_completions", "belief").filter(
        (pl.col("strategy") == "fasp-0.30") & (pl.col("level") == "own_scenario")
    )
    after = toxicity_bias(pruned["value"].to_numpy(), pruned["group"].to_numpy())
    assert metric("fasp-0.30", "toxicity_bias") == pytest.approx(after)
    assert metric("fasp-0.30", "bias_reduction") == pytest.approx(1 - after / before)
    assert set(pruned["prompt_id"]) == set(judged["prompt_id"])
    texts = house.read("perplexity", "belief")
    base = texts.filter(pl.col("mask") == "unpruned")["perplexity"].item()
    mask = pruned["mask"].unique().item()
    assert metric("fasp-0.30", "perplexity_ratio") == pytest.approx(
        texts.filter(pl.col("mask") == mask)["perplexity"].item() / base
    )


def test_alpha_and_gamma_are_chosen_within_the_perplexity_budget(house):
    metrics = house.read("metrics", "belief").filter(
        (pl.col("variation") == "(all)")
        & pl.col("matched_to").is_null()
        & pl.col("level").is_in(["none", "own_scenario"])
    )
    bias, ratio = (
        dict(metrics.filter(pl.col("metric") == name).select("strategy", "estimate").iter_rows())
        for name in ("toxicity_bias", "perplexity_ratio")
    )
    tried = {"fasp-0.10", "fasp-0.30", "fasp_gamma-0.00", "fasp_gamma-0.50"}
    within = {key for key in tried if ratio[key] <= 1.05}
    best = min({*within, "unpruned"}, key=lambda key: bias[key])
    told = next(line for line in house.printed[0][1].splitlines() if "pairs of alpha and gamma" in line)
    assert f"Of 4 pairs of alpha and gamma {len(within)} raise perplexity by at most 5 %" in told
    assert ("none with a lower bias" if best == "unpruned" else f"({best})") in told
    assert (house.folder / "data" / "figures" / "tiny" / "belief" / "gamma_sweep.png").stat().st_size > 5000


def test_every_metric_is_documented(house):
    found = {name.partition("/")[0] for name in house.read("metrics", "belief")["metric"]}
    assert found <= {name.partition("/")[0] for name in METRICS}


def test_heads_of_one_axis_are_tried_on_the_other_and_impacts_correlated(house):
    transferred = house.read("metrics", "origin").filter(pl.col("level") == "cross_context/belief")
    assert {"fasp-0.10", "fasp-0.30"} <= set(transferred["strategy"])
    own = house.read("masks", "belief").filter(
        (pl.col("strategy") == "fasp-0.30") & (pl.col("level") == "own_scenario")
    )
    lent = house.read("masks", "origin").filter(
        (pl.col("strategy") == "fasp-0.30") & (pl.col("level") == "cross_context/belief")
    )
    assert own["mask"].unique().to_list() == lent["mask"].unique().to_list()
    correlations = house.warehouse.read("bias_correlation", model="tiny")
    z = [house.read("head_impacts", key).sort("layer", "head")["z_bias"].to_numpy() for key in ("belief", "origin")]
    row = correlations.filter(
        (pl.col("statistic") == "pearson")
        & (pl.col("heads") == "all")
        & (pl.col("measure") == "z_bias")
        & (pl.col("other_measure") == "z_bias")
        & (pl.col("scenario") != pl.col("other_scenario"))
    )
    assert row["estimate"][0] == pytest.approx(np.corrcoef(*z)[0, 1])


@pytest.fixture
def without_pictures(monkeypatch):
    """Further runs need not write them again."""
    monkeypatch.setattr("excise.reporting.figures.save", blank)


@pytest.mark.usefixtures("without_pictures")
def test_a_rerun_samples_and_measures_nothing_anew(house):
    files = {file: file.stat().st_mtime_ns for file in (house.folder / "data").rglob("*.safetensors")}
    before = house.read("metrics", "belief")
    code, _, _ = house.run("--scenarios", "belief,origin")
    assert code == 0
    assert {file: file.stat().st_mtime_ns for file in (house.folder / "data").rglob("*.safetensors")} == files
    assert house.read("metrics", "belief").equals(before)


def test_what_is_not_there_is_named(house):
    for arguments, named in (
        (["--scenarios", "sky"], "no scenario 'sky'"),
        (["--scenarios", "purchase"], "strategies=fasp"),
        (["--scenarios", "belief", "--set", "strategies=nothing"], "nothing"),
        (["--scenarios", "belief", "--set", "impact_method=guess"], "impact_method"),
        (["--scenarios", ","], "name one at least"),
        (["--scenarios", "belief", "--set", "text=/nowhere.txt"], "/nowhere.txt: cannot be read"),
        (["--scenarios", "beleif"], "did you mean belief?"),
    ):
        code, _, errors = house.run(*arguments)
        assert code == 2
        assert named in errors


@pytest.mark.usefixtures("without_pictures")
def test_fasp_runs_on_numbers(house):
    """Heads are ranked by what their removal does to the mean of |SMD| (FASP's selection on BDB's disparity)."""
    out, errors = io.StringIO(), io.StringIO()
    settings = [
        "strategies=fasp,magnitude",
        "samples=4",
        "subjects_per_group=4",
        "resamples=40",
        "permutations=40",
        "random_draws=1",
        "text_tokens=300",
        "alphas=0.3",
        "held_out=true",
    ]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        options = [part for each in settings for part in ("--set", each)]
        code = heads.main(["--model", "numeric", "--scenarios", "lamp", *options])
    assert code == 0, errors.getvalue()
    impacts = house.warehouse.read("head_impacts", model="numeric", scenario="lamp").sort("layer", "head")
    assert impacts.height == 18
    learned = house.warehouse.read("completions", model="numeric", scenario="lamp").filter(
        (pl.col("split") == "attribution") & pl.col("value").is_not_null()
    )
    gaps = []
    for (_,), rows in learned.group_by("variation"):
        values = [rows.filter(pl.col("group") == group)["value"].to_numpy() for group in ("white", "black")]
        gaps.append(abs(standardized_mean_difference(*values, winsorize=(0.05, 0.95))))
    assert impacts["bias_with"][0] == pytest.approx(np.nanmean(gaps))
    metrics = house.warehouse.read("metrics", model="numeric", scenario="lamp", variation="(all)")
    pruned = metrics.filter(pl.col("level") == "own_scenario")
    assert {"fasp-0.30", "magnitude"} <= set(pruned["strategy"])
    assert pruned.filter(pl.col("metric") == "abs_smd")["estimate"].is_not_null().all()


@pytest.mark.usefixtures("without_pictures")
def test_the_first_papers_strategies_run_on_axes(house, capsys):
    """Wanda's set difference and gap_gradient compare the axis' two named groups, by toxicity."""
    settings = [
        "strategies=set_difference,gap_gradient",
        "spread_floor=0",
        "commonest_budget=1",
        "change_budget=100",
        "samples=3",
        "resamples=40",
        "random_draws=1",
        "text_tokens=300",
        "max_new_tokens=4",
        "relabellings=0",
    ]
    options = [part for each in settings for part in ("--set", each)]
    code = paper.main(["--model", "tiny", "--scenarios", "belief,origin", "--preset", "quick", *options])
    assert code == 0, capsys.readouterr().err
    for key in AXES:
        metrics = house.read("metrics", key).filter(pl.col("metric") == "toxicity_bias")
        found = set(metrics.filter(pl.col("matched_to").is_null())["strategy"])
        assert {"unpruned", "set_difference"} <= found <= {"unpruned", "set_difference", "gap_gradient"}
        # Few continuations of a random model: a mask may be looked for in vain.
        paths = house.read("mask_paths", key)
        assert set(paths["strategy"]) == {"gap_gradient"}
        levels = set(paths["level"])
        assert {"prompt_specific", "cross_context", "all_contexts"} <= levels
