"""CCMCT: cells of whole slides in a database of SlideRunner (SQLite).

::

    ccmct/
      MITOS_WSI_CCMCT_ODAEL.sqlite
      <slide>.svs          here, in images/, or where 'images' says

    Bertram et al., A large-scale dataset for mitotic figure assessment on whole slide images of
    canine cutaneous mast cell tumor. Scientific Data 6, 274 (2019).
    https://doi.org/10.1038/s41597-019-0290-4

Read are ``Slides(uid, filename)``, ``Classes(uid, name)``, ``Annotations(uid, slide, type,
agreedClass, deleted)``, ``Annotations_coordinates(annoId, coordinateX, coordinateY)`` and, for the
votes, ``Annotations_label(annoId, person, class)``. Spots (type 1 and 4) have one coordinate,
rectangles (2) and circles (5) two corners, between which the centre lies; polygons (3) outline
regions rather than cells and are left out, as is what was deleted.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError
from celltyper.patches.sources import find_images
from celltyper.patches.table import Patch, PatchTable, build_table

logger = logging.getLogger(__name__)

SUFFIXES = (".sqlite", ".sqlite3", ".db")
TABLES = ("Slides", "Classes", "Annotations", "Annotations_coordinates")
_POLYGON = 3


def read_sliderunner(
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    images: Path | None = None,
    mpp: float | None = None,
    pixels: bool = True,
) -> PatchTable:
    """Read a database of SlideRunner; see the top of this file.

    Parameters
    ----------
    path : Path
        SQLite file; opened for reading only.
    classes : sequence of str, optional
        Classes wanted, in order; without it, all that cells have, in order of their ids.
    images : Path, optional
        Folder of the slides; without it, that of the file, or ``images/`` there.
    mpp : float, optional
        Micrometres per pixel of the slides.
    pixels : bool
        Whether the slides must be there.

    Returns
    -------
    PatchTable
        Windows around cells, named ``<slide>:<x>:<y>``; the group is the slide. Cells without an
        agreed class are of unknown class.

    Raises
    ------
    DataError
        If the file is no such database, damaged, a slide is missing, or an annotation is of a
        slide that is not listed.
    """
    with _opened(path) as cursor:
        slides = dict(cursor.execute("SELECT uid, filename FROM Slides").fetchall())
        names = dict(cursor.execute("SELECT uid, name FROM Classes ORDER BY uid").fetchall())
        votes = _votes(cursor)
        notes = cursor.execute(
            "SELECT a.uid, a.slide, a.type, a.agreedClass,"
            " (MIN(c.coordinateX) + MAX(c.coordinateX)) / 2.0,"
            " (MIN(c.coordinateY) + MAX(c.coordinateY)) / 2.0"
            " FROM Annotations a JOIN Annotations_coordinates c ON c.annoId = a.uid"
            f" {_living(cursor)} GROUP BY a.uid ORDER BY a.uid"
        ).fetchall()
    cells = [note for note in notes if note[2] != _POLYGON]
    if len(cells) < len(notes):
        logger.info("%s: %d polygons are left out", path, len(notes) - len(cells))
    stray = [uid for uid, slide, *_ in cells if not slides.get(slide)]
    if stray:
        raise DataError(f"{path}: annotation {listing(stray)} is of a slide that is not in Slides")
    lost = [c[0] for c in cells if not all(isinstance(v, int | float) for v in c[4:])]
    if lost:
        raise DataError(f"{path}: annotation {listing(lost)} has no numbers as coordinates")
    files = find_images(path, sorted({slides[c[1]] for c in cells}), images, pixels=pixels)
    rows = [
        Patch(
            name=f"{slides[slide]}:{x:.10g}:{y:.10g}",
            file=files[slides[slide]],
            where=f"annotation {uid}",
            label=names.get(agreed) or "",
            votes=tuple(names[k] for k in votes[uid] if k in names),
            group=slides[slide],
            x=x,
            y=y,
        )
        for uid, slide, _, agreed, x, y in cells
    ]
    # Experts' votes must not settle what they have not agreed on.
    rows = [p if p.label else p._replace(votes=()) for p in rows]
    used = {p.label for p in rows}
    return build_table(
        path, rows, classes=classes, stated=tuple(n for n in names.values() if n in used), mpp=mpp
    )


def is_sliderunner(path: Path) -> bool:
    """Whether a file is a database with the tables of SlideRunner.

    Parameters
    ----------
    path : Path

    Returns
    -------
    bool
    """
    try:
        with _opened(path):
            return True
    except DataError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Cursor]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        address = f"file:{quote(str(path.resolve()))}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as database:
            cursor = database.cursor()
            found = {n for (n,) in cursor.execute("SELECT name FROM sqlite_master").fetchall()}
            missing = [t for t in TABLES if t not in found]
            if missing:
                raise DataError(
                    f"{path}: no database of SlideRunner: it lacks the tables {listing(missing)}"
                )
            yield cursor
    except sqlite3.Error as error:
        raise DataError(f"{path}: unreadable or damaged SQLite database ({error})") from None


def _columns(cursor: sqlite3.Cursor, table: str) -> set[str]:
    return {row[1] for row in cursor.execute(f"PRAGMA table_info({table})").fetchall()}


def _living(cursor: sqlite3.Cursor) -> str:
    """Condition for annotations that were not deleted; old databases delete at once."""
    deletable = "deleted" in _columns(cursor, "Annotations")
    return "WHERE COALESCE(a.deleted, 0) = 0" if deletable else ""


def _votes(cursor: sqlite3.Cursor) -> defaultdict[int, list[int]]:
    """Class ids that experts chose, by annotation."""
    votes: defaultdict[int, list[int]] = defaultdict(list)
    if {"annoId", "class"} <= _columns(cursor, "Annotations_label"):
        for note, kind in cursor.execute(
            "SELECT annoId, class FROM Annotations_label ORDER BY uid"
        ):
            votes[note].append(kind)
    return votes
