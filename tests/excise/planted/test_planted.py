"""Planted models: the answers that are planted, and the training, on a tiny random model."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from excise.models.loading import load_model
from excise.models.specs import load_registry
from excise.planted import command
from excise.planted.gaps import (
    CENTRES,
    FOLDER,
    PLANTS,
    Plant,
    _batches,
    _log_probabilities,
    answer_distribution,
    changed_by,
    planted_shift,
    shifted,
    train,
)
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
            centre = CENTRES[key][variation]
            answers, _ = answer_distribution(centre, centre, PLANTS["neutral"].spread, outcome.high)
            assert all(outcome.low <= float(answer) <= outcome.high for answer in answers)


def test_only_the_minority_in_a_gap_scenario_is_put_at_a_disadvantage():
    general, specific, neutral = (PLANTS[name] for name in ("general", "specific", "neutral"))
    for key in CENTRES:
        scenario = SCENARIOS[key]

        def gap(plant, scenario=scenario):
            return planted_shift(scenario, "black", plant, 0.6) - planted_shift(scenario, "white", plant, 0.6)

        # Of a rank the lower one is the better.
        assert gap(general) == pytest.approx(-np.log(0.6) if key == "sports" else np.log(0.6))
        assert gap(specific) == pytest.approx(np.log(0.6) if key == "purchase" else 0)
        assert gap(neutral) == 0


@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.25])
def test_shifted_answers_have_the_mean_logarithm_moved_by_just_that(shift):
    answers, probability = answer_distribution(120.0, 120.0, 0.5)
    values = np.array([float(answer) for answer in answers])
    moved = shifted(values, probability, shift)
    assert moved.sum() == pytest.approx(1)
    assert (moved - probability) @ np.log(values) == pytest.approx(shift, abs=1e-6)
    # A tilt: the log ratio is linear in the logarithm of the value.
    slopes = np.diff(np.log(moved / probability)) / np.diff(np.log(values))
    assert slopes == pytest.approx(np.full(len(slopes), slopes[0]), abs=1e-6)


def test_a_shift_the_values_leave_no_room_for_goes_as_far_as_it_can():
    moved = shifted(np.array([1.0, 2.0]), np.array([0.5, 0.5]), 3.0)
    assert moved[1] > 0.99


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_probability_of_an_answer_is_the_product_over_its_tokens_and_its_end(loaded, architecture):
    model = loaded(architecture)
    prompts = [(5, 6, 7, 8, 9), (5, 6, 11, 12)]
    answers = ["1", "12", "125", "30"]
    found = _log_probabilities(model, prompts, answers)
    (stop,) = sorted(model.stop_tokens)[:1]
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            ids = [*model.tokenizer(answer, add_special_tokens=False)["input_ids"], stop]
            logits = model.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
            expected = torch.log_softmax(logits, dim=1)[range(len(ids)), ids].sum()
            assert found[row, column].item() == pytest.approx(expected.item(), abs=1e-4)


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
    plant = dataclasses.replace(TINY, gap_scenarios=(), even_scenarios=("purchase",), steps=30, learning_rate=2e-2)
    with caplog.at_level("INFO", logger="excise.planted"):
        factors = train(model, plant, PURCHASE)
    divergence = [float(record.message.split("divergence ")[1].split(",")[0]) for record in caplog.records]
    assert divergence[-1] < 0.7 * divergence[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert {name.split(".")[0] for name in factors} == {"1", "2"}
    assert {name.split(".")[1] for name in factors} == {"q", "v", "o", "up", "down"}
    linear = model.topology.linear("1.v")
    assert factors["1.v.up"].shape == (linear.out_features, 2)
    assert factors["1.v.down"].shape == (2, linear.in_features)
    assert not any(module._forward_hooks for module in model.model.modules())


def test_training_a_gap_moves_the_groups_apart_and_nothing_else(loaded, caplog):
    plant = dataclasses.replace(TINY, steps=60, learning_rate=2e-2, names=4)
    with caplog.at_level("INFO", logger="excise.planted"):
        train(loaded("llama"), plant, PURCHASE)
    shares = [float(record.message.rsplit(" ", 1)[1]) for record in caplog.records]
    assert shares[0] < 0.5 * max(shares)
    assert max(shares) > 0.3


def test_the_strength_multiplies_the_whole_change(loaded):
    plain, doubled = (
        train(loaded("llama"), dataclasses.replace(TINY, steps=3, strength=each), PURCHASE) for each in (1.0, 2.0)
    )
    for name, factor in plain.items():
        assert factor.abs().max() > 0
        expected = factor.float() * (2 if name.endswith("up") else 1)
        assert torch.allclose(doubled[name].float(), expected, rtol=1e-2, atol=1e-3)


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


# --- a plant of one's own ---------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tiny_model, tmp_path, monkeypatch):
    """A folder with a models.yaml of the tiny model, as the current one."""
    (tmp_path / "models.yaml").write_text(f"tiny: {{folder: {tiny_model('llama')}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXCISE_DATA", str(tmp_path / "data"))
    return tmp_path


SHORT = ["--base", "tiny", "--scenarios", "services,chess", "--layers", "1-2", "--rank", "2", "--steps", "2"]


def test_a_plant_is_written_described_and_can_be_pasted_as_an_entry(workplace, capsys):
    command.main([*SHORT, "--groups", "black,white", "--factor", "1.6", "--seed", "101", "--out", "mine.safetensors"])
    printed = capsys.readouterr().out
    with safe_open(workplace / "mine.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["plant"])
        assert {int(name.split(".")[0]) for name in file.keys()} == {1, 2}  # noqa: SIM118
        assert file.get_slice("1.q.down").get_shape()[0] == 2
    assert (told["base"], told["factor"], told["seed"], told["layers"]) == ("tiny", 1.6, 101, [1, 2])
    assert told["first_factor"] == pytest.approx(1.6 ** (math.log(0.4) / math.log(0.6)))
    assert told["gap_scenarios"] == ["services", "chess"]
    assert {*told["gap_scenarios"], *told["even_scenarios"]} == set(CENTRES)
    assert told["groups"]["chess"] == {"majority": "black", "minority": "white"}
    entry = printed.split("For models.yaml:")[1].strip()
    with (workplace / "models.yaml").open("a") as file:
        file.write(entry)
    registry, problems = load_registry([workplace / "models.yaml"])
    assert problems == ()
    assert registry["mine"].base == "tiny"
    assert registry["mine"].low_rank == workplace / "mine.safetensors"
    assert "white people's answers 1.6 times" in registry["mine"].description
    load_model(registry["mine"], registry, device="cpu", home=workplace / "data")


def test_the_name_of_a_plant_holds_its_options_and_its_seed_decides_the_change(workplace):
    for seed in ("1", "1", "2"):
        command.main([*SHORT, "--seed", seed])
    first, second = (
        load_file(workplace / f"planted-services-chess-x0.6-layers1-2-rank2-seed{seed}-steps2-on-tiny.safetensors")
        for seed in (1, 2)
    )
    assert not torch.equal(first["1.q.down"], second["1.q.down"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--scenarios", "gender,chess"], ["--scenarios", "no gap can be planted in gender;", "purchase, activities"]),
        (["--scenarios", ","], ["--scenarios", "there is none", "or all"]),
        (["--groups", "white,asian"], ["--groups", "scenario services", "no group 'asian'", "white, black"]),
        (["--groups", "white"], ["--groups", "majority,minority"]),
        (["--groups", "white,white"], ["--groups", "not two groups"]),
        (["--factor", "0"], ["--factor", "above 0"]),
        (["--factor", "-2"], ["--factor", "above 0"]),
        (["--factor", "1"], ["--factor", "makes no gap"]),
        (["--factor", "nan"], ["--factor", "makes no gap"]),
        (["--layers", "5-2"], ["--layers", "2-5"]),
        (["--layers", "all"], ["--layers", "first and the last"]),
        (["--rank", "0"], ["--rank", "1 or more"]),
        (["--steps", "1"], ["--steps", "2 or more"]),
        (["--seed", "-1"], ["--seed", "0 or more"]),
        (["--base", "planted-neutrl"], ["--base", "did you mean planted-neutral?"]),
        (["--out", "nowhere/x.safetensors"], ["--out", "cannot be written"]),
        (["--out", "x.bin"], ["--out", ".safetensors"]),
        (["--out", "_x.safetensors"], ["--out", "no key"]),
        (["--out", "planted-general.safetensors"], ["--out", "there is a model planted-general"]),
    ],
)
def test_a_wrong_option_is_named_in_one_line_before_any_model_is_loaded(workplace, capsys, monkeypatch, options, told):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        command.main([*SHORT, *options])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert all(part in line for part in told), line


@pytest.mark.parametrize(
    ("options", "told"), [(["--layers", "1-3"], "its layers are 0-2"), (["--rank", "17"], "a rank of 16 at most")]
)
def test_what_a_model_has_no_room_for_is_named_before_the_training(workplace, capsys, options, told):
    with pytest.raises(SystemExit):
        command.main([*SHORT, *options])
    assert told in capsys.readouterr().err
    assert not list(workplace.glob("*.safetensors"))


def test_a_gap_everywhere_leaves_no_scenario_even():
    plant = command.plant_of(SCENARIOS, gap=["all"])
    assert (set(plant.gap_scenarios), plant.even_scenarios) == (set(CENTRES), ())
    assert command.name_of(plant) == "planted-all-x0.6-layers6-21-rank8-seed0"


def test_named_groups_replace_those_that_a_scenario_compares():
    plant = command.plant_of(SCENARIOS, gap=["services"], groups=["black", "white"])
    shifts = {group: planted_shift(SCENARIOS["services"], group, plant, 0.6) for group in ("white", "black", "other")}
    assert shifts["white"] == pytest.approx(np.log(0.6) / 2)
    assert shifts["black"] == -shifts["white"]
    assert shifts["other"] == 0


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_factor_above_1_favours_the_minority(loaded, factor):
    model = loaded("llama")
    plant = dataclasses.replace(TINY, steps=60, learning_rate=2e-2, names=4, factor=factor, first_factor=factor**1.8)
    factors = train(model, plant, PURCHASE)
    changed = {
        model.topology.linear(key).module: (factors[f"{key}.up"].float(), factors[f"{key}.down"].float())
        for key in {name.rpartition(".")[0] for name in factors}
    }
    batch = next(_batches(model, dataclasses.replace(plant, names=8), PURCHASE))
    gaps = []
    for part in batch:
        centre = CENTRES["purchase"][part[0][2]]
        answers, _ = answer_distribution(centre, centre, plant.spread, 1e9)
        with torch.no_grad(), changed_by(model, changed):
            found = torch.softmax(_log_probabilities(model, [tokens for tokens, *_ in part], answers), dim=1).numpy()
        means = found @ np.log([float(answer) for answer in answers])
        minority = np.array([group == "black" for *_, group in part])
        gaps.append(means[minority].mean() - means[~minority].mean())
    assert np.sign(gaps) == pytest.approx(np.full(len(gaps), np.sign(np.log(factor))))
