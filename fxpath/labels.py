"""How pathways and sites are named and coloured in figures, the same in all of them."""

from __future__ import annotations

import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .keys import PathwayKey

# Okabe and Ito's colours, told apart with every common colour blindness; yellow is left out, too pale for a line
_SELECTORS = {
    "neuron_mct": "#0072B2",
    "neuron_intgrad": "#56B4E9",
    "greedy_pruning": "#D55E00",
    "dgr": "#E69F00",
    "random": "#999999",
    "active": "#000000",
    "magnitude": "#009E73",
}
_OTHERS = ("#CC79A7", "#882255", "#332288", "#117733", "#AA4499", "#661100")
_NAMES = {
    "neuron_mct": "NeuronMCT",
    "neuron_intgrad": "NeuronIntGrad",
    "dgr": "DGR",
    "input_mct": "InputMCT",
    "input_intgrad": "InputIntGrad",
    "grad_cam": "GradCAM",
}
_OF_PATHWAY = {"masked_gradient": "MaskedGradient of", "random_active": "RandomActive like"}
_MARKERS = "osD^vPX*<>"
Style = Literal["-"] | tuple[float, tuple[float, ...]]
_STYLES: tuple[Style, ...] = ("-", (0, (4, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)))


@dataclass(frozen=True)
class Look:
    """Colour, marker and line style of one family of pathways."""

    colour: str
    marker: str
    style: Style


def looks(families: Iterable[str]) -> dict[str, Look]:
    """A look for each family: the colour is the selector's, the style tells families of one selector apart.

    >>> looks(["dgr:init=1", "dgr:init=r"])["dgr:init=r"].colour
    '#E69F00'
    """
    found = list(dict.fromkeys(families))
    selectors = {family: family.partition(":")[0] for family in found}
    others = sorted(set(selectors.values()) - set(_SELECTORS))
    colours = _SELECTORS | {name: _OTHERS[number % len(_OTHERS)] for number, name in enumerate(others)}
    seen: Counter[str] = Counter()
    given: dict[str, Look] = {}
    for number, family in enumerate(found):
        selector = selectors[family]
        given[family] = Look(
            colours[selector], _MARKERS[number % len(_MARKERS)], _STYLES[seen[selector] % len(_STYLES)]
        )
        seen[selector] += 1
    return given


def series(count: int) -> list[Look]:
    """Looks for lines that are not selectors, such as pairs of them: as many as asked, colours repeat after 10.

    >>> len({look.colour for look in series(8)})
    8
    """
    colours = [*(colour for name, colour in _SELECTORS.items() if name not in ("random", "active")), *_OTHERS[:5]]
    return [
        Look(colours[number % 10], _MARKERS[number % len(_MARKERS)], _STYLES[number // 10 % len(_STYLES)])
        for number in range(count)
    ]


def pathway_label(key: str) -> str:
    """A key as people write the selector, without its sparsity.

    >>> pathway_label("greedy_pruning@0.9"), pathway_label("dgr:init=1@0.9")
    ('GreedyPruning', 'DGR(init=1)')
    """
    parsed = PathwayKey.parse(key)
    name = _NAMES.get(parsed.selector) or "".join(part.capitalize() for part in parsed.selector.split("_"))
    if not parsed.parameters:
        return name
    return f"{name}({', '.join(f'{parameter}={value}' for parameter, value in sorted(parsed.parameters.items()))})"


@dataclass(frozen=True)
class MapName:
    """What an attribution map's key says: the method, the key of its pathway if it has one, and whether it is opened.

    >>> MapName.parse("neuron_mct@0.9*")
    MapName(method='', pathway='neuron_mct@0.9', opened=True)
    >>> MapName.parse("masked_gradient:active").pathway, MapName.parse("occlusion:size=8,stride=8").method
    ('active', 'occlusion:size=8,stride=8')
    """

    method: str
    pathway: str
    opened: bool

    @classmethod
    def parse(cls, key: str) -> MapName:
        """Read a key; what starts from no pathway is a method's text form."""
        bare = key.rstrip("*")
        method, _, rest = bare.partition(":")
        if method in _OF_PATHWAY:
            return cls(method, rest, bare != key)
        is_pathway = "@" in bare or method in _SELECTORS
        return cls("" if is_pathway else bare, bare if is_pathway else "", bare != key)

    @property
    def sparsity(self) -> float | None:
        """That of its pathway, None where it has none."""
        return PathwayKey.parse(self.pathway).sparsity if self.pathway else None

    @property
    def family(self) -> str:
        """The key without sparsity and star: what has one colour."""
        return f"{self.method}:{self.pathway}".strip(":").partition("@")[0]

    @property
    def label(self) -> str:
        """As people write it, without the sparsity."""
        star = "*" if self.opened else ""
        if not self.pathway:
            return pathway_label(self.method) + star
        return f"{_OF_PATHWAY.get(self.method, '')} {pathway_label(self.pathway)}{star}".lstrip()


def map_label(key: str) -> str:
    r"""An attribution map's key as people write it.

    >>> map_label("grad_cam"), map_label("masked_gradient:neuron_mct@0.9"), map_label("neuron_mct@0.9*")
    ('GradCAM', 'MaskedGradient of NeuronMCT, κ\xa0=\xa00.9', 'NeuronMCT*, κ\xa0=\xa00.9')
    """
    name = MapName.parse(key)
    level = name.sparsity
    return name.label if level is None else f"{name.label}, {sparsity_label(level)}"


def sparsity_label(sparsity: float) -> str:
    """κ, on one line."""
    return f"κ\xa0=\xa0{sparsity:g}"


def site_labels(names: Sequence[str], longest: int = 16) -> list[str]:
    """Short names of sites, still different from each other: shared beginnings and "activation" or "relu" go.

    >>> site_labels(["features.3.squeeze_activation", "features.3.expand1x1_activation"])
    ['squeeze', 'expand1x1']
    >>> site_labels(["features.3.squeeze_activation", "features.12.expand3x3_activation", "classifier.2"])
    ['feat.3.squeeze', 'feat.12.expand3x3', 'clas.2']
    >>> site_labels(["relu", "layer1.0.relu", "layer1.0.relu_1"])
    ['relu', 'layer1.0', 'layer1.0_1']
    """
    parts = [name.split(".") for name in names]
    shared = min(map(len, parts), default=1) - 1
    while len({tuple(part[:shared]) for part in parts}) > 1:
        shared -= 1
    bare = [".".join(part[shared:]) for part in parts]
    short = [re.sub(r"[._](activation|relu6?)(?=[._]|$)", "", name) or name for name in bare]
    if max(map(len, short), default=0) > longest:  # the modules that hold the site say little: four letters each
        short = [re.sub(r"([A-Za-z]{4})[A-Za-z_]+(?=\.)", r"\1", name) for name in short]
    for candidates in (short, bare, list(names)):
        cut = [_end(name, longest + 1) for name in candidates]
        if len(set(cut)) == len(cut):
            return cut
    return [f"{number} {_end(name, longest - 4)}" for number, name in enumerate(names)]


def _end(name: str, longest: int) -> str:
    """The end of a name, which tells modules of one network apart."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def wrapped(label: str, width: int) -> str:
    """A label on two lines at most, cut where it is longer."""
    lines = textwrap.wrap(label.replace("(", " (", 1), width, break_long_words=False, break_on_hyphens=False)
    if len(lines) > 2:
        lines = [lines[0], f"{lines[1].rstrip(',')} …"]
    return "\n".join(lines).replace(" (", "(")


def pathway_labels(keys: Iterable[str], width: int) -> list[str]:
    """Labels of pathways for an axis, numbered where cutting them made two equal."""
    names = [wrapped(pathway_label(key), width) for key in keys]
    return [
        f"{name} #{names[:place].count(name) + 1}" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def names_pair(wanted: Sequence[str], pair: Sequence[str]) -> bool:
    """Whether two names (keys, families or selectors) mean these two keys, in this order."""
    return len(wanted) == len(pair) and all(
        name in (key, PathwayKey.parse(key).family, PathwayKey.parse(key).selector)
        for name, key in zip(wanted, pair, strict=True)
    )


def store_names(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """A name for each store to stand in figures: the file's, with its folder, or a number, where two would be equal.

    >>> store_names(["vgg/run.h5", "resnet/run.h5"]), store_names(["runs/vgg.h5"])
    (['vgg/run', 'resnet/run'], ['vgg'])
    """
    found = [Path(path) for path in paths]
    for names in ([path.stem for path in found], [f"{path.parent.name}/{path.stem}" for path in found]):
        if len(set(names)) == len(names):
            return names
    return [f"{number} {path.stem}" for number, path in enumerate(found, start=1)]
