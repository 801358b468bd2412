"""`fxpath attribute`: maps of pictures, what it says, what it draws, and what one can mend."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_jobs
from commands import Said, typed
from matplotlib.figure import Figure
from PIL import Image
from processes import leftovers
from small_jobs import Chosen, add_maps, build, by_sample, inputs, seven
from test_kill import ENVIRONMENT, heeds_control_c  # noqa: F401  a fixture

import fxpath
from fxpath import mapping
from fxpath.cli import main
from fxpath.errors import InputError
from fxpath.zoo import LoadedModel

SMALL = ("small_jobs:build", "small_jobs:seven")
QUICK = ("--micro-batch", "4", "--threads", "1", "--quiet")
METHODS = ("gradient", "neuron_mct@0.9", "neuron_mct@0.95*")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: typed(capsys, *arguments)


def given(*arguments: str) -> tuple[str, ...]:
    return ("attribute", *SMALL, "-o", "run.h5", *QUICK, *arguments)


def test_attribute(run: Callable[..., Said], tmp_path: Path) -> None:
    said = run(*given("--method", *METHODS))
    assert (said.code, said.out) == (0, "")
    assert said.err.startswith(
        "run.h5: maps of 7 samples by gradient, neuron_mct@0.9, neuron_mct@0.95* (3 made now, 0 were there; 7 samples "
        "worked through now, 0 were there) in "
    )
    assert len(said.err.splitlines()) == 1
    assert leftovers(tmp_path) == {"run.h5"}
    add_maps(seven(), tmp_path / "other.h5", methods=METHODS, model="small_jobs:build",
             preprocessing=build().preprocessing, classes=build().classes)  # fmt: skip
    assert by_sample(tmp_path / "run.h5") == by_sample(tmp_path / "other.h5")
    said = run("attribute", *SMALL, "-o", "run.h5", "--method", "gradient", "--method", "random@0.5", "--quiet")
    assert said.code == 2
    assert "random@0.5, which run.h5 lacks; it has neuron_mct@0.9, neuron_mct@0.95. Choose" in said.err
    said = run("attribute", *SMALL, "-o", "run.h5", "--method", "gradient", "--quiet", "--json")
    assert said.code == 0
    data = json.loads(said.out)
    assert (data["methods"], data["made"], data["computed"]) == (["gradient"], [], 0)
    assert data["missing"] == {"gradient": {}}
    said = run("info", "run.h5")
    assert "          maps  gradient, neuron_mct@0.9, neuron_mct@0.95*\n" in said.err
    assert json.loads(run("info", "run.h5", "--json").out)["maps"] == list(METHODS)


def test_a_store_of_compute_gets_maps(run: Callable[..., Said], tmp_path: Path) -> None:
    compute = ("compute", *SMALL, "-o", "run.h5", "--sparsity", "0.9", "--target", "4", *QUICK)
    assert run(*compute).code == 0
    assert run("attribute", *SMALL, "-o", "run.h5", "--method", "neuron_mct@0.9", "--reduction", "signed_sum",
               "--quiet").code == 0  # fmt: skip
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert store.map_keys == ("neuron_mct@0.9",)
        assert store.map_reduction("neuron_mct@0.9") == "signed_sum"
        assert store.samples()["target"].tolist() == [4] * 7
    assert run(*compute).err.startswith("run.h5: 7 of 7 samples (0 worked through now, 7 were there)")  # still its own


def test_options(run: Callable[..., Said], tmp_path: Path) -> None:
    said = run(*given("--method", "neuron_mct@0.5", "--granularity", "channel", "--sites", "relu", "--response",
                      "margin", "--target", "labels", "--limit", "3", "--thumbnails", "8"))  # fmt: skip
    assert said.code == 0
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert len(store) == 3
        assert store.index.granularity == "channel"
        assert store.header.response == "margin"
        assert store.header.target == "labels"
        assert store.thumbnail(0).shape == (8, 8, 3)  # type: ignore[union-attr]


def test_samples_without_a_map_are_said(run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_jobs, "spoilt", lambda: Chosen(range(14), {row: OSError("gone") for row in range(2, 14)}),
                        raising=False)  # fmt: skip
    said = run("attribute", "small_jobs:build", "small_jobs:spoilt", "-o", "run.h5", "--method", "gradient", *QUICK)
    assert said.code == 0
    lines = said.err.splitlines()
    assert lines[0] == f"no map: {Chosen(range(14)).ids[2]}: gradient: OSError: gone"
    assert lines[10] == "… and 2 more"
    assert len(lines) == 12
    monkeypatch.setattr(small_jobs, "spoilt", lambda: Chosen(range(2), {row: OSError("gone") for row in range(2)}))
    said = run("attribute", "small_jobs:build", "small_jobs:spoilt", "-o", "no.h5", "--method", "gradient", *QUICK)
    assert said.code == 2


# --- figures ---


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A room of figures that notes what it is asked for."""
    calls: list[tuple[Any, ...]] = []

    def sample_figure(store: Any, sample: Any, keys: Any, *, picture: Any = None) -> Figure:
        calls.append(("sample", sample, tuple(keys), picture, store.maps(keys[0]).shape))
        return Figure()

    def overview_figure(store: Any, samples: Any, keys: Any, *, pictures: Any = None) -> Figure:
        calls.append(("overview", tuple(samples), tuple(keys), pictures))
        return Figure()

    made = SimpleNamespace(sample_figure=sample_figure, overview_figure=overview_figure)
    monkeypatch.setitem(sys.modules, "fxpath.mapfigures", made)  # type: ignore[arg-type]
    return calls


def test_figures_show_the_store_s_thumbnails(
    run: Callable[..., Said], tmp_path: Path, room: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: LoadedModel, x: Any) -> None:
        raise InputError("no picture")

    monkeypatch.setattr(LoadedModel, "picture", none)
    monkeypatch.setattr(small_jobs, "many", lambda: Chosen(range(12), {1: OSError("gone")}), raising=False)
    said = run("attribute", "small_jobs:build", "small_jobs:many", "-o", "run.h5", "--method", "gradient",
               "neuron_mct@0.9", "--figures", "figures", *QUICK)  # fmt: skip
    assert said.code == 0, said.err
    assert said.err.splitlines()[-1] == "9 figures are in figures"
    rows = [0, 2, 3, 4, 5, 6, 7, 8]  # the first eight that have maps
    names = [Chosen(range(12)).ids[row] for row in rows]
    keys = ("gradient", "neuron_mct@0.9")
    assert room[0] == ("overview", tuple(names), keys, {})
    assert room[1:] == [("sample", name, keys, None, (12, 32, 32)) for name in names]
    assert leftovers(tmp_path / "figures") == {"maps.png", *(f"sample_{row:05d}.png" for row in rows)}


def test_figures_show_what_the_network_sees(
    run: Callable[..., Said], room: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "picture", lambda self, x: np.full((32, 32, 3), int(x.sum()) % 256, np.uint8),
                        raising=False)  # fmt: skip
    assert run(*given("--method", "gradient", "--figures", "out", "--limit", "2")).code == 0
    shown = {name: int(inputs()[row].sum()) % 256 for row, name in enumerate(seven().ids[:2])}
    assert {name: int(picture.mean()) for name, picture in room[0][3].items()} == shown
    assert [int(call[3].mean()) for call in room[1:]] == list(shown.values())


def test_figures_are_drawn(run: Callable[..., Said], tmp_path: Path) -> None:
    """Without any stand-in: pictures of the store's maps."""
    assert run(*given("--method", "gradient", "neuron_mct@0.9", "--figures", "out", "--limit", "2")).code == 0
    drawn = sorted((tmp_path / "out").iterdir())
    assert [each.name for each in drawn] == ["maps.png", "sample_00000.png", "sample_00001.png"]
    for each in drawn:
        shades = np.asarray(Image.open(each).convert("L"))
        assert shades.shape[1] == 975
        assert len(np.unique(shades)) > 50


def test_no_map_no_figure(
    run: Callable[..., Said], room: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(small_jobs, "spoilt", lambda: Chosen(range(2), {row: OSError("gone") for row in range(2)}),
                        raising=False)  # fmt: skip
    said = run("attribute", "small_jobs:build", "small_jobs:spoilt", "-o", "no.h5", "--method", "gradient", "--figures",
               "figures", *QUICK)  # fmt: skip
    assert said.code == 2
    assert said.err.splitlines()[-1] == "no figure, as no sample has a map"
    assert room == []
    assert leftovers(tmp_path) == {"no.h5"}


# --- stopped ---


def test_a_job_that_is_stopped_says_what_is_kept(
    run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mapping, "compute", stop)
        said = run(*given("--method", *METHODS))
        assert (said.code, said.err) == (130, "stopped before the first micro-batch was finished; nothing is kept.\n")
        assert leftovers(tmp_path) == set()
    with monkeypatch.context() as patched:
        patched.setattr(mapping, "add_maps", stop)
        said = run(*given("--method", *METHODS))
    kept = "stopped; 2 finished micro-batches are kept in run.h5.maps. The same command goes on there.\n"
    assert (said.code, said.err) == (130, kept)
    said = run(*given("--method", *METHODS))
    assert "(3 made now, 0 were there; 0 samples worked through now, 7 were there)" in said.err
    assert leftovers(tmp_path) == {"run.h5"}


def test_control_c(tmp_path: Path, heeds_control_c: None) -> None:  # noqa: F811
    command = [
        sys.executable, "-m", "fxpath", "attribute", "small_jobs:build", "small_jobs:slow", "-o",
        str(tmp_path / "run.h5"), "--method", "gradient", "--micro-batch", "2", "--threads", "1",
    ]  # fmt: skip
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        until = time.monotonic() + 60
        while not list(tmp_path.glob("run.h5.maps/part-*.h5")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    kept = len(list(tmp_path.glob("run.h5.maps/part-*.h5")))
    assert 1 <= kept < 5
    said = f"stopped; {kept} finished micro-batches are kept in {tmp_path / 'run.h5.maps'}. The same command goes on"
    assert err.splitlines()[-1] == f"{said} there."
    with fxpath.open_store(tmp_path / "run.h5") as store:  # what was there is there
        assert store.map_keys == ()


# --- what one can mend ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (given("--method", "gradeint"), "there is no method 'gradeint'; nearest: gradient"),
        (given("--method", "neuron_mct"), "expected a sparsity, such as @0.9"),
        (given("--method", "gradient", "gradient"), "gradient is asked for twice"),
        (given("--method", "gradient", "--reduction", "max"), "there is no reduction 'max'; nearest: max_abs"),
        (given("--method", "gradient", "--target", "10"), "expected a class in 0 … 9, found 10"),
        (given("--method", "gradient", "--micro-batch", "0"), "micro_batch: expected a whole number of at least 1"),
        (given("--method", "gradient", "--threads", "0"), "threads: expected a whole number of at least 1, found 0"),
        (given("--method", "gradient", "--limit", "0"), "expected a limit of 1 or more, found 0"),
        (given("--method", "gradient", "--device", "abacus"), "--device: 'abacus' cannot be used"),
        (given("--method", "gradient", "-o", "a folder"), "attribute: a folder is a folder; give a file name such as"),
        (given("--method", "gradient", "-o", "a file"), "a file: cannot open it as a store"),
        (given("--method", "gradient", "-o", "a file/run.h5"), "attribute: a file/run.h5"),
    ],
)
def test_one_line_and_exit_code_two(
    run: Callable[..., Said], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "a file").write_text("no store")
    (tmp_path / "a folder").mkdir()
    found = run(*arguments)
    assert (found.code, found.out) == (2, "")
    assert said in found.err
    assert len(found.err.splitlines()) == 1
    assert leftovers(tmp_path) == {"a file", "a folder"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*SMALL, "-o", "run.h5"), "Missing option '--method'"),
        ((*SMALL, "--method", "gradient"), "Missing option '--output'"),
        ((*SMALL, "-o", "run.h5", "--method", "gradient", "gradeint"), "unexpected extra argument"),
    ],
)
def test_usage(run: Callable[..., Said], tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    found = run("attribute", *arguments)
    assert found.code == 2
    assert said in " ".join(found.err.split())
    assert leftovers(tmp_path) == set()


def test_the_command_is_there_whichever_room_is_imported_first() -> None:
    script = (
        "import fxpath.cli_attribute as room, fxpath.cli as cli; assert cli.cli_attribute is room; cli.main(['-h'])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2  # there is no -h
    assert "No such option" in done.stderr
    assert callable(main)
