"""The command line: people read stderr, machines read stdout, and what one can mend is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from commands import Said, typed
from small_jobs import by_sample, cifar, seven

import fxpath
from fxpath import cli
from fxpath.cli import main, numbers, spread

ROOT = Path(__file__).parents[1]
SMALL = ("small_jobs:build", "small_jobs:seven")
CHOSEN = ("--selector", "neuron_mct", "--selector", "random", "--sparsity", "0.9")
QUICK = ("--micro-batch", "4", "--threads", "1", "--quiet")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    return lambda *arguments: typed(capsys, *arguments)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of seven pictures."""
    path = tmp_path_factory.mktemp("stored") / "run.h5"
    with pytest.raises(SystemExit) as ended:
        main(["compute", *SMALL, "-o", str(path), *CHOSEN, *QUICK])
    assert ended.value.code in (0, None)
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(found.relative_to(folder)) for found in folder.rglob("*"))


def shell(*arguments: str, folder: Path, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *path]))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fxpath", *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False, cwd=folder,
    )  # fmt: skip


# --- in processes of their own ---


def test_help_is_quick_and_does_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys, time; start = time.perf_counter()\n"
        "from fxpath.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "seconds = time.perf_counter() - start\n"
        "print(code, seconds, [name for name in ('torch', 'numpy', 'h5py', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    code, seconds, loaded = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert (code, loaded) == ("0", "[]")
    assert float(seconds) < 1.5
    for name in ("sites", "compute", "attribute", "info", "merge", "analyze", "demo"):
        assert name in done.stdout


def test_modules_of_the_working_directory(tmp_path: Path) -> None:
    """`package.module:callable` for model and data set, as a user's own files next to him; they may print."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "print('hello from the network')\n"
        "def tiny():\n"
        "    print('making it')\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 9, 9), nn.ReLU(), nn.Flatten(), nn.Linear(2304, 5))\n"
    )
    (tmp_path / "mine" / "data.py").write_text(
        "import torch\n"
        "class Noise:\n"
        "    ids = ['a', 'b', 'c']\n"
        "    def __len__(self): return 3\n"
        "    def __getitem__(self, i):\n"
        "        print('reading', i)\n"
        "        return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(i)), i\n"
    )
    done = shell("compute", "mine.nets:tiny", "mine.data:Noise", "-o", "out.h5", "--json", "--threads", "1",
                 folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["computed"] == 3
    assert "reading 2" in done.stderr
    with fxpath.open_store(tmp_path / "out.h5") as store:
        assert store.ids.tolist() == ["a", "b", "c"]
        assert store.header.model == "mine.nets:tiny"
        assert store.index.size == 2304
    done = shell("info", "out.h5", "--json", folder=tmp_path)
    assert json.loads(done.stdout)["samples"] == 3
    assert done.stderr == ""
    done = shell("compute", "mine.nets:tine", "mine.data:Noise", "-o", "other.h5", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("fxpath: model 'mine.nets:tine': there is no name in mine.nets")
    assert "nearest: tiny" in done.stderr
    assert "Traceback" not in done.stderr


# --- sites ---


def test_sites(run: Callable[..., Said], tmp_path: Path) -> None:
    said = run("sites", "small_jobs:build")
    assert (said.code, said.out) == (0, "")
    lines = said.err.splitlines()
    assert lines[0].split() == ["#", "site", "op", "shape", "neurons", "from"]
    assert lines[2].split() == ["1", "relu_1", "relu", "6", "×", "32", "×", "32", "6,144", "6,144"]
    assert lines[-1] == "small_jobs:build: 5 sites, 12,899 neurons, traced by symbolic_trace, input 3 × 32 × 32"
    data = json.loads(run("sites", "small_jobs:build", "--json").out)
    assert (data["neurons"], len(data["sites"]), data["sites"][3]["shape"]) == (12_899, 5, [3, 5, 5])
    assert [-1, 0] in data["edges"]
    data = json.loads(run("sites", "small_jobs:build", "--json", "--granularity", "channel", "--sites", "head*").out)
    assert (data["neurons"], data["granularity"]) == (24, "channel")
    data = json.loads(run("sites", "small_jobs:build", "--json", "--response", "neuron:site=relu_2,channel=1").out)
    assert [site["name"] for site in data["sites"]] == ["relu", "relu_1"]  # those that lead to the neuron
    assert files(tmp_path) == []


def test_sites_of_a_torchvision_network_without_weights(run: Callable[..., Said]) -> None:
    data = json.loads(run("sites", "torchvision:resnet18", "--json").out)
    assert len(data["sites"]) == 17


def test_sites_as_a_tree_and_as_a_picture(run: Callable[..., Said], tmp_path: Path) -> None:
    said = run("sites", "small_jobs:build", "--tree", "--json", "--granularity", "channel", "--dot", "graph.dot")
    lines = said.err.splitlines()
    assert said.code == 0
    assert lines[0].split() == ["#", "site", "op", "shape", "neurons", "sites"]
    assert lines[1].split() == ["small_jobs:build", "47", "5"]
    assert ["0", "├─", "relu", "relu", "[6]", "×", "32", "×", "32", "6"] in [line.split() for line in lines]
    assert lines[-2].startswith("small_jobs:build: 5 sites, 47 neurons, traced by symbolic_trace")
    data = json.loads(said.out)
    assert lines[-1] == f"graph.dot: the site graph, {len(data['edges'])} edges"
    assert (tmp_path / "graph.dot").read_text().count(" -> ") == len(data["edges"])
    said = run("sites", "small_jobs:build", "--sites", "head*", "--dot", "graph.svg")
    assert (said.code, said.out) == (0, "")
    assert files(tmp_path) == ["graph.dot", "graph.svg"]


# --- compute ---


def test_compute(run: Callable[..., Said], tmp_path: Path) -> None:
    said = run("compute", *SMALL, "-o", "run.h5", "--selector", "neuron_mct", "--selector", "random:seed=3",
               "--sparsity", "0.8", "0.9", "0.99", *QUICK)  # fmt: skip
    assert (said.code, said.out) == (0, "")
    assert said.err.startswith("run.h5: 7 of 7 samples (7 worked through now, 0 were there) in ")
    assert files(tmp_path) == ["run.h5"]
    with fxpath.open_store("run.h5") as store:
        assert store.keys == tuple(f"{name}@{s}" for name in ("neuron_mct", "random:seed=3") for s in (0.8, 0.9, 0.99))
        assert store.classes[3] == "cat"
        assert store.header.model == "small_jobs:build"
        assert (store.header.micro_batch, store.header.threads) == (4, 1)
    again = run("compute", *SMALL, "-o", "run.h5", "--selector", "neuron_mct", "--selector", "random:seed=3", "--json")
    assert (again.code, json.loads(again.out)["computed"], json.loads(again.out)["reused"]) == (0, 0, 7)


def test_options_of_compute(run: Callable[..., Said], tmp_path: Path) -> None:
    said = run("compute", *SMALL, "-o", "run.h5", "--selector", "magnitude", "--sparsity", "0.5", "--target", "labels",
               "--response", "margin", "--sites", "relu*", "--granularity", "channel", "--scores", "float16",
               "--thumbnails", "8", "--limit", "5", "--device", "cpu", "--json", *QUICK)  # fmt: skip
    assert said.code == 0
    report = json.loads(said.out)
    assert report | {"seconds": 0} == {
        "path": "run.h5", "samples": 5, "computed": 5, "reused": 0, "failed": {}, "seconds": 0,
    }  # fmt: skip
    with fxpath.open_store(tmp_path / "run.h5") as store:
        assert store.ids.tolist() == list(cifar().ids[:5])
        assert (store.header.target, store.header.response) == ("labels", "margin")
        assert store.samples()["target"].tolist() == list(cifar().labels[:5])
        assert (store.index.size, store.index.granularity, len(store.index)) == (23, "channel", 4)
        assert store.score_families == ("magnitude",)
        assert store.thumbnail(0) is not None


def test_a_place_and_a_hidden_neuron(run: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "maps.py").write_text(
        "import torch\nfrom torch import nn\nfrom torchvision.models import segmentation\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    options = {'weights': None, 'weights_backbone': None, 'num_classes': 10}\n"
        "    model = segmentation.lraspp_mobilenet_v3_large(**options).eval()\n"
        "    from small_jobs import FRAME, CIFAR\n"
        "    from fxpath.zoo import LoadedModel\n"
        "    return LoadedModel('maps', model, FRAME, FRAME.json(), (3, 32, 32), CIFAR)\n"
    )
    for response in ("pixel:row=1,column=2,output=out", "region:box=0/0/8/8,of=probability",
                     "neuron:site=backbone.2.block.0.2,channel=3"):  # fmt: skip
        job = ("compute", "maps:net", "small_jobs:seven", "-o", "run.h5", "--selector", "neuron_mct", *QUICK)
        said = run(*job, "--response", response)
        assert said.code == 0, said.err
        with fxpath.open_store("run.h5") as store:
            assert store.header.response == response
            assert (store.column("neuron_mct@0.9", "density") > 0.05).all()
        again = run(
            *job, "--response", response.replace("column=2", "column=3").replace("8/8", "8/9").replace("=3", "=4")
        )
        assert again.code == 2
        assert "holds the results of another job" in again.err
        Path("run.h5").unlink()


def test_a_folder_with_a_label_file_and_a_broken_picture(run: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number, file in enumerate(cifar().files[:5]):
        shutil.copy(file, tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "2.png").write_bytes(b"no picture")
    rows = "".join(f"{number}.png,{name}\n" for number, name in enumerate(["cat", "ship", "ship", "0", "frog"]))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    given = ("small_jobs:build", "pictures", "--labels", "labels.csv", "--selector", "active", *QUICK)
    said = run("compute", *given, "-o", "run.h5", "--target", "labels")
    assert said.code == 0
    assert said.err.splitlines()[0].startswith("not computed: 2.png: image pictures/2.png: cannot be read")
    assert said.err.splitlines()[-1].startswith("run.h5: 4 of 5 samples (5 worked through now, 0 were there)")
    with fxpath.open_store("run.h5") as store:
        assert store.samples()["label"].tolist()[:2] == [3, 8]
        assert store.ids.tolist() == [f"{number}.png" for number in range(5)]
    info = run("info", "run.h5")
    assert "  not computed: 2.png: image pictures/2.png" in info.err
    strict = run("compute", *given, "-o", "strict.h5", "--strict")
    assert strict.code == 2
    assert strict.err.startswith("fxpath: compute: sample '2.png' cannot be used: image pictures/2.png: cannot be read")
    assert "Traceback" not in strict.err
    for number in (0, 1, 3, 4):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(b"no picture")
    nothing = run("compute", *given, "-o", "nothing.h5")
    assert nothing.code == 2
    assert nothing.err.splitlines()[-1].startswith("nothing.h5: 0 of 5 samples")


def test_a_dry_run_writes_nothing(run: Callable[..., Said], tmp_path: Path) -> None:
    given = ("compute", *SMALL, "--selector", "neuron_mct", "--selector", "magnitude", *QUICK)
    said = run(*given, "-o", "new/run.h5", "--dry-run", "--json")
    assert said.code == 0
    assert files(tmp_path) == []
    plan = json.loads(said.out)
    assert (plan["neurons"], plan["sites"], plan["samples"], plan["left"]) == (12_899, 5, 7, 7)
    assert len(plan["keys"]) == 6
    assert said.err.startswith("7 samples (7 left) × 6 pathways of 12,899 neurons at 5 sites: about 0.")
    assert said.err.endswith("Nothing was written.\n")
    assert run(*given, "-o", "run.h5").code == 0
    assert 0.7 < plan["bytes"] / (tmp_path / "run.h5").stat().st_size < 1.3


def test_warnings_are_one_line(run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["small_jobs"], "placed", placed, raising=False)
    said = run("compute", "small_jobs:placed", "small_jobs:seven", "-o", "run.h5", "--selector", "active", *QUICK)
    assert said.code == 0
    assert said.err.splitlines()[0].startswith("fxpath: note: compute: in a micro-batch of 4 with 1 threads a sample's")
    assert len(said.err.splitlines()) == 2


def placed() -> Any:
    from dataclasses import replace

    from small_jobs import Placed, build, module

    return replace(build(), model=module(Placed))


# --- everything that can be wrong ---


def wrong(*arguments: str) -> tuple[str, ...]:
    """A small job with arguments that do not fit; later ones take the place of earlier ones."""
    return ("compute", *SMALL, "-o", "run.h5", *QUICK, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sites", "zoo:squeezenet"), "there is no zoo network 'squeezenet'; nearest: squeezenet1_1"),
        (("sites", "torchvision:resnet19"), "there is no torchvision network 'resnet19'; nearest: resnet1"),
        (("sites", "squeezenet1_1"), "expected zoo:NAME, torchvision:NAME"),
        (("sites", "no_such_module:net"), "there is no module or prefix 'no_such_module'"),
        (("sites", "small_jobs:CIFAR"), "expected an nn.Module"),
        (("sites", "small_jobs:build", "--sites", "relo"), "nearest: relu"),
        (("sites", "small_jobs:build", "--granularity", "pixel"), "--granularity: expected unit or channel"),
        (("sites", "small_jobs:build", "--weights", "absent.pth"), "absent.pth: expected a .pt, .pth or .safetensors"),
        (("sites", "small_jobs:build", "--dot", "graph.jpg"), "expected a name that ends in .dot or .gv (Graphviz) or"),
        (("sites", "no_such:net", "--dot", "absent/graph.svg"), "there is no folder absent to write graph.svg to"),
        (wrong("--selector", "neuron_mtc"), "there is no selector 'neuron_mtc'; nearest: neuron_mct"),
        (wrong("--selector", "random:sed=1"), "there is no parameter 'sed'; nearest: seed"),
        (wrong("--selector", "random:seed=x"), "expected seed to be int, found 'x'"),
        (wrong("--selector", "active", "--selector", "active"), "active is asked for twice"),
        (wrong("--sparsity", "1"), "expected a share in [0, 1), found 1"),
        (wrong("--sparsity", "0.9", "90"), "expected a share in [0, 1), found 90"),
        (wrong("--sparsity=-0.5"), "expected a share in [0, 1), found -0.5"),
        (wrong("--sparsity", "nan"), "found nan"),
        (wrong("--sparsity", "most"), "expected a number in [0, 1), found 'most'"),
        (wrong("--sparsity", "0.99999999999999999999"), "expected a share in [0, 1), found 1.0"),
        (wrong("--target", "best"), "expected 'labels', 'predicted' or a class number, found 'best'"),
        (wrong("--target", "10"), "expected a class in 0 … 9, found 10"),
        (wrong("--target=-2"), "expected 'labels', 'predicted' or a class number, found '-2'"),
        (wrong("--response", "logits"), "there is no response 'logits'; nearest: logit"),
        (wrong("--response", "pixel:rwo=1,column=2"), "there is no parameter 'rwo'; nearest: row"),
        (wrong("--response", "pixel:row=1,column=2"), "pixel: expected (B, classes, H, W), found (2, 10)"),
        (wrong("--response", "logit:output=out"), "there is no part 'out' in the network's output, (2, 10) float32"),
        (wrong("--response", "neuron:site=relo_2,at=0/0/0"), "there is no node 'relo_2'; nearest: relu_2"),
        (wrong("--response", "neuron:site=relu_2,at=0/0/99"), "expected coordinates within (8, 8, 8) of relu_2"),
        (wrong("--response", "neuron:site=relu_2,channel=0", "--target", "3"), "this response knows no classes"),
        (wrong("--sites", "nothing.*"), "nothing.*"),
        (wrong("--granularity", "layer"), "expected unit or channel"),
        (wrong("--micro-batch", "0"), "micro_batch: expected a whole number of at least 1, found 0"),
        (wrong("--threads", "0"), "threads: expected a whole number of at least 1, found 0"),
        (wrong("--scores", "float8"), "scores: expected 'float16' or 'float32', found 'float8'"),
        (wrong("--thumbnails", "-1"), "thumbnails: expected 0 … 4096 pixels, found -1"),
        (wrong("--limit", "0"), "expected a limit of 1 or more, found 0"),
        (wrong("--device", "abacus"), "--device: 'abacus' cannot be used"),
        (wrong("--labels", "absent.csv"), "a label file goes with a folder"),
        (("compute", "small_jobs:build", "absent", "-o", "run.h5"), "expected a folder of pictures, found nothing"),
        (("compute", "small_jobs:build", "empty", "-o", "run.h5"), "no pictures found"),
        (("compute", "small_jobs:build", "foolbox:imagenet21k", "-o", "run.h5"), "nearest: imagenet"),
        (("compute", "small_jobs:build", "small_jobs:inputs_", "-o", "run.h5"), "nearest: inputs"),
        (("compute", "small_jobs:build", "small_jobs:CIFAR", "-o", "run.h5"), "found str"),
        (("compute", "small_jobs:build", "small_jobs:nothing", "-o", "run.h5"), "is empty"),
        (("compute", *SMALL, "-o", "empty"), "empty is a folder; give a file name such as empty/run.h5"),
        (("compute", *SMALL, "-o", ""), "is a folder; give a file name such as run.h5"),
        (("compute", *SMALL, "-o", "a file/run.h5", *QUICK), "cannot be"),
        (("compute", *SMALL, "-o", "/proc/run.h5", *QUICK), "/proc/run.h5.parts cannot be written"),
        (("compute", *SMALL, "-o", "a file", *QUICK), "cannot open it as a store"),
        (("info", "absent.h5"), "absent.h5: there is no such file"),
        (("info", "a file"), "cannot open it as a store"),
        (("info", "empty"), "empty"),
        (("merge", "absent.h5"), "absent.h5.parts: expected the parts of a job with a job.json, found none"),
        (("merge", "empty"), "empty is a folder"),
        (("analyze", "absent.h5"), "absent.h5: there is no such file"),
        (("analyze", "a file"), "cannot open it as a store"),
        (("demo", "--quick", "-o", "a file"), "cannot be"),
    ],
)  # fmt: skip
def test_one_line_and_exit_code_two(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(sys.modules["small_jobs"], "nothing", list, raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("text")
    found = run(*arguments)
    assert found.code == 2
    assert found.out == ""
    assert len(found.err.splitlines()) == 1, found.err
    assert found.err.startswith("fxpath: ")
    assert said in found.err
    assert files(tmp_path) == ["a file", "empty"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compute", *SMALL), "missing option '--output'"),
        (("compute", "-o", "run.h5"), "missing argument 'model'"),
        (
            ("compute", *SMALL, "-o", "run.h5", "--micro-batch", "four"),
            "invalid value for '--micro-batch': ",
        ),
        (("compute", *SMALL, "-o", "run.h5", "--sparsities", "0.9"), "no such option: --sparsities"),
        (("compute", *SMALL, "-o", "run.h5", "--sparsity"), "requires an argument"),
        (("komputer",), "no such command 'komputer'"),
        (("analyze",), "missing argument 'store"),
    ],
)
def test_usage(run: Callable[..., Said], tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    found = run(*arguments)
    assert (found.code, found.out) == (2, "")
    assert said in " ".join(found.err.replace("│", " ").split()).lower()
    assert "Traceback" not in found.err
    assert files(tmp_path) == []


def test_labels_and_shapes_that_do_not_fit(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["small_jobs"], "beyond", lambda: [(torch.zeros(3, 32, 32), 10)], raising=False)
    monkeypatch.setattr(sys.modules["small_jobs"], "narrow", lambda: [torch.zeros(3, 32, 31)] * 3, raising=False)
    for name, said in (
        ("beyond", "fxpath: compute: sample '0' has the label 10; the classes are 0 … 9. Look at the label file"),
        (
            "narrow",
            "fxpath: compute: sample '0' does not fit the network: expected an input of shape (3, 32, 32), found",
        ),
    ):
        found = run("compute", "small_jobs:build", f"small_jobs:{name}", "-o", "run.h5", *QUICK)
        assert (found.code, found.err.startswith(said)) == (2, True)
        assert len(found.err.splitlines()) == 1
    (tmp_path / "pictures").mkdir()
    shutil.copy(cifar().files[0], tmp_path / "pictures" / "a.png")
    for content, said in (
        ("a.png,horsefly\n", "labels labels.csv, line 1 (a.png): there is no class 'horsefly'; nearest: horse"),
        ("a.png,12\n", "labels labels.csv, line 1 (a.png): expected a label in 0 … 9, found 12"),
        ("b.png,1\n", "labels labels.csv, line 1: there is no image 'b.png'"),
        ("", "labels labels.csv: 1 of 1 images have no label"),
    ):
        (tmp_path / "labels.csv").write_text(content)
        found = run("compute", "small_jobs:build", "pictures", "--labels", "labels.csv", "-o", "run.h5", *QUICK)
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert said in found.err
    found = run("compute", "small_jobs:build", "pictures", "--target", "labels", "-o", "run.h5", *QUICK)
    assert found.code == 2
    assert "explain labels, and there are none: pictures lie at the top of pictures" in found.err
    assert files(tmp_path) == ["labels.csv", "pictures", "pictures/a.png"]


def test_a_store_of_another_job_or_version(run: Callable[..., Said], stored: Path, tmp_path: Path) -> None:
    import h5py

    path = shutil.copy(stored, tmp_path / "run.h5")
    found = run("compute", "zoo:squeezenet1_1", "foolbox:imagenet", "-o", path, "--limit", "2", "--quiet")
    assert found.code == 2
    assert 'model: there "small_jobs:build", here "zoo:squeezenet1_1"' in found.err
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 7
    for arguments in (("info", path), ("analyze", path), ("compute", *SMALL, "-o", path)):
        found = run(*arguments)
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert "expected schema 'fxpath' version 1, found 'fxpath' version 7; update fxpath" in found.err
    path.write_bytes(stored.read_bytes()[:-2000])
    for arguments in (("info", path), ("analyze", path), ("compute", *SMALL, "-o", path)):
        found = run(*arguments)
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert "truncated" in found.err
    assert files(tmp_path) == ["run.h5"]


# --- info, merge, analyze ---


def test_info(run: Callable[..., Said], stored: Path) -> None:
    data = json.loads(run("info", stored, "--json").out)
    assert data["bytes"] == stored.stat().st_size
    assert {name: data[name] for name in ("model", "samples", "failed", "sites", "neurons", "complete", "threads")} == {
        "model": "small_jobs:build", "samples": 7, "failed": 0, "sites": 5, "neurons": 12_899, "complete": True,
        "threads": 1,
    }  # fmt: skip
    assert data["pathways"] == ["neuron_mct@0.9", "random@0.9"]
    said = run("info", stored)
    assert (said.code, said.out) == (0, "")
    assert "       neurons  12,899\n" in said.err
    assert "      pathways  neuron_mct@0.9, random@0.9\n" in said.err
    assert data["maps"] == []


def test_merge(run: Callable[..., Said], stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpath import batch

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    given = ("compute", *SMALL, "-o", "run.h5", *CHOSEN, *QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(batch, "merge_stores", stop)
        said = run(*given)
    assert said.code == 130
    assert said.err == "stopped; 2 finished micro-batches are kept in run.h5.parts. The same command goes on there.\n"
    with monkeypatch.context() as patched:
        patched.setattr(batch, "compute_rows", stop)
        assert run("compute", *SMALL, "-o", "new.h5", *QUICK).err == (
            "stopped before the first micro-batch was finished; nothing is kept.\n"
        )
        assert run("merge", "run.h5").code == 0  # no network, no data set
    assert by_sample(tmp_path / "run.h5") == by_sample(stored)
    assert files(tmp_path) == ["run.h5"]
    said = run("merge", "run.h5")
    assert (said.code, said.err) == (0, "run.h5 is complete\n")
    assert run(*given).err.startswith("run.h5: 7 of 7 samples (0 worked through now, 7 were there)")


def test_analyze(run: Callable[..., Said], stored: Path, tmp_path: Path) -> None:
    second = shutil.copy(stored, tmp_path / "second.h5")
    said = run("analyze", stored, second, "-o", "out", "--json", "--quiet")
    assert said.code == 0, said.err
    rows = json.loads(said.out)
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert [(row["store"], row["key"]) for row in rows] == list(zip(table["store"], table["key"], strict=True))
    assert table["store"].tolist() == ["run", "run", "second", "second"]
    contribution = table["key"] == "neuron_mct@0.9"
    assert (table.loc[contribution, "dead_share"] == 0).all()
    assert (table.loc[~contribution, "dead_share"] > 0.4).all()
    assert {"summary.csv", "dead_neurons.csv", "overlap.csv", "fig1_dead_share.png"} <= set(files(tmp_path / "out"))
    assert np.allclose([row["density"] for row in rows], table["density"])
    assert said.err.splitlines()[-1] == "tables and figures are in out"
    (tmp_path / "a file").write_text("text")
    blocked = run("analyze", stored, "-o", "a file", "--quiet")
    assert (blocked.code, blocked.out) == (2, "")
    assert len(blocked.err.splitlines()) == 1


# --- the demonstration ---


def test_demo_quick(run: Callable[..., Said], tmp_path: Path) -> None:
    start = time.perf_counter()
    said = run("demo", "--quick", "--quiet", "-o", "demo")
    assert time.perf_counter() - start < 120  # 40 s on two cores that do nothing else
    assert (said.code, said.out) == (0, "")
    lines = said.err.splitlines()
    assert lines[0] == "squeezenet1_1: top-1 4/4, top-5 4/4 on real photos"
    assert lines[1].split() == list(cli.SUMMARY)
    assert len(lines) == 1 + 1 + 19 + 1
    assert {"squeezenet1_1-quick.h5", "summary.csv", "fig1_dead_share.png"} <= set(files(tmp_path / "demo"))
    with fxpath.open_store(tmp_path / "demo" / "squeezenet1_1-quick.h5") as store:
        assert (len(store), store.index.size, len(store.keys)) == (4, 2_763_104, 19)
        assert store.keys[0] == "neuron_mct@0.8"
        assert "dgr:iterations=60@0.9" in store.keys  # fewer iterations than the paper's, and it says so


@pytest.mark.slow
def test_demo(run: Callable[..., Said], tmp_path: Path) -> None:
    said = run("demo", "--quiet", "-o", "demo")
    lines = said.err.splitlines()
    assert lines[0] == "squeezenet1_1: top-1 13/20, top-5 20/20 on real photos"
    assert lines[1].startswith("efficientnet_lite0: top-1 17/20, top-5 20/20")
    print(said.err)  # noqa: T201
    table = pd.read_csv(tmp_path / "demo" / "summary.csv")
    assert len(table) == 2 * 19
    contribution = table[table["key"].str.startswith("neuron_")]
    assert len(contribution) == 2 * 6
    assert (contribution["dead_share"] == 0).all()


# --- small pieces ---


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--sparsity", "0.8", "0.9", "0.99"], ["--sparsity", "0.8", "--sparsity", "0.9", "--sparsity", "0.99"]),
        (["--sparsity", "0.8", "-o", "x.h5", "0.9"], ["--sparsity", "0.8", "-o", "x.h5", "0.9"]),
        (["a", "--sparsity", "0.8", "0.9", "b"], ["a", "--sparsity", "0.8", "--sparsity", "0.9", "b"]),
        (["--sparsity", "0.8", "--sparsity", ".5", "0"], ["--sparsity", "0.8", "--sparsity", ".5", "--sparsity", "0"]),
        (["--sparsity"], ["--sparsity"]),
        (["--limit", "5", "--sparsity", "0.8"], ["--limit", "5", "--sparsity", "0.8"]),
        (["0.8", "0.9"], ["0.8", "0.9"]),
        (["--selector", "dgr", "random:seed=3", "x"], ["--selector", "dgr", "--selector", "random:seed=3", "x"]),
        (["--selector", "random", "photos", "active"], ["--selector", "random", "photos", "active"]),
        (["--method", "gradient", "dgr@0.9*", "x"], ["--method", "gradient", "--method", "dgr@0.9*", "x"]),
        (["--method", "gradient", "dgr@1.0"], ["--method", "gradient", "--method", "dgr@1.0"]),
        (["--method", "gradient", "occlusion:siz=3"], ["--method", "gradient", "--method", "occlusion:siz=3"]),
        (["--method", "gradient*", "input_mct*5"], ["--method", "gradient*", "--method", "input_mct*5"]),
        (["--method", "gradient", "random_active:dgr@2"], ["--method", "gradient", "--method", "random_active:dgr@2"]),
        (["--method", "gradient", "zoo:net", "gradient"], ["--method", "gradient", "zoo:net", "gradient"]),
        (["--selector", "dgr", "--sparsity", "0.8", "dgr"], ["--selector", "dgr", "--sparsity", "0.8", "dgr"]),
        ([], []),
    ],
)  # fmt: skip
def test_spread(given: list[str], meant: list[str]) -> None:
    assert spread(given) == meant


def test_numbers() -> None:
    assert numbers(["0.8,0.9", "0.99 0.5"]) == [0.8, 0.9, 0.99, 0.5]


def test_seven_are_seven() -> None:
    assert len(seven()) == 7
