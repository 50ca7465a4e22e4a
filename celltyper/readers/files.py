"""Files of a dataset, by stem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celltyper.datasets.dataset import listing
from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.errors import DataError


def files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder by stem, sorted; hidden files and other suffixes are passed over.

    Parameters
    ----------
    folder : Path
        Must exist.
    suffixes : tuple of str
        Accepted suffixes, lower case; files may have them in capitals.

    Returns
    -------
    dict of str to Path
        In order of the stems.

    Raises
    ------
    DataError
        If the folder is missing, or two files share a stem.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in suffixes:
            continue
        if file.stem in found:
            raise DataError(
                f"{folder}: {found[file.stem].name!r} and {file.name!r} have the same stem; "
                "names must be unique"
            )
        found[file.stem] = file
    return dict(sorted(found.items()))


def check_pairs(path: Path, images: dict[str, Path], labels: dict[str, Path], folder: str) -> None:
    """Refuse an empty dataset, images without labels, and labels without image.

    Parameters
    ----------
    path : Path
        Dataset folder, for the message.
    images, labels : dict of str to Path
        Files by stem.
    folder : str
        Name of the folder of labels.

    Raises
    ------
    DataError
        Listing the stems.
    """
    if not images:
        raise DataError(f"{path / 'images'}: no image ({', '.join(IMAGE_SUFFIXES)}) in it")
    bare = [s for s in images if s not in labels]
    if bare:
        raise DataError(f"{path}: no file in {folder}/ for the images {listing(bare)}")
    orphans = [s for s in labels if s not in images]
    if orphans:
        raise DataError(f"{path}: no file in images/ for {folder}/ of {listing(orphans)}")


def sample_groups(path: Path, names: dict[str, Path], groups: Any) -> dict[str, str]:
    """Group of every sample; a sample without one is its own group.

    Parameters
    ----------
    path : Path
        Dataset folder, for the message.
    names : dict
        Keyed by sample name.
    groups : mapping of str to str
        From ``meta.json``.

    Returns
    -------
    dict of str to str
        Keyed by sample name.

    Raises
    ------
    DataError
        If a group is given for an image that is not there.
    """
    unknown = [s for s in groups if s not in names]
    if unknown:
        raise DataError(f"{path}: meta.json gives groups for {listing(unknown)}, not an image here")
    return {name: groups.get(name, name) for name in names}
