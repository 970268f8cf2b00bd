"""Kill a run at every single thing it does to the disk, and see what the same command makes of it.

Run by test_7_kills.py in a process of its own: the libraries are imported once, and each run is a
fork of it, which takes a second instead of ten.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers  # noqa: F401

import finetune_colab as ft

KILLED = 137
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def counted(folder: Path, die: Callable[[int], bool]) -> list[int]:
    """Call `die` with the number of every change under `folder`; where it says so, all ends."""
    count = [0]

    def event(torn: str | None = None) -> None:
        count[0] += 1
        if die(count[0]):
            if torn:
                os.truncate(torn, Path(torn).stat().st_size // 2)
            os._exit(KILLED)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        changes = name in CHANGES or (name == "open" and (args[2] or 0) & WRITING)
        if changes and str(args[0]).startswith(str(folder)):
            event()

    def around(write: Callable[..., Any], position: int) -> Callable[..., Any]:
        def writes(*args: Any, **kwargs: Any) -> Any:
            event()  # these write from outside of Python, where no hook sees them
            done = write(*args, **kwargs)
            event(torn=str(args[position]))
            return done

        return writes

    torch.save = around(torch.save, 1)
    peft.peft_model.safe_save_file = around(safetensors.torch.save_file, 1)
    sys.addaudithook(hook)
    return count


def run(folder: Path, argv: Sequence[str], die: Callable[[int], bool]) -> tuple[int, str, int]:
    """One run in a fork: its exit code, what it printed, and how often it changed something."""
    printed, tally = folder.with_suffix(".out"), folder.with_suffix(".count")
    child = os.fork()
    if child == 0:
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        signal.alarm(300)  # a fork that hangs is a fault, too
        count = counted(folder, die)
        code = ft.main(list(argv))
        sys.stdout.flush()
        tally.write_text(str(count[0]))
        os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, printed.read_text(errors="replace"), int(tally.read_text()) if code == 0 else 0


def result_of(folder: Path) -> dict[str, Any]:
    """What has to be the same after every kill."""
    metrics = json.loads((folder / "model/training_visuals/training_metrics.json").read_text())
    timeless = ("train_loss", "eval_loss", "base_eval_loss", "best_step", "steps", "tokens_trained")
    with (folder / "model/training_visuals/training_metrics.csv").open() as file:
        rows = [[row["step"], row["loss"], row["eval_loss"]] for row in csv.DictReader(file)]
    adapter = (folder / "model/adapter_model.safetensors").read_bytes()
    files = sorted(str(p.relative_to(folder)) for p in (folder / "model").rglob("*"))
    return {
        "adapter": hashlib.sha256(adapter).hexdigest(),
        "metrics": {name: metrics[name] for name in timeless},
        "rows": rows,
        "files": files,
    }


def torn(folder: Path) -> list[str]:
    """What stands under a final name without being whole."""
    faults = []
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            faults += [path.name] * bool(archive.testzip())
    if (folder / "model").exists() and not (
        folder / "model/training_visuals/loss_comparison.png"
    ).exists():
        faults.append("model")
    return faults


def whole(folder: Path) -> int:
    paths = folder.glob("checkpoints/*/checkpoint-*")
    return sum(isinstance(ft.verified(path), ft.Checkpoint) for path in paths)


def sweep(place: Path, argv: Sequence[str], start: Path, share: float = 1.0) -> dict[str, Any]:
    """A kill at every change that an undisturbed run makes, or at the last share of them."""

    def fresh(name: str) -> Path:
        folder = place / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        return folder

    undisturbed = fresh("undisturbed")
    code, printed, changes = run(undisturbed, argv, lambda _: False)
    assert code == 0, printed
    expected = result_of(undisturbed)

    def case(number: int) -> str:
        folder = fresh(f"case-{number}")
        code, printed, _ = run(folder, argv, lambda count: count == number)
        if code != KILLED:
            return f"{number}: not killed, exit code {code}"
        before, faults = whole(folder), torn(folder)
        code, printed, _ = run(folder, argv, lambda _: False)
        if code or faults or result_of(folder) != expected:
            return f"{number}: exit code {code}, torn {faults}, after {before} whole\n{printed[-2000:]}"
        if before and "Resume" not in printed:
            return f"{number}: {before} whole checkpoints, and none was taken up\n{printed[-2000:]}"
        shutil.rmtree(folder)
        return ""

    with ThreadPoolExecutor(2) as pool:
        killed = range(changes - int(share * changes) + 1, changes + 1)
        found = list(pool.map(case, killed))
    return {"changes": len(killed), "faults": [fault for fault in found if fault]}


def often(place: Path, argv: Sequence[str], dataset: Path, kills: int, seed: int) -> dict[str, Any]:
    """One run that is killed again and again, at random."""
    chance = random.Random(seed)
    results = []
    for name, left in (("undisturbed", 0), ("killed", kills)):
        folder = place / f"often-{name}"
        folder.mkdir(parents=True)
        shutil.copy(dataset, folder / "dataset.csv")
        done = 0
        while True:
            last = chance.randint(1, 60) if done < left else 0
            code, printed, _ = run(folder, argv, lambda count, last=last: count == last)
            if code == 0:
                break
            assert code == KILLED, printed
            done += 1
        results.append(result_of(folder))
    return {"kills": done, "same": results[0] == results[1]}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork with more would wait for threads that it does not have
    place, argv = Path(sys.argv[1]), sys.argv[2:]
    dataset = place / "dataset.csv"
    os.chdir(tempfile.mkdtemp(dir=place))
    flags = ("--dataset-path", str(dataset))
    ft.main([*argv, *flags])  # imports all that a run needs, and leaves it to the forks
    (place / "start").mkdir()
    shutil.copy(dataset, place / "start" / "dataset.csv")
    plain = [*argv, "--eval-answers", "0"]
    report = sweep(place, plain, place / "start")
    # the questions at its end, asked of the finished run: what comes after it is saved once more
    report["asking"] = sweep(place / "asking", argv, place / "undisturbed", share=0.6)
    argv = plain
    steps = argv.index("--max-steps") + 1
    longer = [*argv[:steps], "20", *argv[steps + 1 :]]
    report["often"] = often(place, longer, dataset, 20, seed=3)
    print(json.dumps(report))
