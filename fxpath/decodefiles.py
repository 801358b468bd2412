"""The files of one decoded photo: a picture of each row, figures, curves, and last the numbers that say it is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .decodefigures import Panel, curves_figure, pictures_figure, row_label, save_picture
from .decodephoto import PhotoDecoding, Task, channels_of, shown
from .features import visualise
from .files import appearing, save_table
from .items import Item
from .plotting import save

if TYPE_CHECKING:
    import pandas as pd

DONE = "decoded.json"
FEATURES = "features"  # the folder of channels


@dataclass(frozen=True, eq=False)
class PhotoFiles:
    """How the photos of a task are written into its folder; `digest` tells the job from others."""

    task: Task
    folder: Path
    digest: str
    classes: tuple[str, ...]

    def write(self, folder: Path, item: Item, content: str, found: PhotoDecoding) -> None:
        """Write a photo's files; `decoded.json`, which says that it is done, last. `content` is the input's hash."""
        said = self._numbers(item, found) | {"job": self.digest, "input": content}
        self._pictures(folder, found, said)
        table = _curves(found, said)
        save_table(table, folder / "curves.csv")
        save(curves_figure(table, said["photo"]), folder / "curves.png")
        write_json(said, folder / DONE)

    def finished(self, folder: Path, content: str) -> bool:
        """Whether a photo's files are there, of this job and this content."""
        try:
            said = json.loads((folder / DONE).read_text(encoding="utf-8"))
            same = (said["job"], said["input"]) == (self.digest, content)
            names = [row["file"] for row in said["rows"]] + [row["file"] for row in said["features"]]
            return same and all((folder / name).is_file() for name in names if name)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _numbers(self, item: Item, found: PhotoDecoding) -> dict[str, Any]:
        """All numbers of a photo as JSON data; files are relative to the photo's folder."""
        decoded, chosen = found.decoded, found.chosen
        target = None if decoded.target is None else int(decoded.target[0])
        rows: list[dict[str, Any]] = []
        for number, label in enumerate(decoded.labels):
            pathways = chosen.pathways[label]
            rows.append({
                "row": label, "density": 1.0 if pathways is None else float(pathways.density[0]),
                "photo_response": float(decoded.photo[number]), "first": float(decoded.responses[number, 0]),
                "response": float(decoded.response[number]), "original_response": float(decoded.original[number]),
                "noise": float(decoded.strength[number]), "climbed": bool(decoded.climbed[number]), "missing": "",
                "file": f"row_{file_name(label)}.png",
            })  # fmt: skip
        rows += [{"row": key, "missing": reason, "file": "", "first": None} for key, reason in chosen.missing.items()]
        features: list[dict[str, Any]] = []
        for site, tops in found.tops.items():
            for key in (*chosen.scores, *chosen.missing):
                top, missing = tops.get(key), chosen.missing.get(key, "")
                about: dict[str, Any] = {"site": site, "row": key, "missing": missing, "file": ""}
                if top is not None:
                    about |= asdict(top) | {
                        "photo_mean": found.means[site][key],
                        "file": f"../{FEATURES}/{file_name(site)}/channel_{top.channel}.png",
                    }
                elif not missing:
                    about["missing"] = "no neuron of the pathway scores at this site"
                features.append(about)
        return {
            "photo": item.name, "label": item.label, "target": target, "class": self._class(target), "rows": rows,
            "features": features, "noted": list(decoded.noted),
        }  # fmt: skip

    def _class(self, target: int | None) -> str:
        return self.classes[target] if target is not None and target < len(self.classes) else ""

    def _pictures(self, folder: Path, found: PhotoDecoding, said: dict[str, Any]) -> None:
        photo, title = shown(found.picture), said["photo"]
        save_picture(photo, folder / "photo.png")
        pictures = {row["row"]: shown(each) for row, each in zip(said["rows"], found.decoded.pictures, strict=False)}
        for row in said["rows"]:
            if row["file"]:
                save_picture(pictures[row["row"]], folder / row["file"])
        named = said["class"] or (f"class {said['target']}" if said["target"] is not None else "")
        first = Panel("Photo", photo, tuple(filter(None, [named])))
        panels = [Panel(row_label(row["row"]), pictures.get(row["row"]), _row_lines(row)) for row in said["rows"]]
        save(
            pictures_figure([first, *panels], f"{title}: response to the photo → to the picture"),
            folder / "decoded.png",
        )
        for site in self.task.sites:
            channels = self._channels(found, site, self.folder / FEATURES / file_name(site))
            about = [row for row in said["features"] if row["site"] == site]
            panels = [
                Panel(
                    row_label(row["row"]),
                    channels.get(row.get("channel", -1), (None, 0))[0],
                    _feature_lines(row, channels),
                )
                for row in about
            ]
            save(
                pictures_figure([first, *panels], f"{title}: channels of top neurons at {site}"),
                folder / f"features_{file_name(site)}.png",
            )

    def _channels(self, found: PhotoDecoding, site: str, folder: Path) -> dict[int, tuple[Any, float]]:
        """Picture and mean of each channel that a pathway's top neuron is in; those that are there are read."""
        channels = channels_of(list(found.tops[site].values()))
        known = {channel: _read_channel(folder, channel, self.digest) for channel in channels}
        if fresh := [channel for channel, each in known.items() if each is None]:
            task = self.task
            made = visualise(
                task.network, found.chosen.samples, site, fresh,
                decoding=task.decoding, space=task.space, max_batch=task.max_batch,
            )  # fmt: skip
            for number, channel in enumerate(fresh):
                picture, mean = shown(made.pictures[number]), float(made.response[number])
                save_picture(picture, folder / f"channel_{channel}.png")
                about = {"site": site, "channel": channel, "noted": list(made.noted), "job": self.digest}
                write_json(about | {"means": made.responses[number].tolist()}, folder / f"channel_{channel}.json")
                known[channel] = picture, mean
        return {channel: each for channel, each in known.items() if each is not None}


def _read_channel(folder: Path, channel: int, digest: str) -> tuple[Any, float] | None:
    """A channel's picture and mean as an earlier photo of this job left them, or None."""
    try:
        about = json.loads((folder / f"channel_{channel}.json").read_text(encoding="utf-8"))
        if about["job"] != digest:
            return None
        with Image.open(folder / f"channel_{channel}.png") as picture:
            return np.asarray(picture.convert("RGB")), float(about["means"][-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _row_lines(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["missing"]:
        return (f"missing: {row['missing']}",)
    said = (f"{row['photo_response']:.3g} → {row['response']:.3g}", f"in the original {row['original_response']:.3g}")
    return said if row["climbed"] else (*said, "no gradient")


def _feature_lines(row: Mapping[str, Any], channels: Mapping[int, tuple[Any, float]]) -> tuple[str, ...]:
    if row["missing"]:
        return (f"missing: {row['missing']}",)
    return f"channel {row['channel']}", f"mean {row['photo_mean']:.3g} → {channels[row['channel']][1]:.3g}"


def _curves(found: PhotoDecoding, said: Mapping[str, Any]) -> pd.DataFrame:
    import pandas as pd

    decoded = found.decoded
    return pd.DataFrame(
        [
            {
                "photo": said["photo"],
                "row": label,
                "step": step,
                "response": float(value),
                "photo_response": float(photo),
            }
            for label, values, photo in zip(decoded.labels, decoded.responses, decoded.photo, strict=True)
            for step, value in zip(decoded.noted, values, strict=True)
        ]
    )


def responses(photos: Sequence[Path]) -> pd.DataFrame:
    """A row for each row of finished photos: response at the photo, of the decoding, and in the original network."""
    import pandas as pd

    rows = []
    for folder in photos:
        said = json.loads((folder / DONE).read_text(encoding="utf-8"))
        rows += [
            {"photo": said["photo"], "target": said["target"], "class": said["class"], **row} for row in said["rows"]
        ]
    return pd.DataFrame(rows).drop(columns=["file", "first"])


def write_json(said: Mapping[str, Any], path: Path) -> None:
    """JSON in a file that is whole or not there."""
    with appearing(path) as file:
        file.write(json.dumps(said, indent=1).encode())


_PLAIN = re.compile(r"[A-Za-z0-9_@=,+-][A-Za-z0-9._@=,+-]{0,99}", re.ASCII)
_TAKEN = (FEATURES, "decode.json", "responses.csv")  # in the job's folder


def file_name(name: str) -> str:
    """A file's or folder's name for a name of any letters: itself where all systems take it, else one with a hash.

    >>> file_name("neuron_mct@0.98"), file_name("a/b.png")
    ('neuron_mct@0.98', 'a_b.png-88f7ec79')
    """
    if _PLAIN.fullmatch(name) and name not in _TAKEN:
        return name
    plain = re.sub(r"[^A-Za-z0-9._@=,+-]", "_", name)[:80].lstrip(".")
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
