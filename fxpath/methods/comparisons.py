"""The attribution methods that pathway gradients are compared with (the paper's §5): gradients and perturbed inputs.

Those that set hooks are in `hooked`. They are captum's wherever captum has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attribution import differentiable, input_gradient
from ..errors import InputError
from ..memory import kept_memory
from ..network import Network
from ..pathways import Pathways
from ..progress import bar
from ..samples import type_of_target
from ..selectors.baselines import generator_of
from .explained import Explained, captum, images, one_input, one_map
from .registry import Compared, register, require_share, require_whole

Forward = Callable[..., Tensor]


@register
@dataclass(frozen=True)
class Gradient(Compared):
    """∇ₓΦ(x), the plain gradient."""

    name: ClassVar[str] = "gradient"

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        return one_map(input_gradient(network, one_input(self.key, network, x, target)))


@register
@dataclass(frozen=True)
class InputMCT(Compared):
    """x ⊙ ∇ₓΦ(x), the marginal contribution of every input to first order."""

    name: ClassVar[str] = "input_mct"

    @torch.inference_mode(False)
    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        explained = Explained.of(self.key, network, x, target)
        method = captum().InputXGradient(explained.response)
        with differentiable(self.key):
            found: Tensor = method.attribute(explained.x.requires_grad_(), additional_forward_args=explained.target)
        return found.detach()


@register
@dataclass(frozen=True)
class InputIntGrad(Compared):
    """Integrated gradients of the input, from 0 (in the network's own, normalised units) to x.

    The midpoint rule with `steps` nodes: the sum of a map differs from Φ(x) − Φ(0) by no more than the variation of
    the slope along the path over 2·steps. In deep networks that may be more than Φ itself: look at the sum.
    """

    name: ClassVar[str] = "input_intgrad"
    steps: int = 50

    def __post_init__(self) -> None:
        require_whole(self.name, "steps", self.steps, 2)  # captum takes no single step

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        def one(explained: Explained, forward: Forward) -> Tensor:
            found: Tensor = captum().IntegratedGradients(forward).attribute(
                explained.x, baselines=0, additional_forward_args=explained.target, n_steps=self.steps,
                method="riemann_middle", internal_batch_size=explained.rows,
            )  # fmt: skip
            return found

        return _singly(Explained.of(self.key, network, x, target), self.key, self.steps, one)


@register
@dataclass(frozen=True)
class SmoothGrad(Compared):
    """The mean of `samples` gradients at x + normal noise, its deviation the share `noise` of the sample's max − min.

    The noise is keyed by (`seed`, sample id), so that neither order nor neighbours nor device change it, and drawn
    apart from torch's and NumPy's own streams. captum's NoiseTunnel draws from those, with one deviation for all.
    """

    name: ClassVar[str] = "smooth_grad"
    samples: int = 50
    noise: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole(self.name, "samples", self.samples, 1)
        require_share(self.name, "noise", self.noise)
        require_whole(self.name, "seed", self.seed, 0)

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        return _singly(Explained.of(self.key, network, x, target), self.key, self.samples, self._of_one)

    def _of_one(self, explained: Explained, forward: Forward) -> Tensor:
        x, rows, target = explained.x, explained.rows, explained.target
        method = captum().Saliency(forward)
        generator = generator_of(self.seed, f"smooth_grad\0{explained.samples.names[0]}")
        deviation = self.noise * (x.max() - x.min())
        total = torch.zeros_like(x)
        for first in range(0, self.samples, rows):
            shape = (min(rows, self.samples - first), *x.shape[1:])
            drawn = torch.from_numpy(generator.standard_normal(shape, dtype="float32")).to(x)
            wanted = None if target is None else target.expand(len(drawn))
            noisy = (x + deviation * drawn).requires_grad_()
            total += method.attribute(noisy, abs=False, additional_forward_args=wanted).sum(dim=0, keepdim=True)
        return total / self.samples


@register
@dataclass(frozen=True)
class Occlusion(Compared):
    """Φ(x) − Φ(x with a window set to 0), at every pixel the mean over the windows that cover it.

    Windows of `size` pixels to a side, `stride` pixels apart, all channels at once; single pixels by default, and a run
    of the network for each of them: SqueezeNet takes seven minutes for a photo of 227² on two cores. The last window
    of a row ends at the border.
    """

    name: ClassVar[str] = "occlusion"
    size: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        require_whole(self.name, "size", self.size, 1)
        require_whole(self.name, "stride", self.stride, 1)
        if self.stride > self.size:
            raise InputError(
                f"occlusion: expected a stride of at most the size, {self.size}, so that every pixel is occluded, "
                f"found {self.stride}"
            )

    def attribute(
        self, network: Network, x: Any, target: type_of_target = None, pathways: Pathways | None = None
    ) -> Tensor:
        explained = Explained.of(self.key, network, x, target)
        axes = images(self.key, explained.x)
        channels, *sides = explained.x.shape[1:]
        if min(sides) < self.size:
            raise InputError(f"occlusion: expected a size of at most {min(sides)}, the image's, found {self.size}")
        runs = 1 + math.prod(1 + -(-(side - self.size) // self.stride) for side in sides)

        def one(alone: Explained, forward: Forward) -> Tensor:
            found: Tensor = captum().Occlusion(forward).attribute(
                alone.x, sliding_window_shapes=(channels, *[self.size] * axes), baselines=0,
                strides=(channels, *[self.stride] * axes), additional_forward_args=alone.target,
                perturbations_per_eval=min(alone.rows, runs),
            )  # fmt: skip
            return found[:, :1].to(alone.x)  # captum's are float32 in any case

        return _singly(explained, self.key, runs, one)


@torch.inference_mode(False)
def _singly(explained: Explained, key: str, runs: int, one: Callable[[Explained, Forward], Tensor]) -> Tensor:
    """The maps of samples one by one; `one` gets a sample and its Φ, of which it takes `runs` rows."""
    maps = []
    with bar(explained.samples.batch * runs, key, "row") as progress, kept_memory():
        for alone in explained.each():

            def forward(x: Tensor, target: Tensor | None = None, alone: Explained = alone) -> Tensor:
                progress.update(len(x))
                return alone.response(x, target)

            with differentiable(key):
                maps.append(one(alone, forward).detach())
    return torch.cat(maps)
