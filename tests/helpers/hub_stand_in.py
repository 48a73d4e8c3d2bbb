"""A small stand-in for the Hugging Face hub: an HTTP server on loopback, able to misbehave.

It speaks what huggingface_hub uses to list a repository and to fetch files: model info with
``blobs=true``, the tree listing, and HEAD and GET of ``resolve`` with ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Files by name, at one commit, which ``main`` and the names in `revisions` stand for."""

    files: Mapping[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    is_gated: bool = False
    is_private: bool = False

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, data in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha1(data).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class HubStandIn:
    """What is served, how it is broken, and what was asked for."""

    repositories: dict[str, list[Repository]] = field(default_factory=dict)
    break_at: dict[str, int] = field(default_factory=dict)
    """By file name: every transfer ends, without a word, before this byte."""
    corrupt: set[str] = field(default_factory=set)
    """Names of files that are served with one byte changed."""
    ignores_ranges: bool = False
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""

    def add(self, name: str, files: Mapping[str, bytes], **settings: Any) -> Repository:
        repository = Repository(files, **settings)
        self.repositories.setdefault(name, []).append(repository)
        return repository

    def fetched(self) -> list[str]:
        """Names of the files that were asked for with GET, in order."""
        asked = [_RESOLVE.fullmatch(one.path) for one in self.requests if one.method == "GET"]
        return [found[3] for found in asked if found]


@contextmanager
def serve_hub() -> Iterator[HubStandIn]:
    """Serve an empty hub on a free port of the loopback for as long as the block runs."""
    hub = HubStandIn()

    class Handler(_Handler):
        stand_in = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.stand_in.requests.append(
            Request(
                self.command, path, self.headers.get("Range"), self.headers.get("Authorization")
            )
        )
        if found := _API.fullmatch(path):
            self._answer_api(found[1], found[2], found[3] or "main")
        elif found := _RESOLVE.fullmatch(path):
            self._answer_file(*found.groups())
        else:
            self._refuse(404, "EntryNotFound")

    def _find(self, name: str, revision: str) -> Repository | None:
        versions = self.stand_in.repositories.get(name, [])
        has_token = self.headers.get("Authorization") is not None
        if not versions or (versions[0].is_private and not has_token):
            self._refuse(401, "RepoNotFound")
            return None
        for repository in versions:
            if revision in (*repository.revisions, repository.commit):
                return repository
        self._refuse(404, "RevisionNotFound")
        return None

    def _answer_api(self, name: str, kind: str | None, revision: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        described = [_describe(name, data) for name, data in repository.files.items()]
        if kind == "tree":
            self._send_json(
                [
                    {"type": "file", "path": one["rfilename"], "oid": one["blobId"], **one}
                    for one in described
                ]
            )
            return
        self._send_json({"id": name, "sha": repository.commit, "siblings": described, "tags": []})

    def _answer_file(self, name: str, revision: str, file: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        if repository.is_gated and self.headers.get("Authorization") is None:
            self._refuse(403, "GatedRepo")
            return
        if file not in repository.files:
            self._refuse(404, "EntryNotFound")
            return
        data = repository.files[file]
        etag = hashlib.sha256(data).hexdigest()
        if file in self.stand_in.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked and not self.stand_in.ignores_ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.stand_in.break_at.get(file, len(data))
        self.wfile.write(data[start:end])
        if end < len(data):
            self.close_connection = True

    def _send_json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _describe(name: str, data: bytes) -> dict[str, Any]:
    """One file as the hub lists it: weights are in large-file storage, the rest in git."""
    described: dict[str, Any] = {
        "rfilename": name,
        "size": len(data),
        "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
    }
    if name.endswith((".safetensors", ".bin")):
        sha256 = hashlib.sha256(data).hexdigest()
        described["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    return described
