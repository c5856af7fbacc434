"""Entries of `models.yaml`: where a model comes from, how it is asked, and what it was before a bias was put in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from excise.files.registry import Problem, Registry, load_entries, names_source, require_one_source, unknown
from excise.models.content import files_of, stamp_of

BUILT_IN_REGISTRY = Path(__file__).with_name("models.yaml")
KEY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class WheelSource(BaseModel):
    """A GGUF file inside an installed Python package."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    package: str
    file: str
    sha256: str
    install: str


class ModelSpec(BaseModel):
    """One entry of `models.yaml`: where a model comes from and how it is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str = Field(pattern=KEY_PATTERN)
    description: str = ""
    hub: str | None = Field(default=None, min_length=1)
    revision: str | None = None
    folder: Path | None = None
    gguf: Path | None = None
    wheel: WheelSource | None = None
    base: str | None = None
    low_rank: Path | None = None
    reference: str | None = None
    prompt_format: Literal["chat", "raw"] = "chat"
    chat_template: Path | None = None
    chat_template_name: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @field_validator("reference", mode="before")
    @classmethod
    def _no_reference(cls, value: Any) -> Any:
        """`false`, that there is none, as an empty text."""
        return "" if value is False else value

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        require_one_source(self, SOURCES)
        if (self.base is None) != (self.low_rank is None):
            raise ValueError("base and low_rank belong together: name both or neither")
        if self.reference == self.key:
            raise ValueError("reference names the entry itself; name the model that it was before it was changed")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub only")
        templates = [name for name in ("chat_template", "chat_template_name") if getattr(self, name) is not None]
        if len(templates) == 2:
            raise ValueError("chat_template names a file, chat_template_name one of the tokenizer's own: name one")
        if templates and self.prompt_format == "raw":
            raise ValueError(f"{templates[0]} has no effect beside prompt_format: raw; remove one of them")
        return self


ASKING = {"prompt_format", "chat_template", "chat_template_name"}
"""The fields of an entry that say how a model is asked; one with a base takes them from it unless it has its own."""
SOURCES = ("hub", "folder", "gguf", "wheel", "base")


def load_registry(paths: Iterable[Path] = ()) -> tuple[Registry[ModelSpec], tuple[Problem, ...]]:
    """Read the built-in registry, then each of `paths` that exists.

    A later entry that names a source replaces an earlier one of its key; one without a source changes the fields that
    it names. What cannot be used is a problem that names file, entry and field, and whoever asks the registry for it
    gets that as ExciseError; the other entries stay usable.
    """
    files = [BUILT_IN_REGISTRY, *paths]
    registry = load_entries(files, ModelSpec, "model", stands_alone=names_source(SOURCES))
    problems, broken, usable = list(registry.problems), dict(registry.broken), dict(registry)
    while faults := {key: fault for key in usable if (fault := _fault_of(key, usable, broken))}:
        for key, fault in faults.items():
            broken[key] = Problem(registry.files[key], key, f"{registry.files[key]}: {key}.{fault}")
            problems.append(broken[key])
            del usable[key]
    whole = Registry(
        usable,
        noun=registry.noun,
        problems=problems,
        broken=broken,
        known=registry.known,
        files=registry.files,
    )
    return whole, whole.problems


def _fault_of(key: str, usable: Mapping[str, ModelSpec], broken: Mapping[str, Problem]) -> str | None:
    """What is wrong with an entry beside others, as `field: fault and mend`; None for nothing."""
    spec = usable[key]
    if not _rests_on_a_source(key, usable):
        broken_base = None if spec.base is None else broken.get(spec.base)
        reason = f": {broken_base.message}" if broken_base is not None else "; name one that has weights"
        return f"base: {spec.base!r} is no usable model{reason}"
    if spec.reference and spec.reference not in usable:
        reason = (
            broken[spec.reference].message if spec.reference in broken else unknown("model", spec.reference, usable)
        )
        return f"reference: {spec.reference!r} is no usable model: {reason}"
    return None


def reference_of(key: str, registry: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """The entry of the model that `key` was before it was changed, to be asked as `key` is; None where none is known.

    It is the entry named by `reference`, else by `base`; `reference: false` says that there is none. Prompt format,
    chat template and dtype are those of `key`, so that weights alone make the difference.
    """
    spec = registry[key]
    named = spec.base if spec.reference is None else spec.reference
    if not named:
        return None
    asked = asked_like_its_base(spec, registry)
    return registry[named].model_copy(update={name: getattr(asked, name) for name in (*sorted(ASKING), "dtype")})


def _rests_on_a_source(key: str, registry: Mapping[str, ModelSpec]) -> bool:
    """Whether following `base` from an entry ends at one with weights of its own."""
    seen: set[str] = set()
    place: str | None = key
    while place is not None and place in registry and place not in seen:
        seen.add(place)
        place = registry[place].base
    return place is None


def state_of(spec: ModelSpec, registry: Mapping[str, ModelSpec]) -> tuple[Any, ...]:
    """The entry, its bases and the size and times of their files: as long as it stays, a loaded model is the same."""
    named = [path for path in (spec.gguf, spec.low_rank, spec.chat_template) if path is not None]
    files = [*named, *(files_of(spec.folder) if spec.folder is not None and spec.folder.is_dir() else ())]
    base = () if spec.base is None else state_of(registry[spec.base], registry)
    return spec, stamp_of([path for path in files if path.is_file()]), *base


def asked_like_its_base(spec: ModelSpec, registry: Mapping[str, ModelSpec]) -> ModelSpec:
    """The entry with what it does not say of its own about how it is asked, taken from its base."""
    if spec.base is None:
        return spec
    base, said = asked_like_its_base(registry[spec.base], registry), spec.model_fields_set
    taken = {"dtype"} - said
    if not said & ASKING:
        taken |= ASKING
    return spec.model_copy(update={name: getattr(base, name) for name in taken})
