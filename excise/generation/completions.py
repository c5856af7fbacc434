"""Completions of prompts as rows, with what each is worth, and a cache that never samples the same answer twice.

The cache is content-addressed: model, intervention, prompt tokens, sampling parameters and sample number decide an
answer, so a killed run goes on where it was, a new name costs that name and more samples cost the new ones. How answers
are drawn is in `excise.generation.sampling`, what an answer is worth in `excise.outcomes`.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import polars as pl

from excise.errors import ExciseError
from excise.files.tables import Schema, read_table, save_table
from excise.generation.sampling import Draw, SamplingParameters, sample
from excise.interventions.protocol import Intervention, edited
from excise.models.encoding import encode, reader
from excise.models.loading import LoadedModel
from excise.outcomes import Answer, Outcome
from excise.outcomes.answers import continued
from excise.outcomes.scorers import Scorer
from excise.outcomes.scoring import Judge, ScoreCache
from excise.progress import Progress, silent

UNPRUNED = "unpruned"
CACHE_SCHEMA: Schema = {"prompt": pl.String, "sample": pl.Int64, "token_ids": pl.List(pl.Int64), "finished": pl.Boolean}
COMPLETIONS_SCHEMA: Schema = {
    "model": pl.String,
    "scenario": pl.String,
    "variation": pl.String,
    "template": pl.String,
    "group": pl.String,
    "subject": pl.String,
    "prompt_id": pl.String,
    "sample": pl.Int64,
    "text": pl.String,
    "value": pl.Float64,
    "finished": pl.Boolean,
    "tokens": pl.Int64,
    "token_ids": pl.List(pl.Int64),
    "seed": pl.Int64,
    "model_fingerprint": pl.String,
    "parameters": pl.String,
    "prompt_hash": pl.String,
}
"""token_ids: the generated tokens, the stop token included where the answer is finished. text: what they say, up to the
first special token among them. prompt_hash: `excise.models.encoding.prompt_hash`."""


@dataclass(frozen=True)
class Work:
    """What a call cost: completions drawn and reused, seconds and tokens of the drawing, peak memory of the process."""

    drawn: int = 0
    reused: int = 0
    seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.drawn + other.drawn,
            self.reused + other.reused,
            self.seconds + other.seconds,
            self.tokens + other.tokens,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
        )

    def metadata(self) -> dict[str, float | int]:
        """Figures for a run's metadata; rates only where something was drawn."""
        figures: dict[str, float | int] = {
            "completions_drawn": self.drawn,
            "completions_reused": self.reused,
            "sampling_seconds": round(self.seconds, 2),
            "peak_memory_mb": round(self.peak_memory_bytes / 2**20),
        }
        if self.drawn and self.seconds:
            figures |= {
                "completions_per_second": round(self.drawn / self.seconds, 1),
                "tokens_per_second": round(self.tokens / self.seconds, 1),
            }
        return figures


class CompletionCache:
    """Drawn answers as Parquet files, one folder per (model, intervention, sampling parameters), one file per batch.

    A file appears under its name only when it is whole, so a reader never meets a half-written one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, address: str) -> pl.DataFrame:
        files = sorted((self.folder / address).glob("*.parquet"))
        frames = [read_table(file) for file in files]
        return (
            pl.concat(frames).unique(["prompt", "sample"], keep="first", maintain_order=True)
            if frames
            else pl.DataFrame(schema=CACHE_SCHEMA)
        )

    def add(self, address: str, rows: pl.DataFrame) -> None:
        save_table(self.folder / address / f"{uuid.uuid4().hex}.parquet", rows)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.rglob("*.parquet"))


def settings_key(settings: str) -> str:
    """What sampling parameters, as JSON, are called in the cache: 16 hex digits."""
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def cache_address(loaded: LoadedModel, intervention: Intervention | None, settings: str) -> str:
    """The folder of answers in the cache: model, intervention and sampling parameters (`settings`, JSON)."""
    done = UNPRUNED if intervention is None else intervention.fingerprint
    return "/".join([loaded.fingerprint, done, settings_key(settings)])


# A function for notebooks, too: settings by name, each with a default or an error of its own.
def complete(
    loaded: LoadedModel,
    prompts: pl.DataFrame,
    samples: int,
    parameters: SamplingParameters,
    *,
    outcome: Outcome,
    scorer: Scorer | None = None,
    scores: ScoreCache | None = None,
    intervention: Intervention | None = None,
    cache: CompletionCache | None = None,
    progress: Progress = silent,
    label: str = "sampling",
    batch_prompts: int | None = None,
) -> tuple[pl.DataFrame, Work]:
    """Complete every prompt `samples` times, under an intervention if one is given.

    prompts: rows of `excise.scenarios.expand`. The outcome may replace max_new_tokens of `parameters`
    (`Outcome.answer_tokens`). scorer, scores: what judges the answers where the outcome is that of a scorer, and the
    cache of its judgements. Returns rows with the columns of COMPLETIONS_SCHEMA in the order of prompts and samples,
    and what they cost. Progress counts completions, reused ones first.
    """
    parameters = replace(parameters, max_new_tokens=outcome.answer_tokens(parameters.max_new_tokens))
    if outcome.scored_by is not None and scorer is None:
        raise ExciseError(f"completions: {outcome.kind} needs a scorer; name one of excise.outcomes.scorers")
    loaded = loaded.asked_for(outcome)
    encoded = encode(loaded, prompts, new_tokens=parameters.max_new_tokens)
    keys = [prompt.hash for prompt in encoded]
    settings = json.dumps(asdict(parameters), sort_keys=True)
    address = cache_address(loaded, intervention, settings)
    known = (cache.read(address) if cache else pl.DataFrame(schema=CACHE_SCHEMA)).filter(
        pl.col("prompt").is_in(keys) & (pl.col("sample") < samples)
    )
    have: dict[str, set[int]] = {}
    for prompt, number in known.select("prompt", "sample").iter_rows():
        have.setdefault(prompt, set()).add(number)
    missing: list[Sequence[int]] = []
    for key in keys:
        missing.append([number for number in range(samples) if number not in have.get(key, ())])
        have[key] = set(range(samples))  # the same text under two names is sampled once
    total, done = len(set(keys)) * samples, known.height
    progress(label, done, total)
    fresh: list[pl.DataFrame] = []

    def keep(draws: list[Draw]) -> None:
        nonlocal done
        rows = pl.DataFrame(
            [
                (
                    keys[draw.prompt],
                    draw.sample,
                    [*draw.tokens, *([] if draw.stop is None else [draw.stop])],
                    draw.stop is not None,
                )
                for draw in draws
            ],
            schema=CACHE_SCHEMA,
            orient="row",
        )
        if cache:
            cache.add(address, rows)
        fresh.append(rows)
        done += rows.height
        progress(label, done, total)

    started = time.perf_counter()
    if any(missing):
        with edited(loaded, intervention):
            sample(
                loaded,
                [prompt.tokens for prompt in encoded],
                missing,
                parameters,
                batch_prompts=batch_prompts,
                on_batch=keep,
            )
    seconds = time.perf_counter() - started
    answers = pl.concat([known, *fresh])
    read = reader(loaded)
    read_answers = [
        read(ids[:-1] if finished else ids) for ids, finished in answers.select("token_ids", "finished").iter_rows()
    ]
    answers = answers.with_columns(
        pl.Series("text", [text for text, _ in read_answers], pl.String),
        pl.Series("ended", [ended for _, ended in read_answers], pl.Boolean),
    )
    rows = (
        prompts.rename({"text": "asked"})  # the rows' text is the answer's
        .with_columns(pl.Series("prompt_hash", keys))
        .with_row_index("order")
        .join(answers.rename({"prompt": "prompt_hash"}), on="prompt_hash", how="inner")
        .sort("order", "sample")
    )
    prefixes = rows["answer_prefix"] if "answer_prefix" in rows.columns else [""] * rows.height
    values = outcome.values(
        [
            Answer(asked, continued(prefix or "", text), finished or ended)
            for prefix, asked, text, finished, ended in zip(
                prefixes, *rows["asked", "text", "finished", "ended"], strict=True
            )
        ],
        None if scorer is None else Judge(scorer, scores),
    )
    rows = rows.with_columns(
        pl.Series("value", values, pl.Float64),
        model=pl.lit(loaded.key),
        tokens=pl.col("token_ids").list.len().cast(pl.Int64),
        seed=pl.lit(parameters.seed, pl.Int64),
        model_fingerprint=pl.lit(loaded.fingerprint),
        parameters=pl.lit(settings),
    ).select(pl.col(name).cast(kind) for name, kind in COMPLETIONS_SCHEMA.items())
    drawn = sum(frame.height for frame in fresh)
    tokens = sum(int(frame["token_ids"].list.len().sum()) for frame in fresh)
    return rows, Work(drawn, rows.height - drawn, seconds if drawn else 0.0, tokens, peak_memory(loaded.devices))


def peak_memory(devices: Sequence[str]) -> int:
    """Most memory held at once so far, in bytes: of the cards together where there are any, else of this process."""
    import torch

    if cards := [device for device in devices if device.startswith("cuda")]:
        return sum(map(torch.cuda.max_memory_allocated, cards))
    if devices[0].startswith("mps"):
        return torch.mps.driver_allocated_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
