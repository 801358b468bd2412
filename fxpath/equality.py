"""Checking that a graph gives what its module gives, on the example and on a second batch size."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import BranchError, ModelError, TraceError
from .outputs import plain
from .samples import Samples
from .trials import unless_it_fails

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


@contextlib.contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[Callable[[], None]]:
    """Give buffers that forward writes to their values back; what is yielded does so at once."""
    named = {id(buffer): buffer for module in modules for buffer in module._buffers.values() if buffer is not None}
    buffers = [(each, each._version, each.detach().clone()) for each in named.values() if not each.is_meta]

    def restore() -> None:
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)

    try:
        yield restore
    finally:
        restore()


def _call(model: nn.Module, samples: Samples) -> Any:
    own = samples.map(torch.clone)  # the module may write to its input
    with kept_buffers(model.modules()):
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
            f"{short(error)}; {_way_out(error, model, example)}"
        ) from error
    _require_steady(model, expected, again)
    return expected


def _way_out(error: Exception, model: nn.Module, example: Samples) -> str:
    """What helps a module that cannot run: another type of numbers where an operator lacks this one."""
    kinds = {tensor.dtype for tensor in (*model.parameters(), *example.tensors) if not _full(tensor.dtype)}
    if not kinds or not re.search("not implemented for|not supported|[Uu]nsupported dtype", str(error)):
        return "is it the right size and type?"
    shown = ", ".join(sorted(map(str, kinds)))
    other = " (or bfloat16, which more operators know)" if torch.float16 in kinds else ""
    return f"that operator has no {shown} on {example.device}: use model.float() and x.float(){other}"


def _full(kind: torch.dtype) -> bool:
    return kind in (torch.float32, torch.float64) or not (kind.is_floating_point or kind.is_complex)


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
    """Compare the graph with the module; raises `TraceError` where they differ by more than rounding.

    Outputs on the example, of which the module's is `expected`, and on a second batch size, there with the gradient in
    the input. Fills in `traced.checked` and `traced.difference`; samples that see each other are a remark.
    """
    found = _of_graph(traced, example, lambda: _run(lambda: traced(example), example))
    _compare(model, traced, example, expected, found)
    whole = expected
    second = example.take([0]) if example.batch > 1 else example.take([0, 0])
    wanted = None if _moving(example) else _first_parameter(model, traced)
    problem, slopes = None, None
    try:
        expected, slopes = _with_slopes(lambda samples: _call(model, samples), second, wanted)
    except Exception as error:
        problem = short(error)
        try:
            expected = _run(lambda: _call(model, second), example)
        except Exception as error:
            traced.notes.append(f"the module itself refuses a batch of {second.batch}: {short(error)}")
            copies = example.take([0] * example.batch)
            beside = unless_it_fails(lambda: _run(lambda: traced(copies), copies))
            _note_mixing(model, traced, example.batch, whole, pytree.tree_map(_first_row, plain(beside)))
            return
    try:
        if slopes is None:
            found, slopes_found = _of_graph(traced, second, lambda: _run(lambda: traced(second), second)), None
        else:
            found, slopes_found = _of_graph(traced, second, lambda: _with_slopes(traced, second, wanted))
    except BranchError as error:
        if not error.on_values:
            raise TraceError(f"a branch depends on the batch size alone: {error}") from error
        traced.notes.append(f"no second batch size was compared, as it takes another branch: {error}")
        return
    _compare(model, traced, second, expected, found)
    if example.batch > 1:
        _note_mixing(model, traced, example.batch, whole, expected)
    else:  # beside itself with its numbers in reverse
        pair = unless_it_fails(lambda: Samples(example.inputs).map(_and_in_reverse))
        _note_mixing(model, traced, 2, unless_it_fails(lambda: _run(lambda: traced(pair), pair)), whole)
    if slopes is not None and not any(bool(slope.any()) for slope in slopes):  # all is dead for this sample
        _, slopes = _with_slopes(lambda samples: _call(model, samples), example, wanted)
        _, slopes_found = _of_graph(traced, example, lambda: _with_slopes(traced, example, wanted))
    if problem is not None:
        traced.notes.append(f"the module's own gradient cannot be taken, so the graph's was not compared: {problem}")
    elif slopes is not None and not _same_slopes(slopes, slopes_found):
        raise TraceError(f"the graph of {traced.tracer} has another gradient than the module at batch {second.batch}")


_MIXED = (
    "what {} says of a sample depends on the others of its batch (a mean, a norm or a comparison along the batch axis, "
    "batch normalisation without running statistics), and so do scores and pathways; give samples one at a time, or "
    "make of such a group one sample with an axis of its own"
)


def _note_mixing(model: nn.Module, traced: Traced, batch: int, together: Any, alone: Any) -> None:
    """Note where the first of `batch` samples has another output beside others than alone, or among its like."""
    leaves = zip(pytree.tree_leaves(plain(alone)), pytree.tree_leaves(plain(together)), strict=False)
    tensors = [(one, two) for one, two in leaves if isinstance(one, Tensor) and isinstance(two, Tensor)]
    if any(_another(one, two) for one, two in tensors if two.shape[:1] == (batch,)):  # others are the batch's own
        traced.remarks.append(_MIXED.format(type(model).__name__))


def _and_in_reverse(leaf: Tensor) -> Tensor:
    return torch.cat([leaf, leaf.flip(tuple(range(leaf.ndim)))])


def _first_row(leaf: Any) -> Any:
    return leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf


def _another(alone: Tensor, together: Tensor) -> bool:
    """Whether the one row of `alone` and the first of `together` differ by more than other sizes of batches make."""
    if not alone.is_floating_point() or alone.shape[:1] != (1,) or alone.shape[1:] != together.shape[1:]:
        return False
    gap, *sizes = (float(each.norm()) for each in (alone - together[:1], alone, together[:1]))
    epsilon = torch.finfo(alone.dtype).eps
    rounding = max(max(1e-3, epsilon**0.5) * max(sizes), 10 * epsilon * alone.numel() ** 0.5)
    return bool(gap > rounding)  # False where it is NaN


def _of_graph(traced: Traced, samples: Samples, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except BranchError:
        raise
    except Exception as error:
        raise TraceError(
            f"the graph of {traced.tracer} fails at batch size {samples.batch}, not the module: {short(error)}"
        ) from error


def _compare(model: nn.Module, traced: Traced, samples: Samples, expected: Any, found: Any) -> None:
    gap = difference(expected, found)
    if gap != 0:
        _require_steady(model, expected, _run(lambda: _call(model, samples), samples))
    if gap is None:
        raise TraceError(f"the graph of {traced.tracer} gives another output at batch size {samples.batch}")
    traced.difference = max(traced.difference, gap)
    traced.checked = (*traced.checked, samples.batch)


def _moving(samples: Samples) -> bool:
    return any(tensor.is_floating_point() for tensor in samples.tensors)


def _first_parameter(model: nn.Module, traced: Traced) -> Tensor | None:
    """The first parameter that both the module and its graph can be differentiated in: an embedding, mostly."""
    shared = {id(parameter) for parameter in traced.graph_module.parameters()}
    return next((p for p in model.parameters() if p.requires_grad and id(p) in shared), None)


def _with_slopes(
    call: Callable[[Samples], Any], samples: Samples, wanted: Tensor | None
) -> tuple[Any, list[Tensor] | None]:
    """The output, and the gradient of a mixture of all its numbers in `wanted`, or else in every floating input."""
    tracked = samples.map(lambda leaf: leaf.clone().requires_grad_(leaf.is_floating_point()))
    goals = [wanted] if wanted is not None else [leaf for leaf in tracked.tensors if leaf.requires_grad]
    with torch.random.fork_rng(generators(samples.tensors)), torch.enable_grad():
        output = call(tracked.map(torch.clone))  # copies, as the module may write to its input
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        mixed = [
            (leaf * torch.arange(1.0, leaf.numel() + 1, device=leaf.device).cos().view(leaf.shape).to(leaf.dtype)).sum()
            for leaf in leaves
            if leaf.is_floating_point() and leaf.requires_grad
        ]
        slopes: Sequence[Tensor | None] = [None] * len(goals)
        if mixed and goals:
            total = torch.stack([value.float() for value in mixed]).sum()
            slopes = torch.autograd.grad(total, goals, allow_unused=True)
    output = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
    return output, [torch.zeros_like(t) if g is None else g for t, g in zip(goals, slopes, strict=True)]


def _same_slopes(expected: Sequence[Tensor], found: Sequence[Tensor] | None) -> bool:
    """Whether gradients agree as a whole; single numbers may not, where rounding moves a value across a kink."""
    for one, two in zip(expected, found or (), strict=True):
        size, gap = (float(each.float().norm()) for each in (one, one - two))
        epsilon = torch.finfo(one.dtype).eps
        if math.isfinite(size) and not gap <= max(1e-3, epsilon**0.5) * size + 1e3 * epsilon:
            return False
    return True


def difference(expected: Any, found: Any) -> float | None:
    """The largest absolute difference of two outputs, or None where it is more than rounding."""
    leaves, spec = pytree.tree_flatten(plain(expected))
    others, other_spec = pytree.tree_flatten(plain(found))
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
