"""A score from outside: one module and its entry in strategies.yaml, and it is measured, read and made into masks."""

import numpy as np
import pytest
import torch
import yaml

from excise.attribution import Answered, attribute, file_scores, scores
from excise.errors import ExciseError
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters
from excise.interventions.packed import Mask
from excise.models.encoding import encode
from excise.strategies.build import Making, build_masks
from excise.strategies.config import load_strategies
from excise.strategies.selection import set_difference

MODULE = '''
"""`mean_input`: the size of a weight times the mean of its input, over all tokens of a group's prompts and answers."""

import json

import numpy as np

from excise.attribution.files import load
from excise.attribution.score import FRACTIONS, Score, Streams, Tensors


def measure(answered, work):
    import torch

    weightings, tokens = answered.weightings(), {prompt.prompt_id: prompt.tokens for prompt in answered.encoded}
    topology, model = answered.loaded.topology, answered.loaded.model
    rows = answered.completions.select("prompt_id", "token_ids").rows()
    sums, counts = {}, np.zeros(len(weightings))

    def add(name, inputs, members):
        sums[name] = sums.get(name, 0) + np.outer(members, inputs[0].double().sum(dim=0).numpy())

    for number, (prompt_id, ids) in enumerate(rows):
        members = np.array([rows_of[number] for rows_of in weightings.values()], dtype=float)
        counts += members * (len(tokens[prompt_id]) + len(ids))
        hooks = [
            topology.site_module(model, layer, site).register_forward_pre_hook(
                lambda module, given, name=f"{layer}.{site}", members=members: add(name, given[0], members)
            )
            for layer in range(topology.layers)
            for site in ("attention_input", "attention_output", "mlp_input", "mlp_output")
        ]
        with torch.inference_mode():
            model(torch.tensor([[*tokens[prompt_id], *ids]]), use_cache=False)
        for hook in hooks:
            hook.remove()
        work.report(number + 1, len(rows))
    means = {name: (total / counts[:, None]).astype(np.float32) for name, total in sums.items()}
    return Tensors(means, {"weightings": json.dumps(list(weightings))})


def read(path, wanted):
    means, metadata = load(path)
    names, linears = json.loads(metadata["weightings"]), {linear.key: linear for linear in wanted.linears}

    def of(key, weighting):
        linear = linears[key]
        weight = linear.weight(wanted.loaded.model).detach().reshape(linear.shape).numpy()
        return np.abs(weight * means[f"{linear.layer}.{linear.site}"][names.index(weighting)])

    return Streams(tuple(linears), of)


SCORE = Score(
    "mean_input",
    selection="set_difference",
    ablations=("zero_weights",),
    parameters=(FRACTIONS,),
    scopes=("matrix", "global"),
    controls=("random", "reversed"),
    measure=measure,
    read=read,
)
'''
ENTRY = {
    "score": "mean_input",
    "selection": "set_difference",
    "parameters": {"tau_min": 0.3, "tau_maj": 0.2},
    "roles": ["q", "up"],
    "controls": ["random", "reversed"],
}
TAU_MIN, TAU_MAJ = ENTRY["parameters"].values()


@pytest.fixture
def mean_input(installed):
    installed("mean_input", MODULE, "excise.scores", "mean_input = mean_input:SCORE")


@pytest.fixture
def strategies(tmp_path):
    """A user's strategies.yaml with the one entry."""
    path = tmp_path / "strategies.yaml"
    path.write_text(yaml.safe_dump({"mine": ENTRY}))
    return path


def test_a_score_is_known_where_its_package_is_installed_alone(strategies, installed):
    assert "mean_input" not in scores()
    with pytest.raises(
        ExciseError, match=r"mine\.score: Input should be 'wanda', .*'gap_gradient', 'head_impacts', .* or"
    ):
        load_strategies([strategies])["mine"]
    installed("mean_input", MODULE, "excise.scores", "mean_input = mean_input:SCORE")
    assert file_scores() == ["wanda", "snip", "attention", "gap_gradient", "mean_input"]
    mine = load_strategies([strategies])["mine"]
    assert (mine.scope, mine.ablation, mine.of_scenario) == ("matrix", "zero_weights", False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scope": "row"}, "scope of score mean_input is matrix or global, not row"),
        ({"selection": "lowest"}, "selection lowest does not work on score mean_input; set_difference does"),
        ({"controls": ["permuted"]}, "controls permuted do not exist for score mean_input"),
        ({"parameters": {"density": 0.1}}, "parameters of set_difference are tau_maj, tau_min"),
    ],
)
def test_what_the_record_does_not_fit_is_refused(mean_input, tmp_path, fields, words):
    path = tmp_path / "strategies.yaml"
    path.write_text(yaml.safe_dump({"mine": ENTRY | fields}))
    with pytest.raises(ExciseError, match=words):
        load_strategies([path])["mine"]


def mean_inputs(model, prompts, rows, role: str) -> np.ndarray:
    """The mean input of layer 1's matrix over all tokens of some answers and their prompts, by plain passes."""
    tokens = {prompt.prompt_id: prompt.tokens for prompt in encode(model, prompts)}
    seen = []
    module = model.model.get_submodule(f"model.layers.1.{'self_attn.q_proj' if role == 'q' else 'mlp.up_proj'}")
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].double()))
    with torch.inference_mode():
        for prompt_id, ids in rows.select("prompt_id", "token_ids").iter_rows():
            model.model(torch.tensor([[*tokens[prompt_id], *ids]]), use_cache=False)
    hook.remove()
    return torch.cat(seen).mean(dim=0).numpy()


def test_its_masks_are_the_set_differences_of_what_it_measures(
    mean_input, strategies, loaded, prompts, scenario, tmp_path
):
    model = loaded("llama", numeric=True)
    rows, _ = complete(model, prompts, 3, SamplingParameters(temperature=0.9, seed=1), outcome=scenario.outcome)
    answered = Answered(model, prompts, rows, scenario.comparison, scenario.outcome)
    reports = []
    files = attribute(answered, ["mean_input"], folder=tmp_path, progress=lambda *report: reports.append(report))
    assert [(file.variation, file.score, file.reused) for file in files] == [
        ("car", "mean_input", False),
        ("oven", "mean_input", False),
    ]
    assert reports[-1] == ("mean_input oven", 18, 18)
    again = attribute(answered, ["mean_input"], folder=tmp_path, progress=lambda *_: pytest.fail("computed again"))
    assert [(file.path, file.reused) for file in again] == [(file.path, True) for file in files]

    def store(mask: Mask):
        mask.save(path := tmp_path / f"{mask.fingerprint}.safetensors")
        return path

    strategy = load_strategies([strategies])["mine"]
    masks = list(build_masks(model, [strategy], files, Making(1, 0), scenario="purchase", store=store))
    for variation in ("car", "oven"):
        for role in ("q", "up"):
            weight = model.topology.linear(f"1.{role}").weight(model.model).detach().numpy()
            minority, majority = (
                np.abs(weight * mean_inputs(model, prompts, rows.filter(group=group, variation=variation), role))
                for group in ("black", "white")
            )
            expected = set_difference(minority, majority, TAU_MIN, TAU_MAJ)
            (mine,) = (
                named.mask.array(f"1.{role}").reshape(weight.shape)
                for named in masks
                if (named.strategy, named.level, named.variation) == ("mine", "prompt_specific", variation)
            )
            assert expected.sum() > 5
            assert (mine != expected).sum() <= 2  # scores within rounding of a threshold
    kinds = {(named.strategy, named.level, named.matched_to) for named in masks}
    assert kinds == {
        ("mine", "prompt_specific", None),
        ("mine", "within_context", None),
        ("reversed", "prompt_specific", "mine"),
        ("random", "prompt_specific", "mine"),
        ("random", "within_context", "mine"),
    }


@pytest.mark.slow
def test_it_goes_through_all_stages(mean_input, house):
    """From the answers to the metrics under its masks, with nothing but the module and the entry."""
    with (house.folder / "strategies.yaml").open("a") as file:
        file.write(yaml.safe_dump({"mine": ENTRY}))
    result = house.run("audit_scenario", "tiny|lamp", strategies=["mine"], held_out=False)
    assert result.success
    files = house.warehouse.read("attribution_files")
    assert set(files.select("variation", "score").rows()) == {("lamp", "mean_input"), ("bench", "mean_input")}
    masks = house.warehouse.read("masks").filter(strategy="mine")
    assert set(masks["variation"]) == {"lamp", "bench"}
    assert masks["pruned"].sum() > 0
    metrics = house.warehouse.read("metrics").filter(strategy="mine")
    assert set(metrics["variation"]) == {"lamp", "bench", "(all)"}
    assert metrics["estimate"].count() > 0
