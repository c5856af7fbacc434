"""The stage `head_impacts`: what removing each attention head does to perplexity and to the disparity (FASP).

The answers are those of `completions` (of the part that masks may be made from), weighed anew instead of drawn anew;
files of model work are found again by their content, so a killed run goes on where it was.
"""

from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.asking import asking_of, scorer_of, windows_of
from assets.metadata import data_version, table_value
from assets.partitions import Catalogue
from assets.stage import Step, grid_asset
from assets.upstream import completions_of, require_same_model
from excise.errors import ExciseError
from excise.evaluation.judged import explained, judged_of
from excise.scenarios.subsets import EVALUATION, without
from resources.tables import TABLES

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel


def head_impacts_asset(catalogue: Catalogue) -> dg.AssetsDefinition:
    """Measures every head."""

    @grid_asset(
        catalogue,
        group="pruning",
        kinds={"torch", "safetensors"},
        description="For every attention head, with intervals: what its removal does to the perplexity of a text and "
        "to the disparity (toxicity bias, or |SMD| of numbers), and how reliable that is; and the scores of the "
        "baselines.",
        deps=["completions"],
        uses_model=True,
        code_version="2",
    )
    def head_impacts(step: Step) -> dg.MaterializeResult:
        completions, prompts = completions_of(step.warehouse, step.model, step.scenario.key)
        learned, asked = without(EVALUATION, completions, prompts)
        judged = judged_of(learned, step.scenario)
        if not judged:
            raise ExciseError(" ".join(explained(learned, step.scenario)))
        able = pl.col("variation").is_in(judged)
        with step.loaded() as loaded:
            require_same_model(completions, loaded, step.scenario.key)
            impacts = _measured(step, loaded, learned.filter(able), asked.filter(able))
            device = step.gpu.report(loaded)
        rows = impacts.with_columns(
            **{name: pl.lit(key) for name, key in step.place.items()},
            model_fingerprint=pl.lit(device["model_fingerprint"]),
            completions_version=pl.lit(data_version(completions).value),
        ).select(TABLES["head_impacts"].names)
        step.store("head_impacts", rows)
        left_out = sorted(set(learned["variation"]) - set(judged))
        metadata = device | ({"not_judged": ", ".join(left_out)} if left_out else {}) | _metadata(step, rows)
        return step.result("head_impacts", metadata, rows)

    return head_impacts


def _measured(step: Step, loaded: "LoadedModel", learned: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """The impacts of all heads, and the baselines' scores of them."""
    from excise.attribution.head_impacts import Removal, Text
    from excise.attribution.measured_heads import impacts_on, with_baselines
    from excise.generation.answering import Answering

    audit, windows = step.audit, windows_of(loaded, step.audit)
    asking = asking_of(step, loaded, Answering.of(learned), scorer_of(step.catalogue, step.scenario))
    impacts = impacts_on(
        asking,
        (learned, prompts),
        step.scenario,
        Removal(audit.impact_method, ess_floor=audit.ess_floor),
        resamples=audit.resamples,
        seed=audit.seed,
        text=Text(windows, audit.perplexity_mode),
        folder=step.artifacts.tensors("head_impacts"),
        progress=step.progress,
    )
    return with_baselines(impacts, loaded, windows)


def _metadata(step: Step, rows: pl.DataFrame) -> dict[str, Any]:
    """The map of the heads, how reliable impacts are, and the most harmful heads."""
    from excise.attribution.head_impacts import split_half_reliability
    from excise.reporting.figures import head_map

    harmful = rows.sort("z_bias", descending=True, nulls_last=True).head(20)
    return step.picture("head_map", head_map(rows)) | {
        "regenerated": (rows["method"] == "regenerated").sum(),
        "median_effective_share": rows["ess"].median(),
        "split_half_reliability": table_value(split_half_reliability(rows)),
        "most_harmful": table_value(
            harmful.select("layer", "head", "z_bias", "z_bias_low", "z_bias_high", "z_ppl", "ess")
        ),
    }
