"""A small stand-in for the Hugging Face Hub: repositories, branches, commits and files in memory, over HTTP on this machine.

It speaks as much of the protocol as huggingface_hub 2.4 asks of it without Xet (`HF_HUB_DISABLE_XET`): creating a repository
or branch, listing it, downloads with ranges, and commits whose large files go through git-lfs. Faults are set from outside.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable

LARGE = 4096  # bytes, from which on a file goes through git-lfs


@dataclasses.dataclass
class Repository:
    commits: dict[str, dict[str, bytes]]  # files by commit
    branches: dict[str, str]  # commit by branch
    private: bool = False

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer(http.server.ThreadingHTTPServer):
    """`with HubServer() as hub:` serves at `hub.endpoint`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # git-lfs objects by SHA-256
        self.requests: list[str] = []  # "METHOD path", and the range where one was asked for
        self.token: str | None = None  # who does not have it is refused
        self.gated = False
        self.cuts: dict[str, list[int]] = {}  # by file name: after how many bytes its next downloads break off
        self.refuses_commits = False

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, address: object) -> None:
        """A client that went away is no news."""

    def create(self, name: str, *, private: bool = False) -> Repository:
        first = hashlib.sha1(name.encode()).hexdigest()
        return self.repositories.setdefault(name, Repository({first: {}}, {"main": first}, private))

    def commit(self, name: str, changes: dict[str, bytes], *, branch: str = "main") -> str:
        repository = self.repositories[name]
        files = {**repository.commits[repository.branches[branch]], **changes}
        commit = hashlib.sha1(repr(sorted(files.items())).encode() + repository.branches[branch].encode()).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.commit_of(revision)]

    def downloads(self) -> list[str]:
        return [request for request in self.requests if request.startswith("GET") and "/resolve/" in request]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *unused: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(_GET)

    def do_HEAD(self) -> None:
        self._answer(_GET)

    def do_POST(self) -> None:
        self._answer(_POST)

    def do_PUT(self) -> None:
        self._answer(_PUT)

    def _answer(self, routes: dict[str, Callable]) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.urlsplit(self.path).path
        wanted = self.headers.get("Range")
        self.server.requests.append(f"{self.command} {path}{f' {wanted}' if wanted else ''}")
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._refuse(401, "RepoNotFound")
            return
        for pattern, route in routes.items():
            if found := re.fullmatch(pattern, path):
                route(self, *(urllib.parse.unquote(part or "") for part in found.groups()))
                return
        self._refuse(404, "")

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", status=status, headers={"X-Error-Code": code} if code else {})

    def _send(self, data: bytes, *, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, value: object, *, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status=status)

    def _commit_of(self, name: str, revision: str) -> str | None:
        """The commit; None where an error was sent."""
        repository = self.server.repositories.get(name)
        if repository is None:
            self._refuse(404, "RepoNotFound")
            return None
        if self.server.gated:
            self._refuse(403, "GatedRepo")
            return None
        commit = repository.commit_of(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
        return commit

    def info(self, name: str, revision: str) -> None:
        if commit := self._commit_of(name, revision or "main"):
            self._json({"id": name, "sha": commit, "private": self.server.repositories[name].private})

    def tree(self, name: str, revision: str) -> None:
        if commit := self._commit_of(name, revision):
            files = self.server.files(name, commit)
            self._json([{"type": "file", "path": path, "size": len(data), **_ids(data)} for path, data in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit_of(name, revision)
        if not commit:
            return
        data = self.server.files(name, commit).get(path)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"', "Accept-Ranges": "bytes"}
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-").group(1))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.server.cuts.get(path) if self.command == "GET" else None
        self._send(data[start:], status=206 if start else 200, headers=headers, cut=cuts.pop(0) if cuts else None)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.server.repositories
        self.server.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._json({"url": f"{self.server.endpoint}/{name}"}, status=409 if there else 200)

    def branch(self, name: str, branch: str) -> None:
        branches = self.server.repositories[name].branches
        status = 409 if branch in branches else 200
        branches.setdefault(branch, branches["main"])
        self._json({}, status=status)

    def preupload(self, name: str, revision: str) -> None:
        def mode(file: dict) -> dict:
            return {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular", "shouldIgnore": False}

        if self._commit_of(name, revision):
            self._json({"files": [mode(file) for file in json.loads(self.body)["files"]]})

    def lfs_batch(self, name: str) -> None:
        def action(wanted: dict) -> dict:
            there = wanted["oid"] in self.server.stored
            upload = {"upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}}
            return {"oid": wanted["oid"], "size": wanted["size"], **({} if there else {"actions": upload})}

        self._json({"transfer": "basic", "objects": [action(wanted) for wanted in json.loads(self.body)["objects"]]})

    def store(self, oid: str) -> None:
        right = hashlib.sha256(self.body).hexdigest() == oid
        if right:
            self.server.stored[oid] = self.body
        self._json({}, status=200 if right else 400)

    def commit(self, name: str, branch: str) -> None:
        if self.server.refuses_commits:
            self._refuse(403, "")
            return
        changes = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                changes[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            if entry["key"] == "lfsFile":
                changes[entry["value"]["path"]] = self.server.stored[entry["value"]["oid"]]
        commit = self.server.commit(name, changes, branch=branch)
        self._json({"commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    def validate(self) -> None:
        self._json({"warnings": [], "errors": []})


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else _ids(data)["oid"]


def _ids(data: bytes) -> dict:
    """What the listing says of a file beside its size."""
    blob = {"oid": hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()}
    if len(data) < LARGE:
        return blob
    return blob | {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}


_NAME = r"([\w.-]+/[\w.-]+)"
_GET = {
    rf"/api/models/{_NAME}(?:/revision/([^/]+))?": _Handler.info,
    rf"/api/models/{_NAME}/tree/([^/]+)": _Handler.tree,
    rf"/{_NAME}/resolve/([^/]+)/(.+)": _Handler.resolve,
}
_POST = {
    "/api/repos/create": _Handler.create,
    rf"/api/models/{_NAME}/branch/([^/]+)": _Handler.branch,
    rf"/api/models/{_NAME}/preupload/([^/]+)": _Handler.preupload,
    rf"/{_NAME}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    rf"/api/models/{_NAME}/commit/([^/]+)": _Handler.commit,
    "/api/validate-yaml": _Handler.validate,
}
_PUT = {r"/lfs/(\w+)": _Handler.store}
