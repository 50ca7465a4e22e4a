"""Options and output that several commands share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

PATH = click.Path(path_type=Path)
MODEL = click.Path()
"""A path or name, as it was typed: to Path, "./NAME" would be the same as "NAME"."""


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that computes."""
    command = click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")(command)
    return click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
    )(command)


MODEL_OPTIONS = ("device", "batch_size", "symmetries", "precision", "encoder_weights", "allow_code")


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
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="Of the forward pass.  [default: the run's if the device is faster so]",
        ),
        click.option(
            "--symmetries",
            type=click.Choice(["1", "2", "4", "8"]),
            callback=lambda _context, _option, value: value and int(value),
            help="Average over turned and mirrored images.  [default: as in the run]",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            help="Tiles or patches per forward pass.  [default: as in the run]",
        ),
    ):
        command = option(command)
    return common(command)


SKIP_BAD = click.option(
    "--skip-bad", is_flag=True, help="Patches: go on without files that cannot be read."
)
IMAGES = click.option(
    "--images", type=PATH, help="Patches: folder of the images that a table names."
)

_SLIDES = (
    click.option(
        "--tissue",
        default="auto",
        show_default=True,
        metavar="auto|all|FILE",
        help="Slides: where to look: by color, everywhere, a mask image or QuPath GeoJSON.",
    ),
    click.option("--region", metavar="X,Y,W,H", help="Slides: only here, in full-resolution px."),
    click.option(
        "--workers",
        default=1,
        show_default=True,
        type=click.IntRange(1),
        help="Slides: processes on this machine.",
    ),
    click.option(
        "--cluster", metavar="ADDRESS", help="Slides: scheduler of a running Dask cluster."
    ),
    click.option("--keep-maps", is_flag=True, help="Slides: keep the stitched maps (zarr)."),
    click.option(
        "--embeddings", is_flag=True, help="Slides: what the encoder sees at each cell, a vector."
    ),
    click.option("--strict", is_flag=True, help="Slides: a damaged tile is an error."),
    click.option(
        "--block",
        default=1536,
        show_default=True,
        type=click.IntRange(1),
        help="Slides: side of what is worked on at a time, px.",
    ),
)
SLIDES_ONLY = (
    "tissue", "region", "workers", "cluster", "keep_maps", "embeddings", "strict", "block",
)  # fmt: skip
"""Options without effect on images that are worked on as a whole."""


def slides(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of what is done to slides."""
    for option in reversed(_SLIDES):
        command = option(command)
    return command


CELLS_ONLY = (*SLIDES_ONLY, "precision", "allow_code", "taxonomy")
"""Options without effect on patches."""
PATCHES_ONLY = ("points", "images", "skip_bad", "against", "classes", "folds", "size")
"""Options without effect on images of cells."""

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


def given(names: Iterable[str]) -> bool:
    """Whether one of the options was given on the command line."""
    context = click.get_current_context()
    return any(context.get_parameter_source(n) is ParameterSource.COMMANDLINE for n in names)


def refuse(names: Iterable[str], why: str) -> None:
    """Refuse options that have no effect, if they were given.

    Parameters
    ----------
    names : iterable of str
        Names of the command's parameters.
    why : str
        What they are for.

    Raises
    ------
    click.UsageError
        Naming the first that was given.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = name.removeprefix("encoder_").replace("_", "-")
            raise click.UsageError(f"--{option} is {why}")


def of_patches(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that have an effect on patches; the others are refused if they were given."""
    refuse(CELLS_ONLY, "for images of cells, and this is about patches")
    return {name: value for name, value in options.items() if name not in CELLS_ONLY}


def of_cells(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that have an effect on images of cells; the others are refused if given."""
    refuse(PATCHES_ONLY, "for patches, and this is about images of cells")
    return {name: value for name, value in options.items() if name not in PATCHES_ONLY}


class _Once(logging.Filter):
    """Lets a warning of the readers pass once: a run reads every image many times."""

    def __init__(self) -> None:
        super().__init__("celltyper.readers")
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is of something else, or new."""
        text = record.getMessage()
        if not super().filter(record) or text not in self._seen:
            self._seen.add(text)
            return True
        return False


def start_log(quiet: bool) -> None:
    """Send celltyper's log to standard error, plain."""
    if quiet:
        # read when the hub's client is imported, which is later
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_Once())
    logger = logging.getLogger("celltyper")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


def say(quiet: bool, text: str) -> None:
    """Print a result, unless only errors are wanted."""
    if not quiet:
        click.echo(text)
