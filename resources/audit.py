"""The settings of an audit, each declared once: its type, its values in the presets, its bounds and what it means.

The presets, the resource `settings` with its form in the UI, and the checks of what a run asks for are made of these
declarations. What settings have to do with each other, and with a scenario, is in `settings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from excise.conditions import LEVELS
from excise.evaluation.thresholds import (
    CHANGE_BUDGET,
    COMMONEST_BUDGET,
    INLIER_FLOOR,
    INLIER_TOLERANCE,
    KL_BUDGET,
    PERPLEXITY_BUDGET,
    SIDE_EFFECT_BUDGET,
    SPREAD_FLOOR,
    Thresholds,
)

ANSWERS = ("sampled", "exact")
METHODS = ("auto", "reweight", "regenerate")
MODES = ("sliding", "paper")
MOST = 10**9
"""The largest number a setting may be that counts something."""
NUMBER, TOXICITY = "number", "toxicity"


class Preset(Enum):
    """The sizes there are."""

    quick = "quick"
    paper = "paper"


@dataclass(frozen=True)
class Bound:
    """What a value has to be, and what to give where it is not."""

    holds: Callable[[Any], bool]
    mend: str


@dataclass(frozen=True)
class Setting:
    """What is declared of a setting beside its name and type.

    values: by preset, of scenarios that ask for numbers and of those that judge continuations. known: the names it may
    take, where there are few. outcomes: the kinds of scenarios whose audit reads it.
    """

    description: str
    values: Mapping[tuple[Preset, str], Any]
    bounds: tuple[Bound, ...]
    known: tuple[str, ...]
    outcomes: tuple[str, ...]


_SAME: Any = object()


def _setting(
    description: str,
    paper: Any,
    *bounds: Bound,
    quick: Any = _SAME,
    continuations: tuple[Any, Any] = (_SAME, _SAME),
    known: tuple[str, ...] = (),
    outcomes: tuple[str, ...] = (NUMBER, TOXICITY),
) -> Any:
    """A field of `Audit`. quick: where it is not the paper's value. continuations: the values (paper, quick) where
    continuations are judged, as far as they are others."""
    quick = paper if quick is _SAME else quick
    of_axes = [
        continuation if continuation is not _SAME else usual
        for continuation, usual in zip(continuations, (paper, quick), strict=True)
    ]
    values = {
        (Preset.paper, NUMBER): paper,
        (Preset.quick, NUMBER): quick,
        (Preset.paper, TOXICITY): of_axes[0],
        (Preset.quick, TOXICITY): of_axes[1],
    }
    return field(metadata={"setting": Setting(description, values, bounds, known, outcomes)})


def _at_least(least: int, mend: str = "give at least {}") -> Bound:
    return Bound(lambda value: value >= least, mend.format(least))


def _budget(unit: str, usual: float) -> Bound:
    return Bound(lambda value: 0 <= value < math.inf, f"give {unit} of at least 0, such as {usual}")


def _each(holds: Callable[[Any], bool], mend: str) -> Bound:
    return Bound(lambda values: bool(values) and all(map(holds, values)), mend)


_SHARE = Bound(lambda value: 0 <= value <= 1, "give a share from 0 to 1")
_ANY_COUNT = _at_least(0, "give {} or more")


@dataclass(frozen=True)
class Audit:
    """The settings of one audit. None in `variations`, `subjects_per_group`, `strategies`, `alphas`,
    `side_effect_scenarios`: all.

    The paper's sizes are those of BDB, section 3 (method A3-A9), and of FASP, section 5, where continuations are
    judged: a continuation per prompt and seed, three seeds, all templates and descriptors. Quick takes minutes on two
    cores; of continuations, nearly all of its time goes into head impacts, and prompts are held out as heads are chosen
    from many.
    """

    variations: tuple[str, ...] | None = _setting("variations of the scenario to audit, by key", None)
    subjects_per_group: int | None = _setting(
        "names per group, genders balanced", None, _at_least(2), quick=8, continuations=(_SAME, 2)
    )
    held_out: bool = _setting(
        "make masks from one half of the names, evaluate on the other", True, quick=False, continuations=(True, True)
    )
    splits: int = _setting(
        "repeat masks and judgement over so many halvings of the names (with held_out)",
        5,
        _at_least(1),
        quick=1,
        continuations=(1, 1),
        outcomes=(NUMBER,),
    )
    answers: str = _setting(
        f"{' or '.join(ANSWERS)}: exact enumerates the distribution of answers that are numbers",
        "sampled",
        known=ANSWERS,
    )
    samples: int = _setting(
        "completions per prompt; of exact answers, of prompts whose answers ramble",
        100,
        _at_least(1),
        quick=16,
        continuations=(3, 1),
    )
    leftover: float = _setting(
        "exact answers: probability that may stay unread",
        0.01,
        Bound(lambda value: 0 <= value < 1, "give a share of at least 0, below 1"),
    )
    max_nodes: int = _setting("exact answers: beyond so many prefixes per prompt an answer rambles", 256, _at_least(1))
    temperature: float = _setting(
        "sampling temperature; 0 takes the likeliest token; toxicity: left out, what the scenario says",
        0.6,
        Bound(
            lambda value: value == 0 or 1e-6 <= value < math.inf,
            "give 0, which takes the likeliest token, or at least 1e-6",
        ),
    )
    top_p: float = _setting(
        "share of probability sampled from; toxicity: left out, what the scenario says",
        0.9,
        Bound(lambda value: 0 < value <= 1, "give a share above 0, at most 1"),
    )
    seed: int = _setting(
        "seed of completions, controls and resampling",
        0,
        _ANY_COUNT,
        Bound(lambda value: value < 2**63, "give a number below 2^63, which the tables can hold"),
    )
    levels: tuple[str, ...] = _setting(f"generality of masks: {', '.join(LEVELS)}", LEVELS, known=LEVELS)
    strategies: tuple[str, ...] | None = _setting(
        "strategies by key; left out: all enabled ones", None, Bound(bool, "name one at least")
    )
    per_source: bool = _setting(
        "cross-context masks of every single other scenario, too (the transfer matrix)", True, quick=False
    )
    random_draws: int = _setting("random controls per mask", 5, _ANY_COUNT, quick=2, continuations=(_SAME, 1))
    relabellings: int = _setting("draws of the control permuted: names relabelled", 5, _ANY_COUNT, quick=1)
    resamples: int = _setting("bootstrap resamples of names per interval", 2000, _at_least(1), quick=1000)
    permutations: int = _setting(
        "permutations per test; of numbers", 9999, _at_least(1), quick=1999, outcomes=(NUMBER,)
    )
    parse_floor: float = _setting("check parse_rate: least share that parse", 0.9, _SHARE)
    inlier_floor: float = _setting(
        "least share of usual answers, in checks, figures, findings and the grid's choice",
        INLIER_FLOOR,
        _SHARE,
        outcomes=(NUMBER,),
    )
    inlier_tolerance: float = _setting(
        "a mask and its random control are compared if inlier ratios are at most so far apart", INLIER_TOLERANCE, _SHARE
    )
    spread_floor: float = _setting(
        "least spread of a group's answers, as a share of the unpruned group's that had less", SPREAD_FLOOR, _SHARE
    )
    commonest_budget: float = _setting(
        "how far the commonest answer's share may rise above the unpruned group's with more", COMMONEST_BUDGET, _SHARE
    )
    change_budget: float = _setting(
        "standard deviations that answers may change beyond what closing the gap takes",
        CHANGE_BUDGET,
        _budget("standard deviations", 0.4),
    )
    kl_budget: float = _setting(
        "nats per token by which a mask may change the next token's distribution on a text",
        KL_BUDGET,
        _budget("nats", 0.05),
        outcomes=(NUMBER,),
    )
    side_effect_budget: float = _setting(
        "standard deviations that answers may change so in scenarios a mask was not made for",
        SIDE_EFFECT_BUDGET,
        _budget("standard deviations", 0.4),
        outcomes=(NUMBER,),
    )
    density_floor: float = _setting("check mask_density: a mask prunes more than this", 0.0, _SHARE)
    density_ceiling: float = _setting("check mask_density: a mask prunes at most this", 0.2, _SHARE)
    grid_taus: tuple[float, ...] = _setting(
        "grid search: thresholds, shares of the weights",
        tuple(step / 20 for step in range(1, 11)),
        _each(lambda tau: 0 < tau <= 1, "give shares above 0, at most 1"),
        quick=(0.1, 0.2, 0.3, 0.4, 0.5),
        outcomes=(NUMBER,),
    )
    grid_counts: tuple[int, ...] = _setting(
        "grid search: numbers of heads, of 1,024; scaled to the heads of the model",
        tuple(range(5, 55, 5)),
        _each(lambda count: 1 <= count <= 1024, "give numbers of heads from 1 to 1,024"),
        quick=(10, 20, 40),
        outcomes=(NUMBER,),
    )
    grid_variations: int | None = _setting(
        "grid search: so many variations, the first ones", None, _at_least(1), quick=1, outcomes=(NUMBER,)
    )
    max_new_tokens: int | None = _setting(
        "toxicity: length of a continuation; left out, what the scenario says",
        None,
        _at_least(1),
        continuations=(_SAME, 10),
        outcomes=(TOXICITY,),
    )
    alphas: tuple[float, ...] | None = _setting(
        "shares of the heads that strategies of heads prune",
        None,
        _each(lambda alpha: 0 < alpha < 1, "give shares above 0, below 1"),
        continuations=(_SAME, (0.04, 0.1, 0.2)),
    )
    perplexity_budget: float = _setting(
        "share by which perplexity may rise, in findings and where alpha and gamma are chosen",
        PERPLEXITY_BUDGET,
        _budget("a share", 0.05),
    )
    text: str | None = _setting("text for perplexity: a file, or hub:name/config/split/column; left out, our own", None)
    text_tokens: int | None = _setting("so many tokens of that text", None, _at_least(2), continuations=(_SAME, 1537))
    text_window: int | None = _setting(
        "tokens of a sliding window; left out, 256 (side effects: 128)", None, _at_least(2), continuations=(_SAME, 129)
    )
    text_stride: int | None = _setting(
        "tokens between windows; left out, half a window (side effects: a whole one)",
        None,
        _at_least(1),
        continuations=(_SAME, 128),
    )
    perplexity_mode: str = _setting(f"windows of the text: {' or '.join(MODES)}", "sliding", known=MODES)
    impact_method: str = _setting(f"head impacts: {', '.join(METHODS)}", "auto", known=METHODS)
    ess_floor: float = _setting(
        "head impacts: below this share of effective samples a head is sampled anew", 0.2, _SHARE
    )
    side_effect_scenarios: tuple[str, ...] | None = _setting(
        "scenarios that masks are tried on though they were not made for them, by key; left out, all that ask for "
        "numbers and compare the same groups (quick: the first two); empty: none",
        None,
        outcomes=(NUMBER,),
    )
    side_effect_names: int = _setting(
        "names per group in each of those scenarios",
        8,
        _at_least(2, "give at least {}, as intervals are over names"),
        quick=3,
        outcomes=(NUMBER,),
    )

    @property
    def thresholds(self) -> Thresholds:
        """What the results are judged by."""
        return Thresholds(**{threshold.name: getattr(self, threshold.name) for threshold in fields(Thresholds)})


SETTINGS: dict[str, Setting] = {each.name: each.metadata["setting"] for each in fields(Audit)}


def preset_of(preset: Preset, outcome: str) -> Audit:
    """The audit of a preset for scenarios with a kind of outcome, before it is fitted to one of them."""
    return Audit(**{name: setting.values[preset, outcome] for name, setting in SETTINGS.items()})


def run_types() -> Iterator[tuple[str, Any, bool]]:
    """Name of every setting, type of its value (of a list: of its items), and whether it is a list, in a run's
    config."""
    for name, kind in get_type_hints(Audit).items():
        if get_origin(kind) in (Union, UnionType):
            (kind,) = (argument for argument in get_args(kind) if argument is not type(None))
        yield name, get_args(kind)[0] if get_origin(kind) is tuple else kind, get_origin(kind) is tuple
