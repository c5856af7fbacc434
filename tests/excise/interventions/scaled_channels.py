"""A kind of intervention from outside: MLP channels times a factor. Its tests are in `test_interventions`."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch

from excise.errors import ExciseError
from excise.files.tensors import load_with_metadata, save_tensors
from excise.models.loading import LoadedModel


@dataclass(frozen=True)
class ScaledChannels:
    """MLP channels, bool [layers, channels], whose part in the output of their layer is multiplied by a factor."""

    kind: ClassVar[str] = "channels"
    unit: ClassVar[str] = "channels"
    folded_as: ClassVar[str] = "columns of down, scaled"
    chosen: np.ndarray
    factor: float

    @property
    def count(self) -> int:
        return int(self.chosen.sum())

    @property
    def fingerprint(self) -> str:
        told = json.dumps([self.kind, self.factor, self.chosen.shape]).encode()
        return hashlib.sha256(told + np.packbits(self.chosen).tobytes()).hexdigest()[:16]

    @contextmanager
    def applied(self, loaded: LoadedModel) -> Iterator[LoadedModel]:
        kept = [(columns, weight[:, columns].clone()) for weight, columns in self._places(loaded)]
        try:
            self.fold(loaded)
            yield loaded
        finally:
            for (weight, _), (columns, values) in zip(self._places(loaded), kept, strict=True):
                weight[:, columns] = values

    def fold(self, loaded: LoadedModel) -> None:
        for weight, columns in self._places(loaded):
            weight[:, columns] *= self.factor

    def _places(self, loaded: LoadedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
        downs = [linear for linear in loaded.topology.linears if linear.role == "down"]
        if self.chosen.shape != (len(downs), downs[0].in_features):
            raise ExciseError("the channels are of another model")
        return [(down.weight(loaded.model), torch.from_numpy(self.chosen[down.layer])) for down in downs]

    def control(self, seed: int, known: str | None = None) -> "ScaledChannels":
        return replace(self, chosen=np.random.default_rng(seed).permuted(self.chosen, axis=1))

    def save(self, path: Path | str) -> None:
        save_tensors(Path(path), {"chosen": self.chosen}, {"kind": self.kind, "factor": json.dumps(self.factor)})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        tensors, metadata = load_with_metadata(Path(path))
        return cls(tensors["chosen"], json.loads(metadata["factor"]))
