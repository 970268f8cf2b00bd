"""Writers of every kind of file, and the runner of the cases that are files, in Python or in tests/cases."""

import csv
import datetime
import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
import xlwt
from conftest import in_words, sweep
from openpyxl.utils import get_column_letter as letters
from pyxlsbwriter import XlsbWriter
from seams import Config, UserError, find_pairs

Texts = Sequence[tuple[str, ...]]  # of one conversation: question, answer, question, answer, …
Rows = Sequence[Sequence[Any]]
ASKED = "--question-column"  # in every message that asks the person for the columns
HEADER = ("question", "answer")
TWO = [("Why?", "So."), ("How?", "Thus.")]
FOUR = [*TWO, ("Tell me where.", "Over there."), ("Who is it?", "It is me.")]
QA2, QA4 = [HEADER, *TWO], [HEADER, *FOUR]
GIVEN: dict[str, Texts] = {"TWO": TWO, "THREE": [*TWO, FOUR[3]], "BUT ONE": [FOUR[0], *FOUR[2:]], "FOUR": FOUR}


def csv_file(rows: Rows, encoding: str = "utf-8", **dialect: Any) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue().encode(encoding)


def js(value: object, encoding: str = "utf-8", **style: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, **style).encode(encoding)


def jsonl(*records: object) -> bytes:
    return b"".join(js(record) + b"\n" for record in records)


def records(rows: Rows, header: Sequence[Any] = HEADER) -> list[dict[str, object]]:
    return [dict(zip(header, row, strict=True)) for row in rows]


def parquet(rows: list[Any], **how: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **how)
    return file.getvalue()


def xlsx(rows: Rows, change: Callable[[Any], object] | None = None, **more: Sequence[Sequence[object]]) -> bytes:
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
    "[Content_Types].xml": b'<Override PartName="/xl/sharedStrings.xml" ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"/>',
    "xl/_rels/workbook.xml.rels": b'<Relationship Id="rId99" Target="sharedStrings.xml" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/sharedStrings"/>',
}
MAIN = b'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def raw_xlsx(cells: bytes, strings: bytes = b"", before: bytes = b"", packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A workbook whose one sheet, and list of texts, are written by hand."""
    parts = parts_of(xlsx([("text",)]))
    parts["xl/worksheets/sheet1.xml"] = b"<worksheet %b>%b<sheetData>%b</sheetData></worksheet>" % (MAIN, before, cells)
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

    cells = ""
    for i, row in enumerate(rows, 1):
        cells += f'<row r="{i}">{"".join(cell(f"{letters(j)}{i}", one) for j, one in enumerate(row, 1))}</row>'
    strings = "".join(f'<si><t xml:space="preserve">{escape(text)}</t></si>' for text in known)
    return raw_xlsx(cells.encode(), strings.encode())


def inline(*texts: str) -> bytes:
    cells = "".join(f'<c t="inlineStr"><is><t>{escape(text)}</t></is></c>' for text in texts)
    return f"<row>{cells}</row>".encode()


PAIRS_INLINE = b"".join(inline(*row) for row in QA2)
SHARED_TEXT = '<c t="s"><v>0</v></c>'  # a cell with the first text of the list
STRICT = [
    ("schemas.openxmlformats.org/spreadsheetml/2006/", "purl.oclc.org/ooxml/spreadsheetml/"),
    ("schemas.openxmlformats.org/officeDocument/2006/", "purl.oclc.org/ooxml/officeDocument/"),
]


def with_rows(cells: bytes | str, before: bytes = b"", **how: Any) -> bytes:
    """A workbook of two pairs, and what stands below or above them."""
    return raw_xlsx(PAIRS_INLINE + (cells.encode() if isinstance(cells, str) else cells), before=before, **how)


def ending_in(cell: str, strings: bytes = b"") -> bytes:
    """A workbook of two pairs, where the cell of the second answer is written by hand."""
    row = f'<row><c t="inlineStr"><is><t>How?</t></is></c>{cell}</row>'.encode()
    return raw_xlsx(inline(*HEADER) + inline(*TWO[0]) + row, strings)


def xls(rows: Rows, sheet: str = "Tabelle1", filepass: bool = False) -> bytes:
    book, file = xlwt.Workbook(), io.BytesIO()
    page, day = book.add_sheet(sheet), xlwt.easyxf(num_format_str="yyyy-mm-dd")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            page.write(i, j, cell, day if isinstance(cell, datetime.date) else xlwt.Style.default_style)
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


ODS = '<?xml version="1.0"?><office:document-content xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0" xmlns:table="urn:oasis:names:tc:opendocument:xmlns:table:1.0" xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0"><office:body><office:spreadsheet><table:table table:name="Arkusz1">{}</table:table></office:spreadsheet></office:body></office:document-content>'
MANIFEST = b'<manifest:manifest xmlns:manifest="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0"><manifest:file-entry manifest:full-path="/" manifest:media-type="%b"/></manifest:manifest>'
ODS_KIND = b"application/vnd.oasis.opendocument.spreadsheet"
PADDING = '<table:table-cell table:number-columns-repeated="{}"/>'
REST = '<table:table-row table:number-rows-repeated="{}">' + PADDING.format(16384) + "</table:table-row>"


def ods(rows: Rows, tail: str = "") -> bytes:
    """As LibreOffice writes it: every row and the sheet padded to the largest size there is."""

    def cell(value: object) -> str:
        if value is None or value == "":
            return "<table:table-cell/>"
        number = f'"float" office:value="{value}"' if isinstance(value, (int, float)) else '"string"'
        spaced = re.sub("  +", lambda run: f' <text:s text:c="{len(run[0]) - 1}"/>', escape(str(value)))
        lines = "".join(f"<text:p>{line}</text:p>" for line in spaced.split("\n"))
        return f"<table:table-cell office:value-type={number}>{lines}</table:table-cell>"

    body = ""
    for row in rows:
        body += f"<table:table-row>{''.join(map(cell, row))}{PADDING.format(16384 - len(row))}</table:table-row>"
    content = ODS.format(body + (tail or REST.format(1048576 - len(rows)))).encode()
    parts = {"mimetype": ODS_KIND, "content.xml": content, "META-INF/manifest.xml": MANIFEST % ODS_KIND}
    return zip_of(parts)


# fmt: off
FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "xlsx": excel, "xls": xls, "xlsb": xlsb, "ods": ods, "csv": csv_file,
    "tsv": lambda rows: csv_file(rows, delimiter="\t"), "json": lambda rows: js(records(rows[1:], rows[0])),
    "jsonl": lambda rows: jsonl(*records(rows[1:], rows[0])), "parquet": lambda rows: parquet(records(rows[1:], rows[0])),
}
# fmt: on


@dataclass(frozen=True)
class File:
    """A file by its name and content, and what must come of it."""

    name: str
    content: bytes
    expected: Texts = ()
    rows: Sequence[int] | None = None  # of the pairs; None where no row is meant
    dropped: Sequence[tuple[int | None, str]] = ()  # row, and a pattern of the reason
    refused: str | None = None  # a pattern of the words; "" where the person is asked for the columns
    shape: str = "question and answer"  # "" where any will do


def read(path: Path | str, **changes: Any) -> Any:
    """The pairs of a file, with what holds of everything that is read."""
    pairs = find_pairs(Config(DATASET_PATH=str(path), **changes))
    assert pairs.shape in ("question and answer", "conversations", "message tree")
    for pair in pairs.kept:
        assert [message["role"] for message in pair.messages] == ["user", "assistant"] * (len(pair.messages) // 2)
        contents = [message["content"] for message in pair.messages]
        assert all(type(text) is str and text == text.strip() and text for text in contents)
        assert "".join(contents).encode()
        assert [pair.question, pair.answer] == contents[-2:]
    assert all(note.reason and note.row > 0 for note in pairs.dropped)
    return pairs


def texts(pairs: Any) -> list[tuple[str, ...]]:
    return [tuple(message["content"] for message in pair.messages) for pair in pairs.kept]


def refusal(path: Path | str, **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        read(path, **changes)
    message = str(refused.value)
    assert Path(path).name in message
    assert message.replace("\n", "").isprintable()
    assert 30 < len(message) < 3000
    return in_words(message)


def assert_nothing_taught(name: str, told: str, columns: Sequence[str] = ()) -> None:
    """The file is refused, or every row left out, with words that match the pattern."""
    try:
        pairs = read(name)
    except UserError:
        message = refusal(name)
    else:
        message = "\n".join(note.reason for note in pairs.dropped)
        assert not texts(pairs)
    assert re.search(told or ASKED, message)
    assert told or all(in_words(column) in message for column in columns[:12])


def check(file: File, folder: Path) -> None:
    """Read a file as is expected, and leave it as it is."""
    path = folder / file.name
    path.write_bytes(file.content)
    before = path.stat().st_mtime_ns
    if file.refused is not None:
        assert_nothing_taught(file.name, file.refused)
    else:
        pairs = read(file.name)
        assert texts(pairs) == [tuple(one) for one in file.expected]
        assert file.shape in ("", pairs.shape)
        assert file.rows is None or [pair.row for pair in pairs.kept] == file.rows
        assert len(pairs.dropped) == len(file.dropped)
        for note, (row, reason) in zip(pairs.dropped, file.dropped, strict=True):
            assert row in (None, note.row)
            assert re.search(reason, note.reason)
    assert (path.read_bytes(), path.stat().st_mtime_ns, [*folder.iterdir()]) == (file.content, before, [path])


def cases(name: str) -> dict[str, str]:
    """The cases of a table by name; "!!" before a name stands for "!!" behind the case."""
    table = (Path(__file__).parent / "cases" / f"{name}.txt").read_text(encoding="utf-8")
    every = [case for case in re.split(r"\n(?! )", table.strip()) if not case.startswith("#")]
    moved = [re.sub(r"^!! (.*)", r"\1 !! ", case) for case in every]
    found = {re.split(r": | \| |\n", case)[0]: case for case in moved}
    assert len(found) == len(every), name
    return found


def marked(name: str) -> list[Any]:
    """The cases of a table, of which some are for the long run."""
    return [sweep(case) if case.startswith("sweep ") else case for case in cases(name).values()]


def rows_of(name: str) -> list[Any]:
    """The columns behind the names of a table, "" for "-"; "sweep" before a name is for the long run."""
    found = []
    for title, case in cases(name).items():
        columns = ["" if part == "-" else part for part in case.split(" | ")[1:]]
        found.append(pytest.param(*columns, id=title, marks=[pytest.mark.sweep] * title.startswith("sweep ")))
    return found


def cases_of_files(name: str, shape: str = "question and answer") -> dict[str, File]:
    """A file a case: "name | file -> pairs @ their rows -- notes" or "name | file !! pattern".

    A note is a pattern of the reason for which a row is left out, or "row: pattern"; " | " stands between two. Below
    is the content: a workbook and Parquet as the JSON of their rows, all else with escapes such as \\n and \\xff.
    """
    writers = {kind: FORMATS[kind] for kind in ("xls", "xlsb", "ods")} | {"xlsx": xlsx, "parquet": parquet}
    found = {}
    for title, case in cases(name).items():
        head, written = case.split("\n    ")
        file, kind, outcome = re.split(" (->|!!) ", head.split(" | ", 1)[1], maxsplit=1)
        write = writers.get(Path(file).suffix[1:]) if written[0] == "[" else None
        plain = written.encode().decode("unicode_escape").encode("latin-1")
        content = write(json.loads(written)) if write else plain
        kept, _, left_out = outcome.partition(" -- ")
        pairs, _, rows = kept.partition(" @ ")
        notes = [note.rpartition(": ") for note in left_out.split(" | ")] if left_out else []
        dropped = [(int(row) if row else None, reason) for row, _, reason in notes]
        if kind == "!!":
            found[title] = File(file, content, refused=outcome)
        else:
            expected = GIVEN.get(pairs) or [tuple(pair) for pair in json.loads(pairs)]
            numbers = [*map(int, rows.split())] or None
            found[title] = File(file, content, expected, numbers, dropped, shape=shape)
    return found


def files(table: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", table.values(), ids=table)
