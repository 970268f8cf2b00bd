"""The picture in README.md: run it in the folder where `python finetune_colab.py demo` has run.

python docs/result.py       writes docs/result.png
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import openpyxl
import pandas

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREY = "#1f6fb2", "#d9730d", "#6b6b6b"


def main() -> None:
    log = pandas.read_csv("model/training_visuals/training_metrics.csv")
    answers = openpyxl.load_workbook("model/answers.xlsx")["As taught"]
    _, question, expected, before, after, *_ = next(answers.iter_rows(2, values_only=True))
    with plt.style.context("seaborn-v0_8-whitegrid"):
        figure, (curves, texts) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for column, color, label, mark in (
        ("loss", BLUE, "training", None),
        ("eval_loss", ORANGE, "validation (4 held-out wordings)", "o"),
    ):
        found = log.dropna(subset=[column])
        curves.plot(found["step"], found[column], color=color, label=label, marker=mark)
    curves.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
    curves.legend(loc="center right")
    texts.axis("off")
    height = 1.0
    for label, text, color in (
        ("Question", question, "black"),
        ("Expected answer", expected, "black"),
        ("Before training", before, ORANGE),
        ("After training", after, BLUE),
    ):
        lines = textwrap.wrap(" ".join(text.split()), 62, max_lines=3, placeholder=" …")
        texts.text(0, height, label, color=GREY, va="top", size=9)
        texts.text(0, height - 0.06, "\n".join(lines), color=color, va="top", size=10.5)
        height -= 0.12 + 0.065 * len(lines)
    figure.savefig(HERE / "result.png", dpi=100)


if __name__ == "__main__":
    main()
