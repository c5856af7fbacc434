"""Restoration and specificity as a table."""

from __future__ import annotations

import polars as pl

from excise.conditions import ALL, NO_LEVEL, Condition, condition_order
from excise.evaluation.rounding import interval_text, level_label, per_cent
from excise.evaluation.table import MISSING, Estimate, read_estimate


def restoration_markdown(rows: pl.DataFrame) -> str:
    """Restoration and specificity as a Markdown table, and below it why figures are missing.

    rows: those of `restoration`, one at least. Figures stand with their 95 % intervals; `-` where there is none.
    """
    figures: dict[tuple[str, Condition, str], Estimate] = {}
    for row in rows.iter_rows(named=True):
        mask = Condition.of(row)
        figures[row["variation"], mask, row["metric"]] = read_estimate(row)
    lines = [
        f"Reference: {rows['reference'][0]}. 100 % restored: as if the bias had never been put in; 0: nothing gained; "
        "below 0: further away. Specificity: how far the mask moves the reference itself; it should be 0.",
        "",
        "| variation | mask | distance to the reference | restored, % | beyond random, points | specificity | "
        "which is |",
        "|---|---|---|---|---|---|---|",
    ]
    order = list(dict.fromkeys([ALL, *rows["variation"]]))
    places = {(variation, mask) for variation, mask, _ in figures}
    for variation, mask in sorted(places, key=lambda place: (order.index(place[0]), condition_order(place[1]))):

        def of(metric: str, variation: str = variation, mask: Condition = mask) -> Estimate:
            return figures.get((variation, mask, metric), MISSING)

        over = of("specificity_over_noise")
        judged = "-" if over.low is None else "beyond noise" if over.low > 0 else "within noise"
        name = mask.strategy if mask.level == NO_LEVEL else f"{mask.strategy}, {level_label(mask.level)}"
        name += f" (control of {mask.matched_to})" if mask.is_control else ""
        cells = [
            variation,
            name,
            interval_text(of("distance")),
            per_cent(of("restoration")),
            per_cent(of("restoration_over_random"), signed=True),
            interval_text(of("specificity")),
            judged,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = rows.drop_nulls("reason").unique(["variation", "reason"], maintain_order=True)
    lines += ["", *(f"* {variation}: {reason}" for variation, reason in reasons.select("variation", "reason").rows())]
    return "\n".join(lines).rstrip()
