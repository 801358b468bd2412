"""Coverage: can this network be traced, gated, scored and restricted? One row a network, one process a row."""

from __future__ import annotations

import math
import multiprocessing as mp
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .activations import RECTIFIERS
from .equality import difference
from .files import save_table
from .gates import Gates
from .network import Network, trace
from .selectors import NeuronMCT
from .subjects import Subject, subject_of

SPARSITY = 0.9
COVERED = "covered"
_ALL_NEURONS = 20_000  # up to so many, every neuron's number makes the round trip; above, as many random ones
_GIB = 2**30


@dataclass
class Row:
    """What was seen of one network; numbers are NaN where it did not get that far.

    sites, rectifiers (of these), neurons N, parameters; tracer; `difference`: the largest absolute difference of
    the traced network's output from the module's, over batches of 1, 2 and 3; `open_gates`: the same with every gate
    asked and open; `scored`: the share of neurons with a NeuronMCT score other than 0; `masked`: Φ of the network
    masked to the pathway at κ = 0.9 over Φ; `frozen`: |Φ̂(x) − Φ(x)|; seconds of tracing and of all; the process's
    peak memory in GiB. `device` is cpu, or meta for networks of which only the shapes were looked at. `status` is
    "covered", or why not; `remarks` is what tracing says of a graph that its sites do not show.
    """

    name: str
    status: str = ""
    device: str = "cpu"
    input: str = ""
    parameters: float = math.nan
    sites: float = math.nan
    rectifiers: float = math.nan
    neurons: float = math.nan
    tracer: str = ""
    difference: float = math.nan
    open_gates: float = math.nan
    scored: float = math.nan
    masked: float = math.nan
    frozen: float = math.nan
    trace_seconds: float = math.nan
    seconds: float = math.nan
    peak_gib: float = math.nan
    remarks: str = ""


class _FindingError(Exception):
    """A finding that keeps a network from being covered."""


def look_at(subject: Subject, row: Row) -> None:
    """Trace, gate, score and restrict one network; fills in its row as it goes.

    On the meta device it is traced and gated alone, as nothing can be computed.
    """
    samples = subject.samples
    parameters = list(subject.model.parameters())
    row.parameters = sum(parameter.numel() for parameter in parameters)
    row.input = "; ".join(" × ".join(map(str, tensor.shape[1:])) for tensor in samples.tensors)
    if any(parameter.is_meta for parameter in parameters):
        row.device = "meta"
        samples = samples.to("meta")
    begun = time.perf_counter()
    network = trace(
        subject.model, samples.take([0, 1]), sites="activations", response=subject.response, check=row.device == "cpu"
    )
    row.trace_seconds = time.perf_counter() - begun
    row.sites, row.neurons, row.tracer = len(network.sites), network.index.size, network.traced.tracer
    row.rectifiers = sum(site.op in RECTIFIERS for site in network.sites)
    row.remarks = _short("; ".join(network.traced.remarks))
    _require_round_trip(network)
    if row.device == "meta":
        return
    skipped = [note for note in network.traced.notes if "compared" in note or "refuses a batch" in note]
    if skipped:
        raise _FindingError(f"a step of the check was skipped: {skipped[0]}")
    row.difference, row.open_gates = _differences(subject, network)
    one = samples.take([0])
    scores = NeuronMCT().scores(network, one)
    row.scored = float((scores.signed != 0).double().mean())
    if row.scored == 0:
        raise _FindingError("no neuron scores")
    pathways = scores.pathways(SPARSITY)
    with torch.no_grad():
        original = float(network.respond(one))
        with network.masked(pathways):
            row.masked = float(network.respond(one)) / original
        with network.frozen(pathways, at=one):
            row.frozen = abs(float(network.respond(one)) - original)
    if not math.isfinite(row.masked):
        raise _FindingError("the masked network's response is not finite")
    if row.frozen > 1e-5 * max(abs(original), 1):
        raise _FindingError("the frozen network answers otherwise at its own sample")


def _differences(subject: Subject, network: Network) -> tuple[float, float]:
    """The largest difference from the module over batches of 1, 2 and 3: as it is, and with every gate asked."""
    plain = gated = 0.0
    for batch in (1, 2, 3):
        given = network.samples(subject.samples.take(range(batch)))
        order: list[int] = []
        with torch.no_grad():
            own = given.map(torch.clone)
            expected = subject.model(*own.args, **own.kwargs)
            found = network(given)
            asked = network._run(given, Gates(network.index, watch=lambda number, _, order=order: order.append(number)))  # type: ignore[misc]
        gaps = [difference(expected, each) for each in (found, asked)]
        if None in gaps:
            raise _FindingError(f"another output than the module's for a batch of {batch}")
        plain, gated = max(plain, gaps[0] or 0.0), max(gated, gaps[1] or 0.0)
        if order != list(range(len(network.sites))):
            raise _FindingError("the sites are not in the order of execution")
    return plain, gated


def _require_round_trip(network: Network) -> None:
    index = network.index
    numbers: Sequence[int] = range(index.size)
    if index.size > _ALL_NEURONS:
        numbers = torch.randint(index.size, (_ALL_NEURONS,), generator=torch.Generator().manual_seed(0)).tolist()
    if any(index.flat(*index.locate(number)) != number for number in numbers):
        raise _FindingError("a neuron's number is not that of its place")


def _look(name: str, threads: int, limit_gib: float, meta: bool, answers: Any) -> None:
    """The work of one process: a row, sent back as it is filled."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    if limit_gib and not meta:
        with suppress(ImportError):  # not on every system
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * _GIB),) * 2)
    row = Row(name)
    begun = time.perf_counter()
    try:
        look_at(subject_of(name, meta=meta), row)
        row.status = COVERED
    except _FindingError as finding:
        row.status = str(finding)
    except Exception as error:
        short = isinstance(error, MemoryError) or "allocate memory" in str(error)  # fxpath's errors quote torch's
        row.status = MEMORY.format(limit_gib) if short else _line(error)
    row.seconds = time.perf_counter() - begun
    with suppress(ImportError):
        import resource

        row.peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
    answers.send(asdict(row))


MEMORY = "needs more than {} GiB"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {_short(str(error))}"


def _short(text: str) -> str:
    """Text in one line that holds on every machine: files of packages by their place within these."""
    return " ".join(re.sub(r"\S*/site-packages/", "", text).split())[:400]


def look_apart(name: str, *, threads: int, limit_seconds: float, limit_gib: float) -> Row:
    """One network's row, found in a process of its own that is ended at either limit.

    A network that needs more memory than the limit is traced on the meta device, and marked so.
    """
    row = _apart(name, threads, limit_seconds, limit_gib, meta=False)
    if row.status == MEMORY.format(limit_gib):
        row = _apart(name, threads, limit_seconds, limit_gib, meta=True)
    return row


def _apart(name: str, threads: int, limit_seconds: float, limit_gib: float, *, meta: bool) -> Row:
    context: Any = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_look, args=(name, threads, limit_gib, meta, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_seconds):
            return Row(name, f"took more than {limit_seconds:g} s", seconds=limit_seconds)
        row = Row(**ours.recv())
        process.join(10)  # it has nothing left to do
        return row
    except EOFError:
        process.join()
        killed = process.exitcode is not None and process.exitcode < 0
        return Row(name, MEMORY.format(limit_gib) if killed else f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        ours.close()


def read_rows(path: Path) -> dict[str, Row]:
    """The rows that a table holds, by name; none where there is no table."""
    if not path.exists():
        return {}
    table = pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in _NUMBERS})
    rows = (Row(**{str(key): value for key, value in record.items()}) for record in table.to_dict("records"))
    return {row.name: row for row in rows}


_NUMBERS = [field.name for field in fields(Row) if field.type == "float"]


def cover(
    names: Sequence[str],
    path: Path,
    *,
    threads: int,
    limit_seconds: float,
    limit_gib: float,
    again: bool = False,
    said: Callable[[Row], None] = lambda _: None,
) -> pd.DataFrame:
    """Look at every network that the table at `path` has no row of; the table is written anew after each.

    With `again` those are looked at once more that are not covered.
    """
    rows = read_rows(path)
    for name in names:
        if name in rows and (rows[name].status == COVERED or not again):
            continue
        rows[name] = look_apart(name, threads=threads, limit_seconds=limit_seconds, limit_gib=limit_gib)
        save_table(table_of(rows, names), path)
        said(rows[name])
    return table_of(rows, names)


def table_of(rows: dict[str, Row], names: Sequence[str]) -> pd.DataFrame:
    """The rows as a table, in the order of `names`, others after them."""
    order = [*(name for name in names if name in rows), *(name for name in rows if name not in set(names))]
    return pd.DataFrame([asdict(rows[name]) for name in order])
