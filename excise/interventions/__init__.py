"""Interventions: what is done to a model.

Here: the protocol that every one follows, its kinds (a module each), their files, their combinations and matched
controls. Not here: which weights to take (`attribution` scores them, `strategies` selects), and what an intervention
does to answers (`evaluation`).
"""
