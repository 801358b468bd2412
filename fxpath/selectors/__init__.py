"""Selectors: from a network and samples to pathways. Found by name in a registry that entry points extend."""

from .baselines import Active, Magnitude, Random
from .contribution import NeuronMCT
from .integrated import NeuronIntGrad
from .pruning import GreedyPruning
from .registry import Selector, names, parse, register
from .routing import DGR

__all__ = [
    "DGR",
    "Active",
    "GreedyPruning",
    "Magnitude",
    "NeuronIntGrad",
    "NeuronMCT",
    "Random",
    "Selector",
    "names",
    "parse",
    "register",
]
