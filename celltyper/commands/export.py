"""``celltyper export``: a model, or the cells that were found, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from celltyper.commands.shared import MODEL, PATH, refuse, say, start_log


@click.command()
@click.argument("folder", type=MODEL, metavar="FOLDER")
@click.option(
    "--to",
    metavar="A,B",
    help="Cells: geojson, geojson.gz, geojson-tiles, csv, ome-zarr, spatialdata, anndata.",
)
@click.option(
    "--format",
    default="onnx",
    show_default=True,
    type=click.Choice(["onnx", "torchscript", "torch-export", "peft", "half"]),
    help="Model: peft is only the adapters of the encoder, half a smaller one for celltyper.",
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
@click.option("--whole", is_flag=True, help="Half: with the encoder's own weights inside.")
@click.option("--allow-code", is_flag=True, help="Model: import the author's code that it names.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")
def export(
    folder: str,
    to: str | None,
    format: str,
    output: Path | None,
    tile: int | None,
    whole: bool,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write a model, or the cells that were found, for other programs.

    Of a run, or a model by its name: the model as one file, checked against it (docs/export.md).
    Of results of infer: the cells in other formats (docs/formats.md).

    \b
    celltyper export run --format torchscript
    celltyper export run --format half -o nuclei
    celltyper export out --to ome-zarr,anndata
    """  # noqa: D301
    start_log(quiet)
    found = Path(folder)
    results = (found / "infer.json").is_file()
    if to is None and results:
        raise click.UsageError(f"{folder} holds cells: say --to geojson, csv, ome-zarr, ...")
    if to is not None:
        if not results and (found / "config.yaml").is_file():
            raise click.UsageError(f"--to is for results of infer, and {folder} is a run")
        refuse(
            ("format", "tile", "whole", "encoder_weights", "allow_code"),
            "for a model, --to for cells",
        )
        from celltyper.formats import export_cells

        names = [name.strip() for name in to.split(",") if name.strip()]
        for path in export_cells(found, names, output, overwrite=overwrite, progress=not quiet):
            say(quiet, f"cells: {path}")
        return
    if whole and format != "half":
        raise click.UsageError("--whole is for --format half: other formats hold everything")
    other = {"peft": "peft writes adapters only", "half": "half takes tiles of any size"}
    if tile is not None and format in other:
        raise click.UsageError(f"--tile is for a model in other programs: {other[format]}")
    from celltyper.library.shelf import find_model, results_folder

    found = find_model(folder)
    from celltyper.exporting import SUFFIXES, export_adapter, export_model
    from celltyper.publishing import export_half

    own = {"peft": "adapter", "half": "half"}.get(format) or f"model{SUFFIXES[format]}"
    path = output or results_folder(found) / own
    options["overwrite"] = overwrite
    if format == "peft":
        say(quiet, f"adapter: {export_adapter(found, path, **options)}")
        return
    if format == "half":
        done = export_half(found, path, whole=whole, **options)
    else:
        done = export_model(found, path, format, tile=tile, **options)
    say(quiet, f"largest difference to the model: {done.largest_difference:.2g}")
    say(quiet, f"{format}: {done.path}")
