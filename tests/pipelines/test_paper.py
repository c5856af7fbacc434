"""The paper's command on a tiny model: three scenarios, all levels, held-out names, a failure and its rerun.

One house is run through once and read by all tests: first a scenario with too few names fails, then its file is mended
and only what failed is run again. What is expected is computed anew from the stored files with numpy.
"""

import argparse
import contextlib
import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml

from assets.cross_context_masks import left_out
from assets.partitions import read_catalogue
from assets.upstream import source_masks
from excise.attribution import attribute
from excise.errors import ExciseError
from excise.evaluation.mask_tables import overlap_rows
from excise.interventions.kinds import load_mask
from excise.interventions.packed import Mask
from pipelines import paper, results
from pipelines.definitions import build_definitions
from resources.gpu import GPUResource
from resources.warehouse import Warehouse
from tests.conftest import blank
from tests.end_to_end.dagster_ui import CHROMEDRIVER, CHROMIUM, NO_BROWSER, browser_page, dagster_dev

SURNAMES = {"white": "Becker", "black": "Washington"}
NAMES = {
    "white": {"men": ["Luke", "Neil"], "women": ["Jill", "Amy"]},
    "black": {"men": ["Jamal", "Tyrone"], "women": ["Ebony", "Tyra"]},
}
ITEMS = {"lamp": ("lamp", "bench"), "purchase": ("sofa", "stove"), "vase": ("vase", "clock")}
STRATEGIES = {
    "set_difference": {
        "enabled": False,
        "score": "wanda",
        "selection": "set_difference",
        "parameters": {"tau_min": 0.4, "tau_maj": 0.35},
        "roles": ["q"],
    },
    "gap_gradient": {
        "score": "gap_gradient",
        "selection": "measured_path",
        "parameters": {"density": 0.003, "significance": 1, "lost": 1},
        "roles": ["v", "o", "down"],
        "levels": ["prompt_specific", "within_context", "cross_context", "all_contexts"],
    },
    "attention_heads": {
        "enabled": False,
        "score": "attention",
        "selection": "set_difference",
        "ablation": "zero_query",
        "parameters": {"k_min": 8, "k_maj": 4},
    },
    "weights": {
        "score": "wanda",
        "selection": "set_difference",
        "parameters": {"tau_min": 0.4, "tau_maj": 0.3},
        "roles": ["q", "down"],
    },
    "heads": {
        "score": "attention",
        "selection": "set_difference",
        "ablation": "zero_query",
        "parameters": {"k_min": 9, "k_maj": 3},
    },
}
COMMAND = ["--model", "tiny", "--scenarios", "lamp,purchase,vase", "--preset", "quick"]
SETTINGS = {
    "samples": "12",
    "subjects_per_group": "4",
    "held_out": "true",
    "per_source": "true",
    "random_draws": "1",
    "relabellings": "0",
    "resamples": "30",
    "permutations": "30",
}
OPTIONS = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
LEVELS = {"prompt_specific", "within_context", "cross_context"}


def scenario(key: str, names: int = 4) -> dict:
    """A scenario of two variations; fewer than four names per group if so wished."""
    groups = copy.deepcopy(NAMES)
    for genders in groups.values():
        genders["women"] = genders["women"][: names - 2]
    return {
        "replaces": key == "purchase",
        "title": key,
        "description": "Two things to buy.",
        "outcome": {
            "kind": "number",
            "unit": "USD",
            "low": 1,
            "high": 100000,
            "scale": "log",
            "better": "higher",
            "max_new_tokens": 5,
        },
        "comparison": {"majority": "white", "minority": "black"},
        "groups": {
            group: {"label": group, "surname": SURNAMES[group], "subjects": subjects}
            for group, subjects in groups.items()
        },
        "templates": {"seller": "A used {item} of {name}. What do I offer, in dollars?"},
        "variations": {item: {"item": item} for item in ITEMS[key]},
    }


@dataclass
class Town:
    """A folder of the user's files with its results and its Dagster instance, and what the commands printed."""

    folder: Path
    printed: list[Any] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    kept: dict[str, pl.DataFrame] = field(default_factory=dict)
    times: dict[Path, int] = field(default_factory=dict)

    @property
    def warehouse(self) -> Warehouse:
        return Warehouse(folder=str(self.folder / "data"))

    @property
    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.get()

    def write(self, key: str, content: dict) -> None:
        (self.folder / "scenarios" / f"{key}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def definitions(self) -> dg.Definitions:
        return build_definitions(
            data_folder=self.folder / "data",
            scenario_folders=[self.folder / "scenarios"],
            model_files=[self.folder / "models.yaml"],
            strategy_files=[self.folder / "strategies.yaml"],
            resource_overrides={
                "gpu": GPUResource(folder=str(self.folder / "data"), device="cpu", lock_folder=str(self.folder))
            },
        )

    def run(self, job: str, key: str, **settings: Any):
        typed = dict(paper.parse_setting(f"{name}={value}") for name, value in SETTINGS.items())
        return (
            self.definitions()
            .resolve_job_def(job)
            .execute_in_process(
                partition_key=key,
                instance=self.instance,
                run_config={
                    "resources": {"settings": {"config": typed | settings}},
                    "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
                },
                raise_on_error=False,
            )
        )

    def masks(self, **where: Any) -> dict[tuple[str, str, str], Mask]:
        """Masks of strategies by (scenario, variation, strategy), opened from their files."""
        rows = self.warehouse.read("masks", model="tiny", matched_to=None, **where)
        chosen = rows.select("scenario", "variation", "strategy", "path").unique().rows()
        return {tuple(place): load_mask(self.folder / "data" / path) for *place, path in chosen}

    def latest(self, asset: str, partition: str) -> dict[str, Any]:
        """Metadata of a partition's latest materialization."""
        filters = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[partition])
        (record,) = self.instance.fetch_materializations(filters, limit=1).records
        return {name: value.value for name, value in record.asset_materialization.metadata.items()}


@pytest.fixture(scope="module")
def town(tmp_path_factory, tiny_model) -> Iterator[Town]:
    """The paper on three scenarios, of which `vase` fails at first and is mended; shared, so only read it."""
    folder = tmp_path_factory.mktemp("town")
    (folder / "scenarios").mkdir()
    (folder / "home").mkdir()
    (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    (folder / "models.yaml").write_text(yaml.safe_dump({"tiny": {"folder": str(tiny_model("llama", numeric=True))}}))
    (folder / "strategies.yaml").write_text(yaml.safe_dump(STRATEGIES))
    made = Town(folder)
    for key in ("lamp", "purchase"):
        made.write(key, scenario(key))
    made.write("vase", scenario("vase", names=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(folder / "home"))
        patch.setenv("EXCISE_DATA", str(folder / "data"))
        patch.setattr("tempfile.tempdir", str(folder))
        patch.setattr(paper, "SCENARIO_FOLDERS", [folder / "scenarios"])
        patch.setattr(paper, "MODEL_FILES", [folder / "models.yaml"])
        patch.setattr(paper, "STRATEGY_FILES", [folder / "strategies.yaml"])
        with pytest.MonkeyPatch.context() as quick:  # drawing takes the most time; the second command draws everything
            quick.setattr("excise.reporting.figures.save", blank)
            run(made, [*COMMAND, *OPTIONS])
        made.kept = {table: made.warehouse.read(table, model="tiny") for table in ("completions", "masks", "metrics")}
        made.times = {file: file.stat().st_mtime_ns for file in (folder / "data" / "artifacts").rglob("*.safetensors")}
        made.write("vase", scenario("vase"))
        run(made, [*COMMAND, *OPTIONS, "--failed"])
        yield made


def run(town: Town, arguments: list[str]) -> None:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        town.codes.append(paper.main(arguments))
    town.printed.append((out.getvalue(), errors.getvalue()))


def shared(*masks: Mask) -> dict[str, np.ndarray]:
    """What all masks hold, per matrix, by numpy alone."""
    return {key: np.logical_and.reduce([mask.array(key) for mask in masks]) for key in masks[0].shapes}


def same(mask: Mask, arrays: dict[str, np.ndarray]) -> bool:
    return set(mask.shapes) == set(arrays) and all(np.array_equal(mask.array(key), arrays[key]) for key in arrays)


def grid_assets() -> list[str]:
    return [
        "completions",
        "attribution_scores",
        "pruning_masks",
        "cross_context_masks",
        "pruned_completions",
        "restoration",
        "side_effects",
        "evaluation_metrics",
        "stability",
    ]


def stale(town: Town) -> dict[tuple[str, str], set[str]]:
    """Which partitions of the grid Dagster calls stale, and the dependencies that make them so."""
    from dagster._core.definitions.data_version import CachingStaleStatusResolver
    from dagster._core.loader import LoadingContextForTest

    graph = town.definitions().resolve_asset_graph()
    resolver = CachingStaleStatusResolver(town.instance, graph, LoadingContextForTest(town.instance))
    found = {}
    for name in grid_assets():
        for key in ITEMS:
            causes = resolver.get_stale_causes(dg.AssetKey(name), f"tiny|{key}")
            if causes:
                found[name, key] = {
                    f"{each.dependency.asset_key.to_user_string()} {each.dependency.partition_key}" for each in causes
                }
    return found


# ------------------------------------------------------------------------------------------------------- the command


def test_a_scenario_that_fails_does_not_stop_the_others(town):
    out, errors = town.printed[0]
    assert town.codes == [1, 0]
    assert "prepare tiny|lamp: done" in errors
    assert "evaluate tiny|purchase: done" in errors
    assert "analyse tiny: done" in errors
    assert "2 of the runs failed" in out
    assert "prepare_scenario tiny|vase: completions: scenario vase: subjects_per_group is 4, but the group" in out
    assert "evaluate_scenario tiny|vase: not tried, as the preparation failed" in out


def test_the_command_that_reruns_what_failed_is_told_and_runs_nothing_else(town):
    told = " ".join(f"--set {name}={value}" for name, value in SETTINGS.items())
    assert (
        f"make paper MODEL=tiny SCENARIOS=lamp,purchase,vase PRESET=quick ARGS='--failed {told}'" in town.printed[0][0]
    )
    errors = town.printed[1][1]
    for done in ("prepare tiny|lamp", "prepare tiny|purchase", "evaluate tiny|lamp", "evaluate tiny|purchase"):
        assert f"{done}: done before" in errors
    for again in ("prepare tiny|vase", "evaluate tiny|vase", "analyse tiny"):
        assert f"{again}: done in" in errors


def test_the_runs_are_on_the_instance_of_the_folder(town):
    found = [
        (record.dagster_run.job_name, record.dagster_run.tags["dagster/partition"], record.dagster_run.status.value)
        for record in town.instance.get_run_records(ascending=True)
    ]
    assert found[:6] == [
        ("prepare_scenario", "tiny|lamp", "SUCCESS"),
        ("prepare_scenario", "tiny|purchase", "SUCCESS"),
        ("prepare_scenario", "tiny|vase", "FAILURE"),
        ("evaluate_scenario", "tiny|lamp", "SUCCESS"),
        ("evaluate_scenario", "tiny|purchase", "SUCCESS"),
        ("analyse_model", "tiny", "SUCCESS"),
    ]
    assert found[6:9] == [
        ("prepare_scenario", "tiny|vase", "SUCCESS"),
        ("evaluate_scenario", "tiny|vase", "SUCCESS"),
        ("analyse_model", "tiny", "SUCCESS"),
    ]


def test_the_command_ends_with_a_table_of_every_scenario_and_level(town):
    first, second = (out.splitlines() for out, _ in town.printed)
    assert "unpruned |SMD|" in second[0]
    rows = second[2 : 2 + 3 * 4]
    assert [row.split()[1] for row in rows[::4]] == ["lamp", "purchase", "vase"]
    for row in rows[::4]:
        assert "prompt-specific" in row
    for level in ("cross-context", "all-contexts"):
        assert sum(level in row for row in rows) == 3
    assert any("vase" in row and "no results" in row for row in first)


def test_scenarios_evaluated_with_older_masks_of_others_are_named(town):
    assert "Evaluated before" not in town.printed[0][0]
    assert "with older masks of theirs: lamp, purchase." in town.printed[1][0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("samples=16", ("samples", 16)),
        ("temperature=0.7", ("temperature", 0.7)),
        ("held_out=false", ("held_out", False)),
        ("levels=prompt_specific,within_context", ("levels", ["prompt_specific", "within_context"])),
        ("grid_counts=5,10", ("grid_counts", [5, 10])),
        ("grid_taus=.1", ("grid_taus", [0.1])),
    ],
)
def test_a_setting_is_read_in_the_type_of_its_field(text, expected):
    assert paper.parse_setting(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples=many", "samples takes a whole number"),
        ("samples=2.5", "samples takes a whole number"),
        ("held_out=perhaps", "held_out takes true or false"),
        ("grid_taus=a,b", "grid_taus takes a number or several"),
        ("sample=16", "NAME one of variations, subjects_per_group"),
        ("samples", "write NAME=VALUE"),
        ("preset=paper", "NAME one of"),
    ],
)
def test_a_wrong_setting_is_named(text, message):
    with pytest.raises(ExciseError, match=message):
        paper.parse_setting(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nobody"], "there is no model 'nobody'; there are"),
        (["--model", "tiny", "--scenarios", "flat"], "there is no scenario 'flat'; there are"),
        (["--model", "tiny", "--grid", "flat"], "there is no scenario 'flat'"),
        (["--model", "tiny", "--set", "samples=0"], "samples is 0: give at least 1"),
        (["--model", "tiny", "--set", "strategies=magic"], "no strategy 'magic'"),
    ],
)
def test_a_call_that_cannot_work_ends_before_anything_runs(town, capsys, arguments, message):
    before = len(town.instance.get_run_records())
    assert paper.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert len(town.instance.get_run_records()) == before


# ------------------------------------------------------------------------------------------------------------- names


def test_held_out_names_are_the_same_halves_in_every_scenario(town):
    names = town.warehouse.read("completions").select("scenario", "group", "subject", "split").unique()
    sizes = names.group_by("scenario", "group", "split").len()
    assert sizes.height == 3 * 2 * 2
    assert set(sizes["len"]) == {2}
    assert names.select("subject", "split").unique().height == 8


def test_masks_are_made_from_the_one_half_alone(town, tmp_path):
    """The address of a score says what it was computed from, so a new computation finds it, or does not."""
    catalogue = read_catalogue([town.folder / "scenarios"], [town.folder / "models.yaml"], [])
    lamp = catalogue.scenarios["lamp"]
    completions = town.warehouse.read("completions", scenario="lamp").sort("prompt_id", "sample")
    prompts = town.warehouse.read("prompts", scenario="lamp")
    gpu = GPUResource(folder=str(town.folder / "data"), device="cpu", lock_folder=str(tmp_path))
    stored = {(town.folder / "data" / path).name for path in town.warehouse.read("attribution_files")["path"]}

    def computed(rows: pl.DataFrame) -> set[str]:
        with gpu.model("tiny", catalogue.models) as loaded:
            files = attribute(
                loaded,
                prompts,
                rows,
                comparison=lamp.comparison,
                outcome=lamp.outcome,
                scores=["wanda"],
                permutations=0,
                seed=0,
                folder=tmp_path,
            )
        return {file.path.name for file in files}

    assert computed(completions.filter(pl.col("split") == "attribution")) <= stored
    assert not computed(completions) & stored
    assert not computed(completions.filter(pl.col("split") == "evaluation")) & stored


def test_pruned_models_are_judged_on_the_other_half_alone(town):
    names = town.warehouse.read("completions").select("subject", "split").unique()
    held_out = set(names.filter(pl.col("split") == "evaluation")["subject"])
    assert set(town.warehouse.read("pruned_completions")["subject"]) == held_out
    metrics = town.warehouse.read("metrics").filter(pl.col("variation") != "(all)", pl.col("metric") == "inlier_ratio")
    assert set(metrics["n"]) == {len(held_out) * 12}  # twelve samples of each name, under every single mask, too


def test_every_name_has_its_length_in_tokens(town):
    lengths = town.warehouse.read("completions").select("subject", "name_tokens").unique()
    assert lengths.height == 8
    for subject, tokens in lengths.iter_rows():
        assert 2 <= tokens <= len(subject) + 1  # bytes, some merged, perhaps with the space before


def test_other_comparisons_of_the_same_answers_are_kept(town):
    found = town.warehouse.read("comparisons")
    assert set(found["scenario"]) == set(ITEMS)
    assert "gender" in set(found["comparison"])
    assert set(found["metric"]) == set(town.warehouse.read("metrics")["metric"]) - {"judged_variations"}


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("strategy", ["weights", "heads"])
def test_cross_context_masks_are_the_intersection_of_the_other_scenarios_masks(town, strategy):
    own = town.masks(level="prompt_specific", strategy=strategy)
    others = [own[key, item, strategy] for key in ("lamp", "purchase") for item in ITEMS[key]]
    assert len(others) == 4
    pooled = town.masks(level="cross_context", scenario="vase", strategy=strategy)
    assert set(pooled) == {("vase", item, strategy) for item in ITEMS["vase"]}
    assert all(same(mask, shared(*others)) for mask in pooled.values())
    assert any(mask.count for mask in others)
    for source in ("lamp", "purchase"):
        single = town.masks(level=f"cross_context/{source}", scenario="vase", strategy=strategy)
        expected = shared(*(own[source, item, strategy] for item in ITEMS[source]))
        assert len(single) == 2
        assert all(same(mask, expected) for mask in single.values())


def test_weights_across_contexts_are_some_and_fewer_than_anyone_s_own(town):
    own = town.masks(level="prompt_specific", strategy="weights")
    pooled = town.masks(level="cross_context", scenario="vase", strategy="weights")["vase", "clock", "weights"]
    assert 0 < pooled.count < min(mask.count for mask in own.values())


def test_a_scenario_without_masks_yet_is_left_out_and_named(town):
    own = town.masks(level="prompt_specific", strategy="weights")
    lamp = town.masks(level="cross_context", scenario="lamp", strategy="weights")["lamp", "bench", "weights"]
    assert same(lamp, shared(*(own["purchase", item, "weights"] for item in ITEMS["purchase"])))
    metadata = town.latest("cross_context_masks", "tiny|lamp")
    assert metadata["scenarios_used"] == "purchase"
    assert "vase" in metadata["left_out"]
    assert town.latest("cross_context_masks", "tiny|vase")["scenarios_used"] == "lamp, purchase"


def test_random_controls_across_contexts_have_as_many_weights_in_every_matrix(town):
    masks = town.warehouse.read("masks", asset="cross_context_masks")
    keys = ["scenario", "variation", "level", "layer", "role"]
    own = masks.filter(pl.col("matched_to").is_null()).select(*keys, matched_to="strategy", own="pruned")
    controls = masks.filter(pl.col("matched_to").is_not_null()).join(own, on=[*keys, "matched_to"], how="left")
    assert controls.height == own.height
    assert (controls["pruned"] == controls["own"]).all()


def test_every_level_is_sampled_and_evaluated(town):
    usual = {*LEVELS, "cross_context/lamp", "cross_context/purchase"}
    for table in ("masks", "pruned_completions", "metrics"):
        rows = town.warehouse.read(table, scenario="vase", matched_to=None)
        for strategy in ("weights", "heads", "gap_gradient"):
            expected = usual
            if (
                strategy == "gap_gradient"
            ):  # a path of a tiny random model may find no mask for a whole pool, and says so
                lacking = town.warehouse.read("mask_paths", scenario="vase").drop_nulls("reason")
                expected = (usual | {"all_contexts"}) - set(lacking.filter(variation="")["level"])
                assert expected & {"cross_context", "all_contexts"}
            assert set(rows.filter(pl.col("strategy") == strategy)["level"]) == expected, table
    masks = town.warehouse.read("masks", scenario="vase").select("variation", "strategy", "level", "matched_to", "draw")
    pruned = town.warehouse.read("pruned_completions", scenario="vase")
    assert pruned.height == masks.unique().height * 4 * 12


def test_the_density_of_cross_context_masks_is_checked(town):
    checked = town.warehouse.read("checks", asset="cross_context_masks")
    assert set(checked.select("scenario", "check_name").rows()) == {
        (key, check) for key in ITEMS for check in ("mask_density", "rows_as_declared")
    }


def test_masks_are_not_made_across_contexts_without_any_and_not_of_another_model(town, tmp_path):
    catalogue = read_catalogue(
        [town.folder / "scenarios"], [town.folder / "models.yaml"], [town.folder / "strategies.yaml"]
    )
    strategies = catalogue.chosen_strategies(["weights"], ["cross_context"], "number")
    completions = town.warehouse.read("completions", scenario="vase")
    nowhere = Warehouse(folder=str(tmp_path))
    found = source_masks(nowhere, "tiny", "vase", catalogue, strategies, completions)
    assert found.is_empty()
    assert left_out(found, "vase", catalogue.scenarios_like("vase"), strategies, set())[-1] == (
        "weights has no mask across contexts, as no other scenario has one of it"
    )
    changed = completions.with_columns(model_fingerprint=pl.lit("another"))
    with pytest.raises(ExciseError, match="the masks of lamp, purchase are of another version of model tiny"):
        source_masks(town.warehouse, "tiny", "vase", catalogue, strategies, changed)


def test_strategies_that_are_not_enabled_are_left_out_unless_named(town):
    catalogue = read_catalogue([], [], [town.folder / "strategies.yaml"])
    usual = catalogue.chosen_strategies(None, ["prompt_specific", "cross_context"], "number")
    assert {strategy.key for strategy in usual} == {"gap_gradient", "weights", "heads"}
    assert {strategy.levels for strategy in usual} == {("prompt_specific", "cross_context")}
    (named,) = catalogue.chosen_strategies(["attention_heads"], ["cross_context"], "number")
    assert (named.key, named.enabled, named.levels) == ("attention_heads", False, ("cross_context",))


# --------------------------------------------------------------------------------------------------------- staleness


def test_a_rerun_of_one_scenario_leaves_rows_and_files_of_the_others_alone(town):
    for table, before in town.kept.items():
        assert before.height > 0
        assert set(before["scenario"]) == {"lamp", "purchase"}
        now = town.warehouse.read(table, model="tiny", scenario=["lamp", "purchase"])
        assert (
            now.sort(pl.all()).equals(before.sort(pl.all()))
            if table != "completions"
            else now.drop("token_ids").sort(pl.all()).equals(before.drop("token_ids").sort(pl.all()))
        )
    assert town.times
    assert all(file.stat().st_mtime_ns == time for file, time in town.times.items())


def test_dagster_shows_the_other_scenarios_cross_context_masks_as_stale(town):
    changed = {"completions tiny|vase", "attribution_scores tiny|vase", "pruning_masks tiny|vase"}
    others = ("lamp", "purchase")
    assert stale(town) == {("cross_context_masks", key): changed for key in others} | {
        ("stability", key): {"completions tiny|vase"} for key in others
    }


CODE_LOCATION = """
from pathlib import Path

from pipelines.definitions import build_definitions

HERE = Path(__file__).parent
defs = build_definitions(
    data_folder=HERE / "data",
    scenario_folders=[HERE / "scenarios"],
    model_files=[HERE / "models.yaml"],
    strategy_files=[HERE / "strategies.yaml"],
)
"""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=NO_BROWSER)
def test_the_ui_shows_them_as_stale(town):
    location = town.folder / "town_audit.py"
    location.write_text(CODE_LOCATION, encoding="utf-8")
    log = town.folder / "dagster.log"
    with (
        dagster_dev(town.folder / "home", ["-f", str(location)], folder=town.folder, log=log) as ui,
        browser_page(ui) as page,
    ):
        page.open_asset("cross_context_masks", "partitions", "tiny|vase")
        page.shows("tiny|vase", "Materialized", "scenarios_used")
        assert "Unsynced" not in page.text
        page.open_asset("cross_context_masks", "partitions", "tiny|lamp")
        page.shows("tiny|lamp", "scenarios_used", "Unsynced")


# ---------------------------------------------------------------------------------------------------------- analyses


@pytest.mark.parametrize("strategy", ["weights", "heads"])
def test_overlaps_are_shares_of_the_row_s_mask_beside_chance(town, strategy):
    masks = {place[:2]: mask for place, mask in town.masks(level="prompt_specific", strategy=strategy).items()}
    rows = town.warehouse.read("mask_overlap", strategy=strategy)
    assert rows.height == 6 * 2
    assert set(rows["reference_scenario"]) == {"purchase"}
    for row in rows.iter_rows(named=True):
        mask = masks[row["scenario"], row["variation"]]
        reference = masks[row["reference_scenario"], row["reference_variation"]]
        both = sum(int(array.sum()) for array in shared(mask, reference).values())
        assert (row["shared"], row["count"]) == (both, mask.count)
        assert row["overlap"] == pytest.approx(both / mask.count)
        assert row["chance"] == pytest.approx(reference.count / reference.size)
        assert row["excess"] == pytest.approx(row["overlap"] - row["chance"])


def test_without_purchases_every_scenario_is_a_reference(town):
    rows = town.warehouse.read("masks", level="prompt_specific", strategy="heads", scenario=["lamp", "vase"])
    paths = {
        tuple(place): town.folder / "data" / path
        for *place, path in rows.select("scenario", "variation", "path").unique().rows()
    }
    found = overlap_rows("heads", paths)
    assert found.height == 4 * 4
    same_mask = found.filter(
        (pl.col("scenario") == pl.col("reference_scenario")) & (pl.col("variation") == pl.col("reference_variation"))
    )
    assert set(same_mask["overlap"]) == {1.0}


def test_the_distribution_has_every_strategy_s_share_of_every_matrix(town):
    rows = town.warehouse.read("mask_distribution", strategy="weights", level="cross_context", scenario="vase")
    mask = town.masks(level="cross_context", scenario="vase", strategy="weights")["vase", "vase", "weights"]
    for row in rows.filter(pl.col("variation") == "vase").iter_rows(named=True):
        array = mask.array(f"{row['layer']}.{row['role']}")
        assert (row["pruned"], row["size"]) == (array.sum(), array.size)
        assert row["share_of_matrix"] == pytest.approx(array.mean())
        assert row["share_of_mask"] == pytest.approx(array.sum() / mask.count)
    assert set(rows["role"]) == {"q", "down"}
    whole = town.warehouse.read("mask_distribution")
    sums = whole.group_by("scenario", "variation", "strategy", "level").agg(pl.col("share_of_mask").sum())
    assert all(total == pytest.approx(1) or total == 0 for total in sums["share_of_mask"])


def test_the_transfer_matrix_is_the_metrics_by_where_the_masks_come_from(town):
    rows = town.warehouse.read("transfer_matrix", strategy="weights", metric="inlier_ratio", matched_to=None)
    pairs = {(row["source"], row["scenario"]): row for row in rows.iter_rows(named=True)}
    # lamp and purchase were evaluated when vase had no masks yet
    assert set(pairs) == {
        ("lamp", "lamp"),
        ("purchase", "lamp"),
        (None, "lamp"),
        ("lamp", "purchase"),
        ("purchase", "purchase"),
        (None, "purchase"),
        ("lamp", "vase"),
        ("purchase", "vase"),
        ("vase", "vase"),
        (None, "vase"),
    }
    for (source, target), row in pairs.items():
        level = "cross_context" if source is None else f"cross_context/{source}"
        level = "within_context" if source == target else level
        (figure,) = (
            town.warehouse.read(
                "metrics",
                scenario=target,
                variation="(all)",
                strategy="weights",
                level=level,
                metric="inlier_ratio",
                matched_to=None,
            )
            .select("estimate", "low", "high")
            .rows()
        )
        assert (row["level"], row["estimate"], row["low"], row["high"]) == (level, *figure)


def test_analyses_have_their_pictures(town):
    folder = town.folder / "data" / "figures" / "tiny"
    for name in (
        "overlap_weights_with_purchase",
        "overlap_heads_with_purchase",
        "distribution_weights_cross_context",
        "distribution_heads_prompt_specific",
    ):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.svg").is_file()
    assert (folder / "vase" / "bias_by_level.png").is_file()


def test_analyses_name_the_scenarios_they_lack(town):
    for asset in ("mask_overlap", "mask_distribution", "transfer_matrix"):
        metadata = town.latest(asset, "tiny")
        assert metadata["scenarios"] == "lamp, purchase, vase"
        assert "finance" in metadata["scenarios_left_out"]


def test_analyses_without_any_results_say_what_to_do_first(town):
    (town.folder / "models.yaml").write_text((town.folder / "models.yaml").read_text().replace("tiny:", "idle:"))
    try:
        result = (
            town.definitions()
            .resolve_job_def("analyse_model")
            .execute_in_process(
                partition_key="idle",
                instance=dg.DagsterInstance.ephemeral(),
                asset_selection=[dg.AssetKey("transfer_matrix")],
                raise_on_error=False,
            )
        )
    finally:
        (town.folder / "models.yaml").write_text((town.folder / "models.yaml").read_text().replace("idle:", "tiny:"))
    (event,) = result.get_step_failure_events()
    message = event.step_failure_data.user_failure_data.description
    assert message == ("no scenario of idle has results yet; materialize evaluation_metrics of its partitions first")


# -------------------------------------------------------------------------------------------------------------- grid


def test_a_grid_is_sampled_once_and_judged_as_an_audit_is(town, monkeypatch):
    sizes = {"grid_taus": [0.3, 0.4], "grid_counts": [200, 400], "grid_variations": 1, "inlier_floor": 0.0}
    first = town.run("search_grid", "tiny|lamp", **sizes)
    monkeypatch.setattr("excise.reporting.figures.save", blank)
    second = town.run("search_grid", "tiny|lamp", **sizes)
    assert first.success
    assert second.success
    drawn = [
        {name: value.value for name, value in event.materialization.metadata.items()}
        for result in (first, second)
        for event in result.get_asset_materialization_events()
    ]
    # 3 pairs of shares and 5 of counts (0, 4, 7 of 18 heads), 4 held-out names, 12 samples; two pairs were audited
    assert drawn[0]["points"] == 8
    assert drawn[0]["completions_drawn"] + drawn[0]["completions_reused"] == 8 * 4 * 12
    assert drawn[0]["completions_drawn"] > 0
    assert (drawn[1]["completions_drawn"], drawn[1]["completions_reused"]) == (0, 8 * 4 * 12)
    assert "(minority, majority): the smallest raw gap" in drawn[0]["chosen_weights"] or (
        "No point is chosen" in drawn[0]["chosen_weights"]
    )
    rows = town.warehouse.read("grid_search", scenario="lamp", variation="lamp")
    points = set(rows.select("strategy", "tau_min", "tau_maj").rows())
    assert points == {
        *(("weights", *point) for point in ((0.3, 0.3), (0.4, 0.3), (0.4, 0.4))),
        *(("heads", *point) for point in ((4, 0), (4, 4), (7, 0), (7, 4), (7, 7))),
    }
    audited = town.warehouse.read(
        "metrics", scenario="lamp", variation="lamp", strategy="weights", level="prompt_specific", matched_to=None
    )
    point = rows.filter(pl.col("strategy") == "weights", pl.col("tau_min") == 0.4, pl.col("tau_maj") == 0.3)
    for metric in ("gap_mean", "smd", "inlier_ratio"):
        (expected,) = audited.filter(pl.col("metric") == metric)["estimate"]
        (found,) = point.filter(pl.col("metric") == metric)["estimate"]
        assert found == expected


# -------------------------------------------------------------------------------------------------- the page of results


def test_the_page_of_results_is_made_of_what_the_warehouse_holds(town, monkeypatch, tmp_path):
    for name in ("SCENARIO_FOLDERS", "MODEL_FILES", "STRATEGY_FILES"):
        monkeypatch.setattr(results, name, getattr(paper, name))
    monkeypatch.setattr(results, "CALLS", {"tiny": []})
    out = tmp_path / "results.md"
    assert results.main(["--render", "--models", "tiny", "--heads", "", "--out", str(out)]) == 0
    page = out.read_text()
    rows = town.warehouse.read("metrics", model="tiny", scenario="purchase", variation="(all)")
    for strategy, level in (("weights", "prompt_specific"), ("gap_gradient", "prompt_specific")):
        place = (pl.col("strategy") == strategy) & (pl.col("level") == level) & pl.col("matched_to").is_null()
        inliers = rows.filter(place & (pl.col("metric") == "inlier_ratio"))["estimate"].item()
        (line,) = [
            each
            for each in page.splitlines()
            if each.startswith(f"| **{strategy}** | {level.replace('_', '-')} |") and f"{inliers:.2f}" in each
        ][:1]
        assert line.count("|") > 6
    assert "Not measured yet: `python -m pipelines.reweighting`" in page


def test_scenarios_may_lend_masks_without_being_evaluated(town):
    given = {"model": "tiny", "scenarios": "lamp,purchase", "preset": "quick", "set": [], "grid": "", "failed": False}
    catalogue = read_catalogue(paper.SCENARIO_FOLDERS, paper.MODEL_FILES, paper.STRATEGY_FILES)
    for evaluate, wanted in (("none", []), ("purchase", ["tiny|purchase"]), ("", ["tiny|lamp", "tiny|purchase"])):
        call = paper._call(argparse.Namespace(**given, evaluate=evaluate), catalogue)
        steps = {step.key for _, some in paper._steps(call) for step in some if step.job == "evaluate_scenario"}
        prepared = {step.key for _, some in paper._steps(call) for step in some if step.job == "prepare_scenario"}
        assert (sorted(steps), sorted(prepared)) == (wanted, ["tiny|lamp", "tiny|purchase"])
    with pytest.raises(ExciseError, match="--evaluate vase: name it among the scenarios"):
        paper._call(argparse.Namespace(**given, evaluate="vase"), catalogue)
