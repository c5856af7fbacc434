"""Paths in what users write: a leading ~, and relative ones, which start at the file that names them."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from excise.errors import ExciseError
from excise.files.yaml_files import Faults


def with_paths(fields: Mapping[str, Any], kind: type[BaseModel], folder: Path) -> dict[str, Any]:
    """The fields with those of type Path made absolute, in nested models, too."""
    result = dict(fields)
    for name, described_as in kind.model_fields.items():
        value, kinds = fields.get(name), _kinds(described_as.annotation)
        if Path in kinds and isinstance(value, str):
            result[name] = _resolved(name, value, folder)
        for inner in kinds:
            if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
                result[name] = with_paths(value, inner, folder)
    return result


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, UnionType, typing.Annotated):
        return tuple(kind for part in get_args(annotation) for kind in _kinds(part))
    return (annotation,)


def home_expanded(path: Path | str, setting: str) -> Path:
    """The path with a leading ~ replaced by the home folder. Raises ExciseError, naming the setting, without one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name of a user that does not exist
        raise ExciseError(f"{setting}: there is no home folder for {path}: write the path in full") from None


def _resolved(name: str, value: str, folder: Path) -> str:
    if not value.strip():
        raise Faults(f".{name} is empty: give a path")
    try:
        return str(Path(os.path.realpath(folder / home_expanded(value, f".{name}"))))
    except ExciseError as error:
        raise Faults(str(error)) from None
    except (OSError, ValueError) as error:
        raise Faults(f".{name}: {value!r} is no path: {error}") from None
