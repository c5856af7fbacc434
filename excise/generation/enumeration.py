"""The exact distribution of a model's short answers: its answer tree enumerated, likeliest prefixes first.

A number is a few tokens, and truncated sampling leaves few of them at each step, so most of an answer's probability
sits in a small tree that one visit per prefix resolves: means, SMD and inlier ratio follow without Monte-Carlo error,
with the unvisited (*leftover*) mass as a rigorous bound. Drawing answers is in `excise.generation.sampling`, from whose
distributions these trees are made; what the metrics mean is in `excise.evaluation.metrics` (method, A1).

Which is cheaper: a prefix costs the same here and there, and both read the prompt once. Where a model answers with a
number alone, its tree has tens of prefixes, 100 samples visit nearly all of them, and enumeration costs no more while
being worth any number of samples. Where it writes sentences the tree grows beyond any `max_nodes`: such a prompt
*rambles*, and sampling is cheaper; `excise.generation.answering` goes over to it by itself. Low temperature and small
top-p make trees small; with top_p 1 and no top_k only a model that is sure of itself has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from excise.errors import ExciseError
from excise.generation.sampling import LOGIT_ROWS, PREFILL_TOKENS, SamplingParameters, next_tokens
from excise.generation.settings import Enumeration
from excise.generation.tree import Rows, common_prefix, logits_of, read_prompts
from excise.models.encoding import reader, require_positions
from excise.models.loading import LoadedModel
from excise.models.memory import shrinking_batches
from excise.outcomes import Answer
from excise.outcomes.answers import continued
from excise.outcomes.kinds.number import numbers_of

Leaf = tuple[tuple[int, ...], int | None, float]
"""An answer's tokens without the stop token, that token (None: cut off), and its probability."""
Values = Callable[[Sequence[Answer]], list[float | None]]
"""What answers are worth; None: nothing that could be counted."""
ValueOf = Callable[[Sequence[int], bool], float]
"""From an answer's tokens without the stop token, and whether there was one, to its value; NaN = unparsed."""
CACHE_COLUMNS = {"cpu": 1 << 14, "cuda": 1 << 17, "mps": 1 << 14}
"""Columns, all prompts of a batch together, whose keys and values are held at once."""
NODES_PER_ROUND = 32
"""Prefixes of one prompt expanded side by side. The same for every prompt, so that neighbours change no result."""
AS_USUAL = Enumeration()
DUST = 1 / 8
"""Share of the allowed leftover that may be answers of full length too unlikely to be listed."""


@dataclass(frozen=True)
class AnswerDistribution:
    """The answers of one prompt, likeliest first.

    tokens: the answers' tokens without the stop token; stops: that token, None where max_new_tokens cut the answer
    off; probability: float64 [n], with sum 1 - leftover; values: float64 [n], NaN = unparsed; nodes: prefixes read;
    complete: whether leftover is as small as asked, which it is not where the model rambles.
    """

    tokens: tuple[tuple[int, ...], ...]
    stops: tuple[int | None, ...]
    probability: np.ndarray
    values: np.ndarray
    leftover: float
    nodes: int
    complete: bool

    def listed(self) -> list[tuple[list[int], bool, float, float]]:
        """Token ids with the stop token, whether that is there, probability and value of every answer; where none was
        found, one of probability 0, as the prompt still has a leftover to tell."""
        answers = zip(self.tokens, self.stops, self.probability.tolist(), self.values.tolist(), strict=True)
        return [
            ([*tokens, *([] if stop is None else [stop])], stop is not None, probability, value)
            for tokens, stop, probability, value in answers
        ] or [([], False, 0.0, math.nan)]


def answer_distributions(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    parameters: SamplingParameters,
    enumeration: Enumeration = AS_USUAL,
    *,
    values: Sequence[ValueOf] | None = None,
    batch_prompts: int | None = None,
    on_batch: Callable[[dict[int, AnswerDistribution]], None] = lambda batch: None,
) -> list[AnswerDistribution]:
    """Enumerate the answers of each prompt, as `excise.generation.sampling.sample` would draw them, in the order of the
    prompts.

    prompts: token ids per prompt. enumeration: mass that may stay unvisited (`leftover`, 0 for none), and prefixes read
    per prompt at most (`max_nodes`). values: what the answers of each prompt are worth (default: the number they name).
    batch_prompts: prompts per batch (default: as many as the device takes). on_batch gets the distributions of each
    finished batch by the number of the prompt.

    Every round expands each prompt's likeliest prefixes, all but the unlikeliest that sum to at most `leftover`.
    Unvisited mass only splits up further, so on the way to `leftover` no prefix is read that expanding strictly one by
    one would have spared. Where max_nodes comes first, the last round's choice is by level as much as by likelihood.
    Raises ExciseError for a leftover outside [0, 1), for max_nodes below 1, for a prompt that leaves no room for an
    answer, and for logits that are not finite.
    """
    leftover, max_nodes = enumeration.leftover, enumeration.max_nodes
    if not 0 <= leftover < 1:
        raise ExciseError(f"exact answers: leftover is {leftover!r}, but must be at least 0 and below 1, such as 0.01")
    if max_nodes < 1:
        raise ExciseError(f"exact answers: max_nodes is {max_nodes!r}, but must be at least 1")
    if not len(prompts):
        return []
    places: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        require_positions(loaded, f"prompt {index}", len(prompt), parameters.max_new_tokens)
        places.setdefault(tuple(prompt), []).append(index)
    if values is None:
        values = [answer_values(loaded)] * len(prompts)
    distributions: dict[int, AnswerDistribution] = {}
    with torch.inference_mode():
        queue = sorted(places, key=lambda prompt: (len(prompt), places[prompt]))
        trunk = Rows(loaded, queue[0][: common_prefix(queue)])
        longest, kind = len(queue[-1]) - trunk.trunk, loaded.device.type
        size = batch_prompts or max(
            1, min(PREFILL_TOKENS[kind] // longest, CACHE_COLUMNS[kind] // (longest + max_nodes))
        )
        batches = shrinking_batches(
            queue, size, loaded.device, lambda batch: _enumerate_batch(trunk, batch, parameters, enumeration)
        )
        for batch, trees in batches:
            finished: dict[int, AnswerDistribution] = {}
            for prompt, tree in zip(batch, trees, strict=True):
                by_value = {values[index]: _distribution(tree, leftover, values[index]) for index in places[prompt]}
                finished |= {index: by_value[values[index]] for index in places[prompt]}
            on_batch(finished)
            distributions |= finished
    return [distributions[index] for index in range(len(prompts))]


def answer_values(loaded: LoadedModel, values: Values = numbers_of, prefix: str = "") -> ValueOf:
    """What an answer is worth. values: as `Outcome.values`; prefix: what of each answer its prompt holds."""
    read = reader(loaded)

    def value_of(tokens: Sequence[int], finished: bool) -> float:
        text, ended = read(tokens)
        (value,) = values([Answer("", continued(prefix, text), finished or ended)])
        return math.nan if value is None else value

    return value_of


@dataclass
class _Tree:
    """One prompt's tree while it grows.

    nodes: expanded prefixes as (tokens, columns of the row they occupy, mass); the frontier's arrays [F] say which
    prefixes come next: their mass, the node above, and the token. dust: mass given up. answers: (tokens, stop, mass).
    """

    nodes: list[tuple[tuple[int, ...], tuple[int, ...], float]]
    mass: np.ndarray = field(default_factory=lambda: np.zeros(0))
    above: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    token: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    dust: float = 0.0
    answers: list[Leaf] = field(default_factory=list)

    @property
    def leftover(self) -> float:
        return self.dust + float(self.mass[::-1].sum())


def _enumerate_batch(
    trunk: Rows, prompts: Sequence[Sequence[int]], parameters: SamplingParameters, enumeration: Enumeration
) -> list[_Tree]:
    rows, hidden = read_prompts(trunk, prompts)
    lengths = np.array([len(prompt) for prompt in prompts])
    trees = [_Tree([((), (), 1.0)]) for _ in prompts]
    expanded = [(row, 0) for row in range(len(prompts))]
    alive = np.arange(len(prompts))
    while True:
        grown = [(trees[tree], node) for tree, node in expanded]
        _branch(trunk.loaded, hidden, grown, parameters, enumeration)
        chosen = [_next_nodes(trees[tree], enumeration) for tree in alive]
        going = np.flatnonzero([len(picks) for picks in chosen])
        if not len(going):
            return trees
        if len(going) < len(alive):
            rows.keep(going)
        alive, chosen = alive[going], [chosen[row] for row in going]
        columns, width = rows.columns, max(map(len, chosen))
        tokens = np.zeros((len(alive), width), dtype=np.int64)
        positions = np.repeat(lengths[alive][:, None], width, axis=1)
        attends = np.zeros((len(alive), width, columns + width), dtype=bool)
        places: list[tuple[int, int]] = []  # (row, slot) of every node that is read now
        expanded = []
        for row, (index, picks) in enumerate(zip(alive.tolist(), chosen, strict=True)):
            tree = trees[index]
            attends[row, : len(picks), : lengths[index]] = True
            for slot, pick in enumerate(picks):
                above, path, _ = tree.nodes[tree.above[pick]]
                token, path = int(tree.token[pick]), (*path, columns + slot)
                tokens[row, slot] = token
                positions[row, slot] += len(above)
                attends[row, slot, list(path)] = True
                places.append((row, slot))
                expanded.append((index, len(tree.nodes)))
                tree.nodes.append(((*above, token), path, float(tree.mass[pick])))
            rest = np.delete(np.arange(len(tree.mass)), picks)
            tree.mass, tree.above, tree.token = tree.mass[rest], tree.above[rest], tree.token[rest]
        hidden = rows.forward(*map(torch.from_numpy, (tokens, positions, attends)))
        hidden = hidden[tuple(torch.tensor(places).T)]


def _next_nodes(tree: _Tree, enumeration: Enumeration) -> np.ndarray:
    """The frontier's prefixes to expand next, likeliest first; none where the tree is done. Forgets the hopeless ones.

    A prefix behind more likelier ones than may still be read is never reached, since later prefixes only add to them.
    """
    able = enumeration.max_nodes - len(tree.nodes)
    order = np.argsort(-tree.mass, kind="stable")
    if able < len(order):
        tree.dust += float(tree.mass[order[able:]].sum())
        kept = np.sort(order[:able])
        tree.mass, tree.above, tree.token = tree.mass[kept], tree.above[kept], tree.token[kept]
        order = np.argsort(-tree.mass, kind="stable")
    unread = tree.dust + np.cumsum(tree.mass[order][::-1])[::-1]
    return order[: min(int((unread > enumeration.leftover).sum()), NODES_PER_ROUND)]


def _branch(
    loaded: LoadedModel,
    hidden: torch.Tensor,
    expanded: Sequence[tuple[_Tree, int]],
    parameters: SamplingParameters,
    enumeration: Enumeration,
) -> None:
    """Put the next tokens of expanded nodes into their trees. hidden: [nodes, hidden]."""
    stops = np.array(sorted(loaded.stop_tokens), dtype=np.int64)
    grown: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(hidden), LOGIT_ROWS):
        for numbers, candidates, cumulative in next_tokens(
            logits_of(loaded, hidden[start : start + LOGIT_ROWS]), parameters
        ):
            # What a uniform number's search in the cumulative distribution returns, and how often.
            share = np.diff(cumulative.numpy(), axis=1, prepend=0.0)
            for number, tokens, shares in zip(numbers, candidates.numpy(), share, strict=True):
                possible = shares > 0
                grown[start + int(number)] = tokens[possible], shares[possible]
    # In the order in which they were chosen, whatever the order of the distributions: ties must fall alike.
    for number, (tree, node) in enumerate(expanded):
        ids, shares = grown[number]
        above, _, mass = tree.nodes[node]
        ends = np.isin(ids, stops)
        stopped = zip(ids[ends].tolist(), (mass * shares[ends]).tolist(), strict=True)
        tree.answers += [(above, stop, probability) for stop, probability in stopped]
        ids, shares = ids[~ends], shares[~ends]
        last = len(above) + 1 == parameters.max_new_tokens
        rising = np.argsort(shares, kind="stable")
        if last:
            given_up = int(np.searchsorted(np.cumsum(shares[rising]), DUST * enumeration.leftover, side="right"))
        else:  # as in _next_nodes
            given_up = max(0, len(shares) - (enumeration.max_nodes - len(tree.nodes)))
        tree.dust += mass * float(shares[rising[:given_up]].sum())
        kept = np.sort(rising[given_up:])
        ids, masses = ids[kept], mass * shares[kept]
        if last:
            cut_off = zip(ids.tolist(), masses.tolist(), strict=True)
            tree.answers += [((*above, token), None, probability) for token, probability in cut_off]
        else:
            tree.mass = np.concatenate([tree.mass, masses])
            tree.above = np.concatenate([tree.above, np.full(len(ids), node)])
            tree.token = np.concatenate([tree.token, ids])


def _distribution(tree: _Tree, leftover: float, value_of: ValueOf) -> AnswerDistribution:
    answers = sorted(tree.answers, key=lambda answer: (-answer[2], answer[0], answer[1] or 0))
    return distribution_of(answers, tree.leftover, len(tree.nodes), leftover, value_of)


def distribution_of(
    answers: Sequence[Leaf], unread: float, nodes: int, leftover: float, value_of: ValueOf
) -> AnswerDistribution:
    """Answers with their values.

    answers: likeliest first; unread: the mass that they leave over; nodes: prefixes read; leftover: the mass that may
    be left over.
    """
    values = [value_of(tokens, stop is not None) for tokens, stop, _ in answers]
    return AnswerDistribution(
        tuple(answer[0] for answer in answers),
        tuple(answer[1] for answer in answers),
        np.array([answer[2] for answer in answers], dtype=np.float64),
        np.array(values, dtype=np.float64),
        unread,
        nodes,
        unread <= leftover,
    )
