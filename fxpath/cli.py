"""The command line: thin. People read stderr, machines read stdout (--json); exit code 2 is for what you can mend."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import FxpathError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from .batch import Plan, Report
    from .network import Network
    from .responses import Response
    from .zoo import LoadedModel

app = typer.Typer(
    name="fxpath",
    help="Which neurons carried this decision, and do they form a path?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="zoo:NAME, torchvision:NAME, timm:NAME or package.module:callable")]
Weights = Annotated[str | None, typer.Option(help="a state dict (.pth, .safetensors), 'pretrained' or 'random'")]
Sites = Annotated[
    list[str] | None, typer.Option(help="rectifiers (default), activations, or names and globs; may be repeated")
]
Granularity = Annotated[str, typer.Option(help="unit or channel")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for machines on stdout")]
Output = Annotated[Path, typer.Option("--output", "-o", help="where to write")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bar")]
Labels = Annotated[Path | None, typer.Option(help="CSV with file,label")]
Limit = Annotated[int | None, typer.Option(help="only the first so many images")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
_DIAGNOSE = "ablate some active neurons exactly, and keep the rank correlation of the scores with that"
RESPONSE = "logit, probability, margin, pixel, region, token, detection or neuron, with :param=value,…"
StoreFile = Annotated[Path, typer.Argument(help="an fxpath store (.h5)")]


def say(text: str) -> None:
    """A line for people."""
    typer.echo(text, err=True)


def answer(data: Any) -> None:
    """JSON for machines."""
    typer.echo(json.dumps(data, default=str))


def mention(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line for people."""
    say(f"fxpath: note: {' '.join(str(message).split())}")


def shown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table as text, missing values as a dash."""
    return str(table.to_string(index=False, na_rep="–", float_format=lambda value: f"{value:.{digits}f}"))


def traced(
    loaded: LoadedModel, sites: list[str] | None, granularity: str, response: Response | str, device: str
) -> Network:
    """The network that the options describe."""
    from .network import trace

    if granularity not in ("unit", "channel"):
        raise InputError(f"--granularity: expected unit or channel, found {granularity!r}")
    return trace(
        loaded.model.to(device), loaded.example(2).to(device), sites=sites or "rectifiers",
        granularity="unit" if granularity == "unit" else "channel", response=response,
    )  # fmt: skip


def chosen_device(device: str) -> str:
    """`auto` is the accelerator where there is one."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}; try --device cpu"
        ) from error


@app.command("sites")
def list_sites(
    model: Model,
    weights: Weights = None,
    sites: Sites = None,
    granularity: Granularity = "unit",
    response: Annotated[str, typer.Option(help=RESPONSE)] = "logit",
    tree: Annotated[bool, typer.Option("--tree", help="the sites as a tree of modules instead")] = False,
    dot: Annotated[Path | None, typer.Option(help="write the site graph: .dot, .gv, .svg, .png or .pdf")] = None,
    as_json: Json = False,
) -> None:
    """The neuron index as a table, before anything is computed, and the site graph as a picture."""
    from .sitedrawing import checked_picture, save_site_graph
    from .sitegraph import site_graph, table_lines, tree_lines
    from .zoo import load_model

    if dot is not None:  # before anything that takes time
        checked_picture(dot)

    random = weights is None and model.startswith(("torchvision:", "timm:"))
    with redirect_stdout(sys.stderr):  # what a user's own module prints is no JSON
        loaded = load_model(model, weights="random" if random else weights)
        network = traced(loaded, sites, granularity, response, "cpu")
    index = network.index
    summary = (
        f"{loaded.name}: {len(index)} sites, {index.size:,} neurons, traced by {network.traced.tracer}, "
        f"input {' × '.join(map(str, loaded.input_shape))}"
    )
    if as_json:
        answer({
            "model": loaded.name, "neurons": index.size, "tracer": network.traced.tracer, "edges": network.edges,
            **index.to_json(),
        })  # fmt: skip
    if tree or not as_json:
        say("\n".join([*(tree_lines(index, loaded.name) if tree else table_lines(index)), summary]))
    if dot is not None:
        graph = site_graph(index, network.edges)
        say(f"{save_site_graph(graph, dot, summary)}: the site graph, {len(graph.edges)} edges")


@app.command()
def compute(
    model: Model,
    images: Annotated[str, typer.Argument(help="a folder, foolbox:imagenet, or package.module:callable")],
    output: Output,
    selector: Annotated[list[str] | None, typer.Option(help="name[:param=value,…]; one or more")] = None,
    sparsity: Annotated[list[str] | None, typer.Option(help="shares left out, e.g. 0.8 0.9 0.99")] = None,
    target: Annotated[str, typer.Option(help="labels, predicted, or a class number")] = "predicted",
    weights: Weights = None,
    sites: Sites = None,
    granularity: Granularity = "unit",
    response: Annotated[str, typer.Option(help=RESPONSE)] = "logit",
    labels: Labels = None,
    limit: Limit = None,
    micro_batch: Annotated[int | None, typer.Option(help="samples at a time (default 8); part of the job")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; part of the job")] = None,
    scores: Annotated[str | None, typer.Option(help="float16 or float32: keep all scores too")] = None,
    diagnose: Annotated[bool, typer.Option("--diagnose", help=_DIAGNOSE)] = False,
    diagnose_neurons: Annotated[
        int | None, typer.Option(help="how many of every site (default 16); implies --diagnose")
    ] = None,
    thumbnails: Annotated[int, typer.Option(help="size of small pictures to keep, 0 for none")] = 0,
    device: Device = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first sample that cannot be used")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say neurons, bytes and hours; write nothing")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pathways of every image, in one HDF5 file. Start it again after a stop: it goes on where it was."""
    from dataclasses import asdict

    from . import batch
    from .ablation import PER_SITE
    from .given import checked_number
    from .images import load_images
    from .responses import checked_response
    from .selectors import parse
    from .zoo import load_model

    explained = checked_response(response)
    chosen = [parse(text) for text in selector or batch.DEFAULT_SELECTORS]  # before anything that takes time
    levels = numbers(sparsity) if sparsity else list(batch.DEFAULT_SPARSITIES)
    ablated = PER_SITE if diagnose else 0
    if diagnose_neurons is not None:
        ablated = checked_number("--diagnose-neurons", diagnose_neurons)
    try:
        with redirect_stdout(sys.stderr):  # what a user's own module or data set prints is no JSON
            loaded = load_model(model, weights=weights)
            dataset = load_images(images, loaded.preprocess, classes=loaded.classes, labels=labels, limit=limit)
            network = traced(loaded, sites, granularity, explained, chosen_device(device))
            options: dict[str, Any] = {
                "selectors": chosen, "sparsities": levels, "target": target, "micro_batch": micro_batch,
                "threads": threads, "scores": scores, "strict": strict, "diagnose": ablated,
                "thumbnails": thumbnails, "model": loaded.name,
                "preprocessing": loaded.preprocessing, "classes": loaded.classes, "progress": not quiet,
            }  # fmt: skip
            done = (batch.plan if dry_run else batch.compute)(network, dataset, output, **options)
    except KeyboardInterrupt:
        say_stopped(output)
        raise typer.Exit(130) from None
    say(planned(done) if isinstance(done, batch.Plan) else reported(done))
    if as_json:
        answer(asdict(done))
    if isinstance(done, batch.Report) and len(done.failed) == done.samples:
        raise typer.Exit(2)


def say_stopped(output: Path) -> None:
    """What is left of a job that was interrupted, and how to go on."""
    from .records import maps_folder, parts_folder, parts_found

    for folder in (parts_folder(output), maps_folder(output)):
        kept = len(parts_found(folder))
        if kept:
            say(f"stopped; {kept} finished micro-batches are kept in {folder}. The same command goes on there.")
            return
    say("stopped before the first micro-batch was finished; nothing is kept.")


def planned(plan: Plan) -> str:
    """A plan in one line."""
    return (
        f"{plan.samples:,} samples ({plan.left:,} left) × {len(plan.keys)} pathways of {plan.neurons:,} neurons at "
        f"{plan.sites} sites: about {plan.bytes / 1e6:,.1f} MB and {plan.hours:.2g} hours "
        f"(micro-batch {plan.micro_batch}, {plan.threads} threads). Nothing was written."
    )


def reported(report: Report) -> str:
    """A report: a line for each of the first samples that could not be used, and one for the job."""
    lines = [f"not computed: {name}: {reason}" for name, reason in list(report.failed.items())[:10]]
    lines.append(
        f"{report.path}: {report.samples - len(report.failed):,} of {report.samples:,} samples "
        f"({report.computed:,} worked through now, {report.reused:,} were there) in {report.seconds:.1f} s"
    )
    return "\n".join(lines)


def numbers(texts: Sequence[str]) -> list[float]:
    """Sparsities from an option."""
    from .keys import exact_sparsity

    return [float(exact_sparsity(part)) for text in texts for part in text.replace(",", " ").split()]


@app.command()
def info(store: StoreFile, as_json: Json = False) -> None:
    """What a store holds."""
    from .analysis import ablation_correlations
    from .store import open_store

    with open_store(store) as opened:
        diagnosed = ablation_correlations(opened)
        header, table = opened.header, opened.samples()
        data = {
            "file": str(store), "bytes": store.stat().st_size, "model": header.model, "fingerprint": header.fingerprint,
            "complete": opened.complete, "samples": len(opened), "failed": int((~opened.ok).sum()),
            "sites": len(opened.index), "neurons": opened.index.size, "granularity": opened.index.granularity,
            "pathways": list(opened.keys), "scores": list(opened.score_families), "maps": list(opened.map_keys),
            "target": header.target, "response": header.response, "micro_batch": header.micro_batch,
            "threads": header.threads, "precision": header.precision, "preprocessing": header.preprocessing,
            "created": header.created, "versions": json.loads(header.versions or "{}"),
        }  # fmt: skip
    if as_json:
        answer(data | ({"ablation_correlation": diagnosed} if diagnosed else {}))
        return
    for name, value in data.items():
        shown_value = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        say(f"{name:>14}  {', '.join(value) if isinstance(value, list) else shown_value}")
    if diagnosed:
        means = ", ".join(f"{family} {mean:.3f}" for family, mean in diagnosed.items())
        say(f"{'ablation':>14}  mean rank correlation of scores: {means}")
    for name, status in table.loc[table["status"] != "ok", ["id", "status"]].head(10).itertuples(index=False):
        say(f"  not computed: {name}: {status}")


@app.command()
def merge(
    store: Annotated[Path, typer.Argument(help="the file whose .parts folder is to be joined")], quiet: Quiet = False
) -> None:
    """Join the finished parts of a job into its file, without the network."""
    from .batch import merge as join

    say(f"{join(store, progress=not quiet)} is complete")


SUMMARY = ("store", "key", "samples", "density", "dead_share", "response_share", "class_kept", "dropped_share")
DIAGNOSED = ("ablation_correlation",)  # only of jobs with --diagnose


def summary_text(table: pd.DataFrame) -> str:
    """The columns of a summary that fit a terminal."""
    columns = [name for name in SUMMARY if name in table.columns]
    columns += [name for name in DIAGNOSED if name in table.columns and table[name].notna().any()]
    return shown(table[columns])


@app.command()
def analyze(
    store: Annotated[list[Path], typer.Argument(help="one store or several")],
    output: Output = Path("fxpath-analysis"),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Dead neurons and overlap: tables (CSV) and figures (PNG) from stores, offline."""
    from .labels import store_names
    from .report import analyse

    table = analyse(dict(zip(store_names(store), store, strict=True)), output, progress=not quiet)
    say(summary_text(table))
    say(f"tables and figures are in {output}")
    if as_json:
        answer(json.loads(table.to_json(orient="records")))


@app.command()
def demo(
    output: Output = Path("fxpath-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="4 photos, one network, under 40 s")] = False,
    quiet: Quiet = False,
) -> None:
    """Two pretrained ImageNet networks, 20 real photos, all selectors: stores, figures, tables."""
    from .demo import run_demo

    done = run_demo(output, quick=quick, progress=not quiet)
    for found in done.accuracies:
        say(f"{found.network}: top-1 {found.top1}/{found.samples}, top-5 {found.top5}/{found.samples} on real photos")
    say(summary_text(done.table))
    say(f"stores, tables and figures are in {done.folder} ({done.seconds:.0f} s)")


def spread(arguments: Sequence[str]) -> list[str]:
    """Let one `--sparsity` be followed by several numbers, `--selector` by several selectors, `--method` by methods.

    >>> spread(["--sparsity", "0.8", "0.9", "-o", "run.h5"])
    ['--sparsity', '0.8', '--sparsity', '0.9', '-o', 'run.h5']
    """
    result: list[str] = []
    option = ""
    for place, argument in enumerate(arguments):
        before = arguments[place - 1] if place else ""
        if option and before != option and _REPEATED[option](argument):
            result.append(option)
        elif argument in _REPEATED:
            option = argument
        elif before != option:
            option = ""
        result.append(argument)
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_selector(text: str) -> bool:
    from .selectors import names

    return text.partition(":")[0] in names()


def _is_method(text: str) -> bool:
    from .methods import method_names
    from .selectors import names

    first = text.partition(":")[0].partition("@")[0].partition("*")[0]  # what is wrong behind the name is said later
    return first in (*method_names(), *names(), "masked_gradient", "random_active")


_REPEATED: dict[str, Callable[[str], bool]] = {
    "--sparsity": _is_number, "--selector": _is_selector, "--method": _is_method,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors that the user can mend are one line and exit code 2."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="fxpath")
        warnings.showwarning = mention
        try:
            app(args=spread(sys.argv[1:] if arguments is None else arguments), prog_name="fxpath")
        except FxpathError as error:
            say(f"fxpath: {' '.join(str(error).split())}")
            sys.exit(2)


from . import cli_attribute as cli_attribute  # noqa: E402  their commands register themselves
from . import cli_decode as cli_decode  # noqa: E402
