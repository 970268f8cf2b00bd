"""Real parts, made small: a tokenizer trained here, a Phi with random weights, and runs of the script.

A run takes a second or two, so what many tests look at is trained once and copied: `finished`.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Two workers share two cores, and no library may take both or spin while it waits.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # no test may reach the internet

import openpyxl
import pytest
from seams import Config, main

Run = Callable[..., tuple[int, str]]
Patch = pytest.MonkeyPatch

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
ONE_DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Two workers, where pytest-xdist is there; -n 0 asks for none."""
    is_worker = hasattr(config, "workerinput")
    if config.pluginmanager.hasplugin("xdist") and not is_worker:
        chosen = config.option
        alone = chosen.collectonly or chosen.usepdb or config.args != ["tests"]
        if chosen.numprocesses is None and not chosen.tx and not alone:
            chosen.numprocesses = 2
            chosen.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """Names of files that are no text may be in what was printed, and no worker can send them."""
    report: Any = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever terminal the tests run in, no command may wait for somebody to answer."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture(autouse=True)
def dots_for_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is a third of a short run, so only tests marked `pictures` draw."""
    if "pictures" in request.keywords:
        return
    from matplotlib.figure import Figure

    def savefig(_: Figure, target: Any, **__: Any) -> None:
        target.write(ONE_DOT) if hasattr(target, "write") else Path(target).write_bytes(ONE_DOT)

    monkeypatch.setattr(Figure, "savefig", savefig)


def sweep(*row: Any, marks: Any = ()) -> Any:
    """A row of a table that only the long run takes: python -m pytest -m sweep."""
    return pytest.param(*row, marks=[pytest.mark.sweep, *marks])


# -- Models


def train_tokenizer(texts: Sequence[str], size: int = 400) -> Any:
    """Like phi-2's: byte pairs, no pad token, and every special token is the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, unk_token=END, model_max_length=2048
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([f"Instruct: {q}\nOutput: {a}" for q, a in PAIRS])


def save_phi(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """A Phi in Hugging Face form; its heads of 80 and hidden size of 320 are what 4 bits can hold."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 448,  # more rows than tokens, as in phi-2
        "hidden_size": 320,
        "intermediate_size": 640,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "partial_rotary_factor": 0.4,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu_new",
        "resid_pdrop": 0.1,  # as in phi-2
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**shape | changes))
    with torch.no_grad():  # phi-2's biases and norms are not the trivial ones of a fresh model
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def phi_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_phi(tmp_path_factory.mktemp("models") / "tiny-phi", tokenizer)


@pytest.fixture(scope="session")
def small_phi(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """One block, one head: where only the run around it matters."""
    shape = {"hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("models") / "small-phi"
    return save_phi(folder, tokenizer, **shape, num_attention_heads=1)


# -- Runs

TUNED = "--max-steps 12 --learning-rate 2e-2 --eval-answers 2 --exam-questions 3 --max-tokens 6".split()


def write_workbook(path: Path, rows: Sequence[Sequence[object]], **more: Sequence[Sequence[object]]) -> Path:
    """A workbook with `rows` on its first sheet and a further sheet for each keyword."""
    book = openpyxl.Workbook()
    for name, content in {"Sheet": rows, **more}.items():
        sheet = book.active if name == "Sheet" else book.create_sheet(name)
        for row in content:
            sheet.append(list(row))
    book.save(path)
    return path


def call(folder: Path, *argv: object) -> int:
    """The exit code of a command line, run in this process with `folder` as working folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return main([str(part) for part in argv])
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory: pytest.TempPathFactory, phi_folder: Path) -> Path:
    """A folder with a finished run: model/, its zip, its logs and the workbook. Only to be read."""
    home = tmp_path_factory.mktemp("tuned")
    write_workbook(home / "dataset.xlsx", [("question", "answer"), *PAIRS])
    assert call(home, "--model-name", phi_folder, *TUNED) == 0
    return home


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def finished(tuned_run: Path, folder: Path) -> Path:
    """The working folder with a copy of the finished run, to do with as one likes."""
    shutil.copytree(tuned_run, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def again(finished: Path, phi_folder: Path, run: Run) -> Run:
    """The command of the finished run once more: it trains nothing, and writes the result anew."""
    return lambda *more: run("--model-name", phi_folder, *TUNED, *more)


@pytest.fixture
def workbook(folder: Path) -> Path:
    return write_workbook(folder / "dataset.xlsx", [("question", "answer"), *PAIRS])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: its exit code, and all that it printed."""

    def run(*argv: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            if "--help" not in argv:  # random weights never stop by themselves
                patch.setattr(Config, "EVAL_ANSWERS", 1)
                patch.setattr(Config, "EXAM_QUESTIONS", 1)
                patch.setattr(Config, "MAX_TOKENS", 3)
            code = main([str(part) for part in argv])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def metrics(home: Path = Path()) -> dict[str, Any]:
    """The figures of the finished run in this folder."""
    text = (home / "model/training_visuals/training_metrics.json").read_text()
    assert not re.search("NaN|Infinity", text)
    return dict(json.loads(text))


def in_words(text: str) -> str:
    """A printed message without its line breaks."""
    return " ".join(text.split())


# -- Faults, injected where the script meets the libraries and the system


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something in the middle of one step of a training: just before the weights change."""
    import torch

    real, steps = torch.optim.AdamW.step, iter(range(1, 10**9))

    def at_this_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(steps) == step:
            act()
        return real(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", at_this_step)


def signal_at(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Ctrl+C, or another signal, in the middle of a step."""
    at_step(patch, step, lambda: os.kill(os.getpid(), number))


def at_attention(patch: pytest.MonkeyPatch, act: Callable[[int, Any], object]) -> None:
    """Call `act` with the number of each attention and its queries; what it raises, attention raises."""
    import torch

    real, calls = torch.nn.functional.scaled_dot_product_attention, iter(range(1, 10**9))

    def attention(query: Any, *args: Any, **kwargs: Any) -> Any:
        act(next(calls), query)
        return real(query, *args, **kwargs)

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


@pytest.fixture
def patched() -> Iterator[pytest.MonkeyPatch]:
    """A patch that a test may undo in its middle, before it runs the same command again."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
