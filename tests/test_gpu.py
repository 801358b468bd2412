"""What must hold on an accelerator: `pytest -m gpu` where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxpath
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
