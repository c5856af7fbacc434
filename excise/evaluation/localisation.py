"""Localisation against ground truth: how much of a planted change lies on a mask's weights or heads, against chance.

Here masks are held against the file of a low-rank change, matrix by matrix; no model is loaded. Training the change is
the package's own business, and how well a mask works is `evaluation`.
Only a planted model has such a truth: the gap came with `up @ down`, so the weights that carry it are those it changed.
The squared change is its energy; a random mask of the same size covers a known share of it, with a known spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from excise.errors import ExciseError
from excise.interventions.heads import MATRIX_OF
from excise.interventions.packed import Mask


@dataclass(frozen=True)
class EnergyShare:
    """How much of a planted change lies under a mask. Shares of 0..1, NaN where the mask's matrices hold none of it.

    share: of the energy in the mask's matrices, what lies on its weights. chance: what random masks of as many weights
    (heads) in each matrix hold on average; deviation: their standard deviation. overall: the mask's energy as a share
    of the whole change, matrices the mask cannot touch included; chance_overall: the same of random masks.
    density: of the mask.
    """

    share: float
    chance: float
    deviation: float
    overall: float
    chance_overall: float
    density: float

    @property
    def lift(self) -> float:
        """How many times chance the share is; NaN for an empty mask."""
        return self.share / self.chance if self.chance else math.nan


def energy_share(path: Path | str, mask: Mask, *, heads: int | None = None, head_dim: int | None = None) -> EnergyShare:
    """The share of a planted change's energy, its squared Frobenius norm, that lies on the mask's weights.

    path: safetensors file of the change, `{layer}.{role}.up` [out, rank] and `.down` [rank, in]; where the gap was
    planted on top of another planted model, the gap's own file. mask: weights of matrices `{layer}.{role}`, or heads
    `{layer}.head_query` and `{layer}.head_output`, [1, heads]: a head's energy is that of its rows of q (its columns of
    o). heads, head_dim: number of query heads and their size, needed for a mask of heads.

    The deviation is exact: n weights drawn without replacement from a matrix of N have a sum of variance
    n (1 - n/N) s^2, s^2 the sample variance of the matrix' squared changes, and matrices are drawn independently.

    Raises ExciseError where the file is no such change, or does not fit the mask.
    """
    return energy_shares(path, [mask], heads=heads, head_dim=head_dim)[0]


def energy_shares(
    path: Path | str, masks: Sequence[Mask], *, heads: int | None = None, head_dim: int | None = None
) -> list[EnergyShare]:
    """`energy_share` of several masks at once: every matrix of the change is multiplied out once for all of them."""
    path = Path(path)
    counts = [mask.counts() for mask in masks]
    keys: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for mask in masks for key in mask.shapes):
        keys.setdefault(_matrix_of(key), []).append(key)
    total = 0.0
    covered, expected, variance, within = np.zeros((4, len(masks)))
    for matrix, up, down in _changes(path):
        # ||up down||^2 without the product, which only the masks' own matrices need
        whole = float(((up.T @ up) * (down @ down.T)).sum())
        total += whole
        if matrix not in keys:
            continue
        energy = np.square(up @ down)
        for key in keys[matrix]:
            parts = energy if key == matrix else _by_head(path, key, energy, heads, head_dim)
            spread = float(parts.var(ddof=1, dtype=np.float64)) if parts.size > 1 else 0.0
            for number, mask in enumerate(masks):
                if key not in mask.shapes:
                    continue
                if mask.shapes[key] != parts.shape:
                    raise ExciseError(
                        f"{path}: {key} has shape {parts.shape}, the mask's {mask.shapes[key]}: they "
                        "belong to different models"
                    )
                share = counts[number][key] / parts.size
                within[number] += whole
                expected[number] += whole * share
                variance[number] += counts[number][key] * (1 - share) * spread
                if counts[number][key]:
                    covered[number] += parts[mask.array(key)].sum(dtype=np.float64)

    def of(part: float, whole: float) -> float:
        return float(part / whole) if whole else math.nan

    return [
        EnergyShare(
            share=of(covered[number], within[number]),
            chance=of(expected[number], within[number]),
            deviation=of(math.sqrt(variance[number]), within[number]),
            overall=of(covered[number], total),
            chance_overall=of(expected[number], total),
            density=mask.density,
        )
        for number, mask in enumerate(masks)
    ]


def _matrix_of(key: str) -> str:
    """`3.q` for itself and for `3.head_query`."""
    layer, _, role = key.rpartition(".")
    return f"{layer}.{MATRIX_OF.get(role, role)}"


def _by_head(
    path: Path, key: str, energy: NDArray[np.float32], heads: int | None, head_dim: int | None
) -> NDArray[np.float64]:
    """The energy of every head of a q [heads * head_dim, in] or o [out, heads * head_dim]: [1, heads]."""
    if heads is None or head_dim is None:
        raise ExciseError(f"the mask's {key} is of heads: give heads and head_dim of the model")
    per_unit = energy.sum(axis=1 if key.endswith("head_query") else 0, dtype=np.float64)
    if len(per_unit) != heads * head_dim:
        raise ExciseError(
            f"{path}: {_matrix_of(key)} does not fit {heads} heads of size {head_dim}: it has "
            f"{len(per_unit)} of their rows or columns"
        )
    return per_unit.reshape(1, heads, head_dim).sum(axis=2)


def _changes(path: Path) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """(matrix, up [out, rank], down [rank, in]) of every matrix of the file, one at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for matrix in sorted({name.rpartition(".")[0] for name in names}):
                sides = [f"{matrix}.{side}" for side in ("up", "down")]
                factors = [file.get_tensor(side).float().numpy() for side in sides if side in names]
                if [factor.ndim for factor in factors] != [2, 2] or factors[0].shape[1] != factors[1].shape[0]:
                    raise ExciseError(
                        f"{path}: {matrix} lacks a factor up [out, rank] or down [rank, in]; the file is "
                        "no low-rank change"
                    )
                yield matrix, *factors
    except FileNotFoundError:
        raise ExciseError(f"{path}: there is no such file; name the low-rank change of a planted model") from None
    except (OSError, SafetensorError) as error:
        raise ExciseError(f"{path}: cannot be read as safetensors ({error}); name a low-rank change") from None
