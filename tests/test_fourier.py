"""Pictures as waves and principal colours, and the moves that pictures make while they are climbed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxpath.errors import InputError
from fxpath.fourier import COLOURS, Basis, principal_colours
from fxpath.images import photos, read_image
from fxpath.transformations import Transformation

STILL = Transformation()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- waves ---


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (6, 11), (5, 4), (1, 1), (1, 6)])
@pytest.mark.parametrize("decay", [1.0, 1.7])
def test_waves_make_any_plane(height: int, width: int, decay: float) -> None:
    basis, plane = Basis(2, height, width, decay=decay), noise(3, 2, height, width)
    waves = torch.fft.rfft2(plane, norm="ortho") / basis.scale(plane) / 0.25
    coefficients = torch.view_as_real(waves)
    assert coefficients.shape == basis.shape(3)
    torch.testing.assert_close(basis.planes(coefficients), plane, rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.pictures(coefficients), plane.sigmoid(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_white_coefficients_have_a_falling_spectrum(decay: float) -> None:
    basis = Basis(1, 64, 64, decay=decay)
    planes = basis.planes(noise(*basis.shape(200)))
    energy = torch.fft.rfft2(planes, norm="ortho").abs().square().mean(dim=(0, 1))
    frequency = torch.hypot(torch.fft.fftfreq(64).unsqueeze(1), torch.fft.rfftfreq(64)).double()
    inner = (frequency > 0.03) & (frequency < 0.45)
    inner[:, [0, -1]] = False  # there a wave and its mirror image share their energy
    slope = np.polyfit(frequency[inner].log().numpy(), energy[inner].log().numpy(), 1)[0]
    assert slope == pytest.approx(-2 * decay, abs=0.03)
    # below one cycle a picture it falls no further: the mean is one wave like the longest
    assert basis.scale(planes)[0, 0] == pytest.approx(64**decay)
    assert basis.scale(planes)[0, 1] == pytest.approx(64**decay)
    assert basis.scale(planes)[0, 2] == pytest.approx(32**decay)


def test_pixels_are_plain() -> None:
    basis, values = Basis(3, 4, 5, decorrelated=False), noise(2, 3, 4, 5)
    assert basis.shape(2) == (2, 3, 4, 5)
    assert torch.equal(basis.pictures(values), values.sigmoid())


def test_every_row_starts_with_the_same_faint_noise() -> None:
    basis = Basis(3, 32, 30)
    first = basis.start(4, torch.Generator().manual_seed(5), torch.zeros(()))
    assert first.shape == basis.shape(4)
    assert first.dtype == torch.float32
    assert torch.equal(first, first[:1].expand_as(first))
    assert first.std() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(first, basis.start(4, torch.Generator().manual_seed(5), torch.zeros(())))
    assert not torch.equal(first, basis.start(4, torch.Generator().manual_seed(6), torch.zeros(())))
    pictures = basis.pictures(first)
    assert 0 < (pictures - 0.5).abs().max() < 0.2


# --- colours ---


def test_the_colours_are_those_of_natural_pictures() -> None:
    """The covariance of RGB over foolbox's photos is what white coefficients get, up to one factor."""
    values = [np.asarray(read_image(file).resize((256, 256)), dtype=np.float64) / 255 for file in photos(len).files]
    covariance = np.cov(np.concatenate([value.reshape(-1, 3) for value in values]).T, bias=True)
    colours = np.array(COLOURS)
    np.testing.assert_allclose(colours @ colours.T, covariance, atol=4e-5)
    np.testing.assert_allclose(colours.T @ colours, np.diag(np.diag(colours.T @ colours)), atol=2e-5)  # principal
    assert np.all(np.diff(np.linalg.norm(colours, axis=0)) < 0)
    assert np.all(colours[:, 0] > 0)  # lightness: all three alike


def test_colours_there_and_back() -> None:
    colours = principal_colours(noise(1))
    lengths = np.linalg.norm(COLOURS, axis=0)
    np.testing.assert_allclose(colours.numpy(), np.array(COLOURS) / lengths[0], rtol=1e-12)
    planes = noise(500, 3, 4, 4, seed=3)
    basis = Basis(3, 4, 4)
    coefficients = torch.view_as_real(torch.fft.rfft2(planes, norm="ortho") / basis.scale(planes) / 0.25)
    mixed = torch.logit(basis.pictures(coefficients))
    back = torch.einsum("kc,rchw->rkhw", torch.linalg.inv(colours), mixed)
    torch.testing.assert_close(back, planes, rtol=1e-9, atol=1e-9)
    found = torch.cov(mixed.transpose(0, 1).flatten(1))
    torch.testing.assert_close(found, colours @ colours.T, rtol=0, atol=0.04)
    assert torch.equal(
        Basis(2, 4, 4).pictures(coefficients[:, :2]), torch.sigmoid(Basis(2, 4, 4).planes(coefficients[:, :2]))
    )


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"height": 0}, {"width": 2**20}])
def test_sizes(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"pictures: expected {next(iter(wrong))} of 1 … 16384, found"):
        Basis(**({"channels": 3, "height": 4, "width": 4} | wrong))


# --- moves ---


def test_no_move_is_the_very_picture() -> None:
    picture = noise(1, 2, 6, 7)
    assert Transformation.drawn(torch.Generator().manual_seed(1), 0, 0.0, 0.0) == STILL
    assert STILL(picture, (6, 7)) is picture


def test_what_is_drawn() -> None:
    generator = torch.Generator().manual_seed(3)
    moves = [Transformation.drawn(generator, 3, 0.2, 15.0) for _ in range(800)]
    for values in ([move.down for move in moves], [move.right for move in moves]):
        assert set(values) == set(range(-3, 4))
        assert abs(np.mean(values)) < 0.3
    zooms, angles = [move.zoom for move in moves], [move.angle for move in moves]
    assert 0.8 <= min(zooms) < 0.81 < 1.19 < max(zooms) <= 1.2
    assert -15 <= min(angles) < -14.5 < 14.5 < max(angles) <= 15
    other = torch.Generator().manual_seed(3)  # however wide the ranges, the stream goes on at the same place
    for _ in range(800):
        Transformation.drawn(other, 0, 0.0, 0.0)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=other))


def test_rolls() -> None:
    picture = noise(2, 3, 5, 6)
    assert torch.equal(Transformation(down=2, right=-1)(picture, (5, 6)), picture.roll((2, -1), (2, 3)))


def test_turns_are_counter_clockwise() -> None:
    picture = noise(2, 3, 9, 9)
    for quarter in (1, 2, 3):
        turned = Transformation(angle=90.0 * quarter)(picture, (9, 9))
        torch.testing.assert_close(turned, torch.rot90(picture, quarter, (2, 3)), rtol=0, atol=1e-9)
    upright = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    upright[0, 0, :4, 4] = 1  # a hand that points to twelve
    turned = Transformation(angle=90.0)(upright, (9, 9))
    assert turned[0, 0, 4, :4].min() > 0.99  # now it points to nine


@pytest.mark.parametrize(("zoom", "angle"), [(1.0, 20.0), (1.25, 0.0), (1.3, -35.0), (1.6, 80.0)])
def test_a_ramp_stays_one_in_any_proportions(zoom: float, angle: float) -> None:
    """Bilinear resampling keeps what is linear, so that the move itself can be seen exactly."""
    height, width = 11, 17
    down, right = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) - 5, torch.arange(width, dtype=torch.float64) - 8, indexing="ij"
    )
    turned = Transformation(zoom=zoom, angle=angle)((2 * right - 3 * down).view(1, 1, height, width), (height, width))
    cos, sin = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    # what stands at (right, up) stood at the place that the inverse turn and zoom give
    before_right, before_up = cos * right + sin * -down, -sin * right + cos * -down
    inside = (before_right.abs() <= 8) & (before_up.abs() <= 5)
    assert int(inside.sum()) > 60
    torch.testing.assert_close(turned[0, 0][inside], (2 * before_right + 3 * before_up)[inside], rtol=0, atol=1e-9)


def test_another_size_is_a_bilinear_resampling() -> None:
    picture = noise(2, 3, 8, 10)
    expected = F.interpolate(picture, (5, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(STILL(picture, (5, 7)), expected, rtol=0, atol=1e-9)


def test_outside_is_mirrored() -> None:
    picture = torch.ones(1, 1, 6, 6, dtype=torch.float64) * 0.25
    torch.testing.assert_close(Transformation(zoom=0.6, angle=30.0)(picture, (6, 6)), picture, rtol=0, atol=1e-12)


def test_moves_have_gradients() -> None:
    picture = noise(1, 1, 5, 6).requires_grad_()
    move = Transformation(down=1, right=2, zoom=1.1, angle=12.0)
    assert torch.autograd.gradcheck(lambda value: move(value, (5, 6)), [picture])
