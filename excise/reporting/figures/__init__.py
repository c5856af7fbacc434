"""The pictures of an audit, drawn from the tidy frames and saved as PNG and SVG.

Here: one function for each figure of the method (A9, B6), each giving a `matplotlib.figure.Figure`, and `save`.
Not here: estimates (see `excise.evaluation.numbers`), which every figure only draws, and tables (see
`excise.reporting.finding`). One module holds one kind of figure; what all share is `canvas`.
"""

from excise.reporting.figures.answers import answers_by_group
from excise.reporting.figures.canvas import PNG_BYTES, SavedFigure, save
from excise.reporting.figures.disparity import disparity_by_level
from excise.reporting.figures.distribution import mask_density_by_layer, mask_distribution_heat_map
from excise.reporting.figures.gamma_sweep import gamma_sweep
from excise.reporting.figures.grid import grid_heat_maps
from excise.reporting.figures.head_map import head_kinds, head_map
from excise.reporting.figures.impact_correlation import impact_correlation
from excise.reporting.figures.levels import bias_by_level
from excise.reporting.figures.overlap import overlap_heat_map
from excise.reporting.figures.subgroups import toxicity_by_subgroup
from excise.reporting.figures.trade_off import trade_off
from excise.reporting.figures.transfer import transfer_heat_map

__all__ = [
    "PNG_BYTES",
    "SavedFigure",
    "answers_by_group",
    "bias_by_level",
    "disparity_by_level",
    "gamma_sweep",
    "grid_heat_maps",
    "head_kinds",
    "head_map",
    "impact_correlation",
    "mask_density_by_layer",
    "mask_distribution_heat_map",
    "overlap_heat_map",
    "save",
    "toxicity_by_subgroup",
    "trade_off",
    "transfer_heat_map",
]
