"""Masks of masks: what all, some or enough of several masks hold, of one kind and the same matrices.

Masks come one by one, so that those of a large model can be read from their files in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from excise.errors import ExciseError
from excise.interventions.packed import Mask, check_same_shapes

NOTHING_TO_COMBINE = "there are no masks to combine: give one at least"


def intersection(masks: Iterable[Mask]) -> Mask:
    """The weights in every mask (BDB's mask of a context, section 5). Raises ExciseError when there is no mask.

    Masks are taken one by one, so that an iterator over files holds three at a time.
    """
    return _reduced(Mask.__and__, masks)


def union(masks: Iterable[Mask]) -> Mask:
    """The weights in any mask, taken one by one. Raises ExciseError when there is no mask."""
    return _reduced(Mask.__or__, masks)


def votes(masks: Iterable[Mask], k: int) -> Mask:
    """The weights in at least `k` of the masks: 1 is the union, the number of masks the intersection.

    Raises ExciseError when there is no mask, `k` is not between 1 and their number, or their matrices differ.
    """
    masks = list(masks)
    if not masks:
        raise ExciseError(NOTHING_TO_COMBINE)
    if not 1 <= k <= len(masks):
        raise ExciseError(f"k is {k}: it must be between 1 and the number of masks, {len(masks)}")
    first = masks[0]
    for mask in masks[1:]:
        first.check_same_matrices(mask)
    bits = {}
    for key, shape in first.shapes.items():
        in_favour = np.zeros(math.prod(shape), dtype=np.min_scalar_type(len(masks)))
        for mask in masks:
            in_favour += np.unpackbits(mask.bits[key], count=in_favour.size)
        bits[key] = np.packbits(in_favour >= k)
    return type(first)(bits, first.shapes)


def leave_one_out(masks: Callable[[], Iterable[Mask]]) -> Iterator[Mask]:
    """For each mask the intersection of all *other* masks (BDB's within-context level, section 4), in their order.

    `masks` gives the same masks anew at each call, so they can come from files: the memory of four masks is held,
    however many there are. Raises ExciseError for fewer than two masks.
    """
    everywhere: dict[str, NDArray[np.uint8]] = {}
    missing_once: dict[str, NDArray[np.uint8]] = {}
    shapes: Mapping[str, tuple[int, int]] = {}
    kind: type[Mask] | None = None
    count = 0
    # Both are changed in place, and `del` lets go of a mask before the next one is read: at 8B each is 0.9 GB.
    for mask in masks():
        count += 1
        if kind is None:
            kind, shapes = type(mask), mask.shapes
            for key, bits in mask.bits.items():
                everywhere[key] = bits.copy()
                missing_once[key] = np.packbits(~mask.array(key))
        else:
            check_same_shapes(mask.shapes, shapes)
            for key, bits in mask.bits.items():
                missing_once[key] &= bits
                missing_once[key] |= everywhere[key] & ~bits
                everywhere[key] &= bits
        del mask
    if kind is None or count < 2:
        raise ExciseError(f"leaving one out of {count} masks leaves none: give at least two")
    for mask in masks():
        # A mask read for this alone goes as the result grows, while the caller may still have the one before.
        held = dict(mask.bits)
        del mask
        left = kind({key: everywhere[key] | (missing_once[key] & ~held.pop(key)) for key in everywhere}, shapes)
        yield left
        del left


def _reduced(operation: Callable[[Mask, Mask], Mask], masks: Iterable[Mask]) -> Mask:
    total = None
    for mask in masks:
        total = mask if total is None else operation(total, mask)
    if total is None:
        raise ExciseError(NOTHING_TO_COMBINE)
    return total
