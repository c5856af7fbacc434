"""The workload at Llama-3-8B's size stays packed: one layer of it shows what all 32 would take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MASKS_A, MASKS_B = 4, 3


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    command = [sys.executable, "-m", "tests.benchmarks.eight_billion", "--layers", "1"]
    command += ["--masks-a", str(MASKS_A), "--masks-b", str(MASKS_B), "--folder", str(tmp_path_factory.mktemp("masks"))]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_selection_and_combinations_give_what_the_workload_was_made_to_give(one_layer):
    weights, density = one_layer["weights"], one_layer["density"]
    assert weights == 4096 * (4096 + 2 * 1024 + 3 * 14336)
    assert 0.05 < density < 0.06  # at least the band between the thresholds
    # A derived mask keeps a weight of the base with one half, and every weight with about half the density.
    half = round(32 * density) / 64
    own = density * (0.5 + 0.5 * half) + (1 - density) * half
    assert one_layer["mean_chance"] == pytest.approx(own, rel=0.01)
    shared = density * (0.5 + 0.5 * half) ** 2 + (1 - density) * half**2
    assert one_layer["mean_overlap"] == pytest.approx(shared / own, rel=0.01)
    in_two = weights * shared  # leaving one of three masks out
    assert one_layer["weights_in_within_context_masks"] == pytest.approx([in_two] * MASKS_B, rel=0.01)


@pytest.mark.slow
def test_no_stage_holds_unpacked_bits_or_indices_of_whole_masks(one_layer):
    weights, density, peaks = one_layer["weights"], one_layer["density"], one_layer["peak_bytes"]
    packed, unpacked, indices = weights // 8, weights, int(8 * density * weights)  # bytes of one mask
    bare = peaks["plain_read"]  # a process that only reads
    # All masks packed, of which the table of overlaps holds one matrix' share: beside it indices take 3, bits 8 times.
    assert peaks["overlap"] - bare < (MASKS_A + MASKS_B) * packed < (MASKS_A + MASKS_B) * min(indices, unpacked) / 3
    # Four packed masks and one matrix while it is turned round.
    largest = 4096 * 14336
    assert peaks["intersection"] - bare < 5 * packed
    assert peaks["leave_one_out"] - bare < 4 * packed + 2 * largest < 0.4 * MASKS_B * unpacked
    # Weights, two scores and one ranking of the largest matrix in single precision; indices would add 8 bytes a weight.
    assert peaks["selection_and_packing"] - bare < 5 * 4 * largest
    assert one_layer["peak_memory_bytes"] == max(peaks.values()) < 1_300_000_000
