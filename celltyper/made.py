"""Made data: images of disks and patches with stripes, to try a whole pipeline in seconds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from skimage.draw import disk

from celltyper.datasets.writing import write_folder
from celltyper.types import Sample

DOMAINS = ("breast", "colon", "skin")
"""Of made patches."""

_CELLS = {"train": 6, "val": 1, "test": 8}
"""Images by split; from eight patients on, these are resampled."""

_SLIDES, _EACH = 18, 4


def made_sample(seed: int, name: str, size: int = 96, cells: int = 12) -> Sample:
    """Pink ground with blue (class 1) and brown (class 2) disks that do not touch.

    Parameters
    ----------
    seed : int
    name : str
        Of the sample and its group.
    size : int
        Side in pixels.
    cells : int
        Most disks.

    Returns
    -------
    Sample
        At 0.5 micrometres per pixel.
    """
    rng = np.random.default_rng(seed)
    image = rng.normal((225, 190, 215), 6, (size, size, 3))
    labels = np.zeros((size, size), np.int32)
    phenotypes = [0]
    for _ in range(20 * cells):
        center, radius = rng.uniform(6, size - 6, 2), rng.uniform(4, 7)
        if not labels[disk(center, radius + 2, shape=labels.shape)].any() and radius:
            phenotypes.append(1 + len(phenotypes) % 2)
            inside = disk(center, radius, shape=labels.shape)
            labels[inside] = len(phenotypes) - 1
            color = ((70, 60, 150), (140, 80, 50))[phenotypes[-1] - 1]
            image[inside] = rng.normal(color, 6, (len(inside[0]), 3))
        if len(phenotypes) > cells:
            break
    pixels = image.clip(0, 255).astype(np.uint8)
    return Sample(pixels, labels, np.array(phenotypes, np.uint8), name, group=name, mpp=0.5)


def write_made_cells(folder: str | Path, seed: int = 0) -> Path:
    """Write a plain folder of annotated images with the splits train, val and test.

    Parameters
    ----------
    folder : str or Path
        Left as it is if it is there.
    seed : int
        Other images for another seed.

    Returns
    -------
    Path
        The folder, for `celltyper.readers.open_dataset`.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    splits = {part: [f"{part}{i}" for i in range(n)] for part, n in _CELLS.items()}
    names = [name for listed in splits.values() for name in listed]
    samples = [made_sample(1000 * seed + i, name, 64, 8) for i, name in enumerate(names)]
    about = {"splits": splits, "note": "made, not stained"}
    return write_folder(folder, samples, ("blue", "brown"), 0.5, about)


def write_made_patches(folder: str | Path, seed: int = 0) -> Path:
    """Write class folders of patches, stripes in noise being the rare class, and their table.

    Parameters
    ----------
    folder : str or Path
        Left as it is if it is there; gets ``common/``, ``rare/`` and ``made.csv`` with the columns
        patch, slide and tumortype.
    seed : int
        Other patches, of other slides, for another seed.

    Returns
    -------
    Path
        The folder, for `celltyper.patches.reading.open_patches`.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    rng, rows = np.random.default_rng(seed), ["patch,slide,tumortype"]
    for slide in range(_SLIDES):
        for i in range(_EACH):
            image = rng.normal(160, 60, (28, 28, 3))
            if i == 0:
                image[::4] -= rng.uniform(10, 60)
            file = work / ("common", "rare")[i == 0] / f"{seed}-{slide}-{i}.png"
            file.parent.mkdir(exist_ok=True)
            PillowImage.fromarray(image.clip(0, 255).astype(np.uint8)).save(file)
            rows.append(f"{file.name},{seed}-{slide},{DOMAINS[slide % len(DOMAINS)]}")
    (work / "made.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    work.chmod(0o755)
    try:
        work.rename(folder)
    except OSError:  # another process was quicker, with the same patches
        shutil.rmtree(work)
    return folder
