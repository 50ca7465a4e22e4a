"""Encoder cards as text for the terminal; nothing here imports torch or asks the network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from textwrap import wrap
from typing import Any

from celltyper.encoders.cards import EncoderCard
from celltyper.encoders.folders import (
    FOLDER_VARIABLE,
    commit_of,
    hub_cache,
    own_folder,
    present_weights,
)

_COLUMNS = (
    ("name", "<"),
    ("size", ">"),
    ("patch", ">"),
    ("dim", ">"),
    ("input", ">"),
    ("mpp", ">"),
    ("licence", "<"),
    ("gate", "<"),
    ("have", "<"),
)


def table(cards: Iterable[EncoderCard]) -> str:
    """Write cards as a table of at most 79 columns.

    Parameters
    ----------
    cards : iterable of EncoderCard
        The rows.

    Returns
    -------
    str
        Under a heading: name, million parameters, patch side, embedding channels, input side,
        micrometres per pixel, licence (shortened), whether gated, and where the weights are
        ("folder", "cache", or "-" if not on this machine).
    """
    rows = [tuple(name for name, _ in _COLUMNS), *map(_row, cards)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        " ".join(
            f"{cell:{align}{width}}"
            for cell, width, (_, align) in zip(row, widths, _COLUMNS, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def description(card: EncoderCard) -> str:
    """Write all facts of a card, and where its weights are or would be looked for.

    Parameters
    ----------
    card : EncoderCard
        The encoder.

    Returns
    -------
    str
        One fact a line.
    """
    facts = [
        ("architecture", f"{card.timm_name} of timm{_arguments(card.timm_args)}"),
        ("family", {"vit": "vision transformer", "pyramid": "pyramid"}.get(card.family)),
        ("parameters", f"{card.parameters:g} million" if card.parameters else "unknown"),
        ("patch", f"{card.patch_size} px"),
        ("prefix tokens", str(card.prefix_tokens)),
        ("channels", str(card.embed_dim)),
        ("feature blocks", _plain(card.feature_blocks)),
        ("embedding", card.embedding),
        ("input", _input(card)),
        ("scales", _plain(card.scales) if len(card.scales) > 1 else None),
        ("mean, std", f"{_plain(card.mean)}; {_plain(card.std)}"),
        ("resolution", f"{card.mpp:g} micrometres per pixel" if card.mpp else "several or unknown"),
        ("licence", card.licence),
        ("gated", f"yes, terms on {card.gate_page or card.hub_id}" if card.gated else "no"),
        ("published", _published(card)),
        ("weights", _weights(card)),
        ("notes", card.notes.strip() or None),
    ]
    lines = [card.name]
    for name, value in facts:
        if value is not None:
            # paths and addresses stay whole, to be copied
            lines += wrap(
                value,
                79,
                initial_indent=f"  {name:15} ",
                subsequent_indent=" " * 18,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def _row(card: EncoderCard) -> tuple[str, ...]:
    present = present_weights(card)
    return (
        card.name,
        f"{card.parameters:.0f}M" if card.parameters else "-",
        str(card.patch_size),
        str(card.embed_dim),
        str(card.input_size or "any"),
        f"{card.mpp:g}" if card.mpp else "-",
        _short_licence(card.licence),
        "yes" if card.gated else "-",
        present.place if present else "-",
    )


def _short_licence(licence: str) -> str:
    """``CC-BY-NC-ND-4.0`` -> ``BY-NC-ND``, ``Owkin non-commercial`` -> ``Owkin NC``."""
    licence = licence.replace("non-commercial", "NC")
    creative = re.fullmatch(r"CC-(BY[A-Z-]*)-\d\.\d", licence)
    short = creative[1] if creative else licence
    return short if len(short) <= 10 else f"{short[:9]}."


def _arguments(arguments: dict[str, Any]) -> str:
    return f" ({', '.join(f'{k}={v}' for k, v in arguments.items())})" if arguments else ""


def _plain(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, tuple) else str(values)


def _input(card: EncoderCard) -> str:
    if card.input_size is None:
        return f"any size, {card.interpolation}"
    scaled = f", shorter side to {card.resize} px first" if card.resize else ""
    return f"{card.input_size} px, {card.interpolation}{scaled} (of an embedding)"


def _published(card: EncoderCard) -> str:
    return f"{card.hub_id}, revision {card.revision or 'main'}" if card.hub_id else "no"


def _weights(card: EncoderCard) -> str:
    present = present_weights(card)
    if present is not None:
        commit = commit_of(present.path)
        return f"{present.path}{f' (commit {commit})' if commit else ''}"
    folder = own_folder()
    first = f"folder {folder}" if folder else f"{FOLDER_VARIABLE} is not set"
    way = f"celltyper encoders fetch {card.name}" if card.hub_id else "encoder.weights=PATH"
    return f"not here ({first}; hub cache {hub_cache()}): {way}"
