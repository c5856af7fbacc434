"""Answers without the gap, and how far a model is from giving them: the objective that a measured path descends.

A variation's *gap-free answers* weigh every name's own answers by the square root of how much more often the other
group gives each than its own group does. Both groups then answer, on average, with the geometric mean of their
distributions: of all distributions it has the least mean divergence from the two, and where both are tilts of one
distribution, as groups are whose answers were moved apart, it is that distribution. Where answers are too long to be
enumerated, a name's samples are tilted instead, so that both groups' means meet halfway. The loss is the divergence of
what the model answers from these: it falls while the gap closes, and rises when answers collapse, spread out, drift or
overshoot, whatever the gap does. Descending it is `excise.strategies.measured_path`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import polars as pl
import torch

from excise.attribution.gap_gradient import truncated_set
from excise.errors import ExciseError
from excise.evaluation import permutation
from excise.evaluation.distributions import tilted
from excise.generation.answering import Answering
from excise.generation.settings import Enumeration
from excise.generation.tree import AnswerTree, PackedTrees, Rows, answer_tree, common_prefix, logits_of, pack
from excise.models.encoding import encode
from excise.models.loading import LoadedModel

if TYPE_CHECKING:
    from excise.generation.completions import CompletionCache
    from excise.generation.sampling import SamplingParameters
    from excise.outcomes import Outcome
    from excise.scenarios import Comparison

RAREST = 2e-3
"""Enumerated answers rarer than this over a variation's names are not listed."""
PERMUTATIONS = 1999
"""Relabellings of the names that tell whether a variation has a gap."""
ROWS = 12
"""Names in one pass."""
GAP_WEIGHT = 8.0
"""How much more than the divergence's own share the distance of the groups' means from the targets' counts."""
FOREIGN = 0.1
"""A node that the targets pass so much more than the answers themselves belongs to other names' answers."""
MOST_TILT = 5.0
"""A name's samples are tilted this far at most, per standard deviation of the outcome."""
_NEVER = -1e4
_RARE = 1e-30
_LEAST = 1e-6  # float32 tells no smaller share of the tokens that are not listed

Answer = tuple[tuple[int, ...], int | None]
"""Tokens without the stop token, and that; None where the answer was cut off."""


@dataclass(frozen=True)
class Name:
    """One name's listed answers: their tree, which edges each takes (`paths`, float32 [answers, edges]), their outcomes
    (float64 [answers], logarithms where the scenario's scale is; NaN: no number), the shares that the unedited model
    gives them (`own`) and would without the gap (`target`), with sum 1, and the share of other tokens at every column
    (`unlisted`); all before the sampling distribution is cut to its likeliest tokens. `drawn`: the shares that its
    answers are drawn with, and `listed` the probability of all of them together. `edges`, `logs`, `cut`: log p of
    the unedited model, of edges and of answers before the cut, of answers behind it, float64; `sampled`: whether the
    answers are samples. `aim`: what the mean outcome should be."""

    tree: AnswerTree
    paths: np.ndarray
    outcomes: np.ndarray
    own: np.ndarray
    target: np.ndarray
    unlisted: np.ndarray
    drawn: np.ndarray
    edges: np.ndarray
    logs: np.ndarray
    cut: np.ndarray
    sampled: bool
    listed: float = 1.0
    aim: float = 0.0

    def shares(self, logs: np.ndarray) -> np.ndarray:
        """Shares of the answers that have log p `logs` now, as `own`. Samples are weighed by the ratio to before."""
        return _softmax(np.log(np.maximum(self.own, _RARE)) + logs - self.logs if self.sampled else logs)

    def drawn_shares(self, cut: np.ndarray) -> np.ndarray:
        """The same behind the cut, as `drawn`."""
        return _softmax(np.log(np.maximum(self.drawn, _RARE)) + cut - self.cut if self.sampled else cut)


@dataclass(frozen=True)
class Asked:
    """One variation, `place`, as some names were asked about it.

    majority: bool [names]. parameters: those the answers are drawn with. gap: the majority's mean outcome less the
    minority's, of names' means; p_value: of no gap, with the names relabelled. deviation: standard deviation of the
    outcome within groups. closing: whether the targets close the gap; else they are the answers there are.
    """

    place: str
    trunk: tuple[int, ...]
    names: tuple[Name, ...]
    majority: np.ndarray
    parameters: SamplingParameters
    gap: float = 0.0
    p_value: float = 1.0
    deviation: float = 0.0
    closing: bool = False

    def batches(self, rows: int, order: np.random.Generator | None = None) -> list[np.ndarray]:
        """Numbers of the names in batches of at most `rows`, both groups spread evenly over them; in the order there
        is, or a random one."""
        sides = [np.flatnonzero(self.majority), np.flatnonzero(~self.majority)]
        if order is not None:
            sides = [order.permutation(side) for side in sides]
        place = np.concatenate([(np.arange(len(side)) + 0.5) / len(side) for side in sides])
        numbers = np.concatenate(sides)[np.argsort(place, kind="stable")]
        return np.array_split(numbers, math.ceil(len(numbers) / rows))


@dataclass(frozen=True)
class Measured:
    """What a variation's names answer now, beside the unedited model's answers.

    divergence: of the answers from the targets, mean over names, nats. gap: as `Asked.gap`. spread, commonest, excess:
    spread_ratio, commonest_rise and excess_change as `excise.evaluation.numbers` tells them, of the outcome on its own
    scale: damage beyond what closing the gap takes. outside: fall of the listed answers' share.
    """

    divergence: float
    gap: float
    spread: float
    commonest: float
    excess: float
    outside: float

    FIELDS: ClassVar = ("divergence", "gap", "spread", "commonest", "excess", "outside")


# --- what was asked ---------------------------------------------------------------------------------------------------


def ask(
    loaded: LoadedModel,
    prompts: pl.DataFrame,
    completions: pl.DataFrame,
    *,
    place: str,
    comparison: Comparison,
    outcome: Outcome,
    significance: float,
    seed: int,
    cache: CompletionCache | None = None,
) -> Asked:
    """One variation's names, answers and gap-free targets under the unedited model.

    prompts, completions: rows of the variation; groups that are not compared are left aside. Numbers are enumerated,
    whether the completions were or not, so that both lead to the same masks; where the model rambles, and of other
    outcomes, the answers are the samples. significance: where the p-value of no gap is above it, the answers stay as
    they are. Raises ExciseError where a group has no answer with a value.
    """
    groups = (comparison.majority, comparison.minority)
    rows = completions.filter(pl.col("group").is_in(groups))
    some = prompts.filter(pl.col("prompt_id").is_in(rows["prompt_id"].unique().to_list())).sort("prompt_id")
    loaded, answering = loaded.asked_for(outcome), Answering.of(rows)
    if outcome.enumerable:
        stored = rows.select("token_ids", "finished", "value").drop_nulls("value").unique(["token_ids", "finished"])
        rows, _ = replace(answering, exact=Enumeration()).answers(loaded, some, outcome=outcome, cache=cache)
        # What an answer is worth was told when it was drawn.
        rows = rows.join(stored, on=["token_ids", "finished"], how="left", suffix="_stored", maintain_order="left")
        rows = rows.with_columns(value=pl.coalesce("value_stored", "value"))
        enumerated = rows["leftover"].null_count() == 0
    else:
        rows, enumerated = rows.with_columns(probability=1.0 / pl.len().over("prompt_id")), False
    logarithms = outcome.log_scale
    by_name = _listed(rows, [str(each) for each in some["prompt_id"]], logarithms, enumerated)
    encoded = encode(loaded, some)
    # Names that begin alike must not have their first tokens in the trunk.
    length = min(common_prefix([prompt.tokens for prompt in encoded]), *(prompt.name[0] for prompt in encoded))
    names = []
    for prompt, (answers, outcomes, share) in zip(encoded, by_name, strict=True):
        tree = answer_tree(prompt.tokens[length:], answers, np.ones((len(answers), 1)))
        paths = _paths(tree, len(prompt.tokens) - length, answers)
        unlisted = np.zeros(len(tree.tokens), dtype=np.float32)
        nothing = np.zeros(len(tree.edges)), *np.zeros((2, len(answers)))
        names.append(Name(tree, paths, outcomes, share, share, unlisted, share, *nothing, not enumerated))
    majority = np.array([group == comparison.majority for group in some["group"]])
    asked = Asked(place, tuple(encoded[0].tokens[:length]), tuple(names), majority, answering.parameters)
    return _with_targets(loaded, asked, enumerated, significance, seed)


def _listed(
    rows: pl.DataFrame, prompt_ids: Sequence[str], logarithms: bool, enumerated: bool
) -> list[tuple[list[Answer], np.ndarray, np.ndarray]]:
    """Answers, outcomes and shares of each prompt; of enumerated ones, all that any name gives."""
    by_prompt: dict[str, dict[Answer, float]] = {prompt_id: {} for prompt_id in prompt_ids}
    outcome: dict[tuple[str, Answer], float] = {}
    columns = rows.select("prompt_id", "token_ids", "finished", "probability", "value")
    for prompt_id, ids, finished, probability, value in columns.iter_rows():
        answer = (tuple(ids[:-1]), ids[-1]) if finished else (tuple(ids), None)
        # A continuation may be worth something else behind another prompt; a number is the same everywhere.
        outcome["" if enumerated else prompt_id, answer] = math.nan if value is None else value
        own = by_prompt[prompt_id]
        own[answer] = own.get(answer, 0.0) + probability
    if enumerated:
        total: dict[Answer, float] = {}
        for own in by_prompt.values():
            for answer, probability in own.items():
                total[answer] = total.get(answer, 0.0) + probability
        known = [answer for answer, mass in total.items() if mass >= RAREST * sum(total.values())]
        by_prompt = {key: {answer: own.get(answer, 0.0) for answer in known} for key, own in by_prompt.items()}
    found = []
    for prompt_id, own in by_prompt.items():
        values = np.array([outcome["" if enumerated else prompt_id, answer] for answer in own], dtype=np.float64)
        if logarithms:
            values = np.log(np.where(values > 0, values, math.nan))
        shares = np.array(list(own.values()))
        found.append((list(own), values, shares / shares.sum()))
    return found


def _paths(tree: AnswerTree, prompt: int, answers: Sequence[Answer]) -> np.ndarray:
    """Which edges each answer takes, float32 [answers, edges]. prompt: columns of the prompt."""
    number = {tuple(edge): index for index, edge in enumerate(tree.edges.tolist())}
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    below = {(parents[column], tokens[column]): column for column in range(prompt, len(tokens))}
    paths = np.zeros((len(answers), len(number)), dtype=np.float32)
    for row, (own, stop) in enumerate(answers):
        column = prompt - 1
        for token in [*own, *([] if stop is None else [stop])]:
            paths[row, number[column, token]] = 1
            column = below.get((column, token), -1)
    return paths


def _with_targets(loaded: LoadedModel, asked: Asked, enumerated: bool, significance: float, seed: int) -> Asked:
    """With the unedited model's own shares in the place of those that were drawn, and targets of these."""
    names = list(asked.names)
    for number, edges, drawn, unlisted in _edges(loaded, asked):
        name = names[number]
        logs, cut = name.paths @ edges, name.paths @ drawn
        name = replace(name, edges=edges, logs=logs, cut=cut, unlisted=unlisted, listed=float(np.exp(cut).sum()))
        # Samples stand for answers that nobody listed, so theirs stay the shares they had.
        if enumerated:
            name = replace(name, own=_softmax(logs), drawn=_softmax(cut))
        names[number] = replace(name, target=name.own, aim=_mean(name.own, name.outcomes))
    means = np.array([_mean(name.drawn, name.outcomes) for name in names])
    sides = [means[side & np.isfinite(means)] for side in (asked.majority, ~asked.majority)]
    if not all(map(len, sides)):
        raise ExciseError(f"{asked.place}: no answer of one of the groups has a value to tell a gap by; leave it out")
    gap = float(sides[0].mean() - sides[1].mean())
    p_value = _p_value(sides, seed)
    found = replace(asked, names=tuple(names), gap=gap, p_value=p_value, closing=p_value <= significance and gap != 0)
    found = replace(found, deviation=_deviation(found, [name.drawn for name in names]))
    return _aimed(replace(found, names=tuple(_targets(found, enumerated)))) if found.closing else found


def _aimed(asked: Asked) -> Asked:
    """With what every name's mean outcome should be: that of its target, less what is left of a gap between these."""
    means = np.array([_mean(name.target, name.outcomes) for name in asked.names])
    middle = np.nanmean([np.nanmean(means[asked.majority]), np.nanmean(means[~asked.majority])])
    for side in (asked.majority, ~asked.majority):
        means[side] += middle - np.nanmean(means[side])
    return replace(asked, names=tuple(replace(name, aim=aim) for name, aim in zip(asked.names, means, strict=True)))


def _targets(asked: Asked, enumerated: bool) -> list[Name]:
    if enumerated:
        of_group = {
            side: np.mean([name.own for name, own in zip(asked.names, asked.majority, strict=True) if own == side], 0)
            for side in (True, False)
        }
        weight = {
            side: np.sqrt(np.maximum(of_group[not side], _LEAST) / np.maximum(of_group[side], _LEAST))
            for side in (True, False)
        }
        targets = [name.own * weight[bool(side)] for name, side in zip(asked.names, asked.majority, strict=True)]
        return [replace(name, target=target / target.sum()) for name, target in zip(asked.names, targets, strict=True)]
    found = []
    for name, side in zip(asked.names, asked.majority, strict=True):
        known, target = np.isfinite(name.outcomes), name.own.copy()
        mass = target[known].sum()
        if mass > 0 and asked.deviation > 0:
            shift = asked.gap / 2 * (-1 if side else 1)
            most = MOST_TILT / asked.deviation
            target[known] = mass * tilted(name.outcomes[known], target[known] / mass, shift, most)
        found.append(replace(name, target=target))
    return found


def _p_value(sides: Sequence[np.ndarray], seed: int) -> float:
    labels = permutation.permuted_groups(*map(len, sides), PERMUTATIONS, [seed, 0])
    means = np.concatenate(sides)
    first = labels @ means / len(sides[0])
    second = (means.sum() - labels @ means) / len(sides[1])
    return permutation.permutation_p_value(sides[0].mean() - sides[1].mean(), first - second)


# --- the loss ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Some names of a variation, packed for a pass, and the tensors that the loss needs.

    place: int [2, nodes], row and column of every node whose next tokens count. node, token: int [edges]. reach:
    [nodes], the targets' mass that passes. wanted: [edges], the targets' share of the token at its node. unlisted:
    [nodes]. taken: [edges], the unedited model's mass that takes the edge.
    """

    asked: Asked
    numbers: np.ndarray
    packed: PackedTrees
    place: torch.Tensor
    node: torch.Tensor
    token: torch.Tensor
    reach: torch.Tensor
    wanted: torch.Tensor
    unlisted: torch.Tensor
    taken: torch.Tensor

    @property
    def sizes(self) -> list[int]:
        """Edges of each name."""
        return [len(self.asked.names[number].tree.edges) for number in self.numbers]


def batch_of(asked: Asked, numbers: np.ndarray, device: torch.device) -> Batch:
    """The names of these numbers as one batch."""
    names = [asked.names[number] for number in numbers]
    packed = pack([name.tree for name in names], len(asked.trunk))
    place, node = torch.unique(packed.edges[:, :2].T, dim=1, return_inverse=True)
    passing, taken = (
        torch.from_numpy(np.concatenate([each(name) @ name.paths for name in names])).float()
        for each in (lambda name: name.target, lambda name: name.own)
    )
    unlisted = np.array([names[row].unlisted[column] for row, column in place.T.tolist()], dtype=np.float32)
    # Where hardly an answer of its own passes, a node's share of other tokens says nothing: no more than usual there.
    reach, mass = (torch.zeros(place.shape[1]).index_add(0, node, each) for each in (passing, taken))
    other = torch.from_numpy(unlisted)
    usual = (other * mass).sum() / mass.sum().clamp(min=_LEAST)
    other = torch.where(mass < FOREIGN * reach, torch.minimum(other, usual), other).clamp(min=_LEAST)
    # The unedited model's own probability of a token, times what the targets make of the share that takes it.
    share, own = (each / total[node].clamp(min=_RARE) for each, total in ((passing, reach), (taken, mass)))
    likely = torch.from_numpy(np.concatenate([name.edges for name in names])).float().exp()
    wanted = share * torch.where(own > _LEAST, likely / own.clamp(min=_LEAST), 1.0)
    total = torch.zeros(place.shape[1]).index_add(0, node, wanted)
    wanted = wanted / total[node].clamp(min=_RARE) * (1 - other[node])
    moved = (each.to(device) for each in (place, node, packed.edges[:, 2], reach, wanted, other, taken))
    return Batch(asked, numbers, packed, *moved)


def loss(loaded: LoadedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the model is from the gap-free answers, summed over the batch's names, in nats; and log p of every edge's
    token, [edges].

    It is the divergence of the answers from the targets, node by node over the listed tokens and all others as one. A
    gap is a small part of that: a shift of both groups by half a gap costs 1/8 (gap / deviation)^2. So that it is not
    left behind, the difference of the groups' mean distances from their aims counts `GAP_WEIGHT` times more.
    """
    edges, others, _ = _log_probabilities(loaded, batch)
    inside = torch.zeros_like(batch.reach).index_add(
        0, batch.node, torch.special.xlogy(batch.wanted, batch.wanted) - batch.wanted * edges
    )
    outside = torch.special.xlogy(batch.unlisted, batch.unlisted) - batch.unlisted * others
    found = (batch.reach * (inside + outside)).sum()
    asked = batch.asked
    if asked.deviation > 0:
        away = torch.stack(
            [
                _mean_outcome(asked.names[number], own) - asked.names[number].aim
                for number, own in zip(batch.numbers, edges.split(batch.sizes), strict=True)
            ]
        )
        side = torch.from_numpy(asked.majority[batch.numbers]).to(edges.device)
        if side.any() and not side.all():
            gap = (away[side].nanmean() - away[~side].nanmean()) / asked.deviation
            found = found + GAP_WEIGHT * len(batch.numbers) / 8 * gap.square()
    return found, edges


def distance(asked: Asked, now: Measured) -> float:
    """The loss a name, of what is measured: divergence from the targets and, of a variation whose gap is to close,
    what is left of it; of another, how far it has moved."""
    away = now.gap - (0.0 if asked.closing else asked.gap)
    return now.divergence + (GAP_WEIGHT / 8 * (away / asked.deviation) ** 2 if asked.deviation > 0 else 0.0)


def _mean_outcome(name: Name, edges: torch.Tensor) -> torch.Tensor:
    """The mean outcome of a name's answers whose edges have these log probabilities; NaN without a number."""
    known = np.isfinite(name.outcomes)
    before = np.log(np.maximum(name.own, _RARE)) - name.logs if name.sampled else np.zeros(len(name.own))
    logs = torch.from_numpy(name.paths[known]).to(edges) @ edges + torch.from_numpy(before[known]).to(edges)
    return torch.softmax(logs, dim=0) @ torch.from_numpy(name.outcomes[known]).to(edges)


def _log_probabilities(
    loaded: LoadedModel, batch: Batch, cut: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """log p of every edge's token, [edges], and of all other tokens together at every node, [nodes]; with `cut` also
    log p of every edge's token among those that sampling draws from, -inf where it is not one."""
    packed, parameters = batch.packed, batch.asked.parameters
    rows = Rows(loaded, batch.asked.trunk).copy(len(packed.tokens))
    hidden = rows.forward(packed.tokens, packed.positions, packed.attends)
    scores = logits_of(loaded, hidden[batch.place[0], batch.place[1]]) / (parameters.temperature or 1.0)
    edges = torch.log_softmax(scores, dim=1)[batch.node, batch.token]
    listed = torch.zeros_like(batch.reach).index_add(0, batch.node, edges.exp())
    drawn = None
    if cut:
        allowed = truncated_set(scores, parameters)
        drawn = torch.log_softmax(scores.masked_fill(~allowed, -torch.inf), dim=1)[batch.node, batch.token]
    return edges, torch.log((1 - listed).clamp(min=_LEAST)), drawn


def _edges(loaded: LoadedModel, asked: Asked) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(number, log p of its edges and the same as they are drawn, float64 [edges], share of other tokens, float32
    [columns]) of every name."""
    with torch.inference_mode():
        for numbers in asked.batches(ROWS):
            batch = batch_of(asked, numbers, loaded.device)
            edges, others, drawn = (each.cpu().double().numpy() for each in _log_probabilities(loaded, batch, cut=True))
            ends = np.cumsum(batch.sizes)[:-1]
            row, column = batch.place.cpu().numpy()
            parts = zip(numbers, np.split(edges, ends), np.split(drawn, ends), strict=True)
            for position, (number, own, cut) in enumerate(parts):
                unlisted = np.zeros(len(asked.names[number].tree.tokens), dtype=np.float32)
                here = row == position
                unlisted[column[here]] = np.exp(others[here])
                # A path of no probability must stay one where it is multiplied with 0.
                yield int(number), own, np.maximum(cut, _NEVER), unlisted


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(loaded: LoadedModel, asked: Asked) -> Measured:
    """What the model answers now, from one pass over the listed answers; nothing is drawn."""
    before = [name.drawn for name in asked.names]
    now = list(before)
    divergence, outside = 0.0, 0.0
    for number, edges, drawn, _ in _edges(loaded, asked):
        name = asked.names[number]
        cut = name.paths @ drawn
        now[number] = name.drawn_shares(cut)
        outside += name.listed - float(np.exp(cut).sum())
        kept, shares = name.target > 0, name.shares(name.paths @ edges)
        divergence += float(name.target[kept] @ np.log(name.target[kept] / np.maximum(shares[kept], _RARE)))
    count = len(now)
    return measured(asked, before, now, divergence / count, outside / count)


def measured(
    asked: Asked, before: Sequence[np.ndarray], now: Sequence[np.ndarray], divergence: float, outside: float
) -> Measured:
    """`Measured` of shares of every name's listed answers, float64 [answers] each, before and now."""
    old, new = (_by_side(asked, shares) for shares in (before, now))
    gaps = [abs(_gap(asked, shares)) for shares in (before, now)]
    least = min((spread for side in old if (spread := _spread(*side)) > 0), default=0.0)
    ratios = [_ratio(_spread(*b), least) for a, b in zip(old, new, strict=True) if _spread(*a) > 0]
    moved = sum(_distance(a, b) for a, b in zip(old, new, strict=True))
    excess = _ratio(moved - max(0.0, gaps[0] - gaps[1]), 2 * asked.deviation)
    rise = _commonest(*new) - max(map(_commonest, old))
    spread = min(ratios, default=math.nan)
    return Measured(divergence, _gap(asked, now), spread, rise, excess, outside)


def _softmax(logs: np.ndarray) -> np.ndarray:
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _mean(shares: np.ndarray, outcomes: np.ndarray) -> float:
    """Mean outcome of the answers that are numbers; NaN without."""
    known = np.isfinite(outcomes)
    return _ratio(float(shares[known] @ outcomes[known]), float(shares[known].sum()))


def _gap(asked: Asked, shares: Sequence[np.ndarray]) -> float:
    means = np.array([_mean(own, name.outcomes) for own, name in zip(shares, asked.names, strict=True)])
    return float(np.nanmean(means[asked.majority]) - np.nanmean(means[~asked.majority]))


def _by_side(asked: Asked, shares: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Outcomes and shares, with sum 1, of each group's answers that are numbers: the majority's, the minority's."""
    found = []
    for side in (asked.majority, ~asked.majority):
        numbers = np.flatnonzero(side)
        outcomes = np.concatenate([asked.names[number].outcomes for number in numbers])
        mass = np.concatenate([shares[number] for number in numbers])
        known = np.isfinite(outcomes)
        found.append((outcomes[known], mass[known] / mass[known].sum()))
    return found


def _spread(outcomes: np.ndarray, shares: np.ndarray) -> float:
    return math.sqrt(max(0.0, float(shares @ (outcomes - shares @ outcomes) ** 2)))


def _deviation(asked: Asked, shares: Sequence[np.ndarray]) -> float:
    """Standard deviation of the outcome within groups."""
    return math.sqrt(np.mean([_spread(*side) ** 2 for side in _by_side(asked, shares)]))


def _commonest(*sides: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of the commonest outcome, of one group or of several together."""
    outcomes, mass = map(np.concatenate, zip(*sides, strict=True))
    _, place = np.unique(outcomes, return_inverse=True)
    return float(np.bincount(place, mass).max() / mass.sum())


def _distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """Earth mover's distance of two distributions."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(first[0], second[0], first[1], second[1]))
