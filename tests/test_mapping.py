"""Attribution maps of every sample: stored as a method gives them, whatever stops the job; and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
import torch
from footprint import unchanged
from processes import leftovers
from small_jobs import METHODS, Chosen, add_maps, by_sample, inputs, module, run, small
from test_kill import ENVIRONMENT, Log, killed
from torch import Tensor, nn

import fxpath
from fxpath import mapping, parts, records
from fxpath.attribution import pixel_scores
from fxpath.errors import InputError, RestrictionError, SampleError, StoreError, TraceWarning
from fxpath.maptables import scaled
from fxpath.methods import MaskedGradient, parse_method
from fxpath.pathways import Selection
from fxpath.samples import type_of_target
from fxpath.selectors import registry

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = ("gradient", "neuron_mct@0.9", "masked_gradient:random:seed=3@0.9", "neuron_mct@0.9*")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the first ten pictures, without maps: three micro-batches, the last one short."""
    path = tmp_path_factory.mktemp("computed") / "run.h5"
    run(Chosen(range(10)), path)
    return path


@pytest.fixture(scope="module")
def undisturbed(computed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with maps."""
    path = Path(shutil.copy(computed, tmp_path_factory.mktemp("undisturbed")))
    add_maps(Chosen(range(10)), path)
    return path


@pytest.fixture
def path(computed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(computed, tmp_path / "run.h5"))


def stopped(path: Path, after: int = 6, **options: Any) -> None:
    """The job, stopped when it reads picture `after`: what lies in whole micro-batches before is kept."""
    with pytest.raises(KeyboardInterrupt):
        add_maps(Chosen(range(10), {after: KeyboardInterrupt()}), path, **options)


@dataclass(frozen=True)
class Odd:
    """A method of one's own: the gradient, or something else for samples whose id ends as said."""

    ending: str = "nothing"
    instead: float | str = float("nan")
    pathway: str | None = None

    @property
    def key(self) -> str:
        return "odd"

    def attribute(
        self, network: fxpath.Network, x: Any, target: type_of_target = None, pathways: fxpath.Pathways | None = None
    ) -> Tensor:
        samples = network.samples(x, target)
        found = parse_method("gradient").attribute(network, samples)
        bad = [row for row, name in enumerate(samples.names) if str(name).endswith(self.ending)]
        if bad and self.instead == "error":
            raise SampleError("odd: no", bad, ["odd says no"] * len(bad))
        if bad and self.instead == "refused":
            raise InputError("odd cannot stand it")
        if not isinstance(self.instead, str):
            found[bad, 0, 3, 4] = self.instead
        return found


# --- what is stored is what is computed ---


@pytest.mark.parametrize("reduction", ["max_abs", "signed_max", "signed_sum"])
def test_a_store_holds_what_methods_give_on_the_same_micro_batches(path: Path, reduction: Any) -> None:
    report = add_maps(Chosen(range(10)), path, reduction=reduction)
    assert (report.samples, report.computed, report.reused) == (10, 10, 0)
    assert report.methods == report.made == METHODS == KEYS
    assert report.missing == {key: {} for key in KEYS}
    assert leftovers(path.parent) == {"run.h5"}
    with fxpath.open_store(path) as store:
        assert store.map_keys == KEYS
        targets = store.samples()["target"].tolist()
        for start in range(0, 10, 4):
            rows = [*range(start, min(start + 4, 10))]
            filled = [*rows, *[rows[0]] * (4 - len(rows))]
            target = [targets[row] for row in filled]
            x = inputs()[filled]
            for text in KEYS:
                method = parse_method(text)
                given = None
                if method.pathway is not None:
                    masks = np.stack([store.mask(method.pathway, row) for row in filled])
                    given = fxpath.Pathways(torch.from_numpy(masks), small().index)
                found = method.attribute(small(), x, target, given)
                kept = "signed_max" if reduction == "max_abs" else reduction
                values, scale = scaled(pixel_scores(found, kept).numpy()[: len(rows)])
                expected = values.astype(np.float32) * scale[:, None, None]
                assert store.maps(text, slice(rows[0], rows[-1] + 1)).tobytes() == expected.tobytes()
                assert store.map_reduction(text) == kept
                if reduction == "max_abs":  # the paper's score is the absolute value
                    scores = pixel_scores(found)[: len(rows)].numpy()
                    np.testing.assert_allclose(np.abs(expected), scores, rtol=2**-11, atol=0)
        assert store.map_parameters("gradient") == {}
        assert store.map_parameters("neuron_mct@0.9*") == {"method": "neuron_mct@0.9", "size": 3}
        for key in KEYS:
            assert (store.map_seconds(key) > 0).all()
            assert store.map_missing(key).tolist() == [""] * 10
        assert (store.maps("neuron_mct@0.9") == 0).any()
        assert (store.maps("neuron_mct@0.9*") >= 0).all()
        assert (store.maps("gradient") < 0).any()


def test_in_float64_maps_are_the_gradients_by_autograd(tmp_path: Path) -> None:
    network = small(torch.float64)

    class Double(Chosen):
        def __getitem__(self, place: int) -> Any:
            x, label = super().__getitem__(place)
            return x.double(), label

    fxpath.attribute(network, Double(range(3)), tmp_path / "run.h5", methods=["gradient"], progress=False,
                     reduction="signed_sum", target=7)  # fmt: skip
    x = inputs()[:3].double().requires_grad_()
    (slope,) = torch.autograd.grad(module(dtype=torch.float64)(x)[:, 7].sum(), x)
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert store.keys == ()  # nothing that no method starts from
        expected = slope.sum(dim=1).numpy()
        error = np.abs(store.maps("gradient") - expected)
        assert (error <= 2**-11 * np.abs(expected) + 1e-9 * np.abs(expected).max()).all()


def test_maps_explain_the_class_that_the_store_explains(tmp_path: Path) -> None:
    for target in ("predicted", "labels", 3):
        path = tmp_path / f"{target}.h5"
        run(Chosen(range(4)), path, target=target, selectors=["neuron_mct"])
        add_maps(Chosen(range(4)), path, methods=["gradient"])
        with fxpath.open_store(path) as store:
            wanted = store.samples()["target"].tolist()
            expected = parse_method("gradient").attribute(small(), inputs()[:4], wanted)
            values, scale = scaled(pixel_scores(expected, "signed_max").numpy())
            assert store.maps("gradient").tobytes() == (values.astype("f4") * scale[:, None, None]).tobytes()
    with pytest.raises(
        StoreError, match=r"of another job \(target: there \"labels\", here \"predicted\"\); ask for the"
    ):
        add_maps(Chosen(range(4)), tmp_path / "labels.h5", methods=["neuron_mct@0.9"], target="predicted")
    add_maps(Chosen(range(4)), tmp_path / "labels.h5", methods=["neuron_mct@0.9"], target="labels")


def test_without_a_store_it_is_computed_first(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    report = add_maps(Chosen(range(6)), path, methods=["neuron_mct@0.95", "random:seed=3@0.8", "gradient"],
                      thumbnails=12)  # fmt: skip
    assert report.made == ("neuron_mct@0.95", "random:seed=3@0.8", "gradient")
    run(Chosen(range(6)), tmp_path / "other.h5", selectors=["neuron_mct", "random:seed=3"], sparsities=[0.8, 0.95],
        thumbnails=12)  # fmt: skip
    with fxpath.open_store(path) as store, fxpath.open_store(tmp_path / "other.h5") as other:
        assert store.keys == other.keys
        assert json.loads(store.header.notes["record"]) == json.loads(other.header.notes["record"])
    assert leftovers(tmp_path) == {"run.h5", "other.h5"}
    add_maps(Chosen(range(6)), tmp_path / "other.h5", methods=["neuron_mct@0.95", "random:seed=3@0.8", "gradient"])
    assert by_sample(path) == by_sample(tmp_path / "other.h5")


@pytest.mark.parametrize("rows", [(3, 1, 7, 0, 9, 2, 5), (9, 8, 7, 6, 5, 4, 3, 2, 1, 0), (7,)])
def test_order_and_neighbours_change_no_bit(tmp_path: Path, undisturbed: Path, rows: tuple[int, ...]) -> None:
    run(Chosen(rows), tmp_path / "run.h5")
    add_maps(Chosen(rows), tmp_path / "run.h5")
    wanted, found = by_sample(undisturbed), by_sample(tmp_path / "run.h5")
    assert len(found) == len(rows)
    for name in found:
        assert found[name] == wanted[name]


def test_a_response_without_classes_and_a_network_of_channels(tmp_path: Path) -> None:
    network = fxpath.trace(
        module(), torch.zeros(2, 3, 32, 32), granularity="channel", response=lambda y: y.square().sum(dim=1)
    )
    add_maps(Chosen(range(3)), tmp_path / "run.h5", network, methods=["neuron_mct@0.5", "gradient"])
    x = inputs()[:3].requires_grad_()
    (slope,) = torch.autograd.grad(module()(x).square().sum(), x)
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert store.samples()["target"].tolist() == [-1, -1, -1]
        expected = pixel_scores(slope, "signed_max").numpy()
        np.testing.assert_allclose(store.maps("gradient"), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# --- more maps, maps that are there ---


def test_maps_that_are_there_are_not_made_again(path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = add_maps(Chosen(range(10)), path, methods=["neuron_mct@0.9"])
    before = path.read_bytes()
    report = add_maps(Chosen(range(10)), path)
    assert report.methods == KEYS
    assert report.made == ("gradient", "masked_gradient:random:seed=3@0.9", "neuron_mct@0.9*")
    assert by_sample(path) == by_sample(undisturbed)
    with fxpath.open_store(path) as store, fxpath.open_store(io.BytesIO(before)) as first:
        old = first.map_seconds("neuron_mct@0.9")
        assert store.map_seconds("neuron_mct@0.9").tolist() == old.tolist()
    before, data = path.read_bytes(), Chosen(range(10))
    monkeypatch.setattr(mapping, "map_rows", None)
    monkeypatch.setattr(mapping, "try_methods", None)
    report = add_maps(data, path, methods=[*KEYS[2:], KEYS[0]])
    assert (report.made, report.computed, report.reused) == ((), 0, 10)
    assert data.read == []
    assert path.read_bytes() == before
    assert leftovers(path.parent) == {"run.h5"}


def test_other_maps_by_the_same_name_are_refused(path: Path) -> None:
    add_maps(Chosen(range(10)), path, methods=["gradient", Odd("one")])
    before = path.read_bytes()
    with pytest.raises(
        StoreError,
        match=r"run.h5 has maps of gradient with the reduction signed_max, and signed_sum is asked for; ask for "
        r"signed_max, leave the method out, or choose another output file",
    ):
        add_maps(Chosen(range(10)), path, methods=["gradient", "neuron_mct@0.9"], reduction="signed_sum")
    with pytest.raises(StoreError, match=r'maps of odd with the parameters {"ending": "one", .*, and .*two".* asked'):
        add_maps(Chosen(range(10)), path, methods=[Odd("two")])
    assert path.read_bytes() == before
    for reduction in ("max_abs", "signed_max"):  # the same values
        assert add_maps(Chosen(range(10)), path, methods=["gradient"], reduction=reduction).made == ()
    assert add_maps(Chosen(range(10)), path, methods=["neuron_mct@0.9"], reduction="signed_sum").made != ()


# --- going on ---


@pytest.mark.parametrize("after", [0, 3, 4, 7, 8, 9])
def test_a_stopped_job_goes_on_where_it_was(path: Path, undisturbed: Path, after: int) -> None:
    before = path.read_bytes()
    stopped(path, after)
    kept = [f"part-{number:07d}.h5" for number in range(after // 4)]
    assert leftovers(path.parent) == ({"run.h5", "run.h5.maps"} if kept else {"run.h5"})
    assert path.read_bytes() == before
    if kept:
        assert leftovers(path.with_name("run.h5.maps")) == {"job.json", *kept}
    data = Chosen(range(10))
    report = add_maps(data, path)
    assert (report.computed, report.reused) == (10 - 4 * len(kept), 4 * len(kept))
    assert set(data.read[1:]) == set(data.ids[4 * len(kept) :])  # the first is what the methods are tried on
    assert by_sample(path) == by_sample(undisturbed)
    assert leftovers(path.parent) == {"run.h5"}


def test_a_job_that_was_stopped_while_it_computed_pathways_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    path = tmp_path / "run.h5"
    stopped(path, 8, methods=METHODS)
    assert leftovers(tmp_path) == {"run.h5.parts"}
    data = Chosen(range(10))
    add_maps(data, path)
    assert data.read.count(data.ids[1]) == 1  # for its maps alone
    found, wanted = by_sample(path), by_sample(undisturbed)
    for name, sample in found.items():
        assert sample == {column: wanted[name][column] for column in sample}
    assert leftovers(tmp_path) == {"run.h5"}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda part: part.write_bytes(part.read_bytes()[:-1000]),
    "empty": lambda part: part.write_bytes(b""),
    "flipped": lambda part: part.write_bytes(part.read_bytes()[:-700] + b"\xff" * 9 + part.read_bytes()[-691:]),
    "another's": lambda part: shutil.copy(part.with_name("part-0000001.h5"), part),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_made_again(
    path: Path, undisturbed: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(path, 8)
    DAMAGE[damage](path.with_name("run.h5.maps") / "part-0000000.h5")
    report = add_maps(Chosen(range(10)), path)
    assert report.reused == 4
    assert "part-0000000.h5" in (said := capsys.readouterr().err)
    assert said.startswith("attribute: ")
    assert said.endswith("this part is computed again\n")
    assert by_sample(path) == by_sample(undisturbed)


def test_the_parts_of_another_job_are_refused_by_what_differs(path: Path) -> None:
    stopped(path)
    folder = path.with_name("run.h5.maps")
    names = leftovers(folder)
    for options, said in (
        ({"methods": METHODS[:2]}, r"methods: there \[\[.*, here \[\]"),
        ({"reduction": "signed_sum"}, 'reduction: there "signed_max", here "signed_sum"'),
    ):
        with pytest.raises(StoreError, match=rf"attribute: .*run.h5.maps holds the results of another job \({said}.*"
                                             r"start that one again to finish it, or remove that folder"):  # fmt: skip
            add_maps(Chosen(range(10)), path, **options)
        assert leftovers(folder) == names
    path.unlink()
    run(Chosen(range(10)), path, selectors=["neuron_mct", "random:seed=3"], target=4)
    with pytest.raises(StoreError, match=r"holds the results of another job \(store: there"):
        add_maps(Chosen(range(10)), path)
    shutil.rmtree(folder)
    add_maps(Chosen(range(10)), path)


def test_parts_whose_maps_are_in_the_store_already_are_forgotten(
    path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the new store has its name leaves them; then more methods are asked for."""
    with monkeypatch.context() as patched:
        patched.setattr(mapping, "remove_parts", lambda folder: None)
        add_maps(Chosen(range(10)), path, methods=METHODS[:2])
    assert leftovers(path.parent) == {"run.h5", "run.h5.maps"}
    report = add_maps(Chosen(range(10)), path)
    assert report.made == METHODS[2:]
    assert by_sample(path) == by_sample(undisturbed)
    assert leftovers(path.parent) == {"run.h5"}


def test_two_processes_at_one_store(path: Path, undisturbed: Path) -> None:
    stopped(path, 8)
    names = leftovers(path.with_name("run.h5.maps"))
    with records.held(path.with_name("run.h5.maps")):
        with pytest.raises(
            StoreError, match=r"attribute: another process is at work in .*run.h5.maps; wait for it, or"
        ):
            add_maps(Chosen(range(10)), path)
        assert leftovers(path.with_name("run.h5.maps")) == names
    with records.held(path.with_name("new.h5.maps")):  # which may be computing pathways, with no part yet
        with pytest.raises(StoreError, match="another process"):
            add_maps(Chosen(range(10)), path.with_name("new.h5"))
        assert "new.h5" not in leftovers(path.parent)
    assert add_maps(Chosen(range(10)), path).reused == 8
    assert by_sample(path) == by_sample(undisturbed)


def test_a_store_that_changes_meanwhile_is_left_as_it_is(path: Path, tmp_path: Path) -> None:
    run(Chosen(range(10)), tmp_path / "other.h5", selectors=["active"])
    other = (tmp_path / "other.h5").read_bytes()

    class Meanwhile(Chosen):
        def __getitem__(self, place: int) -> Any:
            if place == 9:
                (tmp_path / "other.h5").replace(path)
            return super().__getitem__(place)

    with pytest.raises(StoreError, match=r"run.h5 was changed while its maps were made, and is left as it is now"):
        add_maps(Meanwhile(range(10)), path, methods=["gradient"])
    assert path.read_bytes() == other
    assert len(leftovers(path.with_name("run.h5.maps"))) == 4


# --- killed ---

BEGINNING = ["run.h5", "run.h5.maps"]
RECORD = [*BEGINNING, "run.h5.maps/job.json"]
PART = [f"run.h5.maps/part-{number:07d}.h5" for number in range(3)]
UNFINISHED = "run.h5.maps/.part-0000000.h5.tmp"
ADDING = [".run.h5.tmp", *RECORD, *PART]

# what must be on the disk right after each kill; writing may be a micro-batch behind where computing is killed
EXPECTED: dict[str, list[str] | None] = {
    "before the folder of parts": ["run.h5"],
    "trying the methods": BEGINNING,
    "before job.json": BEGINNING,
    "before job.json gets its name": [*BEGINNING, "run.h5.maps/.job.json.tmp"],
    "first micro-batch, computing": RECORD,
    "first part, mid-write": [*RECORD, UNFINISHED],
    "first part, before its name": [*RECORD, UNFINISHED],
    "first part, after its name": [*RECORD, PART[0]],
    "third micro-batch, reading": None,
    "last part, after its name": [*RECORD, *PART],
    "adding, first chunk": ADDING,
    "adding, old content is moved": ADDING,
    "adding, maps are moved": ADDING,
    "adding, before the store gets its name": ADDING,
    "adding, after the store has its name": [*RECORD, *PART],
    "before the parts are removed": [*RECORD, *PART],
    "while the parts are removed": [*RECORD, *PART[1:]],
}
COMPUTING = [f"run.h5.parts/{name}" for name in ("job.json", *(f"part-{number:07d}.h5" for number in range(3)))]
BOTH = {
    "second part of pathways": ["run.h5.maps", "run.h5.parts", *COMPUTING[:3]],
    "before pathways are merged": ["run.h5.maps", "run.h5.parts", *COMPUTING],
    "the store is there, without maps": BEGINNING,
    "first part of maps": [*RECORD, PART[0]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def log(folder: Path) -> Log:
    return killed(folder, "attribute")


def test_every_moment_was_tried(log: Log) -> None:
    assert [name for name in log if not name.isdecimal()] == list(EXPECTED)
    assert sum(name.isdecimal() for name in log) == 3


@pytest.mark.parametrize("moment", EXPECTED)
def test_a_killed_job_leaves_the_old_store_or_the_new_one_and_goes_on(folder: Path, log: Log, moment: str) -> None:
    seen = log[moment]
    assert seen["status"] == -signal.SIGKILL, seen["stderr"]  # a job that finished before does not count
    assert seen["doing"]
    if EXPECTED[moment] is not None:
        assert sorted(seen["left"]) == sorted(EXPECTED[moment] or [])
    number = list(EXPECTED).index(moment)
    between, wanted = folder / f"{number}.h5", by_sample(folder / "undisturbed" / "run.h5")
    if moment.endswith(("store has its name", "removed")):
        assert by_sample(between) == wanted
    else:
        assert between.read_bytes() == (folder / "old" / "run.h5").read_bytes()
    assert seen["again"] == 0, seen["stderr"]
    assert seen["end"] == ["run.h5"]
    assert by_sample(folder / str(number) / "run.h5") == wanted


def test_a_full_disk_that_the_kernel_sees_to_leaves_the_old_store(folder: Path, log: Log) -> None:
    for limit, seen in log.items():
        if not limit.isdecimal():
            continue
        assert seen["status"] == 2, seen
        assert "Nothing was left behind; free disk space" in seen["said"]
        adding = "run.h5.maps" not in seen["said"]
        assert sorted(seen["left"]) == (sorted([*RECORD, *PART]) if adding else ["run.h5"])
        assert (folder / f"limit-{limit}.h5").read_bytes() == (folder / "old" / "run.h5").read_bytes()
        assert (seen["again"], seen["end"]) == (0, ["run.h5"])
        assert by_sample(folder / f"limit-{limit}" / "run.h5") == by_sample(folder / "undisturbed" / "run.h5")
    assert [len(seen["left"]) for name, seen in log.items() if name.isdecimal()] == [1, 6, 6]


def test_a_job_from_nothing_is_killed(tmp_path: Path) -> None:
    log = killed(tmp_path, "both")
    assert list(log) == list(BOTH)
    for number, (moment, seen) in enumerate(log.items()):
        assert seen["status"] == -signal.SIGKILL, seen["stderr"]
        assert sorted(seen["left"]) == sorted(BOTH[moment])
        assert (seen["again"], seen["end"]) == (0, ["run.h5"]), seen["stderr"]
        assert by_sample(tmp_path / str(number) / "run.h5") == by_sample(tmp_path / "undisturbed" / "run.h5")


@pytest.mark.slow
def test_squeezenet_killed_half_way(tmp_path: Path) -> None:
    """`fxpath attribute` on photos, killed when some of the maps are there, and started again."""

    def start(path: Path) -> subprocess.Popen[str]:
        arguments = [
            sys.executable, "-m", "fxpath", "attribute", "zoo:squeezenet1_1", "foolbox:imagenet", "-o", str(path),
            "--method", "gradient", "neuron_mct@0.9", "neuron_mct@0.99", "--limit", "8", "--micro-batch", "2",
            "--threads", "2", "--quiet",
        ]  # fmt: skip
        return subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)

    with start(tmp_path / "undisturbed.h5") as process:
        assert process.wait() == 0
    path = tmp_path / "run.h5"
    with start(path) as process:
        while process.poll() is None and not (tmp_path / "run.h5.maps" / "part-0000001.h5").exists():
            time.sleep(0.001)
        between = path.read_bytes()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert path.read_bytes() == between
    with start(path) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert "worked through now, 4 were there)" in said or "worked through now, 6 were there)" in said
    assert by_sample(path) == by_sample(tmp_path / "undisturbed.h5")
    assert leftovers(tmp_path) == {"run.h5", "undisturbed.h5"}


# --- samples without a map ---


def test_samples_that_the_store_could_not_use_have_no_map(tmp_path: Path) -> None:
    spoilt = {1: OSError("no such disk"), 4: (torch.full((3, 32, 32), float("nan")), 1), 5: (torch.zeros(3, 8, 8), 1)}
    data = Chosen(range(7), spoilt)
    report = add_maps(data, tmp_path / "run.h5")
    reasons = {
        data.ids[1]: "OSError: no such disk", data.ids[4]: "the input holds NaN or infinite values",
        data.ids[5]: "expected an input of shape (3, 32, 32), found (3, 8, 8)",
    }  # fmt: skip
    assert report.missing == dict.fromkeys(METHODS, reasons)
    add_maps(Chosen([0, 2, 3, 6]), tmp_path / "clean.h5")
    found, wanted = by_sample(tmp_path / "run.h5"), by_sample(tmp_path / "clean.h5")
    assert {name: found[name] for name in wanted} == wanted
    with fxpath.open_store(tmp_path / "run.h5") as store:
        for key in METHODS:
            assert np.isnan(store.maps(key)).all(axis=(1, 2)).tolist() == [row in spoilt for row in range(7)]
            assert np.isnan(store.map_seconds(key)).tolist() == [row in spoilt for row in range(7)]


def test_a_picture_that_has_come_since_has_no_map(tmp_path: Path) -> None:
    """The store knows neither its class nor its pathways."""
    run(Chosen(range(4), {1: OSError("not there yet")}), tmp_path / "run.h5")
    report = add_maps(Chosen(range(4)), tmp_path / "run.h5")
    assert report.missing == {key: {Chosen(range(4)).ids[1]: "OSError: not there yet"} for key in METHODS}


def test_a_picture_that_has_gone_since_is_recorded(path: Path, undisturbed: Path) -> None:
    data = Chosen(range(10), {2: FileNotFoundError("it has gone")})
    report = add_maps(data, path)
    assert report.missing == {key: {data.ids[2]: "FileNotFoundError: it has gone"} for key in METHODS}
    found, wanted = by_sample(path), by_sample(undisturbed)
    assert {name: one for name, one in found.items() if name != data.ids[2]} == {
        name: one for name, one in wanted.items() if name != data.ids[2]
    }
    # it is there for good, as what is in a store is not made again
    assert add_maps(Chosen(range(10)), path).missing == report.missing


def test_nothing_at_all_can_be_used(tmp_path: Path) -> None:
    data = Chosen(range(5), {row: OSError("gone") for row in range(5)})
    report = add_maps(data, tmp_path / "run.h5", methods=["gradient"])
    assert report.missing == {"gradient": dict.fromkeys(data.ids, "OSError: gone")}
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert np.isnan(store.maps("gradient")).all()
        assert store.maps("gradient").shape == (5, 32, 32)


@dataclass(frozen=True)
class Patchy:
    """A selector that reaches its sparsity for every second sample only."""

    key = "patchy"
    single = False

    def select(self, network: fxpath.Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        found = fxpath.Magnitude().select(network, samples, sparsities)
        why = ["no score is left" if int(str(name).split("_")[2]) % 2 else "" for name in samples.names]
        return Selection(found.pathways, missing=dict.fromkeys(sparsities, why))


@pytest.fixture
def patchy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "patchy", Patchy)


def test_samples_whose_sparsity_was_not_reached_have_no_such_map(tmp_path: Path, patchy: None) -> None:
    report = add_maps(Chosen(range(10)), tmp_path / "run.h5", methods=["patchy@0.9", "gradient", "magnitude@0.9"])
    odd = [name for name in Chosen(range(10)).ids if int(name.split("_")[2]) % 2]
    assert 0 < len(odd) < 10
    assert report.missing == {
        "patchy@0.9": dict.fromkeys(odd, "no score is left"), "gradient": {}, "magnitude@0.9": {},
    }  # fmt: skip
    with fxpath.open_store(tmp_path / "run.h5") as store:
        there = ~np.isin(store.ids, odd)
        assert np.isnan(store.maps("patchy@0.9")[~there]).all()
        found, expected = store.maps("patchy@0.9")[there], store.maps("magnitude@0.9")[there]
        assert found.tobytes() == expected.tobytes()  # the same pathways, with other neighbours


@pytest.mark.parametrize(
    ("instead", "why"),
    [
        (float("nan"), "the map is NaN or infinite"),
        (float("inf"), "the map is NaN or infinite"),
        (float("-inf"), "the map is NaN or infinite"),
        ("error", "odd says no"),
    ],
)
def test_a_map_that_is_no_map_stops_nothing(path: Path, instead: Any, why: str) -> None:
    name = Chosen(range(10)).ids[5]
    report = add_maps(Chosen(range(10)), path, methods=["gradient", Odd(name, instead)])
    assert report.missing == {"gradient": {}, "odd": {name: why}}
    with fxpath.open_store(path) as store:
        rows = [row for row in range(10) if row != 5]
        assert store.maps("odd")[rows].tobytes() == store.maps("gradient")[rows].tobytes()
        assert np.isnan(store.map("odd", 5)).all()
        assert np.isfinite(store.map("gradient", 5)).all()


def test_samples_that_fail_one_after_another_are_told_apart(tmp_path: Path) -> None:
    data = Chosen(range(8), {0: OSError("gone"), 5: OSError("gone")})
    report = add_maps(data, tmp_path / "run.h5", methods=["gradient", Odd(data.ids[2], "error")])
    gone = {data.ids[0]: "OSError: gone", data.ids[5]: "OSError: gone"}
    assert report.missing == {"gradient": gone, "odd": gone | {data.ids[2]: "odd says no"}}
    with fxpath.open_store(tmp_path / "run.h5") as store:
        there = [1, 3, 4, 6, 7]
        assert store.maps("odd")[there].tobytes() == store.maps("gradient")[there].tobytes()


def test_a_map_beyond_float32_is_no_map(tmp_path: Path) -> None:
    network = small(torch.float64)
    data = [inputs()[row].double() for row in range(3)]
    report = fxpath.attribute(network, data, tmp_path / "run.h5", methods=[Odd("1", 1e39)], progress=False)
    assert report.missing == {"odd": {"1": "the map is NaN or infinite"}}


def test_a_sample_of_another_branch_is_recorded(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 5, 3), nn.Linear(400, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.conv(x))
            if x.sum() > -1e6:
                h = h * 2
            return self.fc(h.flatten(1))

    with pytest.warns(TraceWarning):
        network = fxpath.trace(module(Branching), inputs()[:2], fix_branches=True)
    data = Chosen(range(4), {2: lambda x: x - 1e4})
    report = add_maps(data, tmp_path / "run.h5", network, methods=["gradient"])
    (why,) = report.missing["gradient"].values()
    assert list(report.missing["gradient"]) == [data.ids[2]]
    assert "branch" in why
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert np.isfinite(store.maps("gradient")[[0, 1, 3]]).all()


# --- what is refused ---


def test_a_method_that_cannot_work_here_stops_at_once(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    name = Chosen(range(10)).ids[0]
    for where in (path, tmp_path / "new.h5"):
        data = Chosen(range(10))
        with pytest.raises(InputError, match=r"attribute: method odd cannot work on this network: odd cannot stand it"):
            add_maps(data, where, methods=["gradient", Odd(name, "refused"), "neuron_mct@0.9"])
        assert data.read == [name]
        assert leftovers(tmp_path) == {"run.h5"}
    assert path.read_bytes() == before


def test_a_method_that_fails_later_is_named_too(path: Path) -> None:
    with pytest.raises(InputError, match="method odd cannot work on this network: odd cannot stand it"):
        add_maps(Chosen(range(10)), path, methods=["gradient", Odd(Chosen(range(10)).ids[9], "refused")])
    with pytest.raises(StoreError, match=r"run.h5.maps holds the results of another job .*, or remove that folder"):
        add_maps(Chosen(range(10)), path, methods=["gradient"])
    shutil.rmtree(path.with_name("run.h5.maps"))
    assert add_maps(Chosen(range(10)), path, methods=["gradient"]).computed == 10


@pytest.mark.parametrize("shape", [(1, 3, 32, 31), (1, 32, 32), (2, 3, 32, 32)])
def test_maps_of_another_shape_are_refused(path: Path, shape: tuple[int, ...]) -> None:
    class Other(Odd):
        def attribute(self, *_: Any) -> Tensor:
            return torch.zeros(shape)

    said = r"method odd cannot work .*: expected maps \(1, channels, 32, 32\), found \("
    with pytest.raises(InputError, match=said + ", ".join(map(str, shape))):
        add_maps(Chosen(range(10)), path, methods=[Other()])


class Plain:
    """What has all of a method but its parameters."""

    key, pathway = "plain", None

    def attribute(self, *_: Any) -> Tensor:
        raise AssertionError


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no method": ({"methods": []}, InputError, "expected at least one method"),
    "twice": ({"methods": ["neuron_mct@0.9", "neuron_mct@0.90"]}, InputError, "neuron_mct@0.9 is asked for twice"),
    "unknown": ({"methods": ["gradeint"]}, InputError, "there is no method 'gradeint'; nearest: gradient"),
    "no pathway": ({"methods": ["neuron_mct"]}, InputError, "expected a sparsity, such as @0.9"),
    "a class": ({"methods": [Odd]}, InputError, "expected a method or its name, found <class"),
    "a number": ({"methods": [3]}, InputError, "expected a method or its name, found 3"),
    "no dataclass": ({"methods": [Plain()]}, InputError, "expected a method or its name, found <test_mapping.Plain"),
    "reduction": ({"reduction": "max"}, InputError, "there is no reduction 'max'; nearest: max_abs"),
    "lacking": (
        {"methods": ["gradient", "neuron_mct@0.8*"]}, StoreError,
        r"the method neuron_mct@0.8\* starts from the pathway neuron_mct@0.8, which .*run.h5 lacks; it has "
        r"neuron_mct@0.9, random:seed=3@0.9, active\. Choose another output .* --selector neuron_mct --sparsity 0\.8",
    ),
    "micro-batch": ({"micro_batch": 2}, StoreError, "micro_batch: there 4, here 2"),
    "threads": ({"threads": 2}, StoreError, "threads: there 1, here 2"),
    "preprocessing": ({"preprocessing": "{}"}, StoreError, 'preprocessing: there "", here "{}"'),
    "target": ({"target": 3}, StoreError, 'target: there "predicted", here "3"'),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_asked_for(path: Path, what: str) -> None:
    options, error, said = WRONG[what]
    before = path.read_bytes()
    with pytest.raises(error, match=said):
        add_maps(Chosen(range(10)), path, **options)
    assert path.read_bytes() == before
    assert leftovers(path.parent) == {"run.h5"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (range(9), "in another order: expected 10 samples, found 9; give the data set that it was computed on"),
        (range(11), "expected 10 samples, found 11"),
        ((0, 1, 3, 2, *range(4, 10)), "number 2: expected 'foolbox:cifar10_02_8', found 'foolbox:cifar10_03_0'"),
        (range(1, 11), "number 0: expected 'foolbox:cifar10_00_3', found 'foolbox:cifar10_01_8'"),
    ],
)
def test_samples_that_are_not_the_store_s_are_refused(path: Path, rows: Sequence[int], said: str) -> None:
    with pytest.raises(StoreError, match=rf"attribute: .*run.h5 holds other samples than the data set, or .*{said}"):
        add_maps(Chosen(rows), path)
    assert leftovers(path.parent) == {"run.h5"}


@pytest.mark.parametrize(
    "other", [lambda row: inputs()[row + 5], lambda row: inputs()[row] * 0.1 + 3, lambda row: inputs()[9 - row]]
)
def test_other_pictures_by_the_same_names_are_refused(tmp_path: Path, other: Callable[[int], Tensor]) -> None:
    """Data sets without ids of their own number their samples: names alone say little."""
    path, first = tmp_path / "run.h5", [inputs()[row] for row in range(10)]
    run(first, path, selectors=["active"])
    with pytest.raises(
        StoreError, match=r"sample '0' is not the one that the store knows by this name: of \d+ neurons"
    ):
        add_maps([other(row) for row in range(10)], path, methods=["gradient"])
    noise = torch.Generator().manual_seed(1)
    add_maps([x + 1e-4 * torch.randn(x.shape, generator=noise) for x in first], path, methods=["gradient"])


def test_another_network_is_refused_by_name(path: Path) -> None:
    other = module()
    other.head[3].bias.data += 1
    for network, said in (
        (fxpath.trace(other, inputs()[:2]), r"is of another network, 'small' with 5 sites and 12899 neurons: expected"),
        (fxpath.trace(module(), inputs()[:2], sites="relu"), "with 1 sites and 6144 neurons"),
        (small(granularity="channel"), "is of another network"),
        (fxpath.trace(module(), inputs()[:2], response="margin"), 'response: there "logit", here "margin"'),
        (fxpath.trace(module(), inputs()[:2], response=lambda y: y[:, 3]), 'response: there "logit"'),
        (fxpath.trace(module(), inputs()[:2], response=fxpath.responses.Margin(3)), "response"),
    ):
        with pytest.raises(StoreError, match=said):
            add_maps(Chosen(range(10)), path, network)
    assert leftovers(path.parent) == {"run.h5"}


def test_another_function_of_the_output_is_refused(tmp_path: Path) -> None:
    def response(places: slice) -> Callable[[Tensor], Tensor]:
        return lambda y: y[:, places].sum(dim=1)

    first, other = (fxpath.trace(module(), inputs()[:2], response=response(slice(n, n + 2))) for n in (1, 4))
    assert first.response.name == other.response.name
    run(Chosen(range(2)), tmp_path / "run.h5", first, selectors=["active"])
    with pytest.raises(StoreError, match=r"another job \(response_is: there \"test_mapping"):
        add_maps(Chosen(range(2)), tmp_path / "run.h5", other, methods=["gradient"])
    add_maps(Chosen(range(2)), tmp_path / "run.h5", first, methods=["gradient"])


def test_networks_without_pictures(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.fc(x + y))

    x = torch.rand(2, 4)
    for network, said in (
        (fxpath.trace(Two().eval(), (x, x)), r"found \(B, 4\), \(B, 4\)"),
        (
            fxpath.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), x),
            r"found \(B, 4\); for oth",
        ),
    ):
        with pytest.raises(InputError, match=rf"expected a network with one floating-point input .* {said}"):
            fxpath.attribute(network, [x[0]], tmp_path / "run.h5", methods=["gradient"])
    restricted = small().masked(fxpath.NeuronMCT().scores(small(), inputs()[:1]).pathways(0.9))
    with restricted, pytest.raises(RestrictionError, match="attribute: the network is restricted; leave the with"):
        add_maps(Chosen(range(2)), tmp_path / "run.h5")
    assert not leftovers(tmp_path)


def test_files_that_are_no_finished_store(path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no store")
    (tmp_path / "folder.h5").mkdir()
    with h5py.File(tmp_path / "part.h5", "w") as file, h5py.File(path) as whole:
        for name in whole:
            whole.copy(name, file)
        for name, value in whole.attrs.items():
            file.attrs.create(name, value, dtype=whole.attrs.get_id(name).dtype)
        file.attrs.modify("complete", 0)
    for name, said in (
        ("text.h5", "cannot open it as a store"),
        ("folder.h5", "attribute: .*folder.h5 is a folder; give a file name such as"),
        ("part.h5", "attribute: .*part.h5 is a part of a store, not a finished one"),
    ):
        with pytest.raises(StoreError, match=said):
            add_maps(Chosen(range(10)), tmp_path / name)
    assert leftovers(tmp_path) == {"run.h5", "text.h5", "folder.h5", "part.h5"}
    (tmp_path / "broken.h5").symlink_to(tmp_path / "nowhere.h5")
    add_maps(Chosen(range(2)), tmp_path / "broken.h5", methods=["gradient"], micro_batch=2)
    assert (tmp_path / "nowhere.h5").exists()


def test_damage_in_what_is_not_asked_for_is_refused_before_anything_is_computed(path: Path) -> None:
    add_maps(Chosen(range(10)), path, methods=["gradient"])
    with h5py.File(path, "r+") as file:
        del file["maps/gradient/seconds"]
    data, before = Chosen(range(10)), path.read_bytes()
    with pytest.raises(StoreError, match="expected dataset /maps/gradient/seconds, found none"):
        add_maps(data, path, methods=["input_mct"])
    assert data.read == []
    assert path.read_bytes() == before
    assert leftovers(path.parent) == {path.name}


def test_what_fxpath_does_not_know_is_refused_before_anything_is_computed(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.create_group("connectivity")
    data = Chosen(range(10))
    with pytest.raises(StoreError, match="it holds /connectivity, which this version of fxpath does not know"):
        add_maps(data, path)
    assert data.read == []
    assert leftovers(path.parent) == {"run.h5"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("threads", 10**9, "threads: expected a whole number of at most 4096, found 1000000000"),
        ("threads", 0, "threads: expected a whole number of at least 1, found 0"),
        ("micro_batch", 10**12, "micro_batch: expected a whole number of at most 65536, found 1000000000000"),
        ("micro_batch", -4, "micro_batch: expected a whole number of at least 1, found -4"),
    ],
)
def test_numbers_of_a_hostile_store_are_not_followed(path: Path, name: str, value: int, said: str) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(InputError, match=rf"run\.h5: {said}"):
        add_maps(Chosen(range(10)), path)
    assert leftovers(path.parent) == {"run.h5"}


def test_a_link_and_its_permissions_are_kept(path: Path, undisturbed: Path) -> None:
    link = path.with_name("link.h5")
    link.symlink_to(path.name)
    path.chmod(0o640)
    add_maps(Chosen(range(10)), link)
    assert link.is_symlink()
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert by_sample(path) == by_sample(undisturbed)


# --- nothing is left behind ---


@pytest.fixture
def files_open() -> Iterator[None]:
    before = {file.path for file in psutil.Process().open_files()}
    yield
    assert {file.path for file in psutil.Process().open_files()} == before


@pytest.mark.parametrize("how", ["finished", "stopped", "failed", "refused"])
def test_no_thread_no_file_no_flag(path: Path, files_open: None, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    model = module()
    network = fxpath.trace(model, inputs()[:2])
    threads, count = threading.active_count(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with unchanged(model):
            if how == "finished":
                add_maps(Chosen(range(10)), path, network)
            elif how == "stopped":
                stopped(path, 6, network=network)
            elif how == "failed":
                with monkeypatch.context() as patched:
                    patched.setattr(parts, "rename", full)
                    with pytest.raises(StoreError, match="No space left"):
                        add_maps(Chosen(range(10)), path, network)
            else:
                with pytest.raises(InputError):
                    add_maps(Chosen(range(10)), path, network, methods=[Odd("", "refused")])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(count)
    assert threading.active_count() == threads
    assert network._restriction is None


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_progress_is_on_stderr_or_nowhere(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_maps(Chosen(range(10)), path, methods=["gradient"])
    assert capsys.readouterr() == ("", "")
    add_maps(Chosen(range(10)), path, methods=["neuron_mct@0.9"], progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert "attribute: 100%" in said.err
    assert "10/10" in said.err


def test_a_micro_batch_is_what_the_store_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Counting(MaskedGradient):
        def attribute(self, network: Any, x: Any, target: Any = None, pathways: Any = None) -> Tensor:
            sizes.append(network.samples(x).batch)
            assert torch.get_num_threads() == 1
            return super().attribute(network, x, target, pathways)

    torch.set_num_threads(2)
    try:
        add_maps(Chosen(range(10)), path, methods=[Counting("neuron_mct@0.9")])
    finally:
        torch.set_num_threads(1)
    assert sizes == [1, 4, 4, 4]  # the first is the trial
