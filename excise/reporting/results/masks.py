"""What each mask removes, and how that agrees with what is known of a planted model."""

from __future__ import annotations

from collections.abc import Mapping

from excise.conditions import NO_LEVEL, RANDOM, UNPRUNED, Condition
from excise.evaluation.rounding import density_text, interval_text, level_label, per_cent
from excise.evaluation.table import Estimate, MetricTable
from excise.reporting.audit_table import COLLAPSED
from excise.reporting.results.frames import Judged, markdown_table, share_text, where_judged
from excise.reporting.results.verdicts import (
    BEATS_RANDOM,
    NO_GAP,
    NO_GAP_ON_AVERAGE,
    NO_MASK,
    NO_REDUCTION,
    NOT_BEYOND,
    SCENARIO_LEVELS,
    expected_verdict,
    verdict,
)
from excise.reporting.words import listed


def masks_section(tables: Mapping[tuple[str, str], MetricTable], heads: set[tuple[str, str]], judged: Judged) -> str:
    if not tables:
        return "No masks were evaluated yet."
    parts = []
    for (model, scenario), table in tables.items():
        where = where_judged(table)
        before = {metric: table.get(where, UNPRUNED, metric) for metric in ("smd", "inlier_ratio", "gap_mean")}
        one = len(table.variations) == 1
        scope = table.variations[0] if one else f"all {len(table.variations)} variations"
        unpruned = f"Unpruned, {scope}: SMD {interval_text(before['smd'], decimals=2)}"
        if one:
            unpruned += f", raw gap {interval_text(before['gap_mean'])}"
        unpruned += f", inlier ratio {share_text(before['inlier_ratio'])}."
        header = [
            "mask",
            "level",
            "density",
            *(["raw gap"] if one else []),
            "gap reduction, %",
            "beyond random, points",
            "SMD",
            "inlier ratio: mask, random",
            "verdict",
        ]
        rows = []
        for mask in table.masks_of(where):
            if mask == UNPRUNED or mask.level not in SCENARIO_LEVELS:
                continue

            def of(metric: str, mask: Condition = mask, table: MetricTable = table, where: str = where) -> Estimate:
                return table.get(where, mask, metric)

            density = density_text(of("density"))
            if density != "-" and (model, mask.matched_to or mask.strategy) in heads:
                density += " of heads"
            gap = f"{interval_text(Estimate(before['gap_mean'].value))} → {interval_text(of('gap_mean'))}"
            is_random = mask.strategy == RANDOM
            said = "" if is_random else verdict(table, where, mask, judged[model, scenario].inlier_tolerance)
            collapsed = bool(table.collapsed(where, mask))
            control = "" if is_random else f", {share_text(table.get(where, mask.control, 'inlier_ratio'))}"
            rows.append(
                [
                    f"· {mask.strategy}" if mask.is_control else f"**{mask.strategy}**",
                    level_label(mask.level),
                    density,
                    *([gap] if one else []),
                    COLLAPSED if collapsed else per_cent(of("gap_reduction")),
                    "-" if collapsed else per_cent(of("reduction_over_random"), signed=True),
                    " → ".join(interval_text(smd, decimals=2) for smd in (Estimate(before["smd"].value), of("smd"))),
                    share_text(of("inlier_ratio")) + control,
                    said,
                ]
            )
        parts += [
            f"### {model}, {scenario}",
            unpruned,
            markdown_table(header, rows) if rows else "No masks were evaluated yet.",
        ]
    if any(mask.level not in (*SCENARIO_LEVELS, NO_LEVEL) for table in tables.values() for mask in table.masks):
        parts.append("Masks that come from one other scenario alone stand under *From one scenario to another*.")
    return "\n\n".join(parts)


def expectation_section(tables: Mapping[tuple[str, str], MetricTable], judged: Judged) -> str:
    known = {
        place: table for place, table in tables.items() if expected_verdict(*place, SCENARIO_LEVELS[0]) is not None
    }
    strategies = list(
        dict.fromkeys(
            mask.strategy
            for table in known.values()
            for mask in table.masks
            if not mask.is_control and mask != UNPRUNED and mask.level in SCENARIO_LEVELS
        )
    )
    if not strategies:
        return "No planted model was evaluated yet, so there is no truth to compare with."
    rows, agreed, decided = [], dict.fromkeys(strategies, 0), dict.fromkeys(strategies, 0)
    for (model, scenario), table in known.items():
        where = where_judged(table)
        present = table.masks_of(where)
        for level in SCENARIO_LEVELS:
            expected = str(expected_verdict(model, scenario, level))
            cells = []
            for strategy in strategies:
                mask = Condition(strategy, level)
                tolerance = judged[model, scenario].inlier_tolerance
                said = verdict(table, where, mask, tolerance) if mask in present else NO_MASK
                if said in (BEATS_RANDOM, NOT_BEYOND, NO_REDUCTION, NO_GAP, NO_GAP_ON_AVERAGE):
                    as_expected = (NOT_BEYOND if said == NO_REDUCTION else said) == expected
                    decided[strategy] += 1
                    agreed[strategy] += as_expected
                    cells.append(f"{'yes' if as_expected else '**no**'}: {said}")
                else:
                    cells.append(f"open: {said}")
            rows.append([model, scenario, level_label(level), expected, *cells])
    agreement = [f"{strategy} {agreed[strategy]} of {decided[strategy]}" for strategy in strategies]
    return (
        "What a method that finds the planted bias shows, and what each strategy shows. *Open* is neither: the figures "
        "allow no verdict.\n\n"
        + markdown_table(["model", "scenario", "level", "expected", *strategies], rows)
        + f"\n\nAs expected, of the cells with a verdict: {listed(agreement)}."
    )
