"""What is read from passes without a head: log probabilities of given answers, and losses of windows of text.

Answers are merged into forests, one column per distinct prefix; both come in parts whose hidden states fit into memory
together. The passes are `excise.attribution.continuation`, what the numbers say `excise.attribution.head_impacts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from excise.attribution.continuation import PASS_TOKENS, Inputs, Reader
from excise.evaluation.perplexity import Window, require_windows, token_losses
from excise.generation.sampling import LOGIT_ROWS, SamplingParameters, next_tokens
from excise.generation.tree import logits_of
from excise.models.loading import LoadedModel

FOREST_COLUMNS = {"cpu": 512, "cuda": 2048, "mps": 512}
"""Distinct prefixes in one row: attention grows with their square, shared prompts are read once per row."""
RESIDENT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31, "mps": 1 << 28}
"""Hidden states held at once, per kind: the ones entering a layer, its heads' outputs, the ones leaving it."""


@dataclass(frozen=True)
class Forest:
    """Some answers with their prompts as one row: one column per distinct prefix, which sees its ancestors only.

    inputs: one row of Q columns. edges: int [E, 2], (column, next token) of every distinct answer token, in the order
    of the columns. answer, edge: int [tokens], which edge each token of each answer is. answers: their number.
    """

    inputs: Inputs
    edges: np.ndarray
    answer: np.ndarray
    edge: np.ndarray
    answers: int


def forests(answers: Sequence[tuple[Sequence[int], Sequence[int]]], columns: int) -> list[Forest]:
    """Merge (prompt, answer) pairs, sorted by their joined tokens, into forests of about `columns` columns each.

    An answer includes its stop token, if it ended. A forest ends before a prompt that would overfill it, and within a
    prompt only where the prompt alone is too large.
    """
    sizes = _new_columns(answers)
    merged, start = [], 0
    while start < len(answers):
        stop, used = start, 0
        while stop < len(answers):
            # The first of a forest shares nothing with the forest before it.
            used += sizes[stop] if stop > start else len(answers[stop][0]) + max(0, len(answers[stop][1]) - 1)
            if used > columns and stop > start:
                break
            stop += 1
        if stop < len(answers) and answers[stop][0] == answers[stop - 1][0]:
            first = stop
            while first > start and answers[first - 1][0] == answers[stop][0]:
                first -= 1
            stop = first if first > start else stop
        merged.append(_forest(answers[start:stop]))
        start = stop
    return merged


def _path(answer: tuple[Sequence[int], Sequence[int]]) -> tuple[int, ...]:
    """The tokens of a pair that are columns: its last token is predicted, but predicts nothing."""
    return (*answer[0], *answer[1][:-1])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _new_columns(answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    paths = [_path(pair) for pair in answers]
    return [len(path) - _shared(path, before) for path, before in zip(paths, [(), *paths], strict=False)]


def _forest(answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Forest:
    tokens: list[int] = []
    parents: list[int] = []
    positions: list[int] = []
    edges: dict[tuple[int, int], int] = {}
    answer, edge = [], []
    before: tuple[int, ...] = ()
    places: list[int] = []
    for number, pair in enumerate(answers):
        path = _path(pair)
        # Sorted pairs share most with the one just before them.
        shared = _shared(path, before)
        del places[shared:]
        for position in range(shared, len(path)):
            parents.append(places[-1] if places else -1)
            places.append(len(tokens))
            tokens.append(path[position])
            positions.append(position)
        for step, token in enumerate(pair[1]):
            answer.append(number)
            edge.append(edges.setdefault((places[len(pair[0]) + step - 1], int(token)), len(edges)))
        before = path
    sees = np.eye(len(tokens), dtype=bool)
    for column, parent in enumerate(parents):
        if parent >= 0:
            sees[column] |= sees[parent]
    pairs = np.array(list(edges), dtype=np.int64).reshape(-1, 2)
    order = np.argsort(pairs[:, 0], kind="stable")
    place = np.argsort(order, kind="stable")
    inputs = Inputs(torch.tensor([tokens]), torch.tensor([positions]), np.packbits(sees, axis=1))
    return Forest(
        inputs, pairs[order], np.array(answer, dtype=np.int64), place[np.array(edge, dtype=np.int64)], len(answers)
    )


def answer_reader(loaded: LoadedModel, forest: Forest, parameters: SamplingParameters) -> Reader:
    """A reader of last hidden states [R, 1, Q, hidden]: log probabilities of the answers, float64 [R, answers].

    They are those of the sampling distribution, truncated as each model's own probabilities say; -inf for an answer
    with a token outside. The answers were drawn from the unpruned model, so there none is outside but by rounding.
    """
    columns, row = np.unique(forest.edges[:, 0], return_inverse=True)
    token = forest.edges[:, 1]

    def read(hidden: torch.Tensor, unpruned: bool) -> np.ndarray:
        states = hidden[:, 0, torch.from_numpy(columns).to(hidden.device)].flatten(0, 1)
        rows = (np.arange(len(hidden))[:, None] * len(columns) + row).ravel()
        tokens = np.tile(token, len(hidden))
        logs = np.empty(len(rows))
        for start in range(0, len(states), LOGIT_ROWS):
            part = slice(*np.searchsorted(rows, (start, start + LOGIT_ROWS)))
            logits = logits_of(loaded, states[start : start + LOGIT_ROWS])
            logs[part] = log_probabilities(logits, rows[part] - start, tokens[part], parameters, drawn_here=unpruned)
        by_edge = logs.reshape(len(hidden), -1)
        return np.stack(
            [
                np.bincount(forest.answer, weights=logs_by_edge[forest.edge], minlength=forest.answers)
                for logs_by_edge in by_edge
            ]
        )

    return read


def log_probabilities(
    logits: torch.Tensor,
    row: np.ndarray,
    token: np.ndarray,
    parameters: SamplingParameters,
    *,
    drawn_here: bool = False,
) -> np.ndarray:
    """log p of tokens under the sampling distribution that `excise.generation.sampling` draws from, float64 [E].

    logits: [rows, vocabulary]; row, token: int [E]. A token outside the truncated set has -inf; with drawn_here it is
    counted into the set, for rounding alone can have put it outside.
    """
    rows, tokens = torch.from_numpy(row).to(logits.device), torch.from_numpy(token).to(logits.device)
    if parameters.temperature == 0:
        likeliest = (logits.argmax(dim=1)[rows] == tokens).cpu().numpy()
        return np.where(likeliest | drawn_here, 0.0, -np.inf)
    scores = logits.float() / parameters.temperature
    chosen = scores[rows, tokens].cpu().double().numpy()
    if parameters.top_p == 1 and not 0 < parameters.top_k < logits.shape[1]:
        return chosen - torch.logsumexp(scores, dim=1).cpu().double().numpy()[row]
    best = scores.amax(dim=1).cpu().double().numpy()
    normaliser = np.empty(len(logits))
    inside = np.zeros(len(row), dtype=bool)
    place = np.full(len(logits), -1)
    for part_rows, ids, cumulative in next_tokens(logits, parameters):
        share = torch.diff(cumulative, dim=1, prepend=torch.zeros((len(part_rows), 1), dtype=cumulative.dtype))
        # The likeliest token is always in the set, so its share tells what the set's probability is.
        normaliser[part_rows] = best[part_rows] - np.log(share.amax(dim=1).numpy())
        place[:] = -1
        place[part_rows] = np.arange(len(part_rows))
        here = np.flatnonzero(place[row] >= 0)
        step = max(1, (1 << 22) // ids.shape[1])
        for start in range(0, len(here), step):
            part = here[start : start + step]
            at = torch.from_numpy(place[row[part]])
            same = (ids[at] == torch.from_numpy(token[part])[:, None]) & (share[at] > 0)
            inside[part] = same.any(dim=1).numpy()
    logs = chosen - normaliser[row]
    if drawn_here:
        return np.where(inside, logs, chosen - np.logaddexp(chosen, normaliser[row]))
    return np.where(inside, logs, -np.inf)


def window_reader(loaded: LoadedModel, windows: Sequence[Window]) -> tuple[Inputs, Reader]:
    """Windows of equal length as inputs, and a reader of their last hidden states [R, B, Q, hidden]: the negative log
    likelihood of each window's scored tokens, summed, in nats, float64 [R, B]."""
    tokens = torch.tensor([list(window.tokens) for window in windows])
    scored = torch.tensor([window.scored for window in windows])
    row, column = torch.nonzero(torch.arange(tokens.shape[1]) >= tokens.shape[1] - scored[:, None], as_tuple=True)
    target = tokens[row, column]

    def read(hidden: torch.Tensor, unpruned: bool) -> np.ndarray:
        losses = np.zeros((len(hidden), len(windows)))
        for of_head, states in zip(losses, hidden, strict=True):
            before, targets, done = states[row, column - 1], target.to(states.device), 0
            for chunk in token_losses(loaded, before, targets, LOGIT_ROWS):
                rows = row[done : done + len(chunk)].numpy()
                of_head += np.bincount(rows, weights=chunk.cpu().double().numpy(), minlength=len(windows))
                done += len(chunk)
        return losses

    return Inputs(tokens), read


@dataclass(frozen=True)
class Part:
    """Chunks whose hidden states fit into memory together, and what is read from them: arguments of `every_head`.

    members: int [n], which of the answers or windows the numbers of this part belong to, in its order.
    """

    chunks: Sequence[Inputs]
    read: Sequence[Reader]
    members: np.ndarray


def answer_parts(
    loaded: LoadedModel, answers: Sequence[tuple[Sequence[int], Sequence[int]]], parameters: SamplingParameters
) -> list[Part]:
    """Parts that read the log probabilities of distinct (prompt, answer) pairs of tuples, in any order."""
    order = sorted(range(len(answers)), key=lambda index: ((*answers[index][0], *answers[index][1]), answers[index]))
    merged = forests([answers[index] for index in order], FOREST_COLUMNS[loaded.device.type])
    members = np.split(np.array(order), np.cumsum([forest.answers for forest in merged])[:-1])
    readers = [answer_reader(loaded, forest, parameters) for forest in merged]
    return _parts(loaded, [forest.inputs for forest in merged], readers, members)


def window_parts(loaded: LoadedModel, windows: Sequence[Window]) -> list[Part]:
    """Parts that read the summed losses of windows of text. Raises ExciseError for a window that cannot be scored."""
    require_windows(loaded, windows)
    budget = PASS_TOKENS[loaded.device.type] // 4  # leaves room for several heads in a pass
    lengths = np.array([len(window.tokens) for window in windows])
    members = []
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        step = max(1, budget // int(length))
        members += [alike[start : start + step] for start in range(0, len(alike), step)]
    readers = [window_reader(loaded, [windows[index] for index in part]) for part in members]
    return _parts(loaded, [inputs for inputs, _ in readers], [read for _, read in readers], members)


def _parts(
    loaded: LoadedModel, chunks: Sequence[Inputs], read: Sequence[Reader], members: Sequence[np.ndarray]
) -> list[Part]:
    width = loaded.topology.hidden * torch.finfo(loaded.dtype).bits // 8
    limit = max(1, RESIDENT_BYTES[loaded.device.type] // width)
    starts, used = [0], 0
    for index, chunk in enumerate(chunks):
        if used and used + chunk.tokens.numel() > limit:
            starts.append(index)
            used = 0
        used += chunk.tokens.numel()
    return [
        Part(chunks[start:stop], read[start:stop], np.concatenate(members[start:stop]))
        for start, stop in pairwise([*starts, len(chunks)])
    ]
