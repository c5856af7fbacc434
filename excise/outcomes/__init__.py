"""Outcomes: what an answer is worth, and everything that follows from that elsewhere.

Here: the base of all outcomes (`outcome`), one module for each of them (`kinds`), the one number in a free text, and
the scorers of continuations. Not here: how answers are drawn (`generation`), and what the values of many answers say
about groups (`evaluation`); both ask the outcome, and nobody asks which one it is.
"""

from excise.outcomes.kinds import known_outcomes, outcome_of
from excise.outcomes.kinds.number import NumberOutcome
from excise.outcomes.kinds.toxicity import ToxicityOutcome
from excise.outcomes.outcome import Answer, Decoding, Outcome, Words

__all__ = [
    "Answer",
    "Decoding",
    "NumberOutcome",
    "Outcome",
    "ToxicityOutcome",
    "Words",
    "known_outcomes",
    "outcome_of",
]
