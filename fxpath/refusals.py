"""What a model and its example must be before they are traced; each refusal names the module and the way out."""

from __future__ import annotations

import inspect
import operator

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator

from .errors import InputError, ModelError, TraceError
from .samples import Samples

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")
_QUANTISED = (  # packages of torch; QuantStub and DeQuantStub do nothing in a floating-point model
    "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized", "torch.ao.nn.qat",
    "torch.ao.nn.intrinsic.qat", "torch.ao.nn.quantizable", "torch.ao.quantization.fake_quantize",
    "torch.ao.quantization.observer",
)  # fmt: skip


def unwrapped(module: nn.Module) -> nn.Module:
    """The module within wrappers that change nothing of what it computes: parallel ones, `torch.compile`."""
    while True:
        inner = module.module if isinstance(module, _WRAPPERS) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def traceable(model: nn.Module) -> nn.Module:
    """The model itself, out of its wrappers; raises `ModelError` where no graph of it could be used."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"trace: expected an nn.Module, found {type(model).__name__}")
    bare = unwrapped(model)
    if bare is not model and (model._forward_hooks or model._forward_pre_hooks):
        raise ModelError(
            f"trace: the wrapper {type(model).__name__} has hooks of its own, which a graph of what it holds would "
            f"lose; register them on the {type(bare).__name__} in it"
        )
    _require_plain_python(bare)
    _require_evaluation(bare)
    _require_usable_tensors(bare)
    return bare


def _require_plain_python(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"trace: the model is TorchScript (a ScriptModule, {type(model).__name__}), which no tracer reads; give "
            "the Python module that it was made of, and load its weights with load_state_dict"
        )
    for path, module in model.named_modules():
        kinds = type(module).__mro__
        name = f"{path or 'the model'} ({type(module).__module__}.{type(module).__name__})"
        if any(kind.__module__.startswith(_QUANTISED) for kind in kinds):
            raise ModelError(
                f"trace: {name} is quantised or observes for quantisation, where no true gradient passes; trace the "
                "floating-point model that it was made of"
            )
        if any(kind.__name__ in _SHARDED for kind in kinds):
            raise ModelError(
                f"trace: {name} keeps its parameters in shards (FSDP); gather them into a plain model on "
                "one device and trace that"
            )


def _require_evaluation(model: nn.Module) -> None:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        shown = ", ".join(training[:5]) + (f" … ({len(training)} modules)" if len(training) > 5 else "")
        raise ModelError(
            f"trace: {type(model).__name__} is in training mode ({shown}); pathways are defined for the network in "
            "evaluation mode. Call model.eval() first"
        )


def _require_usable_tensors(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            owner = model.get_submodule(name.rpartition(".")[0])
            raise ModelError(
                f"trace: {name} of {type(model).__name__} has no shape yet; run the model once, model(x), before (it "
                f"belongs to a {type(owner).__name__})"
            )
        if tensor.is_inference():
            raise ModelError(
                f"trace: {name} of {type(model).__name__} was made in inference mode, so no gradient can pass it; make "
                "or load the model outside of torch.inference_mode(), or take copy.deepcopy(model) outside of it"
            )


def require_one_device(model: nn.Module, example: Samples, *, values: bool) -> None:
    """Raise where parameters are on several devices (`ModelError`) or on another than the example (`InputError`).

    With `values`, the meta device is refused as well, as nothing can be computed and compared there.
    """
    homes: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        homes.setdefault(parameter.device, name)
    if values and torch.device("meta") in homes:
        raise ModelError(
            f"trace: {homes[torch.device('meta')]} of {type(model).__name__} is on the meta device and has no values; "
            "make it with model.to_empty(device=…) and load its weights, or list its sites alone: check=False"
        )
    if len(homes) > 1:
        shown = ", ".join(f"{name} on {device}" for device, name in homes.items())
        raise ModelError(
            f"trace: the parameters of {type(model).__name__} are on several devices ({shown}); move them to one: "
            "model.to(device)"
        )
    if homes and example.device not in homes:
        raise InputError(
            f"trace: the example is on {example.device}, the model on {', '.join(map(str, homes))}; move one of them: "
            "x = x.to(device)"
        )


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def require_arguments(model: nn.Module, example: Samples) -> None:
    try:
        inspect.signature(model.forward).bind(*example.args, **example.kwargs)
    except TypeError as error:
        takes = ", ".join(parameter.name for parameter in parameters_of(model))
        gives = ", ".join(example.kwargs) or f"{len(example.args)} in order"
        raise InputError(
            f"trace: {type(model).__name__}.forward takes the arguments ({takes}), the example gives {gives}: {error}; "
            "give a tuple of all in order or a dict by name (the command line knows models of one image alone: use "
            "fxpath.trace and fxpath.compute)"
        ) from None


def require_open(module: fx.GraphModule) -> None:
    """Raise `TraceError` where a node holds a graph of its own, whose activations would be no sites."""
    for node in module.graph.nodes:
        name = str(node.target)
        if isinstance(node.target, HigherOrderOperator) and not name.startswith("flex_attention"):
            inner = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
            if any(isinstance(operator.attrgetter(path)(module), fx.GraphModule) for path in inner):
                raise TraceError(
                    f"the operator {name} holds graphs of its own, whose activations cannot be sites; put it in a "
                    "module that is a leaf"
                )


def require_any_batch(program: torch.export.ExportedProgram) -> None:
    """Raise `TraceError` where a graph holds for some batch sizes alone: the model's code compares them."""
    for symbol, sizes in program.range_constraints.items():
        bounded = str(sizes.upper) != "int_oo"
        if str(symbol).startswith("s") and (bounded or sizes.lower > 2):  # a tensor of values may have any bound
            raise TraceError(
                f"the graph holds for batch sizes {sizes.lower} to {sizes.upper} alone: a line compares them"
            )
