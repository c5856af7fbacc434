"""Overlap: how much of one pruning mask lies in another.

Here belong comparisons of masks with each other; how well a mask works is `evaluation`.
The concept is BDB's overlap of the components found for different prompts (Fig. 3), which is asymmetric and means
something only beside the level two unrelated masks would reach.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.errors import ExciseError
from excise.masks import Mask


def overlap_fraction(mask: Mask | ArrayLike, reference: Mask | ArrayLike) -> float:
    """The share of `mask`'s entries that are also in `reference`: |mask & reference| / |mask| (BDB, Fig. 3).

    Both are boolean arrays (or 0 and 1) of one shape, or both `Mask`s of the same matrices. In BDB's figure `mask`
    is that of scenario and variation (s, v), `reference` that of a purchase. NaN where `mask` is empty: there is no
    share of nothing.

    Raises ExciseError when shapes or matrices differ.
    """
    if isinstance(mask, Mask) != isinstance(reference, Mask):
        raise ExciseError("overlap_fraction takes two masks or two arrays, not one of each")
    if isinstance(mask, Mask) and isinstance(reference, Mask):
        mask.check_same_matrices(reference)
        size = mask.count
        shared = sum(int(np.bitwise_count(bits & reference.bits[key]).sum()) for key, bits in mask.bits.items())
    else:
        a, b = _boolean("mask", mask), _boolean("reference", reference)
        if a.shape != b.shape:
            raise ExciseError(f"mask has shape {a.shape} and reference {b.shape}: they must be equal")
        size = np.count_nonzero(a)
        shared = np.count_nonzero(a & b)
    return shared / size if size else math.nan


def chance_level(reference: Mask | ArrayLike) -> float:
    """The overlap fraction a mask without any relation to `reference` has on average: the density of `reference`.

    NaN where `reference` has no entries at all.
    """
    if isinstance(reference, Mask):
        return reference.count / reference.size if reference.size else math.nan
    array = _boolean("reference", reference)
    return np.count_nonzero(array) / array.size if array.size else math.nan


def _boolean(name: str, array: object) -> NDArray[np.bool_]:
    values = np.asarray(array)
    if values.dtype == bool or values.size == 0:
        return values.astype(bool)
    if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
        raise ExciseError(f"{name} must be a boolean array (or hold 0 and 1 only), but holds {values.dtype}")
    return values.astype(bool)
