"""How a network takes colours: found from its preprocessing, from mean and deviation, or from samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from fxpath.errors import InputError
from fxpath.inputspace import InputSpace, SpaceError
from fxpath.zoo import WholeFrame, load_model

BGR = WholeFrame(8, channels="BGR", mean=(104.0, 117.0, 123.0), std=(1.0, 2.0, 4.0))
GREY = transforms.Compose([transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])


def squared(image: Image.Image) -> Tensor:
    return transforms.functional.to_tensor(image.resize((8, 8))) ** 2


def framed(image: Image.Image) -> Tensor:
    made = transforms.functional.to_tensor(image.resize((8, 8)))
    made[:, 0] += 1
    return made


def test_the_order_of_channels_is_found() -> None:
    space = InputSpace.of_preprocessing(BGR, (3, 8, 8))
    assert space.matrix == ((0.0, 0.0, 255.0), (0.0, 127.5, 0.0), (63.75, 0.0, 0.0))
    assert space.offset == (-104.0, -58.5, -30.75)
    assert (space.source, space.colours, space.channels) == ("preprocessing", 3, 3)


@pytest.mark.parametrize("name", ["zoo:squeezenet1_1", "zoo:efficientnet_lite0", "torchvision:resnet18"])
def test_a_picture_becomes_what_the_preprocessing_makes_of_it(name: str) -> None:
    loaded = load_model(name, weights="random")
    size = loaded.input_shape[1]
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    space = InputSpace.of_preprocessing(loaded.preprocess, loaded.input_shape)
    picture = torch.from_numpy(values).permute(2, 0, 1).unsqueeze(0) / 255
    if name.startswith("zoo"):  # torchvision's crops
        torch.testing.assert_close(
            space.inputs(picture)[0], loaded.preprocess(Image.fromarray(values)), rtol=0, atol=1e-3
        )
    else:
        assert space.offset == pytest.approx((-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225))
        expected = InputSpace.normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).inputs(picture)
        torch.testing.assert_close(space.inputs(picture), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(space.pictures(space.inputs(picture)), picture, rtol=0, atol=1e-5)


def test_grey_inputs_have_grey_pictures() -> None:
    space = InputSpace.of_preprocessing(GREY, (1, 64, 64))
    assert space.matrix == ((pytest.approx(1 / 0.3081),),)
    assert space.offset == (pytest.approx(-0.1307 / 0.3081),)
    picture = torch.rand(2, 1, 5, 5)
    torch.testing.assert_close(space.pictures(space.inputs(picture)), picture, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("preprocess", "shape", "said"),
    [
        (squared, (3, 8, 8), r"is not affine in the colour: RGB \(51, 102, 204\) gives \[0.04, 0.16, 0.64\], expected"),
        (framed, (3, 8, 8), "makes more than one value a channel of a picture of one colour"),
        (BGR, (3, 9, 9), r"expected the preprocessing to give \(C, H, W\) = \(3, 9, 9\), found \(3, 8, 8\)"),
        (len, (3, 8, 8), "the preprocessing fails for a picture of one colour .TypeError"),
        (lambda image: image, (3, 8, 8), "found Image$"),
        (lambda image: torch.ones(3, 8, 8), (3, 8, 8), "no channel that is the same for all colours"),
    ],
)
def test_other_preprocessings_are_refused(
    preprocess: Callable[[Image.Image], Any], shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        InputSpace.of_preprocessing(preprocess, shape)
    assert issubclass(SpaceError, InputError)


def test_mean_and_deviation() -> None:
    space = InputSpace.normalised((0.5, 0.25), (0.5, 0.125))
    picture = torch.tensor([0.0, 1.0]).expand(1, 2, 1, 2)
    assert space.inputs(picture)[0, :, 0].tolist() == [[-1.0, 1.0], [-2.0, 6.0]]
    assert json.loads(json.dumps(space.json())) == {
        "matrix": [[2.0, 0.0], [0.0, 8.0]], "offset": [-1.0, -2.0], "source": "mean and std",
    }  # fmt: skip


def test_the_range_of_samples() -> None:
    x = torch.stack([torch.linspace(-2, 6, 12).view(3, 4), torch.linspace(1, 3, 12).view(3, 4)]).expand(2, 2, 3, 4)
    space = InputSpace.of_samples(x)
    assert (space.matrix, space.offset, space.source) == (((8.0, 0.0), (0.0, 2.0)), (-2.0, 1.0), "range of the samples")
    shown = space.pictures(x)
    assert (float(shown.min()), float(shown.max())) == (0.0, 1.0)
    torch.testing.assert_close(space.inputs(shown), x)
    with pytest.raises(
        InputError, match=r"channel 1 of x is the same everywhere.*space=InputSpace.normalised\(mean, std\)"
    ):
        InputSpace.of_samples(torch.stack([torch.rand(3, 4), torch.ones(3, 4)]).unsqueeze(0))


def test_what_is_outside_is_shown_as_the_nearest() -> None:
    space = InputSpace.normalised((0.5,), (0.5,))
    assert space.pictures(torch.tensor([-3.0, 0.0, 9.0]).view(1, 1, 1, 3)).flatten().tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("matrix", "offset"),
    [
        (((1.0,), (2.0, 3.0)), (0.0, 0.0)),
        (((1.0,),), (0.0, 0.0)),
        (((),), (0.0,)),
        (((float("nan"),),), (0.0,)),
        (((1.0,),), (float("inf"),)),
        (((1.0, 0.0), (0.0, 0.0)), (0.0, 0.0)),
    ],
)
def test_numbers_that_are_no_map(matrix: tuple[tuple[float, ...], ...], offset: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="input space: expected"):
        InputSpace(matrix, offset)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))])
def test_means_and_deviations_that_do_not_fit(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="as many means as standard deviations other than 0"):
        InputSpace.normalised(mean, std)
