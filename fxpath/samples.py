"""`Samples`: the one bundle of inputs, targets and ids that travels through fxpath."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError, SampleError

type_of_target = int | Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor | None
type_of_id = int | str


def class_numbers(target: type_of_target) -> Tensor:
    """A target as int64 `(1,)` or `(B,)`, where it is; raises `InputError` for what is no whole number.

    >>> class_numbers([3, 5])
    tensor([3, 5])
    """
    try:
        wanted = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"target: expected a class number, or one a sample, found {target!r}") from None
    if wanted.dtype == torch.bool or wanted.is_floating_point() or wanted.is_complex():
        raise InputError(f"target: expected whole class numbers, found {wanted.dtype}")
    return wanted.to(torch.int64).flatten()


@dataclass(frozen=True, eq=False)
class Samples:
    """A batch: model inputs, the class to explain, and a name for each sample.

    `inputs` is a tensor, a tuple (positional arguments) or a dict (keyword arguments); every tensor in it has the
    batch axis first. `target` is None (the class that the original network predicts), one class for all, or one per
    sample `(B,)`. `ids` name the samples; seeds are keyed by them, so a sample's random numbers do not depend on its
    neighbours. Default: 0 … B − 1.

    >>> Samples((torch.ones(2, 3), torch.ones(2, 1))).batch
    2
    """

    inputs: Any
    target: type_of_target = None
    ids: Sequence[type_of_id] | npt.NDArray[Any] | Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor | tuple | dict):
            raise InputError(
                f"inputs: expected a tensor, a tuple or a dict of them, found {type(self.inputs).__name__}; "
                "wrap a list argument in a tuple: (x,)"
            )
        if not self.tensors:
            kinds = sorted({type(leaf).__name__ for leaf in pytree.tree_leaves(self.inputs)}) or ["nothing"]
            raise InputError(
                f"inputs: expected tensors with the batch axis in front, found {', '.join(kinds)}; put them into a "
                "tuple or a dict by the names of forward, as tensors"
            )
        sizes = {int(leaf.shape[0]) for leaf in self.tensors if leaf.ndim}
        if len(sizes) != 1 or any(leaf.ndim == 0 for leaf in self.tensors):
            shapes = [tuple(leaf.shape) for leaf in self.tensors]
            raise InputError(f"inputs: expected tensors with one common batch axis in front, found shapes {shapes}")
        if self.batch == 0:
            raise InputError("inputs: expected at least one sample, found an empty batch")
        if self.ids is not None and len(self.ids) != self.batch:
            raise InputError(f"ids: expected {self.batch}, one a sample, found {len(self.ids)}")
        if self.target is not None:
            count = class_numbers(self.target).numel()
            if count not in (1, self.batch):
                raise InputError(f"target: expected one class, or {self.batch}, one a sample, found {count}")

    @classmethod
    def of(cls, x: Any, target: type_of_target = None) -> Samples:
        """`x` as samples, whatever form it has; a target given here takes the place of the one within."""
        if isinstance(x, Samples):
            return x if target is None else replace(x, target=target)
        return cls(x, target)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the inputs."""
        return [leaf for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor)]

    @property
    def constants(self) -> list[Any]:
        """Every leaf of the inputs that is no tensor."""
        return [leaf for leaf in pytree.tree_leaves(self.inputs) if not isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int:
        """B, the number of samples."""
        return int(self.tensors[0].shape[0])

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.tensors[0].device

    @property
    def names(self) -> tuple[type_of_id, ...]:
        """The ids, or 0 … B − 1 where none were given."""
        if self.ids is None:
            return tuple(range(self.batch))
        return tuple(self.ids.tolist() if isinstance(self.ids, Tensor | np.ndarray) else self.ids)

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the model."""
        if isinstance(self.inputs, dict):
            return ()
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        return dict(self.inputs) if isinstance(self.inputs, dict) else {}

    def places(self, signature: inspect.Signature) -> dict[str, Any]:
        """Arguments by the names and in the order of `signature`, with the number of a leaf in place of each tensor.

        Leaves are counted through all arguments; those that are no tensors become None. Of `*args` each is an argument
        `args_0`, `args_1`, …; of `**kwargs` each is one by its own name.
        """
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        numbers = [place if isinstance(leaf, Tensor) else None for place, leaf in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(numbers, spec)
        found: dict[str, Any] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                found |= {f"{name}_{place}": each for place, each in enumerate(value)}
            else:
                found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return found

    def map(self, function: Callable[[Tensor], Tensor]) -> Samples:
        """The same samples with every input tensor passed through `function`."""
        inputs = pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, self.inputs)
        return replace(self, inputs=inputs)

    def take(self, rows: Sequence[int]) -> Samples:
        """Samples number `rows`, in that order; a row may be taken more than once."""

        def picked(leaf: Tensor) -> Tensor:
            return leaf.index_select(0, torch.as_tensor(rows, device=leaf.device, dtype=torch.long))

        target = None if self.target is None else class_numbers(self.target)
        if target is not None and target.numel() > 1:
            target = picked(target)
        names = self.names
        taken = replace(self, inputs=self.inputs, target=None, ids=None).map(picked)
        return replace(taken, target=target, ids=[names[row] for row in rows])

    def to(self, device: torch.device | str) -> Samples:
        """The same samples on `device`."""
        return self.map(lambda leaf: leaf.to(device, non_blocking=True))

    def require_finite(self) -> Samples:
        """These samples; raises `SampleError` naming every sample with a NaN or infinite input."""
        bad: set[int] = set()
        for leaf in self.tensors:
            if (leaf.is_floating_point() or leaf.is_complex()) and not leaf.is_meta and not _all_finite(leaf):
                finite = torch.isfinite(leaf).flatten(1).all(1) if leaf.ndim > 1 else torch.isfinite(leaf)
                bad.update(torch.nonzero(~finite).flatten().tolist())
        if bad:
            rows = sorted(bad)
            names = ", ".join(repr(self.names[row]) for row in rows[:5])
            raise SampleError(
                f"inputs: sample {names}{' …' if len(rows) > 5 else ''} holds NaN or infinite values; expected finite "
                "numbers. Look at its file or preprocessing, or leave it out",
                rows,
                ["the input holds NaN or infinite values"] * len(rows),
            )
        return self


def _all_finite(leaf: Tensor) -> bool:
    """Whether all numbers are finite; the least and the greatest are where all are, and need no memory."""
    if leaf.is_complex() or leaf.dtype.itemsize == 1 or not leaf.numel():
        return bool(torch.isfinite(leaf).all())
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(leaf))
