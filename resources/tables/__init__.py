"""The warehouse's tables: every column with its type and meaning, declared once, a module per part of the lineage.

`warehouse` creates and extends tables from these declarations, `docs/data.md` prints them, assets show them as schema,
and a check holds what is stored against them. Tables are tidy: one observation per row, columns in the field's terms; a
result row can be traced to model, prompt, mask, parameters and seed.
"""

from collections.abc import Iterable

from resources.tables import analyses, answers, heads, masks, metrics, quality
from resources.tables.declaration import Column, Table

__all__ = ["METRICS", "TABLES", "Column", "Table", "data_dictionary", "metric_dictionary"]

TABLES: dict[str, Table] = {
    table.name: table for module in (answers, heads, masks, metrics, analyses, quality) for table in module.TABLES
}

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


def data_dictionary(tables: Iterable[Table] = TABLES.values()) -> str:
    """The tables as Markdown, as printed in `docs/data.md`."""
    parts = []
    for table in tables:
        parts += [f"### `{table.name}`", "", table.description, ""]
        rows = f" Its rows are told apart by {', '.join(f'`{name}`' for name in table.rows)}." if table.rows else ""
        parts += [f"One partition is one {' x '.join(f'`{key}`' for key in table.keys)}.{rows}", ""]
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
