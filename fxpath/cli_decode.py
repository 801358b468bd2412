"""`fxpath decode`: the paper's Fig. 3 of photos, on the command line."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli import (
    Granularity,
    Json,
    Model,
    Output,
    Quiet,
    Sites,
    Weights,
    answer,
    app,
    chosen_device,
    mention,
    numbers,
    say,
    shown,
    traced,
)
from .errors import InputError

if TYPE_CHECKING:
    from .decodefolder import DecodeReport
    from .inputspace import InputSpace
    from .zoo import LoadedModel

SHOWN = ("photo", "class", "row", "density", "photo_response", "response", "original_response")


@app.command()
def decode(
    model: Model,
    images: Annotated[str, typer.Argument(help="a folder, foolbox:imagenet, or package.module:callable")],
    output: Output,
    selector: Annotated[list[str] | None, typer.Option(help="name[:param=value,…]; one or more")] = None,
    sparsity: Annotated[list[str] | None, typer.Option(help="the share left out (default 0.98)")] = None,
    target: Annotated[str, typer.Option(help="labels, predicted, or a class number")] = "predicted",
    site: Annotated[list[str] | None, typer.Option(help="top neurons' channels there, too; may be repeated")] = None,
    steps: Annotated[int | None, typer.Option(help="of Adam (default 256)")] = None,
    seed: Annotated[int | None, typer.Option(help="of the noise to begin with, and of all moves (default 0)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="of Adam (default 0.03)")] = None,
    size: Annotated[int | None, typer.Option(help="height of pictures (default: the input's)")] = None,
    jitter: Annotated[int | None, typer.Option(help="rolled by at most so many pixels (default 1/56 of size)")] = None,
    scale: Annotated[float | None, typer.Option(help="zoomed by 1 ± at most this (default 0.05)")] = None,
    rotation: Annotated[float | None, typer.Option(help="turned by at most so many degrees (default 5)")] = None,
    decay: Annotated[float | None, typer.Option(help="waves are scaled by 1/f to this power (default 1)")] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="climb on pixels, not on waves and principal colours")
    ] = False,
    rows: Annotated[int, typer.Option(help="rows at a time, 0 for all; more depend on each other's rounding")] = 1,
    weights: Weights = None,
    sites: Sites = None,
    granularity: Granularity = "unit",
    response: Annotated[str, typer.Option(help="as for compute")] = "logit",
    labels: Annotated[Path | None, typer.Option(help="CSV with file,label")] = None,
    limit: Annotated[int | None, typer.Option(help="only the first so many images")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Which picture each pathway answers to most (Fig. 3). Start it again after a stop: it goes on where it was."""
    from .climbing import Decoding
    from .decodefolder import SELECTORS, SPARSITY, decode_photos, done_photos
    from .images import load_images
    from .responses import checked_response
    from .selectors import parse
    from .zoo import load_model

    explained = checked_response(response)
    chosen = [parse(text) for text in selector or SELECTORS]  # before anything that takes time
    levels = numbers(sparsity) if sparsity else [SPARSITY]
    if len(levels) != 1:
        raise InputError(f"--sparsity: expected one, found {len(levels)}; decode each into a folder of its own")
    given = {
        "steps": steps, "seed": seed, "learning_rate": learning_rate, "size": size, "jitter": jitter, "scale": scale,
        "rotation": rotation, "decay": decay, "decorrelated": not pixels,
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    decoding = Decoding(**options)
    if rows < 0:
        raise InputError(f"--rows: expected 0 for all, or how many at a time, found {rows}")
    try:
        with redirect_stdout(sys.stderr):  # what a user's own module or data set prints is no JSON
            loaded = load_model(model, weights=weights)
            dataset = load_images(images, loaded.preprocess, classes=loaded.classes, labels=labels, limit=limit)
            network = traced(loaded, sites, granularity, explained, chosen_device(device))
            done = decode_photos(
                network, dataset, output, selectors=chosen, sparsity=levels[0], target=target, decoding=decoding,
                sites=site or (), space=_space(loaded), max_batch=rows or None, model=loaded.name,
                classes=loaded.classes, progress=not quiet,
            )  # fmt: skip
    except KeyboardInterrupt:
        say(f"stopped; {done_photos(output)} finished photos are kept in {output}. The same command goes on there.")
        raise typer.Exit(130) from None
    say("\n".join(_reported(done)))
    if as_json:
        answer(asdict(done))
    if len(done.failed) == done.photos:
        raise typer.Exit(2)


def _space(loaded: LoadedModel) -> InputSpace | None:
    """How the network takes colours, by its preprocessing; None, with a note, where that cannot be told."""
    from .inputspace import InputSpace, SpaceError

    try:
        return InputSpace.of_preprocessing(loaded.preprocess, loaded.input_shape)
    except SpaceError as error:
        mention(f"{error}; [0, 1] is taken for the range of the first photo")
        return None


def _reported(done: DecodeReport) -> list[str]:
    """A report: the rows of all photos, a line for each of the first that could not be used, one for the job."""
    import pandas as pd

    lines = []
    if len(done.failed) < done.photos:
        table = pd.read_csv(done.table)
        lines.append(shown(table[[name for name in SHOWN if name in table.columns]]))
        reasons = table[table["missing"].notna()][["photo", "row", "missing"]]
        lines += [f"missing: {photo}: {row}: {why}" for photo, row, why in reasons.itertuples(index=False)]
    lines += [f"not decoded: {name}: {reason}" for name, reason in list(done.failed.items())[:10]]
    lines.append(
        f"{done.folder}: {done.decoded + done.reused} of {done.photos} photos ({done.decoded} decoded now, "
        f"{done.reused} were there) in {done.seconds:.1f} s"
    )
    return lines
