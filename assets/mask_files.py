"""Masks as both stages of masks keep them: files named by their fingerprint, rows of counts, metadata about them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.checks import Outcome
from assets.measured_paths import PathRows
from assets.metric_checks import mask_density
from assets.stage import Step
from excise.conditions import MASK
from excise.strategies.config import Strategy
from resources.artifacts import Artifacts
from resources.tables import TABLES

if TYPE_CHECKING:
    from excise.interventions.controls import RandomControl
    from excise.interventions.packed import Mask
    from excise.strategies.build import NamedMask


class MaskFiles:
    """Masks as files named by their fingerprint, each written once; counts how many were there already."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.folder = artifacts.tensors("masks")
        self.seen: set[str] = set()
        self.written = 0

    def store(self, mask: "Mask") -> Path:
        """Keep a mask and return its path."""
        path = self.folder / f"{mask.fingerprint}.safetensors"
        self.seen.add(mask.fingerprint)
        if not path.exists():
            mask.save(path)
            self.written += 1
        return path

    def path_of(self, mask: "Mask | RandomControl") -> Path:
        """The path of a mask, which is kept; of a random control, which is no file, that of the mask of its size."""
        from excise.interventions.packed import Mask

        return self.store(mask) if isinstance(mask, Mask) else self.folder / f"{mask.parent}.safetensors"


def mask_rows(
    step: Step, made: Iterable["NamedMask"], strategies: Sequence[Strategy], files: MaskFiles
) -> pl.DataFrame:
    """Keep masks as files, one at a time as they are made; their rows of the table `masks`."""
    from excise.strategies.mask_rows import counted, definition_of

    rows = [
        {
            "asset": step.asset,
            **step.place,
            **row,
            "path": step.artifacts.relative(files.path_of(named.mask)),
            "definition": definition_of(named, strategies, step.audit.seed),
        }
        for named in made
        for row in counted(named)
    ]
    return pl.DataFrame(rows, schema=TABLES["masks"].schema)


def masks_result(
    step: Step,
    rows: pl.DataFrame,
    paths: PathRows,
    files: MaskFiles,
    metadata: dict[str, Any],
    judge: Any = lambda outcome: outcome,
) -> dg.MaterializeResult:
    """Store the rows of masks and of paths, in place of those the asset made before, and tell of them.

    judge: what the asset says of the outcome of the check `mask_density`.
    """
    step.store("mask_paths", paths.frame(), by_asset=True)
    step.store("masks", rows, by_asset=True)
    outcome = judge(mask_density(rows, step.audit.density_floor, step.audit.density_ceiling))
    places = rows.select(*MASK, "mask").unique()
    counts = {
        "masks": places.height,
        "mask_files_written": files.written,
        "mask_files_reused": len(files.seen) - files.written,
    }
    return step.result("masks", {**metadata, **counts}, places, outcomes=[_with_none_found(outcome, paths)])


def _with_none_found(outcome: Outcome, paths: PathRows) -> Outcome:
    """The outcome, with the masks that were looked for in vain: a result, and no fault."""
    lines = [f"{line}." for line in paths.none_found()]
    return replace(outcome, message=" ".join([outcome.message, *lines])) if lines else outcome
