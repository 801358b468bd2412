"""Models of transformers, small and with random weights: dict inputs, tuple and dataclass outputs, attention masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from networks import trace_any
from texts import HIDDEN, LENGTH, WIDE, bert, bert_config, common, gpt2, sentences, weighted
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxpath
from fxpath.errors import TraceError
from fxpath.responses import Logit, OutputFunction, Response
from fxpath.subjects import mean_output

ATTENTION = ("sdpa", "eager")


def bert_tuple(attention: str) -> nn.Module:
    return transformers.BertModel(bert_config(attention))


def vit(attention: str) -> nn.Module:
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=4, **common(attention))
    return transformers.ViTForImageClassification(config)


def clip_vision(attention: str) -> nn.Module:
    config = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=12, **common(attention))
    return transformers.CLIPVisionModelWithProjection(config)


def pictures(batch: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))}


def next_word(output: Any) -> Tensor:
    """The score of word 7 after the second token, which is real in every sample here."""
    scores: Tensor = output.logits[:, 1, 7]
    return scores


@dataclass(frozen=True)
class Kind:
    """A model, what is asked of it, and the sites that its GELUs must be: name, operation, tokens."""

    build: Callable[[str], nn.Module]
    response: Response
    sites: tuple[str, ...]
    op: str
    tokens: int
    more: tuple[tuple[str, Any], ...] = ()
    text: bool = True

    def inputs(self, lengths: list[int]) -> dict[str, Any]:
        return (sentences(lengths) if self.text else pictures(len(lengths))) | dict(self.more)


KINDS = {
    "bert": Kind(bert, Logit("logits"), ("bert.encoder.layer.0.*", "bert.encoder.layer.1.*"), "gelu", LENGTH),
    "bert_tuple": Kind(
        bert_tuple, OutputFunction(mean_output), ("encoder.layer.0.*", "encoder.layer.1.*"), "gelu", LENGTH,
        (("return_dict", False),),
    ),
    "gpt2": Kind(
        gpt2, OutputFunction(next_word), ("transformer.h.0.*", "transformer.h.1.*"), "gelu", LENGTH,
        (("use_cache", False),),
    ),
    "vit": Kind(vit, Logit("logits"), ("vit.*layer*.0.*", "vit.*layer*.1.*"), "gelu", 5, text=False),
    "clip_vision": Kind(
        clip_vision, OutputFunction(mean_output), ("vision_model.*.0.*", "vision_model.*.1.*"), "quick_gelu", 5,
        text=False,
    ),
}  # fmt: skip


@cache
def model(kind: str, attention: str = "sdpa") -> nn.Module:
    return weighted(KINDS[kind].build(attention))


@cache
def network(kind: str, attention: str = "sdpa", granularity: str = "unit") -> fxpath.Network:
    x = inputs(kind, [6, 4, 2])
    return trace_any(model(kind, attention), x, response=KINDS[kind].response, granularity=granularity)


def inputs(kind: str, lengths: list[int]) -> dict[str, Any]:
    """Inputs in the type of the model's weights."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in KINDS[kind].inputs(lengths).items()
    }


def equal(one: Any, other: Any) -> bool:
    """Whether two outputs are of one type and hold the same bits."""
    leaves, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return type(one) is type(other) and len(leaves) == len(others) > 0 and all(map(torch.equal, leaves, others))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_answers_as_the_model_with_any_batch_and_any_padding(kind: str, attention: str) -> None:
    traced = network(kind, attention)
    answers = []
    for lengths in ([6], [2], [6, 6], [3, 6], [2, 2, 2], [6, 5, 3], [6, 6, 6]):
        x = inputs(kind, lengths)
        with torch.no_grad():
            expected = model(kind, attention)(**x)
        assert equal(traced(x), expected)
        answers.append(pytree.tree_leaves(expected)[0])
    if KINDS[kind].text:
        assert not torch.equal(answers[0], answers[1][:1])  # the mask matters


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_an_example_without_padding_does_not_fix_the_mask(kind: str, attention: str) -> None:
    traced = trace_any(model(kind, attention), inputs(kind, [6, 6]), response=KINDS[kind].response)
    for lengths in ([6], [3, 5], [2, 6, 4]):
        x = inputs(kind, lengths)
        with torch.no_grad():
            assert equal(traced(x), model(kind, attention)(**x))


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_one_gelu_site_of_tokens_and_channels(kind: str) -> None:
    from fnmatch import fnmatchcase

    wanted = KINDS[kind]
    for pattern in wanted.sites:
        (site,) = (site for site in network(kind).sites if fnmatchcase(site.name, pattern))
        assert (site.op, site.shape, site.axis) == (wanted.op, (wanted.tokens, WIDE), 1)
    others = [site for site in network(kind).sites if site.shape != (wanted.tokens, WIDE)]
    assert [(site.op, site.shape) for site in others] == ([("tanh", (HIDDEN,))] if "bert" in kind else [])


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_and_restrictions(kind: str) -> None:
    traced = network(kind)
    x = inputs(kind, [6, 4, 2])
    with torch.no_grad():
        expected = traced(x)
    scores = fxpath.NeuronMCT().scores(traced, x)
    pathways = scores.pathways(0.9)
    assert bool(scores.signed.isfinite().all())
    assert pathways.count.tolist() == [traced.index.kept(0.9)] * 3
    with traced.frozen(pathways, at=x), torch.no_grad():
        assert equal(traced(x), expected)
    with traced.masked(pathways), torch.no_grad():
        assert not equal(traced(x), expected)
    site = traced.sites[1]
    integrated = fxpath.NeuronIntGrad(steps=40, sites=site.name).scores(traced, x)
    assert bool(integrated.signed[:, site.slice].any())
    assert not integrated.signed[:, traced.sites[0].slice].any()
    assert integrated.completeness is not None
    total = integrated.signed[:, site.slice].sum(1).abs()
    assert bool((integrated.completeness[:, 1] <= 1e-3 * (1 + total)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_neurons_over_all_tokens(kind: str) -> None:
    units, channels = network(kind), network(kind, granularity="channel")
    x = inputs(kind, [6, 4, 2])
    assert [site.neurons for site in channels.sites] == [site.shape[site.axis] for site in units.sites]
    fine, coarse = (fxpath.NeuronMCT().scores(each, x) for each in (units, channels))
    for number, site in enumerate(units.sites):
        summed = fine.site(number).sum(1) if len(site.shape) == 2 else fine.site(number)
        torch.testing.assert_close(coarse.site(number), summed, rtol=1e-12, atol=1e-14)
    pathways = coarse.pathways(0.5)
    with channels.frozen(pathways, at=x), torch.no_grad():
        assert equal(channels(x), units(x))


@pytest.mark.parametrize(("kind", "name"), [("bert", "inputs_embeds"), ("vit", "pixel_values")])
@pytest.mark.parametrize("attention", ATTENTION)
def test_the_input_gradient_through_gates_is_the_models(kind: str, name: str, attention: str) -> None:
    x = inputs(kind, [6, 4, 2])
    if name == "inputs_embeds":
        values = torch.randn(3, LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = {"inputs_embeds": values, "attention_mask": x["attention_mask"]}
    module = model(kind, attention)
    traced = trace_any(module, x, response=KINDS[kind].response)
    gradients = []
    for call in (lambda given: module(**given), traced):
        leaf = x[name].clone().requires_grad_()
        gradients += torch.autograd.grad(call({**x, name: leaf}).logits[:, 2].sum(), leaf)
    expected, found = gradients
    assert bool(expected.any())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_cache_in_the_output_is_refused_by_name() -> None:
    x = sentences([6, 4])
    with pytest.raises(TraceError, match=r"GPT2LMHeadModel holds a DynamicCache, .*'use_cache': False") as found:
        trace_any(model("gpt2"), x)
    assert "\n" not in str(found.value)


def test_an_outputs_own_type_is_refused_with_the_way_to_make_it_known() -> None:
    @dataclass
    class Answer:
        scores: Tensor

    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, *more: Tensor) -> Answer:  # symbolic_trace, which cannot bind these, would do
            return Answer(torch.relu(self.fc(x)))

    module = Answering().eval()
    with pytest.raises(TraceError, match=r"holds a Answer, .*torch\.export\.register_dataclass\(Answer\)"):
        fxpath.trace(module, torch.randn(2, 4))
    torch.export.register_dataclass(Answer)
    found = fxpath.trace(module, torch.randn(2, 4))(torch.ones(1, 4))
    assert isinstance(found, Answer)
    assert torch.equal(found.scores, module(torch.ones(1, 4)).scores)
