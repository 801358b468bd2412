"""Dry runs: no data is touched, and what cannot run without data runs on copies."""

from __future__ import annotations

import pytest
import torch
from footprint import unchanged
from torch import Tensor, fx, nn

import fxpath
from fxpath.dry import _KEEPING, run_dry
from fxpath.errors import SmoothSitesWarning
from fxpath.inplace import MutationAudit


class Notes:
    """Where a leaf was run; tracing puts back what modules note in containers of their own."""

    def __init__(self) -> None:
        self.devices: list[str] = []


class Seeing(nn.Module):
    """A leaf that can ask for values, and notes where it was run."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.register_buffer("calls", torch.zeros(()))
        self.notes = Notes()

    def forward(self, x: Tensor) -> Tensor:
        self.notes.devices.append(x.device.type)
        if self.reads and float(x.sum()) > 1e9:
            raise ValueError("too large")
        self.calls += 1
        return x.relu()


def graph_of(leaf: Seeing) -> fx.GraphModule:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = nn.Sequential(nn.Linear(3, 4), leaf)
    return fx.GraphModule(model, Leaves().trace(model))


def test_a_dry_run_touches_no_data() -> None:
    leaf = Seeing(reads=False)
    audit = run_dry(lambda: MutationAudit(graph_of(leaf), keep=True), [torch.ones(2, 3)])
    assert leaf.notes.devices == ["meta"]
    assert leaf.calls == 0
    values = list(audit.values.values())
    assert values[-1].is_meta
    assert values[-1].shape == (2, 4)


def test_what_reads_values_runs_on_copies() -> None:
    leaf = Seeing(reads=True)
    x = torch.ones(2, 3)
    graph = graph_of(leaf)
    audit = run_dry(lambda: MutationAudit(graph, keep=True), [x])
    assert leaf.notes.devices == ["meta", "cpu"]
    assert leaf.calls == 0, "the run's own buffers are copies"
    with torch.no_grad():
        assert torch.equal(list(audit.values.values())[-1], graph(x))


def test_tracing_without_the_check_computes_nothing() -> None:
    leaf = Seeing(reads=False)
    model = nn.Sequential(nn.Linear(3, 4), leaf).eval()
    with pytest.warns(SmoothSitesWarning):
        network = fxpath.trace(model, torch.ones(2, 3), sites=Seeing, check=False)
    assert set(leaf.notes.devices) == {"meta"}
    assert network.sites[0].shape == (4,)
    assert network(torch.ones(2, 3)).shape == (2, 4)


def kept(kind: type[nn.Module]) -> tuple[nn.Module, list[Tensor]]:
    if kind is nn.BatchNorm1d:
        return nn.BatchNorm1d(4).eval(), [torch.randn(2, 4, 6)]
    if kind is nn.BatchNorm3d:
        x = torch.randn(2, 4, 3, 5, 6)
        return nn.BatchNorm3d(4).eval(), [x, x.to(memory_format=torch.channels_last_3d)]
    x = torch.randn(2, 4, 5, 6)
    module = nn.LayerNorm(6) if kind is nn.LayerNorm else nn.BatchNorm2d(4) if kind is nn.BatchNorm2d else kind()
    return module.eval(), [x, x.to(memory_format=torch.channels_last), x[:, ::2] if kind is not nn.BatchNorm2d else x]


@pytest.mark.parametrize("kind", _KEEPING, ids=lambda kind: kind.__name__)
def test_what_is_not_run_is_foretold(kind: type[nn.Module]) -> None:
    """Shapes, types and layouts in memory of modules that a dry run passes over, against those of a real run."""
    module, inputs = kept(kind)
    inputs = [*inputs, torch.ones(2, 4, dtype=torch.int64)] if kind is nn.Sigmoid else inputs
    graph = fx.symbolic_trace(nn.Sequential(module))
    for x in inputs:
        seen = list(run_dry(lambda: MutationAudit(graph, keep=True), [x]).values.values())[-1]
        real = module(x)
        assert (seen.shape, seen.dtype, seen.stride()) == (real.shape, real.dtype, real.stride())
        assert seen.is_meta


@pytest.mark.parametrize("place", ["1", ""])
def test_hooks_never_see_that_there_is_no_data(place: str) -> None:
    """A user's recording hook, on a leaf or on what tracing looks into, gets values."""
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    seen: list[bool] = []
    inner.get_submodule(place).register_forward_hook(lambda module, given, output: seen.append(output.is_meta))
    fxpath.trace(nn.Sequential(inner, nn.Softmax(1)).eval(), torch.ones(2, 3), check=False)
    assert seen
    assert not any(seen)


class Around(nn.Module):
    """A leaf that holds a module, which other leaves may hold, too."""

    def __init__(self, inner: nn.Module, *, inplace: bool = False) -> None:
        super().__init__()
        self.inner, self.inplace = inner, inplace
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu_(x) if self.inplace else torch.relu(x)) + self.shift


@pytest.mark.parametrize("inplace", [False, True])
def test_tensors_with_several_names_come_back(inplace: bool) -> None:
    """A module within two leaves, or within a leaf and its out-of-place form, and called by itself."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.Linear(4, 4)
            self.first, self.second, self.tied = Around(inner, inplace=inplace), Around(inner), nn.Linear(4, 4)
            self.tied.weight = inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.tied(self.second(self.first.inner(self.first(x) + self.first.shift))))

    model, x = Shares().eval(), torch.randn(2, 4)
    for check in (True, False):
        with unchanged(model):
            network = fxpath.trace(model, x, leaves=Around, check=check)
        assert network.traced.tracer == "symbolic_trace"
        assert torch.equal(network(x), model(x))
