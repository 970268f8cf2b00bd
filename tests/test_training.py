"""The right adapter is kept, the figures are those of the run, and settings of the step hold."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import seams
import torch
from conftest import PAIRS, Run, in_words, metrics, write_workbook
from safetensors.torch import load_file
from tables import rows_of
from test_steps import ADAPTER, column, examples_of
from torch.nn import functional
from transformers import optimization

Train = Callable[..., str]
SHORT = ("--eval-answers", 0, "--lora-dropout", 0)


@pytest.fixture
def train(small_phi: Path, workbook: Path, run: Run) -> Train:
    """A training in the working folder that ends with this code, and what it says."""

    def train(*flags: object, model: Path = small_phi, code: int = 0) -> str:
        found, printed = run("--model-name", model, *SHORT, *flags)
        assert found == code, printed
        return in_words(printed)

    return train


OVERSHOOTING = "--max-steps 4 --eval-steps 1 --save-steps 100 --warmup-ratio 0".split()
OVERSHOOTING += "--learning-rate 0.1 --lr-scheduler constant".split()  # the first step is the best


@pytest.mark.parametrize("flags, best, steps", rows_of("best"))
def test_the_adapter_on_disk_is_the_one_that_was_measured(
    flags: str, best: str, steps: str, small_phi: Path, phi_folder: Path, train: Train
) -> None:
    four_bit = "4bit" in flags
    model = phi_folder if four_bit else small_phi
    train(*OVERSHOOTING, *flags.split(), model=model)
    losses, figures, saved = column("eval_loss"), metrics(), Path(ADAPTER).read_bytes()
    shutil.rmtree("model")  # as if it had been killed before this was written
    assert "no more training" in train(*OVERSHOOTING, *flags.split(), model=model)
    assert (metrics(), Path(ADAPTER).read_bytes()) == (figures, saved)
    assert losses[0] == min(losses), "the case is not the one meant"
    assert (figures["steps"], figures["best_step"]) == (len(losses), int(best) if best else None)
    assert len(losses) == int(steps)
    assert figures["eval_loss"] == losses[0 if best else -1]
    assert json.loads(Path("model/run.json").read_text())["device"]["four_bit"] == four_bit
    tuned, measured = seams.load_tuned(Path("model")).model, examples_of(model, held_out=True)
    near = 0.02 if four_bit else 1e-5  # it answers in 16 bits
    assert seams.mean_loss(tuned, measured) == pytest.approx(figures["eval_loss"], abs=near)
    with tuned.disable_adapter():
        assert seams.mean_loss(tuned, measured) == pytest.approx(figures["base_eval_loss"], abs=near)
    assert abs(figures["base_eval_loss"] - figures["eval_loss"]) > 0.1


def test_every_token_counts_once_an_epoch_and_a_row_too_long_not_at_all(
    small_phi: Path, workbook: Path, train: Train
) -> None:
    write_workbook(workbook, [("question", "answer"), *PAIRS, ("Tell me all.", "word " * 100)])  # M8
    flags = "--max-length 80 --num-epochs 2 --batch-size 8 --gradient-accumulation-steps 1 --save-steps 4"
    assert re.search(r"MAX_LENGTH\D+80\b.*\brow 26\b", train(*flags.split(), "--validation-fraction", 0))
    figures, weights = metrics(), load_file(ADAPTER)
    lengths = [len(one["input_ids"]) for one in examples_of(small_phi, held_out=False)]
    assert figures["tokens_trained"] == 2 * sum(n for n in lengths if n <= 80)
    assert [figures[name] for name in ("train_pairs", "eval_pairs", "epochs", "steps")] == [24, 0, 2, 6]
    assert figures["base_eval_loss"] is figures["eval_loss"] is figures["best_step"] is None
    assert figures["trainable_parameters"] == sum(weight.numel() for weight in weights.values())
    assert 0.1 < figures["peak_memory_gb"] < 20
    kept = sorted(path.name for path in Path("checkpoints").glob("*/checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]


def test_measuring_and_saving_are_not_training_time(train: Train, patched: Any) -> None:
    embedding, save, slept = functional.embedding, torch.save, []

    def slow(real: Any, *args: Any, **kwargs: Any) -> Any:
        if real is save or not torch.is_grad_enabled():
            slept.append(time.sleep(0.1))
        return real(*args, **kwargs)

    patched.setattr(functional, "embedding", partial(slow, embedding))
    patched.setattr(torch, "save", partial(slow, save))
    started = time.perf_counter()
    train("--max-steps", 2, "--eval-steps", 1)
    assert len(slept) > 8
    assert 0 < metrics()["train_seconds"] < time.perf_counter() - started - 0.1 * len(slept)


def test_another_optimizer_is_used_or_refused_without_its_gpu(train: Train, patched: Any) -> None:
    steps, real = [], optimization.Adafactor.step
    patched.setattr(optimization.Adafactor, "step", lambda *a, **k: (steps.append(1), real(*a, **k))[1])
    train("--optimizer", "adafactor", "--max-steps", 2)
    assert len(steps) == 2
    if not torch.cuda.is_available():
        assert re.search("OPTIMIZER.*GPU", train("--max-steps", 1, "--optimizer", "paged_adamw_8bit", code=2))


def test_noise_is_weaker_in_longer_examples_and_the_same_in_the_next_run(train: Train, patched: Any) -> None:
    """It is what lies between the embedding and the first norm behind it; what is measured has none."""
    embedding, norm, words = functional.embedding, functional.layer_norm, []
    noises: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def look_up(*args: Any, **kwargs: Any) -> torch.Tensor:
        words[:] = [embedding(*args, **kwargs)]
        return words[0]

    def first_norm(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if words:
            noises[torch.is_grad_enabled()].append((states - words.pop()).detach()[0])
        return norm(states, *args, **kwargs)

    patched.setattr(functional, "embedding", look_up)
    patched.setattr(functional, "layer_norm", first_norm)
    flags = "--max-steps 2 --neftune-alpha 50 --lora-dropout 0.1 --tokens-at-once 1 --no-resume".split()
    first, second = ((train(*flags), Path(ADAPTER).read_bytes())[1] for _ in range(2))
    assert first == second, "to the bit, with noise and with dropout"
    assert len({len(noise) for noise in noises[True]}) > 3
    for noise in noises[True]:
        most = 50 / math.sqrt(noise.numel())
        assert 0.98 * most < noise.abs().max() <= 1.001 * most
        assert noise.std() == pytest.approx(most / math.sqrt(3), rel=0.1)  # as even noise has it
    assert noises[False] and not any(noise.any() for noise in noises[False])


@pytest.mark.parametrize("service, environment, code, told", rows_of("services"))
def test_curves_go_to_a_service_only_when_asked(
    service: str, environment: str, code: str, told: str, small_phi: Path, workbook: Path
) -> None:
    words = ["--model-name", small_phi, *SHORT, "--max-steps", 2]
    if service != "none":
        pytest.importorskip(service)
        words += ["--report-to", service]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TENSORBOARD"))}
    how = {"env": kept | {"HOME": str(workbook.parent), "WANDB_SILENT": "true"} | json.loads(environment), "text": True}
    command = [sys.executable, str(seams.SCRIPT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, check=False, **how)
    assert done.returncode == int(code), done.stdout + done.stderr
    assert told in in_words(done.stdout + done.stderr) and "Traceback" not in done.stderr
    found = [path for one in ("run-*.wandb", "*wandb*", "events*", "*trackio*", "kept/*") for path in Path().rglob(one)]
    assert bool(found) == (service != "none" and code == "0")
    if service == "tensorboard":  # in a folder of this run's own
        loaded = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        (events,), (run,) = Path("logs").glob("*/events*"), Path("checkpoints").iterdir()
        seen = loaded.EventAccumulator(str(events)).Reload()
        assert [point.value for point in seen.Scalars("train/loss")] == pytest.approx(column("loss"), rel=1e-4)
        assert (events.parent.name, "eval/loss" in seen.Tags()["scalars"]) == (run.name, True)
    if service == "wandb" and found:
        content = found[0].read_bytes()
        assert b"train/loss" in content
        assert all(f"{loss:.4f}"[:5].encode() in content for loss in column("loss"))
