"""A Hugging Face hub on this machine, with the requests for loading datasets and tokenizers.

`root/datasets/OWNER/NAME/REVISION/` and `root/models/OWNER/NAME/REVISION/` hold the files.
`hub.modes[OWNER/NAME]` selects the behaviour of a repository:

    private, gated    require a token
    broken            answers 503
    silent            accepts connections and never answers
    stalling          answers requests for files and no others
    partial           does not list its files
    portal            answers with a web page, as a network's log-in page does
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"

FILE_URL = r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)"
API_URL = r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?"


def commit(name: str, revision: str) -> str:
    """Return the commit of a revision of a repository."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


@dataclass(frozen=True)
class HubRequest:
    """A parsed request: for a file, or to the API."""

    kind: str  # datasets, models
    name: str  # OWNER/NAME
    revision: str
    path: str  # of the file, or of a folder in a request for the tree
    endpoint: str | None  # file, revision, tree, paths-info; None: the repository
    recursive: bool


def parse_request(path: str, query: dict[str, list[str]]) -> HubRequest | None:
    """Return the request of a URL; None if the hub has no such page."""
    recursive = query.get("recursive", [""])[0].lower() == "true"
    if match := re.fullmatch(FILE_URL, path):
        kind = "datasets" if match[1] else "models"
        return HubRequest(kind, match[2], match[3], match[4], "file", recursive)
    if match := re.fullmatch(API_URL, path):
        revision, folder = match[4] or "main", match[5] or ""
        return HubRequest(match[1], match[2], revision, folder, match[3], recursive)
    return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "FakeHub"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(length).decode())
        self.server.requests.append(f"{self.command} {unquote(url.path)}")
        request = parse_request(unquote(url.path), parse_qs(url.query))
        if request is None:
            self.refuse(404, "", "no such page")
        elif not self.misbehave(request) and not self.refuse_token(request):
            self.serve(request, form)

    do_GET = do_HEAD = do_POST = answer

    def misbehave(self, request: HubRequest) -> bool:
        """Behave as the repository's mode says; return whether that was the whole answer."""
        mode = self.server.modes.get(request.name)
        if mode == "silent" or (mode == "stalling" and request.endpoint != "file"):
            self.server.closing.wait()
            self.close_connection = True
        elif mode == "broken":
            self.refuse(503, "", "Service unavailable")
        elif mode == "partial" and request.endpoint == "tree":
            self.refuse(403, "", "Forbidden")
        elif mode == "portal":
            self.reply(200, b"<html>Please log in to this network.</html>", ETag='"page"')
        else:
            return False
        return True

    def refuse_token(self, request: HubRequest) -> bool:
        """Refuse a wrong token, or none where one is required; return whether it was refused."""
        mode = self.server.modes.get(request.name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        exists = (self.server.root / request.kind / request.name).is_dir()
        if token not in ("", TOKEN):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif mode == "gated":
            self.refuse(403 if token else 401, "GatedRepo", "Access is restricted")
        elif not exists or (mode == "private" and not token):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        else:
            return False
        return True

    def serve(self, request: HubRequest, form: dict[str, list[str]]) -> None:
        """Answer from the files of the requested revision."""
        name, revision = request.name, request.revision
        folders = (self.server.root / request.kind / name).iterdir()
        matches = [f for f in folders if revision in (f.name, commit(name, f.name))]
        if not matches:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = matches[0]
        sha = commit(name, folder.name)
        if request.endpoint == "file":
            return self.send(folder / request.path, sha)
        if request.endpoint == "tree":
            start = folder / request.path
            if not start.is_dir():
                return self.refuse(404, "EntryNotFound", "no such folder")
            inside = start.rglob("*") if request.recursive else start.iterdir()
            return self.send_json([self.entry(folder, file) for file in sorted(inside)])
        entries = [self.entry(folder, file) for file in sorted(folder.rglob("*"))]
        if request.endpoint == "paths-info":
            wanted = form.get("paths", [])
            return self.send_json([entry for entry in entries if entry["path"] in wanted])
        files = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
        description = {"id": name, "sha": sha, "private": False, "gated": False, "tags": []}
        return self.send_json(description | {"siblings": files})

    def entry(self, folder: Path, file: Path) -> dict[str, Any]:
        """Return the description of a file in a list of files."""
        path = file.relative_to(folder).as_posix()
        return {
            "path": path,
            "oid": hashlib.sha1(path.encode()).hexdigest(),
            "type": "directory" if file.is_dir() else "file",
            "size": file.stat().st_size,
        }

    def send(self, file: Path, sha: str) -> None:
        """Send a file, or the requested range of its bytes."""
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", "no such file", X_Repo_Commit=sha)
        body = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X_Repo_Commit": sha,
            "Accept_Ranges": "bytes",
        }
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return self.reply(200, body, **headers)
        first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
        return self.reply(206, body[first : last + 1], **headers)

    def send_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        self.reply(status, X_Error_Code=code, X_Error_Message=message, **headers)

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a response; underscores in the names of headers become hyphens."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class FakeHub(ThreadingHTTPServer):
    """The running hub; `requests` are the method and path of every request so far."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.modes: dict[str, str] = {}
        self.requests: list[str] = []
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
