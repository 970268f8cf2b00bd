"""Section 7: the loss is the loss it claims to be, and the right adapter is kept."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIRS, in_words, write_workbook
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

import finetune_colab as ft

CPU = ft.Device("cpu", "float32", False, "")
CPU_4BIT = ft.Device("cpu", "float32", True, "")


@pytest.fixture
def cfg(phi_folder: Path, workbook: Path) -> ft.Config:
    """A run of three steps on 22 pairs; sgd, so that an update is the gradient itself."""
    return ft.Config(
        MODEL_NAME=str(phi_folder),
        LORA_DROPOUT=0.0,
        MAX_STEPS=3,
        OPTIMIZER="sgd",
        LEARNING_RATE=0.5,
        MAX_GRAD_NORM=0.0,
        WARMUP_RATIO=0.0,
    )


def build(cfg: ft.Config, device: ft.Device = CPU) -> Any:
    from transformers import set_seed

    base = ft.load_base(cfg, device)
    set_seed(cfg.SEED)
    return ft.add_lora(cfg, base)


def keeper(cfg: ft.Config, data: ft.Prepared, device: ft.Device = CPU) -> ft.Keeper:
    kept = ft.Keeper(cfg, ft.identity_of(cfg, data, device))
    assert kept.starting_point() is None
    return kept


def train(cfg: ft.Config, device: ft.Device = CPU) -> tuple[Any, ft.Prepared, ft.Trained]:
    """A whole training; the model comes back with the adapter that is kept."""
    data, model = ft.prepare(cfg), build(cfg, device)
    cfg.RESUME = False
    plan = ft.plan_run(cfg, data.train, device)
    last = ft.train_adapter(cfg, model, data, device, plan, keeper(cfg, data, device))
    trained = ft.outcome(cfg, last)
    set_peft_model_state_dict(model, load_file(trained.adapter))
    return model, data, trained


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def wake(model: Any) -> None:
    """A fresh adapter gives A no gradient, since B is zero: start from a used one."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


def reference_loss(model: Any, examples: list[ft.Example], padded: bool) -> torch.Tensor:
    """The mean over answer tokens by plain means: whole logits, usual attention, shifted labels."""
    rows = [examples] if padded else [[one] for one in examples]
    total, tokens = torch.tensor(0.0), 0
    for group in rows:
        width = max(len(one["labels"]) for one in group)
        fill = [width - len(one["labels"]) for one in group]
        ids = torch.tensor([g["input_ids"] + [0] * n for g, n in zip(group, fill, strict=True)])
        mask = torch.tensor([[1] * (width - n) + [0] * n for n in fill])
        labels = torch.tensor([g["labels"] + [-100] * n for g, n in zip(group, fill, strict=True)])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        tokens += int((labels[:, 1:] != -100).sum())
    return total / tokens


@pytest.mark.parametrize("padded", [False, True], ids=["one by one", "padded batch"])
def test_loss_and_gradients_equal_the_plain_way(cfg: ft.Config, padded: bool) -> None:
    data, model = ft.prepare(cfg), build(cfg)
    wake(model)
    examples = data.train[:6]

    loss = reference_loss(model, examples, padded)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    batch = ft.flatten(examples)
    labels = batch.pop("labels")
    with ft.flat_rows(model):
        ours = ft.step_loss(model(**batch), labels, int((labels != ft.IGNORE).sum()))
    ours.backward()

    torch.testing.assert_close(ours, loss, atol=1e-5, rtol=1e-5)
    assert len(expected) == 2 * 6 * 2
    for name, parameter in model.named_parameters():
        if name in expected:
            assert expected[name].abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)


def test_the_head_runs_only_where_a_token_is_learnt(cfg: ft.Config) -> None:
    data, model = ft.prepare(cfg), build(cfg)
    batch = ft.flatten(data.train[:4])
    labels = batch.pop("labels")
    with torch.no_grad(), ft.flat_rows(model):
        logits = model(**batch).logits
    assert logits.shape[1] == (labels != ft.IGNORE).sum() < labels.numel() / 2 + 40
    assert batch["input_ids"].numel() == sum(len(e["input_ids"]) for e in data.train[:4])


@pytest.fixture
def whole_step(cfg: ft.Config) -> dict[str, torch.Tensor]:
    cfg.BATCH_SIZE, cfg.GRADIENT_ACCUMULATION_STEPS = 4, 1
    return adapter(train(cfg)[0])


@pytest.mark.parametrize("batch, accumulation", [(1, 4), (2, 2)])
@pytest.mark.parametrize("at_once", [1, 70, 0])
def test_how_a_step_is_divided_changes_nothing(
    cfg: ft.Config,
    whole_step: dict[str, torch.Tensor],
    batch: int,
    accumulation: int,
    at_once: int,
) -> None:
    """Through the real Trainer: rows of unequal length, three steps, the same adapter."""
    cfg.BATCH_SIZE, cfg.GRADIENT_ACCUMULATION_STEPS = batch, accumulation
    cfg.TOKENS_AT_ONCE = at_once
    model, _, _ = train(cfg)
    fresh = adapter(build(cfg))
    for name, weight in adapter(model).items():
        torch.testing.assert_close(weight, whole_step[name], atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(fresh[name], weight) for name, weight in whole_step.items())


def test_the_logged_losses_are_those_of_the_plain_way(cfg: ft.Config) -> None:
    """Every step of the Trainer against a loop of our own with the reference loss."""
    cfg.BATCH_SIZE, cfg.GRADIENT_ACCUMULATION_STEPS, cfg.LR_SCHEDULER = 2, 2, "constant"
    _, data, trained = train(cfg)
    logged = [entry["loss"] for entry in trained.history if "loss" in entry]

    model = build(cfg)
    order = torch.utils.data.RandomSampler(
        data.train, generator=torch.Generator().manual_seed(cfg.SEED)
    )
    rows = list(order)
    losses = []
    for step in range(3):
        loss = reference_loss(model, [data.train[i] for i in rows[4 * step : 4 * step + 4]], True)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(cfg.LEARNING_RATE * parameter.grad)
                    parameter.grad = None
    assert logged == pytest.approx(losses, abs=1e-4)


def test_the_validation_loss_is_a_mean_over_tokens_not_batches(cfg: ft.Config) -> None:
    data, model = ft.prepare(cfg), build(cfg)
    wake(model)
    model.eval()
    with torch.no_grad():
        expected = reference_loss(model, data.train, True).item()
    for most in (1, 100, 10_000):
        assert ft.mean_loss(model, data.train, most) == pytest.approx(expected, abs=1e-5)


def test_measuring_leaves_four_bit_gradients_as_they_are(cfg: ft.Config) -> None:
    data, model = ft.prepare(cfg), build(cfg, CPU_4BIT)
    wake(model)
    batch = ft.flatten(data.train[:2])
    labels = batch.pop("labels")

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with ft.flat_rows(model):
            ft.step_loss(model(**batch), labels, 50).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    ft.mean_loss(model, data.held_out, 500)
    after = gradients()
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, after[name])


@pytest.mark.parametrize("device", [CPU, CPU_4BIT], ids=["float32", "4 bit"])
def test_training_changes_the_adapter_and_nothing_else(cfg: ft.Config, device: ft.Device) -> None:
    data, model = ft.prepare(cfg), build(cfg, device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cfg.MAX_STEPS = 1 if device.four_bit else 3
    plan = ft.plan_run(cfg, data.train, device)
    last = ft.train_adapter(cfg, model, data, device, plan, keeper(cfg, data, device))
    trained = ft.outcome(cfg, last)
    for name, parameter in model.named_parameters():
        if "lora_A" not in name:  # after the first step A is still the same, since B was zero
            assert torch.equal(parameter, before[name]) == ("lora_B" not in name), name
    assert trained.final_loss != trained.base_loss


def test_the_base_loss_is_measured_without_the_adapter(cfg: ft.Config) -> None:
    model, data, trained = train(cfg)
    with model.disable_adapter():
        assert ft.mean_loss(model, data.held_out, 1000) == pytest.approx(trained.base_loss)


@pytest.fixture
def overshooting(cfg: ft.Config) -> ft.Config:
    """Steps so large that the first is the best."""
    cfg.MAX_STEPS, cfg.EVAL_STEPS, cfg.SAVE_STEPS = 4, 1, 100
    cfg.OPTIMIZER, cfg.LEARNING_RATE, cfg.LR_SCHEDULER = "adamw_torch", 0.03, "constant"
    return cfg


def eval_losses(trained: ft.Trained) -> list[float]:
    return [entry["eval_loss"] for entry in trained.history if "eval_loss" in entry]


def test_the_adapter_kept_is_the_best_one(overshooting: ft.Config) -> None:
    model, data, trained = train(overshooting)
    losses = eval_losses(trained)
    assert min(losses) < losses[-1], "the case is not the one meant"
    assert trained.final_loss == min(losses)
    assert trained.best_step == losses.index(min(losses)) + 1
    measured = ft.mean_loss(model, data.held_out, 1000)
    assert measured == pytest.approx(min(losses), abs=1e-6)


def test_the_last_adapter_is_kept_when_asked(overshooting: ft.Config) -> None:
    overshooting.KEEP_BEST = False
    model, data, trained = train(overshooting)
    assert trained.best_step is None
    assert trained.final_loss == eval_losses(trained)[-1]
    measured = ft.mean_loss(model, data.held_out, 1000)
    assert measured == pytest.approx(trained.final_loss, abs=1e-6)


def test_training_stops_early_when_nothing_improves(overshooting: ft.Config) -> None:
    overshooting.EARLY_STOPPING_PATIENCE = 2
    _, _, trained = train(overshooting)
    losses = eval_losses(trained)
    assert trained.steps < overshooting.MAX_STEPS
    assert trained.steps == losses.index(min(losses)) + 1 + 2


def test_a_nan_stops_the_run_before_anything_is_saved(cfg: ft.Config) -> None:
    cfg.SAVE_STEPS = 1
    data, model = ft.prepare(cfg), build(cfg)
    with torch.no_grad():
        model.get_base_model().lm_head.bias.fill_(math.nan)
    data.held_out.clear()
    with pytest.raises(ft.UserError, match=r"NaN(.|\n)*LEARNING_RATE"):
        plan = ft.plan_run(cfg, data.train, CPU)
        ft.train_adapter(cfg, model, data, CPU, plan, keeper(cfg, data))
    assert not list(Path(cfg.CHECKPOINT_DIR).rglob("*.safetensors"))


def test_checkpoints_come_at_every_so_many_steps(cfg: ft.Config) -> None:
    cfg.VALIDATION_FRACTION, cfg.MAX_STEPS, cfg.SAVE_STEPS = 0.0, 5, 2
    _, _, trained = train(cfg)
    kept = sorted(path.name for path in Path(cfg.CHECKPOINT_DIR).glob("*/checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-5"]
    assert trained.base_loss is trained.final_loss is trained.best_step is None


def test_every_token_is_counted_once_an_epoch(cfg: ft.Config) -> None:
    cfg.MAX_STEPS, cfg.NUM_EPOCHS = 0, 2
    _, data, trained = train(cfg)
    assert trained.tokens == 2 * sum(len(one["input_ids"]) for one in data.train)
    assert trained.epochs == 2
    assert trained.tally.trainable == sum(p.numel() for p in adapter(build(cfg)).values())
    assert 0.1 < trained.tally.peak_memory_gb < 20


def test_the_clock_runs_in_steps_only() -> None:
    tally = ft.Tally()
    tally.start()
    sum(range(3_000_000))
    tally.pause()
    wall, cpu = tally.seconds, tally.cpu_seconds
    time.sleep(0.05)
    tally.pause()
    assert (tally.seconds, tally.cpu_seconds) == (wall, cpu)
    assert wall > 0 < cpu
    tally.start()
    tally.start()  # the next step: what lies between counts
    tally.pause()
    assert tally.seconds > wall


def test_measuring_and_saving_are_not_training_time(
    cfg: ft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ft.mean_loss

    def slow(*args: Any) -> float:
        time.sleep(1)
        return real(*args)

    monkeypatch.setattr(ft, "mean_loss", slow)
    cfg.EVAL_STEPS, started = 1, time.perf_counter()
    _, _, trained = train(cfg)
    assert time.perf_counter() - started > 4
    assert trained.tally.seconds < time.perf_counter() - started - 3.5


def test_memory_that_runs_out_is_one_message_with_the_levers(
    phi_folder: Path, workbook: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(ft, "attend_in_each_example", full)
    code, printed = run("--model-name", phi_folder)
    assert code == 2
    printed = in_words(printed)
    assert "Lower MAX_LENGTH (--max-length 256) or LORA_R" in printed
    assert re.search(r"with less: \d+ tokens at once, not \d+; the result is the same", printed)
    assert "values are computed again instead of kept" in printed
    assert not (workbook.parent / "model").exists()


@pytest.mark.parametrize(
    "asked, kind, used",
    [
        ("auto", "cuda", "paged_adamw_32bit"),
        ("auto", "cpu", "adamw_torch"),
        ("auto", "mps", "adamw_torch"),
        ("adafactor", "cpu", "adafactor"),
    ],
)
def test_the_optimizer_follows_the_device(asked: str, kind: str, used: str) -> None:
    device = ft.Device(kind, "float32", False, "")
    assert ft.optimizer_name(ft.Config(OPTIMIZER=asked), device) == used


def test_a_paged_optimizer_without_a_gpu_is_refused() -> None:
    with pytest.raises(ft.UserError, match="OPTIMIZER"):
        ft.optimizer_name(ft.Config(OPTIMIZER="paged_adamw_8bit"), CPU)


def test_a_row_that_is_too_long_is_left_out_whole(
    phi_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("question", "answer"), *PAIRS, ("Tell me all.", "word " * 100)]
    write_workbook(folder / "dataset.xlsx", rows)
    data = ft.prepare(ft.Config(MODEL_NAME=str(phi_folder), MAX_LENGTH=80))
    assert len(data.train) + len(data.held_out) == len(PAIRS)
    for example in data.train + data.held_out:
        assert example["labels"][-1] == data.tokenizer.eos_token_id
    printed = in_words(capsys.readouterr().out)
    assert (
        f"longer than MAX_LENGTH, 80 tokens (raise it or shorten the row): row {len(rows)}"
        in printed
    )


def test_gradient_checkpointing_changes_no_result(cfg: ft.Config) -> None:
    plain = adapter(train(cfg)[0])
    cfg.GRADIENT_CHECKPOINTING = True
    for name, weight in adapter(train(cfg)[0]).items():
        torch.testing.assert_close(weight, plain[name], atol=1e-6, rtol=1e-5)
