"""Answers: the model's own greedy continuation, however many are asked at once, before and after."""

import itertools
import json
import shutil
import signal
import threading
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import torch
from conftest import PAIRS, Patch, Run, at_attention, in_words, write_workbook
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seams import IGNORE, ask, encode, load_base, load_tuned, overlap, prompt_of, stream_answer
from tables import HEADER, csv_file

WHY = [{"role": "user", "content": "Why?"}]
SO = [*WHY, {"role": "assistant", "content": "So."}]
QUESTIONS = [question * (i % 4 + 1) for i, (question, _) in enumerate(PAIRS[:10])]
LIMIT = 2048 - 256  # what the model reads, without the room for an answer


@pytest.fixture
def tuned(tuned_run: Path) -> Any:
    """A finished run whose adapter does a great deal, so that its answers differ."""
    torch.manual_seed(1)
    opened = load_tuned(tuned_run / "model")
    for name, parameter in opened.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    return opened


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens, by a loop without a cache."""
    said: list[int] = []
    for _ in range(count):
        said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return said


def test_an_answer_is_what_generate_and_a_plain_loop_say_however_many_are_asked_at_once(tuned: Any) -> None:
    together = ask(tuned, *QUESTIONS, MAX_TOKENS=12)
    assert together == [ask(tuned, one, MAX_TOKENS=12)[0] for one in QUESTIONS]
    assert len({answer.text for answer in together}) > 1
    ids = tuned.tokenizer(f"Instruct: {PAIRS[0][0]}\nOutput:")["input_ids"]
    [answer] = ask(tuned, PAIRS[0][0], MAX_TOKENS=6)
    whole = tuned.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    for said in (greedy(tuned.model, ids, 6), whole[0, len(ids) :].tolist()):
        assert (answer.text, answer.tokens, answer.stopped) == (tuned.tokenizer.decode(said).strip(), 6, False)


def test_the_base_models_generation_config_does_not_count(tuned_run: Path, phi_folder: Path, tmp_path: Path) -> None:
    """Such as several beams, or an end for each new line; the base is taken from the run's folder."""
    expected = ask(load_tuned(tuned_run / "model"), "Why?", MAX_TOKENS=8)
    model = shutil.copytree(tuned_run / "model", tmp_path / "model")
    base = shutil.copytree(phi_folder, model / phi_folder.name)
    odd = {"num_beams": 3, "no_repeat_ngram_size": 1, "stop_strings": ["e"], "min_new_tokens": 9}
    odd |= {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0}
    (base / "generation_config.json").write_text(json.dumps(odd))
    (model / "base_model_folder.txt").unlink()
    assert ask(load_tuned(model), "Why?", MAX_TOKENS=8) == expected


def test_odd_questions_do_no_harm_and_no_answer_goes_beyond_what_the_model_can_read(tuned: Any) -> None:
    assert ask(tuned, "caf\udce9?", MAX_TOKENS=2)  # no text, as in a badly read file name
    assert prompt_of(tuned, [{"role": "user", "content": "Why? " * 100}], MAX_TOKENS=100_000)
    tuned.model.config.max_position_embeddings = 40
    assert ask(tuned, "Why?", MAX_TOKENS=5000)[0].tokens == 40 - len(prompt_of(tuned, WHY, MAX_TOKENS=5000))


@pytest.mark.gpu
def test_sixteen_bits_answer_as_float32_does(tuned: Any) -> None:
    plain = ask(tuned, "Why?", MAX_TOKENS=4)
    tuned.model.to("cuda", torch.float16)
    assert ask(tuned, "Why?", MAX_TOKENS=4) == plain


def test_no_token_is_computed_twice_and_the_mode_of_the_model_stays(tuned: Any) -> None:
    lengths = []
    tuned.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: lengths.append(ids[0].shape[1]))
    tuned.model.config.use_cache = False  # as the Trainer leaves it
    for training in (True, False):
        tuned.model.train(training)
        ask(tuned, "Why?", MAX_TOKENS=5)
        assert tuned.model.training == training
    assert lengths == 2 * [len(prompt_of(tuned, WHY)), 1, 1, 1, 1]


def test_sampling_is_decided_by_the_seed(tuned: Any) -> None:
    def said(**how: Any) -> str:
        return str(ask(tuned, "Why?", MAX_TOKENS=20, **how)[0].text)

    state = torch.get_rng_state()
    texts = [said(TEMPERATURE=1.0, SEED=seed) for seed in (1, 1, 0, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert torch.equal(torch.get_rng_state(), state)
    assert said() == said(TEMPERATURE=1e-6) == said(TEMPERATURE=1.0, TOP_P=1e-6)


def test_an_end_is_said_and_the_repetition_penalty_is_for_the_answer_alone(tuned: Any) -> None:
    """Not for the padding and the ends of earlier turns, which are ends of text, too."""
    plain, seldom = (
        len(set(tuned.tokenizer(ask(tuned, "Why?", MAX_TOKENS=40, REPETITION_PENALTY=penalty)[0].text)["input_ids"]))
        for penalty in (1.0, 3.0)
    )
    assert seldom > plain
    long, how = ["Why?", "Why?" * 9, "Why?" * 30], {"MAX_TOKENS": 12, "REPETITION_PENALTY": 1.5}
    bias, end = tuned.model.get_output_embeddings().bias.data, tuned.tokenizer.eos_token_id
    bias[end] = 2.0  # how likely it is that the answer ends
    assert ask(tuned, *long, **how) == [ask(tuned, one, **how)[0] for one in long]
    bias[end] = 1000.0
    [answer] = ask(tuned, "Why?")
    assert (answer.text, answer.tokens, answer.stopped) == ("", 0, True)


def test_where_memory_is_short_smaller_groups_are_asked(tuned: Any, patched: Patch) -> None:
    expected, sizes = ask(tuned, *QUESTIONS[:5], MAX_TOKENS=3), set()

    def short(_: int, query: torch.Tensor) -> None:  # M4
        sizes.add(len(query))
        if len(query) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    at_attention(patched, short)
    assert ask(tuned, *QUESTIONS[:5], MAX_TOKENS=3) == expected
    assert sizes >= {5, 2, 1}


def test_instructions_go_where_a_training_puts_them_and_of_a_long_chat_the_latest_turns_are_read(tuned: Any) -> None:
    asked = prompt_of(tuned, WHY, SYSTEM="Be brief.")
    taught = encode(tuned.tokenizer, [{"role": "user", "content": "Be brief.\n\nWhy?"}, SO[1]])
    assert asked == taught["input_ids"][: len(asked)]
    assert taught["labels"][len(asked) - 1] == IGNORE != taught["labels"][len(asked)]
    for length, least in ((50, LIMIT - 200), (1, 0)):  # many short turns are not all read
        turns = [{"role": "user", "content": "Why? " * length}, SO[1]] * 100
        ids = prompt_of(tuned, [*turns, {"role": "user", "content": "And then?"}], SYSTEM="Be brief.")
        assert least < len(ids) <= LIMIT
        assert tuned.tokenizer.decode(ids).startswith("Instruct: Be brief.\n\nWhy?")
        assert tuned.tokenizer.decode(ids).endswith("Instruct: And then?\nOutput:")


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(roles=st.lists(st.sampled_from(["user", "assistant"]), max_size=12), length=st.integers(1, 300))
def test_a_prompt_never_begins_with_an_answer(tuned: Any, roles: list[str], length: int) -> None:
    ids = prompt_of(tuned, [*({"role": role, "content": "so " * length} for role in roles), *WHY])
    assert tuned.tokenizer.decode(ids).startswith("Instruct: ")
    assert tuned.tokenizer.decode(ids).endswith("Instruct: Why?\nOutput:")
    assert len(ids) <= LIMIT


def test_an_answer_grows_to_what_it_is_ends_when_nobody_wants_it_and_raises_what_fails(
    tuned: Any, patched: Patch
) -> None:
    parts = list(stream_answer(tuned, WHY, MAX_TOKENS=30))
    assert parts[-1] == ask(tuned, "Why?", MAX_TOKENS=30)[0]
    assert [part.tokens for part in parts][-30:] in ([*range(2, 31), 30], [*range(1, 31)])
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(parts))
    threads, start = threading.active_count(), time.monotonic()
    growing: Any = stream_answer(tuned, WHY, MAX_TOKENS=1500)
    next(growing)
    growing.close()
    assert time.monotonic() - start < 5
    assert threading.active_count() == threads
    patched.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream_answer(tuned, WHY))


def test_characters_of_several_tokens_come_whole(tuned: Any) -> None:
    """Each byte of these is a token of its own here."""
    ids = tuned.tokenizer(" 雪が好き 🙂")["input_ids"]
    assert any(tuned.tokenizer.decode(ids[:end]).endswith("\ufffd") for end in range(len(ids)))
    left = iter([*ids, tuned.tokenizer.eos_token_id])

    def say_this(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * 0 + 100 * torch.nn.functional.one_hot(torch.tensor(next(left)), logits.shape[-1])

    tuned.model.get_output_embeddings().register_forward_hook(say_this)
    parts = list(stream_answer(tuned, WHY))
    assert not any("\ufffd" in part.text for part in parts)
    assert parts[-1].text == "雪が好き 🙂"


def sheet_of(path: str, name: str = "Answers") -> list[list[object]]:
    return [[cell.value for cell in row] for row in openpyxl.load_workbook(path)[name]]


def compared(run: Run, rows: list[tuple[str, ...]], *flags: object) -> tuple[list[dict[str, Any]], str]:
    Path("ask.csv").write_bytes(csv_file([HEADER, *rows]))
    code, printed = run("compare", "--questions", "ask.csv", *flags)
    assert code == 0, printed
    header, *found = sheet_of("compare.xlsx")
    return [dict(zip(map(str, header), row, strict=True)) for row in found], printed


def test_before_is_the_base_and_after_the_tuned_model(finished: Path, phi_folder: Path, run: Run) -> None:
    rows = [*PAIRS[:3], ("Why?", ""), ("Why? " * 2000, "So.")]
    found, printed = compared(run, rows, "--max-tokens", 4, "--system", "Be brief.")
    assert [one["question"] for one in found] == [question for question, _ in rows[:4]]
    assert "row 6" in printed  # too long, and said
    tuned = load_tuned(finished / "model")
    models = {"before": load_base(phi_folder), "after": tuned.model}
    for (one, (question, answer)), when in itertools.product(zip(found[:3], PAIRS[:3], strict=True), models):
        asked = [{"role": "user", "content": f"Be brief.\n\n{question}"}]
        said = itertools.takewhile(bool, greedy(models[when], prompt_of(tuned, asked), 4))  # 0 is the end
        assert one[when] == tuned.tokenizer.decode([*said]).strip()
        example = encode(tuned.tokenizer, [*asked, {"role": "assistant", "content": answer}])
        with torch.no_grad():
            row = {key: torch.tensor([example[key]]) for key in ("input_ids", "labels")}
            assert one[f"loss {when}"] == pytest.approx(float(models[when](**row).loss), abs=1e-3)
        assert one[f"overlap {when}"] == pytest.approx(overlap(tuned.tokenizer, one[when], answer), abs=1e-3)
    assert found[0]["loss after"] < found[0]["loss before"]
    nothing = {name: found[3][name] for name in found[3] if name[:4] in ("loss", "over")}
    assert set(nothing.values()) == {None}  # no answer is expected, so nothing is measured


def test_ctrl_c_keeps_the_answers_that_are_there(finished: Path, run: Run, patched: Patch) -> None:
    calls: list[int] = []
    at_attention(patched, lambda number, _: calls.append(number))
    assert len(compared(run, [(f"Why {i}?", "So.") for i in range(20)])[0]) == 20
    for share, code, least in ((0.8, 0, 8), (0.02, 130, 0)):
        patched.undo()
        end = int(share * len(calls))
        at_attention(patched, lambda number, _, end=end: number == end and signal.raise_signal(signal.SIGINT))
        Path("compare.xlsx").unlink()
        assert run("compare", "--questions", "ask.csv")[0] == code
        assert code or least <= len(sheet_of("compare.xlsx")) - 1 < 20


def test_a_loss_that_is_no_number_is_not_shown(finished: Path, run: Run, again: Run, patched: Patch) -> None:
    real = torch.nn.functional.cross_entropy
    patched.setattr(torch.nn.functional, "cross_entropy", lambda *a, **k: real(*a, **k) * float("inf"))
    assert compared(run, PAIRS[:1])[0][0]["loss after"] is None
    assert again("--exam-questions", 2)[0] == 0
    for name in ("run", "exam"):
        json.loads(Path(f"model/{name}.json").read_text(), parse_constant=pytest.fail)


TEXTS = st.text("abc éß雪🙂\n", max_size=20)


@settings(max_examples=60, deadline=None)
@given(one=TEXTS, other=TEXTS.filter(str.strip))
def test_overlap_is_a_share_of_common_tokens(tokenizer: Any, one: str, other: str) -> None:
    share = partial(overlap, tokenizer)
    assert 0 <= share(one, other) <= 1 == share(other, other)
    assert not one or share(other, one) == share(one, other)
    assert 0.5 < share("2 plus 3", "2 plus 3 is 5.") < 1
    assert (share("zzz", "2 plus 3 is 5."), share("anything", "")) == (0, None)


def test_questions_that_fail_never_cost_the_adapter(small_phi: Path, workbook: Path, run: Run, patched: Patch) -> None:
    """The same command asks later what was not asked, and nothing twice."""
    command = ("--model-name", small_phi, "--max-steps", 1)

    def fail(*_: object) -> None:
        if Path("fine_tuned_model.zip").exists():  # the adapter is saved already
            raise RuntimeError("CUDA out of memory")

    at_attention(patched, fail)
    code, printed = run(*command)
    assert (code, "answers.xlsx" in in_words(printed)) == (0, True)
    assert not Path("model/answers.xlsx").exists()
    patched.undo()
    assert run(*command)[0] == 0
    first = sheet_of("model/answers.xlsx", "Held out")
    assert not Path("model.previous").exists()
    at_attention(patched, lambda *_: pytest.fail("asked again"))  # nor trained
    zips: list[object] = []
    patched.setattr(zipfile.ZipFile, "testzip", lambda archive: zips.append(archive.filename))
    assert (run(*command)[0], len(zips)) == (0, 1)
    assert sheet_of("model/answers.xlsx", "Held out") == first


def test_questions_without_room_for_an_answer_cost_only_answers(small_phi: Path, folder: Path, run: Run) -> None:
    write_workbook(folder / "dataset.xlsx", [HEADER, *((f"{'Why? ' * 450}{i}?", "So.") for i in range(6))])
    flags = "--max-steps 1 --max-length 2000 --max-tokens 1500 --yes".split()
    for note in ("Left out", "finished"):
        code, printed = run("--model-name", small_phi, *flags)
        assert code == 0 and note in printed and "Next" in printed, printed


def test_nothing_is_called_held_out_when_nothing_was(small_phi: Path, workbook: Path, run: Run) -> None:
    printed = run("--model-name", small_phi, "--max-steps", 1, "--validation-fraction", 0)[1]
    card = Path("model/README.md").read_text()
    assert "held-out answers" not in card + printed
    assert "held-out questions" not in card
    assert "What is overfitting?" not in card  # the question that the card asks is one of the data's


def test_a_row_is_named_with_its_sheet(small_phi: Path, folder: Path, run: Run) -> None:
    write_workbook(folder / "dataset.xlsx", [HEADER, *PAIRS[:12]], Prices=[HEADER, *PAIRS[12:]])
    assert run("--model-name", small_phi, "--max-steps", 1)[0] == 0
    cells = str(sheet_of("model/answers.xlsx", "Held out"))
    assert "Prices" in cells or "Sheet" in cells


def test_the_colours_of_the_answers_have_a_fixed_scale(tuned_run: Path) -> None:
    sheet = openpyxl.load_workbook(tuned_run / "model/answers.xlsx")["Held out"]
    rules = [rule for area in sheet.conditional_formatting for rule in area.rules]
    scales = [[(one.type, one.val) for one in rule.colorScale.cfvo] for rule in rules if rule.colorScale]
    assert any(ends[0] == ("num", 0) and ends[-1] == ("num", 1) for ends in scales)
