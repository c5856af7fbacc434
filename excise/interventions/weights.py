"""The kind `weights`: single weights of matrices, which are zero while the mask is applied.

Only the pruned weights' values are kept aside, on the model's device, and put back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from excise.errors import ExciseError
from excise.interventions.heads import head_keys
from excise.interventions.packed import Mask, blamed

if TYPE_CHECKING:
    import torch

    from excise.models.loading import LoadedModel
    from excise.models.topology import Linear


class WeightMask(Mask):
    """A mask of weights, by matrix: `"{layer}.{role}"`, [out_features, in_features]."""

    kind = "weights"
    unit = "weights"
    folded_as = "zeros in its matrices"

    def __post_init__(self) -> None:
        super().__post_init__()
        if heads := head_keys(self.shapes):
            raise ExciseError(f"a mask of weights holds no heads, but {heads[0]} are such; give them a mask of heads")

    @contextmanager
    def applied(self, loaded: LoadedModel) -> Iterator[LoadedModel]:
        """The model without the mask's weights: they are zero inside the context and bit for bit the old ones after it.

        `loaded` has the torch module `model` and the `topology`, whose `linears` have a key, out_features, in_features,
        and `weight(model)`: a view of the weights in logical order, [out, in] or more dimensions that flatten to it.

        Raises ExciseError, before anything is changed, for a matrix the model does not have or has in another shape.
        """
        import torch

        linears = self._linears(loaded)
        kept: list[tuple[str, torch.Tensor]] = []
        with blamed(self):
            try:
                with torch.no_grad():
                    for key, count in self.counts().items():
                        if count:
                            kept.append((key, _cut_out(linears[key].weight(loaded.model), self.bits[key], count)))
                yield loaded
            finally:
                with torch.no_grad():
                    # Last pruned, first restored: two matrices may share their memory.
                    for key, values in reversed(kept):
                        _put_back(linears[key].weight(loaded.model), self.bits[key], values)

    def fold(self, loaded: LoadedModel) -> None:
        """Make the mask's weights zero for good."""
        import torch

        linears = self._linears(loaded)
        with torch.no_grad():
            for key, count in self.counts().items():
                if count:
                    _cut_out(linears[key].weight(loaded.model), self.bits[key], count)

    def _linears(self, loaded: LoadedModel) -> dict[str, Linear]:
        """The model's matrices by key, which are those that the mask was made for."""
        linears = {linear.key: linear for linear in loaded.topology.linears}
        for key, shape in self.shapes.items():
            if key not in linears:
                raise ExciseError(f"the mask's matrix {key} is not in the model: it was made for another one")
            there = (linears[key].out_features, linears[key].in_features)
            if shape != there or linears[key].weight(loaded.model).numel() != math.prod(shape):
                raise ExciseError(
                    f"the mask's matrix {key} has shape {shape}, the model's {there}: "
                    "the mask was made for another model"
                )
        return linears


KIND = WeightMask


def _cut_out(weight: torch.Tensor, bits: NDArray[np.uint8], count: int) -> torch.Tensor:
    """Make the marked weights zero and return their values, [count], on the weights' device."""
    if (memory := _memory(weight)) is not None:
        values = weight.new_zeros(count)
        _exchange()(memory, bits, _memory(values))
        return values
    where = _entries(weight, bits)
    values = weight[where]
    weight[where] = 0
    return values


def _put_back(weight: torch.Tensor, bits: NDArray[np.uint8], values: torch.Tensor) -> None:
    if (memory := _memory(weight)) is not None:
        _exchange()(memory, bits, _memory(values))
    else:
        weight[_entries(weight, bits)] = values.to(weight.device)


def _memory(tensor: torch.Tensor) -> NDArray[np.signedinteger] | None:
    """The tensor's own memory as whole numbers, [elements]; None where it is elsewhere or not in one piece."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or whole is None:
        return None
    return tensor.detach().view(whole).view(-1).numpy()


def _entries(weight: torch.Tensor, bits: NDArray[np.uint8]) -> torch.Tensor:
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
