"""The lineage: one module per stage, each a factory of a few lines that calls `excise` and hands results to a resource.

Here belong partitions, metadata, checks and the wiring of stages; a factory takes the catalogue (which models and
scenarios there are) and returns the asset. Nothing scientific is decided here, nothing heavy is imported at the top.
"""
