"""``celltyper data``: look at annotated images, find mistakes in them, store them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click

from celltyper.commands.shared import PATH, reading, say, start_log


@click.group()
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
            compress=not no_compress,
            overwrite=overwrite,
            progress=not quiet,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    say(quiet, f"store: {store}")


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
    start_log(quiet)
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
    start_log(quiet)
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
