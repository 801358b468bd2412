"""Responses that are read from class scores: a logit, a probability, a margin, at any place of any output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from .errors import InputError
from .keys import text_form
from .outputs import checked_path, leaves, listing, obvious_part, part_of, type_of_part, written
from .places import Place, whole_number
from .samples import class_numbers, type_of_target

OBVIOUS = ("logits", "out")  # where transformers and torchvision's segmentation networks keep class scores


class _ClassScores:
    """What responses that read class scores share: a part of the output, and a place in it."""

    output: type_of_part
    at: Place | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", checked_path(self.output))
        if self.at is not None and (isinstance(self.at, type) or not isinstance(self.at, Place)):
            raise InputError(f"at: expected a place such as Pixel(row, column) or Region(), found {self.at!r}")

    def logits(self, output: Any) -> Tensor:
        return _at(cast(ClassResponse, self), output)


@dataclass(frozen=True)
class Logit(_ClassScores):
    """The pre-softmax score of the target class (the paper's response, §3).

    `output` picks a part of the output: a key, index or field's name, or a tuple of these, a path. It may be left out
    where the output has one floating-point tensor, or one part of the name `logits` or `out`. `at` is where in it
    class scores are read: None for `(B, classes)`, or a `Pixel`, `Region`, `Token` or `Detection`. Over a region Φ is
    the mean logit; without a target it is the class with the largest.
    """

    output: type_of_part = None
    at: Place | None = None

    @property
    def name(self) -> str:
        return _name("logit", self)

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:
        return _of_target(self.logits(output), target)


@dataclass(frozen=True)
class Probability(_ClassScores):
    """The softmax probability of the target class; over a region the mean of its points' probabilities.

    `output` and `at` are those of `Logit`. Class scores of a region are logarithms of these means, so that their
    softmax is what is explained, and without a target it is the class with the largest.
    """

    output: type_of_part = None
    at: Place | None = None

    @property
    def name(self) -> str:
        return _name("probability", self)

    def logits(self, output: Any) -> Tensor:
        return _at(self, output, _log_mean)

    def __call__(self, output: Any, target: Tensor | None) -> Tensor:
        return _of_target(self.logits(output).softmax(dim=1), target)


@dataclass(frozen=True)
class Margin(_ClassScores):
    """The target's logit minus another's: minus class `against`, or minus the largest of the others.

    `output` and `at` are those of `Logit`; over a region both logits are means, and the largest is the largest mean.
    """

    against: int | None = None
    output: type_of_part = None
    at: Place | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.against is not None:
            object.__setattr__(self, "against", whole_number("margin", "the class against", self.against))

    @property
    def name(self) -> str:
        return _name("margin", self, against=self.against)

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


ClassResponse: TypeAlias = Logit | Probability | Margin


def _path(response: ClassResponse) -> tuple[Any, ...]:
    part = response.output
    return part if isinstance(part, tuple) else () if part is None else (part,)


def _name(kind: str, response: ClassResponse, against: int | None = None) -> str:
    more = {"against": against, "output": written(_path(response)) or None}
    if response.at is None:
        return text_form(kind, more)
    of = None if kind == "logit" else kind
    return text_form(response.at.kind, {**response.at.parameters, "of": of, **more})


def _mean(points: Tensor) -> Tensor:
    return points.mean(dim=2)


def _log_mean(points: Tensor) -> Tensor:
    """Logarithms of the mean of each point's softmax, `(B, classes, n)` → `(B, classes)`."""
    return points.log_softmax(dim=1).logsumexp(dim=2) - math.log(points.shape[2])


def _at(response: ClassResponse, output: Any, mean: Callable[[Tensor], Tensor] = _mean) -> Tensor:
    """The `(B, classes)` scores at the response's place, or an `InputError` that says what the output is instead."""
    scores = _part(response, output)
    if response.at is None:
        if scores.ndim != 2:
            raise InputError(
                f"response {response.name!r}: expected class scores (B, classes), found a tensor "
                f"{tuple(scores.shape)}; say where in it, at=Pixel(row, column) or Region() for a map (B, classes, …), "
                "at=Token(position) or Detection(box) for (B, places, classes), or pass a function of the output, (B,)"
            )
        return scores
    points = response.at(scores)
    if points.ndim != 3:
        raise InputError(f"{response.at.kind}: expected it to give (B, classes, n), found {tuple(points.shape)}")
    return points.squeeze(2) if points.shape[2] == 1 else mean(points)


def read_part(response: object, output: Any) -> Tensor | None:
    """The tensor of the output that a response reads; None where it may read any, or finds none."""
    if not isinstance(response, Logit | Probability | Margin):
        return None
    try:
        return _part(response, output)
    except InputError:
        return None


def _part(response: ClassResponse, output: Any) -> Tensor:
    """The floating-point tensor of the output that has the class scores."""
    if response.output is None:
        picked = output if isinstance(output, Tensor) else obvious_part(output, OBVIOUS)
        if picked is None:
            named = [path for path, leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            part = (named[0][0] if len(named[0]) == 1 else named[0]) if named else "…"
            raise InputError(
                f"response {response.name!r}: expected class scores as the network's output, found {listing(output)}; "
                f"pick a part of it, as in response=fxpath.responses.Logit(output={part!r}), or pass a function of the "
                "output, (B,)"
            )
    else:
        try:
            picked = part_of(output, response.output)
        except LookupError as error:
            raise InputError(
                f"response {response.name!r}: there is no part {error.args[0]!r} in the network's output, "
                f"{listing(output)}"
            ) from None
    if not isinstance(picked, Tensor) or not picked.is_floating_point():
        raise InputError(
            f"response {response.name!r}: expected a floating-point tensor with class scores, found {listing(picked)}"
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
