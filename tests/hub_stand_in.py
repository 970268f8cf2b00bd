"""A stand-in for the Hugging Face Hub: as much of its HTTP API as an upload asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml

LARGE = 10_000_000  # bytes; like the Hub, it also takes what is no text for large


@dataclass
class Repository:
    private: bool
    sdk: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their first lines

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class HubStandIn(ThreadingHTTPServer):
    """Repositories in memory, which one token opens; what goes wrong is set from outside."""

    daemon_threads = True

    def __init__(self, token: str, user: str = "ada") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.token, self.user = token, user
        self.repositories: dict[tuple[str, str], Repository] = {}  # by kind and owner/name
        self.objects: dict[str, bytes] = {}  # the large files that have arrived, by sha256
        self.seen: list[str] = []  # such as "POST /api/repos/create"
        self.bytes_put = 0
        self.puts = 0
        self.breaks_after: int | None = None  # so many PUTs go well, then connections break
        self.commit_fault: tuple[int, str] | None = None  # status and message
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()

    def oid(self, content: bytes) -> str:
        """The name of a content: git's own, or of a large file its sha256."""
        large = hashlib.sha256(content).hexdigest()
        header = f"blob {len(content)}\0".encode()
        return large if large in self.objects else hashlib.sha1(header + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {urlsplit(self.path).path}"
        self.server.seen.append(request)
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.refuse(401, "Invalid credentials in Authorization header")
            return
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, request):
                self.find_repository(found.groupdict())
                if "name" in found.groupdict() and not self.repository:
                    self.refuse(404, "Repository not found", "RepoNotFound")
                else:
                    getattr(self, method)()
                return
        self.refuse(404, "Sorry, we can't find the page you are looking for.")

    def find_repository(self, named: dict[str, str | None]) -> None:
        self.kind, self.name = named.get("kind") or "model", named.get("name") or ""
        self.repository: Any = self.server.repositories.get((self.kind, self.name))

    def answer(self, status: int, content: object, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("X-Request-Id", "Root=1-6891d8a5-3b0c7c8c4d5a6b7c8d9e0f1a;" + "0" * 36)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer(status, {"error": message}, **headers)

    # -- Who and where

    def whoami(self) -> None:
        self.answer(200, {"type": "user", "name": self.server.user, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.server.user
        kind, name = asked.get("type") or "model", f"{owner}/{asked['name']}"
        url = f"{self.server.address}/{'' if kind == 'model' else kind + 's/'}{name}"
        if owner != self.server.user:
            why = f"You don't have the rights to create a {kind} under the namespace"
            self.refuse(403, f'{why} "{owner}"')
        elif (kind, name) in self.server.repositories:
            self.answer(409, {"error": f"You already created this {kind} repo", "url": url})
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories[kind, name] = Repository(private, asked.get("sdk"))
            self.answer(200, {"url": url, "name": name})

    def info(self) -> None:
        siblings = [{"rfilename": path} for path in self.repository.files]
        told = {"id": self.name, "private": self.repository.private, "sha": self.repository.sha}
        self.answer(200, told | {"sdk": self.repository.sdk, "tags": [], "siblings": siblings})

    def tree(self) -> None:
        listed = []
        for path, content in self.repository.files.items():
            oid = self.server.oid(content)
            lfs = {"oid": oid, "size": len(content), "pointerSize": 134}
            one = {"type": "file", "path": path, "oid": oid, "size": len(content)}
            listed.append(one | ({"lfs": lfs} if oid in self.server.objects else {}))
        self.answer(200, listed)

    # -- An upload, in the order of its steps

    def validate(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            said = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
            return
        missing = {"message": "empty or missing yaml metadata in repo card"}
        self.answer(200, {"errors": [], "warnings": [] if isinstance(said, dict) else [missing]})

    def preupload(self) -> None:
        told = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] > LARGE or b"\0" in base64.b64decode(file["sample"])
            there = self.repository.files.get(file["path"])
            oid = None if there is None else self.server.oid(there)
            mode = "lfs" if large else "regular"
            told.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.answer(200, {"files": told})

    def batch(self) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            home = f"{self.server.address}/{'' if self.kind == 'model' else 'spaces/'}{self.name}"
            actions = {
                "upload": {"href": f"{self.server.address}/storage/{one['oid']}?signed=yes"},
                "verify": {"href": f"{home}.git/info/lfs/objects/verify"},
            }
            # what is there already needs no action: so an upload goes on where it broke off
            objects.append(one if one["oid"] in self.server.objects else one | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        """To the storage behind the Hub, which trusts the signed address and sees no token."""
        length, oid = int(self.headers["Content-Length"]), urlsplit(self.path).path.split("/")[-1]
        with self.server.lock:
            self.server.seen.append(f"PUT {oid}")
            self.server.puts += 1
            breaks = self.server.breaks_after
            broken = breaks is not None and self.server.puts > breaks
        content = self.rfile.read(length // 2 if broken else length)
        if broken:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.headers.get("Authorization") or hashlib.sha256(content).hexdigest() != oid:
            self.refuse(400, "The token was sent to the storage, or the content is another")
        else:
            with self.server.lock:
                self.server.objects[oid] = content
                self.server.bytes_put += length
            self.answer(200, {})

    def verify(self) -> None:
        asked = json.loads(self.body)
        found = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
        self.answer(200 if found else 404, {})

    def commit(self) -> None:
        if self.server.commit_fault:
            self.refuse(*self.server.commit_fault)
            return
        files, summary = dict(self.repository.files), ""
        for line in self.body.splitlines():
            key, value = (part := json.loads(line))["key"], part["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.server.objects:
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                self.refuse(400, f"{key} of something that does not exist: {value['path']}")
                return
        self.repository.files = files
        self.repository.commits.append(summary)
        url = f"{self.server.address}/{self.name}/commit/{self.repository.sha}"
        self.answer(200, {"success": True, "commitOid": self.repository.sha, "commitUrl": url})


API = "/api/(?P<kind>model|space)s/(?P<name>[^/]+/[^/]+)"
LFS = r"/(?:(?P<kind>space)s/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects"
ROUTES = {
    "GET /api/whoami-v2": "whoami",
    "POST /api/repos/create": "create",
    "POST /api/validate-yaml": "validate",
    f"GET {API}(/revision/main)?": "info",
    f"GET {API}/tree/main": "tree",
    f"POST {API}/preupload/main": "preupload",
    f"POST {API}/commit/main": "commit",
    f"POST {LFS}/batch": "batch",
    f"POST {LFS}/verify": "verify",
}
