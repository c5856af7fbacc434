"""Runs many answers of many prompts through a model without computing any token twice.

The prompts of a variation share their first tokens (the *trunk*); the samples of a prompt share the prompt, and often
the first tokens of the answer. Seen this way a batch is a set of trees: one row per prompt, one column per *distinct*
token prefix, and an attention mask that lets each column see its ancestors only. Rows are plain tensors for an ordinary
forward pass of any architecture in `excise.models.loading`; sampling and attribution both build on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from excise.errors import ExciseError
from excise.models.hooks import hooked
from excise.models.loading import LoadedModel

if TYPE_CHECKING:
    pass


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share, leaving every one at least one token of its own."""
    ordered = sorted(tuple(sequence) for sequence in sequences)
    first, last = ordered[0], ordered[-1]
    limit = min(map(len, ordered)) - 1
    for index in range(limit):
        if first[index] != last[index]:
            return index
    return limit


class _Layer(Protocol):
    """The keys and values that a cache holds of one layer."""

    keys: torch.Tensor
    values: torch.Tensor


class Rows:
    """B rows that grow by columns, over a trunk of P tokens, with the keys and values of everything seen so far.

    attends of a forward: bool [B, Q, P + columns], which earlier (and own) columns each new column may see.
    """

    def __init__(self, loaded: LoadedModel, trunk: Sequence[int] = ()) -> None:
        from transformers import DynamicCache

        self.loaded = loaded
        self.cache = DynamicCache()
        self.trunk = len(trunk)
        self.key_positions = torch.zeros((1, 0), dtype=torch.long, device=loaded.device)
        if trunk:
            tokens = torch.tensor([list(trunk)], device=loaded.device)
            positions = torch.arange(len(trunk), device=loaded.device)[None]
            self.trunk_hidden = self.forward(tokens, positions, torch.ones(1, len(trunk), len(trunk)).tril().bool())

    @property
    def _layers(self) -> list[_Layer]:
        return cast("list[_Layer]", self.cache.layers)

    @property
    def columns(self) -> int:
        """How many columns there are, those of the trunk among them."""
        return self.key_positions.shape[1]

    def copy(self, rows: int) -> Rows:
        """The same trunk under `rows` rows; the copy grows on its own."""
        from transformers import DynamicCache

        other = object.__new__(Rows)
        other.loaded, other.trunk, other.cache = self.loaded, self.trunk, DynamicCache()
        other.key_positions = self.key_positions.expand(rows, -1)
        for index, layer in enumerate(self._layers):
            shape = (rows, *layer.keys.shape[1:])
            other.cache.update(layer.keys.expand(shape), layer.values.expand(shape), index)
        return other

    def keep(self, rows: np.ndarray) -> None:
        """Drop all rows but these."""
        index = torch.as_tensor(rows)
        self.key_positions = self.key_positions[index]
        on = {device: index.to(device) for device in {layer.keys.device for layer in self._layers}}
        for layer in self._layers:
            kept = on[layer.keys.device]
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
        """Append columns. tokens, positions: int [B, Q]. Returns the last hidden states, [B, Q, hidden]."""
        device = self.loaded.device
        positions, attends = positions.to(device), attends.to(device)
        self.key_positions = torch.cat([self.key_positions, positions], dim=1)
        with attention_masks(self.loaded, attends, positions, self.key_positions) as mask:
            return self.loaded.last_hidden(
                tokens, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
            )


def read_prompts(trunk: Rows, prompts: Sequence[Sequence[int]]) -> tuple[Rows, torch.Tensor]:
    """Read the rest of prompts that begin with the tokens of the trunk, a row each.

    Returns the rows, and the last hidden states of the prompts' last tokens, [prompts, hidden].
    """
    begun, rows = trunk.trunk, trunk.copy(len(prompts))
    lengths = np.array([len(prompt) - begun for prompt in prompts])
    width = int(lengths.max())
    tokens = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = prompt[begun:]
    attends = np.tril(np.ones((begun + width, begun + width), dtype=bool))[None, begun:]
    positions = begun + np.arange(width)[None]
    shape = (len(prompts), -1, -1)
    hidden = rows.forward(
        torch.from_numpy(tokens), torch.from_numpy(positions).expand(shape[:2]), torch.from_numpy(attends).expand(shape)
    )
    return rows, hidden[torch.arange(len(prompts)), torch.from_numpy(lengths - 1)]


def logits_of(loaded: LoadedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits, float32 [..., vocabulary], of last hidden states [..., hidden], on the device of those.

    Raises ExciseError, naming the model, where they are not finite; a token alone may have -inf, and is never drawn.
    """
    logits = loaded.model.get_output_embeddings()(hidden).to(hidden.device).float()
    if not logits.detach().amax(dim=-1).isfinite().all():  # before they are capped, which would hide it
        raise not_finite(loaded, "logits")
    cap = loaded.topology.logit_cap
    return logits if cap is None else torch.tanh(logits / cap) * cap


def not_finite(loaded: LoadedModel, what: str) -> ExciseError:
    """The error for numbers of a model that are NaN or infinite. what: which numbers."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    return ExciseError(
        f"models.yaml: {loaded.key}: the model's {what} are not finite in {dtype}: its weights hold NaN or infinity, "
        f"or numbers too large for {dtype}. Check the weights, or try another dtype (dtype: float32 in its entry; an "
        "Apple GPU takes float16 by itself)"
    )


@contextmanager
def attention_masks(
    loaded: LoadedModel, attends: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor
) -> Iterator[torch.Tensor | Mapping[str, torch.Tensor]]:
    """The additive attention mask in the form the architecture takes, with its sliding windows."""
    windows = loaded.topology.windows
    full = _additive(attends, loaded.dtype)
    sizes = {window for window in windows if window is not None}
    reach = int(positions.max()) - int(key_positions.min()) if sizes else 0
    buffer = loaded.topology.family.order_mask
    if not any(reach >= size for size in sizes) and buffer is None:
        yield full
        return
    local = full
    if sizes:
        (window,) = sizes
        local = _additive(attends & (positions[:, :, None] - key_positions[:, None, :] < window), loaded.dtype)
    if buffer is not None:
        with _order_mask_lifted(loaded, buffer, local):
            yield full
    else:
        yield local if None not in windows else {"full_attention": full, "sliding_attention": local}


def _additive(attends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
    # Half of the least number: a score added to it must not overflow, not in float16 either.
    return mask.masked_fill_(~attends, torch.finfo(dtype).min / 2)[:, None]


@contextmanager
def _order_mask_lifted(loaded: LoadedModel, buffer: str, local: torch.Tensor) -> Iterator[None]:
    """A model that masks by column order in a buffer of its own (GPT-Neo) does not, for the length of a pass; its local
    layers are handed their window instead."""
    topology = loaded.topology

    def windowed(
        module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], named: dict[str, Any]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        return arguments, {**named, "attention_mask": local}

    attentions = [topology.attention_module(loaded.model, layer) for layer in range(topology.layers)]
    kept = [attention.get_buffer(buffer) for attention in attentions]
    hooks = (
        attention.register_forward_pre_hook(windowed, with_kwargs=True)
        for attention, window in zip(attentions, topology.windows, strict=True)
        if window is not None
    )
    with hooked(hooks):
        try:
            for attention, mask in zip(attentions, kept, strict=True):
                everything = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=mask.device)
                setattr(attention, buffer, everything.expand(1, 1, 1 << 20, 1 << 20))
            yield
        finally:
            for attention, mask in zip(attentions, kept, strict=True):
                setattr(attention, buffer, mask)


@dataclass(frozen=True)
class AnswerTree:
    """One prompt's own tokens followed by the distinct prefixes of its answers.

    tokens, parents: int [Q]; a column's parent is an earlier column, or -1 for the trunk.
    visits: float [Q, W], how often each of W weightings passes through the column.
    edges: (column, next token) pairs, int [E, 2]; edge_visits: float [E, W]. Every answer's tokens are edges, and its
    end where it ended by a stop token.
    """

    tokens: np.ndarray
    parents: np.ndarray
    visits: np.ndarray
    edges: np.ndarray
    edge_visits: np.ndarray
    prompt_length: int


def answer_tree(
    prompt: Sequence[int], answers: Sequence[tuple[Sequence[int], int | None]], weights: np.ndarray
) -> AnswerTree:
    """Merge a prompt's answers into one tree.

    prompt: the prompt's tokens after the trunk. answers: (tokens, stop token or None when cut off). weights: [N, W].
    """
    tokens, parents = list(prompt), list(range(-1, len(prompt) - 1))
    visits = [weights.sum(axis=0) for _ in prompt]
    children: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], np.ndarray] = {}
    for (answer, stop), weight in zip(answers, weights, strict=True):
        column = len(prompt) - 1
        for position, token in enumerate([*answer, *([] if stop is None else [stop])]):
            edge = (column, token)
            edges[edge] = edges.get(edge, 0) + weight
            if position == len(answer):
                break
            if edge not in children:
                children[edge] = len(tokens)
                tokens.append(token)
                parents.append(column)
                visits.append(np.zeros_like(weight))
            column = children[edge]
            visits[column] = visits[column] + weight
    return AnswerTree(
        np.array(tokens),
        np.array(parents),
        np.array(visits),
        np.array(list(edges), dtype=np.int64).reshape(-1, 2),
        np.array(list(edges.values())).reshape(len(edges), -1),
        len(prompt),
    )


@dataclass(frozen=True)
class PackedTrees:
    """Several trees side by side, padded to the longest: tensors for one forward pass over a trunk of P tokens.

    tokens, positions: [B, Q]; attends: bool [B, Q, P + Q]; visits: float [B, Q, W] (0 in the padding);
    edges: int [E, 3] of (row, column, next token); edge_visits: float [E, W].
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    attends: torch.Tensor
    visits: torch.Tensor
    edges: torch.Tensor
    edge_visits: torch.Tensor


def pack(trees: Sequence[AnswerTree], trunk: int) -> PackedTrees:
    """Pad trees to a batch. Columns see the whole trunk, their ancestors and themselves."""
    rows, width = len(trees), max(len(tree.tokens) for tree in trees)
    tokens = np.zeros((rows, width), dtype=np.int64)
    positions = np.full((rows, width), trunk, dtype=np.int64)
    attends = np.zeros((rows, width, trunk + width), dtype=bool)
    attends[:, :, :trunk] = True
    visits = np.zeros((rows, width, trees[0].visits.shape[1]))
    for row, tree in enumerate(trees):
        size = len(tree.tokens)
        tokens[row, :size] = tree.tokens
        visits[row, :size] = tree.visits
        for column, parent in enumerate(tree.parents):
            if parent >= 0:
                attends[row, column] = attends[row, parent]
                positions[row, column] = positions[row, parent] + 1
            attends[row, column, trunk + column] = True
    edges = [np.column_stack([np.full(len(tree.edges), row), tree.edges]) for row, tree in enumerate(trees)]
    return PackedTrees(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(attends),
        torch.from_numpy(visits),
        torch.from_numpy(np.concatenate(edges)),
        torch.from_numpy(np.concatenate([tree.edge_visits for tree in trees])),
    )
