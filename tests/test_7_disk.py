"""Section 7 and 8: a disk that is full, read-only or gone costs no more than what was not yet saved."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import in_words

import finetune_colab as ft

FLAGS = ("--max-steps", 4, "--save-steps", 1, "--eval-steps", 2, "--learning-rate", 1e-2)
Run = Callable[..., tuple[int, str]]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond this: the disk of a person with a quota, in effect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def flags(phi_folder: Path, workbook: Path) -> tuple[object, ...]:
    return ("--model-name", phi_folder, *FLAGS)


@pytest.fixture
def expected(flags: tuple[object, ...], workbook: Path, run: Run) -> Iterator[bytes]:
    """The adapter of an undisturbed run, which leaves nothing else behind."""
    assert run(*flags)[0] == 0
    weights = (workbook.parent / "model" / ft.ADAPTER).read_bytes()
    for name in ("model", "checkpoints"):
        shutil.rmtree(workbook.parent / name)
    (workbook.parent / "fine_tuned_model.zip").unlink()
    yield weights


def whole(folder: Path) -> list[int]:
    found = [ft.verified(path) for path in folder.glob("checkpoints/*/checkpoint-*")]
    assert not any(isinstance(one, str) for one in found), "half a checkpoint under a final name"
    return sorted(one.step for one in found if isinstance(one, ft.Checkpoint))


def ends_with_the_way_on(code: int, printed: str) -> None:
    printed = in_words(printed)
    assert code == 2
    assert "Traceback" not in printed
    assert "could not be written to" in printed
    assert "MB are needed there" in printed
    assert "MB are free" in printed
    assert "then the same command goes on from there" in printed


SIZES = [("the adapter", 200_000), ("the optimizer", 900_000)]


@pytest.mark.parametrize("size", [size for _, size in SIZES], ids=[name for name, _ in SIZES])
def test_a_file_that_cannot_be_written_ends_in_one_message(
    size: int, flags: tuple[object, ...], workbook: Path, run: Run, expected: bytes
) -> None:
    with largest_file(size):
        ends_with_the_way_on(*run(*flags))
    assert whole(workbook.parent) == []
    assert not (workbook.parent / "model").exists()
    assert run(*flags)[0] == 0
    assert (workbook.parent / "model" / ft.ADAPTER).read_bytes() == expected


@pytest.mark.parametrize("room", [1_000, 3_000, 5_200], ids="first {0} kB".format)
def test_a_full_disk_keeps_the_last_checkpoint(
    room: int,
    flags: tuple[object, ...],
    workbook: Path,
    run: Run,
    expected: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = workbook.parent / "checkpoints"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be had by root only; the limit on files above stands for it")
    monkeypatch.setattr(ft, "refuse_full_disk", lambda *_: None)  # the disk fills up later
    try:
        ends_with_the_way_on(*run(*flags))
        steps = whole(workbook.parent)
        assert len(steps) == min(2, (room - 100) // 2_300)
        subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)
        code, printed = run(*flags)
        assert code == 0
        assert (f"from step {steps[-1]}" in in_words(printed)) if steps else True
        assert (workbook.parent / "model" / ft.ADAPTER).read_bytes() == expected
    finally:
        subprocess.run(["umount", str(place)], check=True)


FAILURES = [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOTCONN]


@pytest.mark.parametrize("error", FAILURES, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["trainer_state.json", "COMMIT.json"])
def test_a_disk_that_goes_in_the_middle_of_a_file(
    name: str,
    error: int,
    flags: tuple[object, ...],
    workbook: Path,
    run: Run,
) -> None:
    from transformers import TrainerState

    def half(path: Path) -> None:
        path.write_text("{")
        raise OSError(error, os.strerror(error))

    real_save, real_json = TrainerState.save_to_json, ft.write_json

    def save_to_json(self: Any, path: str) -> None:
        if name in path and self.global_step == 3:
            half(Path(path))
        real_save(self, path)

    def write_json(path: Path, content: Any) -> None:
        if path.name == name == ft.COMMIT and content["record"]["step"] == 3:
            half(path)
        real_json(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", save_to_json)
        patch.setattr(ft, "write_json", write_json)
        ends_with_the_way_on(*run(*flags))
    assert whole(workbook.parent) == [1, 2]
    code, printed = run(*flags)
    assert code == 0
    assert "from step 2" in in_words(printed)


def test_outputs_that_do_not_fit_leave_the_checkpoints(
    flags: tuple[object, ...], workbook: Path, run: Run, expected: bytes
) -> None:
    real = ft.save_run

    def save_run(*args: Any) -> Any:
        with largest_file(200_000):
            return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ft, "save_run", save_run)
        code, printed = run(*flags)
    assert code == 2
    printed = in_words(printed)
    assert "The training is done, but" in printed
    assert "does not train" in printed
    assert not (workbook.parent / "model").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ft, "load_base", None)
        assert run(*flags)[0] == 0
    assert (workbook.parent / "model" / ft.ADAPTER).read_bytes() == expected


@pytest.mark.parametrize("library", ["tokenizer", "adapter"])
def test_a_library_without_an_errno_is_understood(
    library: str, flags: tuple[object, ...], workbook: Path, run: Run
) -> None:
    """The tokenizer and the adapter are written in another language, whose errors are texts."""
    from safetensors import SafetensorError
    from transformers import PreTrainedTokenizerBase

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        if library == "tokenizer":
            patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        else:
            import peft

            patch.setattr(peft.peft_model, "safe_save_file", full)
        code, printed = run(*flags)
    assert code == 2
    assert "No space left (os error 28)" in in_words(printed)
    assert "Traceback" not in printed
    assert not (workbook.parent / "model").exists()


def test_a_log_that_cannot_be_written_costs_nothing(
    flags: tuple[object, ...], workbook: Path, run: Run, expected: bytes
) -> None:
    shutil.rmtree(workbook.parent / "logs")
    (workbook.parent / "logs").write_text("in the way")
    code, printed = run(*flags)
    assert code == 0
    assert "there will be no log" in in_words(printed)
    assert (workbook.parent / "model" / ft.ADAPTER).read_bytes() == expected


def test_archives_that_do_not_fit_are_a_warning(
    flags: tuple[object, ...], workbook: Path, run: Run, expected: bytes
) -> None:
    real = zipfile.ZipFile.write

    def write(self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "write", write)
        code, printed = run(*flags, "--archive-checkpoints")
    assert code == 0
    assert "checkpoint-1.zip could not be written" in in_words(printed)
    assert not list(workbook.parent.glob("checkpoints/*/*.zip*"))
    assert (workbook.parent / "model" / ft.ADAPTER).read_bytes() == expected
