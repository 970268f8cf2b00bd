"""Uploads by the Hub's own client, to a stand-in for the Hub."""

import hashlib
import itertools
import json
import math
import re
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import PAIRS, Patch, Run, in_words
from tables import rows_of

USER, LARGE = "ada", 10_000_000  # bytes; like the Hub, it also takes for large what is no text
ROUTE = r"/(?:api/)?(?:(model|space)s/)?(\w+/\w+)(?:\.git/info/lfs/objects)?(?:/(\w+))?(?:/main)?"  # kind, name, step
Reply = tuple[Any, ...]  # status, content, maybe headers
TOKEN = "hf_nobodyMayEverReadThis"
PICTURES_OF_ROWS = {"training_visuals/answers.png", "training_visuals/exam.png"}
PRIVATE = {"answers.xlsx", "exam.json", "sample_rows.json", "base_model_folder.txt"} | PICTURES_OF_ROWS
HIDDEN = (".env", ".cache/note.txt", "training_visuals/.DS_Store", "weights.9.partial")
PLACE = ("model", "ada/mine")
Upload = Callable[..., tuple[int, str]]


def repository(private: bool, sdk: str | None = None, **files: bytes) -> SimpleNamespace:
    return SimpleNamespace(private=private, sdk=sdk, files=files, commits=0)


class Hub(ThreadingHTTPServer):
    """As much of its HTTP API as an upload asks for: repositories in memory, which one token opens."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address, self.token = f"http://127.0.0.1:{self.server_port}", token
        self.repositories: dict[tuple[str, str], Any] = {}  # by kind and owner/name
        self.objects: dict[str, bytes] = {}  # the large files that have arrived, by sha256
        self.seen: list[str] = []  # paths that were asked for
        self.sent: list[str] = []  # sha256 of large files, whether they arrived or not
        self.numbers, self.breaks_after = itertools.count(1), math.inf  # files, before connections break
        self.commit_fault: tuple[int, str] | None = None  # status and message, set from outside
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


def refusal(status: int, message: str, code: str = "", **more: str) -> Reply:
    return status, {"error": message, **more}, {"X-Error-Message": message, "X-Error-Code": code}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        content, path = self.rfile.read(int(self.headers.get("Content-Length", 0))), urlsplit(self.path).path
        self.server.seen.append(path)
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(*refusal(401, "Invalid credentials in Authorization header"))
        else:
            self.answer(*self.reply(path, [json.loads(line) for line in content.splitlines()]))

    do_POST = do_GET  # noqa: N815

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        own = {"Content-Type": "application/json", "Content-Length": f"{len(body)}", "X-Request-Id": f"Root=1-{0:060}"}
        for name, value in (own | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reply(self, path: str, asked: list[Any]) -> Reply:
        if path in ("/api/repos/create", "/api/validate-yaml"):
            return self.create(**asked[0]) if path.endswith("create") else self.validate(**asked[0])
        kind, name, step = found.groups() if (found := re.fullmatch(ROUTE, path)) else ("", "", "")
        place = self.server.repositories.get((kind or "model", name))
        if not place:
            return refusal(404, "Repository not found", "RepoNotFound")
        if step == "commit":
            return self.commit(place, asked)
        told: dict[str, Any] = {"id": name, "private": place.private, "sdk": place.sdk, "sha": "0" * 40}
        if step == "preupload":
            told = {"files": [self.mode(place.files.get(file["path"]), **file) for file in asked[0]["files"]]}
        elif step == "batch":
            told = {"transfer": "basic", "objects": [self.actions(path, one) for one in asked[0]["objects"]]}
        elif step == "verify":
            assert len(self.server.objects[asked[0]["oid"]]) == asked[0]["size"]
        return 200, told

    def create(self, name: str, organization: str | None, type: str = "model", **asked: Any) -> Reply:
        whole = f"{organization or USER}/{name}"
        url = f"{self.server.address}/{'' if type == 'model' else type + 's/'}{whole}"
        if organization not in (None, USER):
            return refusal(403, f'You don\'t have the rights to create a {type} under the namespace "{organization}"')
        if (type, whole) in self.server.repositories:
            return refusal(409, f"You already created this {type} repo", url=url)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[type, whole] = repository(private, asked.get("sdk"))
        return 200, {"url": url, "name": whole}

    def validate(self, content: str, **_: str) -> Reply:
        try:
            yaml.safe_load(content.split("---\n")[1])
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def mode(self, there: bytes | None, path: str, size: int, sample: str) -> dict[str, Any]:
        """With the name of what is there already: git's own, or of a large file its sha256."""
        oid = None if there is None else hashlib.sha256(there).hexdigest()
        if oid and oid not in self.server.objects:
            oid = hashlib.sha1(b"blob %d\0%b" % (len(there), there)).hexdigest()
        large = size > LARGE or b"\0" in b64decode(sample)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def actions(self, path: str, one: dict[str, Any]) -> dict[str, Any]:
        """What is there already needs no action: so an upload goes on where it broke off."""
        if one["oid"] in self.server.objects:
            return one
        places = {"upload": f"/storage/{one['oid']}?signed=yes", "verify": path.replace("batch", "verify")}
        return one | {"actions": {name: {"href": self.server.address + place} for name, place in places.items()}}

    def do_PUT(self) -> None:
        """To the storage behind the Hub, which trusts the signed address and sees no token."""
        length, oid = int(self.headers["Content-Length"]), urlsplit(self.path).path.split("/")[-1]
        self.server.sent.append(oid)
        broken = next(self.server.numbers) > self.server.breaks_after
        content = self.rfile.read(length // 2 if broken else length)
        if broken:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.headers.get("Authorization") or hashlib.sha256(content).hexdigest() != oid:
            self.answer(*refusal(400, "The token was sent to the storage, or the content is another"))
        else:
            self.server.objects[oid] = content
            self.answer(200, {})

    def commit(self, place: Any, lines: list[dict[str, Any]]) -> Reply:
        if self.server.commit_fault:
            return refusal(*self.server.commit_fault)
        small = {one["value"]["path"]: b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"}
        large = [one["value"] for one in lines if one["key"] == "lfsFile"]
        place.files |= small | {one["path"]: self.server.objects[one["oid"]] for one in large}
        place.commits += 1
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/ada/mine/commit/0"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(TOKEN) as server:
        yield server
        server.shutdown()


@pytest.fixture
def upload(hub: Hub, finished: Path, run: Run, patched: Patch) -> Upload:
    """The exit code of an upload, and all that it printed."""
    own = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_TOKEN_PATH": str(finished / "no token")}
    for name, value in (own | {"HF_HUB_DISABLE_XET": True}).items():  # the newer of its two storages
        patched.setattr(f"huggingface_hub.constants.{name}", value)
    patched.setenv("NO_PROXY", "127.0.0.1")
    patched.setattr(time, "sleep", lambda _: None)  # the client waits before it tries again

    def upload(
        flags: str = "--hub-repo mine", token: str = TOKEN, agreed: tuple[str, ...] = ("--yes",)
    ) -> tuple[int, str]:
        patched.setenv("HF_TOKEN", token)
        code, printed = run("export", "--to", "hub", *agreed, *flags.split())
        assert not token or token not in printed
        assert not [path for path in finished.rglob("*.log") if TOKEN in path.read_text()]
        assert ("Traceback" in printed, printed.count("Stopped  ")) == (False, code != 0)
        return code, in_words(printed)

    return upload


def shown_to_others() -> dict[str, bytes]:
    paths = (path for path in Path("model").rglob("*") if path.is_file() and not path.is_symlink())
    found = {str(path.relative_to("model")): path for path in paths}
    return {name: path.read_bytes() for name, path in found.items() if name not in (*PRIVATE, *HIDDEN)}


@pytest.mark.parametrize("name", ["mine", "ada/mine"])
def test_a_model_arrives_without_what_is_private(name: str, hub: Hub, upload: Upload, tuned_run: Path) -> None:
    assert all(Path("model", name).is_file() for name in PRIVATE)
    for hidden in HIDDEN:
        Path("model", hidden).parent.mkdir(exist_ok=True)
        Path("model", hidden).write_text("nobody else's business")
    Path("model/passwd").symlink_to("/etc/passwd")
    Path("model-hub").mkdir()  # it has nothing to do with an upload
    code, printed = upload(f"--hub-repo {name}")
    assert code == 0, printed
    assert re.search(f"ada/mine, private.*{hub.address}/ada/mine", printed)
    found = hub.repositories[PLACE]
    assert found.files == shown_to_others()
    assert {"adapter_model.safetensors", "run.json", "README.md"} <= set(found.files)
    assert Path("model/adapter_model.safetensors").read_bytes() in hub.objects.values()
    assert (found.private, found.commits) == (True, 1)
    for told in (str(tuned_run), *(answer for _, answer in PAIRS)):
        assert not [path for path, it in found.files.items() if told.encode() in it]
    front = yaml.safe_load(found.files["README.md"].decode().split("---\n")[1])
    assert front["library_name"] == "peft"
    assert "base_model" not in front  # it is in a folder, not on the Hub


@pytest.mark.parametrize("there, flags, ends", rows_of("visibility"))
def test_only_what_is_said_to_be_public_can_be_seen(
    there: str, flags: str, ends: str, hub: Hub, upload: Upload
) -> None:
    earlier = {"README.md": b"mine", "notes.txt": b"also mine"} if there else {}
    if earlier:
        hub.repositories[PLACE] = repository(there == "private", **earlier)
    code, printed = upload(f"--hub-repo mine {flags}")
    found = hub.repositories[PLACE]
    assert code == (0 if ends else 2), printed
    assert re.search(f"ada/mine, {ends}" if ends else "ada/mine .*--no-hub-private", printed)
    assert found.private == (ends == "private")
    assert found.files == earlier | (shown_to_others() if ends else {})
    assert ends or not hub.sent


def test_the_same_model_again_changes_nothing(hub: Hub, upload: Upload) -> None:
    assert upload()[0] == upload()[0] == 0
    assert (len(hub.sent), hub.repositories[PLACE].commits) == (len(hub.objects), 1)
    Path("model/README.md").write_text("---\nlibrary_name: peft\n---\n")
    assert upload()[0] == 0
    assert len(hub.sent) == len(hub.objects)
    assert hub.repositories[PLACE].files == shown_to_others()


def test_a_space_goes_to_a_space(hub: Hub, upload: Upload) -> None:
    record = json.loads(Path("model/run.json").read_text())
    Path("model/run.json").write_text(json.dumps(record | {"export": "space"}))
    Path("model/mine-q8_0.gguf").write_bytes(b"GGUF\0" + bytes(1000))
    code, printed = upload("--hub-repo ask")
    assert code == 0, printed
    assert f"{hub.address}/spaces/ada/ask" in printed
    [(where, space)] = hub.repositories.items()
    assert (*where, space.sdk, space.private) == ("space", "ada/ask", "gradio", True)
    assert space.files == shown_to_others()


def test_what_had_arrived_before_the_connection_broke_is_not_sent_again(hub: Hub, upload: Upload) -> None:
    hub.breaks_after = 2
    assert upload()[0] == 2
    found, arrived = hub.repositories[PLACE], set(hub.objects)
    assert (found.files, found.commits, len(arrived)) == ({}, 0, 2)
    hub.breaks_after, hub.sent = math.inf, []
    code, printed = upload()
    assert code == 0, printed
    assert found.files == shown_to_others()
    assert set(hub.sent) == set(hub.objects) - arrived


@pytest.mark.parametrize("status, message", rows_of("refused_commits"))
def test_a_commit_that_is_refused_leaves_nothing_half(status: str, message: str, hub: Hub, upload: Upload) -> None:
    hub.commit_fault = int(status), message.replace("TOKEN", TOKEN)
    code, printed = upload()
    assert code == 2 and message.replace("TOKEN", "…") in printed
    assert hub.repositories[PLACE].files == {}
    hub.commit_fault, sent = None, len(hub.sent)
    assert upload()[0] == 0
    assert (hub.repositories[PLACE].files, len(hub.sent)) == (shown_to_others(), sent)


@pytest.mark.parametrize("flags, told, token", rows_of("refused_uploads"))
def test_what_cannot_be_uploaded_is_one_message(flags: str, told: str, token: str, hub: Hub, upload: Upload) -> None:
    code, printed = upload(flags, token.replace("TOKEN", TOKEN).replace("VT", "\v"))
    assert code == 2 and re.search(told, printed)
    assert not hub.repositories


@pytest.mark.parametrize("name, value", [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)])
def test_a_hub_out_of_reach_is_one_message(name: str, value: object, hub: Hub, upload: Upload, patched: Patch) -> None:
    patched.setattr(f"huggingface_hub.constants.{name}", value)
    assert upload()[0] == 2
    assert hub.seen == []


def test_a_card_that_cannot_be_read_is_said_before_anything_is_sent(hub: Hub, upload: Upload) -> None:
    Path("model/README.md").write_text("---\ntitle: a: b\n---\n")
    code, printed = upload()
    assert (code, hub.sent, "README.md" in printed) == (2, [], True)


@pytest.mark.parametrize("reply", [None, "", "n", "y"])
def test_nothing_leaves_before_it_was_listed_and_agreed_to(
    reply: str | None, hub: Hub, upload: Upload, patched: Patch
) -> None:
    asked = iter([reply or ""])
    patched.setattr("sys.stdin", SimpleNamespace(isatty=lambda: reply is not None, readline=lambda: next(asked) + "\n"))
    patched.setattr("builtins.input", lambda _: next(asked))
    code, printed = upload(agreed=())
    assert (code, bool(hub.repositories)) == ((0, True) if reply == "y" else (2, False))
    assert "MB adapter_model.safetensors" in printed and "answers.xlsx" not in printed
    assert code == 0 or "--yes" in printed
