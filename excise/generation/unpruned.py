"""Answers of the unpruned model, with what later stages need to know: halves, lengths of names, prompts' own scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from excise.generation.completions import Work
from excise.generation.under_masks import Asking
from excise.models.encoding import encode
from excise.progress import Progress, silent
from excise.scenarios.subsets import ATTRIBUTION, BOTH, EVALUATION, held_out_split

if TYPE_CHECKING:
    from excise.outcomes.scorers import Scorer
    from excise.outcomes.scoring import ScoreCache
    from excise.scenarios.schema import Scenario


def unpruned_answers(
    asking: Asking, scenario: Scenario, prompts: pl.DataFrame, *, held_out: bool, seed: int, progress: Progress = silent
) -> tuple[pl.DataFrame, Work]:
    """The answers with, beside the columns of EXACT_SCHEMA, split, prompt_value and name_tokens; and what they cost.

    held_out: whether masks are made from one half of the names and judged on the other, which `seed` draws.
    """
    rows, work = asking.answers(prompts, progress=progress)
    encoded = encode(asking.loaded.asked_for(asking.outcome), prompts)
    lengths = {prompt.prompt_id: prompt.name[1] - prompt.name[0] for prompt in encoded}
    halves = held_out_split(scenario, prompts, seed) if held_out else prompts.select("prompt_id", split=pl.lit(BOTH))
    for columns in (halves, prompt_values(asking.scorer, asking.scores, prompts)):
        rows = rows.join(columns, on="prompt_id", how="left", maintain_order="left")
    return rows.with_columns(name_tokens=pl.col("prompt_id").replace_strict(lengths, return_dtype=pl.Int64)), work


def prompt_values(scorer: Scorer | None, scores: ScoreCache | None, prompts: pl.DataFrame) -> pl.DataFrame:
    """prompt_id and prompt_value: the score of the prompt alone, null without a scorer."""
    values: list[float | None] = [None] * prompts.height
    if scorer is not None:
        from excise.outcomes.scoring import Judge

        values = Judge(scorer, scores).scores(prompts["text"].to_list())
    return prompts.select("prompt_id", prompt_value=pl.Series(values, dtype=pl.Float64))


def names_told(rows: pl.DataFrame) -> str:
    """From how many names, or prompts of an axis, masks are made, and on how many they are judged, in words."""
    scored = rows["prompt_value"].is_not_null().any()
    counted, what = ("prompt_id", "prompts") if scored else ("subject", "names")
    counts = dict(rows.group_by("split").agg(pl.col(counted).n_unique()).rows())
    if BOTH in counts:
        return f"masks are made from, and judged on, all {counts[BOTH]} {what}"
    return f"masks are made from {counts[ATTRIBUTION]} {what} and judged on {counts[EVALUATION]} others"
