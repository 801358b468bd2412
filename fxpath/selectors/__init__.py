"""Selectors: from a network and samples to pathways. Found by name in a registry that entry points extend."""

from .baselines import Active, Magnitude, Random
from .contribution import NeuronMCT
from .registry import Selector, names, parse, register

__all__ = ["Active", "Magnitude", "NeuronMCT", "Random", "Selector", "names", "parse", "register"]
