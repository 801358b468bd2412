"""Measuring a gated graph: the shape of every site, found from batches of one and two samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from .activations import Activation
from .channels import Axes, channel_axis
from .dry import DryInterpreter, run_dry
from .errors import ModelError, SiteError
from .gates import Gates
from .naming import NAME
from .neurons import Granularity, NeuronIndex
from .rows import require_own_rows
from .samples import Samples


class _Place(DryInterpreter):
    """Runs a graph, knows the node that it is at, and notes the shapes of what nodes give."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would be written into messages of one line
        self.at = ""
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.nodes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # those that gave the tensors that there are
        self.given: Any = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = str(n.meta.get(NAME, n.name))
        value = super().run_node(n)
        first = value[0] if isinstance(value, tuple | list) and value else value  # an LSTM's, attention's
        if isinstance(first, Tensor) and (first.is_floating_point() or first.is_complex()):
            self.shapes[n] = tuple(first.shape)
        if n.op == "output":
            self.given = value
        elif isinstance(value, Tensor):
            self.nodes[value] = n
        return value


@dataclass(frozen=True, eq=False)
class Measured:
    """The index of a graph's neurons; its output on two samples, whose numbers say nothing, and what gave it."""

    index: NeuronIndex
    output: Any
    nodes: Mapping[Tensor, fx.Node]


def measured(
    module: fx.GraphModule,
    bind: Callable[[Samples], list[Any]],
    example: Samples,
    sites: Sequence[Activation],
    granularity: Granularity,
    *,
    permuted: bool = False,
) -> Measured:
    """The index of a gated graph's neurons; a fold of other axes into the batch is found by the way.

    Raises `SiteError` for a site whose first axis is not the batch or holds rows of other samples (a fold in turn;
    with `permuted`, where all sites are tried, an order by length), and `ModelError` where the graph cannot run on one
    or two samples.
    """
    inputs = Samples(example.inputs)
    singly, run = _shapes(module, bind, inputs.map(lambda leaf: leaf[:1]), sites)  # views: nothing is copied
    doubly, last = _shapes(module, bind, inputs.map(lambda leaf: leaf[:2] if len(leaf) > 1 else _twice(leaf)), sites)
    blocks, axes, folds = [], [], []
    channels: dict[fx.Node, Axes] = {}
    for number, site in enumerate(sites):
        one, two = singly.get(number), doubly.get(number)
        if one is None or two is None or two != (2 * one[0], *one[1:]):
            raise SiteError(
                f"site {site.name}: expected its first axis to grow with the batch, found shape {one} for one sample "
                f"and {two} for two; leave it out with sites=…, or put the batch axis first"
            )
        fold = one[0]
        shape = one[1:] if fold == 1 else one
        axis = channel_axis(site.node, run.shapes, channels)
        blocks.append((site.name, site.op, shape))
        axes.append(max(axis - (fold == 1), 0))  # a fold's rows are an axis of the block, in place of the batch's
        folds.append(fold)
    if not example.tensors[0].is_meta:
        tried = {number: fold for number, fold in enumerate(folds) if fold > 1 or permuted}
        require_own_rows(module, bind, example, sites, tried, thorough=permuted)
    index = NeuronIndex.build(blocks, axes=axes, folds=folds, granularity=granularity)
    return Measured(index, last.given, cast("Mapping[Tensor, fx.Node]", last.nodes))


def _shapes(
    module: fx.GraphModule, bind: Callable[[Samples], list[Any]], batch: Samples, sites: Sequence[Activation]
) -> tuple[dict[int, tuple[int, ...]], _Place]:
    """The shapes on a batch of every site's activation, by its number, and the run."""
    seen: dict[int, tuple[int, ...]] = {}
    places: list[_Place] = []

    def note(number: int, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim == 0:
            raise SiteError(f"site {sites[number].name}: expected a floating-point tensor, found {_kind(value)}")
        seen[number] = tuple(value.shape)

    def make() -> _Place:
        places.append(_Place(module))
        return places[-1]

    try:
        with torch.inference_mode(False):
            run_dry(make, [*bind(batch), Gates(NeuronIndex([]), watch=note)])
    except SiteError:
        raise
    except Exception as error:
        raise ModelError(
            f"trace: the model cannot run on a batch of {batch.batch}; at {places[-1].at}: "
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}. Neurons are counted for one "
            "sample, so any batch size must do: take it from the input (x.shape[0]) where it is written as a number"
        ) from error
    return seen, places[-1]


def _twice(leaf: Tensor) -> Tensor:
    return leaf.expand(2, *leaf.shape[1:])


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
