"""Measuring a gated graph: the shape of every site, found from batches of one and two samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .errors import ModelError, SiteError
from .gates import Gates
from .neurons import Granularity, NeuronIndex
from .rewriting import Activation, channel_axis
from .samples import Samples
from .tracing import NAME


class _Place(fx.Interpreter):
    """Runs a graph and knows the node that it is at."""

    at: str = ""

    def run_node(self, n: fx.Node) -> Any:
        self.at = str(n.meta.get(NAME, n.name))
        return super().run_node(n)


def measured(
    module: fx.GraphModule,
    bind: Callable[[Samples], list[Any]],
    example: Samples,
    sites: Sequence[Activation],
    granularity: Granularity,
) -> NeuronIndex:
    """The index of a gated graph's neurons; a fold of other axes into the batch is found by the way.

    Raises `SiteError` for a site whose first axis is not the batch, and `ModelError` where the graph cannot run on
    one or two samples.
    """
    shapes: list[dict[int, tuple[int, ...]]] = []
    folded: dict[int, Tensor] = {}
    for rows in ([0], [0, min(1, example.batch - 1)]):
        seen: dict[int, tuple[int, ...]] = {}

        def note(number: int, value: Any, seen: dict[int, tuple[int, ...]] = seen, batch: int = len(rows)) -> None:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim == 0:
                raise SiteError(f"site {sites[number].name}: expected a floating-point tensor, found {_kind(value)}")
            seen[number] = tuple(value.shape)
            if number in folded:
                _require_block(sites[number].name, folded.pop(number), value)
            elif batch == 1 and value.shape[0] > 1:
                folded[number] = value

        place = _Place(module)
        place.extra_traceback = False  # it would lengthen the messages of errors
        with torch.inference_mode(False), torch.no_grad():
            batch = example.take(rows).map(lambda leaf: leaf.clone() if leaf.is_inference() else leaf.detach())
            try:
                place.run(*bind(batch), Gates(NeuronIndex([]), watch=note))
            except SiteError:
                raise
            except Exception as error:
                raise ModelError(
                    f"trace: the model cannot run on a batch of {len(rows)}; at {place.at}: "
                    f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}. Neurons are counted for one "
                    "sample, so any batch size must do: take it from the input (x.shape[0]) where it is written as a "
                    "number"
                ) from error
        shapes.append(seen)
    blocks, axes, folds = [], [], []
    for number, site in enumerate(sites):
        one, two = shapes[0].get(number), shapes[1].get(number)
        if one is None or two is None or two != (2 * one[0], *one[1:]):
            raise SiteError(
                f"site {site.name}: expected its first axis to grow with the batch, found shape {one} for one sample "
                f"and {two} for two; leave it out with sites=…, or put the batch axis first"
            )
        fold = one[0]
        shape = one[1:] if fold == 1 else one
        axis = channel_axis(site.node, len(one) - 1)
        blocks.append((site.name, site.op, shape))
        axes.append(max(axis, 0) + (fold > 1))
        folds.append(fold)
    return NeuronIndex.build(blocks, axes=axes, folds=folds, granularity=granularity)


def _require_block(name: str, alone: Tensor, batch: Tensor) -> None:
    """The rows of the first of two samples must be those that it has alone: a block, not every other row."""
    first = batch[: len(alone)]
    if alone.is_meta or first.shape != alone.shape:
        return
    largest = float(alone.abs().amax()) if alone.numel() else 0.0
    if not torch.allclose(first, alone, rtol=0.02, atol=0.02 * largest, equal_nan=True):
        raise SiteError(
            f"site {name}: expected the rows of a sample one after the other, found those of several samples in turn; "
            "leave it out with sites=…, or fold with the batch axis first"
        )


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
