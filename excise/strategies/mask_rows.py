"""What named masks prune, as rows of counts, and what defines them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from excise.interventions.controls import RandomControl
from excise.strategies.build import NamedMask
from excise.strategies.config import Strategy


def counted(named: NamedMask) -> list[dict[str, Any]]:
    """One row per matrix (for heads: per layer) of a mask: which mask, layer, role, and how much of it is pruned."""
    control_seed = named.mask.seed if isinstance(named.mask, RandomControl) else None
    rows = []
    for key, pruned in named.mask.counts().items():
        layer, role = key.split(".")
        out_features, in_features = named.mask.shapes[key]
        rows.append(
            {
                "variation": named.variation,
                "strategy": named.strategy,
                "level": named.level,
                "matched_to": named.matched_to,
                "draw": named.draw,
                "mask": named.mask.fingerprint,
                "layer": int(layer),
                "role": role,
                "pruned": pruned,
                "size": out_features * in_features,
                "control_seed": control_seed,
            }
        )
    return rows


def definition_of(named: NamedMask, strategies: Sequence[Strategy], seed: int) -> str:
    """The definition of a mask: that of its strategy, or for a control of the strategy it is a control of."""
    strategy = next(strategy for strategy in strategies if strategy.key == (named.matched_to or named.strategy))
    return strategy.definition(None if named.matched_to is None else named.strategy, seed)
