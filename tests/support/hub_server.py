"""A Hub on this machine: the part of its API that downloads use, with the faults that networks have."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """Repositories by name (`files`), and faults by `repository/file` or `repository`."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)  # HTTP status, X-Error-Code
    cut: dict[str, int] = field(
        default_factory=dict
    )  # bytes after which the connection breaks, each time
    cuts: int = 10**6  # how many connections break
    stall: threading.Event | None = (
        None  # after the cut's bytes the server waits for it, then breaks off
    )
    announce: dict[str, int] = field(default_factory=dict)  # sizes that the listing lies about
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 that the listing lies about
    log: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def describe(self, repo: str, name: str) -> dict[str, Any]:
        data, key = self.files[repo][name], f"{repo}/{name}"
        size = self.announce.get(key, len(data))
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": "0" * 40}
        if not name.endswith((".json", ".md", ".gitattributes")):
            sha256 = self.hashes.get(key, hashlib.sha256(data).hexdigest())
            entry["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 134}
        return entry


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        hub.tokens.add(self.headers.get("Authorization", ""))
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/")
            self.answer_listing(
                f"{owner}/{name}", rest[1] if rest else "main", rest[:1] == ["tree"]
            )
        elif path.count("/") < 4:
            self.reply(404, b"")
        else:
            owner, name, _, revision, file = path.split("/", 4)
            self.answer_file(f"{owner}/{name}", revision, file)

    do_HEAD = do_GET

    def answer_listing(self, repo: str, revision: str, as_tree: bool) -> None:
        hub = self.hub
        hub.log.append(f"list {repo}@{revision}")
        status, code = hub.refuse.get(repo, (0, ""))
        if not status and repo not in hub.files:
            status, code = 404, "RepoNotFound"
        elif not status and revision not in ("main", COMMIT):
            status, code = 404, "RevisionNotFound"
        if status:
            return self.reply(status, b"{}", {"X-Error-Code": code} if code else None)
        siblings = [hub.describe(repo, name) for name in hub.files[repo]]
        whole: Any = {"id": repo, "sha": COMMIT, "siblings": siblings}
        if as_tree:
            keys = {"rfilename": "path", "blobId": "oid"}
            whole = [
                {"type": "file", **{keys.get(k, k): v for k, v in s.items()}} for s in siblings
            ]
            for entry in whole:
                if "lfs" in entry:
                    entry["lfs"]["oid"] = entry["lfs"]["sha256"]
        body = json.dumps(whole).encode()
        return self.reply(200, body, {"Content-Type": "application/json"})

    def answer_file(self, repo: str, revision: str, name: str) -> None:
        hub, key = self.hub, f"{repo}/{name}"
        assert revision == COMMIT, "files are asked for at the commit that was listed"
        if self.command == "HEAD":
            hub.heads.append(name)
        else:
            hub.log.append(name)
            hub.ranges.append(self.headers.get("Range") or "")
        if key in hub.refuse:
            status, code = hub.refuse[key]
            return self.reply(status, b"", {"X-Error-Code": code} if code else None)
        data = hub.files[repo][name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = int(
            (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0]
        )
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "HEAD" or key not in hub.cut or hub.cuts <= 0:
            return self.reply(206 if start else 200, data[start:], headers)
        hub.cuts -= 1
        self.send_response(206 if start else 200)
        for header, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(data[start : start + hub.cut[key]])
        self.wfile.flush()
        if hub.stall:
            hub.stall.wait(20)
        self.close_connection = True
        return None


@contextmanager
def open_hub() -> Iterator[Hub]:
    """Yield a running hub; its `url` is what HF_ENDPOINT takes."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub})
    )
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
