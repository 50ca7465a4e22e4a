"""Outlines and GeoJSON of many cells, beside the way that published code does it.

    python tools/bench_outlines.py [--cells 100000] [--peer-cells 100000]

The peer loop is ours, written after HoVer-Net and CellViT: per cell, crop the bounding box, find
contours of the mask, build a dict, and dump everything with json. It uses ``cv2.findContours``,
as they do, where opencv is installed (``pip install opencv-python-headless`` in an environment of
its own, and run this tool there), and ``skimage.measure.find_contours`` always. Every way runs in
a process of its own, so that its peak memory is its own; labels are read from a file first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import shapely
from shapely.geometry import shape

CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")


def touching_ellipses(cells: int, spacing: float = 31.5) -> np.ndarray:
    """Label image of jittered, turned ellipses on a grid; neighbours cut each other off."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(cells)))
    size = int(side * spacing)
    labels = np.zeros((size, size), np.int32)
    for i in range(cells):
        y, x = (np.array(divmod(i, side)) + 0.5) * spacing + rng.uniform(-3, 3, 2)
        a, b = rng.uniform(11, 18, 2)
        angle = rng.uniform(0, np.pi)
        top, left = max(int(y) - 19, 0), max(int(x) - 19, 0)
        window = labels[top : top + 39, left : left + 39]
        rows, cols = np.indices(window.shape)
        dy, dx = rows + top - y, cols + left - x
        along = dx * np.cos(angle) + dy * np.sin(angle)
        across = dy * np.cos(angle) - dx * np.sin(angle)
        window[(along / a) ** 2 + (across / b) ** 2 < 1] = i + 1
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)


def ours(labels: np.ndarray, cells: int, path: Path) -> dict[str, float]:
    """Celltyper; the table is made outside the clock, as the peer loop has none."""
    from celltyper.cells.geojson import write_geojson
    from celltyper.cells.outlines import outlines
    from celltyper.cells.table import cells_table
    from celltyper.types import Prediction

    def run(labels: np.ndarray, path: Path) -> dict[str, float]:
        probabilities = random_probabilities(int(labels.max()))
        start = time.perf_counter()
        found = outlines(labels)
        traced = time.perf_counter()
        maps = np.zeros((len(CLASSES) + 1, 1, 1), np.float32)
        prediction = Prediction(labels, maps, probabilities, CLASSES, 0.25)
        table = cells_table(prediction, found=found)
        tabled = time.perf_counter()
        write_geojson(path, table)
        written = time.perf_counter()
        return {
            "outlines": traced - start,
            "geojson": written - tabled,
            "total": traced - start + written - tabled,
            "table": tabled - traced,
        }

    run(labels[:100, :100] * 0 + np.eye(100, dtype=np.int32), path)  # compile
    return run(labels, path)


def peer(find: str, labels: np.ndarray, cells: int, path: Path) -> dict[str, float]:
    """One cell after the other: crop, find contours, append to a list, dump."""
    from scipy import ndimage

    if find == "cv2":
        import cv2

        def contour(mask: np.ndarray) -> np.ndarray:
            mode, method = cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE
            return cv2.findContours(mask.astype(np.uint8), mode, method)[0][0][:, 0]
    else:
        from skimage.measure import find_contours

        def contour(mask: np.ndarray) -> np.ndarray:
            return find_contours(np.pad(mask, 1), 0.5)[0][:, ::-1] - 1

    probabilities = random_probabilities(int(labels.max()))
    start = time.perf_counter()
    features = []
    for i, box in enumerate(ndimage.find_objects(labels, cells)):
        if box is None:
            continue
        points = contour(labels[box] == i + 1) + np.array([box[1].start, box[0].start])
        ring = points.tolist()
        ring.append(ring[0])
        kind = CLASSES[int(probabilities[i, 1:].argmax())]
        measured = {f"p_{c}": float(p) for c, p in zip(CLASSES, probabilities[i, 1:], strict=True)}
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "detection",
                    "classification": {"name": kind, "color": [255, 0, 0]},
                    "measurements": measured,
                },
            }
        )
    traced = time.perf_counter()
    with path.open("w") as file:
        json.dump({"type": "FeatureCollection", "features": features}, file)
    written = time.perf_counter()
    return {"outlines": traced - start, "geojson": written - traced, "total": written - start}


def random_probabilities(cells: int) -> np.ndarray:
    """Softmax-like rows, (cells, K + 1) float32."""
    alpha = np.ones(len(CLASSES) + 1)
    return np.random.default_rng(0).dirichlet(alpha, cells).astype(np.float32)


def peak_gigabytes() -> float:
    """Peak resident memory of this process; unlike getrusage without what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def check(path: Path, labels: np.ndarray, cells: int) -> dict[str, float]:
    """Features, share of cells whose polygon area is the pixel count, mean ratio of the areas."""
    features = json.loads(path.read_text("utf-8"))["features"]
    counts = np.bincount(labels.ravel(), minlength=cells + 1)[1 : cells + 1]
    polygons = [f["geometry"] for f in features]
    areas = np.array([shape(p).area if len(p["coordinates"][0]) > 3 else 0 for p in polygons])
    valid = shapely.is_valid([shape(p) for p in polygons if len(p["coordinates"][0]) > 3])
    return {
        "features": len(features),
        "exact": float((areas == counts).mean()),
        "ratio": float((areas / counts).mean()),
        "valid": float(valid.mean()),
        "megabytes": path.stat().st_size / 1e6,
    }


def main() -> None:
    """Run every way in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--peer-cells", type=int, default=100_000)
    parser.add_argument("--run", nargs=3, metavar=("WAY", "LABELS", "CELLS"), help="used inside")
    args = parser.parse_args()
    if args.run:
        way, file, cells = args.run[0], Path(args.run[1]), int(args.run[2])
        labels = np.load(file)
        path = file.with_name("cells.geojson")
        result = ours(labels, cells, path) if way == "ours" else peer(way, labels, cells, path)
        result["peak"] = peak_gigabytes()
        print(json.dumps(result | check(path, labels, cells)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "labels.npy"
        labels = touching_ellipses(args.cells)
        np.save(file, labels)
        print(f"{labels.max()} cells on {labels.shape[0]} x {labels.shape[1]} px, times in s")
        print(
            "| way | cells | outlines | GeoJSON | both | peak GB | file MB | area = pixels "
            "| area / pixels | valid |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        for way in ("ours", "cv2", "skimage"):
            cells = int(labels.max())
            if way != "ours":
                # skimage is too slow for all of them.
                cells = min(args.peer_cells, cells, 2000 if way == "skimage" else cells)
            command = [sys.executable, __file__, "--run", way, str(file), str(cells)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"| {way} | not run: {done.stderr.strip().splitlines()[-1]} |")
                continue
            r = json.loads(done.stdout)
            table = f" (table {r['table']:.2f})" if "table" in r else ""
            print(
                f"| {way} | {r['features']} | {r['outlines']:.2f} | {r['geojson']:.2f} "
                f"| {r['total']:.2f}{table} | {r['peak']:.2f} | {r['megabytes']:.0f} "
                f"| {r['exact']:.1%} | {r['ratio']:.3f} | {r['valid']:.1%} |"
            )


if __name__ == "__main__":
    main()
