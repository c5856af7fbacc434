"""The page of results, second part: what pruning heads does to differences of toxicity, as Markdown.

Here frames become words and tables: reweighted against regenerated head impacts, their reliability, every method's
trade-off, and whether heads with a known change are found (FASP, sections 5 and 6; method, B). Nothing is estimated
here; one axis alone is told in `toxicity_report`, the first paper's tables in `results`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from excise.attribution.head_impacts import split_half_reliability
from excise.evaluation.rounding import interval_text
from excise.evaluation.table import Estimate, read_estimate
from excise.evaluation.thresholds import stored_thresholds
from excise.reporting.toxicity import toxicity_finding, toxicity_markdown


def heads_markdown(
    metrics: pl.DataFrame,
    impacts: pl.DataFrame,
    reweighting: pl.DataFrame,
    correlations: pl.DataFrame,
    thresholds: pl.DataFrame,
    *,
    planted: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> str:
    """The part of the page about heads.

    metrics, impacts, reweighting, correlations: rows of the tables `metrics` (of toxicity scenarios), `head_impacts`,
    `reweighting` and `bias_correlation`, of one or more models. Any may be empty: its section is then one sentence.
    thresholds: rows of that table, what each audit was judged by; ExciseError where they lack those of an audit.
    planted: (layer, head) pairs that were changed, by model.
    """
    parts = [
        "# Heads and toxicity",
        "Disparity is the sum over subgroups of |mean score of all prompts - mean score of the subgroup|; every figure "
        "is of held-out templates. The default scorer counts negative words, a stand-in for a classifier of toxicity.",
        "## Head impacts: answers weighed anew against answers drawn anew\n\n" + _reweighting(reweighting),
        "## Reliability of head impacts\n\n" + _reliability(impacts),
        "## Heads that were changed on purpose\n\n" + _planted(impacts, planted or {}),
        "## Every method's trade-off\n\n" + _trade_off(metrics, thresholds),
        "## One axis' heads on another\n\n" + _correlation(correlations),
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _figure(value: float | None, decimals: int, factor: float = 1.0, unit: str = "") -> str:
    """The figure, `-` where it is not defined."""
    if value is None or not np.isfinite(value):
        return "-"
    return interval_text(Estimate(factor * value), decimals=decimals) + unit


def _places(frame: pl.DataFrame) -> list[tuple[tuple[str, str], pl.DataFrame]]:
    if frame.is_empty():
        return []
    return list(frame.partition_by("model", "scenario", as_dict=True, maintain_order=True).items())


def agreement(rows: pl.DataFrame) -> dict[str, float | None]:
    """How reweighted head impacts compare with regenerated ones, over heads that are not catastrophic.

    rows: of the table `reweighting`, one model and scenario. inside: share of heads whose reweighted z_bias lies in the
    regenerated one's interval. width: median ratio of the intervals' widths, reweighted over regenerated. speed:
    seconds of regenerating over those of reweighting. cost: how many times cheaper reweighting is at equal interval
    width, if width falls with the root of the samples. None where no such head was measured both ways.
    """
    usual = rows.filter(~pl.col("catastrophic")).drop_nulls(["z_reweighted", "z_regenerated", "low_regenerated"])
    inside = usual.select(
        pl.col("z_reweighted").is_between(pl.col("low_regenerated"), pl.col("high_regenerated")).mean()
    ).item()
    width = usual.select(
        (
            (pl.col("high_reweighted") - pl.col("low_reweighted"))
            / (pl.col("high_regenerated") - pl.col("low_regenerated"))
        ).median()
    ).item()
    speed = (usual["seconds_regenerated"] / usual["seconds_reweighted"]).median()
    correlation = usual.select(pl.corr("z_reweighted", "z_regenerated")).item()
    return {
        "heads": usual.height,
        "inside": inside,
        "width": width,
        "speed": speed,
        "cost": speed / width**2 if speed is not None and width else None,
        "correlation": correlation,
        "ess": usual["ess"].median(),
    }


def _reweighting(rows: pl.DataFrame) -> str:
    if rows.is_empty():
        return "Not measured yet: `python -m pipelines.reweighting`."
    lines = []
    for (model, scenario), heads in _places(rows):
        compared = agreement(heads)
        lines.append(
            [
                model,
                scenario,
                f"{compared['heads']} of {heads.height}",
                _figure(compared["inside"], 0, 100, " %"),
                _figure(compared["correlation"], 2),
                _figure(compared["ess"], 2),
                _figure(compared["width"], 2),
                _figure(compared["speed"], 1),
                _figure(compared["cost"], 0),
            ]
        )
    header = [
        "model",
        "scenario",
        "heads (not catastrophic)",
        "reweighted inside regenerated's interval",
        "correlation",
        "median effective share",
        "interval width, ratio",
        "time per head, ratio",
        "cost at equal width, ratio",
    ]
    return (
        _table(header, lines) + "\n\nBoth ways in one process on the same prompts. Width: reweighted over regenerated "
        "(below 1: narrower). Time: regenerated over reweighted. Cost: time over squared width, as an interval narrows "
        "with the root of the samples. The regenerated answers share their random numbers with the unpruned ones."
    )


def _reliability(impacts: pl.DataFrame) -> str:
    if impacts.is_empty():
        return "No head impacts yet: `make heads`."
    lines = []
    for (model, scenario), heads in _places(impacts):
        for row in split_half_reliability(heads).iter_rows(named=True):
            names = ("pearson", "spearman", "pearson_corrected", "spearman_corrected")
            shown = [_figure(row[name], 2) for name in names]
            lines.append([model, scenario, row["among"].replace("_", " "), str(row["heads"]), *shown])
    header = [
        "model",
        "scenario",
        "among",
        "heads",
        "Pearson of halves",
        "Spearman of halves",
        "Pearson, both halves",
        "Spearman, both halves",
    ]
    return _table(header, lines) + (
        "\n\nz_bias from one half of the samples against that from the other, over heads; the last columns are "
        "Spearman-Brown's estimate for all samples. The paper's scores correlate between seeds with .02 to .23."
    )


def _planted(impacts: pl.DataFrame, planted: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    lines = []
    for (model, scenario), heads in _places(impacts):
        if model not in planted:
            continue
        ranked = heads.sort("z_bias", descending=True, nulls_last=True).with_row_index("rank", offset=1)
        for layer, head in planted[model]:
            row = ranked.filter((pl.col("layer") == layer) & (pl.col("head") == head)).row(0, named=True)
            z_bias = read_estimate({"estimate": row["z_bias"], "low": row["z_bias_low"], "high": row["z_bias_high"]})
            lines.append(
                [
                    model,
                    scenario,
                    f"{layer}.{head}",
                    "-" if z_bias.value is None else f"{row['rank']} of {heads.height}",
                    interval_text(z_bias, decimals=4),
                    _figure(row["z_ppl"], 2),
                ]
            )
    if not lines:
        return "No model with changed heads was measured yet: `make heads MODEL=planted-heads`."
    header = ["model", "scenario", "changed head", "rank of its z_bias", "z_bias", "z_ppl"]
    return _table(header, lines) + "\n\nBy chance a changed head would rank in the middle."


def _trade_off(metrics: pl.DataFrame, thresholds: pl.DataFrame) -> str:
    parts = []
    for (model, scenario), rows in _places(metrics):
        judged = stored_thresholds(thresholds, asset="evaluation_metrics", model=model, scenario=scenario)
        finding = toxicity_finding(rows, perplexity_budget=judged.perplexity_budget)
        parts.append(f"### {model}: {scenario}\n\n{finding}\n\n{toxicity_markdown(rows)}")
    return "\n\n".join(parts) or "No axis was evaluated yet: `make heads`."


def _correlation(correlations: pl.DataFrame) -> str:
    rows = correlations.filter(
        (pl.col("scenario") != pl.col("other_scenario")) & (pl.col("other_measure") == pl.col("measure"))
    )
    if rows.is_empty():
        return "Only one axis was measured."
    lines = [
        [
            row["model"],
            row["scenario"],
            row["other_scenario"],
            row["heads"].replace("_", " "),
            row["statistic"].replace("_", " "),
            interval_text(read_estimate({name: row[name] for name in ("estimate", "low", "high")}), decimals=2),
        ]
        for row in rows.iter_rows(named=True)
    ]
    return _table(["model", "axis", "other axis", "among heads", "statistic", "estimate"], lines)
