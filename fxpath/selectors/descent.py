"""Gradient descent on the gates of a network: what DGR minimises, and the loop that does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gates import Gates, Restriction
from ..neurons import NeuronIndex, Site
from ..padding import RealNeurons
from ..progress import bar
from ..responses import respond
from .ground import Ground

if TYPE_CHECKING:
    from ..network import Network

LARGEST = 100.0  # gates stay in [0, LARGEST]


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum, and the weight γ of Σλ."""

    lr: float
    momentum: float
    gamma: float
    iterations: int

    @property
    def pull(self) -> float:
        """How far the penalty alone moves a gate, at most."""
        return self.lr * self.gamma * self.iterations / (1 - self.momentum)


@dataclass(frozen=True, eq=False)
class Reference:
    """What the original network says of samples, and how far a gated network is from it.

    `probabilities` `(B, classes)` and `prediction` `(B,)` for a response with classes; `response` `(B,)` for any.
    """

    network: Network
    target: Tensor | None
    response: Tensor
    probabilities: Tensor | None
    prediction: Tensor | None
    tolerance: float

    @classmethod
    def of(cls, network: Network, output: Any, target: Tensor | None, batch: int, tolerance: float) -> Reference:
        """The reference that an output of the original network gives."""
        logits = network.response.logits(output)
        response = _wide(respond(network.response, output, target, batch))
        if logits is None:
            return cls(network, target, response, None, None, tolerance)
        return cls(network, target, response, _wide(logits).softmax(dim=1), logits.argmax(dim=1), tolerance)

    @property
    def defined(self) -> Tensor:
        """Where there is a loss, `(B,)` bool: without classes Φ must not be 0."""
        return torch.ones_like(self.response, dtype=torch.bool) if self.prediction is not None else self.response != 0

    def __call__(self, output: Any) -> tuple[Tensor, Tensor]:
        """The divergence `(B,)`, differentiable, and whether the output keeps the class `(B,)` bool.

        −Σ p·log p_gated with classes; else (Φ − Φ_gated)²/Φ², and |Φ − Φ_gated| ≤ tolerance·|Φ|.
        """
        logits = self.network.response.logits(output)
        if logits is None or self.probabilities is None or self.prediction is None:
            value = _wide(respond(self.network.response, output, self.target, len(self.response)))
            error = (value - self.response) / torch.where(self.defined, self.response, torch.ones_like(self.response))
            return error.square(), (error.abs() <= self.tolerance) & self.defined
        logs = _wide(logits).log_softmax(dim=1).masked_fill(self.probabilities == 0, 0)  # 0 · log 0 is 0
        return -(self.probabilities * logs).sum(dim=1), logits.argmax(dim=1) == self.prediction


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class Descent:
    """What a descent found.

    `gates` `(B, G)`: those of the lowest total loss that keep the class, NaN where none do; `touched` `(B, G)` bool:
    the gradient of the divergence was not 0 at some iterate before the kept one, so that it has shaped the gate;
    `iterate` `(B,)` int32: the kept one's number, −1 for none; `divergence` and `l1` = γΣλ `(B, iterations + 1)`
    float32, NaN from where a sample's loss is no number any more.
    """

    gates: Tensor
    touched: Tensor
    iterate: Tensor
    divergence: Tensor
    l1: Tensor

    def replaced(self, rows: Tensor, other: Descent) -> Descent:
        """The samples where `rows` `(B,)` is True from another descent."""

        def chosen(name: str) -> Tensor:
            mine: Tensor = getattr(self, name)
            return torch.where(rows.view(-1, *[1] * (mine.ndim - 1)), getattr(other, name), mine)

        return Descent(*(chosen(field.name) for field in fields(self)))


class _State:
    """One tensor a site, in the memory format of its activation: gates, momentum, marks, and the best so far."""

    def __init__(self, index: NeuronIndex, start: Tensor, layouts: Sequence[Tensor]) -> None:
        self.gates = [_placed(start, site, like) for site, like in zip(index.sites, layouts, strict=True)]
        self.velocity = [torch.zeros_like(gate) for gate in self.gates]
        self.touched = [torch.zeros_like(gate, dtype=torch.bool) for gate in self.gates]
        self.best = [torch.full_like(gate, torch.nan) for gate in self.gates]
        self.evidence = [torch.zeros_like(mark) for mark in self.touched]
        for gate in self.gates:
            gate.requires_grad_()

    def total(self) -> Tensor:
        """Σλ of each sample, `(B,)` float64."""
        sums = [gate.sum(dim=tuple(range(1, gate.ndim))) if gate.ndim > 1 else gate for gate in self.gates]
        return torch.stack([each.to(torch.float64) for each in sums]).sum(dim=0)

    def keep(self, rows: Sequence[int]) -> None:
        """Note the gates of these samples as the best so far."""
        for best, now in ((self.best, self.gates), (self.evidence, self.touched)):
            for target, source in zip(best, now, strict=True):
                if len(rows) == len(source):
                    target.copy_(source)
                    continue
                for row in rows:
                    target[row].copy_(source[row])

    def step(self, slopes: Sequence[Tensor | None], schedule: Schedule) -> None:
        """One step of SGD on slopes + γ, clamped; clamping leaves the velocity."""
        for gate, velocity, mark, slope in zip(self.gates, self.velocity, self.touched, slopes, strict=True):
            if slope is None:
                velocity.mul_(schedule.momentum)
            else:
                torch.add(slope, velocity, alpha=schedule.momentum, out=velocity)
                mark.bitwise_or_(slope.to(torch.bool))
            velocity.add_(schedule.gamma)
            gate.add_(velocity, alpha=-schedule.lr).clamp_(0, LARGEST)

    @staticmethod
    def rows(tensors: Sequence[Tensor]) -> Tensor:
        """One row a sample, `(B, G)`, in the order of the index."""
        return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)


def _placed(start: Tensor, site: Site, like: Tensor) -> Tensor:
    values = start[:, site.slice].reshape(-1, *site.gate_shape)
    kind = torch.promote_types(like.dtype, torch.float32)
    if values.shape == like.shape:
        return torch.empty_like(like, dtype=kind, device=start.device).copy_(values)
    return values.to(kind, copy=True)


def descend(
    network: Network,
    ground: Ground,
    index: NeuronIndex,
    start: Tensor,
    reference: Reference,
    schedule: Schedule,
    real: RealNeurons | None = None,
) -> Descent:
    """Minimise divergence + γΣλ over the gates of `index`, each sample's on its own, from `start` `(B, G)`.

    n iterations are n steps; the gates before the first and after each are evaluated, n + 1 iterates. Of those that
    keep the class the first of the lowest total loss is kept. Gates that are not `real` start at 0 and stay there.
    """
    batch = ground.samples.batch
    with torch.inference_mode(False), torch.enable_grad():
        state = _State(index, start, ground.layouts)
        inputs = ground.samples.map(torch.detach)
        device = start.device
        curves = torch.full((2, batch, schedule.iterations + 1), torch.nan, dtype=torch.float32, device=device)
        lowest = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
        kept = torch.full((batch,), -1, dtype=torch.int32, device=device)
        alive = torch.ones(batch, dtype=torch.bool, device=device)
        for number in _counted(schedule.iterations + 1):
            last = number == schedule.iterations
            with torch.set_grad_enabled(not last):
                gates = Gates(network.index, Restriction(state.gates, [None] * len(state.gates)))
                divergence, keeps = reference(network._run(inputs, gates))
            slopes: Sequence[Tensor | None] = [None] * len(state.gates)
            if divergence.requires_grad:
                slopes = torch.autograd.grad(divergence.sum(), state.gates, allow_unused=True)
                if real is not None and index.granularity == "unit":
                    slopes = [s if s is None else real.only(number, s) for number, s in enumerate(slopes)]
            with torch.no_grad():
                now, l1 = divergence.detach().to(torch.float64), schedule.gamma * state.total()
                alive &= torch.isfinite(now + l1)
                curves[0, :, number] = torch.where(alive, now, torch.nan)
                curves[1, :, number] = torch.where(alive, l1, torch.nan)
                better = keeps & alive & (now + l1 < lowest)
                lowest = torch.where(better, now + l1, lowest)
                kept = torch.where(better, number, kept)
                state.keep(torch.nonzero(better).flatten().tolist())
                if last or not bool(alive.any()):
                    break
                state.step(slopes, schedule)
        return Descent(state.rows(state.best), state.rows(state.evidence), kept.to(torch.int32), curves[0], curves[1])


def _counted(count: int) -> Iterator[int]:
    with bar(count, "dgr", "iterate") as shown:
        for number in range(count):
            yield number
            shown.update()
