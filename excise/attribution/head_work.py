"""Model work of head impacts: log probabilities of answers, and losses of windows, without each head, in files.

A file is addressed by what decides its numbers, so a killed run goes on where it was, and other groups, outcomes or
resamples compute nothing anew. What the numbers say is `excise.attribution.head_impacts`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.files.tensors import load_tensors, save_tensors
from excise.models.encoding import encode
from excise.progress import Progress, silent

if TYPE_CHECKING:
    from excise.attribution.readers import Part
    from excise.evaluation.perplexity import Window
    from excise.generation.sampling import SamplingParameters
    from excise.models.loading import LoadedModel

ABLATION = "zero_output"
VERSION = 1
"""Part of every file's address: raise it when the same work gives other numbers."""


@dataclass
class Store:
    """Arrays by address and name: safetensors files that appear only when whole, or this process' memory."""

    folder: Path | None
    memory: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def has(self, address: str, name: str) -> bool:
        if self.folder is None:
            return (address, name) in self.memory
        return self._path(self.folder, address, name).is_file()

    def read(self, address: str, name: str) -> np.ndarray:
        if self.folder is None:
            return self.memory[address, name]
        return load_tensors(self._path(self.folder, address, name))["numbers"]

    def write(self, address: str, name: str, numbers: np.ndarray) -> None:
        if self.folder is None:
            self.memory[address, name] = numbers
            return
        save_tensors(self._path(self.folder, address, name), {"numbers": numbers})

    @staticmethod
    def _path(folder: Path, address: str, name: str) -> Path:
        return folder / address / f"{name}.safetensors"


@dataclass(frozen=True)
class HeadWork:
    """A model, the heads that are taken out one at a time, where their numbers are kept, and who hears of progress."""

    loaded: LoadedModel
    heads: Sequence[tuple[int, int]]
    store: Store
    progress: Progress = silent

    def log_weights(
        self, prompts: pl.DataFrame, completions: pl.DataFrame, parameters: SamplingParameters
    ) -> Callable[[int, int], np.ndarray]:
        """log(p_without / p) of every completion, float64 [N], by layer and head; -inf where p_without is 0."""
        from excise.attribution.readers import answer_parts

        asked = prompts.unique("prompt_id", maintain_order=True).join(
            completions.select("prompt_id").unique(), on="prompt_id", how="semi"
        )
        tokens = {prompt.prompt_id: tuple(prompt.tokens) for prompt in encode(self.loaded, asked)}
        number: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        which = np.array(
            [
                number.setdefault((tokens[prompt], tuple(answer)), len(number))
                for prompt, answer in completions.select("prompt_id", "token_ids").iter_rows()
            ],
            dtype=np.int64,
        )
        answers = list(number)
        settings = [parameters.temperature, parameters.top_k, parameters.top_p]
        parts = answer_parts(self.loaded, answers, parameters)
        addresses = [self._address("answers", settings, [answers[index] for index in part.members]) for part in parts]
        of_head = self._done(parts, addresses, "head impacts: answers")
        unpruned = of_head(None, None)
        return lambda layer, head: (of_head(layer, head) - unpruned)[which]

    def window_losses(self, windows: Sequence[Window]) -> Callable[[int | None, int | None], np.ndarray]:
        """Summed losses of windows, float64 [windows], by layer and head; (None, None): of the whole model."""
        from excise.attribution.readers import window_parts

        parts = window_parts(self.loaded, windows)
        addresses = [
            self._address("windows", [(list(windows[index].tokens), windows[index].scored) for index in part.members])
            for part in parts
        ]
        return self._done(parts, addresses, "head impacts: perplexity")

    def _address(self, kind: str, *content: object) -> str:
        text = json.dumps([kind, self.loaded.fingerprint, ABLATION, VERSION, content])
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"

    def _done(
        self, parts: Sequence[Part], addresses: Sequence[str], label: str
    ) -> Callable[[int | None, int | None], np.ndarray]:
        """Do the work of all parts that is not in the store yet; returns a reader of its numbers, by layer and head."""
        from excise.attribution.continuation import every_head

        lacking = [[head for head in self.heads if not self.store.has(address, _name(*head))] for address in addresses]
        done = len(self.heads) * len(parts) - sum(map(len, lacking))
        self.progress(label, done // len(parts), len(self.heads))

        def on_heads(count: int) -> None:
            nonlocal done
            done += count
            self.progress(label, done // len(parts), len(self.heads))

        for part, address, missing in zip(parts, addresses, lacking, strict=True):
            unpruned = not self.store.has(address, _name(None, None))
            if not missing and not unpruned:
                continue
            by_layer: dict[int, list[int]] = {}
            for layer, head in missing:
                by_layer.setdefault(layer, []).append(head)
            keep = partial(self._keep, address)
            every_head(self.loaded, part.chunks, part.read, by_layer, unpruned=unpruned, on_heads=on_heads, keep=keep)

        def numbers(layer: int | None, head: int | None) -> np.ndarray:
            together = np.full(sum(len(part.members) for part in parts), np.nan)
            for part, address in zip(parts, addresses, strict=True):
                together[part.members] = self.store.read(address, _name(layer, head))
            return together

        return numbers

    def _keep(self, address: str, layer: int | None, head: int | None, numbers: np.ndarray) -> None:
        self.store.write(address, _name(layer, head), numbers)


def _name(layer: int | None, head: int | None) -> str:
    return "unpruned" if layer is None else f"{layer}.{head}"
