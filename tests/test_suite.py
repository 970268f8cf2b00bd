"""What holds of the tests themselves: they know little of the script, and miss no fault."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from seams import ROOT

from benchmarks.shape import sections

TESTS = Path(__file__).parent
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in TESTS.glob("*.py")}
MOST_NAMES = 40
NUMBERED = {"C": 23, "S": 9, "D": 11, "M": 10, "X": 16, "V": 10, "O": 4}  # faults of each kind
MOST_LINES = {0: 80, 1: 350, 2: 200, 3: 850}  # of the sections of the script, by number
FAULTS = {f"{kind}{n}" for kind, count in NUMBERED.items() for n in range(1, count + 1)}


def test_the_tests_know_few_names_of_the_script_and_list_them() -> None:
    """All of them in seams.py; elsewhere only what the programs of a person would say."""
    used = {name: set(re.findall(r"\bft\.([A-Za-z]\w*)", source)) for name, source in SOURCES.items()}
    assert [name for name, names in used.items() if names - {"main", "Config"}] == ["seams.py"]
    assert len(used["seams.py"]) <= MOST_NAMES
    listed = re.findall(r"^\| `(\w+)` \|", (TESTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(used["seams.py"])


def test_every_fault_is_shown_by_a_test() -> None:
    """A number such as C6 stands in a comment beside the case; the guide's table holds some of them."""
    texts = (source for name, source in SOURCES.items() if name != "test_suite.py")
    comments = "\n".join(comment for source in texts for comment in re.findall(r'#.*|""".*', source))
    assert FAULTS - {*re.findall(r"\b[CSDMXVO]\d{1,2}\b", comments)} == set()
    guide = (ROOT / "finetune.md").read_text(encoding="utf-8")
    table = guide.partition("## What happens when")[2].partition("\n## ")[0]
    promised = set(re.findall(r"\b[CSDMXVO]\d{1,2}\b", table))
    assert len(promised) > 30 and promised <= FAULTS


SECTIONS = sections((ROOT / "finetune_colab.py").read_text(encoding="utf-8"))[: len(MOST_LINES)]


def test_the_sections_of_the_script_are_short() -> None:
    assert {one.title: one.lines for one in SECTIONS if one.lines > MOST_LINES[one.number]} == {}


def test_the_functions_of_the_script_are_short() -> None:
    lengths = [lines for one in SECTIONS for lines in one.functions.values()]
    assert (statistics.median(lengths) <= 10, max(lengths) <= 60) == (True, True)
    assert sum(lines < 30 for lines in lengths) >= 0.9 * len(lengths)


@pytest.mark.sweep
def test_the_benchmark_for_a_gpu_goes_its_whole_way_on_a_processor(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--small", "--steps", "4", "--out", tmp_path]
    subprocess.run(list(map(str, command)), check=True, timeout=600)
    found = json.loads((tmp_path / "gpu-results.json").read_text())
    assert [one["steps"] for one in found["trainings"].values()] == [2, 2, 2]
    assert found["killed and resumed"]["largest_difference"] == 0
