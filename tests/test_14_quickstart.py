"""The cells of COLAB_QUICKSTART.md, one after the other, as somebody pastes them into a notebook.

Only what is Colab itself is made up: the file dialogs, the Drive, the public link of gradio. The
base model is the built-in one, set as a person would set it, in `Config`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, in_words

CELLS = re.findall(
    r"```(?:text|python)\n(.*?)```", (ROOT / "COLAB_QUICKSTART.md").read_text(), re.DOTALL
)
COLAB = """
    class files:
        def download(name):
            import pathlib
            assert pathlib.Path(name).stat().st_size
            print("downloaded", name)
    class drive:
        def mount(place):
            import pathlib
            pathlib.Path("drive/MyDrive").mkdir(parents=True, exist_ok=True)
"""
EDGE = """
    import sys
    if any(word == "--share" for word in sys.argv):
        import gradio
        gradio.networking.setup_tunnel = lambda *_, **__: "https://made-up.gradio.live"
"""


class Notebook:
    """A Colab machine with the three files that step 2 uploads."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("finetune_colab.py", "requirements-finetune.txt"):
            shutil.copyfile(ROOT / name, place / name)
        shutil.copyfile(ROOT / "dataset_example.xlsx", place / "dataset.xlsx")
        script = place / "finetune_colab.py"
        script.write_text(script.read_text().replace('"microsoft/phi-2"', '"demo"', 1))
        edge = place / "edge"
        (edge / "google").mkdir(parents=True)
        (edge / "google" / "colab.py").write_text(textwrap.dedent(COLAB))
        (edge / "sitecustomize.py").write_text(textwrap.dedent(EDGE))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "PYTHONPATH": str(edge)}

    def lose_the_session(self) -> None:
        """All that a new Colab machine does not have; the Drive is elsewhere."""
        for name in ("checkpoints", "model", "logs"):
            shutil.rmtree(self.place / name)

    def run(self, cell: str) -> Iterator[tuple[str, str]]:
        """What each command of the cell prints."""
        cell = cell.replace("/content/", "./")
        lines = cell.splitlines() if cell.startswith("!") else [cell]
        for line in lines:
            command = ["bash", "-c", line[1:]] if line.startswith("!") else ["python", "-c", line]
            yield line, self.page(command) if "--web" in line else self.output(command)

    def output(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.place,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def page(self, command: list[str]) -> str:
        """The page runs until the cell is stopped."""
        with (self.place / "page.txt").open("w+") as out:
            options = {"cwd": self.place, "env": self.environment, "start_new_session": True}
            child = subprocess.Popen(command, stdout=out, stderr=out, **options)  # type: ignore[call-overload]
            try:
                until = time.monotonic() + 200
                while "Page" not in (text := (self.place / "page.txt").read_text()):
                    assert child.poll() is None and time.monotonic() < until, text
                    time.sleep(0.5)
                os.killpg(child.pid, signal.SIGINT)
                child.wait(60)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
            return (self.place / "page.txt").read_text()


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command of the page printed, by its first mention."""
    pytest.importorskip("gradio")
    notebook = Notebook(tmp_path_factory.mktemp("content"))
    told: dict[str, Any] = {"place": str(notebook.place)}
    for cell in CELLS:
        if "drive.mount" in cell:
            notebook.lose_the_session()
        for line, text in notebook.run(cell):
            told.setdefault(line.strip(), text)
    return told | {"notebook": notebook}


def test_every_cell_runs_and_ends_well(printed: dict[str, Any]) -> None:
    assert len(printed) > 12
    assert "Quality" in printed["!python finetune_colab.py check"]
    assert "After" in printed["!python finetune_colab.py"]


def test_the_zip_is_downloaded(printed: dict[str, Any]) -> None:
    (told,) = (text for line, text in printed.items() if "files.download" in line)
    assert "downloaded fine_tuned_model.zip" in told
    with zipfile.ZipFile(Path(printed["place"], "fine_tuned_model.zip")) as archive:
        assert any(name.endswith("adapter_model.safetensors") for name in archive.namelist())


def test_the_model_answers_and_is_compared(printed: dict[str, Any]) -> None:
    assert printed['!python finetune_colab.py chat "What is overfitting?"'].strip()
    told = in_words(printed['!python finetune_colab.py compare "What is overfitting?"'])
    assert "before" in told.lower()
    assert "after" in told.lower()
    assert "https://made-up.gradio.live" in printed["!python finetune_colab.py chat --web --share"]


def test_the_export_makes_what_ollama_asks_for(printed: dict[str, Any]) -> None:
    place = Path(printed["place"], "model-gguf")
    assert {path.name for path in place.iterdir()} >= {"model-q8_0.gguf", "Modelfile"}


def test_a_new_session_goes_on_from_the_drive(printed: dict[str, Any]) -> None:
    assert [*Path(printed["place"], "drive/MyDrive/finetune").rglob("COMMIT.json")]
    printed["notebook"].lose_the_session()
    command = next(line for line in printed if "--checkpoint-mirror" in line)
    ((_, told),) = printed["notebook"].run(command)
    assert "is fetched from" in in_words(told)
