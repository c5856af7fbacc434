"""Disparities between groups, from answers that are weighed: where answers are counted, and what sums of them say.

Answers are summed by resample, group and variation once, and every weighting, resample and half of them is read from
such sums. How the weights come about is `excise.attribution.head_impacts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from excise.evaluation import bootstrap
from excise.evaluation import metrics as m
from excise.evaluation.thresholds import COLLAPSED_SPREAD

Disparity = Literal["toxicity", "smd", "gap"]
WINSORIZE = (0.05, 0.95)


@dataclass(frozen=True)
class Cells:
    """Rows of a completions table.

    place: int [N], cluster and variation as one number, -1 for a row that does not count. value: float [N], clipped, as
    distance from the centre. half: int [N], 0 or 1, in turn within the clusters of a group and variation.
    """

    place: np.ndarray
    value: np.ndarray
    half: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Where completions of a scenario are counted: groups, their clusters (one after another) and variations.

    bounds: (low, high) per group and variation, float [groups, variations, 2], between which values are clipped.
    centre: a value of that group and variation, float [groups, variations]; sums are of distances from it, so that
    large values leave the variance its digits.
    """

    kind: Disparity
    groups: tuple[str, ...]
    cluster: str
    clusters: tuple[tuple[str, ...], ...]
    variations: tuple[str, ...]
    bounds: np.ndarray
    centre: np.ndarray
    cells: Cells
    group: np.ndarray
    """int [N], -1 for a row that does not count."""

    @classmethod
    def of(cls, completions: pl.DataFrame, kind: Disparity, groups: tuple[str, ...], cluster: str) -> Layout:
        variations = tuple(completions["variation"].unique(maintain_order=True))
        clusters = tuple(
            tuple(completions.filter(pl.col("group") == group)[cluster].unique().sort()) for group in groups
        )
        bounds = np.tile(np.array([-np.inf, np.inf]), (len(groups), len(variations), 1))
        centre = np.zeros((len(groups), len(variations)))
        for (group, variation), answers in completions.group_by("group", "variation"):
            values = answers["value"].cast(pl.Float64).fill_null(np.nan).to_numpy()
            values = values[np.isfinite(values)]
            if group in groups and len(values):
                at = groups.index(group), variations.index(variation)
                centre[at] = np.median(values)
                if kind == "smd":
                    bounds[at] = np.quantile(values, WINSORIZE)
        nothing = Cells(*(np.zeros(0),) * 3)
        bare = cls(kind, groups, cluster, clusters, variations, bounds, centre, nothing, np.zeros(0))
        cells = bare.numbered(completions)
        group = np.repeat(np.arange(len(groups)), [len(names) for names in clusters])
        of_row = np.where(cells.place >= 0, group[cells.place // len(variations)], -1)
        return cls(kind, groups, cluster, clusters, variations, bounds, centre, cells, of_row)

    @property
    def resampled(self) -> bool:
        """One cluster leaves nothing to resample."""
        return min(map(len, self.clusters)) >= 2

    @property
    def _begins(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.clusters)])

    def numbered(self, completions: pl.DataFrame) -> Cells:
        """Put the rows of a table into their places; those without outcome, or of other groups, do not count."""
        codes = {
            (group, cluster): int(begin) + index
            for group, clusters, begin in zip(self.groups, self.clusters, self._begins, strict=False)
            for index, cluster in enumerate(clusters)
        }
        numbers = {variation: index for index, variation in enumerate(self.variations)}
        value = completions["value"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        pairs = zip(completions["group"], completions[self.cluster], strict=True)
        cluster = np.array([codes.get(pair, -1) for pair in pairs], dtype=np.int64)
        variation = np.array([numbers.get(name, -1) for name in completions["variation"]], dtype=np.int64)
        counts = (cluster >= 0) & (variation >= 0) & np.isfinite(value)
        place = np.where(counts, cluster * len(self.variations) + variation, -1)
        group = np.searchsorted(self._begins, cluster, side="right") - 1
        clipped = np.clip(value, *np.moveaxis(self.bounds[group, variation], -1, 0))
        order = (
            completions.select("prompt_id", "sample")
            .with_columns(group=pl.Series(group), variation=pl.Series(variation), cluster=pl.Series(cluster))
            .with_columns(counts=pl.Series(counts))
            .with_row_index("row")
            .sort("counts", "group", "variation", "cluster", "prompt_id", "sample")["row"]
            .to_numpy()
        )
        # Alternating along this order halves every cluster's samples, and those of clusters with a single one in turn.
        half = np.empty(len(order), dtype=np.int64)
        half[order] = np.arange(len(order)) % 2
        return Cells(place, np.where(counts, clipped - self.centre[group, variation], 0.0), half)

    def draws(self, resamples: int, seed: int) -> list[np.ndarray]:
        """Per group: how often each resample draws its clusters, [resamples + 1, clusters], all once in the first."""
        return [
            bootstrap.resampled_names(len(clusters), resamples, np.random.default_rng([seed, index]))
            for index, clusters in enumerate(self.clusters)
        ]

    def sums(
        self,
        cells: Cells,
        draws: Sequence[np.ndarray] | None,
        taken: np.ndarray | None = None,
        weight: np.ndarray | None = None,
    ) -> np.ndarray:
        """Sums of 1, w, w^2, w f and w f^2 by resample, [5, groups, resamples + 1, variations].

        draws: None for the sample alone. taken: bool [N], rows to take. weight: w, float [N], None for 1.
        """
        rows = cells.place >= 0 if taken is None else (cells.place >= 0) & taken
        place, value = cells.place[rows], cells.value[rows]
        w = np.ones(len(place)) if weight is None else weight[rows]
        begins, width = self._begins, len(self.variations)
        table = np.stack(
            [
                np.bincount(place, weights=weights, minlength=begins[-1] * width).reshape(-1, width)
                for weights in (np.ones(len(place)), w, w**2, w * value, w * value**2)
            ]
        )
        by_group = []
        for index in range(len(self.groups)):
            of_group = table[:, begins[index] : begins[index + 1]]
            by_group.append(of_group.sum(axis=1)[:, None] if draws is None else draws[index] @ of_group)
        return np.stack(by_group, axis=1)

    def disparity(self, sums: np.ndarray, unpruned: np.ndarray) -> np.ndarray:
        """The disparity of each resample, [resamples + 1]; NaN where a group has no weight left."""
        count, w, _, wf, _ = sums
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            offset = wf / w  # self-normalised within variation and group
            mean = self.centre[:, None] + offset
            if self.kind == "toxicity":
                total = np.where(count > 0, count * mean, 0.0).sum(axis=-1)
                size = count.sum(axis=-1)
                return np.abs(total.sum(axis=0) / size.sum(axis=0) - total / size).sum(axis=0)
            # A variation to which the unpruned model gave a group no two answers says nothing about any head.
            known = np.asarray((unpruned[0, :, 0] >= 2).all(axis=0))
            variance, before = _variance(sums), _variance(unpruned)
            # Answers that all became the same have no gap, and are no sign of a harmful head.
            if self.kind == "gap":
                collapsed = (variance == 0) & (before > 0)
                size = np.abs(self.centre[:, None] + unpruned[3] / unpruned[1]).mean(axis=0)
                disparities = np.abs(m.exact_difference(*mean)) / size
            else:
                collapsed = variance < COLLAPSED_SPREAD**2 * before
                disparities = np.abs(m.standardized(mean, variance))
            return _mean(np.where(collapsed.any(axis=0), np.nan, disparities), known)

    def excess_noise(self, sums: np.ndarray) -> float:
        """The excess of a toxicity disparity of weighed answers over that of as many newly drawn answers.

        sums: of one resample, [5, groups, variations]. A sum of absolute distances is too large by its noise
        (`metrics.folded_noise`), and fewer effective samples make more of it: uncorrected, a head would look helpful
        for uneven weights alone. 0 for equal weights, and for the other disparities, whose absolute value is of a
        difference that is large where there is anything to remove.
        """
        if self.kind != "toxicity":
            return 0.0
        count, w, w2, wf, wf2 = sums
        with np.errstate(invalid="ignore", divide="ignore"):
            offset = wf / w
            # Weighted sample variance; of one effective answer nothing is known.
            variance = np.where(w**2 > w2, (wf2 / w - offset**2) / (1 - w2 / w**2), 0.0)
            mean = np.where(count > 0, self.centre + offset, 0.0)
            size = count.sum(axis=-1)
            share = size / size.sum()
            total = (count * mean).sum(axis=-1) / size
            deviation = share @ total - total

            def of_deviations(of_mean: np.ndarray) -> np.ndarray:
                variances = np.where(count > 0, (count / size[:, None]) ** 2 * of_mean, 0.0).sum(axis=-1)
                return (1 - 2 * share) * variances + (share**2 * variances).sum()

            weighed, equal = of_deviations(variance * w2 / w**2), of_deviations(variance / count)
            spread = m.true_spread(deviation, weighed)
            return float(m.folded_noise(deviation, weighed, spread) - m.folded_noise(deviation, equal, spread))

    def mean(self, sums: np.ndarray) -> float:
        """Mean outcome over all groups and variations, each as large as its number of outcomes."""
        count, w, _, wf, _ = sums[:, :, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.where(count > 0, count * (self.centre + wf / w), 0.0).sum() / count.sum())

    def effective(self, weight: np.ndarray) -> dict[str, float]:
        """ess, ess_smallest and mean_weight of weights [N]; 0 where no weight is left."""

        def share(weights: np.ndarray) -> float:
            square = (weights**2).sum()
            return float(weights.sum() ** 2 / square / len(weights)) if square > 0 else 0.0

        by_group = [share(weight[self.group == index]) for index in range(len(self.groups))]
        return {"ess": share(weight[self.group >= 0]), "ess_smallest": min(by_group), "mean_weight": weight.mean()}


def _variance(sums: np.ndarray) -> np.ndarray:
    """Variances from sums [5, ...]: with w = 1 the sample variance with ddof 1, else its weighted counterpart."""
    _, w, w2, wf, wf2 = sums
    offset = wf / w
    variance = (wf2 - w * offset**2) / (w - w2 / w)
    return np.where(variance <= 1e-12 * offset**2, 0.0, variance)  # what rounding leaves of equal values is no spread


def _mean(by_variation: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean over the variations that are known, [resamples + 1]; NaN without any."""
    if not known.any():
        return np.full(len(by_variation), np.nan)
    return by_variation[:, known].mean(axis=-1)
