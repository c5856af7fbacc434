"""SNIP scores: how much the loss of the model's own answers hangs on each weight.

The score of a weight is |W dL/dW|, the first-order change of the loss L when it goes to zero (Lee et al. 2019), with
the absolute gradient averaged over samples (Wei et al. 2024; method, A5). Unlike Wanda it does not factorise, so dense
gradients are made for a few layers at a time; selecting weights by the score belongs to `excise.selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from excise.errors import ExciseError
from excise.models import Linear, LoadedModel
from excise.progress import Progress, silent
from excise.tree import logits_of

ACCUMULATOR_BYTES = 2 << 30
"""What the gradients of the layers taken at once may fill, where the caller does not say how many layers."""

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
) -> Iterator[tuple[str, np.ndarray]]:
    """Scores of every weight of the given roles under W weightings of the same answers, one matrix after the other.

    trunk: tokens that all prompts begin with. answers: (prompt tokens after the trunk, answer tokens with the stop
    token where there is one), each distinct pair once. weights: float [N, W], how often each weighting has the pair.
    layers_at_once: gradients of so many layers are held, and the answers pass through the model once per so many
    layers; None takes as many as `ACCUMULATOR_BYTES` hold. batch: answers per pass; it changes nothing but speed.

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
    return _scores(loaded, tuple(trunk), answers, weights, tuple(roles), layers_at_once, batch, progress, label)


def _scores(
    loaded: LoadedModel, trunk: tuple[int, ...], answers: Sequence[Answer], weights: np.ndarray,
    roles: tuple[str, ...], layers_at_once: int | None, batch: int, progress: Progress, label: str,
) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    by_layer: dict[int, list[Linear]] = {}
    for linear in loaded.topology.linears:
        if linear.role in roles:
            by_layer.setdefault(linear.layer, []).append(linear)
    layers = list(by_layer)
    if not layers:
        return
    weightings = weights.shape[1]
    if layers_at_once is None:
        layers_at_once = max(1, ACCUMULATOR_BYTES // _accumulator_bytes(loaded, by_layer.values(), weightings))
    totals = weights.sum(axis=0)
    divisor = np.where(totals > 0, totals, 1.0)
    # Rows of like length share a pass, so that little of it is padding.
    rows = [row for row in range(len(answers)) if weights[row].any()]
    rows.sort(key=lambda row: len(answers[row][0]) + len(answers[row][1]))
    rounds = [layers[start : start + layers_at_once] for start in range(0, len(layers), layers_at_once)]
    for number, some in enumerate(rounds):
        linears = {linear.module: linear for layer in some for linear in by_layer[layer]}

        def report(done: int, before: int = number * len(rows)) -> None:
            progress(label, before + done, len(rounds) * len(rows))

        gradients = _absolute_gradients(loaded, trunk, answers, weights, rows, linears, batch, report)
        for layer in some:
            for linear in by_layer[layer]:
                own = np.empty((weightings, *linear.shape), dtype=np.float32)
                size = linear.weight(loaded.model).detach().float().abs()
                for weighting, gradient in enumerate(gradients[linear.module]):
                    score = (linear.of(gradient) * size).reshape(linear.shape).cpu().numpy()
                    np.divide(score, divisor[weighting], out=own[weighting], casting="same_kind")
                yield linear.key, own
                del own
            for linear in by_layer[layer]:
                gradients.pop(linear.module, None)


def _accumulator_bytes(loaded: LoadedModel, layers: Sequence[Sequence[Linear]], weightings: int) -> int:
    """Bytes of the largest layer's accumulators."""
    modules = [{linear.module for linear in linears} for linears in layers]
    return max(
        4 * max(weightings, 1) * sum(loaded.model.get_submodule(module).weight.numel() for module in each)
        for each in modules
    )


def _absolute_gradients(
    loaded: LoadedModel, trunk: tuple[int, ...], answers: Sequence[Answer], weights: np.ndarray, rows: Sequence[int],
    linears: dict[str, Linear], batch: int, report: Callable[[int], None],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Per module the sum over rows of weight times |dL_n/dW|, float32 [W, ...] in the parameter's own layout."""
    totals = {
        module: torch.zeros(
            (weights.shape[1], *loaded.model.get_submodule(module).weight.shape),
            dtype=torch.float32,
            device=loaded.device,
        )
        for module in linears
    }
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def record(module: str):
        def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[module] = given[0].detach()
            # The graph begins at the first matrix of interest: what lies below needs no gradient and keeps nothing.
            outputs[module] = output if output.requires_grad else output.requires_grad_()

        return hook

    hooks = [loaded.model.get_submodule(module).register_forward_hook(record(module)) for module in linears]
    try:
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            with torch.inference_mode(False), torch.enable_grad():
                loss, lengths = _loss(loaded, trunk, [answers[row] for row in some])
                deltas = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
            del loss
            outputs.clear()
            with torch.no_grad():
                for module, linear in linears.items():
                    given, delta = inputs.pop(module), deltas.pop(module)
                    for place, (row, length) in enumerate(zip(some, lengths, strict=True)):
                        x, d = given[place, :length].float(), delta[place, :length].float()
                        gradient = (x.T @ d if linear.layout == "conv1d" else d.T @ x).abs_()
                        for weighting, weight in enumerate(weights[row].tolist()):
                            if weight:
                                totals[module][weighting].add_(gradient, alpha=weight)
            report(min(start + batch, len(rows)))
    finally:
        for hook in hooks:
            hook.remove()
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
    hidden = loaded.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = logits_of(loaded, hidden[place, column])
    entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(target, device=loaded.device), reduction="none")
    return (entropy * torch.tensor(share, device=loaded.device)).sum(), lengths
