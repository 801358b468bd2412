"""What a job is given, checked before anything is computed or written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import FxpathError, InputError, StoreError
from .items import below
from .microbatch import Recipe
from .selectors.registry import parameters

_LARGEST_THUMBNAIL = 4096


def checked_ids(dataset: Any) -> list[str]:
    """A name for each sample: the data set's `ids`, else 0 … n − 1; raises `InputError` where they do not fit it.

    A sample keeps its name in torch's `Subset`, so that whatever is seeded by it stays the same.
    """
    try:
        count = len(dataset)
    except TypeError:
        raise InputError(
            f"compute: expected a map-style data set with a length, found {type(dataset).__name__}; wrap a stream in a "
            "list or a torch.utils.data.Dataset with __len__ and __getitem__"
        ) from None
    if count == 0:
        raise InputError("compute: the data set is empty")
    whole, _ = below(dataset, 0)
    places = [below(dataset, position)[1] for position in range(count)]
    given = getattr(whole, "ids", None)
    if given is None:
        return [str(place) for place in (places if len(set(places)) == count else range(count))]
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise InputError(f"compute: expected the data set's ids to be a list, found {type(given).__name__}")
    names = [str(name) for name in given]
    if len(names) != len(whole):
        raise InputError(f"compute: the data set has {len(whole)} samples and {len(names)} ids; give one id a sample")
    ids = [names[place] for place in places]
    if len(set(ids)) != count:
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"compute: ids name samples and must differ; {twice!r} appears twice")
    for name in ids:
        if name.endswith("\0") or name != name.encode("utf-8", "ignore").decode():
            raise InputError(f"compute: expected ids that UTF-8 can hold, with no NUL at the end, found {name!r}")
    return ids


def checked_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number of at least `least`, and of no more than `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}: expected a whole number of at least {least}, found {value!r}")
    if most is not None and value > most:
        raise InputError(f"{name}: expected a whole number of at most {most}, found {value!r}")
    return value


def checked_target(target: str | int, dataset: Any) -> str:
    """`labels`, `predicted` or a class number, as text."""
    text = str(target)
    if text not in ("labels", "predicted") and not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise InputError(f"target: expected 'labels', 'predicted' or a class number, found {target!r}")
    why = getattr(below(dataset, 0)[0], "why_no_labels", "")
    if text == "labels" and why:
        raise InputError(f"target: the job is to explain labels, and there are none: {why}")
    return text


def checked_recipe(recipe: Recipe) -> Recipe:
    """A recipe that asks for each pathway once, or for none; raises `InputError` for any other."""
    if not recipe.sparsities and not all(selector.single for selector in recipe.selectors):
        raise InputError("compute: expected at least one sparsity, for example 0.9")
    for selector in recipe.selectors:
        try:
            json.dumps(parameters(selector))
        except (TypeError, ValueError) as error:
            raise InputError(f"selector {selector.key}: expected parameters that JSON can hold ({error})") from error
    keys = [key for key, _, _ in recipe.columns()]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise InputError(
            f"compute: {', '.join(sorted(twice))} is asked for twice; name each selector and sparsity once"
        )
    if recipe.scores not in (None, "float16", "float32"):
        raise InputError(f"scores: expected 'float16' or 'float32', found {recipe.scores!r}")
    return recipe


def checked_thumbnails(size: int, dataset: Any) -> int:
    """The size of thumbnails, 0 for none; raises `InputError` where the data set has none to give."""
    if not isinstance(size, int) or not 0 <= size <= _LARGEST_THUMBNAIL:
        raise InputError(f"thumbnails: expected 0 … {_LARGEST_THUMBNAIL} pixels, found {size!r}; 0 is for none")
    pictures, _ = below(dataset, 0)
    if size and not callable(getattr(pictures, "thumbnail", None)):
        raise InputError(
            f"thumbnails: the data set ({type(pictures).__name__}) has no method thumbnail(i, size) that returns "
            "(size, size, 3) uint8; leave them out"
        )
    return size


def checked_path(path: Path, *, said: str = "compute") -> Path:
    """A path that can be a file's; raises `StoreError` for a folder and for what cannot be reached."""
    with reachable(path, said=said):
        if not path.name or path.is_dir():
            raise StoreError(f"{said}: {path} is a folder; give a file name such as {path / 'run.h5'}")
    return path


@contextmanager
def reachable(path: Path, *, said: str = "compute") -> Iterator[None]:
    """Turn what a strange or forbidden path raises into a `StoreError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, FxpathError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{said}: {path} cannot be reached ({reason}); choose another output file") from error
