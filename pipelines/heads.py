"""The second paper for one model, from a terminal: head impacts, pruned heads, and their trade-off, axis by axis.

One scenario runs the job `prune_heads`; several are prepared first and evaluated then, also under each other's masks
(FASP, section 6), and their head impacts correlated. A rerun reuses what is there. Anything printed is read from the
warehouse or the runs; nothing is computed here.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

import dagster as dg

from assets.partitions import Catalogue, read_catalogue
from excise.bias_correlation import gamma_choice, gamma_points
from excise.errors import ExciseError
from excise.toxicity_report import choice_sentence, toxicity_finding, toxicity_table
from pipelines.definitions import (
    MODEL_FILES,
    ROOT,
    SCENARIO_FOLDERS,
    SCORER_FILES,
    STRATEGY_FILES,
    build_definitions,
)
from pipelines.demo import failure_messages
from pipelines.jobs import correlate_heads, evaluate_scenario, prepare_heads, prune_heads
from pipelines.paper import parse_setting
from pipelines.runs import end_abandoned, execute
from resources.settings import AuditSettings, Preset
from resources.warehouse import Warehouse
from resources.watch import TerminalWatch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 when every partition succeeded, 1 with a message on standard error otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.heads", description="Prune attention heads by what they do to a disparity (FASP)."
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="key of a model in models.yaml")
    parser.add_argument("--scenarios", default="gender", help="keys of scenarios, comma between them")
    parser.add_argument("--preset", default="quick", choices=[preset.value for preset in Preset])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting; may be given several times"
    )
    given = parser.parse_args(arguments)

    os.environ.setdefault("DAGSTER_HOME", str(ROOT))
    catalogue = read_catalogue(SCENARIO_FOLDERS, MODEL_FILES, STRATEGY_FILES, SCORER_FILES)
    scenarios = list(dict.fromkeys(key.strip() for key in given.scenarios.split(",") if key.strip()))
    try:
        settings = _checked(given, catalogue, scenarios)
    except ExciseError as error:
        print(error, *catalogue.problems, sep="\n", file=sys.stderr)
        return 1
    definitions = build_definitions(resource_overrides={"watch": TerminalWatch()})
    failed: list[str] = []
    with dg.DagsterInstance.get() as instance:
        end_abandoned(instance)
        for job, key, config in _steps(given.model, scenarios, settings):
            if key in failed:
                continue
            began = time.monotonic()
            print(f"{job} {key}", file=sys.stderr)
            result = execute(definitions, instance, job, key, config)
            if result.success:
                print(f"{job} {key}: done in {time.monotonic() - began:.0f} s", file=sys.stderr)
            else:
                failed.append(key)
                print(f"{job} {key} failed:", *failure_messages(result), sep="\n  ", file=sys.stderr)
    warehouse = definitions.resources["warehouse"]
    for key in scenarios:
        if f"{given.model}|{key}" not in failed:
            budget = AuditSettings(**settings).audit_of(catalogue.scenarios[key]).perplexity_budget
            print(_closing(warehouse, catalogue, given.model, key, budget))
    if failed:
        print("Nothing computed so far is lost; the same command goes on.", file=sys.stderr)
    return 1 if failed else 0


def _checked(given: argparse.Namespace, catalogue: Catalogue, scenarios: Sequence[str]) -> dict[str, object]:
    """The settings by name. Raises ExciseError for what is not there or out of range."""
    if given.model not in catalogue.models:
        raise ExciseError(f"There is no model {given.model!r}; there are {', '.join(catalogue.models)}.")
    for key in scenarios:
        if key not in catalogue.scenarios:
            raise ExciseError(f"There is no scenario {key!r}; there are {', '.join(catalogue.scenarios)}.")
    if not scenarios:
        raise ExciseError("--scenarios: name one at least, for example gender")
    settings = dict(parse_setting(each) for each in given.set)
    for key in scenarios:
        scenario = catalogue.scenarios[key]
        audit = AuditSettings(preset=Preset(given.preset), **settings).audit_of(scenario)
        catalogue.chosen_strategies(audit.strategies, audit.levels, scenario.outcome.kind, audit.alphas)
        if scenario.outcome.kind == "number" and audit.strategies is None:
            raise ExciseError(
                f"scenario {key} asks for numbers: name the strategies of heads with --set strategies=fasp"
            )
    return {"preset": given.preset, **settings}


def _steps(model: str, scenarios: Sequence[str], settings: dict[str, object]) -> list[tuple[str, str, dict | None]]:
    """(job, partition, settings) of every run, in order."""
    keys = [f"{model}|{key}" for key in scenarios]
    if len(keys) == 1:
        alone = {"levels": ["own_scenario"]} | settings
        return [(prune_heads.name, keys[0], alone)]
    across = {"levels": ["own_scenario", "cross_context"], "per_source": True} | settings
    return [
        *((prepare_heads.name, key, across) for key in keys),
        *((evaluate_scenario.name, key, across) for key in keys),
        (correlate_heads.name, model, None),
    ]


def _closing(warehouse: Warehouse, catalogue: Catalogue, model: str, key: str, budget: float) -> str:
    metrics = warehouse.read("metrics", model=model, scenario=key)
    figures = warehouse.path.parent / "figures" / model / key
    lines = [f"\n{catalogue.scenarios[key].title}: {model}", ""]
    if catalogue.scenarios[key].outcome.kind == "toxicity":
        points = gamma_choice(gamma_points(metrics, catalogue.fasp_parameters()), budget)
        lines += [toxicity_table(metrics), "", toxicity_finding(metrics), "", choice_sentence(points, budget)]
    lines += [f"Figures: {figures}/ (trade_off, gamma_sweep, head_map, toxicity_by_subgroup); all figures: make ui"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
