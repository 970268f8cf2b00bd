"""Section 6: whatever the architecture, a row gives what its examples give alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import finetune_colab as ft

SIZES: dict[str, Any] = {  # under all the names that architectures have for them
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 48),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "state_size"], 8),
    **dict.fromkeys(["mamba_d_state", "mamba_n_heads", "sliding_window"], 8),
    **dict.fromkeys(["mamba_n_groups", "n_group", "topk_group"], 1),
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "mamba_d_head": 16},
    **{"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"attention_hidden_size": 64, "attention_types": [[["global", "local"], 1]]},
}
SHARING = (
    "apertus arcee cohere cohere2 deepseek_v2 ernie4_5 exaone4 gemma gemma3_text glm glm4 gpt2 gpt_bigcode "
    "gpt_neox granite granitemoe helium llama mistral mixtral nemotron olmo olmo2 olmo3 opt persimmon phi "
    "phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2"
).split()
ALONE = (  # those with a state, a memory of another kind, or attention of their own
    "bamba bloom codegen falcon gemma2 gpt_neo gpt_oss gptj jamba mamba minimax mpt qwen3_next "
    "recurrent_gemma rwkv xglm"
).split()


def tiny(name: str) -> Any:
    """A model of this architecture with weights of chance; where it has a window, of 8 tokens."""
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of transformers does not have it")
    known = AutoConfig.for_model(name).to_dict()
    sizes = {key: size for key, size in SIZES.items() if key in known}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).float().eval()


@pytest.mark.parametrize("name", [*SHARING, *ALONE])
def test_a_row_gives_what_its_examples_give_alone(name: str) -> None:
    model = tiny(name)
    texts = [list(range(3, 23)), list(range(40, 70)), list(range(100, 105))]
    examples = [ft.Example(input_ids=ids, labels=[ft.IGNORE] * 2 + ids[2:]) for ids in texts]
    with torch.no_grad():
        usual = [
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 1:-1] for ids in texts
        ]
    losses = [
        torch.nn.functional.cross_entropy(logits, torch.tensor(ids[2:]), reduction="sum").item()
        for logits, ids in zip(usual, texts, strict=True)
    ]
    mean = sum(losses) / sum(len(ids) - 2 for ids in texts)
    assert ft.mean_loss(model, examples, 512) == pytest.approx(mean, rel=1e-5)
    assert model.may_share_rows == (name in SHARING)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
