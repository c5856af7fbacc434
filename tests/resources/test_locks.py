"""A file lock lets one process pass at a time and dies with its holder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from excise.errors import ExciseError
from resources.locks import file_lock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from resources.locks import file_lock
with file_lock(Path(sys.argv[1]), what="it", work="a long look"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait(timeout=30)


def test_the_lock_is_exclusive_and_names_its_holder(tmp_path, holder):
    notices = []
    with (
        pytest.raises(ExciseError, match=rf"by process {holder.pid} \(a long look, since .*\) for more than 0.2 s"),
        file_lock(tmp_path / "lock", what="it", timeout=0.2, waiting=notices.append),
    ):
        pytest.fail("two processes hold the lock")
    assert len(notices) == 1
    assert re.fullmatch(
        rf"waiting for it, which is in use by process {holder.pid} "
        r"\(a long look, since \d{4}-\d\d-\d\d \d\d:\d\d\); 0 s so far .*",
        notices[0],
    )


def test_a_killed_holder_blocks_nobody(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    began = time.monotonic()
    with file_lock(tmp_path / "lock", what="it", timeout=20):
        assert time.monotonic() - began < 10


def test_the_lock_excludes_a_second_holder_in_the_same_process(tmp_path):
    with (
        file_lock(tmp_path / "lock", what="it"),
        pytest.raises(ExciseError),
        file_lock(tmp_path / "lock", what="it", timeout=0.05),
    ):
        pytest.fail("held twice")
    with file_lock(tmp_path / "lock", what="it", timeout=0.05):
        pass
