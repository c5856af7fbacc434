"""What earlier stages left, read from the warehouse: the only place where a stage asks for another one's rows.

Whatever does not go together any more (other prompts, another model, other masks, other scores) is an ExciseError that
names what to materialize again. What a stage makes of the rows is in its own module.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from assets.mask_definitions import require_defined_as, require_one_definition
from assets.metadata import data_version
from assets.partitions import Catalogue
from excise.conditions import ALL_CONTEXTS, MASK, OWN_SCENARIO, PLACE, PROMPT_SPECIFIC, RANDOM
from excise.errors import ExciseError
from excise.evaluation.judged import judged_of
from excise.evaluation.thresholds import Thresholds, stored_thresholds
from excise.scenarios import Scenario
from excise.scenarios.subsets import ATTRIBUTION, EVALUATION, without
from excise.strategies.config import MEASURED_PATH, Strategy
from resources.artifacts import Artifacts
from resources.warehouse import Warehouse

if TYPE_CHECKING:
    from excise.attribution import AttributionFile
    from excise.evaluation.scenario_metrics import JudgedAnswers
    from excise.interventions.controls import RandomControl
    from excise.interventions.packed import Mask
    from excise.models.loading import LoadedModel
    from excise.strategies.build import SourceMask

MASK_COLUMNS = (*MASK, "mask", "path", "control_seed")


def rows_of(warehouse: Warehouse, table: str, model: str, scenario: str, *, made_by: str) -> pl.DataFrame:
    """A partition's rows. Raises ExciseError naming the asset to materialize when there are none."""
    rows = warehouse.read(table, model=model, scenario=scenario)
    if rows.is_empty():
        raise ExciseError(
            f"table {table} has no rows for {model}|{scenario}; materialize {made_by} of this partition first"
        )
    return rows


def thresholds_of(warehouse: Warehouse, asset: str, model: str, scenario: str) -> Thresholds:
    """What an asset's results were judged by. Raises ExciseError where the partition does not say."""
    rows = warehouse.read("thresholds", asset=asset, model=model, scenario=scenario)
    return stored_thresholds(rows, asset=asset, model=model, scenario=scenario)


def unjudged_scenarios(warehouse: Warehouse, model: str) -> set[str]:
    """The scenarios of a model that were sampled and of which no variation can be judged."""
    checked = warehouse.read("checks", asset="completions", check_name="judged_variations", model=model)
    return set(checked.filter(pl.col("figure") == 0)["scenario"])


# -------------------------------------------------------------------------------------------------------- completions


def completions_of(warehouse: Warehouse, model: str, scenario: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A partition's completions and the prompts they answer.

    Raises ExciseError when there are none, or when the prompts have changed since.
    """
    rows = rows_of(warehouse, "completions", model, scenario, made_by="completions")
    prompts = warehouse.read("prompts", scenario=scenario)
    if any(rows[name].null_count() for name in ("split", "name_tokens", "prompt_hash")):
        raise ExciseError(
            f"the completions of {model}|{scenario} were stored by an earlier version; materialize completions of this "
            "partition again (answers drawn already are reused)"
        )
    asked = prompts.filter(pl.col("prompt_id").is_in(rows["prompt_id"].unique().implode()))
    if asked.height != rows["prompt_id"].n_unique():
        raise ExciseError(
            f"the prompts of scenario {scenario} have changed since the completions of {model}|{scenario} were drawn; "
            "materialize completions of this partition again"
        )
    return rows, asked


def require_same_model(rows: pl.DataFrame, loaded: "LoadedModel", scenario: str) -> None:
    """Raise ExciseError when the model is no longer the one that gave the completions."""
    if rows["model_fingerprint"].unique().to_list() != [loaded.fingerprint]:
        raise ExciseError(
            f"model {loaded.key} has changed (weights, tokenizer, chat format or precision) since the completions of "
            f"{loaded.key}|{scenario} were drawn; materialize completions of this partition again"
        )


def require_same_prompts(rows: pl.DataFrame, prompts: pl.DataFrame, loaded: "LoadedModel", scenario: Scenario) -> None:
    """Raise ExciseError when the model would read the prompts otherwise than when it gave the completions."""
    from excise.models import encoding

    encoding.require_same_prompts(encoding.encode(loaded.asked_for(scenario.outcome), prompts), rows)


# ------------------------------------------------------------------------------------------------------------- scores


def scores_of(
    warehouse: Warehouse, model: str, scenario: Scenario, scores: set[str], completions: pl.DataFrame
) -> pl.DataFrame:
    """A partition's rows of `attribution_files`.

    completions: all of the partition. Raises ExciseError unless the files are of these completions, and hold the scores
    of all variations that they can be learned from.
    """
    from excise.attribution import scored_places
    from excise.generation.answering import Answering, as_samples

    stored = warehouse.read("attribution_files", model=model, scenario=scenario.key)
    place = f"{model}|{scenario.key}"
    if not stored.is_empty() and set(stored["completions_version"]) != {data_version(completions).value}:
        raise ExciseError(
            f"the attribution scores of {place} are those of other completions; materialize attribution_scores of "
            "this partition again"
        )
    learned = completions.filter(pl.col("split") != EVALUATION)
    samples = as_samples(learned, Answering.of(learned).sample_count)
    wanted = scored_places(samples, sorted(scores), comparison=scenario.comparison, outcome=scenario.outcome)
    if lacking := set(wanted) - set(stored.select("variation", "score").iter_rows()):
        raise ExciseError(
            f"the attribution scores of {place} lack {', '.join(sorted({score for _, score in lacking}))}, which a "
            "strategy needs; materialize attribution_scores of this partition"
        )
    return stored


def score_files(stored: pl.DataFrame, artifacts: Artifacts) -> list["AttributionFile"]:
    """Rows of the table `attribution_files` as `excise.strategies.build` takes them."""
    from excise.attribution import AttributionFile

    return [
        AttributionFile(
            variation=row["variation"],
            score=row["score"],
            path=artifacts.locate(row["path"], made_by="attribution_scores"),
            bytes=row["bytes"],
            reused=True,
            seconds=0.0,
        )
        for row in stored.iter_rows(named=True)
    ]


def head_impacts_of(warehouse: Warehouse, model: str, scenario: str, completions: pl.DataFrame) -> pl.DataFrame:
    """A partition's rows of `head_impacts`. Raises ExciseError unless they are of these completions."""
    impacts = rows_of(warehouse, "head_impacts", model, scenario, made_by="head_impacts")
    if set(impacts["completions_version"]) != {data_version(completions).value}:
        raise ExciseError(
            f"the head impacts of {model}|{scenario} are those of other completions; materialize "
            "head_impacts of this partition again"
        )
    return impacts


# -------------------------------------------------------------------------------------------------------------- masks


def masks_to_ask(warehouse: Warehouse, model: str, scenario: Scenario, completions: pl.DataFrame) -> pl.DataFrame:
    """The masks of a partition under which its variations are asked, one row each; those that are one mask (as
    cross-context ones are) follow each other.

    completions: all of the partition. Masks of variations that are not asked any more, or cannot be judged, are left
    aside; there may be none at all. Raises ExciseError when there are no masks of the scenario itself though there
    should be, or some for variations without completions, or masks of one strategy made in different ways.
    """
    place = f"{model}|{scenario.key}"
    learned = completions.filter(pl.col("split") != EVALUATION)
    judged = judged_of(completions.filter(pl.col("split") != ATTRIBUTION), scenario)
    rows = warehouse.read("masks", model=model, scenario=scenario.key)
    require_one_definition(rows, again="pruning_masks and cross_context_masks")
    masks = rows.select(*MASK_COLUMNS, "asset").unique().sort("mask", *MASK_COLUMNS)
    target_masks = masks.filter(pl.col("asset") == "pruning_masks")
    if unasked := set(target_masks["variation"]) - set(completions["variation"]):
        raise ExciseError(
            f"there are masks for {', '.join(sorted(unasked))} of {place}, but no completions; materialize "
            "pruning_masks of this partition again"
        )
    looked_for = warehouse.read("mask_paths", asset="pruning_masks", model=model, scenario=scenario.key)
    if target_masks.is_empty() and looked_for.is_empty() and judged and judged_of(learned, scenario):
        raise ExciseError(f"{place} has no masks of its own; materialize pruning_masks of this partition first")
    return masks.filter(pl.col("variation").is_in(judged))


def mask_opener(artifacts: Artifacts) -> "Callable[[Mapping[str, Any]], Mask | RandomControl]":
    """A function from a row of masks (mask, path, control_seed, asset) to the mask, or to the recipe of a random
    control; of rows that are one mask one after another, read or made once."""
    from excise.interventions.kinds import recalled

    last: dict[str, Mask | RandomControl] = {}

    def opened(row: Mapping[str, Any]) -> "Mask | RandomControl":
        if row["mask"] not in last:
            mask = recalled(artifacts.locate(row["path"], made_by=row["asset"]), row["control_seed"], row["mask"])
            last.clear()
            last[row["mask"]] = mask
        return last[row["mask"]]

    return opened


def own_and_first_random(masks: pl.DataFrame) -> pl.DataFrame:
    """Of rows of masks, those of strategies and of the first random control of each strategy that is there."""
    first = pl.col("draw") == pl.col("draw").min().over(PLACE)
    strategies = pl.col("strategy").filter(pl.col("matched_to").is_null()).unique().implode()
    control = (pl.col("strategy") == RANDOM) & first & pl.col("matched_to").is_in(strategies)
    return masks.filter(pl.col("matched_to").is_null() | control)


def source_masks(
    warehouse: Warehouse,
    model: str,
    scenario: str,
    catalogue: Catalogue,
    strategies: Sequence[Strategy],
    completions: pl.DataFrame,
) -> pl.DataFrame:
    """All scenarios' prompt-specific masks of the strategies, and the scores they come from, in catalogue order; of
    measured paths the scores alone.

    The scenario's own only where a strategy has the level all_contexts. Columns: scenario, variation, strategy, path
    (of the mask), score_path. Raises ExciseError when a strategy has none in its own scenario though it needs that and
    they can be made, when some were made by other parameters than the strategy's, and when some are of another model
    than the completions.
    """
    keys = [key for key in catalogue.scenarios_like(scenario) if key != scenario] + [scenario]
    schema = dict.fromkeys(("scenario", "variation", "strategy", "path", "score_path"), pl.String)
    if not strategies:
        return pl.DataFrame(schema=schema)
    scores = warehouse.read("attribution_files", model=model, scenario=keys)
    measured = [strategy for strategy in strategies if strategy.selection == MEASURED_PATH]
    combined = [strategy for strategy in strategies if strategy not in measured]
    masks = _prompt_specific_masks(warehouse, model, keys, combined)
    by_strategy = pl.DataFrame(
        [(strategy.key, strategy.score) for strategy in strategies], schema=["strategy", "score"], orient="row"
    )
    read_from = scores.select("scenario", "variation", "score", score_path="path")
    lent = by_strategy.filter(pl.col("strategy").is_in([strategy.key for strategy in measured]))
    sources = pl.concat(
        [
            masks.join(by_strategy, on="strategy")
            .join(read_from, on=["scenario", "variation", "score"], how="left")
            .select(schema.keys()),
            read_from.join(lent, on="score").with_columns(path=pl.lit(None, pl.String)).select(schema.keys()),
        ]
    )
    asked_of_all = [strategy.key for strategy in strategies if ALL_CONTEXTS in strategy.levels]
    sources = sources.filter((pl.col("scenario") != scenario) | pl.col("strategy").is_in(asked_of_all))
    for key in asked_of_all:
        target_sources = sources.filter((pl.col("strategy") == key) & (pl.col("scenario") == scenario))
        if target_sources.is_empty() and scenario not in unjudged_scenarios(warehouse, model):
            raise ExciseError(
                f"{model}|{scenario} has no masks of {key} yet, which all_contexts needs, too; materialize "
                "pruning_masks of this partition first, or leave all_contexts out of resources.settings.config.levels"
            )
    (fingerprint,) = completions["model_fingerprint"].unique()
    used = scores.filter(pl.col("scenario").is_in(sources["scenario"].unique().to_list()))
    if changed := sorted(set(used.filter(pl.col("model_fingerprint") != fingerprint)["scenario"])):
        raise ExciseError(
            f"the masks of {', '.join(changed)} are of another version of model {model} than the completions of "
            f"{model}|{scenario}; materialize completions, attribution_scores and pruning_masks of the older ones again"
        )
    places = {key: place for place, key in enumerate(catalogue.scenarios)}
    return sources.sort(pl.col("scenario").replace_strict(places), "strategy", "variation")


def _prompt_specific_masks(
    warehouse: Warehouse, model: str, scenarios: Sequence[str], strategies: Sequence[Strategy]
) -> pl.DataFrame:
    """scenario, variation, strategy, path and definition of the strategies' own masks that others can be made of."""
    masks = warehouse.read(
        "masks",
        asset="pruning_masks",
        model=model,
        scenario=scenarios,
        level=[PROMPT_SPECIFIC, OWN_SCENARIO],
        matched_to=None,
        strategy=[strategy.key for strategy in strategies],
    )
    masks = masks.select("scenario", "variation", "strategy", "path", "definition").unique()
    require_defined_as(masks, strategies, again="pruning_masks")
    return masks


def source_files(sources: pl.DataFrame, artifacts: Artifacts) -> list["SourceMask"]:
    """Rows of `source_masks` as `excise.strategies.build` takes them."""
    from excise.strategies.build import SourceMask

    def file(path: str | None, asset: str):
        return None if path is None else artifacts.locate(path, made_by=asset)

    return [
        SourceMask(
            scenario=row["scenario"],
            variation=row["variation"],
            strategy=row["strategy"],
            mask=file(row["path"], "pruning_masks"),
            score=file(row["score_path"], "attribution_scores"),
        )
        for row in sources.iter_rows(named=True)
    ]


# ------------------------------------------------------------------------------------------------- answers under masks


def judged_answers(warehouse: Warehouse, model: str, scenario: Scenario) -> "JudgedAnswers":
    """The answers that masks are judged on, unpruned and pruned, and the table of their masks; there may be none.

    Raises ExciseError unless the pruned answers were sampled under these masks, beside these completions.
    """
    from excise.evaluation.scenario_metrics import JudgedAnswers

    everything, every_prompt = completions_of(warehouse, model, scenario.key)
    completions, prompts = without(ATTRIBUTION, everything, every_prompt)
    judged = judged_of(completions, scenario)
    asked = masks_to_ask(warehouse, model, scenario, everything)
    pruned = warehouse.read("pruned_completions", model=model, scenario=scenario.key)
    masks = warehouse.read("masks", model=model, scenario=scenario.key)
    if asked.is_empty():
        return JudgedAnswers(completions, prompts, pruned.clear(), masks.clear(), judged)
    pruned = rows_of(warehouse, "pruned_completions", model, scenario.key, made_by="pruned_completions")
    require_paired(completions, pruned, model, scenario.key)
    pruned = pruned.filter(pl.col("variation").is_in(asked["variation"].unique().implode()))
    done = (f"the pruned completions of {model}|{scenario.key} were sampled", "pruned_completions")
    _require_same_masks(pruned, masks, [*MASK, "mask"], done)
    return JudgedAnswers(completions, prompts, pruned, masks, judged)


def side_effects_of(warehouse: Warehouse, model: str, scenario: str, masks: pl.DataFrame) -> pl.DataFrame:
    """A partition's rows of `side_effects`; empty where nothing was measured.

    masks: the partition's, of the table of that name. Raises ExciseError where others were tried.
    """
    rows = warehouse.read("side_effects", model=model, scenario=scenario)
    done = (f"the side effects of {model}|{scenario} were measured", "side_effects")
    _require_same_masks(rows, masks, [*PLACE, "mask"], done)
    return rows


def _require_same_masks(rows: pl.DataFrame, masks: pl.DataFrame, named: list[str], done: tuple[str, str]) -> None:
    """Raise ExciseError where rows are about masks that are not there any more.

    named: the columns that tell masks apart. done: what was done under the masks, and what to materialize again.
    """
    changed = rows.select(named).unique().join(masks.select(named).unique(), on=named, how="anti", nulls_equal=True)
    if not changed.is_empty():
        raise ExciseError(
            f"{done[0]} under masks of {', '.join(sorted(set(changed['strategy'])))} that have changed since; "
            f"materialize {done[1]} of this partition again"
        )


def require_paired(rows: pl.DataFrame, pruned: pl.DataFrame, model: str, scenario: str) -> None:
    """Raise ExciseError unless pruned and unpruned answers are of the same model, prompts, samples and parameters."""
    asked = rows.select("prompt_id", "prompt_hash").unique()
    other = pruned.join(asked, on="prompt_id", suffix="_unpruned").filter(
        pl.col("prompt_hash").ne_missing(pl.col("prompt_hash_unpruned"))
    )
    if other.height:
        raise ExciseError(
            f"scenario {scenario}: the pruned model {model} read prompt {other['prompt_id'][0]} otherwise than the "
            "unpruned one did; materialize pruned_completions of this partition again"
        )
    pair = ["prompt_id", "parameters", "model_fingerprint"]
    if rows["probability"].null_count():
        pair.append("sample")  # enumerated answers have none in common
    if not pruned.select(pair).unique().join(rows, on=pair, how="anti").is_empty():
        raise ExciseError(
            f"the pruned completions of {model}|{scenario} do not go with its completions, which were drawn anew; "
            "materialize pruned_completions of this partition again"
        )
