"""Section 4: chat templates of every kind, taught and asked exactly as other programs use them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_colab as ft

# name: special tokens, template; in the forms that Qwen, TinyLlama, Phi-3.5, Llama 3, Mistral and Gemma use
TEMPLATES: dict[str, tuple[list[str], str]] = {
    "chatml": (
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "chatml with a default system": (
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "zephyr": (
        ["<s>", "</s>"],
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}",
    ),
    "phi-3": (
        ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    ),
    "llama-3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "{% for m in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    ),
    "gemma": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + "
        "('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + "
        "'<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
    "thinking": (  # the last answer is told with its thoughts, earlier ones without
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "no end of turn": (
        ["<s>", "</s>"],
        "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}",
    ),
}
# what others make of a whole talk is not what is asked in these
OF_ITS_OWN = ("thinking", "no end of turn")
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Co"], exclude_characters="\0"),
    max_size=40,
)


def byte_tokenizer(special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    cutter = Tokenizer(models.BPE())
    cutter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter.decoder = decoders.ByteLevel()
    text = [f"{q}\n{a} user assistant system" for q, a in PAIRS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kind = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    cutter.train_from_iterator(text, kind)
    return cutter


def sentence_tokenizer(special: list[str]) -> Any:
    """As Llama's: blanks are a sign of their own, a text begins with one, rare letters are bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    cutter = Tokenizer(models.BPE(unk_token="<unk>"))
    cutter.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    kind = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *special], show_progress=False
    )
    cutter.train_from_iterator([f"{q} {a}" for q, a in PAIRS], kind)
    model = json.loads(cutter.to_str())["model"]
    pieces = [*model["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    cutter.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    cutter.add_special_tokens([AddedToken(one, special=True) for one in special])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    cutter.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return cutter


KINDS = {"bytes": byte_tokenizer, "sentences": sentence_tokenizer}
MADE: dict[tuple[str, str], Any] = {}


def tokenizer_for(name: str, kind: str = "bytes") -> Any:
    from transformers import PreTrainedTokenizerFast

    if (name, kind) not in MADE:
        special, template = TEMPLATES[name]
        end = special[-1] if name not in ("zephyr", "mistral", "no end of turn") else "</s>"
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=KINDS[kind](special), bos_token=special[0], eos_token=end
        )
        tokenizer.chat_template = template
        MADE[name, kind] = tokenizer
    return MADE[name, kind]


def talk_of(texts: list[str]) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


every_template = pytest.mark.parametrize("name", TEMPLATES)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_template
@every_kind
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(WORDS, min_size=2, max_size=6))
def test_answers_are_learnt_with_their_end_and_nothing_else(
    name: str, kind: str, texts: list[str]
) -> None:
    tokenizer = tokenizer_for(name, kind)
    texts = texts[: len(texts) // 2 * 2]
    example = ft.encode(tokenizer, talk_of(texts), ft.CHAT_TEMPLATE)
    end = ft.end_sign(tokenizer)
    turn: list[int] = []
    told = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, ft.IGNORE)
        turn += [token] if label != ft.IGNORE else []
        if label == tokenizer.convert_tokens_to_ids(end):
            told.append(tokenizer.decode(turn, skip_special_tokens=True))
            turn = []
    assert turn == [], "every learnt turn ends"
    assert len(told) == len(texts) // 2
    for text, answer in zip(told, texts[1::2], strict=True):
        assert text.strip() == answer.strip()


@every_template
@every_kind
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(WORDS, min_size=1, max_size=5))
def test_a_prompt_is_what_was_before_the_answer_in_training(
    name: str, kind: str, texts: list[str]
) -> None:
    tokenizer = tokenizer_for(name, kind)
    texts = texts if len(texts) % 2 else texts[:-1]
    asked = ft.encode(tokenizer, talk_of(texts), ft.CHAT_TEMPLATE)["input_ids"]
    taught = ft.encode(tokenizer, talk_of([*texts, "An answer."]), ft.CHAT_TEMPLATE)["input_ids"]
    assert taught[: len(asked)] == asked


PLAIN = st.from_regex(r"[A-Z][a-z]{1,8}( [a-z]{1,8}){0,4}[.?]", fullmatch=True)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in OF_ITS_OWN])
@every_kind
@settings(max_examples=20, deadline=None)
@given(texts=st.lists(PLAIN, min_size=1, max_size=5))
def test_tokens_are_those_that_other_programs_make_of_the_template(
    name: str, kind: str, texts: list[str]
) -> None:
    tokenizer = tokenizer_for(name, kind)
    ours = ft.encode(tokenizer, talk_of(texts), ft.CHAT_TEMPLATE)["input_ids"]
    theirs = tokenizer.apply_chat_template(
        talk_of(texts), add_generation_prompt=len(texts) % 2 == 1, return_dict=True
    )["input_ids"]
    assert theirs[: len(ours)] == ours
    rest = tokenizer.decode(theirs[len(ours) :], skip_special_tokens=True)
    assert not rest.strip(), "what follows the last answer says nothing"


@every_template
@every_kind
def test_what_people_write_is_never_a_sign(name: str, kind: str) -> None:
    tokenizer = tokenizer_for(name, kind)
    tricky = " ".join(str(mark) for mark in TEMPLATES[name][0]) + " and more"
    plain = ft.encode(tokenizer, talk_of(["Why?", "So."]), ft.CHAT_TEMPLATE)["input_ids"]
    ids = ft.encode(tokenizer, talk_of([f"{tricky}?", tricky]), ft.CHAT_TEMPLATE)["input_ids"]
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in TEMPLATES[name][0]}

    def signs(tokens: list[int]) -> list[int]:
        return [token for token in tokens if token in marks]

    assert signs(ids) == signs(plain)


@every_template
def test_the_sign_at_the_end_of_a_turn_is_found(name: str) -> None:
    ends = {
        "zephyr": "</s>",
        "phi-3": "<|end|>",
        "llama-3": "<|eot_id|>",
        "mistral": "</s>",
        "gemma": "<end_of_turn>",
        "no end of turn": "</s>",
    }
    assert ft.end_sign(tokenizer_for(name)) == ends.get(name, "<|im_end|>")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['role'] }}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m[",
    ],
)
def test_a_template_that_cannot_be_used_is_not(template: str) -> None:
    import copy

    tokenizer = copy.deepcopy(tokenizer_for("chatml"))
    tokenizer.chat_template = template
    assert ft.form_of(ft.Config(), tokenizer) == ft.PROMPT_FORMAT
    assert ft.template_fault(tokenizer)


def test_the_form_is_the_persons_or_the_models_or_phi_2s() -> None:
    tokenizer = tokenizer_for("chatml")
    assert ft.form_of(ft.Config(), tokenizer) == ft.CHAT_TEMPLATE
    assert (
        ft.form_of(ft.Config(PROMPT_TEMPLATE="Q: {question} A:"), tokenizer) == "Q: {question} A:"
    )
    assert ft.form_of(ft.Config(), ft.EstimatedTokenizer()) == ft.PROMPT_FORMAT


@pytest.mark.parametrize("form", ["no blank", "{question} twice {question}"])
def test_a_form_without_one_place_for_the_question_is_refused(form: str) -> None:
    assert any(
        "PROMPT_TEMPLATE" in one for one in ft.config_problems(ft.Config(PROMPT_TEMPLATE=form))
    )
