"""Attention to the name: how much each head looks at the subject while the model writes its answer.

The score of a head is the attention probability from the generated tokens to the tokens of the name (BDB, section 4;
method, A7). It is read from the answer trees, one layer at a time, and reduced at once, so that no more than one
layer's probabilities are ever held. Finding the name's tokens belongs to `excise.models.encoding`, choosing heads
to `excise.strategies.selection`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from excise.errors import ExciseError
from excise.files.parts import Parts
from excise.generation.tree import AnswerTree, Rows, pack
from excise.models.loading import LoadedModel
from excise.progress import Progress, silent

REDUCTIONS = ("mean", "max")


def attention_to_name(
    loaded: LoadedModel,
    trunk: Sequence[int],
    trees: Sequence[AnswerTree],
    names: Sequence[tuple[int, int]],
    *,
    batch: int = 8,
    progress: Progress = silent,
    label: str = "attention",
    parts: Parts | None = None,
) -> dict[str, np.ndarray]:
    """Attention from the generated tokens to the subject's name, per head, under W weightings of the same answers.

    trees: one per prompt, each visit counted per weighting. names: per tree the columns of its prompt that carry the
    name, from the first to one past the last; columns of the trunk never do. Returns {"mean", "max"}: float32
    [W, layers, heads], the mean over all generated tokens of all answers (columns from `prompt_length` on, weighed by
    their visits) of the mean, or the largest, attention probability among the name's tokens. The last token of the
    prompt, which draws the answer's first, does not count, nor does a token that ends an answer. A token that several
    answers share is computed once and counted as often as it is shared.

    parts: where sums are kept batch by batch, to go on from.
    Raises ExciseError for a weighting without a generated token, and for a name that is empty or not in its prompt.
    """
    steps = _steps(trees, names)
    topology = loaded.topology
    sums = torch.zeros((len(REDUCTIONS), len(steps), topology.layers, topology.heads), dtype=torch.float64)
    parts = parts or Parts()
    done, state = parts.begun("attention")
    if done:
        sums.copy_(torch.from_numpy(state["sums"]))
    rows: list[tuple[slice, slice, torch.Tensor]] = []

    def record(layer: int):
        def hook(module: torch.nn.Module, given: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            for row, (generated, name, visits) in enumerate(rows):
                to_name = output[1][row, :, generated, name].float()
                for each, reduced in enumerate((to_name.mean(dim=2), to_name.amax(dim=2))):
                    sums[each, :, layer] += (reduced @ visits.to(reduced.device)).T.cpu()

        return hook

    hooks = []
    try:
        with torch.inference_mode(), _eager(loaded):
            shared = Rows(loaded, trunk)
            for layer in range(topology.layers):
                hooks.append(topology.attention_module(loaded.model, layer).register_forward_hook(record(layer)))
            progress(label, done, len(trees))
            for first in range(done, len(trees), batch):
                some = trees[first : first + batch]
                rows[:] = [
                    (
                        slice(tree.prompt_length, len(tree.tokens)),
                        slice(len(trunk) + start, len(trunk) + end),
                        torch.from_numpy(tree.visits[tree.prompt_length :]).float().to(loaded.device),
                    )
                    for tree, (start, end) in zip(some, names[first : first + batch], strict=True)
                ]
                packed = pack(some, len(trunk))
                shared.copy(len(some)).forward(packed.tokens, packed.positions, packed.attends)
                done = min(first + batch, len(trees))
                parts.keep("attention", done, {"sums": sums})
                progress(label, done, len(trees))
    finally:
        for hook in hooks:
            hook.remove()
    scores = (sums.numpy() / steps[:, None, None]).astype(np.float32)
    return dict(zip(REDUCTIONS, scores, strict=True))


def _steps(trees: Sequence[AnswerTree], names: Sequence[tuple[int, int]]) -> np.ndarray:
    """Number of generated tokens read under each weighting, float [W]."""
    if len(trees) != len(names) or not trees:
        raise ExciseError(f"attention: {len(trees)} prompts and {len(names)} names; give one name per prompt")
    for index, (tree, (start, end)) in enumerate(zip(trees, names, strict=True)):
        if not 0 <= start < end <= tree.prompt_length:
            raise ExciseError(
                f"attention: the name of prompt {index} is at columns {start} to {end} of {tree.prompt_length}: "
                "it must lie within the prompt's own tokens, after the trunk"
            )
    steps = sum(tree.visits[tree.prompt_length :].sum(axis=0) for tree in trees)
    if not (steps > 0).all():
        raise ExciseError(
            f"attention: weighting {int(np.argmin(steps > 0))} has no generated token, so no attention to the name; "
            "draw more samples or answers of more than one token"
        )
    return steps


@contextmanager
def _eager(loaded: LoadedModel) -> Iterator[None]:
    """The model computes its attention openly: the faster ways do not give the probabilities."""
    model, before = loaded.model, loaded.model.config._attn_implementation
    if before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
