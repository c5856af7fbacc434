"""Head impacts twice, by weighing the same answers anew and by drawing them anew: what agrees, and what either costs.

It measures the heads of a few layers of a partition that has completions, on the device and in one process, and keeps
the figures in the table `reweighting`; `pipelines.results` prints them. How impacts are made is
`excise.attribution.head_impacts`.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import polars as pl

from assets.asking import scorer_of
from assets.partitions import Catalogue, read_catalogue
from assets.upstream import completions_of
from excise.errors import ExciseError
from excise.evaluation.judged import judged_of
from excise.evaluation.thresholds import CATASTROPHIC
from excise.scenarios.subsets import EVALUATION, without
from pipelines.definitions import MODEL_FILES, SCENARIO_FOLDERS, SCORER_FILES, STRATEGY_FILES, build_definitions
from pipelines.terminal import DONE, INCOMPLETE, MISUSED, STATUSES, run
from resources.tables import TABLES
from resources.watch import Stage

if TYPE_CHECKING:
    from excise.models.loading import LoadedModel

LAYERS = 4


def main(arguments: Sequence[str] | None = None, catalogue: Catalogue | None = None) -> int:
    """Measure and store; the status is one of `pipelines.terminal.STATUSES`.

    catalogue: where the user's files were read before.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.reweighting",
        description="Compare reweighted with regenerated head impacts.",
        epilog=STATUSES,
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="key of a model in models.yaml")
    parser.add_argument("--scenario", default="gender", help="key of a scenario with completions and head impacts")
    parser.add_argument("--layers", default="", help="layers, comma between them; left out, four evenly spaced ones")
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args(arguments)
    catalogue = catalogue or read_catalogue(SCENARIO_FOLDERS, MODEL_FILES, STRATEGY_FILES, SCORER_FILES)
    for key, known in ((options.model, catalogue.models), (options.scenario, catalogue.scenarios)):
        if key not in known:
            print(known.why_not(key), *catalogue.problems, sep="\n", file=sys.stderr)
            return MISUSED
    if options.layers and not all(layer.strip().isdecimal() for layer in options.layers.split(",")):
        print(f"--layers {options.layers}: give numbers of layers with commas between them", file=sys.stderr)
        return MISUSED
    try:
        rows = measure(catalogue, options.model, options.scenario, options.layers, options.resamples)
    except ExciseError as error:
        print(error, file=sys.stderr)
        return INCOMPLETE
    print(rows)
    return DONE


def measure(catalogue: Catalogue, model: str, scenario_key: str, layers: str, resamples: int) -> pl.DataFrame:
    """Rows of the table `reweighting`, which they replace."""
    from excise.attribution.head_impacts import Removal
    from excise.attribution.measured_heads import impacts_on
    from excise.generation.answering import Answering
    from excise.generation.under_masks import Asking
    from excise.outcomes.scoring import ScoreCache

    resources = build_definitions(catalogue=catalogue).resources
    warehouse, artifacts, gpu = (resources[name] for name in ("warehouse", "artifacts", "gpu"))
    scenario = catalogue.scenario(scenario_key)
    learned, asked = without(EVALUATION, *completions_of(warehouse, model, scenario.key))
    known = warehouse.read("head_impacts", model=model, scenario=scenario.key)
    if known.is_empty():
        raise ExciseError(f"{model}|{scenario.key} has no head impacts; run make heads for it first")
    judged = judged_of(learned, scenario)  # as the head impacts do
    learned, asked = (frame.filter(pl.col("variation").is_in(judged)) for frame in (learned, asked))
    how = Answering.of(learned)
    scorer, scores = scorer_of(catalogue, scenario), ScoreCache(artifacts.score_cache)
    stage = Stage(f"reweighting of {model}|{scenario.key}", lambda message: print(message, file=sys.stderr))
    with gpu.model(model, catalogue.models, stage=stage) as loaded:
        asking = Asking(loaded, how, scenario.outcome, None, scorer, scores)
        heads = _heads(loaded, layers)
        impacts, seconds = {}, {}
        for method in ("reweight", "regenerate"):
            began = time.perf_counter()
            impacts[method] = impacts_on(
                asking, (learned, asked), scenario, Removal(method), resamples=resamples, heads=heads
            )
            seconds[method] = (time.perf_counter() - began) / len(heads)
    rows = _rows(impacts["reweight"], impacts["regenerate"], known, seconds)
    rows = rows.with_columns(model=pl.lit(model), scenario=pl.lit(scenario.key)).select(TABLES["reweighting"].names)
    warehouse.replace_partition("reweighting", rows, {"model": model, "scenario": scenario.key})
    return rows


def _heads(loaded: "LoadedModel", layers: str) -> list[tuple[int, int]]:
    """The heads of the layers named, with commas between them; without any, of `LAYERS` evenly spaced ones."""
    total = loaded.topology.layers
    spaced = [min(round((place + 0.5) * total / LAYERS), total - 1) for place in range(LAYERS)]
    chosen = [int(layer) for layer in layers.split(",")] if layers else spaced
    return [(layer, head) for layer in chosen for head in range(loaded.topology.heads)]


def _rows(
    reweighted: pl.DataFrame, regenerated: pl.DataFrame, known: pl.DataFrame, seconds: Mapping[str, float]
) -> pl.DataFrame:
    """Both impacts of every head side by side. known: rows of `head_impacts`. seconds: a head, by method."""
    first = reweighted.select(
        "layer", "head", "ess", z_reweighted="z_bias", low_reweighted="z_bias_low", high_reweighted="z_bias_high"
    )
    second = regenerated.select(
        "layer", "head", z_regenerated="z_bias", low_regenerated="z_bias_low", high_regenerated="z_bias_high"
    )
    perplexity = known.select("layer", "head", "perplexity_without")
    both = first.join(second, on=["layer", "head"]).join(perplexity, on=["layer", "head"], how="left")
    return both.with_columns(
        catastrophic=pl.col("perplexity_without") > CATASTROPHIC * known["perplexity_without"].median(),
        seconds_reweighted=pl.lit(seconds["reweight"]),
        seconds_regenerated=pl.lit(seconds["regenerate"]),
    )


if __name__ == "__main__":
    run(main)
