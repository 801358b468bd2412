"""Memory that a job frees and will need again at once stays with the process until the job ends."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
_MOST = {_MMAP: 2**25, _TRIM: 2**26}  # bytes; the most that glibc comes to by itself
_NEVER = 2**31 - 1
_OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")

_lock = threading.Lock()
_users: set[object] = set()  # one for each block under way


@contextmanager
def kept_memory() -> Iterator[None]:
    """Do not give freed memory back to the system within the `with` block; give it back at its end.

    A forward frees its activations, and glibc may hand them back to the system, which has to find and clear the same
    pages again for the next forward: up to a fifth of the time on a CPU. Blocks above 32 MB go back at once all the
    same, so that the peak of memory hardly changes. Other C libraries, and users who have tuned glibc in the
    environment, keep their ways. Blocks may nest and run in several threads; the last one to end gives back. From then
    on up to 64 MB of freed memory may stay with the process, as they may in any process that has used large blocks.
    """
    library = _tunable()
    if library is None:
        yield
        return
    user = object()
    with _lock:
        _users.add(user)
        # the trim threshold alone would freeze the other one at 128 KiB, and every activation would be mapped anew
        if library.mallopt(_MMAP, _MOST[_MMAP]):
            library.mallopt(_TRIM, _NEVER)
    try:
        yield
    finally:
        with _lock:
            _users.discard(user)
            if not _users:
                library.mallopt(_TRIM, _MOST[_TRIM])
                library.malloc_trim(0)


def _tunable() -> Any:
    """The C library where it is a glibc that nobody has tuned, else None."""
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_CHOICE):
        return None
    library = ctypes.CDLL(None)
    return library if all(hasattr(library, name) for name in ("mallopt", "malloc_trim")) else None
