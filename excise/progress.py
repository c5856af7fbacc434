"""How long work tells its watcher how far it is.

Here: the one call signature (`Progress`) that every long stage accepts, the silent watcher, and a terminal one.
Not here: what the stages do, or Dagster's logs and metadata. A stage calls `progress(label, done, total)` as often as
it likes, first with what it found already done; the watcher alone decides what to show and how often.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO


class Progress(Protocol):
    """A watcher of one or several stages."""

    def __call__(self, label: str, done: int, total: int, /) -> None:
        """Note that `done` of the `total` units of the stage `label` are finished."""


def silent(label: str, done: int, total: int, /) -> None:
    """A watcher that shows nothing: the default of every stage."""


def seconds_left(done: int, total: int, begun_at: int, elapsed: float) -> float | None:
    """Seconds until `total`, at the mean rate since the stage's first report.

    `begun_at` units were already done at that report, `elapsed` seconds ago; they say nothing about the rate.
    None while no unit has been finished since: there is no rate yet to extrapolate.
    """
    if done >= total:
        return 0.0
    fresh = done - begun_at
    if fresh <= 0 or elapsed <= 0:
        return None
    return (total - done) * elapsed / fresh


def told(label: str, done: int, total: int, begun_at: int, elapsed: float) -> str:
    """A stage in words: `label 12/40, 3.1/s, 9 s left`, or what it took where it is complete."""
    parts = [f"{label} {done:,}/{total:,}"]
    fresh = done - begun_at
    if fresh > 0 and elapsed > 0:
        parts.append(f"{_rate(fresh / elapsed)}/s")
    left = seconds_left(done, total, begun_at, elapsed)
    if done >= total:
        parts.append(f"{_duration(elapsed)} in all" if fresh > 0 else "nothing to do")
    elif left is not None:
        parts.append(f"{_duration(left)} left")
    return ", ".join(parts)


class TerminalProgress:
    """One line per stage on a stream: `label done/total, rate/s, time left`.

    A terminal gets a line that is rewritten in place, at most ten times a second. Any other stream (a log file, a
    pipe) gets whole lines, at most one every `interval` seconds. Either gets one last line when a stage is complete.
    """

    def __init__(
        self, stream: TextIO | None = None, *, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`stream`: standard error if None; `interval` in seconds; `clock` returns seconds that never go back."""
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = 0.1 if self._terminal else interval
        self._clock = clock
        self._stage: tuple[str, int] | None = None
        self._done = 0
        self._begun_at = 0
        self._began = 0.0
        self._shown = -math.inf
        self._complete = False
        self._open_line = False

    def __call__(self, label: str, done: int, total: int, /) -> None:
        now = self._clock()
        if (label, total) != self._stage or done < self._done:
            self._close_line()
            self._stage, self._begun_at, self._began, self._complete = (label, total), done, now, False
            # A log gets no line for a stage that has only begun; a terminal shows it at once.
            self._shown = -math.inf if self._terminal else now
        self._done = done
        complete = done >= total
        if self._complete or (not complete and now - self._shown < self._interval):
            return
        self._shown, self._complete = now, complete
        self._write(told(label, done, total, self._begun_at, now - self._began), complete)

    def _write(self, line: str, complete: bool) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns
            self._stream.write("\r" + line[: max(width - 1, 1)] + "\x1b[K")
            self._open_line = True
            if complete:
                self._close_line()
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _close_line(self) -> None:
        if self._open_line:
            self._stream.write("\n")
            self._open_line = False


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def _duration(seconds: float) -> str:
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
