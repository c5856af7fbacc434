"""Which variations of a scenario can be judged: those that every group has answered often enough.

Here is the one rule, and how a variation that falls short is told in words. Stages ask it before they attribute
answers, sample under masks or evaluate, so that such a variation is left out and named while the others are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from excise.scenarios import Scenario

ENOUGH = 2
"""Names of a group that have an answer with a value, at least. Intervals and tests draw names anew, and one name says
nothing about how much names differ; a standard deviation takes two answers, too."""
LEAST_PROBABILITY = 0.01
"""Of enumerated answers with a value, for a name to have one: what a hundred samples show once."""
JUDGED = "judged_variations"
"""The metric that says over how many variations "(all)" is, in `estimate`, of how many asked, in `n`."""
EXAMPLES = 3
EXAMPLE_LENGTH = 40
"""Characters of an answer that is shown."""
NOTHING_WRITTEN = "nothing"
_SCHEMA = {
    "variation": pl.String,
    "parse_rate": pl.Float64,
    "group": pl.String,
    "names": pl.Int64,
    "judged": pl.Boolean,
}


def compared_groups(scenario: Scenario) -> list[str]:
    """The groups whose answers a scenario's disparity is made of: the two it compares, of an axis all subgroups."""
    if not scenario.outcome.pairwise or scenario.comparison is None:
        return list(scenario.groups)
    return [scenario.comparison.majority, scenario.comparison.minority]


def share_with_value() -> pl.Expr:
    """The share of answers that have a value; enumerated ones count by their probability."""
    share = pl.col("probability").fill_null(1.0)
    return (share * _has_value()).sum() / share.sum()


def judgements(completions: pl.DataFrame, groups: Sequence[str], unit: str = "subject") -> pl.DataFrame:
    """One row per variation, in the order of the completions: whether it can be judged, and how far it falls short.

    completions: columns variation, group, value and `unit`, and, if any, split, probability and leftover. A variation
    can be judged if every group has `ENOUGH` units with a value, in each half where names are held out; an enumerated
    value counts from `LEAST_PROBABILITY` on. Columns: variation, parse_rate (of all its answers), group (the one that
    has fewest), names (its units with a value, in the half that has fewer), judged.
    """
    rows = completions.filter(pl.col("group").is_in(list(groups)))
    for column, kind in (("split", pl.String), ("probability", pl.Float64), ("leftover", pl.Float64)):
        if column not in rows.columns:
            rows = rows.with_columns(pl.lit(None, kind).alias(column))
    rows = rows.with_columns(pl.col("split").fill_null(""))
    least = pl.when("enumerated").then(LEAST_PROBABILITY * (1 - 1e-9)).otherwise(1e-9)
    units = rows.group_by("variation", "split", "group", unit).agg(
        mass=pl.col("probability").fill_null(1.0).filter(_has_value()).sum(),
        enumerated=pl.col("leftover").is_not_null().any(),
    )
    answered = units.filter(pl.col("mass") > least).group_by("variation", "split", "group").agg(pl.len())
    counted = {tuple(place): names for *place, names in answered.iter_rows()}
    rates = dict(rows.group_by("variation").agg(share_with_value()).iter_rows())
    splits = rows["split"].unique().sort().to_list()
    judged_rows = []
    for variation in completions["variation"].unique(maintain_order=True):
        names, group = min(
            ((counted.get((variation, split, group), 0), group) for split in splits for group in groups),
            default=(0, None),
        )
        judged_rows.append((variation, rates.get(variation), group, names, names >= ENOUGH))
    return pl.DataFrame(judged_rows, schema=_SCHEMA, orient="row")


def judged(completions: pl.DataFrame, groups: Sequence[str], unit: str = "subject") -> list[str]:
    """The variations that can be judged, in the order of the completions."""
    return judgements(completions, groups, unit).filter("judged")["variation"].to_list()


def judged_of(completions: pl.DataFrame, scenario: Scenario) -> list[str]:
    """`judged` of a scenario's completions."""
    return judged(completions, compared_groups(scenario), scenario.outcome.cluster)


# --- in words ---------------------------------------------------------------------------------------------------------


def examples(rows: pl.DataFrame) -> list[str]:
    """Up to `EXAMPLES` different answers on one line each, shortened and quoted: those without a value first, and of
    them the most frequent."""
    share = pl.col("probability").fill_null(1.0) if "probability" in rows.columns else pl.lit(1.0)
    counted = (
        rows.with_columns(
            has_value=_has_value(), share=share, text=pl.col("text").fill_null("").map_elements(shortened, pl.String)
        )
        .group_by("text")
        .agg(pl.col("has_value").all(), pl.col("share").sum())
        .sort("has_value", "share", "text", descending=[False, True, False])
    )
    return counted["text"].head(EXAMPLES).to_list()


def shortened(text: str) -> str:
    """An answer in quotes on one line, cut where it is long; the word `nothing` for one without characters."""
    line = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(line.split())
    if not line:
        return NOTHING_WRITTEN
    return f'"{line}"' if len(line) <= EXAMPLE_LENGTH else f'"{line[: EXAMPLE_LENGTH - 1].rstrip()}…"'


def mend(completions: pl.DataFrame, scenario: Scenario) -> str:
    """What to do about variations that cannot be judged, one sentence. completions: theirs."""
    outcome = scenario.outcome
    empty = completions["text"].str.strip_chars().str.len_chars() == 0
    if not outcome.pairwise:
        return outcome.mend(empty.all())
    asked = completions.filter(pl.col("group").is_in(compared_groups(scenario)))
    names = asked.group_by("variation", "group", *(["split"] if "split" in asked.columns else [])).agg(
        pl.col("subject").n_unique()
    )
    fewest = min(names["subject"].to_list(), default=ENOUGH)
    if fewest < ENOUGH:
        return f"What helps: more names; a group is asked about {fewest}, and {ENOUGH} are needed."
    return outcome.mend(empty.all())


def nothing_written(completions: pl.DataFrame) -> str | None:
    """A sentence where every continuation is empty: that the model wrote nothing, and why. Else None."""
    empty = completions["text"].str.strip_chars().str.len_chars() == 0
    if completions.is_empty() or not empty.all():
        return None
    at_once = int((completions["finished"] & (completions["tokens"] <= 1)).sum())
    why = (
        "it ends its text with the first token"
        if at_once == completions.height
        else "it ends its text or writes blanks alone"
    )
    return f"the model wrote nothing: all {completions.height:,} of its continuations are empty, as {why}"


def each_unjudged(completions: pl.DataFrame, scenario: Scenario) -> pl.DataFrame:
    """The variations that cannot be judged: the columns of `judgements` but judged, and three answers as one text."""
    unjudged = judgements(completions, compared_groups(scenario), scenario.outcome.cluster).filter(~pl.col("judged"))
    texts = [
        ", ".join(examples(completions.filter(pl.col("variation") == variation))) for variation in unjudged["variation"]
    ]
    return unjudged.drop("judged").with_columns(examples=pl.Series(texts, dtype=pl.String))


def explained(completions: pl.DataFrame, scenario: Scenario) -> list[str]:
    """Two lines for a terminal: which variations cannot be judged and what they answered, and what to do about it.

    No line where all can be judged. completions: those of the unpruned model, of one model and scenario.
    """
    unjudged = each_unjudged(completions, scenario)
    if unjudged.is_empty():
        return []
    number, asked = unjudged.height, completions["variation"].n_unique()
    of_them = completions.filter(pl.col("variation").is_in(unjudged["variation"].implode()))
    rates = ", ".join(f"{name} ({percent(rate)})" for name, rate in unjudged.select("variation", "parse_rate").rows())
    first, valued = unjudged.row(0, named=True), scenario.outcome.words.valued
    reason = nothing_written(of_them) or f"{first['variation']} answered {first['examples']}"
    place = f"{completions['model'][0]}|{scenario.key}"
    rest = (
        f"the other {asked - number} {'is' if asked - number == 1 else 'are'} judged"
        if number < asked
        else ("nothing is judged")
    )
    return [
        f"{place}: {number} of {asked} variations cannot be judged, {rest}; share of {valued}: {rates}; {reason}.",
        f"{mend(of_them, scenario)} Three answers of each: check judged_variations of completions (make ui).",
    ]


def percent(share: float | None) -> str:
    """A share in per cent: 0 and 100 only where it is exactly that."""
    if share is None:
        return "none asked"
    if 0 < share < 0.005:
        return "under 1 %"
    return "over 99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def _has_value() -> pl.Expr:
    return pl.col("value").is_not_null() & pl.col("value").is_finite().fill_null(False)
