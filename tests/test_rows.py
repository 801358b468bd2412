"""Rows that are no samples, what tracing leaves as it was, and inputs within inputs."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_awkward import Layers, plain, rows, small
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxpath
from fxpath.errors import InputError, ModelError, SiteError, TraceWarning
from fxpath.responses import neuron
from fxpath.surroundings import plain_attention

# --- rows that are no samples ----------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Each row goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        out = x.new_zeros(x.shape[0], 2)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return out


def test_rows_that_depend_on_values() -> None:
    torch.manual_seed(0)
    model, x = Routed().double().eval(), rows(3)
    x[:, 0] = torch.tensor([-1.0, -2.0, -3.0])  # all to the first
    network = fxpath.trace(model, x, sites=["experts.0.1"])
    x[1, 0] = 1.0
    assert torch.equal(network(x), model(x))
    for run in (network.activations, network.original, fxpath.NeuronMCT().scores.__get__(fxpath.NeuronMCT())):
        with pytest.raises(SiteError, match=r"site experts\.0\.1: expected \(3, 6\) for 3 samples, found \(2, 6\)"):
            run(network, x) if run.__name__ == "scores" else run(x)


SORTED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "by length": lambda x: (order := x[:, 0].argsort(), order.argsort()),
    "the other way": lambda x: (order := torch.arange(x.shape[0] - 1, -1, -1), order),
}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", SORTED)
def test_rows_in_another_order_than_the_samples_are_no_site(name: str, batch: int) -> None:
    def body(self: Layers, x: Tensor) -> Tensor:
        order, back = SORTED[name](x)
        return self.h(F.relu(self.g(F.relu(self.f(x))[order])))[back]

    model, x = small(body)
    with pytest.raises(SiteError, match=r"site relu_1: expected the rows of a sample .* in the order of the samples"):
        fxpath.trace(model, x[:batch])
    network = fxpath.trace(model, x[:batch], sites=["relu"])  # the way out
    assert torch.equal(network(x), model(x))


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {  # orders that two samples, or those of the example, need not show
    "by expert": lambda x: (x[:, :1] * 0.1 > 5).long().flatten().argsort(stable=True),
    "by length, longest first": lambda x: torch.sort((x[:, 0] * 0).long(), dim=0, descending=True, stable=True)[1],
    "rolled by two": lambda x: torch.arange(x.shape[0]).roll(2),
    "even ones first": lambda x: torch.cat([torch.arange(x.shape[0])[0::2], torch.arange(x.shape[0])[1::2]]),
}


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", HIDDEN)
def test_an_order_that_the_example_does_not_show(name: str, batch: int) -> None:
    def body(self: Layers, x: Tensor) -> Tensor:
        order = HIDDEN[name](x)
        return self.h(F.relu(self.g(F.relu(self.f(x))[order])))[order.argsort()]

    model, x = small(body)
    x = torch.cat([x, x + 0.5])[:batch]
    with pytest.raises(SiteError, match=r"site relu_1: expected the rows of a sample .* in the order of the samples"):
        fxpath.trace(model, x)
    assert len(fxpath.trace(model, x, sites=["relu"]).sites) == 1


def test_a_graph_that_holds_for_two_samples_alone() -> None:
    def body(self: Layers, x: Tensor) -> Tensor:
        y = F.relu(self.f(torch.cat([x[0::2], x[1::2]])))
        z = torch.empty_like(y)
        z[0::2] = y[: x[0::2].shape[0]]
        z[1::2] = y[x[0::2].shape[0] :]
        return self.h(F.relu(z))

    model, x = small(body)
    with pytest.raises(
        ModelError, match=r"the graph runs on one sample and on two, and not on 3: .*; take the number of samples"
    ):
        fxpath.trace(model, x[:2])


def test_rows_that_masks_put_together() -> None:
    def body(self: Layers, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        rows, places = torch.cat([x[first], x[~first]]), torch.arange(x.shape[0])
        back = torch.cat([places[first], places[~first]]).argsort()
        return self.h(F.relu(self.g(F.relu(self.f(rows)))))[back]

    model, x = small(body)
    x[:, 0] = x[:, 0].abs() + 0.1  # all are of one kind
    with pytest.raises(SiteError, match=r"site relu: expected the rows of a sample"):
        fxpath.trace(model, x)


def test_orders_that_are_undone_before_a_site() -> None:
    def body(self: Layers, x: Tensor) -> Tensor:
        for _ in range(2):  # the second order reads the first
            order = x.sum(1).argsort()
            x = F.relu(self.f(x[order])[order.argsort()])
        return self.h(F.relu(self.g(x)))

    model, x = small(body)
    network = fxpath.trace(model, x)
    assert len(network.sites) == 3
    assert torch.equal(network(x), model(x))


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_a_constant_example_hides_no_rows_in_turn(fill: float) -> None:
    def body(self: Layers, x: Tensor) -> Tensor:
        steps = F.relu(self.f(x.transpose(0, 1).reshape(-1, 4)))  # time first
        return self.h(steps).view(x.shape[1], x.shape[0], -1).transpose(0, 1)

    model, _ = small(body)
    with pytest.raises(SiteError, match=r"site relu: expected the rows of a sample one after the other"):
        fxpath.trace(model, torch.full((2, 5, 4), fill, dtype=torch.float64), response=lambda y: y.sum((1, 2)))


def test_samples_that_see_each_other_where_one_alone_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.ReLU(), nn.Linear(5, 2))
    torch.manual_seed(0)
    with pytest.warns(TraceWarning, match="the others of its batch"):
        fxpath.trace(model.eval(), torch.randn(3, 4))


# --- what tracing leaves ---------------------------------------------------------------------------------------------


class Diary(nn.Module):
    """A leaf that notes what it saw in containers within containers, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.pages: dict[str, Any] = {"h": [], "more": (deque(maxlen=3),)}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc(x))
        self.pages["h"].append(h)
        self.pages["more"][0].append(h)
        self.last = h
        torch.rand(3)
        return h


@pytest.mark.parametrize("leaf", [True, False])
def test_nothing_is_left_in_containers_nor_drawn(leaf: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Diary(), nn.ReLU(), nn.Linear(6, 2)).eval()
    pages = model[0].pages["h"]
    before = torch.get_rng_state()
    fxpath.trace(model, torch.randn(2, 3, 4, generator=torch.Generator()), leaves=Diary if leaf else (),
                 response=lambda y: y.sum((1, 2)))  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert (model[0].last, model[0].pages["h"], list(model[0].pages["more"][0])) == (None, [], [])
    assert model[0].pages["h"] is pages


def test_attention_is_as_it_was_when_the_last_thread_is_done() -> None:
    one, two = plain_attention(), plain_attention()
    assert torch.backends.mha.get_fastpath_enabled()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    two.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()


def test_training_mode_of_a_module_that_was_in_place() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(inplace=True), nn.Linear(6, 2)).eval()
    network = fxpath.trace(model, rows(2).float())
    model[2].train()
    with pytest.raises(ModelError, match="in training mode since it was traced"):
        network(rows(2).float())


# --- inputs within inputs --------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, given: Any, *more: Any) -> Tensor:
        return self.head(F.relu(self.fc(given["p"]) - given["q"].sum(1, keepdim=True)))


class NestedBound(Nested):
    def forward(self, given: Any) -> Tensor:  # type: ignore[override]
        return super().forward(given)


@pytest.mark.parametrize("kind", [Nested, NestedBound], ids=["torch.export", "symbolic_trace"])
def test_nested_inputs_go_by_their_names(kind: type[Nested]) -> None:
    torch.manual_seed(0)
    model, p, q = kind().eval(), torch.randn(2, 4), torch.randn(2, 4)
    network = fxpath.trace(model, ({"p": p, "q": q},))
    for given in ({"p": p, "q": q}, {"q": q, "p": p}, OrderedDict(q=q, p=p)):
        assert torch.equal(network((given,)), model(given))
    for wrong in ({"p": p, "r": q}, {"p": p}, [p, q], {"p": p, "q": [q]}):
        with pytest.raises(InputError, match=r"put together as in the example \(\[0\]\['p'\], \[0\]\['q'\]\), found"):
            network((wrong,))


def test_arrays_are_no_tensors() -> None:
    model, x = small(plain())
    network = fxpath.trace(model, x)
    with pytest.raises(InputError, match=r"inputs: expected tensors .*, found ndarray; put them into"):
        network((x.numpy(),))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
            return F.relu(self.fc(x)) * float(scale[0])

    network = fxpath.trace(Scaled().double().eval(), (x, np.ones(2)))
    assert network((x, np.ones(2))).shape == (3, 6)
    with pytest.raises(InputError, match=r"expected the arguments that are no tensors to be \[array"):
        network((x, np.zeros(2)))


# --- names and parametrisations --------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Heads whose names are keywords of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"class": nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True)), "is": nn.ReLU6()})
        self.last = nn.ModuleDict({"def": nn.Linear(6, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.last["def"](self.heads["is"](self.heads["class"](x)))


def test_names_that_are_keywords(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Heads().double().eval(), rows(3)
    network = fxpath.trace(model, x)
    assert [site.name for site in network.sites] == ["heads.class.1", "heads.is"]
    assert torch.equal(network(x), model(x))
    chosen = fxpath.trace(model, x, sites="heads.is", response=neuron("last.def", (1,)))
    assert torch.equal(chosen.respond(x), model(x)[:, 1])
    module = network.export(fxpath.NeuronMCT().scores(network, x).pathways(0.5), at=x)
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), model(x))
    model.last["def"].weight.data.zero_()  # the model's own tensors are read
    assert torch.equal(network(x), model(x))


class Own(nn.Module):
    """A block with weights and activations of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.free = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x @ self.free))))


def test_a_parametrised_block_is_looked_into() -> None:
    torch.manual_seed(0)
    block = Own()
    parametrizations.orthogonal(block, "free")
    parametrizations.weight_norm(block.one)
    model, x = nn.Sequential(block, nn.Linear(4, 2)).double().eval(), rows(3)
    network = fxpath.trace(model, x)
    assert [site.name for site in network.sites] == ["0.relu", "0.relu_1"]
    assert torch.equal(network(x), model(x))
    with torch.no_grad():
        block.parametrizations.free.original.mul_(torch.randn(4, 4))  # type: ignore[operator]
    assert torch.equal(network(x), model(x))
