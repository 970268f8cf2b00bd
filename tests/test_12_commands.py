"""Section 11: what each command line prints and leaves behind, and the exit code it ends with."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import PAIRS, ROOT, in_words

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
SCRIPT = ROOT / "finetune_colab.py"
LIBRARIES = "torch transformers peft numpy pandas openpyxl matplotlib yaml bitsandbytes".split()


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def too_wide(text: str, folder: Path) -> list[str]:
    """Lines beyond 80 columns, with the long name of the test's folder left out of the count."""
    return [line for line in text.splitlines() if len(line.replace(str(folder), "")) > 80]


@pytest.fixture
def mine(folder: Path) -> Path:
    """A folder with a small table, a file, a folder of other things and a broken settings file."""
    rows = [f"{question},{answer}" for question, answer in [("question", "answer"), *PAIRS]]
    (folder / "data.csv").write_text("\n".join(rows))
    (folder / "a_file").write_text("mine")
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.png").touch()
    (folder / "broken.yaml").write_text("SEED: 1: 2")
    return folder


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# -- Start and help


def test_importing_the_script_does_nothing_but_define(folder: Path) -> None:
    code = (
        "import logging, os, sys, warnings\n"
        "def state(): return [*warnings.filters], dict(os.environ), sys.argv[:], sys.path[:], \\\n"
        "    logging.root.handlers[:]\n"
        "before = state()\n"
        "import finetune_colab\n"
        f"print(before == state(), {set(LIBRARIES)!r} & set(sys.modules))"
    )
    done = python("-c", code, cwd=folder)
    assert (done.stdout, done.stderr) == ("True set()\n", "")
    assert contents(folder) == {}


def test_help_answers_without_loading_a_library(folder: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--help']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"print({set(LIBRARIES)!r} & set(sys.modules))"
    )
    done = python("-c", code, cwd=folder)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: finetune_colab.py")
    assert done.stdout.endswith("\nset()\n")
    assert done.stderr == ""


def test_help_names_the_commands_and_exit_codes(run: Run) -> None:
    code, text = run("-h")
    assert code == 0
    assert all(f"{command}: " in text for command in ft.COMMANDS)
    for meaning in (
        "0 done",
        "1 check found a problem",
        "2 something to mend",
        "130, 143 or 129 after",
    ):
        assert meaning in in_words(text)


def test_help_fits_a_narrow_terminal(run: Run, folder: Path) -> None:
    assert too_wide(run("--help")[1], folder) == []


# -- Refusals, each in the first second

REFUSED = {
    "no dataset": ([], "There is no file dataset.xlsx"),
    "another dataset": (["--dataset-path", "x.csv"], "data.csv"),
    "wrong column": (
        ["--dataset-path", "data.csv", "--answer-column", "anser"],
        "no column 'anser' (--answer-column). Did you mean answer?",
    ),
    "unknown flag": (["--batchsize", "2"], "no flag --batchsize. Did you mean --batch-size?"),
    "unknown command": (["chekc"], "invalid choice: 'chekc'"),
    "wrong value": (["--batch-size", "0", "--seed", "x"], "SEED is 'x'"),
    "broken settings": (["--config", "broken.yaml"], "broken.yaml is not valid YAML"),
    "no settings": (["--config", "none.yaml"], "Cannot read the settings file none.yaml"),
    "output: a file": (["--output-dir", "a_file"], "OUTPUT_DIR 'a_file' cannot be replaced"),
    "output: other things": (["--output-dir", "photos"], "photos holds files that are not from"),
    "output: here": (["--output-dir", "."], "OUTPUT_DIR '.' cannot be replaced"),
    "output: above": (["--output-dir", ".."], "OUTPUT_DIR '..' cannot be replaced"),
    "output: below a file": (["--output-dir", "a_file/model"], "a_file cannot be written to"),
    "output: unwritable": (["--output-dir", "/proc/none/model"], "/proc/none cannot be written to"),
    "checkpoints: a file": (["--checkpoint-dir", "a_file"], "a_file cannot be written to"),
    "a home that nobody has": (["--output-dir", "~no such person/model"], "Stopped"),
}


@pytest.mark.parametrize(
    "argv, told",
    [pytest.param(*case, id=name) for name, case in REFUSED.items()],
)
def test_what_cannot_work_is_refused_with_a_reason(argv: list[str], told: str, mine: Path) -> None:
    before = contents(mine)
    done = python(str(SCRIPT), *argv, cwd=mine)
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("\nStopped    ")
    assert told in in_words(done.stderr)
    assert too_wide(done.stderr, mine) == []
    assert contents(mine).items() >= before.items()


@pytest.mark.parametrize("name", ["no dataset", "wrong column"])
def test_a_refused_run_leaves_nothing_behind(name: str, mine: Path, run: Run) -> None:
    before = contents(mine)
    assert run(*REFUSED[name][0])[0] == 2
    assert contents(mine) == before


def test_check_calls_a_fault_of_the_data_a_problem(mine: Path) -> None:
    done = python(str(SCRIPT), "check", cwd=mine)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("Problem    There is no file dataset.xlsx")


def test_check_refuses_an_output_folder_that_training_would_refuse(
    mine: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(ft, "load_tokenizer", lambda cfg: tokenizer)
    code, text = run("check", "--dataset-path", "data.csv", "--output-dir", "photos")
    assert code == 1
    assert "photos holds files that are not from this script" in in_words(text)


def test_a_console_without_unicode_is_no_hindrance(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    assert ft.main(["check", "--dataset-path", "данные.xlsx"]) == 1
    console.flush()
    assert b"There is no file" in console.buffer.getvalue()  # type: ignore[attr-defined]


def test_check_shows_its_example_on_a_console_without_unicode(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    (folder / "data.csv").write_text("вопрос,ответ\nкто?,я\nгде?,тут\n", encoding="utf-8")
    monkeypatch.setattr(ft, "load_tokenizer", lambda cfg: tokenizer)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert ft.main(["check", "--dataset-path", "data.csv"]) == 0


def test_a_wrong_value_written_into_the_script_is_not_its_own_example(folder: Path) -> None:
    code = SCRIPT.read_text(encoding="utf-8")
    edited = code.replace("SEED: int = 42", "SEED: int = 'first'")
    (folder / "mine.py").write_text(edited, encoding="utf-8")
    done = python("mine.py", cwd=folder)
    assert done.returncode == 2
    assert "SEED is 'first'" in done.stderr
    assert "such as first" not in in_words(done.stderr)


@pytest.mark.parametrize(
    "module, argv",
    [
        ("yaml", ["--config", "broken.yaml"]),
        ("openpyxl", ["--dataset-path", str(ROOT / "dataset_example.xlsx")]),
    ],
)
def test_a_package_that_is_missing_is_named(
    module: str, argv: list[str], mine: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, text = run(*argv)
    assert code == 2
    assert f"{module} is missing" in in_words(text)
    assert "pip install" in text
    assert too_wide(text, mine) == []


def test_an_interruption_ends_with_130_and_a_word(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(cfg: ft.Config) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setitem(ft.COMMANDS, "train", interrupted)
    code, text = run("train")
    assert code == 130
    assert "Interrupted. Nothing that was finished or saved is touched; the same" in text


# -- The output folder


def write_record(folder: Path, base_model: str) -> None:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"base_model": base_model}))


@pytest.mark.parametrize("name", ["model", "new/model", "model/"])
def test_a_new_or_empty_output_folder_is_accepted(name: str, folder: Path) -> None:
    (folder / "model").mkdir()
    assert ft.preflight(ft.Config(OUTPUT_DIR=name)) == []
    assert not [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "there, wanted, accepted",
    [
        ("microsoft/phi-2", "microsoft/phi-2", True),
        ("demo", "microsoft/phi-2", True),
        ("demo", "demo", True),
        ("microsoft/phi-2", "demo", False),
    ],
)
def test_an_earlier_run_is_replaced_but_never_by_the_toy(
    there: str, wanted: str, accepted: bool, folder: Path
) -> None:
    write_record(folder / "model", there)
    before = contents(folder / "model")
    cfg = ft.Config(OUTPUT_DIR="model", MODEL_NAME=wanted)
    problems = ft.preflight(cfg)
    assert problems == [] if accepted else "--output-dir demo_model" in problems[0]
    assert contents(folder / "model") == before


# -- Where the command line comes from


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ft.Config]:
    """The settings with which training was started; it does nothing more."""
    configs: list[ft.Config] = []

    def train(cfg: ft.Config) -> int:
        configs.append(cfg)
        return 0

    monkeypatch.setitem(ft.COMMANDS, "train", train)
    return configs


@pytest.mark.parametrize("launcher", ["colab_kernel_launcher.py", "ipykernel_launcher.py"])
def test_in_a_notebook_the_arguments_of_the_kernel_are_not_read(
    launcher: str, monkeypatch: pytest.MonkeyPatch, started: list[ft.Config]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/x/{launcher}", "-f", "/x/kernel.json"])
    assert ft.main() == 0
    assert ft.setting_values(started[0]) == ft.setting_values(ft.Config())


def test_in_a_terminal_the_arguments_are_read(
    monkeypatch: pytest.MonkeyPatch, started: list[ft.Config]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--seed", "7"])
    assert ft.main() == 0
    assert started[0].SEED == 7


def test_training_is_what_happens_without_a_command(started: list[ft.Config]) -> None:
    assert ft.main([]) == ft.main(["train"]) == 0
    assert len(started) == 2
