"""What the coverage run looks at: every architecture of three libraries, with real input for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ModelError, unknown
from .images import load_images
from .responses import Logit, OutputFunction, Response, logit, region, token
from .samples import Samples
from .zoo import LoadedModel, load_model, seeded

SAMPLES = 3
PHOTOS = "foolbox:imagenet"
_SIDE = 224  # of the photos that detection models read
_TEXTS = (
    "The cat sat on the mat and looked out of the window.",
    "Which neurons carried this decision?",
    "A path leads from the input to the output, and each step can be asked for.",
)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with random weights, three samples of real input, and the response that is asked of it."""

    name: str
    model: nn.Module
    samples: Samples
    response: Response


def mean_output(output: Any) -> Tensor:
    """The sum over all floating-point tensors of an output of their means, `(B,)`: it depends on every part."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.flatten(1).mean(1) for leaf in leaves]).sum(0)


_mean = OutputFunction(mean_output)


def fill_zeros(model: nn.Module) -> None:
    """Random values in place of weights that start as zeros: with these, what lies behind would never be reached."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.is_meta or name.endswith("bias") or bool(parameter.any()):
            continue
        values = torch.randn(parameter.shape, generator=generator) * 0.02 if parameter.ndim > 1 else torch.ones(())
        parameter.data.copy_(values)


def subject_of(name: str, *, meta: bool = False) -> Subject:
    """The subject of a name that `names` gives; on the meta device where its weights would not fit.

    Raises `ModelError` for any other name.
    """
    source, _, rest = name.partition(":")
    with torch.device("meta" if meta else "cpu"):
        if source == "transformers":
            return _transformer(name, rest)
        if "#" in rest:
            return _part(name, *rest.split("#"))
        loaded = load_model(name, weights="random")
        fill_zeros(loaded.model)
    if len(loaded.input_shape) == 4:
        samples = _clips(loaded)
    else:
        dataset = load_images(PHOTOS, loaded.preprocess, classes=loaded.classes, limit=SAMPLES)
        samples = Samples(torch.stack([dataset[row][0] for row in range(SAMPLES)]))
    response: Response = logit if getattr(loaded.model, "num_classes", 1) != 0 else _mean
    if source == "torchvision" and rest in _torchvision("segmentation"):
        response = region(output="out")
    return Subject(name, loaded.model, samples, response)


def names(groups: Sequence[str], progress: Callable[[str], None] = lambda _: None) -> list[str]:
    """The subjects of groups: torchvision, detection, timm (the smallest of each family), transformers."""
    makers: dict[str, Callable[[], list[str]]] = {
        "torchvision": lambda: [
            f"torchvision:{name}" for kind in ("", "segmentation", "video") for name in _torchvision(kind)
        ],
        "detection": lambda: [
            f"torchvision:{name}#{part}" for name in _torchvision("detection") for part in _parts_of(name)
        ],
        "timm": lambda: [f"timm:{name}" for found in smallest_of_timm(progress).values() for name in found],
        "transformers": lambda: [f"transformers:{name}" for name in _CONFIGS],
    }
    wrong = [group for group in groups if group not in makers]
    if wrong:
        raise ModelError(unknown("group of networks", wrong[0], makers))
    return [name for group in groups for name in makers[group]()]


def _torchvision(kind: str) -> list[str]:
    from torchvision import models

    return list(models.list_models(module=getattr(models, kind) if kind else models))


def smallest_of_timm(progress: Callable[[str], None] = lambda _: None) -> dict[str, list[str]]:
    """The network with the fewest parameters of each timm family (a module of `timm.models`).

    Where that one is made for timm's own tests, the smallest of the others follows it.
    """
    import timm

    smallest = {}
    for family in timm.list_modules():
        progress(family)
        sizes = {name: _parameters(name) for name in timm.list_models(module=family)}
        order = sorted(sizes, key=lambda name: (sizes[name], name))
        first = next(place for place, name in enumerate(order) if not name.startswith("test_"))
        smallest[family] = [order[0], order[first]] if first else order[:1]
    return smallest


def _parameters(name: str) -> int:
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except RuntimeError:  # some read values while they are built
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


# --- videos -----------------------------------------------------------------------------------------------------------


def _clips(loaded: LoadedModel) -> Samples:
    """Clips that pan over real photos, a pixel a frame."""
    channels, frames, height, width = loaded.input_shape
    said = json.loads(loaded.preprocessing)
    mean, std = (torch.tensor(said[key]).view(channels, 1, 1) for key in ("mean", "std"))
    dataset = load_images(PHOTOS, _to_tensor(height, width + frames), limit=SAMPLES)
    photos = [(dataset[row][0] - mean) / std for row in range(SAMPLES)]
    return Samples(
        torch.stack([torch.stack([photo[:, :, t : t + width] for t in range(frames)], 1) for photo in photos])
    )


def _to_tensor(height: int, width: int) -> Callable[[Image.Image], Tensor]:
    from torchvision.transforms.functional import pil_to_tensor

    def preprocess(image: Image.Image) -> Tensor:
        values: Tensor = pil_to_tensor(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        return values.float() / 255

    return preprocess


# --- detection --------------------------------------------------------------------------------------------------------


class _OneStage(nn.Module):
    """All of a one-stage detection model that lies between pictures and the scores and places of its boxes."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Any:
        return self.head(list(self.backbone(images).values()))


class _Chain(nn.Module):
    """A head and its predictor, which detection models call one after the other."""

    def __init__(self, head: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.head, self.predictor = head, predictor

    def forward(self, regions: Tensor) -> Any:
        return self.predictor(self.head(regions))


def _parts_of(name: str) -> list[str]:
    if "rcnn" not in name:
        return ["backbone+head"]
    more = {"maskrcnn": ["mask"], "keypointrcnn": ["keypoint"]}
    return ["backbone", "rpn.head", "box", *more.get(name.split("_")[0], [])]


def _part(name: str, model_name: str, part: str) -> Subject:
    """A part of a detection model, with what real photos give it to read: the rest branches on values (boxes)."""
    from torchvision import models

    if model_name not in _torchvision("detection") or part not in _parts_of(model_name):
        known = [f"{each}#{one}" for each in _torchvision("detection") for one in _parts_of(each)]
        raise ModelError(unknown("part of a detection model", f"{model_name}#{part}", known))
    sizes = {} if model_name.startswith("ssd") else {"min_size": _SIDE, "max_size": _SIDE}
    with seeded():
        model = models.get_model(model_name, weights=None, weights_backbone=None, **sizes).eval()
    dataset = load_images(PHOTOS, _to_tensor(_SIDE, _SIDE), limit=SAMPLES)
    with torch.no_grad():
        images, _ = model.transform([dataset[row][0] for row in range(SAMPLES)])
        if part == "backbone+head":
            return Subject(name, _OneStage(model.backbone, model.head).eval(), Samples(images.tensors), _mean)
        if part == "backbone":
            return Subject(name, model.backbone, Samples(images.tensors), _mean)
        features = model.backbone(images.tensors)
        if part == "rpn.head":
            return Subject(name, model.get_submodule(part), Samples((list(features.values()),)), _mean)
        boxes, _ = model.rpn(images, features)
        heads = model.roi_heads
        pool = heads.box_roi_pool if part == "box" else getattr(heads, f"{part}_roi_pool")
        regions = pool(features, [each[:1] for each in boxes], images.image_sizes)  # the best region of each photo
    chain = _Chain(getattr(heads, f"{part}_head"), getattr(heads, f"{part}_predictor")).eval()
    return Subject(name, chain, Samples(regions), _mean)


# --- transformers -----------------------------------------------------------------------------------------------------

_CONFIGS = {
    "bert": ("BertConfig", "BertForSequenceClassification"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "vit": ("ViTConfig", "ViTForImageClassification"),
    "clip_vision": ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
}


def _transformer(name: str, kind: str) -> Subject:
    """An encoder or decoder of `transformers`, built from its default configuration."""
    if kind not in _CONFIGS:
        raise ModelError(unknown("transformer", kind, _CONFIGS))
    try:
        import transformers
    except ImportError as failure:
        raise ModelError(f"{name}: {failure}; pip install 'fxpath[transformers]'") from failure
    config, build = (getattr(transformers, each) for each in _CONFIGS[kind])
    with seeded():
        model = build(config()).eval()
    if kind in ("vit", "clip_vision"):
        dataset = load_images(PHOTOS, _to_tensor(model.config.image_size, model.config.image_size), limit=SAMPLES)
        photos = torch.stack([dataset[row][0] for row in range(SAMPLES)]) * 2 - 1
        return Subject(name, model, Samples({"pixel_values": photos}), Logit("logits") if kind == "vit" else _mean)
    rows = [list(text.encode()) for text in _TEXTS]  # a token a byte: no tokenizer's file is needed
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind == "bert":
        return Subject(name, model, Samples(inputs), Logit("logits"))
    last = min(map(len, rows)) - 1  # a real token of all; one reads those before it
    return Subject(name, model, Samples(inputs | {"use_cache": False}), token(last, output="logits"))
