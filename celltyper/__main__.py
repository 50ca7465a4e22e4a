"""The ``celltyper`` command; every command imports what it needs when it runs."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from celltyper import __version__
from celltyper.errors import CelltyperError, DataError, RunError

PATH = click.Path(path_type=Path)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.version_option(__version__, prog_name="celltyper")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Find every nucleus on an H&E image, outline it and name its phenotype."""
    context.obj = {"debug": debug}


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that computes."""
    command = click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")(command)
    return click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
    )(command)


MODEL_OPTIONS = ("device", "batch_size", "precision", "encoder_weights", "allow_code")


def predicting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that runs a model."""
    for option in (
        click.option(
            "--allow-code", is_flag=True, help="Import the author's code that a model names."
        ),
        click.option(
            "--weights",
            "encoder_weights",
            metavar="PATH",
            help="Encoder weights (file or folder), if not where they were.",
        ),
        click.option(
            "--precision",
            default="fp32",
            show_default=True,
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="Of the forward pass.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            help="Tiles per forward pass.  [default: as in the run]",
        ),
    ):
        command = option(command)
    return common(command)


READING = (
    click.option(
        "--taxonomy", type=PATH, help="YAML that merges or renames classes (docs/data.md)."
    ),
    click.option(
        "--reader", default="auto", show_default=True, help="Layout, such as lizard or folder."
    ),
)


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that opens annotated images."""
    for option in READING:
        command = option(command)
    return command


@cli.command()
@click.argument("config")
@click.option("-o", "--output", type=PATH, required=True, help="Run folder to write.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override section.key=value."
)
@click.option("--weights", metavar="PATH", help="Encoder weights: sets encoder.weights.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Start over where another run is.")
@common
def train(
    config: str,
    output: Path,
    overrides: tuple[str, ...],
    weights: str | None,
    resume: bool,
    overwrite: bool,
    device: str,
    quiet: bool,
) -> None:
    """Train a model as CONFIG says: a YAML file or the name of a recipe.

    \b
    celltyper train unetr -o run --set data.root=DATA
    """  # noqa: D301
    _log(quiet)
    from celltyper.config import load_config
    from celltyper.training import train as run

    if weights is not None:
        # quoted, since a path may read as YAML
        overrides += (f"encoder.weights={json.dumps(weights, ensure_ascii=False)}",)
    try:
        folder = run(
            load_config(config, overrides),
            output,
            device=device,
            resume=resume,
            overwrite=overwrite,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        words = ["celltyper", "train", config, "-o", str(output)]
        words += [word for o in overrides for word in ("--set", o)]
        hint = f"; go on with: {shlex.join([*words, '--resume'])}" if output.is_dir() else ""
        raise KeyboardInterrupt(f"stopped{hint}") from None
    _say(quiet, f"run: {folder}")


@cli.command()
@click.argument("inputs", nargs=-1, required=True, type=PATH, metavar="IMAGE...")
@click.option("-m", "--model", type=PATH, required=True, help="Run folder or checkpoint.")
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@click.option("--mpp", type=float, help="Micrometres per pixel.  [default: as the files say]")
@click.option("--overwrite", is_flag=True, help="Replace earlier results in the folder.")
@predicting
def infer(inputs: tuple[Path, ...], model: Path, output: Path, quiet: bool, **options: Any) -> None:
    """Find and type the cells of images (PNG, JPEG, TIFF) or of folders of images.

    \b
    celltyper infer image.png -m run -o out
    """  # noqa: D301
    _log(quiet)
    from celltyper.inference import infer as run

    folder = run(inputs, model, output, progress=not quiet, **options)
    _say(quiet, f"cells: {folder / 'cells.parquet'}")


@cli.command(name="eval")
@click.argument("run", required=False, type=PATH)
@click.argument("data", required=False, type=PATH)
@click.option("--pred", type=PATH, help="Folder that 'celltyper infer' wrote, or label images.")
@click.option("--ref", type=PATH, help="Annotated images.")
@click.option("-o", "--output", type=PATH, help="Folder to write.  [default: RUN/eval or PRED]")
@click.option("--split", help="Only this split of the data.")
@click.option("--mpp", type=float, help="Micrometres per pixel.  [default: as the data say]")
@click.option(
    "--resamples",
    default=1000,
    show_default=True,
    type=click.IntRange(0),
    help="Bootstrap resamples of the intervals.",
)
@click.option("--allow-seen", is_flag=True, help="Score images of the training data too.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier evaluation.")
@reading
@predicting
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    run: Path | None,
    data: Path | None,
    pred: Path | None,
    ref: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Score a model on annotated images, or predictions that are there already.

    \b
    celltyper eval RUN DATA
    celltyper eval --pred OUT --ref DATA
    """  # noqa: D301
    of_run = run is not None and data is not None and pred is None and ref is None
    if not of_run and not (pred and ref and run is None):
        raise click.UsageError("give RUN and DATA, or --pred and --ref")
    if not of_run:
        for name in (*MODEL_OPTIONS, "allow_seen"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = name.removeprefix("encoder_").replace("_", "-")
                raise click.UsageError(f"--{option} is for RUN and DATA: --pred runs no model")
            options.pop(name)
    _log(quiet)
    from celltyper.results import evaluate_predictions, evaluate_run, summary_text

    if run is not None and data is not None:
        summary, folder = evaluate_run(run, data, progress=not quiet, **options)
    else:
        summary, folder = evaluate_predictions(pred or "", ref or "", **options)
    _say(quiet, summary_text(summary))
    _say(quiet, f"report: {folder / 'report.html'}")


@cli.command()
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("demo"),
    show_default=True,
    help="Folder to write.",
)
@click.option("--data", type=PATH, help="Own annotated images instead of the sample.")
@click.option("--quick", is_flag=True, help="A tenth of the training, to see it run.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo in the folder.")
@common
def demo(
    output: Path, data: Path | None, quick: bool, overwrite: bool, device: str, quiet: bool
) -> None:
    """Train, infer and evaluate on two real H&E fields; a few minutes on two cores."""
    _log(quiet)
    from celltyper.demo import run_demo

    run_demo(
        output,
        data=data,
        quick=quick,
        overwrite=overwrite,
        device=device,
        progress=not quiet,
        say=lambda text: _say(quiet, text),
    )


@cli.command()
@click.argument("run", type=PATH)
@click.option(
    "--format",
    default="onnx",
    show_default=True,
    type=click.Choice(["onnx", "torchscript", "torch-export", "peft"]),
    help="peft: only the adapters of the encoder.",
)
@click.option("-o", "--output", type=PATH, help="File to write.  [default: in RUN]")
@click.option(
    "--tile", type=click.IntRange(32, 4096), help="Side of the images.  [default: as in the run]"
)
@click.option(
    "--weights",
    "encoder_weights",
    metavar="PATH",
    help="Encoder weights (file or folder), if not where they were.",
)
@click.option("--allow-code", is_flag=True, help="Import the author's code that a model names.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def export(
    run: Path, format: str, output: Path | None, tile: int | None, quiet: bool, **options: Any
) -> None:
    """Write the model of RUN as one file for other programs, checked against the model."""
    _log(quiet)
    from celltyper.exporting import SUFFIXES, export_adapter, export_model

    folder = run if run.is_dir() else run.parent
    if format == "peft":
        if tile is not None:
            raise click.UsageError("--tile is for a whole model: peft writes adapters only")
        _say(quiet, f"adapter: {export_adapter(run, output or folder / 'adapter', **options)}")
        return
    path = output or folder / f"model{SUFFIXES[format]}"
    done = export_model(run, path, format, tile=tile, **options)
    _say(quiet, f"largest difference to the model: {done.largest_difference:.2g}")
    _say(quiet, f"{format}: {done.path}")


@cli.group(invoke_without_command=True)
@click.pass_context
def encoders(context: click.Context) -> None:
    """List the encoders that are known by name; show, fetch or check one.

    In the list, size is in parameters and mpp in micrometres per pixel; "have" says where the
    weights are: in the folder that CELLTYPER_WEIGHTS names, or in the cache of the hub.
    """
    if context.invoked_subcommand is None:
        from celltyper.encoders import list_cards, load_card
        from celltyper.encoders.listing import table

        click.echo(table(map(load_card, list_cards())))


@encoders.command()
@click.argument("name")
def show(name: str) -> None:
    """Show what is known of encoder NAME.

    A name of the list, timm/NAME, or owner/name on the hub.
    """
    from celltyper.encoders import find_card
    from celltyper.encoders.listing import description

    click.echo(description(find_card(name)))


@encoders.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--to", type=PATH, help="Folder to fill.  [default: the cache of the hub]")
@click.option("--revision", help="Commit or branch.  [default: as the card pins]")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def fetch(names: tuple[str, ...], to: Path | None, revision: str | None, quiet: bool) -> None:
    """Download weights, to work without network later.

    \b
    celltyper encoders fetch uni virchow2 --to weights
    celltyper train dpt -o run --set encoder.name=uni --weights weights
    """  # noqa: D301
    _log(quiet)
    from celltyper.encoders import find_card
    from celltyper.encoders.hub import fetch_weights

    cards = [find_card(name) for name in dict.fromkeys(names)]
    if revision:
        cards = [card.model_copy(update={"revision": revision}) for card in cards]
    failed = []
    for card in cards:
        try:
            got = fetch_weights(card, to)
        except CelltyperError as error:
            click.echo(f"celltyper: {error}", err=True)
            failed.append(card.name)
            continue
        state = "fetched" if got.new else "there already"
        commit = f"commit {got.commit or 'unknown'}"
        facts = (state, f"{got.size / 1e6:,.1f} MB", commit, card.licence, str(got.path))
        _say(quiet, f"{card.name}: {', '.join(facts)}")
    if failed:
        raise RunError(f"{len(failed)} of {len(cards)} not fetched: {', '.join(failed)}")


@encoders.command()
@click.argument("name")
@click.option("--weights", metavar="PATH", help="File or folder.  [default: what is here]")
@click.option("--image", type=PATH, help="H&E image.  [default: a field of the demo]")
@common
def check(name: str, weights: str | None, image: Path | None, device: str, quiet: bool) -> None:
    """Try encoder NAME on a real image.

    Says what was loaded and what its embeddings look like. Weights that are not here are not
    downloaded. Exit code 1 if the embeddings are broken.
    """
    _log(quiet)
    from celltyper.datasets import read_image
    from celltyper.encoders import find_card, load_encoder
    from celltyper.encoders.examine import examination_text, examine
    from celltyper.encoders.hub import MADE_NAMES, find_weights, weights_here
    from celltyper.predict import pick_device
    from celltyper.readers.hgsc import fetch_hgsc

    card, place = find_card(name), pick_device(device)
    source: str | Path = weights or weights_here(card)
    if source not in MADE_NAMES:
        source = find_weights(card, source)
    if image is None:
        try:
            image = fetch_hgsc() / "hgsc_nest.jpg"
        except DataError as error:
            raise DataError(f"{error}; or pass --image FILE") from error
    pixels = read_image(image).image
    found = examine(load_encoder(name, weights=source).to(place), pixels)
    _say(quiet, examination_text(card, source, image, found))


@cli.group()
def data() -> None:
    """Describe annotated images, find mistakes in them, store them."""


@data.command()
@click.argument("sources", nargs=-1, required=True, type=PATH, metavar="SRC...")
@click.option("-o", "--output", type=PATH, required=True, help="Store to write, OUT.zarr.")
@click.option("--mpp", type=float, help="Micrometres per pixel.  [default: as the data say]")
@click.option(
    "--no-compress", is_flag=True, help="Labels as they are: more disk, faster beyond 270 Mpx."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier store.")
@reading
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def prepare(
    sources: tuple[Path, ...],
    output: Path,
    mpp: float | None,
    no_compress: bool,
    overwrite: bool,
    reader: str,
    taxonomy: Path | None,
    quiet: bool,
) -> None:
    """Put annotated images into one store that trains fast.

    Any layout will do. If it is stopped, the same command goes on where it was.

    \b
    celltyper data prepare LIZARD PANNUKE -o cells.zarr --taxonomy T.yaml
    """  # noqa: D301
    _log(quiet)
    from celltyper.datasets.store import write_store
    from celltyper.readers import open_sources

    opened = open_sources(sources, reader=reader, taxonomy=taxonomy, mpp=mpp)
    settings = {
        "mpp": mpp,
        "taxonomy": taxonomy.read_text(encoding="utf-8") if taxonomy else None,
    }
    try:
        store = write_store(
            output,
            opened,
            settings=settings,
            compress=not no_compress,
            overwrite=overwrite,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    _say(quiet, f"store: {store}")


@data.command(name="check")
@click.argument("path", type=PATH)
@reading
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
@click.pass_context
def check_data(
    context: click.Context, path: Path, reader: str, taxonomy: Path | None, quiet: bool
) -> None:
    """Find mistakes in annotated images.

    Exit code 2 if there are errors, 0 if there are only warnings.
    """
    _log(quiet)
    from celltyper.datasets.checking import check_dataset
    from celltyper.datasets.summary import check_text
    from celltyper.readers import open_parts

    dataset, layout = open_parts(path, reader, taxonomy)
    found = check_dataset(dataset, _names_bar("check", quiet))
    click.echo(check_text(found, layout))
    if found.errors:
        context.exit(2)


@data.command()
@click.argument("path", type=PATH)
@reading
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def info(path: Path, reader: str, taxonomy: Path | None, quiet: bool) -> None:
    """Show layout, sizes, resolution, classes, splits and groups."""
    _log(quiet)
    from celltyper.datasets.checking import describe
    from celltyper.datasets.summary import description_text
    from celltyper.readers import open_parts

    dataset, layout = open_parts(path, reader, taxonomy)
    click.echo(description_text(describe(dataset, _names_bar("info", quiet)), layout))


def _names_bar(what: str, quiet: bool) -> Callable[[Iterable[str]], Iterable[str]]:
    """Progress bar over the names of samples."""
    from tqdm import tqdm

    def bar(names: Iterable[str]) -> Iterable[str]:
        hidden = True if quiet else None
        wrapped: Iterable[str] = tqdm(
            names, desc=what, unit="image", disable=hidden, leave=False, dynamic_ncols=True
        )
        return wrapped

    return bar


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors are one line, exit code 2 for wrong input, 1 for a failure."""
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    try:
        code = cli.main(args=arguments, prog_name="celltyper", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        _show(error)
        code = 2
    except (click.Abort, KeyboardInterrupt) as stop:
        # click raises its Abort from the KeyboardInterrupt, which may say how to go on.
        click.echo(f"celltyper: {str(stop.__cause__ or stop) or 'stopped'}", err=True)
        code = 130
    except CelltyperError as error:
        if debug:
            raise
        click.echo(f"celltyper: {error}", err=True)
        code = error.exit_code
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split())
        kind = type(error).__name__
        # A user knows what "No space left on device" means, but not what "'a'" of a KeyError does.
        known = text and isinstance(error, OSError | RuntimeError)
        text = text if known else f"{kind}: {text}".rstrip(": ")
        click.echo(f"celltyper: {text} (celltyper --debug shows where)", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _show(error: click.ClickException) -> None:
    """Print a wrong option as one line; a command without arguments prints its help."""
    text = error.format_message()
    if "\n" in text:
        error.show()
        return
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "celltyper"
    click.echo(f"celltyper: {text.rstrip('.')} (see {command} --help)", err=True)


def _log(quiet: bool) -> None:
    """Send celltyper's log to standard error, plain."""
    if quiet:
        # read when the hub's client is imported, which is later
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("celltyper")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        click.echo(text)


if __name__ == "__main__":
    main()
