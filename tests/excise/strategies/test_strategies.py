"""Strategies become masks: which weights, at which level, and controls of exactly the same size."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import yaml

from excise.attribution import Answered, attribute
from excise.attribution.attention import read_attention
from excise.attribution.gap_free import ask
from excise.attribution.gap_gradient import read_candidates
from excise.attribution.snip import read_snip
from excise.attribution.wanda import read_norms
from excise.errors import ExciseError
from excise.generation.completions import complete
from excise.generation.sampling import SamplingParameters
from excise.interventions.combining import intersection, union
from excise.interventions.packed import Mask
from excise.interventions.weights import WeightMask
from excise.scenarios import Variation, expand
from excise.strategies import build as strategies_module
from excise.strategies import measured_path
from excise.strategies.build import (
    Making,
    Paths,
    SourceMask,
    build_cross_context_masks,
    build_head_masks,
    build_masks,
    grid_masks,
)
from excise.strategies.config import Strategy, load_strategies

# The user's file

SOUND = {
    "score": "wanda",
    "selection": "set_difference",
    "parameters": {"tau_min": 0.3, "tau_maj": 0.2},
    "roles": ["q", "up"],
}
HEADS = {"score": "attention", "selection": "set_difference", "parameters": {"k_min": 4, "k_maj": 2}}
OURS = {
    "score": "gap_gradient",
    "selection": "measured_path",
    "parameters": {"density": 0.005, "significance": 1, "lost": 1},
    "roles": ["q", "up"],
}


def write(path, entries):
    path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries))
    return path


def test_the_built_in_strategies_are_the_paper_s_and_ours():
    strategies = load_strategies()
    usual = {
        kind: [key for key, each in strategies.items() if each.enabled and kind in each.outcomes]
        for kind in ("number", "toxicity")
    }
    assert usual["number"] == ["set_difference", "gap_gradient", "attention_heads"]
    methods = ("fasp", "fairness_only", "performance_only", "magnitude", "gradient", "random_heads")
    alphas = [f"{step / 50:.2f}" for step in range(1, 11)]
    sweep = [f"fasp_gamma-{gamma}" for gamma in ("0.20", "0.40", "0.50", "0.60", "0.70")]
    assert usual["toxicity"] == [f"{method}-{alpha}" for method in methods for alpha in alphas] + sweep
    paper = strategies["set_difference"]
    assert paper.parameters == {"tau_min": 0.40, "tau_maj": 0.35}
    assert paper.roles == ("q", "k", "v", "gate", "up", "down")
    assert paper.controls == ("random", "pooled_band", "reversed", "permuted")
    enabled = [strategies[key] for key in usual["number"]]
    published = ("prompt_specific", "within_context", "cross_context")
    assert {each.levels for each in enabled} == {published, (*published, "all_contexts")}
    heads = strategies["attention_heads"]
    assert [int(heads.parameters[name] * 1024) for name in ("tau_min", "tau_maj")] == [40, 5]
    assert heads.ablation == "zero_query"


def test_a_user_s_file_adds_and_replaces(tmp_path):
    path = write(tmp_path / "strategies.yaml", {"mine": SOUND, "gap_gradient": OURS | {"controls": []}})
    strategies = load_strategies([path, tmp_path / "none.yaml"])
    assert set(strategies) == {*load_strategies(), "mine"}
    assert strategies["mine"].key == "mine"
    assert strategies["gap_gradient"].controls == ()
    assert load_strategies([write(tmp_path / "empty.yaml", "# nothing\n")]) == load_strategies()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({k: v for k, v in SOUND.items() if k != "score"}, ["mine.score"]),
        ({k: v for k, v in SOUND.items() if k != "roles"}, ["mine", "roles: name the matrices"]),
        (SOUND | {"score": "fisher"}, ["mine.score", "wanda"]),
        (SOUND | {"score": "snip", "controls": ["permuted"]}, ["mine", "permuted", "snip"]),
        (SOUND | {"score": "attention"}, ["mine", "roles", "heads"]),
        (SOUND | {"ablation": "zero_query"}, ["mine", "ablation of score wanda is zero_weights"]),
        (SOUND | {"scope": "model"}, ["mine.scope", "global"]),
        (OURS | {"scope": "row"}, ["mine", "scope of score gap_gradient is global"]),
        (HEADS | {"parameters": {"k_min": 2.5, "k_maj": 1}}, ["mine", "k_min is 2.5", "whole number"]),
        (HEADS | {"parameters": {"k_min": 0, "k_maj": 0}}, ["mine", "k_min is 0", "above 0"]),
        (HEADS | {"parameters": {"k_min": 2, "tau_maj": 0.1}}, ["mine", "tau_maj, tau_min or k_maj, k_min"]),
        (SOUND | {"combine": "votes"}, ["mine", "parameters.votes"]),
        (SOUND | {"parameters": {"tau_min": 0.3, "tau_maj": 0.2, "votes": 0.5}}, ["mine", "combine: votes"]),
        (SOUND | {"selection": "best"}, ["mine.selection", "set_difference"]),
        (SOUND | {"level": "all"}, ["mine.level"]),
        (SOUND | {"levels": ["everywhere"]}, ["mine.levels.0", "within_context"]),
        (SOUND | {"controls": ["randon"]}, ["mine.controls.0", "random"]),
        (SOUND | {"roles": []}, ["mine", "roles: name the matrices"]),
        (SOUND | {"roles": ["q", "w"]}, ["mine", "roles w", "q, k, v, o"]),
        (SOUND | {"parameters": {"tau_min": 0.3}}, ["mine", "tau_maj, tau_min", "found tau_min"]),
        (SOUND | {"parameters": {}}, ["mine", "tau_maj, tau_min", "none"]),
        (SOUND | {"parameters": {"tau_min": 0.3, "tau_maj": 0.2, "tau": 1}}, ["mine", "found tau, tau_maj, tau_min"]),
        (SOUND | {"parameters": {"tau_min": 40, "tau_maj": 0.2}}, ["mine", "parameters.tau_min is 40"]),
        (SOUND | {"parameters": {"tau_min": 0.3, "tau_maj": -0.2}}, ["mine", "parameters.tau_maj is -0.2"]),
        (SOUND | {"parameters": {"tau_min": float("nan"), "tau_maj": 0.2}}, ["mine", "parameters.tau_min is nan"]),
        (SOUND | {"parameters": {"tau_min": "much", "tau_maj": 0.2}}, ["mine.parameters.tau_min"]),
        (SOUND | {"score": "gap_gradient"}, ["mine", "set_difference does not work on score gap_gradient"]),
        (OURS | {"controls": ["reversed"]}, ["mine", "reversed do not exist for score gap_gradient"]),
        (OURS | {"parameters": {"density": 0.001, "significance": 0}}, ["mine", "parameters.significance is 0"]),
        (OURS | {"parameters": {"density": 0.05}}, ["mine", "parameters.density is 0.05", "0.01"]),
        (SOUND | {"key": "other"}, ["mine", "key"]),
        ("set_difference", ["mine", "fields"]),
    ],
)
def test_a_mistake_is_named_by_file_strategy_and_field(tmp_path, fields, words):
    path = write(tmp_path / "strategies.yaml", {"sound": SOUND, "mine": fields})
    strategies = load_strategies([path])
    assert strategies["sound"].key == "sound"
    with pytest.raises(ExciseError) as error:
        strategies["mine"]
    message = str(error.value)
    assert f"{path}: mine" in message
    assert "(line" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", ["random", "pooled_band", "reversed", "permuted", "unpruned", "With Blank", "9th", ""])
def test_a_key_that_means_something_else_is_refused(tmp_path, key):
    path = write(tmp_path / "strategies.yaml", {key: SOUND})
    strategies = load_strategies([path])
    assert key not in strategies
    with pytest.raises(ExciseError, match=r"strategies\.yaml: "):
        strategies[key]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "YAML"),
        ("- a", "must map strategy keys"),
        ("a: \x07", "YAML"),
    ],
)
def test_a_file_that_is_no_list_of_strategies_is_said(tmp_path, text, words):
    """By whoever asks for any strategy, as the file may have changed it."""
    path = write(tmp_path / "strategies.yaml", text)
    strategies = load_strategies([path])
    for key in ("a", "gap_gradient"):
        with pytest.raises(ExciseError, match=words) as error:
            strategies[key]
        assert str(path) in str(error.value)


# Masks

SEED, DRAWS, PERMUTATIONS = 7, 3, 2
ANYTHING = measured_path.Budgets(spread=-10.0, commonest=1.0, change=100.0, lost=1.0, least_closed=-100.0)


@pytest.fixture(scope="module")
def three_items(scenario):
    """The small scenario with a third item: leaving one out of two would leave no intersection."""
    return scenario.model_copy(
        update={"variations": scenario.variations | {"lamp": Variation(fields={"item": "lamp"})}}
    )


@pytest.fixture(scope="module")
def answered(loaded, three_items):
    """`answered(architecture)`: a model and its answers about three items."""
    made = {}

    def make(architecture):
        if architecture not in made:
            model = loaded(architecture, numeric=architecture == "llama")
            parameters = SamplingParameters(temperature=0.9, top_p=0.95, seed=1)
            rows, _ = complete(model, expand(three_items), 6, parameters, outcome=three_items.outcome)
            if architecture != "llama":  # random models say no numbers; any value will do
                rows = rows.with_columns(value=pl.col("token_ids").list.sum().cast(pl.Float64))
            made[architecture] = model, rows
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def attributed(answered, three_items, tmp_path_factory):
    """`attributed(architecture)`: a model and its attribution files of three items."""
    made = {}

    def make(architecture):
        if architecture not in made:
            model, rows = answered(architecture)
            scores, folder = ["wanda", "attention", "snip", "gap_gradient"], tmp_path_factory.mktemp("scores")
            made[architecture] = model, scored(three_items, model, rows, scores, folder)
        return made[architecture]

    return make


def scored(scenario, model, rows, scores, folder):
    """Attribution files of some rows of the scenario's answers."""
    return attribute(
        Answered(model, expand(scenario), rows, scenario.comparison, scenario.outcome, permutations=PERMUTATIONS),
        scores,
        folder=folder,
    )


@pytest.fixture
def paths(answered, three_items, tmp_path):
    """`paths("llama")`: what measured paths need; budgets that any mask keeps. noted: (strategy, level, variation)."""

    def make(architecture, budgets=ANYTHING, noted=None, sources=None):
        model, rows = answered(architecture)

        def asked(scenario, variation, significance):
            if sources is not None:
                sources.append((scenario, variation, significance))
            return ask(
                Answered(
                    model,
                    expand(three_items),
                    rows.filter(pl.col("variation") == variation),
                    three_items.comparison,
                    three_items.outcome,
                ),
                place=variation,
                significance=significance,
            )

        def note(*told):
            if noted is not None:
                noted.append(told)

        return Paths(model, asked, budgets, SEED, tmp_path / "paths", note)

    return make


@pytest.fixture(autouse=True)
def short_paths(monkeypatch):
    monkeypatch.setattr(measured_path, "STEPS", 4)


@pytest.fixture
def build(attributed, paths, tmp_path):
    """`build("llama", strategy)`: all masks, each through a file as in a real run."""

    def run(architecture, *strategies, files=None, **options):
        model, every = attributed(architecture)
        stored = []

        def store(mask):
            path = tmp_path / f"{mask.fingerprint}.safetensors"
            mask.save(path)
            stored.append(path)
            return path

        making = Making(DRAWS, SEED, permutations=PERMUTATIONS, paths=paths(architecture))
        making, every = replace(making, **options), every if files is None else files
        return list(build_masks(model, strategies, every, making, scenario="purchase", store=store))

    return run


def strategy(key="mine", **fields):
    return Strategy(key=key, **SOUND | fields)


EVERYTHING = {"controls": ["random", "pooled_band", "reversed", "permuted"]}


def ranks(scores: np.ndarray) -> np.ndarray:
    """Flat indices, best first, equal scores by index."""
    return np.argsort(-scores.ravel().astype(np.float64), kind="stable")


def by_hand(model, norms, roles, tau_min, tau_maj) -> dict[str, dict[str, set[int]]]:
    """The set difference and its controls as sets of flat indices, one matrix at a time, by sorting (method A6)."""
    found: dict[str, dict[str, set[int]]] = {}
    for linear in model.topology.linears:
        if linear.role not in roles:
            continue
        weight = np.abs(linear.weight(model.model).detach().reshape(linear.shape).numpy())
        order = {name: ranks(weight * vectors[f"{linear.layer}.{linear.site}"]) for name, vectors in norms.items()}
        top_min, top_maj = int(tau_min * weight.size), int(tau_maj * weight.size)
        chosen = set(order["minority"][:top_min]) - set(order["majority"][:top_maj])
        count = len(chosen)

        def outside(first, second, order=order, top_maj=top_maj, count=count):
            left = set(order[second][:top_maj])
            return set([index for index in order[first] if index not in left][:count])

        masks = {"mine": chosen, "pooled_band": set(order["pooled"][top_maj : top_maj + count])}
        masks["reversed"] = outside("majority", "minority")
        for draw in range(PERMUTATIONS):
            masks[f"permuted {draw}"] = outside(f"permuted_minority_{draw}", f"permuted_majority_{draw}")
        for name, indices in masks.items():
            found.setdefault(name, {})[linear.key] = indices
    return found


def as_sets(mask: Mask) -> dict[str, set[int]]:
    return {key: set(np.flatnonzero(mask.array(key))) for key in mask.counts()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_set_difference_masks_and_their_controls_are_those_of_sorting_by_hand(build, attributed, architecture):
    model, files = attributed(architecture)
    masks = build(architecture, strategy(**EVERYTHING))
    for file in files:
        if file.score != "wanda":
            continue
        expected = by_hand(model, read_norms(file.path), ("q", "up"), 0.3, 0.2)
        found = {
            f"permuted {each.draw}" if each.strategy == "permuted" else each.strategy: as_sets(each.mask)
            for each in masks
            if (each.variation, each.level) == (file.variation, "prompt_specific") and each.strategy != "random"
        }
        assert found == expected
        assert len({str(sorted(each["1.up"])) for each in expected.values()}) == len(expected)  # they do differ


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("own", ["set_difference", "gap_gradient"])
def test_a_control_has_exactly_as_many_weights_in_every_matrix(build, architecture, own):
    chosen = load_strategies()[own]
    if own == "gap_gradient":
        chosen = chosen.model_copy(update={"parameters": {"significance": 1.0, "density": 0.01, "lost": 1.0}})
    masks = build(architecture, chosen)
    owners = {(each.variation, each.level): each for each in masks if each.matched_to is None}
    controls = [each for each in masks if each.matched_to is not None]
    assert {each.strategy for each in owners.values()} == {own}
    # Three items at two levels; a path of a tiny random model may find no mask that closes anything.
    assert len(owners) == 6 or (own == "gap_gradient" and len(owners) >= 4)
    per_level = {
        "prompt_specific": DRAWS + (2 + PERMUTATIONS if own == "set_difference" else 0),
        "within_context": DRAWS,
    }
    for (variation, level), owner in owners.items():
        matched = [each for each in controls if (each.variation, each.level) == (variation, level)]
        assert len(matched) == per_level[level]
        assert owner.mask.count > 0
        for each in matched:
            assert each.matched_to == own
            assert each.mask.counts() == owner.mask.counts()
            assert each.mask.shapes == owner.mask.shapes
            assert each.mask != owner.mask
    draws = [(each.variation, each.level, each.strategy, each.draw) for each in controls]
    assert len(set(draws)) == len(draws)


def test_random_draws_differ_and_come_again(build, attributed):
    """By draw, variation, level, strategy and seed; and whatever else is built beside them."""
    mine = strategy(controls=["random"])
    first = [each.mask.fingerprint for each in build("llama", mine) if each.strategy == "random"]
    assert len(set(first)) == len(first) == 3 * 2 * DRAWS
    assert [each.mask.fingerprint for each in build("llama", mine) if each.strategy == "random"] == first
    both = build("llama", strategy("another", controls=["random"]), mine)
    assert [e.mask.fingerprint for e in both if e.strategy == "random" and e.matched_to == "mine"] == first
    others = [e.mask.fingerprint for e in both if e.strategy == "random" and e.matched_to == "another"]
    others += [each.mask.fingerprint for each in build("llama", mine, seed=SEED + 1) if each.strategy == "random"]
    assert not set(others) & set(first)
    more = [each.mask.fingerprint for each in build("llama", mine, random_draws=5) if each.strategy == "random"]
    assert set(first) < set(more)


def test_within_context_is_the_intersection_of_the_other_variations(build):
    masks = build("llama", strategy())
    own = {each.variation: each.mask for each in masks if each.strategy == "mine" and each.level == "prompt_specific"}
    within = {each.variation: each.mask for each in masks if each.strategy == "mine" and each.level == "within_context"}
    assert set(within) == set(own) == {"car", "oven", "lamp"}
    for variation, mask in within.items():
        others = [each for name, each in own.items() if name != variation]
        assert mask == intersection(others)
        assert 0 < mask.count < own[variation].count
    assert len(set(within.values())) == 3


def test_levels_can_be_left_out(build, attributed):
    """A single variation has no others to make a within-context mask from."""
    assert {each.level for each in build("llama", strategy(levels=["prompt_specific"]))} == {"prompt_specific"}
    within = build("llama", strategy(levels=["within_context"], **EVERYTHING))
    both = build("llama", strategy(**EVERYTHING))
    assert [each for each in both if each.level == "within_context"] == within
    _, files = attributed("llama")
    alone = build("llama", strategy(), files=[file for file in files if file.variation == "car"])
    assert {each.level for each in alone} == {"prompt_specific"}
    ours = build("llama", Strategy(key="ours", **OURS), files=[file for file in files if file.variation == "car"])
    assert {(each.variation, each.level) for each in ours} == {("car", "prompt_specific")}


def test_progress_counts_every_mask_to_its_end(build):
    seen = []
    build("llama", strategy(), Strategy(key="ours", **OURS), progress=lambda *each: seen.append(each))
    assert seen == [(f"masks {key}", done, 6) for key in ("mine", "ours") for done in range(1, 7)]


# gap_gradient


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_mask_is_one_path_for_all_its_variations(build, paths, architecture):
    """The variation itself, or all others together; weights of the roles alone, as many as the density allows."""
    noted, sources = [], []
    ours = Strategy(key="ours", **OURS | {"roles": ["q", "v", "down"], "controls": []})
    masks = build(architecture, ours, paths=paths(architecture, noted=noted, sources=sources))
    items = ("car", "oven", "lamp")
    assert [(each.variation, each.level) for each in masks] == [
        (variation, level) for level in ("prompt_specific", "within_context") for variation in items
    ]
    assert [(strategy, level, variation) for strategy, level, variation, _ in noted] == [
        ("ours", each.level, each.variation) for each in masks
    ]
    for each, (*_, path) in zip(masks, noted, strict=True):
        others = [variation for variation in items if variation != each.variation]
        assert set(path.steps[0].measured) == ({each.variation} if each.level == "prompt_specific" else set(others))
        assert each.mask == path.mask
        assert 0 < each.mask.count <= 0.005 * each.mask.size
        assert {key.split(".")[1] for key in each.mask.shapes} == {"q", "v", "down"}
    assert set(sources) == {("purchase", variation, 1.0) for variation in items}
    assert len({each.mask.fingerprint for each in masks}) == 6


def test_where_no_mask_keeps_the_budgets_there_is_none(build, paths):
    """Nor a control; and why is noted."""
    noted = []
    tight = measured_path.Budgets(spread=1.0, commonest=0.0, change=0.0)
    usual = Strategy(key="usual", **OURS | {"parameters": {"density": 0.005, "significance": 1e-9}})
    ours = Strategy(key="ours", **OURS)
    assert build("llama", ours, usual, paths=paths("llama", tight, noted)) == []
    assert {(strategy, path.reason) for strategy, _, _, path in noted} == {
        ("ours", measured_path.NO_MASK),
        ("usual", measured_path.NO_GAP),
    }


def test_candidates_of_several_variations_are_each_one_s_best(attributed):
    _, files = attributed("llama")
    several = [file.path for file in files if file.score == "gap_gradient"]
    found = strategies_module._best_of_all([read_candidates(path) for path in several])
    for key, chosen in found.items():
        expected = []
        for path in several:
            scores = read_candidates(path)
            each = scores.candidates[key]
            order = np.argsort(-each.drop / (each.harm + scores.damping), kind="stable")
            expected += each.index[order[: -(-len(order) // 3)]].tolist()
        assert chosen.tolist() == expected


def test_measuring_needs_its_paths(build):
    with pytest.raises(ExciseError, match="ours makes masks by measuring: give build_masks its paths"):
        build("llama", Strategy(key="ours", **OURS), paths=None)


# Heads, SNIP, scopes


def ranked(scores: np.ndarray, count: int) -> set[int]:
    return set(ranks(scores)[:count])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(("ablation", "role"), [("zero_query", "head_query"), ("zero_output", "head_output")])
def test_heads_are_ranked_over_all_layers_by_attention_to_the_name(build, attributed, architecture, ablation, role):
    model, files = attributed(architecture)
    heads = Strategy(key="heads", **HEADS | {"ablation": ablation, "reduce": "max", **EVERYTHING})
    masks = build(architecture, heads)
    sizes = {(each.variation, each.level): each.mask.count for each in masks if each.matched_to is None}
    for file in files:
        if file.score != "attention":
            continue
        scores = read_attention(file.path)["max"]
        expected = ranked(scores["minority"], 4) - ranked(scores["majority"], 2)
        (mine,) = (
            each.mask
            for each in masks
            if (each.strategy, each.level, each.variation) == ("heads", "prompt_specific", file.variation)
        )
        assert list(mine.shapes) == [f"{layer}.{role}" for layer in range(model.topology.layers)]
        found = np.vstack([mine.array(key) for key in mine.shapes])
        assert set(np.flatnonzero(found)) == expected
    for each in masks:
        assert each.mask.count == sizes[each.variation, each.level]


def test_counts_and_the_fractions_that_stand_for_them_choose_the_same_heads(build, attributed):
    heads = attributed("llama")[0].topology.layers * attributed("llama")[0].topology.heads
    fractions = {"tau_min": 4.5 / heads, "tau_maj": 2.5 / heads}
    one, two = (Strategy(key="heads", **HEADS | {"parameters": each}) for each in (HEADS["parameters"], fractions))
    assert [each.mask for each in build("llama", one)] == [each.mask for each in build("llama", two)]


def test_snip_masks_are_the_set_difference_of_snip_scores(build, attributed):
    _, files = attributed("gpt2")
    masks = build("gpt2", Strategy(key="mine", **SOUND | {"score": "snip", "controls": []}))
    (path,) = (file.path for file in files if (file.score, file.variation) == ("snip", "car"))
    (mine,) = (each.mask for each in masks if (each.variation, each.level) == ("car", "prompt_specific"))
    for key in mine.shapes:
        one, two = read_snip(path, key, "minority"), read_snip(path, key, "majority")
        expected = ranked(one, int(0.3 * one.size)) - ranked(two, int(0.2 * two.size))
        assert set(np.flatnonzero(mine.array(key))) == expected


@pytest.mark.parametrize("scope", ["row", "global"])
def test_a_scope_ranks_rows_or_all_matrices_together(build, attributed, scope):
    model, files = attributed("llama")
    masks = build("llama", strategy(scope=scope, **EVERYTHING))
    (path,) = (file.path for file in files if (file.score, file.variation) == ("wanda", "oven"))
    norms = read_norms(path)
    scores = {side: {} for side in ("minority", "majority")}
    for linear in model.topology.linears:
        if linear.role in ("q", "up"):
            weight = np.abs(linear.weight(model.model).detach().reshape(linear.shape).numpy())
            for side, found in scores.items():
                found[linear.key] = weight * norms[side][f"{linear.layer}.{linear.site}"]
    expected = {}
    if scope == "row":
        for key in scores["minority"]:
            rows = [
                ranked(one, int(0.3 * one.size)) - ranked(two, int(0.2 * two.size))
                for one, two in zip(scores["minority"][key], scores["majority"][key], strict=True)
            ]
            width = scores["minority"][key].shape[1]
            expected[key] = {row * width + column for row, columns in enumerate(rows) for column in columns}
    else:
        every = {side: np.concatenate([each.ravel() for each in found.values()]) for side, found in scores.items()}
        size = every["minority"].size
        chosen = ranked(every["minority"], int(0.3 * size)) - ranked(every["majority"], int(0.2 * size))
        start = 0
        for key, each in scores["minority"].items():
            expected[key] = {index - start for index in chosen if start <= index < start + each.size}
            start += each.size
    here = [each for each in masks if (each.variation, each.level) == ("oven", "prompt_specific")]
    (mine,) = (each for each in here if each.strategy == "mine")
    assert as_sets(mine.mask) == expected
    assert len(here) > 1
    assert all(each.mask.counts() == mine.mask.counts() for each in here)


def test_gap_gradient_takes_whole_heads(build, attributed):
    fields = {"roles": [], "ablation": "zero_output", "controls": []}
    fields["parameters"] = {"density": 0.5, "significance": 1}
    masks = build("llama", Strategy(key="ours", **OURS | fields))
    assert len(masks) >= 3  # a head without which the gap grows is none to prune
    for each in masks:
        assert 0 < each.mask.count <= 0.5 * each.mask.size
        assert {key.split(".")[1] for key in each.mask.shapes} == {"head_output"}


# Several masks into one


def test_union_and_votes_combine_the_other_variations(build):
    own = {each.variation: each.mask for each in build("llama", strategy(levels=["prompt_specific"], controls=[]))}
    for combine, parameters, expected in (
        ("union", {}, union),
        ("votes", {"votes": 0.5}, union),  # one of two is half of them
        ("votes", {"votes": 0.51}, intersection),
    ):
        fields = {"combine": combine, "parameters": SOUND["parameters"] | parameters, "controls": []}
        masks = build("llama", strategy(levels=["within_context"], **fields))
        assert {each.variation: each.mask for each in masks} == {
            variation: expected([mask for name, mask in own.items() if name != variation]) for variation in own
        }


def hand_made(tmp_path, name, *weights):
    array = np.zeros((2, 4), dtype=bool)
    array.flat[list(weights)] = True
    path = tmp_path / f"{name}.safetensors"
    WeightMask.from_arrays({"0.q": array}).save(path)
    return path


def test_a_cross_context_mask_is_what_all_other_scenarios_masks_share(tmp_path):
    """Three scenarios, hand-made: the pooled mask is in all of them, one source's in that one alone."""
    sources = [
        SourceMask("finance", "stocks", "mine", hand_made(tmp_path, 1, 0, 1, 2, 3), None),
        SourceMask("finance", "school", "mine", hand_made(tmp_path, 2, 1, 2, 3, 4), None),
        SourceMask("services", "tax", "mine", hand_made(tmp_path, 3, 2, 5), None),
        SourceMask("services", "chef", "other", hand_made(tmp_path, 4, 7), None),
        SourceMask("purchase", "car", "mine", hand_made(tmp_path, 5, 3, 6), None),
    ]
    making = Making(2, 0)
    made = build_cross_context_masks([strategy()], sources, "purchase", ["car", "oven"], making, per_source=True)
    masks = list(made)
    own = {(each.level, each.variation): set(as_sets(each.mask)["0.q"]) for each in masks if each.matched_to is None}
    assert own == {
        (level, variation): weights
        for level, weights in {
            "cross_context": {2},
            "cross_context/finance": {1, 2, 3},
            "cross_context/services": {2, 5},
        }.items()
        for variation in ("car", "oven")
    }
    controls = [each for each in masks if each.strategy == "random"]
    assert len(controls) == (2 + 1 + 1) * 2  # one draw for a single source
    counts = {level: len(weights) for (level, _), weights in own.items()}
    assert all(each.mask.count == counts[each.level] and each.matched_to == "mine" for each in controls)
    pooled = list(build_cross_context_masks([strategy()], sources, "purchase", ["car"], making, per_source=False))
    assert {each.level for each in pooled} == {"cross_context"}
    votes = strategy(combine="votes", parameters=SOUND["parameters"] | {"votes": 0.6})
    (mask,) = build_cross_context_masks([votes], sources, "purchase", ["car"], Making(0, 0), per_source=False)
    assert as_sets(mask.mask)["0.q"] == {1, 2, 3}
    # Without a source in another scenario there is nothing to make a mask of.
    alone = build_cross_context_masks([strategy()], sources[3:], "purchase", ["car"], making, per_source=True)
    assert not list(alone)


def test_an_all_contexts_mask_takes_the_scenario_itself_in(tmp_path):
    sources = [
        SourceMask("finance", "stocks", "mine", hand_made(tmp_path, 1, 1, 2, 3), None),
        SourceMask("purchase", "car", "mine", hand_made(tmp_path, 2, 0, 3, 6), None),
    ]
    for levels, expected in (
        (["all_contexts"], {"all_contexts": {3}}),
        (["all_contexts", "cross_context"], {"cross_context": {1, 2, 3}, "all_contexts": {3}}),
    ):
        chosen = [strategy(levels=levels)]
        made = build_cross_context_masks(chosen, sources, "purchase", ["car"], Making(0, 0), per_source=False)
        assert {each.level: set(as_sets(each.mask)["0.q"]) for each in made} == expected


def test_a_cross_context_mask_of_gap_gradient_is_one_path_for_all_sources(attributed, paths, tmp_path):
    _, files = attributed("llama")
    ours = Strategy(key="ours", **OURS | {"controls": [], "levels": ["cross_context", "all_contexts"]})
    lent = {file.variation: file.path for file in files if file.score == "gap_gradient"}
    places = {"car": "other", "oven": "other", "lamp": "games"}
    sources = [SourceMask(places[name], name, "ours", None, path) for name, path in lent.items()]
    noted = []
    made = build_cross_context_masks(
        [ours],
        sources,
        "games",
        ["chess", "go"],
        Making(0, 0, paths=paths("llama", noted=noted)),
        per_source=False,
    )
    masks = {(each.level, each.variation): each.mask for each in made}
    assert set(masks) == {(level, name) for level in ("cross_context", "all_contexts") for name in ("chess", "go")}
    measured = {level: set(path.steps[0].measured) for _, level, variation, path in noted if variation == ""}
    assert measured == {"cross_context": {"car", "oven"}, "all_contexts": {"car", "oven", "lamp"}}
    for (level, name), mask in masks.items():
        assert mask.count > 0
        assert mask == masks[level, "chess"], name
    none = build_cross_context_masks(
        [ours],
        sources,
        "games",
        ["chess"],
        Making(0, 0, paths=paths("llama", measured_path.Budgets(1.0, 0.0, 0.0))),
        per_source=False,
    )
    assert list(none) == []


# The grid


@pytest.mark.parametrize("fields", [SOUND, SOUND | {"scope": "global"}, HEADS])
def test_a_grid_s_masks_are_those_of_the_strategy_at_these_thresholds(build, attributed, fields):
    model, files = attributed("llama")
    points = [(4, 0), (4, 2), (6, 2)] if "k_min" in fields["parameters"] else [(0.3, 0.0), (0.3, 0.2), (0.5, 0.2)]
    names = list(fields["parameters"])
    grid = {(v, p): mask for v, p, mask in grid_masks(model, Strategy(key="mine", **fields), files, points)}
    assert set(grid) == {(variation, point) for variation in ("car", "oven", "lamp") for point in points}
    for point in points:
        changed = Strategy(key="mine", **fields | {"parameters": dict(zip(names, point, strict=True)), "controls": []})
        for each in build("llama", changed):
            if each.level == "prompt_specific":
                assert grid[each.variation, point] == each.mask
    with pytest.raises(ExciseError, match="a grid needs set_difference"):
        list(grid_masks(model, Strategy(key="ours", **OURS), files, points))


# What a model lacks


def test_roles_a_model_does_not_have_are_left_out_or_said(build):
    masks = build("gpt2", strategy(roles=["gate", "up"]))
    assert {key.split(".")[1] for each in masks for key in each.mask.shapes} == {"up"}
    for lacking in (strategy(roles=["gate"]), Strategy(key="ours", **OURS | {"roles": ["gate"]})):
        with pytest.raises(ExciseError, match=r"\.roles: tiny-gpt2 has none of these, it has q, k, v, o, up, down"):
            build("gpt2", lacking)


# Heads over a whole scenario


def impacts_of(perplexity, bias, **others):
    """Head impacts of two layers with three heads, by hand."""
    places = {"layer": [0, 0, 0, 1, 1, 1], "head": [0, 1, 2, 0, 1, 2]}
    return pl.DataFrame(places | {"perplexity_without": perplexity, "bias_without": bias, **others})


def head_strategy(key, score, selection="lowest", **parameters):
    return Strategy(key=key, score=score, selection=selection, parameters=parameters)


def heads_of(named):
    chosen = {layer: np.flatnonzero(named.mask.array(f"{layer}.head_output")[0]) for layer in range(2)}
    return {(layer, int(head)) for layer, heads in chosen.items() for head in heads}


def test_heads_are_pruned_as_fasp_and_its_baselines_say():
    impacts = impacts_of(
        [10.0, 50.0, 11.0, 12.0, 13.0, 14.0],
        [0.3, 0.0, 0.1, 0.2, 0.4, 0.05],
        magnitude=[0.9, 0.1, 0.8, 0.2, 1.0, 0.7],
        gradient=[0.5, 0.6, 0.1, 0.2, 0.3, 0.4],
    )
    third = 1 / 3 + 1e-6
    chosen = {
        "fasp": head_strategy("fasp", "head_impacts", "fasp", alpha=third, gamma=0.2),  # protects head 0.1
        "fairness": head_strategy("fairness", "head_impacts", "fasp", alpha=third, gamma=0),
        "performance": head_strategy("performance", "head_perplexity", alpha=third),
        "magnitude": head_strategy("magnitude", "head_magnitude", alpha=third),
        "gradient": head_strategy("gradient", "head_gradient", alpha=third),
    }
    made = {
        each.strategy: each for each in build_head_masks(chosen.values(), impacts, ["person"], random_draws=0, seed=0)
    }
    assert {key: heads_of(named) for key, named in made.items()} == {
        "fasp": {(1, 2), (0, 2)},
        "fairness": {(0, 1), (1, 2)},
        "performance": {(0, 0), (0, 2)},
        "magnitude": {(0, 1), (1, 0)},
        "gradient": {(0, 2), (1, 0)},
    }
    assert {named.level for named in made.values()} == {"own_scenario"}


@pytest.mark.trial(17)
@pytest.mark.parametrize(
    ("pruned", "of"),
    [
        ({(0, 1), (0, 2), (1, 0)}, {"score": "head_impacts", "selection": "fasp", "gamma": 0.5, "paper_ties": 1}),
        ({(0, 1)}, {"score": "head_impacts", "selection": "fasp", "gamma": 0.5}),
        ({(0, 0), (0, 1), (0, 2), (1, 0)}, {"score": "head_perplexity", "alpha": 0.4, "paper_ties": 1}),
        ({(0, 0), (0, 1)}, {"score": "head_perplexity", "alpha": 0.4}),
    ],
)
def test_paper_ties_reaches_both_thresholds_and_the_baselines(pruned, of):
    impacts = impacts_of([10.0, 12, 12, 12, 13, 14], [0.3, 0.1, 0.1, 0.1, 0.0, 0.0])
    strategy = head_strategy("mine", **({"alpha": 0.2} | of))
    assert heads_of(*build_head_masks([strategy], impacts, ["a"], random_draws=0, seed=0)) == pruned


def test_a_head_without_which_the_disparity_is_undefined_is_not_pruned():
    impacts = impacts_of([1.0] * 6, [0.3, None, 0.2, 0.4, 0.5, 0.6]).with_columns(bias_with=pl.lit(0.4))
    strategy = head_strategy("fasp", "head_impacts", "fasp", alpha=0.34, gamma=0)
    made = list(build_head_masks([strategy], impacts, ["a"], random_draws=0, seed=0))
    assert heads_of(*made) == {(0, 0), (0, 2)}
    every = head_strategy("fasp", "head_impacts", "fasp", alpha=1, gamma=0)
    with pytest.raises(ExciseError, match="asks for 6 heads, but only 5 have a defined disparity"):
        list(build_head_masks([every], impacts, ["a"], random_draws=0, seed=0))
    unmeasured = impacts.with_columns(bias_with=pl.when(pl.col("bias_without").is_not_null()).then(0.4))
    with pytest.raises(ExciseError, match="bias_without of 1 heads is not known"):
        list(build_head_masks([strategy], unmeasured, ["a"], random_draws=0, seed=0))


def test_masks_of_heads_serve_all_variations_with_their_random_controls():
    impacts = impacts_of([1.0] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    strategy = head_strategy("fasp", "head_impacts", "fasp", alpha=0.5, gamma=0)
    made = list(build_head_masks([strategy], impacts, ["person", "friend"], random_draws=2, seed=3))
    assert [(each.variation, each.strategy, each.matched_to, each.draw) for each in made] == [
        (variation, name, matched_to, draw)
        for variation in ("person", "friend")
        for name, matched_to, draw in (("fasp", None, 0), ("random", "fasp", 0), ("random", "fasp", 1))
    ]
    assert [each.mask.fingerprint for each in made[:3]] == [each.mask.fingerprint for each in made[3:]]
    assert {tuple(each.mask.counts().values()) for each in made} == {(3, 0)}
    randomly = head_strategy("any", "head_random", alpha=0.5)
    drawn = [heads_of(*build_head_masks([randomly], impacts, ["a"], random_draws=0, seed=seed)) for seed in range(8)]
    assert {len(heads) for heads in drawn} == {3}
    assert len(set(map(frozenset, drawn))) > 1


def test_heads_without_a_score_are_named():
    strategy = head_strategy("fasp", "head_impacts", "fasp", alpha=0.5, gamma=0)
    unknown = impacts_of([1.0] * 6, [0.1, None, 0.3, 0.4, 0.5, 0.6])
    with pytest.raises(ExciseError, match="bias_without of 1 heads is not known, which fasp needs"):
        list(build_head_masks([strategy], unknown, ["a"], random_draws=0, seed=0))
    some = impacts_of([1.0] * 6, [0.1] * 6)[[0, 1, 2, 4, 5]]
    with pytest.raises(ExciseError, match="6 heads are expected, 5 are there"):
        list(build_head_masks([strategy], some, ["a"], random_draws=0, seed=0))


def test_a_list_of_values_makes_a_strategy_of_each(tmp_path):
    file = tmp_path / "strategies.yaml"
    entry = {"score": "head_impacts", "selection": "fasp", "parameters": {"alpha": [0.1, 0.25], "gamma": [0, 0.3]}}
    file.write_text(yaml.safe_dump({"mine": entry, "fasp": entry | {"parameters": {"alpha": 0.1, "gamma": 0.2}}}))
    strategies = load_strategies([file])
    assert {key: each.parameters for key, each in strategies.items() if key.startswith("mine")} == {
        f"mine-{alpha:.2f}-{gamma:.2f}": {"alpha": alpha, "gamma": gamma} for alpha in (0.1, 0.25) for gamma in (0, 0.3)
    }
    assert [key for key in strategies if key.startswith("fasp") and "gamma" not in key] == ["fasp"]  # replaced, all ten


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"parameters": {"alpha": 0.8, "gamma": 0.3}}, "at most 1 together"),
        ({"levels": ["prompt_specific"]}, "levels prompt_specific do not exist for score head_impacts"),
        ({"parameters": {"alpha": 0.1}}, "parameters of fasp are alpha, gamma"),
        ({"score": "wanda"}, "selection fasp does not work on score wanda"),
    ],
)
def test_mistakes_in_strategies_of_heads_are_named(fields, named, tmp_path):
    file = tmp_path / "strategies.yaml"
    sound = {"score": "head_impacts", "selection": "fasp", "parameters": {"alpha": 0.1, "gamma": 0.3}}
    file.write_text(yaml.safe_dump({"mine": sound | fields}))
    with pytest.raises(ExciseError, match=named):
        load_strategies([file])["mine"]
