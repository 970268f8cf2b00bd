"""How long `check` takes on 500 rows, and how soon a mistake is refused: medians of wall and CPU seconds.

    python benchmarks/check_time.py [ROUNDS]

The model is a folder with a tokenizer and a Phi of phi-2's sizes without weights, so nothing is downloaded.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openpyxl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PreTrainedTokenizerFast

SCRIPT = Path(__file__).resolve().parents[1] / "finetune_colab.py"
ROWS = 500
QUESTION = "What does item {0} of the catalogue cost, and which of our shops sells it?"
ANSWER = "Item {0} costs {0} euros. It is sold by shop number {1}, which opens at nine every day."
CASES = {
    "check of 500 rows": (["check"], 0),
    "check, a missing file": (["check", "--dataset-path", "nothing.xlsx"], 1),
    "check, a wrong column": (["check", "--question-column", "nothing"], 1),
    "train, a missing file": (["--dataset-path", "nothing.xlsx"], 2),
}


def write_model(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    texts = [text.format(i, i % 37) for i in range(ROWS) for text in (QUESTION, ANSWER)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 32}
    PhiConfig(architectures=["PhiForCausalLM"], **sizes).save_pretrained(folder)


def run(folder: Path, arguments: list[str], code: int) -> tuple[float, float]:
    """Wall and CPU seconds of one command."""
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, str(SCRIPT), *arguments, "--model-name", "base", "--load-in-4bit"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, os.times()
    if ended.returncode != code:
        raise SystemExit(ended.stdout + ended.stderr)
    used = after.children_user - before.children_user
    return wall, used + after.children_system - before.children_system


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        book = openpyxl.Workbook()
        book.active.append(["question", "answer"])
        for i in range(ROWS):
            book.active.append([QUESTION.format(i), ANSWER.format(i, i % 37)])
        book.save(folder / "dataset.xlsx")
        write_model(folder / "base")
        for name, (arguments, code) in CASES.items():
            took = [run(folder, arguments, code) for _ in range(rounds + 1)][
                1:
            ]  # the first warms up
            wall, cpu = (statistics.median(figures) for figures in zip(*took, strict=True))
            print(f"{name:24} {wall:5.2f} s wall {cpu:5.2f} s CPU")


if __name__ == "__main__":
    main()
