"""State dicts: read from a file without running anything in it, and loaded only where they fit whole."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import ModelError

_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_state_dict(path: str | Path) -> Mapping[str, torch.Tensor]:
    """Parameter and buffer tensors by name, on the CPU, from a `.pt`/`.pth` or `.safetensors` file.

    A checkpoint that wraps the state dict under "state_dict", "model_state_dict" or "model" is unwrapped, and the
    prefix "module." that DataParallel leaves is taken off. Nothing but tensors is ever unpickled
    (`torch.load(weights_only=True)`). Raises `ModelError` where the file is absent, unreadable or holds anything else.
    """
    file = Path(path).expanduser()
    if not os.path.isfile(file):  # unlike Path.is_file, False also where permissions forbid to look
        what = "a folder" if os.path.isdir(file) else "no such file"
        raise ModelError(f"weights {file}: expected a .pt, .pth or .safetensors file, found {what}; check --weights")
    state = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    if not isinstance(state, Mapping) or not state:
        raise ModelError(f"weights {file}: expected a state dict (names to tensors), found {_described(state)}")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise ModelError(
                f"weights {file}: expected names to tensors, found {name!r}: {type(value).__name__}; "
                "save the network again with torch.save(model.state_dict(), FILE)"
            )
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _described(state: object) -> str:
    return f"an empty {type(state).__name__}" if isinstance(state, Mapping) else f"a {type(state).__name__}"


def _read_torch(file: Path) -> Any:
    try:
        with file.open("rb") as opened:  # an open file: torch.load leaves its own open when it fails
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as failure:
        first_line = str(failure).strip().partition("\n")[0]
        raise ModelError(
            f"weights {file}: torch.load(weights_only=True) cannot read it ({type(failure).__name__}: {first_line}); "
            "the file is damaged or holds more than tensors: save torch.save(model.state_dict(), FILE) anew"
        ) from failure


def _read_safetensors(file: Path) -> Any:
    try:
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError as failure:
        raise ModelError(
            f"weights {file}: reading safetensors needs its package; pip install safetensors, or give a .pth file"
        ) from failure
    try:
        return load_file(file, device="cpu")
    except Exception as failure:
        raise ModelError(
            f"weights {file}: not a whole safetensors file ({type(failure).__name__}: {failure}); fetch it anew"
        ) from failure


def fit_state_dict(model: torch.nn.Module, state: Mapping[str, torch.Tensor], *, name: str, file: str | Path) -> None:
    """Load `state` into `model`, which must name the same tensors in the same shapes; otherwise nothing is changed.

    BatchNorm's `num_batches_tracked`, which old checkpoints lack, may be missing. Raises `ModelError` that counts what
    is missing, unexpected and of another shape, and names the first few.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key}: expected {tuple(own[key].shape)}, found {tuple(state[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    wrong = [
        f"{len(found)} {what} ({'; '.join(found[:3])}{'; …' if len(found) > 3 else ''})"
        for what, found in groups
        if found
    ]
    if wrong:
        raise ModelError(
            f"{name}: the weights in {file} do not fit: {', '.join(wrong)} of {len(own)} tensors; give weights of this "
            "architecture, or build yours in a package.module:callable"
        )
    model.load_state_dict(state, strict=False)


def _empty_array(kind: object, shape: tuple[int, ...], _code: object) -> np.ndarray[Any, Any]:
    # NumPy itself always pickles shape (0,) here; any other would ask for memory before the data is seen.
    if kind is not _ARRAY or shape != (0,):
        raise pickle.UnpicklingError(f"it asks for an array of shape {shape} before its data")
    return np.ndarray(shape, np.dtype("b"))


_ARRAY = object()  # stands for the class numpy.ndarray, so that a pickle can name it but not call it
_ADMITTED = {
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
}


class _ArraysOnly(pickle.Unpickler):
    """Admits what a pickled NumPy array needs, under its old and its new module name, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return _ADMITTED[module, name]


def read_arrays(path: Path) -> Any:
    """What a pickle of plain containers and NumPy arrays holds, read by an unpickler that admits nothing else.

    Raises `ModelError` for a damaged file and for one that asks for any other object; nothing of it is run.
    """
    try:
        with path.open("rb") as opened:
            return _ArraysOnly(opened, encoding="latin1").load()  # latin1: byte strings of Python 2
    except Exception as failure:
        raise ModelError(
            f"weights {path}: refused as a pickle of arrays ({type(failure).__name__}: {failure}); "
            "install the package that carries it anew"
        ) from failure
