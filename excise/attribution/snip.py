"""`snip`: how much the loss of the model's own answers hangs on each weight.

The score of a weight is |W dL/dW|, the first-order change of the loss L when it goes to zero (Lee et al. 2019), with
the absolute gradient averaged over samples (Wei et al. 2024; method, A5). Unlike Wanda it does not factorise, so dense
gradients are made for a few layers at a time; selecting weights by the score belongs to `excise.strategies.selection`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.attribution import files
from excise.attribution.answered import Answered
from excise.attribution.gradients import (
    Block,
    block_by_block,
    blocks,
    kept_shape,
    output_gradients,
    recorded,
    weight_gradient,
)
from excise.attribution.score import FRACTIONS, Decisive, Score, Stream, Streams, Wanted
from excise.errors import ExciseError
from excise.files.parts import Work
from excise.models.topology import ROLES

if TYPE_CHECKING:
    import torch

    from excise.models.loading import LoadedModel

Answer = tuple[tuple[int, ...], tuple[int, ...]]
BATCH = 8
"""Answers of a pass."""
SAMPLES = 4
"""Samples per prompt that are taken: every answer needs a backward pass of its own."""
WEIGHTINGS = ("minority", "majority")


def snip(
    loaded: LoadedModel,
    trunk: Sequence[int],
    answers: Sequence[Answer],
    weights: np.ndarray,
    *,
    roles: Sequence[str] = ROLES,
    work: Work | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Scores of every weight of the given roles under W weightings of the same answers, one matrix after the other.

    trunk: tokens that all prompts begin with. answers: (prompt tokens after the trunk, answer tokens with the stop
    token where there is one), each distinct pair once. weights: float [N, W], how often each weighting has the pair.
    The answers pass through the model once per block of layers; what of the work is there already is not computed
    again.

    Yields (linear key, float32 [W, out, in]), layer by layer: |W| sum_n w_n |dL_n/dW| / sum_n w_n, where L_n is the
    mean cross-entropy over the tokens of answer n alone. The gradient belongs to the whole sequence, trunk included,
    and is accumulated in float32. A weighting that has no answer scores 0. Parameters stay as they are, and need no
    `requires_grad`.

    Raises ExciseError for an empty answer or prompt, and for weights that do not fit the answers.
    """
    work = work or Work("SNIP")
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2 or len(weights) != len(answers):
        raise ExciseError(f"weights have shape {weights.shape}: give one row for each of the {len(answers)} answers")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ExciseError("weights must be finite and not negative: they count how often an answer was given")
    if work.layers_at_once is not None and work.layers_at_once < 1:
        raise ExciseError(f"layers_at_once is {work.layers_at_once}: it must be 1 at least")
    for number, (prompt, answer) in enumerate(answers):
        if not answer or not (len(trunk) or prompt):
            raise ExciseError(f"answers[{number}] has no {'prompt' if answer else 'answer'} tokens: nothing to score")
    return _scores(loaded, tuple(trunk), answers, weights, roles, work)


def _scores(
    loaded: LoadedModel,
    trunk: tuple[int, ...],
    answers: Sequence[Answer],
    weights: np.ndarray,
    roles: Sequence[str],
    work: Work,
) -> Iterator[tuple[str, np.ndarray]]:
    weightings = weights.shape[1]
    divisor = np.where(weights.any(axis=0), weights.sum(axis=0), 1.0)
    # Rows of like length share a pass, so that little of it is padding.
    rows = [row for row in range(len(answers)) if weights[row].any()]
    rows.sort(key=lambda row: len(answers[row][0]) + len(answers[row][1]))

    def scores_of(block: Block) -> dict[str, np.ndarray]:
        gradients = _absolute_gradients(loaded, trunk, answers, weights, rows, block, work.batch or BATCH)
        scores = {}
        for place, linear in enumerate(block.linears):
            array = np.empty((weightings, *linear.shape), dtype=np.float32)
            size = linear.weight(loaded.model).detach().float().abs()
            for weighting, gradient in enumerate(gradients[linear.module]):
                score = (linear.of(gradient) * size.to(gradient.device)).reshape(linear.shape).cpu().numpy()
                np.divide(score, divisor[weighting], out=array[weighting], casting="same_kind")
            scores[linear.key] = array
            if all(other.module != linear.module for other in block.linears[place + 1 :]):
                del gradients[linear.module]
        return scores

    layer_blocks = blocks(loaded, roles, max(weightings, 1), work.layers_at_once)
    for linears, scores in block_by_block(layer_blocks, len(rows), scores_of, work):
        for linear in linears:
            yield linear.key, scores.pop(linear.key)


def _absolute_gradients(
    loaded: LoadedModel,
    trunk: tuple[int, ...],
    answers: Sequence[Answer],
    weights: np.ndarray,
    rows: Sequence[int],
    block: Block,
    batch: int,
) -> dict[str, torch.Tensor]:
    """Per module the sum over rows of weight times |dL_n/dW|, float32 [W, ...] in the parameter's own layout."""
    import torch

    modules = {linear.module: linear for linear in block.linears}
    done, state = block.parts.begun(block.name)
    totals = {
        module: torch.from_numpy(state[module]).to(linear.device(loaded.model))
        if done
        else torch.zeros(
            (weights.shape[1], *kept_shape(loaded, module)), dtype=torch.float32, device=linear.device(loaded.model)
        )
        for module, linear in modules.items()
    }
    block.report(done)
    with recorded(loaded, modules) as calls:
        for start in range(done, len(rows), batch):
            part = rows[start : start + batch]
            with torch.inference_mode(False), torch.enable_grad():
                loss, lengths = _loss(loaded, trunk, [answers[row] for row in part])
                deltas = output_gradients(loss, calls)
            del loss
            with torch.no_grad():
                for module, linear in modules.items():
                    ((given, _),), (delta,) = calls[module], deltas.pop(module)
                    calls[module].clear()
                    for place, (row, length) in enumerate(zip(part, lengths, strict=True)):
                        gradient = weight_gradient(linear, given[place, :length], delta[place, :length]).abs_()
                        for weighting, weight in enumerate(weights[row].tolist()):
                            if weight:
                                totals[module][weighting].add_(gradient, alpha=weight)
            stop = min(start + batch, len(rows))
            block.parts.keep(block.name, stop, totals)
            block.report(stop)
    return totals


def _loss(loaded: LoadedModel, trunk: tuple[int, ...], answers: Sequence[Answer]) -> tuple[torch.Tensor, list[int]]:
    """The sum of the answers' losses, and how many tokens of each row are read: the answer's last one never is.

    Rows are padded on the right, where causal attention keeps the padding from all that comes before it.
    """
    import torch

    from excise.generation.tree import logits_of

    read = [(*trunk, *prompt, *answer[:-1]) for prompt, answer in answers]
    lengths = [len(tokens) for tokens in read]
    padded = [[*tokens, *[tokens[-1]] * (max(lengths) - len(tokens))] for tokens in read]
    place: list[int] = []
    column: list[int] = []
    target: list[int] = []
    share: list[float] = []
    for number, (_, answer) in enumerate(answers):
        place += [number] * len(answer)
        column += range(lengths[number] - len(answer), lengths[number])
        target += answer
        share += [1 / len(answer)] * len(answer)
    hidden = loaded.last_hidden(torch.tensor(padded, device=loaded.device), use_cache=False)
    logits = logits_of(loaded, hidden[place, column])
    entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(target, device=loaded.device), reduction="none")
    return (entropy * torch.tensor(share, device=loaded.device)).sum(), lengths


def read_snip(path: Path, key: str, weighting: str) -> np.ndarray:
    """Scores of one matrix, float32 [out, in], for `weighting` minority or majority; only these are read."""
    from safetensors import safe_open

    files.require(path)
    with safe_open(path, framework="numpy") as file:
        return file.get_slice(key)[WEIGHTINGS.index(weighting)]


def _decided_by(answered: Answered) -> Decisive:
    return Decisive(answered.completions.filter(pl.col("sample") < SAMPLES), ["token_ids"])


def _measure(answered: Answered, work: Work) -> Stream:
    from excise.generation.tree import common_prefix

    length = common_prefix([prompt.tokens for prompt in answered.encoded])
    tokens = {prompt.prompt_id: prompt.tokens[length:] for prompt in answered.encoded}
    counted = (
        answered.completions.filter(pl.col("group").is_in(answered.groups) & (pl.col("sample") < SAMPLES))
        .group_by("prompt_id", "group", "token_ids", maintain_order=True)
        .agg(pl.len().alias("times"))
    )
    answers = [(tokens[prompt], tuple(ids)) for prompt, ids in counted.select("prompt_id", "token_ids").iter_rows()]
    sides = [counted["group"].to_numpy() == getattr(answered.comparison, side) for side in WEIGHTINGS]
    weights = np.stack([side * counted["times"].to_numpy().astype(float) for side in sides], axis=1)
    linears = answered.loaded.topology.linears
    return Stream(
        {linear.key: (len(WEIGHTINGS), *linear.shape) for linear in linears},
        snip(answered.loaded, answered.encoded[0].tokens[:length], answers, weights, work=work),
    )


def _read(path: Path, wanted: Wanted) -> Streams:
    keys = tuple(linear.key for linear in wanted.linears)
    return Streams(keys, lambda key, weighting: read_snip(path, key, weighting))


SCORE = Score(
    "snip",
    selection="set_difference",
    ablations=("zero_weights",),
    parameters=(FRACTIONS,),
    optional=("votes",),
    scopes=("matrix", "row", "global"),
    version="5",
    decided_by=_decided_by,
    measure=_measure,
    read=_read,
)
