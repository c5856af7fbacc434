"""Runs a model again from one layer on, once per attention head that is taken out of that layer.

Everything below the layer is the same for all of its heads, so hidden states are computed once, advanced layer by
layer, and only the rest of the model runs per head, several heads side by side as rows (method, B3; design, "Reusing
samples"). Here are the passes; what is read from them is in `excise.attribution.readers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from excise.errors import ExciseError
from excise.generation.tree import attention_masks
from excise.models.loading import LoadedModel
from excise.models.memory import shrinking_batches

PASS_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 8192}
"""Columns of one pass, all heads together; halved whenever memory runs out."""


@dataclass(frozen=True)
class Inputs:
    """B texts of Q tokens, or one row of Q columns that see their ancestors only.

    tokens: int [B, Q]. For a row of columns (B = 1) also positions: int [1, Q], and ancestors: which columns a column
    sees, itself included, as packed bits, uint8 [Q, bytes].
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None = None
    ancestors: np.ndarray | None = None


class Reader(Protocol):
    """Turns the last hidden states of some inputs, [R, B, Q, hidden], into numbers, one row per R."""

    def __call__(self, hidden: torch.Tensor, unpruned: bool, /) -> np.ndarray:
        """unpruned: whether the states are those of the whole model."""


def through(
    loaded: LoadedModel, inputs: Inputs, layer: int, hidden: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one layer alone. hidden: the states entering it, [B, Q, hidden]; the first layer needs none.

    Returns the states leaving the layer, [B, Q, hidden], and its heads' outputs, which are the input of the output
    projection, [B, Q, heads * head size].
    """
    topology = loaded.topology
    layers = loaded.topology.layer_modules(loaded.model)
    seen: dict[str, torch.Tensor] = {}

    def keep_heads(module: torch.nn.Module, given: tuple) -> None:
        seen["heads"] = given[0]

    def keep_states(module: torch.nn.Module, given: tuple, output) -> None:
        seen["states"] = output[0] if isinstance(output, tuple) else output

    others = {skipped: skipping(loaded, hidden) for skipped in layers[:layer]}
    others |= {skipped: skipping(loaded, None) for skipped in layers[layer + 1 :]}
    with ExitStack() as stack:
        stack.enter_context(forwards_replaced(others))
        projection = topology.site_module(loaded.model, layer, "attention_output")
        stack.callback(projection.register_forward_pre_hook(keep_heads).remove)
        stack.callback(layers[layer].register_forward_hook(keep_states).remove)
        _forward(loaded, inputs, 1)
    return seen["states"], seen["heads"]


def onward(
    loaded: LoadedModel,
    inputs: Inputs,
    layer: int,
    hidden: torch.Tensor | None,
    written: torch.Tensor,
    heads: Sequence[int],
) -> torch.Tensor:
    """The last hidden states without each of `heads` of a layer, [len(heads), B, Q, hidden].

    hidden: states entering the layer, [B, Q, hidden] (None for the first). written: its heads' outputs, [B, Q, heads *
    head size], as `through` returns them. A head is removed as FASP does it: its part of the output projection's input
    is zero (section 3; method, B3), which `excise.interventions.heads` calls `zero_output`.
    """
    topology = loaded.topology
    projection = topology.site_module(loaded.model, layer, "attention_output")
    gone = torch.zeros((len(heads), 1, 1, topology.heads, 1), dtype=torch.bool, device=written.device)
    gone[torch.arange(len(heads)), 0, 0, torch.as_tensor(heads)] = True

    def attend(*given, **named) -> tuple[torch.Tensor, None]:
        by_head = written.unflatten(-1, (topology.heads, -1))
        return projection(by_head.masked_fill(gone, 0).flatten(0, 1).flatten(-2)), None

    entering = None if hidden is None else hidden.repeat(len(heads), 1, 1)
    replaced = {skipped: skipping(loaded, entering) for skipped in loaded.topology.layer_modules(loaded.model)[:layer]}
    replaced[topology.attention_module(loaded.model, layer)] = attend
    with forwards_replaced(replaced):
        return _forward(loaded, inputs, len(heads)).unflatten(0, (len(heads), -1))


def finished(loaded: LoadedModel, inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
    """The last hidden states, [B, Q, hidden], of the states that leave the last layer: nothing is removed."""
    with forwards_replaced(
        {skipped: skipping(loaded, hidden) for skipped in loaded.topology.layer_modules(loaded.model)}
    ):
        return _forward(loaded, inputs, 1)


def _forward(loaded: LoadedModel, inputs: Inputs, times: int) -> torch.Tensor:
    """An ordinary pass over the inputs, repeated `times`, as far as layers have not been replaced."""
    device = loaded.device
    tokens = inputs.tokens.to(device).repeat(times, 1)
    if inputs.ancestors is None or inputs.positions is None:
        return loaded.last_hidden(tokens, position_ids=None, attention_mask=None, use_cache=False)
    sees = np.unpackbits(inputs.ancestors, axis=1, count=tokens.shape[1]).view(bool)
    positions = inputs.positions.to(device)
    with attention_masks(loaded, torch.from_numpy(sees)[None].to(device), positions, positions) as mask:
        positions = positions.expand(times, -1)  # while one mask serves all rows
        return loaded.last_hidden(tokens, position_ids=positions, attention_mask=mask, use_cache=False)


def skipping(loaded: LoadedModel, hidden: torch.Tensor | None) -> Callable:
    """A layer's forward that returns these states instead, or, without any, the ones it is given."""

    def forward(given: torch.Tensor, *others, **named):
        output = given if hidden is None else hidden
        return (output, None) if loaded.topology.family.layers_return_tuples else output

    return forward


@contextmanager
def forwards_replaced(forwards: Mapping[torch.nn.Module, Callable]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.callback(_put_back, module, module.__dict__.get("forward"))
            module.forward = forward
        yield


def _put_back(module: torch.nn.Module, forward: Callable | None) -> None:
    if forward is not None:
        module.forward = forward
    elif "forward" in module.__dict__:
        del module.forward


@dataclass(frozen=True)
class _Standing:
    """Inputs at a layer. hidden: the states that enter it (None for the first); written: its heads' outputs."""

    inputs: Inputs
    read: Reader
    hidden: torch.Tensor | None
    written: torch.Tensor


def every_head(
    loaded: LoadedModel,
    chunks: Sequence[Inputs],
    read: Sequence[Reader],
    heads: Mapping[int, Sequence[int]],
    *,
    unpruned: bool,
    keep: Callable[[int | None, int | None, np.ndarray], None],
    on_heads: Callable[[int], None] = lambda count: None,
) -> None:
    """Take every head of `heads` (layer -> heads) out, one at a time, and read what becomes of all chunks.

    read: one reader per chunk.
    keep(layer, head, numbers) gets all chunks' numbers of a head, one after another, as soon as they are complete; and
    keep(None, None, numbers) those of the whole model, if `unpruned` asks for them. on_heads(count) follows each batch
    of heads. The chunks' hidden states of one layer are in memory together.
    """
    last = max((layer for layer, of_layer in heads.items() if of_layer), default=-1)
    widest = max(chunk.tokens.numel() for chunk in chunks)
    at_once = max(1, PASS_TOKENS[loaded.device.type] // widest)
    hidden: list[torch.Tensor | None] = [None] * len(chunks)
    with torch.inference_mode():
        for layer in range(loaded.topology.layers if unpruned else last + 1):
            passed = [through(loaded, chunk, layer, states) for chunk, states in zip(chunks, hidden, strict=True)]
            standing = [
                _Standing(chunk, reader, states, written)
                for chunk, reader, states, (_, written) in zip(chunks, read, hidden, passed, strict=True)
            ]
            todo = heads.get(layer, ())
            # Batches of equal size: a last one of a single head would use the processor badly.
            size = -(-len(todo) // max(1, -(-len(todo) // at_once)))
            batches = shrinking_batches(todo, size, loaded.device, partial(_without, loaded, standing, layer))
            largest = 0
            for out, rows in batches:
                for head, numbers in zip(out, rows, strict=True):
                    keep(layer, head, numbers)
                on_heads(len(out))
                largest = max(largest, len(out))
            if largest < size:  # as memory ran out, and would again in the next layer
                at_once = largest
            hidden = [leaving for leaving, _ in passed]
        if unpruned:
            numbers = [
                reader(finished(loaded, chunk, states)[None], True)
                for chunk, reader, states in zip(chunks, read, hidden, strict=True)
                if states is not None
            ]
            keep(None, None, np.concatenate(numbers, axis=1)[0])


def _without(loaded: LoadedModel, standing: Sequence[_Standing], layer: int, heads: Sequence[int]) -> np.ndarray:
    """What is read of all chunks without each of some heads of a layer, one row per head."""
    try:
        rows = [
            chunk.read(onward(loaded, chunk.inputs, layer, chunk.hidden, chunk.written, heads), False)
            for chunk in standing
        ]
    except ExciseError as error:
        named = f"head{'' if len(heads) == 1 else 's'} {', '.join(map(str, heads))} of layer {layer}"
        raise ExciseError(f"without {named}: {error}") from error
    return np.concatenate(rows, axis=1)
