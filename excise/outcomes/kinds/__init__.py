"""The outcomes there are, one module each, outcome by their kind.

A module here, or an entry point of the group `excise.outcomes` in an installed package (`kind = "package:Class"`), is
all that an outcome takes. Not here: what outcomes have in common (`excise.outcomes.outcome`).
"""

import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from excise.errors import ExciseError
from excise.outcomes.outcome import Outcome

GROUP = "excise.outcomes"


def known_kinds() -> tuple[str, ...]:
    """The kinds there are, our own first."""
    return (*_built_in(), *_installed())


def outcome_of(kind: str) -> type[Outcome]:
    """The outcome of a kind. Raises KeyError where there is none, and ExciseError where a package's cannot be used."""
    if kind in _built_in():
        return _built_in()[kind]
    point = _installed()[kind]
    try:
        outcome = point.load()
    except (ImportError, AttributeError) as error:
        raise ExciseError(f"the package that brings the outcome {kind} ({point.value}) fails: {error}") from error
    if not (isinstance(outcome, type) and issubclass(outcome, Outcome) and _kind_of(outcome) == kind):
        raise ExciseError(f"{point.value}, which should be the outcome {kind}, is no Outcome of that kind")
    return outcome


@cache
def _built_in() -> dict[str, type[Outcome]]:
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Outcome) and each.__module__ == module.__name__
    ]
    return {_kind_of(each): each for each in classes}


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in _built_in()}


def _kind_of(outcome: type[Outcome]) -> str:
    return outcome.model_fields["kind"].default
