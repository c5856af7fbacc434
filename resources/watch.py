"""Who watches long work: in a Dagster run the run's log and an observation of the asset, in a terminal one line.

Dagster's UI has no progress bar; milestones in the log, and numbers plotted over time, take its place. The stages know
only the call signature in `excise.progress`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import dagster as dg
from pydantic import Field

from excise.progress import Progress, TerminalProgress, seconds_left, told


@dataclass(frozen=True)
class Stage:
    """A step that may have to wait: what it is called in the messages of those who wait for it, and how it tells its
    own watcher."""

    work: str
    tell: Callable[[str], None]


class RunWatch(dg.ConfigurableResource):
    """Logs milestones of a stage, at most one every `interval` seconds, and notes them as observations."""

    interval: float = Field(default=20.0, description="Seconds between two messages about the same stage.")

    def progress(self, context: dg.AssetExecutionContext) -> Progress:
        """A watcher that writes to the log of this step."""
        return _Milestones(context, self.interval)

    def stage(self, context: dg.AssetExecutionContext) -> Stage:
        """This step, which tells what it waits for in its log."""
        return Stage(_work(context), context.log.info)


class TerminalWatch(RunWatch):
    """Shows one line per stage on standard error."""

    def progress(self, context: dg.AssetExecutionContext) -> Progress:
        return TerminalProgress()

    def stage(self, context: dg.AssetExecutionContext) -> Stage:
        """This step, which tells what it waits for on standard error."""
        return Stage(_work(context), lambda message: print(message, file=sys.stderr))


def _work(context: dg.AssetExecutionContext) -> str:
    place = f" of {context.partition_key}" if context.has_partition_key else ""
    return f"{context.asset_key.to_user_string()}{place}, run {context.run.run_id[:8]}"


class _Milestones:
    def __init__(
        self, context: dg.AssetExecutionContext, interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._context = context
        self._interval = interval
        self._clock = clock
        self._stage: tuple[str, int] | None = None
        self._began = self._shown = 0.0
        self._begun_at = 0

    def __call__(self, label: str, done: int, total: int, /) -> None:
        now = self._clock()
        if (label, total) != self._stage:
            self._stage, self._began, self._begun_at, self._shown = (label, total), now, done, now
            state = f"{done:,} of {total:,} already done" if done else f"{total:,} to do"
            self._context.log.info(f"{label}: {state}")
            return
        if done < total and now - self._shown < self._interval:
            return
        self._shown = now
        elapsed = now - self._began
        self._context.log.info(told(label, done, total, self._begun_at, elapsed))
        if done < total:
            metadata: dict[str, float | int | str] = {"stage": label, "done": done, "total": total}
            left = seconds_left(done, total, self._begun_at, elapsed)
            if left is not None:
                metadata |= {"seconds_left": round(left), "per_second": round((done - self._begun_at) / elapsed, 3)}
            asset, partition = self._context.asset_key, None
            if self._context.has_partition_key:
                partition = self._context.partition_key
            self._context.log_event(dg.AssetObservation(asset, partition=partition, metadata=metadata))
