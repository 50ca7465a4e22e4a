from __future__ import annotations

import errno
import json
import os

import pytest

from celltyper.atomic import atomic_path, write_json, write_text
from celltyper.errors import DataError, RunError


def test_replaces_and_respects_the_umask(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_text("old")
    before = os.umask(0o027)
    try:
        with atomic_path(path) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.name.endswith("a.tar.gz")
            temporary.write_text("new")
            assert path.read_text() == "old"
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_private_file_in_its_place_respects_the_umask_too(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a") as temporary:
            (tmp_path / "other").touch(0o600)
            (tmp_path / "other").replace(temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError, "is full"),
        (OSError(errno.EROFS, "Read-only file system"), DataError, "is not writable"),
        (OSError(errno.EIO, "Input/output error"), RunError, "Input/output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (FileNotFoundError(errno.ENOENT, "x", "elsewhere"), FileNotFoundError, "elsewhere"),
    ],
)
def test_failure_keeps_the_old_file_and_removes_the_temporary_one(
    tmp_path, raised, expected, words
):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise raised

    with pytest.raises(expected, match=words) as caught:
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert "\n" not in str(caught.value)
    if expected in (RunError, DataError):
        assert str(tmp_path) in str(caught.value)


def test_folder_missing_or_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent" / "a.txt", tmp_path / "file" / "a.txt"):
        with pytest.raises(DataError, match="is not a folder"):
            write_text(path, "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="it is a folder"):
        write_text(tmp_path / "folder", "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to any folder")
def test_folder_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="is not writable"):
        write_text(tmp_path / "a.txt", "a")


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, 0.5, None]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"ä": [1, 0.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
