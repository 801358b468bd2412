"""Climbing: pictures that make a network's answer large, from noise, by steps of Adam on their coefficients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError
from .fourier import Basis
from .inputspace import InputSpace
from .network import Network
from .progress import bar
from .samples import Samples
from .transformations import Transformation

_EPS = 1e-18  # of Adam: steps do not depend on the unit of the response; squares of float32 hold that much
_STRENGTHS = (10.0, 100.0, 1.0)  # of noise where the faintest will not do; the last where none does

Answer = Callable[[Tensor, slice], Tensor]  # of inputs (n, *input) that are some of the rows: (n,)


class ConstantResponseWarning(UserWarning):
    """A response whose gradient for the picture is 0 throughout, so that there is nothing to climb."""


@dataclass(frozen=True)
class Decoding:
    """How pictures are found: Adam on the coefficients of a picture, which is moved a little at each step.

    `size`: height of the picture in pixels, in the proportions of the network's input (None: that input's); another
    one is resampled. `jitter`: rolled by at most so many pixels (None: 1/56 of the height, 4 of 224); `scale`: zoomed
    by 1 ± this; `rotation`: turned by at most so many degrees; all drawn anew at each step, from `seed`, as is the
    noise that is begun with.
    `decorrelated` and `decay` are those of `Basis`. The response is noted at every `every`th step.

    Moves make pictures clearer, but a pathway's neurons stay where they are: the larger the moves, the less of it can
    be reached (SqueezeNet, NeuronMCT at κ = 0.98 on a photo: 16 without moves, 7 with these, 5 with twice as large).
    """

    steps: int = 256
    seed: int = 0
    learning_rate: float = 0.03
    size: int | None = None
    jitter: int | None = None
    scale: float = 0.05
    rotation: float = 5.0
    decorrelated: bool = True
    decay: float = 1.0
    every: int = 16

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("size", 1), ("jitter", 0), ("every", 1)):
            value = getattr(self, name)
            if value is None and name in ("size", "jitter"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise InputError(f"decoding: expected {name} to be a whole number of at least {least}, found {value!r}")
        for name, most in (("learning_rate", 1e6), ("scale", 0.9), ("rotation", 180.0), ("decay", 10.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise InputError(f"decoding: expected {name} to be a number in 0 … {most:g}, found {value!r}")
        if not self.learning_rate:
            raise InputError("decoding: expected a learning_rate above 0, found 0")

    @property
    def noted(self) -> tuple[int, ...]:
        """The steps at which the response is noted: the first, the last, and those between.

        >>> Decoding(steps=40).noted
        (0, 16, 32, 40)
        """
        return (*range(0, self.steps, self.every), self.steps)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Decoded pictures, a row each.

    `pictures` `(R, colours, H, W)` in [0, 1], RGB where there are three; `inputs` `(R, *input)`, the same as the
    network takes it. `responses` `(R, S)` of the picture as it is, unmoved, at the steps `noted`, under the row's own
    restriction; `photo` `(R,)` what that restricted network answers to the photo, `original` `(R,)` what the network
    without any restriction answers to the decoded picture. `target` `(R,)` is the class, None for responses without.
    `strength` `(R,)`: how many times the faintest noise the row began with. `climbed` `(R,)` bool: whether the response
    ever had a gradient.
    """

    labels: tuple[str, ...]
    pictures: Tensor
    inputs: Tensor
    noted: tuple[int, ...]
    responses: Tensor
    photo: Tensor
    original: Tensor
    target: Tensor | None
    strength: Tensor
    climbed: Tensor

    @property
    def response(self) -> Tensor:
        """Of the decoded pictures, under their rows' restrictions, `(R,)`."""
        return self.responses[:, -1]


def require_pictures(said: str, network: Network) -> None:
    """Raise `InputError` for a network that takes anything else than one floating-point picture."""
    tensors = network._layout.tensors
    if len(tensors) != 1 or len(tensors[0][0]) != 3 or not tensors[0][1].is_floating_point:
        found = ", ".join(
            f"{str(kind).removeprefix('torch.')} (B, {', '.join(map(str, shape))})" for shape, kind in tensors
        )
        raise InputError(
            f"{said}: expected a network whose one input is floating-point pictures (B, C, H, W), found {found}"
        )


@dataclass(frozen=True, eq=False)
class Climb:
    """What climbing needs besides what is to be climbed: how pictures are made, and made into inputs.

    `said` begins messages; `size` is the height and width of the network's input, `like` a batch of inputs.
    """

    said: str
    decoding: Decoding
    basis: Basis
    space: InputSpace
    size: tuple[int, int]
    like: Tensor

    @classmethod
    def of(
        cls, said: str, network: Network, samples: Samples, decoding: Decoding | None, space: InputSpace | None
    ) -> Climb:
        """For a network and photos; raises `InputError` where it takes no picture, or the space is of another kind."""
        require_pictures(said, network)
        decoding = decoding or Decoding()
        (x,) = samples.tensors
        channels, height, width = network.input_shapes[0]
        space = InputSpace.of_samples(x) if space is None else space
        if space.channels != channels:
            raise InputError(f"{said}: expected an input space of {channels} channels, found {space.channels}")
        tall = decoding.size or height
        basis = Basis(
            space.colours, tall, max(round(width * tall / height), 1), decoding.decorrelated, float(decoding.decay)
        )
        return cls(said, decoding, basis, space, (height, width), x)

    def run(
        self,
        labels: Sequence[str],
        photos: Tensor,
        objective: Answer,
        response: Answer,
        original: Answer,
        *,
        target: Tensor | None = None,
        max_batch: int | None = None,
    ) -> Decoded:
        """Climb `objective`, `max_batch` rows at a time, from noise.

        `response` and `original` are what is told of the pictures, and the first of the row's photo, too.
        """
        size = len(labels) if max_batch is None else max_batch
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{self.said}: expected max_batch to be a whole number of at least 1, found {max_batch!r}")
        parts = [slice(first, min(first + size, len(labels))) for first in range(0, len(labels), size)]
        found: list[tuple[Tensor, ...]] = []
        with torch.inference_mode(False), bar(len(parts) * self.decoding.steps, self.said, "step") as shown:
            for part in parts:
                coefficients, *climb = self._climb(labels[part], part, objective, response, shown.update)
                with torch.no_grad():
                    pictures = self._whole(coefficients)
                    inputs = self._inputs(pictures)
                    answers = response(photos[part], part), original(inputs, part)
                found.append((pictures, inputs, *answers, *climb))
        columns = [torch.cat(each) for each in zip(*found, strict=True)]
        pictures, inputs, photo, whole, responses, strength, climbed = columns
        self._warn(labels, climbed)
        return Decoded(
            tuple(labels), pictures, inputs, self.decoding.noted, responses, photo, whole, target, strength, climbed
        )

    def _whole(self, coefficients: Tensor) -> Tensor:
        """Pictures as they are, of the size of the network's input."""
        return Transformation()(self.basis.pictures(coefficients), self.size)

    def _inputs(self, pictures: Tensor) -> Tensor:
        return self.space.inputs(pictures).to(self.like.dtype)

    def _climb(
        self, labels: Sequence[str], part: slice, objective: Answer, response: Answer, advance: Callable[[], object]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Coefficients after the last step, the responses noted, the noise's strength, and if there was a gradient."""
        decoding = self.decoding
        generator = torch.Generator().manual_seed(decoding.seed)
        jitter = max(round(self.basis.height / 56), 1) if decoding.jitter is None else decoding.jitter
        like = self.like if self.like.dtype == torch.float64 else self.like.float()
        leaf, strength = self._begin(self.basis.start(len(labels), generator, like), part, objective)
        adam = torch.optim.Adam([leaf], lr=decoding.learning_rate, eps=_EPS, foreach=False)
        climbed = torch.zeros(len(labels), dtype=torch.bool, device=leaf.device)
        responses: list[Tensor] = []

        def note(step: int) -> None:
            with torch.no_grad():
                responses.append(response(self._inputs(self._whole(leaf)), part))
            self._require_finite(labels, responses[-1], step)

        for step in range(decoding.steps):
            if step % decoding.every == 0:
                note(step)
            move = Transformation.drawn(generator, jitter, decoding.scale, decoding.rotation)
            leaf.grad = self._slope(leaf, move, part, objective).neg_()
            climbed |= leaf.grad.flatten(1).any(dim=1)
            adam.step()
            advance()
        note(decoding.steps)
        return leaf.detach(), torch.stack(responses, dim=1), strength, climbed

    def _begin(self, noise: Tensor, part: slice, objective: Answer) -> tuple[Tensor, Tensor]:
        """Coefficients to begin with: of each row the faintest noise to which the objective has a gradient.

        Around a nearly grey picture all that a pathway keeps may be dead.
        """
        strength = noise.new_ones(len(noise))
        wide = [1] * (noise.ndim - 1)
        for stronger in _STRENGTHS:
            slope = self._slope((noise * strength.view(-1, *wide)).requires_grad_(), Transformation(), part, objective)
            flat = ~slope.flatten(1).any(dim=1)
            if not bool(flat.any()):
                break
            strength = torch.where(flat, stronger, strength)
        return (noise * strength.view(-1, *wide)).requires_grad_(), strength

    def _slope(self, leaf: Tensor, move: Transformation, part: slice, objective: Answer) -> Tensor:
        """The gradient of the objective of moved pictures for their coefficients."""
        with torch.enable_grad():
            value = objective(self._inputs(move(self.basis.pictures(leaf), self.size)), part).sum()
            (slope,) = torch.autograd.grad(value, [leaf], allow_unused=True) if value.requires_grad else (None,)
        return torch.zeros_like(leaf) if slope is None else slope

    def _require_finite(self, labels: Sequence[str], values: Tensor, step: int) -> None:
        for label, value in zip(labels, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise InputError(
                    f"{self.said}: the response of {label!r} is {value} at step {step}; the network overflows. Take a "
                    "smaller learning_rate, or float32 or float64"
                )

    def _warn(self, labels: Sequence[str], climbed: Tensor) -> None:
        flat = [label for label, moved in zip(labels, climbed.tolist(), strict=True) if not moved]
        if flat:
            shown = ", ".join(map(repr, flat[:5])) + (" …" if len(flat) > 5 else "")
            warnings.warn(
                f"{self.said}: the response of {shown} has no gradient, whatever the noise that is begun with and at "
                f"each of {self.decoding.steps} steps: these pictures are that noise",
                ConstantResponseWarning,
                stacklevel=4,
            )
