"""What holds for every test, and how benchmarks compare."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers alone and after others, in every run."""
    if "torch" in sys.modules:  # tests of the offline rooms do not import it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ratio(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., float]:
    """Run `ours` and `reference` in turn, in one run; the ratios of fastest and of median rounds go into the report."""

    def compare(ours: Callable[[], Any], reference: Callable[[], Any], *, rounds: int = 7, what: str = "") -> float:
        ours()
        reference()
        spent: list[float] = []

        def time_reference() -> None:
            start = time.perf_counter()
            reference()
            spent.append(time.perf_counter() - start)

        benchmark.pedantic(ours, setup=time_reference, rounds=rounds, iterations=1)
        own = benchmark.stats.stats
        fastest, median = own.min / min(spent), own.median / statistics.median(spent)
        benchmark.extra_info.update(
            ratio_of_fastest=round(fastest, 3), ratio_of_medians=round(median, 3), reference=what
        )
        with capsys.disabled():
            sys.stdout.write(f"\n{benchmark.name}: {fastest:.3f} (fastest), {median:.3f} (median) × {what}\n")
        return float(median)

    return compare
