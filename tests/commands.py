"""Commands of the command line in this process, as they are typed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from fxpath.cli import main


class Said(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def typed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Said:
    """Run a command, which must leave torch's threads as they were."""
    before = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert torch.get_num_threads() == before
    said = capsys.readouterr()
    return Said(int(ended.value.code or 0), said.out, said.err)
