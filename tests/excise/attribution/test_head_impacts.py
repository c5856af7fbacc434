"""Head impacts: continuing from a layer is the whole model without the head, and weighed answers are its answers."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
import transformers

from excise.attribution import continuation, readers
from excise.attribution.continuation import Inputs, every_head
from excise.attribution.disparities import Layout
from excise.attribution.head_impacts import (
    SCHEMA,
    Compared,
    Removal,
    Sampled,
    Text,
    head_impacts,
    split_half_reliability,
)
from excise.attribution.readers import answer_parts, forests, log_probabilities, window_parts
from excise.errors import ExciseError
from excise.evaluation.metrics import standardized_mean_difference, toxicity_bias
from excise.evaluation.perplexity import Window, perplexity, window_losses
from excise.generation.sampling import SamplingParameters, sample
from excise.generation.tree import logits_of
from excise.interventions.heads import heads_mask
from excise.models.encoding import encode
from excise.models.loading import load_model
from excise.models.specs import ModelSpec

WINDOW = 12
NORMED = ("qwen3", "gemma3_text")
FAMILIES = ("llama", "gpt2", "gpt_neo", "gptj", "gpt_neox", "qwen2", "gemma2", "mistral", *NORMED)
PARAMETERS = SamplingParameters(temperature=0.9, top_k=6, top_p=1.0, max_new_tokens=3, seed=1)


@pytest.fixture(scope="session")
def normed(tiny_model, tmp_path_factory):
    """`normed("qwen3")` or `normed("gemma3_text")`: models that normalise queries after their projection."""
    made = {}
    fields = {
        "vocab_size": 304,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "attention_bias": True,
    }

    def make(kind):
        if kind not in made:
            config = (
                transformers.Qwen3Config(**fields)
                if kind == "qwen3"
                else transformers.Gemma3TextConfig(
                    **fields,
                    sliding_window=WINDOW,
                    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                )
            )
            folder = shutil.copytree(tiny_model("llama"), tmp_path_factory.mktemp(kind) / "model")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            spec = ModelSpec(key=kind, folder=folder)
            made[kind] = load_model(spec, {}, device="cpu", home=tmp_path_factory.mktemp("home"))
        return made[kind]

    return make


@pytest.fixture
def family(loaded, normed):
    return lambda kind: normed(kind) if kind in NORMED else loaded(kind)


def without(model, layer, head):
    chosen = np.zeros((model.topology.layers, model.topology.heads), dtype=bool)
    if layer is not None:
        chosen[layer, head] = True
    return heads_mask(chosen, "zero_output")


def all_heads(model):
    return {layer: range(model.topology.heads) for layer in range(model.topology.layers)}


def every(model, parts, size, heads=None):
    """What all parts read, by (layer, head), with (None, None) for the whole model."""
    found = {}

    def keep(part, layer, head, numbers):
        found.setdefault((layer, head), np.full(size, np.nan))[part.members] = numbers

    for part in parts:
        every_head(
            model,
            part.chunks,
            part.read,
            heads or all_heads(model),
            unpruned=True,
            keep=lambda *numbers, part=part: keep(part, *numbers),
        )
    return found


def hooks_of(model):
    return [
        (dict(module._forward_hooks), dict(module._forward_pre_hooks), module.__dict__.get("forward"))
        for module in model.modules()
    ]


def asked(model, prompts, count=3):
    return [tuple(prompt.tokens) for prompt in encode(model, prompts)[:count]]


# Continuing from a layer


@pytest.mark.parametrize("kind", FAMILIES)
def test_continuing_from_a_layer_is_the_whole_model_without_the_head(family, kind):
    model = family(kind)
    tokens = torch.randint(5, 300, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    seen = {}
    before = hooks_of(model.model)
    every_head(
        model,
        [Inputs(tokens)],
        [lambda hidden, unpruned: logits_of(model, hidden).flatten(1).numpy()],
        all_heads(model),
        unpruned=True,
        keep=lambda layer, head, numbers: seen.update({(layer, head): numbers}),
    )
    assert len(seen) == model.topology.layers * model.topology.heads + 1
    for (layer, head), found in seen.items():
        with torch.inference_mode(), without(model, layer, head).applied(model):
            expected = model.model(tokens, use_cache=False).logits.flatten().numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        if layer is not None:
            assert np.abs(found - seen[None, None]).max() > 1e-3 * np.abs(expected).max()
    assert hooks_of(model.model) == before


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_of_windows_are_those_under_the_mask(family, kind):
    """Windows of two lengths, of which different numbers of tokens count."""
    model = family(kind)
    rng = np.random.default_rng(0)
    sizes = [(30, 29), (30, 4), (30, 12), (20, 19)]
    windows = [Window(tuple(rng.integers(5, 300, size).tolist()), scored) for size, scored in sizes]
    found = every(model, window_parts(model, windows), len(windows))
    for layer, head in [(None, None), (0, 0), (1, 3), (model.topology.layers - 1, 1)]:
        with without(model, layer, head).applied(model):
            expected = window_losses(model, windows)
        assert np.allclose(found[layer, head], expected, rtol=1e-4)
    assert len({numbers.tobytes() for numbers in found.values()}) == len(found)


def answers_of(model, prompts, samples=4, parameters=PARAMETERS):
    tokens = asked(model, prompts)
    draws = sample(model, tokens, [range(samples)] * len(tokens), parameters)
    own = {(tokens[d.prompt], (*d.tokens, *([] if d.stop is None else [d.stop]))) for d in draws}
    return sorted(own, reverse=True)


def plain_log_probability(model, prompt, answer, parameters, next_distribution):
    total = 0.0
    for step, token in enumerate(answer):
        share = float(next_distribution(model, [*prompt, *answer[:step]], parameters)[token])
        total += np.log(share) if share > 0 else -np.inf
    return total


@pytest.mark.parametrize("kind", FAMILIES)
def test_probabilities_of_answers_are_those_of_plain_passes(family, prompts, next_distribution, kind):
    """Prompts and answers that share their beginnings, one column each, against every answer read on its own."""
    model = family(kind)
    answers = answers_of(model, prompts)
    found = every(model, answer_parts(model, answers, PARAMETERS), len(answers))
    assert np.isfinite(found[None, None]).all()
    for layer, head in [(None, None), (model.topology.layers - 1, 2)]:
        with without(model, layer, head).applied(model):
            expected = [plain_log_probability(model, *pair, PARAMETERS, next_distribution) for pair in answers]
        assert np.allclose(found[layer, head], expected, atol=2e-3)
    # A prompt is read once for all of its answers, and what prompts share once for all of them.
    columns = sum(chunk.tokens.numel() for part in answer_parts(model, answers, PARAMETERS) for chunk in part.chunks)
    assert columns < sum(len(prompt) for prompt in {prompt for prompt, _ in answers}) + 2 * len(answers)


def test_small_parts_and_small_passes_change_nothing(loaded, prompts, monkeypatch):
    model = loaded("gemma2")
    answers = answers_of(model, prompts)
    whole = every(model, answer_parts(model, answers, PARAMETERS), len(answers))
    assert len(answer_parts(model, answers, PARAMETERS)) == 1
    monkeypatch.setitem(readers.FOREST_COLUMNS, "cpu", 70)
    monkeypatch.setitem(readers.RESIDENT_BYTES, "cpu", 1)
    monkeypatch.setitem(continuation.PASS_TOKENS, "cpu", 200)
    monkeypatch.setattr(readers, "LOGIT_ROWS", 3)
    parts = answer_parts(model, answers, PARAMETERS)
    assert len(parts) > 2
    assert sorted(np.concatenate([part.members for part in parts])) == list(range(len(answers)))
    pieces = every(model, parts, len(answers))
    for key, numbers in whole.items():
        assert np.allclose(pieces[key], numbers, atol=1e-3), key


def test_a_forest_by_hand():
    """Two prompts with a shared beginning; equal first tokens of answers are one column, last tokens none."""
    (forest,) = forests([((7, 8), (1,)), ((7, 8), (5, 1)), ((7, 8), (5, 6, 1)), ((7, 9), (5, 1))], 100)
    assert forest.inputs.tokens.tolist() == [[7, 8, 5, 6, 9, 5]]
    assert forest.inputs.positions.tolist() == [[0, 1, 2, 3, 1, 2]]
    sees = np.unpackbits(forest.inputs.ancestors, axis=1, count=6)
    assert [np.flatnonzero(row).tolist() for row in sees] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 4], [0, 4, 5]]
    assert forest.edges.tolist() == [[1, 1], [1, 5], [2, 1], [2, 6], [3, 1], [4, 5], [5, 1]]
    assert forest.answer.tolist() == [0, 1, 1, 2, 2, 2, 3, 3]
    assert forest.edge.tolist() == [0, 1, 2, 1, 3, 4, 5, 6]


def test_forests_end_between_prompts_where_they_can():
    answers = [((1, prompt), (answer, 2, 3)) for prompt in (4, 5) for answer in range(6, 10)]
    assert [forest.answers for forest in forests(answers, 25)] == [8]
    assert [forest.answers for forest in forests(answers, 12)] == [4, 4]
    assert [forest.answers for forest in forests(answers, 6)] == [2, 2, 2, 2]
    assert [forest.answers for forest in forests(answers, 1)] == [1] * 8


def test_hooks_are_gone_after_an_error(loaded):
    model = loaded("gpt_neo")
    before = hooks_of(model.model)

    def stop(hidden, unpruned):
        raise KeyError("the run was stopped")

    with pytest.raises(KeyError, match="stopped"):
        every_head(model, [Inputs(torch.full((1, 5), 7))], [stop], {1: [0]}, unpruned=False, keep=print)
    broken = Inputs(torch.full((1, 5), 10**6))
    with pytest.raises(IndexError):
        every_head(model, [broken], [stop], {1: [0]}, unpruned=False, keep=print)
    assert hooks_of(model.model) == before


def test_less_memory_means_fewer_heads_at_once(loaded):
    model = loaded("llama")
    sizes, seen = [], {}

    def read(hidden, unpruned):
        sizes.append(len(hidden))
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("too large")
        return hidden[:, :, -1].flatten(1).numpy()

    every_head(
        model,
        [Inputs(torch.full((1, 5), 7))],
        [read],
        all_heads(model),
        unpruned=False,
        keep=lambda layer, head, numbers: seen.update({(layer, head): numbers}),
    )
    assert sizes == [6, 3, *[1] * 18]
    assert len(seen) == 18


# Probabilities under the sampling distribution


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (0.7, 0, 1.0),
        (1.0, 5, 1.0),
        (0.6, 0, 0.9),
        (1.5, 20, 0.8),
        (1.0, 0, 0.999),
        (1.0, 500, 1.0),
    ],
)
def test_log_probabilities_are_those_that_are_drawn_from(temperature, top_k, top_p):
    parameters = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(top_k)) * 3
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    expected = scores.log_softmax(dim=1).numpy()
    row, token = (each.ravel() for each in np.indices((4, 100)))
    found = log_probabilities(logits, row, token, parameters).reshape(4, 100)
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))
    inside = np.isfinite(expected)
    assert np.abs(found[inside] - expected[inside]).max() < 1e-4
    drawn = log_probabilities(logits, row, token, parameters, drawn_here=True).reshape(4, 100)
    assert np.array_equal(drawn[inside], found[inside])
    assert np.isfinite(drawn).all()


def test_a_token_just_outside_its_own_set_is_counted_in():
    """Probabilities .6, .3, .1, of which two are kept: counted in, the third has its own share."""
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    parameters = SamplingParameters(temperature=1.0, top_k=2, top_p=1.0)
    found = log_probabilities(logits, np.zeros(3, dtype=int), np.arange(3), parameters, drawn_here=True)
    assert np.exp(found) == pytest.approx([2 / 3, 1 / 3, 0.1])


def test_a_greedy_answer_is_certain_or_impossible():
    parameters = SamplingParameters(temperature=0)
    found = log_probabilities(torch.tensor([[0.0, 2.0, 1.0]]), np.zeros(3, dtype=int), np.arange(3), parameters)
    assert found.tolist() == [-np.inf, 0.0, -np.inf]


# Weighing answers


def completions_of(model, prompts, samples, parameters, value, mask=None):
    """A table as `completions` makes it, with `value(tokens)` as the outcome."""
    encoded = encode(model, prompts)
    tokens = [prompt.tokens for prompt in encoded]
    with (mask if mask is not None else without(model, None, None)).applied(model):
        draws = sample(model, tokens, [range(samples)] * len(tokens), parameters)
    rows = prompts.select("variation", "template", "group", "subject", "prompt_id").rows()
    return pl.DataFrame(
        [
            (
                *rows[d.prompt],
                d.sample,
                value(d.tokens),
                [*d.tokens, *([] if d.stop is None else [d.stop])],
                d.stop is not None,
            )
            for d in draws
        ],
        schema=["variation", "template", "group", "subject", "prompt_id", "sample", "value", "token_ids", "finished"],
        schema_overrides={"value": pl.Float64},
        orient="row",
    )


def spread(tokens):
    """An outcome in 0..1 that depends on all tokens."""
    return (sum((3 + place) * token for place, token in enumerate(tokens)) % 97) / 97


TWO = ("white", "black")


def impacts_of(model, prompts, completions, **options):
    settings = {"disparity": "toxicity", "groups": TWO, "parameters": PARAMETERS, "resamples": 50} | options

    def taken(**names: str) -> dict:
        return {field: settings.pop(name) for name, field in names.items() if name in settings}

    sampled = Sampled(model, prompts, completions, settings.pop("parameters"))
    compared = Compared(**taken(**{name: name for name in ("disparity", "groups", "cluster", "resamples", "seed")}))
    text = Text(**taken(windows="windows", perplexity_mode="mode"))
    removal = Removal(**taken(method="method", regenerate="regenerate", ess_floor="ess_floor"))
    return head_impacts(sampled, compared, text=text, removal=removal, **settings)


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=1, seed=3),
        SamplingParameters(temperature=1.2, top_k=5, top_p=1.0, max_new_tokens=3, seed=3),
        SamplingParameters(temperature=1.2, top_k=0, top_p=0.6, max_new_tokens=2, seed=3),
    ],
)
def test_weighed_answers_have_the_mean_that_enumeration_gives(loaded, prompts, next_distribution, parameters):
    """All answers there are, with their probabilities under both models.

    What the unpruned model never answers cannot be weighed: the mean is that of the other answers, and mean_weight
    says how probable they are without the head.
    """
    model, prompts = loaded("llama", numeric=True), prompts[:1]
    (prompt,) = asked(model, prompts, 1)

    def distribution(limit):
        found, open_ends = {}, {(): 1.0}
        for _ in range(limit):
            longer = {}
            for path, share in open_ends.items():
                follow = next_distribution(model, [*prompt, *path], parameters)
                for token in torch.nonzero(follow)[:, 0].tolist():
                    (found if token in model.stop_tokens else longer)[*path, token] = share * float(follow[token])
            open_ends = longer
        return found | open_ends

    def outcome(answer):
        return spread([token for token in answer if token not in model.stop_tokens])

    samples = 3000
    completions = completions_of(model, prompts, samples, parameters, spread)
    unpruned = distribution(parameters.max_new_tokens)
    assert sum(unpruned.values()) == pytest.approx(1, abs=1e-4)
    for layer, head in [(0, 2), (2, 4)]:
        with without(model, layer, head).applied(model):
            exact = distribution(parameters.max_new_tokens)
        common = {answer: share for answer, share in exact.items() if answer in unpruned}
        mass = sum(common.values())
        mean = sum(share * outcome(answer) for answer, share in common.items()) / mass
        row = impacts_of(
            model,
            prompts,
            completions,
            groups=["white"],
            parameters=parameters,
            heads=[(layer, head)],
            method="reweight",
            resamples=2,
        ).row(0, named=True)
        weights = {answer: share / unpruned[answer] for answer, share in common.items()}
        second = sum(weight**2 * unpruned[answer] for answer, weight in weights.items())
        noise = sum(
            unpruned[answer] * (weight * (outcome(answer) - mean)) ** 2 for answer, weight in weights.items()
        ) ** 0.5 / (mass * samples**0.5)
        assert row["mean_without"] == pytest.approx(mean, abs=4 * noise)
        assert row["mean_weight"] == pytest.approx(mass, abs=4 * ((second - mass**2) / samples) ** 0.5 + 1e-4)
        assert row["ess"] == pytest.approx(mass**2 / second, rel=0.25)


def test_weighing_and_asking_anew_agree(loaded, prompts):
    model = loaded("llama", numeric=True)
    completions = completions_of(model, prompts, 150, PARAMETERS, spread)
    heads = [(1, 0), (2, 5)]
    anew = []

    def regenerate(mask):
        anew.append(mask)
        return completions_of(model, prompts, 150, replace(PARAMETERS, seed=9), spread, mask).drop("token_ids")

    weighed = impacts_of(model, prompts, completions, heads=heads, method="reweight", regenerate=regenerate)
    assert not anew
    asked_anew = impacts_of(model, prompts, completions, heads=heads, method="regenerate", regenerate=regenerate)
    assert anew == [without(model, *each) for each in heads]
    assert weighed["method"].to_list() == ["reweighted"] * 2
    assert asked_anew["method"].to_list() == ["regenerated"] * 2
    assert asked_anew["ess"].null_count() == 2
    loss = (1 - weighed["mean_weight"]).clip(0, 1).max()
    assert np.allclose(weighed["mean_without"], asked_anew["mean_without"], atol=0.03 + loss)
    assert np.allclose(weighed["bias_with"], asked_anew["bias_with"], atol=0)
    frame = completions_of(model, prompts, 150, replace(PARAMETERS, seed=9), spread, without(model, *heads[0]))
    assert asked_anew["bias_without"][0] == pytest.approx(toxicity_bias(frame["value"], frame["group"]))
    assert asked_anew["z_bias"][0] == pytest.approx(asked_anew["bias_with"][0] - asked_anew["bias_without"][0])


def test_too_small_an_effective_sample_is_drawn_anew(loaded, prompts):
    model = loaded("llama", numeric=True)
    completions = completions_of(model, prompts, 8, PARAMETERS, spread)
    weighed = impacts_of(model, prompts, completions, method="reweight")
    floor = float(weighed["ess_smallest"].median())

    def regenerate(mask):
        return completions_of(model, prompts, 8, PARAMETERS, spread, mask)

    mixed = impacts_of(model, prompts, completions, regenerate=regenerate, ess_floor=floor)
    anew = mixed["method"] == "regenerated"
    assert 0 < anew.sum() < len(anew)
    assert anew.to_list() == (weighed["ess_smallest"] < floor).to_list()
    assert mixed.filter(~anew).equals(weighed.filter(~anew))
    assert mixed["ess"].to_list() == weighed["ess"].to_list()
    assert set(impacts_of(model, prompts, completions, ess_floor=floor)["method"]) == {"reweighted"}


def test_a_head_that_writes_nothing_has_no_impact(loaded, prompts):
    model = loaded("llama", seed=3)
    columns = slice(model.topology.head_dim, 2 * model.topology.head_dim)
    completions = completions_of(model, prompts, 6, PARAMETERS, spread)
    weight = model.model.model.layers[1].self_attn.o_proj.weight
    kept = weight[:, columns].clone()
    windows = [Window(tuple(range(10 + n, 40 + n)), 20) for n in range(4)]
    with torch.no_grad():
        weight[:, columns] = 0
        completions = completions_of(model, prompts, 6, PARAMETERS, spread)
        rows = impacts_of(model, prompts, completions, windows=windows, heads=[(1, 1), (1, 2)])
        weight[:, columns] = kept
    harmless, other = rows.rows(named=True)
    for name in ("ess", "ess_smallest", "mean_weight"):
        assert harmless[name] == pytest.approx(1, abs=1e-4)
        assert abs(other[name] - 1) > 1e-3
    for name in ("z_ppl", "z_bias", "z_bias_low", "z_bias_high", "z_bias_half_1", "z_bias_half_2"):
        assert harmless[name] == pytest.approx(0, abs=1e-4 * harmless["perplexity_with"])
    assert abs(other["z_ppl"]) > 1e-2
    assert other["z_bias_low"] <= other["z_bias"] <= other["z_bias_high"]


def test_perplexities_are_those_under_the_mask(loaded, prompts):
    model = loaded("gpt2")
    completions = completions_of(model, prompts, 2, PARAMETERS, spread)
    rng = np.random.default_rng(1)
    windows = [Window(tuple(rng.integers(5, 300, 25).tolist()), 15) for _ in range(6)]
    rows = impacts_of(model, prompts, completions, windows=windows)
    before = perplexity(window_losses(model, windows), windows)
    assert rows["perplexity_with"].to_list() == pytest.approx([before] * rows.height, rel=1e-4)
    for row in rows.rows(named=True)[::5]:
        with without(model, row["layer"], row["head"]).applied(model):
            after = perplexity(window_losses(model, windows), windows)
        assert row["perplexity_without"] == pytest.approx(after, rel=1e-4)
        assert row["z_ppl"] == pytest.approx(before - after, abs=1e-3 * before)
        assert row["z_ppl_low"] <= row["z_ppl"] <= row["z_ppl_high"]
        assert row["z_ppl_se"] > 0
    paper = impacts_of(model, prompts, completions, windows=[*windows, Window((5, 6, 7), 1)], perplexity_mode="paper")
    assert (paper["perplexity_with"] != rows["perplexity_with"]).all()


# Disparities


def table(rows):
    """Rows (variation, group, subject, value)."""
    return pl.DataFrame(
        rows,
        schema={"variation": pl.String, "group": pl.String, "subject": pl.String, "value": pl.Float64},
        orient="row",
    ).with_columns(
        prompt_id=pl.concat_str("variation", "group", "subject"), sample=pl.int_range(pl.len()), template=pl.lit("t")
    )


def random_table(seed, groups=("white", "black"), variations=("car", "oven"), subjects=4, samples=5):
    rng = np.random.default_rng(seed)
    return table(
        [
            (variation, group, f"{group}{subject}", float(rng.gamma(2.0) * (1 + index)) if rng.random() < 0.9 else None)
            for variation in variations
            for index, group in enumerate(groups)
            for subject in range(subjects + index)
            for _ in range(samples)
        ]
    )


def bias(frame, kind, groups=TWO, weight=None, draws=None):
    layout = Layout.of(frame, kind, groups, "subject")
    sums = layout.sums(layout.cells, draws, weight=weight)
    return layout.disparity(sums, layout.sums(layout.cells, draws))


def test_unweighed_disparities_are_those_of_the_metrics():
    frame = random_table(0, ("white", "black", "other"))
    assert bias(frame, "toxicity", ("white", "black", "other"))[0] == pytest.approx(
        toxicity_bias(frame["value"].fill_null(np.nan), frame["group"])
    )
    smd, gaps = [], []
    for variation in ("car", "oven"):
        both = [
            frame.filter(pl.col("variation") == variation, pl.col("group") == group)["value"].drop_nulls().to_numpy()
            for group in TWO
        ]
        smd.append(abs(standardized_mean_difference(*both, winsorize=(0.05, 0.95))))
        gaps.append(abs(both[0].mean() - both[1].mean()) / ((both[0].mean() + both[1].mean()) / 2))
    assert bias(frame, "smd")[0] == pytest.approx(np.mean(smd))
    assert bias(frame, "gap")[0] == pytest.approx(np.mean(gaps))


def test_equal_weights_have_no_excess_noise_and_other_disparities_never():
    frame = random_table(1, ("white", "black", "other"))
    groups = ("white", "black", "other")
    layout = Layout.of(frame, "toxicity", groups, "subject")
    for weight in (None, np.full(frame.height, 3.0)):
        assert layout.excess_noise(layout.sums(layout.cells, None, weight=weight)[:, :, 0]) == pytest.approx(0)
    uneven = np.random.default_rng(0).exponential(size=frame.height)
    assert layout.excess_noise(layout.sums(layout.cells, None, weight=uneven)[:, :, 0]) > 0
    of_numbers = Layout.of(frame, "smd", TWO, "subject")
    assert of_numbers.excess_noise(of_numbers.sums(of_numbers.cells, None, weight=uneven)[:, :, 0]) == 0


@pytest.mark.parametrize("means", [(0.3, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.6)])
def test_weights_without_effect_leave_the_disparity_of_fresh_answers(means):
    """Weights that have nothing to do with the outcome make noise alone; over many tables it is taken off."""
    rng = np.random.default_rng(4)
    groups = tuple("abcd")
    weighed, matched, fresh = [], [], []
    for _ in range(700):
        frame, anew = (
            table(
                [
                    ("v", group, f"{group}{number}", float(rng.random() < mean))
                    for group, mean in zip(groups, means, strict=True)
                    for number in range(30)
                ]
            )
            for _ in range(2)
        )
        weight = rng.lognormal(sigma=0.9, size=frame.height)
        layout = Layout.of(frame, "toxicity", groups, "subject")
        sums = layout.sums(layout.cells, None, weight=weight)
        weighed.append(layout.disparity(sums, sums)[0])
        matched.append(weighed[-1] - layout.excess_noise(sums[:, :, 0]))
        fresh.append(bias(anew, "toxicity", groups)[0])
    error = np.std(np.array(matched) - np.array(fresh)) / np.sqrt(len(fresh))
    assert np.mean(weighed) - np.mean(fresh) > 3 * error
    assert abs(np.mean(matched) - np.mean(fresh)) < 3 * error


def test_weighed_toxicity_by_hand():
    """Means (1 * .2 + 3 * .6) / 4 = .5 and .1; the second group has as many prompts, so the axis is at .3."""
    frame = table([("p", "a", "1", 0.2), ("p", "a", "2", 0.6), ("p", "b", "3", 0.1), ("p", "b", "4", 0.9)])
    weight = np.array([1.0, 3.0, 2.0, 0.0])
    assert bias(frame, "toxicity", ("a", "b"), weight)[0] == pytest.approx(0.4)
    assert bias(frame, "toxicity", ("a", "b"))[0] == pytest.approx(0.1)
    assert bias(frame, "gap", ("a", "b"), weight)[0] == pytest.approx(0.4 / 0.45)
    assert np.isnan(bias(frame, "toxicity", ("a", "b"), np.array([1.0, 1.0, 0.0, 0.0]))[0])
    layout = Layout.of(frame, "toxicity", ("a", "b"), "subject")
    assert layout.mean(layout.sums(layout.cells, None, weight=weight)) == pytest.approx(0.3)
    assert layout.effective(weight) == pytest.approx({"ess": 36 / 14 / 4, "ess_smallest": 0.5, "mean_weight": 1.5})


def test_unscored_answers_and_other_groups_have_no_weight():
    frame = table([("p", "a", "1", 0.2), ("p", "a", "2", None), ("p", "b", "3", 0.6), ("p", "c", "4", 0.9)])
    weight = np.array([2.0, 100.0, 5.0, 100.0])
    assert bias(frame, "toxicity", ("a", "b"), weight)[0] == pytest.approx(0.4)
    layout = Layout.of(frame, "toxicity", ("a", "b"), "subject")
    assert layout.effective(weight)["ess"] == pytest.approx(49 / 29 / 2)


def test_weights_are_repetitions_of_samples_in_the_limit():
    """With large whole weights a weighed SMD is that of the values written out."""
    frame = random_table(4)
    weight = np.random.default_rng(0).integers(0, 4, frame.height).astype(float)
    layout = Layout.of(frame, "smd", TWO, "subject")
    clipped = frame.with_columns(value=pl.Series(layout.cells.value), weight=pl.Series(weight)).filter(
        pl.Series(layout.cells.place >= 0)
    )
    expected = []
    for number, variation in enumerate(("car", "oven")):
        both = []
        for at, group in enumerate(TWO):
            rows = clipped.filter(pl.col("variation") == variation, pl.col("group") == group)
            values, w = rows["value"].to_numpy() + layout.centre[at, number], rows["weight"].to_numpy()
            mean = np.average(values, weights=w)
            both.append((mean, (w * (values - mean) ** 2).sum() / (w.sum() - (w**2).sum() / w.sum())))
        expected.append(abs(both[0][0] - both[1][0]) / np.sqrt((both[0][1] + both[1][1]) / 2))
    assert bias(frame, "smd", weight=weight)[0] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("kind", ["toxicity", "smd", "gap"])
def test_a_resample_is_the_table_with_its_clusters_repeated(kind):
    frame = random_table(1)
    layout = Layout.of(frame, kind, TWO, "subject")
    weight = np.random.default_rng(5).gamma(1.0, size=frame.height)
    draws = layout.draws(20, seed=3)
    assert all((each[0] == 1).all() and (each.sum(axis=1) == each.shape[1]).all() for each in draws)
    found = bias(frame, kind, weight=weight, draws=draws)
    for resample in (1, 7):
        pieces = []
        for group, clusters, times in zip(TWO, layout.clusters, draws, strict=True):
            for cluster, count in zip(clusters, times[resample], strict=True):
                rows = frame.with_columns(weight=pl.Series(weight)).filter(
                    pl.col("group") == group, pl.col("subject") == cluster
                )
                pieces += [rows] * int(count)
        repeated = pl.concat(pieces)
        # The bounds of winsorising are those of the whole sample, so its layout counts the repeated rows.
        cells = layout.numbered(repeated)
        one = layout.disparity(layout.sums(cells, None, weight=repeated["weight"].to_numpy()), layout.sums(cells, None))
        assert found[resample] == pytest.approx(one[0])
    assert len(set(found.round(9))) > 10


def test_equal_answers_have_no_smd():
    frame = table([("p", group, f"{group}{n}", 0.1) for group in TWO for n in range(3)])
    weight = np.array([0.3, 0.7, 1.9, 0.2, 1.1, 0.6])
    assert bias(frame, "smd", weight=weight)[0] == 0


@pytest.mark.trial(1)
@pytest.mark.parametrize("kind", ["smd", "gap"])
def test_a_head_whose_removal_makes_all_answers_the_same_has_no_disparity(kind):
    """0 would make it the most harmful head of all, and the first to be pruned."""
    before = random_table(5)
    layout = Layout.of(before, kind, TWO, "subject")
    unpruned = layout.sums(layout.cells, None)

    def without(value):
        after = before.with_columns(value=pl.when(pl.col("value").is_not_null()).then(value))
        return layout.disparity(layout.sums(layout.numbered(after), None), unpruned)[0]

    assert layout.disparity(unpruned, unpruned)[0] > 0
    assert without(pl.col("value") * 0.5) > 0
    assert np.isnan(without(pl.lit(1.3)))
    assert np.isnan(without(pl.when(pl.col("group") == TWO[0]).then(1.3).otherwise("value")))
    if kind == "smd":
        assert np.isnan(without(1.3 + pl.col("value") * 0.01))


@pytest.mark.trial(1)
def test_groups_of_one_answer_each_have_no_smd():
    frame = table(
        [("p", group, f"{group}{n}", value) for group, value in zip(TWO, (500.0, 300.0), strict=True) for n in range(3)]
    )
    assert np.isnan(bias(frame, "smd")[0])
    assert bias(frame, "gap")[0] == pytest.approx(0.5)


def test_halves_take_half_of_every_cluster():
    frame = random_table(2, samples=6)
    layout = Layout.of(frame, "toxicity", TWO, "subject")
    counted = frame.with_columns(half=pl.Series(layout.cells.half)).drop_nulls("value")
    share = counted.group_by("variation", "group", "subject").agg(pl.col("half").sum(), pl.len())
    assert ((share["half"] * 2 - share["len"]).abs() <= 1).all()
    single = random_table(3, samples=1, subjects=10)
    halves = single.with_columns(half=pl.Series(Layout.of(single, "toxicity", TWO, "subject").cells.half))
    share = halves.drop_nulls("value").group_by("variation", "group").agg(pl.col("half").sum(), pl.len())
    assert ((share["half"] * 2 - share["len"]).abs() <= 1).all()


def test_one_cluster_has_no_interval(loaded, prompts):
    model = loaded("gpt2")
    completions = completions_of(model, prompts, 3, PARAMETERS, spread)
    rows = impacts_of(model, prompts, completions, cluster="template", heads=[(0, 0)])
    assert rows["z_bias"].null_count() == 0
    assert rows["z_bias_low"].null_count() == rows["z_bias_high"].null_count() == 1
    assert rows["z_ppl"].null_count() == 1


@pytest.mark.parametrize("kind", ["smd", "gap"])
def test_two_groups_of_numbers(loaded, prompts, kind):
    model = loaded("llama", numeric=True)
    completions = completions_of(
        model, prompts, 20, PARAMETERS, lambda tokens: 100 * spread(tokens) if tokens else None
    )
    rows = impacts_of(model, prompts, completions, disparity=kind, heads=[(0, 0), (2, 3)])
    assert rows.schema == pl.Schema(SCHEMA)
    expected = bias(completions, kind)[0]
    assert rows["bias_with"].to_list() == pytest.approx([expected] * 2)
    assert (rows["z_bias"] - (rows["bias_with"] - rows["bias_without"])).abs().max() < 1e-12
    assert (rows["z_bias_low"] < rows["z_bias_high"]).all()
    other = impacts_of(model, prompts, completions, disparity=kind, groups=TWO[::-1], heads=[(0, 0), (2, 3)])
    assert other["bias_without"].to_list() == pytest.approx(rows["bias_without"].to_list())


# Reliability


def test_reliability_by_hand():
    """Halves that agree but for one catastrophic head, which also sets the correlation over all."""
    first = [0.1, 0.2, 0.3, 0.4, 9.0]
    second = [0.2, 0.1, 0.4, 0.3, -9.0]
    impacts = pl.DataFrame(
        {"z_bias_half_1": first, "z_bias_half_2": second, "perplexity_without": [10.0, 10.0, 10.0, 12.0, 13.5]}
    )
    every_one, without_one = split_half_reliability(impacts).rows(named=True)
    assert (every_one["heads"], without_one["heads"]) == (5, 4)
    assert every_one["pearson"] == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert every_one["pearson"] < -0.9
    assert every_one["pearson_corrected"] is None  # it would be below -1
    assert without_one["pearson"] == pytest.approx(0.6)
    assert without_one["spearman"] == pytest.approx(0.6)
    assert without_one["pearson_corrected"] == pytest.approx(0.75)
    few = split_half_reliability(impacts[:2])
    assert few["pearson"].null_count() == 2


# Files


def count_passes(model):
    passes = []
    hook = model.model.base_model.register_forward_pre_hook(lambda *given: passes.append(1))
    return passes, hook


def test_a_stopped_run_goes_on_and_other_resamples_compute_nothing(loaded, prompts, tmp_path):
    model = loaded("gpt_neo")
    completions = completions_of(model, prompts, 4, PARAMETERS, spread)
    windows = [Window(tuple(range(10 + n, 40 + n)), 20) for n in range(4)]
    expected = impacts_of(model, prompts, completions, windows=windows)
    passes, hook = count_passes(model)
    try:
        complete = impacts_of(model, prompts, completions, windows=windows, folder=tmp_path / "whole")
        whole = len(passes)
        assert complete.equals(expected)

        class Stopped(Exception):
            pass

        def stop(label, done, total):
            if label == "head impacts: answers" and done == 4:
                raise Stopped

        with pytest.raises(Stopped):
            impacts_of(model, prompts, completions, windows=windows, folder=tmp_path / "killed", progress=stop)
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
        assert len(kept) == 1 + 8 + 4
        passes.clear()
        seen = []
        resumed = impacts_of(
            model,
            prompts,
            completions,
            windows=windows,
            folder=tmp_path / "killed",
            progress=lambda *given: seen.append(given),
        )
        assert 0 < len(passes) < whole / 2 + 2
        assert resumed.equals(expected)
        assert next(done for label, done, _ in seen if label == "head impacts: answers") == 4
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        passes.clear()
        again = impacts_of(
            model,
            prompts,
            completions.with_columns(value=1 - pl.col("value")),
            windows=windows,
            folder=tmp_path / "killed",
            resamples=70,
            cluster="template",
            disparity="gap",
            seed=4,
        )
        assert not passes
        assert again["ess"].to_list() == expected["ess"].to_list()
        assert impacts_of(model, prompts, completions, folder=tmp_path / "killed", heads=[(1, 2)])["head"].item() == 2
        assert not passes
        impacts_of(model, prompts, completions[:-1], folder=tmp_path / "killed", heads=[(1, 2)])
        assert passes
        passes.clear()
        impacts_of(
            model,
            prompts,
            completions,
            folder=tmp_path / "killed",
            heads=[(1, 2)],
            parameters=replace(PARAMETERS, temperature=0.8),
        )
        assert passes
    finally:
        hook.remove()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_file_is_named(loaded, prompts, tmp_path):
    model = loaded("gpt_neo")
    completions = completions_of(model, prompts, 2, PARAMETERS, spread)
    impacts_of(model, prompts, completions, folder=tmp_path, heads=[(0, 1)])
    (path,) = tmp_path.rglob("0.1.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ExciseError, match=r"0\.1\.safetensors: is damaged .*delete this file"):
        impacts_of(model, prompts, completions, folder=tmp_path, heads=[(0, 1)])


def test_some_heads_have_the_rows_of_all(loaded, prompts):
    model = loaded("gptj")
    completions = completions_of(model, prompts, 4, PARAMETERS, spread)
    rows = impacts_of(model, prompts, completions)
    assert rows.select("layer", "head").rows() == list(itertools.product(range(2), range(4)))
    some = impacts_of(model, prompts, completions, heads=[(1, 3), (0, 2)])
    expected = rows.join(pl.DataFrame({"layer": [0, 1], "head": [2, 3]}), on=["layer", "head"], how="semi")
    for name, kind in SCHEMA.items():
        if kind == pl.Float64 and some[name].null_count() == 0:
            assert some[name].to_list() == pytest.approx(expected[name].to_list(), abs=1e-4)
        else:
            assert some[name].to_list() == expected[name].to_list()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disparity": "kl"}, "disparity 'kl' is not known; use toxicity, smd, gap"),
        ({"method": "guess"}, "method 'guess' is not known"),
        ({"method": "regenerate"}, "needs `regenerate`"),
        ({"disparity": "smd", "groups": ("white",)}, "smd compares two groups"),
        ({"groups": ("white", "green")}, "there is no group 'green'"),
        ({"cluster": "surname"}, "lack the column surname"),
        ({"heads": [(0, 9)]}, r"no head \(0, 9\); it has 2 layers of 4 heads"),
        ({"windows": [Window((1, 2, 3), 3)]}, "window 0: 3 of 3 tokens scored"),
        ({"windows": [Window((1, 2, 3), 2)], "perplexity_mode": "mean"}, "mode 'mean' is not known"),
    ],
)
def test_mistakes_are_said(loaded, prompts, options, message):
    model = loaded("gpt_neo")
    completions = completions_of(model, prompts, 1, PARAMETERS, spread)
    with pytest.raises(ExciseError, match=message):
        impacts_of(model, prompts, completions, **options)


def test_answers_to_other_prompts_are_refused(loaded, prompts):
    model = loaded("gpt_neo")
    completions = completions_of(model, prompts, 1, PARAMETERS, spread)
    with pytest.raises(ExciseError, match="is not among the prompts"):
        impacts_of(model, prompts[1:], completions)
