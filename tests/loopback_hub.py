"""A Hugging Face Hub on 127.0.0.1 for tests: real `huggingface_hub` clients, no network, nothing mocked.

Serves the part of the Hub's HTTP interface that loading and publishing a model use. A repository is a set of
branches that name commits, and a commit is a mapping from path to bytes whose sha is a digest of its content.
Weights are listed as LFS files (ETag = sha256), all other files as git blobs (ETag = their git sha1). Uploads are
always taken inline ("regular"), so no LFS or Xet store is needed. A request outside this part gets a 501 that says so.

Run clients in a subprocess with `LoopbackHub.environment`, since huggingface_hub reads its settings at import.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".png")
API_ROUTE = re.compile(
    r"/api/(models|spaces)/(?P<repo>[^/]+/[^/]+)(/(?P<verb>[^/]+)/(?P<revision>[^/]+)(/(?P<path>.*))?)?"
)
FILE_ROUTE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")

Commit = dict[str, bytes]


class HubError(Exception):
    """An error response: its status and the `X-Error-Code` that clients turn into an exception."""

    def __init__(self, status: int, message: str, code: str | None = None, sha: str | None = None):
        super().__init__(message)
        self.status, self.code, self.sha = status, code, sha


@dataclass
class Repository:
    """The commits of one model repository, by sha, and its branches."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Commit, revision: str) -> str:
        """Stores the files as the new tip of a branch and returns the commit's sha."""
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
        self.commits[digest.hexdigest()] = files
        self.branches[revision] = digest.hexdigest()
        return digest.hexdigest()

    def find(self, revision: str) -> tuple[str, Commit]:
        """Returns the sha and the files of a branch name or sha."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Revision {revision} not found", "RevisionNotFound")
        return sha, self.commits[sha]


def describe_file(path: str, content: bytes) -> dict:
    """Returns a file's entry in a tree listing."""
    blob = b"blob %d\0" % len(content) + content
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(blob).hexdigest()}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class LoopbackHub:
    """Serves repositories while its `with` block runs; after the block the server has vanished.

    Attributes:
        endpoint: The server's address, as in `HF_ENDPOINT`.
        repositories: Name to repository, whether added here or pushed by a client.
        requests: Every request so far, as (method, path without query).
        private: Names of repositories that only the token `hf_owner` opens: to others there is none.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.private: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, repo_id: str, folder: str | os.PathLike, revision: str = "main") -> str:
        """Publishes a copy of a folder's files as a branch of a repository and returns the commit's sha."""
        folder = Path(folder)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.repositories.setdefault(repo_id, Repository()).commit(files, revision)

    def environment(self, cache_dir: str | os.PathLike) -> dict[str, str]:
        """Returns the variables of a process that knows this Hub alone and caches in `cache_dir`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": os.fspath(cache_dir),
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def find(self, repo_id: str) -> Repository:
        """Returns a repository by name."""
        if repo_id not in self.repositories:
            raise HubError(404, f"Repository {repo_id} not found", "RepoNotFound")
        return self.repositories[repo_id]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(self._read)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._write)

    def log_message(self, *args) -> None:
        pass

    def _answer(self, respond) -> None:
        path = urlsplit(self.path).path  # still quoted, so that refs%2Fpr%2F1 is one part
        self.hub.requests.append((self.command, unquote(path)))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if any(f"/{name}/" in f"{path}/" for name in self.hub.private):
                if self.headers.get("Authorization") != "Bearer hf_owner":
                    raise HubError(401, "Invalid username or password.", "RepoNotFound")
            respond(path, body)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error), "X-Repo-Commit": error.sha}
            self._send(json.dumps({"error": str(error)}).encode(), error.status, headers)

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str | None] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: dict | list) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _read(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            return self._send_json({"type": "user", "name": "loopback", "orgs": [], "auth": {"type": "access_token"}})
        if match := FILE_ROUTE.fullmatch(path):
            return self._send_file(*map(unquote, match.group("repo", "revision", "path")))
        match = API_ROUTE.fullmatch(path)
        if match is None or match["verb"] not in (None, "revision", "tree"):
            raise HubError(501, f"The loopback Hub does not serve {self.command} {path}")
        sha, files = self.hub.find(match["repo"]).find(unquote(match["revision"] or "main"))
        if match["verb"] == "tree":  # always recursive, always one page
            prefix = unquote(match["path"] + "/") if match["path"] else ""
            entries = [describe_file(name, content) for name, content in files.items() if name.startswith(prefix)]
            if prefix and not entries:
                raise HubError(404, f"{prefix} does not exist at {sha}", "EntryNotFound", sha)
            return self._send_json(entries)
        siblings = [{"rfilename": name} for name in files]
        self._send_json({"id": match["repo"], "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def _send_file(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self.hub.find(repo_id).find(revision)
        if path not in files:
            raise HubError(404, f"{path} does not exist in {repo_id}", "EntryNotFound", sha)
        content, entry = files[path], describe_file(path, files[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested is None:
            return self._send(content, headers=headers)
        start, end = int(requested[1]), min(int(requested[2] or len(content)), len(content) - 1)
        if start > end:
            return self._send(b"", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
        content_range = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self._send(content[start : end + 1], 206, headers | content_range)

    def _write(self, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if "Authorization" not in self.headers:
            raise HubError(401, "Writing needs a token")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        match = API_ROUTE.fullmatch(path)
        if match is None or match["verb"] not in ("preupload", "commit"):
            raise HubError(501, f"The loopback Hub does not serve {self.command} {path}")
        repository, revision = self.hub.find(match["repo"]), unquote(match["revision"])
        if match["verb"] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            answers = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._send_json({"files": answers})
        _, files = repository.find(revision)
        sha = repository.commit(self._apply(dict(files), body), revision)
        url = f"{self.hub.endpoint}/{match['repo']}/commit/{sha}"
        self._send_json({"success": True, "commitOid": sha, "commitUrl": url})

    def _create(self, asked: dict) -> None:
        repo_id = f"{asked.get('organization') or 'loopback'}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id}
        if repo_id in self.hub.repositories:
            return self._send(json.dumps(url).encode(), 409)
        self.hub.repositories[repo_id] = Repository()
        self.hub.repositories[repo_id].commit({".gitattributes": b""}, "main")
        self._send_json(url)

    @staticmethod
    def _apply(files: Commit, operations: bytes) -> Commit:
        """Applies the lines of a commit request, each {"key": ..., "value": ...}."""
        for operation in map(json.loads, operations.splitlines()):
            value = operation["value"]
            match operation["key"]:
                case "header":
                    pass
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    del files[value["path"]]
                case key:
                    raise HubError(501, f"The loopback Hub does not apply {key}")
        return files
