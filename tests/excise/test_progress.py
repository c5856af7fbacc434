"""Claims about the progress line: what a terminal and a log see, and what is said about the time left."""

from __future__ import annotations

import io

import pytest

from excise.progress import TerminalProgress, seconds_left, silent


class Clock:
    """Seconds set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_time_left_is_claimed_before_the_first_unit_is_done():
    assert seconds_left(0, 100, 0, 0.0) is None
    assert seconds_left(0, 100, 0, 30.0) is None
    assert seconds_left(1, 100, 0, 0.0) is None


def test_units_found_done_do_not_count_towards_the_rate():
    assert seconds_left(60, 100, 50, 5.0) == pytest.approx(20.0)
    assert seconds_left(50, 100, 50, 5.0) is None


def test_nothing_is_left_of_a_complete_or_an_empty_stage():
    assert seconds_left(100, 100, 0, 5.0) == 0.0
    assert seconds_left(0, 0, 0, 0.0) == 0.0


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end():
    clock, stream = Clock(), io.StringIO()
    progress = TerminalProgress(stream, clock=clock)
    for second in range(31):
        clock.now = float(second)
        progress("sampling", second * 100, 3000)
    assert stream.getvalue().splitlines() == [
        "sampling 1,000/3,000, 100/s, 20 s left",
        "sampling 2,000/3,000, 100/s, 10 s left",
        "sampling 3,000/3,000, 100/s, 30 s in all",
    ]


def test_a_finished_stage_is_reported_once():
    clock, stream = Clock(), io.StringIO()
    progress = TerminalProgress(stream, clock=clock)
    progress("masks", 0, 2)
    clock.now = 4.0
    progress("masks", 2, 2)
    progress("masks", 2, 2)
    assert stream.getvalue() == "masks 2/2, 0.5/s, 4 s in all\n"


@pytest.mark.parametrize("total", [0, 64])
def test_a_stage_complete_at_its_first_report_divides_by_nothing(total):
    stream = io.StringIO()
    TerminalProgress(stream, clock=Clock())("sampling", total, total)
    assert stream.getvalue() == f"sampling {total}/{total}, nothing to do\n"


def test_a_terminal_line_is_rewritten_in_place_and_closed_at_the_end():
    clock, stream = Clock(), Terminal()
    progress = TerminalProgress(stream, clock=clock)
    progress("sampling", 0, 200)
    clock.now = 0.01
    progress("sampling", 1, 200)
    clock.now = 1.0
    progress("sampling", 100, 200)
    clock.now = 2.0
    progress("sampling", 200, 200)
    first, *rest = stream.getvalue().split("\r")[1:]
    assert first.startswith("sampling 0/200\x1b")
    assert rest == ["sampling 100/200, 100/s, 1 s left\x1b[K", "sampling 200/200, 100/s, 2 s in all\x1b[K\n"]


def test_a_stage_left_unfinished_keeps_its_line_when_the_next_begins():
    stream = Terminal()
    progress = TerminalProgress(stream, clock=Clock())
    progress("sampling", 1, 2)
    progress("masks", 0, 2)
    assert stream.getvalue().count("\n") == 1


def test_a_stage_that_starts_again_gets_a_new_rate():
    clock, stream = Clock(), io.StringIO()
    progress = TerminalProgress(stream, clock=clock)
    progress("sampling", 0, 10)
    clock.now = 10.0
    progress("sampling", 10, 10)
    progress("sampling", 0, 10)
    clock.now = 30.0
    progress("sampling", 10, 10)
    assert stream.getvalue().splitlines()[-1] == "sampling 10/10, 0.5/s, 20 s in all"


def test_long_times_are_told_in_minutes_and_hours():
    clock, stream = Clock(), io.StringIO()
    progress = TerminalProgress(stream, clock=clock)
    progress("a", 0, 11)
    clock.now = 10.0
    progress("a", 1, 11)
    progress("b", 0, 1001)
    clock.now = 20.0
    progress("b", 1, 1001)
    assert [line.split(", ")[-1] for line in stream.getvalue().splitlines()] == ["1 min 40 s left", "2 h 46 min left"]


def test_the_default_stream_is_standard_error(capsys):
    TerminalProgress()("masks", 1, 1)
    silent("masks", 1, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("masks 1/1")
