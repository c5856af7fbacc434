"""Where models were saved, and what their configuration says: what is no whole model in full precision is refused.

Models under audit and classifiers of toxicity are found through here alone. Not here: their weights (`weights`), and
what an architecture is made of (`excise.models.loading`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from excise.errors import ExciseError
from excise.files.yaml_files import Faults, parse_yaml
from excise.models.content import files_of, json_fields

AT_A_HUB = "Check the name, your access rights and the network, or name a local copy (safetensors) with folder"
LARGEST_POINTER = 1024
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
        return str(self.folder or self.hub)

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
    if Path(checkpoint.source).is_dir():
        raise ExciseError(f"{where}.hub: {hub} is a folder here; write folder: {hub}")
    with loading(checkpoint):
        # Of an adapter, so that it can be named as one.
        config = saved_file(checkpoint, "config.json") or saved_file(checkpoint, "adapter_config.json")
    if config is None:
        at = "" if checkpoint.revision is None else f" (revision {checkpoint.revision})"
        raise ExciseError(f"{where}: no config.json in {checkpoint.place}{at}. {AT_A_HUB}")
    commit = config.parent.name  # the library keeps snapshots/COMMIT/config.json
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ExciseError(f"{where}.hub: the commit of {hub!r} is unknown; name it with revision")
    return replace(checkpoint, revision=commit)


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
        base = json_fields(adapter.with_name("adapter_config.json")).get("base_model_name_or_path")
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
    settings = [config[name] for name in ("quantization_config", "compression_config") if config.get(name) is not None]
    if settings:
        quantised = settings[0]
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise ExciseError(quantised_message(checkpoint, f"quantised{f' ({method})' if method else ''}", config))
    if code := (config.get("auto_map") or {}):
        raise ExciseError(
            f"{where}: {checkpoint.place} asks for code of its own ({', '.join(sorted(map(str, code)))} in the "
            f"auto_map of its config.json), which Excise never runs. Name another {checkpoint.kind}, or, where the "
            "architecture is a standard one in all respects, a local copy without auto_map"
        )
    return config


def quantised_message(checkpoint: Checkpoint, what: str, config: Mapping[str, Any]) -> str:
    """That weights are quantised, and which ones to name instead. what: how they are stored."""
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
                fields = parse_yaml(card[1], "fields")
            except Faults:
                fields = {}
            base = fields["base_model"].value if "base_model" in fields else None
            base = base[0] if isinstance(base, list) and base else base
            if isinstance(base, str):
                return base
    name = checkpoint.hub or Path(checkpoint.source).name
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
    path = cached_file(checkpoint.source, name, **options)
    return None if path is None else Path(path)
