"""What a user names rather than hands over: `package.module:callable`, and files that installed packages carry."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from .errors import FxpathError, unknown


def named_object(
    spec: str,
    *,
    kind: str,
    expected: str,
    fits: Callable[[object], bool],
    error: type[FxpathError],
    prefixes: Sequence[str] = (),
    before_call: Callable[[], object] | None = None,
) -> object:
    """The object that `package.module:callable` names: what the callable returns, or the object itself if it fits.

    The current folder is importable, as with `python -m`, and stays so (the object may import more when it is used).
    `kind` ("model"), `expected` ("an nn.Module") and `prefixes` (other words that may stand before the colon) go into
    messages. `before_call` runs between import and call. Raises `error` when there is no such module or name, when the
    import or the call fails, or when the object does not satisfy `fits`; an `FxpathError` of the callable itself
    passes unchanged.

    >>> named_object("math:pi", kind="number", expected="a float", fits=lambda x: isinstance(x, float),
    ...              error=FxpathError)
    3.141592653589793
    """
    said = f"{kind} {spec!r}"
    found = _attribute(spec, said, error, prefixes)
    if fits(found):
        return found
    if not callable(found):
        raise error(f"{said}: expected {expected}, or a callable that returns one, found {type(found).__name__}")
    if before_call is not None:
        before_call()
    try:
        returned = found()
    except FxpathError:
        raise
    except Exception as failure:
        raise error(
            f"{said}: calling it without arguments failed with {type(failure).__name__}: {failure}; "
            f"name a callable that takes no arguments and returns {expected}"
        ) from failure
    if not fits(returned):
        raise error(f"{said}: expected the callable to return {expected}, found {type(returned).__name__}")
    return returned


def _attribute(spec: str, said: str, error: type[FxpathError], prefixes: Sequence[str]) -> object:
    module_name, _, path = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise error(f"{said}: expected package.module:callable, found {spec!r}; for example mymodels.small:build")
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: object = importlib.import_module(module_name)
    except Exception as failure:
        absent = isinstance(failure, ModuleNotFoundError) and failure.name
        if absent and f"{module_name}.".startswith(f"{absent}."):
            near = unknown("module or prefix", module_name, prefixes) if prefixes else f"no module {module_name!r}"
            raise error(f"{said}: {near}. A module is found as by `import`, from the current folder on") from failure
        raise error(f"{said}: importing {module_name} failed with {type(failure).__name__}: {failure}") from failure
    for name in path.split("."):
        if not hasattr(found, name):
            public = [other for other in vars(found) if not other.startswith("_")] if hasattr(found, "__dict__") else []
            raise error(f"{said}: {unknown(f'name in {module_name}', name, public)}")
        found = getattr(found, name)
    return found


def packaged(package: str, *path: str, error: type[FxpathError], install: str) -> Path:
    """A file or folder that an installed package carries, found without importing the package.

    Raises `error` with the command `install` when the package, or this part of it, is not there.

    >>> packaged("json", "decoder.py", error=FxpathError, install="").name
    'decoder.py'
    """
    try:
        spec = find_spec(package)
    except ValueError:  # a module without a spec was put into sys.modules
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise error(f"the package {package} is not installed; {install}")
    found = Path(next(iter(spec.submodule_search_locations)), *path)
    if not found.exists():
        raise error(f"the package {package} does not carry {'/'.join(path)} (looked for {found}); {install}")
    return found
