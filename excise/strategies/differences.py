"""Set differences of one variation: a score, ranked as a strategy says, becomes a mask and the controls of its size.

The rules on plain arrays are `excise.strategies.selection`; here scores come array by array, and one ranking may go
over all of them. Levels, names and random controls are `excise.strategies.build`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from excise.attribution.score import Streams, Wanted
from excise.errors import ExciseError
from excise.interventions.combining import intersection, union, votes
from excise.interventions.heads import heads_mask
from excise.interventions.kinds import load_mask
from excise.interventions.packed import Mask
from excise.interventions.weights import WeightMask
from excise.models.loading import LoadedModel
from excise.strategies.config import Strategy
from excise.strategies.selection import (
    pooled_band,
    set_difference,
    set_difference_by_count,
    set_difference_of_count,
    top_of_stream,
)

MASK = "mask"
"""The strategy's own mask, beside its controls."""


def streams_of(loaded: LoadedModel, strategy: Strategy, path: Path) -> Streams:
    """The scores of a file as a strategy ranks them: of the matrices of its roles, or of all heads."""
    read = strategy.record.read
    if read is None:
        raise ExciseError(f"strategies: score {strategy.score} has no scores that {strategy.selection} ranks")
    linears = [linear for linear in loaded.topology.linears if linear.role in strategy.roles]
    return read(path, Wanted(loaded, linears, strategy.reduce))


def difference_masks(strategy: Strategy, scores: Streams, kinds: Sequence[str]) -> Iterator[tuple[str, Mask]]:
    """(kind, mask) of each of `kinds`: `MASK`, and controls (pooled_band, reversed, permuted_0, ...)."""
    bits: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in kinds}
    shapes: dict[str, tuple[int, ...]] = {}
    # Ranking releases the interpreter lock, so threads share the work; each holds one matrix.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        differences = _differences(strategy, scores)
        jobs = [threads.submit(_chosen, strategy, scores, key, mask, kinds) for key, mask in differences]
        for job in jobs:
            key, shapes[key], packed = job.result()
            for kind in kinds:
                bits[kind][key] = packed[kind]
    for kind in kinds:
        yield kind, _as_mask(strategy, bits.pop(kind), shapes)


def _as_mask(strategy: Strategy, bits: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Mask:
    """A mask of packed bits by key: of matrices, or of the one array of all heads."""
    if strategy.of_heads:
        chosen = np.unpackbits(bits["heads"], count=math.prod(shapes["heads"])).astype(bool)
        return heads_mask(chosen.reshape(shapes["heads"]), strategy.ablation or "")
    return WeightMask(bits, {key: (shapes[key][0], shapes[key][1]) for key in bits})


def _thresholds(strategy: Strategy) -> tuple[float, float]:
    names = ("k_min", "k_maj") if "k_min" in strategy.parameters else ("tau_min", "tau_maj")
    return strategy.parameters[names[0]], strategy.parameters[names[1]]


def _difference(
    strategy: Strategy, minority: np.ndarray, majority: np.ndarray, thresholds: tuple[float, float]
) -> np.ndarray:
    """The set difference of one array; thresholds are counts where the strategy counts."""
    if "k_min" in strategy.parameters:
        return set_difference_by_count(minority, majority, *map(int, thresholds))
    return set_difference(minority, majority, *thresholds, scope="row" if strategy.scope == "row" else "matrix")


def _differences(strategy: Strategy, scores: Streams) -> Iterator[tuple[str, np.ndarray | None]]:
    """(key, set difference): of one ranking over all matrices here, else None, as each matrix has its own."""
    if strategy.of_heads or strategy.scope != "global":
        yield from ((key, None) for key in scores.keys)
        return
    size = sum(array.size for _, array in scores.stream("minority"))
    tops = [
        top_of_stream(functools.partial(scores.stream, weighting), int(tau * size))
        for weighting, tau in zip(("minority", "majority"), _thresholds(strategy), strict=True)
    ]
    for (key, minority), (_, majority) in zip(*tops, strict=True):
        yield key, minority & ~majority


def _chosen(
    strategy: Strategy, scores: Streams, key: str, mask: np.ndarray | None, kinds: Sequence[str]
) -> tuple[str, tuple[int, ...], dict[str, np.ndarray]]:
    """One array of the set difference and of its controls of the same count: (key, shape, packed bits by kind)."""
    if mask is None:
        mask = _difference(strategy, scores.of(key, "minority"), scores.of(key, "majority"), _thresholds(strategy))
    count, tau_maj = int(np.count_nonzero(mask)), _thresholds(strategy)[1]
    if "k_maj" in strategy.parameters:
        tau_maj = min(1.0, (tau_maj + 0.5) / mask.size)  # the fraction that stands for just this count
    packed = {}
    for kind in kinds:
        if kind == MASK:
            chosen = mask
        elif kind == "pooled_band":
            chosen = pooled_band(scores.of(key, "pooled"), int(tau_maj * mask.size), count)
        else:
            # What reversed and permuted exchange: (scores in the minority's place, scores in the majority's place).
            places = ("majority", "minority")
            if kind != "reversed":
                draw = kind.removeprefix("permuted_")
                places = (f"permuted_minority_{draw}", f"permuted_majority_{draw}")
            minority, majority = (scores.of(key, place) for place in places)
            chosen = set_difference_of_count(minority, majority, tau_maj, count)
        packed[kind] = np.packbits(chosen, axis=None)
    return key, mask.shape, packed


def top_mask(strategy: Strategy, scores: Streams, weighting: str, threshold: float) -> Mask:
    """The highest scores of one weighting, down to the threshold."""
    chosen: Iterator[tuple[str, np.ndarray]]
    if not strategy.of_heads and strategy.scope == "global":
        size = sum(array.size for _, array in scores.stream(weighting))
        chosen = top_of_stream(functools.partial(scores.stream, weighting), int(threshold * size))
    else:
        chosen = ((key, _difference(strategy, array, array, (threshold, 0))) for key, array in scores.stream(weighting))
    bits: dict[str, np.ndarray] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, array in chosen:
        bits[key], shapes[key] = np.packbits(array, axis=None), array.shape
    return _as_mask(strategy, bits, shapes)


def combined(strategy: Strategy, paths: Sequence[Path]) -> Mask:
    """One mask of several, as the strategy combines them; the intersection and union hold two at a time."""
    if strategy.combine == "votes":
        needed = max(1, math.ceil(strategy.parameters["votes"] * len(paths) - 1e-9))
        return votes(map(load_mask, paths), needed)
    return (intersection if strategy.combine == "intersection" else union)(map(load_mask, paths))
