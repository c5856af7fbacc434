"""The folders of files beside the warehouse: tensors, figures, converted models, the cache of completions.

Every path of the data folder is decided here, so that moving the folder (EXCISE_DATA) moves everything: the warehouse
holds paths relative to it. Tensors are safetensors files, never pickles; a file appears under its name only when whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from pydantic import Field

from excise.errors import ExciseError

ROOT = Path(__file__).resolve().parents[1]


def data_folder() -> str:
    """The folder of all results: what EXCISE_DATA names, without it `data` beside workspace.yaml."""
    return os.environ.get("EXCISE_DATA") or str(ROOT / "data")


def data_root(folder: str) -> Path:
    """The absolute path of a data folder; `~` stands for the home folder.

    Raises ExciseError for a name that is no text, which tables could not hold, or that DuckDB cannot use: it takes what
    follows a question mark for options.
    """
    root = Path(folder).expanduser().absolute()
    if any("\ud800" <= letter <= "\udfff" for letter in str(root)):  # bytes that are no UTF-8, as Python keeps them
        raise ExciseError(f"EXCISE_DATA: {str(root)!r} is no UTF-8; give the folder a name that is")
    if "?" in str(root):
        raise ExciseError(f"EXCISE_DATA: DuckDB keeps no file in {str(root)!r}: name a folder without a question mark")
    return root


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
        return data_root(self.folder)

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
