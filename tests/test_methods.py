"""Attribution methods: their names, what they have in common, and those that look at gradients and perturbed inputs."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from footprint import Watched, require_clean_failures, unchanged
from networks import BY_NAME, traced
from small_jobs import Chosen, inputs, small
from test_leaks import Sighted, tensors, uncollected
from test_leaks import traced as watched
from test_padding import marked, tokens
from torch import Tensor, nn

import fxpath
from fxpath.analysis import random_active
from fxpath.attribution import masked_gradient, opened, pixel_scores
from fxpath.errors import (
    EmptyPathwaysWarning,
    InputError,
    ModelError,
    RestrictionError,
    SampleError,
    SparsityError,
)
from fxpath.methods import MaskedGradient, Method, Opened, PathwayGradient, RandomActive, method_names, parse_method
from fxpath.methods.comparisons import InputIntGrad, Occlusion, SmoothGrad
from fxpath.methods.hooked import GradCAM
from fxpath.network import Network
from fxpath.pathways import Pathways
from fxpath.samples import Samples
from fxpath.selectors import NeuronMCT
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


def test_random_active_neurons_are_none_of_padding() -> None:
    network, samples = tokens(), Samples(marked([6, 4, 2]))
    real = network.real(samples)
    generator = torch.Generator().manual_seed(0)
    pathways = Pathways(torch.rand(3, network.index.size, generator=generator) < 0.2, network.index)
    drawn = RandomActive("random@0.8").draw(network, samples, pathways)
    assert not bool((drawn.mask & ~real.mask).any())
    active = network.original(samples).active
    for site in network.sites:
        kept, alive = ((each & real.mask)[:, site.slice].sum(1) for each in (pathways.mask, active))
        assert torch.equal(drawn.mask[:, site.slice].sum(1), torch.minimum(kept, alive))
    assert torch.equal(drawn.density, drawn.count.double() / real.units.sum(1))


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
