"""Files of a dataset, by stem."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from celltyper.datasets.dataset import listing
from celltyper.datasets.images import IMAGE_SUFFIXES
from celltyper.errors import DataError
from celltyper.readers.tree import folders_below, subfolders


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
    visible = (f for f in sorted(folder.iterdir()) if not f.name.startswith("."))
    files = (f for f in visible if f.suffix.lower() in suffixes)
    return _by_stem(folder, files, lambda f: repr(f.name))


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


def files_below(path: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a tree by stem, sorted.

    Parameters
    ----------
    path : Path
        Where to start; see `folders_below`.
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
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    files = (folder / n for folder, names in folders_below(path) for n in names)
    wanted = (f for f in files if f.name.lower().endswith(suffixes))
    return _by_stem(path, wanted, lambda f: str(f.relative_to(path)))


def _by_stem(path: Path, files: Iterable[Path], shown: Callable[[Path], str]) -> dict[str, Path]:
    """Files in order of their stems, each of which there is once."""
    found: dict[str, Path] = {}
    for file in files:
        other = found.setdefault(file.stem, file)
        if other is not file:
            raise DataError(
                f"{path}: {shown(other)} and {shown(file)} have the same stem; names must be unique"
            )
    return dict(sorted(found.items()))


def images_and_labels_below(
    path: Path, suffix: str, layout: str, tree: str
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and label files of a tree, one of each for every stem.

    Parameters
    ----------
    path : Path
        Where to start; see `folders_below`.
    suffix : str
        Of the label files, lower case.
    layout, tree : str
        Name of the layout and its tree in one line, for the messages.

    Returns
    -------
    images, labels : dict of str to Path
        By stem, in order of the stems.

    Raises
    ------
    DataError
        If there is none, an image has no labels, or labels have no image.
    """
    images = files_below(path, IMAGE_SUFFIXES)
    labels = files_below(path, (suffix,))
    if not images or not labels:
        raise wrong_layout(path, layout, tree)
    bare = [str(f.relative_to(path)) for s, f in images.items() if s not in labels]
    if bare:
        raise DataError(
            f"{path}: no {suffix} file for the image {listing(bare)}; {layout} is {tree}"
        )
    orphans = [str(f.relative_to(path)) for s, f in labels.items() if s not in images]
    if orphans:
        raise DataError(f"{path}: no image for the labels {listing(orphans)}; {layout} is {tree}")
    return images, labels


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV with a header.

    Parameters
    ----------
    path : Path
        UTF-8, with or without byte order mark.

    Returns
    -------
    list of dict
        Values by column, spaces around both removed.

    Raises
    ------
    DataError
        If the file cannot be read, its columns are not parted by commas, or a row has another
        number of fields than the header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[f.strip() for f in row] for row in csv.reader(file) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as UTF-8 CSV ({error})") from None
    if not rows:
        raise DataError(f"{path}: empty; a header line is expected")
    if len(rows[0]) == 1 and (";" in rows[0][0] or "\t" in rows[0][0]):
        raise DataError(
            f"{path}: columns are parted by semicolons or tabs; save it with commas, and a point "
            "as the decimal mark"
        )
    for row in rows[1:]:
        if len(row) != len(rows[0]):
            raise DataError(
                f"{path}: row {','.join(row)!r} has {len(row)} fields, the header {len(rows[0])}"
            )
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def split_of(file: Path, path: Path) -> str | None:
    """Split that a file lies in by the folders above it: ``train``, ``valid``, ``test``, or None.

    Parameters
    ----------
    file : Path
        File or folder below `path`.
    path : Path
        Dataset folder; its own name counts as well, so that one part may be opened alone.

    Returns
    -------
    str or None
        From the nearest folder with such a name, in any case; ``val`` and ``validation`` are
        ``valid``.
    """
    parts = (path.resolve().name, *file.relative_to(path).parent.parts)
    names = {"val": "valid", "validation": "valid"}
    found = [names.get(p.lower(), p.lower()) for p in parts]
    return next((p for p in reversed(found) if p in ("train", "valid", "test")), None)


def wrong_layout(path: Path, layout: str, tree: str) -> DataError:
    """Build the error for a folder of another layout: what is there, and what should be.

    Parameters
    ----------
    path : Path
        The folder.
    layout : str
        Name of the layout.
    tree : str
        The wanted tree in one line.

    Returns
    -------
    DataError
        To be raised by the caller.
    """
    if not path.is_dir():
        return DataError(f"{path}: no such folder; {layout} is {tree}")
    names = sorted(f.name + "/" * f.is_dir() for f in path.iterdir() if f.name[0] != ".")
    return DataError(f"{path}: not {layout}: found {listing(names) or 'nothing'}; expected {tree}")


def check_same_size(
    labels: tuple[int, ...], where: Path, image: tuple[int, ...], image_path: Path
) -> None:
    """Refuse a mask of another size than its image.

    Parameters
    ----------
    labels, image : tuple of int
        Their shapes; height and width come first.
    where, image_path : Path
        Their files, for the message.

    Raises
    ------
    DataError
        Naming both files and sizes.
    """
    if labels[:2] != image[:2]:
        raise DataError(
            f"{where}: mask is {labels[:2]}, but the image {image_path.name} is {image[:2]}; "
            "both must have the same height and width"
        )


def notes_by_image(
    path: Path, images: Mapping[str, Path], notes: Iterable[Path], suffixes: tuple[str, ...]
) -> dict[str, Path]:
    """Annotation file of every image, one each.

    Parameters
    ----------
    path : Path
        Dataset folder, for the message.
    images : mapping of str to Path
        Image files by stem.
    notes : iterable of Path
        Annotation files, ``<stem><suffix>`` or ``<image file><suffix>``.
    suffixes : tuple of str
        Their possible suffixes, the longer first.

    Returns
    -------
    dict of str to Path
        By stem of the image, in the order of `images`.

    Raises
    ------
    DataError
        If an image has no file or several (two annotators), or a file has no image.
    """
    found: dict[str, list[Path]] = {stem: [] for stem in images}
    by_name = {file.name: stem for stem, file in images.items()}
    strays: list[Path] = []
    exact: set[Path] = set()
    for note in notes:
        own = next(note.name[: -len(s)] for s in suffixes if note.name.lower().endswith(s))
        stem = own if own in images else by_name.get(own)
        if stem is not None:
            exact.add(note)
        else:  # a name such as a_alice belongs to image a
            begun = [s for s in images if own.startswith(s) and own[len(s)] in "_-. "]
            stem = max(begun, key=len, default=None)
        if stem is None:
            strays.append(note)
        else:
            found[stem].append(note)
    for stem, files in found.items():
        if len(files) > 1:
            names = listing(str(f.relative_to(path)) for f in files)
            raise DataError(
                f"{path}: image {images[stem].name!r} has {len(files)} annotation files, {names}; "
                "keep one (of two annotators, make two datasets)"
            )
    strays += [f for files in found.values() for f in files if f not in exact]
    if strays:
        raise DataError(
            f"{path}: no image of the same stem for {listing(f.name for f in strays)} "
            f"(images: {listing(f.name for f in images.values())})"
        )
    bare = [images[stem].name for stem, files in found.items() if not files]
    if bare:
        raise DataError(
            f"{path}: no annotation file for the images {listing(bare)}; an image without nuclei "
            "has an empty one"
        )
    return {stem: files[0] for stem, files in found.items()}


def ordered_classes(
    where: Path, found: Iterable[str], stated: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Classes in order: as stated, or else those found, in alphabetical order.

    Parameters
    ----------
    where : Path
        File or folder, for the message.
    found : iterable of str
        Class names as annotated.
    stated : tuple of str
        From ``meta.json``.

    Returns
    -------
    tuple of str
        Class names, id 1 first.

    Raises
    ------
    DataError
        If two names differ only in case or surrounding blanks, a name is not among the stated
        ones, or there are more than 254.
    """
    names = sorted(set(found))
    seen: dict[str, str] = {}
    for name in (*stated, *names):
        other = seen.setdefault(name.strip().casefold(), name)
        if other != name:
            raise DataError(
                f"{where}: classes {other!r} and {name!r} differ only in case or blanks; "
                "give one class one name"
            )
    unknown = [n for n in names if n not in stated]
    if stated and unknown:
        raise DataError(
            f"{where}: class {listing(unknown)} is not in meta.json "
            f"(its classes: {', '.join(stated)})"
        )
    classes = stated or tuple(names)
    if len(classes) > 254:
        raise DataError(f"{where}: {len(classes)} different classes; at most 254")
    return classes


NOTE_FOLDERS = ("annotations", "labels", "geojson", "points")


def annotated_images(
    path: Path, is_note: Callable[[Path], bool]
) -> tuple[Path, dict[str, Path], list[Path]] | None:
    """Images with annotation files beside them or in a folder of their own.

    Parameters
    ----------
    path : Path
        Folder of the images, or of ``images/``; or up to two levels above, if nothing else is
        there.
    is_note : callable
        Whether a file is an annotation file.

    Returns
    -------
    (Path, dict of str to Path, list of Path) or None
        The folder, its images by stem, and the annotation files in it, in ``images/`` and in
        folders named as `NOTE_FOLDERS` or one below those. None if there are not both.

    Raises
    ------
    DataError
        If two images share a stem.
    """
    root = path
    for _ in range(3):
        inner = subfolders(root)
        pictures = [root, *(f for f in inner if f.name.lower() == "images")]
        places = [f for f in inner if f.name.lower() in NOTE_FOLDERS]
        places = [*pictures, *places, *(f for place in places for f in subfolders(place))]
        files = [f for place in places if place.is_dir() for f in sorted(place.iterdir())]
        notes = [f for f in files if f.is_file() and f.name[0] != "." and is_note(f)]
        if notes:
            for folder in pictures:
                images = files_by_stem(folder, IMAGE_SUFFIXES)
                if images:
                    return root, images, notes
            return None
        if len(inner) != 1:
            return None
        root = inner[0]
    return None
