"""Strategies: a score, a selection and a kind of mask, by name, and the masks they make at every level.

Here: `strategies.yaml`, selection rules, measured paths, and the making of named masks with their controls. Not here:
the scores (`attribution`), and what a mask does (`evaluation`).
"""
