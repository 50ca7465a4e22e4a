"""Tiles of a slide per second, by reader: ``python tools/bench_slides.py [SLIDE ...]``.

Without arguments slides are made of noise over blobs, as compressible as tissue: a pyramid in JPEG
(4:2:0, quality 80, tiles of 256 px), the same in LZW and in deflate, and an OME-Zarr. Every reader
cuts the same windows in the same order; pixels are compared with OpenSlide's. pyvips takes part
where it is installed. The best of some rounds is shown, since the machine may do other things.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local

os.environ.setdefault("VIPS_CONCURRENCY", "1")

import numpy as np
import openslide
import tifffile
import zarr
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from celltyper.slides import open_slide
from celltyper.tiling import Region

try:
    import pyvips
except ImportError:
    pyvips = None

Read = Callable[[int, int, int], NDArray[np.uint8]]


def texture(side: int) -> NDArray[np.uint8]:
    """Pink ground, blue blobs, grain."""
    rng = np.random.default_rng(0)
    blobs = gaussian_filter(rng.standard_normal((side, side), np.float32), 5) > 0.06
    ground = np.where(blobs[..., None], (110, 80, 160), (225, 180, 210)).astype(np.float32)
    ground = gaussian_filter(ground, (1.2, 1.2, 0)) + rng.normal(0, 4, (side, side, 1))
    return ground.clip(0, 255).astype(np.uint8)


def make(folder: Path, side: int) -> dict[str, Path]:
    """Write the slides."""
    small = texture(min(side, 2048))
    times = -(-side // len(small))
    levels = [np.tile(small, (times, times, 1))[:side, :side]]
    while len(levels[-1]) > 512:
        levels.append(levels[-1][::2, ::2])
    jpeg = {"compression": "jpeg", "compressionargs": {"level": 80}, "subsampling": (2, 2)}
    ways = {"jpeg": jpeg, "lzw": {"compression": "lzw"}, "deflate": {"compression": "zlib"}}
    files = {}
    for name, options in ways.items():
        options |= {"photometric": "rgb", "tile": (256, 256), "metadata": None}
        if name == "jpeg":
            options["photometric"] = "ycbcr"
        files[name] = folder / f"{name}.tif"
        with tifffile.TiffWriter(files[name], bigtiff=True) as tiff:
            for i, level in enumerate(levels):
                tiff.write(level, subfiletype=int(i > 0), **options)
    files["ome-zarr"] = folder / "slide.zarr"
    group = zarr.create_group(files["ome-zarr"], zarr_format=3)
    for i, level in enumerate(levels[:1]):
        array = np.moveaxis(level, 2, 0)
        group.create_array(str(i), data=array, chunks=(3, 256, 256), shards=(3, 2048, 2048))
    axes = [{"name": n} for n in "cyx"]
    scales = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1]}]}]
    multiscales = [{"axes": axes, "datasets": scales}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": multiscales}
    return files


def readers(path: Path) -> dict[str, Callable[[], Read]]:
    """What opens a slide and gives a function (x, y, side) of the full resolution, by name."""

    def ours() -> Read:
        slide = open_slide(path)
        return lambda x, y, side: slide.read(Region(y, x, side, side))

    def by_openslide() -> Read:
        slide = openslide.OpenSlide(path)

        def read(x: int, y: int, side: int) -> NDArray[np.uint8]:
            return np.asarray(slide.read_region((x, y), 0, (side, side)))[..., :3]

        return read

    def by_vips() -> Read:
        mine = local()  # its regions belong to a thread

        def read(x: int, y: int, side: int) -> NDArray[np.uint8]:
            if not hasattr(mine, "region"):
                image = pyvips.Image.new_from_file(str(path))[:3]
                mine.region, mine.size = pyvips.Region.new(image), (image.width, image.height)
            width, height = min(side, mine.size[0] - x), min(side, mine.size[1] - y)
            data = mine.region.fetch(x, y, width, height)
            return np.frombuffer(data, np.uint8).reshape(height, width, 3)

        return read

    def by_tifffile() -> Read:
        with tifffile.TiffFile(path) as tiff:
            array = zarr.open(tiff.series[0].levels[0].aszarr(), mode="r")
            array = array["0"] if isinstance(array, zarr.Group) else array
        return lambda x, y, side: np.asarray(array[y : y + side, x : x + side])

    def by_zarr() -> Read:
        array = zarr.open_group(path, mode="r")["0"]
        return lambda x, y, side: np.moveaxis(array[:, y : y + side, x : x + side], 0, -1)

    if path.is_dir():
        return {"celltyper": ours, "zarr": by_zarr}
    found = {"celltyper": ours, "openslide": by_openslide, "tifffile": by_tifffile}
    return found | ({"pyvips": by_vips} if pyvips else {})


def places(path: Path, side: int, step: int, most: int) -> list[tuple[int, int]]:
    """Corners of windows inside the slide, row after row."""
    with open_slide(path) as slide:
        width, height = slide.size
    rows, cols = range(0, height - side + 1, step), range(0, width - side + 1, step)
    return [(x, y) for y in rows for x in cols][:most]


def rate(make_reader: Callable[[], Read], todo: list[tuple[int, int]], side: int, threads: int):
    """Windows per second of wall clock, and per second of processor."""
    read = make_reader()
    with ThreadPoolExecutor(threads) as pool:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in pool.map(lambda at: read(*at, side).shape, todo):
            pass
        return len(todo) / (time.perf_counter() - wall), len(todo) / (time.process_time() - cpu)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", nargs="*", type=Path)
    parser.add_argument("--side", type=int, default=512, help="of the windows, in pixels")
    parser.add_argument("--overlap", type=int, default=0, help="of neighbouring windows, in pixels")
    parser.add_argument("--most", type=int, default=256, help="windows of a slide")
    parser.add_argument("--made", type=int, default=8192, help="side of the made slides, in pixels")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {f.name: f for f in args.slides} or make(Path(folder), args.made)
        for name, path in files.items():
            todo = places(path, args.side, args.side - args.overlap, args.most)
            print(f"{name}: {len(todo)} windows of {args.side} px")
            ways = readers(path)
            exact: dict[str, str] = {}
            reference = ways.get("openslide", ways.get("zarr"))()
            for way, reader in list(ways.items()):
                try:
                    read = reader()
                    same = [
                        np.array_equal(read(*p, args.side), reference(*p, args.side))
                        for p in todo[::9]
                    ]
                    exact[way] = (
                        "exact" if all(same) else f"{same.count(False)} of {len(same)} differ"
                    )
                except Exception as error:  # noqa: BLE001 - a reader that cannot read it
                    print(f"  {way:<10} cannot read it: {error}")
                    del ways[way]
            best = {(w, t): (0.0, 0.0) for w in ways for t in args.threads}
            for _ in range(args.rounds):
                for way, threads in best:
                    now = rate(ways[way], todo, args.side, threads)
                    best[way, threads] = tuple(map(max, now, best[way, threads]))
            for way in ways:
                figures = "".join(
                    f"{t} threads {best[way, t][0]:6.0f}/s ({best[way, t][1]:5.0f} per CPU s)  "
                    for t in args.threads
                )
                print(f"  {way:<10} {figures} {exact[way]}")


if __name__ == "__main__":
    main()
