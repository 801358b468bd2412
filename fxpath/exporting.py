"""A restricted network as a plain `torch.fx.GraphModule`, which needs torch alone to be saved, loaded and run."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .activations import classify
from .branches import Branch
from .dry import RUNS_HOOKS
from .equality import short
from .errors import FxpathError, ModelError
from .gates import Restriction
from .inplace import original_path
from .naming import NAME
from .neurons import NeuronIndex
from .nodes import altered, called_module
from .rewriting import GATES, gate
from .tracers import AUTOGRAD, without_gradient
from .tracing import Traced

_PACKAGE = __name__.partition(".")[0]
_KEPT = ("is_wrapped",)  # of a node's meta: without it a saved function of another package would be looked into
_CONSTANTS = (*fx.node.base_types, type(None))
_OUTPUT = "the output"
_DETACHED = partial(pytree.tree_map_only, Tensor, Tensor.detach)  # what `without_gradient` does


def exported(traced: Traced, index: NeuronIndex, restriction: Restriction) -> fx.GraphModule:
    """The gated graph of `traced` with this restriction (bool λ) written into it, on copies of all tensors.

    Every gate becomes `torch.where` on buffers of the new module; one that leaves a whole site open goes away, and so
    do the checks of fixed branches. Raises `ModelError` in training mode, for hooks that the graph calls, and where a
    module cannot be copied or a part of the graph has no plain form.
    """
    writer = _Writer(traced, index, restriction)
    try:
        with torch.inference_mode(False):
            return writer.module()
    except (FxpathError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        way_out = "pass the module around it over when tracing: leaves=(ModuleType, …)"
        if writer.place == _OUTPUT:
            way_out = "trace a module around the model that gives a tensor, tuple or dict"
        raise ModelError(
            f"export: {writer.place} of {type(writer.source).__name__} has no plain form: {short(problem)}; {way_out}"
        ) from problem


class _Writer:
    """Writes a gated graph anew, node by node."""

    def __init__(self, traced: Traced, index: NeuronIndex, restriction: Restriction) -> None:
        self.traced = traced
        self.source = traced.graph_module
        self.index = index
        self.restriction = restriction
        self.graph = fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.graph)
        self.values: dict[fx.Node, Any] = {}  # node of the gated graph → what stands for it in the new one
        self.fixed: dict[fx.Node, Any] = {}  # values that depend on no input and no parameter
        self.named = _names(self.source)
        self.held: dict[str, Any] = {}  # what the graph reads and calls, by its name in the new module
        self.buffers: dict[str, Tensor] = {}
        self.guarded = False  # whether the graph looks at the size of the batch
        self.place = "the graph"  # what is being written, as errors call it
        self.room = "pathway"  # the new module's child that has the masks and constants
        while any(name.partition(".")[0] == self.room for name in self.named.values()):
            self.room += "_"
        self.batch = max(
            (len(given) for given in (*restriction.scale, *restriction.shift) if given is not None), default=1
        )

    def module(self) -> fx.GraphModule:
        self._bind()
        checks = _checks(self.source.graph)
        for node in self.source.graph.nodes:
            self.place = _OUTPUT if node.op == "output" else str(node.meta[NAME])
            if node.op == "output":
                self.graph.output(self._plain(self.traced.unbind(self._proxies(node.args[0]))))
            elif self._is_fixed(node):
                self.fixed[node] = self._found(node)
            elif node.op != "placeholder" and node not in checks and not _is_answer(node):
                self.values[node] = self._written(node)
        self.place = "the graph"
        self.graph.lint()
        try:
            own = copy.deepcopy(self.held)  # in one go, so that what is shared stays shared
        except Exception as problem:
            raise ModelError(
                f"export: a part of {type(self.source).__name__} cannot be copied: {short(problem)}; take what is no "
                "leaf tensor (old-style weight or spectral norm) out of it first: torch.nn.utils.remove_weight_norm(…)"
            ) from problem
        own |= self.buffers
        for name in _cut_by_numbers(self.graph):
            if not isinstance(own[name], nn.Parameter):
                own[name] = nn.Parameter(own[name], requires_grad=False)
        return fx.GraphModule(own, self.graph, type(self.source).__name__).eval()

    def _proxy(self, node: fx.Node) -> Any:
        """What stands for a node where code is written as usual; it appends to the graph."""
        return fx.Proxy(node, self.tracer)

    def _proxies(self, value: Any) -> Any:
        """What stands for the nodes of the gated graph in a value, in the same way; answers stay nodes."""
        return fx.map_arg(
            value, lambda n: n if _is_answer(n) else pytree.tree_map_only(fx.Node, self._proxy, self._value(n))
        )

    def _bind(self) -> None:
        """The model's own arguments, and what the graph reads of each.

        Those of the example that hold no tensor come last and have its values, and no others, as the graph does.
        """
        old = [node for node in self.source.graph.nodes if node.op == "placeholder" and node.target != GATES]
        places = {
            name: [(path, place) for path, place in pytree.tree_flatten_with_path(tree)[0] if place is not None]
            for name, tree in self.traced.arguments.items()
        }
        given = {name: self._proxy(self.graph.placeholder(name)) for name, found in places.items() if found}
        for name, value in self.traced.constants.items():
            if name not in given and isinstance(value, _CONSTANTS):
                own = self.graph.placeholder(name, default_value=value)
                same = self.graph.call_function(operator.eq, (own, value))  # loading a saved module runs it on proxies
                said = f"{name}: expected {value!r}, as in the example; it is part of the graph"
                self.graph.call_function(torch._assert, (same, said))
        for name, argument in given.items():
            for path, place in places[name]:
                self.values[old[place]] = reduce(lambda value, key: key.get(value), path, argument).node

    def _is_fixed(self, node: fx.Node) -> bool:
        """Whether the node's value never changes.

        Such operations become one buffer: loading a saved module would run them, and find new buffers for the results.
        """
        if node.op == "get_attr":
            value = _attribute(self.source, str(node.target))
            return isinstance(value, Tensor) and not value.requires_grad and not isinstance(value, nn.Parameter)
        steady = isinstance(node.target, torch._ops.OpOverload) and not node.is_impure()
        if not steady or torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
            return False
        return all(source in self.fixed for source in node.all_input_nodes)

    def _found(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return _attribute(self.source, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.fixed.__getitem__)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, node: fx.Node) -> Any:
        """What stands for a node of the gated graph where it is read."""
        if node not in self.values and node.op == "get_attr":
            self.values[node] = self._written(node)
        elif node not in self.values:
            self.values[node] = pytree.tree_map_only(
                Tensor,
                lambda leaf: self._buffer(f"fixed_{len(self.buffers)}", leaf.clone()).node,
                self.fixed[node],
            )
        return self.values[node]

    def _written(self, node: fx.Node) -> Any:
        if node.target is gate:
            return self._gate(node)
        if node.op == "call_function" and str(getattr(node.target, "__module__", "")).partition(".")[0] == _PACKAGE:
            return self._own(node)
        called = called_module(node)
        if called is not None and any(part.training for part in called.modules()):
            raise ModelError("export: the model is in training mode since it was traced; call model.eval()")
        name = self.named.get(str(node.target), "") if node.op in ("get_attr", "call_module") else ""
        if isinstance(called, nn.MultiheadAttention) and _has_fused_kernel(called):
            return self._attention(node, called, name)
        new = self.graph.node_copy(node, self._value)
        new.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
        if name:
            new.target = name
            self.held[name] = _attribute(self.source, str(node.target)) if called is None else called
        return new

    def _own(self, node: fx.Node) -> fx.Node:
        """What a function of fxpath's does, by means of torch alone."""
        target: Any = node.target
        hooked = getattr(target, RUNS_HOOKS, None)
        if hooked is not None:
            raise ModelError(
                f"export: {hooked} has forward hooks or pre-hooks, which a plain module cannot call; remove them "
                "before tracing (handle.remove()), or pass the module over, hooks and all: leaves=(ModuleType, …)"
            )
        function = getattr(target, AUTOGRAD, None)
        if function is not None:
            return self._called(node, function.__name__, function.apply)
        if target is without_gradient:
            return self._called(node, "detach", _DETACHED)
        args, kwargs = self._proxies((node.args, node.kwargs))
        return target(*args, **kwargs).node  # type: ignore[no-any-return]  # written out as torch's own operations

    def _called(self, node: fx.Node, name: str, function: Callable[..., Any]) -> fx.Node:
        """A call that nothing looks into, also when a saved module is loaded: that of a module of its own."""
        name = f"{self.room}.call_{name}"
        while name in self.held and self.held[name].forward != function:
            name += "_"
        self.held.setdefault(name, nn.Module()).forward = function
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        return self.graph.call_module(name, args, kwargs)

    def _gate(self, node: fx.Node) -> fx.Node:
        """The value of a site: `torch.where(mask, activation, constant)`, laid out in memory as the activation is."""
        source, number = node.args[0], int(node.args[2])  # type: ignore[arg-type]
        activation: fx.Node = self._value(source)  # type: ignore[arg-type]
        mask, constant = self.restriction.scale[number], self.restriction.shift[number]
        # a known activation is dense in memory already, and so open is the same as no gate
        if mask is None or (bool(mask.all()) and classify(source) is not None):  # type: ignore[arg-type]
            return activation
        site, value = self.index.sites[number], self._proxy(activation)
        off = 0.0 if constant is None else self._buffer(f"constant_{number}", _dense(constant))
        if self.batch > 1 and not self.guarded:
            self.guarded = True
            torch._assert(
                value.shape[0] == self.batch * site.fold,
                f"this network is restricted to {self.batch} pathways, one a sample: expected a batch of {self.batch}",
            )
        block = value.view(-1, *site.shape) if site.fold > 1 else value
        chosen: Any = torch.where(self._buffer(f"mask_{number}", _dense(mask)), block, off)
        chosen = chosen.flatten(0, 1) if site.fold > 1 else chosen
        like: Any = torch.empty_like(value)
        return like.copy_(chosen).node  # type: ignore[no-any-return]  # kernels, and last bits, go by memory format

    def _buffer(self, name: str, tensor: Tensor) -> Any:
        name = f"{self.room}.{name}"
        self.buffers[name] = tensor
        return self._proxy(self.graph.get_attr(name))

    def _attention(self, node: fx.Node, called: nn.MultiheadAttention, name: str) -> Any:
        """Attention that takes the sequence first, between transpositions.

        With the batch first it would take torch's fused kernel wherever no gradient is asked for, which has other last
        bits; a network's restrictions keep it from that.
        """
        twin = copy.copy(called)  # shares everything with the caller's module but this one flag
        twin.batch_first = False
        self.held[name] = twin
        bound = inspect.signature(called.forward).bind(*node.args, **node.kwargs)
        turned: dict[Any, fx.Node] = {}  # the same tensor as query and key stays one
        for role in ("query", "key", "value"):
            given = bound.arguments[role]
            if given not in turned:
                turned[given] = self._proxy(self._value(given)).transpose(-3, -2).node
            bound.arguments[role] = turned[given]
        args, kwargs = fx.map_arg((bound.args, bound.kwargs), lambda n: n if n in turned.values() else self._value(n))
        answer = self._proxy(self.graph.call_module(name, args, kwargs))
        return (answer[0].transpose(-3, -2).node, answer[1].node)

    def _plain(self, value: Any) -> Any:
        """An output in the model's own structure, dataclasses as dicts of the fields that they have.

        Named tuples are plain ones, so that their class need not be there later.
        """
        if isinstance(value, fx.Proxy):
            return value.node
        if isinstance(value, fx.Node):
            if _is_answer(value) and value.kwargs:
                return self._fields(value.kwargs)
            return tuple(map(self._plain, value.args)) if _is_answer(value) else self._value(value)
        if is_dataclass(value) and not isinstance(value, type):
            return self._fields({part.name: getattr(value, part.name) for part in fields(value)})
        if isinstance(value, Mapping):
            return {key: self._plain(part) for key, part in value.items()}
        if isinstance(value, tuple | list):
            parts = [self._plain(part) for part in value]
            return tuple(parts) if isinstance(value, tuple) else parts
        if isinstance(value, _CONSTANTS):
            return value
        raise ModelError(
            f"export: expected an output of tensors, tuples, lists, dicts and dataclasses, found a "
            f"{type(value).__name__}; trace a module around the model that gives one of these"
        )

    def _fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._plain(value) for name, value in values.items() if value is not None}


def _dense(tensor: Tensor) -> Tensor:
    """A copy that shares no memory, that of a view of a larger tensor no larger than itself."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _cut_by_numbers(graph: fx.Graph) -> set[str]:
    """Tensors that are indexed by values of the graph, as a table of positions is by a length.

    Loading a saved module runs its code on proxies, which a buffer cannot be indexed by; a parameter is one, too.
    """
    found = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            readers = [user for user in node.users if user.target is operator.getitem or user.op == "call_method"]
            if any(len(user.all_input_nodes) > 1 for user in readers):
                found.add(str(node.target))
    return found


def _is_answer(node: fx.Node) -> bool:
    """Whether a node only puts the output into a dataclass or named tuple, whose class need not be there later."""
    target = node.target
    makes = isinstance(target, type) and (
        is_dataclass(target) or (issubclass(target, tuple) and hasattr(target, "_fields"))
    )
    return makes and all(user.op == "output" for user in node.users)


def _checks(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that check an input's branches, and those that only they read.

    They are of no use: a restricted network keeps the example's branches.
    """
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        asked = node.op in ("call_function", "call_method") and node.users and found.issuperset(node.users)
        if asked or isinstance(node.target, Branch):
            found.add(node)
    return found


def _has_fused_kernel(called: nn.MultiheadAttention) -> bool:
    return type(called) is nn.MultiheadAttention and called.batch_first and not altered(called)


def _attribute(module: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), module)


def _names(module: fx.GraphModule) -> dict[str, str]:
    """A name in the new module for every target of the graph: the model's own, one for each tensor."""
    nodes = [node for node in module.graph.nodes if node.op in ("get_attr", "call_module")]
    targets = {str(node.target) for node in nodes}
    found = {target: original_path(target) for target in targets}
    found |= {target: target for target, name in found.items() if name != target and name in targets}
    homes: dict[int, str] = {}
    for node in nodes:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            tensors = (*called.named_parameters(remove_duplicate=False), *called.named_buffers(remove_duplicate=False))
            for name, tensor in tensors:
                homes.setdefault(id(tensor), f"{found[str(node.target)]}.{name}")
    for node in nodes:
        if node.op == "get_attr":
            target = str(node.target)
            found[target] = homes.setdefault(id(_attribute(module, target)), found[target])
    return found
