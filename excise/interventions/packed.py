"""Masks as packed bits: sets of weights or of heads by matrix, their arithmetic, and the files they lie in.

A mask entry is BDB's "neuron", a single weight of a linear matrix, or a whole attention head, one entry in a row of a
layer's heads. A bit costs an eighth of a byte, so the masks of an 8B model take 1 GB at most and only one matrix is
ever unpacked. What a mask does to a model is said by its kind (`weights`, `heads`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from excise.errors import ExciseError
from excise.files.tensors import save_tensors
from excise.interventions.controls import RandomControl

if TYPE_CHECKING:
    from safetensors import safe_open

    from excise.models.loading import LoadedModel

Stretch = tuple[str, int, int]
"""A part of a matrix' packed bits: its key, and where the part starts and stops, in bytes."""

_FORMAT = "excise mask 1"


@dataclass(frozen=True, eq=False)
class Mask(ABC):
    """A set of weights of named matrices, or of heads of named layers: an intervention (`protocol`) of either kind.

    Heads are kept like a matrix of one row, so what is said of weights below holds for heads.

    `bits[key]` holds the row-major bits of the matrix `key`, packed eight to a byte, highest bit first, the last byte
    filled up with zeros; `shapes[key]` is its logical shape (out_features, in_features). Matrices are kept in the
    order of their keys, layer by layer, whatever order they are given in. Masks are equal when they hold the same
    weights of the same matrices. The arrays are read-only.

    Raises ExciseError when bits and shapes do not fit together.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    folded_as: ClassVar[str]
    bits: Mapping[str, NDArray[np.uint8]]
    shapes: Mapping[str, tuple[int, int]]

    @abstractmethod
    def applied(self, loaded: LoadedModel) -> AbstractContextManager[LoadedModel]:
        """The model under the mask, as `protocol.Intervention` has it. Errors inside name the mask."""

    @abstractmethod
    def fold(self, loaded: LoadedModel) -> None:
        """Write the mask into the model's weights for good."""

    def control(self, seed: int, known: str | None = None) -> RandomControl:
        """The recipe of a random mask with exactly as many weights in every matrix. known: its fingerprint, if any."""
        return RandomControl(self.fingerprint, type(self), self.shapes, self.counts(), int(seed), known)

    def __post_init__(self) -> None:
        if set(self.bits) != set(self.shapes):
            raise ExciseError(f"a mask has bits and shapes of the same matrices; {_differing(self.bits, self.shapes)}")
        bits, shapes = {}, {}
        for key in sorted(self.bits, key=_layer_order):
            shapes[key] = _shape(key, self.shapes[key])
            bits[key] = _checked_bits(key, self.bits[key], math.prod(shapes[key]))
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "shapes", shapes)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.bool_]]) -> Self:
        """A mask from a boolean array [out_features, in_features] per matrix."""
        for key, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.dtype != bool or array.ndim != 2:
                raise ExciseError(f"mask of {key}: give a boolean array of two dimensions (out_features, in_features)")
        return cls(
            {key: np.packbits(array, axis=None) for key, array in arrays.items()},
            {key: array.shape for key, array in arrays.items()},
        )

    def array(self, key: str) -> NDArray[np.bool_]:
        """The boolean array [out_features, in_features] of one matrix, unpacked anew at each call."""
        if key not in self.bits:
            raise ExciseError(f"the mask has no matrix {key}")
        shape = self.shapes[key]
        return np.unpackbits(self.bits[key], count=math.prod(shape)).view(bool).reshape(shape)

    def counts(self) -> dict[str, int]:
        """The number of pruned weights per matrix."""
        return {key: int(np.bitwise_count(bits).sum(dtype=np.int64)) for key, bits in self.bits.items()}

    @functools.cached_property
    def count(self) -> int:
        """The number of pruned weights."""
        return sum(self.counts().values())

    @property
    def size(self) -> int:
        """The number of weights of all matrices of the mask, pruned or not."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """The pruned share of the weights; 0 for a mask without matrices."""
        return self.count / self.size if self.size else 0.0

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the matrices and their pruned weights."""
        digest = hashlib.sha256()
        for key, bits in self.bits.items():
            digest.update(f"{key}|{self.shapes[key][0]}|{self.shapes[key][1]}\n".encode())
            digest.update(bits.data)
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.shapes == other.shapes and all(np.array_equal(b, other.bits[key]) for key, b in self.bits.items())

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __and__(self, other: Mask) -> Self:
        """The weights in both masks, which must have the same matrices."""
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: Mask) -> Self:
        """The weights in either mask, which must have the same matrices."""
        return self._combined(other, np.bitwise_or)

    def __sub__(self, other: Mask) -> Self:
        """The weights in this mask and not in the other, which must have the same matrices."""
        return self._combined(other, lambda bits, others: bits & ~others)

    def _combined(self, other: Mask, operation: Callable[..., NDArray[np.uint8]]) -> Self:
        if not isinstance(other, Mask):
            return NotImplemented
        self.check_same_matrices(other)
        return type(self)({key: operation(bits, other.bits[key]) for key, bits in self.bits.items()}, self.shapes)

    def check_same_matrices(self, other: Mask) -> None:
        """Raise ExciseError unless both masks have the same matrices in the same shapes."""
        check_same_shapes(self.shapes, other.shapes)

    def save(self, path: Path | str) -> None:
        """Write the mask as safetensors, in full or not at all; folders are made where they lack.

        Raises ExciseError, naming the file, where it cannot be written.
        """
        metadata = {"format": _FORMAT, "shapes": json.dumps(self.shapes), "fingerprint": self.fingerprint}
        save_tensors(Path(path), self.bits, metadata)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a mask that `save` has written.

        Raises ExciseError when the file is absent, is no mask, or does not hold what its fingerprint says.
        """
        file = MaskFile.open(path)
        mask = cls({key: file.bits(key) for key in file.shapes}, file.shapes)
        if mask.fingerprint != file.fingerprint:
            raise ExciseError(f"{path}: was changed after it had been written; make the mask again")
        return mask


@dataclass(frozen=True)
class MaskFile:
    """A mask in the file `Mask.save` has written: its matrices are known, their bits are read one by one.

    `places[key]` is where the packed bits of a matrix start and stop in the file, in bytes.
    """

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    fingerprint: str
    places: Mapping[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read what the file says of itself. Raises ExciseError when it is absent, cut off, or no mask."""
        path = Path(path)
        with _header(path) as file:
            metadata = file.metadata() or {}
            sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.offset_keys()}
            with open(path, "rb", buffering=0) as whole:
                start = 8 + int.from_bytes(whole.read(8), "little")
                end = whole.seek(0, os.SEEK_END)
        if metadata.get("format") != _FORMAT:
            raise ExciseError(f"{path}: is not a mask file of this version; make the mask again")
        shapes = _shapes(metadata["shapes"])
        for key, shape in shapes.items():
            if sizes.get(key, 0) != _bytes_of(shape):
                raise _unreadable(path, f"{key} of shape {shape} has {sizes.get(key, 0)} bytes")
        places = {}
        for key, size in sizes.items():
            places[key] = (start, start + size)
            start += size
        if start != end:
            raise _unreadable(path, "it holds more than packed bits")
        return cls(path, shapes, metadata["fingerprint"], places)

    def bits(self, key: str) -> NDArray[np.uint8]:
        """The packed bits of one matrix, as `Mask.bits` holds them."""
        bits = np.empty(_bytes_of(self.shapes[key]), dtype=np.uint8)
        self.read([(key, 0, bits.size)], bits)
        return bits

    def read(self, stretches: Sequence[Stretch], buffer: NDArray[np.uint8]) -> None:
        """Put stretches of matrices' packed bits into a buffer, one after the other.

        What lies together in the file is read at once. Raises ExciseError when that fails.
        """
        # Read, not mapped: pages of mapped files would count as memory of the process, and a file that is cut off while
        # it is mapped would end the process.
        view, done = buffer.data, 0
        runs: list[list[int]] = []
        ends: list[tuple[str, int]] = []
        for key, start, stop in stretches:
            begin, end = self.places[key]
            if runs and runs[-1][1] == begin + start:
                runs[-1][1] = begin + stop
            else:
                runs.append([begin + start, begin + stop])
            done += stop - start
            if begin + stop == end:
                ends.append((key, done - 1))
        done = 0
        try:
            with self.path.open("rb", buffering=0) as file:
                for place, end in runs:
                    file.seek(place)
                    while place < end:
                        if not (count := file.readinto(view[done : done + end - place])):
                            raise OSError(f"it ends after {place} bytes")
                        place += count
                        done += count
            for key, last in ends:
                _check_last(key, buffer[last], math.prod(self.shapes[key]))
        except (OSError, ExciseError) as error:
            raise _unreadable(self.path, error) from None


def file_metadata(path: Path | str) -> dict[str, str]:
    """What the file of an intervention says of itself. Raises ExciseError when it is absent or cut off."""
    with _header(Path(path)) as file:
        return file.metadata() or {}


@contextmanager
def blamed(mask: Mask) -> Iterator[None]:
    """Errors inside say under which mask they came about."""
    try:
        yield
    except ExciseError as error:
        raise ExciseError(f"under the mask {mask.fingerprint}: {error}") from error


@contextmanager
def _header(path: Path) -> Iterator[safe_open]:
    """The opened file; opening checks its header, and its length against that."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise ExciseError(f"{path}: there is no such mask file; make the mask again") from None
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


@functools.lru_cache(maxsize=8)
def _shapes(text: str) -> Mapping[str, tuple[int, int]]:
    """What a file says of its matrices' shapes. Masks of one model say the same, and are often opened together."""
    return MappingProxyType({key: tuple(shape) for key, shape in json.loads(text).items()})


def _bytes_of(shape: tuple[int, int]) -> int:
    return (math.prod(shape) + 7) // 8


def _unreadable(path: Path, why: object) -> ExciseError:
    return ExciseError(f"{path}: cannot be read as a mask ({why}); make the mask again")


def _layer_order(key: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in key.split(".")]


def _shape(key: str, shape: Iterable[int]) -> tuple[int, int]:
    shape = tuple(map(int, shape))
    if len(shape) != 2 or min(shape) < 1:
        raise ExciseError(f"mask of {key}: its shape is {shape}, but must be (out_features, in_features)")
    return shape


def _checked_bits(key: str, bits: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8 or bits.shape != ((size + 7) // 8,):
        raise ExciseError(f"mask of {key}: {size} weights need {(size + 7) // 8} packed bytes in one dimension")
    _check_last(key, bits[-1], size)
    bits = bits.view()
    bits.setflags(write=False)
    return bits


def _check_last(key: str, byte: np.uint8, size: int) -> None:
    if size % 8 and byte & (0xFF >> size % 8):
        raise ExciseError(f"mask of {key}: the bits after the last of {size} weights must be zero")


def check_same_shapes(first: Mapping[str, tuple[int, int]], second: Mapping[str, tuple[int, int]]) -> None:
    """Raise ExciseError unless both are of the same matrices in the same shapes."""
    if first.keys() != second.keys():
        raise ExciseError(f"the masks are of different matrices; {_differing(first, second)}")
    for key, shape in first.items():
        if shape != second[key]:
            raise ExciseError(f"the masks are of different models: {key} is {shape} and {second[key]}")


def _differing(first: Iterable[str], second: Iterable[str]) -> str:
    only = sorted(set(first) ^ set(second), key=_layer_order)
    return "only one has " + ", ".join(only[:5]) + (", ..." if len(only) > 5 else "")
