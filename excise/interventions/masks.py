"""Masks: which weights of which matrices are pruned, as packed bits, and the pruning itself.

Here belong sets of weights, their arithmetic, their files, and the context in which a model runs without them; which
weights to select is `selection` and `strategies`.
A mask entry is BDB's "neuron", a single weight of a linear matrix, or a whole attention head, one entry in a row of a
layer's heads. A bit costs an eighth of a byte, so the masks of an 8B model take 1 GB at most and only one matrix is
ever unpacked.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from excise.errors import ExciseError
from excise.files.tensors import save_tensors

if TYPE_CHECKING:
    import torch

HEAD_ROLES = {"zero_query": "head_query", "zero_output": "head_output"}
"""The role of a layer's heads in a mask, by what is done to them (method, A7).

`zero_query` makes a head's queries zero, so that it attends uniformly to all it may see; `zero_output` takes out what
it writes.
"""

Stretch = tuple[str, int, int]
"""A part of a matrix' packed bits: its key, and where the part starts and stops, in bytes."""

_FORMAT = "excise mask 1"


@dataclass(frozen=True, eq=False)
class Mask:
    """A set of weights of named matrices, or of heads of named layers.

    Heads are kept like a matrix of one row: `heads_mask` makes the key `"{layer}.{role}"` with a role of `HEAD_ROLES`
    and the shape (1, heads). What is said of weights below then holds for heads.

    `bits[key]` holds the row-major bits of the matrix `key`, packed eight to a byte, highest bit first, the last byte
    filled up with zeros; `shapes[key]` is its logical shape (out_features, in_features). Matrices are kept in the
    order of their keys, layer by layer, whatever order they are given in. Masks are equal when they hold the same
    weights of the same matrices. The arrays are read-only.

    Raises ExciseError when bits and shapes do not fit together.
    """

    bits: Mapping[str, NDArray[np.uint8]]
    shapes: Mapping[str, tuple[int, int]]

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
            digest.update(bits)
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.shapes == other.shapes and all(np.array_equal(b, other.bits[key]) for key, b in self.bits.items())

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __and__(self, other: "Mask") -> "Mask":
        """The weights in both masks, which must have the same matrices."""
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: "Mask") -> "Mask":
        """The weights in either mask, which must have the same matrices."""
        return self._combined(other, np.bitwise_or)

    def _combined(self, other: "Mask", operation: Callable[..., NDArray[np.uint8]]) -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        self.check_same_matrices(other)
        return Mask({key: operation(bits, other.bits[key]) for key, bits in self.bits.items()}, self.shapes)

    def check_same_matrices(self, other: "Mask") -> None:
        """Raise ExciseError unless both masks have the same matrices in the same shapes."""
        _check_same_shapes(self.shapes, other.shapes)

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
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as file:  # checks the header, and the file's length against it
                metadata = file.metadata() or {}
                sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.offset_keys()}
            with open(path, "rb", buffering=0) as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                end = file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            raise ExciseError(f"{path}: there is no such mask file; make the mask again") from None
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
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
        view, done, runs, ends = memoryview(buffer), 0, [], []
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


def heads_mask(chosen: NDArray[np.bool_], ablation: str) -> Mask:
    """The mask of some attention heads (BDB, section 4), with all layers as its matrices.

    chosen: boolean [layers, heads]; query heads, where they share keys and values. ablation: a key of `HEAD_ROLES`.
    Raises ExciseError for an unknown ablation and for anything but a boolean array of two dimensions.
    """
    if ablation not in HEAD_ROLES:
        raise ExciseError(f"ablation {ablation!r} of heads is not known; known are {', '.join(HEAD_ROLES)}")
    if not isinstance(chosen, np.ndarray) or chosen.dtype != bool or chosen.ndim != 2:
        raise ExciseError("mask of heads: give a boolean array of two dimensions (layers, heads)")
    return Mask.from_arrays({f"{layer}.{HEAD_ROLES[ablation]}": row[None] for layer, row in enumerate(chosen)})


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
    masks = _some(masks)
    if not 1 <= k <= len(masks):
        raise ExciseError(f"k is {k}: it must be between 1 and the number of masks, {len(masks)}")
    for mask in masks[1:]:
        masks[0].check_same_matrices(mask)
    bits = {}
    for key, shape in masks[0].shapes.items():
        in_favour = np.zeros(math.prod(shape), dtype=np.min_scalar_type(len(masks)))
        for mask in masks:
            in_favour += np.unpackbits(mask.bits[key], count=in_favour.size)
        bits[key] = np.packbits(in_favour >= k)
    return Mask(bits, masks[0].shapes)


def leave_one_out(masks: Callable[[], Iterable[Mask]]) -> Iterator[Mask]:
    """For each mask the intersection of all *other* masks (BDB's within-context level, section 4), in their order.

    `masks` gives the same masks anew at each call, so they can come from files: the memory of four masks is held,
    however many there are. Raises ExciseError for fewer than two masks.
    """
    everywhere: dict[str, NDArray[np.uint8]] = {}
    missing_once: dict[str, NDArray[np.uint8]] = {}
    shapes = None
    count = 0
    # Both are changed in place, and `del` lets go of a mask before the next one is read: at 8B each is 0.9 GB.
    for mask in masks():
        count += 1
        if shapes is None:
            shapes = mask.shapes
            for key, bits in mask.bits.items():
                everywhere[key] = bits.copy()
                missing_once[key] = np.packbits(~mask.array(key))
        else:
            _check_same_shapes(mask.shapes, shapes)
            for key, bits in mask.bits.items():
                missing_once[key] &= bits
                missing_once[key] |= everywhere[key] & ~bits
                everywhere[key] &= bits
        del mask
    if count < 2:
        raise ExciseError(f"leaving one out of {count} masks leaves none: give at least two")
    for mask in masks():
        # A mask read for this alone goes as the result grows, while the caller may still have the one before.
        own = dict(mask.bits)
        del mask
        left = Mask({key: everywhere[key] | (missing_once[key] & ~own.pop(key)) for key in everywhere}, shapes)
        yield left
        del left


def random_like(mask: Mask, seed: int) -> Mask:
    """A random mask with exactly as many weights in every matrix as `mask`: the control for its mere damage.

    The draw of a matrix depends on the seed, the matrix' key, its size and its count alone. With one seed, a smaller
    count (both up to half of the matrix) gives a subset of a larger one; independent draws need different seeds.
    """
    counts = mask.counts()
    bits = {
        key: np.packbits(_random_subset(math.prod(shape), counts[key], f"random mask|{int(seed)}|{key}"))
        for key, shape in mask.shapes.items()
    }
    return Mask(bits, mask.shapes)


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
        missing = count - np.count_nonzero(chosen)
    return chosen


@contextmanager
def pruned(loaded: Any, mask: Mask) -> Iterator[Any]:
    """The model without the mask's weights: they are zero inside the context and bit for bit the old ones after it.

    Heads are ablated by hooks, nothing of them is copied or changed: `zero_query` makes the head's queries zero as
    the query projection returns them, bias included; `zero_output` makes the head's part of the output projection's
    input zero, whose bias stays. Keys and values that other heads share are left alone.

    `loaded` has the torch module `model` and the `topology`, whose `linears` have a key, out_features, in_features,
    and `weight(model)`: a view of the weights in logical order, [out, in] or more dimensions that flatten to it. For
    masks of heads it is an `excise.models.topology.Topology`.
    Beside the model only the pruned weights' values are kept, on the model's device. The context yields `loaded`;
    contexts may be nested, and the weights come back after an exception too.

    Raises ExciseError, before anything is changed, for a matrix the model does not have or has in another shape, and
    for a layer or a number of heads that is not the model's.
    """
    import torch

    linears = {linear.key: linear for linear in loaded.topology.linears}
    heads = [key for key in mask.shapes if _role(key) in HEAD_ROLES.values()]
    for key in heads:
        _check_heads(loaded.topology, key, mask.shapes[key])
    for key, shape in mask.shapes.items():
        if key in heads:
            continue
        if key not in linears:
            raise ExciseError(f"the mask's matrix {key} is not in the model: it was made for another one")
        there = (linears[key].out_features, linears[key].in_features)
        if shape != there or linears[key].weight(loaded.model).numel() != math.prod(shape):
            raise ExciseError(
                f"the mask's matrix {key} has shape {shape}, the model's {there}: the mask was made for another model"
            )

    kept: list[tuple[str, torch.Tensor]] = []
    hooks = ExitStack()
    try:
        with torch.no_grad():
            for key, count in mask.counts().items():
                if count and key in heads:
                    hooks.callback(_ablate(loaded, key, mask.array(key)[0]).remove)
                elif count:
                    weight = linears[key].weight(loaded.model)
                    kept.append((key, _cut_out(weight, mask.bits[key], count)))
        yield loaded
    except ExciseError as error:
        raise ExciseError(f"under the mask {mask.fingerprint}: {error}") from error
    finally:
        hooks.close()
        with torch.no_grad():
            # Last pruned, first restored: two matrices may share their memory.
            for key, values in reversed(kept):
                _put_back(linears[key].weight(loaded.model), mask.bits[key], values)


def _cut_out(weight: "torch.Tensor", bits: NDArray[np.uint8], count: int) -> "torch.Tensor":
    """Make the marked weights zero and return their values, [count], on the weights' device."""
    if (memory := _memory(weight)) is not None:
        values = weight.new_zeros(count)
        _exchange()(memory, bits, _memory(values))
        return values
    where = _entries(weight, bits)
    values = weight[where]
    weight[where] = 0
    return values


def _put_back(weight: "torch.Tensor", bits: NDArray[np.uint8], values: "torch.Tensor") -> None:
    if (memory := _memory(weight)) is not None:
        _exchange()(memory, bits, _memory(values))
    else:
        weight[_entries(weight, bits)] = values.to(weight.device)


def _memory(tensor: "torch.Tensor") -> NDArray[np.signedinteger] | None:
    """The tensor's own memory as whole numbers, [elements]; None where it is elsewhere or not in one piece."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or whole is None:
        return None
    return tensor.detach().view(whole).view(-1).numpy()


def _entries(weight: "torch.Tensor", bits: NDArray[np.uint8]) -> "torch.Tensor":
    """The marked weights as a boolean tensor of the weights' shape, unpacked on their device."""
    import torch

    packed = torch.from_numpy(bits.copy()).to(weight.device)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=weight.device)
    unpacked = torch.bitwise_and(torch.bitwise_right_shift(packed[:, None], shifts), 1).bool()
    return unpacked.view(-1)[: weight.numel()].reshape(weight.shape)


@functools.cache
def _exchange() -> Callable[..., None]:
    """A compiled function of weights [elements], packed bits [bytes] and values [count]: it exchanges the marked
    weights with the values. A byte without a mark costs next to nothing.
    """
    import numba

    @numba.njit(nogil=True)
    def exchange(weights, bits, values):
        place = 0
        for byte in range(bits.shape[0]):
            if bits[byte]:
                for bit in range(8):
                    if bits[byte] & (128 >> bit):
                        weight = 8 * byte + bit
                        weights[weight], values[place] = values[place], weights[weight]
                        place += 1

    return exchange


@functools.lru_cache(maxsize=8)
def _shapes(text: str) -> Mapping[str, tuple[int, int]]:
    """What a file says of its matrices' shapes. Masks of one model say the same, and are often opened together."""
    return MappingProxyType({key: tuple(shape) for key, shape in json.loads(text).items()})


def _bytes_of(shape: tuple[int, int]) -> int:
    return (math.prod(shape) + 7) // 8


def _role(key: str) -> str:
    return key.rpartition(".")[2]


def _check_heads(topology: Any, key: str, shape: tuple[int, int]) -> None:
    layer = key.rpartition(".")[0]
    if layer not in map(str, range(topology.layers)):
        raise ExciseError(
            f"the mask's heads {key} are not in the model, which has {topology.layers} layers: "
            "the mask was made for another one"
        )
    there = (1, topology.heads)
    if shape != there:
        raise ExciseError(
            f"the mask's heads {key} have shape {shape}, the model's {there}: the mask was made for another model"
        )


def _ablate(loaded: Any, key: str, chosen: NDArray[np.bool_]) -> Any:
    """Hook the chosen heads, [heads], out of a layer; returns the hook's handle."""
    import torch

    layer, _, role = key.rpartition(".")
    query = role == HEAD_ROLES["zero_query"]
    linear = loaded.topology.linear(f"{layer}.{'q' if query else 'o'}")
    module = loaded.model.get_submodule(linear.module)

    def hidden_by(features: NDArray[np.int64], width: int) -> torch.Tensor:
        where = np.zeros(width, dtype=bool)
        where[features[np.repeat(chosen, len(features) // len(chosen))]] = True
        return torch.from_numpy(where).to(linear.device(loaded.model))

    if query:
        rows = hidden_by(linear.output_features(), linear.module_outputs)
        return module.register_forward_hook(lambda module, given, output: output.masked_fill(rows, 0))
    columns = hidden_by(np.arange(linear.in_features), linear.in_features)
    return module.register_forward_pre_hook(lambda module, given: (given[0].masked_fill(columns, 0), *given[1:]))


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


def _check_same_shapes(first: Mapping[str, tuple[int, int]], second: Mapping[str, tuple[int, int]]) -> None:
    if first.keys() != second.keys():
        raise ExciseError(f"the masks are of different matrices; {_differing(first, second)}")
    for key, shape in first.items():
        if shape != second[key]:
            raise ExciseError(f"the masks are of different models: {key} is {shape} and {second[key]}")


def _differing(first: Iterable[str], second: Iterable[str]) -> str:
    only = sorted(set(first) ^ set(second), key=_layer_order)
    return "only one has " + ", ".join(only[:5]) + (", ..." if len(only) > 5 else "")


def _reduced(operation: Callable[[Mask, Mask], Mask], masks: Iterable[Mask]) -> Mask:
    total = None
    for mask in masks:
        total = mask if total is None else operation(total, mask)
    if total is None:
        raise ExciseError("there are no masks to combine: give one at least")
    return total


def _some(masks: Iterable[Mask]) -> list[Mask]:
    masks = list(masks)
    if not masks:
        raise ExciseError("there are no masks to combine: give one at least")
    return masks
