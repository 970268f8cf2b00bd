"""From rows to pairs: which columns ask and answer, in the schemas that people and data sets use."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import Run, in_words, write_workbook
from seams import UserError

# isort: off
from tables import ASKED, FORMATS, HEADER, QA2, TWO, File, assert_nothing_taught, cases, cases_of_files, check
from tables import csv_file, files, js, jsonl, read, refusal, texts

Sheet = Callable[..., Path]
Checked = Callable[..., tuple[int, str]]


def each_of(table: dict[str, str]) -> pytest.MarkDecorator:
    """Every case of a table of tests/cases."""
    return pytest.mark.parametrize("case", table.values(), ids=table)


# A name, a record and what comes of it, where that is not the pair of {q} and {a}: "->" and the texts of the
# conversation, "??" where the person may be asked instead, or "!!" and a pattern for the refusal. "!!" before the
# name: the refusal names all columns and the flag. {x} is an answer that must not be learnt, {p} a person, {n} a
# number, {l} a letter; SPOKEN has more.
QA = [
    ("How do I reset my password?", "Click on the link and follow the steps."),
    ("Opening hours on Sunday", "We open at ten and close at four."),
    ("Where is the office?", "It lies in Main Street, on the left."),
    ("Refunds after a month", "No, only within thirty days of purchase."),
]
BACK = [(f"Number {n} is off", f"Have you tried to turn number {n} on?") for n in range(4)]
PEOPLE = ("Ann Lee", "Bob Ray", "Cy Doe", "Di Fox")
NAMELESS = ("message_1", "anchor", "names nobody")  # there, what asks is the question


def chat(*turns: str, keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    """Turns as "user: Hi", in the form of OpenAI."""
    pieces = (turn.partition(":") for turn in turns)
    return [dict(zip(keys, (who, text.strip()), strict=True)) for who, _, text in pieces]


SPOKEN = {
    "{ask}": chat("user: {q}"),
    "{talk}": chat("user: {q}", "assistant: {a}"),
    "{bad talk}": chat("user: {q}", "assistant: {x}"),
    "{shared}": chat("human: {q}", "gpt: {a}", keys=("from", "value")),
}
SCHEMAS = cases("schemas")  # X10, X11


def filled(template: Any, n: int, pairs: Sequence[tuple[str, str]] = QA) -> Any:
    """A template with the texts of one pair in it."""
    if isinstance(template, dict):
        return {key: filled(value, n, pairs) for key, value in template.items()}
    if isinstance(template, list):
        return [filled(value, n, pairs) for value in template]
    if not isinstance(template, str):
        return template
    if template in SPOKEN:
        return filled(SPOKEN[template], n, pairs)
    q, a = pairs[n]
    known = {"q": q, "a": a, "x": f"Wrong: {a}", "n": str(n), "l": "ABCD"[n], "p": PEOPLE[n]}
    return re.sub(r"\{([qaxnlp])\}", lambda mark: known[mark[1]], template)


def schema(case: str) -> tuple[dict[str, Any], str, str]:
    """The record of a case, what kind of outcome it has, and which."""
    record, end = json.JSONDecoder().raw_decode(case, case.index(": {") + 2)
    outcome = case[end:].strip() or '-> ["{q}", "{a}"]'
    return record, outcome[:2], outcome[3:]


@each_of(SCHEMAS)
def test_a_schema_gives_its_pairs_in_any_order_of_columns(case: str, folder: Path) -> None:
    record, kind, outcome = schema(case)
    rows = [filled(record, n) for n in range(len(QA))]
    columns = list(reversed(record))
    cells = [["TRUE" if row[key] is True else row[key] for key in columns] for row in rows]
    cells = [[js(cell).decode() if isinstance(cell, list) else cell for cell in row] for row in cells]
    (folder / "data.jsonl").write_bytes(jsonl(*rows))
    (folder / "data.csv").write_bytes(csv_file([columns, *cells]))
    in_csv = not any(isinstance(cell, dict) for cell in record.values())  # an object in a cell is a text
    for name in ("data.jsonl", "data.csv")[: 1 + in_csv]:
        if kind == "!!":
            assert_nothing_taught(name, outcome, [*record])
            continue
        try:
            found = texts(read(name))
        except UserError as error:
            assert kind == "??", error
            assert ASKED in str(error)
        else:
            assert found == [tuple(filled(json.loads(outcome), n)) for n in range(len(QA))]


@each_of({name: case for name, case in SCHEMAS.items() if schema(case)[1] == "->" and not name.startswith(NAMELESS)})
def test_answers_that_ask_are_never_taken_for_questions(case: str, folder: Path) -> None:
    record, _, outcome = schema(case)
    (folder / "data.jsonl").write_bytes(jsonl(*(filled(record, n, BACK) for n in range(4))))
    try:
        found = texts(read("data.jsonl"))
    except UserError:
        return
    assert found == [tuple(filled(json.loads(outcome), n, BACK)) for n in range(4)]


@files(cases_of_files("files", shape=""))  # X11, X14
def test_a_file_gives_its_pairs(file: File, folder: Path) -> None:
    check(file, folder)


# What people call the two columns, and two rows in which nothing asks, so that only the names tell the columns apart.
@each_of(cases("languages"))
def test_the_columns_are_known_by_their_names_in_any_language(case: str, folder: Path) -> None:
    _, questions, answers, *rows = case.split(" | ")
    pairs = [tuple(row.split(" → ")) for row in rows]
    some = list(FORMATS)[len(case) % len(FORMATS)]  # each language in one more kind of file
    headers = zip(*(names.replace("\\n", "\n").split(", ") for names in (questions, answers)), strict=True)
    for i, header in enumerate(headers):
        for kind, step in (("csv", 1), ("csv", -1), *([(some, -1)] if i == 0 else [])):
            content = FORMATS[kind]([row[::step] for row in (header, *pairs)])
            (folder / f"faq.{kind}").write_bytes(content)
            assert texts(read(f"faq.{kind}")) == pairs, (header, kind)


# A name, the turns of one conversation or one cell as JSON, and what comes of it.
@each_of(cases("conversations"))
def test_conversations_stay_what_they_were(case: str, folder: Path) -> None:
    body, arrow, outcome = re.split(" (->|!!) ", case.split(" | ", 1)[1])
    is_text, shared = body[0] == '"', "human: " in body
    keys, user, bot = (("from", "value"), "human", "gpt") if shared else (("role", "content"), "user", "assistant")
    column = "text" if is_text else "conversations" if shared else "messages"
    talks: list[Any] = [chat(f"{user}: Good day?", f"{bot}: Good day.", keys=keys)]
    turns = [] if is_text else body.replace("\\n", "\n").split(" | ")
    written = [json.loads(turn) if turn[0] == "{" else chat(turn, keys=keys)[0] for turn in turns]
    talks.append(json.loads(body) if is_text else written)
    if is_text:
        talks[0] = "### Human: Good day?### Assistant: Good day."
    expected = [("Good day?", "Good day.")]
    if arrow == "->":
        expected.append(tuple(outcome.replace("\\n", "\n").split(" | ")))
    for kind, first in (("jsonl", 1), ("parquet" if is_text else "json", 1), ("csv", 2), ("xlsx", 2)):
        cells = talks if is_text or first == 1 else map(json.dumps, talks)
        (folder / f"a.{kind}").write_bytes(FORMATS[kind]([("id", column), *enumerate(cells)]))
        pairs = read(f"a.{kind}")
        assert (pairs.shape, texts(pairs)) == ("conversations", expected), kind
        assert [pair.row for pair in pairs.kept] == [first, first + 1][: len(expected)]
        assert [note.row for note in pairs.dropped] == [first + 1][len(expected) - 1 :]
        assert all(re.search(outcome, note.reason) for note in pairs.dropped)


def test_a_conversation_that_is_none_is_dropped(folder: Path) -> None:
    good = [{"messages": chat(f"user: Why {i}?", f"assistant: So {i}.")} for i in range(30)]
    empty: list[Any] = [{"messages": None}, {"messages": []}, {"id": 1}]
    odd: list[Any] = ["hello", 4, {}, [{}], [["user", "Hi"]], [{"role": "user"}]]
    (folder / "a.jsonl").write_bytes(jsonl(*empty, *good, *empty, *({"messages": one} for one in odd)))
    pairs = read("a.jsonl")
    assert texts(pairs) == [(f"Why {i}?", f"So {i}.") for i in range(30)]
    assert len(pairs.dropped) == 2 * len(empty) + len(odd)


def test_a_template_of_alpaca_does_not_lose_its_input(folder: Path) -> None:
    text = "Below is a task.\n\n### Instruction:\nAdd{}.\n\n### Input:\n2 and 2\n\n### Response:\n4"
    (folder / "a.jsonl").write_bytes(jsonl({"text": text.format("")}, {"text": text.format(" it")}))
    first, second = (" | ".join(pair) for pair in texts(read("a.jsonl")))
    assert re.fullmatch(r"Add\.\s[^4]*2 and 2 \| 4", first)
    assert re.fullmatch(r"Add it\.\s[^4]*2 and 2 \| 4", second)


BRANCHES = cases("trees")  # a tree, and what may stand beside it
FIELDS = ("message_id", "parent_id", "role", "lang", "rank", "deleted", "text")
VALUES = {"-": None, "p": "prompter", "a": "assistant", "kept": False, "deleted": True}


def messages(name: str) -> list[dict[str, Any]]:
    lines = [line.split(maxsplit=6) for line in BRANCHES[name].split("\n")[1:]]
    rows = [dict(zip(FIELDS, (VALUES.get(v, v) for v in line), strict=True)) for line in lines]
    return [{**row, "rank": row["rank"] and int(row["rank"])} for row in rows]


TREE = messages("the tree")
BEST, SECOND, THIRD = ("Why?", "So.", "How?", "Thus."), ("¿Por qué?", "Porque sí."), ("Why?", "Third best.")
ALL = {BEST, ("Why?", "So.", "How?", "Not ranked."), ("Why?", "Second best.", "Really?", "Really."), THIRD}


def nested(rows: list[dict[str, Any]], parent: str | None = None) -> list[dict[str, Any]]:
    """The messages below a parent, each with its replies in it."""
    return [{**row, "replies": nested(rows, row["message_id"])} for row in rows if row["parent_id"] == parent]


def one_a_row(rows: list[dict[str, Any]]) -> list[Any]:
    return [FIELDS, *(tuple(row.values()) for row in rows)]


def one_in_another(rows: list[dict[str, Any]]) -> list[Any]:
    return [("message_tree_id", "prompt"), *((one["message_id"], one) for one in nested(rows))]


WRITERS: list[tuple[str, Callable[..., Any], Callable[..., bytes]]] = [
    *((kind, one_a_row, FORMATS[kind]) for kind in ("jsonl", "json", "parquet", "csv", "xlsx")),
    *((kind, one_in_another, FORMATS[kind]) for kind in ("jsonl", "json", "parquet")),
    ("csv", one_a_row, lambda table: pandas.DataFrame(table[1:], columns=table[0]).to_csv(index=False).encode()),
]


@pytest.mark.parametrize("kind, table, write", WRITERS)
def test_a_tree_gives_the_conversations_that_are_wanted(
    kind: str, table: Callable[..., Any], write: Callable[..., bytes], folder: Path
) -> None:
    name = f"a.{kind}"
    for case in BRANCHES:
        (folder / name).write_bytes(write(table(TREE if case == "the tree" else [*TREE, *messages(case)])))
        pairs, expected = read(name), {BEST, SECOND} if case == "two trees" else {BEST}
        assert (pairs.shape, sorted(texts(pairs))) == ("message tree", sorted(expected)), case
    (folder / name).write_bytes(write(table([*TREE, *messages("another language")])))
    assert any(re.search(r"\bes\b", note.reason) for note in read(name).dropped)
    assert sorted(texts(read(name, CONVERSATION_PATHS="all"))) == sorted(ALL)
    assert sorted(texts(read(name, CONVERSATION_PATHS="all", LANGUAGE=""))) == sorted({*ALL, SECOND})
    assert texts(read(name, LANGUAGE="")) == [BEST, SECOND]
    assert texts(read(name, LANGUAGE="es")) == [SECOND]


def test_a_tree_may_be_shuffled_and_have_loose_ends(folder: Path) -> None:
    for seed in range(5):
        rows = [*TREE, *messages("loose ends")]
        random.Random(seed).shuffle(rows)
        (folder / "a.jsonl").write_bytes(jsonl(*rows))
        assert texts(read("a.jsonl")) == [BEST]


@pytest.mark.parametrize("odd", [["ODD"], {"text": "ODD"}, [{"ODD": 1}]], ids=str)
def test_a_message_that_is_no_text_is_not_printed_into_one(odd: object, folder: Path) -> None:
    tree = [*TREE[:2], {**TREE[2], "text": odd}, *TREE[3:]]
    for table in (one_a_row(tree), one_in_another(tree)):
        (folder / "a.json").write_bytes(FORMATS["json"](table))
        assert "ODD" not in str(texts(read("a.json")))


@pytest.fixture
def sheet(folder: Path) -> Sheet:
    """Write a workbook from rows."""
    return lambda *rows, **more: write_workbook(folder / "dataset.xlsx", rows, **more)


# The header of a third column and its cells; after "|" whether even an unknown name wins over it.
@pytest.mark.parametrize("decoy", cases("decoys").values())  # X10
def test_a_column_beside_the_two_is_not_mistaken_for_one(decoy: str, sheet: Sheet) -> None:
    header, _, content = decoy.partition(" |")[0].partition(":")
    cells = [int(one) if one.strip().isdigit() else one.strip() for one in content.split(",")]
    rows = [(extra, f"Tell {i}", f"Told {i}") for i, extra in enumerate(cells)]
    for name in ("question", "Theirs")[: 1 + ("unknown" in decoy)]:
        assert texts(read(sheet((header, name, "answer"), *rows))) == [row[1:] for row in rows]


SHEETS: dict[str, list[Any]] = {name: json.loads(case.split(": ", 1)[1]) for name, case in cases("sheets").items()}
SHEETS["60 columns"] = [[f"x{i}" for i in range(60)], *([f"{i} {j}" for i in range(60)] for j in "ab")]


@each_of(cases("columns"))
def test_the_columns_that_are_named_are_taken_or_asked_for(case: str, sheet: Sheet) -> None:
    named, kind, outcome = re.split(" (->|!!) ", case)
    _, name, question, answer = named.split(" | ")
    path, columns = sheet(*SHEETS[name]), {"QUESTION_COLUMN": question, "ANSWER_COLUMN": answer}
    if kind == "!!":
        message = refusal(path, **columns)
        assert all(part in message for part in outcome.split(" | "))
        assert "Promt" not in message or message.count("Prompt") == 2  # once as what was perhaps meant
        return
    found, above = texts(read(path, **columns)), [len(row) > 1 for row in SHEETS[name]].index(True)
    assert [*found[0], *found[-1]] == outcome.split(" | ")
    assert len(found) == len(SHEETS[name]) - above - 1


@each_of(cases("own_words"))
def test_headers_in_own_words_are_taken_or_named_with_the_flag(case: str, sheet: Sheet) -> None:
    rows = json.loads(case.split(": ", 1)[1])
    path, (header, *pairs) = sheet(*rows), [row[-2:] for row in rows if len(row) > 1]
    try:
        assert texts(read(path)) == [*map(tuple, pairs)]
    except UserError as error:
        assert f'{ASKED} "{header[0]}"' in in_words(str(error))
        assert f'--answer-column "{header[1]}"' in in_words(str(error))


LOG = [(f"person {i}", f"changed cell {i}") for i in range(9)]
OTHER_SHEETS = {  # what stands on the first sheet, and on the next ones
    "a cover": ([("Read me first",), ("and then go on",)], [("id", "price"), (1, 2)], QA2),
    "who and what": (QA2, [("Who", "What"), *LOG]),
    "who changed it": (QA2, [("Question", "Who changed it"), *LOG]),
    "titles and bodies": (QA2, [("Title", "Body"), *LOG]),
}


def numbered(start: int, count: int) -> list[tuple[str, str]]:
    return [(f"Tell me of {i}", f"It is number {i}") for i in range(start, start + count)]


def test_of_several_sheets_with_the_same_pairs_each_is_taught_once(checked: Checked) -> None:
    _, said = checked(HEADER, *TWO, Copy=QA2, Old=[HEADER, TWO[0]], Empty=[])
    assert texts(read("dataset.xlsx")) == TWO
    assert re.search("Copy[^~]*Old", said)


@pytest.mark.parametrize("sheets", OTHER_SHEETS.values(), ids=OTHER_SHEETS)  # X14
def test_a_sheet_of_something_else_is_no_hindrance(sheets: Sequence[Any], sheet: Sheet) -> None:
    path = sheet(*sheets[0], **{f"More{i}": rows for i, rows in enumerate(sheets[1:])})
    assert texts(read(path)) == TWO
    assert texts(read(path, QUESTION_COLUMN="question", ANSWER_COLUMN="answer")) == TWO


def test_sheets_of_questions_and_answers_add_up(sheet: Sheet) -> None:
    parts = {"Sheet": (0, 5), "Orders": (100, 40), "Returns": (200, 12), "Other": (300, 9)}
    rows = {name: [HEADER, *numbered(*part)] for name, part in parts.items()}
    rows["Returns"] = [("Note", "ANSWER", " Question"), *(("new", *row[::-1]) for row in numbered(200, 12))]
    odd = {"Old": [("Question", "Answer", "By"), *numbered(400, 3)], "Log": [("Tell", "Told"), *numbered(500, 99)]}
    pairs = read(sheet(*rows.pop("Sheet"), **rows, **odd))
    assert len(pairs.kept) == 69
    for name, (start, count) in (parts | {"Old": (400, 3)}).items():
        found = [(pair.row, pair.question) for pair in pairs.kept if name in pair.sheet]
        assert found == [(i + 2, f"Tell me of {start + i}") for i in range(count)]


EXAMPLE = {"Example": [HEADER, *numbered(0, 2)], "Tickets": [("Customer question", "Reply text"), *numbered(100, 50)]}


@pytest.mark.parametrize("header", [EXAMPLE["Tickets"][0], ("Customer asks", "We say")])
def test_a_large_sheet_is_not_passed_over_for_an_example(header: tuple[str, str], sheet: Sheet) -> None:
    path = sheet(**EXAMPLE | {"Tickets": [header, *EXAMPLE["Tickets"][1:]]})
    try:
        assert len(read(path).kept) >= 50
    except UserError as error:
        assert all(name in str(error) for name in ("Example", "Tickets", "--sheet"))


def test_the_person_can_choose_the_sheet(sheet: Sheet, run: Run, small_phi: Path) -> None:
    sheet(**EXAMPLE)
    for name, count in (("Example", 2), ("Tickets", 50)):
        code, said = run("check", "--json", "--model-name", small_phi, "--sheet", name)
        assert code == 0
        assert json.loads(said.splitlines()[0])["pairs_kept"] == count
        assert len(read("dataset.xlsx", SHEET=name).kept) == count
    assert re.search("Example.*Tickets", refusal("dataset.xlsx", SHEET="Ticket"))


@pytest.fixture
def checked(sheet: Sheet, run: Run, small_phi: Path) -> Checked:
    """What `check` says of a workbook of such rows."""
    return lambda *rows, **more: run("check", "--dataset-path", sheet(*rows, **more), "--model-name", small_phi)


def test_what_is_said_names_columns_rows_and_reasons(checked: Checked) -> None:
    first = [(), (), (*HEADER, "remark"), ("Why?", "So.", "first"), (), ("Why?", "So.", "again"), (" ＷHY? ", "so.")]
    others = [("How?", ""), ("", "Thus."), ("Why?", "For another reason."), ("Two\nlines?", "Yes")]  # from row 8 on
    code, said = checked(*first, *others, *[("Open?", "")] * 11)
    assert code == 1 and re.search("quality.* 0.05.*--yes", in_words(said))
    for pattern in cases("said_of_rows").values():
        assert re.search(pattern, in_words(said)), pattern
    for extra in ("Input text", "passage"):  # columns that are not used
        rows = [("Translate.", f"word {i}", f"Wort {i}") for i in range(5)]
        said = in_words(checked(("instruction", extra, "output", None), *rows)[1])
        assert re.search(f'"instruction" .by its name.*"output" .by its name.*not used.*"{extra}"', said)
    columns = ("question", "answer", "solution"), *((f"Why {i}?", f"As {i}.", f"So {i}.") for i in range(5))
    assert re.search('next best: "question" with "solution"', in_words(checked(*columns)[1]))


def test_a_first_row_that_may_be_a_pair_is_shown(checked: Checked) -> None:
    _, said = checked(("Capital of France", "Paris on the Seine"), *numbered(3, 60))
    assert re.search(r"^Header +Capital of France \| Paris on the Seine", said, re.MULTILINE)


@pytest.mark.parametrize("count", [1, 2, 49, 50])  # M9
def test_few_pairs_bring_a_warning_and_one_is_refused(count: int, checked: Checked, run: Run, small_phi: Path) -> None:
    rows = numbered(1000, count)
    code, said = checked(HEADER, *rows, rows[0], ("How?", ""))
    assert code == (count == 1)
    assert bool(re.search(rf"(?i)warning.*\b{count}\b", said)) == (1 < count < 50)
    assert ("\nWarning" in said) == (count < 50)
    if count == 1:
        code, said = run("train", "--model-name", small_phi)
        assert code == 2 and re.search(r"\b1 pair.*\b2\b", in_words(said))
