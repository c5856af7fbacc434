"""Matched controls: what has the size of an intervention and none of its knowledge, as recipes.

A recipe says in a few numbers which weights or heads a control takes, on every device the same ones. It is made where
it is applied, so no control is ever a file. Controls that need scores are made with their strategies.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from excise.errors import ExciseError

if TYPE_CHECKING:
    from excise.interventions.packed import Mask
    from excise.models.loading import LoadedModel


@dataclass(frozen=True)
class RandomControl:
    """A random mask with exactly as many weights in every matrix as another: the control for its mere damage.

    parent: the other mask's fingerprint; mask_kind, shapes, pruned: its kind, shapes and counts by matrix. known: the
    control's own fingerprint, where it has been made before; it is then not made for its name alone, and refused where
    it comes out as another.

    The draw of a matrix depends on the seed, the matrix' key, its size and its count alone. With one seed, a smaller
    count (both up to half of the matrix) gives a subset of a larger one; independent draws need different seeds.
    """

    parent: str
    mask_kind: type[Mask]
    shapes: Mapping[str, tuple[int, int]]
    pruned: Mapping[str, int]
    seed: int
    known: str | None = None

    @functools.cached_property
    def mask(self) -> Mask:
        """The control itself, made at the first use and kept as long as the recipe is.

        Raises ExciseError where it is not what it was when it got its fingerprint.
        """
        bits = {
            key: np.packbits(_random_subset(math.prod(shape), self.pruned[key], f"random mask|{self.seed}|{key}"))
            for key, shape in self.shapes.items()
        }
        mask = self.mask_kind(bits, self.shapes)
        if self.known is not None and mask.fingerprint != self.known:
            raise ExciseError(
                f"the random control {self.known} of the mask {self.parent} comes out as {mask.fingerprint}: it was "
                "drawn by another version, or of another mask; make the masks again"
            )
        return mask

    @property
    def unit(self) -> str:
        return self.mask_kind.unit

    @property
    def folded_as(self) -> str:
        return self.mask_kind.folded_as

    @property
    def count(self) -> int:
        return sum(self.pruned.values())

    def counts(self) -> dict[str, int]:
        """The number of pruned weights per matrix."""
        return dict(self.pruned)

    @property
    def fingerprint(self) -> str:
        """That of the mask it makes."""
        return self.mask.fingerprint if self.known is None else self.known

    def applied(self, loaded: LoadedModel) -> AbstractContextManager[LoadedModel]:
        return self.mask.applied(loaded)

    def fold(self, loaded: LoadedModel) -> None:
        self.mask.fold(loaded)

    def control(self, seed: int, known: str | None = None) -> RandomControl:
        """Another draw of the same size."""
        return replace(self, seed=seed, known=known)


def _random_subset(size: int, count: int, label: str) -> NDArray[np.bool_]:
    """A uniformly random subset of exact size: places are drawn until enough distinct ones have come up."""
    if count > size // 2:
        return ~_random_subset(size, size - count, label)
    generator = np.random.Philox(key=int.from_bytes(hashlib.sha256(label.encode()).digest()[:16]))
    chosen = np.zeros(size, dtype=bool)
    missing = count
    while missing:
        # As many places as are missing can never be too many, so the stream is cut at the same draw in any rounds.
        chosen[generator.random_raw(missing) % np.uint64(size)] = True
        missing = count - int(np.count_nonzero(chosen))
    return chosen
