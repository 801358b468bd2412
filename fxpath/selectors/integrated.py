"""NeuronIntGrad: integrated gradients from one site's activation to 0, the whole site at once."""

from __future__ import annotations

import fnmatch
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NoContributionWarning, SiteError, unknown
from ..gates import flat, grouped, unfilled
from ..padding import RealNeurons
from ..pathways import Scores
from ..progress import bar
from ..responses import respond
from ..samples import Samples, type_of_target
from ..stacking import SiteRuns, resolved
from .contribution import ByScore
from .registry import register

if TYPE_CHECKING:
    from ..network import Network
    from ..neurons import NeuronIndex

RULES = ("gauss-legendre", "midpoint", "right")


def quadrature(rule: str, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes α in (0, 1] and weights of a rule for the integral over [0, 1], `(steps,)` float64 each.

    >>> quadrature("midpoint", 2)[0].tolist(), quadrature("right", 2)[0].tolist()
    ([0.25, 0.75], [0.5, 1.0])
    """
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    shift = 0.5 if rule == "midpoint" else 1.0
    nodes = (np.arange(steps) + shift) / steps
    return torch.from_numpy(nodes), torch.full((steps,), 1 / steps, dtype=torch.float64)


@register
@dataclass(frozen=True)
class NeuronIntGrad(ByScore):
    """Integrated gradients of the neurons (the paper's Eq. 4), one site after another.

    A site's whole activation a is scaled along the straight path from 0 to a; what lies before it stays, what follows
    is computed again: c = a · ∫ ∂Φ/∂(αa) dα. `rule` is the quadrature ("gauss-legendre", "midpoint", "right") with
    `steps` nodes. `sites` restricts the scores to sites: names and globs, joined by "+"; the others score 0.
    `rank` "absolute" orders neurons by |c|, "signed" by c, and then none with c < 0 is kept.

    `max_batch` bounds how many rows (samples × steps) run at once; `max_bytes`, unless 0, bounds the memory of what
    their backward pass keeps. Neither changes more than last bits, and neither is part of the name in a store.

    Where all that follows a site is affine or positively homogeneous, the scores are exact for any number of steps; a
    LayerNorm behind the site needs far more steps than a rectifier (`Scores.completeness` tells).
    """

    key: ClassVar[str] = "neuron_intgrad"
    budget: ClassVar[tuple[str, ...]] = ("max_batch", "max_bytes")

    steps: int = 50
    rule: str = "gauss-legendre"
    sites: str = "*"
    rank: str = "absolute"
    max_batch: int = 16
    max_bytes: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("max_batch", 1), ("max_bytes", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"neuron_intgrad: expected {name} to be a whole number ≥ {least}, found {value!r}")
        for name, known in (("rule", RULES), ("rank", ("absolute", "signed"))):
            if getattr(self, name) not in known:
                raise InputError(f"neuron_intgrad: {unknown(name, str(getattr(self, name)), known)}")
        if not isinstance(self.sites, str) or not self.sites:
            raise InputError(
                f"neuron_intgrad: expected sites as names or globs joined by '+', found {self.sites!r}; "
                "for example 'layer1.*+layer2.0.relu'"
            )

    @torch.inference_mode(False)
    def scores(self, network: Network, samples: Any, target: type_of_target = None) -> Scores:
        """Signed contributions `(B, N)`, in units of the response, and completeness errors `(B, sites)`.

        Raises `SiteError` for sites that are not there and `InputError` for a memory bound that is too small. Warns
        with `NoContributionWarning` of sites that do not lead to the response.
        """
        samples = network.samples(samples, target).require_finite()
        chosen, real = self._chosen(network.index), network.real(samples)
        room = self._rows(network, samples, chosen)
        rows = next(rows for rows in range(min(room, samples.batch), 0, -1) if samples.batch % rows == 0)
        pieces = [list(range(samples.batch))[first : first + rows] for first in range(0, samples.batch, rows)]
        parts = [
            self._of_some(network, samples.take(piece), chosen, room // rows, real and real.take(piece))
            for piece in pieces
        ]
        if len(parts) == 1:
            return parts[0]
        errors = torch.cat([part.completeness for part in parts if part.completeness is not None])
        signed = torch.cat([part.signed for part in parts])
        return Scores(signed, network.index, errors, self.key, self.rank, real)

    def _rows(self, network: Network, samples: Samples, chosen: list[int]) -> int:
        """How many rows fit the memory behind the site that needs the most."""
        if not self.max_bytes:
            return self.max_batch
        one = samples.take([0])
        _, target, classes = resolved(network, one)
        runs = (SiteRuns(network, number, one, target, 1, classes) for number in chosen)
        needed, site = max((run.bytes_of_a_copy(), network.sites[run.number].name) for run in runs)
        if needed > self.max_bytes:
            raise InputError(
                f"neuron_intgrad: one sample needs about {needed:,} bytes behind site {site}, "
                f"expected max_bytes of at least that, found {self.max_bytes:,}; or name later sites with sites=…"
            )
        return max(1, min(self.max_batch, self.max_bytes // max(needed, 1)))

    def _chosen(self, index: NeuronIndex) -> list[int]:
        """Numbers of the sites to score, in order."""
        names = [site.name for site in index.sites]
        found: set[int] = set()
        for wanted in self.sites.split("+"):
            exact = [number for number, name in enumerate(names) if name == wanted]
            matching = exact or [number for number, name in enumerate(names) if fnmatch.fnmatchcase(name, wanted)]
            if not matching:
                raise SiteError(f"neuron_intgrad: {unknown('site', wanted, names)}")
            found.update(matching)
        return sorted(found)

    def _of_some(
        self, network: Network, samples: Samples, chosen: list[int], copies: int, real: RealNeurons | None
    ) -> Scores:
        """Scores of samples that are run at once, in so many copies."""
        output, target, classes = resolved(network, samples)
        whole = respond(network.response, output, target, samples.batch).double()
        alphas, weights = quadrature(self.rule, self.steps)
        errors = torch.full((samples.batch, len(network.index)), torch.nan, dtype=torch.float64, device=whole.device)
        signed: Tensor | None = None
        silent: list[str] = []
        with bar(len(chosen) * self.steps, self.key, "step") as shown:
            for number in chosen:
                site = network.sites[number]
                runs = SiteRuns(network, number, samples, target, copies, classes)
                if signed is None:
                    kind = torch.promote_types(runs.activation.dtype, torch.float32)
                    signed = unfilled((samples.batch, network.index.size), kind, network.device).zero_()
                if not runs.leads:
                    silent.append(site.name)
                    errors[:, number] = 0
                    shown.update(self.steps)
                    continue
                products = runs.activation * runs.slopes(alphas, weights, shown.update)
                if not runs.reaches:
                    silent.append(site.name)
                signed = signed.to(torch.promote_types(signed.dtype, products.dtype))
                signed[:, site.slice] = grouped(products if real is None else real.only(number, products), site)
                rest = runs.responses(torch.zeros_like(runs.activation))[0].double()
                total = flat(products, site).sum(dim=1, dtype=torch.float64)
                errors[:, number] = (total - (whole - rest)).abs()
        if silent:
            warnings.warn(
                f"neuron_intgrad: {len(silent)} sites do not lead to the response {network.response.name!r}, and "
                f"score 0: {', '.join(silent[:5])}{' …' if len(silent) > 5 else ''}",
                NoContributionWarning,
                stacklevel=3,
            )
        assert signed is not None
        return Scores(signed, network.index, errors, self.key, self.rank, real)
