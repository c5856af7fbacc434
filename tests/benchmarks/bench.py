"""How fast Excise is beside the usual way, as ratios: `make bench`, which writes docs/benchmarks.md.

Ours and a reference (`references`) run in one process on one model and the same prompts, in turn, several times; every
round gives a ratio, and told are their median and their range. Nothing here is a test: what a machine measures is no
claim about the code. Masks at an 8B model's size are `eight_billion`.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import inspect
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl

from pipelines.terminal import run
from tests.benchmarks import references as reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
MODEL, SCENARIO, VARIATION = "planted-specific", "purchase", "bicycle"
LIBRARIES = ("torch", "transformers", "numpy", "polars", "duckdb", "dagster", "great-expectations")


@dataclass(frozen=True)
class Size:
    """How much is measured. rounds: of each comparison; names: per group; the rest by section."""

    rounds: int
    names: int = 1
    samples: int = 100
    single_samples: int = 6
    exact_names: int = 8
    exact_samples: int = 10_000
    exact_variations: int = 3
    per_call: tuple[int, ...] = (25, 100)
    attributed_names: int = 2
    attributed_samples: int = 16
    snip_layers: int = 3
    masks: tuple[int, int] = (19, 10)
    batch_names: int = 32
    indexed_layers: int = 2
    growth_names: tuple[int, ...] = (2, 4, 8)
    growth_samples: tuple[int, ...] = (25, 100, 400)
    growth_variations: tuple[int, ...] = (1, 2, 4)
    growth_widths: tuple[int, ...] = (256, 512, 1024)
    impact_names: int = 4
    impact_samples: int = 16
    impact_heads: tuple[tuple[int, int], ...] = ((9, 0), (20, 4))
    audit_rounds: int = 1
    audit: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "small": Size(
        rounds=2,
        samples=20,
        single_samples=2,
        per_call=(20,),
        exact_names=2,
        exact_samples=400,
        exact_variations=1,
        attributed_names=1,
        attributed_samples=4,
        snip_layers=2,
        masks=(4, 3),
        batch_names=4,
        indexed_layers=1,
        growth_names=(1, 2, 3),
        growth_samples=(4, 16, 64),
        growth_variations=(1, 2, 3),
        growth_widths=(64, 128, 256),
        impact_names=2,
        impact_samples=16,
        impact_heads=((20, 4),),
        audit={
            "variations": [VARIATION],
            "subjects_per_group": 4,
            "samples": 8,
            "resamples": 200,
            "permutations": 200,
            "levels": ["prompt_specific"],
        },
    ),
    "default": Size(rounds=3),
    "large": Size(
        rounds=5,
        names=4,
        single_samples=20,
        per_call=(25, 50, 100),
        exact_variations=10,
        attributed_names=8,
        attributed_samples=100,
        snip_layers=6,
        indexed_layers=6,
        growth_names=(4, 8, 16),
        growth_variations=(2, 4, 8),
        impact_names=8,
        impact_samples=32,
        impact_heads=((4, 2), (9, 0), (15, 7), (20, 4)),
        audit_rounds=3,
    ),
}


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of processors' work in this process."""

    clock: float
    processor: float

    def __mul__(self, factor: float) -> Spent:
        return Spent(self.clock * factor, self.processor * factor)


@dataclass
class Report:
    """The page as it grows: rows per section."""

    sections: list[tuple[str, str, list[str], list[list[str]], list[str]]] = field(default_factory=list)

    def section(self, title: str, text: str, header: Sequence[str]) -> None:
        self.sections.append((title, text, list(header), [], []))

    def row(self, *cells: str) -> None:
        self.sections[-1][3].append(list(cells))
        print("  " + "   ".join(cells), flush=True)

    def note(self, text: str) -> None:
        self.sections[-1][4].append(text)
        print("  " + text, flush=True)


@dataclass(frozen=True)
class Bench:
    """What every section works with. model_files: registry files beside the shipped one; home: converted models."""

    loaded: Any
    scenarios: dict[str, Any]
    size: Size
    folder: Path
    report: Report
    home: Path
    model_files: tuple[Path, ...] = ()

    @property
    def scenario(self) -> Any:
        return self.scenarios[SCENARIO]

    def load(self, key: str) -> Any:
        """Another model of the registry, or the one there is where it stands in for all."""
        from excise.models.loading import load_model
        from excise.models.specs import load_registry

        if self.model_files:
            return self.loaded
        registry, _ = load_registry()
        return load_model(registry[key], registry, home=self.home)

    def prompts(self, names: int, variations: Sequence[str] = (VARIATION,)) -> pl.DataFrame:
        from excise.scenarios import expand

        return expand(self.scenario, variations=variations, subjects_per_group=names)

    def parameters(self, **changes: Any) -> Any:
        from excise.generation.sampling import SamplingParameters

        return SamplingParameters(max_new_tokens=self.scenario.outcome.max_new_tokens, **changes)

    def tokens(self, prompts: pl.DataFrame) -> list[tuple[int, ...]]:
        from excise.models.encoding import encode

        return [tuple(prompt.tokens) for prompt in encode(self.loaded, prompts)]

    def answers(self, prompts: pl.DataFrame, samples: int) -> pl.DataFrame:
        from excise.generation.completions import complete

        return complete(self.loaded, prompts, samples, self.parameters(), outcome=self.scenario.outcome)[0]

    def scored(self, score: str, prompts: pl.DataFrame, answers: pl.DataFrame, folder: Path) -> list[Any]:
        """The files of a score, one per variation."""
        from excise.attribution import Answered, attribute

        return attribute(
            Answered(self.loaded, prompts, answers, self.scenario.comparison, self.scenario.outcome),
            [score],
            folder=folder,
        )


RATIOS = ("ours", "reference", "times as fast", "by processor time", "setting")


def measured(work: Callable[[], object]) -> Spent:
    """What one call takes."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - clock, time.process_time() - processor)


def alternating(rounds: int, **procedures: Callable[[], Spent | None]) -> dict[str, list[Spent]]:
    """Run procedures in turn, every other round backwards; a procedure may return its own, scaled, figure."""
    found: dict[str, list[Spent]] = {name: [] for name in procedures}
    for number in range(rounds):
        for name in list(procedures)[:: 1 if number % 2 == 0 else -1]:
            told: list[Spent | None] = []
            spent = measured(lambda name=name, told=told: told.append(procedures[name]()))
            found[name].append(told[0] if isinstance(told[0], Spent) else spent)
    return found


def spread(values: Sequence[float], unit: str = "x") -> str:
    """Median and range, in three digits."""

    def shown(value: float) -> str:
        return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"

    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{shown(middle)}{unit} [{shown(low)}, {shown(high)}]"


def faster(ours: Sequence[Spent], theirs: Sequence[Spent]) -> tuple[str, str]:
    """How many times ours goes into the reference, round by round: by the clock and by processor time."""
    pairs = list(zip(ours, theirs, strict=True))
    return (
        spread([other.clock / own.clock for own, other in pairs]),
        spread([other.processor / max(own.processor, 1e-6) for own, other in pairs]),
    )


# --------------------------------------------------------------------------------------------------------- the sections


def sampling(bench: Bench) -> None:
    """100 samples a name."""
    from excise.generation.enumeration import answer_distributions
    from excise.generation.sampling import sample

    size, loaded, parameters = bench.size, bench.loaded, bench.parameters()
    asked = bench.tokens(bench.prompts(size.names))
    bench.report.section(
        "Sampling",
        "Trees of distinct prefixes (`excise.generation.sampling`) against transformers. The batch of `generate` is "
        f"the best of {', '.join(map(str, size.per_call))} samples a call.",
        RATIOS,
    )
    tried = {
        per_call: measured(lambda n=per_call: reference.generated(loaded, asked[:1], size.samples, parameters, n)).clock
        for per_call in size.per_call
    }
    best = min(tried, key=tried.get)
    samples = [range(size.samples)] * len(asked)

    def single() -> Spent:
        few = size.single_samples
        spent = measured(lambda: reference.generated(loaded, asked[:1], few, parameters, 1))
        return spent * (len(asked) * size.samples / few)

    leftovers = []

    def exact() -> None:
        found = answer_distributions(loaded, asked, parameters)
        leftovers.append(max(each.leftover for each in found))

    spent = alternating(
        size.rounds,
        ours=lambda: sample(loaded, asked, samples, parameters) and None,
        generate=lambda: reference.generated(loaded, asked, size.samples, parameters, best) and None,
        cached=lambda: reference.generated_from_prompt(loaded, asked, size.samples, parameters, best) and None,
        single=single,
        exact=exact,
    )
    setting = f"{len(asked)} names, {size.samples} samples each"
    ours = f"`sample`, {size.samples} samples"
    bench.report.row(ours, f"`generate`, {best} sequences a call", *faster(spent["ours"], spent["generate"]), setting)
    bench.report.row(
        ours,
        f"`generate` from the prompt's repeated keys and values, {best} sequences a call",
        *faster(spent["ours"], spent["cached"]),
        setting,
    )
    bench.report.row(
        ours,
        "one call per sample",
        *faster(spent["ours"], spent["single"]),
        f"{setting}; {size.single_samples} samples measured and scaled",
    )
    bench.report.row(
        "`answer_distributions`, exact",
        ours,
        *faster(spent["exact"], spent["ours"]),
        f"{len(asked)} names; mass left over at most {max(leftovers):.2%}",
    )


def exact_answers(bench: Bench) -> None:
    """Bounds of enumerated answers, and where many samples fall."""
    from excise.evaluation.distributions import answers_of, smd_bounds
    from excise.evaluation.metrics import standardized_mean_difference
    from excise.generation.answering import Answering
    from excise.generation.completions import complete
    from excise.generation.settings import Enumeration

    size, outcome = bench.size, bench.scenario.outcome
    loaded = bench.load("planted-general")
    groups = bench.scenario.comparison.majority, bench.scenario.comparison.minority
    bench.report.section(
        "Exact answers",
        f"The SMD of enumerated answers, whatever the unread ones are, beside that of {size.exact_samples:,} samples "
        f"a name; {size.exact_names} names of each group, planted-general. Such a sample has a standard error of its "
        "own, told by 20 parts of it, which does not shrink with what is left unread: where it is half of the bound's "
        "width, a sample falls outside now and then.",
        (
            "variation",
            "left over at most",
            "prefixes read",
            "visited by 100 samples",
            "SMD by enumeration",
            f"SMD of {size.exact_samples:,} samples",
            "outside by, in standard errors",
        ),
    )
    for variation in list(bench.scenario.variations)[: size.exact_variations]:
        prompts = bench.prompts(size.exact_names, [variation])
        how = Answering(None, bench.parameters(), Enumeration())
        exact, work = how.answers(loaded, prompts, outcome=outcome)
        drawn, _ = complete(loaded, prompts, size.exact_samples, bench.parameters(), outcome=outcome)
        visited = {
            (prompt, *ids[:length])
            for prompt, ids in drawn.filter(pl.col("sample") < 100).select("prompt_id", "token_ids").rows()
            for length in range(len(ids))
        }
        listed = [
            answers_of(rows, rows["subject"].unique(maintain_order=True).to_list())
            for rows in (exact.filter(group=group) for group in groups)
        ]
        bounds = smd_bounds(*listed, *outcome.scored_range, winsorize=(0.05, 0.95))

        def sampled(rows: pl.DataFrame) -> float:
            both = (rows.filter(group=group)["value"].drop_nulls().to_numpy() for group in groups)
            return standardized_mean_difference(*both, winsorize=(0.05, 0.95))

        found = sampled(drawn)
        parts = [sampled(drawn.filter(pl.col("sample") % 20 == part)) for part in range(20)]
        error = statistics.stdev(parts) / math.sqrt(len(parts))
        outside = max(bounds.lowest - found, found - bounds.highest, 0.0) / max(error, 1e-12)
        bench.report.row(
            variation,
            f"{exact['leftover'].max():.4f}",
            f"{work.tokens:,}",
            f"{len(visited):,}",
            f"[{bounds.lowest:.4f}, {bounds.highest:.4f}]",
            f"{found:.4f} (s.e. {error:.4f})",
            f"{outside:.1f}" if outside else "inside",
        )


def attribution(bench: Bench) -> None:
    """Wanda norms in one pass over trees, SNIP in one pass over layers."""
    from excise.attribution.snip import snip

    size, loaded = bench.size, bench.loaded
    prompts = bench.prompts(size.attributed_names)
    answers = bench.answers(prompts, size.attributed_samples)
    tokens = dict(zip(prompts["prompt_id"], bench.tokens(prompts), strict=True))
    comparison = bench.scenario.comparison
    sequences = {
        group: [
            (tokens[prompt], ids[:-1] if finished else ids)
            for prompt, ids, finished in answers.filter(group=group).select("prompt_id", "token_ids", "finished").rows()
        ]
        for group in (comparison.majority, comparison.minority)
    }
    bench.report.section(
        "Attribution",
        "Input norms of both groups from one pass over the distinct tokens, against one sequence at a time with dense "
        "|W| * norm scores on disk; SNIP of all layers at once against a loop over layers.",
        RATIOS,
    )
    bytes_of: dict[str, int] = {}

    def ours() -> None:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            bytes_of["ours"] = sum(file.bytes for file in bench.scored("wanda", prompts, answers, Path(folder)))

    def dense() -> None:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            bytes_of["dense"] = sum(
                reference.write_dense_scores(loaded, reference.input_norms(loaded, some), Path(folder) / group)
                for group, some in sequences.items()
            )

    spent = alternating(size.rounds, ours=ours, dense=dense)
    setting = f"{prompts.height} names, {size.attributed_samples} answers each"
    bench.report.row(
        "norms from trees",
        "one sequence at a time, dense scores written",
        *faster(spent["ours"], spent["dense"]),
        setting,
    )
    bench.report.note(
        f"On disk: {bytes_of['dense'] / bytes_of['ours']:,.0f} times fewer bytes (norms of both groups against their "
        "dense scores)."
    )
    one_each = [next(each for each in some if each[1]) for some in sequences.values()]  # an empty answer has no loss
    weights = np.eye(2)
    roles = tuple(dict.fromkeys(linear.role for linear in loaded.topology.linears))
    layers = np.linspace(0, loaded.topology.layers - 1, size.snip_layers).astype(int).tolist()

    def all_layers() -> None:
        for _ in snip(loaded, (), [(tuple(p), tuple(a)) for p, a in one_each], weights, roles=roles):
            pass

    def by_layer() -> Spent:
        def work() -> None:
            for layer in layers:
                for some in one_each:
                    reference.snip_of_layer(loaded, [some], layer)

        return measured(work) * (loaded.topology.layers / len(layers))

    spent = alternating(size.rounds, ours=all_layers, by_layer=by_layer)
    bench.report.row(
        "SNIP, all layers in one pass",
        "SNIP, layer after layer",
        *faster(spent["ours"], spent["by_layer"]),
        f"{len(one_each)} answers; {len(layers)} layers measured and scaled",
    )


def masks(bench: Bench) -> None:
    """Overlap and selection."""
    from excise.evaluation.overlap import overlap_table
    from excise.interventions.weights import WeightMask
    from excise.strategies.selection import set_difference

    size, topology = bench.size, bench.loaded.topology
    rows, columns = size.masks
    rng = np.random.default_rng(0)
    shapes = {linear.key: linear.shape for linear in topology.linears}
    some = {key: shape for key, shape in shapes.items() if int(key.split(".")[0]) < size.indexed_layers}
    made = [
        WeightMask({key: _random_bits(rng, math.prod(shape)) for key, shape in shapes.items()}, shapes)
        for _ in range(rows + columns)
    ]
    parts = [WeightMask({key: mask.bits[key] for key in some}, some) for mask in made]
    indices = [[_flat_indices(mask, key) for key in some] for mask in parts]
    paths = []
    for number, mask in enumerate(made):
        paths.append(bench.folder / f"mask_{number:02d}.safetensors")
        mask.save(paths[-1])
    bench.report.section(
        "Masks",
        f"The overlap of {rows} masks with {columns}, a sixteenth of the weights in each, and the set difference of "
        "one layer's scores.",
        RATIOS,
    )
    overlap_table(parts[:1], parts[:1])  # the first call compiles
    spent = alternating(
        size.rounds,
        ours=lambda: overlap_table(parts[:rows], parts[rows:]) and None,
        isin=lambda: reference.shared_indices(indices[:rows], indices[rows:]).any() and None,
    )
    same = overlap_table(parts[:2], parts[-2:]).shared == reference.shared_indices(indices[:2], indices[-2:])
    if not same.all():
        raise AssertionError("packed bits and index tensors disagree")
    bench.report.row(
        "packed bits, `overlap_table`",
        "`torch.isin` on index tensors",
        *faster(spent["ours"], spent["isin"]),
        f"{size.indexed_layers} of {topology.layers} layers of the model",
    )
    whole = [bits for mask in made for bits in mask.bits.values()]
    spent = alternating(
        size.rounds,
        files=lambda: overlap_table(paths[:rows], paths[rows:]) and None,
        held=lambda: overlap_table(made[:rows], made[rows:]) and None,
        read=lambda: reference.read_through(paths) and None,
        memory=lambda: sum(int(bits.max()) for bits in whole) and None,
    )
    everything = f"whole masks of the model, {sum(mask.size for mask in made) / 8e6:,.0f} MB"
    bench.report.row(
        "`overlap_table` of files",
        "reading the files and nothing else (from the page cache)",
        *faster(spent["files"], spent["read"]),
        everything,
    )
    bench.report.row(
        "`overlap_table` of masks in memory",
        "reading that memory once",
        *faster(spent["held"], spent["memory"]),
        everything,
    )
    bench.report.note(
        f"A value of 1 is the bandwidth itself; every bit is read once and then counted in {rows * columns} pairs."
    )
    for path in paths:
        path.unlink()
    import torch

    scores = []
    for linear in topology.linears:
        if linear.layer == 0:
            weight = linear.weight(bench.loaded.model).detach().float().abs().reshape(linear.shape).numpy()
            norms = rng.random((2, linear.shape[1]), dtype=np.float32) + np.float32(0.5)
            scores.append((weight * norms[0], weight * norms[1]))
    tensors = [tuple(map(torch.from_numpy, pair)) for pair in scores]

    def by_partition() -> None:
        for pair in scores:
            set_difference(*pair, 0.40, 0.35)

    def by_topk() -> None:
        for pair in tensors:
            reference.set_difference_indices(*pair, 0.40, 0.35)

    spent = alternating(size.rounds, ours=by_partition, topk=by_topk)
    bench.report.row(
        "`set_difference`, exact k-th value",
        "`topk` and `isin`",
        *faster(spent["ours"], spent["topk"]),
        f"{len(scores)} matrices, {sum(pair[0].size for pair in scores) / 1e6:.1f} M weights",
    )
    masks_of_a_scenario(bench)


def masks_of_a_scenario(bench: Bench) -> None:
    """All masks that the published strategy needs for a scenario, against the sampling of one batch of its prompts."""
    from excise.generation.sampling import sample
    from excise.strategies.build import Making, build_masks
    from excise.strategies.config import load_strategies

    prompts = bench.prompts(1)
    strategy = load_strategies()["set_difference"].model_copy(update={"controls": ()})
    (file,) = bench.scored(strategy.score, prompts, bench.answers(prompts, 4), bench.folder)
    # What is in a file takes no part in how long its masks take.
    files = [replace(file, variation=variation) for variation in bench.scenario.variations]
    made: list[int] = []

    def built() -> None:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:

            def store(mask: Any) -> Path:
                path = Path(folder) / f"{len(list(Path(folder).iterdir()))}.safetensors"
                mask.save(path)
                return path

            masks = build_masks(bench.loaded, [strategy], files, Making(0, 0), scenario="purchase", store=store)
            made.append(sum(1 for _ in masks))

    asked = bench.tokens(bench.prompts(bench.size.batch_names))
    samples = [range(bench.size.samples)] * len(asked)
    spent = alternating(
        bench.size.rounds, ours=built, batch=lambda: sample(bench.loaded, asked, samples, bench.parameters()) and None
    )
    bench.report.row(
        f"the {made[0]} masks of a scenario, two levels",
        f"one batch of {len(asked)} prompts by `sample`",
        *faster(spent["ours"], spent["batch"]),
        f"set_difference of {len(files)} variations, files included; {bench.size.samples} samples a name",
    )


def _random_bits(rng: np.random.Generator, count: int) -> np.ndarray:
    """Packed random bits, one in sixteen set."""
    size = (count + 7) // 8
    bits = np.bitwise_and.reduce([np.frombuffer(rng.bytes(size), dtype=np.uint8) for _ in range(4)])
    if count % 8:
        bits[-1] &= 0xFF << (8 - count % 8) & 0xFF
    return bits


def _flat_indices(mask: Any, key: str) -> Any:
    import torch

    return torch.from_numpy(np.flatnonzero(mask.array(key)))


def orchestration(bench: Bench) -> None:
    """What Dagster, DuckDB, Great Expectations and the figures cost in the audit of `make demo`, and the import."""
    from pipelines.demo import STRATEGIES

    bench.report.section(
        "Orchestration",
        f"The audit of `make demo` ({MODEL}, {SCENARIO}, preset quick), everything computed anew and the model "
        "converted already. Seconds, without importing.",
        ("part", "seconds by the clock", "share of the audit"),
    )
    settings = {"strategies": STRATEGIES.split(",")} | bench.size.audit
    _tell_parts(bench, profiles(bench, settings, bench.size.audit_rounds))
    script = (
        "import time; c, p = time.perf_counter(), time.process_time(); import pipelines.definitions; "
        "print(time.perf_counter() - c, time.process_time() - p)"
    )
    imports = []
    for _ in range(bench.size.rounds + 1):  # the first one may compile
        told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
        imports.append(tuple(map(float, told.stdout.split()[-2:])))
    clock, processor = zip(*imports[1:], strict=True)
    bench.report.note(
        f"Import of the code location: {spread(clock, ' s')} by the clock, {spread(processor, ' s')} of processor time."
    )


def paper_partition(bench: Bench) -> None:
    """The same for a partition of the preset `paper`, one variation of it: on demand, as it takes a while."""
    from pipelines.demo import STRATEGIES

    bench.report.section(
        "Orchestration at the paper's size",
        f"An audit of one variation ({MODEL}, {SCENARIO}, {VARIATION}) in the preset paper: all names, 100 samples, "
        "five random controls and relabellings, 2,000 resamples, 9,999 permutations; measured by "
        '`make bench ARGS="--only paper_partition"`.',
        ("part", "seconds by the clock", "share of the audit"),
    )
    settings = {"preset": "paper", "strategies": STRATEGIES.split(","), "variations": [VARIATION]} | bench.size.audit
    _tell_parts(bench, profiles(bench, settings, 1))


def _tell_parts(bench: Bench, rounds: Sequence[dict[str, float]]) -> None:
    for part in dict.fromkeys(name for each in rounds for name in each):
        own = [each.get(part, 0.0) for each in rounds]
        share = [100 * value / each["in all"] for value, each in zip(own, rounds, strict=True)]
        bench.report.row(part, spread(own, " s"), spread(share, " %"))


MODEL_WORK = ("sampling", "attribution", "masks", "applying masks")
"""Parts of an audit that are work on the model's tokens or weights; the rest is what surrounds them."""


def profiles(bench: Bench, settings: dict[str, Any], rounds: int) -> list[dict[str, float]]:
    """Seconds by part of audits through Dagster, each in a data folder of its own, after a small one that imports."""
    import dagster as dg

    import assets.answer_checks
    import assets.mask_files
    import assets.metric_checks
    import assets.table_checks
    import excise.attribution
    import excise.evaluation.scenario_metrics
    import excise.generation.completions
    import excise.interventions.weights
    import excise.reporting.figures
    import excise.strategies.build
    from pipelines.definitions import build_definitions
    from pipelines.demo import failure_messages
    from pipelines.runs import execute
    from resources.gpu import GPUResource
    from resources.warehouse import Warehouse

    parts = {
        "sampling": [(excise.generation.completions, "sample")],
        "attribution": [(excise.attribution, "attribute")],
        "masks": [(excise.strategies.build, "build_masks"), (assets.mask_files.MaskFiles, "store")],
        "applying masks": [(excise.interventions.weights, "_cut_out"), (excise.interventions.weights, "_put_back")],
        "loading the model": [(GPUResource, "_load")],
        "DuckDB": [(Warehouse, "read"), (Warehouse, "replace_partition")],
        "Great Expectations": [
            (module, "unmet_expectations")
            for module in (assets.answer_checks, assets.metric_checks, assets.table_checks)
        ],
        "figures": [(excise.reporting.figures, name) for name in excise.reporting.figures.__all__ if name.islower()],
        "statistics": [(excise.evaluation.scenario_metrics, name) for name in ("evaluate", "comparisons")],
    }
    small = {
        "variations": [VARIATION],
        "subjects_per_group": 2,
        "held_out": False,
        "samples": 2,
        "random_draws": 1,
        "relabellings": 1,
        "resamples": 20,
        "permutations": 20,
        "levels": ["prompt_specific"],
    }
    found: list[dict[str, float]] = []
    for number in range(rounds + 1):
        data = Path(tempfile.mkdtemp(dir=bench.folder))
        (data / "models").symlink_to(bench.home, target_is_directory=True)
        definitions = build_definitions(
            data_folder=data,
            model_files=bench.model_files,
            resource_overrides={"gpu": GPUResource(folder=str(data), lock_folder=str(bench.folder))},
        )
        with dg.DagsterInstance.ephemeral() as instance, Clocks() as clocks:
            for part, places in parts.items():
                for owner, name in places:
                    clocks.watch(owner, name, part)
            began = time.perf_counter()
            key = f"{bench.loaded.key}|{SCENARIO}"
            asked = settings | (small if number == 0 else {})
            result = execute(definitions, instance, "audit_scenario", key, asked | {"seed": number})
            total = time.perf_counter() - began
        if not result.success:
            raise AssertionError("\n".join(failure_messages(result)))
        spent = {part: clocks.spent.get(part, 0.0) for part in parts}
        spent["Dagster and the rest"] = total - sum(spent.values())
        spent["**not model work, in all**"] = sum(value for part, value in spent.items() if part not in MODEL_WORK)
        found.append(spent | {"in all": total})
    return found[1:]


class Clocks:
    """Clocks on functions: each tells its own time without that of watched functions it calls."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._running: list[list[float]] = []
        self._undo = ExitStack()

    def __enter__(self) -> Clocks:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def watch(self, owner: ModuleType | type, name: str, part: str) -> None:
        whole = getattr(owner, name)

        def clocked(*given: Any, **options: Any) -> Any:
            inner = [0.0]
            self._running.append(inner)
            began = time.perf_counter()
            try:
                return whole(*given, **options)
            finally:
                self._stopped(part, began, inner)

        def clocked_steps(*given: Any, **options: Any) -> Iterator[Any]:
            steps = whole(*given, **options)
            while True:
                inner = [0.0]
                self._running.append(inner)
                began = time.perf_counter()
                try:
                    step = next(steps)
                except StopIteration:
                    return
                finally:
                    self._stopped(part, began, inner)
                yield step

        if inspect.isgeneratorfunction(whole):
            setattr(owner, name, clocked_steps)
            self._undo.callback(setattr, owner, name, whole)
            return
        setattr(owner, name, clocked)
        self._undo.callback(setattr, owner, name, whole)

    def _stopped(self, part: str, began: float, inner: list[float]) -> None:
        spent = time.perf_counter() - began
        self._running.pop()
        self.spent[part] = self.spent.get(part, 0.0) + spent - inner[0]
        if self._running:
            self._running[-1][0] += spent


def growth(bench: Bench) -> None:
    """Cost against names, samples and variations."""
    from excise.generation.completions import complete

    size = bench.size
    bench.report.section(
        "Growth",
        "Processor time against one size at a time, the others fixed, and the exponent e of cost ~ size^e (least "
        "squares of the logarithms of medians; its range over rounds). Memory is the peak above what was there before.",
        ("work", "sizes", "relative cost", "exponent", "peak memory"),
    )
    names, samples = size.growth_names[1], size.growth_samples[1]
    keys = list(bench.scenario.variations)

    def sampled(names: int, samples: int, variations: int) -> Callable[[], None]:
        prompts = bench.prompts(names, keys[:variations])
        options = {"outcome": bench.scenario.outcome}
        return lambda: complete(bench.loaded, prompts, samples, bench.parameters(), **options) and None

    def attributed(names: int, samples: int, variations: int) -> Callable[[], None]:
        prompts = bench.prompts(names, keys[:variations])
        answers = bench.answers(prompts, samples)

        def work() -> None:
            with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
                bench.scored("wanda", prompts, answers, Path(folder))

        return work

    for title, make in (("sampling", sampled), ("input norms", attributed)):
        for what, sizes, place in (
            ("names per group", size.growth_names, lambda n: (n, samples, 1)),
            ("samples per name", size.growth_samples, lambda n: (names, n, 1)),
            ("variations", size.growth_variations, lambda n: (names, samples, n)),
        ):
            works = {str(each): make(*place(each)) for each in sizes}
            peaks = [_peak(works[str(each)]) for each in sizes]
            spent = alternating(size.rounds, **works)
            costs = np.array([[each.processor for each in spent[str(one)]] for one in sizes])
            exponents = [_exponent(sizes, costs[:, number]) for number in range(size.rounds)]
            middle = np.median(costs, axis=1)
            bench.report.row(
                f"{title}, {what}",
                ", ".join(map(str, sizes)),
                ", ".join(f"{each:.2f}" for each in middle / middle[0]),
                f"{_exponent(sizes, middle):.2f} [{min(exponents):.2f}, {max(exponents):.2f}]",
                ", ".join("-" if each is None else f"{each / 2**20:.0f}" for each in peaks) + " MiB",
            )
    growth_of_the_model(bench)


def growth_of_the_model(bench: Bench) -> None:
    """Sampling with random models of the same depth and several widths, a fixed number of distinct tokens each."""
    import torch
    import transformers

    from excise.generation.sampling import sample
    from excise.models.loading import load_model
    from excise.models.specs import ModelSpec

    given = bench.loaded.model.config
    works, weights = {}, []
    parameters = bench.parameters(temperature=0.0)
    for width in bench.size.growth_widths:
        folder = bench.folder / f"random_{width}"
        config = transformers.LlamaConfig(
            vocab_size=given.vocab_size,
            hidden_size=width,
            intermediate_size=8 * width // 3 // 16 * 16,
            num_hidden_layers=12,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            tie_word_embeddings=True,
            eos_token_id=given.eos_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(folder)
        bench.loaded.tokenizer.save_pretrained(folder)
        spec = ModelSpec(key=f"random-{width}", folder=folder)
        loaded = load_model(spec, {spec.key: spec}, device="cpu", home=bench.folder)
        weights.append(
            sum(linear.out_features * linear.in_features for linear in loaded.topology.linears)
            + given.vocab_size * width
        )
        asked = bench.tokens(bench.prompts(bench.size.growth_names[1]))
        works[str(width)] = lambda loaded=loaded, asked=asked: (
            sample(loaded, asked, [range(1)] * len(asked), parameters) and None
        )
    for work in works.values():
        work()
    spent = alternating(bench.size.rounds, **works)
    costs = np.array([[each.processor for each in spent[name]] for name in works])
    exponents = [_exponent(weights, costs[:, number]) for number in range(bench.size.rounds)]
    middle = np.median(costs, axis=1)
    bench.report.row(
        "sampling, weights of a random model, millions",
        ", ".join(f"{each / 1e6:.0f}" for each in weights),
        ", ".join(f"{each:.2f}" for each in middle / middle[0]),
        f"{_exponent(weights, middle):.2f} [{min(exponents):.2f}, {max(exponents):.2f}]",
        "-",
    )


def _exponent(sizes: Sequence[int], costs: np.ndarray) -> float:
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(costs, 1e-6)), 1)[0])


def _peak(work: Callable[[], object]) -> int | None:
    """Bytes by which the process' resident memory exceeds its start while working; None where none can tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")  # the peak begins anew
    except OSError:
        work()
        return None

    def told(name: str) -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    before = told("VmRSS")
    work()
    return max(0, told("VmHWM") - before)


def memory(bench: Bench) -> None:
    """The peak of memory of pruning, asking and scoring a model, in processes of their own."""
    bench.report.section(
        "Memory",
        f"The most that a process held beyond what it held with the model loaded ({MODEL}, float32), and model and "
        "that together as a multiple of the model. Keys and values, logits, activations and answers are among it; they "
        "do not grow with the width of a model as its weights do.",
        ("work", "beyond the model", "together, models"),
    )
    for title, (work, granted) in MEMORY_WORKS.items():
        context = multiprocessing.get_context("spawn")
        told = context.SimpleQueue()
        process = context.Process(
            target=_measure_alone,
            args=(work, granted, bench.loaded.key, bench.model_files, bench.home, bench.size, told),
        )
        process.start()
        process.join()
        if process.exitcode:
            raise AssertionError(f"{title}: the process ended with {process.exitcode}")
        size, beyond = told.get()
        if beyond is None:
            bench.report.row(title, "-", "-")
        else:
            bench.report.row(title, f"{beyond / 2**20:,.0f} of {size / 2**20:,.0f} MiB", f"{1 + beyond / size:.2f}")


def _pruned(bench: Bench) -> None:
    """A sixteenth of the weights, a little more than set differences take out, made zero and put back."""
    from excise.interventions.weights import WeightMask

    shapes = {linear.key: linear.shape for linear in bench.loaded.topology.linears}
    rng = np.random.default_rng(0)
    mask = WeightMask({key: _random_bits(rng, math.prod(shape)) for key, shape in shapes.items()}, shapes)
    with mask.applied(bench.loaded):
        pass


def _read(bench: Bench) -> None:
    from excise.evaluation.perplexity import text_windows, window_losses
    from excise.evaluation.texts import read_text

    window_losses(bench.loaded, text_windows(bench.loaded, read_text(), limit_tokens=20 * bench.size.samples))


def _asked(bench: Bench) -> None:
    bench.answers(bench.prompts(bench.size.exact_names), bench.size.samples)


def _scored(score: str, bench: Bench) -> None:
    prompts = bench.prompts(bench.size.names)
    with tempfile.TemporaryDirectory() as folder:
        bench.scored(score, prompts, bench.answers(prompts, 4), Path(folder))


_gap = functools.partial(_scored, "gap_gradient")
MEMORY_WORKS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "6 % of the weights pruned": (_pruned, 2 << 30),
    "losses of a text, 2,048 tokens a pass": (_read, 2 << 30),
    "100 samples a name, 16 names": (_asked, 2 << 30),
    "input norms": (functools.partial(_scored, "wanda"), 2 << 30),
    "`gap_gradient`, as granted by default (2 GiB for sums)": (_gap, 2 << 30),
    "`gap_gradient`, three layers at a time (100 MiB for sums)": (_gap, 100 << 20),
    "SNIP, three layers at a time (100 MiB for sums)": (functools.partial(_scored, "snip"), 100 << 20),
}
"""What is done, and the bytes that gradients kept at once may fill."""


def _measure_alone(
    work: Callable[[Bench], None], granted: int, key: str, files: tuple[Path, ...], home: Path, size: Size, told: Any
) -> None:
    """In a new process: bytes of the model's weights, and of the peak beyond them."""
    from excise.attribution import gradients
    from excise.models.loading import load_model
    from excise.models.specs import load_registry
    from excise.scenarios import load_scenarios

    registry, _ = load_registry(files)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(registry[key], registry, home=home)
        bench = Bench(loaded, load_scenarios()[0], size, Path(folder), Report(), home, files)
        small = replace(bench, size=replace(size, names=1, exact_names=1, samples=2))
        work(small)  # what is imported and compiled on the way
        weights = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
        _give_back()
        gradients.ACCUMULATOR_BYTES = granted
        told.put((weights, _peak(lambda: work(bench))))


def _give_back() -> None:
    """Freed memory that the allocator keeps goes back to the system, or it would hide what is asked for again."""
    gc.collect()
    with suppress(OSError, AttributeError):  # other systems have no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def head_impacts(bench: Bench) -> None:
    """Weighing answers anew against drawing them anew."""
    from excise.attribution.head_impacts import Compared, Removal, Sampled
    from excise.attribution.head_impacts import head_impacts as impacts_of
    from excise.generation.completions import complete
    from excise.interventions.heads import heads_mask

    size, loaded = bench.size, bench.loaded
    prompts = bench.prompts(size.impact_names)
    answers = bench.answers(prompts, size.impact_samples)
    groups = [bench.scenario.comparison.majority, bench.scenario.comparison.minority]
    widths: dict[str, list[np.ndarray]] = {"reweight": [], "regenerate": []}

    def drawn_anew(mask: Any) -> pl.DataFrame:
        return complete(
            loaded, prompts, size.impact_samples, bench.parameters(), outcome=bench.scenario.outcome, intervention=mask
        )[0]

    def impacts(method: str) -> Callable[[], None]:
        def work() -> None:
            found = impacts_of(
                Sampled(loaded, prompts, answers, bench.parameters()),
                Compared("gap", groups, resamples=500),
                removal=Removal(method, drawn_anew if method == "regenerate" else None),
                heads=size.impact_heads,
            )
            width = (found["z_bias_high"] - found["z_bias_low"]).cast(pl.Float64).fill_null(math.nan).to_numpy()
            widths[method].append(width)

        return work

    def by_generate() -> Spent:
        """One head's removal, asked as the paper does: every answer drawn anew, here by transformers."""
        mask = heads_mask(chosen, "zero_output")

        def work() -> None:
            with mask.applied(loaded):
                reference.generated(
                    loaded, bench.tokens(prompts), size.impact_samples, bench.parameters(), size.impact_samples
                )

        return measured(work) * len(size.impact_heads)

    chosen = np.zeros((loaded.topology.layers, loaded.topology.heads), dtype=bool)
    chosen[size.impact_heads[0]] = True
    bench.report.section(
        "Head impacts",
        "The impact of a head on the gap from the answers that are there, weighed anew, against drawing all answers "
        "anew without the head: by `generate`, as the paper does, and by our own sampler with the same noise. At equal "
        "width of the interval: time times squared width (of our own sampler's answers).",
        RATIOS,
    )
    spent = alternating(
        size.rounds, reweight=impacts("reweight"), regenerate=impacts("regenerate"), generate=by_generate
    )
    setting = f"{len(size.impact_heads)} heads, {prompts.height} names, {size.impact_samples} samples each"
    ratio = float(np.nanmedian((widths["regenerate"][0] / widths["reweight"][0]) ** 2))
    for title, name in (("`generate` without the head", "generate"), ("drawn anew by `sample`", "regenerate")):
        bench.report.row("weighed anew", title, *faster(spent["reweight"], spent[name]), f"{setting}; time alone")
        bench.report.row(
            "weighed anew",
            title,
            *faster(spent["reweight"], [each * ratio for each in spent[name]]),
            f"{setting}; time to an interval of equal width (squared widths: {ratio:.2f})",
        )


TITLES = (
    "Sampling",
    "Exact answers",
    "Attribution",
    "Masks",
    "Head impacts",
    "Orchestration",
    "Orchestration at the paper's size",
    "Growth",
    "Memory",
)
"""The order of the page."""
SECTIONS: dict[str, Callable[[Bench], None]] = {
    each.__name__: each
    for each in (
        sampling,
        exact_answers,
        attribution,
        masks,
        orchestration,
        paper_partition,
        growth,
        memory,
        head_impacts,
    )
}
ON_DEMAND = ("orchestration", "paper_partition", "growth", "memory")
"""Sections that take minutes each: measured where `--only` names them or `--all` asks for all; else they stay."""


# ------------------------------------------------------------------------------------------------------------- the page


def machine() -> str:
    """The machine and what runs on it, in words."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{cores} cores ({_processor()}, {platform.machine()}), {memory:.0f} GiB of memory, {platform.system()}; "
        f"Python {platform.python_version()}, {libraries}; {torch.get_num_threads()} threads of torch."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "processor unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def page(report: Report, size: str, busy: float, known: str = "") -> str:
    """docs/benchmarks.md. known: the page as it is; its sections that were not measured again stay."""
    head = (
        "# Benchmarks\n\n"
        "Written by `make bench`. Ratios of plain references (`tests/benchmarks/references.py`) to ours, in one "
        f"process, on the same model ({MODEL}, 135 M weights, float32) and prompts; median and range over alternating "
        "rounds. Above 1 ours is faster. Ratios of other models and machines differ.\n"
    )
    sections = {part.partition("\n")[0]: part.rstrip() for part in known.split("\n## ")[1:]}
    measured_on = (
        f"Size {size}, on {machine()} The process had {busy:.0%} of the processors it could have used: where that is "
        "far from what it has alone, other work ran beside it, and processor time is the figure to read."
    )
    for title, text, header, rows, notes in report.sections:
        lines = [title, "", text, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        for note in (*notes, measured_on):
            lines += ["", note]
        sections[title] = "\n".join(lines)
    order = sorted(sections, key=lambda title: TITLES.index(title) if title in TITLES else len(TITLES))
    return "\n## ".join([head, *(f"{sections[title]}\n" for title in order)])


@contextmanager
def _prepared(size: Size) -> Iterator[Bench]:
    from transformers.utils.logging import disable_progress_bar

    from excise.generation.sampling import sample
    from excise.models.loading import load_model
    from excise.models.specs import load_registry
    from excise.scenarios import load_scenarios

    disable_progress_bar()
    registry, _ = load_registry()
    home = Path(os.environ.get("EXCISE_DATA") or ROOT / "data").absolute() / "models"
    loaded = load_model(registry[MODEL], registry, home=home)
    if loaded.device.type != "cpu":
        print(f"on {loaded.device}: references and ours both run there", file=sys.stderr)
    layers, heads = loaded.topology.layers, loaded.topology.heads
    size = replace(size, impact_heads=tuple((a, b) for a, b in size.impact_heads if a < layers and b < heads))
    with tempfile.TemporaryDirectory(prefix="excise_bench_") as folder:
        bench = Bench(loaded, load_scenarios()[0], size, Path(folder), Report(), home)
        sample(loaded, bench.tokens(bench.prompts(1)), [range(2)] * 2, bench.parameters())  # the first call is slower
        yield bench


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure Excise against plain references; write docs/benchmarks.md.")
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--only", choices=SECTIONS, help="one section alone; the others stay on the page as they are")
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(ON_DEMAND)}, which take minutes each")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = measured_since()
    with _prepared(SIZES[given.size]) as bench:
        usual = [each for each in SECTIONS if given.all or each not in ON_DEMAND]
        for name in [given.only] if given.only else usual:
            print(name, flush=True)
            spent = measured(functools.partial(SECTIONS[name], bench))
            print(f"  ({spent.clock:.0f} s)", flush=True)
        clock, processor = (now - then for now, then in zip(measured_since(), began, strict=True))
        import torch

        known = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
        text = page(bench.report, given.size, processor / clock / torch.get_num_threads(), known)
        given.out.write_text(text, encoding="utf-8")
        print(f"wrote {given.out}", file=sys.stderr)
    return 0


def measured_since() -> tuple[float, float]:
    """The clock, and processors' work of this process and of those it has started."""
    return time.perf_counter(), sum(os.times()[:4])


if __name__ == "__main__":
    run(main, "Stopping. The page stays as it is: what was measured is not kept.")
