"""The one home of partition keys: which models, scenarios and strategies there are, read from their files.

What has a mistake in its file is named in `problems`, and the others keep working. A model or scenario with a mistake
is a partition as long as its key may be one: a run of it fails and names the mistake.
Keys of the grid read `model|scenario`, the order Dagster gives its dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import dagster as dg

from excise.conditions import LEVELS as ALL_LEVELS
from excise.errors import ExciseError
from excise.files.registry import Problem, Registry
from excise.models.specs import ModelSpec, load_registry
from excise.outcomes.scorers import ScorerSpec, load_scorer_registry
from excise.scenarios import Scenario, load_scenarios, prompt_count
from excise.strategies.config import Strategy, load_strategies, value_in_name
from resources.settings import Audit, AuditSettings


@dataclass(frozen=True)
class Catalogue:
    """What can be audited: models, scenarios, strategies and scorers by key, and what is wrong with other files."""

    scenarios: Registry[Scenario]
    models: Registry[ModelSpec]
    strategies: Registry[Strategy]
    scorers: Registry[ScorerSpec]
    problems: tuple[Problem, ...]

    @property
    def scenario_partitions(self) -> dg.StaticPartitionsDefinition:
        return dg.StaticPartitionsDefinition(list(self.scenarios.known))

    @property
    def grid(self) -> dg.MultiPartitionsDefinition:
        """Models x scenarios."""
        return dg.MultiPartitionsDefinition({"model": self.model_partitions, "scenario": self.scenario_partitions})

    @property
    def model_partitions(self) -> dg.StaticPartitionsDefinition:
        return dg.StaticPartitionsDefinition(list(self.models.known))

    @property
    def all_scenarios(self) -> dg.MultiPartitionMapping:
        """Of the grid onto itself: a partition depends on all scenarios of its model with the same kind of outcome."""
        downstream = {key: self.scenarios_like(key) if key in self.scenarios else [key] for key in self.scenarios.known}
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
        """The scenario of a partition. Raises ExciseError when its file is missing or broken."""
        return self.scenarios[key]

    def audit_of(self, settings: AuditSettings, scenario: Scenario) -> Audit:
        """The settings for a scenario, with the strategies they name.

        Every stage asks for them here, so that a mistake ends a run before its first pass of the model. Raises
        ExciseError naming the setting.
        """
        audit = settings.audit_of(scenario)
        for key in audit.side_effect_scenarios or ():
            if key in self.scenarios.broken:
                raise ExciseError(f"resources.settings.config.side_effect_scenarios: {self.scenarios.why_not(key)}")
        others = settings.side_effects_on(scenario, list(self.scenarios.values()))
        audit = replace(audit, side_effect_scenarios=others)
        usual, where = scenario.outcome.audited_as, "resources.settings.config"
        chosen = self.chosen_strategies(audit.strategies, audit.levels, usual, audit.alphas)
        everywhere = self.chosen_strategies(audit.strategies, ALL_LEVELS, usual)
        if settings.alphas is not None:
            there = {
                round(strategy.parameters["alpha"], 6) for strategy in everywhere if "alpha" in strategy.parameters
            }
            if lacking := [alpha for alpha in settings.alphas if round(alpha, 6) not in there]:
                raise ExciseError(
                    f"{where}.alphas: no chosen strategy prunes {', '.join(map(str, lacking))} of the heads; there are "
                    f"{', '.join(map(str, sorted(there))) or 'none: leave alphas out, or name strategies of heads'}"
                )
        elif audit.alphas is not None:
            self._require_alphas_of_preset(everywhere, audit.alphas)
        if everywhere and not chosen:
            levels = dict.fromkeys(level for strategy in everywhere for level in strategy.levels)
            named = audit.strategies or [strategy.key for strategy in everywhere]
            raise ExciseError(
                f"{where}.levels: none of the strategies {', '.join(named)} has one of the "
                f"levels {', '.join(audit.levels)}; they have {', '.join(levels)}"
            )
        return audit

    def _require_alphas_of_preset(self, strategies: Sequence[Strategy], alphas: Sequence[float]) -> None:
        """Raise ExciseError where the shares a preset takes leave nothing of an entry with other shares."""
        families: dict[str, set[float]] = {}
        for strategy in strategies:
            if "alpha" in strategy.parameters:
                families.setdefault(strategy.key.partition("-")[0], set()).add(round(strategy.parameters["alpha"], 6))
        for key, there in families.items():
            if not there & {round(alpha, 6) for alpha in alphas}:
                shares = ", ".join(map(str, sorted(there)))
                raise ExciseError(
                    f"strategy {key} prunes {shares} of the heads, and the preset takes {', '.join(map(str, alphas))} "
                    "alone; say with resources.settings.config.alphas which shares to take"
                )

    def scenarios_like(self, key: str) -> list[str]:
        """The scenarios with the same kind of outcome, itself among them: those masks can come from."""
        kind = type(self.scenarios[key].outcome)
        return [other for other, scenario in self.scenarios.items() if type(scenario.outcome) is kind]

    def chosen_strategies(
        self, keys: Sequence[str] | None, levels: Sequence[str], outcome: str, alphas: Sequence[float] | None = None
    ) -> list[Strategy]:
        """The strategies named, or all enabled ones for that kind of outcome, each at the levels of it that are wanted.

        A name stands for all strategies made of one entry (fasp for fasp-0.10, fasp-0.20). alphas: of strategies that
        prune a share alpha of the heads, those with one of these. Raises ExciseError for a strategy that does not
        exist or cannot be used, and where none are named and an entry is broken that changes one of the usual ones.
        """
        if keys is not None:
            named = [self._strategies_named(key) for key in keys]
            chosen = list({strategy.key: strategy for entry in named for strategy in entry}.values())
        else:
            if broken := self._broken_though_usual(outcome):
                raise ExciseError(
                    f"{self.strategies.why_not(broken)}\nMend it, or name other strategies with "
                    "resources.settings.config.strategies"
                )
            chosen = [
                strategy for strategy in self.strategies.values() if strategy.enabled and outcome in strategy.outcomes
            ]
        if alphas is not None:
            rounded = {round(alpha, 6) for alpha in alphas}
            chosen = [
                strategy for strategy in chosen if round(strategy.parameters.get("alpha", alphas[0]), 6) in rounded
            ]
        wanted = [tuple(level for level in strategy.levels if level in levels) for strategy in chosen]
        return [
            strategy.model_copy(update={"levels": kept}) for strategy, kept in zip(chosen, wanted, strict=True) if kept
        ]

    def fasp_parameters(self) -> dict[str, dict[str, float]]:
        """Parameters of the strategies by FASP's rule and head impacts, by key."""
        return {
            key: strategy.parameters for key, strategy in self.strategies.items() if strategy.score == "head_impacts"
        }

    def gamma_variants(self) -> list[str]:
        """Keys of the FASP strategies that differ in gamma, the share protected (fasp_gamma-0.40)."""
        return [
            key
            for key, strategy in self.fasp_parameters().items()
            if key.rpartition("-")[2] == value_in_name(strategy.get("gamma", 0)) != value_in_name(strategy["alpha"])
        ]

    def _strategies_named(self, key: str) -> list[Strategy]:
        made = [name for name in (*self.strategies, *self.strategies.broken) if name.startswith(f"{key}-")]
        if key in self.strategies or key in self.strategies.broken or not made:
            made = [key]
        entries = dict.fromkeys(name.partition("-")[0] for name in self.strategies)
        for name in made:
            if name not in self.strategies:
                raise ExciseError(f"resources.settings.config.strategies: {self.strategies.why_not(name, entries)}")
        return [self.strategies[name] for name in made]

    def _broken_though_usual(self, outcome: str) -> str | None:
        """A strategy that audits of such an outcome use without naming it, and that cannot be used."""
        usual = (
            key
            for key, strategy in load_strategies().items()
            if key in self.strategies.broken and strategy.enabled and outcome in strategy.outcomes
        )
        return next(usual, None)


def read_catalogue(
    scenario_folders: Sequence[Path],
    model_files: Sequence[Path],
    strategy_files: Sequence[Path],
    scorer_files: Sequence[Path] = (),
) -> Catalogue:
    """Read the built-in files and the user's."""
    scenarios, _ = load_scenarios(scenario_folders)
    models, _ = load_registry(model_files)
    scorers, _ = load_scorer_registry(scorer_files)
    strategies = load_strategies(strategy_files)
    # Pairs before axes, heaviest first: a backfill then ends with its short runs instead of waiting for one long one.
    order = sorted(
        scenarios.values(),
        key=lambda scenario: (not scenario.outcome.pairwise, -prompt_count(scenario), scenario.key),
    )
    ordered = Registry(
        {scenario.key: scenario for scenario in order},
        noun=scenarios.noun,
        problems=scenarios.problems,
        broken=scenarios.broken,
        known=[*(scenario.key for scenario in order), *(key for key in scenarios.known if key not in scenarios)],
        files=scenarios.files,
    )
    registries = (ordered, models, scorers, strategies)
    return Catalogue(
        scenarios=ordered,
        models=models,
        strategies=strategies,
        scorers=scorers,
        problems=tuple(problem for registry in registries for problem in registry.problems),
    )
