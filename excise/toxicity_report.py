"""An axis of social groups in words: the table of all methods, and the finding in a few sentences.

Here: plain text and Markdown made from the tidy `metrics` frame of a toxicity scenario. Not here: any estimate (see
`excise.toxicity_evaluation`) or picture (`excise.figures`). What is claimed follows the method, B1 and B8: a bias is
told beside its expectation if all subgroups were alike, a reduction beside that of random heads, both with intervals.
"""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from excise.errors import ExciseError

ALL_VARIATIONS = "(all)"
UNPRUNED, RANDOM = "unpruned", "random"
COLUMNS = {
    "toxicity_bias": "bias",
    "toxicity_bias_debiased": "debiased",
    "bias_reduction": "reduction",
    "reduction_over_random": "beyond random",
    "mean_toxicity": "mean toxicity",
    "share_toxic": "share > .5",
    "perplexity_ratio": "perplexity, x",
}
_PERCENT = ("bias_reduction", "reduction_over_random", "share_toxic")


def toxicity_table(metrics: pl.DataFrame) -> str:
    """Every method's figures over all prompts as aligned text, intervals in brackets."""
    header, rows = _cells(metrics)
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in
             [header, *rows]]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def toxicity_markdown(metrics: pl.DataFrame) -> str:
    """The same as a Markdown table."""
    header, rows = _cells(metrics)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def toxicity_finding(metrics: pl.DataFrame) -> str:
    """What the figures allow to say: of the unpruned bias, of the scorer's own, and of the best mask.

    The best mask is the one with the lowest bias among those that raise perplexity by at most a tenth. A reduction is
    claimed only where its interval, and that beyond random heads (where there are such), lie above 0.
    """
    known = _overall(metrics)
    unpruned = (UNPRUNED, "none", None)
    bias, if_equal = known[unpruned, "toxicity_bias"], known.get((unpruned, "toxicity_bias_if_equal"))
    told = [f"Unpruned bias {_interval(bias)}, debiased {_interval(known.get((unpruned, 'toxicity_bias_debiased')))}."]
    if if_equal is not None:
        p_value = "" if bias["p_value"] is None else f" (p = {bias['p_value']:.3f})"
        covered = known.get((unpruned, "all_equal_covered"))
        apart = "is not above" if covered and covered["estimate"] else "is above"
        told.append(f"It {apart} what the same descriptors under other labels show, {_interval(if_equal)}{p_value}.")
        debiased = known.get((unpruned, "toxicity_bias_debiased"))
        if apart == "is not above" and debiased and debiased["low"] is not None and debiased["low"] > 0:
            told.append(
                "With few descriptors per subgroup such labels cannot show one that stands out; that these descriptors "
                "differ is clear, as the debiased interval is above 0."
            )
    if (own := known.get((unpruned, "prompt_toxicity_bias"))) is not None:
        told.append(f"The scorer's own gap, on the prompts alone, is {_interval(own)}.")
    masks = {mask for mask, metric in known if metric == "bias_reduction" and mask[2] is None}
    masks = {mask for mask in masks if (known.get((mask, "perplexity_ratio")) or {"estimate": 1.0})["estimate"] <= 1.1}
    reductions = {mask: known[mask, "bias_reduction"] for mask in masks}
    reductions = {mask: row for mask, row in reductions.items() if row["estimate"] is not None}
    if not reductions:
        told.append("No mask keeps perplexity within a tenth of the unpruned model's.")
        return " ".join(told)
    best = max(reductions, key=lambda mask: (reductions[mask]["estimate"], mask[:2]))
    row, beyond = reductions[best], known.get((best, "reduction_over_random"))
    shown = f"{best[0]} ({best[1].replace('_', ' ')}) changes the bias by {_signed(row, -1)}"
    ratio = known.get((best, "perplexity_ratio"))
    if ratio is not None:
        shown += f" at {_interval(ratio)} times the perplexity"
    told.append(f"Of the masks that cost at most a tenth of perplexity, {shown}.")
    sure = row["low"] is not None and row["low"] > 0
    if beyond is not None and beyond["estimate"] is not None:
        told.append(f"That is {_signed(beyond)} more than random heads remove.")
        sure = sure and beyond["low"] is not None and beyond["low"] > 0
    if not sure:
        told.append("The intervals reach 0, or it was not held against random heads: a lead, not a result.")
    told.append("It is the best of several masks on the same prompts, so expect less on others.")
    return " ".join(told)


def choice_sentence(points: pl.DataFrame, budget: float) -> str:
    """Which share of heads to prune and to protect, by the rule of `excise.bias_correlation.gamma_choice`.

    points: what that returns for one model and scenario. budget: the share by which perplexity may rise.
    """
    within, chosen = points.filter("within_budget"), points.filter("chosen")
    counted = (
        f"Of {points['gamma'].count()} pairs of alpha and gamma {within['gamma'].count()} raise perplexity by at most "
        f"{100 * budget:g} %"
    )
    if chosen.is_empty() or chosen["gamma"].item() is None:
        return f"{counted}, none with a lower bias than the unpruned model."
    row = chosen.row(0, named=True)
    bias = _interval({"estimate": row["bias"], "low": row["bias_low"], "high": row["bias_high"]})
    return (
        f"{counted}; the lowest bias of these has alpha {row['alpha']:g}, gamma {row['gamma']:g} "
        f"({row['strategy']}): {bias} at {row['perplexity_ratio']:.3f} times the perplexity. It was chosen by these "
        "very prompts, so expect less on others."
    )


def _overall(metrics: pl.DataFrame) -> dict[tuple[tuple, str], dict]:
    rows = metrics.filter(pl.col("variation") == ALL_VARIATIONS)
    if rows.is_empty():
        raise ExciseError(f"metrics: no rows over all variations ({ALL_VARIATIONS}); evaluate the scenario first")
    if (rows["model"].n_unique(), rows["scenario"].n_unique()) != (1, 1):
        raise ExciseError("metrics: rows of several models or scenarios; give those of one")
    return {
        ((row["strategy"], row["level"], row["matched_to"]), row["metric"]): row for row in rows.iter_rows(named=True)
    }


def _cells(metrics: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    known = _overall(metrics)
    masks = sorted({mask for mask, _ in known}, key=_place)
    header = ["method", "level", *COLUMNS.values()]
    rows = []
    for mask in masks:
        strategy, level, matched_to = mask
        name = strategy if matched_to is None else f"  {strategy} (of {matched_to})"
        found = (known.get((mask, metric)) for metric in COLUMNS)
        rows.append(
            [name, "" if level == "none" else level.replace("_", " ")]
            + [_interval(row, percent=metric in _PERCENT) for metric, row in zip(COLUMNS, found, strict=True)]
        )
    return header, rows


def _place(mask: tuple) -> tuple:
    strategy, level, matched_to = mask
    return strategy != UNPRUNED, level, matched_to or strategy, matched_to is not None, strategy


def _interval(row: dict | None, *, percent: bool = False) -> str:
    if row is None or row["estimate"] is None:
        return "-"
    values = [row["estimate"], *(end for end in (row["low"], row["high"]) if end is not None)]
    shown = [f"{100 * value:.0f}" if percent else f"{value:.3f}" for value in values]
    text = shown[0] + (" %" if percent else "")
    return text if len(shown) < 3 else f"{text} [{shown[1]}, {shown[2]}]"


def _signed(row: dict, sign: int = 1) -> str:
    ends: Iterable[float] = [] if row["low"] is None else sorted(100 * sign * row[name] for name in ("low", "high"))
    interval = ", ".join(f"{end:.0f}" for end in ends)
    return f"{100 * sign * row['estimate']:+.0f} %" + (f" [{interval}]" if interval else "")
