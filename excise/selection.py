"""Selection: from scores to the weights or heads that are pruned.

Here belong the ranking rules of both papers and those of their controls, on plain arrays; how scores come about is
`attribution`, and what is done to the selected entries is `masks`.
The concepts are the set difference (BDB, section 4) and fairness-aware head selection (FASP, algorithm 1). Every
selection takes an exact count, and equal scores are taken in the order of their flat index, so results are
reproducible.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.errors import ExciseError

_ROUNDING = 1e-9  # slack for sums of fractions such as .7 + .3


def top(scores: ArrayLike, count: int) -> NDArray[np.bool_]:
    """The `count` entries with the highest scores, as a boolean array of the same shape.

    Equal scores at the threshold: the lower flat (row-major) index is taken. Linear time, no sort.
    Raises ExciseError when `count` is not between 0 and the number of entries, or a score is NaN.
    """
    array = _scores("scores", scores)
    flat = array.reshape(-1)
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= flat.size:
        raise ExciseError(f"count is {count!r}: it must be a whole number between 0 and the {flat.size} entries")
    if count in (0, flat.size):
        return np.full(array.shape, count > 0)
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    chosen = flat > threshold
    tied = np.flatnonzero(flat == threshold)
    chosen[tied[: count - np.count_nonzero(chosen)]] = True
    return chosen.reshape(array.shape)


def set_difference(
    minority_scores: ArrayLike, majority_scores: ArrayLike, tau_min: float, tau_maj: float
) -> NDArray[np.bool_]:
    """Entries important for the minority group's prompts and not for the majority group's (BDB, section 4).

    `top(tau_min; minority) & ~top(tau_maj; majority)` on one flattened matrix, where a fraction tau stands for
    `int(tau * entries)` entries, computed as written. Returns a boolean array of the scores' shape.

    Raises ExciseError for fractions outside [0, 1], shapes that differ, and NaN scores.
    """
    minority, majority = _pair("minority_scores", minority_scores, "majority_scores", majority_scores)
    count_min = _count("tau_min", tau_min, minority.size)
    count_maj = _count("tau_maj", tau_maj, majority.size)
    return top(minority, count_min) & ~top(majority, count_maj)


def set_difference_of_count(
    minority_scores: ArrayLike, majority_scores: ArrayLike, tau_maj: float, count: int
) -> NDArray[np.bool_]:
    """The set difference grown in `tau_min` until it holds exactly `count` entries.

    It is `top(k; minority) & ~top(tau_maj; majority)` with the smallest k that yields `count` entries: the set
    difference at a given size, so that masks and controls can be compared at equal density.

    Raises ExciseError when the entries outside `top(tau_maj; majority)` are fewer than `count`, and as
    `set_difference` does.
    """
    minority, majority = _pair("minority_scores", minority_scores, "majority_scores", majority_scores)
    outside = np.flatnonzero(~top(majority, _count("tau_maj", tau_maj, majority.size)).reshape(-1))
    if count > outside.size:
        raise ExciseError(
            f"count is {count}, but only {outside.size} entries lie outside the top {tau_maj:g} of majority_scores: "
            "lower count or tau_maj"
        )
    chosen = np.zeros(minority.size, dtype=bool)
    chosen[outside[top(minority.reshape(-1)[outside], count)]] = True
    return chosen.reshape(minority.shape)


def pooled_band(pooled_scores: ArrayLike, start: int, count: int) -> NDArray[np.bool_]:
    """The entries of rank `start` to `start + count` (end excluded, rank 0 being the highest score).

    A control for the set difference: with scores pooled over the groups it prunes the band of ranks between the two
    thresholds and knows nothing of the groups (method A6).

    Raises ExciseError when the band does not lie within the entries, or a score is NaN.
    """
    scores = _scores("pooled_scores", pooled_scores)
    if start < 0 or count < 0 or start + count > scores.size:
        raise ExciseError(f"the band of {count} entries from rank {start} is not within the {scores.size} entries")
    return top(scores, start + count) & ~top(scores, start)


def global_top(scores: Mapping[str, ArrayLike], count: int) -> dict[str, NDArray[np.bool_]]:
    """The `count` highest scores of several matrices in one ranking, as a boolean array per matrix.

    Equal scores at the threshold are taken in the mapping's order, then by flat index. Beside the result no more
    than `count` scores of each matrix are held.

    Raises ExciseError when there are fewer than `count` entries, or a score is NaN.
    """
    arrays = {key: _scores(f"scores of {key}", array) for key, array in scores.items()}
    size = sum(array.size for array in arrays.values())
    if not 0 <= count <= size:
        raise ExciseError(f"count is {count}: it must be between 0 and the {size} entries of all matrices")
    if count == 0:
        return {key: np.zeros(array.shape, dtype=bool) for key, array in arrays.items()}
    best = [_highest(array.reshape(-1), min(count, array.size)) for array in arrays.values()]
    threshold = _highest(np.concatenate(best), count).min()
    missing = count - sum(np.count_nonzero(array > threshold) for array in arrays.values())
    chosen = {}
    for key, array in arrays.items():
        flat = array.reshape(-1)
        above = flat > threshold
        tied = np.flatnonzero(flat == threshold)[:missing]
        above[tied] = True
        missing -= tied.size
        chosen[key] = above.reshape(array.shape)
    return chosen


def fasp(
    perplexity_without: ArrayLike, bias_without: ArrayLike, alpha: float, gamma: float, paper_ties: bool = False
) -> NDArray[np.int64]:
    """The heads pruned by fairness-aware structured pruning (FASP, algorithm 1).

    `perplexity_without` and `bias_without` hold the perplexity and the bias of the model after removing each of N
    heads, as [N] or [layers, heads]. The `int(gamma * N)` heads whose removal raises perplexity most are protected;
    of the others the `int(N * alpha)` with the lowest bias are pruned. Equal scores are ranked by layer, then head.
    `paper_ties` prunes every candidate whose bias equals the highest pruned one, as the released code does, and so
    can prune more heads than asked for.

    Returns flat indices (layer * heads + head), ascending.

    Raises ExciseError for fractions outside [0, 1], alpha + gamma above 1, shapes that differ, NaN, or no heads.
    """
    perplexity, bias = _pair("perplexity_without", perplexity_without, "bias_without", bias_without)
    heads = perplexity.size
    if heads == 0:
        raise ExciseError("perplexity_without holds no heads")
    pruned = _count("alpha", alpha, heads)
    protected = _count("gamma", gamma, heads)
    if alpha + gamma > 1 + _ROUNDING or pruned > heads - protected:
        raise ExciseError(
            f"alpha ({alpha:g}) and gamma ({gamma:g}) ask to prune {pruned} and to protect {protected} "
            f"of {heads} heads: their sum may be 1 at most"
        )
    # A stable sort of the flat, row-major array ranks equal scores by layer, then head.
    candidates = np.sort(np.argsort(perplexity.reshape(-1), kind="stable")[: heads - protected])
    candidate_bias = bias.reshape(-1)[candidates]
    ranking = np.argsort(candidate_bias, kind="stable")
    if paper_ties and pruned:
        return candidates[candidate_bias <= candidate_bias[ranking[pruned - 1]]].astype(np.int64)
    return np.sort(candidates[ranking[:pruned]]).astype(np.int64)


def _highest(flat: NDArray, count: int) -> NDArray:
    return np.partition(flat, flat.size - count)[flat.size - count :] if count else flat[:0]


def _scores(name: str, scores: ArrayLike) -> NDArray:
    array = np.asarray(scores)
    if array.dtype.kind not in "biuf":
        raise ExciseError(f"{name} must hold real numbers, but holds {array.dtype}")
    # The minimum of an array with a NaN is NaN, and needs no second array.
    if array.dtype.kind == "f" and array.size and np.isnan(array.min()):
        raise ExciseError(f"{name} holds NaN: {np.count_nonzero(np.isnan(array))} of {array.size} entries")
    return array


def _pair(first_name: str, first: ArrayLike, second_name: str, second: ArrayLike) -> tuple[NDArray, NDArray]:
    a, b = _scores(first_name, first), _scores(second_name, second)
    if a.shape != b.shape:
        raise ExciseError(f"{first_name} has shape {a.shape} and {second_name} {b.shape}: they must be equal")
    return a, b


def _count(name: str, fraction: float, size: int) -> int:
    if not 0 <= fraction <= 1:  # also refuses NaN
        raise ExciseError(f"{name} is {fraction:g}: it is a fraction between 0 and 1")
    return int(fraction * size)
