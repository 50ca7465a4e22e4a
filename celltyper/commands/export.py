"""``celltyper export``: a model, or the cells that were found, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from celltyper.commands.shared import PATH, refuse, say, start_log


@click.command()
@click.argument("folder", type=PATH, metavar="FOLDER")
@click.option(
    "--to",
    metavar="A,B",
    help="Cells: geojson, geojson.gz, geojson-tiles, csv, ome-zarr, spatialdata, anndata.",
)
@click.option(
    "--format",
    default="onnx",
    show_default=True,
    type=click.Choice(["onnx", "torchscript", "torch-export", "peft"]),
    help="Model: peft is only the adapters of the encoder.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="File to write; of cells the folder.  [default: in FOLDER]",
)
@click.option(
    "--tile",
    type=click.IntRange(32, 4096),
    help="Model: side of the images.  [default: as in the run]",
)
@click.option(
    "--weights",
    "encoder_weights",
    metavar="PATH",
    help="Model: encoder weights (file or folder), if not where they were.",
)
@click.option("--allow-code", is_flag=True, help="Model: import the author's code that it names.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def export(
    folder: Path,
    to: str | None,
    format: str,
    output: Path | None,
    tile: int | None,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write a model, or the cells that were found, for other programs.

    Of a run: its model as one file, checked against the model (docs/export.md). Of results of
    infer: the cells in other formats (docs/formats.md).

    \b
    celltyper export run --format torchscript
    celltyper export out --to ome-zarr,anndata
    """  # noqa: D301
    start_log(quiet)
    results = (folder / "infer.json").is_file()
    if to is None and results:
        raise click.UsageError(f"{folder} holds cells: say --to geojson, csv, ome-zarr, ...")
    if to is not None:
        if not results and (folder / "config.yaml").is_file():
            raise click.UsageError(f"--to is for results of infer, and {folder} is a run")
        refuse(("format", "tile", "encoder_weights", "allow_code"), "for a model, --to for cells")
        from celltyper.formats import export_cells

        names = [name.strip() for name in to.split(",") if name.strip()]
        for path in export_cells(folder, names, output, overwrite=overwrite, progress=not quiet):
            say(quiet, f"cells: {path}")
        return
    from celltyper.exporting import SUFFIXES, export_adapter, export_model

    inside = folder if folder.is_dir() else folder.parent
    options["overwrite"] = overwrite
    if format == "peft":
        if tile is not None:
            raise click.UsageError("--tile is for a whole model: peft writes adapters only")
        adapter = export_adapter(folder, output or inside / "adapter", **options)
        say(quiet, f"adapter: {adapter}")
        return
    path = output or inside / f"model{SUFFIXES[format]}"
    done = export_model(folder, path, format, tile=tile, **options)
    say(quiet, f"largest difference to the model: {done.largest_difference:.2g}")
    say(quiet, f"{format}: {done.path}")
