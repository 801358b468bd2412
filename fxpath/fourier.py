"""Pictures as the coefficients that are optimised: waves whose energy falls with their frequency, principal colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

# Principal colours of natural pictures, √λ · eigenvector a column: the covariance of RGB in [0, 1] over all pixels of
# foolbox's 20 ImageNet photos, each resized to 256 × 256. First lightness, then red against blue, green against both.
COLOURS = ((0.2180, 0.0686, 0.0416), (0.2276, 0.0175, -0.0621), (0.2332, -0.0812, 0.0217))
_SPREAD = 0.01  # standard deviation of the coefficients to begin with: a nearly grey picture
_CONTRAST = 0.25  # how much of a wave's amplitude a coefficient is before the sigmoid
_LONGEST = 2**14  # pixels; larger pictures would only fill the memory


@dataclass(frozen=True)
class Basis:
    """Pictures `(R, channels, height, width)` in (0, 1), made of coefficients that gradients can be taken of.

    `decorrelated`: a coefficient is one wave's amplitude, scaled by 1/f^decay (f in cycles a pixel, no smaller than
    one cycle a picture), and of three channels each is a principal colour of natural pictures (Olah et al. 2017,
    "Feature Visualization"). Otherwise a coefficient is one value of one pixel. Sigmoids keep pictures in (0, 1).

    >>> basis = Basis(3, 4, 6)
    >>> basis.shape(2), basis.pictures(torch.zeros(basis.shape(2)))[0, :, 0, 0]
    ((2, 3, 4, 4, 2), tensor([0.5000, 0.5000, 0.5000]))
    """

    channels: int
    height: int
    width: int
    decorrelated: bool = True
    decay: float = 1.0

    def __post_init__(self) -> None:
        for name, size, most in (
            ("channels", self.channels, _LONGEST), ("height", self.height, _LONGEST), ("width", self.width, _LONGEST)
        ):  # fmt: skip
            if not 1 <= size <= most:
                raise InputError(f"pictures: expected {name} of 1 … {most}, found {size}")

    def shape(self, rows: int) -> tuple[int, ...]:
        """The shape of the coefficients of `rows` pictures; waves have a real and an imaginary part."""
        if not self.decorrelated:
            return (rows, self.channels, self.height, self.width)
        return (rows, self.channels, self.height, self.width // 2 + 1, 2)

    def start(self, rows: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """Coefficients of noise, the same for every row, of the type and on the device of `like`."""
        noise = torch.randn(self.shape(1), generator=generator, dtype=torch.float64) * _SPREAD
        return noise.to(like).repeat(rows, *[1] * (noise.ndim - 1))

    def scale(self, like: Tensor) -> Tensor:
        """What a wave's coefficient is multiplied with, `(height, width // 2 + 1)`: 1/max(f, 1/longer side)^decay."""
        options = {"dtype": like.dtype, "device": like.device}
        rows = torch.fft.fftfreq(self.height, **options).unsqueeze(1)
        frequency = torch.hypot(rows, torch.fft.rfftfreq(self.width, **options))
        scale: Tensor = frequency.clamp(min=1 / max(self.height, self.width)) ** -self.decay
        return scale

    def planes(self, coefficients: Tensor) -> Tensor:
        """What pictures are before colours and sigmoid, `(R, channels, height, width)`."""
        if not self.decorrelated:
            return coefficients
        waves = torch.view_as_complex(coefficients) * self.scale(coefficients)
        planes: Tensor = torch.fft.irfft2(waves, s=(self.height, self.width), norm="ortho") * _CONTRAST
        return planes

    def pictures(self, coefficients: Tensor) -> Tensor:
        """Pictures `(R, channels, height, width)` in (0, 1)."""
        planes = self.planes(coefficients)
        if self.decorrelated and self.channels == 3:
            planes = torch.einsum("ck,rkhw->rchw", principal_colours(planes), planes)
        return torch.sigmoid(planes)


def principal_colours(like: Tensor) -> Tensor:
    """`(3, 3)`: principal colours as columns, the first of length 1, of the type and on the device of `like`."""
    colours = torch.tensor(COLOURS, dtype=torch.float64)
    scaled: Tensor = colours / colours.norm(dim=0).max()
    return scaled.to(like)
