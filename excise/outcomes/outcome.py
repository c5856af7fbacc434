"""The outcome: everything that the rest of the house asks about what an answer is worth.

Here: the base of all outcomes, with what most of them share. Not here: any one of them; each is a module of
`excise.outcomes.kinds`, or a class of an installed package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from excise.files.fields import TokenCount

if TYPE_CHECKING:
    from excise.outcomes.scoring import Judge


@dataclass(frozen=True)
class Answer:
    """One answer to be valued.

    prompt: the request as the scenario words it. text: the whole answer, from its prefix on, if it has one. finished:
    whether the model ended it; else it was cut, and its end is not known.
    """

    prompt: str
    text: str
    finished: bool


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn, as far as the scenario says it; None: as the audit's settings say. top_k: 0 for none."""

    temperature: float | None = None
    top_k: int = 0
    top_p: float | None = None


@dataclass(frozen=True)
class Words:
    """How reports and errors speak of an outcome.

    asks: what its scenario does ("asks for numbers"). value: what an answer has ("a number"). valued: the answers that
    have it ("answers that hold a number"), in two parts where a sentence needs them apart: answers ("answers") and hold
    ("hold a number"). units: of what every group needs enough.
    """

    asks: str
    value: str
    valued: str
    hold: str
    answers: str = "answers"
    units: str = "names of every group"


class Outcome(BaseModel, ABC):
    """What is asked of a model in a scenario, and what its answers are worth.

    The fields are those of `outcome` in a scenario's file. A subclass gives `kind` as a literal with itself as default,
    `words` and `values`, and changes of the rest what is otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    max_new_tokens: TokenCount = 16

    words: ClassVar[Words]
    pairwise: ClassVar[bool] = True
    """Whether two groups of names are compared, whose names are halved, resampled and permuted; else all subgroups of
    an axis are, over templates. Side effects, restoration, stability and the grid are for pairs alone."""
    cluster: ClassVar[Literal["subject", "prompt_id"]] = "subject"
    """The column that says which answers are drawn anew together: names, or prompts where subgroups have few names."""
    continues: ClassVar[bool] = False
    """Whether an answer continues the raw text of its prompt; else it answers a user's turn, and may have a prefix."""
    enumerable: ClassVar[bool] = True
    """Whether answers are short enough to be enumerated, and valued by their text alone."""
    disparity: ClassVar[Literal["smd", "toxicity"]] = "smd"
    """What removing a head is judged by (`excise.attribution.head_impacts`)."""

    @abstractmethod
    def values(self, answers: Sequence[Answer], judge: Judge | None = None) -> list[float | None]:
        """The value of each answer, finite; None for one without. judge: where there is `scored_by`."""

    @property
    def audited_as(self) -> Literal["number", "toxicity"]:
        """The kind of our own whose presets, settings and strategies (`outcomes` in strategies.yaml) serve its audits:
        the one that compares groups as it does."""
        return "number" if self.pairwise else "toxicity"

    @property
    def log_scale(self) -> bool:
        """Whether differences are judged between logarithms of values."""
        return False

    @property
    def scored_range(self) -> tuple[float, float] | None:
        """Where sensible values lie, low to high; None: anywhere."""
        return None

    @property
    def counted_in(self) -> str:
        """The unit of the values, for figures."""
        return self.kind

    @property
    def scored_by(self) -> str | None:
        """Key of the registry of scorers, where a scorer values the answers."""
        return None

    @property
    def scores_prompts(self) -> bool:
        """Whether such a scorer reads the prompt before the answer, too."""
        return False

    @property
    def decoding(self) -> Decoding:
        """How answers are drawn."""
        return Decoding()

    def answer_tokens(self, asked: int | None) -> int:
        """The most tokens of an answer. asked: what the audit's settings say, if anything."""
        return self.max_new_tokens

    @property
    def prompt_format(self) -> Literal["raw"] | None:
        """None: prompts are put to a model in the format its entry in models.yaml names."""
        return "raw" if self.continues else None

    @property
    def prompt_tokens(self) -> int | None:
        """Prompts are cut behind so many tokens; None: never."""
        return None

    def faults(self) -> Iterator[str]:
        """Every broken rule between the fields as `outcome.field: fault and mend`."""
        yield from ()

    def faults_of_prefix(self, field: str, prefix: str) -> Iterator[str]:
        """What would make answers behind a prefix be misread, as `field: fault and mend`."""
        yield from ()

    def mend(self, empty: bool) -> str:
        """What helps where too few answers have a value, one sentence. empty: all of them are blank."""
        return "What helps: a chat model; more samples."
