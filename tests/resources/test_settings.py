"""Presets decide every number, a run may change any, and a wrong one is named by its field."""

from pathlib import Path

import dagster as dg
import pytest
import yaml

from excise.errors import ExciseError
from excise.scenarios import load_scenarios
from resources.settings import PRESETS, AuditSettings, Preset

PRESET_FILES = Path(__file__).resolve().parents[2] / "pipelines" / "presets"


@pytest.fixture(scope="module")
def purchase():
    return load_scenarios()[0]["purchase"]


def test_paper_asks_everything(purchase):
    audit = AuditSettings(preset=Preset.paper).audit_of(purchase)
    assert (audit.variations, audit.subjects_per_group, audit.samples) == (None, 32, 100)
    assert (audit.temperature, audit.top_p) == (0.6, 0.9)
    assert (audit.held_out, audit.per_source) == (True, True)
    levels = ("prompt_specific", "within_context", "cross_context", "all_contexts", "own_scenario")
    assert audit.levels == levels
    assert audit.grid_taus == (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
    assert audit.grid_counts == (5, 10, 15, 20, 25, 30, 35, 40, 45, 50)


def test_quick_asks_three_items_and_half_the_names(purchase):
    audit = AuditSettings().audit_of(purchase)
    assert audit.variations == ("bicycle", "television", "chair")
    assert (audit.subjects_per_group, audit.samples, audit.random_draws) == (8, 16, 2)
    assert (audit.held_out, audit.per_source, audit.grid_variations) == (False, False, 1)
    assert (audit.side_effect_names, AuditSettings(preset=Preset.paper).audit_of(purchase).side_effect_names) == (3, 8)


def test_quick_takes_the_first_variations_of_another_scenario(purchase):
    other = purchase.model_copy(update={"key": "loan"})
    assert AuditSettings().audit_of(other).variations == ("chair", "car", "oven")


def test_groups_are_asked_at_the_size_of_the_smallest(purchase):
    small = purchase.groups["black"].model_copy(update={"subjects": purchase.groups["black"].subjects[:5]})
    scenario = purchase.model_copy(update={"groups": {**purchase.groups, "black": small}})
    assert AuditSettings(preset=Preset.paper).audit_of(scenario).subjects_per_group == 5
    assert AuditSettings().audit_of(scenario).subjects_per_group == 5


def test_any_number_can_be_changed(purchase):
    settings = AuditSettings(preset=Preset.paper, samples=3, variations=["car"], inlier_floor=0.0, seed=0)
    audit = settings.audit_of(purchase)
    assert (audit.samples, audit.variations, audit.inlier_floor, audit.seed) == (3, ("car",), 0.0, 0)
    assert audit.resamples == PRESETS[Preset.paper].resamples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": 1}, "samples is 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"inlier_floor": 90.0}, "inlier_floor is 90.0: give a share"),
        ({"inlier_tolerance": -0.1}, "inlier_tolerance is -0.1: give a share"),
        ({"variations": ["boat"]}, "'boat'; scenario purchase has chair, car"),
        ({"variations": []}, "the list is empty"),
        ({"levels": ["everywhere"]}, "'everywhere'; there are prompt_specific"),
        ({"subjects_per_group": 0}, "subjects_per_group is 0"),
        ({"random_draws": -1}, "random_draws is -1"),
        (
            {"held_out": True, "subjects_per_group": 3},
            "held_out: scenario purchase has 3 names per group; .* at least 4",
        ),
        ({"grid_taus": []}, "grid_taus is .*: give shares above 0"),
        ({"grid_counts": [0]}, "grid_counts is .*: give numbers of heads from 1"),
        ({"grid_variations": 0}, "grid_variations is 0"),
        ({"kl_budget": -0.1}, "kl_budget is -0.1: give nats of at least 0, such as 0.05"),
        ({"side_effect_budget": float("nan")}, "side_effect_budget is nan: give standard deviations of at least 0"),
        ({"side_effect_names": 1}, "side_effect_names is 1: give at least 2"),
        ({"side_effect_scenarios": ["hiring", "hiring"]}, "side_effect_scenarios is .*: name each once"),
    ],
)
def test_a_wrong_number_is_named(purchase, change, message):
    with pytest.raises(ExciseError, match=message):
        AuditSettings(**change).audit_of(purchase)


def test_side_effects_are_measured_on_other_scenarios_that_ask_the_same_groups_for_numbers(purchase):
    every = list(load_scenarios()[0].values())
    numbers = [each.key for each in every if each.outcome.kind == "number" and each.key != "purchase"]
    assert AuditSettings().side_effects_on(purchase, every) == tuple(numbers[:2])
    assert AuditSettings(preset=Preset.paper).side_effects_on(purchase, every) == tuple(numbers)
    assert AuditSettings(side_effect_scenarios=[]).side_effects_on(purchase, every) == ()
    chosen = AuditSettings(side_effect_scenarios=["sports", "chess"])
    assert chosen.side_effects_on(purchase, every) == ("sports", "chess")
    assert AuditSettings().side_effects_on(load_scenarios()[0]["gender"], every) == ()
    turned = purchase.comparison.model_copy(update={"majority": "black", "minority": "white"})
    others = [each.model_copy(update={"comparison": turned}) for each in every if each.key == "chess"]
    assert AuditSettings().side_effects_on(purchase, others) == ()
    for key, message in (("chess", "compares black and white"), ("purchase", "is the scenario that the masks are")):
        with pytest.raises(ExciseError, match=rf"side_effect_scenarios: '{key}' {message}"):
            AuditSettings(side_effect_scenarios=[key]).side_effects_on(purchase, others)
    with pytest.raises(ExciseError, match=r"'gender' scores continuations; name others \(activities, chess"):
        AuditSettings(side_effect_scenarios=["gender"]).side_effects_on(purchase, every)
    with pytest.raises(ExciseError, match=r"side_effect_scenarios: 'chses' \(did you mean chess\?\)"):
        AuditSettings(side_effect_scenarios=["chses"]).side_effects_on(purchase, every)


@pytest.mark.trial(16)
@pytest.mark.parametrize("preset", list(Preset))
def test_an_axis_takes_its_own_sampling_unless_a_run_changes_it(preset):
    gender = load_scenarios()[0]["gender"]
    outcome = gender.outcome.model_copy(update={"temperature": 0.7})
    scenario = gender.model_copy(update={"outcome": outcome})
    own = AuditSettings(preset=preset).audit_of(scenario)
    assert (own.temperature, own.top_p) == (0.7, 1.0)
    changed = AuditSettings(preset=preset, temperature=0.3, top_p=0.5).audit_of(scenario)
    assert (changed.temperature, changed.top_p) == (0.3, 0.5)


@pytest.mark.trial(16)
@pytest.mark.parametrize(
    ("scenario", "change", "reason"),
    [
        ("gender", {"permutations": 99}, "scenario gender scores continuations"),
        ("gender", {"inlier_floor": 0.6}, "scenario gender scores continuations"),
        ("gender", {"grid_taus": [0.1]}, "scenario gender scores continuations"),
        ("gender", {"grid_counts": [10]}, "scenario gender scores continuations"),
        ("gender", {"grid_variations": 1}, "scenario gender scores continuations"),
        ("gender", {"side_effect_scenarios": []}, "scenario gender scores continuations"),
        ("gender", {"side_effect_names": 3}, "scenario gender scores continuations"),
        ("gender", {"leftover": 0.1}, "answers are sampled"),
        ("purchase", {"max_new_tokens": 8}, "scenario purchase asks for numbers"),
        ("gender", {"kl_budget": 0.1}, "scenario gender scores continuations"),
        ("gender", {"side_effect_budget": 0.1}, "scenario gender scores continuations"),
        ("purchase", {"max_nodes": 8}, "answers are sampled"),
        ("purchase", {"perplexity_mode": "paper", "text_stride": 8}, "perplexity_mode paper has windows of its own"),
    ],
)
def test_a_setting_without_effect_is_refused(scenario, change, reason):
    name = list(change)[-1]
    with pytest.raises(ExciseError, match=rf"settings\.config\.{name} is .*{reason}.*: |{name} is .*{reason}"):
        AuditSettings(**change).audit_of(load_scenarios()[0][scenario])


def test_the_paper_s_windows_take_the_place_of_a_preset_s():
    gender = load_scenarios()[0]["gender"]
    audit = AuditSettings(perplexity_mode="paper").audit_of(gender)
    assert (audit.text_window, audit.text_stride) == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": ["promt_specific"]}, "did you mean prompt_specific?"),
        ({"variations": ["bycicle"]}, "did you mean bicycle?"),
        ({"variations": ["car", "car"]}, "name each once"),
        ({"strategies": []}, "name one at least"),
        ({"alphas": [1.5]}, "give shares above 0, below 1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"density_floor": 0.2, "density_ceiling": 0.1}, "density_floor is 0.2: give at most density_ceiling, 0.1"),
    ],
)
def test_a_list_or_name_that_cannot_be_meant_is_refused(purchase, change, message):
    with pytest.raises(ExciseError) as error:
        AuditSettings(**change).audit_of(purchase)
    assert message in str(error.value)


@pytest.mark.trial(40)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "/nowhere/text.txt"}, r"config\.text: /nowhere/text\.txt: cannot be read"),
        ({"text_tokens": 1}, "text_tokens is 1: give at least 2"),
        ({"text_window": 1}, "text_window is 1: give at least 2"),
        ({"text_window": 10, "text_stride": 20}, "text_stride is 20: give less than text_window, 10"),
        ({"text_window": None, "text_stride": 256}, "text_stride is 256: give less than text_window, 256"),
    ],
)
def test_a_text_that_cannot_be_measured_on_is_refused_before_any_work(change, message):
    with pytest.raises(ExciseError, match=message):
        AuditSettings(preset=Preset.paper, **change).audit_of(load_scenarios()[0]["gender"])


@pytest.mark.parametrize("preset", list(Preset))
def test_the_preset_files_choose_their_preset(preset):
    config = yaml.safe_load((PRESET_FILES / f"{preset.value}.yaml").read_text())["resources"]["settings"]["config"]
    seen = []

    @dg.op
    def look(settings: AuditSettings):
        seen.append(settings.preset)

    @dg.job
    def job():
        look()

    job.execute_in_process(
        resources={"settings": AuditSettings.configure_at_launch()},
        run_config={"resources": {"settings": {"config": config}}},
    )
    assert seen == [preset]


@pytest.mark.trial(33)
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2**63},
        {"seed": 2**70},
        {"seed": -1},
        {"samples": 2**63},
        {"resamples": 2**63},
        {"permutations": 2**63},
        {"random_draws": 2**63},
        {"relabellings": 2**63},
        {"max_nodes": 2**63},
        {"max_new_tokens": 2**63},
        {"text_tokens": 2**63},
        {"text_window": 2**63},
        {"text_stride": 2**63},
        {"temperature": float("inf")},
    ],
)
def test_numbers_that_no_table_holds_are_refused_before_any_work(purchase, change):
    (name,) = change
    with pytest.raises(ExciseError, match=f"resources.settings.config.{name} is "):
        AuditSettings(**change).audit_of(purchase)


@pytest.mark.trial(33)
def test_the_largest_seed_is_one(purchase):
    assert AuditSettings(seed=2**63 - 1).audit_of(purchase).seed == 2**63 - 1
