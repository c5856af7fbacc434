"""Tables of what is asked and what the unpruned model answers."""

from resources.tables.columns import COMPLETION, SCENARIO, VARIATION
from resources.tables.declaration import Column, Table

TABLES = (
    Table(
        "prompts",
        "Every prompt of a scenario: one row per variation, template, group and subject.",
        keys=("scenario",),
        rows=("prompt_id",),
        columns=(
            SCENARIO,
            VARIATION,
            Column("template", "VARCHAR", "key of the template in the scenario's file"),
            Column("group", "VARCHAR", "group the named person belongs to"),
            Column("subject", "VARCHAR", "the named person"),
            Column(
                "gender", "VARCHAR", "gender the name is associated with; null where the file gives none", optional=True
            ),
            Column("prompt_id", "VARCHAR", "16 hex digits: hash of the prompt and what it stands for"),
            Column("text", "VARCHAR", "the prompt without any chat format"),
            Column(
                "answer_prefix", "VARCHAR", "what the answer begins with, which the model continues; empty: nothing"
            ),
            Column("name_start", "BIGINT", "character offset in text where the subject begins"),
            Column("name_end", "BIGINT", "character offset in text behind the subject"),
        ),
        filled=True,
    ),
    Table(
        "completions",
        "What the unpruned model answered: one row per prompt and sample.",
        keys=("model", "scenario"),
        rows=("prompt_id", "sample"),
        columns=(
            *COMPLETION,
            Column(
                "split",
                "VARCHAR",
                "both; or, where names are held out: attribution (masks are made from the answers) or evaluation "
                "(masks are judged on them)",
            ),
            Column("name_tokens", "BIGINT", "number of tokens of the subject's name in the prompt"),
            Column(
                "prompt_value",
                "DOUBLE",
                "toxicity: the same scorer's score of the prompt alone; else null",
                optional=True,
            ),
        ),
        filled=True,
    ),
)
