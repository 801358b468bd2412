"""Selectors: NeuronMCT against captum and by hand, Random, Active, Magnitude; the registry and its text form."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import LayerGradientXActivation
from networks import BY_NAME, CASES, Case, image, traced
from torch import nn

import fxpath
from fxpath import selectors
from fxpath.errors import InputError, SampleError, SparsityError
from fxpath.keys import PathwayKey
from fxpath.neurons import NeuronIndex
from fxpath.pathways import Pathways, Selection
from fxpath.samples import Samples
from fxpath.selectors import Active, Magnitude, NeuronMCT, Random, registry
from fxpath.selectors.baselines import generator_of
from fxpath.selectors.registry import family, parameters, parse, register, selector_type

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# --- NeuronMCT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("squeezenet1_1", 64), ("vgg11", 32)])
def test_mct_is_captums_gradient_times_activation(name: str, size: int) -> None:
    """Layer by layer on networks whose every ReLU is a module of its own, called once.

    captum reads an in-place ReLU's output as the gradient flows into it, so each is made out of place for captum.
    """
    torch.manual_seed(0)
    with torch.device("meta"):  # VGG's first linear layer alone has 100 million weights: a smaller one is put in
        model = torchvision.models.get_model(name, weights=None)
        if name == "vgg11":
            model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, 24), nn.Linear(24, 4096)
    model = model.to_empty(device="cpu").double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, (2 / parameter[0].numel()) ** 0.5)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    network = fxpath.trace(model, x)
    target = model(x).argmax(1)
    scores = NeuronMCT().scores(network, x)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    assert bool((scores.signed != 0).any())
    for site in network.sites:
        layer = model.get_submodule(site.name)
        expected = LayerGradientXActivation(model, layer).attribute(x, target=target)
        found = scores.site(site)
        torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-10, atol=1e-15)


def test_mct_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, -2, 5], [3, 4, 5]]))
        model[2].bias.copy_(torch.tensor([100.0, 0]))
    network = fxpath.trace(model, torch.ones(1, 2, dtype=torch.float64))
    x = torch.tensor([[2.0, 3], [1, -1], [-1, -1]], dtype=torch.float64)  # a = (2, 3, 0), (1, 0, 0), (0, 0, 2)
    for target, expected in (
        (0, [[2, -6, 0], [1, 0, 0], [0, 0, 10]]),
        (1, [[6, 12, 0], [3, 0, 0], [0, 0, 10]]),
        (None, [[2, -6, 0], [1, 0, 0], [0, 0, 10]]),  # the predicted class is 0, for its bias
        ([0, 1, 1], [[2, -6, 0], [3, 0, 0], [0, 0, 10]]),
        (torch.tensor([1, 0, 0]), [[6, 12, 0], [1, 0, 0], [0, 0, 10]]),
    ):
        scores = NeuronMCT().scores(network, x, target)
        assert scores.signed.tolist() == expected
        bundled = NeuronMCT().scores(network, Samples(x, target))
        assert bundled.signed.tolist() == expected
    selection = NeuronMCT().select(network, Samples(x, 1), (0.0, 0.5, 0.6))
    assert selection[0.0].mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert selection[0.5].mask.int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert selection.scores is not None
    assert selection.scores.key == "neuron_mct"


@pytest.mark.filterwarnings("ignore::fxpath.errors.NoContributionWarning")  # six samples, some of them all dead
@every
def test_mct_never_keeps_a_dead_neuron(case: Case) -> None:
    network, x = traced(case.name), case.x(6, seed=3)
    original = network.original(x)
    scores = NeuronMCT().scores(network, x)
    values = network.rows(network.activations(x))
    assert bool((scores.signed[values == 0] == 0).all())
    selection = NeuronMCT().select(network, x, (0.0, 0.5, 0.9))
    for sparsity, pathways in selection.pathways.items():
        assert sparsity is not None
        assert bool((pathways.count <= network.index.kept(sparsity)).all())
        assert not bool((pathways.mask & (values == 0)).any())
        if "activations" not in case.options.values():
            assert not bool((pathways.mask & ~original.active).any())


def test_mct_of_channels_is_the_sum_over_each() -> None:
    """|Σ signed c| of the group: the derivative of the response by that gate."""
    for name in ("Plain", "Norms", "BatchFolded", "ScalarOutput", "ViewSlice"):
        case = BY_NAME[name]
        units, channels = traced(name), traced(name, "channel")
        x = case.x(3)
        fine, coarse = NeuronMCT().scores(units, x), NeuronMCT().scores(channels, x)
        for small, large in zip(units.sites, channels.sites, strict=True):
            block = fine.signed[:, small.slice].reshape(3, *small.shape)
            axes = [axis + 1 for axis in range(len(small.shape)) if axis != large.axis]
            expected = block.sum(axes) if axes else block.reshape(3, -1)
            torch.testing.assert_close(coarse.signed[:, large.slice], expected.reshape(3, -1), rtol=1e-12, atol=1e-14)


# --- Active, Magnitude ----------------------------------------------------------------------------------------------


@every
def test_active_is_what_is_above_zero(case: Case) -> None:
    network, x = traced(case.name), case.x(4)
    selection = Active().select(network, x)
    values = network.rows(network.activations(x))
    assert list(selection) == [None]
    assert torch.equal(selection[None].mask, values > 0)
    channels = traced(case.name, "channel")
    found = Active().select(channels, x, (0.9,))[None]
    for site in channels.sites:
        block = (network.activations(x)[network.index.number(site.name)] > 0).reshape(4, *site.shape)
        axes = [axis + 1 for axis in range(len(site.shape)) if axis != site.axis]
        expected = block.amax(axes) if axes else block
        assert torch.equal(found.mask[:, site.slice], expected.reshape(4, -1))


def test_magnitude_is_the_activation() -> None:
    network, case = traced("Concat"), BY_NAME["Concat"]
    x = case.x(3)
    scores = Magnitude().scores(network, x)
    assert torch.equal(scores.signed, torch.cat([a.flatten(1) for a in network.activations(x)], 1))
    assert scores.key == "magnitude"
    pathways = Magnitude().select(network, x, (0.8,))[0.8]
    count = network.index.kept(0.8)
    for values, mask in zip(scores.signed, pathways.mask, strict=True):
        assert values[mask].min() >= values[~mask].max()
        assert int(mask.sum()) == min(count, int((values > 0).sum()))


# --- Random ---------------------------------------------------------------------------------------------------------


def test_random_depends_on_seed_and_id_alone() -> None:
    network = traced("Concat")
    x = BY_NAME["Concat"].x(4)
    ids = ["p", "q", "r", "s"]
    levels = (0.5, 0.9)
    for selector in (Random(seed=3), Random(seed=3, per_layer=True)):
        whole = selector.select(network, Samples(x, ids=ids), levels)
        for level in levels:
            turned = selector.select(network, Samples(x.flip(0) * 0, ids=ids[::-1]), levels)[level]
            assert torch.equal(turned.mask, whole[level].mask.flip(0))
            alone = [selector.select(network, Samples(x[:1], ids=[name]), (level,))[level].mask for name in ids]
            assert torch.equal(torch.cat(alone), whole[level].mask)
            other = type(selector)(4, selector.per_layer).select(network, Samples(x, ids=ids), levels)[level]
            assert not torch.equal(other.mask, whole[level].mask)
        masks = whole[0.5].mask
        assert len({tuple(row.tolist()) for row in masks}) == 4
    numbered = Random().select(network, x, levels)[0.5]
    assert torch.equal(Random().select(network, Samples(x, ids=[0, 1, 2, 3]), levels)[0.5].mask, numbered.mask)
    assert torch.equal(Random().select(network, Samples(x, ids=np.arange(4)), levels)[0.5].mask, numbered.mask)


def test_random_sizes_are_exact_and_nested() -> None:
    index = NeuronIndex.build([("a", "relu", (130,)), ("b", "relu", (7,)), ("c", "relu", (10, 6))])
    levels = (0.0, 0.1, 0.5, 0.7, 0.9, 0.99)
    whole, layered = Random(), Random(per_layer=True)
    for name in ("one", 2):
        masks = whole.masks(index, name, levels)
        assert masks.sum(1).tolist() == [index.kept(level) for level in levels] == [197, 177, 98, 59, 19, 1]
        by_site = layered.masks(index, name, levels)
        counts = [[int(mask[site.slice].sum()) for site in index.sites] for mask in by_site]
        assert counts == [[130, 7, 60], [117, 6, 54], [65, 3, 30], [39, 2, 18], [13, 0, 6], [1, 0, 0]]
        for found in (masks, by_site):
            for larger, smaller in itertools.pairwise(found):
                assert not (smaller & ~larger).any()


def test_random_is_uniform_over_neurons() -> None:
    """Each of 40 neurons is kept in a quarter of 4000 draws, within six standard deviations."""
    index = NeuronIndex.build([("a", "relu", (40,))])
    kept = np.mean([Random().masks(index, name, (0.75,))[0] for name in range(4000)], axis=0)
    assert abs(kept - 0.25).max() < 6 * np.sqrt(0.25 * 0.75 / 4000)
    pairs = np.mean([Random().masks(index, name, (0.5,))[0][:2].all() for name in range(4000)])
    assert abs(pairs - 20 / 40 * 19 / 39) < 6 * np.sqrt(0.25 / 4000)


def test_random_bits_are_the_same_for_ever() -> None:
    """Stores are extended years later: the stream of (seed, id) is part of the format."""
    index = NeuronIndex.build([("a", "relu", (64,))])
    assert index.pack(Random(seed=1).masks(index, "photo.jpg", (0.5,)))[0].tobytes().hex() == "40e69efd0a3f60ca"
    assert generator_of(1, "a").random() != generator_of(11, "a").random() != generator_of(1, "1a").random()


def test_random_of_channels() -> None:
    network = traced("Concat", "channel")
    pathways = Random(seed=5).select(network, BY_NAME["Concat"].x(3), (0.3,))[0.3]
    assert bool((pathways.count <= network.index.kept(0.3)).all())
    assert bool((pathways.count >= network.index.kept(0.3) - 25).all())  # a channel has 25 units
    layered = Random(per_layer=True).select(network, BY_NAME["Concat"].x(3), (0.5,))[0.5]
    assert [layered.mask[:, site.slice].sum(1).tolist() for site in network.sites] == [[1] * 3, [1] * 3, [1] * 3]


def test_random_moves_no_global_stream() -> None:
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    Random().masks(NeuronIndex.build([("a", "relu", (64,))]), 0, (0.5,))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", [NeuronMCT(), Magnitude(), Random(), Random(per_layer=True)], ids=repr)
def test_selectors_check_sparsities_before_they_work(selector: selectors.Selector) -> None:
    network, x = traced("Plain"), image(2)
    for wrong in ((1.0,), (0.5, -1), ("x",)):
        with pytest.raises(SparsityError, match=r"in \[0, 1\)"):
            selector.select(network, x, wrong)  # type: ignore[arg-type]
    with pytest.raises(SparsityError, match="expected a sequence"):
        selector.select(network, x, 0.9)  # type: ignore[arg-type]
    selection = selector.select(network, x, (0.9, 0.5))
    assert list(selection) == [0.9, 0.5]
    assert len(selector.select(network, x, ())) == 0


def test_samples_that_overflow_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(3, 2, dtype=torch.float64)
    network = fxpath.trace(model, x)
    x[1] = 1.7e308  # finite, but two of them are not
    for selector in (NeuronMCT(), Magnitude(), Active()):
        with pytest.raises(SampleError, match="NaN or infinite") as caught:
            selector.select(network, x, (0.5,))
        assert caught.value.positions == (1,)


# --- the registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("neuron_mct", NeuronMCT()),
        ("active", Active()),
        ("magnitude", Magnitude()),
        ("random", Random()),
        ("random:seed=3", Random(seed=3)),
        ("random:per_layer=true,seed=-2", Random(seed=-2, per_layer=True)),
        ("random:", Random()),
    ],
)
def test_parse(text: str, selector: selectors.Selector) -> None:
    assert parse(text) == selector
    assert parse(selector) is selector
    assert parse(str(family(selector))) == selector


def test_names_families_and_parameters() -> None:
    assert {"active", "magnitude", "neuron_mct", "random"} <= set(selectors.names())
    assert str(family(Random(seed=3, per_layer=True))) == "random:per_layer=True,seed=3"
    assert family(NeuronMCT()) == PathwayKey("neuron_mct")
    assert parameters(Random(seed=3)) == {"seed": 3, "per_layer": False}
    for key in selectors.names():
        kind = selector_type(key)
        assert kind.key == key
        assert isinstance(kind(), selectors.Selector)
    assert [selector_type(key).single for key in ("active", "random", "neuron_mct")] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("neuron_mtc", r"there is no selector 'neuron_mtc'; nearest: neuron_mct, neuron_intgrad \(all: "),
        ("", r"there is no selector ''"),
        ("Random", r"there is no selector 'Random'; nearest: random"),
        (
            "random:sed=3",
            r"selector 'random:sed=3': there is no parameter 'sed'; nearest: seed \(all: seed, per_layer\)",
        ),
        ("neuron_mct:steps=3", r"there is no parameter 'steps' \(there is no parameter at all\)"),
        ("random:seed", r"expected param=value, found 'seed'"),
        ("random:seed=x", r"expected seed to be int, found 'x'"),
        ("random:seed=1.5", r"expected seed to be int, found '1\.5'"),
        ("random:seed=true", r"expected seed to be int, found 'true'"),
        ("random:per_layer=1", r"expected per_layer to be bool, found '1'"),
        (None, r"expected a selector or its name, found None"),
        (Random, r"expected a selector or its name, found <class"),
    ],
)
def test_texts_that_are_no_selectors(text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(text)


@dataclass(frozen=True)
class Ends:
    """A selector of another package: the first and last neuron."""

    key: ClassVar[str] = "ends"
    single: ClassVar[bool] = True

    width: float = 0.5

    def select(self, network: fxpath.Network, samples: Any, sparsities: Any = ()) -> Selection:
        mask = torch.zeros(Samples.of(samples).batch, network.index.size, dtype=torch.bool)
        mask[:, [0, -1]] = True
        return Selection({None: Pathways(mask, network.index)})


def test_entry_points_add_selectors(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("ends", f"{__name__}:Ends", "fxpath.selectors")]

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "fxpath.selectors"
        return [point for point in points if name in (None, point.name)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert "ends" in selectors.names()
    assert parse("ends:width=2") == Ends(2.0)  # a whole number where a decimal one is wanted
    assert type(parse("ends:width=2").width) is float  # type: ignore[attr-defined]
    assert str(family(parse("ends:width=2"))) == "ends:width=2.0"
    assert parse("ends").select(traced("Plain"), image(2), ())[None].count.tolist() == [2, 2]


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert register(Ends) is Ends
    assert parse("ends") == Ends()

    class NoDataclass:
        key = "none"

    @dataclass(frozen=True)
    class NoKey:
        width: int = 1

    for wrong in (NoDataclass, NoKey):
        with pytest.raises(InputError, match=f"selector {wrong.__name__}: expected a dataclass with a class attribute"):
            register(wrong)
