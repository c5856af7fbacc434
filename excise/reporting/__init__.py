"""Reporting: how people read the tables.

Here: findings in words, Markdown tables, the page of results, and figures. Nothing is estimated here; what is told
stands in tables that `evaluation` made.
"""
