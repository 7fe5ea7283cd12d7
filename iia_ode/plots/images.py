"""Pictures of images and of samples made from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .figures import axes_of, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["image_grid", "sample_panels"]


def image_grid(images: Tensor, ax: Axes | None = None, *, columns: int = 8) -> Axes:
    """Draw images row by row as one picture, with a border of one pixel between them.

    Parameters
    ----------
    images : gray or RGB images [B, C, H, W] in [-1, 1], C = 1 or 3. Values outside are clamped.
    ax : axes to draw on; by default those of a new figure.
    columns : images per row.

    Returns
    -------
    The axes.

    Raises
    ------
    MissingDependencyError : matplotlib is not installed.
    """
    ax = axes_of(ax, figsize=(4, 4))
    rows = -(-len(images) // columns)
    b, c, h, w = *images.shape[:2], images.shape[2] + 1, images.shape[3] + 1
    tiles = images.new_zeros((rows * columns, c, h, w))
    tiles[:b, :, :-1, :-1] = images
    picture = tiles.reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    values = ((picture[:-1, :-1].clamp(-1, 1) + 1) / 2).cpu().numpy()
    ax.imshow(values if c == 3 else values[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def sample_panels(panels: Mapping[str, Tensor], *, count: int = 32, columns: int = 8) -> Figure:
    """Draw a grid of images for each of several solvers, to compare samples made from the same noise.

    Parameters
    ----------
    panels : images [B, C, H, W] in [-1, 1] by the title of their panel.
    count : number of images to show per panel, the first ones.
    columns : images per row of a panel.

    Returns
    -------
    A matplotlib figure.

    Raises
    ------
    MissingDependencyError : matplotlib is not installed.
    """
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    rows = -(-min(count, max(len(v) for v in panels.values())) // columns)
    figure = figure_of(figsize=(3.2 * across, (3.0 * rows / columns + 0.45) * down))
    for k, (title, images) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(down, across, k)
        image_grid(images[:count], ax, columns=columns)
        ax.set_title(title, fontsize="small")
    return figure
