"""Whole runs, as a person starts them: what they learn, and what is left when they are ended."""

import json
import os
import pkgutil
import pty
import re
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from conftest import PAIRS, Run, in_words, sweep, write_workbook
from seams import ROOT, SCRIPT, Config, ask, find_pairs, load_tuned, main
from tables import cases, rows_of
from test_checkpoints import modes


def said(*words: object, cwd: Path) -> str:
    """What a process of its own says, which has to end well."""
    how = {"env": os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}, "text": True, "timeout": 300}
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, check=False, **how)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_the_demo_knows_its_data_and_its_zip_answers_word_for_word(tmp_path: Path) -> None:
    printed = said(sys.executable, SCRIPT, "demo", cwd=tmp_path)
    assert len(re.findall(r"\b(?:18|19|20) of 20 answers\b", in_words(printed))) == 1
    assert len(re.findall(r"^ *before ", printed, re.MULTILINE)) == 1  # an example of both answers
    [known] = re.findall(r"in other words (\d+) of 20", in_words(printed))
    assert int(known) >= 8  # 11 to 18 where it was measured: the demo's model differs from machine to machine
    verdict = "It knows your data: " if int(known) >= 12 else "It knows your data only word for word: "
    assert f"Verdict {verdict}" in in_words(printed)
    assert "toy" in printed
    assert max(len(line) for line in printed.splitlines()) <= 80
    metrics = json.loads((tmp_path / "model/training_visuals/training_metrics.json").read_text())
    assert metrics["peak_memory_gb"] < 2
    assert metrics["eval_pairs"] == 4
    away = tmp_path / "away"
    with zipfile.ZipFile(tmp_path / "fine_tuned_model.zip") as archive:
        archive.extractall(away)
    pairs = find_pairs(Config(DATASET_PATH=str(ROOT / "dataset_example.xlsx"))).kept
    answers = ask(load_tuned(away), *(pair.question for pair in pairs))
    assert sum(a.text == pair.answer for a, pair in zip(answers, pairs, strict=True)) >= 33
    assert sum(a.stopped for a in answers) >= 33  # the four that were held out may go on
    snippet = re.search(r"```python\n(.*?)```", (away / "README.md").read_text(), re.DOTALL)
    assert snippet  # the card's, in a fresh process  O2
    assert said(sys.executable, "-c", snippet[1], cwd=away).strip() in {pair.answer for pair in pairs}


def test_the_demo_model_takes_any_workbook(folder: Path, run: Run) -> None:
    write_workbook(folder / "my.xlsx", [("Frage", "Antwort"), *PAIRS])
    flags = "--model-name demo --dataset-path my.xlsx --max-steps 2".split()
    code, printed = run(*flags)
    assert (code, bool(re.search('"Frage".*"Antwort"', in_words(printed)))) == (0, True)
    assert (folder / "model/adapter_model.safetensors").is_file()
    assert modes(folder) == {0o666}, "what others may read"


NOTEBOOKS = {name: dedent(case.partition("\n")[2]) for name, case in cases("notebooks").items()}


@pytest.mark.parametrize("way", ["a cell", *map(sweep, ["import", "%run", ">/dev/full", ">&- 2>&-", "| head -1"])])
def test_it_runs_in_a_notebook_and_where_nobody_reads(way: str, small_phi: Path, workbook: Path) -> None:
    write_workbook(workbook, [("question", "answer"), *PAIRS[:4]])
    shell = f"set -o pipefail; {sys.executable} {SCRIPT} --model-name {small_phi} --max-steps 1 --batch-size 2 {way}"
    if way in NOTEBOOKS:
        said(sys.executable, "-c", NOTEBOOKS[way].format(model=str(small_phi), script=str(SCRIPT)), cwd=workbook.parent)
    else:
        said("bash", "-c", shell, cwd=workbook.parent)
    assert Path("fine_tuned_model.zip").is_file()
    assert json.loads(Path("model/run.json").read_text())["settings"]["BATCH_SIZE"] == 2


def forked(act: Callable[[], Any], *flags: object) -> tuple[int, int]:
    """A run, after `act`, that hangs on a terminal of its own: its process and the terminal."""
    child, terminal = pty.fork()
    if child:
        return child, terminal
    code = 1
    with Path("said.txt").open("w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            act()
            code = main([*map(str, flags), "--eval-answers", "0"])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def ended(child: int, until: Callable[[], object] = lambda: False) -> int | None:
    """Its exit code, or minus its signal; None as soon as `until` holds."""
    deadline = time.monotonic() + 120
    while not until():
        time.sleep(0.02)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        if (found := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
    return None


@pytest.mark.parametrize("edge, number, closed, expected", rows_of("ends"))  # S5, S6
def test_a_run_that_is_ended_leaves_a_checkpoint_and_the_model_before_it(
    edge: str, number: str, closed: str, expected: str, small_phi: Path, workbook: Path
) -> None:
    reader, writer = os.pipe()
    Path("model").mkdir()
    Path("model/run.json").write_text('{"base_model": "earlier"}')

    def end(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), getattr(signal, number))
        time.sleep(200)  # which nobody waits for

    def prepare() -> None:
        os.close(reader)
        if edge:
            owner, name = edge.split()
            setattr(pkgutil.resolve_name(owner), name, end)
        if closed:
            sys.stdout = os.fdopen(writer if closed == "pipe" else 1, "w")

    def learning() -> bool:
        return any("step 3," in path.read_text() for path in Path("logs").glob("*.log"))

    flags = "--max-steps 1" if edge else "--num-epochs 500 --save-steps 10000 --eval-steps 10000"
    child, terminal = forked(prepare, "--model-name", small_phi, *flags.split())
    if not edge:
        assert ended(child, learning) is None
        os.close(reader)
        os.close(terminal if closed == "terminal" else writer)
        os.kill(child, 0 if closed == "terminal" else getattr(signal, number))
    assert ended(child) == int(expected)
    said = in_words(Path("said.txt").read_text())
    assert "Traceback" not in said
    assert "same command" in said or expected != "130"
    assert ([*Path("model").iterdir()] == [Path("model/run.json")]) == ("write" not in edge)
    assert not Path("fine_tuned_model.zip").exists()
    if not edge:
        saved = [*Path("checkpoints").glob("*/checkpoint-*/COMMIT.json")]
        assert bool(saved) == (expected != "-9")
