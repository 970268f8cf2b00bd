"""Section 1: every setting, however it was given, and every fault in one message."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import in_words
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
SETTINGS = list(ft.setting_types())
NUMBERS = sorted(ft.SMALLEST_AND_LARGEST)


def read(*argv: object) -> ft.Config:
    return ft.read_command_line([str(part) for part in argv])[1]


def problems(**changes: Any) -> list[str]:
    return ft.config_problems(ft.Config(**changes))


def unspaced(text: str) -> str:
    return "".join(text.split())


@pytest.fixture
def help_text(run: Run) -> str:
    code, text = run("--help")
    assert code == 0
    return text


# -- Config and the command line


def test_config_and_the_flags_are_one_to_one(help_text: str) -> None:
    constants = {name for name in vars(ft.Config) if not name.startswith("_")}
    flags = re.findall(r"^  (--[\w-]+)", help_text, re.MULTILINE)
    assert constants == set(SETTINGS)
    assert sorted(flags) == sorted(["--config", *map(ft.flag, SETTINGS)])


def test_every_setting_has_a_comment_under_a_heading() -> None:
    notes = ft.setting_notes()
    assert set(notes) == set(SETTINGS)
    assert all(group and comment for group, comment in notes.values())


def test_help_shows_the_comment_and_the_value_of_every_setting(help_text: str) -> None:
    shown = unspaced(help_text)
    for name, (_, comment) in ft.setting_notes().items():
        assert unspaced(comment) in shown
        assert unspaced(f"[{ft.as_text(getattr(ft.Config, name)) or 'empty'}]") in shown


@pytest.mark.parametrize("name", ft.CHOICES)
def test_help_names_every_choice(name: str, help_text: str) -> None:
    about = help_text.split(f"  {ft.flag(name)} ")[1].split("\n  --", maxsplit=1)[0]
    assert set(ft.CHOICES[name]) <= set(re.findall(r"[\w-]+", about))


def test_help_works_where_the_source_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def no_source(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", no_source)
    code, text = run("--help")
    assert code == 0
    assert all(ft.flag(name) in text for name in SETTINGS)


def test_without_flags_every_setting_is_as_in_config() -> None:
    assert ft.setting_values(read()) == ft.setting_values(ft.Config())


def test_a_value_edited_in_config_counts_and_a_flag_counts_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ft.Config, "BATCH_SIZE", 2)
    assert read().BATCH_SIZE == 2
    assert read("--batch-size", 8).BATCH_SIZE == 8


@pytest.mark.parametrize("name", ["BATCHSIZE", "batch_size"])
def test_a_misspelt_name_in_config_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft.Config, name, 2, raising=False)
    with pytest.raises(ft.UserError, match=f"{name} is not a setting. Did you mean BATCH_SIZE"):
        read()


def test_the_demo_has_settings_of_its_own_and_a_flag_counts_more() -> None:
    command, cfg = ft.read_command_line(["demo", "--max-steps", "7"])
    meant = ft.Config(**ft.DEMO_SETTINGS | {"MAX_STEPS": 7})
    assert command == "demo"
    assert ft.setting_values(cfg) == ft.setting_values(meant) != ft.setting_values(ft.Config())


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--learning", "--learning-rate"),
        ("--batch", "--batch-size"),
        ("--batch_size", "--batch-size"),
        ("--epochs", "--num-epochs"),
        ("--no-keep", "--keep-best"),
    ],
)
def test_a_flag_that_is_not_whole_is_refused_with_the_one_meant(flag: str, meant: str) -> None:
    with pytest.raises(ft.UserError, match=re.escape(f"Did you mean {meant}?")):
        read(flag, 2)


@pytest.mark.parametrize("argv", [["--seed"], ["--no-seed"], ["--seed", "1", "2"], ["--"]])
def test_a_command_line_that_makes_no_sense_is_refused(argv: list[str]) -> None:
    with pytest.raises(ft.UserError, match="--help lists"):
        read(*argv)


# -- Types, ranges and choices


@pytest.mark.parametrize("name", SETTINGS)
def test_every_value_survives_being_written_as_text(name: str) -> None:
    value = getattr(ft.Config, name)
    parsed = ft.parse_setting(name, ft.as_text(getattr(ft.Config, name)))
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "name, written, meant",
    [
        ("LEARNING_RATE", "2e-4", 2e-4),  # YAML reads 2e-4 as a text
        ("LEARNING_RATE", 1, 1.0),
        ("BATCH_SIZE", " 8 ", 8),
        ("SEED", 2**32 - 1, 2**32 - 1),
        ("KEEP_BEST", "no", False),
        ("KEEP_BEST", "On", True),
        ("KEEP_BEST", False, False),
        ("LOAD_IN_4BIT", None, None),
        ("LOAD_IN_4BIT", "None", None),
        ("LOAD_IN_4BIT", "auto", None),
        ("LOAD_IN_4BIT", "", None),
        ("LOAD_IN_4BIT", "TRUE", True),
        ("LORA_TARGETS", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("LORA_TARGETS", "q_proj v_proj", ["q_proj", "v_proj"]),
        ("LORA_TARGETS", ("q_proj",), ["q_proj"]),
        ("QUESTION_COLUMN", 2024, "2024"),
        ("QUESTION_COLUMN", None, ""),
        ("OUTPUT_DIR", Path("model"), "model"),
    ],
)
def test_a_setting_gets_its_own_type(name: str, written: object, meant: object) -> None:
    parsed = ft.parse_setting(name, written)
    assert parsed == meant
    assert type(parsed) is type(meant)


@pytest.mark.parametrize(
    "name, written, wanted",
    [
        ("BATCH_SIZE", "four", "a whole number"),
        ("BATCH_SIZE", 2.5, "a whole number"),
        ("BATCH_SIZE", True, "a whole number"),
        ("BATCH_SIZE", "", "a whole number"),
        ("BATCH_SIZE", None, "a whole number"),
        ("LEARNING_RATE", "2e-4x", "a number"),
        ("LEARNING_RATE", [2e-4], "a number"),
        ("KEEP_BEST", "maybe", "True or False"),
        ("KEEP_BEST", None, "True or False"),
        ("LOAD_IN_4BIT", "4", "True, False or None"),
        ("LORA_TARGETS", 5, "a list of names"),
        ("LORA_TARGETS", None, "a list of names"),
    ],
)
def test_a_value_of_another_type_is_refused_in_words(
    name: str, written: object, wanted: str
) -> None:
    (problem,) = problems(**{name: written})
    assert name in problem
    assert wanted in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"LORA_TARGETS": [["q_proj"]]},
        {"LORA_TARGETS": [None]},
        {"LORA_TARGETS": [""]},
        {"OUTPUT_DIR": ["model"]},
    ],
)
def test_a_list_of_anything_but_names_is_refused(changes: dict[str, Any]) -> None:
    assert len(problems(**changes)) == 1


@pytest.mark.parametrize("name", ["MODEL_NAME", "DATASET_PATH", "OUTPUT_DIR", "CHECKPOINT_DIR"])
def test_an_empty_name_is_refused(name: str) -> None:
    assert [name in problem for problem in problems(**{name: ""})] == [True]


def test_the_example_beside_a_wrong_value_is_a_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft.Config, "BATCH_SIZE", "four")
    with pytest.raises(ft.UserError) as refusal:
        read()
    assert "such as" in str(refusal.value)
    assert "such as four" not in str(refusal.value)


def beyond(name: str, sign: int) -> float:
    edge = ft.SMALLEST_AND_LARGEST[name][sign > 0]
    return edge + sign if is_whole(name) else math.nextafter(edge, sign * math.inf)


def is_whole(name: str) -> bool:
    return ft.setting_types()[name] is int


@pytest.mark.parametrize("name", NUMBERS)
def test_both_ends_of_a_range_belong_to_it(name: str) -> None:
    for edge in ft.SMALLEST_AND_LARGEST[name]:
        assert problems(**{name: edge}) == []
    for sign in (-1, 1):
        (problem,) = problems(**{name: beyond(name, sign)})
        assert problem.startswith(f"{name} is ")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_inside_the_range_nothing_is_said_and_outside_one_thing(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NUMBERS))
    low, high = ft.SMALLEST_AND_LARGEST[name]
    value = data.draw(st.integers() if is_whole(name) else st.floats())
    inside = data.draw(st.integers(int(low), int(high)) if is_whole(name) else st.floats(low, high))
    assert problems(**{name: inside}) == []
    assert len(problems(**{name: value})) == (not low <= value <= high)


def test_every_number_has_a_range() -> None:
    assert {name for name, kind in ft.setting_types().items() if kind in (int, float)} == {*NUMBERS}


@pytest.mark.parametrize("name", ft.CHOICES)
def test_every_choice_is_accepted_and_anything_else_gets_the_list(name: str) -> None:
    assert [problems(**{name: choice}) for choice in ft.CHOICES[name]] == [[]] * len(
        ft.CHOICES[name]
    )
    (problem,) = problems(**{name: "zigzag"})
    assert all(choice in problem for choice in (name, *ft.CHOICES[name]))


@pytest.mark.parametrize(
    "question, answer",
    [
        ("text", "text"),
        ("text", " Text"),
    ],
)
def test_one_column_for_both_is_refused(question: str, answer: str) -> None:
    (problem,) = problems(QUESTION_COLUMN=question, ANSWER_COLUMN=answer)
    assert "the same column" in problem


def test_all_faults_are_named_at_once(folder: Path, run: Run) -> None:
    (folder / "my.yaml").write_text(
        "BATCH_SIZE: 0\nLEARNING_RATE: fast\nLR_SCHEDULER: zigzag\nLORA_TARGETS: []\nLORA_RANK: 8\n"
    )
    code, text = run("--config", "my.yaml", "--num-epochs", "0", "--seed", "-1")
    assert code == 2
    wrong = "BATCH_SIZE LEARNING_RATE LR_SCHEDULER LORA_TARGETS LORA_RANK NUM_EPOCHS SEED"
    for name in wrong.split():
        assert re.search(rf"\b{name} is\b", text)


def test_messages_fit_80_columns_and_keep_what_is_to_be_copied_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = "/a-long-path" * 10
    ft.say("Label", f"{'word ' * 40}\n{path}\n--some-flag " + "--another-flag " * 20)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("Label      word")
    assert {line[:12].rstrip(" w-/") for line in rest} == {""}
    assert f"           {path}" in rest
    assert max(len(line) for line in [first, *rest] if path not in line) <= 80
    assert not any(line.endswith("-") for line in rest)


# -- The settings file


def read_yaml(folder: Path, content: str, *argv: object) -> ft.Config:
    (folder / "my.yaml").write_text(content, encoding="utf-8")
    return read("--config", "my.yaml", *argv)


@pytest.mark.parametrize("name", ["BATCH_SIZE", "batch_size", "batch-size", "Batch-Size"])
def test_a_settings_file_may_spell_names_as_config_or_as_flags(name: str, folder: Path) -> None:
    assert read_yaml(folder, f"{name}: 2").BATCH_SIZE == 2


def test_a_settings_file_holds_settings_of_every_type(folder: Path) -> None:
    cfg = read_yaml(
        folder,
        "\ufeff# written on Windows\n"
        "LEARNING_RATE: 1e-4\nSEED: 7\nKEEP_BEST: no\nLOAD_IN_4BIT:\nREPORT_TO: none\n"
        "LORA_TARGETS: [q_proj, v_proj]\nQUESTION_COLUMN: Câu hỏi\n",
    )
    assert (cfg.LEARNING_RATE, cfg.SEED, cfg.KEEP_BEST, cfg.LOAD_IN_4BIT, cfg.REPORT_TO) == (
        1e-4,
        7,
        False,
        None,
        "none",
    )
    assert (cfg.LORA_TARGETS, cfg.QUESTION_COLUMN) == (["q_proj", "v_proj"], "Câu hỏi")


def test_flags_count_more_than_the_settings_file(folder: Path) -> None:
    cfg = read_yaml(folder, "SEED: 7\nKEEP_BEST: true\nBATCH_SIZE: 8", "--seed=9", "--no-keep-best")
    assert (cfg.SEED, cfg.KEEP_BEST, cfg.BATCH_SIZE) == (9, False, 8)


def test_a_settings_file_counts_more_than_the_demo(folder: Path) -> None:
    (folder / "my.yaml").write_text("MAX_STEPS: 3")
    assert ft.read_command_line(["demo", "--config", "my.yaml"])[1].MAX_STEPS == 3


@pytest.mark.parametrize("content", ["", "# nothing yet\n"])
def test_an_empty_settings_file_changes_nothing(content: str, folder: Path) -> None:
    assert ft.setting_values(read_yaml(folder, content)) == ft.setting_values(ft.Config())


@pytest.mark.parametrize(
    "content, told",
    [
        ("LEARNING_RATE: 1e-4: 2", "not valid YAML"),
        ("\tSEED: 1", "not valid YAML"),
        ("- SEED", "LEARNING_RATE: 1e-4"),
        ("SEED 7", "LEARNING_RATE: 1e-4"),
        ("LEARNIG_RATE: 1e-4", "LEARNIG_RATE is not a setting. Did you mean LEARNING_RATE?"),
        ("batchsize: 2", "BATCHSIZE is not a setting. Did you mean BATCH_SIZE?"),
        ("EPOCHS: 2", "Did you mean NUM_EPOCHS?"),
        ("zzz: 2", "ZZZ is not a setting."),
        ("学习率: 2", "学习率 is not a setting"),
        ("OUTPUT_DIR: 2024-02-30", "my.yaml"),
    ],
)
def test_a_faulty_settings_file_is_refused(content: str, told: str, folder: Path) -> None:
    with pytest.raises(ft.UserError) as refusal:
        read_yaml(folder, content)
    assert told in in_words(str(refusal.value))


def test_a_settings_file_that_is_missing_a_folder_or_no_text_is_refused(folder: Path) -> None:
    (folder / "utf16.yaml").write_bytes("SEED: 7".encode("utf-16"))
    for name in ("missing.yaml", ".", "utf16.yaml"):
        with pytest.raises(ft.UserError, match="Cannot read the settings file") as refusal:
            read("--config", name)
        assert name in str(refusal.value)
