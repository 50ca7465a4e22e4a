"""Stores that ``celltyper data prepare`` wrote; see `celltyper.datasets.store`.

Chunks are read here from the memory-mapped shards, as zarr's specification lays them out, since
opening an array through zarr costs more than the pixels of a tile.
"""

from __future__ import annotations

import json
import mmap
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from celltyper.datasets.dataset import Dataset, Window, check_window
from celltyper.datasets.store import ATTRIBUTE, FORMAT, LABELS_KEPT, is_store
from celltyper.errors import DataError
from celltyper.types import Sample

TREE = "OUT.zarr/zarr.json with image/ and labels/, as 'celltyper data prepare' writes it"
LABEL_CACHE = 2 * LABELS_KEPT
"""Decoded labels that are kept, bytes; in every process that reads."""
_OPEN_IMAGES = 4096
_EMPTY = 2**64 - 1
_ERRORS = (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError)
_Value = TypeVar("_Value")


def recognises(path: Path) -> bool:
    """Whether a folder is a finished store."""
    return is_store(path)


def read_store(path: str | Path) -> Dataset:
    """Open a store; images and labels are read on access, windows of them without the rest.

    Parameters
    ----------
    path : str or Path
        Folder that `celltyper.datasets.store.write_store` made.

    Returns
    -------
    Dataset
        With splits, domains and colors as they were. Every process keeps up to 512 MB of decoded
        labels.

    Raises
    ------
    DataError
        At opening: no store, unfinished, or of a later celltyper. On access: damaged files.
    """
    path = Path(path)
    if not is_store(path):
        raise DataError(f"{path}: not a finished store; expected {TREE}")
    about = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"][ATTRIBUTE]
    try:
        if about["format"] > FORMAT:
            raise DataError(
                f"{path}: written by celltyper {about['version']}, which this version does not "
                "read; update celltyper, or prepare the store again"
            )
        names = tuple(record["name"] for record in about["images"])
        images = {record["name"]: _Record(i, record) for i, record in enumerate(about["images"])}
        reader = StoreReader(path, images)
        return Dataset(
            name=about["name"],
            path=path,
            classes=tuple(about["classes"]),
            mpp=about["mpp"],
            names=names,
            groups={name: image.about["group"] for name, image in images.items()},
            read=reader.read,
            splits={split: tuple(members) for split, members in about["splits"].items()},
            colors=tuple(about["colors"]),
            domains={
                attribute: dict(zip(names, values, strict=True))
                for attribute, values in about["domains"].items()
            },
            window=reader.window,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, error) from None


@dataclass(frozen=True)
class _Record:
    index: int
    about: Mapping[str, Any]


class StoreReader:
    """Reads samples and windows of a store; a copy in another process starts with nothing open.

    Parameters
    ----------
    path : Path
        Folder of the store.
    images : mapping of str to _Record
        What the store says of every image, by name.
    """

    def __init__(self, path: Path, images: Mapping[str, _Record]) -> None:
        self.path = path
        self.images = images
        self._open: _Recent[tuple[_Array, _Array]] = _Recent(_OPEN_IMAGES, lambda _: 1)
        self._labels: _Recent[NDArray[Any]] = _Recent(LABEL_CACHE, lambda chunk: chunk.nbytes)

    def __reduce__(self) -> tuple[type[StoreReader], tuple[Path, Mapping[str, _Record]]]:
        return StoreReader, (self.path, self.images)

    def read(self, name: str) -> Sample:
        """Decode a sample."""
        record = self.images[name]
        height, width = record.about["shape"]
        image, labels = self.window(name, 0, 0, height, width)
        try:
            arrays = self._open.get(record.index, self._arrays, record.index)
            table = arrays[1].attributes["phenotypes"]
            phenotypes = np.zeros(int(labels.max(initial=0)) + 1, np.uint8)
            phenotypes[table["ids"]] = table["classes"]
        except _ERRORS as error:
            raise _damaged(f"{self.path}, image {name!r}", error) from None
        mpp, group = record.about["mpp"], record.about["group"]
        unannotated = tuple(record.about["unannotated"])
        return Sample(image, labels, phenotypes, name, group, mpp, unannotated)

    def window(self, name: str, row: int, col: int, height: int, width: int) -> Window:
        """Decode the chunks that a rectangle lies in."""
        record = self.images[name]
        check_window((self.path, name), record.about["shape"], row, col, height, width)
        image = np.empty((height, width, 3), np.uint8)
        labels = np.empty((height, width), np.int32)
        try:
            arrays = self._open.get(record.index, self._arrays, record.index)
            arrays[0].copy_to(image, row, col, self._labels)
            arrays[1].copy_to(labels, row, col, self._labels)
        except _ERRORS as error:
            raise _damaged(f"{self.path}, image {name!r}", error) from None
        return Window(image, labels)

    def _arrays(self, index: int) -> tuple[_Array, _Array]:
        image, labels = (
            _Array(self.path / kind / f"{index:06d}", index) for kind in ("image", "labels")
        )
        return image, labels


class _Recent(Generic[_Value]):
    """What was used last, up to a limit."""

    def __init__(self, limit: int, size: Callable[[_Value], int]) -> None:
        self._limit, self._size = limit, size
        self._kept: OrderedDict[Any, _Value] = OrderedDict()
        self._used = 0
        self._lock = Lock()

    def get(self, key: object, make: Callable[..., _Value], *args: object) -> _Value:
        try:
            value = self._kept[key]
            self._kept.move_to_end(key)
        except KeyError:  # not there, or another thread has just dropped it
            pass
        else:
            return value
        value = make(*args)
        with self._lock:
            if key not in self._kept:
                self._used += self._size(value)
            self._kept[key] = value
            while self._used > self._limit and len(self._kept) > 1:
                self._used -= self._size(self._kept.popitem(last=False)[1])
        return value


@dataclass(frozen=True)
class _Shard:
    """One file, memory-mapped, and where in it the chunks lie."""

    data: mmap.mmap
    index: NDArray[np.uint64]
    """Offset and length in bytes by chunk row and column, shape (rows, columns, 2)."""


@dataclass(eq=False)
class _Array:
    """An array of a store: sharded, and its chunks either raw or blosc."""

    path: Path
    number: int
    shards: dict[tuple[int, int], _Shard] = field(default_factory=dict)
    views: dict[tuple[int, int], NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        about = json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))
        sharding = about["codecs"][0]
        if sharding["name"] != "sharding_indexed":
            raise ValueError("not sharded")
        codecs = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        if codecs not in (["bytes"], ["bytes", "blosc"]):
            raise ValueError(f"codecs {', '.join(codecs)}")
        self.attributes: dict[str, Any] = about["attributes"]
        self.compressed = len(codecs) == 2
        self.dtype = np.dtype(about["data_type"]).newbyteorder("<")
        self.chunk: tuple[int, ...] = tuple(sharding["configuration"]["chunk_shape"])
        shard = about["chunk_grid"]["configuration"]["chunk_shape"]
        self.per_shard = shard[0] // self.chunk[0], shard[1] // self.chunk[1]
        self.channels = len(about["shape"]) - 2

    def copy_to(self, out: NDArray[Any], row: int, col: int, decoded: _Recent[Any]) -> None:
        """Fill an array with the window that begins at a pixel; keep what had to be decoded."""
        tall, wide = self.chunk[:2]
        height, width = out.shape[:2]
        down = _spans(row, height, tall)
        across = _spans(col, width, wide)
        for i, rows, rows_of_chunk in down:
            for j, cols, cols_of_chunk in across:
                chunk = self._chunk(i, j, decoded)
                out[rows, cols] = chunk[rows_of_chunk, cols_of_chunk]

    def _chunk(self, i: int, j: int, decoded: _Recent[Any]) -> NDArray[Any]:
        if self.compressed:
            chunk: NDArray[Any] = decoded.get((self.number, i, j), self.decode, i, j)
            return chunk
        if (i, j) not in self.views:
            self.views[i, j] = self.decode(i, j)
        return self.views[i, j]

    def decode(self, i: int, j: int) -> NDArray[Any]:
        """Chunk in row i and column j; raw ones are a view of the file."""
        rows, cols = self.per_shard
        shard = self._shard(i // rows, j // cols)
        offset, length = shard.index[i % rows, j % cols].tolist()
        if offset == _EMPTY:
            return np.zeros(self.chunk, self.dtype)
        if offset + length > len(shard.data):
            raise ValueError("a chunk lies behind the end of its file")
        if not self.compressed:
            return np.frombuffer(
                shard.data, self.dtype, length // self.dtype.itemsize, offset
            ).reshape(self.chunk)
        chunk = np.empty(self.chunk, self.dtype)
        part: Any = memoryview(shard.data)[offset : offset + length]
        flat: Any = chunk.reshape(-1).view(np.uint8)
        imagecodecs.blosc_decode(part, numthreads=1, out=flat)
        # In two bytes, where that is enough, twice as many labels are kept.
        return chunk.astype(np.uint16) if chunk.max(initial=0) < 2**16 else chunk

    def _shard(self, i: int, j: int) -> _Shard:
        if (i, j) not in self.shards:
            file = self.path.joinpath("c", str(i), str(j), *["0"] * self.channels)
            with file.open("rb") as stream:
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            rows, cols = self.per_shard
            # The index is the last thing in the file but for its checksum of four bytes.
            start = len(data) - 16 * rows * cols - 4
            if start < 0:
                raise ValueError("a shard is truncated")
            index = np.frombuffer(data, "<u8", 2 * rows * cols, start).reshape(rows, cols, 2)
            self.shards[i, j] = _Shard(data, index)
        return self.shards[i, j]


def _spans(start: int, length: int, side: int) -> list[tuple[int, slice, slice]]:
    """Chunks along an axis that a window has a part in: number, part of window, part of chunk."""
    first, skip = divmod(start, side)
    if skip + length <= side:
        return [(first, slice(length), slice(skip, skip + length))]
    spans = []
    for i in range(first, (start + length - 1) // side + 1):
        low, high = max(start, i * side), min(start + length, (i + 1) * side)
        spans.append((i, slice(low - start, high - start), slice(low - i * side, high - i * side)))
    return spans


def _damaged(where: object, error: BaseException) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{where}: damaged store ({reason}); prepare it again")
