"""What a table of patches holds, for ``celltyper data info`` and ``check``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from celltyper.datasets.checking import NO_SPLIT, Description
from celltyper.errors import DataError
from celltyper.patches.table import PatchTable
from celltyper.patches.windows import Header, read_header


def describe_patches(table: PatchTable) -> Description:
    """Count what a table of patches holds; of the images only headers are read.

    Parameters
    ----------
    table : PatchTable

    Returns
    -------
    Description
        Its objects are patches. Images that are missing or unreadable have no size.
    """
    files = dict.fromkeys(table.files)
    headers = [header for header in map(_header, files) if header is not None]
    sizes = Counter((h.height, h.width) for h in headers)
    mpp = Counter(table.mpp or h.mpp for h in headers) or {table.mpp: len(files)}
    splits = np.array([split or NO_SPLIT for split in table.splits])
    chosen = {split: np.flatnonzero(splits == split) for split in dict.fromkeys(splits.tolist())}
    domains = Counter(domain for domain in table.domains if domain)
    return Description(
        name=table.path.absolute().name,
        path=str(table.path),
        images=len(files),
        sizes=dict(sizes.most_common()),
        mpp=dict(mpp),
        classes=table.classes,
        nuclei={split: _counts(table.take(rows)) for split, rows in chosen.items()},
        total=_counts(table),
        images_by_split={
            split: len({table.files[i] for i in rows}) for split, rows in chosen.items()
        },
        groups=len(set(table.groups)),
        domains={"domain": dict(domains.most_common())} if domains else {},
        unannotated={},
        objects="patches",
    )


def _counts(table: PatchTable) -> tuple[int, ...]:
    """Patches of every class, those of unknown class last."""
    counts = np.bincount(
        np.where(table.labels < 0, len(table.classes), table.labels),
        minlength=len(table.classes) + 1,
    )
    return tuple(counts.tolist())


def _header(file: Path) -> Header | None:
    try:
        return read_header(file)
    except DataError:
        return None
