"""Scores of whole attention heads over a scenario, columns of the table `head_impacts` (FASP, sections 4 and 5).

`head_impacts` and `head_perplexity` read what removing a head does, which `excise.attribution.head_impacts` measures.
The baselines know nothing of bias (method, B5) and are computed here: how large a head's weights are, and how much the
language-model loss hangs on it (after Michel, Levy & Neubig 2019). Which heads are pruned is
`excise.strategies.selection`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.attribution.score import HeadRanking, head_score
from excise.errors import ExciseError
from excise.models.hooks import hooked
from excise.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from excise.evaluation.perplexity import Window
    from excise.models.loading import LoadedModel


def head_magnitude(loaded: LoadedModel) -> np.ndarray:
    """The size of each head's weights over that of the largest head, float64 [layers, heads] in [0, 1].

    The L2 norm of the head's rows of q, k and v and of its columns of o together, biases left out. Where query heads
    share keys and values, the shared rows count for each of them.
    """
    from excise.generation.tree import not_finite

    topology = loaded.topology
    size, shared = topology.head_dim, topology.heads // topology.kv_heads
    squares = np.zeros((topology.layers, topology.heads))
    for linear in topology.linears:
        if linear.role not in ("q", "k", "v", "o"):
            continue
        square = linear.weight(loaded.model).detach().float().square()
        entries = square.sum(dim=0) if linear.role == "o" else square.reshape(linear.shape).sum(dim=1)
        of_head = entries.cpu().double().reshape(-1, size).sum(dim=1).numpy()
        squares[linear.layer] += np.repeat(of_head, shared) if linear.role in ("k", "v") else of_head
    norms = np.sqrt(squares)
    if not np.isfinite(norms).all():
        raise not_finite(loaded, "weights")
    return norms / norms.max() if norms.max() > 0 else norms


def head_gradient(
    loaded: LoadedModel, windows: Sequence[Window], *, batch: int = 4, progress: Progress = silent
) -> np.ndarray:
    """How much the loss hangs on each head: sum over windows of |dL / d mask|, float64 [layers, heads].

    The mask multiplies the head's part of the output projection's input and is 1; L is the mean cross-entropy of the
    window's scored tokens. Each window has a gradient of its own: nothing cancels or adds up between windows. Every
    layer is divided by its L2 norm, so that its scores have length 1 (0 where no head of the layer matters). batch:
    windows of equal length that are read at once; it changes nothing but speed.

    Raises ExciseError without windows, and for a window whose scored tokens have nothing before them.
    """
    import torch

    from excise.evaluation.perplexity import require_windows
    from excise.generation.tree import not_finite

    if not windows:
        raise ExciseError("head_gradient: no windows; give at least one stretch of text")
    require_windows(loaded, windows)
    if batch < 1:
        raise ExciseError(f"head_gradient: batch is {batch}; it must be 1 at least")
    topology = loaded.topology
    totals = torch.zeros((topology.layers, topology.heads), dtype=torch.float64)
    order = sorted(range(len(windows)), key=lambda number: len(windows[number].tokens))
    done = 0
    for same_length in _batches([windows[number] for number in order], batch):
        with torch.inference_mode(False), torch.enable_grad():
            shape = (topology.layers, len(same_length), topology.heads)
            mask = torch.ones(shape, device=loaded.device, requires_grad=True)
            with _masked(loaded, mask):
                loss = _losses(loaded, same_length).sum()
            # A row's loss depends on its own mask alone, so this is every window's gradient.
            (gradient,) = torch.autograd.grad(loss, mask)
        totals += gradient.abs().sum(dim=1).cpu().double()
        done += len(same_length)
        progress("head gradient", done, len(windows))
    scores = totals.numpy()
    if not np.isfinite(scores).all():
        raise not_finite(loaded, "gradients")
    norms = np.sqrt((scores**2).sum(axis=1, keepdims=True))
    return np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)


def _batches(windows: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """Neighbours of equal length, `batch` at most."""
    same_length: list[Window] = []
    for window in windows:
        if same_length and (len(same_length) == batch or len(same_length[0].tokens) != len(window.tokens)):
            yield same_length
            same_length = []
        same_length.append(window)
    yield same_length


@contextmanager
def _masked(loaded: LoadedModel, mask: torch.Tensor) -> Iterator[None]:
    """Multiply each head's part of the output projections' inputs by mask [layers, rows, heads]."""
    topology = loaded.topology

    def multiply(layer: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            of_features = mask[layer].repeat_interleave(topology.head_dim, dim=1)[:, None]
            return (given[0] * of_features.to(given[0]), *given[1:])

        return hook

    with hooked(
        topology.site_module(loaded.model, layer, "attention_output").register_forward_pre_hook(multiply(layer))
        for layer in range(topology.layers)
    ):
        yield


def _losses(loaded: LoadedModel, windows: Sequence[Window]) -> torch.Tensor:
    """The mean cross-entropy of each window's scored tokens, [windows]; all windows have one length."""
    import torch

    from excise.generation.tree import logits_of

    tokens = torch.tensor([list(window.tokens) for window in windows], device=loaded.device)
    hidden = loaded.last_hidden(tokens, use_cache=False)
    losses = []
    for row, window in enumerate(windows):
        logits = logits_of(loaded, hidden[row, -window.scored - 1 : -1])
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[row, -window.scored :]))
    return torch.stack(losses)


def _by_impact(impacts: pl.DataFrame, seed: int) -> HeadRanking:
    if "bias_with" in impacts.columns:
        # Measured, and there is no disparity without the head, as all answers are the same, say: not one to prune.
        undefined = pl.col("bias_without").is_null() & pl.col("bias_with").is_not_null()
        impacts = impacts.with_columns(bias_without=pl.when(undefined).then(math.inf).otherwise("bias_without"))
    return HeadRanking(impacts["bias_without"], impacts["perplexity_without"])


def _by_column(name: str) -> Callable[[pl.DataFrame, int], HeadRanking]:
    return lambda impacts, seed: HeadRanking(impacts[name])


def _by_chance(impacts: pl.DataFrame, seed: int) -> HeadRanking:
    return HeadRanking(pl.Series("random", np.random.default_rng(seed).random(impacts.height)))


SCORES = (
    head_score("head_impacts", _by_impact, selection="fasp", parameters=(frozenset({"alpha", "gamma"}),)),
    head_score("head_perplexity", _by_column("perplexity_without")),
    head_score("head_magnitude", _by_column("magnitude")),
    head_score("head_gradient", _by_column("gradient")),
    head_score("head_random", _by_chance, drawn=True),
)
