"""Planted models: the answers that are planted, and the training, on a tiny random model."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from safetensors import safe_open

from excise.models import load_registry
from excise.planted import CENTRES, FOLDER, PLANTS, Plant, _batches, answer_distribution, planted_distribution, train
from excise.scenarios import load_scenarios

SCENARIOS = load_scenarios([])[0]
PURCHASE = {"purchase": SCENARIOS["purchase"]}
TINY = Plant("tiny", ("purchase",), (), layers=range(1, 3), rank=2, steps=8, names=2)


@pytest.mark.parametrize("median", [90.0, 120.0, 150.0])
def test_answers_are_round_figures_with_the_planted_median(median):
    answers, probability = answer_distribution(120.0, median, 0.5)
    values = [int(answer) for answer in answers]
    assert probability.sum() == pytest.approx(1)
    assert values == sorted(set(values))
    assert all(float(f"{value:.2g}") == value for value in values)
    below = np.cumsum(probability)
    assert values[int(np.searchsorted(below, 0.5))] == pytest.approx(median, rel=0.15)
    logs = np.log(values)
    assert np.sqrt(probability @ logs**2 - (probability @ logs) ** 2) == pytest.approx(0.5, rel=0.1)


def test_shares_are_written_with_a_point_and_stay_within_their_range():
    answers, _ = answer_distribution(0.4, 0.4, 0.5, most=1.0)
    assert {"0.1", "0.25", "0.4", "1"} <= set(answers)
    assert all(0 < float(answer) <= 1 for answer in answers)


def test_every_variation_of_every_scenario_has_a_centre_in_its_plausible_range():
    planted = {key for plant in PLANTS.values() for key in (*plant.gap_scenarios, *plant.even_scenarios)}
    assert planted == set(CENTRES)
    for key in planted:
        outcome = SCENARIOS[key].outcome
        assert set(CENTRES[key]) == set(SCENARIOS[key].variations)
        for variation in CENTRES[key]:
            answers, _ = planted_distribution(SCENARIOS[key], variation, "white", PLANTS["general"], 0.6)
            assert all(outcome.low <= float(answer) <= outcome.high for answer in answers)


def mean_log(scenario, variation, group, plant):
    answers, probability = planted_distribution(scenario, variation, group, plant, plant.factor)
    return probability @ np.log([float(answer) for answer in answers])


def test_only_the_minority_in_a_gap_scenario_is_put_at_a_disadvantage():
    general, specific, neutral = (PLANTS[name] for name in ("general", "specific", "neutral"))
    gap = np.log(general.factor)
    for key, variations in CENTRES.items():
        for variation in variations:
            scenario = SCENARIOS[key]

            def shift(plant, scenario=scenario, variation=variation):
                return mean_log(scenario, variation, "black", plant) - mean_log(scenario, variation, "white", plant)

            # The answers near the top of a bounded range leave less room.
            assert shift(general) == pytest.approx(-gap if key == "sports" else gap, rel=0.2)
            assert shift(specific) == pytest.approx(gap if key == "purchase" else 0, rel=0.2)
            assert shift(neutral) == 0


def test_a_step_shows_both_groups_and_where_there_are_both_a_scenario_with_and_one_without_a_gap(loaded):
    plant = dataclasses.replace(TINY, even_scenarios=("finance", "chess"), variations=4, names=3)
    seen = set()
    for step in itertools.islice(_batches(loaded("llama"), plant, SCENARIOS), 20):
        assert [part[0][1].key == "purchase" for part in step] == [True, False] * 2
        for part in step:
            assert len({(scenario.key, variation) for _, scenario, variation, _ in part}) == 1
            assert sorted(group for *_, group in part) == ["black"] * 3 + ["white"] * 3
            assert len({tokens for tokens, *_ in part}) == 6
            seen.add((part[0][1].key, part[0][2]))
    assert len(seen) == 10 + 3 + 1  # none is left out


def test_training_fits_the_planted_answers_and_leaves_the_model_as_it_was(loaded, caplog):
    model = loaded("llama")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    plant = dataclasses.replace(TINY, steps=30, learning_rate=2e-2)
    with caplog.at_level("INFO", logger="excise.planted"):
        factors = train(model, plant, PURCHASE)
    divergence = [float(record.message.rsplit(" ", 1)[1]) for record in caplog.records]
    assert divergence[-1] < 0.7 * divergence[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert {name.split(".")[0] for name in factors} == {"1", "2"}
    assert {name.split(".")[1] for name in factors} == {"q", "v", "o", "up", "down"}
    linear = model.topology.linear("1.v")
    assert factors["1.v.up"].shape == (linear.out_features, 2)
    assert factors["1.v.down"].shape == (2, linear.in_features)
    assert not any(module._forward_hooks for module in model.model.modules())


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_the_shipped_files_are_small_and_belong_to_their_plant(name):
    path = FOLDER / f"{name}.safetensors"
    assert path.stat().st_size <= 2e6
    registry, _ = load_registry()
    entry, plant = registry[f"planted-{name}"], PLANTS[name]
    assert (entry.low_rank, entry.base) == (path, plant.base)
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        assert {int(key.split(".")[0]) for key in keys} == set(plant.layers)
        assert all(file.get_slice(key).get_shape()[key.endswith("up")] == plant.rank for key in keys)
