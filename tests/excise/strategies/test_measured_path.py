"""Paths: gradients of units by finite differences, a mask within the budgets or none, and going on after a kill."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from excise.attribution import Answered
from excise.attribution.gap_distance import Measured, batch_of, loss, measure
from excise.attribution.gap_free import ask
from excise.files import parts
from excise.files.parts import Parts, Work
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters
from excise.strategies import measured_path as paths
from excise.strategies import units as units_module
from excise.strategies.measured_path import (
    NO_GAP,
    NO_MASK,
    Budgets,
    Course,
    kept_path,
    measured_path,
)
from excise.strategies.units import heads_of, weights_of

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
WIDE = Budgets(spread=0.0, commonest=1.0, change=10.0, lost=1.0)
SHARP = SamplingParameters(temperature=0.7, top_p=0.6, seed=1)


@pytest.fixture(scope="module")
def asked_of(loaded, prompts, scenario):
    """`asked_of("llama")`: the model and what was asked about each item, closing whatever gap there is."""

    def make(architecture="llama", significance=1.0):
        model = loaded(architecture, numeric=architecture == "llama")
        rows, _ = complete(model, prompts, 6, SHARP, outcome=scenario.outcome)
        if architecture != "llama":  # random models say no numbers; any value will do
            rows = rows.with_columns(value=1 + pl.col("token_ids").list.first().cast(pl.Float64))
        return model, [
            ask(
                Answered(
                    model, prompts, rows.filter(pl.col("variation") == item), scenario.comparison, scenario.outcome
                ),
                place=f"purchase/{item}",
                significance=significance,
            )
            for item in ("car", "oven")
        ]

    return make


def every_weight(model, roles=ROLES):
    return weights_of(model, roles, {each.key: np.arange(np.prod(each.shape)) for each in model.topology.linears})


def follow(model, asked, units, **options):
    work = options.pop("work", None)
    course = Course(**{"density": 0.05, "budgets": WIDE, "seed": 0, "steps": 12} | options)
    return measured_path(model, asked, units, course, work=work)


# Gradients of units


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_gradient_of_a_weight_is_that_of_the_loss(asked_of, architecture):
    model, (asked, _) = asked_of(architecture)
    batch = batch_of(asked, np.arange(len(asked.names)), model.device)
    units = every_weight(model, ("q", "v", "down"))
    gradient, height = units_module.gradient(model, [batch], units)
    assert height == pytest.approx(float(loss(model, batch)[0]) / len(asked.names), rel=1e-5)
    start = 0
    for key, places in units.places.items():
        own = gradient[start : start + len(places)]
        start += len(places)
        place = int(own.abs().argmax())
        weight = units.linears[key].weight(model.model)
        where = np.unravel_index(place, weight.shape)
        kept, heights = weight[where].clone(), []
        with torch.no_grad():
            for change in (-2e-3, 2e-3):
                weight[where] = kept + change
                heights.append(float(loss(model, batch)[0]) / len(asked.names))
            weight[where] = kept
        assert (heights[1] - heights[0]) / 4e-3 == pytest.approx(float(own[place]), rel=0.05, abs=1e-4), key


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_gradient_of_a_head_is_that_of_scaling_its_output(asked_of, architecture):
    model, (asked, _) = asked_of(architecture)
    batch = batch_of(asked, np.arange(len(asked.names)), model.device)
    units = heads_of(model)
    gradient, _ = units_module.gradient(model, [batch], units)
    linear = model.topology.linear("1.o")
    weight = linear.weight(model.model)
    width = linear.in_features // model.topology.heads
    columns, heights = slice(width, 2 * width), []
    kept = weight[:, columns].clone()
    with torch.no_grad():
        for scale in (0.99, 1.01):
            weight[:, columns] = kept * scale
            heights.append(float(loss(model, batch)[0]) / len(asked.names))
        weight[:, columns] = kept
    expected = float(gradient[model.topology.heads + 1])
    assert (heights[1] - heights[0]) / 0.02 == pytest.approx(expected, rel=0.05, abs=1e-4)


# The path


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_path_closes_the_gap_on_its_own_names(asked_of, architecture):
    model, asked = asked_of(architecture)
    before = {name: each.clone() for name, each in model.model.state_dict().items()}
    found = follow(model, asked[:1], every_weight(model))
    assert all(torch.equal(each, before[name]) for name, each in model.model.state_dict().items())
    assert found.steps[0].step == found.steps[0].pruned == 0
    assert found.steps[0].closed == pytest.approx(0, abs=1e-6)
    assert found.mask is not None, [dataclasses.asdict(step) for step in found.steps]
    (taken,) = [step for step in found.steps if step.pruned == found.mask.count]
    usable = [step for step in found.steps if step.within and step.closed >= 0.25]
    assert taken.distance == min(step.distance for step in usable) < found.steps[0].distance
    with found.mask.applied(model):
        now = measure(model, asked[0])
    kept = taken.measured["purchase/car"]
    assert dataclasses.astuple(now) == pytest.approx(dataclasses.astuple(kept), rel=1e-4, abs=1e-5)
    assert 1 - abs(now.gap) / abs(asked[0].gap) == pytest.approx(taken.closed, abs=1e-4)


def test_one_path_serves_several_variations(asked_of):
    model, asked = asked_of()
    found = follow(model, asked, every_weight(model))
    assert set(found.steps[-1].measured) == {"purchase/car", "purchase/oven"}
    shares = [1 - abs(found.steps[-1].measured[each.place].gap) / abs(each.gap) for each in asked]
    assert found.steps[-1].closed == pytest.approx(np.mean(shares))


def test_a_variation_without_a_gap_is_kept_as_it_is(asked_of):
    """It has no share of what is closed, and its damage counts."""
    model, (car, oven) = asked_of()
    still = dataclasses.replace(
        oven, closing=False, names=tuple(dataclasses.replace(name, target=name.own) for name in oven.names)
    )
    found = follow(model, [car, still], every_weight(model))
    last = found.steps[-1]
    assert last.closed == pytest.approx(1 - abs(last.measured["purchase/car"].gap) / abs(car.gap))
    tight = dataclasses.replace(WIDE, change=0.0)
    assert follow(model, [car, still], every_weight(model), budgets=tight).mask is None


def test_no_gap_and_no_mask_are_results(asked_of):
    model, asked = asked_of(significance=1e-6)
    found = follow(model, asked, every_weight(model))
    assert (found.mask, found.reason, len(found.steps)) == (None, NO_GAP, 1)
    model, asked = asked_of()
    for budgets in (Budgets(1.0, 0.0, 0.0), dataclasses.replace(WIDE, least_closed=1.01)):
        found = follow(model, asked, every_weight(model), budgets=budgets)
        assert (found.mask, found.reason) == (None, NO_MASK)
        assert len(found.steps) > 1


def test_no_more_than_the_density_is_pruned(asked_of):
    model, asked = asked_of()
    units = every_weight(model)
    most = int(0.002 * units.total)
    found = follow(model, asked, units, density=0.002, budgets=dataclasses.replace(WIDE, least_closed=-10.0))
    assert most / 4 < max(step.pruned for step in found.steps) <= most
    assert set(found.mask.shapes) == {each.key for each in model.topology.linears}


def test_candidates_and_roles_limit_what_is_pruned(asked_of):
    model, asked = asked_of()
    some = {"0.q": np.arange(0, 200, 2), "1.up": np.arange(300)}
    units = weights_of(model, ("q",), some)
    found = follow(model, asked, units, budgets=dataclasses.replace(WIDE, least_closed=-10.0), density=0.5)
    assert {key for key, count in found.mask.counts().items() if count} == {"0.q"}
    assert set(np.flatnonzero(found.mask.array("0.q"))) <= set(some["0.q"].tolist())
    assert {key.split(".")[1] for key in found.mask.shapes} == {"q"}


def test_heads_are_pruned_whole(asked_of):
    model, asked = asked_of()
    found = follow(model, asked, heads_of(model), density=0.5, budgets=dataclasses.replace(WIDE, least_closed=-10.0))
    assert {key.split(".")[1] for key in found.mask.shapes} == {"head_output"}
    assert 0 < found.mask.count <= model.topology.layers * model.topology.heads / 2


def test_budgets_have_a_margin_and_refuse_what_cannot_be_told(asked_of):
    model, (asked, _) = asked_of()
    still = measure(model, asked)
    budgets = Budgets(spread=0.6, commonest=0.2, change=0.4)
    allowed = dataclasses.replace(still, spread=0.71, commonest=0.149, excess=0.29)
    assert budgets.allow(allowed)
    refused = ("spread", 0.69), ("commonest", 0.16), ("excess", 0.31), ("outside", 0.06), ("spread", float("nan"))
    for field, value in refused:
        assert not budgets.allow(dataclasses.replace(allowed, **{field: value})), field


def test_a_path_that_moved_away_goes_back_and_takes_half_the_steps():
    state = {name: np.zeros(3, dtype=np.float32) for name in ("weight", "drop", "harm")} | {
        "active": np.zeros(3, dtype=bool),
        "damping": np.array(1.0),
        "height": np.array(1.0),
        "share": np.array(0.25),
        "start": np.array(1.0),
        "measured": np.zeros((0, 1, len(Measured.FIELDS))),
        "taken": np.zeros(0, dtype=np.int64),
        "noted": np.zeros((0, 3), dtype=bool),
    }
    asked = [SimpleNamespace(closing=True, gap=1.0, deviation=1.0)]
    walk, ways = paths._Walk(None, 3, state), []
    # Distances of .5, .9 and .4 from gaps whose divergences are 0; then the same by a divergence.
    for step, (place, gap, divergence) in enumerate([(0, 0.5**0.5, 0.0), (1, 0.9**0.5, 0.0), (2, 0.0, 0.4)], start=1):
        walk.active[place] = True
        walk.note(step, asked, [Measured(divergence, gap, 1.0, 0.0, 0.0, 0.0)])
        ways.append((walk.active.tolist(), walk.share))
    assert ways == [([True, False, False], 0.25), ([True, False, False], 0.125), ([True, False, True], 0.125)]
    assert [active.tolist() for *_, active in walk.noted][1] == [True, True, False]
    worse = paths._Walk(None, 3, state)
    worse.active[0] = True
    worse.note(4, asked, [Measured(2.0, 0.0, 1.0, 0.0, 0.0, 0.0)])
    assert (worse.active.tolist(), worse.share) == ([False] * 3, 0.125)  # nearer than the unedited model is no place


# Files


def test_a_killed_path_goes_on_where_it_was(asked_of, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SHARE", float("inf"))
    model, asked = asked_of()
    units = every_weight(model)
    wanted = follow(model, asked, units)
    seen = []

    def kill(label, done, total):
        seen.append(done)
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(model, asked, units, work=Work("", kill, Parts(tmp_path / "path.parts")))
    again, own = [], Parts(tmp_path / "path.parts")
    found = follow(model, asked, units, work=Work("", lambda _, done, __: again.append(done), own))
    assert again[0] == 6
    assert found == wanted


def test_a_path_that_is_there_is_read(asked_of, tmp_path, monkeypatch):
    model, asked = asked_of()
    units = every_weight(model)
    monkeypatch.setattr(paths, "STEPS", 8)
    wide = Course(density=0.05, budgets=WIDE, seed=0)

    def kept(course, asked=asked, units=units, **options):
        return kept_path(model, asked, units, course, folder=tmp_path, **options)

    first = kept(wide)
    assert len(list(tmp_path.iterdir())) == 1
    assert kept(wide, progress=lambda *told: pytest.fail("it was followed again")) == first
    assert first.mask is not None
    kept(dataclasses.replace(wide, seed=1))
    kept(wide, asked[:1])
    strict = dataclasses.replace(wide, budgets=Budgets(1.0, 0.0, 0.0))
    none = kept(strict)
    assert len(list(tmp_path.iterdir())) == 4
    assert kept(strict) == none
    assert (none.mask, none.reason) == (None, NO_MASK)
    of_heads = dataclasses.replace(wide, density=0.5)
    assert kept(of_heads, units=heads_of(model)) == kept(of_heads, units=heads_of(model))
