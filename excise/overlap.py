"""Overlap: how much of one pruning mask lies in another.

Here belong comparisons of masks with each other; how well a mask works is `evaluation`.
The concept is BDB's overlap of the components found for different prompts (Fig. 3), which is asymmetric and means
something only beside the level two unrelated masks would reach.
"""

import functools
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

_BLOCK = 1 << 9  # words of 64 bits counted at a time: those of seven masks stay in a processor's nearest cache
_PIECE = 1 << 15  # words of a matrix that are counted by one thread
_BATCH = 1 << 20  # bytes of each file that are read at once, at least one matrix


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

    Streams matrix by matrix: beside masks given as such, two times 1 MiB of every file are held, or two matrices where
    those are larger (one being counted, one being read). A file's bytes are read once, also where it is both a row and
    a column. The first call compiles the counting, which takes a second or two. Unlike `Mask.load` it does not verify
    fingerprints, which would cost as much as all the rest.

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
        for matrices in _batches(known, pool):
            for more_counts, more_shared in _counted(matrices, *map(np.array, places), pool):
                counts += more_counts
                shared += more_shared
    size = sum(math.prod(shape) for shape in known[0].shapes.values())
    return Overlaps(shared, counts[places[0]], counts[places[1]], size)


@dataclass(frozen=True)
class _Source:
    """Where a mask's bits come from: its name in errors, its matrices, and the bits where they are in memory or the
    file they are in."""

    name: str
    shapes: Mapping[str, tuple[int, int]]
    held: Mapping[str, NDArray[np.uint8]] | None
    file: MaskFile | None


def _of_mask(name: str, mask: Mask) -> _Source:
    return _Source(name, mask.shapes, mask.bits, None)


def _of_file(path: Path) -> _Source:
    file = MaskFile.open(path)
    return _Source(str(path), file.shapes, None, file)


def _check_same_matrices(first: _Source, second: _Source) -> None:
    if first.shapes == second.shapes:
        return
    for key in [*first.shapes, *second.shapes]:
        if first.shapes.get(key) != second.shapes.get(key):
            there = [f"{source.shapes.get(key, 'absent')} in {source.name}" for source in (first, second)]
            raise ExciseError(f"the masks are of different matrices: {key} is {' and '.join(there)}")


def _batches(sources: Sequence[_Source], pool: ThreadPoolExecutor) -> Iterator[list[list[NDArray[np.uint8]]]]:
    """Some matrices at a time, the packed bits of all sources of each.

    The arrays hold until the next ones are asked for: two sets take turns, one being read while the other is used.
    """
    sizes = {key: -(-math.prod(shape) // 8) for key, shape in sources[0].shapes.items()}
    places = next((source.file.places for source in sources if source.file is not None), {})
    files = sum(source.file is not None for source in sources)
    batches: list[list[str]] = [[]]
    for key in sorted(sizes, key=lambda key: places.get(key, 0)):
        # Nothing has to be read of masks in memory: they are counted at once.
        if files and batches[-1] and sizes[key] + sum(sizes[other] for other in batches[-1]) > _BATCH:
            batches.append([])
        batches[-1].append(key)
    most = max(sum(sizes[key] for key in batch) for batch in batches)
    buffers = cycle([np.empty((files, most), dtype=np.uint8) for _ in range(2)])

    def read(batch: list[str], buffer: NDArray[np.uint8]) -> list[list[NDArray[np.uint8]]]:
        rows = iter(buffer)
        by_source = [
            [np.ascontiguousarray(source.held[key]) for key in batch]
            if source.file is None
            else source.file.read(batch, next(rows))
            for source in sources
        ]
        return [list(matrix) for matrix in zip(*by_source, strict=True)]

    coming = None
    for batch in batches:
        ready, coming = coming, pool.submit(read, batch, next(buffers))
        if ready is not None:
            yield ready.result()
    yield coming.result()


def _counted(
    matrices: Sequence[Sequence[NDArray[np.uint8]]],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Parts of the set bits of every source, and of those each row shares with each column.

    matrices: the packed bits of all sources of each, [bytes], one length within a matrix.
    """
    count, sources = _counting(), len(matrices[0])
    pieces = [
        (number, start, min(_PIECE, len(matrix[0]) // 8 - start))
        for number, matrix in enumerate(matrices)
        for start in range(0, len(matrix[0]) // 8, _PIECE)
    ]
    addresses = np.array([[each.__array_interface__["data"][0] for each in matrix] for matrix in matrices])

    def part(some: Sequence[tuple[int, int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        number, start, words = np.array(some, dtype=np.int64).reshape(-1, 3).T
        found = np.zeros(sources, dtype=np.int64), np.zeros((len(rows), len(columns)), dtype=np.int64)
        count(addresses[number] + 8 * start[:, None], np.ascontiguousarray(words), rows, columns, *found)
        return found

    step = -(-len(pieces) // (2 * (os.cpu_count() or 1))) or 1
    yield from pool.map(part, [pieces[start : start + step] for start in range(0, len(pieces), step)])
    for matrix in matrices:
        if len(matrix[0]) % 8:
            rest = np.array([each[len(each) // 8 * 8 :] for each in matrix])
            yield _ones(rest), np.array([_ones(rest[row] & rest[columns]) for row in rows])


def _ones(rest: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.bitwise_count(rest).sum(axis=1, dtype=np.int64)


@functools.cache
def _counting() -> Callable[..., None]:
    """A compiled function of the addresses of packed bits, int64 [pieces, sources], the pieces' numbers of 64-bit
    words [pieces], and the places of rows and columns among the sources.

    It adds each source's set bits to counts [sources] and those in common to shared [rows, columns], int64, and lets go
    of the interpreter's lock. numpy would write down every step of every pair; here two rows against five columns stay
    in registers, so that a pair costs less than reading its bits.
    """
    import numba
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    @intrinsic
    def ones(typing, word):
        return types.uint64(types.uint64), lambda context, builder, signature, given: builder.ctpop(given[0])

    @intrinsic
    def word_at(typing, address, index):
        def load(context, builder, signature, given):
            words = builder.inttoptr(given[0], ir.IntType(64).as_pointer())
            return builder.load(builder.gep(words, [given[1]]), align=1)

        return types.uint64(types.int64, types.int64), load

    @numba.njit("void(int64[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[:, ::1])", nogil=True)
    def count(addresses, words, rows, columns, counts, shared):
        last_row, last_column = rows.shape[0] - 1, columns.shape[0] - 1
        found = np.empty((2, 5), dtype=np.uint64)
        for piece in range(words.shape[0]):
            places = addresses[piece]
            for start in range(0, words[piece], _BLOCK):
                stop = min(words[piece], start + _BLOCK)
                for source in range(places.shape[0]):
                    place, own = places[source], np.uint64(0)
                    for word in range(start, stop):
                        own += ones(word_at(place, word))
                    counts[source] += np.int64(own)
                for column in range(0, last_column + 1, 5):
                    # Behind the last column and row these are counted again, and left aside below.
                    b0 = places[columns[column]]
                    b1 = places[columns[min(column + 1, last_column)]]
                    b2 = places[columns[min(column + 2, last_column)]]
                    b3 = places[columns[min(column + 3, last_column)]]
                    b4 = places[columns[min(column + 4, last_column)]]
                    for row in range(0, last_row + 1, 2):
                        first, second = places[rows[row]], places[rows[min(row + 1, last_row)]]
                        c0 = c1 = c2 = c3 = c4 = d0 = d1 = d2 = d3 = d4 = np.uint64(0)
                        for word in range(start, stop):
                            x, y = word_at(first, word), word_at(second, word)
                            z = word_at(b0, word)
                            c0 += ones(x & z)
                            d0 += ones(y & z)
                            z = word_at(b1, word)
                            c1 += ones(x & z)
                            d1 += ones(y & z)
                            z = word_at(b2, word)
                            c2 += ones(x & z)
                            d2 += ones(y & z)
                            z = word_at(b3, word)
                            c3 += ones(x & z)
                            d3 += ones(y & z)
                            z = word_at(b4, word)
                            c4 += ones(x & z)
                            d4 += ones(y & z)
                        found[0, 0], found[0, 1], found[0, 2], found[0, 3], found[0, 4] = c0, c1, c2, c3, c4
                        found[1, 0], found[1, 1], found[1, 2], found[1, 3], found[1, 4] = d0, d1, d2, d3, d4
                        for up in range(min(2, last_row + 1 - row)):
                            for across in range(min(5, last_column + 1 - column)):
                                shared[row + up, column + across] += np.int64(found[up, across])

    return count


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), math.nan), where=whole > 0)


def _boolean(name: str, array: object) -> NDArray[np.bool_]:
    values = np.asarray(array)
    if values.dtype == bool or values.size == 0:
        return values.astype(bool)
    if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
        raise ExciseError(f"{name} must be a boolean array (or hold 0 and 1 only), but holds {values.dtype}")
    return values.astype(bool)
