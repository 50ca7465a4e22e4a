"""Getting weights: from a file or folder of this machine, else from the Hugging Face hub.

The messages of the hub's client are never passed on: they may hold the address with a password
in it, or what a server answered to a token.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from celltyper.atomic import atomic_path, make_folder, write_json
from celltyper.encoders.cards import EncoderCard
from celltyper.encoders.folders import (
    FOLDER_VARIABLE,
    SUFFIXES,
    WEIGHTS_FILES,
    commit_of,
    find_in_cache,
    find_in_folder,
    find_in_snapshots,
    hub_cache,
    looked_for,
    own_folder,
    present_weights,
    read_source,
    source_file,
)
from celltyper.errors import CheckpointError

logger = logging.getLogger(__name__)

HUB_NAMES = ("auto", "hub")
"""Values of ``encoder.weights`` that mean the published weights."""
MADE_NAMES = ("random", "twin")
"""Values of ``encoder.weights`` for which nothing is read."""

_OWN = "or give a local file or folder with encoder.weights=PATH (--weights PATH)"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TALKATIVE = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_PATIENCE = 60
"""Seconds that a server which took the connection may think before it counts as gone."""


class Fetched(NamedTuple):
    """Weights that ``celltyper encoders fetch`` got or found."""

    path: Path
    size: int
    commit: str | None
    new: bool


def find_weights(
    card: EncoderCard, weights: str | Path = "auto", revision: str | None = None
) -> Path:
    """Find the weights file of an encoder, downloading it if it must be.

    Parameters
    ----------
    card : EncoderCard
        The encoder.
    weights : str or Path
        "auto" or "hub": from the folder that ``$CELLTYPER_WEIGHTS`` names if they are there,
        else from the hub or its cache. Else a file, or a folder that is searched as
        `celltyper.encoders.folders.find_in_folder` says.
    revision : str, optional
        Commit or branch of the hub in place of the card's.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    CheckpointError
        If nothing is found (with what was looked for), or the hub does not give the file (with
        what to do).
    """
    if str(weights) in HUB_NAMES:
        folder = own_folder()
        found = find_in_folder(card, folder, revision) if folder else None
        return found or download_weights(card, revision)
    path = Path(weights).expanduser()
    if path.is_dir():
        found = find_in_folder(card, path, revision, whole=True)
        if found is None:
            raise CheckpointError(
                f"folder {path} has no weights of {card.name}: looked for {looked_for(card)}"
            )
        return found
    if not path.is_file():
        raise CheckpointError(
            f"weights file {path} does not exist; check encoder.weights or pass --weights PATH"
        )
    return path


def weights_here(card: EncoderCard) -> Path:
    """Find the weights of a card on this machine, in the places of "auto"; never download.

    Raises
    ------
    CheckpointError
        If they are not here, with how to get them.
    """
    present = present_weights(card)
    if present is None:
        raise CheckpointError(
            f"weights of {card.name} are neither in the hub's cache {hub_cache()} nor in a folder "
            f"that {FOLDER_VARIABLE} names: run 'celltyper encoders fetch {card.name}' or pass "
            "--weights PATH"
        )
    return present.path


def download_weights(card: EncoderCard, revision: str | None = None) -> Path:
    """Fetch a card's weights from the Hugging Face hub, or find them in its cache.

    The cache is asked first if a commit is named, and answers if the hub is out of reach.

    Parameters
    ----------
    card : EncoderCard
        With a `hub_id`.
    revision : str, optional
        Commit or branch in place of the card's; without either the main branch.

    Returns
    -------
    Path
        The file in the hub's cache.

    Raises
    ------
    CheckpointError
        If the weights are gated, not there, damaged, or the hub is out of reach: with what to
        do. A damaged download is removed.
    """
    revision = revision or card.revision
    cached = find_in_cache(card, hub_cache(), revision)
    if cached is not None and revision is not None and commit_of(cached) == revision:
        return cached
    return _download(_weights_of(card, revision), cached=cached).path


def download_config(hub_id: str) -> Path:
    """Fetch the ``config.json`` of a hub repository, or find it in the hub's cache.

    Parameters
    ----------
    hub_id : str
        ``owner/name``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    CheckpointError
        As `download_weights`.
    """
    files = ("config.json",)
    wanted = _Wanted(
        hub_id,
        hub_id,
        None,
        files,
        page=f"huggingface.co/{hub_id}",
        otherwise="or take an encoder of 'celltyper encoders' or timm/NAME",
    )
    cached = find_in_snapshots(hub_id, hub_cache(), None, files)
    return _download(wanted, cached=cached).path


def download_model(
    hub_id: str, files: Sequence[str], folder: Path, revision: str | None = None
) -> str | None:
    """Fetch a trained model from the Hugging Face hub, past its cache.

    Parameters
    ----------
    hub_id : str
        ``owner/name``.
    files : sequence of str
        The first must be there; others are fetched if they are, all of one commit.
    folder : Path
        Gets them.
    revision : str, optional
        Commit or branch; without it the main branch.

    Returns
    -------
    str or None
        The commit.

    Raises
    ------
    CheckpointError
        As `download_weights`.
    """
    commit = revision
    with tempfile.TemporaryDirectory(prefix=".hub-", dir=folder) as work:
        for name in files:
            wanted = _Wanted(
                hub_id,
                hub_id,
                commit,
                (name,),
                page=f"huggingface.co/{hub_id}",
                otherwise="or get the file another way and give it with -m",
                kind="model",
                newest="--revision main",
                elsewhere="or set CELLTYPER_CACHE to another folder",
            )
            try:
                path, commit = _download(wanted, into=Path(work))
            except _NoFileError:
                if name == files[0]:
                    raise
            else:
                path.replace(folder / name)
    return commit


def fetch_weights(card: EncoderCard, folder: Path | None = None) -> Fetched:
    """Make weights ready for a machine without network.

    Parameters
    ----------
    card : EncoderCard
        With a `hub_id`.
    folder : Path, optional
        Gets ``NAME.safetensors`` (or another suffix) and ``NAME.source.json``, which says where
        it came from; created if needed. By default the hub's cache is filled.

    Returns
    -------
    Fetched
        Checked against the SHA-256 of the hub, where it is known, even if it was there already.

    Raises
    ------
    CheckpointError
        As `download_weights`.
    """
    cached = find_in_cache(card, hub_cache())
    if cached is not None:
        _check(cached, _sha256_of_link(cached), f"encoder {card.name!r}")
    if folder is None:
        path = download_weights(card)
        return Fetched(path, path.stat().st_size, commit_of(path), new=path != cached)
    for target in (folder / f"{card.name}{suffix}" for suffix in SUFFIXES):
        if target.is_file() and _is_good(target, card):
            return Fetched(target, target.stat().st_size, commit_of(target), new=False)
    make_folder((folder / card.name).parent)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
        # never through the cache: its disk may be too small for what the folder is to hold
        source, commit = (
            (cached, commit_of(cached))
            if cached is not None
            else _download(_weights_of(card, card.revision), into=Path(work))
        )
        target = folder / f"{card.name}{source.suffix}"
        with atomic_path(target) as temporary:
            if source == cached:
                shutil.copyfile(source, temporary)
            else:
                source.replace(temporary)
    size = target.stat().st_size
    facts = {"file": target.name, "hub_id": card.hub_id, "commit": commit, "size": size}
    write_json(source_file(target), {**facts, "sha256": sha256_of(target), "licence": card.licence})
    return Fetched(target, size, commit, new=True)


class _Download(NamedTuple):
    path: Path
    commit: str | None


@dataclass(frozen=True)
class _Wanted:
    """The first of `files` of a repository, and what to say where it cannot be had."""

    name: str
    hub_id: str
    revision: str | None
    files: tuple[str, ...]
    page: str
    otherwise: str
    kind: str = "encoder"
    newest: str = "encoder.revision=main (--revision main)"
    elsewhere: str = "choose another folder with 'encoders fetch --to', or set HF_HOME"

    @property
    def who(self) -> str:
        return f"{self.kind} {self.name!r}"

    @property
    def absent(self) -> str:
        place = f"in the hub's cache {hub_cache()}" if self.kind == "encoder" else "here"
        return f"{self.where} is not {place}"

    @property
    def where(self) -> str:
        return f"{self.hub_id} (revision {(self.revision or 'main')[:12]})"


def _weights_of(card: EncoderCard, revision: str | None) -> _Wanted:
    if card.hub_id is None:
        raise CheckpointError(
            f"encoder {card.name!r} has no published weights; use encoder.weights=random or PATH"
        )
    page = card.gate_page or f"huggingface.co/{card.hub_id}"
    return _Wanted(card.name, card.hub_id, revision, WEIGHTS_FILES, page, _OWN)


def _download(
    wanted: _Wanted, *, cached: Path | None = None, into: Path | None = None
) -> _Download:
    """Download a file and check it; `cached` answers where the hub cannot be asked."""
    from huggingface_hub import hf_hub_download

    asked = False
    for filename in wanted.files:
        try:
            with _quiet():
                asked = False
                remote = _ask(wanted.hub_id, filename, wanted.revision)
                asked = True
                path = Path(
                    hf_hub_download(
                        wanted.hub_id,
                        filename,
                        revision=wanted.revision if into is None else remote.commit,
                        etag_timeout=_PATIENCE,
                        local_dir=into,
                    )
                )
        except Exception as error:  # noqa: BLE001 - the message of any error may hold a password
            if _is_no_entry(error):
                continue
            if cached is not None and not asked and not _is_refusal(error):
                logger.info("%s is out of reach: taking %s from its cache", _hub(), wanted.where)
                return _Download(cached, commit_of(cached))
            raise _explained(error, wanted, filename, asked=asked) from None
        if path != cached:
            _check(path, remote.sha256, wanted.who, remote.size, wanted.otherwise)
        return _Download(path, remote.commit)
    files = ", ".join(wanted.files)
    raise _NoFileError(
        f"{wanted.who}: {_hub()} has none of {files} in {wanted.where}; "
        f"check the name, {wanted.otherwise}"
    )


class _Remote(NamedTuple):
    commit: str
    sha256: str | None
    size: int | None


class _NoFileError(CheckpointError):
    """The repository is there, but none of the files that were wanted."""


class _NoHubError(Exception):
    """What answers is no hub: a login page of the network, a wrong mirror."""


def _ask(hub_id: str, filename: str, revision: str | None) -> _Remote:
    """Ask for a file once; the client's own download would ask for half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(hub_id, filename, revision=revision)
    try:
        found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        # requests and httpx, on which versions of the client stand, agree in this name
        if type(error).__name__ != "ReadTimeout":
            raise
        found = get_hf_file_metadata(url, timeout=_PATIENCE)
    if found.commit_hash is None or found.etag is None:
        raise _NoHubError
    known = _SHA256.fullmatch(found.etag)
    return _Remote(found.commit_hash, known and known.group(), found.size)


def _is_no_entry(error: Exception) -> bool:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, EntryNotFoundError):
        return not isinstance(error, LocalEntryNotFoundError)
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return False
    return _status(error) == 404


def _is_refusal(error: Exception) -> bool:
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    return isinstance(error, RevisionNotFoundError | HFValidationError)


def _explained(error: Exception, wanted: _Wanted, filename: str, *, asked: bool) -> CheckpointError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status, hub, where = _status(error), _hub(), wanted.where
    otherwise = wanted.otherwise
    if isinstance(error, GatedRepoError):
        reason = f"{where} is gated: accept the terms on {wanted.page}, run 'hf auth login'"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"{hub} has no {where}: take the newest with {wanted.newest}"
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        reason = f"{hub} has no {where}, or not for you: check the name, run 'hf auth login'"
    elif isinstance(error, OfflineModeIsEnabled):
        reason = (
            f"{wanted.absent} and HF_HUB_OFFLINE is set: "
            f"run 'celltyper {wanted.kind}s fetch {wanted.name}' online once"
        )
    elif status in (401, 403):
        reason = (
            f"{hub} did not accept your token for {where} ({status}): run 'hf auth login' or "
            "correct HF_TOKEN, see that it may read gated repositories"
        )
    elif status is not None:
        reason = f"{hub} answered {status} for {where}: try again later"
    elif isinstance(error, _NoHubError):
        reason = f"what answers as {hub} is none: check HF_ENDPOINT and your network"
    elif isinstance(error, OSError) and error.errno in _DISK:
        reason = f"cannot write {filename} of {where} ({os.strerror(error.errno)}): free space"
        otherwise = wanted.elsewhere
    elif asked:
        reason = f"the download of {filename} of {where} broke off: run it again"
    else:
        reason = f"{wanted.absent} and {hub} is out of reach: go online once"
    return CheckpointError(f"{wanted.who}: {reason}, {otherwise}")


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _hub() -> str:
    """Name of the hub for messages; the address of a mirror without user and password."""
    from huggingface_hub import constants

    if constants.ENDPOINT == "https://huggingface.co":
        return "the hub"
    address = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    return f"the mirror {address} (HF_ENDPOINT)"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client and its HTTP library from logging addresses and retries."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check(
    path: Path, sha256: str | None, who: str, size: int | None = None, otherwise: str = _OWN
) -> None:
    """Remove a file that is not what the hub has, and say so."""
    found = path.stat().st_size
    if size is not None and found != size:
        problem = f"has {found} bytes instead of {size}"
    elif sha256 is not None and sha256_of(path) != sha256:
        problem = "has another SHA-256 than on the hub"
    else:
        return
    blob = path.resolve()
    path.unlink()
    # the cache keeps the bytes apart from the name; left there they would count as downloaded
    blob.unlink(missing_ok=True)
    raise CheckpointError(
        f"{who}: downloaded file {path} {problem} and was removed: run it again, {otherwise}"
    )


def _is_good(path: Path, card: EncoderCard) -> bool:
    """Whether a fetched file is of the card's revision and undamaged; a user's own always is."""
    source = read_source(path)
    if not source:
        return True
    if card.revision is not None and source.get("commit") != card.revision:
        return False
    return path.stat().st_size == source.get("size") and sha256_of(path) == source.get("sha256")


def _sha256_of_link(path: Path) -> str | None:
    """SHA-256 that a file of the cache should have: the name of what it links to."""
    if not path.is_symlink():
        return None
    blob = path.readlink()
    known = _SHA256.fullmatch(blob.name) if blob.parent.name == "blobs" else None
    return known and known.group()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
