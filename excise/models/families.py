"""Families: what an architecture calls its matrices and what it does otherwise than others, one entry each.

To add one is to add an entry here, or to name a `Family` in the entry points `excise.families` of an installed package.
Which matrices a loaded model then has, layer by layer, is in `excise.models.topology`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from excise.errors import ExciseError
from excise.extensions import with_extensions

GROUP = "excise.families"

Windows = tuple[int | None, ...]
"""Per layer, how many positions back attention reaches (None: all)."""


def by_layer_types(config: Any) -> Windows:
    """The configuration's window in the layers that it calls sliding, if it calls any by a name."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None or window is None:
        return (None,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def in_every_layer(config: Any) -> Windows:
    """The configuration's window, or none, in every layer."""
    return (config.sliding_window,) * config.num_hidden_layers


def in_local_layers(config: Any) -> Windows:
    """GPT-Neo's: every other layer is local."""
    return tuple(config.window_size if kind == "local" else None for kind in config.attention_layers)


@dataclass(frozen=True)
class Family:
    """One architecture of `transformers`, by its `model_type`.

    layers: path of the list of decoder layers. attention, mlp: paths within a layer; attention is the module that
    returns attention probabilities as its second output and holds the output projection. q, k, v, o: modules within the
    attention, qkv one that computes all three. gate, up, down: modules within the mlp, gate_up one that computes both,
    gate first; an mlp without a gate has neither gate nor gate_up. What is fused has no field of its own.
    """

    model_type: str
    layers: str
    attention: str
    o: str
    down: str
    mlp: str = "mlp"
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    gate: str = ""
    up: str = ""
    gate_up: str = ""
    fused_heads: Literal["after_each_other", "interleaved"] = "after_each_other"
    """Rows of `qkv`: all of q, then k, then v; or q, k and v of the first head, then of the next."""
    transposed: bool = False
    """Whether matrices are kept as [in, out]."""
    layers_return_tuples: bool = False
    """Whether a layer's forward returns a tuple that begins with its states, and not the states alone."""
    order_mask: str | None = None
    """The buffer of the attention, [1, 1, positions, positions], that masks by the order of columns whatever mask a
    pass is given; None where there is none."""
    windows: Callable[[Any], Windows] = by_layer_types
    """Of a configuration: the windows of its layers."""
    logit_cap: str | None = None
    """The field of the configuration by which the model caps its logits."""
    attention_cap: str | None = None
    """The field by which it caps attention scores, which only the eager attention computes."""

    def modules(self) -> dict[str, str]:
        """Paths within a layer by role, in the order of `topology.ROLES`; a fused module stands for all it computes."""
        attention = {"q": self.q or self.qkv, "k": self.k or self.qkv, "v": self.v or self.qkv, "o": self.o}
        mlp = {"gate": self.gate or self.gate_up, "up": self.up or self.gate_up, "down": self.down}
        paths = {role: f"{self.attention}.{name}" for role, name in attention.items()}
        return paths | {role: f"{self.mlp}.{name}" for role, name in mlp.items() if name}


_LLAMA = Family(
    model_type="llama",
    layers="model.layers",
    attention="self_attn",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="o_proj",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
_GEMMA2 = replace(
    _LLAMA, model_type="gemma2", logit_cap="final_logit_softcapping", attention_cap="attn_logit_softcapping"
)
BUILT_IN = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral", windows=in_every_layer),
    replace(_LLAMA, model_type="qwen2"),
    replace(_LLAMA, model_type="qwen3"),
    replace(_LLAMA, model_type="gemma"),
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text"),
    Family(
        model_type="gpt2",
        layers="transformer.h",
        attention="attn",
        qkv="c_attn",
        o="c_proj",
        up="c_fc",
        down="c_proj",
        transposed=True,
    ),
    Family(
        model_type="gpt_neo",
        layers="transformer.h",
        attention="attn.attention",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="out_proj",
        up="c_fc",
        down="c_proj",
        layers_return_tuples=True,
        order_mask="bias",
        windows=in_local_layers,
    ),
    Family(
        model_type="gptj",
        layers="transformer.h",
        attention="attn",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="out_proj",
        up="fc_in",
        down="fc_out",
        layers_return_tuples=True,
    ),
    Family(
        model_type="gpt_neox",
        layers="gpt_neox.layers",
        attention="attention",
        qkv="query_key_value",
        fused_heads="interleaved",
        o="dense",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
    ),
)


def family_of(model_type: str | None, where: str = "") -> Family:
    """The family of a configuration's `model_type`. where: what an error's message begins with.

    Raises ExciseError for one that is not known.
    """
    known = with_extensions(GROUP, Family, BUILT_IN, lambda family: family.model_type)
    if model_type not in known:
        raise ExciseError(
            f"{where}architecture {model_type!r} is not known; Excise knows {', '.join(known)}. "
            "A new one is an entry in excise/models/families.py"
        )
    return known[model_type]
