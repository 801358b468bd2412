"""Attribution methods behind one protocol: maps like the input, by pathway gradient or by what it is compared with.

Text forms: `gradient`, `grad_cam:site=features.12`, …; a pathway's key, `neuron_mct@0.9`, stands for its pathway
gradient, `masked_gradient:neuron_mct@0.9` for that of the masked network, and `random_active:neuron_mct@0.9`
(`random_active:seed=3:neuron_mct@0.9`) for that of random active neurons, as many at each site; `*` at the end opens
the score map by 3×3 pixels, `*5` by 5×5.
"""

from .parsing import parse_method
from .pathway import MaskedGradient, Opened, PathwayGradient, RandomActive
from .registry import Method, method_names, register

__all__ = [
    "MaskedGradient",
    "Method",
    "Opened",
    "PathwayGradient",
    "RandomActive",
    "method_names",
    "parse_method",
    "register",
]
