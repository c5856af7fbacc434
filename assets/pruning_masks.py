"""The stage `pruning_masks`: which weights every strategy and control prunes.

A mask is a file named by its fingerprint; the table `masks` counts what it prunes in each matrix.
"""

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
        from excise.strategies import build_masks

        from excise.attribution import AttributionFile
        from excise.figures import mask_density_by_layer

        model, scenario = catalogue.partition(context)
        audit = settings.audit_of(scenario)
        completions, _ = completions_of(warehouse, model, scenario.key)
        files = rows_of(warehouse, "attribution_files", model, scenario.key, made_by="attribution_scores")
        if set(files["completions_version"]) != {data_version(completions).value}:
            raise ExciseError(
                f"the attribution scores of {model}|{scenario.key} are those of other completions; materialize "
                "attribution_scores of this partition again"
            )
        attributions = {
            row["variation"]: AttributionFile(
                variation=row["variation"],
                path=artifacts.locate(row["path"], made_by="attribution_scores"),
                sha256=row["sha256"],
                bytes=row["bytes"],
                reused=True,
                seconds=0.0,
                kind=row["kind"],
            )
            for row in files.iter_rows(named=True)
        }
        folder = artifacts.tensors("masks")
        counted, known = [], 0
        with gpu.model(model, catalogue.models, waiting=context.log.info) as loaded:
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            for named in build_masks(
                loaded,
                catalogue.chosen_strategies(audit.strategies),
                attributions,
                levels=audit.levels,
                random_draws=audit.random_draws,
                seed=audit.seed,
                progress=watch.progress(context),
            ):
                path = folder / f"{named.mask.fingerprint}.safetensors"
                if path.exists():
                    known += 1
                else:
                    artifacts.publish(path, named.mask.save)
                counted += _counts(named, model, scenario.key, path.relative_to(artifacts.root).as_posix())
        rows = pl.DataFrame(counted, schema=TABLES["masks"].schema)
        warehouse.replace_partition("masks", rows, {"model": model, "scenario": scenario.key})
        outcome = checks.mask_density(rows, audit.density_floor, audit.density_ceiling)
        checks.record(warehouse, "pruning_masks", model, scenario.key, [outcome])
        masks = rows.select(*checks.MASK, "mask").unique().height
        metadata = table_metadata("masks", rows) | {"masks": masks, "mask_files_reused": known}
        if not rows.is_empty():
            metadata |= picture("mask_density_by_layer", mask_density_by_layer(rows), artifacts, model, scenario.key)
        return dg.MaterializeResult(
            metadata=metadata,
            data_version=data_version(rows.select(*checks.MASK, "mask").unique()),
            check_results=[outcome.result()],
        )

    return pruning_masks


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
