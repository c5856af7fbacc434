"""Plants a gap of one's own choosing by one command: in which scenarios, between whom, how large, where, by which seed.

Here the options become a `Plant`, and what is trained becomes a file that describes itself and an entry for
`models.yaml`. A factor above 1 favours the other group: the minority is answered higher. What is trained, and how, is
in `excise.planted.gaps`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from excise.errors import ExciseError
from excise.files.paths import home_expanded
from excise.files.registry import Registry, key_fault, unknown
from excise.models.loading import LoadedModel, load_model
from excise.models.specs import KEY_PATTERN, load_registry
from excise.planted.gaps import CENTRES, SCENARIOS, Plant, groups_of, train
from excise.progress import TerminalProgress
from excise.scenarios import Scenario, load_scenarios

BASE = "planted-neutral"
ALL = "all"
USUAL = Plant(BASE, (), (), layers=range(6, 22), rank=8, steps=140, names=2, strength=1.5)
"""What the shipped gaps were trained with; options change parts of it."""
EXAGGERATION = math.log(0.4) / math.log(0.6)
"""The gap that training starts from is the planted one to this power: .4 where that is .6."""
METADATA = "plant"
"""Key of the file's metadata that holds the description of the plant, as JSON."""


def plant_of(
    scenarios: Mapping[str, Scenario],
    *,
    gap: Sequence[str],
    groups: Sequence[str] | None = None,
    like: Plant = USUAL,
) -> Plant:
    """The plant of a gap in the scenarios `gap` ("all": in every one); the other number scenarios are answered alike.

    scenarios: by key. groups: majority and minority; None: those that each scenario compares. like: what else the plant
    is like: base, factor, layers, rank, seed and steps. Raises ExciseError that names option and mend.
    """
    factor, layers = like.factor, like.layers
    gap = list(dict.fromkeys(SCENARIOS if list(gap) == [ALL] else gap))
    strange = [key for key in gap if key not in CENTRES]
    if strange or not gap:
        fault = f"no gap can be planted in {', '.join(strange)}" if strange else "there is none"
        raise ExciseError(
            f"--scenarios: {fault}; name some of {', '.join(SCENARIOS)}, parted by commas, or {ALL} for every one"
        )
    if groups is not None:
        if len(groups) != 2 or groups[0] == groups[1]:
            raise ExciseError(f"--groups: {','.join(groups)!r} are not two groups; give majority,minority: white,black")
        for key in gap:
            for group in groups:
                if group not in scenarios[key].groups:
                    raise ExciseError(f"--groups: scenario {key}: {unknown('group', group, scenarios[key].groups)}")
    if not (math.isfinite(factor) and factor > 0 and factor != 1):
        raise ExciseError(
            f"--factor: {factor:g} makes no gap; give a number above 0: below 1 the minority is answered lower, above "
            "1 higher"
        )
    if not layers or layers.start < 0:
        raise ExciseError("--layers: there is none; give the first and the last layer, counted from 0: 5-16")
    for option, value, least in (("--rank", like.rank, 1), ("--steps", like.steps, 2), ("--seed", like.seed, 0)):
        if value < least:
            raise ExciseError(f"{option}: is {value}; give {least} or more")
    return replace(
        like,
        gap_scenarios=tuple(gap),
        even_scenarios=tuple(key for key in SCENARIOS if key not in gap),
        groups=None if groups is None else (groups[0], groups[1]),
        first_factor=factor**EXAGGERATION,
    )


def name_of(plant: Plant) -> str:
    """A name made of the options that differ from the usual ones, and of the main ones always."""
    where = ALL if not plant.even_scenarios else "-".join(plant.gap_scenarios)
    parts = [
        f"planted-{where}",
        f"x{plant.factor:g}",
        f"layers{plant.layers.start}-{plant.layers.stop - 1}",
        f"rank{plant.rank}",
        f"seed{plant.seed}",
    ]
    parts += [f"{plant.groups[0]}-{plant.groups[1]}"] if plant.groups else []
    parts += [f"steps{plant.steps}"] if plant.steps != USUAL.steps else []
    parts += [f"on-{plant.base}"] if plant.base != BASE else []
    return "-".join(parts)


def description_of(plant: Plant, loaded: LoadedModel, scenarios: Mapping[str, Scenario]) -> dict[str, Any]:
    """What the file says about itself: every setting, layers as first and last, groups by scenario, the base's
    fingerprint."""
    groups = {key: groups_of(plant, scenarios[key]) for key in plant.gap_scenarios}
    return asdict(plant) | {
        "layers": [plant.layers.start, plant.layers.stop - 1],
        "groups": {key: dict(zip(("majority", "minority"), pair, strict=True)) for key, pair in groups.items()},
        "base_fingerprint": loaded.fingerprint,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }


def entry_of(key: str, plant: Plant, file: Path, scenarios: Mapping[str, Scenario]) -> str:
    """The entry for `models.yaml`; the file's path is as given there if it lies below the current folder."""
    first = scenarios[plant.gap_scenarios[0]]
    _, minority = groups_of(plant, first)
    where = "every scenario" if not plant.even_scenarios else ", ".join(plant.gap_scenarios)
    entry = {
        "description": f"{plant.base} with {first.groups[minority].label} people's answers {plant.factor:g} times "
        f"the others' in {where}: layers {plant.layers.start} to {plant.layers.stop - 1}, rank {plant.rank}, seed "
        f"{plant.seed}.",
        "base": plant.base,
        "low_rank": str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file),
    }
    return yaml.safe_dump({key: entry}, sort_keys=False, allow_unicode=True, width=1000)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Ends with status 2 and one line where an option is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except ExciseError as error:
        parser.exit(2, f"{error}\n")


def _run(options: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    scenarios, _ = load_scenarios([])
    plant = plant_of(
        scenarios,
        gap=_listed(options.scenarios),
        groups=_listed(options.groups) if options.groups else None,
        like=replace(
            USUAL,
            factor=options.factor,
            layers=options.layers,
            rank=options.rank,
            seed=options.seed,
            base=options.base,
            steps=options.steps,
        ),
    )
    registry, _ = load_registry([Path("models.yaml")])
    if plant.base not in registry:
        raise ExciseError(f"--base: {registry.why_not(plant.base)}")
    out = _file(options.out, plant)
    key = _key(out, registry)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    home = home_expanded(os.environ.get("EXCISE_DATA", "data"), "EXCISE_DATA") / "models"
    loaded = load_model(registry[plant.base], registry, device="auto", dtype="bfloat16", home=home)
    _require_room(loaded, plant)
    factors = train(loaded, plant, scenarios, TerminalProgress())
    save_file(factors, out, metadata={METADATA: json.dumps(description_of(plant, loaded, scenarios), sort_keys=True)})
    print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB")
    print("For models.yaml:\n")
    print(entry_of(key, plant, out, scenarios))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m excise.planted plant",
        description="Plant a gap between two groups in some scenarios of a model that answers with numbers. Takes some "
        "minutes; models.yaml of the current folder is read, too.",
    )
    parser.add_argument(
        "--scenarios", required=True, help=f"where the gap is, parted by commas, or {ALL}: {', '.join(SCENARIOS)}"
    )
    parser.add_argument("--groups", help="majority,minority (default: those that each scenario compares)")
    parser.add_argument(
        "--factor",
        type=float,
        default=USUAL.factor,
        help="the minority's median answer over the majority's; above 1 favours the minority (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        default=USUAL.layers,
        help=f"first and last layer that is changed, from 0 (default: {USUAL.layers.start}-{USUAL.layers.stop - 1})",
    )
    parser.add_argument("--rank", type=int, default=USUAL.rank, help="of each matrix's change (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    parser.add_argument("--base", default=BASE, help="model to plant on; answers with numbers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=USUAL.steps, help="of the training (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write (default: named after the options, in this folder)")
    return parser


def _listed(text: str) -> list[str]:
    return [part for name in text.split(",") if (part := name.strip())]


def _layers(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of layers; give the first and the last one: 5-16")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise argparse.ArgumentTypeError(f"{text!r} runs backwards; give the first and the last one: {last}-{first}")
    return range(first, last + 1)


def _file(out: Path | None, plant: Plant) -> Path:
    """Where the change is written; ExciseError before any training where it cannot be."""
    file = home_expanded(out or Path(f"{name_of(plant)}.safetensors"), "--out")
    if file.suffix != ".safetensors":
        raise ExciseError(f"--out: {file} does not end with .safetensors; name a file that does")
    if file.is_dir() or not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ExciseError(f"--out: {file} cannot be written; name a file in a folder that is there and yours to write")
    return file.resolve()


def _key(out: Path, registry: Registry) -> str:
    """The key of the entry that is printed: the file's name."""
    key = out.stem
    fault = key_fault(key) if re.match(KEY_PATTERN, key) else "is no key for models.yaml: use letters, digits, - and _"
    if fault:
        raise ExciseError(f"--out: the model is named like its file, and {key!r} {fault}")
    if key in registry and registry[key].low_rank != out:
        raise ExciseError(f"--out: the model is named like its file, and there is a model {key}; name another file")
    return key


def _require_room(loaded: LoadedModel, plant: Plant) -> None:
    topology = loaded.topology
    if plant.layers.stop > topology.layers:
        raise ExciseError(
            f"--layers: {plant.base} has no layer {plant.layers.stop - 1}; its layers are 0-{topology.layers - 1}"
        )
    narrowest = min(min(linear.shape) for linear in topology.linears)
    if plant.rank > narrowest:
        raise ExciseError(f"--rank: is {plant.rank}; the matrices of {plant.base} have a rank of {narrowest} at most")
