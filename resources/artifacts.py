"""The folders of files beside the warehouse: tensors, figures, converted models, the cache of completions.

Every path of the data folder is decided here, so that moving the folder (EXCISE_DATA) moves everything: the warehouse
holds paths relative to it. Tensors are safetensors files, never pickles; a file appears under its name only when whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from pydantic import Field

from excise.errors import ExciseError


@dataclass(frozen=True)
class StoredFile:
    """A file as the warehouse remembers it: path relative to the data folder, SHA-256 in hex, size in bytes."""

    path: str
    sha256: str
    bytes: int


class Artifacts(dg.ConfigurableResource):
    """Hands out places for files below `<folder>` and describes what lies there."""

    folder: str = Field(description="Folder of all results; EXCISE_DATA sets it.")

    @property
    def root(self) -> Path:
        return Path(self.folder).absolute()

    @property
    def models(self) -> Path:
        """Where converted models and remembered fingerprints lie."""
        return self._made("models")

    @property
    def completion_cache(self) -> Path:
        return self._made("cache", "completions")

    @property
    def score_cache(self) -> Path:
        return self._made("cache", "scores")

    def tensors(self, kind: str, *partition: str) -> Path:
        """The folder of tensor files of one kind (for example `attribution`) and partition."""
        return self._made("artifacts", kind, *partition)

    def figures(self, *partition: str) -> Path:
        """The folder of a partition's pictures."""
        return self._made("figures", *partition)

    def publish(self, path: Path, write: Callable[[Path], object]) -> StoredFile:
        """Let `write` fill a temporary file, then give it the name `path`; an earlier file of that name is replaced."""
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            raise ExciseError(f"{path}: cannot be written ({error.strerror}); {_MEND}") from error
        finally:
            unfinished.unlink(missing_ok=True)
        return self.describe(path)

    def relative(self, path: Path) -> str:
        """The path relative to the data folder, as the warehouse keeps it. Raises ExciseError for one outside."""
        if not path.absolute().is_relative_to(self.root):
            raise ExciseError(f"{path}: lies outside the data folder {self.root}")
        return path.absolute().relative_to(self.root).as_posix()

    def describe(self, path: Path) -> StoredFile:
        """Path, hash and size of a file in the data folder. Raises ExciseError for one outside or missing."""
        name = self.relative(path)
        if not path.is_file():
            raise ExciseError(f"{path}: there is no such file")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return StoredFile(name, digest, path.stat().st_size)

    def locate(self, path: str, *, made_by: str) -> Path:
        """The absolute path of a file the warehouse names; ExciseError, naming the asset to rerun, if it is gone."""
        absolute = self.root / path
        if not absolute.is_file():
            raise ExciseError(f"{absolute}: the file is gone; materialize {made_by} of this partition again")
        return absolute

    def _made(self, *parts: str) -> Path:
        for part in parts:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part):
                raise ExciseError(f"{part!r} cannot name a folder; use letters, digits, dot, dash and underscore")
        folder = self.root.joinpath(*parts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExciseError(f"{folder}: cannot be written ({error.strerror}); {_MEND}") from error
        return folder


_MEND = "set EXCISE_DATA to a folder you may write to"
