"""Runs of what follows one site: many values of the site at once, as copies of the batch along its first axis.

`SiteRuns.responses` answers any values of the site; `SiteRuns.slopes` the gradients along the straight path α·a. Both
run the graph behind the site alone. Whether copies may be stacked is tried once a network and site: where a batch size
is part of the graph, or the first axis is not the batch everywhere, they would mix, and one copy is run at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .gates import Gates, Restriction
from .responses import Logit, respond
from .rewriting import Cut
from .samples import Samples
from .suffixes import before, outside, parts_of
from .tracing import plain_attention

if TYPE_CHECKING:
    from .network import Network

SINGLY, REPEATED, RERUN = 0, 1, 2  # one copy at a time; tensors that are read from outside repeated; or all anew
_BLOCK = 16  # rows of a last layer that are computed at a time, alike
WHOLE, TAIL = 0, 1  # from the site itself, or from the last values that are affine in α


class SiteRuns:
    """What follows one site, on cached inputs.

    `samples` have their target resolved; a run holds at most `copies` copies of them. `activation` is the site's value
    a, `leads` whether any way goes from the site to the output. `classes`: how many logits the output has; where the
    response is one of them, the last layer gives no others.
    """

    def __init__(
        self,
        network: Network,
        number: int,
        samples: Samples,
        target: Tensor | None,
        copies: int,
        classes: int | None = None,
    ) -> None:
        self.network, self.number = network, number
        self.samples, self.target = samples, target
        response = network.response
        single = type(response) is Logit and response.output is None and target is not None
        self._parts = parts_of(network, number, classes if single else None)
        self._wanted = None
        with torch.inference_mode(False):
            if self._parts.narrow and target is not None:
                self._wanted, self.target = _padded(target), torch.arange(samples.batch, device=samples.device)
            activation, values = before(network, self._parts, samples, self._wanted)
            self.activation = _laid_out(activation)
            self._outside = {name: _laid_out(value) for name, value in values.items()}
        self.leads = self._parts.leads
        self._repeated: tuple[tuple[int, int], dict[str, Any]] = (1, REPEATED), self._outside
        self._gates: tuple[int, Gates | None] = 0, None
        self._asked = max(copies, 1)
        self._heads: tuple[list[Tensor], list[Tensor], Tensor] | None = None

    # --- what a run needs ---

    def _read(self, part: Cut, copies: int, mode: int) -> list[Any]:
        """What a sub-graph reads from outside, for so many copies of the batch."""
        if copies == 1:
            return self._parts.read_by(part, self._outside)
        if self._repeated[0] != (copies, mode):
            parts, values = self._parts, self._outside
            varying = [name for name in values if name not in parts.fixed]
            anew = [name for name in varying if mode == RERUN or not isinstance(values[name], Tensor)]
            found = {name: _repeated(value, copies) if name in varying else value for name, value in values.items()}
            if anew:  # among them numbers, which may be batch sizes
                samples = self.samples.take(list(range(self.samples.batch)) * copies)
                more = outside(self.network, parts, tuple(anew), samples, self._wanted)
                found |= {name: _laid_out(value) for name, value in more.items()}
            self._repeated = (copies, mode), found
        return self._parts.read_by(part, self._repeated[1])

    def _gates_for(self, copies: int) -> Gates | None:
        restriction = self.network._restriction
        if restriction is None:
            return None
        if self._gates[0] != copies:
            later = range(len(self.network.index))

            def repeated(given: Sequence[Tensor | None]) -> list[Tensor | None]:
                return [
                    None if value is None or number <= self.number else _repeated(value, copies, single=True)
                    for number, value in zip(later, given, strict=True)
                ]

            made = Restriction(repeated(restriction.scale), repeated(restriction.shift), restriction.inverted)
            self._gates = copies, Gates(self.network.index, made)
        return self._gates[1]

    def _answer(self, part: Cut, starts: Sequence[Tensor], copies: int, mode: int) -> tuple[Tensor, Any]:
        """Φ of copies of the batch, `(copies · B,)`, and the output."""
        with plain_attention():
            output = part.module.forward(*starts, *self._read(part, copies, mode), self._gates_for(copies))
        output = self.network.traced.unbind(output)
        target = None if self.target is None else self.target.repeat(copies)
        return respond(self.network.response, output, target, copies * self.samples.batch), output

    # --- whether copies may be stacked ---

    def _way(self, kind: int) -> tuple[int, int]:
        """From where runs start, `WHOLE` or `TAIL`, and how they are stacked; found by a trial, once a batch size.

        Where the response does not depend on α a trial tells nothing, and it is tried again with the next batch.
        """
        most, found = min(self._asked, 2), self._parts.found
        key = kind, most, self.samples.batch
        if key in found:
            return found[key]
        with torch.inference_mode(False), torch.no_grad():
            alone = [self._answers(self._parts.whole, [self.activation * factor], 1, SINGLY) for factor in (1.0, 0.5)]
            if self.leads and all(map(_close, *alone)):
                return WHOLE, SINGLY
            wanted = [TAIL, WHOLE] if kind == TAIL and self._parts.tail is not None else [WHOLE]
            modes = [] if most == 1 else [REPEATED, RERUN] if self._outside else [REPEATED]
            ways = [(start, mode) for start in wanted for mode in modes] + [(start, SINGLY) for start in wanted]
            found[key] = next(way for way in ways if way == (WHOLE, SINGLY) or self._sound(way, alone))
        return found[key]

    def _sound(self, way: tuple[int, int], alone: list[list[Tensor]]) -> bool:
        """Whether copies at α = 1 and 0.5 answer as they do `alone`, from where this way starts and as it stacks."""
        start, mode = way
        stacks = [[1.0], [0.5]] if mode == SINGLY else [[1.0, 0.5]]
        found = []
        try:
            for factors in stacks:
                starts = self._stack(start, torch.tensor(factors))
                found.append(self._answers(self._part(start), starts, len(factors), mode))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a graph may fail in any way on a batch size that it is not made for
            return False
        joined = [[torch.cat(answers) for answers in zip(*each, strict=True)] for each in (found, alone)]
        return all(map(_close, *joined))

    def _answers(self, part: Cut, starts: Sequence[Tensor], copies: int, mode: int) -> list[Tensor]:
        value, output = self._answer(part, starts, copies, mode)
        logits = self.network.response.logits(output)
        return [value] if logits is None else [value, logits]

    def _part(self, start: int) -> Cut:
        part = self._parts.tail if start == TAIL else self._parts.whole
        assert part is not None
        return part

    @property
    def copies(self) -> int:
        """How many copies of the batch a run of `responses` holds."""
        return 1 if self._way(WHOLE)[1] == SINGLY else self._asked

    def bytes_of_a_copy(self) -> int:
        """What the backward pass of one copy of the batch keeps, in bytes."""
        own = {tensor.untyped_storage().data_ptr() for tensor in self.network.tensors.values()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> None:  # to give the tensor back would tie it to its graph for good
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()

        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.activation.detach().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                answer = self._answer(self._parts.whole, [leaf], 1, SINGLY)
        del answer
        return sum(kept.values()) + int(leaf.untyped_storage().nbytes())

    # --- answers ---

    @torch.inference_mode(False)
    def responses(self, values: Tensor) -> Tensor:
        """Φ with the site's value replaced: `values` `(n · B, …)`, copies one after another → `(n, B)`."""
        rows = self.activation.shape[0]
        mode = self._way(WHOLE)[1]
        with torch.no_grad():
            found = [
                self._answer(self._parts.whole, [part], part.shape[0] // rows, mode)[0]
                for part in _laid_out(values).split(rows * self.copies)
            ]
        return torch.cat(found).view(-1, self.samples.batch)

    @torch.inference_mode(False)
    def slopes(self, alphas: Tensor, weights: Tensor, advance: Callable[[int], Any] = lambda _: None) -> Tensor:
        """Σ_k w_k · ∂Φ/∂(α_k·a), of the shape of a; in float32 where a is coarser, and else of its type.

        `alphas` > 0 and `weights` are `(steps,)`; `advance` is told how many steps are done.
        """
        start, mode = self._way(TAIL)
        copies = 1 if mode == SINGLY else self._asked
        pieces = -(-len(alphas) // copies)
        totals: list[Tensor | None] = []
        for some, its_weights in zip(alphas.tensor_split(pieces), weights.tensor_split(pieces), strict=True):
            with torch.enable_grad():
                starts = [value.requires_grad_() for value in self._stack(start, some)]
                value, _ = self._answer(self._part(start), starts, len(some), mode)
                seeds = its_weights.to(value).repeat_interleave(self.samples.batch)
                found = torch.autograd.grad(value, starts, seeds, allow_unused=True) if value.requires_grad else ()
            sums: list[Tensor | None] = [None if slope is None else _summed(slope, len(some)) for slope in found]
            totals = [_added(a, b) for a, b in zip(totals, sums, strict=True)] if totals else sums
            advance(len(some))
        slope = self._through_head(totals) if start == TAIL else totals[0] if totals else None
        kind = torch.promote_types(self.activation.dtype, torch.float32)
        return torch.zeros_like(self.activation, dtype=kind) if slope is None else slope.to(kind)

    def _head(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The last values that are affine in α, at α = 1 (differentiable in the activation given back) and at 0."""
        if self._heads is None:
            head = self._parts.head
            assert head is not None
            read = self._parts.read_by(head, self._outside)
            with plain_attention():
                with torch.enable_grad():
                    leaf = self.activation.detach().requires_grad_()
                    ends = list(head.module(leaf, *read, None))
                with torch.no_grad():
                    begins = list(head.module(torch.zeros_like(leaf), *read, None))
            self._heads = ends, begins, leaf
        return self._heads

    def _stack(self, start: int, alphas: Tensor) -> list[Tensor]:
        """Values at each α, `(len(alphas) · B, …)`, copies one after another."""
        if start == WHOLE:
            return [_spread(None, self.activation, alphas)]
        ends, begins, _ = self._head()
        return [_spread(begin, end.detach() - begin, alphas) for end, begin in zip(ends, begins, strict=True)]

    def _through_head(self, totals: Sequence[Tensor | None]) -> Tensor | None:
        ends, _, leaf = self._head()
        given = zip(ends, totals, strict=True) if totals else ()
        pairs = [(end, slope.to(end)) for end, slope in given if slope is not None and end.requires_grad]
        self._heads = None  # its graph is spent
        if not pairs:
            return None
        return torch.autograd.grad([e for e, _ in pairs], leaf, [s for _, s in pairs], allow_unused=True)[0]


def _spread(begin: Tensor | None, slope: Tensor, alphas: Tensor) -> Tensor:
    factors = alphas.to(slope).view(-1, *[1] * slope.ndim)
    many = slope.unsqueeze(0)
    values = many * factors if begin is None else torch.addcmul(begin.unsqueeze(0), many, factors)
    return values.flatten(0, 1)


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return total if more is None else more if total is None else total.add_(more)


def _summed(slope: Tensor, copies: int) -> Tensor:
    kind = torch.promote_types(slope.dtype, torch.float32)
    return slope.reshape(copies, -1, *slope.shape[1:]).sum(0, dtype=kind)


def _laid_out(value: Any) -> Any:
    """Images channels-last, for which convolutions and pooling are faster."""
    if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _padded(target: Tensor) -> Tensor:
    """Classes for a last layer: one a sample, in whole blocks, so that what a sample gets does not depend on others."""
    count = -(-len(target) // _BLOCK) * _BLOCK
    return torch.cat([target, target[:1].expand(count - len(target))])


def _repeated(value: Any, copies: int, *, single: bool = False) -> Any:
    """A tensor's rows copy after copy; with `single` one row serves all copies."""
    if not isinstance(value, Tensor) or value.ndim == 0 or (single and value.shape[0] == 1):
        return value
    return value.unsqueeze(0).expand(copies, *value.shape).flatten(0, 1)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    allowed = torch.finfo(found.dtype).eps ** 0.5 * expected.abs().amax()
    return bool(((found - expected).abs() <= allowed).all())
