"""Responses: the one real number per sample whose neurons are looked for."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .class_responses import ClassResponse, Logit, Margin, Probability, resolve_target
from .contents import contents
from .errors import FxpathError, InputError, unknown
from .hidden import Hidden, Neuron, neuron
from .keys import parse_parameters
from .outputs import listing, read_path, type_of_part
from .places import Detection, Mask, Pixel, Place, Region, Token
from .samples import type_of_target

__all__ = [
    "ClassResponse", "Detection", "Hidden", "Logit", "Margin", "Mask", "Neuron", "OutputFunction", "Pixel", "Place",
    "Probability", "Region", "Response", "Token", "checked_response", "detection", "identity", "logit", "margin",
    "neuron", "pixel", "probability", "region", "require_fit", "resolve_target", "respond", "sequence_of", "token",
]  # fmt: skip


@runtime_checkable
class Response(Protocol):
    """What Φ is: read from the network's output, one number per sample.

    One that reads a node within the network in its place is a `Hidden` as well: it names the node.
    """

    @property
    def name(self) -> str:
        """A short name, kept in stores."""

    def logits(self, output: Any) -> Tensor | None:
        """The output's class scores `(B, classes)`, or None where the response knows no classes."""

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:
        """Φ, `(B,)`, differentiable; `target` is `(B,)` int64 or None for responses without classes."""


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


def _placed(place: Place, of: ClassResponse | str, output: type_of_part) -> ClassResponse:
    found = checked_response(of)
    if not isinstance(found, Logit | Probability | Margin) or found.at is not None:
        raise InputError(f"{place.kind}: expected of='logit', 'probability' or 'margin', found {of!r}")
    return replace(found, at=place, output=found.output if output is None else output)


def pixel(
    row: int, column: int | None = None, *more: int, of: ClassResponse | str = "logit", output: type_of_part = None
) -> ClassResponse:
    """The response `of` at one point of a map `(B, classes, …)`; one coordinate for each axis in space.

    >>> pixel(10, 20, output="out").name
    'pixel:row=10,column=20,output=out'
    """
    return _placed(Pixel(*(row,) if column is None else (row, column, *more)), of, output)


def region(
    *box: int, mask: Any = None, of: ClassResponse | str = "logit", output: type_of_part = None
) -> ClassResponse:
    """The response `of` over a region of a map `(B, classes, …)`; `box` and `mask` are those of `Region`.

    >>> region(0, 0, 8, 8, of=Margin(against=3)).name
    'region:box=0/0/8/8,of=margin,against=3'
    """
    return _placed(Region(*box, mask=mask), of, output)


def token(position: int, *, of: ClassResponse | str = "logit", output: type_of_part = None) -> ClassResponse:
    """The response `of` at one position of a sequence `(B, positions, classes)`, from the end where it is negative."""
    return _placed(Token(position), of, output)


def detection(box: int, *, of: ClassResponse | str = "logit", output: type_of_part = None) -> ClassResponse:
    """The response `of` at one box of a detector's scores `(B, boxes, classes)`."""
    return _placed(Detection(box), of, output)


def _numbers(said: str, text: str) -> tuple[int, ...]:
    parts = text.split("/")
    if not all(part.removeprefix("-").isdecimal() for part in parts):
        raise InputError(f"{said}: expected whole numbers joined by '/', such as 5/2/2, found {text!r}")
    return tuple(map(int, parts))


_OF: Mapping[str, type] = {"of": str, "against": int, "output": str}
_FORMS: dict[str, Mapping[str, type]] = {
    "logit": {"output": str},
    "probability": {"output": str},
    "margin": {"against": int, "output": str},
    "pixel": {"row": int, "column": int, "at": str, **_OF},
    "region": {"box": str, **_OF},
    "token": {"position": int, **_OF},
    "detection": {"box": int, **_OF},
    "neuron": {"site": str, "at": str, "channel": int},
}


def parse_response(text: str) -> Response:
    """A response from its text form, `name[:param=value,…]`; places and paths join their parts by "/".

    Raises `InputError` for a name or parameter that is not there, and for a place that is not said in full.

    >>> parse_response("pixel:row=10,column=20,output=out,of=probability")
    Probability(output='out', at=Pixel(coordinates=(10, 20)))
    >>> parse_response("neuron:site=layer3.0.relu,channel=5").name
    'neuron:site=layer3.0.relu,channel=5'
    """
    kind, _, rest = text.partition(":")
    if kind not in _FORMS:
        raise InputError(unknown("response", kind, _FORMS, way_out="A function of the output is a response, too"))
    said = f"response {text!r}"
    given = parse_parameters(said, rest, _FORMS[kind], lambda name: (_FORMS[kind][name],))
    coordinates = _numbers(said, given["at"]) if "at" in given else None
    if kind == "neuron":
        if "site" not in given:
            raise InputError(f"{said}: expected site=NAME and at=5/2/2 or channel=5, found no site")
        return neuron(given["site"], coordinates, channel=given.get("channel"))
    output = read_path(given["output"]) if "output" in given else None
    of = given.get("of", kind if kind in ("logit", "probability", "margin") else "logit")
    if "against" in given and of != "margin":
        raise InputError(f"{said}: against=… is for a margin; add of=margin")
    if of not in ("logit", "probability", "margin"):
        raise InputError(f"{said}: {unknown('response with classes', of, ('logit', 'probability', 'margin'))}")
    made: ClassResponse = Margin(given.get("against"), output)
    if of != "margin":
        made = Logit(output) if of == "logit" else Probability(output)
    if kind == of:
        return made
    if kind == "pixel":
        sides = (given.get("row"), given.get("column"))
        if None in sides if coordinates is None else sides != (None, None):
            raise InputError(f"{said}: expected row=… and column=…, or at=… with all coordinates, as in at=4/10/20")
        return pixel(*(coordinates or sides), of=made)
    if kind == "region":
        return region(*(_numbers(said, given["box"]) if "box" in given else ()), of=made)
    needed = "position" if kind == "token" else "box"
    if needed not in given:
        raise InputError(f"{said}: expected {needed}=…, found none")
    return (token if kind == "token" else detection)(given[needed], of=made)


def checked_response(response: Response | Callable[[Any], Tensor] | str) -> Response:
    """A response from a response, its text form, or a plain function of the output."""
    if isinstance(response, str):
        return parse_response(response)
    if isinstance(response, type):
        name = response.__name__
        raise InputError(f"response: expected an instance, found the class {name}; call it: {name}()")
    if isinstance(response, Response):
        return response
    if callable(response):
        return OutputFunction(response)
    raise InputError(f"response: expected a Response, its name or a function, found {type(response).__name__}")


def identity(response: Response) -> str:
    """What tells a response from others of its name: its parameters, or a hash of its code and of what it holds.

    "" for the named responses without parameters.
    """
    if response in (logit, probability, margin):
        return ""
    if isinstance(response, Logit | Probability | Margin | Neuron):
        return repr(response)
    named = function = response.function if isinstance(response, OutputFunction) else response
    while isinstance(named, functools.partial):
        named = named.func
    place = f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', type(named).__qualname__)}"
    return f"{place} {hashlib.sha256(contents(function).encode()).hexdigest()[:16]}"


def respond(response: Response, output: Any, target: Tensor | None, batch: int) -> Tensor:
    """Φ of a batch, checked to be one real number per sample."""
    try:
        value = response(output, target)
    except (FxpathError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"response {response.name!r}: it cannot read the network's output, {listing(output)} "
            f"({type(error).__name__}: {error}); read a part that is there"
        ) from error
    if not isinstance(value, Tensor) or value.shape != (batch,) or value.is_complex():
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"response {response.name!r}: expected one real number per sample, ({batch},), found {found}")
    if not value.is_floating_point():
        raise InputError(
            f"response {response.name!r}: expected a floating-point number per sample, which has a gradient, found "
            f"{value.dtype}; a count or a class number has none"
        )
    return value


def require_fit(response: Response, output: Any) -> None:
    """Raise `InputError` where an output has nothing that a response of classes, chosen on purpose, could read."""
    if isinstance(response, Logit | Probability | Margin) and response != logit:
        response(output, resolve_target(response.logits(output), None))


def sequence_of(target: type_of_target, batch: int) -> Sequence[int]:
    """A resolved or plain target as a list of `batch` ints."""
    values = torch.as_tensor(target).flatten().tolist()
    return values * batch if len(values) == 1 else values
