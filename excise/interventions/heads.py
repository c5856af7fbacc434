"""The kind `heads`: whole attention heads (BDB, section 4), ablated by hooks, so that nothing of them is changed.

`zero_query` makes a head's queries zero, so that it attends uniformly to all it may see; `zero_output` takes out what
it writes (method, A7). Keys and values that other heads share are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from excise.errors import ExciseError
from excise.interventions.packed import Mask, blamed

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

    from excise.models.loading import LoadedModel
    from excise.models.topology import Topology

HEAD_ROLES = {"zero_query": "head_query", "zero_output": "head_output"}
"""The role of a layer's heads in a mask, by what is done to them."""
MATRIX_OF = {"head_query": "q", "head_output": "o"}
"""The matrix in which a head of a role lies: its rows of q, its columns of o."""


class HeadMask(Mask):
    """A mask of query heads, by layer and what is done to them: `"{layer}.{role}"`, a role of `HEAD_ROLES`, [1, heads].

    Heads are kept like a matrix of one row. `heads_mask` makes one of an array.
    """

    kind = "heads"
    unit = "heads"
    folded_as = "zeros in the rows of q, bias included, or in the columns of o"

    def __post_init__(self) -> None:
        super().__post_init__()
        if others := [key for key in self.shapes if key not in head_keys(self.shapes)]:
            known = ", ".join(HEAD_ROLES.values())
            raise ExciseError(f"a mask of heads holds {known} of layers, and {others[0]} is neither")

    @contextmanager
    def applied(self, loaded: LoadedModel) -> Iterator[LoadedModel]:
        """The model without the mask's heads: hooks make their queries, bias included, zero as the query projection
        returns them, or their part of the output projection's input, whose bias stays.

        Raises ExciseError, before anything is changed, for a layer or a number of heads that is not the model's.
        """
        self._check(loaded.topology)
        with blamed(self), ExitStack() as hooks:
            for key, count in self.counts().items():
                if count:
                    hooks.callback(_ablate(loaded, key, self.array(key)[0]).remove)
            yield loaded

    def fold(self, loaded: LoadedModel) -> None:
        """Make what the hooks hide zero in the weights: rows of q with their bias, or columns of o."""
        import torch

        from excise.models.placement import kept_weight

        self._check(loaded.topology)
        with torch.no_grad():
            for key, count in self.counts().items():
                if not count:
                    continue
                linear = loaded.topology.linear(_matrix(key))
                weight, chosen = linear.weight(loaded.model), self.array(key)[0]
                if linear.role == "o":
                    columns = np.repeat(chosen, linear.in_features // len(chosen))
                    weight[..., torch.from_numpy(columns).to(weight.device)] = 0
                    continue
                rows = np.repeat(chosen, linear.out_features // len(chosen))
                weight[torch.from_numpy(rows.reshape(weight.shape[:-1])).to(weight.device)] = 0
                module = loaded.model.get_submodule(linear.module)
                if module.bias is not None:
                    bias = kept_weight(module, "bias")
                    bias[torch.from_numpy(linear.output_features()[rows]).to(bias.device)] = 0

    def _check(self, topology: Topology) -> None:
        for key, shape in self.shapes.items():
            layer = key.rpartition(".")[0]
            if layer not in map(str, range(topology.layers)):
                raise ExciseError(
                    f"the mask's heads {key} are not in the model, which has {topology.layers} layers: "
                    "the mask was made for another one"
                )
            there = (1, topology.heads)
            if shape != there:
                raise ExciseError(
                    f"the mask's heads {key} have shape {shape}, the model's {there}: "
                    "the mask was made for another model"
                )


KIND = HeadMask


def heads_mask(chosen: NDArray[np.bool_], ablation: str) -> HeadMask:
    """The mask of some attention heads (BDB, section 4), with all layers as its matrices.

    chosen: boolean [layers, heads]; query heads, where they share keys and values. ablation: a key of `HEAD_ROLES`.
    Raises ExciseError for an unknown ablation and for anything but a boolean array of two dimensions.
    """
    if ablation not in HEAD_ROLES:
        raise ExciseError(f"ablation {ablation!r} of heads is not known; known are {', '.join(HEAD_ROLES)}")
    if not isinstance(chosen, np.ndarray) or chosen.dtype != bool or chosen.ndim != 2:
        raise ExciseError("mask of heads: give a boolean array of two dimensions (layers, heads)")
    return HeadMask.from_arrays({f"{layer}.{HEAD_ROLES[ablation]}": row[None] for layer, row in enumerate(chosen)})


def head_keys(keys: Iterable[str]) -> list[str]:
    """Of the keys of masks, those that stand for heads."""
    return [key for key in keys if key.rpartition(".")[2] in MATRIX_OF]


def _matrix(key: str) -> str:
    layer, _, role = key.rpartition(".")
    return f"{layer}.{MATRIX_OF[role]}"


def _ablate(loaded: LoadedModel, key: str, chosen: NDArray[np.bool_]) -> RemovableHandle:
    """Hook the chosen heads, [heads], out of a layer; returns the hook's handle."""
    import torch

    linear = loaded.topology.linear(_matrix(key))
    module = loaded.model.get_submodule(linear.module)

    def hidden_by(features: NDArray[np.int64], width: int) -> torch.Tensor:
        where = np.zeros(width, dtype=bool)
        where[features[np.repeat(chosen, len(features) // len(chosen))]] = True
        return torch.from_numpy(where).to(linear.device(loaded.model))

    if linear.role == "q":
        rows = hidden_by(linear.output_features(), linear.parts * linear.out_features)
        return module.register_forward_hook(lambda module, inputs, output: output.masked_fill(rows, 0))
    columns = hidden_by(np.arange(linear.in_features), linear.in_features)
    return module.register_forward_pre_hook(lambda module, inputs: (inputs[0].masked_fill(columns, 0), *inputs[1:]))
