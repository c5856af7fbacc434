"""What a measured path may prune, weights or whole heads, and gradients of its loss by them.

Which of them a path prunes, step by step, is `excise.strategies.measured_path`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from excise.attribution.gap_distance import Batch, loss
from excise.attribution.gradients import Calls, gradient_of_calls, output_gradients, recorded
from excise.interventions.heads import heads_mask
from excise.interventions.packed import Mask
from excise.interventions.weights import WeightMask
from excise.models.loading import LoadedModel
from excise.models.topology import Linear


@dataclass(frozen=True)
class Units:
    """What may be pruned: the given weights of matrices, or whole heads.

    linears: matrices by key. places: flat indices of the weights by key, int64 rising; None for heads, of which all may
    be. shapes: of all matrices that the strategy may prune, looked at or not, in the order of their keys.
    """

    linears: Mapping[str, Linear]
    places: Mapping[str, torch.Tensor] | None
    shapes: Mapping[str, tuple[int, int]]
    heads: int = 0

    @property
    def total(self) -> int:
        """Weights, or heads, of which `density` is a share."""
        return len(self.linears) * self.heads if self.places is None else sum(map(math.prod, self.shapes.values()))

    @property
    def mask_shapes(self) -> Mapping[str, tuple[int, int]]:
        """Keys and shapes of the masks."""
        if self.places is not None:
            return self.shapes
        return heads_mask(np.zeros((len(self.linears), self.heads), dtype=bool), "zero_output").shapes

    def mask(self, active: torch.Tensor) -> Mask:
        """The mask of the active units, bool [units]."""
        if self.places is None:
            return heads_mask(active.reshape(-1, self.heads).numpy(), "zero_output")
        bits = {key: np.zeros((math.prod(shape) + 7) // 8, dtype=np.uint8) for key, shape in self.shapes.items()}
        start = 0
        for key, places in self.places.items():
            pruned = places[active[start : start + len(places)]].numpy()
            np.bitwise_or.at(bits[key], pruned >> 3, (128 >> (pruned & 7)).astype(np.uint8))
            start += len(places)
        return WeightMask(bits, self.shapes)


def weights_of(loaded: LoadedModel, roles: Sequence[str], candidates: Mapping[str, np.ndarray]) -> Units:
    """Weights of the matrices of these roles. candidates: flat indices by key, of which other roles' are left aside."""
    linears = {linear.key: linear for linear in loaded.topology.linears if linear.role in roles}
    places = {key: torch.from_numpy(np.unique(candidates[key])) for key in linears if len(candidates.get(key, ()))}
    shapes = {key: linear.shape for key, linear in linears.items()}
    return Units({key: linears[key] for key in places}, places, shapes)


def heads_of(loaded: LoadedModel) -> Units:
    """All heads, removed at the input of the output projections."""
    linears = {linear.key: linear for linear in loaded.topology.linears if linear.role == "o"}
    return Units(linears, None, {}, loaded.topology.heads)


def sizes(loaded: LoadedModel, units: Units) -> torch.Tensor:
    """The weights that may be pruned, float32 [units]; of heads, 1."""
    if units.places is None:
        return torch.ones(units.total)
    weights = []
    for key, places in units.places.items():
        weight = units.linears[key].weight(loaded.model).detach().reshape(-1)
        weights.append(weight[places.to(weight.device)].float().cpu())
    return torch.cat(weights)


def gradient(loaded: LoadedModel, batches: Sequence[Batch], units: Units) -> tuple[torch.Tensor, float]:
    """d loss / d unit, mean over names, float32 [units], and the loss per name."""
    total, height, names = torch.zeros(_size(units)), 0.0, 0
    for batch in batches:
        with recorded(loaded, _modules(units)) as calls, torch.inference_mode(False), torch.enable_grad():
            away, _ = loss(loaded, batch)
            total += _of_units(loaded, units, calls, output_gradients(away, calls))
        height += away.item()
        names += len(batch.numbers)
    return total / names, height / names


def gradient_and_squares(
    loaded: LoadedModel, batches: Sequence[Batch], units: Units, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """As `gradient`, and between the two the sum over names of squared gradients of an answer's log p.

    Answers of a batch get random signs: the square of the signed gradient has the sum of squares as its expectation.
    """
    total, squares, height, names = *torch.zeros(2, _size(units)), 0.0, 0
    signs = np.random.default_rng(seed)
    for batch in batches:
        with recorded(loaded, _modules(units)) as calls, torch.inference_mode(False), torch.enable_grad():
            away, edges = loss(loaded, batch)
            sign = torch.from_numpy(signs.choice((-1.0, 1.0), size=len(edges))).to(edges)
            signed = (edges * sign * batch.taken.clamp(min=0).sqrt()).sum()
            squares += _of_units(loaded, units, calls, output_gradients(signed, calls, again=True)).square()
            total += _of_units(loaded, units, calls, output_gradients(away, calls))
        height += away.item()
        names += len(batch.numbers)
    return total / names, squares, height / names


def _size(units: Units) -> int:
    return units.total if units.places is None else sum(map(len, units.places.values()))


def _modules(units: Units) -> list[str]:
    return list(dict.fromkeys(linear.module for linear in units.linears.values()))


@torch.no_grad()
def _of_units(loaded: LoadedModel, units: Units, calls: Calls, deltas: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """The gradient of every unit from those of the matrices' outputs, float32 [units]; the matrices' are let go."""
    by_module: dict[str, list[str]] = {}
    for key, linear in units.linears.items():
        by_module.setdefault(linear.module, []).append(key)
    by_key: dict[str, torch.Tensor] = {}
    for module, keys in by_module.items():
        linears = [units.linears[key] for key in keys]
        whole = gradient_of_calls(linears[0], calls[module], deltas.pop(module))
        for key, linear in zip(keys, linears, strict=True):
            part = linear.of(whole)
            if units.places is None:
                weight = linear.weight(loaded.model).detach().to(part.device).float()
                by_key[key] = (weight * part).sum(dim=0).reshape(units.heads, -1).sum(dim=1).cpu()
            else:
                by_key[key] = part.reshape(-1)[units.places[key].to(part.device)].cpu()
    return torch.cat([by_key[key] for key in units.linears])
