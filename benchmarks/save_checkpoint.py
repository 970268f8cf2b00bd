"""What it costs that a checkpoint is synchronised, checked and kept, beside the Trainer's bare saving.

    python benchmarks/save_checkpoint.py [MILLIONS] [ROUNDS]

One layer with as many LoRA weights as phi-2's adapter of rank 16 has: 23.6 million, or MILLIONS. The
Trainer saves it bare, and with what the script does around it; the two take turns, and medians of the
seconds of a save are printed, without the training around it.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import Trainer, TrainerCallback

import finetune_colab as ft


def build(folder: Path, millions: float) -> tuple[Trainer, ft.Checkpoints]:
    """A demo model with a rank so high that the adapter has the size asked for."""
    cfg = ft.Config(MODEL_NAME=ft.DEMO_MODEL, DATASET_PATH=ft.EXAMPLE_DATASET, MAX_STEPS=1)
    cfg.CHECKPOINT_DIR, cfg.LORA_R = str(folder), round(millions * 1e6 / 11_520)
    device = ft.Device("cpu", "float32", False, "")
    data = ft.prepare_data(cfg, ft.find_pairs(cfg), ft.load_tokenizer(cfg))
    model = ft.add_lora(cfg, ft.load_base(cfg, device))
    checkpoints = ft.Checkpoints(cfg, ft.identity_of(cfg, data, device))
    checkpoints.starting_point()
    plan = ft.plan_run(cfg, data.train, device)
    trainer_class: Any = type("AnswerTrainer", (ft.AnswerTrainer, Trainer, TrainerCallback), {})
    stats = ft.RunStats(trainable=1, parameters=1)
    trainer = trainer_class(cfg, model, data, device, plan, checkpoints, stats, [])
    trainer.run(None)  # so that the optimizer has something to save
    return trainer, checkpoints


def seconds(trainer: Trainer, checkpoints: ft.Checkpoints, step: int, bare: bool) -> float:
    trainer.state.global_step = step
    save: Any = (super(ft.AnswerTrainer, trainer) if bare else trainer)._save_checkpoint
    started = time.perf_counter()
    save(trainer.model, None)
    taken = time.perf_counter() - started
    if bare:
        shutil.rmtree(checkpoints.folder / f"checkpoint-{step}")
    return taken


def main() -> None:
    millions = float(sys.argv[1]) if len(sys.argv) > 1 else 23.6
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as place:
        trainer, checkpoints = build(Path(place), millions)
        times: dict[bool, list[float]] = {True: [], False: []}
        for step in range(2, 2 + 2 * rounds):
            times[step % 2 == 0].append(seconds(trainer, checkpoints, step, bare=step % 2 == 0))
        size = sum(path.stat().st_size for path in checkpoints.last.folder.iterdir())
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"{trainable / 1e6:.1f} million weights, {size / 1e6:.0f} MB a checkpoint")
    bare, kept = (statistics.median(times[one]) for one in (True, False))
    print(f"bare {bare:.2f} s, kept {kept:.2f} s, ratio {kept / bare:.2f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
