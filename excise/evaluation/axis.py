"""An axis of social groups: its descriptors and templates, how they are resampled, and scores summed up over them.

Here rows of scored continuations become sums per descriptor and template. What the sums say is in `toxicity`, how much
of that is noise in `axis_noise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from excise.errors import ExciseError
from excise.evaluation import bootstrap
from excise.evaluation import metrics as m
from excise.evaluation.cells import Spread, spread_of, spread_ratio

CELLS_AT_ONCE = 1 << 22
_SUBJECTS, _TEMPLATES, LABELS = range(3)  # streams of random numbers
_WINSORIZE = (0.05, 0.95)  # of a subgroup's scores, for their spread


@dataclass(frozen=True)
class Axis:
    """What all tables of an axis share.

    subjects: (subgroup, descriptor) in order of the subgroups; group: subgroup number of each, int [subjects];
    subject_weights [resamples + 1, subjects] and template_weights [resamples + 1, templates]: how often each resample
    draws them, row 0 the sample itself; None: not resampled.
    """

    subgroups: tuple[str, ...]
    subjects: dict[tuple[str, str], int]
    templates: dict[str, int]
    group: NDArray[np.int64]
    subject_weights: NDArray[np.float64] | None
    template_weights: NDArray[np.float64] | None
    resamples: int

    @property
    def member(self) -> NDArray[np.float64]:
        """1 where the subject is of the subgroup, [subjects, subgroups]."""
        return (self.group[:, None] == np.arange(len(self.subgroups))).astype(np.float64)

    @property
    def resampled(self) -> bool:
        """One descriptor of a subgroup, or one template, leaves nothing to resample."""
        counts = np.bincount(self.group, minlength=len(self.subgroups))
        return (self.subject_weights is None or counts.min() >= 2) and (
            self.template_weights is None or len(self.templates) >= 2
        )

    def weighted(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over a table [subjects, templates] per resample and subgroup, [resamples + 1, subgroups]."""
        if self.template_weights is None:
            return self.subject_weights @ (table.sum(axis=1)[:, None] * self.member)
        if self.subject_weights is None:
            return self.template_weights @ (self.member.T @ table).T
        result = np.empty((self.resamples + 1, len(self.subgroups)))
        step = max(1, CELLS_AT_ONCE // max(table.shape))
        for start in range(0, len(result), step):
            rows = slice(start, start + step)
            result[rows] = ((self.template_weights[rows] @ table.T) * self.subject_weights[rows]) @ self.member
        return result


@dataclass(frozen=True)
class Scores:
    """Scores of one variation (or several) under one mask, summed per subject and template, float64 [subjects,
    templates] each: sum of the scores, number of scores, scores above the threshold, continuations. spread_ratio: share
    of the unpruned scores' spread that is left, the smallest over subgroups and variations; infinite where there was
    none."""

    total: NDArray[np.float64]
    scored: NDArray[np.float64]
    toxic: NDArray[np.float64]
    answers: NDArray[np.float64]
    spread_ratio: float

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            self.total + other.total,
            self.scored + other.scored,
            self.toxic + other.toxic,
            self.answers + other.answers,
            float(np.minimum(self.spread_ratio, other.spread_ratio)),
        )

    @property
    def collapsed(self) -> bool:
        """Whether a subgroup's scores became all the same, or are too few to tell."""
        return not self.spread_ratio > m.ROUNDING


def axis_of(completions: pl.DataFrame, subgroups: Sequence[str], cluster: str, resamples: int, seed: int) -> Axis:
    subjects: dict[tuple[str, str], int] = {}
    group: list[int] = []
    weights: list[np.ndarray] = []
    for number, name in enumerate(subgroups):
        descriptors = sorted(completions.filter(pl.col("group") == name)["subject"].unique().to_list())
        for subject in descriptors:
            subjects[name, subject] = len(subjects)
        group += [number] * len(descriptors)
        weights.append(
            bootstrap.resampled_names(len(descriptors), resamples, np.random.default_rng([seed, _SUBJECTS, number]))
        )
    templates = sorted(completions["template"].unique().to_list())
    drawn = bootstrap.resampled_names(len(templates), resamples, np.random.default_rng([seed, _TEMPLATES]))
    return Axis(
        tuple(subgroups),
        subjects,
        {template: number for number, template in enumerate(templates)},
        np.array(group),
        None if cluster == "template" else np.hstack(weights),
        None if cluster == "subject" else drawn,
        resamples,
    )


def spreads_of(frame: pl.DataFrame, axis: Axis, before: Sequence[Spread] | None = None) -> tuple[Spread, ...]:
    """Standard deviation of each subgroup's scores, clipped as those of the unpruned model, `before`."""
    once, spreads = np.ones((1, 1)), []
    for number, name in enumerate(axis.subgroups):
        values = frame.filter(pl.col("group") == name)["value"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        sample = bootstrap.named_answers(values, np.zeros(len(values)), 1)
        moments = bootstrap.weighted_moments(sample, once, _WINSORIZE)
        spreads.append(spread_of(sample, once, moments, _WINSORIZE, None if before is None else before[number]))
    return tuple(spreads)


def scores_of(
    frame: pl.DataFrame,
    axis: Axis,
    threshold: float,
    where: str,
    column: str = "value",
    before: Sequence[Spread] | None = None,
) -> Scores:
    """Sum up a frame of continuations. before: spreads of the unpruned model's, under a mask.

    Raises ExciseError for what the unpruned completions do not have.
    """
    lacking = [name for name in axis.subgroups if name not in set(frame["group"].unique())]
    if lacking:
        raise ExciseError(f"{where}: no completions for the subgroup {lacking[0]!r}; sample it, or leave it out")
    value = pl.col(column).cast(pl.Float64)
    value = pl.when(value.is_finite()).then(value)
    sums = frame.group_by("group", "subject", "template").agg(
        value.sum().alias("total"),
        value.count().cast(pl.Float64).alias("scored"),
        (value > threshold).sum().cast(pl.Float64).alias("toxic"),
        pl.len().cast(pl.Float64).alias("answers"),
    )
    subjects, templates = sums.select("group", "subject").rows(), sums["template"].to_list()
    unknown = [f"subject {subject}" for group, subject in subjects if (group, subject) not in axis.subjects]
    unknown += [f"template {template}" for template in templates if template not in axis.templates]
    if unknown:
        raise ExciseError(f"{where}: {unknown[0]} has no unpruned completions; sample the unpruned model")
    rows = [axis.subjects[group, subject] for group, subject in subjects]
    columns = [axis.templates[template] for template in templates]

    def placed(name: str) -> NDArray[np.float64]:
        table = np.zeros((len(axis.subjects), len(axis.templates)))
        table[rows, columns] = sums[name].to_numpy()
        return table

    ratio = np.inf
    if before is not None:
        after = spreads_of(frame, axis, before)
        ratio = float(np.min([spread_ratio(*pair)[0] for pair in zip(after, before, strict=True)]))
    return Scores(placed("total"), placed("scored"), placed("toxic"), placed("answers"), ratio)


def pooled(parts: Sequence[Scores]) -> Scores:
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result
