"""`fxpath attribute`: attribution maps of every image, on the command line."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli import (
    RESPONSE,
    Device,
    Granularity,
    Json,
    Labels,
    Limit,
    Model,
    Quiet,
    Sites,
    Weights,
    answer,
    app,
    chosen_device,
    say,
    say_stopped,
    traced,
)
from .errors import InputError

if TYPE_CHECKING:
    from .mapping import MapReport
    from .zoo import LoadedModel

FIGURES = 8  # samples that are drawn
_METHOD = "a method[:param=value,…], or a pathway's key such as neuron_mct@0.9; * at the end opens; one or more"


@app.command()
def attribute(
    model: Model,
    images: Annotated[str, typer.Argument(help="a folder, foolbox:imagenet, or package.module:callable")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the store; made first where there is none")],
    method: Annotated[list[str], typer.Option(help=_METHOD)],
    reduction: Annotated[
        str, typer.Option(help="of channels: max_abs (sign kept), signed_max, signed_sum")
    ] = "max_abs",
    target: Annotated[
        str | None, typer.Option(help="labels, predicted, or a class number (default: the store's)")
    ] = None,
    weights: Weights = None,
    sites: Sites = None,
    granularity: Granularity = "unit",
    response: Annotated[str, typer.Option(help=RESPONSE)] = "logit",
    labels: Labels = None,
    limit: Limit = None,
    micro_batch: Annotated[int | None, typer.Option(help="samples at a time (default: the store's, else 8)")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: the store's)")] = None,
    thumbnails: Annotated[int, typer.Option(help="size of small pictures to keep in a new store, 0 for none")] = 0,
    figures: Annotated[Path | None, typer.Option(help=f"a folder for figures of the first {FIGURES} samples")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Attribution maps of every image, kept in its store. Start it again after a stop: it goes on where it was."""
    from .images import load_images
    from .mapping import attribute as add_maps
    from .mapping import checked_methods, checked_reduction
    from .responses import checked_response
    from .zoo import load_model

    explained = checked_response(response)
    chosen, kept = checked_methods(method), checked_reduction(reduction)  # before anything that takes time
    try:
        with redirect_stdout(sys.stderr):  # what a user's own module or data set prints is no JSON
            loaded = load_model(model, weights=weights)
            dataset = load_images(images, loaded.preprocess, classes=loaded.classes, labels=labels, limit=limit)
            network = traced(loaded, sites, granularity, explained, chosen_device(device))
            done = add_maps(
                network, dataset, output, methods=list(chosen.values()), reduction=kept, target=target,
                micro_batch=micro_batch, threads=threads, thumbnails=thumbnails, model=loaded.name,
                preprocessing=loaded.preprocessing, classes=loaded.classes, progress=not quiet,
            )  # fmt: skip
    except KeyboardInterrupt:
        say_stopped(output)
        raise typer.Exit(130) from None
    say(reported(done))
    if figures is not None:
        with redirect_stdout(sys.stderr):
            drawn = draw(done, loaded, dataset, figures)
        say(f"{drawn} figures are in {figures}" if drawn else "no figure, as no sample has a map")
    if as_json:
        answer(asdict(done))
    if all(len(missing) == done.samples for missing in done.missing.values()):
        raise typer.Exit(2)


def reported(report: MapReport) -> str:
    """A report: a line for each of the first samples without a map, and one for the job."""
    missing = [(name, key, why) for key, found in report.missing.items() for name, why in found.items()]
    lines = [f"no map: {name}: {key}: {why}" for name, key, why in missing[:10]]
    lines += [f"… and {len(missing) - 10:,} more"] if len(missing) > 10 else []
    there = len(report.methods) - len(report.made)
    lines.append(
        f"{report.path}: maps of {report.samples:,} samples by {', '.join(report.methods)} ({len(report.made)} made "
        f"now, {there} were there; {report.computed:,} samples worked through now, {report.reused:,} were there) in "
        f"{report.seconds:.1f} s"
    )
    return "\n".join(lines)


def draw(report: MapReport, loaded: LoadedModel, dataset: Any, folder: Path) -> int:
    """Figures of the first samples that have maps, together and each alone; returns how many were written."""
    import numpy as np

    from .mapfigures import overview_figure, sample_figure
    from .plotting import save
    from .store import open_store

    with open_store(report.path) as store:
        there = np.any([store.map_missing(key) == "" for key in report.methods], axis=0)
        rows = np.flatnonzero(there)[:FIGURES].tolist()
        if not rows:
            return 0
        names = [str(store.ids[row]) for row in rows]
        pictures = {name: _picture(loaded, dataset[row]) for name, row in zip(names, rows, strict=True)}
        known = {name: picture for name, picture in pictures.items() if picture is not None}
        save(overview_figure(store, names, report.methods, pictures=known), folder / "maps.png")
        for name, row in zip(names, rows, strict=True):
            figure = sample_figure(store, name, report.methods, picture=pictures[name])
            save(figure, folder / f"sample_{row:05d}.png")
    return 1 + len(rows)


def _picture(loaded: LoadedModel, entry: Any) -> Any:
    """What the input of a data set's entry, with or without a label, shows; None where it is no picture."""
    try:
        return loaded.picture(entry[0] if isinstance(entry, tuple | list) else entry)
    except (InputError, AttributeError):  # other channels, or no single tensor
        return None
