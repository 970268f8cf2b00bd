"""Section 11, before training: what would fail later is refused in the first seconds, all at once."""

from __future__ import annotations

import collections
import errno
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from conftest import ROOT, in_words

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
Usage = collections.namedtuple("Usage", "total used free")
Memory = collections.namedtuple("Memory", "total available")


@pytest.fixture
def cfg(phi_folder: Path, workbook: Path) -> ft.Config:
    return ft.Config(MODEL_NAME=str(phi_folder), OUTPUT_DIR="model")


def told(cfg: ft.Config) -> str:
    return in_words(" ".join(ft.preflight(cfg)))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def as_nobody() -> Iterator[None]:
    """The superuser may do anything, so that permissions are tested as somebody else."""
    mine = os.geteuid()
    ft.preflight(ft.Config())  # has all libraries loaded, which somebody else may not read
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


# -- All at once


def test_nothing_is_found_where_all_is_well(cfg: ft.Config, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert ft.preflight(cfg) == []
    assert sorted(folder.rglob("*")) == before


def test_everything_is_found_in_one_message(
    cfg: ft.Config, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ft.FLOORS, "pyyaml", "99")
    monkeypatch.setitem(ft.FLOORS, "openpyxl", "98.7")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = "--output-dir . --checkpoint-dir /proc/none --report-to trackio".split()
    code, text = run("--model-name", cfg.MODEL_NAME, *flags)
    text = in_words(text)
    assert code == 2
    assert text.count("Stopped") == 1
    assert re.search(r"openpyxl 3\S+ \(98.7 or newer\), pyyaml 6\S+ \(99 or newer\)", text)
    assert "pip install -r requirements-finetune.txt" in text
    assert "REPORT_TO trackio is not installed" in text
    assert "OUTPUT_DIR '.' cannot be replaced" in text
    assert "/proc/none cannot be written to" in text


def test_the_model_its_optimizer_memory_and_disk_are_judged_together(
    cfg: ft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    vars(cfg).update(LORA_TARGETS=["q_proj", "o_proj"], OPTIMIZER="paged_adamw_8bit")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 1))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(10**6, 10**6))
    monkeypatch.setattr(ft, "device_here", lambda cfg: ("x", ft.choose_device(cfg, "cpu")))
    layers, optimizer, memory, disk = ft.preflight(cfg)
    assert "LORA_TARGETS names o_proj" in layers
    assert "needs an NVIDIA GPU" in optimizer
    assert "this computer has 0.0 GB" in memory
    assert "is too full" in disk


def test_check_says_each_finding_and_reads_the_data_all_the_same(cfg: ft.Config, run: Run) -> None:
    flags = ["--lora-targets", "o_proj", "--checkpoint-dir", "/proc/none"]
    code, text = run("check", "--model-name", cfg.MODEL_NAME, *flags)
    assert code == 1
    assert text.count("Problem    ") == 2
    assert "24 of 24 filled rows" in text
    assert "Ready" not in text


# -- Packages


def test_the_floors_are_those_of_the_requirements() -> None:
    source = (ROOT / "finetune_colab.py").read_text(encoding="utf-8")
    head = re.search(r"# /// script\n(.*?)# ///", source, re.DOTALL)
    assert head
    script = tomllib.loads(re.sub(r"^# ?", "", head[1], flags=re.MULTILINE))
    wanted = [f"python{script['requires-python']}", *script["dependencies"]]
    assert [">=".join(floor) for floor in ft.FLOORS.items()] == wanted


@pytest.mark.parametrize(
    "version, floor, below",
    [
        (None, "1.0", True),
        ("2.9.1+cu126", "2.10", True),
        ("2.10.0+cu128", "2.10", False),
        ("2.10.0a0+git1234", "2.10", False),
        ("5.23.0", "5.6", False),
        ("3.1", "3.1.3", True),
    ],
)
def test_versions_are_compared_as_versions(version: str | None, floor: str, below: bool) -> None:
    assert ft.is_below(version, floor) is below


def test_an_old_python_and_missing_packages_are_two_messages() -> None:
    versions = dict.fromkeys(ft.FLOORS) | {"python": "3.10.4"}
    python, packages = ft.package_problems(versions)
    assert "Python 3.10.4 is too old; 3.11 or newer is needed" in python
    for name in ft.FLOORS:
        assert (f"{name} is missing" in packages) is (name not in ("python", "matplotlib"))


@pytest.mark.parametrize("command, code, stopped", [("train", 2, True), ("check", 1, False)])
def test_without_any_package_all_are_named(
    command: str, code: int, stopped: bool, folder: Path
) -> None:
    (folder / "data.csv").write_text("question,answer\nWhy?,So.\nHow?,Thus.\n")
    flags = ["--dataset-path", "data.csv"]
    done = subprocess.run(
        [sys.executable, "-S", "-I", ROOT / "finetune_colab.py", command, *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    told = in_words(done.stderr if stopped else done.stdout)
    assert done.returncode == code
    assert told.count(" is missing ") == len(ft.FLOORS) - 2
    assert "pip install -r requirements-finetune.txt" in told
    assert [path.name for path in folder.iterdir()] == ["data.csv"]


def test_a_broken_matplotlib_costs_the_pictures_and_nothing_else(
    cfg: ft.Config, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(ft.FLOORS, "matplotlib", "99")
    code, text = run("--model-name", cfg.MODEL_NAME, "--max-steps", 1)
    assert code == 0
    assert "there will be no pictures" in in_words(text)
    assert (folder / "fine_tuned_model.zip").is_file()
    assert (folder / "model" / "training_visuals" / "training_metrics.json").is_file()


def test_what_apples_gpu_cannot_do_is_left_to_the_processor_before_torch_is_there() -> None:
    code = (
        "import os, sys, finetune_colab as ft\n"
        "ft.COMMANDS['train'] = lambda cfg: print('torch' in sys.modules,"
        " os.environ['PYTORCH_ENABLE_MPS_FALLBACK']) or 0\n"
        "ft.main([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False 1\n"


# -- Folders


def test_a_folder_that_only_others_may_write_to_is_refused(place: Path) -> None:
    place.chmod(0o555)
    cfg = ft.Config(OUTPUT_DIR=f"{place}/model", CHECKPOINT_DIR=f"{place}/new/checkpoints")
    with as_nobody():
        found = told(cfg)
    assert f"{place} cannot be written to: Permission denied" in found
    assert f"{place}/new/checkpoints cannot be written to" in found
    assert "--output-dir" in found
    assert "--checkpoint-dir" in found


def test_a_folder_that_only_others_may_look_into_is_refused(place: Path) -> None:
    (place / "model").mkdir(mode=0o000)
    place.chmod(0o777)
    with as_nobody():
        found = told(ft.Config(OUTPUT_DIR=f"{place}/model"))
    assert f"OUTPUT_DIR {place}/model cannot be looked into: Permission denied" in found


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_folder_is_written_to_in_earnest(
    fails: str, cfg: ft.Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, fails, broken)
    before = sorted(folder.rglob("*"))
    assert "cannot be written to: Input/output error" in told(cfg)
    assert sorted(folder.rglob("*")) == before


# -- One run at a time

HOLD = """
import sys, time
from pathlib import Path
import finetune_colab as ft
with ft.only_run_in(Path(sys.argv[1]), "OUTPUT_DIR"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Another process that is at work in a folder."""
    others = []

    def hold(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder)]
        other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        others.append(other)
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        return other

    yield hold
    for other in others:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("setting", ["OUTPUT_DIR", "CHECKPOINT_DIR"])
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(
    setting: str, cfg: ft.Config, folder: Path, run: Run, hold: Any
) -> None:
    other = hold(folder / "shared")
    flags = ["--model-name", cfg.MODEL_NAME, ft.flag(setting), "shared"]
    code, text = run(*flags)
    assert code == 2
    assert f"Another run is at work in {setting} {folder}/shared" in in_words(text)
    assert f"process {other.pid} on " in in_words(text)
    assert [path.name for path in folder.iterdir()] == ["dataset.xlsx"]
    assert run("check", *flags)[0] == 0
    other.kill()  # SIGKILL: it has no time to clear up
    other.wait()
    assert run(*flags, "--max-steps", 1)[0] == 0


def test_other_folders_are_free(cfg: ft.Config, folder: Path, hold: Any) -> None:
    hold(folder / "other")
    with ft.cleared(cfg):
        pass


def test_a_run_that_fails_lets_go_of_its_folders(cfg: ft.Config) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), ft.cleared(cfg):
            raise ZeroDivisionError


@pytest.mark.parametrize("inside", ["model", "model/deep"])
@pytest.mark.parametrize("name", [name for name in ft.PLACES if name != "OUTPUT_DIR"])
def test_nothing_else_may_lie_in_the_folder_that_is_replaced(
    name: str, inside: str, cfg: ft.Config
) -> None:
    setattr(cfg, name, inside)
    assert f"{name} {inside} lies in OUTPUT_DIR" in told(cfg)
    with pytest.raises(ft.UserError, match=f"{name} {inside} lies in"), ft.cleared(cfg):
        pass


def test_a_base_in_the_folder_that_is_replaced_is_refused(cfg: ft.Config, folder: Path) -> None:
    shutil.copytree(cfg.MODEL_NAME, folder / "model")
    cfg.MODEL_NAME = "model"
    assert "MODEL_NAME model lies in OUTPUT_DIR" in told(cfg)
    cfg.MODEL_NAME, cfg.OUTPUT_DIR = "microsoft/phi-2", "microsoft"  # a name, not a folder
    assert "lies in" not in told(cfg)


def test_a_mount_point_cannot_be_replaced() -> None:
    assert "OUTPUT_DIR '/proc' cannot be replaced" in told(ft.Config(OUTPUT_DIR="/proc"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_hindrance(
    number: int, cfg: ft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", broken)
    for _ in range(2):
        with ft.cleared(cfg):
            pass


def test_a_home_that_cannot_be_written_to_is_told(
    cfg: ft.Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with ft.cleared(cfg):
        pass
    assert "a second run in OUTPUT_DIR would not be noticed" in in_words(capsys.readouterr().out)


# -- The model's shape


def test_the_adapter_is_counted_without_the_weights(cfg: ft.Config) -> None:
    model = ft.hollow_model(cfg)
    assert model
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    layers = ft.adapted_layers(cfg, model).values()
    counted = sum(cfg.LORA_R * (layer.in_features + layer.out_features) for layer in layers)
    real = ft.add_lora(cfg, ft.load_base(cfg, ft.Device("cpu", "float32", False, "")))
    assert (counted, model.num_parameters() + counted) == real.get_nb_trainable_parameters()


def test_phi_2s_adapter_needs_less_than_two_gigabytes() -> None:
    output, checkpoints = ft.disk_needed(ft.Config(), 23_592_960)
    assert 1.5e9 < output + checkpoints < 2e9


def test_a_run_takes_no_more_room_than_was_foreseen(cfg: ft.Config, folder: Path, run: Run) -> None:
    def size(place: Path) -> int:
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())

    flags = ["--lora-r", 512, "--max-steps", 3, "--save-steps", 1]
    assert run("--model-name", cfg.MODEL_NAME, *flags)[0] == 0
    cfg.LORA_R = 512
    layers = ft.adapted_layers(cfg, ft.hollow_model(cfg)).values()  # type: ignore[arg-type]
    trainable = sum(512 * (layer.in_features + layer.out_features) for layer in layers)
    output, checkpoints = ft.disk_needed(cfg, trainable)
    assert trainable * 4 < size(folder / "model") < output / 2
    assert trainable * 12 < size(next(folder.glob("checkpoints/*/checkpoint-*"))) < checkpoints / 4


@pytest.mark.parametrize(
    "free, total, fits", [(10**12, 10**12, True), (10**8, 10**12, False), (0, 0, True)]
)
def test_a_disk_that_is_too_small_is_refused(
    free: int, total: int, fits: bool, cfg: ft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total, total - free, free))
    found = told(cfg)
    assert (found == "") is fits
    assert fits or re.search(r"needs up to 0.\d GB there, 0.1 GB are free", found)


def test_two_folders_on_one_disk_share_its_room(
    cfg: ft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, checkpoints = ft.disk_needed(cfg, 1_000_000)
    free = max(output, checkpoints)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free))
    with pytest.raises(ft.UserError, match="too full"):
        ft.refuse_full_disk(cfg, 1_000_000)
    cfg.CHECKPOINT_DIR = "/proc/none"  # another disk
    ft.refuse_full_disk(cfg, 1_000_000)


def test_what_lies_there_already_and_zips_are_counted(cfg: ft.Config, folder: Path) -> None:
    def need() -> int:
        room = [10**12]

        def usage(_: object) -> Usage:
            return Usage(10**13, 0, room[0])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", usage)
            while True:
                try:
                    ft.refuse_full_disk(cfg, 1_000_000)
                except ft.UserError:
                    return room[0]
                room[0] -= 10**9 if room[0] > 2 * 10**9 else 10**6

    one, alone = ft.checkpoint_bytes(1_000_000) / 1e6, need()
    for run, step in (("a", 1), ("a", 2), ("b", 1)):  # of this run are two at most
        place = folder / f"checkpoints/{run}/checkpoint-{step}"
        place.mkdir(parents=True)
        (place / ft.COMMIT).touch()
    assert (alone - need()) / 1e6 == pytest.approx(2 * one, abs=2)
    shutil.rmtree(folder / "checkpoints")
    cfg.ARCHIVE_CHECKPOINTS = True
    assert (need() - alone) / 1e6 == pytest.approx(4 * one, abs=2)


@pytest.mark.parametrize(
    "kind, total, available, end",
    [
        ("cpu", 10**9, 10**9, "quiet"),
        ("cpu", 10**9, 10, "warned"),
        ("cpu", 10**6, 10**6, "refused"),
        ("mps", 10**6, 10**6, "refused"),
        ("cuda", 10**6, 10**6, "quiet"),
    ],
)
def test_memory_is_judged_where_the_weights_lie(
    kind: str, total: int, available: int, end: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(total, available))
    device = ft.Device(kind, "float32", False, "")
    try:
        ft.refuse_small_memory(ft.Config(), device, 2_000_000)
        seen = "warned" if "Warning" in capsys.readouterr().out else "quiet"
    except ft.UserError as error:
        assert "T4 GPU" in str(error)
        seen = "refused"
    assert seen == end


def test_a_model_that_cannot_be_had_is_left_to_the_one_who_loads_it(workbook: Path) -> None:
    assert ft.preflight(ft.Config(MODEL_NAME="nobody/nothing")) == []
    (workbook.parent / "empty").mkdir()
    assert ft.preflight(ft.Config(MODEL_NAME="empty")) == []
