"""What runs beside computing: the next micro-batch is read and the last one is written meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Generic, TypeVar

import torch

from .memory import kept_memory
from .progress import no_bars

_T = TypeVar("_T")


@contextmanager
def settings(threads: int, device: torch.device) -> Iterator[None]:
    """A job's number of threads, and freed memory kept where the network runs on the CPU; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kept_memory() if device.type == "cpu" else nullcontext(), no_bars():
            yield
    finally:
        torch.set_num_threads(before)


def read_ahead(
    read: Callable[[int], _T], numbers: Sequence[int], threads: int, device: torch.device
) -> Iterator[tuple[int, _T]]:
    """What `read` gives for each number; the next one is read while this one is computed."""
    with ThreadPoolExecutor(1, thread_name_prefix="fxpath-read") as pool:
        if device.type == "cpu":
            pool.submit(_without_workers).result()
            torch.set_num_threads(threads)  # torch remembers the last number for all threads to come
        ahead: Future[_T] | None = pool.submit(read, numbers[0]) if numbers else None
        for place, number in enumerate(numbers):
            assert ahead is not None
            items = ahead.result()
            ahead = pool.submit(read, numbers[place + 1]) if place + 1 < len(numbers) else None
            yield number, items


def _without_workers() -> None:
    """Let this thread work alone: with workers of its own there are more than cores, and all sleep at every barrier."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread that has never asked takes the number over from others when it first does


class Writer(Generic[_T]):
    """Writes finished micro-batches by `write` in a thread of its own, so that computing never waits for that."""

    def __init__(self, write: Callable[[int, _T], None]) -> None:
        self.write = write
        self.waiting: queue.Queue[tuple[int, _T] | None] = queue.Queue(maxsize=2)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="fxpath-write", daemon=True)

    def __enter__(self) -> Writer[_T]:
        self.thread.start()
        return self

    def put(self, number: int, rows: _T) -> None:
        """Hand over micro-batch `number`; raises here what went wrong with an earlier one."""
        if self.failure is not None:
            raise self.failure
        self.waiting.put((number, rows))

    def _work(self) -> None:
        while (item := self.waiting.get()) is not None:
            if self.failure is None:
                try:
                    self.write(*item)
                except BaseException as error:  # raised again in the thread that computes
                    self.failure = error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.waiting.put(None)
        self.thread.join()  # what is computed is kept, also when the job is stopped
        if kind is None and self.failure is not None:
            raise self.failure
