"""Metrics in words: the audit's table, its finding in one sentence, and the table shown as metadata in the UI.

Here: plain text and Markdown made from the tidy `metrics` frame, and the order and names in which masks are told.
Not here: any estimate (see `excise.evaluation.numbers`) or picture (see `excise.reporting.figures`). What is claimed,
and when it is not, follows the method: the reduction of the raw gap beyond the matched random control, at an inlier
ratio above a floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars

from excise.conditions import ALL, NO_LEVEL, PROMPT_SPECIFIC, RANDOM, UNPRUNED, Condition, condition_order
from excise.errors import ExciseError
from excise.evaluation.judged import JUDGED
from excise.evaluation.thresholds import COLLAPSED_SPREAD, FEW_NAMES, INLIER_FLOOR, INLIER_TOLERANCE, SIGNIFICANCE

PUBLISHED = ("set_difference",)
NO_COMPARISON = "*"
"""Behind a reduction over random: mask and control are not at comparable usefulness."""
FEW = "†"
"""Behind an interval: it comes from so few names that it says little."""
COLLAPSED = "collapsed"
"""In place of a reduction: a group's answers are (nearly) all the same."""
BROKEN = "!"
"""Behind a mask: it breaks a budget."""
NO_GAP_TEST, CHANGE_TEST = "p (no gap)", "p (gap as unpruned)"
"""Columns of p-values by the hypothesis they test: that of unpruned rows, and that of pruned rows."""

VERDICTS_SCHEMA = {
    "model": polars.String,
    "scenario": polars.String,
    "variation": polars.String,
    "strategy": polars.String,
    "level": polars.String,
    "matched_to": polars.String,
    "closes": polars.Boolean,
    "success": polars.Boolean,
    "failed": polars.List(polars.String),
    "unknown": polars.List(polars.String),
    "not_measured": polars.List(polars.String),
}
"""Columns of `excise.evaluation.verdicts.verdicts`."""

_COLUMNS = (
    "model",
    "scenario",
    "variation",
    "strategy",
    "level",
    "matched_to",
    "metric",
    "estimate",
    "low",
    "high",
    "p_value",
    "p_holm",
)
_TINY = 1e-12
_OPEN = "So is any reduction of it."
_MOST_REASONS = 3


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its 95 % interval, p-value (Holm's where there is one), answers and names.

    n: answers counted. names: names of the smaller group. None: not defined (value), or not known (the others).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int | None = None
    names: int | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both bounds are known."""
        return self.low is not None and self.high is not None

    @property
    def covers_zero(self) -> bool:
        """Whether the interval is known and holds 0."""
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high

    @property
    def clear_of_zero(self) -> bool:
        """Whether the interval is known and leaves out 0."""
        return self.has_interval and not self.covers_zero

    @property
    def few_names(self) -> bool:
        """Whether the interval comes from fewer than `FEW_NAMES` names a group."""
        return self.has_interval and self.names is not None and self.names < FEW_NAMES


MISSING = Estimate(None)


def level_label(level: str) -> str:
    """A level's name as people read it: `prompt-specific`, `within-context`, `cross-context`."""
    return level.replace("_", "-")


@dataclass(frozen=True)
class MetricTable:
    """The metrics of one model on one scenario, addressed by variation, mask and metric."""

    model: str
    scenario: str
    variations: tuple[str, ...]
    masks: tuple[Condition, ...]
    estimates: Mapping[tuple[str, Condition, str], Estimate]

    def get(self, variation: str, mask: Condition, metric: str) -> Estimate:
        """The estimate, or `MISSING`."""
        return self.estimates.get((variation, mask, metric), MISSING)

    def masks_of(self, variation: str) -> list[Condition]:
        """The masks with at least one metric of the variation, in the order of `masks`."""
        present = {mask for name, mask, _ in self.estimates if name == variation}
        return [mask for mask in self.masks if mask in present]

    def comparable(self, variation: str, mask: Condition, tolerance: float) -> bool:
        """Whether the inlier ratios of the mask and its random control are at most `tolerance` apart.

        Unknown counts as yes. A reduction over random is read at comparable inlier ratio (method, part C): where random
        masks of the size wreck the model, its answers may lie anywhere, and their gap says nothing about bias.
        """
        own, random = (self.get(variation, each, "inlier_ratio").value for each in (mask, mask.control))
        return own is None or random is None or at_most(abs(own - random), tolerance)

    def collapsed(self, where: str, mask: Condition) -> list[str]:
        """The variations among `where` (all of them for "(all)") in which the mask makes a group's answers constant.

        So little spread is left that neither gap nor SMD says anything: it is damage, whatever the gap has become.
        """
        variations = self.variations if where == ALL else (where,)
        return [variation for variation in variations if self._is_collapsed(variation, mask)]

    def _is_collapsed(self, variation: str, mask: Condition) -> bool:
        if mask == UNPRUNED:
            return False
        if self.has(variation, mask, "spread_ratio"):
            spread = self.get(variation, mask, "spread_ratio").value
            return spread is not None and spread < COLLAPSED_SPREAD
        # Without a measured spread: no SMD though there is a gap, or one that is 0 whatever names are drawn.
        before, after = (self.get(variation, each, "smd") for each in (UNPRUNED, mask))
        if before.value is None or not self.has(variation, mask, "smd"):
            return False
        if after.value is None:
            return self.get(variation, mask, "gap_mean").value is not None
        return after.value == after.low == after.high == 0.0

    def has(self, variation: str, mask: Condition, metric: str) -> bool:
        """Whether the frame has a row of the metric, defined or not."""
        return (variation, mask, metric) in self.estimates

    @property
    def judged(self) -> int:
        """How many variations the unpruned figures over all of them are of."""
        count = self.get(ALL, UNPRUNED, JUDGED).value
        return len(self.variations) if count is None else round(count)

    @property
    def has_aggregate(self) -> bool:
        """Whether metrics over all variations are present."""
        return any(variation == ALL for variation, _, _ in self.estimates)


def read_metrics(metrics: polars.DataFrame) -> MetricTable:
    """Addresses a tidy `metrics` frame. Null and NaN are both read as missing; variations keep the frame's order.

    Raises ExciseError when a column is missing, the frame is empty, holds several models or scenarios, or gives a
    metric of a mask twice.
    """
    lacking = [column for column in _COLUMNS if column not in metrics.columns]
    if lacking:
        raise ExciseError(f"metrics: columns {', '.join(lacking)} are missing; pass the frame that evaluate() gives")
    if metrics.is_empty():
        raise ExciseError("metrics: no rows; evaluate the scenario first")
    for column in ("model", "scenario"):
        keys = metrics[column].unique().sort().to_list()
        if len(keys) > 1:
            raise ExciseError(f"metrics: {len(keys)} values of {column} ({', '.join(keys)}); filter the frame to one")
    estimates: dict[tuple[str, Condition, str], Estimate] = {}
    for row in metrics.iter_rows(named=True):
        mask = Condition(row["strategy"], row["level"], row["matched_to"])
        key = (row["variation"], mask, row["metric"])
        if key in estimates:
            raise ExciseError(
                f"metrics: {row['metric']} of {row['strategy']} ({row['level']}, matched to {row['matched_to']}) "
                f"on {row['variation']} appears twice; keep one row for each mask and metric"
            )
        estimates[key] = read_estimate(row)
    variations = tuple(dict.fromkeys(name for name, _, _ in estimates if name != ALL))
    masks = tuple(sorted({mask for _, mask, _ in estimates}, key=condition_order))
    return MetricTable(metrics["model"][0], metrics["scenario"][0], variations, masks, estimates)


def read_estimate(row: Mapping[str, Any]) -> Estimate:
    """The estimate of a row of metrics: estimate, low, high, and of p_value, p_holm, n and names what there is.

    Null, NaN and infinity are all read as missing.
    """
    value, low, high, plain, adjusted = (
        _finite(row.get(column)) for column in ("estimate", "low", "high", "p_value", "p_holm")
    )
    return Estimate(value, low, high, plain if adjusted is None else adjusted, row.get("n"), row.get("names"))


@dataclass(frozen=True)
class Verdict:
    """What `excise.evaluation.verdicts` says of a mask in a place: see its columns."""

    closes: bool
    success: bool
    failed: tuple[str, ...]
    unknown: tuple[str, ...]
    not_measured: tuple[str, ...]


Verdicts = Mapping[tuple[str, Condition], Verdict]
"""Verdicts by variation and mask."""


def read_verdicts(verdicts: polars.DataFrame | None) -> Verdicts:
    """Addresses the frame that `excise.evaluation.verdicts.verdicts` gives; empty for None, as nothing is judged
    then."""
    rows = () if verdicts is None else verdicts.iter_rows(named=True)
    return {
        (row["variation"], Condition(row["strategy"], row["level"], row["matched_to"])): Verdict(
            row["closes"], row["success"], tuple(row["failed"]), tuple(row["unknown"]), tuple(row["not_measured"])
        )
        for row in rows
    }


# ------------------------------------------------------------------------------------------------------------- tables


def audit_table(
    metrics: polars.DataFrame,
    *,
    scenario_title: str,
    unit: str,
    majority: str = "majority",
    minority: str = "minority",
    inlier_floor: float = INLIER_FLOOR,
    inlier_tolerance: float = INLIER_TOLERANCE,
    verdicts: polars.DataFrame | None = None,
    published: Sequence[str] = PUBLISHED,
    width: int = 160,
) -> str:
    """Plain text of at most `width` columns: every variation's masks, the block over all variations, the finding.

    `unit` is the outcome's (dollars, hours a week); `majority` and `minority` are the groups' labels. Gaps are
    majority minus minority. A value that is not defined prints as `-`. `inlier_floor` and `inlier_tolerance` are the
    settings the audit was judged by, `verdicts` what `excise.evaluation.verdicts` makes of them: `!` stands behind a
    mask that breaks a budget. Errors as `read_metrics`.
    """
    table = read_metrics(metrics)
    headings = [
        f"{scenario_title}: {table.model}",
        f"answers in {unit}; gap = {majority} - {minority}; [95 % interval]",
    ]
    broken = read_verdicts(verdicts)
    rows: list[list[str] | str] = []
    for variation in table.variations:
        rows += ["", variation, *_rows(table, variation, _variation_cells, inlier_tolerance, broken)]
    headers = [_variation_header(majority, minority, compact=choice) for choice in (False, True)]
    blocks = [_fit(headings, headers, rows, width)]
    if table.has_aggregate:
        count, judged = len(table.variations), table.judged
        title = f"All {count} variations together" if count != 1 else "All variations (one)"
        if judged < count:
            title = f"The {judged} of {count} variations that can be judged, together"
        for heading, header, cells in (
            (title, _AGGREGATE, _aggregate_cells),
            (f"{title}: reductions", _REDUCTIONS, _reduction_cells),
        ):
            lines = _rows(table, ALL, cells, inlier_tolerance, broken)
            blocks.append(_fit([heading], [header] * 2, lines, width))
    blocks += [_wrapped(each, width) for each in _notes("\n".join(blocks), table, inlier_tolerance, broken)]
    told = finding(
        metrics,
        inlier_floor=inlier_floor,
        inlier_tolerance=inlier_tolerance,
        verdicts=verdicts,
        published=published,
        majority=majority,
        minority=minority,
    )
    blocks.append(_wrapped(told, width))
    return "\n\n".join(blocks) + "\n"


def _notes(text: str, table: MetricTable, tolerance: float, verdicts: Verdicts) -> list[str]:
    """What the marks in a table's text mean, for those that occur."""
    notes = []
    if "p (" in text:
        notes.append(
            f"{NO_GAP_TEST}: test that the groups' means are alike, in the unpruned model; {CHANGE_TEST}: test that a "
            "mask leaves the raw gap as it was. Both exchange names and are adjusted over the variations by Holm's "
            "method."
        )
    if NO_COMPARISON in text:
        notes.append(
            f"{NO_COMPARISON} not at comparable usefulness: random masks of this size leave an inlier ratio over "
            f"{floor_text(tolerance)} away, and the gap of a wrecked model is no yardstick."
        )
    if FEW in text:
        names = min(each.names for each in table.estimates.values() if each.few_names)
        notes.append(f"{FEW} {few_names_warning(names)}")
    if COLLAPSED in text:
        notes.append(
            f"{COLLAPSED}: the answers of a group are (nearly) all the same number, with less than "
            f"{COLLAPSED_SPREAD:.0%} of the unpruned model's spread. That is damage, so no reduction is defined."
        )
    where = ALL if table.has_aggregate else table.variations[0]
    broken = [
        f"{mask.strategy} ({level_label(mask.level)}): {', '.join(verdict.failed)}"
        for (variation, mask), verdict in verdicts.items()
        if verdict.failed and variation == where and mask in table.masks and not mask.is_control
    ]
    if broken:
        over = " over all variations" if where == ALL else ""
        notes.append(f"{BROKEN} behind a mask: it breaks a budget;{over} {'; '.join(broken)}.")
    return notes


def few_names_warning(names: int, name: str = "name", group: str = "group") -> str:
    """Why an interval from so few names a group is to be distrusted. name, group: what they are called."""
    return (
        f"An interval from {names} {name}{'' if names == 1 else 's'} a {group} says little: with fewer than "
        f"{FEW_NAMES} it misses how {name}s differ. Ask about more {name}s."
    )


def markdown_table(
    metrics: polars.DataFrame,
    *,
    majority: str = "majority",
    minority: str = "minority",
    inlier_tolerance: float = INLIER_TOLERANCE,
    verdicts: polars.DataFrame | None = None,
) -> str:
    """The same figures as a Markdown table, one row per variation and mask, and its notes. Errors as `read_metrics`.

    The column `p (no gap)` tests that the unpruned model has no raw gap, `p (gap as unpruned)` that a mask leaves the
    raw gap as it was; over the variations of a mask both are adjusted by Holm's method.
    """
    table = read_metrics(metrics)
    header = [
        "variation",
        "mask",
        "level",
        f"mean {majority} / {minority}",
        f"median {majority} / {minority}",
        "raw gap",
        NO_GAP_TEST,
        CHANGE_TEST,
        "mean absolute gap",
        "SMD",
        "inlier ratio",
        "spread",
        "commonest answer, +",
        "excess change",
        "parse rate",
        "density",
        "gap of the random control",
        "gap reduction",
        "beyond random, points",
        "closed by majority and minority, %",
        "budgets broken",
    ]
    judged = read_verdicts(verdicts)
    lines = [header, ["---", "---", "---"] + ["---:"] * (len(header) - 3)]
    for variation in [*table.variations, *([ALL] if table.has_aggregate else [])]:
        for mask in table.masks_of(variation):
            means, medians, gap, no_gap, as_unpruned, smd, inliers, reduction, beyond = _variation_cells(
                table, variation, mask, inlier_tolerance, compact=False
            )
            name = f"{mask.strategy} (control of {mask.matched_to})" if mask.is_control else mask.strategy
            by_chance = MISSING if mask.strategy == RANDOM else table.get(variation, mask.control, "gap_mean")
            random_gap = interval_text(Estimate(by_chance.value))
            verdict = judged.get((variation, mask))
            lines.append(
                [
                    variation,
                    name,
                    "" if mask.level == NO_LEVEL else level_label(mask.level),
                    means,
                    medians,
                    gap,
                    no_gap,
                    as_unpruned,
                    interval_text(table.get(variation, mask, "abs_gap_mean")),
                    smd,
                    inliers,
                    *(
                        ratio_text(table.get(variation, mask, metric).value)
                        for metric in ("spread_ratio", "commonest_rise", "excess_change", "parse_rate")
                    ),
                    density_text(table.get(variation, mask, "density")),
                    random_gap,
                    reduction,
                    beyond,
                    _closed_by(table, variation, mask),
                    ", ".join(verdict.failed) if verdict else "",
                ]
            )
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n\n".join([text, *_notes(text, table, inlier_tolerance, {})]) + "\n"


def reuse_sentence(drawn: int, reused: int) -> str:
    """How many completions were sampled in this run and how many were taken from earlier ones."""
    if drawn < 0 or reused < 0:
        raise ExciseError(f"completions drawn and reused cannot be negative, got {drawn} and {reused}")
    if drawn == 0 and reused == 0:
        return "No completion was asked for."
    if drawn == 0:
        return f"Nothing was sampled anew: {_completions(reused)} from earlier runs reused, since nothing changed."
    if reused == 0:
        return f"{_completions(drawn)} sampled, none reused: nothing in the cache matched."
    share = reused / (drawn + reused)
    shown = "over 99" if 0.99 < share < 1 else "under 1" if share < 0.01 else f"{100 * share:.0f}"
    return f"{_completions(drawn)} sampled, {_completions(reused)} ({shown} %) reused from earlier runs."


def _completions(count: int) -> str:
    return f"{count:,} completion" + ("" if count == 1 else "s")


# ------------------------------------------------------------------------------------------------------------ finding


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
    told = f"the unpruned {name} is {interval_text(gap, decimals=2 if 'SMD' in name else None)}"
    if not gap.has_interval:
        alone = ", as a group has one name" if gap.names == 1 else ""
        return False, [f"No finding: {told} and has no interval{alone}.", *undefined]
    singled = standing_out(table) if where == ALL else []
    signs = {table.get(each, UNPRUNED, "gap_mean").value > 0 for each in singled}
    rejects = gap.p is not None and gap.p < SIGNIFICANCE
    opposite = _singled_out(table, singled) if len(signs) == 2 else None
    if gap.low == gap.high == 0.0 and not singled:
        return False, [f"No gap: {told}, whatever names are drawn.", *undefined]
    if gap.covers_zero and rejects:
        sentence = f"Whether there is a gap is open: {told}, which covers 0, though the test of no gap rejects"
        return True, [f"{sentence} ({p_equals(gap.p)}). {_OPEN}", *([opposite] if opposite else []), *undefined]
    if gap.covers_zero:
        cancel = ", as gaps of opposite sign cancel" if opposite else ""
        average = f" on average{cancel}" if singled else ""
        sentence = f"No gap detectable{average}: {told}; {_not_excluded(table, where, gap)}."
        return bool(singled), [sentence, *([_singled_out(table, singled)] if singled else []), *undefined]
    if gap.p is not None and not rejects:
        sentence = f"Whether there is a gap is open: {told}, but the test of no gap does not reject"
        return True, [f"{sentence} ({p_equals(gap.p)}). {_OPEN}", *([opposite] if opposite else []), *undefined]
    return True, [*([f"Gaps have opposite signs: {told}. {opposite}"] if opposite else []), *undefined]


def _not_excluded(table: MetricTable, where: str, gap: Estimate) -> str:
    """`up to 0.09 SMD is not excluded`: the end of the interval that is further from 0."""

    def furthest(estimate: Estimate) -> float:
        return max(abs(estimate.low), abs(estimate.high))

    smd = table.get(where, UNPRUNED, "smd")
    in_smd = f"{_at_least(furthest(smd), 2)} SMD" if smd.has_interval else None
    if gap == smd or (where == ALL and in_smd):
        return f"up to {in_smd} is not excluded"
    raw = _at_least(furthest(gap), _decimals([gap.value, gap.low, gap.high]))
    return f"up to {raw}{f' ({in_smd})' if in_smd else ''} is not excluded"


def _at_least(value: float, decimals: int) -> str:
    """The value with so many decimals, or as many as it takes not to look like 0."""
    while value > 0 and not round(value, decimals) and decimals < 6:
        decimals += 1
    return _fixed(value, decimals)


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
            first, second = (_number(middle.value, _decimals([middle.value])) for middle in middles)
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
    return [few_names_warning(gap.names)] if gap.few_names else []


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
    pool = next(each for each in ranked if each)
    best = max(pool, key=lambda mask: pool[mask].value)
    beyond, reduction = pool[best], table.get(where, best, "gap_reduction")
    inliers = table.get(where, best, "inlier_ratio")
    at = f"at inlier ratio {_against_floor(inliers.value, floor)}"
    if not keeping:
        return best, (
            f"No prompt-specific strategy keeps the inlier ratio at the floor of {floor_text(floor)}: the largest "
            f"difference from its matched random control, {points_text(beyond)} by {best.strategy}, comes {at}."
        )
    if beyond.value <= 0.0:
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
    success = verdict is None or verdict.success
    opening = "Best prompt-specific strategy:" if success else f"No prompt-specific strategy {_lacks(verdict)}:"
    sentence = (
        f"{opening} {best.strategy} removes {percent_text(reduction)} of the raw gap{scope}, "
        f"{points_text(beyond)} more than its matched random control, {at} (floor {floor_text(floor)})"
        + ("" if spread == "-" else f", with {spread} of the spread within the groups")
    )
    if where == ALL and verdict is None:
        below = [
            f"{name} ({_against_floor(ratio.value, floor)})"
            for name in table.variations
            if (ratio := table.get(name, best, "inlier_ratio")).value is not None and not reaches(ratio.value, floor)
        ]
        if below:
            sentence += f", though below that floor on {listed(below)}"
    if not success and verdict.failed:
        sentence += f", but with {listed(verdict.failed)}"
    if not success and verdict.closes:
        return best, sentence + (f"; {listed(verdict.unknown)}." if verdict.unknown else ".")
    if not beyond.has_interval:
        return best, sentence + "; without an interval this is a lead, not a result."
    if beyond.low <= 0.0:
        return best, sentence + "; that interval covers 0, so it is not shown to beat random pruning."
    if reduction.has_interval and reduction.low <= 0.0:
        own = per_cent(reduction)
        return best, f"{sentence}; the reduction itself, {own} %, may be none: it only harms less than random pruning."
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


def reaches(ratio: float | None, floor: float) -> bool:
    """Whether an inlier ratio is at the floor or above; rounding alone makes no difference, unknown is no."""
    return ratio is not None and at_most(floor, ratio)


def floor_text(floor: float) -> str:
    """A threshold with the decimals it was given, two at least: `0.90`, `0.875`."""
    text = f"{floor:.6f}".rstrip("0")
    return text if len(text) >= 4 else f"{floor:.2f}"


def points_text(estimate: Estimate) -> str:
    """A difference of two shares: `85 percentage points [70, 99]`."""
    value, *interval = interval_text(scaled(estimate, 100.0), decimals=0).split(" ", 1)
    return " ".join([value, "percentage points", *interval])


def _against_floor(ratio: float | None, floor: float) -> str:
    """The ratio with two decimals, or as many as it takes not to look like a floor it misses, or like 0 or 1."""
    if ratio is None:
        return "unknown"
    decimals = 2
    while ratio < floor <= round(ratio, decimals) and decimals < 6:
        decimals += 1
    return ratio_text(ratio) if decimals == 2 else f"{ratio:.{decimals}f}"


def listed(names: Sequence[str]) -> str:
    """`chair, car and oven`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


# -------------------------------------------------------------------------------------------------------- table layout


def _variation_header(majority: str, minority: str, *, compact: bool) -> list[tuple[str, str]]:
    longest = 6 if compact else 12
    groups = f"{_shortened(majority, longest)} / {_shortened(minority, longest)}"
    return [
        ("", "mask"),
        ("mean", groups),
        ("median", groups),
        ("", "raw gap"),
        ("p (no", "gap)"),
        ("p (gap as", "unpruned)"),
        ("", "SMD"),
        ("inlier", "ratio"),
        ("gap re-", "duction"),
        ("beyond random,", "points"),
    ]


def _p_values(table: MetricTable, variation: str, mask: Condition) -> list[str]:
    """The p-value of the raw gap in the column of what it tests."""
    p_value = p_text(table.get(variation, mask, "gap_mean").p)
    return [p_value, "-"] if mask == UNPRUNED else ["-", p_value]


def _reduction(table: MetricTable, variation: str, mask: Condition, text: str) -> str:
    """A reduction's text, or that the answers collapsed."""
    return COLLAPSED if table.collapsed(variation, mask) else text


def _variation_cells(
    table: MetricTable, variation: str, mask: Condition, tolerance: float, *, compact: bool
) -> list[str]:
    def of(metric: str) -> Estimate:
        return table.get(variation, mask, metric)

    return [
        _pair(of("mean_majority"), of("mean_minority"), compact),
        _pair(of("median_majority"), of("median_minority"), compact),
        interval_text(of("gap_mean"), compact=compact),
        *_p_values(table, variation, mask),
        interval_text(of("smd"), decimals=2, compact=compact),
        ratio_text(of("inlier_ratio").value),
        _reduction(table, variation, mask, percent_text(of("gap_reduction"), compact=compact)),
        _beyond(table, variation, mask, "reduction_over_random", tolerance, compact),
    ]


_AGGREGATE = [
    ("", "mask"),
    ("mean", "|SMD|"),
    ("mean", "SMD"),
    ("mean abso-", "lute gap"),
    ("p (no", "gap)"),
    ("p (gap as", "unpruned)"),
    ("inlier", "ratio"),
    ("", "spread"),
    ("parse", "rate"),
    ("", "density"),
]
_REDUCTIONS = [
    ("", "mask"),
    ("gap reduction,", "%"),
    ("beyond random,", "points"),
    ("SMD reduction", "beyond random, points"),
    ("closed by majority", "and minority, %"),
    ("excess", "change"),
    ("commonest", "answer, +"),
]


def _aggregate_cells(
    table: MetricTable, variation: str, mask: Condition, tolerance: float, *, compact: bool
) -> list[str]:
    def of(metric: str) -> Estimate:
        return table.get(variation, mask, metric)

    return [
        interval_text(of("abs_smd"), decimals=2, compact=compact),
        interval_text(of("smd"), decimals=2, compact=compact),
        interval_text(Estimate(of("abs_gap_mean").value), compact=compact),
        *_p_values(table, variation, mask),
        ratio_text(of("inlier_ratio").value),
        ratio_text(of("spread_ratio").value),
        ratio_text(of("parse_rate").value),
        density_text(of("density")),
    ]


def _reduction_cells(
    table: MetricTable, variation: str, mask: Condition, tolerance: float, *, compact: bool
) -> list[str]:
    reduction = per_cent(table.get(variation, mask, "gap_reduction"), compact=compact)
    return [
        _reduction(table, variation, mask, reduction),
        _beyond(table, variation, mask, "reduction_over_random", tolerance, compact),
        _beyond(table, variation, mask, "smd_reduction_over_random", tolerance, compact),
        _closed_by(table, variation, mask),
        ratio_text(table.get(variation, mask, "excess_change").value),
        ratio_text(table.get(variation, mask, "commonest_rise").value),
    ]


def _closed_by(table: MetricTable, variation: str, mask: Condition) -> str:
    shares = [table.get(variation, mask, f"closed_by_{side}").value for side in ("majority", "minority")]
    return "-" if None in shares else " / ".join(f"{share:.0%}".rstrip("%") for share in shares)


def _beyond(table: MetricTable, variation: str, mask: Condition, metric: str, tolerance: float, compact: bool) -> str:
    estimate = table.get(variation, mask, metric)
    if table.collapsed(variation, mask):
        return "-"
    marked = estimate.value is not None and not table.comparable(variation, mask, tolerance)
    text = per_cent(estimate, signed=True, compact=compact)
    return text + (NO_COMPARISON if marked else "")


def _mark(verdicts: Verdicts, variation: str, mask: Condition) -> str:
    """The mark behind a strategy's own mask that breaks a budget; nothing behind others."""
    verdict = verdicts.get((variation, mask))
    return f" {BROKEN}" if verdict is not None and verdict.failed and not mask.is_control else ""


@dataclass(frozen=True)
class _Row:
    """A line of a block: its label, its cells in ordinary and in compact figures."""

    label: str
    ordinary: list[str]
    compact: list[str]


def _rows(
    table: MetricTable, variation: str, cells: Callable[..., list[str]], tolerance: float, verdicts: Verdicts
) -> list[_Row | str]:
    """A variation's lines: a line for each level, a row for each mask, controls indented under their strategy."""
    rows: list[_Row | str] = []
    level = NO_LEVEL
    for mask in table.masks_of(variation):
        if mask.level != level:
            rows.append(f"  {level_label(mask.level)}")
            level = mask.level
        indent = "  " if mask.level == NO_LEVEL else "      " if mask.is_control else "    "
        label = f"{indent}{mask.strategy}"
        if mask.is_control and Condition(mask.matched_to, mask.level) not in table.masks:
            label += f" of {mask.matched_to}"
        label += _mark(verdicts, variation, mask)
        ordinary, compact = (cells(table, variation, mask, tolerance, compact=choice) for choice in (False, True))
        rows.append(_Row(label, ordinary, compact))
    return rows


def _fit(headings: list[str], headers: list[list[tuple[str, str]]], rows: list[_Row | str], width: int) -> str:
    """The block in ordinary figures if they fit, else in compact ones (12.3k) with labels shortened to fit."""
    for compact, header in enumerate(headers):
        cells = [row.compact if compact else row.ordinary for row in rows if isinstance(row, _Row)]
        columns = [
            max([len(line) for line in header[index]] + [len(row[index - 1]) for row in cells])
            for index in range(1, len(header))
        ]
        labels = max([len(header[0][1])] + [len(row.label) for row in rows if isinstance(row, _Row)])
        room = width - sum(columns) - 2 * len(columns)
        if labels <= room:
            break
    labels = min(labels, max(room, 12))
    lines = [_shortened(line, width) for line in headings]
    for part in (0, 1):
        titles = [title[part].rjust(size) for title, size in zip(header[1:], columns, strict=True)]
        lines.append("  ".join([header[0][part].ljust(labels), *titles]).rstrip())
    lines.append("-" * min(width, labels + sum(columns) + 2 * len(columns)))
    for row in rows:
        if isinstance(row, str):
            lines.append(_shortened(row, width))
            continue
        figures = row.compact if compact else row.ordinary
        aligned = [cell.rjust(size) for cell, size in zip(figures, columns, strict=True)]
        lines.append("  ".join([_shortened(row.label, labels).ljust(labels), *aligned]).rstrip())
    return "\n".join(lines)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- numbers


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate and its interval times `factor`, which is above 0."""
    parts = (None if part is None else part * factor for part in (estimate.value, estimate.low, estimate.high))
    return Estimate(*parts, estimate.p, estimate.n, estimate.names)


def at_most(value: float, bound: float) -> bool:
    """value <= bound, where rounding alone makes no difference."""
    return value <= bound + 1e-9


def _decimals(values: Iterable[float | None]) -> int:
    """Decimals for three significant digits of the largest of the values, none from 100 on."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest < _TINY:
        return 0
    return min(max(2 - math.floor(math.log10(largest)), 0), 6)


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text


def _number(value: float | None, decimals: int, compact: bool = False) -> str:
    if value is None:
        return "-"
    if compact:
        for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= factor:
                return _fixed(value / factor, _decimals([value / factor])) + suffix
    return _fixed(value, decimals)


def ratio_text(value: float | None) -> str:
    """A share with two decimals, or as many as it takes not to look like 0 or 1 where it is neither; `-` for None."""
    if value is None:
        return "-"
    decimals = 2
    while round(value, decimals) in (0.0, 1.0) and value not in (0.0, 1.0) and decimals < 6:
        decimals += 1
    return _number(value, decimals)


def _pair(first: Estimate, second: Estimate, compact: bool) -> str:
    if first.value is None and second.value is None:
        return "-"
    decimals = _decimals([first.value, second.value])
    return f"{_number(first.value, decimals, compact)} / {_number(second.value, decimals, compact)}"


def interval_text(
    estimate: Estimate, *, decimals: int | None = None, signed: bool = False, compact: bool = False
) -> str:
    """`70.1 [60.2, 81.3]`; the estimate alone where there is no interval; `-` where there is no estimate.

    A dagger stands behind an interval from few names.
    """
    if estimate.value is None:
        return "-"
    if decimals is None:
        decimals = _decimals([estimate.value, estimate.low, estimate.high])
    text = _number(estimate.value, decimals, compact)
    if signed and estimate.value > 0 and text.strip("0.,"):
        text = "+" + text
    if not estimate.has_interval:
        return text
    ends = f"[{_number(estimate.low, decimals, compact)}, {_number(estimate.high, decimals, compact)}]"
    return f"{text} {ends}{FEW if estimate.few_names else ''}"


def p_text(value: float | None) -> str:
    """A p-value with three decimals, never 0: `0.031`, `< 0.001`; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def p_equals(value: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    text = p_text(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def per_cent(estimate: Estimate, *, signed: bool = False, compact: bool = False) -> str:
    """A share and its interval in whole per cent, without the sign: `92 [80, 99]`; 99.7 is not rounded to 100."""
    decimals = 0
    value = estimate.value
    while not signed and value is not None and value < 1 <= round(value, 2 + decimals) and decimals < 3:
        decimals += 1
    return interval_text(scaled(estimate, 100.0), decimals=decimals, signed=signed, compact=compact)


def percent_text(estimate: Estimate, *, compact: bool = False) -> str:
    """A share as whole per cent: `92 %`; `-` where there is no estimate."""
    return "-" if estimate.value is None else f"{per_cent(Estimate(estimate.value), compact=compact)} %"


def density_text(estimate: Estimate) -> str:
    """Two significant digits: `0.030 %`, `5.0 %`."""
    if estimate.value is None:
        return "-"
    percent = 100 * estimate.value
    if percent == 0:
        return "0 %"
    return f"{_fixed(percent, min(max(1 - math.floor(math.log10(abs(percent))), 0), 6))} %"
