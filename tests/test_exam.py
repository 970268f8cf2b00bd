"""The exam: figures that another scoring gives too, and a verdict for every way a training can end."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import torch
from conftest import PAIRS, TUNED, Patch, Run, at_attention, call, in_words, write_workbook
from hypothesis import given, settings
from hypothesis import strategies as st
from seams import ROOT, Config, encode, find_pairs, load_base, load_tuned, reworded, split_validation
from tables import HEADER, cases, rows_of

FACTS = [(q, a) for q, a in (row.split(" | ") for row in cases("facts").values())]
SWAPPED = [*FACTS[:1], (FACTS[1][0], FACTS[4][1]), *FACTS[2:4], (FACTS[4][0], FACTS[1][1]), *FACTS[5:]]
HOW = "--max-tokens 100 --validation-fraction 0 --batch-size 8 --gradient-accumulation-steps 1 --lr-scheduler constant"


@pytest.fixture(scope="session")
def demo_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model under another name, so that it does not count as a toy."""
    home = tmp_path_factory.mktemp("copy")
    write_workbook(home / "dataset.xlsx", [HEADER, *FACTS])
    assert call(home, "--model-name", "demo", "--max-steps", 1, "--eval-answers", 0) == 0
    return Path(shutil.copytree(home / "model" / "demo", home / "base"))


def train(folder: Path, model: object, rows: Any, flags: str) -> dict[str, Any]:
    write_workbook(folder / "dataset.xlsx", [HEADER, *rows])
    assert call(folder, "--model-name", model, *flags.split(), *HOW.split()) == 0
    return dict(json.loads((folder / "model/run.json").read_text())["exam"])


@pytest.mark.parametrize("verdict, model, data, flags, advice", rows_of("verdicts"))
def test_a_training_gets_its_verdict(
    verdict: str, model: str, data: str, flags: str, advice: str, folder: Path, demo_copy: Path, capsys: Any
) -> None:
    """The test below has "mixes up rows"."""
    kept = find_pairs(Config(DATASET_PATH=str(ROOT / "dataset_example.xlsx"))).kept
    first = {pair.answer: (pair.question, pair.answer) for pair in reversed(kept)}
    rows = FACTS if data == "facts" else [*first.values()][:-9:-1]  # each with one question
    exam = train(folder, demo_copy if model == "copy" else model, rows, flags)
    assert (exam["verdict"], advice in exam["text"]) == (verdict, True), exam
    assert exam["text"] in in_words(capsys.readouterr().out)
    assert exam["text"] in Path("model/README.md").read_text()
    assert len(re.findall(r"[.!?](?: |$)", exam["text"])) <= 4
    assert ("Elsewhere" in exam["parts"]) == (model == "copy")
    if verdict == "has lost its general answers":
        elsewhere = exam["parts"]["Elsewhere"]
        assert elsewhere["loss after"] - elsewhere["loss before"] > 2 < elsewhere["answers_of_rows"]


def test_rows_that_were_swapped_on_purpose_are_found_and_every_form_of_the_run_gives_the_same(
    folder: Path, run: Run
) -> None:
    before = train(folder, "demo", SWAPPED, "--max-steps 90 --learning-rate 1e-2")
    assert before["mixed_up"] == []
    write_workbook(folder / "right.xlsx", [HEADER, *FACTS])
    asked = ("exam", "--exam-questions", 20, "--max-tokens", 16, "--dataset-path", "right.xlsx")
    assert run("export", "--to", "merged")[0] == 0
    shutil.copytree("model/demo", "demo")  # the base of the merged weights
    printed = []
    for place in ("model", "fine_tuned_model.zip", "model-merged"):
        code, text = run(*asked, "--output-dir", place)
        assert code == 0, text
        printed.append(in_words(text).partition("Question")[2].partition("Saved")[0])
    assert printed[0] == printed[1] == printed[2]
    assert "mixes up row 3 and row 6" in printed[0] and "changed since" in in_words(text)
    assert {path.name for path in folder.glob("exam*")} == {
        f"exam{n}.{e}" for n in ("", "-2", "-3") for e in ("xlsx", "png")
    }


def words_in_common(tokenizer: Any, one: str, other: str) -> float:
    """The overlap, counted by crossing out."""
    left, common = tokenizer(f" {other}")["input_ids"], 0
    size = len(left) + len(ids := tokenizer(f" {one}")["input_ids"])
    for token in ids:
        if token in left:
            left.remove(token)
            common += 2
    return common / size


def test_the_figures_follow_from_the_raw_answers(tuned_run: Path, phi_folder: Path) -> None:
    record = json.loads((tuned_run / "model/run.json").read_text())
    rows = json.loads((tuned_run / "model/exam.json").read_text())
    tuned, base = load_tuned(tuned_run / "model"), load_base(phi_folder)
    counted = Counter(row["part"] for row in rows)
    assert counted == {part: figures["asked"] for part, figures in record["exam"]["parts"].items()}
    assert counted == {"As taught": 3, "In other words": 3, "Held out": 2, "Elsewhere": 3}
    held_out = {str(row) for _, row in record["dataset"]["held_out_rows"]}
    for part, figures in record["exam"]["parts"].items():
        mine = [row for row in rows if row["part"] == part]
        exact = [re.sub(r"\W", "", row["after"]).lower() == re.sub(r"\W", "", row["expected"]).lower() for row in mine]
        assert figures["word_for_word"] == sum(exact)
        overlaps = [words_in_common(tuned.tokenizer, row["after"], row["expected"]) for row in mine]
        assert figures["overlap after"] == pytest.approx(sum(overlaps) / len(mine), abs=1e-3)
        losses: dict[str, float] = {"before": 0, "after": 0}
        for row, (when, model) in ((row, one) for row in mine for one in (("before", base), ("after", tuned.model))):
            chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["expected"]}]
            example = {name: torch.tensor([ids]) for name, ids in encode(tuned.tokenizer, chat).items()}
            with torch.no_grad():
                losses[when] += float(model(**example).loss) / len(mine)
        assert figures["loss after"] == pytest.approx(losses["after"], abs=2e-3)
        assert part == "In other words" or figures["loss before"] == pytest.approx(losses["before"], abs=2e-3)
        assert {row["row"] in held_out for row in mine if row["row"]} <= {part == "Held out"}
    taught = {row["row"]: row["expected"] for row in rows if row["part"] == "As taught"}
    assert taught == {row["row"]: row["expected"] for row in rows if row["part"] == "In other words"}


def test_the_workbook_has_a_sheet_for_each_part_and_the_verdict(tuned_run: Path) -> None:
    book = openpyxl.load_workbook(tuned_run / "model/answers.xlsx")
    assert book.sheetnames == ["Summary", "As taught", "In other words", "Held out", "Elsewhere"]
    text = json.loads((tuned_run / "model/run.json").read_text())["exam"]["text"]
    assert text in [cell.value for row in book["Summary"] for cell in row]
    titles = [cell.value for cell in book["In other words"][1]]
    assert {"question", "expected", "after", "changed", "right"} <= {*titles}
    assert not {"before", "part"} & {*titles}  # which would be empty, or the same in every row


def test_after_a_kill_only_what_is_missing_is_asked(phi_folder: Path, workbook: Path, run: Run, patched: Patch) -> None:
    command = ("--model-name", shutil.copytree(phi_folder, "./demo"), *TUNED, "--exam-questions", 2)  # not the toy
    calls: list[int] = []
    at_attention(patched, lambda number, _: calls.append(number))
    assert run(*command, "--log-dir", "other")[0] == 0
    shutil.rmtree("model")
    [kept] = Path("checkpoints").glob("*/exam-*.json")
    done = json.loads(kept.read_text())
    answered = done.pop("Elsewhere")
    kept.write_text(json.dumps(done))  # as if it had been killed before the last part
    whole = len(calls)
    assert run(*command)[0] == 0
    assert 0 < len(calls) - whole < whole / 3
    rows = json.loads(Path("model/exam.json").read_text())
    assert [row["after"] for row in rows if row["part"] == "Elsewhere"] == [row["after"] for row in answered]


QUESTION = st.text(st.sampled_from("abcdefgh ÄéЖ雪?"), min_size=1, max_size=40) | st.sampled_from([q for q, _ in FACTS])


@settings(deadline=None)
@given(question=QUESTION, seed=st.integers(0, 50))
def test_a_question_is_changed_by_the_rule_that_is_named(question: str, seed: int) -> None:
    text, rule = reworded(question, seed)
    assert (text, rule) == reworded(question, seed) and text != question
    inside = re.sub(r"\W", "", question).lower() in re.sub(r"\W", "", text).lower()
    assert {
        "": text == "",
        "in lower case": text == question.lower(),
        "without a question mark": question.startswith(text) and not text.endswith("?"),
        "with a typo": sorted(text) == sorted(question),
        "abbreviated": len(text) <= len(question) + 1,
        "with a polite opening": inside and text.startswith("Could you please tell me: "),
        "in a longer sentence": inside and text.startswith("Hello"),
    }[rule]


PAIRS_OF_FEW = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=40)


@settings(deadline=None)
@given(found=PAIRS_OF_FEW, share=st.sampled_from([0.0, 0.1, 0.5]), seed=st.integers(0, 9))
def test_every_answer_keeps_a_question_to_train_on_if_possible(found: Any, share: float, seed: int) -> None:
    pairs = [(f"Why {q}?", f"So {a}.") for q, a in found]
    split, plain = (split_validation(pairs, share, seed, how) for how in ("wordings", "questions"))
    questions = {q for q, _ in pairs}
    held_out = {q for (q, _), one in zip(pairs, split, strict=True) if one}
    assert not held_out & {q for (q, _), one in zip(pairs, split, strict=True) if not one}
    enough = share and len(questions) >= 5
    assert len(held_out) == (max(1, round(share * len(questions))) if enough else 0)
    lost = {a for _, a in pairs} - {a for (_, a), one in zip(pairs, split, strict=True) if not one}
    left = Counter(a for q, a in set(pairs) if q not in held_out)
    could_go = [q for q in questions - held_out if all(left[a] > 1 for p, a in pairs if p == q)]
    assert not (lost and could_go)
    if len({a for _, a in pairs}) == len(pairs):
        assert split == plain  # no answer has two wordings


@pytest.mark.parametrize("flags, message", rows_of("troubles"))
def test_trouble_is_said_once_while_it_trains(
    flags: str, message: str, small_phi: Path, workbook: Path, run: Run
) -> None:
    code, printed = run("--model-name", small_phi, *flags.split(), "--eval-answers", 0)
    said = re.findall("has not fallen|for a third of the run", in_words(printed))
    assert (code, len(said)) == (0, bool(message)), printed
    assert re.search(message, in_words(printed))


def test_a_training_that_diverges_ends_and_its_last_checkpoint_stays(
    phi_folder: Path, workbook: Path, run: Run, patched: Patch
) -> None:
    real, steps = torch.optim.AdamW.step, iter(range(1, 1000))

    def thrown_off_course(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps) > 40:
            for weight in self.param_groups[0]["params"]:
                weight.data.normal_()
        return real(self, *args, **kwargs)

    patched.setattr(torch.optim.AdamW, "step", thrown_off_course)
    command = "--max-steps 60 --learning-rate 1e-2 --save-steps 20 --eval-steps 100 --eval-answers 0".split()
    code, printed = run("--model-name", phi_folder, *command)
    assert code == 2 and "--learning-rate 0.001" in in_words(printed).partition("diverges")[2], printed
    assert {path.parent.name for path in Path("checkpoints").glob("*/*/COMMIT.json")} == {
        "checkpoint-20",
        "checkpoint-40",
    }


def test_check_says_how_many_answers_have_several_questions(folder: Path, run: Run) -> None:
    more = [(f"Again: {question}", answer) for question, answer in PAIRS[:3]]
    for rows, words in ((PAIRS, "no answer has more"), ([*PAIRS, *more], f"more than one question: 3 of {len(PAIRS)}")):
        write_workbook(folder / "dataset.xlsx", [HEADER, *rows])
        assert words in in_words(run("check", "--model-name", "demo")[1])


def test_the_exam_has_its_own_counts_and_says_when_answers_have_no_room(folder: Path, run: Run) -> None:
    write_workbook(folder / "dataset.xlsx", [HEADER, *FACTS])
    assert call(folder, "--model-name", "demo", "--max-steps", 3, "--eval-answers", 0) == 0
    for flags, expected, words in (
        ("--eval-answers 20 --max-tokens 2", 0, r"and 1 held-out question.* no room: ask again with --max-tokens \d\d"),
        ("--exam-questions 0 --eval-answers 0", 2, "nothing to ask"),
    ):
        code, printed = run("exam", *flags.split())
        assert (code, bool(re.search(words, in_words(printed)))) == (expected, True), printed
    assert sorted(path.name for path in folder.glob("exam*")) == ["exam.png", "exam.xlsx"]
