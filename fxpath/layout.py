"""How the inputs of a network are put together: what the example shows, and what other samples are checked against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .errors import InputError
from .samples import Samples


@dataclass(frozen=True)
class Layout:
    """The inputs of an example: each tensor's shape without the batch axis and its type, and all that is no tensor.

    `keys` are the names of the arguments, sorted, or how many there are in order; `order` the names as given; `home`
    is where the example is.
    """

    tensors: list[tuple[tuple[int, ...], torch.dtype]]
    constants: list[Any]
    keys: list[str] | int
    order: tuple[str, ...]
    home: torch.device

    @classmethod
    def of(cls, example: Samples) -> Layout:
        return cls(
            [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in example.tensors],
            example.constants,
            sorted(example.kwargs) or len(example.args),
            tuple(example.kwargs),
            example.device,
        )

    def fit(self, samples: Samples, device: torch.device) -> Samples:
        """The samples as the network takes them; raises `InputError` where shape, type or device do not fit.

        Tensors made in inference mode are copied, as gradients need.
        """
        keys = sorted(samples.kwargs) or len(samples.args)
        if keys != self.keys:
            raise InputError(f"network: expected the arguments of the example ({self.keys}), found {keys}")
        if samples.kwargs:  # in the example's order, so that shapes are compared with their own
            samples = replace(samples, inputs={name: samples.kwargs[name] for name in self.order})
        if samples.constants != self.constants:
            raise InputError(
                f"network: expected the arguments that are no tensors to be {self.constants}, as in the example, "
                f"found {samples.constants}; they are part of the graph, so trace again to change them"
            )
        if len(samples.tensors) != len(self.tensors):
            raise InputError(
                f"network: expected {len(self.tensors)} tensors, put together as in the example, found "
                f"{len(samples.tensors)}"
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
