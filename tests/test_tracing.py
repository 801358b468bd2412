"""Tracing: the graph equals the module bit for bit, in-place semantics included, and the module stays as it was."""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from footprint import unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    BY_NAME,
    CASES,
    Branching,
    BranchTracer,
    Case,
    DataBranch,
    DataBranchInLeaf,
    HardCodedBatch,
    Head,
    image,
    traced,
)
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxpath
from fxpath.equality import answer, difference
from fxpath.errors import InputError, ModelError, TraceError
from fxpath.inplace import MutationAudit
from fxpath.samples import Samples
from fxpath.tracing import NAME, plain_attention, trace_module

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def outputs(model: nn.Module, x: Any) -> Any:
    own = Samples(x).map(torch.clone)
    with torch.no_grad():
        return model(*own.args, **own.kwargs)


def same_bits(one: Any, two: Any) -> bool:
    left, left_form = pytree.tree_flatten(one)
    right, right_form = pytree.tree_flatten(two)
    return left_form == right_form and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@every
def test_graph_equals_module_and_leaves_it_alone(case: Case) -> None:
    model = case.model()
    before = outputs(model, case.x())
    with unchanged(model):
        network = case.trace(model)
    assert same_bits(outputs(model, case.x()), before)
    assert network.traced.tracer == case.tracer
    assert {site.name: site.shape for site in network.sites} == case.sites
    assert network.traced.checked == (3, 1)
    assert network.traced.difference == 0
    for batch in (1, 2, 5):
        x = case.x(batch, seed=4)
        expected = outputs(model, x)
        kept = Samples(x).map(torch.clone).tensors
        with torch.no_grad():
            assert same_bits(network(x), expected)
        with torch.enable_grad(), plain_attention():  # torch.nn's attention has a kernel for when there is no gradient
            assert same_bits(network(x), outputs(model, x))
        assert all(map(torch.equal, kept, Samples(x).tensors)), "the input was written to"


@every
def test_nothing_in_place_is_left(case: Case) -> None:
    network = traced(case.name)
    audit = MutationAudit(network._module)
    with torch.no_grad():
        audit.run(*network.traced.bind(network.samples(case.x())), None)
    assert audit.changed == []


def test_in_place_values_by_hand() -> None:
    """What eager execution gives, computed without any in-place operation."""
    x = image(2)
    for name, formula in {
        "InPlaceReadAgain": lambda m: m.head(F.relu(m.conv2(F.relu(m.conv1(x)))) - 0.5 * F.relu(m.conv1(x))),
        "InPlaceReadBefore": lambda m: m.head(F.relu(m.conv2(F.relu(m.conv1(x)))) + 2 * m.conv1(x)),
        "Alias": lambda m: m.head(F.relu(m.conv(x) + 1 - 1.5) * 2 + (m.conv(x) + 1)),
        "ResidualOntoReLU": lambda m: m.head(
            F.relu(F.relu(m.conv1(x)) + m.conv2(F.relu(m.conv1(x)))) + F.relu(m.conv1(x)) + m.conv2(F.relu(m.conv1(x)))
        ),
        "AliasThroughDropout": lambda m: m.head(F.relu(m.conv2(F.relu(m.conv(x)))) + F.relu(m.conv(x))),
        "ViewSlice": lambda m: m.head(torch.cat([F.relu(m.conv(x)[:, :2]), m.conv(x)[:, 2:]], 1)),
        "InPlaceOnInput": lambda m: (
            m.head(F.relu(m.conv(F.relu(x + 0.25)))) + 0.1 * F.relu(x + 0.25).mean((1, 2, 3))[:, None]
        ),
    }.items():
        network = traced(name)
        torch.testing.assert_close(network(x), formula(BY_NAME[name].model()), rtol=1e-12, atol=1e-13)


STEPS: dict[str, Callable[[list[Tensor], int, int], None]] = {
    "relu_": lambda v, i, j: operator.setitem(v, i, v[i].relu_()),
    "relu_ unread": lambda v, i, j: [v[i].relu_(), None][1],
    "+=": lambda v, i, j: operator.setitem(v, i, operator.iadd(v[i], 0.5)),
    "*= other": lambda v, i, j: operator.setitem(v, i, operator.imul(v[i], v[j] - 0.2)),
    "add_ other": lambda v, i, j: operator.setitem(v, i, v[i].add_(v[j], alpha=0.5)),
    "clamp_": lambda v, i, j: operator.setitem(v, i, torch.clamp_(v[i], min=0)),
    "F.relu in place": lambda v, i, j: operator.setitem(v, i, F.relu(v[i], inplace=True)),
    "alias": lambda v, i, j: operator.setitem(v, i, v[j]),
    "dropout": lambda v, i, j: operator.setitem(v, i, F.dropout(v[j], 0.5, False)),
    "view": lambda v, i, j: operator.setitem(v, i, v[j].view(v[j].shape[0], 4)),
    "relu": lambda v, i, j: operator.setitem(v, i, F.relu(v[j] - 0.1)),
    "plus": lambda v, i, j: operator.setitem(v, i, v[i] + v[j]),
}


class Program(nn.Module):
    """Three tensors and a list of steps on them."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.fcs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        values = [fc(x) for fc in self.fcs]
        for name, i, j in self.steps:
            STEPS[name](values, i, j)
        return F.relu(values[0]) + 2 * values[1] - values[2]


@given(st.lists(st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 2), st.integers(0, 2)), max_size=7))
@settings(max_examples=150, deadline=None)
def test_any_order_of_aliases_and_in_place_operations(steps: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    model = Program(steps).double().eval()
    network = fxpath.trace(model, torch.randn(2, 4, dtype=torch.float64))
    assert network.traced.tracer == "symbolic_trace"
    assert network.traced.difference == 0
    other = 3 * torch.randn(5, 4, dtype=torch.float64)
    assert same_bits(network(other), outputs(model, other))


@pytest.mark.parametrize("name", ["ResidualIadd", "ShapeBranch"])
def test_later_weights_are_seen(name: str) -> None:
    """The graph refers to the module's tensors, whichever tracer made it."""
    case = BY_NAME[name]
    model = case.model()
    network = case.trace(model)
    x = case.x()
    before = network(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    assert not same_bits(network(x), before)
    assert same_bits(network(x), outputs(model, x))
    assert {p.data_ptr() for p in model.parameters()} >= {p.data_ptr() for p in network._module.parameters()}


@pytest.mark.parametrize("where", ["", "relu1"])
def test_training_mode_is_refused(where: str) -> None:
    model = BY_NAME["Plain"].model()
    model.get_submodule(where).train(True)
    if where:
        assert not model.training
    with pytest.raises(ModelError, match=r"training mode \((Plain|relu1).*model\.eval\(\)"):
        fxpath.trace(model, image(2))


@pytest.mark.parametrize("name", ["ReusedReLU", "Dropouts", "Conv1d", "CustomLeaf"])
def test_training_mode_after_tracing_is_refused(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    network = case.trace(model)
    x = case.x()
    model.train()
    with unchanged(model):
        for call in (network, network.gradients, network.original, network.activations, network.respond):
            with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
                call(x)
    model.eval()
    assert same_bits(network(x), outputs(model, x))


def test_untraceable_names_the_line() -> None:
    model, x = DataBranch().double().eval(), image(2)
    with unchanged(model), pytest.raises(TraceError) as caught:
        fxpath.trace(model, x)
    message = str(caught.value)
    source, start = inspect.getsourcelines(DataBranch.forward)
    line = start + next(number for number, text in enumerate(source) if "h.sum()" in text)
    assert re.search(
        rf'symbolic_trace: .*\n\s+at .*networks\.py:{line}, in forward: "if self\.fixed or h\.sum', message
    )
    assert re.search(rf"torch\.export: .*\n\s+at .*networks\.py:{line}", message)
    assert "leaves=" in message
    assert "tracer=" in message
    assert "fixes the branch" in message


def test_each_way_out_works() -> None:
    x = image(3)
    fixed = DataBranch(fixed=True).double().eval()
    branching = DataBranchInLeaf().double().eval()
    with pytest.raises(TraceError, match=r"if h\.sum\(\) > 0"):
        fxpath.trace(branching, x)
    for model, options in (
        (fixed, {}),
        (branching, {"leaves": (Branching,)}),
        (branching, {"leaves": Branching}),
        (branching, {"tracer": BranchTracer()}),
    ):
        network = fxpath.trace(model, x, **options)
        assert [site.name for site in network.sites] == ["relu"]
        for sign in (1, -1):
            assert same_bits(network(sign * x), outputs(model, sign * x))


def test_own_tracer_that_loses_aliasing_is_refused() -> None:
    """fx's own tracer takes `h += 1` for `h = h + 1`; the check sees it, and nothing else is tried."""
    case = BY_NAME["Alias"]
    with pytest.raises(TraceError, match="another output at batch size 3") as caught:
        case.trace(tracer=fx.Tracer())
    assert "torch.export" not in str(caught.value)
    unchecked = case.trace(tracer=fx.Tracer(), check=False)
    assert not same_bits(unchecked(case.x()), outputs(case.model(), case.x()))


def test_own_tracer_with_a_fixed_argument() -> None:
    case = BY_NAME["OptionalByName"]
    network = case.trace(tracer=fx.Tracer())
    assert same_bits(network(case.x(2)), outputs(case.model(), case.x(2)))


def test_unchecked_runs_the_module_never() -> None:
    class Counting(BY_NAME["Plain"].build):  # type: ignore[misc,name-defined]
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.runs += not isinstance(x, fx.Proxy)
            return super().forward(x)  # type: ignore[no-any-return]

    model = Counting().eval()
    network = fxpath.trace(model, torch.randn(2, 2, 5, 5), check=False)
    assert Counting.runs == 0
    assert network.traced.checked == ()
    fxpath.trace(model, torch.randn(2, 2, 5, 5))
    assert Counting.runs == 2


def test_batch_of_one_as_the_example() -> None:
    for name in ("BatchFolded", "ShapeBranch", "Conv1d"):
        case = BY_NAME[name]
        network = fxpath.trace(case.model(), case.x(1))
        assert network.traced.checked == (1, 2)
        assert network.index == traced(name).index
        assert same_bits(network(case.x(4)), outputs(case.model(), case.x(4)))


def test_hard_coded_batch_is_named() -> None:
    model = HardCodedBatch().eval()
    with pytest.raises(ModelError, match=r"batch of 1; at view: .*x\.shape\[0\]"):
        fxpath.trace(model, torch.randn(3, 3))
    with pytest.raises(ModelError, match=r"cannot run on the example \[\(2, 3\)\]"):
        fxpath.trace(model, torch.randn(2, 3))


def test_random_in_evaluation_mode_is_refused() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 40)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.relu(self.fc(x)), 0.5, training=True)

    model, x = Restless().eval(), torch.randn(2, 4)
    with unchanged(model), pytest.raises(ModelError, match="differently each time"):
        fxpath.trace(model, x)
    with pytest.raises(ModelError, match="differently each time"):
        answer(model, Samples(x))  # whatever random numbers tracing draws


def test_drawing_random_numbers_without_effect_is_fine() -> None:
    class Drawing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            return super().forward(x)

    model = Drawing(nn.Linear(4, 3), nn.ReLU()).eval()
    with unchanged(model):
        network = fxpath.trace(model, torch.ones(2, 4))
    assert network.traced.difference == 0


def test_bad_examples() -> None:
    model = BY_NAME["TwoInputs"].model()
    left, right = BY_NAME["TwoInputs"].x()
    with pytest.raises(InputError, match=r"takes the arguments \(left, right\).*gives 1 in order: missing.*'right'"):
        fxpath.trace(model, left)
    with pytest.raises(InputError, match="too many positional arguments"):
        fxpath.trace(model, (left, right, right))
    with pytest.raises(InputError, match="gives left, wrong"):
        fxpath.trace(model, {"left": left, "wrong": right})
    with pytest.raises(ModelError, match=r"cannot run on the example \[\(3, 3\), \(3, 3\)\].*right size"):
        fxpath.trace(model, (left, left))
    with pytest.raises(ModelError, match=r"cannot run on the example.*Float"):
        fxpath.trace(model, (left.float(), right))
    with pytest.raises(InputError, match="expected a tensor, a tuple or a dict of them, found list"):
        fxpath.trace(model, [left, right])
    with pytest.raises(ModelError, match=r"expected an nn\.Module, found function"):
        fxpath.trace(lambda x: x, left)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="leaves to be module types"):
        fxpath.trace(model, (left, right), leaves=("relu",))  # type: ignore[arg-type]


def test_script_modules_get_one_clear_error() -> None:
    with pytest.warns(Warning, match="jit.script"):
        model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval())
    with pytest.raises(TraceError, match="ScriptModule"):
        fxpath.trace(model, torch.ones(2, 3))


def test_compiled_and_traced_modules_are_taken_for_what_they_hold() -> None:
    case = BY_NAME["ReusedInPlaceReLU"]
    model = case.model()
    for wrapped in (torch.compile(model), fx.symbolic_trace(case.model())):
        network = fxpath.trace(wrapped, case.x())
        assert [site.shape for site in network.sites] == [(3, 3, 3), (3, 2, 2)]
        assert same_bits(network(case.x()), outputs(model, case.x()))


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    with pytest.raises(ModelError, match=r"0\.weight of Sequential was made in inference mode.*copy\.deepcopy"):
        fxpath.trace(model, torch.ones(2, 3))
    network = fxpath.trace(copy.deepcopy(model), torch.ones(2, 3))  # the way out
    assert network.gradients(torch.ones(2, 3)).gradients[0].shape == (2, 3)


def test_hooks_of_the_user_stay_and_work() -> None:
    case = BY_NAME["Plain"]
    model = case.model()
    seen: list[tuple[int, ...]] = []
    model.conv2.register_forward_hook(lambda module, args, output: output * 1.5)
    model.conv1.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    with unchanged(model):
        network = case.trace(model)
    assert same_bits(network(case.x()), outputs(model, case.x()))
    assert not same_bits(network(case.x()), outputs(case.model(), case.x()))
    seen.clear()
    network(case.x(2))
    assert seen == [(2, 2, 5, 5)]


@pytest.mark.parametrize("guard", [False, True], ids=["symbolic_trace", "torch.export"])
def test_what_a_module_notes_while_it_is_traced_is_taken_back(guard: bool) -> None:
    """Else it would be left with proxies and fake tensors, or with the activations of the example."""

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 3)
            self.seen: list[Any] = []
            self.by_name = {"fc1": self.seen}
            self.last: Any = None
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if guard and x.shape[1] != 4:
                raise ValueError("four, please")
            h = F.relu(self.fc1(x))
            self.last, self.calls = h, self.calls + 1
            self.seen.append(h)
            self.by_name["relu"] = h
            self.fc1.output = h
            return self.fc2(h)

    model = Noting().eval()
    with unchanged(model):
        network = fxpath.trace(model, torch.ones(2, 4))
    assert network.traced.tracer == ("torch.export" if guard else "symbolic_trace")
    assert (model.seen, model.last, model.calls) == ([], None, 0)
    assert list(model.by_name) == ["fc1"]
    assert model.by_name["fc1"] is model.seen
    assert not hasattr(model.fc1, "output")
    model(torch.ones(2, 4))
    assert len(model.seen) == model.calls == 1


def test_modules_without_shapes_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU()).eval()
    with pytest.raises(ModelError, match=r"0\.weight of Sequential has no shape yet; run the model once"):
        fxpath.trace(model, torch.ones(2, 4))
    model(torch.ones(2, 4))
    assert fxpath.trace(model, torch.ones(2, 4)).index.size == 3


def test_fixed_arguments_cannot_change_unseen() -> None:
    network = BY_NAME["OptionalGiven"].trace()
    x, mask, _ = BY_NAME["OptionalGiven"].x()
    with pytest.raises(InputError, match=r"expected the arguments that are no tensors to be \[True\].*found \[False\]"):
        network((x, mask, False))
    with pytest.raises(InputError, match=r"expected .* \[True\].*found \[None, True\]"):
        network((x, None, True))
    with pytest.raises(InputError, match="expected the arguments of the example"):
        network((x, mask))
    by_name = BY_NAME["OptionalByName"].trace()
    with pytest.raises(InputError, match=r"\['scale', 'x'\].*found \['mask', 'scale', 'x'\]"):
        by_name({"x": x, "scale": 2.0, "mask": mask})


def test_dict_inputs_in_any_order() -> None:
    network, x = traced("DictInput"), BY_NAME["DictInput"].x()
    turned = dict(reversed(x.items()))
    assert list(turned) != list(x)
    assert same_bits(network(turned), network(x))
    with pytest.raises(InputError, match=r"expected inputs \(B, 3\).*found \(3, 4\)"):
        network({"left": x["right"], "right": x["right"]})


def test_names_are_unique() -> None:
    for case in CASES:
        names = [node.meta[NAME] for node in traced(case.name)._module.graph.nodes]
        assert len(names) == len(set(names))


def test_difference() -> None:
    nan, inf = float("nan"), float("inf")
    one = torch.tensor([1.0, nan, inf, -inf])
    assert difference(one, one.clone()) == 0
    assert difference(one, torch.tensor([1.0, nan, inf, inf])) is None
    assert difference(one, torch.tensor([1.0, 2.0, inf, -inf])) is None
    assert difference(one, torch.tensor([nan, nan, inf, -inf])) is None
    near = torch.nextafter(torch.tensor([1.0]), torch.tensor([2.0]))
    assert difference(torch.tensor([1.0]), near) == pytest.approx(2**-23)
    assert difference(torch.tensor([1.0]), torch.tensor([1.001])) is None
    assert difference(torch.tensor([1]), torch.tensor([2])) is None
    assert difference(torch.ones(2), torch.ones(3)) is None
    assert difference(torch.ones(2), torch.ones(2, dtype=torch.float64)) is None
    assert difference({"a": torch.ones(2), "b": 3}, {"a": torch.ones(2), "b": 3}) == 0
    assert difference({"a": torch.ones(2), "b": 3}, {"a": torch.ones(2), "b": 4}) is None
    assert difference((torch.ones(2),), [torch.ones(2)]) == 0  # a graph may give a list for a tuple
    assert difference((torch.ones(2),), torch.ones(2)) == 0


def test_traced_alone() -> None:
    """The floor below networks: a graph without gates."""
    case = BY_NAME["DictOutput"]
    found = trace_module(case.model(), Samples(case.x()))
    assert found.notes == []
    assert same_bits(found(Samples(case.x(2))), outputs(case.model(), case.x(2)))


def test_notes_say_why_symbolic_tracing_was_not_enough() -> None:
    for name, reason in (("ViewSlice", "AliasError"), ("SliceAssignment", "TypeError"), ("ShapeBranch", "TraceError")):
        (note,) = traced(name).traced.notes[:1]
        assert note.startswith(f"symbolic_trace: {reason}")


def test_module_that_writes_to_its_parameter_is_refused() -> None:
    class Counter(Head):
        def __init__(self) -> None:
            super().__init__(2)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.head(F.relu(x)) + self.count

    model = Counter().double().eval()
    with pytest.raises((TraceError, ModelError)):
        fxpath.trace(model, image(2))
