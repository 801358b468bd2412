"""Responses: the one real number per sample whose neurons are looked for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import InputError
from .samples import class_numbers, type_of_target


@runtime_checkable
class Response(Protocol):
    """What Φ is: read from the network's output, one number per sample."""

    @property
    def name(self) -> str:
        """A short name, kept in stores."""

    def logits(self, output: Any) -> Tensor | None:
        """The output's class scores `(B, classes)`, or None where the response knows no classes."""

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:
        """Φ, `(B,)`, differentiable; `target` is `(B,)` int64 or None for responses without classes."""


def class_scores(output: Any, key: str | int | None, name: str) -> Tensor:
    """The `(B, classes)` tensor of a network's output, or an `InputError` that says what the output is instead."""
    picked = output
    if key is not None:
        try:
            picked = output[key]
        except (KeyError, IndexError, TypeError):
            has = sorted(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
            raise InputError(f"response {name!r}: expected an output with {key!r}, found {has}") from None
    if not (isinstance(picked, Tensor) and picked.ndim == 2):
        found = f"a tensor {tuple(picked.shape)}" if isinstance(picked, Tensor) else type(picked).__name__
        if isinstance(picked, Mapping):
            found += f" with keys {sorted(map(str, picked))}"
        elif isinstance(picked, tuple | list):
            found += f" of {len(picked)}"
        raise InputError(
            f"response {name!r}: expected class scores (B, classes) as the network's output, found {found}; pick a "
            "part of it with response=fxpath.responses.Logit(output=…), or pass a function of the output, (B,)"
        )
    return picked


def resolve_target(logits: Tensor | None, target: type_of_target) -> Tensor | None:
    """The class to explain for each sample, `(B,)` int64 on the device of the logits.

    None means the class with the largest logit (the first of equals). Raises `InputError` for a class out of range.
    """
    if logits is None:
        if target is not None:
            raise InputError("target: this response knows no classes; leave the target out")
        return None
    if target is None:
        return _for_gradients(logits.detach().argmax(dim=1))
    wanted = class_numbers(target).to(logits.device)
    if wanted.numel() not in (1, logits.shape[0]):
        raise InputError(f"target: expected one class, or {logits.shape[0]}, one a sample, found {wanted.numel()}")
    wanted = wanted.expand(logits.shape[0])
    outside = (wanted < 0) | (wanted >= logits.shape[1])
    if bool(outside.any()):
        row = int(torch.nonzero(outside)[0, 0])
        raise InputError(
            f"target: expected a class in 0 … {logits.shape[1] - 1}, found {int(wanted[row])} (row {row} of the batch)"
        )
    return _for_gradients(wanted)


def _for_gradients(tensor: Tensor) -> Tensor:
    """A copy of what was made in inference mode: a backward pass may keep it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _of_target(values: Tensor, target: Tensor | None) -> Tensor:
    if target is None:
        raise InputError("response: expected a target class for each sample, found none")
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class Logit:
    """The pre-softmax score of the target class (the paper's response, §3). `output` picks a part of the output."""

    output: str | int | None = None
    name = "logit"

    def logits(self, output: Any) -> Tensor:
        return class_scores(output, self.output, self.name)

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:
        return _of_target(self.logits(output), target)


@dataclass(frozen=True)
class Probability:
    """The softmax probability of the target class."""

    output: str | int | None = None
    name = "probability"

    def logits(self, output: Any) -> Tensor:
        return class_scores(output, self.output, self.name)

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:
        return _of_target(self.logits(output).softmax(dim=1), target)


@dataclass(frozen=True)
class Margin:
    """The target's logit minus another's: minus class `against`, or minus the largest of the others."""

    against: int | None = None
    output: str | int | None = None
    name = "margin"

    def logits(self, output: Any) -> Tensor:
        return class_scores(output, self.output, self.name)

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:
        scores = self.logits(output)
        own = _of_target(scores, target)
        if self.against is not None:
            if not 0 <= self.against < scores.shape[1]:
                raise InputError(f"margin: expected a class in 0 … {scores.shape[1] - 1}, found {self.against}")
            return own - scores[:, self.against]
        if scores.shape[1] < 2:
            raise InputError("margin: expected at least two classes, found one; use logit")
        if target is None:
            raise InputError("margin: expected a target class for each sample, found none")
        return own - scores.scatter(1, target.unsqueeze(1), -torch.inf).amax(dim=1)


@dataclass(frozen=True)
class OutputFunction:
    """Any function of the network's output that gives one real number per sample, `(B,)`."""

    function: Callable[[Any], Tensor]

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def logits(self, output: Any) -> None:  # noqa: ARG002  (the protocol's signature)
        return None

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:  # noqa: ARG002
        return self.function(output)


logit = Logit()
probability = Probability()
margin = Margin()


def checked_response(response: Response | Callable[[Any], Tensor] | str) -> Response:
    """A response from a response, its name, or a plain function of the output."""
    if isinstance(response, str):
        named: dict[str, Response] = {"logit": logit, "probability": probability, "margin": margin}
        if response not in named:
            raise InputError(f"response: expected one of {', '.join(named)}, or a function, found {response!r}")
        return named[response]
    if isinstance(response, type):
        name = response.__name__
        raise InputError(f"response: expected an instance, found the class {name}; call it: {name}()")
    if isinstance(response, Response):
        return response
    if callable(response):
        return OutputFunction(response)
    raise InputError(f"response: expected a Response, its name or a function, found {type(response).__name__}")


def identity(response: Response) -> str:
    """What tells a response from others of its name: its parameters, or a hash of the function's code.

    "" for the named responses without parameters.
    """
    if response in (logit, probability, margin):
        return ""
    function = response.function if isinstance(response, OutputFunction) else None
    if function is None:
        return repr(response) if dataclasses.is_dataclass(response) else type(response).__qualname__
    place = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    code = getattr(function, "__code__", None)
    if code is None:
        return place
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held = [each if isinstance(each, int | float | str | tuple | None) else type(each) for each in held]
    said = repr((_said(code), held, getattr(function, "__defaults__", None)))
    return f"{place} {hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _said(code: CodeType) -> str:
    """A function's code as text, without where it was written."""
    constants = [_said(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return repr((code.co_code, code.co_names, constants))


def respond(response: Response, output: Any, target: Tensor | None, batch: int) -> Tensor:
    """Φ of a batch, checked to be one real number per sample."""
    value = response(output, target)
    if not isinstance(value, Tensor) or value.shape != (batch,) or value.is_complex():
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"response {response.name!r}: expected one real number per sample, ({batch},), found {found}")
    if not value.is_floating_point():
        raise InputError(
            f"response {response.name!r}: expected a floating-point number per sample, which has a gradient, found "
            f"{value.dtype}; a count or a class number has none"
        )
    return value


def sequence_of(target: type_of_target, batch: int) -> Sequence[int]:
    """A resolved or plain target as a list of `batch` ints."""
    values = torch.as_tensor(target).flatten().tolist()
    return values * batch if len(values) == 1 else values
