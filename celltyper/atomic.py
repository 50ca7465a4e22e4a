"""Files that are either complete or not there.

Everything is written to a temporary file in the target's folder, flushed to disk and renamed, so
that a crash, a full disk or a kill never leaves half a file under the final name.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from celltyper.errors import CelltyperError, DataError, RunError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_draft(path: Path) -> bool:
    """Whether a file is what `atomic_path` writes to; a process that is killed leaves some."""
    return path.match(".*.tmp.*")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, on failure it is removed.

    Parameters
    ----------
    path : str or Path
        Final place; an existing file is replaced. Its folder must exist.

    Yields
    ------
    Path
        Temporary file in the same folder, with the same suffixes, empty.

    Raises
    ------
    DataError
        If the folder does not exist or cannot be written to.
    RunError
        If the disk is full or writing fails otherwise.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(6)}.tmp.{path.name}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        # Not tempfile.mkstemp: its 0600 would override the user's umask on the final file.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
    except OSError as error:
        raise _explained(error, path) from error
    try:
        yield temporary
        flush(temporary)
        # safetensors puts a file in its place that only the owner may read
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        if error.filename not in (None, str(temporary), os.fsencode(temporary)):
            raise  # not about this file
        raise _explained(error, path) from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # not every file system can flush a folder
        flush(path.parent)


def make_folder(path: str | Path) -> None:
    """Create a folder and its parents unless it is there.

    Raises
    ------
    DataError
        If a file is in the way or the parent is not writable.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise DataError(f"{path} is a file; give a folder") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"cannot create folder {path} ({reason}); choose another") from error


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, line ends as they are; errors as in `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: str | Path, value: object) -> None:
    """Write JSON (indented, UTF-8) atomically; errors as in `atomic_path`.

    Parameters
    ----------
    path : str or Path
        Final place.
    value : object
        What `json.dumps` takes. NaN and infinity, which JSON does not know, raise ValueError.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def flush(path: Path) -> None:
    """Have the system write a file or folder to disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path) -> CelltyperError:
    folder = path.parent.resolve()
    if error.errno in _FULL:
        return RunError(
            f"cannot write {path.name}: the disk of folder {folder} is full; "
            "free space or choose another folder"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DataError(
            f"cannot write {path.name}: folder {folder} is not writable "
            f"({os.strerror(error.errno)}); choose another folder"
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
        return DataError(
            f"cannot write {path.name}: {folder} is not a folder; create it or choose another"
        )
    if error.errno == errno.EISDIR:
        return DataError(f"cannot write {path}: it is a folder; choose another name")
    return RunError(f"cannot write {path.name} to folder {folder}: {error.strerror or error}")
