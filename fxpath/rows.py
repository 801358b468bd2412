"""Whether the rows of a site are those of the samples, in their order: tried on samples that differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .activations import Activation
from .equality import short
from .errors import ModelError, SiteError
from .gates import Gates
from .neurons import NeuronIndex
from .nodes import argument, carries_data, plain_name
from .rewriting import GATES, ancestors, gate, prefix
from .samples import Samples
from .trials import random_like, unless_it_fails

_ORDERS = ("sort", "argsort")
_CHOICES = ("getitem", "index", "index_select", "gather", "take_along_dim", "masked_select")
_KEPT = 1 << 14  # numbers of a site that are compared
_MANY = 6  # samples where values choose rows: enough that one choice is not that of the samples' order


def require_own_rows(
    module: fx.GraphModule,
    bind: Callable[[Samples], list[Any]],
    example: Samples,
    sites: Sequence[Activation],
    folds: Mapping[int, int],
    *,
    thorough: bool,
) -> None:
    """The rows of each of several samples must be those that it has alone.

    Raises `SiteError` where they are not, and `ModelError` for a graph that runs on two samples at most.

    Folded sites must hold them as a block, not every other row; in others rows must not be nearer to another sample's
    (where samples see each other, they are not the same either, but still the sample's own). `folds` are those of the
    sites that are tried. Two samples are tried, if `thorough` three, and where values choose rows six random ones, all
    in both orders, and with the reverse of orders that values decide.
    """
    if not folds:
        return
    trial = _Trial(module, bind, folds)
    with torch.inference_mode(False), torch.no_grad():
        wrong = trial.wrong(_unlike(example, 3 if thorough else 2), both=thorough)
        if thorough and not wrong and trial.chooses():
            wrong = trial.wrong(_distinct((_random(example, seed) for seed in range(_MANY)), _MANY), both=True)
    if wrong:
        raise SiteError(
            f"site {sites[min(wrong)].name}: expected the rows of a sample one after the other and in the "
            "order of the samples, found those of several samples in turn, or in another order; leave it "
            "out with sites=…, or put the batch axis first and keep its order"
        )


class _Trial:
    """The graph that leads to the tried sites."""

    def __init__(self, module: fx.GraphModule, bind: Callable[[Samples], list[Any]], folds: Mapping[int, int]) -> None:
        self.bind, self.folds = bind, folds
        self.problem = ""  # why the last run failed that did
        gates = [node for node in module.graph.nodes if node.target is gate and node.args[2] in folds]
        last = set(gates) - ancestors(gates)  # what leads to these runs, and little is kept
        self.until = prefix(module, {str(node.args[2]): node for node in gates if node in last})
        self.moving: set[fx.Node] = set()
        for node in self.until.graph.nodes:
            given = node.op == "placeholder" and node.target != GATES
            if given or (carries_data(node) and not self.moving.isdisjoint(node.all_input_nodes)):
                self.moving.add(node)

    def chooses(self) -> bool:
        """Whether values choose or order what is handed on, as the rows sent to an expert."""
        return any(
            not self.moving.isdisjoint(source for source in node.all_input_nodes if source is not node.args[0])
            for node in self.until.graph.nodes
            if plain_name(node) in _CHOICES
        )

    def wrong(self, samples: Sequence[Samples], *, both: bool = False) -> set[int]:
        """The sites with rows that are not the samples', in order and, with `both`, in reverse."""
        runs = [(one, self._alone(one)) for one in samples]
        able = [(one, own) for one, own in runs if own is not None]
        if len(able) < 2:
            return set()
        found = self._compared(able) or set()
        if both:
            found |= self._compared(able[::-1]) or set()
            orders = {node for node in self.moving if plain_name(node) in _ORDERS}
            found |= (self._compared(able, orders) if orders else None) or set()
        return found

    def _run(self, batch: Samples, see: Callable[[int, Tensor], None], run: Callable[..., Any]) -> bool:
        watch = lambda number, value: see(number, value) if number in self.folds else None  # noqa: E731

        def attempt() -> Any:
            try:
                return run(*self.bind(batch), Gates(NeuronIndex([]), watch=watch))
            except Exception as error:
                self.problem = short(error)
                raise

        return bool(unless_it_fails(attempt))

    def _alone(self, one: Samples) -> dict[int, Tensor] | None:
        own: dict[int, Tensor] = {}

        def keep(number: int, value: Tensor) -> None:
            own[number] = _some(value)

        return own if self._run(one, keep, self.until) else None

    def _compared(
        self, runs: Sequence[tuple[Samples, Mapping[int, Tensor]]], orders: set[fx.Node] | None = None
    ) -> set[int] | None:
        """The sites with rows, of the samples together, that are not those of each alone; None if it cannot run."""
        wrong: set[int] = set()

        def compare(number: int, value: Tensor) -> None:
            fold = self.folds[number]
            if len(value) != fold * len(runs):  # how many depends on values: every run looks at that
                return
            for place, (_, own) in enumerate(runs):
                found = _some(value[place * fold : (place + 1) * fold])
                others = [other[number] for each, (_, other) in enumerate(runs) if each != place and fold == 1]
                if number not in wrong and not _is_own(found, own[number], others):
                    wrong.add(number)

        together = _together([one for one, _ in runs])
        run = self.until if orders is None else _Reversed(self.until, orders, len(runs)).run
        able = self._run(together, compare, run)
        if not able and orders is None and 2 < len(runs) < _MANY and self._compared(runs[:2]) is not None:
            raise ModelError(
                f"trace: the graph runs on one sample and on two, and not on {len(runs)}: {self.problem}; take the "
                "number of samples from the input (x.shape[0]) and let no line depend on which it is"
            )
        return wrong if able or wrong else None


class _Reversed(fx.Interpreter):
    """Runs a graph with the reverse of every order of rows that values decide, as other values would.

    The order that undoes another one is left as it is.
    """

    def __init__(self, module: fx.GraphModule, orders: set[fx.Node], rows: int) -> None:
        super().__init__(module)
        self.orders, self.rows = orders, rows

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        source = argument(n, 0, "input", "self") if n in self.orders else None
        ordered = self.env.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(ordered, Tensor) or ordered.ndim == 0 or len(ordered) % self.rows:
            return value
        axis = argument(n, 1, "dim")
        undone = _is_order(ordered) and not self.orders.isdisjoint(ancestors([n]))
        if undone or (axis if type(axis) is int else -1) % ordered.ndim != 0:
            return value
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.flip(0), value)


def _is_order(tensor: Tensor) -> bool:
    numbers = torch.arange(len(tensor), device=tensor.device)
    return tensor.ndim == 1 and not tensor.is_floating_point() and torch.equal(tensor.sort().values, numbers)


def _some(value: Tensor) -> Tensor:
    """A copy of numbers of a site that are spread over all of it."""
    step = (value.numel() // _KEPT) | 1  # an odd one meets every column
    return value.flatten()[::step].clone()


def _is_own(found: Tensor, own: Tensor, others: Sequence[Tensor]) -> bool:
    if found.shape != own.shape:
        return True
    gap, size = float((found - own).norm()), float(own.norm())
    if not math.isfinite(gap) or gap <= 0.01 * size:
        return True
    nearest = min((float((found - other).norm()) for other in others), default=None)
    return nearest is not None and gap <= 2 * nearest


# --- samples --------------------------------------------------------------------------------------------------------


def _unlike(example: Samples, count: int) -> list[Samples]:
    """Samples that differ: the example's, they in reverse, and random numbers; two that are the same where none do."""
    plain = example.map(lambda leaf: leaf.clone() if leaf.is_inference() else leaf.detach())
    rows = [plain.take([row]) for row in range(min(plain.batch, count))]
    reverse = (one.map(lambda leaf: leaf.flip(tuple(range(leaf.ndim)))) for one in rows)
    found = _distinct(chain(rows, reverse, (_random(example, seed) for seed in range(count))), count)
    return found if len(found) > 1 else [rows[0], rows[0]]


def _random(example: Samples, seed: int) -> Samples:
    return Samples(example.inputs).map(lambda leaf: random_like(leaf[:1], seed))


def _distinct(samples: Iterable[Samples], count: int) -> list[Samples]:
    """The first `count` that differ; no more are made."""
    found: list[Samples] = []
    for one in samples:
        if not any(map(partial(_alike, one), found)):
            found.append(one)
        if len(found) == count:
            break
    return found


def _alike(one: Samples, two: Samples) -> bool:
    return all(map(torch.equal, one.tensors, two.tensors))


def _together(samples: Sequence[Samples]) -> Samples:
    columns = iter(zip(*(one.tensors for one in samples), strict=True))
    return Samples(samples[0].inputs).map(lambda _: torch.cat(next(columns)))
