"""The usual way to do what `excise` does, written plainly and without needless work, to be timed beside it.

Each function follows a published method or the habit of its users: transformers' `generate`, one sequence after the
other, dense scores on disk, index tensors. They use the same model, prompts and settings as ours and give the same
kind of result. Nothing of the product imports them; what is compared with what is told in `bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from excise.generation.sampling import SamplingParameters
from excise.models.loading import LoadedModel
from excise.models.topology import SITES

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt tokens, answer tokens) pairs."""


def generated(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], samples: int, parameters: SamplingParameters, per_call: int
) -> list[torch.Tensor]:
    """Samples by `generate(num_return_sequences=per_call)`, prompt after prompt; rows of token ids per call."""
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)], device=loaded.device)
            for start in range(0, samples, per_call):
                count = min(per_call, samples - start)
                options = _generation(loaded, parameters) | {"num_return_sequences": count}
                found.append(loaded.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options))
    return found


def generated_from_prompt(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], samples: int, parameters: SamplingParameters, per_call: int
) -> list[torch.Tensor]:
    """The same with each prompt read once: its keys and values are repeated for the samples of a call."""
    from transformers import DynamicCache

    found = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)], device=loaded.device)
            read = loaded.model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            for start in range(0, samples, per_call):
                count = min(per_call, samples - start)
                cache = DynamicCache()
                for number, layer in enumerate(read.layers):
                    cache.update(layer.keys.repeat(count, 1, 1, 1), layer.values.repeat(count, 1, 1, 1), number)
                many = tokens.repeat(count, 1)
                options = _generation(loaded, parameters) | {"past_key_values": cache}
                found.append(loaded.model.generate(many, attention_mask=torch.ones_like(many), **options))
    return found


def _generation(loaded: LoadedModel, parameters: SamplingParameters) -> dict[str, object]:
    stops = sorted(loaded.stop_tokens)
    return {
        "do_sample": True,
        "temperature": parameters.temperature,
        "top_k": parameters.top_k,
        "top_p": parameters.top_p,
        "max_new_tokens": parameters.max_new_tokens,
        "eos_token_id": stops,
        "pad_token_id": stops[0],
    }


def input_norms(loaded: LoadedModel, sequences: Sequences) -> dict[tuple[int, str], np.ndarray]:
    """Wanda's input norms of one group (Sun et al. 2024): one sequence at a time, as the published code does it.

    float32 [in] per (layer, site): the root of the mean over sequences of the sum of squares over tokens.
    """
    sums = {
        (layer, site): torch.zeros(loaded.topology.site_width(layer, site), dtype=torch.float64)
        for layer in range(loaded.topology.layers)
        for site in SITES
    }

    def adding(key: tuple[int, str]) -> Callable:
        def hook(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            sums[key] += given[0][0].float().square().sum(dim=0).cpu()

        return hook

    hooks = [loaded.topology.site_module(loaded.model, *key).register_forward_pre_hook(adding(key)) for key in sums]
    try:
        with torch.inference_mode():
            for prompt, answer in sequences:
                loaded.model.base_model(torch.tensor([[*prompt, *answer]], device=loaded.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: (total / len(sequences)).sqrt().float().numpy() for key, total in sums.items()}


def write_dense_scores(loaded: LoadedModel, norms: dict[tuple[int, str], np.ndarray], path: Path) -> int:
    """|W| times norm of every matrix, float32, in one file of safetensors; its size in bytes."""
    from safetensors.numpy import save_file

    scores = {}
    for linear in loaded.topology.linears:
        weight = linear.weight(loaded.model).detach().float().reshape(linear.shape).abs().cpu().numpy()
        scores[linear.key] = weight * norms[linear.layer, linear.site]
    save_file(scores, path)
    return path.stat().st_size


def snip_of_layer(loaded: LoadedModel, sequences: Sequences, layer: int) -> dict[str, torch.Tensor]:
    """SNIP scores of one layer's matrices (Wei et al. 2024): one answer at a time, gradients of this layer alone.

    |W| times the mean over answers of |dL/dW|, L the mean cross-entropy of the answer's tokens.
    """
    modules = {
        linear.module: loaded.model.get_submodule(linear.module).weight
        for linear in loaded.topology.linears
        if linear.layer == layer
    }
    totals = {name: torch.zeros_like(weight) for name, weight in modules.items()}
    for weight in modules.values():
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            for prompt, answer in sequences:
                tokens = torch.tensor([[*prompt, *answer]], device=loaded.device)
                hidden = loaded.model.base_model(tokens, use_cache=False).last_hidden_state
                logits = loaded.model.get_output_embeddings()(hidden[0, len(prompt) - 1 : -1])
                loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, len(prompt) :])
                for name, gradient in zip(modules, torch.autograd.grad(loss, list(modules.values())), strict=True):
                    totals[name] += gradient.abs()
    finally:
        for weight in modules.values():
            weight.requires_grad_(False)
    return {name: total * modules[name].detach().abs() / len(sequences) for name, total in totals.items()}


def shared_indices(rows: Sequence[Sequence[torch.Tensor]], columns: Sequence[Sequence[torch.Tensor]]) -> np.ndarray:
    """Overlap counts [rows, columns] of masks kept as index tensors, one per matrix, by `torch.isin`."""
    return np.array(
        [
            [sum(int(torch.isin(a, b).sum()) for a, b in zip(row, column, strict=True)) for column in columns]
            for row in rows
        ]
    )


def set_difference_indices(
    minority: torch.Tensor, majority: torch.Tensor, tau_min: float, tau_maj: float
) -> torch.Tensor:
    """BDB's set difference of flat scores by `topk` and `isin`: indices of the chosen weights."""
    own = minority.flatten().topk(int(tau_min * minority.numel())).indices
    other = majority.flatten().topk(int(tau_maj * majority.numel())).indices
    return own[~torch.isin(own, other)]


def read_through(paths: Sequence[Path], piece: int = 1 << 23) -> int:
    """Read files from first to last byte and do nothing with them; the number of bytes."""
    buffer, total = bytearray(piece), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total
