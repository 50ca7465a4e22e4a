"""Pictures of the documentation, from the folder that ``celltyper demo`` wrote.

``make demo && python tools/make_docs_pictures.py demo`` writes them into docs; needs chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
SCREEN = 1000, 900
WIDTH = 936
COLORS = 128
"""Few enough for files below 400 kB, enough for H&E with outlines."""


def main() -> None:
    """Write every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of celltyper demo")
    demo = parser.parse_args().demo
    save(screenshot(demo / "report.html"), "report.png")
    save(Image.open(demo / "overlay.png").convert("RGB"), "demo.png")


def screenshot(page: Path) -> Image.Image:
    """First screen of a page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("chromium is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "page.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        size = f"--window-size={SCREEN[0]},{SCREEN[1]}"
        words = [browser, *flags, size, f"--screenshot={target}", page.absolute().as_uri()]
        subprocess.run(words, check=True, capture_output=True)
        return Image.open(target).convert("RGB")


def save(picture: Image.Image, name: str) -> None:
    """Write a picture at most `WIDTH` pixels wide, with a palette of its own."""
    picture.thumbnail((WIDTH, 2 * WIDTH), Image.Resampling.LANCZOS)
    path = DOCS / name
    few = picture.quantize(COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
