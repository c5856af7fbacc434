"""Tables of what masks are made from, of what they prune, and of the answers under them."""

from excise.conditions import MASK
from resources.tables.columns import COMPLETION, DEFINITION, MASK_COLUMNS, MODEL, ROLE, SCENARIO, VARIATION
from resources.tables.declaration import Column, Table

TABLES = (
    Table(
        "attribution_files",
        "Where the files of attribution scores lie: one row per variation and score.",
        keys=("model", "scenario"),
        rows=("variation", "score"),
        columns=(
            MODEL,
            SCENARIO,
            VARIATION,
            Column(
                "score",
                "VARCHAR",
                "what the file holds: wanda (input norms), snip (scores), attention (to the name, by head) or "
                "gap_gradient (candidates)",
            ),
            Column(
                "relabellings", "BIGINT", "random relabellings of the names whose norms the file holds, for permuted"
            ),
            Column("path", "VARCHAR", "path of the safetensors file, relative to the data folder"),
            Column("sha256", "VARCHAR", "hash of the file"),
            Column("bytes", "BIGINT", "size of the file in bytes"),
            Column("model_fingerprint", "VARCHAR", "fingerprint of the model that was attributed"),
            Column("completions_version", "VARCHAR", "hash of the completions that were attributed"),
        ),
    ),
    Table(
        "masks",
        "What each mask prunes: one row per mask and matrix, or of a mask of heads per layer. The bits lie in the file "
        "named by path; those of a random control follow from its counts and its control_seed.",
        keys=("asset", "model", "scenario"),
        rows=(*MASK, "layer", "role"),
        columns=(
            Column("asset", "VARCHAR", "asset that made the mask: pruning_masks or cross_context_masks"),
            MODEL,
            SCENARIO,
            VARIATION,
            *MASK_COLUMNS,
            Column("layer", "BIGINT", "decoder layer, from 0"),
            ROLE,
            Column(
                "pruned", "BIGINT", "number of weights the mask sets to zero in this matrix, or of heads in this layer"
            ),
            Column("size", "BIGINT", "number of weights of this matrix, or of heads of this layer"),
            Column(
                "path",
                "VARCHAR",
                "path of a safetensors file, relative to the data folder: the mask's; of a random control with a "
                "control_seed, that of the mask it has the size of",
            ),
            Column(
                "control_seed",
                "BIGINT",
                "random control: what it is drawn by; null for a mask with a file of its own",
                optional=True,
            ),
            DEFINITION,
        ),
    ),
    Table(
        "mask_paths",
        "Measured paths: what the names that a mask is made of answer along the way, and which place became the mask.",
        keys=("asset", "model", "scenario"),
        rows=("strategy", "level", "variation", "step", "measured_on"),
        columns=(
            Column("asset", "VARCHAR", "asset that follows the path: pruning_masks or cross_context_masks"),
            MODEL,
            SCENARIO,
            Column("strategy", "VARCHAR", "strategy the path is of"),
            Column("level", "VARCHAR", "level of generality of the mask"),
            Column("variation", "VARCHAR", "variation the mask is for; empty where it is for all"),
            Column("step", "BIGINT", "steps so far; 0 is the unpruned model"),
            Column("pruned", "BIGINT", "weights or heads pruned here"),
            Column("measured_on", "VARCHAR", "scenario/variation whose names were asked"),
            Column(
                "closed",
                "DOUBLE",
                "share of the gap that is closed, mean over the variations that have one",
                optional=True,
            ),
            Column("within", "BOOLEAN", "whether the damage budgets are kept in all variations and no gap grew"),
            Column("divergence", "DOUBLE", "of the answers from those without the gap, nats per name", optional=True),
            Column(
                "gap",
                "DOUBLE",
                "difference of the groups' mean outcomes; of logarithms where the scale is",
                optional=True,
            ),
            Column(
                "spread",
                "DOUBLE",
                "spread_ratio as in the table metrics, of the outcome on its own scale",
                optional=True,
            ),
            Column("commonest", "DOUBLE", "commonest_rise as in the table metrics", optional=True),
            Column(
                "excess",
                "DOUBLE",
                "change of the answers beyond what closing the gap took, in standard deviations",
                optional=True,
            ),
            Column(
                "outside", "DOUBLE", "fall of the share of the answers that the unpruned model gives", optional=True
            ),
            Column(
                "distance",
                "DOUBLE",
                "from the answers without the gap, mean over variations: divergence, and what is left of the gap",
                optional=True,
            ),
            Column("taken", "BOOLEAN", "whether the mask is this place's: the nearest one within the budgets"),
            Column("reason", "VARCHAR", "why there is no mask; null where there is one", optional=True),
            Column("path", "VARCHAR", "file of the path, below the data folder"),
        ),
    ),
    Table(
        "pruned_completions",
        "What the model answered under each mask, with the same noise as in completions: one row per mask, prompt "
        "and sample.",
        keys=("model", "scenario"),
        rows=(*MASK, "prompt_id", "sample"),
        columns=(*COMPLETION, *MASK_COLUMNS),
    ),
)
