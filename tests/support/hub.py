"""A hub on the loopback: as much of its HTTP interface as huggingface_hub uses to make, write and read a repository of a model,
and `datasets` to read one of a dataset, which is called `datasets/USER/NAME` here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of-the-stand-in"
ASKED = "revision|tree|paths-info|preupload|commit"


class Hub:
    """Repositories by name, each a list of commits; a commit is {path: bytes}."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.broken = False  # answers 503 to everything
        self.endpoint = ""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """The files of a revision, None where there is no such one."""
        commits = self.repos[repo]
        if revision == "main":
            return commits[-1]
        return next((files for i, files in enumerate(commits) if sha(repo, i) == revision), None)

    def add(self, root: Path, kind: str = "") -> None:
        """Repositories of the folders `root/USER/NAME`; `kind` is `datasets/` for those of datasets."""
        for folder in root.glob("*/*"):
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            self.repos[f"{kind}{folder.relative_to(root).as_posix()}"] = [files]

    def head(self, repo: str, revision: str = "main") -> str:
        return sha(repo, len(self.repos[repo]) - 1) if revision == "main" else revision


def sha(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _route(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if hub.broken:
            self._answer(503, {"error": "broken"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(rf"/api/(models/|datasets/)([^/]+/[^/]+)(?:/({ASKED})/([^/]+).*)?", path):
            name = found[1].replace("models/", "") + found[2]
            self._of_repository(name, found[3] or "revision", found[4] or "main", body)
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        else:
            self._refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = _route

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self._allowed():
            self._answer(401, {"error": "Invalid username or password."})
        elif name in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"})
        else:
            self.hub.repos[name] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self._answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def _of_repository(self, repo: str, what: str, revision: str, body: bytes) -> None:
        hub = self.hub
        if repo not in hub.repos or (repo in hub.private and not self._allowed()):
            return self._refuse(401 if not self._allowed() else 404, "RepoNotFound")
        files = hub.files(repo, revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if what in ("preupload", "commit") and not self._allowed():
            return self._answer(403, {"error": "the token has no write access"})
        if what == "preupload":
            asked = json.loads(body)["files"]
            return self._answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        if what == "commit":
            return self._commit(repo, body)
        if what == "paths-info":
            return self._paths_info(files, body)
        if what == "tree":
            below = unquote(urlsplit(self.path).path).partition(f"/tree/{revision}")[2].strip("/")
            found = {p: d for p, d in sorted(files.items()) if not below or p.startswith(f"{below}/")}
            if below and not found:
                return self._refuse(404, "EntryNotFound")
            return self._answer(200, _tree(found, below, "recursive=true" in urlsplit(self.path).query.lower()))
        siblings = [{"rfilename": name} for name in sorted(files)]
        told = {"id": repo, "sha": hub.head(repo, revision), "private": repo in hub.private, "siblings": siblings}
        front = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        self._answer(200, {**told, "cardData": yaml.safe_load(front[1])} if front else told)

    def _paths_info(self, files: dict[str, bytes], body: bytes) -> None:
        found = [entry for entry in _tree(files, "", True) if entry["path"] in json.loads(body)["paths"]]
        self._answer(200, found)

    def _commit(self, repo: str, body: bytes) -> None:
        files = dict(self.hub.files(repo) or {})
        for line in filter(None, body.decode().splitlines()):
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        self.hub.repos[repo].append(files)
        head = self.hub.head(repo)
        self._answer(200, {"success": True, "commitOid": head, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{head}"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        if repo not in self.hub.repos:
            return self._refuse(401, "RepoNotFound")
        files = self.hub.files(repo, revision) or {}
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        told = {"ETag": f'"{_blob(files[name])}"', "X_Repo_Commit": self.hub.head(repo, revision), "Accept_Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            return self._answer(200, files[name], **told)
        first, last = int(span[1]), min(int(span[2] or len(files[name])), len(files[name]) - 1)
        told["Content_Range"] = f"bytes {first}-{last}/{len(files[name])}"
        self._answer(206, files[name][first : last + 1], **told)


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders as the hub lists them."""
    entries = [{"type": "file", "path": p, "size": len(d), "oid": _blob(d)} for p, d in files.items()]
    folders = {p.rsplit("/", i)[0] for p in files for i in range(1, p.count("/") + 1)}
    entries += [{"type": "directory", "path": p, "size": 0, "oid": _blob(p.encode())} for p in sorted(folders)]
    depth = below.count("/") + 1 if below else 0
    return [e for e in entries if e["path"] != below and (recursive or str(e["path"]).count("/") == depth)]


def _blob(data: bytes) -> str:
    """A file's id as git has it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at `endpoint` meanwhile."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_commands(folder: Path, endpoint: str, *commands: str, **env: str) -> tuple[int, str]:
    """What commands of mmref in a fresh process end with, and what they say; the hub's cache is below `folder`."""
    given = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    program = "import sys\nfrom mmref.cli import main\nsys.exit(max(main(words.split()) for words in sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *commands], env={**given, **env}, cwd=folder, text=True, capture_output=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def asked_instead(hub: Hub, monkeypatch: Any, cache: str, token: str | None = None) -> Iterator[None]:
    """Let huggingface_hub ask a hub of ours, with a cache of its own."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/no-token")
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", f"{cache}/no-tokens")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    yield
