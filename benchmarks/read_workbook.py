"""How long a workbook takes from file to pairs, beside openpyxl and pandas reading its cells.

    python benchmarks/read_workbook.py [ROWS] [ROUNDS]

Each run is a process of its own, the three take turns, and medians are printed: seconds of processor
time and of the clock, and the most memory, from the process itself and without the import of the libraries.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import openpyxl

ROOT = Path(__file__).resolve().parent.parent
WORDS = "a model learns the answer to each question from rows which people wrote in their own words".split()
ROWS = ("bare", "pandas", "script")

MEASURE = """
import json, resource, sys
from time import perf_counter, process_time
sys.path.insert(0, sys.argv[1])
import openpyxl, pandas
import finetune_colab as ft
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before, start, began = peak(), process_time(), perf_counter()
if sys.argv[2] == "bare":
    book = openpyxl.load_workbook(sys.argv[3], read_only=True, data_only=True)
    rows = [row for sheet in book.worksheets for row in sheet.values]
elif sys.argv[2] == "pandas":
    options = {"sheet_name": None, "header": None, "dtype": object, "na_filter": False}
    frames = pandas.read_excel(sys.argv[3], engine="openpyxl", **options)
    rows = [row for frame in frames.values() for row in frame.to_numpy().tolist()]
else:
    rows = ft.find_pairs(ft.Config(DATASET_PATH=sys.argv[3])).kept
found = {"rows": len(rows), "cpu": process_time() - start, "wall": perf_counter() - began}
print(json.dumps(found | {"memory_gb": (peak() - before) / 1e9}))
"""


def write_workbook(path: Path, rows: int) -> None:
    """As people's workbooks are: the texts stand in a list of their own, shared by all cells."""
    dice = random.Random(0)
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["id", "question", "answer", "topic"])
    for number in range(rows):
        question = " ".join(dice.choices(WORDS, k=10)).capitalize()
        answer = " ".join(dice.choices(WORDS, k=40)).capitalize()
        sheet.append([number, f"{question} {number}?", f"{answer}.", dice.choice(WORDS)])
    book.save(path)


def run(how: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, str(ROOT), how, str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    rows, rounds = (
        int(sys.argv[i]) if len(sys.argv) > i else usual for i, usual in ((1, 100_000), (2, 5))
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.xlsx"
        writer = multiprocessing.get_context("spawn").Process(
            target=write_workbook, args=(path, rows)
        )
        writer.start()  # in a process of its own, whose memory the measured ones do not inherit
        writer.join()
        size = path.stat().st_size / 1e6
        results = [{how: run(how, path) for how in ROWS} for _ in range(rounds)]
    assert all(result["script"]["rows"] == rows for result in results)
    print(f"{rows:,} rows, {size:.1f} MB, medians of {rounds} interleaved rounds")
    for how in ROWS:
        cpu, wall, memory = (
            statistics.median(result[how][figure] for result in results)
            for figure in ("cpu", "wall", "memory_gb")
        )
        of_cpu, of_wall = (
            statistics.median(r[how][figure] / r["bare"][figure] for r in results)
            for figure in ("cpu", "wall")
        )
        times = f"{cpu:6.2f} s CPU {of_cpu:5.2f} {wall:6.2f} s wall {of_wall:5.2f}"
        print(f"{how:<7} {times} {memory:5.2f} GB")


if __name__ == "__main__":
    main()
