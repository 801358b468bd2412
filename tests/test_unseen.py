"""Networks that nobody had thought of: buffers that count, names of fx's own, adjacencies, outputs of many parts."""

from __future__ import annotations

import io
import operator
import warnings
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_awkward import Layers, plain, rows, small
from torch import Tensor, fx, nn

import fxpath
from fxpath import channels
from fxpath.equality import _another
from fxpath.errors import InputError, ModelError, SampleError, TraceError, TraceWarning
from fxpath.responses import OutputFunction, identity, parse_response, token
from fxpath.zoo import LoadedModel

# --- buffers and names ----------------------------------------------------------------------------------------------


class Buffered(Layers):
    """A buffer that forward writes to."""

    calls: Tensor

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(body)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))


def counted(self: Buffered, x: Tensor) -> Tensor:
    self.calls += 1
    out: Tensor = self.h(F.relu(self.f(x)))
    return out


def read(self: Buffered, x: Tensor) -> Tensor:
    self.calls += 1
    out: Tensor = self.h(F.relu(self.f(x))) * self.calls
    return out


def test_a_counter_that_nothing_reads() -> None:
    model, x = Buffered(counted).double().eval(), rows(2)
    network = fxpath.trace(model, x)
    assert network.traced.tracer == "symbolic_trace"
    assert not network.traced.graph_module.graph.find_nodes(op="get_attr")
    assert torch.equal(network(x), model(x))
    assert float(model.calls) == 1  # that of the line above: tracing and the network leave it alone
    with pytest.raises(TraceError, match=r"Perhaps: write to a buffer only where self\.training says so"):
        fxpath.trace(Buffered(read).double().eval(), x)


@pytest.mark.parametrize("name", ["graph", "_graph", "code", "meta", "recompile", "class"])
def test_names_that_a_graph_cannot_have(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            setattr(self, name, nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

        def forward(self, x: Tensor) -> Any:
            return getattr(self, name)(self.relu(x))

    model, x = Named().double().eval(), rows(2)
    network = fxpath.trace(model, x)
    assert [site.name for site in network.sites] == ["relu", f"{name}.1"]
    assert torch.equal(network(x), model(x))
    pathways = fxpath.NeuronMCT().scores(network, x).pathways(sparsity=0.5)
    file = io.BytesIO()
    torch.save(network.export(pathways, at=x), file)
    file.seek(0)
    with network.frozen(pathways, at=x):
        assert torch.equal(torch.load(file, weights_only=False)(x), network(x))


def test_a_parameter_with_a_name_of_fxs_own() -> None:
    model = small(lambda self, x: self.h(F.relu(self.f(x) * self.code)))[0]
    model.code = nn.Parameter(torch.rand(4, dtype=torch.float64))
    x = rows(2)
    assert torch.equal(fxpath.trace(model, x)(x), model(x))


def test_recurrent_layers_of_rectifiers_are_said() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.h = nn.RNN(4, 5, nonlinearity="relu", batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Any:
            return self.h(F.relu(self.rnn(x)[0]).mean(1))

    with pytest.warns(TraceWarning, match="rnn applies a ReLU at every step, within a leaf: these are no sites"):
        network = fxpath.trace(Recurrent().eval(), torch.randn(2, 6, 4))
    assert len(network.sites) == 1


# --- what is kept and put back --------------------------------------------------------------------------------------


class Refusing(OrderedDict[str, Any]):
    """As the outputs of transformers are."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("You cannot use ``update`` on a Refusing")

    def clear(self) -> None:
        raise TypeError("You cannot use ``clear`` on a Refusing")

    def copy(self) -> Any:
        raise TypeError("You cannot use ``copy`` on a Refusing")


@pytest.mark.parametrize("fails", [False, True])
def test_containers_that_refuse_are_put_back(fails: bool) -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.f(x))
        self.cache["last"] = h
        self.recent.append(h)
        return self.h(h if not fails or h.sum() > 0 else -h)

    model, x = small(body)
    model.cache = Refusing(first=1, last="none")
    model.recent = deque([1, 2], maxlen=2)
    model.after = ["before"]
    if fails:
        with pytest.raises(TraceError):
            fxpath.trace(model, x)
    else:
        fxpath.trace(model, x)
    assert type(model.cache) is Refusing
    assert list(model.cache.items()) == [("first", 1), ("last", "none")]
    assert (list(model.recent), model.recent.maxlen, model.after) == ([1, 2], 2, ["before"])


class Keeps(nn.Module):
    """An activation of one's own that works in place and remembers what it has seen."""

    inplace = True

    def __init__(self) -> None:
        super().__init__()
        self.inplace = True

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x.clamp_(min=0) if self.inplace else x.clamp(min=0)


def test_out_of_place_forms_keep_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), Keeps(), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    network = fxpath.trace(model, rows(2), leaves=(Keeps,))
    assert not any(hasattr(part, "last") for part in (*model.modules(), *network.traced.graph_module.modules()))


def test_sparse_buffers_in_a_job(tmp_path: Path) -> None:
    class Graph(nn.Module):
        adjacency: Tensor

        def __init__(self, weight: float, layout: str) -> None:
            super().__init__()
            self.register_buffer("adjacency", getattr(torch.eye(5) * weight, f"to_sparse{layout}")())
            self.l, self.h = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Any:
            mixed = torch.sparse.mm(self.adjacency, self.l(x).permute(1, 0, 2).reshape(5, -1))
            return self.h(F.relu(mixed.reshape(5, -1, 6).permute(1, 0, 2)).mean(1))

    x = torch.randn(3, 5, 3)
    found = set()
    warnings.filterwarnings("ignore", message="Sparse")  # torch's own, of its CSR being in beta
    for weight in (1.0, 2.0):
        for layout in ("", "_csr", "_csc"):
            torch.manual_seed(0)
            network = fxpath.trace(Graph(weight, layout).eval(), x)
            found.add(network.fingerprint)
    assert len(found) == 6
    fxpath.compute(network, list(x), tmp_path / "run.h5", sparsities=[0.5], progress=False)
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert store.ok.all()


def test_samples_of_another_branch_are_recorded(tmp_path: Path) -> None:
    def body(self: Layers, x: Tensor) -> Tensor:
        h = F.relu(self.f(x)) if x.sum() > -6 else self.f(x)
        return self.h(h)

    model, _ = small(body)
    with pytest.warns(TraceWarning, match="a branch is fixed"):
        network = fxpath.trace(model, torch.ones(1, 4, dtype=torch.float64), fix_branches=True)
    data = list(torch.rand(7, 4, dtype=torch.float64))
    data[4] = torch.full((4,), -9.0, dtype=torch.float64)
    for name, size in (("one", 1), ("four", 4)):
        fxpath.compute(network, data, tmp_path / name, sparsities=[0.5], progress=False, micro_batch=size)
        with fxpath.open_store(tmp_path / name) as store:
            status = list(store.samples()["status"])
            assert [state == "ok" for state in status] == [number != 4 for number in range(7)]
            assert "x.sum() > -6" in status[4]
    with pytest.raises(SampleError, match=r"sample '4' cannot be used: .*x\.sum\(\) > -6"):
        fxpath.compute(network, data, tmp_path / "strict", sparsities=[0.5], progress=False, strict=True)


# --- channels -------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers and tensors that mix places, as a graph's adjacency does."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.rand(5, 5))
        self.register_buffer("by_kind", torch.rand(2, 5, 5))
        self.square, self.heads = nn.Parameter(torch.rand(7, 7)), nn.Parameter(torch.rand(2, 3, 3))
        self.l, self.l6, self.c = nn.Linear(3, 7), nn.Linear(3, 6), nn.Conv2d(3, 6, 1)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(self, x)).flatten(1)[:, :4]


NODES, MAPS = torch.rand(2, 5, 3), torch.rand(2, 3, 4, 5)
MIXED: dict[str, tuple[Callable[[Any, Tensor], Tensor], Tensor, int]] = {
    "adjacency in front": (lambda m, x: m.adjacency @ m.l(x), NODES, 1),
    "twice": (lambda m, x: (m.adjacency @ (m.adjacency @ m.l(x))).transpose(1, 2), NODES, 0),
    "a layer after it": (lambda m, x: m.l(m.adjacency @ x), NODES, 1),
    "einsum": (lambda m, x: torch.einsum("nm,bmf->bnf", m.adjacency, m.l(x)), NODES, 1),
    "behind": (lambda m, x: torch.einsum("nctv,vw->nctw", m.c(x), m.adjacency), MAPS, 0),
    "several kinds": (
        lambda m, x: torch.einsum("nkctv,kvw->nctw", m.c(x).unflatten(1, (2, 3)), m.by_kind),
        MAPS,
        0,
    ),
    "a square layer": (lambda m, x: m.l(x) @ m.square, NODES, 1),
    "a square layer in front": (lambda m, x: m.square[:6, :6] @ m.c(x).flatten(2), MAPS, 0),
    "a layer a head": (lambda m, x: torch.einsum("bthd,hde->bthe", m.l6(x).unflatten(2, (2, 3)), m.heads), NODES, 2),
    "fewer come out": (lambda m, x: m.adjacency[:4] @ m.l(x), NODES, 0),
    "of the input": (lambda m, x: x @ m.square[:3, :3], NODES, 1),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_that_mix_places_make_no_channels(name: str) -> None:
    body, x, axis = MIXED[name]
    site = fxpath.trace(Mixed(body).eval(), x, granularity="channel").sites[0]
    assert site.axis == axis


def test_channels_of_a_long_chain_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(self: Layers, x: Tensor) -> Tensor:
        h = self.f(x)
        for _ in range(40):
            h = F.relu(h * 0.9 + 0.1)
        return self.h(h)

    seen: list[fx.Node] = []
    made = channels._made
    monkeypatch.setattr(channels, "_made", lambda node, shapes: seen.append(node) or made(node, shapes))
    model, x = small(body)
    assert len(fxpath.trace(model, x).sites) == 40
    assert len(seen) == len(set(seen))


# --- outputs and responses ------------------------------------------------------------------------------------------


class Twofold(nn.Module):
    """Two outputs, each of its own sites."""

    def __init__(self, kind: type = dict) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.r, self.t, self.q = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.kind = kind
        for layer in (self.a, self.b):
            nn.init.constant_(layer.bias, 3)  # all are active

    def forward(self, x: Tensor) -> Any:
        return self.kind(out=self.h(self.t(self.r(self.a(x)))), aux=self.q(self.b(x)))


@dataclass
class Two:
    """What a library of its own gives."""

    out: Tensor
    aux: Tensor


def first_of_out(output: Any) -> Tensor:
    found: Tensor = (output["out"] if isinstance(output, dict) else output.out)[:, 0]
    return found


@pytest.mark.parametrize("kind", [dict, Two])
def test_edges_into_the_response_come_from_what_it_reads(kind: type) -> None:
    model, x = Twofold(kind).eval(), torch.randn(2, 4)
    both = ((-1, 0), (-1, 2), (0, 1))
    for response, last in {"logit:output=out": [(1, 3)], "logit:output=aux": [(2, 3)], "margin": [(1, 3)]}.items():
        network = fxpath.trace(model, x, response=response)
        assert network.edges == (*both, *last)
        scores = fxpath.NeuronMCT().scores(network, x)
        for number, site in enumerate(network.sites):  # what leads nowhere has no share
            assert bool(scores.site(site.name).any()) == nx.has_path(nx.DiGraph(network.edges), number, 3)
    network = fxpath.trace(
        model, x, response=lambda output: output["aux" if kind is dict else 0][:, 0] if 0 else x[:, 0]
    )
    assert network.edges == (*both, (1, 3), (2, 3))  # a function may read all


Pair = namedtuple("Pair", ["logits", "hidden"])


def test_exports_of_named_tuples_and_of_none_load_again() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.h = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            y = F.relu(self.l(x))
            y = y if mask is None else y * mask
            return Pair(self.h(y), hidden=y)

    x = torch.randn(2, 4)
    network = fxpath.trace(Optional().eval(), (x, None), response="logit:output=logits")
    pathways = fxpath.NeuronMCT().scores(network, (x, None)).pathways(sparsity=0.5)
    module = network.export(pathways, at=(x, None))
    file = io.BytesIO()
    torch.save(module, file)
    assert b"Pair" not in file.getvalue()
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with network.frozen(pathways, at=(x, None)):
        expected = network((x, None))
    assert type(expected) is Pair
    for each in (module, again):
        assert type(each(x, None)) is tuple
        assert all(map(torch.equal, each(x, None), expected))
        with pytest.raises(AssertionError, match="mask: expected None, as in the example"):
            each(x, torch.ones(2, 4))


def test_exports_keep_which_parameters_are_trained() -> None:
    class Tokens(nn.Module):
        positions: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.ones(4))
            self.place, self.h = nn.Parameter(torch.randn(1, 9, 4)), nn.Linear(4, 3)
            self.register_buffer("positions", torch.arange(9).float().view(1, 9, 1))

        def forward(self, x: Tensor) -> Any:
            h = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
            h = h + self.place[:, : h.shape[1]] + self.positions[:, : h.shape[1]]
            return self.h(self.scale.mul(F.relu(h)).mean(1))

    model, x = Tokens().eval(), torch.randn(2, 5, 4)
    model.place.requires_grad_(False)
    network = fxpath.trace(model, x)
    module = network.export(fxpath.NeuronMCT().scores(network, x).pathways(sparsity=0.5))
    own = dict(module.named_parameters())
    for name, parameter in model.named_parameters():
        assert own[name].requires_grad == parameter.requires_grad
    assert not own["positions"].requires_grad


def held(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda output: output[:, 0] if value is not None else output[:, 1]


class Slots:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def probe(number: float) -> nn.Module:
    layers = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU(), nn.Linear(2, 2))
    for parameter in layers.parameters():
        nn.init.constant_(parameter, number)
    return layers


def circle(number: int) -> list[Any]:
    values: list[Any] = [number]
    values.append(values)
    return values


HELD: dict[str, Callable[[int], Any]] = {
    "NumPy's number": np.int64,
    "slice": lambda n: slice(0, n),
    "range": range,
    "deque": lambda n: deque([n]),
    "dtype": lambda n: (torch.float32, torch.float64)[n - 1],
    "device": lambda n: torch.device(("cpu", "meta")[n - 1]),
    "slots": Slots,
    "getter": lambda n: operator.itemgetter("ab"[n - 1]),
    "network": probe,
    "circle": circle,
    "ordered": lambda n: OrderedDict(a=n),
    "set": lambda n: {n, "x"},
    "conjugate": lambda n: torch.tensor([1j * n, 2]).conj(),
    "sparse": lambda n: torch.eye(3).mul(n).to_sparse(),
    "objects": lambda n: np.array([n, "s"], dtype=object),
    "meta": lambda n: torch.empty(n, device="meta"),
    "builtin": lambda n: (torch.sum, torch.mean)[n - 1],
    "true": lambda n: (True, 1)[n - 1],
}


@pytest.mark.parametrize("name", HELD)
def test_responses_are_told_apart_by_all_that_they_hold(name: str) -> None:
    one, again, other = (identity(OutputFunction(held(HELD[name](number)))) for number in (1, 1, 2))
    assert one == again
    assert one != other


def test_a_network_as_response_is_told_by_its_weights() -> None:
    assert identity(OutputFunction(probe(1))) == identity(OutputFunction(probe(1)))
    assert identity(OutputFunction(probe(1))) != identity(OutputFunction(probe(2)))


class Translator(nn.Module):
    """A decoder of four places over the sum of an encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.g, self.o = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, mask: Tensor, dec: Tensor) -> Any:
        memory = F.relu(self.f(self.e(ids))) * mask.float()[..., None]
        return self.o(F.relu(self.g(self.e(dec) + memory.sum(1, keepdim=True))))


def test_places_of_an_output_that_are_not_the_inputs() -> None:
    inputs = {
        "ids": torch.randint(1, 20, (2, 6)),
        "mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6]),
        "dec": torch.randint(1, 20, (2, 4)),
    }
    network = fxpath.trace(Translator().eval(), inputs, response=token(-1), padding="mask")
    assert fxpath.NeuronMCT().scores(network, inputs).signed.shape == (2, network.index.size)


def test_a_place_that_no_output_has() -> None:
    inputs = {"ids": torch.ones(2, 4, dtype=torch.int64), "mask": torch.ones(2, 4), "dec": torch.ones(2, 4).long()}
    network = fxpath.trace(Translator().eval(), inputs, sites="relu", response=token(9), padding="mask", check=False)
    with pytest.raises(InputError, match="token"):
        fxpath.NeuronMCT().scores(network, inputs)


def test_one_number_of_a_whole_batch_is_no_mixing() -> None:
    class Aux(Layers):
        def forward(self, x: Tensor) -> Any:
            h = F.relu(self.f(x))
            return {"logits": self.h(h), "loss": h.mean().view(1), "none": h.softmax(1).sum(1, keepdim=True) - 1}

    fxpath.trace(Aux().double().eval(), rows(2), response="logit:output=logits")  # a warning is an error here


def test_rounding_around_zero_is_no_mixing() -> None:
    alone = torch.full((1, 4), 1e-17, dtype=torch.float64)
    assert not _another(alone, torch.cat([-alone, alone]))
    assert _another(1e6 * alone + 1, torch.cat([alone, alone]))


# --- the command line -----------------------------------------------------------------------------------------------


def test_what_the_command_line_does_not_take_is_said() -> None:
    with pytest.raises(InputError, match=r"expected param=value, found '-1'; parameters are position"):
        parse_response("token:-1")
    with pytest.raises(ModelError, match=r"expected input_shape to be one tensor's, such as .* found \{'a': \(3,\)\}"):
        LoadedModel("own", plain(), lambda image: torch.zeros(3), "{}", {"a": (3,)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"forward takes the arguments \(ids, mask, dec\).*a tuple of all in order"):
        fxpath.trace(Translator().eval(), torch.ones(2, 3))
