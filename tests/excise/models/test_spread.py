"""A model too large for one card works as it does on one: spread over several, or partly kept in main memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from excise.errors import ExciseError
from excise.models.placement import placement
from tests.excise.conftest import ARCHITECTURES

ROOT = Path(__file__).parents[3]
CONFIG = transformers.LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    tie_word_embeddings=False,
)
LAYER = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
SIZE = 8 * LAYER + 2 * 512 * 64 + 64
"""Weights."""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cards", "offloaded"])
def test_a_spread_model_does_all_that_a_model_on_one_device_does(tiny_model, how):
    """In a process of its own, as cards that are none are registered for good (`cards`). They have no float64, as Apple
    GPUs have none."""
    folders = [str(tiny_model(architecture)) for architecture in ARCHITECTURES]
    # The loader's threads know nothing of such cards.
    environment = os.environ | {"HF_DEACTIVATE_ASYNC_LOAD": "1", "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-m", "tests.excise.models.spread", how, *folders],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    places = [line for line in lines if "places" in line]
    assert len(places) == len(ARCHITECTURES)
    wanted = {"cards": (["cards:0", "cards:1"], "cards:0"), "offloaded": (["meta"], "cpu")}[how]
    assert all((line["places"], line["device"]) == wanted for line in places), places
    if how == "cards":
        assert all(line["devices"] == ["cards:0", "cards:1"] for line in places)
    work = [line for line in lines if "work" in line]
    assert len(work) == (1 + 12 * len(ARCHITECTURES) if how == "cards" else 16 * len(ARCHITECTURES))
    assert [line for line in work if not line["apart"] < 1e-4] == []


def test_a_model_goes_to_the_first_card_with_room_for_all_of_it():
    size = 4 * SIZE / 0.8
    free = {0: int(0.9 * size), 1: int(1.1 * size), 2: int(2 * size), "cpu": 1 << 40}
    assert placement(CONFIG, torch.float32, free) == {"": 1}
    assert placement(CONFIG, torch.bfloat16, free) == {"": 0}


def test_a_larger_model_is_spread_evenly_over_the_cards():
    free = {0: int(4 * SIZE * 0.9), 1: int(4 * SIZE * 0.9), "cpu": 1 << 40}
    found = placement(CONFIG, torch.float32, free)
    assert set(found.values()) == {0, 1}
    layers = [found[f"model.layers.{layer}"] for layer in range(8)]
    assert layers == sorted(layers)  # in order, so that states move once
    assert 3 <= layers.count(0) <= 5
    assert found["model.embed_tokens"] == 0


def test_what_no_card_has_room_for_stays_in_main_memory():
    found = placement(CONFIG, torch.float32, {0: int(4 * SIZE * 0.9), "cpu": 1 << 40})
    assert set(found.values()) == {0, "cpu"}
    assert found["model.embed_tokens"] == 0


def test_a_model_that_fits_nowhere_is_said_with_sizes():
    with pytest.raises(ExciseError, match=r"weights take 0\.0 GiB in float32, more than there is room for .*0: 0\.0"):
        placement(CONFIG, torch.float32, {0: SIZE, "cpu": SIZE})
