"""How far a model is from giving answers without the gap: the loss that a measured path descends, and what is measured
on its way.

The loss is the divergence of what the model answers from the gap-free answers of `excise.attribution.gap_free`: it
falls while the gap closes, and rises when answers collapse, spread out, drift or overshoot, whatever the gap does.
Descending it is `excise.strategies.measured_path`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from excise.attribution.gap_gradient import truncated_set
from excise.generation.tree import AnswerTree, PackedTrees, Rows, logits_of, pack
from excise.models.loading import LoadedModel

if TYPE_CHECKING:
    from excise.generation.sampling import SamplingParameters

ROWS = 12
"""Names in one pass."""
GAP_WEIGHT = 8.0
"""How much more than the divergence's own share the distance of the groups' means from the targets' counts."""
FOREIGN = 0.1
"""A node that the targets pass so much more than the answers themselves belongs to other names' answers."""
LEAST = 1e-6
"""float32 tells no smaller share of the tokens that are not listed."""
_NEVER = -1e4
_RARE = 1e-30


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
        return softmax(np.log(np.maximum(self.own, _RARE)) + logs - self.logs if self.sampled else logs)

    def drawn_shares(self, cut: np.ndarray) -> np.ndarray:
        """The same behind the cut, as `drawn`."""
        return softmax(np.log(np.maximum(self.drawn, _RARE)) + cut - self.cut if self.sampled else cut)


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

    def gap_of(self, shares: Sequence[np.ndarray]) -> float:
        """The gap where the names' answers have these shares, float64 [answers] each."""
        means = np.array(
            [mean_of(name_shares, name.outcomes) for name_shares, name in zip(shares, self.names, strict=True)]
        )
        return float(np.nanmean(means[self.majority]) - np.nanmean(means[~self.majority]))

    def deviation_of(self, shares: Sequence[np.ndarray]) -> float:
        """The deviation where the names' answers have these shares."""
        return math.sqrt(np.mean([_spread(*side) ** 2 for side in self.by_side(shares)]))

    def by_side(self, shares: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Outcomes and shares, with sum 1, of each group's answers that are numbers: the majority's, the minority's."""
        sides = []
        for side in (self.majority, ~self.majority):
            numbers = np.flatnonzero(side).tolist()
            outcomes = np.concatenate([self.names[number].outcomes for number in numbers])
            mass = np.concatenate([shares[number] for number in numbers])
            known = np.isfinite(outcomes)
            sides.append((outcomes[known], mass[known] / mass[known].sum()))
        return sides

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
        torch.from_numpy(np.concatenate([weighting(name) @ name.paths for name in names])).float()
        for weighting in (lambda name: name.target, lambda name: name.own)
    )
    unlisted = np.array([names[row].unlisted[column] for row, column in place.T.tolist()], dtype=np.float32)
    # Where hardly an answer of its own passes, a node's share of other tokens says nothing: no more than usual there.
    reach, mass = (torch.zeros(place.shape[1]).index_add(0, node, passed) for passed in (passing, taken))
    other = torch.from_numpy(unlisted)
    usual = (other * mass).sum() / mass.sum().clamp(min=LEAST)
    other = torch.where(mass < FOREIGN * reach, torch.minimum(other, usual), other).clamp(min=LEAST)
    # The unedited model's own probability of a token, times what the targets make of the share that takes it.
    share, usual_share = (flow / total[node].clamp(min=_RARE) for flow, total in ((passing, reach), (taken, mass)))
    likely = torch.from_numpy(np.concatenate([name.edges for name in names])).float().exp()
    wanted = share * torch.where(usual_share > LEAST, likely / usual_share.clamp(min=LEAST), 1.0)
    total = torch.zeros(place.shape[1]).index_add(0, node, wanted)
    wanted = wanted / total[node].clamp(min=_RARE) * (1 - other[node])
    moved = (tensor.to(device) for tensor in (place, node, packed.edges[:, 2], reach, wanted, other, taken))
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
    total = (batch.reach * (inside + outside)).sum()
    asked = batch.asked
    if asked.deviation > 0:
        away = torch.stack(
            [
                _mean_outcome(asked.names[number], name_edges) - asked.names[number].aim
                for number, name_edges in zip(batch.numbers, edges.split(batch.sizes), strict=True)
            ]
        )
        side = torch.from_numpy(asked.majority[batch.numbers]).to(edges.device)
        if side.any() and not side.all():
            gap = (away[side].nanmean() - away[~side].nanmean()) / asked.deviation
            total = total + GAP_WEIGHT * len(batch.numbers) / 8 * gap.square()
    return total, edges


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p of every edge's token, [edges], and of all other tokens together at every node, [nodes]; with `cut` also
    log p of every edge's token among those that sampling draws from, -inf where it is not one, else the first again.
    """
    packed, parameters = batch.packed, batch.asked.parameters
    rows = Rows(loaded, batch.asked.trunk).copy(len(packed.tokens))
    hidden = rows.forward(packed.tokens, packed.positions, packed.attends)
    scores = logits_of(loaded, hidden[batch.place[0], batch.place[1]]) / (parameters.temperature or 1.0)
    edges = torch.log_softmax(scores, dim=1)[batch.node, batch.token]
    listed = torch.zeros_like(batch.reach).index_add(0, batch.node, edges.exp())
    drawn = edges
    if cut:
        allowed = truncated_set(scores, parameters)
        drawn = torch.log_softmax(scores.masked_fill(~allowed, -torch.inf), dim=1)[batch.node, batch.token]
    return edges, torch.log((1 - listed).clamp(min=LEAST)), drawn


def edge_logs(loaded: LoadedModel, asked: Asked) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(number, log p of its edges and the same as they are drawn, float64 [edges], share of other tokens, float32
    [columns]) of every name."""
    with torch.inference_mode():
        for numbers in asked.batches(ROWS):
            batch = batch_of(asked, numbers, loaded.device)
            edges, others, drawn = (
                tensor.cpu().double().numpy() for tensor in _log_probabilities(loaded, batch, cut=True)
            )
            ends = np.cumsum(batch.sizes)[:-1]
            row, column = batch.place.cpu().numpy()
            parts = zip(numbers, np.split(edges, ends), np.split(drawn, ends), strict=True)
            for position, (number, name_edges, cut) in enumerate(parts):
                unlisted = np.zeros(len(asked.names[number].tree.tokens), dtype=np.float32)
                here = row == position
                unlisted[column[here]] = np.exp(others[here])
                # A path of no probability must stay one where it is multiplied with 0.
                yield int(number), name_edges, np.maximum(cut, _NEVER), unlisted


def measure(loaded: LoadedModel, asked: Asked) -> Measured:
    """What the model answers now, from one pass over the listed answers; nothing is drawn."""
    before = [name.drawn for name in asked.names]
    now = list(before)
    divergence, outside = 0.0, 0.0
    for number, edges, drawn, _ in edge_logs(loaded, asked):
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
    old, new = (asked.by_side(shares) for shares in (before, now))
    gaps = [abs(asked.gap_of(shares)) for shares in (before, now)]
    least = min((spread for side in old if (spread := _spread(*side)) > 0), default=0.0)
    ratios = [_ratio(_spread(*b), least) for a, b in zip(old, new, strict=True) if _spread(*a) > 0]
    moved = sum(_distance(a, b) for a, b in zip(old, new, strict=True))
    excess = _ratio(moved - max(0.0, gaps[0] - gaps[1]), 2 * asked.deviation)
    rise = _commonest(*new) - max(map(_commonest, old))
    spread = min(ratios, default=math.nan)
    return Measured(divergence, asked.gap_of(now), spread, rise, excess, outside)


def softmax(logs: np.ndarray) -> np.ndarray:
    """Shares, with sum 1, of answers that have these log probabilities."""
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def mean_of(shares: np.ndarray, outcomes: np.ndarray) -> float:
    """Mean outcome of the answers that are numbers; NaN without."""
    known = np.isfinite(outcomes)
    return _ratio(float(shares[known] @ outcomes[known]), float(shares[known].sum()))


def _spread(outcomes: np.ndarray, shares: np.ndarray) -> float:
    return math.sqrt(max(0.0, float(shares @ (outcomes - shares @ outcomes) ** 2)))


def _commonest(*sides: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of the commonest outcome, of one group or of several together."""
    outcomes, mass = map(np.concatenate, zip(*sides, strict=True))
    _, place = np.unique(outcomes, return_inverse=True)
    return float(np.bincount(place, mass).max() / mass.sum())


def _distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """Earth mover's distance of two distributions."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(first[0], second[0], first[1], second[1]))
