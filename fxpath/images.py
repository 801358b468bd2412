"""Pictures as a network's samples: folders, label files, foolbox's labelled photos, or a user's own data set."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, ImageOps
from torch.utils.data import Dataset, IterableDataset, Subset

from .errors import FxpathError, ImageError, InputError, unknown
from .image_labels import UNKNOWN, folder_labels, read_label_file
from .named import named_object, packaged
from .pictures import input_picture

Preprocess = Callable[[Image.Image], torch.Tensor]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# fmt: off
_CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
_NAMES = {
    "imagenet": (),  # torchvision holds its thousand names
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(_CIFAR100.split()),
    "mnist": tuple("0123456789"),
    "fashionMNIST": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                     "Ankle boot"),
}
# fmt: on


class ImageSamples(Dataset[tuple[torch.Tensor, int]]):
    """Pictures in files, read when asked for: item i is the input `(3, H, W)` float32 and the label (−1 = unknown).

    `ids` are unique and stay the same wherever the folder lies, `labels` are class numbers of `classes` (`()` if the
    names are not known), `why_no_labels` says why all labels are −1, and is empty otherwise.
    """

    def __init__(
        self,
        files: Sequence[Path],
        ids: Sequence[str],
        labels: Sequence[int],
        preprocess: Preprocess,
        *,
        classes: Sequence[str] = (),
        why_no_labels: str = "",
    ) -> None:
        if not len(files) == len(ids) == len(labels) == len(set(ids)):
            raise ImageError(
                f"images: expected as many distinct ids and labels as files, found {len(files)} files, "
                f"{len(set(ids))} distinct of {len(ids)} ids, {len(labels)} labels"
            )
        self.files = tuple(files)
        self.ids = tuple(ids)
        self.labels = tuple(labels)
        self.classes = tuple(classes)
        self.preprocess = preprocess
        self.why_no_labels = why_no_labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """Input and label of picture i; raises `ImageError` naming the file that cannot be read or prepared."""
        image = read_image(self.files[i])
        try:
            prepared = self.preprocess(image)
        except FxpathError:
            raise
        except Exception as failure:
            raise ImageError(
                f"image {self.files[i]}: the network's preprocessing failed with {type(failure).__name__}: {failure}"
            ) from failure
        if not isinstance(prepared, torch.Tensor):
            raise ImageError(
                f"image {self.files[i]}: expected a tensor from the preprocessing, found {type(prepared).__name__}; "
                "end it with torchvision.transforms.ToTensor()"
            )
        return prepared, self.labels[i]

    def thumbnail(self, i: int, size: int = 96) -> npt.NDArray[np.uint8]:
        """The middle square of picture i as `(size, size, 3)` uint8 RGB."""
        if size < 1:
            raise InputError(f"thumbnail: expected a size of 1 pixel or more, found {size}")
        fitted = ImageOps.fit(read_image(self.files[i]), (size, size), Image.Resampling.BICUBIC)
        return np.array(fitted, dtype=np.uint8)


def input_pictures(dataset: Any, names: Sequence[str], preprocessing: str = "") -> dict[str, npt.NDArray[np.uint8]]:
    """What a network sees of pictures, by id: each input of `dataset` as `input_picture` shows it, `(H, W, 3)` uint8.

    For figures that lay maps over photos. Raises `ImageError` for a name that is no id of the data set.
    """
    places = {str(name): place for place, name in enumerate(getattr(dataset, "ids", ()))}
    if missing := [name for name in names if name not in places]:
        raise ImageError(unknown("picture", missing[0], places, way_out="Give the pictures that the store was made of"))
    return {name: input_picture(torch.as_tensor(dataset[places[name]][0]).numpy(), preprocessing) for name in names}


def read_image(path: str | Path) -> Image.Image:
    """A picture file as RGB, 8 bits a channel, upright.

    EXIF orientation is honoured, what is transparent becomes white, 16-bit grey is scaled to 8 bits, and of an
    animation the first frame is taken. Raises `ImageError` for a file that is absent, truncated, no picture, of
    floating-point or 32-bit pixels, or larger than PIL's limit.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"image {path}: PIL has been told to fill up truncated pictures with grey; "
            "set PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False so that damaged files are noticed"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return _as_rgb(ImageOps.exif_transpose(opened))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as failure:
        raise ImageError(f"image {path}: {failure} Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS") from failure
    except Exception as failure:  # PIL's decoders raise many kinds, from SyntaxError to struct.error
        reason = getattr(failure, "strerror", None) or str(failure) or type(failure).__name__
        raise ImageError(f"image {path}: cannot be read ({reason}); mend it or move it out of the folder") from failure


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels outside 0 … 65535; save it with 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def load_images(
    spec: str | Path,
    preprocess: Preprocess,
    *,
    classes: Sequence[str] = (),
    labels: str | Path | None = None,
    limit: int | None = None,
) -> Dataset[Any]:
    """The pictures that `spec` names, for a network with this `preprocess` and these label names.

    `spec` is a folder (read with all its sub-folders, in sorted order, hidden files left out), `foolbox:NAME` (see
    `photos`), or `package.module:callable` returning a map-style data set, which is given back as it is. Labels come
    from the file `labels` (lines of file,label), else from the names of sub-folders if all pictures lie in such, else
    they are −1 and `why_no_labels` says why. `limit` takes the first pictures only. Raises `ImageError` with a way out.
    """
    if limit is not None and limit < 1:
        raise ImageError(f"images {spec}: expected a limit of 1 or more, found {limit}")
    text, folder = str(spec), Path(spec).expanduser()
    if ":" in text and not {"/", "\\"} & set(text) and not os.path.exists(folder):
        if labels is not None:
            raise ImageError(f"images {text}: a label file goes with a folder; these have labels of their own")
        if text.startswith("foolbox:"):
            return _fitted_photos(text.removeprefix("foolbox:"), preprocess, classes, limit)
        return _from_callable(text, limit)
    ids, folders = _pictures(folder)
    files = [folder / name for name in ids]
    known, why = _labels(folder, ids, folders, classes, labels)
    return ImageSamples(files[:limit], ids[:limit], known[:limit], preprocess, classes=classes, why_no_labels=why)


def _labels(
    folder: Path, ids: Sequence[str], folders: Sequence[str], classes: Sequence[str], labels: str | Path | None
) -> tuple[tuple[int, ...], str]:
    if labels is not None:
        return read_label_file(labels, ids, classes), ""
    none = (UNKNOWN,) * len(ids)
    tops = [name.partition("/")[0] for name in ids if "/" in name]
    if len(tops) < len(ids):
        why = f"pictures lie at the top of {folder}, not all in a sub-folder for each class; a label file settles it"
        return none, why
    numbers, why = folder_labels(sorted(set(tops)), folders, classes)
    return (none, why) if numbers is None else (tuple(numbers[top] for top in tops), "")


def _pictures(folder: Path) -> tuple[list[str], list[str]]:
    """All pictures below a folder, as paths relative to it sorted folder by folder; and its visible sub-folders."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, False also where permissions forbid to look
        what = "a file" if os.path.exists(folder) else "nothing there"
        raise ImageError(
            f"images {folder}: expected a folder of pictures, found {what}; give a folder, foolbox:imagenet, "
            "or package.module:callable"
        )
    folders: list[str] = []
    names = list(_walk(folder, "", (), folders))
    pictures = sorted((n for n in names if n.lower().endswith(SUFFIXES)), key=lambda name: name.split("/"))
    if not pictures:
        others = f" ({len(names)} files of other kinds)" if names else ""
        raise ImageError(f"images {folder}: no pictures found{others}; expected files ending in {', '.join(SUFFIXES)}")
    for name in pictures:
        try:
            name.encode()
        except UnicodeEncodeError as failure:
            raise ImageError(f"images {folder}: the name {os.fsencode(name)!r} is not UTF-8; rename it") from failure
    return pictures, sorted(name for name in folders if "/" not in name)


def _walk(folder: Path, prefix: str, above: tuple[str, ...], folders: list[str]) -> Iterator[str]:
    """Relative paths of all visible files; those of all visible folders are added to `folders`."""
    real = os.path.realpath(folder)
    if real in above:  # a link back to a folder that holds it
        return
    try:
        with os.scandir(folder) as scanned:
            entries = [(entry.name, entry.is_dir()) for entry in scanned if not entry.name.startswith(".")]
    except OSError as failure:
        raise ImageError(f"images {folder}: cannot be read ({failure.strerror}); check its permissions") from failure
    for name, is_folder in entries:
        if is_folder:
            folders.append(prefix + name)
            yield from _walk(folder / name, f"{prefix}{name}/", (*above, real), folders)
        else:
            yield prefix + name


def _from_callable(spec: str, limit: int | None) -> Dataset[Any]:
    found: Any = named_object(
        spec, kind="images", expected="a map-style data set", fits=_is_dataset, error=ImageError, prefixes=("foolbox",)
    )
    if not len(found):
        raise ImageError(f"images {spec}: the data set is empty")
    if limit is None or limit >= len(found):
        return found  # type: ignore[no-any-return]
    return Subset(found, range(limit))


def _is_dataset(value: object) -> bool:
    if isinstance(value, type | IterableDataset | str | Path):
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def photos(preprocess: Preprocess, name: str = "imagenet") -> ImageSamples:
    """foolbox's 20 labelled pictures of a data set: imagenet, cifar10, cifar100, mnist or fashionMNIST.

    The ids are `foolbox:imagenet_00_243` and so on; the last number is the label. Raises `ImageError` for another
    name, or when foolbox is not installed. Card: data/foolbox_photos.md.
    """
    if name not in _NAMES:
        raise ImageError(unknown("set of photos", name, _NAMES))
    data = packaged("foolbox", "data", error=ImageError, install="pip install 'fxpath[demo]'")
    files = sorted(data.glob(f"{name}_[0-9][0-9]_*"))
    if len(files) != 20:
        raise ImageError(f"images foolbox:{name}: expected 20 in {data}, found {len(files)}; install foolbox anew")
    labels = [int(file.stem.rpartition("_")[2]) for file in files]
    return ImageSamples(files, [f"foolbox:{file.stem}" for file in files], labels, preprocess, classes=_names(name))


def _names(name: str) -> tuple[str, ...]:
    if name != "imagenet":
        return _NAMES[name]
    from torchvision.models import SqueezeNet1_1_Weights

    return tuple(SqueezeNet1_1_Weights.DEFAULT.meta["categories"])


def _fitted_photos(name: str, preprocess: Preprocess, classes: Sequence[str], limit: int | None) -> ImageSamples:
    found = photos(preprocess, name)
    labels, names, why = found.labels, found.classes, ""
    if classes and len(classes) != len(names):
        why = f"the labels are those of {name} ({len(names)} classes), the network has {len(classes)}"
        labels, names = (UNKNOWN,) * len(labels), tuple(classes)
    return ImageSamples(
        found.files[:limit], found.ids[:limit], labels[:limit], preprocess, classes=names, why_no_labels=why
    )
