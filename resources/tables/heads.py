"""Tables about whole attention heads: what removing each does, and what a text's perplexity is under masks."""

from resources.tables.columns import MODEL, SCENARIO
from resources.tables.declaration import Column, Table

TABLES = (
    Table(
        "head_impacts",
        "What removing each attention head does to perplexity and to the disparity (FASP, section 3), and the scores "
        "of the baselines: one row per head.",
        keys=("model", "scenario"),
        rows=("layer", "head"),
        columns=(
            MODEL,
            SCENARIO,
            Column("layer", "BIGINT", "decoder layer, from 0"),
            Column("head", "BIGINT", "head of the layer, from 0"),
            Column("perplexity_with", "DOUBLE", "perplexity of the text, nothing removed"),
            Column("perplexity_without", "DOUBLE", "perplexity of the text without the head"),
            Column(
                "z_ppl", "DOUBLE", "perplexity_with - perplexity_without: strongly negative for a head the model needs"
            ),
            Column("z_ppl_low", "DOUBLE", "lower end of its 95 % interval, text windows resampled", optional=True),
            Column("z_ppl_high", "DOUBLE", "upper end", optional=True),
            Column("z_ppl_se", "DOUBLE", "its standard error", optional=True),
            Column(
                "bias_with", "DOUBLE", "disparity, nothing removed: toxicity_bias, or the mean of |SMD|", optional=True
            ),
            Column(
                "bias_without",
                "DOUBLE",
                "disparity without the head; toxicity: at the noise of as many answers drawn anew",
                optional=True,
            ),
            Column("z_bias", "DOUBLE", "bias_with - bias_without: positive for a harmful head", optional=True),
            Column(
                "z_bias_low",
                "DOUBLE",
                "lower end of its 95 % interval, names (of axes: prompts) resampled",
                optional=True,
            ),
            Column("z_bias_high", "DOUBLE", "upper end", optional=True),
            Column("z_bias_half_1", "DOUBLE", "z_bias from one half of the samples", optional=True),
            Column("z_bias_half_2", "DOUBLE", "z_bias from the other half", optional=True),
            Column("mean_without", "DOUBLE", "mean outcome without the head", optional=True),
            Column("ess", "DOUBLE", "effective share of the samples after reweighting", optional=True),
            Column("ess_smallest", "DOUBLE", "the same in the group where it is smallest", optional=True),
            Column(
                "mean_weight",
                "DOUBLE",
                "mean weight of the samples; below 1 by what the unpruned model never answers",
                optional=True,
            ),
            Column("method", "VARCHAR", "reweighted, or regenerated where too few samples were effective"),
            Column("magnitude", "DOUBLE", "L2 norm of the head's weights over the largest (FASP's baseline)"),
            Column(
                "gradient",
                "DOUBLE",
                "|dL / d mask| of the language model's loss, normalised by layer (FASP's baseline)",
            ),
            Column("model_fingerprint", "VARCHAR", "fingerprint of the model"),
            Column("completions_version", "VARCHAR", "hash of the completions that were reweighted"),
        ),
        filled=True,
    ),
    Table(
        "perplexity",
        "Perplexity of a text, unpruned and under every mask: one row per mask.",
        keys=("model", "scenario"),
        rows=("mask",),
        columns=(
            MODEL,
            SCENARIO,
            Column("mask", "VARCHAR", "fingerprint of the mask; unpruned for the model itself"),
            Column("perplexity", "DOUBLE", "exp of the mean loss per token"),
            Column("low", "DOUBLE", "lower end of the 95 % interval, text windows resampled", optional=True),
            Column("high", "DOUBLE", "upper end", optional=True),
            Column("difference", "DOUBLE", "perplexity under the mask minus unpruned, the same windows"),
            Column("difference_low", "DOUBLE", "lower end of its 95 % interval, windows resampled in pairs"),
            Column("difference_high", "DOUBLE", "upper end"),
            Column("tokens", "BIGINT", "tokens of the text that count"),
            Column("text", "VARCHAR", "the text: a file, a data set, or built-in"),
        ),
    ),
    Table(
        "reweighting",
        "Head impacts by weighing the same answers anew and by drawing them anew: one row per head measured both ways.",
        keys=("model", "scenario"),
        rows=("layer", "head"),
        columns=(
            MODEL,
            SCENARIO,
            Column("layer", "BIGINT", "decoder layer, from 0"),
            Column("head", "BIGINT", "head of the layer, from 0"),
            Column("z_reweighted", "DOUBLE", "z_bias from the unpruned model's answers, weighed anew", optional=True),
            Column("low_reweighted", "DOUBLE", "lower end of its 95 % interval", optional=True),
            Column("high_reweighted", "DOUBLE", "upper end", optional=True),
            Column("z_regenerated", "DOUBLE", "z_bias from answers drawn without the head", optional=True),
            Column("low_regenerated", "DOUBLE", "lower end of its 95 % interval", optional=True),
            Column("high_regenerated", "DOUBLE", "upper end", optional=True),
            Column("ess", "DOUBLE", "effective share of the samples after reweighting", optional=True),
            Column("perplexity_without", "DOUBLE", "perplexity of the text without the head"),
            Column(
                "catastrophic", "BOOLEAN", "whether that is above 1.3 times the median over all heads", optional=True
            ),
            Column("seconds_reweighted", "DOUBLE", "seconds per head of the one way"),
            Column("seconds_regenerated", "DOUBLE", "seconds per head of the other, in the same process"),
        ),
    ),
    Table(
        "bias_correlation",
        "How the impacts of the heads go together, between scenarios and between measures: one row per pair and "
        "statistic.",
        keys=("model",),
        rows=("scenario", "measure", "other_scenario", "other_measure", "heads", "statistic"),
        columns=(
            MODEL,
            SCENARIO,
            Column("measure", "VARCHAR", "z_bias"),
            Column("other_scenario", "VARCHAR", "scenario it is compared with"),
            Column("other_measure", "VARCHAR", "z_bias, z_ppl or the change of the mean outcome"),
            Column("heads", "VARCHAR", "all, or without_catastrophic: without heads the model cannot do without"),
            Column(
                "statistic", "VARCHAR", "pearson, spearman, or the overlap of the most harmful fifth and its chance"
            ),
            Column("estimate", "DOUBLE", "the figure", optional=True),
            Column("low", "DOUBLE", "lower end of the 95 % interval, heads resampled", optional=True),
            Column("high", "DOUBLE", "upper end", optional=True),
            Column("n", "BIGINT", "number of heads"),
        ),
    ),
)
