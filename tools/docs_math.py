"""Formulas of the documentation as MathML, which browsers show without a script or a font."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every fenced block of the language ``math``; called by mkdocs for every page."""
    return _BLOCK.sub(lambda found: f"<div>{convert(found[1], display='block')}</div>", markdown)
