"""The warehouse's tables: every column with its type and meaning, declared once.

`warehouse` creates and extends tables from these declarations, `docs/data.md` prints them, assets show them as schema.
Tables are tidy: one observation per row, columns in the field's terms. A result row can be traced to model, prompt,
mask, parameters and seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Column:
    """A column: its DuckDB type and what it holds, with the unit where there is one."""

    name: str
    type: str
    description: str


@dataclass(frozen=True)
class Table:
    """A table. `keys` are the columns that tell a partition's rows from the rest."""

    name: str
    description: str
    keys: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """The polars types of the columns, in order."""
        import polars as pl

        types = {
            "VARCHAR": pl.String(),
            "BIGINT": pl.Int64(),
            "DOUBLE": pl.Float64(),
            "BOOLEAN": pl.Boolean(),
            "TIMESTAMP": pl.Datetime("us"),
            "BIGINT[]": pl.List(pl.Int64()),
        }
        return {column.name: types[column.type] for column in self.columns}


def _columns(*rows: tuple[str, str, str]) -> tuple[Column, ...]:
    return tuple(Column(*row) for row in rows)


_MODEL = ("model", "VARCHAR", "key of the model in models.yaml")
_SCENARIO = ("scenario", "VARCHAR", "key of the scenario: the name of its file")
_VARIATION = ("variation", "VARCHAR", "variation of the scenario, for example the thing to be bought")
_COMPLETION = (
    _MODEL,
    _SCENARIO,
    _VARIATION,
    ("template", "VARCHAR", "key of the template the prompt was made from"),
    ("group", "VARCHAR", "group the named person belongs to"),
    ("subject", "VARCHAR", "the named person; intervals and tests resample subjects, not samples"),
    ("prompt_id", "VARCHAR", "16 hex digits: hash of the prompt and what it stands for"),
    ("sample", "BIGINT", "number of the sample of this prompt, from 0; enumerated answers: from the likeliest on"),
    ("text", "VARCHAR", "what the model wrote, up to the first special token"),
    ("value", "DOUBLE", "the answer in the outcome's unit, read with its prefix; null where it is no single number"),
    ("finished", "BOOLEAN", "whether the model ended its answer before the limit of new tokens"),
    ("tokens", "BIGINT", "number of tokens the model wrote, the one that ended the answer included"),
    ("token_ids", "BIGINT[]", "those tokens"),
    ("seed", "BIGINT", "seed of the draw; with prompt and sample it fixes the noise"),
    ("model_fingerprint", "VARCHAR", "16 hex digits that change with weights, tokenizer, chat format and precision"),
    ("parameters", "VARCHAR", "sampling parameters as JSON"),
    ("prompt_hash", "VARCHAR", "24 hex digits: hash of the tokens that the model read as the prompt"),
    ("probability", "DOUBLE", "enumerated answers: the answer's probability; null for samples"),
    ("leftover", "DOUBLE", "enumerated answers: mass of the prompt's answers that were not read; null for samples"),
)
_MASK = (
    ("strategy", "VARCHAR", "strategy that made the mask, or the kind of control; unpruned where there is none"),
    (
        "level",
        "VARCHAR",
        "generality: prompt_specific, within_context, cross_context (from all other scenarios), all_contexts (from "
        "those and its own), own_scenario (from all variations together) or cross_context/<key> (from one other "
        "scenario); none where nothing is pruned",
    ),
    ("matched_to", "VARCHAR", "for a control, the strategy it is a control of; null for strategies"),
    ("draw", "BIGINT", "number of the random draw of a control; 0 for strategies"),
    ("mask", "VARCHAR", "16 hex digits: fingerprint of the mask's bits"),
)

_DEFINITION = (
    "definition",
    "VARCHAR",
    "what decides the mask, as JSON: the strategy's score, selection, parameters and so on, for a control its kind, "
    "too, and the seed of what is drawn at random; null where nothing is pruned",
)
_ROLE = (
    "role",
    "VARCHAR",
    "which matrix of the layer: q, k, v, o, gate, up or down; for heads head_query (made to attend evenly) or "
    "head_output (removed)",
)
_METRIC = (
    ("metric", "VARCHAR", "name of the metric, listed above"),
    ("estimate", "DOUBLE", "the figure"),
    ("low", "DOUBLE", "lower end of the 95 % interval, subjects resampled; null where there is none"),
    ("high", "DOUBLE", "upper end of the 95 % interval; null where there is none"),
    ("p_value", "DOUBLE", "permutation test. Unpruned: of no gap (it is 0). Pruned: of the gap as unpruned"),
    ("p_holm", "DOUBLE", "the same after Holm's correction over the variations"),
    ("n", "BIGINT", "number of observations behind the estimate"),
)
_NAMES = (
    "names",
    "BIGINT",
    "names (toxicity: descriptors or templates) of the group with the fewest; below 5 low and high say little",
)
_EVALUATED = (
    _MODEL,
    _SCENARIO,
    ("variation", "VARCHAR", "variation of the scenario; (all) for a figure over all variations"),
    *_MASK[:3],
    *_METRIC,
    _NAMES,
    ("lowest", "DOUBLE", "enumerated answers: the estimate lies above this whatever was left over; else null"),
    ("highest", "DOUBLE", "enumerated answers: the estimate lies below this"),
    _DEFINITION,
)

_ALL = (
    Table(
        "prompts",
        "Every prompt of a scenario: one row per variation, template, group and subject.",
        ("scenario",),
        _columns(
            _SCENARIO,
            _VARIATION,
            ("template", "VARCHAR", "key of the template in the scenario's file"),
            ("group", "VARCHAR", "group the named person belongs to"),
            ("subject", "VARCHAR", "the named person"),
            ("gender", "VARCHAR", "gender the name is associated with; null where the file gives none"),
            ("prompt_id", "VARCHAR", "16 hex digits: hash of the prompt and what it stands for"),
            ("text", "VARCHAR", "the prompt without any chat format"),
            ("answer_prefix", "VARCHAR", "what the answer begins with, which the model continues; empty: nothing"),
            ("name_start", "BIGINT", "character offset in text where the subject begins"),
            ("name_end", "BIGINT", "character offset in text behind the subject"),
        ),
    ),
    Table(
        "completions",
        "What the unpruned model answered: one row per prompt and sample.",
        ("model", "scenario"),
        _columns(
            *_COMPLETION,
            (
                "split",
                "VARCHAR",
                "both; or, where names are held out: attribution (masks are made from the answers) or evaluation "
                "(masks are judged on them)",
            ),
            ("name_tokens", "BIGINT", "number of tokens of the subject's name in the prompt"),
            ("prompt_value", "DOUBLE", "toxicity: the same scorer's score of the prompt alone; else null"),
        ),
    ),
    Table(
        "head_impacts",
        "What removing each attention head does to perplexity and to the disparity (FASP, section 3), and the scores "
        "of the baselines: one row per head.",
        ("model", "scenario"),
        _columns(
            _MODEL,
            _SCENARIO,
            ("layer", "BIGINT", "decoder layer, from 0"),
            ("head", "BIGINT", "head of the layer, from 0"),
            ("perplexity_with", "DOUBLE", "perplexity of the text, nothing removed"),
            ("perplexity_without", "DOUBLE", "perplexity of the text without the head"),
            ("z_ppl", "DOUBLE", "perplexity_with - perplexity_without: strongly negative for a head the model needs"),
            ("z_ppl_low", "DOUBLE", "lower end of its 95 % interval, text windows resampled"),
            ("z_ppl_high", "DOUBLE", "upper end"),
            ("z_ppl_se", "DOUBLE", "its standard error"),
            ("bias_with", "DOUBLE", "disparity, nothing removed: toxicity_bias, or the mean of |SMD|"),
            (
                "bias_without",
                "DOUBLE",
                "disparity without the head; toxicity: at the noise of as many answers drawn anew",
            ),
            ("z_bias", "DOUBLE", "bias_with - bias_without: positive for a harmful head"),
            ("z_bias_low", "DOUBLE", "lower end of its 95 % interval, names (of axes: prompts) resampled"),
            ("z_bias_high", "DOUBLE", "upper end"),
            ("z_bias_half_1", "DOUBLE", "z_bias from one half of the samples"),
            ("z_bias_half_2", "DOUBLE", "z_bias from the other half"),
            ("mean_without", "DOUBLE", "mean outcome without the head"),
            ("ess", "DOUBLE", "effective share of the samples after reweighting"),
            ("ess_smallest", "DOUBLE", "the same in the group where it is smallest"),
            ("mean_weight", "DOUBLE", "mean weight of the samples; below 1 by what the unpruned model never answers"),
            ("method", "VARCHAR", "reweighted, or regenerated where too few samples were effective"),
            ("magnitude", "DOUBLE", "L2 norm of the head's weights over the largest (FASP's baseline)"),
            ("gradient", "DOUBLE", "|dL / d mask| of the language model's loss, normalised by layer (FASP's baseline)"),
            ("model_fingerprint", "VARCHAR", "fingerprint of the model"),
            ("completions_version", "VARCHAR", "hash of the completions that were reweighted"),
        ),
    ),
    Table(
        "perplexity",
        "Perplexity of a text, unpruned and under every mask: one row per mask.",
        ("model", "scenario"),
        _columns(
            _MODEL,
            _SCENARIO,
            ("mask", "VARCHAR", "fingerprint of the mask; unpruned for the model itself"),
            ("perplexity", "DOUBLE", "exp of the mean loss per token"),
            ("low", "DOUBLE", "lower end of the 95 % interval, text windows resampled"),
            ("high", "DOUBLE", "upper end"),
            ("difference", "DOUBLE", "perplexity under the mask minus unpruned, the same windows"),
            ("difference_low", "DOUBLE", "lower end of its 95 % interval, windows resampled in pairs"),
            ("difference_high", "DOUBLE", "upper end"),
            ("tokens", "BIGINT", "tokens of the text that count"),
            ("text", "VARCHAR", "the text: a file, a data set, or built-in"),
        ),
    ),
    Table(
        "reweighting",
        "Head impacts by weighing the same answers anew and by drawing them anew: one row per head measured both ways.",
        ("model", "scenario"),
        _columns(
            _MODEL,
            _SCENARIO,
            ("layer", "BIGINT", "decoder layer, from 0"),
            ("head", "BIGINT", "head of the layer, from 0"),
            ("z_reweighted", "DOUBLE", "z_bias from the unpruned model's answers, weighed anew"),
            ("low_reweighted", "DOUBLE", "lower end of its 95 % interval"),
            ("high_reweighted", "DOUBLE", "upper end"),
            ("z_regenerated", "DOUBLE", "z_bias from answers drawn without the head"),
            ("low_regenerated", "DOUBLE", "lower end of its 95 % interval"),
            ("high_regenerated", "DOUBLE", "upper end"),
            ("ess", "DOUBLE", "effective share of the samples after reweighting"),
            ("perplexity_without", "DOUBLE", "perplexity of the text without the head"),
            ("catastrophic", "BOOLEAN", "whether that is above 1.3 times the median over all heads"),
            ("seconds_reweighted", "DOUBLE", "seconds per head of the one way"),
            ("seconds_regenerated", "DOUBLE", "seconds per head of the other, in the same process"),
        ),
    ),
    Table(
        "bias_correlation",
        "How the impacts of the heads go together, between scenarios and between measures: one row per pair and "
        "statistic.",
        ("model",),
        _columns(
            _MODEL,
            _SCENARIO,
            ("measure", "VARCHAR", "z_bias"),
            ("other_scenario", "VARCHAR", "scenario it is compared with"),
            ("other_measure", "VARCHAR", "z_bias, z_ppl or the change of the mean outcome"),
            ("heads", "VARCHAR", "all, or without_catastrophic: without heads the model cannot do without"),
            ("statistic", "VARCHAR", "pearson, spearman, or the overlap of the most harmful fifth and its chance"),
            ("estimate", "DOUBLE", "the figure"),
            ("low", "DOUBLE", "lower end of the 95 % interval, heads resampled"),
            ("high", "DOUBLE", "upper end"),
            ("n", "BIGINT", "number of heads"),
        ),
    ),
    Table(
        "attribution_files",
        "Where the files of attribution scores lie: one row per variation and score.",
        ("model", "scenario"),
        _columns(
            _MODEL,
            _SCENARIO,
            _VARIATION,
            (
                "score",
                "VARCHAR",
                "what the file holds: wanda (input norms), snip (scores), attention (to the name, by head) or "
                "gap_gradient (candidates)",
            ),
            ("relabellings", "BIGINT", "random relabellings of the names whose norms the file holds, for permuted"),
            ("path", "VARCHAR", "path of the safetensors file, relative to the data folder"),
            ("sha256", "VARCHAR", "hash of the file"),
            ("bytes", "BIGINT", "size of the file in bytes"),
            ("model_fingerprint", "VARCHAR", "fingerprint of the model that was attributed"),
            ("completions_version", "VARCHAR", "hash of the completions that were attributed"),
        ),
    ),
    Table(
        "masks",
        "What each mask prunes: one row per mask and matrix, or of a mask of heads per layer. The bits lie in the file "
        "named by path; those of a random control follow from its counts and its control_seed.",
        ("asset", "model", "scenario"),
        _columns(
            ("asset", "VARCHAR", "asset that made the mask: pruning_masks or cross_context_masks"),
            _MODEL,
            _SCENARIO,
            _VARIATION,
            *_MASK,
            ("layer", "BIGINT", "decoder layer, from 0"),
            _ROLE,
            ("pruned", "BIGINT", "number of weights the mask sets to zero in this matrix, or of heads in this layer"),
            ("size", "BIGINT", "number of weights of this matrix, or of heads of this layer"),
            (
                "path",
                "VARCHAR",
                "path of a safetensors file, relative to the data folder: the mask's; of a random control with a "
                "control_seed, that of the mask it has the size of",
            ),
            ("control_seed", "BIGINT", "random control: what it is drawn by; null for a mask with a file of its own"),
            _DEFINITION,
        ),
    ),
    Table(
        "pruned_completions",
        "What the model answered under each mask, with the same noise as in completions: one row per mask, prompt "
        "and sample.",
        ("model", "scenario"),
        _columns(*_COMPLETION, *_MASK),
    ),
    Table(
        "metrics",
        "Disparity and usefulness, unpruned and under every mask, in long form: one row per mask and metric.",
        ("model", "scenario"),
        _columns(*_EVALUATED),
    ),
    Table(
        "comparisons",
        "The same metrics for other comparisons of the same answers: names of equal length, the genders, the groups "
        "within a gender.",
        ("model", "scenario"),
        _columns(
            (
                "comparison",
                "VARCHAR",
                "token_matched: the scenario's groups, names with equally many tokens; gender: men (as the majority) "
                "and women; <majority>-<minority>, men (or women): the groups within a gender",
            ),
            *_EVALUATED,
        ),
    ),
    Table(
        "restoration",
        "How far every mask brings a model back to its reference, the model it was before a bias was put in, and how "
        "far it moves that itself: one row per mask, variation and metric.",
        ("model", "scenario"),
        _columns(
            *_EVALUATED[:6],
            (
                "metric",
                "VARCHAR",
                "distance (Earth mover's distance of a name's answers from the reference's, mean over names; of "
                "logarithms where the scenario's scale is log), noise (what chance or unread answers make of that), "
                "distance_over_noise (the one less the other), restoration (1 - distance under the mask over that of "
                "the unpruned model, both less noise), restoration_over_random (less that of matched random masks), "
                "specificity (distance of the reference's answers under the mask from its own), specificity_over_noise",
            ),
            *_METRIC[1:4],
            ("names", "BIGINT", "names with answers of the group that has fewer; below 5 low and high say little"),
            ("reference", "VARCHAR", "key of the reference in models.yaml"),
            ("reason", "VARCHAR", "why the estimate is null; else null"),
            _DEFINITION,
        ),
    ),
    Table(
        "side_effects",
        "What masks do to plain text and to scenarios they were not made for: one row per mask, target and metric. "
        "Masks of strategies and the first random control of each; a mask that stands in several places has rows in "
        "each.",
        ("model", "scenario"),
        _columns(
            _MODEL,
            ("scenario", "VARCHAR", "key of the scenario the mask is made for"),
            ("variation", "VARCHAR", "variation the mask is made for"),
            *_MASK[:3],
            _MASK[4],
            (
                "target",
                "VARCHAR",
                "what the mask was tried on: text, or scenario/variation; (none) where no other scenario was to be "
                "asked",
            ),
            (
                "metric",
                "VARCHAR",
                "of text: text_kl (mean over tokens of the KL divergence of the next-token distribution from that of "
                "the unpruned model, nats) and text_perplexity_ratio (perplexity over that of the unpruned model, less "
                "1). Of a scenario, as in metrics: inlier_ratio, spread_ratio, commonest_rise, excess_change, gap_mean "
                "and gap_change",
            ),
            ("estimate", "DOUBLE", "the figure; null where it is not known"),
            ("low", "DOUBLE", "lower end of the 95 % interval, names (of text: windows) resampled; null without one"),
            ("high", "DOUBLE", "upper end of the 95 % interval"),
            ("names", "BIGINT", "names with answers of the group that has fewer; of text, windows"),
        ),
    ),
    Table(
        "grid_search",
        "What a strategy does at every pair of thresholds: one row per pair, variation and metric.",
        ("model", "scenario"),
        _columns(
            _MODEL,
            _SCENARIO,
            ("strategy", "VARCHAR", "strategy whose thresholds vary; its masks are prompt-specific"),
            ("variation", "VARCHAR", "variation of the scenario; (all) for a figure over the variations of the grid"),
            ("tau_min", "DOUBLE", "threshold of the minority's scores: a share of the weights, or a number of heads"),
            ("tau_maj", "DOUBLE", "threshold of the majority's scores: a share of the weights, or a number of heads"),
            ("density", "DOUBLE", "share of the weights (of the heads) the strategy could prune that it prunes"),
            ("metric", "VARCHAR", "gap_mean, smd, abs_smd, gap_reduction, inlier_ratio or spread_ratio"),
            *_METRIC[1:4],
            _METRIC[-1],
            _NAMES,
            ("pareto", "BOOLEAN", "whether no other pair is better in both the gap and the inlier ratio"),
            ("chosen", "BOOLEAN", "whether the rule for the best pair picks this one"),
            _DEFINITION,
        ),
    ),
    Table(
        "mask_overlap",
        "How much of one prompt-specific mask lies in another (BDB, Fig. 3): one row per pair.",
        ("model",),
        _columns(
            _MODEL,
            _MASK[0],
            _MASK[1],
            ("scenario", "VARCHAR", "scenario of the mask"),
            ("variation", "VARCHAR", "variation of the mask"),
            ("reference_scenario", "VARCHAR", "scenario of the mask it is laid upon"),
            ("reference_variation", "VARCHAR", "variation of the mask it is laid upon"),
            ("shared", "BIGINT", "number of weights (heads) in both masks"),
            ("count", "BIGINT", "number of weights (heads) in the mask"),
            ("overlap", "DOUBLE", "shared / count; null for an empty mask"),
            ("chance", "DOUBLE", "overlap of a mask without any relation: density of the mask it is laid upon"),
            ("excess", "DOUBLE", "overlap minus chance"),
            _DEFINITION,
        ),
    ),
    Table(
        "mask_distribution",
        "Where the strategies' masks lie (BDB, Fig. 4): one row per mask and matrix.",
        ("model",),
        _columns(
            _MODEL,
            _SCENARIO,
            _VARIATION,
            *_MASK[:2],
            ("layer", "BIGINT", "decoder layer, from 0"),
            _ROLE,
            ("pruned", "BIGINT", "number of weights the mask sets to zero in this matrix, or of heads in this layer"),
            ("size", "BIGINT", "number of weights of this matrix, or of heads of this layer"),
            ("share_of_matrix", "DOUBLE", "pruned / size"),
            ("share_of_mask", "DOUBLE", "pruned / all that the mask prunes; null for an empty mask"),
            _DEFINITION,
        ),
    ),
    Table(
        "transfer_matrix",
        "What masks made in one scenario do in another, over all variations: one row per pair, mask and metric.",
        ("model",),
        _columns(
            _MODEL,
            _MASK[0],
            _MASK[2],
            ("source", "VARCHAR", "scenario the masks come from; null for all scenarios but the evaluated one, pooled"),
            ("scenario", "VARCHAR", "scenario they are evaluated in"),
            ("level", "VARCHAR", "within_context where source and scenario are the same, else the cross-context level"),
            *_METRIC[:5],
            _METRIC[-1],
            _NAMES,
            _DEFINITION,
        ),
    ),
    Table(
        "thresholds",
        "The settings that a partition's results were judged by, in checks, figures and findings: one row per asset.",
        ("asset", "model", "scenario"),
        _columns(
            ("asset", "VARCHAR", "asset that judged by them: evaluation_metrics or grid_search"),
            _MODEL,
            _SCENARIO,
            ("inlier_floor", "DOUBLE", "least share of a mask's answers in the unpruned model's usual range"),
            (
                "inlier_tolerance",
                "DOUBLE",
                "largest difference of inlier ratios at which a mask is compared with its random control",
            ),
            ("spread_floor", "DOUBLE", "least spread_ratio (table metrics) of a success"),
            ("commonest_budget", "DOUBLE", "largest commonest_rise (table metrics) of a success"),
            ("change_budget", "DOUBLE", "standard deviations of change beyond what closing the gap takes"),
            ("kl_budget", "DOUBLE", "nats per token by which a mask may change the next token's distribution"),
            (
                "side_effect_budget",
                "DOUBLE",
                "standard deviations of such change in scenarios that the mask was not made for",
            ),
            ("perplexity_budget", "DOUBLE", "share by which a mask may raise perplexity"),
        ),
    ),
    Table(
        "stability",
        "Metrics of masks that were made from, and judged on, other halves of the names; split 0 is the audit itself.",
        ("model", "scenario"),
        _columns(
            _MODEL,
            _SCENARIO,
            ("split", "BIGINT", "number of the split: its seed is the audit's plus that number"),
            ("splits", "BIGINT", "number of splits"),
            ("variation", "VARCHAR", "variation, or (all)"),
            ("strategy", "VARCHAR", "strategy, or random for its control"),
            ("level", "VARCHAR", "level of generality of the mask"),
            ("matched_to", "VARCHAR", "strategy a control belongs to, else null"),
            ("metric", "VARCHAR", "a metric of the table metrics"),
            ("estimate", "DOUBLE", "its estimate on the names that this split judges by"),
            ("low", "DOUBLE", "lower end of its 95 % interval over these names"),
            ("high", "DOUBLE", "upper end of that interval"),
            ("names", "BIGINT", "names of the group that has fewer"),
        ),
    ),
    Table(
        "mask_paths",
        "Measured paths: what the names that a mask is made of answer along the way, and which place became the mask.",
        ("asset", "model", "scenario"),
        _columns(
            ("asset", "VARCHAR", "asset that follows the path: pruning_masks or cross_context_masks"),
            _MODEL,
            _SCENARIO,
            ("strategy", "VARCHAR", "strategy the path is of"),
            ("level", "VARCHAR", "level of generality of the mask"),
            ("variation", "VARCHAR", "variation the mask is for; empty where it is for all"),
            ("step", "BIGINT", "steps so far; 0 is the unpruned model"),
            ("pruned", "BIGINT", "weights or heads pruned here"),
            ("measured_on", "VARCHAR", "scenario/variation whose names were asked"),
            ("closed", "DOUBLE", "share of the gap that is closed, mean over the variations that have one"),
            ("within", "BOOLEAN", "whether the damage budgets are kept in all variations and no gap grew"),
            ("divergence", "DOUBLE", "of the answers from those without the gap, nats per name"),
            ("gap", "DOUBLE", "difference of the groups' mean outcomes; of logarithms where the scale is"),
            ("spread", "DOUBLE", "spread_ratio as in the table metrics, of the outcome on its own scale"),
            ("commonest", "DOUBLE", "commonest_rise as in the table metrics"),
            ("excess", "DOUBLE", "change of the answers beyond what closing the gap took, in standard deviations"),
            ("outside", "DOUBLE", "fall of the share of the answers that the unpruned model gives"),
            (
                "distance",
                "DOUBLE",
                "from the answers without the gap, mean over variations: divergence, and what is left of the gap",
            ),
            ("taken", "BOOLEAN", "whether the mask is this place's: the nearest one within the budgets"),
            ("reason", "VARCHAR", "why there is no mask; null where there is one"),
            ("path", "VARCHAR", "file of the path, below the data folder"),
        ),
    ),
    Table(
        "checks",
        "The latest outcome of every quality check of every partition.",
        ("asset", "model", "scenario"),
        _columns(
            ("asset", "VARCHAR", "asset the check belongs to"),
            ("check_name", "VARCHAR", "name of the check"),
            _MODEL,
            _SCENARIO,
            ("passed", "BOOLEAN", "whether the check passed"),
            ("severity", "VARCHAR", "ERROR or WARN: what a failure means"),
            ("figure", "DOUBLE", "the worst figure found"),
            ("floor", "DOUBLE", "the bound the figure was held against"),
            ("worst", "VARCHAR", "where the worst figure was found: variation and mask"),
            ("message", "VARCHAR", "the outcome in words"),
            ("checked_at", "TIMESTAMP", "time of the check, UTC"),
        ),
    ),
)

TABLES: dict[str, Table] = {table.name: table for table in _ALL}

METRICS: dict[str, str] = {
    "mean_majority": "mean answer of the majority group, in the outcome's unit",
    "mean_minority": "mean answer of the minority group",
    "median_majority": "median answer of the majority group",
    "median_minority": "median answer of the minority group",
    "gap_mean": "mean of the majority minus mean of the minority",
    "abs_gap_mean": "absolute value of gap_mean; at (all) the mean over variations, in which no gaps cancel",
    "gap_median": "median of the majority minus median of the minority",
    "smd": "standardized mean difference: gap of the means over the pooled standard deviation; null where the means "
    "differ and the deviation is 0",
    "abs_smd": "absolute standardized mean difference; at (all) the mean over variations",
    "spread_ratio": "standard deviation of a group's answers over the unpruned one of the group that had less "
    "(toxicity: its own), the smallest over groups, draws and variations; below 0.1 (toxicity: at 0) the answers "
    "collapsed and no reduction is told",
    "commonest_answer": "share of the commonest answer among all that parse, both groups together",
    "commonest_rise": "commonest_answer less its unpruned share in the group where that was larger; the largest over "
    "draws and variations",
    "excess_change": "how far answers moved beyond what closing the gap took, in unpruned standard deviations; the "
    "largest over draws and variations",
    "closed_by_majority": "share of the unpruned gap that went as the majority's mean moved towards the minority's",
    "closed_by_minority": "share of the unpruned gap that went as the minority's mean moved towards the majority's",
    "inlier_ratio": "share of answers inside the unpruned model's 5th to 95th percentile; unparsed ones are outside",
    "parse_rate": "share of answers that hold a single number",
    "judged_variations": "at (all): number of variations it is made of, those whose gap is known; n: those asked",
    "earth_movers_distance": "Earth mover's distance between the groups' answers, in the outcome's unit",
    "density": "share of the model's maskable weights that the mask prunes",
    "gap_reduction": "share of the unpruned gap of means that is gone: 1 - |gap pruned| / |gap unpruned|",
    "gap_change": "|gap unpruned| - |gap pruned|, in the outcome's unit",
    "reduction_over_random": "gap_reduction minus that of the matched random control, mean over its draws",
    "smd_reduction": "share of the unpruned |SMD| that is gone",
    "smd_reduction_over_random": "smd_reduction minus that of the matched random control",
    "leftover": "enumerated answers: mean mass of the answers that were not read",
    "sampled": "enumerated answers: share of the prompts that were sampled instead, as their answers ramble",
    "toxicity_bias": "sum over subgroups of |mean toxicity of all prompts - mean toxicity of the subgroup's| (FASP)",
    "toxicity_bias_debiased": "toxicity_bias less what sampling noise adds to it",
    "toxicity_bias_mean": "toxicity_bias over the number of subgroups",
    "toxicity_bias_relative": "toxicity_bias over mean_toxicity",
    "toxicity_bias_if_equal": "toxicity_bias if labels of subgroups did not matter: mean and 95 % of permutations",
    "all_equal_covered": "1 where toxicity_bias is not above 95 % of those permutations, else 0",
    "mean_toxicity": "mean score of the continuations",
    "mean_toxicity/<subgroup>": "mean score of the continuations about a subgroup",
    "mean_toxicity_change": "mean_toxicity pruned minus unpruned",
    "share_toxic": "share of the continuations with a score above 0.5",
    "share_scored": "share of the continuations that have a score: that are not empty",
    "prompt_toxicity_bias": "toxicity_bias of the prompts alone: the scorer's own gap",
    "prompt_mean_toxicity": "mean score of the prompts alone",
    "bias_reduction": "share of the unpruned toxicity_bias that is gone",
    "bias_change": "toxicity_bias pruned minus unpruned",
    "perplexity": "perplexity of a text (table perplexity)",
    "perplexity_ratio": "perplexity over that of the unpruned model, the same windows",
}


def data_dictionary(tables: Iterable[Table] = _ALL) -> str:
    """The tables as Markdown, as printed in `docs/data.md`."""
    parts = []
    for table in tables:
        parts += [f"### `{table.name}`", "", table.description, ""]
        parts += [f"One partition is one {' x '.join(f'`{key}`' for key in table.keys)}.", ""]
        parts += ["| column | type | meaning |", "|---|---|---|"]
        parts += [f"| `{column.name}` | {column.type} | {_cell(column.description)} |" for column in table.columns]
        parts.append("")
    return "\n".join(parts)


def metric_dictionary() -> str:
    """The names of `metrics.metric` as Markdown, as printed in `docs/data.md`."""
    rows = [f"| `{name}` | {_cell(meaning)} |" for name, meaning in METRICS.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
