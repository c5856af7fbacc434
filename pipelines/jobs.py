"""The jobs: which part of the lineage one click, or one command, runs for a partition `model|scenario`."""

import dagster as dg

CHAIN = (
    "completions",
    "attribution_scores",
    "pruning_masks",
    "pruned_completions",
    "evaluation_metrics",
    "quality_report",
)

# `prompts` is partitioned by scenario alone, and a job holds one kind of partition: `completions` brings it up to date.
audit_scenario = dg.define_asset_job(
    "audit_scenario",
    selection=dg.AssetSelection.assets(*CHAIN),
    description="The whole chain for one model and scenario: sample, attribute, prune, sample again, evaluate. "
    "It expands the prompts itself, so confirm Dagster's question about missing upstream data.",
)

prune_and_evaluate = dg.define_asset_job(
    "prune_and_evaluate",
    selection=dg.AssetSelection.assets(*CHAIN[CHAIN.index("pruning_masks") :]),
    description="From the masks on, for one model and scenario: completions and attribution scores are reused.",
)

JOBS = (audit_scenario, prune_and_evaluate)
