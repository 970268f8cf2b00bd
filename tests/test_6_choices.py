"""Sections 1, 6 and 7: which layers are taught and how, presets, and what changes nothing but speed."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PAIRS, in_words, write_workbook
from test_4_templates import TEMPLATES, tokenizer_for

import finetune_colab as ft

Run = Callable[..., tuple[int, str]]
FAST = ("--max-steps", 2, "--eval-answers", 0)


def layers_of(folder: Path) -> list[str]:
    return ft.layers_in(folder / "model" / ft.ADAPTER)


@pytest.mark.parametrize(
    "flags, count, kinds",
    [
        ((), 12, "dense fc1 fc2 k_proj q_proj v_proj"),
        (("--lora-targets", "attention"), 8, "dense k_proj q_proj v_proj"),
        (("--lora-targets", "mlp"), 4, "fc1 fc2"),
        (("--lora-targets", "attention,fc2"), 10, "dense fc2 k_proj q_proj v_proj"),
        (("--lora-targets", "q_proj", "--lora-layers", "1"), 1, "q_proj"),
        (("--lora-layers", "0-1"), 12, "dense fc1 fc2 k_proj q_proj v_proj"),
    ],
)
def test_the_layers_that_are_named_are_taught(
    flags: tuple[object, ...],
    count: int,
    kinds: str,
    phi_folder: Path,
    workbook: Path,
    run: Run,
) -> None:
    code, printed = run("--model-name", phi_folder, *FAST, *flags)
    assert code == 0, printed
    layers = layers_of(workbook.parent)
    assert len(layers) == count
    assert sorted({name.rpartition(".")[2] for name in layers}) == kinds.split()
    card = (workbook.parent / "model" / "README.md").read_text()
    assert ", ".join(kinds.split()) in card
    if "--lora-layers" in flags:
        assert all(f".{number}." in name for name in layers for number in "1") or count == 12
    assert run("chat", "Why?")[0] == 0
    from transformers import AutoModelForCausalLM

    with ft.usable_peft() as peft:  # as other programs read it
        base = AutoModelForCausalLM.from_pretrained(phi_folder)
        model = peft.PeftModel.from_pretrained(base, workbook.parent / "model")
    adapted = {
        name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name
    }
    assert {name.removeprefix("base_model.model.") for name in adapted} == set(layers)


@pytest.mark.parametrize(
    "flags, what",
    [
        (("--lora-layers", "2"), "names block 2"),
        (("--lora-layers", "all"), "is no list of blocks"),
        (("--lora-layers", "3-1"), "is no list of blocks"),
        (("--lora-targets", "attention,o_proj"), "LORA_TARGETS names o_proj"),
    ],
)
def test_layers_that_are_not_there_are_refused(
    flags: tuple[object, ...], what: str, phi_folder: Path, workbook: Path, run: Run
) -> None:
    code, printed = run("--model-name", phi_folder, *FAST, *flags)
    assert code == 2
    assert what in in_words(printed)


@pytest.mark.parametrize(
    "flags",
    [
        ("--use-rslora",),
        ("--use-dora",),
        ("--use-dora", "--load-in-4bit"),
        ("--lora-init", "gaussian"),
    ],
)
def test_ways_to_adapt_learn_and_come_back(
    flags: tuple[object, ...], phi_folder: Path, workbook: Path, run: Run
) -> None:
    more = ("--max-steps", 8, "--learning-rate", 1e-2, "--eval-answers", 0)
    code, printed = run("--model-name", phi_folder, *more, *flags)
    assert code == 0, printed
    metrics = json.loads(
        (workbook.parent / "model/training_visuals/training_metrics.json").read_text()
    )
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    tuned = ft.load_tuned(workbook.parent / "model")
    data = ft.prepare(ft.Config(MODEL_NAME=str(phi_folder)))
    assert ft.mean_loss(tuned.model, data.held_out, 512) == pytest.approx(
        metrics["eval_loss"], rel=0.02 if "--load-in-4bit" in flags else 1e-4
    )
    if "--load-in-4bit" not in flags:
        assert run("export", "--to", "merged")[0] == 0


def test_rslora_is_stronger_by_the_root_of_the_rank(phi_folder: Path) -> None:
    cfg = ft.Config(MODEL_NAME=str(phi_folder), LORA_R=16, LORA_ALPHA=16, USE_RSLORA=True)
    model = ft.add_lora(cfg, ft.load_base(cfg, ft.Device("cpu", "float32", False, "")))
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {4.0}


# -- Presets


@pytest.mark.parametrize("preset", ft.PRESETS)
def test_a_preset_says_what_it_sets_and_runs(
    preset: str, phi_folder: Path, workbook: Path, run: Run
) -> None:
    _, cfg = ft.read_command_line(["--preset", preset])
    assert {name: getattr(cfg, name) for name in ft.PRESETS[preset]} == ft.PRESETS[preset]
    code, printed = run("--model-name", phi_folder, "--preset", preset, *FAST)
    assert code == 0, printed
    told = in_words(printed)
    for name, value in ft.PRESETS[preset].items():
        if name != "EVAL_ANSWERS":
            assert f"{name} {ft.as_text(value)}" in told
    assert f"{preset} sets" in told
    assert "EVAL_ANSWERS 5 (yours: 0)" in told or preset != "quick"
    settings = json.loads((workbook.parent / "model/run.json").read_text())["settings"]
    assert settings["LORA_R"] == ft.PRESETS[preset].get("LORA_R", ft.Config.LORA_R)


def test_flags_and_files_win_over_a_preset(folder: Path) -> None:
    Path("mine.yaml").write_text("NUM_EPOCHS: 3\nPRESET: quick\n")
    _, cfg = ft.read_command_line(["--config", "mine.yaml", "--lora-r", "4"])
    assert (cfg.NUM_EPOCHS, cfg.LORA_R, cfg.LORA_ALPHA) == (3, 4, 16)


# -- What is the same, only slower or noisier


@pytest.fixture
def curve(phi_folder: Path, workbook: Path, run: Run) -> Iterator[Callable[..., list[float]]]:
    def curve(*flags: object) -> list[float]:
        place = f"out{len([*workbook.parent.glob('out*')])}"
        more = ("--max-steps", 6, "--learning-rate", 1e-2, "--lora-dropout", 0, "--eval-answers", 0)
        folders = ("--output-dir", place, "--checkpoint-dir", f"{place}-c")
        assert run("--model-name", phi_folder, *more, *folders, *flags)[0] == 0
        table = Path(place, "training_visuals/training_metrics.csv").read_text().splitlines()
        return [float(row["loss"]) for row in csv.DictReader(table) if row["loss"]]

    yield curve


def test_a_row_for_each_pair_gives_the_same_training(curve: Callable[..., list[float]]) -> None:
    assert curve("--no-packing") == pytest.approx(curve(), rel=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for processors with it")
def test_compiled_parts_give_the_same_training(curve: Callable[..., list[float]]) -> None:
    assert curve("--torch-compile", "--lora-targets", "fc2") == pytest.approx(
        curve("--lora-targets", "fc2"), rel=1e-4
    )


def test_without_a_compiler_it_is_a_message(
    phi_folder: Path, workbook: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workbook.parent / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    code, printed = run("--model-name", phi_folder, *FAST, "--torch-compile")
    assert code == 2
    assert "TORCH_COMPILE does not work here" in in_words(printed)


def test_noise_changes_the_training_and_not_the_measuring(
    curve: Callable[..., list[float]],
) -> None:
    quiet, noisy = curve(), curve("--neftune-alpha", 50)
    assert noisy[0] != pytest.approx(quiet[0], rel=1e-4)
    assert noisy == curve("--neftune-alpha", 50), "the noise is that of the seed"


def test_the_noise_is_weaker_the_longer_the_example(phi_folder: Path) -> None:
    import torch

    cfg = ft.Config(MODEL_NAME=str(phi_folder))
    model = ft.add_lora(cfg, ft.load_base(cfg, ft.Device("cpu", "float32", False, "")))
    examples: list[ft.Example] = [
        {"input_ids": [5] * n, "labels": [ft.IGNORE, *[5] * (n - 1)]} for n in (4, 64)
    ]
    seen: list[Any] = []
    words = model.get_input_embeddings()
    batch = ft.flatten(examples)
    batch.pop("labels")
    with ft.flat_rows(model), ft.noisy_words(model, 10.0):
        watch = words.register_forward_hook(lambda *args: seen.append(args[-1].detach()))
        for training in (True, False):
            model.train(training)
            model(**batch)
        watch.remove()
    exact = words(torch.tensor([5]))[0]
    short, long = (part - exact for part in seen[0][0].split([4, 64]))
    assert short.abs().max() <= 10 / math.sqrt(4 * 320)
    assert short.std() / long.std() == pytest.approx(4, rel=0.1)
    assert torch.equal(seen[1][0], exact.expand(68, -1)), "no noise while measuring"
    assert not words._forward_hooks


# -- Families with chat templates, from the workbook to the answer


def make_chat_model(family: str, template: str, folder: Path) -> None:
    import torch
    import transformers as tf

    torch.manual_seed(0)
    tokenizer = tokenizer_for(template, "bytes" if family == "Qwen2" else "sentences")
    shape: dict[str, Any] = {
        **{"vocab_size": 640, "hidden_size": 320, "intermediate_size": 640},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2048},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        "tie_word_embeddings": False,
    }
    if family in ("GPT2", "Falcon", "Mamba"):
        del shape["intermediate_size"]
    elif family != "Phi3":
        shape["num_key_value_heads"] = 2
    config = getattr(tf, f"{family}Config")(**shape)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # of chance, they are too much alike for a sure answer
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "family, template",
    [
        ("Llama", "zephyr"),
        ("Llama", "llama-3"),
        ("Phi3", "phi-3"),
        ("Qwen2", "chatml with a default system"),
        ("Qwen3", "thinking"),
        ("Mistral", "mistral"),
        ("Gemma", "gemma"),
        ("StableLm", "no end of turn"),
        ("GPT2", "chatml with a default system"),  # its layers are of another kind, Conv1D
        ("Falcon", "zephyr"),  # these have attention, or what they have instead, of their own
        ("Gemma2", "gemma"),
        ("Mamba", "zephyr"),
    ],
)
def test_every_family_learns_to_answer_and_to_stop(
    family: str, template: str, folder: Path, run: Run
) -> None:
    make_chat_model(family, template, folder / "base")
    pairs = [(f"Say {word}.", word) for word in ("yes", "no", "one", "two", "three", "four")]
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *pairs])
    more = ("--max-steps", 60, "--learning-rate", 2e-3, "--validation-fraction", 0)
    code, printed = run("--model-name", "./base", *more, "--eval-answers", 0)
    assert code == 0, printed
    record = json.loads((folder / "model/run.json").read_text())
    assert record["prompt_format"] == ft.CHAT_TEMPLATE
    tuned = ft.load_tuned(folder / "model")
    prompts = [ft.prompt_of(tuned, [ft.asked_by_user(q)], ft.Config()) for q, _ in pairs]
    told = ft.answers(tuned.model, tuned.tokenizer, prompts, ft.Config(MAX_TOKENS=12))
    assert [one.text for one in told] == [answer for _, answer in pairs]
    assert all(one.stopped for one in told)
    assert tuned.tokenizer.eos_token in TEMPLATES[template][0]
    code, printed = run("chat", "--max-tokens", 12, "Say two.")
    assert (code, printed.splitlines()[0]) == (0, "two")


def test_a_model_that_reads_one_pair_a_row_is_measured_too(folder: Path, run: Run) -> None:
    make_chat_model("Gemma2", "gemma", folder / "base")
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *PAIRS])
    code, printed = run("--model-name", "./base", "--max-steps", 3, "--eval-steps", 1)
    assert code == 0, printed
    assert "cannot read several pairs in one row" in in_words(printed)
    metrics = json.loads((folder / "model/training_visuals/training_metrics.json").read_text())
    tuned = ft.load_tuned(folder / "model")
    data = ft.prepare(ft.Config(MODEL_NAME="./base"))
    assert ft.mean_loss(tuned.model, data.held_out, 512) == pytest.approx(
        metrics["eval_loss"], rel=1e-4
    )


def test_an_own_form_is_taught_and_asked(phi_folder: Path, workbook: Path, run: Run) -> None:
    form = "Q: {question}\nA:"
    assert run("--model-name", phi_folder, *FAST, "--prompt-template", form)[0] == 0
    record = json.loads((workbook.parent / "model/run.json").read_text())
    assert record["prompt_format"] == form
    tuned = ft.load_tuned(workbook.parent / "model")
    ids = ft.prompt_of(tuned, [ft.asked_by_user(PAIRS[0][0])], ft.Config())
    assert tuned.tokenizer.decode(ids) == f"Q: {PAIRS[0][0]}\nA:"
    card = (workbook.parent / "model/README.md").read_text()
    assert "Q: {question}" in card


def test_a_form_may_be_typed_into_a_shell(phi_folder: Path, workbook: Path, run: Run) -> None:
    form = r"### Q:\n{question}\n### A:\n"
    assert run("--model-name", phi_folder, *FAST, "--prompt-template", form)[0] == 0
    record = json.loads((workbook.parent / "model/run.json").read_text())
    assert record["prompt_format"] == "### Q:\n{question}\n### A:\n"


def test_a_form_with_signs_of_the_model_is_refused(folder: Path, run: Run) -> None:
    make_chat_model("Qwen2", "chatml with a default system", folder / "base")
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *PAIRS])
    form = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    code, printed = run("--model-name", "./base", "--prompt-template", form)
    assert code == 2
    assert "PROMPT_TEMPLATE has <|im_start|>, a sign of this model" in in_words(printed)


def test_a_date_in_the_chat_template_makes_no_new_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(days=1)

    make_chat_model("Llama", "zephyr", folder / "base")
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *PAIRS])
    template = "{{ strftime_now('%d %m %Y') }} " + TEMPLATES["zephyr"][1]
    (folder / "base/chat_template.jinja").write_text(template)
    cfg, device = ft.Config(MODEL_NAME="./base"), ft.Device("cpu", "float32", False, "")
    first = ft.prepare(cfg)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    second = ft.prepare(cfg)
    assert first.form == ft.CHAT_TEMPLATE
    assert first.train[0]["input_ids"] != second.train[0]["input_ids"]
    assert ft.identity_of(cfg, first, device) == ft.identity_of(cfg, second, device)
    other = ft.prepare(ft.Config(MODEL_NAME="./base", SEED=1))
    assert ft.taught(other) != ft.taught(first)


def test_attention_is_attention_alone(folder: Path) -> None:
    """GPT-2 calls the last layer of both parts c_proj."""
    make_chat_model("GPT2", "zephyr", folder / "base")
    cfg = ft.Config(MODEL_NAME="./base", LORA_TARGETS=["attention"])
    base = ft.load_base(cfg, ft.Device("cpu", "float32", False, ""))
    wanted = {f"transformer.h.{n}.attn.{kind}" for n in (0, 1) for kind in ("c_attn", "c_proj")}
    assert set(ft.adapted_layers(cfg, base)) == wanted
    model = ft.add_lora(cfg, base)
    learnt = {
        name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad
    }
    assert {name.removeprefix("base_model.model.") for name in learnt} == wanted


def test_demo_learns_by_heart_whatever_the_preset() -> None:
    _, cfg = ft.read_command_line(["demo", "--preset", "quick"])
    assert (cfg.MAX_STEPS, cfg.LORA_R) == (400, 8)
    _, cfg = ft.read_command_line(["demo", "--preset", "quality"])
    assert cfg.LEARNING_RATE == 1e-2


def test_a_chat_template_that_is_not_used_is_said_once(folder: Path, run: Run) -> None:
    make_chat_model("Llama", "zephyr", folder / "base")
    (folder / "base/chat_template.jinja").write_text("{{ raise_exception('no') }}")
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *PAIRS])
    code, printed = run("check", "--model-name", "./base")
    assert code == 0, printed
    assert in_words(printed).count("the chat template of ./base is not used") == 1
