"""Answers of prompts as rows, sampled or enumerated, with a cache of the trees that were read.

Enumerated answers come with their probabilities; a prompt whose tree grows too large is sampled. How trees are read is
in `excise.generation.enumeration`, how samples become rows in `completions`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from excise.errors import ExciseError
from excise.files.tables import Schema
from excise.generation.completions import (
    CACHE_SCHEMA,
    COMPLETIONS_SCHEMA,
    CompletionCache,
    Work,
    cache_address,
    complete,
    peak_memory,
)
from excise.generation.enumeration import (
    AnswerDistribution,
    ValueOf,
    answer_distributions,
    answer_values,
    distribution_of,
)
from excise.generation.sampling import SamplingParameters
from excise.generation.settings import Enumeration, exact_settings, sampling_settings, tree_settings
from excise.interventions.protocol import Intervention, edited
from excise.models.encoding import encode, reader
from excise.models.loading import LoadedModel
from excise.outcomes import Outcome
from excise.progress import Progress, silent

EXACT_SCHEMA: Schema = {**COMPLETIONS_SCHEMA, "probability": pl.Float64, "leftover": pl.Float64}
"""One row per distinct answer, `sample` numbering a prompt's answers from the likeliest on. `leftover` is the mass of
the prompt's unvisited answers; null where the prompt was sampled instead, each sample with probability 1 / samples."""
TREE_CACHE_SCHEMA: Schema = {**CACHE_SCHEMA, "probability": pl.Float64, "leftover": pl.Float64, "nodes": pl.Int64}
"""An enumerated prompt in the cache of completions, a row per answer; one without any has a row of probability 0."""


@dataclass(frozen=True)
class Answering:
    """How a partition is answered: by `samples` a prompt; or, with `exact`, enumerated, and sampled where the model
    rambles. Without `samples` what rambles keeps what was enumerated, with a larger leftover."""

    samples: int | None
    parameters: SamplingParameters
    exact: Enumeration | None = None

    @property
    def sample_count(self) -> int:
        """Samples a prompt. Raises ValueError where there are none, as answers are enumerated alone."""
        if self.samples is None:
            raise ValueError("answers are enumerated alone; give them samples that stand for them")
        return self.samples

    @classmethod
    def of(cls, rows: pl.DataFrame) -> Answering:
        """How the answers in a table were made, by its columns parameters and sample."""
        known = json.loads(rows["parameters"][0])
        if known.pop("answers", "sampled") == "exact":
            samples = known.pop("samples")
            exact = Enumeration(known.pop("leftover"), known.pop("max_nodes"))
            return cls(samples, SamplingParameters(**known), exact)
        return cls(int(rows.select(pl.col("sample").max()).item()) + 1, SamplingParameters(**known))

    def answers(
        self,
        loaded: LoadedModel,
        prompts: pl.DataFrame,
        *,
        outcome: Outcome,
        intervention: Intervention | None = None,
        cache: CompletionCache | None = None,
        progress: Progress = silent,
        **scoring: Any,
    ) -> tuple[pl.DataFrame, Work]:
        """The answers of every prompt, under an intervention if one is given, and what they cost.

        prompts: rows of `excise.scenarios.expand`. The outcome may replace max_new_tokens of the parameters. cache:
        trees and samples that are there are not made again, new ones are added batch by batch. scoring: scorer and
        scores as in `complete`. Returns rows with the columns of EXACT_SCHEMA in the order of prompts, where
        `probability` and `leftover` are null for plain samples; of enumerated answers a prefix counts as a token and a
        distinct answer as a completion. Progress counts as many completions as samples would be.
        Raises ExciseError for an enumeration of an outcome whose answers are too long.
        """
        if self.exact is None:
            rows, work = complete(
                loaded,
                prompts,
                self.sample_count,
                self.parameters,
                outcome=outcome,
                intervention=intervention,
                cache=cache,
                progress=progress,
                **scoring,
            )
            nothing = pl.lit(None, pl.Float64)
            return rows.with_columns(probability=nothing, leftover=nothing), work
        if not outcome.enumerable:
            raise ExciseError(
                f"exact answers: the outcome is {outcome.kind}, but only numbers are short enough; sample it"
            )
        parameters = replace(self.parameters, max_new_tokens=outcome.answer_tokens(self.parameters.max_new_tokens))
        settings = exact_settings(parameters, self.exact, self.samples)
        loaded = loaded.asked_for(outcome)
        trees = _Trees.of(loaded, prompts, outcome, parameters, self.exact)
        shared = self.samples or 1
        new, work = trees.read(
            settings, intervention, cache, lambda label, done, total: progress(label, done * shared, total * shared)
        )
        rambling = [order for order, key in enumerate(trees.keys) if not trees.known[key].complete]
        if self.samples is None:
            rambling = []
        rows = trees.rows(settings, set(rambling))
        drawn = int(rows["prompt_hash"].is_in(new).sum())
        work = replace(work, drawn=drawn, reused=rows.height - drawn)
        if rambling and self.samples is not None:
            sampled, cost = complete(
                loaded,
                prompts[rambling],
                self.samples,
                parameters,
                outcome=outcome,
                intervention=intervention,
                cache=cache,
            )
            sampled = sampled.with_columns(
                pl.Series("order", np.repeat(np.array(rambling), self.samples), pl.Int64),
                pl.lit(settings).alias("parameters"),
                pl.lit(1 / self.samples).alias("probability"),
                pl.lit(None, pl.Float64).alias("leftover"),
            )
            rows = pl.concat([rows, sampled.select(rows.columns)])
            work += cost
        return rows.sort("order", "sample").drop("order"), work


@dataclass(frozen=True)
class _Trees:
    """The answer trees of prompts, read as far as asked.

    keys: the hash of each prompt; prefixes: what of each answer its prompt holds already; tokens: of the distinct
    prompts, by key; known: their distributions, by key.
    """

    loaded: LoadedModel
    prompts: pl.DataFrame
    parameters: SamplingParameters
    enumeration: Enumeration
    keys: list[str]
    prefixes: list[str]
    tokens: dict[str, tuple[int, ...]]
    value_of: dict[str, ValueOf]
    known: dict[str, AnswerDistribution]

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        prompts: pl.DataFrame,
        outcome: Outcome,
        parameters: SamplingParameters,
        enumeration: Enumeration,
    ) -> _Trees:
        """The trees of prompts, none of them read yet."""
        has_prefix = "answer_prefix" in prompts.columns
        prefixes = [prefix or "" for prefix in prompts["answer_prefix"]] if has_prefix else [""] * prompts.height
        encoded = encode(loaded, prompts, new_tokens=parameters.max_new_tokens)
        return cls(
            loaded,
            prompts,
            parameters,
            enumeration,
            [prompt.hash for prompt in encoded],
            prefixes,
            {prompt.hash: prompt.tokens for prompt in encoded},
            {prefix: answer_values(loaded, outcome.values, prefix) for prefix in set(prefixes)},
            {},
        )

    @property
    def prefix_of(self) -> dict[str, str]:
        """The prefix whose values a distribution has, by key: that of the last prompt of equal tokens."""
        return dict(zip(self.keys, self.prefixes, strict=True))

    def read(
        self, settings: str, intervention: Intervention | None, cache: CompletionCache | None, progress: Progress
    ) -> tuple[list[str], Work]:
        """Fill `known`, from the cache as far as it goes; the keys that were not there, and what reading them cost."""
        label, loaded, prefix_of = "enumerating", self.loaded, self.prefix_of
        values = {key: self.value_of[prefix] for key, prefix in prefix_of.items()}
        address = cache_address(loaded, intervention, tree_settings(settings))
        self.known.update(_read_trees(cache, address, values, self.enumeration.leftover))
        missing = [key for key in self.tokens if key not in self.known]
        done = len(self.tokens) - len(missing)
        progress(label, done, len(self.tokens))

        def keep(batch: dict[int, AnswerDistribution]) -> None:
            nonlocal done
            if cache:
                cache.add(address, _tree_rows({missing[number]: tree for number, tree in batch.items()}))
            done += len(batch)
            progress(label, done, len(self.tokens))

        started = time.perf_counter()
        with edited(loaded, intervention if missing else None):
            fresh = answer_distributions(
                loaded,
                [self.tokens[key] for key in missing],
                self.parameters,
                self.enumeration,
                values=[values[key] for key in missing],
                on_batch=keep,
            )
        self.known.update(zip(missing, fresh, strict=True))
        seconds = time.perf_counter() - started if missing else 0.0
        nodes = sum(tree.nodes for tree in fresh)
        return missing, Work(seconds=seconds, tokens=nodes, peak_memory_bytes=peak_memory(loaded.devices))

    def rows(self, settings: str, without: set[int]) -> pl.DataFrame:
        """Rows of EXACT_SCHEMA with the number of the prompt (`order`), of all prompts but those `without`."""
        table: dict[str, list[Any]] = {name: [] for name in ("order", *EXACT_SCHEMA)}
        read, prefix_of = reader(self.loaded), self.prefix_of
        for order, (row, key) in enumerate(zip(self.prompts.iter_rows(named=True), self.keys, strict=True)):
            if order in without:
                continue
            for number, (ids, finished, probability, value) in enumerate(self.known[key].listed()):
                tokens = ids[:-1] if finished else ids
                if self.prefixes[order] != prefix_of[key]:  # of the same prompt, more or less is its answer's
                    value = self.value_of[self.prefixes[order]](tokens, finished)
                cells = {name: row[name] for name in COMPLETIONS_SCHEMA if name in row}
                cells |= {
                    "order": order,
                    "model": self.loaded.key,
                    "sample": number,
                    "text": read(tokens)[0],
                    "value": None if math.isnan(value) else value,
                    "finished": finished,
                    "tokens": len(ids),
                    "token_ids": ids,
                    "seed": self.parameters.seed,
                    "model_fingerprint": self.loaded.fingerprint,
                    "parameters": settings,
                    "prompt_hash": key,
                    "probability": probability,
                    "leftover": self.known[key].leftover,
                }
                for name, column in table.items():
                    column.append(cells[name])
        return pl.DataFrame(table, schema={"order": pl.Int64, **EXACT_SCHEMA})


def _tree_rows(trees: Mapping[str, AnswerDistribution]) -> pl.DataFrame:
    """Rows of TREE_CACHE_SCHEMA, of trees by the prompt's key."""
    rows = [
        (key, number, ids, finished, probability, tree.leftover, tree.nodes)
        for key, tree in trees.items()
        for number, (ids, finished, probability, _) in enumerate(tree.listed())
    ]
    return pl.DataFrame(rows, schema=TREE_CACHE_SCHEMA, orient="row")


def _read_trees(
    cache: CompletionCache | None, address: str, value_of: Mapping[str, ValueOf], leftover: float
) -> dict[str, AnswerDistribution]:
    """The distributions that the cache holds of the prompts that `value_of` has, by the prompt's key."""
    rows = cache.read(address) if cache else pl.DataFrame(schema=TREE_CACHE_SCHEMA)
    if rows.is_empty():
        return {}
    rows = rows.filter(pl.col("prompt").is_in(list(value_of))).sort("prompt", "sample")
    trees = {}
    for (key,), of_prompt in rows.group_by("prompt", maintain_order=True):
        listed = of_prompt.select("token_ids", "finished", "probability").rows()
        answers = [
            (tuple(ids[:-1] if finished else ids), ids[-1] if finished else None, probability)
            for ids, finished, probability in listed
            if probability > 0
        ]
        unread, nodes = of_prompt["leftover"][0], of_prompt["nodes"][0]
        trees[key] = distribution_of(answers, unread, nodes, leftover, value_of[key])
    return trees


def as_samples(rows: pl.DataFrame, samples: int) -> pl.DataFrame:
    """Distributions as `samples` answers a prompt that stand for them; rows of plain samples as they are.

    rows: with columns prompt_id, sample, probability and, if any, leftover. Every answer comes as often as the nearest
    whole numbers to its share of the known mass allow (systematic sampling: exact but for less than one answer), in an
    order in which any first few are spread over the distribution. probability and leftover are null then, and
    `parameters` are those of samples.
    """
    if "probability" not in rows.columns or rows["probability"].null_count() == rows.height:
        return rows
    # The golden ratio's multiples fill the unit interval evenly from the first on.
    rank = np.argsort(np.argsort((np.arange(samples) * (math.sqrt(5) - 1) / 2) % 1, kind="stable"))
    points = (rank + 0.5) / samples
    chosen: list[np.ndarray] = []
    for part in rows.with_row_index("_row").partition_by("prompt_id", maintain_order=True):
        part = part.sort("sample")
        if part["leftover"][0] is None:
            chosen.append(part["_row"].to_numpy())
            continue
        mass = np.cumsum(part["probability"].to_numpy())
        if not mass[-1] > 0:
            raise ExciseError(
                f"exact answers: no answer of prompt {part['prompt_id'][0]} was found; raise max_nodes, or sample"
            )
        chosen.append(part["_row"].to_numpy()[np.searchsorted(mass, points * mass[-1], side="right")])
    nothing = pl.lit(None, pl.Float64)
    drawn = rows[np.concatenate(chosen)].with_columns(
        sample=pl.concat([pl.int_range(len(indices), eager=True) for indices in chosen]),
        probability=nothing,
        leftover=nothing,
    )
    if "parameters" in drawn.columns:
        plain = {settings: sampling_settings(settings) for settings in drawn["parameters"].unique()}
        drawn = drawn.with_columns(pl.col("parameters").replace_strict(plain))
    return drawn
