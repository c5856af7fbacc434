"""Evaluation: what a mask did, with an interval beside every number.

Here: metrics of numbers and of toxicity, perplexity, side effects, overlap, restoration, stability, verdicts, and the
thresholds they are held against. Not here: drawing answers (`generation`), and words and pictures (`reporting`).
"""
