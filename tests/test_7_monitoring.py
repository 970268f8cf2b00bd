"""Section 7: the curves also go to TensorBoard, Weights & Biases or Trackio, and only when asked."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, in_words

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
FEW = ("--max-steps", 3, "--eval-answers", 0)
SERVICES = ("tensorboard", "wandb", "trackio")


def train(phi_folder: Path, *flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "finetune_colab.py", "--model-name", phi_folder, *FEW, *flags]
    home = {"HOME": str(Path.cwd() / "home"), "HF_HUB_OFFLINE": "1"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TENSORBOARD"))}
    return subprocess.run(
        [*map(str, command)],
        env=kept | home | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def losses(folder: Path) -> list[float]:
    table = (folder / "model/training_visuals/training_metrics.csv").read_text().splitlines()
    return [float(row["loss"]) for row in csv.DictReader(table) if row["loss"]]


def test_tensorboard_gets_the_curves(phi_folder: Path, workbook: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train(phi_folder, "--report-to", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert "tensorboard --logdir ./logs shows the curves" in in_words(done.stdout)
    (events,) = workbook.parent.glob("logs/*/events*")
    seen = EventAccumulator(str(events)).Reload()
    curve = [point.value for point in seen.Scalars("train/loss")]
    assert curve == pytest.approx(losses(workbook.parent), rel=1e-4)
    assert "eval/loss" in seen.Tags()["scalars"]
    assert all(path.name.startswith("checkpoint-") for path in Path("checkpoints").glob("*/*"))


def test_wandb_gets_the_curves(phi_folder: Path, workbook: Path) -> None:
    pytest.importorskip("wandb")
    done = train(phi_folder, "--report-to", "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    assert "project finetune_colab of Weights & Biases" in in_words(done.stdout)
    (written,) = workbook.parent.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content
    assert all(f"{loss:.4f}"[:5].encode() in content for loss in losses(workbook.parent))


def test_wandb_without_a_key_is_a_message(phi_folder: Path, workbook: Path) -> None:
    pytest.importorskip("wandb")
    done = train(phi_folder, "--report-to", "wandb", WANDB_SILENT="true")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "REPORT_TO wandb does not work here" in in_words(done.stderr)
    assert "train without it" in in_words(done.stderr)
    assert "Traceback" not in done.stderr


def test_trackio_gets_the_curves(phi_folder: Path, workbook: Path) -> None:
    pytest.importorskip("trackio")
    done = train(phi_folder, "--report-to", "trackio", TRACKIO_DIR=str(workbook.parent / "kept"))
    assert done.returncode == 0, done.stderr
    assert "trackio show --project finetune_colab" in in_words(done.stdout)
    assert [*workbook.parent.glob("kept/finetune_colab*")]


def test_nothing_is_sent_unasked(phi_folder: Path, workbook: Path) -> None:
    """Also where everything is installed and set up for it."""
    keys = {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline", "TRACKIO_SPACE_ID": "ada/curves"}
    done = train(phi_folder, **keys)
    assert done.returncode == 0, done.stderr
    assert "Monitor" not in done.stdout
    assert not [*workbook.parent.rglob("*wandb*"), *workbook.parent.rglob("events*")]
    assert not [*workbook.parent.rglob("*trackio*")]
    record = json.loads((workbook.parent / "model/run.json").read_text())
    assert record["settings"]["REPORT_TO"] == "none"


def test_each_run_of_a_notebook_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    for run in ("first", "second"):
        ft.monitored(ft.Config(REPORT_TO="tensorboard"), run)
        assert os.environ["TENSORBOARD_LOGGING_DIR"].endswith(run)
