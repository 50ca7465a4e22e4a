"""NuInsSeg (Mahbod 2024, doi:10.1038/s41597-024-03117-2): nuclei of 31 human and mouse organs.

::

    human bladder/
      tissue images/human_bladder_01.png
      label masks modify/human_bladder_01.tif    or, if not there, 'label masks'
      Imagej_zips/human_bladder_01.zip           outlines, read where there are no label masks
    mouse liver/ ...

In ``label masks`` the overlap of two nuclei has a label of its own, so the authors' ``label masks
modify`` come first. Nuclei have no class. The group is the image, the domain ``organ`` its folder.
"""

from __future__ import annotations

import importlib
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import IMAGE_SUFFIXES, MASK_SUFFIXES, read_image, read_label_image
from celltyper.errors import DataError
from celltyper.readers.files import check_same_size, files_by_stem, sample_groups, wrong_layout
from celltyper.readers.folder import ONE_CLASS
from celltyper.readers.meta import check_splits, read_meta
from celltyper.readers.polygons import phenotypes_at, rasterise, ring_polygon
from celltyper.readers.tree import find_folders, subfolders
from celltyper.types import Labels, Sample

TREE = (
    "<organ>/'tissue images'/<name>.png with <organ>/'label masks'/<name>.tif or "
    "<organ>/Imagej_zips/<name>.zip (NuInsSeg)"
)
_MASKS = ("label masks modify", "label masks", "imagej zips", "imagj zips")
_AREAS = ("POLYGON", "RECT", "OVAL", "FREEHAND", "TRACED")


class _Organ(NamedTuple):
    images: Path
    masks: Path


def recognises(path: Path) -> bool:
    """Whether a folder holds NuInsSeg: ``tissue images`` beside label masks or ImageJ zips."""
    return next(find_folders(path, lambda f: _organ(f) is not None), None) is not None


def read_nuinsseg(path: str | Path) -> Dataset:
    """Open NuInsSeg or data in its layout; images and masks are read on access.

    Parameters
    ----------
    path : str or Path
        Folder of the organs, of one organ, or above them; ``meta.json`` in it may state ``mpp``,
        ``groups`` and ``splits``.

    Returns
    -------
    Dataset
        One class; domain ``organ``. Every image is its own group unless ``meta.json`` says more.

    Raises
    ------
    DataError
        At opening: another layout, an image without mask or the reverse, one name twice. On
        access: unreadable files, a mask of another size, ImageJ zips without roifile installed.
    """
    path = Path(path)
    organs = list(find_folders(path, lambda f: _organ(f) is not None))
    if not organs:
        raise wrong_layout(path, "NuInsSeg", TREE)
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    domain: dict[str, str] = {}
    for folder in organs:
        organ = _organ(folder)
        assert organ is not None
        here = files_by_stem(organ.images, IMAGE_SUFFIXES)
        notes = files_by_stem(organ.masks, (*MASK_SUFFIXES, ".zip"))
        bare = [s for s in here if s not in notes]
        if bare:
            raise DataError(f"{organ.masks}: no file for the images {listing(bare)}")
        orphans = [s for s in notes if s not in here]
        if orphans:
            raise DataError(f"{organ.images}: no image for {organ.masks.name} {listing(orphans)}")
        twice = [s for s in here if s in images]
        if twice:
            raise DataError(f"{organ.images}: {listing(twice)} is in {images[twice[0]].parent} too")
        images |= here
        masks |= notes
        domain |= dict.fromkeys(here, folder.resolve().name)
    meta = read_meta(path)
    images = dict(sorted(images.items()))
    groups = sample_groups(path, images, meta.groups)
    check_splits(path, meta.splits, groups)
    return Dataset(
        name="NuInsSeg",
        path=path,
        classes=ONE_CLASS,
        mpp=meta.mpp,
        names=tuple(images),
        groups=groups,
        read=partial(_read_sample, images=images, masks=masks, groups=groups, mpp=meta.mpp),
        splits=meta.splits,
        domains={"organ": {name: domain[name] for name in images}},
    )


def _organ(folder: Path) -> _Organ | None:
    named = {re.sub(r"[\W_]+", " ", f.name.lower()): f for f in subfolders(folder)}
    masks = next((named[m] for m in _MASKS if m in named and any(named[m].iterdir())), None)
    if "tissue images" not in named or masks is None:
        return None
    return _Organ(named["tissue images"], masks)


def _read_sample(
    name: str,
    images: dict[str, Path],
    masks: dict[str, Path],
    groups: dict[str, str],
    mpp: float | None,
) -> Sample:
    file = read_image(images[name])
    path = masks[name]
    mpp = mpp or file.mpp
    if path.suffix.lower() == ".zip":
        labels = _read_zip(path, file.image.shape, mpp)
    else:
        labels = read_label_image(path)
        check_same_size(labels.shape, path, file.image.shape, images[name])
    table = phenotypes_at(labels, [1] * int(labels.max(initial=0)))
    return Sample(file.image, labels, table, name, groups[name], mpp)


def _read_zip(path: Path, shape: tuple[int, ...], mpp: float | None) -> Labels:
    """Labels of the outlines in a zip of ImageJ's ROI manager, in its order."""
    try:
        roifile: Any = importlib.import_module("roifile")
    except ImportError:
        raise DataError(
            f"{path}: ImageJ outlines need the package roifile: pip install 'celltyper[data]'"
        ) from None
    names, outlines = [], []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if not member.lower().endswith(".roi"):
                    continue
                roi = roifile.ImagejRoi.frombytes(archive.read(member))
                names.append(f"outline {member!r}")
                rings = roi.coordinates(multi=True) if roi.roitype.name in _AREAS else []
                # Rings of a composite are parts and holes: what an odd number of them encloses.
                parts = [ring_polygon(np.asarray(r, np.float64)) for r in rings]
                outlines.append(parts[0] if len(parts) == 1 else _odd(parts))
    except Exception as error:  # noqa: BLE001 - of zipfile, zlib, struct and roifile itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: unreadable or truncated ({reason})") from None
    return rasterise(outlines, names, shape, path, mpp)


def _odd(parts: list[Any]) -> Any:
    whole: Any = shapely.Polygon()
    for part in parts:
        whole = shapely.symmetric_difference(
            whole, shapely.make_valid(part, method="structure", keep_collapsed=False)
        )
    return whole
