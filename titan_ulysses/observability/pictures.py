"""What all pictures share: how they are opened and saved, and colours that everyone can
distinguish.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from titan_ulysses.distributed.errors import UserError

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colours of Okabe and Ito, which people with any kind of colour vision can distinguish,
without yellow, which is too light for lines.
"""
SHADES = "cividis"
"""A perceptually uniform colour map, also in grey and for any kind of colour vision."""


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


@contextmanager
def picture(
    *paths: Path | IO[str], size: tuple[float, float], panels: tuple[int, int] = (1, 1)
) -> Iterator[Any]:
    """Yield (figure, axes) to draw on, and save the picture to paths, or as SVG to open files.

    size: width and height in inches. panels: (rows, columns); with several panels, axes is a flat
    list of Axes. No window is opened, and the caller's settings of matplotlib do not change.
    UserError where matplotlib is not installed.
    """
    if not has_matplotlib():
        raise UserError(f"{paths[0]}: pictures need matplotlib: pip install matplotlib")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.6,
            "svg.hashsalt": "",  # the same picture has the same ids
        }
    ):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(*panels, squeeze=False).flatten().tolist()
        yield figure, axes[0] if len(axes) == 1 else axes
        for path in paths:
            if isinstance(path, Path):
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=130)
            else:
                figure.savefig(path, format="svg")
