"""`gap_gradient`: which weights produce the gap, and what would removing them cost?

A strategy of this project, not of the papers. With the answers already drawn, the gradient of the disparity follows
from the score function: dD/dW = sum_n a_n d log p(answer_n)/dW. Zeroing a weight is predicted to change the gap by
W dD/dW and the answers' distribution by a divergence of 1/2 W^2 F, with F the diagonal Fisher information. What ranks
high removes much gap for little divergence. Turning a ranking into a mask belongs to `excise.strategies`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from excise.models import Linear, LoadedModel
from excise.progress import Progress, silent
from excise.sampling import SamplingParameters
from excise.tree import AnswerTree, PackedTrees, Rows, logits_of, pack

MEDIAN_SAMPLE = 1 << 20


@dataclass(frozen=True)
class Candidates:
    """The best weights of a matrix: flat index int64 [n], predicted drop of the gap and divergence, float32 [n]."""

    index: np.ndarray
    drop: np.ndarray
    harm: np.ndarray


@dataclass(frozen=True)
class Heads:
    """For every head, removed at the input of the output projection: predicted drop and divergence, [layers, heads]."""

    drop: np.ndarray
    harm: np.ndarray


@dataclass(frozen=True)
class GapGradient:
    """Candidates per matrix, the measured disparity they refer to, and lambda, the median divergence of a weight.

    heads is None where the output projections are not among the roles. shapes: (out, in) of every scored matrix.
    spread: standard deviation of the outcome within groups, which makes disparities of several variations comparable.
    """

    disparity: float
    damping: float
    candidates: dict[str, Candidates]
    heads: Heads | None
    shapes: dict[str, tuple[int, int]]
    spread: float = 1.0


def advantages(outcomes: np.ndarray, groups: np.ndarray, majority: str, minority: str) -> tuple[np.ndarray, float]:
    """Weights a_n of the score function, and the disparity D = mean outcome of the majority less that of the minority.

    outcomes: float [N], NaN where the answer was not parsed (weight 0). groups: str [N]. a_n = +-(f_n - group mean) /
    group size, so that D's gradient is sum_n a_n d log p(answer_n); subtracting the mean leaves it unbiased and less
    noisy.
    """
    weights = np.zeros(len(outcomes))
    means = {}
    for group, sign in ((majority, 1.0), (minority, -1.0)):
        members = (groups == group) & ~np.isnan(outcomes)
        means[group] = float(outcomes[members].mean())
        weights[members] = sign * (outcomes[members] - means[group]) / members.sum()
    return weights, means[majority] - means[minority]


def gap_gradient(
    loaded: LoadedModel,
    trunk: Sequence[int],
    trees: Sequence[AnswerTree],
    disparity: float,
    parameters: SamplingParameters,
    *,
    roles: Sequence[str],
    keep: float,
    seed: int,
    batch: int = 4,
    progress: Progress = silent,
    label: str = "gap gradient",
) -> GapGradient:
    """Score every weight of the given roles.

    trees: one per prompt; their weightings are (advantage, share of the prompts' answers), so edges carry sums of a_n
    and the probability with which an answer drawn here takes them. disparity: D in the units of the outcome the
    advantages were made of. keep: share of each matrix to keep as candidates, best first.
    Fisher: each batch of prompts gets a random sign per edge of its answer trees; the square of the signed gradient,
    summed over batches, estimates the mean squared gradient of log p per answer. Smaller batches estimate it better.
    """
    linears = [linear for linear in loaded.topology.linears if linear.role in roles]
    gradient = {linear.key: torch.zeros(linear.shape) for linear in linears}
    fisher = {linear.key: torch.zeros(linear.shape) for linear in linears}
    signs = np.random.default_rng(seed)
    outputs = [linear for linear in linears if linear.role == "o"]
    head_fisher = torch.zeros(loaded.topology.layers, loaded.topology.heads)
    with _trainable(loaded, linears):
        for start in range(0, len(trees), batch):
            some = trees[start : start + batch]
            packed = pack(some, len(trunk))
            score = _edge_scores(loaded, trunk, packed, parameters)
            visits = packed.edge_visits.to(loaded.device).float()
            # Score vectors of different draws are uncorrelated at an edge, so signs per edge with the square root of
            # its frequency have the same expected square as signs per answer.
            sign = torch.from_numpy(signs.choice((-1.0, 1.0), size=len(visits))).to(loaded.device).float()
            for total, objective in (
                (fisher, (score * sign * visits[:, 1].clamp(min=0).sqrt()).sum()),
                (gradient, (score * visits[:, 0]).sum()),
            ):
                loaded.model.zero_grad(set_to_none=True)
                objective.backward(retain_graph=total is fisher)
                for linear in linears:
                    piece = (
                        linear.of(loaded.model.get_submodule(linear.module).weight.grad)
                        .float()
                        .cpu()
                        .reshape(linear.shape)
                    )
                    if total is fisher and linear.role == "o":
                        head_fisher[linear.layer] += _by_head(loaded, linear, piece).square()
                    total[linear.key] += piece if total is gradient else piece.square_()
            progress(label, min(start + batch, len(trees)), len(trees))
        loaded.model.zero_grad(set_to_none=True)
    heads = None
    if outputs:
        drop = torch.stack([_by_head(loaded, linear, gradient[linear.key]) for linear in outputs])
        heads = Heads((np.sign(disparity) * drop).numpy(), (0.5 * head_fisher / len(trees)).numpy())
    return _best(loaded, linears, gradient, fisher, disparity, len(trees), keep, seed, heads)


def _by_head(loaded: LoadedModel, linear: Linear, gradient: torch.Tensor) -> torch.Tensor:
    """W dD/dW of an output projection summed over each head's columns, [heads]."""
    weight = linear.weight(loaded.model).detach().float().cpu().reshape(linear.shape)
    return (weight * gradient).sum(dim=0).reshape(loaded.topology.heads, -1).sum(dim=1)


@contextmanager
def _trainable(loaded: LoadedModel, linears: Sequence[Linear]) -> Iterator[None]:
    parameters = {linear.module: loaded.model.get_submodule(linear.module).weight for linear in linears}.values()
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _edge_scores(
    loaded: LoadedModel, trunk: Sequence[int], packed: PackedTrees, parameters: SamplingParameters
) -> torch.Tensor:
    """log p of each edge's token under the sampling distribution, whose truncated set is held fixed, [E]."""
    hidden = Rows(loaded, trunk).copy(len(packed.tokens)).forward(packed.tokens, packed.positions, packed.attends)
    row, column, token = packed.edges.to(loaded.device).T
    position, edge = torch.unique(torch.stack([row, column]), dim=1, return_inverse=True)
    scores = logits_of(loaded, hidden[position[0], position[1]]) / (parameters.temperature or 1.0)
    allowed = _truncated_set(scores.detach(), parameters)
    allowed[edge, token] = True
    return torch.log_softmax(scores.masked_fill(~allowed, -torch.inf), dim=1)[edge, token]


def _truncated_set(scores: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """Which tokens top-k and top-p leave, bool like scores."""
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if parameters.top_k and parameters.top_k < scores.shape[1]:
        allowed = scores >= scores.topk(parameters.top_k, dim=1).values[:, -1:]
    if parameters.top_p < 1:
        ordered, order = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=1).sort(dim=1, descending=True)
        inside = ordered.cumsum(dim=1) - ordered < parameters.top_p
        allowed &= torch.zeros_like(allowed).scatter(1, order, inside)
    return allowed


def _best(
    loaded: LoadedModel, linears: Sequence[Linear], gradient: dict[str, torch.Tensor], fisher: dict[str, torch.Tensor],
    disparity: float, sequences: int, keep: float, seed: int, heads: Heads | None,
) -> GapGradient:  # fmt: skip
    drops, harms, sample = {}, {}, []
    draw = np.random.default_rng(seed)
    size = sum(tensor.numel() for tensor in gradient.values())
    for linear in linears:
        weight = linear.weight(loaded.model).detach().float().cpu().reshape(linear.shape)
        # Zeroing W changes D by -W dD/dW; a drop of |D| is what counts.
        drops[linear.key] = (np.sign(disparity) * weight * gradient.pop(linear.key)).flatten().numpy()
        harms[linear.key] = (0.5 * weight.square() * fisher.pop(linear.key) / sequences).flatten().numpy()
        count = max(1, round(MEDIAN_SAMPLE * linear.out_features * linear.in_features / size))
        sample.append(harms[linear.key][draw.integers(harms[linear.key].size, size=count)])
    damping = float(np.median(np.concatenate(sample)))
    candidates = {}
    for key, drop in drops.items():
        harm = harms[key]
        score = drop / (harm + damping)
        count = min(max(1, int(keep * score.size)), int((score > 0).sum()))
        index = np.sort(np.argpartition(score, -count)[-count:]) if count else np.zeros(0, dtype=np.int64)
        candidates[key] = Candidates(index.astype(np.int64), drop[index], harm[index])
    return GapGradient(abs(disparity), damping, candidates, heads, {linear.key: linear.shape for linear in linears})
