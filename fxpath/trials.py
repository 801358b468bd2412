"""What trials need: values that no sample decides, and work that may fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SHORT = re.compile("allocate memory|enough memory|out of memory")


def random_like(tensor: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers, always the same ones of a seed, in place of a tensor's; whole numbers stay."""
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor)


def unless_it_fails(work: Callable[[], Any]) -> Any:
    """What `work` gives, None where it fails, as a graph may in any way on values that it is not made for.

    Memory that runs out is no failure of this kind, and raised.
    """
    try:
        return work()
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or _SHORT.search(str(error)):
            raise
        return None
