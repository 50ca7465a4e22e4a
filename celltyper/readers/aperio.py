"""Annotations of Aperio ImageScope (XML), shared by the readers of MoNuSeg and MoNuSAC."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from celltyper.errors import DataError


class Region(NamedTuple):
    """One outline.

    Parameters
    ----------
    layer : str
        Name of its ``Annotation``, empty if that has none.
    name : str
        For messages, such as ``"region 7"``.
    points : ndarray of float64, shape (n, 2)
        x, y in pixels.
    """

    layer: str
    name: str
    points: NDArray[np.float64]


def read_aperio(path: Path) -> list[Region]:
    """Outlines of an Aperio file, in its order.

    Parameters
    ----------
    path : Path
        ``Annotations/Annotation/Regions/Region/Vertices/Vertex`` with ``X`` and ``Y``. A layer is
        named by the first ``Attributes/Attribute`` of its ``Annotation`` with a ``Name``, or else
        by the ``Name`` of the ``Annotation``.

    Returns
    -------
    list of Region
        Also those that enclose nothing.

    Raises
    ------
    DataError
        If the file is missing, truncated, no XML of this kind, has a vertex without numbers, or
        defines a document type (entities may be made to expand without end).
    """
    document = _Document(path)
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = document.refuse
    parser.StartElementHandler = document.start
    parser.EndElementHandler = document.end
    document.parser = parser
    try:
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror or error})") from None
    except (expat.ExpatError, ValueError, LookupError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: unreadable or truncated XML ({error})") from None
    return [
        Region(document.layers[layer], name, np.array(points, np.float64).reshape(-1, 2))
        for layer, name, points in document.regions
    ]


class _Document:
    """What has been read of a file."""

    parser: expat.XMLParserType

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: list[str] = []
        self.layers: list[str] = []
        self.spare = ""
        self.regions: list[tuple[int, str, list[tuple[float, float]]]] = []

    def refuse(self, *_: object) -> None:
        raise DataError(f"{self.path}: defines a document type (DTD), as no Aperio file does")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self.open and tag != "Annotations":
            raise DataError(f"{self.path}: not Aperio XML: begins with <{tag}>, not <Annotations>")
        self.open.append(tag)
        if tag == "Annotation":
            self.layers.append("")
            self.spare = attributes.get("Name", "").strip()
        elif tag == "Attribute" and self.open[-3:-1] == ["Annotation", "Attributes"]:
            self.layers[-1] = self.layers[-1] or attributes.get("Name", "").strip()
        elif tag == "Region" and "Annotation" in self.open:
            name = f"region {attributes.get('Id') or len(self.regions) + 1}"
            self.regions.append((len(self.layers) - 1, name, []))
        elif tag == "Vertex" and "Region" in self.open:
            self.regions[-1][2].append(self.vertex(attributes))

    def end(self, tag: str) -> None:
        self.open.pop()
        if tag == "Annotation":
            self.layers[-1] = self.layers[-1] or self.spare

    def vertex(self, attributes: dict[str, str]) -> tuple[float, float]:
        try:
            x, y = float(attributes["X"]), float(attributes["Y"])
        except (KeyError, ValueError):
            x = y = math.nan
        if not (math.isfinite(x) and math.isfinite(y)):
            raise DataError(
                f"{self.path}, line {self.parser.CurrentLineNumber}: a Vertex must have numbers "
                f"X and Y, got {attributes}"
            )
        return x, y
