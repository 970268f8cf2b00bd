"""What each command line prints, refuses and leaves behind, and the exit code that it ends with."""

import contextlib
import errno
import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import PAIRS, Patch, Run, at_attention, at_step, in_words, signal_at, write_workbook
from seams import ROOT, SCRIPT, main
from tables import HEADER, cases, csv_file
from transformers import AutoModelForCausalLM

Problems = Callable[..., tuple[list[str], str]]


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def problems(capsys: pytest.CaptureFixture[str], small_phi: Path, folder: Path) -> Problems:
    """What check finds beside data that are too few, and what it says."""
    Path("few.csv").write_text("question,answer\nWhy?,So.\n")

    def problems(*flags: object) -> tuple[list[str], str]:
        capsys.readouterr()
        argv = ("check", "--json", "--dataset-path", "few.csv", "--model-name", small_phi)
        assert main([str(part) for part in (*argv, *flags)]) == 1
        printed = capsys.readouterr()
        with contextlib.suppress(PermissionError):
            [path.unlink() for path in Path().glob("dataset_report.*")]
        assert printed.out.count("\n") == 1  # a program reads it, and nothing else
        *found, data = map(in_words, json.loads(printed.out)["problems"])
        assert "few.csv" in data or "could not be loaded" in data
        return found, in_words(printed.err)

    return problems


@pytest.fixture
def train(run: Run, workbook: Path, small_phi: Path) -> Run:
    flags = ("--model-name", small_phi, "--max-steps", 3, "--eval-answers", 0)
    return lambda *more: run(*flags, *more)


def raises(patch: Patch, target: Any, name: str, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    patch.setattr(target, name, fail)


def disk(patch: Patch, free: Any, total: Any = 1e13) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=float(total), used=0, free=float(free)))


def memory(patch: Patch, total: str, available: str = "", kind: str = "cpu") -> None:
    size = SimpleNamespace(total=float(total), available=float(available or total))
    patch.setattr(psutil, "virtual_memory", lambda: size)
    patch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
    gpu = {"is_available": kind == "cuda", "get_device_capability": (7, 5), "get_device_name": "T4"}
    for name, value in (gpu | {"mem_get_info": (15e9, 16e9)}).items():
        patch.setattr(torch.cuda, name, lambda *_, value=value: value)


def installed(patch: Patch, *packages: str) -> None:
    """Other versions than are here, of the packages named or of `all`: torch=2.9.1; peft= is missing."""
    real, versions = importlib.metadata.version, dict(package.split("=") for package in packages)

    def version(name: str) -> str:
        if found := versions.get(name, versions.get("all", real(name))):
            return found
        raise importlib.metadata.PackageNotFoundError(name)

    patch.setattr(importlib.metadata, "version", version)


def full_logs(patch: Patch) -> None:
    """The disk with the logs is full."""
    real = Path.open
    patch.setattr(
        Path, "open", lambda path, *a, **k: real(Path("/dev/full") if path.suffix == ".log" else path, *a, **k)
    )


FAULTS: dict[str, Callable[..., object]] = {
    **{"disk": disk, "memory": memory, "installed": installed, "full-logs": full_logs},
    "run": lambda _, base: [Path("model").mkdir(), Path("model/run.json").write_text(json.dumps({"base_model": base}))],
    "folder": lambda _, name: Path(name).mkdir(),
    "without": lambda patch, name: patch.setitem(sys.modules, name, None),
    "no-modules": lambda patch: patch.setattr(importlib.util, "find_spec", lambda *_: None),
    "no-home": lambda patch: patch.setenv("XDG_CACHE_HOME", "/proc/none"),
    "no-locks": lambda patch, error: raises(patch, fcntl, "flock", OSError(getattr(errno, error), "no locks")),
    "dying": lambda patch, name: raises(patch, os, name, OSError(errno.EIO, "Input/output error")),  # D6
}


def suffer(patch: Patch, faults: str) -> None:
    """Do to the system what a case says: "disk 1e4 + memory 1e3"."""
    for name, *values in map(str.split, filter(None, faults.split(" + "))):
        FAULTS[name](patch, *values)


def cases_of(name: str) -> list[Any]:
    """The rows of tests/cases/NAME.txt without their names, and "" for "-"; an issue that they wait for comes first."""
    rows = []
    for title, case in cases(name).items():
        marks = [pytest.mark.sweep] * ("half a minute" in title)
        if name.endswith("to_come"):
            marks.append(pytest.mark.xfail(strict=True, reason=title.partition(", ")[0]))
        columns = ["" if part == "-" else part for part in case.split(" | ")[1:]]
        rows.append(pytest.param(columns, id=title, marks=marks))
    return rows


@pytest.mark.parametrize("case", cases_of("problems"))  # M6
def test_what_would_fail_later_is_found_by_check(case: Any, problems: Problems, folder: Path, patched: Patch) -> None:
    faults, flags, patterns, *told = case
    suffer(patched, faults)
    before = contents(folder)
    found, said = problems(*flags.split())
    patched.undo()
    for pattern, problem in zip(filter(None, patterns.split(" ; ")), found, strict=True):
        assert re.search(pattern, problem)
    assert re.search(told[0], said) if told else "Warning" not in said
    assert contents(folder) == before


@pytest.mark.parametrize("case", cases_of("commands"))
def test_what_is_said_and_left_behind(case: Any, folder: Path, run: Run, small_phi: Path, patched: Patch) -> None:
    faults, argv, code, pattern = case
    write_workbook(folder / "book.xlsx", [HEADER, *PAIRS])
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.write("book.xlsx")
    Path("photos").mkdir()
    for name, text in {"a_file": "mine", "photos/cat.png": "", "x.yaml": "SEED: 1"}.items():
        Path(name).write_text(text)
    Path("data.csv").write_bytes(csv_file([HEADER, *PAIRS]))
    Path("old.csv").write_bytes("вопрос;ответ\nПочему?;Потому что.\nКто здесь?;Это мы.\n".encode("cp1251"))
    Path("empty.csv").write_bytes(csv_file([HEADER, *((question, "") for question, _ in PAIRS)]))
    model = f"--model-name {small_phi} --dataset-path book.xlsx --max-steps 3 --eval-answers 0"
    suffer(patched, faults)
    before = contents(folder)
    ended, text = run(*shlex.split(argv.replace("MODEL", model)))
    patched.undo()
    assert (ended, "Traceback" in text) == (int(code), False)
    pattern = pattern.replace("TORCH", re.escape(importlib.metadata.version("torch")))
    pattern = re.sub("^once (.*)", r"^(?!.*\1.*\1).*\1", pattern)
    assert re.search(pattern, text if r"\n" in pattern else in_words(text))
    assert (folder / "fine_tuned_model.zip").is_file() is argv.startswith("MODEL")
    if not argv.startswith("MODEL"):
        lines = [line for line in text.splitlines() if not line.startswith("Ready")]  # to be copied
        assert all(len(line.replace(str(folder), "")) <= 80 for line in lines)
        assert code != "2" or (contents(folder), text.count("Stopped")) == (before, 1)
        assert not (folder / "logs").exists()


# fmt: off
LOADED = "set('torch transformers peft numpy pandas openpyxl matplotlib yaml bitsandbytes'.split()) & set(sys.modules)"
STATE = "[*warnings.filters], {**os.environ}, sys.argv[:], sys.path[:], logging.root.handlers[:]"
IMPORT = f"import logging, os, sys, warnings; old = {STATE}; import finetune_colab as script; print(old == ({STATE}), {LOADED}); script.main(['--help']); print({LOADED})"
TEXTS = {
    "SCRIPT": str(SCRIPT), "IMPORT": IMPORT, "DEMO": "import finetune_colab as script; script.main(['demo'])",
    "EDITED": SCRIPT.read_text(encoding="utf-8").replace("SEED: int = 42", "SEED: int = 'first'"),
}
# fmt: on


@pytest.mark.parametrize("case", cases_of("processes") + cases_of("processes_to_come"))
def test_a_process_says_it_on_the_right_stream_with_the_right_code(case: Any, folder: Path) -> None:
    files, argv, environ, code, output, errors = case
    for name, text in json.loads(files).items():
        (folder / name).write_text(TEXTS.get(text, text), encoding="utf-8")
    how: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "errors": "replace", "timeout": 100}
    how["env"] = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | json.loads(environ)
    command = [sys.executable, *(TEXTS.get(part, part) for part in argv.split())]
    done = subprocess.run(command, cwd=folder, check=False, **how)
    assert done.returncode == int(code)
    assert re.search(output, in_words(done.stdout)) and re.search(errors, in_words(done.stderr))


def test_packages_are_named_with_the_versions_they_need(run: Run, monkeypatch: Patch, patched: Patch) -> None:
    head = re.search(r"# /// script\n(.*?)# ///", SCRIPT.read_text(encoding="utf-8"), re.DOTALL)
    stated = tomllib.loads(re.sub(r"^# ?", "", head[1] if head else "", flags=re.MULTILINE))
    monkeypatch.setattr(sys, "version", "3.10.4 (main)")
    for version in ("0.0.1", ""):
        installed(patched, f"all={version}")
        code, packages = run("check")
        packages = in_words(packages)
        patched.undo()
        assert code == 2
        assert re.search(rf"python 3\.10\.4 [^,]*\b{stated['requires-python'][2:]}", packages)
        for name, floor in (package.split(">=") for package in stated["dependencies"]):
            told = rf"\b{name} [^,]*({version or 'missing'})[^,]*\b{floor}\b"
            assert bool(re.search(told, packages)) is (name != "matplotlib")  # not needed


def test_a_folder_that_only_others_may_use_is_refused(problems: Problems, patched: Patch) -> None:
    patched.setattr(importlib.metadata, "version", functools.cache(importlib.metadata.version))
    problems()  # has all libraries loaded, which somebody else may not read
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        Path(place, "model").mkdir(mode=0o000)
        Path(place).chmod(0o555)  # D6
        os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())  # the superuser may do anything
        stack.callback(os.seteuid, os.getuid())
        flags = f"--output-dir {place}/model --checkpoint-dir {place}/new/deep --model-name a/b"
        found = problems(*flags.split())[0]  # and maybe libraries that nobody may read
    for pattern in (f"{place}: Permission.*--output-dir", f"{place}/new/deep: .*--checkpoint-dir"):
        assert any(re.search(pattern, one) for one in found), pattern


@pytest.fixture
def held(train: Run) -> Iterator[int]:
    """Another process, in the middle of a training in out and states."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException), Patch.context() as patch:
            at_step(patch, 1, lambda: (os.write(write, b"held"), time.sleep(60)))
            train("--output-dir", "out", "--checkpoint-dir", "states")
        os._exit(1)
    os.close(write)
    assert os.read(read, 4) == b"held"
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(held: int, train: Run, folder: Path) -> None:
    for flags, told in (  # S8
        ("--output-dir out", f"Another run .*OUTPUT_DIR {folder}/out"),
        ("--checkpoint-dir states", f"Another run .*CHECKPOINT_DIR {folder}/states"),
        ("--dataset-path none.csv", r"^(?!.*Another run).*none\.csv"),  # in other folders
    ):
        assert re.search(told, in_words(train(*flags.split())[1])), told
    assert train("--output-dir", "out", "--checkpoint-dir", "states")[1].count("Another run") == 1
    assert train("check", "--output-dir", "out")[0] == 0
    os.kill(held, signal.SIGKILL)  # it has no time to clear up
    os.waitpid(held, 0)
    code, text = train("--output-dir", "out", "--checkpoint-dir", "states")
    assert (code, "finetune_colab.py chat --output-dir out\n" in text) == (0, True)


def test_a_terminal_that_states_no_width_gets_a_bar(train: Run, patched: Patch) -> None:
    reader, terminal = pty.openpty()  # as behind Colab's !
    with os.fdopen(terminal, "w") as stream:
        patched.setattr(sys, "stderr", stream)
        train()
        assert re.search(r"\d%\|.+\|", os.read(reader, 100_000).decode())


# fmt: off
OWN = ZeroDivisionError("own")
ENDS: dict[str, Any] = {  # fault -> exit code, or -1 for an error that nobody foresaw; what the log says of it
    "no memory": (lambda p: raises(p, AutoModelForCausalLM, "from_pretrained", MemoryError()), 2, "^Stopped.*emory"),
    "before": (lambda p: raises(p, AutoModelForCausalLM, "from_pretrained", KeyboardInterrupt()), 130, "^Stopped"),
    "measuring": (lambda p: at_attention(p, lambda *_: (_ for _ in ()).throw(OWN)), -1, "^ZeroDivisionError: own"),
    "Ctrl+C": (lambda p: signal_at(p, 2), 130, "^Stopped"),
    "a step": (lambda p: at_step(p, 2, lambda: (_ for _ in ()).throw(OWN)), -1, "^ZeroDivisionError: own"),
    "saving": (lambda p: raises(p, zipfile.ZipFile, "write", OWN), -1, "^ZeroDivisionError: own"),
}
# fmt: on


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_run_is_in_its_log_and_the_next_has_its_own(name: str, train: Run, patched: Patch) -> None:
    prepare, code, pattern = ENDS[name]
    prepare(patched)
    with pytest.raises(ZeroDivisionError) if code < 0 else contextlib.nullcontext():
        assert train("--log-dir", "first")[0] == code
    patched.undo()
    (path,) = Path("first").iterdir()
    text = path.read_text()
    assert re.search(pattern, re.sub(r"(?m)^.{21}", "", text), re.MULTILINE)
    assert ("Traceback" in text, "Plan " in text) == (code < 0, True)
    assert train("--log-dir", "second")[0] == 0
    assert [path] == [*Path("first").iterdir()] and path.read_text() == text
    assert (" step 3," in next(Path("second").iterdir()).read_text()) is (name != "saving")
