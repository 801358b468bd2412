"""What a model must be before it is traced, and the reasons why it cannot be."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence

import torch
from torch import nn

from .equality import short
from .errors import InputError, ModelError
from .samples import Samples


def require_evaluation(model: nn.Module) -> None:
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


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def require_arguments(model: nn.Module, example: Samples) -> None:
    try:
        inspect.signature(model.forward).bind(*example.args, **example.kwargs)
    except TypeError as error:
        takes = ", ".join(parameter.name for parameter in parameters_of(model))
        gives = ", ".join(example.kwargs) or f"{len(example.args)} in order"
        raise InputError(
            f"trace: {type(model).__name__}.forward takes the arguments ({takes}), the example gives {gives}: {error}"
        ) from None


def _source_line(error: BaseException) -> str | None:
    """The line of the user's code at which tracing stopped: the last frame outside torch and fxpath."""
    inside = (f"{torch.__path__[0]}/", "<eval_with_key>", "<string>", "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(inside)]
    frames = [frame for frame in frames if not frame.filename.endswith(("fxpath/tracing.py", "fxpath/inplace.py"))]
    if not frames:
        return None
    last = frames[-1]
    return f'{last.filename}:{last.lineno}, in {last.name}: "{last.line}"'


def described(name: str, error: Exception) -> str:
    line = _source_line(error)
    return f"{name}: {short(error)}" + (f"\n    at {line}" if line else "")


def why_untraceable(model: nn.Module, attempts: Sequence[str]) -> str:
    said = [f"trace: no graph equals {type(model).__name__}.", *(f"  {attempt}" for attempt in attempts)]
    said.append(
        "Ways out: pass leaves=(ModuleType, …) for modules that need not be looked into, a tracer=… of your own, or "
        "rewrite the line so that it does not branch on values (an example that fixes the branch)"
    )
    return "\n".join(said)
