"""What removing each attention head does to perplexity and to the disparity between groups (FASP, section 3).

Instead of asking the model anew without each head, the unpruned model's answers are kept and weighed by how much
likelier they are without it: `E_without[f] = E[f p_without / p]`, both under the sampling distribution
(docs/design.md). Here are the weights, the disparities, their intervals and reliability, and the files that keep model
work; the passes themselves are in `excise.attribution.continuation`, what to prune is decided in
`excise.strategies.selection`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl

from excise.errors import ExciseError
from excise.evaluation import bootstrap
from excise.evaluation import metrics as m
from excise.evaluation.perplexity import Window, perplexity, perplexity_difference
from excise.evaluation.thresholds import CATASTROPHIC, COLLAPSED_SPREAD
from excise.files.tensors import load_tensors, save_tensors
from excise.interventions.heads import HeadMask, heads_mask
from excise.interventions.protocol import Intervention
from excise.models.encoding import encode, require_same_prompts
from excise.progress import Progress, silent

if TYPE_CHECKING:
    from excise.attribution.continuation import Part
    from excise.generation.sampling import SamplingParameters
    from excise.models.loading import LoadedModel

Disparity = Literal["toxicity", "smd", "gap"]
Method = Literal["auto", "reweight", "regenerate"]
ABLATION = "zero_output"
WINSORIZE = (0.05, 0.95)
VERSION = 1
"""Part of every file's address: raise it when the same work gives other numbers."""

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


def head_impacts(
    loaded: LoadedModel,
    prompts: pl.DataFrame,
    completions: pl.DataFrame,
    *,
    disparity: Disparity,
    groups: Sequence[str],
    cluster: str = "subject",
    parameters: SamplingParameters,
    windows: Sequence[Window] = (),
    perplexity_mode: Literal["sliding", "paper"] = "sliding",
    regenerate: Callable[[Intervention], pl.DataFrame] | None = None,
    method: Method = "auto",
    ess_floor: float = 0.2,
    resamples: int = 1000,
    seed: int = 0,
    folder: Path | None = None,
    heads: Iterable[tuple[int, int]] | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Perplexity and disparity with and without every head, one row each with the columns of `SCHEMA`.

    prompts: rows of `excise.scenarios.expand`. completions: the unpruned model's, drawn with `parameters`, with
    `variation`, `group`, `prompt_id`, `sample`, `value` (the outcome; null = unparsed or unscored, no weight),
    `token_ids` (the stop token included where the answer is finished) and the column `cluster`; `prompt_hash`, where it
    is there, must be that of the prompts as the model reads them.

    disparity (`bias_*`): `toxicity` is FASP's sum over `groups` of |t_axis - t_s|; `smd` the mean over variations of
    |SMD| of the two `groups`, majority first, each winsorised at the unpruned model's 5th and 95th percentile; `gap`
    the mean over variations of |difference of means| in units of the unpruned groups' mean size.
    z_ppl = perplexity with - without: negative for a head the model needs. z_bias = disparity with - without: positive
    for a harmful head. Toxicity without a head is told at the noise of as many answers drawn anew, as a sum of absolute
    distances grows with noise, and weights make it. Intervals are 95 % paired bootstrap: of windows, and of clusters (a
    column of the completions) within groups. z_bias_half_1 and _2: the same from either half of every cluster's
    samples; they tell the noise of sampling (`split_half_reliability`), not that of the choice of clusters.
    mean_without: mean outcome, of the winsorised values for `smd`. Where removing a head makes a group's answers all
    alike (`smd`: nearly so, `thresholds.COLLAPSED_SPREAD`), SMD and gap without it are undefined, and so is an SMD
    without deviation: null, not 0.

    ess: effective sample size (sum w)^2 / sum w^2 as a share of the answers with an outcome, in all and in the group
    where it is smallest. mean_weight: over all answers; below 1 by what the unpruned model never answers.
    method: `auto` asks anew without a head whose smallest ess is under `ess_floor`, if `regenerate` (mask of the head
    -> completions under it, same columns but token_ids) is given; `reweight` never; `regenerate` for every head, as
    the paper does. The column `method` tells which it was.

    folder: model work is kept there, per head, addressed by what decides it, so a killed call goes on where it was and
    one with other groups, clusters, outcomes or resamples computes nothing anew. heads: (layer, head) pairs, default
    all. Rows are null where a number is not defined. Raises ExciseError for columns, groups or heads that are not
    there.
    """
    chosen = _chosen_heads(loaded, heads)
    _check(prompts, completions, disparity, groups, cluster, method, regenerate)
    if "prompt_hash" in completions.columns:
        require_same_prompts(encode(loaded, prompts), completions)
    store = _Store(folder)
    perplexities = _perplexities(loaded, windows, perplexity_mode, chosen, store, resamples, seed, progress)
    layout = _Layout.of(completions, disparity, tuple(groups), cluster)
    draws = layout.draws(resamples, seed)
    unpruned = layout.sums(layout.cells, draws)
    halves = [layout.sums(layout.cells, None, layout.cells.half == half) for half in (0, 1)]
    bias_with = layout.disparity(unpruned, unpruned)
    halves_with = [layout.disparity(half, half)[0] for half in halves]
    weights = (
        None
        if method == "regenerate"
        else _log_weights(loaded, prompts, completions, parameters, chosen, store, progress)
    )
    rows = []
    progress("head impacts: disparity", 0, len(chosen))
    for done, (layer, head) in enumerate(chosen, start=1):
        row = {"layer": layer, "head": head, **perplexities[layer, head], "method": "reweighted"}
        anew = weights is None
        if weights is not None:
            weight = np.exp(np.minimum(weights(layer, head), 300.0))
            row |= layout.effective(weight)
            anew = method == "auto" and regenerate is not None and not row["ess_smallest"] >= ess_floor
        if anew:
            row["method"] = "regenerated"
            answers = regenerate(_mask_of(loaded, layer, head))
            _require(answers, (*_COLUMNS, cluster), "regenerated completions")
            cells, weight = layout.numbered(answers), None
        else:
            cells = layout.cells
        sums = layout.sums(cells, draws, weight=weight)
        bias = layout.disparity(sums, unpruned) - layout.excess_noise(sums[:, :, 0])
        z = bias_with - bias
        low, high = bootstrap.percentile_interval(z[1:]) if layout.resampled else (np.nan, np.nan)
        row |= {
            "bias_with": bias_with[0],
            "bias_without": bias[0],
            "z_bias": z[0],
            "z_bias_low": low,
            "z_bias_high": high,
            "mean_without": layout.mean(sums),
        }
        for half in (0, 1):
            without = layout.sums(cells, None, cells.half == half, weight)
            matched = layout.disparity(without, halves[half])[0] - layout.excess_noise(without[:, :, 0])
            row[f"z_bias_half_{half + 1}"] = halves_with[half] - matched
        rows.append(row)
        progress("head impacts: disparity", done, len(chosen))
    return pl.DataFrame(rows, schema=SCHEMA).with_columns(
        pl.when(pl.col(pl.Float64).is_finite()).then(pl.col(pl.Float64))
    )


def split_half_reliability(impacts: pl.DataFrame, catastrophic: float = CATASTROPHIC) -> pl.DataFrame:
    """How well z_bias from one half of the samples agrees with that from the other, over heads (method, B8).

    impacts: rows of `head_impacts`. Two rows: all heads, and without those whose perplexity_without exceeds
    `catastrophic` medians. The corrected figures are for the whole sample, by Spearman and Brown: 2 r / (1 + r). Null
    with fewer than three heads or where a half does not vary; corrected ones also where r is below -1/3, as a formula
    for halves that agree would leave [-1, 1]. Columns: `RELIABILITY_SCHEMA`.
    """
    from scipy.stats import pearsonr, spearmanr

    halves = impacts.drop_nulls(["z_bias_half_1", "z_bias_half_2"])
    median = impacts["perplexity_without"].median()
    limit = np.inf if median is None else catastrophic * median
    rows = []
    for among, some in (
        ("all heads", halves),
        ("without catastrophic heads", halves.filter(pl.col("perplexity_without").fill_null(0) <= limit)),
    ):
        first, second = (some[f"z_bias_half_{half}"].to_numpy() for half in (1, 2))
        row: dict[str, object] = {"among": among, "heads": some.height}
        if some.height >= 3 and min(np.ptp(first), np.ptp(second)) > 0:
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


def _check(
    prompts: pl.DataFrame,
    completions: pl.DataFrame,
    disparity: str,
    groups: Sequence[str],
    cluster: str,
    method: str,
    regenerate: object,
) -> None:
    for name, value, known in (("disparity", disparity, get_args(Disparity)), ("method", method, get_args(Method))):
        if value not in known:
            raise ExciseError(f"head impacts: {name} {value!r} is not known; use {', '.join(known)}")
    if method == "regenerate" and regenerate is None:
        raise ExciseError("head impacts: method 'regenerate' needs `regenerate`, which asks the model without a head")
    if not groups:
        raise ExciseError("head impacts: no groups given; name those to compare")
    if disparity != "toxicity" and len(groups) != 2:
        raise ExciseError(f"head impacts: {disparity} compares two groups, majority and minority; {len(groups)} given")
    _require(completions, (*_COLUMNS, "token_ids", cluster), "completions")
    if missing := set(groups) - set(completions["group"].unique()):
        raise ExciseError(f"completions: there is no group {min(missing)!r}; name groups that were asked about")
    if missing := set(completions["prompt_id"].unique()) - set(prompts["prompt_id"]):
        raise ExciseError(f"completions: prompt_id {min(missing)} is not among the prompts; give the prompts asked")


def _require(table: pl.DataFrame, columns: Iterable[str], what: str) -> None:
    if missing := [name for name in columns if name not in table.columns]:
        raise ExciseError(
            f"{what} lack the column {missing[0]}; give a table such as `excise.generation.completions` makes"
        )


# --- model work, kept in files ---------------------------------------------------------------------------------------


@dataclass
class _Store:
    """Arrays by address and name: safetensors files that appear only when whole, or this process' memory."""

    folder: Path | None
    memory: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def _path(self, address: str, name: str) -> Path:
        return self.folder / address / f"{name}.safetensors"

    def has(self, address: str, name: str) -> bool:
        return (address, name) in self.memory if self.folder is None else self._path(address, name).is_file()

    def read(self, address: str, name: str) -> np.ndarray:
        if self.folder is None:
            return self.memory[address, name]
        return load_tensors(self._path(address, name))["numbers"]

    def write(self, address: str, name: str, numbers: np.ndarray) -> None:
        if self.folder is None:
            self.memory[address, name] = numbers
            return
        save_tensors(self._path(address, name), {"numbers": numbers})


def _address(kind: str, loaded: LoadedModel, *content: object) -> str:
    text = json.dumps([kind, loaded.fingerprint, ABLATION, VERSION, content])
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _name(layer: int | None, head: int | None) -> str:
    return "unpruned" if layer is None else f"{layer}.{head}"


def _compute(
    loaded: LoadedModel,
    parts: Sequence[Part],
    addresses: Sequence[str],
    heads: Sequence[tuple[int, int]],
    store: _Store,
    progress: Progress,
    label: str,
) -> None:
    """Do the work of all parts that is not in the store yet."""
    from excise.attribution.continuation import every_head

    lacking = [[each for each in heads if not store.has(address, _name(*each))] for address in addresses]
    done = len(heads) * len(parts) - sum(map(len, lacking))
    progress(label, done // len(parts), len(heads))

    def on_heads(count: int) -> None:
        nonlocal done
        done += count
        progress(label, done // len(parts), len(heads))

    for part, address, missing in zip(parts, addresses, lacking, strict=True):
        unpruned = not store.has(address, _name(None, None))
        if not missing and not unpruned:
            continue
        by_layer: dict[int, list[int]] = {}
        for layer, head in missing:
            by_layer.setdefault(layer, []).append(head)
        every_head(
            loaded,
            part.chunks,
            part.read,
            by_layer,
            unpruned=unpruned,
            on_heads=on_heads,
            keep=lambda layer, head, numbers, address=address: store.write(address, _name(layer, head), numbers),
        )


def _assembled(store: _Store, parts: Sequence[Part], addresses: Sequence[str], name: str, size: int) -> np.ndarray:
    numbers = np.full(size, np.nan)
    for part, address in zip(parts, addresses, strict=True):
        numbers[part.members] = store.read(address, name)
    return numbers


def _log_weights(
    loaded: LoadedModel,
    prompts: pl.DataFrame,
    completions: pl.DataFrame,
    parameters: SamplingParameters,
    heads: Sequence[tuple[int, int]],
    store: _Store,
    progress: Progress,
) -> Callable[[int, int], np.ndarray]:
    """log(p_without / p) of every completion, float64 [N], by layer and head; -inf where p_without is 0."""
    from excise.attribution.continuation import answer_parts

    asked = prompts.unique("prompt_id", maintain_order=True).join(
        completions.select("prompt_id").unique(), on="prompt_id", how="semi"
    )
    tokens = {prompt.prompt_id: tuple(prompt.tokens) for prompt in encode(loaded, asked)}
    number: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    which = np.array(
        [
            number.setdefault((tokens[prompt], tuple(answer)), len(number))
            for prompt, answer in completions.select("prompt_id", "token_ids").iter_rows()
        ],
        dtype=np.int64,
    )
    answers = list(number)
    settings = [parameters.temperature, parameters.top_k, parameters.top_p]
    parts = answer_parts(loaded, answers, parameters)
    addresses = [_address("answers", loaded, settings, [answers[index] for index in part.members]) for part in parts]
    _compute(loaded, parts, addresses, heads, store, progress, "head impacts: answers")
    base = _assembled(store, parts, addresses, _name(None, None), len(answers))

    def log_weights(layer: int, head: int) -> np.ndarray:
        return (_assembled(store, parts, addresses, _name(layer, head), len(answers)) - base)[which]

    return log_weights


def _perplexities(
    loaded: LoadedModel,
    windows: Sequence[Window],
    mode: str,
    heads: Sequence[tuple[int, int]],
    store: _Store,
    resamples: int,
    seed: int,
    progress: Progress,
) -> Mapping[tuple[int, int], dict[str, float]]:
    """The columns about perplexity of every head; none without windows."""
    if not windows:
        return {each: {} for each in heads}
    from excise.attribution.continuation import window_parts

    parts = window_parts(loaded, windows)
    addresses = [
        _address("windows", loaded, [(list(windows[index].tokens), windows[index].scored) for index in part.members])
        for part in parts
    ]
    _compute(loaded, parts, addresses, heads, store, progress, "head impacts: perplexity")
    losses = _assembled(store, parts, addresses, _name(None, None), len(windows))
    with_head = perplexity(losses, windows, mode)
    found = {}
    for each in heads:
        without = _assembled(store, parts, addresses, _name(*each), len(windows))
        z = perplexity_difference(losses, without, windows, mode, resamples=resamples, seed=seed)
        found[each] = {
            "perplexity_with": with_head,
            "perplexity_without": perplexity(without, windows, mode),
            "z_ppl": z.estimate,
            "z_ppl_low": z.low,
            "z_ppl_high": z.high,
            "z_ppl_se": z.standard_error,
        }
    return found


# --- disparities -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cells:
    """Rows of a completions table.

    place: int [N], cluster and variation as one number, -1 for a row that does not count. value: float [N], clipped, as
    distance from the centre. half: int [N], 0 or 1, in turn within the clusters of a group and variation.
    """

    place: np.ndarray
    value: np.ndarray
    half: np.ndarray


@dataclass(frozen=True)
class _Layout:
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
    cells: _Cells
    group: np.ndarray
    """int [N], -1 for a row that does not count."""

    @classmethod
    def of(cls, completions: pl.DataFrame, kind: Disparity, groups: tuple[str, ...], cluster: str) -> _Layout:
        variations = tuple(completions["variation"].unique(maintain_order=True))
        clusters = tuple(
            tuple(completions.filter(pl.col("group") == group)[cluster].unique().sort()) for group in groups
        )
        bounds = np.tile(np.array([-np.inf, np.inf]), (len(groups), len(variations), 1))
        centre = np.zeros((len(groups), len(variations)))
        for (group, variation), some in completions.group_by("group", "variation"):
            values = some["value"].cast(pl.Float64).fill_null(np.nan).to_numpy()
            values = values[np.isfinite(values)]
            if group in groups and len(values):
                at = groups.index(group), variations.index(variation)
                centre[at] = np.median(values)
                if kind == "smd":
                    bounds[at] = np.quantile(values, WINSORIZE)
        nothing = _Cells(*(np.zeros(0),) * 3)
        bare = cls(kind, groups, cluster, clusters, variations, bounds, centre, nothing, np.zeros(0))
        cells = bare.numbered(completions)
        group = np.repeat(np.arange(len(groups)), [len(each) for each in clusters])
        of_row = np.where(cells.place >= 0, group[cells.place // len(variations)], -1)
        return cls(kind, groups, cluster, clusters, variations, bounds, centre, cells, of_row)

    @property
    def resampled(self) -> bool:
        """One cluster leaves nothing to resample."""
        return min(map(len, self.clusters)) >= 2

    @property
    def _begins(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.clusters)])

    def numbered(self, completions: pl.DataFrame) -> _Cells:
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
        variation = np.array([numbers.get(each, -1) for each in completions["variation"]], dtype=np.int64)
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
        return _Cells(place, np.where(counts, clipped - self.centre[group, variation], 0.0), half)

    def draws(self, resamples: int, seed: int) -> list[np.ndarray]:
        """Per group: how often each resample draws its clusters, [resamples + 1, clusters], all once in the first."""
        return [
            bootstrap.resampled_names(len(clusters), resamples, np.random.default_rng([seed, index]))
            for index, clusters in enumerate(self.clusters)
        ]

    def sums(
        self,
        cells: _Cells,
        draws: Sequence[np.ndarray] | None,
        some: np.ndarray | None = None,
        weight: np.ndarray | None = None,
    ) -> np.ndarray:
        """Sums of 1, w, w^2, w f and w f^2 by resample, [5, groups, resamples + 1, variations].

        draws: None for the sample alone. some: bool [N], rows to take. weight: w, float [N], None for 1.
        """
        rows = cells.place >= 0 if some is None else (cells.place >= 0) & some
        place, value = cells.place[rows], cells.value[rows]
        w = np.ones(len(place)) if weight is None else weight[rows]
        begins, width = self._begins, len(self.variations)
        table = np.stack(
            [
                np.bincount(place, weights=each, minlength=begins[-1] * width).reshape(-1, width)
                for each in (np.ones(len(place)), w, w**2, w * value, w * value**2)
            ]
        )
        found = []
        for index in range(len(self.groups)):
            own = table[:, begins[index] : begins[index + 1]]
            found.append(own.sum(axis=1)[:, None] if draws is None else draws[index] @ own)
        return np.stack(found, axis=1)

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
            known = (unpruned[0, :, 0] >= 2).all(axis=0)
            variance, before = _variance(sums), _variance(unpruned)
            # Answers that all became the same have no gap, and are no sign of a harmful head.
            if self.kind == "gap":
                collapsed = (variance == 0) & (before > 0)
                size = np.abs(self.centre[:, None] + unpruned[3] / unpruned[1]).mean(axis=0)
                found = np.abs(m.exact_difference(*mean)) / size
            else:
                collapsed = variance < COLLAPSED_SPREAD**2 * before
                found = np.abs(m.standardized(mean, variance))
            return _mean(np.where(collapsed.any(axis=0), np.nan, found), known)

    def excess_noise(self, sums: np.ndarray) -> float:
        """What a toxicity disparity of weighed answers is too large by, beside that of as many answers drawn anew.

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
                own = np.where(count > 0, (count / size[:, None]) ** 2 * of_mean, 0.0).sum(axis=-1)
                return (1 - 2 * share) * own + (share**2 * own).sum()

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

        def share(some: np.ndarray) -> float:
            square = (some**2).sum()
            return float(some.sum() ** 2 / square / len(some)) if square > 0 else 0.0

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
