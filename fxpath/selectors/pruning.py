"""Selection by pruning: neurons of small |a · ∂Φ/∂a| are removed step by step (the paper's Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..answers import Pass
from ..errors import InputError, RestrictionError, SampleError
from ..gates import Gates, Restriction, flat, grouped, unfilled
from ..keys import checked_sparsities, exact_sparsity
from ..memory import kept_memory
from ..pathways import Pathways, Selection
from ..progress import bar
from ..responses import respond
from .ground import Ground, MemoryOrder
from .registry import register
from .smallest import Scan, prune_channels

if TYPE_CHECKING:
    from ..network import Network

_LONGEST = 1001  # states of a descent that the diagnostics describe, at most
_REACHED, _EXHAUSTED, _NOT_FINITE = "reached", "exhausted", "not finite"
_SHARES = ("mask_density", "scored", "dead_share", "dead_share_scored")


@register
@dataclass(frozen=True)
class GreedyPruning:
    """Greedy pruning (the paper's Algorithm 1): the lowest scores are removed, again and again.

    A descent starts from the whole network. At each state, masked to m, every neuron has the score s = |a · ∂Φ/∂a|;
    then the ⌈`share` · N⌉ lowest of those with s ≠ 0 are removed from m: all of them where they are fewer; of equal
    scores the larger neuron index goes first; at channel granularity whole channels, lowest first, until they make up
    as many units. Nothing comes back, and neurons with s = 0, the dead among them, are never removed.

    What answers is the effective pathway e = m ∧ (a ≠ 0 in the masked network): masking all the rest as well changes
    nothing. Each sparsity gets the e of the first state at which |e| ≤ k. One descent serves all sparsities. Each
    sample has its own, for the class that the original network predicts or its target; a sparsity that it does not
    reach is missing, with the reason.

    On a CPU, at unit granularity, images of float32 and float64 run channels last where the network answers the same
    with them, which takes a fifth less time. As last bits differ, a state at which |e| ≤ k there is run once more in
    the memory format of the input, and taken if |e| ≤ k there too: its e, |e| and Φ are what `network.masked` gives.

    With padding N is the number of the sample's own neurons, and a descent starts from these: the others are masked.

    Diagnostics: of the first W = min(⌈1/share⌉ + 1, 1001) states, `(B, W)`, NaN or −1 after the last one, `responses`
    Φ(x; m ⊙ a), `same_class` (int8: the argmax is the original's; −1 where there are no classes), `effective` |e|/N
    and `remaining` |m|/N; `iterations` `(B,)` int32, how often neurons were removed; `exhausted` `(B,)` bool, whether
    the descent ended because no score but 0 was left. By sparsity, `(B,)` each, −1 or NaN where it is missing:
    `iteration` int32, the number of its state (0: the whole network), `mask_density` |m|/N and `scored` |r|/N there
    with r = m ∧ (s ≠ 0), `dead_share` of e and `dead_share_scored` of r, the share of their neurons that are dead in
    the original network (NaN for an empty one).
    """

    key: ClassVar[str] = "greedy_pruning"
    single: ClassVar[bool] = False
    keeps_scores: ClassVar[bool] = False

    share: float = 0.01

    def __post_init__(self) -> None:
        given: Any = self.share
        number = isinstance(given, Real) and not isinstance(given, bool)
        if not (number and 0 < given < 1 and 0 < float(given) < 1):  # a whole number may be too large for a float
            raise InputError(
                f"greedy_pruning: expected share in (0, 1), the part of all neurons that is removed at a time, found "
                f"{given!r}; for example 0.01"
            )
        object.__setattr__(self, "share", float(given))  # NumPy's floats have another repr

    def select(self, network: Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        """Pathways of the sparsities that are reached, and diagnostics.

        Raises `SampleError` for samples whose scores in the whole network are NaN or infinite, `RestrictionError` in a
        restricted network.
        """
        levels = checked_sparsities(sparsities)
        if network._restriction is not None:
            raise RestrictionError("greedy_pruning: the network is restricted; leave the with block first")
        with kept_memory(), torch.inference_mode(False), torch.no_grad():
            descent = Descent(network, samples, levels, self.share)
            with bar(descent.longest, self.key, "state") as shown:
                for _ in descent:
                    shown.update()
            return descent.selection()


def _prune_on_device(scores: Tensor, count: int) -> Tensor:
    """What `Scan.smallest` finds, for scores |s| `(N,)` on an accelerator."""
    live = int(scores.count_nonzero())
    if live <= count:
        return scores.nonzero().flatten()
    threshold = scores.kthvalue(scores.numel() - live + count).values  # zeros come first
    below = ((scores > 0) & (scores < threshold)).nonzero().flatten()
    tied = (scores == threshold).nonzero().flatten()
    return torch.cat([below, tied[tied.numel() - (count - below.numel()) :]])


@dataclass(frozen=True)
class _Seen:
    """One sample at one state: whether its scores are `finite`, |e| and the places of the neurons that go next.

    `effective` and `scored` give e and r, `(N,)` bool, in the order of the index.
    """

    finite: bool
    size: int
    chosen: Any
    effective: Callable[[], Any]
    scored: Callable[[], Any]


class Descent:
    """The descent of a batch; iterating runs one state after the other until every sample has stopped.

    When it hands out a state, `state` is its number, `mask` `(B, N)` that of the next one, and nothing of the network
    is restricted.
    """

    def __init__(self, network: Network, samples: Any, sparsities: Sequence[float], share: float) -> None:
        index, original = network.index, network.original(samples)
        self.network, self.index, self.sparsities = network, index, sparsities
        self.target = original.target
        self.samples = self.given = replace(network.samples(samples), target=self.target)
        self.prediction = original.prediction
        self.real = network.real(self.given)
        self.weights = index.weights if index.granularity == "channel" else None
        self.on_host = self._selects_on_host()
        self.order: MemoryOrder | None = None  # of the places that rows on the host have; None: that of the index
        self.moved = False
        if self.on_host and self.weights is None:
            ground = Ground.of(network, self.given)
            self.samples, self.moved, self.order = ground.samples, ground.moved, MemoryOrder(index, ground.layouts)
        batch = self.samples.batch
        self.sizes = [index.units] * batch if self.real is None else self.real.sizes  # N of each sample
        self.kept = [[index.kept(sparsity, size) for size in self.sizes] for sparsity in sparsities]
        self.count = [math.ceil(Fraction(exact_sparsity(share)) * size) for size in self.sizes]
        shape = (len(sparsities), batch, index.size)
        self.active: Any = original.active.cpu().numpy() if self.on_host else original.active
        self.masks: Any = np.zeros(shape, dtype=np.bool_) if self.on_host else original.active.new_zeros(shape)
        self.gates = unfilled((batch, index.size), torch.float32, network.device).fill_(1)
        plain = [self.gates[:, site.slice].view(-1, *site.gate_shape) for site in index.sites]
        by_site = plain if self.order is None else self.order.sites(self.gates)
        if self.real is not None and self.weights is None:
            for number, gates in enumerate(by_site):
                gates.copy_(self.real.only(number, gates))
        self.restriction = Restriction(by_site, [None] * len(by_site))
        self.live = np.empty((batch if self.on_host else 0, index.size), dtype=np.bool_)  # a ≠ 0 of the last state
        self.scan: Scan | None = None
        self.largest: dict[int, float | None] = {}  # score that a row's last removal took

        self.state = -1
        self.running = list(range(batch))
        self.stopped: dict[int, str] = {}
        self.remaining, self.effective = np.tile(self.sizes, (2, 1))  # |m| and |e| of the last state
        self.longest = math.ceil(1 / Fraction(exact_sparsity(share))) + 1
        width = min(self.longest, _LONGEST)
        self.series = {name: np.full((batch, width), np.nan) for name in ("responses", "effective", "remaining")}
        self.same_class = np.full((batch, width), -1, dtype=np.int8)
        self.iterations = np.zeros(batch, dtype=np.int32)
        self.iteration = np.full((len(sparsities), batch), -1, dtype=np.int32)
        self.shares = {name: np.full((len(sparsities), batch), np.nan) for name in _SHARES}

    def _selects_on_host(self) -> bool:
        return self.network.device.type == "cpu" or self.weights is not None

    @property
    def mask(self) -> Tensor:
        """m of the next state, `(B, N)` bool."""
        open_gates = self.gates != 0
        if self.order is None:
            return open_gates
        return torch.from_numpy(np.stack([self.order.by_number(row) for row in open_gates.numpy()]))

    def __iter__(self) -> Iterator[Descent]:
        while self.running:
            self.state += 1
            found = self._run()
            while found:  # it holds activations and gradients; none may stay while the next state runs
                self._advance(*found.popitem())
            self._require_finite()
            self.running = [row for row in self.running if row not in self.stopped]
            yield self

    def _run(self) -> dict[int, _Seen]:
        """One forward and backward of the masked network, and what it says of every sample that is still running."""
        with self.network.restricted(self.restriction):
            if self.order is not None:
                run = self.network.gradients(self.samples)
            else:
                products, run = self.network.signed_products(self.samples)
            self._note_answers(run.output, run.response, self.running)
            if self.order is not None:
                return self._seen_on_host(run, self.order)
        nonzero = [value != 0 for value in run.activations]
        if self.real is not None:
            nonzero = [self.real.only(number, value) for number, value in enumerate(nonzero)]
        live = [grouped(value, site) > 0 for site, value in zip(self.index, nonzero, strict=True)]
        scores, effective = products.abs_(), torch.cat(live, dim=1)
        return {row: self._seen(row, scores[row], effective[row]) for row in self.running}

    def _seen(self, row: int, scores: Tensor, live: Tensor) -> _Seen:
        """A sample's scores |s| and a ≠ 0, `(N,)`, on any device and at any granularity."""
        finite = bool(scores.isfinite().all())
        if self.weights is None:
            size, few = int(live.count_nonzero()), _prune_on_device(scores, self.count[row])
            return _Seen(finite, size, few, lambda: live, partial(torch.gt, scores, 0))
        effective, own = live.cpu().numpy(), _array(scores.cpu())
        channels = prune_channels(own, self.count[row], self._weights(row))
        return _Seen(finite, self._units(row, effective), channels, lambda: effective, partial(np.greater, own, 0))

    def _require_finite(self) -> None:
        """Raise `SampleError` where the first state, the whole network, has scores that are no numbers."""
        bad = sorted(row for row, why in self.stopped.items() if why == _NOT_FINITE) if self.state == 0 else []
        if bad:
            raise SampleError(
                f"greedy_pruning: the scores of sample {', '.join(map(str, bad[:5]))} of the batch are NaN or "
                "infinite; the network overflows on it. Try float32 or float64, or leave the sample out",
                bad,
                ["the scores of greedy_pruning are NaN or infinite"] * len(bad),
            )

    def _seen_on_host(self, run: Pass, order: MemoryOrder) -> dict[int, _Seen]:
        values, slopes = (
            [_array(each) for each in order.rows(tensors)] for tensors in (run.activations, run.gradients)
        )
        if self.scan is None:
            numbers = None if order.plain else lambda places: order.numbers[places]
            self.scan = Scan([site.neurons for site in self.index], np.result_type(*values, *slopes), numbers)
        found = {}
        for row in self.running:
            own, ways, live = [value[row] for value in values], [slope[row] for slope in slopes], self.live[row]
            chosen, self.largest[row] = self.scan.smallest(own, ways, self.count[row], live, self.largest.get(row))
            found[row] = _Seen(
                self.scan.finite,
                int(np.count_nonzero(live)),
                chosen,
                partial(order.by_number, live),
                partial(_scored, own, ways, order),
            )
        near = [row for row, seen in found.items() if seen.finite and self._reached(row, seen.size)]
        return found | self._as_given({row: found[row] for row in near}) if near and self.moved else found

    def _as_given(self, seen: Mapping[int, _Seen]) -> dict[int, _Seen]:
        """What samples are at this state in the memory format that they were given in.

        There a neuron whose input is within rounding of 0 may be on the other side of it; e has to answer there.
        """
        gates = Gates(self.index, self.restriction, keep=True)
        with torch.no_grad():
            output = self.network._run(self.given, gates)
            response = respond(self.network.response, output, self.target, self.given.batch)
        self._note_answers(output, response, list(seen))
        nonzero = [flat(gates.seen[number] != 0, site) for number, site in enumerate(self.index.sites)]
        found = {}
        for row, other in seen.items():
            live = torch.cat([block[row] for block in nonzero]).numpy()
            found[row] = replace(other, size=int(np.count_nonzero(live)), effective=partial(np.asarray, live))
        return found

    def _note_answers(self, output: Any, response: Tensor, rows: Sequence[int]) -> None:
        if self.state >= self.same_class.shape[1]:
            return
        self.series["responses"][rows, self.state] = response.double().cpu().numpy()[rows]
        logits = self.network.response.logits(output)
        if logits is not None and self.prediction is not None:
            self.same_class[rows, self.state] = torch.eq(logits.argmax(dim=1), self.prediction).cpu().numpy()[rows]

    def _reached(self, row: int, size: int) -> list[int]:
        """Places of the sparsities that a sample reaches now."""
        return [place for place, kept in enumerate(self.kept) if size <= kept[row] and self.iteration[place, row] < 0]

    def _advance(self, row: int, seen: _Seen) -> None:
        """Note what a sample's state is, then remove the chosen neurons or stop."""
        if not seen.finite:
            self.stopped[row] = _NOT_FINITE
            return
        self.effective[row] = seen.size
        if self.state < self.same_class.shape[1]:
            self.series["effective"][row, self.state] = seen.size / self.sizes[row]
            self.series["remaining"][row, self.state] = self.remaining[row] / self.sizes[row]
        for place in self._reached(row, seen.size):
            self._note_reached(place, row, seen.effective(), seen.scored())
        if bool((self.iteration[:, row] >= 0).all()):
            self.stopped[row] = _REACHED
        elif not len(seen.chosen):
            self.stopped[row] = _EXHAUSTED
        else:
            self._remove(row, seen.chosen)
            self.iterations[row] += 1

    def _remove(self, row: int, chosen: Any) -> None:
        self.remaining[row] -= len(chosen) if self.weights is None else self._weights(row)[chosen].sum()
        if self.gates.device.type == "cpu":
            self.gates[row].numpy()[chosen] = 0
        else:
            self.gates[row, torch.as_tensor(chosen, device=self.gates.device)] = 0

    def _note_reached(self, place: int, row: int, effective: Any, scored: Any) -> None:
        self.masks[place, row] = effective
        self.iteration[place, row] = self.state
        self.shares["mask_density"][place, row] = self.remaining[row] / self.sizes[row]
        self.shares["scored"][place, row] = self._units(row, scored) / self.sizes[row]
        for name, neurons in (("dead_share", effective), ("dead_share_scored", scored)):
            if count := int(neurons.sum()):
                self.shares[name][place, row] = int((neurons & ~self.active[row]).sum()) / count

    def _weights(self, row: int) -> Any:
        """How many units of a sample each channel stands for."""
        return self.weights if self.real is None else self.real.weights(row)

    def _units(self, row: int, neurons: Any) -> int:
        """How many scalar units a bool row of a sample stands for."""
        if self.weights is not None:
            return int(self._weights(row)[neurons].sum())
        return int(neurons.count_nonzero() if isinstance(neurons, Tensor) else np.count_nonzero(neurons))

    def selection(self) -> Selection:
        """What the finished descent found."""
        device, batch = self.gates.device, self.samples.batch
        masks = torch.as_tensor(self.masks).to(device)
        pathways: dict[float | None, Pathways] = {}
        missing: dict[float | None, str | Sequence[str]] = {}
        by_sparsity: dict[float | None, dict[str, Tensor]] = {}
        for place, sparsity in enumerate(self.sparsities):
            reached = self.iteration[place] >= 0
            if reached.any():
                pathways[sparsity] = Pathways(masks[place], self.index, self.real)
            if not reached.all():
                missing[sparsity] = ["" if reached[row] else self._reason(row, sparsity) for row in range(batch)]
            shares = {name: each[place] for name, each in self.shares.items()}
            by_sparsity[sparsity] = _tensors({"iteration": self.iteration[place], **shares}, device)
        exhausted = np.array([self.stopped[row] == _EXHAUSTED for row in range(batch)])
        ends: dict[str, npt.NDArray[Any]] = {
            "same_class": self.same_class,
            "iterations": self.iterations,
            "exhausted": exhausted,
        }
        return Selection(pathways, _tensors(self.series | ends, device), missing, by_sparsity=by_sparsity)

    def _reason(self, row: int, sparsity: float) -> str:
        """Why a sample did not reach a sparsity."""
        removals = int(self.iterations[row])
        if self.stopped[row] == _NOT_FINITE:
            why, verb = f"scores became NaN or infinite when neurons had been removed {removals} times", "was"
        elif removals:
            why, verb = "no neuron with a non-zero score is left", "stays at"
        else:
            why, verb = "no neuron has a non-zero score: the response has no gradient where a ≠ 0", "stays at"
        share = self.effective[row] / self.sizes[row]
        return f"greedy pruning: {why}; |e| {verb} {share:.4f} of N, {1 - exact_sparsity(sparsity)} was asked for"


def _scored(values: Sequence[Any], slopes: Sequence[Any], order: MemoryOrder) -> Any:
    """Which scores are not 0, `(N,)` in the order of the index; rows in that of memory."""
    with np.errstate(all="ignore"):
        return order.by_number(np.concatenate([a * slope != 0 for a, slope in zip(values, slopes, strict=True)]))


def _array(values: Tensor) -> npt.NDArray[Any]:
    """A tensor on the host as NumPy's array; NumPy has no bfloat16 and is slow with float16."""
    return (values.float() if values.element_size() < 4 else values).numpy()


def _tensors(columns: Mapping[str, npt.NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column).to(device) for name, column in columns.items()}
