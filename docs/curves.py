"""The four pictures of curves in finetune.md: four trainings of the built-in model, good and not so good.

python docs/curves.py       takes a few minutes; writes docs/curves.png
"""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "finetune_colab.py"
THINGS = (
    "lamp chair clock kettle radio carpet mirror bicycle tent ladder drill camera fridge oven sofa "
    "desk shelf curtain blanket pillow toaster heater fan vase basket candle bell brush bucket rope "
    "hammer saw guitar drum flute piano skateboard scooter helmet backpack wallet umbrella coat boot"
).split()
HELP = {
    "How do I return the {}?": "Bring the {} back within 30 days, with the receipt, and you get your money back.",
    "The {} is broken.": "I am sorry. We mend every {} for free in its first two years. Please send it to our shop.",
    "How long does the {} take?": "The {} leaves our shop today and is with you in three days.",
    "Can I pay for the {} later?": "Yes. You can pay for the {} in six parts, one each month.",
    "Do you have the {} in red?": "The {} comes in red, green and white. Tell us which one you like.",
    "Who made this {}?": "Every {} is made by hand, in a small shop in the north.",
}
RUNS = {  # what is taught, and the flags
    "good": ("help", "--learning-rate 5e-3 --num-epochs 6 --eval-steps 5"),
    "overfits": (
        "chance",
        "--learning-rate 5e-3 --lora-r 64 --num-epochs 120 --eval-steps 10",
    ),
    "learns too little": ("help", "--learning-rate 2e-5 --num-epochs 6 --eval-steps 5"),
    "diverges": ("help", "--learning-rate 0.3 --max-grad-norm 0 --num-epochs 4 --eval-steps 5"),
}
# what a real model has by default; the built-in one would bring its own
USUAL = "--max-steps 0 --batch-size 4 --gradient-accumulation-steps 4 --keep-best --eval-answers 0 --yes"


def pairs(kind: str) -> list[tuple[str, str]]:
    """Answers that follow from the questions, or random answers, which nobody can predict."""
    if kind == "help":
        return [(q.format(t), a.format(t)) for t in THINGS for q, a in HELP.items()]
    chance = random.Random(1)
    return [
        (f"Where is the {thing}?", " ".join(chance.choices(THINGS, k=12))) for thing in THINGS[:36]
    ]


def main() -> None:
    figure, places = plt.subplots(2, 2, figsize=(14, 10), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, (kind, flags)) in zip(places.flat, RUNS.items(), strict=True):
            table = Path(folder, f"{kind}.csv")
            with table.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("question", "answer"), *pairs(kind)])
            command = [sys.executable, SCRIPT, "--model-name", "demo", "--dataset-path", table.name]
            output = name.replace(" ", "-")
            more = [*flags.split(), *USUAL.split(), "--output-dir", output]
            subprocess.run([*command, *more], cwd=folder, check=True)
            curves = Path(folder, output, "training_visuals", "training_curves.png")
            place.imshow(plt.imread(curves))
            place.set_title(f"{name}: {flags}", fontsize=11)
            place.axis("off")
    figure.savefig(HERE / "curves.png", dpi=100)


if __name__ == "__main__":
    main()
