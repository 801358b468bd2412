"""Runs of what follows one site: many values of the site at once, as copies of the batch along its first axis.

`SiteRuns.responses` answers any values of the site; `SiteRuns.slopes` the gradients along the straight path α·a. Both
run the graph behind the site alone. What makes them fast is tried first, once a network, site and batch size: a last
layer that gives the wanted classes alone, images laid out channels last, copies in a stack (where a batch size is part
of the graph, or the first axis is not the batch everywhere, they would mix), and leaving out what is affine in α. What
answers otherwise than the plain graph is not used. The trials are on random values, so no sample decides for others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .gates import Gates, Restriction
from .responses import Detection, Logit, Pixel, Region, Token, respond
from .rewriting import Cut
from .samples import Samples
from .suffixes import Parts, before, outside, parts_of
from .tracing import plain_attention
from .trials import random_like, unless_it_fails

if TYPE_CHECKING:
    from .network import Network

SINGLY, REPEATED, RERUN = 0, 1, 2  # one copy at a time; tensors that are read from outside repeated; or all anew
WHOLE, TAIL = 0, 1  # from the site itself, or from the last values that are affine in α
_BLOCK = 16  # rows of a last layer that are computed at a time, alike
_FACTORS = (1.0, 0.5)  # of the activations that are tried
_OWN_PLACES = (type(None), Pixel, Region, Token, Detection)  # they treat each class alike; another may not
_ROUNDING, _TELLING = 8, 32  # units in the last place: what rounding may do; and by how much answers must differ


def resolved(network: Network, samples: Samples) -> tuple[Any, Tensor | None, int | None]:
    """The network's output, the class to explain for each sample, and how many classes there are (None: none)."""
    with torch.no_grad():
        output = network(samples)
        logits = network.response.logits(output)
        return output, network._resolve(output, samples), None if logits is None else logits.shape[1]


class SiteRuns:
    """What follows one site, on cached inputs.

    `samples` have their target resolved; a run holds at most `copies` copies of them. `activation` is the site's value
    a, `leads` whether any way goes from the site to the output, `reaches` whether `slopes` found one to the response.
    `classes`: how many logits the output has; where the response is one of them, the last layer gives no others.
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
        response = network.response
        whole = type(response) is Logit and response.output is None and type(response.at) in _OWN_PLACES
        single = whole and target is not None
        self.network, self.number, self._asked = network, number, max(copies, 1)
        self._classes = classes if single else None
        self._given = samples, target
        self._fill(*self._form(), samples, target)
        self.leads = self.reaches = self._parts.leads

    @torch.inference_mode(False)
    def _fill(self, parts: Parts, channels_last: bool, samples: Samples, target: Tensor | None) -> None:
        """Take in samples: what the suffix reads of them, images channels last or as they are."""
        self._parts, self._channels_last = parts, channels_last
        self.samples, self.target, self._wanted = samples, target, None
        if parts.narrow and target is not None:
            self._wanted, self.target = _padded(target), torch.arange(samples.batch, device=samples.device)
        activation, values = before(self.network, parts, samples, self._wanted)
        self.activation: Tensor = self._laid_out(activation)
        self._outside = {name: self._laid_out(value) for name, value in values.items()}
        self._repeated: tuple[tuple[int, int], dict[str, Any]] = (1, REPEATED), self._outside
        self._gates: tuple[int, Gates | None] = 0, None
        self._heads: tuple[list[Tensor], list[Tensor], Tensor] | None = None

    def _laid_out(self, value: Any) -> Any:
        """Images channels last, for which convolutions and pooling are faster."""
        if self._channels_last and isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return value.contiguous(memory_format=torch.channels_last)
        return value

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
                found |= {name: self._laid_out(value) for name, value in more.items()}
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

    # --- trials ---

    def _form(self) -> tuple[Parts, bool]:
        """The sub-graphs to run, with a narrow last layer or plain, and whether images are channels last."""
        plain = parts_of(self.network, self.number, None)
        narrow = plain if self._classes is None else parts_of(self.network, self.number, self._classes)
        batch = self._given[0].batch
        if (batch, self._classes) not in plain.forms:
            forms = [(narrow, True), (plain, True), (narrow, False)] if narrow.narrow else [(plain, True)]
            expected = unless_it_fails(lambda: self._probe(plain, False)._alone())
            found = (form for form in forms if expected and self._formed(form, expected))
            plain.forms[batch, self._classes] = next(found, (plain, False))
        return plain.forms[batch, self._classes]

    def _formed(self, form: tuple[Parts, bool], expected: list[list[Tensor]]) -> bool:
        found = unless_it_fails(lambda: self._probe(*form)._alone())
        return found is not None and _agree([each[:1] for each in found], [each[:1] for each in expected])

    @torch.inference_mode(False)
    def _probe(self, parts: Parts, channels_last: bool) -> SiteRuns:
        """These runs in a form, on random inputs, classes and activations."""
        samples, target = self._given
        if target is not None and self._classes is not None:
            # a class in another row than the sample's, so that rows along another axis give another answer
            target = (torch.arange(samples.batch, device=samples.device) + 1) % self._classes
        probe = copy.copy(self)
        probe._fill(parts, channels_last, samples.map(random_like), target)
        probe.activation = probe._laid_out(random_like(probe.activation).abs())
        return probe

    @torch.inference_mode(False)
    def _alone(self) -> list[list[Tensor]]:
        """Answers to the activation times each factor, one copy at a time."""
        with torch.no_grad():
            return [self._answers(self._parts.whole, [self.activation * factor], 1, SINGLY) for factor in _FACTORS]

    @torch.inference_mode(False)
    def _way(self, kind: int) -> tuple[int, int]:
        """From where runs start, `WHOLE` or `TAIL`, and how they are stacked."""
        most = min(self._asked, 2)
        key = kind, most, self.samples.batch, self._channels_last
        if key not in self._parts.ways:
            wanted = [TAIL, WHOLE] if kind == TAIL and self._parts.tail is not None else [WHOLE]
            modes = [] if most == 1 else [REPEATED, RERUN] if self._outside else [REPEATED]
            ways = [(start, mode) for start in wanted for mode in modes] + [(start, SINGLY) for start in wanted[:-1]]
            self._parts.ways[key] = next(self._sound_ways(ways), (WHOLE, SINGLY))
        return self._parts.ways[key]

    def _sound_ways(self, ways: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        probe = unless_it_fails(lambda: self._probe(self._parts, self._channels_last))
        alone = probe and unless_it_fails(probe._alone)
        if alone and (_tell(*alone) or not self.leads):
            yield from (way for way in ways if unless_it_fails(partial(probe._sound, way, alone)))

    def _sound(self, way: tuple[int, int], alone: list[list[Tensor]]) -> bool:
        """Whether copies answer as they do `alone`, from where this way starts and as it stacks."""
        start, mode = way
        with torch.no_grad():
            if mode == SINGLY:
                stacks = [self._answers(self._part(start), self._stack(start, [f]), 1, mode) for f in _FACTORS]
                return _agree(stacks, alone)
            found = self._answers(self._part(start), self._stack(start, _FACTORS), len(_FACTORS), mode)
        stacked = [answer.chunk(len(_FACTORS)) for answer in found]
        return _agree([list(each) for each in zip(*stacked, strict=True)], alone)

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
        kept: dict[int, torch.UntypedStorage] = {}  # held: a freed one's address would be used again

        def note(tensor: Tensor) -> None:  # to give the tensor back would tie it to its graph for good
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage

        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.activation.detach().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                answer = self._answer(self._parts.whole, [leaf], 1, SINGLY)
        del answer
        return sum(storage.nbytes() for storage in kept.values()) + int(leaf.untyped_storage().nbytes())

    # --- answers ---

    @torch.inference_mode(False)
    def responses(self, values: Tensor) -> Tensor:
        """Φ with the site's value replaced: `values` `(n · B, …)`, copies one after another → `(n, B)`."""
        rows = self.activation.shape[0]
        mode = self._way(WHOLE)[1]
        with torch.no_grad():
            found = [
                self._answer(self._parts.whole, [part], part.shape[0] // rows, mode)[0]
                for part in self._laid_out(values).split(rows * self.copies)
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
                starts = [value.requires_grad_() for value in self._stack(start, some.tolist())]
                value, _ = self._answer(self._part(start), starts, len(some), mode)
                seeds = its_weights.to(value).repeat_interleave(self.samples.batch)
                found = torch.autograd.grad(value, starts, seeds, allow_unused=True) if value.requires_grad else ()
            sums: list[Tensor | None] = [None if slope is None else _summed(slope, len(some)) for slope in found]
            totals = [_added(a, b) for a, b in zip(totals, sums, strict=True)] if totals else sums
            advance(len(some))
        slope = self._through_head(totals) if start == TAIL else totals[0] if totals else None
        self.reaches = slope is not None
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

    def _stack(self, start: int, alphas: Sequence[float]) -> list[Tensor]:
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


def _spread(begin: Tensor | None, slope: Tensor, alphas: Sequence[float]) -> Tensor:
    factors = torch.tensor(alphas, dtype=torch.float64).to(slope).view(-1, *[1] * slope.ndim)
    many = slope.unsqueeze(0)
    values = many * factors if begin is None else torch.addcmul(begin.unsqueeze(0), many, factors)
    return values.flatten(0, 1)


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return total if more is None else more if total is None else total.add_(more)


def _summed(slope: Tensor, copies: int) -> Tensor:
    kind = torch.promote_types(slope.dtype, torch.float32)
    return slope.reshape(copies, -1, *slope.shape[1:]).sum(0, dtype=kind)


def _padded(target: Tensor) -> Tensor:
    """Classes for a last layer: one a sample, in whole blocks, so that what a sample gets does not depend on others."""
    count = -(-len(target) // _BLOCK) * _BLOCK
    return torch.cat([target, target[:1].expand(count - len(target))])


def _repeated(value: Any, copies: int, *, single: bool = False) -> Any:
    """A tensor's rows copy after copy; with `single` one row serves all copies."""
    if not isinstance(value, Tensor) or value.ndim == 0 or (single and value.shape[0] == 1):
        return value
    return value.unsqueeze(0).expand(copies, *value.shape).flatten(0, 1)


def _spans(answers: list[list[Tensor]]) -> list[tuple[Tensor, Tensor, float]]:
    """Of each kind of answer by how much two copies differ at most, the largest, and the type's rounding."""
    return [
        (
            (one - two).abs().amax(),
            torch.stack([one, two]).abs().amax(),
            torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0,
        )
        for one, two in zip(*answers, strict=True)
    ]


def _tell(*answers: list[Tensor]) -> bool:
    """Whether two copies differ by so much that it would be seen if they mixed."""
    return any(bool(span > _TELLING * eps * largest) for span, largest, eps in _spans(list(answers)))


def _agree(found: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    """Whether answers are those expected, but for rounding."""
    for copies in zip(found, expected, strict=True):
        for one, other, (span, largest, eps) in zip(*copies, _spans(expected), strict=True):
            allowed = eps**0.5 * span + _ROUNDING * eps * largest
            if one.shape != other.shape or not bool(((one - other).abs() <= allowed).all()):
                return False
    return True
