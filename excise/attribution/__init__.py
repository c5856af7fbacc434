"""Attribution: which weights and heads matter, from the unpruned model's prompts and answers.

Each score has a module of its own that offers one record (`score.Score`); here they are found by name, and measured
into files. A file is addressed by what decides its content, so a score that is there already is never computed again,
and one that was begun goes on. Turning scores into masks belongs to `excise.strategies`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from excise.attribution import attention, files, gap_gradient, head_scores, snip, wanda
from excise.attribution.answered import Answered
from excise.attribution.score import Score, Stream, Tensors
from excise.errors import ExciseError
from excise.evaluation.judged import judged
from excise.extensions import with_extensions
from excise.files.parts import PARTS, Parts, Work
from excise.models.encoding import require_same_prompts
from excise.progress import Progress, silent

if TYPE_CHECKING:
    from excise.outcomes import Outcome
    from excise.scenarios import Comparison

__all__ = ["Answered", "AttributionFile", "Score", "attribute", "file_scores", "scored_places", "scores"]

BUILT_IN = (wanda.SCORE, snip.SCORE, attention.SCORE, gap_gradient.SCORE, *head_scores.SCORES)
GROUP = "excise.scores"


@dataclass(frozen=True)
class AttributionFile:
    """One score of one variation on disk (safetensors) and how it came about."""

    variation: str
    score: str
    path: Path
    bytes: int
    reused: bool
    seconds: float


def scores() -> dict[str, Score]:
    """Every score by name: those that are built in, then those of installed packages."""
    return with_extensions(GROUP, Score, BUILT_IN, lambda score: score.name)


def file_scores() -> list[str]:
    """Names of the scores that `attribute` measures; the others are columns of the table `head_impacts`."""
    return [name for name, score in scores().items() if not score.of_scenario]


def attribute(
    answered: Answered, scores: Iterable[str], *, folder: Path, progress: Progress = silent
) -> list[AttributionFile]:
    """Compute, or find, the scores of every variation that was answered.

    scores: names out of `file_scores`. Answers of groups that are not compared are left aside. Returns one file per
    variation and score, in the order of `scored_places`, which leaves out what cannot be learned. Raises ExciseError
    for a score that is not known, where the model would now read other prompts than those answered, and for scores
    that are not finite.
    """
    answered = answered.as_asked()
    require_same_prompts(answered.encoded, answered.completions)
    wanted = scored_places(answered.completions, scores, comparison=answered.comparison, outcome=answered.outcome)
    variations = answered.variations()
    return [_file_of(variations[variation], variation, score, folder, progress) for variation, score in wanted]


def _file_of(answered: Answered, variation: str, score: str, folder: Path, progress: Progress) -> AttributionFile:
    record, measure = _measured(score)
    path = folder / score / f"{files.address(record, answered)}.safetensors"
    reused, started = path.is_file(), time.perf_counter()
    if not reused:
        work = Work(f"{score} {variation}", progress, Parts(path.with_suffix(PARTS)))
        files.write(path, measure(answered, work), record, answered)
        work.parts.clear()
    return AttributionFile(variation, score, path, path.stat().st_size, reused, time.perf_counter() - started)


def _measured(name: str) -> tuple[Score, Callable[[Answered, Work], Tensors | Stream]]:
    """A score by name, and how it is measured."""
    record = scores().get(name)
    if record is None or record.measure is None:
        raise ExciseError(f"strategies: score {name!r} is not known; known are {', '.join(file_scores())}")
    return record, record.measure


def scored_places(
    completions: pl.DataFrame,
    scores: Iterable[str],
    *,
    comparison: Comparison,
    outcome: Outcome,
) -> list[tuple[str, str]]:
    """(variation, score) of all that `attribute` can learn from these completions.

    A score that is of values needs a variation that can be judged (`excise.evaluation.judged`), by values above 0 where
    differences are judged on a log scale; what else each needs, its record says (`Score.able`). Raises ExciseError for
    a score that is not known.
    """
    groups = [comparison.majority, comparison.minority]
    records = [_measured(name)[0] for name in scores]
    compared = completions.filter(pl.col("group").is_in(groups))
    valued = compared
    if outcome.log_scale:
        valued = compared.with_columns(value=pl.when(pl.col("value") > 0).then(pl.col("value")))
    with_values = set(judged(valued, groups, outcome.cluster))
    return [
        (str(variation), record.name)
        for (variation,), rows in compared.group_by("variation", maintain_order=True)
        for record in records
        if (variation in with_values or not record.of_values) and record.able(rows, groups)
    ]
