"""Windows on disk to their types on disk: ``celltyper infer`` in patch mode."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import make_folder, write_json
from celltyper.calibration import ABSTAINED
from celltyper.classification.ensemble import (
    check_resolution_known,
    check_resolution_wanted,
    count_padded,
    least_probability,
    load_models,
    mean_threshold,
    model_facts,
)
from celltyper.classification.model import PatchModel, ensemble_probabilities
from celltyper.classification.typed import (
    measurements_of,
    typed_table,
    write_table,
    write_typed_points,
)
from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.datasets.resolution import check_mpp
from celltyper.devices import pick_device
from celltyper.errors import ConfigError, DataError
from celltyper.index import INDEX_FILE
from celltyper.library.files import CONFIG_FILE, PROTOCOL_FILE
from celltyper.library.shelf import find_model
from celltyper.patches.checking import readable
from celltyper.patches.folders import class_folders, pictures
from celltyper.patches.points import Points, read_points
from celltyper.patches.sources import SUFFIXES
from celltyper.patches.table import Patch, PatchTable, build_table
from celltyper.patches.tables import read_csv
from celltyper.patches.windows import read_header
from celltyper.readers.meta import read_meta

logger = logging.getLogger("celltyper")

CSV_FILE = "patches.csv"
PARQUET_FILE = "patches.parquet"
GEOJSON_FILE = "patches.geojson"

_LARGEST = 1024
"""Side in pixels from which a file is a field or slide, not a patch."""


@dataclass(frozen=True)
class Inferred:
    """What `infer_patches` did.

    Parameters
    ----------
    folder : Path
        With ``patches.csv``, ``patches.parquet``, of points ``patches.geojson``, and
        ``infer.json``.
    counts : dict of str to int
        Windows by the type that they were given.
    padded : int
        Windows that reach over the border of their image.
    left_out : int
        Windows that could not be read.
    """

    folder: Path
    counts: dict[str, int]
    padded: int
    left_out: int


def infer_patches(
    inputs: Sequence[str | Path],
    run: str | Path,
    output: str | Path,
    *,
    points: str | Path | None = None,
    images: str | Path | None = None,
    mpp: float | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    symmetries: int | None = None,
    skip_bad: bool = False,
    abstain: float | None = None,
    overwrite: bool = False,
    encoder_weights: str | None = None,
    progress: bool = True,
) -> Inferred:
    """Type patches, or windows around points of an image, and write what was found.

    Parameters
    ----------
    inputs : sequence of str or Path
        Patches, folders of patches, tables of patches or points (CSV); with `points`, one image.
    run : str or Path
        Run folder, or the folder of a protocol, whose models then type as an ensemble; or the name
        of a model, see `celltyper.library.shelf.find_model`.
    output : str or Path
        Folder to write to. Nothing is written before everything is typed.
    points : str or Path or None
        Where to look on the image: see `celltyper.patches.points`.
    images : str or Path or None
        Folder of the images that a table names, if not beside it.
    mpp : float or None
        Micrometres per pixel of the files; None takes what they say.
    device : str
        See `celltyper.devices.pick_device`.
    batch_size : int or None
        Windows per forward pass; None takes what the run was configured with.
    symmetries : {1, 2, 4, 8} or None
        Over how many symmetries of a window probabilities are averaged; None takes those of
        training.
    skip_bad : bool
        Go on without windows that cannot be read.
    abstain : float or None
        Leave windows "unknown" that are less sure than this share of the validation windows.
    overwrite : bool
        Replace earlier results in `output`.
    encoder_weights : str or None
        Weights of the encoder, if not where they were.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    Inferred

    Raises
    ------
    ConfigError, CheckpointError, DataError
        For wrong input, before anything is written.
    """
    started = time.monotonic()
    output = Path(output)
    run = find_model(run)
    _check_output(output, overwrite)
    check_mpp(mpp)
    paths = [Path(path) for path in inputs]
    _check_paths(paths, points)
    place = pick_device(device)
    models = load_models(run, place, encoder_weights, batch_size)
    first = models[0]
    check_resolution_wanted(first, mpp, run)
    least = least_probability(models, abstain)
    drawn: Points | None = None
    if points is not None:
        drawn = read_points(
            Path(points), paths[0], classes=first.classes, mpp=mpp or stated_mpp(paths)
        )
        table = drawn.table
    else:
        table = find_patches(paths, classes=first.classes, images=images, mpp=mpp)
    good = readable(
        table,
        skip_bad=skip_bad,
        progress=lambda rows: tqdm(
            rows, desc="read", unit="patch", disable=None if progress else True
        ),
    )
    check_resolution_known(first, good.table)
    _check_patches(first, good.table)
    over = count_padded(first, good.table)
    shares = ensemble_probabilities(models, good.table, symmetries=symmetries, progress=progress)
    threshold = mean_threshold(models)
    features = [] if drawn is None else _kept(drawn, good.table)
    cells = [measurements_of(feature).get("cell_id") for feature in features]
    typed = typed_table(
        good.table,
        shares,
        first.positive,
        threshold,
        {"cell_id": cells} if cells and None not in cells else None,
        least,
    )
    counts = Counter(typed["type"].to_pylist())
    names = first.classes if abstain is None else (*first.classes, ABSTAINED)
    found = {name: counts[name] for name in names}
    facts = {
        "task": "patches",
        "celltyper": __version__,
        **model_facts(run, models, symmetries),
        "device": str(place),
        "inputs": [str(path.absolute()) for path in paths],
        "points": None if points is None else str(Path(points).absolute()),
        "patches": len(good.table),
        "types": found,
        "unknown_below": least,
        "over_the_border": over,
        "failed": [{"name": p.image, "error": p.note} for p in good.bad],
        "seconds": round(time.monotonic() - started, 1),
    }
    _write(output, typed, features, first.classes, facts)
    return Inferred(output, found, over, len(good.bad))


def inferred_text(done: Inferred) -> str:
    """Say how many windows there are of each type, and where they are listed."""
    total = sum(done.counts.values())
    types = ", ".join(f"{n:,} {name}" for name, n in done.counts.items())
    text = f"{total:,} patches: {types}"
    if done.left_out:
        text += f"; {done.left_out:,} left out that could not be read"
    return f"{text}\npatches: {done.folder / CSV_FILE}"


def find_patches(
    paths: Sequence[Path],
    *,
    classes: Sequence[str],
    images: str | Path | None = None,
    mpp: float | None = None,
) -> PatchTable:
    """List patches that have no label, or whose labels do not matter.

    Parameters
    ----------
    paths : sequence of Path
        Images; folders, which give the images in them and in the folders right inside them; tables
        (CSV) of patches or points.
    classes : sequence of str
        Those that they may turn out to be.
    images : str or Path or None
        Folder of the images that a table names, if not beside it.
    mpp : float or None
        Micrometres per pixel; None takes what the files say.

    Returns
    -------
    PatchTable
        Of unknown classes. Of a single folder names are relative to it; of several inputs the
        name of each is put before.

    Raises
    ------
    DataError
        If a path is missing, holds no patch, or two have the same name.
    """
    tables = [path for path in paths if path.suffix.lower() == ".csv"]
    if tables and len(paths) > 1:
        raise DataError(f"{tables[0]}: a table of patches is given alone")
    mpp = mpp or stated_mpp(paths)
    if tables:
        place = None if images is None else Path(images)
        return read_csv(tables[0], classes=classes, images=place, mpp=mpp, labels=False)
    if images is not None:
        raise ConfigError("--images is for a table (CSV) that names images")
    rows: dict[str, Patch] = {}
    for path in paths:
        for file in _files_of(path):
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            if path.is_dir() and len(paths) > 1:
                name = f"{path.name}/{name}"
            other = rows.setdefault(name, Patch(name, file, "file"))
            if other.file != file:
                raise DataError(f"{other.file} and {file} would both be {name!r}; infer them apart")
    return build_table(paths[0], rows.values(), classes=classes, mpp=mpp)


def stated_mpp(paths: Sequence[Path]) -> float | None:
    """Resolution that ``meta.json`` in or beside the inputs states.

    Raises
    ------
    DataError
        If two of them state different ones.
    """
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    stated = {folder: read_meta(folder).mpp for folder in folders}
    if len(set(stated.values())) > 1:
        raise DataError(
            f"meta.json of {', '.join(map(str, stated))} states different resolutions; infer them "
            "apart, or pass --mpp"
        )
    return next(iter(stated.values()), None)


def _check_output(output: Path, overwrite: bool) -> None:
    if (output / CONFIG_FILE).exists() or (output / PROTOCOL_FILE).exists():
        raise ConfigError(f"{output} holds a run; give another folder for the patches")
    if not (output / INDEX_FILE).exists():
        return
    try:
        task = json.loads((output / INDEX_FILE).read_text(encoding="utf-8")).get("task")
    except (OSError, ValueError, AttributeError):
        task = None
    if task != "patches":
        raise ConfigError(f"{output} holds cells; give another folder for the patches")
    if not overwrite:
        raise ConfigError(
            f"{output} already holds results of infer; pass --overwrite or another folder"
        )


def _check_paths(paths: Sequence[Path], points: str | Path | None) -> None:
    for path in paths:
        if not path.exists():
            raise DataError(f"no such image, folder or table: {path}")
        if path.is_file() and path.suffix.lower() not in (*SUFFIXES, ".csv"):
            raise DataError(
                f"{path} is no image ({', '.join(SUFFIXES)}) and no table of patches (.csv)"
            )
    if points is not None and (
        len(paths) > 1 or paths[0].is_dir() or paths[0].suffix.lower() == ".csv"
    ):
        raise DataError(f"{points}: --points are on one image; give one, not {len(paths)} inputs")


def _check_patches(model: PatchModel, table: PatchTable) -> None:
    """Refuse fields and slides of which only a window in the middle would be seen."""
    for file, (x, _) in zip(table.files, table.centers, strict=True):
        header = read_header(file)
        own, wanted = table.mpp or header.mpp, model.mpp
        side = model.size * (wanted / own if wanted and own else 1)
        if np.isnan(x) and max(header.width, header.height) > max(_LARGEST, 4 * side):
            raise DataError(
                f"{file} is {header.width} x {header.height} px, no patch around one figure; say "
                "where to look with --points FILE (x, y)"
            )


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inner = [file for folder in class_folders(path) for file in pictures(folder)]
    files = [*pictures(path), *inner]
    if not files:
        raise DataError(
            f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}), nor do the folders in it"
        )
    return files


def _kept(points: Points, table: PatchTable) -> list[Any]:
    """Features of the rows that could be read."""
    of = dict(zip(points.table.names, points.features, strict=True))
    return [of[name] for name in table.names]


def _write(
    output: Path, typed: pa.Table, features: Sequence[Any], classes: Sequence[str], facts: Any
) -> None:
    """Write every file; without the index, which comes last, the folder is not finished."""
    make_folder(output)
    for name in (INDEX_FILE, GEOJSON_FILE):
        (output / name).unlink(missing_ok=True)
    write_table(output / CSV_FILE, typed)
    write_table(output / PARQUET_FILE, typed)
    if features:
        write_typed_points(output / GEOJSON_FILE, features, typed, classes)
    write_json(output / INDEX_FILE, facts)
