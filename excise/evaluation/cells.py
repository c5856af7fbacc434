"""The answers to one variation under one condition, as measures over resampled names: the cells of the metrics table.

Here rows of answers become measures, and damage is told beside the unpruned answers. Which cells are compared, and what
becomes a row, is in `numbers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl

from excise.errors import ExciseError
from excise.evaluation import bootstrap, permutation
from excise.evaluation import metrics as m
from excise.evaluation.distributions import Bounds, GroupAnswers, answers_of, metric_bounds
from excise.evaluation.thresholds import COLLAPSED_SPREAD

COMPLETIONS = ("model", "scenario", "variation", "group", "subject", "value")


T = TypeVar("T")

# Streams of random numbers, so that rows do not depend on which other masks are evaluated beside them.
_NAMES_OF_MAJORITY, _NAMES_OF_MINORITY, DRAWS, SIGNS, LABELS = range(5)
_OF_TWO_ANSWERS = ("smd", "abs_smd", "spread_ratio", "excess_change")  # a group needs two for a deviation


@dataclass(frozen=True)
class Spread:
    """Standard deviation of a group's answers [resamples + 1], each resample clipped at its own quantiles `tails`."""

    tails: tuple[float, float] | None
    deviation: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Answers by group on the outcome's own scale, and of each resample their means and variances, [resamples + 1]."""

    pair: tuple[bootstrap.NamedAnswers, bootstrap.NamedAnswers]
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

    counted: tuple[bootstrap.NamedAnswers, bootstrap.NamedAnswers]
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


@dataclass(frozen=True)
class Measuring:
    """How answers become measures.

    winsorize: at which quantiles each group's are clipped for the SMD; inlier_quantiles: of the unpruned answers, which
    bound the inlier ratio; answer_range: where answers can lie at all, for bounds of enumerated ones; log_scale:
    whether the outcome is judged by its logarithm.
    """

    winsorize: tuple[float, float] | None
    inlier_quantiles: tuple[float, float]
    answer_range: tuple[float, float] | None
    log_scale: bool


def _both(values: Iterable[T]) -> tuple[T, T]:
    """One of each group, as a pair."""
    majority, minority = values
    return majority, minority


def require_table(frame: pl.DataFrame, columns: tuple[str, ...], what: str) -> None:
    """Raise ExciseError where columns are missing or there are no rows."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ExciseError(f"evaluate: the {what} lack the column(s) {', '.join(missing)}")
    if frame.is_empty():
        raise ExciseError(f"evaluate: there are no {what}; sample the model first")


def single_value(frame: pl.DataFrame, column: str) -> str:
    """The only value of a column; ExciseError where there are several."""
    values = frame[column].unique().to_list()
    if len(values) != 1:
        shown = ", ".join(sorted(map(str, values)))
        raise ExciseError(f"evaluate: the column {column} holds {shown}; evaluate one {column} at a time")
    return values[0]


def names_of(completions: pl.DataFrame, groups: tuple[str, str], scenario: str, resamples: int, seed: int) -> Names:
    """The names of both groups, drawn with streams of their own. Raises ExciseError for a group without completions."""
    subjects, weights = [], []
    for group, stream in zip(groups, (_NAMES_OF_MAJORITY, _NAMES_OF_MINORITY), strict=True):
        subjects_of_group = sorted(completions.filter(pl.col("group") == group)["subject"].unique().to_list())
        if not subjects_of_group:
            known = ", ".join(sorted(map(str, completions["group"].unique())))
            raise ExciseError(f"{scenario}: no completions for the group {group!r}; the groups are {known}")
        subjects.append(subjects_of_group)
        rng = np.random.default_rng([seed, stream])
        weights.append(bootstrap.resampled_names(len(subjects_of_group), resamples, rng))
    return Names(_both(subjects), _both(weights))


def samples_of(frame: pl.DataFrame, groups: tuple[str, str], names: Names, where: str) -> Sample:
    """The answers of a table by group. Raises ExciseError, which names `where`, for no answers and unknown names."""
    counted, distributions, rows, parsed, asked = [], [], 0, [], []
    exact = "probability" in frame.columns and frame["probability"].null_count() < frame.height
    for group, subjects in zip(groups, names.subjects, strict=True):
        part = frame.filter(pl.col("group") == group)
        if part.is_empty():
            raise ExciseError(f"{where}: no completions for the group {group!r}; sample it, or leave the variation out")
        number = {subject: position for position, subject in enumerate(subjects)}
        owners = part["subject"].to_list()
        unknown = sorted({str(subject) for subject in owners if subject not in number})
        if unknown:
            raise ExciseError(f"{where}: {unknown[0]} ({group}) has no unpruned completions; sample the unpruned model")
        values = _numbers(part["value"])
        if exact:
            distributions.append(answers_of(part, subjects))
            counted.append(distributions[-1].counted())
        else:
            counted.append(bootstrap.named_answers(values, [number[subject] for subject in owners], len(subjects)))
        rows += part.height
        parsed.append(int(np.isfinite(values).sum()))
        asked.append(len(set(owners)))
    return Sample(_both(counted), rows, _both(parsed), min(asked), _both(distributions) if exact else None)


def _numbers(values: pl.Series) -> np.ndarray:
    """Parsed answers as float64 [n], NaN for every answer that is null or not finite."""
    numbers = values.cast(pl.Float64).fill_null(np.nan).to_numpy().copy()
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def cell_of(
    sample: Sample,
    names: Names,
    bounds: np.ndarray,
    reference: GroupAnswers | None,
    before: Cell | None,
    measuring: Measuring,
) -> Cell:
    """The measures of a sample over resampled names.

    bounds: of the inlier ratio, [2, resamples + 1]; reference: the unpruned answers where they were enumerated;
    before: the unpruned answers, None for these themselves.
    """
    winsorize = measuring.winsorize
    pair = sample.counted
    both = bootstrap.pooled(*pair)
    means = [bootstrap.weighted_mean(sample, weights) for sample, weights in zip(pair, names.weights, strict=True)]
    medians = [
        bootstrap.weighted_quantiles(sample, weights, (0.5,))[0]
        for sample, weights in zip(pair, names.weights, strict=True)
    ]
    moments = [
        bootstrap.weighted_moments(sample, weights, winsorize)
        for sample, weights in zip(pair, names.weights, strict=True)
    ]
    smd, gap = m.standardized(*zip(*moments, strict=True)), m.exact_difference(*means)
    spreads = _both(
        spread_of(group, weights, of_group, winsorize, None if before is None else before.spreads[number])
        for number, (group, weights, of_group) in enumerate(zip(pair, names.weights, moments, strict=True))
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
        "inlier_ratio": bootstrap.weighted_inlier_ratio(both, names.stacked, bounds),
        "parse_rate": bootstrap.weighted_parse_rate(both, names.stacked),
        "earth_movers_distance": bootstrap.weighted_earth_movers_distance(*pair, names.weights),
        "commonest_answer": bootstrap.weighted_commonest(both, names.stacked),
    }
    on_scale = _moments(pair, names, measuring.log_scale)
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
        if measuring.answer_range is not None and reference is not None:
            limits = metric_bounds(
                *sample.exact, reference, *measuring.answer_range, winsorize, measuring.inlier_quantiles
            )
    return Cell(
        measures,
        _both(permutation.name_means(group) for group in pair),
        spreads,
        sample.answers,
        sample.parsed,
        min(float(group.parsed.sum()) for group in pair),
        (sample.names, min(int((group.parsed > 0).sum()) for group in pair)),
        limits,
        on_scale,
        np.maximum(
            *(bootstrap.weighted_commonest(group, weights) for group, weights in zip(pair, names.weights, strict=True))
        ),
    )


def _moments(pair: tuple[bootstrap.NamedAnswers, bootstrap.NamedAnswers], names: Names, log_scale: bool) -> Moments:
    pair = _both(map(bootstrap.of_logarithms, pair)) if log_scale else pair
    moments = [bootstrap.weighted_moments(sample, weights) for sample, weights in zip(pair, names.weights, strict=True)]
    means, variances = zip(*moments, strict=True)
    return Moments(pair, _both(means), _both(variances))


def _excess_change(after: Moments, before: Moments, names: Names) -> np.ndarray:
    """As `evaluate` tells it, [resamples + 1]; NaN where the unpruned answers do not vary."""
    moved = sum(
        bootstrap.weighted_earth_movers_distance(new, old, (weights, weights))
        for new, old, weights in zip(after.pair, before.pair, names.weights, strict=True)
    )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        needed = np.maximum(0.0, np.abs(before.gap) - np.abs(after.gap))
        deviation = np.sqrt(sum(before.variances) / 2)
        # Sums of the same numbers in another order may differ in the last digits: no movement is below 0.
        return np.where(deviation > 0, np.maximum(moved - needed, 0.0) / (2 * deviation), np.nan)


def spread_of(
    sample: bootstrap.NamedAnswers,
    weights: np.ndarray,
    moments: tuple[np.ndarray, np.ndarray],
    winsorize: tuple[float, float] | None,
    before: Spread | None,
) -> Spread:
    """moments: of the answers, clipped. Like `before`, or unclipped where clipping leaves the answers no deviation."""
    clipped = Spread(winsorize, bootstrap.spread(moments))
    unclipped = clipped.deviation[0] == 0 if before is None else before.tails != winsorize
    return Spread(None, bootstrap.spread(bootstrap.weighted_moments(sample, weights))) if unclipped else clipped


def spread_ratio(after: Spread, before: Spread) -> np.ndarray:
    """Share of a group's spread that is left, [resamples + 1]; infinite where it had none that it could lose."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(before.deviation == 0, np.inf, after.deviation / before.deviation)


def _spread_left(after: tuple[Spread, Spread], before: tuple[Spread, Spread]) -> np.ndarray:
    """`spread_ratio` of two groups as `evaluate` tells it: over the spread of the group that had less, but some."""
    least = np.minimum(*(np.where(spread.deviation == 0, np.inf, spread.deviation) for spread in before))
    ratios = [
        np.where(old.deviation == 0, np.inf, new.deviation / least) for new, old in zip(after, before, strict=True)
    ]
    return np.minimum(*ratios)
