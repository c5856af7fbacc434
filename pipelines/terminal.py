"""How a command of this folder ends: its exit status, Ctrl-C, and a reader of its output that goes away.

A command is a function `main(arguments) -> status`; `run(main)` stands at the end of its module. Work is kept in small
pieces (`excise.generation.completions`, `excise.files.parts`), so stopping costs the piece in hand and needs no
ceremony. Imports nothing large: what is here has to work while the rest is being imported.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from excise.errors import ExciseError

DONE = 0
INCOMPLETE = 1
"""Something that was asked for could not be computed."""
MISUSED = 2
"""The options, or the user's files they speak of, are wrong: nothing was begun."""
CHECKS_FAILED = 3
"""Everything was computed, and checks fail that --fail-on asks for."""
STATUSES = (
    "Exit status: 0 if everything asked for was computed, 1 if something could not be, 2 if an option is wrong, "
    "3 if all was computed but a check fails that --fail-on counts, 130 after Ctrl-C, 143 after SIGTERM. "
    "Make itself ends with 2 whenever a command does not end with 0."
)
STOPPING = (
    "Stopping. What is finished is kept, answers batch by batch, and the same command goes on from there; once more "
    "ends at once."
)
SAME_SIGNAL = 1.0
"""Seconds in which a second signal is taken for the first one's echo: `timeout` sends each twice."""

_signals: list[int] = []
_repeated: list[int] = []
_first = threading.Event()


def listen(words: str = STOPPING) -> None:
    """From now on note SIGINT and SIGTERM, whoever handles them; say `words` once, and let a second end the process.

    Dagster puts its own handlers in place during a run, and code outside Python answers no signal; so the first byte
    of a signal goes to a thread.
    """
    if sys.excepthook is _end_interrupted:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    # Files appear when they are whole and tables change in transactions, so outside a run there is nothing to tidy up.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: leave_interrupted())
    sys.excepthook = _end_interrupted
    # An interrupt may hit code that only reports it, such as the closing of a connection.
    sys.unraisablehook = _unless_interrupt
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL + 1)
    threading.Thread(target=_hear, args=(reader, words), name="signals", daemon=True).start()


def interrupted() -> bool:
    """Whether the user, or the system, has asked this process to stop."""
    return _first.is_set()


def repeat() -> None:
    """Send this process once more the signal that asked it to stop; Dagster forgets one that comes between steps."""
    _repeated.append(_signals[0])
    os.kill(os.getpid(), _signals[0])


def leave_interrupted() -> NoReturn:
    """End the process with the status of the signal that it was sent."""
    _first.wait(SAME_SIGNAL)  # the thread may be a moment behind the handler
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(128 + (_signals[0] if _signals else signal.SIGINT))


def run(main: Callable[[], int], words: str = STOPPING) -> NoReturn:
    """Carry out a command and end the process with its status, without a trace where the user can mend or has stopped.

    A reader that goes away (`| head`) ends it quietly, as it does every command. `words` are said when it is stopped.
    """
    listen(words)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter
    try:
        try:
            status = main()
        except ExciseError as error:
            print(error, file=sys.stderr)
            status = INCOMPLETE
        except SystemExit as exit:  # argparse, after a message of its own
            status = exit.code
        except KeyboardInterrupt:
            leave_interrupted()
        if interrupted():
            leave_interrupted()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())  # Python flushes once more at its end
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _hear(reader: int, words: str) -> None:
    while True:
        for number in os.read(reader, 64):
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if not _signals:
                began = time.monotonic()
                _signals.append(number)
                with suppress(OSError):
                    os.write(2, (("\n" if os.isatty(2) else "") + words + "\n").encode())
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # this is the last word
                _first.set()
            elif _repeated:
                _repeated.pop()
            elif time.monotonic() - began > SAME_SIGNAL:
                os._exit(128 + number)


def _end_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's last word about an error that nobody caught, while a command is still being imported above all."""
    if interrupted() or issubclass(kind, KeyboardInterrupt):
        leave_interrupted()
    sys.__excepthook__(kind, error, trace)


def _unless_interrupt(unraisable) -> None:
    if "Interrupt" not in unraisable.exc_type.__name__:
        sys.__unraisablehook__(unraisable)
