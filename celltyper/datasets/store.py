"""Stores: any dataset as one zarr (version 3) folder that random tiles are read from quickly.

::

    OUT.zarr/
      zarr.json                  attribute 'celltyper': names, groups, splits, classes, provenance
      image/000000               (H, W, 3) uint8, not compressed: that saves a quarter and reads
                                 several times slower (docs/benchmarks/store.md)
      labels/000000              (H, W) uint16, or int32 where ids need it; attribute 'phenotypes':
                                 ids and their classes. blosc as far as a reader keeps them decoded,
                                 as they are beyond
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import make_folder, write_json
from celltyper.datasets.dataset import Dataset
from celltyper.datasets.merging import merge_datasets
from celltyper.errors import ConfigError, DataError, RunError
from celltyper.labels import label_ids
from celltyper.types import UNKNOWN, Sample

if TYPE_CHECKING:
    import zarr

ATTRIBUTE = "celltyper"
FORMAT = 1
RAW_CHUNK = 1024
LABEL_CHUNK = 256
"""Largest side of a chunk; where it must be decoded, less of what a tile does not need."""
SHARD = 4096
"""Largest side of what is one file."""
LABELS_KEPT = 2**28
"""Pixels whose labels a reader keeps decoded, and so how many `write_store` compresses: decoding a
window anew costs three times as much as copying it."""
_DONE = ".done"


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset to store, and how it was opened."""

    dataset: Dataset
    reader: str


def write_store(
    path: str | Path,
    sources: Sequence[Source],
    *,
    settings: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write datasets into one store.

    It is written to a hidden folder beside `path`, which is renamed in the end: there is a whole
    store or none. If the writing is interrupted, the next call goes on: an image is done if it was
    finished from files of the same size and time of change, with the same settings. A second
    process that writes the same store meanwhile is refused.

    Parameters
    ----------
    path : str or Path
        Folder to make.
    sources : sequence of Source
        Put together as `merge_datasets` does.
    settings : mapping, optional
        What else the content depends on and should be kept as provenance; JSON values.
    overwrite : bool
        Replace a store, or an empty folder, that is there.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ConfigError
        If something is there already, or another process is writing it.
    DataError
        If a sample cannot be read or has a class that is not in the list, or classes differ.
    RunError
        If the disk is full or writing fails otherwise.
    """
    # Only writing needs zarr; opening a dataset should not wait for its import.
    import zarr

    path = Path(path)
    _check_free(path, overwrite)
    data = merge_datasets([source.dataset for source in sources])
    stamps = _stamps(sources, data, settings or {})
    make_folder(path.parent)
    work = path.with_name(f".{path.name}.partial")
    try:
        with _alone(path):
            # another process may have finished it since
            _check_free(path, overwrite)
            (work / _DONE).mkdir(parents=True, exist_ok=True)
            root = zarr.open_group(work, mode="a", zarr_format=3)
            groups = {kind: root.require_group(kind) for kind in ("image", "labels")}
            records = _write_images(work, groups, data, stamps, progress)
            _remove_others(work, len(data))
            root.attrs[ATTRIBUTE] = _about(path, data, sources, settings or {}, records)
            shutil.rmtree(work / _DONE)
            _put(work, path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); what is done lies in "
            f"{work.name}: the same command goes on with it"
        ) from error
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing the same store.

    The lock is the system's, which frees it when a process dies, so a file left behind is no lock.
    """
    from filelock import FileLock, Timeout

    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"{path} is being written by another process; wait for it, or give another folder"
        ) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; give a folder")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{path} exists; pass --overwrite or another folder")
    if not is_store(path):
        raise ConfigError(f"{path} is no store, so it is not replaced; give another folder")


def is_store(path: Path) -> bool:
    """Whether a folder is a finished store."""
    try:
        about = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        return ATTRIBUTE in about["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_images(
    work: Path,
    groups: Mapping[str, zarr.Group],
    data: Dataset,
    stamps: Mapping[str, str],
    progress: bool,
) -> list[dict[str, Any]]:
    """Write every image that is not done yet; give the records of all."""
    records: list[dict[str, Any]] = []
    pixels = 0
    bar = tqdm(
        enumerate(data.names),
        total=len(data),
        desc="prepare",
        unit="image",
        disable=None if progress else True,
        dynamic_ncols=True,
    )
    for i, name in bar:
        marker = work / _DONE / f"{i:06d}.json"
        record = _finished(marker, name, stamps[name])
        if record is None:
            marker.unlink(missing_ok=True)
            sample = data.read(name)
            kept = pixels + sample.labels.size <= LABELS_KEPT
            _write_sample(groups, f"{i:06d}", sample, data.classes, compress=kept)
            record = {
                "name": name,
                "group": data.groups[name],
                "mpp": sample.mpp or data.mpp,
                "unannotated": list(sample.unannotated),
                "shape": list(sample.labels.shape),
            }
            write_json(marker, {"stamp": stamps[name], "record": record})
        records.append(record)
        pixels += math.prod(record["shape"])
    return records


def _write_sample(
    groups: Mapping[str, zarr.Group],
    key: str,
    sample: Sample,
    classes: Sequence[str],
    *,
    compress: bool,
) -> None:
    from zarr.codecs import BloscCodec, BloscShuffle

    ids = label_ids(sample.labels)
    found = sample.phenotypes[ids]
    wrong = ids[(found == 0) | ((found > len(classes)) & (found != UNKNOWN))]
    if len(wrong):
        raise DataError(
            f"sample {sample.name!r}: label {wrong[0]} has class {sample.phenotypes[wrong[0]]}; "
            f"classes are 1..{len(classes)} ({', '.join(classes)})"
        )
    blosc = BloscCodec(cname="lz4", clevel=9, shuffle=BloscShuffle.noshuffle)
    table: dict[str, Any] = {"ids": ids.tolist(), "classes": found.tolist()}
    labels = sample.labels.astype(np.uint16) if ids.max(initial=0) < 2**16 else sample.labels
    coding = (LABEL_CHUNK, blosc) if compress else (RAW_CHUNK, None)
    attributes: dict[str, Any]
    for kind, pixels, largest, compressors, attributes in (
        ("image", sample.image, RAW_CHUNK, None, {}),
        ("labels", labels, *coding, {"phenotypes": table}),
    ):
        chunks = [_even(side, largest) for side in labels.shape]
        shards = [
            chunk * min(SHARD // chunk, -(-side // chunk))
            for chunk, side in zip(chunks, labels.shape, strict=True)
        ]
        channels = pixels.shape[2:]
        array = groups[kind].create_array(
            key,
            shape=pixels.shape,
            dtype=pixels.dtype,
            chunks=(*chunks, *channels),
            shards=(*shards, *channels),
            compressors=compressors,
            filters=None,
            fill_value=0,
            attributes=attributes,
            overwrite=True,
            # A missing file is then always a damage, never an empty part.
            config={"write_empty_chunks": True},
        )
        array[:] = pixels


def _even(side: int, largest: int) -> int:
    """Side of the chunks of a limited size that fill an image with hardly anything over."""
    return -(-side // -(-side // largest))


def _finished(marker: Path, name: str, stamp: str) -> dict[str, Any] | None:
    """Record of an image that was written from these very files."""
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        if found["stamp"] == stamp and found["record"]["name"] == name:
            return dict(found["record"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _stamps(
    sources: Sequence[Source], data: Dataset, settings: Mapping[str, object]
) -> dict[str, str]:
    """Digest of what every image is made from, by its name in the store."""
    names = iter(data.names)
    stamps: dict[str, str] = {}
    for source in sources:
        dataset = source.dataset
        base = [FORMAT, source.reader, list(dataset.classes), dict(settings)]
        files = _files_of(dataset.path, dataset.names)
        for old in dataset.names:
            text = json.dumps([*base, old, data.groups[new := next(names)], files[old]])
            stamps[new] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return stamps


def _files_of(path: Path, names: Sequence[str]) -> dict[str, list[list[object]]]:
    """Path, size and time of change of the files of every image.

    A file that is named after an image, or lies in a folder that is, belongs to it; all others
    belong to all images. Too many is safe: then an image is written again for nothing.
    """
    own: dict[str, list[list[object]]] = {name: [] for name in names}
    shared: list[list[object]] = []
    for file in _files(path):
        state = file.stat()
        inner = file.relative_to(path)
        entry: list[object] = [str(inner), state.st_size, state.st_mtime_ns]
        parts = {*inner.parts, *(Path(p).stem for p in inner.parts), str(inner.with_suffix(""))}
        owners = parts & own.keys()
        for name in owners:
            own[name].append(entry)
        if not owners:
            shared.append(entry)
    return {name: sorted([*entries, *shared], key=str) for name, entries in own.items()}


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, below, names in os.walk(path, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield Path(folder) / name


def _remove_others(work: Path, count: int) -> None:
    """Remove images of an earlier attempt that had more."""
    keep = {f"{i:06d}" for i in range(count)}
    for kind in ("image", "labels"):
        for folder in (work / kind).iterdir():
            if folder.is_dir() and folder.name not in keep:
                shutil.rmtree(folder)


def _about(
    path: Path,
    data: Dataset,
    sources: Iterable[Source],
    settings: Mapping[str, object],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything but pixels."""
    return {
        "format": FORMAT,
        "version": __version__,
        "name": data.name if data.name else path.stem,
        "classes": list(data.classes),
        "colors": list(data.colors),
        "mpp": data.mpp,
        "images": records,
        "splits": {split: list(names) for split, names in data.splits.items()},
        "domains": {a: [values[n] for n in data.names] for a, values in data.domains.items()},
        "sources": [
            {
                "name": source.dataset.name,
                "path": str(source.dataset.path.absolute()),
                "reader": source.reader,
                "images": len(source.dataset),
            }
            for source in sources
        ],
        "settings": dict(settings),
    }


def _put(work: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.replaced")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    work.rename(path)
    shutil.rmtree(old, ignore_errors=True)
