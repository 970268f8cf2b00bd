"""From a conversation to tokens: the prompt, and that the answer and its end are what is learnt."""

import copy
import datetime as dt
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import END, PAIRS, Run, at_step, in_words, save_phi, train_tokenizer, write_workbook
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl import load_workbook
from seams import IGNORE, ask, encode, load_tuned
from tables import cases
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def chat(turn: str, asking: str, first: str = "") -> str:
    """A chat template in Jinja: of each turn, of what asks for an answer, and of the beginning."""
    turn = turn.replace("<role>", "{{ m['role'] }}").replace("<text>", "{{ m['content'] }}")
    turns = "{% for m in messages %}" + turn.replace("<trim>", "{{ m['content'] | trim }}") + "{% endfor %}"
    return first + turns + "{% if add_generation_prompt %}" + asking + "{% endif %}"


def template_of(row: str) -> tuple[str, str, str]:
    """Special tokens, the one that ends a turn, and the template."""
    special, end, *parts = ("" if part == "-" else part.replace(r"\n", "\n") for part in row.split(" | ")[1:])
    return special, end, chat(*parts) if parts else ""


# fmt: off
TEMPLATES = {name: template_of(row) for name, row in cases("templates").items()}
UNUSABLE = ["{{ raise_exception('no') }}", "{{ messages[-1]['content'] }}", "{% for m in messages %}{{ m[", chat("{{ m['role'] }}", ""), chat("<text>", "", "{{ messages | length }}")]
# fmt: on
FAST = ("--max-steps", 1, "--eval-answers", 0)
LETTERS = st.characters(exclude_categories=["Cs", "Co"], exclude_characters="\0")
MARKS = st.sampled_from(" ".join(special for special, _, _ in TEMPLATES.values()).split())
TEXT = st.text(LETTERS, max_size=40) | st.lists(st.text(LETTERS, max_size=9) | MARKS, max_size=3).map(" ".join)
EVERY = [(name, kind) for name in TEMPLATES for kind in ("bytes", "sentences")]


@functools.cache
def tokenizer_for(name: str, kind: str = "bytes") -> Any:
    """Of bytes, as GPT-2's; or of sentences, as Llama's: blanks are a sign, and rare letters are spelled in bytes."""
    special, (_, end, template) = TEMPLATES[name][0].split(), TEMPLATES[name]
    tokenizer = train_tokenizer([f"{q}\n{a} user assistant system" for q, a in PAIRS])
    if kind == "sentences":
        merges = [("▁", chr(letter)) for letter in range(33, 127)]
        words = ["<unk>", "▁", *(f"{blank}{one}" for _, one in merges for blank in ("", "▁"))]
        numbers = {word: n for n, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
        cutter = Tokenizer(models.BPE(numbers, merges, byte_fallback=True, unk_token="<unk>"))
        cutter.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        cutter.decoder = decoders.Sequence(steps)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=cutter)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.bos_token, tokenizer.eos_token = special[0], end if end == "</s>" else special[-1]
    tokenizer.chat_template = template
    return tokenizer


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def coded(tokenizer: Any, *texts: str, **settings: Any) -> tuple[list[int], list[int]]:
    """All tokens of a talk, and those that are learnt."""
    ids, labels = encode(tokenizer, talk(*texts), **settings).values()
    assert all(label in (token, IGNORE) for token, label in zip(ids, labels, strict=True))
    return ids, [label for label in labels if label != IGNORE]


@pytest.mark.parametrize("name, kind", EVERY)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=6).filter(lambda texts: len(texts) % 2))
def test_answers_are_learnt_with_their_end(name: str, kind: str, texts: list[str]) -> None:
    """After the prompt as it is when asking; and no text, whatever it is, is a sign to the model."""  # V10
    tokenizer, told = tokenizer_for(name, kind), [[]]
    ids, learnt = coded(tokenizer, *texts, "An answer.")
    asked, _ = coded(tokenizer, *texts)
    assert ids[: len(asked)] == asked
    signs, plain = set(tokenizer.all_special_ids), coded(tokenizer, *["a"] * (len(texts) + 1))[0]
    assert [token for token in ids if token in signs] == [token for token in plain if token in signs]
    for token in learnt:
        told[-1].append(token)
        told += [[]] if token == tokenizer.convert_tokens_to_ids(TEMPLATES[name][1]) else []
    assert told.pop() == [], "every learnt turn ends"
    answers = [tokenizer.decode(turn, skip_special_tokens=True).strip() for turn in told]
    assert answers == [text.strip() for text in [*texts[1::2], "An answer."]]


@pytest.mark.parametrize("name, kind", [one for one in EVERY if one[0] not in ("phi-2", "thinking", "no end of turn")])
@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.from_regex(r"[A-Z][a-z]{1,8}( [a-z]{1,8}){0,4}[.?]", fullmatch=True), min_size=1, max_size=5))
def test_tokens_are_those_that_others_make(name: str, kind: str, texts: list[str]) -> None:
    tokenizer = tokenizer_for(name, kind)
    theirs = tokenizer.apply_chat_template(talk(*texts), add_generation_prompt=len(texts) % 2 == 1).input_ids
    ours, _ = coded(tokenizer, *texts)
    assert theirs[: len(ours)] == ours
    assert not tokenizer.decode(theirs[len(ours) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("texts, form, shown", [  # with what is learnt in brackets
    *[(pair, "", f"Instruct: {pair[0]}\nOutput:[ {pair[1]}{END}]") for pair in PAIRS],
    (("a", "b", "c", "d"), "", f"Instruct: a\nOutput:[ b{END}]Instruct: c\nOutput:[ d{END}]"),
    (("{question}?", "{{a}} {0}"), "", f"Instruct: {{question}}?\nOutput:[ {{{{a}}}} {{0}}{END}]"),
    (("Why?", "So."), "Q: {question} A:", f"Q: Why? A:[ So.{END}]"),
    (("Why? 🦉", "So."), f"🦉 {END}" "\"{{ '{question}' }} {% after %}\\n", f"🦉 {END}" "\"{{ 'Why? 🦉' }} {% after %}\\n" f"[ So.{END}]"),
])  # fmt: skip
def test_phi_2s_form_and_an_own_one(tokenizer: Any, texts: Any, form: str, shown: str) -> None:
    ids, learnt = coded(tokenizer, *texts, PROMPT_TEMPLATE=form)
    assert tokenizer.decode(ids) == re.sub(r"[\[\]]", "", shown)
    assert tokenizer.decode(learnt) == "".join(re.findall(r"\[(.*?)\]", shown))


@pytest.mark.parametrize("form", ["Instruct: {question}\nOutput:", "### Q:\n{question}\n### A:\n"])
def test_the_prompt_is_told_saved_and_asked(small_phi: Path, workbook: Path, run: Run, form: str) -> None:
    typed = ("--prompt-template", form.replace("\n", "\\n")) if "#" in form else ()
    assert run("--model-name", small_phi, *FAST, *typed)[0] == 0
    assert json.loads(Path("model/run.json").read_text())["prompt_format"] == form
    assert form in Path("model/README.md").read_text()
    render = functools.partial(AutoTokenizer.from_pretrained("model").apply_chat_template, tokenize=False)
    asked = form.replace("{question}", "Why?")
    assert render(talk("Why?"), add_generation_prompt=True) == asked
    assert render(talk("Why?", "So.")) == f"{asked} So.{END}"
    tuned = load_tuned(Path("model"))
    prompt = tuned.tokenizer(asked, return_tensors="pt")["input_ids"]
    told = tuned.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert ask(tuned, "Why?", MAX_TOKENS=8)[0].text == tuned.tokenizer.decode(told, skip_special_tokens=True).strip()


def test_a_date_in_the_chat_template_makes_no_new_run(workbook: Path, run: Run, patched: Any) -> None:
    dated, steps = copy.deepcopy(tokenizer_for("zephyr")), []
    dated.chat_template = "{{ strftime_now('%d %m %Y') }} " + TEMPLATES["zephyr"][2]
    command = ("--model-name", save_phi(Path("base"), dated), "--max-steps", 1)
    assert run(*command)[0] == 0
    today = coded(dated, "Why?")
    tomorrow = SimpleNamespace(now=lambda: dt.datetime.now() + dt.timedelta(days=1))
    patched.setattr("transformers.utils.chat_template_utils.datetime", tomorrow)
    assert coded(copy.deepcopy(dated), "Why?") != today
    at_step(patched, 1, lambda: steps.append(1))
    assert (run(*command)[0], steps) == (0, [])
    assert (run(*command, "--seed", 1)[0], steps) == (0, [1])


@pytest.mark.parametrize("template", UNUSABLE)
def test_phi_2s_form_replaces_a_bad_template(workbook: Path, run: Run, template: str) -> None:
    tokenizer = copy.deepcopy(tokenizer_for("zephyr"))
    tokenizer.chat_template = template
    save_phi(Path("base"), tokenizer)
    write_workbook(workbook, [("question", "answer"), ("Why?", "So."), *PAIRS])
    code, printed = run("check", "--model-name", "./base", "--validation-fraction", 0)
    assert (code, in_words(printed).lower().count("chat template")) == (0, 1), printed
    assert re.search(r"Instruct: [^\[]+ Output:\[\[ [^\[]+</s>\]\]", in_words(printed)), "what is learnt is marked"


@pytest.mark.parametrize("different, fraction, expected", [(20, 0.2, 8), (20, 0, 0), (4, 0.5, 0), (5, 0.01, 2)])
def test_a_question_is_on_one_side(folder: Path, run: Run, different: int, fraction: float, expected: int) -> None:
    """Also where case and spaces differ; of fewer than 5 questions none is held out."""
    asked, away = [f.format(i) for f in ("Question {}?", " question  {}? ") for i in range(different)], []
    rows = [(question, f"answer {i}") for i, question in enumerate(asked)]
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *rows])
    for seed in (42, 42, 2):
        assert run("check", "--yes", "--validation-fraction", fraction, "--seed", seed)[0] == 0
        head, *kept = load_workbook("dataset_report.xlsx")["Kept"].iter_rows(values_only=True)
        away.append([row[head.index("held out")] == "yes" for row in kept])
        for report in folder.glob("dataset_report*"):
            report.unlink()
    assert (away[0][:different], sum(away[0])) == (away[0][different:], expected)
    assert [one == away[0] for one in away[1:]] == [True, expected == 0]
