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
    ],
)
def test_a_wrong_number_is_named(purchase, change, message):
    with pytest.raises(ExciseError, match=message):
        AuditSettings(**change).audit_of(purchase)


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
