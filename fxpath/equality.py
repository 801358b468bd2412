"""Checking that a graph gives what its module gives, on the example and on a second batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ModelError, TraceError
from .samples import Samples

if TYPE_CHECKING:
    from .tracing import Traced

_PLAIN = (Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_ROUNDING = 128  # units in the last place of the largest value: more is another function


def generators(leaves: Iterable[Any]) -> list[int]:
    """CUDA devices whose random state a run on these values may change."""
    tensors = (leaf for leaf in pytree.tree_leaves(list(leaves)) if isinstance(leaf, Tensor))
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})


def short(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _random_state(devices: Iterable[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _run(call: Callable[[], Any], example: Samples) -> Any:
    with torch.random.fork_rng(generators(example.tensors)), torch.no_grad():
        return call()


def _call(model: nn.Module, samples: Samples) -> Any:
    own = samples.map(torch.clone)  # the module may write to its input
    return model(*own.args, **own.kwargs)


def answer(model: nn.Module, example: Samples) -> Any:
    """What the module itself gives on the example.

    Raises `ModelError` where it cannot run on it, and where it answers the same input differently each time.
    """
    devices = generators(example.tensors)
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            before = _random_state(devices)
            expected = _call(model, example)
            drew = not all(map(torch.equal, before, _random_state(devices)))
            again = _call(model, example) if drew else expected
    except Exception as error:
        raise ModelError(
            f"trace: {type(model).__name__} cannot run on the example {[tuple(t.shape) for t in example.tensors]}: "
            f"{short(error)}; is it the right size and type?"
        ) from error
    _require_steady(model, expected, again)
    return expected


def _require_steady(model: nn.Module, one: Any, two: Any) -> None:
    if one is not two and difference(one, two) != 0:
        raise ModelError(
            f"trace: {type(model).__name__} answers the same input differently each time, even in evaluation mode; "
            "switch off what is random in it (dropout called with training=True, sampling)"
        )


def odd_part(output: Any) -> type | None:
    """The type of the first thing in an output that is neither tensor nor plain value nor container, None for none."""
    return next((type(leaf) for leaf in pytree.tree_leaves(output) if not isinstance(leaf, _PLAIN)), None)


def check(model: nn.Module, traced: Traced, example: Samples, expected: Any) -> None:
    """Compare the graph's output with the module's; raises `TraceError` where they differ by more than rounding.

    `expected` is the module's answer on the example. Fills in `traced.checked` and `traced.difference`.
    """
    second = example.take([0]) if example.batch > 1 else example.take([0, 0])
    for samples in (example, second):
        if samples is second:
            try:
                expected = _run(lambda: _call(model, second), example)
            except Exception as error:
                traced.notes.append(f"the module itself refuses a batch of {samples.batch}: {short(error)}")
                continue
        try:
            found = _run(lambda samples=samples: traced(samples), example)  # type: ignore[misc]
        except Exception as error:
            raise TraceError(
                f"the graph of {traced.tracer} fails at batch size {samples.batch}, not the module: {short(error)}"
            ) from error
        gap = difference(expected, found)
        if gap != 0:
            _require_steady(model, expected, _run(lambda samples=samples: _call(model, samples), example))  # type: ignore[misc]
        if gap is None:
            raise TraceError(f"the graph of {traced.tracer} gives another output at batch size {samples.batch}")
        traced.difference = max(traced.difference, gap)
        traced.checked = (*traced.checked, samples.batch)


def difference(expected: Any, found: Any) -> float | None:
    """The largest absolute difference of two outputs, or None where it is more than rounding."""
    leaves, spec = pytree.tree_flatten(expected)
    others, other_spec = pytree.tree_flatten(found)
    if len(leaves) != len(others) or (spec != other_spec and type(expected) is type(found)):
        return None
    gaps = [_gap(one, two) for one, two in zip(leaves, others, strict=True)]
    return None if any(gap is None for gap in gaps) else max((gap for gap in gaps if gap is not None), default=0.0)


def _gap(one: Any, two: Any) -> float | None:
    if not isinstance(one, Tensor):
        return 0.0 if one == two else None
    if not isinstance(two, Tensor) or one.shape != two.shape or one.dtype != two.dtype:
        return None
    if torch.equal(one, two):
        return 0.0
    if not one.is_floating_point() or not torch.equal(one.isnan(), two.isnan()):
        return None
    finite = one.isfinite()
    odd = ~finite & ~one.isnan()
    if not torch.equal(finite, two.isfinite()) or not torch.equal(one[odd], two[odd]):
        return None
    if not bool(finite.any()):
        return 0.0
    gap = float((one - two)[finite].abs().max())
    scale = float(one[finite].abs().max())
    return gap if gap <= _ROUNDING * torch.finfo(one.dtype).eps * max(scale, 1e-30) else None
