"""Selection by contribution: the neurons whose removal would change the response most."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import NoContributionWarning
from ..keys import checked_sparsities
from ..pathways import Pathways, Scores, Selection
from ..samples import Samples, type_of_target
from .registry import register

if TYPE_CHECKING:
    from ..network import Network


class Scorer(Protocol):
    """A selector that scores neurons."""

    def scores(self, network: Network, samples: Any, target: type_of_target = None) -> Scores:
        """Signed scores `(B, N)`."""


class ByScore:
    """Selects the k largest scores of the whole network, for every sparsity at once."""

    single: ClassVar[bool] = False
    keeps_scores: ClassVar[bool] = True

    def select(self: Scorer, network: Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        sparsities = checked_sparsities(sparsities)  # before the work, not after
        scores, real = self.scores(network, samples), network.real(samples)
        if real is not None and scores.real is None:  # of a selector that knows nothing of padding
            scores = replace(scores, signed=scores.signed.masked_fill(~real.mask, 0), real=real)
        found = scores.threshold(sparsities)
        diagnostics = _completeness(scores)
        warn_of_empty(scores, samples, found)
        return Selection(dict(zip(sparsities, found, strict=True)), diagnostics, scores=scores)


def _completeness(scores: Scores) -> dict[str, Tensor]:
    """Completeness errors of every sample and site, absolute and relative to the site's Σ|c| (NaN for 0/0)."""
    if scores.completeness is None:
        return {}
    sums = [scores.signed[:, site.slice].abs().sum(dim=1, dtype=torch.float64) for site in scores.index.sites]
    relative = scores.completeness / torch.stack(sums, dim=1)
    return {"completeness": scores.completeness, "completeness_relative": relative}


def warn_of_empty(scores: Scores, samples: Any, found: Sequence[Pathways]) -> None:
    """Warn of samples of which nothing could be kept: all scores are 0."""
    if not any(bool((pathways.count == 0).any()) for pathways in found):
        return
    rows = torch.nonzero(~scores.signed.any(dim=1)).flatten().tolist()
    if not rows:
        return
    names = [repr(Samples.of(samples).names[row]) for row in rows]
    warnings.warn(
        f"{scores.key}: no neuron of sample {', '.join(names[:5])}{' …' if len(names) > 5 else ''} scores, so "
        "the pathway is empty; the response's gradient vanishes there. Explain a logit rather than a saturated "
        "probability, an active hidden neuron rather than a dead one, or look at the sample",
        NoContributionWarning,
        stacklevel=3,
    )


@register
@dataclass(frozen=True)
class NeuronMCT(ByScore):
    """Marginal contribution to first order: c = a · ∂Φ/∂a (the paper's Eq. 2).

    One forward and one backward for a whole batch and all sites. A dead neuron scores exactly 0.
    """

    key: ClassVar[str] = "neuron_mct"

    def scores(self, network: Network, samples: Any, target: type_of_target = None) -> Scores:
        """Signed contributions `(B, N)`, in units of the response."""
        products, _ = network.signed_products(samples, target)
        return Scores(products, network.index, key=self.key, real=network.real(samples))
