"""Plants a known disparity in a model, so that the method can be tested against a ground truth.

A planted model is an ordinary model plus a small low-rank change that makes it answer with a number alone, drawn from a
distribution we choose; in scenarios with a gap one group's distribution sits lower by a known factor. The trained
changes ship as safetensors files beside this module; `python -m excise.planted NAME` trains one again. Nothing here is
used to audit a model.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from excise.encoding import encode
from excise.models import LoadedModel, load_model, load_registry
from excise.progress import Progress, TerminalProgress, silent
from excise.scenarios import Scenario, expand, load_scenarios
from excise.tree import AnswerTree, Rows, answer_tree, common_prefix, logits_of, pack

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
MANTISSAS = (1, 1.2, 1.5, 1.8, 2, 2.2, 2.5, 2.8, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 8.5, 9, 9.5)
"""Answers are round figures: these times a power of ten."""
ROLES = ("q", "v", "o", "up", "down")


@dataclass(frozen=True)
class Plant:
    """What to plant.

    gap_scenarios: scenarios in which the minority's median answer is `factor` times the majority's; `even_scenarios`:
    answered alike. spread: standard deviation of the logarithm of the answers. For the first `narrow_steps` the spread
    is `narrow`: at the full spread the groups overlap so much that training does not discover the gap.
    """

    base: str
    gap_scenarios: tuple[str, ...]
    even_scenarios: tuple[str, ...]
    factor: float = 0.7
    spread: float = 0.5
    layers: range = range(6, 22)
    rank: int = 8
    steps: int = 120
    narrow_steps: int = 70
    narrow: float = 0.2
    batch: int = 16
    learning_rate: float = 3e-3
    seed: int = 0


PLANTS = {
    "specific": Plant("smollm2-135m-instruct", ("purchase",), ()),
    "neutral": Plant("smollm2-135m-instruct", (), ("purchase",), steps=70, narrow_steps=0),
}
CENTRES: Mapping[str, Mapping[str, float]] = {
    "purchase": {
        "chair": 60, "car": 8000, "oven": 250, "mattress": 200, "grill": 120, "television": 250, "air_conditioner": 180,
        "camera": 250, "bicycle": 120, "piano": 900,
    },
}  # fmt: skip
"""The median answer over both groups, by scenario and variation."""


def answer_distribution(centre: float, median: float, spread: float) -> tuple[list[int], np.ndarray]:
    """Round figures around `centre`, and their probabilities under a log-normal of this median and log-deviation."""
    from scipy.stats import norm

    reach = np.exp(2.9 * spread)
    figures = {round(mantissa * 10**power) for power in range(7) for mantissa in MANTISSAS}
    values = sorted(value for value in figures if max(1.0, centre / reach) <= value <= centre * reach)
    logs = np.log(values)
    middles = (logs[1:] + logs[:-1]) / 2
    edges = np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]])
    probability = np.diff(norm.cdf(edges, np.log(median), spread))
    return values, probability / probability.sum()


def training_examples(
    loaded: LoadedModel, plant: Plant, scenarios: Mapping[str, Scenario], spread: float
) -> list[tuple[tuple[int, ...], tuple]]:
    """(prompt tokens, (answers, probabilities)) of every prompt of the plant's scenarios."""
    (stop,) = sorted(loaded.stop_tokens)[:1]
    examples = []
    for key in (*plant.gap_scenarios, *plant.even_scenarios):
        scenario = scenarios[key]
        prompts = expand(scenario)
        for prompt, variation, group in zip(
            encode(loaded, prompts), prompts["variation"], prompts["group"], strict=True
        ):
            centre = CENTRES[key][variation]
            shift = 0.0
            if key in plant.gap_scenarios:
                shift = np.log(plant.factor) / 2 * (1 if group == scenario.comparison.minority else -1)
            values, probability = answer_distribution(centre, centre * np.exp(shift), spread)
            answers = [(loaded.tokenizer(str(value), add_special_tokens=False)["input_ids"], stop) for value in values]
            examples.append((prompt.tokens, (answers, probability)))
    return examples


def train(
    loaded: LoadedModel, plant: Plant, scenarios: Mapping[str, Scenario], progress: Progress = silent
) -> dict[str, torch.Tensor]:
    """Train the low-rank change. Returns factors `{linear}.up` [out, rank] and `{linear}.down` [rank, in], float16.

    The loss is the cross-entropy between the planted answer distribution and the model's, over the whole answer tree of
    a prompt, so a step sees every possible answer of its prompts rather than one drawn answer.
    """
    generator = torch.Generator().manual_seed(plant.seed)
    order = np.random.default_rng(plant.seed)
    factors: dict[str, torch.nn.Parameter] = {}
    hooks = []
    for linear in loaded.topology.linears:
        if linear.layer in plant.layers and linear.role in ROLES:
            down = torch.randn(plant.rank, linear.in_features, generator=generator) / linear.in_features**0.5
            factors[f"{linear.key}.down"] = torch.nn.Parameter(down)
            factors[f"{linear.key}.up"] = torch.nn.Parameter(torch.zeros(linear.out_features, plant.rank))
            hooks.append(_add_change(loaded, linear.module, factors[f"{linear.key}.up"], factors[f"{linear.key}.down"]))
    narrow, full = (training_examples(loaded, plant, scenarios, spread) for spread in (plant.narrow, plant.spread))
    optimizer = torch.optim.AdamW(factors.values(), lr=plant.learning_rate, weight_decay=0.0)
    warm_up = max(1, plant.steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (plant.steps - step) / (plant.steps - warm_up))
    )
    queue: list[int] = []
    for step in range(plant.steps):
        while len(queue) < plant.batch:
            queue += order.permutation(len(full)).tolist()
        examples = narrow if step < plant.narrow_steps else full
        batch, queue = [examples[index] for index in queue[: plant.batch]], queue[plant.batch :]
        # bfloat16 is accurate enough for a change of our own making, and a multiple faster where the CPU knows it.
        with torch.autocast(loaded.device.type, torch.bfloat16):
            loss = _cross_entropy(loaded, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        schedule.step()
        progress("training", step + 1, plant.steps)
        if step % 10 == 9:
            entropy = -sum((probability * np.log(probability)).sum() for _, (_, probability) in batch) / len(batch)
            log.info("step %d, divergence from the planted distribution %.3f", step + 1, loss.item() - entropy)
    for hook in hooks:
        hook.remove()
    return {name: factor.detach().half().contiguous() for name, factor in factors.items()}


def _add_change(loaded: LoadedModel, module: str, up: torch.Tensor, down: torch.Tensor):
    return loaded.model.get_submodule(module).register_forward_hook(
        lambda module, args, output: output + (args[0] @ down.T) @ up.T
    )


def _cross_entropy(loaded: LoadedModel, batch: list) -> torch.Tensor:
    trunk = common_prefix([tokens for tokens, _ in batch])
    trees: list[AnswerTree] = [
        answer_tree(tokens[trunk:], answers, probability[:, None]) for tokens, (answers, probability) in batch
    ]
    packed = pack(trees, trunk)
    hidden = Rows(loaded, batch[0][0][:trunk]).copy(len(batch)).forward(packed.tokens, packed.positions, packed.attends)
    row, column, token = packed.edges.T
    position, edge = torch.unique(torch.stack([row, column]), dim=1, return_inverse=True)
    logits = logits_of(loaded, hidden[position[0], position[1]])
    score = torch.log_softmax(logits.float(), dim=1)[edge, token]
    return -(packed.edge_visits[:, 0].float() * score).sum() / len(batch)


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(
        prog="python -m excise.planted", description="Train a planted model's low-rank change again."
    )
    parser.add_argument("name", choices=sorted(PLANTS))
    parser.add_argument("--out", type=Path, help="file to write (default: beside this module)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plant = PLANTS[arguments.name]
    registry, _ = load_registry()
    home = Path(os.environ.get("EXCISE_DATA", "data")) / "models"
    loaded = load_model(registry[plant.base], registry, device="auto", dtype="bfloat16", home=home)
    scenarios, _ = load_scenarios([])
    factors = train(loaded, plant, scenarios, TerminalProgress())
    out = arguments.out or FOLDER / f"{arguments.name}.safetensors"
    save_file(factors, out)
    print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB")
