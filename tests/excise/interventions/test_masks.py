"""A mask is a set of weights: it packs, combines, survives a file, and is taken out of a model and put back exactly."""

import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from excise.errors import ExciseError
from excise.interventions.combining import intersection, leave_one_out, union, votes
from excise.interventions.kinds import load_mask
from excise.interventions.packed import Mask
from excise.interventions.weights import WeightMask

SHAPES = {"0.q": (3, 5), "0.up": (4, 6), "10.down": (6, 4), "2.q": (3, 5)}


def arrays(seed: int, density: float = 0.4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.random(shape) < density for key, shape in SHAPES.items()}


def mask(seed: int, density: float = 0.4) -> Mask:
    return WeightMask.from_arrays(arrays(seed, density))


# Bits


def test_packing_keeps_every_weight():
    given = arrays(0)
    packed = WeightMask.from_arrays(given)
    for key, array in given.items():
        assert np.array_equal(packed.array(key), array)
        assert packed.bits[key].tolist() == np.packbits(array.reshape(-1)).tolist()
    assert packed.counts() == {key: int(array.sum()) for key, array in given.items()}
    assert packed.count == sum(packed.counts().values())
    assert packed.size == 15 + 24 + 24 + 15
    assert packed.density == packed.count / 78


def test_packing_reads_the_logical_order_of_a_transposed_view():
    array = np.random.default_rng(1).random((6, 4)) < 0.5
    assert np.array_equal(WeightMask.from_arrays({"0.q": array.T}).array("0.q"), array.T)


def test_matrices_are_kept_layer_by_layer():
    assert list(mask(0).counts()) == ["0.q", "0.up", "2.q", "10.down"]
    assert list(mask(0).bits) == list(mask(0).shapes)


def test_a_mask_does_not_change_and_its_arrays_are_copies():
    packed = mask(0)
    with pytest.raises(ValueError, match="read-only"):
        packed.bits["0.q"][0] = 0
    packed.array("0.q")[:] = True
    assert packed == mask(0)


def test_a_mask_of_nothing_has_density_zero():
    assert (WeightMask({}, {}).count, WeightMask({}, {}).size, WeightMask({}, {}).density) == (0, 0, 0.0)


def test_masks_are_equal_by_what_they_hold():
    given = arrays(0)
    turned = WeightMask.from_arrays(dict(reversed(given.items())))
    assert turned == mask(0)
    assert (turned.fingerprint, hash(turned)) == (mask(0).fingerprint, hash(mask(0)))
    given["0.q"][0, 0] ^= True
    other = WeightMask.from_arrays(given)
    assert other != mask(0)
    assert other.fingerprint != mask(0).fingerprint
    assert mask(0) != "mask"
    nothing = {
        shape: WeightMask.from_arrays({"0.q": np.zeros(shape, dtype=bool)}).fingerprint for shape in ((2, 4), (4, 2))
    }
    assert nothing[2, 4] != nothing[4, 2]
    assert len(bytes.fromhex(mask(0).fingerprint)) == 8


@pytest.mark.parametrize(
    ("bits", "shapes", "message"),
    [
        ({"0.q": np.zeros(2, np.uint8)}, {}, "only one has 0.q"),
        ({"0.q": np.zeros(3, np.uint8)}, {"0.q": (3, 5)}, "mask of 0.q: 15 weights need 2 packed bytes"),
        ({"0.q": np.zeros(2, np.int64)}, {"0.q": (3, 5)}, "15 weights need 2 packed bytes"),
        ({"0.q": np.array([0, 1], np.uint8)}, {"0.q": (3, 5)}, "bits after the last of 15 weights must be zero"),
        ({"0.q": np.zeros(2, np.uint8)}, {"0.q": (15,)}, "its shape is"),
        ({"0.q": np.zeros(0, np.uint8)}, {"0.q": (0, 5)}, "its shape is"),
    ],
)
def test_bits_and_shapes_fit_together(bits, shapes, message):
    with pytest.raises(ExciseError, match=message):
        WeightMask(bits, shapes)


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros(4, dtype=bool), [[True]]])
def test_a_mask_is_made_of_boolean_matrices(array):
    with pytest.raises(ExciseError, match=r"mask of 0\.q: give a boolean array of two dimensions"):
        WeightMask.from_arrays({"0.q": array})


def test_an_unknown_matrix_is_named():
    with pytest.raises(ExciseError, match=r"no matrix 7\.q"):
        mask(0).array("7.q")


# Arithmetic


def test_and_or_intersection_union_and_votes_are_those_of_sets():
    given = [arrays(seed) for seed in range(5)]
    masks = [WeightMask.from_arrays(one) for one in given]
    for key in SHAPES:
        stack = np.stack([one[key] for one in given])
        assert np.array_equal((masks[0] & masks[1]).array(key), stack[0] & stack[1])
        assert np.array_equal((masks[0] | masks[1]).array(key), stack[0] | stack[1])
        assert np.array_equal(intersection(masks).array(key), stack.all(axis=0))
        assert np.array_equal(union(iter(masks)).array(key), stack.any(axis=0))
        for k in range(1, 6):
            assert np.array_equal(votes(masks, k).array(key), stack.sum(axis=0) >= k)
    assert (votes(masks, 5), votes(masks, 1)) == (intersection(masks), union(masks))
    assert intersection(masks[:1]) == masks[0]


def test_leaving_one_out_gives_the_intersection_of_the_others_by_hand():
    # in all, in all but the first, the second, the third, in the third alone
    rows = ([True, False, True, True, False], [True, True, False, True, False], [True, True, True, False, True])
    masks = [WeightMask.from_arrays({"0.q": np.array([row])}) for row in rows]
    left = [mask.array("0.q")[0].tolist() for mask in leave_one_out(lambda: iter(masks))]
    assert left == [
        [True, True, False, False, False],
        [True, False, True, False, False],
        [True, False, False, True, False],
    ]
    assert [mask.array("0.q")[0].tolist() for mask in masks] == list(rows)


def test_leaving_one_out_of_many_gives_what_the_plain_intersections_give():
    masks = [mask(seed) for seed in range(4)]
    for index, left in enumerate(leave_one_out(lambda: masks)):
        assert left == intersection(masks[:index] + masks[index + 1 :])
    with pytest.raises(ExciseError, match="out of 1 masks leaves none"):
        next(leave_one_out(lambda: masks[:1]))


def test_masks_from_files_are_combined_one_by_one():
    alive, most = weakref.WeakSet(), []

    def reading():
        for seed in range(6):
            read = mask(seed)
            alive.add(read)
            most.append(len(alive))
            yield read
            del read

    for combined in (intersection(reading()), union(reading()), *leave_one_out(reading)):
        assert combined.shapes == SHAPES
    assert max(most) <= 2  # what is read and, at the first, what it is combined with


def test_votes_of_many_masks_do_not_overflow():
    assert votes([mask(0)] * 300, 300) == mask(0)


def test_masks_of_different_models_do_not_combine():
    fewer = WeightMask.from_arrays({key: array for key, array in arrays(0).items() if key != "2.q"})
    turned = WeightMask.from_arrays({key: array.T if key == "0.up" else array for key, array in arrays(0).items()})
    for combine in (Mask.__and__, Mask.__or__, lambda one, other: votes([one, other], 1)):
        with pytest.raises(ExciseError, match=r"only one has 2\.q"):
            combine(mask(0), fewer)
        with pytest.raises(ExciseError, match=r"0\.up is \(4, 6\) and \(6, 4\)"):
            combine(mask(0), turned)
    for nothing in (intersection, union):
        with pytest.raises(ExciseError, match="no masks to combine"):
            nothing([])
    with pytest.raises(ExciseError, match="k is 2: it must be between 1 and the number of masks, 1"):
        votes([mask(0)], 2)


# Files


def test_a_mask_survives_its_file(tmp_path):
    path = tmp_path / "masks" / "one.safetensors"
    mask(0).save(path)
    mask(1).save(path)
    assert load_mask(path) == mask(1)
    assert list(load_mask(path).counts()) == list(mask(1).counts())
    assert [file.name for file in path.parent.iterdir()] == ["one.safetensors"]
    WeightMask({}, {}).save(path)
    assert load_mask(str(path)) == WeightMask({}, {})


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "one.safetensors"
    path.mkdir()
    with pytest.raises(ExciseError, match=r"cannot be written .*directory"):
        mask(0).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]


def test_a_file_that_is_no_mask_is_said(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "one.safetensors"
    with pytest.raises(ExciseError, match="no such mask file"):
        load_mask(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ExciseError, match="cannot be read as a mask"):
        load_mask(path)
    save_file({"0.q": np.zeros(2, np.uint8)}, path)
    with pytest.raises(ExciseError, match="is not a mask file"):
        load_mask(path)
    about = {"format": "excise mask 1", "shapes": '{"0.q": [2, 8]}', "fingerprint": ""}
    for wrong in ({}, {"0.q": np.zeros(3, np.uint8)}, {"0.q": np.zeros(2, np.float32)}):
        save_file(wrong, path, metadata=about)
        with pytest.raises(ExciseError, match="cannot be read as a mask"):
            load_mask(path)
    mask(0).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0b1000_0000
    path.write_bytes(content)
    with pytest.raises(ExciseError, match="changed after"):
        load_mask(path)


# The random control


@pytest.mark.parametrize("density", [0.0, 0.01, 0.4, 0.9, 1.0])
def test_a_random_mask_has_the_same_count_in_every_matrix(density):
    control = mask(0, density).control(seed=3).mask
    assert control.counts() == mask(0, density).counts()
    assert control.shapes == mask(0).shapes


def test_a_random_mask_depends_on_its_seed_and_nothing_else():
    original = mask(0)
    assert original.control(1).mask == original.control(1).mask
    assert original.control(1).mask != original.control(2).mask
    alone = WeightMask.from_arrays({"2.q": original.array("2.q")})
    assert np.array_equal(alone.control(1).mask.array("2.q"), original.control(1).mask.array("2.q"))
    assert not np.array_equal(
        *(WeightMask.from_arrays({key: np.eye(40, dtype=bool)}).control(1).mask.array(key) for key in ("0.q", "0.k"))
    )


def test_every_weight_is_equally_likely_to_be_drawn():
    half = np.zeros((4, 5), dtype=bool)
    half.reshape(-1)[:6] = True
    draws = [WeightMask.from_arrays({"0.q": half}).control(seed).mask.array("0.q") for seed in range(4000)]
    share = np.mean(draws, axis=0)
    assert np.abs(share - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 4000)
    together = np.mean([draw[0, 0] & draw[3, 4] for draw in draws])
    assert abs(together - 6 * 5 / (20 * 19)) < 5 * np.sqrt(0.079 * 0.921 / 4000)


def test_the_draw_of_a_seed_is_the_same_on_every_machine():
    one = np.zeros((8, 16), dtype=bool)
    one.reshape(-1)[:5] = True
    control = WeightMask.from_arrays({"0.q": one}).control(7).mask
    assert np.flatnonzero(control.array("0.q")).tolist() == [0, 89, 101, 110, 127]


# Pruning a model


@dataclass(frozen=True)
class Matrix:
    """A matrix of the model below: `view` picks its weights in logical order."""

    key: str
    out_features: int
    in_features: int
    view: object

    def weight(self, model: torch.nn.Module) -> torch.Tensor:
        return self.view(model)


@dataclass(frozen=True)
class Topology:
    linears: tuple[Matrix, ...]


@dataclass(frozen=True)
class Loaded:
    model: torch.nn.Module
    topology: Topology


def loaded(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Loaded:
    """A plain linear, a transposed one, and heads' queries that lie strided inside a fused matrix."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"plain": torch.nn.Linear(5, 3), "transposed": torch.nn.Linear(4, 6), "fused": torch.nn.Linear(6, 3 * 8)}
    )
    model["plain"].weight.data[0, 0] = -0.0
    model["plain"].weight.data[0, 1] = torch.nan
    return Loaded(
        model.to(device, dtype),
        Topology(
            (
                Matrix("0.q", 3, 5, lambda m: m["plain"].weight),
                Matrix("0.up", 4, 6, lambda m: m["transposed"].weight.t()),
                # four heads of [q k v] x 2 rows: the queries of all heads are [4, 2, 6]
                Matrix("1.q", 8, 6, lambda m: m["fused"].weight.view(4, 3, 2, 6)[:, 0]),
                Matrix("1.k", 8, 6, lambda m: m["fused"].weight.view(4, 3, 2, 6)[:, 1]),
            )
        ),
    )


def mask_for(target: Loaded, seed: int, density: float = 0.4) -> Mask:
    rng = np.random.default_rng(seed)
    shapes = {matrix.key: (matrix.out_features, matrix.in_features) for matrix in target.topology.linears}
    return WeightMask.from_arrays({key: rng.random(shape) < density for key, shape in shapes.items()})


def state(target: Loaded) -> dict[str, bytes]:
    return {
        name: tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in target.model.state_dict().items()
    }


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inside_the_context_exactly_the_mask_s_weights_are_zero_and_after_it_all_are_back(dtype, device):
    target = loaded(dtype, device)
    chosen = mask_for(target, 0)
    before = state(target)
    weights = {m.key: m.weight(target.model).detach().cpu().clone() for m in target.topology.linears}
    with chosen.applied(target) as inside:
        assert inside is target
        for matrix in target.topology.linears:
            where = torch.from_numpy(chosen.array(matrix.key)).reshape(weights[matrix.key].shape)
            expected = weights[matrix.key].masked_fill(where, 0)
            assert torch.equal(matrix.weight(target.model).cpu().nan_to_num(7), expected.nan_to_num(7))
        assert state(target) != before
    assert state(target) == before


def test_a_strided_view_is_pruned_in_place_and_its_neighbours_are_not():
    target = loaded()
    values = target.model["fused"].weight.detach().clone().view(4, 3, 2, 6)
    with WeightMask.from_arrays({"1.q": np.ones((8, 6), dtype=bool)}).applied(target):
        now = target.model["fused"].weight.view(4, 3, 2, 6)
        assert not now[:, 0].any()
        assert torch.equal(now[:, 1:], values[:, 1:])


def test_the_model_s_output_changes_and_comes_back():
    target = loaded()
    x = torch.ones(4)
    before = target.model["transposed"](x)
    with WeightMask.from_arrays({"0.up": np.ones((4, 6), dtype=bool)}).applied(target):
        assert torch.equal(target.model["transposed"](x), target.model["transposed"].bias)
    assert torch.equal(target.model["transposed"](x), before)


def test_weights_come_back_after_an_exception():
    target = loaded()
    before = state(target)
    with pytest.raises(KeyError), mask_for(target, 1).applied(target):
        raise KeyError("the run was stopped")
    assert state(target) == before


def test_weights_come_back_when_pruning_fails_half_way():
    target = loaded()
    before = state(target)
    calls = []

    def fails_at_last(model):
        calls.append(model)
        if len(calls) == 2:  # the first call is the check of the shape
            raise RuntimeError("out of memory")
        return model["fused"].weight.view(4, 3, 2, 6)[:, 1]

    failing = Loaded(target.model, Topology((*target.topology.linears[:3], Matrix("1.k", 8, 6, fails_at_last))))
    with pytest.raises(RuntimeError, match="out of memory"), mask_for(target, 1).applied(failing):
        pass
    assert len(calls) == 2
    assert state(target) == before


def test_contexts_nest():
    target = loaded()
    first, second = mask_for(target, 1), mask_for(target, 2)
    before = state(target)
    with first.applied(target):
        outer = state(target)
        with second.applied(target):
            inner = state(target)
        assert state(target) == outer
        with first.applied(target):
            assert state(target) == outer
    assert state(target) == before
    with (first | second).applied(target):
        assert state(target) == inner


def test_matrices_that_share_their_memory_come_back():
    target = loaded()
    shared = Loaded(
        target.model, Topology((target.topology.linears[0], Matrix("1.q", 3, 5, lambda m: m["plain"].weight)))
    )
    before = state(target)
    with WeightMask.from_arrays({key: np.ones((3, 5), dtype=bool) for key in ("0.q", "1.q")}).applied(shared):
        pass
    assert state(target) == before


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("5.q", (3, 5), "matrix 5.q is not in the model"),
        ("1.q", (6, 8), r"matrix 1.q has shape \(6, 8\), the model's \(8, 6\)"),
    ],
)
def test_a_mask_of_another_model_is_refused_before_anything_changes(key, shape, message):
    target = loaded()
    before = state(target)
    wrong = WeightMask.from_arrays({"0.q": np.ones((3, 5), dtype=bool), key: np.ones(shape, dtype=bool)})
    with pytest.raises(ExciseError, match=message), wrong.applied(target):
        pass
    assert state(target) == before


def test_gradients_are_not_in_the_way():
    target = loaded()
    with mask_for(target, 0).applied(target):
        target.model["transposed"](torch.ones(4)).sum().backward()
    assert target.model["transposed"].weight.grad is not None
    with torch.inference_mode(), mask_for(target, 0).applied(target):
        pass
