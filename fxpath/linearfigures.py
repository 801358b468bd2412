"""Figures of local linearity: radius, gradient stability and deviation against sparsity, the original beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .errors import InputError
from .keys import PathwayKey
from .labels import Look, looks, pathway_label
from .panels import TEXT, WIDTH, dress, legend

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ORIGINAL = "original"
_DECADES = 1e-6  # of a logarithmic axis: what is smaller is nothing
_PANELS = (  # column, title, what the numbers are
    ("radius", "linear along rays", "median radius / ‖x‖"),
    ("change", "change of the gradient", "‖∇Φ̂(x+δ) − ∇Φ̂(x)‖ / ‖∇Φ̂(x)‖"),
    ("deviation", "deviation from linear", "|Φ̂(x+δ) − Φ − g·δ| / (1+|Φ|+|g·δ|)"),
)


def linearity_figure(tables: pd.DataFrame | Mapping[str, pd.DataFrame], share: float) -> Figure:
    """A row of panels for each network, from `analysis.linearity_summary`, at ‖δ‖ = `share` · ‖x‖.

    Against sparsity: how far rays stay linear, how much the gradient changes, how far the response is from linear.
    Whiskers are 95 % intervals; the dashed line is the original network, the dotted one the active sub-network.
    """
    named = dict(tables) if isinstance(tables, Mapping) else {"": tables}
    named = {name: table[table["share"] == share] for name, table in named.items()}
    if not named or any(table.empty for table in named.values()):
        raise InputError(f"linearity figure: expected tables of linearity_summary with the share {share:g}, found none")
    families = dict.fromkeys(
        PathwayKey.parse(key).family for table in named.values() for key in table.loc[table["sparsity"].notna(), "key"]
    )
    colours = looks(families)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.3 * len(named)), layout="constrained")
    axes = figure.subplots(len(named), len(_PANELS), squeeze=False, sharex=True)
    for row, (name, table) in zip(axes, named.items(), strict=True):
        for ax, (column, title, unit) in zip(row, _PANELS, strict=True):
            _panel(ax, table, column, colours)
            dress(ax, title)
            ax.set_ylabel(f"{name}\n{unit}" if column == "radius" and name else unit, fontsize=TEXT, parse_math=False)
    for ax in axes[-1]:
        ax.set_xlabel("sparsity κ", fontsize=TEXT)
    lines: list[Any] = [
        Line2D(
            [], [], color=look.colour, linestyle=look.style, marker=look.marker, markersize=4, label=pathway_label(each)
        )
        for each, look in colours.items()
    ]
    lines.append(Line2D([], [], color="black", linestyle="--", label="original network"))
    if any((table["key"] == "active").any() for table in named.values()):
        lines.append(Line2D([], [], color="black", linestyle=":", label="Active"))
    legend(figure, lines)
    return figure


def _panel(ax: Axes, table: pd.DataFrame, column: str, colours: Mapping[str, Look]) -> None:
    owned = [PathwayKey.parse(key).family for key in table["key"]]
    for place, (family, look) in enumerate(colours.items()):
        part = table[[each == family for each in owned]].sort_values("sparsity")
        part = part[part["sparsity"].notna() & part[column].notna()]
        middle = part[column].to_numpy()
        low, high = (part[f"{column}_{end}"].fillna(part[column]).to_numpy() for end in ("low", "high"))
        shift = 0.004 * (place - len(colours) / 2)  # so that whiskers stand side by side
        ax.errorbar(
            part["sparsity"] + shift, middle, yerr=[(middle - low).clip(min=0), (high - middle).clip(min=0)],
            color=look.colour, linestyle=look.style, marker=look.marker, markersize=3.5, linewidth=1.2, elinewidth=0.8,
        )  # fmt: skip
    for key, style in ((ORIGINAL, "--"), ("active", ":")):
        level = table.loc[table["key"] == key, column]
        if len(level) and level.notna().all():
            ax.axhline(float(level.iloc[0]), color="black", linestyle=style, linewidth=1)
    positive = table.loc[table[column] > 0, column]
    if column == "change":
        ax.set_ylim(bottom=0)
    elif len(positive):
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(bottom=0.5 * max(positive.min(), _DECADES * positive.max()))
    ax.tick_params(which="both", labelsize=TEXT)
