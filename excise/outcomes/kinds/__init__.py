"""The outcomes there are, one module each, found by their kind.

A module here, or an entry point of the group `excise.outcomes` in an installed package (`name = "package:Class"`), is
all that an outcome takes. Not here: what outcomes have in common (`excise.outcomes.outcome`).
"""

import pkgutil
from functools import cache
from importlib import import_module

from excise.errors import ExciseError
from excise.extensions import offered
from excise.outcomes.outcome import Outcome

GROUP = "excise.outcomes"


def outcome_of(kind: object) -> type[Outcome]:
    """The outcome of a kind, as files write it. One of our own needs no package to be sound.

    Raises ExciseError, with the kinds to choose from, where there is none, and as `known_outcomes`.
    """
    for outcomes in (_built_in, known_outcomes):
        if isinstance(kind, str) and kind in outcomes():
            return outcomes()[kind]
    *kinds, last = known_outcomes()
    raise ExciseError(f"write {', '.join(kinds)} or {last}")


def known_outcomes() -> dict[str, type[Outcome]]:
    """The outcomes by kind, our own first.

    Raises ExciseError, naming the entry point, for a package's that cannot be imported, is none or has a known kind.
    """
    outcomes = dict(_built_in())
    for name, outcome in offered(GROUP):
        if not (isinstance(outcome, type) and issubclass(outcome, Outcome)):
            raise ExciseError(f"{GROUP}: the entry point {name} is {outcome!r}; name a class of Outcome")
        if _kind_of(outcome) in outcomes:
            raise ExciseError(f"{GROUP}: the entry point {name} is a second outcome {_kind_of(outcome)}; rename it")
        outcomes[_kind_of(outcome)] = outcome
    return outcomes


@cache
def _built_in() -> dict[str, type[Outcome]]:
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = [
        member
        for module in modules
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Outcome) and member.__module__ == module.__name__
    ]
    return {_kind_of(outcome): outcome for outcome in classes}


def _kind_of(outcome: type[Outcome]) -> str:
    return outcome.model_fields["kind"].default
