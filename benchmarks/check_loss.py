"""Whether our training learns what the plain way learns: the loss of each step, beside each other.

    python benchmarks/check_loss.py [--steps 8] [--targets all] [--workload long]

finetune_colab.py trains through its command line, without dropout; its adapter before the first step
and the ids that each step puts through the model are noted from outside. A plain loop then does
the same: PEFT, rows padded to the longest, AdamW, and the mean over the answer tokens of a step.
Ends with 1 where a loss differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

import one_run
from workload import TARGETS, Job, encoded

RATE, LONGEST_GRADIENT, TOLERANCE, END_ID = 1e-3, 0.3, 1e-4, 0
SETTINGS = f"""--lr-scheduler=constant --warmup-ratio=0 --learning-rate={RATE}
    --max-grad-norm={LONGEST_GRADIENT} --logging-steps=1""".split()


def recorder(job: Job, seen: list[list[int]], losses: list[float]) -> Any:
    import torch
    from transformers import TrainerCallback

    def look(module: Any, inputs: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and seen:
            seen[-1] += inputs[0].flatten().tolist()

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            model.save_pretrained(f"{job.folder}/first")
            self.watching = torch.nn.modules.module.register_module_forward_pre_hook(look)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seen.append([])

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend(value for name, value in logs.items() if name == "loss")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.watching.remove()

    return Recorder()


def examples_in(ids: list[int]) -> list[list[int]]:
    """What was put through the model, cut at each end of turn, however it was laid out."""
    parts = itertools.groupby(ids, key=lambda token: token == END_ID)
    return [[*part, END_ID] for is_end, part in parts if not is_end]


def padded(examples: list[list[int]], prompts: dict[tuple[int, ...], int]) -> dict[str, Any]:
    import torch

    width = max(map(len, examples))
    table: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids in examples:
        more, prompt = width - len(ids), prompts[tuple(ids)]
        table["input_ids"].append(ids + [END_ID] * more)
        table["attention_mask"].append([1] * len(ids) + [0] * more)
        table["labels"].append([-100] * prompt + ids[prompt:] + [-100] * more)
    return {name: torch.tensor(rows) for name, rows in table.items()}


def plain_losses(job: Job, steps: list[list[int]]) -> Iterator[float]:
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        one_run.loaded(job)[0], f"{job.folder}/first", is_trainable=True
    )
    learnt = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=RATE, weight_decay=0)
    prompts = {tuple(ids): prompt for ids, prompt in encoded(job)}
    for ids in steps:
        loss = model(**padded(examples_in(ids), prompts)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, LONGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--workload", default="qa")
    wanted = parser.parse_args()
    seen: list[list[int]] = []
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        kind = {"kind": wanted.workload, "shape": "slim", "extra": SETTINGS}
        job = Job(folder, steps=wanted.steps, targets=wanted.targets, dropout=0, **kind)
        one_run.ours_here(job, recorder(job, seen, losses))
        both = list(zip(losses, plain_losses(job, seen), strict=True))
    print("\n| step | rows | ours | plain | difference |\n| --- | --- | --- | --- | --- |")
    for step, (one, other) in enumerate(both):
        rows = len(examples_in(seen[step]))
        print(f"| {step + 1} | {rows} | {one:.6f} | {other:.6f} | {abs(one - other):.1e} |")
    return int(max(abs(one - other) for one, other in both) > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
