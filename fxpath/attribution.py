"""From pathways to the input: the pathway gradient ∇ₓΦ̂(x; e)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import EmptyPathwaysWarning, InputError, ModelError, RestrictionError, unknown
from .gates import Gates, Restriction
from .network import Network
from .nodes import called_module, carries_data, plain_name
from .outcomes import require_finite_response
from .pathways import Pathways
from .responses import respond
from .rewriting import GATES, cut, prefix
from .samples import Samples, type_of_target
from .tracing import NAME, plain_attention

Reduction = Literal["max_abs", "signed_max", "signed_sum"]

_GATHERS = {"embedding", "embedding_bag", "one_hot"}
_UNDIFFERENTIABLE = re.compile(r"derivative for '?([\w:]+)'? is not implemented")


def pathway_gradient(
    network: Network, x: Any, pathways: Pathways, target: type_of_target = None, *, wrt: str | None = None
) -> Any:
    """∇ₓΦ̂(x; e), the gradient of the network that is frozen to `pathways` at `x`; one forward and one backward.

    Off-path neurons are the constants that they are at x (the paper's §4), so with every neuron kept it is the plain
    gradient. Without a target it is of the class that the network predicts. Returns gradients like `x`, in units
    of the response per unit of input, None in place of tensors of whole numbers. `wrt` names a node in place of the
    inputs: then it is the gradient `(B, …)` for what that node gives, such as an embedding's vectors.

    Warns with `EmptyPathwaysWarning` of samples whose pathway keeps no neuron. Raises `InputError` where all inputs are
    whole numbers, naming the embedding that reads them, `RestrictionError` for pathways of another network or batch and
    within a restriction, and `SampleError` where the response is NaN or infinite.
    """
    gates, samples = _checked("pathway_gradient", network, x, pathways, target, around=wrt is None)
    held = Restriction(gates, [None] * len(network.index), held=True).checked(network.index, network.device)
    if wrt is not None:
        return _at_node(network, samples, held, wrt)
    return _at_inputs(network, samples, Gates(network.index, held), "pathway_gradient")


def masked_gradient(network: Network, x: Any, pathways: Pathways, target: type_of_target = None) -> Any:
    """∇ₓΦ(x; e ⊙ a), the gradient of the network that is masked to `pathways`: off-path activations are 0.

    This is what the code that the paper's authors released computes, and not the quantity of Propositions 4 and 5,
    which is `pathway_gradient`. Without a target it is of the class that the original network predicts. Arguments,
    result, warnings and errors are those of that function.
    """
    _, samples = _checked("masked_gradient", network, x, pathways, target)
    with network.masked(pathways):
        return _at_inputs(network, samples, Gates(network.index, network._restriction), "masked_gradient")


def input_gradient(network: Network, x: Any, target: type_of_target = None) -> Any:
    """∇ₓΦ(x), the plain gradient; arguments, result and errors are those of `pathway_gradient`."""
    require_open("input_gradient", network)
    return _at_inputs(network, network.samples(x, target).require_finite(), Gates(network.index), "input_gradient")


def require_open(said: str, network: Network) -> None:
    """Raise `RestrictionError` within `network.masked` and the like: gradients there would be of another network."""
    if network._restriction is not None:
        raise RestrictionError(f"{said}: the network is restricted already; leave the with block first")


@contextmanager
def differentiable(said: str) -> Iterator[None]:
    """Say of operations that torch cannot differentiate which they are; raises `ModelError`."""
    try:
        yield
    except RuntimeError as failure:
        found = _UNDIFFERENTIABLE.search(str(failure))
        if found is None:
            raise
        raise ModelError(
            f"{said}: the model has no gradient: torch cannot differentiate {found[1]}; write it with other "
            "operations, or take a method without gradients, such as occlusion"
        ) from failure


def _checked(
    said: str, network: Network, x: Any, pathways: Pathways, target: type_of_target, *, around: bool = True
) -> tuple[list[Tensor], Samples]:
    """λ of every site and the samples, if they fit; warns of pathways that are empty.

    `around`: whether what is asked for are gradients at the inputs, which the edges of the sites speak of.
    """
    require_open(said, network)
    gates = network._gates_of(pathways)
    samples = network.samples(x, target).require_finite()
    if 1 != pathways.batch != samples.batch:
        raise RestrictionError(
            f"{said}: there are {pathways.batch} pathways for {samples.batch} samples; give one each"
        )
    mask = pathways.mask.numpy() if pathways.mask.device.type == "cpu" else pathways.mask  # NumPy's any ends early
    kept = torch.as_tensor(mask.any(1))
    if not bool(kept.all()):
        rows = torch.nonzero(~kept.expand(samples.batch)).flatten().tolist()
        names = ", ".join(repr(samples.names[row]) for row in rows[:5]) + (" …" if len(rows) > 5 else "")
        zero = around and (-1, len(network.index)) not in network.edges
        left = "it is 0 everywhere" if zero else "it is of what reaches the response through no site"
        warnings.warn(
            f"{said}: the pathway of sample {names} keeps no neuron, so no gradient passes a site: {left}. Take a "
            "smaller sparsity, or look at the sample",
            EmptyPathwaysWarning,
            stacklevel=3,
        )
    return gates, samples


def _at_inputs(network: Network, samples: Samples, gates: Gates, said: str) -> Any:
    """The gradients of a network with these gates, like the inputs."""
    if not any(_has_gradient(tensor) for tensor in samples.tensors):
        raise InputError(_no_gradient(network, said))
    with torch.inference_mode(False), torch.enable_grad(), differentiable(said):
        given = samples.map(lambda leaf: leaf.detach().requires_grad_(_has_gradient(leaf)))
        output = network._run(given, gates)
        gradients = iter(_gradients(network, samples, output, [leaf for leaf in given.tensors if leaf.requires_grad]))
    return pytree.tree_map(
        lambda leaf: next(gradients) if isinstance(leaf, Tensor) and _has_gradient(leaf) else None, samples.inputs
    )


def pixel_scores(maps: Tensor, reduction: Reduction = "max_abs") -> Tensor:
    """One number a pixel: `(B, C, H, W)` → `(B, H, W)` (any number of axes behind the channels).

    "max_abs": the largest |·| of the channels (the paper's); "signed_max": that channel's signed value, the first one's
    of several; "signed_sum": the sum over channels. Raises `InputError` for maps of another form, or with NaN in them.

    >>> maps = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
    >>> [float(pixel_scores(maps, kind)) for kind in ("max_abs", "signed_max", "signed_sum")]
    [3.0, -3.0, -2.0]
    """
    if reduction not in get_args(Reduction):
        raise InputError(f"pixel scores: {unknown('reduction', str(reduction), get_args(Reduction))}")
    _require_numbers("pixel scores", maps, 3, "maps (B, C, H, W)")
    if reduction == "max_abs":
        return maps.abs().amax(dim=1)
    if reduction == "signed_max":
        return maps.gather(1, maps.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return maps.sum(dim=1)


def opened(scores: Tensor, size: int = 3) -> Tensor:
    """Grey-scale morphological opening of score maps `(B, H, W)` by a square of `size` pixels (the paper's `*`).

    What no such square fits under goes: a bright pixel alone, a thin line. Maps continue beyond their borders as their
    mirror images do. One axis in space or three do as well. Raises `InputError` for a size below 1 and maps of another
    form, or with NaN in them.

    >>> opened(torch.tensor([[0.0, 5.0, 0.0, 4.0, 4.0, 4.0, 0.0]])).tolist()
    [[0.0, 0.0, 0.0, 4.0, 4.0, 4.0, 0.0]]
    """
    from scipy.ndimage import grey_opening

    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"opening: expected a size of 1 pixel or more, found {size!r}")
    _require_numbers("opening", scores, 2, "score maps (B, H, W)")
    values = scores.detach().cpu()
    values = values.float() if values.element_size() < 4 else values  # SciPy has no float16
    done = grey_opening(values.numpy(), size=(1, *[size] * (scores.ndim - 1)))
    return torch.from_numpy(done).to(scores)


def _require_numbers(said: str, maps: Tensor, axes: int, expected: str) -> None:
    if not isinstance(maps, Tensor) or maps.ndim < axes or not maps.is_floating_point():
        found = f"{maps.dtype} {tuple(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"{said}: expected floating-point {expected}, found {found}")
    missing = torch.isnan(maps).flatten(1).any(dim=1)
    if bool(missing.any()):
        rows = torch.nonzero(missing).flatten().tolist()
        raise InputError(
            f"{said}: the map of row {', '.join(map(str, rows[:5]))} holds NaN, which has no place in an order of "
            "pixels; look at what made it, or leave it out"
        )


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _gradients(network: Network, samples: Samples, output: Any, leaves: list[Tensor]) -> list[Tensor]:
    value = respond(network.response, output, network._resolve(output, samples), samples.batch)
    require_finite_response(value.detach(), samples)
    found = torch.autograd.grad(value.sum(), leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]


def _at_node(network: Network, samples: Samples, held: Restriction, name: str) -> Tensor:
    """The gradient for what a node gives: the graph is run up to it, and from it on with gradients."""
    module = network._module
    named = {str(node.meta[NAME]): node for node in module.graph.nodes if node.op.startswith("call_")}
    if name not in named:
        raise InputError(f"pathway_gradient: wrt: {unknown('node', name, named)}")
    after = cut(module, [named[name]])
    by_name = {node.name: node for node in module.graph.nodes if node.target != GATES}
    start = prefix(module, {"start": named[name]} | {each: by_name[each] for each in after.boundary})
    with torch.inference_mode(False), plain_attention():
        network._require_branches(samples)
        with torch.no_grad():
            first, *outside = start(*network.traced.bind(samples), Gates(network.index, held))
        if not isinstance(first, Tensor) or not _has_gradient(first):
            raise InputError(f"pathway_gradient: wrt: expected a node that gives a floating-point tensor, found {name}")
        with torch.enable_grad(), differentiable("pathway_gradient"):
            first = first.detach().requires_grad_()
            output = network.traced.unbind(after.module(first, *outside, Gates(network.index, held)))
            return _gradients(network, samples, output, [first])[0]


def _no_gradient(network: Network, said: str) -> str:
    """Whole numbers have no gradient; the embedding that reads them does."""
    embeddings = [str(node.meta[NAME]) for node in network._module.graph.nodes if _embeds(node)]
    said = f"{said}: expected floating-point inputs, found whole numbers alone, which have no gradient"
    if not embeddings or not said.startswith("pathway_gradient"):
        return f"{said}; take the pathway gradient for a node that gives numbers: wrt=…"
    first, *others = embeddings
    more = f" (others: {', '.join(others[:3])})" if others else ""
    return f"{said}; take it for the vectors of their embedding: wrt={first!r}{more}"


def _embeds(node: fx.Node) -> bool:
    """Whether a node looks up vectors by an input."""
    if not (isinstance(called_module(node), nn.Embedding | nn.EmbeddingBag) or plain_name(node) in _GATHERS):
        return False
    sources, seen = list(node.all_input_nodes), set[fx.Node]()
    while sources:
        source = sources.pop()
        if source.op == "placeholder":
            return True
        if source not in seen and carries_data(source):
            seen.add(source)
            sources += source.all_input_nodes
    return False
