"""fxpath's own `fx.Tracer`: what it looks into, and what it records that fx's loses.

fx traces through wrappers, hooks, autograd functions and `no_grad` blocks as if they were not there. Here a wrapper is
opened, hooks and autograd functions become nodes that call them, and values made without gradients pass none on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from .dry import RUNS_HOOKS
from .inplace import InPlaceProxy
from .naming import NAME
from .reasons import line_of_caller
from .refusals import unwrapped

_STOPPED = "fxpath_stopped"  # node.meta key of the line that made a node where gradients were switched off
AUTOGRAD = "fxpath_autograd"  # attribute of functions that call an autograd function: that function
_ASKED_OF_SHAPES = ("shape", "ndim", "dtype", "device", "layout", "size", "dim", "numel", "stride", "ndimension")

# torch.nn's own modules that hold activations; every other one of torch.nn is a leaf
_OPENED = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


class PathTracer(fx.Tracer):
    """fx's tracer, with more leaf modules, and with in-place operators, hooks and custom gradients recorded as such.

    `scripted`, `recurrent` and `autocast` say what it met on its way: TorchScript modules, recurrent layers of
    rectifiers, and the line where autocast is switched;
    `functions` are what its graph calls for the autograd functions that it met.
    """

    def __init__(self, leaves: Sequence[type[nn.Module]] = ()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = tuple(leaves)
        self.buffers_as_nodes = False
        self._buffer_names: dict[int, str] = {}
        self.scripted: list[str] = []
        self.recurrent: list[str] = []
        self.autocast: str | None = None
        self._autocast_before: tuple[Any, ...] = ()
        self.functions: dict[type[torch.autograd.Function], Callable[..., Any]] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._autocast_before = _autocast_state()
        if self.buffers_as_nodes:
            self._buffer_names = {id(buffer): name for name, buffer in root.named_buffers()}
        plain = [part for part in root.modules() if not isinstance(part, torch.jit.ScriptModule)]
        kept = [(part._buffers, dict(part._buffers)) for part in plain]
        try:
            with _functions_recorded(self):
                return super().trace(root, concrete_args)
        finally:
            for buffers, before in kept:  # `self.calls += 1` would leave a proxy
                buffers.update(before)

    def remarks(self) -> list[str]:
        """What a user must know of the graph that its sites do not show."""
        scripted, recurrent = (", ".join(dict.fromkeys(paths)) for paths in (self.scripted, self.recurrent))
        said = []
        if scripted:
            said.append(
                f"{scripted} is TorchScript, a leaf: activations inside are no sites; give the Python module if they "
                "should be"
            )
        if recurrent:
            said.append(
                f"{recurrent} applies a ReLU at every step, within a leaf: these are no sites; write the steps out (a "
                "linear layer and a ReLU in a loop) if they should be"
            )
        return said

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule):
            self.scripted.append(module_qualified_name)
            return True
        if isinstance(m, self.leaves):
            return True
        if parametrize.is_parametrized(m) and not type(m).__bases__[0].__module__.startswith("torch.nn"):
            return False  # torch makes a class of its own for each such module
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _OPENED)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        name = self._buffer_names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is not None:
            if name not in parameter_proxy_cache:
                parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
            return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        if kind.startswith("call_"):
            if not torch.is_grad_enabled():
                node.meta[_STOPPED] = line_of_caller() or "an unknown line"
            if self.autocast is None and _autocast_state() != self._autocast_before:
                self.autocast = line_of_caller() or "an unknown line"
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        inner = unwrapped(m)
        if inner is not m and not _hooked(m):
            return inner(*args, **kwargs)
        if isinstance(m, torch.jit.ScriptModule) or self.is_leaf_module(m, self.path_of_module(m)):
            if getattr(m, "nonlinearity", None) == "relu" and isinstance(m, nn.RNN | nn.RNNCell):
                self.recurrent.append(self.path_of_module(m))
            return super().call_module(m, forward, args, kwargs)
        if not _hooked(m):
            return super().call_module(m, m.forward, args, kwargs)

        def within(*args: Any, **kwargs: Any) -> Any:  # not `forward`: that runs hooks, on proxies
            given = self._through(m, _run_pre_hooks, (args, kwargs)) if m._forward_pre_hooks else (args, kwargs)
            output = m.forward(*given[0], **given[1])
            return self._through(m, _run_hooks, output, *given) if m._forward_hooks else output

        return super().call_module(m, within, args, kwargs)  # the nodes of hooks are the module's own

    def _through(self, module: nn.Module, run: Callable[..., Any], value: Any, *more: Any) -> Any:
        """`value` after a node that calls the hooks of a module with the values there are when the graph runs."""
        leaves, form = pytree.tree_flatten(value)

        def hooks(leaves: Sequence[Any], *more: Any) -> list[Any]:
            given, found = pytree.tree_flatten(run(module, pytree.tree_unflatten(leaves, form), *more))
            if found != form:
                raise TypeError(f"a hook of {type(module).__name__} changes how many values there are")
            return given

        setattr(hooks, RUNS_HOOKS, self.path_of_module(module))
        node: Any = self.create_proxy("call_function", hooks, (leaves, *more), {})
        return pytree.tree_unflatten([node[number] for number in range(len(leaves))], form)


def _autocast_state() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    enabled = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in enabled)


# --- hooks ----------------------------------------------------------------------------------------------------------


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _run_pre_hooks(module: nn.Module, given: tuple[Any, Any]) -> tuple[Any, Any]:
    args, kwargs = given
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        else:
            changed = hook(module, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _run_hooks(module: nn.Module, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    for key, hook in list(module._forward_hooks.items()):
        named = (dict(kwargs),) if key in module._forward_hooks_with_kwargs else ()
        changed = hook(module, tuple(args), *named, output)
        output = output if changed is None else changed
    return output


# --- autograd functions ---------------------------------------------------------------------------------------------


def _calling(kind: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A function of the name of an autograd function, that calls it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    call.__name__ = call.__qualname__ = kind.__name__
    setattr(call, AUTOGRAD, kind)
    return call


@contextlib.contextmanager
def _functions_recorded(tracer: PathTracer) -> Iterator[None]:
    """Let autograd functions become nodes: fx would trace their forward and lose the gradient they define.

    The blocks of `torch.utils.checkpoint` are looked into instead: their gradient is that of what they hold.
    """
    plain = vars(torch.autograd.Function)["apply"]

    def apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))
        if kind is CheckpointFunction and traced:
            block, _, *inputs = args
            return block(*inputs)
        if not traced:
            return plain.__get__(None, kind)(*args, **kwargs)
        if kind not in tracer.functions:
            tracer.functions[kind] = _calling(kind)
        return tracer.create_proxy("call_function", tracer.functions[kind], args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = plain


# --- stopped gradients ----------------------------------------------------------------------------------------------


def without_gradient(value: Any) -> Any:
    """What a block under `torch.no_grad()` hands on: the same values, detached."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)


def asks_of_shapes(node: fx.Node) -> bool:
    """Whether a node's value depends on the shapes of its inputs alone."""
    return (node.args[1] if node.target is getattr else node.target) in _ASKED_OF_SHAPES


def stop_gradients(module: fx.GraphModule) -> list[str]:
    """Detach what was made under `torch.no_grad()` where nodes outside of it read it, as the module does.

    Returns a remark for each line that did so with values of the input.
    """
    graph = module.graph
    moving: set[fx.Node] = set()
    lines: dict[str, None] = {}
    changed = False
    for node in list(graph.nodes):
        if node.op == "placeholder" or (not moving.isdisjoint(node.all_input_nodes) and not asks_of_shapes(node)):
            moving.add(node)
        outside = [user for user in node.users if _STOPPED not in user.meta]
        if _STOPPED in node.meta and outside:
            with graph.inserting_after(node):
                detached = graph.call_function(without_gradient, (node,))
            detached.meta = {NAME: f"{node.meta[NAME]}.without_gradient"}
            for user in outside:
                user.replace_input_with(node, detached)
            if node in moving:
                lines[node.meta[_STOPPED]] = None
                moving.add(detached)
            changed = True
    if changed:
        graph.lint()
        module.recompile()
    return [
        f"the gradient stops in a block without gradients ({line}), as in the module: what lies before gets none. Take "
        "torch.no_grad() or inference_mode() out of forward if it should"
        for line in lines
    ]
