"""Section 1: what a run writes down of itself, and what never stands in it."""

from __future__ import annotations

import logging
import logging.handlers
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import PAIRS, in_words

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (.*)")


@pytest.fixture
def train(run: Run, workbook: Path, phi_folder: Path) -> Run:
    return lambda *flags: run("--model-name", phi_folder, "--max-steps", 3, *flags)


def logs(folder: Path) -> list[Path]:
    return sorted((folder / "logs").glob("*"))


def lines(path: Path) -> list[str]:
    """The lines of a log without the time, which each of them has."""
    found = [STAMPED.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(found)
    return [match[1] for match in found if match]


def left_over() -> list[logging.Handler]:
    """Handlers of ours; pytest adds its own."""
    ours = (ft.LogFile, logging.handlers.MemoryHandler)
    return [handler for handler in ft.LOG.handlers if isinstance(handler, ours)]


def formatted(text: str) -> str:
    record = logging.makeLogRecord({"msg": "%s", "args": (text,)})
    return ft.LogFormatter().format(record)


# -- What is in it


def test_a_training_leaves_all_that_it_said_and_measured(train: Run, folder: Path) -> None:
    code, text = train("--eval-steps", 2)
    assert code == 0
    (path,) = logs(folder)
    assert re.fullmatch(r"finetune-\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.log", path.name)
    assert f"Log        logs/{path.name} keeps all that is said here" in text
    written = lines(path)
    for setting in ft.setting_types():
        assert any(line.startswith(f"{setting} ") for line in written), setting
    for package in ft.FLOORS:
        assert any(re.match(rf"{package} +\d+\.\d", line) for line in written), package
    for label in "Data Columns Quality Warning Pairs Plan Device Before After Saved".split():
        assert any(line.startswith(label) for line in written), label
    everything = in_words(" ".join(written))
    for said in re.split(r"\n(?=[A-Z][a-z]+ {2,})", text[text.index("Data ") :]):
        if "%|" not in said:  # the progress bar
            assert in_words(said) in everything


def test_every_step_has_its_figures(train: Run, folder: Path) -> None:
    train("--eval-steps", 2)
    measured = [line for line in lines(logs(folder)[0]) if line.startswith("Measured")]
    for step in (1, 2, 3):
        (line,) = (one for one in measured if f" step {step}," in one and ", loss" in one)
        for figure in ("epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"):
            assert re.search(rf"\b{figure} \d", line), figure
    assert any("step 2, eval_loss" in line for line in measured)


def test_the_speed_leaves_measuring_and_saving_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    clock, said = [0.0], list[str]()
    monkeypatch.setattr(ft.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(ft.LOG, "info", lambda form, *words: said.append(form % words))
    state = SimpleNamespace(num_input_tokens_seen=1000, global_step=5)
    callback = ft.figures_to_log()()
    callback.on_train_begin(None, state, None)  # of a run that is taken up again
    for seconds, event in [(2, "log"), (100, "evaluate"), (4, "log")]:
        clock[0] += seconds
        state.num_input_tokens_seen += 100 if event == "log" else 0
        getattr(callback, f"on_{event}")(None, state, None, logs={"loss": 1.0})
    assert [line.rpartition(" ")[2] for line in said] == ["50", "25"]


def test_what_stops_a_training_is_in_its_log(
    train: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ft.UserError("The loss is no longer a number.\nLower it.")

    monkeypatch.setattr(ft, "step_loss", refuse)
    assert train()[0] == 2
    assert "Stopped    The loss is no longer a number." in lines(logs(folder)[0])


@pytest.mark.parametrize("place", ["load_base", "train_adapter", "save_run"])
def test_an_error_that_nobody_foresaw_is_in_the_log_with_its_traceback(
    place: str, train: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> NoReturn:
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(ft, place, broken)
    with pytest.raises(ZeroDivisionError):
        train()
    (path,) = logs(folder)
    written = lines(path)
    assert "Traceback (most recent call last):" in written
    assert written[-1] == "ZeroDivisionError: of its own"
    assert any(line.startswith("Plan") for line in written)
    assert left_over() == []


def test_a_lack_of_memory_is_foreseen(
    train: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise MemoryError("out of memory")

    monkeypatch.setattr(ft, "load_base", full)
    assert train()[0] == 2
    written = lines(logs(folder)[0])
    assert "Stopped    Memory ran out: out of memory" in written
    assert not any("nobody foresaw" in line for line in written)


# -- What never is


def test_secrets_and_control_characters_are_left_out(
    run: Run, folder: Path, phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("my_api_key", " sk-12345678 ")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    texts = ["\x1b[2J", "hf_abcdefgh", "sk-12345678", "false"]
    rows = [(f"Is {text} one?", f"No, {text}\x1b]0;x\x07 is not.") for text in texts]
    path = folder / "data.csv"
    path.write_text("\n".join(f'"{q}","{a}"' for q, a in [("question", "answer"), *rows, *PAIRS]))
    assert run("--model-name", phi_folder, "--dataset-path", path, "--max-steps", 1)[0] == 0
    written = logs(folder)[0].read_text(encoding="utf-8")
    assert "hf_abc" not in written
    assert "sk-123" not in written
    assert "[secret]" in written
    assert "false" in written.casefold()
    assert all(letter.isprintable() or letter == "\n" for letter in written)


@pytest.mark.parametrize(
    "text, kept",
    [
        ("see https://me:pw@x.org/a.csv?key=1#2 now", "see https://x.org/a.csv now"),
        ("https://me:p@s?s@x.org/a", "https://x.org/a"),
        ("HTTPError('s3://bucket/a b')", "HTTPError('s3://bucket/a b')"),
        ("http://[x?y", "http://[x"),
        ("a\x1b[31mb\u202ec\ud800", "a [31mb c "),
    ],
)
def test_a_line_is_made_harmless(text: str, kept: str) -> None:
    assert STAMPED.fullmatch(formatted(text))[1] == kept  # type: ignore[index]


def test_no_text_can_pass_for_a_line_of_its_own() -> None:
    text = formatted("one\ntwo\r\nthree\x0bfour\u2028five")
    assert [STAMPED.fullmatch(line)[1] for line in text.split("\n")] == [  # type: ignore[index]
        *("one", "two", "three", "four", "five")
    ]


def test_a_long_secret_is_not_cut_up_by_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "abcdef")
    monkeypatch.setenv("B_PASSWORD", "xabcdefy")
    assert formatted("it is xabcdefy").endswith("  it is [secret]")


# -- When there is one


def test_runs_in_one_kernel_have_a_log_each(
    train: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["one.log", "two.log"])
    monkeypatch.setattr(ft, "log_path", lambda cfg: ft.local_path(cfg.LOG_DIR) / next(names))
    for _ in range(2):
        assert train("--no-resume")[0] == 0
        assert left_over() == []
    for path in logs(folder):
        assert sum(line.startswith("Plan") for line in lines(path)) == 1


def test_a_log_can_be_continued(folder: Path) -> None:
    for word in ("first", "second"):
        with ft.collected_log():
            ft.say("Note", word)
            ft.start_log(folder / "new" / "a.log")
    written = lines(folder / "new" / "a.log")
    assert [line for line in written if line.startswith("Note")] == [
        *("Note       first", "Note       second")
    ]


@pytest.mark.parametrize(
    "argv", [["check"], ["--seed", "x"], ["--answer-column", "x"], ["--output-dir", "."]]
)
def test_what_trains_nothing_leaves_no_log(argv: list[str], train: Run, folder: Path) -> None:
    train(*argv)
    assert not (folder / "logs").exists()


def test_check_leaves_no_log(run: Run, workbook: Path, phi_folder: Path) -> None:
    assert run("check", "--model-name", phi_folder)[0] == 0
    assert not (workbook.parent / "logs").exists()


def test_nothing_is_said_twice_on_the_console(train: Run) -> None:
    _, text = train()
    assert text.count("Plan  ") == text.count("Warning  ") == 1


# -- Where it cannot be written


def test_a_full_disk_costs_one_warning(
    train: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "log_path", lambda cfg: Path("/dev/full"))
    code, text = train()
    assert code == 0
    assert in_words(text).count("No space left on device") == 1
    assert "the log /dev/full breaks off here" in in_words(text)
    assert "keeps all that is said" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("place", ["/proc/none", "dataset.xlsx"])
def test_a_log_that_cannot_be_begun_costs_one_warning(place: str, train: Run) -> None:
    code, text = train("--log-dir", place)
    assert code == 0
    assert in_words(text).count("there will be no log") == 1
    assert left_over() == []


def test_without_a_command_nothing_is_collected(capsys: pytest.CaptureFixture[str]) -> None:
    ft.say("Note", "of a caller's own")
    ft.start_log(Path("/dev/full"))
    assert capsys.readouterr().out == "Note       of a caller's own\n"
    assert left_over() == []
