"""Scores of attention heads that know nothing of bias: the baselines FASP is compared with (method, B5).

Here: how large a head's weights are, and how much the language-model loss hangs on it. Not here: what removing a head
does (`excise.attribution.head_impacts`), attention to a name (`excise.attribution.attention`), and the selection, which
prunes the heads with the lowest scores. Both follow FASP, section 5, after Michel, Levy & Neubig 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from excise.errors import ExciseError
from excise.evaluation.perplexity import require_windows
from excise.generation.tree import logits_of, not_finite
from excise.models.loading import LoadedModel
from excise.progress import Progress, silent


class ScoredTokens(Protocol):
    """A stretch of text: all `tokens` are read, the last `scored` of them are predicted."""

    tokens: tuple[int, ...]
    scored: int


def head_magnitude(loaded: LoadedModel) -> np.ndarray:
    """The size of each head's weights over that of the largest head, float64 [layers, heads] in [0, 1].

    The L2 norm of the head's rows of q, k and v and of its columns of o together, biases left out. Where query heads
    share keys and values, the shared rows count for each of them.
    """
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
    loaded: LoadedModel, windows: Sequence[ScoredTokens], *, batch: int = 4, progress: Progress = silent
) -> np.ndarray:
    """How much the loss hangs on each head: sum over windows of |dL / d mask|, float64 [layers, heads].

    The mask multiplies the head's part of the output projection's input and is 1; L is the mean cross-entropy of the
    window's scored tokens. Each window has a gradient of its own: nothing cancels or adds up between windows. Every
    layer is divided by its L2 norm, so that its scores have length 1 (0 where no head of the layer matters). batch:
    windows of equal length that are read at once; it changes nothing but speed.

    Raises ExciseError without windows, and for a window whose scored tokens have nothing before them.
    """
    if not windows:
        raise ExciseError("head_gradient: no windows; give at least one stretch of text")
    require_windows(loaded, windows)
    if batch < 1:
        raise ExciseError(f"head_gradient: batch is {batch}; it must be 1 at least")
    topology = loaded.topology
    totals = torch.zeros((topology.layers, topology.heads), dtype=torch.float64)
    order = sorted(range(len(windows)), key=lambda number: len(windows[number].tokens))
    done = 0
    for some in _batches([windows[number] for number in order], batch):
        with torch.inference_mode(False), torch.enable_grad():
            shape = (topology.layers, len(some), topology.heads)
            mask = torch.ones(shape, device=loaded.device, requires_grad=True)
            with _masked(loaded, mask):
                loss = _losses(loaded, some).sum()
            # A row's loss depends on its own mask alone, so this is every window's gradient.
            (gradient,) = torch.autograd.grad(loss, mask)
        totals += gradient.abs().sum(dim=1).cpu().double()
        done += len(some)
        progress("head gradient", done, len(windows))
    scores = totals.numpy()
    if not np.isfinite(scores).all():
        raise not_finite(loaded, "gradients")
    norms = np.sqrt((scores**2).sum(axis=1, keepdims=True))
    return np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)


def _batches(windows: Sequence[ScoredTokens], batch: int) -> Iterator[list[ScoredTokens]]:
    """Neighbours of equal length, `batch` at most."""
    some: list[ScoredTokens] = []
    for window in windows:
        if some and (len(some) == batch or len(some[0].tokens) != len(window.tokens)):
            yield some
            some = []
        some.append(window)
    yield some


@contextmanager
def _masked(loaded: LoadedModel, mask: torch.Tensor) -> Iterator[None]:
    """Multiply each head's part of the output projections' inputs by mask [layers, rows, heads]."""
    topology = loaded.topology

    def multiply(layer: int):
        def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            of_features = mask[layer].repeat_interleave(topology.head_dim, dim=1)[:, None]
            return (given[0] * of_features.to(given[0]), *given[1:])

        return hook

    hooks = []
    try:
        for layer in range(topology.layers):
            module = topology.site_module(loaded.model, layer, "attention_output")
            hooks.append(module.register_forward_pre_hook(multiply(layer)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _losses(loaded: LoadedModel, windows: Sequence[ScoredTokens]) -> torch.Tensor:
    """The mean cross-entropy of each window's scored tokens, [windows]; all windows have one length."""
    tokens = torch.tensor([list(window.tokens) for window in windows], device=loaded.device)
    hidden = loaded.last_hidden(tokens, use_cache=False)
    losses = []
    for row, window in enumerate(windows):
        logits = logits_of(loaded, hidden[row, -window.scored - 1 : -1])
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[row, -window.scored :]))
    return torch.stack(losses)
