"""Which rows look wrong, which only seem to, what share is fit to learn from, and who is asked."""

import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from conftest import END, PAIRS, Run, sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from seams import IGNORE, Config, encode, find_pairs
from tables import HEADER, cases, csv_file, jsonl, records, xlsx
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("folder")
LETTERS = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), min_size=1)
ROLES, WORDS = ("user", "assistant"), "what is the red blue rate TODO <br> B ? 2 cafÃ© Hi 人".split()

# fmt: off
LONG = "The learning rate decides how far the weights move in one step; too large a rate makes the loss jump about, too small a rate makes the training slow, and a schedule lowers it towards the end."
SIGNS = "学习率决定了每一步权重移动的距离太大损失会跳动太小训练会很慢所以我们在训练快结束时把它降低一些"
EQUAL = [("word " * 199,), ("word " * 300, "word " * 7), ("Who is it?", LONG + " 2023"), ("How is it?", LONG + " 2024"),
         ("What is it then?", LONG), ("What was it then?", LONG[:100])]
CLEAN = csv_file([HEADER, *((f"What is {i} plus one?", f"It is {i + 1}.") for i in range(999)), ("Hi", "So")])
DATA = {
    "good": [HEADER, *PAIRS], "doubtful": [HEADER, *PAIRS, *((f"What is {i}?", f"It is<br>{i}.") for i in range(6))],
    "options": [HEADER, *((f"Which of them is right in case {i}?", "ABCD"[i % 4]) for i in range(40))],
    "posts": [("AcceptedAnswerId", "Title", "Body"),
              *((i, f"How to fix {i}?", f"<p>I see error {i}.</p>") for i in range(40))],
    "unclear": [("one", "two"), *((f"Shop {i} opens at nine.", f"Ring at door {i} of the shop.") for i in range(50))],
}
# fmt: on
FILES: dict[str, tuple[bytes, Any, Any, Any]] = {"clean.csv": (CLEAN, 0.999, 1000, {"a very short question": [1001]})}
for name, case in cases("scores").items():  # X12
    head, written = case.split("\n    ")
    plain = written.encode().decode("unicode_escape").encode("latin-1")
    content = xlsx(json.loads(written)) if written[0] == "[" else plain
    FILES[name] = content, *map(json.loads, head.split(" | ")[1:])
LISTED: dict[str, list[Any]] = {}  # kind -> answers, and conversations
for kind, *rows in map(str.splitlines, cases("quality").values()):
    LISTED[kind] = [tuple(json.loads(f'"{text}"') for text in row.strip().split(" | ")) for row in rows]
COPIES = LISTED.pop("nearly the same, all but one of them")
WORDY = ("jump", "leap"), ("towards", "near"), ("The", "This")
LISTED["another answer to the same question"] = [
    *(("什么是学习率？", SIGNS.replace("些", sign)) for sign in "些点"),
    *(("What is it?", LONG.replace(*words)) for words in (("", ""), *WORDY)),
]
LISTED["very unequal lengths"] = [("word " * 401,), ("word " * 500, "Yes, it is.")]
FINE = LISTED.pop("nothing") + EQUAL


def told(run: Run, content: bytes, name: str, *flags: object) -> tuple[dict[str, Any], str]:
    """What check tells of a file of these contents: as an object, and on the screen."""
    Path(name).write_bytes(content)
    model = ("--model-name", "nobody/nothing", "--max-length", 9000)
    _, text = run("check", "--json", *model, "--dataset-path", name, *flags)
    return json.loads(next(line for line in text.splitlines() if line.startswith("{"))), text


def found(run: Run, rows: Any) -> list[tuple[Any, set[str]]]:
    """What check finds in each of these rows, told as conversations."""
    talks, kinds = [], [set[str]() for _ in rows]
    for i, row in enumerate(rows):
        texts = enumerate(("What is it, #?", *row) if len(row) == 1 else row)
        numbered = [(ROLES[j % 2], text.replace(", #", f", {i}")) for j, text in texts]
        talks.append({"messages": [{"role": role, "content": text} for role, text in numbered]})
    for kind, part in told(run, jsonl(*talks), "data.jsonl")[0]["quality_parts"].items():
        for _, row in part["places"]:
            kinds[row - 1].add(kind)
    return list(zip(rows, kinds, strict=True))


def test_a_flaw_is_found_and_no_other(run: Run) -> None:
    flawed = [(row, {kind}) for kind, rows in LISTED.items() for row in rows]
    assert found(run, [row for row, _ in flawed]) == flawed
    assert sorted(len(kinds) for _, kinds in found(run, COPIES)) == [0, *[1] * (len(COPIES) - 1)]


@pytest.mark.parametrize("rows", [FINE, [("¿Qué incluye?", "Todo"), *PAIRS]])
def test_what_only_seems_wrong_is_left_in_peace(rows: Any, run: Run) -> None:
    assert [one for one in found(run, rows) if one[1]] == []


@pytest.mark.parametrize("name", FILES)
def test_the_score_is_the_share_of_filled_rows_without_a_finding(name: str, run: Run) -> None:
    content, score, kept, places = FILES[name]
    said, text = told(run, content, name)
    rows = {kind: [row for _, row in part["places"]] for kind, part in said["quality_parts"].items()}
    for note in said["dropped"]:
        rows.setdefault(note["reason"].replace(" (row 2)", ""), [note["row"]])
    assert (said["quality"], said["pairs_kept"], rows) == (score, kept, places)
    assert f" {str(score)[:4]}" in text  # 0.999 is not yet 1.00


def test_the_other_row_is_named_with_its_file(run: Run) -> None:
    Path("a.csv").write_bytes(csv_file([HEADER, ("Why is that?", "So."), *PAIRS[:9]]))
    told(run, csv_file([HEADER, ("How?", "Thus."), ("why  is THAT?", "No.")]), "b.csv", "--dataset-path", "*.csv")
    findings = [row[6] for row in openpyxl.load_workbook("dataset_report.xlsx")["Kept"].values if row[6]]
    assert re.search(r"row 3 of b\.csv\)\n.*row 2 of a\.csv", "\n".join(findings))


@pytest.mark.parametrize("seed", [0, *(sweep(i) for i in range(1, 10))])
def test_the_order_of_the_rows_decides_nothing(seed: int, run: Run) -> None:
    chance, seen = random.Random(seed), []
    cells = (" ".join(chance.choices(WORDS, k=chance.randint(1, 4))) for _ in range(160))
    rows = list({str(row).casefold(): row for row in zip(cells, cells, strict=False)}.values())
    for _ in range(2):
        said, _ = told(run, csv_file([HEADER, *rows]), "data.csv")
        seen.append((said["quality"], {kind: part["rows"] for kind, part in said["quality_parts"].items()}))
        chance.shuffle(rows)
    assert seen[0] == seen[1]


@settings(max_examples=30, deadline=None)
@given(letters=LETTERS, kind=st.sampled_from(["xlsx", "jsonl"]))
def test_an_answer_is_taught_as_it_is_written(letters: str, kind: str, tokenizer: Any) -> None:
    letters = re.sub("_x[0-9A-Fa-f]{4}_|[\ufffe\uffff]", "", letters)  # XML has none of these
    answer = f"def f():\n    if x:\n\treturn {letters}\n\n  end"
    rows, name = [("What is it?", f" {answer}\n")], f"exact.{kind}"
    Path(name).write_bytes(xlsx([HEADER, *rows]) if kind == "xlsx" else jsonl(*records(rows)))
    example = encode(tokenizer, find_pairs(Config(DATASET_PATH=name)).kept[0].messages)
    assert tokenizer.decode([one for one in example["labels"] if one != IGNORE]) == f" {answer}{END}"


@pytest.mark.parametrize("case", cases("asking").values())
def test_bad_data_is_trained_on_only_by_who_wants_it(case: str, small_phi: Path, run: Run, patched: Any) -> None:
    _, data, typed, argv, outcome = case.split(" | ")
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda _: True})
    stdin = {"pipe": io.StringIO("n\n"), "nobody": None}[typed] if typed.isalpha() else terminal(json.loads(typed))
    loading = AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(MemoryError("far enough"))
    patched.setattr(*loading)
    patched.setattr(sys, "stdin", stdin)
    Path("data.csv").write_bytes(csv_file(DATA[data]))
    code, text = run(*argv.split(), "--model-name", small_phi, "--dataset-path", "data.csv")
    ready, poor = argv.startswith("check") and "Ready" in text, data in ("options", "posts")
    begun = "begun" if "far enough" in text else "never"
    assert (code, begun) == (1 - ready if "check" in argv else 2, outcome)
    assert ready == ("check" in argv and (not poor or "--yes" in argv))
    assert ("MIN_QUALITY" in text) == (data not in ("good", "unclear") and "--min-quality" not in argv)
    if "check" not in argv and "begun" not in outcome:
        assert ("--yes" in text or data == "unclear") and [path.name for path in Path().iterdir()] == ["data.csv"]
