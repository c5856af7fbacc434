"""Strategies: a score, a selection, the levels it is made at and its controls, named and configured in one YAML.

Here scores become named masks. A control has exactly as many pruned weights in every matrix as the mask it belongs to,
so what differs between them is which weights, never how many. Scores come from `excise.attribution`, selection rules
from `excise.strategies.selection`; sampling under a mask and judging it happen elsewhere.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.attribution import AttributionFile
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
from excise.interventions.combining import leave_one_out
from excise.interventions.controls import RandomControl
from excise.interventions.heads import heads_mask
from excise.interventions.kinds import load_mask
from excise.interventions.packed import Mask
from excise.models.loading import LoadedModel
from excise.models.topology import Linear
from excise.progress import Progress, silent
from excise.strategies.config import MEASURED_PATH, Strategy
from excise.strategies.differences import MASK, combined, difference_masks, streams_of, top_mask
from excise.strategies.selection import fasp

if TYPE_CHECKING:
    from excise.attribution.gap_distance import Asked
    from excise.attribution.gap_gradient import GapGradient
    from excise.strategies.measured_path import Budgets, MeasuredPath


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


@dataclass(frozen=True)
class Making:
    """How masks are made beside their strategies: draws of the random and of the `permuted` controls, the seed of all
    draws, and what measured paths are made with."""

    random_draws: int
    seed: int
    permutations: int = 0
    paths: Paths | None = None
    progress: Progress = silent


def build_masks(
    loaded: LoadedModel,
    strategies: Iterable[Strategy],
    files: Iterable[AttributionFile],
    making: Making,
    *,
    scenario: str,
    store: Callable[[Mask], Path],
) -> Iterator[NamedMask]:
    """Make every strategy's masks and their controls, one at a time.

    files: the attribution files of one model and `scenario`. store: keeps a mask and returns where, as prompt-specific
    masks are read again for the within-context level.
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
            made = _set_difference_masks(loaded, strategy, sources, making.permutations, store)
        else:
            made = _measured_path_masks(strategy, sources, making.paths, scenario)
        total, done = len(variations) * len(_levels(strategy, variations)), 0
        for named in made:
            yield named
            if named.matched_to is None:
                yield from _random_controls(named, strategy, making.random_draws, making.seed)
                done += 1
                making.progress(f"masks {strategy.key}", done, total)


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
    layers, heads = (1 + max(impacts[column].to_list()) for column in ("layer", "head"))
    ordered = impacts.sort("layer", "head")
    if ordered.height != layers * heads:
        raise ExciseError(
            f"head impacts: {layers * heads} heads are expected, {ordered.height} are there; materialize head_impacts "
            "of this partition again"
        )
    for strategy in strategies:
        chosen = np.isin(np.arange(layers * heads), _ranked_heads(strategy, ordered, seed))
        mask = heads_mask(chosen.reshape(layers, heads), "zero_output")
        named = NamedMask("", strategy.key, OWN_SCENARIO, None, 0, mask)
        made = [named, *_random_controls(named, strategy, random_draws, seed)]
        yield from (replace(built, variation=variation) for variation in variations for built in made)


def _ranked_heads(strategy: Strategy, impacts: pl.DataFrame, seed: int) -> np.ndarray:
    """Flat indices of the heads a strategy prunes."""

    def known(column: pl.Series) -> np.ndarray:
        values = column.cast(pl.Float64).fill_null(math.nan).to_numpy()
        if np.isnan(values).any():
            mend = "materialize head_impacts of this partition again"
            if column.name == "bias_without":
                mend = "without them too few answers have a value to tell a disparity by, so ask for more samples"
            count = int(np.isnan(values).sum())
            raise ExciseError(
                f"head impacts: {column.name} of {count} heads is not known, which {strategy.key} needs; {mend}"
            )
        return values

    rank = strategy.record.rank
    if rank is None:
        raise ExciseError(f"strategies: score {strategy.score} is of no heads of a whole scenario")
    ranking = rank(impacts, _seed(seed, strategy.key.partition("-")[0]))
    harm = known(ranking.harm)
    need = np.zeros(len(harm)) if ranking.need is None else known(ranking.need)
    alpha, gamma = strategy.parameters["alpha"], strategy.parameters.get("gamma", 0.0)
    chosen = fasp(need, harm, alpha, gamma, bool(strategy.parameters.get("paper_ties", 0)))
    if not np.isfinite(harm[chosen]).all():
        raise ExciseError(
            f"head impacts: {strategy.key} asks for {len(chosen)} heads, but only {np.isfinite(harm).sum()} have a "
            "defined disparity without them; lower alpha or gamma"
        )
    return chosen


def build_cross_context_masks(
    strategies: Iterable[Strategy],
    sources: Sequence[SourceMask],
    scenario: str,
    variations: Sequence[str],
    making: Making,
    *,
    per_source: bool,
) -> Iterator[NamedMask]:
    """Masks for the `variations` of `scenario` that need other scenarios (BDB, section 4), and their random controls.

    sources: what all variations of all scenarios lend, the target's among them. Level `cross_context` combines all
    other scenarios, `cross_context/SCENARIO`, where `per_source` asks for it, takes one, and `all_contexts` the
    target's own, too; all variations of the target get the same mask. A strategy without a source in any other scenario
    has no mask, and none at the level `all_contexts` without one in the target itself. Only measured paths need a
    model.
    """
    chosen = [strategy for strategy in strategies if set(ACROSS) & set(strategy.levels)]
    for number, strategy in enumerate(chosen):
        usable = [source for source in sources if source.strategy == strategy.key]
        others = [source for source in usable if source.scenario != scenario]
        pools: dict[str, list[SourceMask]] = {}
        if others and CROSS_CONTEXT in strategy.levels:
            pools[CROSS_CONTEXT] = others
        if others and len(usable) > len(others) and ALL_CONTEXTS in strategy.levels:
            pools[ALL_CONTEXTS] = usable
        if per_source and CROSS_CONTEXT in strategy.levels:
            for source in others:
                pools.setdefault(f"{CROSS_CONTEXT}/{source.scenario}", []).append(source)
        for level, pool in pools.items():
            if strategy.selection == MEASURED_PATH:
                mask = follow_path(strategy, pool, making.paths, level, "").mask
                if mask is None:
                    continue
            else:
                mask = combined(strategy, [source.mask for source in pool if source.mask is not None])
            # A draw serves all variations, as the mask itself does. Single sources are many, so one draw each.
            draws = making.random_draws if level in ACROSS else min(1, making.random_draws)
            named = NamedMask("", strategy.key, level, None, 0, mask)
            made = [named, *_random_controls(named, strategy, draws, making.seed)]
            yield from (replace(built, variation=variation) for variation in variations for built in made)
        making.progress("cross-context masks", number + 1, len(chosen))


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
        scores = streams_of(loaded, strategy, file.path)
        with tempfile.TemporaryDirectory(prefix="excise-grid-") as folder:
            tops: dict[tuple[int, float], Path] = {}
            wanted = sorted({(0, point[0]) for point in points} | {(1, point[1]) for point in points})
            for number, (side, threshold) in enumerate(wanted):
                tops[side, threshold] = Path(folder) / f"{number}.safetensors"
                weighting = ("minority", "majority")[side]
                top_mask(strategy, scores, weighting, threshold).save(tops[side, threshold])
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


def _set_difference_masks(
    loaded: LoadedModel,
    strategy: Strategy,
    sources: Mapping[str, Path],
    permutations: int,
    store: Callable[[Mask], Path],
) -> Iterator[NamedMask]:
    kinds = [MASK, *(control for control in strategy.controls if control not in (RANDOM, "permuted"))]
    if "permuted" in strategy.controls:
        kinds += [f"permuted_{draw}" for draw in range(permutations)]
    kept: list[Path] = []
    for variation, path in sources.items():
        for kind, mask in difference_masks(strategy, streams_of(loaded, strategy, path), kinds):
            if kind == MASK:
                kept.append(store(mask))
                if PROMPT_SPECIFIC in strategy.levels:
                    yield NamedMask(variation, strategy.key, PROMPT_SPECIFIC, None, 0, mask)
            elif PROMPT_SPECIFIC in strategy.levels:
                name, _, draw = kind.rpartition("_") if kind.startswith("permuted") else (kind, "", "0")
                yield NamedMask(variation, name, PROMPT_SPECIFIC, strategy.key, int(draw), mask)
    if WITHIN_CONTEXT in _levels(strategy, list(sources)):
        if strategy.combine == "intersection":
            masks = iter(leave_one_out(lambda: map(load_mask, kept)))
        else:
            masks = (combined(strategy, kept[:index] + kept[index + 1 :]) for index in range(len(kept)))
        for variation, mask in zip(sources, masks, strict=True):
            yield NamedMask(variation, strategy.key, WITHIN_CONTEXT, None, 0, mask)


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
    from excise.strategies.measured_path import Course, kept_path
    from excise.strategies.units import heads_of, weights_of

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
        read = strategy.record.candidates
        if read is None:
            raise ExciseError(f"strategies: score {strategy.score} has no candidates that {strategy.selection} takes")
        candidates = [read(source.score) for source in pool if source.score is not None]
        units = weights_of(paths.loaded, strategy.roles, _best_of_all(candidates))
    budgets = replace(paths.budgets, lost=strategy.parameters.get("lost", paths.budgets.lost))
    path = kept_path(
        paths.loaded,
        asked,
        units,
        Course(strategy.parameters["density"], budgets, paths.seed),
        folder=paths.folder,
        progress=paths.progress,
        label=f"{strategy.key} {level.replace('_', '-')} {variation}".rstrip(),
    )
    paths.note(strategy.key, level, variation, path)
    return path


def _best_of_all(files: Sequence[GapGradient]) -> dict[str, np.ndarray]:
    """Candidates of several variations: as many as of one, from each its own best ones; flat indices by key."""
    best: dict[str, list[np.ndarray]] = {}
    for scores in files:
        for key, candidates in scores.candidates.items():
            worth = candidates.drop / (candidates.harm + scores.damping)
            count = math.ceil(len(worth) / len(files))
            best.setdefault(key, []).append(candidates.index[np.argsort(-worth, kind="stable")[:count]])
    return {key: np.concatenate(parts) for key, parts in best.items()}
