"""What a command's exit status says: whether everything asked for was computed, and which checks fail.

Both are read from the warehouse, so that a rerun that had nothing to do says the same as the run that did the work.
"""

import argparse
import sys
from collections.abc import Collection, Iterable, Sequence

import polars as pl

from excise.conditions import ALL, NO_STRATEGY
from excise.evaluation.judged import explained, judged_of
from excise.scenarios import Scenario
from pipelines.terminal import CHECKS_FAILED, DONE, INCOMPLETE
from resources.warehouse import Warehouse

COUNTED = {"errors": ("ERROR",), "checks": ("ERROR", "WARN")}
"""What --fail-on takes, and the severities of checks it counts."""
GAPS = ("gap_mean", "toxicity_bias")
"""The metrics without which a variation is not judged."""


def add_fail_on(parser: argparse.ArgumentParser) -> None:
    """Give a command the option --fail-on."""
    parser.add_argument(
        "--fail-on",
        choices=list(COUNTED),
        help="end with status 3 if a check fails: checks counts all of them, errors those of severity ERROR alone",
    )


def unjudged(warehouse: Warehouse, model: str, scenarios: Iterable[Scenario]) -> list[str]:
    """Lines for standard output: an empty one and two more per scenario with variations that cannot be judged."""
    lines = []
    for scenario in scenarios:
        completions = warehouse.read("completions", model=model, scenario=scenario.key)
        if not completions.is_empty() and (reasons := explained(completions, scenario)):
            lines += ["", *reasons]
    return lines


def conclude(
    warehouse: Warehouse,
    model: str,
    scenarios: Sequence[Scenario],
    *,
    evaluated: Collection[str],
    failed: bool,
    fail_on: str | None,
) -> int:
    """The exit status of a command that prepared the scenarios for a model; says on standard error why.

    evaluated: keys of those that were evaluated, too. failed: a run failed, which has been told already, as have the
    lines of `unjudged`.
    """
    lacking = [
        sentence
        for scenario in scenarios
        for sentence in _lacking(warehouse, model, scenario, scenario.key in evaluated)
    ]
    if lacking:
        print(f"Not everything asked for was computed: {'; '.join(lacking)}.", file=sys.stderr)
    checks = warehouse.read("checks", model=model, scenario=[scenario.key for scenario in scenarios]).filter(
        ~pl.col("passed")
    )
    told_already = (pl.col("asset") == "completions") & (pl.col("check_name") == "judged_variations")
    for row in checks.filter(~told_already).sort("scenario", "asset", "check_name").iter_rows(named=True):
        place = f"{row['asset']}, {row['model']}|{row['scenario']}"
        print(f"Check {row['check_name']} of {place} ({row['severity']}): {row['message']}", file=sys.stderr)
    if failed or lacking:
        return INCOMPLETE
    if fail_on and checks["severity"].is_in(COUNTED[fail_on]).any():
        return CHECKS_FAILED
    return DONE


def _lacking(warehouse: Warehouse, model: str, scenario: Scenario, evaluated: bool) -> list[str]:
    """What of a scenario has no figure, as parts of a sentence; what failed as a whole has its message already."""
    answers = warehouse.read("completions", model=model, scenario=scenario.key)
    if answers.is_empty():
        return []
    asked = answers["variation"].unique(maintain_order=True).to_list()
    able = judged_of(answers, scenario)
    lacking = {"too few answers have a value": [key for key in asked if key not in able]}
    metrics = warehouse.read("metrics", model=model, scenario=scenario.key) if evaluated else pl.DataFrame()
    if not metrics.is_empty():
        figures = metrics.filter(
            (pl.col("strategy") == NO_STRATEGY)
            & pl.col("metric").is_in(GAPS)
            & pl.col("estimate").is_finite()
            & (pl.col("variation") != ALL)
        )["variation"].to_list()
        lacking["it is undefined, though answers have values"] = [key for key in able if key not in figures]
    return [f"{model}|{scenario.key} has no gap for {', '.join(keys)} ({why})" for why, keys in lacking.items() if keys]
