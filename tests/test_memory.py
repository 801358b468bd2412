"""Memory between forwards: kept while a job runs, given back when it ends."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch
from processes import run
from torch import nn

import fxpath
import fxpath.batch
import fxpath.workers
from fxpath import memory

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")

FAULTS = """
import json, resource, torch
from contextlib import nullcontext
from fxpath.memory import kept_memory

def forward():
    "Six blocks of 16 MB, alive together and then all free, as the activations of a forward."
    blocks = [torch.ones(4 * 2**20) for _ in range(6)]

def faults(context):
    with context:
        forward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            forward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

forward()
plain, start = faults(nullcontext()), resident()
kept, end = faults(kept_memory()), resident()
print(json.dumps([plain, kept, end - start]))
"""


@pytest.mark.skipif(not GLIBC, reason="glibc alone is tuned")
def test_a_forward_finds_the_pages_of_the_last_one_and_the_end_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    untuned(monkeypatch)
    ended = run(FAULTS)
    assert ended.returncode == 0, ended.stderr
    plain, kept, grown = json.loads(ended.stdout)
    if plain < 1_000:
        pytest.skip("this system gives out huge pages, or keeps freed ones")  # there is nothing to gain then
    assert kept < plain / 20  # without it every forward asks for its pages again
    assert grown < 16 * 2**20


def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory._OWN_CHOICE:
        monkeypatch.delenv(name, raising=False)


class Library:
    """A C library that notes what it is asked."""

    def __init__(self, *names: str, refused: int | None = None) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.refused = refused
        for name in names:
            setattr(self, name, self._noting(name))

    def _noting(self, name: str) -> Callable[..., int]:
        def call(*arguments: int) -> int:
            self.calls.append((name, *arguments))
            return int(arguments[0] != self.refused)

        return call


KEEP = [("mallopt", -3, 2**25), ("mallopt", -1, 2**31 - 1)]
GIVE_BACK = [("mallopt", -1, 2**26), ("malloc_trim", 0)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """In place of glibc, in an environment that does not tune it."""
    untuned(monkeypatch)
    found = Library("mallopt", "malloc_trim")
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: found)
    return found


def test_the_end_is_the_same_after_an_error(library: Library) -> None:
    with suppress(KeyError), memory.kept_memory():
        assert library.calls == KEEP
        raise KeyError
    assert library.calls == KEEP + GIVE_BACK


def test_the_last_of_several_blocks_gives_back(library: Library) -> None:
    with memory.kept_memory():
        with memory.kept_memory():
            pass
        assert library.calls == KEEP + KEEP
    assert library.calls == KEEP + KEEP + GIVE_BACK


def test_a_library_that_refuses_large_blocks_keeps_its_own_ways(library: Library) -> None:
    library.refused = -3
    with memory.kept_memory():
        assert library.calls == KEEP[:1]


@pytest.mark.parametrize("name", memory._OWN_CHOICE)
def test_the_users_own_tuning_stays(library: Library, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with memory.kept_memory():
        pass
    assert library.calls == []


def test_another_c_library_is_left_alone(library: Library) -> None:
    del library.malloc_trim  # type: ignore[attr-defined]
    with memory.kept_memory():
        pass
    assert library.calls == []


class Data(list[torch.Tensor]):
    ids = ("a", "b", "c")


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_keeps_memory_while_it_runs(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        seen.append("kept")
        try:
            yield
        finally:
            seen.append("given back")

    compute_rows = fxpath.batch.compute_rows

    def computing(*arguments: object) -> object:
        seen.append("computed")
        if fails:
            raise RuntimeError("now")
        return compute_rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fxpath.workers, "kept_memory", noted)
    monkeypatch.setattr(fxpath.batch, "compute_rows", computing)
    network = fxpath.trace(nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 3)).eval(), torch.zeros(2, 4))
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="now") if fails else nullcontext():
        fxpath.compute(network, Data(torch.randn(3, 4)), tmp_path / "run.h5", threads=1, progress=False)
    assert seen == ["kept", "computed", "given back"]
    assert torch.get_num_threads() == threads
