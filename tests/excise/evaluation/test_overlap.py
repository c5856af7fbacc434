"""Overlap is the share of one mask inside another, beside the share chance alone would give."""

import math
from itertools import product

import numpy as np
import pytest

from excise.errors import ExciseError
from excise.evaluation import overlap
from excise.evaluation.overlap import chance_level, overlap_fraction, overlap_table
from excise.interventions.packed import Mask, MaskFile
from excise.interventions.weights import WeightMask

SMALL = np.array([[True, True, False, False, False]])
LARGE = np.array([[True, False, True, True, False]])


def as_mask(*arrays: np.ndarray) -> Mask:
    return WeightMask.from_arrays({f"{layer}.q": array for layer, array in enumerate(arrays)})


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


@pytest.mark.parametrize(
    ("mask", "reference", "message"),
    [
        (SMALL, SMALL.T, r"mask has shape \(1, 5\) and reference \(5, 1\)"),
        (as_mask(SMALL), as_mask(SMALL.T), r"0\.q is \(1, 5\) and \(5, 1\)"),
        (as_mask(SMALL), as_mask(SMALL, SMALL), "only one has 1.q"),
        (as_mask(SMALL), SMALL, "two masks or two arrays"),
        ([1, 2, 3], [1, 1, 1], "mask must be a boolean array"),
        ([1.0, 0.0], [1.0, np.nan], "reference must be a boolean array"),
    ],
)
def test_masks_that_cannot_be_compared_are_refused(mask, reference, message):
    with pytest.raises(ExciseError, match=message):
        overlap_fraction(mask, reference)


def test_chance_is_the_density_of_the_reference():
    assert chance_level(LARGE) == chance_level(as_mask(LARGE)) == 3 / 5
    assert math.isnan(chance_level([]))
    assert math.isnan(chance_level(WeightMask({}, {})))


def test_unrelated_masks_overlap_at_the_chance_level():
    rng = np.random.default_rng(1)
    reference = as_mask(rng.random((60, 70)) < 0.2)
    subject = as_mask(rng.random((60, 70)) < 0.1)
    shares = [overlap_fraction(subject.control(seed).mask, reference) for seed in range(200)]
    assert abs(np.mean(shares) - chance_level(reference)) < 4 * np.std(shares) / np.sqrt(200)


# Tables of many masks

FOUR = np.array([[True, True, True, True, False, False, False, False, False, False]])
TWO = np.array([[True, True, False, False, False, False, False, False, False, False]])
FAR = np.array([[False, False, False, False, False, False, False, False, True, True]])
NONE = np.zeros((1, 10), dtype=bool)


def saved(folder, name, mask):
    mask.save(folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def test_a_table_counts_shared_weights_against_the_row_and_against_chance():
    rows, columns = [as_mask(TWO), as_mask(FOUR), as_mask(FAR)], [as_mask(FOUR), as_mask(TWO)]
    table = overlap_table(rows, columns)
    assert table.shared.tolist() == [[2, 2], [4, 2], [0, 0]]
    assert (table.row_counts.tolist(), table.column_counts.tolist(), table.size) == ([2, 4, 2], [4, 2], 10)
    assert table.fraction.tolist() == [[1.0, 1.0], [1.0, 0.5], [0.0, 0.0]]  # TWO lies in FOUR, half of FOUR in TWO
    assert table.chance.tolist() == [0.4, 0.2]
    assert table.excess == pytest.approx(np.array([[0.6, 0.8], [0.6, 0.3], [-0.4, -0.2]]))


def test_a_row_without_weights_has_no_fraction_and_an_empty_column_no_chance_hit():
    table = overlap_table([as_mask(NONE), as_mask(TWO)], [as_mask(FOUR), as_mask(NONE)])
    assert np.isnan(table.fraction).tolist() == [[True, True], [False, False]]
    assert np.isnan(table.excess).tolist() == [[True, True], [False, False]]
    assert table.shared.tolist() == [[0, 0], [2, 0]]
    assert table.chance.tolist() == [0.4, 0.0]


def test_files_and_masks_mix_and_give_what_single_pairs_give(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"0.q": (7, 13), "0.up": (40, 64), "1.q": (3, 3), "10.q": (5, 5), "2.k": (1, 9)}
    masks = [
        WeightMask.from_arrays({key: rng.random(shape) < share for key, shape in shapes.items()})
        for share in (0.1, 0.3, 0.5, 0.9)
    ]
    files = [saved(tmp_path, str(index), mask) for index, mask in enumerate(masks)]
    table = overlap_table([files[0], masks[1], str(files[2])], [masks[3], files[0]])
    for (r, row), (c, column) in product(enumerate(masks[:3]), enumerate((masks[3], masks[0]))):
        assert table.fraction[r, c] == overlap_fraction(row, column)
        assert table.chance[c] == chance_level(column)
    assert table.fraction[0, 1] == 1
    assert table.size == 7 * 13 + 40 * 64 + 9 + 25 + 9


@pytest.mark.parametrize("bytes_at_once", [1 << 9, 3 << 9, 6 << 20])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 1), (2, 6), (7, 3)])
def test_counts_are_exact_whatever_the_sizes(tmp_path, monkeypatch, rows, columns, bytes_at_once):
    # Bits are counted in groups of 512 bytes, 31 groups at a time, and read in pieces that end anywhere in a matrix.
    monkeypatch.setattr(overlap, "_HELD", 0)
    monkeypatch.setattr(overlap, "_LEAST", bytes_at_once)
    sizes = [1, 3, 8, 63, 64, 65, 511 * 8, 512 * 8, 512 * 8 + 5, 513 * 8, 31 * 4096, 32 * 4096 - 1, 65 * 4096 + 77]
    rng = np.random.default_rng(rows)
    shares = [0.0, 1.0, *rng.random(rows + columns - 2)]
    masks = [
        WeightMask.from_arrays({f"{layer}.q": rng.random((1, size)) < share for layer, size in enumerate(sizes)})
        for share in shares
    ]
    files = [saved(tmp_path, str(index), mask) for index, mask in enumerate(masks)]
    packed = np.array([np.concatenate(list(mask.bits.values())) for mask in masks])
    expected = [[np.bitwise_count(a & b).sum(dtype=int) for b in packed[rows:]] for a in packed[:rows]]
    for given in (masks, files, [*files[:1], *masks[1:]]):
        table = overlap_table(given[:rows], given[rows:])
        assert table.shared.tolist() == expected
        ones = np.bitwise_count(packed).sum(axis=1, dtype=int).tolist()
        assert [*table.row_counts, *table.column_counts] == ones
        assert table.size == sum(sizes)


def test_bits_that_lie_apart_in_memory_are_counted_too():
    bits = np.arange(2000, dtype=np.uint8)[::2]
    mask = WeightMask({"0.q": bits}, {"0.q": (100, 80)})
    assert overlap_table([mask], [mask]).shared[0, 0] == np.bitwise_count(bits).sum(dtype=int)


def test_a_file_cut_off_after_it_was_opened_is_refused_by_name(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    whole, cut = (saved(tmp_path, name, as_mask(rng.random((900, 900)) < 0.5)) for name in ("whole", "cut"))
    monkeypatch.setattr(overlap, "_HELD", 1)
    plain = MaskFile.open

    def opened(path):
        file = plain(path)
        if path.name == cut.name:
            cut.write_bytes(cut.read_bytes()[:-100])
        return file

    monkeypatch.setattr(MaskFile, "open", opened)
    with pytest.raises(ExciseError, match=r"cut\.safetensors: cannot be read as a mask \(it ends after \d+ bytes\)"):
        overlap_table([whole], [cut])
    monkeypatch.setattr(MaskFile, "open", lambda path: (plain(path), path.unlink())[0])
    with pytest.raises(ExciseError, match=r"whole\.safetensors: cannot be read as a mask .*No such file"):
        overlap_table([whole], [as_mask(rng.random((900, 900)) < 0.5)])


def test_every_file_is_read_once_though_it_is_row_and_column(tmp_path, monkeypatch):
    file, other = saved(tmp_path, "one", as_mask(TWO, FOUR)), saved(tmp_path, "two", as_mask(FAR, FOUR))
    read = []
    plain = MaskFile.read

    def counting(file, stretches, buffer):
        read.extend((file.path.name, *stretch) for stretch in stretches)
        return plain(file, stretches, buffer)

    monkeypatch.setattr(MaskFile, "read", counting)
    overlap_table([file, other, tmp_path / "." / "one.safetensors"], [other, file])
    bits = [("0.q", 0, 2), ("1.q", 0, 2)]  # ten weights each
    assert sorted(read) == [(f"{name}.safetensors", *stretch) for name in ("one", "two") for stretch in bits]


def test_masks_of_different_matrices_are_refused_by_name(tmp_path):
    file = saved(tmp_path, "one", as_mask(TWO))
    fewer, turned = saved(tmp_path, "two", as_mask(TWO, FOUR)), saved(tmp_path, "turned", as_mask(TWO.T))
    with pytest.raises(ExciseError, match=r"1\.q is absent in .*one\.safetensors and \(1, 10\) in .*two\.safetensors"):
        overlap_table([file], [file, fewer])
    with pytest.raises(ExciseError, match=r"0\.q is \(1, 10\) in .*one\.safetensors and \(10, 1\) in .*turned"):
        overlap_table([file], [turned])
    with pytest.raises(ExciseError, match=r"0\.q is \(1, 10\) in rows\[0\] and \(10, 1\) in columns\[1\]"):
        overlap_table([as_mask(TWO)], [as_mask(FOUR), as_mask(TWO.T)])
    for rows, columns in (([], [file]), ([file], [])):
        with pytest.raises(ExciseError, match="at least one of each"):
            overlap_table(rows, columns)


def test_files_that_are_no_masks_are_refused_by_name(tmp_path):
    from safetensors.numpy import save_file

    whole = saved(tmp_path, "whole", as_mask(FOUR))
    cut, foreign, loose = (tmp_path / f"{name}.safetensors" for name in ("cut", "foreign", "loose"))
    cut.write_bytes(whole.read_bytes()[:-1])
    save_file({"0.q": np.zeros(2, dtype=np.uint8)}, foreign)
    # Ten weights leave six bits of the second byte unused: a weight there would be counted though it does not exist.
    loose.write_bytes(whole.read_bytes()[:-1] + b"\x01")
    for path, message in (
        (tmp_path / "absent.safetensors", "there is no such mask file"),
        (cut, "cannot be read as a mask"),
        (foreign, "is not a mask file of this version"),
        (loose, "cannot be read as a mask .*must be zero"),
    ):
        with pytest.raises(ExciseError, match=f"{path.name}: {message}"):
            overlap_table([whole], [path])
