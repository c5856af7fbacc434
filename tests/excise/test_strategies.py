"""Strategies become masks: which weights, at which level, and controls of exactly the same size."""

import numpy as np
import polars as pl
import pytest

from excise.attribution import attribute, read_candidates, read_norms
from excise.completions import complete
from excise.errors import ExciseError
from excise.masks import Mask, intersection
from excise.sampling import SamplingParameters
from excise.scenarios import Variation, expand
from excise.strategies import Strategy, build_masks, load_strategies

# The user's file

SOUND = {
    "score": "wanda",
    "selection": "set_difference",
    "parameters": {"tau_min": 0.3, "tau_maj": 0.2},
    "roles": ["q", "up"],
}
OURS = {"score": "gap_gradient", "selection": "predicted_drop", "parameters": {"density": 0.001}, "roles": ["q", "up"]}


def write(path, entries):
    import yaml

    path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries))
    return path


def test_the_built_in_strategies_are_the_paper_s_and_ours():
    strategies = load_strategies()
    assert set(strategies) == {"set_difference", "gap_gradient"}
    paper = strategies["set_difference"]
    assert paper.parameters == {"tau_min": 0.40, "tau_maj": 0.35}
    assert paper.roles == ("q", "k", "v", "gate", "up", "down")
    assert paper.controls == ("random", "pooled_band", "reversed", "permuted")
    assert paper.levels == strategies["gap_gradient"].levels == ("prompt_specific", "within_context")


def test_a_user_s_file_adds_and_replaces(tmp_path):
    path = write(tmp_path / "strategies.yaml", {"mine": SOUND, "gap_gradient": OURS | {"controls": []}})
    strategies = load_strategies([path, tmp_path / "none.yaml"])
    assert set(strategies) == {"set_difference", "gap_gradient", "mine"}
    assert strategies["mine"].key == "mine"
    assert strategies["gap_gradient"].controls == ()
    assert load_strategies([write(tmp_path / "empty.yaml", "# nothing\n")]) == load_strategies()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({k: v for k, v in SOUND.items() if k != "score"}, ["mine.score"]),
        ({k: v for k, v in SOUND.items() if k != "roles"}, ["mine.roles"]),
        (SOUND | {"score": "snip"}, ["mine.score", "wanda"]),
        (SOUND | {"selection": "best"}, ["mine.selection", "set_difference"]),
        (SOUND | {"level": "all"}, ["mine.level"]),
        (SOUND | {"levels": ["everywhere"]}, ["mine.levels.0", "within_context"]),
        (SOUND | {"controls": ["randon"]}, ["mine.controls.0", "random"]),
        (SOUND | {"roles": []}, ["mine.roles"]),
        (SOUND | {"roles": ["q", "w"]}, ["mine", "roles w", "q, k, v, o"]),
        (SOUND | {"parameters": {"tau_min": 0.3}}, ["mine", "tau_maj, tau_min", "found tau_min"]),
        (SOUND | {"parameters": {}}, ["mine", "tau_maj, tau_min", "none"]),
        (SOUND | {"parameters": {"tau_min": 0.3, "tau_maj": 0.2, "tau": 1}}, ["mine", "found tau, tau_maj, tau_min"]),
        (SOUND | {"parameters": {"tau_min": 40, "tau_maj": 0.2}}, ["mine", "parameters.tau_min is 40"]),
        (SOUND | {"parameters": {"tau_min": 0.3, "tau_maj": -0.2}}, ["mine", "parameters.tau_maj is -0.2"]),
        (SOUND | {"parameters": {"tau_min": float("nan"), "tau_maj": 0.2}}, ["mine", "parameters.tau_min is nan"]),
        (SOUND | {"parameters": {"tau_min": "much", "tau_maj": 0.2}}, ["mine.parameters.tau_min"]),
        (SOUND | {"score": "gap_gradient"}, ["mine", "works on score wanda"]),
        (OURS | {"controls": ["reversed"]}, ["mine", "wanda only"]),
        (OURS | {"parameters": {"density": 0.001, "target": 0}}, ["mine", "parameters.target is 0"]),
        (OURS | {"parameters": {"density": 0.05}}, ["mine", "parameters.density is 0.05", "0.01"]),
        (SOUND | {"key": "other"}, ["mine", "key"]),
        ("set_difference", ["mine", "fields"]),
    ],
)
def test_a_mistake_is_named_by_file_strategy_and_field(tmp_path, fields, words):
    path = write(tmp_path / "strategies.yaml", {"sound": SOUND, "mine": fields})
    with pytest.raises(ExciseError) as error:
        load_strategies([path])
    message = str(error.value)
    assert f"{path}: mine" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", ["random", "pooled_band", "reversed", "permuted", "unpruned", "With Blank", "9th", ""])
def test_a_key_that_means_something_else_is_refused(tmp_path, key):
    path = write(tmp_path / "strategies.yaml", {key: SOUND})
    with pytest.raises(ExciseError, match=r"strategies\.yaml: "):
        load_strategies([path])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "YAML"),
        ("- a", "strategy names"),
        ("a: {score: wanda}\na: {score: wanda}", "'a' stands twice"),
        ("a: \x07", "YAML"),
    ],
)
def test_a_file_that_is_no_list_of_strategies_is_said(tmp_path, text, words):
    path = write(tmp_path / "strategies.yaml", text)
    with pytest.raises(ExciseError, match=words) as error:
        load_strategies([path])
    assert str(path) in str(error.value)


# Masks

SEED, DRAWS, PERMUTATIONS = 7, 3, 2


@pytest.fixture(scope="module")
def three_items(scenario):
    """The small scenario with a third item: leaving one out of two would leave no intersection."""
    return scenario.model_copy(
        update={"variations": scenario.variations | {"lamp": Variation(fields={"item": "lamp"})}}
    )


@pytest.fixture(scope="module")
def attributed(loaded, three_items, tmp_path_factory):
    """`attributed(architecture)`: a model and its attribution files of three items."""
    made = {}

    def make(architecture):
        if architecture not in made:
            model = loaded(architecture, numeric=architecture == "llama")
            parameters = SamplingParameters(temperature=0.9, top_p=0.95, seed=1)
            rows, _ = complete(model, expand(three_items), 6, parameters, outcome=three_items.outcome)
            if architecture != "llama":  # random models say no numbers; any value will do
                rows = rows.with_columns(value=pl.col("token_ids").list.sum().cast(pl.Float64))
            scores, folder = ["wanda", "gap_gradient"], tmp_path_factory.mktemp("scores")
            made[architecture] = model, scored(three_items, model, rows, scores, folder)
        return made[architecture]

    return make


def scored(scenario, model, rows, scores, folder):
    """Attribution files of some rows of the scenario's answers."""
    return attribute(
        model,
        expand(scenario),
        rows,
        comparison=scenario.comparison,
        outcome=scenario.outcome,
        scores=scores,
        permutations=PERMUTATIONS,
        seed=0,
        folder=folder,
    )


@pytest.fixture
def build(attributed, tmp_path):
    """`build("llama", strategy)`: all masks, each through a file as in a real run."""

    def run(architecture, *strategies, files=None, **options):
        model, every = attributed(architecture)
        stored = []

        def store(mask):
            path = tmp_path / f"{mask.fingerprint}.safetensors"
            mask.save(path)
            stored.append(path)
            return path

        options = {"random_draws": DRAWS, "permutations": PERMUTATIONS, "seed": SEED} | options
        return list(build_masks(model, strategies, every if files is None else files, store=store, **options))

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
    masks = build(architecture, load_strategies()[own])
    owners = {(each.variation, each.level): each for each in masks if each.matched_to is None}
    controls = [each for each in masks if each.matched_to is not None]
    assert {each.strategy for each in owners.values()} == {own}
    assert len(owners) == 6
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
    ours = build("llama", load_strategies()["gap_gradient"], files=[file for file in files if file.variation == "car"])
    assert {(each.variation, each.level) for each in ours} == {("car", "prompt_specific")}


def test_progress_counts_every_mask_to_its_end(build):
    seen = []
    build("llama", strategy(), load_strategies()["gap_gradient"], progress=lambda *each: seen.append(each))
    assert seen == [(f"masks {key}", done, 6) for key in ("mine", "gap_gradient") for done in range(1, 7)]


# gap_gradient


def best_by_hand(files, variations, roles, density, sizes, target=None) -> dict[str, set[int]]:
    """The highest drop / (harm + lambda) over all matrices; drops as shares of each variation's gap, averaged."""
    drops, harms, lambdas = {}, {}, []
    for variation in variations:
        (path,) = (file.path for file in files if (file.score, file.variation) == ("gap_gradient", variation))
        found = read_candidates(path)
        lambdas.append(found.damping)
        for key, each in found.candidates.items():
            if key.split(".")[1] in roles:
                for index, drop, harm in zip(each.index, each.drop, each.harm, strict=True):
                    drops.setdefault((key, int(index)), []).append(float(drop) / found.disparity)
                    harms.setdefault((key, int(index)), []).append(float(harm))
    damping = np.mean(lambdas)
    shares = {place: sum(some) / len(variations) for place, some in drops.items()}
    ranking = sorted(shares, key=lambda place: -shares[place] / (np.mean(harms[place]) + damping))
    ranking = ranking[: int(density * sum(sizes.values()))]
    if target is not None:
        total = 0.0
        for count, place in enumerate(ranking, 1):
            total += shares[place]
            if total >= target:
                ranking = ranking[:count]
                break
    chosen = {key: set() for key in sizes}
    for key, index in ranking:
        chosen[key].add(index)
    return chosen


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("target", [None, 0.2, 1e6])
def test_predicted_drop_masks_are_the_best_ranked_weights(build, attributed, architecture, target):
    model, files = attributed(architecture)
    parameters = {"density": 0.002} | ({} if target is None else {"target": target})
    ours = Strategy(key="ours", **OURS | {"parameters": parameters, "roles": ["q", "v", "down"], "controls": []})
    sizes = {
        each.key: each.out_features * each.in_features for each in model.topology.linears if each.role in ours.roles
    }
    masks = build(architecture, ours)
    assert [(each.variation, each.level) for each in masks] == [
        (variation, level) for level in ("prompt_specific", "within_context") for variation in ("car", "oven", "lamp")
    ]
    for each in masks:
        others = [variation for variation in ("car", "oven", "lamp") if variation != each.variation]
        sources = [each.variation] if each.level == "prompt_specific" else others
        assert as_sets(each.mask) == best_by_hand(files, sources, ours.roles, 0.002, sizes, target)
        limit = int(0.002 * sum(sizes.values()))
        assert each.mask.count == limit if target != 0.2 else 0 < each.mask.count < limit
        assert each.mask.shapes == {key: model.topology.linear(key).shape for key in sizes}


def test_a_mask_of_a_flat_gap_is_empty(attributed, three_items, tmp_path):
    """Where all answers are alike there is nothing to prune, and that is no error."""
    model, _ = attributed("llama")
    rows, _ = complete(model, expand(three_items), 2, SamplingParameters(seed=1), outcome=three_items.outcome)
    files = scored(three_items, model, rows.with_columns(value=pl.lit(5.0)), ["gap_gradient"], tmp_path)
    options = {"random_draws": 1, "permutations": 0, "seed": 0, "store": lambda mask: tmp_path / "none"}
    masks = list(build_masks(model, [load_strategies()["gap_gradient"]], files, **options))
    assert len(masks) == 12
    assert {each.mask.count for each in masks} == {0}


# What a model lacks


def test_roles_a_model_does_not_have_are_left_out_or_said(build):
    masks = build("gpt2", strategy(roles=["gate", "up"]))
    assert {key.split(".")[1] for each in masks for key in each.mask.shapes} == {"up"}
    for lacking in (strategy(roles=["gate"]), Strategy(key="ours", **OURS | {"roles": ["gate"]})):
        with pytest.raises(ExciseError, match=r"\.roles: tiny-gpt2 has none of these, it has q, k, v, o, up, down"):
            build("gpt2", lacking)
