"""Checks of answers: whether they are complete, can be judged and hold a value."""

from collections.abc import Sequence

import polars as pl

from assets.checks import ERROR, WARN, Outcome, at_least, place_of, unmet_expectations
from excise.conditions import COLUMNS, MASK
from excise.evaluation.judged import (
    compared_groups,
    each_unjudged,
    judgements,
    mend,
    nothing_written,
    percent,
    share_with_value,
)
from excise.scenarios import Scenario

MASS_ERROR = 1e-6
"""Largest distance from 1 that rounding may give the sum of the probabilities of a prompt's answers."""


def completions_complete_and_balanced(
    completions: pl.DataFrame, prompts: pl.DataFrame, samples: int, *, masked: bool = False, balanced: bool = True
) -> Outcome:
    """Every prompt (under every mask, if `masked`) has samples 0 ... `samples`-1 once, and groups are of equal size.

    Of enumerated answers every prompt has some whose probabilities and leftover sum to 1. `prompts` has a row per
    wanted prompt (and mask), with the columns that tell them apart. balanced: groups must be of equal size, which
    subgroups of an axis need not be.
    """
    import great_expectations.expectations as gxe

    identity = ["prompt_id", *MASK[1:]] if masked else ["prompt_id"]
    exact = bool(completions["probability"].is_not_null().any())
    counted = completions.group_by(identity).agg(
        found=pl.len(),
        distinct=pl.col("sample").n_unique(),
        last=pl.col("sample").max(),
        mass=pl.col("probability").sum() + pl.col("leftover").max().fill_null(0.0),
    )
    if exact:
        samples = 1  # whole distribution
        whole = (pl.col("mass") - 1).abs() < MASS_ERROR
        counted = counted.with_columns(
            found=whole.cast(pl.Int64), distinct=(pl.col("distinct") == pl.col("found")).cast(pl.Int64), last=0
        )
    wanted = prompts.join(counted, on=identity, how="left", nulls_equal=True).with_columns(
        pl.col("found", "distinct").fill_null(0), last=pl.col("last").fill_null(-1)
    )
    unmet = unmet_expectations(
        wanted.select(*identity[:1], "found", "distinct", "last"),
        [
            gxe.ExpectTableRowCountToBeBetween(min_value=1),
            gxe.ExpectColumnValuesToNotBeNull(column="prompt_id"),
            *(
                gxe.ExpectColumnValuesToBeBetween(column=column, min_value=value, max_value=value)
                for column, value in (("found", samples), ("distinct", samples), ("last", samples - 1))
            ),
        ],
    )
    distributions = completions.unique(identity) if exact else completions
    unmet += unmet_expectations(
        distributions.select("text", "prompt_id"),
        [
            gxe.ExpectTableRowCountToEqual(value=wanted.height * samples),
            gxe.ExpectColumnValuesToNotBeNull(column="text"),
        ],
    )
    sizes = _group_sizes(distributions, list(MASK) if masked else ["variation"])
    if balanced:
        unmet += unmet_expectations(
            sizes.select("smallest", "largest"),
            [gxe.ExpectColumnPairValuesToBeEqual(column_A="smallest", column_B="largest")],
        )
    incomplete = wanted.filter((pl.col("found") != samples) | (pl.col("distinct") != samples))
    unbalanced = sizes.filter(pl.lit(balanced) & (pl.col("smallest") != pl.col("largest")))
    worst, figure = None, samples
    if not incomplete.is_empty():
        row = incomplete.sort("found").row(0, named=True)
        worst, figure = f"{place_of(row)}, {row['subject']}", row["found"]
    elif not unbalanced.is_empty():
        worst = place_of(unbalanced.row(0, named=True))
    if not unmet:
        answers = "their answers enumerated" if exact else f"{samples} samples each"
        message = f"{wanted.height:,} prompts with {answers}" + ("; the groups are of equal size." if balanced else ".")
    elif wanted.is_empty():
        message = "There are no prompts."
    elif not incomplete.is_empty() and exact:
        message = f"{incomplete.height:,} of {wanted.height:,} prompts lack a part of their answers; first: {worst}."
    elif not incomplete.is_empty():
        message = f"{incomplete.height:,} of {wanted.height:,} prompts do not have {samples} samples; "
        message += f"worst: {worst} has {figure}."
    elif not unbalanced.is_empty():
        message = f"The groups are not of equal size in {unbalanced.height} of {sizes.height} places; first: {worst}."
    else:
        message = "There are rows that belong to no wanted prompt, or empty texts."
    return Outcome(
        "completions_complete_and_balanced",
        not unmet,
        ERROR,
        message,
        float(figure),
        float(samples),
        worst,
        sizes.to_dicts(),
        unmet,
    )


def judged_variations(completions: pl.DataFrame, scenario: Scenario) -> Outcome:
    """Every variation can be judged (`excise.evaluation.judged`). An error only where none can: otherwise the others go
    on without those that cannot."""
    asked = completions["variation"].n_unique()
    unjudged = each_unjudged(completions, scenario)
    count = asked - unjudged.height
    if unjudged.is_empty():
        message = f"All {asked} variations can be judged." if asked > 1 else "The variation can be judged."
        return Outcome("judged_variations", True, WARN, message, float(count), float(asked))
    of_them = completions.filter(pl.col("variation").is_in(unjudged["variation"].implode()))
    words = scenario.outcome.words
    reasons = "; ".join(
        f"{row['variation']} ({percent(row['parse_rate'])} of the {words.answers} {words.hold}: {row['examples']})"
        for row in unjudged.iter_rows(named=True)
    )
    if silence := nothing_written(of_them):
        reasons = f"{', '.join(unjudged['variation'])}: {silence}"
    enough = f"answers about two {words.units} that {words.hold}"
    message = f"{unjudged.height} of {asked} variations cannot be judged, which takes {enough}:"
    message += f" {reasons}. {mend(of_them, scenario)}"
    return Outcome(
        "judged_variations",
        False,
        WARN if count else ERROR,
        message,
        float(count),
        float(asked),
        unjudged["variation"][0],
        unjudged.to_dicts(),
    )


def judged_under_masks(pruned: pl.DataFrame, scenario: Scenario, judged: Sequence[str], asked: int) -> Outcome:
    """Every variation that can be judged unpruned can also be judged under every strategy's mask.

    pruned: the pruned completions; judged: those variations, of `asked` in all. Controls are left out: their figures
    are null where they have no answers. An error only where there is nothing to judge at all.
    """
    unjudged, places = [], 0
    of_strategies = pruned.filter(pl.col("matched_to").is_null())
    for (strategy, level, _), rows in of_strategies.partition_by(*COLUMNS, as_dict=True, maintain_order=True).items():
        verdicts = judgements(rows, compared_groups(scenario), scenario.outcome.cluster)
        places += verdicts.height
        unjudged += [
            {**row, "strategy": strategy, "level": level} for row in verdicts.filter(~pl.col("judged")).to_dicts()
        ]
    count = float(len(judged))
    if not judged:
        message = "No variation can be judged, unpruned or under a mask; why is said by the check of completions."
        return Outcome("judged_variations", False, ERROR, message, 0.0, float(asked))
    left_out = f" Over {len(judged)} of {asked} variations, as the unpruned answers to the others are too few."
    left_out = left_out if len(judged) < asked else ""
    if not unjudged:
        message = f"{len(judged)} variations can be judged under every mask.{left_out}"
        return Outcome("judged_variations", not left_out, WARN, message, count, float(asked))
    reasons = "; ".join(f"{place_of(row)} ({percent(row['parse_rate'])} with a value)" for row in unjudged[:5])
    more = f"; and {len(unjudged) - 5} more" if len(unjudged) > 5 else ""
    message = f"{len(unjudged)} of {places} masks leave a variation too few answers to be judged: {reasons}{more}. "
    message += f"Their figures are null: prune less.{left_out}"
    return Outcome("judged_variations", False, WARN, message, count, float(asked), unjudged[0]["variation"], unjudged)


def parse_rate(completions: pl.DataFrame, floor: float, valued: str) -> Outcome:
    """The share of answers with a value, by variation and group, is at least `floor`. valued: such answers in words."""
    rates = (
        completions.group_by("variation", "group", maintain_order=True)
        .agg(parse_rate=share_with_value(), answers=pl.len())
        .sort("parse_rate", maintain_order=True)
    )
    return at_least("parse_rate", rates, "parse_rate", floor, valued)


def _group_sizes(completions: pl.DataFrame, places: list[str]) -> pl.DataFrame:
    """Smallest and largest number of completions of a group, by variation (and mask)."""
    groups = completions["group"].n_unique()
    return (
        completions.group_by(*places, "group", maintain_order=True)
        .agg(pl.len().alias("completions"))
        .group_by(places, maintain_order=True)
        .agg(
            smallest=pl.when(pl.len() == groups).then(pl.col("completions").min()).otherwise(0),
            largest=pl.col("completions").max(),
        )
    )
