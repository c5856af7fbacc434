"""Claims about where a planted change lies, on changes small enough to square by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from excise.errors import ExciseError
from excise.evaluation.localisation import EnergyShare, energy_share, energy_shares
from excise.interventions.heads import MATRIX_OF, HeadMask
from excise.interventions.weights import WeightMask
from excise.models.specs import load_registry


def change(folder, **matrices):
    """change(folder, q=array): the file of a change of layer 0 whose `up @ down` is the array."""
    factors = {}
    for role, array in matrices.items():
        array = torch.tensor(array, dtype=torch.float32)
        factors[f"0.{role}.up"] = array.half()
        factors[f"0.{role}.down"] = torch.eye(array.shape[1]).half()
    path = folder / "change.safetensors"
    save_file(factors, path)
    return path


def mask(**matrices):
    kind = HeadMask if set(matrices) & set(MATRIX_OF) else WeightMask
    return kind.from_arrays({f"0.{role}": np.array(array, dtype=bool) for role, array in matrices.items()})


Q = [[3, 1], [-2, 0]]  # energies 9, 1, 4, 0
V = [[1, 1]]


def test_the_share_is_the_squared_change_under_the_mask(tmp_path):
    path = change(tmp_path, q=Q, v=V)
    found = energy_share(path, mask(q=[[1, 0], [1, 0]], v=[[0, 1]]))
    assert found.share == pytest.approx((9 + 4 + 1) / 16)
    assert found.chance == pytest.approx((14 * 0.5 + 2 * 0.5) / 16)
    assert found.lift == pytest.approx(14 / 8)
    assert found.density == 0.5
    assert (found.overall, found.chance_overall) == (found.share, found.chance)


def test_matrices_the_mask_does_not_have_count_only_overall(tmp_path):
    found = energy_share(change(tmp_path, q=Q, v=V), mask(q=[[1, 0], [0, 0]], gate=[[1, 1]]))
    assert found.share == pytest.approx(9 / 14)
    assert found.chance == pytest.approx(0.25)
    assert found.overall == pytest.approx(9 / 16)
    assert found.chance_overall == pytest.approx(14 * 0.25 / 16)


def test_factors_are_multiplied(tmp_path):
    save_file({"0.q.up": torch.tensor([[1.0], [2.0]]), "0.q.down": torch.tensor([[3.0, 0.0, 1.0]])}, tmp_path / "c")
    found = energy_share(tmp_path / "c", mask(q=[[0, 1, 1], [1, 0, 0]]))  # squares 9 0 1 / 36 0 4
    assert found.share == pytest.approx((0 + 1 + 36) / 50)


def test_chance_and_deviation_are_those_of_all_masks_of_the_size(tmp_path):
    """Two of the four weights of q and one of the two of v: all 6 x 2 masks, one by one."""
    path = change(tmp_path, q=Q, v=[[1, 2]])
    shares = []
    for pair, single in itertools.product(itertools.combinations(range(4), 2), range(2)):
        q, v = np.zeros(4, dtype=bool), np.zeros(2, dtype=bool)
        q[list(pair)], v[single] = True, True
        found = energy_share(path, mask(q=q.reshape(2, 2), v=v.reshape(1, 2)))
        shares.append(found.share)
    assert found.chance == pytest.approx(np.mean(shares))
    assert found.deviation == pytest.approx(np.std(shares))


def test_a_head_holds_its_rows_of_q_or_its_columns_of_o(tmp_path):
    """Two heads of size 2."""
    q = [[1, 0], [0, 2], [3, 0], [0, 0]]  # heads: 1 + 4, 9 + 0
    o = [[1, 0, 2, 0], [0, 1, 0, 4]]  # heads: 1 + 1, 4 + 16
    path = change(tmp_path, q=q, o=o)
    first = energy_share(path, mask(head_query=[[1, 0]]), heads=2, head_dim=2)
    assert (first.share, first.chance) == pytest.approx((5 / 14, 0.5))
    assert first.deviation == pytest.approx(np.std([5 / 14, 9 / 14]))
    assert first.overall == pytest.approx(5 / (14 + 22))
    second = energy_share(path, mask(head_output=[[0, 1]]), heads=2, head_dim=2)
    assert (second.share, second.lift) == pytest.approx((20 / 22, 40 / 22))


def test_a_mask_beside_the_change_has_no_share_and_an_empty_one_no_lift(tmp_path):
    path = change(tmp_path, q=Q)
    beside = energy_share(path, mask(gate=[[1, 0]]))
    assert math.isnan(beside.share)
    assert math.isnan(beside.lift)
    assert beside.overall == 0
    empty = energy_share(path, mask(q=[[0, 0], [0, 0]]))
    assert (empty.share, empty.chance, empty.deviation) == (0, 0, 0)
    assert math.isnan(empty.lift)


def test_a_random_mask_of_a_shipped_change_stays_within_its_deviation():
    registry, _ = load_registry()
    path = registry["planted-specific"].low_rank
    full = WeightMask.from_arrays({"8.q": np.ones((576, 576), dtype=bool), "9.down": np.ones((576, 1536), dtype=bool)})
    all_of_it = energy_share(path, full)
    assert (all_of_it.share, all_of_it.chance) == pytest.approx((1, 1))
    assert all_of_it.deviation == pytest.approx(0, abs=1e-9)
    tenth = WeightMask.from_arrays({key: np.indices(shape).sum(axis=0) % 10 == 0 for key, shape in full.shapes.items()})
    found = energy_shares(path, [tenth.control(seed).mask for seed in range(8)])
    scores = [(each.share - each.chance) / each.deviation for each in found]
    assert found[0].chance == pytest.approx(0.1, rel=1e-4)
    assert 0.3 < np.std(scores) < 2
    assert np.abs(scores).max() < 4
    assert np.abs(found[0].lift - 1) < 0.1


@pytest.mark.parametrize(
    ("given", "sizes", "message"),
    [
        ({"q": [[1, 0, 0]]}, {}, "belong to different models"),
        ({"head_query": [[1, 0]]}, {}, "give heads and head_dim"),
        ({"head_query": [[1, 0]]}, {"heads": 2, "head_dim": 2}, "does not fit 2 heads of size 2"),
        ({"head_query": [[1, 0, 1]]}, {"heads": 2, "head_dim": 1}, "belong to different models"),
    ],
)
def test_a_mask_of_another_model_is_refused(tmp_path, given, sizes, message):
    with pytest.raises(ExciseError, match=message):
        energy_share(change(tmp_path, q=Q), mask(**given), **sizes)


def test_files_that_are_no_change_are_refused(tmp_path):
    some = mask(q=[[1, 0]])
    with pytest.raises(ExciseError, match="no such file"):
        energy_share(tmp_path / "absent", some)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ExciseError, match="cannot be read as safetensors"):
        energy_share(tmp_path / "text", some)
    save_file({"0.q.up": torch.ones(2, 1)}, tmp_path / "half")
    with pytest.raises(ExciseError, match="q lacks a factor"):
        energy_share(tmp_path / "half", some)
    save_file({"0.q.up": torch.ones(2, 1), "0.q.down": torch.ones(2, 2)}, tmp_path / "odd")
    with pytest.raises(ExciseError, match="q lacks a factor"):
        energy_share(tmp_path / "odd", some)


def test_masks_together_are_what_each_is_alone(tmp_path):
    path = change(tmp_path, q=Q, v=V)
    masks = [mask(q=[[1, 0], [1, 0]], v=[[0, 1]]), mask(q=[[0, 1], [0, 0]]), mask(head_query=[[1]])]
    together = energy_shares(path, masks, heads=1, head_dim=2)
    assert together == [energy_share(path, each, heads=1, head_dim=2) for each in masks]
    assert together[2].share == 1


def test_lift_is_share_over_chance():
    assert EnergyShare(0.3, 0.1, 0.01, 0.2, 0.05, 0.1).lift == pytest.approx(3)
