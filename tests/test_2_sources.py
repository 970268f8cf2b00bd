"""Section 2: files that lie elsewhere, fetched from servers which the tests start themselves."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import PAIRS, ROOT, in_words, write_workbook
from hypothesis import given
from hypothesis import strategies as st

import finetune_colab as ft

CSV = b"question,answer\n" + b"".join(f"{q},{a}\n".encode() for q, a in PAIRS)
KEY, SECRET = "an-access-key-id", "a-secret-access-key"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL", "S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    return cache


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(ft.time, "sleep", taken.append)
    return taken


def pairs_at(place: object, **changes: Any) -> list[tuple[str, str]]:
    found = ft.find_pairs(ft.Config(DATASET_PATH=str(place), **changes))
    return [(pair.question, pair.answer) for pair in found.kept]


def refusal(place: object) -> str:
    with pytest.raises(ft.UserError) as refused:
        pairs_at(place)
    return in_words(str(refused.value))


class Loopback(ThreadingHTTPServer):
    """A server on loopback, with a list of what goes wrong, a request each."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[str] = []
        self.seen: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()


# -- Several files


def test_files_that_match_are_parts_of_one_data_set(folder: Path, capsys: Any) -> None:
    (folder / "part-1.csv").write_text("question,answer\nWhy?,So.\nHow?,Thus.\n")
    (folder / "part-2.csv").write_text("question,answer\nwhy?,so.\nWho?,I.\nWhom?\n")
    (folder / "other.csv").write_text("id\n1\n")
    found = ft.find_pairs(ft.Config(DATASET_PATH="part-*.csv"))
    assert [pair.question for pair in found.kept] == ["Why?", "How?", "Who?"]
    assert found.dropped == [
        ft.Note("part-2.csv", 4, "no answer"),
        ft.Note("part-2.csv", 2, "a copy of row 2 of part-1.csv"),
    ]
    assert found.rows_read == 5
    ft.say_pairs(found)
    assert "part-*.csv (2 files): 5 rows, 3 pairs" in capsys.readouterr().out


def test_one_match_is_like_its_name(folder: Path) -> None:
    write_workbook(folder / "my pairs.xlsx", [("question", "answer"), *PAIRS])
    assert pairs_at("my*.xlsx") == pairs_at(folder / "m?[x ]pairs*") == pairs_at("my pairs.xlsx")


def test_a_name_with_brackets_is_a_name(folder: Path) -> None:
    (folder / "data[1].csv").write_bytes(CSV)
    (folder / "data1.csv").write_text("question,answer\nWhy?,So.\n")
    assert pairs_at("data[1].csv") == PAIRS


def test_reports_and_locks_match_nothing(folder: Path) -> None:
    (folder / "~$a.csv").touch()
    for name in (f"{ft.REPORT_NAME}.xlsx", f"{ft.REPORT_NAME}-2.xlsx", ".~lock.a.ods#"):
        (folder / name).touch()
    assert "No file matches *" in refusal("*")
    (folder / f"{ft.REPORT_NAME}_2025.csv").write_text("question,answer\nWhy?,So.\n")
    assert pairs_at("*") == [("Why?", "So.")]
    (folder / f"{ft.REPORT_NAME}_2025.csv").unlink()
    (folder / "a.csv").write_bytes(CSV)
    assert pairs_at("*") == PAIRS


def test_files_of_different_kinds_are_not_joined(folder: Path) -> None:
    (folder / "a.csv").write_bytes(CSV)
    (folder / "b.csv").write_text("soru,cevap\nNeden?,Öyle.\n")
    message = refusal("*.csv")
    assert 'a.csv has questions in "question"' in message
    assert 'b.csv questions in "soru"' in message


# -- Links


class Site(Loopback):
    """A file server."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.files: dict[str, bytes] = {"/pairs.csv": CSV}
        self.headers: dict[str, str] = {}
        self.etags = True

    def link(self, path: str = "/pairs.csv") -> str:
        return self.address + path


class Handler(Quiet):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        site.seen.append(self.path)
        fault = site.faults.pop(0) if site.faults else ""
        content = site.files.get(self.path.partition("?")[0])
        if fault.isdigit() or content is None:
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        self.send_response(200)
        if site.etags:
            self.send_header("ETag", tag)
        site.headers.setdefault("Content-Type", "text/csv")
        for name, value in site.headers.items():
            self.send_header(name, value)
        body = content
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault == "cut"


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        yield server


def test_a_link_is_fetched_and_fetched_again_only_when_it_changed(site: Site) -> None:
    assert pairs_at(site.link()) == PAIRS
    site.faults = ["", "cut"]  # only what is read of a body can be cut
    assert pairs_at(site.link()) == PAIRS
    site.faults = []
    site.files["/pairs.csv"] = b"question,answer\nWhy?,So.\n"
    assert pairs_at(site.link()) == [("Why?", "So.")]
    assert len(site.seen) == 3


def test_a_server_without_versions_is_asked_for_the_whole_again(site: Site) -> None:
    site.etags = False
    assert pairs_at(site.link()) == PAIRS
    site.files["/pairs.csv"] = CSV.replace(b"plus", b"and ")
    assert pairs_at(site.link())[0][0] == "What is 2 and  3?"


def test_a_damaged_copy_in_the_cache_is_fetched_anew(site: Site, own_cache: Path) -> None:
    assert pairs_at(site.link()) == PAIRS
    [copy] = own_cache.rglob("pairs.csv")
    copy.write_bytes(CSV[:-5])
    assert pairs_at(site.link()) == PAIRS


def test_a_server_that_fails_twice_is_asked_three_times(site: Site, pauses: list[float]) -> None:
    site.faults = ["503", "429"]
    assert pairs_at(site.link()) == PAIRS
    assert pauses == [1, 2]


def test_a_server_that_always_fails_is_asked_five_times(
    site: Site, pauses: list[float], own_cache: Path
) -> None:
    site.faults = ["500"] * 9
    assert "could not be fetched in 5 tries" in refusal(site.link())
    assert pauses == [1, 2, 4, 8]
    assert len(site.seen) == 5
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_nobody_there(pauses: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "Check the address" in refusal(f"http://127.0.0.1:{port}/a.csv")
    assert len(pauses) == 4


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_what_another_try_cannot_mend_is_said_at_once(
    status: str, site: Site, pauses: list[float]
) -> None:
    site.faults = [status]
    assert status in refusal(site.link())
    assert pauses == []


def test_half_a_file_is_thrown_away_and_fetched_again(site: Site, pauses: list[float]) -> None:
    site.faults = ["cut", "cut"]
    assert pairs_at(site.link()) == PAIRS
    assert pauses == [1, 2]


@pytest.mark.parametrize("status", ["204", "206"])
def test_half_an_answer_is_no_file(status: str, site: Site, pauses: list[float]) -> None:
    site.faults = [status]
    assert pairs_at(site.link()) == PAIRS
    assert pauses == [1]


def test_a_file_that_comes_too_slowly_is_given_up(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "LONGEST_DOWNLOAD", -1)
    assert "too slow" in refusal(site.link())


def test_a_checksum_that_the_server_promises_is_kept(site: Site, pauses: list[float]) -> None:
    right = base64.b64encode(hashlib.md5(CSV).digest()).decode()
    for header in ({"Content-MD5": right}, {"x-goog-hash": f"crc32c=AAAAAA==,md5={right}"}):
        site.headers = header
        assert pairs_at(site.link()) == PAIRS
    site.files["/pairs.csv"] = CSV[:-9]
    assert "checksum" in refusal(site.link())
    assert len(pauses) == 4


def test_a_web_page_is_no_data(site: Site) -> None:
    site.headers = {"Content-Type": "text/html; charset=utf-8"}
    assert "is a web page" in refusal(site.link())


@pytest.mark.parametrize("how", ["", "chunked"])
def test_a_file_beyond_the_limit_is_not_fetched(
    how: str, site: Site, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr(ft, "LARGEST_FILE_MB", 1)
    site.files["/pairs.csv"] = b"question,answer\n" + b"a,b\n" * 600_000
    site.faults = [how]
    assert "larger than 1 MB" in refusal(site.link())
    assert not list(own_cache.rglob("*.partial"))


def test_a_body_in_chunks_has_no_length_and_is_read(site: Site) -> None:
    site.faults = ["chunked"]
    assert pairs_at(site.link()) == PAIRS


@pytest.mark.parametrize(
    "name", ["../../evil.csv", "a/b\\c.csv", "\x1b[2J.csv", "", "..", "x" * 300]
)
def test_the_name_that_a_server_gives_leads_nowhere(name: str, site: Site, own_cache: Path) -> None:
    site.headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    assert pairs_at(site.link()) == PAIRS
    [copy] = (path for path in own_cache.rglob("*") if path.is_file())
    assert copy.parent.parent == own_cache / "finetune_colab" / "data"
    assert copy.name.isprintable()


def test_an_interrupted_download_leaves_nothing(
    site: Site, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    site.faults = ["cut"]
    monkeypatch.setattr(ft.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pairs_at(site.link())
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_keys_in_a_link_are_never_shown(
    site: Site, run: Callable[..., tuple[int, str]], folder: Path, pauses: list[float]
) -> None:
    link = site.link("/pairs.csv?token=geheim&X-Amz-Signature=geheim")
    for faults, status in ([], 0), (["500"] * 5, 1), (["403"], 1):
        site.faults = faults
        code, printed = run("check", "--model-name", "demo", "--dataset-path", link)
        assert (code, "geheim" in printed) == (status, False)
        assert "127.0.0.1" in printed or code == 0
    assert "geheim" not in json.dumps(ft.public_settings(ft.Config(DATASET_PATH=link)))
    assert "holds a password" in refusal("https://me:geheim@example.org/a.csv")
    assert "geheim" not in refusal("https://me:geheim@example.org/a.csv")


@given(st.text(min_size=4), st.text(min_size=4))
def test_no_part_of_a_link_but_its_place_is_shown(user: str, query: str) -> None:
    quoted = [urllib.request.quote("§" + part, safe="") for part in (user, query)]
    shown = ft.without_secrets(f"https://{quoted[0]}@example.org/a.csv?{quoted[1]}#{quoted[1]}")
    assert shown == "https://example.org/a.csv"


SHEET = "https://docs.google.com/spreadsheets/d/1AbC_d-9"


@pytest.mark.parametrize(
    ("link", "direct"),
    [
        (f"{SHEET}/edit?usp=sharing", f"{SHEET}/export?format=xlsx"),
        (f"{SHEET}", f"{SHEET}/export?format=xlsx"),
        (f"{SHEET}/edit#gid=42", f"{SHEET}/export?format=csv&gid=42"),
        (f"{SHEET}/edit?gid=0#gid=0", f"{SHEET}/export?format=csv&gid=0"),
        (
            "https://docs.google.com/spreadsheets/d/e/2PACX-1v/pubhtml?gid=0&single=true",
            "https://docs.google.com/spreadsheets/d/e/2PACX-1v/pub?output=xlsx",
        ),
        (
            "https://drive.google.com/file/d/1AbC/view?usp=sharing",
            "https://drive.google.com/uc?export=download&id=1AbC",
        ),
        (
            "https://github.com/owner/repo/blob/main/data/qa.csv",
            "https://raw.githubusercontent.com/owner/repo/main/data/qa.csv",
        ),
        (
            "https://huggingface.co/datasets/o/n/blob/main/a.jsonl",
            "https://huggingface.co/datasets/o/n/resolve/main/a.jsonl",
        ),
        ("https://www.dropbox.com/s/x/a.csv?dl=0", "https://www.dropbox.com/s/x/a.csv?dl=1"),
        (
            "https://docs.google.com/spreadsheets/u/1/d/1AbC/edit?usp=sharing",
            "https://docs.google.com/spreadsheets/d/1AbC/export?format=xlsx",
        ),
        (f"{SHEET}/gviz/tq?tqx=out:csv&sheet=FAQ", f"{SHEET}/gviz/tq?tqx=out:csv&sheet=FAQ"),
        (
            "https://drive.google.com/open?id=1AbC",
            "https://drive.google.com/uc?export=download&id=1AbC",
        ),
        ("https://example.org/a b.csv?x=1&y=%20#top", "https://example.org/a%20b.csv?x=1&y=%20"),
        ("https://example.org/é.csv", "https://example.org/%C3%A9.csv"),
    ],
)
def test_links_as_people_copy_them_lead_to_the_file(link: str, direct: str) -> None:
    assert ft.direct_link(link) == direct


@pytest.mark.parametrize("link", ["https://", "http://[::1", "https://exa mple", "https:///a"])
def test_a_link_that_is_none_is_refused(link: str, pauses: list[float]) -> None:
    assert refusal(link)


# -- Buckets


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A real S3 server on loopback: its address, and the folder that is its bucket "data"."""
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    root = tmp_path_factory.mktemp("buckets")
    (root / "data").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            *(rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}"),
            *("--auth-key", f"{KEY},{SECRET}", "--dir-cache-time", "0s", "--config", os.devnull),
            root,
        ],
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            urllib.request.urlopen(endpoint)
        except urllib.error.HTTPError:
            break
        except OSError:
            time.sleep(0.05)
    yield endpoint, root / "data"
    server.terminate()
    server.wait()


@pytest.fixture
def store(bucket: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the bucket, empty, and its keys in the environment."""
    monkeypatch.setenv("S3_ENDPOINT_URL", bucket[0])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    yield bucket[1]
    for path in bucket[1].iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Faults(Loopback):
    """Stands before the real server and passes on, but for the faults in its list."""

    def __init__(self, behind: str) -> None:
        super().__init__(Passing)
        self.behind = behind


class Passing(Quiet):
    server: Faults

    def do_GET(self) -> None:
        self.server.seen.append(self.command)
        fault = ""
        if self.server.faults and (self.command == "GET" or self.server.faults[0].isdigit()):
            fault = self.server.faults.pop(0)
        if fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        request = urllib.request.Request(
            self.server.behind + self.path, headers=dict(self.headers.items()), method=self.command
        )
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "garbled":
            body = body[::-1]
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault == "cut"


@pytest.fixture
def faulty(
    bucket: tuple[str, Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Faults]:
    with Faults(bucket[0]) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", server.address)
        yield server


ALPACA = [
    {"instruction": f"Add {i}.", "input": "2", "output": f"{i + 2}, I think."} for i in range(9)
]


def test_an_object_is_read(store: Path) -> None:
    (store / "qa").mkdir()
    write_workbook(store / "qa" / "my pairs.xlsx", [("question", "answer"), *PAIRS])
    assert pairs_at("s3://data/qa/my pairs.xlsx") == PAIRS


def test_an_object_is_fetched_again_only_when_it_changed(faulty: Faults, store: Path) -> None:
    (store / "a.csv").write_bytes(CSV)
    assert pairs_at("s3://data/a.csv") == pairs_at("s3://data/a.csv") == PAIRS
    assert faulty.seen == ["HEAD", "GET", "HEAD"]
    (store / "a.csv").write_text("question,answer\nWhy?,So.\n")
    assert pairs_at("s3://data/a.csv") == [("Why?", "So.")]


@pytest.mark.parametrize("place", ["s3://data/sets/", "s3://data/sets", "s3://data/", "s3://data"])
def test_of_a_folder_the_alpaca_file_is_taken_and_the_others_named(
    place: str, store: Path, capsys: Any
) -> None:
    (store / "sets").mkdir()
    (store / "sets" / "a.csv").write_bytes(CSV)
    (store / "sets" / "b.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ALPACA))
    (store / "sets" / "c.parquet").write_bytes(b"PAR1 rubbish")
    (store / "sets" / "notes.txt").write_text("no table")
    assert pairs_at(place)[0] == ("Add 0.\n\n2", "2, I think.")
    printed = in_words(capsys.readouterr().out)
    assert "b.jsonl: it has Alpaca's columns" in printed
    assert 'a.csv: 24 pairs, questions in "question"' in printed
    assert "c.parquet cannot be used" in printed
    assert "notes" not in printed


def test_of_a_folder_without_alpaca_the_surest_is_taken(store: Path) -> None:
    (store / "a.csv").write_text("one,two\n" + "".join(f"Is it {i}?,It is.\n" for i in range(30)))
    (store / "b.csv").write_bytes(CSV)
    assert pairs_at("s3://data/") == PAIRS


def test_a_folder_with_too_many_tables_or_none(store: Path) -> None:
    assert "no table in s3://data/" in refusal("s3://data/")
    for number in range(ft.MOST_CANDIDATES + 1):
        (store / f"{number:02}.csv").write_bytes(CSV)
    assert "holds 21 tables: 00.csv, " in refusal("s3://data/")


@pytest.mark.parametrize(
    "place", ["s3://data/no.csv", "s3://nothing/a.csv", "s3://nothing/", "s3://"]
)
def test_what_is_not_there_is_said_at_once(place: str, store: Path, pauses: list[float]) -> None:
    assert place.rstrip("/") in refusal(place)
    assert pauses == []


def test_a_wrong_key_is_said_at_once_and_not_shown(
    store: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch, run: Any, folder: Path
) -> None:
    (store / "a.csv").write_bytes(CSV)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    for place in ("s3://data/a.csv", "s3://data/"):
        code, printed = run("check", "--model-name", "demo", "--dataset-path", place)
        assert code == 1
        assert "status 403. Check AWS_ACCESS_KEY_ID" in in_words(printed)
        assert "wrong-secret" not in printed
        assert KEY not in printed
    assert pauses == []


def test_keys_may_stand_in_a_file(
    store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "a.csv").write_bytes(CSV)
    lines = ["# my keys", f'export AWS_ACCESS_KEY_ID="{KEY}"', f"AWS_SECRET_ACCESS_KEY = {SECRET}"]
    lines.append(f"S3_ENDPOINT_URL='{os.environ['S3_ENDPOINT_URL']}'")
    (folder / ".env").write_text("\n".join(lines))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "S3_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    assert pairs_at("s3://data/a.csv") == PAIRS
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the environment wins")
    assert "403" in refusal("s3://data/a.csv")


def test_a_bucket_that_fails_twice_is_asked_three_times(
    faulty: Faults, store: Path, pauses: list[float]
) -> None:
    (store / "a.csv").write_bytes(CSV)
    faulty.faults = ["503", "500"]
    assert pairs_at("s3://data/a.csv") == PAIRS
    assert pauses == [1, 2]


def test_a_bucket_that_always_fails_is_asked_five_times(
    faulty: Faults, store: Path, pauses: list[float], own_cache: Path
) -> None:
    faulty.faults = ["503"] * 99
    for place in ("s3://data/a.csv", "s3://data/"):
        pauses.clear()
        assert "5 tries" in refusal(place)
        assert pauses == [1, 2, 4, 8]
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("fault", ["cut", "garbled"])
def test_a_damaged_body_is_noticed_and_fetched_again(
    fault: str, faulty: Faults, store: Path, pauses: list[float], own_cache: Path
) -> None:
    (store / "a.csv").write_bytes(CSV)
    faulty.faults = [fault]
    assert pairs_at("s3://data/a.csv") == PAIRS
    faulty.faults = [fault] * 99
    (store / "a.csv").write_bytes(CSV + b"Why?,So.\n")
    assert "5 tries" in refusal("s3://data/a.csv")
    assert not list(own_cache.rglob("*.partial"))


def test_an_address_in_capitals_is_read_like_any_other(store: Path) -> None:
    (store / "a.csv").write_bytes(CSV)
    assert pairs_at("S3://data/a.csv") == PAIRS


def test_an_address_that_is_none(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no address of a bucket" in refusal("s3://no bucket!/a.csv")
    monkeypatch.setenv("S3_ENDPOINT_URL", "not an address")
    assert "S3_ENDPOINT_URL is no address" in refusal("s3://data/a.csv")


def test_the_package_is_asked_for_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert "pip install 'boto3" in refusal("s3://data/a.csv")


# -- The Hub


class Hub(Loopback):
    """As much of the Hugging Face Hub as a data set needs: a list of files, and the files."""

    def __init__(self) -> None:
        super().__init__(HubHandler)
        self.files: dict[str, dict[str, bytes]] = {}  # of each revision


class HubHandler(Quiet):
    server: Hub

    def do_GET(self) -> None:
        path = urllib.request.unquote(self.path.partition("?")[0])
        fault = self.server.faults.pop(0) if self.server.faults else ""
        headers, body, status = {}, b"", 200
        if fault:
            status = int(fault)
        elif path.startswith("/api/datasets/owner/name/tree/"):
            files = self.server.files.get(path.removeprefix("/api/datasets/owner/name/tree/"))
            if files is None:
                status, headers = 404, {"X-Error-Code": "RevisionNotFound"}
            else:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
                    for name, content in files.items()
                ]
                body = json.dumps(entries).encode()
        elif path.startswith("/datasets/owner/name/resolve/"):
            place = path.removeprefix("/datasets/owner/name/resolve/")
            name, body = next(
                (name, body)
                for revision, files in self.server.files.items()
                for name, body in files.items()
                if place.removeprefix(f"{revision}/") == name or place == f"{'a' * 40}/{name}"
            )
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "a" * 40}
        else:
            status, headers = 401, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


def parquet(rows: list[tuple[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"question": [q for q, _ in rows], "answer": [a for _, a in rows]})
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


READER = """
import sys, json
sys.path.insert(0, sys.argv[1])
import finetune_colab as ft
try:
    pairs = ft.find_pairs(ft.Config(DATASET_PATH=sys.argv[2]))
    print(json.dumps([pairs.name, [[pair.question, pair.answer] for pair in pairs.kept]]))
except ft.UserError as error:
    print(json.dumps([str(error), []]))
"""


@pytest.fixture
def from_hub(hub: Hub, own_cache: Path, folder: Path) -> Callable[[str], tuple[str, list[Any]]]:
    """The name and the pairs of a data set, or a refusal; the Hub's client reads its address once."""

    def read(place: str) -> tuple[str, list[Any]]:
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(own_cache / "hub"),
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", READER, str(ROOT), place],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        name, pairs = json.loads(done.stdout.splitlines()[-1])
        return in_words(name), [tuple(pair) for pair in pairs]

    return read


def test_a_data_set_of_the_hub_is_read_by_its_split(
    hub: Hub, from_hub: Callable[[str], tuple[str, list[Any]]]
) -> None:
    hub.files["refs/convert/parquet"] = {
        "default/train/0000.parquet": parquet(PAIRS[:10]),
        "default/train/0001.parquet": parquet(PAIRS[10:]),
        "default/test/0000.parquet": parquet(PAIRS[:2]),
        "README.md": b"",
    }
    hub.faults = ["503"]
    assert from_hub("hf:owner/name") == ("hf:owner/name, default/train/0000.parquet", PAIRS)
    assert from_hub("hf:owner/name:test")[1] == PAIRS[:2]
    assert from_hub("HF:owner/name:test")[1] == PAIRS[:2]
    message = from_hub("hf:owner/name:validation")[0]
    assert "no such part. Name one of: hf:owner/name:default/test" in message


def test_a_data_set_that_the_hub_did_not_convert_is_read_by_its_files(
    hub: Hub, from_hub: Callable[[str], tuple[str, list[Any]]]
) -> None:
    hub.files["main"] = {"data/qa.csv": CSV, "README.md": b"", "other.csv": CSV}
    assert "hf:owner/name:data/qa.csv" in from_hub("hf:owner/name")[0]
    assert from_hub("hf:owner/name:data/qa.csv")[1] == PAIRS


def test_a_data_set_that_is_not_there(from_hub: Callable[[str], tuple[str, list[Any]]]) -> None:
    assert "not on the Hub, or not open to you" in from_hub("hf:nobody/nothing")[0]
    assert "looks like hf:owner/name" in from_hub("hf:owner/name/more")[0]


@pytest.mark.parametrize(
    ("files", "wanted", "chosen"),
    [
        (["a/train/0000.parquet"], "", ["a/train/0000.parquet"]),
        (["a/train/0000.parquet", "a/train/0001.parquet"], "train", 2),
        (["a/partial-train/0000.parquet"], "train", 1),
        (
            ["a/train/0000.parquet", "default/train/0000.parquet"],
            "",
            ["default/train/0000.parquet"],
        ),
        (["a/train/0000.parquet", "b/train/0000.parquet"], "", "several parts"),
        (["a/train/0000.parquet", "b/train/0000.parquet"], "b", ["b/train/0000.parquet"]),
        (["a/train/0000.parquet", "a/test/0000.parquet"], "a", ["a/train/0000.parquet"]),
        (["a/train/0000.parquet", "b/train/0000.parquet"], "a/train", ["a/train/0000.parquet"]),
        (["a/one/0000.parquet", "a/two/0000.parquet"], "", "several parts"),
        ([], "", "no table"),
        (["a.csv"], "", ["a.csv"]),
        (["a.csv", "b.csv"], "b.csv", ["b.csv"]),
    ],
)
def test_which_part_of_a_data_set_is_meant(files: list[str], wanted: str, chosen: object) -> None:
    if isinstance(chosen, str):
        with pytest.raises(ft.UserError, match=chosen):
            ft.choose_split("hf:o/n", "o/n", files, wanted)
        return
    found = ft.choose_split("hf:o/n", "o/n", files, wanted)
    assert found == (files if isinstance(chosen, int) else chosen)
