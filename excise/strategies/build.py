"""Strategies: a score, a selection, the levels it is made at and its controls, named and configured in one YAML.

Here scores become named masks. A control has exactly as many pruned weights in every matrix as the mask it belongs to,
so what differs between them is which weights, never how many. Scores come from `excise.attribution`, selection rules
from `excise.strategies.selection`; sampling under a mask and judging it happen elsewhere.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.attribution import (
    AttributionFile,
    read_attention,
    read_candidates,
    read_norms,
    read_snip,
)
from excise.conditions import (
    ACROSS,
    ALL_CONTEXTS,
    CROSS_CONTEXT,
    OWN_SCENARIO,
    PROMPT_SPECIFIC,
    RANDOM,
    WITHIN_CONTEXT,
)
from excise.errors import ExciseError
from excise.evaluation.thresholds import SIGNIFICANCE
from excise.interventions.combining import intersection, leave_one_out, union, votes
from excise.interventions.controls import RandomControl
from excise.interventions.heads import heads_mask
from excise.interventions.kinds import load_mask
from excise.interventions.packed import Mask
from excise.interventions.weights import WeightMask
from excise.models.loading import LoadedModel
from excise.models.topology import Linear
from excise.progress import Progress, silent
from excise.strategies.selection import (
    fasp,
    pooled_band,
    set_difference,
    set_difference_by_count,
    set_difference_of_count,
    top_of_stream,
)

if TYPE_CHECKING:
    from excise.attribution.gap_free import Asked
    from excise.strategies.measured_path import Budgets, MeasuredPath

from excise.strategies.config import MEASURED_PATH, Strategy


@dataclass(frozen=True)
class NamedMask:
    """A mask and what it is: made for `variation` at `level` by `strategy`; a control names whose control it is.

    A random control is a recipe, made where it is used.
    """

    variation: str
    strategy: str
    level: str
    matched_to: str | None
    draw: int
    mask: Mask | RandomControl


@dataclass(frozen=True)
class SourceMask:
    """What a scenario lends to others: a strategy's prompt-specific mask, or for a measured path the scores alone."""

    scenario: str
    variation: str
    strategy: str
    mask: Path | None
    score: Path | None


@dataclass(frozen=True)
class Paths:
    """What measured paths are made with.

    loaded: the model. ask: (scenario, variation, significance) -> what was asked about the names that masks are made
    of (`excise.attribution.gap_free.ask`). budgets: what the path may cost. folder: where finished and unfinished paths
    are kept. note: is told every path, with the strategy's key, its level and the variation it is for ("" for all).
    """

    loaded: LoadedModel
    ask: Callable[[str, str, float], Asked]
    budgets: Budgets
    seed: int
    folder: Path
    note: Callable[[str, str, str, MeasuredPath], None] = lambda strategy, level, variation, path: None
    progress: Progress = silent


def build_masks(
    loaded: LoadedModel,
    strategies: Iterable[Strategy],
    files: Iterable[AttributionFile],
    *,
    scenario: str,
    random_draws: int,
    permutations: int,
    seed: int,
    store: Callable[[Mask], Path],
    paths: Paths | None = None,
    progress: Progress = silent,
) -> Iterator[NamedMask]:
    """Make every strategy's masks and their controls, one at a time.

    files: the attribution files of one model and `scenario`. store: keeps a mask and returns where, as prompt-specific
    masks are read again for the within-context level. random_draws and permutations: draws of those controls.
    The within-context mask of a variation combines the other variations' masks as `combine` says: the intersection
    (BDB, section 4), the union, or what enough of them hold. A `measured_path` needs `paths`, and its mask is that of
    one path for all others together; where no mask closes their gap within the budgets there is none. Cross-context
    masks: `build_cross_context_masks`.
    """
    there = {(file.score, file.variation): file.path for file in files}
    for strategy in strategies:
        if not strategy.of_heads and not _linears(loaded, strategy):
            known = ", ".join(dict.fromkeys(linear.role for linear in loaded.topology.linears))
            raise ExciseError(f"strategies: {strategy.key}.roles: {loaded.key} has none of these, it has {known}")
        variations = [variation for score, variation in there if score == strategy.score]
        sources = {variation: there[strategy.score, variation] for variation in variations}
        if strategy.selection == "set_difference":
            made = _set_difference_masks(loaded, strategy, sources, permutations, store)
        else:
            made = _measured_path_masks(strategy, sources, paths, scenario)
        total, done = len(variations) * len(_levels(strategy, variations)), 0
        for named in made:
            yield named
            if named.matched_to is None:
                yield from _random_controls(named, strategy, random_draws, seed)
                done += 1
                progress(f"masks {strategy.key}", done, total)


def build_head_masks(
    strategies: Iterable[Strategy],
    impacts: pl.DataFrame,
    variations: Sequence[str],
    *,
    random_draws: int,
    seed: int,
) -> Iterator[NamedMask]:
    """Masks of strategies that rank whole heads over a scenario (FASP, section 4), and their random controls.

    impacts: one row per head with layer, head, perplexity_without, bias_without, magnitude and gradient. All variations
    get the same mask. Raises ExciseError where heads are missing, or a head has no score.
    """
    layers, heads = impacts["layer"].max() + 1, impacts["head"].max() + 1
    ordered = impacts.sort("layer", "head")
    if ordered.height != layers * heads:
        raise ExciseError(
            f"head impacts: {layers * heads} heads are expected, {ordered.height} are there; materialize head_impacts "
            "of this partition again"
        )
    for strategy in strategies:
        chosen = np.zeros(layers * heads, dtype=bool)
        chosen[_ranked_heads(strategy, ordered, seed)] = True
        mask = heads_mask(chosen.reshape(layers, heads), "zero_output")
        named = NamedMask("", strategy.key, OWN_SCENARIO, None, 0, mask)
        made = [named, *_random_controls(named, strategy, random_draws, seed)]
        yield from (replace(each, variation=variation) for variation in variations for each in made)


def _ranked_heads(strategy: Strategy, impacts: pl.DataFrame, seed: int) -> np.ndarray:
    """Flat indices of the heads a strategy prunes."""

    def column(name: str) -> np.ndarray:
        values = impacts[name].cast(pl.Float64).fill_null(math.nan).to_numpy()
        if np.isnan(values).any():
            mend = "materialize head_impacts of this partition again"
            if name == "bias_without":
                mend = "without them too few answers have a value to tell a disparity by, so ask for more samples"
            count = int(np.isnan(values).sum())
            raise ExciseError(f"head impacts: {name} of {count} heads is not known, which {strategy.key} needs; {mend}")
        return values

    alpha, gamma = strategy.parameters["alpha"], strategy.parameters.get("gamma", 0.0)
    ties = bool(strategy.parameters.get("paper_ties", 0))
    if strategy.score == "head_impacts":
        if "bias_with" in impacts.columns:
            # Measured, and there is no disparity without the head, as all answers are the same, say: not one to prune.
            undefined = pl.col("bias_without").is_null() & pl.col("bias_with").is_not_null()
            impacts = impacts.with_columns(bias_without=pl.when(undefined).then(math.inf).otherwise("bias_without"))
        bias = column("bias_without")
        found = fasp(column("perplexity_without"), bias, alpha, gamma, ties)
        if not np.isfinite(bias[found]).all():
            raise ExciseError(
                f"head impacts: {strategy.key} asks for {len(found)} heads, but only {np.isfinite(bias).sum()} have a "
                "defined disparity without them; lower alpha or gamma"
            )
        return found
    if strategy.score == "head_random":
        scores = np.random.default_rng(_seed(seed, strategy.key.partition("-")[0])).random(impacts.height)
    else:
        scores = column({"head_perplexity": "perplexity_without"}.get(strategy.score, strategy.score[len("head_") :]))
    return fasp(np.zeros(impacts.height), scores, alpha, 0.0, ties)


def build_cross_context_masks(
    strategies: Iterable[Strategy],
    sources: Sequence[SourceMask],
    scenario: str,
    variations: Sequence[str],
    *,
    per_source: bool,
    random_draws: int,
    seed: int,
    paths: Paths | None = None,
    progress: Progress = silent,
) -> Iterator[NamedMask]:
    """Masks for the `variations` of `scenario` that need other scenarios (BDB, section 4), and their random controls.

    sources: what all variations of all scenarios lend, the target's among them. Level `cross_context` combines all
    other scenarios, `cross_context/SCENARIO`, where `per_source` asks for it, takes one, and `all_contexts` the
    target's own, too; all variations of the target get the same mask. A strategy without a source in any other scenario
    has no mask, and none at the level `all_contexts` without one in the target itself. paths: as in `build_masks`; the
    other strategies need no model.
    """
    chosen = [strategy for strategy in strategies if set(ACROSS) & set(strategy.levels)]
    for number, strategy in enumerate(chosen):
        every = [source for source in sources if source.strategy == strategy.key]
        others = [source for source in every if source.scenario != scenario]
        pools = {}
        if others and CROSS_CONTEXT in strategy.levels:
            pools[CROSS_CONTEXT] = others
        if others and len(every) > len(others) and ALL_CONTEXTS in strategy.levels:
            pools[ALL_CONTEXTS] = every
        if per_source and CROSS_CONTEXT in strategy.levels:
            for source in others:
                pools.setdefault(f"{CROSS_CONTEXT}/{source.scenario}", []).append(source)
        for level, pool in pools.items():
            if strategy.selection == MEASURED_PATH:
                mask = follow_path(strategy, pool, paths, level, "").mask
                if mask is None:
                    continue
            else:
                mask = _combined(strategy, [Path(source.mask) for source in pool])
            # A draw serves all variations, as the mask itself does. Single sources are many, so one draw each.
            draws = random_draws if level in ACROSS else min(1, random_draws)
            named = NamedMask("", strategy.key, level, None, 0, mask)
            made = [named, *_random_controls(named, strategy, draws, seed)]
            yield from (replace(each, variation=variation) for variation in variations for each in made)
        progress("cross-context masks", number + 1, len(chosen))


def grid_masks(
    loaded: LoadedModel,
    strategy: Strategy,
    files: Iterable[AttributionFile],
    points: Sequence[tuple[float, float]],
    *,
    progress: Progress = silent,
) -> Iterator[tuple[str, tuple[float, float], Mask]]:
    """Prompt-specific masks of a set difference at many thresholds: (variation, (minority's, majority's), mask).

    points: pairs of fractions, or of counts where the strategy counts heads. The top of each group is found once per
    threshold, so a grid costs as many selections as it has lines, not as it has points; tops wait on disk as bits.
    """
    if strategy.selection != "set_difference":
        raise ExciseError(f"strategies: {strategy.key}.selection: a grid needs set_difference")
    for file in files:
        if file.score != strategy.score:
            continue
        scores = _scores_of(loaded, strategy, file.path)
        with tempfile.TemporaryDirectory(prefix="excise-grid-") as folder:
            tops: dict[tuple[int, float], Path] = {}
            wanted = sorted({(0, point[0]) for point in points} | {(1, point[1]) for point in points})
            for number, (side, threshold) in enumerate(wanted):
                tops[side, threshold] = Path(folder) / f"{number}.safetensors"
                weighting = ("minority", "majority")[side]
                _top(strategy, scores, weighting, threshold).save(tops[side, threshold])
                progress(f"thresholds {strategy.key} {file.variation}", number + 1, len(wanted))
            for point in points:
                minority, majority = load_mask(tops[0, point[0]]), load_mask(tops[1, point[1]])
                yield file.variation, point, minority - majority


def _random_controls(named: NamedMask, strategy: Strategy, draws: int, seed: int) -> Iterator[NamedMask]:
    if RANDOM in strategy.controls:
        for draw in range(draws):
            control = named.mask.control(_seed(seed, strategy.key, named.level, named.variation, draw))
            yield NamedMask(named.variation, RANDOM, named.level, strategy.key, draw, control)


def _levels(strategy: Strategy, variations: list[str]) -> tuple[str, ...]:
    """The levels within a scenario. A single variation has no others to make a within-context mask from."""
    within = [level for level in strategy.levels if level not in ACROSS]
    return tuple(level for level in within if level == PROMPT_SPECIFIC or len(variations) > 1)


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def _linears(loaded: LoadedModel, strategy: Strategy) -> list[Linear]:
    return [linear for linear in loaded.topology.linears if linear.role in strategy.roles]


@dataclass(frozen=True)
class _Scores:
    """Scores of one variation, array by array: the matrices of the roles, or one array of all heads."""

    keys: tuple[str, ...]
    of: Callable[[str, str], np.ndarray]
    """(key, weighting) -> scores [out, in], or [layers, heads]."""

    def stream(self, weighting: str) -> Iterator[tuple[str, np.ndarray]]:
        return ((key, self.of(key, weighting)) for key in self.keys)


def _scores_of(loaded: LoadedModel, strategy: Strategy, path: Path) -> _Scores:
    if strategy.score == "attention":
        heads = read_attention(path)[strategy.reduce]
        return _Scores(("heads",), lambda key, weighting: heads[weighting])
    linears = {linear.key: linear for linear in _linears(loaded, strategy)}
    if strategy.score == "snip":
        return _Scores(tuple(linears), lambda key, weighting: read_snip(path, key, weighting))
    norms = read_norms(path)
    last: dict[int, tuple[str, np.ndarray]] = {}  # by thread: a matrix is asked for under several weightings in turn

    def wanda(key: str, weighting: str) -> np.ndarray:
        linear, thread = linears[key], threading.get_ident()
        if last.get(thread, ("",))[0] != key:
            weight = linear.weight(loaded.model).detach().float().cpu().reshape(linear.shape)
            last[thread] = key, np.abs(weight.numpy())
        return last[thread][1] * norms[weighting][f"{linear.layer}.{linear.site}"]

    return _Scores(tuple(linears), wanda)


def _as_mask(strategy: Strategy, bits: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]]) -> Mask:
    """A mask of packed bits by key: of matrices, or of the one array of all heads."""
    if strategy.of_heads:
        chosen = np.unpackbits(bits["heads"], count=math.prod(shapes["heads"])).astype(bool)
        return heads_mask(chosen.reshape(shapes["heads"]), strategy.ablation)
    return WeightMask(bits, {key: shapes[key] for key in bits})


def _set_difference_masks(
    loaded: LoadedModel, strategy: Strategy, sources: Mapping[str, Path], permutations: int, store
) -> Iterator[NamedMask]:
    kinds = ["mask", *(control for control in strategy.controls if control not in (RANDOM, "permuted"))]
    if "permuted" in strategy.controls:
        kinds += [f"permuted_{draw}" for draw in range(permutations)]
    kept: list[Path] = []
    for variation, path in sources.items():
        scores = _scores_of(loaded, strategy, path)
        bits: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in kinds}
        shapes: dict[str, tuple[int, int]] = {}
        # Ranking releases the interpreter lock, so threads share the work; each holds one matrix.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
            jobs = [threads.submit(_chosen, strategy, scores, *each, kinds) for each in _differences(strategy, scores)]
            for job in jobs:
                key, shapes[key], packed = job.result()
                for kind in kinds:
                    bits[kind][key] = packed[kind]
        for kind in kinds:
            mask = _as_mask(strategy, bits.pop(kind), shapes)
            if kind == "mask":
                kept.append(store(mask))
                if PROMPT_SPECIFIC in strategy.levels:
                    yield NamedMask(variation, strategy.key, PROMPT_SPECIFIC, None, 0, mask)
            elif PROMPT_SPECIFIC in strategy.levels:
                name, _, draw = kind.rpartition("_") if kind.startswith("permuted") else (kind, "", "0")
                yield NamedMask(variation, name, PROMPT_SPECIFIC, strategy.key, int(draw), mask)
    if WITHIN_CONTEXT in _levels(strategy, list(sources)):
        if strategy.combine == "intersection":
            masks = leave_one_out(lambda: map(load_mask, kept))
        else:
            masks = (_combined(strategy, kept[:index] + kept[index + 1 :]) for index in range(len(kept)))
        for variation, mask in zip(sources, masks, strict=True):
            yield NamedMask(variation, strategy.key, WITHIN_CONTEXT, None, 0, mask)


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


def _differences(strategy: Strategy, scores: _Scores) -> Iterator[tuple[str, np.ndarray | None]]:
    """(key, set difference): of one ranking over all matrices here, else None, as each matrix has its own."""
    if strategy.of_heads or strategy.scope != "global":
        yield from ((key, None) for key in scores.keys)
        return
    size = sum(array.size for _, array in scores.stream("minority"))
    tops = [
        top_of_stream(lambda weighting=weighting: scores.stream(weighting), int(tau * size))
        for weighting, tau in zip(("minority", "majority"), _thresholds(strategy), strict=True)
    ]
    for (key, minority), (_, majority) in zip(*tops, strict=True):
        yield key, minority & ~majority


def _chosen(
    strategy: Strategy, scores: _Scores, key: str, mask: np.ndarray | None, kinds: Sequence[str]
) -> tuple[str, tuple[int, int], dict[str, np.ndarray]]:
    """One array of the set difference and of its controls of the same count: (key, shape, packed bits by kind)."""
    if mask is None:
        mask = _difference(strategy, scores.of(key, "minority"), scores.of(key, "majority"), _thresholds(strategy))
    count, tau_maj = int(np.count_nonzero(mask)), _thresholds(strategy)[1]
    if "k_maj" in strategy.parameters:
        tau_maj = min(1.0, (tau_maj + 0.5) / mask.size)  # the fraction that stands for just this count
    packed = {}
    for kind in kinds:
        if kind == "mask":
            chosen = mask
        elif kind == "pooled_band":
            chosen = pooled_band(scores.of(key, "pooled"), int(tau_maj * mask.size), count)
        else:
            # What reversed and permuted exchange: (scores in the minority's place, scores in the majority's place).
            places = ("majority", "minority")
            if kind != "reversed":
                draw = kind.removeprefix("permuted_")
                places = (f"permuted_minority_{draw}", f"permuted_majority_{draw}")
            chosen = set_difference_of_count(*(scores.of(key, place) for place in places), tau_maj, count)
        packed[kind] = np.packbits(chosen, axis=None)
    return key, mask.shape, packed


def _top(strategy: Strategy, scores: _Scores, weighting: str, threshold: float) -> Mask:
    """The highest scores of one weighting, down to the threshold."""
    if not strategy.of_heads and strategy.scope == "global":
        size = sum(array.size for _, array in scores.stream(weighting))
        chosen = top_of_stream(lambda: scores.stream(weighting), int(threshold * size))
    else:
        chosen = ((key, _difference(strategy, array, array, (threshold, 0))) for key, array in scores.stream(weighting))
    bits, shapes = {}, {}
    for key, array in chosen:
        bits[key], shapes[key] = np.packbits(array, axis=None), array.shape
    return _as_mask(strategy, bits, shapes)


def _combined(strategy: Strategy, paths: Sequence[Path]) -> Mask:
    """One mask of several, as the strategy combines them; the intersection and union hold two at a time."""
    if strategy.combine == "votes":
        needed = max(1, math.ceil(strategy.parameters["votes"] * len(paths) - 1e-9))
        return votes(map(load_mask, paths), needed)
    return (intersection if strategy.combine == "intersection" else union)(map(load_mask, paths))


def _measured_path_masks(
    strategy: Strategy, sources: Mapping[str, Path], paths: Paths | None, scenario: str
) -> Iterator[NamedMask]:
    lent = {variation: SourceMask(scenario, variation, strategy.key, None, path) for variation, path in sources.items()}
    for level in _levels(strategy, list(sources)):
        for variation in sources:
            used = [variation] if level == PROMPT_SPECIFIC else [other for other in sources if other != variation]
            mask = follow_path(strategy, [lent[other] for other in used], paths, level, variation).mask
            if mask is not None:
                yield NamedMask(variation, strategy.key, level, None, 0, mask)


def follow_path(
    strategy: Strategy, pool: Sequence[SourceMask], paths: Paths | None, level: str, variation: str
) -> MeasuredPath:
    """One path for all of a pool's variations, found again or followed; it has no mask where none closes their gaps.

    level, variation: what the mask is for ("" for all variations).
    """
    from excise.strategies.measured_path import heads_of, kept_path, weights_of

    if paths is None:
        raise ExciseError(f"strategies: {strategy.key} makes masks by measuring: give build_masks its paths")
    significance = strategy.parameters.get("significance", SIGNIFICANCE)
    asked = [paths.ask(source.scenario, source.variation, significance) for source in pool]
    if strategy.of_heads:
        units = heads_of(paths.loaded)
        if not units.linears:
            raise ExciseError(
                f"strategies: {strategy.key}.ablation: {strategy.ablation} needs output projections, and the model has "
                "none; name a strategy of weights"
            )
    else:
        units = weights_of(paths.loaded, strategy.roles, _best_of_all([source.score for source in pool]))
    budgets = replace(paths.budgets, lost=strategy.parameters.get("lost", paths.budgets.lost))
    found = kept_path(
        paths.loaded,
        asked,
        units,
        density=strategy.parameters["density"],
        budgets=budgets,
        seed=paths.seed,
        folder=paths.folder,
        progress=paths.progress,
        label=f"{strategy.key} {level.replace('_', '-')} {variation}".rstrip(),
    )
    paths.note(strategy.key, level, variation, found)
    return found


def _best_of_all(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Candidates of several variations: as many as of one, from each its own best ones; flat indices by key."""
    found: dict[str, list[np.ndarray]] = {}
    for file in files:
        scores = read_candidates(file)
        for key, each in scores.candidates.items():
            worth = each.drop / (each.harm + scores.damping)
            count = math.ceil(len(worth) / len(files))
            found.setdefault(key, []).append(each.index[np.argsort(-worth, kind="stable")[:count]])
    return {key: np.concatenate(parts) for key, parts in found.items()}
