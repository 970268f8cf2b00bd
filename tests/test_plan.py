"""Where a model runs, in which numbers, and how a step is laid out, also on machines that are not here."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import PAIRS, Run, in_words, write_workbook
from hypothesis import given
from hypothesis import strategies as st
from seams import UserError, device_for, outlines, plan_for
from tables import cases
from transformers import PhiConfig

ON = {"CPU": device_for("cpu"), "T4": device_for("cuda", (7, 5))}
SIZES: dict[str, Any] = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
PHI_2 = (outline := outlines(PhiConfig(**SIZES))[0])._replace(adapted=[*outline.linear.values()])
LENGTHS = st.one_of(st.lists(st.integers(1, 600), min_size=1, max_size=80), st.integers(1, 500).map(lambda n: [10] * n))


@pytest.mark.parametrize("case", cases("devices").values())  # M10
def test_the_number_format_follows_the_device(case: str) -> None:
    _, machine, changes, wanted = case.split(" | ")
    kind, *capability = machine.split()
    device = device_for(kind, tuple(map(int, capability)), **json.loads(changes))
    assert (device.kind, f"{device.dtype} {device.four_bit}") == (kind, wanted)
    assert device.dtype in device.reason
    with pytest.raises(UserError, match="LOAD_IN_4BIT"):
        device_for("mps", LOAD_IN_4BIT=True)


@pytest.mark.parametrize("case", cases("layouts").values())
def test_the_layout_follows_lengths_memory_and_what_is_set(case: str) -> None:
    _, pairs, machine, changes, wanted = case.split(" | ")
    device, gb = machine.split()
    lengths = [int(length) for count, length in re.findall(r"(\d+) × (\d+)", pairs) for _ in range(int(count))]
    plan = plan_for(lengths, ON[device], PHI_2, float(gb), **json.loads(changes))
    least, most, checkpointing = wanted.split()
    assert str(plan.checkpointing) == checkpointing and int(least) <= plan.tokens_at_once <= int(most)


def test_a_run_says_and_records_its_device_and_its_plan(tuned_run: Path) -> None:
    told = next((tuned_run / "logs").iterdir()).read_text()
    assert re.search(r"Device .*float32(.*\n)+.*Plan .*\b12 steps \(.* 16 pairs per step", told)
    device = json.loads((tuned_run / "model/training_visuals/training_config.json").read_text())["device"]
    assert (device["kind"], device["dtype"], device["four_bit"]) == ("cpu", "float32", False)


@given(LENGTHS, st.integers(1, 16), st.integers(1, 8), st.integers(1, 5), st.floats(2, 80))
def test_every_epoch_sees_every_row_and_memory_changes_the_layout_only(
    lengths: list[int], batch: int, more: int, epochs: int, gb: float
) -> None:
    named = {"BATCH_SIZE": batch, "GRADIENT_ACCUMULATION_STEPS": more, "NUM_EPOCHS": epochs}
    bare = plan_for(lengths, ON["T4"], **named)
    assert bare.steps_per_epoch == math.ceil(len(lengths) / (batch * more)) == bare.steps / epochs
    assert bare.tokens_per_epoch == sum(lengths)
    assert 0 <= bare.warmup_steps <= bare.steps
    assert plan_for(lengths, ON["T4"], **named, MAX_STEPS=7).steps == 7
    plan, roomy = (plan_for(lengths, ON["T4"], PHI_2, each, **named) for each in (gb, gb + 10))
    assert (plan.steps, plan.warmup_steps, plan.pairs) == (bare.steps, bare.warmup_steps, bare.pairs)
    assert roomy.tokens_at_once >= plan.tokens_at_once >= 1
    assert roomy.checkpointing <= plan.checkpointing
    assert 0 < roomy.seconds <= plan.seconds * 1.001


def test_the_exam_is_estimated_at_no_more_than_a_minute_on_a_t4() -> None:
    whole, without, none = (
        plan_for([150] * 441, ON["T4"], PHI_2, 15, **named).asking_seconds
        for named in ({}, {"EXAM_QUESTIONS": 0}, {"EVAL_ANSWERS": 0})
    )
    assert 20 < whole - without < 60 and none == 0 < without


def test_check_tells_what_it_costs_here_and_on_the_gpus_of_colab(
    folder: Path, tokenizer: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    PhiConfig(architectures=["PhiForCausalLM"], **SIZES).save_pretrained("phi-2")
    tokenizer.save_pretrained("phi-2")  # without weights: check needs none
    rows = [(f"{question} {i}", answer * 3) for i in range(8) for question, answer in PAIRS]
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *rows])
    at_once = []
    for size in (64e9, 17e9):
        memory = SimpleNamespace(total=size, available=size)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        told = in_words(run("check", "--model-name", "./phi-2")[1])
        assert re.search(r"Estimate .*\d (s|min|h), at most 1\d\.\d GB", told)
        at_once += re.findall(r"At once at most ([\d,]+) tokens", told)
    assert at_once[0] == "1,000" != at_once[1]
    costs = re.findall(r"\b(T4|L4|A100) ([\d.]+) (s|min|h), at most ([\d.]+) GB", told)
    assert [cost[0] for cost in costs] == ["T4", "L4", "A100"]  # by arithmetic: the order counts
    seconds = [float(time) * {"s": 1, "min": 60, "h": 3600}[unit] for _, time, unit, _ in costs]
    assert seconds == sorted(seconds, reverse=True)
    assert all(0 < float(memory) < 14 for *_, memory in costs)
