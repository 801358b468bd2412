"""A job that is killed at any moment, started again, gives what an undisturbed one gives, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from small_jobs import by_sample

import fxpath

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}

Log = dict[str, dict[str, Any]]

BEGINNING = ["run.h5.parts"]
PART = [f"run.h5.parts/part-{number:07d}.h5" for number in range(3)]
UNFINISHED = [f"run.h5.parts/.part-{number:07d}.h5.tmp" for number in range(3)]
RECORD = [*BEGINNING, "run.h5.parts/job.json"]

# what must be on the disk right after each kill; writing may be a micro-batch behind where computing is killed
EXPECTED: dict[str, list[str] | None] = {
    "before the folder of parts": [],
    "before job.json": BEGINNING,
    "while job.json is written": [*BEGINNING, "run.h5.parts/.job.json.tmp"],
    "before job.json gets its name": [*BEGINNING, "run.h5.parts/.job.json.tmp"],
    "job.json is there": RECORD,
    "first part, first chunk": [*RECORD, UNFINISHED[0]],
    "first part, mid-write": [*RECORD, UNFINISHED[0]],
    "first part, before its name": [*RECORD, UNFINISHED[0]],
    "first part, after its name": [*RECORD, PART[0]],
    "second micro-batch, computing": None,
    "second part, mid-write": [*RECORD, PART[0], UNFINISHED[1]],
    "between second and third part": [*RECORD, *PART[:2]],
    "third micro-batch, reading": None,
    "last part, before its name": [*RECORD, *PART[:2], UNFINISHED[2]],
    "last part, after its name": [*RECORD, *PART],
    "before the merge": [*RECORD, *PART],
    "merge, first chunk": [".run.h5.tmp", *RECORD, *PART],
    "merge, mid-write": [".run.h5.tmp", *RECORD, *PART],
    "merge, before the store gets its name": [".run.h5.tmp", *RECORD, *PART],
    "merge, after the store has its name": ["run.h5", *RECORD, *PART],
    "before the parts are removed": ["run.h5", *RECORD, *PART],
    "while the parts are removed": ["run.h5", *RECORD, *PART[1:]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


def killed(folder: Path, kind: str) -> Log:
    """What the driver saw of jobs of this kind: one killed at each moment, and one at each size of a full disk."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(TESTS / "kill_driver.py"), str(folder), kind],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {str(line.get("moment", line.get("limit"))): line | {"stderr": done.stderr} for line in lines}


@pytest.fixture(scope="module")
def log(folder: Path) -> Log:
    return killed(folder, "compute")


def test_every_moment_was_tried(log: Log) -> None:
    assert [name for name in log if not name.isdecimal()] == list(EXPECTED)
    assert sum(name.isdecimal() for name in log) == 3


@pytest.mark.parametrize("moment", EXPECTED)
def test_killed_and_started_again(folder: Path, log: Log, moment: str) -> None:
    seen = log[moment]
    assert seen["status"] == -signal.SIGKILL, seen["stderr"]  # a job that finished before does not count
    assert seen["doing"]
    expected = EXPECTED[moment]
    if expected is not None:
        assert sorted(seen["left"]) == sorted(expected)
    assert ("run.h5" in seen["left"]) == moment.endswith(("has its name", "removed"))
    assert seen["again"] == 0, seen["stderr"]
    assert seen["end"] == ["run.h5"]
    number = list(EXPECTED).index(moment)
    assert by_sample(folder / str(number) / "run.h5") == by_sample(folder / "undisturbed" / "run.h5")


def test_a_full_disk_that_the_kernel_sees_to(folder: Path, log: Log) -> None:
    """The limit on a file's size: within the first part, at the end of a part, within the merge."""
    for limit, seen in log.items():
        if not limit.isdecimal():
            continue
        assert seen["status"] == 2, seen
        assert "cannot write the store" in seen["said"]
        assert "Nothing was left behind; free disk space" in seen["said"]
        merging = "run.h5.parts" not in seen["said"]
        assert sorted(seen["left"]) == (sorted([*RECORD, *PART]) if merging else [])
        assert seen["again"] == 0
        assert seen["end"] == ["run.h5"]
        found = by_sample(folder / f"limit-{limit}" / "run.h5")
        assert found == by_sample(folder / "undisturbed" / "run.h5")
    assert [len(seen["left"]) for name, seen in log.items() if name.isdecimal()] == [0, 0, 5]


# --- the command line, as it is typed ---


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "fxpath", "compute", "small_jobs:build", "small_jobs:slow", "-o", str(folder / "run.h5"),
        "--micro-batch", "2", "--threads", "1", *more,
    ]  # fmt: skip


def wait_for_parts(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(list(folder.glob("run.h5.parts/part-*.h5"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def heeds_control_c() -> Iterator[None]:
    """Processes started here heed Control-C, even where these tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_control_c_and_termination(tmp_path: Path, sent: signal.Signals, code: int, heeds_control_c: None) -> None:
    with subprocess.Popen(
        command(tmp_path), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_parts(process, tmp_path, 1)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    kept = len(list(tmp_path.glob("run.h5.parts/part-*.h5")))
    assert 1 <= kept < 5
    if sent == signal.SIGINT:
        said = err.splitlines()[-1]
        assert said == (
            f"stopped; {kept} finished micro-batches are kept in {tmp_path / 'run.h5.parts'}. The same command goes on "
            "there."
        )
        assert not list(tmp_path.rglob("*.tmp"))
    from small_jobs import build, run, slow

    network = fxpath.trace(build().model, build().example(2))
    report = run(slow(0), tmp_path / "run.h5", network, micro_batch=None, selectors=["neuron_mct"],
                 sparsities=[0.8, 0.9, 0.99], model="small_jobs:build", preprocessing=build().preprocessing,
                 classes=build().classes)  # fmt: skip
    assert report.reused == 2 * kept
    again = run(slow(0), tmp_path / "other.h5", network, micro_batch=2, selectors=["neuron_mct"],
                sparsities=[0.8, 0.9, 0.99])  # fmt: skip
    assert again.reused == 0
    assert by_sample(tmp_path / "run.h5") == by_sample(tmp_path / "other.h5")


class OnDisk(NamedTuple):
    """What a job shows on the disk."""

    record: bool
    parts: int
    writing: bool
    merging: bool
    store: bool


def on_disk(path: Path) -> OnDisk:
    folder = path.with_name(f"{path.name}.parts")
    return OnDisk(
        (folder / "job.json").exists(),
        len(list(folder.glob("part-*.h5"))),
        bool(list(folder.glob(".part-*.tmp"))),
        path.with_name(f".{path.name}.tmp").exists(),
        path.exists(),
    )


# when to kill: what must be seen on the disk, and how many seconds later; ten micro-batches in all
WHEN: list[tuple[str, Callable[[OnDisk], bool], float]] = [
    ("the first micro-batch is computed", lambda seen: seen.record, 0.5),
    ("the first part is written", lambda seen: seen.writing, 0.0),
    ("one part is there", lambda seen: seen.parts == 1, 0.2),
    ("the third part is written", lambda seen: seen.parts == 2 and seen.writing, 0.0),
    ("three parts are there", lambda seen: seen.parts == 3, 0.6),
    ("five parts are there", lambda seen: seen.parts == 5, 0.0),
    ("seven parts are there", lambda seen: seen.parts == 7, 0.4),
    ("the last part is written", lambda seen: seen.parts == 9 and seen.writing, 0.0),
    ("all parts are there", lambda seen: seen.parts == 10, 0.0),
    ("parts are joined", lambda seen: seen.merging, 0.05),
]


@pytest.mark.slow
def test_squeezenet_killed_at_ten_moments(tmp_path: Path) -> None:
    """`fxpath compute` on photos, killed at ten moments of its work, and started again each time."""

    def start(path: Path) -> subprocess.Popen[str]:
        arguments = [
            sys.executable, "-m", "fxpath", "compute", "zoo:squeezenet1_1", "foolbox:imagenet", "-o", str(path),
            "--micro-batch", "2", "--threads", "2", "--quiet",
        ]  # fmt: skip
        return subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)

    with start(tmp_path / "undisturbed.h5") as process:
        assert process.wait() == 0
    wanted = by_sample(tmp_path / "undisturbed.h5")
    for number, (name, ready, delay) in enumerate(WHEN):
        path = tmp_path / f"{number}.h5"
        status, tries = 0, 0
        while status != -signal.SIGKILL:  # one that finished before its kill does not count
            path.unlink(missing_ok=True)
            tries += 1
            assert tries < 6
            began = time.monotonic()
            with start(path) as process:
                while process.poll() is None and not ready(on_disk(path)):
                    time.sleep(0.0005)
                time.sleep(delay)
                process.kill()
                status = process.wait()
            seconds = time.monotonic() - began
        left = on_disk(path)
        with start(path) as process:
            _, said = process.communicate()
        assert process.returncode == 0, said
        print(f"{name}: killed after {seconds:.1f} s (try {tries}), left {tuple(left)}; then {said.strip()}")  # noqa: T201
        assert not left.store
        assert f"({20 - 2 * left.parts} worked through now, {2 * left.parts} were there)" in said
        assert by_sample(path) == wanted
        assert not path.with_name(f"{path.name}.parts").exists()
