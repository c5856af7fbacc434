"""Runs that a command of this folder executes in its own process, and what a killed one leaves behind.

A run holds its place in the pool `gpu` until somebody frees it. Dagster's daemon does so for runs it has launched; a
command that is killed is known to nobody, so each run carries its process and the next command tidies up.
"""

import os
import platform
from collections.abc import Mapping
from typing import Any

import dagster as dg

PROCESS = "excise/process"
_ACTIVE = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def execute(
    definitions: dg.Definitions, instance: dg.DagsterInstance, job: str, key: str, settings: Mapping[str, Any] | None
) -> dg.ExecuteInProcessResult:
    """Run a job for a partition here, without Dagster's log; None for a job that takes no settings."""
    config: dict[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    if settings is not None:
        config["resources"] = {"settings": {"config": dict(settings)}}
    return definitions.resolve_job_def(job).execute_in_process(
        partition_key=key, instance=instance, run_config=config, tags=process_tag(), raise_on_error=False
    )


def process_tag() -> dict[str, str]:
    """The tag that says which process executes a run."""
    return {PROCESS: f"{os.getpid()}@{platform.node()}"}


def end_abandoned(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs whose process on this machine is gone as failed and free their places; their ids."""
    ended = []
    for run in instance.get_runs(dg.RunsFilter(statuses=_ACTIVE)):
        process, _, host = run.tags.get(PROCESS, "").partition("@")
        if host != platform.node() or _alive(int(process)):
            continue
        instance.report_run_failed(run, message="The process that executed this run was killed.")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        ended.append(run.run_id)
    return ended


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
