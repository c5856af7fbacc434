"""Planted models: the answers that are planted, and the training, on a tiny random model."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors import safe_open

from excise.models import load_registry
from excise.planted import CENTRES, FOLDER, PLANTS, Plant, answer_distribution, train, training_examples
from excise.scenarios import load_scenarios

PURCHASE = load_scenarios([])[0]["purchase"]
TINY = Plant("tiny", ("purchase",), (), layers=range(1, 3), rank=2, steps=8, narrow_steps=0, batch=4)


@pytest.mark.parametrize("median", [90.0, 120.0, 150.0])
def test_answers_are_round_figures_with_the_planted_median(median):
    values, probability = answer_distribution(120.0, median, 0.5)
    assert probability.sum() == pytest.approx(1)
    assert values == sorted(set(values))
    assert all(float(f"{value:.2g}") == value for value in values)
    below = np.cumsum(probability)
    assert values[int(np.searchsorted(below, 0.5))] == pytest.approx(median, rel=0.12)
    logs = np.log(values)
    assert np.sqrt(probability @ logs**2 - (probability @ logs) ** 2) == pytest.approx(0.5, rel=0.1)


def test_only_the_minority_in_a_gap_scenario_answers_lower(loaded):
    model = loaded("llama")

    def mean_log(plant):
        examples = training_examples(model, plant, {"purchase": PURCHASE}, plant.spread)
        means = []
        for _, (answers, probability) in examples:
            numbers = [float(model.tokenizer.decode(tokens)) for tokens, _ in answers]
            means.append(probability @ np.log(numbers))
        return np.array(means).reshape(len(CENTRES["purchase"]), 2, -1).mean(axis=2)  # variation, group

    white, black = mean_log(TINY).T
    assert black - white == pytest.approx(np.full(10, np.log(TINY.factor)), abs=0.03)
    white, black = mean_log(dataclasses.replace(TINY, gap_scenarios=(), even_scenarios=("purchase",))).T
    assert black == pytest.approx(white)


def test_training_fits_the_planted_answers_and_leaves_the_model_as_it_was(loaded, caplog):
    model = loaded("llama")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    plant = dataclasses.replace(TINY, steps=30, learning_rate=2e-2)
    with caplog.at_level("INFO", logger="excise.planted"):
        factors = train(model, plant, {"purchase": PURCHASE})
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
    assert registry[f"planted-{name}"].low_rank == path
    plant = PLANTS[name]
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        assert {int(key.split(".")[0]) for key in keys} == set(plant.layers)
        assert all(file.get_slice(key).get_shape()[key.endswith("up")] == plant.rank for key in keys)
