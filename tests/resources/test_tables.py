"""The documentation of the data is that of the declared tables."""

from pathlib import Path

import polars as pl
import pytest

from excise.evaluation import grid
from excise.evaluation.comparisons import COMPARISONS_SCHEMA
from excise.evaluation.restoration import RESTORATION_SCHEMA
from excise.evaluation.rows import SCHEMA
from excise.evaluation.side_effects import SIDE_EFFECTS_SCHEMA
from excise.evaluation.stability import STABILITY_SCHEMA
from excise.generation.answering import EXACT_SCHEMA
from excise.scenarios import PROMPTS_SCHEMA
from resources.tables import TABLES, data_dictionary, metric_dictionary

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")

DEFINITION = {"definition": pl.String}


def test_docs_data_md_describes_every_table_and_metric():
    assert data_dictionary().strip() in DOCUMENT
    assert metric_dictionary() in DOCUMENT


@pytest.mark.parametrize(
    ("table", "schema"),
    [
        ("prompts", PROMPTS_SCHEMA),
        # split, name_tokens and the definition of a mask are added by the asset
        (
            "completions",
            {**EXACT_SCHEMA, "split": pl.String, "name_tokens": pl.Int64, "prompt_value": pl.Float64},
        ),
        ("metrics", {**SCHEMA, **DEFINITION}),
        ("comparisons", {**COMPARISONS_SCHEMA, **DEFINITION}),
        ("restoration", {**RESTORATION_SCHEMA, **DEFINITION}),
        ("side_effects", SIDE_EFFECTS_SCHEMA),
        ("stability", STABILITY_SCHEMA),
        ("grid_search", {**grid.SCHEMA, **DEFINITION}),
    ],
)
def test_tables_are_typed_as_the_science_makes_them(table, schema):
    assert dict(TABLES[table].schema) == {
        name: kind() if isinstance(kind, type) else kind for name, kind in schema.items()
    }
