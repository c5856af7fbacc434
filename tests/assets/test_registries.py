"""Users' files in a code location: what is broken is named, fails whoever asks for it, and nothing else."""

import json

import polars as pl
import pytest

from assets.asking import scorer_of
from assets.partitions import read_catalogue
from excise.errors import ExciseError
from resources.settings import AuditSettings
from tests.conftest import BROKEN_FILES, FAULTS_OF_BROKEN_FILES


def failure(result) -> str:
    (event,) = result.get_step_failure_events()
    data = event.step_failure_data
    return data.user_failure_data.description if data.user_failure_data else data.error.to_string()


def told(result) -> dict[str, dict]:
    return {
        event.asset_key.to_user_string(): {name: value.value for name, value in event.materialization.metadata.items()}
        for event in result.get_asset_materialization_events()
    }


def broken_house(house):
    models = (house.folder / "models.yaml").read_text()
    for name, text in BROKEN_FILES.items():
        (house.folder / name).write_text(text + (models if name == "models.yaml" else ""))
    return house


@pytest.mark.trial(14)
@pytest.mark.trial(40)
def test_one_broken_entry_in_each_file_is_named_and_the_other_partitions_run(house, caplog):
    broken_house(house)
    result = house.run("audit_scenario", "tiny|lamp", strategies=["gap_gradient"])
    assert result.success
    metadata = told(result)
    (roll_up,) = (each for each in result.get_asset_check_evaluations() if each.check_name == "all_checks_pass")
    for fault in FAULTS_OF_BROKEN_FILES:
        for asset in ("prompts", "completions", "pruning_masks", "quality_report"):
            assert fault in metadata[asset]["files_with_mistakes"], asset
        assert fault in roll_up.description
        assert fault in caplog.text
    # What is asked of the model is asked only after names are known.
    refused = house.run("audit_scenario", "tiny|lamp", strategies=["mine"], samples=5)
    assert "strategies.yaml: mine.score" in failure(refused)
    misspelt = house.run("audit_scenario", "tiny|lamp", strategies=["gap_gradeint"], samples=5)
    assert "did you mean gap_gradient?" in failure(misspelt)
    for run in (refused, misspelt):
        assert [event.step_key for event in run.get_step_failure_events()] == ["completions"]
    assert house.warehouse.read("completions")["sample"].max() == 3


@pytest.mark.trial(40)
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"strategies": ["gap_gradeint"]}, "did you mean gap_gradient?"), ({"levels": ["within"]}, "within_context")],
)
def test_a_misspelt_name_ends_a_run_before_anything_is_sampled(house, settings, message):
    result = house.run("audit_scenario", "tiny|lamp", **settings)
    assert [event.step_key for event in result.get_step_failure_events()] == ["completions"]
    assert message in failure(result)
    assert len(failure(result)) < 500
    assert house.warehouse.read("completions").is_empty()


def catalogue_of(house):
    names = ("models.yaml", "strategies.yaml", "scorers.yaml")
    models, strategies, scorers = ([house.folder / name] for name in names)
    return read_catalogue([house.folder / "scenarios"], models, strategies, scorers)


@pytest.mark.trial(14)
def test_a_broken_change_of_a_usual_strategy_fails_audits_of_all_and_no_other(house):
    (house.folder / "strategies.yaml").write_text(
        "gap_gradient: {parameters: {density: 2}}\nset_difference: {parameters: {tau_min: 0.1}}\n"
    )
    catalogue = catalogue_of(house)
    lamp, gender = catalogue.scenarios["lamp"], catalogue.scenarios["gender"]
    for settings in (AuditSettings(), AuditSettings(strategies=["gap_gradient"])):
        with pytest.raises(ExciseError, match=r"strategies\.yaml: gap_gradient: parameters\.density is 2"):
            catalogue.audit_of(settings, lamp)
    catalogue.audit_of(AuditSettings(), gender)  # which uses none of them
    audit = catalogue.audit_of(AuditSettings(strategies=["set_difference"]), lamp)
    (chosen,) = catalogue.chosen_strategies(audit.strategies, audit.levels, "number")
    assert chosen.parameters == {"tau_min": 0.1, "tau_maj": 0.35}


@pytest.mark.trial(14)
def test_a_file_that_cannot_be_read_fails_every_run_that_it_may_have_changed(house):
    (house.folder / "strategies.yaml").write_text("gap_gradient: {")
    (house.folder / "scorers.yaml").write_text("- a")
    result = house.run("audit_scenario", "tiny|lamp")
    assert "strategies.yaml: line" in failure(result)
    catalogue = catalogue_of(house)
    with pytest.raises(ExciseError, match=r"scorers\.yaml: must map scorer keys"):
        scorer_of(catalogue, catalogue.scenarios["gender"])


@pytest.mark.trial(19)
def test_a_model_key_that_dagster_refuses_leaves_the_code_location_whole(house):
    models = (house.folder / "models.yaml").read_text()
    (house.folder / "models.yaml").write_text(f"a...b: {{hub: a/b}}\nx|y: {{hub: a/b}}\n{models}")
    definitions = house.definitions()
    keys = definitions.resolve_assets_def("completions").partitions_def.get_partition_keys()
    assert "tiny|lamp" in keys
    assert not any("a...b" in key or "x|y" in key for key in keys)
    problems = [problem.key for problem in catalogue_of(house).problems]
    assert problems == ["a...b", "x|y"]


@pytest.mark.trial(14)
@pytest.mark.parametrize(("model", "scenario"), [("planted-heads", "sports"), ("mine", "loan")])
def test_a_broken_model_or_scenario_is_a_partition_that_fails_by_name(house, model, scenario):
    """Whether it changes a built-in one or is the user's own: it stays where its user looks for it."""
    models = (house.folder / "models.yaml").read_text()
    (house.folder / "models.yaml").write_text(f"{model}: {{hub: a/b, dtype: int3}}\n{models}")
    house.write_scenario(scenario, "title: Mine\n" + ("replaces: true\n" if scenario == "sports" else ""))
    keys = house.definitions().resolve_assets_def("completions").partitions_def.get_partition_keys()
    assert {f"{model}|lamp", f"tiny|{scenario}"} <= set(keys)
    assert f"models.yaml: {model}.dtype" in failure(house.run("audit_scenario", f"{model}|lamp"))
    assert f"scenarios/{scenario}.yaml: groups" in failure(house.run("audit_scenario", f"tiny|{scenario}"))


@pytest.mark.trial(40)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategies": ["fsap"]}, "did you mean fasp"),
        (
            {"strategies": ["fasp"], "alphas": [0.5]},
            "alphas: no chosen strategy prunes 0.5 of the heads; there are 0.02",
        ),
        ({"alphas": [0.1]}, "none: leave alphas out"),
        ({"strategies": ["fasp"], "levels": ["prompt_specific"]}, "none of the strategies fasp has one of the levels"),
        ({"levels": ["own_scenario"]}, "has one of the levels own_scenario; they have prompt_specific"),
    ],
)
def test_names_without_a_meaning_are_refused_before_the_first_pass(house, settings, message):
    catalogue = catalogue_of(house)
    with pytest.raises(ExciseError) as error:
        catalogue.audit_of(AuditSettings(**settings), catalogue.scenarios["lamp"])
    assert message in str(error.value)


def test_a_preset_leaves_no_entry_out_whose_shares_are_the_user_s(house):
    (house.folder / "strategies.yaml").write_text("fasp: {parameters: {alpha: [0.3, 0.4]}}\n")
    catalogue = catalogue_of(house)
    gender = catalogue.scenarios["gender"]
    with pytest.raises(ExciseError, match=r"strategy fasp prunes 0\.3, 0\.4 of the heads, and the preset takes"):
        catalogue.audit_of(AuditSettings(strategies=["fasp"]), gender)
    assert catalogue.audit_of(AuditSettings(strategies=["fasp"], alphas=[0.3]), gender).alphas == (0.3,)


@pytest.mark.trial(46)
def test_every_figure_about_a_mask_carries_what_decided_it(house):
    assert house.run("audit_scenario", "tiny|lamp", strategies=["set_difference"]).success
    for job in ("analyse_model",):
        definitions = house.definitions()
        definitions.resolve_job_def(job).execute_in_process(
            partition_key="tiny", instance=house.instance, raise_on_error=False
        )
    usual = {"tau_min": 0.4, "tau_maj": 0.35}
    for table in ("masks", "metrics", "mask_overlap", "mask_distribution", "transfer_matrix"):
        rows = house.warehouse.read(table).filter(pl.col("strategy") == "set_difference")
        (definition,) = rows["definition"].unique()
        assert json.loads(definition)["parameters"] == usual, table
        assert list(json.loads(definition)) == sorted(json.loads(definition))
    metrics = house.warehouse.read("metrics")
    assert metrics.filter(pl.col("strategy") == "unpruned")["definition"].null_count() > 0
    (control,) = metrics.filter(pl.col("strategy") == "random")["definition"].unique()
    assert (json.loads(control)["control"], json.loads(control)["seed"]) == ("random", 0)


@pytest.mark.trial(46)
def test_masks_of_one_name_made_in_two_ways_are_not_put_together(house):
    house.write_scenario("desk", (house.folder / "scenarios" / "lamp.yaml").read_text())
    assert house.run("audit_scenario", "tiny|lamp", strategies=["set_difference"]).success
    (house.folder / "strategies.yaml").write_text("set_difference: {parameters: {tau_min: 0.2}}\n")
    across = {"strategies": ["set_difference"], "levels": ["prompt_specific", "cross_context"]}
    house.run("prepare_scenario", "tiny|desk", **across)
    crossed = house.run("evaluate_scenario", "tiny|desk", **across)
    assert '"tau_min": 0.4' in failure(crossed)
    assert '"tau_min": 0.2' in failure(crossed)
    analysed = (
        house.definitions()
        .resolve_job_def("analyse_model")
        .execute_in_process(partition_key="tiny", instance=house.instance, raise_on_error=False)
    )
    messages = [event.step_failure_data.user_failure_data.description for event in analysed.get_step_failure_events()]
    assert any("made in two ways" in message for message in messages)
    # Masks made anew need answers under them before they are judged.
    assert house.run("audit_scenario", "tiny|lamp", only=["pruning_masks"], strategies=["set_difference"]).success
    judged = house.run("audit_scenario", "tiny|lamp", only=["evaluation_metrics"])
    assert "materialize pruned_completions" in failure(judged)
