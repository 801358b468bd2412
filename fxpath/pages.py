"""Figures of many pictures: panels and text set from the top of a page downwards, in inches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from .panels import TEXT, text_lines
from .panels import WIDTH as PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

_MARGIN = 0.05  # inches on all sides
WIDTH = PAPER - 2 * _MARGIN
GAP = 0.05  # inches between panels
LINE = 0.15  # inches of a line of text


class Page:
    """A figure that is as high as what it holds.

    All places are in inches: x from the left margin, y downwards from where the page has come to.
    """

    def __init__(self) -> None:
        self.figure = Figure(figsize=(PAPER, 1.0))
        self._y = _MARGIN
        self._panels: list[tuple[Axes, float, float, float, float]] = []
        self._texts: list[tuple[Text, float, float]] = []

    def down(self, inches: float) -> None:
        """Go on so far below."""
        self._y += inches

    def panel(self, x: float, width: float, height: float) -> Axes:
        """An empty panel without ticks and frame, its upper left corner at x; the page does not go on below it."""
        ax = self.figure.add_axes((0.0, 0.0, 1.0, 1.0), label=f"panel {len(self._panels)}")
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
        self._panels.append((ax, _MARGIN + x, self._y, width, height))
        return ax

    def text(self, x: float, y: float, text: str, **looks: Any) -> None:
        """Text at a place, its top there unless `va` says otherwise; a file's name in it may hold a $."""
        looks = {"fontsize": TEXT, "va": "top"} | looks
        looks = dict[str, Any](fontsize=TEXT, va="top") | looks
        self._texts.append((self.figure.text(0, 0, text, parse_math=False, **looks), _MARGIN + x, self._y + y))

    def headings(self, x: float, width: float, labels: Sequence[str]) -> None:
        """A row of names over panels of this width, their last lines level; goes on where the panels begin."""
        shown = [_named(label, width) for label in labels]
        height = LINE * max(map(len, shown), default=0)
        for column, lines in enumerate(shown):
            middle = x + column * (width + GAP) + width / 2
            for number, line in enumerate(reversed(lines)):
                self.text(middle, height - LINE * number, line, ha="center", va="baseline")
        self.down(height + 0.06)

    def paragraph(self, x: float, width: float, text: str) -> float:
        """Text in as many lines as it takes; returns its height."""
        lines = text_lines(text, width, most=100)
        self.text(x, 0.0, "\n".join(lines), linespacing=1.25)
        return LINE * len(lines)

    def finished(self) -> Figure:
        """The figure, with everything in its place."""
        height = self._y + _MARGIN
        self.figure.set_size_inches(PAPER, height)
        for ax, x, y, wide, high in self._panels:
            ax.set_position((x / PAPER, 1 - (y + high) / height, wide / PAPER, high / height))
        for text, x, y in self._texts:
            text.set_position((x / PAPER, 1 - y / height))
        return self.figure


def _named(label: str, width: float) -> list[str]:
    """A name in lines: parameters and κ may begin one."""
    lines = text_lines(label.replace("(", " (", 1).replace(", κ", " κ"), width, most=4)
    return [line.replace(" (", "(").replace(" κ", ", κ") for line in lines]
