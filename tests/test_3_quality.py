"""Section 3: which rows look wrong, which only seem to, and what share is fit to learn from."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from conftest import END
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

LONG_TEXT = (
    "The learning rate decides how far the weights move in one step; too large a rate makes the loss "
    "jump about, too small a rate makes the training slow, and a schedule lowers it towards the end."
)


def pair(*texts: str, row: int = 2) -> ft.Pair:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return ft.Pair(messages, "", row)


def pairs(*rows: tuple[str, ...]) -> list[ft.Pair]:
    return [pair(*texts, row=row) for row, texts in enumerate(rows, start=2)]


def findings(*rows: tuple[str, ...]) -> list[list[str]]:
    return ft.quality_of(pairs(*rows), []).findings


# -- One pair

FLAWED = {
    "left-over HTML": [
        ("How do I go on?", "First.<br>Second."),
        ("How do I go on?", "<p class='x'>First</p>"),
        ("How do I go on?", "First&nbsp;second"),
        ("What&#39;s up?", "Not much."),
        ("What&#x27;s up?", "Not much."),
        ("Where?", "<A HREF = 'x'>here</A>"),
        ("Where is it?", "<html><body>There</body></html>"),
        ("Where is it?", "There.", "And then?", "Then<br/>there."),
    ],
    "broken letters": [
        ("Where is the cafÃ©?", "There."),
        ("What is it?", "Itâ€™s a trap"),
        ("What is it?", "It\u00e2\u0080\u0099s a trap"),
        ("What is it?", "10Â\xa0kg"),
        ("What is it?", "caf\ufffd"),
        ("ï»¿What is it?", "A mark of the byte order."),
        ("Что это?".encode().decode("cp1252", "replace").replace("\ufffd", ""), "A word"),
        ("Что такое".encode().decode("latin-1"), "A word"),
        ("Czy to maÅ‚y kot?", "Tak."),
        ("你好吗".encode().decode("latin-1"), "Well"),
        ("Why so sad?", "ðŸ˜€ because"),
    ],
    "control marks of a model": [
        ("What is next?", f"The end.{END}"),
        ("<|im_start|>user", "Hello there"),
        ("What is next?", "The end.</s>"),
        ("[INST] What is next? [/INST]", "The end."),
        ("What is next?", "The end.<end_of_turn>"),
        ("Instruct: What is next?", "The end."),
        ("What is next?", "Well:\nOutput: the end."),
    ],
    "placeholder text": [
        ("What is next?", text)
        for text in (
            *(
                "TODO",
                "todo",
                "TBD",
                "N/A",
                "n.a.",
                "???",
                "...",
                "…",
                "xxx",
                "XXXX",
                "Test",
                "[TBD]",
            ),
            *(
                "Lorem ipsum dolor sit amet, " * 9,
                "Your answer here",
                "<insert the answer here>",
                "--",
            ),
        )
    ],
    "a question without a word": [
        ("Hi", "Hello there"),
        ("?!", "What?"),
        ("A:", "Yes."),
        ("7", "no"),
    ],
    "an answer of one letter": [("Which option?", text) for text in ("B", "c)", "(D).", "д")],
    "an answer that repeats its question": [
        ("What is up?", "What is up?"),
        ("What is up?", "  WHAT is\nup? "),
        ("Hello there", "Well", "What is up", "what is up"),
    ],
    "very unequal lengths": [
        ("What is it?", "word " * 401),
        ("word " * 500, "Yes, it is."),
    ],
}


@pytest.mark.parametrize(
    "kind, texts", [(kind, texts) for kind, cases in FLAWED.items() for texts in cases]
)
def test_a_flaw_is_found_and_no_other(kind: str, texts: tuple[str, ...]) -> None:
    assert findings(texts) == [[kind]]


FINE = [
    # HTML that is meant, and what only looks like it
    ("How do I break a line in HTML?", "With <br> where the line ends."),
    ("How do I break a line?", "With `<br>` where the line ends, or `&nbsp;`."),
    ("What does this print?", "```\n<p>Hello</p>\n```"),
    ("When is it true?", "When a <b and c> d, or x<i."),
    ("Which type is it?", "A List<String> or a vector<T>; T&C apply; AT&T; R&D;"),
    # letters that are right
    ("Où est le café «À»?", "Là, dit-elle : « voilà\xa0»… été…”"),
    ("Was heißt „Spaß“ auf Englisch?", "„Fun“, nicht „Äpfel“."),
    ("Quanto é NÃO e SÃO?", "“MAÇÃ”, “Amanhã”: Â é uma letra; câmara às 10."),
    ("Что такое ВВП и ПИБ?", "Это валовой внутренний продукт."),
    ("Τι είναι αυτό;", "Είναι μια ερώτηση."),
    ("Ano â Ấn Độ có gì?", "HÂN HOAN, VÂN VÂN"),
    ("What is 3×5 – and 3x×2?", "15 · 6 ± 0 §1 ©2024 €5"),
    # real answers that are short
    *(
        ("What does it print?", text)
        for text in ("None", "NA", "null", "4", "42", "No", "是", "네", "+")
    ),
    ("What is a TODO list?", "A list of things to do: TODO, TBD and so on."),
    ("Testing what?", "A test of the waters"),
    ("What is lorem ipsum?", "A text that fills space. Lorem ipsum dolor sit amet."),
    # questions that are short
    ("人？", "A person"),
    ("क्या?", "What in Hindi"),
    ("2+2", "Four"),
    ("Why", "So be it"),
    # marks that are no control marks
    ("Where is the output: here?", "The output: there. Then Instruct: is a word, a <| b |> c too"),
    ("What is [INSTALL]?", "A list[str] and <start> or <endless>"),
    # lengths
    ("What is it?", "word " * 199),
    ("word " * 300, "word " * 7),
]


@pytest.mark.parametrize("texts", FINE)
def test_what_only_seems_wrong_is_left_in_peace(texts: tuple[str, str]) -> None:
    assert findings(texts) == [[]]


@pytest.mark.parametrize("text", FLAWED["placeholder text"])
def test_no_flag_changes_what_is_taught(text: tuple[str, str]) -> None:
    found = pairs(text)
    before = json.dumps(found)
    ft.quality_of(found, [])
    assert json.dumps(found) == before


def test_every_flaw_comes_with_advice() -> None:
    assert set(FLAWED) < set(ft.ADVICE)
    quality = ft.quality_of(pairs(("Why?", "So."), ("Why?", "No."), ("Why?", "So!")), [])
    assert set(quality.parts) | set(FLAWED) == set(ft.ADVICE)


# -- Pairs beside each other


@pytest.mark.parametrize(
    "other",
    [
        ("What is overfitting", "Learning by heart."),
        ("what is OVER-fitting?!", "“Learning by heart”"),
        ("What is over fitting?", "Learning, by heart"),
        ("What is overﬁtting?", "`Learning` by **heart**"),
    ],
)
def test_the_same_letters_make_a_near_copy(other: tuple[str, str]) -> None:
    found = findings(("What is overfitting?", "Learning by heart."), other)
    assert sorted(map(len, found)) == [0, 1]
    assert re.fullmatch("nearly a copy of row [23]", found[0][0] if found[0] else found[1][0])


@pytest.mark.parametrize("old, new", [("jump", "leap"), ("towards", "near"), ("The", "This")])
def test_nearly_the_same_words_make_a_near_copy(old: str, new: str) -> None:
    found = findings(("What is it?", LONG_TEXT), ("What is it?", LONG_TEXT.replace(old, new)))
    assert sorted(map(len, found)) == [0, 1]


def test_a_chinese_text_is_compared_by_its_signs() -> None:
    text = "学习率决定了每一步权重移动的距离太大损失会跳动太小训练会很慢所以我们在训练快结束时把它降低一些"
    found = findings(("什么是学习率？", text), ("什么是学习率？", text.replace("些", "点")))
    assert sorted(map(len, found)) == [0, 1]


@pytest.mark.parametrize(
    "one, other",
    [
        (("What is C?", "A language."), ("What is C#?", "A language.")),
        (("What is C?", "A language."), ("What is C++?", "A language.")),
        (("Is it so?", "👍"), ("Is it thus?", "👎")),
        (("Is 3 > 2 so?", "Yes"), ("Is 3 < 2 so?", "Yes")),
        (("इस की बात", "हाँ जी"), ("इस का बात", "हाँ जी")),
        (("What is it?", LONG_TEXT + " 2023"), ("How is it?", LONG_TEXT + " 2024")),
        (("What is it?", LONG_TEXT), ("What was it?", LONG_TEXT[:100])),
        (("How is it?", "Fine."), ("How was it?", "Fine.")),
        (("?!?", "42 is"), ("!!! Who", "!")),
    ],
)
def test_pairs_that_differ_in_what_counts_are_no_near_copies(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    assert "nearly a copy" not in str(findings(one, other))


def test_two_answers_to_one_question_are_both_named() -> None:
    found = findings(("Why is that?", "So."), ("How is that?", "So."), ("why  is THAT?", "No way."))
    assert found == [
        ["another answer to the question of row 4"],
        [],
        ["another answer to the question of row 2"],
    ]


def test_the_same_question_within_a_conversation_is_no_contradiction() -> None:
    found = findings(("Why is that?", "So."), ("Why is that?", "No way.", "Really?", "Yes."))
    assert found == [[], []]


def test_a_row_of_another_file_is_named_with_it() -> None:
    one, other = pairs(("Why is that?", "So."), ("Why is that?", "No way."))
    found = ft.quality_of([one._replace(sheet="a.csv"), other._replace(sheet="b.csv")], []).findings
    assert found[0] == ["another answer to the question of row 3 of b.csv"]
    assert found[1] == ["another answer to the question of row 2 of a.csv"]


# -- The score


def test_the_score_is_the_share_of_rows_without_a_finding() -> None:
    kept = pairs(("Why is that?", "So."), ("Hi", "B"), ("Who is that?", "Me."))
    reasons = ["blank", "the language is de, not en", "no answer", "a copy of row 2"]
    dropped = [ft.Note("", 9 + i, reason) for i, reason in enumerate(reasons)]
    quality = ft.quality_of(kept, dropped)
    assert (quality.good, quality.counted, quality.score) == (2, 5, 0.4)
    assert {kind: [note.row for note in notes] for kind, notes in quality.parts.items()} == {
        "a question without a word": [3],
        "an answer of one letter": [3],
        "no answer": [11],
        "a copy of an earlier row": [12],
    }


def test_of_no_rows_there_is_no_quality() -> None:
    quality = ft.quality_of([], [ft.Note("", 2, "blank")])
    assert (quality.counted, quality.score) == (0, 1.0)
    assert ft.quality_record(quality)["score"] is None


def test_a_score_is_never_rounded_up() -> None:
    quality = ft.quality_of(
        pairs(*((f"What is {i}?", f"It is {i}.") for i in range(999)), ("Hi", "So")), []
    )
    assert ft.quality_in_words(quality) == "0.99"


WORDS = st.sampled_from("what is the red blue rate TODO <br> B ? 2 cafÃ© Hi 人".split())
TEXT = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(TEXT, TEXT), max_size=12, unique_by=lambda row: tuple(map(ft.fold, row))
    ),
    seed=st.integers(0, 99),
)
def test_the_order_of_the_rows_decides_nothing(rows: list[tuple[str, str]], seed: int) -> None:
    kept = pairs(*rows)
    dropped = [ft.Note("", 100 + i, "no answer") for i in range(seed % 3)]
    quality = ft.quality_of(kept, dropped)
    assert 0 <= quality.score <= 1
    random.Random(seed).shuffle(kept)
    other = ft.quality_of(kept, dropped)
    assert (other.good, other.counted) == (quality.good, quality.counted)
    counts = [{kind: len(notes) for kind, notes in one.parts.items()} for one in (quality, other)]
    assert counts[0] == counts[1]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, 10_000), min_size=1, max_size=40, unique=True))
def test_clean_data_is_flawless(rows: list[int]) -> None:
    quality = ft.quality_of(
        pairs(*((f"What is {i} plus one?", f"It is {i + 1}.") for i in rows)), []
    )
    assert (quality.score, quality.parts) == (1, {})


# -- What is left out, and what is taught


@pytest.mark.parametrize(
    "nothing", ["\u200b", "\u200b\u00a0\u2060", "\ufeff", "\u3164", "\u00ad", "\u0301"]
)
def test_a_row_without_anything_to_see_is_left_out(nothing: str, folder: Path) -> None:
    rows = [("Why?", "So."), ("How?", nothing), (nothing, "Thus."), ("", ""), ("Who?", "Me.")]
    text = "\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")
    found = ft.find_pairs(ft.Config(DATASET_PATH="data.jsonl"))
    assert [(note.row, note.reason) for note in found.dropped] == [
        (2, "no answer"),
        (3, "no question"),
        (4, "blank"),
    ]


def test_a_blank_row_among_conversations_is_blank(folder: Path) -> None:
    talk = json.dumps(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    )
    rows = [("messages",), (talk,), ("",), (talk.replace("So", "No"),)]
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.active["B3"] = None
    book.save("talks.xlsx")
    found = ft.find_pairs(ft.Config(DATASET_PATH="talks.xlsx"))
    assert [(note.row, note.reason) for note in found.dropped] == [(3, "blank")]


LETTERS = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t")
ANSWER = st.text(LETTERS, min_size=1, max_size=40).map(
    lambda text: f"def f():\n    if x:\n\treturn {text}\n\n  end"
)


@settings(max_examples=40, deadline=None)
@given(answer=ANSWER, kind=st.sampled_from(["xlsx", "jsonl"]))
def test_an_answer_is_taught_exactly_as_it_is_written(
    answer: str, kind: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    answer = re.sub("_x[0-9A-Fa-f]{4}_|[\ufffe\uffff]", "", answer)  # XML has none of these
    path = tmp_path_factory.mktemp("exact") / f"data.{kind}"
    rows = [("question", "answer"), ("What is it?", f" {answer}\n")]
    if kind == "xlsx":
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)
    else:
        path.write_text(json.dumps(dict(zip(*rows, strict=True))), encoding="utf-8")
    found = ft.find_pairs(ft.Config(DATASET_PATH=str(path)))
    example = ft.encode(tokenizer, found.kept[0].messages)
    learnt = [label for label in example["labels"] if label != ft.IGNORE]
    assert tokenizer.decode(learnt) == f" {answer}{END}"
