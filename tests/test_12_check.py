"""Section 11: what `check` says, what it writes into the folder, and when training asks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from conftest import PAIRS, ROOT, in_words, write_workbook
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
Json = Callable[..., tuple[int, dict[str, Any]]]
HEADER = ("question", "answer")
FLAWED = [
    *((f"What is {i}?", f"It is<br>{i}.") for i in range(6)),
    ("Which option is it?", "B"),
    ("How?", ""),
    ("Who is it?", "Me."),
    ("Who is it?", "me."),
]
REPORT = ["dataset_report.png", "dataset_report.xlsx"]
DEMO = ("--model-name", "demo")


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "dataset.xlsx")


def sheet(path: Path, name: str) -> list[tuple[Any, ...]]:
    return list(openpyxl.load_workbook(path)[name].values)


@pytest.fixture
def flawed(folder: Path) -> Path:
    return write_workbook(folder / "dataset.xlsx", [HEADER, *PAIRS, *FLAWED])


@pytest.fixture
def as_json(capsys: pytest.CaptureFixture[str]) -> Json:
    """Run `check --json`: its exit code and the one object on standard output."""

    def as_json(*argv: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = ft.main(["check", "--json", *DEMO, *map(str, argv)])
        return code, json.loads(capsys.readouterr().out)

    return as_json


# -- On the screen


def test_an_ordinary_file_fits_one_screen(workbook: Path, run: Run) -> None:
    code, text = run("check", *DEMO)
    assert code == 0
    assert len(text.splitlines()) <= 24
    assert "Quality    1.00: 24 of 24 filled rows are taught and look right" in text
    assert "Report     every row in dataset_report.xlsx" in text
    assert written(workbook.parent) == REPORT


def test_findings_are_told_in_plain_words(flawed: Path, run: Run) -> None:
    code, text = run("check", *DEMO)
    assert code == 0
    told = in_words(text)
    assert "Quality 0.73: 25 of 34 filled rows are taught and look right" in told
    assert "6 × left-over HTML: rows 26, 27, 28, 29, 30, 31" in told
    assert "Warning the quality is below 0.85 (MIN_QUALITY)" in told
    assert "left-over HTML: take out tags and signs such as <br> and &nbsp;" in told
    assert "Ready" in text


def test_many_reasons_are_cut_short(folder: Path, run: Run) -> None:
    texts = [*("cafÃ©", "TODO", "<br> and", "</s> and"), *("B", "word " * 500)]
    rows = [(f"What is number {i}?", text) for i, text in enumerate(texts)]
    write_workbook(folder / "dataset.xlsx", [HEADER, *PAIRS, *rows])
    _, text = run("check", *DEMO, "--max-length", 4000)
    assert "and 2 more kinds of flaws" in text
    assert ft.shortened(list("abc"), 2, "reasons") == list("abc")
    assert ft.shortened(list("abcd"), 2, "reasons") == ["a", "b", "and 2 more reasons"]


# -- As JSON

KEYS = {
    *("ready", "file", "shape", "sheet", "question_column", "answer_column", "rows_read"),
    *("pairs_kept", "pairs_unique", "pairs_held_out", "dropped", "quality", "quality_parts"),
    *("problems", "tokens", "report"),
}


def test_json_says_all_there_is_to_know(flawed: Path, as_json: Json) -> None:
    code, told = as_json()
    assert code == 0
    assert set(told) == KEYS
    assert told["ready"] is True
    assert (told["file"], told["sheet"]) == ("dataset.xlsx", "Sheet")
    assert (told["shape"], told["rows_read"]) == ("question and answer", 34)
    assert (told["question_column"], told["answer_column"]) == HEADER
    assert (told["pairs_kept"], told["pairs_unique"]) == (32, 32)
    assert told["dropped"] == [
        {"sheet": "Sheet", "row": 33, "reason": "no answer"},
        {"sheet": "Sheet", "row": 35, "reason": "a copy of row 34"},
    ]
    assert told["quality"] == round(25 / 34, 4)
    assert told["quality_parts"]["left-over HTML"] == {
        "rows": 6,
        "share": round(6 / 34, 4),
        "places": [["Sheet", row] for row in range(26, 32)],
    }
    assert set(told["quality_parts"]) == {
        *("left-over HTML", "an answer of one letter", "no answer", "a copy of an earlier row"),
    }
    assert told["problems"][0] == "6 × left-over HTML: rows 26, 27, 28, 29, 30, 31"
    assert set(told["tokens"]) == {"min", "median", "p95", "max", "sum", "estimated"}
    assert told["tokens"]["estimated"] is False
    assert told["report"] == str(flawed.parent / "dataset_report.xlsx")


def test_copies_are_left_out_and_near_copies_kept(folder: Path, as_json: Json) -> None:
    more = [("What is, 2 plus 3", PAIRS[0][1]), (f" {PAIRS[0][0].upper()}", PAIRS[0][1])]
    write_workbook(folder / "dataset.xlsx", [HEADER, *PAIRS, *more])
    _, told = as_json()
    assert (told["rows_read"], told["pairs_kept"], told["pairs_unique"]) == (26, 25, 25)


REFUSED: dict[str, tuple[bytes | None, list[str], str]] = {
    "no file": (None, [], "There is no file data.csv"),
    "no rows": (b"question,answer\n", [], "holds no rows"),
    "no columns": (b"one,two,three\n1,2,3\n4,5,6\n", [], "was found"),
    "a wrong column": (b"question,answer\na,b\n", ["--answer-column", "x"], "no column 'x'"),
    "a picture": (b"GIF89a", [], "is a picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_json_of_a_refused_file_has_the_same_keys(name: str, folder: Path, as_json: Json) -> None:
    content, flags, reason = REFUSED[name]
    if content is not None:
        (folder / "data.csv").write_bytes(content)
    code, told = as_json("--dataset-path", "data.csv", *flags)
    assert code == 1
    assert set(told) == KEYS
    assert told["ready"] is False
    assert reason in in_words(told["problems"][0])
    assert (told["file"], told["rows_read"], told["pairs_kept"]) == ("data.csv", 0, 0)
    assert (told["dropped"], told["quality"], told["quality_parts"]) == ([], None, {})
    assert told["shape"] is told["sheet"] is told["question_column"] is told["report"] is None


def test_json_lists_what_is_wrong_beside_the_data_and_in_it(folder: Path, as_json: Json) -> None:
    (folder / "data.csv").write_text("question,answer\nWhy is it?,So.\n")
    code, told = as_json("--dataset-path", "data.csv", "--output-dir", ".", "--lora-targets", "x")
    assert (code, told["ready"], told["pairs_kept"]) == (1, False, 1)
    output, layers, data = told["problems"]
    assert "OUTPUT_DIR '.'" in output
    assert "LORA_TARGETS names x" in layers
    assert "1 pairs to learn from" in data


def test_json_of_a_link_that_is_none_holds_no_secret(folder: Path, as_json: Json) -> None:
    code, told = as_json("--dataset-path", "http://[secret/data.csv")
    assert code == 1
    assert set(told) == KEYS
    assert told["problems"] == ["DATASET_PATH is no valid link."]
    assert "secret" not in json.dumps(told)


def test_json_of_too_few_pairs_has_the_figures(folder: Path, as_json: Json) -> None:
    (folder / "data.csv").write_text("question,answer\nWhy is it?,So.\nHow?,\n")
    code, told = as_json("--dataset-path", "data.csv")
    assert (code, told["ready"]) == (1, False)
    assert "1 pairs to learn from; at least 2 are needed" in told["problems"][0]
    assert (told["rows_read"], told["pairs_kept"], told["quality"]) == (2, 1, 0.5)
    assert (told["sheet"], told["question_column"]) == (None, "question")
    assert told["dropped"] == [{"sheet": "", "row": 3, "reason": "no answer"}]
    assert sheet(folder / "dataset_report.xlsx", "Dropped")[1] == (None, 3, "no answer")


def test_json_of_conversations_names_no_columns(folder: Path, as_json: Json) -> None:
    talks = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in PAIRS
    ]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    code, told = as_json("--dataset-path", "talks.jsonl")
    assert (code, told["shape"], told["pairs_kept"]) == (0, "conversations", len(PAIRS))
    assert told["question_column"] is told["answer_column"] is told["sheet"] is None


def test_everything_but_the_object_goes_to_the_other_stream(flawed: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "finetune_colab.py", "check", "--json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["tokens"]["estimated"] is True
    assert done.stdout.count("\n") == 1
    assert "Ready" in done.stderr
    assert "microsoft/phi-2 is not on this computer" in in_words(done.stderr)


@pytest.mark.parametrize("command", ["train", "demo"])
def test_json_goes_with_no_other_command(command: str, flawed: Path, run: Run) -> None:
    code, text = run(command, "--json")
    assert code == 2
    assert f"--json) goes with the command check, not with {command}" in in_words(text)


# -- Without internet


def test_without_the_tokenizer_the_tokens_are_estimated(workbook: Path, run: Run) -> None:
    code, text = run("check")
    assert code == 0
    assert (
        "token counts are estimates: the tokenizer of microsoft/phi-2 is not on this computer"
        in in_words(text)
    )
    assert "Example" not in text
    rows = sheet(workbook.parent / "dataset_report.xlsx", "Summary")
    assert ("tokens in a pair, estimated", True) in [row[:2] for row in rows]


def test_training_estimates_nothing(workbook: Path, run: Run) -> None:
    code, text = run("train")
    assert code == 2
    assert "microsoft/phi-2" in text
    assert "could not be loaded" in in_words(text)


def test_a_model_that_can_be_no_name_is_a_problem(workbook: Path, run: Run) -> None:
    code, text = run("check", "--model-name", "no such model")
    assert code == 1
    assert "The model no such model could not be loaded" in in_words(text)


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=80))
def test_an_estimate_is_possible_for_any_text(text: str) -> None:
    count = len(ft.EstimatedTokenizer()(text)["input_ids"])
    assert 1 <= count <= 1 + 2.25 * len(text.encode("utf-8", "surrogatepass"))


# -- The report


def test_the_report_holds_every_row_and_setting(flawed: Path, run: Run) -> None:
    run("check", *DEMO, "--seed", 7)
    path = flawed.parent / "dataset_report.xlsx"
    book = openpyxl.load_workbook(path)
    assert book.sheetnames == ["Summary", "Kept", "Dropped", "Settings"]
    assert all(one.freeze_panes == "A2" and one["A1"].font.bold for one in book)
    kept = sheet(path, "Kept")
    assert kept[0] == ("sheet", "row", "question", "answer", "tokens", "held out", "findings")
    assert len(kept) == 33
    assert kept[25][:4] == ("Sheet", 26, "What is 0?", "It is<br>0.")
    assert kept[25][6] == "left-over HTML"
    assert [row[5] for row in kept].count("yes") == 3
    assert (
        sum(row[4] for row in kept[1:])
        == dict(row[:2] for row in sheet(path, "Summary"))["tokens in a pair, sum"]
    )
    assert sheet(path, "Dropped")[1:] == [
        ("Sheet", 33, "no answer"),
        ("Sheet", 35, "a copy of row 34"),
    ]
    assert ("SEED", "7") in sheet(path, "Settings")
    assert [row[0] for row in sheet(path, "Settings")][1:] == list(ft.setting_types())


def test_a_conversation_is_shown_with_its_roles(folder: Path, run: Run) -> None:
    roles = ("user", "assistant", "user", "assistant")
    talks = [
        {
            "messages": [
                {"role": r, "content": f"{t}{i}"} for r, t in zip(roles, "abcd", strict=True)
            ]
        }
        for i in range(3)
    ]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    run("check", *DEMO, "--dataset-path", "talks.jsonl")
    row = sheet(folder / "dataset_report.xlsx", "Kept")[1]
    assert row[2:4] == ("user: a0\n\nassistant: b0\n\nuser: c0", "d0")


def test_no_secret_of_an_address_is_written_down(workbook: Path, tokenizer: Any) -> None:
    cfg = ft.Config(DATASET_PATH="https://example.org/data.csv?key=secret", MODEL_NAME="demo")
    data = ft.prepare(ft.Config(MODEL_NAME="demo"))
    ft.write_report(cfg, data)
    assert ("DATASET_PATH", "https://example.org/…") in sheet(
        workbook.parent / "dataset_report.xlsx", "Settings"
    )


def prepared(answer: str) -> ft.Prepared:
    messages = [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]
    table = ft.Table(answer, [answer, answer], [])
    columns = ft.Columns(0, 1, "by name", 6)
    pairs = ft.Pairs(answer, table, answer, columns, [ft.Pair(messages, answer, 2)], [], 1)
    pairs.dropped.append(ft.Note(answer, 3, answer))
    quality = ft.quality_of(pairs.kept, pairs.dropped)
    return ft.Prepared(None, ft.PROMPT_FORMAT, pairs, quality, [3], [], pairs.kept, [], [], [])


FORMULAS = [
    "=1+1",
    "＝1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'=1",
    "=cmd|' /C calc'!A0",
    "#N/A",
]


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.sampled_from(FORMULAS), st.text(max_size=30)))
def test_nothing_in_the_report_is_a_formula(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("report") / "any.xlsx"
    ft.write_book(path, ft.report_sheets(ft.Config(), prepared(text)))
    book = openpyxl.load_workbook(path)
    cells = [cell for one in book for row in one.iter_rows() for cell in row]
    assert not {cell.data_type for cell in cells} & {"f", "e"}
    assert not any(str(cell.value or "").startswith(tuple("=+-@\t\r\n＝＋－＠")) for cell in cells)
    expected = ft.NOT_IN_A_WORKBOOK.sub("", text)
    expected = f"'{expected}" if expected.startswith(tuple("=+-@\t\r\n＝＋－＠")) else expected
    found = str(book["Kept"]["D2"].value or "")
    assert found == expected.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_a_cell_is_no_longer_than_a_workbook_allows(letter: str, tmp_path: Path) -> None:
    path = tmp_path / "any.xlsx"
    for length in (32_766, 32_767, 32_768, 70_000):
        ft.write_book(path, ft.report_sheets(ft.Config(), prepared(letter * length)))
        found = openpyxl.load_workbook(path)["Kept"]["D2"].value
        assert len(found.encode("utf-16-le")) <= 2 * 32_767
        assert found.endswith("…") == (len((letter * length).encode("utf-16-le")) > 2 * 32_767)


def test_a_sheet_ends_where_it_would_be_too_long(
    workbook: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "MOST_REPORT_ROWS", 10)
    run("check", *DEMO)
    kept = sheet(workbook.parent / "dataset_report.xlsx", "Kept")
    assert len(kept) == 12
    assert kept[-1][0] == "and 14 more rows"


def test_an_earlier_report_is_replaced(workbook: Path, run: Run) -> None:
    run("check", *DEMO)
    run("check", *DEMO, "--seed", 7)
    assert written(workbook.parent) == REPORT
    assert ("SEED", "7") in sheet(workbook.parent / "dataset_report.xlsx", "Settings")


@pytest.mark.parametrize("name", REPORT)
@pytest.mark.parametrize("content", [b"mine", b"", None])
def test_a_file_of_somebody_else_is_left_alone(
    name: str, content: bytes | None, workbook: Path, run: Run
) -> None:
    theirs = workbook.parent / name
    theirs.mkdir() if content is None else theirs.write_bytes(content)
    for _ in range(2):
        code, text = run("check", *DEMO)
        assert code == 0
        assert "every row in dataset_report-2.xlsx" in in_words(text)
    assert content is None or theirs.read_bytes() == content
    assert written(workbook.parent) == sorted(
        [name, "dataset_report-2.png", "dataset_report-2.xlsx"]
    )


def test_a_workbook_of_somebody_else_is_left_alone(workbook: Path, run: Run) -> None:
    theirs = write_workbook(workbook.parent / "dataset_report.xlsx", [("mine",)])
    before = theirs.read_bytes()
    run("check", *DEMO)
    assert theirs.read_bytes() == before


def test_a_report_that_somebody_worked_on_is_left_alone(workbook: Path, run: Run) -> None:
    run("check", *DEMO)
    theirs = workbook.parent / "dataset_report.xlsx"
    book = openpyxl.load_workbook(theirs)
    book.properties.lastModifiedBy = "Ada"
    book.save(theirs)
    before = theirs.read_bytes()
    run("check", *DEMO)
    assert theirs.read_bytes() == before


def test_the_data_itself_is_never_replaced(workbook: Path, run: Run) -> None:
    run("check", *DEMO)
    data = workbook.parent / "dataset_report.xlsx"
    before = data.read_bytes()
    flags = ("--dataset-path", "./dataset_report.xlsx", "--question-column", "question")
    code, _ = run("check", *DEMO, *flags)
    assert code == 0
    assert data.read_bytes() == before
    assert (workbook.parent / "dataset_report-2.xlsx").is_file()


def test_a_folder_that_takes_no_file_only_warns(
    workbook: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = workbook.parent
    monkeypatch.chdir("/proc")  # not even root may write here
    flags = ("--output-dir", there / "model", "--checkpoint-dir", there / "checkpoints")
    code, text = run("check", *DEMO, "--dataset-path", workbook, *flags)
    assert code == 0
    assert "Warning the report could not be written" in in_words(text)
    assert "Ready" in text


@pytest.mark.skipif(sys.platform == "win32", reason="limits are set by a shell of Unix")
def test_a_full_disk_only_warns(workbook: Path) -> None:
    script = f"ulimit -f 1; exec {sys.executable} {ROOT / 'finetune_colab.py'} check --json"
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "the report could not be written" in in_words(done.stderr)
    assert json.loads(done.stdout)["report"] is None
    assert written(workbook.parent) == []


@pytest.mark.parametrize("overlong", [[], [600, 601, 90_000]])
def test_the_picture_shows_what_is_too_long(overlong: list[int], workbook: Path) -> None:
    data = ft.prepare(ft.Config(MODEL_NAME="demo"))
    data.overlong = overlong
    axes = ft.draw_lengths(ft.Config(), data).axes[0]
    kept, *beyond = axes.containers
    assert sum(bar.get_height() for bar in kept) == len(PAIRS)
    assert [sum(bar.get_height() for bar in bars) for bars in beyond] == [3] * bool(overlong)
    edges = [bar.get_x() for bar in kept]
    assert not overlong or 513 in edges  # no bar reaches across the limit of 512


# -- Asking before training


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded of the weights; nothing is."""

    def load_base(cfg: ft.Config, *_: object) -> None:
        models.append(cfg.MODEL_NAME)
        raise ft.UserError("far enough")

    models: list[str] = []
    monkeypatch.setattr(ft, "load_base", load_base)
    return models


@pytest.mark.parametrize("command", ["train", "demo"])
@pytest.mark.parametrize("reply", ["\n", "n\n", "no\n", "yess\n", "", "maybe\n"])
def test_anything_but_yes_stops_before_the_weights(
    command: str, reply: str, flawed: Path, run: Run, loaded: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(reply))
    code, text = run(command, *DEMO, "--dataset-path", "dataset.xlsx")
    assert code == 2
    assert "Train anyway? [y/N]" in text
    assert "Nothing was trained, as you wished, and nothing was changed." in in_words(text)
    assert loaded == []
    assert written(flawed.parent) == []


@pytest.mark.parametrize("reply", ["y\n", "Y\n", "yes\n", " YES \n"])
def test_yes_goes_on(
    reply: str, flawed: Path, run: Run, loaded: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(reply))
    run("train", *DEMO)
    assert loaded == ["demo"]


@pytest.mark.parametrize(
    "stdin, flags",
    [
        (Terminal("n\n"), ("--yes",)),
        (Terminal("n\n"), ("--min-quality", "0.5")),
        (io.StringIO("n\n"), ()),
        (None, ()),
    ],
)
def test_nobody_is_asked(
    stdin: Any, flags: tuple[str, ...], flawed: Path, run: Run, loaded: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    _, text = run("train", *DEMO, *flags)
    assert "Train anyway?" not in text
    assert loaded == ["demo"]
    assert ("MIN_QUALITY" in text) == ("--min-quality" not in flags)


def test_check_asks_nothing(flawed: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    code, text = run("check", *DEMO)
    assert code == 0
    assert "Train anyway?" not in text


def test_good_data_is_trained_without_a_question(
    workbook: Path, run: Run, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    run("train", *DEMO)
    assert loaded == ["demo"]


def test_the_quality_is_in_the_record_of_a_run(phi_folder: Path, flawed: Path, run: Run) -> None:
    assert run("--model-name", phi_folder, "--max-steps", 1)[0] == 0
    quality = json.loads(Path("model/run.json").read_text())["dataset"]["quality"]
    assert quality["score"] == round(25 / 34, 4)
    assert quality["parts"]["an answer of one letter"]["places"] == [["Sheet", 32]]
