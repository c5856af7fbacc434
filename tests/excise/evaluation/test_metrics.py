"""Metrics on data small enough for a hand, and the resampled metrics against the written-out samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import wasserstein_distance

from excise.errors import ExciseError
from excise.evaluation import bootstrap, permutation
from excise.evaluation import metrics as m

NAN = float("nan")


def test_smd_by_hand():
    # means 20 and 10, variances 100 and 4: pooled deviation sqrt(52)
    assert m.standardized_mean_difference([10, 20, 30], [8, 10, 12]) == pytest.approx(10 / np.sqrt(52))
    assert m.standardized_mean_difference([8, 10, 12], [10, 20, 30]) == pytest.approx(-10 / np.sqrt(52))
    assert m.standardized_mean_difference([10, NAN, 20, 30], [8, 10, 12, NAN]) == pytest.approx(10 / np.sqrt(52))


def test_smd_of_groups_without_spread_is_zero_only_where_they_are_equal():
    assert np.isnan(m.standardized_mean_difference([0.1] * 3, [0.3] * 7))
    assert m.standardized_mean_difference([0.1] * 3, [0.1] * 7) == 0.0
    assert m.standardized_mean_difference([5, 5], [5, 5], winsorize=0.05) == 0.0


@pytest.mark.trial(1)
@pytest.mark.parametrize("winsorize", [None, 0.05])
def test_an_smd_without_deviation_is_undefined_where_the_means_differ(winsorize):
    import excise

    assert np.isnan(excise.standardized_mean_difference([500] * 9, [300] * 9, winsorize))
    assert np.isnan(excise.standardized_mean_difference([0.1] * 9, [0.3] * 9, winsorize))
    assert excise.standardized_mean_difference([500] * 9, [500] * 7, winsorize) == 0
    # a sum of tenths is not always the tenth it stands for: that is no deviation, and no difference
    assert np.isnan(m.standardized_mean_difference([0.3, 0.1 + 0.2] * 5, [0.1] * 9, winsorize))
    assert m.standardized_mean_difference([0.3] * 9, [0.1 + 0.2] * 9, winsorize) == 0
    assert np.isnan(m.standardized_mean_difference([1e15, 1e15 + 0.125] * 4, [2e15] * 8, winsorize))
    # one group that varies is a deviation
    assert m.standardized_mean_difference([500] * 9, [299, 300, 301] * 3, winsorize) > 100


@pytest.mark.trial(1)
def test_winsorizing_can_take_all_deviation():
    nearly = [500.0] * 39 + [900.0]
    assert m.standardized_mean_difference(nearly, [300] * 40) == pytest.approx(210 / np.sqrt(4000 / 2))
    assert np.isnan(m.standardized_mean_difference(nearly, [300] * 40, 0.05))


@pytest.mark.trial(1)
def test_resamples_without_deviation_are_undefined_and_take_the_interval_with_them():
    """Two of three names always say 500: of 27 resamples 8 draw them alone, and their SMD is not 0."""
    one = bootstrap.named_answers([500, 500, 500, 500, 480, 530], [0, 0, 1, 1, 2, 2], 3)
    two = bootstrap.named_answers([300] * 6, [0, 0, 1, 1, 2, 2], 3)
    weights = (
        bootstrap.resampled_names(3, 2000, np.random.default_rng(0)),
        bootstrap.resampled_names(3, 2000, np.random.default_rng(1)),
    )
    smd = bootstrap.weighted_smd(one, two, weights)
    constant = weights[0][:, 2] == 0
    assert np.isfinite(smd[0])
    assert np.isnan(smd[constant]).all()
    assert np.isfinite(smd[~constant]).all()
    assert np.isnan(bootstrap.percentile_interval(smd[1:])).all()


def test_smd_needs_two_answers_per_group():
    assert np.isnan(m.standardized_mean_difference([1, NAN], [1, 2]))
    assert np.isnan(m.standardized_mean_difference([], []))


def test_winsorizing_clips_each_group_at_its_own_percentiles():
    majority, minority = np.arange(101.0), np.arange(101.0) - 50
    majority[-1] = 1e6
    expected = m.standardized_mean_difference(np.clip(majority, 5, 95), np.clip(minority, -45, 45))
    assert m.standardized_mean_difference(majority, minority, winsorize=(0.05, 0.95)) == pytest.approx(expected)
    assert m.standardized_mean_difference(majority, minority, winsorize=0.05) == pytest.approx(expected)
    assert m.standardized_mean_difference(majority, minority) < 0.2 < expected


@pytest.mark.parametrize("winsorize", [0.5, -0.1, (0.9, 0.1), (0.1,), (5, 95), "no", True])
def test_senseless_quantiles_are_refused(winsorize):
    with pytest.raises(ExciseError, match="winsorize"):
        m.standardized_mean_difference([1, 2], [3, 4], winsorize=winsorize)


def test_inlier_ratio_counts_bounds_in_and_unparsed_answers_out():
    baseline = np.arange(101.0)  # bounds 5 and 95
    assert m.inlier_ratio([5, 95, 4.9, 95.1, 50], baseline) == pytest.approx(3 / 5)
    assert m.inlier_ratio([5, 95, NAN, NAN], [*baseline, NAN]) == pytest.approx(1 / 2)
    assert m.inlier_ratio([10, 30, 50], baseline, quantiles=(0.25, 0.75)) == pytest.approx(2 / 3)
    assert np.isnan(m.inlier_ratio([], baseline))
    assert np.isnan(m.inlier_ratio([1], [NAN]))


def test_parse_rate_and_earth_movers_distance():
    assert m.parse_rate([1, NAN, 3, 4]) == 0.75
    assert np.isnan(m.parse_rate([]))
    assert m.earth_movers_distance([0, 1, 3], [5, 6, 8, NAN]) == pytest.approx(5)
    assert np.isnan(m.earth_movers_distance([NAN], [1]))


def test_toxicity_bias_of_the_papers_example():
    assert m.toxicity_bias([0.6, 0.6, 0.8, 0.8], ["a", "a", "b", "b"]) == pytest.approx(0.2)
    assert m.toxicity_bias([0.6, 0.8, 0.8, 0.8], ["a", "b", "b", "b"]) == pytest.approx(0.2)
    assert m.toxicity_bias([0.1, 0.2, 0.35], ["a"] * 3) == 0.0
    # axis mean .4; subgroup means .2, .4, .6
    assert m.toxicity_bias([0.2, 0.4, 0.6, NAN], [1, 2, None, 1]) == pytest.approx(0.4)
    assert np.isnan(m.toxicity_bias([], []))
    with pytest.raises(ExciseError):
        m.toxicity_bias([0.1], ["a", "b"])


def test_holm_by_hand():
    assert permutation.holm([0.01, 0.04, NAN, 0.03]) == pytest.approx([0.03, 0.06, NAN, 0.06], nan_ok=True)
    assert permutation.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert permutation.holm([]).shape == (0,)


# --- resampled names --------------------------------------------------------------------------------------------------

NAMES = 4
answers = st.one_of(st.sampled_from([NAN, 0.0, 1.0, 2.5]), st.floats(-1e6, 1e6))
group = st.lists(st.tuples(st.integers(0, NAMES - 1), answers), min_size=1, max_size=25)
draws = arrays(np.int64, NAMES, elements=st.integers(0, 3))


def written_out(pairs, weights):
    return np.array([value for name, value in pairs for _ in range(weights[name])], dtype=float)


def counted(pairs):
    return bootstrap.named_answers([value for _, value in pairs], [name for name, _ in pairs], NAMES)


@given(group, group, draws, draws, st.sampled_from([None, 0.05, (0.1, 0.7)]))
@settings(max_examples=300, deadline=None)
def test_every_weighted_metric_equals_the_plain_one_of_the_written_out_resample(first, second, w1, w2, winsorize):
    one, two = counted(first), counted(second)
    weights = np.array([w1, w1], float), np.array([w2, w2], float)
    a, b = written_out(first, w1), written_out(second, w2)
    parsed = a[~np.isnan(a)]
    quantiles = (0, 0.05, 0.3, 0.5, 0.95, 1)
    found = bootstrap.weighted_quantiles(one, weights[0], quantiles)[:, 1]
    assert np.array_equal(found, np.quantile(parsed, quantiles) if len(parsed) else [NAN] * 6, equal_nan=True)

    def same(result, expected):
        assert result[1] == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)

    same(bootstrap.weighted_mean(one, weights[0]), parsed.mean() if len(parsed) else NAN)
    same(bootstrap.weighted_parse_rate(one, weights[0]), m.parse_rate(a))
    same(bootstrap.weighted_earth_movers_distance(one, two, weights), m.earth_movers_distance(a, b))
    both, stacked = bootstrap.pooled(one, two), np.hstack(weights)
    bounds = bootstrap.weighted_quantiles(both, stacked, (0.05, 0.95))
    same(bootstrap.weighted_inlier_ratio(both, stacked, bounds), m.inlier_ratio(np.r_[a, b], np.r_[a, b]))
    expected = m.standardized_mean_difference(a, b, winsorize)
    if abs(expected) < 1e6 or np.isnan(expected):  # beyond, the spread is the rounding of the answers
        same(bootstrap.weighted_smd(one, two, weights, winsorize), expected)


def test_chunks_do_not_change_results(monkeypatch):
    rng = np.random.default_rng(0)
    one = bootstrap.named_answers(rng.normal(size=200), rng.integers(0, 8, 200), 8)
    two = bootstrap.named_answers(rng.normal(size=200), rng.integers(0, 8, 200), 8)
    weights = bootstrap.resampled_names(8, 50, rng), bootstrap.resampled_names(8, 50, rng)

    def everything():
        return np.vstack(
            [
                bootstrap.weighted_quantiles(one, weights[0], (0.1, 0.5)),
                bootstrap.weighted_smd(one, two, weights, 0.05),
                bootstrap.weighted_earth_movers_distance(one, two, weights),
            ]
        )

    whole = everything()
    monkeypatch.setattr(bootstrap, "_CELLS_AT_ONCE", 7)
    assert everything() == pytest.approx(whole, rel=1e-12)


def test_earth_movers_distance_equals_scipy_in_the_unweighted_row():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(3, 1, 300), rng.lognormal(3.5, 1, 200)
    one, two = bootstrap.named_answers(a, np.arange(300) % 5, 5), bootstrap.named_answers(b, np.arange(200) % 5, 5)
    result = bootstrap.weighted_earth_movers_distance(one, two, (np.ones((1, 5)), np.ones((1, 5))))
    assert result[0] == pytest.approx(wasserstein_distance(a, b), rel=1e-12)


def test_resampled_names_begin_with_the_sample_and_keep_its_size():
    weights = bootstrap.resampled_names(6, 100, np.random.default_rng(0))
    assert weights.shape == (101, 6)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 6).all()
    assert (weights[1:] == 0).any()


def test_names_out_of_range_are_refused():
    with pytest.raises(ExciseError, match=r"0\.\.1"):
        bootstrap.named_answers([1, 2], [0, 2], 2)


def test_intervals_cover_the_true_mean_when_names_differ_and_samples_of_a_name_do_not():
    """20 names with 30 near-identical samples each: resampled samples would cover about one time in four."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(150):
        values = rng.normal(0, 1, (20, 1)) + rng.normal(0, 0.2, (20, 30))
        sample = bootstrap.named_answers(values, np.repeat(np.arange(20), 30), 20)
        low, high = bootstrap.percentile_interval(
            bootstrap.weighted_mean(sample, bootstrap.resampled_names(20, 300, rng))[1:]
        )
        covered.append(low <= 0 <= high)
    assert 0.86 <= np.mean(covered) <= 0.99


def test_percentile_interval_leaves_out_undefined_resamples():
    assert bootstrap.percentile_interval(np.r_[np.arange(101.0), [NAN] * 5]) == pytest.approx((2.5, 97.5))
    assert np.isnan(bootstrap.percentile_interval(np.array([1.0, NAN, NAN]))).all()
    # six of 106 may lie anywhere, and an end of the interval with them
    assert np.isnan(bootstrap.percentile_interval(np.r_[np.arange(100.0), [NAN, np.inf] * 3])).all()
    assert np.isnan(bootstrap.percentile_interval([])).all()


# --- tests ------------------------------------------------------------------------------------------------------------


def test_paired_test_of_unchanged_answers_is_one():
    assert permutation.paired_permutation_test(np.zeros(5), np.zeros(5)) == 1.0


def test_paired_test_of_few_names_agrees_with_counting_all_signs():
    # changes +1, +2 for the majority, -3 for the minority: T = 1.5 + 3 = 4.5; of 8 sign patterns two reach it
    p_value = permutation.paired_permutation_test([1, 2], [-3], draws=40_000, seed=1)
    assert p_value == pytest.approx(2 / 8, abs=0.01)


def test_paired_test_leaves_out_names_without_a_pair():
    assert permutation.paired_permutation_test([1, 2, NAN], [-3, NAN], draws=40_000) == pytest.approx(2 / 8, abs=0.01)
    assert permutation.gap_contributions([1, 3, NAN], [5, NAN]).tolist() == [0.5, 1.5, 0, -5, 0]
    assert np.isnan(permutation.paired_permutation_test([NAN, NAN], [1, 2]))


def test_paired_test_finds_a_lasting_change_and_never_gives_zero():
    p_value = permutation.paired_permutation_test(np.full(16, -5.0), np.full(16, 1.0), draws=999)
    assert p_value == 1 / 1000


def test_paired_test_is_uniform_when_nothing_lasts():
    rng = np.random.default_rng(5)
    contributions = np.stack([permutation.gap_contributions(*rng.standard_t(3, (2, 12))) for _ in range(400)], axis=1)
    p_values = permutation.sign_flip_p_values(contributions, 499, 0)
    assert np.mean(p_values <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(p_values <= 0.5) == pytest.approx(0.5, abs=0.08)


def test_permuted_groups_keep_their_sizes():
    labels = permutation.permuted_groups(3, 5, 200, 0)
    assert (labels.sum(axis=1) == 3).all()
    assert 0 < labels[:, 0].mean() < 1


def test_permutation_p_value_by_hand():
    assert permutation.permutation_p_value(2.0, np.array([-2.0, 1.0, 3.0, 0.0])) == 3 / 5
    assert permutation.permutation_p_value(0.0, np.zeros(9)) == 1.0
    assert np.isnan(permutation.permutation_p_value(NAN, np.zeros(9)))
    assert np.isnan(permutation.permutation_p_value(np.inf, np.zeros(9)))
    # draws that overflow are as extreme as can be, and make no others so
    assert permutation.permutation_p_value(2.0, np.array([np.inf, 0.0, 1.0, NAN])) == 3 / 5


def _contributions(tests, names=33):
    rng = np.random.default_rng(11)
    return np.stack(
        [permutation.gap_contributions(rng.normal(0.4, 1, names), rng.normal(0, 1, names)) for _ in range(tests)],
        axis=1,
    )


@pytest.mark.trial(13)
@pytest.mark.parametrize("cells", [1 << 19, 4096, 7])
def test_sign_flip_p_values_do_not_depend_on_what_else_is_tested(monkeypatch, cells):
    contributions = _contributions(204)
    monkeypatch.setattr(bootstrap, "_CELLS_AT_ONCE", 1 << 19)
    alone = np.array([permutation.sign_flip_p_values(contributions[:, [test]], 999, 4)[0] for test in range(204)])
    assert np.ptp(alone) > 0.5
    monkeypatch.setattr(bootstrap, "_CELLS_AT_ONCE", cells)
    assert np.array_equal(permutation.sign_flip_p_values(contributions, 999, 4), alone)
    assert np.array_equal(permutation.sign_flip_p_values(contributions[:, ::-1], 999, 4), alone[::-1])
    broken = np.insert(contributions, 3, NAN, axis=1)
    found = permutation.sign_flip_p_values(broken, 999, 4)
    assert np.isnan(found[3])
    assert np.array_equal(np.delete(found, 3), alone)


def test_more_draws_begin_with_the_same_signs():
    contributions = _contributions(3)
    few, many = (permutation.sign_flip_p_values(contributions, draws, 4) * (draws + 1) for draws in (99, 999))
    assert (many >= few).all()


@pytest.mark.trial(12)
def test_figures_that_overflow_are_undefined():
    huge, usual = [1e308, 1e308], [5.0, 6.0, 7.0]
    for smd in (m.standardized_mean_difference(huge, usual), m.standardized_mean_difference(usual, huge, 0.05)):
        assert np.isnan(smd)
    assert np.isnan(m.standardized_mean_difference([1e200, -1e200], usual))  # the variance alone
    assert m.exact_difference([np.inf, 5.0, np.inf], [6.0, 5.0, np.inf]) == pytest.approx([np.inf, 0, NAN], nan_ok=True)
    assert np.isnan(permutation.paired_permutation_test([np.inf, 1.0], [1.0, 2.0]))
    assert np.isnan(permutation.paired_permutation_test([1e308, 1e308], [-1e308, -1e308]))
    assert permutation.name_means(bootstrap.named_answers([1e308, 1e308, 5, NAN], [0, 0, 1, 2], 3)) == pytest.approx(
        [np.inf, 5, NAN], nan_ok=True
    )
    assert np.isnan(m.toxicity_bias([1e308, 1e308, 1.0], ["a", "a", "b"]))
    assert np.isnan(m.earth_movers_distance([1e308] * 2, [-1e308] * 2))


@pytest.mark.trial(45)
def test_variations_stand_out_by_their_adjusted_tests():
    assert permutation.rejected({"chair": 0.049, "car": 0.05, "oven": None, "grill": NAN, "piano": 0.001}) == [
        "chair",
        "piano",
    ]
    assert permutation.rejected({}) == []
