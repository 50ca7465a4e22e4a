"""Images on disk to cells on disk: ``celltyper infer``."""

from __future__ import annotations

import logging
import time
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from celltyper.atomic import atomic_path, make_folder
from celltyper.calibration import calibration_of, threshold_of
from celltyper.cells.colors import colors_of
from celltyper.cells.geojson import write_geojson
from celltyper.cells.morphology import measure
from celltyper.cells.stream import write_csv
from celltyper.cells.table import cells_table, concat_cells, write_parquet
from celltyper.config import one_line
from celltyper.datasets import read_image
from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.datasets.resolution import check_mpp
from celltyper.domain import Distance, warning_of
from celltyper.errors import ConfigError, DataError
from celltyper.exported import ExportedModel, exported_for
from celltyper.index import INDEX_FILE, read_index, write_index
from celltyper.labels import label_boxes
from celltyper.library.shelf import find_model
from celltyper.outputs import (
    CELLS_FILE,
    GEOJSON_FILE,
    LABELS_FILE,
    check_free,
    clear,
    clear_folder,
    is_slide,
)
from celltyper.predict import predict_image
from celltyper.readers.files import files_by_stem
from celltyper.report.overlay import save_overlay
from celltyper.types import Image, Prediction, TileModel

if TYPE_CHECKING:
    from celltyper.models import CellTyper

logger = logging.getLogger("celltyper")

BOX_MPP = 0.25
"""Micrometres per pixel of images that state none, where no model is asked for by name."""
CSV_FILE = "cells.csv"
OVERLAY_FILE = "overlay.png"


def infer(
    inputs: Sequence[str | Path],
    run: str | Path | None,
    output: str | Path,
    *,
    mpp: float | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    symmetries: int | None = None,
    precision: str | None = None,
    abstain: float | None = None,
    overwrite: bool = False,
    encoder_weights: str | None = None,
    allow_code: bool = False,
    progress: bool = True,
) -> Path:
    """Find and type the cells of images and write them.

    One image is written straight into `output`, several into one folder each, beside one table
    ``cells.parquet`` of them all: ``cells.parquet``, ``cells.csv``, ``cells.geojson``,
    ``labels.npz`` (``inst`` int32, ``type`` uint8, ``prob`` uint8 (K + 1, H, W) in 255ths,
    ``cell_prob`` float32 (n, K + 1)) and ``overlay.png``; ``infer.json`` says what was done.

    Parameters
    ----------
    inputs : sequence of str or Path
        Images, or folders of images.
    run : str, Path or None
        Run folder, checkpoint, or ``.onnx`` of `celltyper.exporting`. A plain word may be the
        name of a model, and None is that of the box: see `celltyper.library.shelf.find_model`.
    output : str or Path
        Folder to write to.
    mpp : float or None
        Micrometres per pixel of the images; None takes what the files say. Without a model by
        name, files that say nothing are taken to have `BOX_MPP`, with a warning.
    device : str
        See `celltyper.devices.pick_device`.
    batch_size : int or None
        Tiles per forward pass; None takes what the run was configured with.
    symmetries : {1, 2, 4, 8} or None
        Over how many symmetries of a tile maps are averaged; None takes what the run was
        configured with.
    precision : {"fp32", "bf16", "fp16"} or None
        See `celltyper.models.pick_precision`.
    abstain : float or None
        See `celltyper.predict_image`: cells below the threshold are "unknown".
    overwrite : bool
        Replace earlier results in `output`.
    encoder_weights, allow_code
        See `celltyper.load_model`.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    Path
        The output folder.

    Raises
    ------
    DataError
        If an image is missing, or could not be read or predicted; the other images are done
        first, and their results stay.
    ConfigError, CheckpointError
        For wrong input, before anything is written.
    """
    output, assumed = Path(output), BOX_MPP if run is None else None
    run = find_model(run)
    paths = find_images(inputs)
    folders = {name: output if len(paths) == 1 else output / name for name in paths}
    check_free(output)
    held = [each for each in folders.values() if is_slide(each)]
    if (held or (output / INDEX_FILE).exists()) and not overwrite:
        raise ConfigError(
            f"{held[0] if held else output} already holds results of infer; pass --overwrite or "
            "another folder"
        )
    check_mpp(mpp)
    model, precision = _loaded(
        run, device, precision, encoder_weights=encoder_weights, allow_code=allow_code
    )
    Thread(target=_get_ready, daemon=True).start()
    threshold = threshold_of(model.calibration, model.classes, abstain)
    new = not output.exists()
    make_folder(output)
    entries: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    tables = []
    distances: dict[str, Distance] = {}
    said = False
    writing: Future[pa.Table] | None = None
    bar = tqdm(
        total=0, desc="infer", unit="tile", disable=None if progress else True, dynamic_ncols=True
    )
    # an image is written while the next one is read and computed
    with bar, ThreadPoolExecutor(1) as writer:
        for name, path in paths.items():
            folder = folders[name]
            done = bar.n

            def show(tile: int, tiles: int, done: int = done) -> None:
                bar.total = done + tiles
                bar.update(done + tile - bar.n)

            started = time.monotonic()
            try:
                image, own_mpp = read_image(path)
                known = own_mpp if mpp is None else mpp
                if known is None and assumed is not None and not said:
                    said = True
                    logger.warning(
                        "%s states no resolution: taken%s as %g micrometres per pixel, a 40x scan; "
                        "say --mpp if it is another",
                        name,
                        ", like all others that state none," if len(paths) > 1 else "",
                        assumed,
                    )
                prediction = predict_image(
                    model,
                    image,
                    known or assumed,
                    batch_size=batch_size,
                    symmetries=symmetries,
                    precision=precision,
                    name=name,
                    progress=show,
                    abstain=abstain,
                )
            except DataError as error:
                if len(paths) == 1:
                    if new:
                        with suppress(OSError):
                            output.rmdir()
                    raise
                logger.warning("skipped: %s", error)
                failed.append({"image": str(path), "error": str(error)})
                continue
            distance = prediction.distance
            if distance is not None:
                distances[name] = distance
            # From the first write on, the folder counts as unfinished until the index is there.
            if not entries:
                clear(output)
                for each in held:
                    clear_folder(each)
            entries.append(
                {
                    "name": name,
                    "image": str(path.absolute()),
                    "folder": "." if folder == output else name,
                    "height": image.shape[0],
                    "width": image.shape[1],
                    "mpp": prediction.mpp,
                    "cells": len(prediction),
                    "domain": None if distance is None else distance._asdict(),
                    "seconds": round(time.monotonic() - started, 2),
                }
            )
            if writing is not None:
                tables.append(writing.result())
            writing = writer.submit(write_prediction, folder, image, prediction, model)
            bar.set_postfix(cells=sum(e["cells"] for e in entries), refresh=False)
        if writing is not None:
            tables.append(writing.result())
    if warning := warning_of(distances):
        logger.warning(warning)
    if not entries:
        raise DataError(f"all {len(paths)} images failed, the first: {failed[0]['error']}")
    if len(paths) > 1:
        write_parquet(output / CELLS_FILE, concat_cells(tables))
    write_index(
        output,
        model,
        run=str(run.absolute()),
        device=str(model.device),
        symmetries=symmetries or model.symmetries,
        precision=precision,
        threshold=threshold,
        images=entries,
        failed=failed,
    )
    if failed:
        raise DataError(
            f"{len(failed)} of {len(paths)} images failed, the first: {failed[0]['error']} "
            f"(all in {output / INDEX_FILE}; the other {len(entries)} are done)"
        )
    return output


def _loaded(
    run: Path,
    device: str,
    precision: str | None,
    *,
    encoder_weights: str | None,
    allow_code: bool,
) -> tuple[CellTyper | ExportedModel, str]:
    """Load a model, exported or in torch, and say in which precision it is to run."""
    file = exported_for(run, device, precision)
    if file is not None:
        if encoder_weights is not None:
            raise ConfigError(f"{file} holds the whole model: leave out --weights")
        exported = ExportedModel(file, allow_code=allow_code)
        if precision not in (None, exported.precision):
            raise ConfigError(f"{file} computes in {exported.precision}: leave out --precision")
        return exported, exported.precision
    # torch takes seconds to import, and as much memory as all the rest
    from celltyper.checkpoints import load_model
    from celltyper.devices import autocast, pick_device
    from celltyper.models import pick_precision

    place = pick_device(device)
    if precision is not None:
        autocast(place, precision)
    model = load_model(run, device=place, encoder_weights=encoder_weights, allow_code=allow_code)
    return model, pick_precision(model, precision)


def _get_ready() -> None:
    """Have loaded what cells will need, while the first image is read.

    The first compiled function that is called loads all of numba, the first array made by pyarrow
    loads pandas.
    """
    label_boxes(np.zeros((1, 1), np.int32))
    pa.array([0])


def find_images(inputs: Sequence[str | Path]) -> dict[str, Path]:
    """List images by name (the file's stem); folders give the images right inside them.

    Raises
    ------
    DataError
        If a path is missing, a folder holds no image, or two images have the same name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, inputs):
        if path.is_dir():
            inside = path / "images" if (path / "images").is_dir() else path
            files = list(files_by_stem(inside, IMAGE_SUFFIXES).values())
            if not files:
                raise DataError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        elif path.is_file():
            files = [path]
        else:
            raise DataError(f"no such image or folder: {path}")
        for file in files:
            if file.stem in found:
                raise DataError(
                    f"{found[file.stem]} and {file} have the same name {file.stem!r}; rename one "
                    "or infer them into two folders"
                )
            found[file.stem] = file
    if not found:
        raise DataError("give at least one image or folder of images")
    return found


def write_prediction(
    folder: Path, image: Image, prediction: Prediction, model: TileModel
) -> pa.Table:
    """Write the cells of one image in every format, the table last, and return the table."""
    colors = colors_of(model)
    make_folder(folder)
    table = cells_table(
        prediction,
        image=prediction.name or None,
        measured=measure(prediction.labels, image, prediction.mpp),
    )
    # most of the time goes into compressing picture and arrays, during which other threads may run
    with ThreadPoolExecutor(1) as other:
        drawn = other.submit(
            save_overlay,
            folder / OVERLAY_FILE,
            image,
            prediction.labels,
            prediction.phenotypes,
            prediction.classes,
            colors,
            mpp=prediction.mpp,
        )
        quantised = np.rint(prediction.probabilities * 255).astype(np.uint8)
        with atomic_path(folder / LABELS_FILE) as temporary, temporary.open("wb") as file:
            _save_arrays(
                file,
                inst=prediction.labels,
                type=prediction.phenotype_map,
                prob=quantised,
                cell_prob=prediction.cell_probabilities,
            )
        drawn.result()
    write_geojson(folder / GEOJSON_FILE, table, dict(zip(model.classes, colors, strict=True)))
    write_csv(folder / CSV_FILE, table)
    write_parquet(folder / CELLS_FILE, table)
    return table


def _save_arrays(file: BinaryIO, **arrays: NDArray[Any]) -> None:
    """As `np.savez_compressed`, but in a fifth of the time, for a fifth more disk."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_predictions(folder: str | Path) -> list[Prediction]:
    """Read back what `infer` wrote.

    Parameters
    ----------
    folder : str or Path
        An output folder of `infer`.

    Returns
    -------
    list of Prediction
        Probabilities are those of the file, in 255ths.

    Raises
    ------
    DataError
        If the folder or one of its files is missing or damaged, or it holds cells of slides.
    """
    folder = Path(folder)
    facts = read_index(folder)
    if any(entry.get("slide") for entry in facts["images"]):
        raise DataError(
            f"{folder} holds cells of slides, without the label images that scores need; infer the "
            "annotated fields as images"
        )
    return [_read_prediction(folder / e["folder"] / LABELS_FILE, e, facts) for e in facts["images"]]


def _read_prediction(path: Path, entry: dict[str, Any], facts: dict[str, Any]) -> Prediction:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            labels, quantised, cells = (arrays[k] for k in ("inst", "prob", "cell_prob"))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}); run infer again") from error
    return Prediction(
        labels=labels,
        probabilities=quantised.astype(np.float32) / 255,
        cell_probabilities=cells,
        classes=tuple(facts["classes"]),
        mpp=entry["mpp"],
        name=entry["name"],
        colors=tuple(facts["colors"]),
        # results of earlier versions say nothing of these
        calibration=calibration_of(facts.get("calibration")),
        threshold=facts.get("threshold", 0.0),
        distance=Distance(**entry["domain"]) if entry.get("domain") else None,
    )
