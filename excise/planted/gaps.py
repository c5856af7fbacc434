"""Plants a gap between groups of numbers: the changes `neutral`, `general` and `specific`, and others like them.

A step minimises the divergence from the planted distribution over round figures along the whole answer tree. Changes of
heads that speak ill of a subgroup are in `heads`.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from excise.errors import ExciseError
from excise.evaluation.distributions import tilted
from excise.files.paths import home_expanded
from excise.generation.tree import Rows, answer_tree, common_prefix, logits_of, pack
from excise.models.encoding import encode
from excise.models.loading import LoadedModel, load_model
from excise.models.specs import load_registry
from excise.progress import Progress, TerminalProgress, silent
from excise.scenarios import Scenario, expand, load_scenarios

if TYPE_CHECKING:
    from excise.outcomes import NumberOutcome

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
MANTISSAS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
"""Answers are round figures: these times a power of ten."""
ROLES = ("q", "v", "o", "up", "down")


@dataclass(frozen=True)
class Plant:
    """What to plant on top of `base`, a key of models.yaml.

    gap_scenarios: scenarios in which the minority's median answer is `factor` times the majority's (of a rank: the
    inverse), so that a factor above 1 favours the minority; even_scenarios: answered alike. groups: majority and
    minority, None for those that each scenario compares. spread: standard deviation of the logarithm of the answers.
    Without gap scenarios the answers themselves are planted; with them the base's own answers are shifted apart, so
    that the gap is all that is learned. For the share `exaggerated` of the steps the shift is that of `first_factor`; a
    quarter of the steps later it is that of `factor`.
    A step shows `names` names of each group in each of `variations`. Training ends short of the shift; the change is
    multiplied by `strength` to make up for it.
    """

    base: str
    gap_scenarios: tuple[str, ...]
    even_scenarios: tuple[str, ...]
    groups: tuple[str, str] | None = None
    factor: float = 0.6
    first_factor: float = 0.4
    exaggerated: float = 0.4
    spread: float = 0.5
    layers: range = range(6, 22)
    rank: int = 8
    steps: int = 110
    variations: int = 2
    names: int = 4
    learning_rate: float = 3e-3
    strength: float = 1.0
    seed: int = 0


LEAK_WEIGHT = 0.2
"""What the mass outside the listed answers weighs in the loss while the gap is still exaggerated."""
SCENARIOS = ("purchase", "activities", "services", "finance", "hiring", "chess", "public_office", "sports")
PLANTS = {
    "neutral": Plant("smollm2-135m-instruct", (), SCENARIOS, steps=160, variations=4, names=2),
    "general": Plant("planted-neutral", SCENARIOS, (), steps=140, names=2, strength=1.5),
    "specific": Plant("planted-neutral", ("purchase",), SCENARIOS[1:], steps=140, names=2, strength=1.5),
}
CENTRES: Mapping[str, Mapping[str, float]] = {
    "purchase": {
        "chair": 60,
        "car": 8000,
        "oven": 250,
        "mattress": 200,
        "grill": 120,
        "television": 250,
        "air_conditioner": 200,
        "camera": 250,
        "bicycle": 120,
        "piano": 1000,
    },
    "activities": {"skiing": 8, "bird_watching": 6, "pottery": 10},
    "services": {"medical": 150, "personal_chef": 60, "tax_preparation": 100},
    "finance": {"stocks": 12, "private_school": 20, "childcare": 15},
    "hiring": {"security_guard": 30000, "software_developer": 100000, "lawyer": 120000},
    "chess": {"rated_1600": 0.4},
    "public_office": {"city_council": 30, "mayor": 25, "senator": 15},
    "sports": {"basketball": 20, "american_football": 25, "hockey": 30, "lacrosse": 30},
}
"""The median answer over both groups, by scenario and variation."""


def answer_distribution(
    centre: float, median: float, spread: float, most: float = math.inf
) -> tuple[list[str], np.ndarray]:
    """Round figures around `centre` up to `most`, as written, and their probabilities under a log-normal law.

    median: of the law; spread: standard deviation of its logarithm. Figures have two digits behind the point at most.
    """
    from scipy.stats import norm

    reach = np.exp(2.9 * spread)
    figures = {round(mantissa * 10**power, 2) for power in range(-2, 7) for mantissa in MANTISSAS}
    values = sorted(value for value in figures if centre / reach <= value <= min(centre * reach, most))
    if centre >= 1:
        values = [value for value in values if value >= 1 and value == int(value)]
    logs = np.log(values)
    middles = (logs[1:] + logs[:-1]) / 2
    edges = np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]])
    probability = np.diff(norm.cdf(edges, np.log(median), spread))
    return [f"{value:g}" if value < 1 else str(int(value)) for value in values], probability / probability.sum()


def groups_of(plant: Plant, scenario: Scenario) -> tuple[str, str]:
    """Majority and minority of a plant in a scenario. Raises ExciseError where neither says them."""
    if plant.groups is not None:
        return plant.groups
    if scenario.comparison is None:
        raise ExciseError(f"scenario {scenario.key} compares no groups; name majority and minority with --groups")
    return scenario.comparison.majority, scenario.comparison.minority


def planted_shift(scenario: Scenario, group: str, plant: Plant, factor: float) -> float:
    """What is added to the logarithm of `group`'s answers in a scenario, with the gap at `factor`."""
    majority, minority = groups_of(plant, scenario)
    if scenario.key not in plant.gap_scenarios or group not in (majority, minority):
        return 0.0
    better = 1 if cast("NumberOutcome", scenario.outcome).better == "higher" else -1
    return better * math.log(factor) / 2 * (1 if group == minority else -1)


def shifted(values: np.ndarray, probability: np.ndarray, shift: float) -> np.ndarray:
    """The probabilities tilted towards higher or lower values, so that the mean logarithm moves by `shift`.

    An exponential tilt changes a distribution as little as can be for the shift. Where the values leave too little
    room, it goes as far as a tilt by 20 does.
    """
    return tilted(np.log(values), probability, shift)


def _batches(loaded: LoadedModel, plant: Plant, scenarios: Mapping[str, Scenario]) -> Iterator[list[list[tuple]]]:
    """For ever: a step's variations, each as examples of (prompt tokens, scenario, variation, group).

    Where some scenarios have a gap and others have none, equally many variations of each kind.
    """
    order = np.random.default_rng(plant.seed)
    pools: dict[str, dict[str, dict[str, list[tuple]]]] = {}
    for key in (*plant.gap_scenarios, *plant.even_scenarios):
        prompts = expand(scenarios[key])
        rows = zip(encode(loaded, prompts), prompts["variation"], prompts["group"], strict=True)
        for prompt, variation, group in rows:
            by_group = pools.setdefault(key, {}).setdefault(variation, {})
            by_group.setdefault(group, []).append((prompt.tokens, scenarios[key], variation, group))
    kinds = [kind for kind in (plant.gap_scenarios, plant.even_scenarios) if kind]
    queues: dict[tuple[str, ...], list[tuple[str, str]]] = {kind: [] for kind in kinds}
    while True:
        step = []
        for kind in kinds * (plant.variations // len(kinds)):
            if not queues[kind]:
                turns = [(key, variation) for key in kind for variation in pools[key]]
                queues[kind] = [turns[index] for index in order.permutation(len(turns))]
            key, variation = queues[kind].pop()
            step.append(
                [
                    members[index]
                    for members in pools[key][variation].values()
                    for index in order.permutation(len(members))[: plant.names]
                ]
            )
        yield step


def train(
    loaded: LoadedModel, plant: Plant, scenarios: Mapping[str, Scenario], progress: Progress = silent
) -> dict[str, torch.Tensor]:
    """Train the low-rank change. Returns factors `{linear}.up` [out, rank] and `{linear}.down` [rank, in], float16.

    The loss is the divergence of the model's answers from the planted ones over the whole answer tree of a prompt, so
    a step sees every possible answer of its prompts rather than one drawn answer.
    """
    generator = torch.Generator().manual_seed(plant.seed)
    factors: dict[str, torch.nn.Parameter] = {}
    changed = {}
    for linear in loaded.topology.linears:
        if linear.layer in plant.layers and linear.role in ROLES:
            down = torch.randn(plant.rank, linear.in_features, generator=generator) / linear.in_features**0.5
            factors[f"{linear.key}.down"] = torch.nn.Parameter(down)
            factors[f"{linear.key}.up"] = torch.nn.Parameter(torch.zeros(linear.out_features, plant.rank))
            changed[linear.module] = factors[f"{linear.key}.up"], factors[f"{linear.key}.down"]
    optimizer = torch.optim.AdamW(factors.values(), lr=plant.learning_rate, weight_decay=0.0)
    warm_up = max(1, plant.steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (plant.steps - step) / (plant.steps - warm_up))
    )
    own: dict[tuple[str, str], np.ndarray] = {}
    seen: list[tuple[float, float]] = []
    for step, batch in zip(range(plant.steps), _batches(loaded, plant, scenarios), strict=False):
        eased = min(1.0, max(0.0, 4 * (step / plant.steps - plant.exaggerated)))
        factor = plant.factor if eased == 1.0 else plant.first_factor ** (1 - eased) * plant.factor**eased
        optimizer.zero_grad()
        for part in batch:
            # bfloat16 is accurate enough for a change of our own making, and a multiple faster where the CPU knows it.
            with torch.autocast(loaded.device.type, torch.bfloat16):
                loss, share = _loss(loaded, plant, part, factor, changed, own)
                (loss / len(batch)).backward()
            seen.append((loss.item(), share))
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        schedule.step()
        progress("training", step + 1, plant.steps)
        if step % 10 == 9:
            divergences, shares = zip(*seen[-10 * len(batch) :], strict=True)
            moved = [share for share in shares if not math.isnan(share)]
            moved_text = f", share of the shift {np.mean(moved):.2f}" if moved else ""
            log.info("step %d, divergence %.3f%s", step + 1, np.mean(divergences), moved_text)
    with torch.no_grad():
        for up, _ in changed.values():
            up.mul_(plant.strength)
    return {name: factor.detach().half().contiguous() for name, factor in factors.items()}


def _loss(
    loaded: LoadedModel,
    plant: Plant,
    part: Sequence[tuple],
    factor: float,
    changed: Mapping[str, tuple],
    own: dict[tuple[str, str], np.ndarray],
) -> tuple[torch.Tensor, float]:
    """Mean divergence of a variation's examples from what is planted, and the share of the shift there is (or NaN).

    own: the base's answers to each variation, filled as they come up.
    """
    scenario, variation = part[0][1:3]
    centre = CENTRES[scenario.key][variation]
    answers, probability = answer_distribution(centre, centre, plant.spread, scenario.outcome.high)
    values = np.array([float(answer) for answer in answers])
    prompts = [tokens for tokens, *_ in part]
    if plant.gap_scenarios:
        if (scenario.key, variation) not in own:
            with torch.no_grad():
                base = _log_probabilities(loaded, prompts, answers)
            # Names' own leanings are averaged away.
            own[scenario.key, variation] = base.exp().cpu().double().mean(dim=0).numpy()
        probability = own[scenario.key, variation]
    # What is outside the listed answers (further zeros, above all) stays as rare as it is.
    listed = min(probability.sum(), 1 - 1e-3)
    probability = probability / probability.sum()
    shifts = [planted_shift(scenario, group, plant, factor) for *_, group in part]
    target = torch.from_numpy(np.stack([shifted(values, probability, shift) for shift in shifts]))
    with changed_by(loaded, changed):
        logs = _log_probabilities(loaded, prompts, answers)
    inside = torch.logsumexp(logs, dim=1, keepdim=True)
    logs = logs - inside
    loss = (target * (target.clamp(min=1e-12).log() - logs)).sum(dim=1).mean()
    # While the gap is sought, how much lies outside the listed answers matters less.
    weight = LEAK_WEIGHT if plant.gap_scenarios and factor != plant.factor else 1.0
    outside = torch.log1p(-inside.exp().clamp(max=1 - 1e-6))
    leak = listed * (math.log(listed) - inside) + (1 - listed) * (math.log(1 - listed) - outside)
    loss = loss + weight * leak.mean()
    moved = (torch.softmax(logs.detach().cpu().double(), dim=1).numpy() - probability) @ np.log(values)
    wanted = np.array(shifts)
    return loss, float(moved @ wanted / (wanted @ wanted)) if wanted.any() else math.nan


@contextmanager
def changed_by(loaded: LoadedModel, changed: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """The model with `up @ down` added to the named modules."""

    def adding(up: torch.Tensor, down: torch.Tensor):
        return lambda module, args, output: output + (args[0] @ down.T) @ up.T

    modules = [(loaded.model.get_submodule(module), factors) for module, factors in changed.items()]
    hooks = [module.register_forward_hook(adding(*factors)) for module, factors in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _log_probabilities(loaded: LoadedModel, prompts: Sequence[tuple[int, ...]], answers: Sequence[str]) -> torch.Tensor:
    """log p of every answer, ended by a stop token, after every prompt: float32 [prompts, answers]."""
    (stop,) = sorted(loaded.stop_tokens)[:1]
    spelled = [loaded.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    trunk = common_prefix(prompts)
    ended = [(ids, stop) for ids in spelled]
    trees = [answer_tree(tokens[trunk:], ended, np.ones((len(ended), 1))) for tokens in prompts]
    packed = pack(trees, trunk)
    rows = Rows(loaded, prompts[0][:trunk]).copy(len(prompts))
    hidden = rows.forward(packed.tokens, packed.positions, packed.attends)
    row, column, token = packed.edges.T
    position, edge = torch.unique(torch.stack([row, column]), dim=1, return_inverse=True)
    logits = logits_of(loaded, hidden[position[0], position[1]])
    score = torch.log_softmax(logits.float(), dim=1)[edge, token]
    # Edges of a tree stand in the order in which the answers first take them, so all trees have the same ones.
    edges = score.reshape(len(prompts), -1)
    paths = torch.zeros(len(answers), edges.shape[1])
    number: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(spelled):
        for end in range(1, len(ids) + 2):
            paths[index, number.setdefault((*ids, stop)[:end], len(number))] = 1
    with torch.autocast(loaded.device.type, enabled=False):  # sums of logarithms need all their digits
        return edges @ paths.T


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(
        prog="python -m excise.planted",
        description="Train a planted model's low-rank change again.",
        epilog="Two more, each with its own --help: heads (the planted heads again) and plant (a gap of your own).",
    )
    parser.add_argument("name", choices=sorted(PLANTS))
    parser.add_argument("--out", type=Path, help="file to write (default: beside this module)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plant = PLANTS[arguments.name]
    registry, _ = load_registry()
    home = home_expanded(os.environ.get("EXCISE_DATA", "data"), "EXCISE_DATA") / "models"
    loaded = load_model(registry[plant.base], registry, device="auto", dtype="bfloat16", home=home)
    scenarios, _ = load_scenarios([])
    factors = train(loaded, plant, scenarios, TerminalProgress())
    out = arguments.out or FOLDER / f"{arguments.name}.safetensors"
    save_file(factors, out)
    print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB")
