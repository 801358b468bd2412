"""The one family of errors that fxpath raises for what a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FxpathError(Exception):
    """Base of every error that fxpath raises on purpose; the command line turns it into exit code 2."""


class InputError(FxpathError, ValueError):
    """Inputs, targets or parameters that do not fit: shape, dtype, range."""


class SampleError(InputError):
    """Single samples of a batch cannot be used; the others can.

    `positions` are rows of the batch, `reasons` one sentence each, in the same order.
    """

    def __init__(self, message: str, positions: Sequence[int], reasons: Sequence[str]) -> None:
        super().__init__(message)
        self.positions = tuple(positions)
        self.reasons = tuple(reasons)


class BranchError(InputError):
    """An input takes another branch of the model's code than the example, whose branches the graph holds.

    `on_values` is False where the branch depends on shapes alone.
    """

    def __init__(self, message: str, *, on_values: bool) -> None:
        super().__init__(message)
        self.on_values = on_values


class ModelError(FxpathError):
    """A model cannot be found, loaded or used as it is (training mode, weights that do not fit)."""


class TraceError(ModelError):
    """A model cannot be turned into a graph that equals it."""


class SiteError(FxpathError, ValueError):
    """No activation is a site, or a site is named that does not exist."""


class RestrictionError(FxpathError):
    """A network is restricted in a way that has no meaning: nested, wrong index, wrong batch."""


class LinearityError(FxpathError):
    """Local linearity is asked of a network that is not piecewise linear, or that cannot be differentiated forward."""


class SparsityError(FxpathError, KeyError):
    """A sparsity is outside [0, 1), or a selection does not hold it."""

    __str__ = Exception.__str__


class StoreError(FxpathError):
    """A store, or a part of one, cannot be read or written as asked."""


class ImageError(FxpathError):
    """An image, a folder of images or a label file cannot be used."""


class SmoothSitesWarning(UserWarning):
    """Some sites are not zero on their inactive side; what the paper proves of dead neurons does not cover them."""


class TraceWarning(UserWarning):
    """A graph equals the module, but holds or hides what a user must know: a branch, a stopped gradient, a leaf."""


class EmptyPathwaysWarning(UserWarning):
    """Pathways that keep no neuron: of a sparsity too high, or given where they say nothing."""


class NoContributionWarning(UserWarning):
    """Neurons, or whole samples, of which no score is above 0: the response does not depend on them."""


def unknown(kind: str, name: str, known: Iterable[str], *, way_out: str = "") -> str:
    """Say that `name` is no `kind`, with the nearest names that are.

    >>> unknown("selector", "neuron_mtc", ["neuron_mct", "random"])
    "there is no selector 'neuron_mtc'; nearest: neuron_mct (all: neuron_mct, random)"
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    said = f"there is no {kind} {name!r}"
    if near:
        said += f"; nearest: {', '.join(near)}"
    shown = ", ".join(names[:20]) + (f", … {len(names)} in all" if len(names) > 20 else "")
    said += f" (all: {shown})" if names else f" (there is no {kind} at all)"
    return f"{said}. {way_out}" if way_out else said
