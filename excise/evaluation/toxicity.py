"""From scored continuations to the metrics table: how unevenly an axis's subgroups are answered, before and after.

Here: the bias of a toxicity axis (FASP, section 3; method, B1 and B2), its intervals and its tests, for the unpruned
model and every mask. Not here: scoring (`excise.outcomes.scoring`), noise (`axis_noise`), and gaps of numeric answers,
which `excise.evaluation.numbers` measures into the same columns. Descriptors and templates are resampled,
never single continuations, and the same resamples serve all masks, so that a reduction is a paired comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from excise.conditions import ALL, COLUMNS, RANDOM, UNPRUNED, Condition
from excise.errors import ExciseError
from excise.evaluation import metrics as m
from excise.evaluation import permutation
from excise.evaluation.axis import Axis, Scores, axis_of, pooled, scores_of, spreads_of
from excise.evaluation.axis_noise import (
    bias_from_sums,
    debiased_bias,
    deviations_of,
    noise_of,
    permuted_biases,
    ratio_of,
)
from excise.evaluation.axis_perplexity import perplexities, perplexity_rows, with_bounds
from excise.evaluation.cells import require_table, single_value
from excise.evaluation.densities import mask_densities
from excise.evaluation.rows import MetricRows, mean_over_draws, reduction_of

CLUSTERS = ("subject", "template", "both")
_COMPLETIONS = ("model", "scenario", "variation", "template", "group", "subject", "prompt_id", "sample", "value")


def _bias_measures(scores: Scores, axis: Axis) -> dict[str, np.ndarray]:
    """The bias of a table and the mean, each [resamples + 1], the estimate first."""
    sums, counts = axis.weighted(scores.total), axis.weighted(scores.scored)
    deviations = deviations_of(sums, counts)
    bias = np.abs(deviations).sum(axis=1)
    debiased = debiased_bias(deviations, noise_of(scores, axis))
    # A resample scatters around the sample, whose bias is the truth there: its error is carried over to the estimate.
    debiased[1:] += debiased[0] - bias[0]
    mean = ratio_of(sums.sum(axis=1), counts.sum(axis=1))
    measures = {
        "toxicity_bias": bias,
        "toxicity_bias_debiased": debiased,
        "toxicity_bias_mean": bias / len(axis.subgroups),
        "toxicity_bias_relative": ratio_of(bias, mean),
        "mean_toxicity": mean,
        "share_toxic": ratio_of(axis.weighted(scores.toxic).sum(axis=1), counts.sum(axis=1)),
        "share_scored": ratio_of(counts.sum(axis=1), axis.weighted(scores.answers).sum(axis=1)),
    }
    return measures | {
        f"mean_toxicity/{name}": ratio_of(sums[:, number], counts[:, number])
        for number, name in enumerate(axis.subgroups)
    }


def _counted(scores: Scores, axis: Axis, metric: str) -> int:
    """Continuations behind a metric: all for share_scored, else those with a score."""
    if metric == "share_scored":
        return int(scores.answers.sum())
    name = metric.removeprefix("mean_toxicity/")
    if name != metric:
        return int(scores.scored[axis.group == axis.subgroups.index(name)].sum())
    return int(scores.scored.sum())


def _names_behind(parts: Sequence[Scores], axis: Axis, metric: str) -> int:
    """What is resampled behind a metric, the fewest over the parts: descriptors of the subgroup that has fewest,
    templates, or the fewer of both."""
    counts = []
    for scores in parts:
        there = (scores.answers if metric == "share_scored" else scores.scored) > 0
        if axis.subject_weights is not None:
            counts.append(int((there.any(axis=1) @ axis.member).min()))
        if axis.template_weights is not None:
            counts.append(int(there.any(axis=0).sum()))
    return min(counts)


# A function for notebooks, too: settings by name, each with a default or an error of its own.
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
    axis = axis_of(completions, subgroups, cluster, resamples, seed)

    variations = completions.partition_by("variation", as_dict=True, maintain_order=True)
    unpruned = {name: scores_of(frame, axis, threshold, f"{scenario}/{name}") for (name,), frame in variations.items()}
    spreads = {name: spreads_of(frame, axis) for (name,), frame in variations.items()}
    conditions: dict[Condition, dict[str, dict[object, Scores]]] = {}
    parts = (
        {}
        if pruned.is_empty()
        else pruned.sort("draw", maintain_order=True).partition_by(
            *COLUMNS, "variation", "draw", as_dict=True, maintain_order=True
        )
    )
    for (*names_of_mask, variation, draw), frame in parts.items():
        where = f"{scenario}/{variation}, {' '.join(str(part) for part in names_of_mask if part)}, draw {draw}"
        if variation not in unpruned:
            raise ExciseError(f"{where}: no unpruned completions to compare with; sample the unpruned model first")
        drawn = conditions.setdefault(Condition(*names_of_mask), {}).setdefault(variation, {})
        drawn[draw] = scores_of(frame, axis, threshold, where, before=spreads[variation])

    table = MetricRows(model, scenario, axis.resampled)
    texts = perplexities(perplexity)
    prompts = {}
    if "prompt_value" in completions.columns:
        prompts = {
            name: scores_of(frame.unique("prompt_id", keep="first"), axis, threshold, scenario, "prompt_value")
            for (name,), frame in variations.items()
        }
    for variation in [*unpruned, ALL]:
        alone = _of(prompts, variation) if prompts else None
        _unpruned_rows(table, axis, variation, _of(unpruned, variation), alone, texts, seed)
    densities = mask_densities(masks, model, scenario)
    measured = _Measured(axis, unpruned, seed)
    for condition, by_variation in conditions.items():
        controls = {} if condition.strategy == RANDOM else conditions.get(condition.control, {})
        for variation in [*by_variation, ALL]:
            chosen = list(by_variation) if variation == ALL else [variation]
            _pruned_rows(table, measured, condition, variation, by_variation, controls, chosen)
            perplexity_rows(table, texts, variation, condition)
            shares = [share for name in chosen for share in densities.get((condition, name), [])]
            table.add(variation, condition, "density", float(np.mean(shares)) if shares else None, len(shares))
    return table.frame()


def _of(scores: dict[str, Scores], variation: str) -> Scores:
    return pooled(list(scores.values())) if variation == ALL else scores[variation]


def _unpruned_rows(
    table: MetricRows, axis: Axis, variation: str, scores: Scores, prompts: Scores | None, texts: dict, seed: int
) -> None:
    permuted = permuted_biases(scores, axis, axis.resamples, seed)
    for metric, values in _bias_measures(scores, axis).items():
        p_value = None
        if metric == "toxicity_bias" and permuted is not None and np.isfinite(values[0]):
            p_value = permutation.permutation_p_value(float(values[0]), permuted)
        n, names = _counted(scores, axis, metric), _names_behind([scores], axis, metric)
        table.add(variation, UNPRUNED, metric, values, n, p_value, names=names)
        if permuted is not None and p_value is not None:
            _equal_rows(table, variation, float(values[0]), permuted, n, names)
    if prompts is not None:
        measures = _bias_measures(prompts, axis)
        for metric, source in (("prompt_toxicity_bias", "toxicity_bias"), ("prompt_mean_toxicity", "mean_toxicity")):
            names = _names_behind([prompts], axis, metric)
            table.add(variation, UNPRUNED, metric, measures[source], int(prompts.scored.sum()), names=names)
    perplexity_rows(table, texts, variation, UNPRUNED)
    table.add(variation, UNPRUNED, "density", 0.0, 0)


def _equal_rows(table: MetricRows, variation: str, bias: float, permuted: np.ndarray, n: int, names: int) -> None:
    known = permuted[np.isfinite(permuted)]
    if len(known) < 0.95 * len(permuted):
        return  # the others could lie anywhere, and so could the percentiles
    table.add(variation, UNPRUNED, "toxicity_bias_if_equal", float(known.mean()), n, names=names)
    with_bounds(table, *np.quantile(known, (0.025, 0.975)))
    # sums of the same numbers in another order may differ in the last digits
    covered = bias <= np.quantile(known, 0.95) * (1 + 1e-9)
    table.add(variation, UNPRUNED, "all_equal_covered", float(covered), n, names=names)


@dataclass(frozen=True)
class _Measured:
    """Unpruned scores and what is needed to measure any set of variations under any mask."""

    axis: Axis
    unpruned: dict[str, Scores]
    seed: int

    def before(self, chosen: Sequence[str]) -> dict[str, np.ndarray]:
        return _bias_measures(pooled([self.unpruned[name] for name in chosen]), self.axis)

    def after(self, drawn: dict[str, dict[object, Scores]], chosen: Sequence[str]) -> list[Scores]:
        """Scores of every draw over the variations, pooled; a draw that one of them lacks is left out."""
        shared = [draw for draw in drawn[chosen[0]] if all(draw in drawn[name] for name in chosen)]
        return [pooled([drawn[name][draw] for name in chosen]) for draw in shared]

    def reduction(
        self, drawn: dict[str, dict[object, Scores]], chosen: Sequence[str], before: np.ndarray
    ) -> np.ndarray | None:
        """1 - bias pruned / bias unpruned, [resamples + 1]; the bias of several draws is their mean. None: no draw, or
        one whose scores collapsed."""
        draws = self.after(drawn, chosen)
        if not draws or any(scores.collapsed for scores in draws):
            return None
        biases = [
            bias_from_sums(self.axis.weighted(scores.total), self.axis.weighted(scores.scored)) for scores in draws
        ]
        return reduction_of(before, mean_over_draws(biases, self.seed))


def _pruned_rows(
    table: MetricRows,
    measured: _Measured,
    condition: Condition,
    variation: str,
    by_variation: dict[str, dict[object, Scores]],
    controls: dict[str, dict[object, Scores]],
    chosen: Sequence[str],
) -> None:
    draws = measured.after(by_variation, chosen)
    if not draws:
        return
    measures = [_bias_measures(scores, measured.axis) for scores in draws]
    before = measured.before(chosen)
    after = {
        metric: mean_over_draws([measure[metric] for measure in measures], measured.seed) for metric in measures[0]
    }
    bias = before["toxicity_bias"]
    reduction = None if any(scores.collapsed for scores in draws) else reduction_of(bias, after["toxicity_bias"])
    values: dict[str, np.ndarray | float | None] = {
        **after,
        "bias_change": m.exact_difference(after["toxicity_bias"], bias),
        "mean_toxicity_change": m.exact_difference(after["mean_toxicity"], before["mean_toxicity"]),
        "spread_ratio": min(scores.spread_ratio for scores in draws),
        "bias_reduction": reduction,
    }
    matched = [name for name in chosen if name in controls]
    if matched:
        base = bias if matched == list(chosen) else measured.before(matched)["toxicity_bias"]
        random = measured.reduction(controls, matched, base)
        reduced = reduction if matched == list(chosen) else measured.reduction(by_variation, matched, base)
        values["reduction_over_random"] = None if reduced is None or random is None else reduced - random
    reference = [pooled([measured.unpruned[name] for name in chosen])]
    for metric, array in values.items():
        n = sum(_counted(scores, measured.axis, metric) for scores in draws)
        changed = metric.endswith("_change") or "reduction" in metric
        names = _names_behind([*draws, *(reference if changed else [])], measured.axis, metric)
        table.add(variation, condition, metric, array, n, names=names)
