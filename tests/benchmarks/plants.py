"""Masks on planted models over splits of the names, ours beside the papers': the table of docs/findings.md.

    python -m tests.benchmarks.plants OUT.jsonl FOLDER JOBS.txt [--models models.yaml] [--names 24] [--workers 2]

A line of JOBS.txt is `model split level scenario/variation[,...]`. Levels: ps (the mask of the variation itself), wc
(from the other variations of its scenario), cc (from other scenarios), all (from those and its own); heads, weights and
fasp are the papers' heads, set difference and heads by their impact, at the point of a grid that closes most within the
same budgets on the names that make the mask. Every job adds a line of JSON to OUT.jsonl, and those that are there are
left out. What work can be used again is kept in FOLDER.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from excise.attribution import Answered, AttributionFile, attribute
from excise.attribution.gap_distance import Asked, measure
from excise.attribution.gap_free import ask
from excise.attribution.head_impacts import Compared, Sampled, Text, head_impacts
from excise.conditions import ALL_CONTEXTS, CROSS_CONTEXT, PLACE, PROMPT_SPECIFIC, RANDOM, WITHIN_CONTEXT
from excise.evaluation.numbers import evaluate
from excise.evaluation.restoration import restoration
from excise.evaluation.side_effects import (
    effect_windows,
    of_masks,
    scenario_effects,
    target_prompts,
    text_effect,
    text_rows,
    text_unpruned,
)
from excise.evaluation.stability import METRICS
from excise.evaluation.texts import read_text
from excise.evaluation.thresholds import SIGNIFICANCE, Thresholds
from excise.evaluation.verdicts import verdicts
from excise.generation.answering import Answering, as_samples
from excise.generation.completions import CompletionCache
from excise.generation.sampling import SamplingParameters
from excise.generation.settings import Enumeration
from excise.interventions.heads import heads_mask
from excise.interventions.packed import Mask
from excise.models.loading import load_model
from excise.models.specs import load_registry, reference_of
from excise.scenarios import expand, held_out_split, load_scenarios
from excise.strategies.build import Paths, SourceMask, follow_path, grid_masks
from excise.strategies.config import load_strategies
from excise.strategies.measured_path import Budgets, MeasuredPath, step_of
from excise.strategies.selection import fasp
from pipelines.results import ALL
from resources.settings import AuditSettings

LEVELS = {"ps": PROMPT_SPECIFIC, "wc": WITHIN_CONTEXT, "cc": CROSS_CONTEXT, "all": ALL_CONTEXTS}
PAPERS = {"heads": "attention_heads", "weights": "set_difference", "fasp": "fasp"}
POOL = ALL.split(",")
"""Scenarios whose masks are pooled, three variations each, as on the page of results."""
ELSEWHERE = ("purchase", "finance", "services", "hiring")
"""Scenarios that side effects are measured on."""
SAMPLES, NAMES_ELSEWHERE, RESAMPLES = 16, 6, 1000
SHARES = tuple(count / 1024 for count in (10, 20, 40, 80, 160))
HEADS = [(first, second / 1024) for first in SHARES for second in (0, 5, 10, 20) if second / 1024 < first]
WEIGHTS = [(0.15, 0.10), (0.15, 0.15), (0.20, 0.15), (0.30, 0.25), (0.40, 0.35), (0.40, 0.30), (0.50, 0.45)]
ALPHAS = (0.004, 0.008, 0.012, 0.02, 0.04, 0.06, 0.08, 0.10, 0.14, 0.20)


@dataclass(frozen=True)
class Options:
    """models: a registry file beside the built-in one. names: per group, half of which make the mask."""

    folder: Path
    models: Path | None
    names: int
    device: str


class Bench:
    """One model at one split of the names."""

    def __init__(self, options: Options, model: str, split: int) -> None:
        self.options, self.split = options, split
        self.registry, _ = load_registry([options.models] if options.models else [])
        self.scenarios, _ = load_scenarios()
        self.strategies = load_strategies()
        self.cache = CompletionCache(options.folder / "completions")
        self.loaded = self._load(model)
        named = reference_of(model, self.registry)
        self.reference = None if named is None else self._load(named.key)
        limits = Thresholds()
        self.budgets = Budgets(limits.spread_floor, limits.commonest_budget, limits.change_budget)

    def _load(self, key: str):
        folder = self.options.folder / "home"
        return load_model(self.registry[key], self.registry, device=self.options.device, dtype="float32", home=folder)

    @cached_property
    def text(self):
        return text_unpruned(self.loaded, effect_windows(self.loaded, read_text(None)))

    def how(self, scenario: str) -> Answering:
        limit = self.scenarios[scenario].outcome.max_new_tokens
        return Answering(SAMPLES, SamplingParameters(max_new_tokens=limit), Enumeration())

    def answers(self, loaded, scenario: str, prompts: pl.DataFrame, mask: Mask | None = None) -> pl.DataFrame:
        cache = self.cache if mask is None else None
        return self.how(scenario).answers(
            loaded, prompts, outcome=self.scenarios[scenario].outcome, intervention=mask, cache=cache
        )[0]

    def half(self, place: str, part: str) -> pl.DataFrame:
        """The prompts of the half of the names that makes masks ("attribution") or judges them ("evaluation")."""
        key, variation = place.split("/")
        scenario = self.scenarios[key]
        prompts = expand(scenario, variations=[variation], subjects_per_group=self.options.names)
        compared = [scenario.comparison.majority, scenario.comparison.minority]
        prompts = prompts.filter(pl.col("group").is_in(compared))
        return prompts.join(
            held_out_split(scenario, prompts, self.split).filter(split=part), on="prompt_id", how="semi"
        )

    def pool(self, level: str, place: str) -> list[str]:
        key, variation = place.split("/")
        if level == "ps":
            return [place]
        if level == "wc":
            return [f"{key}/{other}" for other in self.scenarios[key].variations if other != variation]
        named = [each for each in POOL if level == "all" or each != key]
        quick = AuditSettings()
        return [f"{each}/{one}" for each in named for one in quick.audit_of(self.scenarios[each]).variations]

    def learned(self, place: str) -> Answered:
        """What masks are made of."""
        key = place.split("/")[0]
        scenario, prompts = self.scenarios[key], self.half(place, "attribution")
        rows = self.answers(self.loaded, key, prompts)
        compared = scenario.comparison, scenario.outcome
        return Answered(self.loaded, prompts, rows, *compared, seed=self.split, cache=self.cache)

    def asked(self, place: str, significance: float = SIGNIFICANCE) -> Asked:
        return ask(self.learned(place), place=place, significance=significance)

    def scored(self, place: str, score: str) -> list[AttributionFile]:
        learned = self.learned(place)
        learned = replace(learned, completions=as_samples(learned.completions, SAMPLES))
        return attribute(learned, [score], folder=self.options.folder / "attribution")

    # Masks

    def path(self, level: str, place: str) -> MeasuredPath:
        """The path that the strategy follows for the variation; what it is told of is as in the stages."""
        strategy, pool = self.strategies["gap_gradient"], []
        for source in self.pool(level, place):
            (file,) = self.scored(source, strategy.score)
            pool.append(SourceMask(*source.split("/"), strategy.key, None, file.path))

        def asked(key: str, variation: str, significance: float) -> Asked:
            return self.asked(f"{key}/{variation}", significance)

        paths = Paths(self.loaded, asked, self.budgets, self.split, self.options.folder / "paths")
        return follow_path(strategy, pool, paths, LEVELS[level], place)

    def of_paper(self, level: str, place: str) -> dict:
        """The point of the grid that closes most within the budgets, measured on the names that make the mask."""
        if level == "fasp":
            masks = self.of_impacts(place)
        else:
            strategy, points = self.strategies[PAPERS[level]], HEADS if level == "heads" else WEIGHTS
            grid = grid_masks(self.loaded, strategy, self.scored(place, strategy.score), points)
            masks = ((f"{point[0]:.3g}/{point[1]:.3g}", mask) for _, point, mask in grid)
        asked = self.asked(place)
        tried = []
        for point, mask in masks:
            if mask.count:
                with mask.applied(self.loaded):
                    now = measure(self.loaded, asked)
                step = step_of(0, mask.count, [asked], [now], self.budgets)
                tried.append({"point": point, "closed": step.closed, "within": bool(step.within), "mask": mask})
        allowed = [each for each in tried if each["within"]]
        return max(allowed, key=lambda each: each["closed"], default={"mask": None, "closed": None, "point": None})

    def of_impacts(self, place: str) -> Iterator[tuple[str, Mask]]:
        """FASP's heads, by their impact on the gap and on perplexity, at rising shares."""
        key = place.split("/")[0]
        scenario, learned = self.scenarios[key], self.learned(place)
        groups = (scenario.comparison.majority, scenario.comparison.minority)
        found = head_impacts(
            Sampled(
                self.loaded.asked_for(scenario.outcome),
                learned.prompts,
                as_samples(learned.completions, 64),
                self.how(key).parameters,
            ),
            Compared("gap", groups, resamples=2, seed=self.split),
            text=Text(self.text.windows),
            folder=self.options.folder / "heads",
        ).sort("layer", "head")
        bias = found["bias_without"].fill_null(1e9).to_numpy()
        shape = (found["layer"].max() + 1, self.loaded.topology.heads)
        for alpha in ALPHAS:
            chosen = np.zeros(found.height, dtype=bool)
            chosen[fasp(found["perplexity_without"].to_numpy(), bias, alpha, 0.3)] = True
            yield f"alpha {alpha:g}", heads_mask(chosen.reshape(shape), "zero_output")

    # Judgement

    def judged(self, strategy: str, level: str, place: str, mask: Mask) -> dict:
        key, variation = place.split("/")
        scenario, prompts = self.scenarios[key], self.half(place, "evaluation")
        outcome, drawn = scenario.outcome, {"resamples": RESAMPLES, "seed": 0}

        def under(loaded, name: str, matched_to: str | None, mask: Mask) -> pl.DataFrame:
            return self.answers(loaded, key, prompts, mask).with_columns(
                strategy=pl.lit(name),
                level=pl.lit(level),
                matched_to=pl.lit(matched_to, pl.String),
                draw=pl.lit(0, pl.Int64),
            )

        before = self.answers(self.loaded, key, prompts)
        control = mask.control(1000 + self.split).mask
        after = pl.concat([under(self.loaded, strategy, None, mask), under(self.loaded, RANDOM, strategy, control)])
        groups = (scenario.comparison.majority, scenario.comparison.minority)
        metrics = evaluate(
            before,
            after,
            pl.DataFrame(),
            majority=groups[0],
            minority=groups[1],
            answer_range=outcome.scored_range,
            log_scale=outcome.scale == "log",
            permutations=999,
            **drawn,
        )
        found = [text_rows("mask", text_effect(self.loaded, self.text, mask, **drawn), len(self.text.windows))]
        for other in (self.scenarios[each] for each in ELSEWHERE):
            asked = target_prompts(
                other, names=NAMES_ELSEWHERE, subjects_per_group=self.options.names, held_out=True, seed=self.split
            )
            unpruned, edited = (self.answers(self.loaded, other.key, asked, each) for each in (None, mask))
            found.append(scenario_effects(unpruned, {"mask": edited}, other, **drawn))
        columns = ("model", "scenario", *PLACE)
        place_of_mask = dict(zip(columns, (self.loaded.key, key, variation, strategy, level, None), strict=True))
        effects = of_masks(
            pl.concat(found),
            pl.DataFrame([place_of_mask | {"mask": "mask"}], schema_overrides={"matched_to": pl.String}),
        )
        own = pl.col("strategy") == strategy
        verdict = verdicts(metrics, effects, Thresholds()).filter(own, variation=variation).row(0, named=True)
        figures = [
            *metrics.filter(own, pl.col("metric").is_in(METRICS), variation=variation).iter_rows(named=True),
            *(row | {"metric": f"{row['target']} {row['metric']}"} for row in effects.iter_rows(named=True)),
        ]
        if self.reference is not None:
            restored = restoration(
                before,
                after,
                self.answers(self.reference, key, prompts),
                under(self.reference, strategy, None, mask),
                groups=groups,
                log=outcome.scale == "log",
                **drawn,
            )
            figures += restored.filter(own, variation=variation).iter_rows(named=True)
        told = {row["metric"]: (row["estimate"], row["low"], row["high"]) for row in figures}
        return {name: verdict[name] for name in ("closes", "success", "failed", "unknown")} | {"figures": told}

    def lines(self, level: str, places: list[str]) -> Iterator[tuple[str, dict]]:
        if level in PAPERS:
            chosen = self.of_paper(level, places[0])
            mask, told = chosen["mask"], {"point": chosen["point"], "closed": chosen["closed"]}
        else:
            path = self.path(level, places[0])
            steps = [
                {"step": step.step, "pruned": step.pruned, "closed": step.closed, "within": bool(step.within)}
                | {"measured": {name: asdict(now) for name, now in step.measured.items()}}
                for step in path.steps
            ]
            mask, told = path.mask, {"reason": path.reason, "taken": path.taken, "steps": steps}
        for place in places:
            strategy = PAPERS.get(level, "gap_gradient")
            judged = self.judged(strategy, LEVELS.get(level, PROMPT_SPECIFIC), place, mask) if mask is not None else {}
            yield place, told | {"pruned": None if mask is None else mask.count} | judged


def work(options: Options, jobs, out: Path, lock) -> None:
    """Do jobs until there is none."""
    while (job := jobs.get()) is not None:
        model, split, level, places = job
        start = time.perf_counter()
        for place, found in Bench(options, model, int(split)).lines(level, places.split(",")):
            row = {"model": model, "split": int(split), "level": level, "place": place, **asdict(options)} | found
            with lock, out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=str) + "\n")
            removed = found.get("figures", {}).get("gap_reduction", (None,))[0]
            seconds = time.perf_counter() - start
            print(
                f"{' '.join(job[:3])} {place}: removed {removed}, {found.get('success')}, {seconds:.0f} s", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plants")
    for name in ("out", "folder", "jobs"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--names", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    done = set()
    if given.out.exists():
        rows = map(json.loads, given.out.read_text(encoding="utf-8").splitlines())
        done = {(row["model"], str(row["split"]), row["level"], row["place"]) for row in rows}
    context = multiprocessing.get_context("spawn")
    jobs, lock = context.Queue(), context.Lock()
    for line in given.jobs.read_text(encoding="utf-8").splitlines():
        job = tuple(line.split())
        if job and not all((*job[:3], place) in done for place in job[3].split(",")):
            jobs.put(job)
    options = Options(given.folder, given.models, given.names, given.device)
    workers = [context.Process(target=work, args=(options, jobs, given.out, lock)) for _ in range(given.workers)]
    for worker in workers:
        jobs.put(None)
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
