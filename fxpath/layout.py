"""How the inputs of a network are put together: what the example shows, and what other samples are checked against."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .errors import InputError
from .samples import Samples


@dataclass(frozen=True)
class Layout:
    """The inputs of an example: each tensor's shape without the batch axis and its type, and all that is no tensor.

    `keys` are the names of the arguments, sorted, or how many there are in order; `form` is how they are put together,
    None in place of each value; `home` is where the example is.
    """

    tensors: list[tuple[tuple[int, ...], torch.dtype]]
    constants: list[Any]
    keys: list[str] | int
    form: Any
    home: torch.device

    @classmethod
    def of(cls, example: Samples) -> Layout:
        return cls(
            [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in example.tensors],
            example.constants,
            sorted(example.kwargs) or len(example.args),
            pytree.tree_map(lambda _: None, example.inputs),
            example.device,
        )

    def fit(self, samples: Samples, device: torch.device) -> Samples:
        """The samples as the network takes them; raises `InputError` where shape, type or device do not fit.

        Tensors made in inference mode are copied, as gradients need.
        """
        keys = sorted(samples.kwargs) or len(samples.args)
        if keys != self.keys:
            raise InputError(f"network: expected the arguments of the example ({self.keys}), found {keys}")
        given = samples.kwargs or samples.args  # a tensor is the same as a tuple of one
        inputs = _arranged(given if isinstance(self.form, tuple | dict) else samples.args[0], self.form)
        if pytree.tree_structure(inputs) != pytree.tree_structure(self.form):
            raise InputError(
                f"network: expected the arguments to be put together as in the example ({_places(self.form)}), found "
                f"{_places(inputs)}"
            )
        samples = replace(samples, inputs=inputs)
        if not all(map(_same, samples.constants, self.constants)):
            raise InputError(
                f"network: expected the arguments that are no tensors to be {self.constants}, as in the example, "
                f"found {samples.constants}; they are part of the graph, so trace again to change them"
            )
        if len(samples.tensors) != len(self.tensors):
            raise InputError(
                f"network: expected {len(self.tensors)} tensors where the example has them, found "
                f"{len(samples.tensors)}; convert arrays with torch.from_numpy"
            )
        for tensor, (shape, dtype) in zip(samples.tensors, self.tensors, strict=True):
            if tuple(tensor.shape[1:]) != shape:
                raise InputError(
                    f"network: expected inputs (B, {', '.join(map(str, shape))}) as in the example it was traced on, "
                    f"found {tuple(tensor.shape)}; resize them, or trace again with an example of this size"
                )
            if tensor.dtype != dtype:
                raise InputError(f"network: expected inputs of {dtype}, found {tensor.dtype}; convert them with .to()")
            if tensor.layout != torch.strided:
                raise InputError(
                    f"network: expected dense inputs, found {tensor.layout}; convert them with .to_dense()"
                )
            if tensor.device != device:
                raise InputError(f"network: the model is on {device}, the input on {tensor.device}; x.to(device)")
        if not any(tensor.is_inference() for tensor in samples.tensors):
            return samples
        with torch.inference_mode(False):  # a copy made in inference mode would be like the original
            return samples.map(torch.clone)


def _arranged(given: Any, like: Any) -> Any:
    """`given` with its dicts in the order of those of the example, by which shapes and inputs of the graph go."""
    if isinstance(given, dict) and isinstance(like, dict) and given.keys() == like.keys():
        made = copy.copy(like)
        made.clear()
        made.update({name: _arranged(given[name], like[name]) for name in like})
        return made
    if type(given) in (tuple, list) and type(like) is type(given) and len(given) == len(like):
        return type(given)(_arranged(one, other) for one, other in zip(given, like, strict=True))
    return given


def _same(one: Any, other: Any) -> bool:
    arrays = isinstance(one, np.ndarray) or isinstance(other, np.ndarray)
    return one is other or bool(np.array_equal(one, other) if arrays else one == other)


def _places(inputs: Any) -> str:
    shown = [pytree.keystr(path) or "one value" for path, _ in pytree.tree_leaves_with_path(inputs)]
    return ", ".join(shown[:8]) + (" …" if len(shown) > 8 else "")
