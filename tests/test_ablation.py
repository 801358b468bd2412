"""Exact marginal contributions against a naive loop over gates, and the draw of neurons to ablate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import BY_NAME, CASES, Case, traced
from torch import Tensor, nn

import fxpath
from fxpath.ablation import marginal_contributions, sample_active
from fxpath.errors import FxpathError, InputError, SampleError, SiteError
from fxpath.gates import Restriction
from fxpath.network import Network
from fxpath.responses import probability
from fxpath.samples import Samples
from fxpath.selectors import Random

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def naive(network: Network, x: Any, numbers: Tensor, target: Any = None) -> Tensor:
    """Φ with all gates open − Φ with one gate closed, whole networks, `(B, n)`."""
    if target is None:
        target = network.original(x).target
    whole = network.respond(x, target).detach()
    batch = whole.shape[0]
    columns = []
    for column in torch.as_tensor(numbers).expand(batch, -1).T:
        gates = torch.ones(batch, network.index.size, dtype=torch.float64)
        gates[range(batch), column] = 0
        scale = [gates[:, site.slice].reshape(-1, *site.gate_shape) for site in network.sites]
        with network.restricted(Restriction(scale, [None] * len(scale))), torch.no_grad():
            columns.append(whole - network.respond(x, target))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@every
def test_against_closed_gates(case: Case, granularity: str) -> None:
    network, x = traced(case.name, granularity), case.x(3, seed=7)
    numbers = torch.from_numpy(np.random.default_rng(0).permutation(network.index.size)[:23].copy())
    expected = naive(network, x, numbers)
    found = marginal_contributions(network, x, numbers, progress=False)
    assert found.shape == (3, len(numbers))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert bool((found != 0).any())
    for most in (1, 2, 7):
        again = marginal_contributions(network, x, numbers, max_batch=most, progress=False)
        torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-13)


def test_neurons_of_each_sample() -> None:
    """Different neurons, at different sites, in any order, one more than once."""
    for name, granularity in (("Concat", "unit"), ("BatchFolded", "unit"), ("Norms", "channel"), ("Leaky", "unit")):
        network, x = traced(name, granularity), BY_NAME[name].x(3, seed=7)
        numbers = torch.randint(network.index.size, (3, 17), generator=torch.Generator().manual_seed(1))
        numbers[1, 3] = numbers[1, 9]
        expected = naive(network, x, numbers)
        for most in (1, 2, 16, 100):
            found = marginal_contributions(network, x, numbers, max_batch=most, progress=False)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(found[1, 3], found[1, 9], rtol=1e-12, atol=1e-15)
        for form in (numbers.int(), numbers.numpy(), numbers.tolist()):
            torch.testing.assert_close(marginal_contributions(network, x, form), found, rtol=1e-9, atol=1e-14)


def test_a_whole_site() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(2)
    site = network.index.site("relu_1")
    found = marginal_contributions(network, x, "relu_1")
    assert found.shape == (2, site.neurons)
    torch.testing.assert_close(found, naive(network, x, torch.arange(site.start, site.start + site.neurons)))
    assert torch.equal(marginal_contributions(network, x, site), found)
    channels = traced("Concat", "channel")
    assert marginal_contributions(channels, x, "relu_1").shape == (2, 2)


def test_by_hand() -> None:
    """Neurons a₁, a₂ and relu(a₁ + a₂ − 1) = a₃; the logits are 2·a₃ and 100 − 5·a₃."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        model[2].weight.fill_(1)
        model[2].bias.fill_(-1)
        model[4].weight.copy_(torch.tensor([[2.0], [-5]]))
        model[4].bias.copy_(torch.tensor([0.0, 100]))
    x = torch.tensor([[2.0, 3], [0.5, 0.75], [-1, 0.5]], dtype=torch.float64)
    network = fxpath.trace(model, x)
    assert marginal_contributions(network, x, [0, 1, 2], 0).tolist() == [[4, 6, 8], [0.5, 0.5, 0.5], [0, 0, 0]]
    assert marginal_contributions(network, x, [2, 0], [1, 0, 1]).tolist() == [[-20, -10], [0.5, 0.5], [0, 0]]
    assert marginal_contributions(network, x, [0]).tolist() == [[-10], [-1.25], [0]]  # class 1 is predicted


def test_targets_and_responses() -> None:
    case = BY_NAME["SqueezeExcitation"]
    x, numbers = case.x(3), torch.arange(0, 60, 7)
    for response in ("logit", probability, "margin", lambda output: output[:, 1] ** 2 + output[:, 0]):
        network = case.trace(response=response)
        targets = [None] if callable(response) and response is not probability else [None, 0, [3, 0, 1]]
        for target in targets:
            resolved = network.original(x, target).target
            found = marginal_contributions(network, x, numbers, target, progress=False)
            torch.testing.assert_close(found, naive_of(network, x, numbers, resolved), rtol=1e-9, atol=1e-13)
            assert torch.equal(found, marginal_contributions(network, Samples(x, target), numbers))


def naive_of(network: Network, x: Any, numbers: Tensor, target: Any) -> Tensor:
    whole = network.respond(x, target).detach()
    columns = []
    for number in numbers.tolist():
        mask = torch.ones(1, network.index.size, dtype=torch.bool)
        mask[0, number] = False
        with network.masked(fxpath.Pathways(mask, network.index)), torch.no_grad():
            columns.append(whole - network.respond(x, target))
    return torch.stack(columns, 1)


def test_within_a_restriction() -> None:
    """What is ablated is a neuron of the masked network."""
    network, x = traced("Plain"), BY_NAME["Plain"].x(3)
    pathways = Random(seed=1).select(network, x, (0.3,))[0.3]
    target = network.original(x).target
    numbers = torch.arange(0, network.index.size, 5)
    expected = []
    with network.masked(pathways), torch.no_grad():
        found = marginal_contributions(network, x, numbers, progress=False)
        whole = network.respond(x)
    for number in numbers.tolist():
        mask = pathways.mask.clone()
        mask[:, number] = False
        with network.masked(fxpath.Pathways(mask, network.index)), torch.no_grad():
            expected.append(whole - network.respond(x, target))
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-9, atol=1e-13)


def test_a_site_that_leads_nowhere() -> None:
    network, x = traced("Unused"), BY_NAME["Unused"].x(2)
    first, second, last = network.sites
    found = marginal_contributions(network, x, [first.start, last.start, second.start, last.start + 4])
    assert not bool(found[:, [0, 2]].any())
    torch.testing.assert_close(found, naive(network, x, torch.tensor([0, last.start, second.start, last.start + 4])))
    assert not bool(marginal_contributions(network, x, first).any())
    assert marginal_contributions(network, x, first).shape == (2, first.neurons)


def test_no_neurons() -> None:
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    for none in ([], torch.zeros(0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        assert marginal_contributions(network, x, none).shape == (2, 0)


@pytest.mark.parametrize(
    ("neurons", "error", "message"),
    [
        ([0, 102], InputError, r"expected neurons 0 … 101, found 102"),
        ([-1], InputError, r"expected neurons 0 … 101, found -1"),
        ([[[0]]], InputError, r"expected neurons \(n,\) or \(2, n\), found \(1, 1, 1\)"),
        ([[0], [1], [2]], InputError, r"expected neurons \(n,\) or \(2, n\), found \(3, 1\)"),
        (3, InputError, r"expected neurons \(n,\) or \(2, n\), found \(\)"),
        ([0.5], InputError, r"expected whole numbers of neurons, found float64"),
        ("relu3", SiteError, r"relu3.*relu1"),
    ],
)
def test_bad_neurons(neurons: Any, error: type[FxpathError], message: str) -> None:
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    assert network.index.size == 102
    with pytest.raises(error, match=message):
        marginal_contributions(network, x, neurons)


def test_bad_input() -> None:
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    for wrong in (0, -1, 2.0, True, "4"):
        with pytest.raises(InputError, match="expected max_batch of at least 1, found"):
            marginal_contributions(network, x, [0], max_batch=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected inputs"):
        marginal_contributions(network, x[:, :1], [0])
    with pytest.raises(InputError, match="class in 0 … 3, found 4"):
        marginal_contributions(network, x, [0], 4)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(SampleError, match="NaN or infinite"):
        marginal_contributions(network, x, [0])


def test_a_network_that_overflows() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    x = torch.rand(3, 4, dtype=torch.float64)
    network = fxpath.trace(module, x)
    with torch.no_grad():
        module[2].weight[:] = torch.finfo(torch.float64).max
    x[1] = 1e10
    with pytest.raises(
        SampleError, match="response: it is NaN or infinite for sample 1; the network overflows"
    ) as seen:
        marginal_contributions(network, x, [0])
    assert seen.value.positions == (1,)
    with pytest.raises(SampleError, match="for sample 1") as seen:
        marginal_contributions(network, x, [0], max_batch=1)
    assert seen.value.positions == (1,)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_in_any_mode(context: Any) -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(2)
    expected = marginal_contributions(network, x, "relu")
    with context():
        found = marginal_contributions(network, x.clone(), "relu")
    assert torch.equal(found, expected)
    assert not found.requires_grad


# --- drawing --------------------------------------------------------------------------------------------------------


def active_of(network: Network, x: Any) -> Tensor:
    return network.original(x).active


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@pytest.mark.parametrize("name", ["Concat", "BatchFolded", "Norms", "Methods", "Unused"])
def test_active_neurons_are_drawn(name: str, granularity: str) -> None:
    network, x = traced(name, granularity), BY_NAME[name].x(4, seed=2)
    active = active_of(network, x)
    for per_site in (1, 3, 16):
        drawn = sample_active(network, active, ["a", "b", 7, "d"], per_site, seed=0)
        assert drawn.shape == (4, len(network.sites) * per_site)
        for row in range(4):
            for site, numbers in zip(network.sites, drawn[row].split(per_site), strict=True):
                alive = int(active[row, site.slice].sum())
                assert all(site.start <= number < site.start + site.neurons for number in numbers.tolist())
                if alive:
                    assert bool(active[row, numbers].all())
                else:
                    assert numbers.tolist() == [site.start] * per_site
                if alive >= per_site:
                    assert len(set(numbers.tolist())) == per_site


def test_draws_depend_on_seed_and_id_alone() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(4)
    active, names = active_of(network, x), ["p", "q", "r", 3]
    whole = sample_active(network, active, names, 5, seed=1)
    assert torch.equal(sample_active(network, active, names, 5, seed=1), whole)
    turned = sample_active(network, active.flip(0), names[::-1], 5, seed=1)
    assert torch.equal(turned.flip(0), whole)
    for row, name in enumerate(names):
        assert torch.equal(sample_active(network, active[[row]], [name], 5, seed=1), whole[[row]])
    assert not torch.equal(sample_active(network, active, names, 5, seed=2), whole)
    same = sample_active(network, active[[0, 0]], ["p", "q"], 5, seed=1)
    assert not torch.equal(same[0], same[1])


def test_draws_move_no_global_stream() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(2)
    active = active_of(network, x)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    sample_active(network, active, [0, 1], 3, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_draws_are_uniform() -> None:
    """Each of a site's active neurons is drawn as often as the others, within six standard deviations."""
    network, x = traced("Plain"), BY_NAME["Plain"].x(1)
    active = active_of(network, x)
    site = network.sites[1]
    alive = torch.nonzero(active[0, site.slice]).flatten() + site.start
    draws = 1500
    drawn = sample_active(network, active.expand(draws, -1), list(range(draws)), 2, seed=0)[:, 2:]
    shares = torch.bincount(drawn.flatten(), minlength=network.index.size)[alive].double() / draws
    expected = 2 / len(alive)
    assert len(alive) > 4
    assert float((shares - expected).abs().max()) < 6 * (expected / draws) ** 0.5


def test_a_response_of_another_type_than_the_sites() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
    wide = fxpath.trace(model, x, response=lambda output: output.double()[:, 0])
    found = marginal_contributions(wide, x, [0, 3])
    assert found.dtype == torch.float64
    expected = marginal_contributions(fxpath.trace(model, x), x, [0, 3], target=0)
    torch.testing.assert_close(found.float(), expected)
