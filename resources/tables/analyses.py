"""Tables over all scenarios of a model."""

from resources.tables.columns import DEFINITION, MASK_COLUMNS, METRIC, MODEL, NAMES, ROLE, SCENARIO, VARIATION
from resources.tables.declaration import Column, Table

TABLES = (
    Table(
        "mask_overlap",
        "How much of one prompt-specific mask lies in another (BDB, Fig. 3): one row per pair.",
        keys=("model",),
        rows=("strategy", "level", "scenario", "variation", "reference_scenario", "reference_variation"),
        columns=(
            MODEL,
            MASK_COLUMNS[0],
            MASK_COLUMNS[1],
            Column("scenario", "VARCHAR", "scenario of the mask"),
            Column("variation", "VARCHAR", "variation of the mask"),
            Column("reference_scenario", "VARCHAR", "scenario of the mask it is laid upon"),
            Column("reference_variation", "VARCHAR", "variation of the mask it is laid upon"),
            Column("shared", "BIGINT", "number of weights (heads) in both masks"),
            Column("count", "BIGINT", "number of weights (heads) in the mask"),
            Column("overlap", "DOUBLE", "shared / count; null for an empty mask", optional=True),
            Column("chance", "DOUBLE", "overlap of a mask without any relation: density of the mask it is laid upon"),
            Column("excess", "DOUBLE", "overlap minus chance", optional=True),
            DEFINITION,
        ),
    ),
    Table(
        "mask_distribution",
        "Where the strategies' masks lie (BDB, Fig. 4): one row per mask and matrix.",
        keys=("model",),
        rows=("scenario", "variation", "strategy", "level", "layer", "role"),
        columns=(
            MODEL,
            SCENARIO,
            VARIATION,
            *MASK_COLUMNS[:2],
            Column("layer", "BIGINT", "decoder layer, from 0"),
            ROLE,
            Column(
                "pruned", "BIGINT", "number of weights the mask sets to zero in this matrix, or of heads in this layer"
            ),
            Column("size", "BIGINT", "number of weights of this matrix, or of heads of this layer"),
            Column("share_of_matrix", "DOUBLE", "pruned / size"),
            Column(
                "share_of_mask", "DOUBLE", "pruned / all that the mask prunes; null for an empty mask", optional=True
            ),
            DEFINITION,
        ),
    ),
    Table(
        "transfer_matrix",
        "What masks made in one scenario do in another, over all variations: one row per pair, mask and metric.",
        keys=("model",),
        rows=("strategy", "matched_to", "source", "scenario", "level", "metric"),
        columns=(
            MODEL,
            MASK_COLUMNS[0],
            MASK_COLUMNS[2],
            Column(
                "source",
                "VARCHAR",
                "scenario the masks come from; null for all scenarios but the evaluated one, pooled",
                optional=True,
            ),
            Column("scenario", "VARCHAR", "scenario they are evaluated in"),
            Column(
                "level",
                "VARCHAR",
                "within_context where source and scenario are the same, else the cross-context level",
            ),
            *METRIC[:5],
            METRIC[-1],
            NAMES,
            DEFINITION,
        ),
    ),
)
