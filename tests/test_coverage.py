"""The coverage run: what is covered, what is not and why, one process a network, and going on where it was."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import pytest

from fxpath.coverage import COVERED, Row, cover, look_apart, read_rows
from fxpath.errors import ModelError
from fxpath.subjects import names, subject_of

LIMITS = {"threads": 1, "limit_seconds": 120.0, "limit_gib": 20.0}


def test_a_table_that_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "coverage.csv"
    looked: list[Row] = []
    wanted = ["coverage_subjects:plain", "coverage_subjects:linear"]
    table = cover(wanted, path, **LIMITS, said=looked.append)
    covered, bare = (table.iloc[place] for place in (0, 1))
    assert covered["status"] == COVERED
    assert (covered["sites"], covered["rectifiers"], covered["neurons"]) == (2, 1, 14)
    assert (covered["tracer"], covered["device"], covered["input"]) == ("symbolic_trace", "cpu", "1 × 4 × 4")
    assert (covered["difference"], covered["open_gates"], covered["frozen"]) == (0, 0, 0)
    assert 0 < covered["scored"] <= 1
    assert covered["parameters"] == 16 * 8 + 8 + 8 * 6 + 6 + 6 * 3 + 3
    assert bare["status"].startswith("SiteError: sites: no activation in this network")
    assert pd.isna(bare["sites"])
    again = cover([*wanted, "coverage_subjects:failing"], path, **LIMITS, said=looked.append)
    assert [row.name for row in looked] == [*wanted, "coverage_subjects:failing"], "none is looked at twice"
    assert "no good" in again.iloc[2]["status"]
    pd.testing.assert_frame_equal(again.iloc[:2], table)
    cover(wanted, path, **LIMITS, again=True, said=looked.append)
    assert looked[-1].name == "coverage_subjects:linear"
    assert list(read_rows(path)) == [*wanted, "coverage_subjects:failing"], "others' rows stay"


def test_a_network_that_takes_too_long_is_ended() -> None:
    begun = time.monotonic()
    row = look_apart("coverage_subjects:asleep", threads=1, limit_seconds=10, limit_gib=20)
    assert row.status == "took more than 10 s"
    assert time.monotonic() - begun < 60


def test_a_network_that_needs_more_memory_is_traced_without_data() -> None:
    row = look_apart("coverage_subjects:large", threads=1, limit_seconds=300, limit_gib=5)
    assert (row.status, row.device, row.sites, row.neurons) == (COVERED, "meta", 2, 80_000)
    assert pd.isna(row.difference)


def test_a_network_without_a_score_is_not_covered() -> None:
    assert look_apart("coverage_subjects:silent", **LIMITS).status == "no neuron scores"


def test_subjects() -> None:
    detection = names(["detection"])
    assert "torchvision:retinanet_resnet50_fpn#backbone+head" in detection
    assert {name.partition("#")[0] for name in detection} >= {"torchvision:maskrcnn_resnet50_fpn"}
    found = subject_of("torchvision:keypointrcnn_resnet50_fpn#box")
    assert [tuple(tensor.shape) for tensor in found.samples.tensors] == [(3, 256, 7, 7)]
    assert bool(found.samples.tensors[0].any())
    with pytest.raises(ModelError, match="there is no group of networks 'tim'; nearest: timm"):
        names(["tim"])
    with pytest.raises(ModelError, match=r"there is no part of a detection model 'ssd300_vgg16#head'; nearest: ssd300"):
        subject_of("torchvision:ssd300_vgg16#head")
