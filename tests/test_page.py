"""The page, in a real browser, with one visitor and with two."""

import functools
import os
import re
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import gradio
import openpyxl
import pytest
from conftest import PAIRS, Patch, Run, at_attention, call, save_phi
from playwright.sync_api import Locator, Page, expect, sync_playwright
from seams import load_tuned, prompt_of, stream_answer
from test_chat import X, always_says, talk, taught_conversations

CHROMIUM = shutil.which("chromium")
expect.set_options(timeout=30_000)  # milliseconds; the machine may be busy
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
]
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
Visit = Callable[..., Page]
Answer = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    home = tmp_path_factory.mktemp("page")
    return taught_conversations(home, save_phi(home / "phi", tokenizer, intermediate_size=1280))


@pytest.fixture(scope="module")
def visit(model: Path) -> Iterator[Visit]:
    """Open the page at an address, or that of a model, which this process serves."""
    pages: list[Any] = []

    @functools.cache
    def served(model: Path) -> str:
        with Patch.context() as patch:
            patch.setattr(gradio.Blocks, "block_thread", lambda page: pages.insert(0, page))
            assert call(model.parent, "chat", "--web", "Ready?", "--max-tokens", 60) == 0
        return str(pages[0].local_url)

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)

        def visit(place: Path | str = model) -> Page:
            page = browser.new_context(viewport={"width": 1100, "height": 800}).new_page()
            page.goto(served(place) if isinstance(place, Path) else place)
            page.wait_for_selector("textarea")
            return page

        yield visit
    for page in pages:
        page.close(verbose=False)


def box(page: Page) -> Locator:
    return page.locator("textarea:visible:enabled").first  # where the question goes


def ask(page: Page, question: str, tab: str = "Chat", most: int = 0) -> None:
    if most:
        page.get_by_label("number input for Max tokens").fill(str(most))
        page.keyboard.press("Tab")
    if tab == "Compare":
        page.get_by_role("tab", name=tab).click()
    box(page).fill(question)
    box(page).press("Enter")


def said(page: Page) -> Locator:
    return page.locator(".bot.message")


def side(page: Page, which: int) -> Locator:
    return page.locator("textarea:visible:disabled").nth(which)  # of a comparison: before, after


def comes_to(shown: Locator, wanted: str) -> None:
    """Wait until an answer is whole, but for what a browser does to spaces and signs."""
    text = shown.input_value if "textarea" in str(shown) else shown.inner_text
    deadline, letters = time.monotonic() + 30, re.compile(r"\W+")
    while letters.sub("", text()) != letters.sub("", wanted):
        assert time.monotonic() < deadline, (text(), wanted)
        time.sleep(0.1)


def speed(page: Page, tokens: int) -> None:
    """Wait for the line that says how fast an answer of so many tokens came."""
    expect(page.get_by_text(re.compile(rf"\({tokens} tokens, [\d.]+ per second")).first).to_be_visible()


@pytest.fixture(scope="module")
def answer(model: Path) -> Answer:
    """What the page has to answer to a conversation."""
    tuned = load_tuned(model)
    return lambda *texts, base=False: [*stream_answer(tuned, talk(*texts), MAX_TOKENS=60, BASE=base)][-1].text


def test_an_example_is_a_taught_question_and_the_next_answer_knows_what_was_said(
    visit: Visit, answer: Answer, model: Path
) -> None:
    page = visit()
    examples = {question for question, _ in PAIRS if question in page.locator("body").inner_text()}
    rows = openpyxl.load_workbook(model / "answers.xlsx")["Held out"].iter_rows(min_row=2)
    assert (held_out := {row[1].value for row in rows}) and not held_out & examples
    example = min(examples)
    page.get_by_text(example, exact=True).first.click()
    expect(box(page)).to_have_value(example)
    box(page).press("Enter")
    comes_to(said(page).last, first := answer(example))
    speed(page, 60)
    ask(page, "And then?")
    expect(said(page)).to_have_count(2)
    comes_to(said(page).last, answer(example, first, "And then?"))


def test_an_answer_streams_and_can_be_stopped(visit: Visit, patched: Patch) -> None:
    page, passes = visit(), [0]
    at_attention(patched, lambda n, _: passes.append(n))

    def computed() -> int:
        """How often attention has run when it comes to rest; 1,000 tokens would need it more often."""
        count = -1
        while count != len(passes):
            count = len(passes)
            page.wait_for_timeout(700)
        return count

    page.get_by_text("Answer settings").click()
    ask(page, X, most=1000)
    expect(said(page)).to_have_text(re.compile(r"\w"))
    expect(said(page)).not_to_have_text(said(page).inner_text())  # it grows
    page.locator(".stop-button:visible").click()
    expect(page.locator(".stop-button:visible")).to_have_count(0)
    assert computed() < 1500
    cut = said(page).inner_text()
    ask(page, "And now?", most=5)
    speed(page, 5)
    assert said(page).first.inner_text() == cut
    ask(page, X, "Compare", most=1000)
    expect(side(page, 0)).to_have_value(re.compile(r"\w"))
    page.get_by_role("button", name="Stop").click()
    assert computed() < 3000 and not page.get_by_text("1000 tokens").count()


def test_two_visitors_at_once_get_their_own_answers(visit: Visit, answer: Answer) -> None:
    """One compares, with the adapter off at first, while the other talks with it on."""
    first, second = visit(), visit()
    ask(first, X, "Compare")
    ask(second, "What is 4 plus 4?")
    comes_to(said(second), answer("What is 4 plus 4?"))
    comes_to(side(first, 1), tuned := answer(X))
    comes_to(side(first, 0), base := answer(X, base=True))
    assert base != tuned


HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    "<iframe src='javascript:1'></iframe> [link](javascript:1) ![picture](http://x/y.png) **bold**"
    "\n# no heading\ndef f(x):\n    if x < 1 and x > 0:\n        return '<b> &amp; </b>'\n\n    return x"
)


def test_a_hostile_answer_comes_back_as_mere_text(visit: Visit, model: Path, tmp_path: Path, patched: Patch) -> None:
    lengths, asked = [0], []
    always_says(Path(shutil.copytree(model, tmp_path / "model")), HOSTILE)
    page = visit(tmp_path / "model")
    title = page.title()
    page.on("request", lambda request: asked.append(request.url))
    ask(page, HOSTILE)
    speed(page, 60)
    assert said(page).inner_text().strip() == HOSTILE
    assert said(page).locator("script, img, iframe, a, strong, h1").count() == 0
    at_attention(patched, lambda _, query: lengths.append(query.shape[2]))
    ask(page, "And more?")
    speed(page, 60)
    expect(said(page)).to_have_count(2)
    whole = prompt_of(load_tuned(model), talk(HOSTILE, HOSTILE, "And more?"), MAX_TOKENS=60)
    ask(page, "Why?", "Compare")
    comes_to(side(page, 1), HOSTILE)
    assert max(lengths) == len(whole)
    assert page.title() == title and not [url for url in asked if url.startswith("http://x")]


def test_what_the_page_cannot_do_is_told_and_locks_nothing(visit: Visit) -> None:
    page = visit()
    assert (box(page).get_attribute("maxlength"), box(page).input_value()) == ("8000", "Ready?")
    ask(page, "Why? " * 1500)
    expect(page.get_by_text(re.compile(r"\d,\d{3} tokens")).first).to_be_visible()
    expect(box(page)).to_be_enabled()
    ask(page, "Why?")  # of the chat so far, only what was answered counts
    speed(page, 60)
    head = {"Content-Type": "multipart/form-data; boundary=x"}  # nothing can be uploaded
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n%b\r\n--x--\r\n'
    upload = urllib.request.Request(f"{page.url}gradio_api/upload", body % (b"y" * 5000), head)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(upload, timeout=10)


def test_the_page_is_for_this_computer_only_and_ctrl_c_closes_it(model: Path, run: Run, patched: Patch) -> None:
    patched.chdir(model.parent)
    real = gradio.Blocks.block_thread
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        code, printed = run("chat", "--web", "--port", port)
        assert code == 2 and "--port" in printed

    def looked_at(page: Any) -> None:
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(OSError):  # as others would see it
            socket.create_connection(("127.0.0.2", port))
        Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        real(page)

    patched.setattr(gradio.Blocks, "block_thread", looked_at)
    code, printed = run("chat", "--web", "--port", port)
    assert code == 0 and f"http://127.0.0.1:{port}" in printed and "Ctrl+C" in printed
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port))
    patched.setenv("COLAB_RELEASE_TAG", "release-colab-external_20261127")  # as on Colab, where nobody could see it
    code, printed = run("chat", "--web")
    assert code == 2 and "--share" in printed
