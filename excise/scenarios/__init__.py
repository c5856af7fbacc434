"""Scenarios: the concrete uses of a model in which its bias is measured, each one YAML file.

Here belong the schema of those files, the loader, the built-in files with their subject sets, and the expansion of a
scenario into prompts; sampling the answers and judging them does not.
The concept is BDB, section 3: a request that names a person, many variations of it, and two groups of names; an axis
of social groups (FASP) is the same thing with more groups and a continuation in place of a number, its prompts being
written here or taken from HolisticBias.
"""

from excise.scenarios.expansion import PROMPTS_SCHEMA, expand, prompt_count
from excise.scenarios.loading import load_scenarios
from excise.scenarios.schema import (
    Comparison,
    Group,
    HolisticBias,
    Scenario,
    Subject,
    Variation,
)
from excise.scenarios.subsets import halves, held_out_split, template_halves, token_matched

__all__ = [
    "PROMPTS_SCHEMA",
    "Comparison",
    "Group",
    "HolisticBias",
    "Scenario",
    "Subject",
    "Variation",
    "expand",
    "halves",
    "held_out_split",
    "load_scenarios",
    "prompt_count",
    "template_halves",
    "token_matched",
]
