"""Asks tiny models that are spread over cards the same as on the CPU: `python -m tests.excise.models.spread`.

Of every folder given, all that works on a model is done with the plain model and with the one spread in the given way,
and a line of JSON per piece of work says how far apart the results are. The cards are those of `cards`, so this runs in
a process of its own; the test that starts it is `test_spread`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from excise.attribution import Answered, attribute, continuation, file_scores, readers
from excise.attribution.gap_free import ask
from excise.attribution.head_impacts import Compared, Removal, Sampled, Text, head_impacts
from excise.attribution.head_scores import head_gradient, head_magnitude
from excise.evaluation.perplexity import text_windows, window_losses
from excise.generation import enumeration, sampling
from excise.generation.answering import Answering
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters
from excise.generation.settings import Enumeration
from excise.interventions.heads import heads_mask
from excise.interventions.weights import WeightMask
from excise.models.loading import LoadedModel, load_model
from excise.models.placement import DeviceMap
from excise.models.specs import ModelSpec
from excise.outcomes import NumberOutcome
from excise.outcomes.classifier import ClassifierScorer
from excise.scenarios import Comparison, Group, Scenario, Subject, Variation, expand
from excise.strategies.measured_path import Budgets, Course, measured_path
from excise.strategies.units import weights_of
from tests.excise.models.cards import DEVICE, on_cards

PARAMETERS = SamplingParameters(temperature=1.0, top_p=0.9, seed=1, max_new_tokens=3)
TEXT = "The market opens at noon. Bread, apples and old books are sold until the evening, whatever the weather. " * 3
SCENARIO = Scenario(
    key="lamp",
    title="Lamp",
    description="A lamp.",
    outcome=NumberOutcome(unit="USD", low=1, high=10000, scale="log", better="higher", max_new_tokens=3),
    comparison=Comparison(majority="white", minority="black"),
    groups={
        "white": Group(label="white", subjects=[Subject(name="Jake Becker"), Subject(name="Jill Becker")]),
        "black": Group(label="Black", subjects=[Subject(name="Ebony Washington"), Subject(name="Jamal Washington")]),
    },
    templates={"plain": "A used {item} of {name}. What should I offer? One number."},
    variations={"lamp": Variation(fields={"item": "lamp"})},
)
# What a device takes at once: cards that are none take as much as cards.
BUDGETS = (
    sampling.PREFILL_TOKENS,
    enumeration.CACHE_COLUMNS,
    continuation.PASS_TOKENS,
    readers.FOREST_COLUMNS,
    readers.RESIDENT_BYTES,
)
GRADIENTS = ("head gradient", "snip", "gap_gradient", "measured path")
"""Work that goes backwards, which torch does on no card that is none: there gradients are zeros in the right places."""
LAST_NORMS = ("norm", "ln_f", "final_layer_norm")


def spread(loaded: LoadedModel) -> DeviceMap:
    """A device map that begins and ends on the first card, with the last layers and the norm behind them on another."""
    topology, base = loaded.topology, loaded.model.base_model_prefix
    found: dict[str, str] = {}
    for name, module in loaded.model.named_children():
        for part in [f"{base}.{inner}" for inner, _ in module.named_children()] if name == base else [name]:
            if part == topology.family.layers:
                half = topology.layers // 2
                found |= {
                    f"{part}.{layer}": f"{DEVICE}:0" if layer < half else f"{DEVICE}:1"
                    for layer in range(topology.layers)
                }
            else:
                found[part] = f"{DEVICE}:{int(part.rpartition('.')[2] in LAST_NORMS)}"
    return found


def work(loaded: LoadedModel, plain: LoadedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Every piece of work and its numbers. plain: the model on the CPU, whose answers both are asked about."""
    prompts = expand(SCENARIO)
    rng = np.random.default_rng(0)
    weights = WeightMask.from_arrays({each.key: rng.random(each.shape) < 0.2 for each in loaded.topology.linears})
    chosen = np.ones((loaded.topology.layers, loaded.topology.heads), dtype=bool)
    chosen[:, 0] = False
    masks = {
        "unpruned": None,
        "weights": weights,
        "zero_query": heads_mask(chosen, "zero_query"),
        "zero_output": heads_mask(chosen, "zero_output"),
    }
    for name, mask in masks.items():
        rows, _ = complete(loaded, prompts, 6, PARAMETERS, outcome=SCENARIO.outcome, intervention=mask)
        yield f"answers, {name}", np.array([len(each) + sum(each) for each in rows["token_ids"].to_list()], dtype=float)
    windows = text_windows(loaded, TEXT, size=30, stride=15, limit_tokens=90)
    yield "losses", window_losses(loaded, windows)
    with weights.applied(loaded):
        yield "losses without weights", window_losses(loaded, windows)
    yield "losses again", window_losses(loaded, windows)
    how = Answering(None, PARAMETERS, Enumeration(leftover=0.5, max_nodes=40))
    found, _ = how.answers(loaded, prompts, outcome=SCENARIO.outcome)
    yield "leftover mass", found["leftover"].to_numpy()
    yield "head magnitude", head_magnitude(loaded)
    yield "head gradient", head_gradient(loaded, windows)
    answers, _ = complete(plain, prompts, 6, PARAMETERS, outcome=SCENARIO.outcome)
    lead = 3.0 * (answers["group"] == "white").cast(float)
    answers = answers.with_columns(value=answers["tokens"].cast(float) + answers["sample"] + 1.0 + lead)
    impacts = head_impacts(
        Sampled(loaded, prompts, answers, PARAMETERS),
        Compared("gap", ["white", "black"], resamples=2),
        text=Text(windows),
        removal=Removal("reweight"),
    )
    yield "head impacts", impacts.select("z_ppl", "bias_without", "ess").to_numpy()
    if loaded.topology.architecture == "llama" and not any(each.is_meta for each in loaded.model.parameters()):
        yield "classifier", scored(loaded)
    from safetensors.numpy import load_file

    for score in file_scores():
        with tempfile.TemporaryDirectory() as folder:
            (file,) = attribute(
                Answered(loaded, prompts, answers, SCENARIO.comparison, SCENARIO.outcome), [score], folder=Path(folder)
            )
            tensors = load_file(file.path)
        yield score, np.concatenate([tensors[key].ravel().astype(float) for key in sorted(tensors)])
    asked = ask(
        Answered(loaded, prompts, answers, SCENARIO.comparison, SCENARIO.outcome), place="here", significance=1.0
    )
    units = weights_of(loaded, ("q", "down"), {each.key: np.arange(300) for each in loaded.topology.linears})
    wide = Budgets(0.0, 1.0, 10.0, lost=1.0)
    path = measured_path(loaded, [asked], units, Course(0.01, wide, seed=0, steps=4))
    yield "measured path", np.array([each.closed for each in path.steps])


def scored(loaded: LoadedModel) -> np.ndarray:
    """What a classifier gives to texts that has the layers of a model, and so lies where they lie."""
    from transformers import LlamaForSequenceClassification

    classifier = LlamaForSequenceClassification(loaded.model.config).eval()
    classifier.model = loaded.model.model
    with torch.no_grad():
        weights = loaded.model.get_output_embeddings().weight[: len(classifier.score.weight)]
        classifier.score.weight = torch.nn.Parameter(weights.to(loaded.model.model.norm.weight.device), False)
    scorer = ClassifierScorer(
        "tiny", "0" * 16, "a test", "LABEL_0", "sigmoid", False, 64, 0, classifier, loaded.tokenizer
    )
    return scorer.score(["Bread and apples", "All old books are sold"])


@contextmanager
def on_two_cards(spec: ModelSpec, plain: LoadedModel, home: Path) -> Iterator[LoadedModel]:
    """Cards without float64: an Apple GPU has none."""
    backwards = torch.autograd.grad

    def zeros(of: torch.Tensor, where: Sequence[torch.Tensor] | torch.Tensor, **options: Any) -> tuple:
        return tuple(map(torch.zeros_like, [where] if isinstance(where, torch.Tensor) else where))

    with on_cards(torch.float64):
        torch.autograd.grad = zeros
        try:
            yield load_model(spec, {}, device="cpu", home=home, device_map=spread(plain))
        finally:
            torch.autograd.grad = backwards


@contextmanager
def offloaded(spec: ModelSpec, plain: LoadedModel, home: Path) -> Iterator[LoadedModel]:
    """All weights are fetched for each pass, as accelerate does it for those that no card has room for."""
    from accelerate import cpu_offload

    loaded = load_model(spec, {}, device="cpu", home=home)
    cpu_offload(loaded.model, execution_device=torch.device("cpu"))
    yield loaded


def compared(folder: Path, how: str) -> Iterator[dict[str, Any]]:
    """The largest difference of each piece of work, as a share of its largest number."""
    spec = ModelSpec(key=folder.name, folder=folder)
    with tempfile.TemporaryDirectory() as home:
        plain = load_model(spec, {}, device="cpu", home=Path(home))
        wanted = dict(work(plain, plain))
        with {"cards": on_two_cards, "offloaded": offloaded}[how](spec, plain, Path(home)) as loaded:
            places = sorted({str(parameter.device) for parameter in loaded.model.parameters()})
            yield {"model": folder.name, "places": places, "devices": loaded.devices, "device": str(loaded.device)}
            for name, numbers in work(loaded, plain):
                largest = max(float(np.abs(wanted[name]).max()), 1e-30)
                apart = float(np.abs(numbers - wanted[name]).max()) if numbers.shape == wanted[name].shape else np.inf
                if how != "cards" or name not in GRADIENTS:
                    yield {"model": folder.name, "work": name, "apart": apart / largest}


def main(how: str, *folders: str) -> int:
    for budget in BUDGETS:
        budget[DEVICE] = budget["cuda"]
    torch.set_num_threads(1)
    for folder in folders:
        for told in compared(Path(folder), how):
            print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
