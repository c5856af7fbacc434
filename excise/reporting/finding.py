"""The finding of an audit in a few sentences: is there a gap, which mask closes it, and what that costs.

What is claimed, and when it is not, follows the method: the reduction of the raw gap beyond the matched random control,
at an inlier ratio above a floor and within every budget. Not here: any estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars

from excise.conditions import ALL, PROMPT_SPECIFIC, UNPRUNED, Condition
from excise.evaluation.rounding import (
    decimals_of,
    fixed_text,
    floor_text,
    interval_text,
    level_label,
    number_text,
    p_equals,
    per_cent,
    percent_text,
    points_text,
    ratio_against,
    ratio_text,
)
from excise.evaluation.table import (
    MISSING,
    Estimate,
    MetricTable,
    Verdict,
    Verdicts,
    reaches,
    read_metrics,
    read_verdicts,
)
from excise.evaluation.thresholds import INLIER_FLOOR, INLIER_TOLERANCE, SIGNIFICANCE
from excise.reporting.words import few_names_warning, listed

PUBLISHED = ("set_difference",)
_OPEN = "So is any reduction of it."
_MOST_REASONS = 3


def finding(
    metrics: polars.DataFrame,
    *,
    inlier_floor: float = INLIER_FLOOR,
    inlier_tolerance: float = INLIER_TOLERANCE,
    verdicts: polars.DataFrame | None = None,
    published: Sequence[str] = PUBLISHED,
    majority: str = "majority",
    minority: str = "minority",
) -> str:
    """What pruning achieved, in one sentence, and one more for whatever keeps the figures from saying so.

    Told over all variations (or the only one). Picks the prompt-specific strategy with the largest reduction of the
    raw gap beyond its matched random control among those whose inlier ratio is at least `inlier_floor`; claims no
    success where an interval covers 0, where answers collapse, and none at all where no gap is detectable: the unpruned
    interval covers 0 and no variation stands out. A published strategy fails its control where the interval of that
    difference is not clear of 0 from above. Inlier ratios at most `inlier_tolerance` apart are comparable. Both are the
    settings the audit was judged by; `majority` and `minority` are the groups' labels. Source: method, part C.

    verdicts: of `excise.evaluation.verdicts`, made of the same metrics. A strategy is called best only where it is a
    success by them; where none is, the sentence says which budget the foremost one breaks. Without them no budget but
    `inlier_floor` is judged. Errors as `read_metrics`.
    """
    table = read_metrics(metrics)
    if len(table.variations) == 1:
        where = table.variations[0]
    elif table.has_aggregate:
        where = ALL
    else:
        return "No finding: the metrics hold several variations and nothing over all of them."
    goes_on, sentences = _gap_sentences(table, where, (majority, minority))
    if goes_on:
        best, sentence = _best_strategy(
            table, where, inlier_floor, inlier_tolerance, None if verdicts is None else read_verdicts(verdicts)
        )
        sentences.append(sentence)
        if best is not None and (how := _how_it_closed(table, where, best, (majority, minority))):
            sentences.append(how)
        sentences += [
            failure
            for strategy in published
            if (failure := _failure(table, where, strategy, inlier_tolerance, besides={best} if best else set()))
        ]
    sentences += _collapse(table, where)
    sentences += _few_names(table, where)
    return " ".join(sentences)


def unpruned_gap(table: MetricTable, where: str) -> tuple[str, Estimate]:
    """The name and estimate of the unpruned gap by which `where` is judged."""
    # Over variations the outcome's units differ (a car, a chair), so the mean SMD stands for the gap there.
    names = {"smd": "SMD", "gap_mean": "raw gap"}
    order = ("smd", "gap_mean") if where == ALL else ("gap_mean", "smd")
    for metric in order:
        estimate = table.get(where, UNPRUNED, metric)
        if estimate.value is not None:
            return ("mean " if where == ALL else "") + names[metric], estimate
    return "gap", MISSING


def standing_out(table: MetricTable) -> list[str]:
    """Variations with a gap of the unpruned model: its interval leaves out 0, or its test rejects (Holm-adjusted)."""
    return [name for name in table.variations if _stands_out(table.get(name, UNPRUNED, "gap_mean"))]


def _stands_out(gap: Estimate) -> bool:
    return gap.clear_of_zero or (gap.value is not None and gap.p is not None and gap.p < SIGNIFICANCE)


def _gap_sentences(table: MetricTable, where: str, labels: tuple[str, str]) -> tuple[bool, list[str]]:
    """Whether there is a gap that a mask might reduce, and what is to be said of the unpruned one."""
    undefined = _undefined_smd(table, where, labels)
    name, gap = unpruned_gap(table, where)
    if gap.value is None:
        return False, ["No finding: the metrics hold no gap of the unpruned model.", *undefined]
    gap_text = f"the unpruned {name} is {interval_text(gap, decimals=2 if 'SMD' in name else None)}"
    if not gap.has_interval:
        alone = ", as a group has one name" if gap.names == 1 else ""
        return False, [f"No finding: {gap_text} and has no interval{alone}.", *undefined]
    singled = standing_out(table) if where == ALL else []
    gaps = [table.get(name, UNPRUNED, "gap_mean").value for name in singled]
    signs = {value > 0 for value in gaps if value is not None}
    opposite = _singled_out(table, singled) if len(signs) == 2 else None
    if gap.low == gap.high == 0.0 and not singled:
        return False, [f"No gap: {gap_text}, whatever names are drawn.", *undefined]
    if gap.covers_zero and gap.p is not None and gap.p < SIGNIFICANCE:
        sentence = f"Whether there is a gap is open: {gap_text}, which covers 0, though the test of no gap rejects"
        return True, [f"{sentence} ({p_equals(gap.p)}). {_OPEN}", *([opposite] if opposite else []), *undefined]
    if gap.covers_zero:
        cancel = ", as gaps of opposite sign cancel" if opposite else ""
        average = f" on average{cancel}" if singled else ""
        sentence = f"No gap detectable{average}: {gap_text}; {_not_excluded(table, where, gap)}."
        return bool(singled), [sentence, *([_singled_out(table, singled)] if singled else []), *undefined]
    if gap.p is not None and gap.p >= SIGNIFICANCE:
        sentence = f"Whether there is a gap is open: {gap_text}, but the test of no gap does not reject"
        return True, [f"{sentence} ({p_equals(gap.p)}). {_OPEN}", *([opposite] if opposite else []), *undefined]
    return True, [*([f"Gaps have opposite signs: {gap_text}. {opposite}"] if opposite else []), *undefined]


def _not_excluded(table: MetricTable, where: str, gap: Estimate) -> str:
    """`up to 0.09 SMD is not excluded`: the end of the interval that is further from 0."""

    def furthest(estimate: Estimate) -> float:
        return max(abs(end) for end in (estimate.low, estimate.high) if end is not None)

    smd = table.get(where, UNPRUNED, "smd")
    in_smd = f"{_at_least(furthest(smd), 2)} SMD" if smd.has_interval else None
    if gap == smd or (where == ALL and in_smd):
        return f"up to {in_smd} is not excluded"
    raw = _at_least(furthest(gap), decimals_of([gap.value, gap.low, gap.high]))
    return f"up to {raw}{f' ({in_smd})' if in_smd else ''} is not excluded"


def _at_least(value: float, decimals: int) -> str:
    """The value with so many decimals, or as many as it takes not to look like 0."""
    while value > 0 and not round(value, decimals) and decimals < 6:
        decimals += 1
    return fixed_text(value, decimals)


def _singled_out(table: MetricTable, variations: Sequence[str]) -> str:
    """`Taken singly, chair (SMD 0.80 [0.50, 1.10], p = 0.004) stands out; the mean absolute gap is ...`."""
    shown = []
    for name in variations:
        gap, smd = (table.get(name, UNPRUNED, metric) for metric in ("gap_mean", "smd"))
        figure = f"SMD {interval_text(smd, decimals=2)}" if smd.value is not None else f"gap {interval_text(gap)}"
        shown.append(f"{name} ({figure}{'' if gap.p is None else ', ' + p_equals(gap.p)})")
    sizes = {
        "SMD": table.get(ALL, UNPRUNED, "abs_smd"),
        "raw gap": table.get(ALL, UNPRUNED, "abs_gap_mean"),
    }
    absolute = [
        f"{interval_text(size, decimals=2 if name == 'SMD' else None)} ({name})"
        for name, size in sizes.items()
        if size.value is not None
    ]
    sentence = f"Taken singly, {listed(shown)} {'stands' if len(shown) == 1 else 'stand'} out"
    return f"{sentence}; the mean absolute gap is {listed(absolute)}." if absolute else f"{sentence}."


def _undefined_smd(table: MetricTable, where: str, labels: tuple[str, str]) -> list[str]:
    """Why the unpruned model has no SMD, for each variation without. labels: of majority and minority."""
    groups = ("majority", "minority")
    sentences = []
    for name in table.variations if where == ALL else [where]:
        if table.get(name, UNPRUNED, "smd").value is not None or not table.has(name, UNPRUNED, "smd"):
            continue
        on = f" on {name}" if len(table.variations) > 1 else ""
        means = [table.get(name, UNPRUNED, f"mean_{group}") for group in groups]
        middles = [table.get(name, UNPRUNED, f"median_{group}") for group in groups]
        lacking = [label for label, mean in zip(labels, means, strict=True) if mean.value is None]
        if lacking:
            sentences.append(f"SMD is undefined{on}: no mean of the answers of {listed(lacking)} is defined.")
        elif any(mean.n is not None and mean.n < 2 for mean in means):
            sentences.append(f"SMD is undefined{on}: a group has fewer than two answers.")
        elif any(middle.value and not 1e-150 < abs(middle.value) < 1e150 for middle in middles):
            sentences.append(
                f"SMD is undefined{on}: the squares of such answers are beyond what a computer's numbers hold; give "
                "them in another unit."
            )
        elif None not in [middle.value for middle in middles]:
            first, second = (number_text(middle.value, decimals_of([middle.value])) for middle in middles)
            gap = interval_text(Estimate(table.get(name, UNPRUNED, "gap_mean").value))
            sentences.append(
                f"SMD is undefined{on}: outliers aside, every answer of {labels[0]} is {first}, every answer of "
                f"{labels[1]} {second}, so the raw gap of {gap} has no spread to be measured by."
            )
        else:
            sentences.append(f"SMD is undefined{on}.")
    if len(sentences) > _MOST_REASONS:
        more = len(sentences) - _MOST_REASONS + 1
        return [*sentences[: _MOST_REASONS - 1], f"So it is on {more} more variations."]
    return sentences


def _collapse(table: MetricTable, where: str) -> list[str]:
    """The strategies under which answers collapse, and where."""
    shown = []
    for mask in table.masks_of(where):
        if mask.is_control or not (variations := table.collapsed(where, mask)):
            continue
        on = f" on {listed(variations)}" if len(table.variations) > 1 else ""
        shown.append(f"{mask.strategy} ({level_label(mask.level)}){on}")
    if not shown:
        return []
    return [f"Answers of a group collapse to one number under {listed(shown)}: damage, which no reduction counts."]


def _few_names(table: MetricTable, where: str) -> list[str]:
    gap = unpruned_gap(table, where)[1]
    return [few_names_warning(gap.names)] if gap.few_names and gap.names is not None else []


def _how_it_closed(table: MetricTable, where: str, mask: Condition, labels: tuple[str, str]) -> str | None:
    """How much of the gap went by moving either group; None where nothing went, or nobody knows."""
    if (reduction := table.get(where, mask, "gap_reduction").value) is None or reduction <= 0:
        return None
    shares = [table.get(where, mask, f"closed_by_{side}") for side in ("majority", "minority")]
    if any(share.value is None for share in shares):
        return None
    # The majority's answers are the higher ones unless the gap is the other way round.
    gap = unpruned_gap(table, where)[1].value or 0.0
    ways = ("lowering", "raising") if gap >= 0 else ("raising", "lowering")
    first, second = (
        f"{percent_text(share)} by {way} the answers about {label} names"
        for share, way, label in zip(shares, ways, labels, strict=True)
    )
    return f"How it closed: {first}, {second}."


def _best_strategy(
    table: MetricTable, where: str, floor: float, tolerance: float, verdicts: Verdicts | None
) -> tuple[Condition | None, str]:
    """The mask told of and the sentence about it. verdicts: None where nothing but the floor is judged."""
    candidates = [mask for mask in table.masks if mask.level == PROMPT_SPECIFIC and not mask.is_control]
    if not candidates:
        return None, "No prompt-specific strategy was evaluated."
    intact = [
        mask for mask in candidates if not table.collapsed(where, mask) and not table.collapsed(where, mask.control)
    ]
    if not intact and any(not table.collapsed(where, mask) for mask in candidates):
        return None, "Under every matched random control answers collapse to one number: nothing is claimed."
    if not intact:
        return None, "Under every prompt-specific strategy answers collapse to one number: nothing is claimed."
    known = {
        mask: estimate
        for mask in intact
        if (estimate := table.get(where, mask, "reduction_over_random")).value is not None
    }
    compared = {mask: estimate for mask, estimate in known.items() if table.comparable(where, mask, tolerance)}
    if known and not compared:
        return None, "No prompt-specific strategy stands at an inlier ratio comparable to random's: nothing is claimed."
    if not compared:
        return None, _no_comparison(table, where, intact)
    keeping = {
        mask: estimate
        for mask, estimate in compared.items()
        if reaches(table.get(where, mask, "inlier_ratio").value, floor)
    }
    ranked = [keeping, compared]
    if verdicts is not None:
        ranked.insert(0, {mask: estimate for mask, estimate in compared.items() if verdicts[where, mask].success})
    pool = next(masks_of_rank for masks_of_rank in ranked if masks_of_rank)
    best = max(pool, key=lambda mask: pool[mask].value or 0.0)
    beyond, reduction = pool[best], table.get(where, best, "gap_reduction")
    inliers = table.get(where, best, "inlier_ratio")
    at = f"at inlier ratio {ratio_against(inliers.value, floor)}"
    if not keeping:
        return best, (
            f"No prompt-specific strategy keeps the inlier ratio at the floor of {floor_text(floor)}: the largest "
            f"difference from its matched random control, {points_text(beyond)} by {best.strategy}, comes {at}."
        )
    if beyond.value is not None and beyond.value <= 0.0:
        return best, (
            f"No prompt-specific strategy at inlier ratio {floor_text(floor)} or more removes more of the raw gap than "
            f"random pruning: the best of them, {best.strategy}, differs from its matched random control by "
            f"{points_text(beyond)}."
        )
    if reduction.value is None or reduction.value <= 0.0:
        widened = "unknown" if reduction.value is None else percent_text(reduction)
        return best, (
            f"No prompt-specific strategy at inlier ratio {floor_text(floor)} or more is shown to reduce the raw gap: "
            f"the best of them, {best.strategy}, is ahead of its matched random control by {points_text(beyond)}, but "
            f"its own reduction is {widened}."
        )
    scope = " over all variations" if where == ALL else ""
    if scope and table.judged < len(table.variations):
        scope = f" over the {table.judged} of {len(table.variations)} variations that can be judged"
    spread = ratio_text(table.get(where, best, "spread_ratio").value)
    verdict = None if verdicts is None else verdicts[where, best]
    short = None if verdict is None or verdict.success else verdict
    opening = "Best prompt-specific strategy:" if short is None else f"No prompt-specific strategy {_lacks(short)}:"
    sentence = (
        f"{opening} {best.strategy} removes {percent_text(reduction)} of the raw gap{scope}, "
        f"{points_text(beyond)} more than its matched random control, {at} (floor {floor_text(floor)})"
        + ("" if spread == "-" else f", with {spread} of the spread within the groups")
    )
    if where == ALL and verdict is None:
        below = [
            f"{name} ({ratio_against(ratio.value, floor)})"
            for name in table.variations
            if (ratio := table.get(name, best, "inlier_ratio")).value is not None and not reaches(ratio.value, floor)
        ]
        if below:
            sentence += f", though below that floor on {listed(below)}"
    if short is not None and short.failed:
        sentence += f", but with {listed(short.failed)}"
    if short is not None and short.closes:
        return best, sentence + (f"; {listed(short.unknown)}." if short.unknown else ".")
    if beyond.low is None or beyond.high is None:
        return best, sentence + "; without an interval this is a lead, not a result."
    if beyond.low <= 0.0:
        return best, sentence + "; that interval covers 0, so it is not shown to beat random pruning."
    if reduction.high is not None and reduction.low is not None and reduction.low <= 0.0:
        share = per_cent(reduction)
        return (
            best,
            f"{sentence}; the reduction itself, {share} %, may be none: it only harms less than random pruning.",
        )
    return best, sentence + "."


def _lacks(verdict: Verdict) -> str:
    """What the foremost mask is not, which is no success."""
    if not verdict.closes:
        return "is shown to close the gap"
    return "closes the gap within the budgets" if verdict.failed else "is known to close the gap within the budgets"


def _no_comparison(table: MetricTable, where: str, masks: Sequence[Condition]) -> str:
    """Why no strategy has a reduction over random."""
    controlled = [mask for mask in masks if mask.control in table.masks_of(where)]
    if not controlled:
        return "No prompt-specific strategy could be compared with a matched random control: nothing is claimed."
    if all(table.get(where, mask, "gap_mean").value is None for mask in controlled):
        return "No reduction is defined: under no prompt-specific strategy do enough answers hold a value."
    if any(table.get(where, mask, "gap_reduction").value is not None for mask in controlled):
        return (
            "No reduction over random is defined: the matched random controls leave no answers that could be compared, "
            "so nothing is claimed."
        )
    return "No reduction is defined: the raw gap of the unpruned model cannot be told from 0."


def _failure(table: MetricTable, where: str, strategy: str, tolerance: float, besides: set[Condition]) -> str | None:
    failures, wrecked = [], []
    for mask in table.masks:
        if mask.strategy != strategy or mask.is_control or mask in besides or table.collapsed(where, mask):
            continue
        beyond = table.get(where, mask, "reduction_over_random")
        if beyond.value is not None and not table.comparable(where, mask, tolerance):
            ratios = [ratio_text(table.get(where, name, "inlier_ratio").value) for name in (mask, mask.control)]
            wrecked.append(f"{level_label(mask.level)} {ratios[0]} against {ratios[1]}")
            continue
        if beyond.value is None or (beyond.low if beyond.low is not None else beyond.value) > 0.0:
            continue
        removed, by_chance = (percent_text(table.get(where, name, "gap_reduction")) for name in (mask, mask.control))
        failures.append(f"{level_label(mask.level)} {removed} against {by_chance} ({points_text(beyond)})")
    sentences = []
    if failures:
        sentences.append(
            f"The published {strategy} is not shown to beat its matched random control; of the raw gap it removes "
            f"{listed(failures)}."
        )
    if wrecked:
        sentences.append(
            f"The published {strategy} prunes so much that random masks of its size are no yardstick: inlier ratio "
            f"{listed(wrecked)}."
        )
    return " ".join(sentences) or None
