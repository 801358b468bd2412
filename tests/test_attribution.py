"""The pathway gradient: the plain one at sparsity 0, the frozen network's else, at inputs or at an embedding.

And its masked variant, what makes numbers of pixels out of maps, and their opening.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from footprint import unchanged
from networks import BY_NAME, CASES, Case, trace_any, traced
from torch import Tensor, nn

import fxpath
from fxpath.attribution import input_gradient, masked_gradient, opened, pixel_scores
from fxpath.errors import (
    BranchError,
    EmptyPathwaysWarning,
    InputError,
    RestrictionError,
    SampleError,
    TraceWarning,
)
from fxpath.gates import Restriction
from fxpath.images import load_images
from fxpath.network import Network
from fxpath.pathways import Pathways
from fxpath.responses import OutputFunction
from fxpath.samples import Samples
from fxpath.selectors import NeuronMCT
from fxpath.zoo import load_model

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BROKEN = {"ResidualOntoReLU", "Methods", "ChunkInPlace", "ShapeBranchInPlace"}  # torch cannot differentiate the module


def random_pathways(network: fxpath.Network, batch: int, share: float = 0.5) -> fxpath.Pathways:
    generator = torch.Generator().manual_seed(1)
    return fxpath.Pathways(torch.rand(batch, network.index.size, generator=generator) < share, network.index)


def floats(x: object) -> list[Tensor]:
    return [
        leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def everything(network: Network) -> Pathways:
    return Pathways(torch.ones((1, network.index.size), dtype=torch.bool), network.index)


def plain(model: nn.Module, network: Network, samples: Samples, target: Tensor | None) -> list[Tensor]:
    """The gradients of the untraced model, without fxpath but for Φ."""
    given = samples.map(lambda leaf: leaf.detach().clone().requires_grad_(leaf.is_floating_point()))
    inputs = given.map(lambda leaf: leaf * 1)  # one network writes to its input
    leaves = floats(given.inputs)
    value = network.response(model(*inputs.args, **inputs.kwargs), target)
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True))


def same(found: Any, expected: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(floats(found), expected, strict=True))


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@every
def test_it_is_the_gradient_of_the_frozen_network(case: Case, granularity: str) -> None:
    model = case.model()
    network = case.trace(model, granularity=granularity)
    samples = network.samples(case.x(2))
    batch = samples.batch
    target = network.original(samples).target
    for pathways in (random_pathways(network, batch), random_pathways(network, batch, 2.0)):
        with unchanged(model):
            found = floats(fxpath.pathway_gradient(network, samples, pathways, target))
        given = samples.map(lambda leaf: leaf.detach().clone().requires_grad_(leaf.is_floating_point()))
        with network.frozen(pathways, at=samples):
            expected = torch.autograd.grad(
                network.respond(given.inputs, target).sum(), floats(given.inputs), allow_unused=True
            )
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::fxpath.errors.NoContributionWarning")
@pytest.mark.filterwarnings("ignore::fxpath.errors.EmptyPathwaysWarning")
@every
def test_with_all_neurons_it_is_the_plain_gradient_to_the_bit(case: Case) -> None:
    """All neurons, and sparsity 0, which leaves out those that do not contribute."""
    model = case.model()
    network = case.trace(model)
    samples = network.samples(case.x(3))
    target = network.original(samples).target
    if case.name in BROKEN:
        with pytest.raises(RuntimeError, match="inplace"):
            plain(model, network, samples, target)
        return
    expected = plain(model, network, samples, target)
    kept = NeuronMCT().scores(network, samples).pathways(0)
    assert same(fxpath.pathway_gradient(network, samples, everything(network)), expected)
    assert same(fxpath.pathway_gradient(network, samples, kept), expected)
    assert same(input_gradient(network, samples), expected)
    if bool(kept.mask.any()) and any(map(torch.any, expected)):
        worst = Pathways(torch.zeros_like(kept.mask), network.index)
        assert not same(fxpath.pathway_gradient(network, samples, worst), expected) or case.name == "Unused"


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_lite0"])
def test_on_photos_with_all_neurons_it_is_the_plain_gradient_to_the_bit(name: str) -> None:
    loaded = load_model(f"zoo:{name}")
    data = load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes, limit=2)
    x = torch.stack([data[row][0] for row in range(2)])
    network = fxpath.trace(loaded.model, x)
    expected = plain(loaded.model, network, Samples(x), network.original(x).target)
    scores = NeuronMCT().scores(network, x)
    kept = scores.pathways(0)
    assert float(kept.density.max()) < 0.6  # most neurons are dead, or their gradient is 0
    assert same(fxpath.pathway_gradient(network, x, everything(network)), expected)
    assert same(fxpath.pathway_gradient(network, x, kept), expected)
    assert not same(fxpath.pathway_gradient(network, x, scores.pathways(0.9)), expected)


def test_batches_are_samples_one_by_one() -> None:
    for name in ("Concat", "BatchFolded", "SqueezeExcitation", "Transformer"):
        network, x = traced(name), BY_NAME[name].x(3)
        pathways = random_pathways(network, 3)
        whole = fxpath.pathway_gradient(network, x, pathways)
        for row in range(3):
            alone = fxpath.pathway_gradient(network, x[row : row + 1], pathways.take([row]))
            torch.testing.assert_close(alone[0], whole[row], rtol=1e-12, atol=1e-14)
        one = fxpath.pathway_gradient(network, x, pathways.take([1]))  # one pathway for all
        torch.testing.assert_close(one[1], whole[1], rtol=1e-12, atol=1e-14)
        assert not torch.allclose(one[0], whole[0])


class Handed(nn.Module):
    """In evaluation mode dropout hands on the very tensor that it was given, which is read besides."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.head = nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x)
        return self.head(self.drop(z) ** 2 + z)


def test_what_reads_the_same_tensor_is_not_held() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64)
    network = trace_any(Handed().double().eval(), x, sites="drop")
    pathways = random_pathways(network, 3)
    given = x.clone().requires_grad_()
    with network.frozen(pathways, at=x):
        (expected,) = torch.autograd.grad(network.respond(given, 1).sum(), given)
    torch.testing.assert_close(fxpath.pathway_gradient(network, x, pathways, 1), expected, rtol=1e-12, atol=1e-15)


def test_held_restrictions_hold_bits_alone() -> None:
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    scale = [torch.full((1, *site.gate_shape), 0.5) for site in network.sites]
    held = Restriction(scale, [None] * len(scale), held=True)
    with pytest.raises(RestrictionError, match=r"only a bool λ can be held, found numbers for relu1, relu2"):
        held.checked(network.index, network.device)
    inverted = Restriction([each > 1 for each in scale], [None] * len(scale), inverted=True, held=True)
    with network.restricted(inverted):
        given = x.clone().requires_grad_()
        value = network.respond(given, 1)
        (found,) = torch.autograd.grad(value.sum(), given)
    assert torch.equal(value, network.respond(x, 1))
    assert same(input_gradient(network, x, 1), [found])


# --- masked ---------------------------------------------------------------------------------------------------------


@every
def test_masked_gradients_are_autograds_of_the_masked_network(case: Case) -> None:
    model = case.model()
    network = case.trace(model)
    samples = network.samples(case.x(2))
    pathways = random_pathways(network, 2)
    target = network.original(samples).target
    with unchanged(model):
        found = floats(masked_gradient(network, samples, pathways))
    assert network._restriction is None
    given = samples.map(lambda leaf: leaf.detach().clone().requires_grad_(leaf.is_floating_point()))
    with network.masked(pathways):
        value = network.response(network(given.inputs), target)  # the original's class
    if value.requires_grad:
        expected = torch.autograd.grad(value.sum(), floats(given.inputs), allow_unused=True, materialize_grads=True)
        assert same(found, list(expected))
    else:
        assert not any(map(torch.any, found))


def test_masked_gradients_explain_the_class_of_the_original_network() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 1.0]]))
        model[2].bias.zero_()
    x = torch.ones(1, 2, dtype=torch.float64)
    network = fxpath.trace(model, x)
    pathways = Pathways(torch.tensor([[False, True]]), network.index)  # of the masked network it is class 1
    with network.masked(pathways):
        assert int(network(x).argmax()) == 1
    assert masked_gradient(network, x, pathways).tolist() == [[0, 0]]
    assert masked_gradient(network, x, pathways, 1).tolist() == [[0, 1]]


def test_masked_and_frozen_gradients_differ() -> None:
    """Where a pathway leaves out what switched a neuron on."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double().eval()
    with torch.no_grad():
        for layer, weight in ((model[0], [[1.0, 0.0], [0.0, 1.0]]), (model[2], [[-1.0, 2.0]]), (model[4], [[1.0]])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.zero_()
    x = torch.ones(1, 2, dtype=torch.float64)
    network = fxpath.trace(model, x)
    pathways = Pathways(torch.tensor([[True, False, True]]), network.index)
    assert fxpath.pathway_gradient(network, x, pathways).tolist() == [[-1, 0]]
    assert masked_gradient(network, x, pathways).tolist() == [[0, 0]]  # without the second neuron the third is dead


# --- empty pathways -------------------------------------------------------------------------------------------------


def test_empty_pathways_are_said() -> None:
    network, x = traced("Plain"), Samples(BY_NAME["Plain"].x(3), ids=["cat", "dog", "cow"])
    mask = random_pathways(network, 3).mask
    mask[1:] = False
    for gradient in (fxpath.pathway_gradient, masked_gradient):
        said = rf"^{gradient.__name__}: the pathway of sample 'dog', 'cow' keeps no neuron.*it is 0 everywhere"
        with pytest.warns(EmptyPathwaysWarning, match=said) as seen:
            found = gradient(network, x, Pathways(mask, network.index))
        assert seen[0].filename == __file__
        assert bool(found[0].any())
        assert not bool(found[1:].any())


def test_what_passes_around_all_sites_is_left_of_empty_pathways() -> None:
    """Here Φ = last(relu(conv(…))) + 2·conv(x): the gradient of an empty pathway is that of the second term."""
    case = BY_NAME["InPlaceReadBefore"]
    model = case.model()
    network, x = case.trace(model), case.x(2)
    nothing = Pathways(torch.zeros((1, network.index.size), dtype=torch.bool), network.index)
    with pytest.warns(EmptyPathwaysWarning, match=r"sample 0, 1 keeps.*what reaches the response through no site") as w:
        found = fxpath.pathway_gradient(network, x, nothing, 1)
    assert "everywhere" not in str(w[0].message)
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.head(2 * model.conv1(given))[:, 1].sum(), given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert bool(found.any())
    with pytest.warns(EmptyPathwaysWarning, match="through no site"):  # behind all sites
        assert bool(fxpath.pathway_gradient(traced("MLP"), BY_NAME["MLP"].x(2), empty("MLP"), wrt="4").any())


def empty(name: str) -> Pathways:
    index = traced(name).index
    return Pathways(torch.zeros((1, index.size), dtype=torch.bool), index)


def test_other_pathways_warn_of_nothing() -> None:
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    single = torch.zeros((2, network.index.size), dtype=torch.bool)
    single[:, 3] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxpath.pathway_gradient(network, x, Pathways(single, network.index))


# --- at an embedding ------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(5, 6)
        self.fc, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        h = F.relu(self.fc(self.words(ids) + self.places(torch.arange(ids.shape[1]))))
        return self.head((h if weights is None else h * weights.unsqueeze(2)).mean(1))


def test_whole_numbers_are_refused_and_their_embedding_is_named() -> None:
    torch.manual_seed(0)
    model, ids = Tokens().double().eval(), torch.tensor([[1, 2, 3], [4, 5, 10]])
    network = fxpath.trace(model, ids)
    pathways = fxpath.NeuronMCT().scores(network, ids).pathways(0.5)
    with pytest.raises(InputError, match=r"found whole numbers alone.* embedding: wrt='words'$"):
        fxpath.pathway_gradient(network, ids, pathways)
    found = fxpath.pathway_gradient(network, ids, pathways, wrt="words")
    # by hand: the same network, from the vectors on
    vectors = model.words(ids).detach().requires_grad_()
    z = model.fc(vectors + model.places(torch.arange(3)))
    a = torch.where(pathways.mask.view(2, 3, 7), F.relu(z), F.relu(z).detach())
    logits = model.head(a.mean(1))
    (expected,) = torch.autograd.grad(logits.amax(1).sum(), vectors)
    assert found.shape == (2, 3, 6)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_whole_numbers_beside_floating_point_ones() -> None:
    model, ids = Tokens().eval(), torch.tensor([[1, 2, 3], [4, 5, 10]])
    inputs = {"ids": ids, "weights": torch.rand(2, 3)}
    network = fxpath.trace(model, inputs)
    found = fxpath.pathway_gradient(network, inputs, random_pathways(network, 2))
    assert set(found) == {"ids", "weights"}
    assert found["ids"] is None
    assert found["weights"].shape == (2, 3)
    assert bool(found["weights"].any())


def test_an_input_of_another_branch_is_refused() -> None:
    """The gradient at x is of the network as it is at x, not of the branch that the example took."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc(x))
            if x.sum() > 0:
                h = h * 2
            return self.head(h)

    torch.manual_seed(0)
    model, x = Branching().eval(), torch.rand(2, 5)
    with pytest.warns(TraceWarning):
        network = fxpath.trace(model, x, fix_branches=True)
    pathways = random_pathways(network, 2, 2.0)
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(given).amax(1).sum(), given)
    torch.testing.assert_close(fxpath.pathway_gradient(network, x, pathways), expected)
    for wrt in (None, "fc"):
        with pytest.raises(BranchError):
            fxpath.pathway_gradient(network, -x, pathways, wrt=wrt)


def test_bad_input() -> None:
    model, ids = Tokens().eval(), torch.tensor([[1, 2, 3], [4, 5, 10]])
    network = fxpath.trace(model, ids)
    pathways = random_pathways(network, 2)
    with pytest.raises(InputError, match=r"wrt: there is no node 'word'; nearest: words"):
        fxpath.pathway_gradient(network, ids, pathways, wrt="word")
    with pytest.raises(InputError, match=r"wrt: expected a node that gives a floating-point tensor, found arange"):
        fxpath.pathway_gradient(network, ids, pathways, wrt="arange")
    with pytest.raises(RestrictionError, match=r"there are 3 pathways for 2 samples"):
        fxpath.pathway_gradient(network, ids, random_pathways(network, 3), wrt="words")
    with pytest.raises(RestrictionError, match=r"expected Pathways, found Tensor"):
        fxpath.pathway_gradient(network, ids, pathways.mask, wrt="words")
    with network.masked(pathways), pytest.raises(RestrictionError, match="restricted already"):
        fxpath.pathway_gradient(network, ids, pathways, wrt="words")
    for gradient in (masked_gradient, lambda *given: input_gradient(*given[:2])):
        with network.masked(pathways), pytest.raises(RestrictionError, match="restricted already"):
            gradient(network, ids, pathways)
    with pytest.raises(InputError, match=r"masked_gradient: expected floating-point inputs, found whole numbers"):
        masked_gradient(network, ids, pathways)


def test_pathways_of_another_network_are_refused() -> None:
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    for gradient in (fxpath.pathway_gradient, masked_gradient):
        with pytest.raises(RestrictionError, match=r"of another index \(NeuronIndex\(2 sites, 39 neurons"):
            gradient(network, x, random_pathways(traced("ReusedReLU"), 2))
        channels = random_pathways(traced("Plain", "channel"), 2)
        with pytest.raises(RestrictionError, match="of another index"):
            gradient(network, x, channels)


def test_responses_that_are_not_finite_are_refused() -> None:
    network, x = fxpath.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.ones(2, 3)), None
    x = torch.stack([torch.ones(3), torch.full((3,), 1e38)])
    network.response = OutputFunction(lambda output: output.sum(1) * 100)
    with pytest.raises(SampleError, match=r"NaN or infinite for sample 'b'"):
        fxpath.pathway_gradient(network, Samples(x, ids=["a", "b"]), everything(network))


# --- maps -----------------------------------------------------------------------------------------------------------


def test_pixel_scores() -> None:
    maps = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-4.0, 2.0, 1.0, 0.0], [2.0, 0.5, -1.0, 0.0]]).view(1, 3, 2, 2)
    expected = {
        "max_abs": [[4.0, 2.0], [3.0, 0.0]],
        "signed_max": [[-4.0, -2.0], [3.0, 0.0]],  # of −2 and 2 the first channel's
        "signed_sum": [[-1.0, 0.5], [3.0, 0.0]],
    }
    for reduction, scores in expected.items():
        assert pixel_scores(maps, reduction).tolist() == [scores]
        assert pixel_scores(maps.flatten(2), reduction).shape == (1, 4)
        assert torch.equal(pixel_scores(torch.cat([maps, 2 * maps]), reduction)[1], 2 * torch.tensor(scores))
    assert torch.equal(pixel_scores(maps), pixel_scores(maps, "max_abs"))


def test_opening() -> None:
    scores = torch.zeros(2, 9, 11)
    scores[0, 2, 3] = 7.0  # a pixel
    scores[0, 5:8, 5:8] = 2.0  # a block of 3×3 …
    scores[0, 6, 6] = 5.0  # … with a peak
    scores[1, 4, :] = 3.0  # a line
    scores[1, :2, :3] = 1.0  # a block in the corner: beyond the border the image goes on as its mirror image
    found = opened(scores)
    expected = torch.zeros(2, 9, 11)
    expected[0, 5:8, 5:8] = 2.0
    expected[1, :2, :3] = 1.0
    assert torch.equal(found, expected)
    assert torch.equal(opened(found), found)
    assert torch.equal(opened(scores, 1), scores)
    assert not bool(opened(scores, 5)[0].any())
    for size in (2, 3, 4, 5):
        random = torch.rand(3, 12, 10)
        smaller = opened(random, size)
        assert bool((smaller <= random).all())
        assert torch.equal(opened(smaller, size), smaller)
        assert not torch.equal(smaller, random)
        block = torch.zeros(1, 12, 12)
        block[:, 4 : 4 + size, 5 : 5 + size] = 1.0
        assert torch.equal(opened(block, size), block)
        assert not bool(opened(block, size + 1).any())


def test_openings_keep_samples_and_types_apart() -> None:
    scores = torch.rand(3, 7, 7, dtype=torch.float64)
    whole = opened(scores)
    assert whole.dtype == torch.float64
    assert all(torch.equal(opened(scores[row : row + 1])[0], whole[row]) for row in range(3))
    for kind in (torch.float16, torch.bfloat16):
        found = opened(scores.to(kind))
        assert found.dtype == kind
        assert torch.equal(found.double(), opened(scores.to(kind).double()))
    line = torch.tensor([[0.0, 5.0, 0.0, 4.0, 4.0, 4.0, 0.0]])
    assert opened(line).tolist() == [[0, 0, 0, 4, 4, 4, 0]]
    cube = F.pad(torch.ones(1, 3, 3, 3), (2,) * 6)
    assert torch.equal(opened(cube), cube)
    assert not bool(opened(cube[:, :, :, ::2]).any())


def test_maps_that_will_not_do() -> None:
    maps, broken = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"no reduction 'max'; nearest: .*max_abs"):
        pixel_scores(maps, "max")
    for wrong, found in ((maps[0, 0], r"float32 \(4, 4\)"), (maps.long(), "int64"), (maps.numpy(), "ndarray")):
        with pytest.raises(InputError, match=rf"pixel scores: expected floating-point maps \(B, C, H, W\), .*{found}"):
            pixel_scores(wrong)
    for wrong, found in ((maps[0, 0, 0], r"float32 \(4,\)"), (maps > 0, "bool")):
        with pytest.raises(InputError, match=rf"opening: expected floating-point score maps \(B, H, W\), .*{found}"):
            opened(wrong)
    with pytest.raises(InputError, match=r"pixel scores: the map of row 1 holds NaN"):
        pixel_scores(broken)
    with pytest.raises(InputError, match=r"opening: the map of row 1 holds NaN"):
        opened(broken[:, 0])
    for size in (0, -3, True, 2.5, "3"):
        with pytest.raises(InputError, match=rf"opening: expected a size of 1 pixel or more, found {size!r}"):
            opened(maps[:, 0], size)
