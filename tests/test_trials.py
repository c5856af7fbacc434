"""The page of inputs from the field: every row has a test that shows its right value."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "trials.md"


def test_every_row_has_a_test():
    rows = {int(row) for row in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)}
    marked = {
        int(row)
        for file in TESTS.rglob("test_*.py")
        for row in re.findall(r"mark\.trial\((\d+)\)", file.read_text(encoding="utf-8"))
    }
    assert rows == set(range(1, 47))
    assert marked == rows
