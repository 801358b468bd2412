"""Small random moves of a picture, differentiable: what is optimised must not depend on where exactly a pixel lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Transformation:
    """A picture rolled by `down` and `right` pixels, then zoomed in by the factor `zoom` and turned by `angle` degrees.

    Turns are counter-clockwise about the middle. What a zoom below 1 or a turn brings in from outside is mirrored.
    """

    down: int = 0
    right: int = 0
    zoom: float = 1.0
    angle: float = 0.0

    @classmethod
    def drawn(cls, generator: torch.Generator, jitter: int, scale: float, rotation: float) -> Transformation:
        """One with uniform rolls of at most `jitter` pixels, zooms of 1 ± `scale`, turns of at most `rotation`.

        It draws four numbers from the generator, whatever the ranges are.
        """
        down, right, zoom, angle = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        return cls(
            math.floor(down * (2 * jitter + 1)) - jitter,
            math.floor(right * (2 * jitter + 1)) - jitter,
            1 + scale * (2 * zoom - 1),
            rotation * (2 * angle - 1),
        )

    def __call__(self, pictures: Tensor, size: tuple[int, int]) -> Tensor:
        """Pictures `(R, C, h, w)` → `(R, C, *size)`, moved, by one bilinear resampling at most."""
        if self.down or self.right:
            pictures = torch.roll(pictures, (self.down, self.right), dims=(2, 3))
        height, width = pictures.shape[2:]
        if (self.zoom, self.angle) == (1.0, 0.0) and (height, width) == size:
            return pictures
        turn = math.radians(self.angle)
        cos, sin = math.cos(turn) / self.zoom, math.sin(turn) / self.zoom
        # in units of half a side, down the picture positive
        inverse = pictures.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
        places = F.affine_grid(inverse.unsqueeze(0), [1, 1, *size], align_corners=False)
        return F.grid_sample(
            pictures, places.expand(len(pictures), -1, -1, -1), padding_mode="reflection", align_corners=False
        )
