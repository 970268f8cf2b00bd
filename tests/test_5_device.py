"""Section 5: decisions, each with its reason, for machines that are not here."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import finetune_colab as ft

CPU = ft.Device("cpu", "float32", False, "")
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
    plan = ft.plan_run(cfg, examples(rows), CPU)
    assert plan.steps_per_epoch == math.ceil(rows / (batch * accumulation))
    assert plan.steps == plan.steps_per_epoch * epochs
    assert plan.tokens_per_epoch == rows * 10
    assert 0 <= plan.warmup_steps <= plan.steps


def test_max_steps_wins_over_epochs() -> None:
    assert ft.plan_run(ft.Config(MAX_STEPS=7), examples(100), CPU).steps == 7


# -- How a step is laid out

PHI_2 = ft.Shape(32, 2560, 10_240, 2, 2_516_582_400, 51_200, 2_779_683_840, 23_592_960, 45_056)
HALF = ft.Device("cuda", "float16", True, "")


def of_length(*lengths: int) -> list[ft.Example]:
    return [
        {
            "input_ids": [1] * length,
            "labels": [ft.IGNORE] * (length // 2) + [1] * (length - length // 2),
        }
        for length in lengths
    ]


def machine(memory_gb: float) -> ft.Machine:
    return ft.Machine("", 22e12, 240e9, memory_gb * 1e9)


@pytest.mark.parametrize(
    "lengths, device, memory_gb, at_once, checkpointing",
    [
        ([100] * 64, HALF, 15.8, 1600, False),  # typical answers on a T4: the whole step in one
        ([500] * 64, HALF, 15.8, 3000, False),
        ([2000] * 64, HALF, 15.8, 3000, False),
        ([100] * 64, HALF, 6.0, "fits", False),  # a smaller GPU
        ([2000] * 64, HALF, 5.0, "more", True),
        ([100] * 64, CPU, 64, 1000, False),  # a processor in float32
        ([100] * 64, CPU, 16, 100, True),  # the weights alone fill its memory
        ([100, 5000], HALF, 80, 3000, False),
    ],
)
def test_the_layout_follows_lengths_and_memory(
    lengths: list[int], device: ft.Device, memory_gb: float, at_once: object, checkpointing: bool
) -> None:
    plan = ft.plan_run(ft.Config(), of_length(*lengths), device, PHI_2, machine(memory_gb))
    assert plan.checkpointing == checkpointing
    if at_once == "more":
        assert 2000 <= plan.tokens_at_once < 3000
    elif at_once == "fits":
        assert 100 < plan.tokens_at_once < 1600
        assert "as many as fit" in plan.reason
    else:
        assert plan.tokens_at_once == at_once


def test_what_is_set_is_done() -> None:
    cfg = ft.Config(TOKENS_AT_ONCE=700, GRADIENT_CHECKPOINTING=True)
    plan = ft.plan_run(cfg, of_length(*[100] * 64), HALF, PHI_2, machine(15.8))
    assert (plan.tokens_at_once, plan.checkpointing) == (700, True)
    assert "as set" in plan.reason
    cfg = ft.Config(GRADIENT_CHECKPOINTING=False)
    plan = ft.plan_run(cfg, of_length(*[2000] * 64), HALF, PHI_2, machine(6))
    assert not plan.checkpointing


@given(st.lists(st.integers(1, 600), min_size=1, max_size=80), st.floats(2, 80))
def test_the_layout_never_changes_the_steps(lengths: list[int], memory_gb: float) -> None:
    cfg = ft.Config()
    bare = ft.plan_run(cfg, of_length(*lengths), HALF)
    plan = ft.plan_run(cfg, of_length(*lengths), HALF, PHI_2, machine(memory_gb))
    assert plan[:5] == bare[:5]
    assert plan.seconds
    assert plan.memory_gb
    more = ft.plan_run(cfg, of_length(*lengths), HALF, PHI_2, machine(memory_gb + 10))
    assert more.tokens_at_once >= plan.tokens_at_once
    assert more.checkpointing <= plan.checkpointing
    assert more.seconds
    assert more.seconds <= plan.seconds * 1.001


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 1000))
def test_rows_hold_every_example_once_and_are_about_as_long(lengths: list[int], most: int) -> None:
    examples = of_length(*lengths)
    rows = ft.rows_of(examples, most)
    inside = [len(example["input_ids"]) for row in rows for example in row]
    assert sorted(inside) == sorted(lengths)
    sizes = [sum(len(example["input_ids"]) for example in row) for row in rows]
    assert max(sizes) <= max(most, *lengths)
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= max(lengths)


def test_many_examples_are_laid_out_in_no_time() -> None:
    examples = of_length(*[50] * 50_000)
    started = time.process_time()
    assert len(ft.rows_of(examples, 1000)) == 2500
    assert time.process_time() - started < 2


def test_colabs_gpus_are_told_apart() -> None:
    """By arithmetic from public figures: the order is what can be relied on."""
    lengths = of_length(*[105] * 441)
    plans = {}
    for name, (capability, gpu) in ft.GPUS.items():
        device = ft.choose_device(ft.Config(), "cuda", capability)
        plans[name] = ft.plan_run(ft.Config(), lengths, device, PHI_2, gpu)
    seconds = [plans[name].seconds for name in ("A100", "L4", "T4")]
    assert seconds == sorted(seconds, key=lambda second: second or 0)
    assert all(plan.memory_gb and plan.memory_gb < 14 for plan in plans.values())
