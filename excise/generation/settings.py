"""How answers are made, as the column `parameters` of their rows says it in JSON, and as the cache is addressed by it.

How answers are drawn and trees are read is in `excise.generation.sampling` and `enumeration`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from excise.generation.sampling import SamplingParameters

EXACT_SETTINGS = ("answers", "leftover", "max_nodes", "samples")
"""What the column `parameters` of enumerated answers holds beside the sampling parameters."""


@dataclass(frozen=True)
class Enumeration:
    """How far answer trees are read: leftover mass at most, prefixes per prompt at most (`answer_distributions`)."""

    leftover: float = 0.01
    max_nodes: int = 256


def exact_settings(parameters: SamplingParameters, enumeration: Enumeration, samples: int | None) -> str:
    """The column `parameters` of enumerated answers, JSON. samples: of a prompt that rambles, None where it is kept."""
    how = ("exact", enumeration.leftover, enumeration.max_nodes, samples)
    return json.dumps(asdict(parameters) | dict(zip(EXACT_SETTINGS, how, strict=True)), sort_keys=True)


def sampling_settings(settings: str) -> str:
    """The sampling parameters alone of a value of the column `parameters`, JSON."""
    known = json.loads(settings)
    return json.dumps({name: value for name, value in known.items() if name not in EXACT_SETTINGS}, sort_keys=True)


def enumeration_settings(settings: str) -> str:
    """The parameters of answers enumerated as usual (`Enumeration`) in the place of those of `settings`, JSON both."""
    usual = asdict(Enumeration()) | {"answers": "exact"}
    return json.dumps(json.loads(sampling_settings(settings)) | usual, sort_keys=True)


def tree_settings(settings: str) -> str:
    """What decides an enumerated tree, of a value of the column `parameters`, JSON: nothing is drawn, so neither the
    seed nor the number of samples does."""
    known = json.loads(settings)
    return json.dumps({name: value for name, value in known.items() if name not in ("seed", "samples")}, sort_keys=True)
