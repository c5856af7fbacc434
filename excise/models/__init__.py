"""Models: a causal language model and its parts.

Here: entries of `models.yaml`, reading and refusing checkpoints, the topology of an architecture, placement on devices.
Not here: what is asked of a model (`scenarios`), how prompts become tokens and answers are drawn (`generation`), and
changes to its weights (`interventions`).
"""
