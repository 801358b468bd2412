"""What must hold on an accelerator: `pytest -m gpu` where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxpath
from fxpath.decoding import Decoding, decode
from fxpath.deviations import verify_linearity
from fxpath.linearity import linear_radius, ray_radius
from fxpath.methods import parse_method
from fxpath.pathways import pack_bits

pytestmark = pytest.mark.gpu


def network_on(device: str) -> tuple[fxpath.Network, torch.Tensor]:
    """A small convolutional network and a batch for it, the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 5 * 5, 10),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    x = torch.randn(4, 3, 14, 14, generator=generator).to(device)
    return fxpath.trace(model.eval().to(device), x), x


def test_thresholds_and_bits_are_those_of_the_host() -> None:
    network, _ = network_on("cuda")
    signed = torch.randn(3, network.index.size, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    here = fxpath.Scores(signed, network.index).threshold([0.0, 0.5, 0.9])
    there = fxpath.Scores(signed.to("cuda"), network.index).threshold([0.0, 0.5, 0.9])
    for host, device in zip(here, there, strict=True):
        assert device.mask.is_cuda
        assert torch.equal(host.mask, device.mask.cpu())
        assert torch.equal(pack_bits(host.mask, network.index), device.packed().cpu())


def test_pathways_on_the_device() -> None:
    network, x = network_on("cuda")
    plain = network(x)
    selection = fxpath.NeuronMCT().select(network, x, [0.8])
    assert selection[0.8].mask.is_cuda
    with network.frozen(selection[0.8], at=x):
        assert torch.equal(network(x), plain)
    on_host, y = network_on("cpu")
    agreement = selection[0.8].packed().cpu()
    host = fxpath.NeuronMCT().select(on_host, y, [0.8])[0.8]
    both = fxpath.Pathways.from_packed(agreement, on_host.index)
    assert float(host.jaccard(both).min()) > 0.98


def test_a_store_from_the_device(tmp_path: Path) -> None:
    network, x = network_on("cuda")
    report = fxpath.compute(network, list(x.cpu()), tmp_path / "run.h5", selectors=["neuron_mct", "random", "active"],
                            sparsities=[0.9], micro_batch=2, progress=False)  # fmt: skip
    assert report.failed == {}
    with fxpath.open_store(report.path) as store:
        assert store.header.notes["device"] == "cuda"
        assert store.mask("random@0.9", 1).sum() == network.index.kept(0.9)


def test_random_pathways_do_not_depend_on_the_device() -> None:
    network, x = network_on("cuda")
    on_host, y = network_on("cpu")
    there = fxpath.Random(seed=2).select(network, x, [0.7])[0.7]
    here = fxpath.Random(seed=2).select(on_host, y, [0.7])[0.7]
    assert torch.equal(there.mask.cpu(), here.mask)


def test_local_linearity_on_the_device() -> None:
    network, x = network_on("cuda")
    on_host, y = network_on("cpu")
    pathways = fxpath.NeuronMCT().scores(on_host, y).pathways(0.7)
    there = fxpath.Pathways(pathways.mask.to("cuda"), network.index)
    found = linear_radius(network, x, there)
    assert found.value.is_cuda
    assert found.towards.is_cuda
    torch.testing.assert_close(found.value.cpu(), linear_radius(on_host, y, pathways).value, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        ray_radius(network, x, there, 4).cpu(), ray_radius(on_host, y, pathways, 4), rtol=1e-3, atol=0
    )
    table = verify_linearity(network, x, there, directions=2)
    assert table[table["inside"]]["relative"].max() < 1e-5


def test_attribution_on_the_device(tmp_path: Path) -> None:
    network, x = network_on("cuda")
    on_host, y = network_on("cpu")
    for key in (
        "gradient",
        "guided_backprop",
        "grad_cam",
        "neuron_mct@0.8",
        "masked_gradient:neuron_mct@0.8",
        "active",
    ):
        there, here = (parse_method(key).attribute(net, z, 3) for net, z in ((network, x), (on_host, y)))
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)
    report = fxpath.attribute(network, list(x.cpu()), tmp_path / "run.h5", methods=["gradient", "neuron_mct@0.8*"],
                              micro_batch=2, progress=False)  # fmt: skip
    assert report.missing == {} or all(not each for each in report.missing.values())


def test_decoding_on_the_device() -> None:
    network, x = network_on("cuda")
    found = decode(network, x[:1], decoding=Decoding(steps=8))
    assert found.inputs.is_cuda
    assert bool((found.response > found.photo).all())
