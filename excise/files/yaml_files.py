"""The one reader of YAML: its surprises are refused with their line, and no key stands twice.

What an entry of a file may hold, and what entries of one key do to each other, is in `excise.files.registry`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class Faults(Exception):
    """The faults of a file or an entry, each `field: fault and mend` without the file."""

    def __init__(self, *faults: str):
        super().__init__(*faults)
        self.faults = faults


@dataclass(frozen=True)
class Written:
    """A key of a file and what stands behind it. faults: what is wrong with that as YAML."""

    value: Any
    line: int
    faults: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which notes anchors and refuses numbers that are not what they look like."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.anchored: dict[int, yaml.Node] = {}  # by their identity, which they keep for as long as they are here

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if node is not None and not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
            self.anchored[id(node)] = node
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
    return parse_yaml(text, holds)


def load_yaml(path: Path, holds: str) -> dict[str, Any]:
    """The values of a file by their keys. Raises Faults where anything in it is wrong."""
    keys = read_yaml(path, holds)
    if faults := [f"{key}: {fault}" for key, written in keys.items() for fault in written.faults]:
        raise Faults(*faults)
    return {key: written.value for key, written in keys.items()}


def parse_yaml(text: str, holds: str) -> dict[str, Written]:
    """The keys of a text in YAML, as `read_yaml` has those of a file."""
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
    keys: dict[str, Written] = {}
    for key_node, value_node in top.value:
        key, line = _text_of(key_node), key_node.start_mark.line + 1
        faults = list(inner.get(id(value_node), ()))
        if key in repeated:
            first, second = repeated[key][:2]
            faults.insert(0, f"line {second}: the key '{key}' stands twice, first in line {first}: remove one")
        elif key.startswith((".", "_")):
            if _holds_anchor(loader, value_node, set()):
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
        keys[key] = Written(value, line, tuple(faults))
    return keys


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
        for part in node.value:
            yield from _repeated(loader, part, seen)
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


def _holds_anchor(loader: _Loader, node: yaml.Node, seen: set[int]) -> bool:
    if id(node) in loader.anchored:
        return True
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return False
    seen.add(id(node))
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    return any(_holds_anchor(loader, part, seen) for part in parts)


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
