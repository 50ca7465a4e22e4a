"""The decoded tiles that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock

from celltyper.slides.source import Tile


class TileCache:
    """Tiles by key, up to a number of bytes; threads that want the same tile decode it once.

    Parameters
    ----------
    limit : int
        Bytes. The last tile is kept whatever its size.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._tiles: OrderedDict[Hashable, Tile] = OrderedDict()
        self._coming: dict[Hashable, Future[Tile]] = {}
        self._lock = Lock()

    def get(self, key: Hashable, decode: Callable[[], Tile]) -> Tile:
        """Tile of a key, decoded unless it is there; what `decode` raises is passed on."""
        with self._lock:
            found = self._tiles.get(key)
            if found is not None:
                self._tiles.move_to_end(key)
                return found
            coming = self._coming.get(key)
            if coming is None:
                mine = self._coming[key] = Future()
        if coming is not None:
            return coming.result()
        try:
            tile = decode()
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            mine.set_exception(error)
            raise
        tile.pixels.setflags(write=False)
        with self._lock:
            del self._coming[key]
            self._tiles[key] = tile
            self._used += tile.pixels.nbytes
            while self._used > self._limit and len(self._tiles) > 1:
                _, old = self._tiles.popitem(last=False)
                self._used -= old.pixels.nbytes
        mine.set_result(tile)
        return tile

    def clear(self) -> None:
        """Forget all tiles."""
        with self._lock:
            self._tiles.clear()
            self._used = 0
