"""From completions to files of scores: which answers count for which group, and when a file is used again."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest
import torch

from excise.attribution import attribute, read_candidates, read_norms, relabelled
from excise.attribution.gap_gradient import advantages, gap_gradient
from excise.completions import complete
from excise.encoding import encode
from excise.errors import ExciseError
from excise.models import SITES
from excise.sampling import SamplingParameters
from excise.tree import answer_tree

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
        return attribute(
            given.pop("loaded"), given.pop("prompts"), given.pop("completions"), scores=[score], **given
        )  # fmt: skip

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
        model, prompts, rows, comparison=scenario.comparison, outcome=scenario.outcome, scores=["wanda"],
        permutations=2, seed=5, folder=tmp_path,
    )  # fmt: skip
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
    """A third group's answers leave both scores' groups as they were."""
    third = prompts.filter(pl.col("group") == "white").with_columns(
        group=pl.lit("other"), prompt_id="x" + pl.col("prompt_id"), subject=pl.col("subject") + " II"
    )
    more = rows.filter(pl.col("group") == "white").with_columns(
        group=pl.lit("other"), prompt_id="x" + pl.col("prompt_id"), subject=pl.col("subject") + " II", value=pl.lit(1e6)
    )
    plain = measure("wanda")[0]
    mixed = measure("wanda", prompts=pl.concat([prompts, third]), completions=pl.concat([rows, more]))[0]
    assert mixed.path != plain.path
    one, two = read_norms(plain.path), read_norms(mixed.path)
    for weighting in ("minority", "majority", "pooled", "permuted_minority_0", "permuted_majority_0"):
        for place, norm in one[weighting].items():
            assert np.allclose(norm, two[weighting][place], rtol=1e-5)
    one = read_candidates(measure("gap_gradient")[0].path)
    two = read_candidates(
        measure("gap_gradient", prompts=pl.concat([prompts, third]), completions=pl.concat([rows, more]))[0].path
    )
    assert one.disparity == pytest.approx(two.disparity)


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


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_disparity_is_that_of_the_parsed_answers(rows, scenario, measure, scale):
    outcome = scenario.outcome.model_copy(update={"scale": scale})
    for file in measure("gap_gradient", outcome=outcome):
        own = rows.filter(pl.col("variation") == file.variation)
        values = own["value"] if scale == "linear" else own["value"].replace(0.0, None).log()
        means = own.with_columns(f=values).filter(pl.col("f").is_not_null()).group_by("group").agg(pl.col("f").mean())
        means = dict(means.rows())
        assert own["value"].null_count() > 0
        found = read_candidates(file.path)
        assert found.disparity == pytest.approx(abs(means["white"] - means["black"]), rel=1e-9)
        assert found.damping > 0


def test_the_drop_is_that_of_the_drawn_answers(model, prompts, rows, scenario, measure):
    """Autograd over every row, with the advantages of its value, under the distribution it was drawn from."""
    file = measure("gap_gradient")[0]
    own = rows.filter(pl.col("variation") == file.variation)
    values = np.log([value if value else np.nan for value in own["value"].to_list()])
    weights, disparity = advantages(values, own["group"].to_numpy(), "white", "black")
    tokens = {prompt.prompt_id: prompt.tokens for prompt in encode(model, prompts)}
    matrices = {linear.key: linear.weight(model.model) for linear in model.topology.linears}
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    try:
        with torch.enable_grad():
            total = 0.0
            for weight, (prompt_id, ids) in zip(weights, own.select("prompt_id", "token_ids").iter_rows(), strict=True):
                prompt = tokens[prompt_id]
                scores = (
                    model.model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.9
                )
                ordered, order = scores.detach().softmax(dim=1).sort(dim=1, descending=True)
                left = torch.zeros_like(scores, dtype=torch.bool).scatter(
                    1, order, ordered.cumsum(dim=1) - ordered < 0.95
                )
                scores = scores.masked_fill(~left, -torch.inf).log_softmax(dim=1)
                total = total + float(weight) * scores[range(len(ids)), ids].sum()
            total.backward()
        expected = {
            key: (matrix * matrix.grad).detach().flatten().numpy() * np.sign(disparity)
            for key, matrix in matrices.items()
        }
    finally:
        for matrix in matrices.values():
            matrix.requires_grad_(False)
            matrix.grad = None
    found = read_candidates(file.path).candidates
    assert set(found) == set(expected)
    for key, each in found.items():
        assert len(each.index) == max(1, int(0.01 * expected[key].size))
        assert np.allclose(each.drop, expected[key][each.index], rtol=1e-3, atol=1e-3 * np.abs(expected[key]).max()), (
            key
        )


def test_the_harm_counts_every_prompt_alike(model, prompts, rows, measure):
    """However many answers it has: each weighs 1 / its prompt's number, an unparsed one too."""
    uneven = rows.filter((pl.col("sample") < 3) | (pl.col("group") == "white"))
    file = measure("gap_gradient", completions=uneven)[0]
    own = uneven.filter(pl.col("variation") == file.variation)
    asked = {prompt.prompt_id: prompt.tokens for prompt in encode(model, prompts)}
    trees = []
    for (prompt_id,), some in own.group_by("prompt_id", maintain_order=True):
        answers = [
            (ids[:-1], ids[-1]) if done else (ids, None) for ids, done in some.select("token_ids", "finished").rows()
        ]
        weights = np.column_stack([np.ones(some.height), np.full(some.height, 1 / some.height)])
        trees.append(answer_tree(asked[prompt_id], answers, weights))
    parameters = dataclasses.replace(PARAMETERS, max_new_tokens=4)
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    every = {}
    for sign in (1.0, -1.0):
        for key, each in gap_gradient(
            model, [], trees, sign, parameters, roles=roles, keep=1.0, seed=0
        ).candidates.items():
            every.setdefault(key, {}).update(zip(each.index.tolist(), each.harm.tolist(), strict=True))
    found = read_candidates(file.path)
    for key, each in found.candidates.items():
        expected = [every[key][index] for index in each.index.tolist()]
        assert np.allclose(each.harm, expected, rtol=1e-3, atol=1e-3 * max(expected)), key


@pytest.mark.parametrize("group", ["white", "black"])
def test_a_group_without_a_number_is_said(rows, measure, group):
    silent = rows.with_columns(value=pl.when(pl.col("group") == group).then(None).otherwise(pl.col("value")))
    with pytest.raises(ExciseError, match=f"variation car: no answer of group '{group}' has a value"):
        measure("gap_gradient", completions=silent)


def test_without_a_gap_there_is_no_candidate(rows, measure):
    """Every answer alike: nothing to learn, and no division by the gap."""
    flat = rows.with_columns(value=pl.lit(7.0))
    found = read_candidates(measure("gap_gradient", completions=flat)[0].path)
    assert found.disparity == 0
    assert not any(len(each.index) for each in found.candidates.values())


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


def warmer(rows):
    """The same tokens, drawn from another distribution: the gradient of gap_gradient differs."""
    settings = json.loads(rows["parameters"][0]) | {"temperature": 1.1}
    return rows.with_columns(parameters=pl.lit(json.dumps(settings, sort_keys=True)))


@pytest.mark.parametrize("score", ["wanda", "gap_gradient"])
@pytest.mark.parametrize(
    "change",
    [
        lambda given: {"loaded": dataclasses.replace(given["model"], fingerprint="0" * 16)},
        lambda given: {"completions": first_null(given["rows"])},
        lambda given: {"completions": warmer(given["rows"])},
        lambda given: {"completions": given["rows"].filter(pl.col("sample") > 0)},
        lambda given: {"seed": 1},
        lambda given: {"permutations": 3},
        lambda given: {
            "comparison": given["scenario"].comparison.model_copy(update={"majority": "black", "minority": "white"})
        },
        lambda given: {"outcome": given["scenario"].outcome.model_copy(update={"scale": "linear"})},
    ],
)
def test_what_decides_a_score_decides_its_file(measure, model, rows, scenario, score, change):
    before = measure(score)[0]
    after = measure(score, **change({"model": model, "rows": rows, "scenario": scenario}))[0]
    assert not after.reused
    assert after.path != before.path


def test_an_interrupted_computation_leaves_no_file(measure, tmp_path):
    def interrupt(label, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure("wanda", progress=interrupt)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not measure("wanda")[0].reused


def test_unknown_scores_lost_files_and_full_disks_are_said(measure, tmp_path):
    with pytest.raises(ExciseError, match="score 'snap' is not known; known are wanda, attention, snip, gap_gradient"):
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
