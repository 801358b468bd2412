"""Padding: neurons at padding tokens are none of a sample's, and nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import trace_any
from texts import WIDE, bert, gpt2, sentences, weighted
from torch import Tensor, nn

import fxpath
from fxpath.analysis import dead_by_sample, overlap_by_sample
from fxpath.errors import EmptyPathwaysWarning, InputError, SampleError, SiteError, StoreError
from fxpath.pathways import Pathways, Scores, Selection
from fxpath.placement import PlacementWarning
from fxpath.responses import Logit, token
from fxpath.selectors import Selector
from fxpath.selectors.contribution import ByScore
from fxpath.selectors.pruning import Descent

LENGTHS = (6, 9, 16)
SELECTORS: tuple[Selector, ...] = (
    fxpath.NeuronMCT(),
    fxpath.NeuronIntGrad(steps=3),
    fxpath.Magnitude(),
    fxpath.Active(),
    fxpath.Random(seed=2),
    fxpath.Random(per_layer=True),
    fxpath.GreedyPruning(share=0.05),
    fxpath.DGR(lr=0.1, iterations=10),
    fxpath.DGR(lr=0.1, iterations=10, init="r"),
    fxpath.DGR(lr=0.01, iterations=10, per_channel=True),
)


class Tokens(nn.Module):
    """Tokens that do not meet before they are averaged; the mask is the second of two arguments in order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2, self.head = (
            nn.Embedding(9, 5),
            nn.Linear(5, 7),
            nn.Linear(7, 3),
            nn.Linear(3, 4),
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = F.relu(self.fc2(F.relu(self.fc1(self.embed(ids)))))
        real = mask.unsqueeze(-1).to(h.dtype)
        return self.head((h * real).sum(1) / real.sum(1))


class Transposed(Tokens):
    """Channels first: tokens are the last axis."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = F.relu(self.fc1(self.embed(ids)).transpose(1, 2))
        h = F.relu(self.fc2(h.transpose(1, 2)).transpose(1, 2))
        real = mask.unsqueeze(1).to(h.dtype)
        return self.head((h * real).sum(2) / real.sum(2))


class Erased(Tokens):
    """What stands at padding tokens is cut off first, so that it changes no site."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        real = mask.unsqueeze(-1).to(self.head.weight.dtype)
        h = self.embed(ids) * real
        h = F.relu(self.fc2(F.relu(self.fc1(h + 0.1 * h.mean(1, keepdim=True)))))
        return self.head((h * real).sum(1) / real.sum(1))


class Folded(Tokens):
    """Tokens are folded into the batch: a sample's block has them in front."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = F.relu(self.fc1(self.embed(ids).flatten(0, 1)))
        h = F.relu(self.fc2(h)).unflatten(0, ids.shape)
        real = mask.unsqueeze(-1).to(h.dtype)
        return self.head((h * real).sum(1) / real.sum(1))


class Classified(Tokens):
    """A class token comes in front after the first site, and a pooled site has no tokens."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = F.relu(self.fc1(self.embed(ids)))
        h = F.relu(self.fc2(torch.cat([h[:, :1], h], dim=1)))
        h = torch.cat([h[:, :1], h[:, 1:] * mask.unsqueeze(-1)], dim=1)
        return self.head(F.relu(h.sum(1)))


class Pairs(Tokens):
    """A site of pairs of tokens: of its two axes of tokens the second has nothing of padding tokens."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h, real = self.fc1(self.embed(ids)), mask.unsqueeze(-1)
        h = F.relu(h.unsqueeze(2) + (h * real).unsqueeze(1)).mean(2)
        return self.head((F.relu(self.fc2(h)) * real).sum(1))


class Symmetric(Tokens):
    """The same, but that both axes are alike."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h, real = self.fc1(self.embed(ids)), mask.unsqueeze(-1)
        h = F.relu(h.unsqueeze(2) + h.unsqueeze(1)) * real.unsqueeze(1)
        return self.head((F.relu(self.fc2(h.mean(2))) * real).sum(1))


class Convolved(Tokens):
    """Neighbours meet in a convolution that knows no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 7, 3, padding=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = F.relu(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))
        return self.head((F.relu(self.fc2(h)) * mask.unsqueeze(-1)).sum(1))


class Latents(Tokens):
    """As many latent vectors as tokens, each a mean over real tokens of its own kind: they are no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(3)))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.embed(ids)
        weights = (self.mix @ h.transpose(1, 2)).masked_fill(mask.unsqueeze(1) == 0, -1e9).softmax(2)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(weights @ h)))).sum(1))


def marked(lengths: Sequence[int], width: int = 6) -> tuple[Tensor, Tensor]:
    """Tokens and mask in order."""
    x = sentences(list(lengths), width)
    return x["input_ids"] % 9, x["attention_mask"]


@cache
def tokens(kind: type[nn.Module] = Tokens, **options: Any) -> fxpath.Network:
    return trace_any(weighted(kind()), marked([6, 4, 2]), padding=1, **options)


@cache
def model() -> nn.Module:
    return weighted(bert())


@cache
def network(width: int = 6, granularity: str = "unit", padding: str | None = "attention_mask") -> fxpath.Network:
    x = sentences([width, width - 1, width - 3], width)
    return trace_any(model(), x, response=Logit("logits"), granularity=granularity, padding=padding)


def padded(x: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    return {name: F.pad(value, (0, width - value.shape[1])) for name, value in x.items()}


def real_part(traced: fxpath.Network, pathways: Pathways, length: int) -> Tensor:
    """What a pathway keeps at the first `length` tokens; nothing may be kept at the others."""
    parts = []
    for number, site in enumerate(traced.sites):
        kept = pathways.site(number)
        if site.shape == (traced.input_shapes[0][0], WIDE) and traced.index.granularity == "unit":
            assert not bool(kept[:, length:].any())
            kept = kept[:, :length]
        parts.append(kept.flatten(1))
    return torch.cat(parts, dim=1)


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_a_sentence_has_one_pathway_however_far_it_is_padded(selector: Selector, granularity: str) -> None:
    x = sentences([6])
    plain = network(6, granularity, None)
    expected = selector.select(plain, x, [0.4])
    level = None if selector.single else 0.4
    for width in LENGTHS:
        traced = network(width, granularity)
        found = selector.select(traced, padded(x, width), [0.4])
        assert found.missing == expected.missing
        if level not in expected.pathways:
            assert level not in found.pathways
            continue
        kept = real_part(traced, found.pathways[level], 6)
        assert torch.equal(kept, real_part(plain, expected.pathways[level], 6))
        assert torch.equal(found.pathways[level].density, expected.pathways[level].density)
        assert torch.equal(found.pathways[level].count, expected.pathways[level].count)
        for name, value in found.diagnostics.items():
            torch.testing.assert_close(
                value, expected.diagnostics[name], rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
            )


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_channels_that_only_padding_switches_on_do_not_count(selector: Selector) -> None:
    module, ids = weighted(Tokens()), torch.tensor([[1, 2, 3, 0, 0], [1, 2, 0, 0, 0], [3, 4, 0, 0, 0]])
    module.fc1.bias.data.zero_()
    module.fc2.bias.data.fill_(1)
    module.embed.weight.data[0] = -module.embed.weight[1]  # what stands at padding tokens
    mask = (ids > 0).long()
    plain = trace_any(module, (ids[1:, :2], mask[1:, :2]), granularity="channel")
    traced = trace_any(module, (ids, mask), padding=1, granularity="channel")
    expected = selector.select(plain, (ids[1:, :2], mask[1:, :2]), [0.5])
    found = selector.select(traced, (ids[1:], mask[1:]), [0.5])
    assert found.missing == expected.missing
    for level, pathways in expected.pathways.items():
        assert torch.equal(found.pathways[level].mask, pathways.mask)
        assert torch.equal(found.pathways[level].density, pathways.density)
    switched = traced.activations((ids[1:], mask[1:]))[0].flip(1)[:, 0] > 0
    assert bool((switched & ~plain.original((ids[1:, :2], mask[1:, :2])).active[:, :7]).any())


def test_most_selectors_find_a_pathway_in_that_test() -> None:
    """At 0.4 all do but channels of DGR from noise and from its steps; an empty test would prove nothing."""
    for granularity in ("unit", "channel"):
        for selector in SELECTORS[:8]:
            found = selector.select(network(9, granularity), sentences([6], 9), [0.4])
            assert int(next(iter(found.pathways.values())).count) > 0


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_in_a_batch_every_sample_counts_its_own_units(selector: Selector, granularity: str) -> None:
    traced, x = network(9, granularity), sentences([9, 5, 1], 9)
    real = traced.real(x)
    assert real is not None
    own = [2 * WIDE * length + 32 for length in (9, 5, 1)]
    assert real.sizes == own
    found = selector.select(traced, x, [0.5])
    for pathways in found.pathways.values():
        assert not bool((pathways.mask & ~real.mask).any())
        assert torch.equal(pathways.density, pathways.count / torch.tensor(own, dtype=torch.float64))
        if not selector.single:
            assert all(count <= size // 2 for count, size in zip(pathways.count.tolist(), own, strict=True))
    if isinstance(selector, ByScore) and granularity == "unit":
        assert found[0.5].count.tolist() == [size // 2 for size in own]
        scores = replace(selector, max_batch=1) if isinstance(selector, fxpath.NeuronIntGrad) else selector
        assert scores.scores(traced, x).pathways(0.5).count.tolist() == [size // 2 for size in own]


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_without_padding_tokens_every_bit_is_that_of_a_network_without_padding(selector: Selector) -> None:
    x = sentences([6, 6])
    for granularity in ("unit", "channel"):
        one, other = (selector.select(network(6, granularity, name), x, [0.7]) for name in ("attention_mask", None))
        assert one.missing == other.missing
        for level, pathways in one.pathways.items():
            assert torch.equal(pathways.mask, other.pathways[level].mask)
            assert torch.equal(pathways.density, other.pathways[level].density)
        if one.scores is not None:
            assert other.scores is not None
            assert torch.equal(one.scores.signed, other.scores.signed)
        for name, value in one.diagnostics.items():
            torch.testing.assert_close(value, other.diagnostics[name], rtol=0, atol=0, equal_nan=True)


def test_outputs_and_frozen_networks_are_the_models_to_the_bit() -> None:
    traced, x = network(9), sentences([9, 5, 1], 9)
    with torch.no_grad():
        expected = model()(**x).logits
        assert torch.equal(traced(x).logits, expected)
        for selector in (fxpath.NeuronMCT(), fxpath.Random()):
            with traced.frozen(selector.select(traced, x, [0.9])[0.9], at=x):
                assert torch.equal(traced(x).logits, expected)
        everything = traced.real(x).mask
        with traced.masked(Pathways(everything, traced.index)):  # what is masked at padding tokens bears on nothing
            torch.testing.assert_close(traced(x).logits, expected, rtol=1e-12, atol=1e-14)


def test_active_neurons_are_real_ones() -> None:
    traced, x = network(9), sentences([9, 5, 1], 9)
    active, plain = traced.original(x).active, network(9, padding=None).original(x).active
    real = traced.real(x).mask
    assert torch.equal(active, plain & real)
    assert bool((plain & ~real).any())
    seen = network(9, "channel").original(x).active
    for number, site in enumerate(traced.sites):
        block = active[:, site.slice].view(-1, *site.shape)
        assert torch.equal(
            seen[:, network(9, "channel").index.site(number).slice], block.any(1) if block.ndim == 3 else block
        )


def test_channels_are_switched_on_at_real_tokens_alone() -> None:
    traced, x = network(9, "channel"), sentences([9, 2, 1], 9)
    pathways, original = fxpath.Random().select(traced, x, [0.5])[0.5], traced.original(x)
    with traced.masked(pathways):
        values = traced.activations(x)
    expected = torch.zeros((3, len(traced.sites)), dtype=torch.int64)
    everywhere = expected.clone()
    for number, (site, value) in enumerate(zip(traced.sites, values, strict=True)):
        dead = pathways.mask[:, site.slice] & ~original.active[:, site.slice]
        on = value > 0
        everywhere[:, number] = ((on.any(1) if on.ndim == 3 else on) & dead).sum(1)
        on = (on & (x["attention_mask"] == 1).unsqueeze(2)).any(1) if on.ndim == 3 else on
        expected[:, number] = (on & dead).sum(1)
    assert torch.equal(traced.outcome(x, pathways).live, expected)
    assert not torch.equal(everywhere, expected)
    assert bool(expected.any())


def test_scores_are_zero_at_padding_tokens_even_where_the_model_reads_them() -> None:
    class Careless(Tokens):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.head(F.relu(self.fc2(F.relu(self.fc1(self.embed(ids))))).sum(1) + 0 * mask.sum(1, keepdim=True))

    x, module = marked([6, 4, 2]), weighted(Careless())
    module.fc2.bias.data.fill_(0.5)  # so that the second site is alive where the first is closed
    for granularity in ("unit", "channel"):
        traced = trace_any(module, x, padding=1, granularity=granularity)
        plain = trace_any(module, x, granularity=granularity)
        fine = trace_any(module, x)
        for selector in (fxpath.NeuronMCT(), fxpath.NeuronIntGrad(steps=2), fxpath.Magnitude()):
            scores, others = selector.scores(traced, x), selector.scores(plain, x)
            units = selector.scores(fine, x)
            assert not torch.equal(scores.signed, others.signed)
            for number, site in enumerate(fine.sites):
                block = units.site(number) * x[1].unsqueeze(-1)
                expected = block.flatten(1) if granularity == "unit" else block.sum(1)
                torch.testing.assert_close(
                    scores.signed[:, traced.sites[number].slice], expected, rtol=1e-9, atol=1e-12
                )
                assert site.axis == 1
        greedy = fxpath.GreedyPruning(share=0.1).select(traced, x, [0.5])
        routed = fxpath.DGR(lr=0.1, iterations=5).select(traced, x, [0.5])
        for pathways in (*greedy.pathways.values(), *routed.pathways.values()):
            assert not bool((pathways.mask & ~traced.real(x).mask).any())
            assert bool((pathways.density <= 0.5).all())
    traced = trace_any(module, x, padding=1)
    found = fxpath.DGR(lr=0.5, gamma=1e-4, iterations=20).optimise(traced, x)
    kept, real = found.diagnostics["iterate"] > 0, traced.real(x).mask
    assert bool(kept.any())
    assert bool(found.touched[kept].any())
    assert not bool(found.touched[~real].any())
    assert not bool(found.gates[kept][~real[kept]].any())


def test_descents_on_a_device_start_from_real_neurons_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sentences([9, 5, 2], 9)
    expected = fxpath.GreedyPruning(share=0.05).select(network(9), x, [0.4])
    monkeypatch.setattr(Descent, "_selects_on_host", lambda self: False)
    found = fxpath.GreedyPruning(share=0.05).select(network(9), x, [0.4])
    assert torch.equal(found[0.4].mask, expected[0.4].mask)


def test_thresholds_on_a_device_count_each_samples_own_units() -> None:
    x = sentences([9, 5, 1], 9)
    scores = fxpath.NeuronMCT().scores(network(9), x)
    assert scores.real is not None
    levels = (0.0, 0.5, 0.9)
    masks = scores._threshold_singly([scores.real.kept(level) for level in levels])
    assert torch.equal(masks, torch.stack([pathways.mask for pathways in scores.threshold(levels)]))


def test_pathways_are_combined_among_real_neurons() -> None:
    traced, x = network(9), sentences([9, 5, 1], 9)
    real = traced.real(x).mask
    one, two = (selector.select(traced, x, [0.5])[0.5] for selector in (fxpath.NeuronMCT(), fxpath.Random()))
    assert torch.equal((~one).mask, real & ~one.mask)
    assert torch.equal((~one).density + one.density, torch.ones(3, dtype=torch.float64))
    for joined in (one & two, one | two, one - two, ~one):
        assert joined.real is one.real
    bare = Pathways(two.mask, traced.index)
    assert (bare & one).real is one.real
    assert bare.real is None
    assert torch.equal(one.jaccard(two), one.jaccard(bare))
    second = one.take([1])
    assert float(second.density) == float(one.density[1])
    union = (one.take([1, 1, 1]).mask | one.mask).sum(1)
    assert torch.equal((second | one).density, union.double() / one.real.units.sum(1))
    everything = Pathways(torch.ones_like(one.mask), traced.index)
    assert torch.equal(everything.within(one.real).mask, real)
    assert one.within(one.real) is one
    with pytest.raises(InputError, match=r"real of 3 samples and the same index, found it of 1"):
        Pathways(one.mask, traced.index, second.real)


# --- which axis holds the tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        (Tokens, (0, 0)),
        (Transposed, (1, 1)),
        (Erased, (0, 0)),
        (Folded, (0, 0)),
        (Classified, (0, None, None)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_token_axis_of_every_site_is_found(kind: type[nn.Module], axes: tuple[int | None, ...]) -> None:
    traced = tokens(kind)
    assert traced.padding is not None
    assert traced.padding.axes == axes
    x = marked([5, 3, 6])
    real = traced.real(x)
    for number, (site, axis) in enumerate(zip(traced.sites, axes, strict=True)):
        block = real.mask[:, site.slice].view(-1, *site.shape)
        if axis is None:
            assert bool(block.all())
        else:
            other = [place + 1 for place in range(len(site.shape)) if place != axis]
            assert torch.equal(block.all(dim=other), x[1] == 1)
            assert torch.equal(block.any(dim=other), x[1] == 1)
        assert torch.equal(real.units[:, number], block.flatten(1).sum(1))


def test_of_two_axes_of_tokens_that_of_the_token_itself_is_taken() -> None:
    traced = tokens(Pairs)
    assert [site.shape for site in traced.sites] == [(6, 6, 7), (6, 3)]
    assert traced.padding.axes == (0, 0)


def test_without_data_sizes_decide() -> None:
    with torch.device("meta"):
        module, x = Tokens().eval(), tuple(torch.ones(2, 6, dtype=torch.int64) for _ in range(2))
        traced = trace_any(module, x, padding=1, check=False)
        assert traced.padding.axes == (0, 0)
        with pytest.raises(SiteError, match=r"relu \(6, 6, 7\): .*: 2 of its axes have as many entries as tokens"):
            trace_any(Pairs().eval(), x, padding=1, check=False)


def test_gpt2_and_bert() -> None:
    assert network(9).padding.axes == (0, 0, None)
    assert network(32).padding.axes == (0, 0, None)  # as many tokens as channels of the pooled site
    x = sentences([6, 4]) | {"use_cache": False}
    traced = trace_any(weighted(gpt2()), x, response=lambda y: y.logits[:, 1, 7], padding="attention_mask")
    assert traced.padding.axes == (0, 0)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Convolved, "what stands at a masked token changes others, too"),
        (Symmetric, "what stands at a masked token changes others, too"),
        (Latents, "does not follow a single token"),
    ],
)
def test_an_axis_that_only_has_the_size_of_the_tokens_is_refused(kind: type[nn.Module], why: str) -> None:
    with pytest.raises(SiteError, match=rf"padding: site relu \((6, )?6, 7\): cannot tell .*{why}.*leave the site out"):
        trace_any(weighted(kind()), marked([6, 4]), padding=1)
    if kind is Latents:  # with another number of tokens the sizes differ, and all neurons are real
        with pytest.raises(SiteError, match="no site has an axis of the 8 tokens of 1 besides its channels"):
            trace_any(weighted(kind()), marked([8, 4], 8), padding=1)


def test_equal_tokens_can_be_tried_as_well() -> None:
    x = {name: torch.ones(2, 6, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    traced = trace_any(model(), x, response=Logit("logits"), padding="attention_mask")
    assert traced.padding.axes == (0, 0, None)
    mask = x["attention_mask"].bool()
    floats = {"inputs_embeds": torch.zeros(2, 6, 32, dtype=torch.float64), "attention_mask": mask}
    traced = trace_any(model(), floats, response=Logit("logits"), padding="attention_mask")
    assert traced.padding.axes == (0, 0, None)


def test_nothing_is_left_after_the_trial() -> None:
    x = marked([6, 4])
    before = [value.clone() for value in x]
    module = weighted(Tokens())
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    trace_any(module, x, padding=1)
    assert all(map(torch.equal, x, before))
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "padding", "error", "said"),
    [
        ({}, "atention_mask", InputError, "there is no input 'atention_mask'; nearest: attention_mask"),
        ({}, 1, InputError, "expected the name of an input, as the example is a dict, found 1"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask", InputError, r"found a tensor \(2, 1, 6, 6\)"),
        ({"attention_mask": None}, "attention_mask", InputError, r"\(samples, tokens\).*found NoneType"),
        ({"attention_mask": torch.eye(2, 6)}, "attention_mask", InputError, "at least two real tokens .* found 1"),
        ({}, "token_type_ids", InputError, "there is no input 'token_type_ids'"),
    ],
)
def test_padding_that_is_no_mask_is_refused(
    change: dict[str, Any], padding: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        trace_any(model(), sentences([6, 4]) | change, response=Logit("logits"), padding=padding)


@pytest.mark.parametrize("padding", ["mask", 2, -1, True, 1.0])
def test_a_place_that_is_none_is_refused(padding: Any) -> None:
    with pytest.raises(InputError, match=r"padding: expected the place of an input, 0 … 1, .* found"):
        trace_any(weighted(Tokens()), marked([6, 4]), padding=padding)


def test_a_mask_alone_and_sites_without_tokens_are_refused() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(1, 4), nn.Linear(4, 2)

        def forward(self, mask: Tensor) -> Tensor:
            return self.fc2(F.relu(self.fc1(mask.unsqueeze(2))).sum(1))

    with pytest.raises(InputError, match="expected another input with the 6 tokens that 0 marks, found none"):
        trace_any(Masked().eval(), torch.ones(2, 6), padding=0)
    with pytest.raises(SiteError, match="no site has an axis of the 6 tokens of 'attention_mask'"):
        trace_any(
            model(), sentences([6]), response=Logit("logits"), padding="attention_mask", sites="bert.pooler.activation"
        )


def test_a_sample_without_a_token_is_named() -> None:
    traced, x = network(6), sentences([6, 4, 2])
    x["attention_mask"][1] = 0
    for call in (traced.real, traced.original, lambda x: fxpath.Random().select(traced, x, [0.5])):
        with pytest.raises(SampleError, match=r"sample 'b' has no real token: expected 'attention_mask'") as found:
            call(fxpath.Samples(x, ids=["a", "b", "c"]))
        assert found.value.positions == (1,)
    with pytest.raises(SampleError) as found:  # samples in pieces, too, keep their places
        fxpath.NeuronIntGrad(steps=1, max_batch=1).scores(traced, x)
    assert found.value.positions == (1,)


# --- jobs and stores --------------------------------------------------------------------------------------------------


class Texts:
    """A data set of sentences; the second has no real token."""

    lengths = (9, 0, 5, 1, 7)
    ids: ClassVar[list[str]] = [f"text {length}" for length in lengths]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {name: value[position] for name, value in sentences(list(self.lengths), 9).items()}


@dataclass(frozen=True)
class Everything:
    """A selector that knows nothing of padding."""

    key: ClassVar[str] = "everything"
    single: ClassVar[bool] = True

    def select(self, network: fxpath.Network, samples: Any, sparsities: Sequence[float] = ()) -> Selection:
        mask = torch.ones((network.samples(samples).batch, network.index.size), dtype=torch.bool)
        return Selection({None: Pathways(mask, network.index)})


@dataclass(frozen=True)
class Ones(ByScore):
    """Equal scores for all neurons."""

    key: ClassVar[str] = "ones"

    def scores(self, network: fxpath.Network, samples: Any, target: Any = None) -> Scores:
        return Scores(torch.ones(network.samples(samples).batch, network.index.size), network.index, key=self.key)


def test_a_scorer_that_knows_nothing_of_padding_takes_none() -> None:
    traced, x = network(9), sentences([9, 5, 1], 9)
    found = Ones().select(traced, x, [0.25])[0.25]
    assert found.count.tolist() == [size * 3 // 4 for size in traced.real(x).sizes]
    assert not bool((found.mask & ~traced.real(x).mask).any())


def job(path: Path, traced: fxpath.Network, **options: Any) -> fxpath.Store:
    selectors = [fxpath.NeuronMCT(), fxpath.Magnitude(), fxpath.Active(), Everything(), Ones()]
    given = {"selectors": selectors, "sparsities": [0.5, 0.9], "micro_batch": 2, "scores": "float32", "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyPathwaysWarning)
        warnings.simplefilter("ignore", PlacementWarning)
        fxpath.compute(traced, Texts(), path, **given | options)
    return fxpath.open_store(path)


@pytest.mark.parametrize("granularity", ["unit", "channel"])
def test_a_store_counts_each_samples_own_units(tmp_path: Path, granularity: str) -> None:
    traced = network(9, granularity)
    with job(tmp_path / "run.h5", traced) as store:
        good = [0, 2, 3, 4]
        own = np.array([[WIDE * length, WIDE * length, 32 if length else 0] for length in Texts.lengths])
        np.testing.assert_array_equal(store.units(), own)
        np.testing.assert_array_equal(store.units(slice(2, 4)), own[2:4])
        assert store.samples()["status"].tolist()[1] == "it has no real token: 'attention_mask' is 0 everywhere"
        assert store.ok.tolist() == [True, False, True, True, True]
        x = sentences(list(Texts.lengths), 9)
        for row in good:
            one = {name: value[[row]] for name, value in x.items()}
            scores = fxpath.NeuronMCT().scores(traced, one)
            for level in (0.5, 0.9):
                pathways = scores.pathways(level)
                np.testing.assert_array_equal(store.mask(f"neuron_mct@{level}", row), pathways.mask[0].numpy())
                assert store.column(f"neuron_mct@{level}", "density")[row] == float(pathways.density)
                assert store.column(f"neuron_mct@{level}", "kept")[row].sum() == int(pathways.mask.sum())
            for level in (0.3, 0.5, 0.9, "0.95"):
                cut = store.cut("neuron_mct", level, row)
                np.testing.assert_array_equal(cut, scores.pathways(float(level)).mask[0].numpy())
            everything, ones = store.mask("everything", row), store.mask("ones@0.5", row)
            np.testing.assert_array_equal(everything, traced.real(one).mask[0].numpy())
            assert not (ones & ~everything).any()
            assert store.column("everything", "density")[row] == 1
            if granularity == "unit":
                assert ones.sum() == own[row].sum() // 2
        assert not store.cut("neuron_mct", 0.5, 1).any()


def test_offline_shares_are_of_the_samples_own_neurons(tmp_path: Path) -> None:
    with job(tmp_path / "run.h5", network(9)) as store:
        table = dead_by_sample(store, ["neuron_mct@0.5", "active", "everything"], by_site=True, progress=False)
        units = store.neurons()
        for (key, row), found in table.groupby(["key", "sample"]):
            own = np.array([units[row].sum(), *units[row]])
            kept = store.column(key, "kept")[row].astype(int)
            active = store.index.count_by_site(store.active(slice(row, row + 1)))[0]
            dead = own - np.array([active.sum(), *active])
            np.testing.assert_array_equal(found["density"], np.array([kept.sum(), *kept]) / own)
            np.testing.assert_array_equal(found["base_rate"], dead / own)
        whole = table[(table["key"] == "everything") & (table["site_number"] == -1)]
        np.testing.assert_allclose(whole["dead_share"], whole["base_rate"])
        pairs = overlap_by_sample(store, ["ones@0.5", "everything"], progress=False)
        np.testing.assert_allclose(pairs["jaccard"], pairs["chance"] * 0 + 0.5, atol=0.01)
        half = pairs["intersection"] / pairs["union"]
        np.testing.assert_allclose(pairs["chance"], half, atol=1e-12)  # half of the sample's own against all of them


def test_a_store_without_padding_has_no_units_and_counts_all(tmp_path: Path) -> None:
    traced = network(9, padding=None)
    with job(tmp_path / "run.h5", traced) as store:
        assert "units" not in store._file["samples"]
        np.testing.assert_array_equal(store.units(), [[9 * WIDE, 9 * WIDE, 32]] * 5)
        assert store.cut("ones", 0.5, 0).sum() == traced.index.kept(0.5)
        assert store.units(slice(1, 1)).shape == (0, 3)


def test_a_job_does_not_go_on_with_other_padding(tmp_path: Path) -> None:
    job(tmp_path / "run.h5", network(9)).close()
    job(tmp_path / "run.h5", network(9)).close()
    with pytest.raises(StoreError, match=r"padding: there \"'attention_mask'\", here \"\""):
        job(tmp_path / "run.h5", network(9, padding=None))
    job(tmp_path / "plain.h5", network(9, padding=None)).close()
    with pytest.raises(StoreError, match=r"padding: there \"\", here \"'attention_mask'\""):
        job(tmp_path / "plain.h5", network(9))


def test_a_job_begins_though_its_first_sample_has_no_token(tmp_path: Path) -> None:
    class Late(Texts):
        lengths = (0, 0, 4)
        ids: ClassVar[list[str]] = ["a", "b", "c"]

    fxpath.compute(network(9), Late(), tmp_path / "run.h5", selectors=["magnitude"], sparsities=[0.5], progress=False)
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert store.ok.tolist() == [False, False, True]


def test_a_response_that_reads_padding_is_refused() -> None:
    """The last position is no token of a short sentence; it is one of whole ones."""
    x = sentences([6, 4, 6]) | {"use_cache": False}
    traced = trace_any(weighted(gpt2()), x, response=token(-1), padding="attention_mask")
    for run in (fxpath.NeuronMCT(), fxpath.NeuronIntGrad(steps=2), fxpath.Magnitude()):
        with pytest.raises(SampleError, match=r"'token:position=-1' reads a padding token of sample 1; ") as raised:
            run.scores(traced, x)
        assert list(raised.value.positions) == [1]
    whole = sentences([6, 6]) | {"use_cache": False}
    assert fxpath.NeuronMCT().scores(traced, whole).signed.any()
    early = trace_any(weighted(gpt2()), x, response=token(3), padding="attention_mask")
    assert fxpath.NeuronMCT().scores(early, x).signed.any()
