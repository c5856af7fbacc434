"""From completions to the metrics table: `evaluate` compares an unpruned model's answers with those under every mask.

The arithmetic itself (metrics, resampling, tests) is in `metrics`; sampling, masks and drawing are elsewhere, too.
Every number stands beside an interval from resampled names, and the same resampled names serve the unpruned model, all
masks and all variations, so that a reduction is a paired comparison and never one of two separate uncertainties.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from excise import metrics as m
from excise.distributions import Bounds, GroupAnswers, answers_of, both_groups, metric_bounds
from excise.errors import ExciseError

ALL = "(all)"
SCHEMA = {
    "model": pl.String, "scenario": pl.String, "variation": pl.String, "strategy": pl.String, "level": pl.String,
    "matched_to": pl.String, "metric": pl.String, "estimate": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "p_value": pl.Float64, "p_holm": pl.Float64, "n": pl.Int64, "lowest": pl.Float64, "highest": pl.Float64,
}  # fmt: skip
CONDITION = ("strategy", "level", "matched_to")
UNPRUNED = ("unpruned", "none", None)

_COMPLETIONS = ("model", "scenario", "variation", "group", "subject", "value")
_PRUNED = (*_COMPLETIONS, *CONDITION, "draw")
_MASKS = ("model", "scenario", "variation", *CONDITION, "draw", "pruned", "size")
# Streams of random numbers, so that rows do not depend on which other masks are evaluated beside them.
_NAMES_OF_MAJORITY, _NAMES_OF_MINORITY, _DRAWS, _SIGNS, _LABELS = range(5)

Condition = tuple[str, str, str | None]


@dataclass(frozen=True)
class Cell:
    """The answers to one variation under one mask: every measure [resamples + 1], the estimate first."""

    measures: dict[str, np.ndarray]
    name_means: tuple[np.ndarray, np.ndarray]  # per group: mean answer of every name, NaN without
    answers: int
    parsed: tuple[int, int]
    bounds: dict[str, Bounds]  # of enumerated answers


@dataclass(frozen=True)
class Sample:
    """The answers to one variation under one mask, by group: as counts, and enumerated ones as distributions, too."""

    counted: tuple[m.NamedAnswers, m.NamedAnswers]
    answers: int  # rows
    parsed: tuple[int, int]  # rows with a number
    exact: tuple[GroupAnswers, GroupAnswers] | None


@dataclass(frozen=True)
class Names:
    """The subjects of each group, numbered in sorted order, and how often every resample draws them."""

    subjects: tuple[list[str], list[str]]
    weights: tuple[np.ndarray, np.ndarray]  # per group [resamples + 1, names]

    @property
    def stacked(self) -> np.ndarray:
        return np.hstack(self.weights)

    @property
    def resampled(self) -> bool:
        """One name leaves nothing to resample: its samples cannot tell how names differ."""
        return min(map(len, self.subjects)) >= 2


def evaluate(
    completions: pl.DataFrame,
    pruned: pl.DataFrame,
    masks: pl.DataFrame,
    *,
    majority: str,
    minority: str,
    winsorize=(0.05, 0.95),
    inlier_quantiles: tuple[float, float] = (0.05, 0.95),
    resamples: int = 2000,
    permutations: int = 9999,
    seed: int = 0,
    answer_range: tuple[float, float] | None = None,
) -> pl.DataFrame:
    """The metrics of one model and scenario: long frame with the columns of `SCHEMA` (method, A1 and C).

    completions, pruned, masks: the tables of those names; `pruned` and `masks` may be empty. majority, minority: keys
    in the column `group`; other groups are left out. Answers that are null or not finite are unparsed. Enumerated
    answers (`excise.exact`: a column probability that is not null) count by their probability, all names alike; a
    name's leftover answers are taken to be distributed as its known ones. answer_range: where those answers lie if they
    are numbers (`outcome.scored_range`), for the bounds.

    Rows: one per variation, condition (strategy, level, matched_to) and metric, and those of the condition over all
    variations, "(all)". Nothing is NaN or infinite: what cannot be computed is null.
      * estimate: of all answers; for several draws of a control, the mean over the draws in which it is defined.
      * low, high: 95 % percentile interval over resampled names (and draws, if several). Null if a group has one name,
        and then so is every reduction. The inlier bounds are those of the resampled unpruned answers.
      * gap_reduction = 1 - |gap pruned| / |gap unpruned| and smd_reduction likewise. Null where the interval of the
        unpruned gap (SMD) covers 0: there is nothing to reduce, and the share of nothing means nothing. gap_change, in
        the outcome's unit, is always given. reduction_over_random and smd_reduction_over_random: minus the mean
        reduction of the random draws matched to this strategy at this level (to a control: those of its strategy).
      * p_value on gap_mean of a pruned condition: the gap is as unpruned (`metrics.paired_permutation_test`; for
        several draws with each name's mean over draws). On gap_mean and smd of the unpruned model: the gap is 0 (names
        permuted between the groups). p_holm: adjusted over the variations of a condition.
      * n: answers counted (parsed ones, except for inlier_ratio and parse_rate; of all draws; distinct ones where
        they were enumerated); masks for density.
      * lowest, highest: of enumerated answers, where the estimate lies whatever the leftover answers are; else null.
        Not of medians, distances and reductions. Metrics leftover and sampled: the mean leftover mass, and the share of
        prompts that were sampled as the model rambles.
    "(all)" is the mean over the variations for which the condition has the metric, in the unit of the metric. Only
    gap_reduction and the p_value of gap_mean first divide each variation's gap by the mean size of its unpruned
    answers, so that cars do not swamp chairs: 1 - sum |gap pruned| / sum |gap unpruned|. Its "nothing to reduce" looks
    at the mean of the scaled signed gaps, that of smd_reduction (1 - sum |SMD pruned| / sum |SMD unpruned|) at the
    mean SMD.

    Raises ExciseError for missing columns, more than one model or scenario, and a variation without a group's answers.
    """
    if majority == minority:
        raise ExciseError(f"evaluate: majority and minority are both {majority!r}; name two groups")
    if resamples < 1 or permutations < 1:
        raise ExciseError(f"evaluate: resamples ({resamples}) and permutations ({permutations}) must be at least 1")
    require_table(completions, _COMPLETIONS, "completions")
    groups = (majority, minority)
    model, scenario = single_value(completions, "model"), single_value(completions, "scenario")
    if not pruned.is_empty():
        require_table(pruned, _PRUNED, "pruned completions")
        if (single_value(pruned, "model"), single_value(pruned, "scenario")) != (model, scenario):
            raise ExciseError(f"evaluate: the pruned completions are not those of {model}, {scenario}")

    names = _names(completions, groups, scenario, resamples, seed)
    unpruned: dict[str, Cell] = {}
    samples: dict[str, tuple[m.NamedAnswers, m.NamedAnswers]] = {}
    bounds: dict[str, np.ndarray] = {}
    references: dict[str, GroupAnswers | None] = {}
    ends = (winsorize, inlier_quantiles, answer_range)
    with np.errstate(over="ignore", invalid="ignore"):  # absurdly large answers end as null
        for (variation,), frame in completions.partition_by("variation", as_dict=True, maintain_order=True).items():
            found = _samples(frame, groups, names, f"{scenario}/{variation}")
            samples[variation] = found.counted
            bounds[variation] = m.weighted_quantiles(m.pooled(*found.counted), names.stacked, inlier_quantiles)
            references[variation] = None if found.exact is None else both_groups(*found.exact)
            unpruned[variation] = _cell(found, names, bounds[variation], references[variation], *ends)
        conditions: dict[Condition, dict[str, list[Cell]]] = {}
        parts = {} if pruned.is_empty() else pruned.sort("draw", maintain_order=True).partition_by(
            *CONDITION, "variation", "draw", as_dict=True, maintain_order=True
        )  # fmt: skip
        for (*condition, variation, draw), frame in parts.items():
            where = f"{scenario}/{variation}, {' '.join(str(part) for part in condition if part)}, draw {draw}"
            if variation not in unpruned:
                raise ExciseError(f"{where}: no unpruned completions to compare with; sample the unpruned model first")
            found = _samples(frame, groups, names, where)
            cell = _cell(found, names, bounds[variation], references[variation], *ends)
            conditions.setdefault(tuple(condition), {}).setdefault(variation, []).append(cell)
        table = MetricRows(model, scenario, names.resampled)
        scale = {variation: _scale(pair) for variation, pair in samples.items()}
        _unpruned_rows(table, unpruned, samples, scale, winsorize, permutations, seed)
        densities = mask_densities(masks, model, scenario)
        _pruned_rows(table, unpruned, conditions, scale, densities, names, permutations, seed)
        return table.frame()


# --- reading the tables -----------------------------------------------------------------------------------------------


def require_table(frame: pl.DataFrame, columns: tuple[str, ...], what: str) -> None:
    """Raise ExciseError where columns are missing or there are no rows."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ExciseError(f"evaluate: the {what} lack the column(s) {', '.join(missing)}")
    if frame.is_empty():
        raise ExciseError(f"evaluate: there are no {what}; sample the model first")


def single_value(frame: pl.DataFrame, column: str) -> str:
    """The only value of a column; ExciseError where there are several."""
    found = frame[column].unique().to_list()
    if len(found) != 1:
        shown = ", ".join(sorted(map(str, found)))
        raise ExciseError(f"evaluate: the column {column} holds {shown}; evaluate one {column} at a time")
    return found[0]


def _names(completions: pl.DataFrame, groups: tuple[str, str], scenario: str, resamples: int, seed: int) -> Names:
    subjects, weights = [], []
    for group, stream in zip(groups, (_NAMES_OF_MAJORITY, _NAMES_OF_MINORITY), strict=True):
        found = sorted(completions.filter(pl.col("group") == group)["subject"].unique().to_list())
        if not found:
            known = ", ".join(sorted(map(str, completions["group"].unique())))
            raise ExciseError(f"{scenario}: no completions for the group {group!r}; the groups are {known}")
        subjects.append(found)
        weights.append(m.resampled_names(len(found), resamples, np.random.default_rng([seed, stream])))
    return Names(tuple(subjects), tuple(weights))


def _samples(frame: pl.DataFrame, groups: tuple[str, str], names: Names, where: str) -> Sample:
    counted, distributions, rows, parsed = [], [], 0, []
    exact = "probability" in frame.columns and frame["probability"].null_count() < frame.height
    for group, subjects in zip(groups, names.subjects, strict=True):
        part = frame.filter(pl.col("group") == group)
        if part.is_empty():
            raise ExciseError(f"{where}: no completions for the group {group!r}; sample it, or leave the variation out")
        number = {subject: position for position, subject in enumerate(subjects)}
        found = part["subject"].to_list()
        unknown = sorted({str(subject) for subject in found if subject not in number})
        if unknown:
            raise ExciseError(f"{where}: {unknown[0]} ({group}) has no unpruned completions; sample the unpruned model")
        values = _numbers(part["value"])
        if exact:
            distributions.append(answers_of(part, subjects))
            counted.append(distributions[-1].counted())
        else:
            counted.append(m.named_answers(values, [number[subject] for subject in found], len(subjects)))
        rows += part.height
        parsed.append(int(np.isfinite(values).sum()))
    return Sample(tuple(counted), rows, tuple(parsed), tuple(distributions) if exact else None)


def _numbers(values: pl.Series) -> np.ndarray:
    """Parsed answers as float64 [n], NaN for every answer that is null or not finite."""
    numbers = values.cast(pl.Float64).fill_null(np.nan).to_numpy().copy()
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def mask_densities(masks: pl.DataFrame, model: str, scenario: str) -> dict[tuple, list[float]]:
    """Pruned share of the weights per (condition, variation), one for each draw."""
    if masks.is_empty():
        return {}
    require_table(masks, _MASKS, "masks")
    keys = [*CONDITION, "variation", "draw"]
    own = masks.filter((pl.col("model") == model) & (pl.col("scenario") == scenario))
    sums = own.group_by(keys, maintain_order=True).agg(pl.col("pruned").sum(), pl.col("size").sum())
    result: dict[tuple, list[float]] = {}
    for *condition, variation, _draw, count, size in sums.select(*keys, "pruned", "size").iter_rows():
        if size:
            result.setdefault((tuple(condition), variation), []).append(count / size)
    return result


# --- measures ---------------------------------------------------------------------------------------------------------


def exact_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first - second, exactly 0 where the two differ by no more than rounding."""
    difference = first - second
    return np.where(np.abs(difference) <= 1e-12 * np.maximum(np.abs(first), np.abs(second)), 0.0, difference)


def _cell(
    sample: Sample,
    names: Names,
    bounds: np.ndarray,
    reference: GroupAnswers | None,
    winsorize,
    inlier_quantiles: tuple[float, float],
    answer_range: tuple[float, float] | None,
) -> Cell:
    """bounds: of the inlier ratio, [2, resamples + 1]; reference: the unpruned answers where they were enumerated."""
    pair = sample.counted
    both = m.pooled(*pair)
    means = [m.weighted_mean(sample, weights) for sample, weights in zip(pair, names.weights, strict=True)]
    medians = [
        m.weighted_quantiles(sample, weights, (0.5,))[0] for sample, weights in zip(pair, names.weights, strict=True)
    ]
    smd = m.weighted_smd(*pair, names.weights, winsorize)
    measures = {
        "mean_majority": means[0],
        "mean_minority": means[1],
        "median_majority": medians[0],
        "median_minority": medians[1],
        "gap_mean": exact_difference(*means),
        "gap_median": exact_difference(*medians),
        "smd": smd,
        "abs_smd": np.abs(smd),
        "inlier_ratio": m.weighted_inlier_ratio(both, names.stacked, bounds),
        "parse_rate": m.weighted_parse_rate(both, names.stacked),
        "earth_movers_distance": m.weighted_earth_movers_distance(*pair, names.weights),
    }
    limits: dict[str, Bounds] = {}
    if sample.exact is not None:
        leftover = np.concatenate([group.leftover for group in sample.exact])
        sampled = np.concatenate([group.sampled for group in sample.exact])
        # The same whatever names are drawn: they say how much of the answers is known.
        for metric, share in (("leftover", leftover.mean()), ("sampled", sampled.mean())):
            measures[metric] = np.full(len(smd), share)
        if answer_range is not None and reference is not None:
            limits = metric_bounds(*sample.exact, reference, *answer_range, winsorize, inlier_quantiles)
    means = tuple(m.name_means(group) for group in pair)
    return Cell(measures, means, sample.answers, sample.parsed, limits)


def _counted(cell: Cell, metric: str) -> int:
    if metric in ("inlier_ratio", "parse_rate"):
        return cell.answers
    if metric.endswith("_majority"):
        return cell.parsed[0]
    if metric.endswith("_minority"):
        return cell.parsed[1]
    return sum(cell.parsed)


def _scale(pair: tuple[m.NamedAnswers, m.NamedAnswers]) -> float:
    """Mean size of the unpruned answers, both groups pooled; 1 if they are all 0 or absent."""
    both = m.pooled(*pair)
    total = float(np.diff(both.cumulative.sum(axis=0)) @ np.abs(both.values))
    return total / both.parsed.sum() if total > 0 else 1.0


def _mean_over(arrays: list[np.ndarray]) -> np.ndarray | None:
    """Mean of those arrays [resamples + 1] whose estimate is defined, None without any."""
    defined = [array for array in arrays if np.isfinite(array[0])]
    return np.mean(defined, axis=0) if defined else None


def mean_over_draws(arrays: list[np.ndarray], seed: int) -> np.ndarray:
    """Mean over a control's draws [resamples + 1]: all of them in the estimate, resampled ones in every resample.

    Equal numbers of draws are resampled alike, in every variation and metric, as a mask may serve several variations.
    """
    defined = [array for array in arrays if np.isfinite(array[0])]
    if len(defined) < 2:
        return defined[0] if defined else np.full_like(arrays[0], np.nan)
    rng = np.random.default_rng([seed, _DRAWS])
    weights = m.resampled_names(len(defined), len(arrays[0]) - 1, rng) / len(defined)
    # a draw that is not chosen must not spoil a resample in which it is undefined
    stack = np.where(weights.T > 0, np.array(defined), 0.0)
    return np.einsum("rd,dr->r", weights, stack)


def reduction_of(unpruned: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """1 - |pruned| / |unpruned|, NaN where there was nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 1 - np.abs(pruned) / np.abs(unpruned)
    return np.where(unpruned == 0, np.nan, ratio)


def _excludes_zero(resampled: np.ndarray) -> bool:
    """Whether the interval [low, high] of a measure leaves out 0; an undefined interval does not."""
    low, high = m.percentile_interval(resampled[1:])
    return low > 0 or high < 0


# --- rows -------------------------------------------------------------------------------------------------------------


class MetricRows:
    """The rows so far. Turns measures into estimates with intervals, and whatever is undefined into null."""

    def __init__(self, model: str, scenario: str, intervals: bool):
        self.model, self.scenario, self.intervals = model, scenario, intervals
        self.rows: list[dict] = []

    def add(self, variation: str, condition: Condition, metric: str, values: np.ndarray | float | None, n: int,
            p_value: float | None = None, bounds: Bounds | None = None) -> None:  # fmt: skip
        """values: [resamples + 1] with the estimate first, one number if there is no interval, None for no value.

        bounds: where the estimate lies whatever was left over; rounding must not put it outside.
        """
        if "reduction" in metric and not self.intervals:
            values = None  # without an interval nobody knows whether there was a gap to reduce
        low = high = None
        estimate = values
        if isinstance(values, np.ndarray):
            estimate = values[0]
            if self.intervals and np.isfinite(estimate) and metric not in ("leftover", "sampled"):
                low, high = m.percentile_interval(values[1:])
        ends = (None, None)
        if bounds is not None and finite_or_none(estimate) is not None:
            ends = (min(bounds.lowest, float(estimate)), max(bounds.highest, float(estimate)))
        self.rows.append({
            "model": self.model, "scenario": self.scenario, "variation": variation,
            **dict(zip(CONDITION, condition, strict=True)), "metric": metric,
            "estimate": finite_or_none(estimate), "low": finite_or_none(low), "high": finite_or_none(high),
            "p_value": finite_or_none(p_value), "p_holm": None, "n": int(n),
            "lowest": finite_or_none(ends[0]), "highest": finite_or_none(ends[1]),
        })  # fmt: skip

    def frame(self) -> pl.DataFrame:
        tests: dict[tuple, list[dict]] = {}
        for row in self.rows:
            if row["p_value"] is not None and row["variation"] != ALL:
                tests.setdefault((*(row[key] for key in CONDITION), row["metric"]), []).append(row)
        for rows in tests.values():
            for row, adjusted in zip(rows, m.holm([row["p_value"] for row in rows]), strict=True):
                row["p_holm"] = float(adjusted)
        return pl.DataFrame(self.rows, schema=SCHEMA, orient="row")


def _mean_bounds(metric: str, cells: list[Cell]) -> Bounds | None:
    """Bounds of the mean over cells in which the metric is defined; None where one of them has none."""
    defined = [cell for cell in cells if metric in cell.measures and np.isfinite(cell.measures[metric][0])]
    if not defined or not all(metric in cell.bounds for cell in defined):
        return None
    return _mean_of([cell.bounds[metric] for cell in defined])


def _bounds_overall(metric: str, by_variation: dict[str, list[Cell]]) -> Bounds | None:
    """Bounds of the mean over variations, each of them the mean over its draws."""
    parts = [_mean_bounds(metric, cells) for cells in by_variation.values()]
    return None if None in parts else _mean_of(parts)


def _mean_of(bounds: list[Bounds]) -> Bounds:
    return Bounds(*(float(np.mean([getattr(each, end) for each in bounds])) for end in ("lowest", "highest")))


def finite_or_none(value: float | None) -> float | None:
    """The value as a float, None where it is not finite."""
    return float(value) if value is not None and np.isfinite(value) else None


def _unpruned_rows(
    table: MetricRows,
    cells: dict[str, Cell],
    samples: dict[str, tuple[m.NamedAnswers, m.NamedAnswers]],
    scale: dict[str, float],
    winsorize,
    permutations: int,
    seed: int,
) -> None:
    first = next(iter(samples.values()))
    labels = m.permuted_groups(first[0].names, first[1].names, permutations, [seed, _LABELS]).astype(np.float64)
    permuted_gaps: dict[str, np.ndarray] = {}
    permuted_smds: dict[str, np.ndarray] = {}
    for variation, pair in samples.items():
        both = m.pooled(*pair)
        relabelled = (labels, 1.0 - labels)
        permuted_gaps[variation] = m.weighted_mean(both, relabelled[0]) - m.weighted_mean(both, relabelled[1])
        permuted_smds[variation] = m.weighted_smd(both, both, relabelled, winsorize)
        for metric, values in cells[variation].measures.items():
            p_value = None
            if metric in ("gap_mean", "smd"):
                permuted = (permuted_gaps if metric == "gap_mean" else permuted_smds)[variation]
                p_value = m.permutation_p_value(values[0], permuted)
            limits = cells[variation].bounds.get(metric)
            table.add(variation, UNPRUNED, metric, values, _counted(cells[variation], metric), p_value, limits)
        table.add(variation, UNPRUNED, "density", 0.0, 0)
    for metric in next(iter(cells.values())).measures:
        p_value = None
        if metric in ("gap_mean", "smd"):
            defined = [variation for variation in cells if np.isfinite(cells[variation].measures[metric][0])]
            if defined:
                permuted = permuted_gaps if metric == "gap_mean" else permuted_smds
                size = scale if metric == "gap_mean" else dict.fromkeys(scale, 1.0)
                p_value = m.permutation_p_value(
                    float(np.mean([cells[variation].measures[metric][0] / size[variation] for variation in defined])),
                    np.mean([permuted[variation] / size[variation] for variation in defined], axis=0),
                )
        values = _mean_over([cell.measures[metric] for cell in cells.values()])
        n = sum(_counted(cell, metric) for cell in cells.values())
        table.add(ALL, UNPRUNED, metric, values, n, p_value, _mean_bounds(metric, list(cells.values())))
    table.add(ALL, UNPRUNED, "density", 0.0, 0)


def _pruned_rows(
    table: MetricRows,
    unpruned: dict[str, Cell],
    conditions: dict[Condition, dict[str, list[Cell]]],
    scale: dict[str, float],
    densities: dict[tuple, list[float]],
    names: Names,
    permutations: int,
    seed: int,
) -> None:
    tests = _gap_tests(unpruned, conditions, scale, names, permutations, seed)
    for condition, by_variation in conditions.items():
        strategy, level, matched_to = condition
        # A control has as many weights per matrix as its strategy's mask, so the same random masks are matched to it.
        controls = {} if strategy == "random" else conditions.get(("random", level, matched_to or strategy), {})
        rows: dict[str, list[np.ndarray]] = {}
        total: dict[str, int] = {}
        for variation, cells in by_variation.items():
            values = {
                metric: mean_over_draws([cell.measures[metric] for cell in cells], seed)
                for metric in cells[0].measures
            }
            values |= _changes([variation], unpruned, by_variation, controls, {variation: 1.0}, seed)
            for metric, array in values.items():
                n = sum(_counted(cell, metric) for cell in cells)
                p_value = tests.get((condition, variation)) if metric == "gap_mean" else None
                table.add(variation, condition, metric, array, n, p_value, _mean_bounds(metric, cells))
                rows.setdefault(metric, []).append(array)
                total[metric] = total.get(metric, 0) + n
            shares = densities.get((condition, variation), [])
            table.add(variation, condition, "density", float(np.mean(shares)) if shares else None, len(shares))
        # reductions over all variations are ratios of sums, not means of ratios
        overall = _changes(list(by_variation), unpruned, by_variation, controls, scale, seed)
        for metric in rows:
            if metric not in overall:
                overall[metric] = _mean_over(rows[metric])
        for metric in [*rows, *(metric for metric in overall if metric not in rows)]:
            p_value = tests.get((condition, ALL)) if metric == "gap_mean" else None
            limits = _bounds_overall(metric, by_variation)
            table.add(ALL, condition, metric, overall[metric], total.get(metric, 0), p_value, limits)
        shares = [densities[condition, variation] for variation in by_variation if (condition, variation) in densities]
        density = float(np.mean([np.mean(part) for part in shares])) if shares else None
        table.add(ALL, condition, "density", density, sum(map(len, shares)))


def _changes(
    variations: list[str],
    unpruned: dict[str, Cell],
    by_variation: dict[str, list[Cell]],
    controls: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
) -> dict[str, np.ndarray | None]:
    """gap_change and the reductions, over one variation or several, each [resamples + 1]; None: nothing to reduce.

    Without matched random draws for these variations there is no reduction over random.
    """
    changes = [
        mean_over_draws([np.abs(unpruned[v].measures["gap_mean"]) - np.abs(cell.measures["gap_mean"])
                          for cell in by_variation[v]], seed)
        for v in variations
    ]  # fmt: skip
    result: dict[str, np.ndarray | None] = {"gap_change": _mean_over(changes)}
    matched = [v for v in variations if v in controls]
    for metric, reduction, over_random, size in (
        ("gap_mean", "gap_reduction", "reduction_over_random", scale),
        ("smd", "smd_reduction", "smd_reduction_over_random", dict.fromkeys(variations, 1.0)),
    ):
        result[reduction] = _joint_reduction(variations, metric, unpruned, by_variation, size, seed)
        if matched:
            own = _joint_reduction(matched, metric, unpruned, by_variation, size, seed)
            random = _joint_reduction(matched, metric, unpruned, controls, size, seed)
            result[over_random] = None if own is None or random is None else own - random
    return result


def _joint_reduction(
    variations: list[str],
    metric: str,
    unpruned: dict[str, Cell],
    pruned: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
) -> np.ndarray | None:
    """1 - sum over variations |pruned| / sum |unpruned|, divided by the variation's scale. None: nothing to reduce."""
    sizes = {v: mean_over_draws([np.abs(cell.measures[metric]) for cell in pruned[v]], seed) for v in variations}
    defined = [v for v in variations if np.isfinite(sizes[v][0]) and np.isfinite(unpruned[v].measures[metric][0])]
    if not defined:
        return None
    before = {v: unpruned[v].measures[metric] / scale[v] for v in defined}
    if not _excludes_zero(np.mean(list(before.values()), axis=0)):
        return None
    total_before = np.sum([np.abs(before[v]) for v in defined], axis=0)
    return reduction_of(total_before, np.sum([sizes[v] / scale[v] for v in defined], axis=0))


def _gap_tests(
    unpruned: dict[str, Cell],
    conditions: dict[Condition, dict[str, list[Cell]]],
    scale: dict[str, float],
    names: Names,
    permutations: int,
    seed: int,
) -> dict[tuple[Condition, str], float]:
    """p-values of "the gap is as unpruned" for every (condition, variation) and (condition, "(all)")."""
    keys, columns = [], []
    for condition, by_variation in conditions.items():
        scaled = []
        for variation, cells in by_variation.items():
            change = []
            for group, before in enumerate(unpruned[variation].name_means):
                after = np.array([cell.name_means[group] for cell in cells])
                defined = np.isfinite(after)
                with np.errstate(invalid="ignore", divide="ignore"):
                    mean = np.where(defined, after, 0).sum(axis=0) / defined.sum(axis=0)
                    change.append(exact_difference(mean, before))
            contributions = m.gap_contributions(*change)
            keys.append((condition, variation))
            columns.append(contributions)
            if np.isfinite(contributions).all():
                scaled.append(contributions / scale[variation])
        keys.append((condition, ALL))
        columns.append(np.mean(scaled, axis=0) if scaled else np.full(sum(map(len, names.subjects)), np.nan))
    if not columns:
        return {}
    p_values = m.sign_flip_p_values(np.stack(columns, axis=1), permutations, [seed, _SIGNS])
    return dict(zip(keys, p_values, strict=True))
