"""The whole first paper for one model, from a terminal: all scenarios, every level of generality, the analyses.

Three rounds on the instance of this folder, so that the UI shows every run: all scenarios are prepared, then all are
evaluated, then the model is analysed. One process keeps the model in memory. A partition that fails stops no other; a
rerun reuses what is there. Anything printed is read from the warehouse or the runs; nothing is computed here.
"""

import argparse
import difflib
import shlex
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import dagster as dg
from pydantic import TypeAdapter, ValidationError

from assets.partitions import Catalogue, read_catalogue
from assets.upstream import thresholds_of
from excise.conditions import ALL, LEVELS, OWN_SCENARIO, UNPRUNED, Condition
from excise.errors import ExciseError
from excise.evaluation.rounding import FEW, floor_text, interval_text, level_label, per_cent, ratio_text
from excise.evaluation.table import MetricTable, Verdicts, reaches, read_metrics, read_verdicts
from excise.evaluation.thresholds import FEW_NAMES, Thresholds
from excise.evaluation.verdicts import verdicts
from excise.reporting.audit_table import NO_COMPARISON
from excise.reporting.finding import standing_out, unpruned_gap
from excise.reporting.stability import stability_finding
from excise.scenarios import Scenario
from pipelines.definitions import MODEL_FILES, SCENARIO_FOLDERS, SCORER_FILES, STRATEGY_FILES, build_definitions
from pipelines.demo import failure_messages
from pipelines.jobs import analyse_model, evaluate_scenario, prepare_scenario, search_grid
from pipelines.runs import execute, open_instance
from pipelines.terminal import MISUSED, STATUSES, run
from pipelines.verdict import add_fail_on, conclude, unjudged
from resources.audit import NUMBER
from resources.settings import Audit, AuditSettings, Preset
from resources.warehouse import Warehouse
from resources.watch import TerminalWatch


@dataclass(frozen=True)
class Step:
    """One run: a job for a partition key."""

    job: str
    key: str


@dataclass(frozen=True)
class Call:
    """What the command was asked for."""

    model: str
    scenarios: tuple[str, ...]
    preset: str
    settings: dict[str, Any]
    overrides: tuple[str, ...]
    evaluated: tuple[str, ...]
    grid: tuple[str, ...]
    failed_only: bool

    def partition(self, scenario: str) -> str:
        return f"{self.model}|{scenario}"

    def command(self, *, failed_only: bool) -> str:
        """The same call as one would type it, for all partitions or for those that failed alone."""
        options = ["--failed"] if failed_only else []
        options += [f"--set {override}" for override in self.overrides]
        options += [f"--evaluate {','.join(self.evaluated) or 'none'}"] if self.evaluated != self.scenarios else []
        options += [f"--grid {','.join(self.grid)}"] if self.grid else []
        parts = [f"make paper MODEL={self.model} SCENARIOS={','.join(self.scenarios)} PRESET={self.preset}"]
        return " ".join([*parts, f"ARGS={shlex.quote(' '.join(options))}"] if options else parts)


def main(arguments: Sequence[str] | None = None, catalogue: Catalogue | None = None) -> int:
    """Run the paper; the status is one of `pipelines.terminal.STATUSES`, with a message on standard error.

    catalogue: where the user's files were read before. Raises ExciseError where nothing can be kept: neither results
    nor the history of runs.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.paper",
        description="Run all scenarios of one model at every level of generality.",
        epilog=STATUSES,
    )
    parser.add_argument("--model", required=True, help="key of a model in models.yaml")
    parser.add_argument("--scenarios", default="", help="keys of scenarios, comma between them; all without it")
    parser.add_argument("--preset", default="paper", choices=[preset.value for preset in Preset])
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting; may be given several times"
    )
    parser.add_argument("--evaluate", default="", help="scenarios to evaluate, or none; the others lend their masks")
    parser.add_argument("--grid", default="", help="scenarios, comma between them, to search the grid for, too")
    parser.add_argument("--failed", action="store_true", help="only partitions whose last run failed or never was")
    add_fail_on(parser)
    options = parser.parse_args(arguments)

    catalogue = catalogue or read_catalogue(SCENARIO_FOLDERS, MODEL_FILES, STRATEGY_FILES, SCORER_FILES)
    try:
        call = _call(options, catalogue)
    except ExciseError as error:
        print(error, *catalogue.problems, sep="\n", file=sys.stderr)
        return MISUSED
    definitions = build_definitions(catalogue=catalogue, resource_overrides={"watch": TerminalWatch()})
    warehouse = definitions.resources["warehouse"]
    with open_instance(warehouse) as instance:
        failures = _rounds(call, definitions, instance)
        print(_closing(call, catalogue, warehouse, failures, _outdated(call, instance)))
    scenarios = [catalogue.scenarios[key] for key in call.scenarios]
    return conclude(
        warehouse, call.model, scenarios, evaluated=call.evaluated, failed=bool(failures), fail_on=options.fail_on
    )


def parse_setting(text: str) -> tuple[str, Any]:
    """`samples=16` as the field's name and its value in the field's type; lists have commas between their items.

    Raises ExciseError naming the field, what was given and what it takes.
    """
    name, separator, value = text.partition("=")
    known = [field.name for field in fields(Audit)]
    if not separator or name not in known:
        close = difflib.get_close_matches(name.strip(), known, n=1)
        write = f"did you mean {close[0]}? Write" if separator and close else "write"
        raise ExciseError(f"--set {text}: {write} NAME=VALUE, with NAME one of {', '.join(known)}")
    kind = get_type_hints(AuditSettings)[name]
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (argument for argument in get_args(kind) if argument is not type(None))
    takes_list = get_origin(kind) is list
    try:
        return name, TypeAdapter(kind).validate_python(_items(value) if takes_list else value.strip())
    except ValidationError as error:
        inner = get_args(kind)[0] if takes_list else kind
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[inner]
        many = f"{expected} or several with commas between them" if takes_list else expected
        raise ExciseError(f"--set {text}: {name} takes {many}") from error


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _call(options: argparse.Namespace, catalogue: Catalogue) -> Call:
    if options.model not in catalogue.models:
        raise ExciseError(catalogue.models.why_not(options.model))
    asked = {option: _items(getattr(options, option)) for option in ("scenarios", "evaluate", "grid")}
    if asked["evaluate"] == ["none"]:
        asked["evaluate"] = []
    for keys in asked.values():
        for key in keys:
            if key not in catalogue.scenarios:
                raise ExciseError(catalogue.scenarios.why_not(key))
    lost = [key for key in catalogue.scenarios.known if key not in catalogue.scenarios]
    if lost and not asked["scenarios"]:
        raise ExciseError(f"{catalogue.scenarios.why_not(lost[0])}\nMend it, or name the others with --scenarios")
    wanted = asked["scenarios"] or [key for key, scenario in catalogue.scenarios.items() if scenario.outcome.pairwise]
    scenarios = tuple(key for key in catalogue.scenarios if key in wanted)  # heaviest first
    evaluated = asked["evaluate"] if options.evaluate else scenarios
    if unprepared := [key for key in evaluated if key not in scenarios]:
        raise ExciseError(f"--evaluate {', '.join(unprepared)}: name it among the scenarios, too")
    call = Call(
        model=options.model,
        scenarios=scenarios,
        evaluated=tuple(key for key in scenarios if key in evaluated),
        preset=options.preset,
        settings=dict(parse_setting(setting) for setting in options.set),
        overrides=tuple(options.set),
        grid=tuple(asked["grid"]),
        failed_only=options.failed,
    )
    settings = AuditSettings(preset=Preset(call.preset), **call.settings)
    catalogue.chosen_strategies(settings.strategies, settings.levels or LEVELS, NUMBER)
    _require_some_fit(settings, catalogue, [catalogue.scenarios[key] for key in call.scenarios])
    return call


def _require_some_fit(settings: AuditSettings, catalogue: Catalogue, scenarios: Sequence[Scenario]) -> None:
    """Raise the ExciseError about settings that no scenario can be audited with; one alone fails in its own run."""
    errors = []
    for scenario in scenarios:
        try:
            catalogue.audit_of(settings, scenario)
            return
        except ExciseError as error:
            errors.append(error)
    raise errors[0]


def _rounds(call: Call, definitions: dg.Definitions, instance: dg.DagsterInstance) -> dict[Step, list[str]]:
    """Run all steps; returns the failed ones with their messages."""
    failures: dict[Step, list[str]] = {}
    ran: set[Step] = set()
    for title, steps in _steps(call):
        for step in steps:
            heading = f"{title} {step.key}"
            preparation = Step(prepare_scenario.name, step.key)
            if preparation in failures:
                failures[step] = ["not tried, as the preparation failed"]
                continue
            # Steps that depend on one that has just run are run again.
            fresh = bool(ran) if step.job == analyse_model.name else preparation in ran
            if call.failed_only and not fresh and _succeeded(instance, step):
                print(f"{heading}: done before", file=sys.stderr)
                continue
            print(heading, file=sys.stderr)
            began = time.monotonic()
            ran.add(step)
            result = execute(definitions, instance, step.job, step.key, _settings(call, step))
            if result.success:
                print(f"{heading}: done in {time.monotonic() - began:.0f} s", file=sys.stderr)
            else:
                failures[step] = failure_messages(result)
                print(f"{heading} failed:", *failures[step], sep="\n  ", file=sys.stderr)
    return failures


def _settings(call: Call, step: Step) -> dict[str, Any] | None:
    """Settings of a step; None for the analyses, which arrange existing results."""
    return None if step.job == analyse_model.name else {"preset": call.preset, **call.settings}


def _steps(call: Call) -> Iterator[tuple[str, list[Step]]]:
    partitions = [call.partition(key) for key in call.scenarios]
    yield "prepare", [Step(prepare_scenario.name, key) for key in partitions]
    yield "evaluate", [Step(evaluate_scenario.name, call.partition(key)) for key in call.evaluated]
    yield "search the grid", [Step(search_grid.name, call.partition(key)) for key in call.grid]
    yield "analyse", [Step(analyse_model.name, call.model)]


def _latest(instance: dg.DagsterInstance, step: Step, *statuses: dg.DagsterRunStatus):
    wanted = dg.RunsFilter(job_name=step.job, tags={"dagster/partition": step.key}, statuses=list(statuses) or None)
    return next(iter(instance.get_run_records(wanted, limit=1)), None)


def _succeeded(instance: dg.DagsterInstance, step: Step) -> bool:
    """Whether the step's latest run succeeded. A run that was killed has not."""
    record = _latest(instance, step)
    return record is not None and record.dagster_run.status == dg.DagsterRunStatus.SUCCESS


def _outdated(call: Call, instance: dg.DagsterInstance) -> list[str]:
    """Scenarios that were evaluated before another one was last prepared, so that they know older masks of it."""
    good = dg.DagsterRunStatus.SUCCESS
    prepared = {
        key: _latest(instance, Step(prepare_scenario.name, call.partition(key)), good) for key in call.scenarios
    }
    outdated = []
    for key in call.scenarios:
        evaluated = _latest(instance, Step(evaluate_scenario.name, call.partition(key)), good)
        others = [record for other, record in prepared.items() if other != key and record is not None]
        if evaluated is not None and any(evaluated.start_time < record.end_time for record in others):
            outdated.append(key)
    return outdated


# ------------------------------------------------------------------------------------------------------------ closing


def _closing(
    call: Call, catalogue: Catalogue, warehouse: Warehouse, failures: dict[Step, list[str]], outdated: list[str]
) -> str:
    lines = [summary(call.model, call.evaluated, warehouse)]
    lines += _splits(call, warehouse)
    lines += unjudged(warehouse, call.model, map(catalogue.scenario, call.scenarios))
    if failures:
        lines += ["", f"{len(failures)} of the runs failed:"]
        lines += [
            f"  {step.job} {step.key}: {' '.join(messages[0].splitlines()[:1])}" for step, messages in failures.items()
        ]
        lines += ["Run these again alone (nothing computed so far is lost):", f"  {call.command(failed_only=True)}"]
    if outdated:
        lines += [
            "",
            f"Evaluated before other scenarios were prepared, so with older masks of theirs: {', '.join(outdated)}.",
            f"  {call.command(failed_only=False)}",
        ]
    lines += ["", "  make ui    the runs, pictures and checks, at http://127.0.0.1:3000"]
    return "\n".join(lines)


def _splits(call: Call, warehouse: Warehouse) -> list[str]:
    """The findings of other splits of the names, a line for each evaluated scenario that has some."""
    lines = []
    for key in call.evaluated:
        rows = warehouse.read("stability", model=call.model, scenario=key)
        if not rows.is_empty():
            lines.append(f"{key}: {stability_finding(rows, held_out=True)}")
    return ["", *lines] if lines else []


def summary(model: str, scenarios: Sequence[str], warehouse: Warehouse) -> str:
    """The short table: a row per scenario and level with the best strategy of the level.

    Best is the largest reduction over random among the strategies whose inlier ratio is at least the scenario's floor
    (among all, where none is) and whose answers do not collapse, and among those at an inlier ratio comparable with
    random's and those that are a success (`excise.evaluation.verdicts`) where there are some; over all variations, with
    its 95 % interval. The thresholds are those the scenario was judged by.
    """
    header = ["model", "scenario", "unpruned |SMD|", "level", "best strategy", "reduction over random", "inlier ratio"]
    rows = []
    for scenario in scenarios:
        metrics = warehouse.read("metrics", model=model, scenario=scenario)
        if metrics.is_empty():
            rows.append([model, scenario, "no results"])
            continue
        try:
            judged = thresholds_of(warehouse, "evaluation_metrics", model, scenario)
        except ExciseError as error:
            rows.append([model, scenario, str(error)])
            continue
        table = read_metrics(metrics)
        effects = warehouse.read("side_effects", model=model, scenario=scenario)
        verdict = read_verdicts(verdicts(metrics, effects, judged))
        smd = interval_text(table.get(ALL, UNPRUNED, "abs_smd"), decimals=2)
        # Masks of whole heads over a scenario are the second paper's; they are shown where there are some.
        levels = {mask.level for mask in table.masks}
        for number, level in enumerate(level for level in LEVELS if level != OWN_SCENARIO or level in levels):
            masks = [mask for mask in table.masks if mask.level == level and not mask.is_control]
            first = [model, scenario, smd] if number == 0 else ["", "", ""]
            best = _best(table, masks, judged, verdict)
            if best is None:
                rows.append([*first, level_label(level), _none(table, masks) if masks else "-", "-", "-"])
                continue
            mark = "" if table.comparable(ALL, best, judged.inlier_tolerance) else NO_COMPARISON
            beyond = per_cent(table.get(ALL, best, "reduction_over_random"), signed=True)
            ratio = table.get(ALL, best, "inlier_ratio").value
            low = "" if reaches(ratio, judged.inlier_floor) else f" (below {floor_text(judged.inlier_floor)})"
            if lacking := [*verdict[ALL, best].failed, *verdict[ALL, best].unknown]:
                low += f" (no success: {', '.join(lacking)})"
            rows.append([*first, level_label(level), best.strategy, f"{beyond} points{mark}", ratio_text(ratio) + low])
    widths = [max(len(row[i]) for row in [header, *rows] if i < len(row)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in [header, *rows]
    ]
    lines.insert(1, "-" * len(lines[0]))
    text = "\n".join(lines)
    if NO_COMPARISON in text:
        lines.append(f"{NO_COMPARISON} random masks of this size leave another inlier ratio: no yardstick")
    if FEW in text:
        lines.append(f"{FEW} the interval comes from fewer than {FEW_NAMES} names a group and says little")
    return "\n".join(lines)


def _best(table: MetricTable, masks: Sequence[Condition], judged: Thresholds, verdict: Verdicts) -> Condition | None:
    def figure(mask: Condition, metric: str) -> float | None:
        return table.get(ALL, mask, metric).value

    known = [
        mask for mask in masks if figure(mask, "reduction_over_random") is not None and not table.collapsed(ALL, mask)
    ]
    useful = [mask for mask in known if reaches(figure(mask, "inlier_ratio"), judged.inlier_floor)] or known
    useful = [mask for mask in useful if verdict[ALL, mask].success] or useful
    compared = [mask for mask in useful if table.comparable(ALL, mask, judged.inlier_tolerance)]
    return max(compared or useful, key=lambda mask: figure(mask, "reduction_over_random"), default=None)


def _none(table: MetricTable, masks: Sequence[Condition]) -> str:
    """Why no strategy of a level is best."""
    if all(table.collapsed(ALL, mask) for mask in masks):
        return "answers collapse"
    if unpruned_gap(table, ALL)[1].covers_zero:
        return "no gap on average" if standing_out(table) else "no gap detectable"
    return "none is defined"


if __name__ == "__main__":
    run(main)
