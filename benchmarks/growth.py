"""How the cost of a training grows with the rows, the length of the answers and the rank.

    python benchmarks/growth.py [rows] [answers] [rank]

finetune_colab.py trains through its command line: a small random Phi (4 layers, 256 wide, as float32), one
epoch, LoRA on all six layers. "cpu" is the processor's time from the first step to the last, "each" the
same for 1,000 useful tokens, "beside" that of the rest of the process: imports, reading and checking
the data, loading and saving.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from peers import run, workload
from workload import Job, useful_work

SERIES = {
    "rows": (256, 512, 1024, 2048, 4096),
    "answers": (25, 50, 100, 200, 400),  # words
    "rank": (4, 16, 64, 256),
}


def jobs(series: str) -> Iterator[tuple[int, Job]]:
    for value in SERIES[series]:
        job = Job("", targets="all", shape="slim", extra=["--max-length=2048"])
        if series == "rows":
            job.steps = value // 16
        elif series == "answers":
            job.kind = str(value)
        else:
            job.rank = value
        with workload(job) as ready:
            yield value, ready


def show(series: str) -> None:
    print(f"\n| {series} | tokens | cpu s | each | to the first | beside s | memory MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = 0.0
    for value, job in jobs(series):
        result, (tokens, _) = run(job), useful_work(job)
        each = 1000 * result["cpu"] / tokens
        first = first or each
        beside = result["process_cpu"] - result["cpu"]
        print(
            f"| {value:,} | {tokens:,} | {result['cpu']:.1f} | {each:.3f} | {each / first:.2f} | "
            f"{beside:.1f} | {result['memory']:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    for name in sys.argv[1:] or SERIES:
        show(name)
