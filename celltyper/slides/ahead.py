"""Reading ahead: threads that decode what is wanted next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from celltyper.slides.slide import Slide
from celltyper.tiling import Region
from celltyper.types import Image


def read_ahead(
    slide: Slide,
    regions: Iterable[Region],
    mpp: float | None = None,
    *,
    threads: int = 2,
    ahead: int = 8,
) -> Iterator[Image]:
    """Read regions in their order while the caller works on those before.

    Parameters
    ----------
    slide : Slide
    regions : iterable of Region
        As in `Slide.read`; drawn from only as far as is read ahead.
    mpp : float, optional
        As in `Slide.read`.
    threads : int
        How many read.
    ahead : int
        How many regions are held at most, read or being read: the bound of memory.

    Yields
    ------
    ndarray of uint8, shape (region.height, region.width, 3)
        What ``slide.read`` gives, or raises.
    """
    todo = iter(regions)
    coming: deque[Future[Image]] = deque()
    pool = ThreadPoolExecutor(threads, "read-ahead")
    try:
        coming.extend(pool.submit(slide.read, region, mpp) for region in islice(todo, ahead))
        while coming:
            image = coming.popleft().result()
            coming.extend(pool.submit(slide.read, region, mpp) for region in islice(todo, 1))
            yield image
    finally:
        pool.shutdown(cancel_futures=True)
