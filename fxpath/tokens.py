"""Where an input marks padding, and along which axis of every site its tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError, SampleError, SiteError, unknown
from .neurons import Site
from .padding import RealNeurons
from .places import Token
from .samples import Samples

if TYPE_CHECKING:
    from .network import Network

_SAME = 1e-5  # of a site's largest activation: what rounding may change
_ASIDE = 1e-3  # of the largest change at a site: what rounding may do elsewhere


@dataclass(frozen=True, eq=False)
class Padding:
    """The input that marks real tokens, by name or place, and the token axis of every site (None: it has none)."""

    given: str | int
    axes: tuple[int | None, ...]

    def real(self, network: Network, samples: Samples) -> RealNeurons:
        """What is real in samples; raises `SampleError` for those without a real token."""
        tokens = _mark(samples, self.given) != 0
        bare = torch.nonzero(~tokens.any(dim=1)).flatten().tolist()
        if bare:
            raise SampleError(
                f"padding: sample {_named(samples, bare)} has no real token: expected {self.given!r} to be other "
                "than 0 at one at least, found 0 everywhere; look at how it is made, or leave the sample out",
                bare,
                [f"it has no real token: {self.given!r} is 0 everywhere"] * len(bare),
            )
        _require_real_place(network, tokens, samples)
        return RealNeurons(tokens, self.axes, network.index)


def _named(samples: Samples, rows: Sequence[int]) -> str:
    return ", ".join(repr(samples.names[row]) for row in rows[:5]) + (" …" if len(rows) > 5 else "")


def _require_real_place(network: Network, tokens: Tensor, samples: Samples) -> None:
    """Raise `SampleError` for samples of which the response reads a token that is padding."""
    place = getattr(network.response, "at", None)
    length = tokens.shape[1]
    if not isinstance(place, Token) or network.places != length or not -length <= place.position < length:
        return  # other places than the input's, or none that there is
    bare = torch.nonzero(~tokens[:, place.position]).flatten().tolist()
    if bare:
        raise SampleError(
            f"padding: the response {network.response.name!r} reads a padding token of sample "
            f"{_named(samples, bare)}; read one that is real in all, pad in front, or give samples of "
            "one length at a time",
            bare,
            [f"the response {network.response.name!r} reads a padding token"] * len(bare),
        )


def find_padding(network: Network, example: Samples, given: str | int) -> Padding:
    """The token axis of every site of a network, for the input that is called `given`.

    It is the axis, other than the channels', whose size is the number of tokens T, and it is tried: where a token is
    masked, what stands there may change a site at this token alone. Raises `InputError` where there is no such input
    and `SiteError` where a site has an axis of this size that does not pass, or none has one.
    """
    mark = _mark(example, given)
    length = mark.shape[1]
    like = {
        number: [place for place, size in enumerate(site.shape) if size == length and place != site.axis]
        for number, site in enumerate(network.sites)
    }
    like = {number: places for number, places in like.items() if places}
    if not like:
        raise SiteError(
            f"padding: no site has an axis of the {length} tokens of {given!r} besides its channels; choose others "
            "with sites=…, or leave padding=… out"
        )
    found = _by_size(network, like, given) if mark.is_meta else _by_trial(network, example, given, like)
    return Padding(given, tuple(found.get(number) for number in range(len(network.sites))))


def _mark(samples: Samples, given: str | int) -> Tensor:
    """The input that marks real tokens, checked."""
    if samples.kwargs:
        if not isinstance(given, str):
            raise InputError(f"padding: expected the name of an input, as the example is a dict, found {given!r}")
        if given not in samples.kwargs:
            raise InputError(f"padding: {unknown('input', given, samples.kwargs)}")
        value = samples.kwargs[given]
    else:
        if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given < len(samples.args):
            raise InputError(
                f"padding: expected the place of an input, 0 … {len(samples.args) - 1}, as the example gives them in "
                f"order, found {given!r}"
            )
        value = samples.args[given]
    if not isinstance(value, Tensor) or value.ndim != 2:
        said = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"padding: expected {given!r} to be a tensor (samples, tokens), other than 0 at real tokens, found {said}"
        )
    return value


def _by_size(network: Network, like: dict[int, list[int]], given: str | int) -> dict[int, int]:
    """Without data there is nothing to try."""
    for number, places in like.items():
        if len(places) > 1:
            raise _doubt(network.sites[number], given, f"{len(places)} of its axes have as many entries as tokens")
    return {number: places[0] for number, places in like.items()}


def _doubt(site: Site, given: str | int, why: str) -> SiteError:
    return SiteError(
        f"padding: site {site.name} {site.shape}: cannot tell which axis holds the tokens that {given!r} marks: {why}; "
        "leave the site out with sites=…, trace with another number of tokens, or leave padding=… out"
    )


def _by_trial(network: Network, example: Samples, given: str | int, like: dict[int, list[int]]) -> dict[int, int]:
    """Changes a token of the example and looks where sites change with it."""
    counts = (_mark(example, given) != 0).sum(dim=1)
    one = example.take([int(counts.argmax())])
    places = torch.nonzero(_mark(one, given)[0]).flatten().tolist()
    if len(places) < 2:
        raise InputError(
            f"padding: expected an example with at least two real tokens ({given!r} other than 0) in a sample, found "
            f"{len(places)}; with fewer the token axes of the sites cannot be told"
        )
    here, there = places[1], _other(one, given, places)
    hidden = _with_mark(one, given, here)
    changes = _changes(network, hidden, _changed(hidden, given, here, there), like)
    found, silent = {}, []
    for number, change in changes.items():
        site = network.sites[number]
        if change is None:
            silent.append(number)
            continue
        fitting = [axis for axis in like[number] if _moved(change, axis) == [here]]
        if len(fitting) != 1:
            why = "what stands at a masked token changes others, too" if not fitting else f"{len(fitting)} axes fit"
            raise _doubt(site, given, why)
        found[number] = fitting[0]
    if silent:  # masked tokens are cut off before these sites, so that real ones have to tell
        found |= _by_real_tokens(network, one, given, (here, there), {number: like[number] for number in silent})
    return found


def _by_real_tokens(
    network: Network, one: Samples, given: str | int, pair: tuple[int, int], like: dict[int, list[int]]
) -> dict[int, int]:
    """A real token changes others, too, but itself the most."""
    fitting = {number: set(places) for number, places in like.items()}
    for here, there in (pair, pair[::-1]):
        for number, change in _changes(network, one, _changed(one, given, here, there), like).items():
            if change is not None:
                fitting[number] &= {axis for axis in like[number] if int(_profile(change, axis).argmax()) == here}
    for number, axes in fitting.items():
        if len(axes) != 1:
            why = "it does not follow a single token" if not axes else f"{len(axes)} axes fit"
            raise _doubt(network.sites[number], given, why)
    return {number: axes.pop() for number, axes in fitting.items()}


def _changes(network: Network, one: Samples, other: Samples, wanted: dict[int, list[int]]) -> dict[int, Tensor | None]:
    """|difference| of every wanted site between two samples, in its shape; None where there is none."""
    first, second = network.activations(one), network.activations(other)
    found: dict[int, Tensor | None] = {}
    for number in wanted:
        change = (first[number] - second[number]).abs().reshape(network.sites[number].shape)
        limit = _SAME * float(first[number].abs().amax())
        found[number] = None if float(change.amax()) <= limit else change
    return found


def _profile(change: Tensor, axis: int) -> Tensor:
    """The largest change at each place of an axis."""
    return change.movedim(axis, 0).flatten(1).amax(dim=1)


def _moved(change: Tensor, axis: int) -> list[int]:
    profile = _profile(change, axis)
    moved: list[int] = torch.nonzero(profile > _ASIDE * profile.amax()).flatten().tolist()
    return moved


# --- other samples ----------------------------------------------------------------------------------------------------


def _with_mark(one: Samples, given: str | int, place: int) -> Samples:
    """The sample with one more token masked."""
    mark = _mark(one, given).clone()
    mark[:, place] = 0
    if one.kwargs:
        return replace(one, inputs={**one.kwargs, given: mark})
    return replace(one, inputs=tuple(mark if number == given else value for number, value in enumerate(one.args)))


def _contents(one: Samples, given: str | int) -> list[tuple[int, Tensor, int]]:
    """Every other input tensor with an axis of as many entries as tokens: its number, itself and the axis."""
    mark = _mark(one, given)
    found = []
    for number, leaf in enumerate(one.tensors):
        axis = next((place for place in range(1, leaf.ndim) if leaf.shape[place] == mark.shape[1]), None)
        if leaf is not mark and axis is not None:
            found.append((number, leaf, axis))
    if not found:
        raise InputError(
            f"padding: expected another input with the {mark.shape[1]} tokens that {given!r} marks, found none; with "
            "nothing that stands at a token its axis cannot be told"
        )
    return found


def _other(one: Samples, given: str | int, places: Sequence[int]) -> int:
    """A real token that differs from the second one, if there is one; first and last ones may have a meaning."""
    contents = _contents(one, given)
    order = [*places[2:-1], *places[-1:], places[0]] if len(places) > 2 else [places[0]]
    for place in order:
        if not all(torch.equal(*leaf.movedim(axis, 0)[[place, places[1]]]) for _, leaf, axis in contents):
            return place
    return order[0]


def _changed(one: Samples, given: str | int, here: int, there: int) -> Samples:
    """The sample with what stands at one token put in place of another's; something else where they are equal."""
    contents = _contents(one, given)
    copies: dict[int, Tensor] = {}
    for number, leaf, axis in contents:
        copies[number] = leaf.clone()
        copies[number].select(axis, here).copy_(leaf.select(axis, there))
    if all(torch.equal(copies[number], leaf) for number, leaf, _ in contents):
        number, leaf, axis = contents[0]
        own = leaf.select(axis, here)
        other = ~own if own.dtype == torch.bool else torch.where(own > 0, own - 1, own + 1)
        copies[number].select(axis, here).copy_(other)
    return _with_tensors(one, copies)


def _with_tensors(one: Samples, copies: dict[int, Tensor]) -> Samples:
    numbers = iter(range(len(one.tensors)))

    def put(leaf: Any) -> Any:
        return copies.get(next(numbers), leaf) if isinstance(leaf, Tensor) else leaf

    return replace(one, inputs=pytree.tree_map(put, one.inputs))
