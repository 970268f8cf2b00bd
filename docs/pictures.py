"""The picture of the page in this folder: run it where `python finetune_colab.py demo` has run.

python docs/pictures.py       needs gradio, playwright and Debian's Chromium
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import finetune_colab as ft  # noqa: E402

QUESTION = "What is overfitting?"


def main() -> None:
    page = ft.page_of(ft.load_tuned(Path("model")), ft.Config())
    _, address, _ = page.launch(**ft.PAGE_OPTIONS)
    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        sight = browser.new_page(viewport={"width": 900, "height": 800})
        sight.goto(address)
        sight.locator("textarea:visible:enabled").first.fill(QUESTION)
        sight.keyboard.press("Enter")
        sight.wait_for_timeout(20_000)
        sight.mouse.move(0, 0)
        sight.screenshot(path=HERE / "chat.png")
        browser.close()
    page.close(verbose=False)


if __name__ == "__main__":
    main()
