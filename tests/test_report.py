"""What a finished run leaves on disk: everything promised, figures that fit each other, a record and a card."""

import csv
import json
import math
import re
import shutil
import statistics
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import torch
from conftest import PAIRS, Run, sweep, write_workbook
from matplotlib.figure import Figure
from PIL import Image
from seams import load_tuned, setting_defaults
from tables import HEADER

PROMISED = """adapter_model.safetensors adapter_config.json README.md run.json answers.xlsx tokenizer.json
    tokenizer_config.json training_visuals/training_curves.png training_visuals/loss_comparison.png
    training_visuals/training_config.json training_visuals/training_metrics.json training_visuals/training_metrics.csv"""


def read(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def logged(model: Path, column: str) -> list[float]:
    with (model / "training_visuals/training_metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_all_that_was_promised_is_there_and_in_the_zip_and_on_record(tuned_run: Path) -> None:
    model = tuned_run / "model"
    names = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert names >= set(PROMISED.split())
    with zipfile.ZipFile(model.parent / "fine_tuned_model.zip") as archive:
        assert set(archive.namelist()) == names - {"base_model_folder.txt"}
        assert archive.read("run.json") == (model / "run.json").read_bytes()
    assert not [n for n in names if re.search(r"\.(bin|pt|pkl|pth)$|optimizer|checkpoint", n)]
    record = read(model / "run.json")
    assert record["settings"]["MAX_STEPS"] == 12
    assert record["settings"].keys() == setting_defaults().keys()
    assert record["dataset"]["question_column"] == "question"
    assert record["dataset"]["quality"] == {"score": 1, "rows_counted": 24, "rows_good": 24, "parts": {}}
    assert record["results"] == read(model / "training_visuals/training_metrics.json")
    assert read(model / "training_visuals/training_config.json")["LEARNING_RATE"] == 2e-2


FIRST = [(1, 0), (2, 0.1)]  # steps, and the fraction for validation
REST = [(steps, fraction) for steps in (1, 2, 40) for fraction in (0, 0.1) if (steps, fraction) not in FIRST]


@pytest.mark.pictures
@pytest.mark.parametrize("steps, fraction", [*FIRST, *(sweep(*one) for one in REST)])
def test_pictures_say_what_they_show_and_fit_into_a_notebook_cell(
    steps: int, fraction: float, small_phi: Path, workbook: Path, run: Run, monkeypatch: Any
) -> None:
    drawn, real = {}, Figure.savefig

    def keep(figure: Figure, target: Any, **how: Any) -> None:
        drawn[Path(str(target)).name.split(".png")[0]] = figure
        real(figure, target, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    flags = ("--max-steps", steps, "--validation-fraction", fraction)
    assert run("--model-name", small_phi, *flags)[0] == 0
    for figure in (drawn["training_curves"], drawn["loss_comparison"]):
        assert figure.axes[0].get_title()
        assert all(axes.get_ylabel() for axes in figure.axes)
        assert figure.axes[-1].get_xlabel()
        legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
        texts = " ".join(text.get_text() for legend in legends for text in legend.get_texts())
        assert ("train" in texts, "validation" in texts) == (True, fraction > 0)
        assert figure.get_size_inches()[0] <= 8
    pictures = [*Path("model").rglob("*.png")]
    assert len(pictures) >= 2 + (fraction > 0)  # with those of the answers
    for path in pictures:
        with Image.open(path) as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
            assert (400 < picture.width <= 1200, 150 < picture.height <= 1600) == (True, True), path.name
            assert len(colours) > 20, path.name  # not an empty canvas


def test_the_figures_fit_each_other(tuned_run: Path) -> None:
    model = tuned_run / "model"
    metrics = read(model / "training_visuals/training_metrics.json")
    assert metrics["train_pairs"] + metrics["eval_pairs"] == len(PAIRS)
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    assert (metrics["steps"], metrics["epochs"]) == (12, 12 / math.ceil(metrics["train_pairs"] / 16))
    sizes = {name: value.numel() for name, value in load_tuned(model).model.state_dict().items()}
    adapter = sum(size for name, size in sizes.items() if "lora_" in name)
    assert metrics["trainable_parameters"] == adapter
    assert metrics["trainable_percent"] == pytest.approx(100 * adapter / sum(sizes.values()), rel=0.1)
    assert 0 < metrics["train_seconds"] < 60
    speed = metrics["tokens_trained"] / metrics["train_seconds"]
    assert metrics["tokens_per_second"] == pytest.approx(speed, rel=0.02)
    losses = logged(model, "loss")
    assert len(losses) == metrics["steps"]
    assert metrics["train_loss"] == pytest.approx(statistics.fmean(losses))
    assert min(logged(model, "eval_loss")) == metrics["eval_loss"]
    card = (model / "README.md").read_text()
    assert all(f"{metrics[name]:.3f}" in card for name in ("base_eval_loss", "eval_loss"))
    assert any(question in card for question, _ in PAIRS)  # it asks one


def test_a_loss_logged_for_several_steps_weighs_as_many(small_phi: Path, workbook: Path, run: Run) -> None:
    flags = ("--max-steps", 5, "--no-keep-best", "--eval-answers", 0, "--save-steps", 50)
    means = []
    for every in (1, 2):
        assert run("--model-name", small_phi, *flags, "--logging-steps", every)[0] == 0
        means.append(read("model/run.json")["results"]["train_loss"])
        Path("checkpoints").rename(f"checkpoints-{every}")
    assert len(logged(Path("model"), "loss")) <= 5
    assert means[0] == pytest.approx(means[1], rel=1e-4)
    assert not Path("model/answers.xlsx").exists()  # nobody wanted answers


def test_the_zip_alone_gives_the_model_that_peft_makes_of_the_files(finished: Path, phi_folder: Path) -> None:  # O2
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 8, 300, 301]])
    base = AutoModelForCausalLM.from_pretrained(phi_folder, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        expected = PeftModel.from_pretrained(base, finished / "model").eval()(ids).logits
        shutil.rmtree(finished / "model")
        shutil.copytree(phi_folder, finished / phi_folder.name)
        found = load_tuned(Path("fine_tuned_model.zip")).model(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)


def test_without_held_out_pairs_nothing_is_invented(small_phi: Path, folder: Path, run: Run) -> None:
    write_workbook(folder / "dataset.xlsx", [HEADER, *PAIRS[:4]])
    code, printed = run("--model-name", small_phi, "--num-epochs", 1, "--output-dir", "other")
    assert (code, "held out" in printed) == (0, True)
    assert not re.search("Loading weights|Writing model shards", printed)  # the bars of the libraries
    metrics = read("other/training_visuals/training_metrics.json")
    assert metrics["eval_loss"] is metrics["base_eval_loss"] is None
    assert "| `eval_loss` | none |" in Path("other/README.md").read_text()
    assert Path("fine_tuned_other.zip").exists()  # each folder has a zip of its own


def test_an_earlier_model_is_kept_and_a_linked_folder_stays_a_link(again: Run, finished: Path) -> None:
    book = openpyxl.load_workbook("model/answers.xlsx")
    book["Held out"]["M2"] = "my grade: B"
    book.properties.lastModifiedBy = "Ann"  # as every program for workbooks writes it
    book.save("model/answers.xlsx")
    Path("model").rename("drive")
    Path("model").symlink_to("drive", target_is_directory=True)
    assert again()[0] == 0
    assert Path("model").is_symlink()
    assert {"adapter_model.safetensors", "answers.xlsx"} <= {path.name for path in Path("drive").iterdir()}
    (kept,) = finished.glob("*.previous/answers.xlsx")
    assert openpyxl.load_workbook(kept)["Held out"]["M2"].value == "my grade: B"
    assert again("--lora-r", 4, "--max-steps", 1)[0] == 0
    steps = [read(path)["settings"]["MAX_STEPS"] for path in (kept.with_name("run.json"), "model/run.json")]
    assert steps == [12, 1]


def test_a_workbook_of_answers_is_wide_enough_keeps_every_sign_and_has_no_formulas(finished: Path, run: Run) -> None:
    text = "می\u200cرود 👨\u200d👩\u200d👧 a\tb"  # Persian and emoji of several people need joiners of width zero
    rows = [(text, "word " * 60 + "雪" * 20), ("How?", "a\n" * 500), ("Sum?", "'=1+1")]
    write_workbook(finished / "ask.xlsx", [HEADER, *rows])
    assert run("compare", "--questions", "ask.xlsx", "--max-tokens", 2)[0] == 0
    sheet = openpyxl.load_workbook("compare.xlsx")["Answers"]
    assert 6 <= sheet.column_dimensions["A"].width < 20 < sheet.column_dimensions["C"].width <= 60
    texts = [cell.value for row in sheet for cell in row if isinstance(cell.value, str)]  # V5
    assert not [text for text in texts if text[:1] in tuple("=+@")]
    assert sheet["B2"].value == text
