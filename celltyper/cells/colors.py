"""Colors of phenotypes."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping, Sequence

from celltyper.errors import ConfigError
from celltyper.types import TileModel

# Okabe & Ito, Color Universal Design (2008), without black, which H&E and outlines hide.
_RED, _BLUE, _GREEN, _YELLOW = "#d55e00", "#0072b2", "#009e73", "#f0e442"
_PURPLE, _SKY, _ORANGE, _GREY = "#cc79a7", "#56b4e9", "#e69f00", "#999999"
UNTYPED = "#9a9a9a"
"""Color of cells without a class."""
_PALETTE = (_RED, _BLUE, _GREEN, _ORANGE, _PURPLE, _SKY, _YELLOW)

# First match wins, so that "non-neoplastic" is not read as "neoplastic".
_KNOWN = (
    (r"non.?neoplastic|benign|normal|healthy", _ORANGE),
    (r"dead|necro|apopto|debris", _YELLOW),
    (r"mitotic|mitosis", _PURPLE),
    (r"neoplas|tumou?r|malignan|cancer|carcinoma", _RED),
    (r"neutrophil|eosinophil|granulocyt", _SKY),
    (r"macrophage|histiocyt|endotheli|vascular|vessel", _PURPLE),
    (r"inflam|lympho|immune|leu[ck]ocyt|plasma|til\b", _BLUE),
    (r"connective|strom|spindle|fibro|muscle|mesenchym", _GREEN),
    (r"epitheli", _RED),
    (r"other|unknown|unlabel|misc|ambiguous|rest\b", _GREY),
)


def colors_of(model: TileModel) -> tuple[str, ...]:
    """Colors of the model's phenotypes, its own or the defaults by name."""
    return model.colors or default_colors(model.classes)


def default_colors(
    classes: Sequence[str], overrides: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Fixed, color-blind-safe colors of phenotypes, all different.

    Names that the field uses have their usual color (tumour red, inflammatory blue, connective
    green, dead yellow, other grey); the rest takes what the palette of Okabe and Ito has left,
    and beyond that hues by the golden angle, which are no longer color-blind-safe.

    Parameters
    ----------
    classes : sequence of str
        Phenotype names.
    overrides : mapping of str to str, optional
        Colors ``#rrggbb`` by class name, used as they are.

    Returns
    -------
    tuple of str
        ``#rrggbb`` in lower case for every class, in order.

    Raises
    ------
    ConfigError
        If an override names no class or is not ``#rrggbb``.

    Examples
    --------
    >>> default_colors(["neoplastic", "inflammatory"], {"inflammatory": "#00FF00"})
    ('#d55e00', '#00ff00')
    """
    overrides = overrides or {}
    for name, color in overrides.items():
        if name not in classes:
            known = ", ".join(classes)
            raise ConfigError(f"color of {name!r}: no such class (classes: {known})")
        if not re.fullmatch("#[0-9a-fA-F]{6}", color):
            raise ConfigError(f"color of {name!r} must be '#rrggbb', got {color!r}")
    chosen: dict[int, str] = {
        i: overrides[name].lower() for i, name in enumerate(classes) if name in overrides
    }
    for i, name in enumerate(classes):
        usual = next((c for pattern, c in _KNOWN if re.search(pattern, name.lower())), None)
        if i not in chosen and usual is not None and usual not in chosen.values():
            chosen[i] = usual
    spare = [color for color in _PALETTE if color not in chosen.values()]
    for i in range(len(classes)):
        if i not in chosen:
            chosen[i] = spare.pop(0) if spare else _golden(i, set(chosen.values()))
    return tuple(chosen[i] for i in range(len(classes)))


def rgb(color: str) -> tuple[int, int, int]:
    """Red, green and blue from 0 to 255 of ``#rrggbb``."""
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue


def _golden(i: int, taken: set[str]) -> str:
    while True:
        hue = i * 0.61803398875 % 1
        channels = colorsys.hls_to_rgb(hue, (0.45, 0.6, 0.75)[i % 3], 0.6)
        color = "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
        if color not in taken:
            return color
        i += 1
