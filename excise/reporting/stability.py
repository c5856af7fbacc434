"""What splits of the names say, in sentences and as a table."""

from __future__ import annotations

import polars as pl

from excise.conditions import ALL
from excise.evaluation.rounding import level_label, per_cent
from excise.evaluation.stability import METRICS, summary
from excise.evaluation.table import Estimate

ONE_SPLIT = (
    "The masks were made once, from one half of the names: how much hangs on which half that was is not known "
    "(splits: 5 repeats masks and judgement on other halves)."
)
NO_SPLIT = (
    "The masks were made from the very names they are judged by: how much hangs on these names is not known "
    "(held_out: true with splits: 5 repeats masks and judgement on other halves)."
)


def stability_sentence(summed: pl.DataFrame, where: str = ALL) -> str:
    """What the splits say of every strategy and level, a sentence each. summed: of `summary`."""
    sentences = []
    reductions = summed.filter(
        (pl.col("metric") == "gap_reduction") & (pl.col("variation") == where) & pl.col("matched_to").is_null()
    )
    for row in reductions.iter_rows(named=True):
        text = per_cent(Estimate(row["median"], row["low"], row["high"]))
        lacking = row["splits"] - row["found"]
        grew = f"in {row['below_0']} it grew the gap" if row["below_0"] else "in none it grew the gap"
        sentences.append(
            f"Over {row['splits']} splits of the names {row['strategy']}, {level_label(row['level'])}, removes {text} "
            f"% of the gap (median; {row['lowest']:.0%} to {row['highest']:.0%}); {grew}"
            + (f"; in {lacking} no mask or no reduction was found." if lacking else ".")
        )
    return " ".join(sentences) or "No strategy has a reduction in any split."


def stability_markdown(summed: pl.DataFrame) -> str:
    """The reductions of every strategy's own masks over the splits, as a table."""
    header = "| variation | strategy | level | metric | median | range | interval | splits | below 0 |"
    lines = [header, "|" + "---|" * 9]
    shown = summed.filter(pl.col("matched_to").is_null() & pl.col("metric").is_in(METRICS[:2]))
    for row in shown.iter_rows(named=True):
        interval = "-" if row["low"] is None else f"[{row['low']:.2f}, {row['high']:.2f}]"
        cells = (
            row["variation"],
            row["strategy"],
            level_label(row["level"]),
            row["metric"],
            f"{row['median']:.2f}",
            f"{row['lowest']:.2f} to {row['highest']:.2f}",
            interval,
            f"{row['found']} of {row['splits']}",
            str(row["below_0"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stability_finding(stability: pl.DataFrame, *, held_out: bool) -> str:
    """`stability_sentence` of the table's rows of a partition; without rows, what is not known then."""
    if stability.is_empty():
        return ONE_SPLIT if held_out else NO_SPLIT
    return stability_sentence(summary(stability))
