"""What removing each attention head does to perplexity and to the disparity between groups (FASP, section 3).

Instead of asking the model anew without each head, the unpruned model's answers are kept and weighed by how much
likelier they are without it: `E_without[f] = E[f p_without / p]`, both under the sampling distribution
(docs/design.md). The model's work is `excise.attribution.head_work`, sums of weighed answers are
`excise.attribution.disparities`, and what to prune is decided in `excise.strategies.selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl

from excise.attribution.disparities import Disparity, Layout
from excise.attribution.head_work import ABLATION, HeadWork, Store
from excise.errors import ExciseError
from excise.evaluation import bootstrap
from excise.evaluation.perplexity import Mode, Window, perplexity, perplexity_difference
from excise.evaluation.thresholds import CATASTROPHIC
from excise.interventions.heads import HeadMask, heads_mask
from excise.interventions.protocol import Intervention
from excise.models.encoding import encode, require_same_prompts
from excise.progress import Progress, silent

if TYPE_CHECKING:
    from excise.generation.sampling import SamplingParameters
    from excise.models.loading import LoadedModel

Method = Literal["auto", "reweight", "regenerate"]

SCHEMA = {
    "layer": pl.Int64,
    "head": pl.Int64,
    "perplexity_with": pl.Float64,
    "perplexity_without": pl.Float64,
    "z_ppl": pl.Float64,
    "z_ppl_low": pl.Float64,
    "z_ppl_high": pl.Float64,
    "z_ppl_se": pl.Float64,
    "bias_with": pl.Float64,
    "bias_without": pl.Float64,
    "z_bias": pl.Float64,
    "z_bias_low": pl.Float64,
    "z_bias_high": pl.Float64,
    "z_bias_half_1": pl.Float64,
    "z_bias_half_2": pl.Float64,
    "mean_without": pl.Float64,
    "ess": pl.Float64,
    "ess_smallest": pl.Float64,
    "mean_weight": pl.Float64,
    "method": pl.String,
}
RELIABILITY_SCHEMA = {
    "among": pl.String,
    "heads": pl.Int64,
    "pearson": pl.Float64,
    "spearman": pl.Float64,
    "pearson_corrected": pl.Float64,
    "spearman_corrected": pl.Float64,
}
_COLUMNS = ("variation", "group", "prompt_id", "sample", "value")


@dataclass(frozen=True)
class Sampled:
    """What the unpruned model answered.

    prompts: rows of `excise.scenarios.expand`. completions: drawn with `parameters`, with `variation`, `group`,
    `prompt_id`, `sample`, `value` (the outcome; null = unparsed or unscored, no weight), `token_ids` (the stop token
    included where the answer is finished) and the column that is resampled; `prompt_hash`, where it is there, must be
    that of the prompts as the model reads them.
    """

    loaded: LoadedModel
    prompts: pl.DataFrame
    completions: pl.DataFrame
    parameters: SamplingParameters


@dataclass(frozen=True)
class Compared:
    """The disparity that heads are judged by.

    disparity: `toxicity` is FASP's sum over `groups` of |t_axis - t_s|; `smd` the mean over variations of |SMD| of the
    two `groups`, majority first, each winsorised at the unpruned model's 5th and 95th percentile; `gap` the mean over
    variations of |difference of means| in units of the unpruned groups' mean size. cluster: the column of the
    completions whose values are drawn anew within groups, `resamples` times.
    """

    disparity: Disparity
    groups: Sequence[str]
    cluster: str = "subject"
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """The text that perplexity is measured on, in windows, and the mode they were cut by; no windows: not measured."""

    windows: Sequence[Window] = ()
    mode: Mode = "sliding"


@dataclass(frozen=True)
class Removal:
    """How answers without a head are obtained: `auto` asks anew without a head whose smallest effective sample is under
    `ess_floor`, if `regenerate` (mask of the head -> completions under it, same columns but token_ids) is given;
    `reweight` never; `regenerate` for every head, as the paper does."""

    method: Method = "auto"
    regenerate: Callable[[Intervention], pl.DataFrame] | None = None
    ess_floor: float = 0.2


def head_impacts(
    sampled: Sampled,
    compared: Compared,
    *,
    text: Text = Text(),
    removal: Removal = Removal(),
    heads: Iterable[tuple[int, int]] | None = None,
    folder: Path | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Perplexity and disparity with and without every head, one row each with the columns of `SCHEMA`.

    z_ppl = perplexity with - without: negative for a head the model needs. z_bias = disparity (`bias_*`) with -
    without: positive for a harmful head. Toxicity without a head is estimated at the noise of as many answers drawn
    anew, as a sum of absolute distances grows with noise, and weights add some. Intervals are 95 % paired bootstrap: of
    windows, and of clusters within groups. z_bias_half_1 and _2: the same from either half of every cluster's samples;
    they tell the noise of sampling (`split_half_reliability`), not that of the choice of clusters. mean_without: mean
    outcome, of the winsorised values for `smd`. Where removing a head makes a group's answers all alike (`smd`: nearly
    so, `thresholds.COLLAPSED_SPREAD`), SMD and gap without it are undefined, and so is an SMD without deviation: null,
    not 0.

    ess: effective sample size (sum w)^2 / sum w^2 as a share of the answers with an outcome, in all and in the group
    where it is smallest. mean_weight: over all answers; below 1 by what the unpruned model never answers. method: how
    the answers without the head were had.

    folder: model work is kept there, per head, addressed by what decides it, so a killed call goes on where it was and
    one with other groups, clusters, outcomes or resamples computes nothing anew. heads: (layer, head) pairs, default
    all. Rows are null where a number is not defined. Raises ExciseError for columns, groups or heads that are not
    there.
    """
    loaded, completions = sampled.loaded, sampled.completions
    chosen = _chosen_heads(loaded, heads)
    _check(sampled, compared, removal)
    if "prompt_hash" in completions.columns:
        require_same_prompts(encode(loaded, sampled.prompts), completions)
    work = HeadWork(loaded, chosen, Store(folder), progress)
    perplexities = _perplexities(work, text, compared)
    judge = _Judge.of(completions, compared)
    weights = None
    if removal.method != "regenerate":
        weights = work.log_weights(sampled.prompts, completions, sampled.parameters)
    rows = []
    progress("head impacts: disparity", 0, len(chosen))
    for done, (layer, head) in enumerate(chosen, start=1):
        row: dict[str, object] = {"layer": layer, "head": head, **perplexities[layer, head]}
        weight = None if weights is None else np.exp(np.minimum(weights(layer, head), 300.0))
        effective = {} if weight is None else judge.layout.effective(weight)
        few = weight is None or (removal.method == "auto" and not effective["ess_smallest"] >= removal.ess_floor)
        anew = None
        if few and removal.regenerate is not None:
            anew, weight = removal.regenerate(_mask_of(loaded, layer, head)), None
            _require(anew, (*_COLUMNS, compared.cluster), "regenerated completions")
        row |= {**effective, "method": "reweighted" if anew is None else "regenerated"}
        rows.append(row | judge.without(anew, weight))
        progress("head impacts: disparity", done, len(chosen))
    return pl.DataFrame(rows, schema=SCHEMA).with_columns(
        pl.when(pl.col(pl.Float64).is_finite()).then(pl.col(pl.Float64))
    )


@dataclass(frozen=True)
class _Judge:
    """The unpruned model's disparity, in all resamples and in either half of the samples, and its difference to others.

    unpruned, halves: sums of the unpruned answers (`Layout.sums`); bias, bias_of_halves: disparities of these.
    """

    layout: Layout
    draws: list[np.ndarray]
    unpruned: np.ndarray
    halves: list[np.ndarray]
    bias: np.ndarray
    bias_of_halves: list[float]

    @classmethod
    def of(cls, completions: pl.DataFrame, compared: Compared) -> _Judge:
        layout = Layout.of(completions, compared.disparity, tuple(compared.groups), compared.cluster)
        draws = layout.draws(compared.resamples, compared.seed)
        unpruned = layout.sums(layout.cells, draws)
        halves = [layout.sums(layout.cells, None, layout.cells.half == half) for half in (0, 1)]
        of_halves = [layout.disparity(half, half)[0] for half in halves]
        return cls(layout, draws, unpruned, halves, layout.disparity(unpruned, unpruned), of_halves)

    def without(self, anew: pl.DataFrame | None, weight: np.ndarray | None) -> dict[str, float]:
        """The columns about the disparity without a head, of answers drawn anew or of the unpruned ones, weighed."""
        layout = self.layout
        cells = layout.cells if anew is None else layout.numbered(anew)
        sums = layout.sums(cells, self.draws, weight=weight)
        bias = layout.disparity(sums, self.unpruned) - layout.excess_noise(sums[:, :, 0])
        z = self.bias - bias
        low, high = bootstrap.percentile_interval(z[1:]) if layout.resampled else (np.nan, np.nan)
        columns = {
            "bias_with": self.bias[0],
            "bias_without": bias[0],
            "z_bias": z[0],
            "z_bias_low": low,
            "z_bias_high": high,
            "mean_without": layout.mean(sums),
        }
        for half in (0, 1):
            of_half = layout.sums(cells, None, cells.half == half, weight)
            matched = layout.disparity(of_half, self.halves[half])[0] - layout.excess_noise(of_half[:, :, 0])
            columns[f"z_bias_half_{half + 1}"] = self.bias_of_halves[half] - matched
        return columns


def _perplexities(work: HeadWork, text: Text, compared: Compared) -> Mapping[tuple[int, int], dict[str, float]]:
    """The columns about perplexity of every head; none without windows."""
    if not text.windows:
        return {head: {} for head in work.heads}
    of_head = work.window_losses(text.windows)
    losses = of_head(None, None)
    with_head = perplexity(losses, text.windows, text.mode)
    columns = {}
    for layer, head in work.heads:
        without = of_head(layer, head)
        z = perplexity_difference(
            losses, without, text.windows, text.mode, resamples=compared.resamples, seed=compared.seed
        )
        columns[layer, head] = {
            "perplexity_with": with_head,
            "perplexity_without": perplexity(without, text.windows, text.mode),
            "z_ppl": z.estimate,
            "z_ppl_low": z.low,
            "z_ppl_high": z.high,
            "z_ppl_se": z.standard_error,
        }
    return columns


def split_half_reliability(impacts: pl.DataFrame, catastrophic: float = CATASTROPHIC) -> pl.DataFrame:
    """How well z_bias from one half of the samples agrees with that from the other, over heads (method, B8).

    impacts: rows of `head_impacts`. Two rows: all heads, and without those whose perplexity_without exceeds
    `catastrophic` medians. The corrected figures are for the whole sample, by Spearman and Brown: 2 r / (1 + r). Null
    with fewer than three heads or where a half does not vary; corrected ones also where r is below -1/3, as a formula
    for halves that agree would leave [-1, 1]. Columns: `RELIABILITY_SCHEMA`.
    """
    from scipy.stats import pearsonr, spearmanr

    halves = impacts.drop_nulls(["z_bias_half_1", "z_bias_half_2"])
    known = impacts["perplexity_without"].drop_nulls().to_numpy()
    limit = catastrophic * float(np.median(known)) if len(known) else np.inf
    rows = []
    for among, subset in (
        ("all heads", halves),
        ("without catastrophic heads", halves.filter(pl.col("perplexity_without").fill_null(0) <= limit)),
    ):
        first, second = (subset[f"z_bias_half_{half}"].to_numpy() for half in (1, 2))
        row: dict[str, object] = {"among": among, "heads": subset.height}
        if subset.height >= 3 and min(np.ptp(first), np.ptp(second)) > 0:
            for name, correlation in (("pearson", pearsonr), ("spearman", spearmanr)):
                r = float(correlation(first, second).statistic)
                row |= {name: r, f"{name}_corrected": 2 * r / (1 + r) if r > -1 / 3 else None}
        rows.append(row)
    return pl.DataFrame(rows, schema=RELIABILITY_SCHEMA)


def _mask_of(loaded: LoadedModel, layer: int, head: int) -> HeadMask:
    chosen = np.zeros((loaded.topology.layers, loaded.topology.heads), dtype=bool)
    chosen[layer, head] = True
    return heads_mask(chosen, ABLATION)


def _chosen_heads(loaded: LoadedModel, heads: Iterable[tuple[int, int]] | None) -> list[tuple[int, int]]:
    layers, count = loaded.topology.layers, loaded.topology.heads
    every = [(layer, head) for layer in range(layers) for head in range(count)]
    if heads is None:
        return every
    wanted = {(int(layer), int(head)) for layer, head in heads}
    if unknown := sorted(wanted - set(every)):
        raise ExciseError(
            f"head impacts: the model has no head {unknown[0]}; it has {layers} layers of {count} heads, "
            "numbered from 0"
        )
    return sorted(wanted)


def _check(sampled: Sampled, compared: Compared, removal: Removal) -> None:
    completions, disparity, groups = sampled.completions, compared.disparity, compared.groups
    for name, value, known in (
        ("disparity", disparity, get_args(Disparity)),
        ("method", removal.method, get_args(Method)),
    ):
        if value not in known:
            raise ExciseError(f"head impacts: {name} {value!r} is not known; use {', '.join(known)}")
    if removal.method == "regenerate" and removal.regenerate is None:
        raise ExciseError("head impacts: method 'regenerate' needs `regenerate`, which asks the model without a head")
    if not groups:
        raise ExciseError("head impacts: no groups given; name those to compare")
    if disparity != "toxicity" and len(groups) != 2:
        raise ExciseError(f"head impacts: {disparity} compares two groups, majority and minority; {len(groups)} given")
    _require(completions, (*_COLUMNS, "token_ids", compared.cluster), "completions")
    if missing := set(groups) - set(completions["group"].unique()):
        raise ExciseError(f"completions: there is no group {min(missing)!r}; name groups that were asked about")
    if missing := set(completions["prompt_id"].unique()) - set(sampled.prompts["prompt_id"]):
        raise ExciseError(f"completions: prompt_id {min(missing)} is not among the prompts; give the prompts asked")


def _require(table: pl.DataFrame, columns: Iterable[str], what: str) -> None:
    if missing := [name for name in columns if name not in table.columns]:
        raise ExciseError(
            f"{what} lack the column {missing[0]}; give a table such as `excise.generation.completions` makes"
        )
