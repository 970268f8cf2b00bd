"""How long the same training takes here and elsewhere, on a processor.

    python benchmarks/peers.py --install trl            # once for each peer; or --install all
    python benchmarks/peers.py --rounds 3 --steps 8
    python benchmarks/peers.py --workload long --targets all --rows ours,padded,trl-grouped

Everybody trains the same random Phi (8 layers, as float32) on the same rows of chance, with the same LoRA, 16
rows in a step as 4 x 4. The rows of the table take turns, each in a process of its own; shown are
medians. The processor's time is the one to compare on a shared machine.

    cpu, wall   seconds from the beginning of the first step to the end of the last one
    memory      most memory of the process, in MB
    tokens/s    useful tokens, padding not counted, per second of wall time
    faster      processor time of the padded recipe over the row's, within each round
    ideal       processor time over that of the least work at this machine's rate of matrix products

The padded recipe is that of most notebooks: rows padded to 512, gradient checkpointing, logits
everywhere. A name with -default is a peer as it comes, the others are the fastest known to us.
axolotl-packing trains on 2 % fewer tokens than the others, and packs of long rows make more steps.
Each peer lives in ~/.cache/finetune_colab/peers, or in the folder that PEERS_DIR names.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from workload import TARGETS, Job, useful_work

HERE = Path(__file__).resolve().parent
PEERS = Path(os.environ.get("PEERS_DIR", "~/.cache/finetune_colab/peers")).expanduser()
TORCH = "torch==2.13.0 numpy psutil"
# What pip is told for each environment, in turn. Where a second line has --no-deps, the first one
# names what training really imports: the rest needs a GPU, or gigabytes. On Linux, point pip to
# torch's builds for processors (PIP_INDEX_URL, PIP_FIND_LINKS), or every environment gets CUDA.
ENVIRONMENTS = {
    "trl": [
        f"install {TORCH} transformers==5.23.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0"
    ],
    "litgpt": [f"install {TORCH} litgpt==0.5.13 requests"],
    "llamafactory": [
        f"install {TORCH} llamafactory==0.9.5",
        "uninstall -y torchvision torchaudio",
    ],
    "axolotl": [
        f"install {TORCH} transformers==5.16.1 peft==0.20.0 tokenizers==0.23.1 accelerate==1.13.0 "
        "datasets==4.8.4 trl==1.9.0 kernels==0.16.* pydantic==2.12.5 addict fire PyYAML==6.0.3 "
        "requests einops colorama numba==0.68.* typer==0.25.1 evaluate==0.4.1 scipy art tensorboard "
        "nvidia-ml-py==12.560.30 wandb python-dotenv==1.0.1 zstandard==0.22.0 fastcore langdetect "
        "immutabledict schedulefree==1.4.1 posthog optimum==1.16.2 sentencepiece",
        "install --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 "
        "bitsandbytes==0.50.2 torchao==0.17.0 triton",
    ],
    "unsloth": [
        f"install {TORCH} transformers==5.17.0 trl==1.15.0 peft accelerate datasets==4.* tyro "
        "protobuf sentencepiece hf_transfer rich pydantic pyyaml json5 nest-asyncio structlog click "
        "typer wheel packaging tqdm pillow regex msgspec",
        "install --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9",
    ],
}
ROWS = """padded ours trainer-dynamic trainer-grouped trl-default trl-grouped trl-padding-free litgpt
llamafactory-default llamafactory-grouped axolotl-default axolotl-packing unsloth-default
unsloth-grouped""".split()
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(os.cpu_count()),  # some peers would take fewer
    "OMP_WAIT_POLICY": "PASSIVE",  # or else a waiting thread spins, and its time is counted
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
}


def install(name: str) -> None:
    place = PEERS / name
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    for line in ENVIRONMENTS[name]:
        subprocess.run([place / "bin" / "pip", *shlex.split(line)], check=True)


def python_of(row: str) -> str | None:
    """The interpreter that runs a row; None when its environment is not there."""
    name = row.partition("-")[0]
    if name not in ENVIRONMENTS:
        return sys.executable
    python = PEERS / name / "bin" / "python"
    return str(python) if python.exists() else None


def run(job: Job) -> dict[str, Any]:
    """One row, once: what it measured, with the memory and the time of its whole process."""
    python = python_of(job.row)
    assert python, job.row
    settings = os.environ | ENVIRONMENT | ({} if job.gpu else {"CUDA_VISIBLE_DEVICES": ""})
    with tempfile.TemporaryDirectory() as place, Path(place, "log").open("w+") as log:
        Path(place, "job.json").write_text(json.dumps(asdict(job)))
        command = [python, str(HERE / "one_run.py"), "job.json", "result.json"]
        child = subprocess.Popen(command, cwd=place, env=settings, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            tail = Path(place, "log").read_text(errors="replace")[-1500:]
            print(f"{job.row} failed with {child.returncode}:\n{tail}", file=sys.stderr)
            return {}
        result = dict(json.loads(Path(place, "result.json").read_text()))
    whole = usage.ru_utime + usage.ru_stime
    return result | {"memory": usage.ru_maxrss / 1024, "process_cpu": whole}


@contextmanager
def workload(job: Job) -> Iterator[Job]:
    """The job with its model, in a folder that lasts as long."""
    with tempfile.TemporaryDirectory() as folder:
        job = replace(job, folder=folder)
        if not run(replace(job, row="workload", memory_gb=0)):
            raise SystemExit(1)
        yield job


def available(rows: Sequence[str]) -> list[str]:
    for row in rows:
        if not python_of(row):
            name = row.partition("-")[0]
            print(f"{row} is left out: python benchmarks/peers.py --install {name}")
    return [row for row in rows if python_of(row)]


def measure(job: Job, rows: Sequence[str], rounds: int) -> list[dict[str, dict[str, Any]]]:
    """For each round, what each row measured; the order turns from round to round."""
    measured = []
    for number in range(rounds):
        results: dict[str, dict[str, Any]] = {}
        for row in [*rows[number % len(rows) :], *rows[: number % len(rows)], "matrix_rate"]:
            results[row] = run(replace(job, row=row, seed=number))
            shown = ", ".join(
                f"{k} {v:.1f}" for k, v in results[row].items() if k in ("cpu", "wall")
            )
            print(f"  {time.strftime('%H:%M:%S')} round {number + 1}  {row}: {shown}", flush=True)
        measured.append(results)
    return measured


def table(job: Job, rows: Sequence[str], measured: list[dict[str, dict[str, Any]]]) -> None:
    tokens, work = useful_work(job)
    rate = statistics.median(results["matrix_rate"]["rate"] for results in measured)
    ideal = work / rate
    print(
        f"\n{tokens} useful tokens; {work / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s take {ideal:.1f} s "
        "of processor time\n\n| row | steps | cpu s | wall s | memory MB | tokens/s | faster | ideal |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for row in rows:
        good = [results for results in measured if results[row]]
        if not good:
            print(f"| {row} | failed |")
            continue
        cpu, wall, memory = (
            statistics.median(results[row][name] for results in good)
            for name in ("cpu", "wall", "memory")
        )
        base = [r["padded"]["cpu"] / r[row]["cpu"] for r in good if r.get("padded")]
        faster = f"{statistics.median(base):.2f}" if base else ""
        print(
            f"| {row} | {good[0][row]['steps']} | {cpu:.1f} | {wall:.1f} | {memory:,.0f} | "
            f"{tokens / wall:,.0f} | {faster} | {cpu / ideal:.2f} |"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", choices=[*ENVIRONMENTS, "all"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of 16 rows, 2 or more")
    parser.add_argument("--workload", choices=["qa", "long"], default="qa")
    parser.add_argument("--targets", choices=TARGETS, default="attention")
    parser.add_argument("--vocabulary", type=int, default=2048, help="phi-2 has 51200")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=ROWS)
    return parser.parse_args()


def main() -> None:
    wanted = arguments()
    if wanted.install:
        for name in ENVIRONMENTS if wanted.install == "all" else [wanted.install]:
            install(name)
        return
    rows = available(wanted.rows)
    if not rows:
        return
    kind = {"targets": wanted.targets, "kind": wanted.workload, "vocabulary": wanted.vocabulary}
    with workload(Job("", steps=wanted.steps, **kind)) as job:
        table(job, rows, measure(job, rows, wanted.rounds))


if __name__ == "__main__":
    main()
