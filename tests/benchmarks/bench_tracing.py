"""Time and memory of tracing and gating alone. `pytest tests/benchmarks/bench_tracing.py --benchmark-only`.

The aim: without the check of equality at most 1 s for every torchvision network that `symbolic_trace` can read, and at
most 1.2 times the network's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import fxpath
from fxpath.errors import SmoothSitesWarning

KINDS = {"images": models, "maps": models.segmentation, "clips": models.video}
NAMES = {name: kind for kind, module in KINDS.items() for name in models.list_models(module=module)}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network with weights of no meaning, as no value is read, and two inputs of its own size."""
    more: dict[str, Any] = {"weights_backbone": None} if NAMES[name] == "maps" else {}
    if name in ("googlenet", "inception_v3"):
        more["init_weights"] = False
    preset = models.get_model_weights(name).DEFAULT.transforms()
    size = list(getattr(preset, "crop_size", None) or preset.resize_size)
    if name.startswith("vit_"):
        more["image_size"] = size[0]
    model: nn.Module
    try:
        with torch.device("meta"):
            model = models.get_model(name, weights=None, **more)
    except NotImplementedError:  # RegNets read values while they are built
        model = models.get_model(name, weights=None, **more)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(1)  # else the system has not handed out their memory yet
    sides = size * 2 if len(size) == 1 else size
    return model.eval(), torch.zeros(2, 3, *([16, *sides] if NAMES[name] == "clips" else sides))


def trace(model: nn.Module, x: Tensor) -> fxpath.Network:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmoothSitesWarning)
        return fxpath.trace(model, x, sites="activations", check=False)


@pytest.mark.parametrize("name", NAMES)
def test_tracing(name: str, benchmark: Any) -> None:
    """Tracing and gating of one network; `extra_info` says by which tracer and how many nodes and sites."""
    model, x = build(name)
    trace(*build("alexnet"))  # what torch imports when it first runs without data
    network = benchmark.pedantic(trace, args=(model, x), rounds=3)
    benchmark.extra_info |= {
        "tracer": network.traced.tracer,
        "nodes": len(network._module.graph.nodes),
        "sites": len(network.sites),
        "neurons": network.index.size,
    }


PEAK = """
import json, sys, threading, time
import psutil
import bench_tracing as bench
bench.trace(*bench.build("alexnet"))
model, x = bench.build(sys.argv[1])
own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
process, most, done = psutil.Process(), 0, False
def watch():
    global most
    while not done:
        most = max(most, process.memory_info().rss)
        time.sleep(0.002)
before = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
network = bench.trace(model, x)
done = True
thread.join()
print(json.dumps({"own": own, "added": max(0, most - before)}))
"""


LARGE = ("resnet50", "vgg16", "efficientnet_v2_l", "densenet201", "regnet_y_32gf", "vit_l_16", "s3d", "mvit_v1_b")


@pytest.mark.parametrize("name", LARGE)
def test_memory(name: str, benchmark: Any) -> None:
    """The model's memory and what tracing adds at its peak, over the model's, in a process of its own."""

    def measure() -> float:
        said = subprocess.run(
            [sys.executable, "-c", PEAK, name], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
        found = json.loads(said.stdout.splitlines()[-1])
        return (found["own"] + found["added"]) / found["own"]

    benchmark.extra_info["memory"] = benchmark.pedantic(measure, rounds=1)
