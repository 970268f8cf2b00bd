"""Section 2: the file that was meant, or what is there instead; and nothing ever changes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import PAIRS, ROOT, in_words, write_workbook

import finetune_colab as ft


def find(path: object = "dataset.xlsx") -> Path:
    return ft.find_dataset(ft.Config(DATASET_PATH=str(path))).paths[0]


def refusal(path: object = "dataset.xlsx") -> str:
    with pytest.raises(ft.UserError) as refused:
        find(path)
    return in_words(str(refused.value))


def test_a_file_that_is_there_is_taken_under_any_name(folder: Path) -> None:
    for name in ("dataset.xlsx", "my data (1).csv", "问答"):
        (folder / name).touch()
        assert find(name) == Path(name)
        assert find(folder / name) == folder / name


def test_a_path_may_start_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (folder / "dataset.xlsx").touch()
    assert find("~/dataset.xlsx") == folder / "dataset.xlsx"


@pytest.mark.parametrize("name", ["~$dataset.xlsx", "~no such person/dataset.xlsx"])
def test_a_home_that_nobody_has_is_refused(name: str, folder: Path) -> None:
    assert name.rpartition("/")[2] in refusal(name)


def test_the_example_is_found_from_any_folder(folder: Path) -> None:
    assert find("dataset_example.xlsx") == ROOT / "dataset_example.xlsx"
    own = write_workbook(folder / "dataset_example.xlsx", PAIRS)
    assert find(own) == own


def test_with_nothing_there_the_folder_is_named_and_the_flag(folder: Path) -> None:
    message = refusal()
    assert f"There is no file dataset.xlsx in {folder.resolve()}" in message
    assert "Upload" in message
    assert "--dataset-path" in message


def test_with_the_example_there_the_way_to_try_it_is_told(folder: Path) -> None:
    for name in ("dataset_example.xlsx", "other.xlsx"):
        (folder / name).touch()
    message = refusal()
    assert "rename it to dataset.xlsx" in message
    assert "--dataset-path dataset_example.xlsx" in message


@pytest.mark.parametrize("name", ["data.csv", "DATASET.XLSX", "dataset.xlsx.xlsx", "my pairs.xlsx"])
def test_another_table_that_is_there_is_offered(name: str, folder: Path) -> None:
    (folder / name).touch()
    message = refusal()
    assert name in message
    assert "--dataset-path" in message
    assert "Upload" not in message


@pytest.mark.parametrize("name", ["~$dataset.xlsx", "notes.txt", "dataset"])
def test_locks_of_open_workbooks_and_other_files_are_not_offered(name: str, folder: Path) -> None:
    nothing_there = refusal()
    (folder / name).touch()
    assert refusal() == nothing_there


def test_what_is_offered_stays_a_short_list(folder: Path) -> None:
    for number in range(30):
        (folder / f"table{number:02}.csv").touch()
    assert refusal().count(".csv") == 5


def test_the_folder_of_the_missing_file_is_the_one_looked_at(folder: Path) -> None:
    (folder / "here.csv").touch()
    (folder / "data").mkdir()
    (folder / "data" / "there.csv").touch()
    message = refusal("data/dataset.xlsx")
    assert "there.csv" in message
    assert "here.csv" not in message.replace("there.csv", "")


def test_a_file_in_a_folder_that_is_missing_is_refused(folder: Path) -> None:
    assert "no file dataset.xlsx" in refusal("nowhere/dataset.xlsx")


@pytest.mark.parametrize("name", [".", "data"])
def test_a_folder_is_not_taken_for_a_file(name: str, folder: Path) -> None:
    (folder / "data").mkdir()
    assert "a folder" in refusal(name)


@pytest.mark.parametrize("name", ["dataset.xlsx", "dataset.csv"])
def test_reading_leaves_the_file_as_it_is(name: str, folder: Path) -> None:
    path = folder / name
    if path.suffix == ".csv":
        path.write_text("question,answer\n Why? ,Because\nWhy?,Because\n\n,\n", newline="\r\n")
    else:
        write_workbook(path, [("question", "answer"), *PAIRS, (" Why? ", None), PAIRS[0]])
    before = path.read_bytes(), path.stat().st_mtime_ns
    ft.find_pairs(ft.Config(DATASET_PATH=name))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [file.name for file in folder.iterdir()] == [name]
