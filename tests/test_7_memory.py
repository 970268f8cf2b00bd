"""Section 7: when memory runs out, the same steps are done with less at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_words
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import finetune_colab as ft

CPU = ft.Device("cpu", "float32", False, "")
FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 14.75 GiB"
FLAGS = ("--max-steps", 5, "--eval-steps", 3, "--save-steps", 2, "--learning-rate", 1e-3)
FLAGS = (*FLAGS, "--lora-dropout", 0)
Run = Callable[..., tuple[int, str]]


def memory_for(tokens: int, patch: pytest.MonkeyPatch, message: str = FULL, after: int = 0) -> None:
    """From the `after`-th use on, attention runs out of memory for more than so many tokens."""
    real, uses = ft.attend_in_each_example, []

    def attend(*args: Any, lengths: list[int], **kwargs: Any) -> Any:
        uses.append(1)
        if sum(lengths) > tokens and len(uses) > after:
            raise torch.OutOfMemoryError(message)
        return real(*args, lengths=lengths, **kwargs)

    patch.setattr(ft, "attend_in_each_example", attend)


def results(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    metrics = json.loads((folder / "model/training_visuals/training_metrics.json").read_text())
    return load_file(folder / "model" / ft.ADAPTER), metrics


@pytest.mark.parametrize("after", [0, 4, 8], ids=["at once", "before a save", "after a save"])
def test_smaller_batches_give_the_same_adapter(
    after: int, workbook: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model-name", phi_folder, *FLAGS)
    assert run(*flags)[0] == 0
    expected, plain = results(workbook.parent)
    memory_for(200, monkeypatch, after=after)
    code, printed = run(*flags, "--no-resume")
    assert code == 0
    printed = in_words(printed)
    found = re.findall(r"goes on with less: (\d+) tokens at once, not (\d+); the result", printed)
    assert [int(less) for less, _ in found] == [int(more) // 2 for _, more in found]
    assert len(found) >= 1
    adapter, metrics = results(workbook.parent)
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-5, rtol=1e-3)
    assert metrics["tokens_at_once"] == int(found[-1][0]) <= 200 < plain["tokens_at_once"]
    for name in ("train_loss", "eval_loss", "base_eval_loss"):
        assert metrics[name] == pytest.approx(plain[name], rel=1e-4)
    for name in ("steps", "tokens_trained", "best_step"):
        assert metrics[name] == plain[name]


def test_less_is_kept_when_not_even_one_pair_fits(
    workbook: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_arguments = ft.attend_in_each_example, ft.training_arguments
    recomputing = [False]

    def arguments(cfg: ft.Config, plan: ft.Plan, *rest: Any) -> Any:
        recomputing[0] = plan.checkpointing
        return real_arguments(cfg, plan, *rest)

    def attend(*args: Any, lengths: list[int], **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not recomputing[0]:
            raise torch.OutOfMemoryError(FULL)
        return real(*args, lengths=lengths, **kwargs)

    flags = ("--model-name", phi_folder, *FLAGS)
    assert run(*flags)[0] == 0
    expected, _ = results(workbook.parent)
    monkeypatch.setattr(ft, "training_arguments", arguments)
    monkeypatch.setattr(ft, "attend_in_each_example", attend)
    code, printed = run(*flags, "--no-resume")
    assert code == 0
    assert "values are computed again instead of kept" in in_words(printed)
    for name, weight in results(workbook.parent)[0].items():
        torch.testing.assert_close(weight, expected[name], atol=2e-5, rtol=1e-3)


@given(st.integers(1, 5000), st.integers(1, 500), st.booleans())
def test_less_and_less_is_tried_down_to_one_pair(most: int, longest: int, saving: bool) -> None:
    plan: ft.Plan | None = ft.Plan(1, 1, 0, 1, 16, most, saving, "")
    sizes = []
    while plan:
        last, plan = plan, ft.smaller(plan, longest)
        sizes.append(last.tokens_at_once)
    assert sizes == sorted(sizes, reverse=True)
    assert last.tokens_at_once <= max(longest, most)
    assert last.checkpointing
    assert len(sizes) < 20


@pytest.mark.parametrize(
    "error, fault",
    [
        (torch.OutOfMemoryError(FULL), "full"),
        (MemoryError(), "full"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.81 GB)"), "full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "full"),
        (RuntimeError("CUDA error: out of memory"), "broken"),
        (RuntimeError("CUDA driver error: out of memory"), "broken"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "broken",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
        (ValueError("no number"), ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_lack_of_memory_is_known_by_all_its_names(error: Exception, fault: str) -> None:
    assert ft.memory_fault(error) == fault


def test_a_gpu_that_answers_no_more_ends_with_the_way_on(
    workbook: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model-name", phi_folder, *FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        memory_for(0, patch, "CUDA error: out of memory", after=8)
        code, printed = run(*flags)
    assert code == 2
    assert "Run the same command again: it goes on from the newest checkpoint" in in_words(printed)
    assert "Traceback" not in printed
    code, printed = run(*flags)
    assert code == 0
    assert "from step" in printed


@pytest.mark.parametrize("fits", [100, 0], ids=["one pair fits", "none fits"])
def test_a_lack_of_memory_while_measuring_costs_no_training(
    fits: int, workbook: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ft.mean_loss
    sizes: list[int] = []

    def mean_loss(model: Any, examples: Any, size: int) -> float:
        sizes.append(size)
        if size > fits:
            raise torch.OutOfMemoryError(FULL)
        return real(model, examples, size)

    monkeypatch.setattr(ft, "mean_loss", mean_loss)
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 0
    assert sizes[1] == sizes[0] // 2
    metrics = results(workbook.parent)[1]
    assert metrics["tokens_at_once"] == sizes[0]
    assert metrics["steps"] == 5
    assert (metrics["eval_loss"] is None) == (not fits)
    assert ("it is left out" in in_words(printed)) == (not fits)
    text = (workbook.parent / "model/training_visuals/training_metrics.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text


def test_the_longest_row_is_tried_without_a_trace(phi_folder: Path, workbook: Path) -> None:
    """It must change neither the weights nor the chance that decides the dropout."""
    cfg = ft.Config(MODEL_NAME=str(phi_folder))
    data = ft.prepare(cfg)
    model = ft.add_lora(cfg, ft.load_base(cfg, CPU))
    keeper = ft.Keeper(cfg, ft.identity_of(cfg, data, CPU))
    plan = ft.plan_run(cfg, data.train, CPU)
    trainer = ft.build_trainer(cfg, model, data, CPU, plan, keeper, ft.Tally())
    seen: list[list[int]] = []
    real = trainer.training_step

    def training_step(model: Any, batch: Any, tokens: int) -> Any:
        seen.extend(row["lengths"] for row in batch["rows"])
        return real(model, batch, tokens)

    trainer.training_step = training_step
    state = torch.random.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with ft.flat_rows(model):
        ft.try_longest_row(trainer, data, plan)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    longest = sorted((len(one["input_ids"]) for one in data.train), reverse=True)[: plan.pairs]
    assert seen == [longest]


# -- Numbers that are none


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer writes a NaN into the adapter in the third step, after a fine loss."""
    real = torch.optim.AdamW.step
    steps: list[int] = []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = real(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 3:
            self.param_groups[0]["params"][0].data[0, 0] = math.nan
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def test_an_adapter_with_a_nan_is_never_saved(
    workbook: Path, phi_folder: Path, run: Run, spoiled: None
) -> None:
    flags = ("--model-name", phi_folder, *FLAGS, "--save-steps", 1, "--eval-steps", 100)
    code, printed = run(*flags)
    assert code == 2
    assert "no longer a number (NaN)" in in_words(printed)
    assert "Lower LEARNING_RATE" in in_words(printed)
    folders = sorted(workbook.parent.glob("checkpoints/*/checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-1", "checkpoint-2"]
    for folder in folders:
        weights = load_file(folder / ft.ADAPTER)
        assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_nan_while_measuring_ends_the_run(
    workbook: Path, phi_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ft.mean_loss, []

    def mean_loss(*args: Any) -> float:
        calls.append(1)
        return math.nan if len(calls) == 2 else real(*args)

    monkeypatch.setattr(ft, "mean_loss", mean_loss)
    code, printed = run("--model-name", phi_folder, *FLAGS)
    assert code == 2
    assert "no longer a number (NaN)" in in_words(printed)
    assert not list(workbook.parent.glob("checkpoints/*/checkpoint-3"))
