"""Selection: from scores to the weights or heads that are pruned.

Here belong the ranking rules of both papers and those of their controls, on plain arrays; how scores come about is
`attribution`, and what is done to the selected entries is `masks`.
The concepts are the set difference (BDB, section 4) and fairness-aware head selection (FASP, algorithm 1). Every
selection takes an exact count, and equal scores are taken in the order of their flat index, so results are
reproducible.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.errors import ExciseError

SCOPES = ("matrix", "row")
"""Where a set difference ranks weights: over the flattened matrix, or within each output row."""
_ROUNDING = 1e-9  # slack for sums of fractions such as .7 + .3
_BLOCK = 1 << 20  # entries of a stream's array looked at together
_INFINITY = 0x7F800000  # bits of float32; a NaN has higher ones


def top(scores: ArrayLike, count: int) -> NDArray[np.bool_]:
    """The `count` entries with the highest scores, as a boolean array of the same shape.

    Equal scores at the threshold: the lower flat (row-major) index is taken. Linear time, no sort.
    Raises ExciseError when `count` is not between 0 and the number of entries, or a score is NaN.
    """
    return _top("count", _scores("scores", scores), count)


def set_difference(
    minority_scores: ArrayLike,
    majority_scores: ArrayLike,
    tau_min: float,
    tau_maj: float,
    *,
    scope: str = "matrix",
) -> NDArray[np.bool_]:
    """Entries important for the minority group's prompts and not for the majority group's (BDB, section 4).

    `top(tau_min; minority) & ~top(tau_maj; majority)`, where a fraction tau stands for `int(tau * entries)` entries,
    computed as written. `scope` says what is ranked: "matrix", all entries together, or "row", the entries of each
    row of an array [out, in] by themselves, `int(tau * in)` of every row. Returns a boolean array of the scores'
    shape.

    Raises ExciseError for fractions outside [0, 1], shapes that differ, NaN scores, an unknown scope, and rows of
    what has not two dimensions.
    """
    minority, majority = _pair("minority_scores", minority_scores, "majority_scores", majority_scores)
    if scope not in SCOPES:
        raise ExciseError(f"scope is {scope!r}: it must be one of {', '.join(SCOPES)}")
    if scope == "row" and minority.ndim != 2:
        raise ExciseError(f"scope is 'row', but the scores have shape {minority.shape}: give [out, in]")
    size = minority.shape[1] if scope == "row" else minority.size
    count_min = _count("tau_min", tau_min, size)
    count_maj = _count("tau_maj", tau_maj, size)
    if scope == "row":
        return _top_of_rows(minority, count_min) & ~_top_of_rows(majority, count_maj)
    return top(minority, count_min) & ~top(majority, count_maj)


def set_difference_by_count(
    minority_scores: ArrayLike, majority_scores: ArrayLike, k_min: int, k_maj: int
) -> NDArray[np.bool_]:
    """The set difference with counts for fractions: `top(k_min; minority) & ~top(k_maj; majority)`.

    BDB names so many attention heads of all layers together (section 4; method, A7): scores [layers, heads].
    Returns a boolean array of the scores' shape.

    Raises ExciseError for counts that are no whole numbers between 0 and the number of entries, shapes that differ,
    and NaN scores.
    """
    minority, majority = _pair("minority_scores", minority_scores, "majority_scores", majority_scores)
    return _top("k_min", minority, k_min) & ~_top("k_maj", majority, k_maj)


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
    count_maj = _count("tau_maj", tau_maj, majority.size)
    if count > majority.size - count_maj:
        raise ExciseError(
            f"count is {count}, but only {majority.size - count_maj} entries lie outside the top {tau_maj:g} of "
            "majority_scores: lower count or tau_maj"
        )
    return _top("count", minority, count, ~top(majority, count_maj))


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


def top_of_stream(
    parts: Callable[[], Iterable[tuple[str, NDArray[np.float32]]]], count: int
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The `count` highest scores of many arrays in one ranking, one array in memory at a time.

    `parts` gives the same (key, scores) in the same order at each call, and is called three times: float32, not
    negative, of any shape. Yields (key, boolean array of that shape) in that order. Equal scores at the threshold
    are taken in the order of the arrays, then by flat index. The threshold is exact: scores that are not negative
    are ordered as their bits are, so the upper and then the lower half of the bits are counted.

    Raises ExciseError when there are fewer than `count` entries, for NaN, negative scores and other types than
    float32, and, after the last array, when `parts` did not give the same scores each time.
    """
    upper = np.zeros(1 << 16, dtype=np.int64)
    for key, array in parts():
        _tally(upper, key, array, lambda bits: bits >> np.uint32(16))
        del array  # or it would be there still while the next one is made
    size = int(upper.sum())
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= size:
        raise ExciseError(f"count is {count!r}: it must be a whole number between 0 and the {size} entries of all")
    if count == 0:
        return _above(parts, 1 << 32, 0, 0)
    high, missing = _bin_of_rank(upper, int(count))
    lower = np.zeros(1 << 16, dtype=np.int64)
    for key, array in parts():
        _tally(lower, key, array, lambda bits: bits[bits >> np.uint32(16) == high] & np.uint32(0xFFFF))
        del array
    low, missing = _bin_of_rank(lower, missing)
    return _above(parts, (high << 16) + low, missing, int(count))


def _above(
    parts: Callable[[], Iterable[tuple[str, NDArray[np.float32]]]], threshold: int, ties: int, count: int
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The entries whose bits are above the threshold, and the first `ties` of those at it."""
    missing = count
    for key, array in parts():
        chosen = np.zeros(array.shape, dtype=bool)
        flat, start = chosen.reshape(-1), 0
        for bits in _bits(key, array):
            chunk = flat[start : start + bits.size]
            chunk[:] = bits > threshold
            tied = np.flatnonzero(bits == threshold)[:ties]
            chunk[tied] = True
            ties -= tied.size
            start += bits.size
        del array
        missing -= int(np.count_nonzero(flat))
        yield key, chosen
    if missing:
        raise ExciseError("parts did not give the same scores at each call: they must not change between the passes")


def _tally(
    counts: NDArray[np.int64], key: str, array: NDArray, of: Callable[[NDArray[np.uint32]], NDArray[np.uint32]]
) -> None:
    for bits in _bits(key, array):
        counts += np.bincount(of(bits), minlength=counts.size)


def _bits(key: str, array: NDArray) -> Iterator[NDArray[np.uint32]]:
    """An array's scores as whole numbers of the same order, in blocks; 0 and -0 are the same number."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise ExciseError(
            f"scores of {key} must be an array of float32, but are {getattr(array, 'dtype', type(array))}"
        )
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        bits = block.view(np.uint32) & np.uint32(0x7FFFFFFF)
        if bits.max() > _INFINITY:
            raise ExciseError(f"scores of {key} holds NaN")
        if block.min() < 0:
            raise ExciseError(f"scores of {key} holds negative scores: one ranking of a stream needs none below 0")
        yield bits


def _bin_of_rank(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds the entry of a rank (1 being the highest), and how many of the bin's entries it takes."""
    at_least = np.cumsum(counts[::-1])[::-1]
    place = int(np.flatnonzero(at_least >= rank)[-1]) if at_least[0] >= rank else 0
    return place, rank - int(at_least[place] - counts[place])


def fasp(
    perplexity_without: ArrayLike, bias_without: ArrayLike, alpha: float, gamma: float, paper_ties: bool = False
) -> NDArray[np.int64]:
    """The heads pruned by fairness-aware structured pruning (FASP, algorithm 1).

    `perplexity_without` and `bias_without` hold the perplexity and the bias of the model after removing each of N
    heads, as [N] or [layers, heads]. The `int(gamma * N)` heads whose removal raises perplexity most are protected;
    of the others the `int(N * alpha)` with the lowest bias are pruned, exactly so many. Equal scores are ranked by
    layer, then head. Fractions are taken for the decimal numbers they stand for: .29 of 100 heads are 29.
    `paper_ties` takes ties at both thresholds, as the released code does: candidates are all heads whose perplexity is
    at or below the `N - int(gamma * N)`-th lowest, and pruned are all candidates whose bias is at or below the
    `int(N * alpha)`-th lowest among them. So fewer heads may be protected and more pruned than asked for.

    Returns flat indices (layer * heads + head), ascending.

    Raises ExciseError for fractions outside [0, 1], alpha + gamma above 1, shapes that differ, NaN, or no heads.
    """
    perplexity, bias = _pair("perplexity_without", perplexity_without, "bias_without", bias_without)
    heads = perplexity.size
    if heads == 0:
        raise ExciseError("perplexity_without holds no heads")
    pruned = _count("alpha", alpha, heads, _ROUNDING)
    protected = _count("gamma", gamma, heads, _ROUNDING)
    if alpha + gamma > 1 + _ROUNDING or pruned > heads - protected:
        raise ExciseError(
            f"alpha ({alpha:g}) and gamma ({gamma:g}) ask to prune {pruned} and to protect {protected} "
            f"of {heads} heads: their sum may be 1 at most"
        )
    candidates = _lowest(perplexity.reshape(-1), heads - protected, paper_ties)
    return candidates[_lowest(bias.reshape(-1)[candidates], pruned, paper_ties)]


def _lowest(scores: NDArray, count: int, ties: bool) -> NDArray[np.int64]:
    """Indices of the `count` lowest scores, ascending; ties: and of all that equal the highest of them."""
    # A stable sort of the flat, row-major array ranks equal scores by layer, then head.
    ranking = np.argsort(scores, kind="stable")
    if ties and count:
        return np.flatnonzero(scores <= scores[ranking[count - 1]]).astype(np.int64)
    return np.sort(ranking[:count]).astype(np.int64)


def _top(name: str, array: NDArray, count: int, among: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """`top`; among: of these entries alone, which are `count` at least."""
    flat = array.reshape(-1)
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= flat.size:
        raise ExciseError(f"{name} is {count!r}: it must be a whole number between 0 and the {flat.size} entries")
    if count in (0, flat.size):
        return np.full(array.shape, count > 0)
    if among is not None:
        lowest = -np.inf if array.dtype.kind == "f" else False if array.dtype == bool else np.iinfo(array.dtype).min
        flat = np.where(among, array, lowest).reshape(-1)
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    chosen = flat > threshold
    tied = np.flatnonzero(flat == threshold)
    if among is not None:
        tied = tied[among.reshape(-1)[tied]]
    chosen[tied[: count - np.count_nonzero(chosen)]] = True
    return chosen.reshape(array.shape)


def _top_of_rows(array: NDArray, count: int) -> NDArray[np.bool_]:
    """`top(row, count)` of every row of an array [out, in]."""
    size = array.shape[1]
    if count in (0, size) or not array.size:
        return np.full(array.shape, count > 0)
    threshold = np.partition(array, size - count, axis=1)[:, size - count]
    chosen = array >= threshold[:, None]
    excess = np.count_nonzero(chosen, axis=1) - count
    for row in np.flatnonzero(excess):
        tied = np.flatnonzero(array[row] == threshold[row])
        chosen[row, tied[tied.size - excess[row] :]] = False
    return chosen


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


def _count(name: str, fraction: float, size: int, rounding: float = 0.0) -> int:
    if not 0 <= fraction <= 1:  # also refuses NaN
        raise ExciseError(f"{name} is {fraction:g}: it is a fraction between 0 and 1")
    return int(fraction * size + rounding)
