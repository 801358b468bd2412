"""Greedy pruning: a network worked by hand, a naive descent beside it, what e means, and how samples end."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from footprint import require_clean_failures
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BY_NAME, CASES, Case, traced
from small_jobs import cifar, run, seven, small
from small_jobs import inputs as pictures
from test_leaks import Sighted, tensors, unchanged, uncollected
from test_leaks import traced as watched
from torch import Tensor, nn

import fxpath
from fxpath import progress
from fxpath.errors import InputError, RestrictionError, SampleError, SparsityError
from fxpath.gates import grouped
from fxpath.network import Network
from fxpath.pathways import Pathways
from fxpath.samples import Samples
from fxpath.selectors import pruning, smallest
from fxpath.selectors.pruning import Descent, GreedyPruning
from fxpath.selectors.registry import family, parameters, parse

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
both = pytest.mark.parametrize("granularity", ["unit", "channel"])
LEVELS = (0.0, 0.2, 0.5, 0.8, 0.9, 0.99)


# --- by hand --------------------------------------------------------------------------------------------------------


class Dozen(nn.Module):
    """Six neurons h = relu(x), six neurons k of them, and one class of those; the other class always has 10.

    With x = (1, 2, 3, 4, 5, −1) the sixth h is dead, and so are the first and the sixth k until h₁ is removed:
    k = relu(h₂ − 3h₁, h₁ + 1, h₃, h₄, h₅, h₂ − 2h₁).
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)
        with torch.no_grad():
            self.inner.weight.copy_(torch.tensor(
                [[-3.0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0],
                 [-2, 1, 0, 0, 0, 0]]
            ))  # fmt: skip
            self.inner.bias.copy_(torch.tensor([0.0, 1, 0, 0, 0, 0]))
            self.outer.weight.copy_(torch.tensor([[1, 0.5, 1, 1, 1, 0.25], [0] * 6]))
            self.outer.bias.copy_(torch.tensor([0.0, 10]))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(torch.relu(x))))


DOZEN = torch.tensor([[1.0, 2, 3, 4, 5, -1]], dtype=torch.float64)


@pytest.fixture(scope="module")
def dozen() -> Network:
    return fxpath.trace(Dozen().double().eval(), DOZEN)


def bits(text: str) -> list[bool]:
    return [bit == "1" for bit in text.replace(" ", "")]


# scores of h and k; Φ; e; what is removed: of k₂ and k₆, h₂ and k₁, h₃ and k₃, … with equal scores the larger index
BY_HAND = [
    ((0.5, 0, 3, 4, 5, 0, 0, 1, 3, 4, 5, 0), 13, "111110 011110", 0),
    ((0, 2.5, 3, 4, 5, 0, 2, 0.5, 3, 4, 5, 0.5), 15, "011110 111111", 11),
    ((0, 2, 3, 4, 5, 0, 2, 0.5, 3, 4, 5, 0), 14.5, "011110 111110", 7),
    ((0, 2, 3, 4, 5, 0, 2, 0, 3, 4, 5, 0), 14, "011110 101110", 6),
    ((0, 0, 3, 4, 5, 0, 0, 0, 3, 4, 5, 0), 12, "011110 001110", 8),
    ((0, 0, 0, 4, 5, 0, 0, 0, 0, 4, 5, 0), 9, "011110 000110", 9),
    ((0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 5, 0), 5, "011110 000010", 10),
    ((0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), 0, "011110 000000", None),
]


def test_a_dozen_neurons_by_hand(dozen: Network) -> None:
    descent = Descent(dozen, DOZEN, (0.95,), 0.08)  # ⌈0.96⌉ = 1 at a time
    mask = torch.ones(1, 12, dtype=torch.bool)
    states = iter(descent)
    for number, (scores, response, effective, removed) in enumerate(BY_HAND):
        with dozen.masked(Pathways(mask, dozen.index)):  # what the table says of this mask
            products, at = dozen.signed_products(DOZEN, 0)
        assert products.abs().tolist() == [list(scores)]
        assert at.response.tolist() == [response]
        assert (mask & (dozen.rows(at.activations) != 0)).tolist() == [bits(effective)]
        next(states)
        assert descent.state == number
        assert descent.effective.tolist() == [sum(bits(effective))]
        if removed is not None:
            mask[0, removed] = False
        assert torch.equal(descent.mask, mask)
    assert next(states, None) is None
    assert descent.stopped == {0: "exhausted"}


def test_what_is_selected_of_the_dozen(dozen: Network) -> None:
    levels = (0.25, 0.3, 0.5, 0.65, 0.9)  # at most 9, 8, 6, 4 and 1 neurons
    selection = GreedyPruning(share=0.08).select(dozen, DOZEN, levels)
    states = {0.25: 0, 0.3: 3, 0.5: 5, 0.65: 7}
    for level, state in states.items():
        assert selection[level].mask.tolist() == [bits(BY_HAND[state][2])]
    said = "no neuron with a non-zero score is left; |e| stays at 0.3333 of N, 0.1 was asked for"
    assert selection.missing == {0.9: [f"greedy pruning: {said}"]}
    with pytest.raises(
        SparsityError, match=r"0\.9 was not reached by sample 0 of the batch: greedy pruning: no neuron"
    ):
        selection[0.9]

    found = selection.by_sparsity
    assert [int(found[level]["iteration"]) for level in levels] == [0, 3, 5, 7, -1]
    expected = {
        "mask_density": [1, 9 / 12, 7 / 12, 5 / 12, math.nan],
        "scored": [8 / 12, 8 / 12, 4 / 12, 0, math.nan],
        "dead_share": [0, 1 / 8, 0, 0, math.nan],
        "dead_share_scored": [0, 1 / 8, 0, math.nan, math.nan],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal([float(found[level][name]) for level in levels], values, err_msg=name)
        assert found[0.3][name].dtype == torch.float64
    assert found[0.3]["iteration"].dtype == torch.int32

    series = selection.diagnostics
    blank = [math.nan] * 6  # ⌈1 / 0.08⌉ + 1 states at most
    sizes = [sum(bits(effective)) for _, _, effective, _ in BY_HAND]
    assert sizes == [9, 10, 9, 8, 7, 6, 5, 4]  # it rises: two are switched on
    np.testing.assert_array_equal(series["responses"], [[each[1] for each in BY_HAND] + blank])
    np.testing.assert_array_equal(series["effective"], [[size / 12 for size in sizes] + blank])
    np.testing.assert_array_equal(series["remaining"], [[left / 12 for left in range(12, 4, -1)] + blank])
    assert series["same_class"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0] + [-1] * 6]
    assert series["same_class"].dtype == torch.int8
    assert series["iterations"].tolist() == [7]
    assert series["exhausted"].tolist() == [True]
    assert (series["iterations"].dtype, series["exhausted"].dtype) == (torch.int32, torch.bool)


def test_it_stops_where_the_last_sparsity_is_reached(dozen: Network) -> None:
    selection = GreedyPruning(share=0.08).select(dozen, DOZEN, (0.3, 0.25))
    assert list(selection) == [0.3, 0.25]
    assert selection.missing == {}
    assert selection.diagnostics["iterations"].tolist() == [3]
    assert selection.diagnostics["exhausted"].tolist() == [False]
    assert selection.diagnostics["responses"].isfinite().sum().item() == 4
    none = GreedyPruning().select(dozen, DOZEN, ())
    assert len(none) == 0
    assert none.diagnostics["iterations"].tolist() == [0]


def test_a_larger_share_removes_several_at_a_time(dozen: Network) -> None:
    """⌈0.2 · 12⌉ = 3: h₁, k₂ and k₃ (3 as h₃ has, but of larger index); then k₆, k₁ and h₂; h₄, k₄ and k₅ …"""
    masks = []
    for descent in Descent(dozen, DOZEN, (0.99,), 0.2):
        masks.append(descent.mask[0].tolist())
    assert masks == [bits("011111 100111"), bits("001111 000110"), bits("001011 000000"), bits("001011 000000")]
    assert descent.effective.tolist() == [2]
    assert descent.iterations.tolist() == [3]


def test_the_share_is_the_decimal_that_was_typed() -> None:
    """0.07 · 100 is 7, and in binary floats a little more."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(100, 2)).double().eval()
    x = torch.arange(1.0, 101, dtype=torch.float64).unsqueeze(0)
    selection = GreedyPruning(share=0.07).select(fxpath.trace(model, x), x, (0.7,))
    assert math.ceil(0.07 * 100) == 8
    assert selection.diagnostics["remaining"][0, :6].tolist() == [1, 0.93, 0.86, 0.79, 0.72, 0.65]
    assert selection[0.7].count.tolist() == [30]


def test_samples_whose_gradient_is_zero_are_missing(dozen: Network) -> None:
    """Of the second sample only k₂ = 1 is live; the class it is explained for is that of the constant 10."""
    x = torch.cat([DOZEN, -DOZEN.abs(), DOZEN])
    selection = GreedyPruning(share=0.08).select(dozen, x, (0.3, 0.95))
    reasons = selection.missing[0.95]
    assert "no neuron has a non-zero score: the response has no gradient where a ≠ 0; |e| stays at 0.0833" in reasons[1]
    assert reasons[0] == reasons[2]
    assert "no neuron with a non-zero score is left" in reasons[0]
    assert selection.diagnostics["iterations"].tolist() == [7, 0, 7]
    assert selection.diagnostics["exhausted"].tolist() == [True, True, True]
    assert selection[0.3].mask[1].tolist() == bits("000000 010000")  # it is small enough as it is
    assert 0.95 not in selection.pathways
    zero = GreedyPruning().select(dozen, Samples(x[:1], 1), (0.9,))  # the class of the constant, where much is live
    assert "the response has no gradient" in zero.missing[0.9][0]
    assert zero.diagnostics["iterations"].tolist() == [0]


# --- beside a naive descent -----------------------------------------------------------------------------------------


@dataclass
class Naive:
    masks: dict[float, Tensor] = field(default_factory=dict)
    iteration: dict[float, int] = field(default_factory=dict)
    mask_density: dict[float, float] = field(default_factory=dict)
    scored: dict[float, float] = field(default_factory=dict)
    dead: dict[float, float] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    responses: list[float] = field(default_factory=list)
    same: list[int] = field(default_factory=list)
    end: str = ""


def naive(network: Network, x: Any, share: str, levels: Sequence[float], target: int | None = None) -> Naive:
    """Algorithm 1 for one sample: everything is sorted, in Python."""
    index, found = network.index, Naive()
    weights = index.weights.tolist()
    total = sum(weights)
    logits = network.response.logits(network(x))
    prediction = None if logits is None else int(logits.argmax())
    target = prediction if target is None else target
    alive = [bool(bit) for bit in network.original(x).active[0]]
    mask = [True] * index.size
    while True:
        with network.masked(Pathways(torch.tensor([mask]), index)):
            at = network.gradients(x, target)
        scores, nonzero = [], []
        for site, a, slope in zip(network.sites, at.activations, at.gradients, strict=True):
            scores += grouped(a * slope, site)[0].abs().tolist()
            nonzero += grouped((a != 0).double(), site)[0].tolist()
        effective = [bool(kept and on) for kept, on in zip(mask, nonzero, strict=True)]
        size = sum(weight for weight, on in zip(weights, effective, strict=True) if on)
        found.sizes.append(size)
        found.responses.append(at.response.item())
        if prediction is not None:
            found.same.append(int(network.response.logits(at.output).argmax() == prediction))
        for level in levels:
            if level not in found.masks and size <= math.floor((1 - Fraction(str(level))) * total):
                found.masks[level], found.iteration[level] = torch.tensor(effective), len(found.sizes) - 1
                found.mask_density[level] = sum(w for w, bit in zip(weights, mask, strict=True) if bit) / total
                found.scored[level] = sum(w for w, s in zip(weights, scores, strict=True) if s) / total
                dead = sum(on and not was for on, was in zip(effective, alive, strict=True))
                found.dead[level] = dead / sum(effective) if any(effective) else math.nan
        order = sorted((score, -number) for number, score in enumerate(scores) if score != 0)
        if len(found.masks) == len(levels) or not order:
            found.end = "reached" if len(found.masks) == len(levels) else "exhausted"
            return found
        spent = 0
        for _, number in order:
            if spent < Fraction(share) * total:
                mask[-number] = False
                spent += weights[-number]


@both
@every
def test_the_descent_is_the_naive_one(case: Case, granularity: str) -> None:
    network, x = traced(case.name, granularity), case.x(3, seed=2)
    units = network.index.units
    selection = GreedyPruning(share=0.07).select(network, x, LEVELS)
    for row in range(3):
        alone = Samples(x).take([row])
        expected = naive(network, alone, "0.07", LEVELS)
        states = len(expected.sizes)
        for level in LEVELS:
            details = {name: values[row].item() for name, values in selection.by_sparsity[level].items()}
            if level not in expected.masks:
                assert selection.reasons(level, 3)[row]
                assert details["iteration"] == -1
                assert math.isnan(details["mask_density"])
                assert level not in selection.pathways or not selection.pathways[level].mask[row].any()
                continue
            assert selection.reasons(level, 3)[row] == ""
            assert torch.equal(selection.pathways[level].mask[row], expected.masks[level])
            assert details["iteration"] == expected.iteration[level]
            assert details["mask_density"] == pytest.approx(expected.mask_density[level], abs=1e-12)
            assert details["scored"] == pytest.approx(expected.scored[level], abs=1e-12)
            assert details["dead_share"] == pytest.approx(expected.dead[level], nan_ok=True)
        series = selection.diagnostics
        assert series["exhausted"][row].item() == (expected.end == "exhausted")
        assert series["iterations"][row].item() == states - 1
        np.testing.assert_allclose(series["responses"][row, :states], expected.responses, rtol=1e-9, atol=1e-12)
        assert series["effective"][row, :states].tolist() == [size / units for size in expected.sizes]
        assert series["same_class"][row, :states].tolist() == (expected.same or [-1] * states)
        for name in ("responses", "effective", "remaining"):
            assert series[name].shape == (3, 16)
            assert series[name][row, :states].isfinite().all()
            assert series[name][row, states:].isnan().all()


def test_the_cases_show_what_is_to_be_seen() -> None:
    """Else the comparison would say little: dead neurons in e, classes that return, |e| that rises, both ends."""
    dead, lost, rising, ends = 0, 0, 0, set()
    for case in CASES:
        if case.tracer != "symbolic_trace":  # the others take longer
            continue
        selection = GreedyPruning(share=0.07).select(traced(case.name), case.x(3, seed=2), LEVELS)
        shares = [found["dead_share"] for found in selection.by_sparsity.values()]
        dead += int(any(bool((share > 0).any()) for share in shares))
        same, sizes = selection.diagnostics["same_class"].numpy(), selection.diagnostics["effective"].numpy()
        lost += int(((same[:, :-1] == 0) & (same[:, 1:] == 1)).any())
        rising += int((np.diff(sizes) > 0).any())
        ends |= set(selection.diagnostics["exhausted"].tolist())
    assert dead > 5
    assert lost > 0
    assert rising > 0
    assert ends == {True, False}


@both
@pytest.mark.parametrize("name", ["Functional", "Concat", "OverlappingPool", "SqueezeExcitation", "Break", "Leaky"])
def test_what_is_removed(name: str, granularity: str) -> None:
    """Masks only shrink; what goes has the lowest non-zero scores of its state; a score of 0 stays for ever."""
    network, x = traced(name, granularity), BY_NAME[name].x(3, seed=1)
    weights = torch.as_tensor(network.index.weights)
    before = torch.ones(3, network.index.size, dtype=torch.bool)
    target = network.original(x).target
    descent, step = Descent(network, x, (0.999,), 0.1), math.ceil(Fraction("0.1") * network.index.units)
    for _ in descent:
        with network.masked(Pathways(before, network.index)):
            scores = network.signed_products(x, target)[0].abs()
        after = descent.mask
        assert not bool((after & ~before).any())
        gone = before & ~after
        assert bool((scores[gone] > 0).all())
        for row in range(3):
            own, left = scores[row][gone[row]], scores[row][after[row] & (scores[row] > 0)]
            if own.numel() and left.numel():
                assert own.max() <= left.min()
                spent = int(weights[gone[row]].sum())
                assert step <= spent < step + int(weights[gone[row]].max())
        before = after


# --- what e means ---------------------------------------------------------------------------------------------------


def require_that_e_answers(network: Network, x: Any, share: float, level: float = 0.999) -> list[Tensor]:
    """Masking all that is not in e as well changes no bit of the output, at any state; its states' e."""
    masks = torch.ones(Samples(x).batch, network.index.size, dtype=torch.bool)
    found = []
    for descent in Descent(network, x, (level,), share):
        with network.masked(Pathways(masks, network.index)):
            output = network(x)
            values = network.activations(x)
        nonzero = torch.cat([grouped(a != 0, site) > 0 for site, a in zip(network.sites, values, strict=True)], dim=1)
        effective = masks & nonzero
        with network.masked(Pathways(effective, network.index)):
            others = network(x)
            for kept, other in zip(values, network.activations(x), strict=True):
                assert torch.equal(kept, other)
        for one, other in zip(*map(torch.utils._pytree.tree_leaves, (output, others)), strict=True):
            assert torch.equal(one, other)
        masks = descent.mask
        found.append(effective)
    return found


@both
@every
def test_masking_all_that_is_not_in_e_changes_no_bit(case: Case, granularity: str) -> None:
    network, x = traced(case.name, granularity), case.x(2, seed=3)
    effective = require_that_e_answers(network, x, 0.15)
    sizes = [Pathways(each, network.index).count.tolist() for each in effective]
    for level in (0.3, 0.6):
        selection = GreedyPruning(share=0.15).select(network, x, (level,))
        for row, state in enumerate(selection.by_sparsity[level]["iteration"].tolist()):
            if state < 0:
                assert all(size[row] > network.index.kept(level) for size in sizes)
                continue
            assert torch.equal(selection.pathways[level].mask[row], effective[state][row])
            assert sizes[state][row] <= network.index.kept(level)
            assert all(size[row] > network.index.kept(level) for size in sizes[:state])  # the first


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_on_real_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    network = fxpath.trace(model, x)
    effective = require_that_e_answers(network, x, 0.1)
    assert len(effective) > 4
    levels = (0.5, 0.7, 0.8)
    selection = GreedyPruning(share=0.1).select(network, x, levels)
    for level in levels:
        for row, state in enumerate(selection.by_sparsity[level]["iteration"].tolist()):
            assert state < 0 or torch.equal(selection.pathways[level].mask[row], effective[state][row])
    reached = [level for level in levels if not any(selection.reasons(level, 2))]
    assert reached
    target = network.original(x).target
    with network.masked(selection[reached[-1]]):
        answer = network.respond(x, target)
    states = selection.by_sparsity[reached[-1]]["iteration"].long().unsqueeze(1)
    assert torch.equal(answer.double(), selection.diagnostics["responses"].gather(1, states)[:, 0])
    alone = GreedyPruning(share=0.1).select(network, x[1:], (0.5,))
    together = selection[0.5].take([1])
    assert float(alone[0.5].jaccard(together)) > 0.99


def test_one_descent_for_several_sparsities_is_that_of_each() -> None:
    for name, granularity in itertools.product(
        ("Plain", "ResidualOntoReLU", "Rectifiers", "Norms"), ("unit", "channel")
    ):
        network, x = traced(name, granularity), BY_NAME[name].x(4, seed=5)
        together = GreedyPruning(share=0.03).select(network, x, LEVELS[::-1])
        for level in LEVELS:
            single = GreedyPruning(share=0.03).select(network, x, (level,))
            assert single.missing.get(level) == together.missing.get(level)
            assert (level in single.pathways) == (level in together.pathways)
            if level in single.pathways:
                assert torch.equal(single.pathways[level].mask, together.pathways[level].mask)
            for label, values in single.by_sparsity[level].items():
                torch.testing.assert_close(together.by_sparsity[level][label], values, rtol=0, atol=0, equal_nan=True)


@both
def test_a_sample_does_not_depend_on_its_neighbours(granularity: str) -> None:
    for name in ("Functional", "ReusedReLU", "Concat", "ChunkInPlace"):
        network, x = traced(name, granularity), Samples(BY_NAME[name].x(5, seed=6))
        selector = GreedyPruning(share=0.04)
        whole = selector.select(network, x, LEVELS)
        for order in ([4, 3, 2, 1, 0], [2], [1, 1, 1], [3, 0]):
            other = selector.select(network, x.take(order), LEVELS)
            for level in LEVELS:
                expected = [whole.reasons(level, 5)[row] for row in order]
                assert other.reasons(level, len(order)) == expected
                if level in other.pathways:
                    assert torch.equal(other.pathways[level].mask, whole.pathways[level].mask[order])
                iteration = whole.by_sparsity[level]["iteration"]
                assert torch.equal(other.by_sparsity[level]["iteration"], iteration[order])
            for label, values in whole.diagnostics.items():
                torch.testing.assert_close(
                    other.diagnostics[label], values[order], rtol=1e-10, atol=1e-12, equal_nan=True
                )


class Twins(nn.Module):
    """Neurons that count alike."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0, 2, 1, 2, 0, -2], [-9.0] * 6]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(x))


def test_of_equal_scores_the_larger_index_goes_first() -> None:
    network = fxpath.trace(Twins().double().eval(), torch.ones(1, 6, dtype=torch.float64))
    x = torch.ones(1, 6, dtype=torch.float64)
    gone = []
    before = torch.ones(1, 6, dtype=torch.bool)
    for descent in Descent(network, x, (0.9,), 0.1):
        after = descent.mask
        gone += torch.nonzero(before & ~after)[:, 1].tolist()
        before = after
    assert gone == [2, 0, 5, 3, 1]  # 1, 1, 2, 2, 2 in size; the fifth has no say
    kept = [int(fxpath.NeuronMCT().select(network, x, (level,))[level].count) for level in (0.2, 0.4, 0.6)]
    assert kept == [4, 3, 2]
    for level, state in ((0.2, 1), (0.4, 2), (0.6, 3)):
        mct = fxpath.NeuronMCT().select(network, x, (level,))[level].mask
        rest = torch.ones(1, 6, dtype=torch.bool)
        rest[0, [4, *gone[:state]]] = False
        assert torch.equal(mct, rest)  # what is left is what a threshold of contributions keeps


# --- the smallest of many -------------------------------------------------------------------------------------------


def by_sorting(scores: np.ndarray[Any, Any], count: int) -> list[int]:
    order = sorted((score, -number) for number, score in enumerate(scores.tolist()) if score > 0)
    return sorted(-number for _, number in order[:count])


def pruned(
    values: Sequence[np.ndarray[Any, Any]], slopes: Sequence[np.ndarray[Any, Any]], count: int
) -> np.ndarray[Any, Any]:
    sizes = [value.size for value in values]
    scan = smallest.Scan(sizes, np.result_type(*values, *slopes))
    return scan.smallest(values, slopes, count, np.empty(sum(sizes), dtype=np.bool_))[0]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]], int]:
    sizes = draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from([np.float32, np.float64]))
    levels = draw(st.integers(1, 50))  # few: many ties
    zeros = draw(st.floats(0, 1))
    made = []
    for size in (*sizes, *sizes):
        values = (
            random.integers(1, levels + 1, size) * random.choice([-1, 1], size) * (random.random(size) > zeros)
        ) / 8
        made.append(values.astype(kind))
    return made[: len(sizes)], made[len(sizes) :], draw(st.integers(1, sum(sizes) + 3))


@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from([1, 7, 64, 10_000]), st.floats(0, 20), st.sampled_from([2, 20, 8192]))
def test_the_smallest_are_those_of_a_sort(
    drawn: tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]], int], block: int, before: float, sample: int
) -> None:
    values, slopes, count = drawn
    scores = np.abs(np.concatenate(values) * np.concatenate(slopes))
    expected = by_sorting(scores, count)
    effective = np.empty(scores.size, dtype=np.bool_)
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("_BLOCK", block), ("_SAMPLE", sample)):
            patch.setattr(smallest, name, number)
        scan = smallest.Scan([value.size for value in values], values[0].dtype)
        for hint in (None, before):
            found, largest = scan.smallest(values, slopes, count, effective, hint)
            assert sorted(found.tolist()) == expected
            if largest is None:
                assert len(expected) == np.count_nonzero(scores)
            else:
                assert largest == scores[expected].max()
    np.testing.assert_array_equal(effective, np.concatenate(values) != 0)
    on_device = pruning._prune_on_device(torch.from_numpy(scores), count)
    assert sorted(on_device.tolist()) == by_sorting(scores, count)


def test_the_smallest_of_many() -> None:
    """More than a block, a bound from a sample, and a sample that does not tell: a few small ones in one place."""
    random = np.random.default_rng(0)
    sizes = (200_003, 70_001, 5)
    for spread in (1, 6):
        values = [random.standard_normal(size).astype(np.float32) ** spread for size in sizes]
        slopes = [(random.standard_normal(size) * (random.random(size) < 0.4)).astype(np.float32) for size in sizes]
        values[0][1000:5000] *= 1e-8
        scores = np.abs(np.concatenate(values) * np.concatenate(slopes))
        live = int(np.count_nonzero(scores))
        for count in (1, 50, 2700, 30_000, live - 1, live, live + 1):
            found = pruned(values, slopes, count)
            expected = np.lexsort((-np.arange(scores.size), scores))[scores.size - live :][:count]
            np.testing.assert_array_equal(np.sort(found), np.sort(expected))
    blind = np.linspace(1, 2, 800_000, dtype=np.float32)
    blind[:: 800_000 // 8192] = 1e-3  # all that the sample sees
    found = pruned([blind], [np.ones_like(blind)], 20_000)
    assert sorted(found.tolist()) == sorted(np.argsort(blind, kind="stable")[:20_000].tolist())
    tied = [np.ones(300_000, dtype=np.float32)]
    assert sorted(pruned(tied, tied, 1000).tolist()) == list(range(299_000, 300_000))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_seen(wrong: float) -> None:
    values = [np.ones(300, dtype=np.float32), np.ones(80, dtype=np.float32)]
    for site, place in ((0, 0), (0, 299), (1, 40)):
        slopes = [np.ones(300, dtype=np.float32), np.ones(80, dtype=np.float32)]
        for finite in (True, False):
            scan, effective = smallest.Scan((300, 80), np.float32), np.empty(380, dtype=np.bool_)
            scan.smallest(values, slopes, 5, effective)
            assert scan.finite == finite
            assert effective.all()
            slopes[site][place] = wrong
    slopes = [np.full(300, np.nan, dtype=np.float32)]
    assert pruned([np.zeros(300, dtype=np.float32)], slopes, 5).size <= 5  # it comes to an end


def test_the_smallest_channels_by_hand() -> None:
    scores = np.array([0.3, 0, 0.1, 0.3, 0.2, 0])
    weights = np.array([4, 4, 2, 2, 9, 9])
    for count, expected in (
        (1, [2]), (2, [2]), (3, [2, 4]), (11, [2, 4]), (12, [2, 4, 3]), (13, [2, 4, 3]), (14, [2, 4, 3, 0]),
        (17, [2, 4, 3, 0]), (99, [2, 4, 3, 0]),
    ):  # fmt: skip
        assert smallest.prune_channels(scores, count, weights).tolist() == expected
    assert smallest.prune_channels(np.zeros(6), 3, weights).size == 0
    assert smallest.prune_channels(np.ones(6), 10, weights).tolist() == [5, 4]


def test_a_channel_is_never_split() -> None:
    """Concat's channels have 25 units: with a share of 40 of 175 units two go at a time."""
    coarse, fine = traced("Concat", "channel"), traced("Concat")
    x = BY_NAME["Concat"].x(3, seed=1)
    share = 40 / 175
    for descent in Descent(coarse, x, (0.99,), share):
        left = (descent.gates != 0).sum(dim=1) * 25
        assert left.tolist() == descent.remaining.tolist()
    assert (descent.remaining < 175).all()
    remaining = GreedyPruning(share=share).select(coarse, x, (0.99,)).diagnostics["remaining"]
    assert torch.equal(remaining[:, 0], torch.ones(3, dtype=torch.float64))
    steps = (remaining[:, :-1] - remaining[:, 1:]) * 7
    sizes = np.round(steps[steps.isfinite()].numpy(), 9).tolist()
    assert set(sizes) <= {1.0, 2.0}
    assert sizes.count(2.0) >= 3
    selection = GreedyPruning(share=share).select(coarse, x, (0.5,))
    reached = selection.by_sparsity[0.5]["iteration"] >= 0
    assert bool(reached.any())
    assert bool((selection.pathways[0.5].count[reached] <= fine.index.kept(0.5)).all())
    assert set((selection.pathways[0.5].count % 25).tolist()) == {0}


# --- scores that are no numbers -------------------------------------------------------------------------------------


class Roots(nn.Module):
    """Φ = √(h₁ + 3 − h₂) + h₃ with h = relu(x); the other class has −9."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        value = torch.sqrt(h[:, 0] + 3 - h[:, 1]) + h[:, 2]
        return torch.stack([value, torch.full_like(value, -9)], 1)


def test_samples_without_finite_scores_are_named() -> None:
    fine, steep = [2.0, 4, 3], [1.0, 4, 3]  # √1 and √0, whose gradient is infinite
    x = torch.tensor([fine, steep, fine, steep], dtype=torch.float64)
    network = fxpath.trace(Roots().eval(), x[:1])
    assert network.respond(x).isfinite().all()
    for granularity in ("unit", "channel"):
        network = fxpath.trace(Roots().eval(), x[:1], granularity=granularity)
        with pytest.raises(
            SampleError, match=r"scores of sample 1, 3 of the batch are NaN or infinite; .* leave the"
        ) as e:
            GreedyPruning().select(network, x, (0.9,))
        assert e.value.positions == (1, 3)
        assert e.value.reasons == ("the scores of greedy_pruning are NaN or infinite",) * 2


def test_scores_may_become_no_numbers_on_the_way() -> None:
    """Without h₁ the root is that of −1. It scores 1, the others 2 and 3."""
    x = torch.tensor([[2.0, 4, 3], [2.0, 1, 3], [2.0, 0, 3]], dtype=torch.float64)
    for granularity in ("unit", "channel"):
        network = fxpath.trace(Roots().eval(), x[:1], granularity=granularity)
        selection = GreedyPruning().select(network, x, (0, 0.3, 0.9))
        assert selection[0].mask.tolist() == [[True] * 3, [True] * 3, [True, False, True]]
        reason = selection.missing[0.9][0]
        assert "scores became NaN or infinite when neurons had been removed 1 times; |e| was 1.0000 of N, 0.1" in reason
        assert selection.missing[0.3][0]
        assert selection.missing[0.3][1:] == ["", ""]
        assert selection.diagnostics["exhausted"][0].item() is False
        assert selection.diagnostics["iterations"].tolist()[0] == 1
        assert selection.pathways[0.3].mask[0].tolist() == [False] * 3
        assert selection.pathways[0.3].mask[1].any()


# --- targets and responses ------------------------------------------------------------------------------------------


def test_targets() -> None:
    network, case = traced("Functional"), BY_NAME["Functional"]
    x, selector = case.x(4, seed=2), GreedyPruning(share=0.05)
    predicted = network.original(x).target
    assert predicted is not None
    default = selector.select(network, x, (0.6,))
    given_as = selector.select(network, Samples(x, predicted), (0.6,))
    assert torch.equal(default.pathways[0.6].mask, given_as.pathways[0.6].mask)
    by_class = [selector.select(network, Samples(x, number), (0.6,)) for number in range(4)]
    for number, selection in enumerate(by_class):
        for row in range(4):
            expected = naive(network, x[row : row + 1], "0.05", (0.6,), number)
            assert torch.equal(selection.pathways[0.6].mask[row], expected.masks[0.6])
            states = len(expected.sizes)
            assert selection.diagnostics["same_class"][row, :states].tolist() == expected.same
            np.testing.assert_allclose(selection.diagnostics["responses"][row, :states], expected.responses)
    assert not torch.equal(by_class[0].pathways[0.6].mask, by_class[1].pathways[0.6].mask)
    mixed = selector.select(network, Samples(x, [3, 0, 1, 0]), (0.6,))
    for row, number in enumerate((3, 0, 1, 0)):
        assert torch.equal(mixed.pathways[0.6].mask[row], by_class[number].pathways[0.6].mask[row])
    with pytest.raises(InputError, match="expected a class in 0 … 3, found 4"):
        selector.select(network, Samples(x, 4), (0.6,))


@pytest.mark.parametrize("response", ["probability", "margin", lambda y: y.square().sum(1)])
def test_other_responses(response: Any) -> None:
    case = BY_NAME["Concat"]
    network, x = case.trace(response=response), case.x(3, seed=4)
    selection = GreedyPruning(share=0.05).select(network, x, (0.4, 0.7))
    for row in range(3):
        expected = naive(network, x[row : row + 1], "0.05", (0.4, 0.7))
        for level, mask in expected.masks.items():
            assert torch.equal(selection.pathways[level].mask[row], mask)
        states = len(expected.sizes)
        np.testing.assert_allclose(selection.diagnostics["responses"][row, :states], expected.responses)
        same = expected.same or [-1] * states
        assert selection.diagnostics["same_class"][row, :states].tolist() == same


def test_half_precision() -> None:
    for kind in (torch.bfloat16, torch.float16):
        model, x = BY_NAME["Plain"].model().to(kind), BY_NAME["Plain"].x(2).to(kind)
        for granularity in ("unit", "channel"):
            network = fxpath.trace(model, x, granularity=granularity)
            require_that_e_answers(network, x, 0.1)
            selection = GreedyPruning(share=0.1).select(network, x, (0.5,))
            assert bool((selection.pathways[0.5].count <= network.index.kept(0.5)).all())


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "share",
    [0, 1, -0.1, 1.5, math.nan, math.inf, True, "0.1", None, 10**400, Fraction(1, 10**400), 1 - Fraction(1, 10**40)],
)  # fmt: skip
def test_wrong_shares(share: Any) -> None:
    with pytest.raises(InputError, match=r"greedy_pruning: expected share in \(0, 1\), .*; for example 0\.01"):
        GreedyPruning(share=share)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("greedy_pruning", "greedy_pruning"),
        ("greedy_pruning:share=0.01", "greedy_pruning"),
        ("greedy_pruning:share=0.05", "greedy_pruning:share=0.05"),
        ("greedy_pruning:share=1e-3", "greedy_pruning:share=0.001"),
    ],
)
def test_names(text: str, name: str) -> None:
    selector = parse(text)
    assert isinstance(selector, GreedyPruning)
    assert str(family(selector)) == name
    assert parse(name) == selector
    assert GreedyPruning(**json.loads(json.dumps(parameters(selector)))) == selector
    assert parse(str(family(GreedyPruning(share=np.float64(0.25))))) == GreedyPruning(share=0.25)
    assert fxpath.GreedyPruning is GreedyPruning


def test_wrong_text() -> None:
    for text in ("greedy_pruning:share=x", "greedy_pruning:share=true", "greedy_pruning:shar=0.1"):
        with pytest.raises(InputError, match="selector 'greedy_pruning:"):
            parse(text)
    with pytest.raises(InputError, match=r"expected share in \(0, 1\)"):
        parse("greedy_pruning:share=1")


def test_wrong_sparsities_and_restrictions(dozen: Network) -> None:
    for wrong in ((1.0,), ("x",), (-0.1,)):
        with pytest.raises(SparsityError, match=r"in \[0, 1\)"):
            GreedyPruning().select(dozen, DOZEN, wrong)  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match="expected a sequence"):
        GreedyPruning().select(dozen, DOZEN, 0.9)  # type: ignore[arg-type]
    pathways = fxpath.Random().select(dozen, DOZEN, (0.5,))[0.5]
    for restricted in (dozen.masked(pathways), dozen.frozen(pathways, at=DOZEN)):
        with restricted, pytest.raises(RestrictionError, match="greedy_pruning: the network is restricted; leave the"):
            GreedyPruning().select(dozen, DOZEN, (0.5,))


@pytest.mark.parametrize(("share", "width"), [(0.3, 5), (0.25, 5), (0.5, 3), (0.99, 3), (0.0005, 1001)])
def test_how_long_a_descent_can_be(share: float, width: int) -> None:
    """Each but the last removal takes the share or more; no descent is longer, and a long one is cut in diagnostics."""
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    selection = GreedyPruning(share=share).select(network, x, (0.999,))
    assert selection.diagnostics["responses"].shape == selection.diagnostics["same_class"].shape == (2, width)
    assert bool((selection.diagnostics["iterations"] < width).all())


def test_a_descent_longer_than_its_diagnostics(dozen: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GreedyPruning(share=0.08).select(dozen, DOZEN, (0.3, 0.65, 0.9))
    monkeypatch.setattr(pruning, "_LONGEST", 4)
    cut = GreedyPruning(share=0.08).select(dozen, DOZEN, (0.3, 0.65, 0.9))
    assert torch.equal(cut[0.65].mask, whole[0.65].mask)
    assert cut.missing == whole.missing
    assert cut.diagnostics["iterations"].tolist() == [7]
    for name in ("responses", "effective", "remaining", "same_class"):
        assert torch.equal(cut.diagnostics[name], whole.diagnostics[name][:, :4])


# --- how it runs ----------------------------------------------------------------------------------------------------


class Elsewhere(Descent):
    """A descent that goes the accelerator's way."""

    def _selects_on_host(self) -> bool:
        return self.weights is not None


@every
def test_the_accelerators_way_leads_to_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = traced(case.name), case.x(3, seed=2)
    here = GreedyPruning(share=0.07).select(network, x, LEVELS)
    monkeypatch.setattr(pruning, "Descent", Elsewhere)
    there = GreedyPruning(share=0.07).select(network, x, LEVELS)
    require_equal(here, there, rounding=1e-13)  # images go channels last on the host


def require_equal(one: fxpath.Selection, other: fxpath.Selection, rounding: float = 0) -> None:
    assert list(one) == list(other)
    assert one.missing == other.missing
    for level in one:
        assert torch.equal(one.pathways[level].mask, other.pathways[level].mask)
    for level, found in one.by_sparsity.items():
        for name, values in found.items():
            torch.testing.assert_close(other.by_sparsity[level][name], values, rtol=0, atol=0, equal_nan=True)
    for name, values in one.diagnostics.items():
        near = rounding if name == "responses" else 0
        torch.testing.assert_close(other.diagnostics[name], values, rtol=near, atol=near, equal_nan=True)


def test_inference_mode_and_no_grad_change_nothing() -> None:
    network, x = traced("Concat"), BY_NAME["Concat"].x(2)
    expected = GreedyPruning(share=0.1).select(network, x, (0.5,))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            require_equal(GreedyPruning(share=0.1).select(network, x.clone(), (0.5,)), expected)


def test_its_bar_tells_states(dozen: Network, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    GreedyPruning().select(dozen, DOZEN, (0.9,))
    assert capsys.readouterr().err == ""  # under two seconds
    plain = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **named: plain(**{**named, "delay": 0, "mininterval": 0}))
    GreedyPruning(share=0.08).select(dozen, DOZEN, (0.9,))
    said = capsys.readouterr().err
    assert "greedy_pruning" in said
    assert "8/14" in said
    with progress.no_bars():
        GreedyPruning(share=0.08).select(dozen, DOZEN, (0.9,))
    assert capsys.readouterr().err == ""


@both
def test_nothing_is_left_behind(granularity: str) -> None:
    torch.manual_seed(0)
    model = Sighted().eval()
    x = torch.randn(3, 2, 6, 6)
    network, record = watched(model, x, granularity=granularity), model.relu.record
    selector = GreedyPruning(share=0.2)
    selector.select(network, x, (0.5, 0.95))
    before = x.clone()
    with uncollected():
        count = tensors()
        record.start()
        with unchanged(model, network._module):
            selector.select(network, x, (0.5, 0.95))
        runs = record.calls
        assert runs >= 3 * 4
        assert record.alive() == 0
        assert network._restriction is None
        call = partial(selector.select, network, x, (0.5, 0.95))
        require_clean_failures(network, model, record, range(1, runs + 1, 2), call)
        assert tensors() == count
        record.start()
        for _ in Descent(network, x, (0.95,), 0.2):
            assert record.alive() == 0  # nor between two states
            assert network._restriction is None
    assert torch.equal(x, before)


def test_a_pruning_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Sighted().eval(), torch.randn(3, 2, 6, 6)
    network, record = watched(model, x), model.relu.record

    def failing(*_: Any) -> Any:
        raise ArithmeticError("this scan fails")

    monkeypatch.setattr(smallest.Scan, "smallest", failing)
    with uncollected():
        count = tensors()
        record.start()
        failed = False
        try:
            GreedyPruning().select(network, x, (0.5,))
        except ArithmeticError as error:
            failed = "this scan fails" in str(error)
        assert failed
        assert record.alive() == 0
        assert network._restriction is None
        assert tensors() == count


def test_a_store_holds_it(tmp_path: Path) -> None:
    keys = ["greedy_pruning:share=0.05", "neuron_mct"]
    report = run(seven(), tmp_path / "run.h5", selectors=keys, sparsities=[0.3, 0.8, 0.999], micro_batch=3)
    assert report.failed == {}
    x = Samples(pictures()[:6], ids=[cifar().ids[row] for row in range(6)])
    halves = [
        GreedyPruning(share=0.05).select(small(), x.take(part), (0.3, 0.8, 0.999)) for part in ([0, 1, 2], [3, 4, 5])
    ]
    with fxpath.open_store(report.path) as store:
        own = [key for key in store.keys if key.startswith("greedy")]
        assert own == [f"greedy_pruning:share=0.05@{level}" for level in (0.3, 0.8, 0.999)]
        for key, level in zip(own, (0.3, 0.8, 0.999), strict=True):
            outcomes = store.outcomes(key)
            for half, selection in enumerate(halves):
                reasons = selection.reasons(level, 3)
                for row in range(3):
                    place = 3 * half + row
                    stored = store.mask(key, place)
                    if reasons[row]:
                        assert str(store.column(key, "missing")[place].astype(str)) == reasons[row]
                        assert not stored.any()
                        assert np.isnan(outcomes["density"][place])
                    else:
                        np.testing.assert_array_equal(stored, selection.pathways[level].mask[row].numpy())
                    for name, values in {**selection.diagnostics, **selection.by_sparsity[level]}.items():
                        found = store.column(key, f"diagnostics/{name}")[place]
                        np.testing.assert_array_equal(found, values[row].numpy(), err_msg=name)
        assert any(halves[0].reasons(0.999, 3))
        assert not any(halves[0].reasons(0.3, 3))


@pytest.mark.gpu
def test_the_device_selects_what_the_host_does() -> None:
    for name, granularity in itertools.product(("Plain", "Concat", "OverlappingPool", "MLP"), ("unit", "channel")):
        case = BY_NAME[name]
        x = case.x(4, seed=7)
        host = case.trace(granularity=granularity)
        there = fxpath.trace(case.model().to("cuda"), x.to("cuda"), granularity=granularity)
        here = GreedyPruning(share=0.05).select(host, x, LEVELS)
        found = GreedyPruning(share=0.05).select(there, x.to("cuda"), LEVELS)
        assert found.missing == here.missing
        for level, pathways in found.pathways.items():
            assert pathways.mask.is_cuda
            assert torch.equal(pathways.mask.cpu(), here.pathways[level].mask)
            for label, values in found.by_sparsity[level].items():
                torch.testing.assert_close(values.cpu(), here.by_sparsity[level][label], equal_nan=True)
        for label, values in found.diagnostics.items():
            torch.testing.assert_close(values.cpu(), here.diagnostics[label], rtol=1e-9, atol=1e-9, equal_nan=True)
