"""Tiny networks, each awkward in one way, and a table of them with what tracing must find."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxpath
from fxpath.errors import SmoothSitesWarning
from fxpath.responses import Logit, OutputFunction, Response, logit
from fxpath.samples import Samples


class Head(nn.Module):
    """Base: an average over space and a linear layer to four classes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 4)

    def head(self, h: Tensor) -> Tensor:
        return self.fc(h.mean((2, 3)))


class Plain(Head):
    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.relu1 = nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(3, 3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu2(self.conv2(self.relu1(self.conv1(x)))))


class ReusedReLU(Head):
    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 2)
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv2(self.relu(self.bn(self.conv1(x))))))


class ReusedInPlaceReLU(ReusedReLU):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)


class InPlaceReadAgain(Head):
    """The input of an in-place ReLU is read again: by then it is the ReLU's output."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2, self.relu = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(x)
        a = self.relu(z)
        return self.head(F.relu(self.conv2(a)) - 0.5 * z)


class InPlaceReadBefore(Head):
    """A sum that read the pre-activation before the in-place ReLU wrote to it."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2, self.relu = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(x)
        doubled = z * 2
        return self.head(self.relu(self.conv2(self.relu(z))) + doubled)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3) / 4)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1))
        self.fc = nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.conv2d(x, self.weight, padding=1) * self.scale)
        h = F.max_pool2d(F.relu(h - 0.1), 2, stride=1, padding=1)[:, :, ::2, ::2]
        return self.fc(torch.flatten(h, 1).relu())


class ResidualIadd(Head):
    """A residual `+=` onto what an in-place ReLU gave, then another in-place ReLU."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(identity))
        out += identity
        return self.head(self.relu(out))


class ResidualOntoReLU(Head):
    """`+=` writes to the ReLU's own output, which a third layer reads afterwards."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.conv1(x))
        b = a
        b += self.conv2(a)
        return self.head(F.relu(b) + a)


class Alias(Head):
    """`y = x; x += 1` changes y."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        kept = h
        h += 1
        h = F.relu(h - 1.5)
        return self.head(h * 2 + kept)


class AliasThroughDropout(Head):
    """In evaluation mode dropout returns the very tensor that it was given."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv, self.drop, self.conv2 = nn.Conv2d(2, 3, 3), nn.Dropout(0.5), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        same = self.drop(h)
        h.relu_()
        return self.head(F.relu(self.conv2(same)) + same)


class Methods(Head):
    """add_, mul_, sub_, div_, clamp_ and relu_ as methods, functions with inplace=True and out-of-place names."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv = nn.Conv2d(2, 3, 3)
        self.conv2 = nn.Conv2d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h.mul_(1.5).add_(0.1, alpha=2)
        h = h.clamp_(min=0)
        h.sub_(h.mean((2, 3), keepdim=True) / 4).div_(1.25)
        h = F.relu(h, inplace=True)
        h = torch.relu_(self.conv2(h))
        h *= 2
        h -= 0.05
        h /= 1.5
        return self.head(F.threshold(h, 0, 0, True))


class OperatorForms(Head):
    """`**=`, hardtanh_, `clamp_(0)` by position and `torch.clamp(…, min=0, max=…)`."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv = nn.Conv2d(2, 3, 3)
        self.conv2 = nn.Conv2d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.clamp(self.conv(x), min=0, max=0.7)
        h **= 2
        h = self.conv2(h).clamp_(0)
        return self.head(F.hardtanh_(h - 0.02, 0.0, 0.3))


class ViewSlice(Head):
    """Half the channels are rectified in place, through a view."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h[:, :2].relu_()
        return self.head(h)


class ChunkInPlace(Head):
    def __init__(self) -> None:
        super().__init__(4)
        self.conv, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        first, second = h.chunk(2, 1)
        first.relu_()
        return self.head(F.relu(self.conv2(h)) + torch.cat([second, first], 1))


class SliceAssignment(Head):
    def __init__(self) -> None:
        super().__init__(3)
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h[:, 0] = 0.25
        return self.head(F.relu(h))


class Concat(Head):
    """A fire module: two branches, each with its ReLU, side by side."""

    def __init__(self) -> None:
        super().__init__(5)
        self.squeeze, self.small, self.large = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.squeeze(x))
        return self.head(torch.cat([self.relu(self.small(h)), self.relu(self.large(h))], 1))


class SharedModule(Head):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__(2)
        self.first = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True))
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


class TiedWeights(nn.Module):
    """The second layer is the transpose of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.weight.t()) @ self.weight


class Depthwise(Head):
    def __init__(self) -> None:
        super().__init__(4)
        self.stem = nn.Conv2d(2, 4, 1, bias=False)
        self.depthwise, self.bn = nn.Conv2d(4, 4, 3, groups=4, stride=2), nn.BatchNorm2d(4)
        self.point, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(4 * self.point(self.relu(9 * self.bn(self.depthwise(self.relu(self.stem(x))))))))


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(4, 6), nn.Linear(6, 4), nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.relu(self.fc1(F.dropout(x, 0.3, self.training))))
        return F.alpha_dropout(self.fc2(h), 0.5, self.training)


class TupleOutput(Head):
    def __init__(self) -> None:
        super().__init__(3)
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.conv(x))
        return self.head(h), h.flatten(1)


class DictOutput(TupleOutput):
    def forward(self, x: Tensor) -> dict[str, Any]:
        h = F.relu(self.conv(x))
        return {"features": {"last": h}, "logits": self.head(h)}


class ScalarOutput(TupleOutput):
    """One number per sample and a site of that shape."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.head(F.relu(self.conv(x))).sum(1) + 1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(3, 5), nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.last(F.relu(self.left(left)) * F.relu(self.right(right)))


class OptionalArgument(nn.Module):
    """Arguments that may be left out: None, a flag, a number, a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False, scale: float = 1.0) -> Tensor:
        h = F.relu(self.fc1(x))
        if mask is not None:
            h = h * mask
        return self.fc2(h * 2 if double else h) * scale


class PairArgument(OptionalArgument):
    def forward(self, x: Tensor, size: tuple[int, int] = (2, 3)) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)).unflatten(1, size).flatten(1))


class StarArguments(TwoInputs):
    def forward(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        left, right = inputs
        return self.last(F.relu(self.left(left)) * F.relu(self.right(right))) + more.get("shift", 0)


class NestedInput(TwoInputs):
    """The whole batch is one dict."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["left"], batch["right"])


class SizeReshape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        batch, channels, height, width = h.shape
        h = h.reshape(batch, channels * height, width).transpose(1, 2)
        return self.fc(F.relu(h.contiguous().view(h.size(0), -1)[:, : 3 * 4] - 0.1))


class InPlaceOnInput(Head):
    """The network's own input is written to."""

    def __init__(self) -> None:
        super().__init__(3)
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x += 0.25
        h = self.relu(x)
        return self.head(F.relu(self.conv(h))) + 0.1 * x.mean((1, 2, 3), keepdim=False).unsqueeze(1)


class Square(torch.autograd.Function):
    """A function of its own, with a hand-written gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.clamp(x, min=0) ** 2

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * torch.clamp(x, min=0) * slopes[0]


class SquaredReLU(nn.Module):
    """A module that no tracer can look into: it branches on values and calls its own autograd function."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 1e6:
            x = x / 1e6
        return Square.apply(x)


class CustomLeaf(Head):
    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1)
        self.act = SquaredReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(self.act(self.conv1(x)))))


class NeverCalled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.spare, self.other = nn.ReLU(inplace=True), nn.Linear(3, 3)


class BatchFolded(nn.Module):
    """Rows of a sample are folded into the batch, and unfolded again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.relu(self.fc1(x.reshape(-1, 4)))
        rows = F.relu(self.fc2(rows))
        return self.fc3(rows.view(x.shape[0], -1))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)
        )


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.AvgPool1d(2))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


class Unused(Head):
    """A site that the output does not depend on, and one that only feeds it."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.side1, self.side2 = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        F.relu(self.side2(F.relu(self.side1(x))))
        return self.head(F.relu(self.conv1(x)))


class Break(Head):
    """Between two sites the gradient is cut: by detach on one way, by rounding on the other."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv1(x))
        left = F.relu(self.conv2(a.detach()))
        right = F.relu(self.conv3(torch.round(a * 4)))
        return self.head(left - right)


class OverlappingPool(Head):
    def __init__(self) -> None:
        super().__init__(3)
        self.conv1, self.pool, self.conv2 = nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 3, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv2(self.pool(self.relu(self.conv1(x))))))


class SqueezeExcitation(Head):
    def __init__(self) -> None:
        super().__init__(4)
        self.conv, self.down, self.up = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(h, 1)))))
        return self.head(F.relu(h * gate - 0.05))


class Norms(nn.Module):
    """LayerNorm, attention and a feed-forward block: tokens with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down, self.relu = nn.Linear(4, 6), nn.Linear(6, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(self.relu(self.up(self.norm2(x))))
        return x.mean(1)


class Transformer(nn.Module):
    """torch.nn's own encoder layer: its activation lies within a module of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x).mean(1))


class ShapeBranch(Head):
    """Python looks at the shape: symbolic_trace cannot follow, torch.export can."""

    def __init__(self) -> None:
        super().__init__(3)
        self.conv, self.relu = nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 2:
            raise ValueError("two channels, please")
        h = self.relu(self.conv(x))
        for row in range(h.shape[2]):
            if row:
                h = h + torch.relu(h - row).roll(row, 2)
        return self.head(h)


class ShapeBranchInPlace(ShapeBranch):
    """The same with `+=` on a view of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 2:
            raise ValueError("two channels, please")
        h = self.relu(self.conv(x))
        h[:, 1:] += 0.5
        kept = h
        h += 1
        return self.head(torch.relu_(h - 1.2) + kept)


class TwinNames(nn.Module):
    """Two modules whose dotted names differ only in what is a dot and what an underscore."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.act = nn.Module()
        self.act.one_two = nn.ReLU(inplace=True)
        self.act_one = nn.Module()
        self.act_one.two = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act_one.two(8 * self.fc2(self.act.one_two(8 * self.fc1(x)))))


class GatesArgument(TwoInputs):
    """An argument with the name that fxpath uses within its graphs."""

    def forward(self, left: Tensor, fxpath_gates: Tensor) -> Tensor:
        return super().forward(left, fxpath_gates)


class Activations(nn.Module):
    """Several smooth activations after each other."""

    def __init__(self, *kinds: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(4, 4) for _ in range(len(kinds) + 1))
        self.kinds = kinds
        self.acts = nn.ModuleList(kind for kind in kinds if isinstance(kind, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        for fc, kind in zip(self.fcs, self.kinds, strict=False):
            x = kind(fc(x))
        return self.fcs[-1](x)


class DataBranch(Head):
    """Branches on values: no graph equals it, unless the branch is in a leaf or fixed."""

    def __init__(self, *, fixed: bool = False) -> None:
        super().__init__(3)
        self.conv, self.fixed = nn.Conv2d(2, 3, 3), fixed

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        if self.fixed or h.sum() > 0:
            h = h * 2
        return self.head(h)


class Branching(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        if h.sum() > 0:
            return h * 2
        return h


class DataBranchInLeaf(Head):
    def __init__(self) -> None:
        super().__init__(3)
        self.conv, self.branching = nn.Conv2d(2, 3, 3), Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branching(F.relu(self.conv(x))))


class BranchTracer(fx.Tracer):
    """A user's own tracer: `Branching` is not looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Branching) or super().is_leaf_module(m, module_qualified_name)


class HardCodedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)).view(3, 4))


# --- the table ------------------------------------------------------------------------------------------------------


def image(batch: int) -> Tensor:
    return torch.randn(batch, 2, 5, 5, dtype=torch.float64)


def rows(width: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, width, dtype=torch.float64)


def tokens(batch: int) -> Tensor:
    return torch.randn(batch, 3, 4, dtype=torch.float64)


def two(batch: int) -> tuple[Tensor, Tensor]:
    return rows(3)(batch), rows(4)(batch)


def named(batch: int) -> dict[str, Tensor]:
    left, right = two(batch)
    return {"right": right, "left": left}


@dataclass(frozen=True, eq=False)
class Case:
    """A network, its inputs, and what tracing must find: the tracer, and name and shape of every site."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    sites: dict[str, tuple[int, ...]]
    tracer: str = "symbolic_trace"
    response: Response = logit
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """The network in float64 and evaluation mode, always with the same weights and running statistics."""
        with torch.random.fork_rng([]):
            torch.manual_seed(7)
            model = self.build().to(torch.float64).eval()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 2)
                    module.weight.data.uniform_(0.5, 1.5)
                    module.bias.data.normal_(0, 0.2)
        return model

    def x(self, batch: int = 3, seed: int = 0) -> Any:
        """Inputs, always the same for a seed; those of a smaller batch are the first of a larger one."""
        with torch.random.fork_rng([]):
            singles = []
            for number in range(batch):
                torch.manual_seed(1000 * seed + number)
                singles.append(Samples(self.inputs(1)))
        flat = [torch.cat(leaves) for leaves in zip(*(single.tensors for single in singles), strict=True)]
        waiting = iter(flat)
        return singles[0].map(lambda _: next(waiting)).inputs

    def trace(self, model: nn.Module | None = None, **changes: Any) -> fxpath.Network:
        """The network traced on three samples."""
        options = {"response": self.response, **self.options, **changes}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SmoothSitesWarning)
            return fxpath.trace(self.model() if model is None else model, self.x(), **options)


SMOOTH = {"sites": "activations"}


def case(
    build: Callable[[], nn.Module], inputs: Callable[[int], Any], *sites: tuple[str, Sequence[int]], **more: Any
) -> Case:
    name = more.pop("name", None) or getattr(build, "__name__", str(build))
    return Case(name, build, inputs, {site: tuple(shape) for site, shape in sites}, **more)


CASES: tuple[Case, ...] = (
    case(Plain, image, ("relu1", (3, 5, 5)), ("relu2", (3, 3, 3))),
    case(ReusedReLU, image, ("relu", (3, 3, 3)), ("relu_1", (3, 2, 2))),
    case(ReusedInPlaceReLU, image, ("relu", (3, 3, 3)), ("relu_1", (3, 2, 2))),
    case(InPlaceReadAgain, image, ("relu", (3, 5, 5)), ("relu_1", (3, 5, 5))),
    case(InPlaceReadBefore, image, ("relu", (3, 5, 5)), ("relu_1", (3, 5, 5))),
    case(Functional, image, ("relu", (3, 5, 5)), ("relu_1", (3, 5, 5)), ("relu_2", (27,))),
    case(ResidualIadd, image, ("relu", (3, 5, 5)), ("relu_1", (3, 5, 5))),
    case(ResidualOntoReLU, image, ("relu", (3, 5, 5)), ("relu_1", (3, 5, 5))),
    case(Alias, image, ("relu", (3, 3, 3))),
    case(AliasThroughDropout, image, ("relu", (3, 3, 3)), ("relu_1", (3, 3, 3))),
    case(Methods, image, ("clamp", (3, 3, 3)), ("relu", (3, 3, 3)), ("relu_1", (3, 2, 2)), ("threshold", (3, 2, 2))),
    case(OperatorForms, image, ("clamp", (3, 3, 3)), ("clamp_1", (3, 2, 2)), ("hardtanh", (3, 2, 2))),
    case(ViewSlice, image, ("relu", (2, 3, 3)), tracer="torch.export"),
    case(ChunkInPlace, image, ("relu", (2, 3, 3)), ("relu_1", (4, 3, 3)), tracer="torch.export"),
    case(SliceAssignment, image, ("relu", (3, 3, 3)), tracer="torch.export"),
    case(Concat, image, ("relu", (2, 5, 5)), ("relu_1", (2, 5, 5)), ("relu_2", (3, 5, 5))),
    case(SharedModule, image, ("first.1", (2, 5, 5)), ("first.1_1", (2, 5, 5))),
    case(TiedWeights, rows(4), ("relu", (5,))),
    case(Depthwise, image, ("relu", (4, 5, 5)), ("relu_1", (4, 2, 2)), ("relu_2", (4, 2, 2))),
    case(Dropouts, rows(4), ("relu", (6,))),
    case(TupleOutput, image, ("relu", (3, 3, 3)), response=Logit(output=0)),
    case(DictOutput, image, ("relu", (3, 3, 3)), response=Logit(output="logits")),
    case(ScalarOutput, image, ("relu", (3, 3, 3)), ("relu_1", ()), response=OutputFunction(lambda y: y)),
    case(TwoInputs, two, ("relu", (5,)), ("relu_1", (5,))),
    case(TwoInputs, named, ("relu", (5,)), ("relu_1", (5,)), name="DictInput"),
    case(NestedInput, lambda batch: (named(batch),), ("relu", (5,)), ("relu_1", (5,))),
    case(OptionalArgument, rows(3), ("relu", (6,))),
    case(OptionalArgument, lambda b: (rows(3)(b), rows(6)(b), True), ("relu", (6,)), name="OptionalGiven"),
    case(OptionalArgument, lambda b: {"x": rows(3)(b), "scale": 2.0}, ("relu", (6,)), name="OptionalByName"),
    case(PairArgument, rows(3), ("relu", (6,)), tracer="torch.export"),
    case(
        StarArguments, two, ("relu", (5,)), ("relu_1", (5,)), name="StarArguments",
        tracer="torch.export",
    ),
    case(SizeReshape, image, ("relu", (3, 3, 3)), ("relu_1", (12,))),
    case(InPlaceOnInput, image, ("relu", (2, 5, 5)), ("relu_1", (3, 3, 3))),
    case(
        CustomLeaf, image, ("act", (3, 3, 3)), ("relu", (3, 3, 3)),
        options={"leaves": (SquaredReLU,), "sites": ["rectifiers", SquaredReLU]},
    ),
    case(NeverCalled, image, ("relu1", (3, 5, 5)), ("relu2", (3, 3, 3))),
    case(BatchFolded, tokens, ("relu", (3, 5)), ("relu_1", (3, 3))),
    case(MLP, rows(4), ("1", (7,)), ("3", (5,))),
    case(Conv1d, lambda b: torch.randn(b, 2, 6, dtype=torch.float64), ("body.2", (3, 4))),
    case(Unused, image, ("relu", (2, 3, 3)), ("relu_1", (2, 3, 3)), ("relu_2", (3, 3, 3))),
    case(Break, image, ("relu", (3, 5, 5)), ("relu_1", (3, 3, 3)), ("relu_2", (3, 3, 3))),
    case(OverlappingPool, image, ("relu", (3, 5, 5)), ("relu_1", (3, 2, 2))),
    case(SqueezeExcitation, image, ("relu", (4, 3, 3)), ("relu_1", (2, 1, 1)), ("relu_2", (4, 3, 3))),
    case(Norms, tokens, ("relu", (3, 6))),
    case(Transformer, tokens, ("encoder.relu", (3, 6))),
    case(ShapeBranch, image, ("relu", (3, 3, 3)), ("relu_1", (3, 3, 3)), ("relu_2", (3, 3, 3)), tracer="torch.export"),
    case(ShapeBranchInPlace, image, ("relu", (3, 3, 3)), ("relu_1", (3, 3, 3)), tracer="torch.export"),
    case(TwinNames, rows(4), ("act.one_two", (5,)), ("act_one.two", (5,))),
    case(GatesArgument, two, ("relu", (5,)), ("relu_1", (5,))),
    case(
        lambda: Activations(nn.ReLU6(), nn.Hardtanh(0, 1), lambda h: h.clamp(min=0), nn.Threshold(0, 0), F.relu6),
        rows(4), ("acts.0", (4,)), ("acts.1", (4,)), ("clamp", (4,)), ("acts.2", (4,)), ("relu6", (4,)),
        name="Rectifiers",
    ),
    case(
        lambda: Activations(nn.LeakyReLU(0.1, inplace=True), F.leaky_relu, nn.PReLU(), nn.ELU(inplace=True)),
        rows(4), ("acts.0", (4,)), ("leaky_relu", (4,)), ("acts.1", (4,)), ("acts.2", (4,)),
        name="Leaky", options=SMOOTH,
    ),
    case(
        lambda: Activations(nn.GELU(), F.silu, nn.Hardswish(), torch.tanh, lambda h: h.sigmoid()),
        rows(4), ("acts.0", (4,)), ("silu", (4,)), ("acts.1", (4,)), ("tanh", (4,)), ("sigmoid", (4,)),
        name="Smooth", options=SMOOTH,
    ),
)  # fmt: skip

BY_NAME = {found.name: found for found in CASES}


@cache
def traced(name: str, granularity: str = "unit") -> fxpath.Network:
    """The network of a case, made once; networks keep no state between calls, so tests may share it."""
    return BY_NAME[name].trace(granularity=granularity)


def trace_any(model: nn.Module, x: Any, **options: Any) -> fxpath.Network:
    """`fxpath.trace` of all activations unless told otherwise, without its warning that some are smooth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmoothSitesWarning)
        return fxpath.trace(model, x, **{"sites": "activations", **options})
