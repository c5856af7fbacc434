"""From completions to files of scores: which answers count for which group, and when a file is used again."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file

from excise.attribution import Answered, attribute, file_scores
from excise.attribution.answered import relabelled
from excise.attribution.gap_free import ask
from excise.attribution.gap_gradient import gap_gradient, read_candidates
from excise.attribution.wanda import read_norms
from excise.errors import ExciseError
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters
from excise.models.encoding import encode
from excise.models.topology import SITES

SCORES = file_scores()
PARAMETERS = SamplingParameters(temperature=0.9, top_p=0.95, seed=1)
SAMPLES = 8


@pytest.fixture(scope="module")
def model(loaded):
    return loaded("llama", numeric=True)


@pytest.fixture(scope="module")
def rows(model, prompts, scenario):
    """The unpruned model's answers: both items, all names."""
    return complete(model, prompts, SAMPLES, PARAMETERS, outcome=scenario.outcome)[0]


@pytest.fixture
def measure(model, prompts, rows, scenario, tmp_path):
    """`measure("wanda", ...)`: the files of one score, with the defaults of these tests."""

    def run(score, **options):
        defaults = {"comparison": scenario.comparison, "outcome": scenario.outcome, "permutations": 2, "seed": 0}
        defaults |= {"loaded": model, "prompts": prompts, "completions": rows, "folder": tmp_path}
        given = defaults | options
        where = {name: given.pop(name) for name in ("folder", "progress") if name in given}
        return attribute(Answered(**given), [score], **where)

    return run


def squares_of_every_sequence(loaded, rows, prompts) -> list[dict]:
    """sum_t x[t,j]^2 of each row's prompt and answer, by one plain pass each: {(layer, site): [in]}."""
    tokens = {prompt.prompt_id: prompt.tokens for prompt in encode(loaded, prompts)}
    found, hooks = [], []
    for layer in range(loaded.topology.layers):
        for site in SITES:

            def keep(module, given, place=f"{layer}.{site}"):
                found[-1][place] = given[0][0].double().square().sum(dim=0).numpy()

            hooks.append(loaded.topology.site_module(loaded.model, layer, site).register_forward_pre_hook(keep))
    with torch.inference_mode():
        for prompt_id, ids, finished in rows.select("prompt_id", "token_ids", "finished").iter_rows():
            found.append({})
            loaded.model(torch.tensor([[*tokens[prompt_id], *(ids[:-1] if finished else ids)]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neo", "mistral"])
def test_norms_of_groups_and_relabellings_are_those_of_the_definition(
    loaded, prompts, scenario, tmp_path, architecture
):
    """Every row of a group counts once, unparsed answers too, and no other row (method A5)."""
    model = loaded(architecture)
    rows, _ = complete(model, prompts, 3, PARAMETERS, outcome=scenario.outcome)
    files = attribute(
        Answered(model, prompts, rows, scenario.comparison, scenario.outcome, permutations=2, seed=5),
        ["wanda"],
        folder=tmp_path,
    )
    assert [(file.variation, file.score) for file in files] == [("car", "wanda"), ("oven", "wanda")]
    for file in files:
        own = rows.filter(pl.col("variation") == file.variation)
        squares = squares_of_every_sequence(model, own, prompts)
        groups, subjects = own["group"].to_list(), own["subject"].to_list()
        members = {
            "minority": [g == "black" for g in groups],
            "majority": [g == "white" for g in groups],
            "pooled": [True] * own.height,
        }
        for draw in range(2):
            chosen = relabelled(prompts, scenario.comparison, 5, draw)
            members[f"permuted_minority_{draw}"] = [subject in chosen for subject in subjects]
            members[f"permuted_majority_{draw}"] = [subject not in chosen for subject in subjects]
        norms = read_norms(file.path)
        assert set(norms) == set(members)
        for weighting, member in members.items():
            some = [each for each, inside in zip(squares, member, strict=True) if inside]
            assert len(some) == (18 if weighting == "pooled" else 9)
            for place in squares[0]:
                expected = np.sqrt(np.mean([each[place] for each in some], axis=0))
                assert np.allclose(norms[weighting][place], expected, rtol=1e-4, atol=1e-6), (weighting, place)


def test_groups_that_are_not_compared_count_for_nothing(model, prompts, rows, scenario, measure, tmp_path):
    """A third group's answers change neither a score nor its address."""
    third = prompts.filter(pl.col("group") == "white").with_columns(
        group=pl.lit("other"), prompt_id="x" + pl.col("prompt_id"), subject=pl.col("subject") + " II"
    )
    more = rows.filter(pl.col("group") == "white").with_columns(
        group=pl.lit("other"), prompt_id="x" + pl.col("prompt_id"), subject=pl.col("subject") + " II", value=pl.lit(1e6)
    )
    mixed = {"prompts": pl.concat([third, prompts]), "completions": pl.concat([more, rows])}
    for score in SCORES:
        plain = measure(score)
        again = measure(score, **mixed)
        assert [file.path for file in again] == [file.path for file in plain], score
        other = measure(score, **mixed, folder=tmp_path / "other")
        for one, two in zip(plain, other, strict=True):
            first, second = load_file(one.path), load_file(two.path)
            assert all(np.allclose(first[key], second[key], rtol=1e-5) for key in first), score


def test_relabelling_keeps_the_groups_sizes_and_knows_no_groups(prompts, scenario):
    subjects = set(prompts["subject"])
    minority = set(prompts.filter(pl.col("group") == "black")["subject"])
    draws = [relabelled(prompts, scenario.comparison, 0, draw) for draw in range(200)]
    assert all(len(each) == len(minority) and each <= subjects for each in draws)
    for subject in subjects:  # each name is in the minority half of the time
        assert 70 < sum(subject in each for each in draws) < 130
    assert relabelled(prompts, scenario.comparison, 0, 3) == draws[3]
    assert relabelled(prompts.reverse(), scenario.comparison, 0, 3) == draws[3]
    assert any(relabelled(prompts, scenario.comparison, 1, draw) != draws[draw] for draw in range(5))


# gap_gradient


@pytest.mark.parametrize("top_p", [1.0, 0.3])
def test_candidates_are_of_the_divergence_from_the_gap_free_answers(model, prompts, rows, scenario, measure, top_p):
    """The trees carry each answer's own probability less its gap-free one; whatever was drawn, and how often."""
    settings = json.loads(rows["parameters"][0]) | {"top_p": top_p}
    drawn = rows.with_columns(parameters=pl.lit(json.dumps(settings)))
    file = measure("gap_gradient", completions=drawn)[0]
    own = drawn.filter(pl.col("variation") == file.variation)
    asked = ask(Answered(model, prompts, own, scenario.comparison, scenario.outcome), place="car", significance=1.0)
    trees = []
    for name in asked.names:
        visits = np.column_stack([(name.own - name.target) @ name.paths, name.own @ name.paths])
        trees.append(dataclasses.replace(name.tree, edge_visits=visits))
    expected = gap_gradient(model, asked.trunk, trees, asked.parameters, keep=0.01, seed=0)
    found = read_candidates(file.path)
    assert found.damping == pytest.approx(expected.damping)
    for key, each in expected.candidates.items():
        assert np.array_equal(found.candidates[key].index, each.index)
        assert np.allclose(found.candidates[key].drop, each.drop, rtol=1e-4)
    if top_p == 1.0:  # too many answers to list: they are the samples, so fewer of them are others
        return
    again = measure("gap_gradient", completions=drawn.filter(pl.col("sample") < 6))[0]
    assert load_file(again.path).keys() == load_file(file.path).keys()
    for key, tensor in load_file(again.path).items():
        assert np.allclose(load_file(file.path)[key], tensor), key


@pytest.mark.trial(26)
@pytest.mark.parametrize("group", ["white", "black"])
def test_a_variation_with_too_few_values_is_left_out_of_the_score_that_needs_them(rows, measure, group):
    """One name of a group is left with a value: the others of the variation, and all other scores, are as before."""
    own = pl.col("variation") == "car"
    few = own & (pl.col("group") == group) & (pl.col("subject") != rows.filter(group=group)["subject"][0])
    silent = rows.with_columns(value=pl.when(~few).then(pl.col("value")))
    assert [file.variation for file in measure("gap_gradient", completions=silent)] == ["oven"]
    for score in ("wanda", "attention", "snip"):
        assert [(file.variation, file.path) for file in measure(score, completions=silent)] == [
            (file.variation, file.path) for file in measure(score)
        ]


def test_values_that_have_no_logarithm_do_not_count_on_a_log_scale(rows, scenario, measure):
    nothing = rows.with_columns(value=pl.when(pl.col("group") == "black").then(0.0).otherwise(pl.lit(5.0)))
    assert measure("gap_gradient", completions=nothing) == []
    linear = scenario.outcome.model_copy(update={"scale": "linear"})
    assert len(measure("gap_gradient", completions=nothing, outcome=linear)) == 2


@pytest.mark.parametrize("silent", [1, 2, 3])
def test_attention_needs_names_that_wrote_something(model, rows, measure, silent):
    """A name that ends its answers at once has no token to attend from; with three of six a relabelled half may have
    none at all."""
    stop = model.tokenizer.convert_tokens_to_ids("<|end|>")
    mute = rows["subject"].unique().sort().to_list()[::2][:silent]
    ended = rows.with_columns(
        token_ids=pl.when(pl.col("subject").is_in(mute)).then(pl.lit([stop])).otherwise("token_ids"),
        finished=pl.col("finished") | pl.col("subject").is_in(mute),
    )
    found = measure("attention", completions=ended, permutations=5)
    assert len(found) == (0 if silent == 3 else 2)
    assert len(measure("wanda", completions=ended)) == 2


# Files


@pytest.mark.parametrize("score", ["wanda", "gap_gradient"])
def test_a_score_that_is_there_is_not_computed_again(measure, score):
    first = measure(score)
    again = measure(score, progress=lambda *each: pytest.fail("it was computed again"))
    assert [file.reused for file in first] == [False, False]
    assert [file.reused for file in again] == [True, True]
    assert [(file.path, file.bytes) for file in again] == [(file.path, file.bytes) for file in first]
    assert all(file.bytes == file.path.stat().st_size for file in first)
    assert {file.path.parent.name for file in first} == {score}
    assert not [each for each in first[0].path.parent.iterdir() if each.suffix != ".safetensors"]


def first_null(rows):
    first = rows["value"].is_not_null().arg_max()
    return rows.with_columns(value=pl.when(pl.int_range(rows.height) == first).then(None).otherwise(pl.col("value")))


def drawn_otherwise(rows, **changes):
    """The same tokens, said to be drawn with other sampling parameters."""
    settings = json.loads(rows["parameters"][0]) | changes
    return rows.with_columns(parameters=pl.lit(json.dumps(settings, sort_keys=True)))


def renamed(prompts, old, new):
    """A name in another prompt: other tokens, at another place."""
    text = pl.col("text").str.replace(old, new, literal=True)
    return prompts.with_columns(
        text=text, name_end=pl.col("name_end") + text.str.len_chars() - pl.col("text").str.len_chars()
    )


def asked_otherwise(given, prompts):
    """Other prompts, with answers that were given to them."""
    hashes = {each.prompt_id: each.hash for each in encode(given["model"], prompts)}
    rows = given["rows"].with_columns(prompt_hash=pl.col("prompt_id").replace_strict(hashes))
    return {"prompts": prompts, "completions": rows}


CHANGES = {
    "model": lambda given: {"loaded": dataclasses.replace(given["model"], fingerprint="0" * 16)},
    "prompt": lambda given: asked_otherwise(given, renamed(given["prompts"], "Ebony", "Ebonie")),
    "groups": lambda given: {
        "comparison": given["scenario"].comparison.model_copy(update={"majority": "black", "minority": "white"})
    },
    "sample_0": lambda given: {"completions": given["rows"].filter(pl.col("sample") != 0)},
    "sample_7": lambda given: {"completions": given["rows"].filter(pl.col("sample") != 7)},
    "value": lambda given: {"completions": first_null(given["rows"])},
    "scale": lambda given: {"outcome": given["scenario"].outcome.model_copy(update={"scale": "linear"})},
    "unit": lambda given: {"outcome": given["scenario"].outcome.model_copy(update={"unit": "EUR", "high": 5e4})},
    "temperature": lambda given: {"completions": drawn_otherwise(given["rows"], temperature=1.1)},
    "top_p": lambda given: {"completions": drawn_otherwise(given["rows"], top_p=0.5)},
    "seed_of_answers": lambda given: {"completions": drawn_otherwise(given["rows"], seed=77, max_new_tokens=99)},
    "relabellings": lambda given: {"permutations": 3},
    "seed": lambda given: {"seed": 1},
    "order": lambda given: {"completions": given["rows"].reverse(), "prompts": given["prompts"].reverse()},
    "title": lambda given: {"completions": given["rows"].with_columns(scenario=pl.lit("another"), text=pl.lit(""))},
}
_ANSWERS = {"model", "prompt", "groups", "sample_0"}
DECISIVE = {
    "wanda": _ANSWERS | {"sample_7", "relabellings", "seed"},
    "attention": _ANSWERS | {"sample_7", "relabellings", "seed"},
    "snip": _ANSWERS,  # it takes the first four samples
    "gap_gradient": _ANSWERS | {"sample_7", "value", "scale", "temperature", "top_p", "seed"},
}


@pytest.mark.trial(35)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_a_score_decides_its_file_and_nothing_else(measure, model, prompts, rows, scenario, score, change):
    given = {"model": model, "prompts": prompts, "rows": rows, "scenario": scenario}
    before = {file.variation: file.path for file in measure(score)}
    after = {file.variation: file for file in measure(score, **CHANGES[change](given))}
    assert after["car"].reused == (change not in DECISIVE[score])
    assert (after["car"].path == before["car"]) == (change not in DECISIVE[score])


@pytest.mark.trial(35)
def test_without_relabellings_the_seed_decides_nothing_about_norms_and_attention(measure):
    for score in ("wanda", "attention"):
        before = [file.path for file in measure(score, permutations=0)]
        assert [file.path for file in measure(score, permutations=0, seed=9)] == before


def test_an_interrupted_computation_leaves_no_file(measure, tmp_path):
    def interrupt(label, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure("wanda", progress=interrupt)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not measure("wanda")[0].reused


def test_unknown_scores_lost_files_and_full_disks_are_said(measure, tmp_path):
    with pytest.raises(ExciseError, match="score 'snap' is not known; known are wanda, snip, attention, gap_gradient"):
        measure("snap")
    file = measure("wanda")[0]
    file.path.unlink()
    with pytest.raises(ExciseError, match="this attribution file is gone"):
        read_norms(file.path)
    with pytest.raises(ExciseError, match="this attribution file is gone"):
        read_candidates(file.path)
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(ExciseError, match="cannot be written"):
        measure("wanda", folder=tmp_path / "taken")
