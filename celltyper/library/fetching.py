"""Published models into the user's cache: from an address, or from the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import SplitResult, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tqdm import tqdm

from celltyper import __version__
from celltyper.atomic import atomic_path, make_folder, write_json
from celltyper.config import one_line
from celltyper.encoders.hub import download_model, sha256_of
from celltyper.errors import CheckpointError, ConfigError, DataError, unknown_name
from celltyper.library.cards import CARD_FILE, read_card
from celltyper.library.files import MODEL_FILE, RUN_FILE, check_format, read_header
from celltyper.library.shelf import Kept, list_models, models_folder

SOURCE_FILE = "source.json"
BESIDE = (CARD_FILE, RUN_FILE)
"""Files that are fetched with a model if they are published beside it; the second says which
images were trained on, without which an evaluation could not refuse them."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATIENCE = 60
"""Seconds without an answer after which a server counts as gone."""
_CHUNK = 1 << 20
_OTHERWISE = "or get the file another way and give it with -m"


class FetchedModel(NamedTuple):
    """What ``celltyper models fetch`` got or found."""

    name: str
    folder: Path
    size: int
    sha256: str
    new: bool


def fetch_model(
    source: str,
    *,
    name: str | None = None,
    sha256: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> FetchedModel:
    """Make a published model one that can be called by name.

    It appears in the cache as a whole or not at all; what a killed download left is removed by
    the next one of this name.

    Parameters
    ----------
    source : str
        Address of a ``model.safetensors``, of another ``.safetensors`` or of the folder around
        one; or ``owner/name`` on the hub. Beside the model, ``card.yaml`` and ``run.json`` are
        fetched if they are there.
    name : str or None
        What to call it; None takes the last part of `source` that says something.
    sha256 : str or None
        What the SHA-256 of the file must be.
    revision : str or None
        Commit or branch of the hub; None is the main branch.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    FetchedModel

    Raises
    ------
    ConfigError
        If an argument is wrong, or the name is taken.
    CheckpointError
        If the model cannot be had, is another than `sha256` says, is none of celltyper, or is
        there already but damaged. Nothing of it is kept.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256 := sha256.lower()):
        raise ConfigError(f"--sha256 wants 64 hexadecimal digits, got {sha256!r}")
    if "://" in source:
        if revision is not None:
            raise ConfigError("--revision is for models of the hub: leave it out")
        address = _address(source)
        origin, own_name = _shown(address), _name_of(address)
    elif _HUB_ID.fullmatch(source):
        address, origin, own_name = None, source, source.partition("/")[2]
    else:
        raise _no_source(source)
    name = own_name if name is None else name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be the name of a model: give another with --name")
    taken = next((kept for kept in list_models() if kept.name == name), None)
    facts = {"source": origin, "revision": revision}
    if taken is not None:
        return _there_already(taken, facts, sha256)
    shelf = models_folder()
    make_folder(shelf)
    part, folder = shelf / f".{name}.part", shelf / name
    try:
        with FileLock(shelf / f".{name}.lock", timeout=0):
            # from a download that was killed
            shutil.rmtree(part, ignore_errors=True)
            make_folder(part)
            try:
                if address is None:
                    facts["commit"] = download_model(source, (MODEL_FILE, *BESIDE), part, revision)
                else:
                    _download(address, part, progress=progress)
                found = _checked(part, origin, sha256)
                write_json(part / SOURCE_FILE, facts | {"sha256": found})
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except Timeout:
        raise CheckpointError(f"{name} is being fetched by another process: wait for it") from None
    return FetchedModel(name, folder, (folder / MODEL_FILE).stat().st_size, found, new=True)


def remove_model(name: str) -> Path:
    """Remove a model from the cache.

    Parameters
    ----------
    name : str

    Returns
    -------
    Path
        The folder that was.

    Raises
    ------
    ConfigError
        If there is no such model, or it is of the box.
    """
    models = list_models()
    cached = {kept.name: kept.folder for kept in models if kept.place == "cache"}
    if name not in cached:
        if name in {kept.name for kept in models}:
            raise ConfigError(f"{name} is in the box, a part of celltyper: it cannot be removed")
        raise unknown_name("model of the cache", name, cached)
    folder = cached[name]
    # not called by its name while half of it is gone
    part = folder.with_name(f".{name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        folder.rename(part)
        shutil.rmtree(part)
    except OSError as error:
        raise DataError(f"cannot remove {folder}: {error.strerror or error}") from error
    return folder


def read_source(folder: Path) -> dict[str, Any]:
    """Say where a fetched model came from; empty of any other, or if that file is damaged."""
    try:
        values = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _no_source(source: str) -> CheckpointError:
    kept = [kept.name for kept in list_models()]
    if source in kept:
        return CheckpointError(f"{source} is there already: see 'celltyper models show {source}'")
    return CheckpointError(
        f"{source!r} says not where from: give the address (https://...) of a model, or "
        "owner/name on the hub"
    )


def _there_already(
    taken: Kept, facts: Mapping[str, str | None], sha256: str | None
) -> FetchedModel:
    name, known = taken.name, read_source(taken.folder)
    again = f"'celltyper models remove {name}' first, or give another name with --name"
    if taken.place == "box" or {key: known.get(key) for key in facts} != dict(facts):
        where = f", from {known['source']}" if known.get("source") else ""
        way = "give another name with --name" if taken.place == "box" else again
        raise ConfigError(f"the {taken.place} has a model {name} already{where}: {way}")
    file = taken.folder / MODEL_FILE
    found = sha256_of(file)
    if found != known.get("sha256"):
        raise CheckpointError(f"{file} is damaged: 'celltyper models remove {name}', fetch again")
    if sha256 not in (None, found):
        raise CheckpointError(f"the cache has {name} with the SHA-256 {found}: {again}")
    return FetchedModel(name, taken.folder, file.stat().st_size, found, new=False)


def _checked(part: Path, origin: str, sha256: str | None) -> str:
    """Give the SHA-256 of a fetched model, if it is the one that is wanted, and a model."""
    file = part / MODEL_FILE
    found = sha256_of(file)
    if sha256 not in (None, found):
        raise CheckpointError(f"{origin} has the SHA-256 {found}, not {sha256}: nothing was kept")
    try:
        header = read_header(file)
    except CheckpointError as error:
        reason = str(error).partition("(")[2].partition(");")[0]
        raise CheckpointError(
            f"{origin} is no model of celltyper ({reason}): nothing was kept"
        ) from None
    check_format(header, origin)
    try:
        read_card(part)
    except CheckpointError as error:
        # the file is gone when this is read
        raise CheckpointError(str(error).replace(str(part), origin)) from None
    return found


def _address(source: str) -> SplitResult:
    """Address of the file itself."""
    try:
        address = urlsplit(source)
    except ValueError:
        address = urlsplit("")  # brackets that are no IPv6 address
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(f"{source!r} is no address of the web: one begins with https://")
    if address.username or address.password:
        raise ConfigError("leave user and password out of the address: get the file another way")
    if address.path.endswith(".safetensors"):
        return address
    return address._replace(path=f"{address.path.rstrip('/')}/{MODEL_FILE}")


def _name_of(address: SplitResult) -> str:
    *folders, file = [part for part in address.path.split("/") if part]
    return folders[-1] if file == MODEL_FILE and folders else file.removesuffix(".safetensors")


def _shown(address: SplitResult) -> str:
    """Address without its query, which may hold a signature."""
    return f"{address.scheme}://{address.netloc}{address.path}"


def _download(address: SplitResult, part: Path, *, progress: bool) -> None:
    if not _get(address, part / MODEL_FILE, progress=progress):
        raise CheckpointError(f"there is nothing at {_shown(address)} (404): check the address")
    folder, _, file = address.path.rpartition("/")
    stem = file.removesuffix(".safetensors")
    # several models may lie in one folder: each then has the name of its file
    names = BESIDE if file == MODEL_FILE else tuple(f"{stem}.{name}" for name in BESIDE)
    for name, published in zip(BESIDE, names, strict=True):
        _get(address._replace(path=f"{folder}/{published}"), part / name, progress=False)


def _get(address: SplitResult, target: Path, *, progress: bool) -> bool:
    """Download a file; False if there is none."""
    answer = _answer(address)
    if answer is None:
        return False
    total = int(answer.headers.get("Content-Length") or 0)
    off = None if progress else True
    bar = tqdm(total=total or None, unit="B", unit_scale=True, desc="fetch", disable=off)
    with answer, bar, atomic_path(target) as temporary, temporary.open("wb") as file:
        while chunk := _chunk(answer, address):
            file.write(chunk)
            bar.update(len(chunk))
        if total and file.tell() != total:
            raise _broken_off(address)
    return True


def _answer(address: SplitResult) -> Any:
    """Open an address; None if there is nothing."""
    request = Request(urlunsplit(address), headers={"User-Agent": f"celltyper/{__version__}"})
    where = _shown(address)
    try:
        return urlopen(request, timeout=_PATIENCE)
    except HTTPError as error:
        status = error.code
        error.close()
        if status == 404:
            return None
        reason = "is not for everybody" if status in (401, 403) else "cannot be had now"
        raise CheckpointError(f"{where} {reason} (status {status}): {_OTHERWISE}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = one_line(getattr(error, "reason", None) or error)
        raise CheckpointError(
            f"{where} is out of reach ({reason}): see that you are online, {_OTHERWISE}"
        ) from None


def _chunk(answer: Any, address: SplitResult) -> bytes:
    # apart from writing, whose errors are of the disk
    try:
        return bytes(answer.read(_CHUNK))
    except (OSError, HTTPException):
        raise _broken_off(address) from None


def _broken_off(address: SplitResult) -> CheckpointError:
    return CheckpointError(f"the download of {_shown(address)} broke off: run it again")
