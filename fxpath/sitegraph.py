"""The site graph and the tree of module paths, from an index and its edges alone: no network, no model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import networkx as nx

from .errors import InputError
from .neurons import NeuronIndex

if TYPE_CHECKING:
    SiteGraph = nx.DiGraph[int]

INPUT = -1  # the number of the input; the response has that of the sites


def site_graph(index: NeuronIndex, edges: Iterable[Sequence[int]]) -> SiteGraph:
    """The site graph: data flows along an edge from one site to another through no other site.

    Nodes are numbers: −1 the input, 0 … S − 1 the sites in order of execution, S the response. Their attributes are
    `name`, `op`, `shape` and `neurons`; input and response have the op "input" and "response", the shape () and 0
    neurons. `edges` are pairs (source, target), as `Network.edges` or a store's. The graph has no cycle.

    Raises `InputError` for an edge that is no pair of such numbers, or goes back.

    >>> index = NeuronIndex.build([("relu", "relu", (4,)), ("fc.relu", "relu", (2, 3))])
    >>> graph = site_graph(index, [(-1, 0), (0, 1), (0, 2), (1, 2)])
    >>> list(graph), graph.nodes[1]
    ([-1, 0, 1, 2], {'name': 'fc.relu', 'op': 'relu', 'shape': (2, 3), 'neurons': 6})
    """
    graph: SiteGraph = nx.DiGraph()
    graph.add_node(INPUT, name="input", op="input", shape=(), neurons=0)
    for number, site in enumerate(index.sites):
        graph.add_node(number, name=site.name, op=site.op, shape=site.shape, neurons=site.neurons)
    graph.add_node(len(index), name="response", op="response", shape=(), neurons=0)
    for edge in edges:
        source, target = (int(end) for end in edge) if len(edge) == 2 else (INPUT, INPUT)
        if not INPUT <= source < target <= len(index):
            raise InputError(
                f"site graph: expected edges (source, target) with −1 ≤ source < target ≤ {len(index)}, found "
                f"{tuple(edge)}; give the edges that belong to this index"
            )
        graph.add_edge(source, target)
    return graph


def shape_text(shape: Sequence[int], channels: int | None = None) -> str:
    """A shape as people write it, the axis of the channels in brackets where that is asked for.

    >>> shape_text((64, 7, 7)), shape_text((64, 7, 7), channels=0), shape_text(())
    ('64 × 7 × 7', '[64] × 7 × 7', '1')
    """
    parts = [f"[{size}]" if axis == channels else str(size) for axis, size in enumerate(shape)]
    return " × ".join(parts) or "1"


def shapes(index: NeuronIndex) -> list[str]:
    """The sites' shapes as text; at granularity "channel" the axis that is counted is in brackets."""
    channel = index.granularity == "channel"
    return [shape_text(site.shape, site.axis if channel else None) for site in index.sites]


# --- lines for people -----------------------------------------------------------------------------------------------


def table_lines(index: NeuronIndex) -> list[str]:
    """The index as a table: a head, and a line for each site; no wider than 100 columns for common networks."""
    name, shape = (max(map(len, texts)) for texts in ([site.name for site in index.sites], shapes(index)))
    name, shape = max(name, 4), max(shape, 18)
    lines = [f"{'#':>4}  {'site':<{name}}  {'op':<10}  {'shape':<{shape}}  {'neurons':>11}  {'from':>11}"]
    for number, (site, text) in enumerate(zip(index.sites, shapes(index), strict=True)):
        lines.append(
            f"{number:>4}  {site.name:<{name}}  {site.op:<10}  {text:<{shape}}  {site.neurons:>11,}  {site.start:>11,}"
        )
    return lines


_Member = tuple[tuple[str, ...], int]  # what is left of a site's path, and the site's number
_Row = tuple[str, str, str, str, str, str]


def tree_lines(index: NeuronIndex, name: str = "network") -> list[str]:
    """The sites as a tree of module paths: a line for each site, and for each module with the sums of its sites.

    >>> index = NeuronIndex.build([("relu", "relu", (4,)), ("a.b.relu", "relu", (2, 3)), ("a.relu", "relu6", (5,))])
    >>> print("\\n".join(tree_lines(index)))
    #  site           op     shape  neurons  sites
       network                           15      3
    0  ├─ relu        relu   4            4
       └─ a                              11      2
          ├─ b                            6      1
    1     │  └─ relu  relu   2 × 3        6
    2     └─ relu     relu6  5            5
    """
    members = [(tuple(site.name.split(".")), number) for number, site in enumerate(index.sites)]
    rows: list[_Row] = [("#", "site", "op", "shape", "neurons", "sites"), _sums(index, members, name)]
    rows += _branches(index, members, "", shapes(index))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (">", "<", "<", "<", ">", ">")
    return [
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(row, aligned, widths, strict=True)).rstrip()
        for row in rows
    ]


def _sums(index: NeuronIndex, members: Sequence[_Member], label: str) -> _Row:
    neurons = sum(index.sites[number].neurons for _, number in members)
    return ("", label, "", "", f"{neurons:,}", f"{len(members):,}")


def _branches(index: NeuronIndex, members: Sequence[_Member], stem: str, texts: Sequence[str]) -> Iterator[_Row]:
    groups: dict[tuple[str, bool], list[_Member]] = {}  # a name may be that of a site and of a module at once
    for path, number in members:
        groups.setdefault((path[0], len(path) > 1), []).append((path[1:], number))
    for place, ((label, inner), below) in enumerate(groups.items(), start=1):
        last = place == len(groups)
        branch = f"{stem}{'└─' if last else '├─'} {label}"
        if inner:
            yield _sums(index, below, branch)
            yield from _branches(index, below, stem + ("   " if last else "│  "), texts)
        else:
            number = below[0][1]
            site = index.sites[number]
            yield (str(number), branch, site.op, texts[number], f"{site.neurons:,}", "")


# --- a graph for Graphviz -------------------------------------------------------------------------------------------


def dot_text(graph: SiteGraph, title: str = "") -> str:
    """A site graph in Graphviz's language, for `dot -Tsvg`; any name is quoted as it needs.

    >>> print(dot_text(site_graph(NeuronIndex.build([('say "relu"', "relu", (2, 3))]), [(-1, 0), (0, 1)]), "tiny"))
    digraph sites {
      graph [label="tiny", labelloc=t];
      node [shape=box, fontname="Helvetica"];
      input [label="input", shape=ellipse];
      site_0 [label="say \\"relu\\"\\nrelu  2 × 3\\n6 neurons"];
      response [label="response", shape=ellipse];
      input -> site_0;
      site_0 -> response;
    }
    <BLANKLINE>
    """
    ends = {INPUT: "input", len(graph) - 2: "response"}
    lines = [f'  graph [label="{_quoted(title)}", labelloc=t];', '  node [shape=box, fontname="Helvetica"];']
    for number, site in graph.nodes.items():
        if number in ends:
            lines.append(f'  {ends[number]} [label="{ends[number]}", shape=ellipse];')
        else:
            said = f"{site['name']}\n{site['op']}  {shape_text(site['shape'])}\n{site['neurons']:,} neurons"
            lines.append(f'  site_{number} [label="{_quoted(said)}"];')
    lines += [f"  {ends.get(one, f'site_{one}')} -> {ends.get(two, f'site_{two}')};" for one, two in graph.edges]
    return "\n".join(["digraph sites {", *lines, "}", ""])


_ESCAPES = {"\\": r"\\", '"': r"\"", "&": "&amp;", "\n": r"\n"}  # Graphviz reads \N and &lt; within quotes


def _quoted(text: str) -> str:
    """Text for between Graphviz's quotes; what cannot be printed as Python writes it."""
    plain = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return "".join(_ESCAPES.get(c, c) for part in plain for c in part)
