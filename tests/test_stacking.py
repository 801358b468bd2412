"""Runs behind one site: copies of the batch stacked along its first axis answer as each does alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import BY_NAME, CASES, Case, Head, image, rows, tokens, traced
from torch import Tensor, nn

import fxpath
from fxpath.errors import NoContributionWarning, TraceWarning
from fxpath.gates import Restriction
from fxpath.network import Network
from fxpath.responses import Logit, Response, detection, pixel, region, respond, token
from fxpath.samples import Samples
from fxpath.selectors import NeuronIntGrad, Random
from fxpath.stacking import SiteRuns

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def resolved(network: Network, x: Any, target: Any = None) -> tuple[Samples, Tensor | None]:
    samples = network.samples(x, target)
    with torch.no_grad():
        return samples, network._resolve(network(samples), samples)


def runs_of(network: Network, number: int, x: Any, copies: int, *, narrow: bool = False) -> SiteRuns:
    """Runs of all logits, or, where `narrow`, of the wanted ones alone."""
    logits = network.response.logits(network(x)) if narrow else None
    return SiteRuns(network, number, *resolved(network, x), copies, None if logits is None else logits.shape[1])


def alone(network: Network, number: int, x: Any) -> Callable[[Tensor], Tensor]:
    """Φ of one value of the site, by the suffix itself."""
    samples, target = resolved(network, x)
    suffix = network.suffix(number)
    _, boundary = suffix.cache(samples)
    return lambda value: respond(network.response, suffix(value, boundary), target, samples.batch)


def naive_slopes(network: Network, number: int, x: Any, alphas: Tensor, weights: Tensor) -> Tensor:
    phi, (a, _) = alone(network, number, x), network.suffix(number).cache(x)
    total = torch.zeros_like(a)
    for alpha, weight in zip(alphas.tolist(), weights.tolist(), strict=True):
        leaf = (alpha * a).requires_grad_()
        value = phi(leaf)
        slope = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
        total += 0 if slope is None else weight * slope
    return total


def agrees(network: Network, x: Any, *, copies: int, narrow: bool = False) -> list[SiteRuns]:
    """Check responses to values of all kinds, and slopes, at every site."""
    generator = torch.Generator().manual_seed(3)
    tolerance: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}
    alphas, weights = torch.tensor([0.1, 0.35, 0.6, 0.9, 1.0]).double(), torch.tensor([0.3, 0.1, -0.2, 0.5, 1]).double()
    found = []
    for number in range(len(network.sites)):
        runs, phi = runs_of(network, number, x, copies, narrow=narrow), alone(network, number, x)
        a = runs.activation
        others = [torch.randn(a.shape, dtype=a.dtype, generator=generator).relu() for _ in range(5)]
        given = [a, 0 * a, 0.4 * a, *others]
        with torch.no_grad():
            expected = torch.stack([phi(value) for value in given])
        torch.testing.assert_close(runs.responses(torch.cat(given)), expected, **tolerance)
        torch.testing.assert_close(runs.responses(a)[0], expected[0], **tolerance)
        slopes = naive_slopes(network, number, x, alphas, weights)
        torch.testing.assert_close(runs.slopes(alphas, weights), slopes, **tolerance)
        found.append(runs)
    return found


def depends(runs: SiteRuns) -> bool:
    """Whether the response depends on a factor of the site's value: else a trial of stacking tells nothing."""
    whole, half = runs.responses(runs.activation), runs.responses(runs.activation / 2)
    return not torch.allclose(whole, half, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("narrow", [False, True], ids=["all logits", "wanted logits"])
@pytest.mark.parametrize("copies", [1, 3, 16])
@every
def test_stacked_runs_are_single_runs(case: Case, copies: int, narrow: bool) -> None:
    network, x = traced(case.name), case.x(3, seed=4)
    for runs in agrees(network, x, copies=copies, narrow=narrow):
        assert runs.copies == copies or not depends(runs)  # nothing in these keeps copies apart
        assert not runs.activation.requires_grad


def test_slopes_tell_how_far_they_are() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(2)
    for copies in (1, 3, 16):
        told: list[int] = []
        runs_of(network, 0, x, copies).slopes(torch.rand(10) + 0.1, torch.ones(10), told.append)
        assert sum(told) == 10
        assert max(told) <= copies
        assert len(told) == -(-10 // copies)


@pytest.mark.parametrize("kind", ["masked", "frozen", "gated"])
@pytest.mark.parametrize("name", ["Concat", "ResidualIadd", "BatchFolded", "SizeReshape", "Norms", "SqueezeExcitation"])
def test_under_a_restriction(name: str, kind: str) -> None:
    """Of each sample, or one for all; what changes one restriction does not stay for the next."""
    network, x = traced(name), BY_NAME[name].x(3, seed=4)
    for batch in (3, 1):
        for seed in (0, 1):
            pathways = Random(seed=seed).select(network, Samples(torch.zeros(batch, 1)), (0.4,))[0.4]
            scale = [torch.rand(batch, *site.gate_shape, dtype=torch.float64) for site in network.sites]
            context = {
                "masked": lambda pathways=pathways: network.masked(pathways),
                "frozen": lambda pathways=pathways: network.frozen(pathways, at=x),
                "gated": lambda scale=scale: network.restricted(Restriction(scale, [None] * len(scale))),
            }[kind]
            with context():
                agrees(network, x, copies=4)
    agrees(network, x, copies=4)


# --- what the first axis is not ready for ---------------------------------------------------------------------------


class Mixed(Head):
    """Each sample stands against the mean of the batch."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.softplus(h - h.mean(0, keepdim=True) / 2))


class SizeBefore(Head):
    """The batch size is read before the site and used behind it."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv, self.fc2 = nn.Conv2d(2, 3, 3), nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        h = F.relu(self.conv(x))
        return self.fc2(F.relu(h.reshape(batch, -1) - 0.1))


class NumberedRows(Head):
    """The rows are picked by their numbers, which are made before the site."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(x.shape[0])
        return self.head(torch.tanh(F.relu(self.conv(x))[numbers]))


class SkipOnAnotherAxis(nn.Module):
    """What bypasses the site has the batch on its second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.sin(x).transpose(0, 1)
        return torch.tanh(self.fc2(F.relu(self.fc1(x)))) * skip.transpose(0, 1)


class TableBeside(nn.Module):
    """A table that no input changes, as long as one batch: it is the same for every copy."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.table = nn.Linear(4, 5), nn.Linear(5, 4), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        table = (self.table * 2).sum(0, keepdim=True)
        return self.fc2(torch.tanh(F.relu(self.fc1(x)) @ (self.table * 2).t() @ self.table + table))


class Folded(nn.Module):
    """Tokens are rows of the batch at the sites, and are read beside what bypasses them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        h = self.fc2(F.relu(self.fc1(flat))) + flat
        return self.fc3(F.relu(h).reshape(x.shape[0], -1))


AWKWARD: dict[type[nn.Module], Callable[[int], Tensor]] = {
    Mixed: image, SizeBefore: image, NumberedRows: image, SkipOnAnotherAxis: rows(4), TableBeside: rows(4),
    Folded: tokens,
}  # fmt: skip


def awkward(kind: type[nn.Module]) -> tuple[Network, Tensor]:
    torch.manual_seed(2)
    model = kind().double().eval()
    with pytest.warns(TraceWarning, match="the others of its batch") if kind is Mixed else contextlib.nullcontext():
        return fxpath.trace(model, AWKWARD[kind](3)), AWKWARD[kind](3)


@pytest.mark.parametrize("narrow", [False, True], ids=["all logits", "wanted logits"])
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_first_axes(kind: type[nn.Module], narrow: bool) -> None:
    network, x = awkward(kind)
    for copies in (1, 2, 7):
        for runs in agrees(network, x, copies=copies, narrow=narrow):
            assert runs.copies == (1 if kind is Mixed else copies)
    agrees(network, x[:1], copies=5, narrow=narrow)


def test_samples_that_see_each_other_are_not_stacked() -> None:
    """If they were, this is how far off the answers would be."""
    network, x = awkward(Mixed)
    runs = runs_of(network, 0, x, 2)
    assert runs.copies == 1
    phi = alone(network, 0, x)
    one = phi(runs.activation).detach()
    suffix = network.suffix(0)
    _, boundary = suffix.cache(x)
    with torch.no_grad():
        both = suffix(torch.cat([runs.activation, 0 * runs.activation]), boundary)
    target = network.original(x).target
    stacked = both[:3].gather(1, target.unsqueeze(1)).squeeze(1)
    assert float((stacked - one).abs().max()) > 1e-3
    assert torch.equal(runs.responses(torch.cat([runs.activation, 0 * runs.activation]))[0], one)


def test_a_dead_batch_says_nothing_of_the_next() -> None:
    """Copies of a site that is all 0 are equal: whether they may be stacked is seen where it is not."""
    network, x = awkward(Mixed)
    bias = network.tensors["conv1.bias"]
    with torch.no_grad():
        bias -= 100
        assert not bool(network.activations(x)[0].any())
        runs_of(network, 0, x, 4).responses(torch.cat([runs_of(network, 0, x, 4).activation] * 2))
        bias += 100
    agrees(network, x, copies=4)


# --- what a run needs -----------------------------------------------------------------------------------------------


def test_bytes_of_a_copy() -> None:
    """By hand: behind the first ReLU a linear layer keeps the site's value, each ReLU its result."""
    model = nn.Sequential(
        nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 300), nn.ReLU(), nn.Linear(300, 7), nn.ReLU(), nn.Linear(7, 3)
    ).double()
    network = fxpath.trace(model.eval(), torch.randn(2, 6, dtype=torch.float64))
    for batch in (1, 4):
        needed = [runs_of(network, number, torch.randn(batch, 6).double(), 3).bytes_of_a_copy() for number in range(3)]
        # where weights need gradients, a linear layer keeps its input too: that is the ReLU's result
        counts = [50 + 300 + 7, 300 + 7, 7]
        for found, count in zip(needed, counts, strict=True):
            assert count * batch * 8 <= found <= 2 * count * batch * 8 + 64 * batch
    assert torch.is_grad_enabled()


def test_bytes_do_not_count_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4000), nn.Linear(4000, 3)).eval()
    network = fxpath.trace(model, torch.randn(2, 4))
    assert runs_of(network, 0, torch.randn(1, 4), 1).bytes_of_a_copy() < 40_000  # the weights are 180 KB


def test_whether_a_site_leads_to_the_output() -> None:
    network, x = traced("Unused"), BY_NAME["Unused"].x(2)
    runs = [runs_of(network, number, x, 4) for number in range(3)]
    assert [each.leads for each in runs] == [False, False, True]
    response = network.respond(x).detach()
    for each in runs[:2]:
        assert torch.equal(each.responses(torch.cat([each.activation + 1] * 3)), response.expand(3, 2))
        assert not bool(each.slopes(torch.tensor([0.5]), torch.tensor([1.0])).any())


def test_stacks_are_not_made_of_one_batch_for_another() -> None:
    """Runs of different batch sizes, targets and copies on one network, in turn."""
    network, case = traced("Concat"), BY_NAME["Concat"]
    for batch, copies, target in ((3, 4, None), (1, 4, 2), (2, 1, [0, 3]), (3, 2, 1), (1, 1, None)):
        x = case.x(batch, seed=batch)
        samples, wanted = resolved(network, x, target)
        runs = SiteRuns(network, 0, samples, wanted, copies)
        given = [runs.activation * factor for factor in np.linspace(0, 1.5, 5)]
        for value, found in zip(given, runs.responses(torch.cat(given)), strict=True):
            suffix = network.suffix(0)
            with torch.no_grad():
                output = suffix(value, suffix.cache(x)[1])
            assert wanted is not None
            torch.testing.assert_close(found, output[range(batch), wanted], rtol=1e-12, atol=1e-14)


def test_other_dtypes() -> None:
    for kind, digits in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        case = BY_NAME["Concat"]
        network = fxpath.trace(case.model().to(kind), case.x(3).to(kind))
        runs = runs_of(network, 0, case.x(3).to(kind), 4)
        exact = runs_of(traced("Concat"), 0, case.x(3), 4)
        alphas, weights = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
        found, expected = runs.slopes(alphas, weights), exact.slopes(alphas, weights)
        assert float((found - expected).abs().max()) < digits * float(expected.abs().max())
        assert runs.responses(runs.activation).dtype == kind


# --- layouts, neighbours, memory ------------------------------------------------------------------------------------


class Viewed(nn.Module):
    """LeNet's way to flatten, which a tensor laid out channels last does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, 3), nn.Linear(45, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.two(F.relu(self.one(x))))
        return self.fc(h.view(x.size(0), -1))


def test_views_that_need_the_usual_layout() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 7, 7, dtype=torch.float64)
    agrees(fxpath.trace(Viewed().double().eval(), x), x, copies=4)


class Faint(nn.Module):
    """A large bias, beside which what differs between samples is small."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
        with torch.no_grad():
            self.body[4].bias += 300

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("model", [Faint, lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))])
def test_neighbours_and_what_ran_before_change_no_bit(model: Any) -> None:
    """float32: how runs are stacked is no sample's affair."""
    torch.manual_seed(0)
    model = model().eval()
    small, large = torch.randn(1, 32) / 100, torch.randn(1, 32) * 30
    selector = NeuronIntGrad(steps=9)

    def scores(*batches: Tensor) -> Tensor:
        network = fxpath.trace(model, torch.randn(2, 32))
        return [selector.scores(network, batch, target=1).signed for batch in batches][-1]

    both, mixed = torch.cat([small, small]), torch.cat([small, large])
    assert torch.equal(scores(both)[0], scores(mixed)[0])
    assert torch.equal(scores(both), scores(torch.cat([large, large]), both))


def test_the_order_of_a_large_batch_changes_no_bit() -> None:
    """24 rows and at most 16 at once: all run alike."""
    torch.manual_seed(0)
    model, x = Faint().eval(), torch.randn(24, 32)
    network = fxpath.trace(model, x[:2])
    selector = NeuronIntGrad(steps=5)
    turned = selector.scores(network, x.roll(8, 0), target=1).signed
    assert torch.equal(turned.roll(-8, 0), selector.scores(network, x, target=1).signed)


@pytest.mark.filterwarnings("ignore::fxpath.errors.SmoothSitesWarning")
def test_bytes_of_layers_of_one_size() -> None:
    """Memory that is freed and used again under the same address counts each time."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.GELU())]
    network = fxpath.trace(nn.Sequential(*blocks, nn.Linear(64, 3)).eval(), torch.randn(2, 64), sites="activations")
    x = torch.randn(50, 64)
    found = {runs_of(network, 0, x, 1).bytes_of_a_copy() for _ in range(3)}
    assert len(found) == 1
    assert found.pop() >= 11 * 50 * 64 * 4  # what each GELU keeps


def test_a_site_that_leads_to_another_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)
            self.used, self.aside = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.used(self.one(x))
            return {"y": self.two(h), "aside": self.aside(x)}

    x = torch.randn(2, 3)
    network = fxpath.trace(Two().eval(), x, response=Logit(output="y"))
    with pytest.warns(
        NoContributionWarning, match=r"1 sites do not lead to the response 'logit:output=y', and score 0: aside"
    ):
        scores = NeuronIntGrad(steps=3).scores(network, x)
    assert not bool(scores.site("aside").any())
    assert bool(scores.site("used").any())


class Looked(nn.Module):
    """Takes its first column for a row of a table: other inputs than it is made for raise."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.table(x[:, 0].long()) + x[:, 1:]))


def test_inputs_that_no_random_numbers_may_replace() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.tensor([[0.0], [1], [2]]), torch.randn(3, 4)], dim=1).double()
    agrees(fxpath.trace(Looked().double().eval(), x), x, copies=4)


class Square(nn.Module):
    """A last layer as wide as there are classes, and places: `(B, 5, 5)` both ways."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.one, self.last = nn.Linear(4, 8) if isinstance(last, nn.Linear) else nn.Conv1d(4, 8, 1), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.one(x)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("response", [pixel(2), region(1, 3), token(2), detection(0)], ids=lambda each: each.name)
@pytest.mark.parametrize("last", [nn.Linear(8, 5), nn.Conv1d(8, 5, 1)], ids=lambda each: type(each).__name__)
def test_a_last_layer_is_not_narrowed_along_places(last: nn.Module, response: Response, batch: int) -> None:
    """What follows the site is affine, and so NeuronIntGrad is NeuronMCT; narrowing another axis would show."""
    torch.manual_seed(1)
    x = torch.randn(batch, *((5, 4) if isinstance(last, nn.Linear) else (4, 5)), dtype=torch.float64)
    network = fxpath.trace(Square(last).double().eval(), x, response=response)
    for target in (None, 3):
        expected = fxpath.NeuronMCT().scores(network, x, target).signed
        found = NeuronIntGrad(steps=3).scores(network, x, target).signed
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
