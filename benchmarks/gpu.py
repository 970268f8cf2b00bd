"""What a GPU does with phi-2's shape, in one table and gpu-results.json.

    python benchmarks/gpu.py [--out FOLDER] [--steps 20] [--memory-gb 15]
    python benchmarks/gpu.py --small     # the same on a processor: minutes of work on a tiny model

It needs no internet. First come the tests marked `gpu`. Then a phi-2 of random weights (2.7 billion, 5.6 GB, in
a temporary folder) is trained in NF4 on rows as long as usual answers, LoRA on all six layers, by
finetune_colab.py, by the Trainer with dynamic padding, and by the padded recipe of most notebooks. All compute in
float16 with as much memory as a T4 has, whatever the GPU; the speed is that of the GPU that is there. The first two
steps are not timed. The rest are single questions: which attention torch takes, what a product with 4-bit weights
costs in two ways, whether a killed run and one that runs out of memory end as an undisturbed one.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import run, workload
from workload import TARGETS, Job, useful_work

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = "import torch; raise SystemExit(not torch.cuda.is_available())"
TRAININGS = {
    "ours": "finetune_colab.py",
    "trainer-dynamic": "Trainer, dynamic padding",
    "padded": "padded to 512, checkpointing",
}
MEGABYTE = 2**20


def gpu_tests() -> str:
    """The last line of pytest: how many passed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]


def trainings(job: Job) -> dict[str, dict[str, Any]]:
    tokens, results = useful_work(job)[0], {}
    print("| training | s a step | rows/s | useful tokens/s | peak MB | reserved MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row, name in TRAININGS.items():
        result = results[row] = run(replace(job, row=row))
        if not result:
            print(f"| {name} | failed |")
            continue
        seconds = result["wall"] / result["steps"]
        memory, reserved = (result.get(kind) for kind in ("gpu_memory", "gpu_reserved"))
        shown = f"{memory:,.0f} | {reserved:,.0f}" if job.gpu else f"{result['memory']:,.0f} | none"
        speed = f"{16 / seconds:.2f} | {tokens / job.steps / seconds:,.0f}"
        print(f"| {name} | {seconds:.3f} | {speed} | {shown} |", flush=True)
    return results


def command_line(job: Job, *more: str) -> list[str]:
    flags = f"""--yes --model-name={job.model} --dataset-path=rows.jsonl --max-steps=6 --save-steps=2
        --validation-fraction=0 --eval-answers=0 --lora-targets={",".join(TARGETS[job.targets])}"""
    return [sys.executable, str(ROOT / "finetune_colab.py"), *flags.split(), *more]


def losses(place: Path) -> list[float]:
    with (place / "model/training_visuals/training_metrics.csv").open(encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def killed_and_resumed(job: Job) -> dict[str, Any]:
    """A run is killed once its second checkpoint is there, and goes on; how far its losses are off."""
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder, name) for name in ("undisturbed", "killed")}
        for place in places.values():
            place.mkdir()
            rows = "".join(json.dumps(row) + "\n" for row in job.rows)
            (place / "rows.jsonl").write_text(rows, encoding="utf-8")
        quiet: dict[str, Any] = {"capture_output": True, "text": True}
        first = subprocess.run(command_line(job), check=False, cwd=places["undisturbed"], **quiet)
        place, silence = places["killed"], subprocess.DEVNULL
        child = subprocess.Popen(command_line(job), cwd=place, stdout=silence, stderr=silence)
        while child.poll() is None and not [*place.glob("checkpoints/*/checkpoint-4/COMMIT.json")]:
            time.sleep(0.05)
        child.kill()
        child.wait()
        again = subprocess.run(command_line(job), check=False, cwd=place, **quiet)
        if first.returncode or again.returncode:
            return {"failed": (first.stderr + first.stdout + again.stderr + again.stdout)[-1500:]}
        both = zip(losses(places["undisturbed"]), losses(place), strict=True)
        resumed = [line for line in again.stdout.splitlines() if line.startswith("Resume")]
        return {"resumed": resumed, "largest_difference": max(abs(a - b) for a, b in both)}


def out_of_memory(job: Job, peak_mb: float) -> dict[str, Any]:
    """The same training with a tenth less memory than it took: it has to end all the same."""
    result = run(replace(job, row="ours", steps=4, memory_gb=0.9 * peak_mb * MEGABYTE / 1e9))
    return result or {"failed": "see above"}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder of the results"
    )
    parser.add_argument("--steps", type=int, default=20, help="of 16 rows, 3 or more")
    parser.add_argument("--memory-gb", type=float, default=15.0)
    parser.add_argument("--small", action="store_true", help="a tiny model on the processor")
    given = parser.parse_args()
    job = Job("", steps=given.steps, targets="all", untimed=2)
    small = replace(job, shape="tiny", steps=6)
    if given.small:
        job = replace(job, shape="tiny")
    elif subprocess.run([sys.executable, "-c", HAS_GPU], check=False).returncode:
        raise SystemExit("There is no NVIDIA GPU here. --small does the same on the processor.")
    else:
        job = replace(job, shape="phi-2", gpu=True, memory_gb=given.memory_gb)
    results: dict[str, Any] = {} if given.small else {"tests": gpu_tests()}
    with workload(job) as ready:
        results["machine"] = run(replace(ready, row="machine", memory_gb=0))
        print(results["machine"].get("name"), "\n")
        results["trainings"] = trainings(ready)
        ours = results["trainings"]["ours"]
        if job.gpu and ours:
            results["nf4"] = run(replace(ready, row="nf4", memory_gb=0))
            results["out of memory"] = out_of_memory(ready, ours["gpu_memory"])
    with workload(replace(small, gpu=job.gpu)) as ready:
        results["killed and resumed"] = killed_and_resumed(ready)
    print("\n| | |\n| --- | --- |")
    for name, found in results.items():
        if name != "trainings":
            print(f"| {name} | {json.dumps(found)} |")
    if ours:
        print(f"| estimated and measured, skipped steps | {json.dumps(ours['run'])} |")
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "gpu-results.json"
    file.write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"\n{file}")
    if not all([*results.values(), *results["trainings"].values()]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
