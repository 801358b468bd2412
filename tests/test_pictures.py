"""Inputs shown as pictures: the photo itself where the preprocessing is stated, else one scale for all channels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxpath.errors import ImageError, InputError
from fxpath.images import input_pictures, load_images
from fxpath.pictures import input_picture
from fxpath.zoo import LoadedModel, WholeFrame, load_model


def photo(size: int = 64) -> Image.Image:
    """A picture with a red left half, a green lower right and noise."""
    pixels = np.random.default_rng(0).integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[:, : size // 2, 0] += 130
    pixels[size // 2 :, size // 2 :, 1] += 100
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_lite0"])
def test_the_zoo_s_inputs_are_the_photos_themselves(name: str) -> None:
    loaded = load_model(f"zoo:{name}", weights="random")
    size = loaded.input_shape[-1]
    expected = np.asarray(photo().resize((size, size), Image.Resampling.BICUBIC))
    found = loaded.picture(loaded.preprocess(photo()))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet10t"])
def test_inputs_of_other_sources_show_what_the_network_saw(spec: str) -> None:
    loaded = load_model(spec, weights="random")
    x = loaded.preprocess(photo(400))
    stated = json.loads(loaded.preprocessing)
    mean, std = (torch.tensor(stated[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (x * std + mean).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(loaded.picture(x), expected)
    assert expected[:, :80].mean(axis=(0, 1))[0] > 150  # the red half stands at the left, in red


def test_a_preprocessing_that_is_not_stated_keeps_the_colours_apart() -> None:
    pixels = np.asarray(photo(), dtype=np.float64)
    x = (pixels.transpose(2, 0, 1) - 100) / 50
    for unknown in ("", "a text", '{"mean": [1]}', '{"mean": null, "std": null}', "[1, 2]", '{"mean": "a", "std": 1}'):
        found = input_picture(x, unknown)
        low, high = np.percentile(x, [0.5, 99.5])
        np.testing.assert_array_equal(found, np.rint(np.clip((x - low) / (high - low), 0, 1) * 255).transpose(1, 2, 0))
    assert (np.corrcoef(found.ravel(), pixels.ravel())[0, 1]) > 0.999  # channels are not scaled one by one
    swapped = input_picture(x, '{"channels": "BGR"}')
    np.testing.assert_array_equal(swapped, found[..., ::-1])


def test_a_statement_that_cannot_be_true_is_not_believed() -> None:
    x = np.asarray(photo(), dtype=np.float64).transpose(2, 0, 1)  # 0 … 255, never normalised
    stated = '{"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}'
    np.testing.assert_array_equal(input_picture(x, stated), input_picture(x))
    np.testing.assert_array_equal(input_picture(x, '{"mean": [0], "std": [1], "range": [0, 0]}'), input_picture(x))
    expected = x.astype(np.uint8).transpose(1, 2, 0)
    np.testing.assert_array_equal(input_picture(x, '{"mean": [0], "std": [1], "range": [0, 255]}'), expected)
    overshoot = x.copy()
    overshoot[0, 0, 0] = 258.0  # as interpolation makes it
    expected = expected.copy()
    expected[0, 0, 0] = 255
    np.testing.assert_array_equal(input_picture(overshoot, '{"mean": [0], "std": [1], "range": [0, 255]}'), expected)


def test_grey_constant_and_outlying_inputs() -> None:
    grey = input_picture(np.linspace(0, 1, 12).reshape(1, 3, 4))
    assert grey.shape == (3, 4, 3)
    assert (grey == grey[..., :1]).all()
    assert (grey[0, 0, 0], grey[2, 3, 0]) == (0, 255)
    assert (input_picture(np.full((3, 2, 2), 7.0)) == 128).all()
    values = np.random.default_rng(0).random((3, 20, 20))
    values[0, 0, 0] = 1e6  # one pixel does not make all others black
    assert 100 < input_picture(values).mean() < 150


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4), (1, 3, 4, 4), (3, 0, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected one input \(3, H, W\) or \(1, H, W\), found \("):
        input_picture(np.zeros(shape))


def test_values_that_are_not_finite_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="expected finite values, found NaN or infinity"):
            input_picture(np.full((3, 2, 2), bad))


def test_a_loaded_model_takes_its_input_as_it_is() -> None:
    frame = WholeFrame(4, "RGB", (1.0, 2.0, 3.0))
    loaded = LoadedModel("x", torch.nn.Identity(), frame, frame.json(), (3, 4, 4))
    x = frame(photo(4)).to(torch.bfloat16).requires_grad_()
    assert loaded.picture(x).shape == (4, 4, 3)
    assert x.grad is None


def test_pictures_of_a_data_set_by_id(tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (9, 5), colour).save(tmp_path / f"{number}.png")
    frame = WholeFrame(3, "BGR", (104.0, 117.0, 123.0))
    dataset = load_images(tmp_path, frame)
    found = input_pictures(dataset, ["2.png", "0.png"], frame.json())
    assert list(found) == ["2.png", "0.png"]
    assert found["2.png"].shape == (3, 3, 3)
    assert (found["2.png"] == [0, 0, 255]).all()
    assert (found["0.png"] == [255, 0, 0]).all()
    with pytest.raises(ImageError, match=r"no picture '3\.png'; nearest: .*Give the pictures that the store was made"):
        input_pictures(dataset, ["3.png"], frame.json())
    with pytest.raises(ImageError, match=r"there is no picture '0'"):
        input_pictures([dataset[0]], ["0"])
