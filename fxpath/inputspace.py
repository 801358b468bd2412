"""From colours in [0, 1] to what a network takes as its input, and back: an affine map that is found by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .errors import InputError

_SIDE = 64  # pixels of the pictures of one colour that are tried
_BASIC = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
_OTHERS = ((255, 255, 255), (51, 102, 204), (204, 51, 102), (128, 128, 128))
_GREYS = ((0, 0, 0), (255, 255, 255)), ((51, 51, 51), (128, 128, 128))
_TOLERANCE = 1e-4  # of the range of the input


class SpaceError(InputError):
    """A preprocessing is no affine map of colours."""


@dataclass(frozen=True)
class InputSpace:
    """input = matrix · colour + offset at every pixel: `matrix` is (channels of the input) × (1 or 3 or as many).

    Colours are RGB in [0, 1] where there are three. `source` says where the numbers come from.

    >>> InputSpace.normalised((0.5,), (0.25,)).inputs(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)).flatten()
    tensor([-2.,  2.])
    """

    matrix: tuple[tuple[float, ...], ...]
    offset: tuple[float, ...]
    source: str = "given"

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.matrix}
        if len(widths) != 1 or 0 in widths or len(self.matrix) != len(self.offset):
            raise InputError(
                f"input space: expected a matrix with a row for each of {len(self.offset)} offsets, found "
                f"{[len(row) for row in self.matrix]} entries in {len(self.matrix)} rows"
            )
        numbers = torch.tensor([*self.offset, *(value for row in self.matrix for value in row)], dtype=torch.float64)
        if not bool(torch.isfinite(numbers).all()) or not all(any(row) for row in self.matrix):
            raise InputError(
                f"input space: expected finite numbers and no channel that is the same for all colours, found the "
                f"matrix {self.matrix} and the offset {self.offset}"
            )

    @property
    def colours(self) -> int:
        """Channels of the pictures."""
        return len(self.matrix[0])

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return len(self.matrix)

    def inputs(self, pictures: Tensor) -> Tensor:
        """Pictures `(R, colours, H, W)` in [0, 1] → inputs `(R, channels, H, W)`; differentiable."""
        matrix, offset = self._tensors(pictures)
        return torch.einsum("ck,rkhw->rchw", matrix, pictures) + offset.view(-1, 1, 1)

    def pictures(self, inputs: Tensor) -> Tensor:
        """The pictures in [0, 1] whose inputs are nearest to `inputs` `(R, channels, H, W)`, to be shown."""
        matrix, offset = self._tensors(inputs)
        return torch.einsum("kc,rchw->rkhw", torch.linalg.pinv(matrix), inputs - offset.view(-1, 1, 1)).clamp(0, 1)

    def json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self) | {"matrix": [list(row) for row in self.matrix], "offset": list(self.offset)}

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(self.matrix), like.new_tensor(self.offset)

    @classmethod
    def normalised(cls, mean: Sequence[float], std: Sequence[float]) -> InputSpace:
        """input = (colour − mean) / std, a number for each channel, as torchvision's `Normalize` has it."""
        if len(mean) != len(std) or not all(std):
            raise InputError(
                f"input space: expected as many means as standard deviations other than 0, found {mean} and {std}"
            )
        rows = tuple(tuple(1 / s if k == c else 0.0 for k in range(len(std))) for c, s in enumerate(std))
        return cls(rows, tuple(-m / s for m, s in zip(mean, std, strict=True)), "mean and std")

    @classmethod
    def of_samples(cls, x: Tensor) -> InputSpace:
        """[0, 1] is from the smallest to the largest value of each channel of `x` `(B, C, H, W)`.

        Photos mostly have a darkest and a lightest pixel near 0 and 1; three channels are taken for red, green, blue.
        Raises `InputError` where a channel is the same everywhere.
        """
        channels = x.detach().transpose(0, 1).flatten(1).double()
        low, high = channels.amin(dim=1), channels.amax(dim=1)
        if not bool((low < high).all()):
            flat = torch.nonzero(~(low < high)).flatten().tolist()
            raise InputError(
                f"input space: channel {', '.join(map(str, flat[:5]))} of x is the same everywhere, so that its range "
                "is not known; give one: space=InputSpace.normalised(mean, std)"
            )
        span = (high - low).tolist()
        rows = tuple(tuple(s if k == c else 0.0 for k in range(len(span))) for c, s in enumerate(span))
        return cls(rows, tuple(low.tolist()), "range of the samples")

    @classmethod
    def of_preprocessing(cls, preprocess: Callable[[Image.Image], Any], shape: Sequence[int]) -> InputSpace:
        """The map that a preprocessing ends with, from what it makes of pictures of one colour; `shape` is the input's.

        Raises `SpaceError` where it makes something else than inputs `shape` of one value a channel that are affine in
        the colour, within 1e-4 of their range. An input of one channel has pictures in grey.
        """
        basic, others = _GREYS if shape[0] == 1 else (_BASIC, _OTHERS)
        values = {colour: _of_one_colour(preprocess, colour, tuple(shape)) for colour in (*basic, *others)}
        offset, *ends = (values[colour] for colour in basic)
        columns = torch.stack(ends, dim=1) - offset.unsqueeze(1)
        span = float(columns.abs().sum(dim=1).max())
        for colour in others:
            shares = torch.tensor(colour[: columns.shape[1]], dtype=torch.float64) / 255
            expected = offset + columns @ shares
            if not bool(((expected - values[colour]).abs() <= _TOLERANCE * span).all()):
                raise SpaceError(
                    f"input space: the preprocessing is not affine in the colour: RGB {colour} gives "
                    f"{_shown(values[colour])}, expected {_shown(expected)} from what black and the full colours give"
                )
        rows = tuple(tuple(map(_in_float32, row)) for row in columns.tolist())
        return cls(rows, tuple(map(_in_float32, offset.tolist())), "preprocessing")


def _of_one_colour(preprocess: Callable[[Image.Image], Any], colour: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """What a preprocessing makes of a picture of one colour, `(C,)` float64."""
    try:
        made = preprocess(Image.new("RGB", (_SIDE, _SIDE), colour))
    except Exception as failure:  # it may be a user's own
        raise SpaceError(
            f"input space: the preprocessing fails for a picture of one colour ({type(failure).__name__}: {failure})"
        ) from failure
    if not isinstance(made, Tensor) or tuple(made.shape) != shape or made.ndim != 3:
        found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise SpaceError(f"input space: expected the preprocessing to give (C, H, W) = {shape}, found {found}")
    values = made.double().flatten(1)
    middle = values.mean(dim=1)
    if not bool(((values - middle.unsqueeze(1)).abs().amax(dim=1) <= _TOLERANCE * (1 + middle.abs())).all()):
        raise SpaceError(
            "input space: the preprocessing makes more than one value a channel of a picture of one colour"
        )
    return middle


def _in_float32(value: float) -> float:
    """A number without the digits that float32, in which preprocessings compute, does not have."""
    return float(f"{value:.7g}")


def _shown(values: Tensor) -> str:
    return str([round(value, 4) for value in values.tolist()])
