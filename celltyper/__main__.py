"""The ``celltyper`` command; every command imports what it needs when it runs."""

from __future__ import annotations

import atexit
import gc
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from celltyper import __version__
from celltyper.benchmark import BENCHMARK_FILE
from celltyper.commands.benchmark import benchmark
from celltyper.commands.data import data
from celltyper.commands.encoders import encoders
from celltyper.commands.export import export
from celltyper.commands.models import models
from celltyper.commands.shared import (
    IMAGES,
    MODEL,
    MODEL_OPTIONS,
    PATH,
    SKIP_BAD,
    SLIDES_ONLY,
    common,
    given,
    of_cells,
    of_patches,
    predicting,
    reading,
    refuse,
    say,
    slides,
    start_log,
)
from celltyper.errors import CelltyperError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.version_option(__version__, prog_name="celltyper")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Find every nucleus on an H&E image, outline it and name its phenotype."""
    context.obj = {"debug": debug}


@cli.command()
@click.argument("config")
@click.option("-o", "--output", type=PATH, required=True, help="Run folder to write.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override section.key=value."
)
@click.option("--weights", metavar="PATH", help="Encoder weights: sets encoder.weights.")
@click.option(
    "--protocol",
    metavar="FILE",
    help="Train all folds, fractions, domains or seeds that a YAML lists (docs/protocols.md).",
)
@click.option("--resume", is_flag=True, help="Go on with what was interrupted.")
@click.option("--overwrite", is_flag=True, help="Start over where another run is.")
@common
def train(
    config: str,
    output: Path,
    overrides: tuple[str, ...],
    weights: str | None,
    protocol: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a model as CONFIG says: a YAML file or the name of a recipe.

    \b
    celltyper train unetr -o run --set data.root=DATA
    celltyper train unetr -o runs --set data.root=DATA --protocol kfold
    """  # noqa: D301
    start_log(quiet)
    from celltyper.config import load_config, task_of

    if weights is not None:
        # quoted, since a path may read as YAML
        overrides += (f"encoder.weights={json.dumps(weights, ensure_ascii=False)}",)
    options["progress"] = not quiet
    try:
        if task_of(config) == "patches":
            from celltyper.classification.config import PatchConfig

            own = load_config(config, overrides, PatchConfig)
            if protocol is None:
                from celltyper.classification.training import train_patches

                train_patches(own, output, **options)
            else:
                from celltyper.protocols import load_protocol, run_patch_protocol

                run_patch_protocol(own, load_protocol(protocol), output, **options)
        else:
            settings = load_config(config, overrides)
            if protocol is None:
                from celltyper.training import train as run

                run(settings, output, **options)
            else:
                from celltyper.protocols import load_protocol, run_protocol

                run_protocol(settings, load_protocol(protocol), output, **options)
    except KeyboardInterrupt:
        words = ["celltyper", "train", config, "-o", str(output)]
        words += [word for o in overrides for word in ("--set", o)]
        words += ["--protocol", protocol] if protocol else []
        hint = f"; go on with: {shlex.join([*words, '--resume'])}" if output.is_dir() else ""
        raise KeyboardInterrupt(f"stopped{hint}") from None
    if protocol is None:
        say(quiet, f"run: {output}")
    else:
        say(quiet, f"protocol: {output} (celltyper report {output} makes the table)")


@cli.command()
@click.argument("inputs", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "-m",
    "--model",
    type=MODEL,
    help="Run folder, checkpoint, .onnx or name of a model.  [default: that of the box]",
)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
@click.option("--mpp", type=float, help="Micrometres per pixel.  [default: as the files say]")
@click.option("--points", type=PATH, help="Patches: where to look on IMAGE (CSV, cells, GeoJSON).")
@IMAGES
@SKIP_BAD
@click.option(
    "--abstain",
    type=click.FloatRange(0.5, 0.99),
    metavar="SHARE",
    help="Name only what is as sure as this share of validation; the rest is 'unknown'.",
)
@click.option("--overwrite", is_flag=True, help="Replace earlier results in the folder.")
@slides
@predicting
def infer(
    inputs: tuple[str, ...], model: str | None, output: Path, quiet: bool, **options: Any
) -> None:
    """Find and type the cells of images (PNG, JPEG, TIFF), of slides, or of folders of them.

    Slides are what OpenSlide and OME-Zarr know, and large images: worked on in blocks, in bounded
    memory, and the same command goes on where it was stopped. A model of patches types patches,
    those of a CSV, or points of one image or slide; the folder of a protocol types as an ensemble
    of its models.

    \b
    celltyper infer image.png -o out
    celltyper infer image.png -m run -o out
    celltyper infer slides/*.svs -m run -o out --workers 2
    celltyper infer patches/ -m mitosis-run -o out --mpp 0.25
    celltyper infer slide.svs --points cells.csv -m mitosis-run -o out
    """  # noqa: D301
    start_log(quiet)
    from celltyper.library.shelf import find_model

    found = find_model(model)
    if model is None:
        say(quiet, f"model: {found.name}, of the box")
    from celltyper.library.files import task_of_run

    if task_of_run(found) == "patches":
        options = of_patches(options)
        from celltyper.classification.inference import infer_patches, inferred_text

        done = infer_patches(inputs, found, output, progress=not quiet, **options)
        say(quiet, inferred_text(done))
        return
    options = of_cells(options)
    from celltyper.inputs import are_slides

    if given(SLIDES_ONLY) or are_slides(inputs):
        from celltyper.cohort import infer_slides, summary_text

        folder = infer_slides(inputs, found, output, progress=not quiet, **options)
        say(quiet, summary_text(folder))
        say(quiet, f"report: {folder / 'report.html'}")
        return
    options = {name: value for name, value in options.items() if name not in SLIDES_ONLY}
    from celltyper.inference import infer as run

    folder = run(inputs, found if model else None, output, progress=not quiet, **options)
    say(quiet, f"cells: {folder / 'cells.parquet'}")


@cli.command(name="eval")
@click.argument("run", required=False, type=MODEL)
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
@IMAGES
@SKIP_BAD
@click.option("--against", type=PATH, help="Patches: evaluation to compare with, on the same.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier evaluation.")
@reading
@predicting
def evaluate(
    run: str | None,
    data: Path | None,
    pred: Path | None,
    ref: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Score a model on annotated images, or predictions that are there already.

    A model of patches is scored on annotated patches; the folder of a protocol is scored as an
    ensemble of its models, with the mean and deviation of these.

    \b
    celltyper eval RUN DATA
    celltyper eval --pred OUT --ref DATA
    """  # noqa: D301
    of_run = run is not None and data is not None and pred is None and ref is None
    if not of_run and not (pred and ref and run is None):
        raise click.UsageError("give RUN and DATA, or --pred and --ref")
    if not of_run:
        own = (*MODEL_OPTIONS, "allow_seen")
        refuse(own, "for RUN and DATA: --pred runs no model")
        options = {name: value for name, value in options.items() if name not in own}
    start_log(quiet)
    found = None
    if run is not None and data is not None:
        from celltyper.library.shelf import find_model

        found = find_model(run)
        from celltyper.library.files import task_of_run

        if task_of_run(found) == "patches":
            from celltyper.classification.evaluating import evaluate_patches
            from celltyper.classification.wording import evaluation_text

            done = evaluate_patches(found, data, progress=not quiet, **of_patches(options))
            say(quiet, evaluation_text(done))
            say(quiet, f"report: {done.folder / 'report.html'}")
            return
    options = of_cells(options)
    from celltyper.results import evaluate_predictions, evaluate_run, summary_text

    if found is not None and data is not None:
        summary, folder = evaluate_run(found, data, progress=not quiet, **options)
    else:
        summary, folder = evaluate_predictions(pred or "", ref or "", **options)
    say(quiet, summary_text(summary))
    say(quiet, f"report: {folder / 'report.html'}")


@cli.command()
@click.argument("folder", type=PATH, metavar="OUT")
@click.option(
    "--resamples",
    default=1000,
    show_default=True,
    type=click.IntRange(0),
    help="Bootstrap resamples of the intervals.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing, only write.")
def report(folder: Path, resamples: int, quiet: bool) -> None:
    """Make the table of a protocol or the leaderboard of a benchmark, finished or not.

    Of what train --protocol wrote: table.csv, table.md and report.html into OUT, with several
    variants differences.csv, and for cells classes.csv. Of a benchmark: index.html,
    leaderboard.csv, differences.csv and leaderboard.tex.
    """
    start_log(quiet)
    if (folder / BENCHMARK_FILE).is_file():
        from celltyper.benchmark.writing import leaderboard_text, report_benchmark

        say(quiet, leaderboard_text(report_benchmark(folder, resamples=resamples)))
        say(quiet, f"leaderboard: {folder / 'index.html'}")
        return
    from celltyper.protocols import report_protocol
    from celltyper.protocols.table import read_plan
    from celltyper.protocols.writing import table_text

    if read_plan(folder).get("task") == "patches":
        from celltyper.protocols.patch_writing import report_patch_protocol
        from celltyper.protocols.patch_writing import table_text as patch_table_text

        say(quiet, patch_table_text(report_patch_protocol(folder, resamples=resamples)))
        say(quiet, f"report: {folder / 'report.html'}")
        return
    say(quiet, table_text(report_protocol(folder, resamples=resamples)))
    say(quiet, f"report: {folder / 'report.html'}")


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
    start_log(quiet)
    from celltyper.demo import run_demo

    run_demo(
        output,
        data=data,
        quick=quick,
        overwrite=overwrite,
        device=device,
        progress=not quiet,
        say=lambda text: say(quiet, text),
    )


cli.add_command(benchmark)
cli.add_command(encoders)
cli.add_command(data)
cli.add_command(export)
cli.add_command(models)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors are one line, exit code 2 for wrong input, 1 for a failure."""
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    atexit.register(_end_fast)
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


def _end_fast() -> None:
    """Spare Python looking through all objects of all libraries as it ends, a third of a second.

    Where torch is loaded it has to: parts of it complain of what is left.
    """
    if "torch" not in sys.modules:
        gc.freeze()


def _show(error: click.ClickException) -> None:
    """Print a wrong option as one line; a command without arguments prints its help."""
    text = error.format_message()
    if "\n" in text:
        error.show()
        return
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "celltyper"
    click.echo(f"celltyper: {text.rstrip('.')} (see {command} --help)", err=True)


if __name__ == "__main__":
    main()
