"""What the stages of masks need to follow measured paths: the names asked, the budgets, and the table of the paths.

A path asks the model itself, about the names that masks are made of; both stages of masks do, and so does `stability`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import polars as pl

from assets.stage import Step
from assets.upstream import completions_of, require_same_model
from excise.scenarios.subsets import EVALUATION, without
from resources.artifacts import Artifacts
from resources.tables import TABLES

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel
    from excise.strategies.build import Paths


class PathRows:
    """Rows of the table `mask_paths` of one asset and partition, as paths come up."""

    def __init__(self, step: Step) -> None:
        self.artifacts: Artifacts = step.artifacts
        self.place = {"asset": step.asset, **step.place}
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


def learned_of(step: Step, loaded: "LoadedModel") -> Callable[[str], tuple[pl.DataFrame, pl.DataFrame]]:
    """A function from a scenario's key to the completions of the names that masks are made of, and their prompts."""

    def learned(key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        completions, prompts = completions_of(step.warehouse, step.model, key)
        require_same_model(completions, loaded, key)
        return without(EVALUATION, completions, prompts)

    return learned


def paths_of(
    step: Step,
    loaded: "LoadedModel",
    note: Callable[[str, str, str, Any], None],
    learned: Callable[[str], tuple[pl.DataFrame, pl.DataFrame]],
    seed: int,
) -> "Paths":
    """How measured paths of the step's model are followed under its settings. note: is called with every path."""
    from excise.generation.completions import CompletionCache
    from excise.strategies.build import Paths
    from excise.strategies.measured_path import Budgets
    from excise.strategies.path_questions import questions

    audit, answers = step.audit, CompletionCache(step.artifacts.completion_cache)
    asked = questions(loaded, step.catalogue.scenarios, learned, seed=seed, answers=answers)
    budgets = Budgets(spread=audit.spread_floor, commonest=audit.commonest_budget, change=audit.change_budget)
    return Paths(loaded, asked, budgets, seed, step.artifacts.tensors("paths"), note, step.progress)
