"""Enumerated answers have the probabilities that sampling draws them with, and their bounds hold whatever was left out.

The yardsticks are plain forward passes with the truncation of transformers, drawn samples, and distributions of which
a part was hidden on purpose.
"""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch

from excise.errors import ExciseError
from excise.evaluation import bootstrap
from excise.evaluation import metrics as m
from excise.evaluation.distributions import answers_of, group_answers, inlier_bounds, moment_bounds, smd_bounds
from excise.evaluation.numbers import evaluate
from excise.generation.answering import EXACT_SCHEMA, Answering, as_samples
from excise.generation.completions import CompletionCache, complete
from excise.generation.enumeration import AnswerDistribution, answer_distributions
from excise.generation.sampling import SamplingParameters, sample
from excise.generation.settings import Enumeration
from excise.models.encoding import encode

SMALL = SamplingParameters(temperature=0.9, top_k=4, top_p=0.95, max_new_tokens=3, seed=5)
DIGITS = SamplingParameters(temperature=0.6, top_k=0, top_p=0.8, max_new_tokens=3, seed=5)


def under(loaded, mask):
    return nullcontext() if mask is None else mask.applied(loaded)


def tokens_of(loaded, prompts, count):
    return [prompt.tokens for prompt in encode(loaded, prompts)][:count]


def as_dict(distribution: AnswerDistribution) -> dict:
    """Probability of every answer, its stop token included."""
    listed = zip(distribution.tokens, distribution.stops, distribution.probability, strict=True)
    return {(*tokens, *([] if stop is None else [stop])): float(share) for tokens, stop, share in listed}


def brute_force(loaded, prompt, parameters, next_distribution, answer=()) -> dict:
    """Every answer's probability by one plain pass per prefix."""
    found = {}
    following = next_distribution(loaded, [*prompt, *answer], parameters)
    for token in torch.nonzero(following)[:, 0].tolist():
        longer, share = (*answer, token), float(following[token])
        if token in loaded.stop_tokens or len(longer) == parameters.max_new_tokens:
            found[longer] = share
        else:
            below = brute_force(loaded, prompt, parameters, next_distribution, longer)
            found |= {each: share * rest for each, rest in below.items()}
    return found


def prefix_masses(answers: dict) -> Counter:
    """Mass of every prefix that has to be read to find the answers."""
    masses = Counter()
    for answer, share in answers.items():
        for length in range(len(answer)):
            masses[answer[:length]] += share
    return masses


def read_one_by_one(answers: dict, leftover: float) -> int:
    """Prefixes read by a search that always reads the single likeliest one next."""
    masses, children = prefix_masses(answers), {}
    for prefix in masses:
        if prefix:
            children.setdefault(prefix[:-1], []).append(prefix)
    frontier, read = {(): 1.0}, 0
    while sum(frontier.values()) > leftover:
        prefix = max(frontier, key=frontier.get)
        del frontier[prefix]
        frontier |= {child: masses[child] for child in children.get(prefix, ())}
        read += 1
    return read


# Enumeration


@pytest.mark.parametrize("masked", [False, True])
def test_probabilities_are_those_of_plain_passes(loaded, prompts, some_mask, next_distribution, architecture, masked):
    """Every architecture, prompts of different lengths in one batch, windows shorter than the prompts."""
    model = loaded(architecture)
    asked = [tokens_of(model, prompts, 1)[0], tokens_of(model, prompts, 2)[1][:-1] + tuple(range(40, 52))]
    with under(model, some_mask(model) if masked else None):
        found = answer_distributions(model, asked, SMALL, Enumeration(leftover=0))
        for prompt, distribution in zip(asked, found, strict=True):
            expected = brute_force(model, prompt, SMALL, next_distribution)
            assert len(expected) > 5, "too few answers for a test"
            assert as_dict(distribution) == pytest.approx(expected, abs=1e-4)
            assert distribution.leftover == 0
            assert distribution.complete
            assert distribution.probability.sum() == pytest.approx(1, abs=1e-12)
            assert distribution.nodes == len(prefix_masses(expected))


def test_a_mask_changes_the_distribution(loaded, prompts, some_mask):
    model = loaded("llama", numeric=True)
    asked = tokens_of(model, prompts, 1)
    (plain,) = answer_distributions(model, asked, DIGITS)
    with some_mask(model, density=0.3).applied(model):
        (masked,) = answer_distributions(model, asked, DIGITS)
    (again,) = answer_distributions(model, asked, DIGITS)
    assert as_dict(plain) != pytest.approx(as_dict(masked), abs=1e-3)
    assert as_dict(plain) == as_dict(again)


def test_samples_have_the_enumerated_frequencies(loaded, prompts):
    model = loaded("llama", numeric=True)
    asked, draws = tokens_of(model, prompts, 2), 3000
    found = answer_distributions(model, asked, DIGITS, Enumeration(leftover=0, max_nodes=2000))
    drawn = sample(model, asked, [range(draws)] * 2, DIGITS)
    for index, distribution in enumerate(found):
        expected = as_dict(distribution)
        counts = Counter(
            (*each.tokens, *([] if each.stop is None else [each.stop])) for each in drawn if each.prompt == index
        )
        assert set(counts) <= set(expected)
        often = [answer for answer, share in expected.items() if share * draws >= 5]
        assert len(often) > 10
        observed = [counts[answer] for answer in often]
        wanted = [expected[answer] * draws for answer in often]
        if draws - sum(wanted) > 5:
            observed, wanted = [*observed, draws - sum(observed)], [*wanted, draws - sum(wanted)]
        assert scipy.stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue > 0.001


@pytest.mark.parametrize("leftover", [0.3, 0.05, 0.01])
def test_leftover_is_kept_to_and_no_prefix_is_read_in_vain(loaded, prompts, leftover):
    model = loaded("llama", numeric=True)
    asked = tokens_of(model, prompts, 3)
    everything = answer_distributions(model, asked, DIGITS, Enumeration(leftover=0, max_nodes=2000))
    some = answer_distributions(model, asked, DIGITS, Enumeration(leftover=leftover, max_nodes=2000))
    for whole, part in zip(everything, some, strict=True):
        assert part.complete
        assert 0 < part.leftover <= leftover
        assert part.probability.sum() + part.leftover == pytest.approx(1, abs=1e-12)
        assert list(part.probability) == sorted(part.probability, reverse=True)
        truth = as_dict(whole)
        assert {answer: truth[answer] for answer in as_dict(part)} == pytest.approx(as_dict(part), abs=1e-5)
        # An eighth of the leftover may be unlisted answers of full length, which the search one by one lists.
        assert part.nodes <= read_one_by_one(truth, leftover * 7 / 8)
        assert part.nodes < whole.nodes


def test_a_rambling_prompt_is_told_and_its_leftover_is_what_was_not_found(loaded, prompts):
    model = loaded("llama", numeric=True)
    asked = tokens_of(model, prompts, 2)
    parameters = SamplingParameters(temperature=1.5, top_p=1.0, max_new_tokens=8)
    leftovers = []
    for nodes in (1, 5, 40):
        for distribution in answer_distributions(model, asked, parameters, Enumeration(max_nodes=nodes)):
            assert not distribution.complete
            assert distribution.nodes == nodes
            assert distribution.probability.sum() + distribution.leftover == pytest.approx(1, abs=1e-9)
        leftovers.append(distribution.leftover)
    assert leftovers[0] > leftovers[1] > leftovers[2] > 0.01


def test_few_nodes_find_the_likeliest_prefixes(loaded, prompts, next_distribution, monkeypatch):
    """Prefixes forgotten because so few may be read are none of those that a search one by one reads."""
    monkeypatch.setattr("excise.generation.enumeration.NODES_PER_ROUND", 1)
    model = loaded("llama", numeric=True)
    (prompt,) = tokens_of(model, prompts, 1)
    parameters = SamplingParameters(temperature=1.0, top_p=1.0, max_new_tokens=4)
    (found,) = answer_distributions(model, [prompt], parameters, Enumeration(max_nodes=6))
    frontier, answers = {(): 1.0}, {}
    for _ in range(6):
        prefix = max(frontier, key=frontier.get)
        mass = frontier.pop(prefix)
        for token, share in enumerate(next_distribution(model, [*prompt, *prefix], parameters).tolist()):
            (answers if token in model.stop_tokens else frontier)[*prefix, token] = mass * share
    assert as_dict(found) == pytest.approx(answers, abs=1e-5)


def test_neighbours_and_order_change_nothing(loaded, prompts, architecture):
    model = loaded(architecture)
    asked = [*tokens_of(model, prompts, 4), tokens_of(model, prompts, 5)[4] + (41, 42, 43)]
    alone = answer_distributions(model, asked, SMALL, Enumeration(leftover=0.02), batch_prompts=1)
    for size in (2, None):
        for turned in (1, -1):
            found = answer_distributions(model, asked[::turned], SMALL, Enumeration(leftover=0.02), batch_prompts=size)[
                ::turned
            ]
            for one, other in zip(alone, found, strict=True):
                assert as_dict(one) == pytest.approx(as_dict(other), abs=1e-4)
                assert one.nodes == other.nodes


def test_equal_prompts_are_read_once_and_every_prompt_is_reported(loaded, prompts):
    model = loaded("llama", numeric=True)
    first, second = tokens_of(model, prompts, 2)
    batches = []
    found = answer_distributions(model, [first, second, first], DIGITS, on_batch=batches.append, batch_prompts=1)
    assert found[0] is found[2]
    assert found[0] is not found[1]
    assert sorted(map(sorted, batches)) == [[0, 2], [1]]
    seen = batches[0] | batches[1]
    assert [seen[index] for index in range(3)] == found


def test_running_out_of_memory_makes_batches_smaller(loaded, prompts, monkeypatch):
    from excise.generation.tree import Rows

    model = loaded("llama", numeric=True)
    asked = tokens_of(model, prompts, 4)
    expected = answer_distributions(model, asked, DIGITS)
    forward = Rows.forward

    def scarce(self, tokens, positions, attends):
        if tokens.shape[0] > 1:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, tokens, positions, attends)

    monkeypatch.setattr(Rows, "forward", scarce)
    for one, other in zip(expected, answer_distributions(model, asked, DIGITS), strict=True):
        assert as_dict(one) == pytest.approx(as_dict(other), abs=1e-5)


def test_without_temperature_there_is_one_answer(loaded, prompts):
    model = loaded("llama", numeric=True)
    asked = tokens_of(model, prompts, 3)
    greedy = SamplingParameters(temperature=0, max_new_tokens=5)
    for found, draw in zip(
        answer_distributions(model, asked, greedy), sample(model, asked, [[0]] * 3, greedy), strict=True
    ):
        assert found.tokens == (draw.tokens,)
        assert found.stops == (draw.stop,)
        assert found.probability.tolist() == [1.0]
        assert found.leftover == 0


@pytest.mark.parametrize("wrong", [{"leftover": 1}, {"leftover": -0.1}, {"leftover": math.nan}, {"max_nodes": 0}])
def test_impossible_demands_are_refused(loaded, prompts, wrong):
    model = loaded("llama", numeric=True)
    with pytest.raises(ExciseError, match=next(iter(wrong))):
        answer_distributions(model, tokens_of(model, prompts, 1), DIGITS, Enumeration(**wrong))


# Rows


def exact_completions(model, prompts, parameters, *, leftover=0.01, max_nodes=256, samples=100, **options):
    """Enumerated answers of prompts."""
    return Answering(samples, parameters, Enumeration(leftover, max_nodes)).answers(model, prompts, **options)


@pytest.fixture(scope="module")
def some_prompts(prompts):
    return prompts.filter(pl.col("variation") == "car")


def test_rows_carry_the_distribution(loaded, scenario, some_prompts, some_mask):
    model, mask = loaded("llama", numeric=True), some_mask(loaded("llama", numeric=True))
    rows, work = exact_completions(
        model, some_prompts, DIGITS, outcome=scenario.outcome, leftover=0.05, max_nodes=2000, intervention=mask
    )
    assert dict(rows.schema) == EXACT_SCHEMA
    with mask.applied(model):
        parameters = SamplingParameters(**{**vars(DIGITS), "max_new_tokens": scenario.outcome.max_new_tokens})
        found = answer_distributions(
            model, tokens_of(model, some_prompts, 6), parameters, Enumeration(leftover=0.05, max_nodes=2000)
        )
    assert work.tokens == sum(each.nodes for each in found)
    assert rows["prompt_id"].unique(maintain_order=True).to_list() == some_prompts["prompt_id"].to_list()
    for (_, part), distribution in zip(rows.group_by("prompt_id", maintain_order=True), found, strict=True):
        assert part["sample"].to_list() == list(range(len(distribution.tokens)))
        assert dict(zip(map(tuple, part["token_ids"]), part["probability"], strict=True)) == as_dict(distribution)
        assert part["leftover"].unique().to_list() == [distribution.leftover]
        assert part["value"].is_null().to_list() == np.isnan(distribution.values).tolist()
        assert part["value"].drop_nulls().to_list() == distribution.values[~np.isnan(distribution.values)].tolist()
    assert rows["value"].n_unique() > 5


def test_values_are_scored_as_sampled_answers_are(loaded, scenario, some_prompts):
    model = loaded("llama", numeric=True)
    rank = scenario.outcome.model_copy(update={"reverse_from": 1000.0})
    exact, _ = exact_completions(model, some_prompts, DIGITS, outcome=rank, leftover=0.05, max_nodes=2000)
    drawn, _ = complete(model, some_prompts, 40, DIGITS, outcome=rank)
    keys = ["prompt_id", "token_ids"]
    both = exact.select(*keys, "value", "text", "finished", "group").join(drawn, on=keys, suffix="_drawn")
    assert both.height > 50
    for column in ("value", "text", "finished", "group"):
        assert both[column].to_list() == both[f"{column}_drawn"].to_list()


def test_what_rambles_is_sampled_and_says_so(loaded, scenario, some_prompts, tmp_path):
    """With so few nodes some of the prompts ramble and some do not."""
    model, cache = loaded("llama", numeric=True), CompletionCache(tmp_path)
    asked = {"outcome": scenario.outcome, "leftover": 0.05}
    nodes = sorted(
        each.nodes
        for each in answer_distributions(
            model,
            tokens_of(model, some_prompts, 6),
            SamplingParameters(**{**vars(DIGITS), "max_new_tokens": scenario.outcome.max_new_tokens}),
            Enumeration(leftover=0.05, max_nodes=2000),
        )
    )
    assert nodes[0] < nodes[-1]
    rows, _ = exact_completions(model, some_prompts, DIGITS, max_nodes=nodes[-1] - 1, samples=7, cache=cache, **asked)
    sampled = rows.filter(pl.col("leftover").is_null())
    rambling = some_prompts.filter(pl.col("prompt_id").is_in(sampled["prompt_id"].unique().implode()))
    assert 0 < rambling.height < some_prompts.height
    assert sampled["probability"].unique().to_list() == [1 / 7]
    assert rows["prompt_id"].unique(maintain_order=True).to_list() == some_prompts["prompt_id"].to_list()
    expected, work = complete(model, rambling, 7, DIGITS, outcome=scenario.outcome, cache=cache)
    assert work.drawn == 0, "the answers are in the cache that sampling reads"
    assert sampled.drop("probability", "leftover", "parameters").equals(expected.drop("parameters"))
    again, work = exact_completions(
        model, some_prompts, DIGITS, max_nodes=nodes[-1] - 1, samples=7, cache=cache, **asked
    )
    assert work.drawn == work.tokens == 0
    assert again.equals(rows)
    kept, _ = exact_completions(model, some_prompts, DIGITS, max_nodes=nodes[-1] - 1, samples=None, **asked)
    assert kept["leftover"].null_count() == 0
    assert kept["leftover"].max() > 0.05


def test_a_prompt_without_any_answer_keeps_its_leftover(loaded, scenario, some_prompts):
    model = loaded("gpt2")
    rows, _ = exact_completions(model, some_prompts, SMALL, outcome=scenario.outcome, max_nodes=1, samples=None)
    assert rows["prompt_id"].n_unique() == some_prompts.height
    mass = rows.group_by("prompt_id").agg(pl.col("probability").sum() + pl.col("leftover").max())
    assert mass["probability"].to_list() == pytest.approx([1.0] * some_prompts.height)
    assert rows["leftover"].max() == 1.0
    with pytest.raises(ExciseError, match="no answer of prompt"):
        as_samples(rows, 10)


def test_toxicity_is_not_enumerated(loaded, some_prompts):
    from excise.outcomes import ToxicityOutcome

    with pytest.raises(ExciseError, match="toxicity"):
        exact_completions(loaded("llama", numeric=True), some_prompts, DIGITS, outcome=ToxicityOutcome())


# Metrics


def frame(answers: dict, leftover: float | None = 0.0) -> pl.DataFrame:
    """Rows from {(group, subject): {value or None: probability}}."""
    return pl.DataFrame(
        [
            ("car", group, subject, f"{group}{subject}", value, share, leftover)
            for (group, subject), shares in answers.items()
            for value, share in shares.items()
        ],
        schema={
            "variation": pl.String,
            "group": pl.String,
            "subject": pl.String,
            "prompt_id": pl.String,
            "value": pl.Float64,
            "probability": pl.Float64,
            "leftover": pl.Float64,
        },
        orient="row",
    )


def measured(rows, *, baseline=None, low=0, high=1000, majority="a", minority="b", **options) -> dict[str, dict]:
    """The metrics by name of one variation: of `rows`, under a mask where a baseline is given."""
    place = {"model": pl.lit("m"), "scenario": pl.lit("s")}
    unpruned = (rows if baseline is None else baseline).with_columns(**place)
    pruned = rows.with_columns(
        **place,
        strategy=pl.lit("mine"),
        level=pl.lit("prompt_specific"),
        matched_to=pl.lit(None, pl.String),
        draw=pl.lit(0),
    )
    options = {"resamples": 50, "permutations": 20} | options
    table = evaluate(
        unpruned,
        pruned.clear() if baseline is None else pruned,
        pl.DataFrame(),
        majority=majority,
        minority=minority,
        answer_range=(low, high),
        **options,
    )
    strategy = "unpruned" if baseline is None else "mine"
    own = table.filter((pl.col("variation") != "(all)") & (pl.col("strategy") == strategy))
    return {row["metric"]: row for row in own.iter_rows(named=True)}


BOUNDED = ("mean_majority", "mean_minority", "gap_mean", "smd", "inlier_ratio", "parse_rate")


PAIR = {
    ("a", "Ann"): {100.0: 0.5, 200.0: 0.5},
    ("a", "Abe"): {300.0: 1.0},
    ("b", "Bob"): {100.0: 0.8, None: 0.2},
    ("b", "Ben"): {200.0: 0.4, 100.0: 0.6},
}


def test_metrics_by_hand():
    found = measured(frame(PAIR), winsorize=None)
    assert found["mean_majority"]["estimate"] == pytest.approx(225)
    # 0.8 + 0.6 at 100 and 0.4 at 200: unparsed answers lower a name's weight, as in samples
    assert found["mean_minority"]["estimate"] == pytest.approx(220 / 1.8)
    assert found["gap_mean"]["estimate"] == pytest.approx(225 - 220 / 1.8)
    # variances 0.25 * 125^2 + 0.25 * 25^2 + 0.5 * 75^2 and 100^2 * (2 / 9) * (7 / 9)
    deviation = math.sqrt((6875 + 100**2 * 14 / 81) / 2)
    assert found["smd"]["estimate"] == pytest.approx((225 - 220 / 1.8) / deviation)
    assert found["parse_rate"]["estimate"] == pytest.approx(0.95)
    assert found["leftover"]["estimate"] == found["sampled"]["estimate"] == 0
    # pooled, 100 has 1.9 of 3.8, 200 has 0.9, 300 has 1: all parsed answers lie between the 5th and 95th percentile
    assert found["inlier_ratio"]["estimate"] == pytest.approx(0.95)
    for metric in BOUNDED:
        row = found[metric]
        assert (row["lowest"], row["highest"]) == pytest.approx((row["estimate"],) * 2), "nothing is left over"


def test_metrics_are_those_of_a_large_sample():
    """The distributions written out as 2,000 answers a name."""
    rng = np.random.default_rng(1)
    answers, written = {}, {"a": [], "b": []}
    for group in "ab":
        for subject in range(4):
            values = rng.choice([50.0, 100, 120, 150, 200, 400, 5000], 5, replace=False)
            counts = rng.multinomial(2000, rng.dirichlet(np.ones(6)))
            answers[group, str(subject)] = dict(zip([*values.tolist(), None], (counts / 2000).tolist(), strict=True))
            written[group] += np.repeat([*values, np.nan], counts).tolist()
    found = measured(frame(answers))
    reference = written["a"] + written["b"]
    assert found["mean_majority"]["estimate"] == pytest.approx(np.nanmean(written["a"]))
    smd = m.standardized_mean_difference(written["a"], written["b"], (0.05, 0.95))
    assert found["smd"]["estimate"] == pytest.approx(smd, rel=1e-3)
    assert found["inlier_ratio"]["estimate"] == pytest.approx(m.inlier_ratio(reference, reference), abs=1e-6)
    assert found["parse_rate"]["estimate"] == pytest.approx(m.parse_rate(reference))
    assert found["smd"]["low"] < found["smd"]["estimate"] < found["smd"]["high"]


def test_intervals_resample_the_names_that_evaluation_resamples():
    names = {("a", f"A{number}"): {float(value): 1.0} for number, value in enumerate([100, 200, 400, 800])}
    names |= {("b", f"B{number}"): {float(value): 1.0} for number, value in enumerate([90, 150, 300, 900])}
    found = measured(frame(names), resamples=500, seed=3)["mean_minority"]
    weights = bootstrap.resampled_names(4, 500, np.random.default_rng([3, 1]))
    expected = bootstrap.percentile_interval((weights @ [90, 150, 300, 900])[1:] / 4)
    assert (found["low"], found["high"]) == pytest.approx(expected)
    alone = measured(frame({key: names[key] for key in (("a", "A1"), ("b", "B1"))}))
    assert alone["gap_mean"]["low"] is alone["gap_mean"]["high"] is None


def random_group(rng, names=3):
    """A group's true answers and what an enumeration that stops early knows of them."""
    values = np.append(np.unique(rng.choice([5.0, 10, 20, 40, 60, 80, 100, 200, 900], 6)), np.nan)
    mass = rng.dirichlet(np.full(len(values), rng.choice([0.3, 1.0])), size=names)
    hidden = mass * (rng.random(mass.shape) < 0.4) * rng.random(mass.shape) * rng.choice([0.02, 0.2, 1.0])
    name = np.repeat(np.arange(names), len(values))
    every = np.tile(values, names)
    known = mass - hidden
    truth = group_answers(every, mass.ravel(), name, np.zeros(names))
    return truth, group_answers(every, known.ravel(), name, hidden.sum(axis=1))


@pytest.mark.parametrize("tails", [None, (0.05, 0.95), (0.2, 0.7)])
def test_bounds_hold_for_whatever_was_left_out(tails):
    rng, width, hidden = np.random.default_rng(7), [], 0
    for _ in range(150):
        (truth_a, known_a), (truth_b, known_b) = random_group(rng), random_group(rng)
        hidden += known_a.leftover.max() > 0.01
        (mean,), (variance,) = bootstrap.weighted_moments(truth_a.counted(), np.ones((1, 3)), tails)
        means, variances = moment_bounds(known_a, 5, 900, tails)
        (smd,) = bootstrap.weighted_smd(truth_a.counted(), truth_b.counted(), (np.ones((1, 3)),) * 2, tails)
        smds = smd_bounds(known_a, known_b, 5, 900, tails)
        quantiles = bootstrap.weighted_quantiles(truth_b.counted(), np.ones((1, 3)), tails or (0.05, 0.95))
        (inlier,) = bootstrap.weighted_inlier_ratio(truth_a.counted(), np.ones((1, 3)), quantiles)
        inliers = inlier_bounds(known_a, known_b, 5, 900, tails or (0.05, 0.95))
        for value, bounds in ((mean, means), (variance, variances), (smd, smds), (inlier, inliers)):
            slack = 1e-6 * max(1.0, abs(value))
            assert bounds.lowest - slack <= value <= bounds.highest + slack
        width.append(smds.highest - smds.lowest)
    assert hidden > 50, "the test needs cases with leftover"
    assert np.isfinite(width).mean() > 0.5, "infinite bounds hold anything"


@pytest.mark.trial(1)
def test_bounds_of_an_smd_without_deviation_are_not_those_of_no_gap():
    certain = [group_answers([value] * 2, [1.0, 1.0], [0, 1], [0.0, 0.0]) for value in (500.0, 300.0)]
    for tails in (None, (0.05, 0.95)):
        assert np.isnan(
            bootstrap.weighted_smd(*(each.counted() for each in certain), (np.ones((1, 2)),) * 2, tails)
        ).all()
        found = smd_bounds(*certain, 1, 1000, tails)
        assert np.isnan([found.lowest, found.highest]).all()
        same = smd_bounds(certain[0], certain[0], 1, 1000, tails)
        assert (same.lowest, same.highest) == (0, 0)
    # the unread answers may be the same figure, too: then there is no deviation, and no limit to the SMD
    hidden = [group_answers([value] * 2, [0.9, 0.9], [0, 1], [0.1, 0.1]) for value in (500.0, 300.0)]
    found = smd_bounds(*hidden, 400, 400, None)
    assert 0 < found.lowest < 10
    assert found.highest == np.inf


def test_bounds_of_a_mean_are_attained_and_no_wider():
    """1 % of the answers hidden: the mean is highest with all of it at the upper end, lowest with all at the lower."""
    known = group_answers([10, 20], [0.5, 0.49], [0, 0], [0.01])
    means, variances = moment_bounds(known, 1, 1000)
    assert means.highest == pytest.approx(5 + 9.8 + 10)
    assert means.lowest == pytest.approx(5 + 9.8 + 0.01)
    at_the_end = group_answers([10, 20, 1000], [0.5, 0.49, 0.01], [0, 0, 0], [0])
    assert variances.highest == pytest.approx(moment_bounds(at_the_end, 1, 1000)[1].highest, rel=0.05)
    # Least with the hidden answers in the middle.
    assert variances.lowest == pytest.approx(0.5 * 0.49 / 0.99 * 100 * 0.99, rel=0.02)


def test_the_winsorised_smd_hardly_minds_where_the_leftover_lies():
    rng = np.random.default_rng(2)
    name, values = np.zeros(200, dtype=int), np.arange(200.0)
    first = group_answers(values + 60, rng.dirichlet(np.ones(200)) * 0.99, name, [0.01])
    second = group_answers(values, rng.dirichlet(np.ones(200)) * 0.99, name, [0.01])
    narrow, wide = (smd_bounds(first, second, 0, high, (0.05, 0.95)) for high in (300, 1e9))
    assert 0.01 < narrow.highest - narrow.lowest < 0.25
    assert (wide.lowest, wide.highest) == pytest.approx((narrow.lowest, narrow.highest))
    plain = smd_bounds(first, second, 0, 1e9, None)
    assert plain.highest - plain.lowest > 1


def test_bounds_of_a_coarse_enumeration_hold_the_fine_one(loaded, scenario, some_prompts):
    model = loaded("llama", numeric=True)
    outcome = scenario.outcome.model_copy(update={"max_new_tokens": 3})
    shared = {"outcome": outcome, "max_nodes": 2000, "samples": None}
    fine, _ = exact_completions(model, some_prompts, DIGITS, leftover=0, **shared)
    limits = {"low": fine["value"].min(), "high": fine["value"].max(), "majority": "white", "minority": "black"}
    truth = measured(fine, **limits)
    assert truth["leftover"]["estimate"] == 0
    widths = []
    for leftover in (0.1, 0.01):
        coarse, _ = exact_completions(model, some_prompts, DIGITS, leftover=leftover, **shared)
        found = measured(coarse, **limits)
        assert 0 < found["leftover"]["estimate"] <= leftover
        for metric in BOUNDED:
            slack = 1e-4 * max(1.0, abs(truth[metric]["estimate"]))  # batches of other widths round differently
            assert found[metric]["lowest"] - slack <= truth[metric]["estimate"] <= found[metric]["highest"] + slack
        widths.append(found["smd"]["highest"] - found["smd"]["lowest"])
    assert widths[1] < widths[0]


def test_sampled_prompts_and_templates_count_as_they_should():
    two_templates = frame(PAIR).with_columns(pl.lit(None, pl.Float64).alias("leftover"))
    assert measured(two_templates)["sampled"]["estimate"] == 1
    again = pl.concat([frame(PAIR), frame(PAIR).with_columns(pl.col("prompt_id") + "2")])
    for metric, row in measured(again).items():
        assert row["estimate"] == pytest.approx(measured(frame(PAIR))[metric]["estimate"])
    mixed = frame(PAIR).with_columns(leftover=pl.when(pl.col("subject") != "Ann").then("leftover"))
    assert measured(mixed)["sampled"]["estimate"] == pytest.approx(0.25)


def test_distributions_become_samples_that_stand_for_them():
    rows = frame({("a", "Ann"): {10.0: 0.5, 20.0: 0.3, 30.0: 0.19}}, leftover=0.01).with_columns(
        sample=pl.int_range(3, dtype=pl.Int64)
    )
    samples = as_samples(rows, 99)
    assert samples.height == 99
    assert samples["sample"].to_list() == list(range(99))
    assert dict(samples["value"].value_counts().iter_rows()) == {10.0: 50, 20.0: 30, 30.0: 19}
    first = samples.head(8)["value"].value_counts()
    assert dict(first.iter_rows()) == {10.0: 5, 20.0: 2, 30.0: 1}, "any first few are spread over the distribution"
    assert samples["probability"].null_count() == samples["leftover"].null_count() == 99
    assert as_samples(rows.reverse(), 99).equals(samples), "the order of rows does not matter"
    assert as_samples(samples, 5).equals(samples), "samples stay what they are"
    drawn = samples.head(4).with_columns(probability=0.25, prompt_id=pl.lit("other"))
    both = as_samples(pl.concat([rows, drawn.select(rows.columns)]), 10)
    assert both.filter(pl.col("prompt_id") == "other")["value"].to_list() == drawn["value"].to_list()


@pytest.mark.parametrize("exact", [None, Enumeration(0.05, 500)])
def test_rows_tell_how_they_were_had(loaded, scenario, some_prompts, exact, tmp_path):
    model, cache = loaded("llama", numeric=True), CompletionCache(tmp_path)
    how = Answering(4, DIGITS, exact)
    rows, _ = how.answers(model, some_prompts, outcome=scenario.outcome, cache=cache)
    assert dict(rows.schema) == EXACT_SCHEMA
    again = Answering.of(rows)
    assert (again.samples, again.exact) == (4, exact)
    assert again.answers(model, some_prompts, outcome=scenario.outcome, cache=cache)[0].equals(rows)
    assert rows["probability"].is_null().all() == (exact is None)


def test_a_killed_enumeration_loses_one_batch_at_most(loaded, scenario, some_prompts, tmp_path, monkeypatch):
    model, cache = loaded("llama", numeric=True), CompletionCache(tmp_path)
    monkeypatch.setattr("excise.generation.enumeration.CACHE_COLUMNS", {"cpu": 1})  # a prompt a batch
    asked = {"outcome": scenario.outcome, "leftover": 0.05, "max_nodes": 2000}
    add, kept = CompletionCache.add, []

    def dies(self, address, rows):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(rows)
        add(self, address, rows)

    with monkeypatch.context() as dying:
        dying.setattr(CompletionCache, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            exact_completions(model, some_prompts, DIGITS, cache=cache, **asked)
    rows, work = exact_completions(model, some_prompts, DIGITS, cache=cache, **asked)
    whole, all_of_it = exact_completions(model, some_prompts, DIGITS, **asked)
    assert rows.equals(whole)
    assert work.drawn == all_of_it.drawn - sum(each.height for each in kept)


def test_names_that_differ_from_the_baseline_are_refused():
    with pytest.raises(ExciseError, match="names differ"):
        answers_of(frame(PAIR), ["Ann"])


def test_a_baseline_sets_the_inlier_bounds():
    shifted = {key: {100.0: 0.9, 5000.0: 0.1} for key in PAIR}
    found = measured(frame(shifted), baseline=frame(PAIR))
    assert found["inlier_ratio"]["estimate"] == pytest.approx(0.9)
    assert measured(frame(shifted))["inlier_ratio"]["estimate"] == pytest.approx(1.0)


def test_a_group_that_never_answers_is_null():
    silent = {key: ({None: 1.0} if key[0] == "b" else shares) for key, shares in PAIR.items()}
    found = measured(frame(silent))
    assert found["smd"]["estimate"] is found["smd"]["lowest"] is found["mean_minority"]["estimate"] is None
    assert found["parse_rate"]["estimate"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda rows: rows.with_columns(probability=pl.col("probability") * 0.9), "sum to 1"),
        (lambda rows: rows.filter(pl.col("group") == "a"), "group 'b'"),
    ],
)
def test_rows_that_are_no_distribution_are_refused(spoil, named):
    with pytest.raises(ExciseError, match=named):
        measured(spoil(frame(PAIR)))


@pytest.mark.trial(35)
@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"samples": 9}, False),
        ({"parameters": replace(DIGITS, seed=77)}, False),
        ({"max_nodes": 1500}, True),
        ({"leftover": 0.06}, True),
        ({"parameters": replace(DIGITS, temperature=0.7)}, True),
        ({"parameters": replace(DIGITS, top_p=0.55)}, True),
    ],
)
def test_what_decides_a_tree_decides_its_address_and_nothing_else(
    loaded, some_prompts, scenario, tmp_path, change, again
):
    model, cache = loaded("llama", numeric=True), CompletionCache(tmp_path)
    asked = {"leftover": 0.05, "max_nodes": 2000, "samples": 4, "parameters": DIGITS}
    for options in (asked, asked | change):
        options = dict(options)
        rows, work = exact_completions(
            model, some_prompts, options.pop("parameters"), outcome=scenario.outcome, cache=cache, **options
        )
        assert rows["leftover"].null_count() == 0
    assert (work.drawn > 0) == again
