"""Audits social bias in causal language models, prunes the weights that carry it, and measures what that did.

The science of the project, usable without Dagster: scenarios, sampling, attribution, masks, metrics. The stages, their
storage and their schedule live in `assets`, `resources` and `pipelines`.

What a notebook wants stands here, and is imported when it is first asked for: `excise.standardized_mean_difference`.
"""

from excise.lazily import lazily

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
__getattr__, __dir__ = lazily(__name__, _PLACES)
