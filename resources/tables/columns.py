"""Columns that stand in several tables, declared once."""

from dataclasses import replace

from resources.tables.declaration import Column

MODEL = Column("model", "VARCHAR", "key of the model in models.yaml")
SCENARIO = Column("scenario", "VARCHAR", "key of the scenario: the name of its file")
VARIATION = Column("variation", "VARCHAR", "variation of the scenario, for example the thing to be bought")
COMPLETION = (
    MODEL,
    SCENARIO,
    VARIATION,
    Column("template", "VARCHAR", "key of the template the prompt was made from"),
    Column("group", "VARCHAR", "group the named person belongs to"),
    Column("subject", "VARCHAR", "the named person; intervals and tests resample subjects, not samples"),
    Column("prompt_id", "VARCHAR", "16 hex digits: hash of the prompt and what it stands for"),
    Column(
        "sample", "BIGINT", "number of the sample of this prompt, from 0; enumerated answers: from the likeliest on"
    ),
    Column("text", "VARCHAR", "what the model wrote, up to the first special token"),
    Column(
        "value",
        "DOUBLE",
        "the answer in the outcome's unit, read with its prefix; null where it is no single number",
        optional=True,
    ),
    Column("finished", "BOOLEAN", "whether the model ended its answer before the limit of new tokens"),
    Column("tokens", "BIGINT", "number of tokens the model wrote, the one that ended the answer included"),
    Column("token_ids", "BIGINT[]", "those tokens"),
    Column("seed", "BIGINT", "seed of the draw; with prompt and sample it fixes the noise"),
    Column(
        "model_fingerprint", "VARCHAR", "16 hex digits that change with weights, tokenizer, chat format and precision"
    ),
    Column("parameters", "VARCHAR", "sampling parameters as JSON"),
    Column("prompt_hash", "VARCHAR", "24 hex digits: hash of the tokens that the model read as the prompt"),
    Column("probability", "DOUBLE", "enumerated answers: the answer's probability; null for samples", optional=True),
    Column(
        "leftover",
        "DOUBLE",
        "enumerated answers: mass of the prompt's answers that were not read; null for samples",
        optional=True,
    ),
)
MASK_COLUMNS = (
    Column("strategy", "VARCHAR", "strategy that made the mask, or the kind of control; unpruned where there is none"),
    Column(
        "level",
        "VARCHAR",
        "generality: prompt_specific, within_context, cross_context (from all other scenarios), all_contexts (from "
        "those and its own), own_scenario (from all variations together) or cross_context/<key> (from one other "
        "scenario); none where nothing is pruned",
    ),
    Column(
        "matched_to", "VARCHAR", "for a control, the strategy it is a control of; null for strategies", optional=True
    ),
    Column("draw", "BIGINT", "number of the random draw of a control; 0 for strategies"),
    Column("mask", "VARCHAR", "16 hex digits: fingerprint of the mask's bits"),
)
DEFINITION = Column(
    "definition",
    "VARCHAR",
    "what decides the mask, as JSON: the strategy's score, selection, parameters and so on, for a control its kind, "
    "too, and the seed of what is drawn at random; null where nothing is pruned",
)
DEFINITION_IF_PRUNED = replace(DEFINITION, optional=True)
ROLE = Column(
    "role",
    "VARCHAR",
    "which matrix of the layer: q, k, v, o, gate, up or down; for heads head_query (made to attend evenly) or "
    "head_output (removed)",
)
METRIC = (
    Column("metric", "VARCHAR", "name of the metric, listed above"),
    Column("estimate", "DOUBLE", "the figure", optional=True),
    Column(
        "low", "DOUBLE", "lower end of the 95 % interval, subjects resampled; null where there is none", optional=True
    ),
    Column("high", "DOUBLE", "upper end of the 95 % interval; null where there is none", optional=True),
    Column(
        "p_value",
        "DOUBLE",
        "permutation test. Unpruned: of no gap (it is 0). Pruned: of the gap as unpruned",
        optional=True,
    ),
    Column("p_holm", "DOUBLE", "the same after Holm's correction over the variations", optional=True),
    Column("n", "BIGINT", "number of observations behind the estimate"),
)
NAMES = Column(
    "names",
    "BIGINT",
    "names (toxicity: descriptors or templates) of the group with the fewest; below 5 low and high say little",
    optional=True,
)
EVALUATED = (
    MODEL,
    SCENARIO,
    Column("variation", "VARCHAR", "variation of the scenario; (all) for a figure over all variations"),
    *MASK_COLUMNS[:3],
    *METRIC,
    NAMES,
    Column(
        "lowest",
        "DOUBLE",
        "enumerated answers: the estimate lies above this whatever was left over; else null",
        optional=True,
    ),
    Column("highest", "DOUBLE", "enumerated answers: the estimate lies below this", optional=True),
    DEFINITION_IF_PRUNED,
)
