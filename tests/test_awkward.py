"""Awkward modules: each one works, as its graph equals it in values and gradients, or is refused by name."""

from __future__ import annotations

import contextlib
import gc
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from footprint import Watched, require_clean_failures, unchanged
from networks import Branching, DataBranch, DataBranchInLeaf, image, trace_any
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.ops import StochasticDepth, stochastic_depth

import fxpath
from fxpath.errors import (
    BranchError,
    InputError,
    ModelError,
    SampleError,
    SiteError,
    SmoothSitesWarning,
    TraceError,
    TraceWarning,
)
from fxpath.network import Network
from fxpath.pathways import Pathways
from fxpath.samples import Samples


def rows(batch: int) -> Tensor:
    return torch.randn(batch, 4, dtype=torch.float64)


def steps(batch: int) -> Tensor:
    return torch.randn(batch, 3, 4, dtype=torch.float64)


def words(batch: int) -> Tensor:
    return torch.randint(0, 7, (batch, 3))


class Layers(nn.Module):
    """Base: linear layers `f` and `g` (4 to 4), a head `h` to three classes, a ReLU; `body` may be the forward."""

    def __init__(self, body: Callable[[Any, Tensor], Any] | None = None, width: int = 4) -> None:
        super().__init__()
        self.f, self.g, self.h, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(width, 3), nn.ReLU()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        assert self.body is not None
        return self.body(self, x)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


# --- what works -----------------------------------------------------------------------------------------------------


def outputs(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def mixture(value: Any) -> Tensor:
    """All numbers of an output in one, each with a weight of its own."""
    parts = [
        (leaf * torch.arange(1, leaf.numel() + 1).view(leaf.shape).to(leaf.dtype)).sum() for leaf in outputs(value)
    ]
    return torch.stack([part.double() for part in parts]).sum()


def slope(call: Callable[..., Any], x: Any) -> list[Tensor]:
    """The gradient of the mixture in every floating input, by `backward`, as reentrant checkpoints need."""
    own = Samples(x).map(lambda leaf: leaf.clone().requires_grad_(leaf.is_floating_point()))
    value = mixture(call(*own.args, **own.kwargs))
    if value.requires_grad:
        value.backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in own.tensors if leaf.requires_grad]


def assert_works(
    network: Network, model: nn.Module, inputs: Callable[[int], Any], *, tolerance: float = 1e-12, scored: bool = True
) -> None:
    """The graph equals the module in values and in the gradient through gates, and pathways can be had of it."""
    model.requires_grad_(False)
    for batch in (1, 2, 3):
        x = inputs(batch)
        own = Samples(x)
        with torch.no_grad():
            expected = model(*own.args, **own.kwargs)
            found = network(x)
        for one, two in zip(outputs(expected), outputs(found), strict=True):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
        everything = Pathways(torch.ones(batch, network.index.size, dtype=torch.bool), network.index)
        slopes = slope(model, x)
        with network.masked(everything):
            for one, two in zip(slopes, slope(network, x), strict=True):
                torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    model.requires_grad_(True)
    if not scored:
        return
    x = inputs(8)
    found = network(x)
    pathways = fxpath.NeuronMCT().scores(network, x).pathways(0.7)
    assert pathways.mask.any()
    with network.masked(pathways):
        assert not all(torch.equal(a, b) for a, b in zip(outputs(network(x)), outputs(found), strict=True))
    with network.frozen(pathways, at=x):
        for one, two in zip(outputs(network(x)), outputs(found), strict=True):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    build: Callable[[], nn.Module]
    sites: dict[str, tuple[int, ...]]
    inputs: Callable[[int], Any] = rows
    tracer: str = "symbolic_trace"
    options: dict[str, Any] = field(default_factory=dict)
    mixes: bool = False  # samples see each other
    sets_weights: bool = False  # every run of the module sets tensors of its own anew

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates some of what is tried here
            model = self.build().double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bias" in name:  # so that some activations of every site are alive
                    parameter.abs_().add_(0.3)
        return model


class SharedReLU(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.h(self.b(self.g(self.a(self.f(x)))))


def two_parents() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 5), relu), nn.Sequential(nn.Linear(5, 6), relu), nn.Linear(6, 3)
    )  # fmt: skip


class Repeated(Layers):
    """Calls a block as often as a flag says; its argument, where it is given."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor, times: int = -1) -> Any:
        for _ in range(self.times if times < 0 else times):
            x = self.relu(self.f(x))
        return self.h(F.relu(x))


class Tied(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.g.weight = self.f.weight

    def forward(self, x: Tensor) -> Any:
        return self.g(F.relu(self.f(x)))


class TiedEmbedding(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.f(self.table(x).mean(1))))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def wrapped(wrap: Callable[[nn.Module], Any]) -> nn.Module:
    """A network whose linear layers are changed in place by `wrap`."""
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for layer in layers:
        wrap(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(inplace=True), nn.Linear(4, 3))


class Dropped(nn.Module):
    """Every kind of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.c, self.h = nn.Linear(4, 4), nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.flat = nn.Sequential(nn.Dropout(0.5), nn.AlphaDropout(0.3), StochasticDepth(0.5, "row"), DropPath(0.5))
        self.deep = nn.Sequential(nn.Dropout2d(0.3), nn.FeatureAlphaDropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.flat(F.relu(self.f(x)))
        h = stochastic_depth(F.dropout(h, 0.3, training=self.training), 0.5, "batch", self.training)
        h = self.c(self.deep(h[:, None, None, :].expand(-1, 1, 4, 4)))
        return self.h(
            F.feature_alpha_dropout(F.dropout2d(F.relu(h), 0.3, self.training), 0.3, self.training).flatten(1)
        )


class Recurrent(Layers):
    """A recurrent layer as a leaf, its last state and its last output added."""

    def __init__(self, kind: Any, *, batch_first: bool, **more: Any) -> None:
        super().__init__(width=5)
        self.rnn = kind(4, 5, batch_first=batch_first, **more)

    def forward(self, x: Tensor) -> Any:
        h = self.relu(self.f(x))
        out, state = self.rnn(h if self.rnn.batch_first else h.transpose(0, 1))
        last = state[0][-1] if isinstance(self.rnn, nn.LSTM) else state[-1]
        out = out if self.rnn.batch_first else out.transpose(0, 1)
        return self.h(F.relu(out[:, -1, :5] + last))


class Cells(nn.Module):
    """LSTM and GRU cells over the steps, from zeros of the batch's size and from no state at all."""

    def __init__(self, *, unbound: bool) -> None:
        super().__init__()
        self.lstm, self.gru, self.h, self.unbound = nn.LSTMCell(4, 5), nn.GRUCell(5, 5), nn.Linear(5, 3), unbound

    def forward(self, x: Tensor) -> Any:
        if self.unbound:
            h = c = torch.zeros(x.shape[0], 5, dtype=x.dtype, device=x.device)
        else:
            h = c = x.new_zeros(x.size(0), 5)
        state = None
        for step in x.unbind(1) if self.unbound else [x[:, number] for number in range(3)]:
            h, c = self.lstm(step, (h, c))
            state = self.gru(F.relu(h), state)
        return self.h(F.relu(state))


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.f, self.h, self.first, self.weights = nn.Linear(4, 6), nn.Linear(6, 3), batch_first, need_weights

    def forward(self, x: Tensor) -> Any:
        x = x if self.first else x.transpose(0, 1)
        out, _ = self.attention(x, x, x, need_weights=self.weights)
        out = out if self.first else out.transpose(0, 1)
        return self.h(F.relu(self.f(out)).mean(1))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def encoder(activation: Any, layers: int = 0) -> nn.Module:
    """One encoder layer, or an encoder of several."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation=activation)
    body = nn.TransformerEncoder(layer, layers) if layers else layer
    return nn.Sequential(body, Mean(), nn.Linear(4, 3))


class Causal(Layers):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.h(self.encoder(x, mask=mask, is_causal=True).mean(1))


class Whole(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(4, 2, 1, 1, 6, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.h(self.transformer(x, x).mean(1))


class Checkpointed(nn.Module):
    """The same block twice, then a method, all recomputed in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.f, self.h, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 3), reentrant

    def scaled(self, x: Tensor, by: float) -> Tensor:
        return F.relu(self.f(x)) * by

    def forward(self, x: Tensor) -> Tensor:
        again = partial(checkpoint, use_reentrant=self.reentrant)
        return self.h(again(self.scaled, again(self.block, again(self.block, x)), 2.0))


class CheckpointedSequence(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        self.h, self.reentrant = nn.Linear(4, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.h(checkpoint_sequential(self.body, 2, x, use_reentrant=self.reentrant))


class Around(nn.Module):
    """A module within another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.f, self.inner = nn.Linear(4, 4), inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(F.relu(self.f(x)))


def lazy() -> nn.Module:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.LazyConv2d(3, 2, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(3),
    ).eval()  # fmt: skip
    model(torch.randn(2, 4))
    return model


class Noted(Layers):
    """Keeps its last activation and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.last, self.calls = F.relu(self.f(x)), self.calls + 1
        return self.h(self.last)


class Rectified(torch.autograd.Function):
    """A rectifier whose own gradient is not the derivative: it passes half of it where the input is negative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slopes[0] * torch.where(x > 0, 1.0, 0.5)


class Starred(Layers):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.h(F.relu(self.f(args[0] if args else kwargs["x"])) * kwargs.get("scale", 1))


class StarredInside(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Starred()

    def forward(self, x: Tensor) -> Any:
        return self.inner(F.relu(self.f(x)), None, scale=2)


class Keywords(Layers):
    def forward(self, x: Tensor, /, *, scale: float = 2.0, mask: Tensor | None = None) -> Any:
        h = F.relu(self.f(x))
        return self.h((h if mask is None else h * mask) * scale)


class NamedKeywords(Layers):
    def forward(self, x: Tensor, *, scale: float = 2.0, mask: Tensor | None = None) -> Any:
        h = F.relu(self.f(x))
        return self.h((h if mask is None else h * mask) * scale)


def asserted(self: Layers, x: Tensor) -> Any:
    assert x.dim() == 2, f"two axes, please, not {x.shape}"
    assert x.shape[1] == 4
    return self.h(F.relu(getattr(self, f"{'f'}")(x)))


def printed(self: Layers, x: Tensor) -> Any:
    _ = f"{x.shape} {x.shape[0]}"
    return self.h(F.relu(self.f(x)))


def batch_branch_without_effect(self: Layers, x: Tensor) -> Any:
    h = self.f(x)
    return self.h(F.relu(h) if x.shape[0] > 1 else torch.relu(h))


def unbound(self: Layers, x: Tensor) -> Any:
    return self.h(torch.stack([F.relu(self.f(step)) for step in x.unbind(1)], 1).mean(1))


def recursive(self: Layers, x: Tensor) -> Any:
    def deeper(h: Tensor, levels: int) -> Tensor:
        return h if levels == 0 else deeper(self.relu(self.g(h)), levels - 1)

    return self.h(deeper(self.f(x), 12))


def measured_values(self: Layers, x: Tensor) -> Any:
    """`.item()`, a boolean index and `nonzero`: values that no Python code asks for."""
    h = F.relu(self.f(x))
    h = h[h.sum(1) > -1] / (1 + h.max().item())
    return self.h(h[torch.nonzero(h.sum(1) > -1)[:, 0]])


def assigned_values(self: Layers, x: Tensor) -> Any:
    h = F.relu(self.f(x)).clone()
    h[h > 0.5] = 0.5
    return self.h(h)


def views(self: Layers, x: Tensor) -> Any:
    h = F.relu(self.f(x))
    return self.h(h), h.view(-1, 2, 2), h[:, :3], h.t().t()


def in_python(*inputs: Any) -> Callable[[int], Any]:
    """Rows, then arguments that are no tensors."""
    return lambda batch: (rows(batch), *inputs)


FOUR, FIVE = (4,), (5,)
ONE = {"relu": FOUR}
LINEARS = {"1": FOUR, "3": FOUR}
LOGITS = {"response": fxpath.responses.Logit(output=0)}

CASES = (
    Case("shared under two names", SharedReLU, {"a": FOUR, "a_1": FOUR}),
    Case("one module, two parents", two_parents, {"0.1": FIVE, "0.1_1": (6,)}),
    Case("called 0 times", lambda: Repeated(0), ONE),
    Case("called as often as a flag says", lambda: Repeated(3), {f"relu{n}": FOUR for n in ("", "_1", "_2", "_3")}),
    Case(
        "called as often as an argument says", lambda: Repeated(0), {"relu": FOUR, "relu_1": FOUR, "relu_2": FOUR},
        in_python(2),
    ),
    Case("tied weights", Tied, ONE),
    Case("tied with an embedding", TiedEmbedding, ONE, words),
    Case("weight_norm", lambda: wrapped(parametrizations.weight_norm), LINEARS),
    Case("spectral_norm", lambda: wrapped(parametrizations.spectral_norm), LINEARS),
    Case("orthogonal", lambda: wrapped(parametrizations.orthogonal), LINEARS),
    Case(
        "parametrised",
        lambda: wrapped(lambda m: parametrize.register_parametrization(m, "weight", Symmetric())), LINEARS,
    ),
    Case("old weight_norm", lambda: wrapped(nn.utils.weight_norm), LINEARS, sets_weights=True),
    Case("old spectral_norm", lambda: wrapped(nn.utils.spectral_norm), LINEARS, sets_weights=True),
    Case("pruned", lambda: wrapped(lambda m: prune.l1_unstructured(m, "weight", 0.5)), LINEARS, sets_weights=True),
    Case("dropouts", Dropped, {"relu": FOUR, "relu_1": (2, 2, 2)}),
    *(
        Case(
            f"{kind.__name__}, batch {'first' if first else 'second'}",
            partial(Recurrent, kind, batch_first=first), {"relu": (3, 4), "relu_1": FIVE}, steps,
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for first in (True, False)
    ),
    Case(
        "two layers, both ways", lambda: Recurrent(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True),
        {"relu": (3, 4), "relu_1": FIVE}, steps,
    ),
    Case("cells by number", lambda: Cells(unbound=False), {f"relu{n}": FIVE for n in ("", "_1", "_2", "_3")}, steps),
    Case(
        "cells by unbind", lambda: Cells(unbound=True), {f"relu{n}": FIVE for n in ("", "_1", "_2", "_3")}, steps,
        "torch.export",
    ),
    *(
        Case(
            f"attention, batch {'first' if first else 'second'}, {'weights' if need else 'no weights'}",
            partial(Attention, batch_first=first, need_weights=need), {"relu": (3, 6)}, steps,
        )
        for first in (True, False)
        for need in (True, False)
    ),
    Case("encoder layer", lambda: encoder("relu"), {"0.relu": (3, 6)}, steps),
    Case("encoder layer, ReLU module", lambda: encoder(nn.ReLU()), {"0.activation": (3, 6)}, steps),
    Case("encoder layer, GELU", lambda: encoder(F.gelu), {"0.gelu": (3, 6)}, steps, options={"sites": "activations"}),
    Case(
        "encoder", lambda: encoder("relu", 2), {"0.layers.0.relu": (3, 6), "0.layers.1.relu": (3, 6)}, steps,
        "torch.export",
    ),
    Case(
        "encoder, GELU", lambda: encoder("gelu", 2), {"0.layers.0.gelu": (3, 6), "0.layers.1.gelu": (3, 6)}, steps,
        "torch.export", {"sites": "activations"},
    ),
    Case("causal encoder", Causal, {"encoder.layers.0.relu": (3, 6)}, steps, "torch.export"),
    Case(
        "transformer", Whole,
        {"transformer.encoder.layers.0.relu": (3, 6), "transformer.decoder.layers.0.relu": (3, 6)}, steps,
        "torch.export",
    ),
    *(
        Case(
            f"checkpoint, {'reentrant' if reentrant else 'not reentrant'}",
            partial(Checkpointed, reentrant=reentrant), {"block.1": FOUR, "block.1_1": FOUR, "relu": FOUR},
        )
        for reentrant in (True, False)
    ),
    *(
        Case(
            f"checkpoint_sequential, {'reentrant' if reentrant else 'not reentrant'}",
            partial(CheckpointedSequence, reentrant=reentrant), {"body.1": FOUR, "body.3": FOUR},
        )
        for reentrant in (True, False)
    ),
    Case("DataParallel", lambda: nn.DataParallel(plain()), {"1": FIVE}),
    Case("compiled", lambda: torch.compile(plain()), {"1": FIVE}),  # type: ignore[arg-type,return-value]
    Case("compiled DataParallel", lambda: torch.compile(nn.DataParallel(plain())), {"1": FIVE}),  # type: ignore[arg-type,return-value]
    Case("DataParallel inside", lambda: Around(nn.DataParallel(plain())), {"relu": FOUR, "inner.module.1": FIVE}),
    Case(
        "compiled inside", lambda: Around(torch.compile(plain())),  # type: ignore[arg-type]
        {"relu": FOUR, "inner._orig_mod.1": FIVE},
    ),
    Case("lazy, after a run", lazy, {"3": (3, 3, 3)}),
    Case("keeps its last activation", Noted, ONE),
    Case("returns views", lambda: Layers(views), ONE, options=LOGITS),
    Case("arguments by stars", Starred, ONE, tracer="torch.export"),
    Case(
        "arguments by stars, named", Starred, ONE, lambda b: {"x": rows(b), "scale": rows(b).abs()},
        tracer="torch.export",
    ),
    Case("arguments by stars, inside", StarredInside, {"relu": FOUR, "inner.relu": FOUR}),
    Case("keyword-only, left out", Keywords, ONE),
    Case("keyword-only, given", NamedKeywords, ONE, lambda b: {"x": rows(b), "mask": rows(b), "scale": 3.0}),
    Case("None given", NamedKeywords, ONE, lambda b: {"x": rows(b), "mask": None}),
    Case("assert on shapes", lambda: Layers(asserted), ONE, tracer="torch.export"),
    Case("f-string of shapes", lambda: Layers(printed), ONE),
    Case(
        "branch on the batch size, without effect", lambda: Layers(batch_branch_without_effect), ONE,
        tracer="torch.export",
    ),
    Case(
        "loop over unbind", lambda: Layers(unbound), {f"relu{n}": FOUR for n in ("", "_1", "_2")}, steps,
        "torch.export",
    ),
    Case("deep recursion", lambda: Layers(recursive), {f"relu{f'_{n}' if n else ''}": FOUR for n in range(12)}),
    Case("values of tensors, not asked for", lambda: Layers(measured_values), ONE, mixes=True),
    Case("assignment by a boolean index", lambda: Layers(assigned_values), ONE, tracer="torch.export"),
)  # fmt: skip


def mixing(mixes: bool) -> contextlib.AbstractContextManager[Any]:
    """Where samples see each other, tracing warns of it."""
    return pytest.warns(TraceWarning, match="the others of its batch") if mixes else contextlib.nullcontext()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of reentrant checkpoints
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_works(case: Case) -> None:
    model = case.model()
    x = case.inputs(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmoothSitesWarning)
        with contextlib.nullcontext() if case.sets_weights else unchanged(model), mixing(case.mixes):
            network = fxpath.trace(model, x, **case.options)
    assert network.traced.tracer == case.tracer
    assert {site.name: site.shape for site in network.sites} == case.sites
    assert network.traced.checked == (3, 1)
    assert len(network.traced.remarks) == case.mixes
    assert_works(network, model, case.inputs)


# --- wrappers and hooks ---------------------------------------------------------------------------------------------


def small(body: Callable[[Any, Tensor], Any] | nn.Module, x: Callable[[int], Any] = rows) -> tuple[nn.Module, Any]:
    """A network in float64 and evaluation mode with live activations, and three samples."""
    model = body if isinstance(body, nn.Module) else Layers(body)
    return Case("", lambda: model, {}).model(), x(3)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of torch.distributed about itself
def test_distributed_wrappers(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = small(plain())
    network = fxpath.trace(nn.parallel.DistributedDataParallel(model).eval(), x)
    assert network.sites == fxpath.trace(model, x).sites
    assert_works(network, model, rows)
    sharded, _ = small(plain())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ModelError, match=r"the model \(.*FSDPSequential\) keeps its parameters in shards .*gather them"
    ):
        fxpath.trace(sharded, x)


def test_hooks_of_a_wrapper_are_refused() -> None:
    model, x = small(nn.DataParallel(plain()))
    model.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ModelError, match=r"wrapper DataParallel has hooks.*register them on the Sequential in it"):
        fxpath.trace(model, x)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda m: m.register_forward_hook(lambda module, args, output: output * 1.5),
    "input": lambda m: m.register_forward_pre_hook(lambda module, args: args[0] * 1.5),
    "output by name": lambda m: m.register_forward_hook(lambda module, args, kwargs, out: out + 1, with_kwargs=True),
    "input by name": lambda m: m.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] - 1,), kwargs), with_kwargs=True
    ),
    "branching on values": lambda m: m.register_forward_hook(
        lambda module, args, out: out * 2 if out.sum() > 0 else out
    ),
}


@pytest.mark.parametrize("where", ["", "inner", "inner.1", "inner.0"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_change_values(kind: str, where: str) -> None:
    model, x = small(Around(plain()))
    HOOKS[kind](model.get_submodule(where))
    if kind == "branching on values" and not where:
        with pytest.raises(TraceError, match="no graph equals"):
            fxpath.trace(model, x)
        return
    with unchanged(model):
        network = fxpath.trace(model, x)
    assert {site.name: site.shape for site in network.sites} == {"relu": FOUR, "inner.1": FIVE}
    assert_works(network, model, rows)


def test_hooks_that_record_see_values_and_stay() -> None:
    model, x = small(Around(plain()))
    seen: list[Any] = []
    for part in ("inner", "inner.0"):
        model.get_submodule(part).register_forward_hook(
            lambda module, args, out: seen.append(out.detach().numpy().sum())
        )
        model.get_submodule(part).register_forward_pre_hook(lambda module, args: seen.append(float(args[0].sum())))
    with unchanged(model):
        network = fxpath.trace(model, x)
    assert network.traced.tracer == "symbolic_trace"
    assert not any(isinstance(value, fx.Proxy) for value in seen)
    seen.clear()
    network(x)
    found = list(seen)
    seen.clear()
    model(x)
    assert len(found) == 4
    assert found == seen


class Block(nn.Module):
    """A block of several operations, and a block in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(4, 4), Around(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Any:
        return self.inner(torch.tanh(self.fc(x))) + x


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.head = Block(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.b(F.relu(self.b(x))))


class BlocksExported(Blocks):
    def forward(self, x: Tensor, *more: Any) -> Any:
        return super().forward(x)


@pytest.mark.parametrize("sites", ["b", Block, "b.inner"])
@pytest.mark.parametrize("hooked", ["b", "b.inner", "b.fc"])
@pytest.mark.parametrize("kind", [Blocks, BlocksExported])
def test_what_a_hooked_module_gives_is_what_its_hooks_give(kind: type[Blocks], hooked: str, sites: Any) -> None:
    torch.manual_seed(0)
    model, x = kind().double().eval(), rows(3)
    part = model.get_submodule(hooked)
    part.register_forward_hook(lambda module, args, output: output * 2)
    part.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    network = trace_any(model, x, sites=sites)
    assert network.traced.tracer == ("symbolic_trace" if kind is Blocks else "torch.export")
    seen: list[Tensor] = []
    where = model.get_submodule(sites if isinstance(sites, str) else "b")
    last = where.register_forward_hook(lambda module, args, output: seen.append(output))  # sees what others gave
    with torch.no_grad():
        model(x)
    last.remove()
    assert len(network.sites) == 2
    for found, expected in zip(network.activations(x), seen, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_hook_that_changes_how_many_values_there_are() -> None:
    model, x = small(Around(plain()))
    model.get_submodule("inner").register_forward_hook(lambda module, args, output: (output, output))
    try:
        network = fxpath.trace(model, x, response=fxpath.responses.Logit(output=0))
    except TraceError as error:
        assert "a hook of Sequential changes how many values there are" in str(error)  # noqa: PT017
    else:
        assert network.traced.tracer == "torch.export"
        assert "a hook of Sequential changes how many values" in network.traced.notes[0]


@pytest.mark.parametrize("where", ["", "inner"])
def test_backward_hooks_that_change_gradients_are_refused(where: str) -> None:
    model, x = small(Around(plain()))
    model.get_submodule(where).register_full_backward_hook(lambda module, given, found: (given[0] * 2,))
    with (
        unchanged(model),
        pytest.raises(
            TraceError, match=rf"has another gradient(.|\n)*backward hooks \({where or 'the model'}\).*remove"
        ),
    ):
        fxpath.trace(model, x)
    network = fxpath.trace(model, x, leaves=nn.Sequential) if where else None  # the other way out
    if network is not None:
        assert [site.name for site in network.sites] == ["relu"]
        assert_works(network, model, rows)


# --- gradients that are not the derivative --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::fxpath.errors.SmoothSitesWarning")
def test_autograd_functions_keep_their_gradient() -> None:
    model, x = small(lambda self, x: self.h(F.relu(self.g(Rectified.apply(self.f(x))) + 1)))
    for sites, names in (("rectifiers", ["relu"]), (["relu", "Rectified"], ["Rectified", "relu"])):
        network = fxpath.trace(model, x, sites=sites)
        assert [site.name for site in network.sites] == names
        assert_works(network, model, rows)


def test_autograd_functions_that_only_export_can_trace_are_refused() -> None:
    def body(self: Layers, x: Tensor) -> Any:
        assert isinstance(x, Tensor)
        return self.h(F.relu(self.g(Rectified.apply(self.f(x) - 1)) + 1))

    model, x = small(body)
    with pytest.raises(TraceError, match=r"torch\.export: TraceError: .*another gradient(.|\n)*own gradient a leaf"):
        fxpath.trace(model, x)


def stopped(kind: str) -> Callable[[Any, Tensor], Any]:
    def body(self: Layers, x: Tensor) -> Any:
        if kind == "no_grad":
            with torch.no_grad():
                a = F.relu(self.f(x))
        elif kind == "inference_mode":
            with torch.inference_mode():
                a = F.relu(self.f(x))
            a = a.clone()
        elif kind == "set_grad_enabled":
            torch.set_grad_enabled(False)
            a = F.relu(self.f(x))
            torch.set_grad_enabled(True)
        else:
            a = F.relu(self.f(x)).detach()
        return self.h(F.relu(self.g(a)))

    return body


@pytest.mark.parametrize("kind", ["no_grad", "inference_mode", "set_grad_enabled", "detach"])
@pytest.mark.parametrize("grad", [True, False])
def test_stopped_gradients_stop_and_are_told(kind: str, grad: bool) -> None:
    model, x = small(stopped(kind))
    told = pytest.warns(
        TraceWarning, match=r"gradient stops.*test_awkward\.py:\d+, in body: \"a = F\.relu.*torch\.no_grad"
    )
    with torch.set_grad_enabled(grad), told if kind != "detach" else contextlib.nullcontext():
        network = fxpath.trace(model, x)
    assert network.traced.tracer == "symbolic_trace"
    assert len(network.traced.remarks) == (kind != "detach")
    first, last = network.gradients(x).gradients
    assert not first.any()
    assert last.any()
    assert_works(network, model, rows)


def test_constants_made_without_gradients_are_not_told() -> None:
    def body(self: Layers, x: Tensor) -> Any:
        with torch.no_grad():
            scale = self.g.weight.abs().sum() / x.shape[1]
        return self.h(F.relu(self.f(x)) * scale)

    model, x = small(body)
    network = fxpath.trace(model, x)
    assert network.traced.remarks == []
    assert_works(network, model, rows)
    assert slope(network, x)[0].any()
    (found,) = torch.autograd.grad(network(x).sum(), [model.g.weight], allow_unused=True)  # type: ignore[union-attr,list-item]
    assert found is None


def test_a_forward_without_gradients_altogether() -> None:
    class Decorated(Layers):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Any:
            return self.h(F.relu(self.f(x)))

    model, x = small(Decorated())
    with pytest.warns(TraceWarning, match=r"the gradient stops.*out of forward"):
        network = fxpath.trace(model, x)
    with pytest.raises(SiteError, match=r"depends on none of the 1 sites.*torch\.no_grad\(\) in the model's forward"):
        network.gradients(x)
    assert_works(network, model, rows, scored=False)


# --- numbers, devices, other kinds of module ------------------------------------------------------------------------


def test_autocast_within_forward() -> None:
    class Casting(Layers):
        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = F.relu(self.f(x))
            return self.h(F.relu(h.float() - 0.1))

    model = Casting().eval()
    network = fxpath.trace(model, rows(3).float())
    assert network.traced.tracer == "torch.export"
    assert re.search(r"switches torch\.autocast \(.*test_awkward\.py:\d+, in forward: \"h = F", network.traced.notes[0])
    assert [site.name for site in network.sites] == ["relu", "relu_1"]  # none hides in a graph within the graph
    assert [value.dtype for value in network.activations(rows(2).float())] == [torch.bfloat16, torch.float32]
    assert_works(network, model, lambda batch: rows(batch).float(), tolerance=1e-2)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_operators_without_the_type(kind: torch.dtype) -> None:
    model = Layers(lambda self, x: self.h(torch.cdist(F.relu(self.f(x)), self.g.weight))).to(kind).eval()
    x = rows(3).to(kind)
    with pytest.raises(ModelError, match=rf'"cdist" not implemented for .*has no {kind} on cpu: use model\.float\(\)'):
        fxpath.trace(model, x)
    network = fxpath.trace(model.float(), x.float())  # the way out
    assert_works(network, model, lambda batch: rows(batch).float(), tolerance=1e-4)


def test_devices() -> None:
    model, x = small(plain())
    with pytest.raises(InputError, match=r"example is on meta, the model on cpu"):
        fxpath.trace(model, x.to("meta"))
    with pytest.raises(ModelError, match=r"0\.weight of Sequential is on the meta device.*to_empty"):
        fxpath.trace(plain().to("meta").eval(), x)
    unseen = fxpath.trace(plain().to("meta").eval(), x.float().to("meta"), check=False)  # sites need no values
    assert unseen.index.size == 5
    with pytest.raises(ModelError, match=r"the network is on the meta device, where nothing has a value"):
        fxpath.NeuronMCT().scores(unseen, x.float().to("meta"))


def test_parameters_on_several_devices() -> None:
    model, x = small(plain())
    model[2].to("meta")  # type: ignore[index,operator]
    with pytest.raises(ModelError, match=r"several devices \(0\.weight on cpu, 2\.weight on meta\); move them to one"):
        fxpath.trace(model, x, check=False)


@pytest.mark.filterwarnings("ignore")  # torch deprecates both
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "scripted"])
def test_torchscript(traced: bool) -> None:
    inner, x = small(plain())
    script = torch.jit.trace(inner, x) if traced else torch.jit.script(inner)
    with pytest.raises(TraceError, match=r"the model is TorchScript \(a ScriptModule.*give the Python module"):
        fxpath.trace(script, x)
    model, _ = small(Around(plain()))
    model.inner = script
    with pytest.warns(TraceWarning, match=r"inner is TorchScript, a leaf: activations inside are no sites"):
        network = fxpath.trace(model, x)
    assert [site.name for site in network.sites] == ["relu"]
    assert_works(network, model, rows)


def dynamically_quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(plain().eval(), {nn.Linear})  # type: ignore[no-any-return]


def quantised(stage: str) -> nn.Module:
    quantization = torch.ao.quantization
    model = nn.Sequential(quantization.QuantStub(), plain(), quantization.DeQuantStub())
    model.train(stage == "aware")
    model.qconfig = quantization.get_default_qat_qconfig() if stage == "aware" else quantization.get_default_qconfig()  # type: ignore[assignment]
    prepare = quantization.prepare_qat if stage == "aware" else quantization.prepare
    prepare(model, inplace=True)
    model(torch.randn(8, 4))
    return quantization.convert(model.eval()) if stage == "static" else model.eval()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")  # torch deprecates all of this
@pytest.mark.parametrize(
    ("build", "named"),
    [
        (dynamically_quantised, r"0 \(torch\.ao\.nn\.quantized\.dynamic.*Linear\)"),
        (lambda: quantised("static"), r"0 \(.*Quantize\)"),
        (lambda: quantised("aware"), r"FakeQuantize\)"),
        (lambda: quantised("observed"), r"Observer\)"),
    ],
    ids=["dynamic", "static", "aware", "observed"],
)
def test_quantised_modules_are_refused(build: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(ModelError, match=rf"{named} is quantised or observes.*trace the floating-point model"):
        fxpath.trace(build(), torch.randn(3, 4))


@pytest.mark.filterwarnings("ignore")
def test_stubs_of_quantisation_are_taken() -> None:
    model, x = small(nn.Sequential(torch.ao.quantization.QuantStub(), plain(), torch.ao.quantization.DeQuantStub()))
    network = fxpath.trace(model, x)
    assert [site.name for site in network.sites] == ["1.1"]
    assert_works(network, model, rows)


def test_lazy_modules_before_a_run() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.LazyConv2d(3, 2), nn.ReLU()).double().eval()
    with pytest.raises(ModelError, match=r"1\.weight of Sequential has no shape yet; run the model once.*LazyConv2d"):
        fxpath.trace(model, rows(3))


def test_random_in_evaluation_mode() -> None:
    for body in (
        lambda self, x: self.h(F.dropout(F.relu(self.f(x)), 0.5, training=True)),
        lambda self, x: self.h(F.relu(self.f(x)) + torch.randn_like(x)),
    ):
        with pytest.raises(ModelError, match=r"differently each time.*dropout called with training=True"):
            fxpath.trace(*small(body))


# --- the batch ------------------------------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    """Takes its batch as the steps of a sequence: the samples are not independent."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.rnn, self.h = nn.Linear(4, 4), nn.LSTM(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        out, _ = self.rnn(F.relu(self.f(x)))
        return self.h(F.relu(out[-1]))


class TurnedEncoder(nn.Module):
    """A site inside has the batch as its second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.h = nn.TransformerEncoderLayer(4, 2, 6), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.h(self.encoder(x.transpose(0, 1)).mean(0))


def test_a_batch_that_is_not_first() -> None:
    model, x = small(TimeFirst(), steps)
    with pytest.raises(
        SiteError,
        match=r"^site relu_1: expected its first axis to grow with the batch, found shape \(3, 5\) for.*sites=",
    ) as told:
        fxpath.trace(model, x)
    assert "\n" not in str(told.value)
    model, x = small(TurnedEncoder(), steps)
    with pytest.raises(
        SiteError, match=r"^site encoder\.relu: expected its first axis to grow with the batch.*batch axis"
    ):
        fxpath.trace(model, x)


class Packed(nn.Module):
    """Sequences of unequal lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 5, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1][-1]  # type: ignore[no-any-return]


def test_packed_sequences_work_in_a_leaf() -> None:
    class Reader(Layers):
        def __init__(self) -> None:
            super().__init__(width=5)
            self.packed = Packed()

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.h(F.relu(self.packed(F.relu(self.f(x)), lengths)))

    def inputs(batch: int) -> Any:
        return steps(batch), torch.tensor([3, 1, 2, 2, 3, 1, 1, 2][:batch])

    model, x = small(Reader(), inputs)
    with pytest.raises(TraceError, match=r"in forward: \"packed = nn\.utils\.rnn\.pack_padded(.|\n)*leaves="):
        fxpath.trace(model, x)
    network = fxpath.trace(model, x, leaves=Packed)
    assert [site.name for site in network.sites] == ["relu", "relu_1"]
    assert_works(network, model, inputs)


def branch_on_many(self: Layers, x: Tensor) -> Any:
    h = F.relu(self.f(x))
    return self.h(h * 2 if x.shape[0] > 4 else h)


REFUSED_BODIES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "len": (lambda self, x: self.h(F.relu(self.f(x)).reshape(len(x), -1)), r"take x\.shape\[0\] in place of len\(x\)"),
    "int": (lambda self, x: self.h(F.relu(self.f(x)).reshape(int(x.size(0)), 4)), "without int"),
    "range": (lambda self, x: torch.stack([F.relu(self.f(x[i])) for i in range(x.shape[0])]), "loop over the samples"),
    "rows": (lambda self, x: torch.stack([F.relu(self.f(row)) for row in x]), "an axis that is not the batch"),
    "more than one": (
        lambda self, x: self.h(F.relu(self.f(x)) * (2 if x.shape[0] > 1 else 1)), "nothing depend on the batch size"
    ),
    "three": (
        lambda self, x: self.h(F.relu(self.f(x)) * (2 if x.shape[0] == 3 else 1)), "nothing depend on the batch size"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_BODIES)
@pytest.mark.parametrize("fixed", [False, True])
def test_code_that_needs_one_batch_size_is_refused(name: str, fixed: bool) -> None:
    body, hint = REFUSED_BODIES[name]
    model, x = small(body)
    with unchanged(model), pytest.raises(TraceError, match=rf"test_awkward\.py:\d+, in (.|\n)*Perhaps: .*{hint}"):
        fxpath.trace(model, x, fix_branches=fixed)


def test_a_branch_on_larger_batches_is_found() -> None:
    """Neither the example nor a second batch size takes it, but torch.export knows what was compared."""
    model, _ = small(branch_on_many)
    with pytest.raises(TraceError, match=r"holds for batch sizes 2 to 4 alone(.|\n)*nothing depend on the batch size"):
        fxpath.trace(model, rows(1))
    with pytest.raises(TraceError, match=r"holds for batch sizes 5 to .* alone"):
        fxpath.trace(model, rows(6))


def test_a_batch_written_as_a_number() -> None:
    model, x = small(lambda self, x: self.h(F.relu(self.f(x)).view(3, 2, 2).flatten(1)))
    with pytest.raises(ModelError, match=r"cannot run on a batch of 1; at view: .*x\.shape\[0\]"):
        fxpath.trace(model, x)


# --- branches on values ---------------------------------------------------------------------------------------------


def doubled(self: Layers, x: Tensor) -> Any:
    h = F.relu(self.f(x))
    if h.sum() > 0:
        h = h * 2
    return self.h(h)


def repeated(self: Layers, x: Tensor) -> Any:
    h = F.relu(self.f(x))
    while h.abs().max() > 0.5:
        h = self.relu(self.g(h)) / 4
    return self.h(h)


def counted(self: Layers, x: Tensor) -> Any:
    h = F.relu(self.f(x))
    return self.h(h * int((h > 0).any()) * float(self.g.weight.abs().max()))


def listed(self: Layers, x: Tensor) -> Any:
    h = F.relu(self.f(x))
    return self.h(h * [1, 2][(h.max() > -1).long()] / (2 if h.max().item() > 1e6 else 1))


ASKING = {"if": doubled, "while": repeated, "int and float": counted, "index and item": listed}


@pytest.mark.parametrize("name", ASKING)
def test_branches_are_refused_and_can_be_fixed(name: str) -> None:
    body = ASKING[name]
    model, x = small(body)
    with unchanged(model), pytest.raises(TraceError) as caught:
        fxpath.trace(model, x)
    first = inspect.getsourcelines(body)[1]
    lines = re.findall(rf'at .*test_awkward\.py:(\d+), in {body.__name__}: "', str(caught.value))
    assert lines
    assert all(first < int(line) < first + 6 for line in lines)
    for way in (
        "leaves=(ModuleType",
        "a tracer=… of your own",
        "fix_branches=True and an example that fixes the branch",
    ):
        assert way in str(caught.value)
    with (
        unchanged(model),
        pytest.warns(TraceWarning, match=rf"branch is fixed.*test_awkward\.py:\d+, in {body.__name__}"),
    ):
        network = fxpath.trace(model, x, fix_branches=True)
    assert network.traced.tracer == "symbolic_trace"
    assert network.traced.checked[0] == 3
    assert all("BranchError" in remark for remark in network.traced.remarks)
    assert torch.equal(network(x), model(x))
    for one, two in zip(slope(model, x), slope(network, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_inputs_that_take_another_branch_are_refused() -> None:
    model, x = small(lambda self, x: self.h(F.relu(self.f(x)) * (2 if x.sum() > 0 else 1)))
    x = x.abs()
    with pytest.warns(TraceWarning, match=r'"model, x = small.*is True; inputs that take another raise BranchError'):
        network = fxpath.trace(model, x, fix_branches=True)
    assert network.traced.checked == (3, 1)  # a sample alone takes the same
    for call in (network, network.gradients, network.activations, network.original, network.respond):
        with pytest.raises(BranchError, match=r"was True there and is False for these inputs.*leaves="):
            call(-x)
    assert_works(network, model, lambda batch: rows(batch).abs())


def test_a_restricted_network_keeps_its_branches() -> None:
    model, x = small(doubled)
    with pytest.warns(TraceWarning):
        network = fxpath.trace(model, x, fix_branches=True)
    nothing = Pathways(torch.zeros(3, network.index.size, dtype=torch.bool), network.index)
    with network.masked(nothing):
        assert torch.equal(network(x), model.h(torch.zeros(3, 4).double()))  # type: ignore[operator]
    assert torch.equal(network(x), model(x))


def test_a_second_batch_that_takes_another_branch_is_not_compared() -> None:
    model, _ = small(lambda self, x: self.h(F.relu(self.f(x)) * (2 if x.sum() > 0 else 1)))
    x = torch.tensor([[-1.0] * 4, [3.0] * 4, [3.0] * 4], dtype=torch.float64)
    with pytest.warns(TraceWarning):
        network = fxpath.trace(model, x, fix_branches=True)
    assert network.traced.checked == (3,)
    assert "no second batch size was compared, as it takes another branch" in network.traced.notes[0]
    with pytest.raises(BranchError):
        network(x[:1])


def test_no_branch_is_fixed_needlessly() -> None:
    """Where a tracer follows the code, or where it asks for shapes alone, nothing is fixed."""
    for body in (measured_values, asserted, printed):
        model, x = small(body)
        with mixing(body is measured_values):
            network = fxpath.trace(model, x, fix_branches=True)
        assert len(network.traced.remarks) == (body is measured_values)
        assert_works(network, model, rows)
    model, x = small(unbound, steps)
    assert_works(fxpath.trace(model, x, fix_branches=True), model, steps)
    with pytest.raises(InputError, match=r"fix_branches needs fxpath's own tracer"):
        fxpath.trace(model, x, fix_branches=True, tracer=fx.Tracer())


def test_fixed_branches_see_later_weights() -> None:
    model, x = small(doubled)
    with pytest.warns(TraceWarning):
        network = fxpath.trace(model, x, fix_branches=True)
    with torch.no_grad():
        model.f.weight.mul_(1.5)  # type: ignore[union-attr,operator]
    assert torch.equal(network(x), model(x))


def test_fixed_branches_with_leaves_hooks_and_in_place_operations() -> None:
    class Mixed(DataBranchInLeaf):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv(x), inplace=True)
            kept = h
            h += 1
            if h.max() > 0:
                h = self.branching(h) + kept
            return self.head(h)

    model = Mixed().double().eval()
    calls: list[float] = []
    model.branching.register_forward_hook(lambda module, args, output: calls.append(float(output.sum())))
    x = image(3)
    for leaves in ((), (Branching,)):
        with unchanged(model), pytest.warns(TraceWarning):
            network = fxpath.trace(model, x, leaves=leaves, fix_branches=True)
        assert [site.name for site in network.sites] == ["relu"]
        assert torch.equal(network(x), model(x))
    assert len(network.traced.remarks) == 1


def test_fixing_branches_leaves_nothing_alive() -> None:
    class Watching(DataBranch):
        def __init__(self) -> None:
            super().__init__()
            self.watched = Watched()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.watched(x))

    model, x = Watching().double().eval(), image(3)
    record = model.watched.record
    gc.disable()
    try:
        with pytest.warns(TraceWarning):
            network = fxpath.trace(model, x, leaves=Watched, fix_branches=True)
        assert record.references
        assert record.alive() == 0
        require_clean_failures(network, model, record, (1,), lambda: network(x.clone()))
    finally:
        gc.enable()


def test_leaves_that_torch_export_opens_are_told() -> None:
    class Asserting(DataBranchInLeaf):
        def __init__(self) -> None:
            super().__init__()
            self.branching = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 2
            return super().forward(x)

    model, x = Asserting().double().eval(), image(3)
    with pytest.warns(
        TraceWarning,
        match=r"Sequential could not be leaves: torch\.export made this graph, and looks into every(.|\n)*assert x",
    ):
        network = fxpath.trace(model, x, leaves=nn.Sequential)
    assert [site.name for site in network.sites] == ["relu", "branching.1"]
    network = fxpath.trace(model, x, sites=nn.Sequential)  # as a site it is found all the same
    assert [site.name for site in network.sites] == ["branching.1"]
    with pytest.raises(TraceError, match=r"only symbolic_trace honours leaves; torch\.export looks into every module"):
        fxpath.trace(DataBranch().double().eval(), x, leaves=Branching)


def test_graphs_within_the_graph_are_refused() -> None:
    def body(self: Layers, x: Tensor) -> Any:
        return self.h(torch.cond(x.sum() > 0, F.relu, lambda h: F.relu(h) * 2, (self.f(x),)))

    model, x = small(body)
    with pytest.raises(TraceError, match=r"operator cond holds graphs of its own.*a module that is a leaf"):
        fxpath.trace(model, x)


class Counting(Layers):
    """Forward writes to buffers: adds to one, averages into another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.f(x))
        self.calls += 1
        self.average.mul_(0.9).add_(h.detach().mean(0))
        return self.h(h)


def test_buffers_that_forward_writes_to_keep_their_values() -> None:
    torch.manual_seed(0)
    model = nn.Module.eval(Counting())
    with contextlib.suppress(TraceError):
        fxpath.trace(model, torch.randn(3, 4))
    assert model.calls == 0
    assert not bool(model.average.any())


class Assigned(Layers):
    def forward(self, x: Tensor) -> Any:
        h = self.f(x)
        h[:, :3] = F.relu(h[:, :3])
        z = torch.zeros_like(h)
        z[:, 1:] = h[:, :3]
        return self.h(h + z)


def test_tensors_assigned_to_slices() -> None:
    torch.manual_seed(0)
    model, x = Assigned().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    network = fxpath.trace(model, x)
    assert [site.shape for site in network.sites] == [(3,)]
    given = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(given).sum(), given)
    assert torch.equal(network(x), model(x))
    torch.testing.assert_close(torch.autograd.grad(network(given).sum(), given), expected)


class Remembering(Layers):
    """Keeps what it made, and looks at it the next time; loops over an axis, which symbolic_trace cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Any = None

    def forward(self, x: Tensor) -> Any:
        assert not isinstance(self.before, fx.Proxy)
        h = F.relu(self.f(x))
        self.before = h.detach()
        for place in range(x.shape[1]):
            h = h + x[:, place : place + 1]
        return self.h(h)


def test_one_way_of_tracing_does_not_see_what_another_left() -> None:
    torch.manual_seed(0)
    model, x = Remembering().eval(), torch.randn(3, 4)
    network = fxpath.trace(model, x)
    assert network.traced.tracer == "torch.export"
    assert torch.equal(network(x), model(x))


class Warm(Layers):
    """Reads a function of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.h(F.relu(self.f(x) * torch.exp(self.temperature)))


def test_later_changes_of_buffers_are_seen() -> None:
    torch.manual_seed(0)
    model, x = Warm().eval(), torch.randn(3, 4)
    network = fxpath.trace(model, x)
    before = network.fingerprint
    model.temperature.fill_(1)
    assert torch.equal(network(x), model(x))
    assert "temperature" in network.tensors
    assert network.fingerprint != before


def test_responses_that_fail_or_are_no_numbers() -> None:
    torch.manual_seed(0)
    model, x = Warm().eval(), torch.randn(3, 4)
    network = fxpath.trace(model, x, response=lambda output: output["logits"])
    with pytest.raises(InputError, match=r"response '<lambda>': it cannot read the network's output, \(3, 3\) float32"):
        fxpath.NeuronMCT().scores(network, x)
    network = fxpath.trace(model, x, response=lambda output: (output.sum(1) - 1e9).log())
    with pytest.raises(SampleError, match="response: it is NaN or infinite for sample 0, 1, 2"):
        fxpath.NeuronMCT().scores(network, x)
    with pytest.raises(InputError, match=r"expected dense inputs, found torch\.sparse_coo"):
        network(x.to_sparse())


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "norm": lambda h: h / (1 + h.norm(dim=0)),
    "softmax": lambda h: h.softmax(0),
    "flip": lambda h: h + h.flip(0),
}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("mix", MIXES)
def test_samples_that_see_each_other_are_said(mix: str, batch: int) -> None:
    model, x = small(lambda self, x: self.h(MIXES[mix](F.relu(self.f(x)))))
    with pytest.warns(TraceWarning, match=r"what Layers says of a sample depends on the others of its batch") as found:
        network = fxpath.trace(model, x[:batch])
    assert network.traced.remarks == [str(each.message).removeprefix("trace: ") for each in found]


def test_rounding_between_sizes_of_batches_is_no_mixing() -> None:
    torch.manual_seed(0)
    for kind in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))
        for batch in (1, 2, 9):
            x = torch.randn(batch, 300).to(kind)
            assert fxpath.trace(model.to(kind).eval(), x).traced.remarks == []
