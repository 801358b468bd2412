"""What holds for every test."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers alone and after others, in every run."""
    if "torch" in sys.modules:  # tests of the offline rooms do not import it
        sys.modules["torch"].manual_seed(0)
