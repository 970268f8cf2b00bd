"""Seconds and memory of a step with phi-2's real shape, on a GPU held down to a T4's memory.

    python benchmarks/phi2_shape.py [--steps 12] [--workload long] [--targets attention]
    python benchmarks/phi2_shape.py --tiny     # the same way through, on a processor

A phi-2 of random weights (2.7 billion, 5.6 GB, in a temporary folder) is trained in NF4 by
finetune_colab.py, through its command line, and by the padded recipe: rows padded to 512, gradient
checkpointing. Both compute in float16 as on a T4; the speed is that of the GPU that is there. The
first two steps are not timed. Memory is the most that torch had in use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace

from peers import run, workload
from workload import TARGETS, Job, useful_work

GPU = "import torch; raise SystemExit(not torch.cuda.is_available())"


def show(job: Job) -> None:
    tokens = useful_work(job)[0] / job.steps
    print(f"{tokens:.0f} useful tokens in a step of 16 rows, LoRA on {job.targets}\n")
    print("| row | s a step | tokens/s | memory MB |\n| --- | --- | --- | --- |")
    for row in ("ours", "padded"):
        result = run(replace(job, row=row))
        if not result:
            print(f"| {row} | failed |")
            continue
        seconds = result["wall"] / result["steps"]
        memory = result.get("gpu_memory", result["memory"])
        print(f"| {row} | {seconds:.3f} | {tokens / seconds:,.0f} | {memory:,.0f} |", flush=True)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--steps", type=int, default=12, help="of 16 rows, 3 or more")
    parser.add_argument("--workload", choices=["qa", "long"], default="qa")
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--memory-gb", type=float, default=15.0)
    parser.add_argument("--tiny", action="store_true", help="a small model on the processor")
    wanted = parser.parse_args()
    job = Job("", steps=wanted.steps, kind=wanted.workload, targets=wanted.targets, untimed=2)
    if wanted.tiny:
        job = replace(job, shape="tiny")
    elif subprocess.run([sys.executable, "-c", GPU], check=False).returncode:
        print("There is no NVIDIA GPU here. --tiny goes the same way on the processor.")
        return
    else:
        job = replace(job, shape="phi-2", gpu=True, memory_gb=wanted.memory_gb)
    with workload(job) as ready:
        show(ready)


if __name__ == "__main__":
    main()
