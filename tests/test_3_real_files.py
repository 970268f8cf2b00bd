"""Sections 2 and 3: files as people have them, each with the pairs or the refusal it must bring.

Every file is written here by code. A reader may refuse a file, but it may never be silently wrong.
"""

from __future__ import annotations

import copy
import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import openpyxl
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import xlwt
from conftest import ROOT, in_words
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from openpyxl.cell.rich_text import CellRichText, TextBlock
from openpyxl.cell.text import InlineFont
from openpyxl.utils import get_column_letter as letters
from pyxlsbwriter import XlsbWriter

import finetune_colab as ft

Texts = Sequence[tuple[str, ...]]  # of one conversation: question, answer, question, answer, …
Rows = Sequence[Sequence[object]]
HEADER = ("question", "answer")
TWO = [("Why?", "So."), ("How?", "Thus.")]
FOUR = [*TWO, ("Tell me where.", "Over there."), ("Who is it?", "It is me.")]
QA2, QA4 = [HEADER, *TWO], [HEADER, *FOUR]


# -- Writers of all kinds of files


def csv_file(rows: Rows, encoding: str = "utf-8", **dialect: Any) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue().encode(encoding)


def js(value: object, encoding: str = "utf-8", **style: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, **style).encode(encoding)


def jsonl(*records: object) -> bytes:
    return b"".join(js(record) + b"\n" for record in records)


def records(rows: Rows, header: Sequence[str] = HEADER) -> list[dict[str, object]]:
    return [dict(zip(header, row, strict=True)) for row in rows]


def parquet(rows: list[Any], **how: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **how)
    return file.getvalue()


def xlsx(
    rows: Rows, change: Callable[[Any], object] | None = None, **more: Sequence[Sequence[object]]
) -> bytes:
    """A workbook: a sheet of rows, a sheet for each keyword, and what `change` does to the book."""
    book, file = openpyxl.Workbook(), io.BytesIO()
    for name, content in {"Sheet": rows, **more}.items():
        sheet = book.active if name == "Sheet" else book.create_sheet(name)
        for row in content:
            sheet.append(list(row))
    for cell in itertools.chain.from_iterable(book.active.iter_rows()):
        if isinstance(cell.value, str):
            cell.data_type = "s"  # "=2" is a text here, not a formula
    if change:
        change(book)
    book.save(file)
    return file.getvalue()


def parts_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(parts: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing, compresslevel=1) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return file.getvalue()


def replaced(content: bytes, *changes: tuple[str, str]) -> bytes:
    """Make in a zipped file what its library does not write."""
    parts = parts_of(content)
    for (name, part), (old, new) in itertools.product(list(parts.items()), changes):
        parts[name] = parts[name].replace(old.encode(), new.encode()) if part else part
    return zip_of(parts)


SHARED = {
    "[Content_Types].xml": b'<Override PartName="/xl/sharedStrings.xml" ContentType="application/vnd'
    b'.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"/>',
    "xl/_rels/workbook.xml.rels": b'<Relationship Id="rId99" Target="sharedStrings.xml" Type="http://'
    b'schemas.openxmlformats.org/officeDocument/2006/relationships/sharedStrings"/>',
}
MAIN = b'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def raw_xlsx(
    cells: bytes, strings: bytes = b"", before: bytes = b"", packing: int = zipfile.ZIP_DEFLATED
) -> bytes:
    """A workbook whose one sheet, and list of texts, are written by hand."""
    parts = parts_of(xlsx([("text",)]))
    sheet = b"<worksheet %b>%b<sheetData>%b</sheetData></worksheet>" % (MAIN, before, cells)
    parts["xl/worksheets/sheet1.xml"] = sheet
    parts["xl/sharedStrings.xml"] = b"<sst %b>%b</sst>" % (MAIN, strings)
    for name, entry in SHARED.items():
        head, closing, tail = parts[name].rpartition(b"</")
        parts[name] = head + entry + closing + tail
    return zip_of(parts, packing)


def excel(rows: Rows) -> bytes:
    """As Excel itself writes it: every text once, in a list of its own."""
    known: dict[str, int] = {}

    def cell(place: str, value: object) -> str:
        if value is None or value == "":
            return f'<c r="{place}" s="0"/>'
        if isinstance(value, bool):
            return f'<c r="{place}" t="b"><v>{int(value)}</v></c>'
        if isinstance(value, (int, float)):
            return f'<c r="{place}"><v>{value}</v></c>'
        return f'<c r="{place}" t="s"><v>{known.setdefault(str(value), len(known))}</v></c>'

    lines = (
        f'<row r="{i}">{"".join(cell(f"{letters(j)}{i}", one) for j, one in enumerate(row, 1))}</row>'
        for i, row in enumerate(rows, 1)
    )
    cells = "".join(lines).encode()
    strings = (f'<si><t xml:space="preserve">{escape(text)}</t></si>' for text in known)
    return raw_xlsx(cells, "".join(strings).encode())


def inline(*texts: str) -> bytes:
    cells = "".join(f'<c t="inlineStr"><is><t>{escape(text)}</t></is></c>' for text in texts)
    return f"<row>{cells}</row>".encode()


def xls(rows: Rows, sheet: str = "Tabelle1", filepass: bool = False) -> bytes:
    book, file = xlwt.Workbook(), io.BytesIO()
    page, day = book.add_sheet(sheet), xlwt.easyxf(num_format_str="yyyy-mm-dd")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            page.write(
                i, j, cell, day if isinstance(cell, datetime.date) else xlwt.Style.default_style
            )
    if not filepass:
        book.save(file)
        return file.getvalue()
    stream = book.get_biff_data()  # a password: a FILEPASS record behind the first record
    return ole(stream[:20] + b"\x2f\x00\x06\x00" + bytes(6) + stream[20:])


def ole(stream: bytes, name: str = "Workbook", second: str = "") -> bytes:
    """The container of old Office files, with one stream and maybe the name of a second."""
    file = io.BytesIO()
    xlwt.CompoundDoc.XlsDoc().save(file, stream)
    content = bytearray(file.getvalue())
    start = content.index("Workbook".encode("utf-16-le"))
    for entry, called in enumerate(filter(None, (name, second))):
        raw = called.encode("utf-16-le") + bytes(2)
        place = start + 128 * entry
        content[place : place + 64] = raw.ljust(64, b"\0")
        content[place + 64 : place + 67] = len(raw).to_bytes(2, "little") + b"\x02"
    return bytes(content)


def xlsb(rows: Rows) -> bytes:
    file = io.BytesIO()
    with XlsbWriter(file) as book:
        book.add_sheet("Sheet1")
        book.write_sheet([list(row) for row in rows])
    return file.getvalue()


def ods(rows: Rows, tail: str = "") -> bytes:
    """As LibreOffice writes it: every row and the sheet padded to the largest size there is."""

    def cell(value: object) -> str:
        if isinstance(value, (int, float)):
            kind, text = f'office:value-type="float" office:value="{value}"', str(value)
        else:
            kind, text = 'office:value-type="string"', str(value)
        spaced = re.sub("  +", lambda run: f' <text:s text:c="{len(run[0]) - 1}"/>', escape(text))
        lines = "".join(f"<text:p>{line}</text:p>" for line in spaced.split("\n"))
        return f"<table:table-cell {kind}>{lines}</table:table-cell>" if text else EMPTY_CELL

    padding = '<table:table-cell table:number-columns-repeated="{}"/>'
    body = "".join(
        f"<table:table-row>{''.join(map(cell, row))}{padding.format(16384 - len(row))}"
        "</table:table-row>"
        for row in rows
    )
    rest = (
        f'<table:table-row table:number-rows-repeated="{1048576 - len(rows)}">'
        f"{padding.format(16384)}</table:table-row>"
    )
    names = "".join(
        f' xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "table", "text")
    )
    content = (
        f'<?xml version="1.0"?><office:document-content{names}><office:body><office:spreadsheet>'
        f'<table:table table:name="Arkusz1">{body}{tail or rest}</table:table>'
        "</office:spreadsheet></office:body></office:document-content>"
    )
    kind = "application/vnd.oasis.opendocument.spreadsheet"
    manifest = (
        '<manifest:manifest xmlns:manifest="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0">'
        f'<manifest:file-entry manifest:full-path="/" manifest:media-type="{kind}"/>'
        "</manifest:manifest>"
    )
    return zip_of(
        {
            "mimetype": kind.encode(),
            "content.xml": content.encode(),
            "META-INF/manifest.xml": manifest.encode(),
        }
    )


EMPTY_CELL = "<table:table-cell/>"

FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "xlsx": excel,
    "csv": csv_file,
    "tsv": lambda rows: csv_file(rows, delimiter="\t"),
    "json": lambda rows: js(records(rows[1:], [*map(str, rows[0])])),
    "jsonl": lambda rows: jsonl(*records(rows[1:], [*map(str, rows[0])])),
    "parquet": lambda rows: parquet(records(rows[1:], [*map(str, rows[0])])),
    "xls": xls,
    "xlsb": xlsb,
    "ods": ods,
}


# -- Reading them


@dataclass(frozen=True)
class File:
    """A file by its name and content, and what must come of it."""

    name: str
    content: bytes
    expected: Texts
    rows: Sequence[int] | None = None  # of the pairs; None where no row is meant
    dropped: Sequence[tuple[int | None, str]] = ()  # row, and a pattern of the reason
    settings: dict[str, Any] = field(default_factory=dict)
    shape: str = "question and answer"


def read(path: Path | str, **changes: Any) -> ft.Pairs:
    pairs = ft.find_pairs(ft.Config(DATASET_PATH=str(path), **changes))
    assert_sound(pairs)
    return pairs


def assert_sound(pairs: ft.Pairs) -> None:
    """What holds of everything that is read."""
    assert pairs.shape in ("question and answer", "conversations", "message tree")
    for pair in pairs.kept:
        assert [message["role"] for message in pair.messages] == ["user", "assistant"] * (
            len(pair.messages) // 2
        )
        contents = [message["content"] for message in pair.messages]
        assert all(type(text) is str and text == text.strip() and text for text in contents)
        assert "".join(contents).encode()
        assert [pair.question, pair.answer] == contents[-2:]
    assert all(note.reason and note.row > 0 for note in pairs.dropped)


def texts(pairs: ft.Pairs) -> list[tuple[str, ...]]:
    return [tuple(message["content"] for message in pair.messages) for pair in pairs.kept]


def refusal(path: Path | str, **changes: Any) -> str:
    with pytest.raises(ft.UserError) as refused:
        read(path, **changes)
    message = str(refused.value)
    assert Path(path).name in message
    assert message.replace("\n", "").isprintable()
    assert 30 < len(message) < 3000
    return in_words(message)


def check(file: File, folder: Path) -> None:
    (folder / file.name).write_bytes(file.content)
    pairs = read(file.name, **file.settings)
    assert texts(pairs) == [tuple(one) for one in file.expected]
    assert pairs.shape == file.shape
    if file.rows is not None:
        assert [pair.row for pair in pairs.kept] == list(file.rows)
    if file.shape != "message tree":
        assert len(pairs.dropped) == len(file.dropped)
        for note, (row, reason) in zip(pairs.dropped, file.dropped, strict=True):
            assert row in (None, note.row)
            assert re.search(reason, note.reason)


@pytest.fixture(autouse=True)
def _no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """No file may bring a library's warning onto the screen."""
    yield
    assert [str(warning.message) for warning in recwarn] == []


def files(table: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", table.values(), ids=table)


# -- Languages: the answers stand left, so that only the header tells them

LANGUAGES: dict[str, list[tuple[str, str]]] = {
    "Turkish": [("soru", "cevap"), ("İade süresi", "On dört gün."), ("Kargo ücreti", "Ücretsiz")],
    "Portuguese": [("Pergunta", "Resposta"), ("Troca", "Até 30 dias"), ("Frete", "É grátis")],
    "Spanish": [("Pregunta", "Respuesta"), ("Devolución", "30 días"), ("Envío", "Mañana")],
    "German": [("Frage", "Antwort"), ("Rückgabe", "Binnen 14 Tagen"), ("Größe", "Fällt groß aus")],
    "French": [("Question", "Réponse"), ("Délai", "Deux jours"), ("Reçu", "Par courriel, à part")],
    "Italian": [("Domanda", "Risposta"), ("Resi", "Entro 30 giorni"), ("Città", "A Forlì")],
    "Dutch": [("Vraag", "Antwoord"), ("Retour", "Binnen 14 dagen"), ("Geïnd", "Eén keer")],
    "Polish": [("Pytanie", "Odpowiedź"), ("Zwrot", "Czternaście dni"), ("Żółć", "Zażółć gęślą")],
    "Czech": [("Otázka", "Odpověď"), ("Vrácení", "Do 14 dnů"), ("Kůň", "Příliš žluťoučký")],
    "Swedish": [("Fråga", "Svar"), ("Retur", "Inom 14 dagar"), ("Åäö", "Räksmörgås på ö")],
    "Russian": [("Вопрос", "Ответ"), ("Возврат", "В течение 14 дней"), ("Ёж", "Ёлка, ещё")],
    "Ukrainian": [("Питання", "Відповідь"), ("Повернення", "Є 14 днів"), ("Їжак", "Ґанок")],
    "Greek": [("Ερώτηση", "Απάντηση"), ("Επιστροφή", "Σε 14 ημέρες"), ("Ώρες", "Εννέα")],
    "Arabic": [("سؤال", "إجابة"), ("الإرجاع", "خلال ١٤ يومًا"), ("الشحن", "مجانًا، دائمًا")],
    "Persian": [("پرسش", "پاسخ"), ("مرجوعی", "تا ۱۴ روز"), ("ارسال", "می\u200cرسد")],
    "Hebrew": [("שאלה", "תשובה"), ("החזרה", 'עד 14 יום, ע"פ חוק'), ("משלוח", "חינם")],
    "Hindi": [("प्रश्न", "उत्तर"), ("वापसी", "चौदह दिन में।"), ("शुल्क", "नहीं है")],
    "Bengali": [("প্রশ্ন", "উত্তর"), ("ফেরত", "চৌদ্দ দিনে।"), ("খরচ", "নেই")],
    "Thai": [("คำถาม", "คำตอบ"), ("คืนสินค้า", "ภายใน 14 วัน"), ("ค่าส่ง", "ฟรี")],
    "Vietnamese": [("Câu hỏi", "Trả lời"), ("Đổi trả", "Trong 14 ngày"), ("Phí", "Miễn phí")],
    "Indonesian": [("Pertanyaan", "Jawaban"), ("Retur", "Empat belas hari"), ("Ongkir", "Gratis")],
    "Swahili": [("Swali", "Jibu"), ("Kurudisha", "Siku kumi na nne"), ("Usafiri", "Bila malipo")],
    "Chinese": [("问题", "答案"), ("退货", "十四天内。"), ("运费", "免费，全国包邮")],
    "Japanese": [("質問", "回答"), ("返品", "14日以内です。"), ("送料", "無料です")],
    "Korean": [("질문", "답변"), ("반품", "14일 이내입니다."), ("배송비", "무료입니다")],
}


@pytest.mark.parametrize(
    "language, kind", list(zip(LANGUAGES, itertools.cycle(FORMATS), strict=False)), ids=str
)
def test_every_language_and_format_is_read(language: str, kind: str, folder: Path) -> None:
    rows = [(answer, question) for question, answer in LANGUAGES[language]]
    check(File(f"{language}.{kind}", FORMATS[kind](rows), LANGUAGES[language][1:]), folder)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "header",
    [("პასუხი", "კითხვა"), ("பதில்", "கேள்வி"), ("መልስ", "ጥያቄ"), ("Them", "Us")],
    ids="-".join,
)
def test_words_nobody_foresaw_are_told_apart_by_what_asks(
    header: tuple[str, str], kind: str, folder: Path
) -> None:
    rows = [header, *(row[::-1] for row in TWO)]
    check(File(f"faq.{kind}", FORMATS[kind](rows), TWO), folder)


# -- Spreadsheets

STRICT = [
    ("http://schemas.openxmlformats.org/spreadsheetml/2006/main",) * 2,
    (
        "http://schemas.openxmlformats.org/officeDocument/2006/relationships",
        "http://purl.oclc.org/ooxml/officeDocument/relationships",
    ),
]
STRICT[0] = (STRICT[0][0], "http://purl.oclc.org/ooxml/spreadsheetml/main")
PREAMBLE: list[tuple[str, ...]] = [("Perguntas frequentes — loja",), ("Atualizado em maio",), ()]
PHONETIC = (
    '<si><r><t>東京</t></r><r><rPr><b/></rPr><t>タワー</t></r><rPh sb="0" eb="2"><t>トウキョウ</t></rPh>'
    '<phoneticPr fontId="1"/></si>'
)


def merged(book: Any) -> None:
    book.active.merge_cells("A1:C1")  # a title over all columns
    book.active.merge_cells("A3:A4")  # a topic beside its two questions
    book.active.merge_cells("B5:B6")  # a question with two answers below one another


def hidden(book: Any) -> None:
    book["Lists"].sheet_state = "hidden"


def styled(book: Any) -> None:
    """A comment far to the right, a filter, colours, a frozen row, a picture of numbers."""
    sheet = book.active
    sheet["Z2"] = "checked by Ann"
    sheet.auto_filter.ref = "A1:B3"
    sheet.freeze_panes = "A2"
    sheet.sheet_view.rightToLeft = True
    for cell in sheet[1]:
        cell.font = openpyxl.styles.Font(bold=True)
    for row in range(4, 60):
        sheet.cell(row, 1).fill = openpyxl.styles.PatternFill("solid", "FFFF00")
    book.create_chartsheet("Chart", 0)


def rich(book: Any) -> None:
    bold = InlineFont(b=True)
    book.active["B2"] = CellRichText("Press ", TextBlock(bold, "Reset"), " twice.")


def computed(formula: str, cached: str, kind: str = "str") -> str:
    return f'<row><c t="inlineStr"><is><t>{cached or "Blank"}?</t></is></c><c t="{kind}"><f>{formula}</f>{f"<v>{cached}</v>" if cached else ""}</c></row>'


PREFIXED = ("sheetData", "row", "c", "is", "t")
WORKBOOKS = {
    "a header below a title, in Portuguese": File(
        "a.xlsx",
        xlsx([*PREAMBLE, ("Nº", "Pergunta", "Resposta"), (1, *TWO[0]), (2, *TWO[1])]),
        TWO,
        rows=[5, 6],
    ),
    "no header at all, in Hebrew": File(
        "שאלות.xlsx",
        xlsx([("מתי פותחים?", "בתשע"), ("מתי סוגרים?", "בשש")]),
        [("מתי פותחים?", "בתשע"), ("מתי סוגרים?", "בשש")],
        rows=[1, 2],
    ),
    "no header, and sentences that ask nothing": File(
        "a.xlsx",
        xlsx(
            [
                ("Tell me about your opening hours", "We open at nine and close at six."),
                ("Give me the address of the shop", "High Street 5, just behind the church."),
            ]
        ),
        [
            ("Tell me about your opening hours", "We open at nine and close at six."),
            ("Give me the address of the shop", "High Street 5, just behind the church."),
        ],
    ),
    "a number column and owners, in German": File(
        "FAQ Kundendienst.xlsx",
        xlsx(
            [
                ("Nr.", "Frage", "Antwort", "Zuständig", "Stand"),
                (1, "Rückgabe", "14 Tage", "Ann", datetime.date(2024, 5, 1)),
                (2, "Versand", "Kostenlos", "Bert", datetime.date(2024, 5, 2)),
            ]
        ),
        [("Rückgabe", "14 Tage"), ("Versand", "Kostenlos")],
    ),
    "merged cells": File(
        "a.xlsx",
        xlsx(
            [
                ("All of our answers",),
                ("topic", *HEADER),
                ("shop", *TWO[0]),
                (None, *TWO[1]),
                ("other", "Two?", "First."),
                (None, None, "Second."),
            ],
            merged,
        ),
        [*TWO, ("Two?", "First.")],
        rows=[3, 4, 5],
        dropped=[(6, "no question")],
    ),
    "a hidden sheet of lists": File(
        "a.xlsx", xlsx(QA2, hidden, Lists=[(f"a{i}", f"b{i}") for i in range(9)]), TWO
    ),
    "colours, a chart sheet, a remark far right": File(
        "a.xlsx", xlsx(QA2, styled), TWO, rows=[2, 3]
    ),
    "several sheets, one for every year": File(
        "a.xlsx", xlsx([HEADER, TWO[0]], Y2023=QA4, Y2024=QA2), FOUR
    ),
    "a longer sheet of something else": File(
        "a.xlsx", xlsx([("Who", "What"), *((f"p{i}", f"did {i}") for i in range(9))], QA=QA2), TWO
    ),
    "rich text": File(
        "a.xlsx", xlsx([HEADER, ("How?", "?")], rich), [("How?", "Press Reset twice.")]
    ),
    "inline strings, as many web tools write": File(
        "a.xlsx", raw_xlsx(b"".join(inline(*row) for row in QA2)), TWO
    ),
    "inline rich text": File(
        "a.xlsx",
        raw_xlsx(
            inline(*HEADER)
            + inline(*TWO[0])
            + b'<row><c t="inlineStr"><is><t>How?</t></is></c><c t="inlineStr"><is><r><t>Th</t></r>'
            b"<r><t>us.</t></r></is></c></row>"
        ),
        TWO,
    ),
    "shared strings with Japanese readings": File(
        "東京.xlsx",
        raw_xlsx(
            inline("質問", "回答")
            + b'<row><c t="inlineStr"><is><t>Where?</t></is></c><c t="s"><v>0</v></c></row>',
            PHONETIC.encode(),
        ),
        [("Where?", "東京タワー")],
    ),
    "formulas with their last results": File(
        "a.xlsx",
        raw_xlsx(
            inline(*HEADER)
            + computed('CONCATENATE("A","b")', "Ab").encode()
            + computed("SUM(2,2)", "4", "n").encode()
            + computed("1=1", "1", "b").encode()
        ),
        [("Ab?", "Ab"), ("4?", "4"), ("1?", "TRUE")],
    ),
    "formulas that were never computed": File(
        "a.xlsx",
        raw_xlsx(inline(*HEADER) + inline(*TWO[0]) + computed('CONCATENATE("A","b")', "").encode()),
        TWO[:1],
        dropped=[(3, "no answer")],
    ),
    "formulas that failed": File(
        "a.xlsx",
        raw_xlsx(
            inline(*HEADER) + inline(*TWO[0]) + computed("VLOOKUP(1,A:A,9)", "#REF!", "e").encode()
        ),
        TWO[:1],
        dropped=[(3, "no answer")],
    ),
    "numbers, dates and truths as answers": File(
        "a.xlsx",
        xlsx(
            [
                HEADER,
                ("How many?", 4),
                ("How much?", 2.5),
                ("When?", datetime.datetime(2024, 3, 5)),
                ("Is it?", True),
                ("Agent?", "007"),
            ]
        ),
        [
            ("How many?", "4"),
            ("How much?", "2.5"),
            ("When?", "2024-03-05"),
            ("Is it?", "TRUE"),
            ("Agent?", "007"),
        ],
    ),
    "Strict Open XML": File("a.xlsx", replaced(xlsx(QA4), *STRICT), FOUR, rows=[2, 3, 4, 5]),
    "Strict Open XML from the third row on": File(
        "a.xlsx", replaced(xlsx([(), (), HEADER, *TWO]), *STRICT), TWO, rows=[4, 5]
    ),
    "macros": File(
        "a.xlsm",
        replaced(
            xlsx(QA2),
            (
                "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml",
                "application/vnd.ms-excel.sheet.macroEnabled.main+xml",
            ),
        ),
        TWO,
    ),
    "parts named as Excel names them": File(
        "a.xlsx", replaced(xlsx(QA2), ('Target="/xl/', 'Target="')), TWO
    ),
    "prefixes on all names, as .NET tools write them": File(
        "a.xlsx",
        replaced(
            raw_xlsx(b"".join(inline(*row) for row in QA2)),
            *((f"<{tag}>", f"<x:{tag}>") for tag in PREFIXED),
            *((f"</{tag}>", f"</x:{tag}>") for tag in PREFIXED),
            ("<worksheet xmlns=", "<x:worksheet xmlns:x="),
            ("</worksheet>", "</x:worksheet>"),
            ('<c t="', '<x:c t="'),
        ),
        TWO,
    ),
    "Excel 97, with a long answer": File(
        "a.xls",
        xls([("Frage", "Antwort"), ("Länge?", "Wörter ß " * 3000 + "Ω"), ("Wie viele?", 4)]),
        [("Länge?", "Wörter ß " * 3000 + "Ω"), ("Wie viele?", "4")],
        rows=[2, 3],
    ),
    "Excel 97, dates": File(
        "a.xls",
        xls([HEADER, ("When?", datetime.datetime(2024, 3, 5)), TWO[0]]),
        [("When?", "2024-03-05"), TWO[0]],
    ),
    "Excel 97 from the third row on": File("a.xls", xls([(), (), HEADER, *TWO]), TWO, rows=[4, 5]),
    "a binary workbook": File(
        "a.xlsb",
        xlsb([("id", *HEADER), (1, *TWO[0]), (2, *TWO[1]), (3, "How many?", 4)]),
        [*TWO, ("How many?", "4")],
        rows=[2, 3, 4],
    ),
    "LibreOffice, with several lines in a cell": File(
        "a.ods",
        ods([("Pytanie", "Odpowiedź"), ("Kod?", "if x:\n    return  1"), ("Ile?", 4)]),
        [("Kod?", "if x:\n    return  1"), ("Ile?", "4")],
        rows=[2, 3],
    ),
    "LibreOffice, rows that repeat": File(
        "a.ods",
        ods(
            [("Wykaz",)],
            '<table:table-row table:number-rows-repeated="3"><table:table-cell/></table:table-row>'
            + "".join(
                f'<table:table-row><table:table-cell office:value-type="string"><text:p>{q}</text:p>'
                '</table:table-cell><table:table-cell office:value-type="string">'
                f"<text:p>{a}</text:p></table:table-cell></table:table-row>"
                for q, a in QA2
            ),
        ),
        TWO,
        rows=[6, 7],
    ),
    "LibreOffice, with a note on a cell": File(
        "a.ods",
        replaced(
            ods(QA2),
            (
                "<text:p>So.",
                "<office:annotation><text:p>Ask Ann.</text:p></office:annotation><text:p>So.",
            ),
        ),
        TWO,
    ),
    ".xlsx named .xls": File("a.xls", xlsx(QA2), TWO),
    ".xls named .xlsx": File("a.xlsx", xls(QA2), TWO),
    ".xlsb named .xlsx": File("a.xlsx", xlsb(QA2), TWO),
    ".ods named .xlsx": File("a.xlsx", ods(QA2), TWO),
    ".csv named .xlsx": File("a.xlsx", csv_file(QA2), TWO),
    ".xlsx named .csv": File("a.csv", xlsx(QA2), TWO),
    ".parquet named .csv": File("a.csv", parquet(records(TWO)), TWO),
    ".json named .csv": File("a.csv", js(records(TWO)), TWO),
    "a name without an ending": File("dataset", xlsx(QA2), TWO),
}


@files(WORKBOOKS)
def test_spreadsheets_are_read_as_they_look(file: File, folder: Path) -> None:
    check(file, folder)


# -- Text tables

CODE = 'def f(x):\n    if x:\n\treturn "a, b"\n    return {"k": [1]}'
LITERAL = [
    ("None?", "None"),
    ("Sodium?", "NA"),
    ("Pointer?", "null"),
    ("Bread?", "nan"),
    ("Date?", "2024-03-05 00:00:00"),
    ("Version?", "1.10"),
    ("Flag?", "true"),
    ("Agent?", "007"),
    ("Template?", "Dear {{name}}, {x} %s $HOME <br> &amp; \\n"),
    ("Sum?", "=2+2"),
    ("Code?", CODE),
    ("Math?", "2 + 2 = 4\n#### 4"),
    ("Spark?", "👩‍👩‍👧 e\u0301 a\u2028b\u0085c"),
]
CHINESE = [
    ("问题", "答案"),
    ("退货需要几天时间", "收到商品之后十四天之内都可以退货。"),
    ("运费是多少钱", "全国免费包邮，偏远地区除外。"),
    ("怎样联系客服", "请拨打电话，或者发送电子邮件。"),
]
TEXT_TABLES = {
    "comma, space, quote": File(
        "a.csv",
        csv_file([HEADER, ("a, b?", "c; d"), *TWO], quoting=csv.QUOTE_ALL).replace(b'","', b'", "'),
        [("a, b?", "c; d"), *TWO],
    ),
    "semicolons, as Excel writes them in half of Europe": File(
        "a.csv",
        csv_file([("Frage", "Antwort"), ("1,5?", "Ja, 1,5"), *TWO], delimiter=";"),
        [("1,5?", "Ja, 1,5"), *TWO],
    ),
    "tabs": File("a.tsv", csv_file(QA4, delimiter="\t"), FOUR),
    "bars": File("a.csv", csv_file(QA4, delimiter="|"), FOUR),
    "sep= in the first line": File(
        "a.csv", b"sep=;\r\n" + csv_file(QA2, delimiter=";"), TWO, rows=[3, 4]
    ),
    "UTF-8 with a mark": File("a.csv", csv_file(QA2, "utf-8-sig"), TWO),
    "UTF-16 with a mark": File(
        "質問.csv", csv_file([("質問", "回答"), *TWO], "utf-16", delimiter="\t"), TWO
    ),
    "UTF-16 without a mark": File("a.csv", csv_file(QA2, "utf-16-le"), TWO),
    "UTF-16, big end first, no mark": File("a.csv", csv_file(QA2, "utf-16-be"), TWO),
    "GB 18030": File("问答.csv", csv_file(CHINESE, "gb18030"), CHINESE[1:]),
    "Windows-1252": File(
        "a.csv",
        csv_file([("¿Pregunta?", "Respuesta"), ("Año", "“Mañana” – 5 €")], "cp1252"),
        [("Año", "“Mañana” – 5 €")],
    ),
    "Windows-1251": File(
        "a.csv", csv_file(LANGUAGES["Russian"], "cp1251"), LANGUAGES["Russian"][1:]
    ),
    "line ends of an old Mac": File("a.csv", csv_file(QA2, lineterminator="\r"), TWO),
    "blank lines and no end of line": File(
        "a.csv",
        b"question,answer\n\nWhy?,So.\n\n\nHow?,Thus.",
        TWO,
        rows=[3, 6],
        dropped=[(2, "blank"), (4, "blank"), (5, "blank")],
    ),
    "an index column of pandas": File(
        "a.csv", pandas.DataFrame(records(TWO)).to_csv().encode(), TWO, rows=[2, 3]
    ),
    "an unnamed column of pandas": File(
        "a.csv", csv_file([("Unnamed: 0", *HEADER), (0, *TWO[0]), (1, *TWO[1])]), TWO
    ),
    "a chat without header, as it goes round": File(
        "dialogs.txt",
        b"hi, how are you?\ti'm fine. and you?\ni'm fine. and you?\tso let's go.\n",
        [("hi, how are you?", "i'm fine. and you?"), ("i'm fine. and you?", "so let's go.")],
        rows=[1, 2],
    ),
    "a preamble": File(
        "a.csv",
        csv_file([("Export",), ("2024-05-01",), (), HEADER, *TWO], delimiter=";"),
        TWO,
        rows=[5, 6],
    ),
    "texts that other readers take for nothing": File(
        "a.csv", csv_file([HEADER, *LITERAL]), LITERAL
    ),
    "lines inside of cells count once": File(
        "a.csv",
        csv_file([HEADER, ("A\nb\nc?", "d\n\ne"), *TWO]),
        [("A\nb\nc?", "d\n\ne"), *TWO],
        rows=[2, 3, 4],
    ),
    "rows with too many cells": File(
        "a.csv",
        b"question,answer\nWhy?,So.\nWho?,Me, or you\nHow?,Thus.\nWhen?,Now, then, ever\n",
        TWO,
        rows=[2, 4],
        dropped=[(3, "more cells"), (5, "more cells")],
    ),
    "rows with too few cells": File(
        "a.csv", b"question,answer\nWhy?,So.\nWho?\nHow?,Thus.\n", TWO, dropped=[(3, "no answer")]
    ),
    "copies": File(
        "a.csv",
        csv_file([HEADER, *TWO, ("WHY?", " so."), ("Why?", "Because.")]),
        [*TWO, ("Why?", "Because.")],
        dropped=[(4, "copy of row 2")],
    ),
    "integers": File("a.csv", b"question,answer\n2+2?,4\n3+3?,6\n", [("2+2?", "4"), ("3+3?", "6")]),
    "lists of Python": File(
        "a.csv",
        csv_file(
            [
                HEADER,
                ("Capital?", "['Paris']"),
                ("Cathedral?", '["St. John\'s"]'),
                ("Both?", "['Paris', 'London']"),
                ("None?", "[]"),
                ("Path?", r"['C:\\data']"),
            ]
        ),
        [("Capital?", "Paris"), ("Cathedral?", "St. John's"), ("Path?", "C:\\data")],
        rows=[2, 3, 6],
        dropped=[(4, "list"), (5, "no answer|list")],
    ),
    "a bracket here and there": File(
        "a.csv",
        csv_file([HEADER, *FOUR, ("How do I write a list?", "[1, 2]")]),
        [*FOUR, ("How do I write a list?", "[1, 2]")],
    ),
    "flat SQuAD of Python": File(
        "a.csv",
        csv_file(
            [
                ("id", "context", "question", "answers"),
                ("x1", "Paris is …", "Capital?", "{'text': ['Paris'], 'answer_start': [0]}"),
                ("x2", "Rome is …", "Rome?", "{'text': ['Yes', 'Sure'], 'answer_start': [0, 1]}"),
                ("x3", "Rome is …", "Why?", "{'text': [], 'answer_start': []}"),
            ]
        ),
        [("Capital?", "Paris"), ("Rome?", "Yes")],
        dropped=[(4, "no answer")],
    ),
    "Alpaca as a table": File(
        "a.csv",
        csv_file([("instruction", "input", "output"), ("Add.", "2, 2", "4"), ("Sing.", "", "La")]),
        [("Add.\n\n2, 2", "4"), ("Sing.", "La")],
    ),
}


@files(TEXT_TABLES)
def test_text_tables_are_read_as_they_look(file: File, folder: Path) -> None:
    check(file, folder)


def test_two_encodings_in_one_file_are_said_and_spoil_no_other_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = csv_file([("Question", "Réponse"), ("Où ?", "Là-bas, à Étampes"), ("Déjà ?", "Été")])
    (folder / "a.csv").write_bytes(good + "Café ?,Noir\r\n".encode("cp1252"))
    pairs = read("a.csv")
    assert texts(pairs)[:2] == [("Où ?", "Là-bas, à Étampes"), ("Déjà ?", "Été")]
    assert texts(pairs)[2:] in ([], [("Caf\ufffd ?", "Noir")], [("Café ?", "Noir")])
    assert "a.csv" in capsys.readouterr().out


LEGACY = {
    "cp1250": [("Pytanie", "Odpowiedź"), ("Źródło", "Zażółć gęślą jaźń"), ("Łódź", "Świetnie")],
    "cp1254": [("Soru", "Yanıt"), ("İade süresi", "On beş iş günü"), ("Ücret", "Değişmiş")],
    "cp1253": [("Ερώτηση", "Απάντηση"), ("Επιστροφή", "Δεκατέσσερις ημέρες"), ("Ώρες", "Εννέα")],
    "cp1255": [("שאלה", "תשובה"), ("החזרה", "ארבעה עשר יום"), ("משלוח", "חינם")],
    "cp1256": [("سؤال", "جواب"), ("الإرجاع", "خلال يومين"), ("الشحن", "مجانا")],
    "cp1258": [("Câu hoi", "Tra loi"), ("Đâu", "Ơ đây"), ("Sao", "Vây đó")],
    "koi8-r": LANGUAGES["Russian"],
    "cp874": LANGUAGES["Thai"],
    "shift_jis": LANGUAGES["Japanese"],
    "euc-jp": LANGUAGES["Japanese"],
    "euc-kr": LANGUAGES["Korean"],
    "big5": [("問題", "答案"), ("退貨", "十四天之內。"), ("運費", "免費，全國")],
    "latin-1": LANGUAGES["French"],
    "mac-roman": LANGUAGES["French"],
    "cp437": LANGUAGES["German"],
}


@pytest.mark.parametrize("encoding", LEGACY)
def test_an_old_encoding_is_read_right_or_refused_or_said(
    encoding: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "old.csv").write_bytes(csv_file(LEGACY[encoding], encoding))
    try:
        found = texts(read("old.csv"))
    except ft.UserError:
        return
    assert found == LEGACY[encoding][1:] or "old.csv" in capsys.readouterr().out


# -- JSON

GREETED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Paris",
            "paragraphs": [
                {
                    "context": "Paris is the capital of France.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "What is the capital?",
                            "answers": [
                                {"text": "Paris", "answer_start": 0},
                                {"text": "Paris, France", "answer_start": 0},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "id": "2",
                            "question": "Who founded it?",
                            "answers": [],
                            "plausible_answers": [{"text": "France", "answer_start": 24}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        },
        {
            "title": "Rome",
            "paragraphs": [
                {
                    "context": "Rome lies on the Tiber.",
                    "qas": [
                        {
                            "id": "3",
                            "question": "On which river?",
                            "answers": [{"text": "the Tiber", "answer_start": 13}],
                        }
                    ],
                }
            ],
        },
    ],
}
FLAT_SQUAD = [
    {"id": "a", "question": "Capital?", "answers": {"text": ["Paris"], "answer_start": [0]}},
    {
        "id": "b",
        "question": "Bowl?",
        "answers": {"text": ["Denver", "Broncos"], "answer_start": [0, 7]},
    },
    {"id": "c", "question": "Why?", "answers": {"text": [], "answer_start": []}},
]
ALPACA = [
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"instruction": "Sing.", "input": "", "output": "La la"},
    {"instruction": "Dance.", "output": "Tap"},
]
ALPACA_PAIRS = [("Add.\n\n2 and 2", "4"), ("Sing.", "La la"), ("Dance.", "Tap")]
NESTED_CELLS = [
    {"question": "One in a list?", "answer": ["Paris"]},
    {"question": "Two in a list?", "answer": ["Paris", "London"]},
    {"question": "None in a list?", "answer": []},
    {"question": "One in an object?", "answer": {"text": "Rome"}},
    {"question": "One of another name?", "answer": {"capital": "Bern"}},
    {"question": "Two in an object?", "answer": {"text": "Paris", "language": "fr"}},
    {"question": "More names?", "answer": {"value": "Paris", "aliases": ["Lutetia"]}},
    {"question": ["Asked in a list?"], "answer": "Yes"},
    {"question": "Nothing?", "answer": None},
]
JSON_FILES = {
    "a list of records": File("a.json", js(records(FOUR)), FOUR, rows=[1, 2, 3, 4]),
    "a list, with a mark": File("a.json", js(records(TWO), "utf-8-sig"), TWO),
    "a list, as PowerShell saves it": File("a.json", js(records(TWO), "utf-16"), TWO),
    "a list on many lines": File("a.json", js(records(TWO), indent=4), TWO),
    "a list of escapes": File(
        "a.json", json.dumps(records(LANGUAGES["Chinese"][1:])).encode(), LANGUAGES["Chinese"][1:]
    ),
    "one record a line": File("a.jsonl", jsonl(*records(FOUR)), FOUR, rows=[1, 2, 3, 4]),
    "one record a line, with a mark": File(
        "a.jsonl", b"\xef\xbb\xbf" + jsonl(*records(TWO)), TWO, rows=[1, 2]
    ),
    "one record a line, line ends of Windows": File(
        "a.jsonl", jsonl(*records(TWO)).replace(b"\n", b"\r\n"), TWO, rows=[1, 2]
    ),
    "one record a line, named .json": File("a.json", jsonl(*records(TWO)), TWO, rows=[1, 2]),
    "one record a line, named .csv": File("a.csv", jsonl(*records(TWO)), TWO),
    "one record a line, named .txt": File("a.txt", jsonl(*records(TWO)), TWO),
    "a list named .jsonl": File("a.jsonl", js(records(TWO)), TWO, rows=[1, 2]),
    "texts to the letter": File("a.jsonl", jsonl(*records(LITERAL)), LITERAL),
    "texts to the letter, in a list": File("a.json", js(records(LITERAL)), LITERAL),
    "blank lines": File(
        "a.jsonl", b"\n" + jsonl(*records(TWO)).replace(b"\n", b"\n\n"), TWO, rows=[2, 4]
    ),
    "a broken line": File(
        "a.jsonl",
        jsonl(*records(TWO)) + b'{"question": "Cut?", "ans\n' + jsonl(*records(FOUR[2:])),
        FOUR,
        rows=[1, 2, 4, 5],
        dropped=[(3, "JSON")],
    ),
    "a last line cut off": File(
        "a.jsonl", jsonl(*records(FOUR))[:-20], FOUR[:3], dropped=[(4, "JSON")]
    ),
    "lines that are no records": File(
        "a.jsonl",
        jsonl(*records(TWO), "a text", 7, None, *records(FOUR[2:])),
        FOUR,
        rows=[1, 2, 6, 7],
        dropped=[(3, "."), (4, "."), (5, ".")],
    ),
    "wrapped in data": File("a.json", js({"data": records(TWO)}), TWO, rows=[1, 2]),
    "wrapped in dataset": File("a.json", js({"dataset": records(TWO)}), TWO),
    "wrapped, beside other things": File(
        "a.json", js({"version": 1, "license": "MIT", "data": records(TWO)}), TWO
    ),
    "train and test": File("a.json", js({"train": records(FOUR), "test": records(TWO)}), FOUR),
    "test before train": File(
        "a.json", js({"test": records(FOUR[:1]), "train": records(FOUR[1:])}), FOUR[1:]
    ),
    "columns": File(
        "a.json",
        js({"question": [q for q, _ in FOUR], "answer": [a for _, a in FOUR]}),
        FOUR,
        rows=[1, 2, 3, 4],
    ),
    "ids with their records": File(
        "a.json", js({f"id{i}": one for i, one in enumerate(records(FOUR))}), FOUR
    ),
    "lists with a header": File("a.json", js(QA2), TWO, rows=[2, 3]),
    "lists without a header": File("a.json", js(TWO), TWO, rows=[1, 2]),
    "keys in another order and some missing": File(
        "a.json",
        js([{"answer": "So.", "question": "Why?"}, {"question": "Open?"}, *records(TWO[1:])]),
        TWO,
        rows=[1, 3],
        dropped=[(2, "no answer")],
    ),
    "an id of MongoDB": File(
        "a.json", js([{"_id": {"$oid": f"{i}a"}, **one} for i, one in enumerate(records(TWO))]), TWO
    ),
    "numbers": File(
        "a.json",
        js(records([("2+2?", 4), ("Half?", 0.5), ("Long?", 12345678901234567890)])),
        [("2+2?", "4"), ("Half?", "0.5"), ("Long?", "12345678901234567890")],
    ),
    "lists and objects in cells": File(
        "a.json",
        js(NESTED_CELLS),
        [
            ("One in a list?", "Paris"),
            ("One in an object?", "Rome"),
            ("One of another name?", "Bern"),
            ("Asked in a list?", "Yes"),
        ],
        rows=[1, 4, 5, 8],
        dropped=[
            (2, "list"),
            (3, "no answer|list"),
            (6, "object"),
            (7, "object"),
            (9, "no answer"),
        ],
    ),
    "answers that are JSON themselves": File(
        "a.jsonl",
        jsonl(*records([("Ann, 5", '{"text": "Ann", "age": 5}'), ("Bo", '{"text": "Bo"}')])),
        [("Ann, 5", '{"text": "Ann", "age": 5}'), ("Bo", '{"text": "Bo"}')],
    ),
    "SQuAD": File(
        "a.json",
        js(SQUAD),
        [("What is the capital?", "Paris"), ("On which river?", "the Tiber")],
        dropped=[(None, "no answer")],
    ),
    "flat SQuAD": File(
        "a.json",
        js(FLAT_SQUAD),
        [("Capital?", "Paris"), ("Bowl?", "Denver")],
        rows=[1, 2],
        dropped=[(3, "no answer")],
    ),
    "flat SQuAD, one a line": File(
        "a.jsonl",
        jsonl(*FLAT_SQUAD),
        [("Capital?", "Paris"), ("Bowl?", "Denver")],
        dropped=[(3, "no answer")],
    ),
    "Alpaca": File("a.json", js(ALPACA), ALPACA_PAIRS, rows=[1, 2, 3]),
    "Alpaca, one a line": File("a.jsonl", jsonl(*ALPACA), ALPACA_PAIRS),
    "Alpaca in Chinese": File(
        "a.json",
        js([{"instruction": "翻译。", "input": "你好", "output": "Hello", "history": []}]),
        [("翻译。\n\n你好", "Hello")],
    ),
    "prompt and completion": File(
        "a.jsonl",
        jsonl(*records([("Why?", " So."), ("How?", " Thus.\n")], ("prompt", "completion"))),
        TWO,
    ),
    "Dolly": File(
        "a.jsonl",
        jsonl(
            *({"instruction": q, "context": "", "response": a, "category": "qa"} for q, a in FOUR)
        ),
        FOUR,
    ),
    "UltraChat": File(
        "a.jsonl",
        jsonl({"prompt": "Hi", "prompt_id": "x1", "messages": GREETED}),
        [("Hi", "Hello", "Why?", "So.")],
        shape="conversations",
    ),
    "GSM8K": File(
        "a.jsonl",
        jsonl({"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}),
        [("2+2?", "It is <<2+2=4>>4.\n#### 4")],
    ),
}


@files(JSON_FILES)
def test_json_is_read_in_every_form_that_goes_round(file: File, folder: Path) -> None:
    check(file, folder)


# -- Parquet

PARQUETS = {
    "two columns": File("a.parquet", parquet(records(FOUR)), FOUR, rows=[1, 2, 3, 4]),
    "Brotli and small groups": File(
        "a.parquet", parquet(records(FOUR), compression="brotli", row_group_size=1), FOUR
    ),
    "written by pandas, with an index": File(
        "a.parquet", pandas.DataFrame(records(TWO), index=["x", "y"]).to_parquet(), TWO
    ),
    "categories": File(
        "a.parquet", pandas.DataFrame(records(TWO)).astype("category").to_parquet(), TWO
    ),
    "whole numbers with one missing": File(
        "a.parquet",
        parquet(records([("2+2?", 4), ("Open?", None), ("Long?", 2**60 + 1)])),
        [("2+2?", "4"), ("Long?", "1152921504606846977")],
        rows=[1, 3],
        dropped=[(2, "no answer")],
    ),
    "dates and decimals": File(
        "a.parquet",
        parquet([{"question": "When?", "answer": datetime.date(2024, 3, 5)}]),
        [("When?", "2024-03-05")],
    ),
    "decimals": File(
        "a.parquet",
        parquet([{"question": "How much?", "answer": decimal.Decimal("12.50")}]),
        [("How much?", "12.50")],
    ),
    "lists of one": File(
        "a.parquet",
        parquet(records([("Capital?", ["Paris"]), ("Both?", ["Paris", "London"])])),
        [("Capital?", "Paris")],
        dropped=[(2, "list")],
    ),
    "flat SQuAD": File(
        "a.parquet",
        parquet(FLAT_SQUAD),
        [("Capital?", "Paris"), ("Bowl?", "Denver")],
        dropped=[(3, "no answer")],
    ),
    "Alpaca": File("a.parquet", parquet(ALPACA), ALPACA_PAIRS),
    "messages": File(
        "a.parquet",
        parquet([{"prompt_id": "x", "messages": GREETED}]),
        [("Hi", "Hello", "Why?", "So.")],
        shape="conversations",
    ),
    "messages written by pandas": File(
        "a.parquet",
        pandas.DataFrame({"messages": [GREETED[:2], GREETED]}).to_parquet(),
        [("Hi", "Hello"), ("Hi", "Hello", "Why?", "So.")],
        rows=[1, 2],
        shape="conversations",
    ),
}


@files(PARQUETS)
def test_parquet_is_read_with_its_types(file: File, folder: Path) -> None:
    check(file, folder)


# -- Conversations


def chat(*turns: str, role: str = "role", content: str = "content") -> list[dict[str, Any]]:
    """Turns as "user: Hi", in the form of OpenAI."""
    pieces = (turn.split(": ", 1) for turn in turns)
    return [{role: speaker, content: text} for speaker, text in pieces]


def sharegpt(*turns: str) -> list[dict[str, Any]]:
    return chat(*turns, role="from", content="value")


def parts(*texts: str, image: bool = False) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts]
    if image:
        content.append({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})
    return {"role": "user", "content": content}


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    ],
}
SPOKEN_CALL = {**CALL, "content": "Let me look."}
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "time"}}
TALKS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...] | str]] = {
    "one question": (chat("user: Hi", "assistant: Hello"), ("Hi", "Hello")),
    "several turns": (GREETED, ("Hi", "Hello", "Why?", "So.")),
    "a system turn": (
        chat("system: Be kind.", "user: Hi", "assistant: Hello", "user: Why?", "assistant: So."),
        ("Be kind.\n\nHi", "Hello", "Why?", "So."),
    ),
    "an empty system turn": (chat("system: ", "user: Hi", "assistant: Hello"), ("Hi", "Hello")),
    "two turns of one role": (
        chat("user: Hi", "user: You there?", "assistant: Yes.", "assistant: I am."),
        ("Hi\n\nYou there?", "Yes.\n\nI am."),
    ),
    "a greeting first": (
        chat("assistant: Welcome!", "user: Hi", "assistant: Hello"),
        ("Hi", "Hello"),
    ),
    "a system turn and a greeting": (
        chat("system: Be kind.", "assistant: Welcome!", "user: Hi", "assistant: Hello"),
        ("Be kind.\n\nHi", "Hello"),
    ),
    "an open question last": (
        chat("user: Hi", "assistant: Hello", "user: Bye", "user: Still there?"),
        ("Hi", "Hello"),
    ),
    "no answer": (chat("user: Hi"), "answer"),
    "only a system turn and an answer": (
        chat("system: Be kind.", "assistant: Hello"),
        "question|answer",
    ),
    "an empty answer": (chat("user: Hi", "assistant:  "), "answer"),
    "a tool in the second answer": (
        [*GREETED[:3], CALL, *chat("tool: 12:00", "assistant: Noon.")],
        ("Hi", "Hello"),
    ),
    "a tool with words before it": (
        [*GREETED[:3], SPOKEN_CALL, *chat("tool: 12:00", "assistant: Noon.")],
        ("Hi", "Hello"),
    ),
    "a function of the old kind": (
        [*GREETED[:3], OLD_CALL, *chat("function: 12:00", "assistant: Noon.")],
        ("Hi", "Hello"),
    ),
    "a tool from the start": (
        [GREETED[0], CALL, *chat("tool: 12:00", "assistant: Noon.")],
        "tool|function|answer",
    ),
    "a tool's output without the call": (
        chat("user: Hi", "tool: 12:00", "assistant: Noon."),
        "tool|function|answer",
    ),
    "tools that were not called": (
        [
            GREETED[0],
            {**GREETED[1], "tool_calls": []},
            {**GREETED[2], "tool_calls": None},
            GREETED[3],
        ],
        ("Hi", "Hello", "Why?", "So."),
    ),
    "names and other fields": (
        [{"name": "ann", "weight": 1, **GREETED[0]}, {"name": "bot", **GREETED[1]}],
        ("Hi", "Hello"),
    ),
    "a text in parts": ([parts("Hi"), GREETED[1]], ("Hi", "Hello")),
    "a picture": ([parts("What is it?", image=True), GREETED[1]], "picture|image|not text"),
    "a picture alone": ([parts(image=True), GREETED[1]], "picture|image|not text"),
    "text that is a number": ([{"role": "user", "content": 4}, GREETED[1]], "text|question"),
    "text that is an object": (
        [GREETED[0], {"role": "assistant", "content": {"answer": "x"}}],
        "text|answer",
    ),
    "the texts of ShareGPT": (sharegpt("human: Hi", "gpt: Hello"), ("Hi", "Hello")),
    "ShareGPT with a system turn and a greeting": (
        sharegpt("system: Be kind.", "gpt: Welcome!", "human: Hi", "gpt: Hello", "human: Bye"),
        ("Be kind.\n\nHi", "Hello"),
    ),
    "ShareGPT with a function": (
        sharegpt(
            "human: Hi",
            "gpt: Hello",
            "human: Time?",
            "function_call: {}",
            "observation: 12:00",
            "gpt: Noon.",
        ),
        ("Hi", "Hello"),
    ),
    "ShareGPT with a function at once": (
        sharegpt("human: Time?", "function_call: {}", "observation: 12:00", "gpt: Noon."),
        "tool|function|answer",
    ),
    "ShareGPT with nothing said": (
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": None}],
        "answer",
    ),
    "code": (
        chat("user: Write f", "assistant: ```python\ndef f():\n    return {{x}}\n```"),
        ("Write f", "```python\ndef f():\n    return {{x}}\n```"),
    ),
    "marks of other forms inside": (
        chat("user: Say ### Human: x", "assistant: ### Assistant: y"),
        ("Say ### Human: x", "### Assistant: y"),
    ),
}
ORDINARY = ("Good day?", "Good day.")


@pytest.mark.parametrize("talk, expected", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "xlsx"])
def test_conversations_stay_what_they_were(
    kind: str, talk: list[dict[str, Any]], expected: tuple[str, ...] | str, folder: Path
) -> None:
    column = "conversations" if "from" in talk[0] else "messages"
    ordinary = (sharegpt if "from" in talk[0] else chat)(
        *(
            ("human: Good day?", "gpt: Good day.")
            if "from" in talk[0]
            else ("user: Good day?", "assistant: Good day.")
        )
    )
    talks: list[Any] = [ordinary, talk]
    if kind in ("csv", "xlsx"):
        talks = [json.dumps(one, ensure_ascii=False) for one in talks]
    content = FORMATS[kind]([("id", column), *enumerate(talks)])
    first = {"jsonl": 1, "json": 1}.get(kind, 2)
    (folder / f"chat.{kind}").write_bytes(content)
    pairs = read(f"chat.{kind}")
    assert pairs.shape == "conversations"
    if isinstance(expected, str):
        assert texts(pairs) == [ORDINARY]
        assert [note.row for note in pairs.dropped] == [first + 1]
        assert re.search(expected, pairs.dropped[0].reason)
    else:
        assert texts(pairs) == [ORDINARY, expected]
        assert pairs.dropped == []
        assert [pair.row for pair in pairs.kept] == [first, first + 1]


def test_parts_of_a_text_are_joined_in_their_order(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(jsonl({"messages": [parts("One", "two"), GREETED[1]]}))
    [(question, answer)] = texts(read("a.jsonl"))
    assert (question.split(), answer) in ((["One", "two"], "Hello"), (["Onetwo"], "Hello"))


def test_a_conversation_that_is_none_is_dropped(folder: Path) -> None:
    good = [{"messages": chat(f"user: Why {i}?", f"assistant: So {i}.")} for i in range(30)]
    empty: list[Any] = [{"messages": None}, {"messages": []}, {"id": 1}]
    odd: list[Any] = [
        {"messages": odd} for odd in ("hello", 4, {}, [{}], [["user", "Hi"]], [{"role": "user"}])
    ]
    (folder / "a.jsonl").write_bytes(jsonl(*empty, *good, *empty, *odd))
    pairs = read("a.jsonl")
    assert texts(pairs) == [(f"Why {i}?", f"So {i}.") for i in range(30)]
    assert len(pairs.dropped) == 2 * len(empty) + len(odd)


@pytest.mark.parametrize("wrap", [str, repr, lambda turns: json.dumps(turns, indent=1)])
def test_conversations_as_pandas_prints_them_are_read(
    wrap: Callable[..., str], folder: Path
) -> None:
    (folder / "a.csv").write_bytes(csv_file([("messages",), (wrap(GREETED),)]))
    assert texts(read("a.csv")) == [("Hi", "Hello", "Why?", "So.")]


# -- Trees of messages


def message(name: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u" + name,
        "text": text,
        "role": {"p": "prompter", "a": "assistant"}[role],
        "lang": "en",
        "rank": None,
        "deleted": False,
        **more,
    }


TREE = [
    message("1", None, "p", "Why?"),
    message("2", "1", "a", "Third best.", rank=10),
    message("3", "1", "a", "So.", rank=0),
    message("4", "1", "a", "Second best.", rank=2),
    message("5", "3", "p", "How?"),
    message("6", "5", "a", "Not ranked."),
    message("7", "5", "a", "Thus.", rank=1),
    message("8", "7", "p", "Thanks, and then?"),
    message("9", "4", "p", "Really?"),
    message("10", "9", "a", "Really."),
]
BEST = ("Why?", "So.", "How?", "Thus.")
ALL = {
    ("Why?", "Third best."),
    BEST,
    ("Why?", "So.", "How?", "Not ranked."),
    ("Why?", "Second best.", "Really?", "Really."),
}
SPANISH = [
    message("s1", None, "p", "¿Por qué?", lang="es"),
    message("s2", "s1", "a", "Porque sí.", lang="es"),
]


def nested(rows: list[dict[str, Any]], parent: str | None = None) -> list[dict[str, Any]]:
    """The messages below a parent, each with its replies in it."""
    return [
        {**one, "replies": nested(rows, one["message_id"])}
        for one in rows
        if one["parent_id"] == parent
    ]


def as_trees(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"message_tree_id": root["message_id"], "tree_state": "ready", "prompt": root}
        for root in nested(rows)
    ]


def as_table(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[*TREE[0]], *([*one.values()] for one in rows)]


FORMS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "one a line": ("a.jsonl", lambda rows: jsonl(*rows)),
    "a list": ("a.json", js),
    "parquet": ("a.parquet", parquet),
    "text table": ("a.csv", lambda rows: csv_file(as_table(rows))),
    "pandas": ("a.csv", lambda rows: pandas.DataFrame(rows).to_csv(index=False).encode()),
    "workbook": ("a.xlsx", lambda rows: xlsx(as_table(rows))),
    "trees, one a line": ("a.jsonl", lambda rows: jsonl(*as_trees(rows))),
    "trees, a list": ("a.json", lambda rows: js(as_trees(rows))),
    "trees, parquet": ("a.parquet", lambda rows: parquet(as_trees(rows))),
}
MISSING = message("11", "1", "a", "Deleted answer.", rank=-1, deleted=True)
TREES: dict[str, tuple[list[dict[str, Any]], set[tuple[str, ...]]]] = {
    "the best replies": (TREE, {BEST}),
    "another language": ([*TREE, *SPANISH], {BEST}),
    "a deleted reply": ([*TREE, MISSING], {BEST}),
    "a deleted question": (
        [*TREE, {**SPANISH[0], "lang": "en", "deleted": True}, {**SPANISH[1], "lang": "en"}],
        {BEST},
    ),
    "a question without reply": ([*TREE, message("q", None, "p", "Hello?")], {BEST}),
    "two trees": (
        [*TREE, *({**one, "lang": "en"} for one in SPANISH)],
        {BEST, ("¿Por qué?", "Porque sí.")},
    ),
}


@pytest.mark.parametrize("name, write", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rows, expected", TREES.values(), ids=TREES)
def test_a_tree_gives_the_conversation_of_its_best_replies(
    rows: list[dict[str, Any]],
    expected: set[tuple[str, ...]],
    name: str,
    write: Callable[..., bytes],
    folder: Path,
) -> None:
    (folder / name).write_bytes(write(rows))
    pairs = read(name)
    assert pairs.shape == "message tree"
    assert len(pairs.kept) == len(expected)
    assert set(texts(pairs)) == expected


@pytest.mark.parametrize("name, write", FORMS.values(), ids=FORMS)
def test_all_paths_of_a_tree_are_taken_when_wanted(
    name: str, write: Callable[..., bytes], folder: Path
) -> None:
    (folder / name).write_bytes(write([*TREE, *SPANISH]))
    found = texts(read(name, CONVERSATION_PATHS="all"))
    assert sorted(found) == sorted(ALL)
    assert set(texts(read(name, CONVERSATION_PATHS="all", LANGUAGE=""))) == {
        *ALL,
        ("¿Por qué?", "Porque sí."),
    }
    assert texts(read(name, LANGUAGE="es")) == [("¿Por qué?", "Porque sí.")]


def test_a_tree_may_be_shuffled_and_have_loose_ends(folder: Path) -> None:
    loose = [
        message("x", "gone", "a", "An answer to nothing.", rank=0),
        message("y", "z", "p", "Round"),
        message("z", "y", "a", "and round."),
        message("self", "self", "p", "Me."),
    ]
    for seed in range(5):
        rows = [*TREE, *loose]
        random.Random(seed).shuffle(rows)
        (folder / "a.jsonl").write_bytes(jsonl(*rows))
        assert texts(read("a.jsonl")) == [BEST]


@pytest.mark.parametrize("odd", [["ODD"], {"text": "ODD"}, [{"ODD": 1}]], ids=str)
def test_a_message_that_is_no_text_is_not_printed_into_one(odd: object, folder: Path) -> None:
    tree = [*TREE[:2], {**TREE[2], "text": odd}, *TREE[3:]]
    for rows in (tree, as_trees(tree)):
        (folder / "a.json").write_bytes(js(rows))
        assert "ODD" not in str(texts(read("a.json")))


# -- Conversations in one text

TRANSCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "guanaco": ("### Human: Why?### Assistant: So.", ("Why?", "So.")),
    "guanaco with line breaks": ("### Human: Why?\n### Assistant: So.\n", ("Why?", "So.")),
    "guanaco with several turns": (
        "### Human: Why?### Assistant: So.### Human: How?### Assistant: Thus.",
        ("Why?", "So.", "How?", "Thus."),
    ),
    "guanaco with an open question": (
        "### Human: Why?### Assistant: So.### Human: And?",
        ("Why?", "So."),
    ),
    "guanaco with headings in the answer": (
        "### Human: Plan?### Assistant: ### Step one\nGo.\n\n### Step two\nStop: now.",
        ("Plan?", "### Step one\nGo.\n\n### Step two\nStop: now."),
    ),
    "guanaco with the words inside of a sentence": (
        "### Human: Who wrote The Last Human: a story?### Assistant: Your answer: an Assistant: me.",
        ("Who wrote The Last Human: a story?", "Your answer: an Assistant: me."),
    ),
    "guanaco with a dialogue to write": (
        "### Human: Write a scene.### Assistant: Question: Who?\nAnswer: Me.\nUser: Ann",
        ("Write a scene.", "Question: Who?\nAnswer: Me.\nUser: Ann"),
    ),
    "Human and Assistant": (
        "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: How?\n\nAssistant: Thus.",
        ("Why?", "So.", "How?", "Thus."),
    ),
    "Human and Assistant with the words inside of a line": (
        "Human: Is it human: yes?\n\nAssistant: Yes. My assistant: no.",
        ("Is it human: yes?", "Yes. My assistant: no."),
    ),
    "instruction and response": (
        "### Instruction:\nAdd 2 and 2.\n\n### Response:\n4, as\n    code",
        ("Add 2 and 2.", "4, as\n    code"),
    ),
    "instruction and response with a colon": (
        "### Instruction: Add 2 and 2. ### Response: The answer: 4",
        ("Add 2 and 2.", "The answer: 4"),
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "xlsx"])
@pytest.mark.parametrize("text, expected", TRANSCRIPTS.values(), ids=TRANSCRIPTS)
def test_a_column_of_transcripts_becomes_conversations(
    kind: str, text: str, expected: tuple[str, ...], folder: Path
) -> None:
    (folder / f"a.{kind}").write_bytes(FORMATS[kind]([("text",), (text,), (text + " More",)]))
    pairs = read(f"a.{kind}")
    assert texts(pairs)[0] == expected
    assert pairs.shape == "conversations"


def test_a_template_of_alpaca_does_not_lose_its_input(folder: Path) -> None:
    text = (
        "Below is an instruction that describes a task. Write a response that completes it.\n\n"
        "### Instruction:\nAdd{}.\n\n### Input:\n2 and 2\n\n### Response:\n4"
    )
    (folder / "a.jsonl").write_bytes(jsonl({"text": text.format("")}, {"text": text.format(" it")}))
    try:
        found = texts(read("a.jsonl"))
    except ft.UserError:
        return
    for question, answer in found:
        assert answer == "4"
        assert re.search(r"Add( it)?\.\s.*2 and 2$", question, re.DOTALL)


# -- Columns that mislead

MISLEADING: dict[str, tuple[list[str], list[list[object]], Texts]] = {
    "ids and counts": (
        ["question_id", "question", "AnswerCount", "answer", "answer_id"],
        [["q1", "Why?", 3, "So.", "a1"], ["q2", "How?", 5, "Thus.", "a2"]],
        TWO,
    ),
    "a second form of the question": (
        ["normalized_question", "question", "answer"],
        [["why", "Why?", "So."], ["how", "How?", "Thus."]],
        TWO,
    ),
    "answers of models": (
        ["question", "gpt4_answer", "model_answer", "answer", "llama_response"],
        [["Why?", "x", "y", "So.", "z"], ["How?", "u", "v", "Thus.", "w"]],
        TWO,
    ),
    "options A to D": (
        ["question", "A", "B", "C", "D", "answer"],
        [["Why?", "ab", "ac", "ad", "ae", "B"], ["How?", "bb", "bc", "bd", "be", "D"]],
        [("Why?", "B"), ("How?", "D")],
    ),
    "options in other words": (
        ["question", "option_a", "option_b", "answer"],
        [["Why?", "So.", "No.", "So."], ["How?", "Nay.", "Thus.", "Thus."]],
        TWO,
    ),
    "a context": (
        ["context", "question", "answer"],
        [["Long ago.", "Why?", "So."], ["Once?", "How?", "Thus."]],
        TWO,
    ),
    "single letters": (["Q", "A"], [["Why?", "So."], ["How?", "Thus."]], TWO),
    "single letters, the other way": (["A", "Q"], [["So.", "Why?"], ["Thus.", "How?"]], TWO),
    "Turkish with a topic": (
        ["konu", "soru", "cevap", "kaynak"],
        [["kargo", "Neden?", "Çünkü.", "web"], ["iade", "Nasıl?", "Böyle.", "ofis"]],
        [("Neden?", "Çünkü."), ("Nasıl?", "Böyle.")],
    ),
    "Portuguese with a topic": (
        ["tema", "pergunta", "resposta"],
        [["a", "Por quê?", "Sim."], ["b", "Como?", "Assim."]],
        [("Por quê?", "Sim."), ("Como?", "Assim.")],
    ),
    "ask and answer": (
        ["answer", "ask"],
        [["So.", "Why"], ["Thus.", "How"]],
        [("Why", "So."), ("How", "Thus.")],
    ),
    "ground truth": (
        ["question", "contexts", "ground_truth"],
        [["Why?", "one two", "So."], ["How?", "three four", "Thus."]],
        TWO,
    ),
    "a customer service set": (
        ["flags", "instruction", "category", "intent", "response"],
        [["B", "help me", "ORDER", "cancel", "I will."], ["BQ", "hello", "ORDER", "track", "Hi."]],
        [("help me", "I will."), ("hello", "Hi.")],
    ),
    "a medical set": (
        ["qtype", "Question", "Answer"],
        [["treatment", "Why?", "So."], ["symptoms", "How?", "Thus."]],
        TWO,
    ),
    "a title of the answer's page": (
        ["Title", "Body", "Answer"],
        [["Why?", "I ask because it is late.", "So."], ["How?", "It does not work.", "Thus."]],
        TWO,
    ),
}


@pytest.mark.parametrize("kind", ["xlsx", "csv", "json", "parquet"])
@pytest.mark.parametrize("header, rows, expected", MISLEADING.values(), ids=MISLEADING)
def test_columns_that_mislead_are_not_taken(
    kind: str, header: list[str], rows: list[list[object]], expected: Texts, folder: Path
) -> None:
    check(File(f"a.{kind}", FORMATS[kind]([header, *rows]), expected), folder)


AMBIGUOUS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "answer and answers": (["question", "answer", "answers"], ("answer", "answers")),
    "two answers with numbers": (["question", "answer 1", "answer 2"], ("answer 1", "answer 2")),
    "short and long": (
        ["Frage", "Antwort kurz", "Antwort ausführlich"],
        ("Antwort kurz", "Antwort ausführlich"),
    ),
    "Turkish": (["soru", "cevap", "yanıt"], ("cevap", "yanıt")),
    "TruthfulQA": (
        ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"],
        ("Best Answer", "Correct Answers"),
    ),
    "RAGAS": (["question", "contexts", "answer", "ground_truth"], ("answer", "ground_truth")),
    "one name twice": (["question", "answer", "Answer"], ("answer", "Answer")),
    "languages": (["Frage (de)", "Question (en)", "Antwort"], ("Frage (de)", "Question (en)")),
    "nothing known": (["alpha", "beta", "gamma"], ("alpha", "beta", "gamma")),
}


@pytest.mark.parametrize("kind", ["xlsx", "csv", "jsonl"])
@pytest.mark.parametrize("header, named", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_where_two_columns_are_plausible_both_are_named(
    kind: str, header: list[str], named: tuple[str, ...], folder: Path
) -> None:
    rows = [[f"{name} is {i}" for name in header] for i in range(5)]
    (folder / f"a.{kind}").write_bytes(FORMATS[kind]([header, *rows]))
    message = refusal(f"a.{kind}")
    assert "--answer-column" in message
    assert all(name in message for name in named)


NO_PAIRS: dict[str, tuple[list[str], list[list[object]]]] = {
    "messages for spam": (["v1", "v2"], [[["ham", "spam"][i % 2], f"text {i}"] for i in range(12)]),
    "film reviews": (["review", "sentiment"], [[f"It was {i}", "positive"] for i in range(12)]),
    "tweets": (
        ["tweet_id", "author_id", "text", "response_tweet_id"],
        [[i, f"u{i}", f"hello {i}", i + 1] for i in range(12)],
    ),
    "only numbers": (["x", "y"], [[i, i * i] for i in range(12)]),
    "only one column": (["question"], [[f"Is it {i}?"] for i in range(12)]),
    "only dates and amounts": (["date", "amount"], [["2024-05-01", 3.5]] * 12),
    "sentences to choose from": (
        ["QuestionID", "Question", "DocumentTitle", "Sentence", "Label"],
        [[f"Q{i}", f"Is it {i}?", f"Page {i}", f"It is {i}.", i % 2] for i in range(12)],
    ),
}


@pytest.mark.parametrize("kind", ["xlsx", "csv", "json", "parquet"])
@pytest.mark.parametrize("header, rows", NO_PAIRS.values(), ids=NO_PAIRS)
def test_a_table_of_something_else_is_refused_with_its_columns(
    kind: str, header: list[str], rows: list[list[object]], folder: Path
) -> None:
    (folder / f"a.{kind}").write_bytes(FORMATS[kind]([header, *rows]))
    message = refusal(f"a.{kind}")
    assert all(name in message for name in header)
    assert "--question-column" in message


# -- Forms that nobody promised to read: right, or refused, or the row left out


def exported(role: str, text: str, parent: str | None) -> dict[str, Any]:
    content = {"content_type": "text", "parts": [text]}
    return {"message": {"author": {"role": role}, "content": content}, "parent": parent}


RTF = rb"{\rtf1\ansi\deff0 {\fonttbl {\f0 Calibri;}} Question: Why? Answer: So.}"
UNPROMISED = {
    "Chinese in UTF-16 without a mark": File(
        "a.txt", csv_file(CHINESE, "utf-16-le", delimiter="\t"), CHINESE[1:]
    ),
    "a table of columns from pandas": File(
        "a.json", pandas.DataFrame(records(FOUR)).to_json().encode(), FOUR
    ),
    "a split table from pandas": File(
        "a.json", pandas.DataFrame(records(FOUR)).to_json(orient="split").encode(), FOUR
    ),
    "a split table that asks nothing": File(
        "a.json",
        js({"columns": HEADER, "index": [0, 1], "data": [["Go", "Gone"], ["Do", "Done"]]}),
        [("Go", "Gone"), ("Do", "Done")],
    ),
    "a table with a schema from pandas": File(
        "a.json", pandas.DataFrame(records(FOUR)).to_json(orient="table").encode(), FOUR
    ),
    "a table by index from pandas": File(
        "a.json", pandas.DataFrame(records(FOUR)).to_json(orient="index").encode(), FOUR
    ),
    "rows of the dataset viewer": File(
        "a.json",
        js(
            {
                "features": [{"feature_idx": 0, "name": "question"}],
                "rows": [{"row_idx": i, "row": one} for i, one in enumerate(records(FOUR))],
            }
        ),
        FOUR,
    ),
    "records one behind the other": File(
        "a.json", b"\n".join(js(one, indent=2) for one in records(FOUR)), FOUR
    ),
    "one record": File("a.json", js(records(TWO)[0]), TWO[:1]),
    "columns of unequal length": File(
        "a.json", js({"question": ["Why?", "How?"], "answer": ["So."]}), []
    ),
    "a comma too many": File("a.json", js(records(TWO))[:-1] + b",]", TWO),
    "not a number": File("a.json", b'[{"question": "Open?", "answer": NaN}]', []),
    "half an emoji": File(
        "a.json",
        json.dumps(records([("Smile?", "\ud83d"), *TWO])).encode(),
        [("Smile?", "\ufffd"), *TWO],
    ),
    "a chatbot of intents": File(
        "intents.json",
        js(
            {
                "intents": [
                    {"tag": "hi", "patterns": ["Hi", "Hello"], "responses": ["Hello!", "Hey!"]},
                    {"tag": "bye", "patterns": ["Bye"], "responses": ["See you", "Ciao"]},
                ]
            }
        ),
        [],
    ),
    "two sets one behind the other": File(
        "a.jsonl", jsonl(*records(TWO), *records(FOUR[2:], ("instruction", "output"))), FOUR
    ),
    "an export of ChatGPT": File(
        "conversations.json",
        js(
            [
                {
                    "title": "x",
                    "mapping": {
                        "1": exported("user", "Why?", None),
                        "2": exported("assistant", "So.", "1"),
                    },
                }
            ]
        ),
        TWO[:1],
    ),
    "an export of Telegram": File(
        "result.json",
        js(
            {
                "name": "Ann",
                "type": "personal_chat",
                "messages": [
                    {"id": i, "type": "message", "from": ["Ann", "Bob"][i % 2], "text": f"text {i}"}
                    for i in range(8)
                ],
            }
        ),
        [],
    ),
    "an export of Claude": File(
        "conversations.json",
        js(
            [
                {
                    "name": "x",
                    "chat_messages": chat(
                        "human: Why?", "assistant: So.", role="sender", content="text"
                    ),
                }
            ]
        ),
        TWO[:1],
    ),
    "preferences with messages": File(
        "a.jsonl",
        jsonl(
            *(
                {
                    "prompt": f"Why {i}?",
                    "chosen": chat(f"user: Why {i}?", f"assistant: So {i}."),
                    "rejected": chat(f"user: Why {i}?", f"assistant: No {i}."),
                }
                for i in range(3)
            )
        ),
        [(f"Why {i}?", f"So {i}.") for i in range(3)],
    ),
    "two transcripts": File(
        "a.jsonl",
        jsonl(
            *(
                {
                    "chosen": f"\n\nHuman: Why {i}?\n\nAssistant: So {i}.",
                    "rejected": f"\n\nHuman: Why {i}?\n\nAssistant: No {i}.",
                }
                for i in range(3)
            )
        ),
        [(f"Why {i}?", f"So {i}.") for i in range(3)],
    ),
    "two conversations": File(
        "a.jsonl",
        jsonl(
            *(
                {
                    "conversation_a": chat(f"user: Why {i}?", f"assistant: So {i}."),
                    "conversation_b": chat(f"user: Why {i}?", f"assistant: No {i}."),
                }
                for i in range(3)
            )
        ),
        [],
    ),
    "a template of Llama 2": File(
        "a.jsonl", jsonl(*({"text": f"<s>[INST] {q} [/INST] {a} </s>"} for q, a in FOUR)), FOUR
    ),
    "a template of ChatML": File(
        "a.jsonl",
        jsonl(
            *(
                {"text": f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>"}
                for q, a in FOUR
            )
        ),
        FOUR,
    ),
    "lists as numpy prints them": File(
        "a.csv",
        csv_file([HEADER, ("Both?", "['Paris' 'London']"), ("Capital?", "['Bern']")]),
        [("Capital?", "Bern")],
    ),
    "flat SQuAD as numpy prints it": File(
        "a.csv",
        csv_file(
            [
                ("question", "answers"),
                *(
                    (q, f"{{'text': array(['{a}'], dtype=object), 'answer_start': array([1])}}")
                    for q, a in FOUR
                ),
            ]
        ),
        FOUR,
    ),
    "messages as numpy prints them": File(
        "a.csv",
        csv_file([("id", "messages"), *((i, f"[{GREETED[0]}\n {GREETED[1]}]") for i in range(3))]),
        [("Hi", "Hello")] * 3,
    ),
    "objects as text": File(
        "a.csv",
        csv_file([HEADER, *((q, js({"text": a, "label": "x"}).decode()) for q, a in FOUR)]),
        [(q, js({"text": a, "label": "x"}).decode()) for q, a in FOUR],
    ),
    "quotation marks behind backslashes": File(
        "a.csv",
        b'question,answer\n"Why?","He said \\"so\\", twice"\n"How?","Thus."\n',
        [("Why?", 'He said "so", twice'), ("How?", "Thus.")],
    ),
    "a quotation mark never closed": File(
        "a.csv",
        b'question,answer\nWhy?,So.\n"How,Thus.\nTell me where.,Over there.\n',
        [TWO[0], FOUR[2]],
    ),
    "a quotation mark never closed, and more of them": File(
        "a.csv",
        b'question,answer\nWhy?,So.\nWho?,"Me\nHow?,Thus.\nTell me where.,"Over there."\n',
        [*TWO, FOUR[2]],
    ),
    "Anki": File("a.txt", b"#separator:tab\n#html:false\n" + csv_file(FOUR, delimiter="\t"), FOUR),
    "a second header": File("a.csv", csv_file([HEADER, *TWO, HEADER, *FOUR[2:]]), [*FOUR, HEADER]),
    "questions and answers in turn": File("a.txt", b"Q: Why?\nA: So.\n\nQ: How?\nA: Thus.\n", TWO),
    "YAML": File(
        "a.yml", b"- question: Why?\n  answer: So.\n- question: How?\n  answer: Thus.\n", TWO
    ),
    "Markdown": File(
        "a.md", b"| question | answer |\n|---|---|\n| Why? | So. |\n| How? | Thus. |\n", TWO
    ),
    "a notebook": File(
        "a.ipynb", js({"cells": [{"cell_type": "code", "source": ["1\n", "2"]}], "nbformat": 4}), []
    ),
    "settings": File("package.json", js({"name": "x", "scripts": {"a": "b"}}), []),
    "a list of texts": File("a.json", js(["Why?", "So.", "How?", "Thus."]), []),
    "a list of numbers": File("a.json", b"[1, 2, 3]", []),
    "an empty list": File("a.json", b"[]", []),
    "an empty object": File("a.json", b"{}", []),
    "null": File("a.json", b"null", []),
    "a text": File("a.json", b'"Why?"', []),
    "a shortcut to a document of Google": File(
        "a.gsheet", js({"url": "https://docs.google.com/x", "doc_id": "x"}), []
    ),
}


@files(UNPROMISED)
def test_an_unpromised_form_is_read_right_or_refused(file: File, folder: Path) -> None:
    (folder / file.name).write_bytes(file.content)
    try:
        pairs = read(file.name)
    except ft.UserError as error:
        assert file.name in str(error)
        return
    wrong = [one for one in texts(pairs) if one not in file.expected]
    assert wrong == []
    assert len(pairs.kept) + len(pairs.dropped) >= len(file.expected)


# -- Files that are refused

LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
PAGE = b"<table><tr><th>question</th><th>answer</th></tr><tr><td>Why?</td><td>So.</td></tr></table>"
XML_2003 = (
    b'<?xml version="1.0"?>\n<?mso-application progid="Excel.Sheet"?>\n'
    b'<Workbook xmlns="urn:schemas-microsoft-com:office:spreadsheet"><Worksheet><Table>'
    b'<Row><Cell><Data ss:Type="String">question</Data></Cell></Row></Table></Worksheet></Workbook>'
)
LOCK = b"\x05Alice".ljust(55) + b"\x05\0A\0l\0i\0c\0e\0".ljust(110)
WORKBOOK = xlsx([HEADER, *FOUR * 9])
Refusal = tuple[str, bytes, str]
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01"


def feather() -> bytes:
    file = io.BytesIO()
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(records(TWO)), file)
    return file.getvalue()


REFUSED: dict[str, Refusal] = {
    "a workbook with a password": (
        "a.xlsx",
        ole(bytes(9000), "EncryptedPackage", "EncryptionInfo"),
        "password",
    ),
    "an old workbook with a password": ("a.xls", xls(QA2, filepass=True), "password"),
    "a workbook cut off": ("a.xlsx", WORKBOOK[:-900], "damaged|cut off|incomplete"),
    "an old workbook cut off": (
        "a.xls",
        xls([HEADER, *FOUR * 99])[:3000],
        "damaged|cut off|incomplete",
    ),
    "a binary workbook cut off": ("a.xlsb", xlsb([HEADER])[:-400], "damaged|cut off"),
    "a spreadsheet of LibreOffice cut off": ("a.ods", ods([HEADER])[:-99], "damaged|cut off"),
    "Parquet cut off": ("a.parquet", parquet(records(FOUR))[:-50], "damaged|cut off"),
    "Parquet without rows": (
        "a.parquet",
        parquet(records(TWO))[:0] or pandas.DataFrame(columns=HEADER).to_parquet(),
        "no rows|empty",
    ),
    "JSON cut off": ("a.json", js(records(FOUR))[:-30], "JSON"),
    "zero bytes": ("a.xlsx", b"", "empty|no rows"),
    "zero bytes of text": ("a.csv", b"", "empty|no rows"),
    "blanks": ("a.csv", b"\xef\xbb\xbf \r\n\r\n", "empty|no rows"),
    "no rows": ("a.xlsx", xlsx([HEADER]), "no rows"),
    "no rows in a text": ("a.csv", b"question,answer\n", "no rows"),
    "no rows in any sheet": ("a.xlsx", xlsx([], Other=[()]), "empty|no rows"),
    "a PDF": ("a.xlsx", PDF, "PDF"),
    "a picture": ("a.xlsx", PNG, "picture|image|PNG"),
    "a photograph": ("a.csv", b"\xff\xd8\xff\xe0\0\x10JFIF\0", "picture|image|JPE?G"),
    "gzip": ("a.xlsx", gzip.compress(csv_file(QA2)), "compressed|gzip|unpack"),
    "a Word document": (
        "a.xlsx",
        zip_of({"[Content_Types].xml": b"<Types/>", "word/document.xml": b"<w/>"}),
        "Word",
    ),
    "slides": (
        "a.xlsx",
        zip_of({"[Content_Types].xml": b"<Types/>", "ppt/presentation.xml": b"<p/>"}),
        "presentation|slides|without a workbook|no workbook",
    ),
    "a zip file with the table in it": (
        "archive.zip",
        zip_of({"data/train.csv": csv_file(QA2)}),
        "zip file",
    ),
    "rich text format": ("a.csv", RTF, "RTF|Word|document"),
    "a web page": ("a.xls", b"<html><body>" + PAGE + b"</body></html>", "HTML|web page"),
    "a web page with a mark": ("a.xls", b"\xef\xbb\xbf\r\n" + PAGE, "HTML|web page"),
    "a page to log in": (
        "a.csv",
        b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
        "HTML|web page",
    ),
    "a web page of Excel": (
        "a.xls",
        b'<html xmlns:x="urn:schemas-microsoft-com:office:excel"><body>' + PAGE,
        "HTML|web page",
    ),
    "XML of Excel 2003": ("a.xls", XML_2003, "XML"),
    "a pointer of Git LFS": ("a.parquet", LFS, "LFS"),
    "a lock file of Excel": ("~$a.xlsx", LOCK, "lock|is open|temporary"),
    "a database": ("a.csv", b"SQLite format 3\0" + bytes(100), "database|SQLite"),
    "a pickle": ("a.csv", b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "neither|binary|text"),
    "Feather named .parquet": ("a.parquet", feather(), "neither|Arrow|Feather"),
    "a text with zero bytes": (
        "a.csv",
        b"question,answer\nWhy?,So.\0\0\0\nHow?,Thus.\n",
        r"neither|NUL|zero byte|null|binary|\\0",
    ),
    "a letter": ("a.txt", b"Dear Ann,\nhow are you?\nI am well.\n", "no column|one column"),
    "a message of a server": ("a.csv", b"404: Not Found", "no rows|no column|404"),
}


@pytest.mark.parametrize("name, content, words", REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_table_is_refused_with_its_own_words(
    name: str, content: bytes, words: str, folder: Path
) -> None:
    (folder / name).write_bytes(content)
    assert re.search(words, refusal(name))


def test_no_two_kinds_of_refusal_share_their_words(folder: Path) -> None:
    kinds = "a workbook with a password|a workbook cut off|zero bytes|a PDF|a picture|gzip|a Word document|a web page|XML of Excel 2003|a pointer of Git LFS|a lock file of Excel|a database|a letter"
    said = set()
    for kind in kinds.split("|"):
        (folder / "a.xlsx").write_bytes(REFUSED[kind][1])
        said.add(refusal("a.xlsx"))
    assert len(said) == len(kinds.split("|"))


# -- Files that could take all time or memory, each read in a process of its own

WATCHER = """
import json, os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
import openpyxl, pandas, pyarrow.parquet, python_calamine
import finetune_colab as ft
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for path in sys.stdin:
    path = path.strip()
    child = os.fork()
    if not child:
        signal.alarm(9)
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            found = ft.find_pairs(ft.Config(DATASET_PATH=path, CONVERSATION_PATHS="all"))
            outcome = {"kept": [[m["content"][:99] for m in p.messages] for p in found.kept[:20]]}
        except ft.UserError as error:
            outcome = {"refused": str(error)}
        except BaseException as error:
            outcome = {"raised": repr(error)[:300]}
        open(path + ".outcome", "w").write(json.dumps(outcome))
        os._exit(0)
    status, usage = os.wait4(child, 0)[1:]
    seconds = usage.ru_utime + usage.ru_stime
    print(json.dumps([status, seconds, usage.ru_maxrss / 1024 - base]), flush=True)
"""
Watch = Callable[[Path], tuple[dict[str, Any], float, float]]


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    """Read a file in a process of its own: what came of it, its seconds and its MB of memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(ROOT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert process.stdin and process.stdout
    stdin, stdout = process.stdin, process.stdout

    def watch(path: Path) -> tuple[dict[str, Any], float, float]:
        print(path, file=stdin, flush=True)
        status, seconds, memory = json.loads(stdout.readline())
        assert status == 0, f"the reader died with status {status} after {seconds:.1f} s"
        outcome = json.loads(Path(f"{path}.outcome").read_text())
        assert "raised" not in outcome, outcome
        return outcome, seconds, memory

    yield watch
    stdin.close()
    process.wait()
    stdout.close()


def hand_made(cells: bytes, before: bytes = b"") -> bytes:
    """A workbook of two pairs and what stands below them."""
    return raw_xlsx(b"".join(inline(*row) for row in QA2) + cells, before=before)


def numbered_rows(start: int, end: int, line: str) -> bytes:
    return "".join([line.replace("#", str(i)) for i in range(start, end)]).encode()


def bomb(part: str) -> bytes:
    """Ten entities, each ten times the one before, in the sheet or in the list of texts."""
    entities = "".join(
        f"<!ENTITY a{i} '{f'&a{i - 1};' * 10 if i else 'boom boom'}'>" for i in range(10)
    )
    content = excel(QA2) if part == "sst" else xlsx(QA2)
    return replaced(content, (f"<{part}", f"<!DOCTYPE x [{entities}]><{part}"), ("So.", "&a9;"))


def huge_string() -> bytes:
    row = b'<row><c t="inlineStr"><is><t>Who?</t></is></c><c t="s"><v>0</v></c></row>'
    text = random.Random(0).randbytes(20_000_000).hex().encode()
    rows = b"".join(inline(*row) for row in QA2) + row
    return raw_xlsx(rows, b"<si><t>%b</t></si>" % text, packing=zipfile.ZIP_STORED)


def deep_tree(levels: int) -> bytes:
    """Replies one in another; written by hand, as json itself cannot."""
    heads = [
        f'{{"message_id": "{i}", "text": "Turn {i}", "role": "{["prompter", "assistant"][i % 2]}",'
        ' "lang": "en", "replies": ['
        for i in range(levels)
    ]
    return ('{"message_tree_id": "0", "prompt": ' + "".join(heads) + "]}" * levels + "}\n").encode()


def long_path(levels: int) -> bytes:
    chain = (
        message(str(i), str(i - 1) if i else None, "pa"[i % 2], f"Turn {i}") for i in range(levels)
    )
    return jsonl(*chain)


def bush() -> bytes:
    """Every message of four generations has ten replies."""
    grown = generation = [message("0", None, "p", "Root?")]
    for role in "apap":
        generation = [
            message(f"{one['message_id']}-{i}", one["message_id"], role, f"Text {i}", rank=i)
            for one in generation
            for i in range(10)
        ]
        grown = grown + generation
    return jsonl(*grown)


def false_size() -> bytes:
    """An old workbook that claims four billion rows of 65 thousand columns."""
    size = bytes.fromhex("00020e00")  # the record DIMENSIONS and its length
    content = xls(QA2)
    place = content.index(size) + len(size)
    return content[:place] + b"\0\0\0\0\xff\xff\xff\xff\0\0\xff\xff" + content[place + 12 :]


def false_column() -> bytes:
    """A binary workbook with a cell in a column that there cannot be."""
    parts = parts_of(xlsb(QA2))
    cell = bytes.fromhex("070c01000000")  # a text from the list, in the second column
    sheet = parts["xl/worksheets/sheet1.bin"]
    assert cell in sheet
    changed = sheet.replace(cell, cell[:5] + b"\x70", 1)
    return zip_of({**parts, "xl/worksheets/sheet1.bin": changed})


def cut_inside(part: str, end: bytes, content: bytes) -> bytes:
    """A sound zip file with a part that stops in its midst."""
    parts = parts_of(content)
    return zip_of({**parts, part: parts[part][: parts[part].index(end) + len(end)]})


CORNER = b'<row r="1048576"><c r="XFD1048576" t="inlineStr"><is><t>x</t></is></c></row>'
FULL_ROW = (
    '<row r="#"><c r="A#" t="inlineStr"><is><t>Is it #?</t></is></c><c r="B#"><v>#</v></c></row>'
)
BLANK_ROW = '<row r="#" s="1" customFormat="1"><c r="A#" s="1"/><c r="B#" s="1"/></row>'
BLANK_ODS = (
    '<table:table-row table:number-rows-repeated="1048572"><table:table-cell/></table:table-row>'
)
CORNER_ODS = (
    '<table:table-row><table:table-cell table:number-columns-repeated="16383"/><table:table-cell '
    'office:value-type="string"><text:p>x</text:p></table:table-cell></table:table-row>'
)
FILLED_ODS = (
    '<table:table-row table:number-rows-repeated="1048572"><table:table-cell table:number-columns-'
    'repeated="16384" office:value-type="string"><text:p>x</text:p></table:table-cell></table:table-row>'
)
TURNS = "### Human: a### Assistant: b"
# The name, the content, and what must come of it: the two pairs, or a refusal with such words.
READ, EITHER, ANYTHING = "read", "read or refused", "anything"
HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a size of all cells": (
        "a.xlsx",
        lambda: hand_made(b"", b'<dimension ref="A1:XFD1048576"/>'),
        READ,
    ),
    "a cell in the last corner": ("a.xlsx", lambda: hand_made(CORNER), EITHER),
    "the last corner, Strict": ("a.xlsx", lambda: replaced(hand_made(CORNER), *STRICT), EITHER),
    "the last corner, LibreOffice": ("a.ods", lambda: ods(QA2, BLANK_ODS + CORNER_ODS), EITHER),
    "repeated to the last corner": ("a.ods", lambda: ods(QA2, FILLED_ODS), EITHER),
    "an old workbook of a false size": ("a.xls", false_size, EITHER),
    "a binary workbook with a false column": ("a.xlsb", false_column, EITHER),
    "a workbook whose sheet stops": (
        "a.xlsx",
        lambda: cut_inside("xl/worksheets/sheet1.xml", b"Why?", xlsx(QA2)),
        "damaged|cut off",
    ),
    "a binary workbook whose sheet stops": (
        "a.xlsb",
        lambda: cut_inside("xl/worksheets/sheet1.bin", b"\x07\x0c", xlsb(QA2)),
        ANYTHING,
    ),
    "a LibreOffice file that stops before its table": (
        "a.ods",
        lambda: cut_inside("content.xml", b"<office:document", ods(QA2)),
        "damaged|cut off",
    ),
    "a LibreOffice file that stops in its table": (
        "a.ods",
        lambda: cut_inside("content.xml", b"<text:p>Why?", ods(QA2)),
        "damaged|cut off",
    ),
    "a million filled rows": (
        "a.xlsx",
        lambda: hand_made(numbered_rows(4, 1_048_577, FULL_ROW)),
        "rows|MB|large",
    ),
    "half a million formatted blank rows": (
        "a.xlsx",
        lambda: hand_made(numbered_rows(4, 500_000, BLANK_ROW)),
        EITHER,
    ),
    "a zip bomb": ("a.xlsx", lambda: hand_made(b" " * 300_000_000), "unpack|bomb|large"),
    "a zip bomb of LibreOffice": (
        "a.ods",
        lambda: ods(QA2, " " * 300_000_000),
        "unpack|bomb|large",
    ),
    "an XML bomb in the sheet": ("a.xlsx", lambda: bomb("worksheet"), "."),
    "an XML bomb in the texts": ("a.xlsx", lambda: bomb("sst"), "."),
    "one huge text": ("a.xlsx", huge_string, EITHER),
    "lists nested deeply": ("a.json", lambda: b"[" * 100_000 + b"]" * 100_000, "JSON|nest"),
    "objects nested deeply": (
        "a.json",
        lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "JSON|nest",
    ),
    "a cell nested just so deeply that it is read": (
        "a.json",
        lambda: js([*records(TWO), {"question": "Deep?", "answer": 0}]).replace(
            b": 0", b": " + b"[" * 900 + b"1" + b"]" * 900
        ),
        READ,
    ),
    "a line nested deeply": (
        "a.jsonl",
        lambda: jsonl(*records(TWO)) + b'{"question": "Deep?", "answer": ' + b"[" * 99_999 + b"\n",
        READ,
    ),
    "a text of brackets": (
        "a.csv",
        lambda: csv_file([*QA2, ("Deep?", "[" * 9000 + "]" * 9000)]),
        READ,
    ),
    "a column of brackets": (
        "a.csv",
        lambda: csv_file([HEADER, *(("Deep?", "[" * n + "]" * n) for n in (90, 900, 9000))]),
        ANYTHING,
    ),
    "a number of many digits": (
        "a.json",
        lambda: b'[{"question": "Long?", "answer": 1%b}]' % (b"0" * 5000),
        ANYTHING,
    ),
    "a path of twenty thousand messages": ("a.jsonl", lambda: long_path(20_000), ANYTHING),
    "a tree so deep that it is just read": ("a.jsonl", lambda: deep_tree(480), ANYTHING),
    "a deeper tree": ("a.jsonl", lambda: deep_tree(5000), ANYTHING),
    "a tree of ten thousand messages": ("a.jsonl", bush, ANYTHING),
    "a tree with a message of no name": (
        "a.jsonl",
        lambda: jsonl(*TREE, message("", "1", "a", "Nameless.")),
        ANYTHING,
    ),
    "a tree that comes back to its start": (
        "a.jsonl",
        lambda: jsonl(*TREE, message("1", "3", "a", "Again.")),
        ANYTHING,
    ),
    "a line of a hundred thousand cells": ("a.csv", lambda: csv_file(QA2) + b"x," * 100_000, READ),
    "three thousand columns": (
        "a.csv",
        lambda: csv_file([[f"{word} {i}" for i in range(3_000)] for word in ("c", "a", "b", "d")]),
        "column",
    ),
    "ten thousand keys": (
        "a.jsonl",
        lambda: jsonl(*records(TWO), *({f"k{i}": "a", "question": "Q"} for i in range(10_000))),
        EITHER,
    ),
    "a quotation mark before a long rest": (
        "a.csv",
        lambda: csv_file(QA2) + b'"Who?,I.\n' + b"Tell me where.,Over there.\n" * 200_000,
        EITHER,
    ),
    "a text without an end": ("a.txt", lambda: b"lorem ipsum " * 3_000_000, "."),
    "only quotation marks": ("a.csv", lambda: b'"' * 3_000_000, "."),
    "very many turns in one text": (
        "a.jsonl",
        lambda: jsonl({"text": TURNS * 20_000}, {"text": "### Human: " * 60_000}),
        ANYTHING,
    ),
    "very many blanks between two turns": (
        "a.jsonl",
        lambda: jsonl(
            {"text": TURNS.replace("a#", "a" + " " * 200_000 + "#")}, {"text": "#" * 99_999}
        ),
        ANYTHING,
    ),
}


@pytest.mark.parametrize("name, make, outcome", HOSTILE.values(), ids=HOSTILE)
def test_no_file_takes_all_time_or_memory(
    name: str, make: Callable[[], bytes], outcome: str, folder: Path, watch: Watch
) -> None:
    (folder / name).write_bytes(make())
    found, seconds, memory = watch(folder / name)
    assert seconds < 5
    assert memory < 500
    if outcome in (READ, EITHER) and (outcome == READ or "kept" in found):
        assert found.get("kept", [])[:2] == [list(row) for row in TWO], found
    if outcome not in (READ, EITHER, ANYTHING):
        assert re.search(outcome, found.get("refused", "")), found


# -- Anything at all

CELL = (
    st.text(
        st.one_of(
            st.sampled_from("\n\t \"',;|?=#:ab.[]{}\\"),
            st.characters(exclude_categories=["Cc", "Cs", "Cn"]),
        ),
        min_size=1,
        max_size=12,
    )
    .map(str.strip)
    .filter(lambda text: text and not re.search(r"_x[0-9A-Fa-f]{4}_|^[\[{]|^#[A-Z]", text))
)
TABLE = st.lists(
    st.tuples(CELL, CELL), min_size=1, max_size=4, unique_by=lambda row: tuple(map(ft.fold, row))
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=90, deadline=None)
@given(rows=TABLE, data=st.data())
def test_any_table_of_texts_reads_back_the_same_from_every_format(
    rows: list[tuple[str, str]], data: st.DataObject, scratch: Path
) -> None:
    kind = data.draw(st.sampled_from([kind for kind in FORMATS if kind not in ("ods", "xlsb")]))
    path = scratch / f"any.{kind}"
    path.write_bytes(FORMATS[kind]([HEADER, *rows]))
    pairs = read(path)
    assert texts(pairs) == rows
    first = 1 if kind in ("json", "jsonl", "parquet") else 2
    assert [pair.row for pair in pairs.kept] == [*range(first, first + len(rows))]


@settings(max_examples=60, deadline=None)
@given(
    talks=st.lists(st.lists(CELL, min_size=2, max_size=6), min_size=1, max_size=3, unique_by=str),
    data=st.data(),
)
def test_any_conversation_reads_back_the_same(
    talks: list[list[str]], data: st.DataObject, scratch: Path
) -> None:
    talks = [talk[: len(talk) // 2 * 2] for talk in talks]
    form = data.draw(st.sampled_from([chat, sharegpt]))
    roles = ("human", "gpt") if form is sharegpt else ("user", "assistant")
    cells: list[Any] = [
        form(*(f"{roles[i % 2]}: {text}" for i, text in enumerate(talk))) for talk in talks
    ]
    kind = data.draw(st.sampled_from(["jsonl", "json", "parquet", "csv"]))
    if kind == "csv":
        cells = [json.dumps(cell) for cell in cells]
    path = scratch / f"talk.{kind}"
    path.write_bytes(FORMATS[kind]([("conversations",), *((cell,) for cell in cells)]))
    expected: dict[tuple[str, ...], tuple[str, ...]] = {}
    for talk in talks:
        expected.setdefault(tuple(map(ft.fold, talk)), tuple(talk))
    assert texts(read(path)) == list(expected.values())


def read_or_refused(path: Path, content: bytes, watch: Watch) -> list[str]:
    """The texts that come of any file, or none; within five seconds and half a gigabyte."""
    path.write_bytes(content)
    found, seconds, memory = watch(path)
    assert seconds < 5
    assert memory < 500
    assert "refused" not in found or path.name in found["refused"]
    return [*itertools.chain.from_iterable(found.get("kept", []))]


ONCE = settings(deadline=None, phases=[Phase.generate])  # a hanging file is not tried again


STARTS = [
    b"",
    b"PK\x03\x04",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    b"PAR1",
    b"\xff\xfe",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"[",
    b'{"question": ',
    b'[{"messages": ',
    b"question,answer\n",
]


@settings(ONCE, max_examples=100)
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=120), twice=st.booleans())
def test_random_bytes_are_read_or_refused(
    start: bytes, rest: bytes, twice: bool, scratch: Path, watch: Watch
) -> None:
    read_or_refused(scratch / "random.xlsx", start + rest + start * twice, watch)


REAL: dict[str, bytes] = {kind: write(QA4) for kind, write in FORMATS.items()}
REAL["messages"] = jsonl({"messages": GREETED}, {"messages": GREETED[:2]})
REAL["tree"] = jsonl(*TREE)
REAL["squad"] = js(SQUAD)
REAL["UTF-16"] = csv_file(CHINESE, "utf-16", delimiter="\t")
REAL["openpyxl"] = xlsx(QA4)
REAL["strict"] = replaced(REAL["xlsx"], *STRICT)


def damaged(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed[: dice.choice([len(changed), dice.randrange(len(changed))])])


def damaged_inside(content: bytes, dice: random.Random) -> bytes:
    """A sound zip archive with one damaged file in it."""
    inside = parts_of(content)
    chosen = dice.choice([name for name, part in inside.items() if part])
    return zip_of(inside | {chosen: damaged(inside[chosen], dice)})


@settings(ONCE, max_examples=150)
@given(kind=st.sampled_from(sorted(REAL)), seed=st.integers(0, 2**32))
def test_damaged_files_are_read_or_refused(
    kind: str, seed: int, scratch: Path, watch: Watch
) -> None:
    dice = random.Random(seed)
    inside = REAL[kind].startswith(b"PK") and seed % 4
    content = (damaged_inside if inside else damaged)(REAL[kind], dice)
    read_or_refused(scratch / "damaged.xlsx", content, watch)


STRANGE: list[Any] = [
    None,
    True,
    0,
    -1.5,
    1e999,
    "",
    " ",
    "text",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"ODD": "MENT"},
    ["ODD", "MENT"],
    [{"ODD": ["MENT"]}],
]
DOCUMENTS: list[Any] = [
    records(FOUR),
    {"data": records(TWO)},
    {"question": ["Why?", "How?"], "answer": ["So.", "Thus."]},
    [HEADER, *map(list, TWO)],
    {"1": records(TWO)[0], "2": records(TWO)[1]},
    SQUAD,
    FLAT_SQUAD,
    ALPACA,
    [{"messages": GREETED}, {"messages": [GREETED[0], CALL]}, {"messages": [parts("a", "b")]}],
    [{"conversations": sharegpt("human: Hi", "gpt: Hello")}],
    TREE,
    as_trees(TREE),
    [{"text": text} for text, _ in TRANSCRIPTS.values()],
]


def mangled(document: Any, dice: random.Random) -> Any:
    """A document with something strange somewhere in it."""
    document = json.loads(js(document))
    for _ in range(dice.randint(1, 3)):
        place: Any = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and dice.random() < 0.8:
                place = place[key]
                continue
            if isinstance(place, dict) and dice.random() < 0.2:
                del place[key]
            else:
                place[key] = copy.deepcopy(dice.choice(STRANGE))
            break
    return document


@settings(ONCE, max_examples=200)
@given(which=st.integers(0, len(DOCUMENTS) - 1), seed=st.integers(0, 2**32), lines=st.booleans())
def test_strange_values_in_json_are_read_or_refused_and_never_printed_into_a_text(
    which: int, seed: int, lines: bool, scratch: Path, watch: Watch
) -> None:
    document = mangled(DOCUMENTS[which], random.Random(seed))
    content = jsonl(*document) if lines and isinstance(document, list) else js(document)
    for text in read_or_refused(scratch / "strange.json", content, watch):
        assert not re.search(r"ODD.*MENT|\[\]|\{\}|\bNone\b", text)
