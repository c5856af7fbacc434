"""The kinds of interventions by name, and reading one from a file whatever its kind.

A kind is a module of this room that offers its class as `KIND`, or a class that an installed package names in its entry
points `excise.interventions`; adding one is adding that module.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import excise.interventions
from excise.errors import ExciseError
from excise.extensions import with_extensions
from excise.interventions.controls import RandomControl
from excise.interventions.heads import head_keys
from excise.interventions.packed import Mask, file_metadata
from excise.interventions.protocol import StoredIntervention

GROUP = "excise.interventions"


def kinds() -> dict[str, type[StoredIntervention]]:
    """The kinds of this room's modules and of installed packages, by name."""
    return cast("dict[str, type[StoredIntervention]]", with_extensions(GROUP, type, _built_in(), _name_of))


def _name_of(kind: type) -> str:
    return cast("type[StoredIntervention]", kind).kind


def _built_in() -> Iterator[type]:
    for module in pkgutil.iter_modules(excise.interventions.__path__, f"{GROUP}."):
        kind = getattr(importlib.import_module(module.name), "KIND", None)
        if kind is not None:
            yield kind


def load(path: Path | str) -> StoredIntervention:
    """Read what some kind's `save` has written.

    Raises ExciseError where the file is absent, damaged or of a kind that is not known.
    """
    metadata, known = file_metadata(path), kinds()
    # Files of masks are older than kinds and name none: the roles of their matrices tell.
    of_masks = "heads" if head_keys(json.loads(metadata.get("shapes", "{}"))) else "weights"
    kind = metadata.get("kind", of_masks)
    if kind not in known:
        raise ExciseError(
            f"{path}: holds an intervention of kind {kind!r}, which is not known; known are {', '.join(known)}"
        )
    return known[kind].load(path)


def load_mask(path: Path | str) -> Mask:
    """Read a mask, of weights or of heads. Raises ExciseError as `load` does, and where the file holds no mask."""
    mask = load(path)
    if not isinstance(mask, Mask):
        raise ExciseError(f"{path}: holds an intervention of kind {mask.kind!r}, not a mask; name the file of a mask")
    return mask


def recalled(path: Path | str, control_seed: int | None, fingerprint: str) -> Mask | RandomControl:
    """A mask that is known by its fingerprint: what lies in the file or, with a seed, the random control of its size.

    Raises ExciseError as `load_mask` does; a control that is not what it was says so where it is made.
    """
    mask = load_mask(path)
    return mask if control_seed is None else mask.control(control_seed, fingerprint)
