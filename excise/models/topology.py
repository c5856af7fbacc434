"""The parts of a model: its matrices by layer and role, and where its heads are. One table tells the families apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from excise.errors import ExciseError

if TYPE_CHECKING:
    import torch

from excise.models.placement import device_of, kept_weight

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


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a decoder layer in its logical orientation: `out_features` x `in_features`.

    Several linears may live in one parameter (GPT-2's fused q, k, v); `weight` returns a view of the right part.
    """

    layer: int
    role: str
    out_features: int
    in_features: int
    module: str
    layout: Literal["linear", "conv1d", "interleaved"] = "linear"
    part: int = 0
    parts: int = 1
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
        if self.layout == "conv1d":
            start = self.part * self.out_features
            return parameter[:, start : start + self.out_features].T
        if self.layout == "interleaved":
            size = self.out_features // self.heads
            return parameter.view(self.heads, self.parts, size, self.in_features)[:, self.part]
        return parameter

    def output_features(self) -> np.ndarray:
        """Where the module's output holds what this matrix's rows compute, int [out] in the order of the rows."""
        if self.layout == "interleaved":
            size = self.out_features // self.heads
            return np.arange(self.parts * self.out_features).reshape(self.heads, self.parts, size)[:, self.part].ravel()
        return self.part * self.out_features + np.arange(self.out_features)


@dataclass(frozen=True)
class Topology:
    """The parts of a decoder that scores, masks and hooks speak of."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    linears: tuple[Linear, ...]
    windows: tuple[int | None, ...]
    """Per layer, how many positions back attention reaches (None: all)."""
    layer_path: str
    site_paths: Mapping[str, str] = field(default_factory=dict)

    def site_module(self, model: torch.nn.Module, layer: int, site: str) -> torch.nn.Module:
        """The module whose first positional input is the activation at `site`, [batch, time, features]."""
        return model.get_submodule(f"{self.layer_path}.{layer}.{self.site_paths[site]}")

    def attention_module(self, model: torch.nn.Module, layer: int) -> torch.nn.Module:
        """The module whose second output is the attention, [batch, heads, queries, keys], where it is computed eagerly.

        It holds the output projection.
        """
        path = self.site_paths["attention_output"].rpartition(".")[0]
        return model.get_submodule(f"{self.layer_path}.{layer}.{path}")

    def site_width(self, layer: int, site: str) -> int:
        return next(each.in_features for each in self.linears if each.layer == layer and each.site == site)

    def linear(self, key: str) -> Linear:
        for each in self.linears:
            if each.key == key:
                return each
        raise KeyError(key)


_SEPARATE = {
    "llama": (
        "model.layers",
        "self_attn.",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "mlp.",
        ("gate_proj", "up_proj"),
        "down_proj",
    ),
    "gpt_neo": (
        "transformer.h",
        "attn.attention.",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "mlp.",
        ("c_fc",),
        "c_proj",
    ),
    "gptj": ("transformer.h", "attn.", "q_proj", "k_proj", "v_proj", "out_proj", "mlp.", ("fc_in",), "fc_out"),
}
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
FAMILIES = (*_LIKE_LLAMA, "gpt2", "gpt_neo", "gptj", "gpt_neox")


def require_known(kind: str | None, where: str = "") -> None:
    """Raise ExciseError unless the architecture is one of `FAMILIES`. where: what the message begins with."""
    if kind not in FAMILIES:
        raise ExciseError(
            f"{where}architecture {kind!r} is not known; Excise knows {', '.join(FAMILIES)}. "
            "A new one is a table in excise/models/loading.py"
        )


def topology_of(model: torch.nn.Module) -> Topology:
    """Describe a loaded `transformers` causal language model. Raises ExciseError for an unknown architecture."""
    config = model.config
    kind = config.model_type
    require_known(kind)
    layers = config.num_hidden_layers
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    hidden = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    linears: list[Linear] = []
    if kind == "gpt2":
        path, inner = "transformer.h", config.n_inner or 4 * hidden
        sites = dict(zip(SITES, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), strict=True))
        for layer in range(layers):
            at = f"{path}.{layer}."
            linears += [
                Linear(layer, role, hidden, hidden, at + "attn.c_attn", "conv1d", part, 3)
                for part, role in enumerate("qkv")
            ]
            linears += [
                Linear(layer, "o", hidden, hidden, at + "attn.c_proj", "conv1d"),
                Linear(layer, "up", inner, hidden, at + "mlp.c_fc", "conv1d"),
                Linear(layer, "down", hidden, inner, at + "mlp.c_proj", "conv1d"),
            ]
    elif kind == "gpt_neox":
        path, inner = "gpt_neox.layers", config.intermediate_size
        own = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        sites = dict(zip(SITES, own, strict=True))
        for layer in range(layers):
            at = f"{path}.{layer}."
            linears += [
                Linear(layer, role, hidden, hidden, at + "attention.query_key_value", "interleaved", part, 3, heads)
                for part, role in enumerate("qkv")
            ]
            linears += [
                Linear(layer, "o", hidden, hidden, at + "attention.dense"),
                Linear(layer, "up", inner, hidden, at + "mlp.dense_h_to_4h"),
                Linear(layer, "down", hidden, inner, at + "mlp.dense_4h_to_h"),
            ]
    else:
        path, attention, q, k, v, o, mlp, ups, down = _SEPARATE.get(kind, _SEPARATE["llama"])
        sites = dict(zip(SITES, (attention + q, attention + o, mlp + ups[-1], mlp + down), strict=True))
        names = {"q": attention + q, "k": attention + k, "v": attention + v, "o": attention + o}
        names |= {"gate": mlp + ups[0], "up": mlp + ups[1]} if len(ups) == 2 else {"up": mlp + ups[0]}
        names |= {"down": mlp + down}
        for layer in range(layers):
            for role, name in names.items():
                module = f"{path}.{layer}.{name}"
                out_features, in_features = model.get_submodule(module).weight.shape
                linears.append(Linear(layer, role, out_features, in_features, module))
    return Topology(
        architecture=kind,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        linears=tuple(linears),
        windows=_windows(config, layers),
        layer_path=path,
        site_paths=sites,
    )


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    if config.model_type == "gpt_neo":
        return tuple(config.window_size if kind == "local" else None for kind in config.attention_layers)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is None and config.model_type != "mistral"):
        return (None,) * layers
    if kinds is None or config.model_type == "mistral":
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
