"""Section 7: a checkpoint counts only when it is whole, and a run that goes on ends as if undisturbed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIRS, in_words, write_workbook
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
FLAGS = ("--max-steps", 5, "--save-steps", 1, "--eval-steps", 3, "--batch-size", 4)
FLAGS = (*FLAGS, "--gradient-accumulation-steps", 2, "--learning-rate", 1e-2)

OVERSHOOTING = ("--learning-rate", 0.05, "--lr-scheduler", "constant", "--eval-steps", 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *PAIRS])
    return folder


def call(folder: Path, *argv: object) -> int:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return ft.main([str(part) for part in argv])
    finally:
        os.chdir(before)


def interrupt_at(step: int, patch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of a step."""
    real, seen = ft.step_loss, []

    def step_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    patch.setattr(ft, "step_loss", step_loss)


@pytest.fixture(scope="module")
def undisturbed(home: Path, phi_folder: Path) -> Path:
    """A folder with a whole run."""
    folder = home / "undisturbed"
    folder.mkdir()
    shutil.copy(home / "dataset.xlsx", folder)
    assert call(folder, "--model-name", phi_folder, *FLAGS) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(home: Path, phi_folder: Path) -> Path:
    """A folder with the same run, interrupted at step 3, so that checkpoints 2 and 3 are there."""
    folder = home / "stopped"
    folder.mkdir()
    shutil.copy(home / "dataset.xlsx", folder)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        assert call(folder, "--model-name", phi_folder, *FLAGS) == 130
    assert steps_in(folder) == [2, 3]
    return folder


@pytest.fixture
def here(stopped: Path, folder: Path) -> Path:
    """A copy of the stopped run, which is the working folder."""
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    return folder


def run_folder(folder: Path) -> Path:
    return next((folder / "checkpoints").glob("*"))


def checkpoint(folder: Path, step: int) -> Path:
    return run_folder(folder) / f"checkpoint-{step}"


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoints/*/checkpoint-*"))


def adapter(folder: Path) -> bytes:
    return (folder / "model" / "adapter_model.safetensors").read_bytes()


def metrics(folder: Path) -> dict[str, Any]:
    path = folder / "model/training_visuals/training_metrics.json"
    return dict(json.loads(path.read_text()))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def reseal(folder: Path) -> None:
    """Vouch for what is in the folder now, as if it had been saved like this."""
    record = json.loads((folder / ft.COMMIT).read_text())["record"]
    (folder / ft.COMMIT).unlink()
    ft.seal(folder, {name: value for name, value in record.items() if name != "files"})


# -- Going on


def test_a_stopped_run_goes_on_and_ends_the_same(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    assert f"from step 3 of 5, in {checkpoint(Path(), 3)}" in in_words(printed)
    assert adapter(here) == adapter(undisturbed)
    mine, theirs = metrics(here), metrics(undisturbed)
    for name in ("train_loss", "eval_loss", "base_eval_loss", "best_step", "tokens_trained"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-9), name
    assert mine["train_seconds"] > ft.verified(checkpoint(here, 5)).record["tally"]["seconds"] / 2


def test_the_figures_cover_the_run_whatever_is_logged_when(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    shutil.rmtree(here / "checkpoints")
    flags = ("--model-name", phi_folder, *FLAGS, "--logging-steps", 4, "--save-steps", 3)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch)
        assert run(*flags)[0] == 130
    assert run(*flags)[0] == 0
    assert metrics(here)["train_loss"] == pytest.approx(
        metrics(undisturbed)["train_loss"], rel=1e-6
    )
    assert adapter(here) == adapter(undisturbed)


def test_the_log_of_a_run_is_one_file_however_often_it_was_stopped(
    here: Path, phi_folder: Path, run: Run
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(1, patch)
        assert run("--model-name", phi_folder, *FLAGS)[0] == 130
    assert run("--model-name", phi_folder, *FLAGS)[0] == 0
    (log,) = (here / "logs").iterdir()
    text = log.read_text(encoding="utf-8")
    assert re.findall(r"Measured +step (\d+), loss", text) == ["1", "2", "3", "4", "5"]
    assert "Stopped Interrupted. Step 3 of 5 is saved" in in_words(text)
    assert len(re.findall(r"Resume +from step 3 of 5", text)) == 1


def test_a_finished_run_is_not_trained_again(
    undisturbed: Path, folder: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed, folder, dirs_exist_ok=True)
    (folder / "model.previous").mkdir()
    (folder / "model.previous" / "mine").write_text("of an earlier run")
    (folder / "model" / "adapter_model.safetensors").write_bytes(b"torn")
    monkeypatch.setattr(ft, "load_base", None)
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    assert "this run is finished: nothing is trained" in in_words(printed)
    assert adapter(folder) == adapter(undisturbed)
    assert metrics(folder) == metrics(undisturbed)
    assert (folder / "model.previous" / "mine").exists(), "another model was pushed out by its twin"


def test_the_last_adapter_of_a_finished_run_can_still_be_had(
    home: Path, folder: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS, *OVERSHOOTING)
    assert run(*flags)[0] == 0
    best = metrics(folder)["best_step"]
    assert best < 5, "the case is not the one meant"
    kept = adapter(folder)
    assert kept == (checkpoint(folder, 5) / ft.BEST_ADAPTER).read_bytes()
    assert run(*flags, "--no-keep-best")[0] == 0
    assert adapter(folder) == (checkpoint(folder, 5) / ft.ADAPTER).read_bytes() != kept


def test_early_stopping_survives_an_interruption(
    home: Path, folder: Path, phi_folder: Path, run: Run
) -> None:
    """Killed between the last checkpoint and the outputs, it must not train on."""
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS, *OVERSHOOTING)
    flags = (*flags, "--max-steps", 9, "--early-stopping-patience", 2)
    assert run(*flags)[0] == 0
    first, kept = metrics(folder), adapter(folder)
    assert first["steps"] < 9, "the case is not the one meant"
    shutil.rmtree(folder / "model")
    code, printed = run(*flags)
    assert code == 0
    assert "this run is finished" in printed
    assert metrics(folder) == first
    assert adapter(folder) == kept


def test_steps_in_mid_epoch_and_beyond_it_are_taken_up(
    home: Path, folder: Path, phi_folder: Path, run: Run
) -> None:
    """22 pairs in steps of 8 make epochs of 3 steps, the last of them short."""
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS, "--max-steps", 7, "--eval-steps", 100)
    assert run(*flags)[0] == 0
    expected = adapter(folder)
    for step in (1, 3, 4, 6):
        shutil.rmtree(folder / "checkpoints")
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(step, patch)
            assert run(*flags)[0] == 130
        assert run(*flags)[0] == 0
        assert adapter(folder) == expected, step


def test_a_moved_folder_of_checkpoints_is_as_good(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    (here / "checkpoints").rename(here / "elsewhere")
    flags = ("--checkpoint-dir", "elsewhere")
    code, printed = run("--model-name", phi_folder, *FLAGS, *flags)
    assert code == 0
    assert "from step 3" in printed
    assert adapter(here) == adapter(undisturbed)


# -- What cannot be used


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def blank_tail(path: Path) -> None:
    """As a disk leaves it that lost power."""
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half] + bytes(path.stat().st_size - half))


def elsewhere(path: Path) -> None:
    path.rename(path.parents[1] / "moved")
    path.symlink_to(path.parents[1] / "moved")


DAMAGED = [*sorted(ft.STATE_FILES), "adapter_config.json", ft.COMMIT]
DAMAGES: list[Any] = [
    pytest.param(name, damage, id=f"{damage.__name__} {name}")
    for name in DAMAGED
    for damage in (Path.unlink, cut, flip, blank_tail)
]


def used_nothing_of(step: int, printed: str, here: Path) -> None:
    printed = in_words(printed)
    assert f"checkpoint-{step} is not used: " in printed
    assert f"It is now incomplete-{step}." in printed
    assert (run_folder(here) / f"incomplete-{step}").is_dir()
    assert f"from step {step - 1} of 5" in printed


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_a_damaged_checkpoint_is_never_used(
    name: str, damage: Callable[[Path], None], here: Path
) -> None:
    path = checkpoint(here, 3)
    damage(path / name)
    flaw = ft.verified(path)
    assert isinstance(flaw, str)
    assert name in flaw or (name == ft.COMMIT and flaw == "it was never finished")
    assert isinstance(ft.verified(checkpoint(here, 2)), ft.Checkpoint)


@pytest.mark.parametrize("damage", [Path.unlink, flip], ids=["lost", "flipped"])
def test_the_one_before_a_damaged_checkpoint_ends_the_same(
    damage: Callable[[Path], None], here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    damage(checkpoint(here, 3) / "optimizer.pt")
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    used_nothing_of(3, printed, here)
    assert adapter(here) == adapter(undisturbed)


def plant_pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


def plant_adapter(folder: Path) -> None:
    (folder / "other").mkdir()
    shutil.copy(folder / ft.ADAPTER, folder / "other")


@pytest.mark.parametrize(
    "plant", [plant_pickle, plant_adapter, lambda f: elsewhere(f / ft.ADAPTER)]
)
def test_what_was_not_saved_with_a_checkpoint_spoils_it(
    plant: Callable[[Path], None], here: Path
) -> None:
    plant(checkpoint(here, 3))
    assert isinstance(ft.verified(checkpoint(here, 3)), str)


def test_a_checkpoint_of_another_run_in_the_folder_is_not_used(
    here: Path, phi_folder: Path, run: Run
) -> None:
    other = here / "other"
    flags = ("--model-name", phi_folder, *FLAGS, "--lora-alpha", 8, "--checkpoint-dir", other)
    assert run(*flags, "--output-dir", "elsewhere")[0] == 0
    shutil.copytree(next(other.glob("*/checkpoint-5")), checkpoint(here, 5))
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    assert "checkpoint-5 is not used: it belongs to another run" in in_words(printed)
    assert "from step 3 of 5" in in_words(printed)


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(*_: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(ft, "prune", stuck)
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    assert "an old checkpoint could not be deleted" in in_words(printed)
    assert adapter(here) == adapter(undisturbed)


def test_a_copy_under_another_number_is_not_taken_for_progress(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copytree(checkpoint(here, 3), checkpoint(here, 5))
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    assert "checkpoint-5 is not used: it is a copy of checkpoint-3" in in_words(printed)
    assert adapter(here) == adapter(undisturbed)


@pytest.mark.parametrize("kind", ["link", "busy"])
def test_what_cannot_be_deleted_is_no_hindrance(
    kind: str, here: Path, undisturbed: Path, phi_folder: Path, run: Run, monkeypatch: Any
) -> None:
    leftover = run_folder(here) / "removed-1"
    if kind == "link":  # of a checkpoint that somebody has moved to a larger disk
        moved = here / "elsewhere"
        shutil.move(checkpoint(here, 2), moved)
        checkpoint(here, 2).symlink_to(moved, target_is_directory=True)
    else:
        leftover.mkdir()
        real = ft.remove

        def remove(path: Path) -> None:
            if path == leftover:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            real(path)

        monkeypatch.setattr(ft, "remove", remove)
    assert run("--model-name", phi_folder, *FLAGS)[0] == 0
    assert adapter(here) == adapter(undisturbed)
    if kind == "link":
        assert isinstance(ft.verified(moved), ft.Checkpoint), "somebody's own folder was emptied"


def test_a_note_of_the_file_manager_spoils_nothing(here: Path) -> None:
    (checkpoint(here, 3) / "desktop.ini").write_text("[.ShellClassInfo]")
    (checkpoint(here, 3) / ".ipynb_checkpoints").mkdir()
    assert isinstance(ft.verified(checkpoint(here, 3)), ft.Checkpoint)


@pytest.mark.parametrize(
    "name, entry",
    [
        ("../../../dataset.xlsx", [1, "0"]),
        ("adapter_model.safetensors", None),
        ("adapter_model.safetensors", ["1", "0"]),
        ("adapter_model.safetensors", [1]),
    ],
)
def test_a_commit_names_files_of_its_folder_and_their_sizes(
    name: str, entry: object, here: Path
) -> None:
    path = checkpoint(here, 3)
    record = json.loads((path / ft.COMMIT).read_text())["record"]
    record["files"][name] = entry
    ft.write_json(path / ft.COMMIT, {"sha256": ft.fingerprint(record), "record": record})
    assert ft.verified(path) == "COMMIT.json is damaged"


@given(st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_whatever_a_commit_holds_it_is_read_or_refused(text: bytes | str) -> None:
    assert ft.record_in(text if isinstance(text, bytes) else text.encode()) is None


def test_stray_folders_are_neither_used_nor_counted(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    checkpoint(here, 999).mkdir()
    (run_folder(here) / "checkpoint-copy").mkdir()
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    assert "checkpoint-999 is not used: it was never finished" in in_words(printed)
    assert "from step 3 of 5" in in_words(printed)
    assert adapter(here) == adapter(undisturbed)


def test_with_no_whole_checkpoint_it_starts_again_and_says_so(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    for step in (2, 3):
        flip(checkpoint(here, step) / ft.ADAPTER)
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    assert "no checkpoint is whole, so the training starts from the beginning" in in_words(printed)
    assert {"incomplete-2", "incomplete-3"} <= {p.name for p in run_folder(here).iterdir()}
    assert adapter(here) == adapter(undisturbed)


def test_dates_of_folders_mean_nothing(here: Path, phi_folder: Path, run: Run) -> None:
    os.utime(checkpoint(here, 3), (1, 1))
    os.utime(checkpoint(here, 2), (4e9, 4e9))
    assert "from step 3" in run("--model-name", phi_folder, *FLAGS)[1]


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt"])
def test_code_in_a_checkpoint_is_not_run(name: str, here: Path, phi_folder: Path, run: Run) -> None:
    path = checkpoint(here, 3)
    torch.save(Canary(str(here / "canary")), path / name)
    reseal(path)
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 2
    assert "is whole, but cannot be taken up here" in in_words(printed)
    assert not (here / "canary").exists()


def test_a_checkpoint_of_other_versions_names_them(
    here: Path, phi_folder: Path, run: Run, undisturbed: Path
) -> None:
    path = checkpoint(here, 3)
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(state | {"of_the_future": 1}))
    record = json.loads((path / ft.COMMIT).read_text())["record"]
    record["tally"]["versions"]["transformers"] = "6.7.8"
    ft.write_json(path / ft.COMMIT, {"sha256": "", "record": record})
    reseal(path)
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 2
    printed = in_words(printed)
    assert f"transformers 6.7.8 (here {ft.installed_version('transformers')})" in printed
    assert "--no-resume" in printed
    assert isinstance(ft.verified(path), ft.Checkpoint)
    assert run("--model-name", phi_folder, *FLAGS, "--no-resume")[0] == 0
    assert adapter(here) == adapter(undisturbed)
    assert (run_folder(here) / "unused-3").is_dir()


# -- Other runs


CHANGES = [
    (("--learning-rate", 2e-2), "LEARNING_RATE 0.02 (there 0.01)"),
    (("--lora-alpha", 8), "LORA_ALPHA 8 (there 32)"),
    (("--lora-r", 8), "LORA_R 8 (there 16)"),
    (("--lora-dropout", 0.1), "LORA_DROPOUT 0.1 (there 0.05)"),
    (("--lora-targets", "q_proj,fc1"), "LORA_TARGETS q_proj,fc1 (there all-linear)"),
    (("--optimizer", "adafactor"), "OPTIMIZER adafactor (there adamw_torch)"),
    (("--batch-size", 8), "PAIRS IN A STEP 16 (there 8)"),
    (("--max-steps", 6), "MAX_STEPS 6 (there 5)"),
    (("--lr-scheduler", "linear"), "LR_SCHEDULER linear (there cosine)"),
    (("--seed", 1), "SEED 1 (there 42), the data"),
    (("--max-length", 30), "the data"),
    (("--validation-fraction", 0.2), "the data"),
]


@pytest.mark.parametrize("flags, said", CHANGES, ids=[str(flags[0]) for flags, _ in CHANGES])
def test_what_decides_the_result_makes_a_new_run_beside_the_old(
    flags: tuple[object, ...], said: str, here: Path, phi_folder: Path, run: Run
) -> None:
    old, before = run_folder(here), content(here / "checkpoints")
    code, printed = run("--model-name", phi_folder, *FLAGS, *flags)
    assert code == 0
    printed = in_words(printed)
    assert f"other than the one in {old.relative_to(here)}, which stays as it is: {said}" in printed
    assert "from step" not in printed
    after = content(here / "checkpoints")
    assert {name: after[name] for name in before} == before
    assert len(list((here / "checkpoints").glob("*"))) == 2


def test_edited_data_and_other_weights_make_a_new_run(
    here: Path, phi_folder: Path, run: Run
) -> None:
    write_workbook(here / "dataset.xlsx", [("question", "answer"), *PAIRS[:-1], ("New?", "Yes.")])
    other = here / "other"
    shutil.copytree(phi_folder, other)
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "which stays as it is: the data" in in_words(run("--model-name", phi_folder, *FLAGS)[1])
    shutil.rmtree(here / "checkpoints")
    assert run("--model-name", phi_folder, *FLAGS)[0] == 0
    printed = run("--model-name", other, *FLAGS)[1]
    assert "which stays as it is: the base model" in in_words(printed)


@pytest.mark.parametrize(
    "flags",
    [
        ("--save-steps", 2),
        ("--logging-steps", 3),
        ("--batch-size", 2, "--gradient-accumulation-steps", 4),
        ("--gradient-checkpointing",),
        ("--output-dir", "other"),
        ("--no-keep-best",),
    ],
    ids=lambda flags: flags[0],
)
def test_what_does_not_decide_the_result_is_the_same_run(
    flags: tuple[object, ...], here: Path, phi_folder: Path, run: Run
) -> None:
    code, printed = run("--model-name", phi_folder, *FLAGS, *flags)
    assert code == 0
    assert "from step 3 of 5" in in_words(printed)


def test_a_model_that_moved_is_the_same_model(here: Path, phi_folder: Path, run: Run) -> None:
    shutil.copytree(phi_folder, here / "copy")
    assert "from step 3" in run("--model-name", "copy", *FLAGS)[1]


# -- Which ones are kept


@settings(deadline=None)
@given(
    best=st.integers(1, 12),
    steps=st.sets(st.integers(1, 12), min_size=1),
    torn=st.sets(st.integers(1, 12)),
)
def test_the_newest_two_and_the_best_are_kept(
    best: int, steps: set[int], torn: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        for name in ft.STATE_FILES:
            (path / name).write_bytes(b"x")
        if step not in torn:
            record = {"step": step, "best_step": None, "identity": {}}
            ft.seal(path, {**record, "tally": ft.Tally().record()})
    ft.prune(folder, best)
    whole = sorted(steps - torn)
    kept = {int(path.name.split("-")[1]) for path in folder.iterdir()}
    assert kept == set(whole[-2:]) | ({best} & set(whole)) | (steps & torn)


def test_the_best_checkpoint_is_kept_and_goes_with_every_later_one(
    home: Path, folder: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS, *OVERSHOOTING)
    assert run(*flags)[0] == 0
    best = metrics(folder)["best_step"]
    assert best < 4, "the case is not the one meant"
    assert steps_in(folder) == [best, 4, 5]
    kept = (checkpoint(folder, best) / ft.ADAPTER).read_bytes()
    for step in (4, 5):
        assert (checkpoint(folder, step) / ft.BEST_ADAPTER).read_bytes() == kept
    assert adapter(folder) == kept


def test_a_checkpoint_alone_is_enough(home: Path, folder: Path, phi_folder: Path, run: Run) -> None:
    """The best one lost, the newest still holds its adapter."""
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS, *OVERSHOOTING)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(4, patch)
        assert run(*flags)[0] == 130
    shutil.copytree(folder / "checkpoints", folder / "all")
    assert run(*flags)[0] == 0
    expected = adapter(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "all").rename(folder / "checkpoints")
    for step in steps_in(folder)[:-1]:
        shutil.rmtree(checkpoint(folder, step))
    assert run(*flags)[0] == 0
    assert adapter(folder) == expected


def test_checkpoints_come_by_the_clock_too(
    home: Path, folder: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    saved: list[int] = []
    real = ft.seal

    def seal(path: Path, record: dict[str, Any]) -> ft.Checkpoint:
        saved.append(record["step"])
        return real(path, record)

    monkeypatch.setattr(ft, "seal", seal)
    monkeypatch.setitem(ft.SMALLEST_AND_LARGEST, "SAVE_MINUTES", (0, 1))
    flags = ("--model-name", phi_folder, *FLAGS, "--save-steps", 100, "--validation-fraction", 0)
    assert run(*flags, "--save-minutes", 0)[0] == 0
    assert saved == [1, 2, 3, 4, 5]
    saved.clear()
    assert run(*flags, "--save-minutes", 1, "--no-resume")[0] == 0
    assert saved == [5]


# -- From a checkpoint that somebody names


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"{folder.name}/{file.name}")
    return path


@pytest.mark.parametrize("form", ["folder", "run", "zip", "foreign folder"])
def test_a_named_checkpoint_is_taken_up(
    form: str, here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    place = checkpoint(here, 2)
    if form == "zip":
        place = zipped(place, here / "upload.zip")
    elif form != "folder":
        place = Path(shutil.copytree(run_folder(here), here / "downloaded"))
        shutil.rmtree(place / "checkpoint-3")
        shutil.rmtree(here / "checkpoints")
        place = place if form == "run" else place / "checkpoint-2"
    flags = ("--model-name", phi_folder, *FLAGS, "--resume-from-checkpoint", place)
    code, printed = run(*flags)
    assert code == 0
    assert "from step 2 of 5" in in_words(printed)
    if form in ("folder", "zip"):
        assert "checkpoint-3 is not used and is now unused-3" in in_words(printed)
    assert adapter(here) == adapter(undisturbed)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    here: Path, phi_folder: Path, run: Run
) -> None:
    before = content(here / "checkpoints")
    flags = ("--resume-from-checkpoint", checkpoint(here, 3), "--lora-alpha", 7)
    code, printed = run("--model-name", phi_folder, *FLAGS, *flags)
    assert code == 2
    assert "belongs to another run. What differs: LORA_ALPHA 7 (there 32)" in in_words(printed)
    assert content(here / "checkpoints") == before


def garble(path: Path, name: str) -> Path:
    """Damage what is deflated, so that it is no checksum that fails but zlib."""
    with zipfile.ZipFile(path) as archive:
        begins = archive.getinfo(name).header_offset + 30 + len(name)
    content = bytearray(path.read_bytes())
    content[begins : begins + 100] = b"\xff" * 100
    path.write_bytes(content)
    return path


def hostile(here: Path, form: str) -> Path:
    path = here / "hostile.zip"
    good = checkpoint(here, 2)
    record = json.loads((good / ft.COMMIT).read_text())["record"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        names = [file.name for file in good.iterdir()]
        for name in names:
            if name == "optimizer.pt" and form == "bomb":
                archive.writestr(name, bytes(50_000_000))
            elif name == "optimizer.pt" and form == "link":
                link = zipfile.ZipInfo(name)
                link.external_attr = 0o120777 << 16
                archive.writestr(link, "/etc/passwd")
            elif name == ft.COMMIT and form == "outside":
                record["files"]["../../beyond-all"] = [4, ft.hashlib.sha256(b"evil").hexdigest()]
                sealed = {"sha256": ft.fingerprint(record), "record": record}
                archive.writestr(name, json.dumps(sealed))
            elif name == ft.COMMIT and form == "huge":
                record["files"]["optimizer.pt"][0] = 10**15
                sealed = {"sha256": ft.fingerprint(record), "record": record}
                archive.writestr(name, json.dumps(sealed))
            else:
                archive.write(good / name, name)
        if form == "outside":
            archive.writestr("../../beyond-all", "evil")
            archive.writestr("/tmp/beyond-all", "evil")
    if form == "no zip":
        path.write_bytes(b"PK\x03\x04 and rubbish")
    if form == "cut":
        cut(path)
    return path


FORMS = ("bomb", "link", "outside", "huge", "garbled", "no zip", "cut", "missing")


@pytest.mark.parametrize("form", FORMS)
def test_a_hostile_zip_leaves_nothing_behind(
    form: str, here: Path, phi_folder: Path, run: Run
) -> None:
    path = here / "nowhere" if form == "missing" else hostile(here, form)
    if form == "garbled":
        garble(path, "optimizer.pt")
    before = content(here)
    flags = ("--model-name", phi_folder, *FLAGS, "--resume-from-checkpoint", path)
    code, printed = run(*flags)
    assert code == 2
    assert "cannot be used: " in in_words(printed)
    assert (form != "missing") or "cannot be used: it is not there." in in_words(printed)
    assert "Traceback" not in printed
    assert content(here) == before
    assert not list(here.parent.rglob("beyond-all"))
    assert not Path("/tmp/beyond-all").exists()


def test_only_the_weights_of_a_foreign_checkpoint_get_into_the_model(
    undisturbed: Path, folder: Path, phi_folder: Path, run: Run
) -> None:
    """What adapter_config.json says comes from the settings: peft might run what it names."""
    shutil.copytree(undisturbed, folder, dirs_exist_ok=True)
    written = json.loads((folder / "model/adapter_config.json").read_text())
    foreign = json.loads((checkpoint(folder, 5) / "adapter_config.json").read_text())
    assert written == foreign
    foreign["auto_mapping"] = {"parent_library": "os", "base_model_class": "abort"}
    (checkpoint(folder, 5) / "adapter_config.json").write_text(json.dumps(foreign))
    reseal(checkpoint(folder, 5))
    upload = zipped(checkpoint(folder, 5), folder / "upload.zip")
    shutil.rmtree(folder / "checkpoints")
    flags = ("--model-name", phi_folder, *FLAGS, "--resume-from-checkpoint", upload)
    assert run(*flags)[0] == 0
    assert json.loads((folder / "model/adapter_config.json").read_text()) == written


def test_other_members_of_a_zip_are_left_alone(here: Path, phi_folder: Path, run: Run) -> None:
    path = zipped(checkpoint(here, 2), here / "upload.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../../beyond", "evil")
        archive.writestr("__MACOSX/._optimizer.pt", "x")
    assert run("--model-name", phi_folder, *FLAGS, "--resume-from-checkpoint", path)[0] == 0
    assert not list(here.parent.rglob("beyond"))


# -- Copies


@pytest.fixture
def drive(folder: Path) -> Path:
    (folder / "drive").mkdir()
    return folder / "drive"


def mirrored(drive: Path) -> list[str]:
    return sorted(str(path.relative_to(drive)).split("/")[1] for path in drive.glob("*/*"))


def test_a_new_machine_goes_on_from_the_mirror(
    home: Path, undisturbed: Path, drive: Path, phi_folder: Path, run: Run
) -> None:
    folder = drive.parent
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS, "--checkpoint-mirror", drive)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(4, patch)
        assert run(*flags)[0] == 130
    assert mirrored(drive) == ["checkpoint-3", "checkpoint-4"]
    shutil.rmtree(folder / "checkpoints")
    flip(next(drive.glob("*/checkpoint-4")) / "optimizer.pt")
    code, printed = run(*flags)
    assert code == 0
    printed = in_words(printed)
    assert "checkpoint-4 is not used: optimizer.pt is damaged" in printed
    assert "checkpoint-3 is fetched from" in printed
    assert "from step 3 of 5" in printed
    assert adapter(folder) == adapter(undisturbed)
    assert "checkpoint-5" in mirrored(drive)
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "model")
    assert "this run is finished" in run(*flags)[1]
    assert adapter(folder) == adapter(undisturbed)


def test_the_newer_of_local_and_mirror_wins(
    here: Path, drive: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copytree(run_folder(here), drive / run_folder(here).name)
    shutil.rmtree(checkpoint(here, 3))
    flags = ("--model-name", phi_folder, *FLAGS, "--checkpoint-mirror", drive)
    assert "from step 3" in run(*flags)[1]


@pytest.mark.parametrize("error", [errno.ENOTCONN, errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_mirror_that_fails_is_a_warning(
    error: int,
    here: Path,
    undisturbed: Path,
    drive: Path,
    phi_folder: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = shutil.copyfile

    def copyfile(source: Path, target: Path) -> Any:
        if Path(target).is_relative_to(drive):
            raise OSError(error, os.strerror(error))
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    monkeypatch.setattr(ft, "MIRROR_PAUSES", (0.01,))
    flags = ("--model-name", phi_folder, *FLAGS, "--checkpoint-mirror", drive)
    code, printed = run(*flags)
    assert code == 0
    assert "could not be copied to the mirror" in in_words(printed)
    assert adapter(here) == adapter(undisturbed)
    assert not list(drive.glob("*/checkpoint-*[0-9]"))


def test_an_unmounted_mirror_is_not_taken_for_an_empty_one(
    here: Path, drive: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model-name", phi_folder, *FLAGS, "--checkpoint-mirror", drive / "copies")
    monkeypatch.setattr(ft, "MIRROR_PAUSES", (0.01,))
    real = ft.train_adapter

    def unmount(*args: Any) -> ft.Checkpoint:
        shutil.rmtree(drive)
        return real(*args)

    monkeypatch.setattr(ft, "train_adapter", unmount)
    code, printed = run(*flags)
    assert code == 0
    assert "could not be copied to the mirror" in in_words(printed)
    assert not drive.exists()
    code, printed = run(*flags)
    assert code == 2
    assert "CHECKPOINT_MIRROR" in printed


def test_what_was_left_unfinished_in_the_mirror_is_cleared_away(
    here: Path, phi_folder: Path, run: Run
) -> None:
    mirror = here / "drive" / run_folder(here).name
    for name in ("removed-1", "checkpoint-2.partial"):
        (mirror / name).mkdir(parents=True)
        (mirror / name / "optimizer.pt").write_bytes(b"half")
    flags = ("--model-name", phi_folder, *FLAGS, "--checkpoint-mirror", here / "drive")
    assert run(*flags)[0] == 0
    assert {path.name for path in mirror.iterdir()} <= {
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-5",
    }


def failing(times: int, patch: pytest.MonkeyPatch) -> None:
    """Let so many copies of files fail; the pauses between the tries are left out."""
    real, left = shutil.copyfile, [times]

    def copyfile(*args: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    patch.setattr(shutil, "copyfile", copyfile)
    patch.setattr(ft, "MIRROR_PAUSES", (0, 0))


@pytest.mark.parametrize("times, code", [(2, 0), (100, 2)])
def test_progress_in_the_mirror_is_not_given_up_for_an_error(
    times: int, code: int, here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    mirror = here / "drive" / run_folder(here).name
    shutil.copytree(run_folder(here), mirror)
    shutil.rmtree(here / "checkpoints")
    flags = ("--model-name", phi_folder, *FLAGS, "--checkpoint-mirror", here / "drive")
    with pytest.MonkeyPatch.context() as patch:
        failing(times, patch)
        left, printed = run(*flags)
    assert left == code
    if code:
        assert "checkpoint-3 could not be fetched from the mirror" in in_words(printed)
        assert '--checkpoint-mirror ""' in printed
        assert list(run_folder(here).iterdir()) == []
        assert run(*flags)[0] == 0
    assert adapter(here) == adapter(undisturbed)


def test_a_mirror_of_damaged_checkpoints_is_told(here: Path, phi_folder: Path, run: Run) -> None:
    mirror = here / "drive" / run_folder(here).name
    shutil.copytree(checkpoint(here, 3), mirror / "checkpoint-3")
    flip(mirror / "checkpoint-3" / ft.ADAPTER)
    shutil.rmtree(here / "checkpoints")
    flags = ("--model-name", phi_folder, *FLAGS, "--checkpoint-mirror", here / "drive")
    code, printed = run(*flags)
    assert code == 0
    assert "no checkpoint is whole, so the training starts from the beginning" in in_words(printed)


def test_a_mirror_that_cannot_be_changed_is_told(
    here: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = here / "drive" / run_folder(here).name
    shutil.copytree(checkpoint(here, 3), mirror / "checkpoint-3")
    real = ft.set_aside

    def read_only(path: Path, word: str) -> Path:
        if path.is_relative_to(mirror):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, word)

    monkeypatch.setattr(ft, "set_aside", read_only)
    flags = ("--no-resume", "--checkpoint-mirror", here / "drive")
    code, printed = run("--model-name", phi_folder, *FLAGS, *flags)
    assert code == 0
    assert f"the mirror {mirror} cannot be changed" in in_words(printed)


def test_a_clock_of_1970_costs_no_training(
    home: Path, folder: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    """What a zip cannot say about its files is left out."""
    shutil.copy(home / "dataset.xlsx", folder)
    real = ft.seal

    def seal(path: Path, record: dict[str, Any]) -> ft.Checkpoint:
        sealed = real(path, record)
        for file in path.iterdir():
            os.utime(file, (1, 1))
        return sealed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ft, "seal", seal)
        code, printed = run("--model-name", phi_folder, *FLAGS, "--archive-checkpoints")
    assert code == 0
    assert "could not be written" not in printed
    assert adapter(folder) == adapter(undisturbed)


def test_the_log_of_a_foreign_checkpoint_is_not_where_it_says(
    here: Path, phi_folder: Path, run: Run
) -> None:
    path = checkpoint(here, 3)
    record = json.loads((path / ft.COMMIT).read_text())["record"]
    record["tally"]["log"] = "precious.txt"
    ft.write_json(path / ft.COMMIT, {"sha256": "", "record": record})
    reseal(path)
    (here / "precious.txt").write_text("mine")
    assert run("--model-name", phi_folder, *FLAGS, "--log-dir", ".")[0] == 0
    assert (here / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        *({"files": 5}, {"files": {}}, {"step": "x"}, {"step": None}, {"best_step": "x"}),
        *({"identity": [1]}, {"tally": None}, {"tally": {}}, {"tally": {"foo": 1}}),
    ],
    ids=str,
)
def test_a_rightly_sealed_commit_of_odd_content_is_damaged(
    changes: dict[str, Any], here: Path, phi_folder: Path, run: Run
) -> None:
    """Here and in the folder of another run, which is only looked at."""
    path = checkpoint(here, 3)
    record = json.loads((path / ft.COMMIT).read_text())["record"] | changes
    ft.write_json(path / ft.COMMIT, {"sha256": ft.fingerprint(record), "record": record})
    assert ft.verified(path) == "COMMIT.json is damaged"
    flags = ("--model-name", phi_folder, *FLAGS, "--lora-alpha", 7, "--max-steps", 1)
    assert run(*flags)[0] == 0


def test_archives_come_and_go_with_their_checkpoints(
    home: Path, folder: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(4, patch)
        assert run(*flags, "--archive-checkpoints")[0] == 130
    zips = sorted(path.name for path in run_folder(folder).glob("*.zip"))
    assert zips == ["checkpoint-3.zip", "checkpoint-4.zip"]
    shutil.move(run_folder(folder) / "checkpoint-4.zip", folder)
    shutil.rmtree(folder / "checkpoints")
    assert run(*flags, "--resume-from-checkpoint", "checkpoint-4.zip")[0] == 0
    assert adapter(folder) == adapter(undisturbed)


# -- Signals


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_at_the_next_step_and_ends(
    name: str,
    code: int,
    home: Path,
    folder: Path,
    undisturbed: Path,
    phi_folder: Path,
    run: Run,
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    number = getattr(signal, name)
    before = signal.getsignal(number)
    flags = ("--model-name", phi_folder, *FLAGS, "--save-steps", 100)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch, number)
        left, printed = run(*flags)
    assert left == code
    printed = in_words(printed)
    assert "Stopping after this step, with a checkpoint." in printed
    assert "Interrupted. Step 2 of 5 is saved, and the same command goes on from there." in printed
    assert steps_in(folder) == [2]
    assert not (folder / "model").exists()
    assert signal.getsignal(number) is before
    assert run(*flags)[0] == 0
    assert adapter(folder) == adapter(undisturbed)


def test_the_way_on_is_the_command_without_what_made_it_start_anew(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    flags = ("--model-name", phi_folder, *FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(1, patch)
        code, printed = run(*flags, "--no-resume")
    assert code == 130
    assert (
        "Step 1 of 5 is saved, and the same command, without --no-resume, goes on from there."
        in in_words(printed)
    )
    assert "from step 1 of 5" in in_words(run(*flags)[1])
    assert adapter(here) == adapter(undisturbed)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_the_command_with_a_named_checkpoint_goes_on_too(
    form: str, here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    """Also when that checkpoint is pruned by then; and what it has come to is not begun again."""
    place = checkpoint(here, 2)
    place = zipped(place, here / "upload.zip") if form == "zip" else place
    flags = ("--model-name", phi_folder, *FLAGS, "--resume-from-checkpoint", place)
    for step in (3, 4):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(1, patch)
            code, printed = run(*flags)
        assert code == 130
        assert f"Step {step} of 5 is saved, and the same command goes on from there." in in_words(
            printed
        )
    assert form == "zip" or not place.exists()
    assert "from step 4 of 5" in in_words(run(*flags)[1])
    assert adapter(here) == adapter(undisturbed)
    assert "this run is finished" in in_words(run(*flags)[1])
    assert [path.name for path in run_folder(here).glob("unused*")] == ["unused-3"]


def test_a_lack_of_memory_in_the_step_of_a_signal_is_still_an_end(
    here: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    flags = ("--model-name", phi_folder, *FLAGS)
    with pytest.MonkeyPatch.context() as patch:

        def step_loss(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise torch.OutOfMemoryError("CUDA out of memory.")

        patch.setattr(ft, "step_loss", step_loss)
        code, printed = run(*flags)
    assert code == 143
    assert "Nothing that was finished or saved is touched" in in_words(printed)
    assert run(*flags)[0] == 0
    assert adapter(here) == adapter(undisturbed)


def test_a_second_signal_ends_at_once(
    home: Path, folder: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch)
        interrupt_at(2, patch)
        code, printed = run(*flags)
    assert code == 130
    assert "Nothing that was finished or saved is touched" in in_words(printed)
    assert steps_in(folder) == [1]
    assert run(*flags)[0] == 0
    assert adapter(folder) == adapter(undisturbed)


def test_a_signal_while_saving_lets_it_finish(
    home: Path, folder: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS)
    real = ft.seal

    def seal(path: Path, record: dict[str, Any]) -> ft.Checkpoint:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(path, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ft, "seal", seal)
        assert run(*flags)[0] == 143
    assert steps_in(folder) == [1]
    assert isinstance(ft.verified(checkpoint(folder, 1)), ft.Checkpoint)
    assert run(*flags)[0] == 0
    assert adapter(folder) == adapter(undisturbed)


def test_a_signal_that_is_ignored_stays_ignored(
    home: Path, folder: Path, phi_folder: Path, run: Run
) -> None:
    """As under nohup."""
    shutil.copy(home / "dataset.xlsx", folder)
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(2, patch, signal.SIGHUP)
            assert run("--model-name", phi_folder, *FLAGS)[0] == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_off_the_main_thread_it_trains_and_says_what_is_missing(
    home: Path, folder: Path, undisturbed: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    results: list[tuple[int, str]] = []
    flags = ("--model-name", phi_folder, *FLAGS)
    thread = threading.Thread(target=lambda: results.append(run(*flags)))
    thread.start()
    thread.join()
    code, printed = results[0]
    assert code == 0
    assert "outside the main thread Ctrl+C cannot save" in in_words(printed)
    assert adapter(folder) == adapter(undisturbed)


# -- In 4 bits


def test_a_run_in_4_bits_goes_on_and_ends_the_same(
    home: Path, folder: Path, phi_folder: Path, run: Run
) -> None:
    shutil.copy(home / "dataset.xlsx", folder)
    flags = ("--model-name", phi_folder, *FLAGS, "--max-steps", 2, "--load-in-4bit")
    assert run(*flags)[0] == 0
    expected = adapter(folder)
    shutil.rmtree(folder / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(1, patch)
        assert run(*flags)[0] == 130
    code, printed = run(*flags)
    assert code == 0
    assert "from step 1 of 2" in printed
    assert adapter(folder) == expected
