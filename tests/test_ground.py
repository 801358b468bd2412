"""Memory formats of descents: rows in memory order, and that what is selected answers in the format of the input."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch
from networks import BY_NAME, traced
from test_pruning import naive
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fxpath
from fxpath.answers import Pass
from fxpath.network import Network
from fxpath.neurons import NeuronIndex
from fxpath.samples import Samples
from fxpath.selectors import GreedyPruning, pruning
from fxpath.selectors import ground as ground_room
from fxpath.selectors.ground import Ground, MemoryOrder
from fxpath.selectors.pruning import Descent

LAST = torch.channels_last


def index_of(*shapes: tuple[int, ...], fold: int = 1) -> NeuronIndex:
    """An index of sites of these shapes; `fold` rows of the first one's tensor are one sample."""
    folds = [fold] + [1] * (len(shapes) - 1)
    return NeuronIndex.build([(f"s{n}", "relu", shape) for n, shape in enumerate(shapes)], folds=folds)


# --- rows in memory order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", list(itertools.permutations(range(1, 4))))
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 2)])
def test_rows_lie_as_their_values_do(axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """For every way in which three axes can lie in memory: nothing is copied, and every place is told its number."""
    index = index_of(shape, (7,))
    sizes = [2, *shape]
    lying = torch.randn([2, *(sizes[axis] for axis in axes)])
    value = lying.permute(0, *(1 + axes.index(axis) for axis in range(1, 4)))
    other = torch.randn(2, 7)
    order = MemoryOrder(index, [value, other])
    rows = order.rows([value, other])
    assert rows[0].data_ptr() == value.data_ptr()
    numbered = torch.cat([value.reshape(2, -1), other], dim=1)  # in the order of the index
    together = torch.cat(rows, dim=1)
    assert torch.equal(numbered[:, order.numbers], together)
    np.testing.assert_array_equal(order.by_number(together[1].numpy()), numbered[1].numpy())
    assert not order.plain or order.numbers.tolist() == list(range(index.size))
    gates = order.sites(together)
    assert torch.equal(gates[0], value)
    assert torch.equal(gates[1], other)
    assert gates[0].stride()[1:] == tuple(
        stride if size > 1 else gates[0].stride(axis + 1)
        for axis, (stride, size) in enumerate(zip(value.stride()[1:], shape, strict=True))
    )
    gates[0][1, 0, 0, -1] = 100
    assert (together == 100).sum() == 1


def test_rows_of_sites_whose_samples_take_several_rows() -> None:
    index = index_of((3, 2, 4, 5), fold=3)
    value = torch.randn(2 * 3, 2, 4, 5).contiguous(memory_format=LAST)
    order = MemoryOrder(index, [value])
    (row,) = order.rows([value])
    assert row.shape == (2, 120)
    assert row.data_ptr() == value.data_ptr()
    plain = value.reshape(2, -1)
    assert torch.equal(plain[:, order.numbers], row)
    assert torch.equal(order.sites(row)[0], value.reshape(2, 3, 2, 4, 5))


def test_what_lies_otherwise_than_expected_is_copied() -> None:
    index = index_of((3, 4, 5))
    value = torch.randn(2, 3, 4, 5)
    order = MemoryOrder(index, [value.contiguous(memory_format=LAST)])
    assert torch.equal(order.rows([value])[0], value.reshape(2, -1)[:, order.numbers])
    assert not order.plain
    assert MemoryOrder(index, [value]).plain


# --- the ground -----------------------------------------------------------------------------------------------------


def test_only_what_lies_otherwise_has_moved() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(2)
    ground = Ground.of(network, network.samples(x))
    assert ground.moved
    assert ground.samples.tensors[0].is_contiguous(memory_format=LAST)
    already = x.contiguous(memory_format=LAST)
    ground = Ground.of(network, network.samples(already))
    assert not ground.moved
    assert ground.samples.tensors[0].is_contiguous(memory_format=LAST)
    flat, y = traced("MLP"), BY_NAME["MLP"].x(2)
    assert not Ground.of(flat, flat.samples(y)).moved


class Picky(nn.Module):
    """A leaf that takes images only as they usually lie."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous():
            raise ValueError("planes first, please")
        return x + 1


class Unviewable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope.view(slope.shape[0], -1).view(slope.shape) * 2


class PickyBackward(nn.Module):
    """A leaf whose backward pass does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(Unviewable.apply(x))


class Ordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.plain = x.is_contiguous()
        return x * 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * 2 if ctx.plain else slope


class WrongBackward(nn.Module):
    """A leaf whose backward pass is right only so, and does not say it."""

    def forward(self, x: Tensor) -> Tensor:
        return Ordered.apply(x)  # type: ignore[no-any-return]


class AsItLies(nn.Module):
    """Neurons numbered as they lie in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.as_strided((x.shape[0], 75), (75, 1)))


class Around(nn.Module):
    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.conv, self.leaf = nn.Conv2d(2, 3, 3), leaf

    def forward(self, x: Tensor) -> Tensor:
        y = self.leaf(torch.relu(self.conv(x))).flatten(1)
        return torch.stack([y.sum(1), y.square().sum(1)], dim=1)


@pytest.mark.filterwarnings("ignore::fxpath.errors.SmoothSitesWarning")
@pytest.mark.parametrize("leaf", [Picky, PickyBackward, WrongBackward, AsItLies], ids=lambda leaf: leaf.__name__)
def test_where_another_format_fails_or_says_otherwise_it_is_not_used(leaf: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 7, 7, dtype=torch.float64)
    sites = ["rectifiers", leaf] if leaf is AsItLies else "rectifiers"
    network = fxpath.trace(Around(leaf()).double().eval(), x[:2], leaves=[leaf], sites=sites)  # type: ignore[arg-type]
    assert not Ground.of(network, network.samples(x)).moved
    selection = GreedyPruning(share=0.1).select(network, x, (0.5,))
    for row in range(3):
        expected = naive(network, Samples(x).take([row]), "0.1", (0.5,))
        assert torch.equal(selection.pathways[0.5].mask[row], expected.masks[0.5])


def test_coarse_types_stay_as_they_are() -> None:
    model, x = BY_NAME["Concat"].model(), BY_NAME["Concat"].x(2)
    for kind, moved in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False)):
        network = fxpath.trace(model.to(kind), x.to(kind))
        assert Ground.of(network, network.samples(x.to(kind))).moved == moved


def test_it_is_tried_once_and_no_sample_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = whole()
    tried = []

    def noted(network: Network, samples: Samples) -> bool:
        tried.append(samples.batch)
        return alike(network, samples)

    alike = ground_room._answers_alike
    monkeypatch.setattr(ground_room, "_answers_alike", noted)
    for given in (x, x * 1e30, x[:2], torch.zeros_like(x)):
        assert Ground.of(network, network.samples(given)).moved
    assert tried == [2]
    network._module.get_submodule("one").register_forward_hook(lambda _module, _given, found: found.contiguous())
    Ground.of(network, network.samples(x))
    assert tried == [2, 2]


def test_memory_that_runs_out_in_a_trial_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = whole()

    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Network, "gradients", failing)
    with pytest.raises(torch.OutOfMemoryError):
        Ground.of(network, network.samples(x))
    assert network._formats == {}


# --- equal scores, and what stays in memory -------------------------------------------------------------------------


class Whole(nn.Module):
    """Small whole numbers: exact in every memory format, and many neurons have equal scores."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.one, self.two, self.out = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3), nn.Linear(27, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))).flatten(1))


def whole() -> tuple[Network, Tensor]:
    x = torch.randint(0, 3, (3, 2, 7, 7), generator=torch.Generator().manual_seed(1)).float()
    return fxpath.trace(Whole().eval(), x[:2]), x


def test_of_equal_scores_the_larger_number_goes_first_in_any_format() -> None:
    network, x = whole()
    assert network.index.size == 127
    target = network.original(x).target
    for given, share in itertools.product((x, x.contiguous(memory_format=LAST)), (0.02, 0.05, 0.11)):
        mask = torch.ones(3, 127, dtype=torch.bool)
        descent, ties = Descent(network, given, (0.99,), share), 0
        assert descent.order is not None
        assert not descent.order.plain
        for _ in descent:
            with network.masked(fxpath.Pathways(mask, network.index)):
                scores = network.signed_products(x, target)[0].abs()
            for row, own in enumerate(scores.tolist()):
                order = sorted((score, -number) for number, score in enumerate(own) if score)
                gone = [-number for _, number in order[: descent.count[row]]]
                still = row in descent.running
                if still:
                    mask[row, gone] = False
                ties += still and len(order) > len(gone) and order[len(gone) - 1][0] == order[len(gone)][0]
            assert torch.equal(descent.mask, mask)
        assert ties > 3


@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_a_state_s_activations_are_gone_when_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, granularity: Literal["unit", "channel"]
) -> None:
    _, x = whole()
    network = fxpath.trace(Whole().eval(), x[:2], granularity=granularity)
    GreedyPruning(share=0.1).select(network, x, (0.9,))  # the trial
    plain, before, alive = Network.gradients, [], []

    def gradients(self: Network, *given: Any) -> Pass:
        alive.append(sum(not each.expired() for each in before))
        run = plain(self, *given)
        before[:] = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*run.activations, *run.gradients)]
        return run

    monkeypatch.setattr(Network, "gradients", gradients)
    GreedyPruning(share=0.1).select(network, x, (0.9,))
    assert len(alive) > 3
    assert set(alive) == {0}


def test_in_any_format_the_same_is_selected() -> None:
    network, x = whole()
    levels = (0.3, 0.6, 0.8, 0.9)
    one = GreedyPruning(share=0.03).select(network, x, levels)
    other = GreedyPruning(share=0.03).select(network, x.contiguous(memory_format=LAST), levels)
    assert one.missing == other.missing
    for level in one:
        assert torch.equal(one.pathways[level].mask, other.pathways[level].mask)
        assert one.pathways[level].mask.any()
        for name, values in one.by_sparsity[level].items():
            torch.testing.assert_close(values, other.by_sparsity[level][name], rtol=0, atol=0, equal_nan=True)
    for name, values in one.diagnostics.items():
        torch.testing.assert_close(values, other.diagnostics[name], rtol=0, atol=0, equal_nan=True)


# --- e in the format of the input -----------------------------------------------------------------------------------


class Edge(nn.Module):
    """Φ = Σ weightᵢ · relu(xᵢ)."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.out.weight.copy_(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [0] * 8]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(x))


def shifted(monkeypatch: pytest.MonkeyPatch, shift: Tensor) -> None:
    """Let descents run as if another memory format had other last bits."""

    def of(network: Network, samples: Samples) -> Ground:
        return Ground._seen(network, samples.map(lambda x: x + shift), moved=True)

    monkeypatch.setattr(pruning.Ground, "of", of)


def test_e_is_that_of_the_input_s_own_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third neuron is dead as the samples were given, and just on in the other format."""
    x = torch.tensor([[1.0, 1, 0, 1, 1, 1, 1, 1]])
    network = fxpath.trace(Edge().eval(), x)
    shifted(monkeypatch, torch.tensor([0.0, 0, 1e-6, 0, 0, 0, 0, 0]))
    selection = GreedyPruning(share=0.12).select(network, x, (0.0, 0.25, 0.5))
    masks = {level: selection.pathways[level].mask[0].int().tolist() for level in selection}
    # the first to go is the third, as 3e-6 is the lowest score: in the input's own format that changes nothing
    assert masks == {0.0: [1, 1, 0, 1, 1, 1, 1, 1], 0.25: [0, 1, 0, 1, 1, 1, 1, 1], 0.5: [0, 0, 0, 0, 1, 1, 1, 1]}
    assert [int(selection.by_sparsity[level]["iteration"]) for level in (0.0, 0.25, 0.5)] == [0, 2, 4]
    sizes = (selection.diagnostics["effective"][0, :5] * 8).tolist()
    assert sizes == [7, 7, 6, 5, 4]
    for level in selection:
        with network.masked(selection[level]):
            answer = network.respond(x)
        state = int(selection.by_sparsity[level]["iteration"])
        assert float(answer.detach()) == float(selection.diagnostics["responses"][0, state])


def test_a_state_that_is_taken_in_the_other_format_alone_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two neurons that are just on as the samples were given, and dead in the other format, are never removed."""
    x = torch.tensor([[1.0, 1e-6, 1e-6, 1, 1, 1, 1, 1]])
    network = fxpath.trace(Edge().eval(), x)
    shifted(monkeypatch, torch.tensor([0.0, -1e-5, -1e-5, 0, 0, 0, 0, 0]))
    selection = GreedyPruning(share=0.12).select(network, x, (0.25, 0.5, 0.75, 0.875))
    # there 6, 5, 4, 3, 2 … neurons are on, here two more
    assert [int(selection.by_sparsity[level]["iteration"]) for level in (0.25, 0.5, 0.75, 0.875)] == [2, 4, 6, -1]
    assert selection.pathways[0.5].mask[0].int().tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    assert selection.pathways[0.75].mask[0].int().tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert "no neuron with a non-zero score is left" in selection.reasons(0.875, 1)[0]
