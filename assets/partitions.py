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
from excise.scenarios import Scenario, load_scenarios, prompt_count
from excise.strategies import Strategy, load_strategies
from excise.toxicity import DEFAULT_SCORER, ScorerSpec, load_scorer_registry


@dataclass(frozen=True)
class Catalogue:
    """What can be audited: models, scenarios, strategies and scorers by key, and what is wrong with other files."""

    scenarios: Mapping[str, Scenario]
    models: Mapping[str, ModelSpec]
    strategies: Mapping[str, Strategy]
    scorers: Mapping[str, ScorerSpec]
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
    def all_scenarios(self) -> dg.MultiPartitionMapping:
        """Of the grid onto itself: a partition depends on all scenarios of its model with the same kind of outcome."""
        downstream = {key: self.scenarios_like(key) for key in self.scenarios}
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

    def scenarios_like(self, key: str) -> list[str]:
        """The scenarios with the same kind of outcome, itself among them: those masks can come from."""
        kind = self.scenarios[key].outcome.kind
        return [other for other, scenario in self.scenarios.items() if scenario.outcome.kind == kind]

    def scorer_of(self, scenario: Scenario) -> str:
        """Key of the scorer of a scenario's continuations."""
        return scenario.outcome.scorer or DEFAULT_SCORER

    def chosen_strategies(
        self, keys: Sequence[str] | None, levels: Sequence[str], outcome: str, alphas: Sequence[float] | None = None
    ) -> list[Strategy]:
        """The strategies named, or all enabled ones for that kind of outcome, each at the levels of it that are wanted.

        A name stands for all strategies made of one entry (fasp for fasp-0.10, fasp-0.20). alphas: of strategies that
        prune a share alpha of the heads, those with one of these. Raises ExciseError for a strategy that does not
        exist.
        """
        named = {key: self._strategies_named(key) for key in keys or ()}
        unknown = [key for key, found in named.items() if not found]
        if unknown:
            raise ExciseError(
                f"resources.settings.config.strategies: no strategy {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(self.strategies)}"
            )
        if keys is None:
            chosen = [each for each in self.strategies.values() if each.enabled and outcome in each.outcomes]
        else:
            chosen = list({each.key: each for found in named.values() for each in found}.values())
        if alphas is not None:
            rounded = {round(alpha, 6) for alpha in alphas}
            chosen = [each for each in chosen if round(each.parameters.get("alpha", alphas[0]), 6) in rounded]
        wanted = [tuple(level for level in strategy.levels if level in levels) for strategy in chosen]
        return [
            strategy.model_copy(update={"levels": some}) for strategy, some in zip(chosen, wanted, strict=True) if some
        ]

    def fasp_parameters(self) -> dict[str, dict[str, float]]:
        """Parameters of the strategies by FASP's rule and head impacts, by key."""
        return {key: each.parameters for key, each in self.strategies.items() if each.score == "head_impacts"}

    def gamma_variants(self) -> list[str]:
        """Keys of those of them that are told apart by gamma, the share protected (fasp_gamma-0.40)."""
        return [
            key
            for key, each in self.fasp_parameters().items()
            if key.rpartition("-")[2] == f"{each.get('gamma', 0):.2f}" != f"{each['alpha']:.2f}"
        ]

    def _strategies_named(self, key: str) -> list[Strategy]:
        one = self.strategies.get(key)
        return [one] if one else [each for name, each in self.strategies.items() if name.startswith(f"{key}-")]


def read_catalogue(
    scenario_folders: Sequence[Path],
    model_files: Sequence[Path],
    strategy_files: Sequence[Path],
    scorer_files: Sequence[Path] = (),
) -> Catalogue:
    """Read the built-in files and the user's."""
    found, scenario_problems = load_scenarios(scenario_folders)
    models, model_problems = load_registry(model_files)
    scorers, scorer_problems = load_scorer_registry(scorer_files)
    problems = [problem.message for problem in (*scenario_problems, *model_problems, *scorer_problems)]
    # Numbers first, heaviest first: a backfill then ends with its short runs instead of waiting for one long one.
    order = sorted(
        found.values(), key=lambda scenario: (scenario.outcome.kind != "number", -prompt_count(scenario), scenario.key)
    )
    try:
        strategies = load_strategies(strategy_files)
    except ExciseError as error:
        problems.append(f"{error} (until then only the built-in strategies are used)")
        strategies = load_strategies(())
    return Catalogue(
        scenarios={scenario.key: scenario for scenario in order},
        models=models,
        strategies=strategies,
        scorers=scorers,
        problems=tuple(problems),
    )
