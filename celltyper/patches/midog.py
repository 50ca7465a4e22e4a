"""MIDOG, MIDOG++ and MIDOG 2025: boxes around mitotic figures and look-alikes, in COCO's JSON.

::

    midog/
      MIDOG++.json         images, annotations, categories
      001.tiff 002.tiff    here, in images/, or where 'images' says

    Aubreville et al., A comprehensive multi-domain dataset for mitotic figure detection.
    Scientific Data 10, 484 (2023). https://doi.org/10.1038/s41597-023-02327-4

A box is ``[x0, y0, x1, y1]`` in the published files, not ``[x, y, width, height]`` as in COCO's
format. Which of the two a file has is found like this, over all of its boxes:

1. They are corners only if every x1 > x0 and y1 > y0, and sizes only if both are positive.
2. If both fit, that one is right by which fewer boxes leave their image.
3. If that is the same, the one by which they vary less in size, for annotated cells have boxes of
   one size; if even that is the same, corners.

``labels`` of an annotation are the categories that each expert chose.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.patches.sources import find_images
from celltyper.patches.table import Patch, PatchTable, build_table, nearest

logger = logging.getLogger(__name__)

CATEGORIES = {1: "mitotic figure", 2: "hard negative"}
"""Where the file lists none: the convention of all MIDOG challenges."""
GROUP_KEYS = ("patient", "patient_id", "case", "case_id", "slide")
DOMAIN_KEYS = ("tumor_type", "tumortype", "tumour_type", "domain", "scanner")


def is_coco(raw: object) -> bool:
    """Whether a JSON document lists images and annotations.

    Parameters
    ----------
    raw : object
        As `json` gives it.

    Returns
    -------
    bool
    """
    return isinstance(raw, dict) and all(
        isinstance(raw.get(key), list) for key in ("images", "annotations")
    )


def read_coco(
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    images: Path | None = None,
    mpp: float | None = None,
    groups: str | None = None,
    domains: str | None = None,
    pixels: bool = True,
) -> PatchTable:
    """Read boxes of cells; see the top of this file.

    Parameters
    ----------
    path : Path
        JSON file.
    classes : sequence of str, optional
        Categories wanted, in order; without it, all, in order of their ids.
    images : Path, optional
        Folder of the images; without it, that of the file, or ``images/`` there.
    mpp : float, optional
        Micrometres per pixel of the images.
    groups, domains : str, optional
        Keys of an image with the slide or patient, and with the domain. Without them the first of
        ``patient``, ``case`` and ``slide``, or else the image, and ``tumor_type``.
    pixels : bool
        Whether the images must be there.

    Returns
    -------
    PatchTable
        Windows around the centres of the boxes, named ``<image>:<x>:<y>``. Images without
        annotations give none; how many is logged.

    Raises
    ------
    DataError
        Naming the annotation or image and what to do.
    """
    raw = _load(path)
    listed = _by_id(path, raw["images"])
    names = _categories(path, raw)
    notes = raw["annotations"]
    if not notes:
        raise DataError(f"{path}: no annotations; patches need their labels")
    boxes = _boxes(path, notes, listed)
    used = {note["image_id"] for note in notes}
    logger.info(
        "%s: %d of %d images have annotations; the others give no patches",
        path,
        len(used),
        len(listed),
    )
    files = find_images(
        path, (i["file_name"] for k, i in listed.items() if k in used), images, pixels=pixels
    )
    group = _key(path, listed, groups, GROUP_KEYS)
    domain = _key(path, listed, domains, DOMAIN_KEYS)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    rows = []
    for note, (x, y) in zip(notes, centers.tolist(), strict=True):
        image = listed[note["image_id"]]
        name = image["file_name"]
        rows.append(
            Patch(
                name=f"{name}:{x:.10g}:{y:.10g}",
                file=files[name],
                where=f"annotation {note.get('id')}",
                label=_category(path, note, names),
                votes=tuple(names[k] for k in note.get("labels") or () if k in names),
                group=_text(image, group) or name,
                domain=_text(image, domain),
                split=_text(image, "split"),
                x=x,
                y=y,
            )
        )
    return build_table(path, rows, classes=classes, stated=tuple(names.values()), mpp=mpp)


def _load(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not is_coco(raw):
        raise DataError(f"{path}: no COCO annotations: expected lists 'images' and 'annotations'")
    found: dict[str, Any] = raw
    return found


def _by_id(path: Path, images: list[Any]) -> dict[Any, dict[str, Any]]:
    listed: dict[Any, dict[str, Any]] = {}
    for image in images:
        if not isinstance(image, dict) or not {"id", "file_name"} <= set(image):
            raise DataError(f"{path}: an image needs 'id' and 'file_name', got {str(image)[:100]}")
        if listed.setdefault(image["id"], image) is not image:
            raise DataError(f"{path}: two images have the id {image['id']}")
    return listed


def _categories(path: Path, raw: dict[str, Any]) -> dict[Any, str]:
    """Names by id, in order of the ids."""
    stated = raw.get("categories") or [{"id": k, "name": name} for k, name in CATEGORIES.items()]
    try:
        names = {int(c["id"]): str(c["name"]).strip() for c in stated}
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: 'categories' must be [{{'id': 1, 'name': ...}}, ...]") from None
    return dict(sorted(names.items()))


def _category(path: Path, note: dict[str, Any], names: Mapping[Any, str]) -> str:
    category = note.get("category_id")
    if category not in names:
        raise DataError(
            f"{path}: annotation {note.get('id')} is of category {category}, which is not listed "
            f"({', '.join(f'{k} {name}' for k, name in names.items())})"
        )
    return names[category]


def _boxes(
    path: Path, notes: list[Any], listed: Mapping[Any, dict[str, Any]]
) -> NDArray[np.float64]:
    """Corners x0, y0, x1, y1 of all boxes, shape (n, 4)."""
    for note in notes:
        box = note.get("bbox") if isinstance(note, dict) else None
        whole = isinstance(box, list) and len(box) == 4
        if not (whole and all(isinstance(v, int | float) and np.isfinite(v) for v in box or ())):
            raise DataError(f"{path}: an annotation needs a 'bbox' of 4 numbers: {str(note)[:100]}")
        if note.get("image_id") not in listed:
            raise DataError(
                f"{path}: annotation {note.get('id')} is of image {note.get('image_id')}, which "
                "is not listed"
            )
    raw = np.array([note["bbox"] for note in notes], np.float64)
    sizes = np.array(
        [
            [float(listed[note["image_id"]].get(side) or np.inf) for side in ("width", "height")]
            for note in notes
        ]
    )
    readings = {"corners x0, y0, x1, y1": raw, "x, y, width, height": raw.copy()}
    readings["x, y, width, height"][:, 2:] += raw[:, :2]
    fit = {k: b for k, b in readings.items() if (b[:, 2:] > b[:, :2]).all()}
    if not fit:
        i = int(((raw[:, 2:] <= raw[:, :2]).any(axis=1)).argmax())
        raise DataError(
            f"{path}: boxes are neither corners x0, y0, x1, y1 nor x, y, width, height: "
            f"annotation {notes[i].get('id')} is {notes[i]['bbox']}"
        )

    def doubt(kind: str) -> tuple[int, float]:
        far = fit[kind][:, 2:]
        return int((far > sizes).any(axis=1).sum()), float((far - raw[:, :2]).std(axis=0).sum())

    kind = min(fit, key=doubt)  # corners come first, and of equals min takes the first
    logger.info("%s: boxes are read as %s", path, kind)
    return fit[kind]


def _key(
    path: Path, listed: Mapping[Any, dict[str, Any]], asked: str | None, usual: Sequence[str]
) -> str:
    """Key of the images that says the group or domain, empty if none does."""
    keys = {key for image in listed.values() for key in image}
    if asked is None:
        return next((key for key in usual if key in keys), "")
    if asked not in keys:
        raise DataError(
            f"{path}: images have no {asked!r}{nearest(asked, keys)} (they have: "
            f"{listing(sorted(keys), 20)})"
        )
    return asked


def _text(image: dict[str, Any], key: str) -> str:
    value = image.get(key)
    return "" if value is None else str(value)
