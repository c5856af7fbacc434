"""The jobs: which part of the lineage one click, or one command, runs for a partition.

For one scenario alone there are `audit_scenario` and `prune_and_evaluate`. The whole paper takes two rounds over the
scenarios, as cross-context masks need the masks of all others: `prepare_scenario` for each, then `evaluate_scenario`
for each, then `analyse_model`. Launch a round over all scenarios of a model as a backfill in the UI, or all of them by
`make paper`.
"""

import dagster as dg

CHAIN = (
    "completions",
    "attribution_scores",
    "pruning_masks",
    "pruned_completions",
    "restoration",
    "side_effects",
    "evaluation_metrics",
    "quality_report",
    "stability",
)
PREPARATION = CHAIN[:3]
HEADS = ("completions", "head_impacts", *CHAIN[2:])
EVALUATION = (
    "cross_context_masks",
    "pruned_completions",
    "restoration",
    "side_effects",
    "evaluation_metrics",
    "stability",
)
ANALYSIS = ("mask_overlap", "mask_distribution", "transfer_matrix", "quality_report")
CORRELATION = ("bias_correlation", "transfer_matrix", "quality_report")

# `prompts` is partitioned by scenario alone, and a job holds one kind of partition: `completions` brings it up to date.
audit_scenario = dg.define_asset_job(
    "audit_scenario",
    selection=dg.AssetSelection.assets(*CHAIN),
    description="The whole chain for one model and scenario: sample, attribute, prune, sample again, evaluate. "
    "Cross-context masks that are there already are used, none are made. "
    "It expands the prompts itself, so confirm Dagster's question about missing upstream data.",
)

prune_and_evaluate = dg.define_asset_job(
    "prune_and_evaluate",
    selection=dg.AssetSelection.assets(*CHAIN[CHAIN.index("pruning_masks") :]),
    description="From the masks on, for one model and scenario: completions and attribution scores are reused.",
)

prepare_scenario = dg.define_asset_job(
    "prepare_scenario",
    selection=dg.AssetSelection.assets(*PREPARATION),
    description="First round over the scenarios of a model: sample, attribute, and make the scenario's own masks.",
)

evaluate_scenario = dg.define_asset_job(
    "evaluate_scenario",
    selection=dg.AssetSelection.assets(*EVALUATION),
    description="Second round, when all scenarios of the model are prepared: make the masks across contexts, sample "
    "under every mask of every level, hold a planted model against the model it was before, try masks on text and "
    "other scenarios, evaluate, and repeat masks and judgement on other splits of the names.",
)

prune_heads = dg.define_asset_job(
    "prune_heads",
    selection=dg.AssetSelection.assets(*HEADS),
    description="The second paper's chain for one model and scenario: sample, measure what every attention head does "
    "to the disparity and to perplexity, prune heads, sample again, evaluate.",
)

prepare_heads = dg.define_asset_job(
    "prepare_heads",
    selection=dg.AssetSelection.assets(*HEADS[: HEADS.index("pruning_masks") + 1]),
    description="First round over several axes: sample, measure every attention head, and make the axis' own masks. "
    "`evaluate_scenario` is the second round.",
)

search_grid = dg.define_asset_job(
    "search_grid",
    selection=dg.AssetSelection.assets("grid_search"),
    description="Every pair of thresholds for a prepared scenario: heat maps, front and choice. Points that were "
    "sampled before cost nothing.",
)

analyse_model = dg.define_asset_job(
    "analyse_model",
    selection=dg.AssetSelection.assets(*ANALYSIS),
    description="Over all evaluated scenarios of a model: overlap and distribution of the masks, the transfer matrix, "
    "and the roll-up of all checks.",
)

correlate_heads = dg.define_asset_job(
    "correlate_heads",
    selection=dg.AssetSelection.assets(*CORRELATION),
    description="Over all scenarios of a model with head impacts: do the same heads harm on several axes?",
)

JOBS = (
    audit_scenario,
    prune_and_evaluate,
    prepare_scenario,
    evaluate_scenario,
    prune_heads,
    prepare_heads,
    search_grid,
    analyse_model,
    correlate_heads,
)
