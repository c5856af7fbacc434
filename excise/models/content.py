"""What saved files hold, as digests that change with it, and what was computed of them, remembered beside them.

What the files mean is in `excise.models.checkpoints`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from excise.errors import ExciseError


def json_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none where it cannot be read or holds something else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


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
    paths = [path for place in (folder, more) if place.is_dir() for path in place.iterdir() if path.suffix in kinds]
    return sorted(path for path in paths if path.is_file())


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
    stamp = [list(file) for file in stamp_of(files)]
    memory = home / "fingerprints" / f"{digest(key)}.json"
    known = json_fields(memory)
    if known.get("files") == stamp and isinstance(known.get("fingerprint"), str):
        return known["fingerprint"]
    fingerprint = compute()
    make_folder(memory.parent)
    partial = memory.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps({"files": stamp, "fingerprint": fingerprint}))
        os.replace(partial, memory)
    except OSError as error:
        raise ExciseError(f"{memory}: cannot be written ({error.strerror}); free space, or set EXCISE_DATA") from error
    return fingerprint


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises ExciseError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExciseError(
            f"{folder}: cannot be written ({error.strerror}); set EXCISE_DATA to a folder of yours"
        ) from error
