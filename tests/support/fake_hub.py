"""A Hugging Face hub on this machine: as much of its HTTP interface as loading a dataset or a tokenizer asks for.

`root/datasets/OWNER/NAME/REVISION/` and `root/models/OWNER/NAME/REVISION/` hold the files. `hub.modes[OWNER/NAME]` says how a
repository behaves: "private" and "gated" want a token, "broken" answers 503, "silent" accepts and never answers, "stalling" answers
for one file and no other question, "partial" does not list its files, "portal" answers as no hub does.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"


def commit(name: str, revision: str) -> str:
    """The commit that a revision of a repository stands at."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "FakeHub"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        self.reply(status, X_Error_Code=code, X_Error_Message=message, **headers)

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        self.server.requests.append(f"{self.command} {path}")
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        api = re.fullmatch(
            r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?",
            path,
        )
        if not (file or api):
            return self.refuse(404, "", "no such page")
        kind, name = ("datasets" if file[1] else "models", file[2]) if file else (api[1], api[2])
        revision = (file[3] if file else api[4]) or "main"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        mode = self.server.modes.get(name)
        if mode == "silent" or (mode == "stalling" and api):
            self.server.closing.wait()
            self.close_connection = True
            return None
        if mode == "broken":
            return self.refuse(503, "", "Service unavailable")
        if mode == "partial" and api and api[3] == "tree":
            return self.refuse(403, "", "Forbidden")
        if mode == "portal":
            return self.reply(200, b"<html>Please log in to this network.</html>", ETag='"page"')
        if token not in ("", TOKEN):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if mode == "gated":
            return self.refuse(403 if token else 401, "GatedRepo", "Access is restricted")
        repository = self.server.root / kind / name
        if not repository.is_dir() or (mode == "private" and not token):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        folder = next(
            (f for f in repository.iterdir() if revision in (f.name, commit(name, f.name))), None
        )
        if folder is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha = commit(name, folder.name)
        if file:
            return self.send(folder / file[4], sha)
        entries = [self.entry(folder, f) for f in sorted(folder.rglob("*"))]
        if api[3] == "tree":
            start = folder / api[5]
            if not start.is_dir():
                return self.refuse(404, "EntryNotFound", "no such folder")
            inside = (
                start.rglob("*")
                if query.get("recursive", [""])[0].lower() == "true"
                else start.iterdir()
            )
            return self.send_json([self.entry(folder, f) for f in sorted(inside)])
        if api[3] == "paths-info":
            return self.send_json([e for e in entries if e["path"] in form.get("paths", [])])
        files = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
        return self.send_json(
            {
                "id": name,
                "sha": sha,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": files,
            }
        )

    do_GET = do_HEAD = do_POST = answer

    def entry(self, folder: Path, file: Path) -> dict[str, Any]:
        path = file.relative_to(folder).as_posix()
        oid = hashlib.sha1(path.encode()).hexdigest()
        return {
            "path": path,
            "oid": oid,
            "type": "directory" if file.is_dir() else "file",
            "size": file.stat().st_size,
        }

    def send_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def send(self, file: Path, sha: str) -> None:
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", "no such file", X_Repo_Commit=sha)
        body = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X_Repo_Commit": sha,
            "Accept_Ranges": "bytes",
        }
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
            return self.reply(
                206,
                body[first : last + 1],
                Content_Range=f"bytes {first}-{last}/{len(body)}",
                **headers,
            )
        return self.reply(200, body, **headers)


class FakeHub(ThreadingHTTPServer):
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
