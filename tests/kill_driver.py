"""A process that warms up, and then forks a job for each moment at which one is to be killed.

`kill_driver.py FOLDER compute` makes stores, `… attribute` adds maps to stores that are there, `… both` does both in
one job. It prints one JSON line a moment: how the job ended, what it was doing, and what lay on the disk right after.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from small_jobs import Chosen, add_maps, run

from fxpath import attribution, batch, mapping, microbatch, parted, parts, records

SAMPLES = 10  # three micro-batches of four, the last one short


def start(folder: Path) -> None:
    """The job that all this is about."""
    run(Chosen(range(SAMPLES)), folder / "run.h5", selectors=("neuron_mct", "active"))


def start_maps(folder: Path) -> None:
    """Maps of the same samples."""
    add_maps(Chosen(range(SAMPLES)), folder / "run.h5", methods=["gradient", "neuron_mct@0.9"])


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("SIGKILL was survived")


@dataclass
class Moment:
    """Where a job is to die: at the n-th call of a function, before it or after it."""

    name: str
    owner: Any
    function: str
    call: int
    after: bool = False
    since: tuple[Any, str] | None = None  # calls count from the first call of this function on

    def arm(self, note: Callable[[str], None]) -> None:
        """Patch the function in this process."""
        real, seen = getattr(self.owner, self.function), [0]
        counting = [not self.since]
        if self.since:
            begin = getattr(*self.since)

            def beginning(*arguments: Any, **options: Any) -> Any:
                counting[0] = True
                return begin(*arguments, **options)

            setattr(*self.since, beginning)

        def patched(*arguments: Any, **options: Any) -> Any:
            seen[0] += counting[0]
            deadly = seen[0] == self.call
            if deadly and not self.after:
                note(str(arguments[:2])[-200:])
                die()
            result = real(*arguments, **options)
            if deadly:
                note(str(arguments[:2])[-200:])
                die()
            return result

        setattr(self.owner, self.function, patched)


MERGE, ADD = (batch, "merge_stores"), (mapping, "add_maps")
COMPUTING = (
    Moment("before the folder of parts", batch, "held", 1),
    Moment("before job.json", parted, "write_record", 1),
    Moment("while job.json is written", records.json, "dump", 1, after=True),
    Moment("before job.json gets its name", Path, "replace", 1),
    Moment("job.json is there", batch, "compute_rows", 1),
    Moment("first part, first chunk", parts, "write_chunk", 1, after=True),
    Moment("first part, mid-write", parts, "write_chunk", 20),
    Moment("first part, before its name", parts, "rename", 1),
    Moment("first part, after its name", parts, "rename", 1, after=True),
    Moment("second micro-batch, computing", microbatch.Network, "outcome", 5),
    Moment("second part, mid-write", parts, "write_chunk", 50),
    Moment("between second and third part", parts, "rename", 2, after=True),
    Moment("third micro-batch, reading", Chosen, "__getitem__", 10),
    Moment("last part, before its name", parts, "rename", 3),
    Moment("last part, after its name", parts, "rename", 3, after=True),
    Moment("before the merge", batch, "merge_stores", 1),
    Moment("merge, first chunk", parts, "write_chunk", 1, since=MERGE),
    Moment("merge, mid-write", parts, "write_chunk", 40, since=MERGE),
    Moment("merge, before the store gets its name", parts, "rename", 1, since=MERGE),
    Moment("merge, after the store has its name", parts, "rename", 1, after=True, since=MERGE),
    Moment("before the parts are removed", batch, "remove_parts", 1),
    Moment("while the parts are removed", os, "unlink", 2, since=(batch, "remove_parts")),
)

MAPPING = (
    Moment("before the folder of parts", mapping, "held", 1),
    Moment("trying the methods", mapping, "try_methods", 1, after=True),
    Moment("before job.json", parted, "write_record", 1),
    Moment("before job.json gets its name", Path, "replace", 1),
    Moment("first micro-batch, computing", attribution, "_gradients", 3),
    Moment("first part, mid-write", parts, "write_chunk", 9),
    Moment("first part, before its name", parts, "rename", 1),
    Moment("first part, after its name", parts, "rename", 1, after=True),
    Moment("third micro-batch, reading", Chosen, "__getitem__", 11),
    Moment("last part, after its name", parts, "rename", 3, after=True),
    Moment("adding, first chunk", parts, "write_chunk", 1, since=ADD),
    Moment("adding, old content is moved", parts, "write_chunk", 60, since=ADD),
    Moment("adding, maps are moved", parts, "write_chunk", 90, since=ADD),
    Moment("adding, before the store gets its name", parts, "rename", 1, since=ADD),
    Moment("adding, after the store has its name", parts, "rename", 1, after=True, since=ADD),
    Moment("before the parts are removed", mapping, "remove_parts", 1),
    Moment("while the parts are removed", os, "unlink", 2, since=(mapping, "remove_parts")),
)
BOTH = (
    Moment("second part of pathways", parts, "rename", 2, after=True),
    Moment("before pathways are merged", batch, "merge_stores", 1),
    Moment("the store is there, without maps", mapping, "open_store", 1),
    Moment("first part of maps", parts, "rename", 5, after=True),
)


def forked(work: Callable[[], None]) -> int:
    """Run in a process of its own; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_disk(folder: Path) -> list[str]:
    return sorted(str(found.relative_to(folder)) for found in folder.rglob("*"))


def killed(moment: Moment, folder: Path, work: Callable[[Path], None], old: Path | None) -> dict[str, Any]:
    """Kill one job at a moment, and start it again; what the store was in between is kept beside the folder."""
    begin(folder, old)
    doing = folder / "doing"

    def doomed() -> None:
        moment.arm(lambda said: doing.write_text(said) and None)
        work(folder)

    status = forked(doomed)
    said = doing.read_text() if doing.exists() else ""
    doing.unlink(missing_ok=True)
    left = on_disk(folder)
    if (folder / "run.h5").exists():
        shutil.copy(folder / "run.h5", folder.with_name(f"{folder.name}.h5"))
    again = forked(lambda: work(folder))
    return {"moment": moment.name, "status": status, "doing": said, "left": left, "again": again,
            "end": on_disk(folder)}  # fmt: skip


def begin(folder: Path, old: Path | None) -> None:
    """A folder, with a store in it where the job starts from one."""
    folder.mkdir()
    if old is not None:
        shutil.copy(old, folder / "run.h5")


def limited(nbytes: int, folder: Path, work: Callable[[Path], None], old: Path | None) -> dict[str, Any]:
    """A job that may write no file larger than so many bytes, which the kernel sees to; and again without a limit."""
    begin(folder, old)

    def doomed() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
        try:
            work(folder)
        except batch.StoreError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (folder / "said").write_text(str(error))
            os._exit(2)

    status = forked(doomed)
    said = (folder / "said").read_text() if (folder / "said").exists() else ""
    (folder / "said").unlink(missing_ok=True)
    left = on_disk(folder)
    if (folder / "run.h5").exists():
        shutil.copy(folder / "run.h5", folder.with_name(f"{folder.name}.h5"))
    again = forked(lambda: work(folder))
    return {"limit": nbytes, "status": status, "said": said, "left": left, "again": again, "end": on_disk(folder)}


def main(folder: Path, kind: str) -> None:
    """All moments, and sizes at which the disk is full: in a part, at the end of one, and while parts are joined."""
    torch.set_num_threads(1)  # no worker threads that a fork would lose
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork")  # Python 3.12 counts NumPy's idle ones
    old = None
    if kind == "attribute":
        old = folder / "old" / "run.h5"
        old.parent.mkdir()
        start(old.parent)
    work, moments = {"compute": (start, COMPUTING), "attribute": (start_maps, MAPPING), "both": (start_maps, BOTH)}[
        kind
    ]
    undisturbed = folder / "undisturbed"
    begin(undisturbed, old)
    work(undisturbed)  # here, so that every fork finds all imported and warm; its threads have ended
    for number, moment in enumerate(moments):
        print(json.dumps(killed(moment, folder / str(number), work, old)), flush=True)  # noqa: T201
    size = (undisturbed / "run.h5").stat().st_size
    for nbytes in () if kind == "both" else (2000, size // 3, size - 1000):
        print(json.dumps(limited(nbytes, folder / f"limit-{nbytes}", work, old)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
