"""What a network's hinges and maxima read, its values, its slope along a direction and its gradients, at a pathway."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .errors import LinearityError
from .gates import Gates, Restriction
from .pathways import Pathways
from .piecewise import Bends, Hinge
from .rewriting import prefix
from .samples import Samples
from .tracing import NAME, plain_attention
from .windows import Maximum

if TYPE_CHECKING:
    from .network import Network

_ROUNDING = 8  # units in the last place within which two slopes are one


@dataclass(frozen=True, eq=False)
class Terms:
    """Where one part may bend: of a hinge its kept units at one kink, of a maximum each window's other candidates.

    `distance` `(B, T)` is how far off the bend is in units of what the part reads, inf where there is no term
    (off-path, padding, the winner itself). `first` `(1, T)` and `second` `(B, T)` are flat places in what a maximum
    reads, a candidate and the winner; both None where the terms are all that a hinge reads, in order.
    `side` `(B, T)` is 1 where a hinge's value is above the kink, −1 below, 0 at it.
    """

    distance: Tensor
    first: Tensor | None
    second: Tensor | None
    side: Tensor | None

    def closing(self, slopes: Tensor) -> Tensor:
        """How fast the bend comes closer, `(B, T)`, where what is read changes by `slopes` `(B, units)`.

        A value at a kink leaves it in any direction.
        """
        if self.side is not None:
            return torch.where(self.side == 0, slopes.abs(), -self.side * slopes)
        one, two = self._at(slopes, self.first), self._at(slopes, self.second)
        found = one - two
        noise = _ROUNDING * torch.finfo(found.dtype).eps * (one.abs() + two.abs())
        return found.masked_fill_(found.abs() <= noise, 0.0)

    def add_squares(self, slopes: Tensor, to: Tensor) -> None:
        """Add to `(T,)` the squares of how fast the bends of the one sample come closer or recede."""
        if self.side is not None:
            to.addcmul_(slopes[0], slopes[0])
        else:
            apart = (self._at(slopes, self.first) - self._at(slopes, self.second))[0]
            to.addcmul_(apart, apart)

    def places(self, row: int, terms: Tensor) -> tuple[Tensor, Tensor | None]:
        """Flat places of some terms of a sample: what is read there, minus what is read at the second."""
        if self.first is None or self.second is None:
            return terms, None
        return self.first[min(row, len(self.first) - 1)][terms], self.second[row][terms]

    @staticmethod
    def _at(values: Tensor, places: Tensor | None) -> Tensor:
        assert places is not None
        return values.gather(1, places.expand(len(values), -1))


class Probe:
    """The graph that gives what every hinge and every maximum of a network reads.

    Terms of a hinge are its kept units, one for each kink; those of a maximum are, for each of its windows, all
    candidates beside the winner. Off-path neurons are held at what they are at x.
    """

    def __init__(self, network: Network, bends: Bends) -> None:
        self.index, self.bind = network.index, network.traced.bind  # not the network, which keeps its probes
        self.parts: tuple[Hinge | Maximum, ...] = (*bends.hinges, *bends.maxima)
        self.names = [str(part.node.meta[NAME]) for part in self.parts]
        self.read = [(part.source,) if isinstance(part, Hinge) else part.sources for part in self.parts]
        nodes = dict.fromkeys(node for nodes in self.read for node in nodes)
        self.places = {node: place for place, node in enumerate(nodes)}
        self.graph = prefix(network._module, {node.name: node for node in nodes})
        self._candidates: dict[int, tuple[tuple[tuple[int, ...], ...], Tensor]] = {}

    def run(self, samples: Samples, restriction: Restriction) -> list[Tensor]:
        """What each part reads, flat: `(B, units)`; several sources of a maximum one after the other."""
        gates = Gates(self.index, restriction)
        gates.batch = samples.batch
        with plain_attention():
            values = self.graph(*self.bind(samples), gates)
        flat = []
        for place, nodes in enumerate(self.read):
            found = [values[self.places[node]] for node in nodes]
            if isinstance(self.parts[place], Maximum):
                self._note(place, found, samples.batch)
            rows = [value.reshape(samples.batch, -1) for value in found]
            flat.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
        return flat

    def _note(self, place: int, found: Sequence[Tensor], batch: int) -> None:
        shapes = tuple(tuple(value.shape[1:]) for value in found)
        folds = {len(value) // batch for value in found}
        part = self.parts[place]
        if not isinstance(part, Maximum) or self._candidates.get(place, ((), None))[0] == shapes:
            return
        if len(folds) > 1:
            raise LinearityError(
                f"local linearity: {self.names[place]} is a maximum of tensors of which one has other axes folded into "
                "the batch and the other has not, which is not supported"
            )
        windows = part.candidates([(1, *shape) for shape in shapes])
        self._candidates[place] = shapes, _unfolded(windows, [math.prod(shape) for shape in shapes], folds.pop())

    def slopes(
        self, samples: Samples, restriction: Restriction, along: Sequence[Samples]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """What each part reads, and its derivatives along each direction: Jacobian–vector products, several at once."""
        leaves = tuple(leaf.detach() for leaf in samples.tensors if leaf.is_floating_point())
        steps = [[leaf for leaf in each.tensors if leaf.is_floating_point()] for each in along]

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.run(_replaced(samples, given), restriction))

        def product(*step: Tensor) -> Any:
            return torch.func.jvp(run, leaves, step)

        with torch.inference_mode(False), torch.no_grad(), _quietly():
            if len(along) > 1:
                try:
                    many = torch.func.vmap(product, out_dims=(None, 0))  # type: ignore[arg-type]
                    values, found = many(*map(torch.stack, zip(*steps, strict=True)))
                    return list(values), [[each[number] for each in found] for number in range(len(along))]
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, NotImplementedError):
                    pass  # what cannot be computed at once may be one by one
            try:
                products = [product(*step) for step in steps]
            except (RuntimeError, NotImplementedError) as error:
                if not any(word in str(error).lower() for word in ("forward", "jvp", "functorch")):
                    raise
                raise LinearityError(
                    f"local linearity: {self._failing(samples, restriction, leaves)} cannot be differentiated in "
                    f"forward mode: {str(error).splitlines()[0][:200]} Write it with operations that can, or give its "
                    "autograd function a jvp"
                ) from error
        return list(products[0][0]), [list(found) for _, found in products]

    def _failing(self, samples: Samples, restriction: Restriction, leaves: tuple[Tensor, ...]) -> str:
        """The node at which the graph fails."""
        watching = _Watching(self.graph)
        gates = Gates(self.index, restriction)
        gates.batch = samples.batch

        def run(*given: Tensor) -> Any:
            return watching.run(*self.bind(_replaced(samples, given)), gates)

        try:
            with plain_attention():
                torch.func.jvp(run, leaves, leaves)
        except Exception:  # it is known to fail; where is what is asked
            return f"node {watching.at}"
        return "a node"

    def terms(self, place: int, values: Tensor, kept: Tensor | None) -> list[Terms]:
        """The terms of one part, for what it reads `(B, units)`; `kept` are the units on the path, None for all."""
        part = self.parts[place]
        if isinstance(part, Hinge):
            found = []
            for kink in part.kinks:
                off = values - kink
                distance = off.abs()
                distance = distance if kept is None else distance.masked_fill_(~kept, math.inf)
                found.append(Terms(distance, None, None, off.sign()))
            return found
        windows = self._candidates[place][1].to(values.device)
        outside = windows < 0
        read = values[:, windows.clamp(min=0).flatten()].view(-1, *windows.shape).masked_fill_(outside, -math.inf)
        largest, winner = read.max(dim=2, keepdim=True)
        distance = largest - read  # inf for padding
        distance.scatter_(2, winner, math.inf)
        best = windows.expand_as(read).gather(2, winner).expand_as(read)
        return [Terms(distance.flatten(1), windows.clamp(min=0).reshape(1, -1), best.flatten(1), None)]

    def width(self, place: int) -> int:
        """Candidates of a window of a maximum that was run."""
        return self._candidates[place][1].shape[1]

    def gradients(
        self, copies: Samples, restriction: Restriction, wanted: Sequence[tuple[int, Tensor, Tensor | None]]
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """∇ₓ of values that parts read, at one sample, of which there are R `copies`: R values at a time.

        `wanted` has a part, flat places in what it reads, and others whose values are subtracted. Yields the number of
        the entry, which of its places, and rows `(r, D)` of all inputs' floating-point numbers.
        """
        rows = copies.batch
        with torch.inference_mode(False), torch.enable_grad():
            given = copies.map(lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()))
            leaves = [leaf for leaf in given.tensors if leaf.requires_grad]
            flat = self.run(given, restriction)
            for number, (place, first, second) in enumerate(wanted):
                for start in range(0, len(first), rows):
                    some = slice(start, min(start + rows, len(first)))
                    yield (
                        number,
                        some,
                        _rows_of(flat[place], leaves, first[some], None if second is None else second[some]),
                    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warnings of its own deprecated code, and of what it cannot compute for several at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*performance drop.*", category=UserWarning)
        yield


def _replaced(samples: Samples, given: Sequence[Tensor]) -> Samples:
    """Samples with other floating-point tensors."""
    own = iter(given)
    return samples.map(lambda leaf: next(own) if leaf.is_floating_point() else leaf)


class _Watching(fx.Interpreter):
    """Remembers at which node a run is."""

    at = ""

    def run_node(self, n: fx.Node) -> Any:
        self.at = str(n.meta.get(NAME, n.name))
        return super().run_node(n)


def _rows_of(flat: Tensor, leaves: Sequence[Tensor], first: Tensor, second: Tensor | None) -> Tensor:
    """Gradients of row i's value at `first[i]`, minus that at `second[i]`, as rows."""
    seed = torch.zeros_like(flat)
    own = torch.arange(len(first), device=flat.device)
    seed[own, first] += 1
    if second is not None:
        seed[own, second] -= 1
    found = torch.autograd.grad(flat, leaves, seed, retain_graph=True, allow_unused=True) if flat.requires_grad else ()
    slopes = [torch.zeros_like(leaf) if slope is None else slope for slope, leaf in zip_longest(found, leaves)]
    return torch.cat([slope.reshape(len(slope), -1)[: len(first)] for slope in slopes], dim=1)


def _unfolded(windows: Tensor, sizes: Sequence[int], fold: int) -> Tensor:
    """Windows of one row → those of the `fold` rows of a sample, in each of several sources one after the other."""
    if fold == 1:
        return windows
    source = torch.bucketize(windows, torch.tensor(sizes).cumsum(0), right=True).clamp(max=len(sizes) - 1)
    size = torch.tensor(sizes)
    before = size.cumsum(0) - size
    first = fold * before[source] + windows - before[source]
    moved = first[None] + torch.arange(fold)[:, None, None] * size[source][None]
    return torch.where(windows < 0, -1, moved).reshape(-1, windows.shape[1])


def held(network: Network, pathways: Pathways) -> Restriction:
    """The network frozen to pathways, at the very input that it runs on."""
    restriction = Restriction(network._gates_of(pathways), [None] * len(network.index), held=True, forward=True)
    return restriction.checked(network.index, network.device)
