"""Section 10, the page: driven in a real browser, by one visitor and by two."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PAIRS, ROOT, in_words
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

import finetune_colab as ft

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
QUIET = (  # or else it looks for its makers' servers
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tuned(tuned_run: Path) -> ft.Tuned:
    return ft.load_tuned(tuned_run / "model")


@pytest.fixture(scope="module")
def address(tuned: ft.Tuned) -> Iterator[str]:
    """A page whose answers are long enough to be stopped."""
    page = ft.page_of(tuned, ft.Config(MAX_TOKENS=60))
    _, address, _ = page.launch(**ft.PAGE_OPTIONS)
    yield address
    page.close(verbose=False)


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Callable[[], Page]]:
    contexts = []

    def visit() -> Page:
        context = browser.new_context(viewport={"width": 1100, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.goto(address)
        page.wait_for_selector("textarea")
        return page

    yield visit
    for context in contexts:
        context.close()


def ask(page: Page, question: str) -> None:
    box(page).fill(question)
    page.keyboard.press("Enter")


def box(page: Page) -> Locator:
    """Where the question goes."""
    return page.locator("textarea:visible:enabled").first


def before(page: Page) -> Locator:
    return page.locator("textarea:visible:disabled").nth(0)


def after(page: Page) -> Locator:
    return page.locator("textarea:visible:disabled").nth(1)


def last_answer(page: Page) -> Any:
    return page.locator(".bot.message").last


def most_tokens(page: Page, count: int) -> None:
    page.get_by_text("How to answer").click()
    page.get_by_label("number input for Max tokens").fill(str(count))
    page.keyboard.press("Tab")


def speed(page: Page, tokens: int | str) -> None:
    """Wait for the line that says how fast an answer of so many tokens came."""
    page.wait_for_function(
        "p => [...document.querySelectorAll('textarea')].some(t => new RegExp(p).test(t.value))",
        arg=rf"\({tokens} tokens, [\d.]+ a second",
    )


def answer_of(tuned: ft.Tuned, question: str, base: bool = False, tokens: int = 60) -> str:
    cfg = ft.Config(MAX_TOKENS=tokens, BASE=base)
    return list(ft.growing_answer(tuned, [ft.asked_by_user(question)], cfg))[-1].text


def same(shown: str, text: str) -> bool:
    """But for what a browser does to spaces and control characters."""
    plain = re.compile(r"[^\w]+")
    return plain.sub("", shown) == plain.sub("", text)


def comes_to(text: Callable[[], str], wanted: str) -> None:
    """Wait until an answer is whole."""
    deadline = time.monotonic() + 30
    while not same(text(), wanted):
        assert time.monotonic() < deadline, (text(), wanted)
        time.sleep(0.2)


def test_a_question_is_answered_while_one_looks_on(
    visit: Callable[[], Page], tuned: ft.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [
        ft.asked_by_user("What is 2 plus 3?"),
        {"role": "assistant", "content": answer_of(tuned, "What is 2 plus 3?")},
        ft.asked_by_user("And then?"),
    ]
    second = list(ft.growing_answer(tuned, talk, ft.Config(MAX_TOKENS=60)))[-1].text
    real, seen = ft.prompt_of, []
    monkeypatch.setattr(ft, "prompt_of", lambda *args: seen.append(args[1]) or real(*args))
    page = visit()
    ask(page, talk[0]["content"])
    comes_to(lambda: last_answer(page).inner_text(), talk[1]["content"])
    speed(page, 60)
    ask(page, talk[2]["content"])  # which knows what was said before
    expect(page.locator(".bot.message")).to_have_count(2)
    comes_to(lambda: last_answer(page).inner_text(), second)
    assert seen == [talk[:1], talk]


def test_it_streams_and_can_be_stopped(visit: Callable[[], Page]) -> None:
    page = visit()
    most_tokens(page, 1000)
    ask(page, "What is 2 plus 3?")
    expect(last_answer(page)).to_have_text(re.compile(r"\w"))
    first = last_answer(page).inner_text()
    page.wait_for_function(
        "n => [...document.querySelectorAll('.bot.message')].at(-1).innerText.length > n",
        arg=len(first),
    )
    page.locator(".stop-button:visible").click()
    expect(page.locator(".stop-button:visible")).to_have_count(0)
    time.sleep(1)
    cut = last_answer(page).inner_text()
    time.sleep(2)
    assert last_answer(page).inner_text() == cut
    page.get_by_label("number input for Max tokens").fill("5")
    page.keyboard.press("Tab")
    start = time.monotonic()
    ask(page, "And now?")  # the answer that was stopped is not waited for
    speed(page, 5)
    assert time.monotonic() - start < 5


def test_both_models_side_by_side(visit: Callable[[], Page], tuned: ft.Tuned) -> None:
    expected = [answer_of(tuned, "What is 2 plus 3?", base) for base in (True, False)]
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    box(page).fill("What is 2 plus 3?")
    page.get_by_role("button", name="Ask both").click()
    comes_to(after(page).input_value, expected[1])
    assert same(before(page).input_value(), expected[0])
    assert expected[0] != expected[1]


def test_a_comparison_can_be_stopped(visit: Callable[[], Page]) -> None:
    page = visit()
    most_tokens(page, 1000)
    page.get_by_role("tab", name="Compare").click()
    box(page).fill("What is 2 plus 3?")
    page.keyboard.press("Enter")
    expect(before(page)).to_have_value(re.compile(r"\w"))
    page.get_by_role("button", name="Stop").click()
    time.sleep(1)
    cut = [before(page).input_value(), after(page).input_value()]
    time.sleep(2)
    assert [before(page).input_value(), after(page).input_value()] == cut
    assert "1000 tokens" not in page.locator("textarea:visible:disabled").nth(2).input_value()


def test_two_visitors_at_once_get_their_own_answers(
    visit: Callable[[], Page], tuned: ft.Tuned
) -> None:
    """One compares, with the adapter off at first, while the other talks with it on."""
    wanted = answer_of(tuned, "What is 4 plus 4?")
    base, own = (answer_of(tuned, "What is 2 plus 3?", base) for base in (True, False))
    first, second = visit(), visit()
    first.get_by_role("tab", name="Compare").click()
    box(first).fill("What is 2 plus 3?")
    first.keyboard.press("Enter")
    ask(second, "What is 4 plus 4?")
    comes_to(lambda: last_answer(second).inner_text(), wanted)
    comes_to(after(first).input_value, own)
    assert same(before(first).input_value(), base)


HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    "<iframe src='javascript:1'></iframe> [link](javascript:alert(1)) ![picture](http://x/y.png) "
    "# no heading\n" + "**bold** " * 2000
)


def test_a_hostile_answer_is_only_text(
    visit: Callable[[], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    def growing_answer(*_: Any) -> Iterator[ft.Answer]:
        yield ft.Answer(HOSTILE, 9, stopped=True)

    monkeypatch.setattr(ft, "growing_answer", growing_answer)
    page = visit()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    ask(page, HOSTILE[:500])
    expect(last_answer(page)).to_contain_text("<script>document.title = 'owned'</script>")
    message = last_answer(page)
    assert "**bold** **bold**" in message.inner_text()
    assert message.locator("script, img, iframe, a, strong, h1").count() == 0
    page.get_by_role("tab", name="Compare").click()
    box(page).fill("Why?")
    page.keyboard.press("Enter")
    expect(after(page)).to_have_value(re.compile("<script>"))
    time.sleep(1)
    assert page.title() == ft.PAGE_TITLE
    assert not [url for url in asked if url.startswith("http://x")]


def test_the_box_takes_no_more_than_a_question(visit: Callable[[], Page]) -> None:
    page = visit()
    box(page).press_sequentially("x" * 20)
    assert page.locator("textarea:visible:enabled").first.get_attribute("maxlength") == "8000"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page shows in its corner."""
    import gradio

    told: list[str] = []
    monkeypatch.setattr(gradio, "Warning", told.append)
    return told


def test_what_the_page_cannot_do_is_told(tuned: ft.Tuned, told: list[str]) -> None:
    reply, both = ft.page_answers(tuned, ft.Config())
    for how in ((0, 1, 0, 1, 42), (9, 1, 5, 1, 42), ("x", 1, 5, 1, 42)):
        assert list(reply("Why?", [], *how)) == []
        assert "has to" in told.pop()
    how = (0, 1, 5, 1, 42)
    assert list(reply("Why? " * 1500, [], *how)) == []
    assert "Shorten it" in told.pop()
    assert list(reply("x" * 9000, [], *how)) == list(both("x" * 9000, *how)) == []
    assert told == ["A question may have 8,000 letters."] * 3
    assert list(reply("Why?", [], *how))[-1][1].startswith("(5 tokens")


def test_the_page_is_not_locked_by_what_it_cannot_do(visit: Callable[[], Page]) -> None:
    page = visit()
    ask(page, "Why? " * 1500)
    expect(page.get_by_text("Shorten it").first).to_be_visible()
    expect(box(page)).to_be_enabled()
    ask(page, "Why?")  # of the talk so far, only what was answered counts
    speed(page, 60)


CODE = "def f(x):\n    if x < 1 and x > 0:\n        return '<b> &amp; </b>'\n\n    return x"


def test_code_keeps_its_form_and_comes_back_as_it_was(
    visit: Callable[[], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def growing_answer(_: Any, messages: ft.Messages, __: Any) -> Iterator[ft.Answer]:
        asked.append(messages)
        yield ft.Answer(CODE, 9, stopped=True)

    monkeypatch.setattr(ft, "growing_answer", growing_answer)
    page = visit()
    ask(page, "Write me <b>code</b>.")
    expect(page.locator(".bot.message")).to_have_count(1)
    speed(page, 9)
    assert last_answer(page).inner_text().strip() == CODE
    ask(page, "And more?")
    deadline = time.monotonic() + 30
    while len(asked) < 2 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert [one["content"] for one in asked[1]] == ["Write me <b>code</b>.", CODE, "And more?"]


def test_nothing_can_be_uploaded(address: str) -> None:
    import urllib.error
    import urllib.request

    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    body += b"y" * 5000 + b"\r\n--x--\r\n"
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}gradio_api/upload", body, head)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request, timeout=10)


def test_examples_fill_the_question(visit: Callable[[], Page], tuned: ft.Tuned) -> None:
    page = visit()
    assert tuned.examples
    page.get_by_text(tuned.examples[0], exact=True).first.click()
    expect(box(page)).to_have_value(tuned.examples[0])


def test_the_command_opens_the_page_on_this_computer_only(
    tuned_run: Path, browser: Browser
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "finetune_colab.py"), "chat", "--web", "--port", port]
    process = subprocess.Popen(
        [*map(str, command), "--max-tokens", "4"],
        cwd=tuned_run,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = ""
    assert process.stdout
    for line in process.stdout:
        told += line
        if "Page " in line:
            break
    assert f"http://127.0.0.1:{port}" in told
    assert "Ctrl+C" in told
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{port}")
    ask(page, PAIRS[0][0])
    speed(page, 4)
    page.close()
    listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=False).stdout
    assert f"0.0.0.0:{port}" not in listening
    process.send_signal(2)
    assert process.wait(30) == 0
    assert "Traceback" not in process.stdout.read()


def test_a_port_that_is_taken_is_one_message(tuned_run: Path, run: Run, monkeypatch: Any) -> None:
    monkeypatch.chdir(tuned_run)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, printed = run("chat", "--web", "--port", taken.getsockname()[1])
    assert code == 2
    assert "Take another --port" in in_words(printed)


def test_without_gradio_it_says_what_to_install(
    tuned_run: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tuned_run)
    for version in (None, "5.49.1"):
        monkeypatch.setattr(ft, "installed_version", lambda _, version=version: version)
        code, printed = run("chat", "--web")
        assert code == 2
        assert 'pip install "gradio>=6.7"' in in_words(printed)
        assert "Loading" not in printed
