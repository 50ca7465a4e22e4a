"""Where the images of a patch table lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.errors import DataError

SUFFIXES = (*IMAGE_SUFFIXES, ".svs")
"""Of images that patches are cut from."""


def image_folders(path: Path, images: Path | None) -> tuple[Path, ...]:
    """Folders to look for images in: the one asked for, or those at the annotation file.

    Parameters
    ----------
    path : Path
        Annotation file.
    images : Path or None
        Folder asked for.

    Returns
    -------
    tuple of Path

    Raises
    ------
    DataError
        If the folder asked for is missing.
    """
    if images is None:
        return path.parent, path.parent / "images"
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; it should hold the images of {path.name}")
    return (images,)


def find_image(name: str, folders: Iterable[Path]) -> Path | None:
    """File of an image.

    Parameters
    ----------
    name : str
        As an annotation file has it: absolute or relative, with or without suffix.
    folders : iterable of Path
        Where to look.

    Returns
    -------
    Path or None
        The first that is there.
    """
    name = name.replace("\\", "/")
    for folder in folders:
        file = folder / name
        if file.is_file():
            return file
        if file.suffix.lower() not in SUFFIXES:
            for suffix in SUFFIXES:
                longer = file.with_name(file.name + suffix)
                if longer.is_file():
                    return longer
    return None


def find_images(
    path: Path, names: Iterable[str], images: Path | None, *, pixels: bool = True
) -> dict[str, Path]:
    """Files of all images of an annotation file.

    Parameters
    ----------
    path : Path
        Annotation file.
    names : iterable of str
        Of the images, as in `find_image`.
    images : Path or None
        Folder of the images; without it, that of `path`, or ``images/`` there.
    pixels : bool
        Whether they must be there.

    Returns
    -------
    dict of str to Path
        By name; without `pixels`, also where an image would be.

    Raises
    ------
    DataError
        If an image is missing, naming the first and how many.
    """
    folders = image_folders(path, images)
    found = {name: find_image(name, folders) for name in dict.fromkeys(names)}
    missing = [name for name, file in found.items() if file is None]
    if missing and pixels:
        raise DataError(
            f"{path}: no image {missing[0]!r} in {' or '.join(map(str, folders))}; "
            f"{len(missing):,} of {len(found):,} are missing: say where they are with 'images'"
        )
    return {name: file or folders[0] / name for name, file in found.items()}
