"""Input norms for the Wanda score, per group of prompts, in one pass over the answer trees.

The score of a weight is |W| times the norm of its input (BDB, section 3; Sun et al. 2024). It factorises, so only the
norms are kept: one vector per site and weighting, a few megabytes where dense scores take gigabytes. Selecting weights
by the score belongs to `excise.strategies.selection`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from excise.files.parts import Parts
from excise.generation.tree import AnswerTree, Rows, pack
from excise.models.loading import LoadedModel
from excise.models.topology import SITES, Linear
from excise.progress import Progress, silent


def input_norms(
    loaded: LoadedModel,
    trunk: Sequence[int],
    trees: Sequence[AnswerTree],
    totals: np.ndarray,
    *,
    batch: int = 16,
    progress: Progress = silent,
    label: str = "input norms",
    parts: Parts | None = None,
) -> dict[tuple[int, str], np.ndarray]:
    """Norms of every site's input under W weightings of the same sequences.

    trees: one per prompt, each visit counted per weighting. totals: number of sequences of each weighting, [W].
    Returns {(layer, site): float32 [W, in_features]}: sqrt(1/N sum_n sum_t x[n,t]^2), over all tokens of prompt and
    answer (the token that ends it is never read), accumulated in float64. A token that several sequences share is
    computed once and counted as often as it is shared. parts: where sums are kept batch by batch, to go on from.
    """
    parts = parts or Parts()
    done, state = parts.begun("norms")
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

    def record(layer: int, site: str):
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            squares = arguments[0].flatten(0, 1).float().square()
            found = weights[0].to(squares.device).T @ squares
            sums[layer, site] += found.to(sums[layer, site].device).double()

        return hook

    hooks = [
        loaded.topology.site_module(loaded.model, layer, site).register_forward_pre_hook(record(layer, site))
        for layer, site in sums
    ]
    try:
        with torch.inference_mode():
            counted = totals if done == 0 else np.zeros_like(totals)  # what is kept has the trunk in it
            weights[:] = [torch.from_numpy(np.repeat(counted[None], len(trunk), axis=0)).float().to(loaded.device)]
            shared = Rows(loaded, trunk)
            progress(label, done, len(trees))
            for start in range(done, len(trees), batch):
                some = trees[start : start + batch]
                packed = pack(some, len(trunk))
                weights[:] = [packed.visits.flatten(0, 1).float().to(loaded.device)]
                shared.copy(len(some)).forward(packed.tokens, packed.positions, packed.attends)
                done = min(start + batch, len(trees))
                parts.keep("norms", done, named)
                progress(label, done, len(trees))
    finally:
        for hook in hooks:
            hook.remove()
    divisor = np.maximum(totals, 1)[:, None]
    return {key: np.sqrt(total.cpu().numpy() / divisor).astype(np.float32) for key, total in sums.items()}


def _accumulator(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cpu")  # others have no float64


def wanda_scores(loaded: LoadedModel, linear: Linear, norms: np.ndarray) -> np.ndarray:
    """Scores of one matrix, float32 [out, in], from the norms of its input, [in]."""
    weight = linear.weight(loaded.model).detach().float().cpu().reshape(linear.shape).numpy()
    return np.abs(weight) * norms
