"""The site graph: what networkx, Graphviz and people are given, and pictures in which nothing is covered."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import networkx as nx
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch
from matplotlib.text import Text

from fxpath.errors import InputError
from fxpath.neurons import NeuronIndex
from fxpath.sitedrawing import MOST_SITES, checked_picture, save_site_graph, site_graph_figure
from fxpath.sitegraph import dot_text, shapes, site_graph, table_lines, tree_lines

ROOT = Path(__file__).parents[1]

# two residual blocks of which the second has two branches beside each other
NAMES = ("stem.relu", "one.relu", "one.relu_1", "two.left.relu", "two.right.relu", "two.relu")
EDGES = ((-1, 0), (0, 1), (1, 2), (0, 2), (2, 3), (2, 4), (3, 5), (4, 5), (2, 5), (5, 6))


def small(granularity: str = "unit") -> NeuronIndex:
    blocks = [(name, "relu6" if "left" in name else "relu", (4 + place, 3)) for place, name in enumerate(NAMES)]
    return NeuronIndex.build(blocks, axes=[0, 0, 0, 1, 0, 0], granularity=granularity)


def test_site_graph() -> None:
    graph = site_graph(small(), EDGES)
    assert list(graph) == [-1, 0, 1, 2, 3, 4, 5, 6]
    assert sorted(graph.edges) == sorted(EDGES)
    assert graph.nodes[3] == {"name": "two.left.relu", "op": "relu6", "shape": (7, 3), "neurons": 21}
    assert graph.nodes[-1] == {"name": "input", "op": "input", "shape": (), "neurons": 0}
    assert graph.nodes[6] == {"name": "response", "op": "response", "shape": (), "neurons": 0}
    assert nx.immediate_dominators(graph, -1)[5] == 2
    assert [number for number in graph if not nx.has_path(graph, -1, number)] == []
    channels = site_graph(small("channel"), np.array(EDGES, dtype="<i4"))
    assert [channels.nodes[number]["neurons"] for number in range(6)] == [4, 5, 6, 3, 8, 9]
    assert all(type(number) is int for edge in channels.edges for number in edge)


@pytest.mark.parametrize("edge", [(1, 1), (2, 1), (-2, 0), (0, 7), (0, 1, 2), ()])
def test_edges_that_are_none(edge: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected edges \(source, target\) with −1 ≤ source < target ≤ 6, found \("):
        site_graph(small(), [*EDGES, edge])


def test_the_same_graph_from_a_network_and_its_store(tmp_path: Path) -> None:
    import small_jobs

    import fxpath

    network = fxpath.trace(small_jobs.build().model, small_jobs.build().example(2))
    fxpath.compute(
        network, small_jobs.seven(), tmp_path / "run.h5", selectors=["active"], threads=1, micro_batch=7, progress=False
    )
    with fxpath.open_store(tmp_path / "run.h5") as store:
        stored = site_graph(store.index, store.header.edges)
    live = site_graph(network.index, network.edges)
    assert (dict(stored.nodes), list(stored.edges)) == (dict(live.nodes), list(live.edges))


def test_without_torch() -> None:
    script = (
        "import sys\n"
        "from fxpath.neurons import NeuronIndex\n"
        "from fxpath.sitedrawing import site_graph_figure\n"
        "from fxpath.sitegraph import site_graph\n"
        "site_graph_figure(site_graph(NeuronIndex.build([('relu', 'relu', (4,))]), [(-1, 0), (0, 1)]))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- lines ---


TREE = """\
#  site           op     shape  neurons  sites
   tiny                             117      6
   ├─ stem                           12      1
0  │  └─ relu     relu   4 × 3       12
   ├─ one                            33      2
1  │  ├─ relu     relu   5 × 3       15
2  │  └─ relu_1   relu   6 × 3       18
   └─ two                            72      3
      ├─ left                        21      1
3     │  └─ relu  relu6  7 × 3       21
      ├─ right                       24      1
4     │  └─ relu  relu   8 × 3       24
5     └─ relu     relu   9 × 3       27"""


def test_tree() -> None:
    assert "\n".join(tree_lines(small(), "tiny")) == TREE


def test_a_site_and_a_module_of_one_name() -> None:
    index = NeuronIndex.build([("a", "relu", (2,)), ("a.b", "relu", (3,)), ("a.b.c", "gelu", (4,))])
    assert [line.split() for line in tree_lines(index)[2:]] == [
        ["0", "├─", "a", "relu", "2", "2"], ["└─", "a", "7", "2"], ["1", "├─", "b", "relu", "3", "3"],
        ["└─", "b", "4", "1"], ["2", "└─", "c", "gelu", "4", "4"],
    ]  # fmt: skip


def test_channels_are_marked_where_they_count() -> None:
    assert shapes(small())[3] == "7 × 3"
    assert [shapes(small("channel"))[number] for number in (0, 3)] == ["[4] × 3", "7 × [3]"]
    assert table_lines(small("channel"))[4].split() == ["3", "two.left.relu", "relu6", "7", "×", "[3]", "3", "15"]
    assert shapes(NeuronIndex.build([("relu", "relu", ())])) == ["1"]


def test_a_table_of_fifty_sites_fits_a_terminal() -> None:
    index = NeuronIndex.build(
        [(f"layer{n // 12}.{n % 12}.relu_1", "relu", (2048, 112, 112)) for n in range(50)], granularity="channel"
    )
    assert max(map(len, [*table_lines(index), *tree_lines(index)])) <= 100


# --- Graphviz ---

AWKWARD = (
    'quoted "relu"', "back\\slash", "ends in \\", "\\N \\G \\l", "two\nlines", "&lt;b&gt; &", "<b>bold</b>",
    "a -> b; }", "ünï × код", "nul\0 tab\t bell\a", "\ud800", "", "node",
)  # fmt: skip


def read_dot(text: str) -> tuple[dict[str, dict[str, str]], set[tuple[str, str]]]:
    """Nodes with attributes and edges, by Graphviz's grammar: within quotes a backslash takes the next letter along."""
    tokens = re.findall(r'"(?:\\.|[^"\\])*"|->|[\w]+|[\[\]{}=;,]', text, re.DOTALL)
    assert "".join(tokens).replace(" ", "") == re.sub(r"\s", "", text)  # nothing between the tokens but space
    assert tokens[:3] == ["digraph", "sites", "{"]
    assert tokens[-1] == "}"
    nodes, edges, at = {}, set(), 3
    while at < len(tokens) - 1:
        name, at = tokens[at], at + 1
        if tokens[at] == "->":
            edges.add((name, tokens[at + 1]))
            at += 2
        else:
            attributes = {}
            while tokens[at] != "]":
                attributes[tokens[at + 1]] = tokens[at + 3]
                assert (tokens[at], tokens[at + 2]) in (("[", "="), (",", "="))
                at += 4
            nodes[name] = attributes
            at += 1
        assert tokens[at] == ";"
        at += 1
    return nodes, edges


def read_label(quoted: str) -> list[str]:
    """The lines that Graphviz shows of a label: it knows \\n, and entities as HTML has them."""
    import html

    escapes = {"n": "\n", "\\": "\\", '"': '"'}
    return html.unescape(re.sub(r"\\(.)", lambda found: escapes[found[1]], quoted[1:-1], flags=re.DOTALL)).split("\n")


def test_dot_holds_the_graph_whatever_the_names_are() -> None:
    index = NeuronIndex.build([(name, "relu", (1000, place + 1)) for place, name in enumerate(AWKWARD)])
    edges = [(place - 1, place) for place in range(len(AWKWARD) + 1)] + [(0, 5)]
    text = dot_text(site_graph(index, edges), 'a "title" \\')
    text.encode()
    nodes, found = read_dot(text)
    names = ["input", *(f"site_{place}" for place in range(len(AWKWARD))), "response"]
    assert list(nodes) == ["graph", "node", *names[:-1], "response"]
    assert found == {(names[one + 1], names[two + 1]) for one, two in edges}
    assert read_label(nodes["graph"]["label"]) == ['a "title" \\']
    for place, name in enumerate(AWKWARD):
        printed = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in name)
        lines = [*printed.split("\n"), f"relu  1000 × {place + 1}", f"{1000 * (place + 1):,} neurons"]
        assert read_label(nodes[f"site_{place}"]["label"]) == lines


# --- pictures ---


def resnet() -> nx.DiGraph:
    """Fifty sites in blocks of three, every block with a skip."""
    index = NeuronIndex.build([(f"layer{n // 12}.{n // 3}.relu_{n % 3}", "relu", (256, 56, 56)) for n in range(50)])
    return site_graph(index, [(n - 1, n) for n in range(51)] + [(n, n + 3) for n in range(0, 47, 3)])


def dense() -> nx.DiGraph:
    index = NeuronIndex.build([(f"features.block.layer{n}.relu", "relu", (128, 7, 7)) for n in range(40)])
    return site_graph(index, [(-1, 0), *((one, two) for two in range(1, 41) for one in range(two))])


@pytest.mark.parametrize("make", [lambda: site_graph(small(), EDGES), resnet, dense], ids=["small", "resnet", "dense"])
def test_pictures_are_legible(make: object) -> None:
    graph = make()  # type: ignore[operator]
    figure = site_graph_figure(graph, "a network with 1,234,567 neurons and a $ in its name, " + 3 * "which is long, ")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = figure.get_size_inches() * figure.dpi
    (ax,) = figure.axes
    shown = [text for text in ax.findobj(Text) if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in shown]
    assert min(text.get_fontsize() for text in shown) >= 8
    for place, box in enumerate(boxes):
        assert box.x0 >= 0, shown[place]
        assert box.y0 >= 0, shown[place]
        assert box.x1 <= width, shown[place]
        assert box.y1 <= height, shown[place]
        assert not [other for other in boxes[place + 1 :] if box.overlaps(other)], shown[place]
    marks = {tuple(line.get_xydata()[0]) for line in ax.lines}
    assert len(marks) == len(graph)
    curves = [patch for patch in ax.patches if isinstance(patch, PathPatch)]
    assert len(curves) == len(graph.edges)
    left, table = ax.get_xlim()[0], min(text.get_position()[0] for text in shown if text.get_text() == "relu")
    for patch in curves:
        path = patch.get_path()
        way = path.interpolated(1).to_polygons(closed_only=False)[0] if len(path.vertices) > 2 else path.vertices
        assert left < min(x for x, _ in way)
        assert max(x for x, _ in way) < table
        ends = {tuple(path.vertices[0]), tuple(path.vertices[-1])}
        assert ends < marks
        if len(path.vertices) == 2:  # a straight edge meets no site on its way
            (x, y), (x_end, y_end) = path.vertices
            for lane, row in marks - ends:
                if y < row < y_end:
                    assert abs(x + (x_end - x) * (row - y) / (y_end - y) - lane) > 0.09


def test_skips_are_curves_in_their_sources_colour() -> None:
    graph = site_graph(small(), EDGES)
    figure = site_graph_figure(graph)
    (ax,) = figure.axes
    places = {tuple(line.get_xydata()[0]): to_hex(line.get_color()) for line in ax.lines}
    rows = sorted(places, key=lambda place: place[1])
    found = {}
    for patch in ax.patches:
        ends = [rows.index(tuple(patch.get_path().vertices[end])) - 1 for end in (0, -1)]
        found[tuple(ends)] = len(patch.get_path().vertices) == 4
        if ends[0] >= 0:
            assert to_hex(patch.get_edgecolor()) == places[rows[ends[0] + 1]]
    assert {edge for edge, curved in found.items() if curved} == {(0, 2), (2, 5)}
    assert set(found) == set(EDGES)
    assert rows[4][0] != rows[5][0]  # left and right stand beside each other


def test_long_and_equal_names() -> None:
    names = ["a." * 60 + f"act_{number}" for number in range(3)] + ["two\nlines"]
    graph = site_graph(NeuronIndex.build([(name, "relu", (2,)) for name in names]), [(-1, 0), (0, 4)])
    figure = site_graph_figure(graph)
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert len({text for text in shown if "act_" in text}) == 3
    assert max(map(len, shown)) <= 50
    assert "two lines" in shown


@pytest.mark.parametrize("ending", ["svg", "png", "pdf", "PNG"])
def test_pictures_are_written(ending: str, tmp_path: Path) -> None:
    path = save_site_graph(resnet(), tmp_path / f"graph.{ending}", "a network")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    start = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending.lower()]
    assert path.read_bytes().startswith(start)
    if ending == "png":
        assert matplotlib.image.imread(path).shape[0] == round(150 * (0.2 * 53 + 0.5))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    graph = site_graph(small(), EDGES)
    for name in ("graph.jpg", "graph", ".dot"):
        with pytest.raises(InputError, match=r"expected a name that ends in \.dot or \.gv"):
            save_site_graph(graph, tmp_path / name)
    with pytest.raises(InputError, match=r"there is no folder .*absent to write graph\.dot to; make it first"):
        checked_picture(tmp_path / "absent" / "graph.dot")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(InputError, match="expected the name of a file, found the folder"):
        save_site_graph(graph, tmp_path / "folder.svg")
    assert [found.name for found in tmp_path.iterdir()] == ["folder.svg"]
    many = NeuronIndex.build([(f"relu_{number}", "relu", (1,)) for number in range(MOST_SITES + 1)])
    with pytest.raises(InputError, match="expected at most 1000 sites for a picture, found 1001"):
        save_site_graph(site_graph(many, []), tmp_path / "many.png")
    assert dot_text(site_graph(many, [])).count("neurons") == 1001
