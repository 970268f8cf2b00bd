"""The cells of COLAB_QUICKSTART.md, one after the other, as somebody pastes them into a notebook.

Only what is Colab itself is made up: the file dialogs, the Drive, the public link of gradio. The base
model is the built-in one, and takes a few steps only, set as a person would set it, in `Config`.
"""

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
from conftest import in_words
from jupyter_client.manager import run_kernel
from seams import ROOT, SCRIPT

from docs.notebook import NOTEBOOK, notebook

CELLS = re.findall(r"```(?:text|python)\n(.*?)```", (ROOT / "COLAB_QUICKSTART.md").read_text(), re.DOTALL)
SETTINGS = {
    'MODEL_NAME: str = "microsoft/phi-2"': 'MODEL_NAME: str = "demo"',
    '"MAX_STEPS": 500': '"MAX_STEPS": 4',  # of the demo
    "EVAL_ANSWERS: int = 20": "EVAL_ANSWERS: int = 1",
    "MAX_TOKENS: int = 256": "MAX_TOKENS: int = 4",
}
COLAB = """
    import pathlib
    class files:
        def download(name):
            assert pathlib.Path(name).stat().st_size
            print("downloaded", name)
    class drive:
        def mount(place):
            pathlib.Path("drive/MyDrive").mkdir(parents=True, exist_ok=True)
"""
# `colab run script.py check` sets these two in a fresh kernel, and no __file__, then sends the text
PRELUDE = "import sys; sys.argv, __name__ = ['script.py', *{}], '__main__'"
LINK = "https://made-up.gradio.live"
EDGE = f"""
    import sys
    if any(word == "--share" for word in sys.argv):
        import gradio
        gradio.networking.setup_tunnel = lambda *_, **__: "{LINK}"
"""


class Notebook:
    """A Colab machine with the three files that step 1 uploads."""

    def __init__(self, place: Path) -> None:
        self.place = place
        shutil.copy(ROOT / "requirements-finetune.txt", place)
        shutil.copyfile(ROOT / "dataset_example.xlsx", place / "dataset.xlsx")
        script = SCRIPT.read_text()
        for default, edited in SETTINGS.items():
            assert default in script
            script = script.replace(default, edited, 1)
        (place / "finetune_colab.py").write_text(script)
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
        for line in cell.splitlines() if cell.startswith("!") else [cell]:
            command = ["bash", "-c", line[1:]] if line.startswith("!") else ["python", "-c", line]
            yield line, self.page(command) if "--web" in line else self.output(command)

    def output(self, command: list[str]) -> str:
        options: dict[str, Any] = {"cwd": self.place, "env": self.environment, "timeout": 600}
        options |= {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return str(done.stdout)

    def page(self, command: list[str]) -> str:
        """The page runs until the cell is stopped."""
        printed = self.place / "page.txt"
        with printed.open("w") as out:
            options: dict[str, Any] = {"cwd": self.place, "env": self.environment}
            child = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, **options)
            try:
                until = time.monotonic() + 200
                while LINK not in printed.read_text():
                    assert child.poll() is None and time.monotonic() < until, printed.read_text()
                    time.sleep(0.5)
                os.killpg(child.pid, signal.SIGINT)
                child.wait(60)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
        return printed.read_text()


def test_colab_run_executes_the_text_alone(small_phi: Path, workbook: Path) -> None:
    """check and a short training, one after the other in one kernel, which neither of them ends."""
    flags = ["--model-name", str(small_phi), "--max-steps", "2", "--eval-answers", "0"]
    check, train, text = PRELUDE.format(["check", *flags]), PRELUDE.format(flags), SCRIPT.read_text(encoding="utf-8")
    printed = ""

    def show(message: dict[str, Any]) -> None:
        nonlocal printed
        if message["msg_type"] in ("stream", "error"):
            printed += message["content"].get("text") or str(message["content"])

    with run_kernel(cwd=str(workbook.parent)) as client:
        for cell in (check, text, train, text, "print('alive', '__file__' in globals())"):
            client.execute_interactive(cell, allow_stdin=False, timeout=100, output_hook=show)
    assert printed.endswith("alive False\n")
    assert not re.search("SystemExit|Traceback|Error", printed)
    assert [len(re.findall(f"^{label} ", printed, re.MULTILINE)) for label in ("Ready", "Saved")] == [1, 1]
    assert (workbook.parent / "fine_tuned_model.zip").is_file()


def test_the_notebook_is_made_of_the_quickstart() -> None:
    assert NOTEBOOK.read_text(encoding="utf-8") == notebook()


@pytest.mark.sweep
def test_every_cell_runs_and_a_new_session_resumes_from_the_drive(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    notebook, printed = Notebook(tmp_path), dict[str, str]()
    for cell in CELLS:
        if "drive.mount" in cell:
            notebook.lose_the_session()
        for line, text in notebook.run(cell):
            printed.setdefault(line.strip(), text)

    assert len(printed) > 11
    assert "Quality" in printed["!python finetune_colab.py check"]
    assert "loss" in printed["!python finetune_colab.py"]
    (downloaded,) = (text for line, text in printed.items() if "files.download" in line)
    assert "downloaded fine_tuned_model.zip" in downloaded
    with zipfile.ZipFile(tmp_path / "fine_tuned_model.zip") as archive:
        assert any(name.endswith("adapter_model.safetensors") for name in archive.namelist())
    assert printed['!python finetune_colab.py chat "What is overfitting?"'].strip()
    compared = printed['!python finetune_colab.py compare "What is overfitting?"'].lower()
    assert "before" in compared
    assert "after" in compared
    exported = {path.name for path in (tmp_path / "model-gguf").iterdir()}
    assert exported >= {"model-q8_0.gguf", "Modelfile"}

    assert [*(tmp_path / "drive/MyDrive/finetune").rglob("COMMIT.json")]
    notebook.lose_the_session()
    command = next(line for line in printed if "--checkpoint-mirror" in line)
    ((_, text),) = notebook.run(command)
    assert re.search(r"fetched from|mirror", in_words(text))
