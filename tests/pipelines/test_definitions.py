"""The code location loads fast and whole; a change of lineage is visible here."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from pipelines.definitions import build_definitions, defs
from pipelines.jobs import ANALYSIS, CHAIN

ROOT = Path(__file__).resolve().parents[2]

# asset: (group, dependencies, pool, partitions)
LINEAGE = {
    "prompts": ("audit", set(), None, "scenario"),
    "completions": ("audit", {"prompts"}, "gpu", "grid"),
    "attribution_scores": ("pruning", {"completions"}, "gpu", "grid"),
    "head_impacts": ("pruning", {"completions"}, "gpu", "grid"),
    "pruning_masks": ("pruning", {"attribution_scores", "head_impacts"}, "gpu", "grid"),
    "cross_context_masks": ("pruning", {"completions", "attribution_scores", "pruning_masks"}, "gpu", "grid"),
    "pruned_completions": ("pruning", {"completions", "pruning_masks", "cross_context_masks"}, "gpu", "grid"),
    "stability": ("evaluation", {"completions", "evaluation_metrics"}, "gpu", "grid"),
    "side_effects": (
        "evaluation",
        {"completions", "pruning_masks", "cross_context_masks", "pruned_completions"},
        "gpu",
        "grid",
    ),
    "evaluation_metrics": (
        "evaluation",
        {"completions", "pruning_masks", "cross_context_masks", "pruned_completions", "side_effects"},
        None,
        "grid",
    ),
    "restoration": (
        "evaluation",
        {"completions", "pruning_masks", "cross_context_masks", "pruned_completions"},
        "gpu",
        "grid",
    ),
    "grid_search": ("analysis", {"completions", "attribution_scores"}, "gpu", "grid"),
    "mask_overlap": ("analysis", {"pruning_masks"}, None, "model"),
    "mask_distribution": ("analysis", {"pruning_masks", "cross_context_masks"}, None, "model"),
    "transfer_matrix": ("analysis", {"evaluation_metrics"}, None, "model"),
    "bias_correlation": ("analysis", {"head_impacts"}, None, "model"),
    "quality_report": (
        "quality",
        {"completions", "pruning_masks", "cross_context_masks", "pruned_completions", "evaluation_metrics"},
        None,
        "none",
    ),
}
CHECKS = {
    ("completions", "completions_complete_and_balanced", True),
    ("completions", "judged_variations", False),
    ("completions", "parse_rate", False),
    ("pruning_masks", "mask_density", False),
    ("cross_context_masks", "mask_density", False),
    ("pruned_completions", "completions_complete_and_balanced", True),
    ("evaluation_metrics", "metrics_finite", False),
    ("evaluation_metrics", "judged_variations", False),
    ("evaluation_metrics", "inlier_ratio", False),
    ("evaluation_metrics", "within_budgets", False),
    ("quality_report", "all_checks_pass", False),
    *((asset, "rows_as_declared", False) for asset, place in LINEAGE.items() if place[3] == "grid"),
}


@pytest.fixture(scope="module")
def graph():
    return defs.resolve_asset_graph()


def test_everything_loads():
    dg.Definitions.validate_loadable(defs)


def partitions(definition: dg.PartitionsDefinition | None) -> str:
    if definition is None:
        return "none"
    if isinstance(definition, dg.MultiPartitionsDefinition):
        return "grid"
    return "scenario" if "purchase" in definition.get_partition_keys() else "model"


def test_the_lineage_is_as_agreed(graph):
    found = {
        key.to_user_string(): (
            graph.get(key).group_name,
            {parent.to_user_string() for parent in graph.get(key).parent_keys},
            next(iter(graph.get(key).pools), None),
            partitions(graph.get(key).partitions_def),
        )
        for key in graph.get_all_asset_keys()
    }
    assert found == LINEAGE


def test_the_checks_are_as_agreed(graph):
    found = {
        (key.asset_key.to_user_string(), key.name, graph.get_check_spec(key).blocking) for key in graph.asset_check_keys
    }
    assert found == CHECKS


def test_every_asset_says_what_it_is(graph):
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description, key
        assert node.kinds, key
        assert node.code_version, key
    for key in graph.asset_check_keys:
        assert graph.get_check_spec(key).description, key


def test_assets_of_the_grid_share_partitions_and_backfill_policy(graph):
    nodes = {name: graph.get(dg.AssetKey(name)) for name in LINEAGE if name != "quality_report"}
    assert len({node.backfill_policy for node in nodes.values()}) == 1
    for kind in ("grid", "model"):
        assert len({node.partitions_def for name, node in nodes.items() if LINEAGE[name][3] == kind}) == 1


def test_masks_across_contexts_depend_on_all_scenarios_of_the_model(graph):
    of = graph.get(dg.AssetKey("completions")).partitions_def
    masks = graph.get(dg.AssetKey("cross_context_masks"))
    scenarios = {key.split("|")[1] for key in of.get_partition_keys()}
    target = of.empty_subset().with_partition_keys(["planted-general|purchase"])
    for upstream in ("attribution_scores", "pruning_masks"):
        found = masks.partition_mappings[dg.AssetKey(upstream)].get_upstream_mapped_partitions_result_for_partitions(
            target, of, of
        )
        keys = {str(key) for key in found.partitions_subset.get_partition_keys()}
        axes = {"gender", "race", "religion", "sexual_orientation", "nationality"}  # another kind of outcome
        assert keys == {f"planted-general|{scenario}" for scenario in scenarios - axes}
        assert len(keys) > 1


def test_the_planted_model_on_purchase_is_a_partition(graph):
    keys = graph.get(dg.AssetKey("completions")).partitions_def.get_partition_keys()
    assert {"planted-specific|purchase", "planted-neutral|purchase", "smollm2-135m-instruct|purchase"} <= set(keys)


@pytest.mark.parametrize(
    ("job", "assets"),
    [
        ("audit_scenario", CHAIN),
        ("prune_and_evaluate", CHAIN[2:]),
        ("prepare_scenario", CHAIN[:3]),
        (
            "evaluate_scenario",
            (
                "cross_context_masks",
                "pruned_completions",
                "side_effects",
                "evaluation_metrics",
                "restoration",
                "stability",
            ),
        ),
        ("search_grid", ("grid_search",)),
    ],
)
def test_jobs_run_their_part_of_the_chain_for_a_partition(job, assets):
    resolved = defs.resolve_job_def(job)
    assert {key.to_user_string() for key in resolved.asset_layer.executable_asset_keys} == set(assets)
    assert isinstance(resolved.partitions_def, dg.MultiPartitionsDefinition)


def test_the_analyses_of_a_model_are_a_job_of_their_own():
    resolved = defs.resolve_job_def("analyse_model")
    assert {key.to_user_string() for key in resolved.asset_layer.executable_asset_keys} == set(ANALYSIS)
    assert "planted-general" in resolved.partitions_def.get_partition_keys()


@pytest.mark.parametrize("preset", ["quick", "paper"])
@pytest.mark.parametrize(
    "job", ["audit_scenario", "prune_and_evaluate", "prepare_scenario", "evaluate_scenario", "search_grid"]
)
def test_presets_are_run_config_of_the_jobs(job, preset):
    config = yaml.safe_load((ROOT / "pipelines" / "presets" / f"{preset}.yaml").read_text())
    assert dg.validate_run_config(defs.resolve_job_def(job), config)


def test_loading_imports_nothing_heavy():
    code = (
        "import sys, pipelines.definitions; "
        "heavy = ('torch', 'transformers', 'great_expectations', 'seaborn', 'matplotlib'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_commands_read_the_user_s_files_once_and_dagster_finds_the_definitions():
    code = (
        "import inspect, pipelines.demo, pipelines.paper, pipelines.definitions as module; "
        "print('defs' in vars(module), 'defs' in dict(inspect.getmembers(module)), 'defs' in vars(module))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True", "True"]


def test_the_data_folder_is_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EXCISE_DATA", str(tmp_path / "elsewhere"))
    assert build_definitions().resources["warehouse"].path == tmp_path / "elsewhere" / "excise.duckdb"
    monkeypatch.delenv("EXCISE_DATA")
    assert build_definitions().resources["warehouse"].path == ROOT / "data" / "excise.duckdb"


def test_a_user_s_scenario_and_model_become_partitions(house):
    keys = house.definitions().resolve_assets_def("completions").partitions_def.get_partition_keys()
    assert "tiny|lamp" in keys
    house.write_scenario("vase", (house.folder / "scenarios" / "lamp.yaml").read_text())
    house.write_models({"other": {"hub": "someone/model"}})
    keys = house.definitions().resolve_assets_def("completions").partitions_def.get_partition_keys()
    assert "other|vase" in keys
    assert "tiny|lamp" not in keys


@pytest.mark.parametrize("file", ["models.yaml", "strategies.yaml"])
def test_a_broken_registry_is_named_and_the_code_location_loads(house, caplog, file):
    (house.folder / file).write_text("broken: {nonsense: 1}")
    assert "smollm2-135m-instruct|purchase" in (
        house.definitions().resolve_assets_def("completions").partitions_def.get_partition_keys()
    )
    assert file in caplog.text
    assert "broken" in caplog.text


def test_the_heaviest_scenario_comes_first(house):
    keys = house.definitions().resolve_assets_def("prompts").partitions_def.get_partition_keys()
    assert keys.index("purchase") < keys.index("lamp")
