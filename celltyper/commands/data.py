"""``celltyper data``: look at annotated images, find mistakes in them, store them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from celltyper.commands.shared import (
    IMAGES,
    PATH,
    of_cells,
    of_patches,
    reading,
    say,
    start_log,
)
from celltyper.errors import DataError

if TYPE_CHECKING:
    from celltyper.patches.table import PatchTable

CLASSES = click.option(
    "--classes",
    metavar="A,B",
    callback=lambda _context, _option, value: (
        tuple(name.strip() for name in value.split(",")) if value else None
    ),
    help="Patches: classes expected, or what numbers stand for.",
)


@click.group()
def data() -> None:
    """Describe annotated images, find mistakes in them, store them."""


@data.command()
@click.argument("sources", nargs=-1, required=True, type=PATH, metavar="SRC...")
@click.option("-o", "--output", type=PATH, required=True, help="Store to write, OUT.zarr.")
@click.option("--mpp", type=float, help="Micrometres per pixel.  [default: as the data say]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier store.")
@reading
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def prepare(
    sources: tuple[Path, ...],
    output: Path,
    mpp: float | None,
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
    start_log(quiet)
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
            overwrite=overwrite,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    say(quiet, f"store: {store}")


@data.command(name="check")
@click.argument("path", type=PATH)
@CLASSES
@click.option(
    "--folds", type=click.IntRange(2), help="Patches: folds by slide that there are to be."
)
@click.option(
    "--size", type=click.IntRange(1), help="Patches: side of the windows, to find cut ones."
)
@IMAGES
@reading
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
@click.pass_context
def check_data(
    context: click.Context,
    /,
    path: Path,
    reader: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Find mistakes in annotated images, or in annotated patches.

    Exit code 2 if there are errors, 0 if there are only warnings.
    """
    start_log(quiet)
    from celltyper.datasets.summary import check_text

    layout = _layout_of_patches(path, reader)
    if layout is None:
        from celltyper.datasets.checking import check_dataset
        from celltyper.readers import open_parts

        dataset, layout = open_parts(path, reader, **of_cells(options))
        found = check_dataset(dataset, _bar("check", "image", quiet))
    else:
        from celltyper.classification.summary import describe_patches
        from celltyper.datasets.checking import Check
        from celltyper.patches.checking import check_patches

        asked = of_patches(options)
        classes = asked["classes"]
        table = _open_patches(path, layout, classes, asked["images"], pixels=True)
        problems = check_patches(
            table,
            classes,
            asked["folds"],
            size=asked["size"],
            progress=_bar("check", "patch", quiet),
        )
        found = Check(tuple(problems), describe_patches(table))
    click.echo(check_text(found, layout))
    if found.errors:
        context.exit(2)


@data.command()
@click.argument("path", type=PATH)
@CLASSES
@IMAGES
@reading
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def info(path: Path, reader: str, quiet: bool, **options: Any) -> None:
    """Show layout, sizes, resolution, classes, splits and groups."""
    start_log(quiet)
    from celltyper.datasets.summary import description_text

    layout = _layout_of_patches(path, reader)
    if layout is None:
        from celltyper.datasets.checking import describe
        from celltyper.readers import open_parts

        dataset, layout = open_parts(path, reader, **of_cells(options))
        about = describe(dataset, _bar("info", "image", quiet))
    else:
        from celltyper.classification.summary import describe_patches

        asked = of_patches(options)
        table = _open_patches(path, layout, asked["classes"], asked["images"], pixels=False)
        about = describe_patches(table)
    click.echo(description_text(about, layout))


def _layout_of_patches(path: Path, reader: str) -> str | None:
    """Reader of annotated patches that fits; None where cells are annotated, or nothing is."""
    from celltyper.patches.reading import READERS, recognise
    from celltyper.readers import holds_cells

    if reader != "auto" or not path.exists():
        return reader if reader in READERS else None
    # meta.json stands beside data of either kind and is none
    if path.is_file() and path.name != "meta.json":
        return recognise(path)
    if holds_cells(path) or path.is_file():
        return None
    try:
        return recognise(path)
    except DataError as error:
        if "several layouts" in str(error):
            raise
        return None


def _open_patches(
    path: Path, layout: str, classes: tuple[str, ...] | None, images: Path | None, *, pixels: bool
) -> PatchTable:
    """Open patches as they are labelled; if labels are numbers or missing, by the names given."""
    from celltyper.patches.reading import open_patches

    try:
        return open_patches(path, reader=layout, images=images, pixels=pixels)
    except DataError:
        if classes is None:
            raise
        return open_patches(path, classes=classes, reader=layout, images=images, pixels=pixels)


def _bar(what: str, unit: str, quiet: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Progress bar over samples."""
    from tqdm import tqdm

    def bar(samples: Iterable[Any]) -> Iterable[Any]:
        hidden = True if quiet else None
        wrapped: Iterable[Any] = tqdm(
            samples, desc=what, unit=unit, disable=hidden, leave=False, dynamic_ncols=True
        )
        return wrapped

    return bar
