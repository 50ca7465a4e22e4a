"""Options and output that several commands share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


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
            default="fp32",
            show_default=True,
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="Of the forward pass.",
        ),
        click.option(
            "--symmetries",
            type=click.Choice(["1", "2", "4", "8"]),
            callback=lambda _context, _option, value: value and int(value),
            help="Average over turned and mirrored tiles.  [default: as in the run]",
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
