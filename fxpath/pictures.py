"""A network's input as a picture to look at."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

_ENDS = (0.5, 99.5)  # per cent of the values between black and white, where the preprocessing is not known
_SLACK = 0.02  # of the range: interpolation overshoots


def input_picture(values: npt.ArrayLike, preprocessing: str = "") -> npt.NDArray[np.uint8]:
    """The picture `(H, W, 3)` uint8 RGB that a network's input `(3, H, W)` or `(1, H, W)` shows, in the input's frame.

    Where `preprocessing`, JSON as a `LoadedModel` and a store hold it, states `mean` and `std` (and `channels`, RGB
    unless said, and `range`, [0, 1] unless said) they are undone, and the colours are the photo's own. Where it does
    not, or the values then lie outside the range, black and white are the 0.5th and 99.5th percentile of all values:
    one scale for all channels, as a scale each would bleach what is of one colour. Raises `InputError` for another
    shape and for values that are not finite.

    >>> stated = '{"mean": [100, 110, 120], "std": [1, 1, 1], "channels": "BGR", "range": [0, 255]}'
    >>> input_picture(np.full((3, 1, 1), 10.0), stated)
    array([[[130, 120, 110]]], dtype=uint8)
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 3 or len(found) not in (1, 3) or not found.size:
        raise InputError(
            f"input picture: expected one input (3, H, W) or (1, H, W), found {found.shape}; of a batch, take one"
        )
    if not np.isfinite(found).all():
        raise InputError("input picture: expected finite values, found NaN or infinity")
    stated = _stated(preprocessing)
    shown = _undone(found, stated)
    if shown is None:
        low, high = np.percentile(found, _ENDS)
        shown = (found - low) / (high - low) if high > low else np.full_like(found, 0.5)
    if stated.get("channels") == "BGR":
        shown = shown[::-1]
    picture = np.rint(shown.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(picture, (3, *picture.shape[1:])).transpose(1, 2, 0))


def _stated(preprocessing: str) -> dict[str, Any]:
    try:
        found = json.loads(preprocessing or "{}")
    except (ValueError, RecursionError):  # a user's own words
        return {}
    return found if isinstance(found, dict) else {}


def _undone(values: npt.NDArray[np.float64], stated: dict[str, Any]) -> npt.NDArray[np.float64] | None:
    """The values before the normalisation that is stated, 0 … 1; None where none is, or it cannot be what was done."""
    try:
        mean, std, (low, high) = (
            np.asarray(stated[name] if name != "range" else stated.get(name, (0, 1)), dtype=np.float64)
            for name in ("mean", "std", "range")
        )
        with np.errstate(all="ignore"):
            before = (values * std.reshape(-1, 1, 1) + mean.reshape(-1, 1, 1) - low) / (high - low)
    except (KeyError, TypeError, ValueError):
        return None
    fits = before.shape == values.shape and before.min() >= -_SLACK and before.max() <= 1 + _SLACK
    return before if fits else None
