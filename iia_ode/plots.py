"""Plots: functions that take ``ax=None`` and return the axes. They need the extra ``plot``."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import InputError, MissingDependencyError
from .files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .experiments import Comparison

__all__ = ["error_against_nfe", "image_grid", "sample_panels", "save_figure"]

# A fitted solver has its base's colour (Okabe and Ito's palette), so that the eye compares the pairs that matter.
_STYLE: dict[str, dict[str, Any]] = {
    "ddim": {"color": "#0072B2", "marker": "o", "linestyle": "--"},
    "iia-ddim": {"color": "#0072B2", "marker": "o"},
    "heun": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "iia-edm": {"color": "#D55E00", "marker": "s"},
    "biia-edm": {"color": "#E69F00", "marker": "^"},
}


def _axes(ax: Axes | None, **size: Any) -> Axes:
    if ax is not None:
        return ax
    return _figure(**size).add_subplot()


def _figure(**size: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'iia-ode[plot]'.") from error
    # Not pyplot: a figure of its own needs no display and leaves no global state behind.
    return Figure(layout="constrained", **size)


def error_against_nfe(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """RMSE of the final state against evaluations, on log axes; bars are one standard error, fitted solvers are solid."""
    ax = _axes(ax, figsize=(6.4, 4.4))
    for solver in comparison.solvers:
        rows = sorted((r for r in comparison.rows if r.solver == solver), key=lambda r: r.nfe)
        if rows:
            x, y, e = [r.nfe for r in rows], [r.rmse for r in rows], [r.standard_error for r in rows]
            ax.errorbar(x, y, yerr=e, label=solver, markersize=5, capsize=2, **_STYLE.get(solver, {"marker": "x"}))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(comparison.nfes, [str(n) for n in comparison.nfes])
    ax.minorticks_off()
    ax.set_xlabel("model evaluations (NFE)")
    ax.set_ylabel("endpoint error (RMSE per component)")
    ax.grid(alpha=0.3)
    ax.legend()
    s = comparison.settings
    ax.set_title(f"{s['setting']}: {s['samples']} unseen samples, fits on {s['fit_samples']}", fontsize="medium")
    return ax


def image_grid(images: Tensor, ax: Axes | None = None, *, columns: int = 8) -> Axes:
    """Grey or RGB images [B, C, H, W] in [-1, 1] as one picture, row by row, with a one-pixel border between them."""
    ax = _axes(ax, figsize=(4, 4))
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
    """A grid of images per title, the first `count` of each, for samples that started from the same noise."""
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    rows = -(-min(count, max(len(v) for v in panels.values())) // columns)
    figure = _figure(figsize=(3.2 * across, (3.0 * rows / columns + 0.45) * down))
    for k, (title, images) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(down, across, k)
        image_grid(images[:count], ax, columns=columns)
        ax.set_title(title, fontsize="small")
    return figure


def save_figure(drawing: Figure | Axes, path: str | os.PathLike[str]) -> Path:
    """Write a figure, or the figure that axes are on, as PNG, atomically."""
    buffer = io.BytesIO()
    figure = drawing.get_figure(root=True)
    if figure is None:
        raise InputError("these axes are on no figure.")
    # Without matplotlib's version in the file, the same picture is the same bytes.
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())
