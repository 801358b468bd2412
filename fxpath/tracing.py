"""Any `nn.Module` → a functional, eval-mode `fx.GraphModule` that is checked equal to the module.

`torch.fx.symbolic_trace` first: it is fast and keeps the module's structure. Where it cannot follow the code,
`torch.export` with a dynamic batch axis. In-place operations become out-of-place in the graph; the caller's module is
neither modified nor copied: the graph refers to its parameters, so later changes of weights are seen.
"""

from __future__ import annotations

import inspect
import operator
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import InputError, ModelError, TraceError
from .inplace import AliasError, InPlaceProxy, MutationAudit, MutationError, remove_in_place
from .samples import Samples

TracerName = Literal["symbolic_trace", "torch.export"]
NAME = "fxpath_name"  # node.meta key of a node's qualified name


@dataclass(eq=False)
class Traced:
    """A graph that equals a module.

    `graph_module` takes the flat list that `bind` makes of samples and returns what `unbind` turns into the module's
    output. Every node's `meta["fxpath_name"]` is its qualified name. `difference` is the largest absolute difference
    from the module's outputs that was seen (0 means bit-identical); `checked` are the batch sizes compared.
    """

    graph_module: fx.GraphModule
    tracer: TracerName
    bind: Callable[[Samples], list[Any]]
    unbind: Callable[[Any], Any]
    checked: tuple[int, ...] = ()
    difference: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __call__(self, samples: Samples) -> Any:
        return self.unbind(self.graph_module(*self.bind(samples)))


class _Tracer(fx.Tracer):
    """fx's tracer, with more leaf modules and in-place operators recorded as such."""

    def __init__(self, leaves: Sequence[type[nn.Module]] = ()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = tuple(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)


def trace_module(
    model: nn.Module,
    example: Samples,
    *,
    tracer: fx.Tracer | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    check: bool = True,
) -> Traced:
    """Trace `model` on an example batch.

    A `tracer` of one's own replaces fxpath's (then `torch.export` is not tried); `leaves` are module types not to be
    looked into. With `check`, the graph's output is compared with the module's on the example and on a second batch
    size. Raises `ModelError` in training mode and `TraceError`, naming the line, where no graph equals the module.
    """
    _require_evaluation(model)
    example = example.map(lambda leaf: leaf.detach().clone() if leaf.is_inference() else leaf.detach())
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracers warn about their own internals
        attempts: list[tuple[str, Exception]] = []
        ways: list[tuple[str, Callable[[], Traced]]] = [
            ("symbolic_trace", lambda: _symbolic(model, example, tracer or _Tracer(leaves)))
        ]
        if tracer is None:
            ways += [
                ("torch.export", lambda: _export(model, example, functionalise=False)),
                ("torch.export, functionalised", lambda: _export(model, example, functionalise=True)),
            ]
        for name, way in ways:
            try:
                traced = way()
                if check:
                    _check(model, traced, example)
                name_nodes(traced.graph_module)
                traced.notes += [f"{tried}: {_short(error)}" for tried, error in attempts]
                return traced
            except ModelError as error:
                if not isinstance(error, TraceError):
                    raise
                attempts.append((name, error))
            except Exception as error:
                if name == ways[0][0] and isinstance(error, torch.OutOfMemoryError):
                    raise
                attempts.append((name, error))
    raise TraceError(_why_untraceable(model, attempts)) from attempts[0][1]


def _require_evaluation(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"trace: expected an nn.Module, found {type(model).__name__}")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        shown = ", ".join(training[:5]) + (f" … ({len(training)} modules)" if len(training) > 5 else "")
        raise ModelError(
            f"trace: {type(model).__name__} is in training mode ({shown}); pathways are defined for the network in "
            "evaluation mode. Call model.eval() first"
        )


# --- symbolic tracing -----------------------------------------------------------------------------------------------


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _symbolic(model: nn.Module, example: Samples, tracer: fx.Tracer) -> Traced:
    parameters = _parameters(model)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TraceError("forward takes *args or **kwargs, which symbolic_trace cannot bind")
    names = [parameter.name for parameter in parameters]
    given = dict(zip(names, example.args, strict=False)) | example.kwargs
    _require_arguments(model, given, parameters, len(example.args))
    constants = {p.name: p.default for p in parameters if p.name not in given}
    constants |= {name: value for name, value in given.items() if not pytree.tree_any(_is_tensor, value)}
    graph = tracer.trace(model, concrete_args=constants or None)
    module = fx.GraphModule(tracer.root, graph, type(model).__name__)
    _drop_constants(module, names, constants)
    inputs = [name for name in names if name not in constants]

    def bind(samples: Samples) -> list[Any]:
        values = dict(zip(names, samples.args, strict=False)) | samples.kwargs
        return [values[name] for name in inputs]

    _name_stack(module)
    _functional(module, bind(example))
    return Traced(module, "symbolic_trace", bind, lambda output: output)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _require_arguments(
    model: nn.Module, given: dict[str, Any], parameters: Sequence[inspect.Parameter], positional: int
) -> None:
    names = [parameter.name for parameter in parameters]
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    extra = [name for name in given if name not in names]
    if missing or extra or positional > len(names):
        raise InputError(
            f"trace: {type(model).__name__}.forward takes ({', '.join(names)}); the example "
            + ("lacks " + ", ".join(missing) if missing else f"has {', '.join(extra) or positional} as well")
        )


def _drop_constants(module: fx.GraphModule, names: Sequence[str], constants: dict[str, Any]) -> None:
    """Take away the placeholders of arguments that tracing has fixed, and the checks that guard them."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for name, node in zip(names, placeholders, strict=True):
        if name not in constants:
            node.type = None
            continue
        for user in list(node.users):  # `_assert_is_none(x)`, or `torch._assert(x == value, …)`
            for guard in [*user.users, user]:
                if not guard.users:
                    graph.erase_node(guard)
        if node.users:
            raise TraceError(f"the argument {name!r} could not be fixed to {constants[name]!r}")
        graph.erase_node(node)
    graph.lint()
    module.recompile()


# --- torch.export ---------------------------------------------------------------------------------------------------


def _export(model: nn.Module, example: Samples, *, functionalise: bool) -> Traced:
    wide = example if example.batch > 1 else example.take([0, 0])  # a batch of 1 would be taken for a constant
    axes = pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) else None, (wide.args, wide.kwargs)
    )
    with torch.no_grad():
        program = torch.export.export(
            model, wide.args, wide.kwargs, dynamic_shapes=_by_parameter(model, axes), strict=False
        )
    if functionalise:
        program = program.run_decompositions({})
    module = program.module(check_guards=False)
    codegen: Any = module.graph._codegen
    out_spec = codegen.pytree_info.out_spec
    module.graph.set_codegen(fx.graph.CodeGen())
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0]),)
    module.recompile()
    keys = list(example.kwargs)

    def bind(samples: Samples) -> list[Any]:
        return pytree.tree_leaves((samples.args, {key: samples.kwargs[key] for key in keys}))

    _name_stack(module)
    _functional(module, bind(wide))
    return Traced(module, "torch.export", bind, lambda output: pytree.tree_unflatten(list(output), out_spec))


def _by_parameter(model: nn.Module, axes: tuple[Any, dict[str, Any]]) -> Any:
    """Dynamic shapes as `torch.export` wants them: named by parameter where all arguments have a name."""
    args, kwargs = axes
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in _parameters(model)):
        return args if not kwargs else axes
    names = [parameter.name for parameter in _parameters(model)]
    return dict(zip(names, args, strict=False)) | kwargs


# --- names ----------------------------------------------------------------------------------------------------------


def _operation(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
    elif callable(target):
        name = getattr(target, "__name__", type(target).__name__)
    else:
        name = str(target).rsplit(".", 1)[-1]
    name = name.strip("_") or name
    return name[1:] if getattr(operator, name, None) is target and name in ("iadd", "imul", "isub") else name


def _stack_name(node: fx.Node) -> str:
    """The torchvision `feature_extraction` name: the module's path, and the function's name where there is one."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = (stack[-1][0], stack[-1][1]) if stack else ("", None)
    path = path.split("@")[0].removeprefix("L['self'].")
    kind_name = kind if isinstance(kind, str) else f"{getattr(kind, '__module__', '')}.{getattr(kind, '__name__', '')}"
    inside_leaf = kind_name.startswith("torch.nn.modules.") and ".container." not in kind_name
    if node.op == "call_module":
        return path or str(node.target)
    if node.op in ("call_function", "call_method"):
        if inside_leaf and path:
            return path
        return f"{path}.{_operation(node)}" if path else _operation(node)
    return str(node.target)


def _name_stack(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        node.meta[NAME] = _stack_name(node)


def name_nodes(module: fx.GraphModule) -> None:
    """Make the nodes' qualified names unique: the second `layer1.0.relu` becomes `layer1.0.relu_1`, and so on."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    for node in module.graph.nodes:
        base = name = node.meta[NAME]
        while name in taken:
            counts[base] += 1
            name = f"{base}_{counts[base]}"
        taken.add(name)
        node.meta[NAME] = name


# --- correctness ----------------------------------------------------------------------------------------------------


def _functional(module: fx.GraphModule, leaves: Sequence[Any]) -> None:
    with torch.random.fork_rng(_generators(leaves)):
        remove_in_place(module, leaves)
        audit = MutationAudit(module)
        with torch.no_grad():
            audit.run(*[leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    if audit.changed:
        raise MutationError(f"nodes that change a tensor in place are left: {', '.join(audit.changed)}")


def _generators(leaves: Iterable[Any]) -> list[int]:
    """CUDA devices whose random state a run on these tensors may change."""
    return sorted({leaf.device.index or 0 for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda})


def _run(call: Callable[[], Any], example: Samples) -> Any:
    with torch.random.fork_rng(_generators(example.tensors)), torch.no_grad():
        return call()


def _check(model: nn.Module, traced: Traced, example: Samples) -> None:
    second = example.take([0]) if example.batch > 1 else example.take([0, 0])
    for samples in (example, second):
        own = samples.map(torch.clone)
        try:
            expected = _run(lambda own=own: model(*own.args, **own.kwargs), example)  # type: ignore[misc]
        except Exception as error:
            if samples is example:
                raise ModelError(
                    f"trace: {type(model).__name__} cannot run on the example "
                    f"{[tuple(t.shape) for t in example.tensors]}: {_short(error)}; is it the right size and type?"
                ) from error
            traced.notes.append(f"the module itself refuses a batch of {samples.batch}: {_short(error)}")
            continue
        try:
            found = _run(lambda samples=samples: traced(samples), example)  # type: ignore[misc]
        except Exception as error:
            raise TraceError(
                f"the graph of {traced.tracer} fails at batch size {samples.batch}, not the module: {_short(error)}"
            ) from error
        difference = _difference(expected, found)
        if difference is None or difference > 0:
            again = _run(lambda: model(*samples.map(torch.clone).args, **samples.map(torch.clone).kwargs), example)  # noqa: B023
            if _difference(expected, again) != 0:
                raise ModelError(
                    f"trace: {type(model).__name__} answers the same input differently each time, even in evaluation "
                    "mode; switch off what is random in it (dropout called with training=True, sampling)"
                )
        if difference is None:
            raise TraceError(f"the graph of {traced.tracer} gives another output at batch size {samples.batch}")
        traced.difference = max(traced.difference, difference)
        traced.checked = (*traced.checked, samples.batch)


def _difference(expected: Any, found: Any) -> float | None:
    """The largest absolute difference, or None where it is more than rounding."""
    leaves, spec = pytree.tree_flatten(expected)
    others, other_spec = pytree.tree_flatten(found)
    if len(leaves) != len(others) or (spec != other_spec and type(expected) is type(found)):
        return None
    largest = 0.0
    for one, two in zip(leaves, others, strict=True):
        if not isinstance(one, Tensor):
            if one != two:
                return None
            continue
        if not isinstance(two, Tensor) or one.shape != two.shape or one.dtype != two.dtype:
            return None
        if torch.equal(one, two) or (
            one.is_floating_point() and torch.equal(one.isnan(), two.isnan()) and one.isnan().all()
        ):
            continue
        if not one.is_floating_point():
            return None
        finite = one.isfinite()
        if not torch.equal(torch.where(finite, 0, one), torch.where(finite, 0, two)) and not bool(one.isnan().any()):
            return None
        gap = float((one - two)[finite].abs().max()) if bool(finite.any()) else 0.0
        scale = float(one[finite].abs().max()) if bool(finite.any()) else 0.0
        if not gap <= 16 * torch.finfo(one.dtype).eps * max(scale, 1e-30) * 8:
            return None
        largest = max(largest, gap)
    return largest


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _source_line(error: BaseException) -> str | None:
    """The line of the user's code at which tracing stopped: the last frame outside torch and fxpath."""
    inside = (f"{torch.__path__[0]}/", "<eval_with_key>", "<string>", "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(inside)]
    frames = [frame for frame in frames if not frame.filename.endswith(("fxpath/tracing.py", "fxpath/inplace.py"))]
    if not frames:
        return None
    last = frames[-1]
    return f'{last.filename}:{last.lineno}, in {last.name}: "{last.line}"'


def _why_untraceable(model: nn.Module, attempts: Sequence[tuple[str, Exception]]) -> str:
    said = [f"trace: no graph equals {type(model).__name__}."]
    for name, error in attempts:
        line = _source_line(error)
        said.append(f"  {name}: {_short(error)}" + (f"\n    at {line}" if line else ""))
    said.append(
        "Ways out: pass leaves=(ModuleType, …) for modules that need not be looked into, a tracer=… of your own, or "
        "rewrite the line so that it does not branch on values (an example that fixes the branch)"
    )
    return "\n".join(said)


__all__ = ["NAME", "AliasError", "Traced", "TracerName", "name_nodes", "trace_module"]
