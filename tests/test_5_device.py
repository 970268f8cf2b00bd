"""Section 5: decisions, each with its reason, for machines that are not here."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import finetune_colab as ft

T4, L4, A100 = (7, 5), (8, 9), (8, 0)


@pytest.mark.parametrize(
    "kind, capability, asked, dtype, four_bit",
    [
        ("cuda", T4, None, "float16", True),
        ("cuda", T4, False, "float16", False),
        ("cuda", A100, None, "bfloat16", True),
        ("cuda", L4, False, "bfloat16", False),
        ("cpu", (0, 0), None, "float32", False),
        ("cpu", (0, 0), True, "float32", True),
        ("mps", (0, 0), None, "float32", False),
    ],
)
def test_number_format_follows_the_device(
    kind: str, capability: tuple[int, int], asked: bool | None, dtype: str, four_bit: bool
) -> None:
    device = ft.choose_device(ft.Config(LOAD_IN_4BIT=asked), kind, capability)
    assert (device.kind, device.dtype, device.four_bit) == (kind, dtype, four_bit)
    assert dtype in device.reason


def test_four_bits_on_an_apple_gpu_are_refused() -> None:
    with pytest.raises(ft.UserError, match="LOAD_IN_4BIT"):
        ft.choose_device(ft.Config(LOAD_IN_4BIT=True), "mps")


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_the_demo_computes_alike_everywhere(kind: str) -> None:
    device = ft.choose_device(ft.Config(MODEL_NAME="demo"), kind, T4)
    assert (device.dtype, device.four_bit) == ("float32", False)


def examples(count: int, tokens: int = 10) -> list[ft.Example]:
    return [{"input_ids": [1] * tokens, "labels": [1] * tokens}] * count


@given(
    rows=st.integers(1, 500),
    batch=st.integers(1, 16),
    accumulation=st.integers(1, 8),
    epochs=st.integers(1, 5),
)
def test_every_epoch_sees_every_row(rows: int, batch: int, accumulation: int, epochs: int) -> None:
    cfg = ft.Config(BATCH_SIZE=batch, GRADIENT_ACCUMULATION_STEPS=accumulation, NUM_EPOCHS=epochs)
    plan = ft.plan_run(cfg, examples(rows))
    assert plan.steps_per_epoch == math.ceil(math.ceil(rows / batch) / accumulation)
    assert plan.steps == plan.steps_per_epoch * epochs
    assert plan.tokens_per_epoch == rows * 10
    assert 0 <= plan.warmup_steps <= plan.steps


def test_max_steps_wins_over_epochs() -> None:
    assert ft.plan_run(ft.Config(MAX_STEPS=7), examples(100)).steps == 7
