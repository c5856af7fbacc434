"""Side effects as tables, the masks that do most first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from excise.evaluation.rounding import interval_text, level_label, per_cent
from excise.evaluation.side_effects import CHANGE, KL, NO_TARGET, RATIO, SCENARIO_METRICS, TEXT
from excise.evaluation.table import MISSING, read_estimate

SHOWN = 30
"""Rows of a table in words."""


def side_effects_markdown(rows: pl.DataFrame) -> str:
    """Side effects as Markdown tables, other scenarios and text, each with the mask that does most at the top.

    rows: of SIDE_EFFECTS_SCHEMA, one at least. Figures stand with their 95 % intervals; `-` where there is none. Beyond
    `SHOWN` rows a table is cut and says so.
    """
    figures: dict[tuple, dict[str, Any]] = {}
    for row in rows.iter_rows(named=True):
        place = row["target"], row["strategy"], row["level"], row["matched_to"], row["variation"]
        figures.setdefault(place, {})[row["metric"]] = row
    text = {place: metrics for place, metrics in figures.items() if place[0] == TEXT}
    others = {place: metrics for place, metrics in figures.items() if place[0] not in (TEXT, NO_TARGET)}
    parts = []
    for title, part, metrics in (
        ("Other scenarios", others, SCENARIO_METRICS),
        (f"Text, {rows.filter(target=TEXT).select(pl.col('names').max()).item()} windows", text, (KL, RATIO)),
    ):
        if part:
            parts.append(_table(title, part, metrics))
    return "\n\n".join(parts)


def _table(title: str, rows: Mapping[tuple, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    def harm(place: tuple) -> tuple[float, ...]:
        """The more, the worse; what is unknown comes first."""
        figures = {metric: rows[place].get(metric, {}).get("estimate") for metric in _HARM if metric in metrics}
        return tuple(np.inf if value is None else value * _HARM[metric] for metric, value in figures.items())

    lines = [
        f"{title}:",
        "",
        f"| target | mask | {' | '.join(_HEADINGS[metric] for metric in metrics)} |",
        "|---|---|" + "---|" * len(metrics),
    ]
    order = sorted(rows, key=harm, reverse=True)
    for place in order[:SHOWN]:
        target, strategy, level, matched_to, variation = place
        name = f"{strategy}, {level_label(level)}, {variation}"
        name += f" (control of {matched_to})" if matched_to is not None else ""
        cells = []
        for metric in metrics:
            estimate = read_estimate(rows[place][metric]) if metric in rows[place] else MISSING
            cells.append(per_cent(estimate, signed=metric in _SIGNED) if metric in _SHARES else interval_text(estimate))
        lines.append(f"| {target} | {name} | {' | '.join(cells)} |")
    if len(order) > SHOWN:
        lines += ["", f"{len(order) - SHOWN} more rows are in the table `side_effects`."]
    return "\n".join(lines)


_HARM = {CHANGE: 1, "inlier_ratio": -1, KL: 1}
"""Metrics that tell how much harm is done, the first ones first, and whether it is more of them or less."""
_SHARES = ("inlier_ratio", "spread_ratio", "commonest_rise", RATIO)
_SIGNED = ("commonest_rise", RATIO)
_HEADINGS = {
    "inlier_ratio": "inliers, %",
    "spread_ratio": "spread kept, %",
    "commonest_rise": "commonest answer, points",
    "excess_change": "excess change, SD",
    "gap_mean": "gap",
    "gap_change": "gap closed (below 0: opened)",
    KL: "divergence, nats per token",
    RATIO: "perplexity, change in %",
}
