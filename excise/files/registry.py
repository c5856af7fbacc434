"""Registries of entries that users write in YAML: models, scorers, strategies.

Here belong what an entry of a later file does to an earlier one of its key, and what is known about entries that cannot
be used. YAML is read in `excise.files.yaml_files`; what an entry may hold is said where its kind is defined.
A broken entry never changes what another one means, and is never replaced in silence by an earlier one of its key:
whoever asks for it learns what is wrong with it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from excise.errors import ExciseError
from excise.files.paths import with_paths
from excise.files.yaml_files import Faults, Written, described, read_yaml

Entry = TypeVar("Entry")
Model = TypeVar("Model", bound=BaseModel)
LONGEST_KEY = 100


@dataclass(frozen=True)
class Problem:
    """What cannot be used of a user's file, and why. key: of the entry; None where it is the whole file."""

    file: Path
    key: str | None
    message: str

    def __str__(self) -> str:
        return self.message


class Registry(dict[str, Entry], Generic[Entry]):
    """The usable entries by key. To ask for another one is an ExciseError that says what is wrong with it.

    known: all keys in order, those included whose entry cannot be used: they are partitions, and fail by name. Left out
    are keys that may not be partitions.
    problems: everything that cannot be used. broken: those of them by key, and keys that an unreadable file may have
    changed. files: where entries come from. noun: what an entry is called.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry] = {},
        *,
        noun: str = "entry",
        problems: Iterable[Problem] = (),
        broken: Mapping[str, Problem] = {},
        known: Iterable[str] | None = None,
        files: Mapping[str, Path] = {},
    ):
        super().__init__(entries)
        self.noun, self.problems, self.broken, self.files = noun, tuple(problems), dict(broken), dict(files)
        self.known = tuple(entries if known is None else known)

    def __missing__(self, key: str) -> Entry:
        raise ExciseError(self.why_not(key))

    def why_not(self, key: str, among: Iterable[str] | None = None) -> str:
        """Why there is no usable entry of that key, in words. among: the names there are, where fewer say it all."""
        of_values = re.sub(r"(-[0-9.]+)+$", "", str(key))  # fasp of fasp-0.10
        for name in (key, of_values):
            if name in self.broken:
                return f"{self.noun} {key} cannot be used: {self.broken[name].message}"
        lost = "".join(f"\n{problem.message}" for problem in self.problems if problem.key is None)
        return unknown(self.noun, key, self if among is None else among) + lost


def unknown(noun: str, key: object, known: Iterable[str]) -> str:
    """That there is no such thing, which one may have been meant, and which there are."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(key), names, n=1)
    absent = f"there is no {noun} {key!r}"
    if close:
        return f"{absent}; did you mean {close[0]}? There are {', '.join(names)}"
    return f"{absent}; there are {', '.join(names) or 'none'}"


Fields = dict[str, Any]


def merged(base: Fields, fields: Fields) -> Fields:
    """An earlier entry with the fields of a later one; mappings are merged, and null takes a field or value away."""
    result = dict(base)
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            result[name] = merged(base[name], value)
        elif value is None:
            result.pop(name, None)
        else:
            result[name] = value
    return result


def _as_one(key: str, fields: Fields) -> Iterator[tuple[str, Fields]]:
    yield key, fields


def names_source(sources: Sequence[str]) -> Callable[[Fields, Fields], bool]:
    """`stands_alone` for entries with a source: a later one that names any of the fields `sources`."""
    return lambda base, fields: any(fields.get(name) is not None for name in sources)


def require_one_source(entry: BaseModel, sources: Sequence[str]) -> None:
    """Raise ValueError unless an entry has exactly one of the fields `sources`."""
    named = [name for name in sources if getattr(entry, name) is not None]
    if len(named) != 1:
        raise ValueError(f"needs exactly one of {', '.join(sources)}; found {', '.join(named) or 'none'}")


def load_entries(
    files: Iterable[Path],
    kind: type[Model],
    noun: str,
    *,
    stands_alone: Callable[[Fields, Fields], bool],
    combine: Callable[[Fields, Fields], Fields] = merged,
    variants: Callable[[str, Fields], Iterable[tuple[str, Fields]]] = _as_one,
) -> Registry[Model]:
    """The entries of those files that exist, in order. Never raises for what stands in a file: see `Registry`.

    kind: the model of an entry, whose `key` stands before the colon. A later entry changes the fields it names of an
    earlier one of its key (`combine`), or replaces it where `stands_alone(earlier, later)`. variants: the entries made
    of one. Fields of type `Path` may start with ~ and are taken from the folder of the file that names them.
    A file that cannot be read may have changed anything before it, so nothing before it can be used.
    """
    reading = _Reading(kind, noun, stands_alone, combine, variants)
    for path in map(Path, files):
        if path.exists() or path.is_symlink():
            reading.read(path)
    return Registry(
        reading.entries,
        noun=noun,
        problems=reading.problems,
        broken=reading.broken,
        known=reading.known(),
        files=reading.files,
    )


class _Reading:
    """The state of `load_entries` between files."""

    def __init__(self, kind: type[BaseModel], noun: str, stands_alone: Callable, combine: Callable, variants: Callable):
        self.kind, self.noun = kind, noun
        self.stands_alone, self.combine, self.variants = stands_alone, combine, variants
        self.entries: dict[str, Any] = {}
        self.fields: dict[str, Fields] = {}  # of entries as written, and of the variants made of them
        self.owner: dict[str, str] = {}  # the key of the entry that a usable or once usable name was made of
        self.files: dict[str, Path] = {}
        self.keys: dict[str, None] = {}  # all that were written and may be keys, in order
        self.broken: dict[str, Problem] = {}
        self.problems: list[Problem] = []

    def known(self) -> list[str]:
        """The keys of usable and broken entries; in place of a key of which several entries are made, theirs."""
        made = [name for name in self.owner if name in self.entries or name in self.broken]
        mentioned = {*self.owner, *self.owner.values()}
        return [*made, *(key for key in self.keys if key in self.broken and key not in mentioned)]

    def read(self, path: Path) -> None:
        try:
            written = read_yaml(path, f"{self.noun} keys to their fields")
        except Faults as error:
            faults = "; ".join(error.faults)
            problem = Problem(path, None, f"{path}: {faults} (cannot be read, so no {self.noun} can be used)")
            self.problems.append(problem)
            for name in list(self.entries):
                self._break(name, problem)
            return
        for key, entry in written.items():
            if self._fault_of_key(key) is None:
                self.keys.setdefault(key)
            try:
                self._add(path, key, entry)
            except Faults as error:
                lines = [f"{path}: {key}{fault}" for fault in error.faults]
                at = "" if any(re.search(r"\bline \d", fault) for fault in error.faults) else f" (line {entry.line})"
                problem = Problem(path, key, "\n".join(lines) + at)
                self.problems.append(problem)
                for name in [key, *(name for name, owner in self.owner.items() if owner == key)]:
                    self._break(name, problem)

    def _break(self, name: str, problem: Problem) -> None:
        self.entries.pop(name, None)
        self.broken[name] = problem

    def _add(self, path: Path, key: str, written: Written) -> None:
        if written.faults:
            raise Faults(*(f": {fault}" for fault in written.faults))
        if not isinstance(written.value, dict):
            known = ", ".join(name for name in self.kind.model_fields if name not in ("key", "description"))
            raise Faults(f": must hold fields ({known}), but is {described(written.value)}")
        if "key" in written.value:
            raise Faults(".key: the key stands before the colon; remove it")
        if fault := self._fault_of_key(key):
            raise Faults(f": the key {fault}")
        fields = with_paths(written.value, self.kind, path.parent)
        base = self.fields.get(key)
        if base is not None and not self.stands_alone(base, fields):
            if key in self.broken:
                raise Faults(f": changes an entry that cannot be used: {self.broken[key].message}")
            fields = self.combine(base, fields)
        made: dict[str, Any] = {}
        try:
            variants = dict(self.variants(key, fields))
            for name, variant in variants.items():
                made[name] = self.kind.model_validate({"key": name, **variant})
        except ValidationError as error:
            raise Faults(*in_words(error, self.kind)) from None
        taken = [name for name in made if name != key and self.owner.get(name, key) != key]
        if taken:
            raise Faults(f": makes {taken[0]}, which the entry {self.owner[taken[0]]} makes, too: rename one")
        for name in [name for name, owner in self.owner.items() if owner == key and name not in made]:
            self.entries.pop(name, None)
            self.owner.pop(name)
            self.fields.pop(name, None)
        for name, entry in made.items():
            self.entries[name], self.owner[name], self.fields[name] = entry, key, variants[name]
            self.files[name] = path
        for name in (key, *made):
            self.broken.pop(name, None)
        self.fields[key] = fields

    def _fault_of_key(self, key: str) -> str | None:
        try:
            TypeAdapter(Annotated[str, self.kind.model_fields["key"]]).validate_python(key)
        except ValidationError as error:
            return f"{key!r} may hold letters, digits and a few signs ({error.errors()[0]['ctx']['pattern']})"
        lower, others = key.lower(), (*self.owner, *self.keys)
        if twin := next((other for other in others if other != key and other.lower() == lower), None):
            return f"differs from {twin} in capital letters alone; folders are named by it: rename it"
        return key_fault(key)


def key_fault(key: str) -> str | None:
    """What forbids a key to be a partition of Dagster's and the name of a folder; None where it may be both."""
    if len(key) > LONGEST_KEY:
        return f"has {len(key)} characters: use at most {LONGEST_KEY}"
    if ".." in key or key.endswith("."):
        return "may not hold two dots in a row (Dagster reads ... as a range) or end with one: rename it"
    return None


def in_words(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """Pydantic's findings about an entry as `.field: fault and mend`."""
    faults = []
    for fault in error.errors(include_url=False):
        where = "".join(f".{part}" for part in fault["loc"])
        value, known = fault["input"], [name for name in kind.model_fields if name != "key"]
        if fault["type"] == "extra_forbidden":
            if len(fault["loc"]) == 1:
                close = difflib.get_close_matches(str(fault["loc"][0]), known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            else:
                hint = ""
            faults.append(f"{where}: is not a known field{hint}")
        elif fault["type"] == "missing":
            faults.append(f"{where}: is missing; add it")
        elif fault["type"] == "string_type":
            mend = "give it a text" if isinstance(value, (type(None), list, dict)) else "put it into quotes"
            faults.append(f"{where}: is {described(value)}, not text; {mend}")
        elif fault["type"] == "value_error":
            faults.append(f"{where}: {fault['ctx']['error']}")
        else:
            faults.append(f"{where}: {fault['msg']} (it is {described(value)})")
    return faults
