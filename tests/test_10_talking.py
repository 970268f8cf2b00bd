"""Section 10: talking at a real terminal, through pipes, and comparing side by side."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openpyxl
import pexpect
import pytest
from conftest import PAIRS, ROOT, in_words, write_workbook
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

SCRIPT = [sys.executable, str(ROOT / "finetune_colab.py")]
Run = Callable[..., tuple[int, str]]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def here(tuned_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with the model of a finished run in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tuned_run / "model", tmp_path / "model")
    return tmp_path


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# -- At a terminal


class Terminal:
    """What a person types and sees."""

    def __init__(self, folder: Path, *argv: str, width: int = 80, **environment: str) -> None:
        self.process = pexpect.spawn(
            SCRIPT[0],
            [*SCRIPT[1:], *argv],
            cwd=str(folder),
            env=os.environ | environment,
            encoding="utf-8",
            timeout=90,
            dimensions=(30, width),
        )

    def until(self, mark: str) -> str:
        """What is shown before it."""
        self.process.expect(mark)
        return ANSI.sub("", str(self.process.before)).replace("\r\n", "\n")

    def ask(self, line: str) -> str:
        """Type a line, and see what is shown up to the next prompt."""
        self.process.sendline(line)
        return self.until("You: ")

    def end(self) -> int:
        self.process.expect(pexpect.EOF)
        self.process.close()
        return int(self.process.exitstatus)


@pytest.fixture(scope="module")
def terminal(tuned_run: Path) -> Iterator[Terminal]:
    """A talk without end: the little model never stops by itself."""
    terminal = Terminal(tuned_run, "chat", "--max-tokens", "12")
    told = terminal.until("You: ")
    assert "/reset" in told
    assert "Traceback" not in told
    yield terminal
    terminal.process.sendline("/quit")
    assert terminal.end() == 0


def test_an_answer_comes_with_its_speed(terminal: Terminal) -> None:
    told = terminal.ask("What is 2 plus 3?")
    assert re.search(r"Model: .+\n\(12 tokens, [\d.]+ a second; cut off, --max-tokens", told)


def test_an_answer_knows_what_was_said_before(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    terminal.ask("/reset")
    terminal.ask("What is 2 plus 3?")
    terminal.ask("And 2 plus 4?")
    assert "Kept in" in terminal.ask(f"/save {path}")
    [talk] = json.loads(path.read_text())
    roles = [message["role"] for message in talk["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert talk["messages"][2]["content"] == "And 2 plus 4?"
    pairs = ft.find_pairs(ft.Config(DATASET_PATH=str(path)))  # a training can read it
    assert pairs.kept[0].messages == talk["messages"]


def test_names_that_cannot_be_files_end_nothing(terminal: Terminal) -> None:
    assert "cannot be written" in terminal.ask(f"/save {'x' * 300}")


def test_what_is_forgotten_and_what_is_kept(terminal: Terminal, tmp_path: Path) -> None:
    terminal.ask("What is 2 plus 3?")
    assert "Forgotten" in terminal.ask("/reset")
    assert "with these instructions" in terminal.ask("/system Be brief.")
    terminal.ask(f"/save {tmp_path / 'a.json'}")
    [talk] = json.loads((tmp_path / "a.json").read_text())
    assert talk["messages"] == [{"role": "system", "content": "Be brief."}]
    assert "name of a new file" in in_words(terminal.ask(f"/save {tmp_path / 'a.json'}"))
    assert "name of a new file" in in_words(terminal.ask("/save"))
    assert "cannot be written" in terminal.ask("/save /nowhere/talk.json")
    assert "without instructions" in terminal.ask("/system")
    assert "There is no /reste" in terminal.ask("/reste")
    assert terminal.ask("").strip() == ""


def test_arrow_keys_bring_back_what_was_typed(terminal: Terminal, tmp_path: Path) -> None:
    terminal.ask("/reset")
    terminal.ask("What is 2 plus 3?")
    terminal.ask("\x1b[A\x1b[D\x1b[D\x7f9")  # up, twice left, and 9 in place of the letter there
    terminal.ask(f"/save {tmp_path / 'edited.json'}")
    [talk] = json.loads((tmp_path / "edited.json").read_text())
    assert talk["messages"][2]["content"] == "What is 2 plus93?"


def test_ctrl_c_ends_the_answer_and_not_the_program(tuned_run: Path) -> None:
    terminal = Terminal(tuned_run, "chat", "--max-tokens", "1900")
    terminal.until("You: ")
    terminal.process.sendline("Why?")
    terminal.until("Model: .")
    terminal.process.sendintr()
    cut = terminal.until("You: ")
    tokens = re.search(r"\((\d+) tokens", cut)
    assert tokens
    assert int(tokens[1]) < 1900
    terminal.process.sendintr()  # nothing is being said
    assert "/quit leaves" in terminal.until("You: ")
    terminal.process.sendline("And now?")
    terminal.until("Model: .")
    terminal.process.sendintr()
    terminal.until("You: ")
    terminal.process.sendeof()
    assert terminal.end() == 0


def test_a_comparison_at_a_terminal_has_two_columns_and_colours(tuned_run: Path) -> None:
    flags = ("compare", "--max-tokens", "12")
    terminal = Terminal(tuned_run, *flags)
    terminal.until("Question: ")
    terminal.process.sendline("What is 2 plus 3?")
    terminal.process.expect("Question: ")
    shown = str(terminal.process.before)
    assert "\x1b[33m" in shown
    plain = ANSI.sub("", shown)
    assert re.search(r"Before: the base model +\| After: the tuned model", plain)
    assert max(map(len, plain.splitlines())) <= 80
    terminal.process.sendline("")
    assert terminal.end() == 0
    grey = Terminal(tuned_run, *flags, "What is 2 plus 3?", width=40, NO_COLOR="1")
    told = grey.until(pexpect.EOF)
    assert "\x1b[33m" not in str(grey.process.before)
    assert "Before: the base model\n\n" in told  # one below the other
    assert grey.end() == 0


# -- Without a terminal


def test_one_question_and_nothing_else_on_standard_output(here: Path) -> None:
    command = [*SCRIPT, "chat", "What is", "2 plus 3?", "--max-tokens", "5"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    tuned = ft.load_tuned(Path("model"))
    prompt = ft.prompt_of(tuned, [ft.asked_by_user("What is 2 plus 3?")], ft.Config())
    [answer] = ft.answers(tuned.model, tuned.tokenizer, [prompt], ft.Config(MAX_TOKENS=5))
    assert done.stdout == ft.harmless(answer.text) + "\n"
    assert re.search(r"\(5 tokens, [\d.]+ a second", done.stderr)
    assert "Model      model" in done.stderr


def test_questions_may_be_piped_in(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "Why?\n\n  What is 2 plus 3?  \n")
    code, printed = run("chat", "--max-tokens", 4)
    assert code == 0
    assert printed.count("(4 tokens") == 2


@pytest.mark.parametrize("command", ["chat", "compare"])
def test_nobody_to_ask_and_no_question_is_one_message(here: Path, run: Run, command: str) -> None:
    code, printed = run(command)
    assert code == 2
    assert "There is no question, and nobody to ask for one" in in_words(printed)
    assert "Loading" not in printed  # it comes before the wait


def test_the_base_model_can_be_asked(here: Path, run: Run, phi_folder: Path) -> None:
    tuned = run("chat", "Why?", "--max-tokens", 9)[1].splitlines()
    base = run("chat", "Why?", "--base", "--max-tokens", 9)[1].splitlines()
    assert tuned[0] != base[0]
    shutil.rmtree("model")  # nothing was trained yet
    alone = run("chat", "Why?", "--base", "--max-tokens", 9, "--model-name", phi_folder)
    assert alone[0] == 0
    assert alone[1].splitlines()[0] == base[0]


def test_a_control_character_in_an_answer_reaches_no_terminal(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "\x1b[2J\x1b]0;owned\x07 hello"

    def growing_answer(*_: Any) -> Iterator[ft.Answer]:
        yield ft.Answer(hostile, 3, stopped=True)

    monkeypatch.setattr(ft, "growing_answer", growing_answer)
    code, printed = run("chat", "Why?")
    assert code == 0
    assert "hello" in printed
    assert not {"\x1b", "\x07"} & set(printed)


# -- What may be asked


def test_a_zip_is_as_good_as_its_folder(
    tuned_run: Path, run: Run, phi_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tuned_run)
    folder = run("chat", "Why?", "--max-tokens", 9)[1].splitlines()[0]
    monkeypatch.chdir(tmp_path)
    shutil.copy(tuned_run / "fine_tuned_model.zip", tmp_path)
    flags = ("chat", "Why?", "--max-tokens", 9, "--output-dir", "fine_tuned_model.zip")
    code, printed = run(*flags)
    assert code == 2
    assert f"Copy that folder into {tmp_path}" in in_words(printed)
    shutil.copytree(phi_folder, tmp_path / "tiny-phi")
    code, printed = run(*flags)
    assert code == 0
    assert printed.splitlines()[0] == folder


def test_a_merged_model_and_its_base(here: Path, run: Run, phi_folder: Path) -> None:
    tuned = ft.load_tuned(Path("model"))
    merged = here / "merged"
    tuned.model.merge_and_unload().save_pretrained(merged)
    tuned.tokenizer.save_pretrained(merged)
    shutil.copy("model/run.json", merged)
    shutil.copytree(phi_folder, merged / "tiny-phi")
    for flags in (("chat", "Why?"), ("compare", "Why?")):
        code, one = run(*flags, "--max-tokens", 6)
        assert code == 0
        code, other = run(*flags, "--max-tokens", 6, "--output-dir", merged)
        assert code == 0
        assert one.split("Device")[0] == other.split("Device")[0]


def test_four_bits_when_asked_for(here: Path, run: Run) -> None:
    code, printed = run("compare", "Why?", "--load-in-4bit", "--max-tokens", 3)
    assert code == 0
    assert "After: the tuned model" in printed


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda: shutil.rmtree("model"), "There is no model in model yet"),
        (lambda: Path("model/adapter_model.safetensors").unlink(), "could not be loaded"),
        (lambda: Path("model/adapter_model.safetensors").write_bytes(b"{"), "could not be loaded"),
        (lambda: Path("model/run.json").unlink(), "holds no finished run"),
        ("another_base", "could not be loaded"),
        ("not_a_zip", "model cannot be unpacked"),
    ],
)
def test_what_cannot_be_asked_is_one_message(
    here: Path, run: Run, break_it: Callable[[], Any] | str, told: str
) -> None:
    (globals()[break_it] if isinstance(break_it, str) else break_it)()
    code, printed = run("chat", "Why?")
    assert code == 2
    assert told in in_words(printed)
    assert "Traceback" not in printed


def another_base() -> None:
    from safetensors.torch import load_file, save_file

    path = Path("model/adapter_model.safetensors")
    weights = {name: part[..., :-1].contiguous() for name, part in load_file(path).items()}
    save_file(weights, path)


def not_a_zip() -> None:
    shutil.rmtree("model")
    Path("model").write_text("no zip")


def test_flags_of_other_commands_are_refused(folder: Path, run: Run) -> None:
    for flags in (("--web",), ("train", "--base"), ("check", "why"), ("chat", "--questions", "x")):
        code, printed = run(*flags)
        assert code == 2
        assert "goes with the command" in in_words(printed)


# -- Many questions


def test_a_comparison_of_many_loads_the_base_once(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, real = [], ft.load_base
    monkeypatch.setattr(ft, "load_base", lambda *args: loads.append(1) or real(*args))
    write_workbook(here / "asked.xlsx", [("question", "answer"), *PAIRS[:3]])
    assert run("compare", "--questions", "asked.xlsx", "--max-tokens", 5)[0] == 0
    assert len(loads) == 1
    rows = json.loads(Path("compare.json").read_text())["rows"]
    assert [row["question"] for row in rows] == [question for question, _ in PAIRS[:3]]
    assert [row["reference"] for row in rows] == [answer for _, answer in PAIRS[:3]]
    assert all(row["loss_after"] < row["loss_before"] for row in rows)
    sheet = openpyxl.load_workbook("compare.xlsx")["Answers"]
    titles = [cell.value for cell in sheet[1]]
    assert titles[:5] == ["row", "question", "answer wanted", "before", "after"]
    assert sheet.freeze_panes == "A2"
    assert sheet["A2"].value == "2"
    assert sheet["B2"].alignment.wrap_text
    assert sheet["B2"].value == PAIRS[0][0]
    assert len(sheet.conditional_formatting) == 2
    text = Path("compare.md").read_text()
    assert all(question in text for question, _ in PAIRS[:3])


def test_only_one_base_is_in_memory(here: Path) -> None:
    """Before and after are the same weights, with the adapter switched off and on."""
    tuned = ft.load_tuned(Path("model"))
    with tuned.untuned() as before:
        assert before is tuned.model
        places = {p.data_ptr() for p in before.parameters()}
    assert places == {p.data_ptr() for p in tuned.model.parameters()}


YAML_LIST = "- What is 2 plus 3?\n- question: What is 2 plus 4?\n  answer: It is 6.\n"
YAML_MAP = "What is 2 plus 3?:\nWhat is 2 plus 4?: It is 6.\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.yaml", YAML_LIST),
        ("a.yml", YAML_MAP),
        ("a.yaml", "questions:\n" + YAML_LIST),
        ("a.csv", "question,answer\nWhat is 2 plus 3?,\nWhat is 2 plus 4?,It is 6.\n"),
        ("a.jsonl", '{"question": "What is 2 plus 3?", "answer": ""}\n'
         '{"question": "What is 2 plus 4?", "answer": "It is 6."}\n'),
    ],
)  # fmt: skip
def test_questions_with_and_without_the_answer_wanted(
    folder: Path, name: str, content: str
) -> None:
    Path(name).write_text(content)
    talks = [talk[1:] for talk in ft.listed_questions(ft.Config(QUESTIONS=name))]
    assert talks == [
        ([ft.asked_by_user("What is 2 plus 3?")], ""),
        ([ft.asked_by_user("What is 2 plus 4?")], "It is 6."),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "question\nWhy?\nWhat is 2 plus 3?\n"),
        ("a.csv", "Why?\nWhat is 2 plus 3?\n"),
        ("a.txt", "Why?\nWhat is 2 plus 3?\n"),
        ("a.csv", "question,answer\nWhy?,\nWhat is 2 plus 3?,\n"),
        ("a.csv", "id,question\n1,Why?\n2,What is 2 plus 3?\n"),
        ("a.jsonl", '{"question": "Why?"}\n{"question": "What is 2 plus 3?"}\n'),
        ("a.yaml", "- Why?\n- What is 2 plus 3?\n"),
    ],
)
def test_questions_alone(folder: Path, name: str, content: str) -> None:
    Path(name).write_text(content)
    talks = [talk[1:] for talk in ft.listed_questions(ft.Config(QUESTIONS=name))]
    assert talks == [
        ([ft.asked_by_user("Why?")], ""),
        ([ft.asked_by_user("What is 2 plus 3?")], ""),
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.yaml", "- [a, {", "cannot be read as YAML"),
        ("a.yaml", "just text", "holds no questions"),
        ("a.yaml", "- question:\n  answer: So.\n", "Entry 1 of a.yaml is no question"),
        ("a.yaml", "- [a, b]\n", "Entry 1 of a.yaml is no question"),
        ("a.yaml", "[" * 3000, "cannot be read as YAML"),
        ("a.csv", "question\nIf I pay late, what happens?\nWhy?\n", "more cells than headers"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Why?"}]}\n', "a.jsonl"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "name,age\nAnn,3\nBob,4\n", "a.csv"),
        (None, "", "There is no file"),
    ],
)
def test_questions_that_cannot_be_read(
    folder: Path, run: Run, name: str | None, content: str, told: str
) -> None:
    if name:
        Path(name).write_text(content)
    code, printed = run("compare", "--questions", name or "missing.xlsx")
    assert code == 2
    assert told in in_words(printed)
    assert "Traceback" not in printed


def test_no_earlier_comparison_is_replaced(here: Path, run: Run) -> None:
    Path("compare.md").write_text("my notes")
    Path("asked.yaml").write_text("- Why?\n")
    for _ in range(2):
        assert run("compare", "--questions", "asked.yaml", "--max-tokens", 3)[0] == 0
    assert Path("compare.md").read_text() == "my notes"
    found = {path.stem for path in here.glob("compare*.xlsx")}
    assert found == {"compare-2", "compare-3"}


def test_words_that_yaml_takes_for_values_stay_words(folder: Path) -> None:
    Path("a.yaml").write_text("- question: Is it so?\n  answer: no\n- question: 1.0\n  answer: 0\n")
    talks = ft.listed_questions(ft.Config(QUESTIONS="a.yaml"))
    assert [talk.reference for talk in talks] == ["no", "0"]
    assert talks[1].messages[0]["content"] == "1.0"


def test_a_text_file_is_a_question_a_line(folder: Path) -> None:
    Path("a.txt").write_text("If I pay late, what happens?\n\nWhy; and how?\n")
    talks = ft.listed_questions(ft.Config(QUESTIONS="a.txt"))
    assert [(t.place, t.messages[0]["content"]) for t in talks] == [
        ("1", "If I pay late, what happens?"),
        ("3", "Why; and how?"),
    ]


def test_rows_that_are_left_out_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.csv").write_text("question,answer\nWhy?,So.\nWhy?,So.\nHow?,Thus.\n")
    assert len(ft.listed_questions(ft.Config(QUESTIONS="a.csv"))) == 2
    assert "1 × a copy of an earlier row: row 3" in capsys.readouterr().out


def test_a_question_that_is_too_long_costs_no_other(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, f"{'Why? ' * 3000}\nAnd why?\n")
    code, printed = run("chat", "--max-tokens", 4)
    assert code == 2
    assert "Shorten it" in printed
    assert "(4 tokens" in printed
    Path("asked.yaml").write_text(f"- {'Why? ' * 3000}\n- And why?\n")
    code, printed = run("compare", "--questions", "asked.yaml", "--max-tokens", 4)
    assert code == 0
    assert "Left out" in printed
    assert len(json.loads(Path("compare.json").read_text())["rows"]) == 1


def test_a_zip_of_the_folder_itself_does_as_well(here: Path, run: Run) -> None:
    shutil.copytree(next(Path("model").glob("nothing*"), Path("model")), here / "zipped" / "model")
    shutil.make_archive("by_hand", "zip", here / "zipped")
    base = Path(os.fsdecode(Path("model/base_model_folder.txt").read_bytes()))
    shutil.copytree(base, here / "tiny-phi")
    code, _ = run("chat", "Why?", "--max-tokens", 3, "--output-dir", "by_hand.zip")
    assert code == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"examples": 5},
        {"examples": None},
        {"examples": "Why?"},
        {"prompt_format": 5},
        {"prompt_format": "no place"},
        {"prompt_format": "{question} \ud800"},
        {"settings": []},
        {"settings": {"MODEL_NAME": "x" * 300}},
    ],
)
def test_an_odd_record_is_one_message_or_does_no_harm(
    here: Path, run: Run, changes: dict[str, Any]
) -> None:
    record = json.loads(Path("model/run.json").read_text())
    Path("model/run.json").write_text(json.dumps(record | changes))
    code, printed = run("chat", "Why?", "--max-tokens", 2)
    assert code == (0 if changes in ({"examples": None}, {"examples": "Why?"}) else 2)
    assert "Traceback" not in printed
    Path("model/run.json").write_text("[" * 200_000)
    assert run("chat", "Why?")[0] == 2


def test_a_full_disk_leaves_no_half_comparison(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settle(path: Path) -> None:
        if path.suffix == ".partial":
            raise OSError(28, "No space left on device")

    Path("asked.yaml").write_text("- Why?\n")
    monkeypatch.setattr(ft, "settle", settle)
    code, printed = run("compare", "--questions", "asked.yaml", "--max-tokens", 3)
    assert code == 2
    assert "cannot be written: No space left on device" in in_words(printed)
    assert not list(here.glob("compare*"))


# -- What it looks like

LETTERS = st.text("ab \n\t雪é́🙂\x1b`|", max_size=200)


@settings(max_examples=200, deadline=None)
@given(before=LETTERS, after=LETTERS, width=st.integers(10, 200))
def test_two_columns_fit_and_lose_nothing(before: str, after: str, width: int) -> None:
    asked = ft.Asked("", "Why?", "", before, after)
    shown = ft.side_by_side(asked, width, coloured=False)
    if width >= 60:
        assert all(ft.width_of(line) <= width for line in shown.split("\n"))
    assert "\x1b" not in shown
    letters = sorted("".join((before + after).split()).replace("\x1b", ""))
    found = shown
    for side in ft.SIDES:
        found = found.replace(side, "", 1)
    count = lambda text: {c: text.count(c) for c in "ab雪🙂`"}  # noqa: E731
    assert count(found) == count("".join(letters))


@settings(max_examples=100, deadline=None)
@given(text=LETTERS)
def test_an_answer_cannot_leave_its_place_in_the_text_file(text: str) -> None:
    result = ft.Comparison([ft.Asked("2", "Why?", "", text, "So.")], 1.0)
    lines = ft.answers_in_markdown(result, {}).split("\n")
    fences = [line for line in lines if re.fullmatch(r"`{3,}(text)?", line)]
    inside, closing = [], ""
    for line in lines:
        if not closing and line.endswith("text") and line.startswith("```"):
            closing = line.removesuffix("text")
        elif closing and line == closing:
            closing = ""
        elif not closing:
            inside.append(line)
    assert fences
    assert closing == ""
    assert [line for line in inside if line.startswith("#")] == ["# Before and after", "## 2"]


def test_the_zip_brings_the_answers_along(tuned_run: Path) -> None:
    with zipfile.ZipFile(tuned_run / "fine_tuned_model.zip") as archive:
        names = set(archive.namelist())
    assert {"answers.xlsx", "training_visuals/answers.png"} <= names
    record = json.loads((tuned_run / "model" / "run.json").read_text())
    assert "answers.xlsx" in record["files"]
    assert 1 <= len(record["examples"]) <= 3
