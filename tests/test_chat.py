"""Chat and compare: at a terminal, through pipes, and with many questions from a file."""

import io
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import openpyxl
import pexpect
import pytest
from conftest import PAIRS, Patch, Run, call, in_words, write_workbook
from safetensors.torch import load_file, save_file
from seams import SCRIPT, Config, find_pairs, load_tuned, main, stream_answer
from tables import cases, cases_of_files, jsonl

Chat = Callable[..., list[str]]
Printed = pytest.CaptureFixture[str]
FILE = "compare --max-tokens 2 --questions a.txt"
X, Y = "What is 2 plus 3?", "What is 2 plus 4?"


class Keyboard(io.StringIO):
    """Somebody at a terminal who types these lines; ^C is Ctrl+C. Or the screen of that terminal."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:
        if (line := super().readline()) == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture
def chat(patched: Patch) -> Chat:
    """What is shown after each line, in a chat or a comparison at a terminal."""

    def chat(*lines: str, command: str = "chat") -> list[str]:
        screen = Keyboard()
        patched.setattr(sys, "stdin", Keyboard("".join(f"{line}\n" for line in lines)))
        patched.setattr(sys, "stdout", screen)
        assert main([*command.split(), "--max-tokens", "12"]) == 0
        return re.split("You: |Question: ", screen.getvalue())[1:]

    return chat


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def taught_conversations(home: Path, base: Path) -> Path:
    talks = [{"messages": talk(*PAIRS[i], *PAIRS[-i])} for i in range(1, len(PAIRS))]  # of two questions each
    (home / "dataset.jsonl").write_bytes(jsonl(*talks))
    flags = ("--model-name", base, "--max-steps", 12, "--learning-rate", 2e-2, "--max-tokens", 3)
    assert call(home, *flags, "--dataset-path", "dataset.jsonl") == 0
    return home / "model"


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory, phi_folder: Path) -> Path:
    return taught_conversations(tmp_path_factory.mktemp("conversations"), phi_folder)


def always_says(model: Path, text: str) -> None:
    """Whatever tokens this model chooses, its tokenizer reads them as this text."""
    whole = json.loads((path := model / "tokenizer.json").read_text())
    anything = {"type": "Replace", "pattern": {"Regex": r"[\s\S]+"}, "content": text}
    whole["decoder"] = {"type": "Sequence", "decoders": [whole["decoder"], anything]}
    path.write_text(json.dumps(whole))


def answer_of(shown: str) -> str:
    return in_words(shown.partition("\n(")[0].replace("Model:", ""))


def test_a_real_terminal_has_arrow_keys_and_ctrl_c_ends_only_the_answer(finished: Path) -> None:
    size: Any = {"dimensions": (30, 80), "encoding": "utf-8", "timeout": 90}
    terminal = pexpect.spawn(sys.executable, [str(SCRIPT), "chat", "--max-tokens", "1900"], **size)

    def until(mark: str) -> str:
        terminal.expect(mark)
        return str(terminal.before)

    assert "/reset" in until("You: ")
    for line in ("Why is 2?", "\x1b[A\x1b[D\x7f9"):  # up, left, and 9 in place of the letter there
        terminal.sendline(line)
        until("Model: .{9}")
        terminal.sendintr()
        tokens = re.findall(r"(\d+) tokens", until("You: "))
        assert 0 < int(tokens[0]) < 1900
    terminal.sendintr()  # nothing is being said
    assert "/quit" in until("You: ")
    terminal.sendline("/save talk.json")
    until("You: ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert json.loads(Path("talk.json").read_text())["messages"][-2]["content"] == "Why is 9?"


def test_an_answer_knows_what_was_said(conversations: Path, chat: Chat, folder: Path) -> None:
    first, second, *_ = chat(X, Y, "/save talk.json", "/quit", command=f"chat --output-dir {conversations}")
    assert re.search(r"\(12 tokens, [\d.]+ per second.*--max-tokens", first)
    [messages] = [pair.messages for pair in find_pairs(Config(DATASET_PATH="talk.json")).kept]
    assert [one["content"] for one in messages[::2]] == [X, Y]
    for place, shown in ((1, first), (3, second)):
        *_, expected = stream_answer(load_tuned(conversations), messages[:place], MAX_TOKENS=12)
        assert messages[place] == {"role": "assistant", "content": expected.text}
        assert answer_of(shown) == in_words(expected.text)


ODD = "ab 雪é🙂 | `b` " * 12 + "\x1b[2J\x1b]0;owned\x07" + "a" * 90 + "\n\n" + "雪" * 50
# fmt: off
COMMANDS = {  # what is typed, what must be shown
    "": r"^\s*$", X: "Model: ", "^C": "/quit", "/reset": r"\w", "/reste": "Unknown command /reste. /reset",
    "/system Be brief.": "instructions", "/save a.json": r"a\.json", "/save  a.json": "new",  # it is there by now
    "/save": "new", "/save /nowhere/talk.json": "/nowhere/talk.json", f"/save {'x' * 300}": "x{300}",
    "/system": "instructions", "/help": "^(?!Unknown).*/reset", "Why?": "Model: ", "Tell me more.": "Model: ", f"{X} ": "Model: ",
}
# fmt: on


def test_the_commands_of_a_chat(finished: Path, chat: Chat) -> None:
    shown = chat(*COMMANDS, "/quit", "never asked")
    assert len(shown) == len(COMMANDS) + 1
    for (line, pattern), told in zip(COMMANDS.items(), shown, strict=False):
        assert re.search(pattern, told, re.DOTALL), line
    assert answer_of(shown[1]) == answer_of(shown[-2])  # each question is asked alone
    [saved] = map(json.loads, Path("a.json").read_text().splitlines())
    assert saved["messages"] == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("width, grey", [(40, ""), (80, ""), (80, "1"), (200, "")])
def test_two_coloured_columns_lose_nothing(width: int, grey: str, finished: Path, chat: Chat, patched: Patch) -> None:
    always_says(finished / "model", ODD)
    for name, value in {"COLUMNS": str(width), "NO_COLOR": grey, "TERM": "xterm"}.items():
        patched.setenv(name, value)
    shown, end = chat(X, "/quit" if grey else "", "never asked", command="compare")
    assert not end.strip()
    assert ("\x1b[33m" in shown) == (not grey)
    plain = re.sub(r"\x1b\[\d+m", "", shown)
    assert re.search(r"Before.* +\| *After", plain)
    assert all(len(line) + len(re.findall("[雪🙂]", line)) <= min(width, 160) for line in plain.splitlines())
    for text, times in ((plain, 2), (chat("Why?")[0], 1)):
        assert not {"\x1b", "\x07"} & set(text)  # V9
        assert all(text.count(c) == ODD.count(c) * times for c in "雪🙂`")


def test_questions_without_a_terminal(finished: Path, capsys: Printed, patched: Patch) -> None:
    capsys.readouterr()
    assert main(["chat", "What is", "2 plus 3?", "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    *_, answer = stream_answer(load_tuned(Path("model")), talk(X), MAX_TOKENS=5)
    assert out.strip() == answer.text.strip()  # and nothing else
    assert re.search(r"\(5 tokens, [\d.]+ per second", err)
    for piped, code in ((f"Pourquoi pas \xe9?\n\n  {X}  \n", 0), (f"{'Why? ' * 3000}\nAnd?\nWhy?", 2)):
        patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode("cp1252")), "utf-8"))
        assert main(["chat", "--max-tokens", "4"]) == code  # one too long costs no other
        assert capsys.readouterr().err.count("(4 tokens") == 2


def test_the_base_the_zip_and_the_merged_model_can_be_asked(finished: Path, capsys: Printed, phi_folder: Path) -> None:
    def ask(command: str = "chat", code: int = 0, told: str = "") -> str:
        capsys.readouterr()
        assert main([*command.split(), "Why?", "--max-tokens", "9"]) == code
        printed = capsys.readouterr()
        assert re.search(told, in_words(printed.err))
        return printed[code // 2]

    tuned, base, both = ask(), ask("chat --base"), ask("compare", told="cut off by --max-tokens")
    assert ask("chat --model-name a/b", told="fine-tuned from ./tiny-phi.*--model-name a/b.*ignored") == tuned
    assert tuned != base
    assert "After" in ask("compare --load-in-4bit")
    assert main(["export", "--to", "merged"]) == 0
    assert ask("chat --output-dir model-merged") == tuned
    shutil.copytree(phi_folder, "model-merged/tiny-phi")
    assert ask("compare --output-dir model-merged") == both
    with zipfile.ZipFile("fine_tuned_model.zip") as archive:
        assert {"answers.xlsx", "training_visuals/answers.png"} <= set(archive.namelist())
    shutil.make_archive("by_hand", "zip", finished, "model")  # of the folder itself
    shutil.rmtree("model")
    assert ask(f"chat --base --model-name {phi_folder}") == base  # nothing was trained yet
    assert "tiny-phi" in ask("chat --output-dir fine_tuned_model.zip", code=2)  # has to lie beside it
    shutil.copytree(phi_folder, "tiny-phi")
    assert ask("chat --output-dir fine_tuned_model.zip") == ask("chat --output-dir by_hand.zip") == tuned


def contents(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and "logs" not in path.parts}


def done(patched: Patch, what: str, path: str = "", text: str = "") -> None:
    """One step of a case in tests/cases/oddities.txt."""
    place, adapter = Path(path), "model/adapter_model.safetensors"
    match what:
        case "remove":
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        case "write":
            place.parent.mkdir(exist_ok=True)
            place.write_text(text)
        case "fill":
            place.write_text(text[-1] * int(text[:-1]))
        case "move":
            place.rename(text)
        case "record":
            record = json.loads(Path("model/run.json").read_text()) | json.loads(f"{path} {text}")
            Path("model/run.json").write_text(json.dumps(record))
        case "cut":
            save_file({name: one[..., :-1].contiguous() for name, one in load_file(adapter).items()}, adapter)
        case "run":
            assert main([path, *text.split()]) == 0
        case "disk":
            patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(path)))
        case "installed":
            real = metadata.version
            patched.setattr(metadata, "version", lambda name: real(name) if name != path else text or real("missing"))


@pytest.mark.parametrize("case", cases("oddities").values())
def test_what_cannot_be_asked_or_exported_is_one_message(case: str, finished: Path, run: Run, patched: Patch) -> None:
    _, steps, rest = case.split(" | ")
    command, told = rest.split(" ->")
    for step in steps.split("; "):
        done(patched, *step.split(" ", 2))
    before = contents(finished)
    code, printed = run(*command.split())
    assert (code, "Traceback" in printed, printed.count("Stopped  ")) == ((2, False, 1) if told else (0, False, 0))
    assert re.search(told.strip(), in_words(printed))
    assert steps != "as it is" or "export" in command or "Device" not in printed  # it comes before the wait
    assert contents(finished) == before


def test_a_comparison_of_many_loads_the_base_once(finished: Path, run: Run, patched: Patch) -> None:
    from transformers import PreTrainedModel

    loads, real = [], PreTrainedModel.from_pretrained.__func__
    spy = classmethod(lambda cls, *a, **k: loads.append(cls) or real(cls, *a, **k))
    patched.setattr(PreTrainedModel, "from_pretrained", spy)
    more = [("question", "answer"), PAIRS[3], ("Open?", "")]
    write_workbook(finished / "asked.xlsx", [("question", "answer"), *PAIRS[:3]], More=more)
    assert run("compare", "--questions", "asked.xlsx", "--max-tokens", 5)[0] == 0
    assert len(loads) == 1
    sheet = openpyxl.load_workbook("compare.xlsx")["Answers"]
    assert {"question", "before", "after"} <= {cell.value for cell in sheet[1]}
    assert [sheet["A2"].value, sheet["B2"].value, sheet.freeze_panes] == ["2 of Sheet", PAIRS[0][0], "A2"]
    assert [cell.value for cell in sheet[6][:2]] == ["3 of More", "Open?"]
    assert sheet["B2"].alignment.wrap_text


def test_files_of_questions(finished: Path, run: Run, patched: Patch) -> None:
    for title, file in cases_of_files("questions").items():
        Path(file.name).write_bytes(file.content)
        patched.setattr(sys, "stdin", Keyboard())
        code, printed = run("compare", "--questions", file.name, "--max-tokens", 1)
        odd = "Traceback" in printed or "The column with" in printed  # for which nobody is asked
        assert (code, odd) == (2 if file.refused else 0, False), (title, printed)
        assert re.search(file.refused or "", in_words(printed)), title
        if not file.refused:
            rows = openpyxl.load_workbook("compare.xlsx")["Answers"].iter_rows(min_row=2, values_only=True)
            found = [(int(row), (question, expected or "")) for row, question, expected, *_ in rows]
            assert found == [*zip(file.rows, file.expected, strict=True)], title
        for path in finished.glob("compare*"):
            path.unlink()


def test_no_comparison_is_replaced_and_a_full_disk_leaves_no_half(finished: Path, run: Run, patched: Patch) -> None:
    Path("a.txt").write_text(f"{'Why? ' * 3000}\nWhy?\n")
    patched.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    code, printed = run(*FILE.split())
    assert code == 2 and "No space left" in in_words(printed)
    assert not [*finished.glob("*compare*")]
    patched.undo()
    Path("compare.xlsx").write_text("my notes")
    for _ in range(2):
        code, printed = run(*FILE.split())
        assert code == 0 and "row 1" in printed  # which is too long, and costs no other
    assert Path("compare.xlsx").read_text() == "my notes"
    assert {path.stem for path in finished.glob("compare*.xlsx")} == {"compare", "compare-2", "compare-3"}
    assert openpyxl.load_workbook("compare-2.xlsx")["Answers"]["A2"].value == "2"


def test_a_long_chat_is_ready_at_once(conversations: Path) -> None:
    tuned, start = load_tuned(conversations), time.process_time()
    next(stream_answer(tuned, talk(*(f"{i} {X}" for i in range(601))), MAX_TOKENS=1))
    assert time.process_time() - start < 0.8
