"""Rank correlation of the rows of two tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .pathways import by_thread


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of equal rows of `(B, n)`, `(B,)` float64; NaN where either is constant or has NaN."""
    from scipy.stats import rankdata

    found = np.full(len(first), np.nan)
    rows = [values.detach().cpu().numpy() for values in (first, second)]

    def correlate(numbers: range) -> None:
        for number in numbers:
            one, other = rows[0][number], rows[1][number]
            if one.size and one.min() < one.max() and other.min() < other.max():
                found[number] = np.corrcoef(rankdata(one), rankdata(other))[0, 1]

    by_thread(correlate, len(first))
    return torch.from_numpy(found).to(first.device)
