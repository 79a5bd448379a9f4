"""Names beside what they name, in the place of a legend, so that none covers another."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

# Where a name may stand around its point: direction, and how the text is aligned to it.
Side: TypeAlias = tuple[int, int, str, str]
_SIDES: tuple[Side, ...] = (
    (1, 0, "left", "center"),
    (1, 1, "left", "bottom"),
    (1, -1, "left", "top"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (-1, 1, "right", "bottom"),
    (-1, -1, "right", "top"),
    (-1, 0, "right", "center"),
)
# Distances in points; a name that is not at the first of them gets a line to its point.
_DISTANCES = (7.0, 16.0, 30.0, 48.0)
# What a place costs: for each pixel of another name, for each marker or piece of a line that the
# name covers, outside the panel, and for each step away from the best place.
_OVERLAP, _COVERED, _OUTSIDE, _AWAY = 0.05, 0.3, 500.0, 0.5
# A marker weighs as much as so many pieces of a line.
_MARKER = 8
# Lines count as covered by points that stand so many pixels apart.
_STEP = 5.0


@dataclasses.dataclass(frozen=True)
class Label:
    """A name and the points that it may stand at, the best one first, in data coordinates."""

    text: str
    colour: str
    anchors: Sequence[tuple[float, float]]
    size: float = 8.5
    weight: str = "normal"


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel and the names that belong into it.

    Attributes:
        axis: the panel, with everything else drawn already.
        labels: earlier ones choose first.
        paths: the points of everything that a name should not cover, in data coordinates.
    """

    axis: Axes
    labels: Sequence[Label]
    paths: Sequence[Sequence[tuple[float, float]]]


def place_labels(figure: Figure, panels: Sequence[Panel]) -> None:
    """Write the names of all panels, each where it covers least; sizes and limits stay."""
    canvas = FigureCanvasAgg(figure)
    # Where things stand in pixels is known once the layout is made.
    figure.draw_without_rendering()
    for panel in panels:
        _place(panel, canvas.get_renderer(), figure.dpi / 72.0)


def _place(panel: Panel, renderer: RendererBase, scale: float) -> None:
    """Write the names of one panel; `scale` is the pixels of a point."""
    axis = panel.axis
    to_pixels = axis.transData.transform
    obstacles = _dense([to_pixels(np.array(path)) for path in panel.paths if path])
    inside = axis.get_window_extent(renderer)
    taken: list[Bbox] = []
    for label in panel.labels:
        size = _measure(axis, label, renderer)
        places = []
        for (i, anchor), (j, distance), (k, side) in itertools.product(
            enumerate(label.anchors), enumerate(_DISTANCES), enumerate(_SIDES)
        ):
            box = _box(to_pixels(anchor), side, distance * scale, size)
            cost = _AWAY * (2 * i + 1.5 * j + 0.1 * k) + _cost(box, inside, taken, obstacles)
            places.append((cost, i, j, k, box))
        _, i, j, k, box = min(places, key=lambda place: place[0])
        _annotate(axis, label, label.anchors[i], _SIDES[k], _DISTANCES[j])
        taken.append(box)


def _measure(axis: Axes, label: Label, renderer: RendererBase) -> tuple[float, float]:
    """Return width and height of a name in pixels."""
    text = axis.text(0, 0, label.text, fontsize=label.size, fontweight=label.weight)
    box = text.get_window_extent(renderer)
    text.remove()
    return box.width, box.height


def _offset(side: Side, distance: float) -> tuple[float, float]:
    """Return how far a name lies from its point; diagonal places are as far away as the others."""
    right, up = side[:2]
    step = distance / (2**0.5 if right and up else 1.0)
    return right * step, up * step


def _box(point: np.ndarray, side: Side, distance: float, size: tuple[float, float]) -> Bbox:
    """Return what a name of `size` fills at one side of `point`, in pixels."""
    horizontal, vertical = side[2:]
    offset = _offset(side, distance)
    x = point[0] + offset[0] - size[0] * {"left": 0.0, "center": 0.5, "right": 1.0}[horizontal]
    y = point[1] + offset[1] - size[1] * {"bottom": 0.0, "center": 0.5, "top": 1.0}[vertical]
    return Bbox.from_bounds(x, y, *size).padded(1.5)


def _annotate(
    axis: Axes, label: Label, anchor: tuple[float, float], side: Side, distance: float
) -> None:
    is_away = distance > _DISTANCES[0]
    line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "shrinkB": 3.0}
    text = axis.annotate(
        label.text,
        anchor,
        xytext=_offset(side, distance),
        textcoords="offset points",
        ha=side[2],
        va=side[3],
        fontsize=label.size,
        fontweight=label.weight,
        color=label.colour,
        arrowprops=line if is_away else None,
        path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
        zorder=6,
    )
    # A text that counted in the layout would change the size of the panel.
    text.set_in_layout(False)


def _cost(box: Bbox, inside: Bbox, taken: Sequence[Bbox], obstacles: np.ndarray) -> float:
    """Return what a name costs that fills `box`, in pixels."""
    cost = 0.0
    for other in taken:
        shared = Bbox.intersection(box, other)
        if shared is not None:
            cost += _OVERLAP * shared.width * shared.height
    covered = (obstacles > (box.x0, box.y0)) & (obstacles < (box.x1, box.y1))
    cost += _COVERED * float(covered.all(1).sum())
    is_inside = box.x0 >= inside.x0 and box.x1 <= inside.x1
    is_inside = is_inside and box.y0 >= inside.y0 and box.y1 <= inside.y1
    return cost + (0.0 if is_inside else _OUTSIDE)


def _dense(paths: Sequence[np.ndarray]) -> np.ndarray:
    """Return points `[n, 2]` along all paths, close to each other; markers count several times."""
    found = [np.empty((0, 2))]
    for path in paths:
        found += [path] * _MARKER
        for start, end in itertools.pairwise(path):
            steps = int(np.hypot(*(end - start)) // _STEP) + 1
            found.append(np.linspace(start, end, steps + 1))
    return np.concatenate(found)
