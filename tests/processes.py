"""Scripts in processes of their own, and what they leave in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, which finds the package and these tests; warnings are errors there too."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def leftovers(folder: Path) -> set[str]:
    """The names in a folder, hidden ones too."""
    return {found.name for found in folder.iterdir()}
