"""What the stages of masks need to follow measured paths: the names asked, the budgets, and the table of the paths.

A path asks the model itself, about the names that masks are made of; both stages of masks do.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import polars as pl

from assets.completions import completions_of, require_same_model, without
from assets.partitions import Catalogue
from excise.scenarios import Scenario
from excise.scenarios.subsets import EVALUATION
from resources.artifacts import Artifacts
from resources.settings import Audit
from resources.tables import TABLES
from resources.warehouse import Warehouse

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel
    from excise.strategies.build import Paths


class PathRows:
    """Rows of the table `mask_paths` of one asset and partition, as paths come up."""

    def __init__(self, artifacts: Artifacts, asset: str, model: str, scenario: str) -> None:
        self.artifacts = artifacts
        self.place = {"asset": asset, "model": model, "scenario": scenario}
        self.rows: list[dict[str, Any]] = []

    def note(self, strategy: str, level: str, variation: str, path: Any) -> None:
        """Keep every measured place of a path, by variation it was measured on."""
        for step in path.steps:
            for place, now in step.measured.items():
                self.rows.append(
                    self.place
                    | {"strategy": strategy, "level": level, "variation": variation, "step": step.step}
                    | {"pruned": step.pruned, "measured_on": place, "closed": step.closed, "within": step.within}
                    | {name: getattr(now, name) for name in now.FIELDS}
                    | {"distance": step.distance, "taken": step.step == path.taken, "reason": path.reason or None}
                    | {"path": self.artifacts.relative(path.file)}
                )

    def frame(self) -> pl.DataFrame:
        """The rows; nothing is NaN."""
        rows = pl.DataFrame(self.rows, schema=TABLES["mask_paths"].schema)
        return rows.with_columns(pl.col(pl.Float64).fill_nan(None))

    def none_found(self) -> list[str]:
        """A line for every mask that was looked for in vain, and why."""
        lines = {
            (row["strategy"], row["level"], row["variation"]): row["reason"]
            for row in self.rows
            if row["reason"] is not None
        }
        return [
            f"{strategy}, {level.replace('_', '-')}{f', {variation}' if variation else ''}: none, as {reason}"
            for (strategy, level, variation), reason in lines.items()
        ]


def paths_of(
    warehouse: Warehouse,
    artifacts: Artifacts,
    catalogue: Catalogue,
    loaded: "LoadedModel",
    audit: Audit,
    note: Callable[[str, str, str, Any], None],
    progress: Callable[[str, int, int], None],
    relabelled: Callable[[pl.DataFrame, pl.DataFrame, Scenario], pl.DataFrame] | None = None,
) -> "Paths":
    """How measured paths of one model are followed under the settings of an audit.

    relabelled: completions, their prompts and their scenario -> the completions with another split of the names.
    """
    from excise.attribution import Answered
    from excise.attribution.gap_free import ask
    from excise.generation.completions import CompletionCache
    from excise.strategies.build import Paths
    from excise.strategies.measured_path import Budgets

    answers = CompletionCache(artifacts.completion_cache)

    @cache
    def learned(key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        completions, prompts = completions_of(warehouse, loaded.key, key)
        require_same_model(completions, loaded.fingerprint, loaded.key, key)
        if relabelled is not None:
            completions = relabelled(completions, prompts, catalogue.scenarios[key])
        return without(EVALUATION, completions, prompts)

    @cache
    def asked(key: str, variation: str, significance: float):
        completions, prompts = learned(key)
        scenario = catalogue.scenarios[key]
        rows, compared = completions.filter(variation=variation), (scenario.comparison, scenario.outcome)
        answered = Answered(loaded, prompts, rows, *compared, seed=audit.seed, cache=answers)
        return ask(answered, place=f"{key}/{variation}", significance=significance)

    budgets = Budgets(spread=audit.spread_floor, commonest=audit.commonest_budget, change=audit.change_budget)
    folder = artifacts.tensors("paths")
    return Paths(loaded, asked, budgets, audit.seed, folder, note, progress)
