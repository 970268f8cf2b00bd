"""Section 9: what lands on disk is whole, says what was measured, and replaces nothing by accident."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openpyxl
import pytest
from conftest import PAIRS, ROOT, in_words, write_workbook
from hypothesis import given
from hypothesis import strategies as st

import finetune_colab as ft


def history(losses: list[float], every: int = 1) -> list[dict[str, float]]:
    return [
        {"step": (i + 1) * every, "epoch": (i + 1) / 4, "loss": loss, "learning_rate": 1e-4}
        for i, loss in enumerate(losses)
    ]


@given(losses=st.lists(st.floats(0, 10), min_size=1, max_size=20), every=st.integers(1, 5))
def test_the_training_loss_is_the_mean_over_all_steps(losses: list[float], every: int) -> None:
    assert ft.mean_train_loss(history(losses, every)) == pytest.approx(sum(losses) / len(losses))


def test_a_loss_logged_for_more_steps_weighs_more() -> None:
    uneven = [{"step": 1, "loss": 4.0}, {"step": 4, "loss": 1.0}, {"step": 4, "eval_loss": 9.0}]
    assert ft.mean_train_loss(uneven) == (4.0 + 3 * 1.0) / 4


def test_epochs_have_their_own_means() -> None:
    entries = history([4.0, 2.0, 2.0, 0.0, 1.0])
    entries.append({"step": 4, "epoch": 1.0, "eval_loss": 7.0})
    assert ft.epoch_losses(entries) == [(1, 2.0, 7.0), (2, 1.0, None)]


def test_a_logged_loss_counts_as_often_as_it_has_steps() -> None:
    entries = [{"step": 3, "epoch": 0.75, "loss": 4.0}, {"step": 4, "epoch": 1.0, "loss": 0.0}]
    assert ft.epoch_losses(entries) == [(1, 3.0, None)]
    assert ft.mean_train_loss(entries) == 3.0


@pytest.mark.parametrize("steps", [1, 2, 100])
@pytest.mark.parametrize("validated", [True, False])
def test_pictures_say_what_they_show(steps: int, validated: bool) -> None:
    entries = history([3 / (i + 1) for i in range(steps)])
    if validated:
        entries.append({"step": steps, "epoch": entries[-1]["epoch"], "eval_loss": 1.5})
    trained: Any = SimpleNamespace(
        history=entries,
        base_loss=3.0 if validated else None,
        best_step=steps if validated else None,
    )
    for draw in (ft.draw_training_curves, ft.draw_loss_comparison):
        figure = draw(trained)
        top = figure.axes[0]
        assert top.get_title()
        assert all(axes.get_ylabel() for axes in figure.axes)
        assert figure.axes[-1].get_xlabel() in ("step", "epoch")
        shown = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
        assert "training" in shown
        assert ("validation (held-out questions)" in shown) == validated
        assert ("validation, before training" in shown) == validated
        assert figure.get_size_inches()[0] <= 8  # a notebook cell


@pytest.fixture
def finished(phi_folder: Path, workbook: Path, run: Any) -> Path:
    """One real run of two epochs."""
    code, _ = run("--model-name", phi_folder, "--num-epochs", 2, "--learning-rate", 1e-2)
    assert code == 0
    return workbook.parent / "model"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_everything_promised_is_there(finished: Path, phi_folder: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    visuals = ("training_curves.png", "loss_comparison.png", "training_config.json")
    visuals += ("training_metrics.json", "training_metrics.csv")
    assert names >= {
        *(f"training_visuals/{name}" for name in visuals),
        *("adapter_model.safetensors", "adapter_config.json", "README.md", "run.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    with zipfile.ZipFile(finished.parent / "fine_tuned_model.zip") as archive:
        assert set(archive.namelist()) == names - {ft.BASE_PLACE}
        assert archive.testzip() is None
        assert (
            archive.read("adapter_model.safetensors")
            == (finished / "adapter_model.safetensors").read_bytes()
        )
    assert not [
        name for name in names if re.search(r"\.(bin|pt|pkl|pth)$|optimizer|checkpoint", name)
    ]
    assert not list(finished.parent.glob("*.partial"))


def test_the_figures_fit_each_other(finished: Path) -> None:
    metrics = read(finished / "training_visuals" / "training_metrics.json")
    assert metrics["train_pairs"] + metrics["eval_pairs"] == len(PAIRS)
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    assert metrics["epochs"] == 2
    assert metrics["steps"] == 2 * math.ceil(metrics["train_pairs"] / 16)
    assert metrics["trainable_percent"] == pytest.approx(
        100 * metrics["trainable_parameters"] / (metrics["trainable_parameters"] + 1_938_112),
        rel=0.1,
    )
    assert 0 < metrics["train_seconds"] < 60
    assert metrics["train_cpu_seconds"] > 0
    assert metrics["tokens_per_second"] == pytest.approx(
        metrics["tokens_trained"] / metrics["train_seconds"], rel=0.02
    )
    with (finished / "training_visuals" / "training_metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(losses) == metrics["steps"]
    assert metrics["train_loss"] == pytest.approx(sum(losses) / len(losses))
    measured = [float(row["eval_loss"]) for row in rows if row["eval_loss"]]
    assert min(measured) == metrics["eval_loss"]


def test_the_record_holds_what_later_commands_need(finished: Path, phi_folder: Path) -> None:
    record = read(finished / "run.json")
    assert record["settings"]["NUM_EPOCHS"] == 2
    assert record["settings"].keys() == ft.setting_types().keys()
    assert record["prompt_format"] == ft.PROMPT_FORMAT
    assert record["base_model"] == "./tiny-phi"
    assert record["dataset"]["question_column"] == "question"
    assert record["results"] == read(finished / "training_visuals" / "training_metrics.json")
    assert read(finished / "training_visuals" / "training_config.json")["LEARNING_RATE"] == 1e-2
    assert read(finished / "adapter_config.json")["base_model_name_or_path"] == "./tiny-phi"


RELOAD = """
import sys, json, pathlib, torch
import finetune_colab as ft
model = ft.load_tuned(pathlib.Path("model")).model
ids = torch.tensor([json.loads(sys.argv[1])])
with torch.no_grad():
    tuned = model(ids).logits
    with model.disable_adapter():
        assert not torch.equal(tuned, model(ids).logits)
torch.save(tuned, "reloaded.pt")
"""


def test_a_fresh_process_gets_the_same_model_back(
    phi_folder: Path, workbook: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    kept: dict[str, Any] = {}
    real = ft.train_adapter

    def train_and_keep(cfg: ft.Config, model: Any, *rest: Any) -> Any:
        kept["model"] = model
        return real(cfg, model, *rest)

    monkeypatch.setattr(ft, "train_adapter", train_and_keep)
    flags = ("--max-steps", 4, "--learning-rate", 1e-2, "--no-keep-best")
    assert run("--model-name", phi_folder, *flags)[0] == 0
    ids = [5, 6, 7, 8, 300, 301]
    with torch.no_grad():
        expected = kept["model"].eval()(torch.tensor([ids])).logits
    command = [sys.executable, "-c", RELOAD, json.dumps(ids)]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    assert torch.equal(torch.load("reloaded.pt"), expected)


def test_the_snippet_of_the_card_runs(finished: Path, phi_folder: Path) -> None:
    card = (finished / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    (finished / phi_folder.name).symlink_to(phi_folder)  # the card names the folder, not its place
    done = subprocess.run(
        [sys.executable, "-c", snippet[1].replace("max_new_tokens=200", "max_new_tokens=5")],
        check=False,
        cwd=finished,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Instruct: {question}\nOutput:" in card
    assert str(phi_folder.parent) not in card


def test_the_card_of_a_hub_model_names_it_with_its_commit(tuned_run: Path) -> None:
    cfg = ft.Config()
    data: Any = SimpleNamespace(train_pairs=[1] * 9, held_out_pairs=[1])
    data.tokenizer, data.form = None, ft.PROMPT_FORMAT
    trained: Any = SimpleNamespace(
        steps=3, epochs=1.0, base_loss=2.0, final_loss=1.5, history=history([2.0])
    )
    trained.tally = ft.Tally(trainable=10)
    trained.adapter = tuned_run / "model" / ft.ADAPTER
    card = ft.model_card(cfg, data, trained)
    front = card.split("---")[1]
    assert "base_model: microsoft/phi-2\n" in front
    assert "library_name: peft" in front
    assert 'revision="ef382358ec9e382308935a992d908de099b64c23"' in card
    assert "2.000 → 1.500" in card


def test_an_earlier_model_is_kept_when_a_run_fails(folder: Path) -> None:
    final = folder / "model"
    final.mkdir()
    (final / "run.json").write_text("good")
    with pytest.raises(RuntimeError), ft.staged_folder(final) as staged:
        (staged / "run.json").write_text("half")
        raise RuntimeError
    assert (final / "run.json").read_text() == "good"
    with ft.staged_folder(final) as staged:
        assert list(staged.iterdir()) == []  # of the failed run nothing gets into the next


def test_pictures_that_fail_cost_nobody_the_adapter(
    phi_folder: Path, workbook: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_font(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(ft, "draw_training_curves", no_font)
    code, printed = run("--model-name", phi_folder, "--max-steps", 1)
    assert code == 0
    assert "not all pictures and tables could be made" in in_words(printed)
    with zipfile.ZipFile("fine_tuned_model.zip") as archive:
        assert "adapter_model.safetensors" in archive.namelist()


def test_each_output_folder_has_a_zip_of_its_own(folder: Path) -> None:
    for name in ("model", "other"):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(name)
        ft.write_zip(folder / name)
    assert sorted(path.name for path in folder.glob("*.zip")) == [
        "fine_tuned_model.zip",
        "fine_tuned_other.zip",
    ]


def test_a_folder_that_is_a_link_stays_one(phi_folder: Path, workbook: Path, run: Any) -> None:
    drive = workbook.parent / "drive"
    drive.mkdir()
    Path("model").symlink_to(drive, target_is_directory=True)
    assert run("--model-name", phi_folder, "--max-steps", 1)[0] == 0
    assert Path("model").is_symlink()
    assert (drive / "adapter_model.safetensors").is_file()


def test_the_model_before_is_still_there_after_a_new_one(folder: Path) -> None:
    final = folder / "model"
    for content in ("first", "second", "third"):
        with ft.staged_folder(final, folder / "model.previous") as staged:
            (staged / "run.json").write_text(content)
    assert (final / "run.json").read_text() == "third"
    assert (folder / "model.previous" / "run.json").read_text() == "second"


def test_links_are_not_followed_into_the_zip(folder: Path) -> None:
    (folder / "secret.txt").write_text("secret")
    (folder / "model").mkdir()
    (folder / "model" / "link").symlink_to(folder / "secret.txt")
    (folder / "model" / "run.json").write_text("{}")
    with zipfile.ZipFile(ft.write_zip(folder / "model")) as archive:
        assert archive.namelist() == ["run.json"]


def test_without_held_out_pairs_nothing_is_invented(
    phi_folder: Path, folder: Path, run: Any
) -> None:
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *PAIRS[:4]])
    code, printed = run("--model-name", phi_folder, "--num-epochs", 1)
    assert code == 0
    metrics = read(folder / "model" / "training_visuals" / "training_metrics.json")
    assert metrics["eval_loss"] is None
    assert metrics["base_eval_loss"] is None
    assert "none held out" in printed
    assert "not measured" in (folder / "model" / "README.md").read_text()


# -- Answers before and after


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyboardInterrupt()])
def test_questions_that_fail_cost_nobody_the_adapter(
    phi_folder: Path,
    workbook: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    seen = []

    def ask_both(*_: Any) -> None:
        with zipfile.ZipFile("fine_tuned_model.zip") as archive:  # it is saved before
            seen.append("adapter_model.safetensors" in archive.namelist())
        raise error

    command = ("--model-name", phi_folder, "--max-steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ft, "ask_both", ask_both)
        code, printed = run(*command)
    assert code == 0
    assert seen == [True]
    assert "there will be no answers.xlsx" in in_words(printed)
    assert not Path("model/answers.xlsx").exists()
    assert run(*command)[0] == 0  # the same command asks what was not asked
    with zipfile.ZipFile("fine_tuned_model.zip") as archive:
        assert "answers.xlsx" in archive.namelist()
    assert not Path("model.previous").exists()


def test_a_run_is_asked_once(
    phi_folder: Path, workbook: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--model-name", phi_folder, "--max-steps", 1)
    code, printed = run(*command)
    assert code == 0
    assert "wanted" in printed
    sheet = openpyxl.load_workbook("model/answers.xlsx")["Answers"]
    first = [[cell.value for cell in row] for row in sheet]
    monkeypatch.setattr(ft, "load_base", None)  # nothing is loaded any more
    code, again = run(*command)
    assert code == 0
    assert "wanted" in again
    sheet = openpyxl.load_workbook("model/answers.xlsx")["Answers"]
    assert [[cell.value for cell in row] for row in sheet] == first


def test_nothing_is_asked_when_nobody_wants_it(phi_folder: Path, workbook: Path, run: Any) -> None:
    code, printed = run("--model-name", phi_folder, "--max-steps", 1, "--eval-answers", 0)
    assert code == 0
    assert "Asking" not in printed
    assert not Path("model/answers.xlsx").exists()


def test_what_somebody_wrote_into_the_answers_is_kept(
    phi_folder: Path, workbook: Path, run: Any
) -> None:
    command = ("--model-name", phi_folder, "--max-steps", 1)
    assert run(*command)[0] == 0
    book = openpyxl.load_workbook("model/answers.xlsx")
    book["Answers"]["K2"] = "my grade: B"
    book.properties.lastModifiedBy = "Ann"  # as every program for workbooks writes it
    book.save("model/answers.xlsx")
    assert run(*command)[0] == 0
    kept = openpyxl.load_workbook("model.previous/answers.xlsx")["Answers"]
    assert kept["K2"].value == "my grade: B"
    assert Path("model/answers.xlsx").exists()


def test_rows_of_the_workbook_are_as_high_as_their_text(tmp_path: Path) -> None:
    long = ft.Asked("2", "Why?", "So.", "word " * 60, "雪" * 100)
    endless = ft.Asked("3", "Why?", "", "a\n" * 500, "=1+1")
    ft.write_answers(tmp_path / "a.xlsx", ft.Comparison([long, endless], 10, 1.0))
    sheet = openpyxl.load_workbook(tmp_path / "a.xlsx")["Answers"]
    heights = [sheet.row_dimensions[n].height / ft.LINE for n in (2, 3)]
    assert heights[0] == 7  # 300 columns of letters in 45
    assert heights[1] <= ft.MOST_LINES
    assert sheet["E3"].value == "'=1+1"
    assert sheet["E3"].data_type == "s"
