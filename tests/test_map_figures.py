"""Figures of attribution maps: the pictures are the maps, each in its place, and what is said of them is true."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from mapstore import MapsInMemory, sparse_maps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from readable import check_readable, drawn

from fxpath import mapfigures
from fxpath.analysis import map_statistics, map_statistics_by_sample
from fxpath.errors import InputError, StoreError
from fxpath.labels import MapName, looks, map_label
from fxpath.mapfigures import gini_figure, overview_figure, sample_figure
from fxpath.panels import text_lines, text_width

ROOT = Path(__file__).parents[1]
SERIES = tuple(f"{name}@{level}" for name in ("neuron_mct", "neuron_intgrad") for level in (0.9, 0.99))
METHODS = (
    "gradient", "neuron_mct@0.9", "masked_gradient:neuron_mct@0.9", "neuron_mct@0.9*", "occlusion:size=8,stride=8",
)  # fmt: skip
HEIGHT, WIDTH = 12, 16


def store(keys: Sequence[str] = METHODS, **changes: Any) -> MapsInMemory:
    arrays = {key: sparse_maps(3, HEIGHT, WIDTH, 0.3, seed) for seed, key in enumerate(keys)}
    return MapsInMemory(arrays, **changes)


def picture(height: int = 30, width: int = 40) -> npt.NDArray[np.uint8]:
    """The left half red, the right one blue."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return pixels


def panels(figure: Figure) -> list[Axes]:
    """The panels without the colour bar, line after line."""
    found = [ax for ax in figure.axes if ax.get_label().startswith("panel") and not ax.collections]
    return sorted(found, key=lambda ax: (-round(ax.get_position().y0, 4), ax.get_position().x0))


def grid(figure: Figure) -> list[list[Axes]]:
    """The panels in lines."""
    lines: dict[float, list[Axes]] = {}
    for ax in panels(figure):
        lines.setdefault(round(ax.get_position().y0, 4), []).append(ax)
    return list(lines.values())


def data(image: AxesImage) -> npt.NDArray[np.float64]:
    return np.ma.filled(image.get_array(), np.nan)


def said(figure: Figure) -> str:
    """All text outside panels, in one."""
    return " ".join(" ".join(text.get_text().split()) for text in figure.texts)


def check_apart(figure: Figure) -> None:
    """Readable, no text on other text or on a picture, and pictures keep their shape."""
    check_readable(figure)
    renderer = drawn(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts if text.get_text()]
    for number, (name, box) in enumerate(boxes):
        for other, place in boxes[number + 1 :]:
            assert not box.padded(-1).overlaps(place.padded(-1)), (name, other)
        for ax in panels(figure):
            assert not box.padded(-1).overlaps(ax.get_window_extent(renderer)), name
    for ax in panels(figure):
        place = ax.get_window_extent(renderer)
        assert place.width / place.height == pytest.approx(WIDTH / HEIGHT, rel=0.02)
        for text in ax.texts:
            box = text.get_window_extent(renderer)
            assert place.x0 <= box.x0
            assert box.x1 <= place.x1
            assert place.y0 - 2 <= box.y0
            assert box.y1 <= place.y1 + 2


def shaded(values: npt.NDArray[Any], percentile: float = 99.0) -> npt.NDArray[np.float64]:
    top = np.percentile(np.abs(values), percentile, method="lower")
    return np.clip(values.astype(np.float64) / float(top), -1, 1)


# --------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("gradient", "Gradient"),
        ("guided_backprop", "GuidedBackprop"),
        ("grad_cam:site=features.12", "GradCAM(site=features.12)"),
        ("input_intgrad", "InputIntGrad"),
        ("smooth_grad*", "SmoothGrad*"),
        ("occlusion:size=8,stride=8", "Occlusion(size=8, stride=8)"),
        ("active", "Active"),
        ("neuron_mct@0.9", "NeuronMCT, κ = 0.9"),
        ("dgr:init=1@0.95*", "DGR(init=1)*, κ = 0.95"),
        ("masked_gradient:dgr:init=1@0.9", "MaskedGradient of DGR(init=1), κ = 0.9"),
        ("random_active:active", "RandomActive like Active"),
    ],
)
def test_maps_have_names(key: str, label: str) -> None:
    assert map_label(key).replace("\xa0", " ") == label


def test_what_a_key_says() -> None:
    assert MapName.parse("active") == MapName("", "active", False)
    assert MapName.parse("random_active:neuron_mct@0.9*") == MapName("random_active", "neuron_mct@0.9", True)
    assert [MapName.parse(key).family for key in METHODS] == [
        "gradient", "neuron_mct", "masked_gradient:neuron_mct", "neuron_mct", "occlusion:size=8,stride=8",
    ]  # fmt: skip
    assert looks([MapName.parse("neuron_mct@0.9*").family])["neuron_mct"].colour == "#0072B2"


def test_text_is_set_in_lines_that_fit() -> None:
    words = "the sparsity 0.9 was not reached as_no_neuron_of_this_rather_long_name_scores here"
    lines = text_lines(words, 1.0, 20)
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")
    assert all(text_width(line) <= 1.0 for line in lines)
    cut = text_lines(words, 1.0, 3)
    assert (len(cut), cut[-1][-1]) == (3, "…")
    assert text_width(cut[-1]) <= 1.0
    assert text_lines("a b", 1.0, 1) == ["a b"]
    assert text_lines("", 1.0, 1) == [""]
    assert text_lines("W" * 5000, 0.5, 2)[1].endswith("…")
    assert text_width("$5 or $6") > text_width("5 or 6")  # no mathematics


# ------------------------------------------------------------------------------------------------------- overview


def test_overview_shows_each_map_on_its_own_scale() -> None:
    maps = store()
    figure = overview_figure(maps, [0, "photo-2.jpg"], METHODS, pictures={0: picture(), "photo-2.jpg": picture()})
    check_apart(figure)
    lines = grid(figure)
    assert [len(line) for line in lines] == [6, 6]
    for row, line in zip((0, 2), lines, strict=True):
        for key, ax in zip(METHODS, line[1:], strict=True):
            (image,) = ax.images
            np.testing.assert_allclose(data(image), shaded(np.abs(maps.arrays[key][row])), rtol=1e-12)
            assert (image.get_cmap().name, image.get_clim()) == ("inferno", (0, 1))
            assert data(image).max() == 1
    heads = [text.get_text().replace("\xa0", " ") for text in figure.texts if text.get_va() == "baseline"]
    assert heads[:4] == ["photo", "Gradient", "κ = 0.9", "NeuronMCT"]  # lines from below
    assert heads[4:9] == ["κ = 0.9", "of NeuronMCT", "MaskedGradient", "κ = 0.9", "NeuronMCT*"]
    assert heads[9:] == ["stride=8)", "(size=8,", "Occlusion"]
    assert "1 = 99th percentile of a map's |values|; above it all is clipped" in said(figure)
    for note in ("gradient through its pathway", "MaskedGradient: they are 0 instead.", "*: opened"):
        assert note in said(figure)
    assert "RandomActive" not in said(figure)
    assert "Thumbnails" not in said(figure)


def test_signed_maps_keep_their_sign() -> None:
    maps = store(["gradient", "smooth_grad"])
    figure = overview_figure(maps, [1], maps.map_keys, signed=True, percentile=95)
    check_apart(figure)
    (line,) = grid(figure)
    for key, ax in zip(maps.map_keys, line[1:], strict=True):
        np.testing.assert_allclose(data(ax.images[0]), shaded(maps.arrays[key][1], 95), rtol=1e-12)
        assert (ax.images[0].get_cmap().name, ax.images[0].get_clim()) == ("RdBu_r", (-1, 1))
    assert "1 = 95th percentile" in said(figure)
    assert "Red, positive; blue, negative." in said(figure)
    only = overview_figure(maps, [1], ["gradient"], signed=True, percentile=100)
    assert "1 = the largest |value| of a map" in said(only)
    assert "Red: the score of the class rises with the pixel's value; blue: it falls." in said(only)
    bars = [
        [bar.extend for bar in colour_bars(each)] for each in (figure, only, overview_figure(maps, [1], ["gradient"]))
    ]
    assert bars == [["both"], ["neither"], ["max"]]


def colour_bars(figure: Figure) -> list[Any]:
    return [ax._colorbar for ax in figure.axes if hasattr(ax, "_colorbar")]  # type: ignore[attr-defined]


def test_series_of_sparsities_have_a_line_a_method() -> None:
    keys = ("neuron_intgrad@0.99", "neuron_mct@0.99", "neuron_mct@0.9", "neuron_mct@0.7")
    maps = store(keys)
    figure = overview_figure(maps, [0, 1], keys, pictures={0: picture(), 1: picture()})
    check_apart(figure)
    lines = grid(figure)
    assert [len(line) for line in lines] == [2, 3, 2, 3]
    for row, (first, second) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        photo, last = first  # NeuronIntGrad, which is named first, has one sparsity
        assert data(photo.images[0]).shape == (HEIGHT, WIDTH, 3)
        np.testing.assert_allclose(data(last.images[0]), shaded(np.abs(maps.arrays["neuron_intgrad@0.99"][row])))
        assert last.get_position().x0 == pytest.approx(second[2].get_position().x0)
        assert photo.get_position().x1 < second[0].get_position().x0
        for level, ax in zip((0.7, 0.9, 0.99), second, strict=True):
            np.testing.assert_allclose(data(ax.images[0]), shaded(np.abs(maps.arrays[f"neuron_mct@{level}"][row])))
    heads = said(figure).replace("\xa0", " ")
    assert "photo κ = 0.7 κ = 0.9 κ = 0.99" in heads
    assert heads.count("κ = 0.99") == 1
    titles = [text.get_text() for text in figure.texts if text.get_rotation() == 90]
    assert titles == ["NeuronIntGrad", "NeuronMCT"] * 2
    assert figure.texts[0].get_text() == "NeuronIntGrad and NeuronMCT at sparsity κ, the share of neurons left out"


def test_one_method_s_series_needs_no_names_of_lines() -> None:
    maps = store(SERIES)
    figure = overview_figure(maps, [2], SERIES[:2])
    check_apart(figure)
    assert [len(line) for line in grid(figure)] == [3]
    assert figure.texts[0].get_text() == "NeuronMCT at sparsity κ, the share of neurons left out"
    assert not any(text.get_rotation() for text in figure.texts)
    both = overview_figure(maps, [2], ["neuron_mct@0.9", "neuron_intgrad@0.99"])  # no method has two
    assert both.texts[0].get_text().startswith("What each method finds relevant")
    assert [len(line) for line in grid(both)] == [3]


def test_many_methods_are_wrapped_and_named_in_every_line() -> None:
    keys = [*METHODS, *(f"occlusion:size={size}" for size in range(1, 7))]
    maps = store(keys)
    figure = overview_figure(maps, [0, 1], keys)
    check_apart(figure)
    lines = grid(figure)
    assert [len(line) for line in lines] == [6, 6, 6, 6]  # the photo among them
    shown = [data(ax.images[0]) for line in lines[2:] for ax in line if ax.images]
    for key, found in zip(keys, shown, strict=True):
        np.testing.assert_allclose(found, shaded(np.abs(maps.arrays[key][1])))
    assert said(figure).count("(size=6) Occlusion") == 2  # lines from below
    assert said(figure).count("MaskedGradient") == 2 + 1  # and the note


def test_a_map_that_is_missing_says_why() -> None:
    reason = "greedy_pruning: the sparsity $0.9$ was not reached, as no live neuron is left to prune at density 0.0931"
    maps = store(reason=reason, failed=(2,))
    maps.arrays["gradient"][0] = np.nan
    maps.arrays["neuron_mct@0.9"][0] = 0
    maps.arrays["neuron_mct@0.9*"][0, 0, 0] = np.inf
    maps.arrays["occlusion:size=8,stride=8"][0] = 0
    figure = overview_figure(maps, [0, 2], METHODS)
    check_apart(figure)
    first, second = grid(figure)
    reasons = [" ".join(text.get_text() for text in ax.texts).replace("\n", " ") for ax in first]
    assert reasons[0] == "no picture"
    assert reason.replace(" ", "").startswith(reasons[1].replace(" ", "").removesuffix("…"))
    assert "the sparsity $0.9$ was not reached" in reasons[1]
    assert reasons[2] == "all 0: the pathway does not reach the input"
    assert reasons[3] == ""
    assert reasons[4] == "holds values that are not finite"
    assert reasons[5] == "all 0"
    assert [len(ax.images) for ax in first] == [0, 0, 0, 1, 0, 0]
    assert [" ".join(text.get_text() for text in ax.texts) for ax in second[1:]] == ["not an image"] * 5
    assert all(np.allclose(ax.get_facecolor()[:3], 0.9) for ax in second[1:])


def test_a_sparse_map_is_scaled_by_what_is_not_zero() -> None:
    values = np.zeros((3, 30, 40), dtype=np.float32)
    values[:2, 3, 4:14] = [-1, 2, 3, 4, 5, 6, 7, 8, 9, 20]
    values[1, 4] = 30
    maps = MapsInMemory({"gradient": values})
    figure = overview_figure(maps, [0], ["gradient"])
    shown = data(grid(figure)[0][1].images[0])
    assert shown[3, 4:14].tolist() == pytest.approx([1 / 9, 2 / 9, 1 / 3, 4 / 9, 5 / 9, 2 / 3, 7 / 9, 8 / 9, 1, 1])
    assert np.count_nonzero(shown) == 10
    assert "(where that is 0, of those other than 0)" in said(figure)
    assert "(where that is 0" not in said(overview_figure(maps, [1], ["gradient"]))
    check_apart(figure)


# --------------------------------------------------------------------------------------------- photos and captions


def test_photos_have_the_frame_and_the_size_of_the_maps() -> None:
    maps = store(thumbnails=np.full((3, 6, 6, 3), 77, dtype=np.uint8))
    large = picture(300, 200)
    figure = overview_figure(maps, [0, 1, 2], ["gradient"], pictures={0: large, "photo-1.jpg": picture(HEIGHT, WIDTH)})
    check_readable(figure)
    first, second, third = (line[0] for line in grid(figure))
    expected = np.asarray(Image.fromarray(large).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(data(first.images[0]), expected)
    assert (data(first.images[0])[:, :4] == [255, 0, 0]).all()
    assert (data(first.images[0])[:, -4:] == [0, 0, 255]).all()
    np.testing.assert_array_equal(data(second.images[0]), picture(HEIGHT, WIDTH))
    assert (data(third.images[0]) == 77).all()
    assert data(third.images[0]).shape == (6, 6, 3)  # as it is: it is not known what it shows
    assert "photo" in said(figure).split()
    assert "Thumbnails show the middle of a photo" in said(figure)
    assert "thumbnail" in said(overview_figure(maps, [2], ["gradient"])).split()


@pytest.mark.parametrize(
    ("changes", "caption"),
    [
        ({}, "predicted: folding chair, p = 0.51"),
        ({"label": [0, 0, 0]}, "predicted: folding chair, p = 0.51; labelled: bull mastiff"),
        ({"label": [-1, -1, -1]}, "predicted: folding chair, p = 0.51"),
        (
            {"target": [2, 2, 2], "label": [2, 2, 2]},
            "explained: beaker, p = 0.51; predicted: folding chair",
        ),
        ({"prediction": [-1, -1, -1], "probability": [np.nan] * 3}, "explained: folding chair"),
        ({"target": [-1, -1, -1], "prediction": [-1, -1, -1], "label": [-1, -1, -1]}, ""),
        ({"target": [7, 7, 7], "prediction": [7, 7, 7]}, "predicted: class 7, p = 0.51; labelled: folding chair"),
    ],
)
def test_captions_say_the_class_and_its_probability(changes: dict[str, list[Any]], caption: str) -> None:
    maps = store(changes=changes)
    for figure in (overview_figure(maps, [1], METHODS), sample_figure(maps, 1, METHODS)):
        check_apart(figure)
        bold = [text.get_text() for text in figure.texts if text.get_weight() == "bold"]
        assert bold == [caption]
        assert "photo-1.jpg" in [text.get_text() for text in figure.texts]


def test_samples_without_a_label_in_a_store_without_class_names() -> None:
    maps = store(classes=(), changes={"label": [-1] * 3})
    for figure in (overview_figure(maps, [1], METHODS), sample_figure(maps, 1, METHODS)):
        assert [text.get_text() for text in figure.texts if text.get_weight() == "bold"] == [
            "predicted: class 1, p = 0.51"
        ]


def test_long_names_are_cut_and_no_mathematics() -> None:
    names = tuple(
        f"a/long_folder/of $photos$/n02124075/another_folder/ILSVRC2012_val_{row:08d} $x_2$.JPEG" for row in range(3)
    )
    classes = ("a very long class name, with its synonyms, as ImageNet has them, and more of them", "$\\frac{$", "c")
    maps = store(names=names, classes=classes, changes={"label": [1, 1, 1]})
    for figure in (overview_figure(maps, list(names), METHODS), sample_figure(maps, 0, METHODS)):
        check_apart(figure)
        ids = [text.get_text() for text in figure.texts if text.get_horizontalalignment() == "right"]
        assert ids[0].endswith("JPEG")
        assert ids[0].startswith("…")
    assert figure.texts[0].get_text().startswith("predicted: a very long class name")
    assert figure.texts[0].get_text().endswith("…")
    short = overview_figure(maps, [1], METHODS)
    assert "predicted: $\\frac{$, p = 0.51" in said(short)


# ---------------------------------------------------------------------------------------------- one sample, large


@pytest.mark.parametrize("signed", [False, True])
def test_a_sample_s_maps_lie_over_the_grey_photo(signed: bool) -> None:
    maps = store()
    keys = METHODS[:3]
    figure = sample_figure(maps, "photo-1.jpg", keys, picture=picture(), signed=signed)
    check_apart(figure)
    upper, lower = grid(figure)
    assert (len(upper), len(lower)) == (4, 3)
    assert data(upper[0].images[0]).shape == (HEIGHT, WIDTH, 3)
    grey = np.asarray(Image.fromarray(picture(HEIGHT, WIDTH)).convert("L")) / 255
    for key, above, below in zip(keys, upper[1:], lower, strict=True):
        values = maps.arrays[key][1]
        expected = shaded(values if signed else np.abs(values))
        photo, over = below.images
        np.testing.assert_allclose(data(above.images[0]), expected, rtol=1e-12)
        np.testing.assert_allclose(data(over), expected, rtol=1e-12)
        np.testing.assert_allclose(over.get_alpha(), np.minimum(1.5 * np.abs(expected), 1), rtol=1e-12)
        np.testing.assert_allclose(data(photo), 0.6 * grey + 0.4 * signed, atol=0.02)
        assert over.get_extent() == photo.get_extent() == above.images[0].get_extent()
        assert below.get_position().x0 == pytest.approx(above.get_position().x0)
        assert f"full colour: {np.percentile(np.abs(values), 99, method='lower'):.2g}" in said(figure)
    assert "Below each map stands the value of its full colour, in score per unit of the input." in said(figure)
    assert "the map over the photo" in said(figure)


def test_without_the_input_s_picture_nothing_is_laid_over_it() -> None:
    maps = store(thumbnails=np.full((3, 6, 8, 3), 77, dtype=np.uint8))
    figure = sample_figure(maps, 1, METHODS)
    check_apart(figure)
    assert [len(line) for line in grid(figure)] == [4, 3]  # five maps in two lines, the thumbnail beside both
    assert all(len(ax.images) == 1 for ax in panels(figure))
    assert "over the photo" not in said(figure)
    assert said(figure).split().count("thumbnail") == 2
    assert "in score per unit of the input" not in said(figure)  # of occlusion, too


def test_one_map_stands_between_photo_and_overlay() -> None:
    maps = store()
    figure = sample_figure(maps, 0, ["gradient"], picture=picture())
    check_apart(figure)
    (line,) = grid(figure)
    assert [len(ax.images) for ax in line] == [1, 1, 2]
    left, middle, right = (ax.get_position().x0 for ax in line)
    assert right - middle == pytest.approx(middle - left)
    assert "photo Gradient the map over the photo" in said(figure)
    maps.arrays["gradient"][0] = np.nan
    gone = sample_figure(maps, 0, ["gradient"], picture=picture())
    check_apart(gone)
    assert [len(ax.images) for ax in grid(gone)[0]] == [1, 0]
    assert "full colour: " not in said(gone)


# ----------------------------------------------------------------------------------------------------- Gini index


def tables(maps: MapsInMemory) -> tuple[pd.DataFrame, pd.DataFrame]:
    dots = map_statistics_by_sample(maps, progress=False)
    return map_statistics(maps, None, dots), dots


def test_gini_figure_shows_samples_means_and_intervals() -> None:
    keys = (*METHODS, "dgr:gamma=0.05,init=1@0.9", "smooth_grad")
    arrays = {
        key: sparse_maps(12, 6, 7, share, seed)
        for seed, (key, share) in enumerate(zip(keys, np.linspace(0, 0.9, 7), strict=True))
    }
    arrays["neuron_mct@0.9"][:5] = 0
    arrays["smooth_grad"][:] = np.nan
    statistics, dots = tables(MapsInMemory(arrays))
    figure = gini_figure(statistics, dots)
    check_readable(figure)
    ax, right = figure.axes
    names = [text.get_text().replace("\n", " ") for text in ax.get_yticklabels()]
    assert names == [map_label(key) for key in keys]
    lines = ax.get_lines()
    for place, row in enumerate(statistics.to_dict("records")):
        points, interval, mean = lines[3 * place : 3 * place + 3]
        expected = dots.loc[dots["key"] == row["key"], "gini"].to_numpy()
        np.testing.assert_array_equal(points.get_xdata(), expected)
        assert np.abs(np.asarray(points.get_ydata()) - place).max(initial=0) <= 0.25
        assert len(set(np.asarray(points.get_ydata()).tolist())) == len(expected)
        np.testing.assert_array_equal(interval.get_xdata(), [row["low"], row["high"]])
        np.testing.assert_array_equal(mean.get_xdata(), [row["gini"]])
    said_right = [text.get_text() for text in right.get_yticklabels()]
    assert said_right[0] == f"{statistics['gini'][0]:.3f}   0 %"
    zeros = 100 * statistics["zero_share"]
    assert said_right[1] == f"{statistics['gini'][1]:.3f}   {zeros[1]:.2g} %\n5 of 12 all 0"
    assert said_right[6] == "no map"
    statistics.loc[0, "zero_share"] = 0.0004
    assert gini_figure(statistics, dots).axes[1].get_yticklabels()[0].get_text().endswith("   < 0.1 %")


def test_gini_figure_sets_stores_side_by_side() -> None:
    one, two = tables(store()), tables(store(METHODS[:2]))
    figure = gini_figure({"a $b$": one[0], "small": two[0]}, {"a $b$": one[1], "small": two[1]})
    check_readable(figure)
    assert [ax.get_title() for ax in figure.axes[:2]] == ["a $b$", "small"]
    assert [len(ax.get_lines()) for ax in figure.axes[:2]] == [15, 6]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_says_what_was_expected() -> None:
    maps = store()
    for samples, found in (([], 0), ([0] * 41, 41)):
        with pytest.raises(InputError, match=f"expected 1 to 40 samples, found {found}"):
            overview_figure(maps, samples, METHODS)
    for percentile in (0, 101, -3.0):
        with pytest.raises(InputError, match=r"expected a percentile in \(0, 100\], found"):
            overview_figure(maps, [0], METHODS, percentile=percentile)
    for key in ("gradiant", "neuron_mct@0.8"):
        with pytest.raises(StoreError, match="there is no map"):
            sample_figure(maps, 0, [key])
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(InputError, match=r"picture of 'photo-0\.jpg': expected \(h, w, 3\) uint8 RGB, found"):
            sample_figure(maps, 0, METHODS, picture=wrong)
    statistics, dots = tables(maps)
    for one, two in ((dots, dots), (statistics, statistics)):
        with pytest.raises(InputError, match=r"expected the table of analysis\.map_statistics"):
            gini_figure(one, two)
    with pytest.raises(InputError, match="expected both tables of each store, found"):
        gini_figure({"a": statistics}, {"b": dots})
    with pytest.raises(InputError, match="expected a row of analysis"):
        gini_figure(statistics[:0], dots)


def test_figures_leave_torch_pyplot_and_settings_alone() -> None:
    code = (
        "import sys, matplotlib; from matplotlib import rcParams as now; "
        "before = {name: now[name] for name in now if name != 'backend'}; "
        "import fxpath.mapfigures, fxpath.pictures, fxpath.analysis.maps; "
        "assert {name: now[name] for name in now if name != 'backend'} == before; "
        "print([name for name in ('torch', 'matplotlib.pyplot', 'pandas', 'scipy.stats') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------- script


@pytest.mark.parametrize("images", [False, True])
def test_the_script_goes_from_stores_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], images: bool
) -> None:
    for number in range(3):
        Image.fromarray(picture()).save(tmp_path / f"photo-{number}.png")
    names = tuple(f"photo-{number}.png" for number in range(3))
    monkeypatch.setattr("fxpath.store.open_store", lambda path: store(METHODS[:3], names=names, failed=(0,)))
    options = ["--samples", "2", "--key", "neuron_mct@0.9", "--key", "gradient"]
    options += ["--images", str(tmp_path)] if images else []
    monkeypatch.setattr(sys, "argv", ["attribution.py", "run.h5", "-o", str(tmp_path / "out"), *options])
    monkeypatch.syspath_prepend(str(ROOT / "analyses"))
    drawn_samples: list[Figure] = []
    original = sample_figure

    def keep(*given: Any, **named: Any) -> Figure:
        drawn_samples.append(original(*given, **named))
        return drawn_samples[-1]

    monkeypatch.setattr(mapfigures, "sample_figure", keep)
    runpy.run_path(str(ROOT / "analyses" / "attribution.py"), run_name="__main__")
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["gini.png", *(f"run/{name}" for name in (
        "by_sample.csv", "differences.csv", "overview.png", "sample_0.png", "sample_1.png", "statistics.csv",
    ))]  # fmt: skip
    table = pd.read_csv(tmp_path / "out" / "run" / "statistics.csv")
    assert table["key"].tolist() == ["neuron_mct@0.9", "gradient"]
    assert table["samples"].tolist() == [2, 2]
    differences = pd.read_csv(tmp_path / "out" / "run" / "differences.csv")
    assert differences[["first", "second"]].to_numpy().tolist() == [["neuron_mct@0.9", "gradient"]]
    assert f"{differences['p'][0]:.4f}" in capsys.readouterr().out
    assert [len(grid(figure)) for figure in drawn_samples] == [2 if images else 1] * 2
    assert "photo-1.png" in said(drawn_samples[0])  # the first that is ok
    if images:
        shown = data(grid(drawn_samples[0])[0][0].images[0])
        assert shown[0, 0].tolist() == pytest.approx([255, 0, 0], abs=1)


def test_the_script_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "analyses" / "attribution.py"), "nothing.h5", "-o", str(tmp_path / "out")]
    wrong = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert wrong.returncode == 2
    assert "nothing.h5: there is no such file" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "out").exists()
