"""Masks at Llama-3-8B's size: seconds, reading speed and memory of selection, packing, intersection and overlap.

`python -m tests.benchmarks.eight_billion [--layers N] [--masks-a 19] [--masks-b 10] [--selected-layers N]` makes random
weights and norms in the model's shapes, selects a base mask from them by the set difference, writes masks like it to a
folder that is removed afterwards, combines them, and measures their overlap. Prints JSON.
A mask of all 32 layers takes 0.81 GB, so 29 of them 23 GB of disk; the default of 6 layers takes 4.7 GB and a few
minutes. Each stage runs in a process of its own, so that each has its own peak; exits with 1 when one is over 4 GB.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from excise.evaluation.overlap import overlap_table
from excise.interventions.combining import intersection, leave_one_out
from excise.interventions.kinds import load_mask
from excise.interventions.weights import WeightMask
from excise.strategies.selection import set_difference

HIDDEN, KEY_VALUE, INTERMEDIATE, LAYERS = 4096, 1024, 14336, 32
SHAPES = {
    "q": (HIDDEN, HIDDEN),
    "k": (KEY_VALUE, HIDDEN),
    "v": (KEY_VALUE, HIDDEN),
    "gate": (INTERMEDIATE, HIDDEN),
    "up": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
TAU_MIN, TAU_MAJ = 0.40, 0.35  # BDB, section 4
MEMORY_LIMIT = 4_000_000_000
_PIECE = 1 << 23  # bytes read at a time by the plain read


def keys(layers: int) -> dict[str, tuple[int, int]]:
    """The matrices of so many layers with their shapes (out_features, in_features)."""
    return {f"{layer}.{role}": shape for layer in range(layers) for role, shape in SHAPES.items()}


# ------------------------------------------------------------------------------------------------------------- stages


def select(folder: Path, layers: int, selected: int) -> dict:
    """Write the base mask: the set difference of |W| times two norm vectors, matrix by matrix, packed at once.

    Of the layers after `selected` the bits are random at the same density.
    """
    rng = np.random.default_rng(0)
    bits, density = {}, TAU_MIN - TAU_MAJ
    for key, (out_features, in_features) in keys(layers).items():
        size = out_features * in_features
        if int(key.split(".")[0]) >= selected:
            bits[key] = _random_bits(rng, size // 8, density)
            continue
        weights = rng.standard_normal((out_features, in_features), dtype=np.float32)
        np.abs(weights, out=weights)
        majority = rng.random(in_features, dtype=np.float32) + np.float32(0.5)
        minority = majority * (1 + np.float32(0.1) * rng.standard_normal(in_features, dtype=np.float32))
        chosen = set_difference(weights * minority, weights * majority, TAU_MIN, TAU_MAJ)
        bits[key] = np.packbits(chosen, axis=None)
        density = np.count_nonzero(chosen) / size
    mask = WeightMask(bits, keys(layers))
    mask.save(folder / "base.safetensors")
    return {"weights": mask.size, "density": mask.density}


def derive(folder: Path, name: str, count: int, seed: int) -> dict:
    """Write masks of about the base's density: half of the base's weights, and as many random ones."""
    rng = np.random.default_rng(seed)
    base = load_mask(folder / "base.safetensors")
    for index in range(count):
        bits = {}
        for key, own in base.bits.items():
            bits[key] = (own & _random_bits(rng, own.size, 0.5)) | _random_bits(rng, own.size, base.density / 2)
        WeightMask(bits, base.shapes).save(folder / f"{name}{index:02d}.safetensors")
    return {}


def within_context(folder: Path) -> dict:
    """For each mask of the second set the intersection of the others, one after the other."""
    counts = [mask.count for mask in leave_one_out(lambda: map(load_mask, _files(folder, "b")))]
    return {"weights_in_within_context_masks": counts}


def in_all(folder: Path) -> dict:
    """The intersection of all masks of the first set."""
    return {"weights_in_all_masks": intersection(map(load_mask, _files(folder, "a"))).count}


def plain_read(folder: Path) -> dict:
    """Read all masks' files from first to last byte, and do nothing with them."""
    piece = bytearray(_PIECE)
    for path in _files(folder, "[ab]"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return {}


def overlap(folder: Path) -> dict:
    """Every mask of the first set against every mask of the second."""
    table = overlap_table(_files(folder, "a"), _files(folder, "b"))
    return {"mean_overlap": float(table.fraction.mean()), "mean_chance": float(table.chance.mean())}


# ------------------------------------------------------------------------------------------------------------ measuring


def measured(stage: Callable[..., dict], *given) -> tuple[dict, float, float, int]:
    """What the stage returns, its seconds, those of a processor, and the peak of the process in bytes."""
    start, busy = time.perf_counter(), time.process_time()
    found = stage(*given)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found, seconds, busy, peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def compiled() -> None:
    """Count something small, so that neither the seconds nor the memory of compiling are counted later."""
    nothing = WeightMask.from_arrays({"0.q": np.zeros((1, 64), dtype=bool)})
    overlap_table([nothing], [nothing])


def run(folder: Path, layers: int, masks_a: int, masks_b: int, selected: int) -> dict:
    """All stages in order; files are dropped from the page cache before they are read for speed."""
    results: dict = {"layers": layers, "selected_layers": min(selected, layers), "masks": [masks_a, masks_b]}
    seconds, busy, peaks = {}, {}, {}
    for name, stage, *given in (
        ("selection_and_packing", select, folder, layers, selected),
        ("derived_masks_a", derive, folder, "a", masks_a, 1),
        ("derived_masks_b", derive, folder, "b", masks_b, 2),
        ("intersection", in_all, folder),
        ("leave_one_out", within_context, folder),
        ("plain_read", plain_read, folder),
        ("overlap", overlap, folder),
    ):
        if stage in (plain_read, overlap):
            _drop_from_cache(_files(folder, "[ab]"))
        # A fork would start with the parent's peak; a spawned process starts from nothing.
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
            if stage in (plain_read, overlap):
                process.submit(compiled).result()  # in both, as the compiler alone takes more than the masks
            found, seconds[name], busy[name], peaks[name] = process.submit(measured, stage, *given).result()
        results |= found
    size = sum(path.stat().st_size for path in _files(folder, "[ab]"))
    speeds = {name: size / seconds[name] for name in ("plain_read", "overlap")}
    return results | {
        "bytes_of_files": size,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "processor_seconds": {name: round(value, 2) for name, value in busy.items()},
        "bytes_per_second": {name: round(value) for name, value in speeds.items()},
        "overlap_speed_against_plain_read": round(speeds["overlap"] / speeds["plain_read"], 3),
        "peak_bytes": peaks,
        "peak_memory_bytes": max(peaks.values()),
        "memory_limit_bytes": MEMORY_LIMIT,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="layers of the model, 1 to 32 (default: 6)")
    parser.add_argument("--masks-a", type=int, default=19, help="masks whose overlap is asked for (default: 19)")
    parser.add_argument("--masks-b", type=int, default=10, help="masks they are laid upon, at least 2 (default: 10)")
    parser.add_argument("--selected-layers", type=int, default=LAYERS, help="layers really selected (default: all)")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile (default: the system's)")
    options = parser.parse_args()
    if not 1 <= options.layers <= LAYERS or options.masks_a < 1 or options.masks_b < 2:
        parser.error("give 1 to 32 layers, at least one mask in the first set and two in the second")
    size = sum(math.prod(shape) // 8 for shape in keys(options.layers).values())
    needed = size * (options.masks_a + options.masks_b + 2)  # the base, and the one being written
    with tempfile.TemporaryDirectory(prefix="eight_billion_", dir=options.folder) as folder:
        free = shutil.disk_usage(folder).free
        if needed > free:
            parser.error(
                f"{needed / 1e9:.1f} GB of disk are needed and {free / 1e9:.1f} GB are free in {folder}: give "
                "fewer layers or masks, or another --folder"
            )
        print(f"writing {needed / 1e9:.1f} GB to {folder}", file=sys.stderr)
        results = run(Path(folder), options.layers, options.masks_a, options.masks_b, options.selected_layers)
    print(json.dumps(results, indent=2))
    return int(results["peak_memory_bytes"] > MEMORY_LIMIT)


def _files(folder: Path, names: str) -> list[Path]:
    return sorted(folder.glob(f"{names}[0-9]*.safetensors"))


def _random_bits(rng: np.random.Generator, count: int, density: float) -> np.ndarray:
    """Packed random bits, uint8 [count], of a density rounded to 1/64: its binary digits say "and" or "or"."""
    digits = max(1, round(density * 64))
    bits = np.zeros(count, dtype=np.uint8)
    for place in range(6):
        if bits.any() or digits >> place & 1:
            drawn = np.frombuffer(rng.bytes(count), dtype=np.uint8)
            bits = bits | drawn if digits >> place & 1 else bits & drawn
    return bits


def _drop_from_cache(paths: list[Path]) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
