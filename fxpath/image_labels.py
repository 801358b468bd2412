"""Which output of the network each picture belongs to: from a label file, or from the folders the pictures lie in."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .errors import ImageError, unknown

UNKNOWN = -1

_WHOLE = re.compile(r"-?[0-9]{1,18}")


class ClassNames:
    """Label names, looked up exactly, or else apart from case and "_" for " ".

    >>> names = ClassNames(("tench", "golden retriever", "Cat", "CAT"))
    >>> names.number("golden_Retriever"), names.number("CAT"), names.number("cat"), names.ambiguous("cat")
    (1, 3, None, True)
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._exact: dict[str, list[int]] = {}
        self._plain: dict[str, list[int]] = {}
        for number, name in enumerate(classes):
            self._exact.setdefault(name, []).append(number)
            self._plain.setdefault(_plain(name), []).append(number)

    def _found(self, text: str) -> list[int]:
        return self._exact.get(text) or self._plain.get(_plain(text), [])

    def number(self, text: str) -> int | None:
        """The number of the one class that `text` names, or None."""
        found = self._found(text)
        return found[0] if len(found) == 1 else None

    def ambiguous(self, text: str) -> bool:
        """Whether more than one class goes by this name."""
        return len(self._found(text)) > 1


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def folder_labels(
    used: Sequence[str], every: Sequence[str], classes: Sequence[str]
) -> tuple[Mapping[str, int] | None, str]:
    """The class number of each folder of an ImageFolder layout, or None and the reason why there are none.

    `used` are the folders that hold pictures, `every` all folders, both sorted. In this order: all of `used` are label
    names; all are whole numbers within range; there are as many folders as classes, so that the sorted order counts, as
    in torchvision's ImageFolder.

    >>> folder_labels(["1", "0"], ["0", "1"], ())
    ({'1': 1, '0': 0}, '')
    """
    names = ClassNames(classes)
    named = {folder: names.number(folder) for folder in used}
    by_name = {folder: number for folder, number in named.items() if number is not None}
    if len(by_name) == len(used):
        return by_name, ""
    if all(folder.isascii() and folder.isdecimal() for folder in used):
        numbers = {folder: int(folder) for folder in used}
        if not classes or max(numbers.values()) < len(classes):
            return numbers, ""
    if classes and len(every) == len(classes):
        return {folder: number for number, folder in enumerate(every)}, ""
    shown = ", ".join(used[:3]) + (", …" if len(used) > 3 else "")
    if not classes:
        why = "the network's label names are not known, and the folders are not class numbers"
    else:
        why = (
            f"the folders are neither all label names of the network, nor numbers below {len(classes)}, nor "
            f"{len(classes)} in number (there are {len(every)})"
        )
    return None, f"{why}: {shown}; a label file (file,label) settles it"


def read_label_file(path: str | Path, ids: Sequence[str], classes: Sequence[str]) -> tuple[int, ...]:
    """The label of each of `ids`, from a CSV file of `file,label` lines, with a header or without.

    A label is a class number from 0 or a class name. Raises `ImageError`, with the line, for a file that is not among
    `ids` or comes twice, a label that is none or out of range, and files that have no label.
    """
    file = Path(path).expanduser()
    known, names = set(ids), ClassNames(classes)
    labels: dict[str, int] = {}
    lines: dict[str, int] = {}
    for place, (line, name, label) in enumerate(_rows(file)):
        number = _number(label, names)
        if name not in known:
            if place == 0 and isinstance(number, str) and not _WHOLE.fullmatch(label):
                continue  # a header: its file is no file, its label no label
            raise ImageError(f"labels {file}, line {line}: {unknown('image', name, ids)}")
        if isinstance(number, str):
            raise ImageError(f"labels {file}, line {line} ({name}): {number}")
        if name in labels:
            raise ImageError(f"labels {file}, line {line}: {name} has a label already, in line {lines[name]}; keep one")
        labels[name], lines[name] = number, line
    missing = [name for name in ids if name not in labels]
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ImageError(
            f"labels {file}: {len(missing)} of {len(ids)} images have no label: {shown}; "
            "add their lines, or move them out of the folder"
        )
    return tuple(labels[name] for name in ids)


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            for row in reader:
                if not "".join(row).strip():
                    continue
                if len(row) != 2:
                    raise ImageError(
                        f"labels {file}, line {reader.line_num}: expected file,label, found {len(row)} columns "
                        f"({','.join(row)[:80]}); put a name that holds a comma in quotes"
                    )
                name = row[0].strip().replace("\\", "/").removeprefix("./")
                yield reader.line_num, name, row[1].strip()
    except OSError as failure:
        raise ImageError(f"labels {file}: cannot be read ({failure.strerror}); check --labels") from failure
    except (UnicodeDecodeError, csv.Error) as failure:
        raise ImageError(f"labels {file}: expected a CSV file in UTF-8 ({failure})") from failure


def _number(label: str, names: ClassNames) -> int | str:
    """A label's class number, or what is wrong with it."""
    named, classes = names.number(label), names.classes
    if named is not None:
        return named
    if _WHOLE.fullmatch(label):
        number = int(label)
        if number < 0 or (classes and number >= len(classes)):
            upper = f"0 … {len(classes) - 1}" if classes else "0 or more"
            return f"expected a label in {upper}, found {label}"
        return number
    if not classes:
        return f"expected a class number, as the network's label names are not known, found {label!r}"
    if names.ambiguous(label):
        return f"the label {label!r} fits more than one class; give the class number"
    return unknown("class", label, classes, way_out="A class number will do too")
