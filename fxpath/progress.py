"""Progress bars of what takes longer than a moment, on stderr; none within a job, which has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def no_bars() -> Iterator[None]:
    """No bar of `bar` shows within."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def bar(total: int, what: str, unit: str) -> Any:
    """A bar that appears after two seconds and goes when it is done."""
    return tqdm(total=total, desc=what, unit=unit, delay=2, leave=False, disable=_silent.get())
