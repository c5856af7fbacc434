"""From completions to the metrics table: `evaluate` compares an unpruned model's answers with those under every mask.

The arithmetic itself (metrics, resampling, tests) is in `metrics`; sampling, masks and drawing are elsewhere, too.
Every number stands beside an interval from resampled names, and the same resampled names serve the unpruned model, all
masks and all variations, so that a reduction is a paired comparison and never one of two separate uncertainties.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from excise.conditions import ALL, COLUMNS, RANDOM, UNPRUNED, Condition
from excise.errors import ExciseError
from excise.evaluation import metrics as m
from excise.evaluation.distributions import Bounds, GroupAnswers, answers_of, both_groups, metric_bounds
from excise.evaluation.thresholds import COLLAPSED_SPREAD

SCHEMA = {
    "model": pl.String,
    "scenario": pl.String,
    "variation": pl.String,
    "strategy": pl.String,
    "level": pl.String,
    "matched_to": pl.String,
    "metric": pl.String,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "p_value": pl.Float64,
    "p_holm": pl.Float64,
    "n": pl.Int64,
    "names": pl.Int64,
    "lowest": pl.Float64,
    "highest": pl.Float64,
}

_COMPLETIONS = ("model", "scenario", "variation", "group", "subject", "value")
_PRUNED = (*_COMPLETIONS, *COLUMNS, "draw")
_MASKS = ("model", "scenario", "variation", *COLUMNS, "draw", "pruned", "size")
# Streams of random numbers, so that rows do not depend on which other masks are evaluated beside them.
_NAMES_OF_MAJORITY, _NAMES_OF_MINORITY, _DRAWS, _SIGNS, _LABELS = range(5)
_OF_ALL_ANSWERS = ("inlier_ratio", "parse_rate", "leftover", "sampled")
_OF_TWO_ANSWERS = ("smd", "abs_smd", "spread_ratio", "excess_change")  # a group needs two for a deviation
_SMALLEST = ("spread_ratio",)  # over draws and variations the smallest tells, not the mean
_LARGEST = ("commonest_rise", "excess_change")  # and of these the largest


@dataclass(frozen=True)
class Spread:
    """Standard deviation of a group's answers [resamples + 1], each resample clipped at its own quantiles `tails`."""

    tails: tuple[float, float] | None
    deviation: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Answers by group on the outcome's own scale, and of each resample their means and variances, [resamples + 1]."""

    pair: tuple[m.NamedAnswers, m.NamedAnswers]
    means: tuple[np.ndarray, np.ndarray]
    variances: tuple[np.ndarray, np.ndarray]

    @property
    def gap(self) -> np.ndarray:
        return m.exact_difference(*self.means)


@dataclass(frozen=True)
class Cell:
    """The answers to one variation under one mask: every measure [resamples + 1], the estimate first."""

    measures: dict[str, np.ndarray]
    name_means: tuple[np.ndarray, np.ndarray]  # per group: mean answer of every name, NaN without
    spreads: tuple[Spread, Spread]  # per group
    answers: int
    parsed: tuple[int, int]
    weight: float  # parsed answers of the group that has fewer, enumerated ones by their probability
    names: tuple[int, int]  # of the group that has fewer: names asked, names with a parsed answer
    bounds: dict[str, Bounds]  # of enumerated answers
    moments: Moments
    commonest: np.ndarray  # share of the commonest answer in the group where it is larger [resamples + 1]

    @property
    def collapsed(self) -> bool:
        """Whether a group's answers lost nearly all of their spread, or are too few to tell."""
        return not self.measures["spread_ratio"][0] >= COLLAPSED_SPREAD

    def has(self, metric: str) -> bool:
        """Whether there are answers to compute a metric of, which may be undefined all the same."""
        if metric in ("parse_rate", "leftover", "sampled"):
            return True
        return self.weight >= (2 if metric in _OF_TWO_ANSWERS else 1)


@dataclass(frozen=True)
class Sample:
    """The answers to one variation under one mask, by group: as counts, and enumerated ones as distributions, too."""

    counted: tuple[m.NamedAnswers, m.NamedAnswers]
    answers: int  # rows
    parsed: tuple[int, int]  # rows with a number
    names: int  # of the group that has fewer
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
    log_scale: bool = False,
) -> pl.DataFrame:
    """The metrics of one model and scenario: long frame with the columns of `SCHEMA` (method, A1 and C).

    completions, pruned, masks: the tables of those names; `pruned` and `masks` may be empty. majority, minority: keys
    in the column `group`; other groups are left out. Answers that are null or not finite are unparsed. Enumerated
    answers (`excise.generation.enumeration`: a column probability that is not null) count by their probability, all
    names alike; a name's leftover answers are taken to be distributed as its known ones. answer_range: where those
    answers lie if they are numbers (`outcome.scored_range`), for the bounds. log_scale: differences of answers are told
    by their logarithms (`outcome.scale`); it decides excess_change alone.

    Rows: one per variation, condition (strategy, level, matched_to) and metric, and those of the condition over all
    variations, "(all)". Nothing is NaN or infinite: what cannot be computed is null.
      * estimate: of all answers; for several draws of a control, the mean over the draws, null where one lacks it.
      * low, high: 95 % percentile interval over resampled names (and draws, if several). Null if a group has one name,
        and then so is every reduction; null, too, where more than 5 % of the resamples are undefined. The inlier bounds
        are those of the resampled unpruned answers.
      * smd: null, not 0, where the means differ and no group's answers vary (`metrics.standardized`). Clipping at the
        5th and 95th percentile takes the variation of groups nearly all of whose answers are equal.
      * abs_gap_mean: |gap_mean|. Its interval is of absolute values, which never reach below 0: near 0 they are too
        large by noise, so whether there is a gap is told by the interval and the test of gap_mean.
      * spread_ratio (pruned conditions): standard deviation of a group's answers over the unpruned one of the group
        that had less, the smaller of the groups', and the smallest over draws and variations. A closed gap leaves the
        groups one distribution, so the group that varied more may come to vary as the other did; by its own measure the
        model from before a bias was put in would be damaged. Clipped like the SMD; where that leaves the unpruned
        answers no deviation, neither is clipped. Null where the unpruned answers do not vary.
      * commonest_answer: share of the commonest parsed answer, both groups together. commonest_rise (pruned
        conditions): that less the unpruned share of the group in which it was larger, for the same reason; the largest
        over draws and variations.
      * excess_change (pruned conditions): how far the groups' answers moved beyond what closing the gap took, in
        unpruned standard deviations within groups, on the scenario's scale; the largest over draws and variations.
        (W_majority + W_minority - max(0, |gap unpruned| - |gap pruned|)) / (2 deviation), W the Earth mover's distance
        of a group's answers from its unpruned ones. 0 where each group moved as a whole towards the other until the
        gap was closed; a collapse, a drift of both groups and an overshoot make it large.
      * closed_by_majority, closed_by_minority (pruned conditions): how the gap closed. Shares of the unpruned gap that
        went as the majority's mean moved towards the minority's, and the other way round; together they are 1 less the
        signed gap over the unpruned one. Over variations as gap_reduction; null where that has nothing to reduce.
      * gap_reduction = 1 - |gap pruned| / |gap unpruned| and smd_reduction likewise. Null where the interval of the
        unpruned gap (SMD) covers 0: there is nothing to reduce, and the share of nothing means nothing. Null where the
        answers collapsed (spread_ratio below `thresholds.COLLAPSED_SPREAD`, or too few answers to tell): a model that
        says the same to everybody has no gap, and no use. The threshold lies well above 0, so that a few answers beside
        the one figure, or two figures close together, are no way around it. gap_change, in the outcome's unit, is
        always given. reduction_over_random and smd_reduction_over_random: minus the mean reduction of the random draws
        matched to this strategy at this level (to a control: those of its strategy); null where one of them collapsed.
        A reduction without an interval is null, too.
      * p_value on gap_mean of a pruned condition: the gap is as unpruned (`metrics.paired_permutation_test`; for
        several draws with each name's mean over draws). On gap_mean and smd of the unpruned model: the gap is 0 (names
        permuted between the groups). Null if a group has one name. p_holm: adjusted over the variations of a condition.
        Neither depends on which other masks are evaluated.
      * n: answers counted (parsed ones, except for inlier_ratio and parse_rate; of all draws; distinct ones where
        they were enumerated); masks for density.
      * names: of the group that has fewer, the names with a parsed answer (inlier_ratio, parse_rate: the names asked),
        the fewest over draws, variations and, for changes and reductions, the unpruned answers. Null for density.
      * lowest, highest: of enumerated answers, where the estimate lies whatever the leftover answers are; else null.
        Not of medians, distances, absolute values and reductions. Metrics leftover and sampled: the mean leftover mass,
        and the share of prompts that were sampled as the model rambles.
    "(all)" is the mean over the variations the condition has, in the unit of the metric. A variation to which the
    unpruned model gave a group no parsed answer (no two, for smd and spread_ratio) is left out; otherwise "(all)" is
    null where one of the variations lacks the metric, as a mean of the others would hide just that one. Only
    gap_reduction and the p_value of gap_mean first divide each variation's gap by the mean size of its unpruned
    answers, so that cars do not swamp chairs: 1 - sum |gap pruned| / sum |gap unpruned|. There is nothing to reduce
    where the interval of the mean of the scaled signed gaps covers 0 and no variation's own test, adjusted by Holm,
    finds a gap (`metrics.rejected`), as gaps of opposite sign cancel in the mean; likewise smd_reduction
    (1 - sum |SMD pruned| / sum |SMD unpruned|) and the mean SMD.

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
    ends = (winsorize, inlier_quantiles, answer_range, log_scale)
    with np.errstate(over="ignore", invalid="ignore"):  # absurdly large answers end as null
        for (variation,), frame in completions.partition_by("variation", as_dict=True, maintain_order=True).items():
            found = _samples(frame, groups, names, f"{scenario}/{variation}")
            samples[variation] = found.counted
            bounds[variation] = m.weighted_quantiles(m.pooled(*found.counted), names.stacked, inlier_quantiles)
            references[variation] = None if found.exact is None else both_groups(*found.exact)
            unpruned[variation] = _cell(found, names, bounds[variation], references[variation], None, *ends)
        conditions: dict[Condition, dict[str, list[Cell]]] = {}
        parts = (
            {}
            if pruned.is_empty()
            else pruned.sort("draw", maintain_order=True).partition_by(
                *COLUMNS, "variation", "draw", as_dict=True, maintain_order=True
            )
        )
        for (*condition, variation, draw), frame in parts.items():
            where = f"{scenario}/{variation}, {' '.join(str(part) for part in condition if part)}, draw {draw}"
            if variation not in unpruned:
                raise ExciseError(f"{where}: no unpruned completions to compare with; sample the unpruned model first")
            found = _samples(frame, groups, names, where)
            cell = _cell(found, names, bounds[variation], references[variation], unpruned[variation], *ends)
            conditions.setdefault(tuple(condition), {}).setdefault(variation, []).append(cell)
        table = MetricRows(model, scenario, names.resampled)
        scale = {variation: _scale(pair) for variation, pair in samples.items()}
        standing = _unpruned_rows(table, unpruned, samples, scale, winsorize, permutations, seed)
        densities = mask_densities(masks, model, scenario)
        before = _Unpruned(unpruned, scale, standing)
        _pruned_rows(table, before, conditions, densities, names, permutations, seed)
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
    counted, distributions, rows, parsed, asked = [], [], 0, [], []
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
        asked.append(len(set(found)))
    return Sample(tuple(counted), rows, tuple(parsed), min(asked), tuple(distributions) if exact else None)


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
    keys = [*COLUMNS, "variation", "draw"]
    own = masks.filter((pl.col("model") == model) & (pl.col("scenario") == scenario))
    sums = own.group_by(keys, maintain_order=True).agg(pl.col("pruned").sum(), pl.col("size").sum())
    result: dict[tuple, list[float]] = {}
    for *condition, variation, _draw, count, size in sums.select(*keys, "pruned", "size").iter_rows():
        if size:
            result.setdefault((tuple(condition), variation), []).append(count / size)
    return result


# --- measures ---------------------------------------------------------------------------------------------------------


def _cell(
    sample: Sample,
    names: Names,
    bounds: np.ndarray,
    reference: GroupAnswers | None,
    before: Cell | None,
    winsorize,
    inlier_quantiles: tuple[float, float],
    answer_range: tuple[float, float] | None,
    log_scale: bool,
) -> Cell:
    """bounds: of the inlier ratio, [2, resamples + 1]; reference: the unpruned answers where they were enumerated;
    before: the unpruned answers, None for these themselves."""
    pair = sample.counted
    both = m.pooled(*pair)
    means = [m.weighted_mean(sample, weights) for sample, weights in zip(pair, names.weights, strict=True)]
    medians = [
        m.weighted_quantiles(sample, weights, (0.5,))[0] for sample, weights in zip(pair, names.weights, strict=True)
    ]
    moments = [
        m.weighted_moments(sample, weights, winsorize) for sample, weights in zip(pair, names.weights, strict=True)
    ]
    smd, gap = m.standardized(*zip(*moments, strict=True)), m.exact_difference(*means)
    spreads = tuple(
        spread_of(sample, weights, each, winsorize, None if before is None else before.spreads[group])
        for group, (sample, weights, each) in enumerate(zip(pair, names.weights, moments, strict=True))
    )
    measures = {
        "mean_majority": means[0],
        "mean_minority": means[1],
        "median_majority": medians[0],
        "median_minority": medians[1],
        "gap_mean": gap,
        "abs_gap_mean": np.abs(gap),
        "gap_median": m.exact_difference(*medians),
        "smd": smd,
        "abs_smd": np.abs(smd),
        "inlier_ratio": m.weighted_inlier_ratio(both, names.stacked, bounds),
        "parse_rate": m.weighted_parse_rate(both, names.stacked),
        "earth_movers_distance": m.weighted_earth_movers_distance(*pair, names.weights),
        "commonest_answer": m.weighted_commonest(both, names.stacked),
    }
    on_scale = _moments(pair, names, log_scale)
    if before is not None:
        measures["spread_ratio"] = _spread_left(spreads, before.spreads)
        measures["commonest_rise"] = measures["commonest_answer"] - before.commonest
        measures["excess_change"] = _excess_change(on_scale, before.moments, names)
    limits: dict[str, Bounds] = {}
    if sample.exact is not None:
        leftover = np.concatenate([group.leftover for group in sample.exact])
        sampled = np.concatenate([group.sampled for group in sample.exact])
        # The same whatever names are drawn: they say how much of the answers is known.
        for metric, share in (("leftover", leftover.mean()), ("sampled", sampled.mean())):
            measures[metric] = np.full(len(smd), share)
        if answer_range is not None and reference is not None:
            limits = metric_bounds(*sample.exact, reference, *answer_range, winsorize, inlier_quantiles)
    return Cell(
        measures,
        tuple(m.name_means(group) for group in pair),
        spreads,
        sample.answers,
        sample.parsed,
        min(float(group.parsed.sum()) for group in pair),
        (sample.names, min(int((group.parsed > 0).sum()) for group in pair)),
        limits,
        on_scale,
        np.maximum(*(m.weighted_commonest(group, weights) for group, weights in zip(pair, names.weights, strict=True))),
    )


def _moments(pair: tuple[m.NamedAnswers, m.NamedAnswers], names: Names, log_scale: bool) -> Moments:
    pair = tuple(map(m.of_logarithms, pair)) if log_scale else pair
    found = [m.weighted_moments(sample, weights) for sample, weights in zip(pair, names.weights, strict=True)]
    return Moments(pair, *map(tuple, zip(*found, strict=True)))


def _excess_change(after: Moments, before: Moments, names: Names) -> np.ndarray:
    """As `evaluate` tells it, [resamples + 1]; NaN where the unpruned answers do not vary."""
    moved = sum(
        m.weighted_earth_movers_distance(new, old, (weights, weights))
        for new, old, weights in zip(after.pair, before.pair, names.weights, strict=True)
    )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        needed = np.maximum(0.0, np.abs(before.gap) - np.abs(after.gap))
        deviation = np.sqrt(sum(before.variances) / 2)
        # Sums of the same numbers in another order may differ in the last digits: no movement is below 0.
        return np.where(deviation > 0, np.maximum(moved - needed, 0.0) / (2 * deviation), np.nan)


def spread_of(
    sample: m.NamedAnswers,
    weights: np.ndarray,
    moments: tuple[np.ndarray, np.ndarray],
    winsorize,
    before: Spread | None,
) -> Spread:
    """moments: of the answers, clipped. Like `before`, or unclipped where clipping leaves the answers no deviation."""
    found = Spread(winsorize, m.spread(moments))
    unclipped = found.deviation[0] == 0 if before is None else before.tails != winsorize
    return Spread(None, m.spread(m.weighted_moments(sample, weights))) if unclipped else found


def spread_ratio(after: Spread, before: Spread) -> np.ndarray:
    """Share of a group's spread that is left, [resamples + 1]; infinite where it had none that it could lose."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(before.deviation == 0, np.inf, after.deviation / before.deviation)


def _spread_left(after: tuple[Spread, Spread], before: tuple[Spread, Spread]) -> np.ndarray:
    """`spread_ratio` of two groups as `evaluate` tells it: over the spread of the group that had less, but some."""
    least = np.minimum(*(np.where(each.deviation == 0, np.inf, each.deviation) for each in before))
    base = Spread(None, least)
    return np.minimum(
        *(np.where(old.deviation == 0, np.inf, spread_ratio(new, base)) for new, old in zip(after, before, strict=True))
    )


def _counted(cell: Cell, metric: str) -> int:
    if metric in ("inlier_ratio", "parse_rate"):
        return cell.answers
    if metric.endswith("_majority"):
        return cell.parsed[0]
    if metric.endswith("_minority"):
        return cell.parsed[1]
    return sum(cell.parsed)


def _names_behind(cells: Iterable[Cell], metric: str) -> int:
    """Names behind a metric: of the group that has fewer, the fewest over the cells."""
    return min((cell.names[0 if metric in _OF_ALL_ANSWERS else 1] for cell in cells), default=0)


def _scale(pair: tuple[m.NamedAnswers, m.NamedAnswers]) -> float:
    """Mean size of the unpruned answers, both groups pooled; NaN if there are none or their sum overflows."""
    both = m.pooled(*pair)
    total = float(np.diff(both.cumulative.sum(axis=0)) @ np.abs(both.values))
    count = both.parsed.sum()
    return total / count if count > 0 and np.isfinite(total) else float("nan")


def _scaled(values: np.ndarray, scale: float) -> np.ndarray:
    """values / scale; where all unpruned answers are 0, 0 stays 0 and anything else has no size to be told in: NaN."""
    if scale > 0:
        return values / scale
    return np.where((values == 0) & (scale == 0), 0.0, np.nan)


def _over_variations(metric: str, arrays: list[np.ndarray]) -> np.ndarray | None:
    """A metric over variations from arrays [resamples + 1], the mean unless the worst tells. None without any, and
    where one is undefined."""
    if not arrays or not all(_is_known(metric, array[0]) for array in arrays):
        return None
    return _worst(metric, arrays) if metric in _SMALLEST + _LARGEST else np.mean(arrays, axis=0)


def _over_draws(metric: str, arrays: list[np.ndarray], seed: int) -> np.ndarray:
    return _worst(metric, arrays) if metric in _SMALLEST + _LARGEST else mean_over_draws(arrays, seed)


def _worst(metric: str, arrays: list[np.ndarray]) -> np.ndarray:
    return np.min(arrays, axis=0) if metric in _SMALLEST else np.max(arrays, axis=0)


def _is_known(metric: str, estimate: float) -> bool:
    """Whether an estimate can be gathered with others; an infinite ratio can: there was nothing to lose."""
    return not np.isnan(estimate) if metric in _SMALLEST else bool(np.isfinite(estimate))


def mean_over_draws(arrays: list[np.ndarray], seed: int) -> np.ndarray:
    """Mean over a control's draws [resamples + 1]: all of them in the estimate, resampled ones in every resample.

    All NaN where the estimate of a draw is undefined: a mean of the others would flatter or blame the control. Equal
    numbers of draws are resampled alike, in every variation and metric, as a mask may serve several variations.
    """
    if not all(np.isfinite(array[0]) for array in arrays):
        return np.full_like(arrays[0], np.nan)
    if len(arrays) == 1:
        return arrays[0]
    rng = np.random.default_rng([seed, _DRAWS])
    weights = m.resampled_names(len(arrays), len(arrays[0]) - 1, rng) / len(arrays)
    # a draw that is not chosen must not spoil a resample in which it is undefined
    stack = np.where(weights.T > 0, np.array(arrays), 0.0)
    return np.einsum("rd,dr->r", weights, stack)


def reduction_of(unpruned: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """1 - |pruned| / |unpruned|, NaN where there was nothing or one of them is not finite."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = 1 - np.abs(pruned) / np.abs(unpruned)
    ratio = np.where(np.isfinite(ratio), ratio, np.nan)
    return np.where((unpruned != 0) & np.isfinite(unpruned) & np.isfinite(pruned), ratio, np.nan)


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

    def add(
        self,
        variation: str,
        condition: Condition,
        metric: str,
        values: np.ndarray | float | None,
        n: int,
        p_value: float | None = None,
        bounds: Bounds | None = None,
        names: int | None = None,
    ) -> None:
        """values: [resamples + 1] with the estimate first, one number if there is no interval, None for no value.

        bounds: where the estimate lies whatever was left over; rounding must not put it outside. names: what is
        resampled, of the group that has fewer; of one there is nothing to resample.
        """
        intervals = self.intervals and (names is None or names >= 2)
        low = high = None
        estimate = values
        if isinstance(values, np.ndarray):
            estimate = values[0]
            if intervals and np.isfinite(estimate) and metric not in ("leftover", "sampled"):
                low, high = m.percentile_interval(values[1:])
        if "reduction" in metric and finite_or_none(low) is None:
            estimate = None  # without an interval nobody knows whether there was a gap to reduce
        ends = (None, None)
        if bounds is not None and finite_or_none(estimate) is not None:
            ends = (min(bounds.lowest, float(estimate)), max(bounds.highest, float(estimate)))
        self.rows.append(
            {
                "model": self.model,
                "scenario": self.scenario,
                "variation": variation,
                **dict(zip(COLUMNS, condition, strict=True)),
                "metric": metric,
                "estimate": finite_or_none(estimate),
                "low": finite_or_none(low),
                "high": finite_or_none(high),
                "p_value": finite_or_none(p_value),
                "p_holm": None,
                "n": int(n),
                "names": names,
                "lowest": finite_or_none(ends[0]),
                "highest": finite_or_none(ends[1]),
            }
        )

    def frame(self) -> pl.DataFrame:
        tests: dict[tuple, list[dict]] = {}
        for row in self.rows:
            if row["p_value"] is not None and row["variation"] != ALL:
                tests.setdefault((*(row[key] for key in COLUMNS), row["metric"]), []).append(row)
        for rows in tests.values():
            for row, adjusted in zip(rows, m.holm([row["p_value"] for row in rows]), strict=True):
                row["p_holm"] = float(adjusted)
        return pl.DataFrame(self.rows, schema=SCHEMA, orient="row")


def _mean_bounds(metric: str, cells: list[Cell]) -> Bounds | None:
    """Bounds of the mean over cells; None where one of them has none."""
    if not cells or not all(metric in cell.bounds for cell in cells):
        return None
    return _mean_of([cell.bounds[metric] for cell in cells])


def _bounds_overall(metric: str, by_variation: Iterable[list[Cell]]) -> Bounds | None:
    """Bounds of the mean over variations, each of them the mean over its draws."""
    parts = [_mean_bounds(metric, cells) for cells in by_variation]
    return None if None in parts or not parts else _mean_of(parts)


def _mean_of(bounds: list[Bounds]) -> Bounds:
    return Bounds(*(float(np.mean([getattr(each, end) for each in bounds])) for end in ("lowest", "highest")))


def finite_or_none(value: float | None) -> float | None:
    """The value as a float, None where it is not finite."""
    return float(value) if value is not None and np.isfinite(value) else None


@dataclass(frozen=True)
class _Unpruned:
    """The unpruned model's cells, the scale of each variation, and the variations that stand out, by metric."""

    cells: dict[str, Cell]
    scale: dict[str, float]
    standing: dict[str, list[str]]

    def answered(self, metric: str, variations: Iterable[str]) -> list[str]:
        """Those of the variations which the unpruned model answered, so that "(all)" counts them."""
        return [variation for variation in variations if self.cells[variation].has(metric)]


def _unpruned_rows(
    table: MetricRows,
    cells: dict[str, Cell],
    samples: dict[str, tuple[m.NamedAnswers, m.NamedAnswers]],
    scale: dict[str, float],
    winsorize,
    permutations: int,
    seed: int,
) -> dict[str, list[str]]:
    """Add the rows of the unpruned model; returns the variations that stand out by gap_mean and by smd."""
    first = next(iter(samples.values()))
    labels = m.permuted_groups(first[0].names, first[1].names, permutations, [seed, _LABELS]).astype(np.float64)
    relabelled = (labels, 1.0 - labels)
    permuted: dict[str, dict[str, np.ndarray]] = {"gap_mean": {}, "smd": {}}
    p_values: dict[str, dict[str, float]] = {"gap_mean": {}, "smd": {}}
    for variation, pair in samples.items():
        both, cell = m.pooled(*pair), cells[variation]
        permuted["gap_mean"][variation] = m.weighted_mean(both, relabelled[0]) - m.weighted_mean(both, relabelled[1])
        permuted["smd"][variation] = m.weighted_smd(both, both, relabelled, winsorize)
        for metric, values in cell.measures.items():
            names = _names_behind([cell], metric)
            p_value = None
            if metric in permuted and names >= 2:
                p_value = m.permutation_p_value(values[0], permuted[metric][variation])
                p_values[metric][variation] = p_value
            table.add(
                variation, UNPRUNED, metric, values, _counted(cell, metric), p_value, cell.bounds.get(metric), names
            )
        table.add(variation, UNPRUNED, "density", 0.0, 0)
    for metric in next(iter(cells.values())).measures:
        chosen = [variation for variation in cells if cells[variation].has(metric)]
        names = _names_behind([cells[variation] for variation in chosen], metric)
        values = _over_variations(metric, [cells[variation].measures[metric] for variation in chosen])
        p_value = None
        if metric in permuted and values is not None and names >= 2:
            size = scale if metric == "gap_mean" else dict.fromkeys(scale, 1.0)
            p_value = m.permutation_p_value(
                float(np.mean([_scaled(cells[each].measures[metric], size[each])[0] for each in chosen])),
                np.mean([_scaled(permuted[metric][each], size[each]) for each in chosen], axis=0),
            )
        n = sum(_counted(cell, metric) for cell in cells.values())
        limits = _mean_bounds(metric, [cells[variation] for variation in chosen])
        table.add(ALL, UNPRUNED, metric, values, n, p_value, limits, names)
    table.add(ALL, UNPRUNED, "density", 0.0, 0)
    return {
        metric: m.rejected(dict(zip(found, m.holm(list(found.values())), strict=True)))
        for metric, found in p_values.items()
    }


def _pruned_rows(
    table: MetricRows,
    unpruned: _Unpruned,
    conditions: dict[Condition, dict[str, list[Cell]]],
    densities: dict[tuple, list[float]],
    names: Names,
    permutations: int,
    seed: int,
) -> None:
    tests = _gap_tests(unpruned, conditions, names, permutations, seed)
    for condition, by_variation in conditions.items():
        strategy, level, matched_to = condition
        # A control has as many weights per matrix as its strategy's mask, so the same random masks are matched to it.
        controls = {} if strategy == RANDOM else conditions.get((RANDOM, level, matched_to or strategy), {})
        rows: dict[str, dict[str, np.ndarray]] = {}
        total: dict[str, int] = {}

        def behind(metric: str, variations: Iterable[str], by_variation=by_variation) -> int:
            cells = [cell for each in variations for cell in by_variation[each]]
            if metric.endswith(("_change", "_rise")) or "reduction" in metric or metric.startswith("closed_by"):
                cells += [unpruned.cells[each] for each in variations]
            return _names_behind(cells, metric)

        for variation, cells in by_variation.items():
            values = {
                metric: _over_draws(metric, [cell.measures[metric] for cell in cells], seed)
                for metric in cells[0].measures
            }
            values |= _changes([variation], unpruned, by_variation, controls, {variation: 1.0}, seed)
            for metric, array in values.items():
                n = sum(_counted(cell, metric) for cell in cells)
                p_value = tests.get((condition, variation)) if metric == "gap_mean" else None
                limits = _mean_bounds(metric, cells)
                table.add(variation, condition, metric, array, n, p_value, limits, behind(metric, [variation]))
                rows.setdefault(metric, {})[variation] = array
                total[metric] = total.get(metric, 0) + n
            shares = densities.get((condition, variation), [])
            table.add(variation, condition, "density", float(np.mean(shares)) if shares else None, len(shares))
        # reductions over all variations are ratios of sums, not means of ratios
        overall = _changes(list(by_variation), unpruned, by_variation, controls, unpruned.scale, seed)
        for metric in [*rows, *(metric for metric in overall if metric not in rows)]:
            chosen = unpruned.answered(metric, by_variation)
            values = (
                overall[metric]
                if metric in overall
                else _over_variations(metric, [rows[metric][variation] for variation in chosen])
            )
            p_value = tests.get((condition, ALL)) if metric == "gap_mean" else None
            limits = _bounds_overall(metric, [by_variation[variation] for variation in chosen])
            table.add(ALL, condition, metric, values, total.get(metric, 0), p_value, limits, behind(metric, chosen))
        shares = [densities[condition, variation] for variation in by_variation if (condition, variation) in densities]
        density = float(np.mean([np.mean(part) for part in shares])) if shares else None
        table.add(ALL, condition, "density", density, sum(map(len, shares)))


def _changes(
    variations: list[str],
    unpruned: _Unpruned,
    by_variation: dict[str, list[Cell]],
    controls: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
) -> dict[str, np.ndarray | None]:
    """gap_change and the reductions, over one variation or several, each [resamples + 1]; None: nothing to reduce.

    Without matched random draws for these variations there is no reduction over random.
    """
    changes = [
        mean_over_draws(
            [
                np.abs(unpruned.cells[v].measures["gap_mean"]) - np.abs(cell.measures["gap_mean"])
                for cell in by_variation[v]
            ],
            seed,
        )
        for v in unpruned.answered("gap_mean", variations)
    ]
    result: dict[str, np.ndarray | None] = {"gap_change": _over_variations("gap_change", changes)}
    matched = [v for v in variations if v in controls]
    for metric, reduction, over_random, size in (
        ("gap_mean", "gap_reduction", "reduction_over_random", scale),
        ("smd", "smd_reduction", "smd_reduction_over_random", dict.fromkeys(variations, 1.0)),
    ):
        result[reduction] = _joint_reduction(variations, metric, unpruned, by_variation, size, seed)
        if metric == "gap_mean":
            result |= _closed_by(variations, unpruned, by_variation, size, seed, result[reduction])
        if matched:
            own = _joint_reduction(matched, metric, unpruned, by_variation, size, seed)
            random = _joint_reduction(matched, metric, unpruned, controls, size, seed)
            result[over_random] = None if own is None or random is None else own - random
    return result


def _joint_reduction(
    variations: list[str],
    metric: str,
    unpruned: _Unpruned,
    pruned: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
) -> np.ndarray | None:
    """1 - sum over variations |pruned| / sum |unpruned|, divided by the variation's scale. None: nothing to reduce, or
    one of them is undefined or collapsed."""
    chosen = unpruned.answered(metric, variations)
    if not chosen or any(cell.collapsed for v in chosen for cell in pruned[v]):
        return None
    before = [_scaled(unpruned.cells[v].measures[metric], scale[v]) for v in chosen]
    standing = len(chosen) > 1 and not set(unpruned.standing[metric]).isdisjoint(chosen)
    if not standing and not _excludes_zero(np.mean(before, axis=0)):
        return None
    after = [
        _scaled(mean_over_draws([np.abs(cell.measures[metric]) for cell in pruned[v]], seed), scale[v]) for v in chosen
    ]
    return reduction_of(np.sum(np.abs(before), axis=0), np.sum(after, axis=0))


def _closed_by(
    variations: list[str],
    unpruned: _Unpruned,
    pruned: dict[str, list[Cell]],
    scale: dict[str, float],
    seed: int,
    reduction: np.ndarray | None,
) -> dict[str, np.ndarray | None]:
    """closed_by_majority and closed_by_minority over one variation or several; None where there is no reduction."""
    chosen = unpruned.answered("gap_mean", variations)
    found: dict[str, np.ndarray | None] = {}
    for side, towards in (("majority", 1.0), ("minority", -1.0)):
        metric, went, whole = f"mean_{side}", 0.0, 0.0
        for v in chosen if reduction is not None else ():
            before = unpruned.cells[v].measures
            after = mean_over_draws([cell.measures[metric] for cell in pruned[v]], seed)
            moved = m.exact_difference(before[metric], after) * towards * np.sign(before["gap_mean"])
            went = went + _scaled(moved, scale[v])
            whole = whole + _scaled(np.abs(before["gap_mean"]), scale[v])
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"closed_by_{side}"] = None if reduction is None else np.where(whole > 0, went / whole, np.nan)
    return found


def _gap_tests(
    unpruned: _Unpruned,
    conditions: dict[Condition, dict[str, list[Cell]]],
    names: Names,
    permutations: int,
    seed: int,
) -> dict[tuple[Condition, str], float]:
    """p-values of "the gap is as unpruned" for every (condition, variation) and (condition, "(all)")."""
    keys, columns = [], []
    undefined = np.full(sum(map(len, names.subjects)), np.nan)
    for condition, by_variation in conditions.items():
        found = {
            variation: _gap_contributions(unpruned.cells[variation], cells) for variation, cells in by_variation.items()
        }
        chosen = unpruned.answered("gap_mean", found)
        scaled = [_scaled(found[variation], unpruned.scale[variation]) for variation in chosen]
        found[ALL] = np.mean(scaled, axis=0) if scaled else undefined
        keys += [(condition, variation) for variation in found]
        columns += found.values()
    if not columns:
        return {}
    p_values = m.sign_flip_p_values(np.stack(columns, axis=1), permutations, [seed, _SIGNS])
    return dict(zip(keys, p_values, strict=True))


def _gap_contributions(before: Cell, after: list[Cell]) -> np.ndarray:
    """What each name adds to the change of the gap, its answers averaged over the draws; NaN if a group has no two
    names with both answers."""
    changes = []
    for group, unpruned in enumerate(before.name_means):
        drawn = np.array([cell.name_means[group] for cell in after])
        defined = ~np.isnan(drawn)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            pruned = np.where(defined, drawn, 0).sum(axis=0) / defined.sum(axis=0)
        change = m.exact_difference(pruned, unpruned)
        known = ~np.isnan(pruned) & ~np.isnan(unpruned)
        changes.append(np.where(known & ~np.isfinite(change), np.inf, change))
    if min(int((~np.isnan(change)).sum()) for change in changes) < 2:
        return np.full(sum(map(len, changes)), np.nan)
    return m.gap_contributions(*changes)
