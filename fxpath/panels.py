"""The pieces that all figures are put together from: panels, axes, lines and legends of one look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import PercentFormatter

from .labels import Look, site_labels

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

WIDTH = 6.5  # inches
TEXT, TITLE = 8, 9  # points
GREY = "0.45"


def dress(ax: Axes, title: str) -> None:
    """Title, sizes and frame of a panel."""
    ax.set_title(title, fontsize=TITLE, parse_math=False)  # a file's name may hold a $
    ax.tick_params(labelsize=TEXT)
    ax.spines[["top", "right"]].set_visible(False)


def percent_axis(top: float) -> PercentFormatter:
    """Ticks of a share in per cent, with decimals when the axis ends below 5 %."""
    return PercentFormatter(1, decimals=None if top < 0.05 else 0, symbol=" %")


def legend(figure: Figure, handles: Sequence[Any], most: int = 4) -> None:
    """A legend above all panels, in as many columns as fit and at most `most`."""
    columns = legend_columns([handle.get_label() for handle in handles], most)
    figure.legend(
        handles=list(handles), loc="outside upper center", ncols=columns, fontsize=TEXT, frameon=False, handlelength=2.5
    )


def legend_columns(labels: Sequence[str], most: int) -> int:
    """How many columns of legend entries fit: a letter takes at most 0.067 inches on average, a line's sign 0.6."""
    for columns in range(min(most, len(labels)), 1, -1):
        rows = math.ceil(len(labels) / columns)
        groups = [labels[start : start + rows] for start in range(0, len(labels), rows)]
        if sum(0.6 + 0.067 * max(map(len, group)) for group in groups) <= WIDTH:
            return columns
    return 1


def stacked(panels: int, labels: Sequence[str], most: int) -> tuple[Figure, list[Axes]]:
    """A figure with full-width panels below each other, and room for a legend of these entries."""
    entries = math.ceil((len(labels) + 1) / legend_columns(labels, most))
    figure = Figure(figsize=(WIDTH, 0.18 * entries + 3.0 * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def line(look: Look, label: str, place: float, x: Any = (), y: Any = ()) -> Line2D:
    """A line of a look. `place` runs from 0, drawn first, to 1: later ones are thinner, so equal ones all show."""
    return Line2D(
        x,
        y,
        color=look.colour,
        linestyle=look.style,
        linewidth=2.2 - 1.2 * place,
        marker=look.marker,
        markersize=min(6.5 - 3.5 * place, 200 / max(len(x), 1)),
        label=label,
    )


def site_axis(ax: Axes, part: pd.DataFrame) -> None:
    """Site names under the axis, every second, third … when there are more than fit."""
    sites = part[part["site_number"] >= 0].drop_duplicates("site_number").sort_values("site_number")
    numbers, names = sites["site_number"].tolist(), site_labels(sites["site"].tolist())
    step = math.ceil(len(numbers) / 36)
    few = len(numbers) <= 6
    ax.set_xticks(numbers[::step], names[::step], rotation=0 if few else 90)
    ax.set_xlabel("site, in the order of execution", fontsize=TEXT)
    ax.set_xlim(-0.5, len(numbers) - 0.5)


def text_width(text: str, size: float = TEXT) -> float:
    """Inches that a text takes; on the pixels of a screen letters are up to a twentieth wider than their outlines."""
    if not text.strip():
        return 0.0
    outline = TextPath((0, 0), text.replace("$", r"\$"), size=size)
    return (
        1.05 * float(np.ptp(outline.vertices[:, 0])) / 72
    )  # of the control points: the exact extent takes ten times as long


def text_lines(text: str, width: float, most: int, size: float = TEXT) -> list[str]:
    """A text in lines of at most `width` inches, broken at spaces where it can be, and cut after `most` lines."""
    lines, words = [""], text.replace("\n", " ").split(" ")
    while words and len(lines) <= most:
        word = words.pop(0)
        longer = f"{lines[-1]} {word}".lstrip(" ")
        if text_width(longer, size) <= width:
            lines[-1] = longer
        elif lines[-1]:
            words.insert(0, word)
            lines.append("")
        else:  # the word alone is too long
            fits = max(
                (end for end in range(1, min(len(word), 200)) if text_width(word[:end], size) <= width), default=1
            )
            lines[-1] = word[:fits]
            words.insert(0, word[fits:])
            lines.append("")
    if len(lines) > most and any([*lines[most:], *words]):
        last = lines[most - 1]
        while last and text_width(f"{last}…", size) > width:
            last = last[:-1]
        return [*lines[: most - 1], f"{last.rstrip()}…"]
    return lines[:most]
