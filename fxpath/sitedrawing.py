"""The site graph as a picture: a list of the sites, with the ways of the data drawn beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from .errors import InputError
from .files import appearing
from .labels import series, site_labels
from .panels import GREY, TEXT, TITLE, text_width
from .plotting import save
from .sitegraph import dot_text, shape_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .sitegraph import SiteGraph

    Places = Mapping[int, tuple[float, float]]

MOST_SITES = 1000
_PICTURES = (".svg", ".png", ".pdf")
_TEXTS = (".dot", ".gv")
_ROW = 0.2  # inches between sites below each other
_LANE = 0.25  # and between sites beside each other
_ARCS = 1.6  # at most for the curves at the left
_LONGEST = 48  # letters of a name
_COLOURS = 7  # blocks have two to six sites: the sources of skips that follow each other differ
_HEAD = ("#", "site", "op", "shape", "neurons")


def checked_picture(path: str | os.PathLike[str]) -> Path:
    """`path`, if a site graph can be written there; raises `InputError` for its ending or a missing folder."""
    target = Path(path)
    if target.suffix.lower() not in (*_TEXTS, *_PICTURES):
        raise InputError(
            f"site graph: expected a name that ends in .dot or .gv (Graphviz) or .svg, .png or .pdf (a picture), found "
            f"{target.name!r}"
        )
    if not target.parent.is_dir():
        raise InputError(f"site graph: there is no folder {target.parent} to write {target.name} to; make it first")
    if target.is_dir():
        raise InputError(f"site graph: expected the name of a file, found the folder {target}")
    return target


def save_site_graph(graph: SiteGraph, path: str | os.PathLike[str], title: str = "") -> Path:
    """Write a site graph, as Graphviz text (.dot, .gv) or as a picture (.svg, .png, .pdf), and return its path.

    The file has its name only once it is whole. Raises `InputError` as `checked_picture` and `site_graph_figure`, and
    where the file cannot be written.
    """
    target = checked_picture(path)
    if target.suffix.lower() in _PICTURES:
        return save(site_graph_figure(graph, title), target)
    with appearing(target) as file:
        file.write(dot_text(graph, title).encode())
    return target


def site_graph_figure(graph: SiteGraph, title: str = "") -> Figure:
    """The sites below each other in order of execution, those of equal depth beside each other, and all edges.

    Data flows downwards. An edge that would run across a site between its ends, a skip, is a curve at the left; curves
    and sites have the colour of the edge's source. Raises `InputError` for more than 1000 sites.
    """
    if len(graph) - 2 > MOST_SITES:
        raise InputError(
            f"site graph: expected at most {MOST_SITES} sites for a picture, found {len(graph) - 2}; write a "
            ".dot file, or choose sites"
        )
    rows = _cells(graph)
    widths = [max(text_width(row[column]) for row in [_HEAD, *rows.values()]) + 0.15 for column in range(len(_HEAD))]
    places = _places(graph)
    lanes = _LANE * (max(x for x, _ in places.values()) / _LANE + 1)
    arcs = _arcs(graph, places)
    left = max(arcs.values(), default=0.0) + 0.2
    width = max(left + lanes + sum(widths), text_width(title, TITLE) + 0.3)
    height = _ROW * (len(graph) + 1) + 0.5
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(-left, width - left)
    ax.set_ylim(_ROW * (len(graph) - 0.3), -2.2 * _ROW - 0.25)
    ax.text(0.1 - left, -2.2 * _ROW, title, fontsize=TITLE, va="bottom", parse_math=False)
    _draw(ax, graph, places, arcs)
    for y, row in [(-1.2 * _ROW, _HEAD), *((places[number][1], row) for number, row in rows.items())]:
        x = lanes
        for column, (text, room) in enumerate(zip(row, widths, strict=True)):
            right = column in (0, 4)
            ax.text(
                x + room - 0.15 if right else x, y, text, fontsize=TEXT, va="center_baseline",
                ha="right" if right else "left", color=GREY if row is _HEAD else "black", parse_math=False,
            )  # fmt: skip
            x += room
    return figure


def _cells(graph: SiteGraph) -> dict[int, tuple[str, ...]]:
    """What is written beside each node."""
    sites = [number for number in graph if 0 <= number < len(graph) - 2]
    names = site_labels([graph.nodes[number]["name"] for number in sites], _LONGEST)
    found: dict[int, tuple[str, ...]] = {-1: ("", "input", "", "", "")}
    for number, short in zip(sites, names, strict=True):
        site, whole = graph.nodes[number], graph.nodes[number]["name"]
        name = " ".join((whole if len(whole) <= _LONGEST else short).split())
        found[number] = (str(number), name, site["op"], shape_text(site["shape"]), f"{site['neurons']:,}")
    return found | {len(sites): ("", "response", "", "", "")}


def _places(graph: SiteGraph) -> dict[int, tuple[float, float]]:
    """A row for each node; nodes with equally long ways from the input stand in lanes beside each other."""
    found: dict[int, tuple[float, float]] = {}
    for level in nx.topological_generations(graph):
        for lane, number in enumerate(sorted(level)):
            found[number] = (_LANE * lane, _ROW * (number + 1))
    return found


def _arcs(graph: SiteGraph, places: Places) -> dict[tuple[int, int], float]:
    """How far the edges reach to the left that cannot be straight, since a site is in the way."""
    found = {}
    for one, two in graph.edges:
        (x, y), (x_end, y_end) = places[one], places[two]
        between = (places[number] for number in range(one + 1, two))
        if any(abs(x + (x_end - x) * (row - y) / (y_end - y) - lane) < 0.4 * _LANE for lane, row in between):
            found[one, two] = float(two - one)
    longest = max(found.values(), default=1.0)
    return {edge: 0.15 + (min(_ARCS, 0.1 * longest) - 0.1) * (span / longest) ** 0.75 for edge, span in found.items()}


def _draw(ax: Axes, graph: SiteGraph, places: Places, arcs: Mapping[tuple[int, int], float]) -> None:
    colours = [look.colour for look in series(_COLOURS)]
    thin = 0.6 if len(arcs) > 3 * len(graph) else 1.1
    for one, two in graph.edges:
        start, end = places[one], places[two]
        if reach := arcs.get((one, two)):
            out = -reach / 0.75 + 0.25 * min(start[0], end[0]) / 0.75  # a cubic curve goes three quarters of the way
            curve = Curve([start, (out, start[1]), (out, end[1]), end], [Curve.MOVETO, *[Curve.CURVE4] * 3])
        else:
            curve = Curve([start, end])
        ax.add_patch(PathPatch(curve, fill=False, edgecolor=colours[one % _COLOURS], linewidth=thin if reach else 1.4))
    for number, (x, y) in places.items():
        outer = number in (-1, len(graph) - 2)
        ax.plot(
            x, y, marker="s" if outer else "o", markersize=5, zorder=3,
            color="black" if outer else colours[number % _COLOURS], markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
