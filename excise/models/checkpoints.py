"""Reads saved weights, configuration and tokenizer, and refuses what would load as another model than the one saved.

The library that loads them draws weights that it misses at random, leaves out those it does not know, and says so in
its log at most. Here every such case is an error that names the entry and the mend. Models under audit and classifiers
of toxicity are loaded through here alone. Not here: what an architecture is made of (`excise.models.loading`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from excise.errors import ExciseError

INSTEAD_OF_GGUF = "Name the safetensors that it was made from, with hub or folder"
AT_A_HUB = "Check the name, your access rights and the network, or name a local copy (safetensors) with folder"
LARGEST_POINTER = 1024
SPLITS = (
    "gpt-2",
    "smollm",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "smaug-bpe",
    "tekken",
    "qwen2",
    "deepseek-r1-qwen",
    "kormo",
    "megrez",
)
"""Ways to split a text before its tokens (`tokenizer.ggml.pre`) that a converted byte-level tokenizer follows."""
FLOATS = ("F64", "F32", "F16", "BF16")
OLD_BUFFERS = r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$"
"""Causal masks, rotary frequencies and positions, which older versions saved and newer ones compute."""
UNUSED_BY_LANGUAGE_MODELS = re.compile(rf"{OLD_BUFFERS}|^v_head\.")
"""Beside old buffers the value head of reinforcement learning: answers do not depend on it."""
UNUSED_BY_CLASSIFIERS = re.compile(
    rf"{OLD_BUFFERS}|(^|\.)pooler\.|^(cls|lm_head|lm_predictions|mask_predictions|discriminator_predictions|"
    r"generator_predictions|generator_lm_head|vocab_transform|vocab_layer_norm|vocab_projector)\."
)
"""Beside old buffers the heads that a body had in its training before: a score does not depend on them."""
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
QUANTISED_WEIGHTS = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state\.\w+|weight_scale|weight_scale_inv|weight_packed)"
    r"|\.weight\.(absmax|quant_map|quant_state)|_(blocks|scales)$"
)
QUANTISED_NAME = re.compile(
    r"([-_.](unsloth|bnb|gptq|awq|exl[23]|hqq|eetq|aqlm|quip|fp8|fp4|nf4|mxfp4|nvfp4|dynamic|quantized|gguf|w\d+a\d+|"
    r"(int)?[2348]-?bits?|int[48]|g\d+|marlin))+$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Checkpoint:
    """Where a model was saved: a folder, or a repository of a hub, which `pinned` turns into one state of it.

    where: file and key of the entry, which start every message. kind: what it is called there, for example "model".
    """

    where: str
    kind: str
    folder: Path | None = None
    hub: str | None = None
    revision: str | None = None

    @property
    def source(self) -> str:
        return self.hub if self.folder is None else str(self.folder)

    @property
    def place(self) -> str:
        return f"hub {self.hub!r}" if self.folder is None else f"folder {self.folder}"

    @property
    def options(self) -> dict[str, Any]:
        """What every call of the library gets. Code that comes with a model is never run."""
        return {"revision": self.revision, "trust_remote_code": False}


@contextmanager
def named_failures(where: str, what: str, mend: str) -> Iterator[None]:
    """Turn whatever a library raises into an `ExciseError`: "where: what: its first line. mend"."""
    try:
        yield
    except ExciseError:
        raise
    except Exception as error:  # tokenizers raises bare Exception; broken files raise most other kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = f"there is no {lines[0]}" if isinstance(error, KeyError) else lines[0].rstrip(".")
        raise ExciseError(f"{where}: {what}: {why}. {mend}") from error


def loading(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """Around every call of the library about a checkpoint: failures name entry, place and mend."""
    return named_failures(
        checkpoint.where,
        f"the {checkpoint.kind} cannot be loaded from {checkpoint.place}",
        AT_A_HUB
        if checkpoint.folder is None
        else f"Check that all of its files are there and whole, or save the {checkpoint.kind} anew (save_pretrained)",
    )


def pinned(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint at the commit that its branch or tag stands for now, so that all of its files are of one state.

    Raises ExciseError where a hub cannot be reached and keeps no copy here, or its repository holds no model.
    """
    where, hub = checkpoint.where, checkpoint.hub
    if checkpoint.folder is not None:
        return checkpoint
    if Path(hub).is_dir():
        raise ExciseError(f"{where}.hub: {hub} is a folder here; write folder: {hub}")
    with loading(checkpoint):
        # Of an adapter, so that it can be named as one.
        found = saved_file(checkpoint, "config.json") or saved_file(checkpoint, "adapter_config.json")
    if found is None:
        at = "" if checkpoint.revision is None else f" (revision {checkpoint.revision})"
        raise ExciseError(f"{where}: no config.json in {checkpoint.place}{at}. {AT_A_HUB}")
    commit = found.parent.name  # the library keeps snapshots/COMMIT/config.json
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ExciseError(f"{where}.hub: the commit of {hub!r} is unknown; name it with revision")
    return replace(checkpoint, revision=commit)


# --- configuration ---------------------------------------------------------------------------------------------------


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of a checkpoint's config.json.

    Raises ExciseError where there is none, and where the weights are not the whole model: an adapter beside or instead
    of them, quantised weights, code of its own.
    """
    from transformers import PreTrainedConfig

    where, folder = checkpoint.where, checkpoint.folder
    if folder is not None and folder.is_file():
        mend = f"write gguf: {folder}" if folder.suffix == ".gguf" else "name the folder that holds it"
        raise ExciseError(f"{where}.folder: {folder} is a file; {mend}")
    if folder is not None:
        adapter = folder / "adapter_config.json"
    else:
        with loading(checkpoint):
            adapter = saved_file(checkpoint, "adapter_config.json") or Path()
    if folder is not None and not adapter.is_file():
        adapter = folder / "adapter_model.safetensors"
    if adapter.is_file():
        base = _json(adapter.with_name("adapter_config.json")).get("base_model_name_or_path")
        raise ExciseError(
            f"{where}: {checkpoint.place} holds an adapter ({adapter.name}), which is not part of the weights. "
            f"Merge it into its base{f' {base}' if base else ''} (peft: merge_and_unload, save_pretrained) and name "
            "the merged folder; to use the weights without it, name a copy without it"
        )
    if folder is not None and not (folder / "config.json").is_file():
        loose = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
        mend = f"write gguf: {loose[0]}" if loose else f"name a saved {checkpoint.kind}'s folder"
        raise ExciseError(f"{where}.folder: no config.json in {folder}; {mend}")
    if folder is not None and (lost := [path for path in folder.iterdir() if path.is_symlink() and not path.exists()]):
        raise ExciseError(
            f"{where}.folder: {lost[0]} is a link to a file that is not there; copy the folder with what its links "
            "lead to (cp -rL)"
        )
    for path in [] if folder is None else files_of(folder):
        if path.stat().st_size < LARGEST_POINTER and path.read_bytes().startswith(b"version https://git-lfs"):
            raise ExciseError(f"{where}.folder: {path} is only a pointer of Git LFS; run `git lfs pull` there")
    with loading(checkpoint):
        config, _ = PreTrainedConfig.get_config_dict(checkpoint.source, revision=checkpoint.revision)
        if not isinstance(config, Mapping):
            raise ValueError("its config.json holds no fields")
    quantised = [config[name] for name in ("quantization_config", "compression_config") if config.get(name) is not None]
    if quantised:
        quantised = quantised[0]
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise ExciseError(_quantised(checkpoint, f"quantised{f' ({method})' if method else ''}", config))
    if own := (config.get("auto_map") or {}):
        raise ExciseError(
            f"{where}: {checkpoint.place} asks for code of its own ({', '.join(sorted(map(str, own)))} in the auto_map "
            f"of its config.json), which Excise never runs. Name another {checkpoint.kind}, or, where the architecture "
            "is a standard one in all respects, a local copy without auto_map"
        )
    return config


def _quantised(checkpoint: Checkpoint, what: str, config: Mapping[str, Any]) -> str:
    full = _full_precision(checkpoint, config)
    return (
        f"{checkpoint.where}: the weights in {checkpoint.place} are {what}; scores and masks are made for "
        f"full-precision weights. Name those{f': probably {full}' if full else ', from which these were made'}"
    )


def _full_precision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """The name of the weights that quantised ones were made from, as far as model card, config or name tell it."""
    if checkpoint.folder is not None and (checkpoint.folder / "README.md").is_file():
        card = (checkpoint.folder / "README.md").read_text(encoding="utf-8", errors="replace").split("---")
        if len(card) > 2 and not card[0].strip():
            try:
                fields = yaml.safe_load(card[1])
            except yaml.YAMLError:
                fields = None
            base = fields.get("base_model") if isinstance(fields, dict) else None
            base = base[0] if isinstance(base, list) and base else base
            if isinstance(base, str):
                return base
    name = checkpoint.hub or checkpoint.folder.name
    saved = config.get("_name_or_path")
    for candidate in (saved if isinstance(saved, str) else "", name):
        plain = QUANTISED_NAME.sub("", candidate)
        if plain and plain != name and not Path(plain).is_absolute():
            return plain
    return None


def saved_file(checkpoint: Checkpoint, name: str) -> Path | None:
    """A file of a checkpoint, fetched if need be; None where there is none of that name."""
    from transformers.utils import cached_file

    options = {"revision": checkpoint.revision, "_raise_exceptions_for_missing_entries": False}
    found = cached_file(checkpoint.source, name, **options)
    return None if found is None else Path(found)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- weights ---------------------------------------------------------------------------------------------------------


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer saved with a checkpoint. Raises ExciseError where it cannot be had, or knows no ordinary text.

    Where its files are missing, the library makes up an empty one.
    """
    from transformers import AutoTokenizer

    with loading(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, **checkpoint.options)
        known = set(tokenizer("How much is it, 1 or 2?", add_special_tokens=False)["input_ids"])
        if not known - {tokenizer.unk_token_id}:
            raise ExciseError(
                f"{checkpoint.where}: the tokenizer in {checkpoint.place} has no vocabulary; add its files "
                "(tokenizer.json)"
            )
    return tokenizer


def load_weights(checkpoint: Checkpoint, auto: Any, config: Mapping[str, Any], unused: re.Pattern, **options: Any):
    """Load a model with every weight it has, and nothing else, from the checkpoint.

    auto: the library's class that picks the architecture. config: of `read_config`. unused: names of saved weights
    that may be left out. options: of `from_pretrained`. Raises ExciseError where weights are missing, left over, of
    another shape, not floating-point numbers, or cannot be read.
    """
    if checkpoint.folder is not None and not any(checkpoint.folder.glob("*.safetensors")):
        pickled = [
            path.name
            for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
            for path in sorted(checkpoint.folder.glob(pattern))
        ]
        found = f"only {pickled[0]}, which may hold code" if pickled else "no weights"
        raise ExciseError(
            f"{checkpoint.where}: the {checkpoint.kind} cannot be loaded from {checkpoint.place}: it holds {found}. "
            "Save the weights as safetensors (save_pretrained does)"
        )
    with loading(checkpoint):
        model, found = auto.from_pretrained(
            checkpoint.source,
            **checkpoint.options,
            **options,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        integers = _not_floats(checkpoint, unused)
    if problem := _weights_problem(checkpoint, found, config, unused):
        raise ExciseError(problem)
    if integers:
        kinds = ", ".join(f"{name} ({dtype})" for name, dtype in integers[:3])
        raise ExciseError(_quantised(checkpoint, f"not floating-point numbers: {kinds}", config))
    return model


def _not_floats(checkpoint: Checkpoint, unused: re.Pattern) -> list[tuple[str, str]]:
    """Saved weights that are no floating-point numbers of 16 bits or more, with their dtype."""
    from safetensors import safe_open

    whole = saved_file(checkpoint, "model.safetensors")
    if whole is None:
        index = saved_file(checkpoint, "model.safetensors.index.json")
        names = sorted(set(_json(index)["weight_map"].values())) if index else []
        files = [saved_file(checkpoint, name) for name in names]
    else:
        files = [whole]
    found = []
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                dtype = weights.get_slice(name).get_dtype()
                if dtype not in FLOATS and not unused.search(name):
                    found.append((name, dtype))
    return found


def _weights_problem(
    checkpoint: Checkpoint, found: Mapping[str, Any], config: Mapping[str, Any], unused: re.Pattern
) -> str | None:
    """What is wrong with the weights that were found, in one message; None where nothing is."""
    missing = sorted(found["missing_keys"])
    unexpected = sorted(name for name in found["unexpected_keys"] if not unused.search(name))
    reshaped = sorted(found["mismatched_keys"])
    if not (missing or unexpected or reshaped):
        return None
    if any(QUANTISED_WEIGHTS.search(name) for name in unexpected):
        return _quantised(checkpoint, f"quantised ({_some(unexpected)})", config)
    parts = []
    if missing:
        parts.append(f"the weights lack {_some(missing)}")
    if unexpected:
        parts.append(f"the {checkpoint.kind} has no place for {_some(unexpected)}")
    if reshaped:
        shapes = [f"{name} ({tuple(saved)} where config.json says {tuple(due)})" for name, saved, due in reshaped]
        parts.append(f"the shape is another one of {_some(shapes)}")
    return f"{checkpoint.where}: {checkpoint.place}: {'; '.join(parts)}. {_mend(missing, unexpected, checkpoint.kind)}"


def _mend(missing: list[str], unexpected: list[str], kind: str) -> str:
    if any("lora_" in name for name in unexpected):
        return "An adapter is not merged: call merge_and_unload and save the model anew"
    if (part := _foreign_part(missing, unexpected)) is not None:
        wrapper = f" ({WRAPPERS[part]})" if part in WRAPPERS else ""
        return (
            f"The names hold a foreign {part!r}{wrapper}: save the {kind} without what wraps it, or take that off the "
            "names"
        )
    if missing and not unexpected and kind == "classifier":
        return "This is no trained classifier: what is missing would be drawn at random; name another one"
    if missing and not unexpected and all(name in ("lm_head.weight", "embed_out.weight") for name in missing):
        return (
            "What is missing would be drawn at random. If the output layer shares the embeddings, set "
            "tie_word_embeddings: true in config.json; if not, this is no language model"
        )
    return (
        "What is missing would be drawn at random, what is left over would not be used: config.json and weights do "
        f"not belong together. Save the {kind} anew with save_pretrained"
    )


def _foreign_part(missing: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """What makes every unexpected name out of a missing one: a prefix, or a wrapper's part inside; None without one."""
    due, found = set(missing), list(unexpected)
    for part in WRAPPERS:
        if found and all(part in name and name.replace(part, "") in due for name in found):
            return part
    prefixes = set()
    for name in found:
        parts = name.split(".")
        starts = [cut for cut in range(1, len(parts)) if ".".join(parts[cut:]) in due]
        prefixes.add(".".join(parts[: starts[0]]) + "." if starts else None)
    return prefixes.pop() if len(prefixes) == 1 else None


def _some(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def check_vocabulary(checkpoint: Checkpoint, tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer that turns ordinary text into ids for which the model has no embedding.

    A special token without an embedding is left alone: it appears in a text only where it is spelt out (Gemma 3 has
    one for pictures), and whoever encodes a text checks that text.
    """
    with loading(checkpoint):
        rows = model.get_input_embeddings().num_embeddings
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        vocabulary = tokenizer.get_vocab()
        always = set(tokenizer("1")["input_ids"])
    beyond = sorted(
        number for number in vocabulary.values() if number >= rows and (number not in special or number in always)
    )
    if beyond:
        raise ExciseError(
            f"{checkpoint.where}: the tokenizer has {max(vocabulary.values()) + 1} entries, the {checkpoint.kind} "
            f"embeddings for {rows}: {tokenizer.convert_ids_to_tokens(beyond[0])!r} ({beyond[0]}) has none. Name the "
            "tokenizer that belongs to the weights, or resize the embeddings (resize_token_embeddings) and train them"
        )


# --- GGUF ------------------------------------------------------------------------------------------------------------


def convert_gguf(
    where: str, find: Callable[[], Path], sha256: str, home: Path, require: Callable[[str, str], object]
) -> Path:
    """Turn a GGUF file into a folder of safetensors and tokenizer, once for all entries. Returns the folder.

    Quantised numbers become the float32 numbers they stand for. find: gives the file, if it has not been converted yet.
    sha256: of the file; it names the folder, in `home`. require: raises ExciseError for a `model_type` that is of no
    use; takes what the message begins with, too. Raises ExciseError where the file is broken, or holds what the
    converted model would not do.
    """
    target = home / f"gguf-{sha256[:16]}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = find()
    options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "trust_remote_code": False}
    names, places = _read_gguf(where, file)
    with named_failures(where, f"{file} cannot be converted", INSTEAD_OF_GGUF):
        require(AutoConfig.from_pretrained(**options).model_type, f"{where}: ")
        quantised, info = AutoModelForCausalLM.from_pretrained(
            **options, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        if missing := sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]):
            raise ExciseError(
                f"{where}: {file} lacks {_some(missing)}, which would be drawn at random. Name a whole file (parts are "
                "merged by llama-gguf-split --merge), or the safetensors that it was made from"
            )
        taken = {places.get_name(name, try_suffixes=(".weight", ".bias")) for name in quantised.state_dict()}
        if dropped := sorted(set(names) - taken):
            raise ExciseError(
                f"{where}: {file} holds {_some(dropped)}, which the conversion would drop. {INSTEAD_OF_GGUF}"
            )
        tokenizer = AutoTokenizer.from_pretrained(**options)
        fields = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
        model = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(fields), dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    make_folder(home)
    partial = home / f".{target.name}.{os.getpid()}"
    try:
        with named_failures(
            where, f"the converted model cannot be written to {home}", "Free space, or set EXCISE_DATA"
        ):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        os.replace(partial, target)
    except OSError:
        # Another process finished the same conversion first; its folder holds the same weights.
        shutil.rmtree(partial)
        if not (target / "config.json").is_file():
            raise
    return target


def _read_gguf(where: str, file: Path) -> tuple[list[str], Any]:
    """The names of a GGUF file's tensors, and the map from the library's names to GGUF's.

    Raises ExciseError where the file cannot be read, or says something that the conversion drops in silence.
    """
    import gguf

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ExciseError(f"{where}: {file} is no GGUF file; name one, or a saved model's folder with folder")
    with named_failures(where, f"{file} cannot be read as GGUF", "Fetch it anew, it may be cut short"):
        reader = gguf.GGUFReader(file)
        kind = reader.fields["general.architecture"].contents()
        names = [tensor.name for tensor in reader.tensors]

    def value(name: str) -> Any:
        return reader.fields[name].contents() if name in reader.fields else None

    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if kind not in architectures:
        raise ExciseError(f"{where}: {file} holds architecture {kind!r}, which is not known; name another model")
    lost = []
    scaling, factor = value(f"{kind}.rope.scaling.type"), value(f"{kind}.rope.scaling.factor")
    if scaling not in (None, "none") or factor not in (None, 0, 1):
        lost.append("scales its positions (rope.scaling)")
    if value(f"{kind}.attention.sliding_window") and not kind.startswith("gemma"):
        lost.append("attends to a window only (sliding_window)")
    if value("tokenizer.ggml.model") == "gpt2" and value("tokenizer.ggml.pre") not in SPLITS:
        lost.append(f"splits text before its tokens in a way of its own ({value('tokenizer.ggml.pre')})")
    if lost:
        raise ExciseError(f"{where}: {file} {' and '.join(lost)}, which the conversion would drop. {INSTEAD_OF_GGUF}")
    return names, gguf.get_tensor_name_map(architectures[kind], value(f"{kind}.block_count") or 0)


# --- content ---------------------------------------------------------------------------------------------------------


def digest(*parts: str) -> str:
    """16 hex digits that change with any part."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex. Raises ExciseError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ExciseError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def files_of(folder: Path) -> list[Path]:
    """The files of a saved model that decide what it answers."""
    kinds = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    more = folder / "additional_chat_templates"  # where transformers saves named ones
    found = [path for each in (folder, more) if each.is_dir() for path in each.iterdir() if path.suffix in kinds]
    return sorted(path for path in found if path.is_file())


def content_of(files: list[Path]) -> str:
    """16 hex digits of the files' names and content."""
    return digest(*(f"{path.name}:{sha256_of(path)}" for path in files))


def stamp_of(files: list[Path]) -> tuple[tuple[str, int, int, int], ...]:
    """Name, size and times of the files, which change with their content."""
    stats = [path.stat() for path in files]
    return tuple(
        (path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in zip(files, stats, strict=True)
    )


def remembered(files: list[Path], key: str, home: Path, compute: Callable[[], str]) -> str:
    """What `compute` makes of the files, kept in `home` under `key` for as long as their size and times stay."""
    stamp = [list(each) for each in stamp_of(files)]
    memory = home / "fingerprints" / f"{digest(key)}.json"
    known = _json(memory)
    if known.get("files") == stamp and isinstance(known.get("fingerprint"), str):
        return known["fingerprint"]
    found = compute()
    make_folder(memory.parent)
    partial = memory.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps({"files": stamp, "fingerprint": found}))
        os.replace(partial, memory)
    except OSError as error:
        raise ExciseError(f"{memory}: cannot be written ({error.strerror}); free space, or set EXCISE_DATA") from error
    return found


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises ExciseError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExciseError(
            f"{folder}: cannot be written ({error.strerror}); set EXCISE_DATA to a folder of yours"
        ) from error
