"""Any `nn.Module` → a functional, eval-mode `fx.GraphModule` that is checked equal to the module.

`torch.fx.symbolic_trace` first: it is fast and keeps the module's structure. Where it cannot follow the code,
`torch.export` with a dynamic batch axis. In-place operations become out-of-place in the graph; the caller's module is
neither modified nor copied: the graph refers to its parameters, so later changes of weights are seen.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import operator
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .equality import answer, generators, odd_part, short
from .equality import check as check_equal
from .errors import InputError, ModelError, TraceError
from .inplace import AliasError, InPlaceProxy, remove_in_place
from .samples import Samples
from .trials import unless_it_fails

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


# torch.nn's own modules that hold activations; every other one of torch.nn is a leaf
_OPENED = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


class _Tracer(fx.Tracer):
    """fx's tracer, with more leaf modules and in-place operators recorded as such."""

    def __init__(self, leaves: Sequence[type[nn.Module]] = ()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = tuple(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        plain = super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _OPENED)
        return isinstance(m, self.leaves) or plain

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
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    _require_evaluation(model)
    _require_arguments(model, example)
    first: Exception | None = None
    attempts: list[str] = []
    try:
        with _quietly(example), _put_back(model):
            example = example.map(lambda leaf: leaf.detach().clone() if leaf.is_inference() else leaf.detach())
            expected = answer(model, example) if check else None
            for name, way in _ways(model, example, tracer, leaves):
                try:
                    with plain_attention():
                        traced = way()
                    if check:
                        check_equal(model, traced, example, expected)
                    name_nodes(traced.graph_module)
                    traced.notes += attempts
                    return traced
                except Exception as error:
                    mendable = isinstance(error, InputError | ModelError) and not isinstance(error, TraceError)
                    if mendable or isinstance(error, torch.OutOfMemoryError):
                        raise
                    first = first or error
                    attempts.append(_described(name, error))
            odd = odd_part(expected if check else unless_it_fails(lambda: answer(model, example)))
        raise TraceError(_why_untraceable(model, attempts, odd)) from first
    finally:
        first = None  # its traceback holds this frame: a cycle that would keep the example alive
        if len(attempts) > 1:  # torch.export has failed, and leaves such cycles of its own
            gc.collect()


def _ways(
    model: nn.Module, example: Samples, tracer: fx.Tracer | None, leaves: Sequence[type[nn.Module]]
) -> list[tuple[str, Callable[[], Traced]]]:
    ways: list[tuple[str, Callable[[], Traced]]] = [
        ("symbolic_trace", lambda: _symbolic(model, example, tracer or _Tracer(leaves)))
    ]
    if tracer is None:
        ways += [
            ("torch.export", lambda: _export(model, example, functionalise=False)),
            ("torch.export, functionalised", lambda: _export(model, example, functionalise=True)),
        ]
    return ways


@contextlib.contextmanager
def _quietly(example: Samples) -> Iterator[None]:
    """Leave the random state alone, use normal tensors, and keep back what torch says about its own internals."""
    random = torch.random.fork_rng(generators(example.tensors))
    with torch.inference_mode(False), random, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Undo what modules note about themselves while they are traced: proxies, fake tensors, activations.

    A forward that says `self.last = h`, or appends to a list, would keep them; `torch.export` replaces containers.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    containers = [
        (value, value.copy())
        for _, named in attributes
        for value in named.values()
        if isinstance(value, list | dict | set) and value is not named
    ]
    try:
        yield
    finally:
        for module, named in attributes:
            now = vars(module)
            for name in now.keys() - named.keys():
                del now[name]
            now.update(named)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch.nn's attention and transformers from their fused kernel.

    It hides the activations within, and is taken only without gradients: then a pass with gradients and one without
    would differ in last bits.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ModelError(
                f"trace: {name} of {type(model).__name__} has no shape yet; run the model once, model(x), before"
            )
        if tensor.is_inference():
            raise ModelError(
                f"trace: {name} of {type(model).__name__} was made in inference mode, so no gradient can pass it; make "
                "or load the model outside of torch.inference_mode(), or take copy.deepcopy(model) outside of it"
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
    remove_in_place(module, bind(example))
    return Traced(module, "symbolic_trace", bind, lambda output: output)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _require_arguments(model: nn.Module, example: Samples) -> None:
    try:
        inspect.signature(model.forward).bind(*example.args, **example.kwargs)
    except TypeError as error:
        takes = ", ".join(parameter.name for parameter in _parameters(model))
        gives = ", ".join(example.kwargs) or f"{len(example.args)} in order"
        raise InputError(
            f"trace: {type(model).__name__}.forward takes the arguments ({takes}), the example gives {gives}: {error}"
        ) from None


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
    args, kwargs = pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) else None, (wide.args, wide.kwargs)
    )
    axes = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)  # as export wants them: by parameter
    with torch.no_grad():
        program = torch.export.export(model, wide.args, wide.kwargs, dynamic_shapes=axes, strict=False)
    if functionalise:
        program = program.run_decompositions({})
    exported = program.module(check_guards=False)
    codegen: Any = exported.graph._codegen
    out_spec = codegen.pytree_info.out_spec
    exported.graph.set_codegen(fx.graph.CodeGen())
    output = next(node for node in exported.graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0]),)
    module = fx.GraphModule(exported, exported.graph, type(model).__name__)  # without the hooks that check inputs
    keys = list(example.kwargs)

    def bind(samples: Samples) -> list[Any]:
        return pytree.tree_leaves((samples.args, {key: samples.kwargs[key] for key in keys}))

    _name_stack(module)
    remove_in_place(module, bind(wide))
    return Traced(module, "torch.export", bind, lambda output: pytree.tree_unflatten(list(output), out_spec))


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
    opened = ".container." in kind_name or ".transformer." in kind_name
    inside_leaf = kind_name.startswith("torch.nn.modules.") and not opened
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


def _source_line(error: BaseException) -> str | None:
    """The line of the user's code at which tracing stopped: the last frame outside torch and fxpath."""
    inside = (f"{torch.__path__[0]}/", "<eval_with_key>", "<string>", "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(inside)]
    frames = [frame for frame in frames if not frame.filename.endswith(("fxpath/tracing.py", "fxpath/inplace.py"))]
    if not frames:
        return None
    last = frames[-1]
    return f'{last.filename}:{last.lineno}, in {last.name}: "{last.line}"'


def _described(name: str, error: Exception) -> str:
    line = _source_line(error)
    return f"{name}: {short(error)}" + (f"\n    at {line}" if line else "")


def _why_untraceable(model: nn.Module, attempts: Sequence[str], odd: type | None) -> str:
    if odd is not None:
        own = f"torch.export.register_dataclass({odd.__name__})" if is_dataclass(odd) else "leave it out in forward"
        return (
            f"trace: the output of {type(model).__name__} holds a {odd.__name__}, expected tensors, plain values and "
            "containers that torch.utils._pytree knows. A model of transformers leaves its cache out with "
            f"'use_cache': False in the example; for a type of your own: {own}"
        )
    said = [f"trace: no graph equals {type(model).__name__}.", *(f"  {attempt}" for attempt in attempts)]
    said.append(
        "Ways out: pass leaves=(ModuleType, …) for modules that need not be looked into, a tracer=… of your own, or "
        "rewrite the line so that it does not branch on values (an example that fixes the branch)"
    )
    return "\n".join(said)


__all__ = ["NAME", "AliasError", "Traced", "TracerName", "name_nodes", "trace_module"]
