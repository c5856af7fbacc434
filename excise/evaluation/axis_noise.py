"""How much of an axis's bias is noise: its debiased estimate, the variances of the deviations, and random labels.

The bias is a sum of absolute distances, which noise only raises (FASP, section 3; method, B1 and B2). Not here: the
noise of a single sum of distances (`metrics.folded_noise`), and the rows of the table (`toxicity`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.evaluation.axis import CELLS_AT_ONCE, LABELS, Axis, Scores
from excise.evaluation.metrics import folded_noise


def bias_from_sums(sums: ArrayLike, counts: ArrayLike) -> NDArray[np.float64]:
    """sum_s |t_axis - t_s| from each subgroup's sum and number of scores (FASP, section 3; method, B1).

    sums, counts: [..., subgroups]; returns [...]. Equals `excise.evaluation.metrics.toxicity_bias` of the scores
    written out. NaN where a subgroup has no score: a sum over fewer subgroups is another quantity. NaN without
    subgroups, too.
    """
    deviations = deviations_of(np.asarray(sums, np.float64), np.asarray(counts, np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        bias = np.abs(deviations).sum(axis=-1)
    return np.where(np.isfinite(bias) & (deviations.shape[-1] > 0), bias, np.nan)


def debiased_bias(deviations: ArrayLike, variances: ArrayLike) -> NDArray[np.float64]:
    """sum_s |d_s| less its `folded_noise`, [...]. May be negative: then there is less than noise alone would give."""
    with np.errstate(over="ignore", invalid="ignore"):
        debiased = np.abs(np.asarray(deviations, np.float64)).sum(axis=-1) - folded_noise(deviations, variances)
    return np.where(np.isfinite(debiased), debiased, np.nan)


def deviations_of(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """t_s - t_axis, [..., subgroups]."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return sums / counts - sums.sum(axis=-1, keepdims=True) / counts.sum(axis=-1, keepdims=True)


def ratio_of(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole == 0, np.nan, part / whole)


def noise_of(scores: Scores, axis: Axis) -> NDArray[np.float64]:
    """Sampling variances of t_s - t_axis from the spread of the clusters, [subgroups]; NaN where it is unknown.

    Descriptors of all subgroups are taken to spread alike, as a subgroup's own two or three say little. Templates are
    crossed with the subgroups, so a template's contributions to all of them are kept together. For both, the two
    variances are added less that of single prompts, which either holds already (Cameron, Gelbach & Miller 2011).
    """
    count = scores.scored.sum(axis=1) @ axis.member
    mean = ratio_of(scores.total.sum(axis=1) @ axis.member, count)
    # How much the residual of every cell moves every deviation: linear in the residuals, [subjects, subgroups].
    pull = ratio_of(axis.member, count) - 1 / max(count.sum(), 1)
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
    spread_pull = np.broadcast_to(pull[:, None, :], (*there.shape, len(count)))[there]
    return np.maximum(
        sum(parts) - _stratified(residual[there], scores.scored[there], group, spread_pull), np.max(parts, 0)
    )


def _stratified(residual: np.ndarray, weight: np.ndarray, group: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """Variance of sum_u residual_u pull_us [subgroups], the clusters' spread pooled over the subgroups' own means."""
    used = weight > 0
    freedom = int(used.sum()) - len(np.unique(group[used]))
    if freedom < 1:
        return np.full(pull.shape[1], np.nan)
    # A cluster's mean varies alike in all subgroups; a cluster of more scores pulls harder, but is no more certain.
    spread = ((residual[used] / weight[used]) ** 2).sum() / freedom
    return spread * ((weight[:, None] * pull) ** 2).sum(axis=0)


def permuted_biases(scores: Scores, axis: Axis, draws: int, seed: int) -> NDArray[np.float64] | None:
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
    streams = [np.random.default_rng([seed, LABELS, *place]) for place in (np.ndindex(templates) if within else [()])]
    result = np.empty(draws)
    step = max(1, CELLS_AT_ONCE // scores.total.size)
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
