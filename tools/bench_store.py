"""Time random crops of a store, beside memory-mapped ``.npy`` files of the same arrays.

    python tools/bench_store.py ANNOTATED_IMAGES [--copies 8]

Images and labels (int32) of the dataset are written once as ``.npy``, once as a store, ``copies``
times over. Every crop is 256 x 256 px, image and labels, copied out, at a random place of a random
image; all ways cut the same crops, one after the other, in this process, files opened beforehand.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import zarr

from celltyper.datasets import store
from celltyper.datasets.merging import merge_datasets
from celltyper.datasets.store import Source, write_store
from celltyper.readers import open_dataset
from celltyper.readers import store as reader

Place = tuple[str, int, int]


def places(shapes: dict[str, tuple[int, int]], side: int, count: int, seed: int) -> list[Place]:
    """Random upper left corners."""
    rng = np.random.default_rng(seed)
    names = rng.choice(sorted(shapes), count)
    return [(str(n), *map(int, rng.integers([s - side + 1 for s in shapes[n]]))) for n in names]


def clock(cut: Callable[[str, int, int], object], crops: list[Place]) -> float:
    """Microseconds a crop."""
    start = time.perf_counter()
    for name, row, col in crops:
        cut(name, row, col)
    return (time.perf_counter() - start) / len(crops) * 1e6


def forget(folder: Path) -> None:
    """Ask the system to drop the files from memory, so that the next reading is from disk."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size(folder: Path) -> float:
    """Megabytes on disk."""
    return sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file()) / 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="annotated images of at least 256 px")
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--crops", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; on the disk to be measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        measure(Path(name), args)


def row(regime: str, times: dict[str, list[float]]) -> str:
    """Median microseconds, and how they compare with the first way in the same round."""
    first, *others = times.values()
    cells = [f"{np.median(first):.0f} us"]
    for other in others:
        ratio = np.median(np.divide(other, first))
        cells.append(f"{np.median(other):.0f} us ({ratio:.2f})")
    return f"| {regime} | {' | '.join(cells)} |"


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Write, read, compare."""
    once = open_dataset(args.data)
    copies = [replace(once, name=f"copy{i}") for i in range(args.copies)]
    sources = [Source(c, "auto") for c in copies]
    (folder / "npy").mkdir()
    shapes: dict[str, tuple[int, int]] = {}
    files = {}
    for i, sample in enumerate(merge_datasets(copies)):
        image, labels = (folder / "npy" / f"{kind}{i}.npy" for kind in ("image", "labels"))
        np.save(image, sample.image)
        np.save(labels, sample.labels)
        files[sample.name] = image, labels
        height, width = sample.labels.shape
        shapes[sample.name] = height, width
    pixels = sum(h * w for h, w in shapes.values())
    kept = {"all.zarr": pixels, "quarter.zarr": pixels // 4}
    start = time.perf_counter()
    for name, store.LABELS_KEPT in kept.items():
        write_store(folder / name, sources, progress=False)
    seconds = (time.perf_counter() - start) / len(kept)
    print(f"{len(shapes)} images, {pixels / 1e6:.0f} Mpx, a store written in {seconds:.1f} s")
    print(", ".join(f"{name} {size(folder / name):.0f} MB" for name in ("npy", *kept)))
    side = args.side

    def mapped() -> Callable[[str, int, int], object]:
        maps = {n: [np.load(f, mmap_mode="r") for f in pair] for n, pair in files.items()}

        def cut(name: str, row: int, col: int) -> object:
            image, labels = maps[name]
            part = np.s_[row : row + side, col : col + side]
            return np.array(image[part]), np.array(labels[part])

        return cut

    def stored(name: str) -> Callable[[str, int, int], object]:
        reader.LABEL_CACHE = 2 * kept[name]
        data = open_dataset(folder / name)
        return lambda name, row, col: data.read_window(name, row, col, side, side)

    def through_zarr() -> Callable[[str, int, int], object]:
        root = zarr.open_group(folder / "all.zarr", mode="r")
        arrays = {n: (root[f"image/{i:06d}"], root[f"labels/{i:06d}"]) for i, n in enumerate(files)}
        return lambda name, row, col: [
            a[row : row + side, col : col + side]
            for a in arrays[name]  # type: ignore[index]
        ]

    everything = {
        "memory-mapped npy": mapped,
        "store": lambda: stored("all.zarr"),
        "store of four times what is kept": lambda: stored("quarter.zarr"),
    }
    for crop in places(shapes, side, 50, 99):
        first, *others = (make()(*crop) for make in everything.values())
        for other in others:
            for one, two in zip(first, other, strict=True):  # type: ignore[call-overload]
                np.testing.assert_array_equal(one, two)
    print(f"| files | {' | '.join(everything)} |\n|---|" + "---|" * len(everything))
    cuts = {way: make() for way, make in everything.items()}
    for cut in cuts.values():  # until what can be kept is kept
        clock(cut, places(shapes, side, 60 * len(shapes), 1))
    times: dict[str, list[float]] = {way: [] for way in cuts}
    for r in range(args.rounds):
        for way, cut in cuts.items():
            times[way].append(clock(cut, places(shapes, side, args.crops, 10 + r)))
    print(row("in memory", times))
    del cuts, cut
    times = {way: [] for way in everything}
    for r in range(args.rounds):
        for way, make in everything.items():
            forget(folder)
            times[way].append(clock(make(), places(shapes, side, len(shapes), 50 + r)))
    print(row("on disk only, opened just now", times))
    cut = through_zarr()
    print(f"through zarr's own indexing: {clock(cut, places(shapes, side, 100, 5)):.0f} us")


if __name__ == "__main__":
    main()
