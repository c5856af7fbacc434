"""The parts of a model: its matrices by layer and role, where its heads are, and what its attention reaches.

What tells architectures apart is an entry of `excise.models.families`; everything above speaks of layers, roles and
sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from excise.models.families import Family, Windows, family_of
from excise.models.placement import device_of, kept_weight, weight_of

if TYPE_CHECKING:
    import torch

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
SITES = ("attention_input", "attention_output", "mlp_input", "mlp_output")
SITE_OF_ROLE = {
    "q": "attention_input",
    "k": "attention_input",
    "v": "attention_input",
    "o": "attention_output",
    "gate": "mlp_input",
    "up": "mlp_input",
    "down": "mlp_output",
}
"""The site whose activation is a role's input. q, k and v share one, gate and up share one."""
_ROLE_OF_SITE = {"attention_input": "q", "attention_output": "o", "mlp_input": "up", "mlp_output": "down"}


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a decoder layer in its logical orientation: `out_features` x `in_features`.

    Several linears may live in one parameter (GPT-2's fused q, k, v); `weight` returns a view of the right part.
    layout: how the parameter is kept, as [out, in], as [in, out] (conv1d) or with the rows of all parts head by head
    (interleaved). start: the first row among those of the whole module, or among those of a head where heads
    interleave. module_outputs: rows of the whole module. heads: those that interleave.
    """

    layer: int
    role: str
    out_features: int
    in_features: int
    module: str
    module_outputs: int
    layout: Literal["linear", "conv1d", "interleaved"] = "linear"
    start: int = 0
    heads: int = 1

    @property
    def key(self) -> str:
        return f"{self.layer}.{self.role}"

    @property
    def site(self) -> str:
        return SITE_OF_ROLE[self.role]

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def fused(self) -> bool:
        """Whether its module computes other matrices' outputs, too."""
        return self.out_features < self.module_outputs

    def weight(self, model: torch.nn.Module) -> torch.Tensor:
        """A view of the parameter, [out, in], or [heads, out / heads, in] where heads interleave (GPT-NeoX).

        It is the memory the weights are kept in, wherever the model is placed: to change it is to change the model.
        """
        return self.of(kept_weight(model.get_submodule(self.module)))

    def device(self, model: torch.nn.Module) -> torch.device:
        """Where the module computes: there its inputs and outputs are."""
        return device_of(model.get_submodule(self.module))

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The same view of any tensor shaped like the parameter, for example its gradient."""
        if self.layout == "interleaved":
            return parameter.view(self.heads, -1, self.in_features)[:, self._rows]
        if self.layout == "conv1d":
            return parameter[:, self._rows].T
        return parameter[self._rows] if self.fused else parameter

    def output_features(self) -> np.ndarray:
        """Where the module's output holds what this matrix's rows compute, int [out] in the order of the rows."""
        return np.arange(self.module_outputs).reshape(self.heads, -1)[:, self._rows].ravel()

    @property
    def _rows(self) -> slice:
        return slice(self.start, self.start + self.out_features // self.heads)


@dataclass(frozen=True)
class Topology:
    """The parts of a decoder that scores, masks and hooks speak of."""

    family: Family
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    linears: tuple[Linear, ...]
    windows: Windows
    logit_cap: float | None = None
    """The model's logits lie between minus this and this (None: anywhere)."""

    @property
    def architecture(self) -> str:
        return self.family.model_type

    def layer_modules(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The decoder layers, from the first."""
        return [model.get_submodule(f"{self.family.layers}.{layer}") for layer in range(self.layers)]

    def site_module(self, model: torch.nn.Module, layer: int, site: str) -> torch.nn.Module:
        """The module whose first positional input is the activation at `site`, [batch, time, features]."""
        return model.get_submodule(f"{self.family.layers}.{layer}.{self.family.modules()[_ROLE_OF_SITE[site]]}")

    def attention_module(self, model: torch.nn.Module, layer: int) -> torch.nn.Module:
        """The module whose second output is the attention, [batch, heads, queries, keys], where it is computed eagerly.

        It holds the output projection.
        """
        return model.get_submodule(f"{self.family.layers}.{layer}.{self.family.attention}")

    def site_width(self, layer: int, site: str) -> int:
        return next(matrix.in_features for matrix in self.linears if matrix.layer == layer and matrix.site == site)

    def linear(self, key: str) -> Linear:
        for matrix in self.linears:
            if matrix.key == key:
                return matrix
        raise KeyError(key)


def topology_of(model: torch.nn.Module) -> Topology:
    """Describe a loaded `transformers` causal language model. Raises ExciseError for an unknown architecture."""
    config: Any = model.config
    family = family_of(config.model_type)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    hidden = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    return Topology(
        family=family,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        linears=tuple(
            linear
            for layer in range(config.num_hidden_layers)
            for linear in _linears(model, family, layer, rows, heads)
        ),
        windows=family.windows(config),
        logit_cap=getattr(config, family.logit_cap, None) if family.logit_cap else None,
    )


def _linears(model: torch.nn.Module, family: Family, layer: int, rows: dict[str, int], heads: int) -> Iterator[Linear]:
    """The matrices of a layer. rows: outputs of q, k and v; those of a fused gate and up are as many each."""
    starts: dict[str, int] = {}
    modules = family.modules()
    for role, path in modules.items():
        module = f"{family.layers}.{layer}.{path}"
        outputs, inputs = weight_of(model.get_submodule(module)).shape
        if family.transposed:
            outputs, inputs = inputs, outputs
        sharing = sum(other == path for other in modules.values())
        rows_of_role = outputs if sharing == 1 else rows.get(role, outputs // sharing)
        interleaved = sharing > 1 and role in rows and family.fused_heads == "interleaved"
        start = starts.get(path, 0)
        starts[path] = start + (rows_of_role // heads if interleaved else rows_of_role)
        yield Linear(
            layer,
            role,
            rows_of_role,
            inputs,
            module,
            outputs,
            "interleaved" if interleaved else "conv1d" if family.transposed else "linear",
            start,
            heads if interleaved else 1,
        )
