"""`Network`: the one object all else runs on. A gated graph, its neuron index, and ways to run it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, reduce
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .activations import SiteSpec, choose_sites
from .answers import Original, Outcome, Pass
from .branches import Branch, keeping_branches
from .class_responses import read_part
from .digests import fingerprint
from .errors import InputError, ModelError, RestrictionError, SiteError, SmoothSitesWarning
from .exporting import exported
from .gates import Gates, Restriction, flat, grouped, unfilled
from .layout import Layout
from .measuring import measured
from .neurons import Granularity, Site
from .nodes import altered
from .outcomes import find_original, find_outcome, require_finite_response
from .outputs import mapped
from .padding import RealNeurons
from .pathways import Pathways
from .responses import Hidden, Response, checked_response, logit, require_fit, resolve_target, respond
from .rewriting import insert_gates, site_edges
from .samples import Samples, type_of_target
from .suffixes import Parts, Suffix
from .surroundings import plain_attention, undisturbed
from .tokens import Padding, find_padding
from .tracing import Traced, trace_module
from .truncation import truncated


def trace(
    model: nn.Module,
    x: Any,
    *,
    sites: SiteSpec = "rectifiers",
    granularity: Granularity = "unit",
    response: Response | Callable[[Any], Tensor] | str = logit,
    tracer: fx.Tracer | None = None,
    leaves: Sequence[type[nn.Module]] | type[nn.Module] = (),
    fix_branches: bool = False,
    check: bool = True,
    padding: str | int | None = None,
) -> Network:
    """Trace a model in evaluation mode to a `Network`: a graph with a gate after every activation.

    `x` is an example batch (tensor, tuple of arguments, dict of keyword arguments, or `Samples`) on the model's
    device. `sites` chooses the activations that count as neurons: "rectifiers", "activations", names, globs, module
    types or a callable on fx nodes. `response` is Φ: a response, its text form such as "pixel:row=10,column=20", or a
    function of the output; with one that reads a hidden neuron the graph ends there. Modules of the types `leaves` are
    not looked into; a `tracer` of one's own replaces fxpath's. Where the model branches on values, `fix_branches` takes
    the branches that the example takes: other inputs are then checked to take the same, or raise `BranchError`, and a
    restricted network keeps them. The model is neither changed nor copied.

    `padding` names an input `(B, T)`, by place where inputs are no dict, that is not 0 at real tokens. A neuron at a
    padding token is none of that sample's: no selector takes it, and sparsities count the others. It applies to sites
    with an axis of the T tokens besides the channels', which is tried; not where tokens are joined with others (a
    class token in front) or folded.

    Raises `ModelError` (training mode, cannot run on x), `TraceError` (no graph equals the model), `SiteError` (no
    activation found; an axis of T of which the trial cannot say that it holds the tokens), `InputError` (padding, a
    response other than the default that the model's output does not fit).

    >>> from torch import nn
    >>> network = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.ones(2, 3))
    >>> network.index.size, [site.name for site in network.index.sites]
    (4, ['1'])
    """
    samples, explained = Samples.of(x).require_finite(), checked_response(response)
    leaves = (leaves,) if isinstance(leaves, type) else tuple(leaves)
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in leaves):
        raise InputError(f"trace: expected leaves to be module types, such as (MyBlock,), found {leaves!r}")
    kinds = sites if isinstance(sites, Sequence) and not isinstance(sites, str) else [sites]
    types = tuple(kind for kind in kinds if isinstance(kind, type))
    traced = trace_module(
        model, samples, tracer=tracer, leaves=leaves, kinds=types, fix_branches=fix_branches, check=check,
        answered=lambda output: require_fit(explained, output),
    )  # fmt: skip
    return Network(traced, samples, sites=sites, granularity=granularity, response=explained, padding=padding)


class Network:
    """A traced model with a gate after every site; made by `fxpath.trace`.

    `network(x)` is the model's output. Inside `with network.masked(pathways)` or `with network.frozen(pathways, at=x)`
    it is the restricted network's, and so is all else that runs. Nothing stays behind after a call: no hook, no
    activation, no changed tensor.
    """

    def __init__(
        self,
        traced: Traced,
        example: Samples,
        *,
        sites: SiteSpec = "rectifiers",
        granularity: Granularity = "unit",
        response: Response = logit,
        padding: str | int | None = None,
    ) -> None:
        if granularity not in ("unit", "channel"):
            raise InputError(f"granularity: expected 'unit' or 'channel', found {granularity!r}")
        chosen = choose_sites(traced.graph_module, sites)
        if isinstance(response, Hidden):
            traced, response, chosen = truncated(traced, example, response, chosen)
        self.traced = traced
        self.response = response
        self._module = traced.graph_module
        self._gate_nodes = insert_gates(self._module, chosen)
        _warn_of_smooth([site.name for site in chosen if not site.rectifier])
        called = {str(node.target) for node in self._module.graph.nodes if node.op == "call_module"}
        own = {name: traced.originals.get(name) or self._module.get_submodule(name) for name in sorted(called)}
        self._called = [part for module in own.values() for part in module.modules()]
        self._layout = Layout.of(example)
        self._restriction: Restriction | None = None
        self._parts: dict[tuple[Any, ...], Parts] = {}
        self._narrowed: dict[int, tuple[fx.GraphModule, fx.Node] | None] = {}
        self._formats: dict[tuple[Any, ...], bool] = {}
        self._probes: dict[tuple[Any, ...], Any] = {}  # of local linearity
        running = [*self._called, *map(self._module.get_submodule, called & traced.originals.keys())]
        with keeping_branches(), undisturbed(running, example):  # one sample alone may take another branch
            found = measured(self._module, traced.bind, example, chosen, granularity, permuted=bool(traced.checked))
        self.index = found.index
        read = read_part(response, traced.unbind(found.output))
        self._read = None if read is None else found.nodes.get(read)  # what the response reads, where one node gives it
        self.edges = tuple(site_edges(self._module, self._read))
        self.places = None if read is None or read.ndim < 3 else int(read.shape[1])  # where responses find classes
        parents = {target for source, target in self.edges if source >= 0}
        self._entries = frozenset(range(len(self.index))) - parents
        self.padding: Padding | None = None
        if padding is not None:
            with undisturbed(running, example):
                self.padding = find_padding(self, example, padding)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in order of execution."""
        return self.index.sites

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the model that the graph reads, by name."""
        return dict(self._module.named_parameters()) | dict(self._module.named_buffers())

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are; the example, where it has none."""
        tensors = chain(self._module.parameters(), self._module.buffers())
        return next((tensor.device for tensor in tensors), self._layout.home)

    @cached_property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each input tensor, without the batch axis."""
        return tuple(shape for shape, _ in self._layout.tensors)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sites' names, operations and shapes, and the bytes of all weights."""
        return fingerprint(self.index, self.tensors)

    def __repr__(self) -> str:
        return f"Network({len(self.sites)} sites, {self.index.size} neurons, response={self.response.name!r})"

    @property
    def _altered(self) -> frozenset[int]:
        """Which of the modules that the graph calls have hooks or another forward now; what was tried depends on it."""
        return frozenset(place for place, module in enumerate(self._called) if altered(module))

    # --- running ---

    def _run(self, samples: Samples, gates: Gates | None) -> Any:
        if any(module.training for module in self._called):
            raise ModelError("network: the model is in training mode since it was traced; call model.eval()")
        if gates is not None:
            gates.enter(samples)
        restricted = gates is not None and gates.restriction is not None and not gates.restriction.held
        with nullcontext() if gates is None else plain_attention(), keeping_branches() if restricted else nullcontext():
            return self.traced.unbind(self._module(*self.traced.bind(samples), gates))

    def _require_branches(self, samples: Samples) -> None:
        """Raise `BranchError` for samples of other branches than the graph's: its parts do not ask on their own."""
        if any(isinstance(node.target, Branch) for node in self._module.graph.nodes):
            with torch.no_grad():
                self._run(samples, None)

    def samples(self, x: Any, target: type_of_target = None) -> Samples:
        """`x` as samples that fit this network; raises `InputError` where shape, type or device do not.

        Tensors made in inference mode are copied, as gradients need.
        """
        return self._layout.fit(Samples.of(x, target), self.device)

    def real(self, x: Any) -> RealNeurons | None:
        """Which neurons are the samples' own, None where no padding was asked for; `SampleError` without a token."""
        return None if self.padding is None else self.padding.real(self, self.samples(x))

    def __call__(self, /, *inputs: Any, **named: Any) -> Any:
        """The model's output, under the restriction that is in force; differentiable in the inputs.

        Called with one x as all other methods take it (a tuple: all arguments), or as the model is: with several
        inputs by place, `network(image, size)`, or, traced on a dict, by name. Raises `InputError` where they do not
        fit.
        """
        if list(named) == ["x"] != self._layout.keys:  # the one x
            inputs, named = (*inputs, named["x"]), {}
        if bool(inputs) == bool(named):
            raise InputError(
                f"network: expected inputs by place or all by name, found {len(inputs)} by place and "
                f"{', '.join(named) or 'none'} by name; give a tuple, or a dict with every name"
            )
        if len(inputs) > 1 and any(isinstance(each, Samples) for each in inputs):
            raise InputError("network: expected Samples alone, as they hold all inputs, found them among others")
        samples = self.samples(named or (inputs[0] if len(inputs) == 1 else inputs))
        gates = None if self._restriction is None else Gates(self.index, self._restriction)
        return self._run(samples, gates)

    def respond(self, x: Any, target: type_of_target = None) -> Tensor:
        """Φ(x), `(B,)`, under the restriction that is in force; differentiable in `x`.

        Without a target it is the response of the class that the original network predicts for `x`.
        """
        samples = self.samples(x, target)
        output = self(samples)
        return respond(self.response, output, self._resolve(output, samples), samples.batch)

    def _resolve(self, output: Any, samples: Samples) -> Tensor | None:
        """The class to explain; without a target the one that the *original* network predicts."""
        logits = self.response.logits(output)
        if samples.target is None and logits is not None and self._restriction is not None:
            with torch.no_grad():
                logits = self.response.logits(self._run(samples, None))
        return resolve_target(logits, samples.target)

    def activations(self, x: Any) -> list[Tensor]:
        """Every site's activation, `(B, …)` each, after its gate; one forward without gradients."""
        samples = self.samples(x).require_finite()
        gates = Gates(self.index, self._restriction, keep=True)
        with torch.no_grad():
            self._run(samples, gates)
        return [gates.seen[number] for number in range(len(self.index))]

    def gradients(self, x: Any, target: type_of_target = None) -> Pass:
        """Activations and ∂Φ/∂a of every site in one forward and one backward for the whole batch.

        Gradients are zero where Φ does not depend on a site. Parameters get none and are not touched.
        """
        samples = self.samples(x, target).require_finite()
        gates = Gates(self.index, self._restriction, differentiate=True, entries=self._entries)
        with torch.inference_mode(False), torch.enable_grad():
            output = self._run(samples.map(torch.detach), gates)
            resolved = self._resolve(output, samples)
            value = respond(self.response, output, resolved, samples.batch)
            seen = [gates.seen[number] for number in range(len(self.index))]
            found = torch.autograd.grad(value.sum(), seen, allow_unused=True) if value.requires_grad else [None]
        if all(slope is None for slope in found):
            raise SiteError(
                f"gradients: the response {self.response.name!r} depends on none of the {len(seen)} sites, or not "
                "differentiably; choose others with sites=…, or another response, or look for .detach() and "
                "torch.no_grad() in the model's forward"
            )
        if self._restriction is None:
            require_finite_response(value.detach(), samples)
        slopes = [torch.zeros_like(a) if g is None else g for a, g in zip(seen, found, strict=True)]
        return Pass(_detached(output), value.detach(), resolved, [a.detach() for a in seen], slopes)

    def signed_products(self, x: Any, target: type_of_target = None) -> tuple[Tensor, Pass]:
        """a · ∂Φ/∂a of every neuron, `(B, N)`, 0 at padding tokens, and the pass it came from."""
        real = self.real(x)
        run = self.gradients(x, target)
        batch = run.response.shape[0]
        kind = reduce(torch.promote_types, (value.dtype for value in run.activations))  # autocast mixes them
        products = unfilled((batch, self.index.size), kind, run.activations[0].device)
        for number, (site, value, slope) in enumerate(zip(self.sites, run.activations, run.gradients, strict=True)):
            own = slope if real is None else real.only(number, slope)
            if site.neurons == site.units:
                torch.mul(flat(value, site), flat(own, site), out=products[:, site.slice])
            else:
                products[:, site.slice] = grouped(value * own, site)
        return products, run

    def rows(self, values: Sequence[Tensor]) -> Tensor:
        """One tensor per site → one row per sample, `(B, N)`; at channel granularity summed over each channel."""
        return torch.cat([grouped(v, site) for v, site in zip(values, self.sites, strict=True)], dim=1)

    # --- restrictions ---

    @contextmanager
    def restricted(self, restriction: Restriction) -> Iterator[Network]:
        """λ ⊙ a + μ at the gates for the length of a `with` block. Nesting raises `RestrictionError`."""
        if self._restriction is not None:
            raise RestrictionError("restricted network: it is restricted already; leave the outer with block first")
        self._restriction = restriction.checked(self.index, self.device)
        try:
            yield self
        finally:
            self._restriction = None

    def _gates_of(self, pathways: Pathways) -> list[Tensor]:
        if not isinstance(pathways, Pathways):
            raise RestrictionError(
                f"restricted network: expected Pathways, found {type(pathways).__name__}; cut them from scores with "
                "scores.pathways(sparsity), or wrap a bool mask (B, N): fxpath.Pathways(mask, network.index)"
            )
        if pathways.index != self.index:
            raise RestrictionError(
                f"pathways: they are of another index ({pathways.index!r}); this network has {self.index!r}"
            )
        if pathways.mask.device != self.device:
            raise RestrictionError(f"pathways: they are on {pathways.mask.device}, the model on {self.device}")
        return pathways.gates()

    @contextmanager
    def masked(self, pathways: Pathways) -> Iterator[Network]:
        """Φ(·; e ⊙ a): activations off the pathway become 0."""
        with self.restricted(Restriction(self._gates_of(pathways), [None] * len(self.index))):
            yield self

    @contextmanager
    def frozen(self, pathways: Pathways, at: Any) -> Iterator[Network]:
        """Φ̂(·; e) at x: a neuron off the pathway is the constant it had at `at` and passes no gradient.

        `at` has one sample for each pathway, or one for all.
        """
        if self._restriction is not None:
            raise RestrictionError("restricted network: it is restricted already; leave the outer with block first")
        scale = self._gates_of(pathways)
        with torch.inference_mode(False):
            values = self.activations(at)
        batch = values[0].shape[0] // self.sites[0].fold
        if 1 != batch != pathways.batch != 1:
            raise RestrictionError(
                f"frozen: there are {pathways.batch} pathways and {batch} samples to take constants from; give one each"
            )
        shift = [value.reshape(-1, *site.shape) for value, site in zip(values, self.sites, strict=True)]
        named = isinstance(at, Samples) and at.ids is not None and batch > 1  # of a single one they go with any sample
        with self.restricted(Restriction(scale, shift, of=at.names if named else None)):
            yield self

    def export(self, pathways: Pathways, at: Any = None) -> fx.GraphModule:
        """The network restricted to `pathways` as a plain module, for use without fxpath.

        With `at` it is frozen at x, Φ̂(·; e), else masked, Φ(·; e ⊙ a); it gives what the network gives inside of
        `frozen` or `masked`, bit for bit. It takes the model's own arguments and holds copies of all tensors, on their
        device; dataclasses in its output are dicts, named tuples plain ones.
        One pathway goes with any batch, B pathways with a batch of B. `torch.save(module, file)` keeps it, and
        `torch.load(file, weights_only=False)` needs torch alone, but for modules that were passed over with `leaves=…`
        and autograd functions: these are in it as they are. What pickle does not take, such as parametrized layers
        (`weight_norm`, …) and classes made within a function, goes into a file, without gradients of its own, by
        `torch.export.save(torch.export.export(module, args), file)`. Raises `RestrictionError` as `masked` and `frozen`
        do, and `ModelError`, as for hooks on modules that are not passed over.
        """
        with self.masked(pathways) if at is None else self.frozen(pathways, at):
            return exported(self.traced, self.index, cast(Restriction, self._restriction))

    # --- what a pathway answers ---

    def original(self, x: Any, target: type_of_target = None) -> Original:
        """The unrestricted network's answer and activation pattern, from one forward.

        Raises `SampleError` for samples whose response is NaN or infinite.
        """
        return find_original(self, x, target)

    def outcome(
        self, x: Any, pathways: Pathways, *, target: type_of_target = None, original: Original | None = None
    ) -> Outcome:
        """What the network masked to `pathways`, and the one masked to all the rest, answer; two forwards.

        `original`, where there is one already, saves the forward that finds it.
        """
        return find_outcome(self, x, pathways, target, original)

    # --- sub-graphs ---

    def suffix(self, site: str | int | Site) -> Suffix:
        """The sub-graph from a site's gate to the output."""
        return Suffix(self, self.index.number(site))


def _warn_of_smooth(names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        warnings.warn(
            f"trace: {len(names)} sites are no rectifiers ({shown}); the paper's propositions, and what is said of "
            "dead neurons, do not cover them",
            SmoothSitesWarning,
            stacklevel=4,
        )


def _detached(output: Any) -> Any:
    return mapped(Tensor.detach, output)
