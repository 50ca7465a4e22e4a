"""MoNuSAC (Verma 2021, doi:10.1109/TMI.2021.3085712): typed nuclei of four organs.

::

    MoNuSAC_images_and_annotations/
      TCGA-5P-A9K0-01Z-00-DX1/                     one folder a patient
        TCGA-5P-A9K0-01Z-00-DX1_1.svs (or .tif)    40x, 0.25 micrometres per pixel
        TCGA-5P-A9K0-01Z-00-DX1_1.xml              Aperio outlines, one layer a class
    MoNuSAC Testing Data and Annotations/          optional

The layer ``Ambiguous`` of the test part holds nuclei whose class is left open. The group is the
patient: of a folder named by a TCGA barcode its first 12 characters, otherwise the folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from celltyper.datasets.dataset import Dataset, listing
from celltyper.datasets.images import read_image
from celltyper.errors import DataError
from celltyper.readers.aperio import read_aperio
from celltyper.readers.files import files_by_stem, wrong_layout
from celltyper.readers.monuseg import MPP, outlined, tcga_patient
from celltyper.readers.polygons import phenotypes_at, rasterise, ring_polygon
from celltyper.readers.tree import find_folders
from celltyper.types import UNKNOWN, Sample

TREE = "<patient>/<name>.svs (or .tif) with <patient>/<name>.xml (MoNuSAC)"
CLASSES = ("Epithelial", "Lymphocyte", "Macrophage", "Neutrophil")
_IDS = {name.lower(): i for i, name in enumerate(CLASSES, start=1)} | {"ambiguous": UNKNOWN}
_HEAD = 1 << 20


def recognises(path: Path) -> bool:
    """Whether a folder holds MoNuSAC: images with XML of the same stem that names its classes."""
    part = next(find_folders(path, _is_patient, levels=3), None)
    if part is None:
        return False
    named = re.compile(rb'Name="\s*(%s|Ambiguous)\s*"' % "|".join(CLASSES).encode(), re.I)
    for file in list(files_by_stem(part, (".xml",)).values())[:5]:
        with file.open("rb") as stream:
            if named.search(stream.read(_HEAD)):
                return True
    return False


def read_monusac(path: str | Path) -> Dataset:
    """Open MoNuSAC; images and outlines are read on access.

    Parameters
    ----------
    path : str or Path
        One part, a folder of both, or one patient. Where an image is there as ``.svs`` and as
        ``.tif``, the ``.tif`` is read. Layers are matched to classes whatever their case.

    Returns
    -------
    Dataset
        Classes Epithelial, Lymphocyte, Macrophage, Neutrophil; nuclei of ``Ambiguous`` have the
        phenotype `UNKNOWN`. Splits ``train`` and ``test`` if folders with "test" and others are
        there.

    Raises
    ------
    DataError
        At opening: another layout, an image without XML or the reverse, one name twice, a patient
        on both sides. On access: unreadable files, an unknown layer, outlines outside the image.
    """
    path = Path(path)
    patients = list(find_folders(path, _is_patient, levels=3, limit=5000))
    if not patients:
        raise wrong_layout(path, "MoNuSAC", TREE)
    images: dict[str, Path] = {}
    notes: dict[str, Path] = {}
    groups: dict[str, str] = {}
    splits: dict[str, tuple[str, ...]] = {"train": (), "test": ()}
    for patient in patients:
        here = _images(patient)
        xml = files_by_stem(patient, (".xml",))
        single = sorted(set(here) ^ set(xml))
        if single:
            what = "image" if single[0] in xml else "XML"
            raise DataError(f"{patient}: no {what} for {listing(single)}; expected {TREE}")
        twice = [s for s in here if s in images]
        if twice:
            raise DataError(f"{patient}: {listing(twice)} is in {images[twice[0]].parent} as well")
        images |= here
        notes |= xml
        groups |= dict.fromkeys(here, tcga_patient(patient.resolve().name))
        split = "test" if "test" in str(patient.relative_to(path).parent).lower() else "train"
        splits[split] = (*splits[split], *here)
    if not all(splits.values()):
        splits = {}
    return outlined("MoNuSAC", path, CLASSES, _read_sample, images, notes, groups, splits)


def _is_patient(folder: Path) -> bool:
    stems: dict[str, set[str]] = {".svs": set(), ".tif": set(), ".xml": set()}
    for file in folder.iterdir():
        if file.suffix.lower() in stems and not file.name.startswith("."):
            stems[file.suffix.lower()].add(file.stem)
    return not stems[".xml"].isdisjoint(stems[".svs"] | stems[".tif"])


def _images(patient: Path) -> dict[str, Path]:
    found = files_by_stem(patient, (".svs",)) | files_by_stem(patient, (".tif",))
    return dict(sorted(found.items()))


def _read_sample(
    name: str, images: dict[str, Path], notes: dict[str, Path], groups: dict[str, str]
) -> Sample:
    path = notes[name]
    image = read_image(images[name]).image
    regions = read_aperio(path)
    kinds = []
    for region in regions:
        kind = _IDS.get(region.layer.lower())
        if kind is None:
            raise DataError(
                f"{path}: {region.name} is in the layer {region.layer!r}, not one of "
                f"{', '.join(CLASSES)}, Ambiguous"
            )
        kinds.append(kind)
    names = [f"{r.name} of {r.layer}" for r in regions]
    outlines = [ring_polygon(r.points) for r in regions]
    labels = rasterise(outlines, names, image.shape, path, MPP)
    return Sample(image, labels, phenotypes_at(labels, kinds), name, groups[name], MPP)
