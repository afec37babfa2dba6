"""Plots of a report: numbers in, matplotlib's figures out."""

from cmpe_se.exhibits.drawing.depth import (
    draw_channels,
    draw_class_differences,
    draw_closing,
    draw_differences,
    draw_effects,
    draw_gates_over_depth,
    draw_one_image,
    draw_shares,
)
from cmpe_se.exhibits.drawing.photos import draw_attributions, draw_block, draw_inside, draw_overlay, draw_pairs

__all__ = [
    "draw_attributions",
    "draw_block",
    "draw_channels",
    "draw_class_differences",
    "draw_closing",
    "draw_differences",
    "draw_effects",
    "draw_gates_over_depth",
    "draw_inside",
    "draw_one_image",
    "draw_overlay",
    "draw_pairs",
    "draw_shares",
]
