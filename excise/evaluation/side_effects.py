"""Side effects of masks: what a mask does to plain text, and to scenarios it was not made for.

Here: how far the next-token distributions of a text move under a mask, what that does to its perplexity, which prompts
of another scenario are asked, and what of `evaluation` is told of the answers. Not here: sampling (`generation`) and
the choice of masks. Perplexity alone certifies nothing: it is an average over tokens, most of which any model predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.conditions import PLACE
from excise.errors import ExciseError
from excise.evaluation import bootstrap
from excise.evaluation.judged import compared_groups
from excise.evaluation.perplexity import (
    Mode,
    Window,
    logits_at_once,
    perplexity_difference,
    require_windows,
    scored_states,
    sums_by_window,
    text_windows,
)
from excise.evaluation.rows import finite_or_none
from excise.evaluation.scenario_metrics import Draws, compared_numbers
from excise.models.encoding import opening_tokens, positions
from excise.scenarios import Scenario, expand
from excise.scenarios.subsets import EVALUATION, first_names, held_out_split

if TYPE_CHECKING:
    import torch

    from excise.interventions.protocol import Intervention
    from excise.models.loading import LoadedModel


TEXT = "text"
"""The target that is no scenario."""
NO_TARGET = "(none)"
"""In place of a target: no other scenario was asked, as the settings name none or there is none."""
TEXT_WINDOWS = 8
"""So many windows of the text are read under every mask."""
TEXT_SIZE = 128
"""Their length in tokens where the settings leave it out: shorter than for perplexity, and without overlap, as a
difference between two models needs less context than either's perplexity, and every mask pays for it."""
KL, RATIO, CHANGE = "text_kl", "text_perplexity_ratio", "excess_change"
SCENARIO_METRICS = ("inlier_ratio", "spread_ratio", "commonest_rise", CHANGE, "gap_mean", "gap_change")
SIDE_EFFECTS_SCHEMA = {
    **dict.fromkeys(("model", "scenario", *PLACE), pl.String),
    "mask": pl.String,
    "target": pl.String,
    "metric": pl.String,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "names": pl.Int64,
}
Figures = tuple[float | None, float | None, float | None]
"""Estimate, lower and upper end of its interval; None where a figure is not finite."""
EFFECT_SCHEMA = {name: SIDE_EFFECTS_SCHEMA[name] for name in list(SIDE_EFFECTS_SCHEMA)[len(PLACE) + 2 :]}
"""Rows about a mask, whichever strategies and variations it belongs to."""


@dataclass(frozen=True)
class TextUnpruned:
    """The unpruned model on some windows: a batch is one window. states: on the CPU, [scored, hidden] a window."""

    windows: tuple[Window, ...]
    states: tuple[torch.Tensor, ...]
    losses: np.ndarray  # summed over a window's scored tokens, nats [windows]


def token_kl(logits: torch.Tensor, pruned_logits: torch.Tensor) -> torch.Tensor:
    """KL divergence of every token's distribution from the unpruned one, sum p log(p / q): nats, [tokens].

    logits, pruned_logits: [tokens, vocabulary]. Tokens that the unpruned model never gives add nothing; where the
    pruned model never gives one that the unpruned does, it is infinite.
    """
    import torch

    p = torch.softmax(logits, dim=-1)
    apart = (logits - pruned_logits).masked_fill_(p == 0, 0.0)
    # log (p / q) is the difference of the logits less that of their normalizers, which are the same for all tokens.
    normalizers = torch.logsumexp(logits, dim=-1) - torch.logsumexp(pruned_logits, dim=-1)
    return (torch.linalg.vecdot(p, apart) - normalizers).clamp(min=0)


def effect_windows(
    loaded: LoadedModel,
    text: str,
    *,
    mode: Mode = "sliding",
    size: int | None = None,
    stride: int | None = None,
    limit_tokens: int | None = None,
) -> list[Window]:
    """The first `TEXT_WINDOWS` windows of a text, as `perplexity.text_windows` cuts it; where neither size nor stride
    is given, sliding windows have `TEXT_SIZE` tokens, and each token but the first of a window is scored."""
    if mode == "sliding" and size is None and stride is None:
        size = min(TEXT_SIZE, positions(loaded) or TEXT_SIZE)
        stride = size - len(opening_tokens(loaded.tokenizer)) - 1
    windows = text_windows(loaded, text, mode=mode, size=size, stride=stride, limit_tokens=limit_tokens)
    return windows[:TEXT_WINDOWS]


def text_unpruned(loaded: LoadedModel, windows: Sequence[Window]) -> TextUnpruned:
    """What `text_effect` compares a mask with. Raises ExciseError for windows the model cannot read.

    Hidden states are kept instead of distributions, which are made of them again, a few tokens at a time: the output
    layer is never pruned, and a state is smaller than a distribution by as much as a vocabulary is larger than it.
    """
    require_windows(loaded, windows)
    states, losses = [], []
    for window in windows:
        hidden, loss, _ = _read(loaded, window, None)
        states.append(hidden.cpu())
        losses.append(loss)
    return TextUnpruned(tuple(windows), tuple(states), np.array(losses))


def text_effect(
    loaded: LoadedModel,
    unpruned: TextUnpruned,
    intervention: Intervention | None,
    *,
    mode: Mode = "sliding",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Figures]:
    """What an intervention does to a text: `text_kl` and `text_perplexity_ratio`, each (estimate, low, high).

    text_kl: mean over the scored tokens of KL(unpruned || pruned), in nats. text_perplexity_ratio: perplexity under the
    mask over that of the unpruned model, less 1. The 95 % intervals are of windows drawn anew, the same for both
    models; of one window there is none. None also where a figure is infinite.
    """
    from excise.interventions.protocol import edited

    divergences, losses = [], []
    with edited(loaded, intervention):
        for window, states in zip(unpruned.windows, unpruned.states, strict=True):
            _, loss, divergence = _read(loaded, window, states)
            losses.append(loss)
            divergences.append(divergence)
    counts = np.array([window.scored for window in unpruned.windows])
    change = perplexity_difference(
        np.array(losses), unpruned.losses, unpruned.windows, mode, relative=True, resamples=max(2, resamples), seed=seed
    )
    ratio = change.estimate, change.low, change.high
    kl = mean_interval(np.array(divergences), counts, resamples=resamples, seed=seed)
    return {KL: _finite(kl), RATIO: _finite(ratio)}


def _finite(figures: tuple[float, float, float]) -> Figures:
    estimate, low, high = map(finite_or_none, figures)
    return estimate, low, high


def mean_interval(
    sums: np.ndarray, counts: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Sum over count, and its 95 % percentile interval over windows drawn anew: (estimate, low, high).

    sums, counts: [windows]. The interval is NaN of one window, and where the figure is not finite.
    """
    weights = bootstrap.resampled_names(len(sums), resamples, np.random.default_rng(seed))
    with np.errstate(invalid="ignore"):
        ratios = (weights @ sums) / (weights @ counts)
    if len(sums) < 2 or not np.isfinite(ratios[0]):
        return float(ratios[0]), float("nan"), float("nan")
    return float(ratios[0]), *bootstrap.percentile_interval(ratios[1:])


def _read(loaded: LoadedModel, window: Window, before: torch.Tensor | None) -> tuple[torch.Tensor, float, float]:
    """States of a window, its summed loss, and its summed divergence from the states of `before` (else 0), in nats."""
    import torch

    from excise.generation.tree import logits_of

    rows, losses, divergences = logits_at_once(loaded), [], []
    with torch.inference_mode():
        states, targets = scored_states(loaded, [window])
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = logits_of(loaded, states[part])
            losses.append(torch.nn.functional.cross_entropy(logits, targets[part], reduction="none"))
            if before is not None:
                divergences.append(token_kl(logits_of(loaded, before[part].to(states.device)), logits))
    loss, divergence = (
        sums_by_window(torch.cat(tensors).cpu().numpy(), [window])[0] if tensors else 0.0
        for tensors in (losses, divergences)
    )
    return states, float(loss), float(divergence)


def target_prompts(
    scenario: Scenario, *, names: int, subjects_per_group: int, held_out: bool, seed: int
) -> pl.DataFrame:
    """The prompts of a scenario that side effects are measured on: its first variation, `names` names per group.

    subjects_per_group: as many names as the audit has, if the scenario has them. held_out: of these, the names of the
    half that masks are judged on, as an audit of the scenario with this seed halves them. Genders take turns. Raises
    ExciseError where a scenario has too few names to be halved.
    """
    most = min(len(group.subjects) for group in scenario.groups.values())
    first = next(iter(scenario.variations))
    prompts = expand(scenario, variations=[first], subjects_per_group=min(subjects_per_group, most))
    prompts = prompts.filter(pl.col("group").is_in(compared_groups(scenario)))
    if held_out:
        split = held_out_split(scenario, prompts, seed)
        kept = split.filter(split=EVALUATION)["prompt_id"]
        prompts = prompts.filter(pl.col("prompt_id").is_in(kept.implode()))
    return first_names(prompts, names)


def target_name(prompts: pl.DataFrame) -> str:
    """The target that prompts of one scenario and variation are: "scenario/variation"."""
    return f"{prompts['scenario'][0]}/{prompts['variation'][0]}"


def scenario_effects(
    unpruned: pl.DataFrame, pruned: Mapping[str, pl.DataFrame], scenario: Scenario, *, resamples: int, seed: int
) -> pl.DataFrame:
    """What masks do to the answers to another scenario: rows of EFFECT_SCHEMA, one per mask and metric.

    unpruned, pruned: answers to `target_prompts`, with the columns of `completions`; the pruned ones by the mask's
    fingerprint. The metrics are those of `evaluation.numbers.evaluate`, with its intervals over names, which are few.
    Under a mask that leaves no answer a number, the inlier ratio is 0 and all else null; where the unpruned model gives
    none, all is null. Raises ExciseError for answers of several scenarios or variations.
    """
    if unpruned.select("scenario", "variation").unique().height != 1:
        raise ExciseError("side effects: the unpruned answers are not of one variation of one scenario; give one alone")
    if not pruned:
        return pl.DataFrame(schema=EFFECT_SCHEMA)
    nothing = pl.lit(None, pl.String)
    under_masks = pl.concat(
        [
            frame.with_columns(
                strategy=pl.lit(mask), level=pl.lit("mask"), matched_to=nothing, draw=pl.lit(0, pl.Int64)
            )
            for mask, frame in pruned.items()
        ]
    )
    draws = Draws(resamples, permutations=1, seed=seed)
    rows = compared_numbers(unpruned, under_masks, pl.DataFrame(), scenario, draws)
    here = pl.col("variation").eq(unpruned["variation"][0]) & pl.col("metric").is_in(SCENARIO_METRICS)
    return (
        rows.filter(here & pl.col("strategy").is_in(list(pruned)))
        .with_columns(mask="strategy", target=pl.lit(target_name(unpruned)))
        .select(*EFFECT_SCHEMA)
    )


def of_masks(effects: pl.DataFrame, masks: pl.DataFrame) -> pl.DataFrame:
    """Rows of SIDE_EFFECTS_SCHEMA: every mask's effects, for each place of that mask.

    effects: rows of EFFECT_SCHEMA. masks: model, scenario, variation, strategy, level, matched_to and mask, one row per
    place; masks that are equal were measured once and have a row each.
    """
    return masks.join(effects, on="mask", maintain_order="left_right").select(*SIDE_EFFECTS_SCHEMA)


def text_rows(mask: str, found: Mapping[str, Figures], windows: int) -> pl.DataFrame:
    """What `text_effect` found of a mask as rows of EFFECT_SCHEMA; `names` counts windows."""
    rows = [(mask, TEXT, metric, *figures, windows) for metric, figures in found.items()]
    return pl.DataFrame(rows, schema=EFFECT_SCHEMA, orient="row")


def nothing_asked(masks: Sequence[str]) -> pl.DataFrame:
    """Rows of EFFECT_SCHEMA which say that masks, by fingerprint, were tried on no other scenario, and on purpose."""
    rows = [(mask, NO_TARGET, CHANGE, None, None, None, 0) for mask in masks]
    return pl.DataFrame(rows, schema=EFFECT_SCHEMA, orient="row")
