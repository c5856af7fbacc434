"""The page of results: the warehouse's tables of the planted models as Markdown, beside what is known to be true.

Here frames become words and tables, and a figure becomes a verdict by a stated rule; nothing is estimated here (see
`evaluation`), and one model's audit is told in `audit_table` and `finding`. The claims follow the method, part C: the
reduction of the raw gap beyond the matched random control, at comparable inlier ratio, on models whose bias is known
because it was planted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from excise.conditions import (
    ALL,
    CROSS_CONTEXT,
    LEVELS,
    NO_LEVEL,
    OWN_SCENARIO,
    RANDOM,
    UNPRUNED,
    Condition,
    condition_order,
)
from excise.errors import ExciseError
from excise.evaluation.rounding import (
    FEW,
    density_text,
    floor_text,
    interval_text,
    level_label,
    per_cent,
    percent_text,
    ratio_text,
)
from excise.evaluation.table import MISSING, Estimate, MetricTable, at_most, reaches, read_estimate, read_metrics
from excise.evaluation.thresholds import INLIER_TOLERANCE, Thresholds, stored_thresholds
from excise.reporting.audit_table import COLLAPSED, NO_COMPARISON
from excise.reporting.finding import standing_out, unpruned_gap
from excise.reporting.words import few_names_warning, listed

SCENARIO_LEVELS = LEVELS[:4]
"""Level of strategies that rank whole heads over a scenario."""
PLANTED_SCENARIO = "purchase"
"""The one scenario with a gap in the model `planted-specific`."""
PUBLISHED = (
    "set_difference",
    "set_difference_small",
    "attention_heads",
    "attention_heads_removed",
    "snip",
    "fasp",
    "fairness_only",
    "performance_only",
    "magnitude",
    "gradient",
    "random_heads",
)
"""The papers' strategies, by what stands before a dash and a number."""

BEATS_RANDOM = "beats random"
NOT_BEYOND = "not beyond random"
NO_YARDSTICK = "no yardstick"
NO_REDUCTION = "no reduction"
NO_GAP = "no gap detectable"
NO_GAP_ON_AVERAGE = "no gap on average"
NO_CONTROL = "no random control"
NO_INTERVAL = "no interval"
NO_ANSWERS = "no answers left to compare"
NO_MASK = "no mask"
ANSWERS_COLLAPSED = "answers collapsed"

Judged = Mapping[tuple[str, str], Thresholds]
"""What the audit of a (model, scenario) was judged by."""

_MODELS = ("planted-general", "planted-specific", "planted-neutral")
_POOLED = "(others)"
_COLUMNS = {
    "transfer": ("model", "strategy", "matched_to", "source", "scenario", "level", "metric", "estimate", "low", "high"),
    "grid": (
        "model",
        "scenario",
        "strategy",
        "variation",
        "tau_min",
        "tau_maj",
        "density",
        "metric",
        "estimate",
        "low",
        "high",
        "chosen",
    ),
    "localisation": ("model", "strategy", "level", "matched_to", "density", "share", "chance", "deviation"),
    "overlap": (
        "model",
        "strategy",
        "level",
        "scenario",
        "variation",
        "reference_scenario",
        "reference_variation",
        "overlap",
        "chance",
    ),
}


def results_markdown(
    metrics: pl.DataFrame,
    masks: pl.DataFrame,
    transfer: pl.DataFrame,
    grid: pl.DataFrame,
    localisation: pl.DataFrame,
    overlap: pl.DataFrame,
    thresholds: pl.DataFrame,
    *,
    scenarios: Sequence[str] = (PLANTED_SCENARIO,),
    published: Sequence[str] = PUBLISHED,
) -> str:
    """The whole page as Markdown.

    metrics, masks, transfer, grid, overlap: rows of the tables `metrics`, `masks`, `transfer_matrix`, `grid_search` and
    `mask_overlap`, of one or more models. localisation: one row per mask with model, strategy, level, matched_to and
    the fields of `planted.localisation.EnergyShare`. Any may be empty: its section is then one sentence. `masks` only
    tells heads from weights. thresholds: rows of that table, what each audit and grid search was judged by.
    scenarios: those that get tables of all masks; the first is compared at equal usefulness, at the floor of the inlier
    ratio of its grid search. published: strategies that are not ours.

    Raises ExciseError where a frame lacks a column or gives a figure twice, and where the thresholds of a partition are
    not there.
    """
    for name, frame in (("transfer", transfer), ("grid", grid), ("localisation", localisation), ("overlap", overlap)):
        missing = [column for column in _COLUMNS[name] if column not in frame.columns]
        if missing and not frame.is_empty():
            raise ExciseError(f"results: the frame {name} lacks the column(s) {', '.join(missing)}")
    tables = _metric_tables(metrics, scenarios)
    heads = _strategies_of_heads(masks)
    judged = {
        (model, scenario): stored_thresholds(thresholds, asset="evaluation_metrics", model=model, scenario=scenario)
        for model, scenario in sorted(
            {*tables, *(transfer.select("model", "scenario").rows() if len(transfer) else ())}
        )
    }
    sections = [
        "## What each mask removes\n\n" + _masks_section(tables, heads, judged),
        "## Expected and found\n\n" + _expectation_section(tables, judged),
        "## At equal usefulness\n\n" + _equal_usefulness_section(tables, grid, scenarios[0], thresholds, published),
        "## From one scenario to another\n\n" + _transfer_section(transfer, judged),
        "## Where the masks lie, against where the change was planted\n\n" + _localisation_section(localisation),
        "## What masks share\n\n" + _overlap_section(overlap),
    ]
    return "\n\n".join([_guide(judged, sections, tables), *sections]) + "\n"


def _guide(judged: Judged, sections: Sequence[str], tables: Mapping[tuple[str, str], MetricTable]) -> str:
    """How to read the page: the verdicts by the thresholds the audits were judged by."""
    guide = _GUIDE.format(apart=_apart(judged))
    if any(FEW in section for section in sections):
        names = [each.names for table in tables.values() for each in table.estimates.values() if each.few_names]
        guide += f"\n* {FEW} {few_names_warning(min(names)) if names else 'The interval comes from few names.'}"
    return guide


def _apart(judged: Judged) -> str:
    """The largest difference of comparable inlier ratios, of all audits."""
    tolerances = sorted({each.inlier_tolerance for each in judged.values()} or {INLIER_TOLERANCE})
    return " or ".join(map(floor_text, tolerances)) + (", as the audit was set," if len(tolerances) > 1 else "")


_GUIDE = f"""# Results

This page is made from the warehouse's tables; a later run overwrites it.

## The question

Is the bias of a model one general thing that can be pruned once, or does every context have its own? On an ordinary
model nobody knows the answer, so the methods are first tried where it is known. The planted models are one small chat
model with a change of our own making: `planted-general` answers one group lower in every scenario, through one shared
change; `planted-specific` does so in purchases alone; `planted-neutral` treats the groups alike. A method that can
tell a general bias from a specific one reduces the gap of the first with masks from any context, that of the second
only with masks from purchases, and claims nothing on the third.

## How to read the tables

* *Gap reduction* is the share of the raw gap of mean answers that a mask removes. Over several variations the gaps are
  first divided by the size of the variation's answers, so that cars do not swamp chairs; hence no raw gaps in dollars.
* *Beyond random* is that share less the share which random masks of the same size in every matrix remove, in percentage
  points. Any damage moves a gap: only what goes beyond it speaks for the choice of the weights.
* *SMD* is the standardized mean difference, unpruned and pruned. Noise alone lowers it.
* *Inlier ratio* is the share of answers in the unpruned model's usual range, of the mask and of its random control.
* Brackets hold 95 % intervals from resampled names. Levels: *prompt-specific* masks come from the variation they are
  judged on, *within-context* masks from all other variations of the scenario, *cross-context* masks from all other
  scenarios, *all-contexts* masks from all scenarios, the judged one among them (ours).
* Verdicts: *{BEATS_RANDOM}*: the interval beyond random lies above 0, the gap is reduced, and the inlier ratios of mask
  and control are at most {{apart}} apart. *{NO_YARDSTICK}*: they are further apart, so the two are different kinds of
  damage. *{NOT_BEYOND}*: the interval reaches 0 or lies below it; an effect was not shown, which does not prove that
  there is none. *{NO_REDUCTION}*: the mask widens the gap, if less than random ones do. *{NO_GAP}*: the interval of the
  unpruned gap covers 0, which does not prove that there is none. *{NO_GAP_ON_AVERAGE}*: it covers 0, but single
  variations have a gap. *{ANSWERS_COLLAPSED}*: under the mask a group answers (nearly) always the same."""


# ------------------------------------------------------------------------------------------------------------ verdicts


def verdict(table: MetricTable, where: str, mask: Condition, tolerance: float = INLIER_TOLERANCE) -> str:
    """What the figures of a mask allow to say, in the words of the reading guide (method, part C).

    where: a variation, or "(all)". tolerance: the setting `inlier_tolerance` of the audit. Every reduction is undefined
    where no gap is detectable; where only this mask's is, too few of its answers parsed or they are all the same.
    """
    if table.collapsed(where, mask):
        return ANSWERS_COLLAPSED
    reduction, beyond = (table.get(where, mask, metric) for metric in ("gap_reduction", "reduction_over_random"))
    if reduction.value is None:
        if not unpruned_gap(table, where)[1].has_interval:
            return NO_INTERVAL
        others = [each for each in table.masks if not table.collapsed(where, each)]
        unanswered = table.has(where, mask, "gap_mean") and table.get(where, mask, "gap_mean").value is None
        if unanswered or any(table.get(where, each, "gap_reduction").value is not None for each in others):
            return NO_ANSWERS
        return NO_GAP_ON_AVERAGE if where == ALL and standing_out(table) else NO_GAP
    if table.collapsed(where, mask.control):
        return NO_YARDSTICK
    if beyond.value is None:
        return NO_CONTROL
    if not table.comparable(where, mask, tolerance):
        return NO_YARDSTICK
    if not beyond.has_interval:
        return NO_INTERVAL
    if beyond.low <= 0:
        return NOT_BEYOND
    return BEATS_RANDOM if reduction.value > 0 else NO_REDUCTION


def expected_verdict(model: str, scenario: str, level: str) -> str | None:
    """What a method that finds the planted bias shows; None for a model without a known truth."""
    if model == "planted-neutral" or (model == "planted-specific" and scenario != PLANTED_SCENARIO):
        return NO_GAP
    if model == "planted-specific":
        return NOT_BEYOND if level == CROSS_CONTEXT else BEATS_RANDOM
    return BEATS_RANDOM if model == "planted-general" else None


# ------------------------------------------------------------------------------------------------------------ sections


def _masks_section(tables: Mapping[tuple[str, str], MetricTable], heads: set[tuple[str, str]], judged: Judged) -> str:
    if not tables:
        return "No masks were evaluated yet."
    parts = []
    for (model, scenario), table in tables.items():
        where = _where(table)
        before = {metric: table.get(where, UNPRUNED, metric) for metric in ("smd", "inlier_ratio", "gap_mean")}
        one = len(table.variations) == 1
        scope = table.variations[0] if one else f"all {len(table.variations)} variations"
        unpruned = f"Unpruned, {scope}: SMD {interval_text(before['smd'], decimals=2)}"
        if one:
            unpruned += f", raw gap {interval_text(before['gap_mean'])}"
        unpruned += f", inlier ratio {_ratio(before['inlier_ratio'])}."
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
            told = "" if is_random else verdict(table, where, mask, judged[model, scenario].inlier_tolerance)
            collapsed = bool(table.collapsed(where, mask))
            control = "" if is_random else f", {_ratio(table.get(where, mask.control, 'inlier_ratio'))}"
            rows.append(
                [
                    f"· {mask.strategy}" if mask.is_control else f"**{mask.strategy}**",
                    level_label(mask.level),
                    density,
                    *([gap] if one else []),
                    COLLAPSED if collapsed else per_cent(of("gap_reduction")),
                    "-" if collapsed else per_cent(of("reduction_over_random"), signed=True),
                    " → ".join(interval_text(each, decimals=2) for each in (Estimate(before["smd"].value), of("smd"))),
                    _ratio(of("inlier_ratio")) + control,
                    told,
                ]
            )
        parts += [
            f"### {model}, {scenario}",
            unpruned,
            _markdown(header, rows) if rows else "No masks were evaluated yet.",
        ]
    if any(mask.level not in (*SCENARIO_LEVELS, NO_LEVEL) for table in tables.values() for mask in table.masks):
        parts.append("Masks that come from one other scenario alone stand under *From one scenario to another*.")
    return "\n\n".join(parts)


def _expectation_section(tables: Mapping[tuple[str, str], MetricTable], judged: Judged) -> str:
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
        where = _where(table)
        present = table.masks_of(where)
        for level in SCENARIO_LEVELS:
            expected = expected_verdict(model, scenario, level)
            cells = []
            for strategy in strategies:
                mask = Condition(strategy, level)
                tolerance = judged[model, scenario].inlier_tolerance
                found = verdict(table, where, mask, tolerance) if mask in present else NO_MASK
                if found in (BEATS_RANDOM, NOT_BEYOND, NO_REDUCTION, NO_GAP, NO_GAP_ON_AVERAGE):
                    as_expected = (NOT_BEYOND if found == NO_REDUCTION else found) == expected
                    decided[strategy] += 1
                    agreed[strategy] += as_expected
                    cells.append(f"{'yes' if as_expected else '**no**'}: {found}")
                else:
                    cells.append(f"open: {found}")
            rows.append([model, scenario, level_label(level), expected, *cells])
    told = [f"{strategy} {agreed[strategy]} of {decided[strategy]}" for strategy in strategies]
    return (
        "What a method that finds the planted bias shows, and what each strategy shows. *Open* is neither: the figures "
        "allow no verdict.\n\n"
        + _markdown(["model", "scenario", "level", "expected", *strategies], rows)
        + f"\n\nAs expected, of the cells with a verdict: {listed(told)}."
    )


def _equal_usefulness_section(
    tables: Mapping[tuple[str, str], MetricTable],
    grid: pl.DataFrame,
    scenario: str,
    thresholds: pl.DataFrame,
    published: Sequence[str],
) -> str:
    if not grid.is_empty():
        grid = grid.filter(pl.col("scenario") == scenario)
    if grid.is_empty():
        return "No grid search was run yet, so strategies cannot be compared at equal usefulness."
    parts = [
        f"Masks in {scenario} at the floor of the inlier ratio or above it: for a strategy with two thresholds the "
        "point of its grid with the smallest raw gap (prompt-specific masks), for all strategies their masks as "
        "configured, of every level. A point of a grid is picked by the very answers it is judged on, which flatters "
        "it."
    ]
    for model in _ordered(grid["model"]):
        floor = stored_thresholds(thresholds, asset="grid_search", model=model, scenario=scenario).inlier_floor
        parts += [f"### {model}", f"Floor of the inlier ratio: {floor_text(floor)}."]
        collapsed = []
        found, short = _grid_rows(grid.filter(pl.col("model") == model), floor)
        table = tables.get((model, scenario))
        for mask in table.masks if table else ():
            where = _where(table)
            if mask == UNPRUNED or mask.is_control or mask.level not in (*SCENARIO_LEVELS, OWN_SCENARIO):
                continue
            ratio, reduction, smd, density = (
                table.get(where, mask, metric) for metric in ("inlier_ratio", "gap_reduction", "smd", "density")
            )
            if table.collapsed(where, mask):
                collapsed.append(f"{mask.strategy} {level_label(mask.level)}")
            elif not reaches(ratio.value, floor):
                short.append(f"{mask.strategy} {level_label(mask.level)} ({_ratio(ratio)})")
            else:
                kind = f"{level_label(mask.level)}, as configured"
                found.append((mask.strategy, kind, len(table.variations), density, reduction, smd, ratio))
        found.sort(key=lambda row: -math.inf if row[4].value is None else row[4].value, reverse=True)
        if found:
            header = ["strategy", "", "mask", "variations", "density", "gap reduction, %", "SMD", "inlier ratio"]
            rows = [
                [
                    strategy,
                    "published" if strategy.partition("-")[0] in published else "ours",
                    thresholds,
                    str(count),
                    density_text(density),
                    per_cent(reduction),
                    interval_text(smd, decimals=2),
                    _ratio(ratio),
                ]
                for strategy, thresholds, count, density, reduction, smd, ratio in found
            ]
            parts.append(_markdown(header, rows))
        parts.append(_compared(found, floor, published))
        if short:
            parts.append(f"Below the floor: {listed(short)}.")
        if collapsed:
            parts.append(f"Answers of a group collapse to one number, which is damage: {listed(collapsed)}.")
    return "\n\n".join(parts)


def _grid_rows(grid: pl.DataFrame, floor: float) -> tuple[list[tuple], list[str]]:
    """One model's chosen points as (strategy, mask, variations, density, reduction, SMD, ratio), and the rest."""
    found, short = [], []
    for strategy in grid["strategy"].unique().sort():
        own = grid.filter(pl.col("strategy") == strategy)
        variations = [key for key in own["variation"].unique(maintain_order=True) if key != ALL]
        if ALL in own["variation"]:
            own = own.filter(pl.col("variation") == ALL)
        elif len(variations) > 1:
            raise ExciseError(f"results: the grid of {strategy} has no rows over all variations; run it again")
        chosen = own.filter(pl.col("chosen"))
        if chosen.is_empty():
            best = own.filter(pl.col("metric") == "inlier_ratio")["estimate"].max()
            if reaches(best, floor):
                short.append(f"{strategy} at no point, as no gap was detectable to choose by or answers collapsed")
            else:
                short.append(f"{strategy} at every point of its grid (at most {_ratio(Estimate(best))})")
            continue
        first = chosen.row(0, named=True)
        if chosen.select("tau_min", "tau_maj").n_unique() > 1:
            raise ExciseError(f"results: the grid of {strategy} has more than one chosen point; run it again")
        figures = {row["metric"]: read_estimate(row) for row in chosen.iter_rows(named=True)}
        found.append(
            (
                strategy,
                f"thresholds {first['tau_min']:g} / {first['tau_maj']:g}",
                len(variations),
                Estimate(first["density"]),
                *(figures.get(metric, MISSING) for metric in ("gap_reduction", "smd", "inlier_ratio")),
            )
        )
    return found, short


def _compared(found: list[tuple], floor: float, published: Sequence[str]) -> str:
    known = [row for row in found if row[4].value is not None]
    of = {True: [], False: []}
    for row in known:
        of[row[0].partition("-")[0] in published].append(row)
    best = {side: next(iter(rows), None) for side, rows in of.items()}
    told = {side: row and f"{row[0]} ({row[1]}), {_removes(row[4])}" for side, row in best.items()}
    if best[True] is None and best[False] is None:
        return f"At inlier ratio {floor_text(floor)} or more there is nothing to compare."
    if best[True] is None:
        return f"The best of ours, {told[False]}; of the published strategies there is no figure at this usefulness."
    if best[False] is None:
        return f"The best published one, {told[True]}; of ours there is no figure at this usefulness."
    first, second = best[False][4], best[True][4]
    ahead = 100 * (first.value - second.value)
    side = "more" if ahead >= 0 else "less"
    if not (first.has_interval and second.has_interval):
        doubt = ", without an interval"
    else:
        doubt = ", though their intervals overlap" if first.low <= second.high and second.low <= first.high else ""
    return (
        f"The best of ours, {told[False]}; the best published one, {told[True]}: ours removes {abs(ahead):.0f} "
        f"percentage points {side}{doubt}."
    )


def _removes(reduction: Estimate) -> str:
    if reduction.value <= 0:
        return f"does not reduce the raw gap ({percent_text(reduction)})"
    return f"removes {percent_text(reduction)} of the raw gap"


def _transfer_section(transfer: pl.DataFrame, judged: Judged) -> str:
    if transfer.is_empty():
        return "No transfer between scenarios was evaluated yet."
    parts = [
        "Reduction beyond random, in percentage points with its interval: rows are the scenario the masks come from, "
        f"columns the one they are judged on, {_POOLED} are all scenarios but that one. On the diagonal stand "
        f"within-context masks. `{NO_COMPARISON}`: inlier ratios of mask and random control are more than "
        f"{_apart(judged)} apart. A dash: no gap detectable, answers that collapsed, or not evaluated."
    ]
    for model in _ordered(transfer["model"]):
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

            own = of_model.filter((pl.col("strategy") == strategy) & pl.col("matched_to").is_null())
            there = [source for source in sources if source in set(own["source"])]
            rows = [[source, *(cell(source, scenario) for scenario in scenarios)] for source in there]
            parts += [f"### {model}, {strategy}", _markdown(["from \\ on", *scenarios], rows)]
    return "\n\n".join(parts)


def _localisation_section(localisation: pl.DataFrame) -> str:
    if localisation.is_empty():
        return "No mask was held against a planted change yet."
    parts = [
        "The squared size of the planted change is its energy. The share of it under a mask, of what lies in the "
        "matrices the mask may touch, stands beside the share that random masks of as many weights in each matrix "
        "cover on average, with their standard deviation. Lift is share over chance. Means over all masks of a row; "
        "of heads the energy of their query rows or output columns counts."
    ]
    figures = ("density", "share", "chance", "deviation")
    for model in _ordered(localisation["model"]):
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
        parts += [f"### {model}", _markdown(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])]
    return "\n\n".join(parts)


def _overlap_section(overlap: pl.DataFrame) -> str:
    if overlap.is_empty():
        return "The overlap of masks was not counted yet."
    same_scenario = pl.col("scenario") == pl.col("reference_scenario")
    different = ~(same_scenario & (pl.col("variation") == pl.col("reference_variation")))
    rows = []
    for model in _ordered(overlap["model"]):
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
        found = sorted(
            means.iter_rows(named=True), key=lambda row: condition_order(Condition(row["strategy"], row["level"]))
        )
        rows += [
            [
                model,
                row["strategy"],
                level_label(row["level"]),
                *(density_text(Estimate(row[name])) for name in ("within", "across", "chance")),
            ]
            for row in found
        ]
    header = ["model", "strategy", "level", "same scenario", "other scenarios", "chance"]
    return (
        "The share of one variation's mask that is also in another's, on average over pairs: both of one scenario, or "
        "of two. Chance is what masks without any relation share.\n\n" + _markdown(header, rows)
    )


# -------------------------------------------------------------------------------------------------- frames and formats


def _metric_tables(metrics: pl.DataFrame, scenarios: Sequence[str]) -> dict[tuple[str, str], MetricTable]:
    """The metrics by model and scenario, in the page's order."""
    if not scenarios:
        raise ExciseError("results: scenarios is empty; name one at least")
    if metrics.is_empty():
        return {}
    tables = {}
    for model in _ordered(metrics["model"]):
        for scenario in scenarios:
            own = metrics.filter((pl.col("model") == model) & (pl.col("scenario") == scenario))
            if not own.is_empty():
                tables[model, scenario] = read_metrics(own)
    return tables


def _strategies_of_heads(masks: pl.DataFrame) -> set[tuple[str, str]]:
    """(model, strategy) of the strategies that prune heads."""
    if masks.is_empty():
        return set()
    of_heads = masks.filter(pl.col("role").str.starts_with("head_") & pl.col("matched_to").is_null())
    return set(of_heads.select("model", "strategy").unique().iter_rows())


def _where(table: MetricTable) -> str:
    if len(table.variations) == 1:
        return table.variations[0]
    if not table.has_aggregate:
        raise ExciseError(f"results: the metrics of {table.model}, {table.scenario} hold nothing over all variations")
    return ALL


def _ordered(models: Iterable[str]) -> list[str]:
    """The planted models first."""
    return sorted(set(models), key=lambda model: (_MODELS.index(model) if model in _MODELS else len(_MODELS), model))


def _ratio(estimate: Estimate) -> str:
    return ratio_text(estimate.value)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
