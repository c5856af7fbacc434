"""An axis of social groups in words: the table of all methods, and the finding in a few sentences.

Here: plain text and Markdown made from the tidy `metrics` frame of a toxicity scenario. Not here: any estimate (see
`excise.evaluation.toxicity`) or picture (`excise.reporting.figures`). What is claimed follows the method, B1 and B8: a
bias is told beside its expectation if all subgroups were alike, a reduction beside that of random heads, both with
intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import polars as pl

from excise.conditions import ALL, NO_LEVEL, UNPRUNED, Condition
from excise.errors import ExciseError
from excise.evaluation.rounding import FEW, interval_text, level_label, p_equals, p_text, per_cent
from excise.evaluation.table import MISSING, Estimate, at_most, read_estimate
from excise.evaluation.thresholds import PERPLEXITY_BUDGET, SIGNIFICANCE
from excise.reporting.audit_table import COLLAPSED
from excise.reporting.words import few_names_warning, listed

COLUMNS = {
    "toxicity_bias": "bias",
    "toxicity_bias_debiased": "debiased",
    "bias_reduction": "reduction",
    "reduction_over_random": "beyond random",
    "mean_toxicity": "mean toxicity",
    "share_toxic": "share > .5",
    "perplexity_ratio": "perplexity, x",
}
NO_BIAS_TEST = "p (labels do not matter)"
"""Column of the p-value of the unpruned bias, by the hypothesis it tests."""
MOST_NAMES = 8
"""Names a warning lists before it counts the rest."""
_PERCENT = ("bias_reduction", "reduction_over_random", "share_toxic")

Figures = Mapping[tuple[Condition, str], Estimate]


def toxicity_table(metrics: pl.DataFrame) -> str:
    """Every method's figures over all prompts as aligned text, intervals in brackets, and what its marks mean."""
    header, rows = _cells(metrics)
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *_notes(metrics, lines)])


def toxicity_markdown(metrics: pl.DataFrame) -> str:
    """The same as a Markdown table."""
    header, rows = _cells(metrics)
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in _notes(metrics, lines))


def toxicity_finding(metrics: pl.DataFrame, *, perplexity_budget: float = PERPLEXITY_BUDGET) -> str:
    """What the figures allow to say: of the unpruned bias, of the scorer's own, and of the best mask.

    The best mask is the one with the lowest bias among those that raise perplexity by at most `perplexity_budget` (a
    share, the setting the audit was judged by) and leave texts whose scores differ. A reduction is claimed only where
    its interval and that beyond random heads lie above 0, and none at all where no bias is detectable: it is not above
    that under other labels, and the interval of the debiased one reaches 0. Raises ExciseError as `toxicity_table`.
    """
    known = _overall(metrics)
    bias, debiased = (known.get((UNPRUNED, name), MISSING) for name in ("toxicity_bias", "toxicity_bias_debiased"))
    if bias.value is None:
        return "No finding: the unpruned bias is undefined; a subgroup has no continuation with a score."
    sentences = [f"Unpruned bias {_interval(bias)}, debiased {_interval(debiased)}."]
    detectable = _told_of_bias(known, bias, debiased, sentences)
    if (prompt_bias := known.get((UNPRUNED, "prompt_toxicity_bias"), MISSING)).value is not None:
        sentences.append(f"The scorer's own gap, on the prompts alone, is {_interval(prompt_bias)}.")
    if detectable:
        sentences += _told_of_masks(known, perplexity_budget)
    if bias.few_names and bias.names is not None:
        sentences.append(few_names_warning(bias.names, "descriptor", "subgroup"))
    return " ".join(sentences)


def _told_of_bias(known: Figures, bias: Estimate, debiased: Estimate, sentences: list[str]) -> bool:
    """Adds what the unpruned bias is held against; whether a bias is detectable."""
    if_equal = known.get((UNPRUNED, "toxicity_bias_if_equal"), MISSING)
    covered = known.get((UNPRUNED, "all_equal_covered"), MISSING).value
    apart = debiased.low is not None and debiased.low > 0
    above = None if if_equal.value is None or covered is None else not covered
    if above is None:
        sentences.append("What other labels of the same descriptors would show is unknown.")
    else:
        p_value = "" if bias.p is None else f" ({p_equals(bias.p)})"
        sentences.append(
            f"It is {'above' if above else 'not above'} what the same descriptors under other labels show, "
            f"{_interval(if_equal)}{p_value}."
        )
    if above or apart:
        if above is False:
            sentences.append(
                "With few descriptors per subgroup such labels cannot show one that stands out; that these descriptors "
                "differ is clear, as the debiased interval is above 0."
            )
        elif above and bias.p is not None and bias.p >= SIGNIFICANCE:
            sentences.append("Its p-value does not reject, so whether there is a bias is open.")
        return True
    # Below 0 the debiased interval says that too much was taken off, not that there is nothing.
    largest = debiased.high if debiased.high is not None and debiased.high > 0 else bias.high
    excluded = f"up to {_at_least(largest)} is not excluded" if largest is not None else "how much there may be is open"
    sentences.append(f"No bias detectable; {excluded}. So no mask is said to reduce it.")
    return False


def _told_of_masks(known: Figures, budget: float) -> list[str]:
    """The best mask within the perplexity budget, and what speaks against calling it a success."""
    masks = [mask for mask, metric in known if metric == "bias_reduction" and not mask.is_control]
    if not masks:
        return ["No mask was evaluated."]
    sentences, within = [], f"{100 * budget:g} %"
    collapsed = [mask for mask in masks if _collapsed(known, mask)]
    if collapsed:
        sentences.append(
            f"Under {listed([_name(mask) for mask in collapsed])} all scores of a subgroup are alike: damage."
        )
    ratios = {mask: known.get((mask, "perplexity_ratio"), MISSING).value for mask in masks}
    reductions = {
        mask: reduction
        for mask in masks
        if mask not in collapsed and (reduction := known[mask, "bias_reduction"]).value is not None
    }
    if not reductions:
        return [*sentences, "No reduction of the bias is defined."]
    if all(ratios[mask] is None for mask in reductions):
        return [*sentences, "Perplexity under the masks is unknown, so none is said to keep the text model."]
    pool = {
        mask: reduction
        for mask, reduction in reductions.items()
        if (ratio := ratios[mask]) is not None and at_most(ratio, 1 + budget)
    }
    if not pool:
        return [*sentences, f"No mask keeps perplexity within {within} of the unpruned model's."]
    best = max(pool, key=lambda mask: (pool[mask].value or 0.0, mask.strategy, mask.level))
    reduction, beyond = pool[best], known.get((best, "reduction_over_random"), MISSING)
    sentences.append(
        f"Of the masks that cost at most {within} of perplexity, {_name(best)} changes the bias by "
        f"{_change(reduction)} at {_interval(known[best, 'perplexity_ratio'])} times the perplexity."
    )
    if reduction.value is not None and reduction.value <= 0:
        return [*sentences, "So none of them lowers the bias."]
    doubts = []
    if not _above_zero(reduction):
        doubts.append("its interval reaches 0" if reduction.has_interval else "it has no interval")
    if beyond.value is None:
        doubts.append("it was not held against random heads")
    else:
        sentences.append(f"Beyond what random heads remove that is {per_cent(beyond, signed=True)} percentage points.")
        if not _above_zero(beyond):
            doubts.append("the interval beyond random heads " + ("reaches 0" if beyond.has_interval else "is unknown"))
    if doubts:
        sentences.append(f"As {listed(doubts)}, this is a lead, not a result.")
    if len(masks) > 1:
        sentences.append(f"It is the best of {len(masks)} masks on the same prompts, so expect less on others.")
    return sentences


def _above_zero(estimate: Estimate) -> bool:
    """Whether the whole interval is known and lies above 0."""
    return estimate.low is not None and estimate.high is not None and estimate.low > 0


def _collapsed(known: Figures, mask: Condition) -> bool:
    """Whether a subgroup's scores under a mask are all alike, so that a bias of 0 says nothing."""
    spread = known.get((mask, "spread_ratio"), MISSING).value
    if spread is not None:
        return at_most(spread, 0.0)
    bias = known.get((mask, "toxicity_bias"), MISSING)
    return bias.value == bias.low == bias.high == 0.0


def rated_names_warning(rated: Iterable[str], with_prompts: bool) -> str | None:
    """That names are negative words to the lexicon; None where there are none.

    rated: names that hold such a word (`excise.outcomes.lexicon.LexiconScorer.rated`). with_prompts:
    whether the scorer reads prompts, too (`Outcome.scores_prompts`).
    """
    names = sorted(set(rated))
    if not names:
        return None
    shown = names[:MOST_NAMES] + ([f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else [])
    where = "every text they are asked about" if with_prompts else "every continuation that repeats them"
    return (
        f"The scorer's lexicon takes {listed(shown)} for negative words, so {where} scores as more toxic by that "
        "alone. Leave these names out, or choose another scorer."
    )


def choice_sentence(points: pl.DataFrame, budget: float) -> str:
    """Which share of heads to prune and to protect, by the rule of `excise.evaluation.bias_correlation.gamma_choice`.

    points: what that returns for one model and scenario. budget: the share by which perplexity may rise.
    """
    within, chosen = points.filter("within_budget"), points.filter("chosen")
    counted = (
        f"Of {points['gamma'].count()} pairs of alpha and gamma {within['gamma'].count()} raise perplexity by at most "
        f"{100 * budget:g} %"
    )
    if within["gamma"].count() == 0:
        return f"{counted}, so none is chosen."
    if chosen.is_empty() or chosen["gamma"].item() is None:
        return f"{counted}, none with a lower bias than the unpruned model."
    row = chosen.row(0, named=True)
    bias = _interval(Estimate(row["bias"], row["bias_low"], row["bias_high"]))
    return (
        f"{counted}; the lowest bias of these has alpha {row['alpha']:g}, gamma {row['gamma']:g} "
        f"({row['strategy']}): {bias} at {row['perplexity_ratio']:.3f} times the perplexity. It was chosen by these "
        "very prompts, so expect less on others."
    )


def _overall(metrics: pl.DataFrame) -> dict[tuple[Condition, str], Estimate]:
    rows = metrics.filter(pl.col("variation") == ALL)
    if rows.is_empty():
        raise ExciseError(f"metrics: no rows over all variations ({ALL}); evaluate the scenario first")
    if (rows["model"].n_unique(), rows["scenario"].n_unique()) != (1, 1):
        raise ExciseError("metrics: rows of several models or scenarios; give those of one")
    return {(Condition.of(row), row["metric"]): read_estimate(row) for row in rows.iter_rows(named=True)}


def _cells(metrics: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    known = _overall(metrics)
    masks = sorted({mask for mask, _ in known}, key=_place)
    bias, *others = COLUMNS
    header = ["method", "level", COLUMNS[bias], NO_BIAS_TEST, *(COLUMNS[metric] for metric in others)]
    rows = []
    for mask in masks:
        name = f"  {mask.strategy} (of {mask.matched_to})" if mask.is_control else mask.strategy
        figures = [_interval(known.get((mask, metric), MISSING), percent=metric in _PERCENT) for metric in COLUMNS]
        if mask != UNPRUNED and _collapsed(known, mask):
            figures[list(COLUMNS).index("bias_reduction")] = COLLAPSED
            figures[list(COLUMNS).index("reduction_over_random")] = "-"
        tested = known.get((mask, bias), MISSING).p if mask == UNPRUNED else None
        level = "" if mask.level == NO_LEVEL else mask.level.replace("_", " ")
        rows.append([name, level, figures[0], p_text(tested), *figures[1:]])
    return header, rows


def _notes(metrics: pl.DataFrame, lines: Iterable[str]) -> list[str]:
    """What the marks in the table mean, for those that occur."""
    text = "\n".join(lines)
    notes = []
    if FEW in text:
        known = _overall(metrics).values()
        fewest = min(estimate.names for estimate in known if estimate.few_names and estimate.names is not None)
        notes.append(f"{FEW} {few_names_warning(fewest, 'descriptor', 'subgroup')}")
    if COLLAPSED in text:
        notes.append(f"{COLLAPSED}: all scores of a subgroup are alike. That is damage, so no reduction counts.")
    return notes


def _place(mask: Condition) -> tuple:
    return mask != UNPRUNED, mask.level, mask.matched_to or mask.strategy, mask.is_control, mask.strategy


def _name(mask: Condition) -> str:
    return f"{mask.strategy} ({level_label(mask.level).replace('-', ' ')})"


def _interval(estimate: Estimate, *, percent: bool = False) -> str:
    if not percent or estimate.value is None:
        return interval_text(estimate, decimals=3)
    value, *interval = per_cent(estimate).split(" ", 1)
    return " ".join([f"{value} %", *interval])


def _change(reduction: Estimate) -> str:
    """A reduction as a signed change: `-40 % [-60, -20]`."""
    low, value, high = (None if part is None else -part for part in (reduction.high, reduction.value, reduction.low))
    number, *interval = per_cent(Estimate(value, low, high, names=reduction.names), signed=True).split(" ", 1)
    return " ".join([f"{number} %", *interval])


def _at_least(value: float) -> str:
    """Three decimals, or as many as it takes not to look like 0."""
    decimals = 3
    while value > 0 and not round(value, decimals) and decimals < 9:
        decimals += 1
    return f"{value:.{decimals}f}"
