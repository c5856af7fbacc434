"""The second paper for one model, from a terminal: head impacts, pruned heads, and their trade-off, axis by axis.

One scenario runs the job `prune_heads`; several are prepared first and evaluated then, also under each other's masks
(FASP, section 6), and their head impacts correlated. A rerun reuses what is there. Anything printed is read from the
warehouse or the runs; nothing is computed here.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from assets.evaluation_metrics import names_warning
from assets.partitions import Catalogue, read_catalogue
from assets.upstream import thresholds_of
from excise.conditions import CROSS_CONTEXT, OWN_SCENARIO
from excise.errors import ExciseError
from excise.evaluation.bias_correlation import gamma_choice, gamma_points
from excise.evaluation.texts import read_text
from excise.reporting.toxicity import choice_sentence, toxicity_finding, toxicity_table
from pipelines.definitions import (
    MODEL_FILES,
    SCENARIO_FOLDERS,
    SCORER_FILES,
    STRATEGY_FILES,
    build_definitions,
)
from pipelines.demo import failure_messages
from pipelines.jobs import correlate_heads, evaluate_scenario, prepare_heads, prune_heads
from pipelines.paper import parse_setting
from pipelines.runs import execute, open_instance
from pipelines.terminal import MISUSED, STATUSES, run
from pipelines.verdict import add_fail_on, conclude, unjudged
from resources.settings import AuditSettings, Preset
from resources.warehouse import Warehouse
from resources.watch import TerminalWatch


def main(arguments: Sequence[str] | None = None, catalogue: Catalogue | None = None) -> int:
    """Run it; the status is one of `pipelines.terminal.STATUSES`, with a message on standard error.

    catalogue: where the user's files were read before. Raises ExciseError where nothing can be kept: neither results
    nor the history of runs.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.heads",
        description="Prune attention heads by what they do to a disparity (FASP).",
        epilog=STATUSES,
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="key of a model in models.yaml")
    parser.add_argument("--scenarios", default="gender", help="keys of scenarios, comma between them")
    parser.add_argument("--preset", default="quick", choices=[preset.value for preset in Preset])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting; may be given several times"
    )
    add_fail_on(parser)
    options = parser.parse_args(arguments)

    catalogue = catalogue or read_catalogue(SCENARIO_FOLDERS, MODEL_FILES, STRATEGY_FILES, SCORER_FILES)
    scenarios = list(dict.fromkeys(key.strip() for key in options.scenarios.split(",") if key.strip()))
    try:
        settings = _checked(options, catalogue, scenarios)
    except ExciseError as error:
        print(error, *catalogue.problems, sep="\n", file=sys.stderr)
        return MISUSED
    definitions = build_definitions(catalogue=catalogue, resource_overrides={"watch": TerminalWatch()})
    warehouse = definitions.resources["warehouse"]
    failed: list[str] = []
    with open_instance(warehouse) as instance:
        for job, key, config in _steps(options.model, scenarios, settings):
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
    for key in scenarios:
        if f"{options.model}|{key}" not in failed:
            print(_closing(warehouse, catalogue, options.model, key))
    if failed:
        print("Nothing computed so far is lost; the same command goes on.", file=sys.stderr)
    asked = [catalogue.scenarios[key] for key in scenarios]
    return conclude(warehouse, options.model, asked, evaluated=scenarios, failed=bool(failed), fail_on=options.fail_on)


def _checked(options: argparse.Namespace, catalogue: Catalogue, scenarios: Sequence[str]) -> dict[str, object]:
    """The settings by name. Raises ExciseError for what is not there or out of range."""
    if options.model not in catalogue.models:
        raise ExciseError(catalogue.models.why_not(options.model))
    for key in scenarios:
        if key not in catalogue.scenarios:
            raise ExciseError(catalogue.scenarios.why_not(key))
    if not scenarios:
        raise ExciseError("--scenarios: name one at least, for example gender")
    settings = dict(parse_setting(setting) for setting in options.set)
    for key in scenarios:
        scenario = catalogue.scenarios[key]
        if scenario.outcome.pairwise and "strategies" not in settings:
            raise ExciseError(
                f"scenario {key} asks for numbers: name the strategies of heads with --set strategies=fasp"
            )
        audit = catalogue.audit_of(AuditSettings(preset=Preset(options.preset), **settings), scenario)
        if audit.text is not None and not audit.text.startswith("hub:"):
            read_text(audit.text)
    return {"preset": options.preset, **settings}


def _steps(model: str, scenarios: Sequence[str], settings: dict[str, object]) -> list[tuple[str, str, dict | None]]:
    """(job, partition, settings) of every run, in order."""
    keys = [f"{model}|{key}" for key in scenarios]
    if len(keys) == 1:
        alone = {"levels": [OWN_SCENARIO]} | settings
        return [(prune_heads.name, keys[0], alone)]
    across = {"levels": [OWN_SCENARIO, CROSS_CONTEXT], "per_source": True} | settings
    return [
        *((prepare_heads.name, key, across) for key in keys),
        *((evaluate_scenario.name, key, across) for key in keys),
        (correlate_heads.name, model, None),
    ]


def _closing(warehouse: Warehouse, catalogue: Catalogue, model: str, key: str) -> str:
    metrics = warehouse.read("metrics", model=model, scenario=key)
    figures = warehouse.path.parent / "figures" / model / key
    lines = [f"\n{catalogue.scenarios[key].title}: {model}", ""]
    if not catalogue.scenarios[key].outcome.pairwise:
        budget = thresholds_of(warehouse, "evaluation_metrics", model, key).perplexity_budget
        points = gamma_choice(gamma_points(metrics, catalogue.fasp_parameters()), budget)
        finding = toxicity_finding(metrics, perplexity_budget=budget)
        lines += [toxicity_table(metrics), "", finding, "", choice_sentence(points, budget)]
        if (warning := names_warning(catalogue, catalogue.scenarios[key])) is not None:
            lines += ["", warning]
    lines += [*unjudged(warehouse, model, [catalogue.scenarios[key]]), ""]
    lines += [f"Figures: {figures}/ (trade_off, gamma_sweep, head_map, toxicity_by_subgroup); all figures: make ui"]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
