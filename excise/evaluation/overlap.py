"""Overlap: how much of one pruning mask lies in another.

Here belong comparisons of masks with each other; how well a mask works is `evaluation`.
The concept is BDB's overlap of the components found for different prompts (Fig. 3), which is asymmetric and means
something only beside the level two unrelated masks would reach.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from excise.errors import ExciseError
from excise.interventions.packed import Mask, MaskFile, Stretch

_LANES = 4  # words of 64 bits in a vector: a register of AVX2, two of NEON or SSE2
_GROUP = 16 * 8 * _LANES  # bytes whose bits are added up before any are counted
_BLOCK = 31  # groups counted at a time: the counts of more would not fit into bytes
_HELD = 6 << 20  # bytes of all masks together that a thread reads and counts at a time: they stay in the last cache
_LEAST = 1 << 16  # bytes of each mask among them at least: less would not be worth asking for
_THREADS = 8  # at most: more would only wait for the memory


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
        return _share(self.column_counts, np.array(self.size))

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
        size = int(np.count_nonzero(a))
        shared = int(np.count_nonzero(a & b))
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

    Streams piece by piece, whatever the size of the matrices: beside masks given as such, every thread holds 6 MiB of
    all files together, or 64 KiB of each where that is more, and there are as many threads as processors, eight at
    most. A file's bytes are read once, also where it is both a row and a column. The first call compiles the counting,
    which takes a second or two. Unlike `kinds.load_mask` it does not verify fingerprints, which would cost as much as
    all the rest.

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
    pieces = _pieces(known, max(_HELD // len(known) // _GROUP * _GROUP, _LEAST))
    threads = max(1, min(_processors(), _THREADS, len(pieces)))
    _counting()  # compiled before several threads ask for it
    left = iter(pieces)
    # Reading and counting let go of the interpreter's lock, and whichever thread is free takes the next piece.
    row_places, column_places = map(np.array, places)
    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(_counted, known, row_places, column_places, left) for _ in range(threads)]
        try:
            for part in as_completed(parts):
                more_counts, more_shared = part.result()
                counts += more_counts
                shared += more_shared
        finally:
            # After an error or an interrupt the other threads shall find nothing left.
            for _ in left:
                pass
    size = sum(math.prod(shape) for shape in known[0].shapes.values())
    return Overlaps(shared, counts[places[0]], counts[places[1]], size)


def _processors() -> int:
    """The processors this process may use, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Source:
    """Where a mask's bits come from: its name in errors, its matrices, and the bits where they are in memory or the
    file they are in."""

    name: str
    shapes: Mapping[str, tuple[int, int]]
    held: Mapping[str, NDArray[np.uint8]] | None
    file: MaskFile | None


def _of_mask(name: str, mask: Mask) -> _Source:
    return _Source(name, mask.shapes, {key: np.ascontiguousarray(bits) for key, bits in mask.bits.items()}, None)


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


def _pieces(sources: Sequence[_Source], size: int) -> list[list[Stretch]]:
    """The matrices' bytes, in the order of the files, cut into pieces of `size` bytes and a last one."""
    places = next((source.file.places for source in sources if source.file is not None), {})
    pieces: list[list[Stretch]] = []
    room = 0
    for key in sorted(sources[0].shapes, key=lambda key: places.get(key, (0,))):
        start, end = 0, (math.prod(sources[0].shapes[key]) + 7) // 8
        while start < end:
            if not room:
                pieces.append([])
                room = size
            stop = min(end, start + room)
            pieces[-1].append((key, start, stop))
            room -= stop - start
            start = stop
    return pieces


def _counted(
    sources: Sequence[_Source], rows: NDArray[np.int64], columns: NDArray[np.int64], pieces: Iterable[Sequence[Stretch]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The set bits of every source, and of those each row shares with each column, in all pieces this thread gets.

    pieces: an iterator that several threads share.
    """
    count, address = _counting()
    counts, shared = np.zeros(len(sources), dtype=np.int64), np.zeros((len(rows), len(columns)), dtype=np.int64)
    files = {number: source.file for number, source in enumerate(sources) if source.file is not None}
    places = list(files)
    buffers: list[NDArray[np.uint8]] = []
    begins = np.empty((len(files), 1), dtype=np.int64)
    for piece in pieces:
        sizes = np.array([stop - start for _, start, stop in piece])
        if not buffers:  # the first piece is as long as any
            buffers = [np.empty(sizes.sum(), dtype=np.uint8) for _ in files]
            begins[:, 0] = [address(buffer) for buffer in buffers]
        addresses = np.empty((len(sources), len(piece)), dtype=np.int64)
        addresses[places] = begins + (np.cumsum(sizes) - sizes)
        for file, buffer in zip(files.values(), buffers, strict=True):
            file.read(piece, buffer)
        for number, source in enumerate(sources):
            if source.held is not None:
                addresses[number] = [address(source.held[key]) + start for key, start, _ in piece]
        count(addresses, sizes, rows, columns, counts, shared)
    return counts, shared


@functools.cache
def _counting() -> tuple[Callable[..., None], Callable[[NDArray[np.uint8]], int]]:
    """Two compiled functions, to count and to tell where an array begins, in which numpy takes its time.

    Counting takes the addresses of packed bits, int64 [sources, stretches], the stretches' bytes [stretches], and the
    places of rows and columns among the sources. It adds each source's set bits to counts [sources] and those in common
    to shared [rows, columns], int64, and lets go of the interpreter's lock.

    Few processors count bits as fast as they combine them. So vectors go through full adders first (Harley and Seal):
    of 16 vectors only the last carry is counted, whose bits stand for 16 each; what remains in the lower places is
    carried on to the next 16. The vectors are spelled out because no compiler finds them in such a loop.
    """
    import numba
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    number = ir.IntType(64)
    words, octets = ir.VectorType(number, _LANES), ir.VectorType(ir.IntType(8), 8 * _LANES)
    pairs, sums = ir.VectorType(ir.IntType(16), 4 * _LANES), ir.VectorType(ir.IntType(32), 4 * _LANES)

    def call(builder, name, kind, given):
        function = ir.FunctionType(kind, [given.type])
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [given])

    def full_adder(builder, a, b, c):
        half = builder.xor(a, b)
        return builder.xor(half, c), builder.or_(builder.and_(a, b), builder.and_(half, c))

    def ones(builder, vector):
        return call(builder, f"llvm.ctpop.v{octets.count}i8", octets, builder.bitcast(vector, octets))

    def in_pairs(builder, vector):
        paired = builder.bitcast(vector, pairs)
        low = builder.and_(paired, pairs([0xFF] * pairs.count))
        return builder.add(low, builder.lshr(paired, pairs([8] * pairs.count)))

    @intrinsic
    def ones_in_both(typing, first, second, groups):
        def build(context, builder, signature, given):
            both = [builder.inttoptr(address, words.as_pointer()) for address in given[:2]]
            lower = [cgutils.alloca_once_value(builder, words(None)) for _ in range(4)]
            sixteens = cgutils.alloca_once_value(builder, octets(None))
            with cgutils.for_range(builder, given[2]) as loop:
                begin = builder.mul(loop.index, number(16))

                def shared(index):
                    place = [builder.add(begin, number(index))]
                    return builder.and_(*(builder.load(builder.gep(mask, place), align=1) for mask in both))

                def carry(depth, index):
                    more = [carry(depth - 1, at) if depth else shared(at) for at in (index, index + (1 << depth))]
                    low, high = full_adder(builder, *more, builder.load(lower[depth]))
                    builder.store(low, lower[depth])
                    return high

                builder.store(builder.add(builder.load(sixteens), ones(builder, carry(3, 0))), sixteens)
            rest = octets(None)
            for low in reversed(lower):
                rest = builder.add(builder.add(rest, rest), ones(builder, builder.load(low)))
            counted_bits = builder.shl(in_pairs(builder, builder.load(sixteens)), pairs([4] * pairs.count))
            counted_bits = builder.zext(builder.add(counted_bits, in_pairs(builder, rest)), sums)
            counted_bits = call(builder, f"llvm.vector.reduce.add.v{sums.count}i32", sums.element, counted_bits)
            return builder.zext(counted_bits, number)

        return types.int64(types.int64, types.int64, types.int64), build

    @intrinsic
    def copy(typing, to, begin, size):
        def build(context, builder, signature, given):
            places = [builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in given[:2]]
            cgutils.raw_memcpy(builder, *places, given[2], 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), build

    @numba.njit("void(int64[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[:, ::1])", nogil=True)
    def count(addresses, sizes, rows, columns, counts, shared):
        last = np.empty((addresses.shape[0], _GROUP), dtype=np.uint8)
        for stretch in range(sizes.shape[0]):
            places, left = addresses[:, stretch].copy(), sizes[stretch]
            while left > 0:
                groups = min(left // _GROUP, _BLOCK)
                if not groups:
                    # Filled up with zeros, where nothing is counted.
                    last[:] = 0
                    for source in range(places.shape[0]):
                        to = np.int64(last[source].ctypes.data)
                        copy(to, places[source], left)
                        places[source] = to
                    groups = 1
                for source in range(places.shape[0]):
                    counts[source] += ones_in_both(places[source], places[source], groups)
                for row in range(rows.shape[0]):
                    for column in range(columns.shape[0]):
                        shared[row, column] += ones_in_both(places[rows[row]], places[columns[column]], groups)
                places += groups * _GROUP
                left -= groups * _GROUP

    @numba.njit("int64(Array(uint8, 1, 'C', readonly=True))")
    def address(array):
        return array.ctypes.data

    return count, address


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), math.nan), where=whole > 0)


def _boolean(name: str, array: object) -> NDArray[np.bool_]:
    values = np.asarray(array)
    if values.dtype == bool or values.size == 0:
        return values.astype(bool)
    if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
        raise ExciseError(f"{name} must be a boolean array (or hold 0 and 1 only), but holds {values.dtype}")
    return values.astype(bool)
