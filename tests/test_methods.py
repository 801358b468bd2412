"""Attribution methods: their names, what they have in common, and those that look at gradients and perturbed inputs."""

from __future__ import annotations

import copy
import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import NoiseTunnel, Saliency
from footprint import Watched, require_clean_failures, unchanged
from networks import BY_NAME, CASES, Case, traced
from small_jobs import Chosen, inputs, small
from test_leaks import Sighted, tensors, uncollected
from test_leaks import traced as watched
from torch import Tensor, nn

import fxpath
from fxpath.analysis import random_active
from fxpath.attribution import masked_gradient, opened, pixel_scores
from fxpath.errors import (
    BranchError,
    EmptyPathwaysWarning,
    InputError,
    ModelError,
    RestrictionError,
    SampleError,
    SparsityError,
)
from fxpath.methods import MaskedGradient, Method, Opened, PathwayGradient, RandomActive, method_names, parse_method
from fxpath.methods.comparisons import InputIntGrad, Occlusion, SmoothGrad
from fxpath.methods.explained import Explained
from fxpath.methods.hooked import GradCAM
from fxpath.network import Network
from fxpath.pathways import Pathways
from fxpath.responses import Margin, OutputFunction, margin, neuron, pixel, probability, region
from fxpath.samples import Samples
from fxpath.selectors import NeuronMCT
from fxpath.selectors.baselines import generator_of
from fxpath.store import open_store

NAMES = (
    "grad_cam", "gradient", "guided_backprop", "input_intgrad", "input_mct", "occlusion", "smooth_grad",
)  # fmt: skip
FROM_PATHWAYS = ("neuron_mct@0.97", "masked_gradient:neuron_mct@0.97", "random_active:neuron_mct@0.97")
ALL = (*NAMES, *FROM_PATHWAYS, "gradient*", "neuron_mct@0.97*")
FORMS = {
    "grad_cam:site=layer1.0.relu,rectify=False": GradCAM("layer1.0.relu", rectify=False),
    "input_intgrad:steps=7": InputIntGrad(7),
    "smooth_grad:samples=5,noise=0.1,seed=3": SmoothGrad(5, 0.1, 3),
    "occlusion:size=8,stride=4": Occlusion(8, 4),
    "neuron_mct@0.9": PathwayGradient("neuron_mct@0.9"),
    "neuron_intgrad:steps=10@0.95": PathwayGradient("neuron_intgrad:steps=10@0.95"),
    "active": PathwayGradient("active"),
    "masked_gradient:random:seed=3@0.9": MaskedGradient("random:seed=3@0.9"),
    "random_active:neuron_mct@0.9": RandomActive("neuron_mct@0.9"),
    "random_active:seed=4:random:seed=3@0.9": RandomActive("random:seed=3@0.9", seed=4),
    "random_active:active": RandomActive("active"),
    "neuron_mct@0.9*": Opened(PathwayGradient("neuron_mct@0.9")),
    "smooth_grad:samples=5*": Opened(SmoothGrad(5)),
    "random_active:seed=4:neuron_mct@0.9*5": Opened(RandomActive("neuron_mct@0.9", 4), 5),
}


# --- names ----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert method_names() == NAMES
    for name in NAMES:
        method = parse_method(name)
        assert isinstance(method, Method)
        assert (method.key, method.pathway) == (name, None)
        assert parse_method(method) is method
    for text, method in FORMS.items():
        assert parse_method(text) == method
        assert method.key == text
        assert isinstance(method, Method)
        assert hash(method) == hash(parse_method(text))
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.of = "active"  # type: ignore[misc]
    canonical = {
        "smooth_grad:seed=0,samples=9": "smooth_grad:samples=9",
        "smooth_grad:noise=1": "smooth_grad:noise=1.0",
        "occlusion:stride=1": "occlusion",
        "neuron_mct@.90": "neuron_mct@0.9",
        "neuron_intgrad:steps=50@0.9": "neuron_intgrad@0.9",
        "random_active:seed=0:neuron_mct@0.9": "random_active:neuron_mct@0.9",
        "gradient*3": "gradient*",
    }
    for text, key in canonical.items():
        assert parse_method(text).key == key
        assert parse_method(key) == parse_method(text)


def test_pathways_that_methods_start_from() -> None:
    expected = {
        "masked_gradient:random:seed=3@0.9": "random:seed=3@0.9",
        "random_active:seed=4:neuron_mct@0.9": "neuron_mct@0.9",
        "neuron_mct@0.9*": "neuron_mct@0.9", "active": "active", "gradient*": None,
    }  # fmt: skip
    assert {text: parse_method(text).pathway for text in expected} == expected


WRONG = {
    "gradeint": r"there is no method 'gradeint'; nearest: .*gradient.*neuron_mct@0.9.*random_active:neuron_mct@0.9",
    "activ": r"there is no method 'activ'; nearest: active",
    "gradient:steps=3": r"method 'gradient:steps=3': there is no parameter 'steps'",
    "input_intgrad:steps=2.5": r"expected steps to be int, found '2.5'",
    "input_intgrad:steps=0": r"input_intgrad: expected steps to be a whole number ≥ 2, found 0",
    "smooth_grad:samples=0": r"expected samples to be a whole number ≥ 1, found 0",
    "smooth_grad:noise=-0.1": r"expected noise to be a number ≥ 0, found -0.1",
    "smooth_grad:noise=nan": r"expected noise to be a number ≥ 0, found nan",
    "smooth_grad:seed=-1": r"expected seed to be a whole number ≥ 0, found -1",
    "occlusion:size=0": r"expected size to be a whole number ≥ 1, found 0",
    "occlusion:size=2,stride=0": r"expected stride to be a whole number ≥ 1, found 0",
    "occlusion:stride=2": r"expected a stride of at most the size, 1, so that every pixel is occluded, found 2",
    "grad_cam:rectify=3": r"expected rectify to be bool, found '3'",
    "neuron_mct": r"method 'neuron_mct': expected a sparsity, such as @0.9",
    "active@0.5": r"expected no sparsity, as it has one pathway alone",
    "masked_gradient": r"expected a pathway, such as neuron_mct@0.9, found ''",
    "masked_gradient:gradient": r"there is no selector 'gradient'",
    "random_active:seed=x:neuron_mct@0.9": r"expected a pathway, such as neuron_mct@0.9, found 'seed=x:neuron_mct@0.9'",
    "random_active:seed=-1:neuron_mct@0.9": r"expected a pathway",
    "random_active:neuron_mct:steps=3@0.9": r"there is no parameter 'steps'",
    "gradient*0": r"opening: expected size to be a whole number ≥ 1, found 0",
    "gradient**": r"there is no method 'gradient\*\*'",
    "": r"there is no method ''",
}


@pytest.mark.parametrize("text", WRONG)
def test_texts_that_name_no_method(text: str) -> None:
    with pytest.raises(InputError, match=WRONG[text]):
        parse_method(text)


def test_other_things_that_are_no_method() -> None:
    for wrong in (3, None, InputIntGrad, nn.ReLU()):
        with pytest.raises(InputError, match="method: expected a method or its name, found"):
            parse_method(wrong)  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match="expected a share"):
        parse_method("neuron_mct@1.5")
    for make in (lambda: RandomActive("active", seed=-1), lambda: Opened(InputIntGrad(), 0), lambda: SmoothGrad(True)):
        with pytest.raises(InputError, match=r"expected .* to be a whole number"):
            make()


# --- what they have in common ---------------------------------------------------------------------------------------


@cache
def photos(count: int = 3) -> Samples:
    """CIFAR pictures, in float64."""
    return Samples(inputs()[:count].double(), ids=[f"photo {row}" for row in range(count)])


def network() -> Network:
    return small(torch.float64)


def quick(text: str, window: int = 8) -> Method:
    """The method with fewer runs, where they are many."""
    fewer = {
        "input_intgrad": "input_intgrad:steps=4", "smooth_grad": "smooth_grad:samples=3",
        "occlusion": f"occlusion:size={window},stride={window}",
    }  # fmt: skip
    return parse_method(fewer.get(text, text))


@pytest.mark.parametrize("text", ALL)
def test_what_all_methods_do(text: str) -> None:
    """Shape and type, detached, x as it was; with and without gradients; a sample alone as in a batch."""
    method, samples = quick(text), photos()
    x = samples.inputs
    before = x.clone()
    with unchanged(network()._module):
        found = method.attribute(network(), samples)
    single = text.startswith(("grad_cam", "occlusion")) or text.endswith("*")
    assert found.shape == (3, 1 if single else 3, 32, 32)
    assert (found.dtype, found.device, found.requires_grad) == (torch.float64, x.device, False)
    assert bool(found.isfinite().all())
    assert bool(found.flatten(1).any(dim=1).all())
    assert torch.equal(x, before)
    with torch.no_grad():
        assert torch.equal(method.attribute(network(), samples), found)
    with torch.inference_mode():
        assert torch.equal(method.attribute(network(), dataclasses.replace(samples, inputs=x.clone())), found)
    given = x.clone().requires_grad_()
    assert torch.equal(method.attribute(network(), dataclasses.replace(samples, inputs=given)), found)
    assert given.grad is None
    for row in range(3):
        alone = method.attribute(network(), samples.take([row]))
        torch.testing.assert_close(alone[0], found[row], rtol=1e-9, atol=1e-12)
    order = [2, 0, 1, 0]
    torch.testing.assert_close(method.attribute(network(), samples.take(order)), found[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("text", ALL)
def test_targets(text: str) -> None:
    method, samples = quick(text), photos()
    predicted = network().original(samples).target
    maps = method.attribute(network(), samples)
    assert torch.equal(method.attribute(network(), samples, predicted), maps)
    assert torch.equal(method.attribute(network(), dataclasses.replace(samples, target=predicted.tolist())), maps)
    other = (predicted + 1) % 10
    for target in (other, int(other[0])):
        found = method.attribute(network(), samples, target)
        assert not torch.allclose(found[0], maps[0])
        torch.testing.assert_close(found[:1], method.attribute(network(), samples.take([0]), int(other[0])))
    with pytest.raises(InputError, match=r"target: expected a class in 0 … 9, found 10"):
        method.attribute(network(), samples, [1, 10, 2])


@pytest.mark.parametrize("text", ALL)
def test_inputs_that_will_not_do(text: str) -> None:
    method = quick(text)
    said = r"expected a network with one floating-point input tensor, found "
    with pytest.raises(InputError, match=rf"{said}\[0\] torch.float64 \(2, 3\), \[1\] torch.float64 \(2, 4\)"):
        method.attribute(traced("TwoInputs"), BY_NAME["TwoInputs"].x(2))
    with pytest.raises(InputError, match=rf"{said}\['right'\] .*\['left'\] "):
        method.attribute(traced("DictInput"), BY_NAME["DictInput"].x(2))
    tokens = nn.Sequential(nn.Embedding(5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double().eval()
    ids = torch.randint(5, (2, 4))
    with pytest.raises(InputError, match=rf"{said}x torch.int64 \(2, 4\)"):
        method.attribute(fxpath.trace(tokens, ids), ids)
    x = photos().inputs.clone()
    with pytest.raises(InputError, match=r"expected inputs \(B, 3, 32, 32\)"):
        method.attribute(network(), x[:, :, :8])
    x[1, 0, 0, 0] = torch.inf
    with pytest.raises(SampleError, match="sample 1 holds NaN or infinite values"):
        method.attribute(network(), x)
    everything = Pathways(torch.ones((1, network().index.size), dtype=torch.bool), network().index)
    with network().masked(everything), pytest.raises(RestrictionError, match="the network is restricted already"):
        method.attribute(network(), photos())


@pytest.mark.parametrize("text", [*FROM_PATHWAYS, "neuron_mct@0.97*"])
def test_pathways_that_will_not_do(text: str) -> None:
    method, two = parse_method(text), NeuronMCT().scores(network(), photos(2)).pathways(0.97)
    with pytest.raises(RestrictionError, match="there are 2 pathways for 3 samples; give one each"):
        method.attribute(network(), photos(), pathways=two)
    with pytest.raises(RestrictionError, match="of another index"):
        method.attribute(network(), photos(2), pathways=Pathways(torch.ones((2, 12)) > 0, traced("MLP").index))
    with pytest.raises(RestrictionError, match="expected Pathways, found Tensor"):
        method.attribute(network(), photos(2), pathways=two.mask)  # type: ignore[arg-type]


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "captum", None)
    for text in ALL:
        if text.startswith(("gradient", *(FROM_PATHWAYS))):
            quick(text).attribute(network(), photos(2))
        else:
            with pytest.raises(ModelError, match=r"captum's, which cannot be imported.*pip install 'fxpath\[eval\]'"):
                quick(text).attribute(network(), photos(2))


def test_captum_is_imported_by_need_alone() -> None:
    code = "import sys, fxpath.methods; fxpath.methods.parse_method('smooth_grad'); sys.exit('captum' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- from pathways --------------------------------------------------------------------------------------------------


def test_gradients_of_pathways() -> None:
    pathways = NeuronMCT().scores(network(), photos()).pathways(0.9)
    x, other = photos().inputs, NeuronMCT().scores(network(), photos()).pathways(0.99)
    expected = {
        "neuron_mct@0.9": fxpath.pathway_gradient(network(), x, pathways),
        "masked_gradient:neuron_mct@0.9": masked_gradient(network(), x, pathways),
        "neuron_mct@0.9*": opened(pixel_scores(fxpath.pathway_gradient(network(), x, pathways))).unsqueeze(1),
        "neuron_mct@0.9*2": opened(pixel_scores(fxpath.pathway_gradient(network(), x, pathways)), 2).unsqueeze(1),
    }
    for text, maps in expected.items():
        method = parse_method(text)
        assert torch.equal(method.attribute(network(), x, pathways=pathways), maps)
        assert torch.equal(method.attribute(network(), x), maps)  # selects them itself
        assert not torch.equal(method.attribute(network(), x, pathways=other), maps)
    active = fxpath.Active().select(network(), x)[None]
    found = parse_method("active").attribute(network(), x)
    assert torch.equal(found, fxpath.pathway_gradient(network(), x, active))
    assert torch.equal(found, parse_method("gradient").attribute(network(), x))  # the dead pass none anyway


def test_a_given_target_is_selected_for_and_explained() -> None:
    x = photos().inputs
    target = (network().original(x).target + 1) % 10
    pathways = NeuronMCT().scores(network(), x, target).pathways(0.9)
    expected = fxpath.pathway_gradient(network(), x, pathways, target)
    assert torch.equal(parse_method("neuron_mct@0.9").attribute(network(), x, target), expected)


def test_empty_pathways_are_said_by_methods() -> None:
    pathways = NeuronMCT().scores(network(), photos()).pathways(0.9)
    mask = pathways.mask.clone()
    mask[1] = False
    for text in ("neuron_mct@0.9", "masked_gradient:neuron_mct@0.9", "random_active:neuron_mct@0.9"):
        with pytest.warns(EmptyPathwaysWarning, match=r"the pathway of sample 'photo 1' keeps no neuron.*0 everywhere"):
            found = parse_method(text).attribute(network(), photos(), pathways=Pathways(mask, pathways.index))
        assert found.flatten(1).any(dim=1).tolist() == [True, False, True]


def test_random_active_neurons_match_the_pathway() -> None:
    samples, method = photos(), RandomActive("neuron_mct@0.9")
    index, active = network().index, network().original(samples).active
    pathways = NeuronMCT().scores(network(), samples).pathways(0.9)
    drawn = method.draw(network(), samples, pathways)
    assert not bool((drawn.mask & ~active).any())
    for site in index.sites:
        assert torch.equal(drawn.site(site).flatten(1).sum(1), pathways.site(site).flatten(1).sum(1))
    assert float(drawn.jaccard(pathways).max()) < 0.5
    expected = fxpath.pathway_gradient(network(), samples, drawn)
    assert torch.equal(method.attribute(network(), samples), expected)
    assert torch.equal(method.attribute(network(), samples, pathways=pathways), expected)
    assert not torch.equal(RandomActive("neuron_mct@0.9", 1).attribute(network(), samples), expected)
    assert not torch.equal(method.attribute(network(), samples.inputs), expected)  # other ids
    again = method.draw(network(), samples.take([2, 0]), pathways.take([2, 0]))
    assert torch.equal(again.mask, drawn.mask[[2, 0]])


def test_random_active_neurons_are_all_where_the_pathway_holds_dead_ones() -> None:
    samples, index = photos(), network().index
    everything = Pathways(torch.ones((1, index.size), dtype=torch.bool), index)
    drawn = RandomActive("random@0.5").draw(network(), samples, everything)
    assert torch.equal(drawn.mask, network().original(samples).active)


@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_random_active_neurons_are_those_of_a_store(granularity: str, tmp_path: Path) -> None:
    traced_small, rows = small(granularity=granularity), (3, 0, 5)
    path = tmp_path / "run.h5"
    chosen = Chosen(rows)
    fxpath.compute(traced_small, chosen, path, selectors=["neuron_mct", "random"], sparsities=[0.9], progress=False)
    samples = Samples(inputs()[list(rows)], ids=chosen.ids)
    with open_store(path) as store:
        for key in ("neuron_mct@0.9", "random@0.9"):
            pathways = Pathways.from_packed(store.packed(key), traced_small.index)
            drawn = RandomActive(key, seed=2).draw(traced_small, samples, pathways).packed().numpy()
            for row, name in enumerate(store.ids):
                np.testing.assert_array_equal(drawn[row], random_active(store, key, str(name), seed=2))


# --- gradients and perturbed inputs ---------------------------------------------------------------------------------


def slope(network: Network, x: Tensor, target: Tensor | None) -> Tensor:
    given = x.detach().clone().requires_grad_()
    return torch.autograd.grad(network.respond(given, target).sum(), given)[0]


SINGLE = [case for case in CASES if isinstance(case.x(1), Tensor) and case.name not in ("Break", "Unused")]
singles = pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)


@singles
def test_gradients_of_inputs(case: Case) -> None:
    model = case.model()
    network, x = case.trace(model), case.x(3)
    target = network.original(x).target
    expected = slope(network, x, target)
    with unchanged(model):
        assert torch.equal(parse_method("gradient").attribute(network, x), expected)
        assert torch.equal(parse_method("input_mct").attribute(network, x), x * expected)
    assert bool(expected.any())


def variation(network: Network, x: Tensor, target: Tensor | None, points: int = 2000) -> Tensor:
    """The total variation of the slope along the path from 0 to x, `(B,)`, on a fine grid."""
    total, before = torch.zeros(len(x), dtype=x.dtype), None
    for alpha in torch.linspace(1e-6, 1, points, dtype=x.dtype):
        now = (slope(network, alpha * x, target) * x).flatten(1).sum(1)
        total += 0 if before is None else (now - before).abs()
        before = now
    return total


@pytest.mark.parametrize("name", ["Plain", "ResidualIadd", "Depthwise", "SqueezeExcitation", "MLP", "Functional"])
def test_input_intgrad_is_complete(name: str) -> None:
    """Σ = Φ(x) − Φ(0), up to the variation of the slope over 2·steps; on the way x is what it was predicted to be."""
    network, x = traced(name), BY_NAME[name].x(3)
    target = network.original(x).target
    with torch.no_grad():
        expected = network.respond(x, target) - network.respond(torch.zeros_like(x), target)
    bound = variation(network, x, target)
    errors = []
    for steps in (2, 4, 16, 64, 256):  # weights of 1/steps are exact in captum's float32
        maps = InputIntGrad(steps).attribute(network, x)
        error = (maps.flatten(1).sum(1) - expected).abs()
        assert bool((error <= 1.02 * bound / (2 * steps) + 1e-12).all()), (steps, error, bound)
        errors.append(float(error.max()))
    assert errors[-1] < errors[0] / 20
    assert float(expected.abs().max()) > 10 * errors[-1]


def test_input_intgrad_of_a_homogeneous_network_is_exact() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3, bias=False)
    ).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    network = fxpath.trace(model.eval(), x)
    product = parse_method("input_mct").attribute(network, x)
    for steps, tolerance in ((2, 1e-12), (8, 1e-12), (50, 1e-7)):
        found = InputIntGrad(steps).attribute(network, x)
        torch.testing.assert_close(found, product, rtol=tolerance, atol=1e-12)
        torch.testing.assert_close(found.flatten(1).sum(1), network.original(x).response, rtol=tolerance, atol=1e-12)


@singles
def test_input_intgrad_is_a_mean_of_gradients(case: Case) -> None:
    network, x = case.trace(), case.x(2)
    target = network.original(x).target
    total = torch.zeros_like(x)
    for step in range(8):
        total += slope(network, (step + 0.5) / 8 * x, target) / 8
    torch.testing.assert_close(InputIntGrad(8).attribute(network, x), x * total, rtol=1e-10, atol=1e-13)


def noises(name: Any, shape: tuple[int, ...], samples: int, seed: int = 0) -> Tensor:
    generator = generator_of(seed, f"smooth_grad\0{name}")
    return torch.from_numpy(generator.standard_normal((samples, *shape), dtype="float32")).double()


def test_smooth_grad_is_a_mean_of_gradients() -> None:
    samples = photos()
    x = samples.inputs * torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64).view(3, 1, 1, 1)  # of different ranges
    samples = dataclasses.replace(samples, inputs=x)
    target = network().original(x).target
    maps = SmoothGrad(6, 0.2, 5).attribute(network(), samples)
    for row in range(3):
        drawn = noises(f"photo {row}", (3, 32, 32), 6, seed=5)
        assert abs(float(drawn.std()) - 1) < 0.02
        noisy = x[row] + 0.2 * (x[row].max() - x[row].min()) * drawn
        expected = slope(network(), noisy, target[row].expand(6)).mean(0)
        torch.testing.assert_close(maps[row], expected, rtol=1e-9, atol=1e-12)
    none = SmoothGrad(2, 0.0).attribute(network(), samples)
    torch.testing.assert_close(none, parse_method("gradient").attribute(network(), samples), rtol=1e-9, atol=1e-12)


def test_smooth_grad_is_captums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same noise, and one deviation as captum has it."""
    x, samples = photos(1).inputs, photos(1)
    target = int(network().original(x).target)
    drawn = noises("photo 0", (3, 32, 32), 5)
    monkeypatch.setattr(torch, "normal", lambda mean, deviation: deviation * drawn)
    expected = NoiseTunnel(Saliency(lambda x: network().respond(x, target))).attribute(
        x.clone().requires_grad_(), nt_samples=5, stdevs=float(0.15 * (x.max() - x.min())), abs=False
    )
    torch.testing.assert_close(SmoothGrad(5).attribute(network(), samples), expected, rtol=1e-9, atol=1e-12)


def test_what_decides_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = photos()
    maps = SmoothGrad(3).attribute(network(), samples)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)  # noqa: NPY002
    assert torch.equal(SmoothGrad(3).attribute(network(), samples), maps)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state(legacy=False)) == str(before[1])  # noqa: NPY002
    torch.manual_seed(99)
    assert torch.equal(SmoothGrad(3).attribute(network(), samples), maps)
    assert torch.equal(SmoothGrad(3).attribute(network(), samples.take([1])), maps[1:2])  # bit for bit
    assert not torch.allclose(SmoothGrad(3, seed=1).attribute(network(), samples), maps)
    renamed = dataclasses.replace(samples, ids=["photo 0", "other", "photo 2"])
    assert [torch.equal(a, b) for a, b in zip(SmoothGrad(3).attribute(network(), renamed), maps, strict=True)] == [
        True, False, True,
    ]  # fmt: skip
    monkeypatch.setattr(Explained, "rows", 2)  # more runs, the same noise
    torch.testing.assert_close(SmoothGrad(3).attribute(network(), samples), maps, rtol=1e-9, atol=1e-12)


def brute_force(network: Network, x: Tensor, size: int, stride: int, target: Tensor | None) -> Tensor:
    """Occlusion by a loop over windows, `(B, 1, H, W)`."""
    height, width = x.shape[2:]
    total, windows = torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
    with torch.no_grad():
        whole = network.respond(x, target)
        for top in range(0, height - size + stride, stride):
            for left in range(0, width - size + stride, stride):
                window = (..., slice(top, top + size), slice(left, left + size))
                occluded = x.clone()
                occluded[window] = 0
                total[window] += (whole - network.respond(occluded, target)).view(-1, 1, 1, 1)
                windows[window] += 1
    return total / windows


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 2), (3, 2), (3, 1), (4, 3), (5, 5)])
def test_occlusion_is_a_loop_over_windows(size: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Plain", "ReusedInPlaceReLU", "BatchNormless", "SqueezeExcitation"):
        if name == "BatchNormless":  # a rectangle, and more of them at once than fit in a run
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 6, 4)).double().eval()
            x = torch.randn(2, 1, 6, 8, dtype=torch.float64)
            network = fxpath.trace(model, x)
            monkeypatch.setattr(Explained, "rows", 7)
        else:
            network, x = traced(name), BY_NAME[name].x(2)
        target = network.original(x).target
        found = Occlusion(size, stride).attribute(network, x)
        expected = brute_force(network, x, size, stride, target)
        assert found.shape == (2, 1, *x.shape[2:])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # captum's last step is in float32
        assert bool(found.any())


def test_occlusion_of_other_shapes() -> None:
    network, x = traced("Conv1d"), BY_NAME["Conv1d"].x(2)
    found = Occlusion(2, 2).attribute(network, x)
    assert found.shape == (2, 1, 6)
    target = network.original(x).target
    whole = network.respond(x, target)
    for left in (0, 2, 4):
        occluded = x.clone()
        occluded[..., left : left + 2] = 0
        expected = (whole - network.respond(occluded, target)).detach()
        for place in (left, left + 1):
            torch.testing.assert_close(found[:, 0, place], expected, rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match=r"occlusion: expected inputs \(B, C, H, W\).*found \(2, 4\)"):
        Occlusion().attribute(traced("MLP"), BY_NAME["MLP"].x(2))
    with pytest.raises(InputError, match=r"occlusion: expected a size of at most 5, the image's, found 6"):
        Occlusion(6).attribute(traced("Plain"), BY_NAME["Plain"].x(2))


def test_classes_are_those_of_x_at_perturbed_inputs_too() -> None:
    """Without its one bright pixel the sample is of another class."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
        model[3].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
        model[3].bias.copy_(torch.tensor([0.0, 2.0]))
    x = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]], dtype=torch.float64)
    network = fxpath.trace(model, x)
    assert Occlusion().attribute(network, x).flatten().tolist() == [3, 0, 0, 0]
    assert InputIntGrad(4).attribute(network, x).flatten().tolist() == [3, 0, 0, 0]
    assert SmoothGrad(4, 1.0).attribute(network, x)[0, 0, 0, 0] == 1  # the noise reaches below 2 as well


# --- responses ------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A map of class scores `(B, 4, H, W)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


RESPONSES: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
    "margin": (margin, BY_NAME["Plain"].build),
    "margin against": (Margin(against=1), BY_NAME["Plain"].build),
    "probability": (probability, BY_NAME["Plain"].build),
    "function": (OutputFunction(lambda output: output[:, 2] - output.abs().mean(1)), BY_NAME["Plain"].build),
    "pixel": (pixel(1, 2), Dense),
    "region": (region(0, 0, 3, 3), Dense),
    "hidden": (neuron("2.relu", (0, 0, 3)), lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), Dense())),
    "hidden channel": (neuron("2.conv1", channel=1), lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), Dense())),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(name: str) -> None:
    response, build = RESPONSES[name]
    torch.manual_seed(5)
    model, x = build().double().eval(), torch.randn(2, 2, 5, 5, dtype=torch.float64)
    network = fxpath.trace(model, x, response=response)
    target = network.original(x).target
    assert (target is None) == name.startswith(("function", "hidden"))
    expected = slope(network, x, target)
    assert bool(expected.flatten(1).any(1).all())
    with unchanged(model):
        found = {text: quick(text, 3).attribute(network, x) for text in NAMES}
    assert torch.equal(found["gradient"], expected)
    assert torch.equal(found["input_mct"], x * expected)
    total = sum(slope(network, (step + 0.5) / 4 * x, target) / 4 for step in range(4))
    torch.testing.assert_close(found["input_intgrad"], x * total, rtol=1e-9, atol=1e-12)
    one = Occlusion(2, 1).attribute(network, x)
    torch.testing.assert_close(one, brute_force(network, x, 2, 1, target), rtol=1e-6, atol=1e-9)
    assert bool(found["grad_cam"].isfinite().all())


def test_responses_that_hold_a_number_for_every_sample() -> None:
    """They can be asked of this batch alone, and not of other ones."""
    weights = torch.rand(3, 4, dtype=torch.float64)
    case = BY_NAME["Plain"]
    network, x = case.trace(response=lambda output: (output * weights).sum(1)), case.x(3)
    for text in ("gradient", "input_mct", "guided_backprop", "grad_cam", "neuron_mct@0.97"):
        assert parse_method(text).attribute(network, x).shape[0] == 3
    for text in ("input_intgrad:steps=5", "smooth_grad:samples=5", "occlusion"):
        with pytest.raises(InputError, match=r"it cannot read the network's output|one real number"):
            parse_method(text).attribute(network, x)


def test_responses_that_do_not_depend_on_the_input_have_maps_of_zeros() -> None:
    network, x = traced("Break"), BY_NAME["Break"].x(2)  # its gradient is cut
    for text in ("gradient", "input_mct", "input_intgrad", "smooth_grad", "guided_backprop"):
        assert not bool(quick(text).attribute(network, x).any())
    assert bool(Occlusion().attribute(network, x).any())


def test_other_branches_of_perturbed_inputs_are_said() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            return self.fc2(h * 2 if x.amax(1).min() > 1 else h)

    x = torch.tensor([[2.0, 0.1, 0.2, 0.3]])
    with pytest.warns(fxpath.errors.TraceWarning):
        network = fxpath.trace(Branching().eval(), x, fix_branches=True)
    parse_method("input_mct").attribute(network, x)
    with pytest.raises(BranchError, match="the graph holds the branch of the example"):
        InputIntGrad(2).attribute(network, x)  # at x/4


# --- nothing left behind --------------------------------------------------------------------------------------------


class Watching(Sighted):
    """Watched activations and, where no leaf hides them, rectifiers: reused, in place and functional."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.own(self.bn(self.conv1(x))))
        h = self.relu(self.own(self.conv2(h) + h))
        return self.fc(F.relu(self.relu(self.conv3(h)) - 0.01).mean((2, 3)))


def watching() -> tuple[Watching, Network, Tensor]:
    torch.manual_seed(0)
    model, x = Watching().eval(), torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return model, watched(model, x, sites=[Watched, "rectifiers"]), x


LEFT = (*ALL, "grad_cam:rectify=False")


@pytest.mark.parametrize("text", LEFT)
def test_nothing_is_left_behind(text: str) -> None:
    model, network, x = watching()
    model.conv1.weight.requires_grad_(False)
    record, method = model.relu.record, quick(text, 3)
    method.attribute(network, x)  # whatever is made once is made now
    expected, before = network(x).detach(), x.clone()
    with uncollected():
        count = tensors()
        record.start()
        with unchanged(model, network._module):
            found = method.attribute(network, x)
            del found
        runs = record.calls
        assert runs >= 3
        assert record.alive() == 0
        turns = range(1, min(runs, 18) + 1)  # each activation fails in turn
        require_clean_failures(network, model, record, turns, partial(method.attribute, network, x))
        assert tensors() == count
    record.start()
    assert torch.equal(network(x), expected)
    assert torch.equal(x, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("text", LEFT)
def test_nothing_is_left_behind_when_the_response_fails(text: str) -> None:
    model, _, x = watching()
    failing, calls = [math.inf], [0]

    def response(output: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > failing[0]:
            raise ArithmeticError("this response fails")
        return output[:, 0]

    network = watched(model, x, sites=[Watched, "rectifiers"], response=response)
    record, method = model.relu.record, quick(text, 3)
    calls[0] = 0
    method.attribute(network, x)
    whole = calls[0]
    with uncollected():
        count = tensors()
        for turn in range(min(whole, 6)):
            record.start()
            failing[0], calls[0] = turn, 0
            with unchanged(model, network._module):
                try:
                    method.attribute(network, x)
                except InputError as error:
                    assert "this response fails" in str(error)  # noqa: PT017
                else:
                    pytest.fail("it should have failed")
            assert record.alive() == 0
        assert tensors() == count


def test_memory_is_bounded() -> None:
    """However many steps there are, no more rows run at once than fit."""
    network, x = traced("Plain"), BY_NAME["Plain"].x(2)
    assert Explained.of("test", network, x, None).rows == 512
    seen: list[int] = []
    run = network._run

    counted = copy.copy(network)
    counted._run = lambda samples, gates: seen.append(samples.batch) or run(samples, gates)  # type: ignore[method-assign,func-returns-value]
    for method in (InputIntGrad(1100), SmoothGrad(1100)):
        seen.clear()
        method.attribute(counted, x)
        assert seen == [2, *[512, 512, 76] * 2]
    large = Explained(small(), Samples(torch.zeros(1, 3, 32, 32)), None)
    assert 2**25 // (large.rows + 1) < small().index.units + 3 * 32 * 32 or large.rows == 512
