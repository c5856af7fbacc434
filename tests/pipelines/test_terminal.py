"""A command that is stopped says so in one line and leaves nothing in the way; so does one whose reader goes away.

Real processes get real signals.
"""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from tests.conftest import House, open_house

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from resources.locks import file_lock
with file_lock(Path(sys.argv[1]), what="it", **({"work": sys.argv[2]} if sys.argv[2:] else {})):
    print("held", flush=True)
    sys.stdin.read()
"""
PATIENCE = 120
KEPT = "What is finished is kept"


@pytest.fixture
def home(tmp_path, tiny_model) -> House:
    """A house with an instance on disk whose pool has one place, as that of the project's folder."""
    house = open_house(tmp_path / "house", tiny_model("llama", numeric=True))
    (house.folder / "home").mkdir()
    (house.folder / "home" / "dagster.yaml").write_text(
        "telemetry: {enabled: false}\nconcurrency: {pools: {default_limit: 1}}\n"
    )
    return house


@pytest.fixture
def start(home) -> Callable[..., subprocess.Popen]:
    """Start a command on the house; what it prints on either stream is read from standard output."""
    processes = []

    def begin(*command: str, **options) -> subprocess.Popen:
        environment = os.environ | {
            "HOUSE": str(home.folder),
            "EXCISE_DATA": str(home.data),
            "DAGSTER_HOME": str(home.folder / "home"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
        }
        # Where the tests run in the background of a shell, they and their children are told to ignore Ctrl-C.
        settings = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        } | options
        processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **settings))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait(timeout=30)


def demo(*options: str) -> tuple[str, ...]:
    return ("-m", "tests.pipelines.house_command", "demo", "--model", "tiny", "--scenario", "lamp", *options)


def read_until(process: subprocess.Popen, words: str) -> str:
    """The line with these words; fails where the process ends before, or says nothing of the kind for too long."""
    lines = []
    patience = threading.Timer(PATIENCE, process.kill)
    patience.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if words in line:
                return line
    finally:
        patience.cancel()
    pytest.fail(f"no line with {words!r}: {''.join(lines)[-2000:]}")


def stopped(process: subprocess.Popen, number: signal.Signals) -> list[str]:
    """Send a signal, and what is printed then; the process must end with the signal's status."""
    process.send_signal(number)
    said = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 128 + number, said
    return [line for line in said if line]


@pytest.mark.trial(42)
def test_a_command_that_is_stopped_says_in_one_line_what_is_kept(home, start):
    process = start(*demo())
    read_until(process, "sampling")
    said = stopped(process, signal.SIGINT)
    assert sum(KEPT in line for line in said) == 1
    # Progress that was on its way may come before, never anything behind.
    assert KEPT in said[-1]
    assert "the same command goes on" in said[-1]
    assert not any("Traceback" in line or "Error" in line for line in said)
    assert list((home.data / "cache" / "completions").rglob("*.parquet"))
    with dg.DagsterInstance.from_config(str(home.folder / "home")) as instance:
        (run,) = instance.get_runs()
        assert run.is_finished
        assert instance.event_log_storage.get_concurrency_info("gpu").claimed_slots == []


@pytest.mark.trial(42)
def test_a_command_that_is_stopped_while_it_is_imported_leaves_no_trace(start):
    process = start("-X", "importtime", "-m", "pipelines.demo")
    read_until(process, "dagster")
    said = stopped(process, signal.SIGINT)
    assert KEPT in said[-1]
    assert not any("Traceback" in line for line in said)


@pytest.mark.trial(42)
def test_a_second_signal_ends_a_command_that_answers_none_but_not_an_echo_of_the_first(start):
    code = """
import signal, sys, time
from pipelines.terminal import run
def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    print("busy", flush=True)
    for _ in range(600):
        time.sleep(0.1)
run(main)
"""
    process = start("-c", code)
    read_until(process, "busy")
    for _ in range(2):  # as `timeout` does
        process.send_signal(signal.SIGTERM)
    read_until(process, KEPT)
    time.sleep(1.5)
    assert process.poll() is None
    assert stopped(process, signal.SIGTERM) == []


@pytest.mark.trial(43)
@pytest.mark.trial(42)
def test_a_stage_that_waits_for_another_folder_s_run_says_for_whom_and_can_be_stopped(home, start):
    lock = home.folder / f"excise-{os.getuid()}-cpu.lock"
    holder = start("-c", HOLD, str(lock), "completions of big|chess, run 01234567", stdin=subprocess.PIPE)
    read_until(holder, "held")
    process = start(*demo())
    told = read_until(process, str(holder.pid))
    assert f"in use by process {holder.pid} (completions of big|chess, run 01234567, since 20" in told
    assert KEPT in stopped(process, signal.SIGTERM)[-1]


@pytest.mark.trial(43)
def test_a_stage_that_waits_for_a_run_of_the_same_folder_says_for_whom_and_can_be_stopped(home, start):
    """The pool's only place is taken by a run of this very process."""
    with dg.DagsterInstance.from_config(str(home.folder / "home")) as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 1)
        tags = {"excise/process": f"{os.getpid()}@{platform.node()}", "dagster/partition": "big|chess"}
        run = instance.add_run(dg.DagsterRun(job_name="audit", status=dg.DagsterRunStatus.STARTED, tags=tags))
        assert instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "completions").is_claimed
        process = start(*demo())
        told = read_until(process, "waiting")
        assert f"in use by process {os.getpid()} (completions of big|chess, run {run.run_id[:8]})" in told
        assert KEPT in stopped(process, signal.SIGTERM)[-1]
        assert {slot.run_id for slot in instance.event_log_storage.get_concurrency_info("gpu").claimed_slots} == {
            run.run_id
        }
        assert all(each.is_finished for each in instance.get_runs() if each.run_id != run.run_id)


@pytest.mark.trial(42)
def test_a_reader_that_goes_away_ends_a_command_quietly(start):
    process = start("-m", "pipelines.cache", "--all", stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
