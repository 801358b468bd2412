"""What a network answers: the values that its runs return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward and one backward: Φ `(B,)`, the class explained `(B,)`, values and gradients of every site.

    `activations[i]` and `gradients[i]` have site i's own shape `(B, …)`; a gradient is ∂Φ/∂a at the gate's output.
    """

    output: Any
    response: Tensor
    target: Tensor | None
    activations: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True, eq=False)
class Original:
    """What the unrestricted network says of samples.

    response, probability, prediction, target `(B,)`; `active` `(B, N)` bool: a > 0 (a channel counts when any of its
    units does; at padding tokens none is); `packed` `(B, nbytes)`: the same as `Pathways.packed` gives it. probability,
    prediction and target are None for responses without classes.
    """

    response: Tensor
    probability: Tensor | None
    prediction: Tensor | None
    target: Tensor | None
    active: Tensor
    logits: Tensor | None = None
    packed: Tensor = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a network masked to pathways answers.

    response = Φ(x; e ⊙ a), dropped_response = Φ(x; (1 − e) ⊙ a), probability, same_class (its argmax is the
    original's), all `(B,)`; live `(B, sites)`: neurons of the pathway that are dead in the original network and
    switched on in the masked one.
    """

    response: Tensor
    probability: Tensor | None
    same_class: Tensor | None
    dropped_response: Tensor
    live: Tensor
