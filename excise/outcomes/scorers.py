"""Scorers: what gives a text a score, and the registry they are named in.

Here: what all scorers have in common, the entries of `scorers.yaml`, whose fields are explained there, and the way from
a key to a scorer. Not here: the two kinds of scorers (`lexicon`, `classifier`), and the scoring of many texts
(`scoring`). Settings follow FASP (method, B1 and B2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from excise.files.registry import Problem, Registry, load_entries, names_source, require_one_source
from excise.models.specs import KEY_PATTERN

BUILT_IN_REGISTRY = Path(__file__).with_name("scorers.yaml")
DEFAULT_SCORER = "negative-wording"
SOURCES = ("hub", "folder", "builtin")

Activation = Literal["none", "sigmoid", "softmax"]


class Scorer(Protocol):
    """Anything that gives texts a score.

    fingerprint: 16 hex digits that change with the weights or the lexicon, the label and the lower-casing.
    measures: one honest line about what the score is.
    """

    @property
    def key(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def measures(self) -> str: ...

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts] in 0..1; NaN for a text of nothing but white space: it is unscored, not harmless."""
        ...


class ScorerSpec(BaseModel):
    """One entry of `scorers.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str = Field(pattern=KEY_PATTERN)
    description: str = ""
    hub: str | None = Field(default=None, min_length=1)
    revision: str | None = None
    folder: Path | None = None
    builtin: Literal["negative_wording"] | None = None
    label: str | None = None
    lower_case: bool = False
    activation: Activation | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ScorerSpec:
        require_one_source(self, SOURCES)
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub only")
        if self.builtin is not None and (self.label is not None or self.activation is not None):
            raise ValueError("label and activation go with a classifier only; remove them beside builtin")
        return self


def load_scorer_registry(paths: Iterable[Path] = ()) -> tuple[Registry[ScorerSpec], tuple[Problem, ...]]:
    """Read the built-in registry, then each of `paths` that exists.

    A later entry that names a source replaces an earlier one of its key; one without a source changes the fields that
    it names. What cannot be used is a problem that names file, entry and field, and whoever asks the registry for it
    gets that as ExciseError; the other entries stay usable.
    """
    files = [BUILT_IN_REGISTRY, *paths]
    registry = load_entries(files, ScorerSpec, "scorer", stands_alone=names_source(SOURCES))
    return registry, registry.problems


def load_scorer(key: str, registry: Registry[ScorerSpec], *, device: str = "cpu") -> Scorer:
    """Load a scorer by its key. device: of a classifier; `auto` takes the best there is.

    Raises ExciseError, naming the entry and the mend, where it is unknown or cannot be had.
    """
    spec = registry[key]
    if spec.builtin is not None:
        from excise.outcomes.lexicon import load_lexicon

        return load_lexicon(spec)
    from excise.outcomes.classifier import load_classifier

    return load_classifier(spec, device)


def as_read(text: str, lower_case: bool) -> str:
    """The text as scorers read it, in one line; empty for one of nothing but white space."""
    text = text.replace("\n", " ")
    if not text.strip():
        return ""
    return text.lower() if lower_case else text
