"""Memory between forwards: kept while a job runs, given back when it ends."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable

import pytest
from processes import run

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
def test_a_forward_finds_the_pages_of_the_last_one_and_the_end_gives_them_back() -> None:
    ended = run(FAULTS)
    assert ended.returncode == 0, ended.stderr
    plain, kept, grown = json.loads(ended.stdout)
    assert plain > 10_000  # without it every forward asks for its pages again
    assert kept < plain / 20
    assert grown < 16 * 2**20


class Recorder:
    """A C library that notes what it is asked."""

    def __init__(self, *names: str) -> None:
        self.calls: list[tuple[object, ...]] = []
        for name in names:
            setattr(self, name, self._noting(name))

    def _noting(self, name: str) -> Callable[..., int]:
        def call(*arguments: int) -> int:
            self.calls.append((name, *arguments))
            return 1

        return call


def recorded(monkeypatch: pytest.MonkeyPatch, library: Recorder) -> list[tuple[object, ...]]:
    """What `library` is asked during a job that fails."""
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    with pytest.raises(KeyError), memory.kept_memory():
        raise KeyError
    return library.calls


def test_the_end_is_the_same_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory._OWN_CHOICE:
        monkeypatch.delenv(name, raising=False)
    calls = recorded(monkeypatch, Recorder("mallopt", "malloc_trim"))
    assert calls[-3:] == [("mallopt", -1, 2**26), ("mallopt", -3, 2**25), ("malloc_trim", 0)]
    assert len(calls) == 5


@pytest.mark.parametrize("name", memory._OWN_CHOICE)
def test_the_users_own_tuning_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert recorded(monkeypatch, Recorder("mallopt", "malloc_trim")) == []


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded(monkeypatch, Recorder("mallopt")) == []
