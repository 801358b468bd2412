"""How far Φ̂ and its gradient are from linear: measured, inside and outside of the radius, and against Φ."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import InputError, RestrictionError
from .gates import Gates
from .linearity import random_directions, ray_radius
from .network import Network
from .pathways import Pathways
from .responses import respond
from .samples import Samples, type_of_target

if TYPE_CHECKING:
    import pandas as pd

INSIDE, OUTSIDE = (0.1, 0.5, 0.99), (1.01, 2.0, 10.0)


def verify_linearity(
    network: Network,
    x: Any,
    pathways: Pathways,
    target: type_of_target = None,
    *,
    directions: int = 8,
    inside: Sequence[float] = INSIDE,
    outside: Sequence[float] = OUTSIDE,
    radius: Tensor | None = None,
    seed: int = 0,
    affine: Sequence[str] = (),
    progress: bool = False,
) -> pd.DataFrame:
    """Propositions 4 and 5, checked: Φ̂(x + δ; e) against Φ(x) + g·δ, with the constants of x, along random rays.

    A row for each sample (its id), direction and share of the radius: `length` ‖δ‖₂; `inside`; `deviation` Φ̂(x + δ) −
    Φ(x) − g·δ; `relative`, |deviation| / (1 + |Φ| + |g·δ|), which float64 keeps below 1e-9 inside; `gradient_change`
    ‖∇Φ̂(x + δ) − g‖ / ‖g‖, NaN where g is 0. What happens outside is reported, not claimed. The radius is the ray's own
    (`ray_radius`), or `radius` `(B,)` for all rays, such as `linear_radius(…).value`; along a ray without end it is
    ‖x‖₂. Raises as `ray_radius` does.
    """
    import pandas as pd

    shares = [*_positive("inside", inside), *_positive("outside", outside)]
    samples, start = _at_x(network, x, pathways, target)
    norm = _flat(samples).norm(dim=1)
    rows = []
    with network.frozen(pathways, at=samples):
        value, gradient = _value_and_gradient(network, start)
    rays = list(random_directions(samples, directions, seed))
    for number, ray in enumerate(tqdm(rays, desc="linearity", unit="ray", disable=not progress)):
        if radius is None:
            reach = ray_radius(network, samples, pathways, ray.inputs, affine=affine)
        else:
            reach = _fitting(radius, samples)
        scale = torch.where(reach.isfinite(), reach, norm)
        with network.frozen(pathways, at=samples):
            for share in shares:
                moved, step = _moved(start, ray, share * scale)
                found, slope = _value_and_gradient(network, moved)
                along = (gradient * step).sum(dim=1)
                deviation = found - value - along
                rows += _table(samples, {
                    "direction": number, "share": share, "length": share * scale, "inside": share * scale < reach,
                    "deviation": deviation, "relative": _relative(found - value, value, along),
                    "gradient_change": (slope - gradient).norm(dim=1) / gradient.norm(dim=1),
                })  # fmt: skip
    return pd.DataFrame(rows)


def gradient_stability(
    network: Network,
    x: Any,
    pathways: Pathways | None = None,
    target: type_of_target = None,
    *,
    lengths: Sequence[float | Tensor],
    directions: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """How the gradient changes near x: ‖∇Φ̂(x + δ) − ∇Φ̂(x)‖ / ‖∇Φ̂(x)‖ over random δ of given lengths ‖δ‖₂.

    Without pathways it is measured of the original network's Φ. A row for each sample (its id) and number of a length:
    `length`, the `mean` and `maximum` over directions, NaN where the gradient at x is 0, and the mean `deviation` of Φ̂
    from linear, |Φ̂(x + δ) − Φ(x) − g·δ| / (1 + |Φ| + |g·δ|). Lengths are numbers, or `(B,)` for one a sample. The same
    seed takes the same δ for every pathway. For any network, covered or not.
    """
    import pandas as pd

    samples, start = _at_x(network, x, pathways, target)
    steps = [_fitting(length, samples) for length in lengths]
    changes: list[list[Tensor]] = [[] for _ in steps]
    deviations: list[list[Tensor]] = [[] for _ in steps]
    frozen = nullcontext() if pathways is None else network.frozen(pathways, at=samples)
    with frozen:
        value, gradient = _value_and_gradient(network, start)
        rays = tqdm(
            random_directions(samples, directions, seed), total=directions, desc="stability", unit="ray",
            disable=not progress,
        )  # fmt: skip
        for ray in rays:
            for number, step in enumerate(steps):
                moved, along = _moved(start, ray, step)
                found, slope = _value_and_gradient(network, moved)
                changes[number].append((slope - gradient).norm(dim=1) / gradient.norm(dim=1))
                deviations[number].append(_relative(found - value, value, (gradient * along).sum(dim=1)))
    rows = []
    for number, step in enumerate(steps):
        change, deviation = torch.stack(changes[number]), torch.stack(deviations[number])
        rows += _table(samples, {
            "number": number, "length": step, "mean": change.mean(dim=0), "maximum": change.amax(dim=0),
            "deviation": deviation.mean(dim=0),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _relative(risen: Tensor, value: Tensor, along: Tensor) -> Tensor:
    """|Φ̂(x + δ) − Φ(x) − g·δ| over 1 + |Φ| + |g·δ|."""
    return (risen - along).abs() / (1 + value.abs() + along.abs())


def _at_x(network: Network, x: Any, pathways: Pathways | None, target: type_of_target) -> tuple[Samples, Samples]:
    """Checked samples, and the same with the class to explain: the one that the original network predicts at x."""
    if network._restriction is not None:
        raise RestrictionError("local linearity: the network is restricted already; leave the with block first")
    samples = network.samples(x, target).require_finite()
    if pathways is not None:
        network._gates_of(pathways)
    if pathways is not None and 1 != pathways.batch != samples.batch:
        raise RestrictionError(
            f"local linearity: there are {pathways.batch} pathways for {samples.batch} samples; give one each"
        )
    return samples, Samples(samples.inputs, network.original(samples).target, samples.names)


def _value_and_gradient(network: Network, samples: Samples) -> tuple[Tensor, Tensor]:
    """Φ `(B,)` and its gradient `(B, D)` under the restriction in force, at samples with a target."""
    with torch.inference_mode(False), torch.enable_grad():
        given = samples.map(lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()))
        leaves = [leaf for leaf in given.tensors if leaf.requires_grad]
        output = network._run(given, Gates(network.index, network._restriction))
        value = respond(network.response, output, network._resolve(output, samples), samples.batch)
        found = (
            torch.autograd.grad(value.sum(), leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        )
    slopes = [torch.zeros_like(leaf) if slope is None else slope for slope, leaf in zip(found, leaves, strict=True)]
    return value.detach(), torch.cat([slope.detach().reshape(samples.batch, -1) for slope in slopes], dim=1)


def _flat(samples: Samples) -> Tensor:
    return torch.cat([leaf.reshape(samples.batch, -1) for leaf in samples.tensors if leaf.is_floating_point()], dim=1)


def _moved(start: Samples, ray: Samples, length: Tensor) -> tuple[Samples, Tensor]:
    """x + δ, and what δ then is, `(B, D)`: the difference after rounding."""
    steps = iter(ray.tensors)

    def step(leaf: Tensor) -> Tensor:
        along = next(steps)
        far = length.to(leaf).view(-1, *[1] * (leaf.ndim - 1)) if leaf.is_floating_point() else None
        return leaf if far is None else leaf + far * along

    moved = start.map(step)
    return moved, _flat(moved) - _flat(start)


def _fitting(length: float | Tensor, samples: Samples) -> Tensor:
    """A length for each sample, `(B,)`."""
    given = torch.as_tensor(length, dtype=_flat(samples).dtype, device=samples.device).detach().flatten()
    if given.numel() not in (1, samples.batch) or bool((given < 0).any()) or bool(given.isnan().any()):
        raise InputError(f"local linearity: expected lengths of at least 0, one or {samples.batch}, found {length!r}")
    return given.expand(samples.batch)


def _positive(name: str, shares: Sequence[float]) -> list[float]:
    if not all(share > 0 for share in shares):
        raise InputError(f"{name}: expected shares of the radius above 0, found {list(shares)}")
    return list(shares)


def _table(samples: Samples, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each sample; tensors `(B,)` give each its own value."""
    values = {
        name: value.tolist() if isinstance(value, Tensor) else [value] * samples.batch
        for name, value in columns.items()
    }
    return [
        {"sample": name, **{key: each[row] for key, each in values.items()}} for row, name in enumerate(samples.names)
    ]
