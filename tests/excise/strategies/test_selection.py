"""Selections take exact counts, break ties by place, and reproduce the papers' rules."""

import tracemalloc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from excise.errors import ExciseError
from excise.strategies import selection
from excise.strategies.selection import (
    fasp,
    pooled_band,
    set_difference,
    set_difference_by_count,
    set_difference_of_count,
    top,
    top_of_stream,
)


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


@pytest.mark.parametrize(
    ("minority", "majority", "tau_min", "tau_maj", "message"),
    [
        ([1, 2], [1, 2, 3], 0.5, 0.5, r"shape \(2,\) and majority_scores \(3,\)"),
        ([1, 2], [1, 2], 1.01, 0.5, "tau_min is 1.01: it is a fraction between 0 and 1"),
        ([1, 2], [1, 2], 0.5, -0.1, "tau_maj is -0.1"),
        ([1, 2], [1, 2], np.nan, 0.5, "tau_min is nan"),
        ([1, np.nan], [1, 2], 0.5, 0.5, "minority_scores holds NaN"),
        ([1, 2], [1, np.nan], 0.0, 0.0, "majority_scores holds NaN"),
        (["a", "b"], [1, 2], 0.5, 0.5, "minority_scores must hold real numbers"),
    ],
)
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


# scopes


def test_the_set_difference_of_rows_by_hand():
    minority = np.array([[9, 8, 7, 6, 5], [1, 5, 5, 5, 0]])
    majority = np.array([[9, 0, 8, 1, 7], [2, 2, 2, 2, 9]])
    # int(.5 * 5) = 2 of each row for the minority, places 0, 1 and (ties) 1, 2;
    # int(.3 * 5) = 1 of each row for the majority, places 0 and 4.
    chosen = set_difference(minority, majority, 0.5, 0.3, scope="row")
    assert chosen.tolist() == [[False, True, False, False, False], [False, True, True, False, False]]
    whole = set_difference(minority, majority, 0.5, 0.3)  # 9 8 7 6 5 of the first row, less places (1, 4), 0 and 2
    assert whole.tolist() == [[False, True, False, True, True], [False] * 5]
    assert np.array_equal(set_difference(minority, majority, 0.5, 0.3, scope="matrix"), whole)


def test_a_row_of_large_scores_does_not_crowd_out_the_others():
    scores = (1 + np.random.default_rng(7).random((6, 40))) * 10.0 ** np.arange(6)[:, None]
    assert set_difference(scores, scores, 0.5, 0.0).sum(axis=1).tolist() == [0, 0, 0, 40, 40, 40]
    assert set_difference(scores, scores, 0.5, 0.2, scope="row").sum(axis=1).tolist() == [12] * 6


TIED = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 4).map(np.float32))


@given(TIED, st.floats(0, 1), st.floats(0, 1), st.randoms())
@settings(max_examples=80, deadline=None)
def test_the_set_difference_of_rows_is_that_of_each_row_by_a_full_sort(minority, tau_min, tau_maj, random):
    majority = np.array(random.sample(minority.reshape(-1).tolist(), minority.size)).reshape(minority.shape)
    chosen = set_difference(minority, majority, tau_min, tau_maj, scope="row")
    size = minority.shape[1]
    for own, a, b in zip(chosen, minority, majority, strict=True):
        assert np.array_equal(own, ranked(a, int(tau_min * size)) & ~ranked(b, int(tau_maj * size)))
        assert np.array_equal(own, set_difference(a, b, tau_min, tau_maj))


def test_rows_of_nothing_and_the_ends_of_the_thresholds():
    a, b = np.random.default_rng(8).random((2, 6, 7))
    assert set_difference(a, b, 1, 0, scope="row").all()
    assert not set_difference(a, b, 0, 0, scope="row").any()
    assert not set_difference(a, b, 1, 1, scope="row").any()
    for shape in ((0, 3), (3, 0)):
        assert set_difference(np.zeros(shape), np.zeros(shape), 0.4, 0.35, scope="row").shape == shape


def test_a_scope_is_one_of_those_there_are():
    with pytest.raises(ExciseError, match="scope is 'global': it must be one of matrix, row"):
        set_difference(np.zeros((2, 2)), np.zeros((2, 2)), 0.4, 0.3, scope="global")
    with pytest.raises(ExciseError, match=r"the scores have shape \(4,\)"):
        set_difference(np.zeros(4), np.zeros(4), 0.4, 0.3, scope="row")


# counts


def test_the_set_difference_by_count_by_hand():
    minority = np.array([[0.9, 0.1], [0.8, 0.7], [0.2, 0.7]])  # layers x heads
    majority = np.array([[0.9, 0.1], [0.1, 0.8], [0.3, 0.2]])
    assert set_difference_by_count(minority, majority, 3, 1).tolist() == [[False, False], [True, True], [False, False]]
    assert set_difference_by_count(minority, majority, 4, 2).tolist() == [[False, False], [True, False], [False, True]]
    assert set_difference_by_count(minority, majority, 6, 0).all()
    assert not set_difference_by_count(minority, majority, 0, 0).any()


@given(TIED, st.data())
@settings(max_examples=60, deadline=None)
def test_the_set_difference_by_count_is_that_of_a_full_sort(minority, data):
    majority = data.draw(arrays(np.float32, minority.shape, elements=st.integers(0, 4).map(np.float32)))
    k_min, k_maj = data.draw(st.tuples(*[st.integers(0, minority.size)] * 2))
    chosen = set_difference_by_count(minority, majority, k_min, k_maj)
    assert np.array_equal(chosen, ranked(minority, k_min) & ~ranked(majority, k_maj))


@pytest.mark.parametrize(
    ("k_min", "k_maj", "message"),
    [
        (5, 0, "k_min is 5: it must be a whole number between 0 and the 4 entries"),
        (1, -1, "k_maj is -1"),
        (0.4, 1, "k_min is 0.4"),
        (2, True, "k_maj is True"),
    ],
)
def test_counts_lie_between_none_and_all(k_min, k_maj, message):
    with pytest.raises(ExciseError, match=message):
        set_difference_by_count(np.zeros((2, 2)), np.zeros((2, 2)), k_min, k_maj)


# controls


def test_the_pooled_band_is_the_band_of_ranks():
    scores = np.array([[3, 9, 1], [7, 5, 7]])
    assert pooled_band(scores, 1, 2).tolist() == [[False, False, False], [True, False, True]]
    assert pooled_band(scores, 2, 2).tolist() == [[False, False, False], [False, True, True]]
    assert not pooled_band(scores, 6, 0).any()
    with pytest.raises(ExciseError, match="band of 2 entries from rank 5"):
        pooled_band(scores, 5, 2)


# one ranking over many arrays


def in_one_ranking(arrays: dict[str, np.ndarray], count: int) -> dict[str, list]:
    """The plain way: all scores in one array, sorted."""
    together = ranked(np.concatenate([np.zeros(0), *(array.reshape(-1) for array in arrays.values())]), count)
    pieces = np.split(together, np.cumsum([array.size for array in arrays.values()])[:-1])
    return {key: piece.reshape(arrays[key].shape).tolist() for key, piece in zip(arrays, pieces, strict=True)}


def of_stream(arrays: dict[str, np.ndarray], count: int) -> dict[str, list]:
    return {key: chosen.tolist() for key, chosen in top_of_stream(lambda: iter(arrays.items()), count)}


def test_the_top_of_a_stream_by_hand():
    a, b = np.array([[3, 1], [2, 3]], dtype=np.float32), np.array([3, 5, 2], dtype=np.float32)
    # 5 first, then the threes in their order
    assert of_stream({"a": a, "b": b}, 3) == {"a": [[True, False], [False, True]], "b": [False, True, False]}
    assert of_stream({"b": b, "a": a}, 3) == {"b": [True, True, False], "a": [[True, False], [False, False]]}
    assert of_stream({"a": a, "b": b}, 0) == {"a": [[False, False], [False, False]], "b": [False, False, False]}
    assert of_stream({"a": a, "b": b}, 7) == {"a": [[True, True], [True, True]], "b": [True, True, True]}
    assert of_stream({}, 0) == {}


EDGES = [0.0, -0.0, 1e-45, 1e-38, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), 1.5, 3e38, np.inf]
STREAMS = st.lists(
    arrays(
        np.float32,
        array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=6),
        elements=st.sampled_from(EDGES) | st.floats(0, 1, width=32),
    ),
    min_size=1,
    max_size=4,
)


@given(STREAMS, st.data())
@settings(max_examples=150, deadline=None)
def test_the_top_of_a_stream_is_that_of_a_full_sort(parts, data):
    """Numbers whose bits differ only in their lower half, subnormal ones, both zeros and infinity included."""
    named = {f"{number}.q": array for number, array in enumerate(parts)}
    count = data.draw(st.integers(0, sum(array.size for array in parts)))
    assert of_stream(named, count) == in_one_ranking(named, count)


def test_the_top_of_a_stream_reads_large_arrays_in_blocks(monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK", 7)
    rng = np.random.default_rng(5)
    named = {"0.q": rng.integers(0, 5, (4, 6)).astype(np.float32), "0.k": rng.random((6, 5)).astype(np.float32).T}
    for count in range(55):
        assert of_stream(named, count) == in_one_ranking(named, count)


def test_one_array_of_a_stream_is_there_at_a_time():
    living: list[weakref.ref] = []

    def made(seed: int) -> np.ndarray:
        assert not any(each() is not None for each in living), "the array before is still held"
        array = np.random.default_rng(seed).random((50, 40)).astype(np.float32)
        living.append(weakref.ref(array))
        return array

    total = 0
    for key, chosen in top_of_stream(lambda: ((f"{seed}.q", made(seed)) for seed in range(6)), 3000):
        assert not any(each() is not None for each in living), f"{key} is held beside its mask"
        total += chosen.sum()
    assert total == 3000
    assert len(living) == 18


def test_memory_of_a_stream_does_not_grow_with_it():
    def peak(arrays_of_a_megabyte: int) -> int:
        def parts():
            for seed in range(arrays_of_a_megabyte):
                yield str(seed), np.random.default_rng(seed).random(1 << 18, dtype=np.float32)

        tracemalloc.start()
        for _ in top_of_stream(parts, 1000):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(16) < peak(2) + (1 << 19)


@pytest.mark.parametrize(
    ("array", "count", "message"),
    [
        (np.zeros(3, dtype=np.float32), 4, "count is 4: it must be a whole number between 0 and the 3 entries"),
        (np.zeros(3, dtype=np.float32), -1, "count is -1"),
        (np.zeros(3, dtype=np.float32), 1.0, "count is 1.0"),
        (np.array([0, np.nan], dtype=np.float32), 1, "scores of a holds NaN"),
        (np.array([0, -np.nan], dtype=np.float32), 1, "scores of a holds NaN"),
        (np.array([0, -1], dtype=np.float32), 1, "scores of a holds negative scores"),
        (np.zeros(3), 1, "scores of a must be an array of float32, but are float64"),
    ],
)
def test_a_stream_refuses_what_it_cannot_rank(array, count, message):
    with pytest.raises(ExciseError, match=message):
        top_of_stream(lambda: [("a", array)], count)


def test_a_stream_that_changes_between_passes_is_noticed():
    rng = np.random.default_rng(9)
    with pytest.raises(ExciseError, match="did not give the same scores at each call"):
        list(top_of_stream(lambda: [("a", rng.random(1000, dtype=np.float32))], 500))


# fairness-aware heads


@pytest.mark.parametrize(
    ("heads", "pruned"),
    [
        (72, [0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 14]),
        (144, [0, 2, 5, 8, 11, 14, 17, 20, 23, 25, 28]),
        (1024, [0, 20, 40, 61, 81, 102, 122, 143, 163, 184, 204]),
    ],
)
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


@pytest.mark.trial(17)
def test_paper_ties_takes_ties_at_both_thresholds():
    # ten heads, gamma .3: candidates are those at or below the 7th lowest perplexity, 20, which are nine
    perplexity = [20.0, 20, 20, 20, 20, 20, 20, 20, 20, 90]
    bias = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4, 0.1, 0.4, 0.0]
    assert fasp(perplexity, bias, alpha=0.1, gamma=0.3, paper_ties=True).tolist() == [7]
    assert fasp(perplexity, bias, alpha=0.2, gamma=0.3, paper_ties=True).tolist() == [5, 6, 7, 8]
    # exactly so many without it: seven candidates, the first ones, and the one with the lowest bias among them
    assert fasp(perplexity, bias, alpha=0.1, gamma=0.3).tolist() == [5]
    assert fasp(perplexity, bias, alpha=0.2, gamma=0.3).tolist() == [5, 6]
    assert fasp(perplexity, bias, alpha=0.0, gamma=0.3, paper_ties=True).tolist() == []
    assert fasp(perplexity, bias, alpha=0.0, gamma=1.0, paper_ties=True).tolist() == []
    # nothing is protected where every perplexity is the same
    assert fasp([20.0] * 10, bias, alpha=0.1, gamma=0.9, paper_ties=True).tolist() == [9]


@pytest.mark.trial(17)
def test_paper_ties_is_the_rule_written_out():
    """A model such as GPT-J, whose 448 heads have sixteen different perplexities."""
    rng = np.random.default_rng(8)
    perplexity = rng.integers(0, 16, (28, 16)) / 8 + 10.0
    bias = np.round(rng.random((28, 16)), 2)
    more = 0
    for alpha in (0.02, 0.04, 0.1, 0.2):
        for gamma in (0.0, 0.2, 0.3, 0.7):
            flat, kept = bias.ravel(), 448 - int(448 * gamma)
            candidates = perplexity.ravel() <= np.sort(perplexity.ravel())[kept - 1]
            threshold = np.sort(flat[candidates])[int(448 * alpha) - 1]
            expected = np.flatnonzero(candidates & (flat <= threshold))
            assert fasp(perplexity, bias, alpha, gamma, paper_ties=True).tolist() == expected.tolist()
            assert len(fasp(perplexity, bias, alpha, gamma)) == int(448 * alpha)
            more += candidates.sum() > kept
    assert more >= 8


@pytest.mark.trial(17)
@pytest.mark.parametrize(
    ("heads", "alpha", "gamma", "pruned"),
    [
        (10, 0.3, 0.3, 3),
        (100, 0.29, 0.0, 29),
        (100, 0.57, 0.29, 57),
        (50, 0.58, 0.42, 29),
        (1000, 0.001, 0.999, 1),
    ],
)
def test_fractions_are_the_decimals_they_stand_for(heads, alpha, gamma, pruned):
    scores = np.random.default_rng(1).random((2, heads))
    assert len(fasp(*scores, alpha, gamma)) == len(fasp(*scores, alpha, gamma, paper_ties=True)) == pruned


def test_without_ties_both_ways_agree():
    perplexity, bias = np.random.default_rng(6).random((2, 6, 12))
    for alpha in (0.02, 0.1, 0.2, 0.5):
        assert np.array_equal(fasp(perplexity, bias, alpha, 0.3), fasp(perplexity, bias, alpha, 0.3, paper_ties=True))


def test_an_infinite_perplexity_marks_a_catastrophic_head():
    assert fasp([1.0, np.inf, 1, 1], [0.9, 0.0, 0.8, 0.7], alpha=0.25, gamma=0.25).tolist() == [3]


@pytest.mark.parametrize(
    ("perplexity", "bias", "alpha", "gamma", "message"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.6, 0.5, "prune 2 and to protect 2 of 4 heads: their sum may be 1 at most"),
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.5, 0.0, "alpha is 1.5"),
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.1, -1.0, "gamma is -1"),
        ([1, 2, 3], [1, 2], 0.1, 0.1, "perplexity_without has shape"),
        ([1, np.nan], [1, 2], 0.1, 0.1, "perplexity_without holds NaN"),
        ([1, 2], [np.nan, 2], 0.1, 0.1, "bias_without holds NaN"),
        ([], [], 0.1, 0.1, "no heads"),
    ],
)
def test_fasp_refuses_what_has_no_meaning(perplexity, bias, alpha, gamma, message):
    with pytest.raises(ExciseError, match=message):
        fasp(perplexity, bias, alpha, gamma)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.7, 0.3), (0.4, 0.6), (0.1, 0.9), (0.3, 0.7), (1, 0), (0.42, 0.58)])
def test_fractions_that_sum_to_one_use_every_head(alpha, gamma):
    assert len(fasp(np.arange(100), np.arange(100), alpha, gamma)) == int(100 * alpha)
