"""Nothing that is read can run code, nothing private leaves, and no file with a final name is half."""

import ast
import errno
import importlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PAIRS, Patch, Run, call, in_words, sweep, write_workbook
from huggingface_hub import constants
from matplotlib.figure import Figure
from safetensors.torch import load_file
from seams import ROOT, SCRIPT, Config, UserError, load_base, load_tokenizer, load_tuned
from tables import HEADER, csv_file, rows_of
from transformers import AutoModelForCausalLM

ADAPTER, ZIP = "adapter_model.safetensors", "fine_tuned_model.zip"
SECRETS = {"HF_TOKEN": "hf_NobodyMaySee", "AWS_ACCESS_KEY_ID": "AKIANOBODY", "AWS_SECRET_ACCESS_KEY": "NobodyMaySeeIt"}
FIRST, LATER = "a" * 40, "b" * 40  # commits of a base model


def start(home: Path, model_name: object) -> None:
    """A run of one step, in folders whose names are nobody's business, which sends nothing after the load (O4)."""
    calls, connect, load = [], socket.socket.connect, AutoModelForCausalLM.from_pretrained

    def refuse(self: socket.socket, address: Any) -> None:
        if address[0] == "127.0.0.1":
            return connect(self, address)
        calls.append(address)
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        calls.clear()
        return model

    (home / "data/whoHasThisHasTheFile").mkdir(parents=True)
    write_workbook(home / "data/whoHasThisHasTheFile/qa.xlsx", [HEADER, *PAIRS])
    handler = partial(SimpleHTTPRequestHandler, directory=home / "data")
    with Patch.context() as patch, ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        link = f"http://127.0.0.1:{server.server_port}/whoHasThisHasTheFile/qa.xlsx?token=inTheLink"
        flags = f"--dataset-path {link} --max-steps 1 --max-tokens 2 --eval-answers 1 --output-dir {home}/model"
        flags += f" --checkpoint-dir {home}/states --log-dir {home}/notes --checkpoint-mirror {home}/her-drive"
        assert call(home, "--model-name", model_name, *flags.split()) == 0
        server.shutdown()
    assert calls == []


@pytest.fixture
def model(tuned_run: Path, folder: Path) -> Path:
    """The folder of a finished run, to be tampered with."""
    return shutil.copytree(tuned_run / "model", folder / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BOMB = pickle.dumps(type("Bomb", (), {"__reduce__": lambda _: (Path.touch, (Path("canary"),))})())  # V2
CODE = """
from pathlib import Path
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast
Path("canary").touch()
"""


@pytest.mark.parametrize("name, changes, then", rows_of("bases"))  # V3
def test_a_base_brings_its_weights_and_no_code(
    name: str, changes: str, then: str, small_phi: Path, folder: Path, monkeypatch: Patch
) -> None:
    base = shutil.copytree(small_phi, folder / "base")
    (base / "own.py").write_text(CODE)
    if changes:
        edit(base / name, **json.loads(changes))
    else:
        (base / name).unlink()
        (base / "pytorch_model.bin").write_bytes(BOMB)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # for transformers, which would ask
    with suppress(UserError):
        load_tokenizer(Config(MODEL_NAME=str(base)))
    with pytest.raises(UserError, match="base") if then == "refused" else suppress(UserError):
        load_base(base)
    assert sys.stdin.read() == "y\n" * 9
    assert not Path("canary").exists()


def test_the_script_itself_opens_no_door() -> None:
    """No pickle, no code from texts, no shell, no YAML that builds objects, no code of models."""
    source = SCRIPT.read_text(encoding="utf-8")
    tree = [*ast.walk(ast.parse(source))]
    calls = {ast.unparse(node.func) for node in tree if isinstance(node, ast.Call)}
    assert not calls & set("eval exec compile os.system os.popen torch.load torch.save yaml.load __import__".split())
    assert {call for call in calls if call.startswith("subprocess.")} <= {"subprocess.run"}
    assert source.count(".extractall(") <= 1  # of a zip, which zipfile keeps inside its folder
    assert "shell=" not in source
    imported = {name.name for node in tree if isinstance(node, ast.Import) for name in node.names}
    assert not imported & {"pickle", "marshal", "shelve"}
    trusted = re.findall(r"trust_remote_code\W+(\w+)", source)
    assert (len(trusted) >= 3, set(trusted)) == (True, {"False"})


def test_a_hostile_zip_does_no_harm(model: Path, phi_folder: Path, folder: Path, monkeypatch: Patch) -> None:
    """V7; and peft imports whatever module stands in adapter_config.json as megatron_core."""
    (folder / "planted.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    edit(model / "adapter_config.json", megatron_config={"a": 1}, megatron_core="planted")
    hostile = Path(shutil.make_archive("hostile", "zip", model))
    with zipfile.ZipFile(hostile, "a") as archive:
        for name in ("../outside", "../../outside", f"{folder}/absolute", "a/../../outside"):
            archive.writestr(name, "x")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    shutil.copytree(phi_folder, folder / phi_folder.name)
    (folder / "zips").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "zips"))
    before = set(folder.rglob("*"))
    assert load_tuned(hostile).model
    assert set(folder.rglob("*")) == before
    assert "planted" not in sys.modules
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="room"):
        load_tuned(hostile)


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {  # of a file: its new content, what is named
    "the adapter is cut off": (ADAPTER, lambda old: old[:-500], "adapter"),
    "the adapter is of other layers": ("run.json", lambda old: old.replace(b'"all-linear"', b'"attention"'), "adapter"),
    "a damaged tokenizer": ("tokenizer.json", lambda _: b"{", "model"),
    "half a record": ("run.json", lambda _: b'{"settings": {', "finished run"),
    "another record": ("run.json", lambda _: b"[]", "finished run"),
}
for pickled in "adapter_model.bin rng.pth a.pkl A.PT training_args.bin".split():
    DAMAGE |= {f"{pickled} {how}": (pickled, lambda _: BOMB, pickled) for how in ("beside", "instead")}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_hostile_run_is_one_message(what: str, model: Path) -> None:
    name, act, named = DAMAGE[what]
    (model / name).write_bytes(act((model / name).read_bytes() if (model / name).exists() else b""))
    if "instead" in what:
        (model / ADAPTER).unlink()
    with pytest.raises(UserError, match=named):
        load_tuned(model)
    assert not Path("canary").exists()
    pickle.loads(BOMB)  # it is one
    assert Path("canary").exists()


def test_nothing_is_sent_and_the_commit_of_a_base_is_kept(small_phi: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    kept = tmp_path / "cache/models--someone--tiny"
    shutil.copytree(small_phi, kept / "snapshots" / FIRST)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text(FIRST)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(kept.parent))
    start(tmp_path, "someone/tiny")
    record, adapter = (
        json.loads((tmp_path / "model" / f"{name}.json").read_text()) for name in ("run", "adapter_config")
    )
    assert record["base_model"] == "someone/tiny"
    assert {record["base_revision"], record["settings"]["MODEL_REVISION"], adapter["revision"]} == {FIRST}
    card = (tmp_path / "model/README.md").read_text()
    assert {"base_model: someone/tiny", "library_name: peft"} <= set(card.split("---")[1].splitlines())
    # V4: another model under the same name changes no finished run
    shutil.copytree(kept / "snapshots" / FIRST, kept / "snapshots" / LATER)
    (kept / "snapshots" / LATER / "model.safetensors").write_bytes(b"")
    (kept / "refs/main").write_text(LATER)
    load_tuned(tmp_path / "model")


def test_what_is_passed_on_holds_nothing_private_and_says_what_it_needs(small_phi: Path, tmp_path: Path) -> None:
    home, moved = tmp_path / "home-of-ada", tmp_path / "moved"
    base = shutil.copytree(small_phi, home / "her-models/tiny-phi")
    start(home, base)
    with zipfile.ZipFile(home / ZIP) as archive:
        names = archive.namelist()
        archive.extractall(moved)
    model, states, passed_on = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (home / "model", home / "states", moved)
    )
    for name, content in [*model.items(), *states.items()]:  # V8
        assert not [secret for secret in (*SECRETS.values(), "inTheLink") if secret.encode() in content], name
    for name in [*names, *model]:
        assert not re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$|^/|(^|/)\.\.(/|$)", name)
    cells = re.split(r"[,\s]+", model["training_visuals/training_metrics.csv"].decode().partition("\n")[2])
    assert any(cells)
    assert all(float(cell) >= 0 for cell in cells if cell)  # not even a minus, which opens a formula
    places = {home.name, "her-models", "whoHasThis", str(Path.home()), str(ROOT)} - {"/"}
    for name, content in passed_on.items():
        assert not [place for place in places if place.encode() in content], name
    settings = json.loads(passed_on["run.json"])["settings"]
    assert re.fullmatch(r"http://127\.0\.0\.1(:\d+)?/…", settings["DATASET_PATH"])
    called = [settings[name] for name in "MODEL_NAME OUTPUT_DIR CHECKPOINT_DIR LOG_DIR CHECKPOINT_MIRROR".split()]
    assert called == "./tiny-phi model states notes her-drive".split()
    assert json.loads(passed_on["adapter_config.json"])["base_model_name_or_path"] == "./tiny-phi"
    assert b"tiny-phi" in passed_on["README.md"]

    load_tuned(home / "model")
    with pytest.raises(UserError, match=rf"(?s)tiny-phi.*{moved}"):
        load_tuned(moved)
    shutil.copytree(base, moved / "tiny-phi")
    (moved / "tiny-phi/pytorch_model.bin").write_bytes(b"of many a base model")
    load_tuned(moved)


def test_odd_names_are_only_names(small_phi: Path, folder: Path, run: Run, monkeypatch: Patch) -> None:
    name, data = 'x"); import os; os.abort(); ("`<img src=x>\nb#', os.fsdecode(b"donn\xe9es.csv")
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(folder))
    shutil.copytree(small_phi, name)
    (folder / data).write_bytes(csv_file([HEADER, *PAIRS]))
    flags = ("--model-name", f"~/{name}", "--dataset-path", data, "--max-steps", 1, "--eval-answers", 0)
    assert run(*flags)[0] == 0
    assert json.loads(Path("model/run.json").read_text())["settings"]["DATASET_PATH"] == data
    card = Path("model/README.md").read_text()
    before, _, snippet = card.partition("```python\n")
    assert "os.abort" not in ast.unparse(ast.parse(snippet.partition("```")[0]))
    assert ("<img" in before, card.count("\n# ")) == (False, 1)
    code, printed = run(*flags, "--output-dir", os.fsdecode(b"mod\xe8le"))
    assert (code, "./model" in in_words(printed)) == (2, True)


def test_names_cannot_steer_the_terminal(folder: Path, run: Run) -> None:
    steer = "\x1b[2J\x07\u202e"  # V9: a terminal takes ESC [ 2 J for an order, wherever it is printed
    name = f"a{steer}b.csv"
    rows = [(*HEADER, "remark"), *((*pair, "") for pair in PAIRS)]
    (folder / name).write_bytes(csv_file([*([cell + steer for cell in row] for row in rows), ("Why?", "", "")]))
    check = f"check --dataset-path {name} --model-name"
    lines = [f"{check} demo", f"{check} demo --question-column {steer}", f"{check} no{steer}ne"]
    for line in (*lines, f"check --dataset-path none{steer}", f"--output-dir /proc/{steer}", f"--{steer}"):
        assert run(*line.split(" "))[1].replace("\n", "").isprintable(), line


def is_whole(folder: Path) -> bool:
    return bool(json.loads((folder / "run.json").read_text()) and load_file(folder / ADAPTER))


def test_what_gets_its_name_is_on_the_disk_before(again: Run, finished: Path, monkeypatch: Patch) -> None:
    """After a power cut, a file that was renamed but never synchronised is there and empty; some disks cannot."""
    synchronised: list[tuple[str, bool, bool]] = []

    def synchronise(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").resolve().name
        synchronised.append((name, Path("model").exists(), Path(ZIP).exists()))
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    shutil.rmtree("model")
    Path(ZIP).unlink()
    monkeypatch.setattr(os, "fsync", synchronise)
    assert again()[0] == 0
    assert [name for name, model, _ in synchronised if name.startswith(ADAPTER) and not model]
    assert [name for name, _, archive in synchronised if name.startswith(ZIP) and not archive]
    assert is_whole(finished / "model")


class Killed(BaseException):
    """Stands for the end of the process: nothing that catches errors may catch it."""


dies: list[bool] = []  # at the changes to a model on the disk that are still to come, the last first


def on_event(event: str, args: tuple[Any, ...]) -> None:
    if dies:
        if event == "os.rename":
            assert len({Path(os.fsdecode(place)).parent for place in args[:2]}) == 1  # never to another disk
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        changes = writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if changes and "model" in str(args[0]) and dies.pop():
            raise Killed


sys.addaudithook(on_event)  # it stays for as long as the process


@pytest.mark.parametrize("every", [9, sweep(1)])
def test_a_run_that_dies_while_saving_leaves_only_whole_files(every: int, again: Run, finished: Path) -> None:
    """Stopped at its changes to the disk in turn, over an earlier model, and then run again."""
    stops, done = every // 2, False  # O1, D9
    while not done:
        dies[:] = [True, *[False] * stops]
        with suppress(Killed):
            assert again()[0] == 0
            done = True
        dies.clear()
        stops += every
        places = [finished / name for name in ("model", "model.previous", ".model.old")]
        models = [place for place in places if (place / ADAPTER).exists()]
        assert models and all(map(is_whole, models))
        assert zipfile.ZipFile(ZIP).testzip() is None
        assert ADAPTER in zipfile.ZipFile(ZIP).namelist()
    assert stops > 15 + every
    assert is_whole(finished / "model")
    assert not [*finished.glob("*partial*"), *finished.glob(".*.old")]


WAYS: dict[str, Callable[[Path], object]] = {
    "file": lambda way: way.write_text(""),
    "folder": lambda way: (way / "deep").mkdir(parents=True),
    "link": lambda way: way.symlink_to("kept"),
    "link to nowhere": lambda way: way.symlink_to("none"),
}
SHOWN = [("file", ".model.partial"), ("link", "model.previous")]
REST = [(kind, end) for kind in WAYS for end in (".model.partial", "model.previous") if (kind, end) not in SHOWN]


@pytest.mark.parametrize("kind, end", [*SHOWN, *(sweep(*one) for one in REST)])
def test_what_somebody_puts_there_is_kept_and_not_packed(kind: str, end: str, again: Run, finished: Path) -> None:
    for name in ("kept", "model.old", "model.partial"):
        (finished / name).mkdir()
        (finished / name / "mine").write_text("secret")
    WAYS[kind](finished / end)
    (finished / "model/linked").symlink_to(finished / "kept", target_is_directory=True)  # V6
    (finished / "model/passwd").symlink_to("/etc/passwd")
    for name in ("optimizer.pt", "training_visuals/X.PKL", "one"):
        (finished / "model" / name).write_text("mine")
    assert again()[0] == 0
    names = zipfile.ZipFile(ZIP).namelist()
    assert ADAPTER in names
    assert not [n for n in names if re.search("linked|passwd|mine|one$|optimizer|PKL|base_model_f", n)]
    for note in ("two", ".DS_Store"):  # the last is the file manager's
        (finished / "model" / note).write_text("mine")
        (finished / "model/.DS_Store").write_text("of the file manager")
        assert again()[0] == 0
    notes = sorted(str(p.relative_to(finished)) for p in finished.rglob("*") if p.name in ("mine", "one", "two"))
    assert notes[:3] == ["kept/mine", "model.old/mine", "model.partial/mine"]
    assert sorted(re.sub(r"^model\.previous(\.\d)?/", "", note) for note in notes[3:]) == ["one", "two"]
    assert is_whole(finished / "model")


def fails(error: Exception) -> Callable[..., None]:
    """In the middle of a zip or a picture, or while it is synchronised."""

    def fail(target: Any, path: Any = None, *_: object, **__: object) -> None:
        if isinstance(target, zipfile.ZipFile):
            target.writestr("half", b"half")
        elif isinstance(target, Figure):
            path.write_bytes(b"half of a picture")
        raise error

    return fail


FULL, GONE = (OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EIO))
SMALL = SimpleNamespace(free=20_000, total=1, used=0)
WRITING: dict[str, tuple[Callable[[Patch], object], int, str]] = {  # what fails, the exit code, what is named
    "no room": (lambda p: p.setattr(shutil, "disk_usage", lambda _: SMALL), 2, "free"),  # D4
    "full halfway": (lambda p: p.setattr(zipfile.ZipFile, "write", fails(FULL)), 2, "space"),
    "the disk is gone": (lambda p: p.setattr(zipfile.ZipFile, "write", fails(GONE)), 2, "error"),
    "read back damaged": (lambda p: p.setattr(zipfile.ZipFile, "testzip", lambda _: ADAPTER), 2, ADAPTER),
    "not synchronised": (lambda p: p.setattr(os, "fsync", fails(GONE)), 2, "error"),
    "no matplotlib": (lambda p: p.setitem(sys.modules, "matplotlib.figure", None), 0, "pictures"),  # O3
    "half a picture": (lambda p: p.setattr(Figure, "savefig", fails(FULL)), 0, "pictures"),
    "no font": (lambda p: p.setattr(Figure, "savefig", fails(RuntimeError("no font"))), 0, "pictures"),
}
FIGURES = {"training_config.json", "training_metrics.csv", "training_metrics.json"}


@pytest.mark.parametrize("what", WRITING)
def test_what_cannot_be_written_costs_no_adapter_and_no_earlier_zip(what: str, again: Run, patched: Patch) -> None:
    act, expected, named = WRITING[what]
    Path(ZIP).write_bytes(b"earlier")
    Path(f"{ZIP}.123.partial").write_bytes(b"cut off by a kill")
    act(patched)
    code, printed = again()
    assert (code, "Traceback" in printed) == (expected, False)
    assert named in in_words(printed)
    assert is_whole(Path("model"))
    if code:
        assert Path(ZIP).read_bytes() == b"earlier"
    else:
        assert ADAPTER in zipfile.ZipFile(ZIP).namelist()
        assert {path.name for path in Path("model/training_visuals").iterdir()} == FIGURES
    patched.undo()
    assert again()[0] == 0
    assert zipfile.is_zipfile(ZIP)
    assert not [*Path().glob("*.partial")]


def test_data_that_changes_meanwhile_is_read_once(
    workbook: Path, small_phi: Path, run: Run, monkeypatch: Patch
) -> None:
    """What is taught, measured and recorded comes from the same bytes (X16)."""
    real, reads = Path.read_bytes, []

    def read_and_change(path: Path) -> bytes:
        content = real(path)
        if path.name == workbook.name:
            reads.append(path)
            write_workbook(workbook, [HEADER, ("Other?", "Yes."), ("One?", "No.")])
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_change)
    assert run("--model-name", small_phi, "--max-steps", 1)[0] == 0
    assert len(reads) == 1
    sample = json.loads(Path("model/sample_rows.json").read_text())
    assert {row[0]["content"] for row in sample} <= {question for question, _ in PAIRS}


def test_a_model_is_put_back_when_a_kill_between_two_renames_is_followed_by_a_full_disk(
    again: Run, patched: Patch
) -> None:
    rename, before = Path.rename, Path("model/run.json").read_bytes()

    def killed(path: Path, target: Path) -> Path:
        if path.name == ".model.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    patched.setattr(Path, "rename", killed)
    assert again()[0] == 130 and not Path("model").exists()
    patched.undo()
    patched.setattr(shutil, "copyfile", fails(FULL))
    assert again()[0] == 2 and Path("model/run.json").read_bytes() == before
