"""`attention`: how much each head looks at the subject's name while the model writes its answer.

The score of a head is the attention probability from the generated tokens to the tokens of the name (BDB, section 4;
method, A7). It is read from the answer trees, one layer at a time, and reduced at once, so that no more than one
layer's probabilities are ever held. Finding the name's tokens belongs to `excise.models.encoding`, choosing heads
to `excise.strategies.selection`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from excise.attribution import files
from excise.attribution.answered import Answered
from excise.attribution.score import COUNTS, FRACTIONS, Decisive, Score, Streams, Tensors, Wanted, by_group
from excise.conditions import CONTROLS
from excise.errors import ExciseError
from excise.files.parts import Work
from excise.models.hooks import hooked

if TYPE_CHECKING:
    import torch

    from excise.generation.tree import AnswerTree
    from excise.models.loading import LoadedModel

REDUCTIONS = ("mean", "max")
BATCH = 8
"""Prompts of a pass."""


def attention_to_name(
    loaded: LoadedModel,
    trunk: Sequence[int],
    trees: Sequence[AnswerTree],
    names: Sequence[tuple[int, int]],
    *,
    work: Work | None = None,
) -> dict[str, np.ndarray]:
    """Attention from the generated tokens to the subject's name, per head, under W weightings of the same answers.

    trees: one per prompt, each visit counted per weighting. names: per tree the columns of its prompt that carry the
    name, from the first to one past the last; columns of the trunk never do. Returns {"mean", "max"}: float32
    [W, layers, heads], the mean over all generated tokens of all answers (columns from `prompt_length` on, weighed by
    their visits) of the mean, or the largest, attention probability among the name's tokens. The last token of the
    prompt, which draws the answer's first, does not count, nor does a token that ends an answer. A token that several
    answers share is computed once and counted as often as it is shared. Sums are kept batch by batch.

    Raises ExciseError for a weighting without a generated token, and for a name that is empty or not in its prompt.
    """
    import torch

    from excise.generation.tree import Rows, pack

    work = work or Work("attention")
    batch = work.batch or BATCH
    steps = _steps(trees, names)
    topology = loaded.topology
    sums = torch.zeros((len(REDUCTIONS), len(steps), topology.layers, topology.heads), dtype=torch.float64)
    done, state = work.parts.begun("attention")
    if done:
        sums.copy_(torch.from_numpy(state["sums"]))
    rows: list[tuple[slice, slice, torch.Tensor]] = []

    def record(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            for row, (generated, name, visits) in enumerate(rows):
                to_name = output[1][row, :, generated, name].float()
                for reduction, reduced in enumerate((to_name.mean(dim=2), to_name.amax(dim=2))):
                    sums[reduction, :, layer] += (reduced @ visits.to(reduced.device)).T.cpu()

        return hook

    with torch.inference_mode(), _eager(loaded):
        shared = Rows(loaded, trunk)
        hooks = (
            topology.attention_module(loaded.model, layer).register_forward_hook(record(layer))
            for layer in range(topology.layers)
        )
        with hooked(hooks):
            work.report(done, len(trees))
            for first in range(done, len(trees), batch):
                part = trees[first : first + batch]
                rows[:] = [
                    (
                        slice(tree.prompt_length, len(tree.tokens)),
                        slice(len(trunk) + start, len(trunk) + end),
                        torch.from_numpy(tree.visits[tree.prompt_length :]).float().to(loaded.device),
                    )
                    for tree, (start, end) in zip(part, names[first : first + batch], strict=True)
                ]
                packed = pack(part, len(trunk))
                shared.copy(len(part)).forward(packed.tokens, packed.positions, packed.attends)
                done = min(first + batch, len(trees))
                work.parts.keep("attention", done, {"sums": sums})
                work.report(done, len(trees))
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
    model = loaded.model
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def read_attention(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Scores of an `attention` file: {"mean" or "max": {weighting: float32 [layers, heads]}}; weightings as norms."""
    tensors, metadata = files.load(path)
    names = json.loads(metadata["weightings"])
    return {how: dict(zip(names, tensors[how], strict=True)) for how in REDUCTIONS}


def _decided_by(answered: Answered) -> Decisive:
    return replace(by_group(answered), prompts=[list(prompt.name) for prompt in answered.encoded])


def _measure(answered: Answered, work: Work) -> Tensors:
    weightings = answered.weightings()
    weights = np.stack([rows.astype(np.float64) for rows in weightings.values()], axis=1)
    trees, names = answered.trees(weights)
    trunk = answered.encoded[0].tokens[: answered.trunk()]
    scores = attention_to_name(answered.loaded, trunk, trees, names, work=work)
    return Tensors(scores, {"weightings": json.dumps(list(weightings))})


def _read(path: Path, wanted: Wanted) -> Streams:
    heads = read_attention(path)[wanted.reduce]
    return Streams(("heads",), lambda key, weighting: heads[weighting])


def _enough_written(rows: pl.DataFrame, groups: Sequence[str]) -> bool:
    """Whether each group, and each half of any relabelling of the names, has an answer with a token to attend from."""
    wrote = pl.col("token_ids").list.len() - pl.col("finished").cast(pl.Int64) > 0
    names = rows.group_by("group", "subject").agg(wrote=wrote.any())
    sizes = dict(names.group_by("group").len().iter_rows())
    writing = dict(names.group_by("group").agg(pl.col("wrote").sum()).iter_rows())
    silent = names.height - sum(writing.values())
    return min(writing.get(group, 0) for group in groups) > 0 and silent < min(sizes.values())


SCORE = Score(
    "attention",
    selection="set_difference",
    ablations=("zero_query", "zero_output"),
    parameters=(FRACTIONS, COUNTS),
    optional=("votes",),
    controls=CONTROLS,
    version="5",
    able=_enough_written,
    decided_by=_decided_by,
    measure=_measure,
    read=_read,
)
