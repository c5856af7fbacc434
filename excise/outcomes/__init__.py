"""Outcomes: what an answer is worth.

Here: the one number in a free text, and the toxicity of a continuation. Not here: how answers are drawn (`generation`),
and what the values of many answers say about groups (`evaluation`).
"""
