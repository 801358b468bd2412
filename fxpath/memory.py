"""Memory that a job frees and will need again at once stays with the process until the job ends."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
_WHILE = {_TRIM: 2**31 - 1, _MMAP: 2**30}
_AFTER = {_TRIM: 2**26, _MMAP: 2**25}  # the most that glibc chooses by itself
_OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@contextmanager
def kept_memory() -> Iterator[None]:
    """Do not give freed memory back to the system within the `with` block; give it back at its end.

    A forward frees its activations, and glibc hands large blocks back to the system, which has to find and clear the
    same pages again for the next forward: up to a fifth of the time on a CPU. Other C libraries, and users who have
    tuned glibc in the environment, keep their ways. The peak of memory stays the same.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    known = all(hasattr(library, name) for name in ("mallopt", "malloc_trim"))
    if library is None or not known or any(name in os.environ for name in _OWN_CHOICE):
        yield
        return
    for parameter, value in _WHILE.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _AFTER.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
