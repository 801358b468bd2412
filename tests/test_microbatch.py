"""One micro-batch → rows: equal to what selectors and network say themselves, whatever single samples are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from small_jobs import CIFAR, KEYS, SPARSITIES, Chosen, Placed, cifar, inputs, module, small
from torch import Tensor, nn

import fxpath
from fxpath.errors import ImageError, InputError, SampleError, SparsityError
from fxpath.items import Item, collate, misfit, read_item
from fxpath.microbatch import Recipe, compute_rows, quantised, require_labels
from fxpath.pathways import Pathways, Selection
from fxpath.placement import SIZES, settled, tried
from fxpath.schema import Rows
from fxpath.selectors import parse

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(*selectors: Any, **changes: Any) -> Recipe:
    chosen = selectors or ("neuron_mct", "magnitude", "random:seed=3", "active")
    return Recipe(tuple(parse(selector) for selector in chosen), SPARSITIES, **({"micro_batch": 4} | changes))


def items(rows: Sequence[int], **instead: Any) -> list[Item]:
    data = Chosen(rows)
    return [read_item(data, place, name, **instead) for place, name in enumerate(data.ids)]


def samples_of(rows: Sequence[int]) -> fxpath.Samples:
    return fxpath.Samples(inputs()[list(rows)], ids=[cifar().ids[row] for row in rows])


def mask_of(rows: Rows, key: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return small().index.unpack(rows.pathways[key].columns["mask"])


# --- equal to the parts it is made of ---


@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_masks_and_outcomes_are_those_of_selectors_and_network(granularity: str) -> None:
    network, wanted = small(granularity=granularity), recipe()
    rows = compute_rows(network, wanted, items(range(4)))
    samples = samples_of(range(4))
    original = network.original(samples)
    samples = replace(samples, target=original.target)
    assert tuple(rows.pathways) == KEYS
    for selector in wanted.selectors:
        selection = selector.select(network, samples, SPARSITIES)
        for key, table in rows.pathways.items():
            if parse(key.partition("@")[0]) != selector:
                continue
            pathways = selection[table.sparsity]
            outcome = network.outcome(samples, pathways, original=original)
            columns = table.columns
            assert np.array_equal(columns["mask"], pathways.packed().numpy())
            assert columns["density"].tolist() == pathways.density.tolist()
            for name in ("response", "probability", "dropped_response"):
                assert np.array_equal(columns[name], getattr(outcome, name).numpy()), name
            assert columns["same_class"].tolist() == outcome.same_class.tolist()
            assert columns["live"].tolist() == outcome.live.tolist()
            by_site = [pathways.mask[:, site.slice].sum(1).tolist() for site in network.sites]
            assert columns["kept"].T.tolist() == by_site
            assert set(columns["missing"]) == {""}
            assert (columns["seconds"] > 0).all()
    assert rows.samples["target"].tolist() == rows.samples["prediction"].tolist() == original.target.tolist()
    assert np.array_equal(rows.samples["response"], original.response.numpy())
    assert np.array_equal(rows.samples["probability"], original.probability.numpy())
    assert np.array_equal(rows.active, Pathways(original.active, network.index).packed().numpy())


def test_numbers_follow_from_the_model_alone() -> None:
    """The same columns from the plain module and its hooks, without fxpath's network."""
    model, x = module(), inputs()[:4]
    rows = compute_rows(small(), recipe(), items(range(4)))
    with torch.no_grad():
        logits = model(x)
    labels = torch.tensor(cifar().labels[:4])
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert rows.samples["label"].tolist() == labels.tolist()
    assert rows.samples["label_rank"].tolist() == rank.tolist()
    assert len(set(rank.tolist())) > 1
    assert rows.samples["prediction"].tolist() == logits.argmax(1).tolist()
    assert np.array_equal(rows.samples["response"], logits.amax(1).numpy())
    assert np.allclose(rows.samples["probability"], logits.softmax(1).amax(1).numpy(), rtol=1e-6)
    count = small().index.size
    active = small().index.unpack(rows.active)
    for key in KEYS:
        kept = mask_of(rows, key).sum(1)
        if key == "active":
            assert np.array_equal(mask_of(rows, key), active)
            continue
        share = {"0.8": 2579, "0.95": 644}[key.partition("@")[2]]  # ⌊0.2 · 12 899⌋ and ⌊0.05 · 12 899⌋
        assert count == 12_899
        if key.startswith("neuron_mct"):  # dead units of the head leave some pictures few neurons with a score
            nonzero = (fxpath.NeuronMCT().scores(small(), samples_of(range(4))).values > 0).sum(1).numpy()
            assert (nonzero < share).any()
            assert (nonzero > share).any() or key.endswith("0.8")
            share = np.minimum(share, nonzero)
        assert (kept == share).all()
        dead = mask_of(rows, key) & ~active
        assert dead.any() == key.startswith("random")


def test_live_neurons_are_dead_ones_that_the_masked_network_switches_on() -> None:
    rows = compute_rows(small(), recipe("random:seed=3"), items(range(4)))
    network, samples = small(), samples_of(range(4))
    active = torch.from_numpy(network.index.unpack(rows.active))
    mask = torch.from_numpy(mask_of(rows, "random:seed=3@0.8"))
    with network.masked(Pathways(mask, network.index)):
        on = [value.flatten(1) != 0 for value in network.activations(samples)]
    live = torch.stack(
        [(on[number] & mask[:, s.slice] & ~active[:, s.slice]).sum(1) for number, s in enumerate(network.sites)], dim=1
    )
    assert rows.pathways["random:seed=3@0.8"].columns["live"].tolist() == live.tolist()
    assert live[:, 0].sum() == 0 < live[:, 2:].sum()  # nothing lies before the first site


def test_a_short_micro_batch_is_filled_up() -> None:
    """Three of four places: the three rows have the same bits, and the network still sees four samples."""
    whole, short = (compute_rows(small(), recipe(scores="float32"), items(range(n))) for n in (4, 3))
    assert len(short) == 3
    assert np.array_equal(whole.active[:3], short.active)
    for key in KEYS:
        for name, column in short.pathways[key].columns.items():
            if name != "seconds":
                assert np.array_equal(whole.pathways[key].columns[name][:3], column), (key, name)
    for name in ("neuron_mct", "magnitude"):
        assert np.array_equal(whole.scores[name][0][:3], short.scores[name][0])


@pytest.mark.parametrize(("target", "wanted"), [("predicted", None), ("labels", "labels"), ("0", 0), ("9", 9)])
def test_targets(target: str, wanted: Any) -> None:
    rows = compute_rows(small(), recipe("neuron_mct", target=target), items(range(4)))
    given = list(cifar().labels[:4]) if wanted == "labels" else wanted
    scores = fxpath.NeuronMCT().scores(small(), samples_of(range(4)), given)
    expected = scores.pathways(0.95)
    assert np.array_equal(mask_of(rows, "neuron_mct@0.95"), expected.mask.numpy())
    logits = small()(inputs()[:4]).detach()
    targets = logits.argmax(1).tolist() if wanted is None else given if wanted == "labels" else [wanted] * 4
    assert rows.samples["target"].tolist() == targets
    assert rows.samples["response"].tolist() == [float(logits[row, cls]) for row, cls in enumerate(targets)]


def test_double_precision_keeps_its_digits() -> None:
    network = small(torch.float64)
    batch = [replace(item, inputs=item.inputs.double()) for item in items(range(4))]
    rows = compute_rows(network, recipe("neuron_mct"), batch)
    samples = fxpath.Samples(inputs()[:4].double())
    selection = fxpath.NeuronMCT().select(network, samples, SPARSITIES)
    outcome = network.outcome(samples, selection[0.8])
    assert np.array_equal(rows.pathways["neuron_mct@0.8"].columns["response"], outcome.response.numpy())


# --- scores ---


def test_scores_in_float16_keep_order_range_and_zeros() -> None:
    generator = torch.Generator().manual_seed(5)
    signed = torch.randn(3, 4000, generator=generator) * torch.logspace(-12, 6, 4000)
    signed[:, ::7] = 0
    signed[1] *= 1e-30
    signed[2] = 0
    values, scale = quantised(signed, np.dtype(np.float16))
    restored = values.astype(np.float64) * scale[:, None]
    assert values.dtype == np.float16
    assert np.isfinite(values).all()
    assert np.array_equal(np.sign(values), np.sign(signed.numpy()))  # what is not 0 stays so, and only that
    largest = np.abs(signed.numpy()).max(axis=1)
    assert np.allclose(np.abs(restored).max(axis=1)[:2], largest[:2], rtol=2**-10)
    for row in (0, 1):
        normal = np.abs(signed[row].numpy()) > 1e-9 * largest[row]
        error = np.abs(restored[row] / np.where(normal, signed[row].numpy(), 1) - 1)[normal]
        assert error.max() < 2**-10
        assert normal.sum() > 1000


def test_scores_in_float32_are_the_scores() -> None:
    signed = torch.tensor([[0.0, -3.0, 1e-40]])
    values, scale = quantised(signed, np.dtype(np.float32))
    assert values.tolist() == signed.tolist()
    assert scale.tolist() == [1.0]


def test_scores_are_kept_for_selectors_that_score() -> None:
    rows = compute_rows(small(), recipe(scores="float32"), items(range(4)))
    assert set(rows.scores) == {"neuron_mct", "magnitude"}
    expected = fxpath.NeuronMCT().scores(small(), samples_of(range(4)))
    assert np.array_equal(rows.scores["neuron_mct"][0], expected.signed.numpy())
    assert compute_rows(small(), recipe(), items(range(4))).scores == {}


# --- single samples that cannot be used ---


def broken(x: Tensor, value: float) -> Tensor:
    x[1, 2, 3] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_sample_with_values_that_are_no_numbers_takes_no_other_along(value: float) -> None:
    batch, clean = items(range(4)), items([0, 2, 3])
    batch[1] = replace(batch[1], inputs=broken(batch[1].inputs.clone(), value))
    rows, without = compute_rows(small(), recipe(), batch), compute_rows(small(), recipe(), clean)
    assert rows.samples["status"] == ["ok", "the input holds NaN or infinite values", "ok", "ok"]
    assert rows.samples["label"].tolist() == list(cifar().labels[:4])
    for key in KEYS:
        columns = rows.pathways[key].columns
        assert not columns["mask"][1].any()
        assert np.isnan([columns[name][1] for name in ("response", "density", "probability", "dropped_response")]).all()
        assert not columns["same_class"][1]
        assert np.array_equal(columns["mask"][[0, 2, 3]], without.pathways[key].columns["mask"])
        assert np.array_equal(columns["response"][[0, 2, 3]], without.pathways[key].columns["response"])
    assert np.isnan(rows.samples["response"][1])
    assert rows.samples["target"][1] == rows.samples["prediction"][1] == rows.samples["label_rank"][1] == -1


class Overflows(nn.Module):
    """NaN for bright pictures alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = module()

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.mean((1, 2, 3)) > 0.9).to(x.dtype)
        return self.body(x) + (bright * -1).log1p()[:, None] * bright[:, None]


def test_a_network_that_overflows_on_one_sample() -> None:
    network = fxpath.trace(module(Overflows), torch.zeros(2, 3, 32, 32))
    batch = items(range(4))
    batch[2] = replace(batch[2], inputs=torch.full((3, 32, 32), 1.5))
    rows = compute_rows(network, recipe("neuron_mct"), batch)
    assert rows.samples["status"] == ["ok", "ok", "the network's response is NaN or infinite", "ok"]
    assert not rows.active[2].any()
    assert rows.active[[0, 1, 3]].any(axis=1).all()


@dataclass(frozen=True)
class Fussy:
    """A selector that fails on the sample whose id ends as said, after others have selected."""

    key: ClassVar[str] = "fussy"
    single: ClassVar[bool] = True
    ending: str = ""

    def select(self, network: fxpath.Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        bad = [row for row, name in enumerate(samples.names) if str(name).endswith(self.ending)]
        if bad:
            raise SampleError("fussy: no", bad, ["fussy says no"] * len(bad))
        return Selection({None: Pathways(network.original(samples).active, network.index)})


def test_a_selector_that_fails_late_leaves_nothing_of_the_sample() -> None:
    wanted = replace(recipe("neuron_mct"), selectors=(parse("neuron_mct"), Fussy(ending="_8")))
    rows = compute_rows(small(), wanted, items(range(4)))  # cifar10_01_8 and cifar10_02_8
    assert rows.samples["status"] == ["ok", "fussy says no", "fussy says no", "ok"]
    assert not rows.pathways["neuron_mct@0.8"].columns["mask"][1:3].any()
    nothing = compute_rows(small(), replace(wanted, selectors=(*wanted.selectors[:1], Fussy())), items(range(4)))
    assert set(nothing.samples["status"]) == {"fussy says no"}
    assert not nothing.active.any()
    assert np.isnan(nothing.samples["response"]).all()
    assert not nothing.pathways["neuron_mct@0.8"].columns["mask"].any()
    assert nothing.samples["target"].tolist() == [-1] * 4


def test_a_micro_batch_of_which_nothing_can_be_used() -> None:
    batch = [replace(item, inputs=None, problem="gone") for item in items(range(3))]
    rows = compute_rows(small(), recipe(scores="float16"), batch)
    assert rows.samples["status"] == ["gone"] * 3
    assert rows.scores["neuron_mct"][0].shape == (3, 12_899)
    assert not rows.active.any()


def test_samples_without_a_label_where_labels_are_explained() -> None:
    batch = [replace(item, label=-1) if place == 2 else item for place, item in enumerate(items(range(4)))]
    rows = compute_rows(small(), recipe("neuron_mct", target="labels"), batch)
    assert rows.samples["status"] == ["ok", "ok", "no label, and the job explains labels", "ok"]
    assert compute_rows(small(), recipe("neuron_mct"), batch).samples["status"] == ["ok"] * 4


def test_strict_stops_at_the_sample() -> None:
    batch = items(range(4))
    batch[2] = replace(batch[2], inputs=broken(batch[2].inputs.clone(), float("nan")))
    with pytest.raises(
        SampleError, match=r"sample 'foolbox:cifar10_02_8' cannot be used: the input holds NaN"
    ) as raised:
        compute_rows(small(), recipe(strict=True), batch)
    assert raised.value.positions == (2,)
    batch[0] = replace(batch[0], inputs=None, problem="unreadable")
    with pytest.raises(SampleError, match=r"sample 'foolbox:cifar10_00_3' cannot be used: unreadable"):
        compute_rows(small(), recipe(strict=True), batch)


def test_labels_beyond_the_classes() -> None:
    batch = items(range(4))
    require_labels(batch, 10)
    with pytest.raises(InputError, match=r"sample 'foolbox:cifar10_01_8' has the label 8; the classes are 0 … 7"):
        require_labels(batch, 8)
    require_labels([replace(batch[1], problem="gone")], 8)


# --- reading samples ---


class Odd:
    """A data set of one item, or of one exception."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __getitem__(self, place: int) -> Any:
        if isinstance(self.item, BaseException):
            raise self.item
        return self.item


X = torch.zeros(3, 32, 32)


@pytest.mark.parametrize(
    ("item", "label"),
    [
        (X, -1), ((X, 3), 3), ([X, 3], 3), ((X, np.int64(3)), 3), ((X, torch.tensor(3)), 3),
        ((X, torch.tensor(-4)), -1), ((X, np.uint8(200)), 200), ((X, -1), -1),
    ],
)  # fmt: skip
def test_items_with_and_without_labels(item: Any, label: int) -> None:
    found = read_item(Odd(item), 0, "a")
    assert (found.label, found.problem) == (label, None)
    assert found.inputs is X
    assert misfit(found, small()) is None


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ((X, 3.0), "network: expected the arguments of the example (1), found 2"),
        ((X, True), "network: expected the arguments of the example (1), found 2"),
        ((X, "cat"), "network: expected the arguments of the example (1), found 2"),
        ((X, torch.tensor(1.0)), "expected an input of shape (3, 32, 32), found (3, 32, 32), ()"),
        ((X, X), "expected an input of shape (3, 32, 32), found (3, 32, 32), (3, 32, 32)"),
        (X[:2], "expected an input of shape (3, 32, 32), found (2, 32, 32)"),
        (X[None], "expected an input of shape (3, 32, 32), found (1, 3, 32, 32)"),
        (X.double(), "network: expected inputs of torch.float32, found torch.float64; convert them with .to()"),
        ((X.to(torch.uint8), 1), "network: expected inputs of torch.float32, found torch.uint8; convert them"),
        ({"x": X}, "network: expected the arguments of the example (1), found ['x']"),
        (X.numpy(), "expected a tensor from the data set, found ndarray"),
        (None, "expected a tensor from the data set, found NoneType"),
        ("photo.jpg", "expected a tensor from the data set, found str"),
        ((), "expected a tensor from the data set, found tuple"),
    ],
)  # fmt: skip
def test_items_that_do_not_fit(item: Any, reason: str) -> None:
    found = read_item(Odd(item), 0, "a")
    assert found.problem is None
    assert str(misfit(found, small())).startswith(reason)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even that")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImageError("image a.jpg: cannot be read"), "image a.jpg: cannot be read"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("one\n  two\tthree\0"), "ValueError: one two three"),
        (ImageError(""), "ImageError "),
        (ImageError("ok"), "ImageError ok"),
        (ValueError("\udcff is no text"), "ValueError: \\udcff is no text"),
        (ValueError("long " * 1000), "ValueError: " + ("long " * 1000)[: 299 - 12] + "…"),
        (StopIteration(), "StopIteration"),
        (MemoryError(), "MemoryError"),
        (UnspeakableError(), "test_microbatch.UnspeakableError: <exception str() failed>"),
        (InputError("label"), "label"),
    ],
)  # fmt: skip
def test_whatever_a_data_set_raises_is_one_short_line(error: BaseException, reason: str) -> None:
    found = read_item(Odd(error), 0, "a")
    assert found.problem == reason
    assert found.inputs is None


def test_a_label_too_large_to_store() -> None:
    assert read_item(Odd((X, 2**63)), 0, "a").problem == f"expected a label of at most 64 bits, found {2**63}"
    assert read_item(Odd((X, 2**63 - 1)), 0, "a").label == 2**63 - 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_no_broken_sample(stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        read_item(Odd(stop()), 0, "a")


def test_thumbnails_also_of_samples_that_fail() -> None:
    data = Chosen(range(4), {1: ValueError("gone")})
    batch = [read_item(data, place, name, thumbnails=16) for place, name in enumerate(data.ids)]
    rows = compute_rows(small(), recipe("active"), batch)
    assert rows.thumbnails is not None
    assert rows.thumbnails.shape == (4, 16, 16, 3)
    assert np.array_equal(rows.thumbnails[0], cifar().thumbnail(0, 16))
    assert not rows.thumbnails[1].any()
    data.thumbnail = lambda place, size: np.zeros((5, 5, 3), np.uint8)  # type: ignore[method-assign]
    wrong = read_item(data, 0, "a", thumbnails=16)
    assert wrong.problem is not None
    assert "could not broadcast input array from shape (5,5,3) into shape (16,16,3)" in wrong.problem


def test_inputs_of_several_tensors() -> None:
    pair = [Item(str(n), [torch.full((2,), float(n)), torch.zeros(3)]) for n in range(2)]
    samples = collate(pair, small())
    assert isinstance(samples.inputs, tuple)
    assert [tuple(leaf.shape) for leaf in samples.tensors] == [(2, 2), (2, 3)]
    assert samples.names == ("0", "1")
    named = collate([Item("a", {"x": torch.zeros(2), "flag": True})], small())
    assert named.inputs["flag"] is True
    assert named.inputs["x"].shape == (1, 2)
    with pytest.raises(InputError, match="samples '0' and 'a' are put together unlike"):
        collate([pair[0], Item("a", {"x": torch.zeros(2)})], small())


@dataclass(frozen=True)
class Stalls:
    """A selector that reaches one of its sparsities only, and reports numbers of its own."""

    key: ClassVar[str] = "stalls"
    single: ClassVar[bool] = False
    keeps_scores: ClassVar[bool] = False

    def select(self, network: fxpath.Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        found = fxpath.Magnitude().select(network, samples, sparsities[:1])
        steps = torch.arange(samples.batch, dtype=torch.int32)
        return Selection(found.pathways, {"steps": steps}, {sparsities[1]: "no score is left"})


def test_a_sparsity_that_is_not_reached_says_why() -> None:
    wanted = replace(recipe("active"), selectors=(Stalls(),))
    rows = compute_rows(small(), wanted, items(range(3)))
    reached, stalled = rows.pathways["stalls@0.8"].columns, rows.pathways["stalls@0.95"].columns
    assert reached["missing"].tolist() == [""] * 3
    assert stalled["missing"].tolist() == ["no score is left"] * 3
    assert np.isnan(stalled["density"]).all()
    assert not stalled["mask"].any()
    assert reached["diagnostics/steps"].tolist() == [0, 1, 2]


@dataclass(frozen=True)
class StallsAtTimes(Stalls):
    """Reaches a sparsity for every second sample only, and has numbers that differ between sparsities."""

    key: ClassVar[str] = "stalls_at_times"

    def select(self, network: fxpath.Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        found = fxpath.Magnitude().select(network, samples, sparsities)
        why = ["" if row % 2 else "no score is left" for row in range(samples.batch)]
        own = {level: {"left": torch.full((samples.batch,), level)} for level in sparsities}
        return Selection(found.pathways, missing={sparsities[1]: why}, by_sparsity={**own})


def test_a_sparsity_that_some_samples_do_not_reach() -> None:
    wanted = replace(recipe("active"), selectors=(StallsAtTimes(),))
    rows = compute_rows(small(), wanted, items(range(3)))
    columns = rows.pathways["stalls_at_times@0.95"].columns
    assert columns["missing"].tolist() == ["no score is left", "", "no score is left"]
    assert np.isnan(columns["density"]).tolist() == [True, False, True]
    assert np.isnan(columns["response"]).tolist() == [True, False, True]
    assert columns["mask"].any(axis=1).tolist() == [False, True, False]
    assert columns["kept"].any(axis=1).tolist() == [False, True, False]
    np.testing.assert_array_equal(columns["diagnostics/left"], np.float32([0.95] * 3))
    np.testing.assert_array_equal(
        rows.pathways["stalls_at_times@0.8"].columns["diagnostics/left"], np.float32([0.8] * 3)
    )
    assert set(rows.pathways["stalls_at_times@0.8"].columns["missing"]) == {""}


def test_a_selection_says_who_did_not_reach_a_sparsity() -> None:
    network = small()
    found = StallsAtTimes().select(network, samples_of([0, 1, 2]), (0.8, 0.95))
    assert found[0.8].batch == 3
    with pytest.raises(SparsityError, match=r"not reached by sample 0, 2 of the batch: no score"):
        found[0.95]
    assert found.reasons(0.8, 3) == ["", "", ""]
    assert Stalls().select(network, samples_of([0]), (0.8, 0.95)).reasons(0.95, 2) == ["no score is left"] * 2


# --- the place in a micro-batch ---


def test_a_network_in_which_all_places_are_alike() -> None:
    trial = tried(small(), samples_of([3]), 4)
    assert trial.equal
    assert trial.classes == len(CIFAR)
    assert settled(small(), samples_of([3]), None) == (SIZES[0], trial)


def test_a_network_in_which_places_differ() -> None:
    network = fxpath.trace(module(Placed), torch.zeros(2, 3, 32, 32))
    equal = {size: tried(network, samples_of([3]), size).equal for size in (1, 2, 3, 4, 8)}
    assert equal == {1: True, 2: True, 3: False, 4: False, 8: False}
    size, trial = settled(network, samples_of([3]), None)
    assert (size, trial.equal) == (2, True)
    size, trial = settled(network, samples_of([3]), 5)
    assert (size, trial.equal) == (5, False)


def test_places_of_a_network_without_gradients() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 2, 8, 8), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x)).flatten(1).detach())

    network = fxpath.trace(module(Cut), torch.zeros(2, 3, 32, 32))
    assert tried(network, samples_of([0]), 4).classes == 4
