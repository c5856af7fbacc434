"""From scored continuations to the metrics table: how unevenly an axis's subgroups are answered, before and after.

Here: the bias of a toxicity axis (FASP, section 3; method, B1 and B2), its noise, its intervals and its tests, for the
unpruned model and every mask. Not here: scoring (`excise.outcomes.toxicity`), text perplexity, and gaps of numeric
answers, which `excise.evaluation.numbers` measures into the same columns. Descriptors and templates are resampled,
never single continuations, and the same resamples serve all masks, so that a reduction is a paired comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from excise.conditions import ALL, COLUMNS, RANDOM, UNPRUNED, Condition
from excise.errors import ExciseError
from excise.evaluation import bootstrap, permutation
from excise.evaluation import metrics as m
from excise.evaluation.cells import Spread, require_table, single_value, spread_of, spread_ratio
from excise.evaluation.metrics import folded_noise
from excise.evaluation.numbers import mask_densities
from excise.evaluation.rows import SCHEMA, MetricRows, finite_or_none, mean_over_draws, reduction_of

CLUSTERS = ("subject", "template", "both")
_COMPLETIONS = ("model", "scenario", "variation", "template", "group", "subject", "prompt_id", "sample", "value")
_PERPLEXITY = (*COLUMNS, "variation", "draw", "perplexity", "low", "high")
_SUBJECTS, _TEMPLATES, _LABELS = range(3)  # streams of random numbers
_WINSORIZE = (0.05, 0.95)  # of a subgroup's scores, for their spread
_CELLS_AT_ONCE = 1 << 22

__all__ = ["CLUSTERS", "SCHEMA", "bias_from_sums", "debiased_bias", "evaluate_toxicity", "folded_noise"]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def bias_from_sums(sums: ArrayLike, counts: ArrayLike) -> NDArray[np.float64]:
    """sum_s |t_axis - t_s| from each subgroup's sum and number of scores (FASP, section 3; method, B1).

    sums, counts: [..., subgroups]; returns [...]. Equals `excise.evaluation.metrics.toxicity_bias` of the scores
    written out. NaN where a subgroup has no score: a sum over fewer subgroups is another quantity. NaN without
    subgroups, too.
    """
    deviations = _deviations(np.asarray(sums, np.float64), np.asarray(counts, np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        bias = np.abs(deviations).sum(axis=-1)
    return np.where(np.isfinite(bias) & (deviations.shape[-1] > 0), bias, np.nan)


def debiased_bias(deviations: ArrayLike, variances: ArrayLike) -> NDArray[np.float64]:
    """sum_s |d_s| less its `folded_noise`, [...]. May be negative: then there is less than noise alone would give."""
    with np.errstate(over="ignore", invalid="ignore"):
        debiased = np.abs(np.asarray(deviations, np.float64)).sum(axis=-1) - folded_noise(deviations, variances)
    return np.where(np.isfinite(debiased), debiased, np.nan)


def _deviations(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """t_s - t_axis, [..., subgroups]."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return sums / counts - sums.sum(axis=-1, keepdims=True) / counts.sum(axis=-1, keepdims=True)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole == 0, np.nan, part / whole)


# --- the axis: its descriptors and templates, and how they are resampled ----------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """What all tables of an axis share.

    subjects: (subgroup, descriptor) in order of the subgroups; group: subgroup number of each, int [subjects];
    subject_weights [resamples + 1, subjects] and template_weights [resamples + 1, templates]: how often each resample
    draws them, row 0 the sample itself; None: not resampled.
    """

    subgroups: tuple[str, ...]
    subjects: dict[tuple[str, str], int]
    templates: dict[str, int]
    group: NDArray[np.int64]
    subject_weights: NDArray[np.float64] | None
    template_weights: NDArray[np.float64] | None
    resamples: int

    @property
    def member(self) -> NDArray[np.float64]:
        """1 where the subject is of the subgroup, [subjects, subgroups]."""
        return (self.group[:, None] == np.arange(len(self.subgroups))).astype(np.float64)

    @property
    def resampled(self) -> bool:
        """One descriptor of a subgroup, or one template, leaves nothing to resample."""
        counts = np.bincount(self.group, minlength=len(self.subgroups))
        return (self.subject_weights is None or counts.min() >= 2) and (
            self.template_weights is None or len(self.templates) >= 2
        )

    def weighted(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over a table [subjects, templates] per resample and subgroup, [resamples + 1, subgroups]."""
        if self.template_weights is None:
            return self.subject_weights @ (table.sum(axis=1)[:, None] * self.member)
        if self.subject_weights is None:
            return self.template_weights @ (self.member.T @ table).T
        result = np.empty((self.resamples + 1, len(self.subgroups)))
        step = max(1, _CELLS_AT_ONCE // max(table.shape))
        for start in range(0, len(result), step):
            rows = slice(start, start + step)
            result[rows] = ((self.template_weights[rows] @ table.T) * self.subject_weights[rows]) @ self.member
        return result


@dataclass(frozen=True)
class _Scores:
    """Scores of one variation (or several) under one mask, summed per subject and template, float64 [subjects,
    templates] each: sum of the scores, number of scores, scores above the threshold, continuations. spread_ratio: share
    of the unpruned scores' spread that is left, the smallest over subgroups and variations; infinite where there was
    none."""

    total: NDArray[np.float64]
    scored: NDArray[np.float64]
    toxic: NDArray[np.float64]
    answers: NDArray[np.float64]
    spread_ratio: float

    def __add__(self, other: "_Scores") -> "_Scores":
        return _Scores(
            self.total + other.total,
            self.scored + other.scored,
            self.toxic + other.toxic,
            self.answers + other.answers,
            float(np.minimum(self.spread_ratio, other.spread_ratio)),
        )

    @property
    def collapsed(self) -> bool:
        """Whether a subgroup's scores became all the same, or are too few to tell."""
        return not self.spread_ratio > m.ROUNDING


def _axis(completions: pl.DataFrame, subgroups: Sequence[str], cluster: str, resamples: int, seed: int) -> _Axis:
    subjects: dict[tuple[str, str], int] = {}
    group: list[int] = []
    weights: list[np.ndarray] = []
    for number, name in enumerate(subgroups):
        found = sorted(completions.filter(pl.col("group") == name)["subject"].unique().to_list())
        for subject in found:
            subjects[name, subject] = len(subjects)
        group += [number] * len(found)
        weights.append(
            bootstrap.resampled_names(len(found), resamples, np.random.default_rng([seed, _SUBJECTS, number]))
        )
    templates = sorted(completions["template"].unique().to_list())
    drawn = bootstrap.resampled_names(len(templates), resamples, np.random.default_rng([seed, _TEMPLATES]))
    return _Axis(
        tuple(subgroups),
        subjects,
        {template: number for number, template in enumerate(templates)},
        np.array(group),
        None if cluster == "template" else np.hstack(weights),
        None if cluster == "subject" else drawn,
        resamples,
    )


def _spreads(frame: pl.DataFrame, axis: _Axis, before: Sequence[Spread] | None = None) -> tuple[Spread, ...]:
    """Standard deviation of each subgroup's scores, clipped as those of the unpruned model, `before`."""
    one, found = np.ones((1, 1)), []
    for number, name in enumerate(axis.subgroups):
        values = frame.filter(pl.col("group") == name)["value"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        sample = bootstrap.named_answers(values, np.zeros(len(values)), 1)
        moments = bootstrap.weighted_moments(sample, one, _WINSORIZE)
        found.append(spread_of(sample, one, moments, _WINSORIZE, None if before is None else before[number]))
    return tuple(found)


def _scores(
    frame: pl.DataFrame,
    axis: _Axis,
    threshold: float,
    where: str,
    column: str = "value",
    before: Sequence[Spread] | None = None,
) -> _Scores:
    """Sum up a frame of continuations. before: spreads of the unpruned model's, under a mask.

    Raises ExciseError for what the unpruned completions do not have.
    """
    lacking = [name for name in axis.subgroups if name not in set(frame["group"].unique())]
    if lacking:
        raise ExciseError(f"{where}: no completions for the subgroup {lacking[0]!r}; sample it, or leave it out")
    value = pl.col(column).cast(pl.Float64)
    value = pl.when(value.is_finite()).then(value)
    sums = frame.group_by("group", "subject", "template").agg(
        value.sum().alias("total"),
        value.count().cast(pl.Float64).alias("scored"),
        (value > threshold).sum().cast(pl.Float64).alias("toxic"),
        pl.len().cast(pl.Float64).alias("answers"),
    )
    rows = [axis.subjects.get(key) for key in sums.select("group", "subject").iter_rows()]
    columns = [axis.templates.get(template) for template in sums["template"]]
    for found, column in ((rows, "subject"), (columns, "template")):
        if None in found:
            unknown = sums[column][found.index(None)]
            raise ExciseError(f"{where}: {column} {unknown} has no unpruned completions; sample the unpruned model")
    tables = []
    for name in ("total", "scored", "toxic", "answers"):
        table = np.zeros((len(axis.subjects), len(axis.templates)))
        table[rows, columns] = sums[name].to_numpy()
        tables.append(table)
    ratio = np.inf
    if before is not None:
        after = _spreads(frame, axis, before)
        ratio = float(np.min([spread_ratio(*each)[0] for each in zip(after, before, strict=True)]))
    return _Scores(*tables, ratio)


# --- noise and permutations -------------------------------------------------------------------------------------------


def _noise(scores: _Scores, axis: _Axis) -> NDArray[np.float64]:
    """Sampling variances of t_s - t_axis from the spread of the clusters, [subgroups]; NaN where it is unknown.

    Descriptors of all subgroups are taken to spread alike, as a subgroup's own two or three say little. Templates are
    crossed with the subgroups, so a template's contributions to all of them are kept together. For both, the two
    variances are added less that of single prompts, which either holds already (Cameron, Gelbach & Miller 2011).
    """
    count = scores.scored.sum(axis=1) @ axis.member
    mean = _ratio(scores.total.sum(axis=1) @ axis.member, count)
    # How much the residual of every cell moves every deviation: linear in the residuals, [subjects, subgroups].
    pull = _ratio(axis.member, count) - 1 / max(count.sum(), 1)
    residual = scores.total - scores.scored * mean[axis.group][:, None]
    parts = []
    if axis.subject_weights is not None:
        parts.append(_stratified(residual.sum(axis=1), scores.scored.sum(axis=1), axis.group, pull))
    if axis.template_weights is not None:
        moved = residual.T @ pull
        filled = int((scores.scored.sum(axis=0) > 0).sum())
        parts.append((moved**2).sum(axis=0) * filled / (filled - 1) if filled > 1 else np.full(len(count), np.nan))
    if len(parts) == 1:
        return parts[0]
    there = scores.scored > 0
    group = np.broadcast_to(axis.group[:, None], there.shape)[there]
    every = np.broadcast_to(pull[:, None, :], (*there.shape, len(count)))[there]
    return np.maximum(sum(parts) - _stratified(residual[there], scores.scored[there], group, every), np.max(parts, 0))


def _stratified(residual: np.ndarray, weight: np.ndarray, group: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """Variance of sum_u residual_u pull_us [subgroups], the clusters' spread pooled over the subgroups' own means."""
    used = weight > 0
    freedom = int(used.sum()) - len(np.unique(group[used]))
    if freedom < 1:
        return np.full(pull.shape[1], np.nan)
    # A cluster's mean varies alike in all subgroups; a cluster of more scores pulls harder, but is no more certain.
    spread = ((residual[used] / weight[used]) ** 2).sum() / freedom
    return spread * ((weight[:, None] * pull) ** 2).sum(axis=0)


def _permuted_biases(scores: _Scores, axis: _Axis, draws: int, seed: int) -> NDArray[np.float64] | None:
    """The bias under random labels, [draws]: descriptors change their subgroups, which keep their numbers of them.

    Where templates alone are resampled the descriptors of every template are relabelled by themselves. None where
    labels cannot matter: one descriptor in each subgroup, moved as a whole, gives the same bias under any label.
    """
    within = axis.subject_weights is None
    units, templates = scores.total.shape
    asked = np.flatnonzero(scores.answers.any(axis=1))  # of this variation: others must not take their labels
    if len(asked) == len(axis.subgroups) and not (within and templates > 1):
        return None
    # One stream for each template, so that no draw depends on how many are made at a time.
    streams = [np.random.default_rng([seed, _LABELS, *place]) for place in (np.ndindex(templates) if within else [()])]
    result = np.empty(draws)
    step = max(1, _CELLS_AT_ONCE // scores.total.size)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        if within:
            # A template may lack some subjects: only those it has change places, so labels keep their numbers there.
            order = np.broadcast_to(np.arange(units)[:, None], (size, units, templates)).copy()
            for template in range(templates):
                there = np.flatnonzero(scores.answers[:, template] > 0)
                order[:, there, template] = streams[template].permuted(
                    np.broadcast_to(there, (size, len(there))), axis=1
                )
            sums, counts = (
                np.einsum("dut,us->ds", np.take_along_axis(table[None], order, axis=1), axis.member)
                for table in (scores.total, scores.scored)
            )
        else:
            order = streams[0].permuted(np.broadcast_to(asked, (size, len(asked))), axis=1)
            sums, counts = (table.sum(axis=1)[order] @ axis.member[asked] for table in (scores.total, scores.scored))
        result[start : start + size] = bias_from_sums(sums, counts)
    return result


# --- measures ---------------------------------------------------------------------------------------------------------


def _bias_measures(scores: _Scores, axis: _Axis) -> dict[str, np.ndarray]:
    """The bias of a table and the mean, each [resamples + 1], the estimate first."""
    sums, counts = axis.weighted(scores.total), axis.weighted(scores.scored)
    deviations = _deviations(sums, counts)
    bias = np.abs(deviations).sum(axis=1)
    debiased = debiased_bias(deviations, _noise(scores, axis))
    # A resample scatters around the sample, whose bias is the truth there: its error is carried over to the estimate.
    debiased[1:] += debiased[0] - bias[0]
    mean = _ratio(sums.sum(axis=1), counts.sum(axis=1))
    measures = {
        "toxicity_bias": bias,
        "toxicity_bias_debiased": debiased,
        "toxicity_bias_mean": bias / len(axis.subgroups),
        "toxicity_bias_relative": _ratio(bias, mean),
        "mean_toxicity": mean,
        "share_toxic": _ratio(axis.weighted(scores.toxic).sum(axis=1), counts.sum(axis=1)),
        "share_scored": _ratio(counts.sum(axis=1), axis.weighted(scores.answers).sum(axis=1)),
    }
    return measures | {
        f"mean_toxicity/{name}": _ratio(sums[:, number], counts[:, number])
        for number, name in enumerate(axis.subgroups)
    }


def _counted(scores: _Scores, axis: _Axis, metric: str) -> int:
    """Continuations behind a metric: all for share_scored, else those with a score."""
    if metric == "share_scored":
        return int(scores.answers.sum())
    name = metric.removeprefix("mean_toxicity/")
    if name != metric:
        return int(scores.scored[axis.group == axis.subgroups.index(name)].sum())
    return int(scores.scored.sum())


def _names_behind(parts: Sequence[_Scores], axis: _Axis, metric: str) -> int:
    """What is resampled behind a metric, the fewest over the parts: descriptors of the subgroup that has fewest,
    templates, or the fewer of both."""
    found = []
    for scores in parts:
        there = (scores.answers if metric == "share_scored" else scores.scored) > 0
        if axis.subject_weights is not None:
            found.append(int((there.any(axis=1) @ axis.member).min()))
        if axis.template_weights is not None:
            found.append(int(there.any(axis=0).sum()))
    return min(found)


def _pooled(parts: Sequence[_Scores]) -> _Scores:
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


# --- the table --------------------------------------------------------------------------------------------------------


def evaluate_toxicity(
    completions: pl.DataFrame,
    pruned: pl.DataFrame,
    masks: pl.DataFrame,
    perplexity: pl.DataFrame | None = None,
    *,
    subgroups: Sequence[str],
    cluster: Literal["subject", "template", "both"] = "subject",
    resamples: int = 2000,
    seed: int = 0,
    threshold: float = 0.5,
) -> pl.DataFrame:
    """The metrics of one model and toxicity axis: long frame with the columns of `SCHEMA` (method, B1, B2 and B8).

    completions: model, scenario, variation, template, group (the subgroup), subject (the descriptor), prompt_id,
    sample, value (toxicity in [0, 1]; null or not finite = unscored) and, if the scorer read the prompts alone,
    prompt_value. pruned: the same plus strategy, level, matched_to, draw. masks: the table of that name. `pruned` and
    `masks` may be empty. perplexity: strategy, level, matched_to, variation ("(all)" serves every variation), draw,
    perplexity, low, high and, if known, difference_low, difference_high: the interval, paired over text windows, of
    the perplexity less the unpruned one. subgroups: keys in `group`; others are left out. threshold: a score above it
    counts as toxic. cluster: what is resampled and permuted: descriptors within their subgroup, templates (drawn
    together for all subgroups, which share them), or both, independently.

    Rows: one per variation, condition (strategy, level, matched_to) and metric, and "(all)", where the prompts of all
    variations of the condition are pooled (not a mean over variations). Nothing is NaN: what is unknown is null.
      * toxicity_bias = sum_s |t_axis - t_s|. toxicity_bias_debiased: less its `folded_noise`. toxicity_bias_mean: over
        the number of subgroups. toxicity_bias_relative: over mean_toxicity. All are null where a subgroup has no score.
      * mean_toxicity, mean_toxicity/<subgroup>, share_toxic: of the scored continuations. share_scored: of all.
      * prompt_toxicity_bias, prompt_mean_toxicity (unpruned): of the prompts alone, each once: the scorer's own gap.
      * toxicity_bias_if_equal (unpruned): the bias when labels do not matter, mean and 95 % of the permutations.
        all_equal_covered: 1 where the observed bias is not above 95 % of them, else 0.
      * spread_ratio (pruned): standard deviation of a subgroup's scores over that of the unpruned ones, the smallest of
        the subgroups', over draws and variations. Clipped at the 5th and 95th percentile. Null where the unpruned
        scores do not vary. Unlike those of numbers, scores may well keep a small part of their spread: that of a model
        that is hardly ever toxic any more.
      * bias_reduction = 1 - bias / unpruned bias; null where spread_ratio is 0, as a model that writes the same for
        every subgroup has no bias, and no use. reduction_over_random: minus the mean reduction of the random draws
        matched to the strategy at this level (to a control: those of its strategy), null where one collapsed.
        bias_change and mean_toxicity_change: pruned less unpruned, so that negative is better.
      * perplexity; perplexity_ratio: over the unpruned one. Several draws or variations: their mean, the bounds are the
        outermost.
      * density: the share of the weights (or heads) that is pruned, as in `excise.evaluation.numbers`.
      * estimate: of all continuations; for several draws of a control, the mean over the draws, null if one lacks it.
      * low, high: 95 % percentile interval over resampled clusters (and draws, if several), the same ones for all
        masks. Null if a subgroup has one descriptor, or if there is one template, and then so are the reductions.
        That of toxicity_bias never reaches 0, as noise only adds to it: look at the debiased one and all_equal_covered.
      * p_value on toxicity_bias of the unpruned model: subgroup labels do not matter (`resamples` permutations of the
        descriptors over the subgroups, one-sided). p_holm: adjusted over the variations.
      * n: continuations counted, of all draws; draws for perplexity, masks for density.
      * names: what is resampled and has a score (share_scored: a continuation): descriptors of the subgroup with the
        fewest, or templates, or the fewer of both; the fewest over draws and, for changes and reductions, the unpruned
        continuations. Null for perplexity and density.

    Raises ExciseError for missing columns, fewer than two subgroups, more than one model or scenario, an unknown
    cluster, and a variation without a subgroup's completions.
    """
    if cluster not in CLUSTERS:
        raise ExciseError(f"evaluate_toxicity: cluster {cluster!r} is not known; use one of {', '.join(CLUSTERS)}")
    if len(set(subgroups)) < 2 or len(set(subgroups)) != len(subgroups):
        raise ExciseError(f"evaluate_toxicity: subgroups are {list(subgroups)}; name at least two, each once")
    if resamples < 1:
        raise ExciseError(f"evaluate_toxicity: resamples is {resamples}; it must be 1 at least")
    require_table(completions, _COMPLETIONS, "completions")
    model, scenario = single_value(completions, "model"), single_value(completions, "scenario")
    if not pruned.is_empty():
        require_table(pruned, (*_COMPLETIONS, *COLUMNS, "draw"), "pruned completions")
        if (single_value(pruned, "model"), single_value(pruned, "scenario")) != (model, scenario):
            raise ExciseError(f"evaluate_toxicity: the pruned completions are not those of {model}, {scenario}")
        pruned = pruned.filter(pl.col("group").is_in(list(subgroups)))
    known = completions["group"].unique()
    for name in subgroups:
        if name not in known:
            listed = ", ".join(sorted(map(str, known)))
            raise ExciseError(f"{scenario}: no completions for the subgroup {name!r}; the groups are {listed}")
    completions = completions.filter(pl.col("group").is_in(list(subgroups)))
    axis = _axis(completions, subgroups, cluster, resamples, seed)

    variations = completions.partition_by("variation", as_dict=True, maintain_order=True)
    unpruned = {name: _scores(frame, axis, threshold, f"{scenario}/{name}") for (name,), frame in variations.items()}
    spreads = {name: _spreads(frame, axis) for (name,), frame in variations.items()}
    conditions: dict[Condition, dict[str, dict[object, _Scores]]] = {}
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
        drawn = conditions.setdefault(tuple(condition), {}).setdefault(variation, {})
        drawn[draw] = _scores(frame, axis, threshold, where, before=spreads[variation])

    table = MetricRows(model, scenario, axis.resampled)
    texts = _perplexities(perplexity)
    prompts = {}
    if "prompt_value" in completions.columns:
        prompts = {
            name: _scores(frame.unique("prompt_id", keep="first"), axis, threshold, scenario, "prompt_value")
            for (name,), frame in variations.items()
        }
    for variation in [*unpruned, ALL]:
        _unpruned_rows(table, axis, variation, _of(unpruned, variation), _of(prompts, variation), texts, seed)
    densities = mask_densities(masks, model, scenario)
    measured = _Measured(axis, unpruned, seed)
    for condition, by_variation in conditions.items():
        strategy, level, matched_to = condition
        controls = {} if strategy == RANDOM else conditions.get((RANDOM, level, matched_to or strategy), {})
        for variation in [*by_variation, ALL]:
            chosen = list(by_variation) if variation == ALL else [variation]
            _pruned_rows(table, measured, condition, variation, by_variation, controls, chosen)
            _perplexity_rows(table, texts, variation, condition)
            shares = [share for name in chosen for share in densities.get((condition, name), [])]
            table.add(variation, condition, "density", float(np.mean(shares)) if shares else None, len(shares))
    return table.frame()


def _of(scores: dict[str, _Scores], variation: str) -> _Scores | None:
    if not scores:
        return None
    return _pooled(list(scores.values())) if variation == ALL else scores[variation]


def _unpruned_rows(
    table: MetricRows, axis: _Axis, variation: str, scores: _Scores, prompts: _Scores | None, texts: dict, seed: int
) -> None:
    permuted = _permuted_biases(scores, axis, axis.resamples, seed)
    for metric, values in _bias_measures(scores, axis).items():
        p_value = None
        if metric == "toxicity_bias" and permuted is not None and np.isfinite(values[0]):
            p_value = permutation.permutation_p_value(float(values[0]), permuted)
        n, names = _counted(scores, axis, metric), _names_behind([scores], axis, metric)
        table.add(variation, UNPRUNED, metric, values, n, p_value, names=names)
        if p_value is not None:
            _equal_rows(table, variation, float(values[0]), permuted, n, names)
    if prompts is not None:
        found = _bias_measures(prompts, axis)
        for metric, source in (("prompt_toxicity_bias", "toxicity_bias"), ("prompt_mean_toxicity", "mean_toxicity")):
            names = _names_behind([prompts], axis, metric)
            table.add(variation, UNPRUNED, metric, found[source], int(prompts.scored.sum()), names=names)
    _perplexity_rows(table, texts, variation, UNPRUNED)
    table.add(variation, UNPRUNED, "density", 0.0, 0)


def _equal_rows(table: MetricRows, variation: str, bias: float, permuted: np.ndarray, n: int, names: int) -> None:
    known = permuted[np.isfinite(permuted)]
    if len(known) < 0.95 * len(permuted):
        return  # the others could lie anywhere, and so could the percentiles
    table.add(variation, UNPRUNED, "toxicity_bias_if_equal", float(known.mean()), n, names=names)
    _bounds(table, *np.quantile(known, (0.025, 0.975)))
    # sums of the same numbers in another order may differ in the last digits
    covered = bias <= np.quantile(known, 0.95) * (1 + 1e-9)
    table.add(variation, UNPRUNED, "all_equal_covered", float(covered), n, names=names)


def _bounds(table: MetricRows, low: float | None, high: float | None) -> None:
    """Give the last row bounds that do not come from resampled clusters; none where its estimate is not defined."""
    if table.rows[-1]["estimate"] is not None:
        table.rows[-1] |= {"low": finite_or_none(low), "high": finite_or_none(high)}


@dataclass(frozen=True)
class _Measured:
    """Unpruned scores and what is needed to measure any set of variations under any mask."""

    axis: _Axis
    unpruned: dict[str, _Scores]
    seed: int

    def before(self, chosen: Sequence[str]) -> dict[str, np.ndarray]:
        return _bias_measures(_pooled([self.unpruned[name] for name in chosen]), self.axis)

    def after(self, drawn: dict[str, dict[object, _Scores]], chosen: Sequence[str]) -> list[_Scores]:
        """Scores of every draw over the variations, pooled; a draw that one of them lacks is left out."""
        shared = [draw for draw in drawn[chosen[0]] if all(draw in drawn[name] for name in chosen)]
        return [_pooled([drawn[name][draw] for name in chosen]) for draw in shared]

    def reduction(
        self, drawn: dict[str, dict[object, _Scores]], chosen: Sequence[str], before: np.ndarray
    ) -> np.ndarray | None:
        """1 - bias pruned / bias unpruned, [resamples + 1]; the bias of several draws is their mean. None: no draw, or
        one whose scores collapsed."""
        draws = self.after(drawn, chosen)
        if not draws or any(each.collapsed for each in draws):
            return None
        biases = [bias_from_sums(self.axis.weighted(each.total), self.axis.weighted(each.scored)) for each in draws]
        return reduction_of(before, mean_over_draws(biases, self.seed))


def _pruned_rows(
    table: MetricRows,
    measured: _Measured,
    condition: Condition,
    variation: str,
    own: dict[str, dict[object, _Scores]],
    controls: dict[str, dict[object, _Scores]],
    chosen: Sequence[str],
) -> None:
    draws = measured.after(own, chosen)
    if not draws:
        return
    found = [_bias_measures(each, measured.axis) for each in draws]
    before = measured.before(chosen)
    values = {metric: mean_over_draws([each[metric] for each in found], measured.seed) for metric in found[0]}
    bias = before["toxicity_bias"]
    values["bias_change"] = m.exact_difference(values["toxicity_bias"], bias)
    values["mean_toxicity_change"] = m.exact_difference(values["mean_toxicity"], before["mean_toxicity"])
    values["spread_ratio"] = min(each.spread_ratio for each in draws)
    collapsed = any(each.collapsed for each in draws)
    values["bias_reduction"] = None if collapsed else reduction_of(bias, values["toxicity_bias"])
    matched = [name for name in chosen if name in controls]
    if matched:
        base = bias if matched == list(chosen) else measured.before(matched)["toxicity_bias"]
        random = measured.reduction(controls, matched, base)
        mine = values["bias_reduction"] if matched == list(chosen) else measured.reduction(own, matched, base)
        values["reduction_over_random"] = None if mine is None or random is None else mine - random
    reference = [_pooled([measured.unpruned[name] for name in chosen])]
    for metric, array in values.items():
        n = sum(_counted(each, measured.axis, metric) for each in draws)
        changed = metric.endswith("_change") or "reduction" in metric
        names = _names_behind([*draws, *(reference if changed else [])], measured.axis, metric)
        table.add(variation, condition, metric, array, n, names=names)


# --- perplexity -------------------------------------------------------------------------------------------------------


def _perplexities(frame: pl.DataFrame | None) -> dict[tuple[Condition, str], list[dict]]:
    """Rows of the perplexity frame by condition and variation."""
    if frame is None or frame.is_empty():
        return {}
    require_table(frame, _PERPLEXITY, "perplexities")
    rows: dict[tuple[Condition, str], list[dict]] = {}
    for row in frame.sort("draw", maintain_order=True).iter_rows(named=True):
        # One that is not known must not leave the mean to the others.
        known = row["perplexity"] is not None and np.isfinite(row["perplexity"])
        row["perplexity"] = row["perplexity"] if known else np.nan
        rows.setdefault((tuple(row[key] for key in COLUMNS), row["variation"] or ALL), []).append(row)
    return rows


def _found(texts: dict[tuple[Condition, str], list[dict]], condition: Condition, variation: str) -> list[dict]:
    """A variation's rows, else those for all; for all without rows of its own, those of every variation."""
    known = texts.get((condition, variation)) or texts.get((condition, ALL))
    if known is None and variation == ALL:
        known = [row for (each, _), rows in texts.items() if each == condition for row in rows]
    return known or []


def _perplexity_rows(table: MetricRows, texts: dict, variation: str, condition: Condition) -> None:
    rows = _found(texts, condition, variation)
    if not rows:
        return
    mean = float(np.mean([row["perplexity"] for row in rows]))
    table.add(variation, condition, "perplexity", mean, len(rows))
    _bounds(table, *_outermost(rows, "low", "high"))
    unpruned = _found(texts, UNPRUNED, variation)
    if not unpruned:
        return
    base = float(np.mean([row["perplexity"] for row in unpruned]))
    base = base if base > 0 else np.nan
    table.add(variation, condition, "perplexity_ratio", mean / base, len(rows))
    if condition != UNPRUNED:
        low, high = _outermost(rows, "difference_low", "difference_high")
        _bounds(table, None if low is None else 1 + low / base, None if high is None else 1 + high / base)


def _outermost(rows: Sequence[dict], low: str, high: str) -> tuple[float | None, float | None]:
    lows, highs = [row.get(low) for row in rows], [row.get(high) for row in rows]
    return (None if None in lows else min(lows)), (None if None in highs else max(highs))
