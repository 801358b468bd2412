"""Figures of decodings (the paper's Fig. 3) and their response curves; pictures as files. Nothing is computed here."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .errors import InputError, StoreError
from .files import appearing
from .keys import PathwayKey
from .labels import Look, looks, pathway_label, wrapped
from .panels import GREY, TEXT, TITLE, WIDTH, dress

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = 4
_LINE = 0.135  # inches


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture `(H, W, 3)` uint8 with a title and lines below it; None: there is none, and the lines say why."""

    title: str
    picture: npt.NDArray[np.uint8] | None
    lines: tuple[str, ...] = ()


def pictures_figure(panels: Sequence[Panel], title: str = "", columns: int = _COLUMNS) -> Figure:
    """Pictures side by side, so many in a row, each with its title above and its lines below."""
    if not panels:
        raise InputError("pictures figure: expected at least one panel, found none")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(len(panel.lines) for panel in panels)
    side = WIDTH / max(columns, 2)
    shapes = [panel.picture.shape for panel in panels if panel.picture is not None]
    tall = max((shape[0] / shape[1] for shape in shapes), default=1.0)
    titles = [wrapped(panel.title, max(int(side / 0.085), 8)) for panel in panels]
    above = 1 + max(text.count("\n") for text in titles)
    height = 0.97 * side * tall + _LINE * (most + above) + 0.1
    figure = Figure(figsize=(WIDTH, rows * height + (0.3 if title else 0)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, panel, text in zip(axes, panels, titles, strict=False):
        ax.set_title(text, fontsize=TEXT, parse_math=False)
        if panel.picture is not None:
            ax.imshow(panel.picture, interpolation="nearest")
            place = -0.03
        else:  # a frame of the size of a picture
            ax.set_aspect(tall)
            ax.add_patch(_frame(ax))
            place = 0.95
        said = "\n".join(textwrap.fill(each, max(int(side / 0.075), 8)) for each in panel.lines)
        ax.text(0.5, place, said, transform=ax.transAxes, va="top", ha="center", fontsize=TEXT, parse_math=False)
    if title:
        figure.suptitle(title, fontsize=TITLE, parse_math=False)
    return figure


def _frame(ax: Any) -> Any:
    return Rectangle((0, 0), 1, 1, transform=ax.transAxes, facecolor="0.95", edgecolor=GREY, linewidth=0.8)


def curves_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """Response over steps, a panel a row as their sizes differ, from a table with row, step and response.

    Where it has a column `photo_response`, that is a dotted line: what the row's network answers to the photo.
    """
    if missing := sorted({"row", "step", "response"} - set(table.columns)):
        raise InputError(f"curves figure: expected a table with row, step and response, found none of {missing}")
    names = list(dict.fromkeys(table["row"]))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(WIDTH, 1.6 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    given = _looks(names)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, names, strict=False):
        part = table[table["row"] == name].sort_values("step")
        ax.plot(part["step"], part["response"], color=given[name].colour, linewidth=1.6)
        if "photo_response" in table.columns:
            ax.axhline(part["photo_response"].iloc[0], color="black", linestyle=":", linewidth=1)
        dress(ax, wrapped(row_label(name), 22))
        ax.tick_params(labelbottom=True)
    figure.supxlabel("step", fontsize=TEXT)
    figure.supylabel("response", fontsize=TEXT)
    said = [title] if title else []
    said += ["dotted: at the photo"] if "photo_response" in table.columns else []
    if said:
        figure.suptitle(", ".join(said), fontsize=TITLE, parse_math=False)
    return figure


def _looks(names: Sequence[str]) -> dict[str, Look]:
    families = {name: _family(name) for name in names}
    found = looks(families.values())
    return {name: found[family] for name, family in families.items()}


def _family(name: str) -> str:
    try:
        return PathwayKey.parse(name).family
    except StoreError:  # a name that somebody gave a row
        return name


def row_label(name: str) -> str:
    """A row's name as people write it.

    >>> row_label("neuron_mct@0.98"), row_label("original"), row_label("my own row")
    ('NeuronMCT', 'Original', 'my own row')
    """
    try:
        return pathway_label(name)
    except StoreError:
        return name


def save_picture(picture: npt.NDArray[np.uint8], path: str | os.PathLike[str]) -> Path:
    """Write a picture `(H, W, 3)` uint8 as PNG and return its path. Raises as `appearing`."""
    with appearing(path) as file:
        Image.fromarray(picture).save(file, format="PNG")
    return Path(path)
