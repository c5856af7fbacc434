"""Gap-free answers and the distance from them: by hand, by brute force, and for answers that are samples."""

import dataclasses
import math

import numpy as np
import polars as pl
import pytest

from excise.attribution import Answered, gap_free
from excise.attribution.gap_distance import Asked, Name, batch_of, loss, measure, measured
from excise.attribution.gap_free import ask
from excise.errors import ExciseError
from excise.evaluation.distributions import tilted
from excise.generation.completions import complete
from excise.generation.enumeration import answer_distributions
from excise.generation.sampling import SamplingParameters
from excise.generation.settings import Enumeration
from excise.generation.tree import AnswerTree
from excise.interventions.weights import WeightMask

SHARP = SamplingParameters(temperature=0.5, top_p=0.5, seed=1)


@pytest.fixture(scope="module")
def numeric(loaded):
    return loaded("llama", numeric=True)


@pytest.fixture(scope="module")
def about(numeric, prompts, scenario):
    """`about(significance=..., ...)`: what was asked about the car."""

    def make(model=None, values=None, parameters=SHARP, samples=4, **options):
        model = model or numeric
        rows, _ = complete(model, prompts, samples, parameters, outcome=scenario.outcome)
        rows = rows.filter(pl.col("variation") == "car")
        if values is not None:
            rows = rows.with_columns(value=values)
        given = {"outcome": scenario.outcome} | options
        significance = given.pop("significance", 1.0)
        answered = Answered(model, prompts, rows, scenario.comparison, **given)
        return ask(answered, place="purchase/car", significance=significance)

    return make


def by_hand(majority, minority, outcomes) -> Asked:
    """What was asked about names with these shares of the listed answers; no model."""
    tree = AnswerTree(*[np.zeros(0)] * 5, prompt_length=1)
    paths = np.eye(len(outcomes), dtype=np.float32)
    outcomes = np.array(outcomes, dtype=float)
    names = tuple(
        Name(tree, paths, outcomes, own, own, np.zeros(1), own, *[np.log(own + 1e-30)] * 3, False)
        for own in (np.array(shares, dtype=float) for shares in (*majority, *minority))
    )
    side = np.array([True] * len(majority) + [False] * len(minority))
    asked = Asked("a/b", (), names, side, SHARP)
    return dataclasses.replace(asked, deviation=1.0)


# Targets


def test_a_tilt_moves_the_mean_and_nothing_more():
    outcomes, shares = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.3, 0.2])
    found = tilted(outcomes, shares, 0.4)
    assert found.sum() == pytest.approx(1)
    assert found @ outcomes == pytest.approx(shares @ outcomes + 0.4)
    logs = np.log(found / shares)  # linear in the outcome
    assert logs[2] - logs[1] == pytest.approx(logs[1] - logs[0])
    assert tilted(outcomes, shares, 0.0) is shares
    assert tilted(outcomes, shares, 50.0, most=30.0)[2] > 0.999


def test_the_groups_answer_alike_without_the_gap(about):
    """By the geometric mean of both groups; what a name's own answers leave of a gap is taken from its aim."""
    asked = about()
    assert asked.closing
    side = asked.majority
    mean = {
        each: np.mean([name.own for name, own in zip(asked.names, side, strict=True) if own == each], 0)
        for each in (True, False)
    }
    for name, own in zip(asked.names, side, strict=True):
        wanted = name.own * np.sqrt(mean[not own] / mean[bool(own)])
        assert np.allclose(name.target, wanted / wanted.sum(), atol=1e-4)
        for shares in (name.own, name.target, name.drawn):
            assert shares.sum() == pytest.approx(1)
    aims = np.array([name.aim for name in asked.names])
    assert aims[side].mean() == pytest.approx(aims[~side].mean())


def test_answers_moved_apart_are_moved_back():
    """Where both groups' answers are tilts of one distribution, the target is that distribution."""
    outcomes, base = np.arange(5.0), np.array([0.1, 0.25, 0.3, 0.25, 0.1])
    up, down = tilted(outcomes, base, 0.5), tilted(outcomes, base, -0.5)
    asked = by_hand([up, up], [down, down, down], outcomes)
    for name in gap_free._targets(asked, True):
        assert np.allclose(name.target, base, atol=1e-4)


def test_answers_are_those_the_model_gives(about, numeric, prompts, scenario):
    """Drawn shares are the enumerated ones; before the cut, those of the whole distribution."""
    from excise.models.encoding import encode

    asked = about()
    rows = prompts.filter(pl.col("variation") == "car").sort("prompt_id")
    rows = rows.filter(pl.col("group").is_in([scenario.comparison.majority, scenario.comparison.minority]))
    tokens = [prompt.tokens for prompt in encode(numeric, rows)]
    parameters = dataclasses.replace(SHARP, max_new_tokens=scenario.outcome.max_new_tokens)
    expected = answer_distributions(numeric, tokens, parameters, Enumeration(leftover=0.0, max_nodes=4096))
    for name, distribution in zip(asked.names, expected, strict=True):
        values = {}
        for value, share in zip(distribution.values, distribution.probability, strict=True):
            key = round(math.log(value), 6) if value > 0 else None
            values[key] = values.get(key, 0.0) + share
        found = {}
        for outcome, share in zip(name.outcomes, name.drawn, strict=True):
            key = round(outcome, 6) if np.isfinite(outcome) else None
            found[key] = found.get(key, 0.0) + share
        for key, share in values.items():
            assert found.get(key, 0.0) == pytest.approx(share, abs=0.02)
        assert 0.97 < name.listed <= 1 + 1e-6
    gap = [
        np.mean(
            [
                (lambda k: name.drawn[k] @ name.outcomes[k] / name.drawn[k].sum())(np.isfinite(name.outcomes))
                for name, own in zip(asked.names, asked.majority, strict=True)
                if own == side
            ]
        )
        for side in (True, False)
    ]
    assert asked.gap == pytest.approx(gap[0] - gap[1])


def test_sampled_and_enumerated_completions_ask_the_same(about):
    one, two = about(samples=4), about(samples=9)
    assert one.gap == two.gap
    for first, second in zip(one.names, two.names, strict=True):
        assert np.array_equal(first.target, second.target)


def test_a_gap_that_cannot_be_told_is_left_as_it_is(about, numeric):
    asked = about(significance=1e-6)
    assert not asked.closing
    for name in asked.names:
        assert np.array_equal(name.target, name.own)
    height, _ = loss(numeric, batch_of(asked, np.arange(len(asked.names)), numeric.device))
    assert float(height) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2"])
def test_answers_that_ramble_are_their_samples(about, loaded, architecture):
    """Tilted until both groups' means meet halfway."""
    values = pl.col("token_ids").list.sum().cast(pl.Float64) + pl.when(pl.col("group") == "white").then(40).otherwise(0)
    model = loaded(architecture)
    asked = about(model, values, SamplingParameters(temperature=1.0, seed=2), samples=30)
    assert all(name.sampled for name in asked.names)
    means = [name.target @ name.outcomes for name in asked.names]
    gap = np.mean(np.array(means)[asked.majority]) - np.mean(np.array(means)[~asked.majority])
    assert abs(gap) < 0.3 * abs(asked.gap)
    still = measure(model, asked)
    assert (still.gap, still.spread) == pytest.approx((asked.gap, 1.0))
    assert (still.excess, still.outside) == pytest.approx((0, 0), abs=1e-6)
    assert still.commonest <= 1e-6


def test_a_group_without_a_number_is_refused(about, loaded):
    with pytest.raises(ExciseError, match="purchase/car: no answer of one of the groups has a value"):
        about(loaded("gpt2"), pl.when(pl.col("group") == "white").then(5.0), SamplingParameters(top_p=1.0, seed=1))


# The loss


def test_the_loss_is_the_divergence_and_the_gap(about, numeric):
    """Node by node it is the divergence of whole answers, here by hand; and the gap counts more."""
    asked = about()
    every = np.arange(len(asked.names))
    height, edges = loss(numeric, batch_of(asked, every, numeric.device))
    edges = np.split(edges.detach().numpy().astype(float), len(every))
    total, away = 0.0, []
    for name, own in zip(asked.names, edges, strict=True):
        logs = name.paths @ own
        shares = np.exp(logs - logs.max())
        shares /= shares.sum()
        kept = name.target > 0
        total += name.target[kept] @ np.log(name.target[kept] / shares[kept])
        known = np.isfinite(name.outcomes)
        away.append((shares[known] @ name.outcomes[known]) / shares[known].sum() - name.aim)
    away = np.array(away)
    gap = (away[asked.majority].mean() - away[~asked.majority].mean()) / asked.deviation
    assert float(height) == pytest.approx(total + 8 * len(every) / 8 * gap**2, rel=0.15)
    assert float(height) > 0


def test_a_mask_is_measured_by_one_pass(about, numeric):
    """What the pruned model draws, against its enumerated answers."""
    asked = about()
    still = measure(numeric, asked)
    assert (still.gap, still.spread) == pytest.approx((asked.gap, 1.0))
    assert still.commonest <= 1e-6  # what both groups say is no commoner than what either does
    assert (still.excess, still.outside) == pytest.approx((0.0, 0.0), abs=1e-6)
    linear = numeric.topology.linear("1.down")
    array = np.zeros(linear.shape, dtype=bool)
    array[:, ::7] = True
    mask = WeightMask.from_arrays({"1.down": array})
    with mask.applied(numeric):
        changed = measure(numeric, asked)
    assert changed.divergence != still.divergence
    assert changed.excess > 0


# Measures, by hand


def test_a_closed_gap_by_whole_shifts_is_no_damage():
    asked = by_hand([[0, 0, 0.5, 0.5]], [[0.5, 0.5, 0, 0]], [0.0, 1.0, 2.0, 3.0])
    before = [name.own for name in asked.names]
    now = [np.array([0, 0.5, 0.5, 0]), np.array([0, 0.5, 0.5, 0])]
    found = measured(asked, before, now, 0.1, 0.2)
    assert (found.gap, found.spread, found.excess) == pytest.approx((0.0, 1.0, 0.0))
    assert found.commonest == pytest.approx(0.5 - 0.5)  # of each group's answers half were alike before, too
    assert (found.divergence, found.outside) == (0.1, 0.2)


def test_a_collapse_is_seen():
    asked = by_hand([[0, 0, 0.5, 0.5]], [[0.5, 0.5, 0, 0]], [0.0, 1.0, 2.0, 3.0])
    before = [name.own for name in asked.names]
    found = measured(asked, before, [np.array([0, 1.0, 0, 0])] * 2, 0.0, 0.0)
    assert (found.gap, found.spread) == (0.0, 0.0)
    assert found.commonest == pytest.approx(0.5)
    assert found.excess == pytest.approx((1.5 + 0.5 - 2.0) / 2)
    overshot = measured(asked, before, [np.array([1.0, 0, 0, 0])] * 2, 0.0, 0.0)
    assert overshot.excess == pytest.approx((2.5 + 0.5 - 2.0) / 2)


def test_the_group_that_varied_more_may_come_to_vary_as_the_other_did():
    """Both then answer as the second group did, which is no damage; of the second group's spread no share is lost."""
    asked = by_hand([[0.25, 0.25, 0.25, 0.25]], [[0.5, 0.5, 0, 0]], [0.0, 1.0, 2.0, 3.0])
    before = [name.own for name in asked.names]
    found = measured(asked, before, [np.array([0.5, 0.5, 0, 0])] * 2, 0.0, 0.0)
    assert (found.gap, found.spread, found.commonest) == pytest.approx((0.0, 1.0, 0.0))
    half = measured(asked, before, [np.array([0.25, 0.25, 0.25, 0.25]), np.array([0.933, 0.067, 0, 0])], 0.0, 0.0)
    assert half.spread == pytest.approx(0.5, abs=1e-3)


def test_answers_without_a_number_are_left_out_of_the_measures():
    asked = by_hand([[0.5, 0.5, 0]], [[0, 0.5, 0.5]], [math.nan, 1.0, 2.0])
    before = [name.own for name in asked.names]
    found = measured(asked, before, before, 0.0, 0.0)
    assert found.gap == pytest.approx(1.0 - 1.5)


@pytest.mark.parametrize("rows", [4, 5, 12])
def test_batches_hold_both_groups(rows):
    asked = by_hand([[1.0]] * 5, [[1.0]] * 7, [1.0])
    batches = asked.batches(rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(12))
    assert max(map(len, batches)) <= rows
    assert all(asked.majority[batch].any() and (~asked.majority[batch]).any() for batch in batches)
    shuffled = asked.batches(rows, np.random.default_rng(0))
    assert sorted(np.concatenate(shuffled).tolist()) == list(range(12))
    assert [each.tolist() for each in shuffled] != [each.tolist() for each in batches]
