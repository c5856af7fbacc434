"""Runs a model again from one layer on, once per attention head that is taken out of that layer.

Everything below the layer is the same for all of its heads, so hidden states are computed once, advanced layer by
layer, and only the rest of the model runs per head, several heads side by side as rows (method, B3; design, "Reusing
samples"). Here are the passes and what is read from them: probabilities of given answers and losses of windows of
text. What they say about bias and perplexity is in `excise.attribution.head_impacts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from excise.errors import ExciseError
from excise.evaluation.perplexity import Window, require_windows
from excise.generation.sampling import LOGIT_ROWS, SamplingParameters, next_tokens
from excise.generation.tree import attention_masks, logits_of
from excise.models.loading import LoadedModel
from excise.models.memory import give_back, is_out_of_memory

PASS_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 8192}
"""Columns of one pass, all heads together; halved whenever memory runs out."""
FOREST_COLUMNS = {"cpu": 512, "cuda": 2048, "mps": 512}
"""Distinct prefixes in one row: attention grows with their square, shared prompts are read once per row."""
RESIDENT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31, "mps": 1 << 28}
"""Hidden states held at once, per kind: the ones entering a layer, its heads' outputs, the ones leaving it."""
LAYERS_RETURN_TUPLES = ("gpt_neo", "gptj")


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


# --- passes ----------------------------------------------------------------------------------------------------------


def through(
    loaded: LoadedModel, inputs: Inputs, layer: int, hidden: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one layer alone. hidden: the states entering it, [B, Q, hidden]; the first layer needs none.

    Returns the states leaving the layer, [B, Q, hidden], and its heads' outputs, which are the input of the output
    projection, [B, Q, heads * head size].
    """
    topology = loaded.topology
    layers = layers_of(loaded)
    seen: dict[str, torch.Tensor] = {}

    def keep_heads(module: torch.nn.Module, given: tuple) -> None:
        seen["heads"] = given[0]

    def keep_states(module: torch.nn.Module, given: tuple, output) -> None:
        seen["states"] = output[0] if isinstance(output, tuple) else output

    others = {each: skipping(loaded, hidden) for each in layers[:layer]}
    others |= {each: skipping(loaded, None) for each in layers[layer + 1 :]}
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
    replaced = {each: skipping(loaded, entering) for each in layers_of(loaded)[:layer]}
    replaced[topology.attention_module(loaded.model, layer)] = attend
    with forwards_replaced(replaced):
        return _forward(loaded, inputs, len(heads)).unflatten(0, (len(heads), -1))


def finished(loaded: LoadedModel, inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
    """The last hidden states, [B, Q, hidden], of the states that leave the last layer: nothing is removed."""
    with forwards_replaced({each: skipping(loaded, hidden) for each in layers_of(loaded)}):
        return _forward(loaded, inputs, 1)


def _forward(loaded: LoadedModel, inputs: Inputs, times: int) -> torch.Tensor:
    """An ordinary pass over the inputs, repeated `times`, as far as layers have not been replaced."""
    device = loaded.device
    tokens = inputs.tokens.to(device).repeat(times, 1)
    masking, positions = nullcontext(), None
    if inputs.ancestors is not None:
        sees = np.unpackbits(inputs.ancestors, axis=1, count=tokens.shape[1]).view(bool)
        positions = inputs.positions.to(device)
        masking = attention_masks(loaded, torch.from_numpy(sees)[None].to(device), positions, positions)
        positions = positions.expand(times, -1)  # while one mask serves all rows
    with masking as mask:
        return loaded.last_hidden(tokens, position_ids=positions, attention_mask=mask, use_cache=False)


def layers_of(loaded: LoadedModel) -> list[torch.nn.Module]:
    return list(loaded.model.get_submodule(loaded.topology.layer_path))


def skipping(loaded: LoadedModel, hidden: torch.Tensor | None) -> Callable:
    """A layer's forward that returns these states instead, or, without any, the ones it is given."""

    def forward(given: torch.Tensor, *others, **named):
        output = given if hidden is None else hidden
        return (output, None) if loaded.topology.architecture in LAYERS_RETURN_TUPLES else output

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
    last = max((layer for layer, some in heads.items() if some), default=-1)
    widest = max(chunk.tokens.numel() for chunk in chunks)
    at_once = max(1, PASS_TOKENS[loaded.device.type] // widest)
    hidden: list[torch.Tensor | None] = [None] * len(chunks)
    with torch.inference_mode():
        for layer in range(loaded.topology.layers if unpruned else last + 1):
            leaving, written = zip(
                *(through(loaded, chunk, layer, states) for chunk, states in zip(chunks, hidden, strict=True)),
                strict=True,
            )
            todo = list(heads.get(layer, ()))
            while todo:
                # Batches of equal size: a last one of a single head would use the processor badly.
                count = -(-len(todo) // -(-len(todo) // at_once))
                try:
                    rows = [
                        reader(onward(loaded, chunk, layer, states, outputs, todo[:count]), False)
                        for chunk, reader, states, outputs in zip(chunks, read, hidden, written, strict=True)
                    ]
                except ExciseError as error:
                    heads_out = f"head{'' if count == 1 else 's'} {', '.join(map(str, todo[:count]))} of layer {layer}"
                    raise ExciseError(f"without {heads_out}: {error}") from error
                except (MemoryError, RuntimeError) as error:
                    if count == 1 or not is_out_of_memory(error):
                        raise
                    at_once = count // 2
                    give_back(loaded.device)
                    continue
                for head, numbers in zip(todo[:count], np.concatenate(rows, axis=1), strict=True):
                    keep(layer, head, numbers)
                todo = todo[count:]
                on_heads(count)
            hidden = list(leaving)
        if unpruned:
            rows = [
                reader(finished(loaded, chunk, states)[None], True)
                for chunk, reader, states in zip(chunks, read, hidden, strict=True)
            ]
            keep(None, None, np.concatenate(rows, axis=1)[0])


# --- answers ---------------------------------------------------------------------------------------------------------


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
    made, start = [], 0
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
        made.append(_forest(answers[start:stop]))
        start = stop
    return made


def _path(answer: tuple[Sequence[int], Sequence[int]]) -> tuple[int, ...]:
    """The tokens of a pair that are columns: its last token is predicted, but predicts nothing."""
    return (*answer[0], *answer[1][:-1])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _new_columns(answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    paths = [_path(each) for each in answers]
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
        found = np.empty(len(rows))
        for start in range(0, len(states), LOGIT_ROWS):
            part = slice(*np.searchsorted(rows, (start, start + LOGIT_ROWS)))
            logits = logits_of(loaded, states[start : start + LOGIT_ROWS])
            found[part] = log_probabilities(logits, rows[part] - start, tokens[part], parameters, drawn_here=unpruned)
        by_edge = found.reshape(len(hidden), -1)
        return np.stack(
            [np.bincount(forest.answer, weights=each[forest.edge], minlength=forest.answers) for each in by_edge]
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
    own = scores[rows, tokens].cpu().double().numpy()
    if parameters.top_p == 1 and not 0 < parameters.top_k < logits.shape[1]:
        return own - torch.logsumexp(scores, dim=1).cpu().double().numpy()[row]
    best = scores.amax(dim=1).cpu().double().numpy()
    normaliser = np.empty(len(logits))
    inside = np.zeros(len(row), dtype=bool)
    place = np.full(len(logits), -1)
    for some, ids, cumulative in next_tokens(logits, parameters):
        share = torch.diff(cumulative, dim=1, prepend=torch.zeros((len(some), 1), dtype=cumulative.dtype))
        # The likeliest token is always in the set, so its share tells what the set's probability is.
        normaliser[some] = best[some] - np.log(share.amax(dim=1).numpy())
        place[:] = -1
        place[some] = np.arange(len(some))
        here = np.flatnonzero(place[row] >= 0)
        step = max(1, (1 << 22) // ids.shape[1])
        for start in range(0, len(here), step):
            part = here[start : start + step]
            at = torch.from_numpy(place[row[part]])
            same = (ids[at] == torch.from_numpy(token[part])[:, None]) & (share[at] > 0)
            inside[part] = same.any(dim=1).numpy()
    found = own - normaliser[row]
    if drawn_here:
        return np.where(inside, found, own - np.logaddexp(own, normaliser[row]))
    return np.where(inside, found, -np.inf)


# --- windows of text -------------------------------------------------------------------------------------------------


def window_reader(loaded: LoadedModel, windows: Sequence[Window]) -> tuple[Inputs, Reader]:
    """Windows of equal length as inputs, and a reader of their last hidden states [R, B, Q, hidden]: the negative log
    likelihood of each window's scored tokens, summed, in nats, float64 [R, B]."""
    tokens = torch.tensor([list(window.tokens) for window in windows])
    row = np.repeat(np.arange(len(windows)), [window.scored for window in windows])
    column = np.concatenate([np.arange(tokens.shape[1] - window.scored, tokens.shape[1]) for window in windows])
    target = tokens[torch.from_numpy(row), torch.from_numpy(column)]

    def read(hidden: torch.Tensor, unpruned: bool) -> np.ndarray:
        losses = np.zeros((len(hidden), len(windows)))
        for each, states in zip(losses, hidden, strict=True):
            for start in range(0, len(row), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                logits = logits_of(loaded, states[torch.from_numpy(row[part]), torch.from_numpy(column[part] - 1)])
                loss = torch.nn.functional.cross_entropy(logits, target[part].to(logits.device), reduction="none")
                each += np.bincount(row[part], weights=loss.cpu().double().numpy(), minlength=len(windows))
        return losses

    return Inputs(tokens), read


# --- work in parts ---------------------------------------------------------------------------------------------------


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
    made = forests([answers[index] for index in order], FOREST_COLUMNS[loaded.device.type])
    members = np.split(np.array(order), np.cumsum([forest.answers for forest in made])[:-1])
    readers = [answer_reader(loaded, forest, parameters) for forest in made]
    return _parts(loaded, [forest.inputs for forest in made], readers, members)


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
    made = [window_reader(loaded, [windows[index] for index in some]) for some in members]
    return _parts(loaded, [inputs for inputs, _ in made], [read for _, read in made], members)


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
