"""Selections take exact counts, break ties by place, and reproduce the papers' rules."""

import numpy as np
import pytest

from excise.errors import ExciseError
from excise.selection import fasp, global_top, pooled_band, set_difference, set_difference_of_count, top


def ranked(scores: np.ndarray, count: int) -> np.ndarray:
    """The plain way: sort everything by falling score, then by flat index."""
    flat = scores.reshape(-1)
    order = sorted(range(flat.size), key=lambda place: (-flat[place], place))
    chosen = np.zeros(flat.size, dtype=bool)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape)


# top


@pytest.mark.parametrize("seed", range(5))
def test_top_equals_a_full_sort_with_many_ties(seed):
    scores = np.random.default_rng(seed).integers(0, 6, (7, 9)).astype(np.float32)
    for count in range(scores.size + 1):
        assert np.array_equal(top(scores, count), ranked(scores, count))


def test_equal_scores_are_taken_from_the_lowest_index():
    assert top(np.zeros(5), 2).tolist() == [True, True, False, False, False]
    assert top([[1, 3], [3, 3]], 2).tolist() == [[False, True], [True, False]]


def test_top_reads_the_logical_order_of_a_transposed_view():
    scores = np.array([[1.0, 5, 5], [5, 0, 5]])
    assert np.array_equal(top(scores.T, 2), ranked(np.ascontiguousarray(scores.T), 2))


def test_infinities_are_scores_and_nan_is_not():
    assert top([0, np.inf, -np.inf], 1).tolist() == [False, True, False]
    with pytest.raises(ExciseError, match="scores holds NaN: 1 of 3 entries"):
        top([0, np.nan, 1], 1)


@pytest.mark.parametrize("count", [-1, 4, 1.0, True])
def test_a_count_lies_between_none_and_all(count):
    with pytest.raises(ExciseError, match="count is"):
        top([1, 2, 3], count)


# set difference


def test_set_difference_by_hand():
    minority = np.array([[9, 8, 7, 6, 5], [4, 3, 2, 1, 0]])
    majority = np.array([[9, 0, 8, 1, 7], [2, 6, 3, 5, 4]])
    # top 40 % of the minority's: 9 8 7 6; top 30 % of the majority's: places 0, 2, 4
    expected = np.zeros((2, 5), dtype=bool)
    expected[0, [1, 3]] = True
    assert np.array_equal(set_difference(minority, majority, 0.4, 0.3), expected)


def test_set_difference_by_default_thresholds_holds_at_least_the_band_between_them():
    rng = np.random.default_rng(0)
    minority = rng.random((40, 50))
    same = set_difference(minority, minority, 0.40, 0.35)
    assert same.sum() == int(0.40 * 2000) - int(0.35 * 2000)
    other = set_difference(minority, rng.random((40, 50)), 0.40, 0.35)
    assert other.sum() > same.sum()
    assert set_difference(minority, minority, 0.15, 0.15).sum() == 0


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.29, 0.35, 0.58, 0.7, 1.0])
def test_counts_are_int_of_fraction_times_entries(tau):
    scores = np.random.default_rng(1).random(100)
    assert set_difference(scores, scores, tau, 0.0).sum() == int(tau * 100)
    assert set_difference(scores, -scores, 1.0, tau).sum() == 100 - int(tau * 100)


def test_the_ends_of_the_thresholds():
    a, b = np.random.default_rng(2).random((2, 6, 6))
    assert set_difference(a, b, 1, 0).all()
    assert not set_difference(a, b, 0, 0).any()
    assert not set_difference(a, b, 1, 1).any()
    assert set_difference(np.zeros((0, 3)), np.zeros((0, 3)), 0.4, 0.35).shape == (0, 3)


@pytest.mark.parametrize(("minority", "majority", "tau_min", "tau_maj", "message"), [
    ([1, 2], [1, 2, 3], 0.5, 0.5, r"shape \(2,\) and majority_scores \(3,\)"),
    ([1, 2], [1, 2], 1.01, 0.5, "tau_min is 1.01: it is a fraction between 0 and 1"),
    ([1, 2], [1, 2], 0.5, -0.1, "tau_maj is -0.1"),
    ([1, 2], [1, 2], np.nan, 0.5, "tau_min is nan"),
    ([1, np.nan], [1, 2], 0.5, 0.5, "minority_scores holds NaN"),
    ([1, 2], [1, np.nan], 0.0, 0.0, "majority_scores holds NaN"),
    (["a", "b"], [1, 2], 0.5, 0.5, "minority_scores must hold real numbers"),
])
def test_set_difference_refuses_what_has_no_meaning(minority, majority, tau_min, tau_maj, message):
    with pytest.raises(ExciseError, match=message):
        set_difference(minority, majority, tau_min, tau_maj)


def test_scores_are_left_as_they_were():
    a, b = np.random.default_rng(3).random((2, 5, 5))
    before = a.copy(), b.copy()
    set_difference(a, b, 0.4, 0.35)
    assert np.array_equal((a, b), before)


@pytest.mark.parametrize("count", [0, 1, 7, 40, 65])
def test_the_set_difference_of_a_count_is_a_set_difference(count):
    rng = np.random.default_rng(4)
    minority, majority = rng.integers(0, 9, (2, 10, 10)).astype(float)
    chosen = set_difference_of_count(minority, majority, 0.35, count)
    assert chosen.sum() == count
    outside = ~top(majority, 35)
    first = next(k for k in range(101) if (top(minority, k) & outside).sum() == count)
    assert np.array_equal(chosen, top(minority, first) & outside)


def test_a_count_that_cannot_be_reached_is_said():
    with pytest.raises(ExciseError, match=r"count is 66, but only 65 entries lie outside the top 0\.35"):
        set_difference_of_count(np.arange(100), np.arange(100), 0.35, 66)


# controls


def test_the_pooled_band_is_the_band_of_ranks():
    scores = np.array([[3, 9, 1], [7, 5, 7]])
    assert pooled_band(scores, 1, 2).tolist() == [[False, False, False], [True, False, True]]
    assert pooled_band(scores, 2, 2).tolist() == [[False, False, False], [False, True, True]]
    assert not pooled_band(scores, 6, 0).any()
    with pytest.raises(ExciseError, match="band of 2 entries from rank 5"):
        pooled_band(scores, 5, 2)


@pytest.mark.parametrize("count", [0, 1, 5, 17, 30, 36])
def test_the_global_top_is_one_ranking_over_all_matrices(count):
    rng = np.random.default_rng(5)
    scores = {"0.q": rng.integers(0, 5, (4, 6)).astype(np.float32), "0.k": rng.integers(0, 5, (6, 2)).T.astype(float)}
    chosen = global_top(scores, count)
    together = ranked(np.concatenate([array.reshape(-1) for array in scores.values()]), count)
    assert np.array_equal(np.concatenate([chosen[key].reshape(-1) for key in scores]), together)
    assert {key: array.shape for key, array in chosen.items()} == {"0.q": (4, 6), "0.k": (2, 6)}


def test_the_global_top_refuses_more_than_there_is():
    with pytest.raises(ExciseError, match="between 0 and the 3 entries"):
        global_top({"a": np.zeros(3)}, 4)
    with pytest.raises(ExciseError, match="scores of a holds NaN"):
        global_top({"a": np.array([np.nan])}, 1)
    assert global_top({}, 0) == {}


# fairness-aware heads


@pytest.mark.parametrize(("heads", "pruned"), [
    (72, [0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 14]),
    (144, [0, 2, 5, 8, 11, 14, 17, 20, 23, 25, 28]),
    (1024, [0, 20, 40, 61, 81, 102, 122, 143, 163, 184, 204]),
])
def test_the_number_of_pruned_heads_is_the_paper_s(heads, pruned):
    scores = np.random.default_rng(heads).random((2, heads))
    ratios = [0.0, 0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20]
    assert [len(fasp(*scores, alpha, 0.3)) for alpha in ratios] == pruned


def test_heads_critical_to_perplexity_are_protected_and_the_most_harmful_of_the_rest_pruned():
    perplexity = np.array([[90.0, 20, 20, 20, 20], [20, 20, 20, 80, 70]])
    bias = np.array([[0.0, 0.5, 0.3, 0.4, 0.9], [0.2, 0.6, 0.7, 0.0, 0.1]])
    # int(.3 * 10) = 3 protected: 0, 8, 9, which have the lowest bias of all
    pruned = fasp(perplexity, bias, alpha=0.3, gamma=0.3)
    assert pruned.tolist() == [2, 3, 5]
    assert pruned.dtype == np.int64
    assert fasp(perplexity, bias, alpha=0.3, gamma=0.0).tolist() == [0, 8, 9]
    assert fasp(perplexity, bias, alpha=0.7, gamma=0.3).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert fasp(perplexity, bias, alpha=0.0, gamma=1.0).tolist() == []


def test_ties_are_ranked_by_layer_then_head_and_exactly_k_are_pruned():
    even = np.zeros((4, 5))
    assert fasp(even, even, alpha=0.2, gamma=0.0).tolist() == [0, 1, 2, 3]
    assert fasp(even, even, alpha=0.2, gamma=0.8).tolist() == [0, 1, 2, 3]
    bias = [0.5, 0.1, 0.3, 0.3, 0.3, 0.9, 0.3, 0.9, 0.9, 0.9]
    assert fasp(np.zeros(10), bias, alpha=0.3, gamma=0.0).tolist() == [1, 2, 3]


def test_ties_in_perplexity_protect_the_later_heads():
    perplexity = [5.0, 5, 5, 5]
    assert fasp(perplexity, [3.0, 2, 1, 0], alpha=0.5, gamma=0.5).tolist() == [0, 1]


def test_paper_ties_prunes_every_candidate_tied_with_the_threshold():
    bias = [0.5, 0.1, 0.3, 0.3, 0.3, 0.9, 0.3, 0.9, 0.9, 0.9]
    assert fasp(np.zeros(10), bias, alpha=0.2, gamma=0.0, paper_ties=True).tolist() == [1, 2, 3, 4, 6]
    assert fasp(np.arange(10), bias, alpha=0.2, gamma=0.4, paper_ties=True).tolist() == [1, 2, 3, 4]
    assert fasp(np.zeros(10), bias, alpha=0.1, gamma=0.0, paper_ties=True).tolist() == [1]
    assert fasp(np.zeros(10), bias, alpha=0.0, gamma=0.0, paper_ties=True).tolist() == []


def test_without_ties_both_ways_agree():
    perplexity, bias = np.random.default_rng(6).random((2, 6, 12))
    for alpha in (0.02, 0.1, 0.2, 0.5):
        assert np.array_equal(fasp(perplexity, bias, alpha, 0.3), fasp(perplexity, bias, alpha, 0.3, paper_ties=True))


def test_an_infinite_perplexity_marks_a_catastrophic_head():
    assert fasp([1.0, np.inf, 1, 1], [0.9, 0.0, 0.8, 0.7], alpha=0.25, gamma=0.25).tolist() == [3]


@pytest.mark.parametrize(("perplexity", "bias", "alpha", "gamma", "message"), [
    ([1, 2, 3, 4], [1, 2, 3, 4], 0.6, 0.5, "prune 2 and to protect 2 of 4 heads: their sum may be 1 at most"),
    ([1, 2, 3, 4], [1, 2, 3, 4], 1.5, 0.0, "alpha is 1.5"),
    ([1, 2, 3, 4], [1, 2, 3, 4], 0.1, -1.0, "gamma is -1"),
    ([1, 2, 3], [1, 2], 0.1, 0.1, "perplexity_without has shape"),
    ([1, np.nan], [1, 2], 0.1, 0.1, "perplexity_without holds NaN"),
    ([1, 2], [np.nan, 2], 0.1, 0.1, "bias_without holds NaN"),
    ([], [], 0.1, 0.1, "no heads"),
])
def test_fasp_refuses_what_has_no_meaning(perplexity, bias, alpha, gamma, message):
    with pytest.raises(ExciseError, match=message):
        fasp(perplexity, bias, alpha, gamma)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.7, 0.3), (0.4, 0.6), (0.1, 0.9), (0.3, 0.7), (1, 0), (0.42, 0.58)])
def test_fractions_that_sum_to_one_use_every_head(alpha, gamma):
    assert len(fasp(np.arange(100), np.arange(100), alpha, gamma)) == int(100 * alpha)
