"""`gap_gradient`: which weights would bring the answers nearer to those without the gap, and at what cost?

A strategy of this project, not of the papers. With the unedited model's answers and the gap-free ones of
`excise.attribution.gap_free`, the gradient of the divergence between them follows from the score function: dL/dW =
sum_n a_n d log p(answer_n)/dW, a_n an answer's own probability less its gap-free one. Zeroing a weight is predicted to
lower it by W dL/dW, and to change the answers' distribution by a divergence of 1/2 W^2 F, F the diagonal Fisher
information. Here each matrix' best weights are kept as candidates; which of them become a mask is
`excise.strategies.measured_path`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from excise.attribution import files
from excise.attribution.answered import Answered
from excise.attribution.gradients import (
    Block,
    Calls,
    block_by_block,
    blocks,
    gradient_of_calls,
    kept_shape,
    output_gradients,
    recorded,
)
from excise.attribution.score import Decisive, Score, Tensors
from excise.files.parts import Work
from excise.models.topology import ROLES, Linear

if TYPE_CHECKING:
    import torch

    from excise.generation.sampling import SamplingParameters
    from excise.generation.tree import AnswerTree, PackedTrees
    from excise.models.loading import LoadedModel

BATCH = 4
"""Prompts of a pass."""
KEEP = 0.01
"""Share of each matrix kept as candidates: far above the densities at which a model survives."""
MEDIAN_SAMPLE = 1 << 20
"""Weights whose divergence is looked at to tell the median of all."""


@dataclass(frozen=True)
class Candidates:
    """The best weights of a matrix: flat index int64 [n], predicted fall of the divergence from the gap-free answers
    and divergence that zeroing one costs, float32 [n]."""

    index: np.ndarray
    drop: np.ndarray
    harm: np.ndarray


@dataclass(frozen=True)
class GapGradient:
    """Candidates per matrix, and the median divergence of a weight. shapes: (out, in) of every scored matrix."""

    damping: float
    candidates: dict[str, Candidates]
    shapes: dict[str, tuple[int, int]]


def gap_gradient(
    loaded: LoadedModel,
    trunk: Sequence[int],
    trees: Sequence[AnswerTree],
    parameters: SamplingParameters,
    *,
    keep: float,
    seed: int,
    work: Work | None = None,
) -> GapGradient:
    """Score every weight.

    trees: one per prompt; their weightings are (a_n, share of the prompt's answers), so edges carry sums of a_n and the
    probability with which an answer takes them. keep: share of each matrix to keep as candidates, best first.
    Fisher: each batch of prompts gets a random sign per edge of its answer trees; the square of the signed gradient,
    summed over batches, estimates the mean squared gradient of log p per answer. Smaller batches estimate it better.
    The trees pass through the model once per block of layers.
    """
    work = work or Work("gap gradient")
    passes = _Passes(loaded, tuple(trunk), trees, parameters, seed, work.batch or BATCH)
    layer_blocks = blocks(loaded, ROLES, 2, work.layers_at_once)
    linears = [linear for block in layer_blocks for linear in block]
    sampled = _sampled_places(linears, seed)
    damping = math.nan

    def best_of(block: Block) -> dict[str, np.ndarray]:
        # The first block's passes go back through all layers, so they tell the median of all.
        first = block.linears is layer_blocks[0]
        sums = _sums(passes, block, sampled if first else {})
        median = _median_harm(loaded, linears, sampled, sums, len(trees)) if first else damping
        arrays = {"damping": np.array(median)}
        for linear in block.linears:
            arrays |= _best(loaded, linear, sums, len(trees), keep, median)
        return arrays

    candidates: dict[str, Candidates] = {}
    for block, arrays in block_by_block(layer_blocks, len(trees), best_of, work):
        damping = arrays["damping"].item()
        for linear in block:
            candidates[linear.key] = Candidates(*(arrays[f"{linear.key}/{name}"] for name in ("index", "drop", "harm")))
    return GapGradient(damping, candidates, {linear.key: linear.shape for linear in linears})


@dataclass(frozen=True)
class _Passes:
    """Answer trees that pass through a model, `batch` at a time, with random signs on their edges."""

    loaded: LoadedModel
    trunk: tuple[int, ...]
    trees: Sequence[AnswerTree]
    parameters: SamplingParameters
    seed: int
    batch: int

    def after(self, done: int) -> Iterator[tuple[int, PackedTrees, torch.Tensor]]:
        """(trees done with it, the batch, its signs) of each batch behind the first `done` trees."""
        import torch

        from excise.generation.tree import pack

        signs = np.random.default_rng(self.seed)
        for start in range(0, len(self.trees), self.batch):
            packed = pack(self.trees[start : start + self.batch], len(self.trunk))
            sign = torch.from_numpy(signs.choice((-1.0, 1.0), size=len(packed.edge_visits)))
            if start >= done:
                yield min(start + self.batch, len(self.trees)), packed, sign


def _sums(passes: _Passes, block: Block, looked_at: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over batches, float32, by name: "gradient/M" and "fisher/M" of every module M of a block in its parameter's
    layout; and "sampled/K" [n], the Fisher information of the weights of any matrix K at the places `looked_at`, flat
    indices of its logical shape.
    """
    import torch

    loaded = passes.loaded
    keys = {linear.key for linear in block.linears}
    by_module: dict[str, list[Linear]] = {}
    for linear in loaded.topology.linears:
        if linear.key in keys or linear.key in looked_at:
            by_module.setdefault(linear.module, []).append(linear)
    done, state = block.parts.begun(block.name)
    sums = {name: torch.from_numpy(array) for name, array in state.items()}
    for linear in block.linears:
        for kind in ("gradient", "fisher"):
            name = f"{kind}/{linear.module}"
            if name not in sums:
                sums[name] = torch.zeros(kept_shape(loaded, linear.module))
            sums[name] = sums[name].to(linear.device(loaded.model))
    for key, places in looked_at.items():
        sums.setdefault(f"sampled/{key}", torch.zeros(len(places)))
    block.report(done)
    with recorded(loaded, by_module) as calls:
        of_block = {linear.module: calls[linear.module] for linear in block.linears}
        for stop, packed, sign in passes.after(done):
            with torch.inference_mode(False), torch.enable_grad():
                score = _edge_scores(loaded, passes.trunk, packed, passes.parameters)
                visits = packed.edge_visits.float().to(score.device)
                # Score vectors of different draws are uncorrelated at an edge, so signs per edge with the square root
                # of its frequency have the same expected square as signs per answer.
                signed = (score * sign.float().to(score.device) * visits[:, 1].clamp(min=0).sqrt()).sum()
                _add("fisher", by_module, looked_at, calls, output_gradients(signed, calls, again=True), sums)
                deltas = output_gradients((score * visits[:, 0]).sum(), of_block)
                _add("gradient", by_module, looked_at, calls, deltas, sums)
            for module_calls in calls.values():
                module_calls.clear()
            block.parts.keep(block.name, stop, sums)
            block.report(stop)
    return sums


def _add(
    kind: str,
    by_module: Mapping[str, Sequence[Linear]],
    looked_at: Mapping[str, torch.Tensor],
    calls: Calls,
    deltas: dict[str, list[torch.Tensor]],
    sums: dict[str, torch.Tensor],
) -> None:
    """Add a batch to `_sums`: its gradient, or the square of that as Fisher information."""
    import torch

    with torch.no_grad():
        for module in list(deltas):
            linears = by_module[module]
            piece = gradient_of_calls(linears[0], calls[module], deltas.pop(module))
            if kind == "fisher":
                piece.square_()
                for linear in linears:
                    if linear.key in looked_at:
                        places = looked_at[linear.key].to(piece.device)
                        sums[f"sampled/{linear.key}"] += linear.of(piece).reshape(-1)[places].cpu()
            if f"{kind}/{module}" in sums:
                sums[f"{kind}/{module}"] += piece


def _sampled_places(linears: Sequence[Linear], seed: int) -> dict[str, torch.Tensor]:
    """Flat indices of random weights, about `MEDIAN_SAMPLE` in all, of each matrix as many as its size deserves."""
    import torch

    draw = np.random.default_rng(seed)
    total = sum(math.prod(linear.shape) for linear in linears)
    places = {}
    for linear in linears:
        size = math.prod(linear.shape)
        places[linear.key] = torch.from_numpy(draw.integers(size, size=max(1, round(MEDIAN_SAMPLE * size / total))))
    return places


def _median_harm(
    loaded: LoadedModel,
    linears: Sequence[Linear],
    sampled: Mapping[str, torch.Tensor],
    sums: dict[str, torch.Tensor],
    sequences: int,
) -> float:
    harms = []
    for linear in linears:
        weight = linear.weight(loaded.model).detach().reshape(-1)
        sample = weight[sampled[linear.key].to(weight.device)].float().cpu()
        harms.append((0.5 * sample.square() * sums.pop(f"sampled/{linear.key}") / sequences).numpy())
    return float(np.median(np.concatenate(harms)))


def _edge_scores(
    loaded: LoadedModel, trunk: Sequence[int], packed: PackedTrees, parameters: SamplingParameters
) -> torch.Tensor:
    """log p of each edge's token under the sampling distribution, whose truncated set is held fixed, [E]."""
    import torch

    from excise.generation.tree import Rows, logits_of

    hidden = Rows(loaded, trunk).copy(len(packed.tokens)).forward(packed.tokens, packed.positions, packed.attends)
    position, edge = torch.unique(packed.edges[:, :2].T, dim=1, return_inverse=True)
    position, edge, token = (indices.to(loaded.device) for indices in (position, edge, packed.edges[:, 2]))
    scores = logits_of(loaded, hidden[position[0], position[1]]) / (parameters.temperature or 1.0)
    allowed = truncated_set(scores.detach(), parameters)
    allowed[edge, token] = True
    return torch.log_softmax(scores.masked_fill(~allowed, -torch.inf), dim=1)[edge, token]


def truncated_set(scores: torch.Tensor, parameters: SamplingParameters) -> torch.Tensor:
    """Which tokens top-k and top-p leave, bool like scores [rows, vocabulary]; at temperature 0 the likeliest one."""
    import torch

    if not parameters.temperature:
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argmax(dim=1, keepdim=True), True)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if parameters.top_k and parameters.top_k < scores.shape[1]:
        allowed = scores >= scores.topk(parameters.top_k, dim=1).values[:, -1:]
    if parameters.top_p < 1:
        ordered, order = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=1).sort(dim=1, descending=True)
        inside = ordered.cumsum(dim=1) - ordered < parameters.top_p
        allowed &= torch.zeros_like(allowed).scatter(1, order, inside)
    return allowed


def _best(
    loaded: LoadedModel, linear: Linear, sums: dict[str, torch.Tensor], sequences: int, keep: float, damping: float
) -> dict[str, np.ndarray]:
    """The candidates of a matrix under "K/index", "K/drop" and "K/harm"."""
    weight = linear.weight(loaded.model).detach().float().cpu().reshape(linear.shape)
    gradient, fisher = (
        linear.of(sums[f"{name}/{linear.module}"]).cpu().reshape(linear.shape) for name in ("gradient", "fisher")
    )
    drop = (weight * gradient).flatten().numpy()
    harm = (0.5 * weight.square() * fisher / sequences).flatten().numpy()
    # Where nothing is harmed and no divergence is usual, any drop is free, and none is worth nothing.
    free = np.where(drop > 0, np.inf, 0.0).astype(drop.dtype)
    score = np.divide(drop, harm + damping, out=free, where=harm + damping > 0)
    count = min(max(1, int(keep * score.size)), int((score > 0).sum()))
    index = np.sort(np.argpartition(score, -count)[-count:]) if count else np.zeros(0, dtype=np.int64)
    best = {"index": index.astype(np.int64), "drop": drop[index], "harm": harm[index]}
    return {f"{linear.key}/{name}": array for name, array in best.items()}


def read_candidates(path: Path) -> GapGradient:
    """The candidates of a `gap_gradient` file."""
    tensors, metadata = files.load(path)
    shapes = {key: (int(out), int(into)) for key, (out, into) in json.loads(metadata["shapes"]).items()}
    candidates = {key: Candidates(*(tensors[f"{key}/{part}"] for part in ("index", "drop", "harm"))) for key in shapes}
    return GapGradient(float(metadata["damping"]), candidates, shapes)


def _decided_by(answered: Answered) -> Decisive:
    outcome, parameters = answered.outcome, json.loads(answered.completions["parameters"][0])
    settings = [
        outcome.log_scale,
        answered.seed,
        KEEP,
        *(parameters[name] for name in ("temperature", "top_k", "top_p")),
    ]
    return Decisive(answered.completions, ["token_ids", "finished", "value"], settings)


def _measure(answered: Answered, work: Work) -> Tensors:
    from excise.attribution.gap_free import ask
    from excise.generation.sampling import SamplingParameters

    asked = ask(answered, place=answered.completions["variation"][0], significance=1.0)
    trees = [
        replace(
            name.tree,
            edge_visits=np.stack([weighting @ name.paths for weighting in (name.own - name.target, name.own)], 1),
        )
        for name in asked.names
    ]
    parameters = SamplingParameters(**json.loads(answered.completions["parameters"][0]))
    measured = gap_gradient(answered.loaded, asked.trunk, trees, parameters, keep=KEEP, seed=answered.seed, work=work)
    tensors: dict[str, np.ndarray] = {}
    for key, best in measured.candidates.items():
        tensors |= {f"{key}/index": best.index, f"{key}/drop": best.drop, f"{key}/harm": best.harm}
    return Tensors(tensors, {"damping": repr(float(measured.damping)), "shapes": json.dumps(measured.shapes)})


SCORE = Score(
    "gap_gradient",
    selection="measured_path",
    ablations=("zero_weights", "zero_output"),
    parameters=(frozenset({"density"}),),
    optional=("significance", "lost"),
    densest=KEEP,
    of_values=True,
    version="5",
    decided_by=_decided_by,
    measure=_measure,
    candidates=read_candidates,
)
