"""What every method explains: one floating-point input, and Φ of the class that is explained at it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..attribution import require_open
from ..errors import InputError, ModelError
from ..gates import Gates
from ..network import Network
from ..outcomes import require_finite_response
from ..responses import respond
from ..samples import Samples, type_of_target

_NUMBERS = 2**25  # of inputs and neurons that runs of perturbed inputs hold at once, a quarter of their memory
_MOST_ROWS = 512


def one_input(said: str, network: Network, x: Any, target: type_of_target) -> Samples:
    """The samples of a network with one floating-point input; raises `InputError` where there is another."""
    require_open(said, network)
    samples = network.samples(x, target).require_finite()
    tensors = [
        (pytree.keystr(path) or "x", leaf)
        for path, leaf in pytree.tree_leaves_with_path(samples.inputs)
        if isinstance(leaf, Tensor)
    ]
    if len(tensors) != 1 or not tensors[0][1].is_floating_point():
        found = ", ".join(f"{name} {leaf.dtype} {tuple(leaf.shape)}" for name, leaf in tensors)
        raise InputError(
            f"{said}: expected a network with one floating-point input tensor, found {found}; "
            "fxpath.pathway_gradient takes any inputs, and with wrt=… the vectors that a node makes of them"
        )
    return samples


def one_map(found: Any) -> Tensor:
    """The map among what is like the inputs of a network with one tensor."""
    (leaf,) = (leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor))
    return leaf


def images(said: str, x: Tensor) -> int:
    """How many axes in space an input `(B, C, …)` has; raises `InputError` where there are none."""
    if x.ndim < 3:
        raise InputError(f"{said}: expected inputs (B, C, H, W), whose pixels it looks at, found {tuple(x.shape)}")
    return x.ndim - 2


def captum() -> Any:
    """`captum.attr`; raises `ModelError` where it is not installed."""
    try:
        import captum.attr
    except ImportError as failure:
        raise ModelError(
            f"attribution: this method is captum's, which cannot be imported ({failure}); pip install 'fxpath[eval]'"
        ) from failure
    return captum.attr


@dataclass(frozen=True, eq=False)
class Explained:
    """A network at samples with one input, and the classes to explain, as the network predicts them at x.

    They are resolved once: at perturbed inputs it is still the class of x. `target` is `(B,)` int64, None where the
    response knows no classes.
    """

    network: Network
    samples: Samples
    target: Tensor | None

    @classmethod
    def of(cls, said: str, network: Network, x: Any, target: type_of_target) -> Explained:
        """One forward; raises `InputError` for other inputs, `SampleError` where a response is not finite."""
        samples = one_input(said, network, x, target)
        with torch.inference_mode(False), torch.no_grad():
            output = network._run(samples, Gates(network.index))
            resolved = network._resolve(output, samples)
            require_finite_response(respond(network.response, output, resolved, samples.batch), samples)
        return cls(network, samples, resolved)

    @property
    def x(self) -> Tensor:
        """The input `(B, …)`, detached."""
        return self.samples.tensors[0].detach()

    @property
    def rows(self) -> int:
        """How many perturbed inputs to run at once, so that memory stays bounded."""
        return max(1, min(_MOST_ROWS, _NUMBERS // (self.network.index.units + self.x[0].numel())))

    def each(self) -> Iterator[Explained]:
        """One sample after another: runs of its own, so that neighbours change no bit of its map."""
        for row in range(self.samples.batch):
            target = None if self.target is None else self.target[row : row + 1]
            yield replace(self, samples=self.samples.take([row]), target=target)

    def response(self, x: Tensor, target: Tensor | None = None, gates: Gates | None = None) -> Tensor:
        """Φ of other values of the input, `(rows,)`, differentiable in them; `target` has a class for each row."""
        inputs = pytree.tree_map(lambda leaf: x if isinstance(leaf, Tensor) else leaf, self.samples.inputs)
        samples = replace(self.samples, inputs=inputs, target=None, ids=None)
        output = self.network._run(samples, Gates(self.network.index) if gates is None else gates)
        value = respond(self.network.response, output, target, len(x))
        # 0, so that there is a gradient, if only of 0, where Φ does not depend on x
        return value + x.reshape(len(x), -1)[:, :0].sum(dim=1).to(value.dtype)
