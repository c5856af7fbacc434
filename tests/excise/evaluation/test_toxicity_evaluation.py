"""Claims about the bias of a toxicity axis: by hand, against the plain metric, and by simulation of a known truth."""

import numpy as np
import polars as pl
import pytest

from excise.errors import ExciseError
from excise.evaluation.axis import axis_of, scores_of
from excise.evaluation.axis_noise import bias_from_sums, debiased_bias, noise_of
from excise.evaluation.metrics import folded_noise, toxicity_bias
from excise.evaluation.rows import SCHEMA
from excise.evaluation.toxicity import evaluate_toxicity

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

GROUPS = ("a", "b", "c")
NO_MASKS = pl.DataFrame()
FEW = {"subgroups": GROUPS, "resamples": 200}


def frame(values, variation="person", prompt_values=None, **columns) -> pl.DataFrame:
    """Continuations from values [subgroups][descriptors][templates][samples]; None and NaN are unscored."""
    rows = []
    for group, subjects in zip(GROUPS, values, strict=False):
        for number, templates in enumerate(subjects):
            for template, samples in enumerate(templates):
                for sample, value in enumerate(samples):
                    subject = f"{group}{number}"
                    rows.append(
                        {
                            "model": "m",
                            "scenario": "axis",
                            "variation": variation,
                            "template": f"t{template}",
                            "group": group,
                            "subject": subject,
                            "prompt_id": f"{variation}/{subject}/t{template}",
                            "sample": sample,
                            "value": value,
                            **({} if prompt_values is None else {"prompt_value": prompt_values[group]}),
                            **columns,
                        }
                    )
    return pl.DataFrame(rows, schema_overrides={"value": pl.Float64, "matched_to": pl.String}, infer_schema_length=None)


def flat(*means, descriptors=2, templates=2) -> list:
    """Every continuation of a subgroup has its mean."""
    return [[[[mean]] * templates] * descriptors for mean in means]


def noisy(rng, means, descriptors=3, templates=4, samples=5, of_descriptor=0.0, of_sample=0.05) -> list:
    return [
        [
            (mean + of_descriptor * rng.normal() + of_sample * rng.normal(size=(templates, samples))).tolist()
            for _ in range(descriptors)
        ]
        for mean in means
    ]


def pruned(values, strategy="fasp", matched_to=None, level="within_context", draw=0, variation="person"):
    return frame(values, variation, strategy=strategy, level=level, matched_to=matched_to, draw=draw)


def row(table, metric, variation="(all)", strategy="unpruned", matched_to=None) -> dict:
    rows = table.filter(
        (pl.col("metric") == metric)
        & (pl.col("variation") == variation)
        & (pl.col("strategy") == strategy)
        & pl.col("matched_to").eq_missing(pl.lit(matched_to))
    )
    assert len(rows) == 1, f"{metric} {variation} {strategy}: {len(rows)} rows"
    return rows.row(0, named=True)


def estimate(table, metric, *where, **more):
    return row(table, metric, *where, **more)["estimate"]


# The bias itself


def test_the_bias_from_sums_is_that_of_the_scores_written_out():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 4, 60), rng.random(60)
    sums, counts = np.bincount(labels, scores), np.bincount(labels)
    assert bias_from_sums(sums, counts) == pytest.approx(toxicity_bias(scores, labels.tolist()))
    assert bias_from_sums([6.0, 8.0], [10, 10]) == pytest.approx(0.2)  # .6 and .8: the method's example
    stacked = bias_from_sums([[6.0, 8.0], [8.0, 8.0]], [[10, 10], [10, 10]])
    assert stacked == pytest.approx([0.2, 0.0])
    assert np.isnan(bias_from_sums([6.0, 0.0], [10, 0]))


def test_every_metric_by_hand():
    values = [
        [[[0.1, 0.3]], [[0.2, None]]],  # mean .2 of three
        [[[0.6, 0.9]], [[0.9, 0.0]]],  # mean .6 of four
    ]
    table = evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, subgroups=("a", "b"), resamples=50)
    assert dict(table.schema) == SCHEMA
    axis = 3.0 / 7
    bias = abs(axis - 0.2) + abs(axis - 0.6)
    expected = {
        "toxicity_bias": bias,
        "toxicity_bias_mean": bias / 2,
        "toxicity_bias_relative": bias / axis,
        "mean_toxicity": axis,
        "mean_toxicity/a": 0.2,
        "mean_toxicity/b": 0.6,
        "share_toxic": 3 / 7,
        "share_scored": 7 / 8,
        "density": 0.0,
    }
    for metric, value in expected.items():
        for variation in ("person", "(all)"):
            assert estimate(table, metric, variation) == pytest.approx(value), metric
    assert row(table, "mean_toxicity/a")["n"] == 3
    assert row(table, "toxicity_bias")["n"] == 7
    assert row(table, "share_scored")["n"] == 8


def test_a_score_at_the_threshold_is_not_toxic():
    table = evaluate_toxicity(frame(flat(0.5, 0.51, 0.49)), NO_MASKS, NO_MASKS, **FEW)
    assert estimate(table, "share_toxic") == pytest.approx(1 / 3)
    table = evaluate_toxicity(frame(flat(0.5, 0.51, 0.49)), NO_MASKS, NO_MASKS, **FEW, threshold=0.4)
    assert estimate(table, "share_toxic") == 1


def test_all_pools_the_prompts_of_all_variations():
    """Opposite gaps of two variations cancel in the pool, and would not in a mean over variations."""
    both = pl.concat([frame(flat(0.2, 0.4)), frame(flat(0.4, 0.2), "parent")])
    table = evaluate_toxicity(both, NO_MASKS, NO_MASKS, subgroups=("a", "b"), resamples=50)
    assert estimate(table, "toxicity_bias", "person") == pytest.approx(0.2)
    assert estimate(table, "toxicity_bias", "parent") == pytest.approx(0.2)
    assert estimate(table, "toxicity_bias") == pytest.approx(0.0)
    assert row(table, "toxicity_bias")["n"] == 16


def test_groups_that_are_not_named_count_for_nothing():
    three, two = flat(0.2, 0.4, 0.9), flat(0.2, 0.4)
    options = {"subgroups": ("a", "b"), "resamples": 50}
    first = evaluate_toxicity(frame(three), pruned(three), NO_MASKS, **options)
    assert first.equals(evaluate_toxicity(frame(two), pruned(two), NO_MASKS, **options))


def test_a_subgroup_without_a_score_leaves_no_bias():
    """All its continuations are empty: the sum over the others would look like less bias."""
    values = flat(0.2, 0.4, 0.9)
    silent = [*values[:2], [[[None], [None]], [[None], [None]]]]
    table = evaluate_toxicity(frame(values), pruned(silent), NO_MASKS, **FEW)
    for metric in ("toxicity_bias", "toxicity_bias_debiased", "bias_reduction", "bias_change", "mean_toxicity/c"):
        assert estimate(table, metric, strategy="fasp") is None
    assert estimate(table, "mean_toxicity", strategy="fasp") == pytest.approx(0.3)
    assert estimate(table, "share_scored", strategy="fasp") == pytest.approx(2 / 3)
    found = table.select("estimate", "low", "high", "p_value").to_numpy().astype(float)
    assert not np.isinf(found).any()
    assert not table.select(pl.col(pl.Float64).is_nan().any()).to_numpy().any()


def test_the_scorers_own_gap_counts_each_prompt_once():
    values = [[[[0.1] * 9, [0.1]]] * 2, [[[0.1], [0.1]]] * 2, [[[0.1], [0.1]]] * 2]
    prompts = {"a": 0.9, "b": 0.3, "c": 0.3}
    table = evaluate_toxicity(frame(values, prompt_values=prompts), NO_MASKS, NO_MASKS, **FEW)
    assert estimate(table, "toxicity_bias") == pytest.approx(0.0)
    assert estimate(table, "prompt_mean_toxicity") == pytest.approx(0.5)
    assert estimate(table, "prompt_toxicity_bias") == pytest.approx(0.8)
    assert row(table, "prompt_toxicity_bias")["n"] == 12


# Pruned against unpruned


def test_reduction_change_and_the_random_controls_by_hand():
    before = frame(flat(0.2, 0.4, 0.6))  # bias .4
    after = pl.concat(
        [
            pruned(flat(0.3, 0.4, 0.5)),  # .2
            pruned(flat(0.2, 0.4, 0.6), "random", "fasp", draw=0),  # .4
            pruned(flat(0.25, 0.4, 0.55), "random", "fasp", draw=1),  # .3
            pruned(flat(0.4, 0.4, 0.4), "random", "another"),  # not this strategy's
        ]
    )
    table = evaluate_toxicity(before, after, NO_MASKS, **FEW)
    for variation in ("person", "(all)"):
        assert estimate(table, "toxicity_bias", variation, "fasp") == pytest.approx(0.2)
        assert estimate(table, "bias_change", variation, "fasp") == pytest.approx(-0.2)
        assert estimate(table, "bias_reduction", variation, "fasp") == pytest.approx(0.5)
        assert estimate(table, "bias_reduction", variation, "random", matched_to="fasp") == pytest.approx(0.125)
        assert estimate(table, "reduction_over_random", variation, "fasp") == pytest.approx(0.375)
        assert estimate(table, "mean_toxicity_change", variation, "fasp") == pytest.approx(0.0)
    assert row(table, "toxicity_bias", strategy="random", matched_to="fasp")["n"] == 24
    metrics = table.filter(pl.col("strategy") == "random")["metric"].to_list()
    assert "reduction_over_random" not in metrics


def test_pruning_that_changes_nothing_changes_nothing_in_any_resample():
    """The pairing: the same clusters are drawn for both models, so the interval of no change has no width."""
    values = noisy(np.random.default_rng(1), (0.3, 0.35, 0.4), of_descriptor=0.1)
    for cluster in ("subject", "template", "both"):
        table = evaluate_toxicity(frame(values), pruned(values), NO_MASKS, **FEW, cluster=cluster)
        for metric in ("bias_reduction", "bias_change", "mean_toxicity_change"):
            found = row(table, metric, strategy="fasp")
            assert (found["estimate"], found["low"], found["high"]) == (0.0, 0.0, 0.0), (cluster, metric)
        own = row(table, "toxicity_bias", strategy="fasp")
        assert own["high"] - own["low"] > 0.01


def test_a_condition_on_some_variations_is_compared_on_those():
    before = pl.concat([frame(flat(0.2, 0.4)), frame(flat(0.1, 0.9), "parent")])
    table = evaluate_toxicity(before, pruned(flat(0.25, 0.35)), NO_MASKS, subgroups=("a", "b"), resamples=50)
    assert estimate(table, "bias_reduction", strategy="fasp") == pytest.approx(0.5)


def test_densities_are_those_of_the_masks():
    key = {"model": "m", "scenario": "axis", "variation": "person", "level": "within_context", "matched_to": None}
    masks = pl.DataFrame(
        [{**key, "strategy": "fasp", "draw": 0, "pruned": 3, "size": 72}], schema_overrides={"matched_to": pl.String}
    )
    table = evaluate_toxicity(frame(flat(0.2, 0.4, 0.6)), pruned(flat(0.2, 0.4, 0.6)), masks, **FEW)
    assert estimate(table, "density", strategy="fasp") == pytest.approx(3 / 72)
    assert estimate(table, "density", "person", "fasp") == pytest.approx(3 / 72)


def test_perplexity_stands_beside_the_bias():
    values = flat(0.2, 0.4, 0.6)
    keys = (
        "strategy",
        "level",
        "matched_to",
        "variation",
        "draw",
        "perplexity",
        "low",
        "high",
        "difference_low",
        "difference_high",
    )
    texts = pl.DataFrame(
        [
            ("unpruned", "none", None, "(all)", 0, 20.0, 19.0, 21.0, None, None),
            ("fasp", "within_context", None, "(all)", 0, 25.0, 24.0, 26.0, 4.0, 6.0),
            ("random", "within_context", "fasp", "(all)", 0, 30.0, 28.0, 31.0, 8.0, 11.0),
            ("random", "within_context", "fasp", "(all)", 1, 50.0, 48.0, 53.0, 29.0, 32.0),
        ],
        schema=dict(zip(keys, [*[pl.String] * 4, pl.Int64, *[pl.Float64] * 5], strict=True)),
        orient="row",
    )
    after = pl.concat([pruned(values), *(pruned(values, "random", "fasp", draw=draw) for draw in (0, 1))])
    table = evaluate_toxicity(frame(values), after, NO_MASKS, texts, **FEW)

    def bounds(metric, *where, **more):
        found = row(table, metric, *where, **more)
        return found["estimate"], found["low"], found["high"]

    for variation in ("person", "(all)"):
        assert bounds("perplexity", variation) == (20.0, 19.0, 21.0)
        assert bounds("perplexity_ratio", variation) == (1.0, None, None)
        assert bounds("perplexity", variation, "fasp") == (25.0, 24.0, 26.0)
        assert bounds("perplexity_ratio", variation, "fasp") == pytest.approx((1.25, 1.2, 1.3))
        assert bounds("perplexity", variation, "random", matched_to="fasp") == (40.0, 28.0, 53.0)
        assert bounds("perplexity_ratio", variation, "random", matched_to="fasp") == pytest.approx((2.0, 1.4, 2.6))


# Resampling


def test_what_does_not_vary_has_no_width_and_what_varies_has():
    """Descriptors alike and templates apart: only resampled templates show it, and the other way round."""
    of_templates = [[[[0.1 + 0.2 * (t == g)] for t in range(3)]] * 3 for g in range(3)]
    of_descriptors = [[[[0.1 + 0.2 * d + 0.1 * g]] * 3 for d in range(3)] for g in range(3)]
    for values, wide in ((of_templates, "template"), (of_descriptors, "subject")):
        for cluster in ("subject", "template", "both"):
            found = row(evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, **FEW, cluster=cluster), "mean_toxicity/a")
            width = found["high"] - found["low"]
            assert (width > 0.05) == (cluster in (wide, "both")), (wide, cluster, width)


def test_a_template_is_drawn_for_all_subgroups_at_once():
    """A template that is toxic for everybody says nothing about the subgroups."""
    values = [[[[0.1 + 0.2 * t + 0.1 * g] for t in range(4)]] * 2 for g in range(3)]
    table = evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, **FEW, cluster="template")
    found = row(table, "toxicity_bias")
    assert found["high"] - found["low"] == pytest.approx(0.0, abs=1e-9)
    assert row(table, "mean_toxicity")["high"] - row(table, "mean_toxicity")["low"] > 0.1


def test_the_interval_of_a_mean_is_as_wide_as_its_clusters_make_it():
    """Descriptors differ by .1, samples hardly: 1.96 x .1 / sqrt(30), however many samples there are."""
    rng = np.random.default_rng(2)
    values = noisy(rng, (0.5, 0.5, 0.5), descriptors=30, templates=2, samples=20, of_descriptor=0.1)
    spread = np.std([np.mean(subject) for subject in values[0]])
    found = row(evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, subgroups=GROUPS), "mean_toxicity/a")
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread / np.sqrt(30), rel=0.08)


def test_the_same_seed_gives_the_same_table_and_other_masks_do_not_move_it():
    values = noisy(np.random.default_rng(3), (0.3, 0.35, 0.4))
    alone = evaluate_toxicity(frame(values), pruned(values), NO_MASKS, **FEW, cluster="both")
    beside = pl.concat([pruned(values, "other"), pruned(values)])
    more = evaluate_toxicity(frame(values), beside, NO_MASKS, **FEW, cluster="both")
    assert more.filter(pl.col("strategy") != "other").equals(alone)
    assert not evaluate_toxicity(frame(values), pruned(values), NO_MASKS, **FEW, cluster="both", seed=1).equals(alone)


@pytest.mark.parametrize(("cluster", "descriptors", "templates"), [("subject", 1, 5), ("template", 5, 1)])
def test_one_cluster_gives_no_interval_and_no_reduction(cluster, descriptors, templates):
    values = noisy(np.random.default_rng(4), (0.3, 0.4, 0.5), descriptors, templates)
    table = evaluate_toxicity(frame(values), pruned(values), NO_MASKS, **FEW, cluster=cluster)
    found = row(table, "toxicity_bias")
    assert found["estimate"] is not None
    assert (found["low"], found["high"]) == (None, None)
    assert estimate(table, "bias_reduction", strategy="fasp") is None


# Equal subgroups


def test_labels_that_do_not_matter_are_rarely_found_to_matter():
    rng = np.random.default_rng(5)
    p_values = {"subject": [], "template": []}
    covered = []
    for _ in range(60):
        for cluster, found in p_values.items():
            values = noisy(rng, (0.3, 0.3, 0.3), samples=2, of_descriptor=0.05 * (cluster == "subject"))
            table = evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, **FEW, cluster=cluster)
            found.append(row(table, "toxicity_bias")["p_value"])
            covered.append(estimate(table, "all_equal_covered") == (found[-1] > 0.05))
    for found in p_values.values():
        assert 0.3 < np.mean(found) < 0.7
        assert np.mean(np.array(found) < 0.05) < 0.15
    assert np.mean(covered) > 0.95


def test_labels_that_matter_are_found():
    values = noisy(np.random.default_rng(6), (0.2, 0.4, 0.7), descriptors=5, templates=6, of_descriptor=0.02)
    for cluster in ("subject", "template", "both"):
        table = evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, **FEW, cluster=cluster)
        assert row(table, "toxicity_bias")["p_value"] < 0.02
        assert estimate(table, "all_equal_covered") == 0.0
        assert row(table, "toxicity_bias_if_equal")["high"] < estimate(table, "toxicity_bias")


def test_permuted_labels_by_hand():
    """Descriptors .0 .0 | .6 .6: two of the six ways to share them out keep the pairs apart."""
    values = [[[[0.0]], [[0.0]]], [[[0.6]], [[0.6]]]]
    table = evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, subgroups=("a", "b"), resamples=4000)
    assert row(table, "toxicity_bias")["p_value"] == pytest.approx(1 / 3, abs=0.03)
    assert estimate(table, "toxicity_bias_if_equal") == pytest.approx(0.2, abs=0.02)
    assert estimate(table, "all_equal_covered") == 1.0


def test_one_descriptor_per_subgroup_has_no_labels_to_permute():
    values = noisy(np.random.default_rng(7), (0.3, 0.4, 0.6), descriptors=1, templates=12)
    table = evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, **FEW)
    assert row(table, "toxicity_bias")["p_value"] is None
    assert "all_equal_covered" not in table["metric"].to_list()
    by_template = evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, **FEW, cluster="template")
    assert row(by_template, "toxicity_bias")["p_value"] < 0.02


def test_p_values_are_adjusted_over_the_variations():
    rng = np.random.default_rng(8)
    parts = [frame(noisy(rng, (0.30, 0.32, 0.34), of_descriptor=0.02), name) for name in ("one", "two", "three")]
    table = evaluate_toxicity(pl.concat(parts), NO_MASKS, NO_MASKS, **FEW)
    rows = table.filter((pl.col("metric") == "toxicity_bias") & (pl.col("variation") != "(all)"))
    assert (rows["p_holm"] >= rows["p_value"]).all()
    assert rows["p_holm"].min() == pytest.approx(min(1.0, 3 * rows["p_value"].min()))
    assert row(table, "toxicity_bias")["p_holm"] is None


# The folded noise


def test_folded_noise_by_hand():
    assert folded_noise([0.0, 0.0], [1.0, 4.0]) == pytest.approx(np.sqrt(2 / np.pi) * 3)
    # mean(d^2 - sigma^2) = 9 - 1, so tau = sqrt(8) and sqrt(tau^2 + sigma^2) = 3
    assert folded_noise([3.0, -3.0], [1.0, 1.0]) == pytest.approx(np.sqrt(2 / np.pi) * 2 * (3 - np.sqrt(8)))
    assert debiased_bias([0.3, -0.3], [0.0, 0.0]) == pytest.approx(0.6)
    assert debiased_bias([100.0, -100.0], [1.0, 1.0]) == pytest.approx(200, abs=0.02)


def test_the_variance_of_every_deviation_is_that_of_repeated_samples():
    rng = np.random.default_rng(9)
    for cluster, of_descriptor in (("subject", 0.1), ("template", 0.0), ("both", 0.1)):
        deviations, variances = [], []
        for _ in range(150):
            values = noisy(
                rng, (0.3, 0.5, 0.4), descriptors=4, templates=6, samples=1, of_descriptor=of_descriptor, of_sample=0.3
            )
            part = frame(values)
            axis = axis_of(part, GROUPS, cluster, 1, 0)
            scores = scores_of(part, axis, 0.5, "axis")
            means = (scores.total.sum(axis=1) @ axis.member) / (scores.scored.sum(axis=1) @ axis.member)
            deviations.append(means - means.mean())
            variances.append(noise_of(scores, axis))
        ratio = np.mean(variances, axis=0) / np.var(deviations, axis=0, ddof=1)
        assert (np.abs(np.log(ratio)) < 0.4).all(), (cluster, ratio)


@pytest.mark.parametrize(("spread", "gain"), [(0.0, 3.0), (0.03, 1.5), (0.1, 1.5), (0.3, 1.2)])
def test_the_debiased_estimate_is_nearer_the_truth(spread, gain):
    """Equal subgroups, and ones that differ by about as much as the noise and by far more: on average over samples."""
    rng = np.random.default_rng(10)
    names = tuple("abcdef")
    raw, debiased, truth = [], [], []
    for _ in range(200):
        means = spread * rng.normal(size=len(names))
        units = means[:, None] + 0.1 * rng.normal(size=(len(names), 3))
        rows = [
            {
                "model": "m",
                "scenario": "axis",
                "variation": "person",
                "template": "t",
                "group": name,
                "subject": f"{name}{number}",
                "prompt_id": f"{name}{number}",
                "sample": 0,
                "value": value,
            }
            for name, some in zip(names, units.tolist(), strict=True)
            for number, value in enumerate(some)
        ]
        table = evaluate_toxicity(pl.DataFrame(rows), NO_MASKS, NO_MASKS, subgroups=names, resamples=2)
        raw.append(estimate(table, "toxicity_bias"))
        debiased.append(estimate(table, "toxicity_bias_debiased"))
        truth.append(np.abs(means - means.mean()).sum())
    too_much, left = np.mean(raw) - np.mean(truth), np.mean(debiased) - np.mean(truth)
    assert too_much > 0.01
    assert abs(left) < too_much / gain


def test_the_interval_of_the_debiased_estimate_reaches_zero_for_equal_subgroups():
    rng = np.random.default_rng(11)
    reached = {"toxicity_bias": 0, "toxicity_bias_debiased": 0}
    for _ in range(40):
        values = noisy(rng, (0.3, 0.3, 0.3), descriptors=8, templates=1, samples=1)
        table = evaluate_toxicity(frame(values), NO_MASKS, NO_MASKS, **FEW)
        for metric in reached:
            reached[metric] += row(table, metric)["low"] <= 0
    assert reached["toxicity_bias"] == 0
    assert reached["toxicity_bias_debiased"] >= 34


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster": "name"}, "cluster 'name' is not known"),
        ({"subgroups": ("a",)}, "name at least two"),
        ({"subgroups": ("a", "a")}, "name at least two, each once"),
        ({"subgroups": ("a", "x")}, "no completions for the subgroup 'x'; the groups are a, b"),
        ({"resamples": 0}, "resamples is 0"),
    ],
)
def test_what_cannot_be_evaluated_is_named(change, message):
    with pytest.raises(ExciseError, match=message):
        evaluate_toxicity(frame(flat(0.2, 0.4, 0.6)), NO_MASKS, NO_MASKS, **(FEW | change))


def test_tables_that_do_not_fit_together_are_refused():
    before, after = frame(flat(0.2, 0.4, 0.6)), pruned(flat(0.2, 0.4, 0.6))
    for wrong, message in (
        (after.filter(pl.col("group") != "c"), "no completions for the subgroup 'c'"),
        (after.with_columns(variation=pl.lit("uncle")), "no unpruned completions to compare with"),
        (after.with_columns(template=pl.lit("t9")), "template t9 has no unpruned completions"),
        (after.with_columns(subject=pl.lit("a7")), "subject a7 has no unpruned completions"),
        (after.with_columns(scenario=pl.lit("race")), "not those of m, axis"),
        (after.drop("draw"), "lack the column.s. draw"),
    ):
        with pytest.raises(ExciseError, match=message):
            evaluate_toxicity(before, wrong, NO_MASKS, **FEW)
    with pytest.raises(ExciseError, match="template"):
        evaluate_toxicity(before.drop("template"), NO_MASKS, NO_MASKS, **FEW)


# Undefined, collapsed, and from how few


@pytest.mark.trial(1)
def test_a_mask_under_which_every_score_is_the_same_is_no_success():
    rng = np.random.default_rng(4)
    before = frame(noisy(rng, (0.1, 0.3, 0.5)))
    masks = pl.concat(
        [
            pruned(flat(0.2, 0.2, 0.2, descriptors=3, templates=4), "dull"),
            pruned(noisy(rng, (0.1, 0.2, 0.3)), "fasp"),
            pruned(noisy(rng, (0.1, 0.3, 0.5), of_sample=0.001), "narrow"),
            pruned(noisy(rng, (0.1, 0.3, 0.5)), "random", matched_to="fasp"),
            pruned(flat(0.2, 0.2, 0.2, descriptors=3, templates=4), "random", matched_to="fasp", draw=1),
        ]
    )
    table = evaluate_toxicity(before, masks, NO_MASKS, **FEW)
    for variation in ("person", "(all)"):
        assert estimate(table, "toxicity_bias", variation, "dull") == pytest.approx(0, abs=1e-12)
        for strategy, matched_to in (("dull", None), ("random", "fasp")):
            found = row(table, "bias_reduction", variation, strategy, matched_to)
            assert (found["estimate"], found["low"], found["high"]) == (None, None, None)
            assert estimate(table, "spread_ratio", variation, strategy, matched_to=matched_to) == 0
        assert estimate(table, "bias_reduction", variation, "fasp") > 0.3
        assert row(table, "reduction_over_random", variation, "fasp")["estimate"] is None
        # a small part of the spread is no collapse here: hardly any continuation may be toxic any more
        assert 0 < estimate(table, "spread_ratio", variation, "narrow") < 0.1
        assert estimate(table, "bias_reduction", variation, "narrow") is not None


@pytest.mark.trial(12)
def test_a_perplexity_that_is_not_known_does_not_leave_the_mean_to_the_others():
    values = noisy(np.random.default_rng(0), (0.1, 0.2, 0.3))
    masks = pl.concat([pruned(values, "random", matched_to="fasp", draw=draw) for draw in (0, 1)] + [pruned(values)])

    def text(strategy, perplexity, matched_to=None, draw=0):
        return {
            "strategy": strategy,
            "level": "none" if strategy == "unpruned" else "within_context",
            "matched_to": matched_to,
            "variation": "(all)",
            "draw": draw,
            "perplexity": perplexity,
            "low": 1.0,
            "high": 2.0,
            "difference_low": 0.0,
            "difference_high": 1.0,
        }

    for broken in (np.inf, np.nan, None):
        texts = pl.DataFrame(
            [
                text("unpruned", 20.0),
                text("fasp", 30.0),
                text("random", 25.0, "fasp"),
                text("random", broken, "fasp", 1),
            ]
        )
        table = evaluate_toxicity(frame(values), masks, NO_MASKS, texts, **FEW)
        assert estimate(table, "perplexity_ratio", strategy="fasp") == pytest.approx(1.5)
        for metric in ("perplexity", "perplexity_ratio"):
            found = row(table, metric, strategy="random", matched_to="fasp")
            assert (found["estimate"], found["low"], found["high"]) == (None, None, None)


@pytest.mark.trial(39)
@pytest.mark.parametrize(("cluster", "names"), [("subject", 2), ("template", 3), ("both", 2)])
def test_every_figure_tells_from_how_many_descriptors_or_templates_it_is(cluster, names):
    rng = np.random.default_rng(2)
    few = noisy(rng, (0.1, 0.2, 0.3), descriptors=4, templates=3)
    few[1] = few[1][:2]
    table = evaluate_toxicity(frame(few), pruned(few), NO_MASKS, subgroups=GROUPS, resamples=50, cluster=cluster)
    for metric in ("toxicity_bias", "mean_toxicity", "mean_toxicity/a", "share_scored", "toxicity_bias_if_equal"):
        assert row(table, metric)["names"] == names
    for metric in ("bias_reduction", "bias_change"):
        assert row(table, metric, strategy="fasp")["names"] == names
    assert row(table, "density")["names"] is None


@pytest.mark.trial(39)
def test_one_descriptor_with_a_score_leaves_no_interval():
    rng = np.random.default_rng(2)
    values = noisy(rng, (0.1, 0.2, 0.3))
    silent = [values[0], [values[1][0], *[[[None] * 5] * 4] * 2], values[2]]
    table = evaluate_toxicity(frame(values), pruned(silent), NO_MASKS, **FEW)
    for metric in ("toxicity_bias", "mean_toxicity", "bias_change"):
        found = row(table, metric, strategy="fasp")
        assert found["estimate"] is not None
        assert (found["low"], found["high"], found["names"]) == (None, None, 1)
    assert row(table, "bias_reduction", strategy="fasp")["estimate"] is None
    assert row(table, "share_scored", strategy="fasp")["low"] is not None


@pytest.mark.trial(13)
@pytest.mark.parametrize("cluster", ["subject", "template", "both"])
def test_permutations_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch, cluster):
    rng = np.random.default_rng(6)
    values = frame(noisy(rng, (0.1, 0.12, 0.14), of_descriptor=0.03))

    def tested():
        table = evaluate_toxicity(values, NO_MASKS, NO_MASKS, subgroups=GROUPS, resamples=300, cluster=cluster)
        equal = row(table, "toxicity_bias_if_equal")
        return row(table, "toxicity_bias")["p_value"], equal["estimate"], equal["high"]

    whole = tested()
    assert 0.02 < whole[0] < 1
    for module in ("axis", "axis_noise"):
        monkeypatch.setattr(f"excise.evaluation.{module}.CELLS_AT_ONCE", 500)
    assert tested() == pytest.approx(whole, rel=1e-9)


def test_a_variation_is_tested_among_its_own_descriptors():
    """Descriptors that only another variation has must not take its labels."""
    rng = np.random.default_rng(7)
    own = frame(noisy(rng, (0.1, 0.15, 0.2), of_descriptor=0.03))
    other = frame(noisy(rng, (0.1, 0.15, 0.2), descriptors=5), "parent").filter(pl.col("subject").str.ends_with("4"))
    alone, beside = (
        row(evaluate_toxicity(each, NO_MASKS, NO_MASKS, **FEW), "toxicity_bias", "person")
        for each in (own, pl.concat([own, other]))
    )
    assert alone["p_value"] == beside["p_value"]
