"""Where the time of a step goes: the operations of finetune_colab.py, grouped, from the second step on.

python benchmarks/profile_steps.py [--workload long] [--targets all] [--steps 4]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from typing import Any

import one_run
from workload import TARGETS, Job

GROUPS = {
    "dropout": ("random", "bernoulli", "aten::lt", "masked_fill"),
    "products of matrices": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("flash_attention", "scaled_dot"),
    "activation (GELU)": ("gelu",),
    "norms": ("layer_norm",),
    "loss": ("softmax", "nll_loss"),
    "adding and scaling": ("aten::add", "aten::mul", "aten::div", "aten::neg", "aten::sub"),
    "copies, gathering, zeros": ("copy", "cat", "index", "fill", "zero", "embedding", "scatter"),
    "optimizer and norm of the gradient": ("_foreach", "linalg", "sqrt", "lerp", "addc"),
}


def group_of(name: str) -> str:
    found = (group for group, marks in GROUPS.items() if any(mark in name for mark in marks))
    return next(found, "other")


def profiler() -> Any:
    from torch import profiler
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                self.watch = profiler.profile(activities=[profiler.ProfilerActivity.CPU])
                self.watch.start()
            if state.global_step == state.max_steps:
                self.watch.stop()

    return Profile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--targets", choices=TARGETS, default="attention")
    parser.add_argument("--workload", default="qa")
    wanted = parser.parse_args()
    watcher = profiler()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(folder, steps=wanted.steps, targets=wanted.targets, kind=wanted.workload)
        one_run.ours_here(job, watcher)
    times: Counter[str] = Counter()
    for event in watcher.watch.key_averages():
        times[group_of(event.key)] += event.self_cpu_time_total
    print("\n| what | share |\n| --- | --- |")
    for group, microseconds in times.most_common():
        print(f"| {group} | {microseconds / times.total():.1%} |")


if __name__ == "__main__":
    main()
