"""Whether a figure can be read: page width, text that is large enough, and nothing outside or on something else."""

from __future__ import annotations

from itertools import pairwise

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def drawn(figure: Figure) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def texts(figure: Figure) -> list[Text]:
    """All text that is drawn: not the labels of ticks outside an axis or of panels that are off."""
    hidden = set()
    for ax in figure.axes:
        if not ax.axison:
            hidden |= {id(text) for text in ax.findobj(Text)}
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            outside = [place < low or place > high for place in axis.get_majorticklocs()]
            hidden |= {id(tick.label1) for tick, out in zip(axis.get_major_ticks(), outside, strict=True) if out}
    shown = (text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip())
    return [text for text in shown if id(text) not in hidden]


def check_readable(figure: Figure) -> None:
    """Page width, no text under 8 points, none outside the figure, no tick label on another, no legend on a panel."""
    renderer = drawn(figure).get_renderer()
    width, height = figure.get_size_inches() * figure.dpi
    assert figure.get_figwidth() == 6.5
    for text in texts(figure):
        assert text.get_fontsize() >= 8, text.get_text()
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1, text.get_text()
        assert box.x1 <= width + 1, text.get_text()
        assert box.y0 >= -1, text.get_text()
        assert box.y1 <= height + 1, text.get_text()
    for ax in figure.axes:
        labels = [label for label in ax.get_yticklabels() if label.get_text()]
        boxes = sorted((label.get_window_extent(renderer) for label in labels), key=lambda box: box.y0)
        for low, high in pairwise(boxes):
            assert low.y1 <= high.y0 + 2
    for legend in figure.legends:
        place = legend.get_window_extent(renderer)
        for ax in figure.axes:
            assert not ax.axison or not place.overlaps(ax.get_window_extent(renderer))
