"""The device and the model on it: one at a time per machine, one model in memory per process.

Steps that use a model hold Dagster's pool `gpu`, which binds one instance; the lock here binds every process of the
user on this machine. How a model is loaded and what a device can do is `excise.models.loading`; batches adapt in the
sampler.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from resources.artifacts import data_root
from resources.locks import file_lock
from resources.watch import Stage

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel
    from excise.models.specs import ModelSpec

# The model this process loaded last: (what it was asked for, the model). Steps of one run share a process.
_in_memory: tuple[tuple, LoadedModel] | None = None


class GPUResource(dg.ConfigurableResource):
    """Lends a loaded model on the best device there is: CUDA, Metal, or the CPU."""

    folder: str = Field(description="Folder of all results, for converted models; EXCISE_DATA sets it.")
    device: str = Field(default="auto", description="auto, cuda (as many cards as a model needs), cuda:1, mps or cpu")
    dtype: str = Field(default="auto", description="auto, float32, bfloat16 or float16")
    lock_folder: str = Field(
        default_factory=tempfile.gettempdir, description="Where processes on this machine queue for the device."
    )

    @contextmanager
    def model(
        self, key: str, registry: Mapping[str, ModelSpec], *, stage: Stage | None = None
    ) -> Iterator[LoadedModel]:
        """The model `key` of the registry, in memory and on the device, which is ours for the length of the block.

        `stage` is told while another process has the device, and where a model is larger than the cards; others who
        wait are told of it.
        Raises ExciseError, saying what is missing and the mend, where the model cannot be had.
        """
        from excise.models.placement import pick_device

        spec = registry[key]
        device = pick_device(self.device)
        lock = Path(self.lock_folder).expanduser() / f"excise-{os.getuid()}-{device.type}{device.index or ''}.lock"
        mend = "set lock_folder of the resource gpu to a folder you may write to"
        work, tell = (stage.work, stage.tell) if stage else ("", None)
        with file_lock(lock, what=f"the device {device}", work=work, mend=mend, waiting=tell):
            loaded = self._load(spec, registry)
            if len(loaded.devices) > 1 and "cpu" in loaded.devices and tell:
                tell(f"{key} is larger than the cards: layers that stay in main memory make every pass slow")
            _forget_peak(loaded)
            yield loaded

    def report(self, loaded: LoadedModel) -> dict[str, str | int]:
        """Metadata: device, dtype, and the peak of memory (on a device since the block began, else of the process)."""
        from excise.generation.completions import peak_memory

        return {
            "model_fingerprint": loaded.fingerprint,
            "device": ", ".join(loaded.devices),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "peak_memory_mb": round(peak_memory(loaded.devices) / 2**20),
        }

    def _load(self, spec: ModelSpec, registry: Mapping[str, ModelSpec]) -> LoadedModel:
        global _in_memory
        from excise.models.loading import load_model
        from excise.models.specs import state_of

        asked = (state_of(spec, registry), self.device, self.dtype)
        if _in_memory is not None and _in_memory[0] == asked:
            return _in_memory[1]
        _evict()
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        home = data_root(self.folder) / "models"
        loaded = load_model(spec, registry, device=self.device, dtype=self.dtype, home=home)
        _in_memory = (asked, loaded)
        return loaded


def _evict() -> None:
    """Give the memory of the former model back before the next one is loaded."""
    global _in_memory
    if _in_memory is None:
        return
    _in_memory = None
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forget_peak(loaded: LoadedModel) -> None:
    import torch

    for device in loaded.devices:
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
