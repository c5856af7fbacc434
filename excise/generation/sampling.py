"""Draws answers from a causal language model, many per prompt, at the price of the distinct ones.

The trunk that all prompts share is read once, the rest of each prompt once, and then samples of one prompt that have
drawn the same tokens so far stay one column of a tree (`excise.generation.tree`) until they part. The noise of a draw
depends on (seed, prompt, sample, step) alone, so the batch size does not matter and a pruned model meets the same noise
as the unpruned one. Parsing and caching of answers live in `excise.generation.completions`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from excise.errors import ExciseError
from excise.generation.tree import Rows, common_prefix, logits_of, read_prompts
from excise.models.encoding import require_positions
from excise.models.loading import LoadedModel
from excise.models.memory import shrinking_batches

PREFILL_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 8192}
"""Tokens of a first batch, by device; halved whenever memory runs out."""
LOGIT_ROWS = 128
"""Next-token distributions held at once."""


@dataclass(frozen=True)
class SamplingParameters:
    """How answers are drawn. temperature 0 takes the likeliest token; top_k 0 and top_p 1 switch the truncation off.

    Truncation follows the usual order: temperature, then top-k, then the smallest set whose probability reaches top-p.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    max_new_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        # Logits over a smaller temperature would be infinite.
        temperature = self.temperature == 0 or 1e-6 <= self.temperature < math.inf
        whole = all(isinstance(count, int) for count in (self.top_k, self.max_new_tokens, self.seed))
        numbers = whole and temperature and 0 < self.top_p <= 1 and 0 <= self.seed < 2**63
        if not numbers or self.top_k < 0 or self.max_new_tokens < 1:
            raise ExciseError(
                "sampling parameters out of range (temperature 0 or >= 1e-6, top_k >= 0, 0 < top_p <= 1, "
                f"max_new_tokens >= 1, 0 <= seed < 2^63): {asdict(self)}"
            )


@dataclass(frozen=True)
class Draw:
    """One sampled answer: its tokens without the stop token, and that stop token (None: cut off by max_new_tokens)."""

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    stop: int | None


def sample(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sequence[int]],
    parameters: SamplingParameters,
    *,
    batch_prompts: int | None = None,
    on_batch: Callable[[list[Draw]], None] = lambda draws: None,
) -> list[Draw]:
    """Draw answers.

    prompts: token ids per prompt. samples: the sample numbers wanted of each prompt. batch_prompts: prompts per batch
    (default: as many as the device takes). on_batch receives each finished batch. Returns all draws, by prompt and
    sample. Raises ExciseError for a prompt that leaves no room for an answer, and for logits that are not finite.
    """
    wanted = [index for index, numbers in enumerate(samples) if len(numbers)]
    if not wanted:
        return []
    for index in wanted:
        require_positions(loaded, f"prompt {index}", len(prompts[index]), parameters.max_new_tokens)
    draws: list[Draw] = []
    with torch.inference_mode():
        trunk = Rows(loaded, prompts[wanted[0]][: common_prefix([prompts[index] for index in wanted])])
        queue = sorted(wanted, key=lambda index: (len(prompts[index]), index))
        longest = len(prompts[queue[-1]]) - trunk.trunk
        size = batch_prompts or max(1, PREFILL_TOKENS[loaded.device.type] // longest)

        def draw(batch: Sequence[int]) -> list[Draw]:
            return _sample_batch(trunk, batch, [prompts[i] for i in batch], [samples[i] for i in batch], parameters)

        for _, drawn in shrinking_batches(queue, size, loaded.device, draw):
            on_batch(drawn)
            draws += drawn
    return sorted(draws, key=lambda draw: (draw.prompt, draw.sample))


def uniforms(seed: int, prompt: Sequence[int], samples: Sequence[int], steps: int) -> np.ndarray:
    """The noise of a prompt's draws: float64 [samples, steps] in [0, 1), by the counter-based Philox generator."""
    digest = hashlib.sha256(np.asarray(prompt, dtype="<i8").tobytes()).digest()
    key = np.array([seed, int.from_bytes(digest[:8], "little")], dtype=np.uint64)
    return np.stack(
        [np.random.Generator(np.random.Philox(key=key, counter=[0, 0, number, 0])).random(steps) for number in samples]
    )


def _sample_batch(
    trunk: Rows,
    indices: Sequence[int],
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sequence[int]],
    parameters: SamplingParameters,
) -> list[Draw]:
    """Draw the samples of a batch of prompts. indices: the numbers of the prompts."""
    loaded = trunk.loaded
    rows, hidden = read_prompts(trunk, prompts)
    depth = np.array([len(prompt) for prompt in prompts])

    # One node per distinct token prefix; each live sample stands at one node.
    node_row = np.arange(len(prompts))
    node_sees = np.arange(rows.columns) < depth[:, None]
    owner = np.repeat(node_row, [len(numbers) for numbers in samples])
    at = owner.copy()
    steps = parameters.max_new_tokens
    noise = np.concatenate(
        [uniforms(parameters.seed, prompt, wanted, steps) for prompt, wanted in zip(prompts, samples, strict=True)]
    )
    live = np.arange(len(owner))
    drawn = np.zeros(noise.shape, dtype=np.int64)
    counts = np.zeros(len(owner), dtype=np.int64)
    stop_of = np.full(len(owner), -1)
    stops = np.array(sorted(loaded.stop_tokens))
    for step in range(parameters.max_new_tokens):
        token = _draw(loaded, hidden, at, noise[live, step], parameters)
        ended = np.isin(token, stops)
        stop_of[live[ended]] = token[ended]
        live, at, token = live[~ended], at[~ended], token[~ended]
        drawn[live, step] = token
        counts[live] += 1
        if not len(live) or step == parameters.max_new_tokens - 1:
            break
        edges, at = np.unique(np.stack([at, token]), axis=1, return_inverse=True)
        at = at.reshape(-1)
        parents, edge_tokens = edges
        node_row, node_sees = node_row[parents], node_sees[parents]
        kept = np.unique(node_row)
        if len(kept) < len(depth):
            rows.keep(kept)
            depth = depth[kept]
            node_row = np.searchsorted(kept, node_row)
        slot = np.arange(len(node_row)) - np.searchsorted(node_row, node_row)
        width = slot.max() + 1
        new = np.zeros((len(node_row), width), dtype=bool)
        new[np.arange(len(node_row)), slot] = True
        node_sees = np.concatenate([node_sees, new], axis=1)
        tokens = np.zeros((len(depth), width), dtype=np.int64)
        tokens[node_row, slot] = edge_tokens
        attends = np.zeros((len(depth), width, node_sees.shape[1]), dtype=bool)
        attends[node_row, slot] = node_sees
        positions = np.repeat(depth[:, None] + step, width, axis=1)
        hidden = rows.forward(*map(torch.from_numpy, (tokens, positions, attends)))
        hidden = hidden[torch.from_numpy(node_row), torch.from_numpy(slot)]
    numbers = np.concatenate([np.asarray(wanted) for wanted in samples])
    draws = []
    for index, row in enumerate(owner.tolist()):
        stop = int(stop_of[index]) if stop_of[index] >= 0 else None
        draws.append(Draw(indices[row], int(numbers[index]), tuple(drawn[index, : counts[index]].tolist()), stop))
    return draws


def _draw(
    loaded: LoadedModel, hidden: torch.Tensor, at: np.ndarray, noise: np.ndarray, parameters: SamplingParameters
) -> np.ndarray:
    """One token per sample: hidden [nodes, hidden], at [samples] names each sample's node, noise [samples]."""
    token = np.empty(len(at), dtype=np.int64)
    for start in range(0, len(hidden), LOGIT_ROWS):
        here = np.flatnonzero((at >= start) & (at < start + LOGIT_ROWS))
        for nodes, ids, cumulative in next_tokens(logits_of(loaded, hidden[start : start + LOGIT_ROWS]), parameters):
            place = np.full(LOGIT_ROWS, -1)
            place[nodes] = np.arange(len(nodes))
            among = here[place[at[here] - start] >= 0]
            row = torch.from_numpy(place[at[among] - start])
            choice = torch.searchsorted(cumulative[row], torch.from_numpy(noise[among])[:, None], right=True)[:, 0]
            token[among] = ids[row, choice.clamp(max=ids.shape[1] - 1)].numpy()
    return token


def next_tokens(
    logits: torch.Tensor, parameters: SamplingParameters
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """The sampling distribution of each row of logits, [rows, vocabulary].

    Yields (row numbers [R], token ids [R, k] in ascending order, cumulative probabilities float64 [R, k]) on the CPU;
    rows whose truncated set is small come first, so that the whole vocabulary is sorted for none that does not need it.
    """
    rows = np.arange(len(logits))
    if parameters.temperature == 0:
        yield rows, logits.argmax(dim=1).cpu()[:, None], torch.ones((len(rows), 1), dtype=torch.float64)
        return
    vocabulary = logits.shape[1]
    scores = logits.float() / parameters.temperature
    size = min(parameters.top_k or 32, vocabulary)
    if parameters.top_p == 1 and not parameters.top_k:
        size = vocabulary
    total: torch.Tensor | None = None
    while len(rows):
        if size == vocabulary and parameters.top_p == 1:
            ids = torch.arange(vocabulary).expand(len(rows), -1)
            probability = torch.softmax(scores[torch.from_numpy(rows)].cpu().double(), dim=1)
            yield rows, ids, _cumulate(probability)
            return
        if total is None and not parameters.top_k:
            total = torch.logsumexp(scores, dim=1, keepdim=True)
        chosen = torch.from_numpy(rows).to(scores.device)
        top, ids = scores[chosen].topk(size, dim=1)
        normaliser = torch.logsumexp(top, dim=1, keepdim=True) if total is None else total[chosen]
        probability = torch.exp(top - normaliser).cpu().double()
        before = probability.cumsum(dim=1) - probability
        complete = (
            (before[:, -1] + probability[:, -1] >= parameters.top_p).numpy()
            | bool(parameters.top_k)
            | (size == vocabulary)
        )
        if complete.any():
            here = torch.from_numpy(np.flatnonzero(complete))
            # With top-p off nothing goes, though the rounded sum before the last tokens may have reached 1.
            reach = parameters.top_p if parameters.top_p < 1 else math.inf
            inside = (before[here] < reach) | (torch.arange(size) == 0)
            # Tokens outside the set go last with no probability; the rest stand in the order of their ids.
            order = torch.where(inside, ids.cpu()[here], vocabulary).sort(dim=1)
            kept = torch.where(inside, probability[here], 0.0).gather(1, order.indices)
            last = int(inside.sum(dim=1).max())
            yield rows[complete], ids.cpu()[here].gather(1, order.indices)[:, :last], _cumulate(kept[:, :last])
        rows = rows[~complete]
        size = min(size * 8, vocabulary)


def _cumulate(probability: torch.Tensor) -> torch.Tensor:
    cumulative = probability.cumsum(dim=1)
    return cumulative / cumulative[:, -1:]
