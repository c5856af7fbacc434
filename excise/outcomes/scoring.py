"""Many texts scored, none of them twice: the cache of scores, and a scorer with it as the judge of answers.

Not here: the scorers (`scorers`), and what of an answer they are given (the outcome says it).
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from excise.files.tables import read_table, save_table
from excise.outcomes.scorers import Scorer
from excise.progress import Progress, silent

CACHE_SCHEMA = {"text": pl.String, "score": pl.Float64}
TEXTS_AT_ONCE = 2048


class ScoreCache:
    """Scores as Parquet files, one folder per scorer's fingerprint, one file per batch, addressed by the text's hash.

    A file appears under its name only when it is whole, so a reader never meets a half-written one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def read(self, fingerprint: str) -> dict[str, float]:
        """All scores by this scorer: text's hash -> score."""
        known: dict[str, float] = {}
        for file in sorted((self.folder / fingerprint).glob("*.parquet")):
            rows = read_table(file, CACHE_SCHEMA)
            known.update(zip(rows["text"], rows["score"], strict=True))
        return known

    def add(self, fingerprint: str, scores: Mapping[str, float]) -> None:
        rows = pl.DataFrame({"text": list(scores), "score": list(scores.values())}, schema=CACHE_SCHEMA)
        save_table(self.folder / fingerprint / f"{uuid.uuid4().hex}.parquet", rows)


def score_texts(
    scorer: Scorer,
    texts: Sequence[str],
    *,
    cache: ScoreCache | None = None,
    progress: Progress = silent,
    label: str = "scoring",
) -> np.ndarray:
    """Scores of `texts` in their order, float64 [texts]; each distinct text is scored once, and never again by a cache.

    NaN for a text of nothing but white space: count those with `numpy.isnan` and report them. Progress counts distinct
    texts, known ones first.
    """
    keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32] for text in texts]
    wanted = {key: text for key, text in zip(keys, texts, strict=True) if text.strip()}
    stored = cache.read(scorer.fingerprint) if cache and wanted else {}
    known = {key: stored[key] for key in wanted if key in stored}
    missing = sorted((key for key in wanted if key not in known), key=lambda key: len(wanted[key]))
    progress(label, len(known), len(wanted))
    for start in range(0, len(missing), TEXTS_AT_ONCE):
        chosen = missing[start : start + TEXTS_AT_ONCE]
        scores = scorer.score([wanted[key] for key in chosen])
        fresh = {key: float(score) for key, score in zip(chosen, scores, strict=True)}
        if cache:
            cache.add(scorer.fingerprint, fresh)
        known |= fresh
        progress(label, len(known), len(wanted))
    return np.array([known.get(key, np.nan) for key in keys], dtype=np.float64)


@dataclass(frozen=True)
class Judge:
    """A scorer, and the cache of what it said before."""

    scorer: Scorer
    cache: ScoreCache | None = None

    def scores(self, texts: Sequence[str]) -> list[float | None]:
        """The score of each text; None for one that is unscored."""
        values = score_texts(self.scorer, texts, cache=self.cache)
        return [None if math.isnan(score) else float(score) for score in values]
