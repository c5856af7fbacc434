"""Runs that a command of this folder executes in its own process, and what a killed one leaves behind.

A run holds its place in the pool `gpu` until somebody frees it. Dagster's daemon does so for runs it has launched; a
command that is killed is known to nobody, so each run carries its process and the next command tidies up. While a run
waits for its place, the terminal says which run holds it; the wait for other folders' runs is `resources.locks`'.
"""

import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg

from excise.errors import ExciseError
from pipelines.definitions import ROOT
from pipelines.terminal import interrupted, leave_interrupted, repeat
from resources.warehouse import Warehouse

PROCESS = "excise/process"
POOL = "gpu"
NOTICE_EVERY = 60.0
"""Seconds between two messages about the same wait."""
REPEATED_EVERY = 3.0
"""Seconds after which a run that was asked to stop, and has not, is asked again."""
FREED_AFTER = 30.0
"""Seconds after its end in which a run's steps may still be at work."""
_ACTIVE = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def open_instance(warehouse: Warehouse) -> dg.DagsterInstance:
    """The instance DAGSTER_HOME names, without it that of this folder, tidied up.

    Puts the absolute path into DAGSTER_HOME, as Dagster takes no other. Raises ExciseError, before any work, where
    Dagster cannot use the folder or results cannot be kept in `warehouse`.
    """
    import sqlalchemy.exc
    import yaml

    home = Path(os.environ.get("DAGSTER_HOME") or ROOT).expanduser().absolute()
    if not home.is_dir():
        raise ExciseError(f"DAGSTER_HOME: {home} is no folder; make it, or leave the variable out")
    if any(letter in str(home) for letter in "?%"):
        raise ExciseError(f"DAGSTER_HOME: Dagster keeps no history in {home}; name a folder without ? and %")
    os.environ["DAGSTER_HOME"] = str(home)
    try:
        instance = dg.DagsterInstance.get()
        end_abandoned(instance)
    except (dg.DagsterError, sqlalchemy.exc.SQLAlchemyError, yaml.YAMLError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExciseError(f"DAGSTER_HOME: Dagster cannot use {home} ({reason})") from error
    warehouse.check()
    return instance


def execute(
    definitions: dg.Definitions, instance: dg.DagsterInstance, job: str, key: str, settings: Mapping[str, Any] | None
) -> dg.ExecuteInProcessResult:
    """Run a job for a partition here, without Dagster's log; None for a job that takes no settings.

    Raises KeyboardInterrupt where the run was stopped, which Dagster counts as a failure like any other, and
    BrokenPipeError where nobody reads what it tells.
    """
    config: dict[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    if settings is not None:
        config["resources"] = {"settings": {"config": dict(settings)}}
    run_id = str(uuid.uuid4())
    with _waiting_told(instance, run_id):
        result = definitions.resolve_job_def(job).execute_in_process(
            partition_key=key,
            instance=instance,
            run_config=config,
            tags=process_tag(),
            raise_on_error=False,
            run_id=run_id,
        )
    failures = [event.step_failure_data for event in result.get_step_failure_events()]
    if interrupted() or any(failure.error_source and failure.error_source.value == "INTERRUPT" for failure in failures):
        raise KeyboardInterrupt
    if any(failure.error and failure.error.cls_name == "BrokenPipeError" for failure in failures):
        raise BrokenPipeError
    return result


def process_tag() -> dict[str, str]:
    """The tag that says which process executes a run."""
    return {PROCESS: f"{os.getpid()}@{platform.node()}"}


def end_abandoned(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs whose process on this machine is gone as failed and free their places, and those of runs that are over.

    Returns the ids of the runs that were ended.
    """
    ended = []
    for run in instance.get_runs(dg.RunsFilter(statuses=_ACTIVE)):
        process, _, host = run.tags.get(PROCESS, "").partition("@")
        if host != platform.node() or _alive(int(process)):
            continue
        instance.report_run_failed(run, message="The process that executed this run was killed.")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        ended.append(run.run_id)
    for slot in instance.event_log_storage.get_concurrency_info(POOL).claimed_slots:
        record = instance.get_run_record_by_id(slot.run_id)
        if record is None or (record.dagster_run.is_finished and time.time() - (record.end_time or 0.0) > FREED_AFTER):
            instance.event_log_storage.free_concurrency_slots_for_run(slot.run_id)
    return ended


@contextmanager
def _waiting_told(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """During the run, say on standard error when it waits for its place in the pool, and end it when asked to."""
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(instance, run_id, over), daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell(instance: dg.DagsterInstance, run_id: str, over: threading.Event) -> None:
    began = noticed = repeated = None
    while not over.wait(1.0):
        now = time.monotonic()
        pool = instance.event_log_storage.get_concurrency_info(POOL)
        if not any(step.run_id == run_id and step.assigned_timestamp is None for step in pool.pending_steps):
            if interrupted() and (repeated is None or now - repeated > REPEATED_EVERY):
                repeated = now
                repeat()
            began = noticed = None
            continue
        if interrupted():  # between steps Dagster only notes that it was asked to stop
            instance.report_run_failed(instance.get_run_by_id(run_id), message="Stopped while it waited.")
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)
            leave_interrupted()
        end_abandoned(instance)
        began = began or now
        # Without a holder the place has just become free, unless the pool has none.
        if (pool.claimed_slots or not pool.slot_count) and (noticed is None or now - noticed >= NOTICE_EVERY):
            noticed = now
            holders = [_holder(instance, slot.run_id, slot.step_key) for slot in pool.claimed_slots]
            print(
                f"waiting for the device, in use by {' and '.join(holders) or 'nobody: the pool gpu has no place'}"
                f"; {now - began:.0f} s so far",
                file=sys.stderr,
            )


def _holder(instance: dg.DagsterInstance, run_id: str, step: str) -> str:
    """Process, stage, partition and run of a step that has a place in the pool, and since when."""
    run = instance.get_run_by_id(run_id)
    work, process = step, ""
    if run is not None:
        work += f" of {run.tags.get('dagster/partition', run.job_name)}"
        process = run.tags.get(PROCESS, "").partition("@")[0] or _process_noted(instance, run_id)
    parts = [work, f"run {run_id[:8]}"]
    for stats in instance.get_run_step_stats(run_id, [step]):
        if stats.start_time:
            parts.append(f"since {datetime.fromtimestamp(stats.start_time):%Y-%m-%d %H:%M}")
    if process and not _alive(int(process)):
        parts.append("a process that is not on this machine: if it has died, terminate its run in the UI, make ui")
    return f"process {process or 'unknown'} ({', '.join(parts)})"


def _process_noted(instance: dg.DagsterInstance, run_id: str) -> str:
    """The process that Dagster noted when it began to execute a run, as it does for those from the UI."""
    for record in instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT).records:
        metadata = record.event_log_entry.dagster_event.engine_event_data.metadata
        if "pid" in metadata and "step_keys" in metadata:
            return str(metadata["pid"].value)
    return ""


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
