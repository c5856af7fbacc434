"""The chain of assets on a tiny real model: what a run leaves behind, what a second one reuses, what goes wrong."""

import base64
import subprocess
import sys

import dagster as dg
import duckdb
import polars as pl
import pytest
import yaml

from resources.tables import METRICS, TABLES
from resources.warehouse import Warehouse

CHAIN = [
    "completions",
    "attribution_scores",
    "pruning_masks",
    "pruned_completions",
    "restoration",
    "side_effects",
    "evaluation_metrics",
    "quality_report",
    "stability",
]


def materialized(result) -> dict[str, dict]:
    """Metadata by asset, of the materializations of a run."""
    return {
        event.asset_key.to_user_string(): {name: value.value for name, value in event.materialization.metadata.items()}
        for event in result.get_asset_materialization_events()
    }


def failures(result) -> dict[str, str]:
    """The message of every failed step, as the UI shows it first."""
    found = {}
    for event in result.get_step_failure_events():
        data = event.step_failure_data
        found[event.step_key] = data.user_failure_data.description if data.user_failure_data else data.error.to_string()
    return found


def test_the_whole_chain_runs_for_one_partition(audited):
    _, result = audited
    assert failures(result) == {}
    assert list(materialized(result)) == ["prompts", *CHAIN]
    partitions = {
        event.asset_key.to_user_string(): event.partition for event in result.get_asset_materialization_events()
    }
    assert partitions["prompts"] == "lamp"
    assert partitions["completions"] == "tiny|lamp"
    assert partitions["quality_report"] is None


def test_row_counts_schema_and_names_are_those_of_the_tables(audited):
    house, result = audited
    for asset, metadata in materialized(result).items():
        table = metadata["dagster/table_name"]
        rows = house.warehouse.read(table)
        if asset == "quality_report":
            rows = rows.filter(pl.col("asset") != "stability")  # which follows the roll-up, and is in the next one
        assert metadata["dagster/row_count"] == rows.height, asset
        # The model has no reference, and the audit a single split.
        assert (metadata["dagster/row_count"] > 0) == (asset not in ("restoration", "stability")), asset
        assert [column.name for column in metadata["dagster/column_schema"].columns] == list(TABLES[table].names)


def test_every_answer_is_there_unpruned_and_under_every_mask(audited):
    house, _ = audited
    completions, pruned = house.warehouse.read("completions"), house.warehouse.read("pruned_completions")
    assert completions.height == 2 * 8 * 4
    masks = (
        house.warehouse.read("masks").select("variation", "strategy", "level", "matched_to", "draw", "mask").unique()
    )
    assert pruned.height == masks.height * 8 * 4
    assert {"set_difference", "gap_gradient", "random"} <= set(masks["strategy"])
    assert pruned.select("prompt_id", "sample").unique().height == completions.height


def test_controls_prune_as_many_weights_of_every_matrix_as_what_they_control(audited):
    masks = audited[0].warehouse.read("masks")
    keys = ["variation", "level", "layer", "role"]
    own = masks.filter(pl.col("matched_to").is_null()).select(*keys, matched_to="strategy", own="pruned")
    controls = masks.filter(pl.col("matched_to").is_not_null()).join(own, on=[*keys, "matched_to"], how="left")
    assert controls.height > 0
    assert (controls["pruned"] == controls["own"]).all()


def test_every_metric_is_documented(audited):
    found = set(audited[0].warehouse.read("metrics")["metric"])
    of_toxicity = {name for name in METRICS if "toxic" in name or name.startswith(("bias_", "perplexity"))}
    of_exact_answers = {"leftover", "sampled"}
    assert found == set(METRICS) - of_toxicity - of_exact_answers - {"share_scored", "all_equal_covered"}


def test_pictures_are_small_and_lie_beside_the_data(audited):
    house, result = audited
    metadata = materialized(result)
    for asset, name in (
        ("completions", "answers_by_group"),
        ("pruning_masks", "mask_density_by_layer"),
        ("evaluation_metrics", "disparity_by_level"),
        ("evaluation_metrics", "bias_by_level"),
    ):
        picture = metadata[asset][name]
        start, encoded = picture.rstrip(")").split("base64,")
        assert start.endswith("(data:image/png;")
        assert len(picture) < 140_000
        assert base64.b64decode(encoded).startswith(b"\x89PNG")
        assert (house.data / "figures" / "tiny" / "lamp" / f"{name}.svg").read_text().startswith("<?xml")


def test_device_and_cost_are_told(audited):
    metadata = materialized(audited[1])["completions"]
    assert (metadata["device"], metadata["dtype"]) == ("cpu", "float32")
    assert metadata["completions_drawn"] == 64
    assert metadata["peak_memory_mb"] > 0
    assert metadata["tokens_per_second"] > 0


def test_a_row_can_be_traced_to_model_parameters_and_file(audited):
    house, result = audited
    row = house.warehouse.read("pruned_completions").row(0, named=True)
    assert row["model_fingerprint"] == materialized(result)["completions"]["model_fingerprint"]
    assert '"temperature": 0.6' in row["parameters"]
    mask = house.warehouse.read("masks").filter(pl.col("mask") == row["mask"]).row(0, named=True)
    assert (house.data / mask["path"]).is_file()


def stale(house) -> dict[str, list[str]]:
    """Why each asset of tiny|lamp counts as stale; nothing where all is fresh."""
    from dagster._core.definitions.data_version import CachingStaleStatusResolver
    from dagster._core.loader import LoadingContextForTest

    graph = house.definitions().resolve_asset_graph()
    resolver = CachingStaleStatusResolver(house.instance, graph, LoadingContextForTest(house.instance))
    partitions = {"prompts": "lamp", "quality_report": None}
    causes = {
        name: [
            cause.reason for cause in resolver.get_stale_causes(dg.AssetKey(name), partitions.get(name, "tiny|lamp"))
        ]
        for name in ("prompts", *CHAIN)
    }
    return {name: reasons for name, reasons in causes.items() if reasons}


def test_versions_of_results_differ_and_lineage_is_fresh(audited):
    house, result = audited
    versions = [
        event.materialization.tags["dagster/data_version"] for event in result.get_asset_materialization_events()
    ]
    assert len(set(versions)) == len(versions)
    assert stale(house) == {}


def test_completions_drawn_anew_make_what_follows_stale(house):
    house.run("audit_scenario", "tiny|lamp")
    house.run("audit_scenario", "tiny|lamp", only=["completions"], samples=3)
    assert set(stale(house)) == {
        "attribution_scores",
        "pruned_completions",
        "side_effects",
        "evaluation_metrics",
        "restoration",
        "quality_report",
        "stability",
    }


def test_checks_are_kept_by_partition_and_rolled_up(audited):
    house, result = audited
    shown = {
        (check.asset_key.to_user_string(), check.check_name): check for check in result.get_asset_check_evaluations()
    }
    kept = house.warehouse.read("checks")
    assert set(kept.select("asset", "check_name").rows()) == set(shown) - {("quality_report", "all_checks_pass")}
    for row in kept.iter_rows(named=True):
        check = shown[row["asset"], row["check_name"]]
        assert (check.passed, check.partition) == (row["passed"], "tiny|lamp")
        assert check.metadata["finding"].value == row["message"]
    roll_up = shown["quality_report", "all_checks_pass"]
    assert roll_up.partition is None
    assert roll_up.passed == kept["passed"].all()


def test_a_second_run_reuses_everything_and_says_so(audited, copied):
    first, second = (materialized(each) for each in (audited[1], copied.run("audit_scenario", "tiny|lamp")))
    assert "prompts" not in second
    for asset in ("completions", "pruned_completions"):
        assert second[asset]["completions_drawn"] == 0
        assert (
            second[asset]["completions_reused"]
            == first[asset]["completions_drawn"] + first[asset]["completions_reused"]
        )
        assert "reused" in second[asset]["reuse"]
    assert second["attribution_scores"]["files_computed"] == 0
    assert second["pruning_masks"]["mask_files_written"] == 0


def test_pruning_anew_keeps_the_completions_whatever_the_settings_say(copied):
    before = copied.warehouse.read("completions")
    result = copied.run("prune_and_evaluate", "tiny|lamp", samples=2, temperature=1.0, variations=["lamp"], seed=3)
    assert failures(result) == {}
    assert list(materialized(result)) == CHAIN[2:]
    assert copied.warehouse.read("completions").equals(before)
    pruned = copied.warehouse.read("pruned_completions")
    assert set(pruned["variation"]) == {"lamp", "bench"}
    assert pruned["sample"].max() == 3
    assert set(pruned["parameters"]) == set(before["parameters"])


def test_settings_choose_variations_names_and_strategies(house):
    result = house.run(
        "audit_scenario", "tiny|lamp", variations=["bench"], subjects_per_group=2, strategies=["gap_gradient"]
    )
    assert failures(result) == {}
    assert set(house.warehouse.read("completions").select("variation", "subject").rows()) == {
        ("bench", name) for name in ("Luke Becker", "Jill Becker", "Jamal Washington", "Ebony Washington")
    }
    assert set(house.warehouse.read("attribution_files")["score"]) == {"gap_gradient"}
    assert set(house.warehouse.read("masks")["strategy"]) == {"gap_gradient", "random"}


def test_a_changed_scenario_file_is_expanded_again_and_lineage_stays_fresh(house):
    house.run("audit_scenario", "tiny|lamp")
    changed = lamp_of(house)
    changed["templates"]["seller"] = "Used {item}, seller {name}. What do I offer, in dollars?"
    house.write_scenario("lamp", changed)
    assert failures(house.run("audit_scenario", "tiny|lamp")) == {}
    assert house.warehouse.read("prompts")["text"].str.starts_with("Used").all()
    assert stale(house) == {}


def lamp_of(house) -> dict:
    return yaml.safe_load((house.folder / "scenarios" / "lamp.yaml").read_text())


def test_pruning_without_completions_says_what_to_do_first(house):
    result = house.run("prune_and_evaluate", "tiny|lamp")
    assert list(failures(result)) == ["pruning_masks"]
    assert "materialize completions of this partition first" in failures(result)["pruning_masks"]


def test_scores_of_other_completions_are_not_used(copied):
    copied.run("audit_scenario", "tiny|lamp", only=["completions"], samples=3)
    result = copied.run("prune_and_evaluate", "tiny|lamp")
    assert "those of other completions; materialize attribution_scores" in failures(result)["pruning_masks"]


def test_answers_that_do_not_pair_are_not_compared(copied):
    copied.run("audit_scenario", "tiny|lamp", only=["completions"], seed=1)
    result = copied.run("audit_scenario", "tiny|lamp", only=["evaluation_metrics"])
    assert "do not go with its completions" in failures(result)["evaluation_metrics"]


def with_hashes(house, table: str, hashes: pl.Expr) -> None:
    """Change the hashes of the prompts that a table says were read."""
    rows = house.warehouse.read(table)
    house.warehouse.replace_partition(
        table, rows.with_columns(prompt_hash=hashes), {"model": "tiny", "scenario": "lamp"}
    )


@pytest.mark.trial(3)
def test_answers_to_prompts_that_the_model_reads_otherwise_are_not_compared(copied):
    """As after a chat template that printed another date: the scenario, the prompt and the mend are named."""
    with_hashes(copied, "pruned_completions", pl.col("prompt_hash").str.reverse())
    message = failures(copied.run("audit_scenario", "tiny|lamp", only=["evaluation_metrics"]))["evaluation_metrics"]
    assert "scenario lamp: the pruned model tiny read prompt " in message
    assert "materialize pruned_completions" in message
    with_hashes(copied, "completions", pl.col("prompt_hash").str.reverse())
    for job, asset in (
        ("audit_scenario", "attribution_scores"),
        ("audit_scenario", "pruned_completions"),
        ("prepare_heads", "head_impacts"),
    ):
        message = failures(copied.run(job, "tiny|lamp", only=[asset]))[asset]
        assert "scenario lamp: the model reads prompt " in message, asset
        assert "materialize completions again" in message, asset
    with_hashes(copied, "completions", pl.lit(None, pl.String))
    message = failures(copied.run("audit_scenario", "tiny|lamp", only=["attribution_scores"]))["attribution_scores"]
    assert "stored by an earlier version; materialize completions" in message


@pytest.mark.trial(3)
def test_a_dated_template_gives_the_same_answers_on_another_day(house, tiny_model, monkeypatch):
    import datetime

    from transformers.utils import chat_template_utils

    template = house.folder / "dated.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}: {{ messages[0]['content'] }}<|end|><|assistant|>")
    numeric = {"folder": str(tiny_model("llama", numeric=True)), "chat_template": str(template)}
    house.write_models({"tiny": numeric})
    assert failures(house.run("audit_scenario", "tiny|lamp", only=["completions"])) == {}
    before = house.warehouse.read("completions")

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    result = house.run("audit_scenario", "tiny|lamp", only=["completions"])
    assert materialized(result)["completions"]["completions_drawn"] == 0
    assert house.warehouse.read("completions").equals(before)


@pytest.mark.trial(10)
def test_a_model_with_a_broken_weight_leaves_no_answers(house, tiny_model, tmp_path):
    import math
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model("llama", numeric=True), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    house.write_models({"tiny": {"folder": str(broken)}})
    message = failures(house.run("audit_scenario", "tiny|lamp"))["completions"]
    assert "models.yaml: tiny: the model's logits are not finite in float32" in message
    assert house.warehouse.read("completions").is_empty()
    assert not list(house.data.rglob("*.parquet"))


def test_prompts_that_changed_since_are_not_mixed(copied):
    changed = lamp_of(copied)
    changed["templates"]["seller"] = "Used {item}, seller {name}. What do I offer, in dollars?"
    copied.write_scenario("lamp", changed)
    definitions = copied.definitions()
    dg.materialize([definitions.resolve_assets_def("prompts")], partition_key="lamp", instance=copied.instance)
    assert "have changed since" in failures(copied.run("prune_and_evaluate", "tiny|lamp"))["pruning_masks"]


def test_a_model_that_cannot_be_had_fails_clearly_and_alone(house, tiny_model):
    good = {"folder": str(tiny_model("llama", numeric=True))}
    bare = {"folder": str(tiny_model("llama", chat_template=None))}
    house.write_models({"tiny": good, "gone": {"folder": "/nowhere"}, "bare": bare})
    assert "/nowhere" in failures(house.run("audit_scenario", "gone|lamp"))["completions"]
    assert "the tokenizer has no chat template" in failures(house.run("audit_scenario", "bare|lamp"))["completions"]
    assert failures(house.run("audit_scenario", "tiny|lamp", strategies=["gap_gradient"])) == {}


def test_a_failure_names_the_mend_first_and_is_not_tried_again(house):
    house.write_models({"tiny": {"folder": "/nowhere"}})
    (event,) = house.run("audit_scenario", "tiny|lamp").get_step_failure_events()
    assert event.step_failure_data.user_failure_data.description.startswith("models.yaml: tiny.folder:")
    assert event.step_failure_data.error.cls_name == "Failure"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("title: Loan\nvariations: [", "cannot be read"),
        ("title: Loan", "groups"),
    ],
)
def test_a_scenario_file_with_a_mistake_is_named_and_the_others_work(house, caplog, text, fault):
    house.write_scenario("loan", text)
    result = house.run("audit_scenario", "tiny|lamp", strategies=["gap_gradient"])
    assert failures(result) == {}
    assert "scenarios/loan.yaml" in caplog.text
    for asset in ("prompts", "quality_report"):
        assert "scenarios/loan.yaml" in materialized(result)[asset]["files_with_mistakes"]


def test_a_toxicity_scenario_is_a_partition_behind_all_numbers(house):
    toxic = lamp_of(house) | {"outcome": {"kind": "toxicity"}}
    house.write_scenario("insults", toxic)
    keys = house.definitions().resolve_assets_def("prompts").partitions_def.get_partition_keys()
    axes = {"insults", "gender", "race", "religion", "sexual_orientation", "nationality"}
    assert set(keys[-len(axes) :]) == axes


def test_a_wrong_setting_is_named(house):
    result = house.run("audit_scenario", "tiny|lamp", variations=["boat"])
    assert "variations: 'boat'; scenario lamp has lamp, bench" in failures(result)["completions"]


def test_a_data_folder_that_cannot_be_written_is_named(house):
    house.folder.joinpath("data").write_text("a file is in the way")
    assert "EXCISE_DATA" in failures(house.run("audit_scenario", "tiny|lamp"))["completions"]


def test_a_warehouse_held_by_a_foreign_session_is_named(house):
    house.data.mkdir()
    path = house.data / "excise.duckdb"
    duckdb.connect(path).close()
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"open\n"
        house.overrides["warehouse"] = Warehouse(folder=str(house.data), wait_seconds=0.3)
        message = failures(house.run("audit_scenario", "tiny|lamp"))["completions"]
    finally:
        holder.stdin.close()
        holder.wait(timeout=30)
    assert f"locked for more than 0.3 s by process {holder.pid}" in message
