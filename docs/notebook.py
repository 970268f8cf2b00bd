"""The cells of COLAB_QUICKSTART.md as a notebook to open in Colab.

python docs/notebook.py       writes docs/colab.ipynb
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTEBOOK, QUICKSTART = HERE / "colab.ipynb", HERE.parent / "COLAB_QUICKSTART.md"
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4"},
    "kernelspec": {"display_name": "Python 3", "name": "python3"},
}


def cell(kind: str, text: str) -> dict[str, object]:
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.strip().splitlines(True), **code}


def notebook() -> str:
    text = QUICKSTART.read_text(encoding="utf-8")
    text = re.sub(r"\[([^]]+)\]\((?!http)[^)]+\)", r"\1", text)  # files that Colab does not have
    parts = re.split(r"```(?:text|python)\n(.*?)```\n", text, flags=re.DOTALL)
    cells = [cell("code" if n % 2 else "markdown", part) for n, part in enumerate(parts)]
    cells = [one for one in cells if one["source"]]
    content = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
