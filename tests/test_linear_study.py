"""The study of local linearity over a store's pathways: on its photos, of its network, with the original beside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_jobs import cifar, small

import fxpath
from fxpath.analysis import linearity_summary
from fxpath.errors import InputError, RestrictionError, StoreError
from fxpath.linear_study import ORIGINAL, LinearStudy, linear_study
from fxpath.linearfigures import linearity_figure
from fxpath.linearity import ray_radius
from fxpath.samples import Samples

TABLES = ("", "_rays", "_deviations", "_stability")
KEYS = ("neuron_mct@0.8", "neuron_mct@0.95", "random@0.8", "random@0.95", "active")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "run.h5"
    fxpath.compute(
        small(torch.float64), Doubles(), path, selectors=["neuron_mct", "random", "active"], sparsities=[0.8, 0.95],
        progress=False,
    )  # fmt: skip
    return path


class Doubles(torch.utils.data.Dataset[torch.Tensor]):
    """Real pictures in float64."""

    ids = cifar().ids[:4]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> torch.Tensor:
        return cifar()[i][0].double()


@pytest.fixture(scope="module")
def found(store: Path) -> LinearStudy:
    with fxpath.open_store(store) as opened:
        return linear_study(small(torch.float64), Doubles(), opened, rays=3, lengths=(0.001, 0.1), progress=False)


def test_the_tables(found: LinearStudy, store: Path) -> None:
    assert found.uncovered == ()
    assert list(found.rays["key"].unique()) == [ORIGINAL, *KEYS]
    assert len(found.rays) == 4 * 6 * 3
    assert len(found.stability) == 4 * 6 * 2
    inside = found.deviations[found.deviations["inside"]]
    tied = found.rays.groupby(["key", "sample"])["tied"].first() > 0  # flat regions: radius 0, nothing is inside
    assert 4 * 6 * 2 * (1 - tied.mean()) <= len(inside) < 4 * 6 * 2 * 2
    assert inside["relative"].max() < 1e-9
    # each is what the functions say of the stored pathway
    network, data = small(torch.float64), Doubles()
    with fxpath.open_store(store) as opened:
        mask = torch.from_numpy(opened.mask("neuron_mct@0.95", 2))[None]
    sample = Samples(data[2][None], ids=[data.ids[2]])
    radii = ray_radius(network, sample, fxpath.Pathways(mask, network.index), 3)[:, 0]
    rows = found.rays[(found.rays["key"] == "neuron_mct@0.95") & (found.rays["sample"] == data.ids[2])]
    assert rows["radius"].tolist() == radii.tolist()
    assert rows["relative"].tolist() == pytest.approx((radii / data[2].norm()).tolist())
    assert set(rows["sparsity"]) == {0.95}


def test_the_summary_and_its_figure(found: LinearStudy) -> None:
    table = linearity_summary(found.rays, found.deviations, found.stability)
    assert len(table) == 6 * 2
    row = table[(table["key"] == "neuron_mct@0.8") & (table["share"] == 0.1)].iloc[0]
    own = found.stability[(found.stability["key"] == "neuron_mct@0.8") & (found.stability["share"] == 0.1)]
    assert row["change"] == pytest.approx(own["mean"].mean())
    assert row["change_low"] <= row["change"] <= row["change_high"]
    rays = found.rays[found.rays["key"] == "neuron_mct@0.8"]
    assert row["radius"] == pytest.approx(rays.groupby("sample")["relative"].median().mean())
    assert row["photos"] == 4
    assert row["inside"] < 1e-9
    assert 0 <= row["tied_photos"] <= 1
    original = table[(table["key"] == ORIGINAL) & (table["share"] == 0.1)].iloc[0]
    assert row["change"] < original["change"]  # Propositions 4 and 5: the frozen network's gradient moves less
    figure = linearity_figure({"small": table}, 0.1)
    assert [ax.get_title() for ax in figure.axes] == [
        "linear along rays", "change of the gradient", "deviation from linear",
    ]  # fmt: skip
    drawn = figure.axes[1].containers[0].lines[0]
    assert drawn.get_ydata().tolist() == table[(table["share"] == 0.1) & table["key"].str.startswith("neuron_mct")][
        "change"
    ].tolist()  # fmt: skip
    with pytest.raises(InputError, match=r"with the share 0.5, found none"):
        linearity_figure(table, 0.5)


def test_a_network_that_is_not_covered_has_no_radii() -> None:
    table = linearity_summary(
        pd.DataFrame(), pd.DataFrame(),
        pd.DataFrame({"key": ["a", "a"], "sparsity": [0.9, 0.9], "share": [0.1, 0.1], "sample": [0, 1],
                      "mean": [0.25, 0.75], "maximum": [1.0, 2.0], "deviation": [0.0, 0.5]}),
    )  # fmt: skip
    assert table[["change", "largest_change", "deviation"]].iloc[0].tolist() == [0.5, 1.5, 0.25]
    assert table["radius"].isna().all()


def test_another_network_and_other_samples(store: Path) -> None:
    with fxpath.open_store(store) as opened:
        with pytest.raises(StoreError, match="expected pathways of this network"):
            linear_study(small(), Doubles(), opened, progress=False)
        with pytest.raises(StoreError, match=r"sample '.*' is not in the data set"):
            linear_study(small(torch.float64), [torch.zeros(3, 32, 32).double()] * 2, opened, progress=False)


def test_the_script(tmp_path: Path) -> None:
    root, path = Path(__file__).parents[1], tmp_path / "run.h5"
    data = torch.utils.data.Subset(cifar(), range(2))
    fxpath.compute(small(), data, path, selectors=["neuron_mct"], sparsities=[0.9], progress=False)
    script = [sys.executable, str(root / "analyses" / "local_linearity.py"), "small_jobs:build"]
    done = subprocess.run(
        [*script, "foolbox:cifar10", str(path), "-o", str(tmp_path / "out"), "--rays", "2"],
        capture_output=True, text=True, cwd=root / "tests", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "neuron_mct@0.9" in done.stdout
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {"local_linearity.png", *(f"local_linearity{n}.csv" for n in TABLES)}
    refused = subprocess.run(
        [*script, "foolbox:cifar10", str(tmp_path / "none.h5"), "-o", str(tmp_path)],
        capture_output=True, text=True, cwd=root / "tests", check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "there is no such file" in refused.stderr


def test_constants_of_other_samples_are_refused() -> None:
    """Rows that are named are looked at: sample b's constants are not sample a's."""
    network = small(torch.float64)
    x = torch.stack([Doubles()[i] for i in range(3)])
    pathways = fxpath.Pathways(torch.rand(3, network.index.size) < 0.5, network.index)
    with network.frozen(pathways, at=Samples(x, ids=["a", "b", "c"])):
        network.respond(Samples(x, ids=["a", "b", "c"]))
        network.respond(x + 0.1)  # without names they are taken for neighbours of these
        with pytest.raises(RestrictionError, match=r"no constants for sample 'd' in its row, .* taken from 'c'"):
            network.respond(Samples(x, ids=["a", "b", "d"]))
        with pytest.raises(RestrictionError, match=r"are for a batch of 3, the input has 2"):
            network.respond(x[:2])
    with network.frozen(pathways.take([0]), at=Samples(x[:1], ids=["a"])):  # one sample's go with any
        network.respond(Samples(x, ids=["a", "b", "c"]))
