"""MoNuSeg (Kumar 2017 and 2020, doi:10.1109/TMI.2019.2947628): nuclei of seven and more organs.

::

    MoNuSeg 2018 Training Data/
      Tissue Images/TCGA-18-5592-01Z-00-DX1.tif    40x, 0.25 micrometres per pixel
      Annotations/TCGA-18-5592-01Z-00-DX1.xml      Aperio outlines
    MoNuSegTestData/                               optional: images and outlines side by side

Nuclei have no class. The group is the patient, the first 12 characters of a TCGA barcode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import read_image
from celltyper.errors import DataError
from celltyper.readers.aperio import read_aperio
from celltyper.readers.files import files_by_stem, wrong_layout
from celltyper.readers.folder import ONE_CLASS
from celltyper.readers.meta import check_splits
from celltyper.readers.polygons import phenotypes_at, rasterise, ring_polygon
from celltyper.readers.tree import find_folders, subfolders
from celltyper.types import Sample

TREE = "'Tissue Images'/<name>.tif with Annotations/<name>.xml (MoNuSeg)"
MPP = 0.25
_SUFFIXES = (".tif", ".tiff", ".png", ".svs")


def recognises(path: Path) -> bool:
    """Whether a folder holds MoNuSeg: ``Tissue Images`` beside ``Annotations`` with XML."""
    return next(find_folders(path, lambda f: _folders(f) is not None), None) is not None


def read_monuseg(path: str | Path) -> Dataset:
    """Open MoNuSeg; images and outlines are read on access.

    Parameters
    ----------
    path : str or Path
        A part, or a folder of both. Parts are found up to two levels down; images and XML side by
        side are taken where the folder is given itself or has "train" or "test" in its name.

    Returns
    -------
    Dataset
        One class, 0.25 micrometres per pixel, grouped by patient; splits ``train`` and ``test``
        if a part of each name is there.

    Raises
    ------
    DataError
        At opening: another layout, an image without XML or the reverse, one name twice, a patient
        on both sides. On access: unreadable files, outlines outside the image.
    """
    path = Path(path)
    parts = list(find_folders(path, lambda f: _folders(f) is not None or _flat(f, path)))
    if not parts:
        raise wrong_layout(path, "MoNuSeg", TREE)
    images: dict[str, Path] = {}
    notes: dict[str, Path] = {}
    splits: dict[str, tuple[str, ...]] = {}
    for part in parts:
        here, xml = (files_by_stem(f, s) for f, s in _sources(part))
        _check(part, here, xml, images)
        images |= here
        notes |= xml
        place = str(part.relative_to(path)).lower()
        split = next((s for s in ("train", "test") if s in place), "")
        splits[split] = (*splits.get(split, ()), *here)
    groups = {name: tcga_patient(name) for name in images}
    if set(splits) != {"train", "test"}:
        splits = {}
    return outlined("MoNuSeg", path, ONE_CLASS, _read_sample, images, notes, groups, splits)


def outlined(
    name: str,
    path: Path,
    classes: tuple[str, ...],
    read: Callable[..., Sample],
    images: Mapping[str, Path],
    notes: Mapping[str, Path],
    groups: Mapping[str, str],
    splits: Mapping[str, tuple[str, ...]],
) -> Dataset:
    """Make a dataset of images that have one XML each, by name; 0.25 micrometres per pixel."""
    check_splits(path, splits, groups)
    return Dataset(
        name=name,
        path=path,
        classes=classes,
        mpp=MPP,
        names=tuple(sorted(images)),
        groups=groups,
        read=partial(read, images=images, notes=notes, groups=groups),
        splits=splits,
    )


def tcga_patient(name: str) -> str:
    """Patient of a TCGA barcode, its first 12 characters; any other name is its own patient."""
    return name[:12] if re.match(r"TCGA-\w{2}-\w{4}(?!\w)", name) else name


def _read_sample(
    name: str, images: dict[str, Path], notes: dict[str, Path], groups: dict[str, str]
) -> Sample:
    image = read_image(images[name]).image
    regions = read_aperio(notes[name])
    labels = rasterise(
        [ring_polygon(r.points) for r in regions],
        [r.name for r in regions],
        image.shape,
        notes[name],
        MPP,
    )
    table = phenotypes_at(labels, [1] * len(regions))
    return Sample(image, labels, table, name, groups[name], MPP)


def _folders(folder: Path) -> tuple[Path, Path] | None:
    named = {re.sub(r"[\W_]+", " ", f.name.lower()): f for f in subfolders(folder)}
    images, notes = named.get("tissue images"), named.get("annotations")
    if images is None or notes is None or not files_by_stem(notes, (".xml",)):
        return None
    return images, notes


def _flat(folder: Path, root: Path) -> bool:
    if folder != root and not re.search("train|test", folder.name.lower()):
        return False
    suffixes = {f.suffix.lower() for f in folder.iterdir()}
    return ".xml" in suffixes and not suffixes.isdisjoint(_SUFFIXES)


def _sources(part: Path) -> list[tuple[Path, tuple[str, ...]]]:
    images, notes = _folders(part) or (part, part)
    return [(images, _SUFFIXES), (notes, (".xml",))]


def _check(
    part: Path, images: dict[str, Path], notes: dict[str, Path], others: dict[str, Path]
) -> None:
    bare = [s for s in images if s not in notes]
    if bare:
        raise DataError(f"{part}: no XML in Annotations for the images {listing(bare)}")
    orphans = [s for s in notes if s not in images]
    if orphans:
        raise DataError(f"{part}: no image in 'Tissue Images' for the XML of {listing(orphans)}")
    twice = [s for s in images if s in others]
    if twice:
        raise DataError(f"{part}: {listing(twice)} is in {others[twice[0]].parent} as well")
