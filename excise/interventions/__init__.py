"""Interventions: what is done to a model.

Here: masks of weights and of heads, their application and undoing, and random ones of the same size. Not here: which
weights to take (`attribution` scores them, `strategies` selects), and what taking them does (`evaluation`).
"""
