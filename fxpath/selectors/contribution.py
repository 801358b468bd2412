"""Selection by contribution: the neurons whose removal would change the response most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..keys import checked_sparsities
from ..pathways import Scores, Selection
from ..samples import type_of_target
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
        scores = self.scores(network, samples)
        found = scores.threshold(sparsities)
        diagnostics = {} if scores.completeness is None else {"completeness": scores.completeness}
        return Selection(dict(zip(sparsities, found, strict=True)), diagnostics, scores=scores)


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
        return Scores(products, network.index, key=self.key)
