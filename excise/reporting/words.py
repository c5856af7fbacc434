"""Words that several reports share: lists, what was reused, and how few names there are."""

from __future__ import annotations

from collections.abc import Sequence

from excise.errors import ExciseError
from excise.evaluation.thresholds import FEW_NAMES


def few_names_warning(names: int, name: str = "name", group: str = "group") -> str:
    """Why an interval from so few names a group is to be distrusted. name, group: what they are called."""
    return (
        f"An interval from {names} {name}{'' if names == 1 else 's'} a {group} says little: with fewer than "
        f"{FEW_NAMES} it misses how {name}s differ. Ask about more {name}s."
    )


def reuse_sentence(drawn: int, reused: int) -> str:
    """How many completions were sampled in this run and how many were taken from earlier ones."""
    if drawn < 0 or reused < 0:
        raise ExciseError(f"completions drawn and reused cannot be negative, got {drawn} and {reused}")
    if drawn == 0 and reused == 0:
        return "No completion was asked for."
    if drawn == 0:
        return f"Nothing was sampled anew: {_completions(reused)} from earlier runs reused, since nothing changed."
    if reused == 0:
        return f"{_completions(drawn)} sampled, none reused: nothing in the cache matched."
    share = reused / (drawn + reused)
    shown = "over 99" if 0.99 < share < 1 else "under 1" if share < 0.01 else f"{100 * share:.0f}"
    return f"{_completions(drawn)} sampled, {_completions(reused)} ({shown} %) reused from earlier runs."


def _completions(count: int) -> str:
    return f"{count:,} completion" + ("" if count == 1 else "s")


def listed(names: Sequence[str]) -> str:
    """`chair, car and oven`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
