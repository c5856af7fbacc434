"""What head impacts have in common between axes, and which strength of pruning they justify.

Here: correlations and overlaps of the table `head_impacts` over all heads of a model (FASP, section 6; method, B6 and
B8), and the explicit rule for FASP's alpha and gamma (method, B4). Not here: the impacts
(`excise.attribution.head_impacts`), the selection of heads (`excise.strategies.selection.fasp`) and overlaps of masks
of weights (`excise.evaluation.overlap`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from excise.conditions import ALL, NO_LEVEL, NO_STRATEGY, OWN_SCENARIO
from excise.errors import ExciseError
from excise.evaluation.bootstrap import percentile_interval
from excise.evaluation.grid import pareto
from excise.evaluation.metrics import ROUNDING
from excise.evaluation.overlap import chance_level, overlap_fraction
from excise.evaluation.thresholds import CATASTROPHIC

TOP_SHARE = 0.2
ALL_HEADS, ORDINARY_HEADS = "all", "without_catastrophic"
SCHEMA = {
    "model": pl.String,
    "scenario": pl.String,
    "measure": pl.String,
    "other_scenario": pl.String,
    "other_measure": pl.String,
    "heads": pl.String,
    "statistic": pl.String,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n": pl.Int64,
}
GAMMA_FLAGS = ("within_budget", "pareto", "chosen")

_IMPACTS = ("model", "scenario", "layer", "head", "perplexity_without", "z_ppl", "z_bias")
_POINTS = ("alpha", "gamma", "bias", "perplexity_ratio")
_ROUNDING = 1e-9
_CELLS_AT_ONCE = 1 << 20


def catastrophic(
    perplexity_without: NDArray[np.float64], among: NDArray[np.float64] | None = None
) -> NDArray[np.bool_]:
    """Heads that the model cannot do without, bool of the shape of `perplexity_without`.

    among: the perplexities whose median counts, where the heads asked for are not all. An unknown perplexity counts
    as catastrophic.
    """
    perplexity = np.asarray(perplexity_without, dtype=np.float64)
    among = perplexity if among is None else np.asarray(among, dtype=np.float64)
    known = among[np.isfinite(among)]
    with np.errstate(over="ignore"):
        limit = CATASTROPHIC * np.median(known) if len(known) else np.nan
    return ~(perplexity <= (limit if np.isfinite(limit) else np.nan))


def impact_correlations(impacts: pl.DataFrame, *, resamples: int = 1000, seed: int = 0) -> pl.DataFrame:
    """How head impacts go together, with and without catastrophic heads: long frame with the columns of `SCHEMA`.

    impacts: one row per model, scenario (axis) and head: model, scenario, layer, head, perplexity_without, z_ppl,
    z_bias (positive: the head is harmful) and, if known, mean_without, the mean toxicity without the head.

    Rows: for every two axes of a model, z_bias of one against z_bias of the other; for every axis its z_bias against
    z_ppl and against z_mean, the drop of mean toxicity when the head goes (with a positive sign like z_bias).
    heads: `all` or `without_catastrophic`, which leaves out a head that either axis finds catastrophic.
    statistic: pearson, spearman and, between axes, top_overlap (the share of one axis's most harmful fifth of the
    heads that is in the other's), top_chance (what unrelated rankings share) and top_excess (the difference).
    low, high: 95 % percentile interval over resampled heads, as a few outliers forbid Fisher's z; heads of one model
    are no random sample, so it tells how much hangs on single heads. n: heads with both measures. A correlation with
    a constant is null.

    Raises ExciseError for missing columns, no rows, and a head that an axis has twice.
    """
    lacking = [column for column in _IMPACTS if column not in impacts.columns]
    if lacking:
        raise ExciseError(f"head_impacts: columns {', '.join(lacking)} are missing")
    if impacts.is_empty():
        raise ExciseError("head_impacts: no rows; compute the impacts of the heads first")
    twice = impacts.filter(impacts.select("model", "scenario", "layer", "head").is_duplicated())
    if len(twice):
        head = twice.row(0, named=True)
        raise ExciseError(
            f"head_impacts: {head['model']}, {head['scenario']} has head {head['layer']}.{head['head']} twice; "
            "give one row per axis and head"
        )
    rows = []
    for (model,), of_model in impacts.partition_by("model", as_dict=True, maintain_order=True).items():
        for pair, first, second, ordinary in _pairs(of_model):
            for heads, kept in ((ALL_HEADS, np.ones(len(first), dtype=bool)), (ORDINARY_HEADS, ordinary)):
                for statistic, values in _statistics(first[kept], second[kept], pair[0] != pair[2], resamples, seed):
                    figures = (values[0], *percentile_interval(values[1:]))
                    estimate, low, high = (float(figure) if np.isfinite(figure) else None for figure in figures)
                    if statistic == "top_chance" or estimate is None:
                        low = high = None
                    rows.append((model, *pair, heads, statistic, estimate, low, high, int(kept.sum())))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _pairs(impacts: pl.DataFrame) -> Iterator[tuple[tuple[str, str, str, str], np.ndarray, np.ndarray, np.ndarray]]:
    """(scenario, measure, other scenario, other measure), both measures and the ordinary heads, each [heads]."""
    axes = {
        scenario: frame.sort("layer", "head")
        for (scenario,), frame in impacts.partition_by("scenario", as_dict=True, maintain_order=True).items()
    }
    for one, other in combinations(axes, 2):
        joint = axes[one].join(axes[other], on=["layer", "head"], suffix="_other", maintain_order="left")
        first, second = _numbers(joint, "z_bias"), _numbers(joint, "z_bias_other")
        wrecked = _wrecked(axes[one], joint, "") | _wrecked(axes[other], joint, "_other")
        yield (one, "z_bias", other, "z_bias"), *_known(first, second, ~wrecked)
    for scenario, axis in axes.items():
        bias, ordinary = _numbers(axis, "z_bias"), ~_wrecked(axis, axis, "")
        yield (scenario, "z_bias", scenario, "z_ppl"), *_known(bias, _numbers(axis, "z_ppl"), ordinary)
        if "mean_without" in axis.columns:
            # mean_with is the same for all heads: it moves no correlation
            yield (scenario, "z_bias", scenario, "z_mean"), *_known(bias, -_numbers(axis, "mean_without"), ordinary)


def _wrecked(axis: pl.DataFrame, joint: pl.DataFrame, suffix: str) -> NDArray[np.bool_]:
    return catastrophic(_numbers(joint, f"perplexity_without{suffix}"), _numbers(axis, "perplexity_without"))


def _known(first: np.ndarray, second: np.ndarray, ordinary: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    both = np.isfinite(first) & np.isfinite(second)
    return first[both], second[both], ordinary[both]


def _numbers(frame: pl.DataFrame, column: str) -> NDArray[np.float64]:
    return frame[column].cast(pl.Float64).fill_null(np.nan).to_numpy()


def _statistics(
    first: np.ndarray, second: np.ndarray, axes: bool, resamples: int, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(statistic, values [resamples + 1]), the estimate first; the same heads are drawn for all statistics."""
    heads = len(first)
    correlations: dict[str, list[np.ndarray]] = {}
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS_AT_ONCE // max(heads, 1))
    for start in range(0, resamples + 1, step):
        drawn = rng.integers(0, max(heads, 1), size=(min(step, resamples + 1 - start), heads))
        if start == 0:
            drawn[0] = np.arange(heads)
        # a resample names its heads in their order, so that equal scores are taken as in the sample
        drawn.sort(axis=1)
        one, other = first[drawn], second[drawn]
        correlations.setdefault("pearson", []).append(_pearson(one, other))
        correlations.setdefault("spearman", []).append(_spearman(one, other))
        if axes:
            tops = _top(one), _top(other)
            overlap = np.array([overlap_fraction(*rows) for rows in zip(*tops, strict=True)])
            chance = np.array([chance_level(row) for row in tops[1]])
            for name, values in (("overlap", overlap), ("chance", chance), ("excess", overlap - chance)):
                correlations.setdefault(f"top_{name}", []).append(values)
    for statistic, parts in correlations.items():
        yield statistic, np.concatenate(parts)


def _top(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The highest `TOP_SHARE` of every row, bool [rows, heads]; of equal scores the earlier head."""
    count = int(TOP_SHARE * scores.shape[1] + _ROUNDING)
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, chosen, True, axis=1)
    return mask


def _pearson(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation of each row's two measures, [rows]; NaN where one does not vary or there are fewer than 3 heads."""
    if first.shape[1] < 3:
        return np.full(len(first), np.nan)
    centred, sizes = [], []
    with np.errstate(over="ignore", invalid="ignore"):
        for values in (first, second):
            difference = values - values.mean(axis=1, keepdims=True)
            centred.append(difference)
            size = np.sqrt((difference**2).sum(axis=1))
            # a constant's deviations from its mean are rounding, not variation
            varies = np.isfinite(size) & (size > 1e-12 * np.abs(values).max(axis=1) * values.shape[1])
            sizes.append(np.where(varies, size, np.nan))
        return np.clip((centred[0] * centred[1]).sum(axis=1) / (sizes[0] * sizes[1]), -1.0, 1.0)


def _spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation of ranks, equal values sharing their mean rank, [rows]."""
    from scipy.stats import rankdata

    if first.shape[1] < 3:
        return np.full(len(first), np.nan)
    return _pearson(rankdata(first, axis=1), rankdata(second, axis=1))


def gamma_points(metrics: pl.DataFrame, parameters: Mapping[str, Mapping[str, float]]) -> pl.DataFrame:
    """The points (alpha, gamma) of an axis that `gamma_choice` chooses from, the unpruned model among them.

    metrics: rows of the table of that name, one model and scenario. parameters: of each strategy that FASP's rule
    selects for, alpha and gamma (0 where it has none). Returns model, scenario, strategy, alpha, gamma (null:
    unpruned), bias, bias_low, bias_high and perplexity_ratio, over all variations and with the axis' own masks; of
    strategies with the same alpha and gamma the first. The bias is null where the scores collapsed (spread_ratio 0).
    """
    whole = metrics.filter(variation=ALL).filter(
        pl.col("matched_to").is_null() & pl.col("level").is_in([NO_LEVEL, OWN_SCENARIO])
    )
    place = ["model", "scenario", "strategy"]
    bias = whole.filter(pl.col("metric") == "toxicity_bias").select(
        *place, bias="estimate", bias_low="low", bias_high="high"
    )
    ratio = whole.filter(pl.col("metric") == "perplexity_ratio").select(*place, perplexity_ratio="estimate")
    collapsed = whole.filter((pl.col("metric") == "spread_ratio") & (pl.col("estimate") <= ROUNDING))
    bias = bias.with_columns(
        pl.when(~pl.struct(place).is_in(collapsed.select(pl.struct(place)).to_series().implode()))
        .then(pl.col(name))
        .alias(name)
        for name in ("bias", "bias_low", "bias_high")
    )
    known: dict[str, tuple[float, float | None]] = {NO_STRATEGY: (0.0, None)}
    known |= {key: (settings["alpha"], settings.get("gamma", 0.0)) for key, settings in parameters.items()}
    strategies = pl.DataFrame(
        [(key, *point) for key, point in known.items()],
        schema={"strategy": pl.String, "alpha": pl.Float64, "gamma": pl.Float64},
        orient="row",
    )
    rows = strategies.join(bias, on="strategy", maintain_order="left").join(ratio, on=place, how="left")
    rows = rows.with_columns(perplexity_ratio=pl.when(strategy=NO_STRATEGY).then(1.0).otherwise("perplexity_ratio"))
    names = [*place, "alpha", "gamma", "bias", "bias_low", "bias_high", "perplexity_ratio"]
    return rows.unique(["alpha", "gamma"], keep="first", maintain_order=True).select(names)


def gamma_choice(rows: pl.DataFrame, budget: float) -> pl.DataFrame:
    """Mark the points (alpha, gamma) that matter: the same frame with the columns of `GAMMA_FLAGS` (method, B4).

    rows: alpha, gamma, bias and perplexity_ratio (pruned over unpruned) of each point and whatever else; columns model
    and scenario, where there are any, tell searches apart. budget: perplexity may rise by this share, .05 = 5 %.

    within_budget: perplexity_ratio <= 1 + budget. chosen: the point with the lowest bias within the budget, one for
    each model and scenario; of equal biases the one of lower perplexity, then of lower alpha, then of higher gamma;
    none where no point is within the budget, so put the unpruned model (alpha 0) among the points. pareto: no other
    point is at least as good in bias and in perplexity and better in one. A point without either figure is neither.

    Raises ExciseError for missing columns and a negative budget.
    """
    lacking = [column for column in _POINTS if column not in rows.columns]
    if lacking:
        raise ExciseError(f"gamma_choice: columns {', '.join(lacking)} are missing")
    if not budget >= 0:
        raise ExciseError(f"gamma_choice: budget is {budget}; give the share by which perplexity may rise: 0.05")
    keys = [key for key in ("model", "scenario") if key in rows.columns]
    points = rows.drop([flag for flag in GAMMA_FLAGS if flag in rows.columns]).with_row_index("_row")
    parts = points.partition_by(keys, maintain_order=True) if keys else [points]
    marked = pl.concat([_marked(part, budget) for part in parts]) if len(points) else _marked(points, budget)
    return marked.sort("_row").drop("_row")


def _marked(points: pl.DataFrame, budget: float) -> pl.DataFrame:
    bias, ratio = _numbers(points, "bias"), _numbers(points, "perplexity_ratio")
    allowed = np.isfinite(bias) & (ratio <= (1 + budget) * (1 + _ROUNDING))
    chosen = np.zeros(len(points), dtype=bool)
    if allowed.any():
        lowest = bias[allowed].min()
        equals = np.flatnonzero(allowed & (bias <= lowest + _ROUNDING * max(1.0, abs(lowest))))
        order = (ratio, _numbers(points, "alpha"), -_numbers(points, "gamma"))
        chosen[min(equals, key=lambda row: tuple(column[row] for column in order))] = True
    front = pareto(pl.DataFrame({"abs_smd": bias, "inlier_ratio": -ratio}))
    return points.with_columns(
        within_budget=pl.Series(allowed, dtype=pl.Boolean),
        pareto=pl.Series(front, dtype=pl.Boolean),
        chosen=pl.Series(chosen, dtype=pl.Boolean),
    )
