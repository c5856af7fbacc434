"""The definitions Dagster loads, and `build_definitions`, the one seam for tests, the demo and special surroundings.

Users' own scenarios lie in `scenarios/`, models in `models.yaml`, strategies in `strategies.yaml`, scorers of toxicity
in `scorers.yaml`, all beside `workspace.yaml`; results in the folder EXCISE_DATA names, `data` without it. Mistakes in
users' files are logged here.
"""

import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.attribution_scores import attribution_scores_asset
from assets.bias_correlation import bias_correlation_asset
from assets.completions import completions_asset
from assets.cross_context_masks import cross_context_masks_asset
from assets.evaluation_metrics import evaluation_metrics_asset
from assets.grid_search import grid_search_asset
from assets.head_impacts import head_impacts_asset
from assets.mask_distribution import mask_distribution_asset
from assets.mask_overlap import mask_overlap_asset
from assets.partitions import Catalogue, read_catalogue
from assets.prompts import prompts_asset
from assets.pruned_completions import pruned_completions_asset
from assets.pruning_masks import pruning_masks_asset
from assets.quality_report import quality_report_asset
from assets.restoration import restoration_asset
from assets.side_effects import side_effects_asset
from assets.stability import stability_asset
from assets.transfer_matrix import transfer_matrix_asset
from excise.files.registry import Problem
from pipelines.jobs import JOBS
from resources.artifacts import Artifacts
from resources.artifacts import data_folder as default_folder
from resources.gpu import GPUResource
from resources.settings import AuditSettings
from resources.warehouse import Warehouse
from resources.watch import RunWatch

ROOT = Path(__file__).resolve().parents[1]
SCENARIO_FOLDERS = (ROOT / "scenarios",)
MODEL_FILES = (ROOT / "models.yaml",)
STRATEGY_FILES = (ROOT / "strategies.yaml",)
SCORER_FILES = (ROOT / "scorers.yaml",)
FACTORIES = (
    prompts_asset,
    completions_asset,
    attribution_scores_asset,
    head_impacts_asset,
    pruning_masks_asset,
    cross_context_masks_asset,
    pruned_completions_asset,
    side_effects_asset,
    evaluation_metrics_asset,
    restoration_asset,
    stability_asset,
    grid_search_asset,
    mask_overlap_asset,
    mask_distribution_asset,
    transfer_matrix_asset,
    bias_correlation_asset,
    quality_report_asset,
)


def build_definitions(
    *,
    data_folder: Path | str | None = None,
    scenario_folders: Sequence[Path] = SCENARIO_FOLDERS,
    model_files: Sequence[Path] = MODEL_FILES,
    strategy_files: Sequence[Path] = STRATEGY_FILES,
    scorer_files: Sequence[Path] = SCORER_FILES,
    catalogue: Catalogue | None = None,
    resource_overrides: Mapping[str, Any] | None = None,
) -> dg.Definitions:
    """The whole code location. `resource_overrides` replaces resources by name.

    Files that do not exist count as empty. What has a mistake in its file is logged, and fails whoever asks for it.
    catalogue: in place of the files, where they were read before.
    """
    folder = str(data_folder or default_folder())
    if catalogue is None:
        catalogue = read_catalogue(scenario_folders, model_files, strategy_files, scorer_files)
    for problem in catalogue.problems:
        _warn_once(problem)
    resources = {
        "warehouse": Warehouse(folder=folder),
        "artifacts": Artifacts(folder=folder),
        "gpu": GPUResource(folder=folder),
        "settings": AuditSettings(),
        "watch": RunWatch(),
    }
    with warnings.catch_warnings():
        # Partitioned checks and backfill policies are marked as previews; the versions in constraints.txt have both.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        warnings.simplefilter("ignore", dg.BetaWarning)
        assets = [factory(catalogue) for factory in FACTORIES]
    return dg.Definitions(
        assets=assets,
        jobs=list(JOBS),
        resources=resources | dict(resource_overrides or {}),
        # One process per run: the model stays in memory from step to step, and torch is imported once.
        executor=dg.in_process_executor,
    )


@functools.cache
def _warn_once(problem: Problem) -> None:
    logging.getLogger("excise").warning("cannot be used: %s", problem)


def __getattr__(name: str) -> Any:
    """`defs`, made when Dagster asks for it: the commands import this module, too, and read the files themselves."""
    if name != "defs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = build_definitions()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), "defs"})
