"""`fxpath decode` and the folder that it writes: all files, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_jobs import Chosen, cifar, inputs, small
from torch import Tensor

import fxpath
from fxpath import decodefiles, decodefolder
from fxpath.cli import main
from fxpath.climbing import ConstantResponseWarning, Decoding
from fxpath.decodefigures import Panel, curves_figure, pictures_figure, row_label, save_picture
from fxpath.decodefiles import file_name
from fxpath.decodefolder import DecodeReport, decode_photos
from fxpath.decodephoto import shown
from fxpath.decoding import decode
from fxpath.errors import FxpathError, InputError, RestrictionError, SiteError, SparsityError, StoreError
from fxpath.inputspace import InputSpace
from fxpath.pathways import Selection

CIFAR = InputSpace.normalised((127 / 255,) * 3, (64 / 255,) * 3)
QUICK = Decoding(steps=6, every=3)
OPTIONS: dict[str, Any] = {
    "selectors": ("neuron_mct", "magnitude"), "sparsity": 0.5, "decoding": QUICK, "space": CIFAR, "progress": False,
}  # fmt: skip


class Said(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run `fxpath decode` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Said:
        with pytest.raises(SystemExit) as ended:
            main(["decode", *map(str, arguments), "--quiet"])
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return command


SMALL = ("small_jobs:build", "small_jobs:seven", "--steps", "6", "--sparsity", "0.5")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def of_photo(folder: Path, place: int) -> Path:
    return folder / file_name(cifar().ids[place])


# --- what is written ---


def test_the_files_of_a_job(tmp_path: Path) -> None:
    network, folder = small(), tmp_path / "out"
    done = decode_photos(network, Chosen(range(2)), folder, sites=["relu_1"], classes=cifar().classes, **OPTIONS)
    assert replace(done, seconds=0) == DecodeReport(folder, 2, 2, 0, {}, 0)
    own = of_photo(folder, 0)
    rows = ["row_active.png", "row_magnitude@0.5.png", "row_neuron_mct@0.5.png", "row_original.png"]
    assert sorted(path.name for path in own.iterdir()) == [
        "curves.csv", "curves.png", "decoded.json", "decoded.png", "features_relu_1.png", "photo.png", *rows,
    ]  # fmt: skip
    channels = {path.name for path in (folder / "features" / "relu_1").iterdir()}
    assert {path.name for path in folder.iterdir()} == {
        "decode.json", "features", "responses.csv", own.name, of_photo(folder, 1).name,
    }  # fmt: skip

    # the same as in Python
    x = inputs()[:1]
    target = int(network.original(x).target)
    mct = fxpath.NeuronMCT().scores(network, x)
    named = {
        "original": None, "active": fxpath.Active().select(network, x)[None], "neuron_mct@0.5": mct.pathways(0.5),
        "magnitude@0.5": fxpath.Magnitude().scores(network, x).pathways(0.5),
    }  # fmt: skip
    expected = decode(network, x, named, decoding=QUICK, space=CIFAR, max_batch=1)
    said = json.loads((own / "decoded.json").read_text())
    assert [row["row"] for row in said["rows"]] == list(named)
    assert (said["photo"], said["target"], said["class"]) == (cifar().ids[0], target, cifar().classes[target])
    table = pd.read_csv(own / "curves.csv")
    assert table.columns.tolist() == ["photo", "row", "step", "response", "photo_response"]
    summary = pd.read_csv(folder / "responses.csv")
    assert summary["row"].tolist() == [*named] * 2
    for number, row in enumerate(said["rows"]):
        curve = table[table["row"] == row["row"]]
        assert curve["step"].tolist() == [0, 3, 6]
        np.testing.assert_allclose(curve["response"], expected.responses[number], rtol=1e-6)
        assert row["photo_response"] == pytest.approx(float(expected.photo[number]), rel=1e-6)
        assert row["original_response"] == pytest.approx(float(expected.original[number]), rel=1e-6)
        assert summary["response"][number] == pytest.approx(row["response"])
        with Image.open(own / row["file"]) as picture:
            assert np.array_equal(np.asarray(picture), shown(expected.pictures[number]))
    assert summary["density"].tolist()[:3] == pytest.approx(
        [1.0, float(named["active"].density), float(mct.pathways(0.5).density)]
    )

    # channels of top neurons: one file each, whichever pathways and photos they are of
    for about in said["features"]:
        values = mct.signed.abs() if about["row"] == "neuron_mct@0.5" else fxpath.Magnitude().scores(network, x).signed
        site = network.index.site("relu_1")
        own_scores = (values * (mct.pathways(0.5) if "mct" in about["row"] else named["magnitude@0.5"]).mask)[
            0, site.slice
        ]
        assert about["neuron"] == site.start + int(own_scores.argmax())
        assert (own / about["file"]).resolve() == folder / "features" / "relu_1" / f"channel_{about['channel']}.png"
        activation = network.activations(x)[1][0, about["channel"]]
        assert about["photo_mean"] == pytest.approx(float(activation.mean()), rel=1e-5)
    used = {
        about["channel"]
        for place in (0, 1)
        for about in json.loads((of_photo(folder, place) / "decoded.json").read_text())["features"]
    }
    assert channels == {f"channel_{channel}.{kind}" for channel in used for kind in ("png", "json")}
    record = json.loads((folder / "decode.json").read_text())
    assert record["decoding"]["steps"] == 6
    assert record["space"] == CIFAR.json()


@dataclass(frozen=True)
class Unreached:
    """A selector that never has a pathway."""

    key: ClassVar[str] = "unreached"
    single: ClassVar[bool] = False

    def select(self, network: fxpath.Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        return Selection({}, missing=dict.fromkeys(sparsities, "it does not go so far"))


@dataclass(frozen=True)
class Nothing(Unreached):
    """A selector whose pathway is empty."""

    key: ClassVar[str] = "nothing"

    def select(self, network: fxpath.Network, samples: Any, sparsities: Sequence[float]) -> Selection:
        empty = fxpath.Pathways(torch.zeros(1, network.index.size, dtype=torch.bool), network.index)
        return Selection(dict.fromkeys(sparsities, empty))


def test_missing_and_empty_pathways_are_told(tmp_path: Path) -> None:
    options = OPTIONS | {"selectors": (Unreached(), "neuron_mct", Nothing())}
    with pytest.warns(ConstantResponseWarning, match="'nothing@0.5'"):
        done = decode_photos(small(), Chosen(range(1)), tmp_path, sites=["relu_1"], **options)
    table = pd.read_csv(done.table).set_index("row")
    assert table.index.tolist() == ["original", "active", "neuron_mct@0.5", "nothing@0.5", "unreached@0.5"]
    assert table["missing"]["unreached@0.5"] == "it does not go so far"
    assert np.isnan(table["response"]["unreached@0.5"])
    assert table["density"]["nothing@0.5"] == 0
    assert not table["climbed"]["nothing@0.5"]
    assert table["response"]["nothing@0.5"] == table["photo_response"]["nothing@0.5"]
    features = json.loads((of_photo(tmp_path, 0) / "decoded.json").read_text())["features"]
    assert {about["row"]: about["missing"] for about in features} == {
        "neuron_mct@0.5": "", "nothing@0.5": "no neuron of the pathway scores at this site",
        "unreached@0.5": "it does not go so far",
    }  # fmt: skip
    assert table["noise"]["neuron_mct@0.5"] == 1
    assert not (of_photo(tmp_path, 0) / "row_unreached@0.5.png").exists()
    again = decode_photos(small(), Chosen(range(1)), tmp_path, sites=["relu_1"], **options)
    assert (again.decoded, again.reused) == (0, 1)


def test_photos_that_cannot_be_used(tmp_path: Path) -> None:
    photos = Chosen(
        (0, 1, 2, 4),
        {0: OSError("gone"), 1: lambda x: x[:, :5], 2: lambda x: torch.full_like(x, torch.nan)},
    )
    done = decode_photos(small(), photos, tmp_path, **OPTIONS)
    assert (done.photos, done.decoded) == (4, 1)
    reasons = [done.failed[photos.ids[place]] for place in range(3)]
    assert reasons[0] == "OSError: gone"
    assert reasons[1] == "expected an input of shape (3, 32, 32), found (3, 5, 32)"
    assert "holds NaN" in reasons[2]
    assert pd.read_csv(done.table)["photo"].unique().tolist() == [photos.ids[3]]
    labelled = decode_photos(small(), _unlabelled(), tmp_path / "labels", target="labels", **OPTIONS)
    assert labelled.failed == {"a": "no label, and labels are to be explained"}
    said = json.loads((tmp_path / "labels" / "b" / "decoded.json").read_text())
    assert (said["target"], said["label"], said["class"]) == (4, 4, "")


def _unlabelled() -> Any:
    class Two:
        ids = ("a", "b")

        def __len__(self) -> int:
            return 2

        def __getitem__(self, place: int) -> tuple[Tensor, int]:
            return inputs()[place], (-1, 4)[place]

    return Two()


# --- going on ---


def test_a_job_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, folder = small(), tmp_path / "stopped"
    whole = decode_photos(network, Chosen(range(3)), tmp_path / "whole", sites=["relu_1"], **OPTIONS)
    assert whole.decoded == 3
    calls = []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode_photo(*given)

    decode_photo = decodefolder.decode_photo
    with monkeypatch.context() as patched:
        patched.setattr(decodefolder, "decode_photo", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode_photos(network, Chosen(range(3)), folder, sites=["relu_1"], **OPTIONS)
    assert decodefolder.done_photos(folder) == 1
    assert not of_photo(folder, 1).exists()
    first = {path: path.stat().st_mtime_ns for path in of_photo(folder, 0).iterdir()}
    done = decode_photos(network, Chosen(range(3)), folder, sites=["relu_1"], **OPTIONS)
    assert (done.decoded, done.reused) == (2, 1)
    assert {path: path.stat().st_mtime_ns for path in of_photo(folder, 0).iterdir()} == first
    assert contents(folder) == contents(tmp_path / "whole")  # byte for byte
    assert network._restriction is None


def test_a_stop_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file a stop meets, none is left half and the photo is decoded again."""
    decode_photos(small(), Chosen(range(1)), tmp_path / "whole", **OPTIONS)
    save = decodefiles.save

    def stopped(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decodefiles, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            decode_photos(small(), Chosen(range(1)), tmp_path / "out", **OPTIONS)
    assert save is decodefiles.save
    assert decodefolder.done_photos(tmp_path / "out") == 0
    assert not [name for name in contents(tmp_path / "out") if name.endswith(".tmp")]
    assert decode_photos(small(), Chosen(range(1)), tmp_path / "out", **OPTIONS).decoded == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["no picture", "no json", "half a json", "another json", "another photo"])
def test_a_photo_that_is_not_whole_is_decoded_again(tmp_path: Path, damage: str) -> None:
    decode_photos(small(), Chosen(range(2)), tmp_path, **OPTIONS)
    before, own, photos = contents(tmp_path), of_photo(tmp_path, 0), Chosen(range(2))
    said = own / "decoded.json"
    if damage == "no picture":
        (own / "row_active.png").unlink()
    elif damage == "no json":
        said.unlink()
    elif damage == "half a json":
        said.write_bytes(said.read_bytes()[:100])
    elif damage == "another json":
        said.write_text("[1]")
    else:
        photos = Chosen(range(2), {0: lambda x: x + 0.25})
    done = decode_photos(small(), photos, tmp_path, **OPTIONS)
    assert (done.decoded, done.reused) == (1, 1)
    if damage != "another photo":
        assert contents(tmp_path) == before
    else:
        assert contents(tmp_path) != before


def test_more_photos_can_be_added(tmp_path: Path) -> None:
    decode_photos(small(), Chosen(range(1)), tmp_path, **OPTIONS)
    done = decode_photos(small(), Chosen((2, 0)), tmp_path, **OPTIONS)
    assert (done.decoded, done.reused) == (1, 1)
    assert pd.read_csv(done.table)["photo"].unique().tolist() == [cifar().ids[2], cifar().ids[0]]


@pytest.mark.parametrize("damage", ["{}", '{"job": "another", "means": [3.0]}', "no json"])
def test_a_damaged_channel_is_made_again(tmp_path: Path, damage: str) -> None:
    options = OPTIONS | {"sites": ["relu_1"]}
    decode_photos(small(), Chosen(range(1)), tmp_path, **options)
    before = contents(tmp_path)
    for damaged in (tmp_path / "features" / "relu_1").glob("*.json"):
        damaged.write_text(damage)
    (of_photo(tmp_path, 0) / "decoded.json").unlink()
    decode_photos(small(), Chosen(range(1)), tmp_path, **options)
    assert contents(tmp_path) == before


def test_without_a_space_the_first_photo_gives_it(tmp_path: Path) -> None:
    options = OPTIONS | {"space": None}
    photos = Chosen(range(2), {0: OSError("gone")})
    decode_photos(small(), photos, tmp_path, **options)
    record = json.loads((tmp_path / "decode.json").read_text())
    assert record["space"] == InputSpace.of_samples(inputs()[1:2]).json()
    done = decode_photos(small(), Chosen(range(2)), tmp_path, **options)  # the job keeps it
    assert (done.decoded, done.reused) == (1, 1)
    with pytest.raises(InputError, match="decode: none of 1 photos can be used; the first: OSError: gone"):
        decode_photos(small(), Chosen(range(1), {0: OSError("gone")}), tmp_path / "none", **options)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"decoding": Decoding(steps=7, every=3)}, 'decoding: there {"steps": 6'),
        (
            {"decoding": Decoding(steps=6, every=3, rotation=7)},
            'decoding: there {"rotation": 5.0}, here {"rotation": 7',
        ),
        ({"sparsity": 0.8}, "there 0.5, here 0.8"),
        ({"selectors": ("neuron_mct",)}, "selectors: there"),
        ({"target": 3}, 'target: there "predicted", here "3"'),
        ({"sites": ["relu_1"]}, r'sites: there \[\], here \["relu_1"\]'),
        ({"space": None, "max_batch": None}, "max_batch: there 1, here null"),
        ({"model": "another"}, 'model: there "", here "another"'),
    ],
)
def test_the_folder_of_another_job_is_refused(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    decode_photos(small(), Chosen(range(1)), tmp_path, **OPTIONS)
    before = contents(tmp_path)
    with pytest.raises(
        StoreError, match=rf"holds the results of another job \(.*{said}.*\); choose another folder, or"
    ):
        decode_photos(small(), Chosen(range(1)), tmp_path, **(OPTIONS | other))
    assert contents(tmp_path) == before


def test_a_record_that_says_more_is_refused(tmp_path: Path) -> None:
    decode_photos(small(), Chosen(range(1)), tmp_path, **OPTIONS)
    record = json.loads((tmp_path / "decode.json").read_text())
    (tmp_path / "decode.json").write_text(json.dumps(record | {"newer": 2}))
    with pytest.raises(StoreError, match=r"another job \(newer: there 2, here null\)"):
        decode_photos(small(), Chosen(range(1)), tmp_path, **OPTIONS)


def test_jobs_that_are_refused(tmp_path: Path) -> None:
    photos, network = Chosen(range(1)), small()
    (tmp_path / "file").write_text("text")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "decode.json").write_text("{")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "decode.json").write_text("[]")
    for wrong, kind, said in (
        ({"selectors": ("random:seed=1", "random:seed=1")}, InputError, r"random:seed=1@0.5 is asked for twice"),
        ({"selectors": ("random_walk",)}, InputError, "there is no selector 'random_walk'"),
        ({"sparsity": 1.5}, SparsityError, r"expected a share in \[0, 1\), found 1.5"),
        ({"target": "best"}, InputError, "expected 'labels', 'predicted' or a class number, found 'best'"),
        ({"sites": ["relu_11"]}, SiteError, "there is no site 'relu_11'; nearest: relu_1"),
        ({"max_batch": -1}, InputError, "expected max_batch to be a whole number of at least 1, found -1"),
        ({"folder": tmp_path / "file"}, StoreError, "decode: expected a folder, found the file"),
        ({"folder": tmp_path / "strange"}, StoreError, r"decode.json cannot be read \("),
        ({"folder": tmp_path / "list"}, StoreError, "decode.json says of no job"),
    ):
        given: dict[str, Any] = OPTIONS | {"folder": tmp_path / "new"} | wrong
        with pytest.raises(kind, match=said):
            decode_photos(network, photos, **given)
    # a job that got nowhere is in nobody's way
    with pytest.raises(InputError, match="expected a class in 0 … 9, found 12"):
        decode_photos(network, photos, tmp_path / "new", **(OPTIONS | {"target": 12}))
    assert decode_photos(network, photos, tmp_path / "new", **OPTIONS).decoded == 1
    everything = fxpath.Pathways(torch.ones(1, network.index.size, dtype=torch.bool), network.index)
    with network.masked(everything), pytest.raises(RestrictionError, match="decode: the network is restricted"):
        decode_photos(network, photos, tmp_path / "new", **OPTIONS)
    assert issubclass(StoreError, FxpathError)


# --- the command ---


def test_the_command(run: Callable[..., Said], tmp_path: Path) -> None:
    said = run(*SMALL, "-o", "out", "--selector", "neuron_mct", "random:seed=3", "--limit", "2", "--site", "relu_1",
               "--seed", "4", "--learning-rate", "0.05", "--size", "24", "--jitter", "2", "--scale", "0.1",
               "--rotation", "3", "--decay", "1.2", "--json")  # fmt: skip
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert report | {"seconds": 0} == {
        "folder": "out", "photos": 2, "decoded": 2, "reused": 0, "failed": {}, "seconds": 0,
    }  # fmt: skip
    lines = said.err.splitlines()
    assert lines[0].split() == ["photo", "class", "row", "density", "photo_response", "response", "original_response"]
    assert lines[-1].startswith("out: 2 of 2 photos (2 decoded now, 0 were there) in ")
    record = json.loads(Path("out/decode.json").read_text())
    assert record["decoding"] == {
        "steps": 6, "seed": 4, "learning_rate": 0.05, "size": 24, "jitter": 2, "scale": 0.1, "rotation": 3.0,
        "decorrelated": True, "decay": 1.2, "every": 16,
    }  # fmt: skip
    assert record["space"]["source"] == "preprocessing"
    assert record["space"]["matrix"][0][0] == pytest.approx(255 / 64)
    assert list(record["selectors"]) == ["neuron_mct@0.5", "random:seed=3@0.5"]
    again = run(*SMALL, "-o", "out", "--selector", "neuron_mct")
    assert again.code == 2
    assert again.err.startswith("fxpath: decode: out holds the results of another job (selectors: there ")
    assert len(again.err.splitlines()) == 1


def test_a_stopped_command(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = (*SMALL, "-o", "out", "--selector", "neuron_mct", "--limit", "3")
    decode_photo, calls = decodefolder.decode_photo, []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode_photo(*given)

    with monkeypatch.context() as patched:
        patched.setattr(decodefolder, "decode_photo", interrupted)
        said = run(*job)
    assert said.code == 130
    assert said.err == "stopped; 2 finished photos are kept in out. The same command goes on there.\n"
    said = run(*job)
    assert said.code == 0
    assert "out: 3 of 3 photos (1 decoded now, 2 were there)" in said.err


def test_a_folder_of_pictures_with_a_broken_one(run: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for place, name in enumerate(("a.png", "ü b.png")):
        shutil.copy(cifar().files[place], tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "c.png").write_bytes(b"no picture")
    said = run(
        "small_jobs:build", "pictures", "-o", "out", "--selector", "random", "--steps", "2", "--pixels", "--rows", "0"
    )
    assert said.code == 0, said.err
    assert "not decoded: c.png: image pictures/c.png: cannot be read" in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        file_name("ü b.png"), "a.png",
    ]  # fmt: skip
    record = json.loads(Path("out/decode.json").read_text())
    assert (record["max_batch"], record["decoding"]["decorrelated"]) == (None, False)
    (tmp_path / "broken").mkdir()
    shutil.copy(tmp_path / "pictures" / "c.png", tmp_path / "broken")
    said = run("small_jobs:build", "broken", "-o", "nothing", "--steps", "2")
    assert said.code == 2
    assert "nothing: 0 of 1 photos" in said.err


def test_a_preprocessing_that_is_not_affine(run: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "strange.py").write_text(
        "from small_jobs import FRAME, module\nfrom fxpath.zoo import LoadedModel\n"
        "def net():\n"
        "    return LoadedModel('strange', module(), lambda image: FRAME(image) ** 2, '{}', (3, 32, 32))\n"
    )
    said = run("strange:net", "small_jobs:seven", "-o", "out", "--selector", "random", "--steps", "2", "--limit", "1")
    assert said.code == 0, said.err
    assert "fxpath: note: input space: the preprocessing is not affine in the colour" in said.err
    assert "; [0, 1] is taken for the range of the first photo" in said.err
    assert json.loads(Path("out/decode.json").read_text())["space"]["source"] == "range of the samples"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--steps", "0"), "fxpath: decoding: expected steps to be a whole number of at least 1, found 0"),
        (
            ("--sparsity", "0.9", "0.98"),
            "fxpath: --sparsity: expected one, found 2; decode each into a folder of its own",
        ),
        (("--site", "relu_9"), "fxpath: there is no site 'relu_9'; nearest: relu_3"),
        (("--selector", "neuron_mtc"), "fxpath: there is no selector 'neuron_mtc'; nearest: neuron_mct"),
        (("--rows", "-1"), "fxpath: --rows: expected 0 for all, or how many at a time, found -1"),
        (("--target", "10"), "fxpath: target: expected a class in 0 … 9, found 10"),
    ],
)
def test_one_line_and_exit_code_two(run: Callable[..., Said], wrong: tuple[str, ...], said: str) -> None:
    done = run("small_jobs:build", "small_jobs:seven", "-o", "out", "--limit", "1", *wrong)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(said)
    assert len(done.err.splitlines()) == 1


def test_networks_of_clips_are_refused(run: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "clips.py").write_text(
        "import torch\nfrom torch import nn\nfrom fxpath.zoo import LoadedModel\n"
        "def net():\n"
        "    model = nn.Sequential(nn.Conv3d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 2 * 6 * 6, 3)).eval()\n"
        "    return LoadedModel('clips', model, len, '{}', (3, 4, 8, 8))\n"
        "class Clips:\n"
        "    def __len__(self): return 1\n"
        "    def __getitem__(self, i): return torch.rand(3, 4, 8, 8)\n"
    )
    said = run("clips:net", "clips:Clips", "-o", "out", "--steps", "2")
    assert said.code == 2
    assert (
        "expected a network whose one input is floating-point pictures (B, C, H, W), found float32 (B, 3, 4, 8, 8)"
        in said.err
    )
    assert not Path("out").exists()


# --- figures and names ---


def test_the_figure_of_pictures() -> None:
    picture = np.zeros((20, 30, 3), dtype=np.uint8)
    panels = [Panel(f"number {n}", picture, ("one", "two")) for n in range(5)] + [
        Panel("none", None, ("missing: it is",))
    ]
    figure = pictures_figure(panels, "a title with a $")
    axes = figure.axes
    assert len(axes) == 8
    assert [len(ax.images) for ax in axes] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert [ax.get_title() for ax in axes[:6]] == [panel.title for panel in panels]
    assert axes[5].texts[0].get_text() == "missing: it is"
    assert axes[0].texts[0].get_text() == "one\ntwo"
    assert figure.get_size_inches()[0] == 6.5
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for ax in axes[:6] for text in (ax.title, ax.texts[0])]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    assert all(text.get_fontsize() >= 8 for ax in axes for text in (ax.title, *ax.texts))
    with pytest.raises(InputError, match="pictures figure: expected at least one panel"):
        pictures_figure([])


def test_the_figure_of_curves() -> None:
    rows = [
        {"row": row, "step": step, "response": step * place, "photo_response": 2.5}
        for place, row in enumerate(("original", "neuron_mct@0.58", "my own", "dgr:init=r@0.58"))
        for step in (8, 0, 4)
    ]
    figure = curves_figure(pd.DataFrame(rows), "photo")
    axes = [ax for ax in figure.axes if ax.lines]
    assert [ax.get_title() for ax in axes] == ["Original", "NeuronMCT", "my own", "DGR(init=r)"]
    assert axes[2].lines[0].get_xdata().tolist() == [0, 4, 8]
    assert axes[2].lines[0].get_ydata().tolist() == [0, 8, 16]
    assert list(axes[2].lines[1].get_ydata()) == [2.5, 2.5]
    assert figure.get_suptitle() == "photo, dotted: at the photo"
    plain = curves_figure(pd.DataFrame(rows).drop(columns="photo_response"))
    assert [len(ax.lines) for ax in plain.axes[:4]] == [1, 1, 1, 1]
    with pytest.raises(InputError, match=r"expected a table with row, step and response, found none of \['step'\]"):
        curves_figure(pd.DataFrame(rows).drop(columns="step"))


def test_pictures_as_files(tmp_path: Path) -> None:
    values = torch.tensor([[[0.0, 0.5], [1.0, 0.25]]])
    assert shown(values)[..., 0].tolist() == [[0, 128], [255, 64]]
    assert shown(values).shape == (2, 2, 3)
    assert np.array_equal(shown(values.expand(5, -1, -1))[..., 2], shown(values)[..., 0])
    assert np.array_equal(shown(torch.cat([values, values * 0]))[..., 1], shown(values)[..., 1])  # of two the first
    path = save_picture(shown(values), tmp_path / "deep" / "a.png")
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), shown(values))


def test_names_of_files() -> None:
    names = [
        "a.png", "a/b.png", "a_b.png", "..", ".", ".hidden", "features", "responses.csv", "x" * 300, "x" * 301, "ü",
        "foolbox:imagenet_00_243", "dgr:init=r,iterations=3@0.58", "", "CON\n",
    ]  # fmt: skip
    found = [file_name(name) for name in names]
    assert len({name.casefold() for name in found}) == len(names)
    assert found[0] == "a.png"
    assert found[2] == "a_b.png"
    assert all(len(name) <= 100 and name.isascii() and not name.startswith(".") for name in found)
    assert not any(set(name) & set('/\\:*?"<>|\n') for name in found)
    assert not {"features", "responses.csv", "decode.json"} & set(found)
    assert row_label("neuron_mct@0.9") == "NeuronMCT"


def test_the_analysis_script(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "analyses" / "pathway_decoding.py"
    given = ["-o", tmp_path / "out", "--photos", "1", "--steps", "2", "--selector", "neuron_mct"]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *map(str, given)], capture_output=True, text=True, timeout=200,
        cwd=script.parents[1], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split()[:2] == ["foolbox:imagenet_00_243", "bull"]
    assert lines[-1].startswith("1 photos decoded, 0 were there, in ")
    found = set(contents(tmp_path / "out"))
    assert {"decode.json", "responses.csv"} < found
    assert sum(name.endswith("decoded.png") for name in found) == 1
    assert sum("features_features" in name for name in found) == 2
