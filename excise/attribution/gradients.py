"""Gradients of weights from what goes into their matrices and comes out of them, for some layers at a time.

The gradient of a matrix is the product of its inputs and the gradients of its outputs, so that no parameter has to be
trainable, no gradient is held longer than it is needed, and weights that are fetched for a pass alone have one as well.
What is made of them is in `snip` and `gap_gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from excise.files.parts import Parts, Work
from excise.models.hooks import hooked
from excise.models.placement import weight_of
from excise.models.topology import Linear

if TYPE_CHECKING:
    import torch

    from excise.models.loading import LoadedModel

ACCUMULATOR_BYTES = 2 << 30
"""What the sums kept of layers at once may fill, where a card has no more room to spare."""

Calls = dict[str, list[tuple["torch.Tensor", "torch.Tensor"]]]
"""By module, input and output of each of its calls."""


@contextmanager
def recorded(loaded: LoadedModel, modules: Iterable[str]) -> Iterator[Calls]:
    """Inputs and outputs of modules, while the model runs; empty it before the next pass.

    The graph of autograd begins at the first of them: what lies below needs no gradient and keeps nothing.
    """
    calls: Calls = {module: [] for module in modules}

    def record(module: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls[module].append((given[0].detach(), output if output.requires_grad else output.requires_grad_()))

        return hook

    with hooked(loaded.model.get_submodule(module).register_forward_hook(record(module)) for module in calls):
        yield calls


def output_gradients(objective: torch.Tensor, calls: Calls, *, again: bool = False) -> dict[str, list[torch.Tensor]]:
    """d objective / d output of every recorded call; of one the objective does not hang on, zeros. again: the graph
    stays for another objective."""
    import torch

    outputs = [output for pairs in calls.values() for _, output in pairs]
    gradients = iter(torch.autograd.grad(objective, outputs, retain_graph=again, materialize_grads=True))
    return {module: [next(gradients) for _ in pairs] for module, pairs in calls.items()}


def weight_gradient(linear: Linear, given: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """d objective / dW of the whole parameter `linear` lies in, float32, in its own layout.

    given, delta: the module's input and the gradient of its output, [..., features], summed over all but the last.
    """
    x, d = (features.flatten(0, -2).float() for features in (given, delta))
    return x.T @ d if linear.layout == "conv1d" else d.T @ x


def gradient_of_calls(
    linear: Linear, calls: Sequence[tuple[torch.Tensor, torch.Tensor]], deltas: Sequence[torch.Tensor]
) -> torch.Tensor:
    """`weight_gradient`, summed over all calls of the module."""
    first, *others = (weight_gradient(linear, given, delta) for (given, _), delta in zip(calls, deltas, strict=True))
    for other in others:
        first = first + other
    return first


def kept_shape(loaded: LoadedModel, module: str) -> tuple[int, ...]:
    """The shape of a module's parameter."""
    return tuple(weight_of(loaded.model.get_submodule(module)).shape)


@dataclass(frozen=True)
class Block:
    """Matrices of consecutive layers whose gradients are held together, and where work on them is kept.

    name: of the block among the parts. report: receives the number of units of the block that are done.
    """

    linears: list[Linear]
    name: str
    parts: Parts
    report: Callable[[int], None]


def blocks(
    loaded: LoadedModel, roles: Sequence[str], copies: int, layers_at_once: int | None = None
) -> list[list[Linear]]:
    """The matrices of the given roles, by blocks of consecutive layers of which `copies` in float32 may be held at
    once. layers_at_once: layers of a block; None takes as many as there is room for."""
    by_layer: dict[int, list[Linear]] = {}
    for linear in loaded.topology.linears:
        if linear.role in roles:
            by_layer.setdefault(linear.layer, []).append(linear)
    if not by_layer:
        return []
    if layers_at_once is None:
        largest = max(
            sum(int(np.prod(kept_shape(loaded, module))) for module in {linear.module for linear in of_layer})
            for of_layer in by_layer.values()
        )
        layers_at_once = max(1, _room(loaded.device) // max(1, 4 * copies * largest))
    layers = list(by_layer.values())
    return [
        [linear for of_layer in layers[start : start + layers_at_once] for linear in of_layer]
        for start in range(0, len(layers), layers_at_once)
    ]


def block_by_block(
    layer_blocks: Sequence[list[Linear]], units: int, compute: Callable[[Block], dict[str, np.ndarray]], work: Work
) -> Iterator[tuple[list[Linear], dict[str, np.ndarray]]]:
    """Each block with what `compute` makes of it, or has made of it before a run was killed.

    units: passes of a block. A single block is not kept when it is finished: the file it is for follows at once.
    """
    for number, linears in enumerate(layer_blocks):
        name = f"{linears[0].key}-{linears[-1].key}"
        arrays = work.parts.finished(name)
        if arrays is None:

            def report(done: int, before: int = number * units) -> None:
                work.report(before + done, len(layer_blocks) * units)

            arrays = compute(Block(linears, name, work.parts, report))
            if len(layer_blocks) > 1:
                work.parts.finish(name, arrays)
        yield linears, arrays


def _room(device: torch.device) -> int:
    import torch

    spare = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0
    return max(ACCUMULATOR_BYTES, spare)
