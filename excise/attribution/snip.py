"""SNIP scores: how much the loss of the model's own answers hangs on each weight.

The score of a weight is |W dL/dW|, the first-order change of the loss L when it goes to zero (Lee et al. 2019), with
the absolute gradient averaged over samples (Wei et al. 2024; method, A5). Unlike Wanda it does not factorise, so dense
gradients are made for a few layers at a time; selecting weights by the score belongs to `excise.strategies.selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from excise.attribution.gradients import block_by_block, blocks, output_gradients, recorded, weight_gradient
from excise.errors import ExciseError
from excise.files.parts import Parts
from excise.generation.tree import logits_of
from excise.models.loading import LoadedModel
from excise.models.topology import Linear
from excise.progress import Progress, silent

Answer = tuple[tuple[int, ...], tuple[int, ...]]


def snip(
    loaded: LoadedModel,
    trunk: Sequence[int],
    answers: Sequence[Answer],
    weights: np.ndarray,
    *,
    roles: Sequence[str],
    layers_at_once: int | None = None,
    batch: int = 8,
    progress: Progress = silent,
    label: str = "SNIP",
    parts: Parts | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Scores of every weight of the given roles under W weightings of the same answers, one matrix after the other.

    trunk: tokens that all prompts begin with. answers: (prompt tokens after the trunk, answer tokens with the stop
    token where there is one), each distinct pair once. weights: float [N, W], how often each weighting has the pair.
    layers_at_once: gradients of so many layers are held, and the answers pass through the model once per so many
    layers; None takes as many as there is room for (`gradients.blocks`). batch: answers per pass. parts: where
    unfinished work is kept; what is there already is not computed again.

    Yields (linear key, float32 [W, out, in]), layer by layer: |W| sum_n w_n |dL_n/dW| / sum_n w_n, where L_n is the
    mean cross-entropy over the tokens of answer n alone. The gradient belongs to the whole sequence, trunk included,
    and is accumulated in float32. A weighting that has no answer scores 0. Parameters stay as they are, and need no
    `requires_grad`.

    Raises ExciseError for an empty answer or prompt, and for weights that do not fit the answers.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2 or len(weights) != len(answers):
        raise ExciseError(f"weights have shape {weights.shape}: give one row for each of the {len(answers)} answers")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ExciseError("weights must be finite and not negative: they count how often an answer was given")
    if layers_at_once is not None and layers_at_once < 1:
        raise ExciseError(f"layers_at_once is {layers_at_once}: it must be 1 at least")
    for number, (prompt, answer) in enumerate(answers):
        if not answer or not (len(trunk) or prompt):
            raise ExciseError(f"answers[{number}] has no {'prompt' if answer else 'answer'} tokens: nothing to score")
    return _scores(
        loaded, tuple(trunk), answers, weights, tuple(roles), layers_at_once, batch, progress, label, parts or Parts()
    )


def _scores(
    loaded: LoadedModel,
    trunk: tuple[int, ...],
    answers: Sequence[Answer],
    weights: np.ndarray,
    roles: tuple[str, ...],
    layers_at_once: int | None,
    batch: int,
    progress: Progress,
    label: str,
    parts: Parts,
) -> Iterator[tuple[str, np.ndarray]]:
    weightings = weights.shape[1]
    divisor = np.where(weights.any(axis=0), weights.sum(axis=0), 1.0)
    # Rows of like length share a pass, so that little of it is padding.
    rows = [row for row in range(len(answers)) if weights[row].any()]
    rows.sort(key=lambda row: len(answers[row][0]) + len(answers[row][1]))

    def scores_of(linears: Sequence[Linear], part: str, report: Callable[[int], None]) -> dict[str, np.ndarray]:
        gradients = _absolute_gradients(loaded, trunk, answers, weights, rows, linears, batch, report, parts, part)
        found = {}
        for place, linear in enumerate(linears):
            own = np.empty((weightings, *linear.shape), dtype=np.float32)
            size = linear.weight(loaded.model).detach().float().abs()
            for weighting, gradient in enumerate(gradients[linear.module]):
                score = (linear.of(gradient) * size.to(gradient.device)).reshape(linear.shape).cpu().numpy()
                np.divide(score, divisor[weighting], out=own[weighting], casting="same_kind")
            found[linear.key] = own
            if all(other.module != linear.module for other in linears[place + 1 :]):
                del gradients[linear.module]
        return found

    some = blocks(loaded, roles, max(weightings, 1), layers_at_once)
    for linears, found in block_by_block(some, len(rows), scores_of, parts, progress, label):
        for linear in linears:
            yield linear.key, found.pop(linear.key)


def _absolute_gradients(
    loaded: LoadedModel,
    trunk: tuple[int, ...],
    answers: Sequence[Answer],
    weights: np.ndarray,
    rows: Sequence[int],
    linears: Sequence[Linear],
    batch: int,
    report: Callable[[int], None],
    parts: Parts,
    part: str,
) -> dict[str, torch.Tensor]:
    """Per module the sum over rows of weight times |dL_n/dW|, float32 [W, ...] in the parameter's own layout."""
    modules = {linear.module: linear for linear in linears}
    done, state = parts.begun(part)
    totals = {
        module: torch.from_numpy(state[module]).to(linear.device(loaded.model))
        if done
        else torch.zeros(
            (weights.shape[1], *loaded.model.get_submodule(module).weight.shape),
            dtype=torch.float32,
            device=linear.device(loaded.model),
        )
        for module, linear in modules.items()
    }
    report(done)
    with recorded(loaded, modules) as calls:
        for start in range(done, len(rows), batch):
            some = rows[start : start + batch]
            with torch.inference_mode(False), torch.enable_grad():
                loss, lengths = _loss(loaded, trunk, [answers[row] for row in some])
                deltas = output_gradients(loss, calls)
            del loss
            with torch.no_grad():
                for module, linear in modules.items():
                    ((given, _),), (delta,) = calls[module], deltas.pop(module)
                    calls[module].clear()
                    for place, (row, length) in enumerate(zip(some, lengths, strict=True)):
                        gradient = weight_gradient(linear, given[place, :length], delta[place, :length]).abs_()
                        for weighting, weight in enumerate(weights[row].tolist()):
                            if weight:
                                totals[module][weighting].add_(gradient, alpha=weight)
            stop = min(start + batch, len(rows))
            parts.keep(part, stop, totals)
            report(stop)
    return totals


def _loss(loaded: LoadedModel, trunk: tuple[int, ...], answers: Sequence[Answer]) -> tuple[torch.Tensor, list[int]]:
    """The sum of the answers' losses, and how many tokens of each row are read: the answer's last one never is.

    Rows are padded on the right, where causal attention keeps the padding from all that comes before it.
    """
    read = [(*trunk, *prompt, *answer[:-1]) for prompt, answer in answers]
    lengths = [len(each) for each in read]
    tokens = torch.tensor([[*each, *[each[-1]] * (max(lengths) - len(each))] for each in read], device=loaded.device)
    place, column, target, share = [], [], [], []
    for number, (_, answer) in enumerate(answers):
        place += [number] * len(answer)
        column += range(lengths[number] - len(answer), lengths[number])
        target += answer
        share += [1 / len(answer)] * len(answer)
    hidden = loaded.last_hidden(tokens, use_cache=False)
    logits = logits_of(loaded, hidden[place, column])
    entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(target, device=loaded.device), reduction="none")
    return (entropy * torch.tensor(share, device=loaded.device)).sum(), lengths
