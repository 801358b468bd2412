"""Open gates change no bit of the output: one architecture of each torchvision family, and in slow tests every one."""

from __future__ import annotations

import gc

import pytest
import timm
import torch
import torchvision
from networks import trace_any
from torch import nn

import fxpath
from fxpath.gates import Gates
from fxpath.subjects import fill_zeros
from fxpath.tracing import plain_attention

FIXED_SIZE = ("vit_", "swin_", "maxvit_")  # these are made for pictures of 224², and made anew for another size
FAMILIES = {  # the smallest of each: the tracer's sites of all activations, and of rectifiers alone
    "alexnet": (7, 7),
    "convnext_tiny": (18, 0),
    "densenet121": (121, 121),
    "efficientnet_b0": (65, 0),
    "efficientnet_v2_s": (132, 0),
    "googlenet": (57, 57),
    "inception_v3": (94, 94),
    "maxvit_t": (68, 0),
    "mnasnet0_5": (35, 35),
    "mobilenet_v2": (35, 35),
    "mobilenet_v3_small": (42, 14),
    "regnet_x_400mf": (67, 67),
    "regnet_y_400mf": (81, 65),
    "resnet18": (17, 17),
    "resnet50": (49, 49),
    "resnext50_32x4d": (49, 49),
    "shufflenet_v2_x0_5": (37, 37),
    "squeezenet1_1": (26, 26),
    "swin_t": (12, 0),
    "swin_v2_t": (12, 0),
    "vgg11": (10, 10),
    "vgg11_bn": (10, 10),
    "vit_b_16": (12, 0),
    "wide_resnet50_2": (49, 49),
}
EVERY = torchvision.models.list_models(module=torchvision.models)


def build(name: str, *, small: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights, and two pictures of the smallest size that makes sense for it."""
    small = small and not name.startswith("maxvit_")  # its windows fit into 224² alone
    size = 224 if name.startswith(FIXED_SIZE) and not small else 96 if name == "inception_v3" else 64
    torch.manual_seed(0)
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if small and name.startswith("vit_"):
        more["image_size"] = size
    model: nn.Module = torchvision.models.get_model(name, weights=None, **more)
    return model.eval(), torch.randn(2, 3, size, size)


def assert_open_gates_change_nothing(name: str, *, small: bool = False) -> fxpath.Network:
    model, x = build(name, small=small)
    network = trace_any(model, x)
    assert network.traced.checked == (2, 1)
    assert network.traced.difference == 0
    with torch.no_grad():
        for given in (torch.cat([x, x.flip(3)[:1]]), x, x[:1]):
            assert torch.equal(network(given), model(given))
    # a run in which every gate is asked, and lets all pass; torch.nn's attention then has one kernel, not two
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected = model(x[:1])
            asked: list[int] = []
            found = network._run(network.samples(x[:1]), Gates(network.index, watch=lambda n, _: asked.append(n)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert torch.equal(found, expected)
    assert asked == list(range(len(network.sites))), "sites are in the order of execution"
    for number in torch.randint(network.index.size, (1000,), generator=torch.Generator().manual_seed(0)).tolist():
        assert network.index.flat(*network.index.locate(number)) == number
    return network


@pytest.mark.parametrize("name", FAMILIES)
def test_open_gates_change_nothing(name: str) -> None:
    network = assert_open_gates_change_nothing(name, small=True)
    rectifiers = {"relu", "relu6", "clamp", "hardtanh"}
    ops = [site.op for site in network.sites]
    assert (len(ops), sum(op in rectifiers for op in ops)) == FAMILIES[name]
    gc.collect()


TIMM = ("test_byobnet", "test_convnext", "test_mambaout", "test_nfnet", "test_vit")  # small, made by timm for tests
GRADIENTS = (
    "densenet121", "efficientnet_b0", "googlenet", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "squeezenet1_1",
    "swin_t", "vit_b_16", *TIMM,
)  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_through_gates_are_the_modules_own(name: str) -> None:
    """In float64, with every gate asked and letting all pass."""
    if name in TIMM:
        torch.manual_seed(0)
        model, x = timm.create_model(name).eval(), torch.randn(2, 3, 160, 160)
    else:
        model, x = build(name, small=True)
    fill_zeros(model)
    model, x = model.double(), x[:1].double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    network = trace_any(model, x)
    pull = torch.randn(1, 1000, dtype=torch.float64)
    found = []
    with plain_attention():
        for run in (model, lambda given: network._run(network.samples(given), Gates(network.index, keep=True))):
            given = x.clone().requires_grad_()
            found += torch.autograd.grad(run(given), given, pull)
    assert bool(found[0].any())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12 * float(found[0].abs().max()))


def test_patches_folded_into_the_batch_belong_to_their_samples() -> None:
    """MobileViT runs its transformers on (samples · places in a patch): permuted samples have permuted neurons."""
    torch.manual_seed(0)
    model, x = timm.create_model("mobilevit_xxs").eval().double(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    network = trace_any(model, x)
    folds = {site.name: site.fold for site in network.sites if site.fold > 1}
    assert set(folds.values()) == {4}
    assert len(folds) == 9
    order = [2, 0, 1]
    for run in (fxpath.NeuronMCT(), fxpath.Magnitude()):
        plain, permuted = (run.scores(network, given).signed for given in (x, x[order]))
        torch.testing.assert_close(permuted, plain[order], rtol=1e-9, atol=1e-12)
    pathways = fxpath.NeuronMCT().scores(network, x).pathways(0.8)
    with torch.no_grad():
        with network.masked(pathways):
            together = network(x)
        for row in range(3):
            with network.masked(pathways.take([row])):
                torch.testing.assert_close(network(x[row : row + 1]), together[row : row + 1], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_open_gates_change_nothing_on_every_architecture(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = assert_open_gates_change_nothing(name)
    with capsys.disabled():
        print(f"\n{name}: {network.traced.tracer}, {len(network.sites)} sites, bit for bit equal", end=" ")  # noqa: T201
    del network
    gc.collect()


@pytest.mark.slow  # a newer torchvision may well have more
def test_every_family_is_here() -> None:
    """A family that torchvision adds fails here until its smallest member is in the list."""
    assert set(FAMILIES) <= set(EVERY)
    stems = {name.split("_")[0].rstrip("0123456789") for name in FAMILIES}  # "resnet18" → "resnet"
    assert {name.split("_")[0].rstrip("0123456789") for name in EVERY} == stems
