"""The canvas of every figure: its look while it is drawn, its colours, and how it is saved as PNG and SVG.

Here: what all figures share. Not here: any figure.
Figures own their canvas: nothing touches pyplot's state, so that they may be drawn in any thread or process.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy
import polars

from excise.errors import ExciseError
from excise.evaluation.thresholds import FEW_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

Colour: TypeAlias = str | tuple[float, float, float]
WIDTH = 9.0  # inches: 900 px at 100 dots per inch
PNG_BYTES = 100_000
FLOOR_RED = "#b00020"
INTERVAL, CUT, UNDEFINED, COLLAPSED, BROKEN = "_interval", "_cut", "_undefined", "_collapsed", "_broken"
"""Labels of artists, which legends leave out: an interval's bar, the mark where one is cut, and the marks in place of a
figure that is not defined and of one that collapsed answers give."""
CUT_NOTE = "interval or value goes on beyond the axis"
UNDEFINED_NOTE = "not defined"
COLLAPSED_NOTE = "answers collapsed to one number"
BROKEN_NOTE = "ringed: breaks a budget"
_REACH = 4.0
RESOLUTIONS = (100, 90, 80, 72, 60)
_COLOURS = (256, 64, 32)
INK = "#222222"
CONTROL_GREY = "#8a8a8a"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 10.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
}


@dataclass(frozen=True)
class SavedFigure:
    """A figure as stored: the PNG's bytes (under 100 kB, to be shown inline) and the paths of both files."""

    png: bytes
    png_path: Path
    svg_path: Path

    @property
    def paths(self) -> tuple[Path, Path]:
        """The PNG's and the SVG's path."""
        return self.png_path, self.svg_path


@contextmanager
def drawing(grid: str = "whitegrid") -> Iterator[None]:
    """The look of every figure, while it is drawn and no longer."""
    import matplotlib
    import seaborn

    style: Any = {**seaborn.axes_style(grid), **_STYLE}
    with matplotlib.rc_context(style):
        yield


def blank_figure(inches: tuple[float, float], layout: Literal["constrained", "none"] = "constrained") -> Figure:
    """A white figure of that width and height, with a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=RESOLUTIONS[0], facecolor="white")
    figure.set_layout_engine(layout)
    FigureCanvasAgg(figure)
    return figure


def stacked(figure: Figure, heights: Sequence[float]) -> list[SubFigure]:
    """Parts of a figure below each other, of these relative heights."""
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    return list(parts)


def palette(count: int) -> list[tuple[float, float, float]]:
    """Colours told apart with a colour vision deficiency, grey (the controls' colour) left out."""
    import seaborn

    colours = [colour for index, colour in enumerate(seaborn.color_palette("colorblind")) if index != 7]
    return [colours[index % len(colours)] for index in range(count)]


def interval_bar(axes: Axes, place: float, low: float, high: float, *, along: str = "y", **look: Any) -> None:
    """The bar of an interval at `place` of the other axis. along: the axis it lies along, "y" or "x"."""
    ends = [place, place], [low, high]
    axes.plot(*(ends if along == "y" else ends[::-1]), label=INTERVAL, **look)


def limits_of(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """Limits that hold all values and every interval's end, unless one lies over `_REACH` times as far as all values.

    A wrecked model's interval would squeeze every mark into a line; where it is cut, `mark_cut_ends` says so. values:
    not empty.
    """
    lowest, highest = min(values), max(values)
    span = max(highest - lowest, abs(highest), abs(lowest), 1e-9)
    low = max(min([lowest, *ends]), lowest - (_REACH - 1) * span)
    high = min(max([highest, *ends]), highest + (_REACH - 1) * span)
    return low, high


def mark_cut_ends(axes: Axes) -> bool:
    """Marks every end of an interval that lies beyond the panel, at the edge it leaves by; whether there is one.

    Call it when the limits are final.
    """
    ranges = {"x": sorted(axes.get_xlim()), "y": sorted(axes.get_ylim())}
    markers = {("x", 0): "<", ("x", 1): ">", ("y", 0): "v", ("y", 1): "^"}
    cut = False
    for line in [line for line in axes.lines if line.get_label() == INTERVAL]:
        xs, ys = (numpy.asarray(values, dtype=float).tolist() for values in (line.get_xdata(), line.get_ydata()))
        along, place, ends = ("y", xs[0], ys) if xs[0] == xs[1] else ("x", ys[0], xs)
        low, high = ranges[along]
        for side, beyond, edge in ((0, min(ends) < low, low), (1, max(ends) > high, high)):
            if beyond:
                at = (place, edge) if along == "y" else (edge, place)
                axes.plot(
                    [at[0]],
                    [at[1]],
                    marker=markers[along, side],
                    markersize=4,
                    color=line.get_color(),
                    linestyle="none",
                    clip_on=False,
                    zorder=6,
                    label=CUT,
                )
                cut = True
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    return cut


def mark_missing(axes: Axes, place: float, colour: Colour, label: str, *, along: str = "x") -> None:
    """A mark at the panel's far edge in place of a figure that is not defined, or of one that collapsed answers give.

    At the near edge it would look like a small bias. label: `UNDEFINED` or `COLLAPSED`. along: the axis on which
    `place` lies.
    """
    transform = axes.get_xaxis_transform() if along == "x" else axes.get_yaxis_transform()
    at = ([place], [0.94]) if along == "x" else ([0.98], [place])
    axes.plot(
        *at,
        marker="x" if label == UNDEFINED else "X",
        markersize=4.5,
        color=colour,
        linestyle="none",
        transform=transform,
        zorder=5,
        label=label,
    )


def mark_handles(axes: Sequence[Axes]) -> list[Line2D]:
    """Legend entries for the marks that the panels hold: cut ends, undefined figures, collapsed answers."""
    from matplotlib.lines import Line2D

    labels = {line.get_label() for panel in axes for line in panel.lines}
    entries = ((CUT, "^", CUT_NOTE), (UNDEFINED, "x", UNDEFINED_NOTE), (COLLAPSED, "X", COLLAPSED_NOTE))
    handles = [
        Line2D([], [], color=INK, marker=marker, markersize=4.5, linestyle="none", label=text)
        for label, marker, text in entries
        if label in labels
    ]
    if BROKEN in labels:
        handles.append(Line2D([], [], **_RING, markersize=8, label=BROKEN_NOTE))
    return handles


_RING: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": FLOOR_RED, "linestyle": "none"}


def ring(axes: Axes, place: float, value: float, size: float) -> None:
    """A red ring around a mark of that size: its mask breaks a budget."""
    axes.plot([place], [value], **_RING, markersize=size + 5, markeredgewidth=1.0, zorder=5, label=BROKEN)


def _names_note(names: Sequence[int | None]) -> str:
    """Words for a legend's title where intervals come from few names; empty where they do not."""
    known = [count for count in names if count is not None]
    few = [count for count in known if count < FEW_NAMES]
    if not few:
        return ""
    part = "" if len(few) == len(known) else "some "
    return f"{part}from {min(few)} name{'' if min(few) == 1 else 's'} a group, which is too few to say much"


def legend_title(bars: str, names: Sequence[int | None], *more: str) -> str:
    """What `bars` of a figure show, from how many names where they are few, and whatever else its legend says."""
    few_names = _names_note(names)
    intervals = f"{bars}: 95 % intervals {few_names}".rstrip()
    rest = "; ".join(text for text in more if text)
    return intervals + (("\n" if few_names else "; ") + rest if rest else "")


def few_names_line(frame: polars.DataFrame) -> str:
    """A line for a title where the intervals of a table's rows come from few names, else empty."""
    few_names = _names_note(frame["names"].to_list() if "names" in frame.columns else [])
    return f"\nintervals {few_names}" if few_names else ""


def note(axes: Axes, text: str) -> None:
    """Words in the middle of a panel that has nothing to draw."""
    axes.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="#555555")


def require_columns(frame: polars.DataFrame, name: str, columns: Sequence[str]) -> None:
    """Raise ExciseError when the frame lacks a column or has no rows."""
    lacking = [column for column in columns if column not in frame.columns]
    if lacking:
        raise ExciseError(f"{name}: columns {', '.join(lacking)} are missing")
    if frame.is_empty():
        raise ExciseError(f"{name}: no rows to draw")


def require_one(frame: polars.DataFrame, name: str, columns: Sequence[str]) -> None:
    """Raise ExciseError when one of the columns holds several values: such a figure shows one of each."""
    for column in columns:
        values = frame[column].unique().sort().to_list()
        if len(values) > 1:
            raise ExciseError(f"{name}: {len(values)} values of {column} ({', '.join(map(str, values))}); pick one")


def percent(share: float) -> str:
    """A share as percent for a heat map's cell: `57`, `5.3`, `0.32`, `0.002`."""
    value = 100 * share
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else ""
    if abs(value) < 0.0995:
        return f"{value:.1g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.{0 if abs(value) >= 9.95 else 1 if abs(value) >= 0.995 else 2}f}"


def axis_number(value: float) -> str:
    """An axis label: 950, 1.5k, 20k, 1.2M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if suffix == 'k' else factor):g}{suffix}"
    return f"{value:,.10g}"


def save(figure: Figure, stem: Path) -> SavedFigure:
    """Writes `stem`.png (under 100 kB) and `stem`.svg, each whole or not at all.

    The PNG loses colours first and resolution after that until it is small enough. The same figure gives the same
    bytes. Raises ExciseError when the folder cannot be written or no PNG is small enough.
    """
    import matplotlib

    png = _png(figure)
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "excise", "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    png_path, svg_path = (stem.with_name(stem.name + suffix) for suffix in (".png", ".svg"))
    _write(png_path, png)
    _write(svg_path, drawn.getvalue())
    return SavedFigure(png, png_path, svg_path)


def _png(figure: Figure) -> bytes:
    from PIL import Image

    smallest = math.inf
    for resolution in RESOLUTIONS:
        plain = io.BytesIO()
        figure.savefig(plain, format="png", dpi=resolution, metadata={"Software": None})
        picture = Image.open(plain).convert("RGB")
        for colours in _COLOURS:
            reduced = io.BytesIO()
            picture.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
                reduced, format="png", optimize=True
            )
            smallest = min(smallest, reduced.tell())
            if reduced.tell() < PNG_BYTES:
                return reduced.getvalue()
    raise ExciseError(f"figure: its smallest PNG has {smallest:,} bytes, over {PNG_BYTES:,}; draw fewer variations")


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExciseError(f"{path}: cannot be written ({error.strerror}); make the folder writable") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise ExciseError(f"{path}: cannot be written ({error.strerror}); free some space") from error
