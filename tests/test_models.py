"""Any model: how it is loaded, which of its layers are adapted and how, and that it learns and is measured."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import seams
import torch
import transformers
from conftest import Run, in_words, metrics, sweep, write_workbook
from peft.import_utils import is_torchao_available
from safetensors import safe_open
from tables import cases, marked, rows_of
from test_prompts import TEMPLATES, tokenizer_for
from test_steps import examples_of
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAST = ("--max-steps", 1, "--eval-answers", 0)


@pytest.mark.parametrize("case", cases("refused_models").values())
def test_no_whole_model_and_layers_that_are_not_there_are_refused(
    phi_folder: Path, workbook: Path, run: Run, case: str
) -> None:
    _, harm, flags, told = case.split(" | ")
    act, _, pattern = harm.partition(" ")
    if pattern:
        shutil.copytree(phi_folder, "broken")
    for path in Path("broken").glob(pattern or "-"):
        os.truncate(path, 1000) if act == "truncate" else path.unlink()
    code, printed = run("--model-name", "./broken" if harm else phi_folder, *FAST, *flags.split())
    assert (code, "Traceback" in printed) == (2, False)
    assert re.search(told, in_words(printed))


@pytest.mark.parametrize("version, hidden", [("0.10.0", True), ("0.17.0", False)])
def test_a_torchao_too_old_for_peft_does_no_harm(
    phi_folder: Path, folder: Path, patched: Any, version: str, hidden: bool
) -> None:
    """As Colab's is."""
    needed = "class A: pass\nTorchAOBaseTensor = AffineQuantizedTensor = LinearActivationQuantizedTensor = A"
    texts = {f"torchao/{part}.py": needed for part in ("utils", "dtypes", "quantization")} | {"torchao/__init__.py": ""}
    texts[f"torchao-{version}.dist-info/METADATA"] = f"Name: torchao\nVersion: {version}\n"
    for place, text in texts.items():
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text(text)
    base = seams.load_base(phi_folder)
    patched.syspath_prepend(str(folder))
    for name in ("torchao", "torchao.utils"):  # so that the test's end removes them
        patched.setitem(sys.modules, name, None)
        del sys.modules[name]
    is_torchao_available.cache_clear()
    try:
        seams.add_lora(base)
    finally:
        is_torchao_available.cache_clear()
    assert (importlib.util.find_spec("torchao") is None) == hidden


@pytest.mark.parametrize("case", marked("adapted_layers"))
def test_the_layers_that_are_named_are_taught(
    phi_folder: Path, workbook: Path, run: Run, patched: Any, case: str
) -> None:
    family, targets, blocks, count, kinds = case.split(" | ")[1:]
    base = phi_folder if family == "Phi" else make_chat_model(family, "zephyr", Path("base"))

    def asked(*_: Any, **__: Any) -> bool:
        raise AssertionError("saving an adapter asks nothing of the Hub")

    patched.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    flags = ("--lora-targets", targets, "--lora-layers", blocks)
    code, printed = run("--model-name", base, *FAST, *flags)
    assert code == 0, printed
    with safe_open("model/adapter_model.safetensors", "pt") as file:
        layers = {name.partition(".lora_")[0] for name in file.keys()}  # noqa: SIM118
    assert len(layers) == int(count)
    assert sorted({name.rpartition(".")[2] for name in layers}) == kinds.split()
    place = ".attn." if family == "GPT2" else f".{blocks}." if blocks == "1" else "."
    assert all(place in name for name in layers)
    assert ", ".join(kinds.split()) in Path("model/README.md").read_text()
    published = transformers.AutoModelForCausalLM.from_pretrained(base)
    others = peft.PeftModel.from_pretrained(published, "model")  # as other programs read it
    assert {n.partition(".lora_")[0] for n, _ in others.named_parameters() if "lora_" in n} == layers


@pytest.mark.parametrize("flags, strength", rows_of("adapters"))
def test_every_way_to_adapt_learns_and_comes_back(
    phi_folder: Path, workbook: Path, run: Run, flags: str, strength: str
) -> None:
    more = "--max-steps 8 --learning-rate 1e-2 --eval-answers 0 --lora-r 16 --lora-alpha 16".split()
    code, printed = run("--model-name", phi_folder, *more, *flags.split())
    assert code == 0, printed
    figures, tuned = metrics(), seams.load_tuned(Path("model")).model
    assert figures["eval_loss"] < figures["base_eval_loss"]
    close = pytest.approx(figures["eval_loss"], rel=0.02 if "4bit" in flags else 1e-4)
    assert seams.mean_loss(tuned, examples_of(phi_folder, held_out=True)) == close
    assert {m.scaling["default"] for m in tuned.modules() if hasattr(m, "lora_A")} == {float(strength)}
    settings = json.loads(Path("model/adapter_config.json").read_text())
    assert [settings["use_rslora"], settings["use_dora"]] == ["rslora" in flags, "dora" in flags]
    assert "4bit" in flags or run("export", "--to", "merged")[0] == 0


@pytest.mark.parametrize("case", marked("presets"))
def test_a_preset_says_what_it_sets_and_gives_way_to_files_flags_and_the_demo(
    small_phi: Path, workbook: Path, run: Run, case: str
) -> None:
    flags, settings, told = case.removeprefix("sweep ").split(" | ")
    Path("mine.yaml").write_text("NUM_EPOCHS: 3\nPRESET: quick\n")
    base = () if "demo" in flags else ("--model-name", small_phi)
    code, printed = run(*flags.split(), *base, *FAST)
    assert code == 0, printed
    assert re.search(told, in_words(printed))
    assert json.loads(settings).items() <= json.loads(Path("model/run.json").read_text())["settings"].items()


def make_chat_model(family: str, template: str, folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tokenizer_for(template, "bytes" if family == "Qwen2" else "sentences")
    shape: dict[str, Any] = {"vocab_size": 640, "hidden_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    shape |= {} if family in ("GPT2", "Falcon", "Mamba") else {"intermediate_size": 640}
    shape |= {} if family in ("GPT2", "Falcon", "Mamba", "Phi3") else {"num_key_value_heads": 2}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**shape))
    with torch.no_grad():  # of chance, they are too much alike for a sure answer
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_configuration_alone_tells_what_the_layers_are(tied: bool) -> None:
    sizes = {"vocab_size": 640, "hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    told, built = seams.outlines(transformers.PhiConfig(**sizes, **heads))
    assert told == built._replace(parameters=pytest.approx(built.parameters, rel=0.01))  # but for biases and norms


@pytest.mark.parametrize("family, template", rows_of("chat_families"))
def test_every_family_learns_to_answer_and_to_stop(folder: Path, run: Run, family: str, template: str) -> None:
    base = make_chat_model(family, template, folder / "base")
    pairs = [(f"Say {word}.", word) for word in ("yes", "no", "one", "two", "three", "four")]
    write_workbook(folder / "dataset.xlsx", [("question", "answer"), *pairs])
    more = ("--max-steps", 60, "--learning-rate", 2e-3, "--validation-fraction", 0)
    code, printed = run("--model-name", base, *more, "--eval-answers", 0)
    assert code == 0, printed
    tuned = seams.load_tuned(folder / "model")
    assert tuned.tokenizer.chat_template == TEMPLATES[template][2]
    told = seams.ask(tuned, *(question for question, _ in pairs), MAX_TOKENS=12)
    assert [(one.text, one.stopped) for one in told] == [(answer, True) for _, answer in pairs]
    assert tuned.tokenizer.eos_token == TEMPLATES[template][1]
    code, printed = run("chat", "--max-tokens", 12, "Say two.")
    assert (code, printed.splitlines()[0]) == (0, "two")


SIZES = {name: int(n) for n, case in cases("sizes").items() for name in case.split()[1:]}
SHARING, ALONE = (row.split(" | ")[1].split() for row in cases("architectures").values())


def save_model(name: str, folder: Path) -> Any:
    """With weights of chance; where it has a window, of 8 tokens."""
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of transformers does not have it")
    known = transformers.AutoConfig.for_model(name).to_dict()
    sizes: dict[str, Any] = {name: n for name, n in SIZES.items() if name in known}
    sizes |= {"attention_types": [[["global", "local"], 1]]} if "attention_types" in known else {}
    sizes |= {n: 0.1 for n in known if n.endswith(("pdrop", "dropout")) and isinstance(known[n], float)}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **sizes)).float()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", [
    name if name in every[: every.index(".")] else sweep(name) for every in (SHARING, ALONE) for name in every if name != "."
])  # fmt: skip
def test_a_row_gives_what_its_examples_give_alone_in_the_published_model(name: str, tmp_path: Path) -> None:
    """Also while it learns: the only dropout is that of the adapter."""
    published, losses = save_model(name, tmp_path), []
    model = seams.load_base(tmp_path).train()
    texts = [list(range(3, 23)), list(range(40, 70)), list(range(100, 105))]
    for ids in texts:
        with torch.no_grad():
            logits, ours = (one(torch.tensor([ids]), use_cache=False).logits for one in (published, model))
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
        losses += torch.nn.functional.cross_entropy(logits[0, 1:-1], torch.tensor(ids[2:]), reduction="none").tolist()
    examples = [{"input_ids": ids, "labels": [seams.IGNORE] * 2 + ids[2:]} for ids in texts]
    mean = sum(losses) / len(losses)
    assert seams.mean_loss(model, examples, 512) == pytest.approx(mean, rel=1e-5)
    assert name in ("gemma2", "stablelm") or seams.may_share_rows(model) == (name in SHARING)  # other versions let them
    assert not model._forward_hooks and not model._forward_pre_hooks
