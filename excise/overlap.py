"""Overlap: how much of one pruning mask lies in another.

Here belong comparisons of masks with each other; how well a mask works is `evaluation`.
The concept is BDB's overlap of the components found for different prompts (Fig. 3), which is asymmetric and means
something only beside the level two unrelated masks would reach.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.errors import ExciseError
from excise.masks import Mask, MaskFile

_BLOCK = 1 << 13  # words of 64 bits counted at a time: ten columns of them stay in a processor's own cache
_PIECE = 1 << 17  # words of a matrix that one thread counts


@dataclass(frozen=True, eq=False)
class Overlaps:
    """How much of each of R row masks lies in each of C column masks, all of the same matrices.

    `shared` [R, C] counts the weights in both, `row_counts` [R] and `column_counts` [C] those of each mask, and
    `size` is the number of weights a mask could hold.
    """

    shared: NDArray[np.int64]
    row_counts: NDArray[np.int64]
    column_counts: NDArray[np.int64]
    size: int

    @property
    def fraction(self) -> NDArray[np.float64]:
        """|row & column| / |row| [R, C], as `overlap_fraction` (BDB, Fig. 3); NaN for rows without any weight."""
        return _share(self.shared, self.row_counts[:, None])

    @property
    def chance(self) -> NDArray[np.float64]:
        """The fraction a row without any relation to the column has on average [C], as `chance_level`."""
        return _share(self.column_counts, np.int64(self.size))

    @property
    def excess(self) -> NDArray[np.float64]:
        """`fraction` less `chance` [R, C]: 0 for masks that have nothing to do with each other."""
        return self.fraction - self.chance


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


def overlap_table(rows: Sequence[Path | str | Mask], columns: Sequence[Path | str | Mask]) -> Overlaps:
    """The overlap of every row mask with every column mask, each a `Mask` or the file `Mask.save` has written.

    Streams matrix by matrix: beside masks given as such, two matrices' packed bits of all masks are held (one being
    counted, one being read), at Llama-3-8B's size 15 MB a mask. A file's bytes are read once, also where it is both a
    row and a column. Unlike `Mask.load` it does not verify fingerprints, which would cost as much as all the rest.

    Raises ExciseError when there are no rows or no columns, when a file is absent or is no mask, and, naming both
    masks, when their matrices differ.
    """
    if not rows or not columns:
        raise ExciseError(f"{len(rows)} row and {len(columns)} column masks have no overlap: give at least one of each")
    sources: dict[object, _Source] = {}
    places: list[list[int]] = []
    for side, masks in (("rows", rows), ("columns", columns)):
        keys = [id(mask) if isinstance(mask, Mask) else Path(mask).resolve() for mask in masks]
        for index, (key, mask) in enumerate(zip(keys, masks, strict=True)):
            if key not in sources:
                sources[key] = _of_mask(f"{side}[{index}]", mask) if isinstance(mask, Mask) else _of_file(Path(mask))
        order = list(sources)
        places.append([order.index(key) for key in keys])
    known = list(sources.values())
    for source in known[1:]:
        _check_same_matrices(known[0], source)
    counts = np.zeros(len(known), dtype=np.int64)
    shared = np.zeros((len(places[0]), len(places[1])), dtype=np.int64)
    # Reading and counting let go of the interpreter's lock: counting keeps up with the disk on a few processors.
    with ThreadPoolExecutor(max_workers=1 + (os.cpu_count() or 1)) as pool:
        for words in _matrices(known, pool):
            pieces = [words[:, start : start + _PIECE] for start in range(0, words.shape[1], _PIECE)]
            for more_counts, more_shared in pool.map(lambda piece: _counted(piece, *places), pieces):
                counts += more_counts
                shared += more_shared
    size = sum(math.prod(shape) for shape in known[0].shapes.values())
    return Overlaps(shared, counts[places[0]], counts[places[1]], size)


@dataclass(frozen=True)
class _Source:
    """Where a mask's bits come from: its name in errors, its matrices, and how one matrix' packed bits are got."""

    name: str
    shapes: Mapping[str, tuple[int, int]]
    read_into: Callable[[str, NDArray[np.uint8]], None]


def _of_mask(name: str, mask: Mask) -> _Source:
    return _Source(name, mask.shapes, lambda key, bits: np.copyto(bits, mask.bits[key]))


def _of_file(path: Path) -> _Source:
    file = MaskFile.open(path)
    return _Source(str(path), file.shapes, file.read_into)


def _check_same_matrices(first: _Source, second: _Source) -> None:
    for key in [*first.shapes, *second.shapes]:
        there = [f"{source.shapes.get(key, 'absent')} in {source.name}" for source in (first, second)]
        if first.shapes.get(key) != second.shapes.get(key):
            raise ExciseError(f"the masks are of different matrices: {key} is {' and '.join(there)}")


def _matrices(sources: Sequence[_Source], pool: ThreadPoolExecutor) -> Iterator[NDArray[np.uint64]]:
    """Per matrix the packed bits of all sources as words [sources, words], zeros behind the last bit.

    An array holds until the next one is asked for: two take turns, one being read while the other is used.
    """
    shapes = sources[0].shapes
    most = max((math.prod(shape) for shape in shapes.values()), default=0)
    buffers = cycle([np.empty((len(sources), -(-most // 64)), dtype=np.uint64) for _ in range(2)])

    def read(key: str, size: int, buffer: NDArray[np.uint64]) -> NDArray[np.uint64]:
        words = buffer[:, : -(-size // 64)]
        words[:, -1:] = 0
        for row, source in zip(words, sources, strict=True):
            source.read_into(key, row.view(np.uint8)[: -(-size // 8)])
        return words

    coming = None
    for key, shape in shapes.items():
        ready, coming = coming, pool.submit(read, key, math.prod(shape), next(buffers))
        if ready is not None:
            yield ready.result()
    if coming is not None:
        yield coming.result()


def _counted(
    words: NDArray[np.uint64], rows: Sequence[int], columns: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bits of every source and those each row shares with each column, in words [sources, words]."""
    counts = np.zeros(len(words), dtype=np.int64)
    shared = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for start in range(0, words.shape[1], _BLOCK):
        block = words[:, start : start + _BLOCK]
        counts += _ones(block)
        inside = block[columns]
        for index, row in enumerate(rows):
            shared[index] += _ones(inside & block[row])
    return counts, shared


def _ones(words: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return np.bitwise_count(words).sum(axis=1, dtype=np.uint32)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), math.nan), where=whole > 0)


def _boolean(name: str, array: object) -> NDArray[np.bool_]:
    values = np.asarray(array)
    if values.dtype == bool or values.size == 0:
        return values.astype(bool)
    if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
        raise ExciseError(f"{name} must be a boolean array (or hold 0 and 1 only), but holds {values.dtype}")
    return values.astype(bool)
