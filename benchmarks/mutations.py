"""How much do the tests notice? Makes one small fault at a time in a copy of the script and runs them.

    python benchmarks/mutations.py             # all thirty
    python benchmarks/mutations.py 3 17        # only these

Each mutation names the test files to begin with; if they pass, all of `python -m pytest` follows. A
mutation whose line has left the script is reported: replace it by another of its kind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ALL = ["python", "-m", "pytest", "-x", "-p", "no:cacheprovider"]


class Mutation(NamedTuple):
    fault: str
    line: str  # as it stands in the script, once
    becomes: str
    first: str  # the test files to begin with


# fmt: off
MUTATIONS = [Mutation(*one) for one in (
    # settings, files
    ("a number beyond its bounds is taken", "not low <= found <= high", "not low <= found", "settings"),
    ("off means on", '"no": False, "off": False', '"no": False, "off": True', "settings"),
    ("a half-written file is left behind", "        staged.unlink(missing_ok=True)", "        pass", "safety report checkpoints"),
    ("secrets are written to the log", "(token|key|secret)s?", "(token|key)s?", "settings safety"),
    # sources
    ("two tries instead of five", "PAUSES = (1, 2, 4, 8)", "PAUSES = (1,)", "sources"),
    ("a report of check is taken for data", r"(-\d+)?\.(xlsx|png)", r"(-\d+)?\.(png)", "sources check files"),
    # rows to pairs
    ("the worst reply of a tree is taught", 'or "None").rjust(9))', 'or "None").rjust(9), reverse=True)', "pairs"),
    ("a dropped row is not reported", 'for number, reason in found if isinstance(reason, str)]', "for number, reason in []]", "files pairs"),
    ("a small lead is clear enough", "CLEAR_LEAD = 0.25", "CLEAR_LEAD = -1.0", "pairs"),
    ("one of two contradicting rows goes unnoticed", "zip(same, [*same[1:], same[0]], strict=True)", "zip(same[1:], same, strict=False)", "quality"),
    # prompts and tokens
    ("the model never learns to stop", "yield (turn if end else turn + tokenizer.eos_token), True", "yield (turn[: -len(end[0])] if end else turn), True", "prompts"),
    ("one question too many is held out", "count = max(1, round(cfg.VALIDATION", "count = 1 + max(1, round(cfg.VALIDATION", "exam training"),
    # device and plan
    ("bfloat16 on a T4", "native = capability >= (8, 0)", "native = capability >= (7, 5)", "plan"),
    ("the last step of an epoch is lost", "epoch = math.ceil(len(lengths) / pairs)", "epoch = max(1, len(lengths) // pairs)", "plan training"),
    # model
    ("tokens see what follows them", "is_causal=window is None", "is_causal=False", "steps"),
    ("the adapter's gradient is too small", "(dy.T @ inner).mul_(ctx.scale)", "(dy.T @ inner)", "steps"),
    ("a pickle is loaded", "folder.iterdir() if path.suffix.lower() in PICKLES]", "folder.iterdir() if path.suffix.lower() in ()]", "safety"),
    # training
    ("loss per row instead of per token", "return total / num_items_in_batch", "return total / len(targets)", "steps training"),
    ("one checkpoint is kept instead of two", "CHECKPOINTS_KEPT = 2", "CHECKPOINTS_KEPT = 1", "checkpoints"),
    ("a flipped bit is not seen", "(thorough and checksum(path) != digest)", "(thorough and not digest)", "checkpoints"),
    ("the first signal ends at once", "        if not noted:\n", "        if noted:\n", "checkpoints"),
    ("an adapter with NaN is saved", "if not all(torch.isfinite(p).all()", "if not any(torch.isfinite(p).all()", "memory training"),
    ("the last adapter instead of the best", '(BEST_ADAPTER if BEST_ADAPTER in self.files else ADAPTER)', "ADAPTER", "checkpoints training"),
    # answers, report
    ("the overlap is halved", "return 2 * (one & other).total()", "return (one & other).total()", "answers"),
    ("links are followed into the zip", "if path.is_file() and not path.is_symlink()]", "if path.is_file()]", "safety hub"),
    ("formulas reach the workbook", """text = f"'{text}\"""", 'text = f"{text}"', "check answers safety"),
    # asking
    ("a chat forgets what was said", 'messages += [question, {"role": "assistant", "content": answer}] if answer else []', "messages.clear()", "chat"),
    # export
    ("an export may lose what was learnt", "    if not loss <= allowed:", "    if not loss <= 100 * allowed:", "export"),
    ("rows of the data are uploaded", "for one in (ANSWERS, ANSWERS_PICTURE, EXAM, EXAM_PICTURE, SAMPLE)", "for one in (SAMPLE,)", "hub"),
    # commands
    ("a message without its advice", "\\nMount the drive, or create the folder.", "", "commands checkpoints"),
)]
# fmt: on


def caught(place: Path, script: str, mutation: Mutation) -> str:
    """By which run of the tests; nothing if all pass."""
    (place / "finetune_colab.py").write_text(script.replace(mutation.line, mutation.becomes))
    first = [f"tests/test_{name}.py" for name in mutation.first.split()]
    for name, command in (("its own tests", [*ALL, "-n", "2", *first]), ("the others", ALL)):
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if failed := [
            line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
        ]:
            return f"{name}: {failed[0][:100]}"
        if done.returncode:
            raise SystemExit(f"{command} ended with {done.returncode}\n{done.stdout[-3000:]}")
    return ""


def main() -> int:
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    script, found = (ROOT / "finetune_colab.py").read_text(encoding="utf-8"), 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name, "copy")
        kept_out = shutil.ignore_patterns(
            ".git", "__pycache__", ".*_cache", "model", "checkpoints", "logs"
        )
        shutil.copytree(ROOT, place, ignore=kept_out)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for number in chosen:
            mutation, start = MUTATIONS[number - 1], time.monotonic()
            if script.count(mutation.line) != 1:
                print(
                    f"{number:2} GONE     {mutation.fault}: its line is there {script.count(mutation.line)} times"
                )
                continue
            by = caught(place, script, mutation)
            found += bool(by)
            seconds = time.monotonic() - start
            print(
                f"{number:2} {'caught' if by else 'MISSED':8} {mutation.fault} ({seconds:.0f} s) {by}",
                flush=True,
            )
    print(f"{found} of {len(chosen)} caught")
    return 0


if __name__ == "__main__":
    sys.exit(main())
