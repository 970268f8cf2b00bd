"""Files that lie elsewhere, fetched from servers on loopback: links, a real S3 server, the Hub."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from conftest import PAIRS, Patch, Run, in_words
from hypothesis import given, settings
from hypothesis import strategies as st
from seams import ROOT, Config, UserError, find_pairs
from tables import HEADER, cases, csv_file, jsonl, parquet, records, rows_of, texts

CSV, ONE = csv_file([HEADER, *PAIRS]), b"question,answer\nWhy?,So.\n"
KEYS = {"AWS_ACCESS_KEY_ID": "an-access-key-id", "AWS_SECRET_ACCESS_KEY": "a-secret-access-key"}
OBJECT, Answer = "s3://data/a.csv", tuple[int, dict[str, str], bytes]
NO_MODEL = ("--model-name", "nobody/nothing")  # a check without a tokenizer: a third of a second


def read(place: object) -> list[tuple[str, ...]]:
    return texts(find_pairs(Config(DATASET_PATH=str(place))))


def refused(place: object) -> str:
    with pytest.raises(UserError) as error:
        read(place)
    return in_words(str(error.value))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# A server for all: files under /web, the Hub under /datasets, all else from a real S3 server.
class Net(ThreadingHTTPServer):
    daemon_threads, behind, bucket = True, "", Path()  # the S3 server's address, and the folder of its bucket
    cache, pauses, faults = Path(), [0.0], [""]  # fetched files; pauses between tries; what each request suffers
    headers, etags, seen = {"Content-Type": "text/csv"}, True, 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.link = f"{self.address}/web/a.csv"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def kept(self) -> list[Path]:
        return [path for path in self.cache.rglob("*") if path.is_file()]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Net

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        net, fault = self.server, ""
        net.seen += 1
        if net.faults and (self.command == "GET" or net.faults[0] != "cut"):  # which needs a body
            fault = net.faults.pop(0)
        status, headers, body = (int(fault), {}, b"") if fault.isdigit() else self.answer(self.path.partition("?")[0])
        body = body * 600_000 if fault == "endless" else body
        if fault in ("chunked", "endless"):
            headers, body = headers | {"Transfer-Encoding": "chunked"}, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            headers = {"Content-Length": str(len(body))} | headers
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # who has seen enough hangs up
            self.wfile.write(b"" if self.command == "HEAD" else body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection |= fault == "cut"

    do_HEAD = do_GET  # noqa: N815

    def answer(self, path: str) -> Answer:
        net = self.server
        if path.startswith("/web/"):
            content = (net.bucket / "a.csv").read_bytes()
            tag = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
            return 200, net.headers | (tag if net.etags else {}), content
        if path.startswith(("/datasets/", "/api/")):
            return of_the_hub(path)
        request = urllib.request.Request(net.behind + self.path, None, dict(self.headers), method=self.command)
        try:
            answer: Any = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        own = ("connection", "date", "server", "transfer-encoding")
        return answer.status, {k: v for k, v in answer.headers.items() if k.lower() not in own}, answer.read()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    root, port, keys = tmp_path_factory.mktemp("buckets"), free_port(), ",".join(KEYS.values())
    (root / "data").mkdir()
    options = f"--addr 127.0.0.1:{port} --auth-key {keys} --dir-cache-time 0s --config {os.devnull} {root}"
    process = subprocess.Popen([rclone, "serve", "s3", *options.split()], stderr=subprocess.DEVNULL)
    while socket.socket().connect_ex(("127.0.0.1", port)) and process.poll() is None:
        time.sleep(0.05)
    with Net() as net:
        net.behind, net.bucket = f"http://127.0.0.1:{port}", root / "data"
        yield net
        net.shutdown()
    process.terminate()
    process.wait()


@pytest.fixture
def net(servers: Net, folder: Path, monkeypatch: Patch) -> Iterator[Net]:
    """The servers, with one file and nothing wrong, an empty cache, and pauses that take no time."""
    (servers.bucket / "a.csv").write_bytes(CSV)
    servers.cache, servers.pauses, servers.faults = folder / "cache", [], []
    servers.headers, servers.etags = Net.headers, True
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    here = {"S3_ENDPOINT_URL": servers.address, "XDG_CACHE_HOME": str(servers.cache)}
    for name, value in (here | KEYS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", servers.pauses.append)
    yield servers
    for path in servers.bucket.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# fmt: off
PARTS = {"part-1.csv": ONE + b"How?,Thus.\n", "part-2.csv": b"question,answer\nwhy?,so.\nWho?,I.\nWhom?\n"}
SHARDS = {f"{i}.csv": csv_file([HEADER, *PAIRS[6 * i : 6 * i + 6]]) for i in range(4)}
THIRTY, WHY = csv_file([("one", "two"), *((f"Is it {i}?", "It is.") for i in range(30))]), [("Why?", "So.")]
SUMS = [{"instruction": f"Add {i}.", "input": "2", "output": f"{i + 2}, I think."} for i in range(99)]
KINDS = {"sets/a.csv": CSV, "sets/b.jsonl": jsonl(*SUMS), "sets/c.parquet": b"rubbish", "sets/notes.txt": b"none"}
CONTENTS = {"PAIRS": CSV, "ONE": ONE, "FOREIGN": b"soru,cevap\nNeden?,Nasil.\n", "THIRTY": THIRTY, "NONE": b"none", "": b""}
SETS = {"SHARDS": SHARDS, "MANY": {f"{i:03}.csv": b"id%d\n1\n" % i for i in range(201)}}
# fmt: on


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.parametrize("place, files, expected", rows_of("places"))
def test_files_are_found_joined_or_chosen(place: str, files: str, expected: str, net: Net) -> None:
    (net.bucket / "a.csv").unlink()
    for name, _, content in (one.partition(" = ") for one in filter(None, files.split("; "))):
        put(net.bucket if place.startswith("s3:") else Path.cwd(), SETS.get(name) or {name: CONTENTS[content]})
    if expected in ("PAIRS", "WHY"):
        assert sorted(read(place)) == sorted({"PAIRS": PAIRS, "WHY": WHY}[expected])
    else:
        assert re.search(expected, refused(place))
    assert net.pauses == []


def test_files_are_joined_and_a_row_is_named_with_its_file(folder: Path) -> None:
    put(folder, PARTS | {"other.csv": b"id\n1\n"})
    found = find_pairs(Config(DATASET_PATH="part-*.csv"))
    assert {(note.sheet, note.row) for note in found.dropped} == {("part-2.csv", 4), ("part-2.csv", 2)}
    assert re.search(r"row 2\b.*part-1\.csv", found.dropped[1].reason)
    assert (texts(found), found.rows_read) == ([*WHY, ("How?", "Thus."), ("Who?", "I.")], 5)


def test_alpaca_is_taken_and_the_others_named(net: Net, capsys: Any) -> None:
    put(net.bucket, KINDS)
    for place in ("s3://data/sets/", "s3://data/sets", "s3://data/", "s3://data"):
        assert read(place)[0] == ("Add 0.\n\n2", "2, I think.")
        printed = capsys.readouterr().out
        assert [name in printed for name in ("a.csv", "b.jsonl", "c.parquet", "notes")] == [True, True, True, False]


def test_check_as_json_names_the_files_that_are_not_used(net: Net, run: Run) -> None:
    put(net.bucket, KINDS)
    _, printed = run("check", "--json", *NO_MODEL, "--dataset-path", "s3://data/sets/")
    assert "a.csv" in next(line for line in printed.splitlines() if line.startswith("{"))


@pytest.mark.parametrize("case", cases("fetches").values())
def test_a_file_comes_whole_or_not_at_all(case: str, net: Net) -> None:
    place, faults, header, refusal, pauses = ("" if part == "-" else part for part in case.split(" | ")[1:])
    place = {"link": net.link, "nobody": f"http://127.0.0.1:{free_port()}/a.csv"}.get(place, place)
    net.headers = dict([json.loads(f'"{header}"').split(": ")]) if header else {}
    net.faults = faults.removeprefix("always ").split() * (99 if "always" in faults else 1)
    if refusal:
        assert re.search(refusal, refused(place))
        assert not net.kept()
    else:
        assert read(place) == PAIRS
        [copy] = net.kept()
        assert copy.parent.parent == net.cache / "finetune_colab/data" and copy.name.isprintable()
    assert pauses in ("?", str(len(net.pauses)))
    assert net.pauses == sorted(set(net.pauses))  # they grow


@pytest.mark.parametrize("name", ["link", OBJECT])
def test_a_file_is_fetched_again_only_when_it_changed(name: str, net: Net) -> None:
    place, file = net.link if name == "link" else name, net.bucket / "a.csv"
    assert read(place) == PAIRS
    net.faults, net.seen = ["cut"], 0  # no body is read
    assert (read(place), net.seen) == (PAIRS, 1)
    net.faults = []
    net.kept()[0].write_bytes(CSV[:-5])  # a damaged copy
    assert read(place) == PAIRS
    file.write_bytes(ONE)
    assert read(place) == WHY
    net.etags = False
    for content in (CSV, CSV.replace(b"plus", b"and ")):
        file.write_bytes(content)
        assert read(place)[0][0] == content.decode().split("\n")[1].split(",")[0]


def test_a_download_that_is_interrupted_leaves_nothing(net: Net, patched: Patch) -> None:
    patched.setattr(time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    net.faults = ["cut"]
    with pytest.raises(KeyboardInterrupt):
        read(net.link)
    assert not net.kept()


def test_keys_in_a_link_are_never_shown_nor_written_down(net: Net, run: Run) -> None:  # V8
    link = net.link + "?token=geheim&X-Amz-Signature=geheim"
    for faults, status in ([], 0), (["500"] * 5, 1), (["403"], 1):
        net.faults = faults
        code, printed = run("check", "--json", *NO_MODEL, "--dataset-path", link)
        assert (code, "geheim" in printed, "127.0.0.1" in printed) == (status, False, True)
    book = openpyxl.load_workbook("dataset_report.xlsx")
    cells = str([row for sheet in book for row in sheet.values])
    assert ("127.0.0.1" in cells, "geheim" in cells) == (True, False)


def test_a_wrong_key_is_said_at_once_and_a_file_may_hold_the_right_one(net: Net, run: Run, patched: Patch) -> None:
    lines = ["# mine", 'export AWS_ACCESS_KEY_ID="{}"', "AWS_SECRET_ACCESS_KEY = {}", "S3_ENDPOINT_URL='{}'"]
    Path(".env").write_text("\n".join(lines).format(*KEYS.values(), net.address))
    patched.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")  # the environment wins
    for place in (OBJECT, "s3://data/"):
        code, printed = run("check", *NO_MODEL, "--dataset-path", place)
        assert code == 1 and re.search(r"403.*AWS_ACCESS_KEY_ID", in_words(printed))
        assert not re.search("wrong-secret|an-access-key", printed)
    assert net.pauses == []
    patched.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    for name in (*KEYS, "S3_ENDPOINT_URL"):
        patched.delenv(name)
    assert read(OBJECT) == PAIRS


def wire(patch: Patch) -> list[str]:
    """Every address that leaves this computer; each is answered with 404."""

    def answer(_: object, request: Any, *__: Any, **___: Any) -> None:
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.HTTPError(asked[-1], 404, "nothing", {}, None)  # type: ignore[arg-type]

    asked: list[str] = []
    patch.setattr(urllib.request.OpenerDirector, "open", answer)
    return asked


@settings(max_examples=30, deadline=None)
@given(*[st.text(min_size=4).map(lambda text: urllib.request.quote("§" + text, safe=""))] * 2)
def test_no_part_of_a_link_but_its_place_is_shown(user: str, query: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked = wire(patch)
        for link in (f"https://example.org/a.csv?{query}#{query}", f"https://{user}@example.org/a"):
            message = refused(link)
            assert "example.org/a" in message
            assert not re.search(f"{re.escape(user)}|{re.escape(query)}", message)
        assert len(asked) == 1  # a password is not sent


@pytest.mark.parametrize("case", cases("links"))
def test_a_link_as_people_copy_it_leads_to_the_file(case: str, patched: Patch) -> None:
    (link, file), asked = case.split(" -> "), wire(patched)
    assert "404" in refused(link)
    assert asked == [file]


def test_an_address_of_no_server_is_named(net: Net, patched: Patch) -> None:
    patched.setenv("S3_ENDPOINT_URL", net.behind)
    assert read(OBJECT) == PAIRS  # with nobody between
    patched.setenv("S3_ENDPOINT_URL", "not an address")
    assert "S3_ENDPOINT_URL" in refused(OBJECT)
    assert net.pauses == []


HUB = {place: re.split(" (->|!!) ", case.split(" | ")[1]) for place, case in cases("hub").items()}
FILES = {place.split(":")[1]: files.split() for place, (files, *_) in HUB.items()}
READER = """
import json, sys
from seams import Config, UserError, find_pairs
for place in sys.argv[1:]:
    try:
        result = ["", [pair.question for pair in find_pairs(Config(DATASET_PATH=place)).kept]]
    except UserError as error:
        result = [str(error), []]
    print(json.dumps([place, *result]))
"""


def files_of(place: str) -> dict[str, bytes]:
    """The files of a data set; where they are CONFIGURATION/SPLIT/0000.parquet, its README says so."""
    names = [one if "." in one else f"{one}.parquet" for one in FILES[place]]
    parts = sorted({tuple(one.split("/")[:2]) for one in names if one.count("/") == 2})
    card: dict[str, list[Any]] = {"configs": [], "dataset_info": [{"config_name": "huge", "download_size": 10**12}]}
    for config in dict(parts):
        own = [{"split": one.removeprefix("partial-"), "path": f"{c}/{one}/*"} for c, one in parts if c == config]
        card["configs"].append({"config_name": config, "data_files": own})
    texts = [[(f"Is it {one.removesuffix('.parquet')}?", "It is.")] for one in names]
    content = [parquet(records(rows)) if parts else csv_file([HEADER, *rows]) for rows in texts]
    readme = {"README.md": f"---\n{json.dumps(card)}\n---\n".encode()} if parts else {}
    return dict(zip(names, content, strict=True)) | readme


def of_the_hub(path: str) -> Answer:
    """As much of the Hub as a data set needs: its commit, its folders, and each file."""
    match = re.fullmatch(r"/(?:api/)?datasets/(o/\w+)(?:/(tree|resolve|revision)/[^/]+/?(.*))?", path)
    if not match:
        return 401, {"X-Error-Code": "RepoNotFound"}, b""
    place, kind, name = (urllib.request.unquote(part or "") for part in match.groups())
    files, commit = files_of(place), {"X-Repo-Commit": "a" * 40}
    if kind == "resolve" and name in files:
        return 200, {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"'} | commit, files[name]
    if kind not in ("tree", "resolve"):
        return 200, {}, json.dumps({"id": place, "sha": "a" * 40}).encode()
    folder = f"{name}/" if name else ""
    inside = {folder + one.removeprefix(folder).partition("/")[0] for one in files if one.startswith(folder)}
    if kind == "resolve" or not inside:
        return 404, {"X-Error-Code": "EntryNotFound"} | commit, b""
    kinds = {one: "file" if one in files else "directory" for one in sorted(inside)}
    return 200, {}, json.dumps([{"path": one, "type": kinds[one], "size": 1, "oid": "b"} for one in kinds]).encode()


@pytest.fixture(scope="session")
def hub(servers: Net, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """What a fresh process reads at each place: the Hub's client takes its address on import."""
    here = {"HF_ENDPOINT": servers.address, "HF_HOME": str(tmp_path_factory.mktemp("hub")), "HF_HUB_DISABLE_XET": "1"}
    here |= {"HF_HUB_OFFLINE": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    servers.faults = ["503", "429"]
    command = [sys.executable, "-c", READER, *HUB]
    done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {place: (in_words(said), found) for place, said, found in lines}


@pytest.mark.parametrize("place", HUB)
def test_which_part_of_a_data_set_of_the_hub_is_meant(place: str, hub: dict[str, tuple[str, Any]]) -> None:
    (_, kind, expected), (said, found) = HUB[place], hub[place]
    assert re.search(expected, said) if kind == "!!" else found == [f"Is it {one}?" for one in expected.split()]
