"""Reading scenario files: YAML, subject sets, folders, and clear words for what is wrong in a file.

Here belongs the way from folders to valid scenarios; the rules a scenario obeys are in `schema`.
A broken file is a problem that names file, field and mend, and never takes another scenario down with it.
"""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from excise.errors import ExciseError
from excise.files.fields import KEY_PATTERN, Key, Text
from excise.files.paths import home_expanded, with_paths
from excise.files.registry import Problem, Registry, key_fault
from excise.files.yaml_files import Faults, described, read_yaml
from excise.outcomes import outcome_of
from excise.scenarios.holistic_bias_groups import subgroups_of
from excise.scenarios.schema import OUTCOME_KIND, Comparison, HolisticBias, Scenario, Subject, Template
from excise.scenarios.templates import SENTENCES

BUILT_IN = Path(__file__).parent
SUBJECT_FOLDER = "subjects"


class _GroupFile(BaseModel):
    """A group as files write it: subjects as a list, by gender, or taken from a subject set."""

    model_config = ConfigDict(extra="forbid")
    label: Text
    surname: Text | None = None
    subjects: Any = None  # read by `_subjects`
    subject_set: Text | None = None


class _SubjectSetFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    title: Text
    description: Text
    groups: Annotated[dict[Key, _GroupFile], Field(min_length=1)]


@dataclass
class _SubjectSets:
    """Groups of the sound subject sets by set and group key, and the file names of the broken ones."""

    sound: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def load_scenarios(folders: Iterable[Path | str] = ()) -> tuple[Registry[Scenario], tuple[Problem, ...]]:
    """Load the built-in scenarios and those of the given folders, in that order, files of a folder by name.

    A scenario's key is the stem of its file (`loan.yaml` or `loan.yml` -> `loan`). A file takes the place of an
    earlier one of the same key only if it says `replaces: true`. Subject sets are files in a folder's `subjects/`.
    A folder that does not exist holds no scenarios; hidden files are left alone.

    Returns the valid scenarios by key, and a problem for every file that is not one. An earlier scenario of a broken
    file's key cannot be used, nor can its subject sets be by what is read after a broken one of their key.
    """
    if isinstance(folders, (str, Path)):
        raise TypeError("load_scenarios takes several folders: put the one folder into a list")
    scenarios: dict[str, Scenario] = {}
    broken: dict[str, Problem] = {}
    files: dict[str, Path] = {}
    problems: list[Problem] = []
    sets = _SubjectSets()
    named = (home_expanded(folder, "scenario folders") for folder in (BUILT_IN, *folders))
    for folder in dict.fromkeys(Path(os.path.realpath(folder)) for folder in named):
        has_subjects = (folder / SUBJECT_FOLDER).is_dir()
        for path in _files(folder / SUBJECT_FOLDER, problems) if has_subjects else []:
            try:
                _add_subject_set(path, sets)
            except Faults as error:
                sets.broken.setdefault(path.stem, _shown(path))
                problems.append(_problem(path, error))
        here: dict[str, Path] = {}
        for path in _files(folder, problems):
            try:
                if path.stem in here:
                    raise Faults(f"the key {path.stem} is taken by {here[path.stem].name} beside it: rename one")
                here[path.stem] = path
                scenarios[path.stem] = _read_scenario(path, sets, scenarios)
                files[path.stem] = path
                broken.pop(path.stem, None)
            except Faults as error:
                broken[path.stem] = _problem(path, error)
                problems.append(broken[path.stem])
    registry = Registry(
        {key: scenario for key, scenario in scenarios.items() if key not in broken},
        noun="scenario",
        problems=problems,
        broken=broken,
        files=files,
        known=[*scenarios, *(key for key in broken if key not in scenarios and _fault_of_key(key) is None)],
    )
    return registry, registry.problems


def _files(folder: Path, problems: list[Problem]) -> list[Path]:
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in (".yaml", ".yml") and not path.name.startswith(".")
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(_problem(folder, Faults(f"cannot be read as a folder: {error.strerror}")))
        return []


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _problem(path: Path, error: Faults) -> Problem:
    return Problem(path, path.stem, "\n".join(f"{_shown(path)}: {fault}" for fault in error.faults))


def _add_subject_set(path: Path, sets: _SubjectSets) -> None:
    if fault := _fault_of_key(path.stem):
        raise Faults(fault)
    if path.stem in sets.sound:
        raise Faults(f"a subject set {path.stem} exists already: rename this one")
    data = _read_mapping(path)
    try:
        read = _SubjectSetFile.model_validate(data)
    except ValidationError as error:
        raise Faults(*_in_words(error, data)) from None
    groups = {}
    for key, group in read.groups.items():
        where = f"groups.{key}"
        if group.subject_set is not None:
            raise Faults(f"{where}.subject_set: a subject set gives its subjects itself, in {where}.subjects")
        groups[key] = _subjects(where, group)
        if not groups[key]:
            raise Faults(f"{where}.subjects is empty: give the group {key} its subjects")
    sets.sound[path.stem] = groups


def _read_scenario(path: Path, sets: _SubjectSets, earlier: dict[str, Scenario]) -> Scenario:
    if fault := _fault_of_key(path.stem):
        raise Faults(fault)
    data = _read_mapping(path)
    replaces = data.pop("replaces", False)
    if not isinstance(replaces, bool):
        raise Faults(f"replaces is {replaces!r}: write true or false")
    if path.stem in earlier and not replaces:
        raise Faults(f"a scenario {path.stem} exists already: rename the file, or write replaces: true in it")
    if path.stem not in earlier and replaces:
        raise Faults(f"replaces: there is no scenario {path.stem} to replace: remove the line or mend the file's name")
    if "key" in data:
        raise Faults(f"key: the key of a scenario is the name of its file, {path.stem}: remove the line")

    faults: list[str] = []
    resolved = dict(data)
    if "holistic_bias" in data:
        resolved |= _sentences_of_holistic_bias(path, data)
    elif isinstance(data.get("groups"), dict):
        resolved["groups"] = {}
        for key, group in data["groups"].items():
            try:
                resolved["groups"][key] = _resolved_group(f"groups.{key}", group, sets)
            except Faults as error:
                faults += error.faults
    try:
        scenario = Scenario.model_validate({**resolved, "key": path.stem})
    except ValidationError as error:
        # A group that could not be read is absent from `resolved`: complaints about its absence would mislead.
        rest = [
            fault
            for fault in _in_words(error, resolved)
            if not (faults and fault.startswith(("groups must", "comparison.")))
        ]
        raise Faults(*faults, *rest) from None
    if faults:
        raise Faults(*faults)
    return scenario


def _sentences_of_holistic_bias(path: Path, data: dict[Any, Any]) -> dict[str, Any]:
    """What a scenario of HolisticBias has in place of groups, templates and variations of its own."""
    doubled = [field for field in ("groups", "templates", "variations") if field in data]
    if doubled:
        raise Faults(*(f"{field}: holistic_bias brings its own {field}: remove one of the two" for field in doubled))
    try:
        asked = data["holistic_bias"]
        chosen = HolisticBias.model_validate(
            with_paths(asked, HolisticBias, path.parent) if isinstance(asked, dict) else asked
        )
    except Faults as error:
        raise Faults(*(f"holistic_bias{fault}" for fault in error.faults)) from None
    except ValidationError as error:
        messages = _in_words(error, data["holistic_bias"], HolisticBias)
        raise Faults(*(f"holistic_bias{'' if fault.startswith(' ') else '.'}{fault}" for fault in messages)) from None
    try:
        groups = subgroups_of(chosen)
    except ExciseError as error:
        field = "" if str(error).startswith(("axis", "families")) else "folder: "
        raise Faults(f"holistic_bias.{field}{error}") from None
    return {"holistic_bias": chosen, "groups": groups, "variations": {SENTENCES: {}}}


def _resolved_group(where: str, data: Any, sets: _SubjectSets) -> dict[str, Any]:
    """A group of a scenario file in the form of the schema: its label and the list of its subjects."""
    if not isinstance(data, dict):
        raise Faults(f"{where} must hold a label and subjects, but is {described(data)}")
    try:
        group = _GroupFile.model_validate(data)
    except ValidationError as error:
        raise Faults(*(f"{where}.{fault}" for fault in _in_words(error, data, _GroupFile))) from None
    if group.subject_set is None:
        return {"label": group.label, "subjects": _subjects(where, group)}
    if group.subjects is not None or group.surname is not None:
        raise Faults(f"{where} has subject_set beside subjects or surname: keep one")
    set_key, _, group_key = group.subject_set.partition("/")
    if set_key in sets.broken:
        raise Faults(f"{where}.subject_set: the subject set {set_key} is broken: mend {sets.broken[set_key]}")
    if set_key in sets.sound:
        if group_key not in sets.sound[set_key]:
            raise Faults(
                f"{where}.subject_set: the subject set {set_key} has no group '{group_key}'; write one of "
                + ", ".join(f"{set_key}/{known}" for known in sets.sound[set_key])
            )
        return {"label": group.label, "subjects": sets.sound[set_key][group_key]}
    raise Faults(f"{where}.subject_set: unknown subject set '{set_key}'; known are {', '.join(sorted(sets.sound))}")


def _subjects(where: str, group: _GroupFile) -> list[dict[str, Any]]:
    """The subjects of a group with full names, each {name, gender}."""
    if group.subjects is None:
        raise Faults(f"{where}.subjects is empty: give the group {where.rpartition('.')[2]} its subjects")
    by_gender = group.subjects if isinstance(group.subjects, dict) else {None: group.subjects}
    subjects, faults = [], []
    for gender, entries in by_gender.items():
        place_of_list = f"{where}.subjects" + ("" if gender is None else f".{gender}")
        if not isinstance(entries, (list, NoneType)):
            faults.append(f"{place_of_list} is {described(entries)}: write a list of subjects, or lists by gender")
            continue
        if not entries and gender is not None:
            faults.append(f"{place_of_list} is empty: give it subjects or remove it")
        for place, entry in enumerate(entries or []):
            here = f"{place_of_list}.{place}"
            if isinstance(entry, str):
                entry = {"name": entry}
            elif not isinstance(entry, dict):
                mend = "give a name" if isinstance(entry, (NoneType, list)) else "put the name into quotes"
                faults.append(f"{here} is {described(entry)}, not text: {mend}")
                continue
            elif gender is not None and "gender" in entry:
                faults.append(f"{here}.gender: the list gives the gender, {gender}: remove the line")
                continue
            try:
                subject = Subject.model_validate(entry if gender is None else {"gender": gender, **entry})
            except ValidationError as error:
                faults += [f"{here}.{fault}" for fault in _in_words(error, entry, Subject)]
                continue
            full = subject.name if group.surname is None else f"{subject.name} {group.surname}"
            subjects.append({"name": full, "gender": subject.gender})
    if faults:
        raise Faults(*faults)
    return subjects


def _fault_of_key(key: str) -> str | None:
    if not re.fullmatch(KEY_PATTERN, key):
        return f"the file's name is the key: rename '{key}', using small letters, digits, _ and - only"
    fault = key_fault(key)
    return f"the file's name is the key, which {fault}" if fault else None


def _read_mapping(path: Path) -> dict[str, Any]:
    written = read_yaml(path, "fields such as title: ... and outcome: ... to what they hold")
    if faults := [fault for entry in written.values() for fault in entry.faults]:
        raise Faults(*dict.fromkeys(faults))
    if not written:
        raise Faults("the file is empty: give title, description, outcome, groups, templates and variations")
    return {key: entry.value for key, entry in written.items()}


def _at(data: Any, place: Iterable[Any]) -> Any:
    """What stands at a place of a file, None where there is nothing."""
    for part in place:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _model_of(part: str, data: Any) -> tuple[type[BaseModel], ...]:
    """What the fields of a part of a scenario file are the fields of; empty where they are free."""
    if part == "comparison":
        return (Comparison,)
    return (outcome_of(_at(data, ("outcome", "kind"))),) if part == "outcome" else ()


def _in_words(error: ValidationError, data: Any, model: type[BaseModel] = Scenario) -> list[str]:
    """Pydantic's findings as `field: fault and mend`."""
    faults = []
    for fault in error.errors(include_url=False):
        loc = [part for part in fault["loc"] if part != "[key]"]
        if len(loc) < len(fault["loc"]):
            loc[-1] = fault["input"]  # pydantic's own account of a key is an int for true and false
        models: tuple[type[BaseModel], ...] = ()
        if len(loc) > 2 and loc[0] == "variations" and loc[2] == "fields":
            loc.pop(2)
        elif len(loc) == 1:
            models = (model,)
        elif loc:
            models = _model_of(str(loc[0]), data)
        if loc[-1:] == ["text"] and "template" in str(loc[-3:-1]):
            written = _at(data, loc[:-1])
            if not isinstance(written, dict):
                loc.pop()  # the file has the text alone
            else:
                models = (Template,)
        name = ".".join(map(str, loc))
        value = fault["input"]
        kind = fault["type"]
        if fault["loc"] and fault["loc"][-1] == "[key]":
            if isinstance(value, str):
                faults.append(f"{name}: a key may hold small letters, digits, _ and - only, not '{value}'")
            else:
                faults.append(f"{name}: the key is {described(value)}, not text: put it into quotes")
        elif kind == "missing":
            faults.append(f"{name} is missing: add it")
        elif kind == "extra_forbidden":
            known = [key for m in models for key in m.model_fields if key != "key"]
            close = difflib.get_close_matches(str(loc[-1]), known, n=1)
            hint = f": did you mean {close[0]}?" if close else f"; known are {', '.join(known)}" if known else ""
            faults.append(f"{name} is not a known field{hint}")
        elif kind == "string_type":
            mend = "give it a text" if isinstance(value, (NoneType, list, dict)) else "put it into quotes"
            faults.append(f"{name} is {described(value)}, not text: {mend}")
        elif kind == "string_unicode":
            faults.append(f"{name} holds half a character ({value!r}): write the character itself, or \\U and its code")
        elif kind == "string_too_short":
            faults.append(f"{name} is empty: give it a text")
        elif kind == "string_pattern_mismatch":
            faults.append(f"{name}: '{value}' may hold small letters, digits, _ and - only")
        elif kind in ("model_type", "dict_type", "model_attributes_type"):
            faults.append(f"{name} must be a mapping of fields, but is {described(value)}")
        elif kind == OUTCOME_KIND:
            faults.append(f"{name}.kind {fault['ctx']['fault']}")
        elif kind == "value_error" and not loc:
            faults += str(fault["ctx"]["error"]).splitlines()
        elif kind == "value_error":
            faults.append(f"{name} {fault['ctx']['error']}")
        else:
            faults.append(f"{name}: {fault['msg']} (it is {described(value)})")
    return faults
