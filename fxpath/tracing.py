"""Any `nn.Module` → a functional, eval-mode `fx.GraphModule` that is checked equal to the module.

`torch.fx.symbolic_trace` first: it is fast and keeps the module's structure. Where it cannot follow the code,
`torch.export` with a dynamic batch axis. In-place operations become out-of-place in the graph; the caller's module is
neither modified nor copied: the graph refers to its parameters, so later changes of weights are seen.
"""

from __future__ import annotations

import gc
import inspect
import keyword
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .branches import BranchTracer
from .equality import answer, odd_part
from .equality import check as check_equal
from .errors import InputError, ModelError, TraceError, TraceWarning
from .inplace import AliasError, remove_in_place
from .naming import NAME, name_nodes, name_stack
from .reasons import described, opened, why_untraceable
from .refusals import parameters_of, require_any_batch, require_arguments, require_one_device, require_open, traceable
from .samples import Samples
from .surroundings import plain_attention, put_back, quietly
from .tracers import PathTracer, stop_gradients
from .trials import unless_it_fails

TracerName = Literal["symbolic_trace", "torch.export"]

_RENAMED = "__renamed"  # what a name ends in that a graph cannot have
_FX_NAMES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))
_ONE_AT_A_TIME = threading.RLock()  # tracers patch torch for the whole process


@dataclass(eq=False)
class Traced:
    """A graph that equals a module.

    `graph_module` takes the flat list that `bind` makes of samples and returns what `unbind` turns into the module's
    output. Every node's `meta["fxpath_name"]` is its qualified name. `difference` is the largest absolute difference
    from the module's outputs that was seen (0 means bit-identical); `checked` are the batch sizes compared.
    `arguments` are the model's, by name: each a tree with the number of an input of the graph, or None, at each leaf;
    `constants` are those of the example that hold no tensor.
    `originals` are the model's own modules, by the name by which the graph calls their out-of-place forms.
    `notes` say what failed on the way, `remarks` what the graph holds that its sites do not show.
    """

    graph_module: fx.GraphModule
    tracer: TracerName
    bind: Callable[[Samples], list[Any]]
    unbind: Callable[[Any], Any]
    checked: tuple[int, ...] = ()
    difference: float = 0.0
    notes: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def __call__(self, samples: Samples) -> Any:
        return self.unbind(self.graph_module(*self.bind(samples)))


def trace_module(
    model: nn.Module,
    example: Samples,
    *,
    tracer: fx.Tracer | None = None,
    leaves: Sequence[type[nn.Module]] = (),
    kinds: Sequence[type[nn.Module]] = (),
    fix_branches: bool = False,
    check: bool = True,
    answered: Callable[[Any], None] = lambda _: None,
) -> Traced:
    """Trace `model` on an example batch.

    A `tracer` of one's own replaces fxpath's (then `torch.export` is not tried); `leaves` are module types not to be
    looked into, and so are `kinds`, which will be sites. With `fix_branches`, a branch on values that no tracer follows
    is taken as the example takes it, and inputs that take another raise `BranchError`. With `check`, the graph's output
    is compared with the module's (which `answered` sees first) on the example and on a second batch size, and its
    gradient on the second. What a user must know of the graph, such as samples that see each other, is a
    `TraceWarning`. Raises `ModelError` for a model that cannot be traced as it is (training mode, quantised,
    TorchScript …) and `TraceError`, naming the line, where no graph equals the module.
    """
    if tracer is not None and fix_branches:
        raise InputError("trace: fix_branches needs fxpath's own tracer; leave out one of tracer=… and fix_branches")
    model = traceable(model)
    require_one_device(model, example, values=check)
    require_arguments(model, example)
    first: Exception | None = None
    attempts: list[str] = []
    try:
        with _ONE_AT_A_TIME, quietly(example), put_back(model.modules()) as restore:
            example = example.map(lambda leaf: leaf.detach().clone() if leaf.is_inference() else leaf.detach())
            expected = answer(model, example) if check else None
            if check:
                answered(expected)
            for name, way in _ways(model, example, tracer, (*leaves, *kinds), fix_branches):
                try:
                    with plain_attention():
                        traced = way()
                    require_open(traced.graph_module)
                    if check:
                        check_equal(model, traced, example, expected)
                    name_nodes(traced.graph_module)
                    traced.constants = _constants(model, example)
                    traced.notes += attempts
                    break
                except Exception as error:
                    mendable = isinstance(error, InputError | ModelError) and not isinstance(error, TraceError)
                    if mendable or isinstance(error, torch.OutOfMemoryError):
                        raise
                    restore()  # one way of tracing does not see what another left
                    first = first or error
                    attempts.append(described(name, error))
            else:
                odd = odd_part(expected if check else unless_it_fails(lambda: answer(model, example)))
                said = why_untraceable(model, attempts, odd, leaves=bool(leaves or kinds), fixed=fix_branches)
                raise TraceError(said) from first
    finally:
        first = None  # its traceback holds this frame: a cycle that would keep the example alive
        if len(attempts) > 1:  # torch.export has failed, and leaves such cycles of its own
            gc.collect()
    for name, own in traced.originals.items():  # what these noted of themselves is gone, too
        vars(traced.graph_module.get_submodule(name)).clear()
        vars(traced.graph_module.get_submodule(name)).update(vars(own), inplace=False)
    if leaves and traced.tracer == "torch.export":
        shown = ", ".join(kind.__name__ for kind in leaves)
        traced.remarks.append(f"{shown} could not be leaves: {opened(attempts)}")
    for remark in traced.remarks:
        warnings.warn(f"trace: {remark}", TraceWarning, stacklevel=3)
    return traced


def _ways(
    model: nn.Module,
    example: Samples,
    tracer: fx.Tracer | None,
    leaves: Sequence[type[nn.Module]],
    fix_branches: bool,
) -> list[tuple[str, Callable[[], Traced]]]:
    ways: list[tuple[str, Callable[[], Traced]]] = [
        ("symbolic_trace", lambda: _symbolic(model, example, tracer or PathTracer(leaves)))
    ]
    if fix_branches:
        ways.append(
            (
                "symbolic_trace, branches fixed",
                lambda: _symbolic(model, example, _branch_tracer(model, example, leaves)),
            )
        )
    if tracer is None:
        ways += [
            ("torch.export", lambda: _export(model, example, functionalise=False)),
            ("torch.export, functionalised", lambda: _export(model, example, functionalise=True)),
        ]
    return ways


def _branch_tracer(model: nn.Module, example: Samples, leaves: Sequence[type[nn.Module]]) -> BranchTracer:
    own = example.map(torch.clone)  # the module may write to its input
    given = inspect.signature(model.forward).bind(*own.args, **own.kwargs)
    given.apply_defaults()
    return BranchTracer(leaves, given.arguments)


# --- symbolic tracing -----------------------------------------------------------------------------------------------


def _symbolic(model: nn.Module, example: Samples, tracer: fx.Tracer) -> Traced:
    parameters = parameters_of(model)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TraceError("forward takes *args or **kwargs, which symbolic_trace cannot bind")
    names = [parameter.name for parameter in parameters]
    given = dict(zip(names, example.args, strict=False)) | example.kwargs
    constants = {p.name: p.default for p in parameters if p.name not in given}
    constants |= {name: value for name, value in given.items() if not pytree.tree_any(_is_tensor, value)}
    graph = None
    if type(tracer) is PathTracer:  # what is computed from buffers then sees their later changes
        leaves = tracer.leaves
        found = unless_it_fails(lambda: _with_buffers(model, leaves, constants))
        tracer, graph = found or (tracer, None)
    graph = graph or tracer.trace(model, concrete_args=constants or None)
    if isinstance(tracer, PathTracer) and tracer.autocast is not None:
        raise TraceError(f"forward switches torch.autocast ({tracer.autocast}), which symbolic_trace would lose")
    module = fx.GraphModule(_spellable(tracer.root, graph), graph, type(model).__name__)
    _drop_constants(module, names, constants)
    inputs = [name for name in names if name not in constants]

    def bind(samples: Samples) -> list[Any]:
        values = dict(zip(names, samples.args, strict=False)) | samples.kwargs
        return [values[name] for name in inputs]

    name_stack(module)
    own = remove_in_place(module, bind(example))
    places = {name: place for place, name in enumerate(inputs)}
    remarks = stop_gradients(module) + (tracer.remarks() if isinstance(tracer, PathTracer) else [])
    return Traced(
        module, "symbolic_trace", bind, lambda output: output, arguments=places, originals=own, remarks=remarks
    )


def _spellable(root: nn.Module, graph: fx.Graph) -> nn.Module | dict[str, Any]:
    """What the graph reads and calls, by another name for keywords (`heads["class"]`) and fx's own names (`graph`)."""
    named: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            first, *others = parts = str(node.target).split(".")
            value = reduce(getattr, parts, root)
            first = f"{first}{_RENAMED}" if first in _FX_NAMES else first
            node.target = ".".join(
                f"{part}{_RENAMED}" if keyword.iskeyword(part) else part for part in (first, *others)
            )
            named[node.target] = value
    return named if any(_RENAMED in name for name in named) else root


def _constants(model: nn.Module, example: Samples) -> dict[str, Any]:
    """The example's arguments that hold no tensor, by name."""
    given = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments | example.kwargs
    return {name: value for name, value in given.items() if not pytree.tree_any(_is_tensor, value)}


def _with_buffers(
    model: nn.Module, leaves: Sequence[type[nn.Module]], constants: dict[str, Any]
) -> tuple[PathTracer, fx.Graph]:
    """The graph with buffers as nodes, and the tracer that made it."""
    again = PathTracer(leaves)
    again.buffers_as_nodes = True
    return again, again.trace(model, concrete_args=constants or None)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


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
    if constants:
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
    require_any_batch(program)
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

    name_stack(module)
    own = remove_in_place(module, bind(wide))
    places = example.places(inspect.signature(model.forward))
    unbind: Callable[[Any], Any] = lambda output: pytree.tree_unflatten(list(output), out_spec)  # noqa: E731
    return Traced(module, "torch.export", bind, unbind, arguments=places, originals=own)


__all__ = ["NAME", "AliasError", "Traced", "TracerName", "name_nodes", "plain_attention", "trace_module"]
