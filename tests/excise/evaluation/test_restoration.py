"""Restoration and specificity against distances worked out by hand."""

import math

import numpy as np
import polars as pl
import pytest
from scipy.stats import wasserstein_distance

from excise.errors import ExciseError
from excise.evaluation.answer_distances import answer_distributions, distances
from excise.evaluation.restoration import NOTHING, RESTORATION_SCHEMA, restoration
from excise.reporting.restoration import restoration_markdown

GROUPS = {"white": ("Jake", "Claire", "Seth"), "black": ("Jamal", "Ebony", "Tyra")}
NAMES = [(group, name) for group, names in GROUPS.items() for name in names]


def answers(model: str, values, *, variation: str = "car", **columns) -> pl.DataFrame:
    """Samples of every name. values: by name or group, or of all: the answers in the order of their numbers."""
    rows = []
    for group, name in NAMES:
        own = values.get(name, values.get(group)) if isinstance(values, dict) else values
        rows += [
            {
                "model": model,
                "scenario": "price",
                "variation": variation,
                "group": group,
                "subject": name,
                "prompt_id": name,
                "sample": number,
                "value": value,
                "probability": None,
                "leftover": None,
                **columns,
            }
            for number, value in enumerate(own)
        ]
    kinds = {"value": pl.Float64, "probability": pl.Float64, "leftover": pl.Float64, "matched_to": pl.String}
    return pl.DataFrame(rows, schema_overrides=kinds, infer_schema_length=None)


def masked(model: str, values, *, strategy: str = "mine", matched_to=None, draw: int = 0, variation: str = "car"):
    return answers(
        model, values, variation=variation, strategy=strategy, level="within_context", matched_to=matched_to, draw=draw
    )


def told(rows: pl.DataFrame, metric: str, *, strategy: str = "mine", variation: str = "car") -> dict:
    (row,) = rows.filter(metric=metric, strategy=strategy, variation=variation).to_dicts()
    return row


REFERENCE = answers("plain", [100.0, 100.0, 100.0, 100.0])
BIASED = answers("biased", {"white": [120.0] * 4, "black": [80.0] * 4})
SETTINGS = {"groups": ["white", "black"], "log": False, "resamples": 200}


# --- distances --------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_scipy_name_by_name():
    rng = np.random.default_rng(0)
    drawn = [{name: rng.integers(1, 9, 20).astype(float) for _, name in NAMES} for _ in range(2)]
    found = distances(*(answer_distributions(answers("a", each), NAMES) for each in drawn)).apart
    for place, (_, name) in enumerate(NAMES):
        assert found[place] == pytest.approx(wasserstein_distance(drawn[0][name], drawn[1][name]))


def test_the_same_answers_are_exactly_no_distance_apart():
    rng = np.random.default_rng(1)
    first = {name: rng.random(30) for _, name in NAMES}
    second = first | {"Jake": rng.random(30)}
    found = distances(*(answer_distributions(answers("a", each), NAMES) for each in (first, second)))
    assert found.apart[0] > 0
    assert (found.apart[1:] == 0).all()
    assert (found.noise[1:] == 0).all()


def test_on_a_log_scale_ratios_count_and_what_is_not_positive_is_left_out():
    first = answer_distributions(answers("a", [50.0, 0.0, -3.0, None, math.inf]), NAMES, log=True)
    second = answer_distributions(answers("a", [100.0]), NAMES, log=True)
    assert distances(first, second).apart == pytest.approx(np.full(6, math.log(2)))
    nothing = answer_distributions(answers("a", [0.0, None]), NAMES, log=True)
    assert np.isnan(distances(nothing, second).apart).all()


def test_enumerated_answers_count_by_their_probability_and_have_unread_mass_but_no_noise():
    exact = answers("a", [10.0, 20.0], leftover=0.04).with_columns(
        probability=pl.when(pl.col("sample") == 0).then(0.72).otherwise(0.24)
    )
    found = answer_distributions(exact, NAMES)
    assert found.mass[0] == pytest.approx([0.75, 0.25])
    # two answers differ with probability 2 x .75 x .25, by 10 then
    assert found.unread == pytest.approx(np.full(6, 0.04 * 2 * 0.75 * 0.25 * 10))
    apart = distances(found, answer_distributions(answers("a", [10.0], leftover=0.0), NAMES))
    assert apart.apart == pytest.approx(np.full(6, 2.5))
    assert (apart.noise == 0).all()
    assert apart.unread == pytest.approx(found.unread)


@pytest.mark.parametrize("samples", [4, 16, 40])
def test_noise_is_what_chance_makes_of_a_distance(samples):
    rng = np.random.default_rng(2)
    drawn = [{name: rng.normal(0, 1, samples) for _, name in NAMES} for _ in range(1000)]
    found = [answer_distributions(answers("a", each), NAMES) for each in drawn]
    pairs = [distances(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
    apart, noise = (np.mean([getattr(each, what) for each in pairs]) for what in ("apart", "noise"))
    assert apart > 0.2
    assert noise == pytest.approx(apart, rel=0.07)  # it is all chance
    # The same random numbers: a shift is told exactly, and nothing of it is chance.
    moved = answer_distributions(answers("a", {name: own + 0.1 for name, own in drawn[0].items()}), NAMES)
    paired = distances(found[0], moved)
    assert paired.apart == pytest.approx(np.full(6, 0.1))
    assert paired.noise == pytest.approx(np.zeros(6), abs=1e-9)
    one = answer_distributions(answers("a", [1.0]), NAMES)
    assert np.isnan(distances(one, one).noise).all()


# --- restoration ------------------------------------------------------------------------------------------------------


def test_restoration_and_specificity_are_those_worked_out_by_hand():
    # Two of three parts of the way back; the random mask one; the reference is moved by 5.
    pruned = pl.concat(
        [
            masked("biased", {"white": [105.0] * 4, "black": [95.0] * 4}),
            masked("biased", {"white": [115.0] * 4, "black": [85.0] * 4}, strategy="random", matched_to="mine"),
            masked("biased", {"white": [120.0] * 4, "black": [90.0] * 4}, strategy="random", matched_to="mine", draw=1),
        ]
    )
    edited = masked("plain", {"white": [105.0] * 4, "black": [100.0] * 4})
    rows = restoration(BIASED, pruned, REFERENCE, edited, **SETTINGS)
    assert dict(rows.schema) == RESTORATION_SCHEMA
    for variation in ("car", "(all)"):
        unpruned = [
            told(rows, metric, strategy="unpruned", variation=variation)["estimate"]
            for metric in ("distance", "noise", "distance_over_noise")
        ]
        assert unpruned == [20.0, 0.0, 20.0]
        own = told(rows, "restoration", variation=variation)
        assert (own["estimate"], own["low"], own["high"]) == pytest.approx((0.75, 0.75, 0.75))
        assert (own["names"], own["reference"], own["model"], own["reason"]) == (3, "plain", "biased", None)
        assert told(rows, "distance", variation=variation)["estimate"] == pytest.approx(5)
        random = told(rows, "restoration", strategy="random", variation=variation)
        assert random["estimate"] == pytest.approx(0.25)
        over = told(rows, "restoration_over_random", variation=variation)
        assert over["estimate"] == pytest.approx(0.5)
        assert told(rows, "specificity", variation=variation)["estimate"] == pytest.approx(2.5)
        assert told(rows, "specificity_over_noise", variation=variation)["estimate"] == pytest.approx(2.5)
    assert not rows.filter((pl.col("strategy") == "random") & pl.col("metric").str.starts_with("spec")).height


def test_a_closed_gap_that_is_further_away_is_no_restoration():
    pruned = masked("biased", [60.0] * 4)
    assert told(restoration(BIASED, pruned, REFERENCE, pruned.clear(), **SETTINGS), "restoration")["estimate"] == -1


def test_a_name_of_whom_the_bias_took_next_to_nothing_does_not_swamp_the_others():
    biased = answers("biased", {"white": [120.0] * 4, "black": [80.0] * 4, "Jake": [100.001] * 4})
    pruned = masked("biased", {"white": [100.0] * 4, "black": [100.0] * 4, "Jake": [101.0] * 4})
    found = told(restoration(biased, pruned, REFERENCE, pruned.clear(), **SETTINGS), "restoration")
    assert found["estimate"] == pytest.approx(1 - 1 / 100.001)  # the mean of ratios would be about -165
    assert 0.95 < found["low"] <= found["estimate"] <= found["high"] <= 1


def test_what_chance_makes_of_distances_does_not_hide_what_was_restored():
    """The answers are the reference's again, but drawn anew: the plain distances would say that less was restored."""
    rng, found = np.random.default_rng(5), []
    for _ in range(60):
        plain, again = ({name: rng.normal(100, 10, 30) for _, name in NAMES} for _ in range(2))
        biased = answers("p", {name: own + (6 if name in GROUPS["white"] else -6) for name, own in plain.items()})
        pruned = masked("p", again)
        rows = restoration(biased, pruned, answers("r", plain), pruned.clear(), **SETTINGS | {"resamples": 10})
        found.append((1 - told(rows, "distance")["estimate"] / 6, told(rows, "restoration")["estimate"]))
    assert np.mean(found, axis=0)[0] < 0.6
    assert np.mean(found, axis=0)[1] == pytest.approx(1, abs=0.1)


def test_intervals_resample_names():
    pruned = masked("biased", {"white": [100.0] * 4, "black": [80.0] * 4, "Jamal": [100.0] * 4})
    rows = restoration(BIASED, pruned, REFERENCE, pruned.clear(), **SETTINGS | {"resamples": 4000})
    found = told(rows, "restoration")
    assert found["estimate"] == pytest.approx(4 / 6)
    # Among three names drawn of three, Jamal is none in 8 of 27 resamples, and all three in 1 of 27.
    assert (found["low"], found["high"]) == pytest.approx((0.5, 1.0))


def test_variations_of_different_size_weigh_alike_on_a_linear_scale_and_as_ratios_on_a_logarithmic_one():
    def both(of, model, first, second):
        return pl.concat([of(model, first), of(model, [value * 1000 for value in second], variation="house")])

    reference, biased = (both(answers, model, [each] * 4, [each] * 4) for model, each in (("r", 100.0), ("p", 80.0)))
    pruned = both(masked, "p", [100.0] * 4, [80.0] * 4)  # the one is restored, the other is not
    for log in (False, True):
        rows = restoration(biased, pruned, reference, pruned.clear(), **SETTINGS | {"log": log})
        assert told(rows, "restoration")["estimate"] == pytest.approx(1)
        assert told(rows, "restoration", variation="house")["estimate"] == pytest.approx(0)
        assert told(rows, "restoration", variation="(all)")["estimate"] == pytest.approx(0.5)
    assert told(rows, "distance", strategy="unpruned", variation="(all)")["estimate"] == pytest.approx(math.log(1.25))


def test_where_there_is_nothing_to_restore_the_figure_is_null_and_says_so():
    rng = np.random.default_rng(3)
    plain, same = (
        answers(model, {name: rng.normal(100, 10, 20) for _, name in NAMES}) for model in ("plain", "biased")
    )
    pruned = masked("biased", [90.0] * 20)
    for reference, biased in ((plain, same), (REFERENCE, REFERENCE.with_columns(model=pl.lit("biased")))):
        rows = restoration(biased, pruned, reference, pruned.clear(), **SETTINGS)
        found = told(rows, "restoration")
        assert (found["estimate"], found["low"], found["reason"]) == (None, None, NOTHING)
        assert told(rows, "distance")["estimate"] > 0
    # the same as samples: within noise; moved for good: beyond
    edited = pl.concat(
        [
            same.with_columns(strategy=pl.lit("mine"), level=pl.lit("x"), matched_to=pl.lit(None, pl.String), draw=0),
            same.with_columns(
                pl.col("value") + 30,
                strategy=pl.lit("far"),
                level=pl.lit("x"),
                matched_to=pl.lit(None, pl.String),
                draw=0,
            ),
        ]
    )
    rows = restoration(same, pruned, plain, edited, **SETTINGS)
    assert told(rows, "specificity")["estimate"] > 0
    assert told(rows, "specificity_over_noise")["low"] < 0
    assert told(rows, "specificity_over_noise", strategy="far")["low"] > 0
    assert "within noise" in restoration_markdown(rows)
    assert "beyond noise" in restoration_markdown(rows)
    assert f"* car: {NOTHING}" in restoration_markdown(rows)


def test_too_few_names_with_answers_and_unknown_noise_are_reasons():
    mute = masked("biased", {"white": [100.0] * 4, "black": [None] * 4, "Jamal": [100.0] * 4})
    rows = restoration(BIASED, mute, REFERENCE, mute.clear(), **SETTINGS)
    for metric in ("distance", "restoration"):
        found = told(rows, metric)
        assert found["estimate"] is None
        assert "fewer than 2 names of a group" in found["reason"]
        assert found["names"] == 1
    once = [frame.filter(pl.col("sample") == 0) for frame in (BIASED, masked("biased", [100.0]), REFERENCE)]
    rows = restoration(*once, mute.clear(), **SETTINGS)
    assert told(rows, "distance")["estimate"] == 0
    assert told(rows, "restoration")["estimate"] is None
    assert "two samples of a name" in told(rows, "restoration")["reason"]


def test_masks_of_which_there_are_none_have_no_rows():
    nothing = masked("biased", [1.0]).clear()
    rows = restoration(BIASED, nothing, REFERENCE, nothing, **SETTINGS)
    assert set(rows["strategy"]) == {"unpruned"}
    # a variation in which a strategy found none does not stop the others
    two = pl.concat([BIASED, BIASED.with_columns(variation=pl.lit("house"))])
    reference = pl.concat([REFERENCE, REFERENCE.with_columns(variation=pl.lit("house"))])
    rows = restoration(two, masked("biased", [100.0] * 4), reference, nothing, **SETTINGS)
    assert set(rows.filter(strategy="mine")["variation"]) == {"car", "(all)"}
    assert told(rows, "restoration", variation="(all)")["estimate"] == 1


def test_a_reference_that_was_asked_something_else_is_refused():
    pruned = masked("biased", [1.0]).clear()
    with pytest.raises(ExciseError, match="no answers to car"):
        restoration(BIASED, pruned, REFERENCE.with_columns(variation=pl.lit("house")), pruned, **SETTINGS)
    with pytest.raises(ExciseError, match="lack the column"):
        restoration(BIASED.drop("sample"), pruned, REFERENCE, pruned, **SETTINGS)
    with pytest.raises(ExciseError, match="group 'asian'"):
        restoration(BIASED, pruned, REFERENCE, pruned, **SETTINGS | {"groups": ["white", "asian"]})
