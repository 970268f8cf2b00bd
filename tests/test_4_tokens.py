"""Section 4: what is learnt is the answer and its end, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import END, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def messages(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": r, "content": c} for pair in pairs for r, c in zip(roles, pair, strict=True)]


def learnt(example: ft.Example) -> list[int]:
    return [label for label in example["labels"] if label != ft.IGNORE]


@pytest.mark.parametrize("question, answer", PAIRS)
def test_the_learnt_tokens_are_the_answer_and_its_end(
    tokenizer: Any, question: str, answer: str
) -> None:
    example = ft.encode(tokenizer, messages((question, answer)))
    assert tokenizer.decode(learnt(example)) == f" {answer}{END}"
    prompt = f"Instruct: {question}\nOutput:"
    assert tokenizer.decode(example["input_ids"]) == f"{prompt} {answer}{END}"


@settings(max_examples=60, deadline=None)
@given(question=texts, answer=texts)
def test_any_text_comes_back_from_its_tokens(tokenizer: Any, question: str, answer: str) -> None:
    example = ft.encode(tokenizer, messages((question, answer)))
    assert tokenizer.decode(learnt(example)) == f" {answer}{END}"
    assert learnt(example).count(tokenizer.eos_token_id) == 1
    assert len(example["input_ids"]) == len(example["labels"])
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, ft.IGNORE)


def test_a_quoted_end_of_text_does_not_end_the_answer(tokenizer: Any) -> None:
    answer = f"The token {END} ends a text."
    example = ft.encode(tokenizer, messages((f"What is {END}?", answer)))
    assert example["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(learnt(example)) == f" {answer}{END}"


def test_braces_in_a_question_are_left_alone(tokenizer: Any) -> None:
    example = ft.encode(tokenizer, messages(("What is {question}?", "{{name}} {0}")))
    assert tokenizer.decode(example["input_ids"]) == (
        f"Instruct: What is {{question}}?\nOutput: {{{{name}}}} {{0}}{END}"
    )


def test_every_answer_of_a_conversation_is_learnt(tokenizer: Any) -> None:
    example = ft.encode(tokenizer, messages(("a", "b"), ("c", "d")))
    assert tokenizer.decode(learnt(example)) == f" b{END} d{END}"


def test_asking_gives_the_same_tokens_as_teaching(tokenizer: Any) -> None:
    taught = ft.encode(tokenizer, messages(PAIRS[0]))
    asked = ft.encode(tokenizer, messages(PAIRS[0])[:1])
    assert asked["input_ids"] == taught["input_ids"][: len(asked["input_ids"])]
    assert learnt(asked) == []
    assert taught["labels"][len(asked["input_ids"])] != ft.IGNORE


def test_an_example_is_shown_with_its_learnt_part_marked(tokenizer: Any) -> None:
    shown = ft.marked(tokenizer, ft.encode(tokenizer, messages(("Why?", "So."))))
    assert shown == f"Instruct: Why?\nOutput:[[ So.{END}]]"


def pairs_of(questions: list[str]) -> list[ft.Pair]:
    return [ft.Pair(messages((q, f"answer {i}")), "", i) for i, q in enumerate(questions)]


@given(
    questions=st.lists(st.sampled_from([f"q{i}" for i in range(30)]), min_size=1, max_size=60),
    fraction=st.floats(0, 0.5),
    seed=st.integers(0, 100),
)
def test_no_question_is_on_both_sides(questions: list[str], fraction: float, seed: int) -> None:
    pairs = pairs_of(questions)
    away = ft.held_out(pairs, fraction, seed)
    sides = [
        {q for q, out in zip(questions, away, strict=True) if out == side} for side in (True, False)
    ]
    assert not sides[0] & sides[1]
    assert False in away
    assert ft.held_out(pairs, fraction, seed) == away
    enough = fraction > 0 and len(set(questions)) >= ft.FEWEST_TO_HOLD_OUT
    assert (True in away) == enough


def test_questions_that_differ_in_case_and_spaces_stay_together() -> None:
    pairs = pairs_of(
        [f"Question {i}?" for i in range(20)] + [f" question  {i}? " for i in range(20)]
    )
    away = ft.held_out(pairs, 0.2, seed=1)
    assert sum(away) == 8
    assert away[:20] == away[20:]


def test_another_seed_holds_out_other_questions() -> None:
    pairs = pairs_of([f"q{i}" for i in range(50)])
    assert ft.held_out(pairs, 0.1, 1) != ft.held_out(pairs, 0.1, 2)
