"""What check tells of the data, on the screen and as JSON, and what it writes into the folder."""

import json
import random
import re
import resource
import unicodedata
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from conftest import PAIRS, Run, in_words, sweep, write_workbook
from matplotlib.figure import Figure
from seams import setting_defaults
from tables import HEADER, cases, jsonl, records, replaced, xlsx

pytestmark = pytest.mark.usefixtures("folder")
REPORT = ["dataset_report.png", "dataset_report.xlsx"]
# fmt: off
FLAWED = [*((f"What is {i}?", f"It is<br>{i}.") for i in range(6)), ("Which option is it?", "B"), ("How?", ""),
          ("Who is it?", "Me."), ("Who is it?", "me.")]
HTML_ROWS, HTML = "left-over HTML: 6 rows (26, 27, 28, 29, 30, 31)", [["Sheet", row] for row in range(26, 32)]
KEYS = set("ready file shape sheet question_column answer_column rows_read pairs_kept pairs_unique pairs_held_out "
           "dropped quality quality_parts problems tokens report other_tables".split())
TOLD: dict[str, Any] = {key: json.loads(case.split(": ", 1)[1]) for key, case in cases("told").items()}  # of FLAWED
ADA = ("</dc:creator>", "</dc:creator><cp:lastModifiedBy>Ada</cp:lastModifiedBy>")
THEIRS: list[Any] = [  # what is there, what somebody did to it, and flags
    *((name, lambda path: path.write_bytes(b"mine"), "") for name in REPORT),
    (REPORT[1], lambda path: write_workbook(path, [("mine",)]), ""),
    (REPORT[1], lambda path: path.write_bytes(replaced(path.read_bytes(), ADA)), ""),
    (REPORT[1], lambda _: None, "--dataset-path ./dataset_report.xlsx --question-column question"),
    *(sweep((name, lambda path: path.write_bytes(b""), "")) for name in REPORT),
    *(sweep((name, lambda path: path.unlink() or path.mkdir(), "")) for name in REPORT),
]
FORMULAS = "=1+1 ＝1+1 +1 -1 @SUM(A1) \t=1 \r=1 '=1 =cmd|'/C'!A0 #N/A".split(" ")
# fmt: on


def check(run: Run, *flags: object, model: object = "nobody/nothing") -> tuple[int, dict[str, Any], str]:
    """The exit code, the one object for a program, and all that is said to a person."""
    code, text = run("check", "--json", "--model-name", model, *flags)  # without a tokenizer, which is quick
    line = next(line for line in text.splitlines() if line.startswith("{"))
    told = json.loads(line)
    assert (set(told), told["ready"]) == (KEYS, code == 0)
    return code, told, text.replace(line, "")


def check_rows(run: Run, *rows: Any, flags: Any = (), **model: object) -> Any:
    Path("data.jsonl").write_bytes(jsonl(*records(rows)))
    return check(run, "--dataset-path", "data.jsonl", *flags, **model)


def sheet(name: str) -> list[tuple[Any, ...]]:
    return list(openpyxl.load_workbook("dataset_report.xlsx")[name].values)


def written() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if path.name != "dataset.xlsx")


@pytest.fixture
def flawed(folder: Path) -> None:
    write_workbook(folder / "dataset.xlsx", [HEADER, *PAIRS, *FLAWED])


@pytest.mark.pictures
def test_all_there_is_to_know_is_told_and_in_the_report(flawed: None, run: Run, small_phi: Path) -> None:
    for seed in (7, 0):  # an earlier report is replaced
        code, told, text = check(run, "--seed", seed, model=small_phi)
        assert ("SEED", str(seed)) in sheet("Settings")
    assert re.search(rf"0\.73\b.*\b25 of 34\b.*{re.escape(HTML_ROWS)}.*dataset_report\.xlsx", in_words(text))
    assert code == 0 and re.search(r"0\.85 \(MIN_QUALITY\).*left-over HTML.*Ready", in_words(text))
    assert {key: told[key] for key in TOLD} == TOLD
    assert (told["problems"][0], Path(told["report"])) == (HTML_ROWS, Path("dataset_report.xlsx").resolve())
    parts, tokens = told["quality_parts"], told["tokens"]
    assert parts["an answer of one letter"]["places"] == [["Sheet", 32]]
    assert parts.pop("left-over HTML") == {"rows": 6, "share": 0.1765, "places": HTML}
    assert set(parts) == {"an answer of one letter", "no answer", "a copy of an earlier row"}
    assert list(tokens) == ["min", "median", "p95", "max", "sum"]
    assert list(tokens.values()) == sorted(tokens.values())
    assert written() == REPORT and Path(REPORT[0]).stat().st_size > 5000
    book = openpyxl.load_workbook("dataset_report.xlsx")
    assert book.sheetnames == ["Summary", "Kept", "Dropped", "Settings"]
    assert all(one.freeze_panes == "A2" and one["A1"].font.bold and one.auto_filter.ref for one in book)
    header, *kept = sheet("Kept")
    assert header == ("sheet", "row", "question", "answer", "tokens", "held out", "findings")
    assert (len(kept), [row[5] for row in kept].count("yes")) == (32, 3)
    assert kept[24][:4] + kept[24][6:] == ("Sheet", 26, *FLAWED[0], "left-over HTML")
    assert sum(row[4] for row in kept) == tokens["sum"] in [row[1] for row in sheet("Summary") if "sum" in row[0]]
    assert [row[:3] for row in sheet("Dropped")[1:]] == [tuple(row.values()) for row in TOLD["dropped"]]
    assert [row[3] for row in sheet("Dropped")[1:]] == ["How?", "Who is it? | me."]
    assert [row[0] for row in sheet("Settings")][1:] == list(setting_defaults())


@pytest.mark.parametrize("case", cases("refused_by_check").values())
def test_json_of_a_refused_file_has_the_same_keys(case: str, run: Run, small_phi: Path) -> None:
    name, content, flags, reasons = case.split(" | ")
    if content != "-":
        Path("data.csv").write_text(content.replace(r"\n", "\n"))
    code, told, text = check(
        run, "--dataset-path", "data.csv", *(flags.split() if flags != "-" else []), model=small_phi
    )
    for reason, problem in zip(reasons.split(" ; "), told["problems"], strict=True):
        assert re.search(reason, in_words(problem))
    assert "secret" not in text + json.dumps(told)
    assert told["file"] == "data.csv" or name == "a link"
    figures = [code, *map(told.get, ("rows_read", "pairs_kept", "quality", "question_column", "dropped", "sheet"))]
    dropped = [{"sheet": "", "row": 3, "reason": "no answer"}]
    assert figures == [1, *([2, 1, 0.5, "question", dropped] if name == "few" else [0, 0, None, None, []]), None]
    assert (told["report"] is None) == (name != "few")


def test_a_conversation_has_no_columns_and_is_shown_with_its_roles(run: Run) -> None:
    roles = ["user", "assistant", "user", "assistant"]
    turns = [[{"role": r, "content": f"{r[0]}{i}{j}"} for j, r in enumerate(roles)] for i in "123"]
    Path("talks.jsonl").write_bytes(jsonl(*({"messages": one} for one in turns)))
    code, told, _ = check(run, "--dataset-path", "talks.jsonl")
    assert (code, told["shape"], told["pairs_kept"]) == (0, "conversations", 3)
    assert told["question_column"] is told["answer_column"] is told["sheet"] is None
    assert sheet("Kept")[1][2:4] == ("user: u10\n\nassistant: a11\n\nuser: u12", "a13")


def test_when_all_rows_are_too_long_a_length_is_named(run: Run, small_phi: Path) -> None:
    code, _, text = check_rows(run, *PAIRS, flags=("--max-length", 16), model=small_phi)
    flags = re.findall(r"--max-length \d+", text)
    assert code == 1 and flags
    assert check_rows(run, *PAIRS, flags=flags[0].split(), model=small_phi)[1]["pairs_kept"] >= 0.95 * len(PAIRS)


def test_no_line_is_wider_than_the_terminal(run: Run) -> None:
    text = "学习率{}决定了每一步权重移动的距离，太大损失会跳动，太小训练会很慢。"
    _, _, said = check_rows(run, *((text.format(i) + "？", text.format(i)) for i in range(9)))
    for line in said.splitlines():
        assert sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in line) <= 80


def test_the_example_is_a_pair_of_usual_length(run: Run, small_phi: Path) -> None:
    rows = [("Why?", "So."), *((f"What is {i}, and how long does it take?", "It is a number. " * 3) for i in range(9))]
    _, _, text = check_rows(run, *rows, flags=("--validation-fraction", 0), model=small_phi)
    assert re.search(r"\[\[.*It is a number", in_words(text))


def test_without_a_tokenizer_the_rows_are_checked_and_nothing_is_counted(run: Run) -> None:
    code, told, text = check_rows(run, *PAIRS)
    assert (code, told["pairs_kept"], told["tokens"], written()) == (0, len(PAIRS), None, ["data.jsonl", *REPORT])
    assert re.search("tokenizer of nobody/nothing .*online", in_words(text))
    assert not re.search("Plan|Estimate|Tokens|\\[\\[", text)
    assert {row[4] for row in sheet("Kept")[1:]} == {None}


# -- The report


@pytest.mark.xfail(strict=True, reason="Output")
def test_rows_under_a_merged_answer_are_called_so(run: Run) -> None:
    rows = [HEADER, ("Why?", "So."), ("And why else?", None), *PAIRS[:5]]
    Path("dataset.xlsx").write_bytes(xlsx(rows, lambda book: book.active.merge_cells("B2:B3")))
    assert ["merged" in note["reason"] for note in check(run)[1]["dropped"]] == [True]


def test_nothing_in_the_report_is_a_formula_and_no_text_too_long(run: Run) -> None:  # V5
    chance, lengths = random.Random(0), (15_998, 16_000, 16_001, 60_000)
    odd = ["".join(chance.choices("=+-@＝\t\r\n\x00\x1b_x000D_\ufffe'\"a", k=9)) for _ in range(60)]
    answers = [*FORMULAS, *odd, *(letter * length for letter in "xé😀" for length in lengths)]
    rows = [(f"{FORMULAS[i % 10]} is what, {i}?", text) for i, text in enumerate(answers)]
    check_rows(run, *rows, flags=("--max-length", 131_072))
    cells = [cell for one in openpyxl.load_workbook("dataset_report.xlsx") for row in one.iter_rows() for cell in row]
    assert not {cell.data_type for cell in cells} & {"f", "e"}
    assert not any(str(cell.value or "").startswith(tuple("=＝+＋-－@＠\t\r\n")) for cell in cells)
    kept = {row[1]: row[3] for row in sheet("Kept")[1:]}
    assert len(kept) > len(answers) - 20
    for row, shown in kept.items():
        text = re.sub("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe]", "", answers[row - 1].strip()).strip()
        if len(text) <= 16_000:
            assert "".join(str(shown).split()).lstrip("'") == "".join(text.split()).lstrip("'")
        else:
            assert shown.endswith("…") and len(shown.encode("utf-16-le")) <= 2 * 32_767


@pytest.mark.sweep
def test_a_sheet_ends_where_it_would_be_too_long(run: Run) -> None:
    check_rows(run, *((f"What is {i}?", f"It is {i}.") for i in range(20_014)))
    *kept, (last, *_) = sheet("Kept")
    assert len(kept) - 1 + int(re.findall("([0-9,]+) more", last)[0].replace(",", "")) == 20_014


@pytest.mark.pictures
@pytest.mark.parametrize("case", THEIRS)
def test_what_is_somebody_elses_is_left_alone(case: Any, workbook: Path, run: Run) -> None:
    (name, change, flags), theirs = case, Path(case[0])
    check(run)
    change(theirs)
    before = theirs.is_file() and theirs.read_bytes()
    for _ in range(2):
        assert Path(check(run, *flags.split())[1]["report"]).name == "dataset_report-2.xlsx"
    assert before == (theirs.is_file() and theirs.read_bytes())
    assert (len(written()), name in written()) == (4, True)


def test_a_report_that_cannot_be_written_only_warns(workbook: Path, run: Run, patched: Any) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # as on a full disk
    try:
        code, told, text = check(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, told["report"], written()) == (0, None, [])
    assert re.search("Warning.*report", in_words(text))
    patched.chdir("/proc")  # not even root may write here
    there = f"--output-dir {workbook.parent}/model --checkpoint-dir {workbook.parent}/checkpoints"
    code, told, _ = check(run, "--dataset-path", workbook, *there.split())
    assert (code, told["report"]) == (0, None)


@pytest.mark.parametrize("longer", [[], [300, 310, 9000]])
def test_the_picture_shows_what_is_too_long(longer: list[int], small_phi: Path, run: Run, patched: Any) -> None:
    figures: list[Figure] = []
    patched.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = [*PAIRS, *((f"What is {i}?", "word, " * i) for i in longer)]
    check_rows(run, *rows, flags=("--max-length", 400), model=small_phi)
    bars = [bar for bar in figures[0].axes[0].patches if bar.get_height()]
    assert sum(bar.get_height() for bar in bars) == len(rows)
    assert sum(bar.get_height() for bar in bars if bar.get_x() > 400) == len(longer)
    assert not any(bar.get_x() <= 400 < bar.get_x() + bar.get_width() - 1 for bar in bars)
