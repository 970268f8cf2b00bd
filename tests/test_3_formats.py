"""Section 3: each format that data comes in, with the pairs in it or the sentence that refuses it.

Every file is written here by code, as bytes. A reader may refuse, but never with another error.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import random
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from conftest import in_words
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

Said = list[tuple[str, ...]]  # of each conversation: question, answer, question, answer, …
Rows = Sequence[Sequence[object]]
HEADER = ("question", "answer")
TWO = [("Why?", "So."), ("How?", "Thus.")]
MAIN = b"http://schemas.openxmlformats.org/spreadsheetml/2006/main"
LINKS = b"http://schemas.openxmlformats.org/officeDocument/2006/relationships"


class Case(NamedTuple):
    """A file, and what must be found in it."""

    file: str
    content: bytes
    said: Said
    dropped: list[tuple[int, str]] = []  # row, and words of its reason
    settings: dict[str, Any] = {}


# -- Writers


def js(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def jsonl(*records: object) -> bytes:
    return b"\n".join(map(js, records)) + b"\n"


def records(*rows: Sequence[object], names: Sequence[str] = HEADER) -> list[dict[str, object]]:
    return [dict(zip(names, row, strict=True)) for row in rows]


def table(rows: Rows, encoding: str = "utf-8", **dialect: Any) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue().encode(encoding)


def book(rows: Rows, change: Any = None) -> bytes:
    workbook, content = openpyxl.Workbook(), io.BytesIO()
    for row in rows:
        workbook.active.append(row)
    for cell in itertools.chain(*workbook.active.iter_rows()):
        if isinstance(cell.value, str):
            cell.data_type = "s"  # "=2" is a text here, not a formula
    if change:
        change(workbook)
    workbook.save(content)
    return content.getvalue()


def zip_of(parts: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return content.getvalue()


def parts_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_parts(**replaced: bytes) -> bytes:
    """The small workbook with its sheet or its shared strings written by hand."""
    names = {"sheet": "xl/worksheets/sheet1.xml", "strings": "xl/sharedStrings.xml"}
    return zip_of(parts_of(book([HEADER, *TWO])) | {names[k]: v for k, v in replaced.items()})


def sheet_xml(cells: bytes, start: bytes = b"", dimension: bytes = b"A1:B3") -> bytes:
    return (
        b'<?xml version="1.0"?>' + start + b'<worksheet xmlns="' + MAIN + b'"><dimension ref="'
        b'%b"/><sheetData>%b</sheetData></worksheet>' % (dimension, cells)
    )


def inline(rows: Rows) -> bytes:
    """Rows of a sheet whose texts stand in the cells, as exports of databases have them."""
    return b"".join(
        b'<row r="%d">' % n
        + b"".join(
            f'<c r="{"AB"[i]}{n}" t="inlineStr"><is><t>{cell}</t></is></c>'.encode()
            for i, cell in enumerate(row)
        )
        + b"</row>"
        for n, row in enumerate(rows, start=1)
    )


def strict(content: bytes) -> bytes:
    """A workbook saved by Excel as "Strict Open XML"."""
    pure = b"http://purl.oclc.org/ooxml/"
    names = {MAIN: pure + b"spreadsheetml/main", LINKS: pure + b"officeDocument/relationships"}
    parts = parts_of(content)
    for old, new in names.items():
        parts = {name: part.replace(old, new) for name, part in parts.items()}
    return zip_of(parts)


def ods(rows: Rows) -> bytes:
    cells = "".join(
        "<table:table-row>"
        + "".join(
            f'<table:table-cell office:value-type="string"><text:p>{cell}</text:p>'
            "</table:table-cell>"
            for cell in row
        )
        + "</table:table-row>"
        for row in rows
    )
    base = "urn:oasis:names:tc:opendocument:xmlns:"
    spaces = " ".join(f'xmlns:{n}="{base}{n}:1.0"' for n in ("office", "table", "text"))
    content = (
        f'<office:document-content {spaces} office:version="1.2"><office:body><office:spreadsheet>'
        f'<table:table table:name="Sheet1">{cells}</table:table>'
        "</office:spreadsheet></office:body></office:document-content>"
    )
    kind = b"application/vnd.oasis.opendocument.spreadsheet"
    manifest = b'<m:manifest xmlns:m="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0"/>'
    parts = {"mimetype": kind, "META-INF/manifest.xml": manifest, "content.xml": content.encode()}
    return zip_of(parts)


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), content)
    return content.getvalue()


def chat(*turns: tuple[str, object], keys: tuple[str, str] = ("role", "content")) -> list[Any]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


def hide_first(workbook: Any) -> None:
    """A hidden sheet with more pairs than the visible one."""
    old = workbook.create_sheet("old")
    for row in [HEADER, *((f"Old {i}?", "Old.") for i in range(9))]:
        old.append(row)
    old.sheet_state = "hidden"


def merge_title(workbook: Any) -> None:
    workbook.active.merge_cells("A1:B1")


def read(path: Path, **changes: Any) -> ft.Pairs:
    return ft.find_pairs(ft.Config(DATASET_PATH=str(path), **changes))


def said(pairs: ft.Pairs) -> Said:
    return [tuple(message["content"] for message in pair.messages) for pair in pairs.kept]


def check(case: Case, folder: Path) -> None:
    path = folder / case.file
    path.write_bytes(case.content)
    pairs = read(path, **case.settings)
    assert said(pairs) == case.said
    for pair in pairs.kept:
        roles = [message["role"] for message in pair.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert [note.row for note in pairs.dropped] == [row for row, _ in case.dropped]
    for note, (_, words) in zip(pairs.dropped, case.dropped, strict=True):
        assert words in note.reason


# -- Where the pairs stand in a file

LIST = records(*TWO)
CONTAINERS = {
    "JSON lines": Case("d.jsonl", jsonl(*LIST), TWO),
    "JSON lines named .json": Case("d.json", jsonl(*LIST), TWO),
    "JSON lines named .csv": Case("d.csv", jsonl(*LIST), TWO),
    "JSON lines of Windows": Case("d.jsonl", jsonl(*LIST).replace(b"\n", b"\r\n"), TWO),
    "a blank line between": Case("d.jsonl", jsonl(*LIST).replace(b"}\n", b"}\n\n"), TWO),
    "a JSON list": Case("d.json", js(LIST), TWO),
    "a JSON list with a byte order mark": Case("d.json", b"\xef\xbb\xbf" + js(LIST), TWO),
    "JSON lines with a byte order mark": Case("d.jsonl", b"\xef\xbb\xbf" + jsonl(*LIST), TWO),
    "a list under data": Case("d.json", js({"data": LIST}), TWO),
    "a list under dataset": Case("d.json", js({"version": 1, "dataset": LIST}), TWO),
    "of train and test one is used": Case(
        "d.json", js({"train": LIST, "test": records(("Who?", "Me."))}), TWO
    ),
    "columns": Case("d.json", js(dict(zip(HEADER, zip(*TWO, strict=True), strict=True))), TWO),
    "ids with their records": Case("d.json", js({"a1": LIST[0], "a2": LIST[1]}), TWO),
    "lists with a header": Case("d.json", js([HEADER, *TWO]), TWO),
    "lists without a header": Case("d.json", js(TWO), TWO),
    "a broken line is left out": Case(
        "d.jsonl",
        jsonl(LIST[0]) + b'{"question": "What\n' + jsonl(LIST[1]),
        TWO,
        [(2, "not valid JSON")],
    ),
    "parquet": Case("d.parquet", parquet(LIST), TWO),
    "parquet named .csv": Case("d.csv", parquet(LIST), TWO),
    "OpenDocument": Case("d.ods", ods([HEADER, *TWO]), TWO),
    "Strict Open XML": Case("d.xlsx", strict(book([HEADER, *TWO])), TWO),
    "texts inside the cells": Case(
        "d.xlsx", with_parts(sheet=sheet_xml(inline([HEADER, *TWO]))), TWO
    ),
    "a hidden sheet with more": Case("d.xlsx", book([HEADER, *TWO], hide_first), TWO),
    "a title in merged cells": Case(
        "d.xlsx", book([("Our questions", None), HEADER, *TWO], merge_title), TWO
    ),
    "a formula with its value": Case(
        "d.xlsx",
        with_parts(
            sheet=sheet_xml(
                inline([HEADER, TWO[0]]) + b'<row r="3"><c r="A3" t="str"><f>"H"&amp;"ow?"</f>'
                b'<v>How?</v></c><c r="B3" t="str"><f>C3</f><v>Thus.</v></c></row>'
            )
        ),
        TWO,
    ),
}


@pytest.mark.parametrize("case", CONTAINERS.values(), ids=CONTAINERS)
def test_the_pairs_are_found_wherever_the_file_keeps_them(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


# -- What public datasets call things

ALPACA = ("instruction", "input", "output")
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Paris",
            "paragraphs": [
                {
                    "context": "Paris is in France.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Where is Paris?",
                            "answers": [
                                {"text": "in France", "answer_start": 9},
                                {"text": "France", "answer_start": 12},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "id": "2",
                            "question": "Who built it?",
                            "answers": [],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}
FLAT = ("id", "context", "question", "answers")
NOBODY = {"text": [], "answer_start": []}
FLAT_SQUAD = records(
    ("1", "Of it.", "Where?", {"text": ["in France", "France"], "answer_start": [9, 12]}),
    ("2", "Of it.", "Who?", NOBODY),
    names=FLAT,
)
FOREIGN = [("Bu nedir?", "Bir kitap."), ("Kim o?", "Benim.")]


def named(names: Sequence[str], *rows: Sequence[object], found: Said | None = None) -> Case:
    return Case("d.jsonl", jsonl(*records(*rows, names=names)), found or list(TWO))


def around(names: str, *more: tuple[object, object]) -> Case:
    """TWO with further columns: of `names`, Q and A are replaced, the others filled from `more`."""
    columns = dict(zip([n for n in names.split() if n not in ("Q", "A")], more, strict=True))
    rows = []
    for i, (question, answer) in enumerate(TWO):
        two = {"Q": ("question", question), "A": ("answer", answer)}
        rows.append(dict(two[n] if n in two else (n, columns[n][i]) for n in names.split()))
    return Case("d.jsonl", jsonl(*rows), TWO)


DATASETS = {
    "Alpaca": named(
        ALPACA,
        ("Add.", "1 and 2", "3"),
        ("Name a colour.", "", "Red"),
        found=[("Add.\n\n1 and 2", "3"), ("Name a colour.", "Red")],
    ),
    "prompt and completion": named(("prompt", "completion"), *TWO),
    "input and output": named(("input", "output"), *TWO),
    "SQuAD": Case("d.json", js(SQUAD), [("Where is Paris?", "in France")], [(2, "no answer")]),
    "SQuAD, flat": Case(
        "d.jsonl", jsonl(*FLAT_SQUAD), [("Where?", "in France")], [(2, "no answer")]
    ),
    "SQuAD, flat, in parquet": Case(
        "d.parquet", parquet(FLAT_SQUAD), [("Where?", "in France")], [(2, "no answer")]
    ),
    "a list with one text": named(HEADER, ("Why?", ["So."]), ("How?", ["Thus."])),
    "a list with two texts": Case(
        "d.jsonl",
        jsonl(*records(("Why?", ["So."]), ("How?", ["Thus.", "So."]))),
        TWO[:1],
        [(2, "not one text")],
    ),
    "a list written as text": Case(
        "d.csv",
        table([HEADER, ("Where?", "['Paris']"), ("Who?", "['Me']")]),
        [("Where?", "Paris"), ("Who?", "Me")],
    ),
    "whole numbers": named(
        HEADER, ("1 + 1?", 2), ("2 + 2?", 4), found=[("1 + 1?", "2"), ("2 + 2?", "4")]
    ),
    "zero and false": named(
        HEADER, ("1 - 1?", 0), ("Is it?", False), found=[("1 - 1?", "0"), ("Is it?", "FALSE")]
    ),
    "Title and Body": named(("Title", "Body"), *TWO),
    "ask and answer": named(("ask", "answer"), *TWO),
    "Turkish": named(("soru", "cevap"), *FOREIGN, found=FOREIGN),
    "Portuguese": named(("pergunta", "resposta"), *TWO),
    "ground truth": named(("question", "ground_truth"), *TWO),
    "gpt4_answer beside answer": around("Q gpt4_answer A", ("X.", "Y.")),
    "options A to D": around("Q A B C D", ("1", "2"), ("3", "4"), ("5", "6")),
    "normalized_question": around("normalized_question Q A", ("why", "how")),
    "ids of question and answer": around("question_id Q answer_id A", (1, 2), (3, 4)),
    "context": around("context Q A", ("Is it?", "It is.")),
}


@pytest.mark.parametrize("case", DATASETS.values(), ids=DATASETS)
def test_the_names_of_public_datasets_are_understood(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_an_option_called_a_is_no_answer(tmp_path: Path) -> None:
    names = ("Question", "A", "B", "C", "D", "Answer")
    rows = [
        ("Which?", "one", "two", "three", "four", "two"),
        ("Who?", "I", "you", "he", "she", "I"),
    ]
    check(Case("d.csv", table([names, *rows]), [("Which?", "two"), ("Who?", "I")]), tmp_path)


# -- Conversations

USER, BOT = ("user", "Why?"), ("assistant", "So.")
AGAIN = [("user", "How?"), ("assistant", "Thus.")]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Why?"}]
SPLIT = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]


def talk(*turns: Any, key: str = "messages", said: Said, dropped: Any = ()) -> Case:
    """A conversation, and after it one that is in order."""
    first = list(turns) if isinstance(turns[0], dict) else chat(*turns)
    lines = jsonl({key: first}, {key: chat(("user", "Last?"), ("assistant", "Yes."))})
    return Case("d.jsonl", lines, [*said, ("Last?", "Yes.")], list(dropped))


CONVERSATIONS = {
    "one turn": talk(USER, BOT, said=[("Why?", "So.")]),
    "several turns": talk(USER, BOT, *AGAIN, said=[("Why?", "So.", "How?", "Thus.")]),
    "a system turn": talk(("system", "Be brief."), USER, BOT, said=[("Be brief.\n\nWhy?", "So.")]),
    "a tool in the second question": talk(
        *chat(USER, BOT, ("user", "How?")),
        CALL,
        *chat(("tool", "42"), ("assistant", "42.")),
        said=[("Why?", "So.")],
    ),
    "a tool in the only question": talk(
        *chat(USER), CALL, *chat(("tool", "42")), said=[], dropped=[(1, "a tool is used")]
    ),
    "texts in parts": talk(("user", SPLIT), BOT, said=[("Why?", "So.")]),
    "a picture": talk(("user", IMAGE), BOT, said=[], dropped=[(1, "not text")]),
    "a greeting first": talk(("assistant", "Hello!"), USER, BOT, said=[("Why?", "So.")]),
    "a question without an answer last": talk(USER, BOT, ("user", "Hm?"), said=[("Why?", "So.")]),
    "ShareGPT": Case(
        "d.json",
        js(
            [
                {
                    "id": "x",
                    "conversations": chat(
                        ("human", "Why?"),
                        ("gpt", "So."),
                        ("human", "How?"),
                        ("gpt", "Thus."),
                        keys=("from", "value"),
                    ),
                }
            ]
        ),
        [("Why?", "So.", "How?", "Thus.")],
    ),
    "JSON in a cell": Case(
        "d.csv",
        table(
            [("id", "messages"), (1, js(chat(USER, BOT)).decode()), (2, js(chat(*AGAIN)).decode())]
        ),
        TWO,
    ),
    "parquet": Case(
        "d.parquet", parquet([{"messages": chat(USER, BOT)}, {"messages": chat(*AGAIN)}]), TWO
    ),
    "Guanaco": Case(
        "d.jsonl",
        jsonl({"text": "### Human: Why?### Assistant: So.### Human: How?### Assistant: Thus."}),
        [("Why?", "So.", "How?", "Thus.")],
    ),
    "Anthropic's": Case(
        "d.jsonl",
        jsonl({"chosen": "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: How?\n\nAssistant: Thus."}),
        [("Why?", "So.", "How?", "Thus.")],
    ),
    "instruction and response in one text": Case(
        "d.jsonl",
        jsonl(*({"text": f"### Instruction:\n{q}\n\n### Response:\n{a}"} for q, a in TWO)),
        TWO,
    ),
    "instruction and response below a preamble": Case(
        "d.jsonl",
        jsonl(
            *(
                {"text": f"Below is a task.\n\n### Instruction:\n{q}\n\n### Response:\n{a}"}
                for q, a in TWO
            )
        ),
        TWO,
    ),
    "a word like a mark inside an answer": Case(
        "d.jsonl",
        jsonl(
            {"text": "### Human: Why?### Assistant: Note the answer: so, and Question: no more."}
        ),
        [("Why?", "Note the answer: so, and Question: no more.")],
    ),
}


@pytest.mark.parametrize("case", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_are_cut_into_questions_and_answers(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


# -- Message trees

MESSAGE = ("message_id", "parent_id", "text", "role", "lang", "rank", "deleted")
TREE = records(
    ("1", None, "Why?", "prompter", "en", None, False),
    ("2", "1", "Worse.", "assistant", "en", 1, False),
    ("3", "1", "So.", "assistant", "en", 0, False),
    ("4", "3", "How?", "prompter", "en", None, False),
    ("5", "4", "Thus.", "assistant", "en", 0, False),
    ("6", None, "¿Qué?", "prompter", "es", None, False),
    ("7", "6", "Nada.", "assistant", "es", 0, False),
    ("8", "1", "Rude.", "assistant", "en", -1, True),
    names=MESSAGE,
)
BEST, WORSE, SPANISH = ("Why?", "So.", "How?", "Thus."), ("Why?", "Worse."), ("¿Qué?", "Nada.")
NOT_EN = [(6, "the language is es, not en")]


def nested(message: dict[str, object]) -> dict[str, object]:
    replies = [nested(reply) for reply in TREE if reply["parent_id"] == message["message_id"]]
    return {**message, "replies": replies}


NESTED = jsonl(
    *({"message_tree_id": m["message_id"], "prompt": nested(m)} for m in TREE if not m["parent_id"])
)
TREES = {
    "the best replies": Case("d.jsonl", jsonl(*TREE), [BEST], NOT_EN),
    "in parquet": Case("d.parquet", parquet(TREE), [BEST], NOT_EN),
    "in any language": Case("d.jsonl", jsonl(*TREE), [BEST, SPANISH], settings={"LANGUAGE": ""}),
    "all replies": Case(
        "d.jsonl", jsonl(*TREE), [BEST, WORSE], NOT_EN, {"CONVERSATION_PATHS": "all"}
    ),
    "one message in another": Case("d.jsonl", NESTED, [BEST], [(2, "the language is es")]),
    "one in another, all replies, any language": Case(
        "d.jsonl",
        NESTED,
        [BEST, WORSE, SPANISH],
        settings={"CONVERSATION_PATHS": "all", "LANGUAGE": ""},
    ),
}


@pytest.mark.parametrize("case", TREES.values(), ids=TREES)
def test_of_message_trees_the_wanted_paths_are_taken(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


# -- Encodings

RUSSIAN = [("Что это такое?", "Это большая книга."), ("Кто там?", "Это я, почтальон.")]
CHINESE = [("这是什么东西？", "这是一本很有意思的书。"), ("他是谁？", "他是我的老师。")]
FRENCH = [("Où est l’été?", "Là-bas, près du café."), ("Ça va?", "Très bien.")]
ENCODED = {
    "UTF-16 with a mark": table([HEADER, *RUSSIAN], "utf-16"),
    "UTF-16 without a mark": table([HEADER, *FRENCH], "utf-16-le"),
    "UTF-16, big end first, without a mark": table([HEADER, *FRENCH], "utf-16-be"),
    "GB 18030": table([HEADER, *CHINESE], "gb18030"),
    "Windows-1251": table([HEADER, *RUSSIAN], "cp1251"),
    "Windows-1252": table([HEADER, *FRENCH], "cp1252"),
    "two encodings": table([HEADER, FRENCH[0]]) + table(FRENCH[1:], "cp1252"),
    "UTF-16 of Russian without a mark": table([HEADER, *RUSSIAN], "utf-16-le"),
}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("UTF-16 with a mark", RUSSIAN),
        ("UTF-16 without a mark", FRENCH),
        ("UTF-16, big end first, without a mark", FRENCH),
        ("UTF-16 of Russian without a mark", RUSSIAN),
        ("GB 18030", CHINESE),
        ("Windows-1251", RUSSIAN),
        ("Windows-1252", FRENCH),
        ("two encodings", FRENCH),
    ],
)
def test_letters_survive_every_encoding(name: str, expected: Said, tmp_path: Path) -> None:
    check(Case("d.csv", ENCODED[name], expected), tmp_path)


def test_a_guessed_encoding_is_said_and_a_marked_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said_of = {}
    for name, content in ENCODED.items():
        (tmp_path / "d.csv").write_bytes(content)
        read(tmp_path / "d.csv")
        said_of[name] = in_words("".join(capsys.readouterr()))
    assert "Cyrillic" in said_of["Windows-1251"]
    assert "Chinese" in said_of["GB 18030"]
    assert "Western Europe" in said_of["Windows-1252"]
    assert "mixes encodings" in said_of["two encodings"]
    assert said_of["UTF-16 with a mark"] == ""


# -- Refusals

OLE = bytes.fromhex("d0cf11e0a1b11ae1")
ENTITIES = b"".join(
    b'<!ENTITY %c "%b">' % (letter, b"&%c;" % (letter - 1) * 10 if letter > 97 else b"ha" * 20)
    for letter in range(97, 107)
)
BOMB = sheet_xml(
    b'<row r="1"><c r="A1" t="inlineStr"><is><t>&j;</t></is></c></row>',
    b"<!DOCTYPE worksheet [" + ENTITIES + b"]>",
)
WORKBOOK = book([HEADER, *TWO])
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "encrypted": ("d.xlsx", OLE + bytes(504) + "EncryptedPackage".encode("utf-16-le"), "password"),
    "an old workbook cut off": ("d.xls", OLE + bytes(600), "is damaged"),
    "a workbook cut off": ("d.xlsx", WORKBOOK[: len(WORKBOOK) // 2], "is damaged"),
    "parquet cut off": ("d.parquet", parquet(LIST)[:-20], "is damaged"),
    "zero bytes": ("d.xlsx", b"", "holds no rows"),
    "a header alone": ("d.csv", b"question,answer\n", "holds no rows"),
    "PDF": ("d.xlsx", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF"),
    "PNG": ("d.csv", b"\x89PNG\r\n\x1a\n" + bytes(40), "is a picture"),
    "gzip": ("d.jsonl", gzip.compress(jsonl(*LIST)), "is compressed; unpack it first"),
    "a Word document": ("d.xlsx", zip_of({"word/document.xml": b"<a/>"}), "is a Word document"),
    "a zip file": ("d.xlsx", zip_of({"d.csv": table(TWO)}), "a zip file without a workbook"),
    "HTML named .xls": ("d.xls", b"<html><table><tr><td>a</td></tr></table>", "is a web page"),
    "XML of Excel 2003": (
        "d.xls",
        b'<?xml version="1.0"?><?mso-application progid="Excel.Sheet"?><Workbook/>',
        "old versions of Excel",
    ),
    "a Git LFS pointer": (
        "d.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "a zip bomb": (
        "d.xlsx",
        zip_of(parts_of(WORKBOOK) | {"xl/media/image1.bin": bytes(30_000_000)}),
        "looks like a zip bomb",
    ),
    "XML entities": ("d.xlsx", with_parts(sheet=BOMB), "is damaged"),
    "deeply nested JSON": ("d.json", b"[" * 200_000, "nested too deeply"),
    "deeply nested objects": ("d.json", b'{"a":' * 200_000, "nested too deeply"),
    "NUL bytes": ("d.csv", b"question,answer\n\0\1\0\0\2\3\4\5" * 20, "neither a workbook nor"),
    "nothing but NUL bytes": ("d.csv", bytes(3000), ""),
    "only numbers": ("d.csv", table([("x", "y"), (1, 2), (3, 4)]), "no column of questions"),
    "one column": ("d.csv", table([("question",), ("Why?",), ("How?",)]), "no column of questions"),
    "broken JSON": ("d.json", b'[{"question": "Why?", "answer": ', "is not valid JSON"),
    "a JSON number": ("d.json", b"42", ""),
    "a JSON list of texts": ("d.json", b'["Why?", "So."]', ""),
    "an empty list": ("d.json", b"[]", "holds no rows"),
    "an empty object": ("d.json", b"{}", "holds no rows"),
}


@pytest.mark.parametrize("file, content, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_words(
    file: str, content: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(ft.UserError) as refused:
        read(path)
    assert time.monotonic() - began < 4
    message = in_words(str(refused.value))
    assert words in message
    assert file in message
    assert len(message) < 600


def test_a_workbook_that_claims_to_be_huge_is_read_at_once(tmp_path: Path) -> None:
    sheet = sheet_xml(inline([HEADER, *TWO]), dimension=b"A1:XFD1048576")
    for content in (with_parts(sheet=sheet), strict(with_parts(sheet=sheet))):
        began = time.monotonic()
        check(Case("d.xlsx", content, TWO), tmp_path)
        assert time.monotonic() - began < 2


def test_a_huge_shared_text_is_left_out_and_the_others_are_kept(tmp_path: Path) -> None:
    # random letters: a text of one letter would be refused as a zip bomb
    huge = "".join(random.Random(1).choices("abcdefghij ", k=ft.LONGEST_CELL + 9)).encode()
    strings = [*itertools.chain(HEADER, TWO[0])]
    shared = b"".join(b"<si><t>%b</t></si>" % s for s in (*(s.encode() for s in strings), huge))
    cells = b"".join(
        b'<row r="%d"><c r="A%d" t="s"><v>%d</v></c><c r="B%d" t="s"><v>%d</v></c></row>'
        % (n, n, a, n, b)
        for n, (a, b) in enumerate([(0, 1), (2, 3), (2, 4)], start=1)
    )
    content = with_parts(
        sheet=sheet_xml(cells), strings=b'<sst xmlns="' + MAIN + b'">' + shared + b"</sst>"
    )
    check(Case("d.xlsx", content, TWO[:1], [(3, "a text of more than")]), tmp_path)


# -- Any table, any bytes


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


# what a workbook can hold and no reader trims, quotes or escapes differently
TEXT = st.text(
    st.characters(exclude_categories=("C", "Z"), include_characters=" ", exclude_characters="_"),
    max_size=12,
).map(lambda text: f"w{text}".strip())
FORMATS = {
    "d.xlsx": book,
    "d.csv": table,
    "d.tsv": lambda rows: table(rows, delimiter="\t"),
    "d.json": lambda rows: js(records(*rows[1:])),
    "d.jsonl": lambda rows: jsonl(*records(*rows[1:])),
    "d.parquet": lambda rows: parquet(records(*rows[1:])),
    "rows.json": js,
}


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
def test_any_table_of_texts_reads_the_same_from_every_format(
    rows: list[tuple[str, str]], scratch: Path
) -> None:
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for row in rows:
        first.setdefault((ft.fold(row[0]), ft.fold(row[1])), row)
    for name, write in FORMATS.items():
        (scratch / name).write_bytes(write([HEADER, *rows]))
        assert (name, said(read(scratch / name))) == (name, list(first.values()))


SOUND = {
    "d.xlsx": WORKBOOK,
    "strict.xlsx": strict(WORKBOOK),
    "d.ods": ods([HEADER, *TWO]),
    "d.parquet": parquet(LIST),
    "talk.parquet": parquet([{"messages": chat(USER, BOT)}]),
    "d.jsonl": jsonl(*LIST),
    "squad.json": js(SQUAD),
    "talk.jsonl": CONVERSATIONS["several turns"].content,
    "tool.jsonl": CONVERSATIONS["a tool in the second question"].content,
    "tree.jsonl": jsonl(*TREE),
    "nested.jsonl": NESTED,
    "d.csv": CONVERSATIONS["JSON in a cell"].content,
}


def assert_read_or_refused(path: Path) -> None:
    try:
        pairs = read(path)
    except ft.UserError as error:
        assert str(error)
    else:
        assert all(pair.question.strip() and pair.answer.strip() for pair in pairs.kept)


@settings(max_examples=100, deadline=None)
@given(
    start=st.sampled_from([b"", b"PK\x03\x04", OLE, b"PAR1", b"\xff\xfe", b"[", b'{"a":[', b"[["]),
    rest=st.binary(max_size=120),
)
def test_random_bytes_are_read_or_refused(start: bytes, rest: bytes, scratch: Path) -> None:
    (scratch / "random.bin").write_bytes(start + rest)
    assert_read_or_refused(scratch / "random.bin")


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from([*SOUND]), seed=st.integers(0, 2**32))
def test_changed_bytes_are_read_or_refused(name: str, seed: int, scratch: Path) -> None:
    dice = random.Random(seed)
    changed = bytearray(SOUND[name])
    for _ in range(dice.randint(1, 6)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    (scratch / name).write_bytes(changed[: dice.choice([None, dice.randrange(len(changed))])])
    assert_read_or_refused(scratch / name)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["Why?", "So.", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "question answer answers text role content from value messages prompt replies data "
                "paragraphs qas rank message_id parent_id lang".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=JUNK, lines=st.booleans())
def test_json_of_any_shape_is_read_or_refused(value: Any, lines: bool, scratch: Path) -> None:
    content = jsonl(*value) if lines and isinstance(value, list) else js(value)
    (scratch / "junk.json").write_bytes(content)
    assert_read_or_refused(scratch / "junk.json")
