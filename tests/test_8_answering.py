"""Section 8: answers end where they end, and asking many at once changes none of them."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import END, PAIRS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finetune_colab as ft

CPU = ft.Device("cpu", "float32", False, "")


@pytest.fixture
def tuned(phi_folder: Path) -> ft.Tuned:
    """A Phi with an adapter that does something, and talks without end."""
    cfg = ft.Config(MODEL_NAME=str(phi_folder))
    torch.manual_seed(1)
    model = ft.add_lora(cfg, ft.load_base(cfg, CPU)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return ft.Tuned(model, ft.load_tokenizer(cfg))


def ask(tuned: ft.Tuned, *questions: str, **settings: Any) -> list[ft.Answer]:
    cfg = ft.Config(**settings)
    prompts = [ft.prompt_of(tuned, [ft.asked_by_user(question)], cfg) for question in questions]
    return ft.answers(tuned.model, tuned.tokenizer, prompts, cfg)


def by_hand(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens, by a loop of our own without a cache."""
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


# -- The one place that generates


def test_many_questions_at_once_get_the_same_answers(tuned: ft.Tuned) -> None:
    """Of several lengths, more than go through at once, token for token."""
    questions = [question * (i % 4 + 1) for i, (question, _) in enumerate(PAIRS[:10])]
    together = ask(tuned, *questions, MAX_TOKENS=12)
    assert together == [ask(tuned, one, MAX_TOKENS=12)[0] for one in questions]
    assert len({len(tuned.tokenizer(q)["input_ids"]) for q in questions}) > 2
    assert len(questions) > ft.ANSWERS_AT_ONCE
    assert len({answer.text for answer in together}) > 2


def test_an_answer_is_the_greedy_continuation_of_the_prompt(tuned: ft.Tuned) -> None:
    ids = tuned.tokenizer("Instruct: What is 2 plus 3?\nOutput:")["input_ids"]
    [answer] = ask(tuned, "What is 2 plus 3?", MAX_TOKENS=6)
    assert answer.text == tuned.tokenizer.decode(by_hand(tuned.model, ids, 6)).strip()
    assert answer.tokens == 6
    assert not answer.stopped


def test_the_settings_of_the_model_itself_do_not_count(tuned: ft.Tuned) -> None:
    plain = ask(tuned, "Why?", MAX_TOKENS=8)
    own = tuned.model.base_model.model.generation_config
    assert own.eos_token_id is None
    own.update(do_sample=True, temperature=9.0, top_k=2, repetition_penalty=5.0, use_cache=False)
    assert ask(tuned, "Why?", MAX_TOKENS=8)[0].text == plain[0].text


def test_what_a_base_says_of_its_own_answers_is_left_aside(
    phi_folder: Path, tmp_path: Path
) -> None:
    """Such as several beams, or an end of text for each new line."""
    import shutil

    copy = tmp_path / "phi"
    shutil.copytree(phi_folder, copy)
    odd = {"num_beams": 3, "no_repeat_ngram_size": 1, "stop_strings": ["e"], "min_new_tokens": 9}
    (copy / "generation_config.json").write_text(json.dumps(odd))
    told = []
    for folder in (phi_folder, copy):
        cfg = ft.Config(MODEL_NAME=str(folder))
        alone = ft.Tuned(ft.load_base(cfg, CPU).eval(), ft.load_tokenizer(cfg))
        told.append(ask(alone, "Why?", MAX_TOKENS=8))
    assert told[0] == told[1]


def test_no_answer_goes_beyond_what_the_model_can_read(tuned: ft.Tuned) -> None:
    cfg = ft.Config(MAX_TOKENS=5000)
    tuned.model.config.max_position_embeddings = 40
    prompt = ft.prompt_of(tuned, [ft.asked_by_user("Why?")], cfg)
    [answer] = ft.answers(tuned.model, tuned.tokenizer, [prompt], cfg)
    assert answer.tokens == 40 - len(prompt)


@pytest.mark.gpu
def test_sixteen_bits_answer_as_they_were_taught(phi_folder: Path) -> None:
    """With the stream between the blocks in float32, and the answers of float32."""
    told, seen = [], []
    for dtype in ("float32", "float16"):
        device = ft.Device("cuda", dtype, False, "")
        cfg = ft.Config(MODEL_NAME=str(phi_folder))
        model = ft.add_lora(cfg, ft.load_base(cfg, device)).eval()
        block = model.get_base_model().model.layers[0]
        block.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        told.append(ask(ft.Tuned(model, ft.load_tokenizer(cfg)), "Why?", MAX_TOKENS=4))
    assert set(seen) == {torch.float32}
    assert told[0] == told[1]


def test_no_token_is_computed_twice(tuned: ft.Tuned) -> None:
    lengths = []
    tuned.model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: lengths.append(ids[0].shape[1])
    )
    tuned.model.config.use_cache = False  # as the Trainer leaves it
    prompt = ft.prompt_of(tuned, [ft.asked_by_user("Why?")], ft.Config())
    ask(tuned, "Why?", MAX_TOKENS=5)
    assert lengths == [len(prompt), 1, 1, 1, 1]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_as_it_was(tuned: ft.Tuned, training: bool) -> None:
    tuned.model.train(training)
    ask(tuned, "Why?", MAX_TOKENS=1)
    assert tuned.model.training == training


def test_an_answer_that_ends_by_itself_says_so(tuned: ft.Tuned) -> None:
    with torch.no_grad():
        tuned.model.get_output_embeddings().bias[tuned.tokenizer.eos_token_id] = 1000.0
    [answer] = ask(tuned, "Why?")
    assert answer == ft.Answer("", 0, stopped=True)
    assert END not in answer.text


def test_chance_is_the_seeds(tuned: ft.Tuned) -> None:
    def told(seed: int) -> str:
        return ask(tuned, "Why?", MAX_TOKENS=20, TEMPERATURE=1.0, SEED=seed)[0].text

    state = torch.get_rng_state()
    assert told(1) == told(1)
    assert len({told(seed) for seed in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), state)
    certain = ask(tuned, "Why?", MAX_TOKENS=20, TEMPERATURE=0.001)
    assert certain == ask(tuned, "Why?", MAX_TOKENS=20)


def test_repetition_can_be_made_less_likely(tuned: ft.Tuned) -> None:
    ids = [ft.prompt_of(tuned, [ft.asked_by_user("Why?")], ft.Config())]
    often, seldom = (
        ft.generate(tuned.model, tuned.tokenizer, ids, ft.Config(MAX_TOKENS=40, **how))[0]
        for how in ({}, {"REPETITION_PENALTY": 3.0})
    )
    assert len(set(seldom)) > len(set(often))


def test_the_penalty_is_for_the_answer_alone(tuned: ft.Tuned) -> None:
    """Not for the padding and the ends of earlier turns, which are ends of text, too."""
    talk = [ft.asked_by_user("Why?"), {"role": "assistant", "content": "So."}]
    cfg = ft.Config(MAX_TOKENS=12, REPETITION_PENALTY=1.5)
    prompts = [ft.prompt_of(tuned, [*talk, ft.asked_by_user("Why?" * n)], cfg) for n in (1, 9, 30)]
    with torch.no_grad():
        tuned.model.get_output_embeddings().bias[tuned.tokenizer.eos_token_id] = 2.0
    together = ft.answers(tuned.model, tuned.tokenizer, prompts, cfg)
    alone = [ft.answers(tuned.model, tuned.tokenizer, [prompt], cfg)[0] for prompt in prompts]
    assert together == alone


def test_too_many_at_once_are_asked_in_smaller_groups(
    tuned: ft.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, real = [], ft.generate

    def generate(model: Any, tokenizer: Any, prompts: Any, *others: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, tokenizer, prompts, *others)

    questions = [question for question, _ in PAIRS[:5]]
    expected = ask(tuned, *questions, MAX_TOKENS=3)
    monkeypatch.setattr(ft, "generate", generate)
    assert ask(tuned, *questions, MAX_TOKENS=3) == expected
    assert sizes == [5, 4, 2, 2, 1]


# -- What is asked


def test_instructions_go_where_a_training_puts_them(tuned: ft.Tuned) -> None:
    """Before the first question, as in data that has them."""
    asked = ft.prompt_of(tuned, [ft.asked_by_user("Why?")], ft.Config(SYSTEM="Be brief."))
    turns = [("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]
    taught = ft.encode(tuned.tokenizer, ft.dialogue(turns))  # type: ignore[arg-type]
    assert asked == taught["input_ids"][: len(asked)]
    assert taught["labels"][len(asked) - 1] == ft.IGNORE != taught["labels"][len(asked)]


def test_of_a_long_talk_the_latest_turns_are_read(tuned: ft.Tuned) -> None:
    talk = [ft.asked_by_user("Why?"), {"role": "assistant", "content": "So."}] * 400
    cfg = ft.Config(SYSTEM="Be brief.")
    ids = ft.prompt_of(tuned, [*talk, ft.asked_by_user("And then?")], cfg)
    text = tuned.tokenizer.decode(ids)
    assert 2048 - 256 - 40 < len(ids) <= 2048 - 256
    assert text.startswith("Instruct: Be brief.\n\nWhy?\nOutput:")
    assert text.endswith("Instruct: And then?\nOutput:")


def test_a_question_that_is_too_long_is_refused(tuned: ft.Tuned) -> None:
    with pytest.raises(ft.UserError, match=r"has [\d,]+ tokens.* takes 1,792.\nIt begins: Why"):
        ft.prompt_of(tuned, [ft.asked_by_user("Why? " * 2000)], ft.Config())


def test_what_is_no_text_does_no_harm(tuned: ft.Tuned) -> None:
    assert ask(tuned, "caf\udce9?", MAX_TOKENS=2)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(roles=st.lists(st.booleans(), max_size=12), length=st.integers(1, 300))
def test_a_prompt_never_begins_with_an_answer(
    tuned: ft.Tuned, roles: list[bool], length: int
) -> None:
    talk = [{"role": "user" if user else "assistant", "content": "so " * length} for user in roles]
    ids = ft.prompt_of(tuned, [*talk, ft.asked_by_user("Why?")], ft.Config())
    text = tuned.tokenizer.decode(ids)
    assert text.startswith("Instruct: ")
    assert text.endswith("Instruct: Why?\nOutput:")
    assert len(ids) <= 2048 - 256


def test_a_wish_for_endless_answers_leaves_room_for_the_question(tuned: ft.Tuned) -> None:
    cfg = ft.Config(MAX_TOKENS=100_000)
    assert ft.prompt_of(tuned, [ft.asked_by_user("Why? " * 100)], cfg)


def test_the_form_of_the_run_counts(tuned: ft.Tuned) -> None:
    tuned.form = "Q: {question} A:"
    ids = ft.prompt_of(tuned, [ft.asked_by_user("Why {question}?")], ft.Config())
    assert tuned.tokenizer.decode(ids) == "Q: Why {question}? A:"


# -- While it grows


def test_an_answer_grows_to_what_it_is(tuned: ft.Tuned) -> None:
    cfg = ft.Config(MAX_TOKENS=30)
    parts = list(ft.growing_answer(tuned, [ft.asked_by_user("Why?")], cfg))
    assert parts[-1] == ask(tuned, "Why?", MAX_TOKENS=30)[0]
    assert [part.tokens for part in parts] == [*range(1, 31), 30]
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(parts))


def test_letters_of_several_tokens_come_whole(tuned: ft.Tuned) -> None:
    """Each byte of these is a token of its own here."""
    ids = tuned.tokenizer(" 雪が好き 🙂")["input_ids"]
    halves = [ft.in_text(tuned.tokenizer, ids[:end]).text for end in range(len(ids))]
    assert any(text.endswith("\ufffd") for text in halves)
    real = ft.answers

    def answers(model: Any, tokenizer: Any, prompts: Any, cfg: Any, heard: Any) -> Any:
        for end in range(1, len(ids) + 1):
            heard(ids[:end])
        return [ft.in_text(tokenizer, ids)]

    ft.answers = answers  # type: ignore[assignment]
    try:
        parts = list(ft.growing_answer(tuned, [ft.asked_by_user("Why?")], ft.Config()))
    finally:
        ft.answers = real
    assert not any("\ufffd" in part.text for part in parts)
    assert parts[-1].text == "雪が好き 🙂"


def test_an_answer_that_nobody_wants_any_more_ends(tuned: ft.Tuned) -> None:
    threads = threading.active_count()
    parts = ft.growing_answer(tuned, [ft.asked_by_user("Why?")], ft.Config(MAX_TOKENS=1500))
    next(parts)
    start = time.monotonic()
    parts.close()
    assert time.monotonic() - start < 2
    assert threading.active_count() == threads


def test_what_fails_while_it_grows_is_told(
    tuned: ft.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: Any) -> None:
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(ft, "generate", generate)
    with pytest.raises(RuntimeError, match="on fire"):
        list(ft.growing_answer(tuned, [ft.asked_by_user("Why?")], ft.Config()))


# -- Before and after


def talks(count: int) -> list[ft.Talk]:
    return [
        ft.Talk(str(row), [ft.asked_by_user(question)], answer)
        for row, (question, answer) in enumerate(PAIRS[:count])
    ]


def test_before_is_the_untouched_base_and_after_the_tuned_model(
    tuned: ft.Tuned, phi_folder: Path
) -> None:
    cfg = ft.Config(MAX_TOKENS=10)
    result = ft.ask_both(tuned, talks(3), cfg)
    base = ft.load_base(ft.Config(MODEL_NAME=str(phi_folder)), CPU)
    prompts = [ft.prompt_of(tuned, talk.messages, cfg) for talk in talks(3)]
    before = ft.answers(base, tuned.tokenizer, prompts, cfg)
    after = ft.answers(tuned.model, tuned.tokenizer, prompts, cfg)
    assert [one.before for one in result.asked] == [answer.text for answer in before]
    assert [one.after for one in result.asked] == [answer.text for answer in after]
    assert before != after
    assert [one.reference for one in result.asked] == [answer for _, answer in PAIRS[:3]]


def test_the_losses_are_those_of_the_plain_model(tuned: ft.Tuned) -> None:
    [one] = ft.ask_both(tuned, talks(1), ft.Config(MAX_TOKENS=1)).asked
    whole = [*talks(1)[0].messages, {"role": "assistant", "content": PAIRS[0][1]}]
    example = ft.encode(tuned.tokenizer, whole)
    ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))  # type: ignore[literal-required]

    def plain() -> float:
        with torch.no_grad():
            return float(tuned.model(input_ids=ids, labels=labels).loss)

    assert one.loss_after == pytest.approx(plain(), rel=1e-5)
    with tuned.model.disable_adapter():
        assert one.loss_before == pytest.approx(plain(), rel=1e-5)


def test_without_a_reference_nothing_is_measured(tuned: ft.Tuned) -> None:
    result = ft.ask_both(tuned, [ft.Talk("1", [ft.asked_by_user("Why?")])], ft.Config(MAX_TOKENS=2))
    assert result.asked[0][-4:] == (None, None, None, None)
    assert result.mean("loss_after") is None
    assert result.tokens_per_second > 0


def test_the_loss_is_of_what_was_asked(tuned: ft.Tuned) -> None:
    """With the instructions and what was said before, and of the last answer alone."""
    talk = [*talks(1)[0].messages, {"role": "assistant", "content": "So."}]
    asked = ft.Talk("1", [*talk, ft.asked_by_user("And then?")], "Then that.")
    cfg = ft.Config(MAX_TOKENS=1, SYSTEM="Be brief.")
    [one] = ft.ask_both(tuned, [asked], cfg).asked
    ids = ft.prompt_of(tuned, asked.messages, cfg)
    answer = [*tuned.tokenizer(" Then that.")["input_ids"], tuned.tokenizer.eos_token_id]
    labels = torch.tensor([[ft.IGNORE] * len(ids) + answer])
    with torch.no_grad():
        loss = tuned.model(input_ids=torch.tensor([ids + answer]), labels=labels).loss
    assert one.loss_after == pytest.approx(float(loss), rel=1e-5)
    [other] = ft.ask_both(tuned, [asked], ft.Config(MAX_TOKENS=1)).asked
    assert other.loss_after != one.loss_after


def test_a_question_that_is_too_long_leaves_the_others(
    tuned: ft.Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ft.Talk("7", [ft.asked_by_user("Why? " * 2000)])
    result = ft.ask_both(tuned, [*talks(2), long], ft.Config(MAX_TOKENS=1))
    assert len(result.asked) == 2
    assert "Left out   row 7: A question has" in capsys.readouterr().out


def test_an_interruption_keeps_what_is_done(
    tuned: ft.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], ft.generate

    def generate(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ft, "generate", generate)
    many = talks(ft.ANSWERS_AT_ONCE + 3)
    assert len(ft.ask_both(tuned, many, ft.Config(MAX_TOKENS=1)).asked) == ft.ANSWERS_AT_ONCE
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        ft.ask_both(tuned, many, ft.Config(MAX_TOKENS=1))


def test_a_loss_that_is_no_number_is_not_shown(tuned: ft.Tuned) -> None:
    with torch.no_grad():
        tuned.model.get_output_embeddings().bias[:] = float("nan")
    prompt = ft.prompt_of(tuned, talks(1)[0].messages, ft.Config())
    assert ft.loss_of_answer(tuned, tuned.model, talks(1)[0], prompt) is None


@pytest.mark.parametrize("training", [True, False])
def test_the_adapter_is_on_again_afterwards(tuned: ft.Tuned, training: bool) -> None:
    tuned.model.train(training)
    expected = ask(tuned, "Why?", MAX_TOKENS=5)
    with pytest.raises(KeyboardInterrupt), tuned.untuned():
        raise KeyboardInterrupt
    assert ask(tuned, "Why?", MAX_TOKENS=5) == expected
    assert tuned.model.training == training


TEXTS = st.text("abc éß雪🙂\n", max_size=20)


@settings(max_examples=100, deadline=None)
@given(one=TEXTS, other=TEXTS.filter(str.strip))
def test_overlap_is_a_share(tokenizer: Any, one: str, other: str) -> None:
    share = ft.overlap(tokenizer, one, other)
    assert share is not None
    assert 0 <= share <= 1
    assert ft.overlap(tokenizer, other, other) == 1
    if one:
        assert ft.overlap(tokenizer, other, one) == share


def test_overlap_counts_what_both_have(tokenizer: Any) -> None:
    assert ft.overlap(tokenizer, "2 plus 3 is 5.", "2 plus 3 is 5.") == 1
    assert ft.overlap(tokenizer, "zzz", "2 plus 3 is 5.") == 0
    half = ft.overlap(tokenizer, "2 plus 3", "2 plus 3 is 5.")
    assert half is not None
    assert 0.5 < half < 1
    assert ft.overlap(tokenizer, "anything", "") is None
