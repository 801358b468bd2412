"""From pathways to the input: the pathway gradient ∇ₓΦ̂(x; e)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import InputError, RestrictionError, unknown
from .gates import Gates, Restriction
from .network import Network
from .nodes import called_module, carries_data, plain_name
from .pathways import Pathways
from .responses import respond
from .rewriting import GATES, cut, prefix
from .samples import Samples, type_of_target
from .tracing import NAME, plain_attention

Reduction = Literal["max_abs", "signed_max", "signed_sum"]

_GATHERS = {"embedding", "embedding_bag", "one_hot"}


def pathway_gradient(
    network: Network, x: Any, pathways: Pathways, target: type_of_target = None, *, wrt: str | None = None
) -> Any:
    """∇ₓΦ̂(x; e), the gradient of the network that is frozen to `pathways` at `x`; one forward and one backward.

    Off-path neurons are the constants that they are at x (the paper's §4), so with every neuron kept it is the plain
    gradient. Without a target it is of the class that the network predicts. Returns gradients like `x`, in units
    of the response per unit of input, None in place of tensors of whole numbers. `wrt` names a node in place of the
    inputs: then it is the gradient `(B, …)` for what that node gives, such as an embedding's vectors.

    Raises `InputError` where all inputs are whole numbers, naming the embedding that reads them.
    """
    if network._restriction is not None:
        raise RestrictionError("pathway_gradient: the network is restricted already; leave the with block first")
    gates = network._gates_of(pathways)
    samples = network.samples(x, target).require_finite()
    _require_batch("pathway_gradient", pathways, samples)
    held = Restriction(gates, [None] * len(network.index), held=True)
    if wrt is not None:
        return _at_node(network, samples, held.checked(network.index, network.device), wrt)
    return _at_inputs(network, samples, held, "pathway_gradient")


def _require_batch(said: str, pathways: Pathways, samples: Samples) -> None:
    if 1 != pathways.batch != samples.batch:
        raise RestrictionError(
            f"{said}: there are {pathways.batch} pathways for {samples.batch} samples; give one each"
        )


def _at_inputs(network: Network, samples: Samples, restriction: Restriction, said: str) -> Any:
    """The gradients of a restricted network, like the inputs."""
    if not any(_has_gradient(tensor) for tensor in samples.tensors):
        raise InputError(_no_gradient(network, said))
    checked = restriction.checked(network.index, network.device)
    with torch.inference_mode(False), torch.enable_grad():
        given = samples.map(lambda leaf: leaf.detach().requires_grad_(_has_gradient(leaf)))
        output = network._run(given, Gates(network.index, checked))
        gradients = iter(_gradients(network, samples, output, [leaf for leaf in given.tensors if leaf.requires_grad]))
    return pytree.tree_map(
        lambda leaf: next(gradients) if isinstance(leaf, Tensor) and _has_gradient(leaf) else None, samples.inputs
    )


def masked_gradient(network: Network, x: Any, pathways: Pathways, target: type_of_target = None) -> Any:
    """∇ₓΦ(x; e ⊙ a), the gradient of the network that is masked to `pathways`: off-path activations are 0.

    This is what the code that the paper's authors released computes, and not the quantity of Propositions 4 and 5,
    which is `pathway_gradient`. Arguments, result and errors are that function's.
    """
    if network._restriction is not None:
        raise RestrictionError("masked_gradient: the network is restricted already; leave the with block first")
    gates = network._gates_of(pathways)
    samples = network.samples(x, target).require_finite()
    _require_batch("masked_gradient", pathways, samples)
    with network.masked(pathways):  # the class explained is the one that the original network predicts
        return _at_inputs(network, samples, Restriction(gates, [None] * len(network.index)), "masked_gradient")


def pixel_scores(maps: Tensor, reduction: Reduction = "max_abs") -> Tensor:
    """One number a pixel: `(B, C, H, W)` → `(B, H, W)` (any number of axes behind the channels).

    "max_abs": the largest |·| of the channels (the paper's); "signed_max": that channel's signed value; "signed_sum".
    """
    if maps.ndim < 3:
        raise InputError(f"pixel scores: expected maps (B, C, H, W), found {tuple(maps.shape)}")
    if reduction == "max_abs":
        return maps.abs().amax(dim=1)
    if reduction == "signed_max":
        return maps.gather(1, maps.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    if reduction == "signed_sum":
        return maps.sum(dim=1)
    raise InputError(f"pixel scores: {unknown('reduction', reduction, get_args(Reduction))}")


def opened(scores: Tensor, size: int = 3) -> Tensor:
    """Grey-scale morphological opening of score maps `(B, H, W)` by a square of `size` pixels (the paper's `*`)."""
    from scipy.ndimage import grey_opening

    done = grey_opening(scores.detach().cpu().numpy(), size=(1, *[size] * (scores.ndim - 1)))
    return torch.from_numpy(done).to(scores.device)


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _gradients(network: Network, samples: Samples, output: Any, leaves: list[Tensor]) -> list[Tensor]:
    value = respond(network.response, output, network._resolve(output, samples), samples.batch)
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
        with torch.enable_grad():
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
