"""Splits of the names, summed up: median, range, an interval that contains the split, and the sentence about them."""

import math

import polars as pl
import pytest

from excise.evaluation.stability import STABILITY_SCHEMA, summary
from excise.reporting.stability import NO_SPLIT, ONE_SPLIT, stability_finding, stability_markdown, stability_sentence


def split(number, estimate, low, high, splits=3, strategy="ours", variation="(all)"):
    place = {"model": "m", "scenario": "s", "split": number, "splits": splits}
    place |= {"variation": variation, "strategy": strategy}
    told = {"level": "prompt_specific", "matched_to": None, "metric": "gap_reduction", "names": 8}
    return place | told | {"estimate": estimate, "low": low, "high": high}


def frame(*rows):
    return pl.DataFrame(rows, schema=STABILITY_SCHEMA)


def test_the_interval_holds_the_names_and_the_split():
    rows = frame(split(0, 0.8, 0.7, 0.9), split(1, 0.6, 0.4, 0.8), split(2, -0.1, -0.3, 0.1))
    (row,) = summary(rows).iter_rows(named=True)
    assert (row["median"], row["lowest"], row["highest"]) == (0.6, -0.1, 0.8)
    assert (row["found"], row["splits"], row["below_0"]) == (3, 3, 1)
    within = sum((width / 3.92) ** 2 for width in (0.2, 0.4, 0.4)) / 3
    mean = 1.3 / 3
    between = sum((each - mean) ** 2 for each in (0.8, 0.6, -0.1)) / 2
    assert row["high"] - row["median"] == pytest.approx(1.96 * math.sqrt(within + between))
    assert row["median"] - row["low"] == pytest.approx(1.96 * math.sqrt(within + between))


def test_one_split_and_unknown_intervals_have_none():
    assert summary(frame(split(0, 0.8, 0.7, 0.9, 1)))["low"].to_list() == [None]
    some = frame(split(0, 0.8, 0.7, 0.9), split(1, 0.8, None, None))
    assert summary(some)["high"].to_list() == [None]


def test_splits_without_a_mask_are_counted():
    rows = frame(split(0, 0.8, 0.7, 0.9, 5), split(3, 0.7, 0.6, 0.8, 5), split(1, None, None, None, 5))
    summed = summary(rows)
    assert summed["found"].to_list() == [2]
    sentence = stability_sentence(summed)
    assert sentence.startswith("Over 5 splits of the names ours, prompt-specific, removes 75 [")
    assert "] % of the gap (median; 70% to 80%); in none it grew the gap;" in sentence
    assert sentence.endswith("; in 3 no mask or no reduction was found.")


def test_a_gap_that_grew_in_a_split_is_said():
    summed = summary(frame(split(0, 0.8, 0.7, 0.9, 2), split(1, -3.0, -4.0, -2.0, 2)))
    assert "in 1 it grew the gap." in stability_sentence(summed)
    assert "| (all) | ours | prompt-specific | gap_reduction | -1.10 | -3.00 to 0.80 |" in stability_markdown(summed)


def test_nothing_is_said_of_nothing():
    assert stability_sentence(summary(frame())) == "No strategy has a reduction in any split."


def test_without_splits_the_finding_says_what_is_not_known():
    assert stability_finding(frame(), held_out=True) == ONE_SPLIT
    assert stability_finding(frame(), held_out=False) == NO_SPLIT
    rows = frame(split(0, 0.8, 0.7, 0.9, 2), split(1, 0.6, 0.5, 0.7, 2))
    assert stability_finding(rows, held_out=True) == stability_sentence(summary(rows))
