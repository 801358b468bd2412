"""Places in an output: where in a map, a sequence or a list of boxes the class scores of a response are read."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import InputError


@runtime_checkable
class Place(Protocol):
    """Where class scores are read, the same place for every sample."""

    @property
    def kind(self) -> str:
        """A short name, kept in stores."""

    @property
    def parameters(self) -> Mapping[str, int | str]:
        """What tells it from others of its kind, as the command line takes it."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Class scores `(B, classes, n)` at the n points of this place."""


def whole_number(kind: str, name: str, value: Any) -> int:
    """A place's number as an int; raises `InputError`, which begins with `kind`, for what is none."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        hint = ""
        if isinstance(value, list | tuple | Tensor | np.ndarray):
            hint = (
                "; it is the same for all samples. Where it differs, let a module around the model take it as one more "
                "input and pick the place itself"
            )
        raise InputError(f"{kind}: expected {name} to be a whole number, found {_short(value)}{hint}") from None


def _short(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _require_map(kind: str, scores: Tensor, axes: int | None) -> None:
    """Raise `InputError` where scores are no `(B, classes, …)` with that many axes behind the classes (None: any)."""
    if scores.ndim < 3 or axes not in (None, scores.ndim - 2):
        sizes = {1: "(B, classes, L)", 2: "(B, classes, H, W)", 3: "(B, classes, D, H, W)"}
        wanted = sizes.get(axes, f"(B, classes, …) with {axes} axes in space") if axes else "a map (B, classes, …)"
        raise InputError(f"{kind}: expected {wanted}, found {tuple(scores.shape)}; {_fitting(scores)}")


def _fitting(scores: Tensor) -> str:
    if scores.ndim < 3:
        return "it has one place only: take logit, probability or margin alone"
    fitting = f"Pixel with {scores.ndim - 2} coordinates, or Region()"
    return f"{fitting}, fits" if scores.ndim > 3 else f"Token, Detection, {fitting}, fits"


def _require_list(kind: str, what: str, scores: Tensor) -> None:
    if scores.ndim != 3:
        raise InputError(f"{kind}: expected (B, {what}, classes), found {tuple(scores.shape)}; {_fitting(scores)}")


@dataclass(frozen=True, init=False)
class Pixel:
    """One point of a map `(B, classes, …)`: `Pixel(row, column)`; one coordinate for each axis in space."""

    coordinates: tuple[int, ...]

    def __init__(self, *coordinates: int) -> None:
        if not coordinates:
            raise InputError("pixel: expected coordinates, such as Pixel(row, column), found none")
        object.__setattr__(
            self, "coordinates", tuple(whole_number("pixel", "a coordinate", each) for each in coordinates)
        )

    kind = "pixel"

    @property
    def parameters(self) -> Mapping[str, int | str]:
        if len(self.coordinates) == 2:
            return dict(zip(("row", "column"), self.coordinates, strict=True))
        return {"at": "/".join(map(str, self.coordinates))}

    def __call__(self, scores: Tensor) -> Tensor:
        _require_map("pixel", scores, len(self.coordinates))
        sizes = tuple(scores.shape[2:])
        if not all(0 <= place < size for place, size in zip(self.coordinates, sizes, strict=True)):
            raise InputError(f"pixel: expected a place within the map {sizes}, found {self.coordinates}")
        place: tuple[Any, ...] = (slice(None), slice(None), *self.coordinates)
        return scores[place].unsqueeze(2)


@dataclass(frozen=True)
class Mask:
    """Points of a map: a bool array that can be compared and hashed. `bits` is packed, in C order."""

    shape: tuple[int, ...]
    bits: bytes

    @classmethod
    def of(cls, mask: Any) -> Mask:
        """A mask from a bool tensor or array; raises `InputError` for another, and for one without any point."""
        if isinstance(mask, cls):
            return mask
        array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if array.dtype != np.bool_ or array.ndim == 0:
            raise InputError(
                f"region: expected a bool mask of the map's size, such as (H, W), found {array.dtype} {array.shape}; "
                "compare first: mask=labels == 3"
            )
        if not array.any():
            raise InputError(f"region: expected a mask with at least one point, found none in {array.shape}")
        return cls(array.shape, np.packbits(array).tobytes())

    @property
    def points(self) -> npt.NDArray[np.int64]:
        """Flat numbers of the points, in order."""
        packed = np.frombuffer(self.bits, dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(packed, count=math.prod(self.shape)))

    @property
    def digest(self) -> str:
        """What tells masks apart, 12 hexadecimal digits."""
        return hashlib.sha256(repr(self.shape).encode() + self.bits).hexdigest()[:12]

    def __repr__(self) -> str:
        return f"Mask({self.shape}, {len(self.points)} points, {self.digest})"


@dataclass(frozen=True, init=False)
class Region:
    """The mean over a region of a map `(B, classes, …)`: a box, the points of a mask, or the whole map.

    `Region(top, left, bottom, right)` holds rows top … bottom − 1 and columns left … right − 1; a map with another
    number of axes in space takes all starts, then all ends. `mask` is a bool array or tensor of the map's size.
    """

    box: tuple[int, ...] = ()
    mask: Mask | None = None

    def __init__(self, *box: int, mask: npt.NDArray[np.bool_] | Tensor | Mask | None = None) -> None:
        if box and mask is not None:
            raise InputError("region: expected a box or a mask, found both")
        if len(box) % 2 or (len(box) == 1 and isinstance(box[0], Tensor | np.ndarray | Mask)):
            raise InputError(
                "region: expected a box (top, left, bottom, right), all starts and then all ends, or mask=…, found "
                + ", ".join(map(_short, box))
            )
        numbers = tuple(whole_number("region", "each side of a box", each) for each in box)
        starts, ends = numbers[: len(box) // 2], numbers[len(box) // 2 :]
        if not all(0 <= start < end for start, end in zip(starts, ends, strict=True)):
            raise InputError(
                f"region: expected a box (top, left, bottom, right) with 0 ≤ top < bottom and 0 ≤ left < right, found "
                f"{numbers}"
            )
        object.__setattr__(self, "box", numbers)
        object.__setattr__(self, "mask", None if mask is None else Mask.of(mask))

    kind = "region"

    @property
    def parameters(self) -> Mapping[str, int | str]:
        if self.mask is not None:
            return {"mask": self.mask.digest}
        return {"box": "/".join(map(str, self.box))} if self.box else {}

    def __call__(self, scores: Tensor) -> Tensor:
        _require_map("region", scores, len(self.box) // 2 or None)
        sizes = tuple(scores.shape[2:])
        if self.mask is not None:
            if self.mask.shape != sizes:
                raise InputError(f"region: expected a mask of the map's size {sizes}, found {self.mask.shape}")
            return scores.flatten(2).index_select(2, torch.as_tensor(self.mask.points, device=scores.device))
        axes = len(self.box) // 2
        starts, ends = self.box[:axes], self.box[axes:]
        if not all(end <= size for end, size in zip(ends, sizes, strict=False)):
            raise InputError(f"region: expected a box within the map {sizes}, found one that ends at {ends}")
        place: tuple[Any, ...] = (..., *map(slice, starts, ends))
        return scores[place].flatten(2)


@dataclass(frozen=True)
class Token:
    """One position of a sequence `(B, positions, classes)`; a negative one counts from the end."""

    position: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "position", whole_number("token", "its position", self.position))

    kind = "token"

    @property
    def parameters(self) -> Mapping[str, int | str]:
        return {"position": self.position}

    def __call__(self, scores: Tensor) -> Tensor:
        _require_list("token", "positions", scores)
        if not -scores.shape[1] <= self.position < scores.shape[1]:
            raise InputError(
                f"token: expected a position in {-scores.shape[1]} … {scores.shape[1] - 1}, found {self.position}"
            )
        return scores[:, self.position].unsqueeze(2)


@dataclass(frozen=True)
class Detection:
    """One box of a detector's scores `(B, boxes, classes)`, as its head gives them: an anchor or a query."""

    box: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", whole_number("detection", "its box", self.box))

    kind = "detection"

    @property
    def parameters(self) -> Mapping[str, int | str]:
        return {"box": self.box}

    def __call__(self, scores: Tensor) -> Tensor:
        _require_list("detection", "boxes", scores)
        if not 0 <= self.box < scores.shape[1]:
            raise InputError(f"detection: expected a box in 0 … {scores.shape[1] - 1}, found {self.box}")
        return scores[:, self.box].unsqueeze(2)
