"""Section 6: a layer and its adapter as one operation computes what peft does, with less kept."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack, nullcontext
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import finetune_colab as ft

BITS = transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
)
FAMILIES = {
    "phi": ("q_proj k_proj v_proj dense", "fc1 fc2"),
    "llama": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "qwen2": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "phi3": ("qkv_proj o_proj", "gate_up_proj down_proj"),
}


def targets(family: str, wide: bool = True) -> list[str]:
    attention, rest = FAMILIES[family]
    return attention.split() + (rest.split() if wide else [])


def build(family: str, blocks: int = 2, wide: bool = True, **lora: Any) -> Any:
    """A small model of this family with weights of chance, and an adapter that does something."""
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model(
        family,
        vocab_size=512,
        hidden_size=320,
        intermediate_size=640,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    for name in ("resid_pdrop", "embd_pdrop", "attention_dropout"):
        if hasattr(shape, name):
            setattr(shape, name, 0.0)
    if family == "phi":
        shape.hidden_act = "gelu_pytorch_tanh"
    base = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
    options = {"r": 8, "lora_dropout": 0.0, "target_modules": targets(family, wide)} | lora
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    wake(model)
    return model.train()


def wake(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)


def batch(lengths: tuple[int, ...] = (7, 31, 12)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    examples: list[ft.Example] = []
    for length in lengths:
        ids = torch.randint(1, 250, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [ft.IGNORE] * 3 + ids[3:]})
    return ft.flatten(examples)


def outcome(model: Any, fast: bool, half: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every weight that is learnt."""
    row = batch()
    labels = row.pop("labels")
    model.zero_grad()
    with ft.joint_layers(model, fast), ft.flat_rows(model):
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            logits = model(**row).logits
        ft.step_loss(transformers.utils.ModelOutput(logits=logits), labels, 40).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), found


def assert_alike(model: Any, atol: float = 1e-5, **how: Any) -> None:
    logits, gradients = outcome(model, fast=True, **how)
    expected_logits, expected = outcome(model, fast=False, **how)
    torch.testing.assert_close(logits, expected_logits, atol=atol, rtol=atol)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=atol, msg=name)


# -- The same mathematics


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wide", [True, False], ids=["all layers", "attention"])
def test_logits_and_gradients_are_those_of_peft(family: str, wide: bool) -> None:
    model = build(family, wide=wide)
    with ft.joint_layers(model):
        joint = sum("forward" in vars(module) for module in model.modules())
    assert joint == 2 * len(targets(family, wide))
    assert_alike(model)


def test_with_dropout_they_are_those_of_peft_with_the_same_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The chance is drawn in another way, so here both get what one of them has drawn."""
    model = build("phi", lora_dropout=0.3)
    drawn: list[torch.Tensor] = []
    real = ft.switched_off

    def switched_off(size: int, share: float, device: torch.device) -> torch.Tensor:
        drawn.append(real(size, share, device))
        return drawn[-1]

    def dropout(values: torch.Tensor, p: float, training: bool = True, *_: Any) -> torch.Tensor:
        return ft.without(values, drawn.pop(0)) / (1 - p) if training and p else values

    monkeypatch.setattr(ft, "switched_off", switched_off)
    logits, gradients = outcome(model, fast=True)
    assert len(drawn) == 12
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    expected_logits, expected = outcome(model, fast=False)
    assert not drawn
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_it_is_the_same_to_the_bit_from_run_to_run() -> None:
    model = build("phi", lora_dropout=0.1)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(outcome(model, fast=True))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name])


def test_four_bits_are_computed_alike(phi_folder: Any) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        phi_folder, quantization_config=BITS, attn_implementation="sdpa"
    )
    cfg = ft.Config(MODEL_NAME=str(phi_folder), LORA_DROPOUT=0.0)
    model = ft.add_lora(cfg, base).train()
    for module in model.modules():
        for name in ("resid_dropout", "embed_dropout"):
            if hasattr(module, name):
                setattr(module, name, torch.nn.Identity())
    wake(model)
    with ft.joint_layers(model):
        assert sum("forward" in vars(module) for module in model.modules()) == 12
    assert_alike(model)


def test_sixteen_bits_come_as_close_to_float32_as_those_of_peft() -> None:
    model = build("llama")
    exact, exact_gradients = outcome(model, fast=False)
    for fast in (True, False):
        logits, gradients = outcome(model, fast=fast, half=True)
        assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max()
        for name, gradient in gradients.items():
            away = (gradient - exact_gradients[name]).norm() / exact_gradients[name].norm()
            assert away < 0.05, (name, fast)


# -- Where it does not apply


@pytest.mark.parametrize("special", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_are_left_to_peft(special: dict[str, Any]) -> None:
    model = build("phi", **special)
    with ft.joint_layers(model):
        assert not any("forward" in vars(module) for module in model.modules())
    assert_alike(model)


def test_without_its_adapter_the_base_answers_as_before() -> None:
    model = build("phi")
    row = batch()
    row.pop("labels")
    with torch.no_grad(), ft.flat_rows(model), model.disable_adapter():
        plain = model(**row).logits
        with ft.joint_layers(model):
            assert torch.equal(model(**row).logits, plain)


def test_afterwards_all_is_as_it_was() -> None:
    model = build("phi")
    with pytest.raises(ZeroDivisionError), ft.joint_layers(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_setting_turns_it_off(phi_folder: Any, workbook: Any, run: Any) -> None:
    found = {}
    for flag in ("--fast-adapter", "--no-fast-adapter"):
        flags = ("--model-name", phi_folder, "--max-steps", 2, "--lora-dropout", 0, "--no-resume")
        with pytest.MonkeyPatch.context() as patch:
            real, uses = ft.joint_forward, [0]

            def counted(*args: Any, real: Any = real, uses: Any = uses) -> Any:
                uses[0] += 1
                return real(*args)

            patch.setattr(ft, "joint_forward", counted)
            assert run(*flags, flag)[0] == 0
        path = workbook.parent / "model" / ft.ADAPTER
        found[flag] = (uses[0], load_file(path))
    assert found["--fast-adapter"][0] > 0 == found["--no-fast-adapter"][0]
    for name, weight in found["--fast-adapter"][1].items():
        torch.testing.assert_close(
            weight, found["--no-fast-adapter"][1][name], atol=1e-5, rtol=1e-3
        )


# -- The dropout


@given(st.integers(1, 5000), st.floats(0.001, 0.9))
def test_the_places_are_some_of_those_there_are(size: int, share: float) -> None:
    places = ft.switched_off(size, share, torch.device("cpu"))
    inside = places[places < size]
    assert inside.tolist() == sorted(set(inside.tolist()))
    assert places.min() >= 0
    assert places.max() == size, "there were too few draws to come to the end"
    assert (ft.without(torch.ones(size), places) == 0).nonzero()[:, 0].tolist() == inside.tolist()


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.9])
def test_each_place_has_the_same_chance_whatever_the_others(share: float) -> None:
    torch.manual_seed(0)
    size = 1_000_000
    off = ft.without(torch.ones(size), ft.switched_off(size, share, torch.device("cpu"))) == 0
    spread = math.sqrt(share * (1 - share) / size)
    assert off.float().mean().item() == pytest.approx(share, abs=5 * spread)
    for distance in (1, 2, 7):  # both of two neighbours, as by chance
        both = (off[distance:] & off[:-distance]).float().mean().item()
        assert both == pytest.approx(share**2, abs=10 * spread)
    first = torch.stack(
        [ft.switched_off(1, share, torch.device("cpu"))[0] == 0 for _ in range(4000)]
    )
    assert first.float().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share / 4000))


# -- What is kept


def kept_by(model: Any, tokens: int = 400) -> float:
    """Bytes for a token that autograd holds on to, weights aside."""
    row = ft.flatten([{"input_ids": [1] * 100, "labels": [-100] * 99 + [1]}] * (tokens // 100))
    row.pop("labels")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with ExitStack() as open_:
        open_.enter_context(ft.joint_layers(model))
        open_.enter_context(ft.flat_rows(model))
        open_.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        output = model(**row)
    del output
    sizes = [t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights]
    return sum(sizes) / tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wide", [True, False], ids=["all layers", "attention"])
def test_what_is_kept_for_the_way_back_is_what_the_plan_counts(family: str, wide: bool) -> None:
    models = [build(family, blocks, wide) for blocks in (2, 4)]
    cfg = ft.Config(LORA_TARGETS=targets(family, wide), LORA_R=8)
    shape = ft.shape_of(cfg, copy.deepcopy(models[1].unload()))
    models[1] = build(family, 4, wide)
    in_a_block = (kept_by(models[1]) - kept_by(models[0])) / 2
    counted = ft.kept_bytes(shape, ft.Device("cpu", "float32", False, ""))
    assert counted == pytest.approx(in_a_block, rel=0.15)


# -- On an NVIDIA GPU


@pytest.fixture
def on_gpu(phi_folder: Any) -> tuple[ft.Config, ft.Device, Any]:
    """The small Phi as phi-2 is trained: NF4, 16 bits, an adapter that does something."""
    cfg = ft.Config(MODEL_NAME=str(phi_folder), LORA_DROPOUT=0.0)
    _, device = ft.device_here(cfg)
    model = ft.add_lora(cfg, ft.load_base(cfg, device)).train()
    wake(model)
    return cfg, device, model


@pytest.mark.gpu
def test_on_a_gpu_it_comes_as_close_to_float32_as_peft_does(
    on_gpu: tuple[ft.Config, ft.Device, Any],
) -> None:
    _, device, model = on_gpu
    row = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch().items()}
    labels = row.pop("labels")
    found = {}
    for fast in (True, False):
        model.zero_grad()
        with ft.joint_layers(model, fast), ft.flat_rows(model):
            with torch.autocast("cuda", getattr(torch, device.dtype)):
                output = model(**row)
            ft.step_loss(output, labels, 40).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[fast] = (output.logits.float(), gradients)
    torch.testing.assert_close(found[True][0], found[False][0], atol=0.05, rtol=0.05)
    for name, gradient in found[True][1].items():
        other = found[False][1][name]
        assert (gradient - other).norm() < 0.05 * other.norm(), name


@pytest.mark.gpu
def test_on_a_gpu_memory_is_as_foreseen(on_gpu: tuple[ft.Config, ft.Device, Any]) -> None:
    """What grows with the tokens: the weights of a model as small as this one are nothing."""
    cfg, device, model = on_gpu
    shape = ft.shape_of(cfg, ft.hollow_model(cfg))  # type: ignore[arg-type]

    def peak(tokens: int) -> int:
        row = ft.flatten(
            [{"input_ids": [1] * 200, "labels": [-100] * 100 + [1] * 100}] * (tokens // 200)
        )
        row = {k: v.cuda() if torch.is_tensor(v) else v for k, v in row.items()}
        labels = row.pop("labels")
        torch.cuda.reset_peak_memory_stats()
        with ft.joint_layers(model), ft.flat_rows(model):
            with torch.autocast("cuda", getattr(torch, device.dtype)):
                output = model(**row)
            ft.step_loss(output, labels, 100).backward()
        return torch.cuda.max_memory_allocated()

    peak(20_000)
    measured = (peak(40_000) - peak(20_000)) / 20_000
    fixed = ft.memory_of(shape, device, 0, 0.5, checkpointing=False)
    foreseen = ft.memory_of(shape, device, 1, 0.5, checkpointing=False) - fixed
    assert foreseen == pytest.approx(measured, rel=0.25)
