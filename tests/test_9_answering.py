"""Section 9: answers end where they end, and asking many at once changes none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import END, PAIRS

import finetune_colab as ft

CPU = ft.Device("cpu", "float32", False, "")


@pytest.fixture
def model(phi_folder: Path) -> Any:
    return ft.load_base(ft.Config(MODEL_NAME=str(phi_folder)), CPU)


@pytest.fixture
def padded_tokenizer(phi_folder: Path) -> Any:
    return ft.load_tokenizer(ft.Config(MODEL_NAME=str(phi_folder)))


def test_many_questions_at_once_get_the_same_answers(
    model: Any, padded_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "LONGEST_ANSWER", 12)
    questions = [question * (i + 1) for i, (question, _) in enumerate(PAIRS[:4])]
    together = ft.answer(model, padded_tokenizer, questions)
    assert together == [ft.answer(model, padded_tokenizer, [one])[0] for one in questions]
    assert len({len(padded_tokenizer(q)["input_ids"]) for q in questions}) > 1


def test_an_answer_is_the_greedy_continuation_of_the_prompt(
    model: Any, padded_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a loop of our own, without a cache."""
    monkeypatch.setattr(ft, "LONGEST_ANSWER", 6)
    ids = padded_tokenizer("Instruct: What is 2 plus 3?\nOutput:")["input_ids"]
    start = len(ids)
    model.eval()
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    [answer] = ft.answer(model, padded_tokenizer, ["What is 2 plus 3?"])
    assert answer.text == padded_tokenizer.decode(ids[start:]).strip()
    assert not answer.stopped


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_as_it_was(
    model: Any, padded_tokenizer: Any, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "LONGEST_ANSWER", 1)
    model.train(training)
    ft.answer(model, padded_tokenizer, ["Why?"])
    assert model.training == training


def test_an_answer_that_ends_by_itself_says_so(model: Any, padded_tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.bias[padded_tokenizer.eos_token_id] = 1000.0
    [answer] = ft.answer(model, padded_tokenizer, ["Why?"])
    assert answer == ft.Answer("", stopped=True)
    assert END not in answer.text
