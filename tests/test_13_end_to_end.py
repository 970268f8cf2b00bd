"""Whole runs, as a person starts them: in processes of their own, with nothing prepared."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import PAIRS, ROOT, in_words, write_workbook

import finetune_colab as ft

SCRIPT = ROOT / "finetune_colab.py"


def start(*argv: object, cwd: Path, code: str | None = None) -> subprocess.Popen[str]:
    head = [sys.executable, "-c", code] if code else [sys.executable, str(SCRIPT)]
    return subprocess.Popen(
        [*head, *(str(part) for part in argv)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    folder = tmp_path_factory.mktemp("demo")
    started = time.perf_counter()
    code, out, err = finish(start("demo", cwd=folder))
    assert code == 0, err
    return folder, out, time.perf_counter() - started


def test_the_demo_learns_by_heart_and_stops(demo: tuple[Path, str, float]) -> None:
    _, out, _ = demo
    found = re.search(
        r"(\d+) of the (\d+) answers it was taught come back word for word", in_words(out)
    )
    assert found
    assert int(found[1]) >= 18
    assert int(found[2]) == 20
    assert "20 of 20 stop by themselves" in in_words(out)
    assert out.count("before ") >= 3


def test_the_demo_says_that_the_model_is_a_toy(demo: tuple[Path, str, float]) -> None:
    assert "toy" in demo[1]


def test_the_demo_keeps_to_the_terminal_and_the_memory(demo: tuple[Path, str, float]) -> None:
    folder, out, _ = demo
    assert max(len(line) for line in out.splitlines()) <= 80
    metrics = json.loads((folder / "model/training_visuals/training_metrics.json").read_text())
    assert metrics["peak_memory_gb"] < 2
    assert metrics["eval_pairs"] == 2


def test_the_zip_of_the_demo_answers_without_anything_else(
    demo: tuple[Path, str, float], tmp_path: Path
) -> None:
    with zipfile.ZipFile(demo[0] / "fine_tuned_model.zip") as archive:
        archive.extractall(tmp_path)
    tuned = ft.load_tuned(tmp_path)
    pairs = ft.find_pairs(ft.Config(DATASET_PATH=str(ROOT / ft.EXAMPLE_DATASET))).kept
    prompts = [ft.prompt_of(tuned, pair.messages[:-1], ft.Config()) for pair in pairs]
    answers = ft.answers(tuned.model, tuned.tokenizer, prompts, ft.Config())
    assert sum(a.text == pair.answer for a, pair in zip(answers, pairs, strict=True)) >= 18
    assert sum(a.stopped for a in answers) >= 20  # the two that it was never taught may go on
    card = (tmp_path / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    shown = subprocess.run(
        [sys.executable, "-c", snippet[1]], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = next(pair.answer for pair in pairs if pair.question == "What is overfitting?")
    assert shown.stdout.strip() == expected


def test_the_demo_does_not_replace_a_real_model(folder: Path, run: Any) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "run.json").write_text('{"base_model": "microsoft/phi-2"}')
    code, printed = run("demo")
    assert code == 2
    assert "--output-dir demo_model" in printed
    assert [path.name for path in (folder / "model").iterdir()] == ["run.json"]


def test_a_workbook_can_be_rehearsed_on_the_demo_model(folder: Path, run: Any) -> None:
    write_workbook(folder / "my.xlsx", [("Frage", "Antwort"), *PAIRS])
    flags = ("--model-name", "demo", "--dataset-path", "my.xlsx", "--max-steps", 2)
    code, printed = run(*flags)
    assert code == 0
    assert 'questions in "Frage", answers in "Antwort"' in in_words(printed)
    assert (folder / "model" / "adapter_model.safetensors").is_file()


def test_the_same_run_twice_gives_the_same_adapter(
    phi_folder: Path, workbook: Path, run: Any
) -> None:
    flags = ("--model-name", phi_folder, "--max-steps", 3, "--learning-rate", 1e-2)
    assert run(*flags)[0] == run(*flags, "--no-resume", "--output-dir", "again")[0] == 0
    first, second = (
        (workbook.parent / name / "adapter_model.safetensors").read_bytes()
        for name in ("model", "again")
    )
    assert first == second


def test_four_bits_on_a_processor_work_when_asked(
    phi_folder: Path, workbook: Path, run: Any
) -> None:
    code, _ = run("--model-name", phi_folder, "--load-in-4bit", "--max-steps", 1)
    assert code == 0
    assert json.loads(Path("model/run.json").read_text())["device"]["four_bit"] is True


def test_check_shows_one_example_and_trains_nothing(
    phi_folder: Path, workbook: Path, run: Any
) -> None:
    code, printed = run("check", "--model-name", phi_folder)
    assert code == 0
    assert re.search(r"Output:\[\[ .*<\|endoftext\|>\]\]", printed)
    assert "Ready" in printed
    left = sorted(path.name for path in workbook.parent.iterdir())
    assert left == ["dataset.xlsx", "dataset_report.png", "dataset_report.xlsx"]


def test_check_says_why_training_would_refuse(phi_folder: Path, folder: Path, run: Any) -> None:
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), ("Why?", "So.")])
    code, printed = run("check", "--model-name", phi_folder)
    assert code == 1
    assert "at least 2 are needed" in in_words(printed)
    assert run("--model-name", phi_folder)[0] == 2


NOTEBOOK = """
import finetune_colab as ft
ft.Config.MODEL_NAME = {model!r}
ft.Config.MAX_STEPS = 1
ft.Config.BATCH_SIZE = 2
assert ft.main([]) == 0
"""


def test_settings_edited_from_a_notebook_are_used(phi_folder: Path, workbook: Path) -> None:
    process = start(cwd=workbook.parent, code=NOTEBOOK.format(model=str(phi_folder)))
    code, _, err = finish(process)
    assert code == 0, err
    assert (
        json.loads((workbook.parent / "model/run.json").read_text())["settings"]["BATCH_SIZE"] == 2
    )


PASTED = """
import sys
source = open({script!r}, encoding="utf-8").read().replace("microsoft/phi-2", {model!r})
sys.argv = ["/usr/lib/colab_kernel_launcher.py", "-f", "/root/kernel.json"]
exec(compile(source, "<cell>", "exec"), {{"__name__": "__main__"}})
"""


def test_the_script_pasted_into_a_cell_runs(phi_folder: Path, workbook: Path) -> None:
    write_workbook(workbook, [("question", "answer"), *PAIRS[:4]])
    process = start(
        cwd=workbook.parent, code=PASTED.format(script=str(SCRIPT), model=str(phi_folder))
    )
    code, _, err = finish(process)
    assert code == 0, err
    assert (workbook.parent / "fine_tuned_model.zip").is_file()


ENDED_IN = """
import os, signal, sys, time
import finetune_colab as ft

def ended(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

setattr(ft, {phase!r}, ended)
sys.exit(ft.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("phase", ["encode", "load_base", "write_visuals", "write_zip"])
def test_an_end_outside_of_the_training_comes_at_once(
    phase: str, phi_folder: Path, workbook: Path
) -> None:
    flags = ("--model-name", phi_folder, "--max-steps", 1)
    process = start(*flags, cwd=workbook.parent, code=ENDED_IN.format(phase=phase))
    code, _, err = finish(process)
    assert code == -signal.SIGTERM
    assert "Traceback" not in err
    left = {path.name for path in workbook.parent.iterdir()}
    assert not left & {"fine_tuned_model.zip"}
    assert ("model" in left) == (phase == "write_zip")


def wait_for(folder: Path, text: str) -> None:
    """Until the log of a run has this."""
    deadline = time.monotonic() + 120
    while not any(text in path.read_text() for path in folder.glob("logs/*.log")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG = ("--num-epochs", 500, "--save-steps", 10_000, "--eval-steps", 10_000)


def test_a_terminal_that_is_closed_leaves_a_checkpoint(phi_folder: Path, workbook: Path) -> None:
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--model-name", str(phi_folder), *map(str, LONG)],
        cwd=workbook.parent,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
    )
    os.close(inside)
    wait_for(workbook.parent, "step 3")
    os.close(terminal)
    assert process.wait(60) == 129
    assert list(workbook.parent.glob("checkpoints/*/checkpoint-*/COMMIT.json"))


def test_ctrl_c_that_ends_the_reader_too_leaves_a_checkpoint(
    phi_folder: Path, workbook: Path
) -> None:
    """As in `finetune_colab.py | tee notes.txt`."""
    process = start("--model-name", phi_folder, *LONG, cwd=workbook.parent)
    wait_for(workbook.parent, "step 3")
    assert process.stdout
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert list(workbook.parent.glob("checkpoints/*/checkpoint-*/COMMIT.json"))
    assert process.stderr
    assert "the same command goes on from there" in in_words(process.stderr.read())


def test_what_nobody_can_read_is_no_error(phi_folder: Path, workbook: Path) -> None:
    command = f"{sys.executable} {SCRIPT} --model-name {phi_folder} --max-steps 1"
    for end in (">/dev/full", ">&- 2>&-", "| head -1"):
        ended = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} {end}"], cwd=workbook.parent, check=False
        )
        assert ended.returncode == 0, end


@pytest.mark.parametrize("sign, expected", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_leaves_the_model_before_it(
    phi_folder: Path, workbook: Path, sign: signal.Signals, expected: int
) -> None:
    earlier = workbook.parent / "model"
    earlier.mkdir()
    (earlier / "run.json").write_text('{"base_model": "earlier"}')
    process = start("--model-name", phi_folder, "--num-epochs", 500, cwd=workbook.parent)
    deadline = time.monotonic() + 60
    while not list(workbook.parent.glob("checkpoints/*/checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(sign)
    code, _, err = finish(process)
    assert code == expected
    assert "Traceback" not in err
    assert [path.name for path in earlier.iterdir()] == ["run.json"]
    assert not (workbook.parent / "fine_tuned_model.zip").exists()
