"""NeuronIntGrad's time and memory. `pytest tests/benchmarks/bench_*.py --benchmark-only`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fxpath
from fxpath.images import load_images
from fxpath.memory import kept_memory
from fxpath.zoo import load_model

THREADS = 2
STEPS = 50


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with kept_memory():  # as in a job: else either side asks the system for its memory anew, as the heap happens to lie
        yield
    torch.set_num_threads(before)


def photos(count: int) -> tuple[nn.Module, Tensor]:
    """SqueezeNet 1.1 with its weights, and real photos for it, 227²."""
    loaded = load_model("zoo:squeezenet1_1")
    data = load_images("foolbox:imagenet", loaded.preprocess, classes=loaded.classes, limit=count)
    return loaded.model, torch.stack([data[row][0] for row in range(count)])


def ours(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """The scores of all 26 sites."""
    network = fxpath.trace(model, x)
    target = model(x).argmax(dim=1)
    return lambda: fxpath.NeuronIntGrad(steps=STEPS).scores(network, x, target)


def captums(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """captum's attributions of the same 26 layers, one after another, with as many rows at once."""
    target = model(x).argmax(dim=1)
    layers = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    for layer in layers:
        layer.inplace = False  # captum's hooks would see overwritten activations otherwise

    def attribute() -> None:
        for layer in layers:
            LayerIntegratedGradients(model, layer).attribute(x, target=target, n_steps=STEPS, internal_batch_size=16)

    return attribute


def test_neuron_intgrad_against_captum(ratio: Callable[..., float]) -> None:
    """SqueezeNet, batch 2, all 26 sites, 50 steps, 2 threads ÷ captum's LayerIntegratedGradients, layer by layer."""
    model, x = photos(2)
    mine = ours(model, x)
    other, _ = photos(2)
    ratio(mine, captums(other, x), rounds=3, what="captum LayerIntegratedGradients")


PEAK = """
import json, sys, threading, time
import psutil, torch
import bench_integrated as bench
from fxpath.memory import kept_memory

torch.set_num_threads(bench.THREADS)
which = sys.argv[1]
if which == "vgg16":
    run = bench.on_vgg16()
else:
    run = getattr(bench, which)(*bench.photos(2))
process, seen, over = psutil.Process(), [], threading.Event()

def watch():
    while not over.wait(0.005):
        seen.append(process.memory_info().rss)

thread = threading.Thread(target=watch)
before = process.memory_info().rss
with kept_memory():
    thread.start()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
over.set()
thread.join()
print(json.dumps({"before": before, "peak": max(seen), "seconds": seconds}))
"""


def peak(which: str) -> dict[str, float]:
    """Memory in use before a run and at its peak, in MiB, and its seconds; in a process of its own."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)])}
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, which], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, float] = json.loads(ended.stdout)
    return {name: value if name == "seconds" else value / 2**20 for name, value in found.items()}


def test_peak_memory_against_captum(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run adds to the memory in use, NeuronIntGrad ÷ captum's; the process as a whole beside it."""
    found: dict[str, dict[str, float]] = {}

    def measure() -> None:
        found.update(ours=peak("ours"), captums=peak("captums"))

    benchmark.pedantic(measure, rounds=1)
    added = {name: each["peak"] - each["before"] for name, each in found.items()}
    share, whole = added["ours"] / added["captums"], found["ours"]["peak"] / found["captums"]["peak"]
    benchmark.extra_info.update(
        ratio_of_added=round(share, 3), ratio_of_peaks=round(whole, 3), added={k: round(v) for k, v in added.items()}
    )
    with capsys.disabled():
        sys.stdout.write(
            f"\n{benchmark.name}: {added['ours']:.0f} MiB added, {share:.3f} × captum's {added['captums']:.0f} MiB; "
            f"whole processes {found['ours']['peak']:.0f} MiB, {whole:.3f} × {found['captums']['peak']:.0f} MiB\n"
        )


class Flops(TorchDispatchMode):
    """Counts floating-point operations of all that runs; FlopCounterMode's hooks on modules do not allow
    `autograd.grad` of a part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (counted := flop_registry.get(func._overloadpacket)) is not None:
            self.total += counted(*args, **(kwargs or {}), out_val=result)
        return result


def product_gflops(size: int = 2048, rounds: int = 5) -> float:
    """GFLOP/s of a float32 matrix product, the fastest of a few."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    torch.mm(a, b)
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        spent.append(time.perf_counter() - start)
    return 2 * size**3 / min(spent) / 1e9


def test_achieved_gflops(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Multiply-adds of all runs, forward and backward, counted twice each, a second ÷ a matrix product's.

    What is counted is what is run: values that are not computed at every step do not count. The share may exceed 1,
    as convolutions and matrix products come from different libraries, and may be computed in fewer operations.
    """
    model, x = photos(2)
    run = ours(model, x)
    run()
    with Flops() as counter:
        run()
    before = product_gflops()
    benchmark.pedantic(run, rounds=3)
    reference = max(before, product_gflops())
    achieved = counter.total / benchmark.stats.stats.min / 1e9
    benchmark.extra_info.update(gflops=round(achieved, 1), matrix_product=round(reference, 1))
    with capsys.disabled():
        sys.stdout.write(
            f"\n{benchmark.name}: {counter.total / 1e9:.0f} GFLOP at {achieved:.1f} GFLOP/s, "
            f"{achieved / reference:.3f} × a matrix product's {reference:.1f}\n"
        )


def on_vgg16() -> Callable[[], object]:
    """The scores of all 15 sites of VGG-16 at 224², batch 1, random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.vgg16(weights=None)
    model = model.to_empty(device="cpu").eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
            nn.init.zeros_(module.bias)
    x = torch.rand(1, 3, 224, 224)
    network = fxpath.trace(model, x)
    return lambda: fxpath.NeuronIntGrad(steps=STEPS).scores(network, x)


def test_vgg16(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """All 15 sites, 50 steps, batch 1: seconds and peak memory, in a process of its own."""
    found: dict[str, float] = {}
    benchmark.pedantic(lambda: found.update(peak("vgg16")), rounds=1)
    benchmark.extra_info.update({name: round(value, 1) for name, value in found.items()})
    with capsys.disabled():
        sys.stdout.write(
            f"\n{benchmark.name}: {found['seconds']:.1f} s, peak {found['peak']:.0f} MiB, of which "
            f"{found['peak'] - found['before']:.0f} MiB added by the run\n"
        )
