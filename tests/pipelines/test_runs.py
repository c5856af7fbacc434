"""What a killed command leaves behind does not stand in the next one's way."""

import os
import platform
import subprocess
import sys

import dagster as dg
import pytest

from pipelines.runs import PROCESS, end_abandoned, process_tag

POOL = "gpu"


@pytest.fixture
def instance(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as made:
        made.event_log_storage.set_concurrency_slots(POOL, 1)
        yield made


def holding(instance, tags):
    """A run that was started with these tags and holds the pool's only place."""
    run = instance.add_run(dg.DagsterRun(job_name="audit", status=dg.DagsterRunStatus.STARTED, tags=tags))
    assert instance.event_log_storage.claim_concurrency_slot(POOL, run.run_id, "step").is_claimed
    return run


def gone() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_run_whose_process_is_gone_ends_and_gives_its_place_back(instance):
    run = holding(instance, {PROCESS: f"{gone()}@{platform.node()}"})
    assert end_abandoned(instance) == [run.run_id]
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
    assert instance.event_log_storage.claim_concurrency_slot(POOL, "another", "step").is_claimed
    assert end_abandoned(instance) == []


@pytest.mark.parametrize("tags", [process_tag(), {PROCESS: f"{os.getpid()}@elsewhere"}, {}])
def test_runs_that_may_be_alive_are_left_alone(instance, tags):
    """Of this process, of another machine, or Dagster's own."""
    run = holding(instance, tags)
    assert end_abandoned(instance) == []
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.STARTED
    assert not instance.event_log_storage.claim_concurrency_slot(POOL, "another", "step").is_claimed
