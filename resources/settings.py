"""How large an audit is: the presets `quick` and `paper`, and what a run may change about them.

This is the one place of the presets' numbers; `pipelines/presets/` holds the run configs that choose them.
Settings reach only the stages that decide something: later stages take variations, names, samples and sampling
parameters from the completions they find, so that a rerun from the masks on is always consistent.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from excise.conditions import LEVELS
from excise.errors import ExciseError
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

if TYPE_CHECKING:
    from excise.scenarios import Scenario


class Preset(Enum):
    """The sizes there are."""

    quick = "quick"
    paper = "paper"


@dataclass(frozen=True)
class Audit:
    """The settings of one audit. None in `variations`, `subjects_per_group`, `strategies`, `alphas`,
    `side_effect_scenarios`: all."""

    variations: tuple[str, ...] | None
    subjects_per_group: int | None
    held_out: bool
    splits: int
    answers: str
    samples: int
    leftover: float
    max_nodes: int
    temperature: float
    top_p: float
    seed: int
    levels: tuple[str, ...]
    strategies: tuple[str, ...] | None
    per_source: bool
    random_draws: int
    relabellings: int
    resamples: int
    permutations: int
    parse_floor: float
    inlier_floor: float
    inlier_tolerance: float
    spread_floor: float
    commonest_budget: float
    change_budget: float
    kl_budget: float
    side_effect_budget: float
    density_floor: float
    density_ceiling: float
    grid_taus: tuple[float, ...]
    grid_counts: tuple[int, ...]
    grid_variations: int | None
    max_new_tokens: int | None
    alphas: tuple[float, ...] | None
    perplexity_budget: float
    text: str | None
    text_tokens: int | None
    text_window: int | None
    text_stride: int | None
    perplexity_mode: str
    impact_method: str
    ess_floor: float
    side_effect_scenarios: tuple[str, ...] | None
    side_effect_names: int

    @property
    def thresholds(self) -> Thresholds:
        """What the results are judged by."""
        return Thresholds(**{field.name: getattr(self, field.name) for field in fields(Thresholds)})


ANSWERS = ("sampled", "exact")
METHODS = ("auto", "reweight", "regenerate")
MODES = ("sliding", "paper")

# The paper's sizes (BDB, section 3; method A3-A9): all names, 100 samples at temperature 0.6 and top-p 0.9.
_PAPER = Audit(
    variations=None,
    subjects_per_group=None,
    held_out=True,
    splits=5,
    answers="sampled",
    samples=100,
    leftover=0.01,
    max_nodes=256,
    temperature=0.6,
    top_p=0.9,
    seed=0,
    levels=LEVELS,
    strategies=None,
    per_source=True,
    random_draws=5,
    relabellings=5,
    resamples=2000,
    permutations=9999,
    parse_floor=0.9,
    inlier_floor=INLIER_FLOOR,
    inlier_tolerance=INLIER_TOLERANCE,
    spread_floor=SPREAD_FLOOR,
    commonest_budget=COMMONEST_BUDGET,
    change_budget=CHANGE_BUDGET,
    kl_budget=KL_BUDGET,
    side_effect_budget=SIDE_EFFECT_BUDGET,
    density_floor=0.0,
    density_ceiling=0.2,
    grid_taus=tuple(step / 20 for step in range(1, 11)),
    grid_counts=tuple(range(5, 55, 5)),
    grid_variations=None,
    max_new_tokens=None,
    alphas=None,
    perplexity_budget=PERPLEXITY_BUDGET,
    text=None,
    text_tokens=None,
    text_window=None,
    text_stride=None,
    perplexity_mode="sliding",
    impact_method="auto",
    ess_floor=0.2,
    side_effect_scenarios=None,
    side_effect_names=8,
)
# A few minutes on two cores.
_QUICK = replace(
    _PAPER,
    subjects_per_group=8,
    held_out=False,
    splits=1,
    samples=16,
    per_source=False,
    random_draws=2,
    relabellings=1,
    resamples=1000,
    permutations=1999,
    grid_taus=(0.1, 0.2, 0.3, 0.4, 0.5),
    grid_counts=(10, 20, 40),
    grid_variations=1,
    side_effect_names=3,
)
PRESETS: dict[Preset, Audit] = {Preset.paper: _PAPER, Preset.quick: _QUICK}
# Toxicity axes (FASP, section 5): a continuation per prompt and seed, three seeds, all templates, descriptors. Quick:
# one of each, for which two cores take the better part of an hour, nearly all of it head impacts. Prompts are always
# held out, as heads are chosen from many.
TOXICITY_PRESETS: dict[Preset, Audit] = {
    Preset.paper: replace(_PAPER, splits=1, samples=3),
    Preset.quick: replace(
        _QUICK,
        subjects_per_group=2,
        held_out=True,
        samples=1,
        random_draws=1,
        max_new_tokens=10,
        alphas=(0.04, 0.1, 0.2),
        text_tokens=1537,
        text_window=129,
        text_stride=128,
    ),
}

# What an audit of the other kind of outcome reads, and one of this kind never does.
UNUSABLE: dict[str, tuple[str, ...]] = {
    "number": ("max_new_tokens",),
    "toxicity": (
        "permutations",
        "splits",
        "inlier_floor",
        "grid_taus",
        "grid_counts",
        "grid_variations",
        "side_effect_scenarios",
        "side_effect_names",
        "side_effect_budget",
        "kl_budget",
    ),
}
_ASKS = {"number": "asks for numbers", "toxicity": "scores continuations"}

# The variations of the quick preset by scenario: prices of different size. Elsewhere the first ones of the file.
QUICK_VARIATIONS: dict[str, tuple[str, ...]] = {"purchase": ("bicycle", "television", "chair")}
QUICK_VARIATION_COUNT = 3
QUICK_SIDE_EFFECT_SCENARIOS = 2
"""So many other scenarios the quick preset measures side effects on, the first ones that can be compared."""
MOST = 10**9
"""The largest number a setting may be that counts something."""


class AuditSettings(dg.ConfigurableResource):
    """A preset, and any of its numbers changed. Fields left out keep the preset's value."""

    preset: Preset = Field(default=Preset.quick, description="quick: minutes on two cores; paper: the paper's sizes")
    variations: list[str] | None = Field(default=None, description="variations of the scenario to audit, by key")
    subjects_per_group: int | None = Field(default=None, description="names per group, genders balanced")
    held_out: bool | None = Field(
        default=None, description="make masks from one half of the names, evaluate on the other"
    )
    splits: int | None = Field(
        default=None, description="repeat masks and judgement over so many halvings of the names (with held_out)"
    )
    answers: str | None = Field(
        default=None,
        description=f"{' or '.join(ANSWERS)}: exact enumerates the distribution of answers that are numbers",
    )
    samples: int | None = Field(
        default=None, description="completions per prompt; of exact answers, of prompts whose answers ramble"
    )
    leftover: float | None = Field(default=None, description="exact answers: probability that may stay unread")
    max_nodes: int | None = Field(
        default=None, description="exact answers: beyond so many prefixes per prompt an answer rambles"
    )
    temperature: float | None = Field(
        default=None,
        description="sampling temperature; 0 takes the likeliest token; toxicity: left out, what the scenario says",
    )
    top_p: float | None = Field(
        default=None, description="share of probability sampled from; toxicity: left out, what the scenario says"
    )
    seed: int | None = Field(default=None, description="seed of completions, controls and resampling")
    levels: list[str] | None = Field(default=None, description=f"generality of masks: {', '.join(LEVELS)}")
    strategies: list[str] | None = Field(default=None, description="strategies by key; left out: all enabled ones")
    per_source: bool | None = Field(
        default=None, description="cross-context masks of every single other scenario, too (the transfer matrix)"
    )
    random_draws: int | None = Field(default=None, description="random controls per mask")
    relabellings: int | None = Field(default=None, description="draws of the control permuted: names relabelled")
    resamples: int | None = Field(default=None, description="bootstrap resamples of names per interval")
    permutations: int | None = Field(default=None, description="permutations per test; of numbers")
    parse_floor: float | None = Field(default=None, description="check parse_rate: least share that parse")
    inlier_floor: float | None = Field(
        default=None, description="least share of usual answers, in checks, figures, findings and the grid's choice"
    )
    inlier_tolerance: float | None = Field(
        default=None, description="a mask and its random control are compared if inlier ratios are at most so far apart"
    )
    spread_floor: float | None = Field(
        default=None, description="least spread of a group's answers, as a share of the unpruned group's that had less"
    )
    commonest_budget: float | None = Field(
        default=None, description="how far the commonest answer's share may rise above the unpruned group's with more"
    )
    change_budget: float | None = Field(
        default=None, description="standard deviations that answers may change beyond what closing the gap takes"
    )
    kl_budget: float | None = Field(
        default=None, description="nats per token by which a mask may change the next token's distribution on a text"
    )
    side_effect_budget: float | None = Field(
        default=None, description="standard deviations that answers may change so in scenarios a mask was not made for"
    )
    density_floor: float | None = Field(default=None, description="check mask_density: a mask prunes more than this")
    density_ceiling: float | None = Field(default=None, description="check mask_density: a mask prunes at most this")
    grid_taus: list[float] | None = Field(default=None, description="grid search: thresholds, shares of the weights")
    grid_counts: list[int] | None = Field(
        default=None, description="grid search: numbers of heads, of 1,024; scaled to the heads of the model"
    )
    grid_variations: int | None = Field(default=None, description="grid search: so many variations, the first ones")
    max_new_tokens: int | None = Field(
        default=None, description="toxicity: length of a continuation; left out, what the scenario says"
    )
    alphas: list[float] | None = Field(default=None, description="shares of the heads that strategies of heads prune")
    perplexity_budget: float | None = Field(
        default=None, description="share by which perplexity may rise, in findings and where alpha and gamma are chosen"
    )
    text: str | None = Field(
        default=None, description="text for perplexity: a file, or hub:name/config/split/column; left out, our own"
    )
    text_tokens: int | None = Field(default=None, description="so many tokens of that text")
    text_window: int | None = Field(
        default=None, description="tokens of a sliding window; left out, 256 (side effects: 128)"
    )
    text_stride: int | None = Field(
        default=None, description="tokens between windows; left out, half a window (side effects: a whole one)"
    )
    perplexity_mode: str | None = Field(default=None, description=f"windows of the text: {' or '.join(MODES)}")
    impact_method: str | None = Field(default=None, description=f"head impacts: {', '.join(METHODS)}")
    ess_floor: float | None = Field(
        default=None, description="head impacts: below this share of effective samples a head is sampled anew"
    )
    side_effect_scenarios: list[str] | None = Field(
        default=None,
        description="scenarios that masks are tried on though they were not made for them, by key; left out, all that "
        "ask for numbers and compare the same groups (quick: the first two); empty: none",
    )
    side_effect_names: int | None = Field(default=None, description="names per group in each of those scenarios")

    def audit_of(self, scenario: Scenario) -> Audit:
        """The settings for a scenario. Raises ExciseError naming the field that is out of range or unknown."""
        changes = {
            field.name: tuple(value) if isinstance(value, list) else value
            for field in fields(Audit)
            if (value := getattr(self, field.name)) is not None
        }
        toxicity = scenario.outcome.kind == "toxicity"
        _refuse_unusable(changes, scenario)
        preset = (TOXICITY_PRESETS if toxicity else PRESETS)[self.preset]
        if toxicity:
            preset = replace(preset, temperature=scenario.outcome.temperature, top_p=scenario.outcome.top_p)
        # Groups are compared at equal size, so a preset asks for no more names than the smallest group has.
        smallest = min(len(group.subjects) for group in scenario.groups.values())
        preset = replace(preset, subjects_per_group=min(preset.subjects_per_group or smallest, smallest))
        if self.preset is Preset.quick:
            preset = replace(preset, variations=_quick_variations(scenario)[: 1 if toxicity else None])
        if changes.get("perplexity_mode") == "paper":
            preset = replace(preset, text_window=None, text_stride=None)
        if changes.get("held_out") is False:
            preset = replace(preset, splits=1)
        return _checked(replace(preset, **changes), scenario)

    def side_effects_on(self, scenario: Scenario, others: Sequence[Scenario]) -> tuple[str, ...]:
        """The keys of the scenarios that side effects of the scenario's masks are measured on.

        others: the scenarios there are. Raises ExciseError naming a scenario that there is none of, that is this one,
        or that does not ask for numbers from the same two groups.
        """
        if scenario.outcome.kind != "number":
            return ()
        able = [other.key for other in others if other.key != scenario.key and not _not_alike(scenario, other)]
        if self.side_effect_scenarios is None:
            return tuple(able[: QUICK_SIDE_EFFECT_SCENARIOS if self.preset is Preset.quick else None])
        by_key, has = {other.key: other for other in others}, "scenarios that can be compared are"
        for key in self.side_effect_scenarios:
            where = f"resources.settings.config.side_effect_scenarios: {key!r}"
            mend = f"name others ({', '.join(able) or 'there are none'}), or none with an empty list"
            if key == scenario.key:
                raise ExciseError(f"{where} is the scenario that the masks are made for; {mend}")
            if key in by_key and (why := _not_alike(scenario, by_key[key])):
                raise ExciseError(f"{where} {why}; {mend}")
            _require_known("side_effect_scenarios", [key], able, has)
        return tuple(self.side_effect_scenarios)


def _not_alike(scenario: Scenario, other: Scenario) -> str | None:
    """Why side effects of a scenario's masks cannot be told in another one; None where they can."""
    if other.outcome.kind != "number":
        return _ASKS[other.outcome.kind]
    if (pair := other.comparison) != scenario.comparison:
        return f"compares {pair.majority} and {pair.minority}, other groups than {scenario.key} does"
    return None


def _refuse_unusable(changes: Mapping[str, Any], scenario: Scenario) -> None:
    """Raise ExciseError for a setting that would change nothing about the scenario's audit."""
    kind = scenario.outcome.kind
    unusable = dict.fromkeys(UNUSABLE[kind], f"scenario {scenario.key} {_ASKS[kind]}")
    if changes.get("answers", _PAPER.answers) == "sampled":
        unusable |= dict.fromkeys(("leftover", "max_nodes"), "answers are sampled, not exact")
    for name, reason in unusable.items():
        if name in changes:
            raise ExciseError(
                f"resources.settings.config.{name} is {changes[name]!r}, which has no effect, as {reason}: leave it out"
            )


def _quick_variations(scenario: Scenario) -> tuple[str, ...]:
    chosen = QUICK_VARIATIONS.get(scenario.key, ())
    if chosen and all(key in scenario.variations for key in chosen):
        return chosen
    return tuple(scenario.variations)[:QUICK_VARIATION_COUNT]


def _checked(audit: Audit, scenario: Scenario) -> Audit:
    for name in ("samples", "splits", "resamples", "permutations"):
        _require(getattr(audit, name) >= 1, name, getattr(audit, name), "give at least 1")
    alone = audit.splits == 1 or audit.held_out
    _require(alone, "splits", audit.splits, "give 1, or set held_out: true, as splits are halves of the names")
    if scenario.outcome.kind == "number":
        few = "give at least 2, or no spread within a name can be seen"
        _require(audit.samples >= 2, "samples", audit.samples, few)
    if audit.subjects_per_group is not None:
        few = "give at least 2"
        _require(audit.subjects_per_group >= 2, "subjects_per_group", audit.subjects_per_group, few)
        if audit.held_out and audit.subjects_per_group < 4 and scenario.outcome.kind == "number":
            raise ExciseError(
                f"resources.settings.config.held_out: scenario {scenario.key} has {audit.subjects_per_group} names per "
                "group; holding out half of them takes at least 4. Ask for more names, or set held_out: false"
            )
    for name in ("random_draws", "relabellings", "seed"):
        _require(getattr(audit, name) >= 0, name, getattr(audit, name), "give 0 or more")
    _require(audit.seed < 2**63, "seed", audit.seed, "give a number below 2^63, which the tables can hold")
    for each in fields(Audit):
        value = getattr(audit, each.name)
        if each.name != "seed" and isinstance(value, int):
            _require(value <= MOST, each.name, value, f"give at most {MOST:,}")
    temperature = audit.temperature
    possible = temperature == 0 or 1e-6 <= temperature < math.inf
    _require(possible, "temperature", temperature, "give 0, which takes the likeliest token, or at least 1e-6")
    _require(0 < audit.top_p <= 1, "top_p", audit.top_p, "give a share above 0, at most 1")
    for name in (
        "parse_floor",
        "inlier_floor",
        "inlier_tolerance",
        "spread_floor",
        "commonest_budget",
        "density_floor",
        "density_ceiling",
    ):
        _require(0 <= getattr(audit, name) <= 1, name, getattr(audit, name), "give a share from 0 to 1")
    for name, unit, usual in (
        ("change_budget", "standard deviations", 0.4),
        ("side_effect_budget", "standard deviations", 0.4),
        ("kl_budget", "nats", 0.05),
    ):
        value = getattr(audit, name)
        _require(0 <= value < math.inf, name, value, f"give {unit} of at least 0, such as {usual}")
    if audit.variations is not None:
        _require_known("variations", audit.variations, tuple(scenario.variations), f"scenario {scenario.key} has")
    _require_known("levels", audit.levels, LEVELS, "there are")
    shares = bool(audit.grid_taus) and all(0 < tau <= 1 for tau in audit.grid_taus)
    _require(shares, "grid_taus", audit.grid_taus, "give shares above 0, at most 1")
    counts = bool(audit.grid_counts) and all(1 <= count <= 1024 for count in audit.grid_counts)
    _require(counts, "grid_counts", audit.grid_counts, "give numbers of heads from 1 to 1,024")
    for name, least in (("max_new_tokens", 1), ("text_tokens", 2), ("text_window", 2), ("text_stride", 1)):
        value = getattr(audit, name)
        _require(value is None or value >= least, name, value, f"give at least {least}")
    _check_text(audit)
    ordered = audit.density_floor <= audit.density_ceiling
    _require(ordered, "density_floor", audit.density_floor, f"give at most density_ceiling, {audit.density_ceiling}")
    shares = audit.alphas is None or (bool(audit.alphas) and all(0 < alpha < 1 for alpha in audit.alphas))
    _require(shares, "alphas", audit.alphas, "give shares above 0, below 1")
    for name in ("variations", "levels", "strategies", "grid_taus", "grid_counts", "alphas", "side_effect_scenarios"):
        values = getattr(audit, name) or ()
        _require(len(set(values)) == len(values), name, values, "name each once")
    _require(audit.strategies is None or bool(audit.strategies), "strategies", audit.strategies, "name one at least")
    named = audit.side_effect_names
    _require(named >= 2, "side_effect_names", named, "give at least 2, as intervals are over names")
    budget = audit.perplexity_budget
    _require(0 <= budget < math.inf, "perplexity_budget", budget, "give a share of at least 0, such as 0.05")
    _require(0 <= audit.ess_floor <= 1, "ess_floor", audit.ess_floor, "give a share from 0 to 1")
    _require_known("answers", (audit.answers,), ANSWERS, "there are")
    if audit.answers == "exact" and scenario.outcome.kind != "number":
        raise ExciseError(
            f"resources.settings.config.answers is 'exact', but scenario {scenario.key} scores continuations, which "
            "are too long to enumerate: leave answers out, or choose scenarios that ask for numbers"
        )
    _require(0 <= audit.leftover < 1, "leftover", audit.leftover, "give a share of at least 0, below 1")
    _require(audit.max_nodes >= 1, "max_nodes", audit.max_nodes, "give at least 1")
    _require_known("impact_method", (audit.impact_method,), METHODS, "there are")
    _require_known("perplexity_mode", (audit.perplexity_mode,), MODES, "there are")
    for name in ("text_window", "text_stride") if audit.perplexity_mode == "paper" else ():
        value = getattr(audit, name)
        _require(value is None, name, value, "leave it out, as perplexity_mode paper has windows of its own")
    if audit.grid_variations is not None:
        _require(audit.grid_variations >= 1, "grid_variations", audit.grid_variations, "give at least 1")
    return audit


def _check_text(audit: Audit) -> None:
    from excise.evaluation.perplexity import SIZE
    from excise.evaluation.texts import HUB, read_text

    window = audit.text_window or SIZE
    less = audit.text_stride is None or audit.text_stride < window
    _require(less, "text_stride", audit.text_stride, f"give less than text_window, {window}")
    if audit.text is not None and not audit.text.startswith(HUB):
        try:
            read_text(audit.text)
        except ExciseError as error:
            raise ExciseError(f"resources.settings.config.text: {error}") from None


def _require(holds: bool, name: str, value: Any, mend: str) -> None:
    if not holds:
        raise ExciseError(f"resources.settings.config.{name} is {value!r}: {mend}")


def _require_known(name: str, values: Sequence[str], known: Sequence[str], has: str) -> None:
    lacking = [value for value in values if value not in known]
    if lacking or not values:
        close = difflib.get_close_matches(str(lacking[0]), known, n=1) if lacking else []
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ExciseError(
            f"resources.settings.config.{name}: {', '.join(map(repr, lacking)) or 'the list is empty'}{hint}; "
            f"{has} {', '.join(known)}"
        )
