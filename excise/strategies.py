"""Strategies: a score, a selection, the levels it is made at and its controls, named and configured in one YAML.

Here scores become named masks. A control has exactly as many pruned weights in every matrix as the mask it belongs to,
so what differs between them is which weights, never how many. Scores come from `excise.attribution`, selection rules
from `excise.selection`; sampling under a mask and judging it happen elsewhere.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from excise.attribution import GAP_GRADIENT_KEEP, AttributionFile, read_candidates, read_norms
from excise.errors import ExciseError
from excise.masks import Mask, leave_one_out, random_like
from excise.models import ROLES, Linear, LoadedModel, UniqueKeyLoader
from excise.progress import Progress, silent
from excise.selection import pooled_band, set_difference, set_difference_of_count

BUILT_IN_STRATEGIES = Path(__file__).with_name("strategies.yaml")
PROMPT_SPECIFIC, WITHIN_CONTEXT = "prompt_specific", "within_context"
CONTROLS = ("random", "pooled_band", "reversed", "permuted")


class Strategy(BaseModel):
    """One entry of strategies.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    description: str = ""
    score: Literal["wanda", "gap_gradient"]
    selection: Literal["set_difference", "predicted_drop"]
    parameters: dict[str, float] = {}
    roles: tuple[str, ...] = Field(min_length=1)
    levels: tuple[Literal["prompt_specific", "within_context"], ...] = (PROMPT_SPECIFIC, WITHIN_CONTEXT)
    controls: tuple[Literal["random", "pooled_band", "reversed", "permuted"], ...] = ("random",)

    @model_validator(mode="after")
    def _fits_together(self) -> Strategy:
        allowed = {
            "set_difference": ("wanda", {"tau_min", "tau_maj"}, set()),
            "predicted_drop": ("gap_gradient", {"density"}, {"target"}),
        }
        score, required, optional = allowed[self.selection]
        given = set(self.parameters)
        if self.score != score:
            raise ValueError(f"selection {self.selection} works on score {score}, not {self.score}")
        if required - given or given - required - optional:
            names = ", ".join(sorted(required | optional))
            raise ValueError(f"parameters of {self.selection} are {names}; found {', '.join(sorted(given)) or 'none'}")
        # Denser masks of gap_gradient would end where its candidates do, not where they were asked to.
        highest = {"density": GAP_GRADIENT_KEEP, "target": math.inf}
        for name, value in self.parameters.items():
            limit = highest.get(name, 1.0)
            if not 0 < value <= limit:
                raise ValueError(f"parameters.{name} is {value:g}; it must be above 0 and at most {limit:g}")
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"roles {', '.join(sorted(unknown))} are not known; known are {', '.join(ROLES)}")
        if self.score != "wanda" and set(self.controls) - {"random"}:
            raise ValueError("controls pooled_band, reversed and permuted exist for score wanda only")
        if self.key in (*CONTROLS, "unpruned"):
            raise ValueError(f"{self.key} is the name of a control; choose another")
        return self


@dataclass(frozen=True)
class NamedMask:
    """A mask and what it is: made for `variation` at `level` by `strategy`; a control names whose control it is."""

    variation: str
    strategy: str
    level: str
    matched_to: str | None
    draw: int
    mask: Mask


def load_strategies(paths: Iterable[Path] = ()) -> dict[str, Strategy]:
    """The built-in strategies, then those of each of `paths` that exists; later entries replace earlier ones.

    Raises ExciseError naming file, strategy and field.
    """
    strategies: dict[str, Strategy] = {}
    for path in [BUILT_IN_STRATEGIES, *(Path(each) for each in paths)]:
        if not path.exists():
            continue
        try:
            entries = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader) or {}  # noqa: S506 - a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise ExciseError(f"{path}: cannot be read as YAML: {error}") from error
        if not isinstance(entries, dict):
            raise ExciseError(f"{path}: must map strategy names to their fields")
        for key, fields in entries.items():
            if not isinstance(fields, dict) or "key" in fields:
                raise ExciseError(f"{path}: {key}: must hold fields such as score and selection, and no key of its own")
            try:
                strategies[key] = Strategy.model_validate({"key": key, **fields})
            except ValidationError as error:
                lines = [f"{path}: {'.'.join(map(str, (key, *each['loc'])))}: {each['msg']}" for each in error.errors()]
                raise ExciseError("\n".join(lines)) from error
    return strategies


def build_masks(
    loaded: LoadedModel,
    strategies: Iterable[Strategy],
    files: Iterable[AttributionFile],
    *,
    random_draws: int,
    permutations: int,
    seed: int,
    store: Callable[[Mask], Path],
    progress: Progress = silent,
) -> Iterator[NamedMask]:
    """Make every strategy's masks and their controls, one at a time.

    files: the attribution files of one model and scenario. store: keeps a mask and returns where, as prompt-specific
    masks are read again for the within-context level. random_draws and permutations: draws of those controls.
    The within-context mask of a variation is the intersection of the other variations' masks (BDB, section 4); for
    `predicted_drop` it is the same selection on the others' summed predictions, as such masks hardly intersect.
    """
    paths = {(file.score, file.variation): file.path for file in files}
    for strategy in strategies:
        if not _linears(loaded, strategy):
            there = ", ".join(dict.fromkeys(linear.role for linear in loaded.topology.linears))
            raise ExciseError(f"strategies: {strategy.key}.roles: {loaded.key} has none of these, it has {there}")
        variations = [variation for score, variation in paths if score == strategy.score]
        sources = {variation: paths[strategy.score, variation] for variation in variations}
        make = _set_difference_masks if strategy.selection == "set_difference" else _predicted_drop_masks
        done = 0
        for named in make(loaded, strategy, sources, permutations, seed, store):
            yield named
            if named.matched_to is None:
                if "random" in strategy.controls:
                    for draw in range(random_draws):
                        control = random_like(named.mask, _seed(seed, strategy.key, named.level, named.variation, draw))
                        yield NamedMask(named.variation, "random", named.level, strategy.key, draw, control)
                done += 1
                progress(f"masks {strategy.key}", done, len(variations) * len(_levels(strategy, variations)))


def _levels(strategy: Strategy, variations: list[str]) -> tuple[str, ...]:
    """A single variation has no others to make a within-context mask from."""
    return tuple(level for level in strategy.levels if level == PROMPT_SPECIFIC or len(variations) > 1)


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def _linears(loaded: LoadedModel, strategy: Strategy):
    return [linear for linear in loaded.topology.linears if linear.role in strategy.roles]


def _set_difference_masks(
    loaded: LoadedModel, strategy: Strategy, sources: Mapping[str, Path], permutations: int, seed: int, store
) -> Iterator[NamedMask]:
    tau_min, tau_maj = strategy.parameters["tau_min"], strategy.parameters["tau_maj"]
    kinds = ["mask", *(control for control in strategy.controls if control not in ("random", "permuted"))]
    if "permuted" in strategy.controls:
        kinds += [f"permuted_{draw}" for draw in range(permutations)]
    kept: list[Path] = []
    for variation, path in sources.items():
        norms = read_norms(path)
        linears = _linears(loaded, strategy)
        # Ranking releases the interpreter lock, so threads share the work; each holds one matrix.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
            chosen = threads.map(lambda linear: _chosen(loaded, linear, norms, kinds, tau_min, tau_maj), linears)  # noqa: B023
            arrays = {kind: {} for kind in kinds}
            for linear, packed in zip(linears, chosen, strict=True):
                for kind in kinds:
                    arrays[kind][linear.key] = packed[kind]
        shapes = {linear.key: linear.shape for linear in linears}
        for kind in kinds:
            mask = Mask(arrays.pop(kind), shapes)
            if kind == "mask":
                kept.append(store(mask))
                if PROMPT_SPECIFIC in strategy.levels:
                    yield NamedMask(variation, strategy.key, PROMPT_SPECIFIC, None, 0, mask)
            elif PROMPT_SPECIFIC in strategy.levels:
                name, _, draw = kind.rpartition("_") if kind.startswith("permuted") else (kind, "", "0")
                yield NamedMask(variation, name, PROMPT_SPECIFIC, strategy.key, int(draw), mask)
    if WITHIN_CONTEXT in _levels(strategy, list(sources)):
        for variation, mask in zip(sources, leave_one_out(lambda: map(Mask.load, kept)), strict=True):
            yield NamedMask(variation, strategy.key, WITHIN_CONTEXT, None, 0, mask)


def _chosen(
    loaded: LoadedModel,
    linear: Linear,
    norms: Mapping[str, Mapping[str, np.ndarray]],
    kinds: list[str],
    tau_min: float,
    tau_maj: float,
) -> dict[str, np.ndarray]:
    """One matrix of the set difference and of its controls of the same count, as packed bits by kind."""
    weight = np.abs(linear.weight(loaded.model).detach().float().cpu().reshape(linear.shape).numpy())

    def score(weighting: str) -> np.ndarray:
        return weight * norms[weighting][f"{linear.layer}.{linear.site}"]

    mask = set_difference(score("minority"), score("majority"), tau_min, tau_maj)
    count = int(np.count_nonzero(mask))
    packed = {}
    for kind in kinds:
        if kind == "mask":
            chosen = mask
        elif kind == "pooled_band":
            chosen = pooled_band(score("pooled"), int(tau_maj * weight.size), count)
        else:
            # What reversed and permuted exchange: (scores in the minority's place, scores in the majority's place).
            places = ("majority", "minority")
            if kind != "reversed":
                draw = kind.removeprefix("permuted_")
                places = (f"permuted_minority_{draw}", f"permuted_majority_{draw}")
            chosen = set_difference_of_count(*map(score, places), tau_maj, count)
        packed[kind] = np.packbits(chosen, axis=None)
    return packed


def _predicted_drop_masks(
    loaded: LoadedModel, strategy: Strategy, sources: Mapping[str, Path], permutations: int, seed: int, store
) -> Iterator[NamedMask]:
    linears = _linears(loaded, strategy)
    found = {variation: read_candidates(path) for variation, path in sources.items()}
    for level in _levels(strategy, list(sources)):
        for variation in sources:
            used = [variation] if level == PROMPT_SPECIFIC else [other for other in sources if other != variation]
            index, drop, harm = {}, {}, {}
            for linear in linears:
                parts = [found[other].candidates[linear.key] for other in used]
                index[linear.key], place = np.unique(
                    np.concatenate([part.index for part in parts]), return_inverse=True
                )
                # As shares of each variation's disparity, so that every variation counts alike.
                shares = np.concatenate(
                    [part.drop / found[other].disparity for part, other in zip(parts, used, strict=True)]
                )
                times = np.bincount(place, minlength=len(index[linear.key]))
                drop[linear.key] = np.bincount(place, shares, len(times)) / len(used)
                harm[linear.key] = np.bincount(
                    place, np.concatenate([part.harm for part in parts]), len(times)
                ) / np.maximum(times, 1)
            damping = float(np.mean([found[other].damping for other in used]))
            chosen = _best(
                drop,
                harm,
                damping,
                strategy.parameters,
                sum(linear.out_features * linear.in_features for linear in linears),
            )
            arrays = {}
            for linear in linears:
                array = np.zeros(linear.out_features * linear.in_features, dtype=bool)
                array[index[linear.key][chosen[linear.key]]] = True
                arrays[linear.key] = array.reshape(linear.shape)
            mask = Mask.from_arrays(arrays)
            store(mask)
            yield NamedMask(variation, strategy.key, level, None, 0, mask)


def _best(
    drop: dict[str, np.ndarray], harm: dict[str, np.ndarray], damping: float, parameters: Mapping[str, float], size: int
) -> dict[str, np.ndarray]:
    """Best drop / (harm + damping) first, until the density or the drop `target` (share of the gap) is met."""
    drops, harms = np.concatenate(list(drop.values())), np.concatenate(list(harm.values()))
    order = np.argsort(-drops / (harms + damping), kind="stable")[: int(parameters["density"] * size)]
    if "target" in parameters:
        order = order[: int(np.searchsorted(np.cumsum(drops[order]), parameters["target"])) + 1]
    chosen = np.zeros(len(drops), dtype=bool)
    chosen[order] = True
    starts = np.cumsum([0, *(len(each) for each in drop.values())])
    return {key: chosen[starts[i] : starts[i + 1]] for i, key in enumerate(drop)}
