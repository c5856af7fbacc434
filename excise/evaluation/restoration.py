"""Ground truth of an edit: does it bring a model back to what it was before a bias was put in, and nothing else?

A model P with a known bias has a reference R, the model without it. *Restoration* = 1 - W(edited P, R) / W(P, R), W the
Earth mover's distance between the distributions of a name's answers: 1, as if the bias had never been put in; 0,
nothing gained; below 0, further away, though the gap may be closed. *Specificity* is W(edited R, R): an edit that
removes that bias alone leaves a model without it as it is. (Method, part E.) Nothing here knows models or masks; which
model is whose reference is `excise.models.specs.reference_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from excise.conditions import ALL, COLUMNS, PLACE, RANDOM, UNPRUNED, Condition
from excise.errors import ExciseError
from excise.evaluation import bootstrap
from excise.evaluation.answer_distances import Distances, Distributions, answer_distributions, distances
from excise.evaluation.judged import ENOUGH
from excise.evaluation.rows import finite_or_none, mean_over_draws

RESTORATION_SCHEMA = {
    **dict.fromkeys(("model", "scenario", *PLACE), pl.String),
    "metric": pl.String,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "names": pl.Int64,
    "reference": pl.String,
    "reason": pl.String,
}
NOTHING = "nothing to restore: the unpruned answers are no further from the reference's than noise"
_NO_NOISE = "how far noise alone would move answers is not known: two samples of a name are needed, at least"
_UNDEFINED = "too many resamples of the names have no value"
_TOO_LARGE = "the answers are too large or all 0, so no distance can be told"
_COLUMNS = ("model", "scenario", "variation", "group", "subject", "value", "sample")


@dataclass(frozen=True)
class _Names:
    """All names, (group, subject), and how often each resample draws them, [resamples + 1, names]."""

    names: tuple[tuple[str, str], ...]
    weights: np.ndarray

    def enough(self, known: np.ndarray) -> int:
        """Names that are known, of the group that has fewer."""
        groups = [group for group, _ in self.names]
        return min(
            sum(known[place] for place, of_name in enumerate(groups) if of_name == group) for group in set(groups)
        )

    def mean(self, by_name: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Mean over the known names, [resamples + 1], the estimate first; NaN where a resample has none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.weights @ np.where(known, by_name, 0.0)) / (self.weights @ known.astype(np.float64))


@dataclass(frozen=True)
class _Part:
    """What is known of one variation under one condition, mean over names and draws, each [resamples + 1].

    distance: from the reference. Of the names whose noise is known, too: after and before, distances less noise under
    the condition and unpruned; clear: before less what unread answers may make; noise: with that, of the condition;
    over: distance less that noise. names: the fewest behind it. fault: why no distance can be told; deaf: why noise
    cannot. scale: divides distances where variations are added up.
    """

    distance: np.ndarray
    after: np.ndarray
    before: np.ndarray
    clear: np.ndarray
    noise: np.ndarray
    over: np.ndarray
    names: int
    fault: str | None
    deaf: str | None
    scale: float


# A function for notebooks, too: settings by name, each with a default or an error of its own.
def restoration(
    completions: pl.DataFrame,
    pruned: pl.DataFrame,
    reference: pl.DataFrame,
    reference_pruned: pl.DataFrame,
    *,
    groups: Sequence[str],
    log: bool,
    resamples: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """Restoration and specificity of every mask: long frame with the columns of `RESTORATION_SCHEMA`.

    completions, pruned: what the model P answered, unpruned and under masks; reference, reference_pruned: the same of
    its reference R (pruned ones perhaps of fewer masks and draws, or none). Columns as in the tables completions and
    pruned_completions. groups: those whose names count. log: whether distances are of logarithms (`outcome.scale`).

    Metrics, per variation and over all of them, "(all)":
      * distance: mean over names of W(answers, R's answers), unpruned and under every mask, in the unit of the
        outcome or of its logarithm.
      * noise: how much of that chance has made (`distances`), or unread answers may make; distance_over_noise: the one
        less the other. Unpruned alone.
      * restoration: 1 - the mean distance under the mask over that of the unpruned model, over the same names, both
        less what chance has made of them. The ratio of means, not the mean of each name's ratio: a name from whose
        answers the bias took little has a distance near 0, and its ratio would be noise divided by noise and swamp all
        others. So a name counts by how much there is to restore. Over variations likewise: one minus the sum of
        distances under the mask over the sum without it, on a linear scale after division by the mean size of R's
        answers to the variation.
      * restoration_over_random: less that of the random masks of the same size, by the same names.
      * specificity: mean distance of R's answers under the mask from its own without; specificity_over_noise: less
        noise, so that an interval that is not above 0 is within what chance alone does.
    low, high: 95 % percentile interval over names resampled within groups (and draws, where there are several).
    Answers that are unparsed (on the log scale: not positive) have no part in a distance; the share of them is the
    metric parse_rate of the table metrics. reason: why an estimate is null: nothing to restore (the interval of
    distance_over_noise reaches 0), fewer than two names of a group with answers, or nothing to tell noise by.

    Raises ExciseError for missing columns, and where R was asked another scenario or lacks a variation.
    """
    for what, frame in (("completions", completions), ("reference's completions", reference)):
        if missing := [column for column in _COLUMNS if column not in frame.columns]:
            raise ExciseError(f"restoration: the {what} lack the column(s) {', '.join(missing)}")
    if completions.is_empty():
        return pl.DataFrame(schema=RESTORATION_SCHEMA)
    lacking = set(completions["variation"]) - set(reference["variation"])
    if lacking or set(reference["scenario"]) != set(completions["scenario"]):
        lacked = f"no answers to {', '.join(sorted(lacking))}" if lacking else "answers of another scenario"
        raise ExciseError(f"restoration: the reference has {lacked}; ask it the same prompts")
    names = _names_of(completions, groups, resamples, seed)
    table = _Rows(completions["model"][0], completions["scenario"][0], reference["model"][0])
    others, scale, before = {}, {}, {}
    for variation in completions["variation"].unique(maintain_order=True):
        here = pl.col("variation") == variation
        answers = others[variation] = answer_distributions(reference.filter(here), names.names, log=log)
        before[variation] = distances(answer_distributions(completions.filter(here), names.names, log=log), answers)
        answered = answers.mass.sum(axis=1) > 0
        sizes = answers.mass[answered] @ np.abs(answers.values)
        scale[variation] = 1.0 if log else float(sizes.mean()) if len(sizes) else math.nan

    def part(variation: str, after: Sequence[Distances]) -> _Part:
        """after: of each draw."""
        unpruned = before[variation]
        known = [~np.isnan(after_draw.apart + unpruned.apart) for after_draw in after]
        heard = [
            ~np.isnan(after_draw.noise + unpruned.noise) & apart for after_draw, apart in zip(after, known, strict=True)
        ]
        fewest = min(map(names.enough, known))
        few = f"fewer than {ENOUGH} names of a group have answers to compare" if fewest < ENOUGH else None
        deaf = few or (_NO_NOISE if min(map(names.enough, heard)) < ENOUGH else None)

        def mean(by_draw: Iterable[np.ndarray], of: Sequence[np.ndarray]) -> np.ndarray:
            return mean_over_draws([names.mean(*pair) for pair in zip(by_draw, of, strict=True)], seed)

        net, draws = unpruned.apart - unpruned.noise, len(after)
        return _Part(
            distance=mean([after_draw.apart for after_draw in after], known),
            after=mean([after_draw.apart - after_draw.noise for after_draw in after], heard),
            before=mean([net] * draws, heard),
            clear=mean([net - unpruned.unread] * draws, heard),
            noise=mean([after_draw.noise + after_draw.unread for after_draw in after], heard),
            over=mean([after_draw.apart - after_draw.noise - after_draw.unread for after_draw in after], heard),
            names=fewest,
            fault=few,
            deaf=deaf,
            scale=scale[variation],
        )

    unpruned = {variation: part(variation, [apart]) for variation, apart in before.items()}
    for variation, parts in [
        *((name, [variation_part]) for name, variation_part in unpruned.items()),
        (ALL, list(unpruned.values())),
    ]:
        table.add(variation, UNPRUNED, "distance", parts, lambda variation_part: variation_part.distance)
        table.add(variation, UNPRUNED, "noise", parts, lambda variation_part: variation_part.noise, of_noise=True)
        table.add(
            variation, UNPRUNED, "distance_over_noise", parts, lambda variation_part: variation_part.over, of_noise=True
        )
    edited = _conditions(pruned, names, others, part, log)
    for condition, by_variation in edited.items():
        random = {} if condition.strategy == RANDOM else edited.get(condition.control, {})
        for variation, parts in _with_all(by_variation):
            table.add(variation, condition, "distance", parts, lambda variation_part: variation_part.distance)
            values, fault = _restored(parts)
            table.put(variation, condition, "restoration", parts, values, fault)
            matched = [random[name] for name in (by_variation if variation == ALL else [variation]) if name in random]
            if len(matched) == len(parts):
                beside, fault_of_random = _restored(matched)
                difference = None if values is None or beside is None else values - beside
                both, why = [*parts, *matched], fault or fault_of_random
                table.put(variation, condition, "restoration_over_random", both, difference, why)
    for condition, by_variation in _conditions(reference_pruned, names, others, part, log).items():
        for variation, parts in _with_all(by_variation):
            table.add(variation, condition, "specificity", parts, lambda variation_part: variation_part.distance)
            table.add(
                variation,
                condition,
                "specificity_over_noise",
                parts,
                lambda variation_part: variation_part.over,
                of_noise=True,
            )
    return pl.DataFrame(table.rows, schema=RESTORATION_SCHEMA, orient="row")


def _names_of(completions: pl.DataFrame, groups: Sequence[str], resamples: int, seed: int) -> _Names:
    names, weights = [], []
    for stream, group in enumerate(groups):
        subjects = sorted(completions.filter(pl.col("group") == group)["subject"].unique().to_list())
        if not subjects:
            known = ", ".join(sorted(map(str, completions["group"].unique())))
            raise ExciseError(f"restoration: no completions for the group {group!r}; the groups are {known}")
        names += [(group, subject) for subject in subjects]
        weights.append(bootstrap.resampled_names(len(subjects), resamples, np.random.default_rng([seed, stream])))
    return _Names(tuple(names), np.hstack(weights))


def _conditions(
    pruned: pl.DataFrame,
    names: _Names,
    others: dict[str, Distributions],
    part: Callable[[str, Sequence[Distances]], _Part],
    log: bool,
) -> dict[Condition, dict[str, _Part]]:
    """Distances from the reference's answers by condition and variation."""
    by_condition: dict[Condition, dict[str, list[Distances]]] = {}
    if not pruned.is_empty():
        frames = pruned.sort("draw", maintain_order=True).partition_by(
            *COLUMNS, "variation", "draw", as_dict=True, maintain_order=True
        )
        for (*condition, variation, _), frame in frames.items():
            if variation in others:
                after = distances(answer_distributions(frame, names.names, log=log), others[variation])
                by_condition.setdefault(Condition(*condition), {}).setdefault(variation, []).append(after)
    return {
        condition: {variation: part(variation, draws) for variation, draws in by_variation.items()}
        for condition, by_variation in by_condition.items()
    }


def _with_all(by_variation: dict[str, _Part]) -> list[tuple[str, list[_Part]]]:
    return [*((name, [part]) for name, part in by_variation.items()), (ALL, list(by_variation.values()))]


def _restored(parts: Sequence[_Part]) -> tuple[np.ndarray | None, str | None]:
    """1 - sum after / sum before, [resamples + 1]; or None and why."""
    if deaf := next((part.deaf for part in parts if part.deaf), None):
        return None, deaf
    if not all(part.scale > 0 and math.isfinite(part.scale) for part in parts):
        return None, _TOO_LARGE
    before, after, clear = (
        np.sum([getattr(part, side) / part.scale for part in parts], axis=0) for side in ("before", "after", "clear")
    )
    low, _ = bootstrap.percentile_interval(clear[1:])
    if not low > 0:
        return None, NOTHING
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - after / before, None


class _Rows:
    def __init__(self, model: str, scenario: str, reference: str):
        self.place = {"model": model, "scenario": scenario}
        self.reference = reference
        self.rows: list[dict] = []

    def add(
        self,
        variation: str,
        condition: Condition,
        metric: str,
        parts: Sequence[_Part],
        of: Callable[[_Part], np.ndarray],
        *,
        of_noise: bool = False,
    ) -> None:
        """The mean over the parts of what `of` takes of each; null where one of them has a fault."""
        fault = next((fault for part in parts if (fault := part.deaf if of_noise else part.fault)), None)
        self.put(variation, condition, metric, parts, None if fault else np.mean([*map(of, parts)], axis=0), fault)

    def put(
        self,
        variation: str,
        condition: Condition,
        metric: str,
        parts: Sequence[_Part],
        values: np.ndarray | None,
        fault: str | None,
    ) -> None:
        estimate = low = high = None
        if values is not None:
            estimate = finite_or_none(values[0])
            low, high = map(finite_or_none, bootstrap.percentile_interval(values[1:]))
            if estimate is None:
                fault, low, high = _TOO_LARGE, None, None
            elif low is None:
                fault, estimate = _UNDEFINED, None
        self.rows.append(
            {
                **self.place,
                "variation": variation,
                **dict(zip(COLUMNS, condition, strict=True)),
                "metric": metric,
                "estimate": estimate,
                "low": low,
                "high": high,
                "names": min(part.names for part in parts),
                "reference": self.reference,
                "reason": fault,
            }
        )
