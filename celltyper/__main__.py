"""The ``celltyper`` command; every command imports what it needs when it runs."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from celltyper import __version__
from celltyper.errors import CelltyperError

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
            "--encoder-weights",
            metavar="FILE",
            help="Base weights of the encoder, if not where they were at training.",
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


@cli.command()
@click.argument("config")
@click.option("-o", "--output", type=PATH, required=True, help="Run folder to write.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override section.key=value."
)
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option("--overwrite", is_flag=True, help="Start over where another run is.")
@common
def train(
    config: str,
    output: Path,
    overrides: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    device: str,
    quiet: bool,
) -> None:
    r"""Train a model as CONFIG says: a YAML file or the name of a recipe.

    \b
    celltyper train unetr -o run --set data.root=DATA
    """
    _log(quiet)
    from celltyper.config import load_config
    from celltyper.training import train as run

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
    r"""Find and type the cells of images (PNG, JPEG, TIFF) or of folders of images.

    \b
    celltyper infer image.png -m run -o out
    """
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
    r"""Score a model on annotated images, or predictions that are there already.

    \b
    celltyper eval RUN DATA
    celltyper eval --pred OUT --ref DATA
    """
    of_run = run is not None and data is not None and pred is None and ref is None
    if not of_run and not (pred and ref and run is None):
        raise click.UsageError("give RUN and DATA, or --pred and --ref")
    if not of_run:
        for name in (*MODEL_OPTIONS, "allow_seen"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = name.replace("_", "-")
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
@click.argument("name", required=False)
def encoders(name: str | None) -> None:
    """List the encoders that are known by name, or show the card of one."""
    from celltyper.encoders.cards import list_cards, load_card

    if name is not None:
        for key, value in load_card(name).model_dump(mode="json").items():
            click.echo(f"{key:16} {value}")
        return
    width = max(map(len, list_cards()))
    click.echo(f"{'name':{width}} {'patch':>5} {'dim':>5} {'input':>5} {'mpp':>5}  licence")
    for card in map(load_card, list_cards()):
        gate = " (gated)" if card.gated else ""
        click.echo(
            f"{card.name:{width}} {card.patch_size:>5} {card.embed_dim:>5} {card.input_size:>5} "
            f"{card.mpp or '-':>5}  {card.licence}{gate}"
        )


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
