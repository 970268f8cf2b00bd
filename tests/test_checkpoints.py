"""A checkpoint counts only when it is whole, and a resumed run ends as if nothing had happened.

Runs are stopped, killed, damaged on disk and starved of room; the same command ends the same.
"""

import builtins
import errno
import gc
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PAIRS, Run, at_step, call, in_words, metrics, signal_at, sweep, write_workbook
from kill_rig import is_whole
from safetensors import SafetensorError
from seams import ROOT
from tables import cases
from transformers import PreTrainedTokenizerBase

FLAGS = "--max-steps 5 --save-steps 1 --eval-steps 3 --batch-size 4 --gradient-accumulation-steps 2 --learning-rate 1e-2 --eval-answers 0".split()
OVERSHOOTING = "--learning-rate 0.1 --lr-scheduler constant --eval-steps 1".split()
ADAPTER, COMMIT, STATE = "adapter_model.safetensors", "COMMIT.json", "trainer_state.json"

Go = Callable[..., Any]
Begin = Callable[[str], Path]
Faults = pytest.MonkeyPatch  # of the system
Act = Callable[..., object]  # done to a working folder or the system, with what mends it
Spoil = str | Callable[[Path], object]  # done to a file or a folder


@pytest.fixture
def go(small_phi: Path, run: Run) -> Go:
    """The command of all these runs, maybe with Ctrl+C in a step; its code, its text, and the steps that it took."""

    def go(*flags: object, stop: int = 0, model: Path = small_phi) -> Any:
        real, steps = torch.optim.AdamW.step, []
        with pytest.MonkeyPatch.context() as patch:
            counted = lambda *args, **how: (steps.append(1), real(*args, **how))[1]  # noqa: E731
            patch.setattr(torch.optim.AdamW, "step", counted)
            signal_at(patch, stop)
            code, text = run("--model-name", model, *FLAGS, *flags)
        return SimpleNamespace(code=code, text=in_words(text), steps=len(steps))

    return go


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_phi: Path) -> dict[str, Path]:
    """One is done; the other was interrupted at step 3, and its checkpoints 2 and 3 are here."""
    homes = {name: tmp_path_factory.mktemp(name) for name in ("done", "here")}
    for home, stop, code in ((homes["done"], 0, 0), (homes["here"], 3, 130)):
        write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
        (home / "base").symlink_to(small_phi)
        (home / "undisturbed").symlink_to(homes["done"])
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, stop)
            assert call(home, "--model-name", small_phi, *FLAGS) == code
    assert names(place(homes["here"])) == {"checkpoint-2", "checkpoint-3"}
    gc.freeze()  # a third of a short run's time is a search for garbage in the libraries
    return homes | {"fresh": homes["here"]}


@pytest.fixture
def begin(runs: dict[str, Path], folder: Path) -> Begin:
    """The working folder, with a copy of the finished run, of the stopped one, or of the data."""

    def begin(start: str) -> Path:
        left_out = shutil.ignore_patterns(*["checkpoints", "logs"] * (start == "fresh"))
        return Path(shutil.copytree(runs[start], folder, True, left_out, dirs_exist_ok=True))

    return begin


def assert_as_undisturbed(home: Path) -> None:
    """The same adapter, and figures of the whole run, whatever became of it in between."""
    assert adapter(home) == adapter(home / "undisturbed")
    mine, theirs = metrics(home), metrics(home / "undisturbed")
    for name in ("train_loss", "eval_loss", "base_eval_loss", "best_step", "tokens_trained"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name  # C15
    mine, theirs = ((home / one / "adapter_config.json").read_bytes() for one in ("model", "undisturbed/model"))
    assert mine == theirs, "peft might run what a foreign one names"
    assert modes(home) == {0o666}


def place(home: Path = Path(), step: int = 0) -> Path:
    """The folder of a run's checkpoints, or one of them."""
    (run,) = (home / "checkpoints").glob("**/" + "[0-9a-f]" * 12)
    return run / f"checkpoint-{step}" if step else run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def adapter(home: Path = Path()) -> bytes:
    return (home / "model" / ADAPTER).read_bytes()


def modes(home: Path) -> set[int]:
    """The permissions of what a person takes away, without what the umask forbids."""
    outputs = [home / "fine_tuned_model.zip", *(home / "model").rglob("*.*")]
    os.umask(umask := os.umask(0o022))
    return {path.stat().st_mode & 0o777 | umask & 0o666 for path in outputs if path.is_file()}


def spoil(path: Path, how: Spoil) -> None:
    if callable(how):
        how(path)
        return
    data, half = path.read_bytes(), path.stat().st_size // 2
    path.unlink()
    if how == "flip":
        path.write_bytes(data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
    elif how != "lose":  # blank: as a disk leaves the end of a file that lost power
        path.write_bytes(data[:half] + bytes(half) * (how == "blank"))


def record_of(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / COMMIT).read_text())["record"])


def seal(checkpoint: Path, **changes: Any) -> None:
    """Vouch for a changed record as the script does; `more` is about files."""
    record = record_of(checkpoint)
    record["files"] |= changes.pop("more", {})
    data = json.dumps(record := record | changes, sort_keys=True).encode()
    (checkpoint / COMMIT).write_text(json.dumps({"sha256": hashlib.sha256(data).hexdigest(), "record": record}))


def reseal(checkpoint: Path, **changes: Any) -> None:
    """Vouch for what is in the folder now, as if it had been saved like this."""
    data = {name: (checkpoint / name).read_bytes() for name in names(checkpoint) - {COMMIT}}
    seal(checkpoint, files={name: [len(one), hashlib.sha256(one).hexdigest()] for name, one in data.items()}, **changes)


def odd_commit(change: bytes | dict[str, Any]) -> Spoil:
    return lambda path: (path / COMMIT).write_bytes(change) if isinstance(change, bytes) else seal(path, **change)


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


def edit(folder: Path, name: str, **more: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    reseal(folder)


def other_versions(folder: Path) -> None:
    edit(folder, STATE, of_the_future=1)
    reseal(folder, stats=record_of(folder)["stats"] | {"versions": "transformers 6.7.8"})


def give_zip(home: Path, _: Faults, __: ExitStack, kind: str = "") -> None:
    """What a person may name, with odd content, or odd itself."""
    content, archive = HOSTILE.get(kind, (NOTHING, NOTHING))
    made, path = Path(shutil.copytree(place(home, 2), home / "made")), home / "given"
    spoil(made, content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for one in names(made):
            file.write(made / one, f"made/{one}")
        for name in ("../../beyond", "/tmp/beyond", "__MACOSX/._optimizer.pt"):  # not asked for
            file.writestr(name, "evil")
    spoil(path, archive)
    shutil.rmtree(made)


def with_link(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        member = zipfile.ZipInfo("optimizer.pt")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")


def garbled(path: Path) -> None:  # it is no checksum that fails then, but zlib
    with zipfile.ZipFile(path) as archive:
        begins = archive.getinfo(f"made/{ADAPTER}").header_offset + 30 + len(f"made/{ADAPTER}")
    path.write_bytes((data := path.read_bytes())[:begins] + b"\xff" * 100 + data[begins + 100 :])


def older_here(home: Path, *_: object) -> None:
    """And what was left unfinished in the mirror, which goes."""
    shutil.copytree(home / "drive", home / "checkpoints", ignore=shutil.ignore_patterns("checkpoint-3"))
    for name in ("removed-1", "checkpoint-2.partial"):
        (home / "drive" / place(home).name / name).mkdir()


def other_inputs(home: Path, *_: object) -> None:
    """The same model in another folder, another model, and edited data."""
    for name in ("copy", "other"):
        shutil.copytree(home / "base", home / name)
    spoil(next((home / "other").glob("*.safetensors")), "flip")
    write_workbook(home / "edited.xlsx", [("question", "answer"), *PAIRS[:-1], ("Is this new?", "Yes, it is.")])


def fail(_: Path, faults: Faults, __: ExitStack, name: str, error: str, where: str = "", times: str = "1000") -> None:
    """A function fails for paths with this in them, so many times."""
    wrong = FULL if error == "FULL" else OSError(code := getattr(errno, error), os.strerror(code))
    left = iter(range(int(times)))

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*args: Any, **how: Any) -> Any:
            if any(where in str(arg) for arg in args[:2]) and next(left, None) is not None:
                real(*args, **how).close() if name == "open" else None  # a beginning is there
                raise wrong
            return real(*args, **how)

        return fails

    for owner in OWNERS[name]:
        faults.setattr(owner, name, failing(getattr(owner, name)))
    faults.setattr(time, "sleep", lambda _: None)  # the pauses between tries


def no_file_above(_: Path, __: Faults, mends: ExitStack, size: str) -> None:
    """The disk of a person with a quota, in effect."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), usual[1]))
    mends.callback(resource.setrlimit, resource.RLIMIT_FSIZE, usual)


def at_commit(faults: Faults, act: Callable[[Path], object]) -> None:
    """Act on the folder of each checkpoint when its COMMIT.json is about to get its name."""
    real = os.replace

    def replace(source: Any, target: Any, **how: Any) -> None:
        if Path(target).name == COMMIT:
            act(Path(target).parent)
        real(source, target, **how)

    faults.setattr(os, "replace", replace)


def on(how: Spoil) -> Act:
    """Done to a file or folder with the checkpoints, or to the folder of all of them."""
    return lambda home, _, __, name="": spoil(place(home) / name, how)


# fmt: off
FULL = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
NOTHING: Any = lambda *_: None  # noqa: E731
OWNERS: dict[str, list[Any]] = {"open": [builtins, io], "rename": [os], "rmtree": [shutil], "copyfile": [shutil],
                                "write": [zipfile.ZipFile], "save_pretrained": [PreTrainedTokenizerBase]}
HOSTILE: dict[str, tuple[Spoil, Spoil]] = {  # what is odd in a named checkpoint, and about its zip
    "bomb": (lambda made: (made / "optimizer.pt").write_bytes(bytes(50_000_000)), NOTHING),
    "link": (lambda made: (made / "optimizer.pt").unlink(), with_link), "garbled": (NOTHING, garbled), "cut": (NOTHING, "cut"),
    "outside": (odd_commit({"more": {"../../beyond": [4, hashlib.sha256(b"evil").hexdigest()]}}), NOTHING),
    "huge": (odd_commit({"more": {"optimizer.pt": [10**15, ""]}}), NOTHING), "no-zip": (NOTHING, lambda path: path.write_bytes(b"PK\x03\x04 rubbish")),
}
COMMITS = (
    b"", b"\xff\xfe", b"null", b"5", b'["record"]', b'{"record": 1}', b"[" * 100_000, {"files": 5}, {"step": "x"}, {"step": None},
    {"identity": [1]}, {"stats": None}, {"stats": {}}, {"stats": {"foo": 1}}, {"more": {"../../../dataset.xlsx": [1, "0"]}},
    {"more": {ADAPTER: None}}, {"more": {ADAPTER: [1]}},
)
ACTS: dict[str, Act] = {  # with the words that follow in scenes.txt
    **{how: on(how) for how in ("cut", "blank", "lose", "flip")}, "mkdir": on(Path.mkdir), "give-zip": give_zip,
    "fail": fail, "no-file-above": no_file_above, "older-here": older_here, "other-inputs": other_inputs,
    "torn-result": lambda home, *_: [(earlier := home / "model.previous").mkdir(), (earlier / "mine.txt").touch(), (home / "model" / ADAPTER).write_bytes(b"torn")],
    "commit": lambda home, _, __, number: odd_commit(COMMITS[int(number)])(place(home, 3)),
    "other-run": lambda home, *_: place(home).rename(home / "checkpoints/other"),  # it is looked at, but is not the one of this command
    "copy-to-5": on(lambda run: shutil.copytree(run / "checkpoint-3", run / "checkpoint-5")),
    "of-another-run": on(lambda path: reseal(path, step=5, identity=record_of(path)["identity"] | {"SEED": 8})),
    "pickle": on(lambda path: path.write_bytes(b"\x80\x04.")), "code": on(lambda path: [torch.save(Canary(), path), reseal(path.parent)]),
    "move": on(lambda path: path.symlink_to(Path(shutil.move(path, "moved")).absolute())),  # to a larger disk, say
    "notes": on(lambda path: [(path / ".ipynb_checkpoints").mkdir(), (path / "desktop.ini").touch()]),
    "dates": on(lambda run: [os.utime(run / f"checkpoint-{n}", (t, t)) for n, t in ((2, 4e9), (3, 1))]),
    "foreign-settings": on(lambda path: edit(path, "adapter_config.json", auto_mapping={"parent_library": "os", "base_model_class": "abort"})),
    "other-versions": on(other_versions),
    "no-logs": on(lambda logs: [shutil.rmtree(logs), logs.touch()]), "no-model": lambda home, *_: shutil.rmtree(home / "model"),
    "to-folder": lambda home, *_: shutil.move(place(home), home / "checkpoints/moved" / place(home).name),
    "to-drive": lambda home, *_: (home / "checkpoints").rename(home / "drive"),  # a new machine, with the mirror alone
    "unmounted-at-1": lambda home, faults, _: [(home / "drive").mkdir(), at_step(faults, 1, lambda: shutil.rmtree(home / "drive")), faults.setattr(time, "sleep", NOTHING)],
    "give-link": lambda home, *_: (home / "given").symlink_to(place(home, 2)),
    "give-run": lambda home, *_: [shutil.rmtree(place(home, 3)), place(home).rename(home / "given")],
    "torn-at-4": lambda home, faults, _: at_step(faults, 4, lambda: spoil(place(home, 3) / "optimizer.pt", "lose")),
    "signal": lambda _, faults, __, step, name="SIGINT": signal_at(faults, int(step), getattr(signal, name)),
    "later-at-2": lambda _, faults, __: at_step(faults, 2, lambda: faults.setattr(time, "monotonic", lambda real=time.monotonic: real() + 3)),
    "no-hup": lambda _, __, mends: mends.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN)),
    "end-while-saving": lambda _, faults, __: at_commit(faults, lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    "old-dates": lambda _, faults, __: at_commit(faults, lambda path: [os.utime(file, (1, 1)) for file in path.iterdir()]),
}
FILES = ("rng_state.pth", "optimizer.pt", "scheduler.pt", ADAPTER, STATE, "adapter_config.json", COMMIT)
OTHER, ROOM = "here --resume-from-checkpoint checkpoints/other/checkpoint-3", r"[\d.,]+ MB\b.*[\d.,]+ MB\b.*"
DECIDING = {flags: row.split(" | ")[1] for flags, row in cases("deciding").items()}
FIRST = ("--lora-alpha 8", [*DECIDING][-1])
SCENES = {name: row.partition(" | ")[2] for name, row in cases("scenes").items()} | {
    **{f"named, {how} {name}": f"{how} checkpoint-3/{name} + other-run | {OTHER} | 2 0 | - | {re.escape(name) if (name, how) != (COMMIT, 'lose') else 'other'}"
       for name in FILES for how in ("lose", "cut", "flip", "blank")},
    **{f"commit {str(change)[:60]}": f"commit {i} + other-run | {OTHER} | 2 0 | - | {COMMIT}" for i, change in enumerate(COMMITS)},
    **{f"not {flags}": f"other-inputs + other-run | {OTHER} {flags} | 2 0 | - | {said}" for flags, said in DECIDING.items() if said != "-"},
}
# fmt: on


def do(acts: str, home: Path, faults: Faults, mends: ExitStack) -> None:
    for name, *words in (act.split() for act in acts.split(" + ") if act != "-"):
        ACTS[name](home, faults, mends, *words)


# These are in scenes.txt: C4, C5, C6, C7, C8, C9, C10, C12, C13, C14, C16, C17, C23, D1, D2, D3, D5, D7, D8, D10, D11,
# S1, S2, S3, S4, S6, V1, V2, V7
@pytest.mark.parametrize(
    "scene", [pytest.param(x, id=n, marks=[pytest.mark.sweep] * (" sweep |" in x)) for n, x in SCENES.items()]
)
def test_whatever_goes_wrong_the_same_command_ends_the_same(scene: str, begin: Begin, go: Go) -> None:
    acts, flags, numbers, left, said = scene.split(" | ")
    code, steps, *then = map(int, numbers.split())
    start, *more = flags.removesuffix("sweep").split()
    with ExitStack() as mends, Faults.context() as faults:
        do(acts, home := begin(start), faults, mends)
        files = {path: path.read_bytes() for path in home.rglob("mine.txt")}
        handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        went = go(*more)
        assert handlers == {name: signal.getsignal(name) for name in handlers}
    assert (went.code, went.steps) == (code, steps), went.text
    said = said.replace("ROOM", ROOM)
    assert re.search("" if said == "-" else said, went.text), went.text
    assert "Traceback" not in went.text
    assert names(place(home)) == set(re.sub(r"(?<!\S)(?=\d)", "checkpoint-", left.strip("-")).split())
    if then:
        assert not (home / "model").exists()
        assert go(*more).steps == then[0]
    if code == 0 or then:
        assert_as_undisturbed(home)
    assert files == {path: path.read_bytes() for path in files}, "what is not of this run"
    assert not [*home.parent.rglob("beyond"), *home.glob("canary"), *Path("/tmp").glob("beyond")]
    found = [*home.glob(f"*/{'[0-9a-f]' * 12}/checkpoint-*[0-9]"), *home.glob("moved")]
    assert all(is_whole(path) for path in found if path.is_dir()), "a part under a final name"


def test_log_and_clock_go_on_also_off_the_main_thread(begin: Begin, go: Go, patched: pytest.MonkeyPatch) -> None:
    """And each picture is drawn once."""
    home, drawn = begin("here"), list[str]()
    assert go(stop=1).code == 130
    savefig = lambda _, file, **__: [drawn.append(Path(file).name.split(".")[0]), Path(file).touch()]  # noqa: E731
    patched.setattr("matplotlib.figure.Figure.savefig", savefig)
    with ThreadPoolExecutor(1) as thread:  # where no signal can be caught: S9
        went = thread.submit(go, "--eval-answers", 1).result()
    assert went.code == 0
    assert "Ctrl+C" in went.text
    assert sorted(drawn) == sorted(set(drawn)) and drawn
    assert_as_undisturbed(home)
    logs = "".join(path.read_text(encoding="utf-8") for path in sorted((home / "logs").iterdir()))
    assert re.findall(r"\bstep\W+(\d+)\W+loss\b", logs) == ["1", "2", "3", "4", "5"]
    assert metrics(home)["train_seconds"] > record_of(place(home, 5))["stats"]["seconds"] / 2


def test_the_best_checkpoint_is_kept_and_goes_with_every_later_one(workbook: Path, phi_folder: Path, go: Go) -> None:
    train = partial(go, *OVERSHOOTING, model=phi_folder)
    assert train(stop=4).code == 130
    shutil.copytree("checkpoints", "kept", ignore=shutil.ignore_patterns("checkpoint-[123]"))
    assert train().code == 0
    best, kept = metrics()["best_step"], adapter()
    assert best < 4, "the case is not the one meant"
    assert names(place()) == {f"checkpoint-{step}" for step in (best, 4, 5)}
    assert kept == (place(step=best) / ADAPTER).read_bytes()
    assert train("--no-keep-best").steps == 0
    assert kept != adapter() == (place(step=5) / ADAPTER).read_bytes(), "the last one can still be had"
    shutil.rmtree("checkpoints")
    Path("kept").rename("checkpoints")
    assert names(place()) == {"checkpoint-4"}
    assert train().steps == 1
    assert adapter() == kept, "a checkpoint alone is not enough"


@pytest.mark.parametrize("minutes, saved", [(0.1, [1, 2, 3, 4, 5]), (1, [5])])
def test_checkpoints_come_by_the_clock_too(minutes: float, saved: list[int], workbook: Path, go: Go) -> None:
    real, clock, found = time.monotonic, [0], []
    with pytest.MonkeyPatch.context() as faults:
        at_commit(faults, lambda path: found.append(int(path.name.split("-")[1])))
        faults.setattr(time, "monotonic", lambda: real() + clock[0])
        for step in range(1, 6):  # of ten seconds
            at_step(faults, step, lambda: clock.append(clock.pop() + 10))
        assert go("--save-steps", 100, "--validation-fraction", 0, "--save-minutes", minutes).code == 0
    assert found == saved


def test_a_run_in_4_bits_goes_on_and_ends_the_same(workbook: Path, phi_folder: Path, go: Go) -> None:
    train = partial(go, "--max-steps", 2, "--load-in-4bit", model=phi_folder)
    assert train().code == 0
    expected = adapter()
    shutil.rmtree("checkpoints")
    assert [train(stop=1).code, train().steps] == [130, 1]
    assert adapter() == expected


@pytest.mark.parametrize("flags", [x if x in FIRST else sweep(x) for x in DECIDING])
def test_only_what_decides_the_result_makes_a_new_run(flags: str, begin: Begin, go: Go) -> None:
    """C18, C19, C20, C21, C22."""
    other_inputs(home := begin("here"))
    old, before = place(home), {path: path.read_bytes() for path in place(home).glob("*/*")}
    went = go(*flags.split())
    assert went.code == 0
    new = names(home / "checkpoints") - {old.name}
    if DECIDING[flags] == "-":
        assert (went.steps, new) == (2, set())
    else:
        assert re.search(rf"{old.name}.*{DECIDING[flags]}", went.text)
        assert before == {path: path.read_bytes() for path in old.glob("*/*")}, "the old one is left alone"
        assert record_of(max((home / "checkpoints" / new.pop()).glob("checkpoint-*")))["step"] > 4
        assert not new


def test_the_command_with_a_named_checkpoint_goes_on_and_an_archive_is_enough(begin: Begin, go: Go) -> None:
    """What it has come to is not begun again."""
    do("give-zip", home := begin("here"), Faults(), ExitStack())
    shutil.rmtree(home / "checkpoints")
    train = partial(go, "--resume-from-checkpoint", "given", "--archive-checkpoints")
    for step in (3, 4):
        went = train(stop=1)
        assert (went.code, went.steps) == (130, 1)
        assert f"{step} of 5" in went.text
    assert [train().steps, train().steps] == [1, 0]
    assert_as_undisturbed(home)
    (place(home) / "checkpoint-4.zip").rename(home / "given")
    shutil.rmtree(home / "checkpoints")
    assert train().steps == 1
    assert_as_undisturbed(home)
    assert not [*home.parent.rglob("beyond"), *Path("/tmp").glob("beyond")]


# the length, and the kills: of each change while three checkpoints and the outputs are saved; of one run
KILLS = [("short", {"writing": 20, "often": 5}), ("long", {"writing": 80, "asking": 40, "often": 20})]


@pytest.mark.parametrize("length, kills", [KILLS[0], sweep(*KILLS[1])])
def test_a_kill_changes_nothing(length: str, kills: dict[str, int], tmp_path: Path, small_phi: Path) -> None:
    """C1, C2, C3, C10, C11, O1: one at each kind of change, or at every one; S7: some in one run, at random."""
    (tmp_path / "start").mkdir()
    write_workbook(tmp_path / "start/dataset.xlsx", [("question", "answer"), *PAIRS[:14]])
    flags = "--max-steps 3 --save-steps 1 --eval-steps 2 --learning-rate 1e-2 --eval-answers 1 --max-tokens 2"
    rig = [sys.executable, ROOT / "tests/kill_rig.py", tmp_path, length, "--model-name", small_phi, *flags.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(rig, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name, least in kills.items():
        assert report[name]["faults"] == []
        assert report[name]["kills"] >= least
