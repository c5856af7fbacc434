"""How an asset is declared, and what it works with: a step of the grid, or an analysis over a model's scenarios.

Here belong Dagster's conventions (groups, pools, versions) and what every stage does with its results: it stores them,
has them checked, and tells of them. What a single stage does is in the module of its name; what earlier stages left
is read through `upstream`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.checks import Outcome, check_spec, record
from assets.metadata import data_version, picture, table_metadata
from assets.partitions import Catalogue
from assets.table_checks import DECLARED, rows_as_declared
from assets.upstream import unjudged_scenarios
from excise.errors import ExciseError
from excise.progress import Progress
from excise.scenarios import Scenario
from excise.strategies.config import Strategy
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import Audit, AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel

# All assets of a grid need the same policy, or Dagster splits a backfill into more runs than there are partitions.
ONE_RUN_PER_PARTITION = dg.BackfillPolicy.multi_run(max_partitions_per_run=1)


@dataclass
class Step:
    """A partition of the grid at work: what it is about, what it borrows, and what it has stored so far."""

    asset: str
    context: dg.AssetExecutionContext
    catalogue: Catalogue
    model: str
    scenario: Scenario
    settings: AuditSettings
    audit: Audit
    warehouse: Warehouse
    artifacts: Artifacts
    watch: RunWatch
    gpu: GPUResource | None
    stored: dict[str, pl.DataFrame] = field(default_factory=dict)

    @classmethod
    def of(cls, context: dg.AssetExecutionContext, catalogue: Catalogue) -> "Step":
        """The step of a run. Raises ExciseError where the scenario or the settings cannot be used."""
        borrowed = context.resources
        model, scenario = catalogue.partition(context)
        return cls(
            asset=context.asset_key.to_user_string(),
            context=context,
            catalogue=catalogue,
            model=model,
            scenario=scenario,
            settings=borrowed.settings,
            audit=catalogue.audit_of(borrowed.settings, scenario),
            warehouse=borrowed.warehouse,
            artifacts=borrowed.artifacts,
            watch=borrowed.watch,
            gpu=getattr(borrowed, "gpu", None),
        )

    @property
    def place(self) -> dict[str, str]:
        """The key of the partition, by column of the tables."""
        return {"model": self.model, "scenario": self.scenario.key}

    def strategies(self) -> list[Strategy]:
        """The strategies that the settings choose, each at the levels that are wanted."""
        audit = self.audit
        return self.catalogue.chosen_strategies(
            audit.strategies, audit.levels, self.scenario.outcome.audited_as, audit.alphas
        )

    @property
    def progress(self) -> Progress:
        """A new watcher of long work."""
        return self.watch.progress(self.context)

    @contextmanager
    def loaded(self) -> Iterator["LoadedModel"]:
        """The model, which is this step's for the length of the block."""
        with self.gpu.model(self.model, self.catalogue.models, stage=self.watch.stage(self.context)) as loaded:
            yield loaded

    def store(self, table: str, rows: pl.DataFrame, *, by_asset: bool = False) -> None:
        """Put the partition's rows in place of an earlier run's. by_asset: only of those that this asset made."""
        keys = ({"asset": self.asset} if by_asset else {}) | self.place
        self.warehouse.replace_partition(table, rows, keys)
        self.stored[table] = rows

    def store_thresholds(self) -> None:
        """Keep what the results are judged by."""
        row = {"asset": self.asset, **self.place, **asdict(self.audit.thresholds)}
        self.store("thresholds", pl.DataFrame([row], schema=TABLES["thresholds"].schema), by_asset=True)

    def picture(self, name: str, figure: Any) -> dict[str, dg.MetadataValue]:
        """A figure in the partition's folder, as metadata."""
        return picture(name, figure, self.artifacts, self.model, self.scenario.key)

    def result(
        self, table: str, metadata: Mapping[str, Any], *version: Any, outcomes: Sequence[Outcome] = ()
    ) -> dg.MaterializeResult:
        """What the asset's run ends with: the checks are kept, too, that of the stored tables among them.

        table: the one to be shown. version: frames and values that the version of the data changes with.
        """
        judged = [*outcomes, rows_as_declared(self.stored)]
        record(self.warehouse, self.asset, self.place, judged)
        return dg.MaterializeResult(
            metadata={**metadata, **table_metadata(table, self.stored[table])},
            data_version=data_version(*version),
            check_results=[outcome.result() for outcome in judged],
        )

    def nothing(self, why: str, *, under: str) -> dg.MaterializeResult:
        """The result of a stage that has nothing to tell of a partition: an empty table, and `why` as metadata."""
        rows = pl.DataFrame(schema=TABLES[self.asset].schema)
        self.store(self.asset, rows)
        return self.result(self.asset, {under: why}, rows, why)


@dataclass(frozen=True)
class Analysis:
    """An analysis of a model at work. Its table has the asset's name."""

    asset: str
    context: dg.AssetExecutionContext
    catalogue: Catalogue
    model: str
    warehouse: Warehouse
    artifacts: Artifacts

    @classmethod
    def of(cls, context: dg.AssetExecutionContext, catalogue: Catalogue) -> "Analysis":
        """The analysis of a run."""
        borrowed, asset = context.resources, context.asset_key.to_user_string()
        return cls(asset, context, catalogue, context.partition_key, borrowed.warehouse, borrowed.artifacts)

    def scenarios_of(self, rows: pl.DataFrame, *, made_by: str) -> tuple[list[str], dict[str, str]]:
        """The scenarios that have rows, in the catalogue's order, and as metadata those that have none, and why.

        Scenarios without results are named in the log, too. Raises ExciseError when there are no results at all, unless
        none can be had as nothing can be judged (`nothing_judged`).
        """
        there, scenarios, log = set(rows["scenario"]), self.catalogue.scenarios, self.context.log
        known = [key for key in scenarios if key in there]
        lacking = [key for key in scenarios if key not in there]
        silent = unjudged_scenarios(self.warehouse, self.model)
        unjudged = [key for key in lacking if key in silent]
        why = f"no variation of {', '.join(unjudged)} can be judged (check judged_variations of completions)"
        if not known and not unjudged:
            raise ExciseError(
                f"no scenario of {self.model} has results yet; materialize {made_by} of its partitions first"
            )
        metadata = {}
        if unmade := [key for key in lacking if key not in unjudged]:
            log.info(f"left out, as {made_by} has no results yet: {', '.join(unmade)}")
        broken = [key for key in scenarios.broken if key in there]
        for key in broken:
            log.warning(f"left out: {scenarios.why_not(key)}")
        if left_out := [*unmade, *(f"{key} (its file has a mistake)" for key in broken)]:
            metadata["scenarios_left_out"] = ", ".join(left_out)
        if unjudged:
            log.info(f"left out: {why}")
            metadata["scenarios_not_judged"] = ", ".join(unjudged)
        return known, metadata

    def picture(self, name: str, figure: Any) -> dict[str, dg.MetadataValue]:
        """A figure in the model's folder, as metadata."""
        return picture(name, figure, self.artifacts, self.model)

    def result(self, rows: pl.DataFrame, metadata: Mapping[str, Any]) -> dg.MaterializeResult:
        """Store the rows in place of those of an earlier run, and tell of them."""
        self.warehouse.replace_partition(self.asset, rows, {"model": self.model})
        return dg.MaterializeResult(
            metadata={**metadata, **table_metadata(self.asset, rows)}, data_version=data_version(rows)
        )

    def nothing_judged(self, left_out: Mapping[str, str]) -> dg.MaterializeResult:
        """The result where none of the model's scenarios can be judged: an empty table that says so."""
        finding = (
            "No variation of any scenario can be judged, so there is nothing to analyse (check judged_variations)."
        )
        return self.result(pl.DataFrame(schema=TABLES[self.asset].schema), {**left_out, "finding": finding})


def clear_failures(function: Callable) -> Callable:
    """Turn a mistake the user can mend into a failure that says so; trying again would not help."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ExciseError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from error

    return guarded


def grid_asset(  # what Dagster asks of an asset, hence so many
    catalogue: Catalogue,
    *,
    group: str,
    kinds: set[str],
    description: str,
    deps: Sequence[str | dg.AssetDep],
    checks: Sequence[str] = (),
    uses_model: bool = False,
    code_version: str = "1",
) -> Callable[[Callable[[Step], dg.MaterializeResult]], dg.AssetsDefinition]:
    """Declare an asset partitioned by model and scenario, of a function of its step.

    checks: names of its checks beside that of its tables' declarations. Stages that use the model hold the pool `gpu`.
    """

    def declare(stage: Callable[[Step], dg.MaterializeResult]) -> dg.AssetsDefinition:
        @dg.asset(
            name=stage.__name__,
            partitions_def=catalogue.grid,
            backfill_policy=ONE_RUN_PER_PARTITION,
            group_name=group,
            kinds=kinds,
            description=description,
            deps=list(deps),
            check_specs=[check_spec(check, stage.__name__, catalogue) for check in (*checks, DECLARED)],
            required_resource_keys={"warehouse", "artifacts", "settings", "watch"} | ({"gpu"} if uses_model else set()),
            pool="gpu" if uses_model else None,
            code_version=code_version,
        )
        @clear_failures
        def compute(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return stage(Step.of(context, catalogue))

        return compute

    return declare


def model_asset(
    catalogue: Catalogue, *, kinds: set[str], description: str, deps: Sequence[str], code_version: str = "1"
) -> Callable[[Callable[[Analysis], dg.MaterializeResult]], dg.AssetsDefinition]:
    """Declare an analysis over all scenarios of a model: partitioned by model, its `deps` by model and scenario."""

    def declare(analyse: Callable[[Analysis], dg.MaterializeResult]) -> dg.AssetsDefinition:
        by_model = dg.MultiToSingleDimensionPartitionMapping("model")

        @dg.asset(
            name=analyse.__name__,
            partitions_def=catalogue.model_partitions,
            backfill_policy=ONE_RUN_PER_PARTITION,
            group_name="analysis",
            kinds=kinds,
            description=description,
            deps=[dg.AssetDep(name, partition_mapping=by_model) for name in deps],
            required_resource_keys={"warehouse", "artifacts"},
            code_version=code_version,
        )
        @clear_failures
        def compute(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return analyse(Analysis.of(context, catalogue))

        return compute

    return declare
