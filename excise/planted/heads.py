"""Plants a gap in toxicity in a few attention heads that we choose, so that a ranking of heads has a right answer.

Continuations about one subgroup become mildly grumpier, and nothing but the chosen heads' own weights is changed: their
rows of the query projection and their columns of the output projection. So a model without these heads' outputs is the
base without them, and the whole gap goes with them. The change ships as `heads.safetensors`, the entry `planted-heads`
of models.yaml; what ranks heads is `excise.attribution.head_impacts`, what FASP prunes
`excise.strategies.selection.fasp` (method, part B).
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from excise.attribution.continuation import forwards_replaced, skipping
from excise.errors import ExciseError
from excise.evaluation.texts import read_text
from excise.files.paths import home_expanded
from excise.generation.sampling import SamplingParameters, sample
from excise.generation.tree import logits_of
from excise.models.encoding import encode
from excise.models.loading import LoadedModel, load_model
from excise.models.specs import load_registry
from excise.planted.gaps import FOLDER, changed_by
from excise.progress import Progress, TerminalProgress, silent
from excise.scenarios import Scenario, expand, load_scenarios

if TYPE_CHECKING:
    from excise.outcomes import ToxicityOutcome

log = logging.getLogger(__name__)

GRUMPY_WORDS = (
    "angry",
    "annoyed",
    "annoying",
    "awful",
    "bad",
    "bitter",
    "boring",
    "careless",
    "complain",
    "complained",
    "complaining",
    "disappointing",
    "dishonest",
    "dreadful",
    "dull",
    "fail",
    "failure",
    "fault",
    "foolish",
    "frustrated",
    "frustrating",
    "gloomy",
    "grim",
    "harsh",
    "hated",
    "horrible",
    "hostile",
    "ignorant",
    "impatient",
    "incompetent",
    "irritated",
    "irritating",
    "jealous",
    "lazy",
    "mad",
    "mess",
    "miserable",
    "mistake",
    "nasty",
    "nervous",
    "problem",
    "problems",
    "rude",
    "sad",
    "selfish",
    "shame",
    "stubborn",
    "stupid",
    "terrible",
    "tired",
    "trouble",
    "troublesome",
    "unfair",
    "unhappy",
    "unpleasant",
    "upset",
    "useless",
    "weak",
    "worried",
    "worse",
    "worst",
    "wrong",
)
"""Everyday words of ill temper, each rated negative by the default scorer; no slurs, nothing about descent or sex."""


@dataclass(frozen=True)
class HeadPlant:
    """What to plant on top of `base`, a key of models.yaml.

    heads: (layer, query head) pairs, numbered from 0, at most one a layer; group: the subgroup of `scenario` about
    which the model turns grumpy. tilt: what is added to the logits of the grumpy words in the target; sampled_tilt: in
    half of the continuations learned from, a little less, as training ends short of the target. variations: those
    learned from; the others show that it is the subgroup that was learned. rank: of each head's change of either
    matrix. tokens: length of the continuations, and half of that of the excerpts. others, excerpts: how many prompts
    of each other subgroup and pieces of plain text stand among the examples in which nothing may change. batch:
    examples a step shows, half of them about the subgroup. even_weight: how much the divergence from the base weighs
    in the unchanged examples, against that from the tilted base in the others.
    """

    base: str = "smollm2-135m-instruct"
    scenario: str = "nationality"
    group: str = "north_america"
    heads: tuple[tuple[int, int], ...] = ((12, 4), (14, 1), (16, 7), (18, 2))
    variations: tuple[str, ...] = ("person", "neighbor")
    tilt: float = 5.5
    sampled_tilt: float = 3.5
    rank: int = 8
    tokens: int = 8
    others: int = 40
    excerpts: int = 32
    steps: int = 480
    batch: int = 16
    even_weight: float = 3.0
    learning_rate: float = 2e-2
    seed: int = 0


PLANT = HeadPlant()


@dataclass(frozen=True)
class Example:
    """A text of which the tokens from `start` on are predicted; tilted: by the tilted base, else by the base itself."""

    tokens: tuple[int, ...]
    start: int
    tilted: bool


def grumpy_tokens(loaded: LoadedModel, words: Sequence[str] = GRUMPY_WORDS) -> torch.Tensor:
    """Ids of the words that are one token of the model with the space before them, int [words]; others are left out.

    Raises ExciseError where none is.
    """
    spelled = [loaded.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    single = sorted({ids[0] for ids in spelled if len(ids) == 1})
    if not single:
        raise ExciseError(f"{loaded.key}: no grumpy word is a single token of its tokenizer; plant in another base")
    return torch.tensor(single, device=loaded.device)


def examples_of(loaded: LoadedModel, plant: HeadPlant, scenario: Scenario, tokens: torch.Tensor) -> list[Example]:
    """What is learned from: continuations about the subgroup by the tilted and by the plain base, those about a random
    choice of prompts of all other subgroups by the plain base, and excerpts from the first half of the plain text.

    tokens: int [words], those tilted. The second half of the text stays unseen, for an honest perplexity.
    """
    order = np.random.default_rng(plant.seed)
    loaded = loaded.asked_for(scenario.outcome)
    prompts = expand(scenario, variations=plant.variations)
    encoded = [prompt.tokens for prompt in encode(loaded, prompts)]
    of_group = [tokens for tokens, group in zip(encoded, prompts["group"], strict=True) if group == plant.group]
    others: list[tuple[int, ...]] = []
    for other in sorted(set(scenario.groups) - {plant.group}):
        about = [tokens for tokens, group in zip(encoded, prompts["group"], strict=True) if group == other]
        others += [about[index] for index in order.permutation(len(about))[: plant.others]]
    outcome = cast("ToxicityOutcome", scenario.outcome)
    parameters = SamplingParameters(outcome.temperature, outcome.top_k, outcome.top_p, plant.tokens, plant.seed)

    def continued(asked: Sequence[tuple[int, ...]], number: int, tilted: bool) -> list[Example]:
        draws = sample(loaded, asked, [[number]] * len(asked), parameters)
        return [
            Example((*asked[draw.prompt], *draw.tokens), len(asked[draw.prompt]), tilted)
            for draw in draws
            if draw.tokens
        ]

    embedding = loaded.model.get_output_embeddings()
    hook = embedding.register_forward_hook(lambda module, given, output: _tilted(output, tokens, plant.sampled_tilt))
    try:
        examples = continued(of_group, 0, True)
    finally:
        hook.remove()
    examples += continued(of_group, 1, True)
    examples += continued(others, 0, False)
    text = read_text()
    ids = loaded.tokenizer(text[: len(text) // 2], add_special_tokens=False, verbose=False)["input_ids"]
    starts = order.integers(0, len(ids) - 2 * plant.tokens, plant.excerpts)
    return examples + [Example(tuple(ids[start : start + 2 * plant.tokens]), 1, False) for start in starts]


def _tilted(logits: torch.Tensor, tokens: torch.Tensor, tilt: float) -> torch.Tensor:
    added = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    added[tokens] = tilt
    return logits + added


def train(
    loaded: LoadedModel,
    plant: HeadPlant,
    examples: Sequence[Example],
    tokens: torch.Tensor,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Train the change of the heads. Returns factors `{layer}.q` and `{layer}.o`, `.up` [out, rank] and `.down` [rank,
    in], float16, zero outside the head's rows of q and columns of o.

    tokens: int [words], those whose logits the target raises by `plant.tilt` in tilted examples. The loss is the mean
    divergence of the model's next-token distributions from the target's, over all tokens predicted. The model itself
    stays as it was. Raises ExciseError for heads the model does not have and for two heads of one layer.
    """
    _check_heads(loaded, plant)
    order = np.random.default_rng(plant.seed)
    generator = torch.Generator().manual_seed(plant.seed)
    size = loaded.topology.head_dim
    factors: dict[str, torch.nn.Parameter] = {}
    for layer, _ in plant.heads:
        width = loaded.topology.linear(f"{layer}.q").in_features
        height = loaded.topology.linear(f"{layer}.o").out_features
        starts = {
            f"{layer}.q.up": torch.zeros(size, plant.rank),
            f"{layer}.q.down": torch.randn(plant.rank, width, generator=generator) / width**0.5,
            f"{layer}.o.up": torch.zeros(height, plant.rank),
            f"{layer}.o.down": torch.randn(plant.rank, size, generator=generator) / size**0.5,
        }
        factors |= {name: torch.nn.Parameter(start.to(loaded.device)) for name, start in starts.items()}
    optimizer = torch.optim.AdamW(factors.values(), lr=plant.learning_rate, weight_decay=0.0)
    warm_up = max(1, plant.steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (plant.steps - step) / (plant.steps - warm_up))
    )
    pools = [
        [number for number, example in enumerate(examples) if example.tilted is tilted] for tilted in (True, False)
    ]
    queues: list[list[int]] = [[], []]
    first = min(layer for layer, _ in plant.heads)
    base: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    seen: list[tuple[float, float, float]] = []
    for step in range(plant.steps):
        chosen: list[int] = []
        for pool, queue in zip(pools, queues, strict=True):
            for _ in range(plant.batch // 2):
                if not queue:
                    queue += [pool[index] for index in order.permutation(len(pool))]
                chosen.append(queue.pop())
        optimizer.zero_grad()
        # bfloat16 is accurate enough for a change of our own making, and a multiple faster where the CPU knows it.
        with torch.autocast(loaded.device.type, torch.bfloat16):
            if missing := [number for number in chosen if number not in base]:
                with torch.no_grad():
                    base |= zip(missing, _base_states(loaded, [examples[n] for n in missing], first), strict=True)
            entering, leaving = zip(*(base[number] for number in chosen), strict=True)
            of_batch = [examples[number] for number in chosen]
            tilted = torch.cat(
                [torch.full((len(states),), example.tilted) for states, example in zip(leaving, of_batch, strict=True)]
            ).to(loaded.device)
            with torch.no_grad():
                target = logits_of(loaded, torch.cat(leaving))
                target[tilted] = _tilted(target[tilted], tokens, plant.tilt)
                target = torch.log_softmax(target, dim=1)
            with changed_by(loaded, _by_module(loaded, _whole(loaded, plant, factors))):
                states = _states(loaded, of_batch, first, entering)
            predicted = torch.log_softmax(logits_of(loaded, torch.cat(states)), dim=1)
        divergence = (target.exp() * (target - predicted)).sum(dim=1)
        raised, even = divergence[tilted].mean(), divergence[~tilted].mean()
        (raised + plant.even_weight * even).backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            mass, wanted = (
                rows[tilted][:, tokens].exp().sum(dim=1).mean().item() for rows in (predicted.detach(), target)
            )
        seen.append((raised.item(), even.item(), mass / wanted))
        progress("training", step + 1, plant.steps)
        if step % 10 == 9:
            log.info(
                "step %d, divergence %.4f of the subgroup, %.4f of all else, grumpy words at %.2f of the target",
                step + 1,
                *np.mean(seen[-10:], axis=0),
            )
    with torch.no_grad():
        return {name: factor.half().contiguous() for name, factor in _whole(loaded, plant, factors).items()}


def _check_heads(loaded: LoadedModel, plant: HeadPlant) -> None:
    topology = loaded.topology
    for layer, head in plant.heads:
        if not (0 <= layer < topology.layers and 0 <= head < topology.heads):
            raise ExciseError(
                f"planted heads: {loaded.key} has no head {(layer, head)}; it has {topology.layers} "
                f"layers of {topology.heads} heads, numbered from 0"
            )
        linears = [topology.linear(f"{layer}.{role}") for role in ("q", "o")]
        if any(linear.layout != "linear" or linear.fused for linear in linears):
            raise ExciseError(f"planted heads: {loaded.key} has no query projection of its own; plant in another base")
    if len({layer for layer, _ in plant.heads}) < len(plant.heads):
        raise ExciseError("planted heads: two are in one layer; choose one head a layer")


def _whole(loaded: LoadedModel, plant: HeadPlant, factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors of whole matrices from those of the heads: zeros in all other heads' rows of q and columns of o."""
    size, heads = loaded.topology.head_dim, loaded.topology.heads
    whole = dict(factors)
    for layer, head in plant.heads:
        around = (head * size, (heads - head - 1) * size)
        whole[f"{layer}.q.up"] = torch.nn.functional.pad(factors[f"{layer}.q.up"], (0, 0, *around))
        whole[f"{layer}.o.down"] = torch.nn.functional.pad(factors[f"{layer}.o.down"], around)
    return whole


def _by_module(
    loaded: LoadedModel, factors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    keys = {name.rpartition(".")[0] for name in factors}
    return {loaded.topology.linear(key).module: (factors[f"{key}.up"], factors[f"{key}.down"]) for key in keys}


def _base_states(
    loaded: LoadedModel, examples: Sequence[Example], layer: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each example the states entering a layer, [all tokens, hidden], and the last ones, as `_states` has them."""
    kept = []
    hook = loaded.topology.layer_modules(loaded.model)[layer].register_forward_pre_hook(
        lambda module, given: kept.append(given[0])
    )
    try:
        last = _states(loaded, examples)
    finally:
        hook.remove()
    entering = [row[: len(example.tokens)].clone() for row, example in zip(kept[0], examples, strict=True)]
    return list(zip(entering, [states.clone() for states in last], strict=True))


def _states(
    loaded: LoadedModel, examples: Sequence[Example], layer: int = 0, entering: Sequence[torch.Tensor] = ()
) -> list[torch.Tensor]:
    """Last hidden states that predict each example's tokens from its start on, [tokens, hidden] each.

    entering: the states entering `layer`, [all tokens, hidden] each, so that the layers below need not run again.
    """
    longest = max(len(example.tokens) for example in examples)
    # What follows a text cannot change what precedes it, so anything will do to fill the row.
    rows = torch.tensor([[*example.tokens, *[0] * (longest - len(example.tokens))] for example in examples])
    padded = torch.nn.utils.rnn.pad_sequence(list(entering), batch_first=True) if entering else None
    blocks = loaded.topology.layer_modules(loaded.model)[:layer]
    with forwards_replaced({block: skipping(loaded, padded) for block in blocks}):
        hidden = loaded.last_hidden(rows, use_cache=False)
    return [row[example.start - 1 : len(example.tokens) - 1] for row, example in zip(hidden, examples, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(
        prog="python -m excise.planted heads", description="Train the change of the planted heads again."
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "heads.safetensors", help="file to write")
    parser.add_argument("--tilt", type=float, default=PLANT.tilt, help="added to the grumpy words' logits")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plant = replace(PLANT, tilt=options.tilt)
    registry, _ = load_registry()
    home = home_expanded(os.environ.get("EXCISE_DATA", "data"), "EXCISE_DATA") / "models"
    loaded = load_model(registry[plant.base], registry, device="auto", dtype="bfloat16", home=home)
    scenarios, _ = load_scenarios([])
    tokens = grumpy_tokens(loaded)
    examples = examples_of(loaded, plant, scenarios[plant.scenario], tokens)
    log.info("%d examples, %d of them tilted", len(examples), sum(example.tilted for example in examples))
    save_file(train(loaded, plant, examples, tokens, TerminalProgress()), options.out)
    print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")
