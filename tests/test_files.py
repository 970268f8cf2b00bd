"""From files to rows: what is read from every kind of file, and which words refuse it."""

import datetime
import decimal
import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

import openpyxl
import pandas
import pytest
from conftest import Run, in_words, sweep
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from openpyxl.cell.rich_text import CellRichText, TextBlock
from openpyxl.cell.text import InlineFont
from seams import ROOT, UserError

# isort: off
from tables import FORMATS, FOUR, HEADER, PAIRS_INLINE, QA2, QA4, SHARED_TEXT, STRICT, TWO, File, cases, cases_of_files
from tables import check, csv_file, ending_in, excel, files, js, jsonl, ods, ole, parquet, parts_of, raw_xlsx
from tables import read, records, refusal, replaced, texts, with_rows, xls, xlsb, xlsx, zip_of

in_xlsx, in_csv, in_parquet, in_xls, in_ods = (partial(File, f"a.{end}") for end in "xlsx csv parquet xls ods".split())
R2, R4, L2 = records(TWO), records(FOUR), jsonl(*records(TWO))


@pytest.fixture(autouse=True)
def _no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """No file may bring a library's warning onto the screen."""
    yield
    assert [str(warning.message) for warning in recwarn] == []


def test_a_file_is_taken_under_any_name_and_from_any_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(folder))
    for name in ("dataset.xlsx", "my data (1).csv", "问答"):
        (folder / name).write_bytes(csv_file(QA2))
        for path in (name, folder / name, f"~/{name}"):
            assert texts(read(path)) == TWO
    pairs = read("dataset_example.xlsx")  # which comes with the script
    assert len(pairs.kept) > 20 and pairs.dropped == []
    (folder / "dataset_example.xlsx").write_bytes(xlsx(QA2))
    assert texts(read("dataset_example.xlsx")) == TWO


# What is there -> what is asked for: what the refusal holds; after a "!", what it does not hold.
@pytest.mark.parametrize("row", cases("missing").values())  # X8
def test_a_missing_file_is_refused_with_what_is_there(row: str, folder: Path) -> None:
    there, path, words = re.split("-> |: ", row, maxsplit=2)
    for name in there.split():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    message = refusal(path).lower()
    for word in words.format(here=folder.resolve()).lower().split(", "):
        assert (word.removeprefix("!") in message) == (word[0] != "!")


def styled(book: Any) -> None:
    """A remark far to the right, a filter, colours, a frozen row, a sheet with a chart."""
    sheet = book.active
    sheet["Z2"] = "checked by Ann"
    sheet.auto_filter.ref, sheet.freeze_panes, sheet.sheet_view.rightToLeft = "A1:B3", "A2", True
    sheet["A1"].font = openpyxl.styles.Font(bold=True)
    for row in range(4, 60):
        sheet.cell(row, 1).fill = openpyxl.styles.PatternFill("solid", "FFFF00")
    book.create_chartsheet("Chart", 0)


# fmt: off
LITERAL = [(q, a) for q, a in map(json.loads, cases("texts").values())]  # X12: what other readers take for nothing
LONG = [("Long?", "word " * 50_000 + "end"), ("Short?", "Yes")]
TYPED = [
    (7, "7"), (7.0, "7"), (0.1, "0.1"), (-3, "-3"), (2.5, "2.5"), (10**12, "1000000000000"),
    (True, "TRUE"), (False, "FALSE"), (datetime.date(2024, 3, 5), "2024-03-05"),
    (datetime.datetime(2024, 3, 5), "2024-03-05"), (datetime.time(14, 30), "14:30:00"),
    (datetime.datetime(2024, 3, 5, 14, 30), "2024-03-05 14:30:00"), ("007", "007"), ("NA", "NA"),
    (1234567890123456.0, "1234567890123456"), (4915112345678, "4915112345678"), ("None", "None"),
]
TYPES = [(f"What is {i}?", *cells) for i, cells in enumerate(TYPED)]
LETTERS = {kind: write for kind, write in FORMATS.items() if kind not in ("ods", "xlsb")} | {"openpyxl": xlsx}
BOLD = CellRichText("Th", TextBlock(InlineFont(b=True), "us"), ".")
RICH = lambda book: setattr(book.active["B3"], "value", BOLD)  # noqa: E731
HIDDEN = lambda book: setattr(book["Old"], "sheet_state", "hidden")  # noqa: E731
MERGED = lambda book: [*map(book.active.merge_cells, ("A1:C1", "A3:A4", "B5:B6"))]  # noqa: E731
LONGEST = "".join(random.Random(1).choices("abcdefghij ", k=1_000_009))  # of one letter: a zip bomb
READINGS = '<si><r><t>東京</t></r><r><rPr><b/></rPr><t>タワー</t></r><rPh sb="0" eb="2"><t>トウキョウ</t></rPh><phoneticPr fontId="1"/></si>'.encode()
PREFIXES = [*((f"<{tag}>", f"<x:{tag}>") for tag in ("sheetData", "row", "c", "is", "t")),
            *((f"</{tag}>", f"</x:{tag}>") for tag in ("sheetData", "row", "c", "is", "t", "worksheet")),
            ("<worksheet xmlns=", "<x:worksheet xmlns:x="), ('<c t="', '<x:c t="')]
MACROS = ("openxmlformats-officedocument.spreadsheetml.sheet.main+xml", "ms-excel.sheet.macroEnabled.main+xml")
LISTS = '<extLst><ext uri="{CCE6A557-97BC-4b89-ADB6-D9C93CAAB3DF}"/></extLst></worksheet>'
GERMAN = [("Länge?", "Wörter ß " * 3000 + "Ω"), ("Wie viele?", "4")]
SHOP = [("All of our answers",), ("topic", *HEADER), ("shop", *TWO[0]), (None, *TWO[1]),
        ("other", "Two?", "First."), (None, None, "Second.")]
DATED = [HEADER, ("When?", datetime.datetime(2024, 3, 5)), TWO[0]]
NOTE = "<office:annotation><text:p>Ask Ann.</text:p></office:annotation><text:p>So."
REPEATED = '<table:table-row table:number-rows-repeated="3"><table:table-cell/></table:table-row>'
PARTS = parts_of(xlsx(QA2))
ELSEWHERE = {name.replace("workbook.xml", "book.xml"): part.replace(b"workbook.xml", b"book.xml")
             for name, part in PARTS.items()}
WORKBOOKS = {
    "merged cells": in_xlsx(  # X14
        xlsx(SHOP, MERGED), [*TWO, ("Two?", "First.")], rows=[3, 4, 5], dropped=[(6, "no question")]),
    **{f"a hidden sheet with more, in {name}": File(name, xlsx(QA2, HIDDEN, Old=[*QA4, ("Old?", "Old.")]), TWO)
       for name in ("a.xlsx", "test.xlsx")},  # X14
    "colours, a chart, a remark far right": in_xlsx(xlsx(QA2, styled), TWO, rows=[2, 3]),
    "rich text": in_xlsx(xlsx(QA2, RICH), TWO),
    "rich text inside a cell": in_xlsx(ending_in(
        '<c t="inlineStr"><is><r><t>Th</t></r><r><t>us.</t></r></is></c>'), TWO),
    "texts inside the cells": in_xlsx(raw_xlsx(PAIRS_INLINE), TWO),
    "texts with readings": in_xlsx(ending_in(SHARED_TEXT, READINGS), [TWO[0], ("How?", "東京タワー")]),
    **{f"the result of a formula, {seen}": in_xlsx(
        ending_in(f'<c t="{kind}"><f>B1</f><v>{value}</v></c>'), [TWO[0], ("How?", seen)])
       for kind, value, seen in (("str", "Ab", "Ab"), ("n", "4", "4"), ("b", "1", "TRUE"))},
    **{f"a formula without a result, {cell}": in_xlsx(ending_in(cell), TWO[:1], dropped=[(3, "no answer")])
       for cell in ("<c><f>1+1</f></c>", '<c t="str"><f>1+1</f></c>',
                    *(f'<c t="e"><f>B9</f><v>{sign}</v></c>' for sign in ("#N/A", "#REF!", "#DIV/0!")))},
    "numbers, dates and truths": in_xlsx(  # X11
        xlsx([HEADER, *(row[:2] for row in TYPES)]), [row[::2] for row in TYPES]),
    "a computed number": in_xlsx(ending_in("<c><v>0.30000000000000004</v></c>"), [TWO[0], ("How?", "0.3")]),
    "a carriage return": in_xlsx(
        replaced(xlsx([HEADER, ("Why?", "One@two")]), ("@", "_x000D_\n")), [("Why?", "One\ntwo")]),
    "a text beyond any limit": in_xlsx(  # X5
        ending_in(SHARED_TEXT, f"<si><t>{LONGEST}</t></si>".encode()), TWO[:1], dropped=[(3, "1,?000,?000|long")]),
    "Strict": in_xlsx(replaced(xlsx(QA4), *STRICT), FOUR, rows=[2, 3, 4, 5]),  # X3
    "Strict, a hidden sheet with more": in_xlsx(
        replaced(xlsx(QA2, HIDDEN, Old=[*QA4, ("Old?", "Old.")]), *STRICT), TWO),
    "Strict, from the third row on": in_xlsx(replaced(xlsx([(), (), *QA2]), *STRICT), TWO, rows=[4, 5]),
    "macros": File("a.xlsm", replaced(xlsx(QA2), MACROS), TWO),
    "drop-down lists": in_xlsx(replaced(xlsx(QA2), ("</worksheet>", LISTS)), TWO),
    **{f"a claim to be {size}": in_xlsx(replaced(xlsx(QA2), ('ref="A1:B3"', f'ref="{size}"')), TWO)
       for size in ("A1", "A1:B2", "A1:A3")},
    "a main part of another name": in_xlsx(zip_of(ELSEWHERE), TWO),
    "backslashes in a zip file": in_xlsx(zip_of({name.replace("/", "\\"): part for name, part in PARTS.items()}), TWO),
    "a styled blank cell far below": in_xlsx(with_rows('<row r="400000"><c r="A400000" s="1"/></row>'), TWO),
    "parts named as Excel names them": in_xlsx(replaced(xlsx(QA2), ('Target="/xl/', 'Target="')), TWO),
    "prefixes on all names": in_xlsx(replaced(raw_xlsx(PAIRS_INLINE), *PREFIXES), TWO),
    "Excel 97, a long answer": in_xls(xls([("Frage", "Antwort"), *GERMAN]), GERMAN, rows=[2, 3]),
    "Excel 97, a date": in_xls(xls(DATED), [("When?", "2024-03-05"), TWO[0]]),
    "LibreOffice, rows that repeat": in_ods(
        replaced(ods([("Wykaz",), *QA2]), ("</table:table-row>", f"</table:table-row>{REPEATED}")), TWO,
        rows=[9, 13], dropped=[(n, "blank") for n in (6, 7, 8, 10, 11, 12)]),
    "LibreOffice, a note on a cell": in_ods(replaced(ods(QA2), ("<text:p>So.", NOTE)), TWO),
    **{f".{kind} named {name}": File(name, write(QA2), TWO)
       for kind, write in FORMATS.items() for name in ("a.xlsx", "a.csv", "a.xls", "dataset")},
}

TRICKY = [*LITERAL[-4:-2], ("Où ça?", "{{name}}, là-bas"), ("None?", "None"), ("Agent?", "007")]
ALL = [HEADER, *TRICKY]
DIALECTS: dict[str, bytes] = {  # each holds the same five pairs
    "comma": csv_file(ALL), "semicolon": csv_file(ALL, delimiter=";"), "bar": csv_file(ALL, delimiter="|"),
    "tab": csv_file(ALL, delimiter="\t"), "all in quotes": csv_file(ALL, quoting=1),
    "a blank behind the comma": csv_file(ALL, quoting=1).replace(b'","', b'", "'),  # X9
    "line ends of Unix": csv_file(ALL, lineterminator="\n"), "blank lines at the end": csv_file(ALL) + b"\r\n\r\n",
    "line ends of an old Mac": csv_file(ALL, lineterminator="\r", quoting=1),
    "UTF-8 with a mark": csv_file(ALL, "utf-8-sig"), "UTF-16": csv_file(ALL, "utf-16", delimiter="\t"),
    "UTF-16, big end first": b"\xfe\xff" + csv_file(ALL, "utf-16-be"),  # X13
    "Windows-1252": csv_file(ALL, "cp1252", delimiter=";"), "no last line end": csv_file(ALL).rstrip(),
    "a comma behind every row": csv_file([(*row, "") for row in ALL]),
}
PRICES = {sign: [(f"Price {i}?", f"It costs {sign}5 a month, and {i} more at the end.") for i in range(6)]
          for sign in "£×€¥÷¢"}
TEXT_TABLES = {
    **{f"any text in {kind}": File(f"a.{kind}", write([HEADER, *LITERAL]), LITERAL) for kind, write in LETTERS.items()},
    **{name: in_csv(content, TRICKY) for name, content in DIALECTS.items()},
    **{f"{sign} in plain English": in_csv(csv_file([HEADER, *rows], "cp1252"), rows)
       for sign, rows in PRICES.items()},  # X13
    "a very long answer": in_csv(csv_file([HEADER, *LONG], delimiter=";"), LONG),
}

HEARD = ("Hi", "Hello", "Why?", "So.")
GREETED = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(HEARD)]
frame, FORMS = pandas.DataFrame, cases_of_files("formats")  # X9, X11, X14, X15
RECORDS = {
    "a list, as PowerShell saves it": File("a.json", js(R2, "utf-16"), TWO),
    "Parquet, Brotli, small groups": in_parquet(parquet(R4, compression="brotli", row_group_size=1), FOUR),
    "Parquet with an index": in_parquet(frame(R2, index=["x", "y"]).to_parquet(), TWO),
    "categories": in_parquet(frame(R2).astype("category").to_parquet(), TWO),
    "binary columns": in_parquet(
        parquet([{"question": q.encode(), "answer": a.encode()} for q, a in FOUR]), FOUR),
    "dates": in_parquet(parquet(records([("When?", datetime.date(2024, 3, 5))])), [("When?", "2024-03-05")]),
    "decimals": in_parquet(parquet(records([("Half?", decimal.Decimal("0.50"))])), [("Half?", "0.50")]),
    "messages written by pandas": in_parquet(frame({"messages": [GREETED[:2], GREETED]}).to_parquet(),
        [HEARD[:2], HEARD], rows=[1, 2], shape="conversations"),
}
# fmt: on


@files(WORKBOOKS | TEXT_TABLES | RECORDS | FORMS)
def test_a_file_is_read_as_it_looks(file: File, folder: Path) -> None:
    check(file, folder)


def test_nothing_in_a_file_can_steer_the_terminal(run: Run, folder: Path) -> None:
    (folder / "a.csv").write_bytes(csv_file([("question\x1b[31m", "answer\x07"), ("a\x1b[2J", "b"), ("c", "d\x9b1m")]))
    text = run("check", "--dataset-path", "a.csv")[1]
    assert "[2J" in text
    assert text.replace("\n", "").isprintable()


@files(cases_of_files("unpromised"))
def test_an_unpromised_form_is_read_right_or_refused(file: File, folder: Path) -> None:
    (folder / file.name).write_bytes(file.content)
    try:
        pairs = read(file.name)
    except UserError as error:
        assert file.name in str(error)
        assert "quotation" not in str(error) or re.search(r"\b3\b", str(error))  # its row
    else:
        assert [one for one in texts(pairs) if one not in file.expected] == []
        assert len(pairs.kept) + len(pairs.dropped) >= len(file.expected)


# Read right, with a note that it was guessed; "=" without one; "?": right, noted or refused.
TABLES = {name: line.split(": ", 1)[1] for names, line in cases("encodings").items() for name in names.split(", ")}


@pytest.mark.parametrize("name", TABLES)  # X13
def test_letters_survive_every_encoding(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark, encoding = name[0] if name[0] in "?=" else "", name.lstrip("?= ").split()[0]
    pairs = [tuple(row.split(" → ")) for row in TABLES[name].split(" | ")]
    for delimiter in "," if mark else ",;\t":
        whole = 3 if " and " in name else len(pairs)  # the rest is in another encoding
        content = csv_file(pairs[:whole], encoding, delimiter=delimiter)
        content += b"".join(csv_file([row], "cp1252", delimiter=delimiter) for row in pairs[whole:])
        (folder / "faq.csv").write_bytes(content)
        try:
            found = texts(read("faq.csv"))
        except UserError:
            found = None
        said = "".join(capsys.readouterr())
        assert found == pairs[1:] or (mark == "?" and (found is None or "faq.csv" in said))
        assert mark != "=" or said == ""
        assert mark or re.sub("^cp|_.*", "", encoding) in said.replace(" ", "").lower()


# fmt: off
OLE = bytes.fromhex("d0cf11e0a1b11ae1")
BIG = xlsx([HEADER, *FOUR * 9])
NO_ROWS, DAMAGED = "empty|no rows", "damaged|cut off|incomplete"
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "a password": ("xlsx", ole(bytes(9000), "EncryptedPackage", "EncryptionInfo"), "password"),  # X1
    "a password, seen": ("xlsx", OLE + bytes(504) + "EncryptedPackage".encode("utf-16-le"), "password"),
    "a password of old": ("xls", xls(QA2, filepass=True), "password"),
    "cut off": ("xlsx", BIG[:-900], DAMAGED), "cut in half": ("xlsx", BIG[: len(BIG) // 2], DAMAGED),  # X2
    "a start alone": ("xlsx", BIG[:100], DAMAGED), "Excel 97 of zeros": ("xls", OLE + bytes(600), DAMAGED),
    "Excel 97, cut off": ("xls", xls([HEADER, *FOUR * 99])[:3000], DAMAGED),
    "a binary workbook cut off": ("xlsb", xlsb([HEADER])[:-400], DAMAGED),
    "LibreOffice cut off": ("ods", ods([HEADER])[:-99], DAMAGED), "Parquet cut off": ("parquet", parquet(R4)[:-50], DAMAGED),
    "Parquet without rows": ("parquet", frame(columns=HEADER).to_parquet(), NO_ROWS),
    "zero bytes": ("xlsx", b"", NO_ROWS), "blanks": ("csv", b"\xef\xbb\xbf \r\n\r\n", NO_ROWS),
    "a sheet of a header": ("xlsx", xlsx([HEADER], More=[(), (" ",)]), NO_ROWS),
    "sheets of nothing": ("xlsx", xlsx([], Other=[()]), NO_ROWS), "zero bytes alone": ("csv", bytes(3000), "."),
    "gzip": ("xlsx", gzip.compress(csv_file(QA2)), "compressed|gzip|unpack"),
    "Word": ("xlsx", zip_of({"[Content_Types].xml": b"<T/>", "word/document.xml": b"<w/>"}), "Word"),
    "slides": ("xlsx", zip_of({"ppt/presentation.xml": b"<p/>"}), "slides|presentation|workbook"),
    "a zip file with the table in it": ("zip", zip_of({"data/train.csv": csv_file(QA2)}), "zip"),
    **{title: (file.name[2:], file.content, str(file.refused))
       for title, file in cases_of_files("refused").items()},  # X7, X8
}
# fmt: on


@pytest.mark.parametrize("kind, content, words", REFUSED.values(), ids=REFUSED)
def test_what_is_no_table_is_refused_whatever_its_name(kind: str, content: bytes, words: str, folder: Path) -> None:
    for name in {f"a.{kind}", "a.xlsx", "a.csv"}:
        (folder / name).write_bytes(content)
        assert re.search(words, refusal(name))


@pytest.mark.parametrize("kind", ["xls", "xlsb", "ods"])
def test_the_one_package_that_is_missing_is_named(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    (folder / "a.xlsx").write_bytes(xlsx(QA2))
    assert texts(read("a.xlsx")) == TWO
    (folder / f"a.{kind}").write_bytes(FORMATS[kind](QA2))
    assert "pip install python-calamine" in refusal(f"a.{kind}")
    (folder / "a.xlsx").write_bytes(BIG[:-900])
    assert re.search(DAMAGED, refusal("a.xlsx"))


WATCHER = """
import json, os, resource, signal, sys
sys.path[:0] = sys.argv[1:]
import openpyxl, pandas, pyarrow.parquet, python_calamine
from seams import Config, UserError, find_pairs
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for path in map(str.strip, sys.stdin):
    child = os.fork()
    if not child:
        signal.alarm(9)
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            found = find_pairs(Config(DATASET_PATH=path, CONVERSATION_PATHS="all"))
            outcome = {"kept": [[m["content"][:99] for m in p.messages] for p in found.kept[:20]]}
        except UserError as error:
            outcome = {"refused": str(error)}
        open(path + ".outcome", "w").write(json.dumps(outcome))
        os._exit(0)
    status, usage = os.wait4(child, 0)[1:]
    print(json.dumps([status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024 - base]), flush=True)
"""
Watch = Callable[[Path, bytes], dict[str, Any]]


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    """What comes of a file, read in a process of its own within five seconds and 500 MB."""
    command = [sys.executable, "-c", WATCHER, str(ROOT), str(ROOT / "tests")]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "MALLOC_ARENA_MAX": "2"}, **pipes) as process:

        def watch(path: Path, content: bytes) -> dict[str, Any]:
            path.write_bytes(content)
            print(path, file=process.stdin, flush=True)
            status, seconds, memory = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            assert status == 0, f"the reader died with status {status} after {seconds:.1f} s"
            found: dict[str, Any] = json.loads(Path(f"{path}.outcome").read_text())
            assert seconds < 5
            assert memory < 500
            assert path.name in found.get("refused", path.name)
            return found

        yield watch


def bomb(part: str, content: bytes) -> bytes:
    """Ten entities, each ten times the one before, in the sheet or in the list of texts."""
    values = (f"&a{i - 1};" * 10 if i else "boom boom" for i in range(10))
    entities = "".join(f"<!ENTITY a{i} '{value}'>" for i, value in enumerate(values))
    return replaced(content, (f"<{part}", f"<!DOCTYPE x [{entities}]><{part}"), ("So.", "&a9;"))


def shared_text(megabytes: float, times: int, packing: int) -> bytes:
    text = random.Random(0).randbytes(int(megabytes * 500_000)).hex().encode()
    row = '<row><c t="inlineStr"><is><t>Who {}?</t></is></c>' + SHARED_TEXT + "</row>"
    rows = "".join(map(row.format, range(times)))
    return with_rows(rows, strings=b"<si><t>%b</t></si>" % text, packing=packing)


def message(name: str, parent: str | None, turn: int, text: str, rank: int = 0) -> dict[str, Any]:
    said = {"role": ("prompter", "assistant")[turn % 2], "text": text, "lang": "en"}
    return {"message_id": name, "parent_id": parent, "rank": rank, "deleted": False, **said}


def chain(length: int) -> list[dict[str, Any]]:
    return [message(str(i), str(i - 1) if i else None, i, f"Turn {i}") for i in range(length)]


def deep_tree(levels: int) -> bytes:
    """Replies one in another; written by hand, as json itself cannot."""
    heads = b"".join(js(one)[:-1] + b', "replies": [' for one in chain(levels))
    return b'{"message_tree_id": "0", "prompt": ' + heads + b"]}" * levels + b"}\n"


def changed(content: bytes, part: str, old: bytes, new: bytes = b"", cut: bool = False) -> bytes:
    """A file, or a part of a zip file, overwritten at its first such place, or cut off there."""
    inside = parts_of(content) if part else {part: content}
    place = inside[part].index(old)
    tail = b"" if cut else inside[part][place + len(new) :]
    inside[part] = inside[part][:place] + (old if cut else new) + tail
    return zip_of(inside) if part else inside[part]


# fmt: off
SHEET, HOW = "xl/worksheets/sheet1", b'<table:table-row><table:table-cell office:value-type="string"><text:p>H'
SIZE, CELL_2 = bytes.fromhex("00020e00"), bytes.fromhex("070c01000000")  # DIMENSIONS; a text in column 2
CORNER = b'<row r="1048576"><c r="XFD1048576" t="inlineStr"><is><t>x</t></is></c></row>'
ALL_CELLS = b'<dimension ref="A1:XFD1048576"/>'
FILLED = '<row r="{0}"><c r="A{0}" t="inlineStr"><is><t>Is it {0}?</t></is></c><c r="B{0}"><v>1</v></c></row>'
BLANK = '<row r="{0}" s="1" customFormat="1"><c r="A{0}" s="1"/><c r="B{0}" s="1"/></row>'
MANY = '<table:table-row table:number-rows-repeated="1048572">{}</table:table-row>'
FAR = '<table:table-cell table:number-columns-repeated="{}" office:value-type="string"><text:p>x</text:p></table:table-cell>'
FAR_ODS = MANY.format("<table:table-cell/>") + f"<table:table-row>{FAR.format(16384)}</table:table-row>"
TURNS = "### Human: a### Assistant: b"
BUSH = [message("0" + "".join(path), ("0" + "".join(path))[:-1] or None, len(path), "-".join(path) or "Root")
        for depth in range(5) for path in itertools.product("0123456789", repeat=depth)]  # ten replies each
TREE = [*chain(4), message("4", "0", 1, "Worse.", rank=2)]
DEEP = b'{"question": "Deep?", "answer": '
READ, EITHER, ANY = "read", "read or refused", "anything"
LIMIT, PACKED, NESTING = "rows|letters|MB|large", "unpack|bomb|large", "JSON|nest"
HOSTILE: dict[str, tuple[str, str, Callable[[], bytes]]] = {  # ending, what comes of it, content
    "a size of all cells": ("xlsx", READ, lambda: with_rows(b"", ALL_CELLS)),
    "a size of all cells, Strict": ("xlsx", READ, lambda: replaced(with_rows(b"", ALL_CELLS), *STRICT)),
    "a cell in the last corner": ("xlsx", EITHER, lambda: with_rows(CORNER)),
    "the last corner, Strict": ("xlsx", EITHER, lambda: replaced(with_rows(CORNER), *STRICT)),
    "the last corner, LibreOffice": ("ods", EITHER, lambda: ods(QA2, FAR_ODS)),
    "repeated to the last corner": ("ods", EITHER, lambda: ods(QA2, MANY.format(FAR.format(16384)))),
    "a false size": ("xls", EITHER, lambda: changed(
        xls(QA2), "", SIZE, SIZE + b"\0\0\0\0\xff\xff\xff\xff\0\0\xff\xff")),
    "a false column": ("xlsb", EITHER, lambda: changed(xlsb(QA2), f"{SHEET}.bin", CELL_2, CELL_2[:5] + b"\x70")),
    "a sheet that stops": ("xlsx", DAMAGED, lambda: changed(xlsx(QA2), f"{SHEET}.xml", b"Why?", cut=True)),  # X2
    "a binary sheet that stops": ("xlsb", ANY, lambda: changed(xlsb(QA2), f"{SHEET}.bin", b"\x07\x0c", cut=True)),
    **{f"LibreOffice, stopping at {at!r}": ("ods", DAMAGED, partial(
        changed, ods(QA2), "content.xml", at, cut=True)) for at in (b"<office:document", b"<text:p>Why?")},
    "LibreOffice, a broken tag and no end": ("ods", DAMAGED, lambda: changed(
        changed(ods(QA2), "content.xml", HOW, b"<table:table-/ow>"), "content.xml", b"<text:p>H", cut=True)),
    "300,001 lines": ("csv", LIMIT, lambda: csv_file(QA2) + b"Who?,I.\n" * 300_001),
    "300,002 records": ("jsonl", LIMIT, lambda: L2 * 150_001),
    "300,002 rows of Parquet": ("parquet", LIMIT, lambda: parquet(R2 * 150_001)),
    "too many letters": ("xlsx", LIMIT, lambda: shared_text(0.3, 700, zipfile.ZIP_DEFLATED)),
    "one huge text": ("xlsx", EITHER, lambda: shared_text(40, 1, zipfile.ZIP_STORED)),  # X5
    "a million rows": ("xlsx", LIMIT, lambda: with_rows("".join(map(FILLED.format, range(4, 1_048_577))))),  # X6
    "blank rows": ("xlsx", EITHER, lambda: with_rows("".join(map(BLANK.format, range(4, 500_000))))),
    "a zip bomb": ("xlsx", PACKED, lambda: with_rows(b" " * 300_000_000)),  # X6
    "a zip bomb of LibreOffice": ("ods", PACKED, lambda: ods(QA2, " " * 300_000_000)),
    "a bomb beside the sheet": ("xlsx", PACKED, lambda: zip_of(parts_of(BIG) | {"xl/x.bin": bytes(30_000_000)})),
    "an XML bomb in the sheet": ("xlsx", ".", lambda: bomb("worksheet", xlsx(QA2))),  # X4
    "an XML bomb in the texts": ("xlsx", ".", lambda: bomb("sst", excel(QA2))),  # X4
    "lists nested deeply": ("json", NESTING, lambda: b"[" * 100_000 + b"]" * 100_000),
    "lists nested deeply, cut off": ("json", NESTING, lambda: b"[" * 200_000),
    "objects nested deeply": ("json", NESTING, lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "objects nested deeply, cut off": ("json", NESTING, lambda: b'{"a":' * 200_000),
    "a cell nested so that it is just read": (
        "json", READ, lambda: js(R2)[:-1] + b", " + DEEP + b"[" * 900 + b"1" + b"]" * 900 + b"}]"),
    "a line nested deeply": ("jsonl", READ, lambda: L2 + DEEP + b"[" * 99_999),
    "a text of brackets": ("csv", READ, lambda: csv_file([*QA2, ("Deep?", "[" * 9000 + "]" * 9000)])),
    "brackets": ("csv", ANY, lambda: csv_file([HEADER, *((n, "[" * n + "]" * n) for n in (90, 900, 9000))])),
    "a number of many digits": ("json", ANY, lambda: b'[{"question": "Long?", "answer": 1%b}]' % (b"0" * 5000)),
    "a path of twenty thousand messages": ("jsonl", ANY, lambda: jsonl(*chain(20_000))),
    "a tree so deep that it is just read": ("jsonl", ANY, lambda: deep_tree(480)),
    "a deeper tree": ("jsonl", ANY, lambda: deep_tree(5000)),
    "a tree of ten thousand messages": ("jsonl", ANY, lambda: jsonl(*BUSH)),
    "a message of no name": ("jsonl", ANY, lambda: jsonl(*TREE, message("", "0", 1, "Nameless."))),
    "a tree that comes back to its start": ("jsonl", ANY, lambda: jsonl(*TREE, message("0", "2", 1, "x"))),
    "a line of a hundred thousand cells": ("csv", READ, lambda: csv_file(QA2) + b"x," * 100_000),
    "3,000 columns": ("csv", "column", lambda: csv_file([[f"{x} {i}" for i in range(3000)] for x in "cabd"])),
    "10,000 keys": ("jsonl", EITHER, lambda: L2 + jsonl(*({f"k{i}": "a", "answer": 1} for i in range(10_000)))),
    "a mark before a long rest": ("csv", EITHER, lambda: csv_file(QA2) + b'"Who?,I.\n' + b"Here.,So.\n" * 200_000),
    "a text without an end": ("txt", ".", lambda: b"lorem ipsum " * 3_000_000),
    "only quotation marks": ("csv", ".", lambda: b'"' * 3_000_000),
    "turns in one text": ("jsonl", ANY, lambda: jsonl({"text": TURNS * 20_000}, {"text": TURNS[:11] * 60_000})),
    "blanks between turns": ("jsonl", ANY, lambda: jsonl(
        {"text": TURNS.replace("a#", "a" + " " * 200_000 + "#")}, {"text": "#" * 99_999})),
}
# fmt: on


@pytest.mark.parametrize("kind, outcome, make", HOSTILE.values(), ids=HOSTILE)
def test_no_file_takes_all_time_or_memory(
    kind: str, outcome: str, make: Callable[[], bytes], folder: Path, watch: Watch
) -> None:
    found = watch(folder / f"a.{kind}", make())
    if outcome == READ or (outcome == EITHER and "kept" in found):
        assert found.get("kept", [])[:2] == [list(row) for row in TWO], found
    elif outcome not in (EITHER, ANY):
        assert re.search(outcome, found.get("refused", "")), found


few_or_many = pytest.mark.parametrize("most", [40, sweep(250)])
LIKELY = st.sampled_from("\n\t \"',;|?=#:ab.[]{}\\")
LETTER = st.one_of(LIKELY, st.characters(exclude_categories=["Cc", "Cs", "Cn"]))
MEANT = re.compile(r"_x[0-9A-Fa-f]{4}_|^\s*[\[{]|#[A-Z]")  # what these mean is shown above
CELL = st.text(LETTER, max_size=12).filter(lambda text: not MEANT.search(text))
ENCODING, MARK = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.sampled_from(",;\t|")
KIND, BY_RECORD = st.sampled_from([*LETTERS, "csv"]), ("json", "jsonl", "parquet")
UNSEEN, FILLERS = "Cc Cf Mn Me Zs Zl Zp Pd".split(), "\u115f\u1160\u2800\u3164\uffa0"


def is_seen(text: str) -> bool:
    return any(category(letter) not in UNSEEN and letter not in FILLERS for letter in text)


def first_of_each(found: list[Any], talk: Callable[[Any], Sequence[str]]) -> list[Any]:
    """What is left without copies: the same letters in another case, width or spacing."""
    first: dict[tuple[str, ...], Any] = {}
    for one in found:
        plain = tuple(" ".join(normalize("NFKC", text).casefold().split()) for text in talk(one))
        first.setdefault(plain, one)
    return list(first.values())


@few_or_many
def test_any_table_reads_back_the_same_from_every_format(most: int, folder: Path) -> None:
    @settings(max_examples=most, deadline=None)
    @given(st.lists(st.tuples(CELL, CELL), max_size=5), KIND, MARK, ENCODING)
    def reads(rows: list[tuple[str, str]], kind: str, mark: str, encoding: str) -> None:
        rows = [*rows, ("Why?", "So.")]
        as_csv = partial(csv_file, encoding=encoding, delimiter=mark)
        path = folder / f"any.{kind}"
        path.write_bytes((as_csv if kind == "csv" else LETTERS[kind])([HEADER, *rows]))
        found = [(pair.row, pair.question, pair.answer) for pair in read(path).kept]
        numbered = [(i, q.strip(), a.strip()) for i, (q, a) in enumerate(rows, 1 + (kind not in BY_RECORD))]
        whole = [row for row in numbered if is_seen(row[1]) and is_seen(row[2])]
        assert found == first_of_each(whole, lambda row: row[1:])

    reads()


FORM = st.sampled_from([("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")])
TALK = st.lists(CELL.filter(is_seen).map(str.strip), min_size=2, max_size=6).map(lambda one: one[: len(one) // 2 * 2])


@few_or_many
def test_any_conversation_reads_back_the_same(most: int, folder: Path) -> None:
    @settings(max_examples=most, deadline=None)
    @given(st.lists(TALK, min_size=1, max_size=3), st.sampled_from([*BY_RECORD, "csv"]), FORM)
    def reads(talks: list[list[str]], kind: str, form: tuple[str, ...]) -> None:
        turns = [[{form[0]: form[2 + i % 2], form[1]: text} for i, text in enumerate(talk)] for talk in talks]
        cells = [(js(one).decode() if kind == "csv" else one,) for one in turns]
        (folder / f"a.{kind}").write_bytes(FORMATS[kind]([("conversations",), *cells]))
        assert texts(read(f"a.{kind}")) == [tuple(talk) for talk in first_of_each(talks, list)]

    reads()


# fmt: off
STARTS = b'|PK\3\4|\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1|PAR1|\xff\xfe|\xfe\xff|\xef\xbb\xbf|[|[[|{"a":[|{"question": |[{"messages": |question,answer\n'
REAL = [
    *(write(QA4) for write in FORMATS.values()), xlsx(QA4), replaced(excel(QA4), *STRICT), DIALECTS["UTF-16"],
    jsonl({"messages": GREETED}, {"messages": GREETED[:2]}), parquet([{"messages": GREETED}]), FORMS["SQuAD"].content,
    csv_file([("id", "messages"), (1, js(GREETED).decode())]), jsonl(*TREE), deep_tree(4),
]
STRANGE: list[Any] = [None, True, 0, -1.5, 1e999, "", " ", "Why?", [], {}, [[]], [None], [{}],
                      {"ODD": "MENT"}, ["ODD", "MENT"], [{"ODD": ["MENT"]}]]
PLAIN = "a list|wrapped in data|columns|lists with a header|ids with their records|SQuAD|flat SQuAD".split("|")
DOCUMENTS: list[Any] = [
    *(json.loads(FORMS[name].content) for name in PLAIN), [{"text": TURNS}, {"text": "Q: a\nA: b"}], TREE,
    [{"instruction": "Add.", "input": "2 and 2", "output": "4"}, {"instruction": "Dance.", "output": "Tap"}],
    [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}],
    [{"messages": GREETED}, {"messages": GREETED[:2]}], json.loads(deep_tree(4)),
]
NAMES = "question answer answers text role content from value messages prompt replies data paragraphs qas rank message_id parent_id lang".split()
# fmt: on


def random_bytes(dice: random.Random) -> bytes:
    start = dice.choice(STARTS.split(b"|"))
    return start + dice.randbytes(dice.randrange(200)) + start * dice.randrange(2)


def damaged(dice: random.Random, content: bytes) -> bytes:
    worse = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        worse[dice.randrange(len(worse))] = dice.randrange(256)
    return bytes(worse[: dice.choice([len(worse), dice.randrange(len(worse))])])


def damaged_file(dice: random.Random) -> bytes:
    content = dice.choice(REAL)
    if not content.startswith(b"PK") or dice.random() < 0.25:
        return damaged(dice, content)
    inside = parts_of(content)  # a sound zip archive with a damaged file in it
    chosen = dice.choice([name for name, part in inside.items() if part])
    return zip_of(inside | {chosen: damaged(dice, inside[chosen])})


def junk(dice: random.Random, depth: int = 4) -> Any:
    if dice.random() < 0.3 or not depth:
        return dice.choice(STRANGE)
    inner = [junk(dice, depth - 1) for _ in range(dice.randrange(5))]
    return inner if dice.random() < 0.4 else {dice.choice(NAMES): one for one in inner}


def strange_json(dice: random.Random) -> bytes:
    """A document with something strange somewhere in it, or strange altogether."""
    holder = json.loads(js([dice.choice([*DOCUMENTS, junk(dice)])]))
    for _ in range(dice.randint(1, 3)):
        place, key = holder, 0
        while isinstance(place[key], (dict, list)) and place[key] and dice.random() < 0.8:
            place = place[key]
            key = dice.choice([*place] if isinstance(place, dict) else range(len(place)))
        if isinstance(place, dict) and dice.random() < 0.2:
            del place[key]
        else:
            place[key] = json.loads(js(dice.choice(STRANGE)))
    lines = isinstance(holder[0], list) and dice.random() < 0.5
    return jsonl(*holder[0]) if lines else js(holder[0])


@few_or_many
@pytest.mark.parametrize("make", [random_bytes, damaged_file, strange_json])
def test_whatever_a_file_holds_is_read_or_refused_and_never_printed_into_a_text(  # X2
    make: Callable[[random.Random], bytes], most: int, folder: Path, watch: Watch
) -> None:
    @settings(max_examples=most, deadline=None, phases=[Phase.generate])  # what hangs hangs once
    @given(st.integers(0, 2**32))
    def reads(seed: int) -> None:
        found = watch(folder / "a.xlsx", make(random.Random(seed)))
        learnt = "\n".join(text for talk in found.get("kept", []) for text in talk)
        assert make is not strange_json or not re.search(r"ODD.*MENT|\[\]|\{\}|\bNone\b", learnt)

    reads()


# fmt: off
# A file; a pair, and whether it may be taught; and what must be said if that is not so.
NEVER, ANSWERS = "(?!)", [{"question": q, "answers": [3]} for q, _ in FOUR]
SAID: dict[str, tuple[bytes, object, bool, str]] = {
    **{f"a second header, {second[0]}": (csv_file([HEADER, second, *FOUR]), second, False, NEVER)
       for second in (("Frage", "Antwort"), ("Question (English)", "Answer (English)"))},
    "a list of one number": (jsonl(*ANSWERS), ("Why?", "3"), False, "answers"),
    "a fault in JSON": (js(R4, indent=1).replace(b'"question": "How?"', b'question: "How?"'), None, True, r"\bline 7\b"),
}
# fmt: on


@pytest.mark.parametrize("content, pair, taught, words", SAID.values(), ids=SAID)
def test_nothing_wrong_is_taught_without_a_word(
    content: bytes, pair: object, taught: bool, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.json").write_bytes(content)
    found: list[Any] = []
    try:
        pairs = read("a.json")
        found, said = texts(pairs), str([f"row {one.row} {one.reason}" for one in pairs.dropped])
    except UserError as error:
        said = str(error)
    assert (pair in found) == taught or re.search(words, in_words(said + "".join(capsys.readouterr())))
