"""Every setting, however it is given; what a run writes into its log, and what never stands there."""

import contextlib
import inspect
import io
import json
import math
import re
import sys
import time
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest
from conftest import PAIRS, Patch, Run, at_attention, call, in_words
from seams import ROOT, SCRIPT, Config, UserError, main, setting_defaults, settings_of
from tables import cases, csv_file

DEFAULTS = setting_defaults()
NUMBERS = [name for name, value in DEFAULTS.items() if type(value) in (int, float)]
CHOICES = dict(case.split(": ") for case in cases("choices").values())


def flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def flags(values: dict[str, Any]) -> list[str]:
    return [f"{flag(name)}={value}" for name, value in values.items()]


def wrong(*argv: object) -> dict[str, str]:
    """The settings that a refusal names, each with the line that does."""
    with pytest.raises(UserError) as refusal:
        settings_of(*argv)
    lines = [line.split(" ") for line in str(refusal.value).splitlines()]
    return {line[0]: " ".join(line) for line in lines if line[0] in DEFAULTS}


def refusal(run: Run, *argv: object) -> str:
    code, text = run(*argv)
    assert (code, "Traceback" in text) == (2, False)
    assert all(len(line) <= 80 or "/a-long-path" in line for line in text.splitlines())
    return in_words(text)


# -- Help


def test_every_setting_is_a_flag_with_value_and_choices(capsys: Any, monkeypatch: Patch) -> None:
    assert 0 in (main(["--help-all"]), main(["train", "--help"]))
    text = capsys.readouterr().out.partition("\nExit codes")[0]
    assert {name for name in vars(Config) if not name.startswith("_")} == set(DEFAULTS)
    parts = re.split(r"^  (--[\w-]+)", text, flags=re.MULTILINE)
    about = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert len(about) == len(parts) // 2
    assert {*about} - {"--config", "--help-all", "--version"} == {*map(flag, DEFAULTS)}
    for name, value in DEFAULTS.items():
        text = about[flag(name)]
        assert len(re.findall(r"[a-z]{2,}", text)) > 3, name
        shown = ",".join(value) if isinstance(value, list) else str(value)
        assert "".join(shown.split()) in "".join(text.split()), name
        assert {*CHOICES.get(name, "").split()} <= {*re.findall(r"[\w-]+", text)}, name
    monkeypatch.setattr(inspect, "getsource", lambda _: Path("cell").read_text())  # OSError: in a notebook
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag(name) in text for name in DEFAULTS)


# -- Where a value comes from


@pytest.mark.parametrize("case", cases("sources_of_settings").values())
def test_flags_win_over_the_file_and_the_file_over_config(case: str, folder: Path, monkeypatch: Patch) -> None:
    _, edited, file, argv, wins = ("" if part == "-" else part for part in case.split(" | "))
    for name, value in json.loads(edited).items():
        monkeypatch.setattr(Config, name, value)
    (folder / "my.yaml").write_text("\ufeff" + file.replace(r"\n", "\n"), encoding="utf-8")  # as Windows writes it
    cfg = settings_of(*argv.split(), *(["--config", "my.yaml"] if file else []))
    assert {name: getattr(cfg, name) for name in json.loads(wins)} == json.loads(wins)


def test_every_value_survives_being_written_as_text_and_being_left_alone(folder: Path, monkeypatch: Patch) -> None:
    switches = [name for name, value in DEFAULTS.items() if type(value) is bool]
    texts = {k: v for k, v in DEFAULTS.items() if v is not None and k not in switches}
    texts["LORA_TARGETS"] = ",".join(texts["LORA_TARGETS"])
    switched = [flag(f"{'' if DEFAULTS[name] else 'NO_'}{name}") for name in switches]
    (folder / "my.yaml").write_text("# nothing yet")
    for cfg in (settings_of(*flags(texts), *switched), settings_of(), settings_of("--config", "my.yaml")):
        for name, value in DEFAULTS.items():
            assert (getattr(cfg, name), type(getattr(cfg, name))) == (value, type(value))
    monkeypatch.setattr(Config, "OUTPUT_DIR", Path("m"))
    monkeypatch.setattr(Config, "LORA_TARGETS", ("fc1",))
    assert (settings_of().OUTPUT_DIR, settings_of().LORA_TARGETS) == ("m", ["fc1"])


# -- Types, ranges and choices


@pytest.mark.parametrize("given", cases("settings").values())
def test_a_setting_gets_its_own_type(given: str, folder: Path) -> None:
    lines = [line.split(" -> ") for line in given.split(" ; ")]
    (folder / "my.yaml").write_text("\n".join(written for written, _ in lines), encoding="utf-8")
    cfg = settings_of("--config", "my.yaml")
    for written, meant in lines:
        found, value = getattr(cfg, written.partition(":")[0]), literal_eval(meant)
        assert (found, type(found)) == (value, type(value)), written


@pytest.mark.parametrize("given", cases("settings_wrong").values())
def test_all_that_is_wrong_is_named_at_once(given: str, folder: Path, run: Run) -> None:
    lines = [line.partition(" !!") for line in given.split(" ; ")]
    (folder / "my.yaml").write_text("\n".join(written for written, *_ in lines))
    text = refusal(run, "--config", "my.yaml", "--num-epochs", 0, "--seed", -1)
    for written, _, pattern in [*lines, ("NUM_EPOCHS", "", "1.*10,000"), ("SEED", "", " 0")]:
        assert re.search(rf"\b{written.partition(':')[0]}\b.*?({pattern.strip()})", text), written


def test_both_ends_of_a_range_belong_to_it_and_nothing_beyond() -> None:
    said = wrong("chat", *flags(dict.fromkeys(NUMBERS, -(10**12))))
    assert {*said} == {*NUMBERS}
    found = {name: re.findall(r"\d[\d,.e-]*(?<=\d)", said[name])[-2:] for name in NUMBERS}
    for end, step in enumerate((-1, 1)):
        edge = {name: type(DEFAULTS[name])(found[name][end].replace(",", "")) for name in NUMBERS}
        settings_of("chat", *flags(edge))
        beyond = {name: value + step for name, value in edge.items() if type(value) is int}
        beyond |= {k: math.nextafter(v, step * math.inf) for k, v in edge.items() if type(v) is float}
        assert {*wrong("chat", *flags(beyond))} == {*NUMBERS}
    floats = {name: "nan" for name in NUMBERS if type(DEFAULTS[name]) is float}
    assert {*wrong("chat", *flags(floats))} == {*floats}


def test_every_choice_is_accepted_and_anything_else_gets_the_list() -> None:
    lists = {name: text.split() for name, text in CHOICES.items()}
    for turn in range(max(map(len, lists.values()))):
        chosen = {name: choices[turn % len(choices)] for name, choices in lists.items()}
        cfg = settings_of("export", *flags(chosen))
        assert {name: getattr(cfg, name) for name in CHOICES} == chosen
    said = wrong("export", *flags(dict.fromkeys(CHOICES, "zigzag")))
    assert all({*lists[name]} <= {*re.findall(r"[\w-]+", said[name])} for name in CHOICES)


# -- Refusals


@pytest.mark.parametrize("case", cases("command_lines").values())
def test_what_makes_no_sense_is_refused(case: str, folder: Path, run: Run) -> None:
    given, pattern = case.replace(r"\t", "\t").split(" | ")
    (folder / "my.yaml").write_text(given, "utf-16" if "UTF-16" in given else "utf-8")
    argv = given.split() if re.match("--|[a-z ]+(--|$)", given) else ["--config", "my.yaml"]
    assert re.search(pattern, refusal(run, *argv))


def test_a_fault_in_config_itself_is_refused(run: Run, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Config, "BATCH_SIZE", "four")
    for name in ("BATCHSIZE", "batch_size"):
        monkeypatch.setattr(Config, name, 2, raising=False)
        text = refusal(run)
        assert re.search(rf"{name}[^.]*\. [^.]*\bBATCH_SIZE\b", text)
        assert text.count("four") == 1  # it is no example of itself


def test_a_terminals_arguments_are_read_and_a_kernels_are_not(folder: Path, monkeypatch: Patch, capsys: Any) -> None:
    for name in ("colab_kernel_launcher.py", "ipykernel_launcher.py", SCRIPT.name):
        monkeypatch.setattr(sys, "argv", [f"/x/{name}", "-f", "/x/kernel.json"])
        assert main() == 2
        assert ("dataset.xlsx" in capsys.readouterr().err) is (name != SCRIPT.name)


# -- The log

SECRETS = {
    "HF_TOKEN": "hf_abcdefgh",
    "my_api_key": " sk-12345678 ",
    "A_KEY": "abcdef",
    "B_PASSWORD": "xabcdefy",
    "SHOP_SECRET": "qwertzuiop",
}
NO_SECRETS = {"TOKENIZERS_PARALLELISM": "false", "KEYBOARD_LAYOUT": "english"}
LOGGED = dict(json.loads(f'"{text}"').split(" -> ") for text in cases("logged"))


@pytest.fixture(scope="module")
def logged(small_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """What a training printed and logged, where measuring and saving are slow and names are nasty."""
    import torch

    home, printed, save = tmp_path_factory.mktemp("logged"), io.StringIO(), torch.save

    def measured(_: int, query: Any) -> None:
        time.sleep(0.8 if not torch.is_grad_enabled() and query.shape[-2] > 30 else 0)

    header = "\n".join(LOGGED)
    (home / "data.csv").write_bytes(csv_file([(header, "answer"), *PAIRS]))
    flags = ["--max-steps", 4, "--eval-steps", 2, "--save-steps", 2, "--eval-answers", 1]
    flags += ["--max-tokens", 1, "--dataset-path", "data.csv", "--question-column", header]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name, value in (SECRETS | NO_SECRETS).items():
            patch.setenv(name, value)
        patch.setattr(torch, "save", lambda *a, **b: (time.sleep(0.8), save(*a, **b)))
        at_attention(patch, measured)
        assert call(home, "--model-name", small_phi, *flags, "--log-dir", "logs\udcff") == 0
    (path,) = (home / "logs\udcff").iterdir()
    assert re.fullmatch(r"finetune-[0-9a-f]{12}\.log", path.name)
    text = path.read_text(encoding="utf-8")
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    found = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (.*)", line) for line in text.splitlines()]
    assert all(found)  # each line with its time
    return printed.getvalue(), [match[1] for match in found if match]


def test_a_training_logs_its_settings_its_packages_and_all_that_it_said(logged: Any) -> None:
    printed, written = logged
    for setting in DEFAULTS:
        assert any(line.startswith(f"{setting} ") for line in written), setting
    needed = (ROOT / "requirements-finetune.txt").read_text()
    for package in ["python", *re.findall(r"^[\w-]+", needed, re.MULTILINE)]:
        assert any(re.match(rf"{package} +\d+\.\d", line) for line in written), package
    everything = in_words(" ".join(written))
    for said in re.split(r"\n(?=\S)", printed):
        if not re.search(r"https?://|secret|hf_|xabc|logs", said):
            assert in_words(said) in everything
    assert printed.count("Plan  ") == 1  # nothing is said twice


def test_every_step_has_its_figures(logged: Any) -> None:
    measured = [line for line in logged[1] if re.search(r"\bstep \d", line)]
    for step in (1, 2, 3, 4):
        (line,) = (one for one in measured if f" step {step}," in one and ", loss" in one)
        for figure in ("epoch", "loss", "learning_rate", "grad_norm"):
            assert re.search(rf"\b{figure} \d", line), figure
    assert sum("eval_loss" in line for line in measured) == 2


@pytest.mark.parametrize("text", LOGGED)
def test_no_secret_and_nothing_that_steers_a_terminal_is_logged(text: str, logged: Any) -> None:
    for part in LOGGED[text].split("\n"):
        assert any(line.endswith(part) for line in logged[1])
    assert not re.search("hf_abc|sk-123|abcdef", " ".join(logged[1]))
