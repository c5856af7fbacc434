"""Claims about which names are held out, and which are matched by their length."""

import polars as pl
import pytest

from excise.errors import ExciseError
from excise.scenarios import expand, load_scenarios
from excise.scenarios.subsets import ATTRIBUTION, EVALUATION, halves, token_matched

SCENARIOS, _ = load_scenarios([])
PURCHASE = expand(SCENARIOS["purchase"])


def names(*rows):
    return pl.DataFrame(rows, schema=["group", "subject", "gender"], orient="row")


def lengths(**groups):
    """lengths(white={"Jake": [2, 2]}): the number of name tokens in each of the name's prompts."""
    rows = [
        (group, name, count) for group, given in groups.items() for name, counts in given.items() for count in counts
    ]
    return pl.DataFrame(rows, schema={"group": pl.String, "subject": pl.String, "name_tokens": pl.Int64}, orient="row")


def test_halves_are_equal_in_every_group_and_gender():
    split = halves(PURCHASE, 0).join(PURCHASE.unique(["group", "subject"]), on=["group", "subject"])
    counts = split.group_by("group", "gender", "split").len()
    assert len(counts) == 8
    assert counts["len"].to_list() == [8] * 8
    assert len(split) == PURCHASE.n_unique("subject") == 64


def test_halves_do_not_depend_on_the_scenario_or_on_the_order_of_the_names():
    one = halves(PURCHASE, 3)
    assert halves(expand(SCENARIOS["purchase"], variations=["car"]), 3).equals(one)
    assert halves(PURCHASE.reverse(), 3).equals(one)
    for other in SCENARIOS.values():
        assert other.groups != SCENARIOS["purchase"].groups or halves(expand(other), 3).equals(one)


def test_another_seed_gives_other_halves_of_the_same_names():
    one, other = halves(PURCHASE, 0), halves(PURCHASE, 1)
    assert one.select("group", "subject").equals(other.select("group", "subject"))
    assert not one.equals(other)


def test_odd_names_go_to_the_evaluation_in_every_group():
    split = halves(
        names(*((group, f"{group} {n}", "men" if n < 3 else "women") for group in ("a", "b") for n in range(5))), 7
    )
    counts = {tuple(row[:2]): row[2] for row in split.group_by("group", "split").len().iter_rows()}
    assert counts == {("a", EVALUATION): 3, ("a", ATTRIBUTION): 2, ("b", EVALUATION): 3, ("b", ATTRIBUTION): 2}
    women = split.filter(pl.col("subject").str.contains("[34]"))
    assert women.group_by("group", "split").len()["len"].to_list() == [1] * 4


def test_names_without_gender_are_split_too_and_a_single_name_is_refused():
    split = halves(names(("a", "x", None), ("a", "y", None)), 0)
    assert sorted(split["split"]) == [ATTRIBUTION, EVALUATION]
    with pytest.raises(ExciseError, match="group 'b' has one name only"):
        halves(names(("a", "x", None), ("a", "y", None), ("b", "z", None)), 0)


def test_a_matched_subset_has_equally_many_names_of_each_length():
    white = {"Jake": [2, 2], "Seth": [2], "Todd": [2], "Hilary": [3]}
    black = {"Jamal": [2], "DaShawn": [4], "Tionna": [3], "Keyana": [3]}
    chosen = token_matched(lengths(white=white, black=black))
    assert len(chosen) == 4
    assert len(chosen & {"Jake", "Seth", "Todd"}) == 1  # one black name of two tokens
    assert "Jamal" in chosen
    assert "Hilary" in chosen
    assert len(chosen & {"Tionna", "Keyana"}) == 1
    assert token_matched(lengths(white=white, black=black).reverse()) == chosen


def test_names_whose_length_changes_between_prompts_match_only_their_like():
    assert token_matched(lengths(white={"Jake": [2, 3]}, black={"Jamal": [2]})) == set()
    assert token_matched(lengths(white={"Jake": [2, 3]}, black={"Jamal": [3, 2]})) == {"Jake", "Jamal"}


def test_names_of_unknown_length_are_left_out():
    assert token_matched(lengths(white={"Jake": [None], "Seth": [2]}, black={"Jamal": [None], "Tyra": [2]})) == {
        "Seth",
        "Tyra",
    }
    assert token_matched(lengths(white={"Jake": [2]}, black={"Jamal": [None]})) == set()
