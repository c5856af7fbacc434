"""The one home of partition keys: which models, scenarios and strategies there are, read from their files.

A scenario or model with a mistake in its file is left out and named in `problems`; the others keep working.
Keys of the grid read `model|scenario`, the order Dagster gives its dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from excise.errors import ExciseError
from excise.models import ModelSpec, load_registry
from excise.scenarios import Scenario, load_scenarios
from excise.strategies import Strategy, load_strategies


@dataclass(frozen=True)
class Catalogue:
    """What can be audited: models, scenarios and strategies by key, and what is wrong with the files of the rest."""

    scenarios: Mapping[str, Scenario]
    models: Mapping[str, ModelSpec]
    strategies: Mapping[str, Strategy]
    problems: tuple[str, ...]

    @property
    def scenario_partitions(self) -> dg.StaticPartitionsDefinition:
        return dg.StaticPartitionsDefinition(list(self.scenarios))

    @property
    def grid(self) -> dg.MultiPartitionsDefinition:
        """Models x scenarios."""
        return dg.MultiPartitionsDefinition({"model": self.model_partitions, "scenario": self.scenario_partitions})

    @property
    def model_partitions(self) -> dg.StaticPartitionsDefinition:
        return dg.StaticPartitionsDefinition(list(self.models))

    @property
    def other_scenarios(self) -> dg.MultiPartitionMapping:
        """Of the grid onto itself: a partition depends on all other scenarios of its model."""
        downstream = {key: [other for other in self.scenarios if other != key] for key in self.scenarios}
        return dg.MultiPartitionMapping(
            {
                "model": dg.DimensionPartitionMapping("model", dg.IdentityPartitionMapping()),
                "scenario": dg.DimensionPartitionMapping("scenario", dg.StaticPartitionMapping(downstream)),
            }
        )

    def partition(self, context: dg.AssetExecutionContext) -> tuple[str, Scenario]:
        """Model key and scenario of a step of the grid."""
        # A run launched with the tag of the whole key alone brings plain text instead of a key by dimensions.
        keys = self.grid.get_partition_key_from_str(str(context.partition_key)).keys_by_dimension
        return keys["model"], self.scenario(keys["scenario"])

    def scenario(self, key: str) -> Scenario:
        """The scenario of a partition; ExciseError when its file is gone or broken by now."""
        if key not in self.scenarios:
            known = "; ".join(self.problems) or f"there are {', '.join(self.scenarios)}"
            raise ExciseError(f"scenario {key}: no usable file of that name ({known})")
        return self.scenarios[key]

    def chosen_strategies(self, keys: Sequence[str] | None, levels: Sequence[str]) -> list[Strategy]:
        """The strategies named, or all enabled ones, each at those of its levels that are wanted.

        Raises ExciseError for a strategy that does not exist.
        """
        unknown = [key for key in keys or () if key not in self.strategies]
        if unknown:
            raise ExciseError(
                f"resources.settings.config.strategies: no strategy {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(self.strategies)}"
            )
        if keys is None:
            chosen = [strategy for strategy in self.strategies.values() if strategy.enabled]
        else:
            chosen = [self.strategies[key] for key in dict.fromkeys(keys)]
        wanted = [tuple(level for level in strategy.levels if level in levels) for strategy in chosen]
        return [
            strategy.model_copy(update={"levels": some}) for strategy, some in zip(chosen, wanted, strict=True) if some
        ]


def read_catalogue(
    scenario_folders: Sequence[Path], model_files: Sequence[Path], strategy_files: Sequence[Path]
) -> Catalogue:
    """Read the built-in files and the user's."""
    found, scenario_problems = load_scenarios(scenario_folders)
    models, model_problems = load_registry(model_files)
    problems = [problem.message for problem in (*scenario_problems, *model_problems)]
    # Heaviest first: a backfill then ends with its short runs instead of waiting for one long one.
    numeric = [scenario for scenario in found.values() if scenario.outcome.kind == "number"]
    numeric.sort(key=lambda scenario: (-_prompts(scenario), scenario.key))
    problems += [
        f"scenario {scenario.key}: outcome.kind {scenario.outcome.kind} is not audited yet, only number is"
        for scenario in found.values()
        if scenario.outcome.kind != "number"
    ]
    try:
        strategies = load_strategies(strategy_files)
    except ExciseError as error:
        problems.append(f"{error} (until then only the built-in strategies are used)")
        strategies = load_strategies(())
    return Catalogue(
        scenarios={scenario.key: scenario for scenario in numeric},
        models=models,
        strategies=strategies,
        problems=tuple(problems),
    )


def _prompts(scenario: Scenario) -> int:
    subjects = sum(len(group.subjects) for group in scenario.groups.values())
    return subjects * sum(len(scenario.templates_of(variation)) for variation in scenario.variations)
