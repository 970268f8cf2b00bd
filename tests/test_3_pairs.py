"""Section 3: from any table that people have to the pairs they meant, or to a clear question."""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import random
import re
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from conftest import in_words, write_workbook
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
Texts = list[tuple[str, str]]
HEADER = ("question", "answer")
TWO = [("Why?", "So."), ("How?", "Thus.")]


def read(path: Path, **changes: Any) -> ft.Pairs:
    return ft.find_pairs(ft.Config(DATASET_PATH=str(path), **changes))


def texts(pairs: ft.Pairs) -> Texts:
    return [(pair.question, pair.answer) for pair in pairs.kept]


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(ft.UserError) as refused:
        read(path, **changes)
    return in_words(str(refused.value))


def csv_text(rows: Sequence[Sequence[object]], **dialect: Any) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue()


def workbook_of(rows: Sequence[Sequence[object]]) -> bytes:
    book, content = openpyxl.Workbook(), io.BytesIO()
    for row in rows:
        book.active.append(row)
    for cell in itertools.chain(*book.active.iter_rows()):
        cell.data_type = "s"  # "=2" is a text here, not a formula
    book.save(content)
    return content.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, part in files.items():
            archive.writestr(name, part)
    return content.getvalue()


def parts_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def replace_inside(path: Path, old: bytes, new: bytes) -> None:
    """Make in a workbook what openpyxl does not write."""
    parts = parts_of(path.read_bytes())
    path.write_bytes(zip_of({name: part.replace(old, new) for name, part in parts.items()}))


@pytest.fixture
def sheet(folder: Path) -> Callable[..., Path]:
    """Write a workbook from rows."""
    return lambda *rows, **more: write_workbook(folder / "dataset.xlsx", rows, **more)


@pytest.fixture
def table(folder: Path) -> Callable[[str | bytes], Path]:
    """Write a text table from its content."""

    def table(content: str | bytes) -> Path:
        path = folder / "dataset.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return table


# -- The same pairs, whatever the file looks like

TRICKY = [
    ("What is 1,5; or 1|5?", "One\tand a half"),
    ("Two\n  lines?", 'He said "two".'),
    ("Où ça?", "{{name}}, là-bas"),
    ("None?", "None"),
    ("Agent?", "007"),
]
ROWS = [HEADER, *TRICKY]
TABLES = {
    "comma": csv_text(ROWS),
    "semicolon": csv_text(ROWS, delimiter=";"),
    "tab": csv_text(ROWS, delimiter="\t"),
    "bar": csv_text(ROWS, delimiter="|"),
    "all in quotes": csv_text(ROWS, quoting=csv.QUOTE_ALL),
    "a space behind the comma": csv_text(ROWS, quoting=csv.QUOTE_ALL).replace('","', '", "'),
    "line ends of Unix": csv_text(ROWS, lineterminator="\n"),
    "line ends of an old Mac": csv_text(ROWS, lineterminator="\r", quoting=csv.QUOTE_ALL),
    "byte order mark": csv_text(ROWS).encode("utf-8-sig"),
    "UTF-16 from Excel": csv_text(ROWS, delimiter="\t").encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + csv_text(ROWS).encode("utf-16-be"),
    "Windows-1252": csv_text(ROWS, delimiter=";").encode("cp1252"),
    "no line end at the end": csv_text(ROWS).rstrip(),
    "blank lines at the end": csv_text(ROWS) + "\r\n\r\n",
    "a comma behind every row": csv_text([(*row, "") for row in ROWS]),
}


@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES)
def test_every_kind_of_text_table_gives_the_same_pairs(
    content: str | bytes, table: Callable[..., Path]
) -> None:
    pairs = read(table(content))
    assert texts(pairs) == TRICKY
    assert pairs.table.header[:2] == [*HEADER]


def test_a_separator_inside_texts_is_not_taken_for_the_separator(
    table: Callable[..., Path],
) -> None:
    rows = [(f"Which {i}?", "this, " * i + "or; that") for i in range(1, 6)]
    path = table(csv_text([HEADER, *rows], quoting=csv.QUOTE_ALL).replace('","', '", "'))
    assert texts(read(path)) == rows


def test_a_workbook_gives_the_same_pairs(sheet: Callable[..., Path]) -> None:
    assert texts(read(sheet(*ROWS))) == TRICKY


def test_content_decides_and_not_the_ending(folder: Path, sheet: Callable[..., Path]) -> None:
    sheet(*ROWS).rename(folder / "book.csv")
    (folder / "text.xlsx").write_text(TABLES["comma"], encoding="utf-8", newline="")
    assert texts(read(folder / "book.csv")) == texts(read(folder / "text.xlsx")) == TRICKY


def test_a_guessed_encoding_is_said(
    table: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    read(table(TABLES["Windows-1252"]))
    assert "Windows-1252" in capsys.readouterr().out
    read(table(TABLES["semicolon"]))
    assert capsys.readouterr().out == ""


def test_an_answer_may_be_longer_than_the_csv_module_likes(table: Callable[..., Path]) -> None:
    rows = [("Long?", "word " * 50_000 + "end"), ("Short?", "Yes")]
    assert texts(read(table(csv_text([HEADER, *rows], delimiter=";")))) == rows


def test_line_ends_of_windows_inside_an_answer_become_plain(table: Callable[..., Path]) -> None:
    path = table(b'question,answer\r\nWhy?,"One\r\ntwo"\r\nHow?,Thus\r\n')
    assert texts(read(path)) == [("Why?", "One\ntwo"), ("How?", "Thus")]


@pytest.mark.parametrize(
    "written, seen",
    [
        ("None", "None"),
        ("NA", "NA"),
        ("nan", "nan"),
        ("null", "null"),
        ("007", "007"),
        (7, "7"),
        (7.0, "7"),
        (0.1, "0.1"),
        (-3, "-3"),
        (10**12, "1000000000000"),
        (True, "TRUE"),
        (False, "FALSE"),
        (datetime.date(2024, 3, 5), "2024-03-05"),
        (datetime.datetime(2024, 3, 5), "2024-03-05"),
        (datetime.datetime(2024, 3, 5, 14, 30), "2024-03-05 14:30:00"),
        (datetime.time(14, 30), "14:30:00"),
        ("It ends at 00:00:00", "It ends at 00:00:00"),
    ],
)
def test_a_cell_of_any_type_is_read_as_it_looks(
    written: object, seen: str, sheet: Callable[..., Path]
) -> None:
    path = sheet(HEADER, ("What?", written), ("Why?", "So."))
    assert texts(read(path)) == [("What?", seen), ("Why?", "So.")]


def test_a_computed_number_is_read_as_it_looks(sheet: Callable[..., Path]) -> None:
    path = sheet(HEADER, ("0.1 + 0.2?", 0.625), TWO[1])
    replace_inside(path, b"<v>0.625</v>", b"<v>0.30000000000000004</v>")
    assert texts(read(path)) == [("0.1 + 0.2?", "0.3"), TWO[1]]


def test_a_carriage_return_in_a_workbook_is_no_text(sheet: Callable[..., Path]) -> None:
    path = sheet(HEADER, ("Why?", "One@two"), TWO[1])
    replace_inside(path, b"@", b"_x000D_\n")
    assert texts(read(path)) == [("Why?", "One\ntwo"), TWO[1]]


def test_a_text_table_has_no_escapes(table: Callable[..., Path]) -> None:
    rows = [("Its name?", "Document_x0020_Title"), ("Why?", "_xD83D_")]
    assert texts(read(table(csv_text([HEADER, *rows])))) == rows


def test_of_a_formula_the_result_is_read(sheet: Callable[..., Path]) -> None:
    path = sheet(HEADER, ("1 + 1?", "=1+1"), TWO[1])
    replace_inside(path, b"</f>", b"</f><v>2</v>")
    assert texts(read(path)) == [("1 + 1?", "2"), TWO[1]]


@pytest.mark.parametrize("error", ["#N/A", "#REF!", "#DIV/0!"])
def test_a_failed_formula_is_no_answer(error: str, sheet: Callable[..., Path]) -> None:
    pairs = read(sheet(HEADER, ("What?", error), *TWO))  # openpyxl writes these as errors
    assert texts(pairs) == TWO
    assert [(note.row, note.reason) for note in pairs.dropped] == [(2, "no answer")]


@pytest.mark.parametrize("claimed", [b"A1", b"A1:B2", b"A1:A6"])
def test_a_workbook_that_claims_to_be_smaller_is_read_whole(
    claimed: bytes, sheet: Callable[..., Path]
) -> None:
    path = sheet(*ROWS)
    replace_inside(path, b'ref="A1:B6"', b'ref="' + claimed + b'"')
    assert texts(read(path)) == TRICKY


@pytest.mark.parametrize("kind", ["xlsx", "csv"])
@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return 1\n\n    # end",
        "a  b\t\tc",
        "{question} {{name}} %s %(x)s $HOME \\n",
        "日本語 עברית العربية हिन्दी",
        "👩‍👩‍👧 e\u0301 \u200bﬁ",
        "<|endoftext|>",
        "=2+2 is a sum",
        "a\u2028b\u00a0c",
    ],
)
def test_a_text_is_kept_to_the_letter(
    kind: str, text: str, sheet: Callable[..., Path], table: Callable[..., Path]
) -> None:
    rows = [HEADER, (f"Q {text}", f"A {text}"), (f" \n\tQ2 {text}\n ", f"\u00a0A2 {text} \n")]
    path = sheet(*rows) if kind == "xlsx" else table(csv_text(rows))
    assert texts(read(path)) == [(f"Q {text}", f"A {text}"), (f"Q2 {text}", f"A2 {text}")]


# -- Rows that are left out

MESSY: list[tuple[Any, ...]] = [
    (),
    (),
    ("question", "answer", "remark"),  # row 3
    ("Why?", "So.", "first"),
    (),
    ("Why?", "So.", "again"),
    (" WHY? ", "so.", ""),
    ("How?", "", ""),
    ("", "Thus.", ""),
    (" ", " ", "only a remark"),
    ("Why?", "For another reason.", ""),  # row 11
    ("Two\nlines?", "Yes", ""),
    ("Last?", "Yes", ""),
]
REASONS = {
    5: "blank",
    6: "a copy of row 4",
    7: "a copy of row 4",
    8: "no answer",
    9: "no question",
    10: "no question",
}


@pytest.mark.parametrize("kind", ["xlsx", "csv"])
def test_rows_left_out_have_their_numbers_and_reasons(
    kind: str, sheet: Callable[..., Path], table: Callable[..., Path]
) -> None:
    pairs = read(sheet(*MESSY) if kind == "xlsx" else table(csv_text(MESSY)))
    assert {note.row: note.reason for note in pairs.dropped} == REASONS
    assert [pair.row for pair in pairs.kept] == [4, 11, 12, 13]
    assert texts(pairs)[1:3] == [("Why?", "For another reason."), ("Two\nlines?", "Yes")]


def test_a_row_with_too_many_cells_is_left_out(table: Callable[..., Path]) -> None:
    pairs = read(table("question,answer\nWhy?,So.\nHow?,Thus, or so\nWho?,Me,\n"))
    assert texts(pairs) == [("Why?", "So."), ("Who?", "Me")]
    assert [(note.row, note.reason[:23]) for note in pairs.dropped] == [
        (3, "more cells than headers")
    ]


@pytest.mark.parametrize("rest", ["Who?,Me\n", 'Who?,"Me"\n'])
def test_a_quotation_mark_that_never_ends_swallows_no_rows(
    rest: str, table: Callable[..., Path]
) -> None:
    path = table(f'question,answer\nWhy?,So.\n"How is it,Thus.\nWhere?,Here\n{rest}')
    try:
        kept = texts(read(path))
    except ft.UserError as error:
        assert re.search(r"quotation mark .* row 3\b", in_words(str(error)))
    else:
        assert {("Why?", "So."), ("Where?", "Here"), ("Who?", "Me")} <= set(kept)


def test_what_is_said_names_columns_rows_and_reasons(
    sheet: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ft.say_pairs(read(sheet(*MESSY, *[("Open?", "")] * 10)))
    said = in_words(capsys.readouterr().out)
    assert 'dataset.xlsx, sheet "Sheet": 20 rows, 4 pairs' in said
    assert 'questions in "question", answers in "answer"' in said
    assert "row 4: Why? → So." in said
    assert "row 12: Two lines? → Yes" in said
    assert "2 × a copy of an earlier row: rows 6, 7" in said
    assert "1 × blank: row 5" in said
    assert "11 × no answer: rows 8, 14, 15, 16, 17, 18, 19, 20 and 3 more" in said


@pytest.mark.parametrize("extra", ["Input text", "passage"])
def test_columns_that_are_not_used_are_said(
    extra: str, sheet: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("Translate.", f"word {i}", f"Wort {i}") for i in range(5)]
    ft.say_pairs(read(sheet(("instruction", extra, "output", None), *rows)))
    assert f'not used: "{extra}"\n' in capsys.readouterr().out


def test_nothing_in_the_file_can_steer_the_terminal(
    table: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ft.say_pairs(read(table(csv_text([("question\x1b[31m", "answer\x07"), ("a\x1b[2J", "b")]))))
    assert capsys.readouterr().out.replace("\n", "").isprintable()


# -- Finding the header and the columns


@pytest.mark.parametrize(
    "question, answer",
    [
        ("question", "answer"),
        ("Questions", "ANSWERS"),
        ("  Question * ", "Answer:"),
        ("Customer question", "our_answer"),
        ("CustomerQuestion", "BestAnswer"),
        ("Prompt", "Completion"),
        ("instruction", "output"),
        ("input", "output"),
        ("user", "assistant"),
        ("Question\n(as asked)", "Answer"),
        ("soru", "cevap"),
        ("SORU", "CEVAP"),
        ("pergunta", "resposta"),
        ("Pregunta", "Respuesta"),
        ("¿Pregunta?", "Respuesta correcta"),
        ("Question", "Réponse"),
        ("QUESTION", "REPONSE"),
        ("Question", "Re\u0301ponse"),
        ("Frage", "Antwort"),
        ("domanda", "risposta"),
        ("vraag", "antwoord"),
        ("fråga", "svar"),
        ("spørgsmål", "svar"),
        ("kysymys", "vastaus"),
        ("pytanie", "odpowiedź"),
        ("otázka", "odpověď"),
        ("kérdés", "válasz"),
        ("întrebare", "răspuns"),
        ("Вопрос", "Ответ"),
        ("питання", "відповідь"),
        ("ερώτηση", "απάντηση"),
        ("问题", "答案"),
        ("問題", "解答"),
        ("質問", "回答"),
        ("질문", "답변"),
        ("سؤال", "جواب"),
        ("שאלה", "תשובה"),
        ("คำถาม", "คำตอบ"),
        ("pertanyaan", "jawaban"),
        ("swali", "jibu"),
        ("Câu hỏi", "Câu trả lời"),
        ("प्रश्न", "उत्तर"),
        ("প্রশ্ন", "উত্তর"),
        ("SORU", "YANIT"),
    ],
)
def test_headers_are_known_in_many_words_and_languages(
    question: str, answer: str, sheet: Callable[..., Path]
) -> None:
    rows = [(f"{i} it is said", f"{i} tell me") for i in range(4)]
    pairs = read(sheet((answer, question), *rows))  # by position alone it would be the other way
    assert texts(pairs) == [(question, answer) for answer, question in rows]
    assert pairs.columns.reason == "by name"


@pytest.mark.parametrize("header", [("Q", "A"), ("A", "Q")])
def test_q_and_a_are_headers_and_not_letters_of_columns(
    header: tuple[str, str], sheet: Callable[..., Path]
) -> None:
    pairs = read(sheet(header, *((f"{header[0]} {i}", f"{header[1]} {i}") for i in range(4))))
    assert texts(pairs) == [(f"Q {i}", f"A {i}") for i in range(4)]


@pytest.mark.parametrize(
    "decoy, content",
    [
        ("question_id", ["Q1", "Q2", "Q3", "Q4"]),
        ("QuestionId", [1, 2, 3, 4]),
        ("AnswerCount", [3, 1, 4, 1]),
        ("answer date", [datetime.date(2024, 1, day) for day in range(1, 5)]),
        ("Answer author", ["Ann", "Bob", "Cid", "Dan"]),
        ("Question No.", ["one", "two", "three", "four"]),
        ("wrong answer", ["No", "Never", "Nothing", "None"]),
        ("Kategorie", ["alpha", "beta", "gamma", "delta"]),
        ("notes", ["Is it?", "Was it?", "Will it?", "Can it?"]),
        ("", ["stray", None, None, None]),
    ],
)
def test_a_column_beside_the_two_is_not_mistaken_for_one(
    decoy: str, content: list[object], sheet: Callable[..., Path]
) -> None:
    rows = [(extra, f"Tell {i}", f"Told {i}") for i, extra in enumerate(content)]
    pairs = read(sheet((decoy, "question", "answer"), *rows))
    assert texts(pairs) == [row[1:] for row in rows]


@pytest.mark.parametrize(
    "decoy, content",
    [
        ("question_id", [f"Q{i}" for i in range(8)]),
        ("Question author", ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal"]),
        ("Abteilung", ["Verkauf", "Einkauf"] * 4),
        ("Nr", [*range(8)]),
        ("QuestionId", [f"Q{i}" for i in range(8)]),
    ],
)
def test_a_column_of_unknown_name_comes_before_one_of_ids_or_labels(
    decoy: str, content: list[object], sheet: Callable[..., Path]
) -> None:
    rows = [(extra, f"Tell {i}", f"Told {i}") for i, extra in enumerate(content)]
    assert texts(read(sheet((decoy, "Theirs", "answer"), *rows))) == [row[1:] for row in rows]


def test_a_long_header_names_nothing(sheet: Callable[..., Path]) -> None:
    header = ("Where the question came up first", "Theirs", "answer")
    path = sheet(header, *((f"At {i}", f"Say {i}", f"Said {i}") for i in range(4)))
    assert "more than one column" in refusal(path)


def test_unknown_headers_are_told_apart_by_what_asks(sheet: Callable[..., Path]) -> None:
    pairs = read(sheet(("Them", "Us"), *((f"It is {i}.", f"Is it {i}?") for i in range(4))))
    assert texts(pairs)[0] == ("Is it 0?", "It is 0.")
    assert pairs.columns.reason == "by content"


def test_one_known_header_is_enough(sheet: Callable[..., Path]) -> None:
    pairs = read(sheet(("Reply", "Theirs"), *((f"It is {i}.", f"Tell {i}.") for i in range(4))))
    assert texts(pairs)[0] == ("Tell 0.", "It is 0.")


@pytest.mark.parametrize(
    "header, named",
    [
        (("question", "answer", "answers"), ("answer", "answers")),
        (("Frage (de)", "Question (en)", "Antwort"), ("Frage (de)", "Question (en)")),
        (("x", "y", "z"), ("x", "y", "z")),
    ],
)
def test_where_several_columns_are_possible_the_person_is_asked(
    header: tuple[str, ...], named: tuple[str, ...], sheet: Callable[..., Path]
) -> None:
    path = sheet(header, *(tuple(f"{name} {i}" for name in header) for i in range(4)))
    message = refusal(path)
    assert "more than one column" in message
    assert "--question-column NAME --answer-column NAME" in message
    assert all(f"{name}: {name} 0" in message for name in named)
    assert texts(read(path, QUESTION_COLUMN=header[0], ANSWER_COLUMN=header[2]))[1] == (
        f"{header[0]} 1",
        f"{header[2]} 1",
    )


@pytest.mark.parametrize(
    "header, rows",
    [
        (("question",), [("Why?",), ("How?",)]),
        (("number", "price"), [(1, 2), (3, 4)]),
        (("question", "answer"), [("Why?", None), ("How?", None)]),
    ],
)
def test_where_no_columns_are_found_the_person_is_asked(
    header: tuple[str, ...], rows: list[tuple[object, ...]], sheet: Callable[..., Path]
) -> None:
    message = refusal(sheet(header, *rows))
    assert "no column of questions with a column of answers" in message
    assert "--question-column NAME --answer-column NAME" in message
    assert all(name in message for name in header)


def test_named_columns_win_over_better_names(sheet: Callable[..., Path]) -> None:
    path = sheet(("question", "answer", "Other", "Zweite"), ("q1", "a1", "o1", "z1"), list("qaoz"))
    pairs = read(path, QUESTION_COLUMN=" zweite", ANSWER_COLUMN="OTHER")
    assert texts(pairs) == [("z1", "o1"), ("z", "o")]
    assert pairs.columns.reason == "as set"
    assert texts(read(path, ANSWER_COLUMN="question", QUESTION_COLUMN="answer"))[0] == ("a1", "q1")
    assert texts(read(path, ANSWER_COLUMN="Other"))[0] == ("q1", "o1")


@pytest.mark.parametrize("role", ["question", "answer"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(
    role: str, sheet: Callable[..., Path]
) -> None:
    path = sheet(("Prompt", "Reply", "Notes"), ("q", "a", "n"), ("r", "b", "o"))
    message = refusal(path, **{f"{role.upper()}_COLUMN": "Promt"})
    assert f"no column 'Promt' (--{role}-column). Did you mean Prompt?" in message
    assert "Prompt, Reply, Notes" in message


@pytest.mark.parametrize(
    "preamble",
    [
        [("Export of 5 March",), ()],
        [(), ("FAQ",), (), ("All of them", "and more")],
        [("Our support team collected these rows for you, please do not pass them on",)],
        [("Questions and answers",), ()],
    ],
)
def test_a_header_below_a_title_is_found(
    preamble: list[tuple[str, ...]], sheet: Callable[..., Path]
) -> None:
    pairs = read(sheet(*preamble, HEADER, *TWO))
    assert texts(pairs) == TWO
    assert [pair.row for pair in pairs.kept] == [len(preamble) + 2, len(preamble) + 3]


@pytest.mark.parametrize(
    "preamble, question",
    [
        ([("Our FAQ",)], "Theirs"),
        ([], "What do our customers say to us on a usual day, in their own words, please"),
    ],
)
def test_a_header_with_the_named_columns_is_found(
    preamble: list[tuple[str, ...]], question: str, sheet: Callable[..., Path]
) -> None:
    path = sheet(*preamble, (question, "Ours"), *TWO)
    assert texts(read(path, QUESTION_COLUMN=question, ANSWER_COLUMN="Ours")) == TWO


def test_a_row_that_speaks_of_questions_and_answers_is_no_header(
    sheet: Callable[..., Path],
) -> None:
    rows = [("Hello?", "Hi there"), ("I have a question", "I will answer"), ("Coming?", "No")]
    assert texts(read(sheet(("Customer says", "We say"), *rows))) == rows


LONG = [(f"Tell me {'much ' * 15}about {thing}", f"Here is {thing}") for thing in ("A", "B")]


@pytest.mark.parametrize("rows", [TWO, LONG], ids=["it asks", "it is long"])
@pytest.mark.parametrize("kind", ["xlsx", "csv"])
def test_a_table_without_headers_is_read_from_its_first_row(
    kind: str, rows: Texts, sheet: Callable[..., Path], table: Callable[..., Path]
) -> None:
    pairs = read(sheet(*rows) if kind == "xlsx" else table(csv_text(rows)))
    assert texts(pairs) == rows
    assert [pair.row for pair in pairs.kept] == [1, 2]


def test_a_column_without_a_header_can_be_named_by_its_letter(sheet: Callable[..., Path]) -> None:
    path = sheet(("", "", "remark"), *((f"q {i}", f"a {i}", f"r {i}") for i in range(4)))
    assert "B: a 0" in refusal(path)
    assert texts(read(path, QUESTION_COLUMN="B", ANSWER_COLUMN="remark"))[0] == ("a 0", "r 0")


def test_a_letter_does_not_hide_the_header(sheet: Callable[..., Path]) -> None:
    path = sheet(("Our FAQ",), (), HEADER, *TWO)
    assert texts(read(path, QUESTION_COLUMN="A", ANSWER_COLUMN="b")) == TWO


@pytest.mark.parametrize("header", [("[question]", "[answer]"), ("{Question}", "{Answer}")])
def test_a_header_may_stand_in_brackets(
    header: tuple[str, str], table: Callable[..., Path]
) -> None:
    assert texts(read(table(csv_text([header, *TWO])))) == TWO


@pytest.mark.parametrize("index, letters", [(0, "A"), (25, "Z"), (26, "AA"), (16383, "XFD")])
def test_columns_are_lettered_as_in_a_spreadsheet(index: int, letters: str) -> None:
    assert ft.column_letter(index) == letters == openpyxl.utils.get_column_letter(index + 1)


# -- Several sheets


def test_of_several_sheets_with_the_same_pairs_one_is_used(
    sheet: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = read(sheet(HEADER, *TWO, Copy=[HEADER, *TWO], Old=[HEADER, TWO[0]], Empty=[]))
    assert texts(pairs) == TWO
    assert (pairs.table.sheet, pairs.other_sheets) == ("Sheet", ["Copy", "Old"])
    ft.say_pairs(pairs)
    assert "sheets that are not used: Copy, Old" in in_words(capsys.readouterr().out)


def test_the_sheet_with_the_most_pairs_is_used(sheet: Callable[..., Path]) -> None:
    pairs = read(sheet(HEADER, TWO[0], Full=[(), HEADER, *TWO]))
    assert (pairs.table.sheet, texts(pairs)) == ("Full", TWO)
    assert [(pair.sheet, pair.row) for pair in pairs.kept] == [("Full", 3), ("Full", 4)]


def test_a_sheet_without_pairs_is_no_hindrance(sheet: Callable[..., Path]) -> None:
    path = sheet(("Read me first",), ("and then go on",), Prices=[("id", "price"), (1, 2)], QA=ROWS)
    assert texts(read(path)) == TRICKY
    assert texts(read(path, QUESTION_COLUMN="question", ANSWER_COLUMN="answer")) == TRICKY


@pytest.mark.parametrize(
    "other",
    [
        ("Who", "What"),
        ("Question", "Who changed it"),
        ("Title", "Body"),
    ],
)
def test_a_sheet_of_questions_is_used_before_a_longer_one_of_something_else(
    other: tuple[str, str], sheet: Callable[..., Path]
) -> None:
    log = [other, *((f"person {i}", f"changed cell {i}") for i in range(9))]
    assert texts(read(sheet(HEADER, *TWO, Changes=log))) == TWO


def test_a_workbook_with_drop_down_lists_is_read_without_a_murmur(
    sheet: Callable[..., Path], recwarn: pytest.WarningsRecorder
) -> None:
    path = sheet(*ROWS)
    lists = b'<extLst><ext uri="{CCE6A557-97BC-4b89-ADB6-D9C93CAAB3DF}"/></extLst></worksheet>'
    replace_inside(path, b"</worksheet>", lists)
    assert texts(read(path)) == TRICKY
    assert [str(warning.message) for warning in recwarn] == []


# -- Files that hold no pairs

WORKBOOK = workbook_of(ROWS)


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "holds no rows"),
        (b"\n\n ,\n", "holds no rows"),
        (b"question,answer\n", "holds no rows"),
        (b"question,answer\n\n,\n", "holds no rows"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "damaged"),
        (WORKBOOK[:-1000], "damaged"),
        (WORKBOOK[:100], "damaged"),
        (zip_of({"word/document.xml": b"<w/>"}), "a Word document"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0", "a picture"),
        (b"%PDF-1.7\n\xe2\xe3\0", "a PDF"),
        (b"\x7fELF\0\0\0", "neither a workbook nor a text"),
        (b"Just a letter that somebody wrote.\nIt goes on.\n", "no column of questions"),
    ],
)
@pytest.mark.parametrize("name", ["dataset.xlsx", "dataset.csv"])
def test_a_file_without_pairs_is_refused_with_the_reason(
    name: str, content: bytes, told: str, folder: Path
) -> None:
    (folder / name).write_bytes(content)
    message = refusal(Path(name))
    assert told in message
    assert name in message


def test_a_workbook_without_rows_is_refused(sheet: Callable[..., Path]) -> None:
    assert "holds no rows" in refusal(sheet(HEADER, More=[(), (" ",)]))


# -- How many pairs are enough


@pytest.fixture
def local_tokenizer(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr(ft, "load_tokenizer", lambda cfg: tokenizer)


@pytest.mark.parametrize("rows", [[TWO[0]], [TWO[0], TWO[0], ("How?", "")]])
def test_one_pair_is_too_few(
    rows: Texts, sheet: Callable[..., Path], run: Run, local_tokenizer: None
) -> None:
    sheet(HEADER, *rows)
    code, text = run("train")
    assert code == 2
    assert "has 1 pairs to learn from; at least 2 are needed" in in_words(text)
    assert run("check")[0] == 1


@pytest.mark.parametrize("count, warned", [(2, True), (49, True), (50, False)])
def test_few_pairs_bring_a_warning(
    count: int, warned: bool, sheet: Callable[..., Path], run: Run, local_tokenizer: None
) -> None:
    sheet(HEADER, *((f"Tell {i}", f"Told {i}") for i in range(count)))
    code, text = run("check")
    assert code == 0
    assert (f"Warning    {count} pairs are few" in text) == warned
    assert ("Warning" in text) == warned


# -- Anything at all

CELL = st.text(
    st.one_of(
        st.sampled_from("\n\t \"',;|?=ab"),
        st.characters(exclude_categories=["Cc", "Cs", "Cn"]),
    ),
    max_size=12,
).filter(lambda text: not re.search("_x[0-9A-Fa-f]{4}_| 00:00:00|#[A-Z]", text))  # all tested above


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def pairs_by_hand(rows: Sequence[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """Number, question and answer of the rows that have both and had not come before."""
    found: dict[tuple[str, ...], tuple[int, str, str]] = {}
    for number, row in enumerate(rows, start=2):
        plain = [unicodedata.normalize("NFKC", cell).casefold().split() for cell in row]
        if all(any(map(ft.is_visible, c)) and c.strip() not in ft.FAILED_FORMULAS for c in row):
            key = tuple(" ".join(words) for words in plain)
            found.setdefault(key, (number, row[0].strip(), row[1].strip()))
    return list(found.values())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(CELL, CELL), max_size=5),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_table_reads_the_same_from_both_formats(
    rows: Texts, delimiter: str, encoding: str, scratch: Path
) -> None:
    rows = [*rows, ("Why?", "So.")]
    (scratch / "dataset.xlsx").write_bytes(workbook_of([HEADER, *rows]))
    content = csv_text([HEADER, *rows], delimiter=delimiter).encode(encoding)
    (scratch / "dataset.csv").write_bytes(content)
    for name in ("dataset.xlsx", "dataset.csv"):
        found = [(pair.row, pair.question, pair.answer) for pair in read(scratch / name).kept]
        assert found == pairs_by_hand(rows)


def assert_read_or_refused(path: Path) -> None:
    try:
        pairs = read(path)
    except ft.UserError as error:
        assert str(error)
    else:
        assert all(pair.question.strip() and pair.answer.strip() for pair in pairs.kept)


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from(
        [b"", b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\xff\xfe", b"\xfe\xff", b"question,answer\n"]
    ),
    rest=st.binary(max_size=200),
)
def test_random_bytes_are_read_or_refused(start: bytes, rest: bytes, scratch: Path) -> None:
    (scratch / "random.xlsx").write_bytes(start + rest)
    assert_read_or_refused(scratch / "random.xlsx")


def damaged(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed[: dice.choice([len(changed), dice.randrange(len(changed))])])


def damaged_inside(content: bytes, dice: random.Random) -> bytes:
    """A sound zip archive with one damaged file in it."""
    parts = parts_of(content)
    chosen = dice.choice(list(parts))
    return zip_of(parts | {chosen: damaged(parts[chosen], dice)})


@settings(max_examples=150, deadline=None)
@given(
    content=st.sampled_from(
        [WORKBOOK, TABLES["comma"].encode(), TABLES["UTF-16 from Excel"], TABLES["Windows-1252"]]
    ),
    seed=st.integers(0, 2**32),
)
def test_damaged_files_are_read_or_refused(content: bytes, seed: int, scratch: Path) -> None:
    dice = random.Random(seed)
    damage = damaged_inside if content is WORKBOOK and seed % 4 else damaged
    (scratch / "damaged.xlsx").write_bytes(damage(content, dice))
    assert_read_or_refused(scratch / "damaged.xlsx")


def test_the_example_workbook_is_read_whole() -> None:
    pairs = read(Path("dataset_example.xlsx"))
    assert len(pairs.kept) == len(pairs.table.rows) > 20
    assert pairs.columns.reason == "by name"


# -- What stands beside questions and answers

FAQ = [
    ("How do I reset my password?", "Click on the link below and follow the steps."),
    ("What are your opening hours?", "We are open from nine to five on working days."),
    ("Where is the office located?", "It is located in the main street, on the first floor."),
    ("Can I return what I bought?", "Yes, within thirty days and with the receipt."),
]
PEOPLE = ("Ann Lee", "Bob Ray", "Cy Doe", "Di Fox")


@pytest.mark.parametrize(
    "header",
    [
        ("Nr", "Frage", "Antworttext", "Antwort freigegeben von"),
        ("N", "Question", "Text", "Answer given by"),
        ("STT", "Câu hỏi", "Nội dung", "Người trả lời"),
        ("序号", "问题", "处理结果", "回复人"),
        ("N", "Question asked", "Text of the answer", "Author of the answer"),
        ("No", "質問内容", "回答内容", "回答者"),
    ],
)
def test_who_answered_is_no_answer(header: tuple[str, ...], sheet: Callable[..., Path]) -> None:
    rows = [(i, q, a, name) for i, ((q, a), name) in enumerate(zip(FAQ, PEOPLE, strict=True))]
    assert texts(read(sheet(header, *rows))) == FAQ


@pytest.mark.parametrize(
    "header", [("Question from", "Details", "Answer"), ("提问者", "内容", "回答")]
)
def test_who_asked_is_no_question(header: tuple[str, ...], sheet: Callable[..., Path]) -> None:
    rows = [(name, q, a) for (q, a), name in zip(FAQ, PEOPLE, strict=True)]
    assert texts(read(sheet(header, *rows))) == FAQ


def test_a_form_on_the_web_asks_in_its_header(sheet: Callable[..., Path]) -> None:
    header = ("Timestamp", "What is your question about our school?", "Answer by the teacher")
    rows = [(f"2024-05-0{i} 10:0{i}:00", q, a) for i, (q, a) in enumerate(FAQ, start=1)]
    assert texts(read(sheet(header, *rows))) == FAQ


def test_labels_in_turn_are_no_answers(sheet: Callable[..., Path]) -> None:
    rows = [row for i, (q, a) in enumerate(FAQ) for row in ((f"Q{i}:", q), (f"A{i}:", a))]
    assert "was found" in refusal(sheet(*rows))


@pytest.mark.parametrize(
    "first",
    [
        ("密码忘了怎么重置", "在登录页面点击忘记密码，然后按照提示操作即可。"),
        ("Opening hours on Saturday", "From nine to one, except on public holidays."),
    ],
)
def test_a_pair_that_asks_nothing_is_no_header(
    first: tuple[str, str], sheet: Callable[..., Path]
) -> None:
    assert texts(read(sheet(first, *FAQ))) == [first, *FAQ]


def test_the_header_once_more_is_no_pair(sheet: Callable[..., Path]) -> None:
    pairs = read(sheet(HEADER, *FAQ[:2], HEADER, *FAQ[2:]))
    assert texts(pairs) == FAQ
    assert [note.reason for note in pairs.dropped] == ["the header once more"]


def test_lines_that_happen_to_hold_commas_are_no_table(table: Callable[..., Path]) -> None:
    lines = [
        "question,answer",
        "Why?,So.",
        "How?,Thus.",
        *(f"Then, it, rained {i}" for i in range(9)),
    ]
    assert "more cells than the first" in refusal(table("\n".join(lines)))


def test_whole_numbers_keep_their_digits(sheet: Callable[..., Path]) -> None:
    rows = [("Which card is it?", 1234567890123456.0), ("Which number?", 4915112345678)]
    assert [a for _, a in texts(read(sheet(HEADER, *rows)))] == [
        "1234567890123456",
        "4915112345678",
    ]


@pytest.mark.parametrize("limit", ["MOST_ROWS", "MOST_LETTERS", "MOST_CELLS"])
@pytest.mark.parametrize("name", ["a.xlsx", "a.csv", "a.jsonl", "a.parquet"])
def test_what_is_beyond_a_limit_is_refused(
    limit: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas

    frame = pandas.DataFrame(FAQ, columns=["question", "answer"])
    write = {"a.xlsx": frame.to_excel, "a.csv": frame.to_csv, "a.parquet": frame.to_parquet}
    if name == "a.jsonl":
        frame.to_json(folder / name, orient="records", lines=True)
    else:
        write[name](folder / name, index=False)
    assert len(read(folder / name).kept) == 4
    monkeypatch.setattr(ft, limit, 3)
    counted = {
        "MOST_ROWS": True,
        "MOST_LETTERS": name in ("a.xlsx", "a.csv"),
        "MOST_CELLS": name == "a.xlsx",
    }
    if counted[limit]:
        assert "more than 3" in refusal(folder / name)
    else:
        assert len(read(folder / name).kept) == 4
