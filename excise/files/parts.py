"""Unfinished scores on disk, so that a killed run goes on where it was.

A long computation says what it has after every batch (`keep`) and after every block of layers (`finish`); the next run
asks for both. States of a few megabytes are written every time. Larger ones, such as the gradients of a block of
layers, are written as often as writing takes a small share of the time. What is computed is decided elsewhere.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from excise.files.tensors import load_tensors, save_tensors
from excise.progress import Progress, silent

if TYPE_CHECKING:
    import torch

PARTS = ".parts"
"""Suffix of the folder that holds what there is of a file while it is made, beside it."""
SHARE = 0.05
"""Of the time, what writing states may take."""
BYTES_PER_SECOND = 5e8
"""A disk's speed, by which the time of writing is told beforehand."""


class Parts:
    """The parts of one file that is being made, in a folder beside it. Without a folder nothing is kept.

    Every file appears under its name only when it is whole, so several processes may work at the same parts: they
    compute the same numbers.
    """

    def __init__(self, folder: Path | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self._clock = clock
        self._kept_at = clock()

    def begun(self, part: str) -> tuple[int, dict[str, np.ndarray]]:
        """How many units of a part are done, and its state after them; 0 and nothing where it has not been kept."""
        self._kept_at = self._clock()
        tensors = self._read(f"{part}.begun")
        return (0, {}) if tensors is None else (tensors.pop("done").item(), tensors)

    def keep(self, part: str, done: int, state: Mapping[str, torch.Tensor]) -> None:
        """Note the state of a part after `done` of its units, unless it was noted a moment ago for its size."""
        if self.folder is None:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if self._clock() - self._kept_at < size / BYTES_PER_SECOND / SHARE:
            return
        tensors = {name: tensor.cpu().numpy() for name, tensor in state.items()}
        save_tensors(_file(self.folder, f"{part}.begun"), tensors | {"done": np.array(done)})
        self._kept_at = self._clock()

    def finished(self, part: str) -> dict[str, np.ndarray] | None:
        """What a part has come to; None where it is not finished."""
        return self._read(part)

    def finish(self, part: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Keep what a part has come to; its state goes."""
        if self.folder is None:
            return
        save_tensors(_file(self.folder, part), tensors)
        _file(self.folder, f"{part}.begun").unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all parts: the file they were for is there."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # another process may be at the same, and is done as well

    def _read(self, name: str) -> dict[str, np.ndarray] | None:
        if self.folder is None:
            return None
        try:
            return load_tensors(_file(self.folder, name))
        except FileNotFoundError:
            return None


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


@dataclass(frozen=True)
class Work:
    """A long computation as its caller sees it: what it is called, who is told how far it is, where unfinished work is
    kept to go on from, and how it is cut into passes.

    batch: prompts or answers of a pass; layers_at_once: layers whose gradients are held together. Neither changes a
    result but by rounding; None takes what the computation finds best.
    """

    label: str = ""
    progress: Progress = silent
    parts: Parts = field(default_factory=Parts)
    batch: int | None = None
    layers_at_once: int | None = None

    def report(self, done: int, total: int) -> None:
        """Tell the watcher that `done` of `total` units are finished."""
        self.progress(self.label, done, total)
