"""The pathway gradient: the plain one at sparsity 0, the frozen network's else, at inputs or at an embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from footprint import unchanged
from networks import CASES, Case
from torch import Tensor, nn

import fxpath
from fxpath.errors import BranchError, InputError, RestrictionError, TraceWarning


def random_pathways(network: fxpath.Network, batch: int, share: float = 0.5) -> fxpath.Pathways:
    generator = torch.Generator().manual_seed(1)
    return fxpath.Pathways(torch.rand(batch, network.index.size, generator=generator) < share, network.index)


def floats(x: object) -> list[Tensor]:
    return [
        leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_the_gradient_of_the_frozen_network(case: Case) -> None:
    model = case.model()
    network = case.trace(model)
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
