"""``meta.json``: what a dataset folder says about itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celltyper.datasets.dataset import listing
from celltyper.errors import DataError


@dataclass(frozen=True)
class Meta:
    """Contents of ``meta.json``, checked; fields that it lacks are empty."""

    name: str
    classes: tuple[str, ...] = ()
    mpp: float | None = None
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    colors: tuple[str, ...] = ()


def read_meta(folder: Path) -> Meta:
    """Read and check ``meta.json`` of a dataset folder.

    Parameters
    ----------
    folder : Path
        Dataset folder; without ``meta.json`` in it, everything is empty.

    Returns
    -------
    Meta
        Name (the folder's, if none is stated), classes in order of their ids, resolution, splits,
        groups, colors.

    Raises
    ------
    DataError
        If the file is not JSON, or a field is not what it must be. Keys that are not listed here
        (source, licence, counts) are left to the reader of the file.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return Meta(name=folder.resolve().name)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: must hold a JSON object such as {{'classes': [...], 'mpp': 0.5}}")
    classes = _classes(path, raw.get("classes", []))
    return Meta(
        name=str(raw.get("name") or folder.resolve().name),
        classes=classes,
        mpp=_mpp(path, raw.get("mpp")),
        splits=_splits(path, raw.get("splits", {})),
        groups=_groups(path, raw.get("groups", {})),
        colors=_colors(path, raw.get("colors", {}), classes),
    )


def check_splits(
    where: Path, splits: Mapping[str, tuple[str, ...]], groups: Mapping[str, str]
) -> None:
    """Refuse splits that name unknown images or share an image or a group.

    Parameters
    ----------
    where : Path
        For the message.
    splits : mapping of str to tuple of str
        Sample names by split.
    groups : mapping of str to str
        Group by sample name, for all samples of the dataset.

    Raises
    ------
    DataError
        Naming the split and the image or group.
    """
    owner: dict[str, str] = {}
    for split, names in splits.items():
        unknown = [n for n in names if n not in groups]
        if unknown:
            raise DataError(
                f"{where}: split {split!r} names {listing(unknown)}, which is not among the images"
            )
        if len(set(names)) != len(names):
            raise DataError(f"{where}: split {split!r} lists an image twice")
        for name in names:
            other = owner.setdefault(groups[name], split)
            if other != split:
                raise DataError(
                    f"{where}: group {groups[name]!r} (image {name!r}) is in both splits "
                    f"{other!r} and {split!r}; keep a patient, slide or field on one side"
                )


def _classes(path: Path, raw: Any) -> tuple[str, ...]:
    if isinstance(raw, dict):
        expected = [str(k) for k in range(1, len(raw) + 1)]
        if sorted(raw, key=str) != sorted(expected):
            raise DataError(
                f"{path}: class ids must be 1..{len(raw)} without gaps, got {listing(sorted(raw))}"
            )
        raw = [raw[k] for k in expected]
    if not isinstance(raw, list) or not all(isinstance(c, str) and c.strip() for c in raw):
        raise DataError(
            f"{path}: 'classes' must be a list of names or {{'1': name, '2': name, ...}}"
        )
    repeated = sorted({c for c in raw if raw.count(c) > 1})
    if repeated:
        raise DataError(f"{path}: class {listing(repeated)} is listed twice in 'classes'")
    if len(raw) > 254:
        raise DataError(f"{path}: {len(raw)} classes; at most 254 fit into a uint8 class map")
    return tuple(raw)


def _mpp(path: Path, raw: Any) -> float | None:
    if raw is None:
        return None
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise DataError(f"{path}: 'mpp' must be a number or null, got {raw!r}")
    if not (math.isfinite(raw) and raw > 0):
        raise DataError(f"{path}: 'mpp' must be positive micrometres per pixel, got {raw!r}")
    return float(raw)


def _splits(path: Path, raw: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(raw, dict) or not all(_is_names(v) for v in raw.values()):
        raise DataError(f"{path}: 'splits' must be {{'train': [image stems], ...}}")
    return {k: tuple(v) for k, v in raw.items()}


def _groups(path: Path, raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or not _is_names(list(raw.values())):
        raise DataError(f"{path}: 'groups' must be {{image stem: group name, ...}}")
    return dict(raw)


def _colors(path: Path, raw: Any, classes: tuple[str, ...]) -> tuple[str, ...]:
    if not raw:
        return ()
    if not isinstance(raw, dict) or set(raw) != set(classes):
        raise DataError(f"{path}: 'colors' must give '#rrggbb' for each of {listing(classes)}")
    colors = tuple(raw[c] for c in classes)
    wrong = [c for c in colors if not re.fullmatch(r"#[0-9a-fA-F]{6}", str(c))]
    if wrong:
        raise DataError(f"{path}: color {listing(wrong)} is not of the form '#rrggbb'")
    return colors


def _is_names(raw: Any) -> bool:
    return (
        isinstance(raw, Iterable)
        and not isinstance(raw, str)
        and all(isinstance(n, str) for n in raw)
    )
