"""Models as text for the terminal; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from celltyper.errors import CheckpointError
from celltyper.library.cards import Figure, ModelCard, read_card
from celltyper.library.fetching import read_source
from celltyper.library.files import MODEL_FILE, is_half, read_header
from celltyper.library.shelf import HOW, Kept, box_folder, list_models, models_folder

_WIDTH = 79
_COLUMNS = ("name", "mpp", "encoder", "size", "licence", "from")
_APART = {
    "source": "nothing of it trained on",
    "left out": "by a model trained alike without it",
    "patients": "patients not trained on",
    "slides": "slides not trained on",
    "images": "images not trained on",
}


def table(models: Iterable[Kept]) -> str:
    """Write models as a list of at most 79 columns.

    Parameters
    ----------
    models : iterable of Kept
        From `celltyper.library.shelf.list_models`.

    Returns
    -------
    str
        Two lines a model: name, micrometres per pixel, encoder, size of the file, licence and
        place; then the classes and where it was fetched from. Without models, how to get one.
    """
    entries = [_entry(kept) for kept in models]
    if not entries:
        places = f"in the box ({box_folder()}) nor in the cache ({models_folder()})"
        return "\n".join(_wrapped("", f"no model {places}: {HOW}"))
    rows = [_COLUMNS, *(row for row, _ in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heads = [
        "  ".join(
            f"{cell:>{width}}" if name in ("mpp", "size") else f"{cell:{width}}"
            for cell, width, name in zip(row, widths, _COLUMNS, strict=True)
        ).rstrip()
        for row in rows
    ]
    lines = heads[:1]
    for head, (_, more) in zip(heads[1:], entries, strict=True):
        lines += [head, *_wrapped("  ", more)]
    return _printable(lines)


def description(folder: Path) -> str:
    """Write everything that is known of a model, and its card.

    Parameters
    ----------
    folder : Path
        Folder of the model, or its file.

    Returns
    -------
    str
        At most 79 columns, but for paths and addresses, which stay whole.

    Raises
    ------
    CheckpointError
        If the file of the model or its card is damaged.
    """
    file = folder / MODEL_FILE if folder.is_dir() else folder
    if not file.is_file():
        raise CheckpointError(f"no model at {folder}: give a folder that 'celltyper train' wrote")
    header, card = read_header(file), read_card(folder)
    source = read_source(file.parent)
    place = next((k.place for k in list_models() if k.folder == file.parent), None)
    facts = [
        ("place", f"{file.parent}{f' ({place})' if place else ''}"),
        ("from", _origin(source)),
        ("SHA-256", source.get("sha256")),
        ("finds" if _finds_cells(header) else "types", _classes(header)),
        ("resolution", f"{header['mpp']:g} micrometres per pixel" if header.get("mpp") else "any"),
        ("encoder", _encoder(header)),
        ("size", f"{_size(file)}{', half precision' if is_half(file) else ''}"),
        ("written by", f"celltyper {header.get('celltyper_version', 'unknown')}"),
        ("licence", card.licence if card else "not stated"),
        ("about", card.summary if card else "no card (docs/models.md): ask who trained it"),
    ]
    lines = [file.parent.name]
    for name, value in facts:
        if value is not None:
            lines += _wrapped(f"  {name:12} ", str(value))
    return _printable(lines + (_of_card(card) if card else []))


def _of_card(card: ModelCard) -> list[str]:
    lines = ["trained on"]
    for data in card.trained_on:
        text = f"{data.source} ({data.licence}): {data.what}; labels {data.labels}"
        lines += _wrapped("  - ", text)
    lines.append("held-out figures, with 95 % intervals")
    for figure in card.figures:
        lines += _figure(figure)
    if not card.figures:
        lines.append("  none")
    for heading, texts in (("limits", card.limits), ("must not be used for", card.not_for)):
        lines.append(heading)
        for text in texts:
            lines += _wrapped("  - ", text)
    return lines


def _figure(figure: Figure) -> list[str]:
    head = f"  {figure.score:12}  {figure.value:5.3f}  {figure.low:5.3f} to {figure.high:5.3f}  "
    images = f"{figure.images:,} image{'s' if figure.images > 1 else ''}"
    return _wrapped(head, f"{figure.source}, {images}; {_APART[figure.apart]}")


def _wrapped(head: str, text: str) -> list[str]:
    # paths and addresses stay whole, to be copied
    return wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _entry(kept: Kept) -> tuple[tuple[str, ...], str]:
    """Cells of a row, and the line below it."""
    file = kept.folder / MODEL_FILE
    try:
        header, card = read_header(file), read_card(kept.folder)
        mpp, encoder = header.get("mpp"), str(header["config"]["encoder"]["name"])
        facts = (
            f"{mpp:g}" if mpp else "any",
            encoder if len(encoder) <= 26 else f"{encoder[:25]}.",
            _size(file),
            card.licence if card else "-",
        )
        origin = _origin(read_source(kept.folder))
        return (kept.name, *facts, kept.place), _classes(header) + (
            f"; from {origin}" if origin else ""
        )
    except (CheckpointError, KeyError, TypeError):
        row = (kept.name, "-", "-", _size(file), "-", kept.place)
        return row, f"damaged: 'celltyper models show {kept.name}' says what"


def _classes(header: Mapping[str, Any]) -> str:
    classes = ", ".join(map(str, header.get("classes", ())))
    return classes if _finds_cells(header) else f"patches: {classes}"


def _finds_cells(header: Mapping[str, Any]) -> bool:
    return str(header.get("task", "cells")) == "cells"


def _encoder(header: Mapping[str, Any]) -> str:
    """Name of the encoder, and whether its weights are in the file."""
    encoder = header["config"]["encoder"]
    if encoder["adapt"] == "full":
        return f"{encoder['name']}, its weights are in the model"
    name = encoder["name"]
    return f"{name} ({encoder['adapt']}); its own weights: celltyper encoders fetch {name}"


def _origin(source: Mapping[str, Any]) -> str | None:
    if not source:
        return None
    commit = f", commit {source['commit'][:12]}" if source.get("commit") else ""
    return f"{source.get('source')}{commit}"


def _size(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:,.1f} MB"


def _printable(lines: Iterable[str]) -> str:
    """Join lines; what came from elsewhere must not steer the terminal."""
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)
