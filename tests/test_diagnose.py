"""`diagnose`: scores held against exact ablation while a job computes, whatever the neighbours, stops and kills."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from networks import BY_NAME, CASES, Case, traced
from scipy.stats import spearmanr
from small_jobs import CIFAR, Chosen, Placed, by_sample, cifar, inputs, module, run, small
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpath
from fxpath import ablation, batch
from fxpath.ablation import PER_SITE, Diagnosis, marginal_contributions, sample_active
from fxpath.analysis import ablation_correlations, summary
from fxpath.cli import main, summary_text
from fxpath.errors import InputError, StoreError
from fxpath.items import Item
from fxpath.microbatch import Recipe, compute_rows
from fxpath.schema import Rows
from fxpath.selectors import parse

TESTS = Path(__file__).parent
WHOLE, BY_SITE = "diagnostics/ablation_correlation", "diagnostics/ablation_correlation_by_site"
SCORED = ("neuron_mct", "neuron_intgrad:steps=3", "magnitude")
FAMILIES = ("neuron_mct", "magnitude")
MIXED = ("random", "neuron_mct", "active", "magnitude")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fxpath.errors.NoContributionWarning"),  # tiny networks, some all dead
]


def recipe(*selectors: Any, **changes: Any) -> Recipe:
    return Recipe(tuple(map(parse, selectors)), (0.8, 0.5), **({"micro_batch": 4, "diagnose": 5} | changes))


def items_of(x: Any, ids: Sequence[str] = "abcdefgh", labels: Sequence[int] | None = None) -> list[Item]:
    """The samples of a batch as a data set gives them."""
    samples = fxpath.Samples(x)
    found = []
    for row in range(samples.batch):
        one = pytree.tree_map(lambda leaf, at=row: leaf[at] if isinstance(leaf, Tensor) else leaf, samples.inputs)
        found.append(Item(ids[row], one, -1 if labels is None else labels[row]))
    return found


def naive(network: fxpath.Network, x: Any, target: Any, row: int, neurons: Sequence[int]) -> npt.NDArray[Any]:
    """|Φ(x) − Φ(x; a_j ← 0)| of one sample, by whole runs of the network without one neuron each."""
    samples = fxpath.Samples(x, target).take([row])
    whole = network.respond(samples)
    found = []
    for neuron in neurons:
        mask = torch.ones(1, network.index.size, dtype=torch.bool)
        mask[0, neuron] = False
        with network.masked(fxpath.Pathways(mask, network.index)):
            found.append(float((whole - network.respond(samples)).abs().detach()))
    return np.array(found)


def correlated(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """SciPy's own, NaN where it would warn."""
    if min(len(np.unique(first)), len(np.unique(second))) < 2:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def sampled(network: fxpath.Network, x: Any, ids: Sequence[str], per_site: int) -> list[list[int]]:
    """The neurons that the sampler draws, those that are active, each once."""
    samples = fxpath.Samples(x, ids=ids)
    active = network.original(samples).active
    drawn = sample_active(network, active, ids, per_site, 0)
    return [sorted({n for n in some.tolist() if bool(alive[n])}) for some, alive in zip(drawn, active, strict=True)]


# --- against a naive ablation ---------------------------------------------------------------------------------------


def apart(values: npt.NDArray[Any]) -> bool:
    """Whether rounding cannot change the order of these values."""
    return bool((np.diff(np.sort(values)) > 1e-10 * np.abs(values).max(initial=1e-300)).all())


CHANNELS = ("Plain", "Concat", "BatchFolded", "Norms", "ScalarOutput", "DictInput", "ShapeBranch", "Rectifiers")
BOTH = [(case, "unit") for case in CASES] + [(BY_NAME[name], "channel") for name in CHANNELS]


@pytest.mark.parametrize(("case", "granularity"), BOTH, ids=lambda given: getattr(given, "name", given))
def test_what_is_stored_is_scipys_correlation_with_a_naive_ablation(case: Case, granularity: str) -> None:
    """Where two neurons contribute the same, as the factors of a product do, rounding orders them: so both ways."""
    network, x, ids = traced(case.name, granularity), case.x(3, seed=5), ("p", "q", "r")
    rows = compute_rows(network, recipe(*SCORED), items_of(x, ids))
    assert rows.samples["status"] == ["ok"] * 3
    original = network.original(x)
    samples = fxpath.Samples(x, original.target, ids)
    diagnosis = Diagnosis.sampled(network, samples, original.active, 5, max_batch=4)
    scored = {text: parse(text).scores(network, samples).signed.abs().numpy() for text in SCORED}  # type: ignore[attr-defined]
    starts = [site.start for site in network.sites]
    checked = 0
    for row, some in enumerate(sampled(network, x, ids, 5)):
        assert diagnosis.numbers[row].tolist() == some
        exact, expected = diagnosis.contributions[row].numpy(), naive(network, x, original.target, row, some)
        np.testing.assert_allclose(exact, expected, rtol=1e-9, atol=1e-13)
        homes = np.searchsorted(starts, some, side="right") - 1
        for text in SCORED:
            scores = scored[text][row][some]
            for level in (0.8, 0.5):
                columns = rows.pathways[f"{text}@{level}"].columns
                whole, by_site = columns[WHOLE], columns[BY_SITE]
                assert whole.dtype == by_site.dtype == np.float64
                assert (whole.shape, by_site.shape) == ((3,), (3, len(starts)))
                assert whole[row] == pytest.approx(correlated(scores, exact), abs=1e-9, nan_ok=True), text
                for site, found in enumerate(by_site[row]):
                    here = homes == site
                    assert found == pytest.approx(correlated(scores[here], exact[here]), abs=1e-9, nan_ok=True)
                if apart(expected) and apart(scores):
                    assert whole[row] == pytest.approx(correlated(scores, expected), abs=1e-9, nan_ok=True)
                    checked += 1
    assert checked or case.name not in ("Plain", "Concat", "Norms", "ResidualIadd", "MLP")


def test_against_hooks_on_the_plain_module() -> None:
    """Without fxpath's gates: every active neuron of two layers, each zeroed by a hook of PyTorch's."""
    case = BY_NAME["MLP"]
    model, x = case.model(), case.x(4, seed=2)
    for layer in (model[1], model[3]):
        layer.inplace = False
    network = fxpath.trace(model, x)
    rows = compute_rows(network, recipe("neuron_mct", diagnose=100), items_of(x))
    for row in range(4):
        one = x[row : row + 1]
        with torch.no_grad():
            before = model(one)
            chosen = int(before.argmax())
            activations = [nn.Sequential(*list(model)[:depth])(one)[0] for depth in (2, 4)]
        exact = []
        for layer, values in zip((model[1], model[3]), activations, strict=True):
            for neuron in torch.nonzero(values > 0).flatten().tolist():

                def zero(_: nn.Module, __: Any, output: Tensor, neuron: int = neuron) -> Tensor:
                    output = output.clone()
                    output[:, neuron] = 0
                    return output

                handle = layer.register_forward_hook(zero)
                with torch.no_grad():
                    exact.append(float((before - model(one))[0, chosen].abs()))
                handle.remove()
        alive = torch.cat(activations) > 0
        scores = fxpath.NeuronMCT().scores(network, x).signed[row].abs()[alive].numpy()
        assert len(scores) == len(exact) > 2
        expected = correlated(scores, np.array(exact))
        assert rows.pathways["neuron_mct@0.8"].columns[WHOLE][row] == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("target", "response"), [("labels", "logit"), ("3", "logit"), ("predicted", "logit"), ("labels", "margin")]
)
def test_the_ablation_explains_what_the_job_explains(target: str, response: str) -> None:
    network = fxpath.trace(module(dtype=torch.float64), torch.zeros(2, 3, 32, 32).double(), response=response)
    x, ids, labels = inputs()[:3].double(), list(cifar().ids[:3]), list(cifar().labels[:3])
    rows = compute_rows(network, recipe("neuron_mct", target=target), items_of(x, ids, labels))
    predicted = network(x).argmax(1).tolist()
    assert labels != predicted
    wanted = {"labels": labels, "3": [3] * 3, "predicted": predicted}[target]
    scores = fxpath.NeuronMCT().scores(network, x, wanted).signed.abs().numpy()
    found = rows.pathways["neuron_mct@0.8"].columns[WHOLE]
    for row, some in enumerate(sampled(network, x, ids, 5)):
        exact = naive(network, x, wanted, row, some)
        assert found[row] == pytest.approx(correlated(scores[row][some], exact), abs=1e-9)
    assert len({round(value, 6) for value in found.tolist()}) == 3


def test_other_targets_give_other_correlations() -> None:
    x, ids = inputs()[:3], list(cifar().ids[:3])
    columns = [
        compute_rows(small(), recipe("neuron_mct", target=target), items_of(x, ids, [4, 4, 4]))
        .pathways["neuron_mct@0.8"]
        .columns[WHOLE]
        for target in ("0", "4", "labels")
    ]
    assert not np.array_equal(columns[0], columns[1])
    assert np.array_equal(columns[1], columns[2])


def test_where_all_that_follows_is_affine_mct_ranks_as_ablation_does() -> None:
    """At the last hidden site |MCT| = |ablation|, so the rank correlation is 1; elsewhere it need not be."""
    network = small(torch.float64)
    rows = compute_rows(network, recipe("neuron_mct", "magnitude"), items_of(inputs()[:4].double()))
    mct, magnitude = (rows.pathways[f"{name}@0.8"].columns for name in FAMILIES)
    assert mct[BY_SITE][:, -1] == pytest.approx(np.ones(4), abs=1e-9)
    assert (mct[WHOLE] > magnitude[WHOLE]).all()
    assert (mct[WHOLE] < 1).any()


@pytest.mark.parametrize(("text", "there"), [("dgr:iterations=4", True), ("dgr:init=0.0,iterations=4", False)])
def test_gates_of_dgr_are_held_against_ablation_too(text: str, there: bool) -> None:
    """They are no contributions; where none keeps the class there are none, and no correlation."""
    network, x = traced("Plain"), BY_NAME["Plain"].x(3, seed=5)
    rows = compute_rows(network, recipe(text), items_of(x))
    columns = rows.pathways[f"{text}@0.5"].columns
    ids = ("a", "b", "c")
    scores = parse(text).select(network, fxpath.Samples(x, ids=ids), (0.5,)).scores
    assert scores is not None
    target = network.original(x).target
    defined = 0
    for row, some in enumerate(sampled(network, x, ids, 5)):
        expected = correlated(scores.signed[row].numpy()[some], naive(network, x, target, row, some))
        assert columns[WHOLE][row] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert not np.isnan(expected) or columns["missing"][row]
        defined += not np.isnan(expected)
    assert bool(defined) == there


# --- which neurons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@pytest.mark.parametrize("name", ["Plain", "Concat", "BatchFolded", "Unused", "Rectifiers"])
@pytest.mark.parametrize("per_site", [1, 5, 10_000])
def test_each_active_neuron_counts_once(name: str, granularity: str, per_site: int) -> None:
    """From every site as many as there are, up to the number asked for; none that is dead."""
    network, x = traced(name, granularity), BY_NAME[name].x(6, seed=3)
    samples = network.samples(x)
    active = network.original(samples).active
    found = Diagnosis.sampled(network, samples, active, per_site)
    for row, numbers in enumerate(found.numbers):
        assert len(set(numbers.tolist())) == len(numbers)
        assert numbers.tolist() == sorted(numbers.tolist())
        assert bool(active[row, numbers].all())
        for site in network.sites:
            count = int(((numbers >= site.start) & (numbers < site.start + site.neurons)).sum())
            assert count == min(per_site, int(active[row, site.slice].sum()))
        exact = marginal_contributions(network, samples.take([row]), numbers, progress=False)[0].abs()
        torch.testing.assert_close(found.contributions[row], exact, rtol=1e-9, atol=1e-12)


def test_a_sample_of_which_nothing_is_active() -> None:
    network, x = traced("MLP"), BY_NAME["MLP"].x(3)
    samples = network.samples(x)
    nothing = torch.zeros(3, network.index.size, dtype=torch.bool)
    found = Diagnosis.sampled(network, samples, nothing, 4)
    assert [len(some) for some in found.numbers] == [0, 0, 0]
    whole, by_site = found.correlations(fxpath.NeuronMCT().scores(network, x))
    assert whole.isnan().all()
    assert by_site.isnan().all()
    assert by_site.shape == (3, 2)


def test_the_draw_depends_on_the_name_alone() -> None:
    network, x = small(), inputs()
    one = sampled(network, x[[3, 5]], ["c", "e"], 7)
    other = sampled(network, x[[5, 1, 3]], ["e", "a", "c"], 7)
    assert one == [other[2], other[0]]
    assert sampled(network, x[[3, 5]], ["c", "d"], 7)[1] != one[1]


def test_what_is_drawn_where_a_site_has_fewer_is_all_of_it() -> None:
    network, x = traced("MLP"), BY_NAME["MLP"].x(8, seed=1)
    active = network.original(x).active
    drawn = sample_active(network, active, range(8), 6, 0).view(8, 2, 6)
    for row in range(8):
        for number, site in enumerate(network.sites):
            alive = (torch.nonzero(active[row, site.slice]).flatten() + site.start).tolist()
            assert set(drawn[row, number].tolist()) == set(alive or [site.start]) or len(alive) > 6
            assert len(set(drawn[row, number].tolist())) == max(min(len(alive), 6), 1)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 4, 16])
def test_stacks_of_any_size_give_the_same_contributions(max_batch: int) -> None:
    for name in ("Plain", "BatchFolded", "SizeReshape", "OverlappingPool"):
        network, x = traced(name), BY_NAME[name].x(2, seed=4)
        numbers = np.arange(0, network.index.size, 3)
        found = marginal_contributions(network, x, numbers, max_batch=max_batch, progress=False)
        target = network.original(x).target
        expected = np.stack([naive(network, x, target, row, numbers.tolist()) for row in range(2)])
        np.testing.assert_allclose(found.abs().numpy(), expected, rtol=1e-9, atol=1e-12)


# --- neither neighbours nor place nor stops change a bit ------------------------------------------------------------


def bits(path: Path) -> dict[str, dict[str, Any]]:
    """What a store says of each sample, with the correlations of every site."""
    found = by_sample(path)
    with fxpath.open_store(path) as store:
        for key in store.keys:
            for name in (WHOLE, BY_SITE):
                if name in store.columns(key):
                    for sample, values in zip(store.ids.tolist(), store.column(key, name), strict=True):
                        found[sample][f"{key} {name} bytes"] = values.tobytes()
    return found


OPTIONS: dict[str, Any] = {"selectors": MIXED, "sparsities": [0.8, 0.9], "diagnose": 6}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job on the first ten pictures: three micro-batches, the last one short."""
    path = tmp_path_factory.mktemp("undisturbed") / "run.h5"
    run(Chosen(range(10)), path, **OPTIONS)
    return path


def stopped(path: Path, after: int = 6, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Chosen(range(10), {after: KeyboardInterrupt()}), path, **(OPTIONS | options))


def test_which_columns_a_store_has(undisturbed: Path) -> None:
    with fxpath.open_store(undisturbed) as store:
        for key in store.keys:
            own = [name for name in store.columns(key) if name.startswith("diagnostics/")]
            assert own == ([WHOLE, BY_SITE] if key.startswith(FAMILIES) else [])
        for family in FAMILIES:
            first, second = (store.column(f"{family}@{level}", BY_SITE) for level in (0.8, 0.9))
            assert first.tobytes() == second.tobytes()
            assert first.shape == (10, 5)
            assert np.isfinite(store.column(f"{family}@0.8", WHOLE)).all()


@pytest.mark.parametrize("rows", [tuple(range(9, -1, -1)), (7, 3, 15, 0, 11), (4,)], ids=["backwards", "five", "one"])
def test_order_and_neighbours_change_no_bit(tmp_path: Path, undisturbed: Path, rows: tuple[int, ...]) -> None:
    run(Chosen(rows), tmp_path / "some.h5", **OPTIONS)
    everything, some = bits(undisturbed), bits(tmp_path / "some.h5")
    both = set(everything) & set(some)
    assert both == {cifar().ids[row] for row in rows if row < 10}
    for name in both:
        assert some[name] == everything[name]


def test_a_place_in_the_micro_batch_changes_no_bit_of_an_ablation() -> None:
    """Not even in a network whose places differ: each sample is run on its own."""
    network = fxpath.trace(module(Placed), torch.zeros(2, 3, 32, 32))
    found = []
    for rows in ([2, 3, 4, 7], [7, 2, 3, 4]):
        samples = fxpath.Samples(inputs()[rows], 1, [cifar().ids[row] for row in rows])
        done = Diagnosis.sampled(network, samples, network.original(samples.take([0] * 4)).active, 9, max_batch=2)
        found.append(dict(zip(rows, done.contributions, strict=True)))
    lone = fxpath.Samples(inputs()[[7]], 1, [cifar().ids[7]])
    active = network.original(fxpath.Samples(inputs()[[2]], 1)).active
    assert torch.equal(
        Diagnosis.sampled(network, lone, active, 9, max_batch=2).contributions[0],
        Diagnosis.sampled(
            network, fxpath.Samples(inputs()[[1, 2, 3, 7]], 1, ["a", "b", "c", cifar().ids[7]]),
            active.expand(4, -1), 9, max_batch=2,
        ).contributions[3],
    )  # fmt: skip
    assert all(len(some) == 9 for some in found[0].values())


def test_a_short_micro_batch_is_not_ablated_beyond_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute_rows(small(), recipe(*FAMILIES), items_of(inputs()[:4]))
    seen: list[int] = []
    real = ablation.marginal_contributions

    def counted(network: Any, samples: Any, *given: Any, **options: Any) -> Tensor:
        seen.append(samples.batch)
        return real(network, samples, *given, **options)

    monkeypatch.setattr(ablation, "marginal_contributions", counted)
    short = compute_rows(small(), recipe(*FAMILIES), items_of(inputs()[:3]))
    assert seen == [1, 1, 1]  # each real sample once, for both selectors and all sparsities
    for key in short.pathways:
        for name in (WHOLE, BY_SITE):
            assert short.pathways[key].columns[name].tobytes() == whole.pathways[key].columns[name][:3].tobytes()


def test_selectors_without_scores_cost_no_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "marginal_contributions", None)
    rows = compute_rows(small(), recipe("random", "active"), items_of(inputs()[:2]))
    for table in rows.pathways.values():
        assert not [name for name in table.columns if "ablation" in name]


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_no_more_rows_run_at_once_than_a_micro_batch_has(micro_batch: int) -> None:
    seen: list[int] = []

    def response(output: Tensor) -> Tensor:
        seen.append(len(output))
        return output[:, 0]

    network = fxpath.trace(module(), inputs()[:2], response=response)
    compute_rows(network, recipe("magnitude", micro_batch=micro_batch, diagnose=0), items_of(inputs()[:1]))
    without = len(seen)
    compute_rows(network, recipe("magnitude", micro_batch=micro_batch, diagnose=20), items_of(inputs()[:1]))
    seen = seen[without:]
    assert max(seen) == micro_batch
    assert len(seen) > without + 10


@pytest.mark.parametrize("after", [3, 6, 9])
def test_a_stopped_job_goes_on(tmp_path: Path, undisturbed: Path, after: int) -> None:
    path = tmp_path / "run.h5"
    stopped(path, after)
    report = run(Chosen(range(10)), path, **OPTIONS)
    assert report.reused == 4 * (after // 4)
    assert bits(path) == bits(undisturbed)


def test_a_killed_job_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from small_jobs import Chosen, run\n"
        "def die(x):\n"
        "    while not os.path.exists(sys.argv[1] + '.parts/part-0000000.h5'): pass\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"run(Chosen(range(10), {{9: die}}), __import__('pathlib').Path(sys.argv[1]), **{OPTIONS!r})\n"
    )
    path = tmp_path / "run.h5"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(path)], capture_output=True, text=True, timeout=120,
        check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "run.h5.parts" / "part-0000000.h5").exists()
    assert run(Chosen(range(10)), path, **OPTIONS).reused >= 4
    assert bits(path) == bits(undisturbed)


def test_samples_that_cannot_be_used_have_no_correlation(tmp_path: Path, undisturbed: Path) -> None:
    """Single ones, and a whole micro-batch of which nothing could be computed."""
    gone = {1: ValueError("gone"), **{row: ValueError("gone") for row in range(4, 8)}}
    run(Chosen(range(10), gone), tmp_path / "run.h5", **OPTIONS)
    found, clean = bits(tmp_path / "run.h5"), bits(undisturbed)
    for row, name in enumerate(cifar().ids[:10]):
        assert (found[name] == clean[name]) == (row not in gone)
    with fxpath.open_store(tmp_path / "run.h5") as store:
        for key in ("neuron_mct@0.9", "magnitude@0.8"):
            lacking = np.isnan(store.column(key, WHOLE))
            assert lacking.tolist() == [row in gone for row in range(10)]
            assert np.isnan(store.column(key, BY_SITE)[lacking]).all()


# --- part of the job; without it nothing is as it was not before ----------------------------------------------------


PATHWAY = {"density", "dropped_response", "kept", "live", "mask", "missing", "probability", "response", "same_class",
           "seconds"}  # fmt: skip
RECORD = {"device", "fingerprint", "ids", "micro_batch", "model", "outputs", "parts", "place", "preprocessing",
          "response", "samples", "schema", "scores", "selectors", "sparsities", "target", "threads",
          "thumbnails"}  # fmt: skip


def test_without_it_store_and_record_are_as_they_were(tmp_path: Path) -> None:
    options = {"selectors": MIXED, "sparsities": [0.9]}
    run(Chosen(range(3)), tmp_path / "plain.h5", **options)
    run(Chosen(range(3)), tmp_path / "zero.h5", diagnose=0, **options)
    assert bits(tmp_path / "plain.h5") == bits(tmp_path / "zero.h5")
    for name in ("plain.h5", "zero.h5"):
        with h5py.File(tmp_path / name) as file:
            for key in file["pathways"]:
                assert set(file["pathways"][key]) == PATHWAY
            record = json.loads(bytes(file.attrs["record"]).decode())
            assert set(record) == RECORD
    run(Chosen(range(3)), tmp_path / "some.h5", diagnose=2, **options)
    found, plain = bits(tmp_path / "some.h5"), bits(tmp_path / "plain.h5")
    for name, rows in found.items():  # what was stored before is the same with it
        assert {what: value for what, value in rows.items() if "ablation" not in what} == plain[name]
    with fxpath.open_store(tmp_path / "some.h5") as store:
        assert json.loads(str(store.header.notes["record"]))["diagnose"] == 2


def refused(path: Path, said: str, **options: Any) -> None:
    for call in (run, plan):
        with pytest.raises(StoreError, match=rf"holds the results of another job \({said}\); "):
            call(Chosen(range(10)), path, **(OPTIONS | options))


def plan(data: Any, path: Path, network: fxpath.Network | None = None, **options: Any) -> batch.Plan:
    return batch.plan(network or small(), data, path, **({"micro_batch": 4, "threads": 1, "model": "small"} | options))


def test_another_number_is_another_job(tmp_path: Path, undisturbed: Path) -> None:
    for path in (undisturbed, tmp_path / "run.h5"):
        if path != undisturbed:
            stopped(path)
        refused(path, "diagnose: there 6, here 7", diagnose=7)
        refused(path, "diagnose: there 6, here 0", diagnose=0)
    stopped(tmp_path / "old.h5", diagnose=0)  # its record names no such thing, as older ones do not
    assert "diagnose" not in json.loads((tmp_path / "old.h5.parts" / "job.json").read_text())
    refused(tmp_path / "old.h5", "diagnose: there 0, here 6")
    assert run(Chosen(range(10)), tmp_path / "old.h5", **(OPTIONS | {"diagnose": 0})).reused == 4
    refused(tmp_path / "old.h5", "diagnose: there 0, here 6")


def test_parts_with_it_are_joined_without_the_network(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(batch, "merge_stores", stop)
        with pytest.raises(KeyboardInterrupt):
            run(Chosen(range(10)), tmp_path / "run.h5", **OPTIONS)
    shutil.copy(undisturbed, tmp_path / "kept.h5")
    batch.merge(tmp_path / "run.h5")
    assert bits(tmp_path / "run.h5") == bits(undisturbed)
    run(Chosen(range(10)), tmp_path / "other.h5", **(OPTIONS | {"diagnose": 0}))
    with monkeypatch.context() as patched:
        patched.setattr(batch, "merge_stores", stop)
        with pytest.raises(KeyboardInterrupt):
            run(Chosen(range(10)), tmp_path / "parts.h5", **OPTIONS)
    shutil.move(tmp_path / "other.h5", tmp_path / "parts.h5")
    with pytest.raises(StoreError, match=r"another job \(diagnose: there 0, here 6\)"):
        batch.merge(tmp_path / "parts.h5")


@pytest.mark.parametrize("value", [-1, True, 1.5, "4", None])
def test_what_is_no_number_of_neurons(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^diagnose: expected a whole number of at least 0, found {value!r}$"):
        run(Chosen(range(2)), tmp_path / "run.h5", diagnose=value)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_ablates_as_the_job_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = Diagnosis.sampled

    def counted(*given: Any, **options: Any) -> Diagnosis:
        seen.append(given[3])
        return real(*given, **options)

    monkeypatch.setattr(Diagnosis, "sampled", counted)
    planned = plan(Chosen(range(10)), tmp_path / "run.h5", **OPTIONS)
    assert seen == [6, 6]  # warming up, and the run that is timed
    assert planned.hours > 0
    assert plan(Chosen(range(10)), tmp_path / "run.h5", **(OPTIONS | {"diagnose": 0})).bytes < planned.bytes
    assert seen == [6, 6]
    run(Chosen(range(10)), tmp_path / "run.h5", **OPTIONS)
    assert 0.7 < planned.bytes / (tmp_path / "run.h5").stat().st_size < 1.3


# --- in the analyses ------------------------------------------------------------------------------------------------


def test_the_summary_has_the_mean_over_samples(tmp_path: Path, undisturbed: Path) -> None:
    with fxpath.open_store(undisturbed) as store:
        table = summary(store, progress=False).set_index("key")["ablation_correlation"]
        means = ablation_correlations(store)
        for key in store.keys:
            if key.startswith(FAMILIES):
                assert table[key] == pytest.approx(store.column(key, WHOLE).mean())
                assert means[key.partition("@")[0]] == table[key]
            else:
                assert np.isnan(table[key])
        assert list(means) == list(FAMILIES)
    gone = {1: ValueError("gone"), 2: ValueError("gone")}
    run(Chosen(range(4), gone), tmp_path / "run.h5", **OPTIONS)
    run(Chosen(range(4)), tmp_path / "without.h5", selectors=["neuron_mct"])
    with fxpath.open_store(tmp_path / "run.h5") as store, fxpath.open_store(undisturbed) as whole:
        expected = whole.column("neuron_mct@0.9", WHOLE)[[0, 3]].mean()
        assert ablation_correlations(store)["neuron_mct"] == pytest.approx(expected)
    with fxpath.open_store(tmp_path / "without.h5") as store:
        assert ablation_correlations(store) == {}
        assert summary(store, progress=False)["ablation_correlation"].isna().all()


def test_a_diagnostic_of_that_name_that_is_a_selector_s_own(tmp_path: Path) -> None:
    from synthetic import synthetic_header, synthetic_index, synthetic_rows

    index = synthetic_index()
    rows = synthetic_rows(index, 3, ["neuron_mct@0.9", "dgr@0.9"])
    for key, values in (("neuron_mct@0.9", np.ones((3, 2))), ("dgr@0.9", np.array(["a", "b", "c"], dtype="S1"))):
        rows.pathways[key].columns[WHOLE] = values  # type: ignore[index]
    assert isinstance(rows, Rows)
    fxpath.store.write_store(tmp_path / "run.h5", synthetic_header(index), rows)
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert ablation_correlations(store) == {}


# --- the command line -----------------------------------------------------------------------------------------------


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Said:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return call


GIVEN = ("compute", "small_jobs:build", "small_jobs:seven", "--selector", "neuron_mct", "--selector", "random",
         "--selector", "magnitude", "--sparsity", "0.9", "--micro-batch", "4", "--threads", "1", "--quiet")  # fmt: skip


def recorded(path: str) -> int:
    with fxpath.open_store(path) as store:
        return int(json.loads(str(store.header.notes["record"])).get("diagnose", 0))


def test_from_the_command_line_to_the_table(command: Callable[..., Said], tmp_path: Path) -> None:
    plan = command(*GIVEN, "-o", "run.h5", "--diagnose", "--dry-run")
    assert (plan.code, list(tmp_path.iterdir())) == (0, [])
    assert command(*GIVEN, "-o", "run.h5", "--diagnose").code == 0
    assert command(*GIVEN, "-o", "three.h5", "--diagnose-neurons", "3").code == 0
    both = command(*GIVEN, "-o", "three.h5", "--diagnose", "--diagnose-neurons", "3")
    assert "(0 worked through now, 7 were there)" in both.err
    assert command(*GIVEN, "-o", "none.h5").code == 0
    assert [recorded(f"{name}.h5") for name in ("run", "three", "none")] == [PER_SITE, 3, 0]
    network = fxpath.trace(module(), torch.zeros(2, 3, 32, 32))
    fxpath.compute(network, Chosen(range(7)), "python.h5", selectors=["neuron_mct", "random", "magnitude"],
                   sparsities=[0.9], micro_batch=4, threads=1, progress=False, diagnose=16, classes=CIFAR)  # fmt: skip
    assert bits(tmp_path / "python.h5") == bits(tmp_path / "run.h5")
    again = command(*GIVEN, "-o", "run.h5", "--diagnose")
    assert "(0 worked through now, 7 were there)" in again.err
    other = command(*GIVEN, "-o", "run.h5")
    assert (other.code, len(other.err.splitlines())) == (2, 1)
    assert "another job (diagnose: there 16, here 0)" in other.err

    with fxpath.open_store("run.h5") as store:
        means = {name: float(store.column(f"{name}@0.9", WHOLE).mean()) for name in FAMILIES}
    said = command("info", "run.h5")
    line = f"mean rank correlation of scores: neuron_mct {means['neuron_mct']:.3f}, magnitude {means['magnitude']:.3f}"
    assert f"      ablation  {line}\n" in said.err
    data = json.loads(command("info", "run.h5", "--json").out)
    assert data["ablation_correlation"] == pytest.approx(means)
    assert "ablation" not in command("info", "none.h5").err
    assert "ablation_correlation" not in json.loads(command("info", "none.h5", "--json").out)

    said = command("analyze", "run.h5", "none.h5", "-o", "out", "--json", "--quiet")
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert said.err.splitlines()[0].split()[-1] == "ablation_correlation"
    assert [line.split()[-1] for line in said.err.splitlines()[1:7]] == [
        f"{means['neuron_mct']:.3f}", "–", f"{means['magnitude']:.3f}", "–", "–", "–",
    ]  # fmt: skip
    assert table["ablation_correlation"].isna().tolist() == [False, True, False, True, True, True]
    assert [row["ablation_correlation"] for row in json.loads(said.out)][1] is None
    assert "ablation_correlation" not in summary_text(table[table["store"] == "none"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--diagnose-neurons", "0"), "fxpath: --diagnose-neurons: expected a whole number of at least 1, found 0\n"),
        (("--diagnose-neurons=-4",), "fxpath: --diagnose-neurons: expected a whole number of at least 1, found -4\n"),
        (("--diagnose", "--diagnose-neurons", "0"), "fxpath: --diagnose-neurons: expected a whole number of at least"),
    ],
)
def test_numbers_that_one_can_mend(
    command: Callable[..., Said], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    found = command(*GIVEN, "-o", "run.h5", *arguments)
    assert (found.code, found.out, len(found.err.splitlines())) == (2, "", 1)
    assert found.err.startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_number_on_the_command_line(command: Callable[..., Said], tmp_path: Path) -> None:
    found = command(*GIVEN, "-o", "run.h5", "--diagnose-neurons", "some")
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", found.err).split()).lower()
    assert (found.code, found.out) == (2, "")
    assert "invalid value for '--diagnose-neurons'" in said
    assert list(tmp_path.iterdir()) == []


def test_help_says_how_many(command: Callable[..., Said]) -> None:
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", command("compute", "--help").out).split())
    assert "--diagnose-neurons" in said
    assert f"(default {PER_SITE})" in said
