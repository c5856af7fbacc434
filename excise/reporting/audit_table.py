"""The table of an audit, as plain text for a terminal and as Markdown for the UI.

Here: rows, columns, marks and notes. Not here: any estimate, and the finding below the table (`finding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars

from excise.conditions import ALL, NO_LEVEL, RANDOM, UNPRUNED, Condition
from excise.evaluation.rounding import (
    FEW,
    density_text,
    floor_text,
    interval_text,
    level_label,
    p_text,
    pair_text,
    per_cent,
    percent_text,
    ratio_text,
)
from excise.evaluation.table import MISSING, Estimate, MetricTable, Verdicts, read_metrics, read_verdicts
from excise.evaluation.thresholds import COLLAPSED_SPREAD, INLIER_FLOOR, INLIER_TOLERANCE
from excise.reporting.finding import PUBLISHED, finding
from excise.reporting.words import few_names_warning

NO_COMPARISON = "*"
"""Behind a reduction over random: mask and control are not at comparable usefulness."""
COLLAPSED = "collapsed"
"""In place of a reduction: a group's answers are (nearly) all the same."""
BROKEN = "!"
"""Behind a mask: it breaks a budget."""
NO_GAP_TEST, CHANGE_TEST = "p (no gap)", "p (gap as unpruned)"
"""Columns of p-values by the hypothesis they test: that of unpruned rows, and that of pruned rows."""


# A function for notebooks, too: settings by name, each with a default or an error of its own.
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
    rows: list[_Row | str] = []
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
    blocks += [_wrapped(note, width) for note in _notes("\n".join(blocks), table, inlier_tolerance, broken)]
    sentences = finding(
        metrics,
        inlier_floor=inlier_floor,
        inlier_tolerance=inlier_tolerance,
        verdicts=verdicts,
        published=published,
        majority=majority,
        minority=minority,
    )
    blocks.append(_wrapped(sentences, width))
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
        names = min(
            estimate.names for estimate in table.estimates.values() if estimate.few_names and estimate.names is not None
        )
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
        pair_text(of("mean_majority"), of("mean_minority"), compact),
        pair_text(of("median_majority"), of("median_minority"), compact),
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
        if mask.matched_to is not None and Condition(mask.matched_to, mask.level) not in table.masks:
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
