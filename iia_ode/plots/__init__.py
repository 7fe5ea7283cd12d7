"""Plots of comparisons, images and fitted solvers. They need matplotlib: the extra ``plot``.

Plots of a single panel draw on the given axes, or on new axes; plots of a fit make a figure.
"""

from .comparisons import error_against_nfe, error_against_seconds, error_of_steps
from .figures import save_figure
from .fits import plot_coefficients, plot_ingredients, plot_residuals
from .images import image_grid, sample_panels

__all__ = [
    "error_against_nfe",
    "error_against_seconds",
    "error_of_steps",
    "image_grid",
    "plot_coefficients",
    "plot_ingredients",
    "plot_residuals",
    "sample_panels",
    "save_figure",
]
