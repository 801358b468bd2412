"""Attribution methods behind one protocol: maps like the input, by pathway gradient or by what it is compared with.

Text forms: `gradient`, `grad_cam:site=features.12`, …; a pathway's key, `neuron_mct@0.9`, stands for its pathway
gradient, `masked_gradient:neuron_mct@0.9` for that of the masked network; `*` at the end opens the score map.
"""

from .parsing import parse_method
from .pathway import MaskedGradient, Opened, PathwayGradient
from .registry import Method, method_names, register

__all__ = ["MaskedGradient", "Method", "Opened", "PathwayGradient", "method_names", "parse_method", "register"]
