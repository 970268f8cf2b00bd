"""Several processes train as one does, speak as one, and end as one. Run as a script, it is one of them."""

import csv
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any

import pytest
from conftest import PAIRS, Run, at_attention, at_step, call, in_words, sweep, write_workbook
from safetensors.torch import load_file
from seams import ROOT, SCRIPT, main
from torch import testing

FLAGS = "--lora-dropout 0 --max-steps 8 --save-steps 2 --eval-steps 3 --learning-rate 1e-2 --batch-size 3 --gradient-accumulation-steps 2 --eval-answers 1 --max-tokens 3".split()
LAUNCHERS = {
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes {} --main_process_port {}",
    "torchrun": "torch.distributed.run --nproc-per-node {} --master-port {}",
}
Launch = Callable[..., str]
ADAPTER, CURVE = "model/adapter_model.safetensors", "model/training_visuals/training_metrics.csv"
RESUMED = r"Resume .*?step (\d+)"


def accident(kind: str, rank: str, step: str) -> None:
    """In one process, in the middle of one step; "kill 1 5" is in process 1 at step 5."""
    patch, here, soon = pytest.MonkeyPatch(), os.environ.get("RANK") == rank, []
    errors = {"memory": RuntimeError("CUDA out of memory."), "error": ValueError("unforeseen")}

    def act() -> None:
        soon.append(kind)
        if kind not in errors:
            if here:
                os.kill(*((os.getpid(), 9) if kind == "kill" else (os.getppid(), 15)))
            time.sleep(2)  # for the launcher to pass it on

    def fail(_: int, query: Any) -> None:
        if here and soon and query.requires_grad:
            raise errors[soon.pop()]

    at_step(patch, int(step), act)
    if kind in errors:
        at_attention(patch, fail)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the workbook; each run has a folder of its own within."""
    home = tmp_path_factory.mktemp("processes")
    write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
    return home


@pytest.fixture(scope="module")
def launch(home: Path, small_phi: Path) -> Launch:
    """What a command says with so many processes, which has to end well, or not."""
    given = ("--dataset-path", home / "dataset.xlsx", "--model-name", small_phi)

    def launch(name: str, count: int, *argv: object, by: str = "torchrun", wrong: str = "", well: bool = True) -> str:
        (home / name).mkdir(exist_ok=True)
        words = argv if argv and argv[0] in ("check", "demo") else (*given, *FLAGS, *argv)
        if count == 1:
            with redirect_stdout(io.StringIO()) as said:
                assert call(home / name, *words) == 0
            return said.getvalue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            launcher = LAUNCHERS[by].format(count, probe.getsockname()[1]).split()
        command = [sys.executable, "-m", *launcher, __file__ if wrong else SCRIPT, *words]
        how = {"stdout": PIPE, "stderr": STDOUT, "stdin": DEVNULL, "text": True, "timeout": 300}
        how |= {"env": os.environ | {"PYTHONPATH": str(ROOT), "ACCIDENT": wrong}}
        done = subprocess.run([*map(str, command)], cwd=home / name, check=False, **how)
        assert (done.returncode == 0) == well, done.stdout
        return str(done.stdout)

    return launch


@pytest.fixture(scope="module")
def alone(home: Path, launch: Launch) -> Path:
    """The training in one process, which all others have to equal."""
    launch("alone", 1)
    return home / "alone"


def assert_same_training(one: Path, other: Path) -> None:
    curves = []
    for folder in (one, other):
        with (folder / CURVE).open() as file:
            curves.append([[float(value or 0) for value in row.values()] for row in csv.DictReader(file)])
    assert len(curves[0]) > 8
    for here, there in zip(*curves, strict=True):
        assert here == pytest.approx(there, rel=1e-5)
    # Adam enlarges the rounding where a gradient is next to nothing
    testing.assert_close(load_file(one / ADAPTER), load_file(other / ADAPTER), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count, by", [(2, "accelerate"), sweep(4, "torchrun")])
def test_several_train_as_one_does_and_one_speaks(count: int, by: str, home: Path, launch: Launch, alone: Path) -> None:
    several = home / f"{count}-processes"
    printed = launch(several.name, count, by=by)
    assert_same_training(several, alone)
    written = [
        {re.sub(r"_\d(?=\.pth)|(?<=exam-)\w+", "", str(path.relative_to(one))) for path in one.rglob("*")}
        for one in (several, alone)
    ]
    written = [{path for path in one if not path.endswith(".log")} for one in written]
    assert written[0] == written[1]
    (log,) = several.glob("logs/*.log")
    assert log.read_text().count(", loss ") == 8
    for label in "Data Device Plan Before After Saved".split():
        assert len(re.findall(f"^{label} ", printed, re.MULTILINE)) == 1, label
    assert re.search(rf"Processes\W+{count}\b", printed)
    assert "parallel_mode" not in printed  # the Trainer's warning


@pytest.mark.sweep
def test_two_processes_go_on_from_what_one_has_saved(home: Path, launch: Launch, alone: Path) -> None:
    """As a power cut left it after step 6. And memory runs out in one of them: both end, and go on with less."""
    shutil.copytree(alone, home / "1-to-2")
    for left in ("checkpoints/*/checkpoint-8", "model"):
        shutil.rmtree(*(home / "1-to-2").glob(left))
    printed = launch("1-to-2", 2, wrong="memory 1 1", well=False)
    assert re.findall(RESUMED, printed) == ["6"]
    (less,) = re.findall(r"Memory ran out.*--tokens-at-once (\d+)", in_words(printed))
    launch("1-to-2", 2, "--tokens-at-once", less)
    assert_same_training(home / "1-to-2", alone)


@pytest.mark.sweep
def test_one_process_goes_on_from_what_two_were_told_to_leave(home: Path, launch: Launch, alone: Path) -> None:
    """SIGTERM to the launcher: all stop at the end of the same step, with a checkpoint."""
    printed = launch("2-to-1", 2, wrong="term 0 4", well=False)
    assert in_words(printed).count("Step 4 of 8") == 1
    assert re.findall(RESUMED, launch("2-to-1", 1)) == ["4"]
    assert_same_training(home / "2-to-1", alone)


@pytest.mark.sweep
def test_a_killed_process_ends_all_and_the_same_command_goes_on(home: Path, launch: Launch) -> None:
    """With dropout: what each process draws is the same again, to the last bit."""
    flags = ("--lora-dropout", 0.2, "--neftune-alpha", 5)
    launch("undisturbed", 2, *flags)
    printed = launch("killed", 2, *flags, wrong="kill 1 6", by="accelerate", well=False)
    assert in_words(printed).count("Run the same command again") == 1
    assert not (home / "killed/model").exists()
    assert re.findall(RESUMED, launch("killed", 2, *flags)) == ["4"]
    for file in (ADAPTER, CURVE):
        assert (home / "killed" / file).read_bytes() == (home / "undisturbed" / file).read_bytes()


@pytest.mark.sweep
def test_in_four_bits_with_fewer_pairs_than_processes(home: Path, launch: Launch, phi_folder: Path) -> None:
    flags = "--batch-size 1 --gradient-accumulation-steps 1 --load-in-4bit --model-name".split()
    for count in (1, 2):
        launch(f"one-pair-{count}", count, *flags, phi_folder)
    assert_same_training(home / "one-pair-1", home / "one-pair-2")


@pytest.mark.sweep
@pytest.mark.parametrize("name, words, wrong, said", [  # an accident, and how often what is said
    ("a failure", (), "error 1 1", {"ValueError: unforeseen": 1, "^Stopped ": 1}),
    ("a refusal", ("--dataset-path", "missing.xlsx"), "", {"missing.xlsx": 1, "Traceback": 1}),  # the launcher's own
    ("a check", ("check", "--dataset-path", "../dataset.xlsx", "--model-name", "demo", "--json"), "", {'^{"ready": true': 1}),
    ("the demo", ("demo", "--max-steps", 4, "--max-tokens", 4), "", {"^Demo ": 1, "^Asking ": 1}),
])  # fmt: skip
def test_all_speak_as_one(name: str, words: Any, wrong: str, said: dict[str, int], launch: Launch) -> None:
    printed = launch(name, 2, *words, wrong=wrong, well=name in ("a check", "the demo"))
    assert {one: len(re.findall(one, printed, re.MULTILINE)) for one in said} == said, printed
    if name == "a refusal":
        codes = set(re.findall(r"exitcode *: (-?\d+)", printed))
        assert codes and codes <= {"2", "-15"}, printed


@pytest.mark.parametrize(
    "told, more", [("DeepSpeed", "ACCELERATE_USE_DEEPSPEED=true"), ("machine", "LOCAL_WORLD_SIZE=1")]
)
def test_what_does_not_work_is_refused(told: str, more: str, run: Run, patched: Any) -> None:
    for variable in ("LOCAL_RANK=0", "RANK=0", "WORLD_SIZE=2", more):
        patched.setenv(*variable.split("="))
    code, printed = run("--model-name", "demo")
    assert (code, told in printed) == (2, True), printed


if __name__ == "__main__":
    accident(*os.environ["ACCIDENT"].split())
    sys.exit(main())
