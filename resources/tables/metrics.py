"""Tables of what masks do: to the scenario they are made for, to others, on other names, at other thresholds."""

from excise.conditions import PLACE
from resources.tables.columns import (
    DEFINITION,
    DEFINITION_IF_PRUNED,
    EVALUATED,
    MASK_COLUMNS,
    METRIC,
    MODEL,
    NAMES,
    SCENARIO,
)
from resources.tables.declaration import Column, Table

TABLES = (
    Table(
        "metrics",
        "Disparity and usefulness, unpruned and under every mask, in long form: one row per mask and metric.",
        keys=("model", "scenario"),
        rows=(*PLACE, "metric"),
        columns=EVALUATED,
        filled=True,
    ),
    Table(
        "comparisons",
        "The same metrics for other comparisons of the same answers: names of equal length, the genders, the groups "
        "within a gender.",
        keys=("model", "scenario"),
        rows=("comparison", *PLACE, "metric"),
        columns=(
            Column(
                "comparison",
                "VARCHAR",
                "token_matched: the scenario's groups, names with equally many tokens; gender: men (as the majority) "
                "and women; <majority>-<minority>, men (or women): the groups within a gender",
            ),
            *EVALUATED,
        ),
    ),
    Table(
        "restoration",
        "How far every mask brings a model back to its reference, the model it was before a bias was put in, and how "
        "far it moves that itself: one row per mask, variation and metric.",
        keys=("model", "scenario"),
        rows=(*PLACE, "metric"),
        columns=(
            *EVALUATED[:6],
            Column(
                "metric",
                "VARCHAR",
                "distance (Earth mover's distance of a name's answers from the reference's, mean over names; of "
                "logarithms where the scenario's scale is log), noise (what chance or unread answers make of that), "
                "distance_over_noise (the one less the other), restoration (1 - distance under the mask over that of "
                "the unpruned model, both less noise), restoration_over_random (less that of matched random masks), "
                "specificity (distance of the reference's answers under the mask from its own), specificity_over_noise",
            ),
            *METRIC[1:4],
            Column(
                "names",
                "BIGINT",
                "names with answers of the group that has fewer; below 5 low and high say little",
                optional=True,
            ),
            Column("reference", "VARCHAR", "key of the reference in models.yaml"),
            Column("reason", "VARCHAR", "why the estimate is null; else null", optional=True),
            DEFINITION_IF_PRUNED,
        ),
    ),
    Table(
        "side_effects",
        "What masks do to plain text and to scenarios they were not made for: one row per mask, target and metric. "
        "Masks of strategies and the first random control of each; a mask that stands in several places has rows in "
        "each.",
        keys=("model", "scenario"),
        rows=(*PLACE, "target", "metric"),
        columns=(
            MODEL,
            Column("scenario", "VARCHAR", "key of the scenario the mask is made for"),
            Column("variation", "VARCHAR", "variation the mask is made for"),
            *MASK_COLUMNS[:3],
            MASK_COLUMNS[4],
            Column(
                "target",
                "VARCHAR",
                "what the mask was tried on: text, or scenario/variation; (none) where no other scenario was to be "
                "asked",
            ),
            Column(
                "metric",
                "VARCHAR",
                "of text: text_kl (mean over tokens of the KL divergence of the next-token distribution from that of "
                "the unpruned model, nats) and text_perplexity_ratio (perplexity over that of the unpruned model, less "
                "1). Of a scenario, as in metrics: inlier_ratio, spread_ratio, commonest_rise, excess_change, gap_mean "
                "and gap_change",
            ),
            Column("estimate", "DOUBLE", "the figure; null where it is not known", optional=True),
            Column(
                "low",
                "DOUBLE",
                "lower end of the 95 % interval, names (of text: windows) resampled; null without one",
                optional=True,
            ),
            Column("high", "DOUBLE", "upper end of the 95 % interval", optional=True),
            Column(
                "names", "BIGINT", "names with answers of the group that has fewer; of text, windows", optional=True
            ),
        ),
    ),
    Table(
        "stability",
        "Metrics of masks that were made from, and judged on, other halves of the names; split 0 is the audit itself.",
        keys=("model", "scenario"),
        rows=("split", *PLACE, "metric"),
        columns=(
            MODEL,
            SCENARIO,
            Column("split", "BIGINT", "number of the split: its seed is the audit's plus that number"),
            Column("splits", "BIGINT", "number of splits"),
            Column("variation", "VARCHAR", "variation, or (all)"),
            Column("strategy", "VARCHAR", "strategy, or random for its control"),
            Column("level", "VARCHAR", "level of generality of the mask"),
            Column("matched_to", "VARCHAR", "strategy a control belongs to, else null", optional=True),
            Column("metric", "VARCHAR", "a metric of the table metrics"),
            Column("estimate", "DOUBLE", "its estimate on the names that this split judges by", optional=True),
            Column("low", "DOUBLE", "lower end of its 95 % interval over these names", optional=True),
            Column("high", "DOUBLE", "upper end of that interval", optional=True),
            Column("names", "BIGINT", "names of the group that has fewer", optional=True),
        ),
    ),
    Table(
        "grid_search",
        "What a strategy does at every pair of thresholds: one row per pair, variation and metric.",
        keys=("model", "scenario"),
        rows=("strategy", "variation", "tau_min", "tau_maj", "metric"),
        columns=(
            MODEL,
            SCENARIO,
            Column("strategy", "VARCHAR", "strategy whose thresholds vary; its masks are prompt-specific"),
            Column(
                "variation", "VARCHAR", "variation of the scenario; (all) for a figure over the variations of the grid"
            ),
            Column(
                "tau_min", "DOUBLE", "threshold of the minority's scores: a share of the weights, or a number of heads"
            ),
            Column(
                "tau_maj", "DOUBLE", "threshold of the majority's scores: a share of the weights, or a number of heads"
            ),
            Column("density", "DOUBLE", "share of the weights (of the heads) the strategy could prune that it prunes"),
            Column("metric", "VARCHAR", "gap_mean, smd, abs_smd, gap_reduction, inlier_ratio or spread_ratio"),
            *METRIC[1:4],
            METRIC[-1],
            NAMES,
            Column("pareto", "BOOLEAN", "whether no other pair is better in both the gap and the inlier ratio"),
            Column("chosen", "BOOLEAN", "whether the rule for the best pair picks this one"),
            DEFINITION,
        ),
    ),
)
