"""Files of tensors that appear under their names only when they are whole.

Here is how safetensors are written, so that no reader meets half a file and a full disk is said in plain words. What is
in them is decided where it is computed; masks have a format of their own in `excise.interventions.packed`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from excise.errors import ExciseError

NO_ROOM = "free space on its disk, or set EXCISE_DATA to a folder you may write to"
"""What to do where a file cannot be written."""


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, in full or not at all; folders are made where they lack.

    Raises ExciseError, naming the file, where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    whole = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        # Another process that has finished the same work may remove the folder of its parts at any moment.
        for tries_left in (2, 1, 0):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(whole, partial, metadata=dict(metadata or {}) or None)
                os.replace(partial, path)
                return
            except (FileNotFoundError, SafetensorError):
                if path.parent.is_dir() or not tries_left:
                    raise
    except (OSError, SafetensorError) as error:
        raise ExciseError(f"{path}: cannot be written ({error}); {NO_ROOM}") from error
    finally:
        with suppress(OSError):  # it has its name by now, or there never was a folder for it
            partial.unlink()


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors that `save_tensors` has written; raises as `load_with_metadata`."""
    return load_with_metadata(path)[0]


def load_with_metadata(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read what `save_tensors` has written, tensors and metadata. Raises FileNotFoundError where there is no file.

    Raises ExciseError, saying whether the file is out of reach or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ExciseError(f"{path}: cannot be read ({error}); mend its permissions or the disk") from error
    except SafetensorError as error:
        raise ExciseError(
            f"{path}: is damaged ({error}); delete this file, and what was in it is made again"
        ) from error
