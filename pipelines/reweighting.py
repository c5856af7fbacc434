"""Head impacts twice, by weighing the same answers anew and by drawing them anew: what agrees, and what either costs.

It measures the heads of a few layers of a partition that has completions, on the device and in one process, and keeps
the figures in the table `reweighting`; `pipelines.results` prints them. How impacts are made is
`excise.attribution.head_impacts`.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import polars as pl

from assets.completions import completions_of, scorer_of, without
from assets.partitions import Catalogue, read_catalogue
from excise.errors import ExciseError
from excise.evaluation.judged import compared_groups, judged_of, unit_of
from excise.scenarios.subsets import EVALUATION
from pipelines.definitions import MODEL_FILES, SCENARIO_FOLDERS, SCORER_FILES, STRATEGY_FILES, build_definitions
from pipelines.terminal import DONE, INCOMPLETE, MISUSED, STATUSES, run
from resources.tables import TABLES
from resources.watch import Stage

LAYERS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and store; the status is one of `pipelines.terminal.STATUSES`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.reweighting",
        description="Compare reweighted with regenerated head impacts.",
        epilog=STATUSES,
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="key of a model in models.yaml")
    parser.add_argument("--scenario", default="gender", help="key of a scenario with completions and head impacts")
    parser.add_argument("--layers", default="", help="layers, comma between them; left out, four evenly spaced ones")
    parser.add_argument("--resamples", type=int, default=1000)
    given = parser.parse_args(arguments)
    catalogue = read_catalogue(SCENARIO_FOLDERS, MODEL_FILES, STRATEGY_FILES, SCORER_FILES)
    for key, known in ((given.model, catalogue.models), (given.scenario, catalogue.scenarios)):
        if key not in known:
            print(known.why_not(key), *catalogue.problems, sep="\n", file=sys.stderr)
            return MISUSED
    if given.layers and not all(layer.strip().isdecimal() for layer in given.layers.split(",")):
        print(f"--layers {given.layers}: give numbers of layers with commas between them", file=sys.stderr)
        return MISUSED
    try:
        rows = measure(catalogue, given.model, given.scenario, given.layers, given.resamples)
    except ExciseError as error:
        print(error, file=sys.stderr)
        return INCOMPLETE
    print(rows)
    return DONE


def measure(catalogue: Catalogue, model: str, scenario_key: str, layers: str, resamples: int) -> pl.DataFrame:
    """Rows of the table `reweighting`, which they replace."""
    from excise.attribution.head_impacts import head_impacts
    from excise.evaluation.thresholds import CATASTROPHIC
    from excise.generation.answering import Answering, as_samples
    from excise.outcomes.toxicity import ScoreCache

    resources = build_definitions().resources
    warehouse, artifacts, gpu = (resources[name] for name in ("warehouse", "artifacts", "gpu"))
    scenario = catalogue.scenario(scenario_key)
    outcome, toxicity = scenario.outcome, scenario.outcome.kind == "toxicity"
    learned, asked = without(EVALUATION, *completions_of(warehouse, model, scenario.key))
    known = warehouse.read("head_impacts", model=model, scenario=scenario.key)
    if known.is_empty():
        raise ExciseError(f"{model}|{scenario.key} has no head impacts; run make heads for it first")
    judged = judged_of(learned, scenario)  # as the head impacts do
    learned, asked = (frame.filter(pl.col("variation").is_in(judged)) for frame in (learned, asked))
    how = Answering.of(learned)
    learned = as_samples(learned, how.samples)
    scorer, scores = scorer_of(catalogue, scenario), ScoreCache(artifacts.score_cache)
    groups = compared_groups(scenario)
    stage = Stage(f"reweighting of {model}|{scenario.key}", lambda message: print(message, file=sys.stderr))
    with gpu.model(model, catalogue.models, stage=stage) as loaded:
        total = loaded.topology.layers
        spaced = [round((place + 0.5) * total / LAYERS) for place in range(LAYERS)]
        chosen = [int(layer) for layer in layers.split(",")] if layers else [min(each, total - 1) for each in spaced]
        heads = [(layer, head) for layer in chosen for head in range(loaded.topology.heads)]

        def regenerate(mask):
            rows, _ = how.answers(loaded, asked, outcome=outcome, scorer=scorer, scores=scores, mask=mask)
            return as_samples(rows, how.samples)

        found, seconds = {}, {}
        for method in ("reweight", "regenerate"):
            began = time.perf_counter()
            found[method] = head_impacts(
                loaded.asked_for(outcome),
                asked,
                learned,
                disparity="toxicity" if toxicity else "smd",
                groups=groups,
                cluster=unit_of(outcome),
                parameters=how.parameters,
                regenerate=regenerate,
                method=method,
                resamples=resamples,
                heads=heads,
            )
            seconds[method] = (time.perf_counter() - began) / len(heads)
    first, second = found["reweight"], found["regenerate"]
    perplexity = known.select("layer", "head", "perplexity_without")
    median = known["perplexity_without"].median()
    rows = (
        first.select(
            "layer", "head", "ess", z_reweighted="z_bias", low_reweighted="z_bias_low", high_reweighted="z_bias_high"
        )
        .join(
            second.select(
                "layer", "head", z_regenerated="z_bias", low_regenerated="z_bias_low", high_regenerated="z_bias_high"
            ),
            on=["layer", "head"],
        )
        .join(perplexity, on=["layer", "head"], how="left")
        .with_columns(
            model=pl.lit(model),
            scenario=pl.lit(scenario.key),
            catastrophic=pl.col("perplexity_without") > CATASTROPHIC * median,
            seconds_reweighted=pl.lit(seconds["reweight"]),
            seconds_regenerated=pl.lit(seconds["regenerate"]),
        )
        .select(TABLES["reweighting"].names)
    )
    warehouse.replace_partition("reweighting", rows, {"model": model, "scenario": scenario.key})
    return rows


if __name__ == "__main__":
    run(main)
