"""Audits social bias in causal language models, prunes the weights that carry it, and measures what that did.

The science of the project, usable without Dagster: scenarios, sampling, attribution, masks, metrics. The stages, their
storage and their schedule live in `assets`, `resources` and `pipelines`.
"""
