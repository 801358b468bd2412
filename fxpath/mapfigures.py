"""Figures of attribution maps: samples by methods or sparsities, one sample large, and how concentrated the maps are.

As in `plotting`: matplotlib's object interface, no global state, 6.5 inches wide, no text under 8 points. Each map has
a scale of its own: full colour is a high percentile of its |values|, and what is above is clipped to it, which the
figure says. A map that is missing, or 0 everywhere, is a grey panel with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .analysis.maps import chosen_maps
from .errors import InputError
from .labels import MapName, looks, map_label, sparsity_label
from .mappanels import Shading, draw_map, draw_over, photo_of
from .pages import GAP, LINE, WIDTH, Page
from .panels import GREY, TEXT, TITLE, dress, legend, text_lines, text_width
from .panels import WIDTH as PAPER

if TYPE_CHECKING:
    import pandas as pd

    from .analysis.maps import MapStore
    from .mappanels import Picture, Pictures

    Tables = pd.DataFrame | Mapping[str, pd.DataFrame]

MOST_SAMPLES = 40
_COLUMNS = 6  # of an overview, the photo among them
_LARGE = 4  # maps of one line of a sample's figure
_BAR = 2.0  # inches of the colour bar
_BOLD = 1.15  # times the width of plain text
_PHOTO = "photo"
_OVER = "the map over the photo"


def overview_figure(
    store: MapStore,
    samples: Sequence[int | str],
    keys: Sequence[str],
    *,
    pictures: Pictures = None,
    signed: bool = False,
    percentile: float = 99.0,
) -> Figure:
    """Fig. 5, 13 and 14: a row a sample, its photo, then a column a map key; Fig. 4 and 12: the columns are sparsities.

    The second kind is drawn where all keys have a sparsity and a method has several: a row for each sample and method.
    `pictures` are `(h, w, 3)` uint8 RGB, by sample as in `samples` or by id, and show the frame that the network saw
    (`LoadedModel.picture`); they are resized to the map. In place of one that is not there stands the store's
    thumbnail, which may show another part of the photo. Raises `StoreError` for an unknown key or sample, `InputError`
    for no or more than 40 samples and for pictures of another form.
    """
    shading, chosen = Shading(signed, percentile), chosen_maps(store, keys)
    table, rows = store.samples(), [store.row(sample) for sample in samples]
    if not 1 <= len(rows) <= MOST_SAMPLES:
        raise InputError(f"map overview: expected 1 to {MOST_SAMPLES} samples, found {len(rows)}; make several figures")
    lines = _lines(chosen)
    photos = [photo_of(store, sample, pictures) for sample in samples]
    thumbnails = any(photo.stands_in for photo in photos)
    photo_head = "thumbnail" if all(photo.stands_in for photo in photos) else "photo"
    sizes = store.maps(chosen[0], slice(0, 1)).shape[1:]
    left = LINE + GAP if any(line.title for line in lines) else 0.0
    columns = max(len(line.cells) for line in lines)
    width = min((WIDTH - left - GAP * (columns - 1)) / columns, 1.6)
    height = width * sizes[0] / sizes[1]
    page, sparse = Page(), False
    page.text(0, 0, _title(chosen, lines), fontsize=TITLE)
    page.down(0.2)
    for place, (row, photo) in enumerate(zip(rows, photos, strict=True)):
        page.down(0.08)
        _caption(page, store.classes, table.iloc[row])
        for line in lines:
            if line.heads and (place == 0 or (len(lines) > 1 and not left)):
                page.headings(left, width, [head or photo_head for head in line.heads])
            for column, key in enumerate(line.cells):
                if not key:
                    continue
                ax = page.panel(left + column * (width + GAP), width, height)
                if key == _PHOTO:
                    photo.draw(ax, sizes)
                else:
                    values = draw_map(ax, store, key, row, shading, (width, height))
                    sparse |= values is not None and shading.sparse(values)
            if line.title:
                page.text(LINE, height / 2, line.title, rotation=90, ha="right", va="center")
            page.down(height + GAP)
    _foot(page, shading, sparse, _notes(chosen, signed, thumbnails=thumbnails))
    return page.finished()


def sample_figure(
    store: MapStore,
    sample: int | str,
    keys: Sequence[str],
    *,
    picture: Picture | None = None,
    signed: bool = False,
    percentile: float = 99.0,
) -> Figure:
    """One sample large: its photo, its maps beside it, and below them the maps laid over the grey photo.

    Under each map stands what full colour is, in the map's own unit. `picture` is `(h, w, 3)` uint8 RGB and shows the
    frame that the network saw (`LoadedModel.picture`). Without it the store's thumbnail stands beside the maps and
    nothing is laid over it, as the two may not fit. Raises as `overview_figure`.
    """
    shading, chosen = Shading(signed, percentile), chosen_maps(store, keys)
    row = store.row(sample)
    photo = photo_of(store, sample, None if picture is None else {sample: picture})
    sizes = store.maps(chosen[0], slice(0, 1)).shape[1:]
    beside = photo.given and len(chosen) == 1  # of a single map
    columns = 2 if beside else math.ceil(len(chosen) / math.ceil(len(chosen) / _LARGE))
    width = min((WIDTH - GAP * columns) / (1 + columns), 2.2)
    height = width * sizes[0] / sizes[1]
    page, sparse = Page(), False
    _caption(page, store.classes, store.samples().iloc[row], size=TITLE)
    for start in range(0, len(chosen), columns):
        group = chosen[start : start + columns]
        places = [(1 + column) * (width + GAP) for column in range(columns)]
        page.down(0.06)
        heads = ["thumbnail" if photo.stands_in else "photo", *map(map_label, group), *([_OVER] if beside else [])]
        page.headings(0, width, heads)
        photo.draw(page.panel(0, width, height), sizes)
        found = {}
        for key, x in zip(group, places, strict=False):
            values = draw_map(page.panel(x, width, height), store, key, row, shading, (width, height))
            if values is not None:
                found[x] = shading.shade(values)
                sparse |= shading.sparse(values)
                page.text(x + width / 2, height + 0.04, f"full colour: {shading.top(values):.2g}", ha="center")
        if photo.given and not beside:
            page.down(height + LINE + 0.08)
            page.text(width - 0.1, height / 2, _OVER.replace(" the", "\nthe"), ha="right", va="center")
        if picture is not None:
            for x, shaded in found.items():
                draw_over(page.panel(places[1] if beside else x, width, height), picture, shaded, shading)
        page.down(height + (LINE + 0.08 if beside or not photo.given else GAP))
    _foot(page, shading, sparse, _notes(chosen, signed, thumbnails=photo.stands_in, full=True))
    return page.finished()


def gini_figure(tables: Tables, by_sample: Tables) -> Figure:
    """How concentrated the maps of each method are: the Gini index of each sample (dots), its mean and 95 % interval.

    From `analysis.map_statistics` and `map_statistics_by_sample`, or several of each by store name. At the right stand
    the mean and the share of pixels that are exactly 0, which raise the index. Raises `InputError` for other tables.
    """
    named, dots = _named(tables, "map_statistics", "low"), _named(by_sample, "map_statistics_by_sample", "sample")
    if set(named) - set(dots):
        raise InputError(f"gini figure: expected both tables of each store, found {list(named)} and {list(dots)}")
    counts = [len(table) for table in named.values()]
    colours = looks(MapName.parse(key).family for table in named.values() for key in table["key"])
    figure = Figure(figsize=(PAPER, 0.6 + sum(0.75 + 0.3 * count for count in counts)), layout="constrained")
    axes = figure.subplots(len(named), 1, squeeze=False, height_ratios=counts, sharex=True)[:, 0]
    for ax, (name, table) in zip(axes, named.items(), strict=True):
        for place, row in enumerate(table.to_dict("records")):
            look = colours[MapName.parse(row["key"]).family]
            values = dots[name].loc[dots[name]["key"] == row["key"], "gini"].to_numpy()
            offsets = 0.5 * (np.arange(len(values)) * 0.618 % 1 - 0.5)  # spread evenly, the same each time
            ax.plot(values, place + offsets, "o", markersize=3, color=look.colour, alpha=0.5, markeredgewidth=0)
            ax.plot([row["low"], row["high"]], [place, place], color="black", linewidth=1.4)
            ax.plot(row["gini"], place, "|", color="black", markersize=13, markeredgewidth=1.6)
        ax.set_yticks(range(len(table)), ["\n".join(text_lines(map_label(key), 1.6, 2)) for key in table["key"]])
        ax.set_ylim(len(table) - 0.5, -0.5)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        dress(ax, name)
        ax.tick_params(labelbottom=True)
        right = ax.twinx()
        said = [_gini_said(row) for row in table.to_dict("records")]
        right.set_yticks(range(len(table)), said)
        right.set_ylim(*ax.get_ylim())
        right.annotate("mean     zeros", (1, 1), xytext=(4, 4), xycoords="axes fraction", textcoords="offset points",
                       fontsize=TEXT, color=GREY)  # fmt: skip
        right.tick_params(labelsize=TEXT, length=0)
        right.spines[:].set_visible(False)
    figure.supxlabel(
        "Gini index of |map|: 0 = all pixels alike, 1 = all in one pixel (zeros: share of pixels that are exactly 0)",
        fontsize=TEXT,
    )
    dot = Line2D([], [], color=GREY, marker="o", markersize=3, linestyle="none", label="one sample")
    legend(figure, [dot, Line2D([], [], color="black", marker="|", markersize=10, label="mean and 95 % interval")])
    return figure


def _gini_said(row: Mapping[Any, Any]) -> str:
    """Mean and share of zero pixels of a method, and how many maps have no Gini index."""
    zeros = 100 * row["zero_share"]
    said = f"{row['gini']:.3f}   " if row["gini"] == row["gini"] else "no map   "
    said += "" if zeros != zeros else "< 0.1 %" if 0 < zeros < 0.1 else f"{zeros:.2g} %"
    if row["all_zero"]:
        said += f"\n{row['all_zero']} of {row['samples']} all 0"
    return said.rstrip()


# ---- what stands where


@dataclass(frozen=True)
class _Line:
    """One line of panels of a sample: keys, `_PHOTO`, or "" for none; heads above them, and a title at the left."""

    cells: tuple[str, ...]
    heads: tuple[str, ...]
    title: str = ""


def _lines(keys: Sequence[str]) -> list[_Line]:
    """Sparsities beside each other and methods below each other, or, where there are no such series, all in a row."""
    names = {key: MapName.parse(key) for key in keys}
    levels = sorted({name.sparsity for name in names.values() if name.sparsity is not None})
    methods = list(dict.fromkeys(name.label for name in names.values()))
    if all(name.sparsity is not None for name in names.values()) and 1 < len(levels) < 10 and len(methods) < len(keys):
        found = {(name.label, name.sparsity): key for key, name in names.items()}
        return [
            _Line(
                ("" if number else _PHOTO, *(found.get((method, level), "") for level in levels)),
                () if number else ("", *map(sparsity_label, levels)),
                method if len(methods) > 1 else "",
            )
            for number, method in enumerate(methods)
        ]
    cells = (_PHOTO, *keys)
    columns = math.ceil(len(cells) / math.ceil(len(cells) / _COLUMNS))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return [_Line(row, tuple("" if key == _PHOTO else map_label(key) for key in row)) for row in rows]


def _title(keys: Sequence[str], lines: Sequence[_Line]) -> str:
    if lines[0].heads[1].startswith("κ"):
        names = dict.fromkeys(MapName.parse(key).label for key in keys)
        return f"{' and '.join(names) if len(names) < 3 else 'Maps'} at sparsity κ, the share of neurons left out"
    return "What each method finds relevant to the class named above the photo"


def _caption(page: Page, classes: Sequence[str], sample: pd.Series[Any], size: float = TEXT) -> None:
    """The class, its probability, and other classes that the sample has or gets, at the left; the id at the right."""
    target, predicted, label = (int(sample[name]) for name in ("target", "prediction", "label"))
    names = {
        number: classes[number] if 0 <= number < len(classes) else f"class {number}"
        for number in (target, predicted, label)
    }
    parts = []
    if target >= 0:
        known = f", p = {sample['probability']:.2f}" if math.isfinite(sample["probability"]) else ""
        parts.append(f"{'predicted' if predicted == target else 'explained'}: {names[target]}{known}")
    parts += [f"predicted: {names[predicted]}"] if 0 <= predicted != target else []
    parts += [f"labelled: {names[label]}"] if 0 <= label != target else []
    (said,) = text_lines("; ".join(parts), 0.75 * WIDTH / _BOLD, 1, size)
    (name,) = text_lines(str(sample["id"])[::-1], WIDTH - _BOLD * text_width(said, size) - 0.3, 1)
    page.text(0, 0.02, said, fontsize=size, weight="bold")
    page.text(WIDTH, 0.02, name[::-1], ha="right", color=GREY)
    page.down(LINE + 0.03 * (size > TEXT) + 0.03)


def _foot(page: Page, shading: Shading, sparse: bool, notes: Sequence[str]) -> None:
    """The colour bar, and what a reader must know to read the maps."""
    page.down(0.1)
    ax = page.panel(0.12, _BAR, 0.1)
    colours = ScalarMappable(Normalize(shading.look["vmin"], shading.look["vmax"]), shading.look["cmap"])
    ends = "neither" if shading.percentile == 100 else "both" if shading.signed else "max"
    bar = page.figure.colorbar(colours, cax=ax, orientation="horizontal", extend=ends, extendfrac=0.05)
    bar.set_ticks(
        [-1, 0, 1] if shading.signed else [0, 0.5, 1], labels=["−1", "0", "1"] if shading.signed else ["0", "0.5", "1"]
    )
    bar.ax.tick_params(labelsize=TEXT)
    page.down(0.35)
    below = page.paragraph(0, _BAR + 0.3, f"1 = {shading.said(sparse)}")
    page.down(-0.4)
    beside = page.paragraph(_BAR + 0.55, WIDTH - _BAR - 0.55, " ".join(notes))
    page.down(max(below + 0.4, beside))


def _notes(keys: Sequence[str], signed: bool, *, thumbnails: bool, full: bool = False) -> list[str]:
    names = [MapName.parse(key) for key in keys]
    gradients = all((name.pathway or name.method == "gradient") and not name.opened for name in names)
    rises = ": the score of the class rises with the pixel's value" if gradients else ", positive"
    falls = ": it falls." if gradients else ", negative."
    notes = [f"Red{rises}; blue{falls}" if signed else "Bright: what the score of the class depends on most."]
    if any(name.pathway and not name.method for name in names):
        notes.append(
            "A selector's name stands for the gradient through its pathway: all neurons outside it are held fixed; κ "
            "is their share."
        )
    if any(name.method == "masked_gradient" for name in names):
        notes.append("MaskedGradient: they are 0 instead.")
    if any(name.method == "random_active" for name in names):
        notes.append("RandomActive: as many neurons of each site, drawn from the active ones.")
    if any(name.opened for name in names):
        notes.append("*: opened, which takes bright specks away.")
    if full:
        notes.append("Below each map stands the value of its full colour" + (
            ", in score per unit of the input." if gradients else "."
        ))  # fmt: skip
    if thumbnails:
        notes.append("Thumbnails show the middle of a photo; the network may have seen more or less of it.")
    return notes


def _named(tables: Tables, source: str, needed: str) -> dict[str, pd.DataFrame]:
    named = dict(tables) if isinstance(tables, Mapping) else {"": tables}
    for table in named.values():
        if not {"key", "gini", "zero_share", needed} <= set(table.columns):
            raise InputError(f"gini figure: expected the table of analysis.{source}, found {', '.join(table.columns)}")
    if not any(map(len, named.values())):
        raise InputError(f"gini figure: expected a row of analysis.{source}, found none")
    return named
