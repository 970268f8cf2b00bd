"""Real parts, made small: a tokenizer trained here, and a Phi with random weights."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest

import finetune_colab as ft

ROOT = Path(ft.__file__).resolve().parent

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the internet
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # two busy cores must not spin against each other

# a shell that starts the tests in the background lets them ignore signals, and they their children
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

END = "<|endoftext|>"
PAIRS = [
    (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}." + " Count on your fingers." * (a % 4))
    for a in range(2, 8)
    for b in range(3, 7)
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever terminal the tests run in, no command may wait for somebody to answer."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    cutter = Tokenizer(models.BPE())
    cutter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter.decoder = decoders.ByteLevel()
    text = [f"Instruct: {q}\nOutput: {a}" for q, a in PAIRS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    cutter.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    # like phi-2's: no pad token, and every special token is the same one
    return PreTrainedTokenizerFast(
        tokenizer_object=cutter, eos_token=END, bos_token=END, unk_token=END, model_max_length=2048
    )


@pytest.fixture(scope="session")
def phi_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A Phi in Hugging Face form: heads of 80 and a hidden size that 4 bits can hold."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=448,  # more rows than tokens, as in phi-2
            hidden_size=320,
            intermediate_size=640,
            num_hidden_layers=2,
            num_attention_heads=4,
            partial_rotary_factor=0.4,
            max_position_embeddings=2048,
            hidden_act="gelu_new",
            resid_pdrop=0.1,  # as in phi-2
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():  # phi-2's biases and norms are not the trivial ones of a fresh model
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    folder = tmp_path_factory.mktemp("models") / "tiny-phi"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_workbook(
    path: Path, rows: Sequence[Sequence[object]], **more: Sequence[Sequence[object]]
) -> Path:
    """A workbook with `rows` on its first sheet and a further sheet for each keyword."""
    book = openpyxl.Workbook()
    sheets = {"Sheet": rows, **more}
    for name, content in sheets.items():
        sheet = book.active if name == "Sheet" else book.create_sheet(name)
        for row in content:
            sheet.append(list(row))
    book.save(path)
    return path


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory: pytest.TempPathFactory, phi_folder: Path) -> Path:
    """A folder with a finished run: model/, its zip, and the workbook."""
    home = tmp_path_factory.mktemp("tuned")
    write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
    flags = ["--model-name", str(phi_folder), "--max-steps", "12", "--learning-rate", "2e-2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert ft.main([*flags, "--eval-answers", "2", "--max-tokens", "6"]) == 0
    return home


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def workbook(folder: Path) -> Path:
    return write_workbook(folder / "dataset.xlsx", [("question", "answer"), *PAIRS])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command line in this process: its exit code, and all that it printed."""

    def run(*argv: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            if "--help" not in argv:  # a model of chance never stops by itself
                patch.setattr(ft.Config, "EVAL_ANSWERS", 1)
                patch.setattr(ft.Config, "MAX_TOKENS", 3)
            code = ft.main([str(part) for part in argv])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def in_words(text: str) -> str:
    """A printed message without its line breaks."""
    return " ".join(text.split())
