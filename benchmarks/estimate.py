"""What a training was estimated to take, and what it took.

    python benchmarks/estimate.py [rounds]

finetune_colab.py trains through its command line on three data sets of chance: short answers with LoRA on the
attention, the same on all six layers, and long answers on all six (8 layers, 512 wide, as float32). Shown
are the medians of the figures that it writes down itself. Both depend on what else the machine does.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import run, workload
from workload import Job

JOBS = {
    "short answers, attention": Job("", steps=8, targets="attention"),
    "short answers, all layers": Job("", steps=8, targets="all"),
    "long answers, all layers": Job("", steps=3, targets="all", kind="long"),
}


def figures(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        run(replace(job, row="ours", extra=[f"--output-dir={place}/model"]))
        path = Path(place, "model/training_visuals/training_metrics.json")
        return dict(json.loads(path.read_text()))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    names = ("estimated_seconds", "train_seconds", "estimated_memory_gb", "peak_memory_gb")
    print("| data | estimated s | measured s | ratio | estimated GB | measured GB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, job in JOBS.items():
        with workload(job) as ready:
            found = [figures(ready) for _ in range(rounds)]
        estimated, seconds, memory, peak = (
            statistics.median(one[name] for one in found) for name in names
        )
        print(
            f"| {name} | {estimated:.1f} | {seconds:.1f} | {seconds / estimated:.2f} | "
            f"{memory:.2f} | {peak:.2f} | {peak / memory:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
