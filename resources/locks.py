"""A queue of processes before something only one may use at a time, kept by a lock on a file.

The operating system releases the lock when its process ends, however it ends, so a killed run blocks nobody.
The file stays behind and names the last holder; it is not removed, as a waiting process may already have it open.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from excise.errors import ExciseError

POLL = 0.02
"""Seconds between two tries to get a lock."""
NOTICE_EVERY = 60.0
"""Seconds between two messages about the same wait."""


@contextmanager
def file_lock(
    path: Path,
    *,
    what: str,
    work: str = "",
    mend: str = "set EXCISE_DATA to a folder you may write to",
    timeout: float | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold the lock on `path` for the length of the block.

    `what` names the thing in messages, `work` tells those who wait what it is held for, `mend` says what to do where
    the file cannot be made. Waits for `timeout`
    seconds (None: for ever), calling `waiting` with a message at once and every `NOTICE_EVERY` seconds. Raises
    ExciseError when the wait is over or the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ExciseError(f"{path.parent}: cannot be written ({error.strerror}); {mend}") from error
    try:
        began = time.monotonic()
        noticed = None
        while not _taken(handle):
            waited = time.monotonic() - began
            if timeout is not None and waited > timeout:
                raise ExciseError(
                    f"{what} is in use by {_holder(handle)} for more than {timeout:g} s ({path}); "
                    "wait until that process is done or end it, then run this again"
                )
            if waiting is not None and (noticed is None or waited - noticed >= NOTICE_EVERY):
                waiting(f"waiting for {what}, which is in use by {_holder(handle)}; {waited:.0f} s so far ({path})")
                noticed = waited
            time.sleep(POLL)
        holder = {"process": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M}", "work": work}
        with suppress(OSError):  # a full disk: whoever waits is told less
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(handle)  # releases the lock


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        parts = [holder["work"], f"since {holder['since']}"]
        return f"process {holder['process']} ({', '.join(part for part in parts if part)})"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "another process"
