"""Audits social bias in causal language models, prunes the weights that carry it, and measures what that did.

The science of the project, usable without Dagster: scenarios, sampling, attribution, masks, metrics. The stages, their
storage and their schedule live in `assets`, `resources` and `pipelines`.

What a notebook wants stands here, and is imported when it is first asked for: `excise.standardized_mean_difference`.
"""

from importlib import import_module

_PLACES = {
    "ExciseError": "excise.errors",
    "fasp": "excise.strategies.selection",
    "inlier_ratio": "excise.evaluation.metrics",
    "load_model": "excise.models.loading",
    "load_scenarios": "excise.scenarios",
    "overlap_fraction": "excise.evaluation.overlap",
    "parse_number": "excise.outcomes.answers",
    "set_difference": "excise.strategies.selection",
    "standardized_mean_difference": "excise.evaluation.metrics",
    "toxicity_bias": "excise.evaluation.metrics",
}
__all__ = list(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'excise' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
