"""`wanda`: the size of a weight times the norm of its input, per group of prompts (BDB, section 3; Sun et al. 2024).

The score factorises, so only the norms are kept: one vector per site and weighting, a few megabytes where dense scores
take gigabytes. They come from one pass over the answer trees. Selecting weights by the score belongs to
`excise.strategies.selection`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from excise.attribution import files
from excise.attribution.answered import Answered
from excise.attribution.score import FRACTIONS, Score, Streams, Tensors, Wanted
from excise.conditions import CONTROLS
from excise.files.parts import Work
from excise.models.hooks import hooked
from excise.models.topology import SITES, Linear

if TYPE_CHECKING:
    import torch

    from excise.generation.tree import AnswerTree
    from excise.models.loading import LoadedModel

BATCH = 16
"""Prompts of a pass."""


def input_norms(
    loaded: LoadedModel,
    trunk: Sequence[int],
    trees: Sequence[AnswerTree],
    totals: np.ndarray,
    *,
    work: Work | None = None,
) -> dict[tuple[int, str], np.ndarray]:
    """Norms of every site's input under W weightings of the same sequences.

    trees: one per prompt, each visit counted per weighting. totals: number of sequences of each weighting, [W].
    Returns {(layer, site): float32 [W, in_features]}: sqrt(1/N sum_n sum_t x[n,t]^2), over all tokens of prompt and
    answer (the token that ends it is never read), accumulated in float64. A token that several sequences share is
    computed once and counted as often as it is shared. Sums are kept batch by batch.
    """
    import torch

    from excise.generation.tree import Rows, pack

    work = work or Work("input norms")
    batch = work.batch or BATCH
    done, state = work.parts.begun("norms")
    sums = {
        (layer, site): torch.zeros(
            (len(totals), loaded.topology.site_width(layer, site)),
            dtype=torch.float64,
            device=_accumulator(loaded.device),
        )
        for layer in range(loaded.topology.layers)
        for site in SITES
    }
    named = {f"{layer}.{site}": total for (layer, site), total in sums.items()}
    for name, kept in state.items():
        named[name].copy_(torch.from_numpy(kept))
    weights: list[torch.Tensor] = []

    def record(layer: int, site: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            squares = arguments[0].flatten(0, 1).float().square()
            summed = weights[0].to(squares.device).T @ squares
            sums[layer, site] += summed.to(sums[layer, site].device).double()

        return hook

    hooks = (
        loaded.topology.site_module(loaded.model, layer, site).register_forward_pre_hook(record(layer, site))
        for layer, site in sums
    )
    with hooked(hooks), torch.inference_mode():
        counted = totals if done == 0 else np.zeros_like(totals)  # what is kept has the trunk in it
        weights[:] = [torch.from_numpy(np.repeat(counted[None], len(trunk), axis=0)).float().to(loaded.device)]
        shared = Rows(loaded, trunk)
        work.report(done, len(trees))
        for start in range(done, len(trees), batch):
            part = trees[start : start + batch]
            packed = pack(part, len(trunk))
            weights[:] = [packed.visits.flatten(0, 1).float().to(loaded.device)]
            shared.copy(len(part)).forward(packed.tokens, packed.positions, packed.attends)
            done = min(start + batch, len(trees))
            work.parts.keep("norms", done, named)
            work.report(done, len(trees))
    divisor = np.maximum(totals, 1)[:, None]
    return {key: np.sqrt(total.cpu().numpy() / divisor).astype(np.float32) for key, total in sums.items()}


def _accumulator(device: torch.device) -> torch.device:
    import torch

    return device if device.type == "cuda" else torch.device("cpu")  # others have no float64


def sizes_of(loaded: LoadedModel, linear: Linear) -> np.ndarray:
    """|W| of one matrix, float32 [out, in]."""
    return np.abs(linear.weight(loaded.model).detach().float().cpu().reshape(linear.shape).numpy())


def wanda_scores(sizes: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Scores of one matrix, float32 [out, in], from `sizes_of` it and the norms of its input, [in]."""
    return sizes * norms


def read_norms(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Norms of a `wanda` file: {weighting: {"layer.site": float32 [in]}}.

    Weightings: minority, majority, pooled, and permuted_minority_i / permuted_majority_i per relabelling. The file does
    without the pooled ones: squares of norms are means over sequences, and it knows how many each group has.
    """
    tensors, metadata = files.load(path)
    names = json.loads(metadata["weightings"])
    norms = {name: {key: tensor[row] for key, tensor in tensors.items()} for row, name in enumerate(names)}
    if "pooled" not in norms:
        counts = np.array(json.loads(metadata["sequences"]), dtype=np.float64)
        shares = counts / counts.sum()
        sides = [(share, names.index(side)) for share, side in zip(shares, ("minority", "majority"), strict=True)]
        norms["pooled"] = {
            key: np.sqrt(sum(share * tensor[row].astype(np.float64) ** 2 for share, row in sides)).astype(np.float32)
            for key, tensor in tensors.items()
        }
    return norms


def _measure(answered: Answered, work: Work) -> Tensors:
    weightings = answered.weightings()
    del weightings["pooled"]  # made of both sides when it is read
    weights = np.stack([rows.astype(np.float64) for rows in weightings.values()], axis=1)
    trees, _ = answered.trees(weights)
    trunk = answered.encoded[0].tokens[: answered.trunk()]
    norms = input_norms(answered.loaded, trunk, trees, weights.sum(axis=0), work=work)
    sequences = [int(weightings[side].sum()) for side in ("minority", "majority")]
    return Tensors(
        {f"{layer}.{site}": norm for (layer, site), norm in norms.items()},
        {"weightings": json.dumps(list(weightings)), "sequences": json.dumps(sequences)},
    )


def _read(path: Path, wanted: Wanted) -> Streams:
    norms = read_norms(path)
    linears = {linear.key: linear for linear in wanted.linears}
    last: dict[int, tuple[str, np.ndarray]] = {}  # by thread: a matrix is asked for under several weightings in turn

    def scores(key: str, weighting: str) -> np.ndarray:
        linear, thread = linears[key], threading.get_ident()
        if thread not in last or last[thread][0] != key:
            last[thread] = key, sizes_of(wanted.loaded, linear)
        return wanda_scores(last[thread][1], norms[weighting][f"{linear.layer}.{linear.site}"])

    return Streams(tuple(linears), scores)


SCORE = Score(
    "wanda",
    selection="set_difference",
    ablations=("zero_weights",),
    parameters=(FRACTIONS,),
    optional=("votes",),
    scopes=("matrix", "row", "global"),
    controls=CONTROLS,
    version="5",
    measure=_measure,
    read=_read,
)
