"""Writing of plain folders."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from celltyper.datasets.phenotypes import phenotypes_of
from celltyper.errors import DataError
from celltyper.types import UNKNOWN, Sample


def write_folder(
    path: str | Path,
    samples: Iterable[Sample],
    classes: Sequence[str],
    mpp: float | None,
    about: Mapping[str, object] | None = None,
) -> Path:
    """Write samples as a plain folder that `read_folder` opens.

    Everything is written into a hidden folder beside `path`, which is then renamed: the dataset is
    there as a whole or not at all.

    Parameters
    ----------
    path : str or Path
        Folder to make; must not exist, or be empty.
    samples : iterable of Sample
        Names must be unique and fit for file names; read one at a time.
    classes : sequence of str
        Class names, id 1 first.
    mpp : float or None
        Micrometres per pixel of all samples.
    about : mapping, optional
        More keys for ``meta.json``, such as source, licence and note; JSON values.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    DataError
        If the folder holds something, cannot be written, a name is taken or unfit, or a sample has
        a class that is not in `classes`.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists and is not empty; name another folder")
    classes = tuple(classes)
    groups: dict[str, str] = {}
    nuclei = np.zeros(len(classes), np.int64)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            (work / "images").mkdir()
            (work / "labels").mkdir()
            for sample in samples:
                _check_name(sample.name, groups)
                groups[sample.name] = sample.group or sample.name
                types = sample.phenotypes[sample.labels]
                table = phenotypes_of(sample.labels, types, classes, f"sample {sample.name!r}")
                nuclei += np.bincount(table[table != UNKNOWN], minlength=len(classes) + 1)[1:]
                image = PillowImage.fromarray(sample.image)
                image.save(work / "images" / f"{sample.name}.png", compress_level=4)
                np.savez_compressed(
                    work / "labels" / f"{sample.name}.npz", inst=sample.labels, type=types
                )
            meta = {
                "name": path.name,
                **(about or {}),
                "classes": list(classes),
                "mpp": mpp,
                "groups": groups,
                "nuclei_per_class": dict(zip(classes, nuclei.tolist(), strict=True)),
            }
            text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
            (work / "meta.json").write_text(text, encoding="utf-8")
            work.chmod(0o755)
            if path.exists():
                path.rmdir()
            os.rename(work, path)  # noqa: PTH104 - pathlib's rename hides that this is atomic
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def _check_name(name: str, taken: Mapping[str, str]) -> None:
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise DataError(f"sample name {name!r} is no file name; give samples plain names")
    if name in taken:
        raise DataError(f"two samples are named {name!r}; names must be unique")
