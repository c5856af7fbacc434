"""Models: a causal language model and its parts.

Here: entries of `models.yaml`, reading and refusing checkpoints, the topology of an architecture, placement on devices,
prompts as tokens. Not here: what is asked of a model (`scenarios`), how answers are drawn (`generation`), and changes
to its weights (`interventions`).
"""
