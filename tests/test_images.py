from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Subset

from fxpath import images, named
from fxpath.errors import ImageError, InputError
from fxpath.images import ImageSamples, load_images, photos, read_image


def preprocess(image: Image.Image) -> torch.Tensor:
    """The colour of the middle: (3, 1, 1)."""
    assert image.mode == "RGB"
    pixel = image.getpixel((image.width // 2, image.height // 2))
    return torch.tensor(pixel, dtype=torch.float32).view(3, 1, 1)


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(read_image(path))


def folder(root: Path, names: Sequence[str], *, colour: tuple[int, int, int] = (10, 20, 30)) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), colour).save(path)
    return root


def samples(spec: str | Path, **options: Any) -> ImageSamples:
    found = load_images(spec, preprocess, **options)
    assert isinstance(found, ImageSamples)
    return found


# ---- folders


def test_a_folder_is_read_whole_in_sorted_order(tmp_path: Path) -> None:
    names = ["b.png", "a-b/c.jpg", "a/z.PNG", "a/b/c.bmp", "a.tiff", ".hidden.png", ".cache/x.png", "a/.trash/y.png"]
    folder(tmp_path, names)
    (tmp_path / "notes.txt").write_text("no picture")
    found = samples(tmp_path)
    # folder by folder: "a" before "a-b", though "-" sorts before "/"
    assert found.ids == ("a/b/c.bmp", "a/z.PNG", "a-b/c.jpg", "a.tiff", "b.png")
    assert len(found) == 5
    assert found.labels == (-1,) * 5
    assert "at the top" in found.why_no_labels
    assert samples(str(tmp_path)).ids == found.ids
    assert samples(tmp_path, limit=2).ids == found.ids[:2]
    assert samples(tmp_path, limit=99).ids == found.ids


def test_items_are_input_and_label(tmp_path: Path) -> None:
    folder(tmp_path, ["0/a.png"], colour=(1, 2, 3))
    folder(tmp_path, ["2/a.png"], colour=(4, 5, 6))
    found = samples(tmp_path, classes=("x", "y", "z"))
    assert (found.ids, found.labels, found.why_no_labels) == (("0/a.png", "2/a.png"), (0, 2), "")
    tensor, label = found[1]
    assert tensor.tolist() == [[[4.0]], [[5.0]], [[6.0]]]
    assert label == 2
    assert [label for _, label in found] == [0, 2]  # iteration ends
    batches = list(DataLoader(found, batch_size=2, num_workers=1, multiprocessing_context="spawn"))
    assert batches[0][0].flatten(1).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batches[0][1].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["Golden_Retriever/a.png", "tench/b.png", "tench/deep/c.png"], ("tench", "golden retriever"), (1, 0, 0)),
        (["1/a.png", "0/b.png"], (), (0, 1)),
        (["n2/a.png", "n1/b.png"], ("first", "second"), (0, 1)),
        (["n2/a.png", "n1/b.png"], ("first", "second", "third"), (-1, -1)),
        (["0/a.png", "b.png"], ("first", "second"), (-1, -1)),
    ],
)
def test_labels_come_from_the_folders(
    tmp_path: Path, names: list[str], classes: tuple[str, ...], labels: tuple[int, ...]
) -> None:
    found = samples(folder(tmp_path, names), classes=classes)
    assert found.labels == labels
    assert found.classes == classes
    assert bool(found.why_no_labels) == (-1 in labels)


def test_sorted_folders_count_as_in_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    folder(tmp_path, ["wolf/a.png", "ant/b.png", "cat/c.png", "ant/a.png"])
    theirs = ImageFolder(str(tmp_path))
    found = samples(tmp_path, classes=("A", "B", "C"))
    assert [str(tmp_path / name) for name in found.ids] == [path for path, _ in theirs.samples]
    assert list(found.labels) == theirs.targets


def test_an_empty_class_folder_still_counts(tmp_path: Path) -> None:
    folder(tmp_path, ["n0/a.png", "n2/b.png"])
    (tmp_path / "n1").mkdir()
    (tmp_path / ".git").mkdir()
    assert samples(tmp_path, classes=("x", "y", "z")).labels == (0, 2)


def test_a_label_file_goes_before_the_folders(tmp_path: Path) -> None:
    folder(tmp_path / "photos", ["0/a.png", "1/b.png"])
    (tmp_path / "labels.csv").write_text("file,label\n1/b.png,x\n0/a.png,1\n")
    found = samples(tmp_path / "photos", classes=("x", "y"), labels=tmp_path / "labels.csv", limit=1)
    assert (found.ids, found.labels, found.why_no_labels) == (("0/a.png",), (1,), "")
    (tmp_path / "labels.csv").write_text("0/a.png,1\n")
    with pytest.raises(ImageError, match=r"1 of 2 images have no label: 1/b\.png"):
        samples(tmp_path / "photos", classes=("x", "y"), labels=tmp_path / "labels.csv", limit=1)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder(tmp_path, ["real/a.png", "photos/b.png"])
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "photos" / "circle").symlink_to(tmp_path / "photos")
    assert samples(tmp_path / "photos").ids == ("b.png", "linked/a.png")


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"absent: expected a folder of pictures, found nothing there; give a folder"):
        samples(tmp_path / "absent")
    with pytest.raises(ImageError, match=r"no pictures found; expected files ending in \.bmp"):
        samples(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match=r"no pictures found \(1 files of other kinds\)"):
        samples(tmp_path)
    with pytest.raises(ImageError, match="found a file"):
        samples(tmp_path / "notes.txt")
    folder(tmp_path, ["a.png"])
    with pytest.raises(ImageError, match="expected a limit of 1 or more, found 0"):
        samples(tmp_path, limit=0)

    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ImageError, match=r"cannot be read \(Permission denied\); check its permissions"):
        samples(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path, ["a.png"]) / "a.png"
    source.rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    with pytest.raises(ImageError, match=r"the name b'\\xff\.png' is not UTF-8; rename it"):
        samples(tmp_path)


def test_ids_and_labels_must_fit_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    with pytest.raises(ImageError, match="found 2 files, 1 distinct of 2 ids, 2 labels"):
        ImageSamples([file, file], ["a", "a"], [0, 0], preprocess)


# ---- single pictures


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    ramp = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    grey = np.repeat(ramp[..., None], 3, axis=2)

    Image.fromarray(ramp).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(tmp_path / "grey.png"), grey)

    wide = (ramp.astype(np.uint16) * 257).astype(np.uint16)  # 65535 is white
    for name in ("wide.png", "wide.tif"):
        Image.fromarray(wide).save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name), grey)
    Image.fromarray(wide.astype(np.int32)).save(tmp_path / "wider.tif")
    assert np.array_equal(pixels(tmp_path / "wider.tif"), grey)

    palette = Image.fromarray(ramp).convert("P")
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(pixels(tmp_path / "palette.png"), grey)

    Image.fromarray(ramp > 100).save(tmp_path / "bits.png")
    assert np.array_equal(pixels(tmp_path / "bits.png")[..., 0], (ramp > 100) * 255)

    Image.new("CMYK", (8, 6), (255, 0, 0, 0)).save(tmp_path / "cmyk.tif")  # all cyan ink, no other
    assert np.array_equal(pixels(tmp_path / "cmyk.tif")[0, 0], [0, 255, 255])
    Image.new("CMYK", (8, 6), (0, 0, 0, 255)).save(tmp_path / "cmyk.jpg")
    assert pixels(tmp_path / "cmyk.jpg").max() < 5  # black ink is black


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    colours = np.zeros((6, 8, 4), dtype=np.uint8)
    colours[..., 0] = 200
    colours[:, :4, 3] = 255
    colours[:, 4, 3] = 128
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    read = pixels(tmp_path / "rgba.png")
    assert read[0, 0].tolist() == [200, 0, 0]
    assert read[0, 7].tolist() == [255, 255, 255]
    assert abs(int(read[0, 4, 1]) - 127) <= 1

    Image.new("LA", (8, 6), (0, 0)).save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png").min() == 255
    palette = Image.new("P", (8, 6), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=1)
    assert pixels(tmp_path / "p.png").min() == 255
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "key.png").min() == 255


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: what was left is on top
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = pixels(tmp_path / "turned.jpg")
    assert read.shape == (64, 32, 3)
    assert read[8, 16].min() > 240
    assert read[56, 16].max() < 15


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "moving.gif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tif", "webp", "ppm"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    assert pixels(path).shape == (40, 50, 3)
    path.write_bytes(whole[: int(len(whole) * share)])
    found = samples(tmp_path)
    with pytest.raises(ImageError, match=rf"cut\.{suffix}: cannot be read \(.*\); mend it or move it out"):
        found[0]
    with pytest.raises(ImageError, match=rf"cut\.{suffix}"):
        found.thumbnail(0)


def test_files_that_are_no_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "nothing.png").touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = samples(tmp_path)
    assert found.ids == ("gone.png", "nothing.png", "text.jpg")
    for i, said in enumerate((r"gone\.png: cannot be read \(No such file", r"nothing\.png", r"text\.jpg: .*identify")):
        with pytest.raises(ImageError, match=said):
            found[i]
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"float\.tif: cannot be read \(floating-point pixels.* 8 or 16 bits"):
        read_image(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), -1, dtype=np.int32)).save(tmp_path / "signed.tif")
    with pytest.raises(ImageError, match=r"signed\.tif: cannot be read \(32-bit pixels outside 0 … 65535"):
        read_image(tmp_path / "signed.tif")


@pytest.mark.parametrize("limit", [47, 20])  # PIL warns above its limit and raises above twice that
def test_a_picture_beyond_pils_limit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    folder(tmp_path, ["large.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=r"large\.png: Image size \(48 pixels\) exceeds .*MAX_IMAGE_PIXELS"):
        samples(tmp_path)[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48)
    assert samples(tmp_path)[0][0].shape == (3, 1, 1)


def test_pil_must_not_fill_up_truncated_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = samples(folder(tmp_path, ["a.png"]))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES = False"):
        found[0]


def test_a_preprocessing_that_fails_names_the_picture(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png"])

    def breaks(image: Image.Image) -> torch.Tensor:
        raise ValueError("no such crop")

    def unfit(image: Image.Image) -> torch.Tensor:
        raise InputError("clips only")

    with pytest.raises(ImageError, match=r"a\.png: the network's preprocessing failed with ValueError: no such crop"):
        load_images(tmp_path, breaks)[0]
    with pytest.raises(ImageError, match=r"a\.png: expected a tensor from the preprocessing, found Image"):
        load_images(tmp_path, lambda image: image)[0]  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="clips only"):
        load_images(tmp_path, unfit)[0]


def test_thumbnails_are_the_middle_square(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    image.save(tmp_path / "a.png")
    found = samples(tmp_path)
    thumbnail = found.thumbnail(0)
    assert (thumbnail.shape, thumbnail.dtype) == ((96, 96, 3), np.uint8)
    assert np.array_equal(thumbnail[48, 8], [0, 0, 255])
    assert found.thumbnail(0, size=7).shape == (7, 7, 3)
    with pytest.raises(InputError, match="1 pixel or more, found 0"):
        found.thumbnail(0, size=0)


# ---- foolbox's photos


def test_the_photos_are_twenty_labelled_pictures_in_order() -> None:
    found = photos(preprocess)
    assert found.ids[0] == "foolbox:imagenet_00_243"
    assert found.ids[19] == "foolbox:imagenet_19_305"
    assert [int(name.split("_")[1]) for name in found.ids] == list(range(20))
    assert found.labels == (
        243, 559, 438, 990, 949, 853, 609, 609, 915, 455, 541, 630, 741, 471, 129, 99, 251, 22, 317, 305,
    )  # fmt: skip
    assert [found.classes[label] for label in found.labels[-3:]] == ["bald eagle", "leafhopper", "dung beetle"]
    tensor, label = found[17]
    assert tensor.shape == (3, 1, 1)
    assert label == 22


@pytest.mark.parametrize(
    ("name", "size", "first", "classes"),
    [
        ("cifar10", 32, "cat", 10),
        ("cifar100", 32, "mountain", 100),
        ("mnist", 28, "7", 10),
        ("fashionMNIST", 28, "Ankle boot", 10),
    ],
)
def test_the_small_sets(name: str, size: int, first: str, classes: int) -> None:
    found = photos(preprocess, name)
    assert len(found) == 20
    assert len(found.classes) == len(set(found.classes)) == classes
    assert found.classes[found.labels[0]] == first
    assert read_image(found.files[0]).size == (size, size)
    assert all(name.startswith(f"foolbox:{found.ids[0][8:].split('_')[0]}_") for name in found.ids)


def test_photos_through_a_spec() -> None:
    assert samples("foolbox:imagenet", limit=3).ids == photos(preprocess).ids[:3]
    names = photos(preprocess).classes
    assert samples("foolbox:imagenet", classes=names).labels == photos(preprocess).labels
    other = samples("foolbox:cifar10", classes=names)
    assert set(other.labels) == {-1}
    assert other.why_no_labels == "the labels are those of cifar10 (10 classes), the network has 1000"
    assert samples("foolbox:cifar10").labels[:3] == (3, 8, 8)


def test_photos_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"no set of photos 'imagnet'; nearest: imagenet"):
        samples("foolbox:imagnet")
    with pytest.raises(ImageError, match="a label file goes with a folder"):
        samples("foolbox:imagenet", labels=tmp_path / "labels.csv")
    monkeypatch.setattr(images, "packaged", lambda *path, **options: tmp_path)
    with pytest.raises(ImageError, match=r"expected 20 in .*, found 0; install foolbox anew"):
        photos(preprocess)
    monkeypatch.undo()
    monkeypatch.setattr(named, "find_spec", lambda package: None)
    with pytest.raises(ImageError, match=r"foolbox is not installed; pip install 'fxpath\[demo\]'"):
        photos(preprocess)
    assert "foolbox" not in sys.modules


# ---- a user's own data set

OWN = """
import torch
from torch.utils.data import IterableDataset, TensorDataset
data = TensorDataset(torch.arange(5.0), torch.arange(5))
def build():
    return data
def empty():
    return []
class Stream(IterableDataset):
    def __iter__(self):
        yield 1
def word():
    return "word"
"""


@pytest.fixture
def own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module own_images in the current folder, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "own_images.py").write_text(OWN)
    yield
    sys.modules.pop("own_images", None)


@pytest.mark.usefixtures("own_images")
def test_a_users_data_set_is_given_back_as_it_is(tmp_path: Path) -> None:
    own = load_images("own_images:build", preprocess)
    assert own is sys.modules["own_images"].data
    assert load_images("own_images:data", preprocess, limit=5) is own
    first = load_images("own_images:build", preprocess, limit=2)
    assert isinstance(first, Subset)
    assert [item[1].item() for item in first] == [0, 1]
    for spec, said in {
        "own_images:empty": "own_images:empty: the data set is empty",
        "own_images:Stream": "expected the callable to return a map-style data set, found Stream",
        "own_images:word": "expected the callable to return a map-style data set, found str",
        "own_imagse:build": r"no module or prefix 'own_imagse'",
        "folbox:imagenet": r"nearest: foolbox",
        "own_images:bulid": r"nearest: build",
    }.items():
        with pytest.raises(ImageError, match=said):
            load_images(spec, preprocess)
    with pytest.raises(ImageError, match="a label file goes with a folder"):
        load_images("own_images:build", preprocess, labels=tmp_path / "labels.csv")


def test_a_folder_whose_name_holds_a_colon_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path, ["photos:2024/a.png"])
    assert samples("photos:2024").ids == ("a.png",)
