"""Panels of attribution maps: a photo, a map in colours, a map over the grey photo, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import InputError
from .labels import MapName
from .pages import LINE
from .panels import TEXT, text_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .analysis.maps import MapStore

    Picture = npt.NDArray[np.uint8]
    Pictures = Mapping[Any, Picture] | None

_EMPTY = "0.9"  # the grey of a panel without a map


@dataclass(frozen=True)
class Shading:
    """How values become colours: `percentile` of a map's |values| is full colour.

    Where `signed`, the sign is kept and shown by two colours. Raises `InputError` for a percentile outside (0, 100].
    """

    signed: bool = False
    percentile: float = 99.0

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise InputError(f"map figure: expected a percentile in (0, 100], found {self.percentile}; 99 is usual")

    @property
    def look(self) -> dict[str, Any]:
        """Colour map and limits, as `imshow` takes them."""
        return {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if self.signed else {"cmap": "inferno", "vmin": 0, "vmax": 1}

    def top(self, values: npt.NDArray[Any]) -> float:
        """What becomes full colour: the percentile, or where that is 0 the one of those other than 0."""
        sizes = np.abs(values)
        return self._percentile(sizes) or self._percentile(sizes[sizes > 0])

    def sparse(self, values: npt.NDArray[Any]) -> bool:
        """Whether the percentile is 0."""
        return not self._percentile(np.abs(values))

    def _percentile(self, sizes: npt.NDArray[Any]) -> float:
        return float(np.percentile(sizes, self.percentile, method="lower"))  # a value that is there, not one near 0

    def shade(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The values as shares of full colour, clipped: 0 … 1, or −1 … 1."""
        shown = np.asarray(values if self.signed else np.abs(values), dtype=np.float64)
        return np.clip(shown / self.top(values), -1.0, 1.0)

    def said(self, sparse: bool) -> str:
        """What full colour is, where some maps may be sparse."""
        if self.percentile == 100:
            return "the largest |value| of a map"
        whole = f"{self.percentile:g}"
        ending = "th" if whole[-2:-1] == "1" else {"1": "st", "2": "nd", "3": "rd"}.get(whole[-1], "th")
        but = " (where that is 0, of those other than 0)" if sparse else ""
        return f"{whole}{ending} percentile of a map's |values|{but}; above it all is clipped"


@dataclass(frozen=True)
class Photo:
    """A picture of a sample `(h, w, 3)`, None if there is none; `given` by the caller: in the frame of the input."""

    pixels: Picture | None
    given: bool

    @property
    def stands_in(self) -> bool:
        """Whether it is a thumbnail, which may not show what the network saw."""
        return self.pixels is not None and not self.given

    def draw(self, ax: Axes, sizes: tuple[int, ...]) -> None:
        """The picture, one that was given in the size of the maps `(H, W)`."""
        if self.pixels is None:
            _say(ax, "no picture", (1.0, 1.0))
        else:
            ax.imshow(_fitted(self.pixels, sizes) if self.given else self.pixels)


def draw_over(ax: Axes, picture: Picture, shaded: npt.NDArray[np.float64], shading: Shading) -> None:
    """A map over the grey picture, opaque from two thirds of full colour on and clear at 0."""
    grey = np.asarray(Image.fromarray(_fitted(picture, shaded.shape)).convert("L"), dtype=np.float64) / 255
    grey = 0.6 * grey + (0.4 if shading.signed else 0.0)  # darker, or lighter, so that colours stand out
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1)
    ax.imshow(shaded, alpha=np.minimum(1.5 * np.abs(shaded), 1.0), **shading.look)


def _fitted(picture: Picture, sizes: tuple[int, ...]) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((sizes[1], sizes[0]), Image.Resampling.BICUBIC), dtype=np.uint8)


def photo_of(store: MapStore, sample: int | str, pictures: Pictures) -> Photo:
    """A sample's picture out of `pictures`, else the store's thumbnail; raises `InputError` for one of another form."""
    name = str(store.ids[store.row(sample)])
    for key in (sample, name):
        if pictures is not None and key in pictures:
            pixels = np.asarray(pictures[key])
            if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
                raise InputError(
                    f"picture of {name!r}: expected (h, w, 3) uint8 RGB, found {pixels.shape} {pixels.dtype}; "
                    "LoadedModel.picture makes one of the network's input"
                )
            return Photo(pixels, given=True)
    return Photo(store.thumbnail(sample), given=False)


def draw_map(
    ax: Axes, store: MapStore, key: str, row: int, shading: Shading, inches: tuple[float, float]
) -> npt.NDArray[Any] | None:
    """A map, which is returned, or the reason why there is none."""
    values = np.asarray(store.maps(key, slice(row, row + 1))[0], dtype=np.float64)
    if not np.isfinite(values).all():
        _say(ax, str(store.map_missing(key)[row]) or "holds values that are not finite", inches)
    elif not values.any():
        _say(
            ax,
            "all 0" + (": the pathway does not reach the input" if MapName.parse(key).pathway else ""),
            inches,
        )
    else:
        ax.imshow(shading.shade(values), **shading.look)
        return values
    return None


def _say(ax: Axes, reason: str, inches: tuple[float, float]) -> None:
    ax.set_facecolor(_EMPTY)
    lines = text_lines(reason, inches[0] - 0.1, max(1, int((inches[1] - 0.05) / LINE)))
    ax.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=TEXT, color="0.3", transform=ax.transAxes,
            linespacing=1.1, parse_math=False)  # fmt: skip
