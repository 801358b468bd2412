"""The samples of a data set, read one by one: whatever goes wrong with one is kept as its reason."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Subset

from .errors import FxpathError, InputError, SampleError
from .network import Network
from .samples import Samples

_LONGEST = 300  # characters of a status; texts in a store are as wide as the longest
_TRIES = 8  # samples among which one should fit the network


@dataclass(frozen=True)
class Item:
    """One sample as a data set gave it: inputs without a batch axis, or the reason why there are none."""

    name: str
    inputs: Any = None
    label: int = -1
    problem: str | None = None
    thumbnail: npt.NDArray[np.uint8] | None = None


def below(dataset: Any, position: int) -> tuple[Any, int]:
    """The data set under any number of torch's `Subset`s, and the sample's position in it."""
    while isinstance(dataset, Subset):
        dataset, position = dataset.dataset, int(dataset.indices[position])
    return dataset, position


def read_item(dataset: Any, position: int, name: str, *, thumbnails: int = 0) -> Item:
    """Sample `position` of a map-style data set; whatever goes wrong is kept as its `problem`."""
    small = np.zeros((thumbnails, thumbnails, 3), dtype=np.uint8) if thumbnails else None
    label = -1
    try:
        entry = dataset[position]
        if isinstance(entry, tuple | list) and len(entry) == 2 and _is_label(entry[1]):
            entry, label = entry[0], _label(entry[1])
        if small is not None:
            pictures, place = below(dataset, position)
            small[:] = pictures.thumbnail(place, thumbnails)
    except Exception as error:  # a data set may raise anything; the job goes on without the sample
        return Item(name, label=label, problem=reason_of(error), thumbnail=small)
    return Item(name, entry, label, thumbnail=small)


def reason_of(error: Exception) -> str:
    """An exception as one short line that a store can hold."""
    text = str(error) if isinstance(error, FxpathError) else "".join(traceback.format_exception_only(error))
    line = " ".join(text.replace("\0", " ").split()).encode("utf-8", "backslashreplace").decode()
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
    return line if line not in ("", "ok") else f"{type(error).__name__} {line}"


def _is_label(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point()
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _label(value: Any) -> int:
    label = int(value)
    if not -(2**63) <= label < 2**63:
        raise InputError(f"expected a label of at most 64 bits, found {label}")
    return max(label, -1)


def misfit(item: Item, network: Network) -> str | None:
    """Why an item's inputs do not fit the network, or None."""
    leaves = pytree.tree_leaves(item.inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return f"expected a tensor from the data set, found {type(item.inputs).__name__}"
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    if shapes != network.input_shapes:
        expected = ", ".join(map(str, network.input_shapes))
        return f"expected an input of shape {expected}, found {', '.join(map(str, shapes))}"
    try:
        network.samples(Samples(_arguments(item.inputs, lambda leaf: _like(leaf, network.device))))
    except InputError as error:
        return reason_of(error)
    return None


def _like(leaf: Tensor, device: torch.device) -> Tensor:
    """A batch of one with a tensor's shape and type, on a device, in no memory."""
    return torch.empty((), dtype=leaf.dtype, device=device).expand(1, *leaf.shape)


def _arguments(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Inputs as a network takes them: a list becomes a tuple, and `function` is applied to every tensor."""
    mapped = pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, inputs)
    return tuple(mapped) if isinstance(mapped, list) else mapped


def collate(items: Sequence[Item], network: Network) -> Samples:
    """Items as one batch on the network's device."""

    structure = pytree.tree_structure(items[0].inputs)
    other = next((item for item in items if pytree.tree_structure(item.inputs) != structure), None)
    if other is not None:
        raise InputError(
            f"compute: samples {items[0].name!r} and {other.name!r} are put together unlike: expected tensors, tuples "
            "or dicts of the same form from the whole data set"
        )
    columns = zip(*(pytree.tree_leaves(item.inputs) for item in items), strict=True)
    leaves = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    inputs = _arguments(pytree.tree_unflatten(leaves, structure), lambda leaf: leaf)
    return Samples(inputs, ids=[item.name for item in items]).to(network.device)


def read_fitting(
    dataset: Any, rows: slice, names: Sequence[str], network: Network, *, thumbnails: int = 0
) -> list[Item]:
    """Samples number `rows` of a data set by their names; those that do not fit the network have that as problem."""
    items = [
        read_item(dataset, position, name, thumbnails=thumbnails)
        for position, name in zip(range(rows.start, rows.stop), names, strict=True)
    ]
    reasons = [item.problem or misfit(item, network) for item in items]
    return [
        item if reason is None else Item(item.name, None, item.label, reason, item.thumbnail)
        for item, reason in zip(items, reasons, strict=True)
    ]


def first_fit(dataset: Any, names: Sequence[str], network: Network, *, said: str = "compute") -> Item | None:
    """The first sample that can be used, None where there seems to be none among those that can be read.

    Raises `InputError` where the whole data set seems not to fit, at once and not sample by sample.
    """
    wrong: tuple[str, str] | None = None
    for position, name in enumerate(names[:_TRIES]):
        item = read_item(dataset, position, name)
        reason = None if item.problem else misfit(item, network)
        if item.problem is None and reason is None:
            try:
                network.real(collate([item], network).require_finite())
            except SampleError:
                continue
            return item
        if reason and not wrong:
            wrong = name, reason
    if wrong:
        raise InputError(
            f"{said}: sample {wrong[0]!r} does not fit the network: {wrong[1]}. Check the preprocessing, or trace "
            "the network with an example of this kind"
        )
    return None
