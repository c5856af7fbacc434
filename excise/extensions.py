"""What installed packages add to the project: records named in their entry points, beside those that are built in.

A package that adds a score, a family or the like writes one line into its pyproject, under the group that the room of
the record names. What a record says and does belongs to that room.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TypeVar

from excise.errors import ExciseError

Record = TypeVar("Record")


def with_extensions(
    group: str, kind: type[Record], built_in: Iterable[Record], name_of: Callable[[Record], str]
) -> dict[str, Record]:
    """Built-in records by their names, then those that the entry points of `group` name, in the order of these.

    Raises ExciseError, naming the entry point, for one that cannot be imported, is no `kind` or has the name of another
    record.
    """
    records = {name_of(record): record for record in built_in}
    for point, record in offered(group):
        if not isinstance(record, kind):
            raise ExciseError(f"{group}: the entry point {point} is {record!r}; name a {kind.__name__}")
        if name_of(record) in records:
            raise ExciseError(
                f"{group}: the entry point {point} is a second {kind.__name__} named {name_of(record)}; rename it"
            )
        records[name_of(record)] = record
    return records


def offered(group: str) -> tuple[tuple[str, object], ...]:
    """Names and objects of a group's entry points, by name. Raises ExciseError for one that cannot be imported."""
    return _offered(group, tuple(sys.path))


@functools.lru_cache(maxsize=64)
def _offered(group: str, path: tuple[str, ...]) -> tuple[tuple[str, object], ...]:
    """Names and objects of a group's entry points; path: where packages are looked for, as another finds others."""
    offered = []
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        try:
            offered.append((point.name, point.load()))
        except Exception as error:  # a package may fail in any way
            raise ExciseError(
                f"{group}: the entry point {point.name} ({point.value}) cannot be imported: "
                f"{error or type(error).__name__}; mend or remove the package"
            ) from error
    return tuple(offered)
