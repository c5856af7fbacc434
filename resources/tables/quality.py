"""Tables of what results were judged by, and of what the checks say."""

from resources.tables.columns import MODEL, SCENARIO
from resources.tables.declaration import Column, Table

TABLES = (
    Table(
        "thresholds",
        "The settings that a partition's results were judged by, in checks, figures and findings: one row per asset.",
        keys=("asset", "model", "scenario"),
        rows=(),
        columns=(
            Column("asset", "VARCHAR", "asset that judged by them: evaluation_metrics or grid_search"),
            MODEL,
            SCENARIO,
            Column("inlier_floor", "DOUBLE", "least share of a mask's answers in the unpruned model's usual range"),
            Column(
                "inlier_tolerance",
                "DOUBLE",
                "largest difference of inlier ratios at which a mask is compared with its random control",
            ),
            Column("spread_floor", "DOUBLE", "least spread_ratio (table metrics) of a success"),
            Column("commonest_budget", "DOUBLE", "largest commonest_rise (table metrics) of a success"),
            Column("change_budget", "DOUBLE", "standard deviations of change beyond what closing the gap takes"),
            Column("kl_budget", "DOUBLE", "nats per token by which a mask may change the next token's distribution"),
            Column(
                "side_effect_budget",
                "DOUBLE",
                "standard deviations of such change in scenarios that the mask was not made for",
            ),
            Column("perplexity_budget", "DOUBLE", "share by which a mask may raise perplexity"),
        ),
        filled=True,
    ),
    Table(
        "checks",
        "The latest outcome of every quality check of every partition.",
        keys=("asset", "model", "scenario"),
        rows=("check_name",),
        columns=(
            Column("asset", "VARCHAR", "asset the check belongs to"),
            Column("check_name", "VARCHAR", "name of the check"),
            MODEL,
            SCENARIO,
            Column("passed", "BOOLEAN", "whether the check passed"),
            Column("severity", "VARCHAR", "ERROR or WARN: what a failure means"),
            Column("figure", "DOUBLE", "the worst figure found", optional=True),
            Column("floor", "DOUBLE", "the bound the figure was held against", optional=True),
            Column("worst", "VARCHAR", "where the worst figure was found: variation and mask", optional=True),
            Column("message", "VARCHAR", "the outcome in words"),
            Column("checked_at", "TIMESTAMP", "time of the check, UTC"),
        ),
    ),
)
