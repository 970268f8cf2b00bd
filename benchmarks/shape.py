"""How long the sections of finetune_colab.py are, and how long their functions.

    python benchmarks/shape.py

A section goes from its banner to the next one. A nested function counts as part of the one around it, and the
lines of a function include its decorators and docstring.
"""

from __future__ import annotations

import ast
import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).parent.parent / "finetune_colab.py"
BANNER = re.compile(r"^# =+\n# (\d+)  (.+)\n# =+$", re.MULTILINE)


class Section(NamedTuple):
    number: int
    title: str
    lines: int
    functions: dict[str, int]  # name -> lines


def sections(source: str) -> list[Section]:
    """The numbered sections, and what stands before the first as number 0."""
    banners = [(0, "Header", 1)]
    for banner in BANNER.finditer(source):
        start = source.count("\n", 0, banner.start()) + 1
        banners.append((int(banner[1]), banner[2], start))
    ends = [start for _, _, start in banners[1:]] + [source.count("\n") + 1]
    found = [
        Section(number, title, end - start, {})
        for (number, title, start), end in zip(banners, ends, strict=True)
    ]
    for name, first, last in functions_in(ast.parse(source).body):
        place = max(i for i, (_, _, start) in enumerate(banners) if start <= first)
        found[place].functions[name] = last - first + 1
    return found


def functions_in(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, int, int]]:
    """Name, first and last line of each function and method, without those inside others."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef):
            found += functions_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            found.append((f"{prefix}{node.name}", first, node.end_lineno or first))
    return found


def percentile(lengths: list[int], share: float) -> int:
    """The length that so large a share of the functions does not exceed."""
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def main() -> None:
    found = sections(SCRIPT.read_text(encoding="utf-8"))
    every = {name: lines for one in found for name, lines in one.functions.items()}
    total = Section(-1, "all", sum(one.lines for one in found), every)
    print(f"{'section':<30}{'lines':>6}{'functions':>11}{'median':>8}{'90 %':>6}  longest")
    for one in [*found, total]:
        title = one.title if one is total else f"{one.number:>2}  {one.title}"
        row = f"{title[:29]:<30}{one.lines:>6}{len(one.functions):>11}"
        if one.functions:
            lengths = list(one.functions.values())
            longest = max(one.functions, key=lambda name: one.functions[name])
            row += f"{statistics.median(lengths):>8g}{percentile(lengths, 0.9):>6}"
            row += f"  {one.functions[longest]} {longest}"
        print(row)


if __name__ == "__main__":
    main()
