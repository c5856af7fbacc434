"""The one reader of the YAML files users write: models, scorers, strategies, scenarios.

Here belong YAML and its surprises, what an entry of a later file does to an earlier one of its key, and what is known
about entries that cannot be used. What an entry may hold is said where its kind is defined.
A broken entry never changes what another one means, and is never replaced in silence by an earlier one of its key:
whoever asks for it learns what is wrong with it.
"""

from __future__ import annotations

import datetime
import difflib
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from excise.errors import ExciseError

Entry = TypeVar("Entry")
Model = TypeVar("Model", bound=BaseModel)
LONGEST_KEY = 100
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Problem:
    """What cannot be used of a user's file, and why. key: of the entry; None where it is the whole file."""

    file: Path
    key: str | None
    message: str

    def __str__(self) -> str:
        return self.message


class Faults(Exception):
    """The faults of a file or an entry, each `field: fault and mend` without the file."""

    def __init__(self, *faults: str):
        super().__init__(*faults)
        self.faults = faults


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
    names = [str(each) for each in known]
    close = difflib.get_close_matches(str(key), names, n=1)
    told = f"there is no {noun} {key!r}"
    if close:
        return f"{told}; did you mean {close[0]}? There are {', '.join(names)}"
    return f"{told}; there are {', '.join(names) or 'none'}"


# --- YAML ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A key of a file and what stands behind it. faults: what is wrong with that as YAML."""

    value: Any
    line: int
    faults: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which notes anchors and refuses numbers that are not what they look like."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
            node.anchored = True
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value
        if re.fullmatch(r"[-+]?0[0-9_]+", text):
            raise _at(node, f"{text} is an octal number in YAML: write it without the leading 0, or put it into quotes")
        if ":" in text:
            raise _at(node, f"{text} is a number of base 60 in YAML: put it into quotes")
        whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _at(node: yaml.Node, message: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def read_yaml(path: Path, holds: str) -> dict[str, Written]:
    """The keys of a file, each with its value and what is wrong with it; an empty file has none.

    A key with a leading . or _ whose value holds an anchor is there for others to use, and left out. holds: what the
    file should hold, for the error. Raises Faults where the file as a whole cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise Faults(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Faults(f"not valid YAML: byte {error.start + 1} is not UTF-8; save the file as UTF-8 text") from None
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise Faults(_in_yaml_words(error)) from None
    try:
        return _keys_of(loader, holds)
    except (yaml.YAMLError, ValueError) as error:
        raise Faults(_in_yaml_words(error)) from None
    except RecursionError:
        raise Faults("not valid YAML: it is nested too deeply") from None
    finally:
        loader.dispose()


def _keys_of(loader: _Loader, holds: str) -> dict[str, Written]:
    top = loader.get_single_node()
    if top is None or top.tag == "tag:yaml.org,2002:null":
        return {}
    if not isinstance(top, yaml.MappingNode):
        kind = "a list" if isinstance(top, yaml.SequenceNode) else "a single value"
        raise Faults(f"must map {holds}, but is {kind}")
    lines: dict[str, list[int]] = {}
    for key_node, _ in top.value:
        lines.setdefault(_text_of(key_node), []).append(key_node.start_mark.line + 1)
    repeated = {key: places for key, places in lines.items() if len(places) > 1}
    if "<<" in repeated and (places := repeated.pop("<<")):
        raise Faults(f"line {places[1]}: << stands twice: write <<: [*one, *other]")
    # Checked before anything is merged: a key that overrides a merged one stands twice only afterwards.
    inner = {id(value): tuple(_repeated(loader, value, set())) for _, value in top.value}
    loader.flatten_mapping(top)
    found: dict[str, Written] = {}
    for key_node, value_node in top.value:
        key, line = _text_of(key_node), key_node.start_mark.line + 1
        faults = list(inner.get(id(value_node), ()))
        if key in repeated:
            first, second = repeated[key][:2]
            faults.insert(0, f"line {second}: the key '{key}' stands twice, first in line {first}: remove one")
        elif key.startswith((".", "_")):
            if _holds_anchor(value_node, set()):
                continue
            faults.append(f"line {line}: a key with a leading {key[0]} is there for anchors, but holds none: rename it")
        if key_node.tag != "tag:yaml.org,2002:str":
            faults.append(_odd_key(key_node))
        value = None
        if not faults:
            try:
                value = loader.construct_object(value_node, deep=True)
            except (yaml.YAMLError, ValueError) as error:
                faults.append(_in_yaml_words(error))
                loader.recursive_objects = {}
        found[key] = Written(value, line, tuple(faults))
    return found


def _text_of(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else f"line {node.start_mark.line + 1}"


def _odd_key(node: yaml.Node) -> str:
    line = f"line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.ScalarNode):
        return f"{line}: not valid YAML: a key must be text, not a list or a mapping"
    kinds = {"bool": "true or false", "int": "a number", "float": "a number", "null": "nothing", "timestamp": "a date"}
    kind = kinds.get(node.tag.rpartition(":")[2], "something else")
    return f"{line}: YAML reads the key {node.value or 'null'} as {kind}, not as text: put it into quotes"


def _repeated(loader: _Loader, node: yaml.Node, seen: set[int]) -> Iterator[str]:
    """The keys that stand twice in one mapping, anywhere below a node."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _repeated(loader, each, seen)
        return
    lines: dict[Any, int] = {}
    for key_node, value_node in node.value:
        yield from _repeated(loader, value_node, seen)
        if not isinstance(key_node, yaml.ScalarNode):
            continue  # the loader refuses it in its own words
        key = ("<<",) if key_node.tag == _MERGE else _hashed(loader, key_node)
        line = key_node.start_mark.line + 1
        if key in lines:
            mend = "write <<: [*one, *other]" if key == ("<<",) else "remove one"
            yield f"line {line}: the key '{key_node.value}' stands twice, first in line {lines[key]}: {mend}"
        lines.setdefault(key, line)


def _hashed(loader: _Loader, node: yaml.ScalarNode) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError):
        loader.recursive_objects = {}
        return node.tag, node.value  # refused when it is read


def _holds_anchor(node: yaml.Node, seen: set[int]) -> bool:
    if getattr(node, "anchored", False):
        return True
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return False
    seen.add(id(node))
    parts = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
    return any(_holds_anchor(part, seen) for part in parts)


def _in_yaml_words(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or str(error).strip().splitlines()[0]
    if "but found another document" in problem or "single document" in str(error):
        problem = "it holds several documents, parted by ---; keep one"
    elif "'\\t'" in problem:
        problem += "; indent with spaces, not with tabs"
    return f"{line}not valid YAML: {problem}"


def described(value: Any) -> str:
    """A value as the user wrote it, for a sentence."""
    if value is None:
        return "empty"
    if isinstance(value, (list, tuple, dict)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, datetime.date):
        return value.isoformat()
    return "true" if value is True else "false" if value is False else repr(value)


# --- registries ------------------------------------------------------------------------------------------------------

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
        told = {*self.owner, *self.owner.values()}
        return [*made, *(key for key in self.keys if key in self.broken and key not in told)]

    def read(self, path: Path) -> None:
        try:
            written = read_yaml(path, f"{self.noun} keys to their fields")
        except Faults as error:
            told = "; ".join(error.faults)
            problem = Problem(path, None, f"{path}: {told} (cannot be read, so no {self.noun} can be used)")
            self.problems.append(problem)
            for name in list(self.entries):
                self._break(name, problem)
            return
        for key, each in written.items():
            if self._fault_of_key(key) is None:
                self.keys.setdefault(key)
            try:
                self._add(path, key, each)
            except Faults as error:
                lines = [f"{path}: {key}{fault}" for fault in error.faults]
                at = "" if any(re.search(r"\bline \d", fault) for fault in error.faults) else f" (line {each.line})"
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
            for name, each in variants.items():
                made[name] = self.kind.model_validate({"key": name, **each})
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


def with_paths(fields: Fields, kind: type[BaseModel], folder: Path) -> Fields:
    """The fields with those of type Path made absolute, in nested models, too."""
    result = dict(fields)
    for name, described_as in kind.model_fields.items():
        value, kinds = fields.get(name), _kinds(described_as.annotation)
        if Path in kinds and isinstance(value, str):
            result[name] = _resolved(name, value, folder)
        for inner in kinds:
            if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
                result[name] = with_paths(value, inner, folder)
    return result


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, UnionType, typing.Annotated):
        return tuple(kind for each in get_args(annotation) for kind in _kinds(each))
    return (annotation,)


def home_expanded(path: Path | str, setting: str) -> Path:
    """The path with a leading ~ replaced by the home folder. Raises ExciseError, naming the setting, without one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name of a user that does not exist
        raise ExciseError(f"{setting}: there is no home folder for {path}: write the path in full") from None


def _resolved(name: str, value: str, folder: Path) -> str:
    if not value.strip():
        raise Faults(f".{name} is empty: give a path")
    try:
        return str(Path(os.path.realpath(folder / home_expanded(value, f".{name}"))))
    except ExciseError as error:
        raise Faults(str(error)) from None
    except (OSError, ValueError) as error:
        raise Faults(f".{name}: {value!r} is no path: {error}") from None


def in_words(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """Pydantic's findings about an entry as `.field: fault and mend`."""
    faults = []
    for found in error.errors(include_url=False):
        where = "".join(f".{part}" for part in found["loc"])
        value, known = found["input"], [name for name in kind.model_fields if name != "key"]
        if found["type"] == "extra_forbidden":
            if len(found["loc"]) == 1:
                close = difflib.get_close_matches(str(found["loc"][0]), known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            else:
                hint = ""
            faults.append(f"{where}: is not a known field{hint}")
        elif found["type"] == "missing":
            faults.append(f"{where}: is missing; add it")
        elif found["type"] == "string_type":
            mend = "give it a text" if isinstance(value, (type(None), list, dict)) else "put it into quotes"
            faults.append(f"{where}: is {described(value)}, not text; {mend}")
        elif found["type"] == "value_error":
            faults.append(f"{where}: {found['ctx']['error']}")
        else:
            faults.append(f"{where}: {found['msg']} (it is {described(value)})")
    return faults
