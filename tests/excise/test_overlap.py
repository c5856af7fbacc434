"""Overlap is the share of one mask inside another, beside the share chance alone would give."""

import math

import numpy as np
import pytest

from excise.errors import ExciseError
from excise.masks import Mask, random_like
from excise.overlap import chance_level, overlap_fraction

SMALL = np.array([[True, True, False, False, False]])
LARGE = np.array([[True, False, True, True, False]])


def as_mask(*arrays: np.ndarray) -> Mask:
    return Mask.from_arrays({f"{layer}.q": array for layer, array in enumerate(arrays)})


def test_the_share_is_of_the_first_mask_so_overlap_is_asymmetric():
    assert overlap_fraction(SMALL, LARGE) == 1 / 2
    assert overlap_fraction(LARGE, SMALL) == 1 / 3
    assert overlap_fraction(LARGE, LARGE) == 1
    assert overlap_fraction(SMALL, ~SMALL) == 0
    assert isinstance(overlap_fraction(SMALL, LARGE), float)


def test_masks_of_several_matrices_are_counted_together():
    assert overlap_fraction(as_mask(SMALL, LARGE), as_mask(LARGE, LARGE)) == (1 + 3) / (2 + 3)
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 7, 13)) < 0.3
    assert overlap_fraction(as_mask(a), as_mask(b)) == overlap_fraction(a, b) == (a & b).sum() / a.sum()


def test_there_is_no_share_of_an_empty_mask():
    empty = np.zeros((1, 5), dtype=bool)
    assert math.isnan(overlap_fraction(empty, LARGE))
    assert math.isnan(overlap_fraction(as_mask(empty), as_mask(LARGE)))
    assert overlap_fraction(LARGE, empty) == 0
    assert math.isnan(overlap_fraction([], []))


def test_zeros_and_ones_are_a_mask_too():
    assert overlap_fraction([1, 1, 0], [1, 0, 0]) == 1 / 2
    assert overlap_fraction(SMALL.astype(float), LARGE) == 1 / 2


@pytest.mark.parametrize(("mask", "reference", "message"), [
    (SMALL, SMALL.T, r"mask has shape \(1, 5\) and reference \(5, 1\)"),
    (as_mask(SMALL), as_mask(SMALL.T), r"0\.q is \(1, 5\) and \(5, 1\)"),
    (as_mask(SMALL), as_mask(SMALL, SMALL), "only one has 1.q"),
    (as_mask(SMALL), SMALL, "two masks or two arrays"),
    ([1, 2, 3], [1, 1, 1], "mask must be a boolean array"),
    ([1.0, 0.0], [1.0, np.nan], "reference must be a boolean array"),
])
def test_masks_that_cannot_be_compared_are_refused(mask, reference, message):
    with pytest.raises(ExciseError, match=message):
        overlap_fraction(mask, reference)


def test_chance_is_the_density_of_the_reference():
    assert chance_level(LARGE) == chance_level(as_mask(LARGE)) == 3 / 5
    assert math.isnan(chance_level([]))
    assert math.isnan(chance_level(Mask({}, {})))


def test_unrelated_masks_overlap_at_the_chance_level():
    rng = np.random.default_rng(1)
    reference = as_mask(rng.random((60, 70)) < 0.2)
    subject = as_mask(rng.random((60, 70)) < 0.1)
    shares = [overlap_fraction(random_like(subject, seed), reference) for seed in range(200)]
    assert abs(np.mean(shares) - chance_level(reference)) < 4 * np.std(shares) / np.sqrt(200)
