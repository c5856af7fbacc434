"""A score whose computation was stopped goes on from its last batch, and comes out bit for bit the same."""

import math
import os

import numpy as np
import pytest
import torch

from excise.attribution import gradients
from excise.attribution.attention import attention_to_name
from excise.attribution.gap_gradient import gap_gradient
from excise.attribution.snip import snip
from excise.attribution.wanda import input_norms
from excise.errors import ExciseError
from excise.files import parts
from excise.files.parts import Parts, Work
from excise.generation.sampling import SamplingParameters
from excise.generation.tree import answer_tree, common_prefix
from excise.models.encoding import encode

PARAMETERS = SamplingParameters(temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=3)
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
ANSWERS = [((30, 31), 1), ((30, 32), None), ((33, 34), 1)]
WEIGHTS = np.array([[1.0, 0.5], [-0.5, 0.25], [0.25, 0.25]])


def score(name, model, prompts, progress=lambda *told: None, own=None) -> dict[str, np.ndarray]:
    """One score of five prompts, two at a time, as arrays by name."""
    encoded = encode(model, prompts)[:5]
    length = min(common_prefix([prompt.tokens for prompt in encoded]), *(prompt.name[0] for prompt in encoded))
    trunk = encoded[0].tokens[:length]
    trees = [
        answer_tree(prompt.tokens[length:], ANSWERS, np.abs(WEIGHTS) if name != "gap_gradient" else WEIGHTS)
        for prompt in encoded
    ]
    options = {"work": Work(progress=progress, parts=own or Parts(), batch=2)}
    if name == "wanda":
        found = input_norms(model, trunk, trees, np.array([8.0, 5.0]), **options)
        return {str(place): norms for place, norms in found.items()}
    if name == "attention":
        names = [(prompt.name[0] - length, prompt.name[1] - length) for prompt in encoded]
        return attention_to_name(model, trunk, trees, names, **options)
    if name == "snip":
        answers = [(prompt.tokens[length:], (*tokens, 1)) for prompt in encoded for tokens, _ in ANSWERS[:1]]
        return dict(snip(model, trunk, answers, np.tile(np.abs(WEIGHTS[:1]), (5, 1)), roles=ROLES, **options))
    found = gap_gradient(model, trunk, trees, PARAMETERS, keep=0.1, seed=0, **options)
    arrays = {"damping": np.array(found.damping)}
    for key, each in found.candidates.items():
        arrays |= {f"{key} index": each.index, f"{key} drop": each.drop, f"{key} harm": each.harm}
    return arrays


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def always_written(monkeypatch):
    monkeypatch.setattr(parts, "SHARE", math.inf)


@pytest.mark.parametrize("layers", ["every layer at once", "a layer at a time"])
@pytest.mark.parametrize("name", ["wanda", "attention", "snip", "gap_gradient"])
def test_a_stopped_score_goes_on_from_its_last_batch(loaded, prompts, tmp_path, monkeypatch, name, layers):
    if layers == "a layer at a time":
        monkeypatch.setattr(gradients, "ACCUMULATOR_BYTES", 1)
    model = loaded("llama")
    undisturbed: list[tuple[int, int]] = []
    wanted = score(name, model, prompts, lambda label, done, total: undisturbed.append((done, total)))
    assert undisturbed[0][0] == 0
    assert undisturbed[-1][0] == undisturbed[-1][1]
    folder = tmp_path / "score.parts"
    begun, tries = [], 0
    while True:
        told: list[int] = []

        def stop_behind_a_batch(label, done, total, told=told):
            told.append(done)
            if done > told[0]:
                raise Stopped

        try:
            found = score(name, model, prompts, stop_behind_a_batch, Parts(folder))
            break
        except Stopped:
            tries += 1
            begun.append(told[0])
    # Each try did one batch more than the one before, none of them twice.
    assert begun == sorted({done for done, _ in undisturbed})[:-1]
    assert found.keys() == wanted.keys()
    for key, numbers in wanted.items():
        assert np.array_equal(found[key], numbers), key
    assert list(folder.iterdir())
    Parts(folder).clear()
    assert not folder.exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_blocks_of_layers_change_no_score(loaded, prompts, architecture, monkeypatch):
    """Fused and interleaved matrices too: the layers whose gradients are held together are a matter of memory alone."""
    model = loaded(architecture)
    wanted = score("gap_gradient", model, prompts)
    monkeypatch.setattr(gradients, "ACCUMULATOR_BYTES", 1)
    seen = []
    found = score("gap_gradient", model, prompts, lambda label, done, total: seen.append(total))
    assert set(seen) == {5 * model.topology.layers}
    assert found.keys() == wanted.keys()
    for key, numbers in wanted.items():
        assert (
            np.array_equal(found[key], numbers)
            if key.endswith("index")
            else np.allclose(found[key], numbers, rtol=1e-4, atol=1e-9)
        ), key


def test_two_at_the_same_parts_do_not_disturb_each_other(loaded, prompts, tmp_path):
    """The other one finishes, and removes the parts, while this one is in the middle."""
    model = loaded("gpt2")
    wanted = score("wanda", model, prompts)
    folder = tmp_path / "score.parts"

    def other_one(label, done, total):
        if done == 2:
            assert Parts(folder).begun("norms")[0] == 2
            Parts(folder).clear()

    found = score("wanda", model, prompts, other_one, Parts(folder))
    for key, numbers in wanted.items():
        assert np.array_equal(found[key], numbers), key


def test_large_states_are_written_rarely_and_small_ones_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SHARE", 0.05)
    now = [0.0]
    own = Parts(tmp_path / "parts", clock=lambda: now[0])
    state = {"sums": torch.zeros(1 << 20, dtype=torch.float64)}  # 8 MiB take 17 ms to write: every third of a second
    assert own.begun("part") == (0, {})
    now[0] += 0.2
    own.keep("part", 1, state)
    assert own.begun("part") == (0, {})
    now[0] += 0.5
    own.keep("part", 2, state)
    done, found = own.begun("part")
    assert done == 2
    assert found.keys() == {"sums"}
    own.keep("part", 3, {"sums": torch.ones(0)})
    assert own.begun("part")[0] == 3


def test_a_finished_part_has_no_state(tmp_path):
    own = Parts(tmp_path / "parts")
    own.keep("part", 1, {"sums": torch.ones(3)})
    assert own.finished("part") is None
    own.finish("part", {"scores": np.arange(3)})
    assert own.finished("part")["scores"].tolist() == [0, 1, 2]
    assert own.begun("part") == (0, {})
    assert os.listdir(tmp_path / "parts") == ["part.safetensors"]


def test_without_a_folder_nothing_is_kept():
    own = Parts()
    own.keep("part", 1, {"sums": torch.ones(3)})
    own.finish("part", {"scores": np.arange(3)})
    own.clear()
    assert own.begun("part") == (0, {})
    assert own.finished("part") is None


def test_a_damaged_part_and_a_full_disk_are_said(tmp_path):
    own = Parts(tmp_path / "parts")
    own.finish("part", {"scores": np.arange(3)})
    (tmp_path / "parts" / "part.safetensors").write_bytes(b"nothing")
    with pytest.raises(ExciseError, match=r"part\.safetensors: is damaged .*; delete this file"):
        own.finished("part")
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(ExciseError, match="cannot be written"):
        Parts(tmp_path / "taken").finish("part", {"scores": np.arange(3)})
