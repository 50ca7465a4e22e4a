"""Where weights lie on this machine: a file, a folder of many encoders, or the hub's cache."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from celltyper.encoders.cards import EncoderCard
from celltyper.errors import CheckpointError

WEIGHTS_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model_vision.bin",
    "conch_v1_5_pytorch_model.bin",
)
"""Names under which weights are published, in the order in which they are looked for."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
FOLDER_VARIABLE = "CELLTYPER_WEIGHTS"
"""Environment variable: a folder with the weights of many encoders."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Present(NamedTuple):
    """Weights that are on this machine, and by what they were found."""

    path: Path
    place: Literal["folder", "cache"]


def present_weights(card: EncoderCard, revision: str | None = None) -> Present | None:
    """Find the weights of a card without network; None if they are not here.

    Parameters
    ----------
    card : EncoderCard
        The encoder.
    revision : str, optional
        Commit or branch in place of the card's.

    Returns
    -------
    Present or None
        From the folder that ``$CELLTYPER_WEIGHTS`` names, else from the hub's cache.

    Raises
    ------
    CheckpointError
        If ``$CELLTYPER_WEIGHTS`` names no folder.
    """
    folder = own_folder()
    path = find_in_folder(card, folder, revision) if folder else None
    if path is not None:
        return Present(path, "folder")
    path = find_in_cache(card, hub_cache(), revision)
    return None if path is None else Present(path, "cache")


def own_folder() -> Path | None:
    """Folder that ``$CELLTYPER_WEIGHTS`` names, None if it is not set."""
    value = os.environ.get(FOLDER_VARIABLE)
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{FOLDER_VARIABLE} names {folder}, which is no folder; correct it")
    return folder


def hub_cache() -> Path:
    """Cache folder of the Hugging Face hub's client, which need not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def find_in_folder(
    card: EncoderCard, folder: Path, revision: str | None = None, *, whole: bool = False
) -> Path | None:
    """Look for the weights of a card in a folder of many encoders.

    Parameters
    ----------
    card : EncoderCard
        The encoder.
    folder : Path
        Holds ``NAME.safetensors`` (or .bin, .pt, .pth), ``NAME/``, ``OWNER/REPOSITORY/`` or the
        layout of the hub's cache.
    revision : str, optional
        Commit or branch in place of the card's, where the layout knows of revisions.
    whole : bool
        Whether the folder may itself be one repository: published names directly in it count.
        A folder of many encoders must not, since a plain name does not tell whose it is.

    Returns
    -------
    Path or None
        The file.
    """
    for name in _plain_names(card):
        if (folder / name).is_file():
            return folder / name
    cached = find_in_cache(card, folder, revision)
    if cached is not None:
        return cached
    return next(
        (folder / name for name in WEIGHTS_FILES if whole and (folder / name).is_file()), None
    )


def find_in_cache(card: EncoderCard, cache: Path, revision: str | None = None) -> Path | None:
    """Look for the weights of a card in the layout of the hub's cache.

    Parameters
    ----------
    card : EncoderCard
        The encoder.
    cache : Path
        Folder with ``models--OWNER--REPOSITORY/snapshots/COMMIT/FILE``.
    revision : str, optional
        Commit or branch in place of the card's. Where neither names one, the commit that was
        "main" at the last download, else the newest.

    Returns
    -------
    Path or None
        The file.
    """
    if card.hub_id is None:
        return None
    return find_in_snapshots(card.hub_id, cache, revision or card.revision, WEIGHTS_FILES)


def find_in_snapshots(
    hub_id: str, cache: Path, revision: str | None, names: tuple[str, ...]
) -> Path | None:
    """Find the first of some files of a repository in the layout of the hub's cache."""
    repository = cache / cache_name(hub_id)
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshots = repository / "snapshots"
    if commit is not None:
        folders = [snapshots / commit]
    elif snapshots.is_dir():
        folders = sorted(snapshots.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
    else:
        folders = []
    files = (folder / name for folder in folders for name in names)
    return next((file for file in files if file.is_file()), None)


def cache_name(hub_id: str) -> str:
    """Folder of a repository in the hub's cache."""
    return "models--" + hub_id.replace("/", "--")


def looked_for(card: EncoderCard) -> str:
    """Names that `find_in_folder` tries, shortly, for messages."""
    names = [f"{card.name}{{{','.join(SUFFIXES)}}}", f"{card.name}/FILE"]
    if card.hub_id is not None:
        names += [f"{card.hub_id}/FILE", f"{cache_name(card.hub_id)}/snapshots/"]
        names[-1] += f"{card.revision or '*'}/FILE"
    return f"{', '.join(names)} and FILE, FILE being one of {', '.join(WEIGHTS_FILES)}"


def commit_of(path: Path) -> str | None:
    """Commit of the hub that a weights file came from.

    Parameters
    ----------
    path : Path
        In the hub's cache, or a file that ``celltyper encoders fetch --to`` wrote.

    Returns
    -------
    str or None
        40 hexadecimal digits, or None if it is not known.
    """
    # not resolved: in the cache the name is a link to a file that knows of no commit
    if path.parent.parent.name == "snapshots" and _COMMIT.fullmatch(path.parent.name):
        return path.parent.name
    commit = read_source(path).get("commit")
    return str(commit) if commit else None


def source_file(path: Path) -> Path:
    """File beside fetched weights that says where they came from."""
    return path.with_name(f"{path.stem}.source.json")


def read_source(path: Path) -> dict[str, object]:
    """Repository, commit, size and SHA-256 that `source_file` holds; empty without one."""
    file = source_file(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read; remove it and fetch again") from error
    return values if isinstance(values, dict) and values.get("file") == path.name else {}


def _plain_names(card: EncoderCard) -> list[str]:
    names = [f"{card.name}{suffix}" for suffix in SUFFIXES]
    for folder in filter(None, (card.name, card.hub_id)):
        names += [f"{folder}/{name}" for name in WEIGHTS_FILES]
    return names
