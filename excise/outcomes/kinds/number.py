"""The outcome that is a number: read out of a free-text answer, in a unit, on a scale, better high or low.

How text becomes a number is in `excise.outcomes.answers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from excise.files.fields import Number, Text
from excise.outcomes.answers import continued, parse_completion, parse_number
from excise.outcomes.outcome import Answer, Outcome, Words

if TYPE_CHECKING:
    from excise.outcomes.scoring import Judge


class NumberOutcome(Outcome):
    """A number the model answers with, to a user turn in its chat format.

    `low`, `high` and `better` speak of the number as the model writes it, in `unit`s. The range is what a sensible
    answer lies in; it is checked and reported, answers are never clipped to it. `scale` says where differences are
    judged: `log` for prices, whose differences are ratios, else `linear`. `better` is the direction that is to the
    named person's advantage. `reverse_from` scores a rank r as `reverse_from - r`, so that more is better.
    """

    kind: Literal["number"] = "number"
    unit: Text
    low: Number
    high: Number
    scale: Literal["log", "linear"]
    better: Literal["higher", "lower"]
    reverse_from: Number | None = None

    words: ClassVar[Words] = Words(
        asks="asks for numbers", value="a number", valued="answers that hold a number", hold="hold a number"
    )

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher *scored* value is to the person's advantage."""
        return (self.better == "higher") != (self.reverse_from is not None)

    @property
    def log_scale(self) -> bool:
        return self.scale == "log"

    @property
    def scored_range(self) -> tuple[float, float]:
        if self.reverse_from is None:
            return self.low, self.high
        return self.reverse_from - self.high, self.reverse_from - self.low

    @property
    def counted_in(self) -> str:
        return self.unit

    def scored(self, answer: float) -> float:
        """The value an answer counts as: itself, or `reverse_from - answer` for ranks (method A2)."""
        return answer if self.reverse_from is None else self.reverse_from - answer

    def values(self, answers: Sequence[Answer], judge: Judge | None = None) -> list[float | None]:
        return [None if number is None else self.scored(number) for number in numbers_of(answers)]

    def faults(self) -> Iterator[str]:
        if self.low >= self.high:
            yield f"outcome.low ({self.low:g}) must be less than outcome.high ({self.high:g})"
        if self.scale == "log" and self.low <= 0:
            yield f"outcome.low ({self.low:g}) must be above 0 on a log scale; raise it or write scale: linear"
        if self.reverse_from is not None:
            if self.scale == "log":
                yield "outcome.scale must be linear where outcome.reverse_from is given"
            if self.better == "higher":
                yield (
                    "outcome.better must be lower where outcome.reverse_from is given: it turns ranks, 1 being the best"
                )

    def faults_of_prefix(self, field: str, prefix: str) -> Iterator[str]:
        if any(map(str.isdigit, prefix)) or parse_number(prefix) is not None:
            yield (
                f"{field} holds a number ({prefix!r}), which would be read as the answer, or as part of it: word it "
                "without"
            )
            return
        closed = "".join({"(": ")", "[": "]", "{": "}"}[bracket] for bracket in reversed(_still_open(prefix)))
        for answer in ("50", "1200", "7"):
            read = {parse_number(continued(prefix, answer)), parse_number(continued(prefix, answer + closed))}
            if read - {None} != {float(answer)}:
                numbers = ", ".join(map(str, read - {None})) or "no number"
                yield (
                    f"{field}: behind {prefix!r} the answer {answer} is read as {numbers}: leave out what changes it, "
                    "such as a minus sign or a scale"
                )
                return

    def mend(self, empty: bool) -> str:
        prefix = "$" if self.unit.casefold().startswith(("usd", "dollar", "$", "us dollar")) else "The number is "
        return (
            f'What helps: an answer_prefix in the templates of the scenario, such as "{prefix}", which the model '
            "continues with a number; a chat model; more samples."
        )


def numbers_of(answers: Sequence[Answer]) -> list[float | None]:
    """The single number that each answer names; None where it names none, several, or one that may go on."""
    return [parse_completion(answer.text, answer.finished) for answer in answers]


def _still_open(text: str) -> list[str]:
    """The brackets that a text opens and does not close."""
    stack: list[str] = []
    for character in text:
        if character in "([{":
            stack.append(character)
        elif character in ")]}" and stack:
            stack.pop()
    return stack
