"""What masks do in other scenarios, where they lie, and what they share with one another."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from excise.conditions import RANDOM, Condition, condition_order
from excise.errors import ExciseError
from excise.evaluation.rounding import density_text, interval_text, level_label, per_cent
from excise.evaluation.table import MISSING, Estimate, at_most, read_estimate
from excise.reporting.audit_table import NO_COMPARISON
from excise.reporting.results.frames import PLANTED_SCENARIO, Judged, markdown_table, ordered, tolerances_text

_POOLED = "(others)"


def transfer_section(transfer: pl.DataFrame, judged: Judged) -> str:
    if transfer.is_empty():
        return "No transfer between scenarios was evaluated yet."
    parts = [
        "Reduction beyond random, in percentage points with its interval: rows are the scenario the masks come from, "
        f"columns the one they are judged on, {_POOLED} are all scenarios but that one. On the diagonal stand "
        f"within-context masks. `{NO_COMPARISON}`: inlier ratios of mask and random control are more than "
        f"{tolerances_text(judged)} apart. A dash: no gap detectable, answers that collapsed, or not evaluated."
    ]
    for model in ordered(transfer["model"]):
        of_model = transfer.filter(pl.col("model") == model).with_columns(pl.col("source").fill_null(_POOLED))
        figures: dict[tuple, Estimate] = {}
        for row in of_model.iter_rows(named=True):
            key = (row["strategy"], row["matched_to"], row["source"], row["scenario"], row["metric"])
            if key in figures:
                raise ExciseError(
                    f"results: the transfer of {row['strategy']} from {row['source']} to "
                    f"{row['scenario']} gives {row['metric']} twice"
                )
            figures[key] = read_estimate(row)
        sources, scenarios = (
            sorted(set(of_model[side]), key=lambda key: (key == _POOLED, key != PLANTED_SCENARIO, key))
            for side in ("source", "scenario")
        )
        for strategy in sorted(set(of_model.filter(pl.col("matched_to").is_null())["strategy"])):

            def cell(
                source: str, scenario: str, strategy: str = strategy, figures: Mapping = figures, model: str = model
            ) -> str:
                beyond = figures.get((strategy, None, source, scenario, "reduction_over_random"), MISSING)
                ratios = [
                    figures.get((*mask, source, scenario, "inlier_ratio"), MISSING).value
                    for mask in ((strategy, None), (RANDOM, strategy))
                ]
                tolerance = judged[model, scenario].inlier_tolerance
                known = beyond.value is not None and None not in ratios
                apart = known and not at_most(abs(ratios[0] - ratios[1]), tolerance)
                return per_cent(beyond, signed=True) + (NO_COMPARISON if apart else "")

            of_strategy = of_model.filter((pl.col("strategy") == strategy) & pl.col("matched_to").is_null())
            there = [source for source in sources if source in set(of_strategy["source"])]
            rows = [[source, *(cell(source, scenario) for scenario in scenarios)] for source in there]
            parts += [f"### {model}, {strategy}", markdown_table(["from \\ on", *scenarios], rows)]
    return "\n\n".join(parts)


def localisation_section(localisation: pl.DataFrame) -> str:
    if localisation.is_empty():
        return "No mask was held against a planted change yet."
    parts = [
        "The squared size of the planted change is its energy. The share of it under a mask, of what lies in the "
        "matrices the mask may touch, stands beside the share that random masks of as many weights in each matrix "
        "cover on average, with their standard deviation. Lift is share over chance. Means over all masks of a row; "
        "of heads the energy of their query rows or output columns counts."
    ]
    figures = ("density", "share", "chance", "deviation")
    for model in ordered(localisation["model"]):
        means = (
            localisation.filter(pl.col("model") == model)
            .group_by("strategy", "level", "matched_to")
            .agg(pl.len().alias("masks"), *(pl.col(name).cast(pl.Float64).fill_nan(None).mean() for name in figures))
        )
        rows = []
        for row in means.iter_rows(named=True):
            mask = Condition.of(row)
            density, share, chance, deviation = (Estimate(row[name]) for name in figures)
            lift = share.value / chance.value if share.value is not None and chance.value else None
            rows.append(
                (
                    condition_order(mask),
                    [
                        f"· {mask.strategy}" if mask.is_control else f"**{mask.strategy}**",
                        level_label(mask.level),
                        str(row["masks"]),
                        density_text(density),
                        density_text(share),
                        f"{density_text(chance)} ± {density_text(deviation)}",
                        interval_text(Estimate(lift)),
                    ],
                )
            )
        header = ["mask", "level", "masks", "density", "share of the energy", "chance", "lift"]
        parts += [f"### {model}", markdown_table(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])]
    return "\n\n".join(parts)


def overlap_section(overlap: pl.DataFrame) -> str:
    if overlap.is_empty():
        return "The overlap of masks was not counted yet."
    same_scenario = pl.col("scenario") == pl.col("reference_scenario")
    different = ~(same_scenario & (pl.col("variation") == pl.col("reference_variation")))
    rows = []
    for model in ordered(overlap["model"]):
        means = (
            overlap.filter((pl.col("model") == model) & different)
            .with_columns(pl.col("overlap", "chance").cast(pl.Float64).fill_nan(None))
            .group_by("strategy", "level")
            .agg(
                within=pl.col("overlap").filter(same_scenario).mean(),
                across=pl.col("overlap").filter(~same_scenario).mean(),
                chance=pl.col("chance").mean(),
            )
        )
        ordered_rows = sorted(
            means.iter_rows(named=True), key=lambda row: condition_order(Condition(row["strategy"], row["level"]))
        )
        rows += [
            [
                model,
                row["strategy"],
                level_label(row["level"]),
                *(density_text(Estimate(row[name])) for name in ("within", "across", "chance")),
            ]
            for row in ordered_rows
        ]
    header = ["model", "strategy", "level", "same scenario", "other scenarios", "chance"]
    return (
        "The share of one variation's mask that is also in another's, on average over pairs: both of one scenario, or "
        "of two. Chance is what masks without any relation share.\n\n" + markdown_table(header, rows)
    )
