"""A Hugging Face hub on this machine, which is also a server of plain addresses."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

from celltyper.encoders import list_cards, load_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class FakeHub:
    """A Hugging Face hub: repositories to serve over HTTP, and what to do wrong.

    Parameters
    ----------
    files : dict
        ``{"owner/name": {"file": bytes}}`` at the branch main, which is `COMMIT`, and at the
        commits that cards pin.
    older : dict
        The same at the commit `OLDER`.
    refusals : dict
        Status and value of ``X-Error-Code`` (or None) by repository.
    truncate : int or None
        Bytes after which a download breaks off.
    flip : bool
        Whether the first byte of a download is wrong, at the right size.
    delay : float
        Seconds before an answer to HEAD.
    no_hub : bool
        Whether a login page answers in the hub's place.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    older: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    truncate: int | None = None
    flip: bool = False
    delay: float = 0.0
    no_hub: bool = False
    asked: list[tuple[str, str]] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let this process take it for the real one, with a cache of the hub's client."""
        constants = huggingface_hub.constants
        template = f"http://{self.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{self.address}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.server.server_port}"

    @property
    def downloads(self) -> list[str]:
        """Files that were asked for with GET."""
        return [path for method, path in self.asked if method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def _answer(self, *, body: bool) -> None:
        hub = self.hub
        path = unquote(self.path).partition("?")[0].lstrip("/")
        hub.asked.append((self.command, path))
        token = self.headers.get("Authorization", "")
        hub.authorizations.append(token)
        if not body:
            time.sleep(hub.delay)
        if hub.no_hub:
            self._send(200, b"<html>please log in</html>", {"Content-Type": "text/html"}, body)
            return
        if "/resolve/" not in path:
            self._send(404, b"{}", {}, body)
            return
        repository, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repository in hub.refusals:
            status, code = hub.refusals[repository]
            # the worst a server can do: tell everybody what it was told
            text = json.dumps({"error": f"no entry for {token}"}).encode()
            headers = {"X-Error-Message": f"no entry for {token}"}
            self._send(status, text, headers | ({"X-Error-Code": code} if code else {}), body)
            return
        commit = {"main": COMMIT}.get(revision, revision)
        pinned = {load_card(name).revision for name in list_cards()}
        files = hub.older if commit == OLDER else hub.files if commit in {COMMIT, *pinned} else None
        if repository not in hub.files:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif files is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        elif name not in files.get(repository, {}):
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._send(404, b"", headers, body)
        else:
            self._send_file(files[repository][name], commit, body)

    def _send_file(self, content: bytes, commit: str, body: bool) -> None:
        start, status = 0, 200
        asked = self.headers.get("Range", "")
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        if asked.startswith("bytes="):
            start, status = int(asked[6:].partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        size = len(content) - start
        if self.hub.flip:
            content = bytes([content[0] ^ 1]) + content[1:]
        if self.hub.truncate is not None:
            content = content[: self.hub.truncate]
        self._send(status, content[start:], headers, body, size)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], body: bool, size: int = -1
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size < 0 else size))
        self.end_headers()
        if body:
            self.wfile.write(content)
            if len(content) < size:
                self.close_connection = True


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
