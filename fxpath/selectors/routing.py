"""Distillation-guided routing: gates on the neurons, learned so that few are open and the answer stays (DGR)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, RestrictionError, unknown
from ..keys import PathwayKey, checked_sparsities, type_of_parameter
from ..memory import kept_memory
from ..neurons import NeuronIndex
from ..padding import RealNeurons
from ..pathways import Pathways, Scores, Selection
from ..ranks import rank_correlation
from .baselines import draw_for, generator_of
from .descent import LARGEST, Descent, Reference, Schedule, descend
from .ground import Ground
from .registry import register

if TYPE_CHECKING:
    from ..network import Network

PRESETS: dict[str, dict[str, type_of_parameter]] = {
    "paper": {"lr": 0.01, "momentum": 0.9, "gamma": 0.01, "iterations": 1000, "per_channel": False},
    "wang2018": {"lr": 0.1, "momentum": 0.9, "gamma": 0.05, "iterations": 30, "per_channel": True},
}
_OWN = "custom"
_NEGLIGIBLE = 0.05  # a penalty that moves no gate further than this is as good as none


@dataclass(frozen=True, eq=False)
class Routing:
    """What DGR found before any cut.

    `gates` `(B, G)` those of the kept iterate (NaN where there is none), `touched` `(B, G)` bool which of them have
    evidence, `start` `(B, G)` the initial ones, all in the order of `index` (of channels with `per_channel`).
    `diagnostics` as `DGR` says; `reasons` has a sentence for each sample without a pathway, "" for the others.
    """

    gates: Tensor
    touched: Tensor
    start: Tensor
    index: NeuronIndex
    diagnostics: dict[str, Tensor]
    reasons: tuple[str, ...]


@register
@dataclass(frozen=True, init=False)
class DGR:
    """Distillation-guided routing (the paper's Eq. 3): gates λ ≥ 0 on the activations, learned for each sample.

    CE(p, p_gated) + γ·Σλ is minimised by SGD with momentum over gates in [0, 100], clamped after each step, from `init`
    on: a constant, or "r" for U(0, 1) seeded by (seed, sample id). n iterations are n steps and n + 1 iterates; kept
    is the first iterate of the lowest total loss among those whose argmax is the original network's, the initial gates
    included. Under "r", while none is, γ is divided by 10 and the descent starts again from the same initial gates,
    until the penalty alone moves no gate by 0.05 any more (with the paper's numbers twice). p is the original
    network's whole distribution, so a target changes nothing. For a response without classes the loss is
    (Φ − Φ_gated)²/Φ² + γ·Σλ, and |Φ − Φ_gated| ≤ tolerance·|Φ| takes the argmax's place.

    The pathway of a sparsity holds the k largest gates; ties go to the smaller index. A gate whose gradient of the
    first term was 0 at every iterate before the kept one has no evidence for it and is never taken, nor is one that is
    0: pathways may be smaller than asked. With `per_channel` there is one gate a channel; channels are taken whole,
    largest first, until the next no longer fits into k units. A sample without such an iterate or such gates has no
    pathway; `selection.missing` says why.

    Gates at padding tokens stay 0 and are none of the sample's, so that k and Σλ count the others.

    Presets: "paper" (the default) and "wang2018": one gate a channel, lr 0.1, γ 0.05, 30 iterations. Other numbers make
    the preset "custom"; a name beside numbers that are not its own is an `InputError`.

    Gates are of the activations' type, of float32 at least. What a sample gets does not depend on its neighbours: all
    stay in the batch until the last one is done.

    Diagnostics, `(B,)` unless said: `ce` and `l1` = γ·Σλ `(B, iterations + 1)` float32, of the last descent; `iterate`
    int32, the kept one's number (−1: none); `keeps_class` bool, whether there is one; `gamma` float64 and `restarts`
    int32; `untouched` float64, the share of gates without evidence; `spearman` float64, rank correlation of the kept
    with the initial gates (NaN where either are all equal). By sparsity `chance_jaccard` d/(2 − d) float64, the overlap
    to expect of random pathways of this density d.
    """

    key: ClassVar[str] = "dgr"
    single: ClassVar[bool] = False

    preset: str = "paper"
    init: float | str = 1.0
    seed: int = 0
    lr: float = 0.01
    momentum: float = 0.9
    gamma: float = 0.01
    iterations: int = 1000
    per_channel: bool = False
    tolerance: float = 0.1

    def __init__(
        self,
        *,
        preset: str | None = None,
        init: float | str = 1.0,
        seed: int = 0,
        lr: float | None = None,
        momentum: float | None = None,
        gamma: float | None = None,
        iterations: int | None = None,
        per_channel: bool | None = None,
        tolerance: float = 0.1,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "gamma": gamma, "iterations": iterations, "per_channel": per_channel}
        numbers = _checked({name: value for name, value in given.items() if value is not None})
        values: dict[str, Any] = _resolved(preset, numbers)
        values |= {"init": _checked_init(init)} | _checked({"seed": seed, "tolerance": tolerance})
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def implied(self) -> Mapping[str, type_of_parameter]:
        """Values of parameters that follow from the others: a preset's numbers, or that they are no preset's."""
        return PRESETS.get(self.preset, {"preset": _OWN})

    @property
    def keeps_scores(self) -> bool:
        """Gates are scores that a pathway can be cut from, unless channels among units must not be split."""
        return not self.per_channel

    def select(self, network: Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        """Pathways of the largest gates; `scores` are the gates, 0 where there is no evidence for one."""
        sparsities = checked_sparsities(sparsities)
        found, real = self.optimise(network, samples), network.real(samples)
        gates = found.gates.masked_fill(~found.touched, 0)
        routes = Scores(gates, found.index, key=self.key, real=_of_gates(real, found.index))
        masks = [_by_neuron(each.mask, found.index, network.index, real) for each in routes.threshold(sparsities)]
        closed = (routes.signed.amax(dim=1) == 0).tolist()
        pathways: dict[float | None, Pathways] = {}
        missing: dict[float | None, str | Sequence[str]] = {}
        by_sparsity: dict[float | None, dict[str, Tensor]] = {}
        for sparsity, mask in zip(sparsities, masks, strict=True):
            pathways[sparsity] = own = Pathways(mask, network.index, real)
            kept = [network.index.kept(sparsity)] * len(mask) if real is None else real.kept(sparsity)
            empty = (own.count == 0).tolist()
            reasons = [
                reason or (_why_empty(shut, count) if none and count else "")
                for reason, shut, none, count in zip(found.reasons, closed, empty, kept, strict=True)
            ]
            lacking = torch.tensor([bool(reason) for reason in reasons], device=mask.device)
            chance = own.density / (2 - own.density)
            by_sparsity[sparsity] = {"chance_jaccard": chance.masked_fill(lacking, torch.nan)}
            if any(reasons):
                missing[sparsity] = reasons
        signed = _by_neuron(routes.signed, found.index, network.index, real)
        scores = Scores(signed, network.index, key=self.key, real=real)
        return Selection(pathways, found.diagnostics, missing, scores, by_sparsity)

    def optimise(self, network: Network, samples: Any, init: Tensor | None = None) -> Routing:
        """The gates themselves, before any cut. `init` `(B, G)` or `(G,)` in [0, 100] takes the place of `self.init`.

        Raises `RestrictionError` in a restricted network, `InputError` for initial gates that do not fit.
        """
        if network._restriction is not None:
            raise RestrictionError("dgr: the network is restricted; leave the with block first")
        index = _channels(network.index) if self.per_channel else network.index
        samples = network.samples(samples)
        given = None if init is None else _checked_start(init, (samples.batch, index.size))
        original, real = network.original(samples), _of_gates(network.real(samples), index)
        with kept_memory(), torch.inference_mode(False):
            ground = Ground.of(network, samples)
            reference = Reference.of(network, ground.output, original.target, samples.batch, self.tolerance)
            kind = reduce(torch.promote_types, (layout.dtype for layout in ground.layouts), torch.float32)
            start = torch.empty((samples.batch, index.size), dtype=kind, device=samples.device)
            self._begin(start, samples.names, given, real)
            found, gamma, restarts = self._descend(network, ground, index, start, reference, real)
        sizes = max(index.size, 1) if real is None else real.neurons.sum(dim=1)
        diagnostics = {
            "ce": found.divergence,
            "l1": found.l1,
            "iterate": found.iterate,
            "keeps_class": found.iterate >= 0,
            "gamma": gamma,
            "restarts": restarts,
            "untouched": 1 - found.touched.sum(dim=1, dtype=torch.float64) / sizes,
            "spearman": _correlation(start, found.gates, real),
        }
        return Routing(found.gates, found.touched, start, index, diagnostics, self._reasons(found, reference))

    def _begin(self, start: Tensor, names: Sequence[int | str], given: Tensor | None, real: RealNeurons | None) -> None:
        """Fill `start` `(B, G)` with the initial gates, 0 at padding tokens."""
        if given is not None:
            start.copy_(given)
        elif not isinstance(self.init, str):
            start.fill_(self.init)
        else:
            for number, (row, name) in enumerate(zip(start, names, strict=True)):
                draws = np.empty(len(row))
                draw_for(generator_of(self.seed, name), draws, None if real is None else real.take([number]))
                row.copy_(torch.from_numpy(draws))
        if real is not None:
            start.masked_fill_(~real.mask, 0)

    def _descend(
        self,
        network: Network,
        ground: Ground,
        index: NeuronIndex,
        start: Tensor,
        reference: Reference,
        real: RealNeurons | None,
    ) -> tuple[Descent, Tensor, Tensor]:
        """The last descent of each sample, its γ and how often it has started again."""
        gamma = torch.full((len(start),), self.gamma, dtype=torch.float64, device=start.device)
        restarts = torch.zeros(len(start), dtype=torch.int32, device=start.device)
        schedule = Schedule(self.lr, self.momentum, self.gamma, self.iterations)
        found = descend(network, ground, index, start, reference, schedule, real)
        hopeful = reference.defined & torch.isfinite(found.divergence[:, 0])
        while self.init == "r" and schedule.pull >= _NEGLIGIBLE:
            again = hopeful & (found.iterate < 0)
            if not bool(again.any()):
                break
            restarts[again] += 1
            schedule = replace(schedule, gamma=self.gamma / 10 ** int(restarts.max()))
            gamma[again] = schedule.gamma
            now = descend(network, ground, index, start, reference, schedule, real)
            found = found.replaced(again, now)
        return found, gamma, restarts

    def _reasons(self, found: Descent, reference: Reference) -> tuple[str, ...]:
        """Why each sample has no pathway, "" where it has one."""
        kept = "the class" if reference.prediction is not None else f"the response within {self.tolerance:.0%}"
        reasons = []
        columns = (reference.defined, torch.isfinite(found.divergence[:, 0]), found.iterate, found.touched.any(dim=1))
        for defined, finite, iterate, touched in zip(*(column.tolist() for column in columns), strict=True):
            if not defined:
                reasons.append("the response of the original network is 0, and the loss is relative to it")
            elif not finite:
                reasons.append("the loss of the initial gates is NaN or infinite")
            elif iterate < 0:
                reasons.append(f"no iterate kept {kept}")
            elif not touched and iterate == 0:
                reasons.append("no iterate was better than the initial gates, so that no gate has evidence for it")
            elif not touched:
                reasons.append("the loss had no gradient at any gate, so that no gate has evidence for it")
            else:
                reasons.append("")
        return tuple(reasons)


def _why_empty(closed: bool, kept: int) -> str:
    """Why no gate is kept of a sample that has an iterate and evidence."""
    if closed:
        return "every gate that has evidence is 0"
    return f"the channel with the largest gate has more than the {kept} units that this sparsity keeps"


def _channels(index: NeuronIndex) -> NeuronIndex:
    """One gate a channel of every site."""
    if index.granularity == "channel":
        return index
    return NeuronIndex.build(
        [(site.name, site.op, site.shape) for site in index.sites],
        axes=[site.axis for site in index.sites],
        folds=[site.fold for site in index.sites],
        granularity="channel",
    )


def _of_gates(real: RealNeurons | None, index: NeuronIndex) -> RealNeurons | None:
    """What is real of gates, which may be channels where neurons are units."""
    return None if real is None else replace(real, index=index)


def _correlation(start: Tensor, gates: Tensor, real: RealNeurons | None) -> Tensor:
    """Rank correlation of the gates with what they were, of real ones, `(B,)`."""
    if real is None:
        return rank_correlation(start, gates)
    rows = zip(start, gates, real.mask, strict=True)
    return torch.cat([rank_correlation(one[own][None], other[own][None]) for one, other, own in rows])


def _by_neuron(rows: Tensor, gates: NeuronIndex, index: NeuronIndex, real: RealNeurons | None) -> Tensor:
    """Rows of gates `(B, G)` → rows of neurons `(B, N)`: every unit has what its channel has, 0 at padding tokens."""
    if gates is index:
        return rows
    blocks = [
        rows[:, gate.slice].view(-1, *gate.gate_shape).expand(-1, *site.shape).reshape(len(rows), -1)
        for gate, site in zip(gates.sites, index.sites, strict=True)
    ]
    found = torch.cat(blocks, dim=1)
    return found if real is None else found.masked_fill(~real.mask, 0)


def _resolved(preset: str | None, numbers: Mapping[str, type_of_parameter]) -> dict[str, type_of_parameter]:
    """Every number, and the name of the preset whose numbers they are, or "custom"."""
    if preset not in (None, _OWN, *PRESETS):
        raise InputError("dgr: " + unknown("preset", str(preset), [*PRESETS, _OWN]))
    own = PRESETS.get(preset or "", {})
    other = next((name for name, value in numbers.items() if own.get(name, value) != value), None)
    found = PRESETS["paper"] | own | dict(numbers)
    if other is not None:
        changed = {name: value for name, value in found.items() if value != PRESETS["paper"][name]}
        raise InputError(
            f"dgr: the preset {preset!r} has {other}={own[other]}, found {other}={numbers[other]}; a descent of other "
            f"numbers does not carry its name. Leave the preset out: {PathwayKey('dgr', changed)}"
        )
    return found | {"preset": next((name for name, values in PRESETS.items() if values == found), _OWN)}


_WANTED: dict[str, tuple[str, Callable[[Any], type_of_parameter], Callable[[Any], bool]]] = {
    "lr": ("a number above 0", float, lambda value: 0 < value < math.inf),
    "momentum": ("a number in [0, 1)", float, lambda value: 0 <= value < 1),
    "gamma": ("a number of at least 0", float, lambda value: 0 <= value < math.inf),
    "iterations": ("a whole number of at least 1", int, lambda value: value >= 1),
    "per_channel": ("True or False", bool, lambda value: value in (True, False)),
    "seed": ("a whole number", int, lambda value: value == value),
    "tolerance": ("a number of at least 0", float, lambda value: 0 <= value < math.inf),
}
_KINDS: dict[Any, type] = {float: Real, int: Integral, bool: bool}  # NumPy's numbers count as well


def _checked(given: Mapping[str, Any]) -> dict[str, type_of_parameter]:
    """Parameters as plain Python values; raises `InputError` for one that is out of its range."""
    found: dict[str, type_of_parameter] = {}
    for name, value in given.items():
        said, kind, fits = _WANTED[name]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, _KINDS[kind]) or not fits(value):
            raise InputError(f"dgr: expected {name} to be {said}, found {value!r}")
        found[name] = kind(value)
    return found


def _checked_init(init: float | str) -> float | str:
    if isinstance(init, str) and init == "r":
        return init
    number: Any = init
    if isinstance(number, bool) or not isinstance(number, Real) or not 0 <= float(number) <= LARGEST:
        raise InputError(f"dgr: expected init to be a number in [0, 100], or 'r' for U(0, 1), found {init!r}")
    return float(number)


def _checked_start(init: Tensor, shape: tuple[int, int]) -> Tensor:
    """Initial gates that fit `(B, G)`, or an `InputError`."""
    if not isinstance(init, Tensor) or tuple(init.shape) not in (shape, shape[1:]):
        found = tuple(init.shape) if isinstance(init, Tensor) else type(init).__name__
        raise InputError(f"dgr: expected init to be a tensor {shape} or {shape[1:]}, one number a gate, found {found}")
    outside = torch.nonzero(~((init >= 0) & (init <= LARGEST)))
    if len(outside):
        place = tuple(outside[0].tolist())
        raise InputError(f"dgr: expected initial gates in [0, 100], found {float(init[place])} at {place}")
    return init.detach()
