"""Section 6: the base as published, an adapter on the layers asked for, examples kept apart."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIRS

import finetune_colab as ft

CPU = ft.Device("cpu", "float32", False, "")
CPU_4BIT = ft.Device("cpu", "float32", True, "")


@pytest.fixture
def cfg(phi_folder: Path) -> ft.Config:
    return ft.Config(MODEL_NAME=str(phi_folder), LORA_DROPOUT=0.0)


def encoded(tokenizer: Any, count: int = 5) -> list[ft.Example]:
    roles = ("user", "assistant")
    return [
        ft.encode(tokenizer, [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)])
        for pair in PAIRS[:count]
    ]


def test_the_base_is_loaded_in_the_asked_numbers_with_sdpa(cfg: ft.Config) -> None:
    base = ft.load_base(cfg, CPU)
    assert base.dtype == torch.float32
    assert base.config._attn_implementation == "sdpa"
    assert base.config.hidden_act == "gelu_pytorch_tanh"


def test_the_one_kernel_gelu_is_the_same_function() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-8, 8, 4001)
    torch.testing.assert_close(
        ACT2FN["gelu_pytorch_tanh"](x), ACT2FN["gelu_new"](x), atol=1e-6, rtol=1e-6
    )


def test_four_bit_weights_are_nf4_with_double_quantisation(cfg: ft.Config) -> None:
    import bitsandbytes as bnb

    base = ft.load_base(cfg, CPU_4BIT)
    layers = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 12
    for layer in layers:
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested


def test_only_the_named_layers_are_adapted(cfg: ft.Config) -> None:
    cfg.LORA_TARGETS = ["q_proj", "fc2"]
    model = ft.add_lora(cfg, ft.load_base(cfg, CPU))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    assert all(("q_proj" in name) ^ ("fc2" in name) for name in trained)


def test_a_target_that_matches_nothing_is_named(cfg: ft.Config) -> None:
    cfg.LORA_TARGETS = ["q_proj", "o_proj"]
    with pytest.raises(ft.UserError, match=r"o_proj(.|\n)*dense, fc1, fc2, k_proj, q_proj, v_proj"):
        ft.add_lora(cfg, ft.load_base(cfg, CPU))


def test_a_model_that_is_not_there_is_one_message(folder: Path) -> None:
    with pytest.raises(ft.UserError, match="MODEL_NAME"):
        ft.load_tokenizer(ft.Config(MODEL_NAME="nobody/nothing"))


def test_phi_2_is_pinned_and_no_other_model_gets_its_commit() -> None:
    assert ft.model_revision(ft.Config()) == "ef382358ec9e382308935a992d908de099b64c23"
    assert ft.model_revision(ft.Config(MODEL_NAME="someone/other")) is None
    assert ft.model_revision(ft.Config(MODEL_REVISION="abc")) == "abc"


def test_examples_in_one_row_do_not_see_each_other(cfg: ft.Config, tokenizer: Any) -> None:
    """The logits of the flat row are those of each example run by itself, without our attention."""
    model = ft.load_base(cfg, CPU).eval()
    examples = encoded(tokenizer)
    with torch.no_grad():
        alone = []
        for one in examples:
            logits = model(torch.tensor([one["input_ids"]])).logits[0, :-1]
            keep = torch.tensor(one["labels"][1:]) != ft.IGNORE
            alone.append(logits[keep])
        batch = ft.flatten(examples)
        del batch["labels"]
        with ft.flat_rows(model):
            together = model(**batch).logits[0]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_flat_attention_refuses_a_row_without_lengths(cfg: ft.Config, tokenizer: Any) -> None:
    model = ft.load_base(cfg, CPU).eval()
    batch = ft.flatten(encoded(tokenizer))
    del batch["labels"], batch["lengths"]
    with ft.flat_rows(model), pytest.raises(KeyError, match="lengths"):
        model(**batch)


def test_the_usual_attention_is_back_afterwards(cfg: ft.Config) -> None:
    model = ft.load_base(cfg, CPU)
    with pytest.raises(RuntimeError), ft.flat_rows(model):
        assert model.config._attn_implementation == ft.FLAT_ATTENTION
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


def test_grouped_heads_are_attended_alike(tokenizer: Any) -> None:
    """Models with fewer key heads than query heads go the same way."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 320, "intermediate_size": 320, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "partial_rotary_factor": 0.4}
    model = PhiForCausalLM(PhiConfig(vocab_size=448, **shape, **heads)).eval()
    first, second = encoded(tokenizer, 2)
    batch = ft.flatten([first, second])
    batch.pop("labels")
    with torch.no_grad():
        alone = model(torch.tensor([second["input_ids"]])).logits[0, :-1]
        alone = alone[torch.tensor(second["labels"][1:]) != ft.IGNORE]
        with ft.flat_rows(model):
            together = model(**batch).logits[0, -len(alone) :]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version, hidden", [("0.10.0", True), ("0.17.0", False)])
def test_an_old_torchao_is_left_aside(
    version: str, hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("")
    info = tmp_path / f"torchao-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchao\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchao", None)  # so that the test's end removes the mark
    del sys.modules["torchao"]
    with ft.usable_peft():
        assert (importlib.util.find_spec("torchao") is None) == hidden
    assert ("torchao" in capsys.readouterr().out) == hidden


def test_saving_an_adapter_asks_nothing_of_the_hub(
    cfg: ft.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import save_and_load

    def asked(*_: Any, **__: Any) -> bool:
        raise AssertionError("the Hub was asked")

    model = ft.add_lora(cfg, ft.load_base(cfg, CPU))
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", asked)
    model.peft_config["default"].base_model_name_or_path = "microsoft/phi-2"
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_only_dropout_is_that_of_the_adapter(cfg: ft.Config) -> None:
    base = ft.load_base(cfg, CPU)
    assert {m.p for m in base.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize("harm", ["truncated weights", "no tokenizer", "no such folder"])
def test_a_folder_without_a_whole_model_is_one_message(
    phi_folder: Path, tmp_path: Path, harm: str
) -> None:
    import shutil

    broken = tmp_path / "broken"
    if harm != "no such folder":
        shutil.copytree(phi_folder, broken)
    if harm == "truncated weights":
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif harm == "no tokenizer":
        for path in broken.glob("tokenizer*"):
            path.unlink()
    cfg = ft.Config(MODEL_NAME=str(broken))
    with pytest.raises(ft.UserError, match="could not be loaded"):
        ft.load_tokenizer(cfg)
        ft.load_base(cfg, CPU)
