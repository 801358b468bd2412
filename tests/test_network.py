"""`Network`: gradients against finite differences, the two restrictions, suffixes, outcomes, and misuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import BY_NAME, CASES, Case, image, rows, traced
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpath
from fxpath.answers import Original
from fxpath.errors import InputError, RestrictionError, SampleError, SiteError
from fxpath.gates import Restriction
from fxpath.network import Network
from fxpath.pathways import Pathways
from fxpath.responses import ClassResponse, Logit, Margin, OutputFunction, Probability
from fxpath.samples import Samples
from fxpath.selectors import Active, Random

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SMOOTH_ENOUGH = [case for case in CASES if case.name != "Break"]  # its derivative is not that of what it computes


def random_pathways(network: Network, batch: int, seed: int = 0, share: float = 0.5) -> Pathways:
    generator = torch.Generator().manual_seed(seed)
    return Pathways(torch.rand(batch, network.index.size, generator=generator) < share, network.index)


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(two), strict=True))


def target_of(network: Network, x: Any) -> Tensor | None:
    return network.original(x).target


def scaled(network: Network, x: Any, target: Tensor | None, rows_: Tensor) -> Tensor:
    """Φ of one sample with its gates at every row of `rows_` `(n, N)`."""
    many = network.samples(x).take([0] * len(rows_))
    gates = [rows_[:, site.slice].reshape(-1, *site.gate_shape) for site in network.sites]
    wanted = None if target is None else target[:1].expand(len(rows_))
    with network.restricted(Restriction(gates, [None] * len(gates))), torch.no_grad():
        return network.respond(many, wanted)


def finite_differences(network: Network, x: Any, target: Tensor | None, at: Tensor | None = None) -> Tensor:
    """dΦ/dλ of every gate, by central differences: at λ = 1 it is the contribution a · ∂Φ/∂a."""
    centre = torch.ones(network.index.size, dtype=torch.float64) if at is None else at
    step = 1e-6 * torch.eye(network.index.size, dtype=torch.float64)
    return (scaled(network, x, target, centre + step) - scaled(network, x, target, centre - step)) / 2e-6


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@pytest.mark.parametrize("case", SMOOTH_ENOUGH, ids=lambda case: case.name)
def test_contributions_are_finite_differences(case: Case, granularity: str) -> None:
    network, x = traced(case.name, granularity), case.x(2, seed=5)
    target = target_of(network, x)
    products, run = network.signed_products(x, target)
    expected = finite_differences(network, x, target)
    torch.testing.assert_close(products[0], expected, rtol=2e-6, atol=2e-8)
    assert bool((products != 0).any())
    if granularity == "unit":
        values = network.rows(run.activations)
        assert bool((products[values == 0] == 0).all())
        assert torch.equal(products, values * network.rows(run.gradients))


def test_a_break_passes_no_gradient() -> None:
    """Behind detach and rounding, a neuron's derivative is 0, and what follows the break has its own."""
    network, x = traced("Break"), BY_NAME["Break"].x(1)
    target = target_of(network, x)
    products, _ = network.signed_products(x, target)
    first, left, right = (products[0, site.slice] for site in network.sites)
    assert not bool(first.any())
    expected = finite_differences(network, x, target)
    for site, found in zip(network.sites[1:], (left, right), strict=True):
        assert bool(found.any())
        torch.testing.assert_close(found, expected[site.slice], rtol=1e-6, atol=1e-8)
    for parameter in network._module.parameters():
        parameter.requires_grad_(False)  # now the values after the break need no gradient of their own
    frozen_weights, _ = network.signed_products(x, target)
    for parameter in network._module.parameters():
        parameter.requires_grad_(True)
    assert torch.equal(frozen_weights, products)


@every
def test_one_pass_gives_output_response_activations_and_gradients(case: Case) -> None:
    network, x = traced(case.name), case.x(3)
    run = network.gradients(x)
    assert same(run.output, network(x))
    assert all(map(torch.equal, run.activations, network.activations(x)))
    assert run.response.shape == (3,)
    assert torch.equal(run.response, network.respond(x))
    for site, value, slope in zip(network.sites, run.activations, run.gradients, strict=True):
        assert value.shape == slope.shape
        assert value.numel() == 3 * site.units
        assert not value.requires_grad
        assert not slope.requires_grad
    assert not any(leaf.requires_grad for leaf in leaves(run.output))
    assert all(parameter.grad is None for parameter in network._module.parameters())


@every
def test_samples_do_not_mix(case: Case) -> None:
    """Each row of a batch is what the sample alone gives, to rounding."""
    network, x = traced(case.name), case.x(3)
    products, run = network.signed_products(x)
    for row in range(3):
        alone, single = network.signed_products(network.samples(x).take([row]))
        torch.testing.assert_close(products[row : row + 1], alone, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(run.response[row : row + 1], single.response, rtol=1e-12, atol=1e-13)


def test_a_site_that_the_response_does_not_depend_on() -> None:
    network, x = traced("Unused"), BY_NAME["Unused"].x(2)
    products, run = network.signed_products(x)
    for number, used in enumerate((False, False, True)):
        assert bool(run.activations[number].any())
        assert bool(run.gradients[number].any()) == used
        assert bool(products[:, network.sites[number].slice].any()) == used


def test_a_response_that_depends_on_no_site() -> None:
    case = BY_NAME["Unused"]
    for sites in ("relu", ["relu", "relu_1"]):
        network = case.trace(sites=sites)
        with pytest.raises(SiteError, match=r"the response 'logit' depends on none of the \d sites"):
            network.gradients(case.x(2))
        for parameter in network._module.parameters():
            parameter.requires_grad_(False)
        with pytest.raises(SiteError, match=r"depends on none of the \d sites"):
            network.gradients(case.x(2))
    detached = case.trace(response=lambda output: output[:, 0].detach())
    with pytest.raises(SiteError, match="not differentiably"):
        detached.gradients(case.x(2))


# --- λ and μ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMOOTH_ENOUGH, ids=lambda case: case.name)
def test_gates_are_differentiable(case: Case) -> None:
    """∂Φ/∂λ at random λ, by autograd, against finite differences and against a · ∂Φ/∂a of the gated run."""
    network, x = traced(case.name), case.x(1, seed=2)
    target = target_of(network, x)
    centre = torch.rand(network.index.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    scale = [centre[site.slice].view(1, *site.gate_shape).clone().requires_grad_() for site in network.sites]
    shift = [torch.zeros(1, *site.shape, dtype=torch.float64, requires_grad=True) for site in network.sites]
    with network.restricted(Restriction(scale, shift)):
        response = network.respond(x, target)
        run = network.gradients(x, target)
    slopes = torch.autograd.grad(response.sum(), [*scale, *shift], allow_unused=True)
    of_scale, of_shift = slopes[: len(scale)], slopes[len(scale) :]
    found = [torch.zeros_like(gate) if slope is None else slope for gate, slope in zip(scale, of_scale, strict=True)]
    flat = torch.cat([slope.flatten() for slope in found])
    torch.testing.assert_close(flat, finite_differences(network, x, target, centre), rtol=2e-6, atol=2e-8)
    assert torch.equal(response, run.response)
    for value, slope, wanted, gates in zip(run.activations, run.gradients, of_shift, scale, strict=True):
        expected = torch.zeros_like(slope) if wanted is None else wanted.reshape(slope.shape)
        torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-13)  # μ is added to what leaves the gate
        assert value.shape == slope.shape
        assert gates.grad is None


def test_gates_of_a_batch_and_for_all() -> None:
    network, case = traced("Plain"), BY_NAME["Plain"]
    x = case.x(3)
    single = [torch.rand(1, *site.gate_shape, dtype=torch.float64) for site in network.sites]
    many = [gate.expand(3, *gate.shape[1:]) for gate in single]
    narrow = [gate[:, :1, :1] for gate in single]  # broadcast within a site, too
    nothing = [None] * 2
    outputs = []
    for gates in (single, many):
        with network.restricted(Restriction(gates, nothing)):
            outputs.append(network(x))
    assert torch.equal(*outputs)
    with network.restricted(Restriction(narrow, nothing)):
        value = network.activations(x)[0]
    with network.restricted(Restriction([narrow[0].expand(1, 3, 5, 5), None], nothing)):
        assert torch.equal(network.activations(x)[0], value)
    with network.restricted(Restriction([None, None], nothing)):
        assert torch.equal(network(x), case.model()(x))


def test_gates_of_another_type_keep_the_networks_own() -> None:
    model = BY_NAME["Plain"].model().float()
    x = BY_NAME["Plain"].x(2).float()
    network = fxpath.trace(model, x)
    scale = [torch.full((1, *site.gate_shape), 0.5, dtype=torch.float64, requires_grad=True) for site in network.sites]
    with network.restricted(Restriction(scale, [None, None])):
        response = network.respond(x)
    assert response.dtype == torch.float32
    slopes = torch.autograd.grad(response.sum(), scale)
    assert [slope.dtype for slope in slopes] == [torch.float64, torch.float64]


# --- masked ---------------------------------------------------------------------------------------------------------


def masked_by_hand(name: str, model: Any, x: Any, e: list[Tensor]) -> Tensor:
    """The masked networks, written out."""
    if name == "Plain":
        return model.head(e[1] * F.relu(model.conv2(e[0] * F.relu(model.conv1(x)))))  # type: ignore[no-any-return]
    if name == "Concat":
        h = e[0] * F.relu(model.squeeze(x))
        return model.head(torch.cat([e[1] * F.relu(model.small(h)), e[2] * F.relu(model.large(h))], 1))  # type: ignore[no-any-return]
    if name == "ResidualIadd":
        h = e[0] * F.relu(model.bn1(model.conv1(x)))
        return model.head(e[1] * F.relu(model.bn2(model.conv2(h)) + h))  # type: ignore[no-any-return]
    if name == "InPlaceReadAgain":  # what reads the overwritten tensor reads the gate as well
        a = e[0] * F.relu(model.conv1(x))
        return model.head(e[1] * F.relu(model.conv2(a)) - 0.5 * a)  # type: ignore[no-any-return]
    if name == "ReusedInPlaceReLU":
        h = e[0] * F.relu(model.bn(model.conv1(x)))
        return model.head(e[1] * F.relu(model.conv2(h)))  # type: ignore[no-any-return]
    if name == "SharedModule":
        h = e[0] * F.relu(model.first[0](x))
        return model.head(e[1] * F.relu(model.first[0](h)))  # type: ignore[no-any-return]
    if name == "ViewSlice":
        h = model.conv(x)
        return model.head(torch.cat([e[0] * F.relu(h[:, :2]), h[:, 2:]], 1))  # type: ignore[no-any-return]
    assert name == "BatchFolded"
    h = e[0].flatten(0, 1) * F.relu(model.fc1(x.reshape(-1, 4)))
    h = e[1].flatten(0, 1) * F.relu(model.fc2(h))
    return model.fc3(h.view(x.shape[0], -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@pytest.mark.parametrize(
    "name",
    [
        "Plain",
        "Concat",
        "ResidualIadd",
        "InPlaceReadAgain",
        "ReusedInPlaceReLU",
        "SharedModule",
        "ViewSlice",
        "BatchFolded",
    ],
)
def test_masked_is_the_masked_network(name: str, granularity: str) -> None:
    case, network = BY_NAME[name], traced(name, granularity)
    model, x = case.model(), case.x(3)
    pathways = random_pathways(network, 3)
    kept = [
        gate.to(torch.float64).expand(3, *site.shape)
        for gate, site in zip(pathways.gates(), network.sites, strict=True)
    ]
    with network.masked(pathways):
        torch.testing.assert_close(network(x), masked_by_hand(name, model, x, kept), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(network(x), model(x.clone()), rtol=0, atol=0)


@every
def test_masked_activations_are_zero_off_the_pathway(case: Case) -> None:
    network, x = traced(case.name), case.x(3)
    pathways = random_pathways(network, 3)
    before = network(x)
    with network.masked(pathways) as inside:
        assert inside is network
        values = network.rows(network.activations(x))
        masked = network(x)
        run = network.gradients(x)
    assert bool((values[~pathways.mask] == 0).all())
    assert torch.equal(network.rows(run.activations), values)
    assert same(run.output, masked)
    assert same(network(x), before)
    everything = Pathways(torch.ones(1, network.index.size, dtype=torch.bool), network.index)
    with network.masked(everything):
        assert same(network(x), before)
    with network.masked(~everything):
        assert not bool(network.rows(network.activations(x)).any())


@pytest.mark.parametrize("how", ["masked", "frozen"])
@pytest.mark.parametrize("case", [c for c in SMOOTH_ENOUGH], ids=lambda case: case.name)  # noqa: C416
def test_gradients_of_restricted_networks(case: Case, how: str) -> None:
    """∇ₓ of the restricted response against finite differences of the restricted network."""
    network = traced(case.name)
    samples = network.samples(case.x(1, seed=6))
    target = target_of(network, samples)
    pathways = random_pathways(network, 1, share=0.7)
    floats = [leaf for leaf in samples.tensors if leaf.is_floating_point()]
    inputs = samples.map(lambda leaf: leaf.clone().requires_grad_())

    def restricted() -> Any:
        return network.masked(pathways) if how == "masked" else network.frozen(pathways, at=samples)

    with restricted():
        response = network.respond(inputs, target)
        slopes = torch.autograd.grad(response.sum(), inputs.tensors, allow_unused=True)
        for number, leaf in enumerate(floats):
            step = 1e-6 * torch.eye(leaf.numel(), dtype=torch.float64).view(-1, *leaf.shape[1:])
            sides = []
            for sign in (1, -1):
                many = samples.take([0] * leaf.numel())
                moved = iter(range(len(many.tensors)))
                shifted = many.map(lambda t: t + sign * step if next(moved) == number else t)  # noqa: B023
                wanted = None if target is None else target.expand(leaf.numel())
                with torch.no_grad():
                    sides.append(network.respond(shifted, wanted))
            expected = (sides[0] - sides[1]) / 2e-6
            found = slopes[number]
            found = torch.zeros_like(leaf) if found is None else found
            torch.testing.assert_close(found.flatten(), expected, rtol=2e-6, atol=2e-8)


# --- frozen ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@every
def test_frozen_is_the_network_itself_at_x(case: Case, granularity: str) -> None:
    """Φ̂(x; e) = Φ(x) for every e, bit for bit, and the same activations."""
    network, x = traced(case.name, granularity), case.x(3)
    before, activations = network(x), network.activations(x)
    for seed, share in ((0, 0.5), (1, 0.05), (2, 0.0), (3, 1.0)):
        with network.frozen(random_pathways(network, 3, seed, share), at=x):
            assert same(network(x), before)
            assert all(map(torch.equal, network.activations(x), activations))
            assert torch.equal(network.gradients(x).response, network.respond(x))
    assert same(network(x), before)


@every
def test_frozen_keeps_the_constants_of_x(case: Case) -> None:
    network, x, other = traced(case.name), case.x(3), case.x(3, seed=9)
    pathways = random_pathways(network, 3)
    constants = network.rows(network.activations(x))
    own = network.rows(network.activations(other))
    with network.frozen(pathways, at=x):
        found = network.rows(network.activations(other))
        moved = network(other)
    assert torch.equal(found[~pathways.mask], constants[~pathways.mask])
    assert not torch.equal(found[~pathways.mask], own[~pathways.mask])
    nothing = Pathways(torch.zeros_like(pathways.mask), network.index)
    with network.frozen(nothing, at=x):
        assert torch.equal(network.rows(network.activations(other)), constants)
    everything = Pathways(torch.ones_like(pathways.mask), network.index)
    with network.frozen(everything, at=x):
        assert same(network(other), network._run(network.samples(other), None))
    assert leaves(moved)[0].shape == leaves(network(other))[0].shape


def test_frozen_neurons_pass_no_gradient() -> None:
    network, x = traced("MLP"), rows(4)(1).requires_grad_()
    nothing = Pathways(torch.zeros(1, 12, dtype=torch.bool), network.index)
    with network.frozen(nothing, at=x):
        (slope,) = torch.autograd.grad(network.respond(x, 0).sum(), x, allow_unused=True)
    assert slope is None or not bool(slope.any())
    last = nothing.mask.clone()
    last[0, 7:] = True
    model = BY_NAME["MLP"].model()
    with network.frozen(Pathways(last, network.index), at=x):  # the first layer is constant, the second cannot move
        (slope,) = torch.autograd.grad(network.respond(x, 0).sum(), x, allow_unused=True)
    assert slope is None or not bool(slope.any())
    first = ~last
    first[0, 7:] = True
    with network.frozen(Pathways(first, network.index), at=x):
        (slope,) = torch.autograd.grad(network.respond(x, 0).sum(), x)
    (expected,) = torch.autograd.grad(model(x)[0, 0], x)
    assert torch.equal(slope, expected)


def test_frozen_broadcasts() -> None:
    network, case = traced("Concat"), BY_NAME["Concat"]
    x, one, many = case.x(3), random_pathways(traced("Concat"), 1), random_pathways(traced("Concat"), 3)
    first = x[:1]
    expected = []
    for row in range(3):
        with network.frozen(many.take([row]), at=first):
            expected.append(network.rows(network.activations(x[row : row + 1])))
    with network.frozen(many, at=first):  # many pathways, the constants of one sample
        torch.testing.assert_close(network.rows(network.activations(x)), torch.cat(expected), rtol=1e-12, atol=1e-14)
    with network.frozen(one, at=x):  # one pathway, many samples
        found = network.rows(network.activations(x))
        assert torch.equal(network(x), case.model()(x))
    for row in range(3):
        with network.frozen(one, at=x[row : row + 1]):
            alone = network.rows(network.activations(x[row : row + 1]))
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-12, atol=1e-14)
    with network.masked(one):
        together = network(x)
    with network.masked(one.take([0, 0, 0])):
        assert torch.equal(network(x), together)
    with network.frozen(one, at=first):
        assert network(x).shape == (3, 4)


# --- misuse ---------------------------------------------------------------------------------------------------------


def test_restrictions_do_not_nest_and_always_end() -> None:
    network, x = traced("Plain"), image(2)
    pathways = random_pathways(network, 2)
    before = network(x)
    ways: list[Callable[[], Any]] = [
        lambda: network.masked(pathways),
        lambda: network.frozen(pathways, at=x),
        lambda: network.restricted(Restriction([None, None], [None, None])),
    ]
    for outer in ways:
        for inner in ways:
            with (
                outer(),
                pytest.raises(RestrictionError, match="restricted already; leave the outer with block"),
                inner(),
            ):
                pass
            assert network._restriction is None
        with outer(), pytest.raises(RestrictionError, match="original: the network is restricted"):
            network.original(x)
        with outer(), pytest.raises(RestrictionError, match="restricted"):
            network.outcome(x, pathways)
        with pytest.raises(ZeroDivisionError), outer():
            raise ZeroDivisionError
        assert torch.equal(network(x), before)
    with network.masked(pathways):
        with pytest.raises(InputError):
            network(x[:, :1])
        assert not torch.equal(network(x), before)  # an error within does not end it
    assert torch.equal(network(x), before)


def test_pathways_of_another_network_batch_or_device() -> None:
    network, x = traced("Plain"), image(3)
    other = random_pathways(traced("Concat"), 3)
    fine = random_pathways(network, 3)
    for call in (
        lambda: network.masked(other).__enter__(),
        lambda: network.frozen(other, at=x).__enter__(),
        lambda: network.outcome(x, other),
    ):
        with pytest.raises(RestrictionError, match=r"pathways: they are of another index \(NeuronIndex\(3 sites"):
            call()
    channels = random_pathways(traced("Plain", "channel"), 3)
    with pytest.raises(RestrictionError, match=r"another index.*granularity='channel'"), network.masked(channels):
        pass
    away = Pathways(fine.mask.to("meta"), network.index)
    with pytest.raises(RestrictionError, match="pathways: they are on meta, the model on cpu"), network.masked(away):
        pass
    for batch in (1, 2, 4):
        with (
            network.masked(fine),
            pytest.raises(RestrictionError, match=f"gates are for a batch of 3, the input has {batch}"),
        ):
            network(image(batch))
    with pytest.raises(RestrictionError, match="outcome: there are 2 pathways for 3 samples"):
        network.outcome(x, fine.take([0, 1]))
    with pytest.raises(RestrictionError, match=r"frozen: there are 3 pathways and 2 samples to take constants from"):
        network.frozen(fine, at=x[:2]).__enter__()
    with network.frozen(fine.take([0]), at=x), pytest.raises(RestrictionError, match="constants are for a batch of 3"):
        network(x[:2])
    assert network._restriction is None


def test_an_inverted_restriction_is_that_of_the_complement() -> None:
    network, x = traced("Plain"), image(4)
    kept, constant = torch.rand(2, 4, 3, 5, 5, dtype=torch.float64) > 0.5
    for scale in (kept, kept[:1]):
        for shift in (None, constant.double()):
            with network.restricted(Restriction([~scale, None], [shift, None])):
                expected = network(x)
            with network.restricted(Restriction([scale, None], [shift, None], inverted=True)):
                assert torch.equal(network(x), expected)


def test_restrictions_that_do_not_fit() -> None:
    network = traced("Plain")
    good = torch.ones(1, 3, 5, 5, dtype=torch.float64)
    for scale, shift, message in (
        ([None], [None], r"expected λ and μ for 2 sites, found 1 and 1"),
        ([None, None], [None], r"found 2 and 1"),
        ([good[:, :2], None], [None, None], r"λ of site relu1 as \(B or 1, \*\(3, 5, 5\)\).*found \(1, 2, 5, 5\)"),
        ([good[0], None], [None, None], r"λ of site relu1.*found \(3, 5, 5\)"),
        ([None, None], [None, good], r"μ of site relu2 as \(B or 1, \*\(3, 3, 3\)\).*found \(1, 3, 5, 5\)"),
        ([good.to("meta"), None], [None, None], r"λ of site relu1 is on meta, the model on cpu"),
    ):
        with pytest.raises(RestrictionError, match=message), network.restricted(Restriction(scale, shift)):
            pass
        assert network._restriction is None
    inverted = Restriction([good, None], [None, None], inverted=True)
    with pytest.raises(RestrictionError, match=r"only a bool λ can be inverted.*relu1"), network.restricted(inverted):
        pass


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3, 5, 5, dtype=torch.float64), r"expected inputs \(B, 2, 5, 5\).*found \(2, 3, 5, 5\); resize"),
        (torch.ones(2, 2, 6, 5, dtype=torch.float64), r"found \(2, 2, 6, 5\)"),
        (torch.ones(2, 5, 5, dtype=torch.float64), r"found \(2, 5, 5\)"),
        (torch.ones(2, 2, 5, 5), r"expected inputs of torch\.float64, found torch\.float32"),
        (torch.ones(2, 2, 5, 5, dtype=torch.float64, device="meta"), r"model is on cpu, the input on meta; x\.to"),
        ((torch.ones(2, 2, 5, 5), torch.ones(2, 2, 5, 5)), r"arguments of the example \(1\), found 2"),
        ({"x": torch.ones(2, 2, 5, 5)}, r"arguments of the example \(1\), found \['x'\]"),
        ([torch.ones(2, 2, 5, 5)], r"found list"),
        (torch.ones(0, 2, 5, 5), r"found an empty batch"),
    ],
)
def test_inputs_that_do_not_fit(x: Any, message: str) -> None:
    network = traced("Plain")
    for call in (network, network.respond, network.activations, network.gradients, network.original):
        with pytest.raises(InputError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (4, r"expected a class in 0 … 3, found 4 \(row 0 of the batch\)"),
        (-1, r"found -1"),
        ([0, 1, 4], r"found 4 \(row 2 of the batch\)"),
        ([0, 1], r"expected one class, or 3, one a sample, found 2"),
        (1.0, r"whole class numbers"),
    ],
)
def test_targets_out_of_range(target: Any, message: str) -> None:
    network, x = traced("Plain"), image(3)
    for call in (network.respond, network.gradients, network.original):
        with pytest.raises(InputError, match=message):
            call(x, target)


def test_example_and_model_on_two_devices() -> None:
    with pytest.raises(InputError, match=r"the example is on meta, the model on cpu"):
        fxpath.trace(BY_NAME["Plain"].model(), image(2).to("meta"))


# --- responses ------------------------------------------------------------------------------------------------------


def test_responses_and_their_gradients_by_hand() -> None:
    case = BY_NAME["MLP"]
    model, x = case.model(), case.x(3)
    target = torch.tensor([0, 3, 2])
    hidden: list[Tensor] = []

    def forward() -> Tensor:
        h = model[1](model[0](x.clone()))
        last = model[3](model[2](h))
        hidden[:] = [last]
        last.retain_grad()
        return model[4](last)  # type: ignore[no-any-return]

    def margin(y: Tensor) -> Tensor:
        others = [torch.cat([row[:t], row[t + 1 :]]).max() for row, t in zip(y, target.tolist(), strict=True)]
        return y[rows_, target] - torch.stack(others)

    rows_ = torch.arange(3)
    for response, formula in (
        (Logit(), lambda y: y[rows_, target]),
        ("probability", lambda y: y.softmax(1)[rows_, target]),
        (Margin(against=1), lambda y: y[rows_, target] - y[:, 1]),
        ("margin", margin),
    ):
        network = case.trace(response=response)
        run = network.gradients(x, target)
        expected = formula(forward())
        expected.sum().backward()
        assert run.target is not None
        assert run.target.tolist() == [0, 3, 2]
        torch.testing.assert_close(run.response, expected.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(run.gradients[1], hidden[0].grad, rtol=1e-10, atol=1e-14)
    function = case.trace(response=lambda y: (y**2).sum(1))
    run = function.gradients(x)
    (forward() ** 2).sum().backward()
    assert run.target is None
    torch.testing.assert_close(run.gradients[1], hidden[0].grad, rtol=1e-10, atol=1e-14)
    assert function.response.name == "<lambda>"
    assert function.original(x).prediction is None


def test_targets() -> None:
    network, x = traced("Plain"), image(3)
    logits = network(x)
    predicted = logits.argmax(1)
    assert torch.equal(network.respond(x), logits[range(3), predicted])
    assert torch.equal(network.respond(x, 0), logits[:, 0])
    assert torch.equal(network.respond(x, [0, 1, 2]), logits[range(3), [0, 1, 2]])
    assert torch.equal(network.respond(Samples(x, 2)), logits[:, 2])
    assert torch.equal(network.respond(Samples(x, 2), 0), logits[:, 0])  # what is given later counts
    pathways = random_pathways(network, 3, share=0.2)
    with network.masked(pathways):
        masked = network(x)
        assert torch.equal(
            network.respond(x), masked[range(3), predicted]
        )  # the original's class, not the masked one's
        assert network.gradients(x).target.tolist() == predicted.tolist()  # type: ignore[union-attr]
    ties = fxpath.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)).eval(), torch.ones(1, 2))
    nn.init.zeros_(ties._module.get_parameter("2.weight"))
    nn.init.zeros_(ties._module.get_parameter("2.bias"))
    assert ties.original(torch.ones(1, 2)).target.tolist() == [0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "response", "call", "message"),
    [
        ("TupleOutput", Logit(), "gradients", r"found tuple of 0 \(3, 4\) float64, 1 \(3, 27\) float64; pick a part"),
        (
            "DictOutput",
            Logit("logit"),
            "respond",
            r"no part 'logit' .*, dict of features/last .*, logits \(3, 4\) float64",
        ),
        ("TupleOutput", Probability(output=2), "original", r"no part '2' in the network's output, tuple of 0 \(3, 4\)"),
        ("ScalarOutput", Logit(), "respond", r"expected class scores \(B, classes\).*found a tensor \(3,\)"),
        ("Plain", Margin(against=9), "respond", r"margin: expected a class in 0 … 3, found 9"),
        ("Plain", OutputFunction(lambda y: y), "respond", r"one real number per sample, \(3,\), found \(3, 4\)"),
        ("Plain", OutputFunction(lambda y: 1.0), "gradients", r"one real number per sample, \(3,\), found float"),
        (
            "Plain",
            OutputFunction(lambda y: y.argmax(dim=1)),
            "respond",
            r"expected a floating-point .*, found torch.int64",
        ),
    ],
)
def test_responses_that_do_not_fit(name: str, response: Any, call: str, message: str) -> None:
    if isinstance(response, ClassResponse) and response != Logit():  # what is chosen on purpose is tried at once
        with pytest.raises(InputError, match=message):
            BY_NAME[name].trace(response=response)
    network = BY_NAME[name].trace(response=response, check=False)
    with pytest.raises(InputError, match=message):
        getattr(network, call)(BY_NAME[name].x(3))


def test_response_arguments() -> None:
    for wrong, message in (
        ("logits", r"there is no response 'logits'; nearest: logit .*A function of the output is a response, too"),
        (3, r"expected a Response, its name or a function, found int"),
        (Logit, r"expected an instance, found the class Logit; call it: Logit\(\)"),
    ):
        with pytest.raises(InputError, match=message):
            BY_NAME["Plain"].trace(response=wrong)
    with pytest.raises(InputError, match="this response knows no classes; leave the target out"):
        traced("ScalarOutput").respond(image(2), 1)
    with pytest.raises(InputError, match="at least two classes"):
        fxpath.trace(
            nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval(), torch.ones(1, 2), response="margin"
        )


# --- suffixes -------------------------------------------------------------------------------------------------------


@every
def test_suffix_of_every_site(case: Case) -> None:
    """A suffix gives the network's output bit for bit, and its gradient is the full network's."""
    network, x = traced(case.name), case.x(3)
    output, target = network(x), target_of(network, x)
    full = network.gradients(x, target)
    for number, site in enumerate(network.sites):
        suffix = network.suffix(site.name)
        assert suffix.site is site
        activation, boundary = suffix.cache(x)
        assert torch.equal(activation, full.activations[number])
        assert same(suffix(activation, boundary), output)
        start = activation.clone().requires_grad_()
        answered = suffix(start, boundary)
        response = network.response(answered, target)
        assert torch.equal(response, full.response)
        (slope,) = torch.autograd.grad(response.sum(), start, allow_unused=True) if response.requires_grad else (None,)
        slope = torch.zeros_like(start) if slope is None else slope
        torch.testing.assert_close(slope, full.gradients[number], rtol=1e-10, atol=1e-13)


@every
def test_suffix_under_a_restriction(case: Case) -> None:
    """Gates behind the site hold in its suffix; the site's own has passed."""
    network, x = traced(case.name), case.x(3)
    pathways = random_pathways(network, 3)
    for number in range(len(network.sites)):
        suffix = network.suffix(number)
        with network.masked(pathways):
            expected = network(x)
            activation, boundary = suffix.cache(x)
            assert torch.equal(activation, network.activations(x)[number])
            assert same(suffix(activation, boundary), expected)


def test_suffix_answers_what_the_gate_would_let_through() -> None:
    for name in ("InPlaceReadAgain", "ResidualIadd", "BatchFolded", "SizeReshape", "ShapeBranch"):
        network, x = traced(name), BY_NAME[name].x(2)
        for number, site in enumerate(network.sites):
            other = torch.rand(2, *site.shape, dtype=torch.float64)
            scale: list[Tensor | None] = [None] * len(network.sites)
            shift: list[Tensor | None] = [None] * len(network.sites)
            scale[number], shift[number] = torch.zeros(1, *site.gate_shape, dtype=torch.bool), other
            with network.restricted(Restriction(scale, shift)):
                expected = network(x)
            suffix = network.suffix(number)
            _, boundary = suffix.cache(x)
            value = other.flatten(0, 1) if site.fold > 1 else other
            assert torch.equal(suffix(value, boundary), expected)


def test_suffix_of_an_unknown_site() -> None:
    with pytest.raises(SiteError, match=r"there is no site 'relu'; nearest: relu1, relu2|nearest: relu2, relu1"):
        traced("Plain").suffix("relu")
    with pytest.raises(SiteError, match="expected 0 … 1, found 2"):
        traced("Plain").suffix(2)


# --- what a pathway answers -----------------------------------------------------------------------------------------


@every
def test_original(case: Case) -> None:
    network, x = traced(case.name), case.x(3)
    original = network.original(x)
    run = network.gradients(x)
    assert torch.equal(original.response, run.response)
    assert torch.equal(original.active, network.rows(network.activations(x)) > 0)
    logits = case.response.logits(network(x))
    if logits is None:
        assert original.target is original.prediction is original.probability is original.logits is None
    else:
        assert torch.equal(original.prediction, logits.argmax(1))
        assert torch.equal(original.target, logits.argmax(1))
        torch.testing.assert_close(original.probability, logits.softmax(1).amax(1))
        other = network.original(x, 0)
        assert other.target.tolist() == [0, 0, 0]
        assert torch.equal(other.response, logits[:, 0])
        assert torch.equal(other.prediction, logits.argmax(1))
        torch.testing.assert_close(other.probability, logits.softmax(1)[:, 0])


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@every
def test_outcome_is_what_the_masked_network_answers(case: Case, granularity: str) -> None:
    network, x = traced(case.name, granularity), case.x(4, seed=1)
    pathways = random_pathways(network, 4, share=0.6)
    outcome = network.outcome(x, pathways)
    original = network.original(x)
    with network.masked(pathways):
        output, values = network(x), network.activations(x)
    with network.masked(~pathways):
        dropped = network(x)
    logits, target = case.response.logits(output), original.target
    assert torch.equal(outcome.response, case.response(output, target))
    assert torch.equal(outcome.dropped_response, case.response(dropped, target))
    if logits is None:
        assert outcome.probability is outcome.same_class is None
    else:
        torch.testing.assert_close(outcome.probability, logits.softmax(1)[range(4), target])
        assert torch.equal(outcome.same_class, logits.argmax(1) == original.prediction)
    live = torch.zeros(4, len(network.sites), dtype=torch.int64)
    before = network.activations(x)
    for number, site in enumerate(network.sites):
        for row in range(4):
            now = values[number].reshape(4, *site.shape)[row] > 0
            then = before[number].reshape(4, *site.shape)[row] > 0
            if granularity == "channel":
                now, then = (
                    torch.stack([part.any() for part in state.unbind(site.axis)]) if state.ndim else state.view(1)
                    for state in (now, then)
                )
            kept = pathways.mask[row, site.slice].reshape(now.shape)
            live[row, number] = int((kept & now & ~then).sum())
    assert torch.equal(outcome.live, live)
    again = network.outcome(x, pathways, original=original)
    for name in ("response", "dropped_response", "live"):
        assert torch.equal(getattr(again, name), getattr(outcome, name))


def test_neurons_are_switched_on_somewhere() -> None:
    """The test above must not be one of zeros."""
    total = 0
    for name in ("ReusedReLU", "ResidualIadd", "MLP", "Concat", "OverlappingPool"):
        network, x = traced(name), BY_NAME[name].x(8, seed=1)
        total += int(network.outcome(x, random_pathways(network, 8, share=0.6)).live.sum())
    assert total > 20


def test_outcome_of_one_pathway_for_all_and_of_a_target() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(3)
    one = random_pathways(network, 1)
    single, repeated = network.outcome(x, one), network.outcome(x, one.take([0, 0, 0]))
    assert torch.equal(single.response, repeated.response)
    assert torch.equal(single.live, repeated.live)
    chosen = network.outcome(x, one, target=[1, 2, 3])
    with network.masked(one):
        assert torch.equal(chosen.response, network(x)[range(3), [1, 2, 3]])
    active = network.outcome(x, Active().select(network, x)[None])
    assert torch.equal(active.response, network.respond(x))  # masking the dead changes no bit
    assert active.live.tolist() == [[0, 0, 0]] * 3


def test_outcome_takes_one_original() -> None:
    network, x = traced("Plain"), image(3)
    pathways = random_pathways(network, 3)
    original = network.original(x)
    with pytest.raises(InputError, match="expected a target or an original, which has its own, found both"):
        network.outcome(x, pathways, target=1, original=original)
    first = slice(0, 2)
    parts = (original.response[first], None, None, original.target[first], original.active[first])  # type: ignore[index]
    short = Original(*parts, packed=original.packed[first])
    with pytest.raises(InputError, match="the original is of 2 samples, found 3"):
        network.outcome(x, pathways, original=short)


def test_responses_that_overflow_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(4, 2, dtype=torch.float64)
    network = fxpath.trace(model, x)
    x[2] = torch.finfo(x.dtype).max  # finite, but the sum of two is not
    with pytest.raises(SampleError, match=r"response: it is NaN or infinite for sample 's'") as caught:
        network.original(Samples(x, ids=list("pqst")))
    assert caught.value.positions == (2,)


def test_inputs_that_are_not_finite_are_named() -> None:
    network = traced("Plain")
    x = image(4)
    x[1], x[3] = float("nan"), float("inf")
    samples = Samples(x, ids=list("pqst"))
    for call in (network.original, network.gradients, network.activations):
        with pytest.raises(SampleError, match=r"inputs: sample 'q', 't' holds NaN or infinite values") as caught:
            call(samples)
        assert caught.value.positions == (1, 3)


# --- other circumstances --------------------------------------------------------------------------------------------


def convolutional(kind: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Conv2d(32, 48, 3, padding=1),
        nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(48, 48, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(48, 10),
    ).to(kind).eval()  # fmt: skip


def assert_all_works(network: Network, model: nn.Module, x: Any, *, exact: bool = True) -> None:
    pathways = Random(seed=1).select(network, x, (0.5,))[0.5]
    with torch.no_grad():
        assert torch.equal(network(x), model(x)) or not exact
    with network.frozen(pathways, at=x):
        assert torch.equal(network(x), model(x)) or not exact
    outcome = network.outcome(x, pathways)
    assert bool(outcome.response.isfinite().all())
    selection = fxpath.NeuronMCT().select(network, x, (0.5, 0.9))
    for sparsity, found in selection.pathways.items():
        assert bool((found.count <= network.index.kept(sparsity)).all())  # type: ignore[arg-type]
        assert bool((found.count > 0).all())
        assert not bool((found.mask & ~network.original(x).active).any())


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_type(kind: torch.dtype) -> None:
    model, x = convolutional(kind), torch.randn(2, 3, 12, 12, dtype=kind)
    network = fxpath.trace(model, x)
    assert_all_works(network, model, x)
    assert network.signed_products(x)[0].dtype == kind
    assert len(network.fingerprint) == 64


def test_autocast() -> None:
    model, x = convolutional(), torch.randn(2, 3, 12, 12)
    plain = fxpath.trace(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network = fxpath.trace(model, x)
        assert_all_works(network, model, x)
        assert network.activations(x)[1].dtype == torch.bfloat16
    assert_all_works(network, model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_all_works(plain, model, x)


def test_autocast_mixes_types_without_losing_precision() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            return self.fc2(F.relu(h.float() - 0.1))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        network = fxpath.trace(Mixed().eval(), torch.randn(2, 4))
        products, run = network.signed_products(torch.randn(2, 4))
    assert [value.dtype for value in run.activations] == [torch.bfloat16, torch.float32]
    assert products.dtype == torch.float32
    assert torch.equal(products, network.rows([a * g for a, g in zip(run.activations, run.gradients, strict=True)]))


def test_inference_mode() -> None:
    model = convolutional()
    with torch.inference_mode():
        x = torch.randn(2, 3, 12, 12)
        network = fxpath.trace(model, x)
        assert_all_works(network, model, x)
        pathways = Random().select(network, x, (0.5,))[0.5]
        activation, boundary = network.suffix(0).cache(x)
        run = network.gradients(x)
    assert x.is_inference()
    assert bool(run.gradients[0].any())
    outside = x.clone().requires_grad_()
    with network.frozen(pathways, at=x):  # what was made in inference mode can be used outside, with gradients
        (slope,) = torch.autograd.grad(network.respond(outside).sum(), outside)
    assert bool(slope.any())
    start = activation.clone().requires_grad_()
    (slope,) = torch.autograd.grad(network.suffix(0)(start, boundary).sum(), start)
    assert bool(slope.any())


def test_no_grad_and_weights_without_gradients() -> None:
    model, x = convolutional(), torch.randn(2, 3, 12, 12)
    network = fxpath.trace(model, x)
    expected, _ = network.signed_products(x)
    with torch.no_grad():
        assert torch.equal(network.signed_products(x)[0], expected)
    model.requires_grad_(False)
    assert torch.equal(network.signed_products(x)[0], expected)
    assert torch.equal(fxpath.trace(model, x).signed_products(x)[0], expected)


def test_channels_last_keeps_its_bits() -> None:
    """Kernels go by memory format: a gate that changed it would change last bits."""
    model = convolutional().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 12, 12).to(memory_format=torch.channels_last)
    network = fxpath.trace(model, x)
    assert_all_works(network, model, x)
    strides = [value.stride() for value in network.activations(x)]
    assert strides[1] == (48 * 144, 1, 12 * 48, 48)
    everything = Pathways(torch.ones(2, network.index.size, dtype=torch.bool), network.index)
    for restriction in (network.masked(everything), network.frozen(~everything, at=x)):
        with restriction:
            assert [value.stride() for value in network.activations(x)] == strides
            assert torch.equal(network(x), model(x))
    same_picture = x.contiguous()
    contiguous = fxpath.trace(convolutional(), same_picture)
    assert contiguous.index == network.index
    torch.testing.assert_close(
        contiguous.signed_products(same_picture)[0], network.signed_products(x)[0], rtol=1e-4, atol=1e-7
    )


def test_inputs_that_are_views_or_need_gradients() -> None:
    model = convolutional()
    wide = torch.randn(12, 2, 24, 3)
    x = wide.permute(1, 3, 0, 2)[..., ::2]
    assert not x.is_contiguous()
    network = fxpath.trace(model, x)
    assert_all_works(network, model, x)
    needy = x.clone().requires_grad_()
    again = fxpath.trace(model, needy)
    run = again.gradients(needy)
    assert needy.grad is None
    torch.testing.assert_close(run.response, network.gradients(x).response)
    again.respond(needy).sum().backward()
    assert needy.grad is not None
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_one_sample_at_a_time() -> None:
    model = convolutional()
    x = torch.randn(1, 3, 12, 12)
    network = fxpath.trace(model, x)
    assert_all_works(network, model, x)
    assert network.index == fxpath.trace(model, x.repeat(3, 1, 1, 1)).index


def test_model_without_parameters_and_integer_inputs() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.fc(F.relu(self.table(words)).mean(1))

    words = torch.tensor([[1, 2, 3], [4, 5, 6]])
    network = fxpath.trace(Embedding().eval(), words)
    assert [site.shape for site in network.sites] == [(3, 4)]
    assert network.gradients(words).gradients[0].shape == (2, 3, 4)
    bare = fxpath.trace(nn.Sequential(nn.ReLU(), nn.Flatten()).eval(), torch.randn(2, 3, 2))
    assert bare.device == torch.device("cpu")
    assert bare.signed_products(torch.ones(1, 3, 2), 4)[0].tolist() == [[0, 0, 0, 0, 1, 0]]


def test_fingerprint() -> None:
    case = BY_NAME["ResidualIadd"]
    model = case.model()
    network = case.trace(model)
    assert network.fingerprint == case.trace().fingerprint == case.trace(model).fingerprint
    assert case.trace(granularity="channel").fingerprint != network.fingerprint
    assert case.trace(sites="relu").fingerprint != network.fingerprint
    before = network.fingerprint
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = torch.nextafter(model.conv1.weight[0, 0, 0, 0], torch.tensor(9.0).double())  # type: ignore[union-attr,index]
    assert network.fingerprint != before
    with torch.no_grad():
        model.bn2.running_var.mul_(2)  # type: ignore[union-attr,operator]
    assert len({before, network.fingerprint, case.trace(model).fingerprint}) == 2
    exported = BY_NAME["ShapeBranch"]
    assert exported.trace().fingerprint == exported.trace().fingerprint


def test_a_network_is_called_as_its_model_is() -> None:
    case = BY_NAME["TwoInputs"]
    left, right = case.inputs(3)
    model = case.model()
    by_place, by_name = traced("TwoInputs"), traced("DictInput")
    expected = model(left, right)
    assert torch.equal(by_place(left, right), expected)
    assert torch.equal(by_place((left, right)), expected)
    assert torch.equal(by_name(right=right, left=left), expected)
    assert torch.equal(by_name({"left": left, "right": right}), expected)
    plain, x = traced("Plain"), image(2)
    whole = Samples(x)
    assert torch.equal(plain(x=x), plain(x))
    assert torch.equal(plain(x=whole), plain(whole))
    with pytest.raises(InputError, match="expected Samples alone"):
        by_place(whole, right)
    with pytest.raises(InputError, match=r"found \['self'\]"):
        plain(self=left)
    with pytest.raises(
        InputError, match=r"put together as in the example \(\[0\], \[1\]\), found \[0\]\[0\], \[0\]\[1\], \[1\]"
    ):
        by_place((left, left), right)
    with pytest.raises(InputError, match="by place or all by name, found 1 by place and right by name"):
        by_name(left, right=right)
    with pytest.raises(InputError, match="by place or all by name, found 0 by place and none by name"):
        by_place()
    with pytest.raises(InputError, match=r"expected the arguments of the example \(2\), found 3"):
        by_place(left, right, right)


def test_small_things() -> None:
    network = traced("Plain")
    assert repr(network) == "Network(2 sites, 102 neurons, response='logit')"
    assert network.input_shapes == ((2, 5, 5),)
    assert traced("TwoInputs").input_shapes == ((3,), (4,))
    assert set(network.tensors) == {f"{m}.{p}" for m in ("conv1", "conv2", "fc") for p in ("weight", "bias")}
    values = network.activations(image(2))
    assert torch.equal(network.rows(values), torch.cat([v.flatten(1) for v in values], 1))
    assert network.index.locate(101) == ("relu2", (2, 2, 2))
