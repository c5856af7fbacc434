"""The stage `stability`: masks made and judged again on other splits of the names.

A split only relabels the names of the completions that are there; everything dear comes from the caches of scores,
paths and answers. The audit's own split is the table `metrics`. What is summed up is in `excise.evaluation.stability`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import dagster as dg
import polars as pl

from assets.completions import completions_of, require_same_model, without
from assets.measured_paths import PathRows, paths_of
from assets.partitions import Catalogue
from assets.pruning_masks import MaskFiles, mask_rows
from assets.stage import data_version, grid_asset, nothing_to_tell, rows_of, table_metadata
from excise.conditions import ACROSS, RANDOM
from excise.evaluation.judged import judged_of
from excise.scenarios import Scenario
from excise.scenarios.subsets import ATTRIBUTION, EVALUATION, held_out_split
from excise.strategies.build import NamedMask, SourceMask
from excise.strategies.config import HEAD_SCORES, MEASURED_PATH, Strategy
from resources.artifacts import Artifacts
from resources.gpu import GPUResource
from resources.settings import Audit, AuditSettings
from resources.tables import TABLES
from resources.warehouse import Warehouse
from resources.watch import RunWatch

NAME = "stability"


def stability_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Repeats masks and judgement over splits."""

    @grid_asset(
        catalogue,
        group="evaluation",
        kinds={"torch", "scipy", "duckdb"},
        description="The masks of every strategy made from, and judged on, other halves of the names: how much of a "
        "reduction hangs on the half it was made from. Empty with a single split.",
        deps=[dg.AssetDep("completions", partition_mapping=catalogue.all_scenarios), "evaluation_metrics"],
        uses_model=True,
        code_version="2",
    )
    def stability(
        context: dg.AssetExecutionContext,
        warehouse: Warehouse,
        artifacts: Artifacts,
        gpu: GPUResource,
        settings: AuditSettings,
        watch: RunWatch,
    ) -> dg.MaterializeResult:
        from excise.evaluation import stability as s
        from excise.reporting import stability as w

        model, scenario = catalogue.partition(context)
        audit, place = catalogue.audit_of(settings, scenario), {"model": model, "scenario": scenario.key}

        nothing = partial(nothing_to_tell, warehouse, NAME, place, under="finding")
        if scenario.outcome.kind != "number":
            return nothing("Splits of the names are for scenarios whose answers are numbers.")
        if audit.splits == 1:
            return nothing(w.ONE_SPLIT if audit.held_out else w.NO_SPLIT)
        metrics = rows_of(warehouse, "metrics", model, scenario.key, made_by="evaluation_metrics")
        frames = []
        with gpu.model(model, catalogue.models, stage=watch.stage(context)) as loaded:
            completions, _ = completions_of(warehouse, model, scenario.key)
            require_same_model(completions, loaded.fingerprint, model, scenario.key)
            for split in range(1, audit.splits):
                one = _Split(split, scenario, audit, catalogue, warehouse, artifacts, loaded, watch.progress(context))
                frames.append(one.judged(audit.splits))
        # Of the audit's own split, the masks that the others repeat.
        repeated = pl.DataFrame(one.repeated, schema={"strategy": pl.String, "level": pl.String}, orient="row")
        own = metrics.with_columns(of=pl.coalesce("matched_to", "strategy")).join(
            repeated.rename({"strategy": "of"}), on=["of", "level"], how="semi"
        )
        rows = pl.concat([s.kept(own, 0, audit.splits), *frames])
        warehouse.replace_partition(NAME, rows, place)
        summed = s.summary(rows)
        return dg.MaterializeResult(
            metadata={
                "finding": w.stability_sentence(summed),
                "splits": dg.MetadataValue.md(w.stability_markdown(summed)),
            }
            | table_metadata(NAME, rows),
            data_version=data_version(rows),
        )

    return stability


class _Split:
    """One more split of the names: its masks, and what they are judged to do."""

    def __init__(
        self,
        number: int,
        scenario: Scenario,
        audit: Audit,
        catalogue: Catalogue,
        warehouse: Warehouse,
        artifacts: Artifacts,
        loaded,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.number, self.scenario, self.catalogue = number, scenario, catalogue
        self.audit = replace(audit, seed=audit.seed + number)
        self.warehouse, self.artifacts, self.loaded, self.progress = warehouse, artifacts, loaded, progress

    def _relabelled(self, completions: pl.DataFrame, prompts: pl.DataFrame, scenario: Scenario) -> pl.DataFrame:
        halves = held_out_split(scenario, prompts, self.audit.seed)
        return completions.drop("split").join(halves, on="prompt_id", how="left", maintain_order="left")

    def _halves(self, scenario: Scenario):
        """Completions and prompts of the half that masks are made from, and of the half they are judged on."""
        completions, prompts = completions_of(self.warehouse, self.loaded.key, scenario.key)
        labelled = self._relabelled(completions, prompts, scenario)
        return without(EVALUATION, labelled, prompts), without(ATTRIBUTION, labelled, prompts)

    def _attributed(self, scenario: Scenario, scores: set[str]):
        from excise.attribution import attribute
        from excise.generation.answering import Answering, as_samples
        from excise.generation.completions import CompletionCache

        (learned, prompts), _ = self._halves(scenario)
        return attribute(
            self.loaded,
            prompts,
            as_samples(learned, Answering.of(learned).samples),
            comparison=scenario.comparison,
            outcome=scenario.outcome,
            scores=sorted(scores),
            permutations=0,
            seed=self.audit.seed,
            folder=self.artifacts.tensors("attribution"),
            cache=CompletionCache(self.artifacts.completion_cache),
            progress=self.progress,
        )

    def _strategies(self) -> list[Strategy]:
        audit = self.audit
        return [
            each.model_copy(update={"controls": tuple(c for c in each.controls if c == RANDOM)})
            for each in self.catalogue.chosen_strategies(audit.strategies, audit.levels, "number", audit.alphas)
            if each.score not in HEAD_SCORES
        ]

    @property
    def repeated(self) -> list[tuple[str, str]]:
        """Strategies and levels whose masks are made anew. Across contexts these are paths alone: other masks would
        need those of all scenarios for this split."""
        return [
            (each.key, level)
            for each in self._strategies()
            for level in each.levels
            if level not in ACROSS or each.selection == MEASURED_PATH
        ]

    def _masks(self) -> list[NamedMask]:
        from excise.strategies.build import build_cross_context_masks, build_masks

        audit, files, chosen = self.audit, MaskFiles(self.artifacts), self._strategies()
        paths = paths_of(
            self.warehouse,
            self.artifacts,
            self.catalogue,
            self.loaded,
            audit,
            PathRows(self.artifacts, NAME, self.loaded.key, self.scenario.key).note,
            self.progress,
            self._relabelled,
        )
        own = self._attributed(self.scenario, {each.score for each in chosen})
        options = {"random_draws": 1, "seed": audit.seed, "paths": paths, "progress": self.progress}
        within = [_within(each) for each in chosen if set(each.levels) - set(ACROSS)]
        made = list(
            build_masks(
                self.loaded, within, own, scenario=self.scenario.key, permutations=0, store=files.store, **options
            )
        )
        across = [each for each in chosen if set(each.levels) & set(ACROSS) and each.selection == MEASURED_PATH]
        asked = self.warehouse.read("completions", model=self.loaded.key).select("scenario").unique()["scenario"]
        sources = [
            SourceMask(key, file.variation, strategy.key, None, file.path)
            for strategy in across
            for key in self.catalogue.scenarios_like(self.scenario.key)
            if key in set(asked)
            for file in (
                own if key == self.scenario.key else self._attributed(self.catalogue.scenarios[key], {strategy.score})
            )
            if file.score == strategy.score
        ]
        variations = list(dict.fromkeys(file.variation for file in own))
        made += build_cross_context_masks(across, sources, self.scenario.key, variations, per_source=False, **options)
        return made

    def judged(self, splits: int) -> pl.DataFrame:
        """The metrics of this split of `splits`, as `excise.evaluation.stability` keeps them."""
        from excise.evaluation.numbers import evaluate
        from excise.evaluation.stability import STABILITY_SCHEMA, kept
        from excise.generation.answering import Answering
        from excise.generation.completions import CompletionCache

        _, (completions, prompts) = self._halves(self.scenario)
        able = judged_of(completions, self.scenario)
        made = [named for named in self._masks() if named.variation in able]
        if not made:
            return pl.DataFrame(schema=STABILITY_SCHEMA)
        how, cache = Answering.of(completions), CompletionCache(self.artifacts.completion_cache)
        frames, masks = [], []
        for number, named in enumerate(made):
            rows, _ = how.answers(
                self.loaded,
                prompts.filter(pl.col("variation") == named.variation),
                outcome=self.scenario.outcome,
                mask=named.mask,
                cache=cache,
            )
            told = {"strategy": named.strategy, "level": named.level, "matched_to": named.matched_to}
            kinds = TABLES["pruned_completions"].schema
            columns = [pl.lit(value, dtype=kinds[name]).alias(name) for name, value in told.items()]
            frames.append(rows.with_columns(*columns, draw=pl.lit(named.draw, kinds["draw"])))
            masks += mask_rows(named, NAME, self.loaded.key, self.scenario.key, path="", definition="")
            self.progress(f"split {self.number}: pruned completions", number + 1, len(made))
        groups, audit = self.scenario.comparison, self.audit
        metrics = evaluate(
            completions.filter(pl.col("variation").is_in(able)),
            pl.concat(frames),
            pl.DataFrame(masks, schema=TABLES["masks"].schema),
            majority=groups.majority,
            minority=groups.minority,
            resamples=audit.resamples,
            permutations=audit.permutations,
            seed=audit.seed,
            answer_range=self.scenario.outcome.scored_range,
            log_scale=self.scenario.outcome.scale == "log",
        )
        return kept(metrics, self.number, splits)


def _within(strategy: Strategy) -> Strategy:
    return strategy.model_copy(update={"levels": tuple(each for each in strategy.levels if each not in ACROSS)})
