"""Why a model cannot be traced, and where: lines of the user's own code, and ways out."""

from __future__ import annotations

import linecache
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import is_dataclass
from types import FrameType

import torch
from torch import nn

from .equality import short

_HERE = os.path.dirname(__file__) + os.sep
_FOREIGN = (f"{torch.__path__[0]}/", _HERE, "<")  # "<": code that torch makes as it runs

_HINTS = (  # what an attempt's error says, and what helps
    (r"'len' is not supported", "take x.shape[0] in place of len(x)"),
    (r"(int|float)\(\) argument must be|cannot be interpreted as an integer",
     "sizes are numbers already: take x.shape[0] as it is, without int(), range() or a loop over the samples"),
    (r"cannot be iterated", "loop over x.unbind(axis) of an axis that is not the batch"),
    (r"changes a parameter or buffer",
     "write to a buffer only where self.training says so: what a forward reads of the one before is not its input"),
    (r"(output|fails) at batch size|batch size alone|batch sizes", "let nothing depend on the batch size"),
)  # fmt: skip


def _own(filename: str) -> bool:
    return not filename.startswith(_FOREIGN)


def line_of_caller() -> str | None:
    """The line of the user's code that is running: the innermost frame outside of torch and fxpath."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _own(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    code = frame.f_code
    return _shown(code.co_filename, frame.f_lineno, code.co_name, linecache.getline(code.co_filename, frame.f_lineno))


def _shown(filename: str, line: int | None, function: str, text: str | None) -> str:
    return f'{filename}:{line}, in {function}: "{(text or "").strip()}"'


def _source_line(error: BaseException) -> str | None:
    """The line of the user's code at which tracing stopped."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _own(frame.filename)]
    return _shown(frames[-1].filename, frames[-1].lineno, frames[-1].name, frames[-1].line) if frames else None


def described(name: str, error: Exception) -> str:
    """An attempt at tracing and its failure, with the line of the user's code where there is one."""
    line = _source_line(error)
    return f"{name}: {short(error)}" + (f"\n    at {line}" if line else "")


def why_untraceable(model: nn.Module, attempts: Sequence[str], odd: type | None, *, leaves: bool, fixed: bool) -> str:
    """The whole message: every attempt, and what to do. `odd` is a type in the output that torch cannot take apart."""
    if odd is not None:
        own = f"torch.export.register_dataclass({odd.__name__})" if is_dataclass(odd) else "leave it out in forward"
        return (
            f"trace: the output of {type(model).__name__} holds a {odd.__name__}, expected tensors, plain values and "
            "containers that torch.utils._pytree knows. A model of transformers leaves its cache out with "
            f"'use_cache': False in the example; for a type of your own: {own}"
        )
    said = [f"trace: no graph equals {type(model).__name__}.", *(f"  {attempt}" for attempt in attempts)]
    text = "\n".join(attempts)
    if "another gradient" in text:
        hooked = [name or "the model" for name, part in model.named_modules() if _backward_hooks(part)]
        said.append(
            "The output is the module's, its gradient is not: "
            + (
                f"there are backward hooks ({', '.join(hooked)}), which a graph loses; remove them, or "
                if hooked
                else ""
            )
            + "make the module that defines its own gradient a leaf"
        )
    said += [f"Perhaps: {hint}" for pattern, hint in _HINTS if re.search(pattern, text)]
    said.append(
        "Ways out: pass leaves=(ModuleType, …) for modules that need not be looked into, a tracer=… of your own, or "
        + (
            "rewrite the line so that it does not branch on values"
            if fixed
            else "fix_branches=True and an example that fixes the branch (inputs that take another are then refused)"
        )
    )
    if leaves:
        said.append("Of these tracers only symbolic_trace honours leaves; torch.export looks into every module")
    return "\n".join(said)


def opened(notes: Sequence[str]) -> str:
    """Why no module is a leaf in a graph of `torch.export`; `notes` tell of the attempt that failed before."""
    failed = next((note for note in notes if note.startswith("symbolic_trace")), "symbolic_trace")
    return f"torch.export made this graph, and looks into every module; before it failed {failed}"


def _backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)
