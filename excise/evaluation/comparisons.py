"""Second comparisons from the same answers: names of equal length, men against women, the groups within one gender.

Here samples that are already drawn are filtered or relabelled and handed to `evaluation`; nothing is sampled anew.
They answer what a reader of a gap asks next (method, A3): is it the length of the names, is it their gender, and does a
mask that closes the gap between the groups open or close another one beside it?
"""

from collections.abc import Iterator

import polars as pl

from excise.conditions import RANDOM
from excise.errors import ExciseError
from excise.evaluation.numbers import evaluate
from excise.evaluation.rows import SCHEMA
from excise.scenarios import Comparison, Scenario
from excise.scenarios.subsets import ATTRIBUTION, token_matched

TOKEN_MATCHED, GENDER = "token_matched", "gender"
MEN, WOMEN = "men", "women"
COMPARISONS_SCHEMA = {"comparison": pl.String, **SCHEMA}


# A function for notebooks, too: settings by name, each with a default or an error of its own.
def comparisons(
    completions: pl.DataFrame,
    prompts: pl.DataFrame,
    pruned: pl.DataFrame,
    masks: pl.DataFrame,
    *,
    scenario: Scenario,
    resamples: int,
    permutations: int,
    seed: int,
) -> pl.DataFrame:
    """Every second comparison of one model and scenario: the columns of `evaluate` and which `comparison` it is.

    completions, prompts, pruned, masks: the tables of those names (group, subject and gender suffice of `prompts`).
    Rows of names held out for attribution (`split`) are left aside. Compared are, always first minus second:
      * "token_matched": the scenario's groups on a subset of names with equal numbers of tokens;
      * "gender": men minus women, all names of the scenario's two groups;
      * "<majority>-<minority>, <gender>": the scenario's groups, names of one gender.
    Only the unpruned model, the strategies' own masks and their random controls appear. A comparison for which a group
    has fewer than two names, or whose column (gender, name_tokens) is absent or empty, is left out; the frame may have
    no rows at all.

    Raises ExciseError for a scenario that does not say which groups it compares, and as `evaluate`.
    """
    comparison = scenario.comparison
    if comparison is None:
        raise ExciseError(f"scenario {scenario.key}: comparison is missing; name its majority and minority group")
    if not pruned.is_empty():
        pruned = pruned.filter(pl.col("matched_to").is_null() | (pl.col("strategy") == RANDOM))
    completions, pruned = _evaluated(completions), _evaluated(pruned)
    parts = []
    for name, (majority, minority), groups in _groupings(completions, prompts, comparison):
        chosen = _relabelled(completions, groups)
        counts = chosen.group_by("group").agg(pl.col("subject").n_unique()).rows()
        if min(dict(counts).get(group, 0) for group in (majority, minority)) < 2:
            continue
        metrics = evaluate(
            chosen,
            _relabelled(pruned, groups),
            masks,
            majority=majority,
            minority=minority,
            resamples=resamples,
            permutations=permutations,
            seed=seed,
            answer_range=scenario.outcome.scored_range,
            log_scale=scenario.outcome.log_scale,
        )
        parts.append(metrics.select(pl.lit(name).alias("comparison"), pl.all()))
    return pl.concat([pl.DataFrame(schema=COMPARISONS_SCHEMA), *parts])


def _groupings(
    completions: pl.DataFrame, prompts: pl.DataFrame, comparison: Comparison
) -> Iterator[tuple[str, tuple[str, str], pl.DataFrame]]:
    """(name, (first, second), frame: group and subject of every name that takes part, and the group it counts to)."""
    groups = (comparison.majority, comparison.minority)
    compared = completions.filter(pl.col("group").is_in(groups))
    if "name_tokens" in completions.columns:
        chosen = sorted(token_matched(compared))
        matched = compared.filter(pl.col("subject").is_in(chosen)).select("group", "subject", counts_to="group")
        yield TOKEN_MATCHED, groups, matched.unique()
    if "gender" not in prompts.columns:
        return
    gendered = prompts.filter(pl.col("group").is_in(groups)).select("group", "subject", "gender").unique().drop_nulls()
    yield GENDER, (MEN, WOMEN), gendered.rename({"gender": "counts_to"})
    for gender in gendered["gender"].unique().sort():
        members = gendered.filter(pl.col("gender") == gender).select("group", "subject", counts_to="group")
        yield f"{groups[0]}-{groups[1]}, {gender}", groups, members


def _evaluated(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("split") != ATTRIBUTION) if "split" in frame.columns else frame


def _relabelled(frame: pl.DataFrame, groups: pl.DataFrame) -> pl.DataFrame:
    """The rows of the names in `groups`, each under the group it counts to."""
    if frame.is_empty():
        return frame
    joined = frame.join(groups, on=["group", "subject"], how="inner", maintain_order="left")
    return joined.with_columns(group="counts_to").drop("counts_to")
