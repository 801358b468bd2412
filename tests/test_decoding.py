"""Decoding: where the optimum is known, that rows are each other's strangers, and what it refuses and leaves behind."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from footprint import Record, Watched, unchanged
from small_jobs import inputs, small
from torch import Tensor, nn

import fxpath
from fxpath.decoding import ConstantResponseWarning, Decoded, Decoding, decode
from fxpath.errors import BranchError, FxpathError, InputError, RestrictionError, TraceWarning
from fxpath.images import load_images
from fxpath.inputspace import InputSpace
from fxpath.zoo import load_model

STILL = {"jitter": 0, "scale": 0.0, "rotation": 0.0}
QUICK = Decoding(steps=12, every=5, jitter=1)
SPACE = InputSpace.normalised((0.5,) * 3, (0.25,) * 3)
CIFAR = InputSpace.normalised((127 / 255,) * 3, (64 / 255,) * 3)


class Linear(nn.Module):
    """Every neuron is active for all pictures, so that logits are linear in them: class c is wᶜ·x plus a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 * 4 * 5, 7), nn.Linear(7, 3)
        nn.init.constant_(self.first.bias, 30.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x.flatten(1))))

    def weight(self, mask: Tensor, target: int) -> Tensor:
        return ((self.last.weight[target] * mask) @ self.first.weight).view(3, 4, 5)


def linear() -> tuple[Linear, fxpath.Network, Tensor]:
    torch.manual_seed(0)
    model = Linear().double().eval()
    x = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    return model, fxpath.trace(model, x), x


def masks(network: fxpath.Network, *shares: float) -> dict[str, fxpath.Pathways | None]:
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(network.index.size, generator=generator)
    return {f"share {share}": fxpath.Pathways((draws < share).unsqueeze(0), network.index) for share in shares}


def same(one: Decoded, other: Decoded, **tolerances: float) -> None:
    for name in ("pictures", "inputs", "responses", "photo", "original"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **(tolerances or {"rtol": 0, "atol": 0}))


# --- the optimum ---


@pytest.mark.parametrize("decorrelated", [False, True])
def test_a_linear_network_is_saturated_by_the_signs_of_its_weights(decorrelated: bool) -> None:
    model, network, x = linear()
    mask = torch.tensor([True, False, True, True, False, True, False])
    pathways = {"original": None, "kept": fxpath.Pathways(mask.unsqueeze(0), network.index)}
    decoding = Decoding(steps=400, learning_rate=0.03 if decorrelated else 0.2, decorrelated=decorrelated, **STILL)
    found = decode(network, x, pathways, 2, decoding=decoding, space=SPACE)
    assert found.labels == ("original", "kept")
    assert found.target is not None
    assert found.target.tolist() == [2, 2]
    assert found.climbed.tolist() == [True, True]
    for row, own in enumerate((torch.ones(7), mask.double())):
        weight = model.weight(own.double(), 2).detach()
        best = torch.where(weight > 0, 1.0, 0.0)
        wrong = (found.pictures[row] - best).abs()
        assert wrong.median() < 0.1
        if not decorrelated:  # a wave that is right for most pixels carries a few beyond the sigmoid's slope
            assert wrong.max() < 0.001
        # the response that no picture exceeds: every pixel at the end that its weight is for
        bound = network.original(x, 2).response if row == 0 else _masked(network, x, pathways["kept"])
        bound = bound + (weight * (SPACE.inputs(best.double().unsqueeze(0))[0] - x[0])).sum()
        worst = bound - (weight.abs() * 4).sum()
        share = (found.response[row] - worst) / (bound - worst)
        assert (0.85 if decorrelated else 0.999) < float(share) <= 1
    torch.testing.assert_close(found.inputs, SPACE.inputs(found.pictures))
    assert (found.responses[:, 1:] > found.responses[:, :-1]).all()


def _masked(network: fxpath.Network, x: Tensor, pathways: fxpath.Pathways | None) -> Tensor:
    assert pathways is not None
    with network.masked(pathways):
        return network.respond(x, 2).detach()


def test_what_is_told_of_a_picture_is_what_the_networks_answer() -> None:
    network, x = small(torch.float64), inputs()[:1].double()
    named = {"original": None} | masks(network, 0.6, 0.3)
    found = decode(network, x, named, decoding=QUICK, space=CIFAR)
    target = int(network.original(x).target)
    assert found.noted == (0, 5, 10, 12)
    assert found.responses.shape == (3, 4)
    assert found.pictures.shape == (3, 3, 32, 32)
    assert ((found.pictures > 0) & (found.pictures < 1)).all()
    for row, pathways in enumerate(named.values()):
        both = torch.cat([found.inputs[row : row + 1], x])
        torch.testing.assert_close(network.original(both, target).response[0], found.original[row])
        everything = fxpath.Pathways(torch.ones(1, network.index.size, dtype=torch.bool), network.index)
        with network.masked(pathways or everything):
            answers = network.respond(both, target).detach()
        torch.testing.assert_close(answers, torch.stack([found.response[row], found.photo[row]]))
    assert float(found.original[0]) == pytest.approx(float(found.response[0]), rel=1e-9)
    assert abs(float(found.original[1] - found.response[1])) > 1e-3


def test_decoding_raises_the_response_of_a_small_network() -> None:
    network, x = small(), inputs()[3:4]
    found = decode(network, x, decoding=Decoding(steps=100, learning_rate=0.1), space=CIFAR)
    assert found.labels == ("original",)
    assert float(found.photo[0]) == pytest.approx(0.41, abs=0.01)
    assert float(found.response[0]) > 4


def test_moves_make_the_response_robust_to_moves() -> None:
    """What was climbed under rolls keeps more of its response when it is rolled."""
    network, x = small(), inputs()[3:4]
    kept = {}
    for jitter in (0, 3):
        decoding = Decoding(steps=60, learning_rate=0.1, jitter=jitter, scale=0.0, rotation=0.0)
        found = decode(network, x, target=3, decoding=decoding, space=CIFAR)
        rolled = torch.cat([found.inputs.roll((down, right), (2, 3)) for down in (-3, 0, 2) for right in (-2, 1, 3)])
        kept[jitter] = float(network.respond(rolled, 3).mean().detach() / found.response[0])
    assert kept[3] > kept[0] + 0.2


def test_decoding_raises_the_response_of_a_real_network() -> None:
    loaded = load_model("zoo:squeezenet1_1")
    x = load_images("foolbox:imagenet", loaded.preprocess, limit=1)[0][0].unsqueeze(0)
    space = InputSpace.of_preprocessing(loaded.preprocess, loaded.input_shape)
    network = fxpath.trace(loaded.model, loaded.example(2))
    found = decode(network, x, decoding=Decoding(steps=32), space=space)
    assert float(found.photo[0]) == pytest.approx(28.96, abs=0.01)  # bull mastiff
    assert float(found.response[0]) > 3 * float(found.photo[0])
    assert network.original(found.inputs).prediction.tolist() == [243]


def test_a_grey_network_has_grey_pictures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 6, 3)).eval()
    x = torch.rand(2, 1, 10, 8)
    found = decode(fxpath.trace(model, x), x, decoding=QUICK, space=InputSpace.normalised((0.1307,), (0.3081,)))
    assert found.pictures.shape == (2, 1, 10, 8)
    assert (found.response > found.responses[:, 0]).all()


def test_pictures_of_another_size_are_resampled() -> None:
    network, x = small(), inputs()[:1]
    found = decode(network, x, decoding=dataclasses.replace(QUICK, size=13), space=CIFAR)
    assert found.pictures.shape == (1, 3, 32, 32)
    assert found.response > found.responses[:, 0]
    # 13 pixels hold no finer waves: what a second resampling to 13 and back changes is little
    again = nn.functional.interpolate(found.pictures, (13, 13), mode="bilinear", antialias=True)
    again = nn.functional.interpolate(again, (32, 32), mode="bilinear")
    plain = decode(network, x, decoding=QUICK, space=CIFAR).pictures
    coarse = nn.functional.interpolate(plain, (13, 13), mode="bilinear", antialias=True)
    coarse = nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    assert (found.pictures - again).std() / found.pictures.std() < 0.7 * (plain - coarse).std() / plain.std()


# --- rows, seeds ---


def test_rows_are_strangers_to_each_other() -> None:
    network, x = small(torch.float64), inputs()[:1].double()
    named = {"original": None} | masks(network, 0.7, 0.4)
    together = decode(network, x, named, decoding=QUICK, space=CIFAR)
    singly = decode(network, x, named, decoding=QUICK, space=CIFAR, max_batch=1)
    by_two = decode(network, x, dict(reversed(named.items())), decoding=QUICK, space=CIFAR, max_batch=2)
    for row, (name, pathways) in enumerate(named.items()):
        alone = decode(network, x, {name: pathways}, decoding=QUICK, space=CIFAR)
        for field in ("pictures", "inputs", "responses", "photo", "original"):
            own = getattr(alone, field)[0]
            assert torch.equal(own, getattr(singly, field)[row])  # bit for bit
            torch.testing.assert_close(own, getattr(together, field)[row], rtol=0, atol=1e-9)
            torch.testing.assert_close(own, getattr(by_two, field)[2 - row], rtol=0, atol=1e-9)
    assert by_two.labels == tuple(reversed(together.labels))


def test_rows_in_single_precision() -> None:
    network, x = small(), inputs()[:1]
    named = {"original": None} | masks(network, 0.7, 0.4)
    together = decode(network, x, named, decoding=QUICK, space=CIFAR)
    assert (together.pictures.dtype, together.inputs.dtype) == (torch.float32, torch.float32)
    for row, (name, pathways) in enumerate(named.items()):
        alone = decode(network, x, {name: pathways}, decoding=QUICK, space=CIFAR)
        torch.testing.assert_close(alone.pictures[0], together.pictures[row], rtol=0, atol=1e-5)


def test_one_seed_one_picture() -> None:
    network, x = small(), inputs()[:1]
    first = decode(network, x, decoding=QUICK, space=CIFAR)
    torch.rand(7)
    again = decode(network, x, decoding=QUICK, space=CIFAR)
    assert first.pictures.numpy().tobytes() == again.pictures.numpy().tobytes()
    other = decode(network, x, decoding=dataclasses.replace(QUICK, seed=1), space=CIFAR)
    assert (first.pictures - other.pictures).abs().max() > 0.01
    # a photo matters by its class alone, so that photos of one class have the same original row
    target = int(network.original(x).target)
    elsewhere = decode(network, inputs()[5:6], target=target, decoding=QUICK, space=CIFAR)
    assert torch.equal(first.pictures, elsewhere.pictures)
    assert not torch.equal(first.photo, elsewhere.photo)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_the_unit_of_the_response_does_not_matter(unit: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.rand(1, 3, 8, 8)
    plain, scaled = (
        decode(fxpath.trace(model, x, response=lambda y, by=by: by * y[:, 0]), x, decoding=QUICK, space=SPACE)
        for by in (1.0, unit)
    )
    torch.testing.assert_close(plain.pictures, scaled.pictures, rtol=0, atol=1e-4)
    assert (plain.pictures - 0.5).abs().max() > 0.05


def test_photos_and_pathways_in_batches() -> None:
    network, x = small(torch.float64), inputs()[:2].double()
    scores = fxpath.NeuronMCT().scores(network, x)
    pathways = scores.pathways(0.5)
    samples = fxpath.Samples(x, ids=["dog", "cat"])
    found = decode(network, samples, {"mct": pathways, "original": None}, decoding=QUICK, space=CIFAR)
    assert found.labels == ("mct dog", "mct cat", "original dog", "original cat")
    assert decode(network, samples, pathways, decoding=QUICK, space=CIFAR).labels == ("dog", "cat")
    target = network.original(x).target
    assert found.target is not None
    assert target is not None
    assert found.target.tolist() == [*target.tolist()] * 2
    second = decode(network, x[1:], pathways.take([1]), decoding=QUICK, space=CIFAR)
    assert second.labels == ("0",)
    torch.testing.assert_close(second.pictures[0], found.pictures[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(second.photo[0], found.photo[1], rtol=0, atol=1e-9)
    many = decode(network, x[:1], {"mct": pathways}, decoding=QUICK, space=CIFAR)  # two pathways of one photo
    assert many.labels == ("mct 0", "mct 1")
    torch.testing.assert_close(many.pictures[0], found.pictures[0], rtol=0, atol=1e-9)


def test_the_range_of_the_photo_where_no_space_is_given() -> None:
    network, x = small(), inputs()[:1]
    one = decode(network, x, decoding=QUICK)
    same(one, decode(network, x, decoding=QUICK, space=InputSpace.of_samples(x)))
    for channel in range(3):
        assert x[0, channel].min() < one.inputs[0, channel].min() < one.inputs[0, channel].max() < x[0, channel].max()


def test_half_precision_inputs() -> None:
    model = small().traced.graph_module
    del model
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval().bfloat16()
    x = torch.rand(1, 3, 8, 8).bfloat16()
    found = decode(fxpath.trace(plain, x, check=False), x, decoding=QUICK, space=SPACE)
    assert (found.pictures.dtype, found.inputs.dtype, found.responses.dtype) == (
        torch.float32, torch.bfloat16, torch.bfloat16,
    )  # fmt: skip
    assert found.response > found.responses[:, 0]


# --- nothing to climb ---


def test_an_empty_pathway_is_named_and_stays_noise() -> None:
    network, x = small(torch.float64), inputs()[:1].double()
    empty = fxpath.Pathways(torch.zeros(1, network.index.size, dtype=torch.bool), network.index)
    said = r"decode: the response of 'nothing' has no gradient, whatever the noise .* and at each of 12 steps: these"
    with pytest.warns(ConstantResponseWarning, match=said):
        found = decode(network, x, {"nothing": empty, "original": None}, decoding=QUICK, space=CIFAR)
    assert found.climbed.tolist() == [False, True]
    assert found.strength.tolist() == [1, 1]
    assert (found.responses[0] == found.photo[0]).all()
    begun = Decoding(steps=1, every=1)
    noise = decode(network, x, decoding=dataclasses.replace(begun, learning_rate=1e-12), space=CIFAR).pictures[0]
    torch.testing.assert_close(found.pictures[0], noise, rtol=0, atol=1e-9)
    assert (found.pictures[0] - found.pictures[1]).abs().max() > 0.01


def test_a_dead_start_is_overcome_by_stronger_noise() -> None:
    """Rows that are dead around grey begin with the faintest of three noises in which they are alive."""

    class Shy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("below", torch.tensor([0.0, 0.05, 0.3, 2.0]).view(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu((x[:, :1] - 0.5).abs() - self.below).mean((2, 3))

    x = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    network = fxpath.trace(Shy().double().eval(), x)
    unit = InputSpace.normalised((0.0,) * 3, (1.0,) * 3)
    decoding = Decoding(steps=30, decorrelated=False, **STILL)
    found = {}
    for target in range(3):
        found[target] = decode(network, x, target=target, decoding=decoding, space=unit)
        assert found[target].climbed.tolist() == [True]
        assert found[target].response > found[target].responses[:, 0]
    with pytest.warns(ConstantResponseWarning):
        found[3] = decode(network, x, target=3, decoding=decoding, space=unit)
    assert [float(found[target].strength) for target in range(4)] == [1, 10, 100, 1]
    fourfold = replace_target(network, x, [0, 1, 3, 2], decoding, unit)
    assert fourfold.strength.tolist() == [1, 10, 1, 100]
    assert torch.equal(fourfold.pictures[1], found[1].pictures[0])


def replace_target(
    network: fxpath.Network, x: Tensor, targets: list[int], decoding: Decoding, space: InputSpace
) -> Decoded:
    with pytest.warns(ConstantResponseWarning):
        return decode(network, x.repeat(4, 1, 1, 1), target=targets, decoding=decoding, space=space)


def test_a_response_that_overflows_is_told() -> None:
    def answer(output: Tensor) -> Tensor:
        return output[:, 0] / (output[:, 0] < 0.5)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.rand(1, 3, 8, 8)
    network = fxpath.trace(model, x, response=answer)
    decoding = Decoding(steps=60, every=1, learning_rate=0.1, **STILL)
    with pytest.raises(
        InputError, match=r"decode: the response of 'original' is inf at step \d+; the network overflows"
    ):
        decode(network, x, decoding=decoding, space=SPACE)


# --- what is refused ---


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "expected steps to be a whole number of at least 1, found 0"),
        ({"steps": 2.5}, "expected steps"),
        ({"steps": True}, "expected steps"),
        ({"seed": -1}, "expected seed to be a whole number of at least 0, found -1"),
        ({"seed": 2**63}, "expected seed"),
        ({"size": 0}, "expected size to be a whole number of at least 1"),
        ({"jitter": -1}, "expected jitter"),
        ({"every": 0}, "expected every"),
        ({"learning_rate": 0}, "expected a learning_rate above 0, found 0"),
        ({"learning_rate": -0.1}, "expected learning_rate to be a number in 0 … 1e[+]06, found -0.1"),
        ({"learning_rate": float("nan")}, "expected learning_rate"),
        ({"scale": 1.0}, "expected scale to be a number in 0 … 0.9, found 1.0"),
        ({"rotation": "5"}, "expected rotation to be a number in 0 … 180, found '5'"),
        ({"decay": 11}, "expected decay"),
    ],
)
def test_parameters_are_checked(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"decoding: {said}"):
        Decoding(**wrong)


def test_parameters_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Decoding().steps = 3  # type: ignore[misc]
    assert Decoding(steps=16).noted == (0, 16)
    assert Decoding(steps=1, every=7).noted == (0, 1)
    assert Decoding(size=None) == Decoding()


def _vectors() -> tuple[fxpath.Network, Any]:
    x = torch.rand(2, 4)
    return fxpath.trace(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), x), x


def _two() -> tuple[fxpath.Network, Any]:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x.mean((2, 3)) + y)

    x = (torch.rand(2, 3, 4, 4), torch.rand(2, 3))
    return fxpath.trace(Two().eval(), x), x


def _tokens() -> tuple[fxpath.Network, Any]:
    x = torch.zeros(2, 1, 3, 4, dtype=torch.int64)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.words(x.flatten(1))).mean(1))

    return fxpath.trace(Tokens().eval(), x), x


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (_vectors, r"float32 \(B, 4\)"),
        (_two, r"float32 \(B, 3, 4, 4\), float32 \(B, 3\)"),
        (_tokens, r"int64 \(B, 1, 3, 4\)"),
    ],
)
def test_networks_without_pictures_are_refused(made: Callable[[], tuple[fxpath.Network, Any]], found: str) -> None:
    network, x = made()
    with pytest.raises(
        InputError,
        match=rf"decode: expected a network whose one input is floating-point pictures .B, C, H, W., found {found}$",
    ):
        decode(network, x, decoding=QUICK)


def test_pathways_that_do_not_fit() -> None:
    network, x = small(), inputs()[:3]
    _, other, _ = linear()
    foreign = fxpath.Pathways(torch.ones(1, other.index.size, dtype=torch.bool), other.index)
    two = fxpath.Pathways(torch.ones(2, network.index.size, dtype=torch.bool), network.index)
    options: dict[str, Any] = {"decoding": QUICK, "space": CIFAR}
    with pytest.raises(RestrictionError, match="pathways: they are of another index"):
        decode(network, x, {"foreign": foreign}, **options)
    with pytest.raises(RestrictionError, match="decode: two: there are 2 pathways for 3 photos; give one each"):
        decode(network, x, {"two": two}, **options)
    with pytest.raises(RestrictionError, match="expected Pathways, found Tensor"):
        decode(network, x, {"mask": two.mask}, **options)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="decode: expected at least one pathway, found none; None stands for"):
        decode(network, x, {}, **options)
    with pytest.raises(InputError, match="expected max_batch to be a whole number of at least 1, found 0"):
        decode(network, x, max_batch=0, **options)
    with pytest.raises(InputError, match="decode: expected an input space of 3 channels, found 1"):
        decode(network, x, decoding=QUICK, space=InputSpace.normalised((0.5,), (0.5,)))
    with pytest.raises(InputError, match="expected a class in 0 … 9, found 10"):
        decode(network, x, target=10, **options)
    with pytest.raises(InputError, match=r"sample 1 holds NaN"):
        decode(network, torch.where(torch.arange(3).view(3, 1, 1, 1) == 1, torch.nan, x), **options)
    with (
        network.masked(two.take([0])),
        pytest.raises(RestrictionError, match="decode: the network is restricted already"),
    ):
        decode(network, x, **options)


def test_a_photo_of_another_branch_is_refused_and_pictures_keep_the_branch() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.conv(x))
            if x.mean() > 0.4:
                h = h * 2
            return self.fc(h.mean((2, 3)))

    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 8)
    with pytest.warns(TraceWarning):
        network = fxpath.trace(Branching().eval(), x, fix_branches=True)
    dark = InputSpace.normalised((0.9,) * 3, (1.0,) * 3)  # a grey picture has a mean of −0.4
    assert decode(network, x, decoding=QUICK, space=dark).climbed.tolist() == [True]
    with pytest.raises(BranchError):
        decode(network, x - 1, decoding=QUICK, space=dark)


# --- what is left behind ---


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.watched, self.fc = nn.Conv2d(3, 4, 3), Watched(), nn.Linear(4 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.watched(self.conv(x))).flatten(1))


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model, x = Seen().eval(), torch.rand(1, 3, 8, 8)
    network = fxpath.trace(model, x, leaves=Watched)
    record: Record = model.watched.record
    pathways = fxpath.NeuronMCT().scores(network, x).pathways(0.2)
    options: dict[str, Any] = {"decoding": Decoding(steps=6, jitter=1, every=2), "space": SPACE}
    record.start()
    with unchanged(model, network._module):
        decode(network, x, {"a": pathways, "b": None}, **options)
    assert record.calls >= 12
    assert record.alive() == 0
    for turn in (1, 2, 3, 5, 9, 11, 12):
        record.start(fails_at=turn)
        with unchanged(model, network._module), pytest.raises(RuntimeError, match="this activation fails"):
            decode(network, x, {"a": pathways, "b": None}, **options)
        gc.collect()
        assert record.alive() == 0, turn
        assert network._restriction is None
    with unchanged(model, network._module), torch.inference_mode():
        inferred = decode(network, x, {"a": pathways}, **options)
    same(inferred, decode(network, x, {"a": pathways}, **options))


@pytest.mark.parametrize("turn", [1, 4, 9])
def test_an_interrupt_leaves_nothing(turn: int) -> None:
    count = 0

    def answer(output: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == turn:
            raise KeyboardInterrupt
        return output[:, 0]

    torch.manual_seed(0)
    model, x = Seen().eval(), torch.rand(1, 3, 8, 8)
    network = fxpath.trace(model, x, leaves=Watched, response=answer)
    count = 0
    model.watched.record.start()
    with unchanged(model, network._module), pytest.raises(KeyboardInterrupt):
        decode(network, x, decoding=Decoding(steps=6, jitter=1, every=2), space=SPACE)
    gc.collect()
    assert (count, model.watched.record.alive(), network._restriction) == (turn, 0, None)
    found = decode(network, x, decoding=Decoding(steps=6, jitter=1, every=2), space=SPACE)
    assert found.target is None
    assert found.response > found.responses[:, 0]


def test_errors_have_one_base() -> None:
    assert issubclass(InputError, FxpathError)
    assert issubclass(RestrictionError, FxpathError)
