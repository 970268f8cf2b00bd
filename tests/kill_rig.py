"""Kill a run, a fork of this process, at changes it makes to the disk; the same command must end the same."""

import gc
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import torch
from conftest import ONE_DOT
from matplotlib.figure import Figure
from seams import main

KILLED = 137
FORKING = threading.Lock()
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def is_whole(folder: Path) -> bool:
    """Whether the files of a checkpoint are those that its COMMIT.json names, to the bit."""
    try:
        sealed = json.loads((folder / "COMMIT.json").read_text())
        named = sealed["record"]["files"]
        there = {name: (folder / name).read_bytes() for name in named}
    except (OSError, ValueError):
        return False
    files = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in there.items()}
    record = json.dumps(sealed["record"], sort_keys=True).encode()
    return named == files and sealed["sha256"] == hashlib.sha256(record).hexdigest()


def die_at(number: int, folder: Path) -> list[str]:
    """End this process at its change of this number under `folder`; note the kinds of all changes."""
    kinds: list[str] = []

    def event(kind: str, path: str) -> None:
        name = Path(path).relative_to(folder)  # kinds of files: where, without what is random, and the ending
        ending = ".pt" if name.suffix in (".pth", ".bin") else name.suffix
        kinds.append(f"{kind} " + re.sub(r"(?<=^\.finetune).*|[0-9]+", "#", name.parts[0]) + f" {ending}")
        if len(kinds) == number:
            if kind == "torn":
                os.truncate(path, Path(path).stat().st_size // 2)
            os._exit(KILLED)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if name in CHANGES and (path := str(args[0])).startswith(str(folder)):
            writes = (args[2] or 0) & WRITING if name == "open" else os.path.lexists(path) != (name == "os.mkdir")
            event(name, path) if writes else None  # a file is read, or the attempt must fail

    def around(write: Callable[..., Any]) -> Callable[..., Any]:
        def writes(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            event("begin", str(path))  # written from outside of Python: no hook sees it
            write(content, path, *args, **kwargs)
            event("torn", str(path))

        return writes

    torch.save = around(torch.save)
    peft.peft_model.safe_save_file = around(peft.peft_model.safe_save_file)
    sys.addaudithook(hook)
    return kinds


def run(folder: Path, argv: list[str], last: int = 0) -> tuple[int, str, list[str], int]:
    """One run in a fork: exit code, what it printed, the kinds of its changes, steps taken."""
    printed = folder.with_suffix(".out")
    with FORKING:  # filelock refuses a fork during a fork
        child = os.fork()
    if child == 0:
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.dup2(out, 1), 2)
        os.chdir(folder)
        signal.alarm(300)  # a fork that hangs is a fault, too
        steps, real = [], torch.optim.AdamW.step
        torch.optim.AdamW.step = lambda *args: (steps.append(1), real(*args))[1]
        kinds = die_at(last, folder)
        code = main(argv)
        print(json.dumps([kinds, len(steps)]), flush=True)
        os._exit(code)
    code, said = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed.read_text(errors="replace")
    return code, said, *(json.loads(said.splitlines()[-1]) if code == 0 else ([], 0))


def result_of(model: Path) -> list[Any]:
    """What has to be the same after every kill."""
    metrics = json.loads((model / "training_visuals/training_metrics.json").read_text())
    timeless = "train_loss eval_loss base_eval_loss best_step steps tokens_trained".split()
    same = [model / name for name in ("adapter_model.safetensors", "training_visuals/training_metrics.csv")]
    files = sorted(str(path.relative_to(model)) for path in model.rglob("*"))
    return [[metrics[name] for name in timeless], files, *(path.read_bytes() for path in same)]


def fresh(start: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(start, folder))


def sweep(place: Path, argv: list[str], start: Path, one_of_a_kind: bool) -> dict[str, Any]:
    """A kill at every change that an undisturbed run makes, or at the middle one of each kind."""
    code, printed, changes, steps = run(fresh(start, place / "undisturbed"), argv)
    assert code == 0, printed
    expected = result_of(place / "undisturbed/model")

    def case(number: int) -> str:
        folder = fresh(start, place / f"case-{number}")
        killed, *_ = run(folder, argv, number)
        torn = [path.name for path in folder.glob("*.zip") if zipfile.ZipFile(path).testzip()]
        if (model := folder / "model").exists():  # what stands under a final name has to be whole
            named = json.loads((model / "run.json").read_text())["files"]
            torn += [name for name in named if not (model / name).is_file()]
        whole = filter(is_whole, folder.glob("checkpoints/*/checkpoint-*"))
        before = max((int(path.name.split("-")[1]) for path in whole), default=0)
        code, printed, _, again = run(folder, argv)
        same = code == 0 and result_of(model) == expected
        if killed != KILLED or not same or torn or again != max(steps - before, 0):
            return f"{changes[number - 1]}: {killed=} {code=} {same=} {torn=} {before=} {again=}\n{printed[-2000:]}"
        shutil.rmtree(folder)
        return ""

    kinds = {kind: [n for n, k in enumerate(changes, 1) if k == kind] for kind in changes}
    chosen = [same[len(same) // 2] for same in kinds.values()] if one_of_a_kind else range(1, len(changes) + 1)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(case, chosen))
    return {"kills": len(found), "faults": [*filter(None, found)]}


def often(place: Path, argv: list[str], start: Path, kills: int) -> dict[str, Any]:
    """One run that is killed again and again, at random."""
    chance, results, done = random.Random(3), [], 0
    for name, wanted in (("undisturbed", 0), ("killed", kills)):
        folder, code = fresh(start, place / f"often-{name}"), KILLED
        while code:  # no change has the number 0
            code, printed, *_ = run(folder, argv, chance.randint(1, 60) if done < wanted else 0)
            assert code in (0, KILLED), printed
            done += code == KILLED
        results.append(result_of(folder / "model"))
    return {"kills": done, "faults": ["another end"] * (results[0] != results[1])}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork with more would wait for threads that it does not have
    Figure.savefig = lambda _, target, **__: Path(target).write_bytes(ONE_DOT)
    place, short, argv = Path(sys.argv[1]), sys.argv[2] == "short", sys.argv[3:]
    os.chdir(place)
    main([*argv, "--dataset-path", "start/dataset.xlsx"])  # imports all that forks need
    gc.freeze()  # a collection in a fork would copy all of it
    start, plain = place / "start", [*argv, "--eval-answers", "0"]
    report = {"writing": sweep(place, plain, start, short)}
    if not short:  # the questions at the end of a finished run: what comes after is saved once more
        report["asking"] = sweep(place / "asking", argv, place / "undisturbed", False)
    report["often"] = often(place, [*plain, "--max-steps", "8" if short else "20"], start, 5 if short else 20)
    print(json.dumps(report))
