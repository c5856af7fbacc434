"""Strategies by name: the entries of `strategies.yaml`, what fits together, and strategies that stand for several."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from excise.attribution import Score, scores
from excise.attribution.score import COUNTS
from excise.conditions import (
    ACROSS,
    ALL_CONTEXTS,
    CONTROLS,
    NO_STRATEGY,
    OWN_SCENARIO,
    PUBLISHED_LEVELS,
    RANDOM,
)
from excise.files.registry import Registry, load_entries, merged
from excise.files.yaml_files import Faults
from excise.models.topology import ROLES

BUILT_IN_STRATEGIES = Path(__file__).with_name("strategies.yaml")
MEASURED_PATH = "measured_path"
_FIELDS_OF_A_MASK = ("score", "selection", "scope", "ablation", "reduce", "combine", "parameters", "roles")

Level = Literal["prompt_specific", "within_context", "cross_context", "all_contexts", "own_scenario"]
_USUAL_LEVELS: tuple[Level, ...] = tuple(get_args(Level)[: len(PUBLISHED_LEVELS)])


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"is {str(value).lower()}, not a number")
    return value


def _known_score(value: Any) -> Any:
    if isinstance(value, str) and value not in (known := list(scores())):
        *others, last = (repr(name) for name in known)
        raise PydanticCustomError("score", f"Input should be {', '.join(others)} or {last}")
    return value


class Strategy(BaseModel):
    """One entry of strategies.yaml; the file's head says what each field means."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str = Field(pattern=r"^[a-z][a-z0-9_]*(-[0-9.]+)*$")
    description: str = ""
    enabled: bool = True
    outcomes: tuple[Literal["number", "toxicity"], ...] = ("number", "toxicity")
    score: Annotated[str, AfterValidator(_known_score)]
    selection: Literal["set_difference", "measured_path", "fasp", "lowest"]
    scope: Literal["matrix", "row", "global"] | None = None
    ablation: Literal["zero_weights", "zero_query", "zero_output"] | None = None
    reduce: Literal["mean", "max"] = "mean"
    combine: Literal["intersection", "union", "votes"] = "intersection"
    parameters: dict[str, Annotated[float, BeforeValidator(_no_truth_value)]] = {}
    roles: tuple[str, ...] = ()
    levels: tuple[Level, ...] = _USUAL_LEVELS
    controls: tuple[Literal["random", "pooled_band", "reversed", "permuted"], ...] = ("random",)

    @model_validator(mode="before")
    @classmethod
    def _usual_choices(cls, data: Any) -> Any:
        """Scope and ablation, where not given, are those that the score comes with first."""
        record = scores().get(data["score"]) if isinstance(data, dict) and isinstance(data.get("score"), str) else None
        if record is None:
            return data
        usual: dict[str, Any] = {"scope": record.scopes[0], "ablation": record.ablations[0]}
        if record.of_scenario:
            usual["levels"] = (OWN_SCENARIO,)
        return usual | data

    @property
    def record(self) -> Score:
        """The score's record."""
        return scores()[self.score]

    @property
    def of_scenario(self) -> bool:
        """Whether it ranks whole heads over a scenario, by the table `head_impacts`."""
        return self.record.of_scenario

    @property
    def of_heads(self) -> bool:
        """Whether whole heads are pruned instead of single weights."""
        return self.ablation != "zero_weights"

    def definition(self, control: str | None = None, seed: int | None = None) -> str:
        """What decides a mask of this strategy, or of one of its controls, as JSON with sorted keys.

        seed: of what is drawn at random. Levels and names are columns of their own.
        """
        fields = self.model_dump(mode="json", include=set(_FIELDS_OF_A_MASK))
        if control is not None:
            fields["control"] = control
        if seed is not None and (control == RANDOM or self.record.drawn):
            fields["seed"] = seed
        return json.dumps(fields, sort_keys=True)

    @model_validator(mode="after")
    def _fits_together(self) -> Strategy:
        score = self.record
        if self.selection != score.selection:
            raise ValueError(f"selection {self.selection} does not work on score {self.score}; {score.selection} does")
        for field, allowed in (("ablation", score.ablations), ("scope", score.scopes)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} of score {self.score} is {' or '.join(allowed)}, not {getattr(self, field)}")
        self._check_parameters(score)
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"roles {', '.join(sorted(unknown))} are not known; known are {', '.join(ROLES)}")
        for field in ("outcomes", "roles", "levels", "controls"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field} names a value twice: {', '.join(values)}")
        for field in ("outcomes", "levels"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty, so nothing would use the strategy; for that write enabled: false")
        if self.of_heads == bool(self.roles):
            raise ValueError("roles: name the matrices whose weights may be pruned; for heads leave roles out")
        levels = (OWN_SCENARIO, *ACROSS) if score.of_scenario else (*PUBLISHED_LEVELS, ALL_CONTEXTS)
        if lacking := [level for level in self.levels if level not in levels]:
            raise ValueError(f"levels {', '.join(lacking)} do not exist for score {self.score}")
        if self.parameters.get("alpha", 0) + self.parameters.get("gamma", 0) > 1 + 1e-9:
            raise ValueError("parameters alpha (pruned) and gamma (protected) are shares of heads: at most 1 together")
        if missing := [control for control in self.controls if control not in score.controls]:
            raise ValueError(f"controls {', '.join(missing)} do not exist for score {self.score}")
        if self.key.partition("-")[0] in (*CONTROLS, NO_STRATEGY):
            raise ValueError(f"{self.key} is the name of a control; choose another")
        return self

    def _check_parameters(self, score: Score) -> None:
        names_given = set(self.parameters)
        needed = next((names for names in score.parameters if names <= names_given), score.parameters[0])
        if needed - names_given or names_given - needed - set(score.optional):
            wanted = " or ".join(", ".join(sorted(names)) for names in score.parameters)
            wanted += f" (and {', '.join(score.optional)})"
            raise ValueError(
                f"parameters of {self.selection} are {wanted}; found {', '.join(sorted(names_given)) or 'none'}"
            )
        # Denser masks would end where the candidates do, not where they were asked to.
        highest = {"density": 1.0 if self.of_heads else score.densest}
        for name, value in self.parameters.items():
            limit = highest.get(name, math.inf if name in COUNTS else 1.0)
            least = 0 if name in ("k_maj", "tau_maj", "gamma", "paper_ties") else math.ulp(0)
            if not least <= value <= limit:
                bound = "above" if least else "at least"
                raise ValueError(f"parameters.{name} is {value:g}; it must be {bound} 0 and at most {limit:g}")
            if name in COUNTS and value != int(value):
                raise ValueError(f"parameters.{name} is {value:g}; it must be a whole number of heads")
        if (self.combine == "votes") != ("votes" in names_given):
            raise ValueError("combine: votes and parameters.votes (a share of the masks) belong together")


def load_strategies(paths: Iterable[Path] = ()) -> Registry[Strategy]:
    """The built-in strategies, then those of each of `paths` that exists.

    A later entry changes the fields and parameters that it names of an earlier one of its key, and of all strategies
    made of that; one with another score replaces it. What cannot be used is a problem that names file, entry and field,
    and whoever asks the registry for it gets that as ExciseError.
    """
    return load_entries(
        [BUILT_IN_STRATEGIES, *paths],
        Strategy,
        "strategy",
        stands_alone=lambda base, fields: fields.get("score", base["score"]) != base["score"],
        combine=_changed,
        variants=_single_values,
    )


def _changed(base: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """An entry with another's fields changed. A whole set of other parameters (k for tau) replaces its own."""
    parameters_given = fields.get("parameters")
    if isinstance(parameters_given, dict) and isinstance(base.get("parameters"), dict):
        sets = scores()[base["score"]].parameters
        named: frozenset[str] = next((names for names in sets if names <= set(parameters_given)), frozenset())
        others = frozenset[str]().union(*sets) - named if named else frozenset()
        kept = {name: value for name, value in base["parameters"].items() if name not in others}
        base = base | {"parameters": kept}
    return merged(base, fields)


def _single_values(key: str, fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """An entry as strategies of one value per parameter: a parameter with a list makes one strategy for each value.

    Names end with the values, to two decimals or as many as they have. Raises Faults for a list that is empty or names
    a value twice.
    """
    parameters = fields["parameters"] if isinstance(fields.get("parameters"), dict) else {}
    many: dict[str, list[Any]] = {name: value for name, value in parameters.items() if isinstance(value, list)}
    if not many:
        yield key, fields
        return
    for name, values in many.items():
        numbers = [_as_number(value) for value in values]
        if not values or None in numbers:
            raise Faults(f".parameters.{name}: give a number, or a list of some")
        if len(set(numbers)) < len(numbers):
            raise Faults(f".parameters.{name}: a value stands twice in the list; remove one")
        many[name] = numbers
    for chosen in itertools.product(*many.values()):
        name = "-".join([key, *map(value_in_name, chosen)])
        yield name, fields | {"parameters": parameters | dict(zip(many, chosen, strict=True))}


def _as_number(value: Any) -> float | None:
    """A parameter as YAML gives it: 1e-3 is text to it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def value_in_name(value: float) -> str:
    """A parameter's value at the end of a strategy's name: 0.10, 0.125."""
    short = f"{value:.2f}"
    return short if float(short) == value else np.format_float_positional(value, trim="-")
