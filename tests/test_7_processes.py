"""Section 7: several processes train as one does, speak as one, and end as one."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from conftest import PAIRS, ROOT, in_words, write_workbook
from safetensors.torch import load_file

import finetune_colab as ft

FLAGS = "--lora-dropout 0 --max-steps 8 --save-steps 2 --eval-steps 3 --learning-rate 1e-2".split()
FLAGS += "--batch-size 3 --gradient-accumulation-steps 2 --eval-answers 1 --max-tokens 3".split()
LAUNCHERS = {
    "fsdp": "accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --num_processes {} --main_process_port {}",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --num_processes {} --main_process_port {}",
    "torchrun": "torch.distributed.run --nproc-per-node {} --master-port {}",
}
Launch = Callable[..., tuple[int, str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the workbook; each run has a folder of its own within."""
    home = tmp_path_factory.mktemp("processes")
    write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
    return home


def in_this_process(folder: Path, words: Sequence[str]) -> tuple[int, str]:
    printed = io.StringIO()
    with chdir(folder), redirect_stdout(printed), redirect_stderr(printed):
        code = ft.main(list(words))
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def launch(home: Path, phi_folder: Path) -> Launch:
    """Run a command with so many processes: what the launcher returns, and all that was printed."""
    given = ("--dataset-path", str(home / "dataset.xlsx"), "--model-name", str(phi_folder))

    def launch(
        folder: Path, count: int, *argv: str, by: str = "torchrun", accident: str = ""
    ) -> tuple[int, str]:
        folder.mkdir(exist_ok=True)
        words = argv if argv and argv[0] in ft.COMMANDS else (*given, *FLAGS, *argv)
        if count == 1:
            return in_this_process(folder, words)
        script = ROOT / "tests" / "launched.py" if accident else ROOT / "finetune_colab.py"
        launcher = LAUNCHERS[by].format(count, free_port()).split()
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(script), *words],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCIDENT": accident},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout

    return launch


def curve(folder: Path) -> list[list[float]]:
    """Step, losses, learning rate and length of the gradient."""
    names = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
    with (folder / "model/training_visuals/training_metrics.csv").open() as file:
        return [[float(row[name] or 0) for name in names] for row in csv.DictReader(file)]


def same_training(one: Path, other: Path) -> bool:
    assert len(curve(one)) > 8
    for here, there in zip(curve(one), curve(other), strict=True):
        assert here == pytest.approx(there, rel=1e-5)
    first, second = (load_file(folder / "model" / ft.ADAPTER) for folder in (one, other))
    gap = max(float((first[name] - second[name]).abs().max()) for name in first)
    return gap < 1e-4  # Adam enlarges the rounding where a gradient is next to nothing


def files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub("finetune-.*log", "log", name) for name in names)


@pytest.fixture(scope="module")
def alone(home: Path, launch: Launch) -> Path:
    """The training in one process, which all others have to equal."""
    code, printed = launch(home / "alone", 1)
    assert code == 0, printed
    return home / "alone"


@pytest.mark.parametrize("count, by", [(2, "accelerate"), (4, "torchrun")])
def test_several_processes_train_as_one_does(
    home: Path, launch: Launch, alone: Path, count: int, by: str
) -> None:
    folder = home / f"{count}-processes"
    code, printed = launch(folder, count, by=by)
    assert code == 0, printed
    assert same_training(folder, alone)
    assert files(folder) == files(alone)
    (log,) = folder.glob("logs/*")
    assert log.read_text().count(", loss ") == 8
    for label in "Data Device Plan Log Safe Before Asking After Saved Download".split():
        assert len(re.findall(f"^{label} ", printed, re.MULTILINE)) == 1, label
    assert f"Processes  {count}" in printed
    assert "Warning" not in printed.replace("Warning    24 pairs are few", "")
    assert "parallel_mode" not in printed


def unfinished(run: Path, folder: Path) -> Path:
    """A copy of this run as a power cut would have left it after step 6."""
    shutil.copytree(run, folder)
    (last,) = folder.glob("checkpoints/*/checkpoint-8")
    shutil.rmtree(last)
    shutil.rmtree(folder / "model")
    return folder


def test_two_processes_go_on_from_what_one_has_saved(
    home: Path, launch: Launch, alone: Path
) -> None:
    """And when memory runs out in one of them, both go down in size together."""
    folder = unfinished(alone, home / "1-to-2")
    code, printed = launch(folder, 2, accident="memory 1 7")
    assert code == 0, printed
    assert "Resume     from step 6 of 8" in printed
    assert printed.count("Memory     it ran out, so the training goes on with less") == 1
    assert same_training(folder, alone)


def test_one_process_goes_on_from_what_two_were_told_to_leave(
    home: Path, launch: Launch, alone: Path
) -> None:
    """SIGTERM to the launcher: all stop at the end of the same step, with a checkpoint."""
    folder = home / "2-to-1"
    code, printed = launch(folder, 2, accident="term 0 3")
    assert code != 0
    assert printed.count("Stopping after this step, with a checkpoint.") == 1
    assert in_words(printed).count("Interrupted. Step 4 of 8 is saved") == 1
    code, printed = launch(folder, 1)
    assert code == 0, printed
    assert "Resume     from step 4 of 8" in printed
    assert same_training(folder, alone)


def test_four_bits_and_fewer_pairs_than_processes(home: Path, launch: Launch) -> None:
    flags = ("--load-in-4bit", "--batch-size", "1", "--gradient-accumulation-steps", "1")
    for count, name in ((1, "one-pair-alone"), (2, "one-pair")):
        code, printed = launch(home / name, count, *flags)
        assert code == 0, printed
    assert same_training(home / "one-pair", home / "one-pair-alone")


def test_the_frozen_weights_divided_among_the_processes(home: Path, launch: Launch) -> None:
    """FSDP: also where a process has nothing to do in a step, the others need its part."""
    flags = ("--batch-size", "1", "--gradient-accumulation-steps", "1")
    for count, name in ((1, "whole"), (2, "divided")):
        code, printed = launch(home / name, count, *flags, by="fsdp")
        assert code == 0, printed
    assert "no process holds the whole model" in in_words(printed)
    assert same_training(home / "divided", home / "whole")
    weights = load_file(home / "divided" / "model" / ft.ADAPTER)
    assert {weight.shape for weight in weights.values()} == {
        weight.shape for weight in load_file(home / "whole" / "model" / ft.ADAPTER).values()
    }


def test_weights_in_four_bits_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ft.SHARDED, "1")
    with pytest.raises(ft.UserError, match="--no-load-in-4bit"):
        ft.refuse_sharded(ft.Config(), ft.Device("cuda", "bfloat16", True, ""))


def test_a_killed_process_ends_all_and_the_same_command_goes_on(home: Path, launch: Launch) -> None:
    """With dropout: what each process draws is the same again, to the last bit."""
    flags = ("--lora-dropout", "0.2", "--neftune-alpha", "5")
    code, printed = launch(home / "undisturbed", 2, *flags)
    assert code == 0, printed
    code, printed = launch(home / "killed", 2, *flags, accident="kill 1 5", by="accelerate")
    assert code != 0
    assert in_words(printed).count("Another process of this training has ended") == 1
    assert not (home / "killed" / "model").exists()
    code, printed = launch(home / "killed", 2, *flags)
    assert code == 0, printed
    assert "Resume     from step 4 of 8" in printed
    assert curve(home / "killed") == curve(home / "undisturbed")
    first, second = ((home / name / "model" / ft.ADAPTER) for name in ("killed", "undisturbed"))
    assert first.read_bytes() == second.read_bytes()


def test_a_process_that_fails_alone_is_heard(home: Path, launch: Launch) -> None:
    code, printed = launch(home / "error", 2, accident="error 1 1")
    assert code != 0
    assert printed.count("ValueError: nobody foresaw this") == 2  # of its own, and of the first
    assert printed.count("Stopped ") == 1
    assert "A process failed: ValueError" in printed


def test_a_refusal_is_said_once_and_ends_all_with_2(home: Path, launch: Launch) -> None:
    code, printed = launch(home / "refused", 2, "--dataset-path", "missing.xlsx")
    assert code != 0
    assert printed.count("Stopped ") == 1
    assert printed.count("missing.xlsx") == 1
    assert printed.count("Traceback") == 1, printed  # the launcher's own
    assert set(re.findall(r"exitcode +: (-?\d+)", printed)) <= {"2", "-15"}
    assert "exitcode  : 2" in printed
    assert not (home / "refused" / "checkpoints").exists()


def test_other_commands_act_once(home: Path, launch: Launch) -> None:
    flags = ("--dataset-path", str(home / "dataset.xlsx"), "--model-name", "demo", "--json")
    code, printed = launch(home / "check", 2, "check", *flags)
    assert code == 0, printed
    found = [line for line in printed.splitlines() if line.startswith('{"ready"')]
    assert len(found) == 1
    assert json.loads(found[0])["ready"]


def test_the_demo_works_with_several_processes(home: Path, launch: Launch) -> None:
    few = ("--max-steps", "4", "--eval-steps", "4", "--eval-answers", "0", "--max-tokens", "4")
    code, printed = launch(home / "demo", 2, "demo", *few)
    assert code == 0, printed
    assert printed.count("Demo ") == printed.count("Result ") == 1
    assert "answers it was taught come back" in in_words(printed)


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed does not work here"),
        ({"LOCAL_WORLD_SIZE": "1"}, "on one machine"),
    ],
)
def test_what_does_not_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name, value in ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ft.UserError, match=words):
        ft.join_others()


def test_processes_get_about_as_many_tokens_each(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [90, 70, 40, 30, 30, 20, 10, 10]
    examples: list[ft.Example] = [{"input_ids": [1] * n, "labels": [1] * n} for n in lengths]
    for count in (2, 3, 4):
        monkeypatch.setattr(ft, "processes", lambda count=count: count)
        sums = []
        for number in range(count):
            monkeypatch.setattr(ft, "process_number", lambda number=number: number)
            rows = ft.own_rows(examples, 1000)
            sums.append(sum(len(example["input_ids"]) for row in rows for example in row))
        assert sum(sums) == sum(lengths)
        assert max(sums) - min(sums) <= 20
