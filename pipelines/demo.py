"""The demo: one audit, run through Dagster from a terminal, with its result as a table.

It runs the job `audit_scenario` on the instance of this folder, so that the UI shows the run afterwards, and shows
progress instead of Dagster's log. Anything it prints it reads from the warehouse or the run; it computes nothing.
"""

import argparse
import os
import sys
import textwrap
import time
from collections.abc import Sequence

import dagster as dg

from assets.partitions import Catalogue, read_catalogue
from assets.upstream import thresholds_of
from excise.conditions import LEVELS
from excise.errors import ExciseError
from excise.evaluation.verdicts import verdicts
from excise.reporting.audit_table import audit_table
from excise.reporting.stability import stability_finding
from excise.reporting.words import reuse_sentence
from excise.scenarios import Scenario
from excise.scenarios.subsets import ATTRIBUTION
from pipelines.definitions import MODEL_FILES, SCENARIO_FOLDERS, SCORER_FILES, STRATEGY_FILES, build_definitions
from pipelines.jobs import audit_scenario
from pipelines.runs import execute, open_instance
from pipelines.terminal import INCOMPLETE, MISUSED, STATUSES, run
from pipelines.verdict import add_fail_on, conclude, unjudged
from resources.settings import AuditSettings, Preset
from resources.warehouse import Warehouse
from resources.watch import TerminalWatch

STRATEGIES = "set_difference,gap_gradient"
"""One of the paper and ours: enough for a first look, and half of the time of all."""
VARIATIONS = 2
"""So many of the quick preset's variations. Of two, the mask made from the other one is the other's own, so every path
is followed once and serves two levels."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the status is one of `pipelines.terminal.STATUSES`, with a message on standard error.

    Raises ExciseError where nothing can be kept: neither results nor the history of runs.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo",
        description="Audit and prune a model in a scenario, and show what it did.",
        epilog=STATUSES,
    )
    parser.add_argument("--model", default="planted-specific", help="key of a model in models.yaml")
    parser.add_argument("--scenario", default="purchase", help="key of a scenario")
    parser.add_argument("--preset", default="quick", choices=[preset.value for preset in Preset])
    parser.add_argument(
        "--strategies", default=STRATEGIES, help="keys of strategies, comma between them; all for all that are enabled"
    )
    parser.add_argument(
        "--variations", help=f"keys of variations, comma between them (quick: the preset's first {VARIATIONS})"
    )
    add_fail_on(parser)
    chosen = parser.parse_args(arguments)

    catalogue = read_catalogue(SCENARIO_FOLDERS, MODEL_FILES, STRATEGY_FILES, SCORER_FILES)
    for key, known in ((chosen.model, catalogue.models), (chosen.scenario, catalogue.scenarios)):
        if key not in known:
            print(known.why_not(key), *catalogue.problems, sep="\n", file=sys.stderr)
            return MISUSED
    if not catalogue.scenarios[chosen.scenario].outcome.pairwise:
        print(
            f"The scenario {chosen.scenario} judges continuations: run make heads AXES={chosen.scenario}, or choose "
            "one that asks for a number.",
            file=sys.stderr,
        )
        return MISUSED

    definitions = build_definitions(catalogue=catalogue, resource_overrides={"watch": TerminalWatch()})
    warehouse = definitions.resources["warehouse"]
    try:
        settings = settings_of(catalogue, catalogue.scenarios[chosen.scenario], chosen)
    except ExciseError as error:
        print(error, file=sys.stderr)
        return MISUSED
    print(
        f"Auditing {chosen.model} in the scenario {chosen.scenario}, preset {chosen.preset}. "
        "The first run prepares the model and samples everything; a later one reuses what has not changed.\n",
        file=sys.stderr,
    )
    began = time.monotonic()
    with open_instance(warehouse) as instance:
        result = execute(definitions, instance, audit_scenario.name, f"{chosen.model}|{chosen.scenario}", settings)
    if not result.success:
        print(*failure_messages(result), "Nothing computed so far is lost.", sep="\n", file=sys.stderr)
        return INCOMPLETE
    print(_closing(result, warehouse, catalogue, chosen.model, chosen.scenario, time.monotonic() - began))
    scenario = catalogue.scenarios[chosen.scenario]
    return conclude(warehouse, chosen.model, [scenario], evaluated=[scenario.key], failed=False, fail_on=chosen.fail_on)


def settings_of(catalogue: Catalogue, scenario: Scenario, chosen: argparse.Namespace) -> dict[str, object]:
    """The run's settings. Raises ExciseError for a strategy that there is none of."""
    settings: dict[str, object] = {"preset": chosen.preset}
    if chosen.strategies != "all":
        settings["strategies"] = _keys(chosen.strategies)
        catalogue.chosen_strategies(settings["strategies"], LEVELS, scenario.outcome.audited_as)
    if chosen.variations:
        settings["variations"] = _keys(chosen.variations)
    elif Preset(chosen.preset) is Preset.quick:
        settings["variations"] = list(AuditSettings().audit_of(scenario).variations[:VARIATIONS])
    return settings


def _keys(text: str) -> list[str]:
    return [key.strip() for key in text.split(",")]


def failure_messages(result: dg.ExecuteInProcessResult) -> list[str]:
    """What went wrong: for a mistake the user can mend its message, for anything else Dagster's trace."""
    messages = []
    for event in result.get_step_failure_events():
        data = event.step_failure_data
        if data.user_failure_data is not None and data.user_failure_data.description:
            messages.append(f"{event.step_key}: {data.user_failure_data.description}")
        else:
            messages.append(f"{event.step_key}: {data.error.to_string()}")
    return messages or ["The run failed; its log is in the UI (make ui)."]


def _closing(
    result: dg.ExecuteInProcessResult,
    warehouse: Warehouse,
    catalogue: Catalogue,
    model: str,
    scenario_key: str,
    seconds: float,
) -> str:
    scenario = catalogue.scenarios[scenario_key]
    labels = {side: scenario.groups[getattr(scenario.comparison, side)].label for side in ("majority", "minority")}
    judged = thresholds_of(warehouse, "evaluation_metrics", model, scenario_key)
    metrics, effects = (
        warehouse.read(table, model=model, scenario=scenario_key) for table in ("metrics", "side_effects")
    )
    table = audit_table(
        metrics,
        scenario_title=scenario.title,
        unit=scenario.outcome.counted_in,
        inlier_floor=judged.inlier_floor,
        inlier_tolerance=judged.inlier_tolerance,
        verdicts=verdicts(metrics, effects, judged),
        **labels,
    )
    seen = {
        event.asset_key.to_user_string(): {name: value.value for name, value in event.materialization.metadata.items()}
        for event in result.get_asset_materialization_events()
    }
    completions, pruned = seen["completions"], seen["pruned_completions"]
    drawn = completions["completions_drawn"] + pruned["completions_drawn"]
    reused = completions["completions_reused"] + pruned["completions_reused"]
    scores, masks = seen["attribution_scores"], seen["pruning_masks"]
    figures = warehouse.path.parent / "figures" / model / scenario_key
    place = {"model": model, "scenario": scenario_key}
    held_out = ATTRIBUTION in set(warehouse.read("completions", **place)["split"])
    lines = [
        table,
        textwrap.fill(stability_finding(warehouse.read("stability", **place), held_out=held_out), 160),
        "",
        f"Done in {seconds:.0f} s. {reuse_sentence(drawn, reused)}",
        f"Attribution scores: {scores['files_computed']} computed, {scores['files_reused']} reused. "
        f"Mask files: {masks['mask_files_written']} written, {masks['mask_files_reused']} known already.",
        *unjudged(warehouse, model, [scenario]),
        "",
        "Where to look next:",
        "  make ui                  the lineage, pictures and checks of this run, at http://127.0.0.1:3000",
        f"  {_near(figures)}/    the figures as PNG and SVG",
        f"  {_near(warehouse.path)}      every answer and metric, as DuckDB tables (docs/data.md)",
    ]
    return "\n".join(lines)


def _near(path) -> str:
    """The path as a user in this folder would type it."""
    return str(path.relative_to(os.getcwd())) if path.is_relative_to(os.getcwd()) else str(path)


if __name__ == "__main__":
    run(main)
