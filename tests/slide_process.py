"""One slide in a process of its own, for tests that kill it: ``python slide_process.py OUT``."""

from __future__ import annotations

import sys

from made_slides import PixelModel, made_labels, made_slide

from celltyper.slides import whole_slide
from celltyper.wholeslide import infer_slide

if __name__ == "__main__":
    slide = made_slide(made_labels(420, 610))
    infer_slide(PixelModel(), slide, sys.argv[1], whole_slide(slide), block=160, progress=False)  # type: ignore[arg-type]
