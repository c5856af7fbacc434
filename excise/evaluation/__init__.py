"""Evaluation: what a mask did, with an interval beside every number.

Here: metrics of numbers and of toxicity, perplexity, side effects, overlap, restoration, stability, verdicts, and the
thresholds they are held against. Not here: drawing answers (`generation`), and words and pictures (`reporting`).
"""

from excise.lazily import lazily

_PLACES = {
    "MetricTable": "excise.evaluation.table",
    "Thresholds": "excise.evaluation.thresholds",
    "earth_movers_distance": "excise.evaluation.metrics",
    "evaluate": "excise.evaluation.numbers",
    "inlier_ratio": "excise.evaluation.metrics",
    "paired_permutation_test": "excise.evaluation.permutation",
    "parse_rate": "excise.evaluation.metrics",
    "read_metrics": "excise.evaluation.table",
    "standardized_mean_difference": "excise.evaluation.metrics",
    "toxicity_bias": "excise.evaluation.metrics",
}
__all__ = list(_PLACES)
__getattr__, __dir__ = lazily(__name__, _PLACES)
