"""The stage `pruning_masks`: which weights every strategy and control prunes.

A mask is a file named by its fingerprint; the table `masks` counts what it prunes in each matrix.
"""

from pathlib import Path

import dagster as dg
import polars as pl

from assets import checks
from assets.completions import completions_of, require_same_model
from assets.partitions import Catalogue
from assets.stage import data_version, grid_asset, picture, rows_of, table_metadata
from excise.errors import ExciseError
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch


def pruning_masks_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Builds the masks of all chosen strategies, levels and controls."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "safetensors"},
        description="The weights every strategy would prune, prompt-specific and within the context, and the controls "
        "that prune as many weights without knowing about groups.",
        deps=["attribution_scores"],
        checks=[checks.spec("mask_density", "pruning_masks", catalogue)],
        uses_model=True,
    )
    def pruning_masks(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.figures import mask_density_by_layer
        from excise.strategies import build_masks

        model, scenario = catalogue.partition(context)
        audit = settings.audit_of(scenario)
        completions, _ = completions_of(warehouse, model, scenario.key)
        stored = rows_of(warehouse, "attribution_files", model, scenario.key, made_by="attribution_scores")
        strategies = catalogue.chosen_strategies(audit.strategies, audit.levels)
        _require_scores(stored, {strategy.score for strategy in strategies}, completions, f"{model}|{scenario.key}")
        files = MaskFiles(artifacts)
        with gpu.model(model, catalogue.models, waiting=context.log.info) as loaded:
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            counted = [
                row
                for named in build_masks(
                    loaded,
                    strategies,
                    _attribution_files(stored, artifacts),
                    random_draws=audit.random_draws,
                    permutations=min(audit.relabellings, stored["relabellings"].min()),
                    seed=audit.seed,
                    store=files.store,
                    progress=watch.progress(context),
                )
                for row in _counts(named, model, scenario.key, artifacts.relative(files.store(named.mask)))
            ]
        rows = pl.DataFrame(counted, schema=TABLES["masks"].schema)
        warehouse.replace_partition("masks", rows, {"model": model, "scenario": scenario.key})
        outcome = checks.mask_density(rows, audit.density_floor, audit.density_ceiling)
        checks.record(warehouse, "pruning_masks", model, scenario.key, [outcome])
        masks = rows.select(*checks.MASK, "mask").unique().height
        metadata = table_metadata("masks", rows) | {
            "masks": masks,
            "mask_files_written": files.written,
            "mask_files_reused": len(files.seen) - files.written,
        }
        if not rows.is_empty():
            figure = mask_density_by_layer(rows)
            metadata = picture("mask_density_by_layer", figure, artifacts, model, scenario.key) | metadata
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(rows.select(*checks.MASK, "mask").unique()),
            check_results=[outcome.result()],
        )

    return pruning_masks


class MaskFiles:
    """Masks as files named by their fingerprint, each written once; counts how many were there already."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.artifacts = artifacts
        self.folder = artifacts.tensors("masks")
        self.seen: set[str] = set()
        self.written = 0

    def store(self, mask) -> Path:
        """Keep a mask and return its path."""
        path = self.folder / f"{mask.fingerprint}.safetensors"
        self.seen.add(mask.fingerprint)
        if not path.exists():
            self.artifacts.publish(path, mask.save)
            self.written += 1
        return path


def _require_scores(stored: pl.DataFrame, scores: set[str], completions: pl.DataFrame, partition: str) -> None:
    if set(stored["completions_version"]) != {data_version(completions).value}:
        raise ExciseError(
            f"the attribution scores of {partition} are those of other completions; materialize attribution_scores of "
            "this partition again"
        )
    if lacking := scores - set(stored["score"]):
        raise ExciseError(
            f"the attribution scores of {partition} lack {', '.join(sorted(lacking))}, which a strategy needs; "
            "materialize attribution_scores of this partition again"
        )


def _attribution_files(stored: pl.DataFrame, artifacts: Artifacts) -> list:
    from excise.attribution import AttributionFile

    return [
        AttributionFile(
            variation=row["variation"],
            score=row["score"],
            path=artifacts.locate(row["path"], made_by="attribution_scores"),
            bytes=row["bytes"],
            reused=True,
            seconds=0.0,
        )
        for row in stored.iter_rows(named=True)
    ]


def _counts(named, model: str, scenario: str, path: str) -> list[dict]:
    """One row per matrix of a mask."""
    rows = []
    for key, pruned in named.mask.counts().items():
        layer, role = key.split(".")
        out_features, in_features = named.mask.shapes[key]
        rows.append(
            {
                "model": model,
                "scenario": scenario,
                "variation": named.variation,
                "strategy": named.strategy,
                "level": named.level,
                "matched_to": named.matched_to,
                "draw": named.draw,
                "mask": named.mask.fingerprint,
                "layer": int(layer),
                "role": role,
                "pruned": pruned,
                "size": out_features * in_features,
                "path": path,
            }
        )
    return rows
