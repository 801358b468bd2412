"""Figures of the analyses: matplotlib's object interface, no global state, nothing computed but where things go.

Every function takes a table of `fxpath.analysis`, or several by name to set stores side by side, and returns a
`Figure` 6.5 inches wide (a page's text) with no text under 8 points. `save` writes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .errors import InputError, SparsityError, unknown
from .files import appearing
from .keys import PathwayKey, exact_sparsity
from .labels import Look, looks, names_pair, pathway_label, pathway_labels, series, wrapped
from .panels import GREY, TEXT, WIDTH, dress, legend, line, percent_axis, site_axis, stacked

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    Tables = pd.DataFrame | Mapping[str, pd.DataFrame]

MOST_PAIRS = 6
_FORMATS = ("png", "pdf", "svg")
_UNSPLIT = 0.4  # opacity of a bar whose two parts are not known
_Name = TypeVar("_Name", str, tuple[str, str])


def dead_figure(tables: Tables) -> Figure:
    """Fig. 1: share of originally dead neurons of each selector, a panel a sparsity, from `analysis.dead_share`.

    Bars are split into switched on (full) and still dead (hatched); whiskers are the bootstrap 95 % interval of their
    sum, the dashed line is the share of all neurons that are dead. Pathways without a sparsity (Active, whose share is
    0 by definition) are left out.
    """
    stores = {name: table[table["site_number"] < 0] for name, table in _named(tables, "dead_share", "dead").items()}
    panels = []
    for name, table in stores.items():
        named = table.assign(family=[PathwayKey.parse(key).family for key in table["key"]])
        panels += [(name, level, named[named["sparsity"] == level]) for level in _levels([table])]
    if not panels:
        raise InputError("dead figure: no pathway of the table has a sparsity; compute one, for example neuron_mct@0.9")
    families = {
        name: _in_order(family for owner, _, part in panels if owner == name for family in part["family"])
        for name in stores
    }
    colours = looks(family for names in families.values() for family in names)
    levels = max(sum(owner == name for owner, _, _ in panels) for name in stores)
    columns = 2 if levels == 4 else min(levels, 3)
    grid = [panels_of for name in stores for panels_of in _rows([p for p in panels if p[0] == name], columns)]
    heights = [0.29 * max(len(families[members[0][0]]), 2) for members in grid]
    figure = Figure(figsize=(WIDTH, 0.75 + sum(heights) + 0.75 * len(grid)), layout="constrained")
    axes = figure.subplots(len(grid), columns, squeeze=False, sharex=True, height_ratios=heights)
    top = max(float(np.nanmax([*part["dead_share"], *part["high"], *part["base_rate"], 0.02])) for _, _, part in panels)
    for row, members in enumerate(grid):
        for column in range(columns):
            ax = axes[row, column]
            if column >= len(members):
                ax.set_axis_off()
                continue
            name, level, part = members[column]
            _dead_panel(ax, {row["family"]: row for row in part.to_dict("records")}, families[name], colours)
            dress(ax, f"{wrapped(name, 24)}\nκ = {level:g}" if name else f"sparsity κ = {level:g}")
            ax.set_xlim(0, top * 1.4)  # room for the numbers
            ax.xaxis.set_major_formatter(percent_axis(top))
            ax.tick_params(labelbottom=True)
            if column:
                ax.set_yticklabels([])
    figure.supxlabel("kept neurons that are dead in the original network (mean over samples)", fontsize=TEXT)
    shown = [part[part["dead_share"].notna()]["switched_on_share"] for _, _, part in panels]
    kinds = []
    if any(values.notna().any() for values in shown):
        kinds += [
            Patch(facecolor=GREY, label="switched on"),
            Patch(facecolor="white", edgecolor=GREY, hatch="////", label="still dead"),
        ]
    if any(values.isna().any() for values in shown):
        kinds.append(Patch(facecolor=GREY, alpha=_UNSPLIT, label="dead, split unknown"))
    base = Line2D([], [], color="black", linestyle="--", linewidth=1, label="dead among all neurons")
    legend(figure, [*kinds, base, Line2D([], [], color="black", marker="|", label="95 % interval")])
    return figure


def dead_by_site_figure(tables: Tables, sparsity: float | str) -> Figure:
    """Dead share of each selector over the sites in order, with the base rate dashed, from `analysis.dead_share`."""
    return _over_sites(
        _named(tables, "dead_share", "dead"), sparsity, "dead_share", "base_rate", "dead among kept", "dead among all"
    )


def density_by_site_figure(tables: Tables, sparsity: float | str) -> Figure:
    """Density of each selector's pathways over the sites in order, from `analysis.dead_share`.

    The dashed line is the density that the sparsity asks for.
    """
    named = _named(tables, "dead_share", "density")
    asked = {name: table.assign(asked=float(1 - exact_sparsity(sparsity))) for name, table in named.items()}
    return _over_sites(asked, sparsity, "density", "asked", "share of neurons kept", "1 − κ")


def overlap_matrix_figure(tables: Tables, sparsity: float | str) -> Figure:
    """Fig. 2a: mean Jaccard index of every two selectors, network-wide, from `analysis.overlap`.

    Above each panel stand the chance level of random neurons of these densities and the mean of the RandomActive null,
    as ranges over the pairs without Active.
    """
    everywhere = _at(_named(tables, "overlap", "overlap matrix"), sparsity)
    named = {name: table[table["site_number"] < 0] for name, table in everywhere.items()}
    keys = {name: _in_order([*table["first"], *table["second"]]) for name, table in named.items()}
    most = max(map(len, keys.values()))
    columns = 2 if len(named) > 1 and most <= 5 else 1
    rows = math.ceil(len(named) / columns)
    cell = min(0.55, (WIDTH - 2.4) / most) if columns == 1 else min(0.5, 1.8 / most)
    heights = [cell * max(map(len, group)) for group in _rows(list(keys.values()), columns)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for ax in axes[len(named) :]:
        ax.set_axis_off()
    for ax, (name, table) in zip(axes, named.items(), strict=False):
        image = _matrix_panel(ax, table, keys[name])
        ax.set_anchor("W" if columns == 1 else "C")
        others = table[~(table["first"].eq("active") | table["second"].eq("active"))]
        said = f"{name}, " if name else ""
        said += f"κ = {float(sparsity):g}"
        if len(others):
            said += f"\nchance {_range(others['chance'])}; RandomActive {_range(others['null_mean'])}"
            said += "" if len(others) == len(table) else "\n(of the pairs without Active)"
        dress(ax, said)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.6, aspect=25, panchor=False)
    bar.set_label("mean Jaccard index over samples", fontsize=TEXT)
    bar.ax.tick_params(labelsize=TEXT)
    return figure


def overlap_by_site_figure(
    tables: Tables, sparsity: float | str, pairs: Sequence[tuple[str, str]] | None = None
) -> Figure:
    """Fig. 2b: mean Jaccard index of pairs of selectors over the sites in order, from `analysis.overlap`.

    The thin dashed line of the same colour is the mean of the pair's RandomActive null. `pairs` names keys, families
    or selectors; without it the pairs that overlap most network-wide are shown, Active left out while others remain.
    """
    named = _at(_named(tables, "overlap", "overlap over sites"), sparsity)
    chosen, said = _chosen_pairs(named, pairs)
    colours = series(len(chosen))
    labels = [f"{pathway_label(one)} – {pathway_label(two)}" for one, two in chosen]
    figure, axes = stacked(len(named), labels, 2)
    shown = {name: {pair: _of_pair(table, pair) for pair in chosen} for name, table in named.items()}
    drawn = [part for parts in shown.values() for part in parts.values()]
    top = max(float(np.nanmax([*part["jaccard"], *part["null_mean"], 0.02])) for part in drawn)
    for ax, (name, table) in zip(axes, named.items(), strict=True):
        for number, (pair, look) in enumerate(zip(chosen, colours, strict=True)):
            part = shown[name][pair]
            ax.add_line(line(look, "", number / len(chosen), part["site_number"], part["jaccard"]))
            ax.plot(part["site_number"], part["null_mean"], color=look.colour, linestyle="--", linewidth=0.8)
        site_axis(ax, table)
        ax.set_ylim(-0.03 * top, 1.05 * top)
        ax.set_ylabel("mean Jaccard index", fontsize=TEXT)
        dress(ax, (f"{name}, " if name else "") + f"κ = {float(sparsity):g}{said}")
    lines = [
        line(look, label, number / len(chosen))
        for number, (label, look) in enumerate(zip(labels, colours, strict=True))
    ]
    null = Line2D([], [], color=GREY, linestyle="--", linewidth=0.8, label="RandomActive null (dashed)")
    legend(figure, [*lines, null], 2)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure, PNG at 150 dots an inch (or .pdf, .svg by the name), and return its path.

    Folders are made; the file has its name only once it is whole. Raises `InputError` for another suffix or a path
    that cannot be written.
    """
    target = Path(path)
    kind = target.suffix.lower().lstrip(".")
    if kind not in _FORMATS:
        raise InputError(f"save figure: expected a name that ends in .png, .pdf or .svg, found {target.name!r}")
    with appearing(target) as file:
        figure.savefig(file, format=kind, dpi=150)
    return target


def _named(tables: Tables, source: str, what: str) -> dict[str, pd.DataFrame]:
    """Tables by store name; checks that `analysis.<source>` made them."""
    named = dict(tables) if isinstance(tables, Mapping) else {"": tables}
    needed = {"site", "site_number", "sparsity"} | (
        {"key", "dead_share", "density"} if source == "dead_share" else {"first", "second", "jaccard"}
    )
    for name, table in named.items():
        if missing := sorted(needed - set(table.columns)):
            raise InputError(
                f"{what} figure: expected the table of analysis.{source}{f' for {name}' if name else ''}, found one "
                f"without {', '.join(missing)}"
            )
    if not named:
        raise InputError(f"{what} figure: expected at least one table, found none")
    return named


def _at(named: Mapping[str, pd.DataFrame], sparsity: float | str) -> dict[str, pd.DataFrame]:
    """The rows of one sparsity, of the stores that have it."""
    wanted = float(exact_sparsity(sparsity))
    found = {name: table[table["sparsity"] == wanted] for name, table in named.items()}
    found = {name: table for name, table in found.items() if len(table)}
    if not found:
        levels = _levels(named.values())
        near = f"; nearest: {min(levels, key=lambda level: abs(level - wanted)):g}" if levels else ""
        raise SparsityError(
            f"figure: the table holds no sparsity {wanted:g}{near} "
            f"(all: {', '.join(f'{level:g}' for level in levels) or 'none'})"
        )
    return found


def _of_pair(table: pd.DataFrame, pair: tuple[str, str]) -> pd.DataFrame:
    """The sites of one pair in order, whichever of the two the store has first."""
    one, two = pair
    forth = (table["first"] == one) & (table["second"] == two)
    back = (table["first"] == two) & (table["second"] == one)
    return table[(forth | back) & (table["site_number"] >= 0)].sort_values("site_number")


def _levels(tables: Iterable[pd.DataFrame]) -> list[float]:
    return sorted({float(level) for table in tables for level in table["sparsity"].dropna()})


def _in_order(names: Iterable[_Name]) -> list[_Name]:
    return list(dict.fromkeys(names))


def _rows(members: Sequence[Any], columns: int) -> list[Sequence[Any]]:
    return [members[start : start + columns] for start in range(0, len(members), columns)]


def _dead_panel(
    ax: Axes, rows: Mapping[str, Mapping[Any, Any]], families: Sequence[str], colours: Mapping[str, Look]
) -> None:
    known = [row["base_rate"] for row in rows.values() if not math.isnan(row["base_rate"])]
    for place, family in enumerate(families):
        base = rows[family]["base_rate"] if family in rows else math.nan
        ax.vlines(
            known[0] if math.isnan(base) and known else base,  # the line goes on behind what is missing
            place - 0.5,
            place + 0.5,
            color="black",
            linestyle="--",
            linewidth=1,
            zorder=0.5,
        )
        row = rows.get(family, {"dead_share": math.nan})
        if math.isnan(row["dead_share"]):
            ax.text(0, place, " missing", va="center", fontsize=TEXT, color=GREY)
            continue
        colour, total, switched = colours[family].colour, row["dead_share"], row["switched_on_share"]
        if math.isnan(switched):
            ax.barh(place, total, height=0.7, color=colour, alpha=_UNSPLIT)
        else:
            ax.barh(place, switched, height=0.7, color=colour)
            if total > switched:
                rest = total - switched
                ax.barh(place, rest, left=switched, height=0.7, facecolor="white", edgecolor=colour, hatch="////")
        end = total
        if row["low"] < row["high"]:
            ax.hlines(place, row["low"], row["high"], color="black", linewidth=1.2)
            ax.vlines([row["low"], row["high"]], place - 0.15, place + 0.15, color="black", linewidth=1.2)
            end = max(total, row["high"])
        ax.annotate(
            f"{100 * total:.3g} %",
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=TEXT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # the base rate passes behind the number
        )
    ax.set_ylim(len(families) - 0.5, -0.5)
    ax.set_yticks(range(len(families)), pathway_labels(families, 22))


def _matrix_panel(ax: Axes, table: pd.DataFrame, keys: Sequence[str]) -> Any:
    values = np.full((len(keys), len(keys)), np.nan)
    for one, two, jaccard in zip(table["first"], table["second"], table["jaccard"], strict=True):
        here, there = keys.index(one), keys.index(two)
        values[here, there] = values[there, here] = jaccard
    ax.set_facecolor("0.93")  # the diagonal, and pairs that no sample has
    image = ax.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(values):
        missing = math.isnan(value)
        text = "" if row == column else "–" if missing else f"{value:.2f}"
        colour = "black" if missing or value > 0.6 else "white"
        ax.text(column, row, text, ha="center", va="center", fontsize=TEXT, color=colour)
    names = pathway_labels(keys, 22)
    tilt = 90 if any("\n" in name for name in names) else 45
    ax.set_yticks(range(len(keys)), names)
    ax.set_xticks(
        range(len(keys)), names, rotation=tilt, ha="right", va="center" if tilt == 90 else "top", rotation_mode="anchor"
    )
    return image


def _over_sites(
    named: Mapping[str, pd.DataFrame], sparsity: float | str, column: str, reference: str, label: str, said: str
) -> Figure:
    """A line a selector over the sites in order, and the reference dashed; a panel a store."""
    parts = {name: table[table["site_number"] >= 0] for name, table in _at(named, sparsity).items()}
    keys = _in_order(key for part in parts.values() for key in part["key"])
    colours = dict(zip(keys, looks(PathwayKey.parse(key).family for key in keys).values(), strict=True))
    figure, axes = stacked(len(parts), [pathway_label(key) for key in keys], 3)
    top = max(float(np.nanmax([*part[column], *part[reference], 0.02])) for part in parts.values())
    for ax, (name, part) in zip(axes, parts.items(), strict=True):
        ax.plot(*_reference(part, reference), color="black", linestyle="--", linewidth=1, zorder=5)
        for number, key in enumerate(keys):
            rows = part[part["key"] == key].sort_values("site_number")
            ax.add_line(line(colours[key], "", number / len(keys), rows["site_number"], rows[column]))
        site_axis(ax, part)
        ax.set_ylim(-0.03 * top, 1.05 * top)
        ax.yaxis.set_major_formatter(percent_axis(top))
        ax.set_ylabel(label, fontsize=TEXT)
        dress(ax, (f"{name}, " if name else "") + f"κ = {float(sparsity):g}")
    lines = [line(colours[key], pathway_label(key), number / len(keys)) for number, key in enumerate(keys)]
    legend(figure, [*lines, Line2D([], [], color="black", linestyle="--", linewidth=1, label=said)], 3)
    return figure


def _reference(part: pd.DataFrame, column: str) -> tuple[Any, Any]:
    """The reference line of the key that says it for most samples."""
    key = part.groupby("key", sort=False)["samples"].sum().idxmax()
    rows = part[part["key"] == key].sort_values("site_number")
    return rows["site_number"], rows[column]


def _chosen_pairs(
    named: Mapping[str, pd.DataFrame], pairs: Sequence[tuple[str, str]] | None
) -> tuple[list[tuple[str, str]], str]:
    """Pairs of keys as the tables have them, and what the title says of a choice."""
    strength: dict[tuple[str, str], float] = {}
    for table in named.values():
        for one, two, number, value in zip(
            table["first"], table["second"], table["site_number"], table["jaccard"], strict=True
        ):
            pair = (two, one) if (two, one) in strength else (one, two)
            known = strength.setdefault(pair, -1.0)
            strength[pair] = max(known, value) if number < 0 and value == value else known
    if pairs is None:
        others = [pair for pair in strength if "active" not in pair] or list(strength)
        if len(others) <= MOST_PAIRS:
            return others, ""
        best = sorted(others, key=lambda pair: -strength[pair])[:MOST_PAIRS]
        said = f" (the {MOST_PAIRS} of {len(others)} pairs that overlap most)"
        return [pair for pair in others if pair in best], said
    chosen: list[tuple[str, str]] = []
    for wanted in pairs:
        found = [pair for pair in strength if names_pair(wanted, pair) or names_pair(wanted[::-1], pair)]
        if not found:
            known_pairs = [" with ".join(pair) for pair in strength]
            raise InputError(f"overlap over sites figure: {unknown('pair', ' with '.join(wanted), known_pairs)}")
        chosen += found
    return _in_order(chosen), ""


def _range(values: pd.Series[float]) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return "not known" if low == "nan" else low if low == high else f"{low}–{high}"
