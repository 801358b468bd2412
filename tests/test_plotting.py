"""Figures: what they show is what the tables say, nothing is clipped or covered, and files appear whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from readable import check_readable
from synthetic import synthetic_store

from fxpath import plotting
from fxpath.analysis import dead_share, overlap
from fxpath.errors import InputError, SparsityError
from fxpath.files import appearing, save_table
from fxpath.labels import looks, pathway_labels, series, site_labels, store_names
from fxpath.neurons import NeuronIndex
from fxpath.store import open_store

ROOT = Path(__file__).parents[1]
FAMILIES = ("neuron_mct", "greedy_pruning", "dgr:init=1", "dgr:gamma=0.05,granularity=channel,init=r,lr=0.1", "random")
KEYS = (*(f"{family}@{sparsity}" for sparsity in (0.8, 0.9) for family in FAMILIES), "active")
LATER = {"neuron_mct@0.8", "active"}  # of the second store

Tables = dict[str, pd.DataFrame]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tables, Tables]:
    """Dead shares and overlaps of two stores: 11 keys on 26 sites with long names, and two keys on 4 sites."""
    parts = [f"features.{number}.{part}_activation" for number in range(8) for part in ("squeeze", "one", "three")]
    names = ["features.first", *parts, "classifier.2"]
    index = NeuronIndex.build([(name, "relu", (3 + number % 4, 5)) for number, name in enumerate(names)])
    folder = tmp_path_factory.mktemp("plotting")
    synthetic_store(folder / "squeeze.h5", 6, KEYS, index=index)
    synthetic_store(folder / "small.h5", 4, ("neuron_mct@0.8", "random@0.8", "active"))
    dead, overlaps = {}, {}
    for name in ("squeeze", "small"):
        with open_store(folder / f"{name}.h5") as store:
            dead[name], overlaps[name] = dead_share(store), overlap(store)
    return dead, overlaps


def panel(figure: Figure, title: str) -> Axes:
    (found,) = (ax for ax in figure.axes if ax.get_title().endswith(title))
    return found


# -------------------------------------------------------------------------------------------------------- numbers


def test_dead_figure_shows_shares_split_base_rate_and_intervals(tables: tuple[Tables, Tables]) -> None:
    table = tables[0]["squeeze"].copy()
    table.loc[table["key"] == "greedy_pruning@0.9", ["dead_share", "switched_on_share", "still_dead_share"]] = np.nan
    table.loc[table["key"] == "dgr:init=1@0.9", ["switched_on_share", "still_dead_share"]] = np.nan
    table.loc[table["key"] == "dgr:init=1@0.9", "dead_share"] = 0.5
    figure = plotting.dead_figure(table)
    check_readable(figure)
    network = table[table["site_number"] < 0].set_index("key")
    ax = panel(figure, "κ = 0.8")
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:3] == ["NeuronMCT", "GreedyPruning", "DGR(init=1)"]
    greedy = network.loc["greedy_pruning@0.8"]
    bars = [bar for bar in ax.patches if round(bar.get_y() + bar.get_height() / 2) == 1]
    assert [bar.get_width() for bar in bars] == pytest.approx([greedy["switched_on_share"], greedy["still_dead_share"]])
    assert bars[1].get_x() == pytest.approx(greedy["switched_on_share"])
    assert bars[1].get_hatch()
    assert to_hex(bars[0].get_facecolor()) == looks(["greedy_pruning"])["greedy_pruning"].colour.lower()
    said = {text.get_text() for text in ax.texts}
    assert f"{100 * greedy['dead_share']:.3g} %" in said
    assert "0 %" in said
    segments = np.concatenate([collection.get_segments() for collection in ax.collections])
    whisker = [(greedy["low"], 1.0), (greedy["high"], 1.0)]
    assert any(np.allclose(segment, whisker) for segment in segments)
    base = [segment for segment in segments if np.allclose(segment[:, 0], greedy["base_rate"])]
    assert sorted(float(segment[0, 1]) for segment in base) == [-0.5, 0.5, 1.5, 2.5, 3.5]
    other = panel(figure, "κ = 0.9")
    assert [text.get_text().strip() for text in other.texts].count("missing") == 1
    whole = [bar for bar in other.patches if round(bar.get_y() + bar.get_height() / 2) == 2]
    assert [(bar.get_width(), bar.get_alpha()) for bar in whole] == [(0.5, 0.4)]
    kinds = [text.get_text() for text in figure.legends[0].get_texts()]
    assert kinds == ["switched on", "still dead", "dead, split unknown", "dead among all neurons", "95 % interval"]


def test_matrix_shows_the_mean_jaccard_index_and_chance(tables: tuple[Tables, Tables]) -> None:
    table = tables[1]["squeeze"].copy()
    gone = (table["first"] == "neuron_mct@0.8") & (table["second"] == "random@0.8")
    table.loc[gone, "jaccard"] = np.nan
    figure = plotting.overlap_matrix_figure(table, "0.8")
    check_readable(figure)
    ax = figure.axes[0]
    image = np.ma.filled(ax.images[0].get_array(), np.nan)
    keys = [key for key in KEYS if key.endswith("@0.8") or key == "active"]
    part = table[(table["site_number"] < 0) & (table["sparsity"] == 0.8)]
    expected = np.full((len(keys), len(keys)), np.nan)
    for _, row in part.iterrows():
        here, there = keys.index(row["first"]), keys.index(row["second"])
        expected[here, there] = expected[there, here] = row["jaccard"]
    np.testing.assert_array_equal(image, expected)
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells[(1, 0)] == cells[(0, 1)] == f"{expected[0, 1]:.2f}"
    assert cells[(4, 0)] == "–"
    assert cells[(2, 2)] == ""
    others = part[part["second"] != "active"]
    low, high = others["null_mean"].min(), others["null_mean"].max()
    assert ax.get_title() == f"κ = 0.8\nchance 0.11; RandomActive {low:.2g}–{high:.2g}\n(of the pairs without Active)"
    assert others["chance"].min() == pytest.approx(0.111, abs=2e-3)


def test_overlap_lines_and_their_null(tables: tuple[Tables, Tables]) -> None:
    table = tables[1]["squeeze"]
    figure = plotting.overlap_by_site_figure(table, 0.9, [("random", "neuron_mct"), ("neuron_mct@0.9", "dgr:init=1")])
    check_readable(figure)
    lines = figure.axes[0].get_lines()
    assert len(lines) == 4
    for (one, two), style in ((("neuron_mct@0.9", "random@0.9"), "--"), (("neuron_mct@0.9", "dgr:init=1@0.9"), "--")):
        part = table[(table["first"] == one) & (table["second"] == two) & (table["site_number"] >= 0)]
        (line,) = (line for line in lines if np.array_equal(line.get_ydata(), part["jaccard"], equal_nan=True))
        (null,) = (line for line in lines if np.array_equal(line.get_ydata(), part["null_mean"], equal_nan=True))
        assert line.get_color() == null.get_color()
        assert null.get_linestyle() == style
        assert null.get_linewidth() < line.get_linewidth()
        assert line.get_xdata().tolist() == list(range(26))
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["NeuronMCT – Random", "NeuronMCT – DGR(init=1)", "RandomActive null (dashed)"]


def test_without_pairs_those_that_overlap_most_are_shown(tables: tuple[Tables, Tables]) -> None:
    table = tables[1]["squeeze"]
    figure = plotting.overlap_by_site_figure(table, 0.9)
    check_readable(figure)
    assert figure.axes[0].get_title() == "κ = 0.9 (the 6 of 10 pairs that overlap most)"
    network = table[(table["site_number"] < 0) & (table["sparsity"] == 0.9) & (table["second"] != "active")]
    best = network.nlargest(6, "jaccard")
    expected = {tuple(pathway_labels([a, b], 80)) for a, b in zip(best["first"], best["second"], strict=True)}
    null = {("RandomActive null (dashed)",)}
    said = {tuple(text.get_text().split(" – ")) for text in figure.legends[0].get_texts()} - null
    assert said == expected
    only = table[table["second"] == "active"]
    assert len(plotting.overlap_by_site_figure(only, 0.9).axes[0].get_lines()) == 10


@pytest.mark.parametrize(
    ("make", "column", "reference"),
    [
        (plotting.dead_by_site_figure, "dead_share", "base_rate"),
        (plotting.density_by_site_figure, "density", None),
    ],
)
def test_lines_over_sites(tables: tuple[Tables, Tables], make: Any, column: str, reference: str | None) -> None:
    table = tables[0]["squeeze"]
    figure = make(table, 0.9)
    check_readable(figure)
    dashed, *lines = figure.axes[0].get_lines()
    parts = [table[(table["key"] == f"{family}@0.9") & (table["site_number"] >= 0)] for family in FAMILIES]
    for line, part in zip(lines, parts, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), part[column])
    sizes = [line.get_markersize() for line in lines]
    assert sizes == sorted(sizes, reverse=True)  # lines that coincide still all show
    assert dashed.get_ydata().tolist() == (parts[0][reference].tolist() if reference else [0.1] * 26)
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names[:3] == ["feat.first", "feat.0.squeeze", "feat.0.one"]


def test_several_stores_side_by_side(tables: tuple[Tables, Tables]) -> None:
    dead, overlaps = tables
    figure = plotting.dead_figure({"a $b$ store": dead["squeeze"], "small": dead["small"]})
    check_readable(figure)
    titles = [ax.get_title() for ax in figure.axes if ax.axison]
    assert titles == ["a $b$ store\nκ = 0.8", "a $b$ store\nκ = 0.9", "small\nκ = 0.8"]
    for make, named in (
        (plotting.dead_by_site_figure, dead),
        (plotting.density_by_site_figure, dead),
        (plotting.overlap_matrix_figure, overlaps),
        (plotting.overlap_by_site_figure, overlaps),
    ):
        both = make(named, 0.8)
        check_readable(both)
        assert [ax.get_title().split(",")[0] for ax in both.axes[:2]] == ["squeeze", "small"]
        only = make(named, 0.9)  # of those that have it
        assert [ax.get_title().split("\n")[0].split(" (")[0] for ax in only.axes[:1]] == ["squeeze, κ = 0.9"]
    flipped = overlaps["small"].rename(columns={"first": "second", "second": "first"})
    twice = plotting.overlap_by_site_figure({"one": overlaps["small"], "two": flipped}, 0.8)
    assert len(twice.legends[0].get_texts()) == 2
    one, two = (ax.get_lines()[0].get_ydata() for ax in twice.axes)
    np.testing.assert_array_equal(one, two)


# ------------------------------------------------------------------------------------------------- labels, files


def test_looks_are_the_same_everywhere_and_told_apart() -> None:
    found = looks(["dgr:init=1", "mine", "dgr:init=r", "neuron_mct", "other"])
    assert found["neuron_mct"].colour == looks(["neuron_mct"])["neuron_mct"].colour
    assert found["dgr:init=1"].colour == found["dgr:init=r"].colour
    assert found["dgr:init=1"].style != found["dgr:init=r"].style
    assert len({look.colour for look in found.values()}) == 4
    assert len({(look.colour, look.style) for look in series(25)}) == 25


def test_site_labels_stay_different() -> None:
    assert site_labels(["features.1"]) == ["1"]
    assert site_labels([]) == []
    assert site_labels(["a.relu", "b.relu"]) == ["a", "b"]
    assert site_labels(["a", "a.relu"]) == ["a", "a.relu"]  # as they are where shortening made two equal
    long = [f"encoder_layer_{number}.intermediate_block.activation_of_the_feed_forward" for number in range(30)]
    assert len(set(site_labels(long))) == 30
    assert max(map(len, site_labels(long))) <= 20


def test_long_pathway_names_are_cut_and_numbered() -> None:
    names = pathway_labels(
        ["dgr:gamma=0.05,granularity=channel,init=1", "dgr:gamma=0.05,granularity=channel,init=r"], 22
    )
    assert names == ["DGR(gamma=0.05,\ngranularity=channel … #1", "DGR(gamma=0.05,\ngranularity=channel … #2"]
    assert store_names(["a/x.h5", "a/x.h5"]) == ["1 x", "2 x"]


def test_save_writes_a_whole_png_or_nothing(
    tables: tuple[Tables, Tables], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = plotting.dead_figure(tables[0]["small"])
    path = plotting.save(figure, tmp_path / "new" / "dead.png")
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] == 975  # 6.5 inches at 150 dots
    assert 0 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(InputError, match=r"cannot write .*dead\.png: no space left on device"):
        plotting.save(figure, path)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["dead.png"]
    with pytest.raises(InputError, match=r"ends in \.png, \.pdf or \.svg, found 'dead\.jpg'"):
        plotting.save(figure, tmp_path / "dead.jpg")


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_other_formats(tables: tuple[Tables, Tables], tmp_path: Path, kind: str) -> None:
    path = plotting.save(plotting.overlap_matrix_figure(tables[1]["small"], 0.8), tmp_path / f"matrix.{kind}")
    assert path.read_bytes()[:5] == {"pdf": b"%PDF-", "svg": b"<?xml"}[kind]


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with appearing(tmp_path / "x.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*t\.csv.*give a folder that you may write to"):
        save_table(pd.DataFrame({"a": [1]}), tmp_path / "file" / "t.csv")
    table = pd.DataFrame({"κ": [0.1, 1 / 3], "site": ["a", "é,"]})
    save_table(table, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), table)


# ----------------------------------------------------------------------------------------------------- bad input


def test_bad_input_says_what_there_is(tables: tuple[Tables, Tables]) -> None:
    dead, overlaps = tables[0]["squeeze"], tables[1]["squeeze"]
    for make, table in (
        (plotting.dead_by_site_figure, dead),
        (plotting.density_by_site_figure, dead),
        (plotting.overlap_matrix_figure, overlaps),
        (plotting.overlap_by_site_figure, overlaps),
    ):
        with pytest.raises(SparsityError, match=r"no sparsity 0\.85; nearest: 0\.[89] \(all: 0\.8, 0\.9\)"):
            make(table, 0.85)
        with pytest.raises(SparsityError, match=r"expected a share in \[0, 1\), found 90"):
            make(table, 90)
        with pytest.raises(InputError, match=r"expected the table of analysis\.\w+, found one without"):
            make(overlaps if table is dead else dead, 0.9)
        with pytest.raises(InputError, match="expected at least one table, found none"):
            make({}, 0.9)
    with pytest.raises(InputError, match=r"there is no pair 'neuron_mtc with random'; nearest: .*neuron_mct@0\.9"):
        plotting.overlap_by_site_figure(overlaps, 0.9, [("neuron_mtc", "random")])
    with pytest.raises(InputError, match="no pathway of the table has a sparsity"):
        plotting.dead_figure(dead[dead["key"] == "active"])


def test_plotting_leaves_pyplot_and_its_settings_alone() -> None:
    code = (
        "import sys, matplotlib; from matplotlib import rcParams as now; "
        "before = {name: now[name] for name in now if name != 'backend'}; import fxpath.plotting; "
        "assert {name: now[name] for name in now if name != 'backend'} == before; "
        "print([name for name in ('torch', 'matplotlib.pyplot', 'pandas') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("script", "written"),
    [
        ("dead_neurons", ["dead_by_site_0.9.png", "dead_neurons.csv", "dead_neurons.png", "density_by_site_0.9.png"]),
        ("diagnostics", ["diagnostics.csv"]),
        ("overlap", ["overlap.csv", "overlap_by_site_0.9.png", "overlap_matrix_0.9.png"]),
    ],
)
def test_scripts_go_from_stores_to_figures(tmp_path: Path, script: str, written: list[str]) -> None:
    for name in ("one", "two"):
        synthetic_store(tmp_path / f"{name}.h5", 3, ["neuron_mct@0.9", "random@0.9", "active"])
    stores = [str(tmp_path / f"{name}.h5") for name in ("one", "two")]
    command = [sys.executable, "-W", "error", str(ROOT / "analyses" / f"{script}.py"), "-o", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([*command, *stores], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    table = pd.read_csv(tmp_path / "out" / next(name for name in written if name.endswith("csv")))
    assert table["store"].unique().tolist() == ["one", "two"]
    assert "neuron_mct@0.9" in done.stdout
    wrong = subprocess.run([*command, "nothing.h5"], capture_output=True, text=True, env=environment, check=False)
    assert wrong.returncode == 2
    assert "nothing.h5: there is no such file" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_pair_that_no_store_has_leaves_nothing_behind(tmp_path: Path) -> None:
    synthetic_store(tmp_path / "run.h5", 3, ["neuron_mct@0.9", "random@0.9"])
    command = [sys.executable, str(ROOT / "analyses" / "overlap.py"), str(tmp_path / "run.h5")]
    command += ["-o", str(tmp_path / "out"), "--pair", "neuron_mct", "randon"]
    wrong = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert wrong.returncode == 2
    assert "there is no pair 'neuron_mct with randon'; nearest: neuron_mct@0.9 with random@0.9" in wrong.stderr
    assert not (tmp_path / "out").exists()
