"""How large an audit is: a preset, what a run changes about it, and whether a scenario can be audited so.

The settings and their values in the presets are declared in `audit`; `pipelines/presets/` holds the run configs that
choose one. Settings reach only the stages that decide something: later stages take variations, names, samples and
sampling parameters from the completions they find, so that a rerun from the masks on is always consistent.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, create_model

from excise.errors import ExciseError
from resources.audit import MOST, NUMBER, SETTINGS, TOXICITY, Audit, Preset, preset_of, run_types

if TYPE_CHECKING:
    from excise.scenarios import Scenario

PRESETS: dict[Preset, Audit] = {preset: preset_of(preset, NUMBER) for preset in Preset}
TOXICITY_PRESETS: dict[Preset, Audit] = {preset: preset_of(preset, TOXICITY) for preset in Preset}

# The variations of the quick preset by scenario: prices of different size. Elsewhere the first ones of the file.
QUICK_VARIATIONS: dict[str, tuple[str, ...]] = {"purchase": ("bicycle", "television", "chair")}
QUICK_VARIATION_COUNT = 3
QUICK_SIDE_EFFECT_SCENARIOS = 2
"""So many other scenarios the quick preset measures side effects on, the first ones that can be compared."""


class _Settings(dg.ConfigurableResource):
    preset: Preset = Field(default=Preset.quick, description="quick: minutes on two cores; paper: the paper's sizes")

    def audit_of(self, scenario: Scenario) -> Audit:
        """The settings for a scenario. Raises ExciseError naming the field that is out of range or unknown."""
        changes = {
            name: tuple(value) if isinstance(value, list) else value
            for name in SETTINGS
            if (value := getattr(self, name)) is not None
        }
        outcome = scenario.outcome
        _refuse_unusable(changes, scenario)
        preset = (PRESETS if outcome.pairwise else TOXICITY_PRESETS)[self.preset]
        if outcome.decoding.temperature is not None:
            preset = replace(preset, temperature=outcome.decoding.temperature)
        if outcome.decoding.top_p is not None:
            preset = replace(preset, top_p=outcome.decoding.top_p)
        # Groups are compared at equal size, so a preset asks for no more names than the smallest group has.
        smallest = min(len(group.subjects) for group in scenario.groups.values())
        preset = replace(preset, subjects_per_group=min(preset.subjects_per_group or smallest, smallest))
        if self.preset is Preset.quick:
            preset = replace(preset, variations=_quick_variations(scenario)[: None if outcome.pairwise else 1])
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
        if not scenario.outcome.pairwise:
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


AuditSettings = create_model(
    "AuditSettings",
    __base__=_Settings,
    __module__=__name__,
    __doc__="A preset, and any of its numbers changed. Fields left out keep the preset's value.",
    **{
        name: ((list[kind] if many else kind) | None, Field(default=None, description=SETTINGS[name].description))
        for name, kind, many in run_types()
    },
)


def _not_alike(scenario: Scenario, other: Scenario) -> str | None:
    """Why side effects of a scenario's masks cannot be told in another one; None where they can."""
    if not other.outcome.pairwise:
        return other.outcome.words.asks
    if (pair := other.comparison) != scenario.comparison:
        return f"compares {pair.majority} and {pair.minority}, other groups than {scenario.key} does"
    return None


def _refuse_unusable(changes: Mapping[str, Any], scenario: Scenario) -> None:
    """Raise ExciseError for a setting that would change nothing about the scenario's audit."""
    outcome = scenario.outcome
    others = [name for name, setting in SETTINGS.items() if outcome.audited_as not in setting.outcomes]
    unusable = dict.fromkeys(others, f"scenario {scenario.key} {outcome.words.asks}")
    if changes.get("answers", "sampled") == "sampled":
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
    """The audit; ExciseError naming the setting that is out of bounds, or does not go with another or the scenario."""
    for name, setting in SETTINGS.items():
        value = getattr(audit, name)
        if value is None:
            continue
        for bound in setting.bounds:
            _require(bound.holds(value), name, value, bound.mend)
        if setting.known:
            _require_known(name, value if isinstance(value, tuple) else (value,), setting.known, "there are")
        if name != "seed" and isinstance(value, int):
            _require(value <= MOST, name, value, f"give at most {MOST:,}")
        if isinstance(value, tuple):
            _require(len(set(value)) == len(value), name, value, "name each once")
    if audit.variations is not None:
        _require_known("variations", audit.variations, tuple(scenario.variations), f"scenario {scenario.key} has")
    _check_names(audit, scenario)
    _check_text(audit)
    ordered = audit.density_floor <= audit.density_ceiling
    _require(ordered, "density_floor", audit.density_floor, f"give at most density_ceiling, {audit.density_ceiling}")
    if audit.answers == "exact" and not scenario.outcome.enumerable:
        raise ExciseError(
            f"resources.settings.config.answers is 'exact', but scenario {scenario.key} {scenario.outcome.words.asks}, "
            "which are too long to enumerate: leave answers out, or choose scenarios that ask for numbers"
        )
    return audit


def _check_names(audit: Audit, scenario: Scenario) -> None:
    """Names and answers have to be enough for halves and for a spread."""
    alone = audit.splits == 1 or audit.held_out
    _require(alone, "splits", audit.splits, "give 1, or set held_out: true, as splits are halves of the names")
    if not scenario.outcome.pairwise:
        return
    few = "give at least 2, or no spread within a name can be seen"
    _require(audit.samples >= 2, "samples", audit.samples, few)
    if audit.held_out and audit.subjects_per_group is not None and audit.subjects_per_group < 4:
        raise ExciseError(
            f"resources.settings.config.held_out: scenario {scenario.key} has {audit.subjects_per_group} names per "
            "group; holding out half of them takes at least 4. Ask for more names, or set held_out: false"
        )


def _check_text(audit: Audit) -> None:
    from excise.evaluation.perplexity import SIZE
    from excise.evaluation.texts import HUB, read_text

    for name in ("text_window", "text_stride") if audit.perplexity_mode == "paper" else ():
        value = getattr(audit, name)
        _require(value is None, name, value, "leave it out, as perplexity_mode paper has windows of its own")
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
