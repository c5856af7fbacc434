"""The stage `stability`: masks made and judged again on other splits of the names.

A split is `excise.strategies.splits`; the audit's own is the table `metrics`. What is summed up is in
`excise.evaluation.stability`.
"""

from functools import cache
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from assets.asking import asking_of
from assets.evaluation_metrics import draws_of
from assets.mask_files import MaskFiles
from assets.measured_paths import PathRows, paths_of
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import completions_of, require_same_model, rows_of

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel


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
    def stability(step: Step) -> dg.MaterializeResult:
        from excise.evaluation.stability import kept, summary
        from excise.reporting.stability import stability_markdown, stability_sentence

        if (why := _nothing_to_repeat(step)) is not None:
            return step.nothing(why, under="finding")
        metrics = rows_of(step.warehouse, "metrics", step.model, step.scenario.key, made_by="evaluation_metrics")
        with step.loaded() as loaded:
            splits = _splits(step, loaded)
        rows = pl.concat([kept(_own(step, metrics), 0, step.audit.splits), *splits])
        step.store("stability", rows)
        summed = summary(rows)
        metadata = {"finding": stability_sentence(summed), "splits": dg.MetadataValue.md(stability_markdown(summed))}
        return step.result("stability", metadata, rows)

    return stability


def _nothing_to_repeat(step: Step) -> str | None:
    """Why a partition has no other splits."""
    from excise.reporting.stability import NO_SPLIT, ONE_SPLIT

    if not step.scenario.outcome.pairwise:
        return "Splits of the names are for scenarios whose answers are numbers."
    if step.audit.splits == 1:
        return ONE_SPLIT if step.audit.held_out else NO_SPLIT
    return None


def _own(step: Step, metrics: pl.DataFrame) -> pl.DataFrame:
    """Of the audit's own split, the masks that the others repeat."""
    from excise.strategies.splits import repeatable, repeated

    places = repeated(repeatable(step.strategies()))
    again = pl.DataFrame(places, schema={"of": pl.String, "level": pl.String}, orient="row")
    return metrics.with_columns(of=pl.coalesce("matched_to", "strategy")).join(again, on=["of", "level"], how="semi")


def _splits(step: Step, loaded: "LoadedModel") -> list[pl.DataFrame]:
    """The metrics of every split but the audit's own."""
    from excise.generation.answering import Answering
    from excise.strategies.splits import Split, judged_split, repeatable, split_masks

    key, store = step.scenario.key, MaskFiles(step.artifacts).store

    @cache
    def answered(other: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        rows, prompts = completions_of(step.warehouse, step.model, other)
        require_same_model(rows, loaded, other)
        return rows, prompts

    completions, _ = answered(key)
    asking, folder = asking_of(step, loaded, Answering.of(completions)), step.artifacts.tensors("attribution")
    strategies, there = repeatable(step.strategies()), _scenarios_asked(step)
    frames = []
    for number in range(1, step.audit.splits):
        seed = step.audit.seed + number
        split = Split(number, seed, asking, step.catalogue.scenarios, answered, folder, step.progress)
        paths = paths_of(step, loaded, PathRows(step).note, split.learned, seed)
        masks = split_masks(split, key, strategies, there, paths, store)
        frames.append(judged_split(split, key, masks, draws_of(step.audit, seed), step.audit.splits))
    return frames


def _scenarios_asked(step: Step) -> list[str]:
    """The scenarios that masks can come from and that the model was asked."""
    asked = set(step.warehouse.read("completions", model=step.model)["scenario"])
    return [key for key in step.catalogue.scenarios_like(step.scenario.key) if key in asked]
