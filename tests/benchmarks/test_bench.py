"""The benchmarks compare like with like: every reference gives what ours gives, and every section fills its table.

Tiny models stand in for the real one, and what is measured of them means nothing.
"""

import numpy as np
import polars as pl
import pytest
import torch

from excise.attribution.snip import snip
from excise.attribution.wanda import input_norms
from excise.evaluation.overlap import overlap_table
from excise.generation.sampling import SamplingParameters, sample
from excise.generation.tree import answer_tree
from excise.interventions.weights import WeightMask
from excise.models.encoding import encode
from excise.models.loading import LoadedModel, load_model
from excise.models.specs import ModelSpec
from excise.scenarios import expand, load_scenarios
from excise.strategies.selection import set_difference
from tests.benchmarks import bench
from tests.benchmarks import references as reference

LIKELIEST = SamplingParameters(temperature=0.6, top_k=1, top_p=1.0, max_new_tokens=5)


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> LoadedModel:
    spec = ModelSpec(key="tiny", folder=tiny_model("llama", numeric=True))
    return load_model(spec, {}, device="cpu", home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def asked(model) -> list[tuple[int, ...]]:
    prompts = expand(load_scenarios()[0]["purchase"], variations=["bicycle"], subjects_per_group=2)
    return [tuple(prompt.tokens) for prompt in encode(model, prompts)]


@pytest.mark.parametrize("by", [reference.generated, reference.generated_from_prompt])
def test_generate_is_asked_for_the_same_answers(model, asked, by):
    """Where only the likeliest token can be drawn, both draw it, as often as asked."""
    draws = sample(model, asked, [range(3)] * len(asked), LIKELIEST)
    rows = [row for call in by(model, asked, 3, LIKELIEST, 2) for row in call.tolist()]
    assert len(rows) == len(draws) == 3 * len(asked)
    for draw, row in zip(draws, rows, strict=True):
        own = [*draw.tokens, *([] if draw.stop is None else [draw.stop])]
        assert row[len(asked[draw.prompt]) :][: len(own)] == own


def test_generate_is_asked_for_the_same_distribution(model, asked):
    """First tokens of many samples come as often, within the error of their number."""
    parameters = SamplingParameters(temperature=1.0, top_p=0.9, max_new_tokens=1)
    count = 1000
    ours = [(draw.tokens or (draw.stop,))[0] for draw in sample(model, asked[:1], [range(count)], parameters)]
    torch.manual_seed(0)
    (theirs,) = reference.generated(model, asked[:1], count, parameters, count)
    shares = [np.bincount(each, minlength=400) / count for each in (ours, theirs[:, -1].tolist())]
    assert np.abs(shares[0] - shares[1]).max() < 5 * np.sqrt(0.25 * 2 / count)
    assert (shares[0] > 0).sum() > 3


def test_norms_of_one_sequence_at_a_time_are_those_of_trees(model, asked):
    draws = sample(model, asked, [range(4)] * len(asked), SamplingParameters(temperature=1.0, max_new_tokens=4))
    wanted = reference.input_norms(model, [(asked[draw.prompt], draw.tokens) for draw in draws])
    trees = [
        answer_tree(prompt, [(draw.tokens, draw.stop) for draw in draws if draw.prompt == number], np.ones((4, 1)))
        for number, prompt in enumerate(asked)
    ]
    found = input_norms(model, (), trees, np.array([float(len(draws))]))
    assert found.keys() == wanted.keys()
    for key, norms in wanted.items():
        np.testing.assert_allclose(found[key][0], norms, rtol=1e-4, atol=1e-6)


def test_dense_scores_are_weights_times_norms(model, asked, tmp_path):
    from safetensors.numpy import load_file

    norms = reference.input_norms(model, [(asked[0], (5, 6))])
    size = reference.write_dense_scores(model, norms, tmp_path / "scores")
    assert size > 4 * sum(linear.out_features * linear.in_features for linear in model.topology.linears)
    linear = model.topology.linear("1.down")
    expected = linear.weight(model.model).abs().numpy() * norms[1, linear.site]
    np.testing.assert_array_equal(load_file(tmp_path / "scores")["1.down"], expected)


def test_snip_of_a_layer_is_snip(model, asked):
    answers = [(asked[0], (20, 21)), (asked[1], (22, 23, 24))]
    roles = tuple(dict.fromkeys(linear.role for linear in model.topology.linears))
    ours = dict(snip(model, (), answers, np.ones((2, 1)), roles=roles))
    for layer in range(model.topology.layers):
        theirs = reference.snip_of_layer(model, answers, layer)
        for linear in model.topology.linears:
            if linear.layer == layer:
                np.testing.assert_allclose(theirs[linear.module].numpy(), ours[linear.key][0], rtol=1e-3, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_index_tensors_hold_the_same_masks():
    rng = np.random.default_rng(0)
    shapes = {"0.q": (5, 7), "1.q": (4, 9)}
    masks = [
        WeightMask({key: bench._random_bits(rng, a * b) for key, (a, b) in shapes.items()}, shapes) for _ in range(5)
    ]
    indices = [[bench._flat_indices(mask, key) for key in shapes] for mask in masks]
    shared = reference.shared_indices(indices[:3], indices[3:])
    np.testing.assert_array_equal(shared, overlap_table(masks[:3], masks[3:]).shared)
    assert 0 < sum(mask.count for mask in masks) < 0.2 * 5 * 71


def test_topk_chooses_the_same_weights():
    minority, majority = np.random.default_rng(1).random((2, 30, 20), dtype=np.float32)
    chosen = set_difference(minority, majority, 0.4, 0.35)
    indices = reference.set_difference_indices(torch.from_numpy(minority), torch.from_numpy(majority), 0.4, 0.35)
    assert sorted(indices.tolist()) == np.flatnonzero(chosen).tolist()


def test_files_are_read_to_their_end(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(bytes(17))
    assert reference.read_through([tmp_path / "a", tmp_path / "b"], piece=64) == 1017


def test_a_ratio_is_taken_round_by_round():
    ours = [bench.Spent(1.0, 1.0), bench.Spent(4.0, 1.0), bench.Spent(1.0, 0.5)]
    theirs = [bench.Spent(3.0, 2.0), bench.Spent(8.0, 2.0), bench.Spent(20.0, 2.0)]
    assert bench.faster(ours, theirs) == ("3.00x [2.00, 20.0]", "2.00x [2.00, 4.00]")
    assert bench._exponent((2, 4, 8), np.array([3.0, 12.0, 48.0])) == pytest.approx(2.0)


def test_procedures_take_turns_and_may_scale_their_own_time():
    order = []

    def named(name, told=None):
        return lambda: order.append(name) or told

    scaled = bench.Spent(7.0, 7.0) * 2
    found = bench.alternating(3, a=named("a"), b=named("b", scaled))
    assert "".join(order) == "abbaab"
    assert found["b"] == [bench.Spent(14.0, 14.0)] * 3
    assert all(each.clock < 1 for each in found["a"])


def test_a_clock_leaves_out_what_another_clock_counts():
    import time
    import types

    place = types.SimpleNamespace()
    place.inner = lambda: time.sleep(0.05)
    place.outer = lambda: place.inner()
    before = place.inner
    with bench.Clocks() as clocks:
        clocks.watch(place, "inner", "inner")
        clocks.watch(place, "outer", "outer")
        place.outer()
        place.inner()
    assert clocks.spent["inner"] >= 0.1 > clocks.spent["outer"] * 2
    assert place.inner is before


def test_a_clock_on_a_generator_counts_its_steps_alone():
    import time
    import types

    def steps():
        for number in range(3):
            time.sleep(0.02)
            yield number

    place = types.SimpleNamespace(steps=steps)
    with bench.Clocks() as clocks:
        clocks.watch(place, "steps", "steps")
        found = []
        for number in place.steps():
            time.sleep(0.1)
            found.append(number)
    assert found == [0, 1, 2]
    assert 0.06 <= clocks.spent["steps"] < 0.3


def test_a_section_measured_again_replaces_its_old_self_alone():
    report = bench.Report()
    report.section("Masks", "Old masks.", ("a", "b"))
    report.row("1", "2")
    report.section("Sampling", "Old sampling.", ("a",))
    report.row("3")
    first = bench.page(report, "small", 0.5)
    assert first.index("Old sampling") < first.index("Old masks")
    again = bench.Report()
    again.section("Masks", "New masks.", ("a", "b"))
    again.row("5", "6")
    second = bench.page(again, "default", 0.9, first)
    assert "Old masks" not in second
    assert second.index("Old sampling") < second.index("New masks")
    assert second.count("## ") == 2
    assert second.count("# Benchmarks") == 1


@pytest.mark.slow
def test_every_section_fills_its_table(model, tiny_model, tmp_path, monkeypatch):
    # A process each.
    monkeypatch.setattr(bench, "MEMORY_WORKS", dict(list(bench.MEMORY_WORKS.items())[:1]))
    files = tmp_path / "models.yaml"
    files.write_text(f"tiny: {{folder: {tiny_model('llama', numeric=True)}}}\n")
    (tmp_path / "home").mkdir()
    size = bench.replace(
        bench.SIZES["small"],
        impact_heads=((1, 2),),
        growth_names=(1, 2),
        growth_samples=(2, 4),
        growth_variations=(1, 2),
    )
    made = bench.Bench(model, load_scenarios()[0], size, tmp_path / "work", bench.Report(), tmp_path / "home", (files,))
    made.folder.mkdir()
    for section in bench.SECTIONS.values():
        section(made)
    page = bench.page(made.report, "small", 0.5)
    assert [title for title, *_ in made.report.sections] == [
        "Sampling",
        "Exact answers",
        "Attribution",
        "Masks",
        "Orchestration",
        "Orchestration at the paper's size",
        "Growth",
        "Memory",
        "Head impacts",
    ]
    for _, _, header, rows, _ in made.report.sections:
        assert rows
        assert {len(row) for row in rows} == {len(header)}
    assert str(tmp_path) not in page
    assert "nan" not in page
    assert isinstance(made.answers(made.prompts(1), 1), pl.DataFrame)
